//! What the scrubber finds, who hears of it, and when it is forgotten.

mod common;

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use common::{Fixture, flip, items, open, run, small};
use drava_protocol::PartitionId;
use drava_storage::dump::ItemKind;
use drava_storage::{Damage, FoundBy, PartitionLimits, PartitionSlot, StoreConfig};

const PARTITIONS: u64 = 2;

/// A store that scrubs all the time.
fn eager(dir: &Path) -> StoreConfig {
    StoreConfig { scrub_bytes_per_s: 1 << 30, scrub_interval: Duration::from_millis(5), ..small(dir) }
}

fn lazy(dir: &Path) -> StoreConfig {
    StoreConfig { scrub_bytes_per_s: 0, ..small(dir) }
}

fn slots(f: &Fixture, limits: PartitionLimits) -> Vec<PartitionSlot> {
    (1..=PARTITIONS).map(|id| f.store.open_partition(PartitionId(id), limits)).collect()
}

/// Writes some segments: batches of two messages, the partitions in turns.
async fn write(f: &Fixture, slots: &[PartitionSlot], batches: u64) {
    let before = f.sink.borrow().flushed.len();
    for seed in 0..batches {
        f.append(slots[(seed % PARTITIONS) as usize], seed, 2, 2000);
        if seed % 8 == 7 {
            f.flushed(before + seed as usize + 1).await;
        }
    }
    f.flushed(before + batches as usize).await;
}

fn prepare(dir: &Path) {
    run(async {
        let f = open(dir, lazy(dir)).await;
        let slots = slots(&f, PartitionLimits::default());
        write(&f, &slots, 800).await;
        f.store.seal().await.unwrap();
        f.store.close().await;
    });
}

async fn scrubbed(f: &Fixture) {
    let passes = f.store.figures().scrub_passes;
    // One may be under way that is past the place in question.
    while f.store.figures().scrub_passes < passes + 2 {
        drava_runtime::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Partition, offsets, and who found it, of every entry.
fn messages(damage: &[Damage]) -> Vec<(u64, Range<u64>, FoundBy)> {
    let known = damage.iter().filter_map(|damage| Some((damage.messages.as_ref()?, damage.found_by)));
    known.map(|(messages, found_by)| (messages.partition.0, messages.offsets.clone(), found_by)).collect()
}

/// The places of all batches of a partition, with the offsets of the first and the one after the last message.
fn batches(dir: &Path, partition: u64) -> Vec<(std::path::PathBuf, u64, Range<u64>)> {
    let mut found = Vec::new();
    for path in common::segment_files(dir) {
        let mut ours = false;
        for item in drava_storage::dump::segment(&path).unwrap() {
            let item = item.unwrap();
            match item.kind {
                ItemKind::Extent(header) => ours = header.ledger.partition.0 == partition,
                ItemKind::Batch { header, .. } if ours => {
                    let offsets = header.base_offset..header.base_offset + u64::from(header.record_count);
                    found.push((path.clone(), item.position, offsets));
                }
                _ => {}
            }
        }
    }
    found.sort_by_key(|(_, _, offsets)| offsets.start);
    found
}

#[test]
fn flipped_bytes_in_sealed_segments_are_found_and_named_until_their_messages_go() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    run(async {
        let f = open(dir, eager(dir)).await;
        slots(&f, PartitionLimits::default());
        scrubbed(&f).await;
        assert_eq!(f.store.damage(), [], "a good store");
        let figures = f.store.figures();
        assert!(2 << 20 < figures.scrubbed_bytes, "{figures:?}");
        f.store.close().await;
    });
    // In the payload of one batch; in the offset of another, which only the block's checksum covers.
    let [first, second] = [batches(dir, 1)[100].clone(), batches(dir, 2)[150].clone()];
    flip(&first.0, first.1 + 500);
    flip(&second.0, second.1);
    let expected = [(1, first.2, FoundBy::Scrub), (2, second.2, FoundBy::Scrub)];
    run(async {
        let f = open(dir, eager(dir)).await;
        let slots = slots(&f, PartitionLimits::default());
        scrubbed(&f).await;
        assert_eq!(messages(&f.store.damage()), expected);
        let place = f.store.damage()[0].place.clone().expect("it is known where");
        assert_eq!(
            drava_storage::segment::path(&dir.join("shard"), drava_storage::segment::SegmentId(place.segment)),
            first.0
        );
        assert!(place.positions.contains(&first.1), "{place:?}");
        let figures = f.store.figures();
        assert_eq!((figures.damaged_ranges, figures.damaged_messages), (2, 4));
        for (slot, (_, offsets, _)) in slots.iter().zip(&expected) {
            let (read, damaged) = f.read_all(*slot, 0).await;
            assert_eq!(damaged, [offsets.clone()]);
            assert_eq!(read.len(), 399, "everything else is served");
        }
        assert_eq!(messages(&f.store.damage()), expected, "known already");
        f.store.seal().await.unwrap();
        f.store.close().await;
    });
    run(async {
        let f = open(dir, lazy(dir)).await;
        assert_eq!(messages(&f.store.damage()), expected, "after a restart, without a scrub");
        let limits = PartitionLimits { retention_age: Some(Duration::from_secs(1)), ..PartitionLimits::default() };
        let slots = slots(&f, limits);
        for slot in slots {
            // A new ledger, so that the old one is closed and old.
            f.append_at(slot, 1, 1, 10, 1_000_000 + 3_700_000);
        }
        while f.store.figures().damaged_ranges != 0 {
            drava_runtime::time::sleep(Duration::from_millis(5)).await;
        }
        f.store.seal().await.unwrap();
        f.store.close().await;
    });
    run(async {
        let f = open(dir, lazy(dir)).await;
        assert_eq!(f.store.damage(), [], "gone for good");
        f.store.close().await;
    });
}

#[test]
fn a_reader_that_meets_damage_reports_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    let (path, position, offsets) = batches(dir, 1)[50].clone();
    flip(&path, position + 500);
    run(async {
        let f = open(dir, lazy(dir)).await;
        let slots = slots(&f, PartitionLimits::default());
        assert_eq!(f.store.damage(), []);
        assert_eq!(f.read_all(slots[0], 0).await.1, [offsets.clone()]);
        assert_eq!(messages(&f.store.damage()), [(1, offsets, FoundBy::Read)]);
        f.store.close().await;
    });
}

#[test]
fn what_recovery_skips_is_listed_with_the_messages_that_it_cost() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run(async {
        let f = open(dir, lazy(dir)).await;
        let slot = f.store.open_partition(PartitionId(1), PartitionLimits::default());
        for seed in 0..6 {
            f.append(slot, seed, 1, 100);
            f.flushed(seed as usize + 1).await;
        }
        f.store.close().await;
    });
    // The header of the extent: nothing in the block says any more whose messages these were.
    let (path, position) = items(dir, |kind| matches!(kind, ItemKind::Block(_)))[2].clone();
    flip(&path, position + 64 + 9);
    run(async {
        let f = open(dir, lazy(dir)).await;
        while messages(&f.store.damage()).is_empty() {
            drava_runtime::time::sleep(Duration::from_millis(1)).await;
        }
        let damage = f.store.damage();
        assert_eq!(messages(&damage), [(1, 2..3, FoundBy::Recovery)]);
        assert_eq!(damage.len(), 1, "the place needs no entry of its own: {damage:?}");
        assert_eq!(damage[0].place.as_ref().map(|place| place.positions.start), Some(position));
        f.store.close().await;
    });
}

#[test]
fn a_segment_that_is_gone_and_a_bad_dead_block_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    let of_two = batches(dir, 2);
    let (path, ..) = of_two[150].clone();
    let lost: Vec<_> =
        of_two.iter().filter(|(found, ..)| *found == path).map(|(_, _, offsets)| offsets.clone()).collect();
    // Of one partition everything is deleted; its extents lie beside those of the other.
    let dead = batches(dir, 1)[10].clone();
    flip(&dead.0, dead.1 + 500);
    assert_ne!(dead.0, path);
    std::fs::remove_file(&path).unwrap();
    run(async {
        let f = open(dir, eager(dir)).await;
        let slots = slots(&f, PartitionLimits::default());
        f.store.delete_partition(slots[0]).await.unwrap();
        scrubbed(&f).await;
        while f.store.damage().iter().any(|damage| damage.messages.as_ref().is_some_and(|m| m.partition.0 == 1)) {
            drava_runtime::time::sleep(Duration::from_millis(1)).await;
        }
        let expected = lost[0].start..lost[lost.len() - 1].end;
        assert_eq!(messages(&f.store.damage()), [(2, expected.clone(), FoundBy::Scrub)]);
        assert_eq!(
            f.read_all(slots[1], 0).await.1.iter().map(|range| range.end - range.start).sum::<u64>(),
            expected.end - expected.start
        );
        f.store.close().await;
    });
}

#[test]
fn a_pass_goes_on_after_a_restart_and_no_pass_is_begun_early() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    // Slow enough not to come to its end here.
    let slow = StoreConfig { scrub_bytes_per_s: 4 << 20, ..small(dir) };
    let mut segments = 0;
    run(async {
        let f = open(dir, slow).await;
        segments = f.store.figures().segments;
        while f.store.figures().scrubbed_bytes < 2 << 20 {
            drava_runtime::time::sleep(Duration::from_millis(1)).await;
        }
        f.store.seal().await.unwrap();
        f.store.close().await;
    });
    let quick = StoreConfig { scrub_bytes_per_s: 1 << 30, ..small(dir) };
    for life in 0..2 {
        run(async {
            let f = open(dir, quick.clone()).await;
            while life == 0 && f.store.figures().scrub_passes == 0 {
                drava_runtime::time::sleep(Duration::from_millis(1)).await;
            }
            drava_runtime::time::sleep(Duration::from_millis(20)).await;
            let figures = f.store.figures();
            let bytes_max = [(segments - 1) << 20, 0][life];
            assert!(figures.scrubbed_bytes < bytes_max.max(1), "life {life}, {segments} segments: {figures:?}");
            assert_eq!(figures.scrub_passes, 1 - life as u64, "the next is due in a week");
            f.store.seal().await.unwrap();
            f.store.close().await;
        });
    }
}
