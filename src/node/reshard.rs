//! Bringing a data directory to the number of shards of this start.
//!
//! 1. [`seal`]: each store of today is recovered, so that its index has all that its journal has.
//! 2. [`copy`]: the rows of the index go to families of new stores, by the shards that own the partitions now.
//! 3. [`DataDir::prepare`]: the directories of the new stores are made.
//! 4. [`anchor`]: the journals of the new stores repeat what their families have, so that these can be lost.
//! 5. [`DataDir::set_layout`]: `format.json` is replaced. That is the decision.
//!
//! A start that is cut short before the decision has changed nothing: what it left is dropped by the next, which begins
//! again, with whatever number of shards. One that is cut short after it is done: what is left of the old families is
//! dropped when the index is opened. The metadata follows when the node makes itself known in the group
//! ([`drava_raft::shard_of`]), by the same rule.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use drava_runtime::{Executor, ExecutorConfig};
use drava_storage::foreign::Drained;
use drava_storage::reshard::Moved;
use drava_storage::{ForeignStores, GlommioIo, Index, IndexDb, IndexError, StoreConfig, StoreId, foreign, reshard};
use futures_lite::future::block_on;

use super::boot::store_config;
use super::data_dir::{DataDir, DataDirError, Layout};
use crate::config::NodeConfig;
use crate::shard::derive_producers;

#[derive(Debug, thiserror::Error)]
pub enum ReshardError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("the index in {}: {source}", path.display())]
    Index { path: PathBuf, source: IndexError },
    #[error("store {store} cannot be closed for another number of shards: {source}")]
    Seal { store: StoreId, source: reshard::ReshardError },
    #[error("store {store} cannot begin its journal: {source}")]
    Anchor { store: StoreId, source: reshard::ReshardError },
    #[error("the executor for store {store} did not start: {source}")]
    Executor { store: StoreId, source: std::io::Error },
    #[error("the index in {} cannot follow the number of shards: {source}", path.display())]
    Move { path: PathBuf, source: reshard::ReshardError },
    #[error("what drains in {}: {source}", path.display())]
    Drain { path: PathBuf, source: std::io::Error },
}

/// What was done.
#[derive(Clone, Copy, Debug)]
pub struct Resharded {
    pub from: usize,
    pub to: usize,
    pub moved: Moved,
    pub took: Duration,
}

impl fmt::Display for Resharded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Moved { extents, partitions } = self.moved;
        let took = self.took.as_secs_f64();
        write!(
            f,
            "resharded {} → {}: moved {extents} extents of {partitions} partitions in {took:.1} s",
            self.from, self.to
        )
    }
}

/// Gives the directory as many stores as there are shards. `None`: it has them.
pub fn follow(config: &NodeConfig, data_dir: &mut DataDir) -> Result<Option<Resharded>, ReshardError> {
    let (from, to) = (data_dir.stores().count(), usize::from(config.shards));
    if from == to {
        return Ok(None);
    }
    tracing::info!("resharding {from} → {to}");
    let began = Instant::now();
    let layout = data_dir.layout_for(config.shards)?;
    seal(config, data_dir)?;
    let moved = copy(data_dir, &layout)?;
    data_dir.prepare(&layout)?;
    anchor(config, data_dir, &layout)?;
    data_dir.set_layout(layout)?;
    Ok(Some(Resharded { from, to, moved, took: began.elapsed() }))
}

/// The families of these stores, in their order. All others are dropped.
pub fn indexes(data_dir: &DataDir, stores: &[StoreId]) -> Result<Vec<Index>, ReshardError> {
    let path = data_dir.index();
    let db = IndexDb::open_stores(&path, stores).map_err(|source| ReshardError::Index { path, source })?;
    Ok(stores.iter().map(|store| db.store(*store)).collect())
}

/// Removes what nobody has messages in from the stores that drain, and goes on removing on a thread while shards let go;
/// gives what the shards need to read the rest.
pub fn drain(data_dir: &mut DataDir, indexes: &[Index]) -> Result<Option<ForeignStores>, ReshardError> {
    let dirs = draining(data_dir);
    if dirs.is_empty() {
        return Ok(None);
    }
    let path = data_dir.index();
    let failed = |source| ReshardError::Index { path: path.clone(), source };
    for index in indexes {
        if !index.is_made().map_err(failed)? {
            // It is made anew from its journal first. Counting on it now would say that nobody has anything in the old stores.
            tracing::warn!(?index, "an index is lost; old stores are not tidied up before the next start");
            return Ok(Some(unheard(dirs)));
        }
    }
    let holders = foreign::holders(indexes).map_err(failed)?;
    let path = data_dir.path().to_owned();
    let failed = |source| ReshardError::Drain { path: path.clone(), source };
    let Drained { left, gone } = block_on(foreign::drain(&GlommioIo::new(), dirs, holders)).map_err(failed)?;
    if !gone.is_empty() {
        let mut layout = data_dir.format().layout.clone();
        layout.draining.retain(|store| !gone.contains(&StoreId(*store)));
        data_dir.set_layout(layout)?;
    }
    let Some((foreign, drainer)) = left else { return Ok(None) };
    // It ends with the last shard.
    let thread = std::thread::Builder::new().name("drain".to_owned());
    thread.spawn(move || block_on(drainer.run())).map_err(failed)?;
    Ok(Some(foreign))
}

/// Old stores of which nothing is removed: nobody hears what shards let go of.
fn unheard(dirs: BTreeMap<StoreId, PathBuf>) -> ForeignStores {
    let (emptied, _) = drava_runtime::foreign::inbox();
    ForeignStores { dirs, emptied }
}

fn draining(data_dir: &DataDir) -> BTreeMap<StoreId, PathBuf> {
    data_dir.draining().map(|store| (store, data_dir.store(store))).collect()
}

/// Recovers the stores of today, one after the other.
fn seal(config: &NodeConfig, data_dir: &DataDir) -> Result<(), ReshardError> {
    let stores: Vec<StoreId> = data_dir.stores().collect();
    // Nothing is removed from older stores before the decision.
    let foreign = Some(draining(data_dir)).filter(|dirs| !dirs.is_empty()).map(unheard);
    for (&store, index) in stores.iter().zip(indexes(data_dir, &stores)?) {
        let store_config = StoreConfig { foreign: foreign.clone(), ..store_config(config, data_dir, store) };
        let seal = move || reshard::seal(GlommioIo::new(), store_config, index, derive_producers);
        let sealed = on_executor(seal).map_err(|source| ReshardError::Executor { store, source })?;
        let recovered = sealed.map_err(|source| ReshardError::Seal { store, source })?;
        for range in recovered.damaged {
            tracing::error!(%store, ?range, "part of the journal is damaged and quarantined; the rest is served");
        }
    }
    Ok(())
}

/// Begins the journals of the new stores, one after the other.
fn anchor(config: &NodeConfig, data_dir: &DataDir, layout: &Layout) -> Result<(), ReshardError> {
    let stores: Vec<StoreId> = layout.stores.iter().copied().map(StoreId).collect();
    // The old ones too: until the decision they are what there is.
    let old = data_dir.stores().count();
    let all: Vec<StoreId> = data_dir.stores().chain(stores.iter().copied()).collect();
    let dirs: BTreeMap<_, _> =
        data_dir.draining().chain(data_dir.stores()).map(|store| (store, data_dir.store(store))).collect();
    let foreign = Some(unheard(dirs));
    for (&store, index) in stores.iter().zip(indexes(data_dir, &all)?.into_iter().skip(old)) {
        let store_config = StoreConfig { foreign: foreign.clone(), ..store_config(config, data_dir, store) };
        let anchor = move || reshard::anchor(GlommioIo::new(), store_config, index);
        let anchored = on_executor(anchor).map_err(|source| ReshardError::Executor { store, source })?;
        anchored.map_err(|source| ReshardError::Anchor { store, source })?;
    }
    Ok(())
}

/// Runs one step on a thread of its own, to its end.
fn on_executor<T: Send + 'static, F: Future<Output = T> + 'static>(
    step: impl FnOnce() -> F + Send + 'static,
) -> std::io::Result<T> {
    Executor::start(ExecutorConfig::new("reshard", None), step)?.join()
}

/// Copies the rows of the stores of today to new families.
fn copy(data_dir: &DataDir, layout: &Layout) -> Result<Moved, ReshardError> {
    let old: Vec<StoreId> = data_dir.stores().collect();
    // Without the new ones first: what a start that was cut short left in them is dropped.
    drop(indexes(data_dir, &old)?);
    let new = layout.stores.iter().copied().map(StoreId);
    let all: Vec<StoreId> = old.iter().copied().chain(new).collect();
    let mut from = indexes(data_dir, &all)?;
    let mut to = from.split_off(old.len());
    let from: Vec<(StoreId, Index)> = old.into_iter().zip(from).collect();
    let shards = layout.stores.len() as u16;
    let shard_of = |partition| usize::from(drava_raft::shard_of(partition, shards).0);
    reshard::move_rows(&from, &mut to, &shard_of)
        .map_err(|source| ReshardError::Move { path: data_dir.index(), source })
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;

    /// Runs the steps one after the other until `stop` says to stop before the next.
    fn follow_until(config: &NodeConfig, dir: &mut DataDir, mut stop: impl FnMut() -> bool) -> ControlFlow<()> {
        let mut next = || if stop() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let layout = dir.layout_for(config.shards).unwrap();
        next()?;
        seal(config, dir).unwrap();
        next()?;
        copy(dir, &layout).unwrap();
        next()?;
        dir.prepare(&layout).unwrap();
        next()?;
        anchor(config, dir, &layout).unwrap();
        next()?;
        dir.set_layout(layout).unwrap();
        next()?;
        drop(indexes(dir, &dir.stores().collect::<Vec<_>>()).unwrap());
        next()
    }

    fn config(dir: &std::path::Path, shards: u16) -> NodeConfig {
        let mut config = NodeConfig { data_dir: dir.join("data"), shards, ..NodeConfig::default() };
        config.storage.segment_bytes = 4 << 20;
        config.storage.disk_reserve_bytes = 0;
        config
    }

    /// What a start would find: that all stores have an index that can be relied on, and the old ones what they had.
    fn check(dir: &mut DataDir, shards: usize) {
        let stores: Vec<StoreId> = dir.stores().collect();
        assert_eq!(stores.len(), shards);
        let indexes = indexes(dir, &stores).unwrap();
        assert!(indexes.iter().all(|index| index.is_made().unwrap()));
        assert!(stores.iter().all(|store| dir.store(*store).is_dir()));
        drain(dir, &indexes).unwrap();
    }

    #[test]
    fn a_start_cut_short_at_any_step_is_begun_again_or_done() {
        for steps in 0..7 {
            for next_shards in [2, 3, 1] {
                let folder = tempfile::tempdir().unwrap();
                let made = config(folder.path(), 2);
                let mut dir = DataDir::open(&made).unwrap();
                seal(&made, &dir).unwrap();
                check(&mut dir, 2);
                let mut left = steps;
                let cut = follow_until(&config(folder.path(), 3), &mut dir, || {
                    left -= 1;
                    left < 0
                });
                assert_eq!(cut, ControlFlow::Break(()));
                drop(dir);

                let config = config(folder.path(), next_shards);
                let mut dir = DataDir::open(&config).unwrap();
                let found = dir.stores().count();
                assert_eq!(found, if steps <= 4 { 2 } else { 3 }, "the layout decides, {steps} steps were taken");
                let resharded = follow(&config, &mut dir).unwrap();
                assert_eq!(resharded.is_some(), found != usize::from(next_shards));
                check(&mut dir, usize::from(next_shards));
                // Nothing was ever written: the stores of before are gone at once.
                assert_eq!(dir.draining().count(), 0);
                let folders = std::fs::read_dir(dir.path()).unwrap();
                let folders =
                    folders.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("shard-"));
                assert_eq!(folders.count(), usize::from(next_shards), "after {steps} steps, with {next_shards}");
            }
        }
    }
}
