//! Topics: list, create, describe, delete, and where their partitions live.

use std::future::Future;
use std::ops::Bound;
use std::rc::Rc;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use drava_protocol::message;
use drava_protocol::topic::TopicName;
use drava_protocol::{ErrorCode, PartitionId};
use drava_raft::SharedMap;
use futures_util::stream::{self, StreamExt};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::admin::Admin;
use super::body;
use super::problem::Problem;
use super::routes::{Shared, local};

/// Partitions that one describe asks about at the same time.
const DESCRIBES_MAX: usize = 64;
/// What a name without a leading slash is below.
const DEFAULT_PARENT: &str = "/public/default/";

/// When a publish is acknowledged: after the durable write, or when the entry is staged in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    #[default]
    Disk,
    Memory,
}

/// A cache policy as its text.
mod cache_as_text {
    use drava_protocol::message::CachePolicy;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::config::option::{CACHE_EXPECTED, cache_text, parse_cache};

    pub fn serialize<S: Serializer>(policy: &CachePolicy, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&cache_text(*policy))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<CachePolicy, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_cache(&text).ok_or_else(|| D::Error::custom(format!("{text:?} is no cache policy: {CACHE_EXPECTED}")))
    }
}

/// What a topic promises and what it may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    #[schema(default = 1, minimum = 1, maximum = 1024)]
    partitions: u32,
    durability: Durability,
    /// Closed ledgers whose newest message is older are deleted. 0: kept for ever.
    #[schema(default = 0)]
    retention_ms: u64,
    /// Oldest closed ledgers of a partition are deleted while it holds more. 0: no limit.
    #[schema(default = 0)]
    retention_bytes: u64,
    /// Closed ledgers that every subscription of the partition has passed are deleted; while there is no subscription,
    /// none are. Nothing from the lowest cursor on is deleted, by this or by the other limits.
    #[schema(default = false)]
    trim_consumed: bool,
    /// What one partition may hold in the ledger cache of its shard: `shared` (as much as there is), `none`, a size
    /// (`64 MiB`, or a number of bytes in quotes), or a share of the cache (`10%`).
    #[schema(value_type = String, default = "shared", example = "10%")]
    #[serde(with = "cache_as_text")]
    cache: message::CachePolicy,
    /// Nodes that hold each entry.
    #[schema(default = 1, minimum = 1)]
    replicas: u8,
    /// Nodes that must hold an entry before it is acknowledged; at most `replicas`.
    #[schema(default = 1, minimum = 1)]
    ack_quorum: u8,
}

impl Default for Policy {
    fn default() -> Self {
        Policy::from(&message::TopicPolicy::default())
    }
}

impl From<&message::TopicPolicy> for Policy {
    fn from(policy: &message::TopicPolicy) -> Self {
        Policy {
            partitions: policy.partitions,
            durability: match policy.durability {
                message::Durability::Disk => Durability::Disk,
                message::Durability::Memory => Durability::Memory,
            },
            retention_ms: policy.retention_ms,
            retention_bytes: policy.retention_bytes,
            trim_consumed: policy.trim_consumed,
            cache: policy.cache,
            replicas: policy.replicas,
            ack_quorum: policy.ack_quorum,
        }
    }
}

impl From<Policy> for message::TopicPolicy {
    fn from(policy: Policy) -> Self {
        message::TopicPolicy {
            partitions: policy.partitions,
            durability: match policy.durability {
                Durability::Disk => message::Durability::Disk,
                Durability::Memory => message::Durability::Memory,
            },
            retention_ms: policy.retention_ms,
            retention_bytes: policy.retention_bytes,
            trim_consumed: policy.trim_consumed,
            cache: policy.cache,
            replicas: policy.replicas,
            ack_quorum: policy.ack_quorum,
        }
    }
}

/// A topic to be made.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTopic {
    /// Short (`orders`, below `/public/default/`) or full (`/tenant/namespace/name`).
    #[schema(example = "orders")]
    name: String,
    #[serde(default)]
    policy: Policy,
    /// Answer 200 with the topic as it is when it exists already.
    #[serde(default)]
    exists_ok: bool,
}

/// A topic and what it promises.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Topic {
    /// Never used again, even when a topic of the same name follows.
    id: u64,
    #[schema(example = "/public/default/orders")]
    name: String,
    policy: Policy,
    /// In ms since the epoch.
    created_ms: u64,
}

impl From<&drava_raft::Topic> for Topic {
    fn from(topic: &drava_raft::Topic) -> Self {
        Topic {
            id: topic.id.0,
            name: topic.name.to_string(),
            policy: Policy::from(&topic.policy),
            created_ms: topic.created_ms,
        }
    }
}

/// One page of topics, in the order of names.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TopicList {
    topics: Vec<Topic>,
    /// When there are more: what to pass as `after` for the next page.
    next_after: Option<String>,
}

/// Where a partition lives.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Place {
    node: u64,
    shard: u16,
    /// Name or IP of the owning node; `null`: the host that this request went to.
    host: Option<String>,
    /// The wire protocol's port of the owning core.
    port: u16,
}

/// A partition and where it lives.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PartitionPlace {
    partition: u64,
    /// 0-based place in its topic.
    index: u32,
    place: Place,
}

/// A topic and where its partitions live.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TopicPlaces {
    topic: Topic,
    /// By index.
    partitions: Vec<PartitionPlace>,
}

/// A topic with the state of its partitions.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TopicDetail {
    topic: Topic,
    /// By index.
    partitions: Vec<PartitionDetail>,
}

/// A partition, where it lives and what it holds.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PartitionDetail {
    partition: u64,
    /// 0-based place in its topic.
    index: u32,
    /// `null`: not known here.
    place: Option<Place>,
    /// `null`: it lives on another node, or its shard did not answer in time.
    state: Option<PartitionState>,
}

/// What a partition holds.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PartitionState {
    /// Offset of the oldest message that is kept.
    start_offset: u64,
    /// One past the last message that readers may see.
    end_offset: u64,
    ledgers: u32,
    /// Bytes of all kept entries.
    stored_bytes: u64,
    subscriptions: Vec<Subscription>,
}

/// A durable cursor.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Subscription {
    name: String,
    /// All messages below are done.
    offset: u64,
    /// Messages from there to the end.
    backlog_messages: u64,
    connected: bool,
}

impl From<message::PartitionPlace> for Place {
    fn from(place: message::PartitionPlace) -> Self {
        let host = Some(place.host).filter(|host| !host.is_empty());
        Place { node: place.node, shard: place.shard, host, port: place.port }
    }
}

impl From<message::PartitionState> for PartitionState {
    fn from(state: message::PartitionState) -> Self {
        let message::PartitionState { partition: _, start_offset, end_offset, ledgers, stored_bytes, subscriptions } =
            state;
        let subscriptions = subscriptions
            .into_iter()
            .map(|subscription| Subscription {
                backlog_messages: end_offset.saturating_sub(subscription.offset),
                name: subscription.name,
                offset: subscription.offset,
                connected: subscription.connected,
            })
            .collect();
        PartitionState { start_offset, end_offset, ledgers, stored_bytes, subscriptions }
    }
}

/// Which topics.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Only names that start so. Without a leading slash it means names below `/public/default/`; empty: all.
    #[param(required = false)]
    prefix: String,
    /// Only names after this one; empty: from the start.
    #[param(required = false)]
    after: String,
    /// At most this many.
    #[param(required = false, minimum = 1, maximum = 1000, default = 100)]
    limit: u32,
}

impl Default for ListQuery {
    fn default() -> Self {
        ListQuery { prefix: String::new(), after: String::new(), limit: body::PAGE_LIMIT_DEFAULT }
    }
}

/// Which topic.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LookupQuery {
    /// Short (`orders`) or full (`/public/default/orders`).
    topic: String,
}

/// Lists topics
#[utoipa::path(get, path = "/v1/topics", tag = "topics", params(ListQuery), responses(
    (status = 200, description = "A page of topics, by name.", body = TopicList),
    (status = 400, description = "The query is not understood.", body = Problem, content_type = "application/problem+json"),
))]
pub async fn list(
    State(shared): State<Shared>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<TopicList>, Problem> {
    let query = body::query(query)?;
    let limit = body::page_limit(query.limit)?;
    let image = shared.admin.image();
    Ok(Json(page(&image.topics, &full(&query.prefix), &full(&query.after), limit)))
}

/// Creates a topic
///
/// Answered once every shard of the node serves the topic.
#[utoipa::path(post, path = "/v1/topics", tag = "topics", request_body = CreateTopic, responses(
    (status = 201, description = "The new topic.", body = Topic,
        headers(("location" = String, description = "Path of the topic."))),
    (status = 200, description = "With `exists_ok`: the topic that was there, whatever its policy.", body = Topic),
    (status = 400, description = "Malformed JSON, an unknown field, a bad name, or a value out of range.",
        body = Problem, content_type = "application/problem+json"),
    (status = 408, description = "The body did not come in time.",
        body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "The topic exists.", body = Problem, content_type = "application/problem+json"),
    (status = 413, description = "The body is too large.", body = Problem, content_type = "application/problem+json"),
    (status = 415, description = "The body is not JSON.", body = Problem, content_type = "application/problem+json"),
    (status = 503, description = "The metadata group has no leader, or the node shuts down.",
        body = Problem, content_type = "application/problem+json"),
))]
pub async fn create(State(shared): State<Shared>, headers: HeaderMap, body: Body) -> Result<Response, Problem> {
    local(async move {
        let request: CreateTopic = body::json(&headers, body, &shared.config).await?;
        let name = TopicName::parse(&request.name)?;
        let there = shared.admin.image().topics.get(&name).map(|topic| topic.id);
        let admin = shared.admin.clone();
        let topic = to_its_end(async move {
            admin.create_topic(name, request.policy.into(), request.exists_ok).await.map_err(Problem::from)
        })
        .await?;
        let answer = Json(Topic::from(&*topic));
        if there == Some(topic.id) {
            return Ok(answer.into_response());
        }
        let location = format!("/v1/topics{}", topic.name);
        Ok((StatusCode::CREATED, [(header::LOCATION, location)], answer).into_response())
    })
    .await
}

/// Describes a topic and its partitions
///
/// The name stands in the path as it is, short (`orders`) or full (`public/default/orders`); slashes need no encoding.
#[utoipa::path(get, path = "/v1/topics/{name}", tag = "topics",
    params(("name" = String, Path, description = "The topic's name, short or full.", example = "public/default/orders")),
    responses(
        (status = 200, description = "The topic.", body = TopicDetail),
        (status = 400, description = "The name is no topic name.",
            body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such topic.", body = Problem, content_type = "application/problem+json"),
    ))]
pub async fn describe(
    State(shared): State<Shared>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<TopicDetail>, Problem> {
    local(async move {
        let topic = find(&*shared.admin, &name_of_path(path)?)?;
        let partitions = stream::iter(numbered(&topic))
            .map(|(index, partition)| describe_partition(&shared.admin, index, partition))
            .buffered(DESCRIBES_MAX)
            .collect()
            .await;
        Ok(Json(TopicDetail { topic: Topic::from(&*topic), partitions }))
    })
    .await
}

/// Deletes a topic with its messages
///
/// Answered once every shard of the node has let go of it.
#[utoipa::path(delete, path = "/v1/topics/{name}", tag = "topics",
    params(("name" = String, Path, description = "The topic's name, short or full.", example = "public/default/orders")),
    responses(
        (status = 204, description = "It is gone."),
        (status = 400, description = "The name is no topic name.",
            body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such topic.", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The metadata group has no leader, or the node shuts down.",
            body = Problem, content_type = "application/problem+json"),
    ))]
pub async fn remove(
    State(shared): State<Shared>,
    path: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, Problem> {
    local(async move {
        let name = name_of_path(path)?;
        let admin = shared.admin.clone();
        to_its_end(async move { admin.delete_topic(name).await.map_err(Problem::from) }).await?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// Tells where a topic's partitions live
#[utoipa::path(get, path = "/v1/lookup", tag = "topics", params(LookupQuery), responses(
    (status = 200, description = "Node, core and port of each partition.", body = TopicPlaces),
    (status = 400, description = "The query is not understood.", body = Problem, content_type = "application/problem+json"),
    (status = 404, description = "No such topic.", body = Problem, content_type = "application/problem+json"),
    (status = 503, description = "A partition is without an owner now.",
        body = Problem, content_type = "application/problem+json"),
))]
pub async fn lookup(
    State(shared): State<Shared>,
    query: Result<Query<LookupQuery>, QueryRejection>,
) -> Result<Json<TopicPlaces>, Problem> {
    let topic = find(&*shared.admin, &TopicName::parse(&body::query(query)?.topic)?)?;
    let partitions = numbered(&topic)
        .map(|(index, partition)| {
            let place = shared.admin.place(partition).ok_or_else(|| {
                Problem::new(ErrorCode::MetadataUnavailable, format!("partition {index} has no owner now"))
            })?;
            Ok(PartitionPlace { partition: partition.0, index, place: Place::from(place) })
        })
        .collect::<Result<Vec<_>, Problem>>()?;
    Ok(Json(TopicPlaces { topic: Topic::from(&*topic), partitions }))
}

/// A prefix or a name as the image has it. Not checked: it is only compared.
fn full(name: &str) -> String {
    if name.is_empty() || name.starts_with('/') { name.to_owned() } else { format!("{DEFAULT_PARENT}{name}") }
}

fn page(topics: &SharedMap<TopicName, Arc<drava_raft::Topic>>, prefix: &str, after: &str, limit: usize) -> TopicList {
    let start = if after < prefix { Bound::Included(prefix) } else { Bound::Excluded(after) };
    let mut found =
        topics.range::<str, _>((start, Bound::Unbounded)).take_while(|(name, _)| name.as_str().starts_with(prefix));
    let topics: Vec<Topic> = found.by_ref().take(limit).map(|(_, topic)| Topic::from(&**topic)).collect();
    let more = found.next().is_some();
    let next_after = topics.last().filter(|_| more).map(|topic| topic.name.clone());
    TopicList { topics, next_after }
}

/// The name in a path: one part is a short name, more are a full one, with or without its leading slash.
fn name_of_path(path: Result<Path<String>, PathRejection>) -> Result<TopicName, Problem> {
    let Path(name) = path.map_err(|rejection| Problem::new(ErrorCode::InvalidTopicName, rejection.body_text()))?;
    let full_without_slash = name.contains('/') && !name.starts_with('/');
    Ok(if full_without_slash { TopicName::parse(&format!("/{name}"))? } else { TopicName::parse(&name)? })
}

fn find(admin: &dyn Admin, name: &TopicName) -> Result<Arc<drava_raft::Topic>, Problem> {
    let image = admin.image();
    let topic = image.topics.get(name).cloned();
    topic.ok_or_else(|| Problem::new(ErrorCode::UnknownTopic, format!("no topic `{name}`")))
}

fn numbered(topic: &drava_raft::Topic) -> impl Iterator<Item = (u32, PartitionId)> {
    (0..).zip(topic.partitions.iter().copied())
}

async fn describe_partition(admin: &Rc<dyn Admin>, index: u32, partition: PartitionId) -> PartitionDetail {
    PartitionDetail {
        partition: partition.0,
        index,
        place: admin.place(partition).map(Place::from),
        state: admin.describe_partition(partition).await.map(PartitionState::from),
    }
}

/// Runs a change to its end even when the client goes away meanwhile and its request is dropped.
async fn to_its_end<T: 'static>(change: impl Future<Output = Result<T, Problem>> + 'static) -> Result<T, Problem> {
    let ended = drava_runtime::spawn(change).await;
    ended.unwrap_or_else(|| Err(Problem::new(ErrorCode::ShuttingDown, "the node is shutting down")))
}
