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

    /// Makes a file of `bytes` that reads as zeros, for writes that are durable when they return. Fails if it exists.
    fn create(&self, path: &Path, bytes: u64) -> impl Future<Output = io::Result<Self::File>>;

    /// Makes a directory and its parents; fine if it is there.
    fn create_dir(&self, path: &Path) -> impl Future<Output = io::Result<()>>;

    /// Names and sizes of the files in a directory, in no order.
    fn list(&self, dir: &Path) -> impl Future<Output = io::Result<Vec<(PathBuf, u64)>>>;

    fn remove(&self, path: &Path) -> impl Future<Output = io::Result<()>>;

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

    /// Starts what serves the index. It blocks, so not on this executor unless nobody waits here: a simulation.
    fn start_index(&self, worker: IndexWorker) -> io::Result<()>;

    /// Lets other tasks of this executor run if this one has had its share.
    fn yield_if_needed(&self) -> impl Future<Output = ()>;
}

/// An open file. Positions and lengths are multiples of [`ALIGNMENT`].
pub trait File {
    type Buffer;
    /// What was read; cheap to clone.
    type Read: Deref<Target = [u8]> + Clone + 'static;

    /// Writes the whole buffer; durable when it returns.
    fn write_at(&self, buffer: Rc<Self::Buffer>, position: u64) -> impl Future<Output = io::Result<()>>;

    /// Reads up to `bytes`; less only at the end of the file.
    fn read_at(&self, position: u64, bytes: usize) -> impl Future<Output = io::Result<Self::Read>>;

    /// Makes all earlier writes durable, those of other processes included.
    fn sync(&self) -> impl Future<Output = io::Result<()>>;
}
