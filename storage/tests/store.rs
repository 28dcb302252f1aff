//! The store from outside: append, flush, read, and what is left after the process is gone.

mod common;

use std::time::Duration;

use common::{Fixture, Token, open, run, small};
use drava_protocol::{PartitionId, ShardId};
use drava_storage::{Cached, GlommioIo, IndexDb, PartitionLimits, PartitionSlot, Store, StoreConfig};

fn slots(fixture: &Fixture, count: u64) -> Vec<PartitionSlot> {
    (1..=count).map(|id| fixture.store.open_partition(PartitionId(id), PartitionLimits::default())).collect()
}

#[test]
fn staged_entries_become_durable_then_readable() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        let slot = slots(&f, 1)[0];
        let mut runs = Vec::new();
        f.append(slot, 1, 3, 100);
        assert_eq!(f.store.span(slot).next_offset, 3);
        assert_eq!(f.store.span(slot).end_offset, 0, "staged entries are not readable");
        assert_eq!(f.store.read_cached(slot, 0, 1000, &mut runs), Cached::AtEnd);
        assert!(0 < f.store.staged_bytes());
        f.flushed(1).await;
        assert_eq!(f.store.staged_bytes(), 0);
        assert_eq!(f.store.read_cached(slot, 0, 1000, &mut runs), Cached::Hit { next_offset: 3 });
        assert_eq!(runs.len(), 1);
        f.append(slot, 2, 1, 100);
        f.flushed(2).await;
        assert_eq!(f.read_all(slot, 0).await.0, [(0, 1), (3, 2)]);
        assert_eq!(f.read_all(slot, 2).await.0, [(0, 1), (3, 2)], "a read inside a batch gets the whole batch");
        assert_eq!(f.read_all(slot, 3).await.0, [(3, 2)]);
        f.store.seal().await.unwrap();
        f.store.close().await;
    });
}

#[test]
fn interleaved_ledgers_lie_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        let slots = slots(&f, 3);
        for round in 0..10 {
            for (index, slot) in slots.iter().enumerate() {
                f.append(*slot, round * 3 + index as u64, 2, 50);
            }
        }
        f.flushed(30).await;
        assert_eq!(f.sink.borrow().flushed, (0..30).collect::<Vec<_>>(), "tokens come in append order");
        assert_eq!(f.store.figures().flushes, 1, "all went in one block");
        for (index, slot) in slots.iter().enumerate() {
            let mut runs = Vec::new();
            assert_eq!(f.store.read_cached(*slot, 0, 1 << 20, &mut runs), Cached::Hit { next_offset: 20 });
            assert_eq!(runs.len(), 1, "one extent to a ledger");
            let expected: Vec<_> = (0..10).map(|round| (round * 2, round * 3 + index as u64)).collect();
            assert_eq!(f.read_all(*slot, 0).await.0, expected);
        }
        f.store.close().await;
    });
}

#[test]
fn a_read_takes_whole_batches_up_to_its_limit_and_at_least_one() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        let slot = slots(&f, 1)[0];
        for seed in 0..10 {
            f.append(slot, seed, 1, 1000);
        }
        f.flushed(10).await;
        let mut runs = Vec::new();
        assert_eq!(f.store.read_cached(slot, 4, 1, &mut runs), Cached::Hit { next_offset: 5 });
        runs.clear();
        assert_eq!(f.store.read_cached(slot, 4, 2500, &mut runs), Cached::Hit { next_offset: 6 });
        runs.clear();
        assert_eq!(f.store.read_cached(slot, 0, 1 << 20, &mut runs), Cached::Hit { next_offset: 10 });
        f.store.close().await;
    });
}

#[test]
fn every_acked_entry_survives_a_stop_without_seal() {
    let dir = tempfile::tempdir().unwrap();
    let acked = run(async {
        let f = open(dir.path(), small(dir.path())).await;
        let slots = slots(&f, 5);
        for seed in 0..500u64 {
            f.append(slots[(seed % 5) as usize], seed, 1 + (seed % 3) as u32, 3000);
            if seed % 20 == 0 {
                drava_runtime::time::sleep(Duration::from_millis(1)).await;
            }
        }
        f.flushed(400).await;
        f.store.close().await;
        f.sink.take().flushed.len()
    });
    assert!(400 <= acked);
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        assert!(f.recovered.damaged.is_empty(), "{:?}", f.recovered.damaged);
        let slots = slots(&f, 5);
        let mut seen = Vec::new();
        for slot in &slots {
            let (batches, damaged) = f.read_all(*slot, 0).await;
            assert!(damaged.is_empty());
            assert!(batches.is_sorted());
            seen.extend(batches.iter().map(|(_, seed)| *seed));
            assert_eq!(f.store.span(*slot).next_offset, f.store.span(*slot).end_offset);
        }
        seen.sort_unstable();
        assert!(acked <= seen.len());
        assert_eq!(seen, (0..seen.len() as u64).collect::<Vec<_>>(), "without a gap in the order of appending");
        // And it goes on behind them.
        let before = f.store.span(slots[0]).end_offset;
        assert_eq!(f.append(slots[0], 1000, 1, 10), before);
        f.flushed(1).await;
        assert_eq!(f.read_all(slots[0], before).await.0, [(before, 1000)]);
        f.store.close().await;
    });
}

#[test]
fn replay_gives_the_batches_behind_the_covered_position() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        let slot = slots(&f, 1)[0];
        f.sink.borrow_mut().state.push((PartitionId(1), b"producer".to_vec(), b"5".to_vec()));
        f.append(slot, 5, 2, 10);
        f.flushed(1).await;
        f.store.append_state(slot, b"cursor/a", Some(b"1"), Some(77)).unwrap();
        f.flushed(2).await;
        f.store.seal().await.unwrap();
        assert!(f.store.append_state(slot, b"late", Some(b"1"), None).is_err());
        f.store.close().await;
    });
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        assert_eq!(f.recovered.replayed_blocks, 0, "sealed");
        let slot = slots(&f, 1)[0];
        let p = &f.recovered.partitions[0];
        assert_eq!((p.start_offset, p.end_offset), (0, 2));
        assert_eq!(p.state, [(b"cursor/a".to_vec(), b"1".to_vec()), (b"producer".to_vec(), b"5".to_vec())]);
        f.append(slot, 7, 3, 10);
        f.store.append_state(slot, b"cursor/a", Some(b"2"), None).unwrap();
        f.store.append_state(slot, b"cursor/b", Some(b"x"), None).unwrap();
        f.store.append_state(slot, b"cursor/b", None, Some(78)).unwrap();
        f.flushed(2).await;
        f.store.close().await;
    });
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        assert!(0 < f.recovered.replayed_blocks);
        let p = &f.recovered.partitions[0];
        assert_eq!((p.start_offset, p.end_offset), (0, 5));
        assert_eq!(p.state, [(b"cursor/a".to_vec(), b"2".to_vec()), (b"producer".to_vec(), b"5".to_vec())]);
        let replayed: Vec<_> = p.replayed.iter().map(|b| (b.base_offset, b.record_count, b.base_sequence)).collect();
        assert_eq!(replayed, [(2, 3, 7)]);
        assert_eq!(f.read_all(slots(&f, 1)[0], 0).await.0, [(0, 5), (2, 7)]);
        f.store.close().await;
    });
}

/// Killed before its index is durable, again and again, a node would have more to replay at each start.
#[test]
fn what_took_long_to_replay_is_not_replayed_again() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        let slot = slots(&f, 1)[0];
        for seed in 0..50 {
            f.append(slot, seed, 1, 8000);
        }
        f.flushed(50).await;
        f.store.close().await;
    });
    let replayed_bytes = |index_flush_bytes| {
        run(async {
            let config = StoreConfig { index_flush_bytes, ..small(dir.path()) };
            let index = IndexDb::open(&dir.path().join("index"), 1).unwrap();
            let opened = Store::<_, Token>::open(GlommioIo::new(), config, index.shard(ShardId(0))).await;
            // It is not started: nothing is made durable later.
            let (store, recovered) = opened.unwrap();
            assert_eq!(recovered.partitions[0].end_offset, 50);
            store.close().await;
            recovered.replayed_bytes
        })
    };
    let all = replayed_bytes(1 << 20);
    assert!(50 * 8000 < all);
    assert_eq!(replayed_bytes(1 << 20), all, "that little is left to the first batch");
    assert_eq!(replayed_bytes(all), all);
    assert_eq!(replayed_bytes(all), 0);
}

#[test]
fn what_left_the_cache_is_read_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let config = StoreConfig { cache_bytes: 100_000, ..small(dir.path()) };
        let f = open(dir.path(), config).await;
        let slots = slots(&f, 2);
        for seed in 0..2000u64 {
            f.append(slots[(seed % 2) as usize], seed, 1, 2000);
            if seed % 16 == 0 {
                f.flushed(seed as usize).await;
            }
        }
        f.flushed(2000).await;
        let mut runs = Vec::new();
        assert_eq!(f.store.read_cached(slots[0], 0, 1000, &mut runs), Cached::Miss);
        for (index, slot) in slots.iter().enumerate() {
            for from in [0, 1, 500, 999] {
                let (batches, damaged) = f.read_all(*slot, from).await;
                assert!(damaged.is_empty(), "{damaged:?}");
                let expected: Vec<_> = (from..1000).map(|offset| (offset, offset * 2 + index as u64)).collect();
                assert_eq!(batches, expected);
            }
        }
        assert!(0 < f.store.figures().disk_read_bytes);
        assert!(2 <= f.store.figures().segments);
        f.store.close().await;
    });
}

#[test]
fn a_partition_without_cache_leaves_it_to_the_others() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f =
            open(dir.path(), StoreConfig { segment_bytes: 4 << 20, block_bytes_max: 256 << 10, ..small(dir.path()) })
                .await;
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
        // All of it can be read.
        for slot in [none, some] {
            assert_eq!(f.read_all(slot, 0).await.0.len(), 200);
        }
        f.store.close().await;
    });
}
