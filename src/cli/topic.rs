//! `drava topic`: creates, lists, describes and deletes topics.

use clap::{Args, Subcommand, ValueEnum};
use drava_client::{CachePolicy, Client, Durability, TopicPolicy};
use drava_protocol::message::{PartitionPlace, PartitionState, Topic};
use serde_json::{Value, json};

use super::Failure;
use super::connect::{ServerOptions, block_on};
use super::output::{Output, print, print_json, table};
use super::quantity;
use crate::config::option::{bytes_text, cache_text};

/// Create, list, describe or delete topics.
#[derive(Debug, Args)]
pub struct TopicCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Create a topic.
    Create {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        policy: PolicyOptions,
        /// Do not mind a topic that exists already; it stays as it is.
        #[arg(long)]
        exists_ok: bool,
    },
    /// List the names of topics.
    List {
        /// Only names that start so, in their full form: /tenant/namespace/name.
        #[arg(default_value = "")]
        prefix: String,
        #[command(flatten)]
        server: ServerOptions,
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Show policy, partitions and subscriptions of a topic.
    Describe {
        #[command(flatten)]
        target: Target,
    },
    /// Delete a topic with everything in it.
    Delete {
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Debug, Args)]
struct Target {
    /// /tenant/namespace/name; a bare name stands for /public/default/name.
    topic: String,
    #[command(flatten)]
    server: ServerOptions,
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DurabilityName {
    /// Acknowledge what is on disk.
    Disk,
    /// Acknowledge what is in memory.
    Memory,
}

/// The policy of a topic to be.
#[derive(Debug, Args)]
pub struct PolicyOptions {
    /// Ordered parts, each on one core.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    partitions: u32,
    /// When a publish is acknowledged.
    #[arg(long, value_enum, default_value = "disk")]
    durability: DurabilityName,
    /// Delete what is older, a ledger at a time: 90s, 12h, 7d. 0: keep for ever.
    #[arg(long, default_value = "0", value_parser = quantity::duration_ms, value_name = "TIME")]
    retention: u64,
    /// Delete the oldest of a partition beyond this size, a ledger at a time: 10GiB. 0: no limit.
    #[arg(long, default_value = "0", value_parser = quantity::bytes, value_name = "SIZE")]
    retention_bytes: u64,
    /// Delete what every subscription has passed, a ledger at a time. What one of them has not acknowledged is kept.
    #[arg(long)]
    trim_consumed: bool,
    /// What one partition may hold in the cache of its shard: a size, a share, or none. Shared: as much as there is.
    #[arg(long, default_value = "shared", value_parser = quantity::cache, value_name = "shared|none|SIZE|PERCENT%")]
    cache: CachePolicy,
}

impl PolicyOptions {
    fn policy(&self) -> TopicPolicy {
        TopicPolicy {
            partitions: self.partitions,
            durability: match self.durability {
                DurabilityName::Disk => Durability::Disk,
                DurabilityName::Memory => Durability::Memory,
            },
            retention_ms: self.retention,
            retention_bytes: self.retention_bytes,
            trim_consumed: self.trim_consumed,
            cache: self.cache,
            ..TopicPolicy::default()
        }
    }
}

impl TopicCommand {
    pub fn run(self) -> Result<(), Failure> {
        block_on(async move {
            match self.action {
                Action::Create { target, policy, exists_ok } => {
                    let client = target.server.connect().await?;
                    let topic = if exists_ok {
                        client.ensure_topic(&target.topic, policy.policy()).await?
                    } else {
                        client.create_topic(&target.topic, policy.policy()).await?
                    };
                    match target.output {
                        Output::Table => {
                            let count = topic.partitions.len();
                            let plural = if count == 1 { "" } else { "s" };
                            print(format!("{}: {count} partition{plural}", topic.name))
                        }
                        Output::Json => print_json(&topic_json(&topic)),
                    }
                }
                Action::List { prefix, server, output } => {
                    let names = server.connect().await?.list_topics(&prefix).await?;
                    match output {
                        Output::Table if names.is_empty() => Ok(()),
                        Output::Table => print(names.join("\n")),
                        Output::Json => print_json(&names),
                    }
                }
                Action::Describe { target } => describe(&target.server.connect().await?, &target).await,
                Action::Delete { target } => {
                    target.server.connect().await?.delete_topic(&target.topic).await?;
                    match target.output {
                        Output::Table => Ok(()),
                        Output::Json => print_json(&json!({ "deleted": target.topic })),
                    }
                }
            }
        })
    }
}

async fn describe(client: &Client, target: &Target) -> Result<(), Failure> {
    let topic = client.lookup(&target.topic).await?;
    let states = client.describe(&target.topic).await?;
    match target.output {
        Output::Json => {
            let mut described = topic_json(&topic);
            described["partitions"] = topic.partitions.iter().zip(&states).map(partition_json).collect();
            print_json(&described)
        }
        Output::Table => {
            let policy = &topic.policy;
            let or = |zero: &str, value: u64, text: String| if value == 0 { zero.to_owned() } else { text };
            print(format!(
                "{}\ndurability {}; retention {}, {}, consumed messages {}; cache {}\n",
                topic.name,
                durability_name(policy.durability),
                or("for ever", policy.retention_ms, format!("{} s", policy.retention_ms / 1000)),
                or("any size", policy.retention_bytes, bytes_text(policy.retention_bytes)),
                if policy.trim_consumed { "deleted" } else { "kept" },
                cache_text(policy.cache),
            ))?;
            let rows = topic.partitions.iter().zip(&states).map(|(place, state)| {
                [
                    place.index.to_string(),
                    place.node.to_string(),
                    place.shard.to_string(),
                    place.port.to_string(),
                    state.start_offset.to_string(),
                    state.end_offset.to_string(),
                    bytes_text(state.stored_bytes),
                    state.ledgers.to_string(),
                ]
            });
            print(table(["partition", "node", "shard", "port", "first", "end", "stored", "ledgers"], rows))?;
            let subscriptions: Vec<_> = topic
                .partitions
                .iter()
                .zip(&states)
                .flat_map(|(place, state)| {
                    state.subscriptions.iter().map(|subscription| {
                        [
                            subscription.name.clone(),
                            place.index.to_string(),
                            subscription.offset.to_string(),
                            state.end_offset.saturating_sub(subscription.offset).to_string(),
                            if subscription.connected { "yes" } else { "no" }.to_owned(),
                        ]
                    })
                })
                .collect();
            if subscriptions.is_empty() {
                return Ok(());
            }
            print("")?;
            print(table(["subscription", "partition", "offset", "behind", "connected"], subscriptions))
        }
    }
}

/// Creates the topic unless it exists. For `produce --create`.
pub async fn ensure(client: &Client, name: &str, partitions: u32) -> Result<(), Failure> {
    client.ensure_topic(name, TopicPolicy { partitions, ..TopicPolicy::default() }).await?;
    Ok(())
}

fn durability_name(durability: Durability) -> &'static str {
    match durability {
        Durability::Disk => "disk",
        Durability::Memory => "memory",
    }
}

fn topic_json(topic: &Topic) -> Value {
    let policy = &topic.policy;
    json!({
        "topic": topic.topic,
        "name": topic.name,
        "policy": {
            "partitions": policy.partitions,
            "durability": durability_name(policy.durability),
            "retention_ms": policy.retention_ms,
            "retention_bytes": policy.retention_bytes,
            "trim_consumed": policy.trim_consumed,
            "cache": cache_text(policy.cache),
            "replicas": policy.replicas,
            "ack_quorum": policy.ack_quorum,
        },
        "partitions": topic.partitions.iter().map(place_json).collect::<Vec<_>>(),
    })
}

fn place_json(place: &PartitionPlace) -> Value {
    json!({
        "partition": place.partition,
        "index": place.index,
        "node": place.node,
        "shard": place.shard,
        "host": place.host,
        "port": place.port,
    })
}

fn partition_json((place, state): (&PartitionPlace, &PartitionState)) -> Value {
    let mut partition = place_json(place);
    partition["start_offset"] = state.start_offset.into();
    partition["end_offset"] = state.end_offset.into();
    partition["ledgers"] = state.ledgers.into();
    partition["stored_bytes"] = state.stored_bytes.into();
    let subscriptions = state.subscriptions.iter().map(|subscription| {
        json!({
            "name": subscription.name,
            "offset": subscription.offset,
            "connected": subscription.connected,
        })
    });
    partition["subscriptions"] = subscriptions.collect();
    partition
}
