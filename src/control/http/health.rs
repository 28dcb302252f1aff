//! Whether the node lives, and whether it should be sent work.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::routes::Shared;
use crate::control::Readiness;

/// The process lives and its control core runs.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Health {
    #[schema(example = "ok")]
    status: &'static str,
    #[schema(example = "0.1.0")]
    version: &'static str,
    uptime_seconds: u64,
}

/// Whether the node should be sent work.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Ready {
    ready: bool,
    /// What is missing; empty when ready.
    reasons: Vec<String>,
    /// The metadata group has a leader: topics can be created and deleted.
    leader: bool,
    /// Shards that serve by the newest metadata.
    shards_serving: usize,
    shards: usize,
    /// The node is shutting down.
    draining: bool,
}

impl Ready {
    pub fn ready(&self) -> bool {
        self.ready
    }
}

impl From<Readiness> for Ready {
    fn from(readiness: Readiness) -> Self {
        let Readiness { leader, shards_serving, shards, draining } = readiness;
        let mut reasons = Vec::new();
        if draining {
            reasons.push("the node is shutting down".to_owned());
        }
        if !leader {
            reasons.push("the metadata group has no leader: topics cannot be changed".to_owned());
        }
        if shards_serving < shards {
            reasons.push(format!("{shards_serving} of {shards} shards serve by the newest metadata"));
        }
        Ready { ready: reasons.is_empty(), reasons, leader, shards_serving, shards, draining }
    }
}

/// Is the node alive?
#[utoipa::path(get, path = "/healthz", tag = "node", responses((status = 200, description = "It is.", body = Health)))]
pub async fn healthz(State(shared): State<Shared>) -> Json<Health> {
    Json(Health {
        status: "ok",
        version: env!("CARGO_PKG_VERSION"),
        uptime_seconds: shared.started_at.elapsed().as_secs(),
    })
}

/// Should the node be sent work?
#[utoipa::path(get, path = "/readyz", tag = "node", responses(
    (status = 200, description = "It should.", body = Ready),
    (status = 503, description = "Not now; `reasons` says why.", body = Ready),
))]
pub async fn readyz(State(shared): State<Shared>) -> (StatusCode, Json<Ready>) {
    let ready = Ready::from(shared.admin.readiness());
    let status = if ready.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(ready))
}
