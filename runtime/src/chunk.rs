//! Receive buffers: filled once by a socket, then shared in slices without a copy.
//!
//! A [`Chunk`] has one writer, which appends at its end; what is written can be cut into [`Slice`]s that stay valid
//! while the writer goes on behind them. When writer and slices are gone the memory returns to its [`ChunkPool`]. All
//! of it stays on one executor: the counts are not atomic.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::rc::{Rc, Weak};

use crate::local::{Broadcast, Wait};

/// Memory for receiving, bounded. Clones share it.
#[derive(Clone, Debug)]
pub struct ChunkPool(Rc<PoolState>);

#[derive(Debug)]
struct PoolState {
    chunk_bytes: usize,
    bytes_max: usize,
    bytes_lent: Cell<usize>,
    free: RefCell<Vec<Box<[u8]>>>,
    /// Free chunks beyond this are given back to the system.
    free_max: usize,
    returned: Broadcast,
}

impl ChunkPool {
    /// A pool of chunks of `chunk_bytes` that lends at most `bytes_max` at a time and keeps up to `free_max` free ones.
    pub fn new(chunk_bytes: usize, bytes_max: usize, free_max: usize) -> ChunkPool {
        assert!(0 < chunk_bytes && chunk_bytes <= bytes_max, "chunks of {chunk_bytes} bytes in a pool of {bytes_max}");
        ChunkPool(Rc::new(PoolState {
            chunk_bytes,
            bytes_max,
            bytes_lent: Cell::new(0),
            free: RefCell::default(),
            free_max,
            returned: Broadcast::default(),
        }))
    }

    pub fn chunk_bytes(&self) -> usize {
        self.0.chunk_bytes
    }

    pub fn bytes_lent(&self) -> usize {
        self.0.bytes_lent.get()
    }

    /// An empty chunk of the pool's size. `None`: the pool has lent all it may; see [`ChunkPool::wait_returned`].
    pub fn take(&self) -> Option<Chunk> {
        self.take_sized(self.0.chunk_bytes)
    }

    /// An empty chunk of `bytes`, which may differ from the pool's size and is then not kept when it comes back.
    ///
    /// A chunk larger than the whole pool is lent only when nothing else is, so that it is late and not impossible.
    pub fn take_sized(&self, bytes: usize) -> Option<Chunk> {
        let lent = self.0.bytes_lent.get();
        if 0 < lent && self.0.bytes_max < lent + bytes {
            return None;
        }
        Some(self.take_beyond(bytes))
    }

    /// As [`ChunkPool::take_sized`], whatever is lent already. For those whose going on frees what others hold.
    pub fn take_beyond(&self, bytes: usize) -> Chunk {
        let memory = if bytes == self.0.chunk_bytes { self.0.free.borrow_mut().pop() } else { None };
        let memory = memory.unwrap_or_else(|| vec![0; bytes].into_boxed_slice());
        self.0.bytes_lent.set(self.0.bytes_lent.get() + bytes);
        let capacity = memory.len();
        let start = NonNull::new(Box::into_raw(memory).cast::<u8>()).expect("a box is not null");
        Chunk { memory: Rc::new(Memory { start, capacity, pool: Rc::downgrade(&self.0) }), filled: 0 }
    }

    /// Wakes those who wait for memory, so that they look again.
    pub fn notify_returned(&self) {
        self.0.returned.notify_all();
    }

    /// Gives free chunks back to the system, all but `keep`.
    pub fn trim(&self, keep: usize) {
        self.0.free.borrow_mut().truncate(keep);
    }

    /// A wait for memory to come back.
    pub fn wait_returned(&self) -> Wait<'_> {
        self.0.returned.wait()
    }
}

struct Memory {
    start: NonNull<u8>,
    capacity: usize,
    pool: Weak<PoolState>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        let slice = std::ptr::slice_from_raw_parts_mut(self.start.as_ptr(), self.capacity);
        // SAFETY: `start` and `capacity` came from `Box::into_raw` in `take_sized`, and the last reference ends here.
        let memory = unsafe { Box::from_raw(slice) };
        let Some(pool) = self.pool.upgrade() else { return };
        pool.bytes_lent.set(pool.bytes_lent.get() - self.capacity);
        {
            let mut free = pool.free.borrow_mut();
            if self.capacity == pool.chunk_bytes && free.len() < pool.free_max {
                free.push(memory);
            }
        }
        pool.returned.notify_all();
    }
}

/// A buffer being filled. Bytes before `filled` never change again; bytes after it belong to this writer alone.
pub struct Chunk {
    memory: Rc<Memory>,
    filled: usize,
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chunk({} of {} bytes)", self.filled, self.memory.capacity)
    }
}

impl Chunk {
    pub fn capacity(&self) -> usize {
        self.memory.capacity
    }

    pub fn filled_bytes(&self) -> usize {
        self.filled
    }

    pub fn spare_bytes(&self) -> usize {
        self.memory.capacity - self.filled
    }

    pub fn filled(&self) -> &[u8] {
        // SAFETY: the memory was initialised when it was allocated; bytes before `filled` are only ever shared.
        unsafe { std::slice::from_raw_parts(self.memory.start.as_ptr(), self.filled) }
    }

    /// Where to write next; call [`Chunk::advance`] for what was written.
    pub fn spare(&mut self) -> &mut [u8] {
        let spare = self.spare_bytes();
        // SAFETY: no slice reaches beyond `filled` (see `slice`), there is one writer, and it is borrowed mutably here.
        unsafe { std::slice::from_raw_parts_mut(self.memory.start.as_ptr().add(self.filled), spare) }
    }

    pub fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.spare_bytes(), "advance by {bytes} in {} spare bytes", self.spare_bytes());
        self.filled += bytes;
    }

    /// Copies `bytes` in. Panics if they do not fit.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.spare()[..bytes.len()].copy_from_slice(bytes);
        self.advance(bytes.len());
    }

    /// Shares what was written in `range`.
    pub fn slice(&self, range: Range<usize>) -> Slice {
        assert!(range.start <= range.end && range.end <= self.filled, "slice {range:?} of {} bytes", self.filled);
        Slice { memory: self.memory.clone(), start: range.start, bytes: range.end - range.start }
    }
}

/// Bytes of a chunk that never change again.
#[derive(Clone)]
pub struct Slice {
    memory: Rc<Memory>,
    start: usize,
    bytes: usize,
}

impl Slice {
    /// A slice with memory of its own, for what did not come from a socket.
    pub fn copy_of(bytes: &[u8]) -> Slice {
        let mut memory = vec![0; bytes.len().max(1)].into_boxed_slice();
        memory[..bytes.len()].copy_from_slice(bytes);
        let capacity = memory.len();
        let start = NonNull::new(Box::into_raw(memory).cast::<u8>()).expect("a box is not null");
        Slice { memory: Rc::new(Memory { start, capacity, pool: Weak::new() }), start: 0, bytes: bytes.len() }
    }

    pub fn slice(&self, range: Range<usize>) -> Slice {
        assert!(range.start <= range.end && range.end <= self.bytes, "slice {range:?} of {} bytes", self.bytes);
        Slice { memory: self.memory.clone(), start: self.start + range.start, bytes: range.end - range.start }
    }
}

impl Deref for Slice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range was filled when the slice was cut, and filled bytes never change.
        unsafe { std::slice::from_raw_parts(self.memory.start.as_ptr().add(self.start), self.bytes) }
    }
}

impl AsRef<[u8]> for Slice {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slice({} bytes)", self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_stay_valid_while_the_writer_goes_on() {
        let pool = ChunkPool::new(64, 64, 1);
        let mut chunk = pool.take().unwrap();
        chunk.extend(b"first");
        let first = chunk.slice(0..5);
        chunk.extend(b"second");
        let second = chunk.slice(5..11);
        drop(chunk);
        assert_eq!((&first[..], &second[..]), (&b"first"[..], &b"second"[..]));
        assert_eq!(&second.slice(3..6)[..], b"ond");
    }

    #[test]
    fn memory_returns_when_the_last_slice_is_gone() {
        let pool = ChunkPool::new(64, 64, 1);
        let mut chunk = pool.take().unwrap();
        chunk.extend(b"x");
        let slice = chunk.slice(0..1);
        drop(chunk);
        assert!(pool.take().is_none(), "the slice still holds the only chunk");
        drop(slice);
        assert_eq!(pool.bytes_lent(), 0);
        assert!(pool.take().is_some());
    }

    #[test]
    fn a_chunk_larger_than_the_pool_is_lent_alone() {
        let pool = ChunkPool::new(64, 128, 1);
        let small = pool.take().unwrap();
        assert!(pool.take_sized(1000).is_none());
        drop(small);
        let large = pool.take_sized(1000).unwrap();
        assert!(pool.take().is_none());
        drop(large);
        assert!(pool.take().is_some());
    }

    #[test]
    fn memory_beyond_the_limit_counts_like_any_other() {
        let pool = ChunkPool::new(64, 64, 1);
        let chunk = pool.take().unwrap();
        let beyond = pool.take_beyond(1000);
        assert_eq!(pool.bytes_lent(), 1064);
        drop(chunk);
        assert!(pool.take().is_none());
        drop(beyond);
        assert!(pool.take().is_some());
    }

    #[test]
    #[should_panic(expected = "slice 0..2 of 1 bytes")]
    fn a_slice_never_reaches_unwritten_bytes() {
        let pool = ChunkPool::new(64, 64, 1);
        let mut chunk = pool.take().unwrap();
        chunk.extend(b"x");
        chunk.slice(0..2);
    }

    #[test]
    fn a_slice_outlives_its_pool() {
        let pool = ChunkPool::new(64, 64, 1);
        let mut chunk = pool.take().unwrap();
        chunk.extend(b"alone");
        let slice = chunk.slice(0..5);
        drop((pool, chunk));
        assert_eq!(&slice[..], b"alone");
    }
}
