//! The memory of a store: who has how much of it, and the limit of all together.
//!
//! - **Blocks**, from the flush that fills one on: in flight, in the cache, and for as long as a reader holds a run of it.
//! - **Fetched**: what was read from disk, until the last run of it is gone, and runs that were copied.
//! - **Bookkeeping**: partitions, their ledgers, the extents of their tails.
//! - **Index**: rows on their way to the index thread.
//! - **Compaction**: extents that are brought together, while a pass runs.
//! - **Staged** entries, and free buffers that wait for the next flush.
//!
//! The cache gives way to all others: it is what the rest leaves it, up to its own limit. What readers hold may be half of
//! the whole, whether the cache still has it or not, since the cache cannot give back what somebody holds. Past half of
//! that, they get small answers, copied where that takes less than keeping the block; at its end they wait until
//! somebody lets go. So a thousand readers that take their time slow each other down, and neither writers nor the machine.
//!
//! Counted per block, chunk and extent, never per message.

use std::cell::Cell;
use std::ops::Deref;
use std::rc::Rc;

use drava_runtime::local::Broadcast;

/// An answer while readers hold much.
pub(crate) const ANSWER_BYTES_PRESSED: usize = 64 << 10;
/// Free buffers kept, and rows that may wait for the index: each this part of all memory, and no more than that.
const SHARE_OF_BUFFERS: u64 = 16;
const BUFFERS_BYTES_MAX: u64 = 32 << 20;
/// What compaction may hold at a time: this part of all memory, and no more than that.
const SHARE_OF_WINDOW: u64 = 6;
const WINDOW_BYTES_MAX: u64 = 80 << 20;
/// This much of it however little the others leave: else nothing would ever be brought together.
const WINDOW_BYTES_MIN: u64 = 1 << 20;

/// What the parts of a store have, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryFigures {
    /// Entries that wait for a flush.
    pub staged: u64,
    /// Blocks that are being written.
    pub writing: u64,
    /// Blocks in the cache, held by readers or not.
    pub cache: u64,
    /// Blocks that left the cache and are held by readers.
    pub pinned: u64,
    /// Read from disk or copied for readers, held or ahead of them.
    pub fetched: u64,
    /// Buffers kept for the next flush, at most.
    pub buffers: u64,
    /// Partitions, ledgers, extents.
    pub bookkeeping: u64,
    /// Rows that the index does not have yet.
    pub index: u64,
    /// Extents that compaction is about to copy.
    pub compaction: u64,
    /// What all of them may have.
    pub limit: u64,
}

impl MemoryFigures {
    pub fn total(&self) -> u64 {
        let MemoryFigures {
            staged,
            writing,
            cache,
            pinned,
            fetched,
            buffers,
            bookkeeping,
            index,
            compaction,
            limit: _,
        } = *self;
        staged + writing + cache + pinned + fetched + buffers + bookkeeping + index + compaction
    }
}

pub(crate) struct Memory {
    bytes_max: u64,
    /// All written blocks that somebody has.
    blocks: Cell<u64>,
    /// Of them: not durable yet.
    writing: Cell<u64>,
    /// Of them: held by readers, in the cache or not.
    held: Cell<u64>,
    fetched: Cell<u64>,
    bookkeeping: Cell<u64>,
    index: Cell<u64>,
    /// Of them: in no batch yet.
    index_gathered: Cell<u64>,
    compaction: Cell<u64>,
    /// Changes when readers let go of something.
    freed: Broadcast,
}

impl Memory {
    pub(crate) fn new(bytes_max: u64) -> Memory {
        Memory {
            bytes_max,
            blocks: Cell::new(0),
            writing: Cell::new(0),
            held: Cell::new(0),
            fetched: Cell::new(0),
            bookkeeping: Cell::new(0),
            index: Cell::new(0),
            index_gathered: Cell::new(0),
            compaction: Cell::new(0),
            freed: Broadcast::default(),
        }
    }

    /// Free buffers that may be kept.
    pub(crate) fn buffers_bytes_max(&self) -> u64 {
        (self.bytes_max / SHARE_OF_BUFFERS).min(BUFFERS_BYTES_MAX)
    }

    /// Whether `more` would be too much, with `staged` bytes waiting for a flush.
    pub(crate) fn is_over(&self, staged: u64, more: u64) -> bool {
        self.bytes_max < self.all_but_window(staged) + self.compaction.get() + more
    }

    fn all_but_window(&self, staged: u64) -> u64 {
        let parts = self.blocks.get() + self.fetched.get() + self.bookkeeping.get() + self.index.get();
        parts + self.buffers_bytes_max() + staged
    }

    /// What compaction may hold when nobody else needs it.
    pub(crate) fn window_bytes_max(&self) -> u64 {
        (self.bytes_max / SHARE_OF_WINDOW).min(WINDOW_BYTES_MAX)
    }

    /// What compaction may hold now, of which the cache gives up to `cached` bytes.
    pub(crate) fn window_bytes_left(&self, staged: u64, cached: u64) -> u64 {
        let left = (self.bytes_max + cached).saturating_sub(self.all_but_window(staged));
        left.max(WINDOW_BYTES_MIN).min(self.window_bytes_max())
    }

    /// What compaction holds now. One pass at a time.
    pub(crate) fn set_window(&self, bytes: u64) {
        self.compaction.set(bytes);
    }

    pub(crate) fn block_taken(&self, bytes: u64) {
        self.blocks.set(self.blocks.get() + bytes);
        self.writing.set(self.writing.get() + bytes);
    }

    /// The block is durable, or will never be.
    pub(crate) fn block_written(&self, bytes: u64) {
        self.writing.set(self.writing.get() - bytes);
    }

    pub(crate) fn block_dropped(&self, bytes: u64) {
        self.blocks.set(self.blocks.get() - bytes);
    }

    /// A block that nobody held has a reader now.
    pub(crate) fn block_held(&self, bytes: u64) {
        self.held.set(self.held.get() + bytes);
    }

    pub(crate) fn block_let_go(&self, bytes: u64) {
        self.held.set(self.held.get() - bytes);
        self.freed.notify_all();
    }

    /// Counts bytes for readers until the charge is dropped.
    pub(crate) fn charge(self: &Rc<Self>, bytes: u64) -> Charge {
        self.fetched.set(self.fetched.get() + bytes);
        Charge { memory: self.clone(), bytes }
    }

    fn readers_bytes_max(&self) -> u64 {
        self.bytes_max / 2
    }

    fn readers_bytes(&self) -> u64 {
        self.held.get() + self.fetched.get()
    }

    /// Whether readers may have `more`. A single batch larger than half of what they may have is let in when that half is
    /// free, and goes beyond: else it could never be read.
    pub(crate) fn admits(&self, more: u64) -> bool {
        self.readers_bytes() + more.min(self.readers_bytes_max() / 2) <= self.readers_bytes_max()
    }

    /// Readers hold so much that each gets little.
    pub(crate) fn is_pressed(&self) -> bool {
        self.readers_bytes_max() / 2 < self.readers_bytes()
    }

    /// Look at its version, try, and wait for the next one.
    pub(crate) fn freed(&self) -> &Broadcast {
        &self.freed
    }

    /// What a partition takes has changed.
    pub(crate) fn recount(&self, before: u64, after: u64) {
        self.bookkeeping.set(self.bookkeeping.get() + after - before);
    }

    pub(crate) fn index_waits(&self, bytes: u64) {
        self.index.set(self.index.get() + bytes);
        self.index_gathered.set(self.index_gathered.get() + bytes);
    }

    /// What was gathered goes out in a batch now. Returns its bytes, for [`Memory::index_has`].
    pub(crate) fn index_sent(&self) -> u64 {
        self.index_gathered.take()
    }

    pub(crate) fn index_has(&self, bytes: u64) {
        self.index.set(self.index.get() - bytes);
    }

    /// So much waits for the index that nothing more is written before it caught up.
    pub(crate) fn index_is_behind(&self) -> bool {
        self.buffers_bytes_max() <= self.index.get()
    }

    /// `cached`: the bytes of the blocks in the cache.
    pub(crate) fn figures(&self, staged: u64, cached: u64) -> MemoryFigures {
        MemoryFigures {
            staged,
            writing: self.writing.get(),
            cache: cached,
            pinned: self.blocks.get() - self.writing.get() - cached,
            fetched: self.fetched.get(),
            buffers: self.buffers_bytes_max(),
            bookkeeping: self.bookkeeping.get(),
            index: self.index.get(),
            compaction: self.compaction.get(),
            limit: self.bytes_max,
        }
    }
}

/// Bytes that count for readers while it lives.
pub(crate) struct Charge {
    memory: Rc<Memory>,
    bytes: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.memory.fetched.set(self.memory.fetched.get() - self.bytes);
        self.memory.freed.notify_all();
    }
}

/// What a run lies in.
pub(crate) trait RunMemory {
    fn bytes(&self) -> &[u8];

    /// One more run lies in it.
    fn hold(&self) {}

    fn let_go(&self) {}
}

/// Bytes that were copied or read for readers, and count as long as they are there.
pub(crate) struct Charged<R> {
    bytes: R,
    _charge: Charge,
}

impl<R> Charged<R> {
    pub(crate) fn new(bytes: R, charge: Charge) -> Charged<R> {
        Charged { bytes, _charge: charge }
    }
}

impl<R: Deref<Target = [u8]>> RunMemory for Charged<R> {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_for_the_index_may_overlap() {
        let memory = Memory::new(1 << 20);
        memory.index_waits(100 << 10);
        assert!(memory.index_is_behind());
        let first = memory.index_sent();
        memory.index_waits(20);
        let second = memory.index_sent();
        memory.index_has(second);
        memory.index_has(first);
        assert!(!memory.index_is_behind());
        assert_eq!((first, second, memory.figures(0, 0).index), (100 << 10, 20, 0));
    }

    #[test]
    fn compaction_takes_what_the_others_leave_and_the_cache_gives() {
        let memory = Memory::new(60 << 20);
        assert_eq!(memory.window_bytes_max(), 10 << 20);
        let others = memory.buffers_bytes_max() + (52 << 20);
        memory.block_taken(52 << 20);
        let left = (60 << 20) - others;
        assert!(1 << 20 < left && left < 10 << 20);
        assert_eq!(memory.window_bytes_left(0, 0), left);
        assert_eq!(memory.window_bytes_left(1 << 20, 0), left - (1 << 20));
        assert_eq!(memory.window_bytes_left(10 << 20, 0), 1 << 20, "a little always");
        assert_eq!(memory.window_bytes_left(10 << 20, 30 << 20), 10 << 20);
        memory.set_window(left);
        assert_eq!(memory.window_bytes_left(0, 0), left, "its own does not count");
        assert!(memory.is_over(0, 1) && !memory.is_over(0, 0));
        memory.set_window(0);
        assert!(!memory.is_over(0, left));
        assert_eq!(Memory::new(1 << 20).window_bytes_left(0, 0), (1 << 20) / 6);
    }

    #[test]
    fn readers_have_half_and_the_cache_gives_way() {
        let memory = Rc::new(Memory::new(1 << 20));
        let buffers = memory.buffers_bytes_max();
        memory.block_taken(100 << 10);
        memory.block_written(100 << 10);
        assert!(!memory.is_over(0, (924 << 10) - buffers));
        assert!(memory.is_over(1, (924 << 10) - buffers));
        memory.block_held(100 << 10);
        assert!(memory.admits(412 << 10) && !memory.is_pressed());
        let charge = memory.charge(300 << 10);
        assert!(memory.is_pressed() && memory.admits(112 << 10) && !memory.admits((112 << 10) + 1));
        drop(charge);
        memory.block_let_go(100 << 10);
        assert!(memory.admits(10 << 20), "a batch larger than all of it is not refused for ever");
        memory.block_dropped(100 << 10);
        assert_eq!(memory.figures(0, 0).total(), buffers);
    }
}
