//! A store on a real directory, with a sink that remembers.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::cell::RefCell;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::batch::{self, Builder, NewRecord, Seal};
use drava_protocol::{PartitionId, ShardId};
use drava_runtime::chunk::Slice;
use drava_runtime::{Executor, ExecutorConfig};
use drava_storage::index::IndexWorker;
use drava_storage::{
    AppendError, FlushError, FlushSink, GlommioIo, IndexDb, Io, NewEntry, PartitionSlot, ReadError, Recovered, Run,
    StateBatch, Store, StoreConfig,
};

/// What a test's entries are known by.
pub type Token = u64;

#[derive(Default)]
pub struct Sink {
    pub flushed: Vec<Token>,
    pub failed: Vec<Token>,
    /// Given out once, at the next index batch.
    pub state: Vec<(PartitionId, Vec<u8>, Vec<u8>)>,
}

impl FlushSink<Token> for Sink {
    fn flushed(&mut self, tokens: &mut Vec<Token>) {
        self.flushed.append(tokens);
    }

    fn failed(&mut self, tokens: &mut Vec<Token>, _error: &FlushError) {
        self.failed.append(tokens);
    }

    fn collect_state(&mut self, out: &mut StateBatch) {
        for (partition, key, value) in self.state.drain(..) {
            out.put(partition, &key, &value);
        }
    }
}

pub fn run<T>(test: impl Future<Output = T>) -> T {
    Executor::run(ExecutorConfig::new("test", None), test).expect("an executor")
}

pub fn small(dir: &Path) -> StoreConfig {
    StoreConfig {
        dir: dir.join("shard"),
        segment_bytes: 1 << 20,
        segments_spare: 1,
        block_bytes_max: 64 << 10,
        flush_bytes_min: 16 << 10,
        cache_bytes: 1 << 20,
        disk_reserve_bytes: 0,
        // Tests count blocks.
        mark_after: None,
        ..StoreConfig::default()
    }
}

pub struct Fixture<I: Io = GlommioIo> {
    pub store: Store<I, Token>,
    pub sink: Rc<RefCell<Sink>>,
    pub recovered: Recovered,
}

pub async fn open(dir: &Path, config: StoreConfig) -> Fixture {
    open_with(GlommioIo::new(), dir, config).await
}

pub async fn open_with<I: Io>(io: I, dir: &Path, config: StoreConfig) -> Fixture<I> {
    let index = IndexDb::open(&dir.join("index"), 1).expect("an index");
    let (store, recovered) = Store::open(io, config, index.shard(ShardId(0))).await.expect("a store");
    let sink = Rc::new(RefCell::new(Sink::default()));
    store.start(sink.clone());
    Fixture { store, sink, recovered }
}

/// A batch of `count` records, recognisable by `seed`.
pub fn batch_of(seed: u64, count: u32, payload_bytes: usize) -> Vec<u8> {
    let mut builder = Builder::new(8 << 20);
    for index in 0..count {
        let mut payload = vec![(seed as u8) ^ (index as u8); payload_bytes];
        let mark = (seed << 20 | index as u64).to_le_bytes();
        let marked = payload.len().min(8);
        payload[..marked].copy_from_slice(&mark[..marked]);
        builder.push(&NewRecord { payload: &payload, ..NewRecord::default() }).expect("it fits");
    }
    let mut out = Vec::new();
    builder.seal(&Seal { producer: 9, producer_epoch: 1, base_sequence: seed, ..Seal::default() }, &mut out);
    out
}

impl<I: Io> Fixture<I> {
    /// Stages a batch with the token `seed`; returns its base offset.
    pub fn append(&self, slot: PartitionSlot, seed: u64, count: u32, payload_bytes: usize) -> u64 {
        self.append_at(slot, seed, count, payload_bytes, 1_000_000 + seed)
    }

    pub fn append_at(&self, slot: PartitionSlot, seed: u64, count: u32, payload_bytes: usize, time_ms: u64) -> u64 {
        self.try_append(slot, seed, count, payload_bytes, time_ms).expect("appended")
    }

    pub fn try_append(
        &self,
        slot: PartitionSlot,
        seed: u64,
        count: u32,
        payload_bytes: usize,
        time_ms: u64,
    ) -> Result<u64, AppendError> {
        let bytes = batch_of(seed, count, payload_bytes);
        let header = batch::check(&bytes).expect("a good batch");
        let base_offset = self.store.span(slot).next_offset;
        let entry = NewEntry { bytes: Slice::copy_of(&bytes), header, base_offset, append_time_ms: time_ms };
        self.store.append(slot, entry, seed).map_err(|(error, _)| error)?;
        Ok(base_offset)
    }

    pub async fn flushed(&self, count: usize) {
        while self.sink.borrow().flushed.len() < count {
            assert!(self.sink.borrow().failed.is_empty(), "no flush fails here");
            drava_runtime::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Reads the partition from `offset` to its end: base offset and sequence of each batch, and damaged ranges.
    pub async fn read_all(&self, slot: PartitionSlot, mut offset: u64) -> (Vec<(u64, u64)>, Vec<std::ops::Range<u64>>) {
        let mut batches = Vec::new();
        let mut damaged = Vec::new();
        loop {
            let mut runs: Vec<Run> = Vec::new();
            match self.store.read(slot, offset, 100_000, &mut runs).await {
                Ok(next) => {
                    check_runs(&runs, offset, &mut batches);
                    if next == offset {
                        assert!(runs.is_empty(), "no runs at the end");
                        return (batches, damaged);
                    }
                    offset = next;
                }
                Err(ReadError::Damaged { range }) => {
                    assert!(range.contains(&offset), "{range:?} holds {offset}");
                    offset = range.end;
                    damaged.push(range);
                }
                Err(error) => panic!("read at {offset}: {error}"),
            }
        }
    }
}

/// Checks that runs hold good batches, one after the other, and collects base offset and sequence of each.
pub fn check_runs(runs: &[Run], offset: u64, batches: &mut Vec<(u64, u64)>) {
    let mut expected = runs.first().map_or(offset, |run| run.first_offset);
    assert!(expected <= offset, "the first run starts at {expected}, asked was {offset}");
    for run in runs {
        assert_eq!(run.first_offset, expected);
        let mut rest = &run[..];
        while !rest.is_empty() {
            let header = batch::header(rest).expect("a batch header");
            batch::check_crc(&header, rest).expect("a good checksum");
            assert_eq!(header.base_offset, expected);
            assert!(0 < header.append_time_ms);
            batches.push((header.base_offset, header.base_sequence));
            expected += header.record_count as u64;
            rest = &rest[drava_protocol::frame::padded(header.batch_bytes as usize)..];
        }
        assert_eq!(run.next_offset, expected);
    }
}

/// A disk whose writes to segments fail from some point on.
#[derive(Clone)]
pub struct FaultyIo {
    disk: GlommioIo,
    /// Writes that still succeed; `None`: all.
    pub writes_left: Rc<std::cell::Cell<Option<u32>>>,
    /// Seed of what is left of the writes that fail: all, some or nothing. `None`: nothing.
    pub tear: Rc<std::cell::Cell<Option<u64>>>,
    /// Reads of segments so far, and what they asked for.
    pub reads: Rc<std::cell::Cell<u64>>,
    pub read_bytes: Rc<std::cell::Cell<u64>>,
    /// A page of a file that cannot be read any more.
    pub lost_page: Rc<RefCell<Option<(PathBuf, u64)>>>,
    /// Writes that fail before the disk is well again.
    pub failures_left: Rc<std::cell::Cell<u32>>,
    /// What the disk says it has left. `None`: the truth.
    pub free_bytes: Rc<std::cell::Cell<Option<u64>>>,
}

impl FaultyIo {
    pub fn new() -> FaultyIo {
        FaultyIo {
            disk: GlommioIo::new(),
            writes_left: Rc::default(),
            tear: Rc::default(),
            reads: Rc::default(),
            read_bytes: Rc::default(),
            lost_page: Rc::default(),
            failures_left: Rc::default(),
            free_bytes: Rc::default(),
        }
    }

    fn file(&self, path: &Path, file: <GlommioIo as Io>::File) -> FaultyFile {
        FaultyFile { path: path.to_owned(), file, io: self.clone() }
    }
}

/// A small generator: the same seed gives the same numbers.
pub fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

pub struct FaultyFile {
    path: PathBuf,
    file: <GlommioIo as Io>::File,
    io: FaultyIo,
}

impl Io for FaultyIo {
    type File = FaultyFile;
    type Buffer = <GlommioIo as Io>::Buffer;

    fn buffer(&self, bytes: usize) -> Self::Buffer {
        self.disk.buffer(bytes)
    }

    async fn open(&self, path: &Path) -> std::io::Result<FaultyFile> {
        Ok(self.file(path, self.disk.open(path).await?))
    }

    async fn open_for_sync(&self, path: &Path) -> std::io::Result<FaultyFile> {
        Ok(self.file(path, self.disk.open_for_sync(path).await?))
    }

    async fn create(&self, path: &Path, bytes: u64) -> std::io::Result<FaultyFile> {
        Ok(self.file(path, self.disk.create(path, bytes).await?))
    }

    async fn create_dir(&self, path: &Path) -> std::io::Result<()> {
        self.disk.create_dir(path).await
    }

    async fn list(&self, dir: &Path) -> std::io::Result<Vec<(PathBuf, u64)>> {
        self.disk.list(dir).await
    }

    async fn remove(&self, path: &Path) -> std::io::Result<()> {
        self.disk.remove(path).await
    }

    async fn remove_dir(&self, dir: &Path) -> std::io::Result<()> {
        self.disk.remove_dir(dir).await
    }

    async fn sync_dir(&self, dir: &Path) -> std::io::Result<()> {
        self.disk.sync_dir(dir).await
    }

    async fn free_bytes(&self, dir: &Path) -> std::io::Result<u64> {
        match self.free_bytes.get() {
            Some(bytes) => Ok(bytes),
            None => self.disk.free_bytes(dir).await,
        }
    }

    fn now(&self) -> Duration {
        self.disk.now()
    }

    fn wall_clock_ms(&self) -> u64 {
        self.disk.wall_clock_ms()
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.disk.spawn(task);
    }

    async fn sleep(&self, time: Duration) {
        self.disk.sleep(time).await;
    }

    fn start_index(&self, worker: IndexWorker) -> std::io::Result<()> {
        self.disk.start_index(worker)
    }

    async fn yield_if_needed(&self) {
        self.disk.yield_if_needed().await;
    }
}

impl drava_storage::io::File for FaultyFile {
    type Buffer = <GlommioIo as Io>::Buffer;
    type Read = <<GlommioIo as Io>::File as drava_storage::io::File>::Read;

    async fn write_at(&self, buffer: Rc<Self::Buffer>, position: u64) -> std::io::Result<()> {
        if let Some(left) = self.io.failures_left.get().checked_sub(1) {
            self.io.failures_left.set(left);
            self.tear(&buffer, position).await?;
            return Err(std::io::Error::from_raw_os_error(5));
        }
        match self.io.writes_left.get() {
            Some(0) => {
                self.tear(&buffer, position).await?;
                return Err(std::io::Error::from_raw_os_error(5));
            }
            Some(left) => self.io.writes_left.set(Some(left - 1)),
            None => {}
        }
        self.file.write_at(buffer, position).await
    }

    async fn read_once(&self, position: u64, bytes: usize) -> std::io::Result<Self::Read> {
        self.io.reads.set(self.io.reads.get() + 1);
        self.io.read_bytes.set(self.io.read_bytes.get() + bytes as u64);
        let is_lost =
            |(path, page): &(PathBuf, u64)| *path == self.path && (position..position + bytes as u64).contains(page);
        if self.io.lost_page.borrow().as_ref().is_some_and(is_lost) {
            return Err(std::io::Error::from_raw_os_error(5));
        }
        self.file.read_once(position, bytes).await
    }

    async fn size(&self) -> std::io::Result<u64> {
        self.file.size().await
    }

    async fn sync(&self) -> std::io::Result<()> {
        self.file.sync().await
    }
}

impl FaultyFile {
    /// Writes some pages of the buffer.
    async fn tear(&self, buffer: &Rc<<GlommioIo as Io>::Buffer>, position: u64) -> std::io::Result<()> {
        use drava_storage::io::File;
        let Some(mut seed) = self.io.tear.get() else { return Ok(()) };
        let bytes: &[u8] = (**buffer).as_ref();
        let kind = random(&mut seed) % 3;
        self.io.tear.set(Some(seed));
        for (index, page) in bytes.chunks(4096).enumerate() {
            let keep = match kind {
                0 => true,
                1 => false,
                _ => random(&mut seed).is_multiple_of(2),
            };
            if keep {
                let mut torn = self.io.buffer(4096);
                torn.as_mut().copy_from_slice(page);
                self.file.write_at(Rc::new(torn), position + index as u64 * 4096).await?;
            }
        }
        Ok(())
    }
}

/// The segments of the shard, by name.
pub fn segment_files(dir: &Path) -> Vec<PathBuf> {
    files_in(&dir.join("shard"))
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Flips one bit of a file.
pub fn flip(path: &Path, position: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, position).unwrap();
    byte[0] ^= 0x10;
    file.write_all_at(&byte, position).unwrap();
}

/// Position and file of every item of the given kind in all segments, in the order of blocks.
pub fn items(dir: &Path, pick: impl Fn(&drava_storage::dump::ItemKind) -> bool) -> Vec<(PathBuf, u64)> {
    items_in(&dir.join("shard"), pick)
}

/// In the directory of a store.
pub fn items_in(dir: &Path, pick: impl Fn(&drava_storage::dump::ItemKind) -> bool) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for path in files_in(dir) {
        let mut sequence = 0;
        for item in drava_storage::dump::segment(&path).unwrap() {
            let item = item.unwrap();
            if let drava_storage::dump::ItemKind::Block(header) = &item.kind {
                sequence = header.id.sequence;
            }
            if pick(&item.kind) {
                found.push((sequence, path.clone(), item.position));
            }
        }
    }
    found.sort();
    found.into_iter().map(|(_, path, position)| (path, position)).collect()
}
