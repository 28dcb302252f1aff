//! The seam to the disk and the clock: everything in this crate that is not a computation goes through [`Io`].

use std::future::Future;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use crate::index::IndexWorker;

pub mod glommio;

/// All direct IO starts and ends at a multiple of this.
pub const ALIGNMENT: usize = 4096;

/// Whether files are opened so that a write to them is durable when it returns: all of this crate relies on it.
pub const DURABLE_WRITES: bool = !cfg!(feature = "mutant-no-sync");

/// A disk and a clock. Cheap to clone; clones are the same disk.
pub trait Io: Clone + 'static {
    type File: File<Buffer = Self::Buffer> + 'static;
    /// Memory that can be written from: aligned to [`ALIGNMENT`].
    type Buffer: AsRef<[u8]> + AsMut<[u8]> + 'static;

    /// `bytes` is a multiple of [`ALIGNMENT`]. The content is arbitrary.
    fn buffer(&self, bytes: usize) -> Self::Buffer;

    /// Opens an existing file; writes to it are durable when they return.
    fn open(&self, path: &Path) -> impl Future<Output = io::Result<Self::File>>;

    /// Opens an existing file; writes to it are durable after [`File::sync`]: for many writes that nobody waits for singly.
    /// A durable write that fills a place for the first time makes the disk empty its cache, and everybody's writes wait.
    fn open_for_sync(&self, path: &Path) -> impl Future<Output = io::Result<Self::File>>;

    /// Makes a file of `bytes` that reads as zeros, for writes that are durable when they return. Fails if it exists.
    fn create(&self, path: &Path, bytes: u64) -> impl Future<Output = io::Result<Self::File>>;

    /// Makes a directory and its parents; fine if it is there.
    fn create_dir(&self, path: &Path) -> impl Future<Output = io::Result<()>>;

    /// Names and sizes of the files in a directory, in no order.
    fn list(&self, dir: &Path) -> impl Future<Output = io::Result<Vec<(PathBuf, u64)>>>;

    fn remove(&self, path: &Path) -> impl Future<Output = io::Result<()>>;

    /// Removes an empty directory. Fails if something is in it.
    fn remove_dir(&self, dir: &Path) -> impl Future<Output = io::Result<()>>;

    /// Makes created, renamed and removed names durable.
    fn sync_dir(&self, dir: &Path) -> impl Future<Output = io::Result<()>>;

    /// Bytes that the file system of `dir` has left for us.
    fn free_bytes(&self, dir: &Path) -> impl Future<Output = io::Result<u64>>;

    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;

    /// Milliseconds since the epoch, as the machine believes.
    fn wall_clock_ms(&self) -> u64;

    /// Runs a task on this executor to its end.
    fn spawn(&self, task: impl Future<Output = ()> + 'static);

    fn sleep(&self, time: Duration) -> impl Future<Output = ()>;

    /// Starts a worker of the index. It blocks, so not on this executor unless nobody waits here: a simulation.
    fn start_index(&self, worker: IndexWorker) -> io::Result<()>;

    /// Lets other tasks of this executor run if this one has had its share.
    fn yield_if_needed(&self) -> impl Future<Output = ()>;
}

/// A read that ends before the end of its file is tried again so often.
const SHORT_READS_MAX: u32 = 8;

/// The file goes on where the disk stopped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{read_bytes} of {asked_bytes} bytes were read at {position}, and the file goes on")]
pub struct ShortRead {
    pub position: u64,
    pub asked_bytes: usize,
    pub read_bytes: usize,
}

/// An open file. Positions and lengths are multiples of [`ALIGNMENT`].
pub trait File {
    type Buffer;
    /// What was read; cheap to clone.
    type Read: Deref<Target = [u8]> + Clone + 'static;

    /// Writes the whole buffer; durable when it returns, but for [`Io::open_for_sync`].
    fn write_at(&self, buffer: Rc<Self::Buffer>, position: u64) -> impl Future<Output = io::Result<()>>;

    /// What the disk gives at once: less than `bytes` at the end of the file, and now and then elsewhere.
    fn read_once(&self, position: u64, bytes: usize) -> impl Future<Output = io::Result<Self::Read>>;

    fn size(&self) -> impl Future<Output = io::Result<u64>>;

    /// Reads up to `bytes`; less only at the end of the file. Errors: [`ShortRead`], when the disk will not give more.
    fn read_at(&self, position: u64, bytes: usize) -> impl Future<Output = io::Result<Self::Read>> {
        async move {
            let mut read = self.read_once(position, bytes).await?;
            for _ in 0..SHORT_READS_MAX {
                // Without the size, a read that ends early would be taken for a file that does, and what is behind for lost.
                if read.len() == bytes || self.size().await? <= position + read.len() as u64 {
                    return Ok(read);
                }
                read = self.read_once(position, bytes).await?;
            }
            if read.len() == bytes {
                return Ok(read);
            }
            // Where it stops there may be an error of the disk's own, which says more.
            let rest = position + (read.len() / ALIGNMENT * ALIGNMENT) as u64;
            self.read_once(rest, ALIGNMENT).await?;
            Err(io::Error::other(ShortRead { position, asked_bytes: bytes, read_bytes: read.len() }))
        }
    }

    /// Makes all earlier writes durable, those of other processes included.
    fn sync(&self) -> impl Future<Output = io::Result<()>>;
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    /// Gives the next of these counts with each read.
    struct Short {
        size: u64,
        counts: RefCell<Vec<usize>>,
    }

    impl File for Short {
        type Buffer = Vec<u8>;
        type Read = Rc<[u8]>;

        async fn write_at(&self, _buffer: Rc<Vec<u8>>, _position: u64) -> io::Result<()> {
            Ok(())
        }

        async fn read_once(&self, _position: u64, bytes: usize) -> io::Result<Rc<[u8]>> {
            let next = if self.counts.borrow().is_empty() { bytes } else { self.counts.borrow_mut().remove(0) };
            Ok(vec![0; next].into())
        }

        async fn size(&self) -> io::Result<u64> {
            Ok(self.size)
        }

        async fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn read(size: u64, counts: &[usize]) -> io::Result<usize> {
        let file = Short { size, counts: RefCell::new(counts.to_vec()) };
        let read = pin!(file.read_at(4096, 8192)).poll(&mut Context::from_waker(Waker::noop()));
        let Poll::Ready(read) = read else { panic!("nothing to wait for") };
        read.map(|read| read.len())
    }

    #[test]
    fn a_short_read_is_not_the_end_of_the_file() {
        assert_eq!(read(1 << 20, &[512, 4096]).unwrap(), 8192);
        assert_eq!(read(8192, &[4096]).unwrap(), 4096, "there is no more");
        assert_eq!(read(8192, &[512, 4096]).unwrap(), 4096, "there is more, and less than was asked for");
        let error = read(1 << 20, &[512; 20]).unwrap_err();
        let short = error.get_ref().and_then(|error| error.downcast_ref::<ShortRead>());
        assert_eq!(short, Some(&ShortRead { position: 4096, asked_bytes: 8192, read_bytes: 512 }));
    }
}
