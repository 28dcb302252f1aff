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
    /// Of the blocks alone.
    block_bytes: u64,
}

struct Slot<I: Io> {
    block: Option<Rc<Block<I>>>,
    /// Extents of it that are still to be served from memory.
    extents: u32,
    bytes: u64,
}

/// What the bookkeeping for one cached extent takes, in bytes.
const EXTENT_OVERHEAD_BYTES: u64 = 96;
/// The same for a slot, whether there is a block in it or not: one block that is wanted for long keeps all slots behind
/// it, however empty.
const SLOT_BYTES: u64 = 64;

impl<I: Io> BlockCache<I> {
    pub(crate) fn new(first_sequence: u64, bytes_max: u64) -> BlockCache<I> {
        BlockCache { slots: VecDeque::new(), first_sequence, bytes: 0, bytes_max, block_bytes: 0 }
    }

    /// Adds the next block, `extents` of which are worth keeping, and lets the oldest go.
    pub(crate) fn insert(&mut self, sequence: u64, block: Rc<Block<I>>, extents: u32) {
        assert!(sequence == self.end_sequence(), "block {sequence} after {}", self.end_sequence());
        let mut slot = Slot { block: None, extents, bytes: SLOT_BYTES };
        if 0 < extents {
            let block_bytes = block.bytes().len() as u64;
            self.block_bytes += block_bytes;
            slot.bytes += block_bytes + extents as u64 * EXTENT_OVERHEAD_BYTES;
            slot.block = Some(block);
        }
        self.bytes += slot.bytes;
        self.slots.push_back(slot);
        while self.bytes_max < self.bytes || self.slots.front().is_some_and(|slot| slot.block.is_none()) {
            self.evict();
        }
    }

    /// Lets the oldest block go. `false`: there is none.
    pub(crate) fn evict(&mut self) -> bool {
        let Some(slot) = self.slots.pop_front() else { return false };
        self.first_sequence += 1;
        self.bytes -= slot.bytes;
        if let Some(block) = slot.block {
            self.block_bytes -= block.bytes().len() as u64;
        }
        true
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
        if slot.extents == 0
            && let Some(block) = slot.block.take()
        {
            self.block_bytes -= block.bytes().len() as u64;
            self.bytes -= slot.bytes - SLOT_BYTES;
            slot.bytes = SLOT_BYTES;
        }
    }

    /// Blocks before this one are gone.
    pub(crate) fn first_sequence(&self) -> u64 {
        self.first_sequence
    }

    /// Of the blocks, with what is remembered of them.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    fn end_sequence(&self) -> u64 {
        self.first_sequence + self.slots.len() as u64
    }
}
