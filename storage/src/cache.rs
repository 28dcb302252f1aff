//! The ledger cache of a shard: the newest blocks, in the buffers that were written. First in, first out.

use std::collections::VecDeque;
use std::rc::Rc;

use crate::io::Io;
use crate::pool::Block;

/// Blocks by sequence, without a gap: a lookup is a subtraction.
pub(crate) struct BlockCache<I: Io> {
    slots: VecDeque<Slot<I>>,
    /// Sequence of the first slot.
    first_sequence: u64,
    bytes: u64,
    bytes_max: u64,
}

struct Slot<I: Io> {
    block: Option<Rc<Block<I>>>,
    /// Extents of it that are still to be served from memory.
    extents: u32,
    bytes: u64,
}

/// What the bookkeeping for one cached extent takes, in bytes.
const EXTENT_OVERHEAD_BYTES: u64 = 96;

impl<I: Io> BlockCache<I> {
    pub(crate) fn new(first_sequence: u64, bytes_max: u64) -> BlockCache<I> {
        BlockCache { slots: VecDeque::new(), first_sequence, bytes: 0, bytes_max }
    }

    /// Adds the next block, `extents` of which are worth keeping, and lets the oldest go.
    pub(crate) fn insert(&mut self, sequence: u64, block: Rc<Block<I>>, extents: u32) {
        assert!(sequence == self.end_sequence(), "block {sequence} after {}", self.end_sequence());
        let bytes = block.bytes().len() as u64 + extents as u64 * EXTENT_OVERHEAD_BYTES;
        if extents == 0 {
            self.slots.push_back(Slot { block: None, extents, bytes: 0 });
        } else {
            self.bytes += bytes;
            self.slots.push_back(Slot { block: Some(block), extents, bytes });
        }
        while self.bytes_max < self.bytes || self.slots.front().is_some_and(|slot| slot.block.is_none()) {
            let Some(slot) = self.slots.pop_front() else { break };
            self.first_sequence += 1;
            if slot.block.is_some() {
                self.bytes -= slot.bytes;
            }
        }
    }

    pub(crate) fn get(&self, sequence: u64) -> Option<&Rc<Block<I>>> {
        let index = sequence.checked_sub(self.first_sequence)?;
        self.slots.get(index as usize)?.block.as_ref()
    }

    /// One extent of the block is no longer wanted; the block goes with the last.
    pub(crate) fn release(&mut self, sequence: u64) {
        let Some(index) = sequence.checked_sub(self.first_sequence) else { return };
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        slot.extents = slot.extents.saturating_sub(1);
        if slot.extents == 0 && slot.block.take().is_some() {
            self.bytes -= slot.bytes;
        }
    }

    /// Blocks before this one are gone.
    pub(crate) fn first_sequence(&self) -> u64 {
        self.first_sequence
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn end_sequence(&self) -> u64 {
        self.first_sequence + self.slots.len() as u64
    }
}
