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
use drava_storage::{Cached, MemoryFigures, PartitionLimits, PartitionSlot, Run, StoreConfig};

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
        if MEMORY_BYTES < now.total() || MEMORY_BYTES / 2 < now.pinned + now.fetched {
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
        for _ in 0..LONG_BATCHES {
            seed = fill(&f, long, seed, LONG_BYTES).await;
        }
        for _ in 0..4 {
            seed = fill(&f, &slots[LONG as usize..], seed, 1000).await;
        }

        // Nine of ten read what left the cache, each from a place of its own; one of ten the tail, a little of many
        // blocks. Every second keeps what it has until all have something or wait.
        let let_go = Rc::new(Broadcast::default());
        let reading = Rc::new(Cell::new(READERS));
        let with_something = Rc::new(Cell::new(0));
        let first_answers: Rc<RefCell<BTreeSet<u64>>> = Rc::default();
        for reader in 0..READERS {
            let f = f.clone();
            let tail = reader % 10 == 0;
            let slot =
                if tail { slots[(PARTITIONS - READERS + reader) as usize] } else { long[(reader % LONG) as usize] };
            let start = if tail { 0 } else { (reader / LONG) * (LONG_BATCHES / (READERS / LONG)) };
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
                        if reader % 2 == 0 && let_go.version() == 0 {
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
        assert!(0 < reading.get(), "some wait");
        let figures = f.store.figures();
        assert!(MEMORY_BYTES / 4 < figures.memory.pinned + figures.memory.fetched, "readers hold much: {figures:?}");
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
        assert!(grown < 3 * MEMORY_BYTES, "the process grew by {grown} bytes: {:?}", seen.parts.get());
        f.store.close().await;
    });
}

#[test]
fn a_partition_without_cache_leaves_it_to_the_others() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), StoreConfig { cache_bytes: 1 << 20, ..config(dir.path()) }).await;
        let limits = |cache_bytes| PartitionLimits { cache_bytes, ..PartitionLimits::default() };
        let kept = f.store.open_partition(PartitionId(1), limits(None));
        let none = f.store.open_partition(PartitionId(2), limits(Some(0)));
        let some = f.store.open_partition(PartitionId(3), limits(Some(100_000)));
        let first = f.append(kept, 0, 1, 10_000);
        f.flushed(1).await;
        // Far more than the cache has.
        for seed in 1..=400u64 {
            f.append(if seed % 2 == 0 { none } else { some }, seed, 1, 10_000);
            f.flushed(seed as usize + 1).await;
        }
        let mut runs = Vec::new();
        assert!(matches!(f.store.read_cached(kept, first, 1 << 20, &mut runs), Cached::Hit { .. }));
        assert_eq!(f.store.read_cached(none, 199, 1 << 20, &mut runs), Cached::Miss);
        assert!(matches!(f.store.read_cached(some, 199, 1 << 20, &mut runs), Cached::Hit { .. }));
        assert_eq!(f.store.read_cached(some, 180, 1 << 20, &mut runs), Cached::Miss);
        runs.clear();
        let cached = f.store.figures().memory.cache;
        assert!((100_000..150_000).contains(&cached), "one block of `kept` and those of `some`: {cached}");
        // All of it can be read, and one flush that two partitions share serves both while one of them wants it.
        for slot in [none, some] {
            assert_eq!(f.read_all(slot, 0).await.0.len(), 200);
        }
        f.append(none, 401, 1, 1000);
        f.append(kept, 402, 1, 1000);
        f.flushed(403).await;
        assert!(matches!(f.store.read_cached(none, 200, 1 << 20, &mut runs), Cached::Hit { .. } | Cached::Miss));
        f.store.close().await;
    });
}
