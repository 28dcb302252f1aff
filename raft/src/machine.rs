//! The state machine as openraft drives it: entries in, snapshots out and in.
//!
//! The state lives in memory. At a start it is the snapshot on disk plus the committed entries after it; so a snapshot
//! is durable before openraft hears of it, because openraft then purges the entries that it replaces.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use drava_runtime::local::Broadcast;
use futures_util::{Stream, TryStreamExt};
use openraft::RaftSnapshotBuilder;
use openraft::storage::RaftStateMachine;
use openraft_rt::Mutex as _;

use crate::disk::MetaDisk;
use crate::image::Image;
use crate::runtime::LocalMutex;
use crate::snapshot;
use crate::state::State;
use crate::types::{
    EntryPayload, EntryResponder, LogId, Response, Snapshot, SnapshotData, SnapshotMeta, StoredMembership, TypeConfig,
};

/// Clones are the same machine.
#[derive(Clone)]
pub struct Machine(Rc<Inner>);

struct Inner {
    state: RefCell<State>,
    applied: Cell<Option<LogId>>,
    membership: RefCell<StoredMembership>,
    changed: Broadcast,
    disk: Rc<dyn MetaDisk>,
    /// How far the snapshot on disk reaches. Locked while one is written.
    saved: LocalMutex<Option<LogId>>,
}

impl Machine {
    pub fn new(disk: Rc<dyn MetaDisk>) -> Machine {
        Machine(Rc::new(Inner {
            state: RefCell::default(),
            applied: Cell::new(None),
            membership: RefCell::default(),
            changed: Broadcast::default(),
            disk,
            saved: LocalMutex::new(None),
        }))
    }

    pub fn image(&self) -> Arc<Image> {
        self.0.state.borrow().image().clone()
    }

    /// The image, once it is newer than `seen`.
    pub async fn image_after(&self, seen: u64) -> Arc<Image> {
        loop {
            let version = self.0.changed.version();
            let image = self.image();
            if seen < image.version {
                return image;
            }
            drop(image);
            self.0.changed.changed(version).await;
        }
    }

    /// Replaces the snapshot on disk, unless that one reaches as far.
    async fn save(&self, meta: &SnapshotMeta, data: &[u8]) -> io::Result<()> {
        let mut saved = self.0.saved.lock().await;
        if meta.last_log_id <= *saved {
            return Ok(());
        }
        self.0.disk.save_snapshot(snapshot::encode(meta, data)).await?;
        *saved = meta.last_log_id;
        Ok(())
    }
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A state to be written, as it was when the snapshot was begun.
pub struct SnapshotBuilder {
    machine: Machine,
    state: State,
    meta: SnapshotMeta,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let data = self.state.encode();
        self.machine.save(&self.meta, &data).await?;
        Ok(Snapshot { meta: self.meta.clone(), snapshot: Rc::new(data) })
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.0.applied.get(), self.0.membership.borrow().clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder, io::Error>> + Unpin,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let before = self.0.state.borrow().image().version;
            let outcome = match entry.payload {
                EntryPayload::Blank => None,
                EntryPayload::Normal(command) => Some(self.0.state.borrow_mut().apply(&command)),
                EntryPayload::Membership(membership) => {
                    *self.0.membership.borrow_mut() = StoredMembership::new(Some(entry.log_id), membership);
                    None
                }
            };
            self.0.applied.set(Some(entry.log_id));
            if before != self.0.state.borrow().image().version {
                self.0.changed.notify_all();
            }
            if let Some(responder) = responder {
                responder.send(Response(outcome));
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        let last_membership = self.0.membership.borrow().clone();
        let meta = SnapshotMeta { last_log_id: self.0.applied.get(), last_membership };
        SnapshotBuilder { machine: self.clone(), state: self.0.state.borrow().clone(), meta }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, data: SnapshotData) -> Result<(), io::Error> {
        let state = State::decode(&data).map_err(invalid)?;
        self.save(meta, &data).await?;
        *self.0.state.borrow_mut() = state;
        self.0.applied.set(meta.last_log_id);
        *self.0.membership.borrow_mut() = meta.last_membership.clone();
        self.0.changed.notify_all();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let mut saved = self.0.saved.lock().await;
        let Some(file) = self.0.disk.load_snapshot().await? else { return Ok(None) };
        let decoded = snapshot::decode(&file).map_err(invalid)?;
        *saved = decoded.meta.last_log_id;
        Ok(Some(Snapshot { meta: decoded.meta, snapshot: decoded.data }))
    }
}
