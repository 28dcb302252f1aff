//! The forms in which metadata is kept on disk: serialised with postcard, in the order of the fields.
//!
//! They are types of their own, so that a change of the wire or of the image is no change of the format by accident:
//! the compiler asks for the new field here.

use drava_protocol::message::{CachePolicy, Durability, TopicPolicy};
use serde::{Deserialize, Serialize};

use crate::image::Liveness;

/// Of everything below. Counted up when a form changes; from the first release on, older ones are then still read.
pub const VERSION: u8 = 2;

#[derive(Serialize, Deserialize)]
#[serde(remote = "Durability")]
enum DurabilityForm {
    Disk,
    Memory,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "CachePolicy")]
struct CacheForm(#[serde(getter = "cache_number")] u64);

fn cache_number(policy: &CachePolicy) -> u64 {
    policy.number()
}

impl From<CacheForm> for CachePolicy {
    fn from(CacheForm(number): CacheForm) -> CachePolicy {
        CachePolicy::from_number(number)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "TopicPolicy")]
pub(crate) struct PolicyForm {
    partitions: u32,
    #[serde(with = "DurabilityForm")]
    durability: Durability,
    retention_ms: u64,
    retention_bytes: u64,
    trim_consumed: bool,
    #[serde(with = "CacheForm")]
    cache: CachePolicy,
    replicas: u8,
    ack_quorum: u8,
}

/// A topic name as its text, checked again when it is read.
pub(crate) mod topic_name {
    use drava_protocol::topic::TopicName;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(name: &TopicName, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(name.as_str())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<TopicName, D::Error> {
        TopicName::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StoredState {
    pub version: u64,
    pub next_topic: u64,
    pub next_partition: u64,
    pub placed: u64,
    pub nodes: Vec<StoredNode>,
    pub topics: Vec<StoredTopic>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StoredNode {
    pub id: u64,
    pub incarnation: u128,
    pub host: String,
    pub shared_port: u16,
    pub shard_ports: Vec<u16>,
    pub liveness: Liveness,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StoredTopic {
    pub id: u64,
    pub name: String,
    #[serde(with = "PolicyForm")]
    pub policy: TopicPolicy,
    pub created_ms: u64,
    pub partitions: Vec<StoredPartition>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StoredPartition {
    pub id: u64,
    pub node: u64,
    pub shard: u16,
    pub term: u64,
}
