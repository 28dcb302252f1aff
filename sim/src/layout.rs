//! The stores of the simulated node, and the steps to another number of shards: those of the node's start, in its order,
//! each of which may be the last before a crash. What `format.json` says is one value here that changes at once.

use std::collections::BTreeMap;
use std::path::PathBuf;

use drava_protocol::{PartitionId, ShardId};
use drava_storage::{ForeignStores, StoreConfig, StoreId};

use crate::world::World;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// By shard.
    pub stores: Vec<StoreId>,
    pub draining: Vec<StoreId>,
    next: u16,
}

impl Layout {
    pub fn new(shards: u16) -> Layout {
        Layout { stores: (0..shards).map(StoreId).collect(), draining: Vec::new(), next: shards }
    }

    /// New stores for all shards; those of today drain.
    pub fn followed_by(&self, shards: u16) -> Layout {
        let next = self.next + shards;
        let draining = self.draining.iter().chain(&self.stores).copied().collect();
        Layout { stores: (self.next..next).map(StoreId).collect(), draining, next }
    }

    pub fn shards(&self) -> usize {
        self.stores.len()
    }

    pub fn shard_of(&self, partition: PartitionId) -> usize {
        (partition.0 % self.stores.len() as u64) as usize
    }

    /// What a store is told of those that drain, while nobody hears what it lets go of.
    pub fn unheard(&self) -> Option<ForeignStores> {
        let (emptied, _) = drava_runtime::foreign::inbox();
        Some(ForeignStores { dirs: dirs(&self.draining), emptied }).filter(|stores| !stores.dirs.is_empty())
    }

    /// Removes what a start that was cut short left in the directories of stores that were not decided for.
    pub fn remove_undecided(&self, world: &World) {
        let known = dirs(&self.stores).into_values().chain(dirs(&self.draining).into_values());
        let known: Vec<PathBuf> = known.collect();
        for (path, _) in world.disk.files() {
            let Some(dir) = path.parent().filter(|dir| !known.iter().any(|known| known == dir)) else { continue };
            world.event(format_args!("remove {}, which was not decided for", path.display()));
            world.disk.remove(&path);
            world.disk.sync_dir(dir);
        }
    }
}

pub fn dir(store: StoreId) -> PathBuf {
    PathBuf::from(format!("shard-{:03}", store.0))
}

pub fn dirs(stores: &[StoreId]) -> BTreeMap<StoreId, PathBuf> {
    stores.iter().map(|store| (*store, dir(*store))).collect()
}

/// The configuration of one store.
pub fn config_of(config: &StoreConfig, store: StoreId, foreign: Option<ForeignStores>) -> StoreConfig {
    StoreConfig { dir: dir(store), shard: ShardId(store.0), foreign, ..config.clone() }
}
