//! Buffers for blocks, used again: fresh memory of this size would be mapped and faulted in for every flush.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::io::{ALIGNMENT, Io};
use crate::memory::{Memory, RunMemory};

/// Larger buffers are made for the one entry that needs them and not kept.
const CLASS_BYTES_MAX: usize = 1 << 20;
/// Up to this many pages each size is a class; above it there are eight classes to a power of two.
const EXACT_PAGES: usize = 16;

pub(crate) struct BufferPool<I: Io> {
    io: I,
    classes: RefCell<Vec<Vec<Rc<I::Buffer>>>>,
    free_bytes: Cell<usize>,
    free_bytes_max: usize,
    memory: Rc<Memory>,
}

/// A written block, shared by the cache and by whoever reads. Its memory returns to the pool after the last of them.
pub(crate) struct Block<I: Io> {
    buffer: Option<Rc<I::Buffer>>,
    pool: Rc<BufferPool<I>>,
    /// Runs of it that readers have.
    runs: Cell<u32>,
    /// Its write is over.
    written: Cell<bool>,
}

impl<I: Io> Block<I> {
    pub(crate) fn new(buffer: Rc<I::Buffer>, pool: Rc<BufferPool<I>>) -> Block<I> {
        let block = Block { buffer: Some(buffer), pool, runs: Cell::new(0), written: Cell::new(false) };
        block.pool.memory.block_taken(block.bytes().len() as u64);
        block
    }

    /// Its write is over, well or not.
    pub(crate) fn written(&self) {
        if !self.written.replace(true) {
            self.pool.memory.block_written(self.bytes().len() as u64);
        }
    }

    /// Whether a reader has a run of it.
    pub(crate) fn is_held(&self) -> bool {
        0 < self.runs.get()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        (**self.buffer.as_ref().expect("taken only by drop")).as_ref()
    }
}

impl<I: Io> RunMemory for Block<I> {
    fn bytes(&self) -> &[u8] {
        self.bytes()
    }

    fn hold(&self) {
        if self.runs.replace(self.runs.get() + 1) == 0 {
            self.pool.memory.block_held(self.bytes().len() as u64);
        }
    }

    fn let_go(&self) {
        let runs = self.runs.get() - 1;
        self.runs.set(runs);
        if runs == 0 {
            self.pool.memory.block_let_go(self.bytes().len() as u64);
        }
    }
}

impl<I: Io> Drop for Block<I> {
    fn drop(&mut self) {
        self.written();
        if let Some(buffer) = self.buffer.take() {
            self.pool.memory.block_dropped((*buffer).as_ref().len() as u64);
            self.pool.give(buffer);
        }
    }
}

impl<I: Io> BufferPool<I> {
    /// A pool that keeps up to `free_bytes_max` unused, and tells `memory` which blocks there are.
    pub(crate) fn new(io: I, free_bytes_max: usize, memory: Rc<Memory>) -> BufferPool<I> {
        let classes = class(CLASS_BYTES_MAX).0 + 1;
        BufferPool {
            io,
            classes: RefCell::new((0..classes).map(|_| Vec::new()).collect()),
            free_bytes: Cell::new(0),
            free_bytes_max,
            memory,
        }
    }

    /// A buffer of at least `bytes` that nobody else holds, with arbitrary content.
    pub(crate) fn take(&self, bytes: usize) -> Rc<I::Buffer> {
        if CLASS_BYTES_MAX < bytes {
            return Rc::new(self.io.buffer(bytes.next_multiple_of(ALIGNMENT)));
        }
        let (index, class_bytes) = class(bytes);
        if let Some(buffer) = self.classes.borrow_mut()[index].pop() {
            self.free_bytes.set(self.free_bytes.get() - class_bytes);
            return buffer;
        }
        Rc::new(self.io.buffer(class_bytes))
    }

    /// A buffer of exactly `bytes`, a multiple of [`ALIGNMENT`].
    pub(crate) fn take_exact(&self, bytes: usize) -> Rc<I::Buffer> {
        if class_bytes(bytes) == bytes { self.take(bytes) } else { Rc::new(self.io.buffer(bytes)) }
    }

    /// Takes a buffer back, unless somebody still holds it or there are enough.
    pub(crate) fn give(&self, mut buffer: Rc<I::Buffer>) {
        let bytes = (*buffer).as_ref().len();
        if CLASS_BYTES_MAX < bytes || self.free_bytes_max < self.free_bytes.get() + bytes {
            return;
        }
        if Rc::get_mut(&mut buffer).is_none() {
            return;
        }
        let (index, class_bytes) = class(bytes);
        if class_bytes != bytes {
            return;
        }
        self.classes.borrow_mut()[index].push(buffer);
        self.free_bytes.set(self.free_bytes.get() + bytes);
    }
}

/// Index and size of the class that holds `bytes`.
fn class(bytes: usize) -> (usize, usize) {
    let pages = bytes.div_ceil(ALIGNMENT).max(1);
    if pages <= EXACT_PAGES {
        return (pages - 1, pages * ALIGNMENT);
    }
    // 16 < pages: `power` is the power of two at or above half of it, cut into eight steps.
    let power = usize::BITS - 1 - (pages - 1).leading_zeros();
    let step = 1usize << (power - 3);
    let steps = pages.div_ceil(step);
    let index = EXACT_PAGES + (power as usize - 4) * 8 + (steps - 9);
    (index, steps * step * ALIGNMENT)
}

/// What a buffer for `bytes` takes on disk and in memory.
pub(crate) fn class_bytes(bytes: usize) -> usize {
    if CLASS_BYTES_MAX < bytes { bytes.next_multiple_of(ALIGNMENT) } else { class(bytes).1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_dense_and_waste_an_eighth_at_most() {
        let mut last = (0, 0);
        for pages in 1..=CLASS_BYTES_MAX / ALIGNMENT {
            let bytes = pages * ALIGNMENT;
            let (index, class_bytes) = class(bytes);
            assert!(bytes <= class_bytes, "{bytes} bytes in a class of {class_bytes}");
            assert!(class_bytes - bytes <= bytes / 8, "{bytes} bytes in a class of {class_bytes}");
            assert_eq!(class(class_bytes), (index, class_bytes));
            assert!((index, class_bytes) == last || index == last.0 + 1 || pages == 1, "{index} after {}", last.0);
            last = (index, class_bytes);
        }
        assert_eq!(last.1, CLASS_BYTES_MAX);
    }
}
