//! What the HTTP admin asks of the node.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use drava_protocol::PartitionId;
use drava_protocol::message::{PartitionPlace, PartitionState, TopicPolicy};
use drava_protocol::topic::TopicName;
use drava_raft::{Image, Topic};
use drava_storage::Damage;

use crate::control::{ControlCore, Readiness, Refused};
use crate::shard::stats::ShardStats;

/// A future of the control core's executor.
pub type Local<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// The node as the HTTP admin sees it. [`ControlCore`] is the one of a node; the tests have another.
pub trait Admin: 'static {
    /// The newest metadata.
    fn image(&self) -> Arc<Image>;
    /// With `exists_ok` a topic that exists already is answered as it is.
    fn create_topic(
        &self,
        name: TopicName,
        policy: TopicPolicy,
        exists_ok: bool,
    ) -> Local<'_, Result<Arc<Topic>, Refused>>;
    fn delete_topic(&self, name: TopicName) -> Local<'_, Result<(), Refused>>;
    /// By shard; one that does not answer in time is left out.
    fn shard_stats(&self) -> Local<'_, Vec<ShardStats>>;
    /// `None`: no such partition, it lives on another node, or its shard does not answer in time.
    fn describe_partition(&self, partition: PartitionId) -> Local<'_, Option<PartitionState>>;
    /// By shard; one that does not answer in time is left out.
    fn damage(&self) -> Local<'_, Vec<(u16, Vec<Damage>)>>;
    fn readiness(&self) -> Readiness;
    /// Where a partition lives, as clients are told. `None`: no such partition.
    fn place(&self, partition: PartitionId) -> Option<PartitionPlace>;
}

impl Admin for ControlCore {
    fn image(&self) -> Arc<Image> {
        self.image()
    }

    fn create_topic(
        &self,
        name: TopicName,
        policy: TopicPolicy,
        exists_ok: bool,
    ) -> Local<'_, Result<Arc<Topic>, Refused>> {
        Box::pin(self.create_topic(name, policy, exists_ok))
    }

    fn delete_topic(&self, name: TopicName) -> Local<'_, Result<(), Refused>> {
        Box::pin(self.delete_topic(name))
    }

    fn shard_stats(&self) -> Local<'_, Vec<ShardStats>> {
        Box::pin(self.shard_stats())
    }

    fn describe_partition(&self, partition: PartitionId) -> Local<'_, Option<PartitionState>> {
        Box::pin(self.describe_partition(partition))
    }

    fn damage(&self) -> Local<'_, Vec<(u16, Vec<Damage>)>> {
        Box::pin(self.damage())
    }

    fn readiness(&self) -> Readiness {
        self.readiness()
    }

    fn place(&self, partition: PartitionId) -> Option<PartitionPlace> {
        self.place(partition)
    }
}
