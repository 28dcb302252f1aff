//! The index is lost and made anew from the journal, after all that a journal goes through.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use common::{Fixture, items, open, random, run, small};
use drava_protocol::PartitionId;
use drava_storage::dump::ItemKind;
use drava_storage::verify::verify;
use drava_storage::{PartitionLimits, PartitionSlot, Recovered, StoreConfig};

const KEEP: PartitionLimits = PartitionLimits { retention_age: None, retention_bytes: Some(2 << 20), ..FOR_EVER };
const FOR_EVER: PartitionLimits =
    PartitionLimits { retention_age: None, retention_bytes: None, trim_consumed: false, cache_bytes: None };

fn config(dir: &Path) -> StoreConfig {
    StoreConfig { index_flush_bytes: 512 << 10, ..small(dir) }
}

type Rows = Vec<(Vec<u8>, Vec<u8>)>;

/// Offsets and rows of all partitions.
fn found(recovered: &Recovered) -> Vec<(PartitionId, u64, u64, Rows)> {
    let partitions = recovered.partitions.iter();
    partitions.map(|p| (p.partition, p.start_offset, p.end_offset, p.state.clone())).collect()
}

async fn fill(f: &Fixture, slot: PartitionSlot, count: u64) {
    let already = f.sink.borrow().flushed.len();
    for index in 0..count {
        let seed = f.store.span(slot).next_offset;
        f.append(slot, seed, 1, 8000);
        if index % 4 == 0 {
            f.flushed(already + index as usize).await;
        }
    }
    f.flushed(already + count as usize).await;
}

async fn until(what: impl Fn() -> bool) {
    while !what() {
        drava_runtime::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Puts or deletes a row and waits until it is durable.
async fn put(f: &Fixture, slot: PartitionSlot, key: &str, value: Option<&str>) {
    let already = f.sink.borrow().flushed.len();
    f.store.append_state(slot, key.as_bytes(), value.map(str::as_bytes), Some(0)).unwrap();
    f.flushed(already + 1).await;
}

#[test]
fn rows_and_partitions_of_segments_that_are_gone_come_back() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), config(dir.path())).await;
        let busy = f.store.open_partition(PartitionId(1), KEEP);
        let quiet = f.store.open_partition(PartitionId(2), FOR_EVER);
        let dropped = f.store.open_partition(PartitionId(3), FOR_EVER);
        f.append(quiet, 0, 1, 100);
        f.append(dropped, 0, 1, 100);
        fill(&f, busy, 150).await;
        // These are in a segment that holds nothing which is kept.
        put(&f, quiet, "cursor/kept", Some("early")).await;
        put(&f, quiet, "cursor/changed", Some("early")).await;
        put(&f, quiet, "cursor/deleted", Some("early")).await;
        f.sink.borrow_mut().state.push((PartitionId(2), b"producer".to_vec(), b"derived".to_vec()));
        fill(&f, busy, 150).await;
        f.store.delete_partition(dropped).await.unwrap();
        while f.store.figures().segments_recycled < 6 {
            fill(&f, busy, 200).await;
            until(|| f.store.span(busy).stored_bytes <= 3 << 20).await;
        }
        put(&f, quiet, "cursor/changed", Some("late")).await;
        put(&f, quiet, "cursor/deleted", None).await;
        f.append(quiet, 1, 1, 100);
        fill(&f, busy, 50).await;
        f.store.seal().await.unwrap();
        f.store.close().await;
    });
    let mut before = None;
    for lose in [false, true, false, true] {
        if lose {
            std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        }
        run(async {
            let f = open(dir.path(), config(dir.path())).await;
            assert_eq!(f.recovered.index_rebuilt, lose);
            assert!(f.recovered.damaged.is_empty(), "{:?}", f.recovered.damaged);
            let found = found(&f.recovered);
            let quiet = f.store.open_partition(PartitionId(2), FOR_EVER);
            let busy = f.store.open_partition(PartitionId(1), FOR_EVER);
            let start_offset = f.store.span(busy).start_offset;
            assert!(0 < start_offset);
            let (batches, damaged) = f.read_all(busy, start_offset).await;
            assert!(damaged.is_empty(), "{damaged:?}");
            assert_eq!(f.read_all(quiet, 0).await, (vec![(0, 0), (1, 1)], vec![]));
            assert_eq!(found.len(), 2, "a deleted partition stays deleted");
            let rows: BTreeMap<_, _> = found[1].3.iter().cloned().collect();
            assert_eq!(rows.get(&b"cursor/kept"[..]).map(Vec::as_slice), Some(&b"early"[..]));
            assert_eq!(rows.get(&b"cursor/changed"[..]).map(Vec::as_slice), Some(&b"late"[..]));
            assert_eq!(rows.get(&b"producer"[..]).map(Vec::as_slice), Some(&b"derived"[..]));
            assert_eq!(rows.len(), 3, "a deleted row stays deleted");
            if let Some(rebuilt) = &f.recovered.rebuilt {
                assert_eq!((rebuilt.partitions, rebuilt.state_rows, rebuilt.missing.len()), (2, 3, 0));
            }
            let figures = f.store.figures();
            let state = (found, batches, figures.live_bytes);
            assert_eq!(before.get_or_insert_with(|| state.clone()), &state);
            // What was found goes to the index with the first batch: before that it would be made anew once more.
            f.store.seal().await.unwrap();
            f.store.close().await;
        });
    }
    // What was made anew is as good as the old: room still comes back.
    run(async {
        let f = open(dir.path(), config(dir.path())).await;
        let busy = f.store.open_partition(PartitionId(1), KEEP);
        while f.store.figures().segments_recycled < 4 {
            fill(&f, busy, 200).await;
            until(|| f.store.span(busy).stored_bytes <= 3 << 20).await;
        }
        assert!(f.store.figures().segments < 14, "{:?}", f.store.figures());
        f.store.close().await;
    });
}

/// Rows change, partitions come and go, the process dies, and the index is lost each time.
#[test]
fn state_is_what_it_was_whenever_the_index_is_lost() {
    for first_seed in 1..=2u64 {
        let dir = tempfile::tempdir().unwrap();
        let mut seed = first_seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut model: BTreeMap<u64, BTreeMap<String, String>> = BTreeMap::new();
        let mut ends: BTreeMap<u64, u64> = BTreeMap::new();
        let mut next_id = 1;
        for round in 0..6 {
            if round % 3 != 2 && 0 < round {
                std::fs::remove_dir_all(dir.path().join("index")).unwrap();
            }
            run(async {
                let f = open(dir.path(), config(dir.path())).await;
                let context = format!("seed {first_seed} round {round}");
                let rows = |rows: &Rows| -> BTreeMap<String, String> {
                    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                    rows.iter().map(|(key, value)| (text(key), text(value))).collect()
                };
                let found: BTreeMap<_, _> =
                    f.recovered.partitions.iter().map(|p| (p.partition.0, rows(&p.state))).collect();
                assert_eq!(found, model, "{context}");
                for (id, end) in &ends {
                    let slot = f.store.open_partition(PartitionId(*id), KEEP);
                    let span = f.store.span(slot);
                    assert_eq!(span.end_offset, *end, "{context}");
                    let (batches, damaged) = f.read_all(slot, span.start_offset).await;
                    assert!(damaged.is_empty(), "{context}: {damaged:?}");
                    let expected = (span.start_offset..*end).map(|offset| (offset, offset));
                    assert!(batches.into_iter().eq(expected), "{context} partition {id}");
                }
                for _ in 0..30 {
                    while model.len() < 3 {
                        let slot = f.store.open_partition(PartitionId(next_id), KEEP);
                        fill(&f, slot, 1).await;
                        model.insert(next_id, BTreeMap::new());
                        ends.insert(next_id, 1);
                        next_id += 1;
                    }
                    let ids: Vec<u64> = model.keys().copied().collect();
                    let id = ids[(random(&mut seed) % ids.len() as u64) as usize];
                    let slot = f.store.open_partition(PartitionId(id), KEEP);
                    match random(&mut seed) % 16 {
                        0 => {
                            f.store.delete_partition(slot).await.unwrap();
                            model.remove(&id);
                            ends.remove(&id);
                        }
                        1..7 => {
                            let key = format!("cursor/{}", random(&mut seed) % 8);
                            let value =
                                (!random(&mut seed).is_multiple_of(4)).then(|| format!("{}", random(&mut seed)));
                            put(&f, slot, &key, value.as_deref()).await;
                            let rows = model.get_mut(&id).unwrap();
                            match value {
                                Some(value) => drop(rows.insert(key, value)),
                                None => drop(rows.remove(&key)),
                            }
                        }
                        _ => {
                            let count = random(&mut seed) % 60;
                            fill(&f, slot, count).await;
                            *ends.get_mut(&id).unwrap() += count;
                        }
                    }
                }
                f.store.close().await;
            });
        }
    }
}

#[test]
fn what_was_compacted_is_found_in_its_new_place() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = Vec::new();
    run(async {
        let f = open(dir.path(), config(dir.path())).await;
        let slots: Vec<_> = (1..=20).map(|id| f.store.open_partition(PartitionId(id), FOR_EVER)).collect();
        let mut appended = 0;
        while f.store.figures().compactions == 0 {
            for _ in 0..20 {
                for &slot in &slots {
                    let seed = f.store.span(slot).next_offset;
                    f.append(slot, seed, 1, 1000);
                    appended += 1;
                }
                f.flushed(appended).await;
            }
            f.store.compact().await.unwrap();
        }
        f.store.delete_partition(slots[3]).await.unwrap();
        // What was in a segment that was compacted is written over.
        while f.store.figures().segments_recycled == 0 {
            fill(&f, slots[0], 100).await;
        }
        for (index, &slot) in slots.iter().enumerate() {
            let gone = index == 3;
            before.push(if gone { Vec::new() } else { f.read_all(slot, 0).await.0 });
        }
        f.store.close().await;
    });
    for lose in [true, false] {
        if lose {
            std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        }
        run(async {
            let f = open(dir.path(), config(dir.path())).await;
            assert_eq!(f.recovered.index_rebuilt, lose);
            assert_eq!(f.recovered.partitions.len(), 19);
            for id in (1..=20).filter(|id| *id != 4) {
                let slot = f.store.open_partition(PartitionId(id), FOR_EVER);
                let (batches, damaged) = f.read_all(slot, 0).await;
                assert!(damaged.is_empty(), "{damaged:?}");
                assert_eq!(batches, before[id as usize - 1], "partition {id}");
            }
            f.store.seal().await.unwrap();
            f.store.close().await;
        });
    }
}

/// What the last messages of a partition were, nothing says any more. That blocks are gone must be said.
#[test]
fn a_deleted_segment_is_told_when_the_index_is_lost_as_well() {
    let is_block = |kind: &ItemKind| matches!(kind, ItemKind::Block(_));
    for deleted in ["the first", "one in the middle"] {
        let dir = tempfile::tempdir().unwrap();
        run(async {
            let f = open(dir.path(), config(dir.path())).await;
            for id in [1, 2] {
                let slot = f.store.open_partition(PartitionId(id), FOR_EVER);
                fill(&f, slot, 150).await;
            }
            f.store.close().await;
        });
        let verified = || verify(&dir.path().join("shard"), None, |_| {}).unwrap();
        assert!(!verified().is_damaged());
        let blocks = items(dir.path(), is_block).len() as u64;
        let sequence = if deleted == "the first" { 1 } else { blocks / 2 };
        let place = items(dir.path(), |kind| matches!(kind, ItemKind::Block(h) if h.id.sequence == sequence));
        std::fs::remove_file(&place[0].0).unwrap();
        assert_eq!(verified().findings.len(), 1, "{deleted}");
        std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        run(async {
            let f = open(dir.path(), config(dir.path())).await;
            assert_eq!(f.recovered.damaged.len(), 1, "{deleted}: {:?}", f.recovered.damaged);
            f.store.close().await;
        });
    }
}
