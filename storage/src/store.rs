//! The store: what the shard calls.

use std::cell::RefCell;
use std::ops::{Deref, Range};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::{EntryId, PartitionId, ShardId, batch};
use drava_runtime::chunk::Slice;

use crate::index::{Index, IndexError};
use crate::io::Io;
use crate::state::StateBatch;

/// How a shard stores. Sizes in bytes.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The directory of this shard's segments; made when missing.
    pub dir: PathBuf,
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
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig {
            dir: PathBuf::from("."),
            shard: ShardId(0),
            segment_bytes: 64 << 20,
            segments_spare: 2,
            block_bytes_max: 1 << 20,
            flush_bytes_min: 256 << 10,
            flushes_in_flight_max: 4,
            cache_bytes: 128 << 20,
            read_ahead_bytes: 4 << 20,
            ledger_bytes_max: 256 << 20,
            ledger_age_max: Duration::from_secs(3600),
            index_flush_bytes: 128 << 20,
            disk_reserve_bytes: 1 << 30,
            verify_reads: true,
        }
    }
}

/// What the shard is told about its tokens. Called on the executor, never from inside a call of the store.
pub trait FlushSink<T> {
    /// The entries of these tokens are durable and readable, in append order. Drained by the callee.
    fn flushed(&mut self, tokens: &mut Vec<T>);
    /// Whether these entries are on disk is not known. Drained by the callee. Nothing is flushed after this.
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
    #[error("a write to the journal failed earlier; nothing is appended any more")]
    ReadOnly,
    #[error("the disk has no room above its reserve")]
    Full,
    #[error("an entry of {entry_bytes} bytes; at most {limit_bytes} fit")]
    TooLarge { entry_bytes: u64, limit_bytes: u64 },
    #[error("the partition is deleted")]
    Deleted,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum FlushError {
    #[error("write to segment {segment} at {position}: {message}")]
    Write { segment: u32, position: u64, message: String },
    #[error("the index does not take what is durable: {0}")]
    Index(String),
    #[error("the journal was stopped by an earlier failure")]
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

/// Whole batches, each padded to 16 bytes, contiguous in memory. Cheap to clone; holds the memory while it lives.
#[derive(Clone)]
pub struct Run {
    pub(crate) memory: Rc<dyn AsRef<[u8]>>,
    pub(crate) start: u32,
    pub(crate) end: u32,
    /// Base offset of the first batch: at or below what was asked.
    pub first_offset: u64,
    /// One past the last message.
    pub next_offset: u64,
}

impl Deref for Run {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &(*self.memory).as_ref()[self.start as usize..self.end as usize]
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
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedRange {
    pub segment: u32,
    pub start_position: u64,
    pub end_position: u64,
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
    /// Batches after the position that `state` covers, in order.
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

/// Counters since open, and gauges. The fields are those of the shard's figures.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoreFigures {
    pub flushes: u64,
    pub flushed_bytes: u64,
    pub flush_micros_total: u64,
    pub staged_bytes: u64,
    pub cache_bytes: u64,
    pub cache_hits: u64,
    pub cache_misses: u64,
    pub disk_read_bytes: u64,
    pub segments: u64,
    pub segments_spare: u64,
    pub segments_recycled: u64,
    pub live_bytes: u64,
    pub ledgers_deleted: u64,
    pub index_batches: u64,
    pub read_only: bool,
}

/// The store of one shard. Clones share it. `T` is what the shard gives with each entry to recognise it by.
pub struct Store<I: Io, T: 'static>(Rc<(I, RefCell<Vec<T>>)>);

impl<I: Io, T: 'static> Clone for Store<I, T> {
    fn clone(&self) -> Self {
        Store(self.0.clone())
    }
}

#[allow(unused_variables, clippy::unused_async, clippy::missing_panics_doc)]
impl<I: Io, T: 'static> Store<I, T> {
    /// Opens or makes the store in `config.dir` and replays the journal. Nothing is flushed before [`Store::start`].
    pub async fn open(io: I, config: StoreConfig, index: Index) -> Result<(Store<I, T>, Recovered), OpenError> {
        unimplemented!()
    }

    /// Starts the flusher and the background work. Once.
    ///
    /// The sink is borrowed for the length of its calls: hold no borrow of it across an await.
    pub fn start(&self, sink: Rc<RefCell<dyn FlushSink<T>>>) {
        unimplemented!()
    }

    /// The slot of a partition, made when new. Idempotent; calling again changes the limits.
    pub fn open_partition(&self, partition: PartitionId, limits: PartitionLimits) -> PartitionSlot {
        unimplemented!()
    }

    /// Stages one batch; the sink hears the token when it is durable. Gives the token back with the error.
    ///
    /// Panics when `base_offset` is not the partition's next: offsets are the store's invariant.
    pub fn append(&self, slot: PartitionSlot, entry: NewEntry, token: T) -> Result<EntryId, (AppendError, T)> {
        unimplemented!()
    }

    /// Stages a row of state; `None` deletes it. The token, if any, is told like that of an entry.
    pub fn append_state(
        &self,
        slot: PartitionSlot,
        key: &[u8],
        value: Option<&[u8]>,
        token: Option<T>,
    ) -> Result<(), AppendError> {
        unimplemented!()
    }

    /// Bytes staged or in flight.
    pub fn staged_bytes(&self) -> u64 {
        unimplemented!()
    }

    pub fn span(&self, slot: PartitionSlot) -> Span {
        unimplemented!()
    }

    /// Appends runs from `offset` on to `out`: as many whole batches as fit into `bytes_max`, at least one.
    pub fn read_cached(&self, slot: PartitionSlot, offset: u64, bytes_max: usize, out: &mut Vec<Run>) -> Cached {
        unimplemented!()
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
        unimplemented!()
    }

    /// The offset of the first batch appended at `time_ms` or later; the end when there is none.
    pub async fn locate_time(&self, slot: PartitionSlot, time_ms: u64) -> Result<u64, ReadError> {
        unimplemented!()
    }

    /// Retention keeps everything from this offset on: the lowest durable cursor. `None`: no cursor holds anything.
    pub fn set_floor(&self, slot: PartitionSlot, offset: Option<u64>) {
        unimplemented!()
    }

    /// Deletes the partition and its state. Durable when it returns.
    pub async fn delete_partition(&self, slot: PartitionSlot) -> Result<(), AppendError> {
        unimplemented!()
    }

    /// Flushes all that is staged and makes the index durable up to it. Append nothing after it.
    pub async fn seal(&self) -> Result<(), FlushError> {
        unimplemented!()
    }

    pub fn figures(&self) -> StoreFigures {
        unimplemented!()
    }
}
