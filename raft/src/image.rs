//! The metadata image: what the group has agreed on, as shards and the admin read it. Immutable once made.

use std::collections::BTreeMap;
use std::sync::Arc;

use drava_protocol::message::{PartitionPlace, TopicPolicy};
use drava_protocol::topic::TopicName;
use drava_protocol::{NodeId, PartitionId, ShardId, Term, TopicId};

use crate::shared_map::SharedMap;

/// A version of all metadata. Compare it by `version`, share it as an `Arc`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Counts up by one with each change.
    pub version: u64,
    pub topics: SharedMap<TopicName, Arc<Topic>>,
    pub partitions: SharedMap<PartitionId, Partition>,
    pub nodes: BTreeMap<NodeId, Arc<Node>>,
    /// The next partition's id: all that there ever were have lower ones.
    pub next_partition: u64,
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

/// A node as it last made itself known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub id: NodeId,
    pub incarnation: Incarnation,
    /// Host or IP that clients reach it by; empty: the host that they are connected to.
    pub host: String,
    /// The port that all shards listen on.
    pub shared_port: u16,
    /// The port of each shard's own listener, by shard: as many as the node has shards.
    pub shard_ports: Vec<u16>,
    pub liveness: Liveness,
}

/// Minted at random with a data directory: a node that comes back without its data is another one under the old id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation(pub u128);

/// Whether new partitions may be placed on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Liveness {
    Live,
    Down,
}

impl Node {
    pub fn shard_count(&self) -> usize {
        self.shard_ports.len()
    }
}

impl Image {
    /// The partitions that a shard owns, by id.
    pub fn owned_by(&self, owner: Owner) -> impl Iterator<Item = &Partition> {
        self.partitions.values().filter(move |partition| partition.owner == owner)
    }

    /// The partitions that are not the same in an older image: new, gone, or of another owner, term or policy. By id.
    pub fn partitions_changed_since(&self, older: &Image) -> Vec<PartitionId> {
        let mut changed = self.partitions.changed_since(&older.partitions);
        for name in self.topics.changed_since(&older.topics) {
            for topic in [self.topics.get(&name), older.topics.get(&name)].into_iter().flatten() {
                changed.extend_from_slice(&topic.partitions);
            }
        }
        changed.sort_unstable();
        changed.dedup();
        changed
    }

    /// Where a partition lives, as clients are told. `None`: no such partition, or its owner has not made itself known.
    pub fn place(&self, partition: PartitionId) -> Option<PartitionPlace> {
        let partition = self.partitions.get(&partition)?;
        let node = self.nodes.get(&partition.owner.node)?;
        let port = node.shard_ports.get(usize::from(partition.owner.shard.0))?;
        Some(PartitionPlace {
            partition: partition.id.0,
            index: partition.index,
            node: node.id.0,
            shard: partition.owner.shard.0,
            host: node.host.clone(),
            port: *port,
        })
    }
}
