//! What the tasks of the control core's own executor may ask of it: the HTTP admin above all.

use std::rc::Rc;
use std::sync::Arc;

use drava_protocol::PartitionId;
use drava_protocol::message::{PartitionPlace, PartitionState, TopicPolicy};
use drava_protocol::topic::TopicName;
use drava_raft::{Image, Topic};
use drava_storage::Damage;

use super::driver::ControlCore;
use super::request::Refused;
use crate::shard::stats::ShardStats;

/// A door to the control core, for tasks of its executor. Cheap to clone.
#[derive(Clone)]
pub struct ControlHandle(Rc<ControlCore>);

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

impl ControlHandle {
    pub(super) fn new(core: Rc<ControlCore>) -> ControlHandle {
        ControlHandle(core)
    }

    /// The newest metadata.
    pub fn image(&self) -> Arc<Image> {
        self.0.image()
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
        self.0.create_topic(name, policy, exists_ok).await
    }

    /// Deletes a topic and returns once every shard of this node has let go of it.
    pub async fn delete_topic(&self, name: TopicName) -> Result<(), Refused> {
        self.0.delete_topic(name).await
    }

    /// The figures of all shards, by shard; one that does not answer in time is left out.
    pub async fn shard_stats(&self) -> Vec<ShardStats> {
        self.0.shard_stats().await
    }

    /// `None`: no such partition, it lives on another node, or its shard does not answer in time.
    pub async fn describe_partition(&self, partition: PartitionId) -> Option<PartitionState> {
        self.0.describe_partition(partition).await
    }

    /// What of their stores cannot be read any more, by shard; one that does not answer in time is left out.
    pub async fn damage(&self) -> Vec<(u16, Vec<Damage>)> {
        self.0.damage().await
    }

    pub fn readiness(&self) -> Readiness {
        self.0.readiness()
    }

    /// Where a partition lives, as clients are told. `None`: no such partition.
    pub fn place(&self, partition: PartitionId) -> Option<PartitionPlace> {
        self.0.image().place(partition)
    }
}
