//! Checkpoints: what makes the journal enough to build the index anew.
//!
//! Extents are found in the segments that hold them; those in segments of other stores are not. They, and rows of state and
//! of partitions, lie in the index alone once the segments that brought them are used again. So the journal repeats them
//! all from time to time, as rows that replay passes by and a rebuild takes. A segment is used again only when it lies
//! wholly before the start of the last whole checkpoint: the journal always holds one, and every change after it.
//!
//! The rows are read from the index piece by piece while it changes. Each names the covered sequence it was read at, so
//! that a rebuild lets a change win that is later than the row and lies before it in the journal.

use std::rc::Rc;

use drava_runtime::local::oneshot;

use crate::flush::HOUSEKEEPING;
use crate::index::SavedRows;
use crate::io::{ALIGNMENT, Io};
use crate::state::{Checkpoint, RowChange};
use crate::store::Inner;

/// Read and written at a time.
const PIECE_BYTES: usize = 128 << 10;
/// A checkpoint is due when the journal grew by this many segments,
const SEGMENTS_MIN: u64 = 4;
/// or by this many times the size of the last one, whichever is more: checkpoints are 1/16 of what is written at most.
const SIZES_MIN: u64 = 16;

/// When the next checkpoint is due.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints {
    /// What the journal grew by since the start of the last one.
    pub(crate) grown_bytes: u64,
    /// Of the last one.
    pub(crate) bytes: u64,
}

impl Checkpoints {
    fn due(&self, segment_bytes: u64) -> bool {
        (SEGMENTS_MIN * segment_bytes).max(SIZES_MIN * self.bytes) <= self.grown_bytes
    }
}

/// The last whole checkpoint of a journal that is read block by block, as [`crate::recovery::replay`] does it.
#[derive(Debug, Default)]
pub(crate) struct LastWhole {
    /// The last blocks that were read without a gap.
    first: u64,
    next: u64,
    covered: u64,
}

impl LastWhole {
    pub(crate) fn block(&mut self, sequence: u64) {
        if self.next != sequence {
            self.first = sequence;
        }
        self.next = sequence + 1;
    }

    /// The end of a checkpoint was read; returns whether it is whole: all blocks behind `covered` were read. Of one before
    /// the last the segments with the first rows may be used again, and any may be damaged.
    pub(crate) fn end(&mut self, covered: u64) -> bool {
        let whole = self.first <= covered + 1;
        if whole {
            self.covered = covered;
        }
        whole
    }

    /// It repeats what this block and those before it left; 0 without a whole checkpoint.
    pub(crate) fn covered(&self) -> u64 {
        self.covered
    }
}

impl<I: Io, T: 'static> Inner<I, T> {
    pub(crate) async fn run_checkpoints(self: Rc<Self>) {
        while !self.stopped.get() {
            self.io.sleep(HOUSEKEEPING).await;
            // On a full disk it is what lets dead segments be used again.
            let due = self.checkpoints.borrow().due(self.config.segment_bytes) || self.journal.waits_for_checkpoint();
            if self.stopped.get() || self.journal.is_failed() || !due {
                continue;
            }
            // It counts from its start, whatever becomes of it: one that cannot be written is not tried all the time.
            let grown_bytes = std::mem::take(&mut self.checkpoints.borrow_mut().grown_bytes);
            match self.write_checkpoint().await {
                Some(bytes) => self.checkpoints.borrow_mut().bytes = bytes,
                None => self.checkpoints.borrow_mut().grown_bytes += grown_bytes,
            }
        }
    }

    /// Returns its size; `None`: it is not whole.
    pub(crate) async fn write_checkpoint(&self) -> Option<u64> {
        let rolls = self.journal.rolls();
        let mut from = Vec::new();
        let mut start = None;
        let mut bytes = 0;
        let mut last_index = None;
        loop {
            let read = self.index.saved_rows(from, PIECE_BYTES).await;
            let rows = match read {
                Ok(rows) => rows,
                Err(error) => {
                    tracing::warn!(shard = self.config.shard.0, error = %error, "the index could not be read for a checkpoint");
                    return None;
                }
            };
            let next = rows.next.clone();
            start.get_or_insert(rows.covered.end);
            let changes = changes(rows);
            if !changes.is_empty() {
                bytes += self.write_rows(changes, rolls, &mut last_index).await?;
            }
            from = match next {
                Some(next) => next,
                None => break,
            };
        }
        let start = start?;
        // Without a partition there is nothing to repeat. The end is written all the same: it says that what else is found
        // in the journal is gone, when the rows that dropped it are.
        let first = || self.partitions.borrow().list.first().map(|partition| partition.partition);
        let id = last_index.or_else(first)?;
        let covered = start.next_sequence.saturating_sub(1);
        let end = Checkpoint::End { covered, generation: start.generation };
        bytes += self.write_rows(vec![(id, RowChange::Checkpoint(end))], rolls, &mut last_index).await?;
        tracing::debug!(shard = self.config.shard.0, bytes, covered, "wrote a checkpoint");
        Some(bytes)
    }

    /// Writes rows and waits until they are durable; returns their bytes. `None`: there is no room, or a write failed.
    async fn write_rows(
        &self,
        changes: Vec<(drava_protocol::PartitionId, RowChange)>,
        rolls: u64,
        last: &mut Option<drava_protocol::PartitionId>,
    ) -> Option<u64> {
        let bytes: u64 = changes.iter().map(|(_, change)| change.encoded_bytes() as u64).sum();
        let durable = {
            let mut partitions = self.partitions.borrow_mut();
            let mut staging = self.staging.borrow_mut();
            let ahead_bytes = staging.bytes() + self.in_flight_bytes.get() + bytes;
            if self.stopped.get() || !self.journal.has_room(ahead_bytes + 4 * ALIGNMENT as u64) {
                return None;
            }
            for (id, change) in changes {
                let index = match (partitions.by_id.get(&id), &change) {
                    (Some(&index), _) => index,
                    // The end is about no partition; it only has to stand somewhere.
                    (None, RowChange::Checkpoint(Checkpoint::End { .. })) => 0,
                    // A partition that was deleted meanwhile is not repeated.
                    (None, _) => continue,
                };
                let partition = &mut partitions.list[index as usize];
                staging.row(partition.partition, index, change, &mut partition.state_chain);
                *last = Some(id);
            }
            let (sender, receiver) = oneshot();
            staging.back()?.waiters.push(sender);
            receiver
        };
        self.woken.notify();
        durable.await?;
        // After a failed write the rows were not staged again, and whoever waited for them was told all the same.
        (self.journal.rolls() == rolls).then_some(bytes)
    }
}

fn changes(rows: SavedRows) -> Vec<(drava_protocol::PartitionId, RowChange)> {
    let covered = rows.covered.end.next_sequence.saturating_sub(1);
    let partitions = rows.partitions.into_iter().map(|(id, row)| (id, Checkpoint::Partition { covered, row }));
    let state = rows.state.into_iter().map(|(id, key, value)| (id, Checkpoint::Row { covered, key, value }));
    let extents = rows.foreign.into_iter().map(|(id, row)| (id, Checkpoint::Extent { covered, row }));
    partitions.chain(state).chain(extents).map(|(id, row)| (id, RowChange::Checkpoint(row))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_whole_when_no_block_of_it_is_missing() {
        let mut last = LastWhole::default();
        (5..9).for_each(|sequence| last.block(sequence));
        assert!(!last.end(3), "the first rows were in a segment that is used again");
        assert_eq!(last.covered(), 0);
        assert!(last.end(4) && last.end(7), "all behind the block it was read at are there");
        last.block(10);
        assert!(!last.end(7), "a block in between is damaged");
        assert_eq!(last.covered(), 7, "the one before it counts");
    }
}
