//! The real disk, through glommio: O_DIRECT and O_DSYNC on io_uring.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use drava_runtime::file::{DmaBuffer, DmaFile, OpenOptions, ReadResult, allocate_dma_buffer};
use drava_runtime::io_error;

use super::{ALIGNMENT, DURABLE_WRITES, File, Io};
use crate::index::IndexWorker;

/// The disk and the clock of the machine, on a glommio executor.
#[derive(Clone, Debug)]
pub struct GlommioIo {
    started: Instant,
}

impl GlommioIo {
    pub fn new() -> GlommioIo {
        GlommioIo { started: Instant::now() }
    }
}

impl Default for GlommioIo {
    fn default() -> Self {
        GlommioIo::new()
    }
}

fn options(durable_writes: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(if durable_writes { libc::O_DSYNC } else { 0 });
    options
}

/// Runs what blocks on a thread of its own. These calls are rare: files are opened and listed, not looped over.
async fn blocking<R: Send + 'static>(work: impl FnOnce() -> io::Result<R> + Send + 'static) -> io::Result<R> {
    let (sender, reply) = drava_runtime::foreign::reply();
    std::thread::Builder::new().name("drava-files".into()).spawn(move || sender.send(work()))?;
    reply.await.unwrap_or_else(|| Err(io::Error::other("the helper thread ended without an answer")))
}

impl Io for GlommioIo {
    type File = GlommioFile;
    type Buffer = DmaBuffer;

    fn buffer(&self, bytes: usize) -> DmaBuffer {
        assert!(0 < bytes && bytes.is_multiple_of(ALIGNMENT), "a buffer of {bytes} bytes");
        allocate_dma_buffer(bytes)
    }

    async fn open(&self, path: &Path) -> io::Result<GlommioFile> {
        options(DURABLE_WRITES).dma_open(path).await.map(GlommioFile).map_err(io_error)
    }

    async fn open_for_sync(&self, path: &Path) -> io::Result<GlommioFile> {
        options(false).dma_open(path).await.map(GlommioFile).map_err(io_error)
    }

    async fn create(&self, path: &Path, bytes: u64) -> io::Result<GlommioFile> {
        let file = options(DURABLE_WRITES).create_new(true).dma_open(path).await.map_err(io_error)?;
        file.pre_allocate(bytes, false).await.map_err(io_error)?;
        file.fdatasync().await.map_err(io_error)?;
        Ok(GlommioFile(file))
    }

    async fn create_dir(&self, path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        blocking(move || std::fs::create_dir_all(path)).await
    }

    async fn list(&self, dir: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
        let dir = dir.to_owned();
        blocking(move || {
            let mut files = Vec::new();
            for entry in std::fs::read_dir(dir)? {
                let entry = entry?;
                let metadata = entry.metadata()?;
                if metadata.is_file() {
                    files.push((entry.path(), metadata.len()));
                }
            }
            Ok(files)
        })
        .await
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        blocking(move || std::fs::remove_file(path)).await
    }

    async fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        let dir = dir.to_owned();
        blocking(move || std::fs::remove_dir(dir)).await
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let dir = dir.to_owned();
        blocking(move || std::fs::File::open(dir)?.sync_all()).await
    }

    async fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        let dir = dir.to_owned();
        blocking(move || {
            let stat = rustix::fs::statvfs(&dir)?;
            Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
        })
        .await
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn wall_clock_ms(&self) -> u64 {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        // A spawned task runs on when its handle is dropped.
        drop(drava_runtime::spawn(task));
    }

    async fn sleep(&self, time: Duration) {
        drava_runtime::time::sleep(time).await;
    }

    fn start_index(&self, worker: IndexWorker) -> io::Result<()> {
        let name = worker.name().to_owned();
        let work = move || {
            if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || worker.run())) {
                drava_runtime::task::stop_after_panic(&*panic);
            }
        };
        std::thread::Builder::new().name(name).spawn(work).map(drop)
    }

    async fn yield_if_needed(&self) {
        drava_runtime::yield_if_needed().await;
    }
}

#[derive(Debug)]
pub struct GlommioFile(DmaFile);

impl File for GlommioFile {
    type Buffer = DmaBuffer;
    type Read = ReadResult;

    async fn write_at(&self, buffer: Rc<DmaBuffer>, position: u64) -> io::Result<()> {
        let bytes = buffer.len();
        let written = self.0.write_rc_at(buffer, position).await.map_err(io_error)?;
        if written != bytes {
            return Err(io::Error::new(io::ErrorKind::WriteZero, format!("{written} of {bytes} bytes were written")));
        }
        Ok(())
    }

    async fn read_once(&self, position: u64, bytes: usize) -> io::Result<ReadResult> {
        self.0.read_at_aligned(position, bytes).await.map_err(io_error)
    }

    async fn size(&self) -> io::Result<u64> {
        self.0.file_size().await.map_err(io_error)
    }

    async fn sync(&self) -> io::Result<()> {
        self.0.fdatasync().await.map_err(io_error)
    }
}
