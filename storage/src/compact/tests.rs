use std::path::Path;

use drava_runtime::time::sleep;

use super::*;
use crate::store::{PartitionLimits, PartitionSlot, StoreConfig};

#[path = "../../tests/common/mod.rs"]
mod common;

use common::{FaultyIo, Fixture, run, small};

/// Payload of a batch.
const PAYLOAD: usize = 900;

fn config(dir: &Path) -> StoreConfig {
    StoreConfig {
        cache_bytes: 0,
        index_flush_bytes: 1 << 20,
        // These tests call for compaction when they want it.
        compaction_interval: Duration::from_secs(3600),
        compaction_bytes_per_s: 1 << 40,
        // Some count reads.
        scrub_bytes_per_s: 0,
        ..small(dir)
    }
}

async fn open(dir: &Path) -> (Fixture<FaultyIo>, FaultyIo) {
    let io = FaultyIo::new();
    (common::open_with(io.clone(), dir, config(dir)).await, io)
}

/// What was appended to each partition: offset and sequence.
type Content = BTreeMap<u64, Vec<(u64, u64)>>;

struct Load {
    content: Content,
    slots: BTreeMap<u64, PartitionSlot>,
    appended: u64,
}

impl Load {
    fn new(f: &Fixture<FaultyIo>, partitions: impl Iterator<Item = u64>, limits: PartitionLimits) -> Load {
        let slots = partitions.map(|id| (id, f.store.open_partition(PartitionId(id), limits))).collect();
        Load { content: Content::new(), slots, appended: 0 }
    }

    /// Appends a batch to each partition, in one block or some, `rounds` times.
    async fn rounds(&mut self, f: &Fixture<FaultyIo>, rounds: usize, payload_bytes: usize) {
        let before = f.sink.borrow().flushed.len();
        let mut appended = 0;
        for _ in 0..rounds {
            for (id, slot) in &self.slots {
                let seed = self.appended;
                let offset = f.append_at(*slot, seed, 1, payload_bytes, 1_000_000 + seed / 100);
                self.content.entry(*id).or_default().push((offset, seed));
                self.appended += 1;
                appended += 1;
            }
            f.flushed(before + appended).await;
        }
    }

    async fn check(&self, f: &Fixture<FaultyIo>) {
        for (id, expected) in &self.content {
            let slot = f.store.open_partition(PartitionId(*id), PartitionLimits::default());
            let start = f.store.span(slot).start_offset;
            let (batches, damaged) = f.read_all(slot, start).await;
            assert!(damaged.is_empty(), "partition {id}: {damaged:?}");
            let kept = expected.iter().filter(|(offset, _)| start <= *offset);
            assert!(batches.iter().eq(kept), "partition {id} from {start}: {} batches", batches.len());
        }
    }
}

/// Brings the index up to date and makes it durable.
async fn cover(f: &Fixture<FaultyIo>) {
    f.store.0.send_index_batch(None, true, false).await.expect("an index batch");
}

/// Sealed segments with something live in them.
fn sealed(f: &Fixture<FaultyIo>) -> Vec<SealedSegment> {
    f.store.0.journal.sealed_before(u64::MAX)
}

fn sealed_journal(f: &Fixture<FaultyIo>) -> Vec<SegmentId> {
    sealed(f).iter().filter(|segment| segment.kind == SegmentKind::Journal).map(|segment| segment.id).collect()
}

async fn until(what: impl Fn() -> bool) {
    while !what() {
        sleep(Duration::from_millis(5)).await;
    }
}

/// What a crash at this moment would leave, as another directory.
fn as_after_a_crash(dir: &Path) -> tempfile::TempDir {
    fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(to)?;
        let entries: Vec<_> = std::fs::read_dir(from)?.collect::<Result<_, _>>()?;
        for entry in entries {
            let (from, to) = (entry.path(), to.join(entry.file_name()));
            if from.is_dir() {
                copy(&from, &to)?;
            } else {
                std::fs::copy(&from, &to)?;
            }
        }
        Ok(())
    }
    loop {
        let crashed = tempfile::tempdir().unwrap();
        match copy(dir, crashed.path()) {
            Ok(()) => return crashed,
            // RocksDB deletes what it has merged when it likes to: what was copied by then is no moment's state.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (),
            Err(error) => panic!("{error}"),
        }
    }
}

async fn rows(f: &Fixture<FaultyIo>) -> Vec<(PartitionId, ExtentRow)> {
    let mut rows = Vec::new();
    let mut from = Some(FIRST);
    while let Some(key) = from {
        let scanned = f.store.0.index.scan(key, None).await.unwrap();
        rows.extend(scanned.rows);
        from = scanned.next;
    }
    rows
}

/// What the journal believes to be live is what the index has.
async fn check_live_bytes(f: &Fixture<FaultyIo>) {
    cover(f).await;
    let mut live: BTreeMap<SegmentId, u64> = BTreeMap::new();
    for (_, row) in rows(f).await {
        *live.entry(row.segment).or_default() += row.body_bytes as u64;
    }
    assert_eq!(f.store.figures().live_bytes, live.values().sum::<u64>());
    for segment in sealed(f) {
        assert_eq!(live.get(&segment.id), Some(&segment.live_bytes), "{segment:?}");
    }
}

#[test]
fn quiet_partitions_become_contiguous_and_stay_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let mut load = run(async {
        let (f, io) = open(dir.path()).await;
        let mut load = Load::new(&f, 1..=50, PartitionLimits::default());
        load.rounds(&f, 200, PAYLOAD).await;
        cover(&f).await;
        let reads = async || {
            let before = io.reads.get();
            f.read_all(load.slots[&7], 0).await;
            io.reads.get() - before
        };
        let before = reads().await;
        let victims = sealed_journal(&f);
        assert!(8 <= victims.len(), "{victims:?}");
        assert_eq!(f.store.figures().fragmented_segments, victims.len() as u64, "none was looked at");
        let live = f.store.figures().live_bytes;
        let moving = sealed(&f).iter().map(|segment| segment.live_bytes).sum::<u64>();
        assert!(f.store.compact().await.unwrap());
        assert_eq!(f.store.figures().live_bytes, live);
        assert!(sealed_journal(&f).is_empty(), "all of them were fragmented");
        let after = reads().await;
        assert!(5 * after <= before, "{after} reads after {before}");
        load.check(&f).await;
        check_live_bytes(&f).await;
        let figures = f.store.figures();
        assert!(moving <= figures.compacted_bytes && figures.compacted_bytes <= moving + moving / 20, "{figures:?}");
        assert_eq!((figures.compaction_dropped_bytes, figures.fragmented_segments), (0, 0));
        assert!(!f.store.compact().await.unwrap(), "what was brought together is left alone");
        // The old segments are used again.
        load.rounds(&f, 100, PAYLOAD).await;
        assert!(0 < f.store.figures().segments_recycled);
        load.check(&f).await;
        f.store.close().await;
        load
    });
    run(async {
        let (f, _) = open(dir.path()).await;
        assert!(f.recovered.damaged.is_empty(), "{:?}", f.recovered.damaged);
        load.check(&f).await;
        check_live_bytes(&f).await;
        load.slots.values_mut().zip(1..).for_each(|(slot, id)| {
            *slot = f.store.open_partition(PartitionId(id), PartitionLimits::default());
        });
        load.rounds(&f, 50, PAYLOAD).await;
        load.check(&f).await;
        f.store.close().await;
    });
}

/// A store with little memory.
async fn open_little(dir: &Path, memory_bytes: u64) -> (Fixture<FaultyIo>, FaultyIo) {
    let io = FaultyIo::new();
    let config = StoreConfig { memory_bytes, ..config(dir) };
    (common::open_with(io.clone(), dir, config).await, io)
}

/// What a pass over these victims reads: reads and bytes.
async fn copied(f: &Fixture<FaultyIo>, io: &FaultyIo, victims: &[SegmentId]) -> (u64, u64) {
    let before = (io.reads.get(), io.read_bytes.get());
    let mut pass = Pass::new(&f.store.0, victims);
    pass.copy().await.unwrap();
    let read = (io.reads.get() - before.0, io.read_bytes.get() - before.1);
    assert_eq!(pass.read_bytes, read.1, "what is read is paid");
    pass.finish_output().await.unwrap();
    read
}

#[test]
fn small_extents_are_read_with_long_reads() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (f, io) = open(dir.path()).await;
        let mut load = Load::new(&f, 1..=50, PartitionLimits::default());
        load.rounds(&f, 200, PAYLOAD).await;
        cover(&f).await;
        let victims = sealed_journal(&f);
        let victims_bytes = victims.len() as u64 * f.store.0.config.segment_bytes;
        assert!(4000 < rows(&f).await.len());
        let (reads, bytes) = copied(&f, &io, &victims).await;
        // A page that two reads need is read twice.
        assert!(bytes <= victims_bytes + reads * ALIGNMENT as u64, "{bytes} bytes of {victims_bytes}");
        assert!(reads <= 2 * victims_bytes / window::READ_BYTES_MAX, "{reads} reads of {bytes} bytes");
        assert!(sealed_journal(&f).is_empty());
        load.check(&f).await;
        check_live_bytes(&f).await;
        f.store.close().await;
    });
}

#[test]
fn victims_larger_than_a_window_are_read_some_times_over() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (f, io) = open_little(dir.path(), 6 << 20).await;
        let window_bytes = f.store.0.memory.window_bytes_max();
        assert_eq!(window_bytes, 1 << 20);
        let mut load = Load::new(&f, 1..=50, PartitionLimits::default());
        load.rounds(&f, 200, PAYLOAD).await;
        cover(&f).await;
        let victims = sealed_journal(&f);
        let victims_bytes = victims.len() as u64 * f.store.0.config.segment_bytes;
        assert!(8 * window_bytes <= victims_bytes);
        let live = f.store.figures().live_bytes;
        let (_, bytes) = copied(&f, &io, &victims).await;
        assert!(victims_bytes < bytes && bytes <= 20 * victims_bytes, "{bytes} bytes of {victims_bytes}");
        assert_eq!(f.store.figures().live_bytes, live);
        // Each partition is in one piece but for the ends of blocks and segments.
        let compacted: Vec<_> = sealed(&f)
            .iter()
            .filter(|segment| segment.kind == SegmentKind::Compacted)
            .map(|segment| segment.id)
            .collect();
        let count = rows(&f).await.iter().filter(|(_, row)| compacted.contains(&row.segment)).count();
        assert!((50..=250).contains(&count), "{count} extents");
        load.check(&f).await;
        check_live_bytes(&f).await;
        f.store.close().await;
    });
}

#[test]
fn a_window_counts_while_a_pass_runs_and_no_longer() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (f, io) = open_little(dir.path(), 6 << 20).await;
        let held = || f.store.figures().memory.compaction;
        let mut load = Load::new(&f, 1..=20, PartitionLimits::default());
        load.rounds(&f, 150, PAYLOAD).await;
        cover(&f).await;
        let victims = sealed_journal(&f);
        let mut pass = Pass::new(&f.store.0, &victims);
        assert_eq!(held(), 0);
        pass.copy().await.unwrap();
        let memory = f.store.figures().memory;
        assert!(0 < held() && held() <= f.store.0.memory.window_bytes_max(), "{memory:?}");
        assert!(memory.total() <= memory.limit, "{memory:?}");
        drop(pass);
        assert_eq!(held(), 0);
        // A pass that fails.
        io.writes_left.set(Some(3));
        assert!(matches!(f.store.compact().await, Err(CompactError::Write { .. })));
        io.writes_left.set(None);
        assert_eq!(held(), 0);
        assert!(0 < f.store.figures().fragmented_segments, "they still wait");
        f.store.compact().await.unwrap();
        assert_eq!((held(), f.store.figures().fragmented_segments), (0, 0));
        load.check(&f).await;
        check_live_bytes(&f).await;
        f.store.close().await;
    });
}

#[test]
fn an_extent_larger_than_a_window_is_moved_too() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (f, io) = open_little(dir.path(), 2 << 20).await;
        let large = 400_000;
        assert!(f.store.0.memory.window_bytes_max() < large as u64);
        let mut kept = Load::new(&f, 1..=1, PartitionLimits::default());
        let mut small = Load::new(&f, 2..=9, PartitionLimits::default());
        for _ in 0..10 {
            kept.rounds(&f, 1, large).await;
            small.rounds(&f, 2, PAYLOAD).await;
        }
        cover(&f).await;
        let victims = sealed_journal(&f);
        copied(&f, &io, &victims).await;
        assert!(sealed_journal(&f).is_empty());
        kept.check(&f).await;
        small.check(&f).await;
        check_live_bytes(&f).await;
        f.store.close().await;
    });
}

#[test]
fn a_lost_page_costs_its_own_extents_alone() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (f, io) = open(dir.path()).await;
        let mut load = Load::new(&f, 1..=20, PartitionLimits::default());
        load.rounds(&f, 150, PAYLOAD).await;
        cover(&f).await;
        let (_, lost) =
            rows(&f).await.into_iter().find(|(id, row)| *id == PartitionId(9) && 40 < row.first_offset).unwrap();
        let page = lost.position & !(ALIGNMENT as u64 - 1);
        *io.lost_page.borrow_mut() = Some((segment::path(&f.store.0.config.dir, lost.segment), page));
        let in_page = |row: &ExtentRow| {
            let end = row.position + EXTENT_HEADER_BYTES as u64 + u64::from(row.body_bytes);
            row.segment == lost.segment && row.position < page + ALIGNMENT as u64 && page < end
        };
        let expected: Vec<_> = rows(&f).await.into_iter().filter(|(_, row)| in_page(row)).collect();
        assert!((1..=6).contains(&expected.len()), "{expected:?}");
        assert!(f.store.compact().await.unwrap());
        assert_eq!(sealed_journal(&f), [lost.segment]);
        let left: Vec<_> = rows(&f).await.into_iter().filter(|(_, row)| row.segment == lost.segment).collect();
        assert_eq!(left, expected, "its neighbours were moved");
        // The page comes back: an error of the disk is not yet damage.
        *io.lost_page.borrow_mut() = None;
        assert!(f.store.damage().is_empty(), "{:?}", f.store.damage());
        load.check(&f).await;
        check_live_bytes(&f).await;
        f.store.close().await;
    });
}

#[test]
fn a_crash_between_any_two_steps_loses_nothing() {
    for steps in 0..=4 {
        let dir = tempfile::tempdir().unwrap();
        let (load, crashed) = run(async {
            let (f, io) = open(dir.path()).await;
            let mut load = Load::new(&f, 1..=20, PartitionLimits::default());
            load.rounds(&f, 100, PAYLOAD).await;
            cover(&f).await;
            let victims = sealed_journal(&f);
            let mut pass = Pass::new(&f.store.0, &victims);
            if steps == 0 {
                // In the middle of the copy.
                io.writes_left.set(Some(3));
                assert!(matches!(pass.copy().await, Err(CompactError::Write { .. })));
                io.writes_left.set(None);
            } else {
                pass.copy().await.unwrap();
            }
            if steps == 2 {
                pass.switch(Durable::Later).await.unwrap();
            }
            if 3 <= steps {
                pass.switch(Durable::Now).await.unwrap();
            }
            if 4 <= steps {
                pass.release();
            }
            let crashed = as_after_a_crash(dir.path());
            if steps != 2 {
                // The pass is given up here: the store goes on as it is.
                drop(pass);
                load.check(&f).await;
            }
            f.store.close().await;
            (load, crashed)
        });
        run(async {
            let (f, _) = open(crashed.path()).await;
            assert!(f.recovered.damaged.is_empty(), "after {steps} steps: {:?}", f.recovered.damaged);
            load.check(&f).await;
            check_live_bytes(&f).await;
            // Whatever is dead is written over.
            let mut more = Load::new(&f, 1000..1001, PartitionLimits::default());
            more.rounds(&f, 120, 30_000).await;
            cover(&f).await;
            f.store.compact().await.unwrap();
            more.rounds(&f, 60, 30_000).await;
            load.check(&f).await;
            more.check(&f).await;
            check_live_bytes(&f).await;
            f.store.close().await;
        });
    }
}

#[test]
fn what_is_deleted_while_it_is_copied_stays_deleted() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (f, _) = open(dir.path()).await;
        let mut load = Load::new(&f, 1..=20, PartitionLimits::default());
        // A second ledger in each partition, so that the first can be trimmed.
        load.rounds(&f, 60, PAYLOAD).await;
        let roll = PartitionLimits { retention_bytes: Some(1), ..PartitionLimits::default() };
        for id in 1..=20 {
            let slot = f.store.open_partition(PartitionId(id), PartitionLimits::default());
            f.store.0.partitions.borrow_mut().list[slot.0 as usize].writer = crate::ledger::Writer::after(1);
        }
        load.rounds(&f, 60, PAYLOAD).await;
        cover(&f).await;
        let victims = sealed_journal(&f);
        let mut pass = Pass::new(&f.store.0, &victims);
        pass.copy().await.unwrap();
        f.store.delete_partition(load.slots[&19]).await.unwrap();
        load.content.remove(&19);
        f.store.open_partition(PartitionId(18), roll);
        until(|| 0 < f.store.span(load.slots[&18]).start_offset).await;
        f.store.open_partition(PartitionId(18), PartitionLimits::default());
        cover(&f).await;
        pass.finish_output().await.unwrap();
        drop(pass);
        assert!(0 < f.store.figures().compaction_dropped_bytes);
        check_live_bytes(&f).await;
        assert!(rows(&f).await.iter().all(|(id, _)| *id != PartitionId(19)), "its rows do not come back");
        load.check(&f).await;
        // And the other way round: moved first, deleted then.
        f.store.delete_partition(load.slots[&4]).await.unwrap();
        load.content.remove(&4);
        check_live_bytes(&f).await;
        f.store.close().await;
        let (f, _) = open(dir.path()).await;
        check_live_bytes(&f).await;
        load.check(&f).await;
        let ids: Vec<_> = f.recovered.partitions.iter().map(|p| p.partition.0).collect();
        assert!(!ids.contains(&19) && !ids.contains(&4), "{ids:?}");
        f.store.close().await;
    });
}

#[test]
fn readers_never_notice() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (f, _) = open(dir.path()).await;
        let mut load = Load::new(&f, 1..=20, PartitionLimits::default());
        load.rounds(&f, 200, PAYLOAD).await;
        cover(&f).await;
        // A reader that has planned, and one that knows an old place.
        let slot = load.slots[&7];
        let mut runs = Vec::new();
        let mut next = f.store.read(slot, 0, 2000, &mut runs).await.unwrap();
        let mut seen = Vec::new();
        common::check_runs(&runs, 0, &mut seen);
        let old: Vec<_> = rows(&f).await.into_iter().filter(|(id, _)| *id == PartitionId(7)).collect();
        let (id, row) = old[0];
        let generation = f.store.0.journal.generation(row.segment);
        assert!(f.store.compact().await.unwrap());
        let mut other = Load::new(&f, 900..901, PartitionLimits::default());
        while f.store.0.journal.generation(row.segment) == generation {
            other.rounds(&f, 20, 50_000).await;
            cover(&f).await;
        }
        // Its header is written before its blocks are: as long as these are left from before, they are right.
        other.rounds(&f, 60, 50_000).await;
        assert!(f.store.0.has_moved(id, row).await, "an old place that was written over is looked up again");
        while (next as usize) < load.content[&7].len() {
            runs.clear();
            let at = next;
            next = f.store.read(slot, at, 2000, &mut runs).await.unwrap();
            common::check_runs(&runs, at, &mut seen);
        }
        assert_eq!(seen, load.content[&7]);

        // Readers beside passes, with writes over what died.
        let again = Rc::new(Cell::new(true));
        let checked = Rc::new(Cell::new(0));
        let (running, counted, store) = (again.clone(), checked.clone(), f.store.clone());
        let (slots, content) = (load.slots.clone(), load.content.clone());
        drava_runtime::spawn(async move {
            while running.get() {
                for (id, slot) in &slots {
                    let (mut offset, mut seen) = (0, Vec::new());
                    let end = content[id].len() as u64;
                    while offset < end {
                        let mut runs = Vec::new();
                        let at = offset;
                        offset = store.read(*slot, at, 5000, &mut runs).await.expect("a read");
                        common::check_runs(&runs, at, &mut seen);
                    }
                    assert!(content[id].iter().eq(seen.iter().take(content[id].len())), "partition {id}");
                    counted.set(counted.get() + 1);
                    // What was read ahead is served without a wait: others would never run.
                    sleep(Duration::from_millis(1)).await;
                }
            }
        });
        for _ in 0..3 {
            load.rounds(&f, 100, PAYLOAD).await;
            cover(&f).await;
            f.store.compact().await.unwrap();
        }
        until(|| 20 < checked.get()).await;
        again.set(false);
        load.check(&f).await;
        f.store.close().await;
    });
}

#[test]
fn damage_stays_where_it_is_and_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (f, _) = open(dir.path()).await;
        let mut load = Load::new(&f, 1..=20, PartitionLimits::default());
        load.rounds(&f, 150, PAYLOAD).await;
        cover(&f).await;
        let (_, hurt) =
            rows(&f).await.into_iter().find(|(id, row)| *id == PartitionId(9) && 40 < row.first_offset).unwrap();
        let path = segment::path(&f.store.0.config.dir, hurt.segment);
        common::flip(&path, hurt.position + EXTENT_HEADER_BYTES as u64 + 200);
        let victims = sealed_journal(&f);
        assert!(f.store.compact().await.unwrap());
        assert_eq!(sealed_journal(&f), [hurt.segment], "of {victims:?} the damaged one stays");
        let left: Vec<_> = rows(&f).await.into_iter().filter(|(_, row)| row.segment == hurt.segment).collect();
        assert_eq!(left, [(PartitionId(9), hurt)], "its neighbours were read with it and moved");
        let listed = f.store.damage();
        assert_eq!(listed.len(), 1, "{listed:?}");
        assert_eq!(listed[0].found_by, FoundBy::Compaction);
        let messages = listed[0].messages.clone().unwrap();
        assert_eq!((messages.partition, messages.offsets), (PartitionId(9), hurt.first_offset..hurt.next_offset));
        let (batches, damaged) = f.read_all(load.slots[&9], 0).await;
        assert_eq!(damaged, [hurt.first_offset..hurt.next_offset]);
        let expected = load.content.remove(&9).unwrap();
        assert_eq!(batches.len() + 1, expected.len());
        assert!(!f.store.compact().await.unwrap(), "it is not tried again and again");
        load.check(&f).await;
        check_live_bytes(&f).await;
        f.store.close().await;
    });
}

#[test]
fn garbage_is_collected_once_it_wins_enough() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (f, _) = open(dir.path()).await;
        let mut kept = Load::new(&f, 1..=1, PartitionLimits::default());
        let mut gone = Load::new(&f, 2..=2, PartitionLimits::default());
        for _ in 0..30 {
            kept.rounds(&f, 1, 30_000).await;
            gone.rounds(&f, 4, 45_000).await;
        }
        cover(&f).await;
        let before = sealed(&f).len();
        assert!(!f.store.compact().await.unwrap(), "nothing is dead and nothing lies apart");
        f.store.delete_partition(gone.slots[&2]).await.unwrap();
        cover(&f).await;
        assert!(f.store.compact().await.unwrap());
        let after = sealed(&f).len();
        assert!(3 * after <= before, "{after} segments are left of {before}");
        let figures = f.store.figures();
        assert!(figures.compacted_bytes < 31 * 31_000, "{figures:?}");
        kept.check(&f).await;
        check_live_bytes(&f).await;
        assert!(!f.store.compact().await.unwrap());
        f.store.close().await;
    });
}

#[test]
fn deleted_partitions_give_their_room_back() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (f, _) = open(dir.path()).await;
        let mut load = Load::new(&f, 1..=4, PartitionLimits::default());
        let mut kept = Load::new(&f, 5..=5, PartitionLimits::default());
        load.rounds(&f, 300, 30_000).await;
        let full = f.store.figures().segments;
        assert!(32 < full, "{full} segments");
        for slot in load.slots.values() {
            f.store.delete_partition(*slot).await.unwrap();
        }
        cover(&f).await;
        assert_eq!(f.store.figures().live_bytes, 0);
        // The dead are needed until the journal has grown enough for its next checkpoint. Of those that are not needed
        // then some stay for the next burst.
        while full / 2 < f.store.figures().segments {
            kept.rounds(&f, 10, 50_000).await;
            cover(&f).await;
            sleep(Duration::from_millis(300)).await;
            assert!(kept.appended < 400, "{:?}", f.store.figures());
        }
        let files = common::segment_files(dir.path()).len() as u64;
        assert!(files <= full / 2 + 3, "{files} files are left of {full}");
        kept.check(&f).await;
        f.store.close().await;
    });
}

/// Bytes written for each byte appended, with retention: (flushed and compacted) and compacted alone.
fn amplification(partitions: u64, payload_bytes: usize, total_bytes: u64, keep_bytes: u64) -> (f64, f64) {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let config = StoreConfig { block_bytes_max: 256 << 10, ..config(dir.path()) };
        let f = common::open_with(FaultyIo::new(), dir.path(), config).await;
        let limits = PartitionLimits { retention_bytes: Some(keep_bytes), ..PartitionLimits::default() };
        let mut load = Load::new(&f, 1..=partitions, limits);
        let mut compacted_at = 0;
        while load.appended * payload_bytes as u64 <= total_bytes {
            load.rounds(&f, 1, payload_bytes).await;
            // As often as the store itself would find as many segments.
            if compacted_at + (2 << 20) <= f.store.figures().flushed_bytes {
                compacted_at = f.store.figures().flushed_bytes;
                (0..partitions as usize).for_each(|index| f.store.0.tidy(index, 2_000_000));
                sleep(Duration::from_millis(1)).await;
                cover(&f).await;
                // It comes with the clock, and all of this is quicker.
                f.store.0.write_checkpoint().await.expect("a checkpoint");
                f.store.0.compact(false).await.unwrap();
            }
        }
        load.check(&f).await;
        let figures = f.store.figures();
        assert!(0 < figures.ledgers_deleted && 0 < figures.segments_recycled, "{figures:?}");
        f.store.close().await;
        let appended = (load.appended * payload_bytes as u64) as f64;
        let compacted = figures.compacted_bytes as f64;
        ((figures.flushed_bytes as f64 + compacted) / appended, compacted / appended)
    })
}

#[test]
fn one_topic_that_runs_into_retention_is_never_compacted() {
    let (written, compacted) = amplification(1, 250_000, 60 << 20, 8 << 20);
    assert!(written <= 1.1 && compacted == 0.0, "{written:.3} times written, {compacted:.3} of it compacted");
}

#[test]
fn many_topics_that_run_into_retention_are_written_twice_at_most() {
    let (written, compacted) = amplification(14, 18_000, 160 << 20, 6 << 20);
    assert!(written <= 2.1 && 0.2 < compacted, "{written:.3} times written, {compacted:.3} of it compacted");
}

fn facts(live_percent: &[u64]) -> Vec<SealedSegment> {
    let segment = |(index, percent): (usize, &u64)| SealedSegment {
        id: SegmentId(index as u32),
        generation: index as u64 + 1,
        bytes: 100,
        live_bytes: *percent,
        kind: SegmentKind::Journal,
    };
    live_percent.iter().enumerate().map(segment).collect()
}

#[test]
fn garbage_is_chosen_by_what_it_wins() {
    let live = |segment: &SealedSegment| Found { live_bytes: segment.live_bytes, reads: 1, doomed_bytes: 0 };
    let chosen_of = |percents: &[u64], live_bytes_max| {
        choose_garbage(&facts(percents), live, 50, live_bytes_max).iter().map(|id| id.0).collect::<Vec<_>>()
    };
    let chosen = |percents: &[u64]| chosen_of(percents, u64::MAX);
    assert_eq!(chosen(&[]), [0u32; 0]);
    assert_eq!(chosen(&[100, 60, 51]), [0u32; 0]);
    assert_eq!(chosen(&[10, 10]), [0u32; 0], "one segment is won: not enough");
    assert_eq!(chosen(&[10, 100, 20, 50]), [0, 2, 3], "the emptiest first");
    assert_eq!(chosen(&[50; 12]).len(), VICTIMS_MAX);
    assert_eq!(chosen_of(&[50; 12], 250).len(), 5, "no more than is read well at a time");
    assert_eq!(chosen_of(&[50; 12], 1).len(), 4, "but what it takes to win enough");
    let doomed = |segment: &SealedSegment| Found { doomed_bytes: segment.live_bytes, ..live(segment) };
    assert_eq!(choose_garbage(&facts(&[10; 8]), doomed, 50, u64::MAX), [], "retention takes the rest soon");
}

#[test]
fn a_short_run_of_fragments_waits_for_more_or_for_quiet() {
    let lengths = |count: usize, quiet| {
        fragment_passes(&facts(&vec![100; count]), quiet, 1000).iter().map(Vec::len).collect::<Vec<_>>()
    };
    assert_eq!(lengths(0, true), [0usize; 0]);
    assert_eq!(lengths(7, false), [0usize; 0]);
    assert_eq!(lengths(7, true), [7]);
    assert_eq!(lengths(19, false), [8, 8]);
    assert_eq!(lengths(19, true), [8, 8, 3]);
    let mut large = facts(&[100; 3]);
    large.iter_mut().for_each(|segment| segment.bytes = 300 << 20);
    let bounded = |bytes_max, quiet| fragment_passes(&large, quiet, bytes_max).iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(bounded(512 << 20, true), [1, 1, 1], "bounded in bytes");
    assert_eq!(bounded(1, false), [1, 1, 1], "a pass has one at least");
    assert_eq!((bounded(600 << 20, true), bounded(600 << 20, false)), (vec![2, 1], vec![2]));
}
