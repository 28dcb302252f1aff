//! What can be asked of the metadata, and why it may be refused.
//!
//! A command is a raft log entry, so its serialised form is part of the format on disk: variants and fields are added
//! at the end, never reordered. The golden test in `record.rs` holds that fast.

use std::fmt;
use std::sync::Arc;

use drava_protocol::message::TopicPolicy;
use drava_protocol::topic::TopicName;
use drava_protocol::{ErrorCode, NodeId, TopicId};
use serde::{Deserialize, Serialize};

use crate::image::{Incarnation, Liveness, Node, Topic};
use crate::stored;

pub const PARTITIONS_PER_TOPIC_MAX: u32 = 1024;
/// Bounds the image, and with it the time to copy it on a change.
pub const TOPICS_MAX: usize = 100_000;
/// Bounds the image, as above.
pub const PARTITIONS_MAX: usize = 200_000;
pub const SHARDS_PER_NODE_MAX: usize = 1024;
/// The longest name that DNS has.
pub const HOST_BYTES_MAX: usize = 253;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Expects that no topic has the name.
    CreateTopic {
        #[serde(with = "stored::topic_name")]
        name: TopicName,
        #[serde(with = "stored::PolicyForm")]
        policy: TopicPolicy,
        /// The proposer's clock, in ms since the epoch.
        created_ms: u64,
    },
    DeleteTopic {
        #[serde(with = "stored::topic_name")]
        name: TopicName,
        /// Expects that the name still means this topic, and not one created since.
        expected: Option<u64>,
    },
    /// A node makes itself known: at each of its starts.
    RegisterNode(Registration),
    /// The failure detector's verdict on one life of a node.
    MarkNode { node: u64, incarnation: u128, liveness: Liveness },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    pub node: u64,
    pub incarnation: u128,
    pub host: String,
    pub shared_port: u16,
    /// By shard.
    pub shard_ports: Vec<u16>,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Command::CreateTopic { name, policy, .. } => {
                write!(f, "create topic {name} with {} partitions", policy.partitions)
            }
            Command::DeleteTopic { name, .. } => write!(f, "delete topic {name}"),
            Command::RegisterNode(node) => write!(f, "register node {}", node.node),
            Command::MarkNode { node, liveness, .. } => write!(f, "mark node {node} {liveness:?}"),
        }
    }
}

/// What a command has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The version of the image that has it.
    pub version: u64,
    pub effect: Effect,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    TopicCreated(Arc<Topic>),
    TopicDeleted(Arc<Topic>),
    NodeChanged(Arc<Node>),
    /// All was already so.
    Nothing,
}

/// Why the metadata was left as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    #[error("the topic {0} exists already")]
    TopicExists(TopicName),
    #[error("there is no topic {0}")]
    UnknownTopic(TopicName),
    #[error("the topic {name} is number {found} now and not number {expected}: it has been deleted and created again")]
    TopicChanged { name: TopicName, expected: TopicId, found: TopicId },
    #[error("a topic has 1 to {PARTITIONS_PER_TOPIC_MAX} partitions; {0} were asked for")]
    PartitionCount(u32),
    #[error("{replicas} replicas were asked for, and {nodes} nodes are live")]
    Replicas { replicas: u8, nodes: usize },
    #[error("the ack quorum is 1 to the number of replicas, {replicas}; {ack_quorum} was asked for")]
    AckQuorum { ack_quorum: u8, replicas: u8 },
    #[error("the cache policy is number {0}, which means nothing")]
    CachePolicy(u64),
    #[error("there are {TOPICS_MAX} topics; no more are taken")]
    TooManyTopics,
    #[error("there are {existing} partitions; {asked} more would exceed {PARTITIONS_MAX}")]
    TooManyPartitions { existing: usize, asked: u32 },
    #[error("a node has 1 to {SHARDS_PER_NODE_MAX} shards; node {node} said {shards}")]
    ShardCount { node: NodeId, shards: usize },
    #[error("a host name has at most {HOST_BYTES_MAX} bytes; that of node {node} has {bytes}")]
    HostTooLong { node: NodeId, bytes: usize },
    #[error(
        "node {node} is known with incarnation {known:032x} and owns partitions; this one has incarnation \
         {offered:032x}: another data directory, or a new one"
    )]
    OtherIncarnation { node: NodeId, known: u128, offered: u128 },
    #[error("there is no node {0}")]
    UnknownNode(NodeId),
}

impl Rejected {
    /// What the client is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Rejected::TopicExists(_) => ErrorCode::TopicExists,
            Rejected::UnknownTopic(_) | Rejected::TopicChanged { .. } => ErrorCode::UnknownTopic,
            Rejected::PartitionCount(_)
            | Rejected::Replicas { .. }
            | Rejected::AckQuorum { .. }
            | Rejected::CachePolicy(_)
            | Rejected::TooManyTopics
            | Rejected::TooManyPartitions { .. }
            | Rejected::ShardCount { .. }
            | Rejected::HostTooLong { .. }
            | Rejected::OtherIncarnation { .. }
            | Rejected::UnknownNode(_) => ErrorCode::InvalidArgument,
        }
    }
}

impl Registration {
    pub(crate) fn into_node(self) -> Node {
        Node {
            id: NodeId(self.node),
            incarnation: Incarnation(self.incarnation),
            host: self.host,
            shared_port: self.shared_port,
            shard_ports: self.shard_ports,
            liveness: Liveness::Live,
        }
    }
}
