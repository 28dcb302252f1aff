//! The hot path alone: stage, flush, tell. `append_bench DIR ENTRY_BYTES ENTRIES [PARTITIONS] [WINDOW_BYTES] [VERIFY_READS]`
//!
//! One executor, no network, no checksum of batches (the broker compares those before it appends).

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use drava_protocol::batch::{self, Builder, NewRecord, Seal};
use drava_protocol::{PartitionId, ShardId};
use drava_runtime::chunk::Slice;
use drava_runtime::local::Broadcast;
use drava_runtime::{Executor, ExecutorConfig};
use drava_storage::{
    FlushError, FlushSink, GlommioIo, IndexDb, NewEntry, PartitionLimits, Run, StateBatch, Store, StoreConfig,
};

/// As large as the shard's.
type Token = [u64; 6];

struct Sink {
    started: Instant,
    latencies_us: Vec<u32>,
    progress: Rc<Broadcast>,
}

impl FlushSink<Token> for Sink {
    fn flushed(&mut self, tokens: &mut Vec<Token>) {
        let now_us = self.started.elapsed().as_micros() as u64;
        self.latencies_us.extend(tokens.drain(..).map(|token| (now_us - token[0]) as u32));
        self.progress.notify_all();
    }

    fn failed(&mut self, _tokens: &mut Vec<Token>, error: &FlushError) {
        panic!("a flush failed: {error}");
    }

    fn collect_state(&mut self, _out: &mut StateBatch) {}
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number =
        |index: usize, otherwise: u64| arguments.get(index).map_or(otherwise, |text| text.parse().expect("a number"));
    let dir = PathBuf::from(arguments.get(1).expect("a directory"));
    let (entry_bytes, entries) = (number(2, 65536), number(3, 65536));
    let (partitions, window_bytes) = (number(4, 1), number(5, 4 << 20));
    let verify = number(6, 1);
    std::fs::create_dir_all(&dir).expect("the directory");
    let mut builder = Builder::new(8 << 20);
    let payload = vec![7; entry_bytes as usize];
    builder.push(&NewRecord { payload: &payload, ..NewRecord::default() }).expect("it fits");
    let mut bytes = Vec::new();
    builder.seal(&Seal::default(), &mut bytes);
    let header = batch::check(&bytes).expect("a good batch");
    let index = IndexDb::open(&dir.join("index"), 1).expect("the index");
    let bench = async move {
        let verify_reads = verify != 0;
        let config = StoreConfig { dir: dir.join("shard-000"), verify_reads, ..StoreConfig::default() };
        let (store, recovered) = Store::open(GlommioIo::new(), config, index.shard(ShardId(0))).await.expect("a store");
        println!("opened in {:?}, {} blocks replayed", recovered.took, recovered.replayed_blocks);
        let progress = Rc::new(Broadcast::default());
        let started = Instant::now();
        let latencies_us = Vec::with_capacity(entries as usize);
        let sink = Rc::new(RefCell::new(Sink { started, latencies_us, progress: progress.clone() }));
        store.start(sink.clone());
        let limits = PartitionLimits { retention_bytes: Some(512 << 20), ..PartitionLimits::default() };
        let slots: Vec<_> = (1..=partitions).map(|id| store.open_partition(PartitionId(id), limits)).collect();
        let mut next: Vec<u64> = slots.iter().map(|slot| store.span(*slot).next_offset).collect();
        let first = next.clone();
        let bytes = Slice::copy_of(&bytes);
        // Spare segments are made while the shard is quiet.
        drava_runtime::time::sleep(Duration::from_secs(2)).await;
        let cpu = cpu_seconds();
        let begun = Instant::now();
        for entry in 0..entries {
            let version = progress.version();
            if window_bytes < store.staged_bytes() {
                progress.changed(version).await;
            }
            let index = (entry % partitions) as usize;
            let token = [started.elapsed().as_micros() as u64, entry, 0, 0, 0, 0];
            let new = NewEntry { bytes: bytes.clone(), header, base_offset: next[index], append_time_ms: 1 };
            store.append(slots[index], new, token).map_err(|(error, _)| error).expect("appended");
            next[index] += 1;
            if entry % 64 == 0 {
                drava_runtime::yield_if_needed().await;
            }
        }
        while sink.borrow().latencies_us.len() < entries as usize {
            progress.changed(progress.version()).await;
        }
        report("append", entries, entry_bytes, begun.elapsed(), cpu_seconds() - cpu);
        let mut latencies = std::mem::take(&mut sink.borrow_mut().latencies_us);
        latencies.sort_unstable();
        let at = |quantile: f64| latencies[((latencies.len() - 1) as f64 * quantile) as usize];
        let figures = store.figures();
        println!(
            "  p50 {} us, p99 {} us, p99.9 {} us; {:.1} entries to a flush of {} us",
            at(0.5),
            at(0.99),
            at(0.999),
            entries as f64 / figures.flushes as f64,
            figures.flush_micros_total / figures.flushes
        );
        let (begun, cpu) = (Instant::now(), cpu_seconds());
        let mut runs: Vec<Run> = Vec::new();
        let mut read = 0;
        for (index, slot) in slots.iter().enumerate() {
            let mut offset = first[index].max(store.span(*slot).start_offset);
            while offset < next[index] {
                runs.clear();
                match store.read(*slot, offset, 1 << 20, &mut runs).await {
                    Ok(next_offset) => {
                        read += next_offset - offset;
                        offset = next_offset;
                    }
                    Err(drava_storage::ReadError::Trimmed { start_offset, .. }) => offset = start_offset,
                    Err(error) => panic!("read at {offset}: {error}"),
                }
            }
        }
        report("read", read, entry_bytes, begun.elapsed(), cpu_seconds() - cpu);
        println!("  {:?}", store.figures());
        let begun = Instant::now();
        store.seal().await.expect("sealed");
        println!("sealed in {:?}", begun.elapsed());
        store.close().await;
    };
    Executor::run(ExecutorConfig::new("bench", Some(0)), bench).expect("an executor");
}

fn report(what: &str, entries: u64, entry_bytes: u64, took: Duration, cpu: f64) {
    let gib = (entries * entry_bytes) as f64 / (1u64 << 30) as f64;
    println!(
        "{what}: {entries} entries in {took:?}: {:.0} k/s, {:.0} MiB/s, {:.2} CPU s/GiB, {:.2} CPU us/entry",
        entries as f64 / took.as_secs_f64() / 1e3,
        gib * 1024.0 / took.as_secs_f64(),
        cpu / gib,
        cpu / entries as f64 * 1e6
    );
}

/// Of the whole process.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
