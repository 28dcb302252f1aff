//! The store: what the shard calls.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::frame::padded;
use drava_protocol::{EntryId, LedgerId, PartitionId, ShardId, batch};
use drava_runtime::chunk::Slice;
use drava_runtime::local::{Broadcast, Notify, oneshot};

use crate::backlog::Backlog;
use crate::block::{self, EXTENT_HEADER_BYTES};
use crate::cache::BlockCache;
use crate::checkpoint::Checkpoints;
use crate::compact::{CompactError, Compactor};
use crate::damage::{Damage, Registry};
use crate::flush::{Flushing, Indexing};
use crate::foreign::{Foreign, ForeignStores};
use crate::index::{Index, IndexError, IndexThread, PartitionRow};
use crate::io::{ALIGNMENT, Io};
use crate::journal::Journal;
use crate::ledger::{Ledgers, RollPolicy};
use crate::managed_ledger::ManagedLedger;
use crate::memory::{ANSWER_BYTES_PRESSED, Charged, Memory, MemoryFigures, RunMemory};
use crate::pool::{Block, BufferPool};
use crate::scrub::Scrub;
use crate::segment;
use crate::stage::{NewStaged, Staging};
use crate::state::{KEY_BYTES_MAX, RowChange, StateBatch, VALUE_BYTES_MAX};

/// On a full disk this part of a segment is left to rows of state.
const ROWS_PART: u64 = 16;
/// And this much to trims, deletions and the end of a checkpoint.
const LAST_PAGES: u64 = 16;

/// How a shard stores. Sizes in bytes.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The directory of this shard's segments; made when missing.
    pub dir: PathBuf,
    /// What the segments are stamped with: the number of the store, which is that of its shard until the node is started
    /// with another number of shards.
    pub shard: ShardId,
    /// A multiple of 4096, at least twice the largest block.
    pub segment_bytes: u64,
    /// Segments kept written with zeros and synced: those sync several times faster than fresh ones.
    pub segments_spare: usize,
    /// A flush takes at most this much, unless a single entry is larger.
    pub block_bytes_max: usize,
    /// While a flush is in flight another starts only when this much is staged.
    pub flush_bytes_min: usize,
    pub flushes_in_flight_max: usize,
    /// Flushed blocks kept in memory for readers of the tail.
    pub cache_bytes: u64,
    /// What one reader behind the cache reads ahead.
    pub read_ahead_bytes: u64,
    pub ledger_bytes_max: u64,
    pub ledger_age_max: Duration,
    /// The index is made durable each time the journal grew by this much; bounds what recovery replays.
    pub index_flush_bytes: u64,
    /// No new segments are made when the file system has less than this free.
    pub disk_reserve_bytes: u64,
    /// Whether the checksum of every batch is compared when it is read from disk.
    pub verify_reads: bool,
    /// What compaction reads in a second; 0: there is none.
    pub compaction_bytes_per_s: u64,
    /// How often it is looked whether anything is worth compacting.
    pub compaction_interval: Duration,
    /// A segment is compacted when at least so much of it is dead.
    pub compaction_garbage_percent: u32,
    /// A segment is compacted when a reader that catches up with all of it gets less than this with each read.
    pub compaction_fragment_bytes: u64,
    /// All memory together: the cache has what the rest leaves it, and readers no more than half.
    pub memory_bytes: u64,
    /// What the scrubber reads in a second; 0: nothing is scrubbed.
    pub scrub_bytes_per_s: u64,
    /// The scrubber begins anew so long after it began, at the earliest.
    pub scrub_interval: Duration,
    /// After so long without a write an empty block follows the last one, so that damage at rest in the last one is told
    /// from a torn tail. `None`: never.
    pub mark_after: Option<Duration>,
    /// Stores of earlier layouts of the node that its partitions may still have extents in.
    pub foreign: Option<ForeignStores>,
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig {
            dir: PathBuf::from("."),
            shard: ShardId(0),
            segment_bytes: 64 << 20,
            segments_spare: 2,
            block_bytes_max: 1 << 20,
            flush_bytes_min: 1 << 20,
            flushes_in_flight_max: 4,
            cache_bytes: 128 << 20,
            read_ahead_bytes: 4 << 20,
            ledger_bytes_max: 256 << 20,
            ledger_age_max: Duration::from_secs(3600),
            index_flush_bytes: 128 << 20,
            disk_reserve_bytes: 1 << 30,
            verify_reads: true,
            compaction_bytes_per_s: 64 << 20,
            compaction_interval: Duration::from_secs(10),
            compaction_garbage_percent: 50,
            compaction_fragment_bytes: 64 << 10,
            memory_bytes: 512 << 20,
            scrub_bytes_per_s: 8 << 20,
            scrub_interval: Duration::from_secs(7 * 86_400),
            mark_after: Some(Duration::from_millis(100)),
            foreign: None,
        }
    }
}

/// What the shard is told about its tokens. Called on the executor, never from inside a call of the store.
pub trait FlushSink<T> {
    /// The entries of these tokens are durable and readable, in append order. Drained by the callee.
    fn flushed(&mut self, tokens: &mut Vec<T>);
    /// Whether these entries are on disk is not known; they will never be readable, and their offsets are given out
    /// again. Drained by the callee. Everything that was staged or in flight fails in the same call. What is appended
    /// from then on is flushed as usual unless the store [is read-only](Store::is_read_only).
    fn failed(&mut self, tokens: &mut Vec<T>, error: &FlushError);
    /// Asks for the state derived from all entries flushed so far, as far as it changed since the last call.
    fn collect_state(&mut self, out: &mut StateBatch);
}

/// A partition of this store, by index. Valid until `delete_partition`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PartitionSlot(pub(crate) u32);

/// What a partition may keep. `Default`: everything, for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartitionLimits {
    /// Closed ledgers whose newest entry is older are deleted.
    pub retention_age: Option<Duration>,
    /// Oldest closed ledgers are deleted while the partition holds more.
    pub retention_bytes: Option<u64>,
    /// What the partition may hold in the ledger cache. `None`: as much as the shard has.
    pub cache_bytes: Option<u64>,
    /// Closed ledgers that every cursor has passed (see [`Store::set_floor`]) are deleted, whatever their age and size.
    /// Without a cursor nothing is: a subscriber that has not come yet must not find its messages gone.
    pub trim_consumed: bool,
}

/// One batch to append.
#[derive(Clone, Debug)]
pub struct NewEntry {
    /// The whole batch, without padding.
    pub bytes: Slice,
    /// Of `bytes`, as checked; its broker-owned fields are not looked at.
    pub header: batch::Header,
    /// Must be the `next_offset` of the partition.
    pub base_offset: u64,
    pub append_time_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    #[error("the disk or the index failed earlier; nothing is appended any more")]
    ReadOnly,
    #[error("there is no room for another journal segment: the disk is full to its reserve, or refuses it")]
    Full,
    #[error("an entry of {entry_bytes} bytes; at most {limit_bytes} fit")]
    TooLarge { entry_bytes: u64, limit_bytes: u64 },
    #[error("a row of {key_bytes} and {value_bytes} bytes is too large")]
    RowTooLarge { key_bytes: usize, value_bytes: usize },
    #[error("the partition is deleted")]
    Deleted,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum FlushError {
    #[error("write to segment {segment} at {position}: {message}")]
    Write { segment: u32, position: u64, message: String },
    #[error("no segment could take over after a failed write: {message}")]
    Roll { message: String },
    #[error("the index does not take what is durable: {0}")]
    Index(String),
    #[error("{bytes} bytes are too many for one block; at most {limit_bytes} fit")]
    TooLarge { bytes: u64, limit_bytes: u64 },
    #[error("the disk has no room above its reserve")]
    Full,
    #[error("the journal is closed")]
    Stopped,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// Read on from `start_offset`.
    #[error("offset {offset} is deleted; the partition starts at {start_offset}")]
    Trimmed { offset: u64, start_offset: u64 },
    /// These messages cannot be read; read on after them.
    #[error("the messages {} to {} are damaged on disk", range.start, range.end - 1)]
    Damaged { range: Range<u64> },
    #[error("offset {offset} is beyond the end at {end_offset}")]
    PastEnd { offset: u64, end_offset: u64 },
    #[error("read of segment {segment}: {message}")]
    Io { segment: u32, message: String },
    #[error("the index could not be read: {0}")]
    Index(String),
    #[error("the partition is deleted")]
    Deleted,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{what}")]
    Io {
        what: String,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("{path}: {reason}")]
    Segment { path: PathBuf, reason: String },
    #[error("configuration: {0}")]
    Config(String),
    #[error("make durable what was replayed")]
    Flush(#[from] FlushError),
}

/// Where a partition stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub start_offset: u64,
    /// Durable and readable below this.
    pub end_offset: u64,
    /// The next to assign: staged below this.
    pub next_offset: u64,
    pub ledgers: u32,
    /// Durable batches with padding.
    pub stored_bytes: u64,
}

/// What `read_cached` found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cached {
    /// Runs were appended; read on from here.
    Hit { next_offset: u64 },
    /// There are messages at the offset and they are not in memory.
    Miss,
    /// The offset is the end.
    AtEnd,
}

/// What a read of memory found.
enum InMemory {
    Runs {
        next_offset: u64,
    },
    Nothing,
    /// The messages, and no room for another run.
    NoRoom,
    AtEnd,
}

/// Whole batches, each padded to 16 bytes, contiguous in memory. Cheap to clone; holds the memory while it lives, and
/// other readers may wait for it to let go.
pub struct Run {
    memory: Rc<dyn RunMemory>,
    start: u32,
    end: u32,
    /// Base offset of the first batch: at or below what was asked.
    pub first_offset: u64,
    /// One past the last message.
    pub next_offset: u64,
}

impl Run {
    pub(crate) fn new(memory: Rc<dyn RunMemory>, bytes: Range<usize>, offsets: Range<u64>) -> Run {
        memory.hold();
        Run {
            memory,
            start: bytes.start as u32,
            end: bytes.end as u32,
            first_offset: offsets.start,
            next_offset: offsets.end,
        }
    }
}

impl Clone for Run {
    fn clone(&self) -> Run {
        self.memory.hold();
        Run { memory: self.memory.clone(), ..*self }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.memory.let_go();
    }
}

impl Deref for Run {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory.bytes()[self.start as usize..self.end as usize]
    }
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Run({} bytes, {}..{})", self.end - self.start, self.first_offset, self.next_offset)
    }
}

/// What `Store::open` found.
#[derive(Debug, Default)]
pub struct Recovered {
    /// By partition.
    pub partitions: Vec<RecoveredPartition>,
    pub replayed_blocks: u64,
    pub replayed_bytes: u64,
    pub took: Duration,
    /// Places in the journal that were damaged and are skipped.
    pub damaged: Vec<DamagedRange>,
    /// A block that was being written when the node stopped. It was never acknowledged.
    pub torn: Option<TornTail>,
    /// The index was lost or unusable and was made anew from the journal.
    pub index_rebuilt: bool,
    /// What it was made of.
    pub rebuilt: Option<Rebuilt>,
}

/// What a new index was made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rebuilt {
    pub segments: u64,
    /// As found; those that were deleted or moved are among them.
    pub extents: u64,
    pub partitions: u64,
    pub state_rows: u64,
    /// Messages that no segment has.
    pub missing: Vec<LostRange>,
}

/// Messages that were acknowledged and cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostRange {
    pub partition: PartitionId,
    pub offsets: Range<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedRange {
    pub segment: u32,
    pub start_position: u64,
    pub end_position: u64,
    /// Of this use of the segment.
    pub generation: u64,
    /// What it held, as far as that could be made out.
    pub lost: Vec<LostRange>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TornTail {
    pub segment: u32,
    pub position: u64,
}

#[derive(Clone, Debug)]
pub struct RecoveredPartition {
    pub partition: PartitionId,
    pub start_offset: u64,
    pub end_offset: u64,
    /// Key and value of each row, by key.
    pub state: Vec<(Vec<u8>, Vec<u8>)>,
    /// Batches after the position that `state` covers, in order. After a rebuild some may come before it.
    pub replayed: Vec<ReplayedBatch>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayedBatch {
    pub base_offset: u64,
    pub record_count: u32,
    pub append_time_ms: u64,
    pub producer: u64,
    pub producer_epoch: u32,
    pub base_sequence: u64,
}

impl ReplayedBatch {
    pub(crate) fn of(batch: &batch::Header) -> ReplayedBatch {
        ReplayedBatch {
            base_offset: batch.base_offset,
            record_count: batch.record_count,
            append_time_ms: batch.append_time_ms,
            producer: batch.producer,
            producer_epoch: batch.producer_epoch,
            base_sequence: batch.base_sequence,
        }
    }
}

/// The figures of a store: counters since it was opened, and gauges, which say so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreFigures {
    pub flushes: u64,
    pub flushed_bytes: u64,
    pub flush_micros_total: u64,
    /// Gauge: staged and not yet durable.
    pub staged_bytes: u64,
    /// Gauge.
    pub cache_bytes: u64,
    pub cache_hits: u64,
    pub cache_misses: u64,
    pub disk_read_bytes: u64,
    /// Gauge.
    pub segments: u64,
    /// Gauge.
    pub segments_spare: u64,
    pub segments_recycled: u64,
    /// Gauge: bytes of live entries.
    pub live_bytes: u64,
    pub ledgers_deleted: u64,
    pub index_batches: u64,
    /// Gauge: a write or sync failed, or the store was closed.
    pub read_only: bool,
    /// Written to compacted segments.
    pub compacted_bytes: u64,
    /// Passes over victims.
    pub compactions: u64,
    /// Copied and then not wanted: deleted while it was copied.
    pub compaction_dropped_bytes: u64,
    /// Gauge: segments that wait to be brought together, or for somebody to look whether they are worth it.
    pub fragmented_segments: u64,
    pub memory: MemoryFigures,
    /// Entries of the damage registry, and the messages that they name.
    pub damaged_ranges: u64,
    pub damaged_messages: u64,
    pub scrubbed_bytes: u64,
    /// Passes of the scrubber that came to their end.
    pub scrub_passes: u64,
    /// How often a write failed and the journal went on in a fresh segment.
    pub journal_rolls: u64,
    /// Gauge: bytes of live entries in stores of earlier layouts.
    pub foreign_live_bytes: u64,
}

/// The store of one shard. Clones share it. `T` is what the shard gives with each entry to recognise it by.
pub struct Store<I: Io, T: 'static>(pub(crate) Rc<Inner<I, T>>);

impl<I: Io, T: 'static> Clone for Store<I, T> {
    fn clone(&self) -> Self {
        Store(self.0.clone())
    }
}

type Sink<T> = Rc<RefCell<dyn FlushSink<T>>>;

pub(crate) struct Inner<I: Io, T: 'static> {
    pub(crate) io: I,
    pub(crate) config: StoreConfig,
    pub(crate) journal: Rc<Journal<I, Flushing<I, T>>>,
    pub(crate) index: IndexThread,
    pub(crate) pool: Rc<BufferPool<I>>,
    pub(crate) staging: RefCell<Staging<T>>,
    pub(crate) partitions: RefCell<Partitions>,
    pub(crate) cache: RefCell<BlockCache<I>>,
    pub(crate) backlog: Backlog,
    pub(crate) indexing: RefCell<Indexing>,
    pub(crate) figures: Cell<StoreFigures>,
    pub(crate) in_flight_bytes: Cell<u64>,
    /// Something was staged, written or made ready.
    pub(crate) woken: Rc<Notify>,
    pub(crate) index_woken: Notify,
    /// A block became durable, or nothing will any more.
    pub(crate) progress: Broadcast,
    pub(crate) stopped: Cell<bool>,
    pub(crate) sink: RefCell<Option<Sink<T>>>,
    pub(crate) compactor: Compactor,
    pub(crate) memory: Rc<Memory>,
    pub(crate) damage: RefCell<Registry>,
    pub(crate) scrub: RefCell<Scrub>,
    /// A block became durable that no later one vouches for.
    pub(crate) unvouched: Notify,
    pub(crate) mark_wanted: Cell<bool>,
    pub(crate) foreign: Foreign<I>,
    pub(crate) checkpoints: RefCell<Checkpoints>,
}

#[derive(Default)]
pub(crate) struct Partitions {
    /// By slot. Slots are never used again: a stale one must not name another partition.
    pub(crate) list: Vec<ManagedLedger>,
    pub(crate) by_id: BTreeMap<PartitionId, u32>,
}

impl Partitions {
    pub(crate) fn get_or_insert(&mut self, partition: PartitionId, roll: RollPolicy) -> &mut ManagedLedger {
        let list = &mut self.list;
        let index = *self.by_id.entry(partition).or_insert_with(|| {
            list.push(ManagedLedger::new(partition, PartitionRow::default(), Ledgers::default(), roll));
            (list.len() - 1) as u32
        });
        &mut self.list[index as usize]
    }
}

impl<I: Io, T: 'static> Store<I, T> {
    /// Opens or makes the store in `config.dir` and replays the journal. Nothing is written to that before [`Store::start`];
    /// what took long to replay is made durable in the index, and not replayed again.
    pub async fn open(io: I, config: StoreConfig, index: Index) -> Result<(Store<I, T>, Recovered), OpenError> {
        Store::open_with(io, config, index, |_, _| {}).await
    }

    /// As [`Store::open`]; `derive` gives the rows of state that follow from the replayed batches. They become durable
    /// together with the end of the replay: after a crash from then on those batches are not replayed again.
    pub async fn open_with(
        io: I,
        config: StoreConfig,
        index: Index,
        derive: impl FnOnce(&[RecoveredPartition], &mut StateBatch),
    ) -> Result<(Store<I, T>, Recovered), OpenError> {
        let (inner, recovered) = crate::open::open(io, config, index, derive).await?;
        Ok((Store(Rc::new(inner)), recovered))
    }

    /// Starts the flusher and the background work. Once.
    ///
    /// The sink is borrowed for the length of its calls: hold no borrow of it across an await.
    pub fn start(&self, sink: Rc<RefCell<dyn FlushSink<T>>>) {
        let inner = &self.0;
        let before = inner.sink.replace(Some(sink.clone()));
        assert!(before.is_none(), "a store is started once");
        inner.io.spawn(inner.clone().run_flusher(sink.clone()));
        inner.io.spawn(inner.clone().run_indexer(sink));
        inner.io.spawn(inner.clone().run_housekeeping());
        inner.io.spawn(inner.clone().run_compactor());
        inner.io.spawn(inner.clone().run_marker());
        inner.io.spawn(inner.clone().run_checkpoints());
        inner.io.spawn(inner.journal.clone().run());
        inner.io.spawn(inner.clone().run_scrubber());
        inner.woken.notify();
    }

    /// The slot of a partition, made when new. Idempotent; calling again changes the limits.
    pub fn open_partition(&self, partition: PartitionId, limits: PartitionLimits) -> PartitionSlot {
        let inner = &self.0;
        let roll = RollPolicy::new(inner.config.ledger_bytes_max, inner.config.ledger_age_max, &limits);
        let mut partitions = inner.partitions.borrow_mut();
        let found = partitions.get_or_insert(partition, roll);
        found.limit(limits, roll);
        found.opened = true;
        found.count_memory(&inner.memory);
        PartitionSlot(partitions.by_id[&partition])
    }

    /// Stages one batch; the sink hears the token when it is durable. Gives the token back with the error.
    ///
    /// Panics when `base_offset` is not the partition's next: offsets are the store's invariant.
    pub fn append(&self, slot: PartitionSlot, entry: NewEntry, token: T) -> Result<EntryId, (AppendError, T)> {
        let inner = &self.0;
        let mut partitions = inner.partitions.borrow_mut();
        let partition = &mut partitions.list[slot.0 as usize];
        let entry_bytes = entry.bytes.len() as u64;
        assert!(
            entry.header.batch_bytes as u64 == entry_bytes,
            "a batch of {} bytes in {entry_bytes}",
            entry.header.batch_bytes
        );
        assert!(
            entry.base_offset == partition.next_offset,
            "offset {} where {} is next",
            entry.base_offset,
            partition.next_offset
        );
        if partition.deleted {
            return Err((AppendError::Deleted, token));
        }
        if inner.journal.is_failed() || inner.stopped.get() {
            return Err((AppendError::ReadOnly, token));
        }
        let limit_bytes = inner.entry_bytes_max();
        if limit_bytes < entry_bytes {
            return Err((AppendError::TooLarge { entry_bytes, limit_bytes }, token));
        }
        let mut staging = inner.staging.borrow_mut();
        // Rows and the next checkpoint, which a full disk needs most, keep the last of the room.
        let ahead_bytes = staging.bytes() + inner.in_flight_bytes.get() + entry_bytes;
        if !inner.journal.has_room(ahead_bytes + inner.rows_room() + inner.config.block_bytes_max as u64) {
            return Err((AppendError::Full, token));
        }
        let body_bytes = padded(entry.bytes.len()) as u64;
        if staging.begins_group(body_bytes as usize) {
            inner.make_room(staging.memory_bytes(), body_bytes.max(inner.config.block_bytes_max as u64));
        }
        let (sequence, id) = partition.writer.add(body_bytes, entry.append_time_ms, &partition.roll);
        let record_count = entry.header.record_count;
        partition.next_offset += record_count as u64;
        let staged = NewStaged {
            partition_index: slot.0,
            ledger: LedgerId { partition: partition.partition, sequence },
            entry: id,
            bytes: entry.bytes,
            base_offset: entry.base_offset,
            record_count,
            append_time_ms: entry.append_time_ms,
        };
        staging.entry(staged, &mut partition.data_chain, token);
        drop(staging);
        inner.woken.notify();
        Ok(EntryId(id))
    }

    /// Stages a row of state; `None` deletes it. The token, if any, is told like that of an entry.
    ///
    /// A key has at most 65535 bytes, a value 256 KiB.
    pub fn append_state(
        &self,
        slot: PartitionSlot,
        key: &[u8],
        value: Option<&[u8]>,
        token: Option<T>,
    ) -> Result<(), AppendError> {
        let inner = &self.0;
        let value_bytes = value.map_or(0, <[u8]>::len);
        if KEY_BYTES_MAX < key.len() || VALUE_BYTES_MAX < value_bytes {
            return Err(AppendError::RowTooLarge { key_bytes: key.len(), value_bytes });
        }
        let change = match value {
            Some(value) => RowChange::Put { key: key.to_vec(), value: value.to_vec() },
            None => RowChange::Delete { key: key.to_vec() },
        };
        let mut partitions = inner.partitions.borrow_mut();
        let partition = &mut partitions.list[slot.0 as usize];
        // The very last of the room is for what gives some back: trims, deletions and a checkpoint.
        inner.check_rows(partition, change.encoded_bytes() as u64 + inner.checkpoint_room())?;
        let mut staging = inner.staging.borrow_mut();
        let group = staging.row(partition.partition, slot.0, change, &mut partition.state_chain);
        group.tokens.extend(token);
        drop(staging);
        inner.woken.notify();
        Ok(())
    }

    pub fn config(&self) -> &StoreConfig {
        &self.0.config
    }

    /// Bytes staged or in flight.
    pub fn staged_bytes(&self) -> u64 {
        self.0.staging.borrow().bytes() + self.0.in_flight_bytes.get()
    }

    /// No more entries are taken: the index failed, or no segment could take over after a failed write to the journal,
    /// or the store is sealed.
    pub fn is_read_only(&self) -> bool {
        self.0.journal.is_failed() || self.0.stopped.get()
    }

    pub fn span(&self, slot: PartitionSlot) -> Span {
        let partitions = self.0.partitions.borrow();
        let partition = &partitions.list[slot.0 as usize];
        Span {
            start_offset: partition.start_offset,
            end_offset: partition.end_offset,
            next_offset: partition.next_offset,
            ledgers: partition.ledgers.count() as u32,
            stored_bytes: partition.ledgers.bytes(),
        }
    }

    /// Appends runs from `offset` on to `out`: as many whole batches as fit into `bytes_max`, at least one. A miss, too,
    /// when readers hold as much memory as they may.
    pub fn read_cached(&self, slot: PartitionSlot, offset: u64, bytes_max: usize, out: &mut Vec<Run>) -> Cached {
        match self.read_memory(slot, offset, bytes_max, out) {
            InMemory::Runs { next_offset } => Cached::Hit { next_offset },
            InMemory::Nothing | InMemory::NoRoom => Cached::Miss,
            InMemory::AtEnd => Cached::AtEnd,
        }
    }

    fn read_memory(&self, slot: PartitionSlot, offset: u64, bytes_max: usize, out: &mut Vec<Run>) -> InMemory {
        let inner = &self.0;
        let bytes_max = inner.answer_bytes_max(bytes_max);
        let partitions = inner.partitions.borrow();
        let partition = &partitions.list[slot.0 as usize];
        if partition.end_offset <= offset {
            return InMemory::AtEnd;
        }
        let mut figures = inner.figures.get();
        let mut has_room = true;
        let mut next_offset = offset;
        let mut left = bytes_max;
        let mut hit = false;
        if let Some(first) = partition.find(offset) {
            let cache = inner.cache.borrow();
            for extent in partition.tail.range(first..) {
                if extent.first_offset > next_offset {
                    break;
                }
                let Some(block) = cache.get(extent.block_sequence) else { break };
                let body_start = extent.in_block as usize + EXTENT_HEADER_BYTES;
                let body = &block.bytes()[body_start..body_start + extent.body_bytes as usize];
                let Some(cut) = block::cut(body, extent.first_offset..extent.next_offset, next_offset, left) else {
                    break;
                };
                let run_bytes = cut.end - cut.start;
                if hit && left < run_bytes {
                    break;
                }
                let place = body_start + cut.start..body_start + cut.end;
                let Some(run) = inner.run_of(block, place, cut.first_offset..cut.next_offset) else {
                    has_room = false;
                    break;
                };
                out.push(run);
                hit = true;
                left = left.saturating_sub(run_bytes);
                next_offset = cut.next_offset;
                if left == 0 || cut.next_offset < extent.next_offset {
                    break;
                }
            }
        }
        if !hit {
            figures.cache_misses += 1;
            inner.figures.set(figures);
            return if has_room { InMemory::Nothing } else { InMemory::NoRoom };
        }
        figures.cache_hits += 1;
        inner.figures.set(figures);
        if inner.memory.is_pressed() {
            // Some may have been copied.
            inner.make_room(inner.staging.borrow().memory_bytes(), 0);
        }
        InMemory::Runs { next_offset }
    }

    /// As `read_cached`, from disk where needed, with read-ahead for whoever goes on where the last read ended.
    /// Returns where to read on; at the end that is `offset` itself and no run is appended.
    pub async fn read(
        &self,
        slot: PartitionSlot,
        offset: u64,
        bytes_max: usize,
        out: &mut Vec<Run>,
    ) -> Result<u64, ReadError> {
        loop {
            let freed = self.0.memory.freed().version();
            {
                let partitions = self.0.partitions.borrow();
                let partition = &partitions.list[slot.0 as usize];
                let (start_offset, end_offset) = (partition.start_offset, partition.end_offset);
                if partition.deleted {
                    return Err(ReadError::Deleted);
                }
                if offset < start_offset {
                    return Err(ReadError::Trimmed { offset, start_offset });
                }
                if end_offset < offset {
                    return Err(ReadError::PastEnd { offset, end_offset });
                }
            }
            match self.read_memory(slot, offset, bytes_max, out) {
                InMemory::Runs { next_offset } => return Ok(next_offset),
                InMemory::AtEnd => return Ok(offset),
                InMemory::Nothing => {
                    if let Some(next_offset) = self.0.read_backlog(slot.0, offset, bytes_max, out).await? {
                        return Ok(next_offset);
                    }
                }
                // What was read ahead of others goes first; then they must let go.
                InMemory::NoRoom if self.0.backlog.shed(None) => {}
                InMemory::NoRoom => {
                    self.0.memory.freed().changed(freed).await;
                }
            }
            self.0.io.yield_if_needed().await;
        }
    }

    /// The offset of the first batch appended at `time_ms` or later; the end when there is none.
    pub async fn locate_time(&self, slot: PartitionSlot, time_ms: u64) -> Result<u64, ReadError> {
        let inner = &self.0;
        let (id, offsets, tail_offset) = {
            let partitions = inner.partitions.borrow();
            let partition = &partitions.list[slot.0 as usize];
            if partition.deleted {
                return Err(ReadError::Deleted);
            }
            let Some(offsets) = partition.ledgers.since(time_ms) else { return Ok(partition.end_offset) };
            let tail_offset = partition.tail.front().map_or(u64::MAX, |extent| extent.first_offset);
            (partition.partition, offsets, tail_offset)
        };
        let mut found = None;
        if offsets.start < tail_offset {
            let row = inner.index.since(id, offsets.start..offsets.end.min(tail_offset), time_ms).await;
            found = row.map_err(|error| ReadError::Index(error.to_string()))?.map(|row| row.first_offset);
        }
        if found.is_none() {
            let partitions = inner.partitions.borrow();
            let mut tail = partitions.list[slot.0 as usize].tail.iter();
            found = tail.find(|extent| time_ms <= extent.max_append_time_ms).map(|extent| extent.first_offset);
        }
        let mut offset = found.unwrap_or(offsets.start);
        let mut runs = Vec::new();
        loop {
            runs.clear();
            match self.read(slot, offset, inner.config.block_bytes_max, &mut runs).await {
                Ok(next_offset) if next_offset == offset => return Ok(offset),
                Ok(next_offset) => {
                    for run in &runs {
                        let late = |batch: &&[u8]| time_ms <= batch::append_time_ms(batch);
                        if let Some(batch) = block::batches(run).flatten().find(late) {
                            return Ok(block::batch_base_offset(batch));
                        }
                    }
                    offset = next_offset;
                }
                Err(ReadError::Damaged { range }) => offset = range.end,
                Err(ReadError::Trimmed { start_offset, .. }) => offset = start_offset,
                Err(error) => return Err(error),
            }
        }
    }

    /// Retention keeps everything from this offset on: the lowest cursor that was handed to `append_state`. `None`: no
    /// cursor holds anything.
    pub fn set_floor(&self, slot: PartitionSlot, offset: Option<u64>) {
        self.0.partitions.borrow_mut().list[slot.0 as usize].floor = offset;
    }

    /// Deletes the partition and its state. Durable when it returns.
    pub async fn delete_partition(&self, slot: PartitionSlot) -> Result<(), AppendError> {
        let inner = &self.0;
        let durable = {
            let mut partitions = inner.partitions.borrow_mut();
            let partitions = &mut *partitions;
            let partition = &mut partitions.list[slot.0 as usize];
            inner.check_rows(partition, RowChange::Drop.encoded_bytes() as u64)?;
            partition.deleted = true;
            partitions.by_id.remove(&partition.partition);
            let mut staging = inner.staging.borrow_mut();
            let group = staging.row(partition.partition, slot.0, RowChange::Drop, &mut partition.state_chain);
            let (sender, receiver) = oneshot();
            group.waiters.push(sender);
            receiver
        };
        inner.woken.notify();
        durable.await.ok_or(AppendError::ReadOnly)
    }

    /// Compacts what is due now, without waiting for more of it; `false`: nothing is. The store does it by itself from
    /// time to time.
    pub async fn compact(&self) -> Result<bool, CompactError> {
        self.0.compact(true).await
    }

    /// Flushes all that is staged and makes the index durable up to it. Nothing is appended after it.
    pub async fn seal(&self) -> Result<(), FlushError> {
        let inner = &self.0;
        loop {
            if let Some(error) = inner.journal.failed() {
                return Err(error);
            }
            let version = inner.progress.version();
            if inner.staging.borrow().is_empty() && inner.journal.in_flight() == 0 {
                break;
            }
            inner.progress.changed(version).await;
        }
        inner.stopped.set(true);
        let sink = inner.sink.borrow().clone();
        let sealed = inner.send_index_batch(sink.as_ref(), true, true).await;
        inner.journal.stop();
        inner.woken.notify();
        inner.index_woken.notify();
        inner.unvouched.notify();
        sealed
    }

    /// Begins a journal with what the index has, so that it can be made anew from there. `false`: it is not whole.
    pub(crate) async fn begin_journal(&self) -> bool {
        if self.0.partitions.borrow().by_id.is_empty() {
            return self.0.begin_with_mark().await;
        }
        self.0.write_checkpoint().await.is_some()
    }

    /// Ends all background work and lets go of the index, without flushing anything: what is on disk is what a crash
    /// would leave. After [`Store::seal`] there is nothing left to lose.
    pub async fn close(&self) {
        let inner = &self.0;
        inner.stopped.set(true);
        inner.journal.fail(FlushError::Stopped);
        inner.journal.stop();
        inner.index_woken.notify();
        inner.unvouched.notify();
        inner.journal.quiesced().await;
        inner.journal.kept().await;
        inner.index.stop().await;
    }

    pub fn figures(&self) -> StoreFigures {
        let inner = &self.0;
        let mut figures = inner.figures.get();
        figures.staged_bytes = self.staged_bytes();
        figures.cache_bytes = inner.cache.borrow().bytes();
        figures.memory =
            inner.memory.figures(inner.staging.borrow().memory_bytes(), inner.cache.borrow().block_bytes());
        (figures.segments, figures.segments_spare, figures.segments_recycled, figures.live_bytes) =
            inner.journal.figures();
        figures.read_only = self.is_read_only();
        let compaction = inner.compactor.figures();
        figures.compacted_bytes = compaction.compacted_bytes;
        figures.compactions = compaction.compactions;
        figures.compaction_dropped_bytes = compaction.dropped_bytes;
        figures.fragmented_segments = inner.fragmented_segments();
        (figures.damaged_ranges, figures.damaged_messages) = inner.damage.borrow().count();
        figures.journal_rolls = inner.journal.rolls();
        figures.foreign_live_bytes = inner.foreign.live_bytes();
        figures
    }
}

impl<I: Io, T: 'static> Store<I, T> {
    /// What cannot be read any more: messages by partition and offset, then places that are not known to hold any.
    pub fn damage(&self) -> Vec<Damage> {
        self.0.damage.borrow().list()
    }
}

impl<I: Io, T: 'static> Inner<I, T> {
    /// What one answer may take now.
    pub(crate) fn answer_bytes_max(&self, bytes_max: usize) -> usize {
        if self.memory.is_pressed() { bytes_max.min(ANSWER_BYTES_PRESSED) } else { bytes_max }
    }

    /// A run of a block that is in the cache. `None`: readers hold as much as they may.
    fn run_of(&self, block: &Rc<Block<I>>, place: Range<usize>, offsets: Range<u64>) -> Option<Run> {
        let block_bytes = block.bytes().len();
        if block.is_held() || !self.memory.is_pressed() && self.memory.admits(block_bytes as u64) {
            return Some(Run::new(block.clone(), place, offsets));
        }
        if !self.memory.admits(place.len() as u64) {
            return None;
        }
        if block_bytes / 2 < place.len() && self.memory.admits(block_bytes as u64) {
            return Some(Run::new(block.clone(), place, offsets));
        }
        // A small part of a block must not keep all of it from going.
        let copy = block.bytes()[place].to_vec();
        let charge = self.memory.charge(copy.len() as u64);
        let all = 0..copy.len();
        Some(Run::new(Rc::new(Charged::new(copy, charge)), all, offsets))
    }

    /// The largest entry that fits into a segment with the headers around it.
    fn entry_bytes_max(&self) -> u64 {
        let segment_bytes = self.config.segment_bytes - segment::HEADER_BYTES - 2 * ALIGNMENT as u64;
        segment_bytes.min((block::BLOCK_BYTES_MAX - 2 * ALIGNMENT) as u64)
    }

    fn check_rows(&self, partition: &ManagedLedger, bytes: u64) -> Result<(), AppendError> {
        if partition.deleted {
            return Err(AppendError::Deleted);
        }
        if self.journal.is_failed() || self.stopped.get() {
            return Err(AppendError::ReadOnly);
        }
        let ahead_bytes = self.staging.borrow().bytes() + self.in_flight_bytes.get() + bytes;
        if !self.journal.has_room(ahead_bytes + 2 * ALIGNMENT as u64) {
            return Err(AppendError::Full);
        }
        Ok(())
    }

    /// What rows of state, trims and a checkpoint may still take when a full disk has no place for entries. A block of
    /// rows is small and takes a whole page, so this is for hundreds of flushes.
    fn rows_room(&self) -> u64 {
        self.checkpoint_room() + self.config.segment_bytes / ROWS_PART
    }

    fn checkpoint_room(&self) -> u64 {
        self.checkpoints.borrow().bytes + LAST_PAGES * ALIGNMENT as u64
    }
}
