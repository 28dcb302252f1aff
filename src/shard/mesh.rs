//! Requests for a partition of another core of the node: forwarded once, answered through the core that was asked.
//!
//! Between each two shards runs one bounded channel a direction. A shard has at most [`FORWARDS_MAX`] requests under
//! way to each other shard and answers `Busy` beyond; an answer exists only for a request, so channels of twice that
//! length never fill up with both sides waiting on each other.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use drava_protocol::ShardId;
use drava_protocol::message::Kind;
use drava_runtime::local::Queue;
use drava_runtime::mesh::{SharedReceiver, SharedSender, new_bounded};

/// Requests under way from one shard to one other.
pub const FORWARDS_MAX: u32 = 256;
/// Of them, fetches: their answers are large, and they may wait long.
pub const FORWARDED_FETCHES_MAX: u32 = 32;
/// The payloads of all of them, copied twice. One larger payload goes alone.
pub const FORWARDED_BYTES_MAX: usize = 8 * 1024 * 1024;
const CHANNEL_CAPACITY: usize = 2 * FORWARDS_MAX as usize;

/// What a request takes of the limits while it is under way; its answer gives it back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    requests: u32,
    fetches: u32,
    payload_bytes: usize,
}

impl Load {
    pub fn of(kind: Kind, payload: &[u8]) -> Load {
        Load { requests: 1, fetches: u32::from(kind == Kind::Fetch), payload_bytes: payload.len() }
    }

    fn plus(self, other: Load) -> Load {
        Load {
            requests: self.requests + other.requests,
            fetches: self.fetches + other.fetches,
            payload_bytes: self.payload_bytes + other.payload_bytes,
        }
    }

    fn minus(self, other: Load) -> Load {
        Load {
            requests: self.requests - other.requests,
            fetches: self.fetches - other.fetches,
            payload_bytes: self.payload_bytes - other.payload_bytes,
        }
    }

    /// Whether this much may be under way to one shard.
    fn is_allowed(self) -> bool {
        self.requests <= FORWARDS_MAX
            && self.fetches <= FORWARDED_FETCHES_MAX
            && (self.payload_bytes <= FORWARDED_BYTES_MAX || self.requests == 1)
    }
}

/// What crosses from core to core. Owned bytes: receive chunks do not leave their core.
#[derive(Debug)]
pub enum MeshMessage {
    Request {
        connection: u64,
        correlation: u64,
        kind: Kind,
        body: Vec<u8>,
        payload: Vec<u8>,
    },
    /// The whole frame of the answer to a request of that load.
    Answer {
        connection: u64,
        load: Load,
        frame: Vec<u8>,
    },
}

/// The ends of all channels of one shard, by peer; its own place is empty. Made before the executors start.
pub struct MeshEnds {
    pub senders: Vec<Option<SharedSender<MeshMessage>>>,
    pub receivers: Vec<Option<SharedReceiver<MeshMessage>>>,
}

/// Channels between each two of `shards` shards.
pub fn full_mesh(shards: u16) -> Vec<MeshEnds> {
    let count = usize::from(shards);
    let empty =
        || MeshEnds { senders: (0..count).map(|_| None).collect(), receivers: (0..count).map(|_| None).collect() };
    let mut ends: Vec<MeshEnds> = (0..count).map(|_| empty()).collect();
    for from in 0..count {
        for to in (0..count).filter(|&to| to != from) {
            let (sender, receiver) = new_bounded(CHANNEL_CAPACITY);
            ends[from].senders[to] = Some(sender);
            ends[to].receivers[from] = Some(receiver);
        }
    }
    ends
}

/// The sending side of a shard.
#[derive(Debug)]
pub struct Mesh {
    peers: RefCell<Vec<Option<Rc<Peer>>>>,
}

#[derive(Debug)]
struct Peer {
    queue: Queue<MeshMessage>,
    under_way: Cell<Load>,
}

impl Mesh {
    /// Starts a task a peer that hands on what is queued for it. The receivers are polled by the shard.
    pub fn start(senders: Vec<Option<SharedSender<MeshMessage>>>) -> Mesh {
        let peers = senders
            .into_iter()
            .map(|sender| {
                let sender = sender?;
                let peer = Rc::new(Peer { queue: Queue::new(CHANNEL_CAPACITY), under_way: Cell::default() });
                let queue = peer.queue.clone();
                drava_runtime::spawn(async move {
                    let sender = sender.connect().await;
                    while let Some(message) = queue.recv().await {
                        if sender.send(message).await.is_err() {
                            break;
                        }
                    }
                });
                Some(peer)
            })
            .collect();
        Mesh { peers: RefCell::new(peers) }
    }

    /// Queues a request; `false`: too much is under way to that shard, and `request` was not made.
    pub fn forward(&self, to: ShardId, load: Load, request: impl FnOnce() -> MeshMessage) -> bool {
        let peers = self.peers.borrow();
        let Some(peer) = peers.get(usize::from(to.0)).and_then(Option::as_ref) else { return false };
        let under_way = peer.under_way.get().plus(load);
        if !under_way.is_allowed() || peer.queue.try_send(request()).is_err() {
            return false;
        }
        peer.under_way.set(under_way);
        true
    }

    /// Queues an answer to a request that came from `to`.
    pub fn answer(&self, to: ShardId, connection: u64, load: Load, frame: Vec<u8>) {
        let peers = self.peers.borrow();
        let peer = peers[usize::from(to.0)].as_ref().expect("requests come from peers");
        let sent = peer.queue.try_send(MeshMessage::Answer { connection, load, frame });
        assert!(sent.is_ok(), "more answers than requests under way from shard {to}");
    }

    /// An answer to a request of that load came from `from`.
    pub fn answered(&self, from: ShardId, load: Load) {
        let peers = self.peers.borrow();
        let peer = peers[usize::from(from.0)].as_ref().expect("answers come from peers");
        peer.under_way.set(peer.under_way.get().minus(load));
    }
}
