//! The life of a shard: open the store, serve by the first image, obey the control core, drain.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use drava_protocol::message::{PartitionState, SubscriptionState, TopicPolicy};
use drava_protocol::{NodeId, PartitionId, ShardId};
use drava_raft::Image;
use drava_runtime::chunk::ChunkPool;
use drava_runtime::foreign::{Inbox, InboxSender};
use drava_runtime::local::Broadcast;
use drava_runtime::mesh::SharedReceiver;
use drava_runtime::net::TcpListener;
use drava_runtime::sync::Semaphore;
use drava_runtime::task::Stop;
use drava_storage::{
    GlommioIo, Index, PartitionLimits, Recovered, RecoveredPartition, ReplayedBatch, StateBatch, Store, StoreConfig,
};

use super::command::ShardCommand;
use super::consumer::CursorSaver;
use super::counters::Counters;
use super::mesh::{Mesh, MeshEnds, MeshMessage};
use super::stats::ShardStats;
use super::{Hosted, Limits, Shard, listen, publish};
use crate::broker::Partition;
use crate::broker::partition::{Replayed, producer_key, producers_after};
use crate::control::request::ControlRequest;

/// The size of a receive chunk. Large enough that few frames straddle two, small enough to stay in the cache.
const CHUNK_BYTES: usize = 512 * 1024;
/// Free chunks that a busy shard keeps: with fewer, memory is mapped and faulted in again for what is received.
const CHUNKS_FREE_MAX: usize = 64;
/// Fetches that read from disk at the same time, each up to 1 MiB.
const FETCHES_MAX: u64 = 32;
/// How often a drain looks whether all is answered.
const DRAIN_POLL: Duration = Duration::from_millis(5);

/// What a shard needs to start. Made on the boot thread, moved to the shard's executor.
pub struct ShardConfig {
    pub id: ShardId,
    pub node: NodeId,
    pub listen: IpAddr,
    /// Shared by all shards of the node.
    pub shared_port: u16,
    /// The own port of each shard.
    pub ports: Arc<[u16]>,
    pub advertised_host: String,
    pub limits: Limits,
    pub store: StoreConfig,
    pub mesh: MeshEnds,
    pub commands: Inbox<ShardCommand>,
    pub control: InboxSender<ControlRequest>,
    /// Told once: the store is open, or why not.
    pub started: mpsc::Sender<Result<Started, String>>,
}

/// What a shard found when it opened its store.
#[derive(Clone, Debug)]
pub struct Started {
    pub shard: ShardId,
    pub partitions: usize,
    pub replayed_blocks: u64,
    pub replayed_bytes: u64,
    pub took: Duration,
    pub damaged_ranges: usize,
    /// The highest id of a partition that the store holds something of.
    pub highest_partition: Option<PartitionId>,
}

/// Runs a shard until it is drained. On the shard's executor.
pub async fn run(config: ShardConfig, index: Index) {
    let started = config.started.clone();
    let id = config.id;
    let (store, recovered) =
        match Store::open_with(GlommioIo::new(), config.store.clone(), index, derive_producers).await {
            Ok(opened) => opened,
            Err(error) => {
                drop(started.send(Err(format!("shard {id}: {}", with_sources(&error)))));
                return;
            }
        };
    let found = Started {
        shard: id,
        partitions: recovered.partitions.len(),
        replayed_blocks: recovered.replayed_blocks,
        replayed_bytes: recovered.replayed_bytes,
        took: recovered.took,
        damaged_ranges: recovered.damaged.len(),
        highest_partition: recovered.partitions.iter().map(|found| found.partition).max(),
    };
    for range in &recovered.damaged {
        tracing::error!(shard = %id, ?range, "part of the journal is damaged and quarantined; the rest is served");
    }
    let (shard, receivers, commands, listen) = Shard::new(config, store, recovered);
    store_start(&shard);
    drop(started.send(Ok(found)));
    for (from, receiver) in receivers.into_iter().enumerate() {
        if let Some(receiver) = receiver {
            drava_runtime::spawn(receive_mesh(shard.clone(), ShardId(from as u16), receiver));
        }
    }
    drava_runtime::spawn(shard.clone().save_cursors_as_they_move());
    drava_runtime::spawn(listen::sweep(shard.clone()));
    obey(shard, commands, listen).await;
}

/// What replayed batches say of their producers. A batch is replayed once: its producer has to be saved with it, or a
/// second crash would make its retry a new batch.
pub fn derive_producers(found: &[RecoveredPartition], out: &mut StateBatch) {
    for partition in found.iter().filter(|partition| !partition.replayed.is_empty()) {
        let id = partition.partition;
        let rows = partition.state.iter().map(|(key, value)| (&key[..], &value[..]));
        match producers_after(id, rows, partition.replayed.iter().map(replayed)) {
            Ok(mut producers) => producers.collect(|producer, row| match row {
                Some(row) => out.put(id, &producer_key(producer), &row),
                None => out.delete(id, &producer_key(producer)),
            }),
            Err(error) => tracing::error!(%error, "the producers of a partition cannot be read"),
        }
    }
}

fn replayed(batch: &ReplayedBatch) -> Replayed {
    Replayed {
        base_offset: batch.base_offset,
        record_count: batch.record_count,
        producer: batch.producer,
        producer_epoch: batch.producer_epoch,
        base_sequence: batch.base_sequence,
    }
}

fn store_start(shard: &Rc<Shard>) {
    shard.store.start(publish::sink(shard));
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The addresses that a shard listens on once it serves.
struct Listen {
    ip: IpAddr,
    shared_port: u16,
}

async fn receive_mesh(shard: Rc<Shard>, from: ShardId, receiver: SharedReceiver<MeshMessage>) {
    let receiver = receiver.connect().await;
    while let Some(message) = receiver.recv().await {
        drava_runtime::executor::mark_active();
        shard.set_clock();
        shard.mesh_message(from, message);
    }
}

/// Does what the control core says, until it says to drain.
async fn obey(shard: Rc<Shard>, mut commands: Inbox<ShardCommand>, listen: Listen) {
    let stop = Stop::default();
    let mut serving = false;
    while let Some(command) = commands.recv().await {
        match command {
            ShardCommand::Image { image, done } => {
                shard.apply(image).await;
                if !serving {
                    // Nobody is served before the shard knows what it owns.
                    serving = true;
                    let own = shard.ports[usize::from(shard.id.0)];
                    for port in [listen.shared_port, own] {
                        match TcpListener::bind((listen.ip, port)) {
                            Ok(listener) => {
                                drava_runtime::spawn(listen::accept(shard.clone(), listener, stop.clone()));
                            }
                            Err(error) => {
                                tracing::error!(shard = %shard.id, port, %error, "cannot listen; the node stops");
                                drava_runtime::leave(1);
                            }
                        }
                    }
                }
                done.send(());
            }
            ShardCommand::Stats { reply } => reply.send(shard.stats()),
            ShardCommand::Damage { reply } => reply.send(shard.store.damage()),
            ShardCommand::DescribePartition { partition, reply } => {
                let index = shard.by_id.borrow().get(&partition.0).copied();
                reply.send(index.map(|index| shard.partition_state(index)));
            }
            ShardCommand::Drain { done } => {
                stop.stop();
                shard.drain().await;
                done.send(());
                return;
            }
        }
    }
}

impl Shard {
    #[allow(clippy::type_complexity)]
    fn new(
        config: ShardConfig,
        store: Store<GlommioIo, publish::Token>,
        recovered: Recovered,
    ) -> (Rc<Shard>, Vec<Option<SharedReceiver<MeshMessage>>>, Inbox<ShardCommand>, Listen) {
        let recovered = recovered.partitions.into_iter().map(|found| (found.partition, found));
        let receive_bytes_max = config.limits.receive_bytes_max.max(CHUNK_BYTES);
        let shard = Shard {
            id: config.id,
            node: config.node,
            advertised_host: config.advertised_host,
            ports: config.ports,
            limits: config.limits,
            store,
            chunks: ChunkPool::new(CHUNK_BYTES, receive_bytes_max, CHUNKS_FREE_MAX),
            overdraft: Default::default(),
            relieving: Default::default(),
            counters: Counters::default(),
            image: Default::default(),
            hosted: Default::default(),
            by_id: Default::default(),
            recovered: std::cell::RefCell::new(recovered.collect::<BTreeMap<_, _>>()),
            damaged: Default::default(),
            connections: Default::default(),
            connection_next: std::cell::Cell::new(1),
            out_total: Default::default(),
            mesh: Mesh::start(config.mesh.senders),
            control: config.control,
            touched: Default::default(),
            room: Broadcast::default(),
            fetches: Rc::new(Semaphore::new(FETCHES_MAX)),
            cursor_saver: CursorSaver::default(),
            draining: Default::default(),
            read_only: Default::default(),
            clock_ms: Default::default(),
        };
        shard.set_clock();
        let listen = Listen { ip: config.listen, shared_port: config.shared_port };
        (Rc::new(shard), config.mesh.receivers, config.commands, listen)
    }

    /// Serves by `image`: opens what is new, lets go of what is gone.
    async fn apply(self: &Rc<Self>, image: Arc<Image>) {
        let is_mine = |id: &PartitionId| {
            image.partitions.get(id).is_some_and(|p| p.owner.node == self.node && p.owner.shard == self.id)
        };
        let older = self.image.borrow().clone();
        let mut gone = Vec::new();
        // Only these: a node with ten thousand topics creates the next one without a look at the others.
        for id in image.partitions_changed_since(&older) {
            if is_mine(&id) {
                let partition = &image.partitions[&id];
                let Some(topic) = image.topics.get(&partition.topic) else { continue };
                self.host(id, &topic.name, &topic.policy);
            } else if let Some(index) = self.by_id.borrow_mut().remove(&id.0) {
                gone.extend(self.hosted.borrow_mut()[index as usize].take());
            }
        }
        // Recovered and in no image: deleted before the store was told.
        let left_over = std::mem::take(&mut *self.recovered.borrow_mut());
        for id in left_over.into_keys() {
            let owner = image.partitions.get(&id).map(|partition| partition.owner);
            assert!(owner.is_none(), "partition {id} is in the store of shard {}, and {owner:?} owns it", self.id);
            let slot = self.store.open_partition(id, PartitionLimits::default());
            tracing::info!(shard = %self.id, partition = %id, "deleting what is left of a deleted partition");
            if let Err(error) = self.store.delete_partition(slot).await {
                tracing::warn!(partition = %id, %error, "a deleted partition keeps its room for now");
            }
        }
        *self.image.borrow_mut() = image;
        for hosted in gone {
            hosted.readers.notify_all();
            for waiting in &hosted.waiting {
                self.answer_deleted(waiting);
            }
            if let Err(error) = self.store.delete_partition(hosted.slot).await {
                tracing::warn!(partition = %hosted.partition.id, %error, "a deleted partition keeps its room for now");
            }
        }
    }

    fn host(&self, id: PartitionId, topic: &drava_protocol::topic::TopicName, policy: &TopicPolicy) {
        let limits = PartitionLimits {
            retention_age: (policy.retention_ms != 0).then(|| Duration::from_millis(policy.retention_ms)),
            retention_bytes: (policy.retention_bytes != 0).then_some(policy.retention_bytes),
            cache_bytes: policy.cache.limit_bytes(self.store.config().cache_bytes),
            trim_consumed: policy.trim_consumed,
        };
        let index = self.by_id.borrow().get(&id.0).copied();
        if let Some(hosted) = index.and_then(|index| {
            self.hosted.borrow_mut()[index as usize].as_mut().map(|h| {
                h.partition.durability = policy.durability;
                h.slot
            })
        }) {
            debug_assert_eq!(self.store.open_partition(id, limits), hosted, "a partition keeps its slot");
            return;
        }
        if self.damaged.borrow().contains_key(&id) {
            return;
        }
        let mut partition = Partition::new(id, topic.clone(), policy.durability);
        if let Some(found) = self.recovered.borrow_mut().remove(&id) {
            let rows = found.state.iter().map(|(key, value)| (&key[..], &value[..]));
            let replayed = found.replayed.iter().map(replayed);
            if let Err(error) = partition.restore(rows, replayed) {
                tracing::error!(shard = %self.id, %error, "the partition is not served");
                self.damaged.borrow_mut().insert(id, error.to_string());
                return;
            }
        }
        let slot = self.store.open_partition(id, limits);
        self.store.set_floor(slot, partition.subscriptions.floor());
        let mut hosted = self.hosted.borrow_mut();
        self.by_id.borrow_mut().insert(id.0, hosted.len() as u32);
        hosted.push(Some(Box::new(Hosted {
            partition,
            slot,
            readers: Rc::default(),
            waiting: Default::default(),
            touched: false,
            dirty_producers: true,
            dirty_cursors: false,
        })));
    }

    /// Finishes what is in flight and makes all of it durable. Bounded by `drain_timeout`; what is not answered by then
    /// was not acknowledged either.
    async fn drain(self: &Rc<Self>) {
        self.draining.set(true);
        for hosted in self.hosted.borrow().iter().flatten() {
            // Long polls answer now, with what there is.
            hosted.readers.notify_all();
        }
        let deadline = Instant::now() + self.limits.drain_timeout;
        let busy = || {
            0 < self.store.staged_bytes() || !self.connections.borrow().values().all(|connection| connection.is_idle())
        };
        while busy() && Instant::now() < deadline {
            drava_runtime::time::sleep(DRAIN_POLL).await;
        }
        self.save_cursors();
        if let Err(error) = self.store.seal().await {
            tracing::error!(shard = %self.id, %error, "the journal could not be sealed; the next start replays it");
        }
        for connection in self.connections.borrow().values() {
            connection.close();
        }
        drava_runtime::time::sleep(DRAIN_POLL).await;
    }

    pub(super) fn partition_state(&self, index: u32) -> PartitionState {
        let hosted = self.hosted.borrow();
        let hosted = hosted[index as usize].as_ref().expect("the index of a hosted partition");
        let span = self.store.span(hosted.slot);
        let subscriptions = hosted.partition.subscriptions.iter();
        PartitionState {
            partition: hosted.partition.id.0,
            start_offset: span.start_offset,
            end_offset: span.end_offset,
            ledgers: span.ledgers,
            stored_bytes: span.stored_bytes,
            subscriptions: subscriptions
                .map(|(name, offset, connected)| SubscriptionState { name: name.to_owned(), offset, connected })
                .collect(),
        }
    }

    fn stats(&self) -> ShardStats {
        let ticker = drava_runtime::executor::ticker_stats();
        let connections = self.connections.borrow();
        let consumers: usize = connections.values().map(|connection| connection.consumer_count()).sum();
        let store = self.store.figures();
        let counters = &self.counters;
        ShardStats {
            shard: self.id.0,
            connections: connections.len() as u64,
            connections_accepted: counters.connections_accepted.get(),
            connections_refused: counters.connections_refused.get(),
            frames_received: counters.frames_received.get(),
            frames_malformed: counters.frames_malformed.get(),
            bytes_received: counters.bytes_received.get(),
            bytes_sent: counters.bytes_sent.get(),
            batches_published: counters.batches_published.get(),
            messages_published: counters.messages_published.get(),
            publish_bytes: counters.publish_bytes.get(),
            duplicates: counters.duplicates.get(),
            publish_errors: counters.publish_errors.get(),
            batches_delivered: counters.batches_delivered.get(),
            delivered_bytes: counters.delivered_bytes.get(),
            requests_forwarded: counters.requests_forwarded.get(),
            partitions: self.by_id.borrow().len() as u64,
            consumers: consumers as u64,
            ticker_ticks: ticker.ticks,
            ticker_late: ticker.late,
            ticker_latest: ticker.latest,
            store,
            read_only: self.read_only.get() || store.read_only,
            receive_bytes: self.chunks.bytes_lent() as u64,
        }
    }
}
