//! The control core: the one place of a node that changes metadata.
//!
//! 1. [`run`] starts the metadata group, makes this node known in it, and gives every shard the first image. Shards
//!    listen once they have it, so only then is the node ready.
//! 2. A topic is created or deleted by a command to the group. When it is applied, the new image goes to all shards, and
//!    only when all serve by it is the requester answered: what it does next finds the topic, on whichever shard.
//! 3. On [`ControlRequest::Drain`] no more changes are taken, the shards finish, the admin stops, the group is shut down.
//!
//! Shards never wait for the control core on the data path, and the control core waits for a shard only for a while.

use std::cell::Cell;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use drava_protocol::message::{PartitionPlace, PartitionState, TopicPolicy};
use drava_protocol::topic::TopicName;
use drava_protocol::{ErrorCode, NodeId, PartitionId};
use drava_raft::{
    Command, Effect, GroupConfig, GroupFailed, Image, MetaDisk, MetadataGroup, ProposeError, Registration, Rejected,
    StartError, Topic,
};
use drava_runtime::executor::mark_active;
use drava_runtime::foreign::{Inbox, InboxSender, ReplySender};
use drava_runtime::task::Stop;
use drava_storage::Damage;
use futures_lite::future;

use super::request::{ControlRequest, Refused};
use super::shards::{ShardLate, Shards, within};
use crate::shard::command::ShardCommand;
use crate::shard::stats::ShardStats;

/// The metadata group may be waiting for room on a full disk, and has acknowledged nothing of what waits.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct ControlConfig {
    pub group: GroupConfig,
    /// This node, as it makes itself known: one port for each of its shards.
    pub registration: Registration,
    /// The highest partition that a store of this node holds something of.
    pub highest_partition: Option<PartitionId>,
    /// How long shards may take to open what the first image says is theirs.
    pub start_timeout: Duration,
    /// How long shards may take to serve by a later image before the requester is told that they do not yet.
    pub shard_timeout: Duration,
    /// How long shards may take to finish when the node stops.
    pub drain_timeout: Duration,
}

impl ControlConfig {
    pub fn new(registration: Registration) -> ControlConfig {
        ControlConfig {
            group: GroupConfig::new(NodeId(registration.node)),
            registration,
            highest_partition: None,
            start_timeout: Duration::from_secs(60),
            shard_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// The control core's ends of the channels of the node.
pub struct ControlEnds {
    pub requests: Inbox<ControlRequest>,
    /// By shard.
    pub shards: Vec<InboxSender<ShardCommand>>,
    /// Told once: all shards serve, or why they never will.
    pub ready: ReplySender<Result<ControlStarted, String>>,
}

/// What the control core found at its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlStarted {
    pub topics: usize,
    pub partitions: usize,
    /// Of the metadata.
    pub version: u64,
}

/// Why the control core ended.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("this node cannot take its place: {0}")]
    Register(#[from] ProposeError),
    #[error(
        "the metadata is incomplete: the store holds partition {stored}, and only those below {next_partition} were ever made; \
         the node does not start, for it would take that partition for a deleted one. Restore `meta` of the data directory"
    )]
    Incomplete { stored: PartitionId, next_partition: u64 },
    #[error("the node did not start: {0}")]
    Shard(#[from] ShardLate),
    #[error(transparent)]
    Failed(#[from] GroupFailed),
}

/// Runs the control core until it is told to drain. On the control executor.
///
/// `serve` is given the core, to run the admin by it until the stop; it is called when the node is ready.
/// An error means that the node has to stop: nothing that was acknowledged is lost by stopping at once.
pub async fn run<S>(
    config: ControlConfig,
    disk: Rc<dyn MetaDisk>,
    ends: ControlEnds,
    serve: impl FnOnce(Rc<ControlCore>, Stop) -> S,
) -> Result<(), ControlError>
where
    S: Future<Output = ()> + 'static,
{
    let ControlEnds { requests, shards, ready } = ends;
    let core = match ControlCore::start(config, disk, shards).await {
        Ok(core) => core,
        Err(error) => {
            ready.send(Err(error.to_string()));
            return Err(error);
        }
    };
    let stop = Stop::default();
    let admin = drava_runtime::spawn(serve(core.clone(), stop.clone()));
    let image = core.image();
    let started =
        ControlStarted { topics: image.topics.len(), partitions: image.partitions.len(), version: image.version };
    drop(image);
    ready.send(Ok(started));

    let done = core.obey(requests).await?;
    core.drain().await;
    stop.stop();
    // The admin answers what it has under way; it bounds that itself.
    within(core.drain_timeout, admin).await;
    if within(SHUTDOWN_TIMEOUT, core.group.shutdown()).await.is_none() {
        tracing::warn!("the metadata group did not shut down in time; all that it acknowledged is on disk");
    }
    if let Some(done) = done {
        done.send(());
    }
    Ok(())
}

/// Whether this node should be sent work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// The metadata group has a leader: topics can be created and deleted.
    pub leader: bool,
    /// Shards that serve by the newest metadata image.
    pub shards_serving: usize,
    pub shards: usize,
    /// The node is shutting down and takes no new work.
    pub draining: bool,
}

/// The control core of a node, for the tasks of its executor: the HTTP admin above all.
pub struct ControlCore {
    group: MetadataGroup,
    node: NodeId,
    shards: Rc<Shards>,
    shard_timeout: Duration,
    drain_timeout: Duration,
    draining: Cell<bool>,
}

impl ControlCore {
    /// Returns once all shards serve by an image that has this node.
    async fn start(
        config: ControlConfig,
        disk: Rc<dyn MetaDisk>,
        shards: Vec<InboxSender<ShardCommand>>,
    ) -> Result<Rc<ControlCore>, ControlError> {
        let ports = config.registration.shard_ports.len();
        assert!(ports == shards.len(), "{ports} ports for {} shards", shards.len());
        mark_active();
        let node = NodeId(config.registration.node);
        let group = MetadataGroup::start(config.group, disk).await?;
        // The group has applied all that it holds before it answers this: the first image that a shard sees has all of
        // its partitions. A shard deletes what it finds on its disk and not in the image.
        if let Err(error) = group.propose(Command::RegisterNode(config.registration)).await {
            group.shutdown().await;
            return Err(error.into());
        }
        // A partition is in the metadata durably before a store hears of it, and ids only grow. Where a store knows more,
        // the metadata has lost its end: to the disk a cut-off log and a torn write are the same.
        let next_partition = group.image().next_partition;
        if let Some(stored) = config.highest_partition.filter(|stored| next_partition <= stored.0) {
            group.shutdown().await;
            return Err(ControlError::Incomplete { stored, next_partition });
        }
        let shards = Shards::new(shards);
        shards.follow(&group);
        if let Err(late) = shards.serve(group.image().version, config.start_timeout).await {
            group.shutdown().await;
            return Err(late.into());
        }
        Ok(Rc::new(ControlCore {
            group,
            node,
            shards,
            shard_timeout: config.shard_timeout,
            drain_timeout: config.drain_timeout,
            draining: Cell::new(false),
        }))
    }

    /// Does what the shards ask, until somebody says to drain; returns whom to tell when that is done.
    async fn obey(
        self: &Rc<Self>,
        mut requests: Inbox<ControlRequest>,
    ) -> Result<Option<ReplySender<()>>, ControlError> {
        let mut failed = pin!(self.group.failed());
        loop {
            let request = future::or(async { Ok(requests.recv().await) }, async { Err(failed.as_mut().await) });
            mark_active();
            let core = self.clone();
            match request.await? {
                Some(ControlRequest::CreateTopic { name, policy, exists_ok, reply }) => {
                    drava_runtime::spawn(async move { reply.send(core.create_topic(name, policy, exists_ok).await) });
                }
                Some(ControlRequest::DeleteTopic { name, reply }) => {
                    drava_runtime::spawn(async move { reply.send(core.delete_topic(name).await) });
                }
                Some(ControlRequest::Drain { done }) => return Ok(Some(done)),
                // All shards are gone, and whoever could ask for a drain.
                None => return Ok(None),
            }
        }
    }

    async fn drain(&self) {
        self.draining.set(true);
        for shard in self.shards.drain(self.drain_timeout).await {
            tracing::warn!(%shard, "the shard did not finish in time; what it had not acknowledged is unknown");
        }
    }

    /// The newest metadata.
    pub fn image(&self) -> Arc<Image> {
        self.group.image()
    }

    /// Creates a topic and returns once every shard of this node serves it.
    ///
    /// With `exists_ok` a topic that exists already is answered as it is, whatever its policy.
    pub async fn create_topic(
        &self,
        name: TopicName,
        policy: TopicPolicy,
        exists_ok: bool,
    ) -> Result<Arc<Topic>, Refused> {
        self.take_changes()?;
        let created_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let command = Command::CreateTopic { name: name.clone(), policy, created_ms };
        let (topic, version) = match self.group.propose(command).await {
            Ok(applied) => match applied.effect {
                Effect::TopicCreated(topic) => (topic, applied.version),
                other => unreachable!("creating {name} gave {other:?}"),
            },
            Err(ProposeError::Rejected(rejected @ Rejected::TopicExists(_))) if exists_ok => {
                let image = self.image();
                // It may have been deleted since; then that is the answer.
                let topic = image.topics.get(&name).cloned().ok_or_else(|| refused(&rejected.into()))?;
                (topic, image.version)
            }
            Err(error) => return Err(refused(&error)),
        };
        self.shards.serve(version, self.shard_timeout).await.map_err(|late| Refused {
            code: ErrorCode::Internal,
            text: format!("the topic {name} is created, and not served everywhere yet: {late}"),
        })?;
        Ok(topic)
    }

    /// Deletes a topic and returns once every shard of this node has let go of it.
    pub async fn delete_topic(&self, name: TopicName) -> Result<(), Refused> {
        self.take_changes()?;
        let command = Command::DeleteTopic { name: name.clone(), expected: None };
        let applied = self.group.propose(command).await.map_err(|error| refused(&error))?;
        self.shards.serve(applied.version, self.shard_timeout).await.map_err(|late| Refused {
            code: ErrorCode::Internal,
            text: format!("the topic {name} is deleted, and not gone everywhere yet: {late}"),
        })
    }

    fn take_changes(&self) -> Result<(), Refused> {
        mark_active();
        if self.draining.get() {
            return Err(Refused { code: ErrorCode::ShuttingDown, text: "the node is shutting down".to_owned() });
        }
        Ok(())
    }

    /// The figures of all shards, by shard; one that does not answer in time is left out.
    pub async fn shard_stats(&self) -> Vec<ShardStats> {
        self.shards.stats().await
    }

    /// What of their stores cannot be read any more, by shard; one that does not answer in time is left out.
    pub async fn damage(&self) -> Vec<(u16, Vec<Damage>)> {
        self.shards.damage().await
    }

    /// `None`: no such partition, it lives on another node, or its shard does not answer in time.
    pub async fn describe_partition(&self, partition: PartitionId) -> Option<PartitionState> {
        let owner = self.image().partitions.get(&partition).map(|partition| partition.owner)?;
        if owner.node != self.node {
            return None;
        }
        self.shards.describe(owner.shard, partition).await
    }

    /// Where a partition lives, as clients are told. `None`: no such partition.
    pub fn place(&self, partition: PartitionId) -> Option<PartitionPlace> {
        self.image().place(partition)
    }

    pub fn readiness(&self) -> Readiness {
        Readiness {
            leader: self.group.is_leader(),
            shards_serving: self.shards.serving(self.image().version),
            shards: self.shards.count(),
            draining: self.draining.get(),
        }
    }
}

fn refused(error: &ProposeError) -> Refused {
    Refused { code: error.code(), text: error.to_string() }
}
