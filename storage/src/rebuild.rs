//! The index made anew from what the segments hold.
//!
//! 1. Replay gives all blocks of the journal that are left, in order, and then those of compacted segments. Extents go
//!    to the empty family a bounded number at a time; the rest is gathered in memory, as every start does.
//! 2. The end of a checkpoint says that it named every partition and row that there was: those that neither it nor a
//!    later change names were deleted in a segment that is gone.
//! 3. Extents in stores that drain are repeated by checkpoints: their own store's journal says nothing of who owns them.
//! 4. [`Rebuild::finish`] reads the extents back in the order of their offsets and makes ledgers of them, and what is
//!    live in each segment. The covered position is written last, so that a rebuild that is cut off starts anew.
//!
//! An extent that was compacted may be in two segments: they hold the same messages, and the last one read counts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use drava_protocol::PartitionId;

use crate::block::{ExtentHeader, ExtentKind};
use crate::checkpoint::LastWhole;
use crate::foreign::ForeignSegment;
use crate::index::{ExtentRow, IndexBatch, IndexThread, PartitionRow, RebuildRows, SegmentRow, Trim};
use crate::io::Io;
use crate::ledger::{Added, Ledgers, RollPolicy};
use crate::managed_ledger::ManagedLedger;
use crate::recovery::{Visited, VisitedExtent, Visitor};
use crate::segment::{SegmentId, SegmentKind};
use crate::state::{Checkpoint, RowChange};
use crate::store::{LostRange, OpenError, Partitions, Rebuilt, ReplayedBatch};

/// Extents gathered before they are written to the family.
const EXTENTS_MAX: usize = 16 << 10;
/// Extents read back at a time.
const EXTENTS_READ: usize = 4096;
const PROGRESS: Duration = Duration::from_secs(1);

pub(crate) struct Rebuild<'a, I: Io> {
    io: &'a I,
    index: &'a IndexThread,
    shard: drava_protocol::ShardId,
    partitions: BTreeMap<PartitionId, Found>,
    /// Deleted, or named by nobody any more.
    gone: BTreeSet<PartitionId>,
    rows: Box<RebuildRows>,
    used: BTreeMap<SegmentId, (u64, SegmentKind)>,
    checkpoint: Option<u64>,
    last_whole: LastWhole,
    /// Extents of compacted segments that are not whole: they count where nothing else has the messages.
    doubtful: Vec<(PartitionId, ExtentRow)>,
    rebuilt: Rebuilt,
    bytes: u64,
    bytes_total: u64,
    told_at: Duration,
}

/// What is known of a partition.
#[derive(Default)]
struct Found {
    row: PartitionRow,
    /// The last block that named it.
    seen: u64,
    state: BTreeMap<Vec<u8>, FoundRow>,
    /// Batches, each with its block: those that a checkpoint's rows cover are let go.
    batches: Vec<(u64, ReplayedBatch)>,
}

/// A row of state.
struct FoundRow {
    /// The value is as of this block: the one that changed it, or the one a checkpoint read it at.
    as_of: u64,
    /// The last block that named it.
    seen: u64,
    /// `None`: deleted.
    value: Option<Vec<u8>>,
}

/// Bytes of extents by the segment that holds them.
#[derive(Default)]
struct Live {
    own: BTreeMap<SegmentId, u64>,
    foreign: BTreeMap<ForeignSegment, u64>,
}

/// What opening goes on with.
pub(crate) struct Finished {
    pub(crate) partitions: Partitions,
    pub(crate) state: BTreeMap<PartitionId, BTreeMap<Vec<u8>, Vec<u8>>>,
    pub(crate) batches: BTreeMap<PartitionId, Vec<ReplayedBatch>>,
    pub(crate) index: IndexBatch,
    pub(crate) live: Vec<(SegmentId, u64)>,
    pub(crate) foreign: BTreeMap<ForeignSegment, u64>,
    pub(crate) rebuilt: Rebuilt,
}

impl<'a, I: Io> Rebuild<'a, I> {
    /// `bytes_total`: of all segments that will be read.
    pub(crate) fn new(io: &'a I, index: &'a IndexThread, shard: drava_protocol::ShardId, bytes_total: u64) -> Self {
        Rebuild {
            io,
            index,
            shard,
            partitions: BTreeMap::new(),
            gone: BTreeSet::new(),
            rows: Box::default(),
            used: BTreeMap::new(),
            checkpoint: None,
            last_whole: LastWhole::default(),
            doubtful: Vec::new(),
            rebuilt: Rebuilt::default(),
            bytes: 0,
            bytes_total,
            told_at: io.now(),
        }
    }

    fn extent(&mut self, block: &Visited<'_>, extent: &VisitedExtent) {
        self.rows.extents.push((extent.header.ledger.partition, row_of(block, extent)));
        self.rebuilt.extents += 1;
    }

    /// A block of a compacted segment. The messages `bad` are not whole in it: it was being written, and then others have
    /// them, or it was damaged.
    pub(crate) fn compacted(&mut self, block: &Visited<'_>, bad: &[LostRange]) {
        for extent in block.extents.iter().filter(|extent| extent.header.kind == ExtentKind::Data) {
            let header = &extent.header;
            let id = header.ledger.partition;
            let has =
                |lost: &LostRange| header.base_offset < lost.offsets.end && lost.offsets.start < header.next_offset();
            // A whole checkpoint names all there are. Where it is damaged this may be the only trace of a partition.
            if self.gone.contains(&id) || self.checkpoint.is_some() && !self.partitions.contains_key(&id) {
                continue;
            }
            self.partitions.entry(id).or_default();
            if bad.iter().any(|lost| lost.partition == id && has(lost)) {
                self.doubtful.push((id, row_of(block, extent)));
            } else {
                self.extent(block, extent);
            }
        }
        self.used.insert(block.segment, (block.header.id.generation, SegmentKind::Compacted));
        self.bytes += block.header.block_bytes as u64;
    }

    fn change(&mut self, id: PartitionId, sequence: u64, change: RowChange) {
        match change {
            RowChange::Drop => {
                self.partitions.remove(&id);
                self.gone.insert(id);
                return;
            }
            RowChange::Checkpoint(Checkpoint::End { covered, generation }) => {
                return self.end_checkpoint(covered, generation);
            }
            RowChange::Put { .. } | RowChange::Delete { .. } | RowChange::Trim(_) | RowChange::Checkpoint(_) => {}
        }
        if self.gone.contains(&id) {
            return;
        }
        let found = self.partitions.entry(id).or_default();
        found.seen = sequence;
        match change {
            RowChange::Put { key, value } => {
                found.state.insert(key, FoundRow { as_of: sequence, seen: sequence, value: Some(value) });
            }
            RowChange::Delete { key } => {
                found.state.insert(key, FoundRow { as_of: sequence, seen: sequence, value: None });
            }
            RowChange::Trim(trim) => {
                found.row.start_offset = found.row.start_offset.max(trim.start_offset);
                found.row.end_offset = found.row.end_offset.max(trim.start_offset);
                found.row.last_ledger = found.row.last_ledger.max(trim.first_ledger.saturating_sub(1));
            }
            RowChange::Checkpoint(Checkpoint::Row { covered, key, value }) => {
                // A change behind the place where this was read wins, although it comes before it in the journal.
                if found.state.get(&key).is_none_or(|row| row.as_of <= covered) {
                    found.state.insert(key, FoundRow { as_of: covered, seen: sequence, value: Some(value) });
                }
            }
            RowChange::Checkpoint(Checkpoint::Extent { row, .. }) => {
                found.row.end_offset = found.row.end_offset.max(row.next_offset);
                self.rows.extents.push((id, row));
                self.rebuilt.extents += 1;
            }
            RowChange::Checkpoint(Checkpoint::Partition { row, .. }) => {
                found.row.start_offset = found.row.start_offset.max(row.start_offset);
                found.row.end_offset = found.row.end_offset.max(row.end_offset);
                found.row.last_ledger = found.row.last_ledger.max(row.last_ledger);
            }
            RowChange::Drop | RowChange::Checkpoint(Checkpoint::End { .. }) => {}
        }
    }

    /// Everything was repeated that the block `covered` and those before it left.
    fn end_checkpoint(&mut self, covered: u64, generation: u64) {
        // What one that is not whole does not name is not deleted.
        if !self.last_whole.end(covered) {
            return;
        }
        self.checkpoint = Some(generation);
        let gone = &mut self.gone;
        self.partitions.retain(|id, found| {
            if found.seen <= covered {
                gone.insert(*id);
                return false;
            }
            found.state.retain(|_, row| covered < row.seen);
            found.batches.retain(|(block, _)| covered < *block);
            true
        });
    }

    /// Makes the rest of the index of what was read.
    pub(crate) async fn finish(mut self, roll: RollPolicy) -> Result<Finished, OpenError> {
        self.write_out().await?;
        for (id, row) in std::mem::take(&mut self.doubtful) {
            let found = self.index.extents(id, row.first_offset, 1).await?;
            if found.first().is_none_or(|found| row.first_offset < found.first_offset) {
                self.rows.extents.push((id, row));
                self.rebuilt.extents += 1;
            }
        }
        let trims = self.partitions.iter().filter(|(_, found)| 0 < found.row.start_offset);
        self.rows.trims = trims
            .map(|(id, found)| Trim { partition: *id, first_ledger: 0, start_offset: found.row.start_offset })
            .collect();
        self.rows.dropped = self.gone.iter().copied().collect();
        self.index.rebuild(std::mem::take(&mut self.rows)).await?;

        let mut finished = Finished {
            partitions: Partitions::default(),
            state: BTreeMap::new(),
            batches: BTreeMap::new(),
            index: IndexBatch { checkpoint: self.checkpoint, ..IndexBatch::default() },
            live: Vec::new(),
            foreign: BTreeMap::new(),
            rebuilt: Rebuilt::default(),
        };
        let mut live = Live::default();
        for (id, found) in std::mem::take(&mut self.partitions) {
            let (row, ledgers) = self.ledgers(id, &found, &mut live).await?;
            let partition = ManagedLedger::new(id, row, ledgers, roll);
            finished
                .index
                .ledgers
                .extend(partition.ledgers.rows().map(|(ledger, row)| (partition.ledger(ledger), row)));
            let slot = finished.partitions.list.len() as u32;
            finished.partitions.by_id.insert(id, slot);
            finished.partitions.list.push(partition);
            let state: BTreeMap<_, _> =
                found.state.into_iter().filter_map(|(key, row)| Some((key, row.value?))).collect();
            let rows = state.iter().map(|(key, value)| (id, key.clone(), Some(value.clone())));
            finished.index.state.extend(rows);
            self.rebuilt.state_rows += state.len() as u64;
            finished.state.insert(id, state);
            finished.batches.insert(id, found.batches.into_iter().map(|(_, batch)| batch).collect());
        }
        self.rebuilt.partitions = finished.partitions.list.len() as u64;
        self.rebuilt.segments = self.used.len() as u64;
        let mut segments = Vec::new();
        for (segment, (generation, kind)) in std::mem::take(&mut self.used) {
            let live_bytes = live.own.get(&segment).copied().unwrap_or(0);
            segments.push((segment, SegmentRow { generation, live_bytes, kind }));
            finished.live.push((segment, live_bytes));
        }
        finished.foreign = live.foreign.clone();
        let rows = RebuildRows { segments, foreign: live.foreign, ..RebuildRows::default() };
        self.index.rebuild(Box::new(rows)).await?;
        // A new store has none to make.
        if 0 < self.bytes {
            tracing::info!(shard = self.shard.0, rebuilt = ?self.rebuilt, "the index was made anew");
        }
        finished.rebuilt = self.rebuilt;
        Ok(finished)
    }

    /// The ledgers of a partition from its extents, in order; adds what they keep alive.
    async fn ledgers(
        &mut self,
        id: PartitionId,
        found: &Found,
        live: &mut Live,
    ) -> Result<(PartitionRow, Ledgers), OpenError> {
        let mut row = found.row;
        let mut ledgers = Ledgers::default();
        let mut removed = Vec::new();
        let mut end = row.start_offset;
        let mut from = 0;
        loop {
            let extents = self.index.extents(id, from, EXTENTS_READ).await?;
            let read = extents.len();
            for extent in extents.iter().filter(|extent| from <= extent.first_offset) {
                let last_ledger = ledgers.last().map_or(0, |(sequence, _)| *sequence);
                if extent.first_offset < end || extent.ledger < last_ledger {
                    // What was compacted is there twice, and the other one may be longer.
                    if end < extent.next_offset {
                        tracing::error!(partition = %id, ?extent, "an extent does not follow the one before it; it is left out");
                    }
                    removed.push((id, extent.first_offset));
                    continue;
                }
                if end < extent.first_offset {
                    let lost = LostRange { partition: id, offsets: end..extent.first_offset };
                    tracing::error!(partition = %id, offsets = ?lost.offsets, "no segment has these messages");
                    self.rebuilt.missing.push(lost);
                }
                ledgers.add(&Added {
                    sequence: extent.ledger,
                    first_offset: extent.first_offset,
                    next_offset: extent.next_offset,
                    bytes: extent.body_bytes as u64,
                    entries: extent.entry_count as u64,
                    max_append_time_ms: extent.max_append_time_ms,
                });
                row.last_ledger = row.last_ledger.max(extent.ledger);
                end = extent.next_offset;
                let live_bytes = match extent.store {
                    None => live.own.entry(extent.segment).or_default(),
                    Some(store) => live.foreign.entry((store, extent.segment)).or_default(),
                };
                *live_bytes += extent.body_bytes as u64;
            }
            match extents.last() {
                Some(last) if read == EXTENTS_READ && from < last.next_offset => from = last.next_offset,
                _ => break,
            }
        }
        if !removed.is_empty() {
            self.index.rebuild(Box::new(RebuildRows { removed, ..RebuildRows::default() })).await?;
        }
        row.end_offset = row.end_offset.max(end);
        Ok((row, ledgers))
    }

    async fn write_out(&mut self) -> Result<(), OpenError> {
        if !self.rows.extents.is_empty() {
            self.index.rebuild(std::mem::take(&mut self.rows)).await?;
        }
        Ok(())
    }

    fn tell(&mut self) {
        let now = self.io.now();
        if self.told_at + PROGRESS <= now {
            self.told_at = now;
            let percent = (self.bytes * 100).checked_div(self.bytes_total).unwrap_or(100);
            let (bytes, bytes_total) = (self.bytes, self.bytes_total);
            tracing::info!(shard = self.shard.0, percent, bytes, bytes_total, "making the index anew from the journal");
        }
    }
}

fn row_of(block: &Visited<'_>, extent: &VisitedExtent) -> ExtentRow {
    ExtentRow::of(&extent.header, extent.header.block_sequence, block.segment, block.position, extent.position as u32)
}

impl<I: Io> Visitor for Rebuild<'_, I> {
    fn block(&mut self, block: &Visited<'_>) {
        let sequence = block.header.id.sequence;
        self.last_whole.block(sequence);
        for extent in block.extents.iter().filter(|extent| extent.header.kind == ExtentKind::Data) {
            let id = extent.header.ledger.partition;
            if self.gone.contains(&id) {
                continue;
            }
            self.extent(block, extent);
            let found = self.partitions.entry(id).or_default();
            found.seen = sequence;
            found.row.end_offset = found.row.end_offset.max(extent.header.next_offset());
            found.row.last_ledger = found.row.last_ledger.max(extent.header.ledger.sequence);
            let batches = &block.batches[extent.batches.clone()];
            found.batches.extend(batches.iter().map(|batch| (sequence, ReplayedBatch::of(batch))));
        }
        for extent in block.extents.iter().filter(|extent| extent.header.kind == ExtentKind::State) {
            let id = extent.header.ledger.partition;
            RowChange::decode_all(id, extent.body(block.bytes), |change| self.change(id, sequence, change));
        }
        self.used.insert(block.segment, (block.header.id.generation, SegmentKind::Journal));
        self.bytes += block.header.block_bytes as u64;
    }

    /// Messages that were acknowledged and cannot be read: their offsets are not given out again.
    fn lost(&mut self, header: &ExtentHeader) {
        if let Some(found) = self.partitions.get_mut(&header.ledger.partition) {
            found.row.end_offset = found.row.end_offset.max(header.next_offset());
        }
    }

    fn may_be_gone(&self) -> u64 {
        self.last_whole.covered()
    }

    async fn pause(&mut self) -> Result<(), OpenError> {
        self.tell();
        if EXTENTS_MAX <= self.rows.extents.len() { self.write_out().await } else { Ok(()) }
    }
}
