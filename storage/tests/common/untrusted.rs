//! A store's disk made of arbitrary bytes, and what is claimed of opening it. Shared by the property tests here and by the
//! targets in `fuzz/`.
//!
//! Arbitrary bytes alone do not get past the first checksum. So the bytes are a recipe: of segments, blocks, extents and
//! batches whose fields are anything and whose checksums mostly hold, and of rows of the index.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use drava_protocol::batch::{self, Builder, NewRecord, Seal};
use drava_protocol::frame::padded;
use drava_protocol::{LedgerId, PartitionId, ShardId};
use drava_storage::block::{self, BlockId, BlockWriter, EXTENT_HEADER_BYTES, ExtentHeader, ExtentKind, HEADER_BYTES};
use drava_storage::index::IndexWorker;
use drava_storage::index::kv::{Kv, KvBatch};
use drava_storage::index::model::ModelKv;
use drava_storage::io::{ALIGNMENT, File};
use drava_storage::segment::{self, SegmentHeader, SegmentId, SegmentKind};
use drava_storage::{Index, Io, PartitionLimits, RecordLog, RecordLogConfig, Run, Store, StoreConfig};

const DIR: &str = "/store";
const SEGMENTS_MAX: u64 = 4;
const SEGMENT_BYTES: u64 = 128 << 10;
const BLOCK_BYTES_MAX: usize = 16 << 10;
/// What a test reads of one partition at a time.
const READ_BYTES: usize = 4096;

/// How deep a recipe led.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    pub blocks: u64,
    pub runs: usize,
}

/// Opens a store on the index rows and segments that `recipe` makes, and reads what it says is there. Nothing panics;
/// what cannot be believed is an error or is left out.
pub fn open_and_read(recipe: &[u8]) -> Depth {
    let mut recipe = Recipe(recipe);
    let index = rows(&mut recipe);
    let disk = Disk::with_segments(&mut recipe);
    let mut depth = Depth::default();
    disk.clone().run(async {
        let config = StoreConfig {
            dir: DIR.into(),
            segment_bytes: SEGMENT_BYTES,
            block_bytes_max: BLOCK_BYTES_MAX,
            cache_bytes: 1 << 20,
            read_ahead_bytes: 64 << 10,
            disk_reserve_bytes: 0,
            ..StoreConfig::default()
        };
        let index = Index::new("untrusted", Box::new(index));
        let Ok((store, recovered)) = Store::<Disk, ()>::open(disk, config, index).await else { return };
        depth.blocks = recovered.replayed_blocks;
        for partition in recovered.partitions.iter().take(8) {
            assert!(partition.start_offset <= partition.end_offset, "{partition:?}");
            let slot = store.open_partition(partition.partition, PartitionLimits::default());
            let span = store.span(slot);
            let (start, end) = (span.start_offset, span.end_offset);
            for offset in [start, start + (end - start) / 2, end.saturating_sub(1), end] {
                let mut runs: Vec<Run> = Vec::new();
                // Whole or not at all, and never what was not asked for.
                if store.read(slot, offset, READ_BYTES, &mut runs).await.is_ok() {
                    depth.runs += runs.len();
                    for run in &runs {
                        assert!(run.first_offset < run.next_offset, "{run:?}");
                    }
                    if let Some(first) = runs.first() {
                        assert!(first.first_offset <= offset && offset < first.next_offset, "{offset} in {first:?}");
                    }
                }
            }
            let _anywhere = store.locate_time(slot, recovered.took.as_millis() as u64).await;
        }
        let _damage = store.damage();
        store.close().await;
    });
    depth
}

/// Opens a record log on the segments that `recipe` makes.
pub fn open_records(recipe: &[u8]) {
    let disk = Disk::with_segments(&mut Recipe(recipe));
    disk.clone().run(async {
        let config = RecordLogConfig { segment_bytes: SEGMENT_BYTES, disk_reserve_bytes: 0 };
        if let Ok((log, records)) = RecordLog::open(disk, Path::new(DIR), config).await {
            assert!(records.iter().all(|(position, _)| *position < log.next_position()));
            log.close().await;
        }
    });
}

/// Lists the items of the segments that `recipe` makes, as `drava log dump` does.
pub fn dump(recipe: &[u8]) {
    let disk = Disk::with_segments(&mut Recipe(recipe));
    let dir = tempfile::tempdir().expect("a directory");
    for (name, bytes) in &*disk.files.borrow() {
        let path = dir.path().join(name.file_name().expect("a name"));
        std::fs::write(&path, &*bytes.borrow()).expect("written");
        let Ok(items) = drava_storage::dump::segment(&path) else { continue };
        for item in items.map_while(Result::ok) {
            assert!(item.position <= SEGMENT_BYTES);
            let _text = item.to_string();
        }
    }
}

/// Bytes read front to back; zeros when they are used up.
struct Recipe<'a>(&'a [u8]);

impl<'a> Recipe<'a> {
    fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        head
    }

    fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    fn u64(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let head = self.bytes(8);
        bytes[..head.len()].copy_from_slice(head);
        u64::from_le_bytes(bytes)
    }

    /// Mostly small, so that numbers meet; now and then anything.
    fn number(&mut self) -> u64 {
        match self.u8() {
            0xff => self.u64(),
            0xfe => u64::MAX - u64::from(self.u8()),
            small => u64::from(small & 0x3f),
        }
    }

    /// What it should be, most of the time.
    fn mostly(&mut self, expected: u64) -> u64 {
        if self.u8() < 248 { expected } else { self.number() }
    }
}

/// Rows of the index: keys that look like keys, values that are anything, or of the right length.
fn rows(recipe: &mut Recipe<'_>) -> ModelKv {
    const TABLES: &[u8] = b"celpsgdr";
    let mut batch = KvBatch::default();
    for _ in 0..recipe.u8() % 16 {
        let table = TABLES[usize::from(recipe.u8()) % TABLES.len()];
        let mut key = vec![table];
        let key_bytes = [0, 16, 12, 8, 12, 4, 8, 0][TABLES.iter().position(|known| *known == table).expect("a table")];
        for _ in 0..key_bytes / 4 {
            // Numbers in keys are big-endian: their last byte makes them small.
            key.extend_from_slice(&[0, 0, 0, recipe.u8() & 3]);
        }
        let value_bytes = usize::from(recipe.u8());
        let mut value = Vec::with_capacity(value_bytes);
        if table == b'c' && value_bytes & 1 == 0 {
            // Of this version, and of the first use of the first segment.
            value.extend_from_slice(&[1, recipe.u8() & 1]);
            value.extend_from_slice(&(recipe.mostly(0) as u32).to_le_bytes());
            for expected in [1, segment::HEADER_BYTES, 1] {
                value.extend_from_slice(&recipe.mostly(expected).to_le_bytes());
            }
            value.extend_from_slice(&(recipe.mostly(0) as u32).to_le_bytes());
        } else if value_bytes & 1 == 0 {
            while value.len() < value_bytes / 2 {
                value.extend_from_slice(&recipe.number().to_le_bytes());
            }
        } else {
            value.extend_from_slice(recipe.bytes(value_bytes));
        }
        batch.put(key, value);
    }
    let mut model = ModelKv::default();
    model.write(batch).expect("the model takes all");
    model
}

/// What chains the blocks of a journal.
struct Chain {
    sequence: u64,
    crc: u32,
}

fn segment_of(recipe: &mut Recipe<'_>, number: u64, chain: &mut Chain) -> Vec<u8> {
    let mut out = vec![0; ALIGNMENT];
    let generation = recipe.mostly(number + 1);
    let kind = if recipe.u8() < 240 { SegmentKind::Journal } else { SegmentKind::Compacted };
    let header = SegmentHeader {
        shard: ShardId(recipe.mostly(0) as u16),
        segment: SegmentId(recipe.mostly(number) as u32),
        generation,
        kind,
        bytes: 0,
    };
    segment::encode(&header, &mut out);
    for _ in 0..1 + recipe.u8() % 8 {
        match recipe.u8() {
            0..16 => {
                let mut page = recipe.bytes(64).to_vec();
                page.resize(ALIGNMENT, 0);
                out.extend_from_slice(&page);
            }
            _ => out.extend_from_slice(&block_of(recipe, generation, chain)),
        }
        if recipe.is_over() || (SEGMENT_BYTES as usize) < out.len() + BLOCK_BYTES_MAX {
            break;
        }
    }
    // A bit that the disk turned over.
    if recipe.u8() < 32 {
        let at = recipe.u64() as usize % out.len();
        out[at] ^= 1 << (recipe.u8() & 7);
    }
    out.resize(SEGMENT_BYTES as usize, 0);
    out
}

fn block_of(recipe: &mut Recipe<'_>, generation: u64, chain: &mut Chain) -> Vec<u8> {
    let sequence = recipe.mostly(chain.sequence).max(1);
    let mut bytes = vec![0; BLOCK_BYTES_MAX];
    let mut writer = BlockWriter::new(&mut bytes, sequence);
    for _ in 0..recipe.u8() % 4 {
        let kind =
            [ExtentKind::Data, ExtentKind::Data, ExtentKind::State, ExtentKind::Records][usize::from(recipe.u8() & 3)];
        let base_offset = recipe.number();
        let batches: Vec<Vec<u8>> = (0..1 + recipe.u8() % 3).map(|_| batch_of(recipe)).collect();
        let checked_bytes = usize::from(recipe.u8());
        let mut checked = recipe.bytes(checked_bytes).to_vec();
        checked.resize(checked.len().next_multiple_of(16).max(16), 0);
        let is_data = kind == ExtentKind::Data;
        let body_bytes = if is_data { batches.iter().map(|batch| padded(batch.len())).sum() } else { checked.len() };
        let next_offset_max = u64::MAX - base_offset;
        writer.extent(&ExtentHeader {
            kind,
            body_bytes: body_bytes as u32,
            ledger: LedgerId { partition: PartitionId(recipe.number() & 3), sequence: recipe.number() as u32 },
            first_entry: recipe.number(),
            entry_count: recipe.mostly(if is_data { batches.len() as u64 } else { 1 }).max(1) as u32,
            base_offset,
            record_count: recipe.mostly(batches.len() as u64).min(next_offset_max),
            max_append_time_ms: recipe.number(),
            block_sequence: sequence,
        });
        if is_data {
            for (index, batch) in batches.iter().enumerate() {
                let base_offset = recipe.mostly(base_offset.saturating_add(index as u64));
                writer.batch(batch, base_offset, recipe.number());
            }
        } else {
            writer.checked(&checked);
        }
    }
    let used = writer.position();
    let id = BlockId {
        kind: SegmentKind::Journal,
        shard: ShardId(recipe.mostly(0) as u16),
        generation: recipe.mostly(generation),
        sequence,
        durable_sequence: recipe.mostly(sequence - 1).min(sequence - 1),
        previous_crc: recipe.mostly(u64::from(chain.crc)) as u32,
    };
    let block_bytes = used.next_multiple_of(ALIGNMENT);
    writer.finish(&id);
    bytes.truncate(block_bytes);
    // It was written as if it filled the whole buffer.
    bytes[32..36].copy_from_slice(&(block_bytes as u32).to_le_bytes());
    if recipe.u8() < 32 {
        let at = recipe.u64() as usize % (HEADER_BYTES + EXTENT_HEADER_BYTES).min(bytes.len());
        bytes[at] = recipe.u8();
    }
    if let Err(block::BlockError::Checksum { computed, .. }) = block::check(&bytes) {
        bytes[48..52].copy_from_slice(&computed.to_le_bytes());
    }
    *chain = Chain {
        sequence: sequence.saturating_add(1),
        crc: u32::from_le_bytes([bytes[48], bytes[49], bytes[50], bytes[51]]),
    };
    bytes
}

/// A batch of one record, or something as long as it says.
fn batch_of(recipe: &mut Recipe<'_>) -> Vec<u8> {
    let payload_bytes = usize::from(recipe.u8() & 0x3f);
    let payload = recipe.bytes(payload_bytes);
    let mut out = Vec::new();
    let mut builder = Builder::new(1 << 10);
    builder.push(&NewRecord { payload, ..NewRecord::default() }).expect("it fits");
    let seal = Seal { producer: recipe.number(), base_sequence: recipe.number(), ..Seal::default() };
    builder.seal(&seal, &mut out);
    if recipe.u8() < 32 {
        let at = 20 + recipe.u64() as usize % (batch::HEADER_BYTES - 20);
        out[at] = recipe.u8();
    }
    out
}

type Task = Pin<Box<dyn Future<Output = ()>>>;
type Bytes = Rc<RefCell<Vec<u8>>>;

/// A disk in memory, its clock at rest, and the executor that its tasks run on.
#[derive(Clone, Default)]
pub struct Disk {
    files: Rc<RefCell<BTreeMap<PathBuf, Bytes>>>,
    tasks: Rc<RefCell<Vec<Task>>>,
}

impl Disk {
    fn with_segments(recipe: &mut Recipe<'_>) -> Disk {
        let disk = Disk::default();
        let mut chain = Chain { sequence: 1, crc: 0 };
        for number in 0..1 + u64::from(recipe.u8()) % SEGMENTS_MAX {
            let bytes = segment_of(recipe, number, &mut chain);
            let path = segment::path(Path::new(DIR), SegmentId(number as u32));
            disk.files.borrow_mut().insert(path, Rc::new(RefCell::new(bytes)));
        }
        disk
    }

    /// Runs `main` to its end beside the tasks that it spawns, and forgets those that are left.
    fn run(self, main: impl Future<Output = ()>) {
        let mut main = pin!(main);
        futures_lite::future::block_on(std::future::poll_fn(|cx| {
            if main.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            let mut tasks = self.tasks.take();
            tasks.retain_mut(|task| task.as_mut().poll(cx).is_pending());
            self.tasks.borrow_mut().extend(tasks);
            Poll::Pending
        }));
        self.tasks.borrow_mut().clear();
    }

    fn file(&self, path: &Path) -> io::Result<Bytes> {
        self.files.borrow().get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Io for Disk {
    type File = MemoryFile;
    type Buffer = Vec<u8>;

    fn buffer(&self, bytes: usize) -> Vec<u8> {
        vec![0; bytes]
    }

    async fn open(&self, path: &Path) -> io::Result<MemoryFile> {
        self.file(path).map(MemoryFile)
    }

    async fn open_for_sync(&self, path: &Path) -> io::Result<MemoryFile> {
        self.open(path).await
    }

    async fn create(&self, path: &Path, bytes: u64) -> io::Result<MemoryFile> {
        assert!(bytes <= SEGMENT_BYTES, "a file of {bytes} bytes");
        let file = Rc::new(RefCell::new(vec![0; bytes as usize]));
        self.files.borrow_mut().insert(path.to_owned(), file.clone());
        Ok(MemoryFile(file))
    }

    async fn create_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn list(&self, _dir: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
        let files = self.files.borrow();
        Ok(files.iter().map(|(path, bytes)| (path.clone(), bytes.borrow().len() as u64)).collect())
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        self.files.borrow_mut().remove(path);
        Ok(())
    }

    async fn remove_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        Ok(1 << 30)
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn wall_clock_ms(&self) -> u64 {
        1_700_000_000_000
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.tasks.borrow_mut().push(Box::pin(task));
    }

    async fn sleep(&self, _time: Duration) {
        std::future::pending().await
    }

    fn start_index(&self, mut worker: IndexWorker) -> io::Result<()> {
        // On this very thread: a thread for each case would be most of its cost.
        self.spawn(async move {
            while let Some(request) = worker.next().await {
                worker.serve(request);
            }
        });
        Ok(())
    }

    async fn yield_if_needed(&self) {}
}

pub struct MemoryFile(Bytes);

impl File for MemoryFile {
    type Buffer = Vec<u8>;
    type Read = Rc<[u8]>;

    async fn write_at(&self, buffer: Rc<Vec<u8>>, position: u64) -> io::Result<()> {
        let mut bytes = self.0.borrow_mut();
        let end = position as usize + buffer.len();
        let out = bytes.get_mut(position as usize..end).ok_or(io::ErrorKind::WriteZero)?;
        out.copy_from_slice(&buffer);
        Ok(())
    }

    async fn size(&self) -> io::Result<u64> {
        Ok(self.0.borrow().len() as u64)
    }

    async fn read_once(&self, position: u64, count: usize) -> io::Result<Rc<[u8]>> {
        let bytes = self.0.borrow();
        let start = (position as usize).min(bytes.len());
        let end = start.saturating_add(count).min(bytes.len());
        Ok(bytes[start..end].into())
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
