//! What happens to the store when the disk does what disks do.

mod common;

use std::ops::Range;

use common::{FaultyIo, Fixture, flip, items, open, open_with, run, segment_files, small};
use drava_protocol::{PartitionId, batch};
use drava_storage::dump::ItemKind;
use drava_storage::{AppendError, NewEntry, PartitionLimits, PartitionSlot, StoreConfig};

fn slot(fixture: &Fixture<impl drava_storage::Io>, id: u64) -> PartitionSlot {
    fixture.store.open_partition(PartitionId(id), PartitionLimits::default())
}

/// Writes `count` blocks of one entry with one record and stops without a seal.
fn write_blocks(dir: &std::path::Path, count: u64) {
    run(async {
        let f = open(dir, small(dir)).await;
        let slot = slot(&f, 1);
        for seed in 0..count {
            f.append(slot, seed, 1, 100);
            f.flushed(seed as usize + 1).await;
        }
        f.store.close().await;
    });
}

fn is_block(kind: &ItemKind) -> bool {
    matches!(kind, ItemKind::Block(_))
}

#[test]
fn a_torn_tail_is_cut_and_written_over() {
    let dir = tempfile::tempdir().unwrap();
    write_blocks(dir.path(), 5);
    let blocks = items(dir.path(), is_block);
    assert_eq!(blocks.len(), 5);
    let (path, position) = blocks.last().unwrap();
    flip(path, position + 70);
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        assert!(f.recovered.damaged.is_empty(), "{:?}", f.recovered.damaged);
        assert_eq!(f.recovered.torn.map(|torn| torn.position), Some(*position));
        let slot = slot(&f, 1);
        assert_eq!(f.store.span(slot).end_offset, 4);
        assert_eq!(f.append(slot, 9, 1, 100), 4);
        f.flushed(1).await;
        f.store.close().await;
    });
    assert_eq!(items(dir.path(), is_block).last().unwrap().1, *position, "the torn block is written over");
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        assert_eq!(f.recovered.torn, None);
        let slot = slot(&f, 1);
        let expected = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 9)];
        assert_eq!(f.read_all(slot, 0).await, (expected.to_vec(), vec![]));
        f.store.close().await;
    });
}

#[test]
fn damage_in_the_middle_is_skipped_and_the_rest_served() {
    // In the block's header, in the extent's header, in the batch's first bytes.
    for at in [16, 70, 140] {
        let dir = tempfile::tempdir().unwrap();
        write_blocks(dir.path(), 6);
        let (path, position) = items(dir.path(), is_block)[2].clone();
        flip(&path, position + at);
        for _ in 0..2 {
            run(async {
                let f = open(dir.path(), small(dir.path())).await;
                let slot = slot(&f, 1);
                let (batches, damaged) = f.read_all(slot, 0).await;
                assert_eq!(batches[..5], [(0, 0), (1, 1), (3, 3), (4, 4), (5, 5)], "flipped at {at}");
                assert_eq!((damaged.len(), &damaged[0]), (1, &(2..3)), "flipped at {at}");
                let next = f.store.span(slot).next_offset;
                f.append(slot, next, 1, 100);
                f.flushed(1).await;
                f.store.close().await;
            });
        }
    }
}

#[test]
fn a_later_block_in_the_place_of_another_is_damage_and_no_end() {
    for from in [3, 4, 5] {
        let dir = tempfile::tempdir().unwrap();
        write_blocks(dir.path(), 6);
        let blocks = items(dir.path(), is_block);
        let (path, position) = &blocks[2];
        let mut bytes = std::fs::read(path).unwrap();
        let from_position = blocks[from].1 as usize;
        bytes.copy_within(from_position..from_position + 4096, *position as usize);
        std::fs::write(path, &bytes).unwrap();
        run(async {
            let f = open(dir.path(), small(dir.path())).await;
            let (batches, damaged) = f.read_all(slot(&f, 1), 0).await;
            assert_eq!(batches, [(0, 0), (1, 1), (3, 3), (4, 4), (5, 5)], "block {from} also in the place of 2");
            assert_eq!(damaged, [2..3], "block {from} also in the place of 2");
            f.store.close().await;
        });
    }
}

/// Writes `count` blocks of a page each. A misdirected write then left copies of the blocks `from` at the block `to`, and the
/// blocks `zeroed` are gone.
fn write_and_stray(dir: &std::path::Path, count: u64, from: Range<usize>, to: usize, zeroed: Range<usize>) {
    write_blocks(dir, count);
    let blocks = items(dir, is_block);
    let (path, first) = &blocks[0];
    let at = |block: usize| *first as usize + 4096 * block;
    let last = count as usize - 1;
    assert_eq!(blocks[last].1 as usize, at(last), "a block is a page here");
    let mut bytes = std::fs::read(path).unwrap();
    bytes.copy_within(at(from.start)..at(from.end), at(to));
    bytes[at(zeroed.start)..at(zeroed.end)].fill(0);
    std::fs::write(path, &bytes).unwrap();
}

#[test]
fn copies_that_a_misdirected_write_left_cost_what_they_lie_on() {
    // Blocks that were copied, over which, and what is gone then.
    let cases = [(1..4, 0, 0..1), (0..3, 1, 3..4), (3..6, 0, 0..3), (5..6, 0, 0..1), (2..5, 3, 5..6), (0..2, 4, 4..6)];
    for (from, to, gone) in cases {
        let dir = tempfile::tempdir().unwrap();
        write_and_stray(dir.path(), 8, from.clone(), to, 0..0);
        let expected: Vec<_> = (0..8).filter(|offset| !gone.contains(offset)).map(|offset| (offset, offset)).collect();
        run(async {
            let f = open(dir.path(), small(dir.path())).await;
            let (batches, damaged) = f.read_all(slot(&f, 1), 0).await;
            assert_eq!(batches, expected, "blocks {from:?} over {to}");
            assert_eq!(damaged, std::slice::from_ref(&gone), "blocks {from:?} over {to}");
            f.store.close().await;
        });
    }
}

#[test]
fn behind_copies_whose_originals_are_gone_the_journal_goes_on_where_it_did() {
    for (from, to) in [(1..3, 5), (0..2, 5), (1..2, 6)] {
        let dir = tempfile::tempdir().unwrap();
        write_and_stray(dir.path(), 8, from.clone(), to, from.clone());
        // The copies stand for what they are copies of.
        let gone = to as u64..(to + from.len()) as u64;
        let expected: Vec<_> = (0..8).filter(|offset| !gone.contains(offset)).map(|offset| (offset, offset)).collect();
        for lost in [false, true] {
            if lost {
                std::fs::remove_dir_all(dir.path().join("index")).unwrap();
            }
            run(async {
                let f = open(dir.path(), small(dir.path())).await;
                let (batches, damaged) = f.read_all(slot(&f, 1), 0).await;
                assert_eq!(batches, expected, "blocks {from:?} strayed to {to}, index lost: {lost}");
                assert_eq!(damaged, std::slice::from_ref(&gone), "blocks {from:?} strayed to {to}, index lost: {lost}");
                f.store.close().await;
            });
        }
    }
}

#[test]
fn what_lies_before_a_copy_is_not_passed_by_though_nothing_links_to_it() {
    let dir = tempfile::tempdir().unwrap();
    write_and_stray(dir.path(), 12, 0..2, 8, 1..4);
    let expected: Vec<_> = [0, 1, 4, 5, 6, 7, 10, 11].map(|offset| (offset, offset)).to_vec();
    for lost in [false, true] {
        if lost {
            std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        }
        run(async {
            let f = open(dir.path(), small(dir.path())).await;
            let (batches, damaged) = f.read_all(slot(&f, 1), 0).await;
            assert_eq!((batches, damaged), (expected.clone(), vec![2..4, 8..10]), "index lost: {lost}");
            f.store.close().await;
        });
    }
}

#[test]
fn a_segment_whose_file_was_cut_is_told() {
    let dir = tempfile::tempdir().unwrap();
    write_blocks(dir.path(), 6);
    let (path, position) = items(dir.path(), is_block)[4].clone();
    let bytes = std::fs::metadata(&path).unwrap().len();
    for left in [position, position + 100] {
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(left).unwrap();
        run(async {
            let f = open(dir.path(), small(dir.path())).await;
            let told: Vec<_> =
                f.recovered.damaged.iter().map(|range| range.start_position..range.end_position).collect();
            assert_eq!(told, std::slice::from_ref(&(position..bytes)));
            assert_eq!(f.read_all(slot(&f, 1), 0).await.0.len(), 4);
            f.store.close().await;
        });
    }
}

#[test]
fn a_flipped_byte_in_a_batch_costs_that_batch_alone() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        let slot = slot(&f, 1);
        for round in 0..3u64 {
            for seed in 0..5 {
                f.append(slot, round * 5 + seed, 2, 100);
            }
            f.flushed(round as usize * 5 + 5).await;
        }
        f.store.close().await;
    });
    let batches = items(dir.path(), |kind| matches!(kind, ItemKind::Batch { .. }));
    assert_eq!(batches.len(), 15);
    flip(&batches[7].0, batches[7].1 + 100);
    for replayed in [true, false] {
        run(async {
            let f = open(dir.path(), small(dir.path())).await;
            assert_eq!(f.recovered.damaged.len(), usize::from(replayed));
            let slot = slot(&f, 1);
            let (batches, damaged) = f.read_all(slot, 0).await;
            assert_eq!((damaged.len(), &damaged[0]), (1, &(14..16)));
            let expected: Vec<_> = (0..15).filter(|&seed| seed != 7).map(|seed| (seed * 2, seed)).collect();
            assert_eq!(batches, expected);
            f.store.seal().await.unwrap();
            f.store.close().await;
        });
    }
}

#[test]
fn after_a_failed_write_on_a_dead_disk_nothing_is_acked() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let io = FaultyIo::new();
        let config = StoreConfig { segments_spare: 0, ..small(dir.path()) };
        let f = open_with(io.clone(), dir.path(), config).await;
        let slot = slot(&f, 1);
        f.append(slot, 0, 1, 100);
        f.flushed(1).await;
        io.writes_left.set(Some(0));
        f.append(slot, 1, 1, 100);
        for seed in 2..100 {
            f.append(slot, seed, 1, 5000);
        }
        while f.sink.borrow().failed.len() < 99 || !f.store.is_read_only() {
            drava_runtime::yield_now().await;
        }
        io.writes_left.set(None);
        assert_eq!(f.sink.borrow().failed, (1..100).collect::<Vec<_>>());
        assert_eq!(f.sink.borrow().flushed, [0]);
        assert!(f.store.figures().read_only);
        assert_eq!(f.store.figures().journal_rolls, 1, "the write of the next header failed, too");
        let bytes = common::batch_of(100, 1, 10);
        let header = batch::check(&bytes).unwrap();
        let base_offset = f.store.span(slot).next_offset;
        let bytes = drava_runtime::chunk::Slice::copy_of(&bytes);
        let entry = NewEntry { bytes, header, base_offset, append_time_ms: 1 };
        assert_eq!(f.store.append(slot, entry, 100), Err((AppendError::ReadOnly, 100)));
        assert_eq!(f.store.append_state(slot, b"k", None, None), Err(AppendError::ReadOnly));
        assert!(f.store.seal().await.is_err());
        assert_eq!(f.read_all(slot, 0).await.0, [(0, 0)], "what was acked is still served");
        f.store.close().await;
    });
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        assert_eq!(f.store.span(slot(&f, 1)).end_offset, 1);
        f.store.close().await;
    });
}

/// Fails the next write, whatever is left of it, and waits until the entries behind it were given back.
async fn fail_a_write(f: &Fixture<FaultyIo>, io: &FaultyIo, slot: PartitionSlot, seeds: std::ops::Range<u64>) {
    let already = f.sink.borrow().failed.len();
    let count = seeds.clone().count();
    io.failures_left.set(1);
    for seed in seeds {
        f.append(slot, seed, 1, 100);
    }
    while f.sink.borrow().failed.len() < already + count {
        drava_runtime::yield_now().await;
    }
}

#[test]
fn the_journal_rolls_after_a_failed_write_and_what_failed_stays_gone() {
    // What is left on disk of the write that failed: nothing, and all of it.
    for whole in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let config = StoreConfig { segments_spare: 0, ..small(dir.path()) };
        let expected = [(0, 0), (1, 7), (2, 8), (3, 9)];
        run(async {
            let io = FaultyIo::new();
            let f = open_with(io.clone(), dir.path(), config.clone()).await;
            let slot = slot(&f, 1);
            f.append(slot, 0, 1, 100);
            f.flushed(1).await;
            let before = f.store.figures();
            io.tear.set(whole.then_some(3));
            fail_a_write(&f, &io, slot, 1..4).await;
            assert_eq!(f.sink.borrow().failed, [1, 2, 3]);
            assert!(!f.store.is_read_only());
            let span = f.store.span(slot);
            assert_eq!((span.end_offset, span.next_offset), (1, 1), "their offsets are given out again");
            f.append(slot, 7, 1, 100);
            f.append(slot, 8, 1, 100);
            while f.sink.borrow().flushed.len() < 3 {
                drava_runtime::yield_now().await;
            }
            let after = f.store.figures();
            assert_eq!((after.journal_rolls, after.segments), (1, before.segments + 1));
            f.store.close().await;
        });
        if whole {
            let blocks = items(dir.path(), |kind| matches!(kind, ItemKind::Block(header) if header.id.sequence == 2));
            assert_eq!(blocks.len(), 2, "the block that failed is on disk, and the one that took its place");
        }
        for round in 0..3 {
            run(async {
                let f = open(dir.path(), config.clone()).await;
                assert!(f.recovered.damaged.is_empty(), "{:?}", f.recovered.damaged);
                assert_eq!(f.recovered.torn, None);
                let slot = slot(&f, 1);
                if round == 0 {
                    assert_eq!(f.append(slot, 9, 1, 100), 3);
                    f.flushed(1).await;
                }
                assert_eq!(f.read_all(slot, 0).await, (expected.to_vec(), vec![]), "round {round}");
                f.store.close().await;
            });
            if round == 1 {
                std::fs::remove_dir_all(dir.path().join("index")).unwrap();
            }
        }
    }
}

/// Writes bursts of so many entries, fails the writes behind them, and stops when the segment that takes over is ready.
fn roll_and_write_nothing(
    dir: &std::path::Path,
    config: &StoreConfig,
    (bursts, payload_bytes): (&[u64], usize),
    failed: Range<u64>,
    tear: Option<u64>,
) {
    run(async {
        let io = FaultyIo::new();
        let f = open_with(io.clone(), dir, config.clone()).await;
        let slot = slot(&f, 1);
        let mut count = 0;
        for burst in bursts {
            for seed in count..count + burst {
                f.append(slot, seed, 1, payload_bytes);
            }
            count += burst;
            f.flushed(count as usize).await;
        }
        io.tear.set(tear);
        fail_a_write(&f, &io, slot, failed).await;
        while f.store.figures().segments_spare == 0 {
            drava_runtime::yield_now().await;
        }
        f.store.close().await;
    });
}

#[test]
fn a_journal_that_rolled_and_wrote_nothing_goes_on_behind_the_cut() {
    let dir = tempfile::tempdir().unwrap();
    let config = StoreConfig { segments_spare: 0, ..small(dir.path()) };
    roll_and_write_nothing(dir.path(), &config, (&[1], 100), 1..3, Some(3));
    for seed in 5..8 {
        run(async {
            let f = open(dir.path(), config.clone()).await;
            assert!(f.recovered.damaged.is_empty(), "{:?}", f.recovered.damaged);
            let slot = slot(&f, 1);
            f.append(slot, seed, 1, 100);
            f.flushed(1).await;
            let expected: Vec<_> = [0].into_iter().chain(5..=seed).enumerate().map(|(o, s)| (o as u64, s)).collect();
            assert_eq!(f.read_all(slot, 0).await, (expected, vec![]));
            f.store.close().await;
        });
    }
}

/// Nothing but the cut says that a block before it was durable: the last, or one that was in flight with the last.
#[test]
fn damage_right_before_a_cut_is_no_torn_tail() {
    // The two of the burst lie in two segments.
    let across = [[1; 16].as_slice(), &[2]].concat();
    for (bursts, payload_bytes, hurt) in [(&[1, 1][..], 100, 1), (&across, 60_000, 16)] {
        for lost in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let config = StoreConfig { segments_spare: 0, ..small(dir.path()) };
            let count = bursts.iter().sum();
            roll_and_write_nothing(dir.path(), &config, (bursts, payload_bytes), count..count + 1, None);
            let blocks = items(dir.path(), is_block);
            let (path, position) = blocks[hurt as usize].clone();
            assert_eq!(path == blocks[count as usize - 1].0, payload_bytes == 100, "of the second case there are two");
            flip(&path, position + 70);
            if lost {
                std::fs::remove_dir_all(dir.path().join("index")).unwrap();
            }
            run(async {
                let f = open(dir.path(), config.clone()).await;
                let context = format!("block {hurt}, index lost: {lost}");
                assert_eq!((f.recovered.damaged.len(), f.recovered.torn), (1, None), "{context}");
                assert_eq!(f.recovered.damaged[0].start_position, position);
                let slot = slot(&f, 1);
                assert_eq!(f.append(slot, 99, 1, 100), count, "the offsets before were given out");
                f.flushed(1).await;
                let whole = (0..count).filter(|offset| *offset != hurt).map(|offset| (offset, offset));
                let expected: Vec<_> = whole.chain([(count, 99)]).collect();
                assert_eq!(f.read_all(slot, 0).await, (expected, vec![hurt..hurt + 1]), "{context}");
                f.store.close().await;
            });
        }
    }
}

/// The segment that took over is taken over itself, with the same block.
#[test]
fn a_journal_that_failed_again_before_it_wrote_goes_on_behind_both_cuts() {
    let dir = tempfile::tempdir().unwrap();
    let config = StoreConfig { segments_spare: 0, ..small(dir.path()) };
    run(async {
        let io = FaultyIo::new();
        let f = open_with(io.clone(), dir.path(), config.clone()).await;
        let slot = slot(&f, 1);
        f.append(slot, 0, 1, 100);
        f.flushed(1).await;
        for round in 1..3 {
            fail_a_write(&f, &io, slot, round..round + 1).await;
            while f.store.figures().journal_rolls < round || f.store.figures().segments_spare == 0 {
                drava_runtime::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        }
        f.store.close().await;
    });
    for (seed, lost) in [(7, true), (8, false), (9, true)] {
        if lost {
            std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        }
        run(async {
            let f = open(dir.path(), config.clone()).await;
            let slot = slot(&f, 1);
            f.append(slot, seed, 1, 100);
            f.flushed(1).await;
            let expected: Vec<_> = [0].into_iter().chain(7..=seed).enumerate().map(|(o, s)| (o as u64, s)).collect();
            assert_eq!(f.read_all(slot, 0).await, (expected, vec![]));
            f.store.close().await;
        });
    }
}

/// Without an index nothing but the cut says that the first segment counts for nothing.
#[test]
fn a_journal_whose_first_write_failed_goes_on_behind_it_without_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let config = StoreConfig { segments_spare: 0, ..small(dir.path()) };
    let lose_index = || std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    run(async {
        let io = FaultyIo::new();
        let f = open_with(io.clone(), dir.path(), config.clone()).await;
        let slot = slot(&f, 1);
        fail_a_write(&f, &io, slot, 0..1).await;
        while f.store.figures().journal_rolls == 0 {
            drava_runtime::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        f.store.close().await;
    });
    lose_index();
    run(async {
        let f = open(dir.path(), config.clone()).await;
        f.append(slot(&f, 1), 7, 1, 100);
        f.flushed(1).await;
        f.store.close().await;
    });
    lose_index();
    run(async {
        let f = open(dir.path(), config.clone()).await;
        assert_eq!(f.read_all(slot(&f, 1), 0).await, (vec![(0, 7)], vec![]));
        f.store.close().await;
    });
}

#[test]
fn rows_of_state_and_a_deletion_survive_a_failed_write() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let io = FaultyIo::new();
        let config = StoreConfig { segments_spare: 0, ..small(dir.path()) };
        let f = open_with(io.clone(), dir.path(), config).await;
        let (kept, dropped) = (slot(&f, 1), slot(&f, 2));
        f.append(kept, 0, 1, 100);
        f.append(dropped, 1, 1, 100);
        f.flushed(2).await;
        io.failures_left.set(1);
        f.store.append_state(kept, b"cursor", Some(b"moved"), Some(2)).unwrap();
        f.store.delete_partition(dropped).await.unwrap();
        assert_eq!(f.sink.borrow().failed, [2]);
        f.store.close().await;
    });
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        assert_eq!(f.recovered.partitions.len(), 1);
        assert_eq!(f.recovered.partitions[0].state, [(b"cursor".to_vec(), b"moved".to_vec())]);
        f.store.close().await;
    });
}

/// Checks that all acknowledged entries are there, at their offsets, and what else is there is what was appended. The model
/// has the token of each entry of a partition by offset, and whether it was acknowledged; it forgets what is gone.
async fn assert_kept(f: &Fixture<FaultyIo>, slots: &[PartitionSlot], model: &mut [Vec<(u64, bool)>], when: &str) {
    for (index, entries) in model.iter_mut().enumerate() {
        let end = f.store.span(slots[index]).end_offset as usize;
        let acked = entries.iter().rposition(|(_, acked)| *acked).map_or(0, |last| last + 1);
        assert!(acked <= end && end <= entries.len(), "{when}: {acked} {end}");
        entries.truncate(end);
        let (batches, damaged) = f.read_all(slots[index], 0).await;
        assert!(damaged.is_empty());
        let expected = entries.iter().enumerate().map(|(offset, (token, _))| (offset as u64, *token));
        assert!(batches.iter().copied().eq(expected), "{when} partition {index}");
    }
}

/// Writes fail and tear now and then, the journal rolls, the process dies at some point: acked entries are there, at
/// their offsets, and no other takes the place of one.
#[test]
fn no_acked_entry_is_lost_over_rolls_and_crashes() {
    for first_seed in 1..=4u64 {
        let dir = tempfile::tempdir().unwrap();
        let mut seed = first_seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut model: Vec<Vec<(u64, bool)>> = vec![Vec::new(); 3];
        let mut token = 0;
        for round in 0..10 {
            run(async {
                let io = FaultyIo::new();
                let config = StoreConfig { flush_bytes_min: 4096, segments_spare: 0, ..small(dir.path()) };
                let f = open_with(io.clone(), dir.path(), config).await;
                assert!(f.recovered.damaged.is_empty(), "seed {first_seed} round {round}: {:?}", f.recovered.damaged);
                let slots: Vec<_> = (1..=3).map(|id| slot(&f, id)).collect();
                assert_kept(&f, &slots, &mut model, &format!("seed {first_seed} round {round}")).await;
                io.tear.set(Some(common::random(&mut seed) | 1));
                for _ in 0..1 + common::random(&mut seed) % 4 {
                    for _ in 0..common::random(&mut seed) % 8 {
                        for _ in 0..common::random(&mut seed) % 12 {
                            let index = (common::random(&mut seed) % 3) as usize;
                            let bytes = (common::random(&mut seed) % 9000) as usize;
                            f.append(slots[index], token, 1, bytes);
                            model[index].push((token, false));
                            token += 1;
                        }
                        drava_runtime::time::sleep(std::time::Duration::from_micros(100)).await;
                    }
                    // The next write fails; the one after it is that of the header that takes over.
                    let failed = f.sink.borrow().failed.len();
                    io.failures_left.set(1);
                    f.append(slots[0], token, 1, 10);
                    model[0].push((token, false));
                    token += 1;
                    while f.sink.borrow().failed.len() == failed {
                        drava_runtime::yield_now().await;
                    }
                    let failed: Vec<u64> = f.sink.borrow().failed.clone();
                    model.iter_mut().for_each(|entries| entries.retain(|(token, _)| !failed.contains(token)));
                    // Once something behind the roll is acked, what failed is cut off for good.
                    f.append(slots[1], token, 1, 10);
                    model[1].push((token, false));
                    while !f.sink.borrow().flushed.contains(&token) {
                        assert!(!f.store.is_read_only(), "seed {first_seed} round {round}");
                        drava_runtime::yield_now().await;
                    }
                    token += 1;
                }
                f.store.close().await;
                let acked: std::collections::BTreeSet<_> = f.sink.borrow().flushed.iter().copied().collect();
                for (token, was_acked) in model.iter_mut().flatten() {
                    *was_acked |= acked.contains(token);
                }
            });
        }
    }
}

#[test]
fn a_lost_index_is_made_anew_from_the_journal() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        let slots = [slot(&f, 1), slot(&f, 2)];
        for seed in 0..1500u64 {
            f.append(slots[(seed % 2) as usize], seed, 1, 2000);
            if seed % 8 == 0 {
                f.flushed(seed as usize).await;
            }
        }
        f.store.append_state(slots[1], b"cursor", Some(b"here"), Some(0)).unwrap();
        f.flushed(1501).await;
        f.store.seal().await.unwrap();
        f.store.close().await;
    });
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        assert!(f.recovered.index_rebuilt);
        assert!(f.recovered.damaged.is_empty(), "{:?}", f.recovered.damaged);
        assert_eq!(f.recovered.partitions[1].state, [(b"cursor".to_vec(), b"here".to_vec())]);
        for (index, slot) in [slot(&f, 1), slot(&f, 2)].into_iter().enumerate() {
            let expected: Vec<_> = (0..750).map(|offset| (offset, offset * 2 + index as u64)).collect();
            assert_eq!(f.read_all(slot, 0).await, (expected, vec![]));
        }
        f.store.close().await;
    });
}

#[test]
fn an_unusable_index_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    write_blocks(dir.path(), 3);
    for entry in std::fs::read_dir(dir.path().join("index")).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("MANIFEST") {
            std::fs::write(path, b"no manifest at all").unwrap();
        }
    }
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        assert!(f.recovered.index_rebuilt);
        assert_eq!(f.store.span(slot(&f, 1)).end_offset, 3);
        f.store.close().await;
    });
    assert!(dir.path().join("index.unusable").exists());
}

#[test]
fn a_damaged_segment_header_does_not_lose_its_entries() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        let slot = slot(&f, 1);
        f.append(slot, 1, 1, 100);
        f.flushed(1).await;
        f.store.seal().await.unwrap();
        f.store.close().await;
    });
    let used = items(dir.path(), is_block)[0].0.clone();
    assert!(segment_files(dir.path()).contains(&used));
    flip(&used, 9);
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        assert_eq!(f.read_all(slot(&f, 1), 0).await, (vec![(0, 1)], vec![]));
        f.store.close().await;
    });
}

#[test]
fn a_lost_segment_header_does_not_lose_what_only_the_journal_has() {
    use std::os::unix::fs::FileExt;
    // Zeros over the header, and over the first block as well.
    for zeros in [0, 4096, 8192] {
        let dir = tempfile::tempdir().unwrap();
        write_blocks(dir.path(), 3);
        let (used, _) = items(dir.path(), is_block)[0].clone();
        if zeros == 0 {
            flip(&used, 9);
        } else {
            let file = std::fs::OpenOptions::new().write(true).open(&used).unwrap();
            file.write_all_at(&vec![0; zeros], 0).unwrap();
        }
        run(async {
            let f = open(dir.path(), small(dir.path())).await;
            let gone = usize::from(zeros == 8192);
            let (batches, damaged) = f.read_all(slot(&f, 1), 0).await;
            assert_eq!(batches, [(0, 0), (1, 1), (2, 2)][gone..], "{zeros} zeros");
            assert_eq!(damaged.len(), gone, "{zeros} zeros");
            f.store.close().await;
        });
    }
}

/// The index of a new journal names no segment. A mark behind what was in flight must not go over a header.
#[test]
fn what_was_in_flight_in_a_new_journal_costs_no_header() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        f.store.seal().await.unwrap();
        f.store.close().await;
    });
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        for seed in 0..4 {
            f.append(slot(&f, 1), seed, 1, 40_000);
        }
        f.flushed(4).await;
        f.store.close().await;
    });
    // The power went, and the first block of the burst had not come to the disk yet.
    let (path, position) = items(dir.path(), is_block)[0].clone();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 4096], position).unwrap();
    let header = std::fs::read(&path).unwrap()[..8].to_vec();
    for count in 1..3 {
        run(async {
            let f = open(dir.path(), small(dir.path())).await;
            assert!(f.recovered.damaged.is_empty(), "{:?}", f.recovered.damaged);
            assert_eq!(std::fs::read(&path).unwrap()[..8], header, "the magic and version of a segment");
            f.append(slot(&f, 1), count, 1, 100);
            f.flushed(1).await;
            let expected: Vec<_> = (1..=count).map(|seed| (seed - 1, seed)).collect();
            assert_eq!(f.read_all(slot(&f, 1), 0).await, (expected, vec![]));
            f.store.close().await;
        });
    }
}

/// It may name a use that nothing else tells of, as a segment made ready does.
#[test]
fn behind_a_header_that_cannot_be_read_no_generation_is_given_out_twice() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        f.append(slot(&f, 1), 0, 1, 100);
        f.flushed(1).await;
        f.store.seal().await.unwrap();
        f.store.close().await;
    });
    let (path, _) = items(dir.path(), is_block)[0].clone();
    run(async {
        let io = FaultyIo::new();
        *io.lost_page.borrow_mut() = Some((path.clone(), 0));
        let f = open_with(io, dir.path(), small(dir.path())).await;
        for seed in 1..200 {
            f.append(slot(&f, 1), seed, 1, 8000);
        }
        f.flushed(199).await;
        assert_eq!(f.read_all(slot(&f, 1), 0).await.0.len(), 200);
        f.store.close().await;
    });
    let far = |kind: &ItemKind| matches!(kind, ItemKind::Block(header) if 1 << 20 < header.id.generation);
    assert!(!items(dir.path(), far).is_empty(), "the next segment is behind all that could have been");
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        assert!(f.recovered.damaged.is_empty(), "{:?}", f.recovered.damaged);
        let (batches, damaged) = f.read_all(slot(&f, 1), 0).await;
        assert_eq!((batches.len(), damaged), (200, vec![]));
        f.store.close().await;
    });
}

/// The index counts on what is gone until it is deleted. It must not be taken from a segment with the same number.
#[test]
fn what_is_written_after_a_segment_is_gone_is_not_let_go_with_it() {
    for zeroed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let config = StoreConfig { index_flush_bytes: 512 << 10, ..small(dir.path()) };
        run(async {
            let f = open(dir.path(), config.clone()).await;
            for seed in 0..100 {
                f.append(slot(&f, 1), seed, 1, 8000);
            }
            f.flushed(100).await;
            f.store.seal().await.unwrap();
            f.store.close().await;
        });
        let gone = items(dir.path(), is_block)[0].0.clone();
        if zeroed {
            std::fs::write(&gone, vec![0; 1 << 20]).unwrap();
        } else {
            std::fs::remove_file(&gone).unwrap();
        }
        run(async {
            let f = open(dir.path(), config.clone()).await;
            let (old, kept) = (slot(&f, 1), slot(&f, 2));
            assert_eq!(f.read_all(old, 0).await, (vec![], vec![0..100]), "zeroed: {zeroed}");
            for seed in 0..400 {
                f.append(kept, seed, 1, 8000);
            }
            f.flushed(400).await;
            f.store.delete_partition(old).await.unwrap();
            let retention_bytes = Some(1 << 20);
            let passing =
                f.store.open_partition(PartitionId(3), PartitionLimits { retention_bytes, ..Default::default() });
            let mut flushed = 400;
            while f.store.figures().segments_recycled < 3 {
                for _ in 0..50 {
                    f.append(passing, flushed as u64, 1, 8000);
                    flushed += 1;
                }
                f.flushed(flushed).await;
                drava_runtime::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            let expected: Vec<_> = (0..400).map(|offset| (offset, offset)).collect();
            assert_eq!(f.read_all(kept, 0).await, (expected, vec![]), "zeroed: {zeroed}");
            f.store.close().await;
        });
    }
}

#[test]
fn offsets_lost_to_damage_are_not_given_out_again() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let f = open(dir.path(), small(dir.path())).await;
        let (hurt, other) = (slot(&f, 1), slot(&f, 2));
        for seed in 0..6 {
            f.append(if seed < 3 { hurt } else { other }, seed, 2, 100);
            f.flushed(seed as usize + 1).await;
        }
        f.store.close().await;
    });
    let (path, position) = items(dir.path(), is_block)[2].clone();
    flip(&path, position + 16);
    for _ in 0..2 {
        run(async {
            let f = open(dir.path(), small(dir.path())).await;
            let hurt = slot(&f, 1);
            let before = f.store.span(hurt).next_offset;
            assert!(6 <= before, "offset {before} was given out before");
            f.append(hurt, 50 + before, 1, 10);
            f.flushed(1).await;
            let (batches, damaged) = f.read_all(hurt, 0).await;
            assert_eq!((damaged.len(), &damaged[0]), (1, &(4..6)));
            assert_eq!(batches[..3], [(0, 0), (2, 1), (6, 56)]);
            f.store.close().await;
        });
    }
}

#[test]
fn damage_in_the_last_acked_block_is_damage_once_the_journal_was_quiet() {
    let dir = tempfile::tempdir().unwrap();
    let config = StoreConfig { mark_after: Some(std::time::Duration::from_millis(20)), ..small(dir.path()) };
    let is_mark = |kind: &ItemKind| matches!(kind, ItemKind::Block(header) if header.extent_count == 0);
    run(async {
        let f = open(dir.path(), config.clone()).await;
        let slot = slot(&f, 1);
        for burst in 1..=2 {
            for seed in 0..3 {
                f.append(slot, seed, 1, 100);
            }
            f.flushed(burst * 3).await;
            drava_runtime::time::sleep(std::time::Duration::from_millis(20)).await;
            while items(dir.path(), is_mark).len() < burst {
                drava_runtime::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        }
        drava_runtime::time::sleep(std::time::Duration::from_millis(100)).await;
        let figures = f.store.figures();
        let blocks = items(dir.path(), is_block).len() as u64;
        assert_eq!(items(dir.path(), is_mark).len(), 2, "none follows a mark");
        assert_eq!(figures.flushes, blocks - 2, "marks are not counted");
        assert_eq!(f.read_all(slot, 0).await.0.len(), 6);
        f.store.close().await;
    });
    let blocks = items(dir.path(), |kind| is_block(kind) && !is_mark(kind));
    let (path, position) = blocks.last().unwrap();
    flip(path, position + 70);
    run(async {
        let f = open(dir.path(), config.clone()).await;
        assert_eq!((f.recovered.damaged.len(), f.recovered.torn), (1, None));
        assert_eq!(f.recovered.damaged[0].start_position, *position);
        f.store.close().await;
    });
}

/// Stops in the middle of writes again and again: what was in flight is there, in part, or not at all.
#[test]
fn no_acked_entry_is_lost_when_writes_tear() {
    for first_seed in 1..=4u64 {
        let dir = tempfile::tempdir().unwrap();
        let mut seed = first_seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // Of each partition, by offset: the token, and whether it was acked.
        let mut model: Vec<Vec<(u64, bool)>> = vec![Vec::new(); 3];
        let mut token = 0;
        for round in 0..12 {
            run(async {
                let io = FaultyIo::new();
                let config = StoreConfig { flush_bytes_min: 4096, segments_spare: 0, ..small(dir.path()) };
                let f = open_with(io.clone(), dir.path(), config).await;
                assert!(f.recovered.damaged.is_empty(), "seed {first_seed} round {round}: {:?}", f.recovered.damaged);
                let slots: Vec<_> = (1..=3).map(|id| slot(&f, id)).collect();
                assert_kept(&f, &slots, &mut model, &format!("seed {first_seed} round {round}")).await;
                let tear_after = 5 + common::random(&mut seed) % 60;
                io.tear.set(Some(common::random(&mut seed) | 1));
                io.writes_left.set(Some(tear_after as u32));
                let mut refused = false;
                while !refused {
                    for _ in 0..common::random(&mut seed) % 12 {
                        let index = (common::random(&mut seed) % 3) as usize;
                        let bytes = (common::random(&mut seed) % 9000) as usize;
                        // Refused after a failed flush, or because the header of the next segment failed.
                        refused = f.try_append(slots[index], token, 1, bytes, 1_000_000).is_err();
                        if refused {
                            break;
                        }
                        model[index].push((token, false));
                        token += 1;
                    }
                    drava_runtime::time::sleep(std::time::Duration::from_micros(100)).await;
                }
                f.store.close().await;
                let acked: std::collections::BTreeSet<_> = f.sink.borrow().flushed.iter().copied().collect();
                for (token, was_acked) in model.iter_mut().flatten() {
                    *was_acked |= acked.contains(token);
                }
            });
        }
    }
}
