//! Another number of shards: the rows of the index go to the shards that own their partitions now. Offline.
//!
//! 1. [`seal`] recovers each old store with its family, so that all of its journal is in the index, durably.
//! 2. [`move_rows`] copies the rows of the old families to new ones, those of a partition to the family of its owner.
//!    Extents say from then on in which store they lie. It starts with empty families and flushes them at the end.
//! 3. [`anchor`] repeats in the journal of each new store what its family has: were the families lost a moment after the
//!    decision, the new journals would be enough to make them anew, as they are at any other time.
//! 4. The caller decides, in one write of its own, that the new stores are the stores of the node. Before that write the
//!    new families and directories are nothing, and after it the old families: whoever opens the index drops what it is
//!    not told to open ([`crate::IndexDb::open_stores`]). So a crash anywhere is a start over, or done.
//!
//! No message is copied. The old segments are read where they lie, and go when nothing in them is indexed any more
//! ([`crate::foreign`]).

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::rc::Rc;

use drava_protocol::PartitionId;

use crate::foreign::{ForeignSegment, StoreId};
use crate::index::kv::KvBatch;
use crate::index::{Covered, Index, IndexError, MovedRow};
use crate::io::Io;
use crate::journal::JournalEnd;
use crate::state::StateBatch;
use crate::store::{FlushError, FlushSink, OpenError, Recovered, RecoveredPartition, Store, StoreConfig};

/// What is gathered for a family before it is written.
const BATCH_BYTES: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ReshardError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("close the journal: {0}")]
    Seal(#[from] FlushError),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("store {0} was not closed in good order")]
    NotSealed(StoreId),
    #[error("there is no room for what the journal of a new store begins with, or it could not be written")]
    NotAnchored,
}

/// What [`move_rows`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    pub partitions: u64,
    pub extents: u64,
}

/// Recovers a store and closes it: its index has all that its journal has. `derive` as in [`Store::open_with`].
pub async fn seal<I: Io>(
    io: I,
    config: StoreConfig,
    index: Index,
    derive: impl FnOnce(&[RecoveredPartition], &mut StateBatch),
) -> Result<Recovered, ReshardError> {
    let (store, recovered) = Store::<I, ()>::open_with(io, config, index, derive).await?;
    let sealed = store.seal().await;
    store.close().await;
    sealed?;
    Ok(recovered)
}

/// Copies all rows of the old stores' families to those of the new ones, which are empty. `shard_of` gives the place in
/// `new` of a partition. Memory is bounded by the batches, not by the rows. Blocking.
pub fn move_rows(
    old: &[(StoreId, Index)],
    new: &mut [Index],
    shard_of: &dyn Fn(PartitionId) -> usize,
) -> Result<Moved, ReshardError> {
    let mut targets: Vec<Target<'_>> = new.iter_mut().map(Target::new).collect();
    let mut partitions = BTreeSet::new();
    let mut moved = Moved::default();
    let mut damages = 0;
    let mut end = JournalEnd::default();
    for (store, index) in old {
        let covered = index.covered()?.filter(|covered| covered.sealed).ok_or(ReshardError::NotSealed(*store))?;
        // Readers know blocks by their sequence: what is written from here on has none that an old block has.
        end.next_sequence = end.next_sequence.max(covered.end.next_sequence);
        end.generation = end.generation.max(covered.end.generation);
        let mut failed = None;
        index.kv.scan(&[], &mut |key, value| {
            let taken = MovedRow::decode(*store, key, value, &mut damages).and_then(|row| {
                let Some(row) = row else { return Ok(()) };
                partitions.insert(row.partition);
                moved.extents += u64::from(row.extent.is_some());
                targets[shard_of(row.partition)].take(row)
            });
            match taken {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
    }
    for target in targets {
        // A store without rows begins like any new one: with block 1, before which nothing can be missing.
        let end = if target.is_empty { JournalEnd::default() } else { end };
        target.finish(Covered { end, sealed: false })?;
    }
    moved.partitions = partitions.len() as u64;
    Ok(moved)
}

/// Writes a checkpoint of its family to the journal of a new store, and closes it: from here on the journal is enough
/// to make the family anew. The directory is there.
pub async fn anchor<I: Io>(io: I, config: StoreConfig, index: Index) -> Result<(), ReshardError> {
    let (store, _) = Store::<I, ()>::open(io, config, index).await?;
    store.start(Rc::new(RefCell::new(NoSink)));
    let anchored = cfg!(feature = "mutant-no-anchor") || store.begin_journal().await;
    let sealed = store.seal().await;
    store.close().await;
    sealed?;
    if anchored { Ok(()) } else { Err(ReshardError::NotAnchored) }
}

/// Nobody waits for a checkpoint's rows but the checkpoint itself.
struct NoSink;

impl FlushSink<()> for NoSink {
    fn flushed(&mut self, tokens: &mut Vec<()>) {
        tokens.clear();
    }

    fn failed(&mut self, tokens: &mut Vec<()>, _error: &FlushError) {
        tokens.clear();
    }

    fn collect_state(&mut self, _out: &mut StateBatch) {}
}

/// A family that takes rows.
struct Target<'a> {
    index: &'a mut Index,
    batch: KvBatch,
    batch_bytes: usize,
    live_bytes: BTreeMap<ForeignSegment, u64>,
    is_empty: bool,
}

impl<'a> Target<'a> {
    fn new(index: &'a mut Index) -> Target<'a> {
        Target { index, batch: KvBatch::default(), batch_bytes: 0, live_bytes: BTreeMap::new(), is_empty: true }
    }

    fn take(&mut self, row: MovedRow) -> Result<(), IndexError> {
        self.is_empty = false;
        if let Some((segment, bytes)) = row.extent {
            *self.live_bytes.entry(segment).or_default() += bytes;
        }
        self.batch_bytes += row.key.len() + row.value.len();
        self.batch.put(row.key, row.value);
        if self.batch_bytes < BATCH_BYTES {
            return Ok(());
        }
        self.batch_bytes = 0;
        self.index.kv.write(std::mem::take(&mut self.batch))
    }

    fn finish(mut self, covered: Covered) -> Result<(), IndexError> {
        for (&segment, &bytes) in &self.live_bytes {
            self.index.put_foreign(&mut self.batch, segment, bytes);
        }
        // The family counts as one from here on: it says where its journal begins.
        self.index.put_covered(&mut self.batch, covered);
        self.index.kv.write(self.batch)?;
        self.index.kv.flush()
    }
}
