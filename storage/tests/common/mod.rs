//! A store on a real directory, with a sink that remembers.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::cell::RefCell;
use std::future::Future;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::batch::{self, Builder, NewRecord, Seal};
use drava_protocol::{PartitionId, ShardId};
use drava_runtime::chunk::Slice;
use drava_runtime::{Executor, ExecutorConfig};
use drava_storage::{
    FlushError, FlushSink, GlommioIo, IndexDb, Io, NewEntry, PartitionSlot, ReadError, Recovered, Run, StateBatch,
    Store, StoreConfig,
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
        let bytes = batch_of(seed, count, payload_bytes);
        let header = batch::check(&bytes).expect("a good batch");
        let base_offset = self.store.span(slot).next_offset;
        let entry = NewEntry { bytes: Slice::copy_of(&bytes), header, base_offset, append_time_ms: time_ms };
        self.store.append(slot, entry, seed).map_err(|(error, _)| error).expect("appended");
        base_offset
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
