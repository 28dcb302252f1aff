//! The storage's seam to the disk and the clock, on a [`World`].

use std::future::Future;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use drava_storage::StoreId;
use drava_storage::index::kv::{Kv, KvBatch, Row, Visit};
use drava_storage::index::model::ModelKv;
use drava_storage::index::{Index, IndexError, IndexWorker};
use drava_storage::io::{ALIGNMENT, DURABLE_WRITES, File, Io};

use crate::disk::FileState;
use crate::world::World;

/// What the wall clock shows when a run starts, in ms since the epoch.
const STARTED_MS: u64 = 1_700_000_000_000;
/// A new buffer holds this, so that nobody relies on zeros.
const JUNK: u8 = 0xa5;
/// A read that ends early has a multiple of this.
const READ_UNIT: usize = 512;

#[derive(Clone)]
pub struct SimIo(pub Rc<World>);

pub struct SimBuffer(Vec<u8>);

impl AsRef<[u8]> for SimBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for SimBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[derive(Clone)]
pub struct SimRead(Rc<Vec<u8>>);

impl Deref for SimRead {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

fn eio() -> io::Error {
    io::Error::other("injected: the disk failed")
}

impl SimIo {
    async fn delay(&self) {
        let world = &self.0;
        let mut time = world.random.micros(20..400);
        if world.random.chance(world.disk.faults.slow.get()) {
            time *= 1000;
        }
        world.executor.sleep(time).await;
    }

    /// The indexes of these stores. What is left of others is dropped.
    pub fn indexes(&self, stores: &[StoreId]) -> Vec<Index> {
        let families = self.0.open_families(stores);
        // Whoever asks it outside of a worker's requests finds it good.
        self.0.index_fails.store(false, Ordering::Relaxed);
        let index = |(store, kv): (&StoreId, ModelKv)| {
            let fails = self.0.index_fails.clone();
            Index::new(&format!("sim-{store}"), Box::new(FaultyKv { kv, fails, failed: false }))
        };
        stores.iter().zip(families).map(index).collect()
    }
}

impl Io for SimIo {
    type File = SimFile;
    type Buffer = SimBuffer;

    fn buffer(&self, bytes: usize) -> SimBuffer {
        assert!(0 < bytes && bytes.is_multiple_of(ALIGNMENT), "a buffer of {bytes} bytes");
        SimBuffer(vec![JUNK; bytes])
    }

    async fn open(&self, path: &Path) -> io::Result<SimFile> {
        self.delay().await;
        let state = self.0.disk.file(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(SimFile { state, io: self.clone(), path: path.to_owned(), durable_writes: DURABLE_WRITES })
    }

    async fn open_for_sync(&self, path: &Path) -> io::Result<SimFile> {
        Ok(SimFile { durable_writes: false, ..self.open(path).await? })
    }

    async fn create(&self, path: &Path, bytes: u64) -> io::Result<SimFile> {
        self.delay().await;
        let disk = &self.0.disk;
        let state = disk.create(path).ok_or(io::ErrorKind::AlreadyExists)?;
        self.0.event(format_args!("create {} {bytes}", path.display()));
        self.delay().await;
        if disk.free_bytes() < bytes {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if self.0.random.chance(disk.faults.create.get()) {
            state.resize(self.0.random.below(bytes / ALIGNMENT as u64) * ALIGNMENT as u64);
            return Err(eio());
        }
        state.resize(bytes);
        self.delay().await;
        Ok(SimFile { state, io: self.clone(), path: path.to_owned(), durable_writes: DURABLE_WRITES })
    }

    async fn create_dir(&self, _path: &Path) -> io::Result<()> {
        self.delay().await;
        Ok(())
    }

    async fn list(&self, dir: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
        self.delay().await;
        let files = self.0.disk.files().into_iter().filter(|(path, _)| path.parent() == Some(dir));
        Ok(files.map(|(path, file)| (path, file.len())).collect())
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        self.delay().await;
        self.0.event(format_args!("remove {}", path.display()));
        if self.0.disk.remove(path) { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    async fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        self.delay().await;
        self.0.event(format_args!("remove {}", dir.display()));
        let is_empty = self.0.disk.files().iter().all(|(path, _)| path.parent() != Some(dir));
        if is_empty { Ok(()) } else { Err(io::ErrorKind::DirectoryNotEmpty.into()) }
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.delay().await;
        if self.0.random.chance(self.0.disk.faults.sync.get()) {
            return Err(eio());
        }
        self.0.disk.sync_dir(dir);
        Ok(())
    }

    async fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        self.delay().await;
        Ok(self.0.disk.free_bytes())
    }

    fn now(&self) -> Duration {
        self.0.executor.now()
    }

    fn wall_clock_ms(&self) -> u64 {
        STARTED_MS + self.now().as_millis() as u64
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.executor.spawn(task);
    }

    async fn sleep(&self, time: Duration) {
        self.0.executor.sleep(time).await;
    }

    /// Serves one request after the other, each some time after it came.
    fn start_index(&self, mut worker: IndexWorker) -> io::Result<()> {
        let io = self.clone();
        self.spawn(async move {
            while let Some(request) = worker.next().await {
                io.delay().await;
                let fails = io.0.random.chance(io.0.disk.faults.index.get());
                io.0.index_fails.store(fails, Ordering::Relaxed);
                worker.serve(request);
            }
        });
        Ok(())
    }

    async fn yield_if_needed(&self) {
        if self.0.random.one_in(2) {
            self.0.executor.sleep(Duration::ZERO).await;
        }
    }
}

pub struct SimFile {
    state: Rc<FileState>,
    io: SimIo,
    path: PathBuf,
    durable_writes: bool,
}

impl SimFile {
    fn name(&self) -> std::path::Display<'_> {
        self.path.display()
    }
}

impl File for SimFile {
    type Buffer = SimBuffer;
    type Read = SimRead;

    async fn write_at(&self, buffer: Rc<SimBuffer>, position: u64) -> io::Result<()> {
        let world = &self.io.0;
        let bytes = buffer.0.len();
        assert!(bytes.is_multiple_of(ALIGNMENT) && position.is_multiple_of(ALIGNMENT as u64), "{bytes} at {position}");
        world.event(format_args!("write {} at {position}, {bytes}", self.name()));
        let number = self.state.begin(position, &buffer.0);
        self.io.delay().await;
        if world.random.chance(world.disk.faults.write.get()) {
            world.event(format_args!("write {} at {position} fails", self.name()));
            self.state.end_failed(number, &world.random, world.disk.sector_bytes());
            return Err(eio());
        }
        world.event(format_args!("written {} at {position}", self.name()));
        self.state.end(number, self.durable_writes);
        Ok(())
    }

    async fn read_once(&self, position: u64, bytes: usize) -> io::Result<SimRead> {
        assert!(bytes.is_multiple_of(ALIGNMENT) && position.is_multiple_of(ALIGNMENT as u64), "{bytes} at {position}");
        let world = &self.io.0;
        self.io.delay().await;
        if world.random.chance(world.disk.faults.read.get()) {
            world.event(format_args!("read {} at {position} fails", self.name()));
            return Err(eio());
        }
        let mut read = self.state.read(position, bytes);
        if READ_UNIT < read.len() && world.random.chance(world.disk.faults.short_read.get()) {
            let units = world.random.in_range(1..read.len().div_ceil(READ_UNIT) as u64) as usize;
            world.event(format_args!("read {} at {position} ends after {units} units", self.name()));
            read.truncate(units * READ_UNIT);
        }
        Ok(SimRead(Rc::new(read)))
    }

    async fn size(&self) -> io::Result<u64> {
        self.io.delay().await;
        Ok(self.state.len())
    }

    async fn sync(&self) -> io::Result<()> {
        let world = &self.io.0;
        self.io.delay().await;
        if world.random.chance(world.disk.faults.sync.get()) {
            world.event(format_args!("sync {} fails", self.name()));
            self.state.sync_failed();
            return Err(eio());
        }
        self.state.sync();
        Ok(())
    }
}

/// The model, with writes that fail when the world says so.
struct FaultyKv {
    kv: ModelKv,
    /// Whether the request that is served now fails.
    fails: Arc<AtomicBool>,
    /// A database that failed to write stays as it is until it is opened again, as RocksDB does.
    failed: bool,
}

impl FaultyKv {
    fn check(&mut self) -> Result<(), IndexError> {
        self.failed |= self.fails.load(Ordering::Relaxed);
        if self.failed { Err(IndexError::Thread("injected: the database failed".into())) } else { Ok(()) }
    }
}

impl Kv for FaultyKv {
    fn reader(&self) -> Box<dyn Kv> {
        self.kv.reader()
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        self.kv.get(key)
    }

    fn scan(&self, from: &[u8], visit: &mut Visit<'_>) -> Result<(), IndexError> {
        self.kv.scan(from, visit)
    }

    fn last_at(&self, key: &[u8]) -> Result<Option<Row>, IndexError> {
        self.kv.last_at(key)
    }

    fn write(&mut self, batch: KvBatch) -> Result<(), IndexError> {
        self.check()?;
        self.kv.write(batch)
    }

    fn flush(&mut self) -> Result<(), IndexError> {
        self.check()?;
        self.kv.flush()
    }
}
