//! The metadata image: what the group has agreed on, as shards and the admin read it. Immutable once made.

use std::collections::BTreeMap;
use std::sync::Arc;

use drava_protocol::message::TopicPolicy;
use drava_protocol::topic::TopicName;
use drava_protocol::{NodeId, PartitionId, ShardId, Term, TopicId};

/// A version of all metadata. Cheap to clone and to compare by `version`.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Counts up by one with each change.
    pub version: u64,
    pub topics: BTreeMap<TopicName, Arc<Topic>>,
    pub partitions: BTreeMap<PartitionId, Partition>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic {
    pub id: TopicId,
    pub name: TopicName,
    pub policy: TopicPolicy,
    /// By index.
    pub partitions: Vec<PartitionId>,
    /// In ms since the epoch, as the proposer's clock said.
    pub created_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    pub id: PartitionId,
    pub topic: TopicName,
    /// 0-based place in its topic.
    pub index: u32,
    pub owner: Owner,
    pub term: Term,
}

/// Where a partition lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    pub node: NodeId,
    pub shard: ShardId,
}
