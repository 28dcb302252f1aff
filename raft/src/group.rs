//! The metadata group as the control core uses it.
//!
//! 1. [`MetadataGroup::start`] reads the snapshot and the log, checks that they belong together, and starts raft; a new
//!    group is made with this node as its one member.
//! 2. As the one member of the group it is elected at once, and everything in its log is applied before `start` returns.
//! 3. [`MetadataGroup::propose`] writes a command to the log, waits until it is durable and applied, and returns what
//!    it did. [`MetadataGroup::image`] is the result of all that were applied.
//!
//! When raft stops by itself (a write failed, or it panicked), nothing can be proposed any more, and
//! [`MetadataGroup::failed`] says so: the node stops on purpose.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use drava_protocol::{ErrorCode, NodeId};
use openraft::errors::{ClientWriteError, Fatal, InitializeError, RaftError};
use openraft::raft::ReadPolicy;
use openraft::{BasicNode, Config, ServerState, SnapshotPolicy};
use openraft_rt::{AsyncRuntime, WatchReceiver};

use crate::command::{Applied, Command, Rejected};
use crate::disk::MetaDisk;
use crate::image::Image;
use crate::log_store::{LogStore, ReplayError};
use crate::machine::Machine;
use crate::network::NoPeers;
use crate::runtime::LocalRuntime;
use crate::snapshot::{self, SnapshotError};
use crate::types::TypeConfig;

type Raft = openraft::Raft<TypeConfig, Machine>;

#[derive(Clone, Debug)]
pub struct GroupConfig {
    pub node: NodeId,
    /// Entries since the last snapshot that cause the next one. It bounds the log, and the time to read it at a start.
    pub snapshot_entries: u64,
    /// Entries before a snapshot that stay in the log, so that a member who lags a little needs no snapshot.
    pub kept_entries: u64,
    /// How often a leader makes itself heard. An election takes 2 to 4 times as long.
    pub heartbeat: Duration,
    /// How long a proposal may take before its proposer is told that its fate is unknown.
    pub propose_timeout: Duration,
    /// How long a start may take from the election on.
    pub start_timeout: Duration,
}

impl GroupConfig {
    pub fn new(node: NodeId) -> GroupConfig {
        GroupConfig {
            node,
            snapshot_entries: 5000,
            kept_entries: 500,
            heartbeat: Duration::from_millis(500),
            propose_timeout: Duration::from_secs(10),
            start_timeout: Duration::from_secs(30),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("read the metadata snapshot: {0}")]
    ReadSnapshot(#[source] std::io::Error),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Replay(#[from] ReplayError),
    #[error("the metadata log begins after entry {purged}, and the snapshot reaches to {snapshot:?}: metadata is lost")]
    SnapshotMissing { purged: u64, snapshot: Option<u64> },
    #[error("the metadata on this disk belongs to the group of {members:?}, and this is node {node}")]
    OtherNode { node: NodeId, members: Vec<u64> },
    #[error("the configuration of the metadata group: {0}")]
    Config(String),
    #[error("the metadata group did not start: {0}")]
    Raft(String),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    #[error(transparent)]
    Rejected(#[from] Rejected),
    #[error("the metadata group has no leader here now; topics cannot be changed, data goes on")]
    NoLeader,
    #[error("the metadata group did not answer within {0:?}; the change may still be made")]
    TimedOut(Duration),
    #[error("the metadata group changed its leader; the change may or may not have been made")]
    Unknown,
    #[error("the metadata group has been shut down")]
    ShutDown,
    #[error(transparent)]
    Failed(#[from] GroupFailed),
}

impl ProposeError {
    /// What the client is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            ProposeError::Rejected(rejected) => rejected.code(),
            ProposeError::NoLeader | ProposeError::TimedOut(_) | ProposeError::Unknown => {
                ErrorCode::MetadataUnavailable
            }
            ProposeError::ShutDown => ErrorCode::ShuttingDown,
            ProposeError::Failed(_) => ErrorCode::Internal,
        }
    }
}

/// Raft stopped by itself. Nothing was acknowledged that is not on disk; what was under way is unknown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the metadata group failed: {reason}")]
pub struct GroupFailed {
    pub reason: String,
}

/// Clones are the same group. Lives on one executor.
#[derive(Clone)]
pub struct MetadataGroup(Rc<Group>);

struct Group {
    raft: Raft,
    machine: Machine,
    log: LogStore,
    disk: Rc<dyn MetaDisk>,
    config: GroupConfig,
}

impl MetadataGroup {
    /// Starts the group that a disk holds, or a new one of this node alone on an empty disk.
    pub async fn start(config: GroupConfig, disk: Rc<dyn MetaDisk>) -> Result<MetadataGroup, StartError> {
        let snapshot = match disk.load_snapshot().await.map_err(StartError::ReadSnapshot)? {
            Some(file) => Some(snapshot::check(&file)?),
            None => None,
        };
        let snapshot = snapshot.and_then(|meta| meta.last_log_id).map(|id| id.index());
        let log = LogStore::open(disk.clone()).await?;
        if let Some(purged) = log.purged().map(|id| id.index())
            && snapshot.is_none_or(|snapshot| snapshot < purged)
        {
            return Err(StartError::SnapshotMissing { purged, snapshot });
        }

        let machine = Machine::new(disk.clone());
        let raft_config =
            Arc::new(raft_config(&config).validate().map_err(|error| StartError::Config(error.to_string()))?);
        let raft = Raft::new(config.node.0, raft_config, NoPeers, log.clone(), machine.clone())
            .await
            .map_err(|error| StartError::Raft(error.to_string()))?;
        let group = MetadataGroup(Rc::new(Group { raft, machine, log, disk, config }));
        match group.take_part().await {
            Ok(()) => Ok(group),
            Err(error) => {
                group.shutdown().await;
                Err(error)
            }
        }
    }

    /// Makes the group if it is new; as its only member, leads it and applies all that its log holds.
    async fn take_part(&self) -> Result<(), StartError> {
        let Group { raft, config, .. } = &*self.0;
        let node = config.node;
        let failed = |error: &dyn std::fmt::Display| StartError::Raft(error.to_string());
        if !raft.is_initialized().await.map_err(|error| failed(&error))? {
            let members = BTreeMap::from([(node.0, BasicNode::default())]);
            match raft.initialize(members).await {
                Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        let members: Vec<u64> = raft
            .with_raft_state(|state| state.membership_state.effective().voter_ids().collect())
            .await
            .map_err(|error| failed(&error))?;
        if !members.contains(&node.0) {
            return Err(StartError::OtherNode { node, members });
        }
        if members.len() == 1 {
            if !raft.is_leader() {
                // Nobody else can be elected, so there is nobody to wait for.
                raft.trigger().elect(false).await.map_err(|error| failed(&error))?;
            }
            raft.wait(Some(config.start_timeout))
                .state(ServerState::Leader, "the only member leads")
                .await
                .map_err(|error| failed(&error))?;
            raft.ensure_linearizable(ReadPolicy::ReadIndex).await.map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    /// Returns once the command is durable and applied here.
    pub async fn propose(&self, command: Command) -> Result<Applied, ProposeError> {
        let timeout = self.0.config.propose_timeout;
        let written = match LocalRuntime::timeout(timeout, self.0.raft.client_write(command)).await {
            Ok(written) => written,
            Err(_) => return Err(ProposeError::TimedOut(timeout)),
        };
        match written {
            Ok(written) => {
                let outcome = written.data.0.expect("a command has an outcome; only raft's own entries have none");
                Ok(outcome?)
            }
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Err(ProposeError::NoLeader),
            Err(RaftError::APIError(_)) => Err(ProposeError::Unknown),
            Err(RaftError::Fatal(Fatal::Stopped)) => Err(ProposeError::ShutDown),
            Err(RaftError::Fatal(fatal)) => Err(GroupFailed { reason: fatal.to_string() }.into()),
        }
    }

    /// The result of all commands applied so far.
    pub fn image(&self) -> Arc<Image> {
        self.0.machine.image()
    }

    /// The newest image, once it is newer than version `seen`. Images between may be skipped.
    pub async fn image_after(&self, seen: u64) -> Arc<Image> {
        self.0.machine.image_after(seen).await
    }

    /// Whether changes can be made through this node now.
    pub fn is_leader(&self) -> bool {
        self.0.raft.is_leader()
    }

    /// The raft term, which only grows.
    pub fn term(&self) -> u64 {
        self.0.raft.metrics().borrow_watched().current_term
    }

    /// Returns when raft has stopped by itself; never otherwise.
    pub async fn failed(&self) -> GroupFailed {
        let mut metrics = self.0.raft.metrics();
        loop {
            let running = metrics.borrow_watched().running_state.clone();
            match running {
                Ok(()) | Err(Fatal::Stopped) => {}
                Err(fatal) => return GroupFailed { reason: fatal.to_string() },
            }
            if metrics.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Stops raft and waits for what is queued to be written. What was acknowledged is durable with or without it.
    pub async fn shutdown(&self) {
        if let Err(error) = self.0.raft.shutdown().await {
            tracing::warn!(%error, "the metadata group did not shut down cleanly");
        }
        self.0.log.close().await;
        if let Err(error) = self.0.disk.close().await {
            tracing::warn!(%error, "the disk of the metadata group did not close cleanly");
        }
    }
}

fn raft_config(config: &GroupConfig) -> Config {
    let heartbeat_ms = config.heartbeat.as_millis() as u64;
    Config {
        cluster_name: "drava".to_owned(),
        heartbeat_interval: heartbeat_ms,
        election_timeout_min: 2 * heartbeat_ms,
        election_timeout_max: 4 * heartbeat_ms,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_entries),
        max_in_snapshot_log_to_keep: config.kept_entries,
        enable_pre_vote: Some(true),
        // As in the paper: a leader that restarts is elected again, in a new term. The state of this machine is in
        // memory, and restoring a leader would trust what it remembers as committed.
        enable_leader_restore: Some(false),
        ..Config::default()
    }
}
