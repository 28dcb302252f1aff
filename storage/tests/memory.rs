//! The memory of a store under many partitions and many readers that take their time. A process of its own: what the
//! system says of it is compared with what the store says.

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use common::{Fixture, check_runs, open, run};
use drava_protocol::PartitionId;
use drava_runtime::local::Broadcast;
use drava_storage::{MemoryFigures, PartitionLimits, PartitionSlot, Run, StoreConfig};

const PARTITIONS: u64 = 10_000;
const READERS: u64 = 1_000;
const MEMORY_BYTES: u64 = 64 << 20;
/// Partitions that readers behind the cache read, each with so many batches of [`LONG_BYTES`].
const LONG: u64 = 50;
const LONG_BATCHES: u64 = 128;
const LONG_BYTES: usize = 16 << 10;

fn config(dir: &std::path::Path) -> StoreConfig {
    StoreConfig {
        dir: dir.join("shard"),
        segment_bytes: 16 << 20,
        block_bytes_max: 256 << 10,
        flush_bytes_min: 256 << 10,
        cache_bytes: 32 << 20,
        read_ahead_bytes: 1 << 20,
        disk_reserve_bytes: 0,
        memory_bytes: MEMORY_BYTES,
        ..StoreConfig::default()
    }
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the status of this process");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line of the status");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10
}

/// The highest that was seen of each part, and the process at its largest.
#[derive(Default)]
struct Seen {
    parts: Cell<MemoryFigures>,
    resident: Cell<u64>,
    over: RefCell<Vec<String>>,
}

impl Seen {
    fn look(&self, f: &Fixture) {
        let now = f.store.figures().memory;
        // The last block goes out whatever is held, so that room can come back at all: what it is made of is over the limit
        // for as long as it is written.
        let last_block = 2 * StoreConfig::default().block_bytes_max as u64;
        if MEMORY_BYTES + last_block < now.total() || MEMORY_BYTES / 2 < now.pinned + now.fetched {
            self.over.borrow_mut().push(format!("{now:?} is {}", now.total()));
        }
        let max = self.parts.get();
        self.parts.set(MemoryFigures {
            staged: max.staged.max(now.staged),
            writing: max.writing.max(now.writing),
            cache: max.cache.max(now.cache),
            pinned: max.pinned.max(now.pinned),
            fetched: max.fetched.max(now.fetched),
            bookkeeping: max.bookkeeping.max(now.bookkeeping),
            index: max.index.max(now.index),
            compaction: max.compaction.max(now.compaction),
            ..now
        });
        self.resident.set(self.resident.get().max(resident_bytes()));
    }

    /// As often as tasks run.
    async fn watch(self: Rc<Self>, f: Rc<Fixture>, stop: Rc<Cell<bool>>) {
        while !stop.get() {
            self.look(&f);
            drava_runtime::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Appends in turns, so that no more is staged than a flush or two.
async fn fill(f: &Fixture, slots: &[PartitionSlot], first: u64, payload_bytes: usize) -> u64 {
    let mut seed = first;
    for slot in slots {
        f.append(*slot, seed, 1, payload_bytes);
        seed += 1;
        if 1 << 20 < f.store.staged_bytes() {
            f.flushed((seed - 4) as usize).await;
        }
    }
    f.flushed(seed as usize).await;
    seed
}

#[test]
fn ten_thousand_partitions_and_a_thousand_slow_readers_stay_within_the_budget() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = Rc::new(open(dir.path(), config(dir.path())).await);
        let seen = Rc::new(Seen::default());
        let stop = Rc::new(Cell::new(false));
        let before = resident_bytes();
        let watcher = drava_runtime::spawn(seen.clone().watch(f.clone(), stop.clone()));
        let slots: Vec<_> =
            (1..=PARTITIONS).map(|id| f.store.open_partition(PartitionId(id), PartitionLimits::default())).collect();
        let long = &slots[..LONG as usize];
        let mut seed = 0;
        for slot in long {
            // One partition after the other, so that much of it can be read at once.
            seed = fill(&f, &[*slot; LONG_BATCHES as usize], seed, LONG_BYTES).await;
        }
        for _ in 0..4 {
            seed = fill(&f, &slots[LONG as usize..], seed, 1000).await;
        }

        // One of ten reads the tail, a little of many blocks; the others what left the cache, each from a place of its own.
        // Half of them keep what it has until all have something or wait.
        let let_go = Rc::new(Broadcast::default());
        let reading = Rc::new(Cell::new(READERS));
        let with_something = Rc::new(Cell::new(0));
        let first_answers: Rc<RefCell<BTreeSet<u64>>> = Rc::default();
        for reader in 0..READERS {
            let f = f.clone();
            let tail = reader < READERS / 10;
            let slot =
                if tail { slots[(PARTITIONS - 1 - 97 * reader) as usize] } else { long[(reader % LONG) as usize] };
            let place = (reader / LONG) * (LONG_BATCHES / (READERS / LONG));
            let start = if tail { f.store.span(slot).end_offset - 1 } else { place };
            let keeps = (reader / LONG).is_multiple_of(2);
            let (let_go, reading, with_something) = (let_go.clone(), reading.clone(), with_something.clone());
            let first_answers = first_answers.clone();
            drop(drava_runtime::spawn(async move {
                let mut offset = start;
                let mut batches = Vec::new();
                let end = f.store.span(slot).end_offset.min(start + 16);
                while offset < end {
                    let mut runs: Vec<Run> = Vec::new();
                    let version = let_go.version();
                    let next = f.store.read(slot, offset, 1 << 20, &mut runs).await.expect("read");
                    check_runs(&runs, offset, &mut batches);
                    if first_answers.borrow_mut().insert(reader) {
                        with_something.set(with_something.get() + 1);
                        if keeps && let_go.version() == 0 {
                            let_go.changed(version).await;
                        }
                    }
                    // A client that takes its time.
                    drava_runtime::time::sleep(Duration::from_millis(2)).await;
                    offset = next;
                }
                assert!((end - start) as usize <= batches.len(), "{} of {}", batches.len(), end - start);
                reading.set(reading.get() - 1);
            }));
        }
        // Appending goes on whatever the readers hold, and pushes what they hold out of the cache.
        for _ in 0..4 {
            seed = fill(&f, &slots[LONG as usize..], seed, 1000).await;
        }
        let figures = f.store.figures();
        assert!(MEMORY_BYTES / 4 < figures.memory.pinned + figures.memory.fetched, "readers hold much: {figures:?}");
        assert!(0 < figures.memory.pinned, "some of it left the cache: {figures:?}");
        let_go.notify_all();
        while 0 < reading.get() {
            drava_runtime::time::sleep(Duration::from_millis(1)).await;
        }
        stop.set(true);
        watcher.await;
        assert_eq!(with_something.get(), READERS);
        assert!(seen.over.borrow().is_empty(), "over the budget: {:?}", seen.over.borrow().first());
        let grown = seen.resident.get().saturating_sub(before);
        println!("grown by {} MiB; at most {:?}", grown >> 20, seen.parts.get());
        // The index, the executor and what the allocator keeps come on top.
        assert!(grown < 4 * MEMORY_BYTES, "the process grew by {grown} bytes: {:?}", seen.parts.get());
        f.store.close().await;
    });
}
