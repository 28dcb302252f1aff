//! Segments of other stores: what a node keeps from before it was started with another number of shards.
//!
//! An old store is written no more; its extents are indexed by the shards that own their partitions now, and read where
//! they lie. Several shards may have extents in one segment, so no shard removes it: each says when it has none in it any
//! more, durably, and one task of the node ([`Drainer`]) removes segments that nobody has anything in, and in the end
//! the directory. A crash forgets what was said; the next start counts again ([`drain`]).

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use drava_runtime::foreign::{Inbox, InboxSender, inbox};

use crate::index::{ExtentRow, Index, IndexError};
use crate::io::Io;
use crate::segment::{self, SegmentId};
use crate::store::Inner;

/// Foreign segments kept open for readers.
const OPEN_MAX: usize = 32;

/// The number of a store in its node, never used again: it names the directory and the family of the index, and is in
/// the headers of the segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreId(pub u16);

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A segment of a store that drains.
pub type ForeignSegment = (StoreId, SegmentId);

/// What a shard is told of the stores that drain.
#[derive(Clone, Debug)]
pub struct ForeignStores {
    pub dirs: BTreeMap<StoreId, PathBuf>,
    /// Told of each segment that the shard has nothing in any more.
    pub emptied: InboxSender<ForeignSegment>,
}

/// The foreign segments of one shard.
pub(crate) struct Foreign<I: Io> {
    io: I,
    stores: Option<ForeignStores>,
    live_bytes: RefCell<BTreeMap<ForeignSegment, u64>>,
    /// Nothing is indexed in these, and a crash may still bring it back.
    emptied: RefCell<Vec<ForeignSegment>>,
    /// The last used at the end.
    opened: RefCell<VecDeque<(ForeignSegment, Rc<I::File>)>>,
}

impl<I: Io> Foreign<I> {
    pub(crate) fn new(io: I, stores: Option<ForeignStores>, live_bytes: BTreeMap<ForeignSegment, u64>) -> Foreign<I> {
        Foreign {
            io,
            stores,
            live_bytes: RefCell::new(live_bytes),
            emptied: RefCell::default(),
            opened: RefCell::default(),
        }
    }

    pub(crate) fn live_bytes(&self) -> u64 {
        self.live_bytes.borrow().values().sum()
    }

    /// The file of a segment, opened when it is not open.
    pub(crate) async fn file(&self, store: StoreId, segment: SegmentId) -> io::Result<Rc<I::File>> {
        let asked = (store, segment);
        {
            let mut opened = self.opened.borrow_mut();
            if let Some(at) = opened.iter().position(|(found, _)| *found == asked) {
                let entry = opened.remove(at).expect("found above");
                let file = entry.1.clone();
                opened.push_back(entry);
                return Ok(file);
            }
        }
        let dir = self.stores.as_ref().and_then(|stores| stores.dirs.get(&store));
        let dir = dir.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no store {store}")))?;
        let file = Rc::new(self.io.open(&segment::path(dir, segment)).await?);
        let mut opened = self.opened.borrow_mut();
        opened.push_back((asked, file.clone()));
        while OPEN_MAX < opened.len() {
            // Whoever reads from it holds a reference.
            opened.pop_front();
        }
        Ok(file)
    }

    /// These bytes are not indexed any more.
    pub(crate) fn release(&self, released: &[(ForeignSegment, u64)]) {
        let mut live = self.live_bytes.borrow_mut();
        for (segment, bytes) in released {
            let Some(left) = live.get_mut(segment) else { continue };
            *left = left.saturating_sub(*bytes);
            if *left == 0 {
                live.remove(segment);
                self.opened.borrow_mut().retain(|(opened, _)| opened != segment);
                self.emptied.borrow_mut().push(*segment);
            }
        }
    }

    /// What was released so far is durable in the index.
    pub(crate) fn flushed(&self) {
        let emptied = std::mem::take(&mut *self.emptied.borrow_mut());
        let Some(stores) = &self.stores else { return };
        for segment in emptied {
            if stores.emptied.send(segment).is_err() {
                // Nobody listens when the node stops: the next start counts.
                return;
            }
        }
    }
}

impl<I: Io, T: 'static> Inner<I, T> {
    /// The file that an extent lies in, opened when it is not open.
    pub(crate) async fn file_of(&self, row: &ExtentRow) -> io::Result<Rc<I::File>> {
        match row.store {
            None => self.journal.file(row.segment).await,
            Some(store) => self.foreign.file(store, row.segment).await,
        }
    }

    /// Of the own segment that an extent lies in. `None`: the segment is gone, or is another store's.
    pub(crate) fn generation_of(&self, row: &ExtentRow) -> Option<u64> {
        if row.store.is_some() { None } else { self.journal.generation(row.segment) }
    }
}

/// How many shards have live extents in each foreign segment.
pub type Holders = BTreeMap<ForeignSegment, usize>;

/// Counts over the families of all shards. Blocking.
pub fn holders(indexes: &[Index]) -> Result<Holders, IndexError> {
    let mut holders = Holders::new();
    for index in indexes {
        for segment in index.foreign()?.into_keys() {
            *holders.entry(segment).or_default() += 1;
        }
    }
    Ok(holders)
}

/// What [`drain`] found.
#[derive(Debug)]
pub struct Drained<I> {
    /// What the shards need, and what goes on removing; without stores that are left there is nothing to do.
    pub left: Option<(ForeignStores, Drainer<I>)>,
    /// Stores that are gone, durably: they need not be named any more.
    pub gone: Vec<StoreId>,
}

/// Removes what shards let go of. One for the node.
#[derive(Debug)]
pub struct Drainer<I> {
    io: I,
    dirs: BTreeMap<StoreId, PathBuf>,
    holders: Holders,
    emptied: Inbox<ForeignSegment>,
}

/// Removes what nobody holds from the directories of old stores.
pub async fn drain<I: Io>(io: &I, mut dirs: BTreeMap<StoreId, PathBuf>, holders: Holders) -> io::Result<Drained<I>> {
    let mut gone = Vec::new();
    for (&store, dir) in &dirs {
        remove_unheld(io, store, dir, &holders).await?;
        if remove_if_empty(io, store, dir, &holders).await {
            // Nobody asks for its files again: were the power to bring one back, it would stay for ever.
            if let Some(parent) = dir.parent() {
                io.sync_dir(parent).await?;
            }
            gone.push(store);
        }
    }
    dirs.retain(|store, _| !gone.contains(store));
    if dirs.is_empty() {
        return Ok(Drained { left: None, gone });
    }
    let (sender, emptied) = inbox();
    let stores = ForeignStores { dirs: dirs.clone(), emptied: sender };
    Ok(Drained { left: Some((stores, Drainer { io: io.clone(), dirs, holders, emptied })), gone })
}

impl<I: Io> Drainer<I> {
    /// Removes until the last shard is gone.
    pub async fn run(mut self) {
        while let Some(segment) = self.emptied.recv().await {
            let Some(count) = self.holders.get_mut(&segment) else { continue };
            *count -= 1;
            if *count != 0 && !cfg!(feature = "mutant-drain-shared") {
                continue;
            }
            self.holders.remove(&segment);
            let (store, id) = segment;
            let Some(dir) = self.dirs.get(&store) else { continue };
            if let Err(error) = remove_file(&self.io, &segment::path(dir, id)).await {
                tracing::warn!(%store, segment = id.0, %error, "an empty segment of an old store could not be removed");
            }
            if remove_if_empty(&self.io, store, dir, &self.holders).await {
                tracing::info!(%store, "an old store is drained; its directory is gone");
            }
        }
    }
}

async fn remove_unheld(io: &impl Io, store: StoreId, dir: &Path, holders: &Holders) -> io::Result<()> {
    let files = match io.list(dir).await {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for (path, _) in files {
        if segment::parse_name(&path).is_some_and(|id| !holders.contains_key(&(store, id))) {
            remove_file(io, &path).await?;
        }
    }
    Ok(())
}

async fn remove_if_empty(io: &impl Io, store: StoreId, dir: &Path, holders: &Holders) -> bool {
    if holders.range((store, SegmentId(0))..=(store, SegmentId(u32::MAX))).next().is_some() {
        return false;
    }
    match io.remove_dir(dir).await {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => {
            // Somebody put files of theirs there.
            tracing::warn!(%store, dir = %dir.display(), %error, "the directory of a drained store could not be removed");
            false
        }
    }
}

async fn remove_file(io: &impl Io, path: &Path) -> io::Result<()> {
    match io.remove(path).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
