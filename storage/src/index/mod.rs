//! The index: where extents lie, what the ledgers are, the rows of state. One family of a key-value store ([`kv`]) per
//! shard, without a write-ahead log: the journal is that log.
//!
//! The store blocks, so each shard has workers for its family, which [`Io`] runs on threads: one that serves, and one that
//! goes through all extents for compaction. Requests go to them through channels and answers come back as messages. Every
//! batch carries the position in the journal that it covers, in the same atomic write, so that what is on disk after a crash
//! says itself from where to replay. Source: `storage/README.md`, "Index".

mod compact;
pub mod kv;
pub mod model;
mod rebuild;
mod rocks;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::PathBuf;

use drava_protocol::{LedgerId, PartitionId};
use drava_runtime::foreign::{Inbox, InboxSender, Reply, ReplySender, inbox, reply};

pub(crate) use self::rebuild::{RebuildRows, SavedRows};
pub use self::rocks::IndexDb;

pub(crate) use self::compact::{ExtentKey, Move, MoveBatch, Scanned};

use self::compact::Moved;
use self::kv::{Kv, KvBatch};
use crate::block::ExtentHeader;
use crate::damage::{Damage, DamageRow};
use crate::foreign::{ForeignSegment, StoreId};
use crate::io::Io;
use crate::journal::JournalEnd;
use crate::segment::{COUNTER_MAX, SegmentId, SegmentKind};

const TABLE_COVERED: u8 = b'c';
const TABLE_EXTENT: u8 = b'e';
const TABLE_LEDGER: u8 = b'l';
const TABLE_PARTITION: u8 = b'p';
const TABLE_STATE: u8 = b's';
const TABLE_SEGMENT: u8 = b'g';
const TABLE_DAMAGE: u8 = b'd';
const TABLE_SCRUB: u8 = b'r';
const TABLE_FOREIGN: u8 = b'f';
/// Beside the covered position.
const KEY_CHECKPOINT: [u8; 2] = [TABLE_COVERED, b'c'];
const VERSION: u8 = 1;

#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    #[error("index at {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: rocksdb::Error,
    },
    #[error("set aside the unusable index at {path}")]
    SetAside {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("index: {0}")]
    Database(#[from] rocksdb::Error),
    #[error("index row: {0}")]
    Row(&'static str),
    #[error("index thread: {0}")]
    Thread(String),
}

/// The family of one shard; for [`crate::Store::open`], on whichever thread.
pub struct Index {
    name: String,
    pub(crate) kv: Box<dyn Kv>,
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Index({})", self.name)
    }
}

impl Index {
    /// An index over a family; `name` is what logs call it.
    pub fn new(name: &str, kv: Box<dyn Kv>) -> Index {
        Index { name: name.to_owned(), kv }
    }

    /// How far the family reaches; `None`: it was lost, or never made. Blocking.
    pub(crate) fn covered(&self) -> Result<Option<Covered>, IndexError> {
        self.kv.get(&[TABLE_COVERED])?.map(|value| Covered::decode(&value)).transpose()
    }

    /// Whether there is anything in the family that can be relied on. Blocking.
    pub fn is_made(&self) -> Result<bool, IndexError> {
        Ok(self.covered()?.is_some())
    }

    /// Live bytes in segments of other stores; none are 0. Blocking.
    pub(crate) fn foreign(&self) -> Result<BTreeMap<ForeignSegment, u64>, IndexError> {
        let mut loaded = Loaded::default();
        rows(&*self.kv, &[TABLE_FOREIGN], &[TABLE_FOREIGN], |key, value| {
            loaded.take(TABLE_FOREIGN, key, value).map(ControlFlow::Continue)
        })?;
        Ok(loaded.foreign)
    }

    pub(crate) fn put_foreign(&self, batch: &mut KvBatch, segment: ForeignSegment, bytes: u64) {
        batch.put(foreign_key(segment), bytes.to_le_bytes());
    }

    pub(crate) fn put_covered(&self, batch: &mut KvBatch, covered: Covered) {
        batch.put([TABLE_COVERED], covered.encode());
    }
}

/// Where an extent lies and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct ExtentRow {
    pub(crate) ledger: u32,
    pub(crate) first_offset: u64,
    pub(crate) next_offset: u64,
    pub(crate) segment: SegmentId,
    /// Of the extent's header, from the start of the segment.
    pub(crate) position: u64,
    /// Of the extent's header, from the start of its block.
    pub(crate) in_block: u32,
    /// Without the extent's header.
    pub(crate) body_bytes: u32,
    pub(crate) first_entry: u64,
    pub(crate) entry_count: u32,
    pub(crate) max_append_time_ms: u64,
    pub(crate) block_sequence: u64,
    /// The store that the segment belongs to; `None`: the one that the family belongs to.
    pub(crate) store: Option<StoreId>,
}

/// A row on its way from the family of an old store to that of a new one.
pub(crate) struct MovedRow {
    pub(crate) partition: PartitionId,
    pub(crate) key: Vec<u8>,
    pub(crate) value: Vec<u8>,
    /// Of an extent: where it lies, and the bytes of its body.
    pub(crate) extent: Option<(ForeignSegment, u64)>,
}

impl MovedRow {
    /// `None`: the row is about the store itself and not about a partition. `damages` counts the entries of the damage
    /// registries, which are numbered anew.
    pub(crate) fn decode(
        store: StoreId,
        key: &[u8],
        value: &[u8],
        damages: &mut u64,
    ) -> Result<Option<MovedRow>, IndexError> {
        let Some((table, mut rest)) = key.split_first() else { return Ok(None) };
        if *table == TABLE_DAMAGE {
            let moved = Damage::decode(value).and_then(Damage::without_place);
            let moved = moved.map(|(partition, value)| {
                let key = damage_key(*damages).to_vec();
                *damages += 1;
                MovedRow { partition, key, value, extent: None }
            });
            return Ok(moved);
        }
        if ![TABLE_EXTENT, TABLE_LEDGER, TABLE_PARTITION, TABLE_STATE].contains(table) {
            return Ok(None);
        }
        let partition = PartitionId(be_u64(&mut rest)?);
        let mut moved = MovedRow { partition, key: key.to_vec(), value: value.to_vec(), extent: None };
        if *table == TABLE_EXTENT {
            let mut row = ExtentRow::decode(be_u64(&mut rest)?, value)?;
            let store = *row.store.get_or_insert(store);
            moved.extent = Some(((store, row.segment), row.body_bytes as u64));
            moved.value = row.encode();
        }
        Ok(Some(moved))
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LedgerRow {
    pub(crate) first_offset: u64,
    pub(crate) next_offset: u64,
    pub(crate) bytes: u64,
    pub(crate) entries: u64,
    pub(crate) first_append_time_ms: u64,
    pub(crate) max_append_time_ms: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PartitionRow {
    pub(crate) start_offset: u64,
    pub(crate) end_offset: u64,
    /// The highest sequence a data ledger ever had.
    pub(crate) last_ledger: u32,
}

/// One use of a segment, as the family knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SegmentRow {
    pub(crate) generation: u64,
    /// Bytes of indexed extents in it.
    pub(crate) live_bytes: u64,
    pub(crate) kind: SegmentKind,
}

/// How far the family reaches into the journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Covered {
    /// Where replay starts.
    pub(crate) end: JournalEnd,
    /// The journal was closed in good order here.
    pub(crate) sealed: bool,
}

/// Changes that are applied together.
#[derive(Debug, Default)]
pub(crate) struct IndexBatch {
    pub(crate) extents: Vec<(PartitionId, ExtentRow)>,
    pub(crate) ledgers: Vec<(LedgerId, LedgerRow)>,
    pub(crate) partitions: Vec<(PartitionId, PartitionRow)>,
    pub(crate) state: Vec<(PartitionId, Vec<u8>, Option<Vec<u8>>)>,
    pub(crate) trims: Vec<Trim>,
    pub(crate) dropped: Vec<PartitionId>,
    pub(crate) generations: Vec<(SegmentId, u64)>,
    pub(crate) covered: Covered,
    /// Make everything up to here durable.
    pub(crate) flush: bool,
    /// Rows of the damage registry.
    pub(crate) damage: Vec<DamageRow>,
    /// How far the scrubber has come.
    pub(crate) scrub: Option<Vec<u8>>,
    /// The segment in which the last whole checkpoint starts, by generation.
    pub(crate) checkpoint: Option<u64>,
}

/// Everything of a partition below these is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Trim {
    pub(crate) partition: PartitionId,
    pub(crate) first_ledger: u32,
    pub(crate) start_offset: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// Bytes of extents that are no longer indexed.
    pub(crate) released: Vec<(SegmentId, u64)>,
    pub(crate) flushed: bool,
    /// The same of extents in other stores.
    pub(crate) released_foreign: Vec<(ForeignSegment, u64)>,
}

/// The family as it was found.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) covered: Option<Covered>,
    pub(crate) partitions: BTreeMap<PartitionId, LoadedPartition>,
    pub(crate) segments: Vec<(SegmentId, SegmentRow)>,
    /// Rows of the damage registry, by number.
    pub(crate) damage: Vec<(u64, Vec<u8>)>,
    /// How far the scrubber had come.
    pub(crate) scrub: Vec<u8>,
    /// Live bytes in segments of other stores.
    pub(crate) foreign: BTreeMap<ForeignSegment, u64>,
    /// The segment in which the last whole checkpoint starts, by generation.
    pub(crate) checkpoint: Option<u64>,
}

#[derive(Debug, Default)]
pub(crate) struct LoadedPartition {
    pub(crate) row: PartitionRow,
    pub(crate) ledgers: Vec<(u32, LedgerRow)>,
    pub(crate) state: Vec<(Vec<u8>, Vec<u8>)>,
}

enum Request {
    Stop(ReplySender<()>),
    Load(ReplySender<Result<Loaded, IndexError>>),
    Apply(Box<IndexBatch>, ReplySender<Result<Applied, IndexError>>),
    Extents {
        partition: PartitionId,
        offset: u64,
        count_max: usize,
        reply: ReplySender<Result<Vec<ExtentRow>, IndexError>>,
    },
    Since {
        partition: PartitionId,
        start_offset: u64,
        end_offset: u64,
        time_ms: u64,
        reply: ReplySender<Result<Option<ExtentRow>, IndexError>>,
    },
    Scan {
        from: ExtentKey,
        segments: Option<Vec<SegmentId>>,
        reply: ReplySender<Result<Scanned, IndexError>>,
    },
    Move(Box<MoveBatch>, ReplySender<Result<Moved, IndexError>>),
    Rebuild(Box<RebuildRows>, ReplySender<Result<(), IndexError>>),
    SavedRows {
        from: Vec<u8>,
        bytes_max: usize,
        reply: ReplySender<Result<SavedRows, IndexError>>,
    },
}

/// The shard's side of the index. Its workers end when this is dropped and their work is done.
#[derive(Clone)]
pub(crate) struct IndexThread {
    requests: InboxSender<Request>,
    scans: InboxSender<Request>,
}

/// The other side: serves the requests one after the other. Whoever runs it drops it at the end.
pub struct IndexWorker {
    name: String,
    // Dropped first: whoever is told of the end may want to open the database again.
    family: Family,
    requests: Inbox<Request>,
    stopped: Option<ReplySender<()>>,
}

/// One request to an index.
pub struct IndexRequest(Request);

impl IndexWorker {
    /// For its thread.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The next request; `None`: there will be none.
    pub async fn next(&mut self) -> Option<IndexRequest> {
        match self.requests.recv().await? {
            Request::Stop(reply) => {
                self.stopped = Some(reply);
                None
            }
            request => Some(IndexRequest(request)),
        }
    }

    /// Blocks for as long as the key-value store does.
    pub fn serve(&mut self, request: IndexRequest) {
        self.family.serve(request.0);
    }

    /// Serves all there will be, on this thread.
    pub fn run(mut self) {
        futures_lite::future::block_on(async {
            while let Some(request) = self.next().await {
                self.serve(request);
            }
        });
    }
}

impl IndexThread {
    pub(crate) fn start(io: &impl Io, index: Index) -> Result<IndexThread, IndexError> {
        let Index { name, kv } = index;
        let start = |work: &str, kv| {
            let (requests, inbox) = inbox();
            let family = Family { name: name.clone(), kv, segments: BTreeMap::new(), foreign: BTreeMap::new() };
            let worker = IndexWorker { name: format!("{work}-{name}"), family, requests: inbox, stopped: None };
            let started = io.start_index(worker).map(|()| requests);
            started.map_err(|error| IndexError::Thread(error.to_string()))
        };
        // Going through all extents takes seconds, and nobody waits behind that.
        let scans = start("scan", kv.reader())?;
        Ok(IndexThread { requests: start("ix", kv)?, scans })
    }

    pub(crate) async fn load(&self) -> Result<Loaded, IndexError> {
        let (sender, reply) = reply();
        self.ask(Request::Load(sender), reply).await
    }

    pub(crate) async fn apply(&self, batch: Box<IndexBatch>) -> Result<Applied, IndexError> {
        let (sender, reply) = reply();
        self.ask(Request::Apply(batch, sender), reply).await
    }

    /// The extents from the one that holds `offset`, or follows it, on.
    pub(crate) async fn extents(
        &self,
        partition: PartitionId,
        offset: u64,
        count_max: usize,
    ) -> Result<Vec<ExtentRow>, IndexError> {
        let (sender, reply) = reply();
        self.ask(Request::Extents { partition, offset, count_max, reply: sender }, reply).await
    }

    /// The first extent between the offsets with an entry of `time_ms` or later.
    pub(crate) async fn since(
        &self,
        partition: PartitionId,
        offsets: std::ops::Range<u64>,
        time_ms: u64,
    ) -> Result<Option<ExtentRow>, IndexError> {
        let (sender, reply) = reply();
        let (start_offset, end_offset) = (offsets.start, offsets.end);
        self.ask(Request::Since { partition, start_offset, end_offset, time_ms, reply: sender }, reply).await
    }

    /// Ends the workers after what was asked before; they let go of the database.
    pub(crate) async fn stop(&self) {
        for worker in [&self.scans, &self.requests] {
            let (sender, reply) = reply();
            if worker.send(Request::Stop(sender)).is_ok() {
                // Without an answer it has ended already.
                let _ended = reply.await;
            }
        }
    }

    async fn ask<T>(&self, request: Request, reply: Reply<Result<T, IndexError>>) -> Result<T, IndexError> {
        let gone = || IndexError::Thread("it has ended".into());
        let worker = if matches!(request, Request::Scan { .. }) { &self.scans } else { &self.requests };
        worker.send(request).map_err(|_| gone())?;
        reply.await.ok_or_else(gone)?
    }
}

/// What the worker works on.
struct Family {
    name: String,
    kv: Box<dyn Kv>,
    /// As in the family.
    segments: BTreeMap<SegmentId, SegmentRow>,
    /// Live bytes of each segment of another store, as in the family.
    foreign: BTreeMap<ForeignSegment, u64>,
}

impl Family {
    fn serve(&mut self, request: Request) {
        match request {
            Request::Stop(reply) => reply.send(()),
            Request::Load(reply) => reply.send(self.load()),
            Request::Apply(batch, reply) => reply.send(self.apply(&batch)),
            Request::Extents { partition, offset, count_max, reply } => {
                reply.send(self.extents(partition, offset, count_max));
            }
            Request::Since { partition, start_offset, end_offset, time_ms, reply } => {
                reply.send(self.since(partition, start_offset, end_offset, time_ms));
            }
            Request::Scan { from, segments, reply } => reply.send(self.scan_extents(from, segments.as_deref())),
            Request::Move(batch, reply) => reply.send(self.move_extents(&batch)),
            Request::Rebuild(rows, reply) => reply.send(self.rebuild(&rows)),
            Request::SavedRows { from, bytes_max, reply } => reply.send(self.saved_rows(&from, bytes_max)),
        }
    }

    fn load(&mut self) -> Result<Loaded, IndexError> {
        let mut loaded = self.read_all();
        if !matches!(&loaded, Ok(loaded) if loaded.covered.is_some()) {
            if let Err(error) = &loaded {
                tracing::error!(family = self.name, error = %error, "the index of a shard is unusable");
            }
            // Rows without a covered position, or that cannot be read, are made anew from the journal.
            let mut batch = KvBatch::default();
            batch.delete_range([0], [255]);
            self.kv.write(batch)?;
            loaded = Ok(Loaded::default());
        }
        let loaded = loaded?;
        self.segments = loaded.segments.iter().copied().collect();
        self.foreign = loaded.foreign.clone();
        Ok(loaded)
    }

    fn read_all(&self) -> Result<Loaded, IndexError> {
        let mut loaded = Loaded::default();
        if let Some(value) = self.kv.get(&[TABLE_COVERED])? {
            loaded.covered = Some(Covered::decode(&value)?);
        }
        if let Some(value) = self.kv.get(&KEY_CHECKPOINT)? {
            loaded.checkpoint = Some(le_u64(&mut &value[..])?);
        }
        loaded.scrub = self.kv.get(&[TABLE_SCRUB])?.unwrap_or_default();
        for table in [TABLE_PARTITION, TABLE_LEDGER, TABLE_STATE, TABLE_SEGMENT, TABLE_DAMAGE, TABLE_FOREIGN] {
            self.rows(&[table], &[table], |key, value| loaded.take(table, key, value).map(ControlFlow::Continue))?;
        }
        Ok(loaded)
    }

    /// Gives `visit` the rows from `from` on whose keys start with `prefix`, without the prefix.
    fn rows(
        &self,
        prefix: &[u8],
        from: &[u8],
        visit: impl FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>, IndexError>,
    ) -> Result<(), IndexError> {
        rows(&*self.kv, prefix, from, visit)
    }

    fn apply(&mut self, changes: &IndexBatch) -> Result<Applied, IndexError> {
        let mut batch = KvBatch::default();
        let mut applied = Applied::default();
        let mut touched = Touched::default();
        for &(segment, generation) in &changes.generations {
            touched.used.push((segment, generation, SegmentKind::Journal));
        }
        for (partition, row) in &changes.extents {
            batch.put(extent_key(*partition, row.first_offset), row.encode());
            debug_assert!(row.store.is_none(), "what is written lies in the own store: {row:?}");
            touched.add(row);
        }
        for (ledger, row) in &changes.ledgers {
            batch.put(ledger_key(*ledger), row.encode());
        }
        for (partition, row) in &changes.partitions {
            batch.put(partition_key(TABLE_PARTITION, *partition), row.encode());
        }
        for (partition, key, value) in &changes.state {
            let mut row = partition_key(TABLE_STATE, *partition).to_vec();
            row.extend_from_slice(key);
            match value {
                Some(value) => batch.put(row, &value[..]),
                None => batch.delete(row),
            }
        }
        // What goes is counted once, however many trims of a partition come together, or with its end.
        let dropped: BTreeSet<PartitionId> = changes.dropped.iter().copied().collect();
        let mut trims: BTreeMap<PartitionId, Trim> = BTreeMap::new();
        for trim in changes.trims.iter().filter(|trim| !dropped.contains(&trim.partition)) {
            let furthest = trims.entry(trim.partition).or_insert(*trim);
            furthest.first_ledger = furthest.first_ledger.max(trim.first_ledger);
            furthest.start_offset = furthest.start_offset.max(trim.start_offset);
        }
        for trim in trims.values() {
            self.release(changes, trim.partition, trim.start_offset, &mut touched, &mut applied)?;
            let (from, to) = (extent_key(trim.partition, 0), extent_key(trim.partition, trim.start_offset));
            batch.delete_range(from, to);
            let from = ledger_key(LedgerId { partition: trim.partition, sequence: 0 });
            let to = ledger_key(LedgerId { partition: trim.partition, sequence: trim.first_ledger });
            batch.delete_range(from, to);
        }
        for partition in dropped {
            self.release(changes, partition, u64::MAX, &mut touched, &mut applied)?;
            for table in [TABLE_EXTENT, TABLE_LEDGER, TABLE_PARTITION, TABLE_STATE] {
                let from = partition_key(table, partition);
                let to = match partition.0.checked_add(1) {
                    Some(next) => partition_key(table, PartitionId(next)).to_vec(),
                    None => vec![table + 1],
                };
                batch.delete_range(from.to_vec(), to);
            }
        }
        let rows = self.segment_rows(touched);
        rows.iter().for_each(|(segment, row)| batch.put(segment_key(*segment), row.encode()));
        for (number, value) in &changes.damage {
            let key = damage_key(*number);
            match value {
                Some(value) => batch.put(key, &value[..]),
                None => batch.delete(key),
            }
        }
        if let Some(scrub) = &changes.scrub {
            batch.put([TABLE_SCRUB], &scrub[..]);
        }
        let mut foreign = BTreeMap::new();
        for &(segment, bytes) in &applied.released_foreign {
            let before = || self.foreign.get(&segment).copied().unwrap_or(0);
            let left = foreign.entry(segment).or_insert_with(before);
            *left = left.saturating_sub(bytes);
        }
        for (&segment, &left) in &foreign {
            match left {
                0 => batch.delete(foreign_key(segment)),
                left => batch.put(foreign_key(segment), left.to_le_bytes()),
            }
        }
        if let Some(generation) = changes.checkpoint {
            batch.put(KEY_CHECKPOINT, generation.to_le_bytes());
        }
        batch.put([TABLE_COVERED], changes.covered.encode());
        self.kv.write(batch)?;
        if changes.flush {
            self.kv.flush()?;
            applied.flushed = true;
        }
        self.segments.extend(rows);
        self.foreign.extend(foreign);
        self.foreign.retain(|_, left| 0 < *left);
        Ok(applied)
    }

    /// The rows of the segments that a batch touches, as they are after it.
    fn segment_rows(&self, touched: Touched) -> BTreeMap<SegmentId, SegmentRow> {
        let known = |segment: SegmentId| self.segments.get(&segment).copied().unwrap_or_default();
        let mut rows = BTreeMap::new();
        for (segment, generation, kind) in touched.used {
            let row = known(segment);
            // Used again: what was live in it before was let go first.
            let row = if row.generation == generation { row } else { SegmentRow { generation, live_bytes: 0, kind } };
            rows.insert(segment, row);
        }
        for (segment, change) in touched.live_bytes {
            let row = rows.entry(segment).or_insert_with(|| known(segment));
            row.live_bytes = row.live_bytes.checked_add_signed(change).unwrap_or(0);
        }
        rows
    }

    /// Counts what lies below `start_offset`, in the family and in the batch itself.
    fn release(
        &self,
        changes: &IndexBatch,
        partition: PartitionId,
        start_offset: u64,
        touched: &mut Touched,
        applied: &mut Applied,
    ) -> Result<(), IndexError> {
        let mut count = |row: &ExtentRow| {
            if start_offset <= row.first_offset {
                return;
            }
            if let Some(store) = row.store {
                applied.released_foreign.push(((store, row.segment), row.body_bytes as u64));
            } else {
                touched.remove(row);
                applied.released.push((row.segment, row.body_bytes as u64));
            }
        };
        let mut from = 0;
        loop {
            let rows = self.extents(partition, from, 4096)?;
            rows.iter().filter(|row| from <= row.first_offset).for_each(&mut count);
            match rows.last() {
                Some(last) if rows.len() == 4096 && last.next_offset < start_offset => from = last.next_offset,
                _ => break,
            }
        }
        changes.extents.iter().filter(|(found, _)| *found == partition).for_each(|(_, row)| count(row));
        Ok(())
    }

    fn extents(&self, partition: PartitionId, offset: u64, count_max: usize) -> Result<Vec<ExtentRow>, IndexError> {
        let prefix = partition_key(TABLE_EXTENT, partition);
        let mut from = extent_key(partition, offset).to_vec();
        if let Some((key, _)) = self.kv.last_at(&from)?.filter(|(key, _)| key.starts_with(&prefix)) {
            from = key;
        }
        let mut rows = Vec::new();
        self.rows(&prefix, &from, |mut key, value| {
            let row = ExtentRow::decode(be_u64(&mut key)?, value)?;
            if offset < row.next_offset {
                rows.push(row);
            }
            Ok(if rows.len() < count_max { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        Ok(rows)
    }

    fn since(
        &self,
        partition: PartitionId,
        start_offset: u64,
        end_offset: u64,
        time_ms: u64,
    ) -> Result<Option<ExtentRow>, IndexError> {
        let mut found = None;
        self.rows(&partition_key(TABLE_EXTENT, partition), &extent_key(partition, start_offset), |mut key, value| {
            let row = ExtentRow::decode(be_u64(&mut key)?, value)?;
            if end_offset <= row.first_offset {
                return Ok(ControlFlow::Break(()));
            }
            found = Some(row).filter(|row| time_ms <= row.max_append_time_ms);
            Ok(if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        Ok(found)
    }
}

/// What a batch does to segments.
#[derive(Default)]
struct Touched {
    /// Segments with the generation and kind of the use that the batch is about.
    used: Vec<(SegmentId, u64, SegmentKind)>,
    live_bytes: BTreeMap<SegmentId, i64>,
}

impl Touched {
    fn add(&mut self, row: &ExtentRow) {
        *self.live_bytes.entry(row.segment).or_default() += row.body_bytes as i64;
    }

    fn remove(&mut self, row: &ExtentRow) {
        *self.live_bytes.entry(row.segment).or_default() -= row.body_bytes as i64;
    }
}

impl Loaded {
    /// Takes one row of a table, its key without the table's byte.
    fn take(&mut self, table: u8, mut key: &[u8], mut value: &[u8]) -> Result<(), IndexError> {
        if table == TABLE_FOREIGN {
            let store = StoreId(u16::from_be_bytes(take(&mut key)?));
            self.foreign.insert((store, SegmentId(be_u32(&mut key)?)), le_u64(&mut value)?);
            return Ok(());
        }
        if table == TABLE_SEGMENT {
            self.segments.push((SegmentId(be_u32(&mut key)?), SegmentRow::decode(value)?));
            return Ok(());
        }
        if table == TABLE_DAMAGE {
            self.damage.push((be_u64(&mut key)?, value.to_vec()));
            return Ok(());
        }
        let partition = PartitionId(be_u64(&mut key)?);
        if table == TABLE_PARTITION {
            let row = PartitionRow::decode(value)?;
            self.partitions.insert(partition, LoadedPartition { row, ..LoadedPartition::default() });
            return Ok(());
        }
        // Rows that were derived from entries of a partition deleted since.
        let Some(found) = self.partitions.get_mut(&partition) else { return Ok(()) };
        if table == TABLE_LEDGER {
            found.ledgers.push((be_u32(&mut key)?, LedgerRow::decode(value)?));
        } else {
            found.state.push((key.to_vec(), value.to_vec()));
        }
        Ok(())
    }
}

/// Gives `visit` the rows from `from` on whose keys start with `prefix`, without the prefix.
fn rows(
    kv: &dyn Kv,
    prefix: &[u8],
    from: &[u8],
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>, IndexError>,
) -> Result<(), IndexError> {
    let mut bad = None;
    kv.scan(from, &mut |key, value| {
        let Some(key) = key.strip_prefix(prefix) else { return ControlFlow::Break(()) };
        visit(key, value).unwrap_or_else(|error| {
            bad = Some(error);
            ControlFlow::Break(())
        })
    })?;
    bad.map_or(Ok(()), Err)
}

fn damage_key(number: u64) -> [u8; 9] {
    let mut key = [TABLE_DAMAGE; 9];
    key[1..].copy_from_slice(&number.to_be_bytes());
    key
}

fn foreign_key((store, segment): ForeignSegment) -> [u8; 7] {
    let mut key = [TABLE_FOREIGN; 7];
    key[1..3].copy_from_slice(&store.0.to_be_bytes());
    key[3..].copy_from_slice(&segment.0.to_be_bytes());
    key
}

fn partition_key(table: u8, partition: PartitionId) -> [u8; 9] {
    let mut key = [table; 9];
    key[1..].copy_from_slice(&partition.0.to_be_bytes());
    key
}

fn extent_key(partition: PartitionId, first_offset: u64) -> [u8; 17] {
    let mut key = [0; 17];
    key[..9].copy_from_slice(&partition_key(TABLE_EXTENT, partition));
    key[9..].copy_from_slice(&first_offset.to_be_bytes());
    key
}

fn segment_key(segment: SegmentId) -> [u8; 5] {
    let mut key = [TABLE_SEGMENT; 5];
    key[1..].copy_from_slice(&segment.0.to_be_bytes());
    key
}

fn ledger_key(ledger: LedgerId) -> [u8; 13] {
    let mut key = [0; 13];
    key[..9].copy_from_slice(&partition_key(TABLE_LEDGER, ledger.partition));
    key[9..].copy_from_slice(&ledger.sequence.to_be_bytes());
    key
}

impl ExtentRow {
    /// Where the own store has an extent: `in_block` bytes into the block `block_sequence`, which starts at `position`.
    pub(crate) fn of(
        header: &ExtentHeader,
        block_sequence: u64,
        segment: SegmentId,
        position: u64,
        in_block: u32,
    ) -> ExtentRow {
        ExtentRow {
            ledger: header.ledger.sequence,
            first_offset: header.base_offset,
            next_offset: header.next_offset(),
            segment,
            position: position + u64::from(in_block),
            in_block,
            body_bytes: header.body_bytes,
            first_entry: header.first_entry,
            entry_count: header.entry_count,
            max_append_time_ms: header.max_append_time_ms,
            block_sequence,
            store: None,
        }
    }

    pub(crate) fn encoded_bytes(&self) -> usize {
        60 + if self.store.is_some() { 2 } else { 0 }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_bytes());
        out.extend_from_slice(&self.next_offset.to_le_bytes());
        out.extend_from_slice(&self.ledger.to_le_bytes());
        out.extend_from_slice(&self.segment.0.to_le_bytes());
        out.extend_from_slice(&self.position.to_le_bytes());
        out.extend_from_slice(&self.in_block.to_le_bytes());
        out.extend_from_slice(&self.body_bytes.to_le_bytes());
        out.extend_from_slice(&self.entry_count.to_le_bytes());
        out.extend_from_slice(&self.first_entry.to_le_bytes());
        out.extend_from_slice(&self.max_append_time_ms.to_le_bytes());
        out.extend_from_slice(&self.block_sequence.to_le_bytes());
        if let Some(store) = self.store {
            out.extend_from_slice(&store.0.to_le_bytes());
        }
        out
    }

    pub(crate) fn decode(first_offset: u64, mut value: &[u8]) -> Result<ExtentRow, IndexError> {
        let value = &mut value;
        let next_offset = le_u64(value)?;
        in_order(first_offset, next_offset)?;
        Ok(ExtentRow {
            first_offset,
            next_offset,
            ledger: le_u32(value)?,
            segment: SegmentId(le_u32(value)?),
            position: le_position(value)?,
            in_block: le_u32(value)?,
            body_bytes: le_u32(value)?,
            entry_count: le_u32(value)?,
            first_entry: le_u64(value)?,
            max_append_time_ms: le_u64(value)?,
            block_sequence: le_u64(value)?,
            store: if value.is_empty() { None } else { Some(StoreId(u16::from_le_bytes(take(value)?))) },
        })
    }
}

impl LedgerRow {
    fn encode(&self) -> Vec<u8> {
        let fields = [
            self.first_offset,
            self.next_offset,
            self.bytes,
            self.entries,
            self.first_append_time_ms,
            self.max_append_time_ms,
        ];
        fields.iter().flat_map(|field| field.to_le_bytes()).collect()
    }

    fn decode(mut value: &[u8]) -> Result<LedgerRow, IndexError> {
        let value = &mut value;
        let (first_offset, next_offset) = (le_u64(value)?, le_u64(value)?);
        in_order(first_offset, next_offset)?;
        Ok(LedgerRow {
            first_offset,
            next_offset,
            bytes: le_u64(value)?,
            entries: le_u64(value)?,
            first_append_time_ms: le_u64(value)?,
            max_append_time_ms: le_u64(value)?,
        })
    }
}

impl PartitionRow {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(20);
        out.extend_from_slice(&self.start_offset.to_le_bytes());
        out.extend_from_slice(&self.end_offset.to_le_bytes());
        out.extend_from_slice(&self.last_ledger.to_le_bytes());
        out
    }

    fn decode(mut value: &[u8]) -> Result<PartitionRow, IndexError> {
        let value = &mut value;
        let (start_offset, end_offset) = (le_u64(value)?, le_u64(value)?);
        in_order(start_offset, end_offset)?;
        Ok(PartitionRow { start_offset, end_offset, last_ledger: le_u32(value)? })
    }
}

impl SegmentRow {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(17);
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.extend_from_slice(&self.live_bytes.to_le_bytes());
        out.push(self.kind as u8);
        out
    }

    fn decode(mut value: &[u8]) -> Result<SegmentRow, IndexError> {
        let value = &mut value;
        let (generation, live_bytes) = (le_u64(value)?, le_u64(value)?);
        let kind = match value.first() {
            // Written before there were compacted segments.
            None => SegmentKind::Journal,
            Some(&byte) => SegmentKind::from_byte(byte).ok_or(IndexError::Row("the kind of a segment is not known"))?,
        };
        Ok(SegmentRow { generation, live_bytes, kind })
    }
}

impl Covered {
    fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION, u8::from(self.sealed)];
        out.extend_from_slice(&self.end.segment.0.to_le_bytes());
        out.extend_from_slice(&self.end.generation.to_le_bytes());
        out.extend_from_slice(&self.end.position.to_le_bytes());
        out.extend_from_slice(&self.end.next_sequence.to_le_bytes());
        out.extend_from_slice(&self.end.previous_crc.to_le_bytes());
        out
    }

    fn decode(value: &[u8]) -> Result<Covered, IndexError> {
        let Some((&[version, sealed], mut rest)) = value.split_first_chunk() else {
            return Err(IndexError::Row("the covered position is cut"));
        };
        if version != VERSION {
            return Err(IndexError::Row("the version of the index is not known"));
        }
        let rest = &mut rest;
        let end = JournalEnd {
            segment: SegmentId(le_u32(rest)?),
            generation: le_u64(rest)?,
            position: le_position(rest)?,
            next_sequence: le_u64(rest)?,
            previous_crc: le_u32(rest)?,
        };
        if COUNTER_MAX < end.generation || !(1..=COUNTER_MAX).contains(&end.next_sequence) {
            return Err(IndexError::Row("the covered position is none"));
        }
        Ok(Covered { end, sealed: sealed != 0 })
    }
}

fn in_order(start_offset: u64, end_offset: u64) -> Result<(), IndexError> {
    if start_offset <= end_offset { Ok(()) } else { Err(IndexError::Row("its offsets end before they start")) }
}

/// In a segment, which is below 4 GiB.
fn le_position(bytes: &mut &[u8]) -> Result<u64, IndexError> {
    let position = le_u64(bytes)?;
    let is_one = position <= u64::from(u32::MAX);
    if is_one { Ok(position) } else { Err(IndexError::Row("a position is in no segment")) }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], IndexError> {
    let (head, rest) = bytes.split_first_chunk::<N>().ok_or(IndexError::Row("a row is cut"))?;
    *bytes = rest;
    Ok(*head)
}

fn be_u32(bytes: &mut &[u8]) -> Result<u32, IndexError> {
    take(bytes).map(u32::from_be_bytes)
}

fn be_u64(bytes: &mut &[u8]) -> Result<u64, IndexError> {
    take(bytes).map(u64::from_be_bytes)
}

fn le_u32(bytes: &mut &[u8]) -> Result<u32, IndexError> {
    take(bytes).map(u32::from_le_bytes)
}

fn le_u64(bytes: &mut &[u8]) -> Result<u64, IndexError> {
    take(bytes).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::model::ModelKv;

    #[test]
    fn what_a_batch_deletes_twice_is_let_go_of_once() {
        let kv = Box::new(ModelKv::default());
        let mut family = Family { name: "t".into(), kv, segments: BTreeMap::new(), foreign: BTreeMap::new() };
        let row = |first_offset| ExtentRow {
            ledger: 1,
            first_offset,
            next_offset: first_offset + 10,
            segment: SegmentId(3),
            position: 4096,
            in_block: 64,
            body_bytes: 100,
            first_entry: first_offset,
            entry_count: 10,
            max_append_time_ms: 0,
            block_sequence: 1,
            store: None,
        };
        let (trimmed, other) = (PartitionId(1), PartitionId(2));
        let extents = [0, 10, 20].map(|offset| (trimmed, row(offset))).into_iter();
        let batch = IndexBatch { extents: extents.chain([(other, row(0))]).collect(), ..IndexBatch::default() };
        family.apply(&batch).unwrap();
        assert_eq!(family.segments[&SegmentId(3)].live_bytes, 400);
        let trim = |start_offset| Trim { partition: trimmed, first_ledger: 1, start_offset };
        let batch = IndexBatch { trims: vec![trim(10), trim(20)], dropped: vec![trimmed], ..IndexBatch::default() };
        let applied = family.apply(&batch).unwrap();
        assert_eq!(family.segments[&SegmentId(3)].live_bytes, 100, "the other partition's extent is live");
        assert_eq!(applied.released, [(SegmentId(3), 100); 3]);
    }

    /// The count of the new use would belong to the old one, and after the next start to none: it would be written over.
    #[test]
    fn what_a_rebuild_counted_does_not_hide_a_segment_that_is_used_again() {
        let kv = Box::new(ModelKv::default());
        let mut family = Family { name: "t".into(), kv, segments: BTreeMap::new(), foreign: BTreeMap::new() };
        let counted = |generation, live_bytes| SegmentRow { generation, live_bytes, kind: SegmentKind::Journal };
        let segments = vec![(SegmentId(3), counted(7, 0)), (SegmentId(4), counted(8, 300))];
        family.rebuild(&RebuildRows { segments, ..RebuildRows::default() }).unwrap();
        let row = ExtentRow {
            ledger: 1,
            first_offset: 0,
            next_offset: 10,
            segment: SegmentId(3),
            position: 4096,
            in_block: 64,
            body_bytes: 100,
            first_entry: 0,
            entry_count: 10,
            max_append_time_ms: 0,
            block_sequence: 20,
            store: None,
        };
        let extents = vec![(PartitionId(1), row)];
        let batch = IndexBatch { extents, generations: vec![(SegmentId(3), 9)], ..IndexBatch::default() };
        family.apply(&batch).unwrap();
        let found = family.load().unwrap().segments;
        assert_eq!(found, [(SegmentId(3), counted(9, 100)), (SegmentId(4), counted(8, 300))]);
    }
}
