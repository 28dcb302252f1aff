//! A full disk: entries are refused, everything else goes on, and entries are taken again by themselves.

mod common;

use std::time::Duration;

use common::{FaultyIo, Fixture, open, open_with, run, small};
use drava_protocol::PartitionId;
use drava_storage::{AppendError, PartitionLimits, PartitionSlot, StoreConfig};

const RESERVE: u64 = 8 << 20;

fn config(dir: &std::path::Path) -> StoreConfig {
    StoreConfig { segments_spare: 0, disk_reserve_bytes: RESERVE, ..small(dir) }
}

/// Appends until the store says that it is full.
async fn fill(f: &Fixture<FaultyIo>, slot: PartitionSlot) -> u64 {
    let mut count = 0;
    for _ in 0..10_000 {
        let seed = f.store.span(slot).next_offset;
        match f.try_append(slot, seed, 1, 8000, 1_000_000) {
            Ok(_) => count += 1,
            Err(AppendError::Full) => return count,
            Err(error) => panic!("{error}"),
        }
        if seed.is_multiple_of(4) {
            drava_runtime::time::sleep(Duration::from_micros(200)).await;
        }
    }
    panic!("the disk is never full");
}

#[test]
fn a_full_disk_refuses_entries_takes_rows_and_recovers_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let io = FaultyIo::new();
        io.free_bytes.set(Some(RESERVE + (3 << 20)));
        let f = open_with(io.clone(), dir.path(), config(dir.path())).await;
        let slot = f.store.open_partition(PartitionId(1), PartitionLimits::default());
        // One byte less than a segment above the reserve: none is made.
        io.free_bytes.set(Some(RESERVE + (1 << 20) - 1));
        let mut count = 0;
        loop {
            let more = fill(&f, slot).await;
            count += more;
            f.flushed(count as usize).await;
            // What is in flight is counted with some to spare.
            if more == 0 {
                break;
            }
        }
        assert!(f.sink.borrow().failed.is_empty());
        assert_eq!(f.store.figures().segments, 1);
        assert!(!f.store.is_read_only());
        for row in 0..16u64 {
            f.store.append_state(slot, b"cursor", Some(&row.to_le_bytes()), Some(row)).unwrap();
            f.flushed((count + row) as usize + 1).await;
        }
        assert_eq!(f.read_all(slot, 0).await.0.len() as u64, count);
        assert!(matches!(f.try_append(slot, count, 1, 8000, 1), Err(AppendError::Full)), "rows do not make room");
        io.free_bytes.set(Some(RESERVE + (1 << 20)));
        while matches!(f.try_append(slot, count, 1, 8000, 1_000_000), Err(AppendError::Full)) {
            drava_runtime::time::sleep(Duration::from_millis(10)).await;
        }
        f.flushed(count as usize + 17).await;
        f.store.close().await;
    });
    run(async {
        let f = open(dir.path(), config(dir.path())).await;
        assert!(f.recovered.damaged.is_empty(), "{:?}", f.recovered.damaged);
        assert_eq!(f.recovered.partitions[0].state, [(b"cursor".to_vec(), 15u64.to_le_bytes().to_vec())]);
        f.store.close().await;
    });
}

#[test]
fn on_a_full_disk_deleted_entries_make_room_for_new_ones() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let io = FaultyIo::new();
        let f = open_with(io.clone(), dir.path(), config(dir.path())).await;
        let keep = PartitionLimits { retention_bytes: Some(1 << 20), ..PartitionLimits::default() };
        let slot = f.store.open_partition(PartitionId(1), keep);
        let other = f.store.open_partition(PartitionId(2), PartitionLimits::default());
        f.store.append_state(other, b"cursor", Some(b"early"), None).unwrap();
        // Room for a few segments, whatever is used of them.
        let mut appended = 0;
        while f.store.figures().segments < 3 {
            appended += 1;
            f.append(slot, appended, 1, 8000);
            f.flushed(appended as usize).await;
        }
        io.free_bytes.set(Some(RESERVE));
        let mut full = 0;
        while f.store.figures().segments_recycled < 4 {
            full += u64::from(0 < fill(&f, slot).await);
            drava_runtime::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(1 < full, "it was full more than once");
        assert!(f.store.figures().segments + f.store.figures().segments_spare <= 5, "{:?}", f.store.figures());
        f.store.close().await;
    });
    // The checkpoints that made this possible have what a rebuild needs.
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    run(async {
        let f = open(dir.path(), config(dir.path())).await;
        assert_eq!(f.recovered.partitions[1].state, [(b"cursor".to_vec(), b"early".to_vec())]);
        let slot = f.store.open_partition(PartitionId(1), PartitionLimits::default());
        let span = f.store.span(slot);
        assert_eq!(f.read_all(slot, span.start_offset).await.1, vec![]);
        f.store.close().await;
    });
}

/// A deletion needs a little of the room that rows leave.
#[test]
fn a_partition_can_be_deleted_when_there_is_no_room_for_rows() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let io = FaultyIo::new();
        let f = open_with(io.clone(), dir.path(), config(dir.path())).await;
        let slot = f.store.open_partition(PartitionId(1), PartitionLimits::default());
        let other = f.store.open_partition(PartitionId(2), PartitionLimits::default());
        io.free_bytes.set(Some(0));
        let count = fill(&f, slot).await;
        f.flushed(count as usize).await;
        let mut rows = 0;
        while f.store.append_state(other, b"cursor", Some(&[7; 3000]), Some(0)).is_ok() {
            rows += 1;
            f.flushed((count + rows) as usize).await;
        }
        assert!(0 < rows);
        f.store.delete_partition(slot).await.unwrap();
        f.store.close().await;
    });
}
