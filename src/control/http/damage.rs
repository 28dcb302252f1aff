//! What the node has stored and cannot read any more.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use drava_raft::Image;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::body;
use super::problem::Problem;
use super::routes::{Shared, local};

/// Something that cannot be read any more. At least one of place and messages is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct DamageEntry {
    shard: u16,
    /// `null`: the segment that held it is gone.
    place: Option<DamagedPlace>,
    /// `null`: not known, or there were none.
    messages: Option<DamagedMessages>,
    /// In ms since the epoch.
    found_at_ms: u64,
    /// Who found it: `recovery`, `read`, `scrub` or `compaction`.
    found_by: &'static str,
}

/// Bytes of one use of a segment file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct DamagedPlace {
    segment: u32,
    generation: u64,
    start_position: u64,
    end_position: u64,
}

/// Messages of one partition. They were acknowledged; readers are told that they are missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct DamagedMessages {
    /// `null`: the topic is being deleted.
    topic: Option<String>,
    /// 0-based place of the partition in its topic.
    index: Option<u32>,
    partition: u64,
    first_offset: u64,
    /// One past the last that is missing.
    next_offset: u64,
}

/// One page of damage: by shard, then messages before places.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DamageList {
    damage: Vec<DamageEntry>,
    /// Entries on all pages.
    total: u64,
    /// When there are more: what to pass as `start` for the next page.
    next_start: Option<u64>,
}

/// Which entries.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DamageQuery {
    /// Leave out so many.
    #[param(required = false, default = 0)]
    start: u64,
    /// At most this many.
    #[param(required = false, minimum = 1, maximum = 1000, default = 100)]
    limit: u32,
}

impl Default for DamageQuery {
    fn default() -> Self {
        DamageQuery { start: 0, limit: body::PAGE_LIMIT_DEFAULT }
    }
}

/// Lists what is damaged on disk
///
/// Entries come from recovery, reads, the scrubber and the compactor, outlive restarts, and go when nobody can ask for the
/// messages any more. A shard that does not answer in time is left out.
#[utoipa::path(get, path = "/v1/damage", tag = "node", params(DamageQuery), responses(
    (status = 200, description = "A page of damage; none is what one wants to see.", body = DamageList),
    (status = 400, description = "The query is not understood.", body = Problem, content_type = "application/problem+json"),
))]
pub async fn list(
    State(shared): State<Shared>,
    query: Result<Query<DamageQuery>, QueryRejection>,
) -> Result<Json<DamageList>, Problem> {
    local(async move {
        let query = body::query(query)?;
        let limit = body::page_limit(query.limit)?;
        let found = shared.admin.damage().await;
        let image = shared.admin.image();
        let total = found.iter().map(|(_, damage)| damage.len() as u64).sum();
        let all = found.into_iter().flat_map(|(shard, damage)| damage.into_iter().map(move |entry| (shard, entry)));
        let page = all.skip(usize::try_from(query.start).unwrap_or(usize::MAX)).take(limit);
        let damage: Vec<DamageEntry> = page.map(|(shard, damage)| entry(shard, damage, &image)).collect();
        let end = query.start.saturating_add(damage.len() as u64);
        Ok(Json(DamageList { damage, total, next_start: (end < total).then_some(end) }))
    })
    .await
}

fn entry(shard: u16, damage: drava_storage::Damage, image: &Image) -> DamageEntry {
    DamageEntry {
        shard,
        place: damage.place.map(|place| DamagedPlace {
            segment: place.segment,
            generation: place.generation,
            start_position: place.positions.start,
            end_position: place.positions.end,
        }),
        messages: damage.messages.map(|messages| {
            let partition = image.partitions.get(&messages.partition);
            DamagedMessages {
                topic: partition.map(|partition| partition.topic.to_string()),
                index: partition.map(|partition| partition.index),
                partition: messages.partition.0,
                first_offset: messages.offsets.start,
                next_offset: messages.offsets.end,
            }
        }),
        found_at_ms: damage.found_at_ms,
        found_by: damage.found_by.name(),
    }
}
