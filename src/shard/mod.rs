//! The edge on a data core: sockets, the mesh, the store, and the tasks between them.
//!
//! The way of a request:
//!
//! 1. [`listen`] accepts on the node's shared port and on the shard's own.
//! 2. [`connection`] reads frames and calls [`Shard::request`].
//! 3. A request for a partition of this shard goes to [`publish`] or [`consumer`]; one for another shard of the node
//!    crosses the [`mesh`] once, and its answer names the right port.
//! 4. The store ([`drava_storage`]) tells the [`publish::Sink`] what is durable, and the sink answers.
//!
//! A [`Shard`] lives on one executor and never leaves it. Nothing on the data path waits for the control core: topics are
//! looked up in the newest metadata image that the shard was given.

pub mod command;
mod connection;
mod consumer;
mod counters;
mod listen;
mod mesh;
mod publish;
mod request;
mod run;
pub mod stats;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use drava_protocol::message::Message;
use drava_protocol::{ErrorCode, NodeId, PartitionId, ShardId, frame};
use drava_raft::Image;
use drava_runtime::chunk::ChunkPool;
use drava_runtime::foreign::InboxSender;
use drava_runtime::local::Broadcast;
use drava_runtime::sync::Semaphore;
use drava_storage::{GlommioIo, PartitionSlot, RecoveredPartition, Run, Store};
use rustc_hash::FxHashMap;

pub use mesh::{MeshEnds, full_mesh};
pub use run::{ShardConfig, Started, derive_producers, run};

use crate::broker::Partition;
use crate::control::request::ControlRequest;
use connection::Connection;
use consumer::CursorSaver;
use counters::Counters;
use mesh::{Load, Mesh};
use publish::{Token, WaitingDuplicate};

/// What clients may use of a shard. Sizes in bytes.
#[derive(Clone, Debug)]
pub struct Limits {
    pub connections_max: usize,
    /// The largest payload of one frame.
    pub payload_bytes_max: u32,
    /// Requests that one connection may have waiting for their answers.
    pub in_flight_max: u32,
    pub hello_timeout: Duration,
    /// From the first byte of a frame to its last.
    pub frame_timeout: Duration,
    /// Without the client taking a byte of what is sent.
    pub write_timeout: Duration,
    /// Memory for receiving, all connections together.
    pub receive_bytes_max: usize,
    /// Staged and not yet durable; beyond it no connection is read.
    pub staged_bytes_max: u64,
    pub cursor_save_interval: Duration,
    pub drain_timeout: Duration,
}

/// One data core.
pub struct Shard {
    pub id: ShardId,
    node: NodeId,
    /// The host that lookups name; empty: the one that the client is connected to.
    advertised_host: String,
    /// The own port of each shard of this node.
    ports: Arc<[u16]>,
    limits: Limits,
    store: Store<GlommioIo, Token>,
    chunks: ChunkPool,
    /// The connection that may receive beyond the limit of `chunks` until its frame is whole. With all memory held by
    /// unfinished frames none of them could end otherwise; one at a time does.
    overdraft: Cell<Option<u64>>,
    /// Unfinished frames are about to be asked for memory.
    relieving: Cell<bool>,
    counters: Counters,
    image: RefCell<Arc<Image>>,
    /// By index. The place of a deleted partition stays empty, so that no task meets another partition there.
    hosted: RefCell<Vec<Option<Box<Hosted>>>>,
    by_id: RefCell<FxHashMap<u64, u32>>,
    /// What the store recovered and no image has asked for yet.
    recovered: RefCell<BTreeMap<PartitionId, RecoveredPartition>>,
    /// Partitions whose saved state cannot be read, and why. They are not served.
    damaged: RefCell<BTreeMap<PartitionId, String>>,
    connections: RefCell<BTreeMap<u64, Rc<Connection>>>,
    connection_next: Cell<u64>,
    out_total: Rc<Cell<usize>>,
    mesh: Mesh,
    control: InboxSender<ControlRequest>,
    /// Partitions that the current flush reached; empty between flushes.
    touched: RefCell<Vec<u32>>,
    /// Changes when staged bytes became durable.
    room: Broadcast,
    /// Fetches that read at the same time.
    fetches: Rc<Semaphore>,
    cursor_saver: CursorSaver,
    draining: Cell<bool>,
    read_only: Cell<bool>,
    /// The clock of this turn, in ms since the epoch.
    clock_ms: Cell<u64>,
}

/// A partition that lives here, with what the edge needs beside its state.
struct Hosted {
    partition: Partition,
    slot: PartitionSlot,
    /// Changes when the end of the partition moved, and when it is deleted.
    readers: Rc<Broadcast>,
    waiting: VecDeque<WaitingDuplicate>,
    touched: bool,
    dirty_producers: bool,
    dirty_cursors: bool,
}

/// Who gets an answer.
#[derive(Clone, Debug)]
enum Responder {
    Local(Rc<Connection>),
    /// A connection of another shard, which forwarded a request of that load.
    Remote {
        shard: ShardId,
        connection: u64,
        load: Load,
    },
}

impl Shard {
    fn answer<M: Message>(&self, responder: &Responder, correlation: u64, message: &M) {
        match responder {
            Responder::Local(connection) => connection.answer(correlation, message),
            Responder::Remote { shard, connection, load } => {
                let mut frame = Vec::new();
                frame::encode(message, 0, correlation, 0, &mut frame);
                self.answer_remote(*shard, *connection, *load, frame);
            }
        }
    }

    fn answer_with<M: Message>(&self, responder: &Responder, correlation: u64, message: &M, runs: &mut Vec<Run>) {
        match responder {
            Responder::Local(connection) => connection.answer_with(correlation, message, runs),
            Responder::Remote { shard, connection, load } => {
                let payload_bytes: usize = runs.iter().map(|run| run.len()).sum();
                let mut frame = Vec::new();
                frame::encode(message, 0, correlation, payload_bytes as u32, &mut frame);
                for run in runs.drain(..) {
                    frame.extend_from_slice(&run);
                }
                self.answer_remote(*shard, *connection, *load, frame);
            }
        }
    }

    fn answer_error(&self, responder: &Responder, correlation: u64, code: ErrorCode, retry_after_ms: u32, text: &str) {
        match responder {
            Responder::Local(connection) => connection.answer_error(correlation, code, retry_after_ms, text),
            Responder::Remote { .. } => {
                let body = drava_protocol::message::Error { code: code as u16, retry_after_ms, text: text.to_owned() };
                self.answer(responder, correlation, &body);
            }
        }
    }

    fn answer_remote(&self, shard: ShardId, connection: u64, load: Load, mut frame: Vec<u8>) {
        frame::set_owner_port(&mut frame, self.ports[usize::from(self.id.0)]);
        self.mesh.answer(shard, connection, load, frame);
    }

    /// Whether more may be staged. A shard that is read-only stages nothing, and answers at once.
    fn has_room(&self) -> bool {
        self.store.staged_bytes() < self.limits.staged_bytes_max
    }

    /// Whether a large answer may be made now. Those for other shards are bounded by what the mesh lets under way.
    fn has_room_for(&self, responder: &Responder) -> bool {
        match responder {
            Responder::Local(connection) => connection.has_room(),
            Responder::Remote { .. } => true,
        }
    }

    /// Nobody is there to be answered.
    fn is_over(&self, responder: &Responder) -> bool {
        matches!(responder, Responder::Local(connection) if connection.is_over())
    }

    async fn room_for(&self, responder: &Responder) {
        match responder {
            Responder::Local(connection) => connection.room().await,
            Responder::Remote { .. } => {}
        }
    }

    /// The slot of the partition at `index`; `None` when it was deleted.
    fn slot(&self, index: u32) -> Option<PartitionSlot> {
        self.hosted.borrow()[index as usize].as_ref().map(|hosted| hosted.slot)
    }

    /// Append times need no more than the clock of the turn, and the turn of a batch is short.
    fn now_ms(&self) -> u64 {
        self.clock_ms.get()
    }

    fn set_clock(&self) {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Never backwards: append times of a partition go up even when the host's clock is set back.
        self.clock_ms.set(self.clock_ms.get().max(since_epoch.as_millis() as u64));
    }

    /// Whether `connection` has the overdraft, now or already.
    fn claim_overdraft(&self, connection: u64) -> bool {
        let holder = self.overdraft.get().unwrap_or(connection);
        self.overdraft.set(Some(holder));
        holder == connection
    }

    fn release_overdraft(&self, connection: u64) {
        if self.overdraft.get() == Some(connection) {
            self.overdraft.set(None);
            self.chunks.notify_returned();
        }
    }

    fn disconnected(&self, connection: u64) {
        self.connections.borrow_mut().remove(&connection);
    }

    fn close_consumer(&self, key: crate::broker::subscriptions::ConsumerKey) {
        let connection = self.connections.borrow().get(&key.connection).cloned();
        if let Some(consumer) = connection.and_then(|connection| connection.consumer(key.consumer)) {
            consumer.close();
        }
    }
}
