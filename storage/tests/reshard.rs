//! A node that is started with another number of shards.

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use common::{Fixture, Sink, items_in, run, small};
use drava_protocol::{PartitionId, ShardId};
use drava_storage::dump::ItemKind;
use drava_storage::foreign::{self, Drained, Holders, StoreId};
use drava_storage::reshard::{self, Moved};
use drava_storage::{ForeignStores, GlommioIo, Index, IndexDb, PartitionLimits, PartitionSlot, Store, StoreConfig};

/// What the node would keep in its format file.
#[derive(Clone)]
struct Layout {
    stores: Vec<StoreId>,
    draining: Vec<StoreId>,
    next: u16,
}

/// A partition as it has to be.
#[derive(Clone, Default)]
struct Expected {
    start_offset: u64,
    /// Base offset and seed of each batch.
    batches: Vec<(u64, u64)>,
    state: Vec<(Vec<u8>, Vec<u8>)>,
}

struct Node {
    dir: PathBuf,
    layout: Layout,
    expected: BTreeMap<PartitionId, Expected>,
    shards: Vec<Fixture>,
    slots: BTreeMap<PartitionId, PartitionSlot>,
    seed: u64,
    /// Those that are written to.
    ids: Range<u64>,
}

fn shard_of(partition: PartitionId, shards: usize) -> usize {
    (partition.0 - 1) as usize % shards
}

impl Node {
    fn new(dir: &Path, shards: u16) -> Node {
        let layout = Layout { stores: (0..shards).map(StoreId).collect(), draining: Vec::new(), next: shards };
        let (expected, slots) = (BTreeMap::new(), BTreeMap::new());
        Node { dir: dir.to_owned(), layout, expected, shards: Vec::new(), slots, seed: 1, ids: 1..11 }
    }

    /// Stopped, with two new stores: nothing is in the second.
    async fn with_an_empty_store(dir: &Path) -> Node {
        let mut node = Node::new(dir, 1);
        node.ids = 1..2;
        node.open().await;
        node.write(3).await;
        node.stop(true).await;
        node.layout = node.prepare(2).await.0;
        node
    }

    fn store_dir(&self, store: StoreId) -> PathBuf {
        self.dir.join(format!("shard-{:03}", store.0))
    }

    fn config(&self, store: StoreId) -> StoreConfig {
        StoreConfig {
            dir: self.store_dir(store),
            shard: ShardId(store.0),
            ledger_bytes_max: 20_000,
            cache_bytes: 4096,
            index_flush_bytes: 64 << 10,
            ..small(&self.dir)
        }
    }

    fn index(&self, stores: &[StoreId]) -> Vec<Index> {
        let db = IndexDb::open_stores(&self.dir.join("index"), stores).expect("an index");
        stores.iter().map(|store| db.store(*store)).collect()
    }

    async fn open(&mut self) {
        let holders = foreign::holders(&self.index(&self.layout.stores)).expect("readable rows");
        self.open_with_holders(Some(holders)).await;
    }

    /// Opens all shards and checks that everything is as it has to be. Without `holders` nothing is removed.
    async fn open_with_holders(&mut self, holders: Option<Holders>) {
        let indexes = self.index(&self.layout.stores);
        let dirs = self.layout.draining.iter().map(|store| (*store, self.store_dir(*store))).collect();
        let foreign = if let Some(holders) = holders {
            let Drained { left, gone } = foreign::drain(&GlommioIo::new(), dirs, holders).await.expect("directories");
            self.layout.draining.retain(|store| !gone.contains(store));
            left.map(|(foreign, drainer)| {
                drop(drava_runtime::spawn(drainer.run()));
                foreign
            })
        } else {
            let (emptied, _) = drava_runtime::foreign::inbox();
            Some(ForeignStores { dirs, emptied })
        };
        let shards = indexes.len();
        for (shard, index) in indexes.into_iter().enumerate() {
            let config = StoreConfig { foreign: foreign.clone(), ..self.config(self.layout.stores[shard]) };
            let (store, recovered) = Store::open(GlommioIo::new(), config, index).await.expect("a store");
            let sink = Rc::new(RefCell::new(Sink::default()));
            store.start(sink.clone());
            for found in &recovered.partitions {
                let expected = self.expected.get(&found.partition);
                let expected = expected.unwrap_or_else(|| panic!("{} is back", found.partition));
                assert_eq!(shard_of(found.partition, shards), shard, "{} in shard {shard}", found.partition);
                assert_eq!(found.state, expected.state, "state of {}", found.partition);
            }
            self.shards.push(Fixture { store, sink, recovered });
        }
        for (&partition, expected) in &self.expected {
            let shard = &self.shards[shard_of(partition, shards)];
            let slot = shard.store.open_partition(partition, PartitionLimits::default());
            self.slots.insert(partition, slot);
            assert_eq!(shard.store.span(slot).start_offset, expected.start_offset, "start of {partition}");
            let (batches, damaged) = shard.read_all(slot, expected.start_offset).await;
            assert!(damaged.is_empty(), "{partition}: {damaged:?}");
            assert_eq!(batches, expected.batches, "content of {partition}");
        }
    }

    fn shard(&self, partition: PartitionId) -> &Fixture {
        &self.shards[shard_of(partition, self.shards.len())]
    }

    /// Appends batches to all partitions, and changes a row of each.
    async fn write(&mut self, rounds: u64) {
        let already: Vec<usize> = self.shards.iter().map(|shard| shard.sink.borrow().flushed.len()).collect();
        let mut wanted = already;
        for _ in 0..rounds {
            for id in self.ids.clone().map(PartitionId) {
                if !self.expected.contains_key(&id) {
                    let slot = self.shard(id).store.open_partition(id, PartitionLimits::default());
                    self.slots.insert(id, slot);
                    self.expected.insert(id, Expected::default());
                }
                let (slot, seed) = (self.slots[&id], self.seed);
                self.seed += 1;
                let offset = self.shard(id).append(slot, seed, 3, 1000);
                wanted[shard_of(id, self.shards.len())] += 1;
                self.expected.get_mut(&id).unwrap().batches.push((offset, seed));
            }
        }
        for id in self.ids.clone().map(PartitionId) {
            let (key, value) = (format!("k{}", self.seed % 3).into_bytes(), self.seed.to_le_bytes());
            let token = Some(self.seed);
            self.seed += 1;
            self.shard(id).store.append_state(self.slots[&id], &key, Some(&value), token).unwrap();
            wanted[shard_of(id, self.shards.len())] += 1;
            let state = &mut self.expected.get_mut(&id).unwrap().state;
            state.retain(|(found, _)| *found != key);
            state.push((key, value.to_vec()));
            state.sort();
        }
        for (shard, wanted) in self.shards.iter().zip(wanted) {
            shard.flushed(wanted).await;
        }
    }

    /// Retention takes about half of a partition.
    async fn trim(&mut self, id: PartitionId) {
        let (slot, shard) = (self.slots[&id], self.shard(id));
        let batches = &self.expected[&id].batches;
        shard.store.set_floor(slot, Some(batches[batches.len() / 2].0));
        let retention_age = Some(Duration::from_secs(3600));
        shard.store.open_partition(id, PartitionLimits { retention_age, ..PartitionLimits::default() });
        let before = shard.store.span(slot).start_offset;
        while shard.store.span(slot).start_offset == before {
            drava_runtime::time::sleep(Duration::from_millis(5)).await;
        }
        shard.store.open_partition(id, PartitionLimits::default());
        let start_offset = shard.store.span(slot).start_offset;
        let expected = self.expected.get_mut(&id).unwrap();
        expected.start_offset = start_offset;
        expected.batches.retain(|(offset, _)| start_offset <= *offset);
    }

    async fn delete(&mut self, id: PartitionId) {
        self.shard(id).store.delete_partition(self.slots[&id]).await.unwrap();
        self.slots.remove(&id);
        self.expected.remove(&id);
    }

    async fn stop(&mut self, sealed: bool) {
        for shard in self.shards.drain(..) {
            if sealed {
                shard.store.seal().await.unwrap();
            }
            shard.store.close().await;
        }
        self.slots.clear();
    }

    /// Everything up to the decision: the layout that is to be taken, and what was moved.
    async fn prepare(&self, shards: u16) -> (Layout, Moved) {
        let old = self.layout.clone();
        for (store, index) in old.stores.iter().zip(self.index(&old.stores)) {
            reshard::seal(GlommioIo::new(), self.config(*store), index, |_, _| {}).await.unwrap();
        }
        let next = old.next + shards;
        let stores: Vec<StoreId> = (old.next..next).map(StoreId).collect();
        let all: Vec<StoreId> = old.stores.iter().chain(&stores).copied().collect();
        let mut indexes = self.index(&all);
        let mut new = indexes.split_off(old.stores.len());
        let from: Vec<(StoreId, Index)> = old.stores.iter().copied().zip(indexes).collect();
        let moved = reshard::move_rows(&from, &mut new, &|id| shard_of(id, shards.into())).unwrap();
        drop((from, new));
        for (store, index) in stores.iter().zip(self.index(&all).into_iter().skip(old.stores.len())) {
            std::fs::remove_dir_all(self.store_dir(*store)).ok();
            reshard::anchor(GlommioIo::new(), self.config(*store), index).await.unwrap();
        }
        let draining = old.draining.iter().chain(&old.stores).copied().collect();
        (Layout { stores, draining, next }, moved)
    }
}

#[test]
fn everything_is_there_with_any_number_of_shards_after_any_other() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let mut node = Node::new(dir.path(), 2);
        for (round, shards) in [4, 1, 3, 8, 2, 5, 1].into_iter().enumerate() {
            node.open().await;
            node.write(12).await;
            node.trim(PartitionId(2)).await;
            node.trim(PartitionId(7)).await;
            // Ids never come back in a node; here it is one for each round that goes.
            let gone = PartitionId(100 + round as u64);
            let slot = node.shard(gone).store.open_partition(gone, PartitionLimits::default());
            node.shard(gone).append(slot, 1, 1, 5000);
            node.slots.insert(gone, slot);
            node.delete(gone).await;
            node.stop(round % 2 == 0).await;
            let (layout, moved) = node.prepare(shards).await;
            assert_eq!(moved.partitions, 10);
            node.layout = layout;
        }
        node.open().await;
        node.write(1).await;
        assert!(0 < node.shards[0].store.figures().foreign_live_bytes);
        node.stop(false).await;
        node.open().await;
        node.stop(true).await;
        node.open().await;
        node.stop(true).await;
    });
}

#[test]
fn a_start_cut_short_before_the_decision_has_changed_nothing() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let mut node = Node::new(dir.path(), 2);
        node.open().await;
        node.write(5).await;
        node.stop(false).await;
        // All but the decision, twice, for different numbers.
        node.prepare(3).await;
        node.prepare(5).await;
        node.open().await;
        node.write(5).await;
        node.trim(PartitionId(3)).await;
        node.stop(false).await;
        // The families that the others left must not show through.
        let (layout, first) = node.prepare(3).await;
        let (_, second) = node.prepare(3).await;
        assert_eq!(first, second);
        node.layout = layout;
        node.open().await;
        node.stop(true).await;
    });
}

#[test]
fn old_stores_go_when_nothing_is_in_them_any_more() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let mut node = Node::new(dir.path(), 3);
        node.open().await;
        node.write(30).await;
        node.stop(true).await;
        node.layout = node.prepare(2).await.0;
        node.open().await;
        let old: Vec<PathBuf> = (0..3).map(|store| node.store_dir(StoreId(store))).collect();
        let segments = |dir: &Path| std::fs::read_dir(dir).map_or(0, |files| files.count());
        assert!(old.iter().all(|dir| 0 < segments(dir)));
        let foreign_live = |node: &Node| node.shards.iter().map(|s| s.store.figures().foreign_live_bytes).sum::<u64>();
        assert!(0 < foreign_live(&node));
        // All but one go: its segments stay, with those of all other partitions of the same store.
        for id in (2..11).map(PartitionId) {
            node.delete(id).await;
        }
        node.stop(true).await;
        node.open().await;
        assert!(old[0].exists());
        assert!(!old[1].exists() && !old[2].exists(), "nothing is left in them");
        assert_eq!(node.layout.draining, [StoreId(0)]);
        assert!(0 < foreign_live(&node));
        // The last goes while the node runs.
        node.delete(PartitionId(1)).await;
        node.ids = 11..21;
        node.write(40).await;
        while 0 < foreign_live(&node) {
            drava_runtime::time::sleep(Duration::from_millis(5)).await;
        }
        while old[0].exists() {
            drava_runtime::time::sleep(Duration::from_millis(5)).await;
        }
        node.stop(false).await;
        node.open().await;
        assert!(node.layout.draining.is_empty());
        node.stop(true).await;
    });
}

#[test]
fn a_lost_index_is_made_anew_from_the_new_stores_alone() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let mut node = Node::new(dir.path(), 2);
        node.open().await;
        node.write(12).await;
        node.trim(PartitionId(2)).await;
        node.stop(false).await;
        for shards in [3, 2] {
            node.layout = node.prepare(shards).await.0;
            // At once, and after something was written, trimmed and deleted.
            for round in 0..2 {
                std::fs::remove_dir_all(dir.path().join("index")).unwrap();
                // As the node does it: without the rows nobody can say what is in the old stores for nobody.
                assert!(node.index(&node.layout.stores).iter().all(|index| !index.is_made().unwrap()));
                node.open_with_holders(None).await;
                if round == 0 {
                    node.write(5).await;
                    node.trim(PartitionId(2 + u64::from(shards))).await;
                    node.delete(PartitionId(10 - u64::from(shards))).await;
                    node.ids = 1..7;
                }
                node.stop(round == 0).await;
                node.open().await;
                let foreign: u64 = node.shards.iter().map(|shard| shard.store.figures().foreign_live_bytes).sum();
                assert!(0 < foreign, "old messages are read where they lie");
                node.stop(round == 1).await;
            }
        }
    });
}

/// Its index names no segment yet: what it says of generations must not be taken for a place to write to.
#[test]
fn a_new_store_whose_header_is_lost_before_its_first_message_keeps_what_is_written_then() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let mut node = Node::with_an_empty_store(dir.path()).await;
        let empty = node.store_dir(node.layout.stores[1]);
        let segment = std::fs::read_dir(&empty).unwrap().next().unwrap().unwrap().path();
        let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 4096], 0).unwrap();
        node.ids = 1..3;
        node.open().await;
        node.write(3).await;
        node.stop(false).await;
        std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        node.open_with_holders(None).await;
        node.stop(true).await;
    });
}

/// Whoever reads it without an index would take the first block of a burst that is there for the first of all.
#[test]
fn a_new_store_without_rows_does_not_begin_with_a_burst() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let mut node = Node::with_an_empty_store(dir.path()).await;
        node.open().await;
        let empty = &node.shards[1];
        let slot = empty.store.open_partition(PartitionId(2), PartitionLimits::default());
        for seed in 0..4 {
            empty.append(slot, seed, 1, 40_000);
        }
        empty.flushed(4).await;
        let store_dir = node.store_dir(node.layout.stores[1]);
        node.stop(false).await;
        let is_burst =
            |kind: &ItemKind| matches!(kind, ItemKind::Block(h) if h.id.durable_sequence + 2 < h.id.sequence);
        assert!(!items_in(&store_dir, is_burst).is_empty(), "blocks were in flight beside one another");
        // The power went, and the first blocks of the burst had not come to the disk yet.
        let early = |kind: &ItemKind| matches!(kind, ItemKind::Block(h) if 1 < h.id.sequence && h.id.sequence < 4);
        for (path, position) in items_in(&store_dir, early) {
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &[0; 4096], position).unwrap();
        }
        std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        node.open_with_holders(None).await;
        let recovered = &node.shards[1].recovered;
        assert!(recovered.damaged.is_empty() && recovered.partitions.is_empty(), "{recovered:?}");
        node.stop(true).await;
    });
}

#[test]
fn what_follows_from_replayed_batches_is_kept_though_they_are_not_replayed_again() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let mut node = Node::new(dir.path(), 1);
        node.open().await;
        node.write(3).await;
        node.stop(false).await;
        let index = || node.index(&node.layout.stores).remove(0);
        let config = node.config(StoreId(0));
        let mut seen = 0;
        let derive = |found: &[drava_storage::RecoveredPartition], out: &mut drava_storage::StateBatch| {
            for partition in found {
                seen += partition.replayed.len();
                out.put(partition.partition, b"derived", &partition.replayed.len().to_le_bytes());
            }
        };
        reshard::seal(GlommioIo::new(), config.clone(), index(), derive).await.unwrap();
        assert_eq!(seen, 30);
        let (store, recovered) = Store::<_, u64>::open(GlommioIo::new(), config, index()).await.unwrap();
        for partition in &recovered.partitions {
            assert!(partition.replayed.is_empty());
            let derived = partition.state.iter().find(|(key, _)| key == b"derived");
            assert_eq!(derived.map(|(_, value)| &value[..]), Some(&3usize.to_le_bytes()[..]));
        }
        store.close().await;
    });
}
