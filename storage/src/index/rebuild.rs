//! What a rebuild writes into an empty family, and what a checkpoint reads from a full one.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use drava_protocol::PartitionId;
use drava_runtime::foreign::reply;

use super::kv::KvBatch;
use super::{
    Covered, ExtentRow, Family, IndexError, IndexThread, PartitionRow, Request, SegmentRow, TABLE_COVERED,
    TABLE_EXTENT, TABLE_PARTITION, TABLE_STATE, Trim, be_u64, extent_key, foreign_key, partition_key, segment_key,
};
use crate::foreign::ForeignSegment;
use crate::segment::SegmentId;

/// Changes without a covered position: until one is written, whoever opens the family starts anew.
#[derive(Debug, Default)]
pub(crate) struct RebuildRows {
    pub(crate) extents: Vec<(PartitionId, ExtentRow)>,
    pub(crate) trims: Vec<Trim>,
    pub(crate) dropped: Vec<PartitionId>,
    /// Extents, by first offset, that are none after all.
    pub(crate) removed: Vec<(PartitionId, u64)>,
    /// All segments and what is live in them. They are known before the first change, as after any other start: it may be
    /// about one that is used again already, or move what is live.
    pub(crate) segments: Vec<(SegmentId, SegmentRow)>,
    /// What is live in segments of other stores.
    pub(crate) foreign: BTreeMap<ForeignSegment, u64>,
}

/// A piece of what a checkpoint repeats.
#[derive(Debug, Default)]
pub(crate) struct SavedRows {
    pub(crate) partitions: Vec<(PartitionId, PartitionRow)>,
    pub(crate) state: Vec<(PartitionId, Vec<u8>, Vec<u8>)>,
    /// Extents in other stores.
    pub(crate) foreign: Vec<(PartitionId, ExtentRow)>,
    /// The rows are as of here.
    pub(crate) covered: Covered,
    /// Where the next piece starts; `None`: there is none.
    pub(crate) next: Option<Vec<u8>>,
}

impl IndexThread {
    pub(crate) async fn rebuild(&self, rows: Box<RebuildRows>) -> Result<(), IndexError> {
        let (sender, reply) = reply();
        self.ask(Request::Rebuild(rows, sender), reply).await
    }

    /// The rows of partitions and of state from `from` on, about `bytes_max` of them. An empty `from` is the start.
    pub(crate) async fn saved_rows(&self, from: Vec<u8>, bytes_max: usize) -> Result<SavedRows, IndexError> {
        let (sender, reply) = reply();
        self.ask(Request::SavedRows { from, bytes_max, reply: sender }, reply).await
    }
}

impl Family {
    pub(super) fn rebuild(&mut self, rows: &RebuildRows) -> Result<(), IndexError> {
        let mut batch = KvBatch::default();
        for (partition, row) in &rows.extents {
            batch.put(extent_key(*partition, row.first_offset), row.encode());
        }
        for trim in &rows.trims {
            batch.delete_range(extent_key(trim.partition, 0), extent_key(trim.partition, trim.start_offset));
        }
        for &partition in &rows.dropped {
            let from = partition_key(TABLE_EXTENT, partition).to_vec();
            let to = match partition.0.checked_add(1) {
                Some(next) => partition_key(TABLE_EXTENT, PartitionId(next)).to_vec(),
                None => vec![TABLE_EXTENT + 1],
            };
            batch.delete_range(from, to);
        }
        for &(partition, first_offset) in &rows.removed {
            batch.delete(extent_key(partition, first_offset));
        }
        rows.segments.iter().for_each(|(segment, row)| batch.put(segment_key(*segment), row.encode()));
        rows.foreign.iter().for_each(|(segment, bytes)| batch.put(foreign_key(*segment), bytes.to_le_bytes()));
        self.kv.write(batch)?;
        self.segments.extend(rows.segments.iter().copied());
        self.foreign.extend(&rows.foreign);
        Ok(())
    }

    pub(super) fn saved_rows(&self, from: &[u8], bytes_max: usize) -> Result<SavedRows, IndexError> {
        let mut saved = SavedRows::default();
        let covered = self.kv.get(&[TABLE_COVERED])?;
        saved.covered = Covered::decode(&covered.ok_or(IndexError::Row("nothing is covered"))?)?;
        let mut bytes = self.saved_extents(from, bytes_max, &mut saved)?;
        for table in [TABLE_PARTITION, TABLE_STATE] {
            let start = [table];
            if from.first().is_some_and(|from| table < *from) || saved.next.is_some() {
                continue;
            }
            self.rows(&start, from.max(&start), |mut key, value| {
                if bytes_max <= bytes {
                    saved.next = Some([&start, key].concat());
                    return Ok(ControlFlow::Break(()));
                }
                bytes += key.len() + value.len();
                let partition = PartitionId(be_u64(&mut key)?);
                if table == TABLE_PARTITION {
                    saved.partitions.push((partition, PartitionRow::decode(value)?));
                } else {
                    saved.state.push((partition, key.to_vec(), value.to_vec()));
                }
                Ok(ControlFlow::Continue(()))
            })?;
        }
        Ok(saved)
    }

    /// Extents in other stores, and their bytes. In each partition they come before those of the own store, so the rest of
    /// it is passed by.
    fn saved_extents(&self, from: &[u8], bytes_max: usize, saved: &mut SavedRows) -> Result<usize, IndexError> {
        let mut bytes = 0;
        let mut next = (!self.foreign.is_empty()).then(|| from.max(&[TABLE_EXTENT]).to_vec());
        while let Some(start) = next.take() {
            self.rows(&[TABLE_EXTENT], &start, |key, value| {
                if bytes_max <= bytes {
                    saved.next = Some([&[TABLE_EXTENT], key].concat());
                    return Ok(ControlFlow::Break(()));
                }
                let mut rest = key;
                let (partition, first_offset) = (PartitionId(be_u64(&mut rest)?), be_u64(&mut rest)?);
                let row = ExtentRow::decode(first_offset, value)?;
                if row.store.is_none() {
                    next = partition.0.checked_add(1).map(|id| extent_key(PartitionId(id), 0).to_vec());
                    return Ok(ControlFlow::Break(()));
                }
                bytes += key.len() + value.len();
                saved.foreign.push((partition, row));
                Ok(ControlFlow::Continue(()))
            })?;
        }
        Ok(bytes)
    }
}
