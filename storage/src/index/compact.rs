//! What compaction asks of the index: which extents are live, and that they are found at their new place from now on.

use std::ops::ControlFlow;

use drava_protocol::{LedgerId, PartitionId};
use drava_runtime::foreign::reply;

use super::kv::KvBatch;
use super::{ExtentRow, Family, IndexError, IndexThread, Request, TABLE_EXTENT, Touched, be_u64, extent_key};
use crate::block::{ExtentHeader, ExtentKind};
use crate::segment::{SegmentId, SegmentKind};

/// Rows that one scan looks at, in about a quarter of a millisecond: whoever wants the core waits as long.
const SCAN_ROWS: usize = 1024;

/// An extent by partition and first offset, which is the order of the index.
pub(crate) type ExtentKey = (PartitionId, u64);

#[derive(Debug, Default)]
pub(crate) struct Scanned {
    pub(crate) rows: Vec<(PartitionId, ExtentRow)>,
    /// Where to scan on; `None`: that was all.
    pub(crate) next: Option<ExtentKey>,
}

/// Extents of one ledger side by side, which became one somewhere else.
#[derive(Debug)]
pub(crate) struct Move {
    pub(crate) partition: PartitionId,
    pub(crate) from: Vec<ExtentRow>,
    pub(crate) to: ExtentRow,
}

/// Moves into one compacted segment, applied together.
#[derive(Debug)]
pub(crate) struct MoveBatch {
    pub(crate) moves: Vec<Move>,
    pub(crate) segment: SegmentId,
    pub(crate) generation: u64,
    /// Make everything up to here durable.
    pub(crate) flush: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Moved {
    /// Bytes of extents at their old places that are no longer indexed. They are needed until the batch is durable.
    pub(crate) released: Vec<(SegmentId, u64)>,
    /// Bytes at the new place that nobody wants any more: their rows were changed or deleted meanwhile.
    pub(crate) dropped_bytes: u64,
}

impl IndexThread {
    /// The next extents from `from` on, in all segments or in these.
    pub(crate) async fn scan(&self, from: ExtentKey, segments: Option<Vec<SegmentId>>) -> Result<Scanned, IndexError> {
        let (sender, reply) = reply();
        self.ask(Request::Scan { from, segments, reply: sender }, reply).await
    }

    /// Moves the extents whose rows are still as `MoveBatch` says.
    pub(crate) async fn move_extents(&self, batch: Box<MoveBatch>) -> Result<Moved, IndexError> {
        let (sender, reply) = reply();
        self.ask(Request::Move(batch, sender), reply).await
    }
}

impl Family {
    pub(super) fn scan_extents(
        &self,
        (partition, offset): ExtentKey,
        segments: Option<&[SegmentId]>,
    ) -> Result<Scanned, IndexError> {
        let mut scanned = Scanned::default();
        let mut looked = 0;
        self.rows(&[TABLE_EXTENT], &extent_key(partition, offset), |mut key, value| {
            let (partition, first_offset) = (PartitionId(be_u64(&mut key)?), be_u64(&mut key)?);
            if looked == SCAN_ROWS {
                scanned.next = Some((partition, first_offset));
                return Ok(ControlFlow::Break(()));
            }
            looked += 1;
            let row = ExtentRow::decode(first_offset, value)?;
            // Segments of other stores are not written and drain by themselves.
            if row.store.is_none() && segments.is_none_or(|segments| segments.contains(&row.segment)) {
                scanned.rows.push((partition, row));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(scanned)
    }

    /// Whether the rows, which follow one another, are there as they are given.
    fn has_rows(&self, partition: PartitionId, rows: &[ExtentRow]) -> Result<bool, IndexError> {
        let Some(first) = rows.first() else { return Ok(true) };
        let mut found = 0;
        self.kv.scan(&extent_key(partition, first.first_offset), &mut |key, value| {
            let row = &rows[found];
            if key != extent_key(partition, row.first_offset) || value != row.encode() {
                return ControlFlow::Break(());
            }
            found += 1;
            if found < rows.len() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(found == rows.len())
    }

    pub(super) fn move_extents(&mut self, changes: &MoveBatch) -> Result<Moved, IndexError> {
        let mut batch = KvBatch::default();
        let mut moved = Moved::default();
        let mut touched = Touched::default();
        touched.used.push((changes.segment, changes.generation, SegmentKind::Compacted));
        for Move { partition, from, to } in &changes.moves {
            if !self.has_rows(*partition, from)? {
                moved.dropped_bytes += to.body_bytes as u64;
                continue;
            }
            for row in from {
                batch.delete(extent_key(*partition, row.first_offset));
                touched.remove(row);
                moved.released.push((row.segment, row.body_bytes as u64));
            }
            batch.put(extent_key(*partition, to.first_offset), to.encode());
            touched.add(to);
        }
        let rows = self.segment_rows(touched);
        rows.iter().for_each(|(segment, row)| batch.put(super::segment_key(*segment), row.encode()));
        self.kv.write(batch)?;
        self.segments.extend(rows);
        if changes.flush {
            self.kv.flush()?;
        }
        Ok(moved)
    }
}

impl ExtentRow {
    /// Whether an extent that starts with `header` is the one that this row of `partition` is about.
    pub(crate) fn describes(&self, partition: PartitionId, header: &ExtentHeader) -> bool {
        header.kind == ExtentKind::Data
            && header.ledger == LedgerId { partition, sequence: self.ledger }
            && header.first_entry == self.first_entry
            && header.base_offset == self.first_offset
            && header.next_offset() == self.next_offset
            && header.body_bytes == self.body_bytes
            && header.block_sequence == self.block_sequence
    }
}
