//! What is deleted, what is kept, and that room comes back.

mod common;

use std::time::Duration;

use common::{Fixture, open, run, small};
use drava_protocol::PartitionId;
use drava_storage::{PartitionLimits, ReadError, StoreConfig};

const KEEP: PartitionLimits =
    PartitionLimits { retention_age: None, retention_bytes: Some(2 << 20), cache_bytes: None, trim_consumed: false };

fn config(dir: &std::path::Path) -> StoreConfig {
    StoreConfig { index_flush_bytes: 1 << 20, ..small(dir) }
}

async fn fill(f: &Fixture, slot: drava_storage::PartitionSlot, seeds: std::ops::Range<u64>) {
    let already = f.sink.borrow().flushed.len();
    for seed in seeds.clone() {
        f.append(slot, seed, 1, 8000);
        if seed % 4 == 0 {
            f.flushed(already + (seed - seeds.start) as usize).await;
        }
    }
    f.flushed(already + (seeds.end - seeds.start) as usize).await;
}

async fn until(what: impl Fn() -> bool) {
    while !what() {
        drava_runtime::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn deleted_ledgers_give_their_segments_back_and_nothing_is_misread() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), config(dir.path())).await;
        let slot = f.store.open_partition(PartitionId(1), KEEP);
        let quiet = f.store.open_partition(PartitionId(2), PartitionLimits::default());
        f.append(quiet, 7, 1, 100);
        f.flushed(1).await;
        let mut seed = 0;
        while f.store.figures().segments_recycled < 4 {
            fill(&f, slot, seed..seed + 250).await;
            seed += 250;
            until(|| f.store.span(slot).stored_bytes <= 3 << 20).await;
        }
        let span = f.store.span(slot);
        assert!(0 < span.start_offset && span.end_offset == seed);
        assert!(0 < f.store.figures().ledgers_deleted);
        assert!(f.store.figures().segments < 12, "{:?}", f.store.figures());
        let (batches, damaged) = f.read_all(slot, span.start_offset).await;
        assert!(damaged.is_empty(), "{damaged:?}");
        assert_eq!(batches, (span.start_offset..seed).map(|offset| (offset, offset)).collect::<Vec<_>>());
        let read = f.store.read(slot, 0, 1000, &mut Vec::new()).await;
        assert!(
            matches!(read, Err(ReadError::Trimmed { offset: 0, start_offset }) if start_offset == span.start_offset)
        );
        assert_eq!(f.read_all(quiet, 0).await.0, [(0, 7)]);
        f.store.close().await;
    });
    run(async {
        let f = open(dir.path(), config(dir.path())).await;
        assert!(f.recovered.damaged.is_empty(), "{:?}", f.recovered.damaged);
        let slot = f.store.open_partition(PartitionId(1), KEEP);
        let span = f.store.span(slot);
        assert!(0 < span.start_offset, "what was deleted stays deleted");
        let (batches, damaged) = f.read_all(slot, span.start_offset).await;
        assert!(damaged.is_empty(), "{damaged:?}");
        assert_eq!(batches.len() as u64, span.end_offset - span.start_offset);
        let quiet = f.store.open_partition(PartitionId(2), PartitionLimits::default());
        assert_eq!(f.read_all(quiet, 0).await.0, [(0, 7)], "a quiet partition keeps its segment");
        f.store.close().await;
    });
}

#[test]
fn the_floor_holds_what_retention_would_delete() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), config(dir.path())).await;
        let held = f.store.open_partition(PartitionId(1), KEEP);
        let free = f.store.open_partition(PartitionId(2), KEEP);
        f.store.set_floor(held, Some(0));
        fill(&f, held, 0..500).await;
        fill(&f, free, 500..1000).await;
        until(|| 0 < f.store.span(free).start_offset).await;
        assert_eq!(f.store.span(held).start_offset, 0);
        f.store.set_floor(held, Some(300));
        until(|| 0 < f.store.span(held).start_offset).await;
        assert!(f.store.span(held).start_offset <= 300);
        f.store.close().await;
    });
}

#[test]
fn what_every_cursor_has_passed_goes_without_other_limits() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let limits = PartitionLimits { trim_consumed: true, ..PartitionLimits::default() };
        let f = open(dir.path(), StoreConfig { ledger_bytes_max: 1 << 20, ..config(dir.path()) }).await;
        let slot = f.store.open_partition(PartitionId(1), limits);
        let unread = f.store.open_partition(PartitionId(2), limits);
        fill(&f, slot, 0..600).await;
        fill(&f, unread, 600..1200).await;
        f.store.set_floor(slot, Some(400));
        until(|| 300 < f.store.span(slot).start_offset).await;
        assert!(f.store.span(slot).start_offset <= 400);
        assert_eq!(f.store.span(unread).start_offset, 0, "no cursor, nothing consumed");
        let (batches, damaged) = f.read_all(slot, f.store.span(slot).start_offset).await;
        assert!(damaged.is_empty(), "{damaged:?}");
        assert_eq!(batches.last(), Some(&(599, 599)));
        f.store.close().await;
    });
}

#[test]
fn a_deleted_partition_is_gone_with_its_state() {
    let dir = tempfile::tempdir().unwrap();
    for sealed in [false, true] {
        run(async {
            let f = open(dir.path(), config(dir.path())).await;
            let gone = f.store.open_partition(PartitionId(10 + u64::from(sealed)), PartitionLimits::default());
            let kept = f.store.open_partition(PartitionId(1), PartitionLimits::default());
            f.append(kept, 1, 1, 10);
            fill(&f, gone, 0..100).await;
            f.store.append_state(gone, b"cursor", Some(b"1"), None).unwrap();
            f.store.delete_partition(gone).await.unwrap();
            assert!(matches!(f.store.read(gone, 0, 10, &mut Vec::new()).await, Err(ReadError::Deleted)));
            if sealed {
                f.store.seal().await.unwrap();
                let live = f.store.figures().live_bytes;
                assert!(live < 2000, "{live} bytes are live");
            }
            f.store.close().await;
        });
        run(async {
            let f = open(dir.path(), config(dir.path())).await;
            let ids: Vec<_> = f.recovered.partitions.iter().map(|p| p.partition.0).collect();
            assert_eq!(ids, [1]);
            f.store.close().await;
        });
    }
}

#[test]
fn a_time_is_found_in_memory_and_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let config = StoreConfig { cache_bytes: 50_000, ledger_bytes_max: 1 << 20, ..config(dir.path()) };
        let f = open(dir.path(), config).await;
        let slot = f.store.open_partition(PartitionId(1), PartitionLimits::default());
        for seed in 0..400u64 {
            f.append_at(slot, seed, 2, 3000, 1000 + seed * 10);
            if seed % 3 == 0 {
                f.flushed(seed as usize).await;
            }
        }
        f.flushed(400).await;
        f.store.seal().await.unwrap();
        for (time_ms, offset) in [(0, 0), (1000, 0), (1001, 2), (1010, 2), (2000, 200), (4990, 798), (4991, 800)] {
            assert_eq!(f.store.locate_time(slot, time_ms).await.unwrap(), offset, "at {time_ms}");
        }
        f.store.close().await;
    });
}
