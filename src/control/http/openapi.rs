//! The OpenAPI document. It is made from the handlers' own annotations; a test compares it with the router.

use axum::Json;
use utoipa::OpenApi;
use utoipa::openapi::path::Operation;

use super::{damage, health, metrics, page, topics};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Drava admin",
        description = "Topics, lookup, health and metrics of one Drava node. Errors are RFC 9457 problems whose `code` \
                       is the number of the wire protocol. Offsets and sizes are 64-bit numbers.",
    ),
    paths(
        page::index,
        health::healthz,
        health::readyz,
        metrics::metrics,
        document,
        topics::list,
        topics::create,
        topics::describe,
        topics::remove,
        topics::lookup,
        damage::list,
    ),
    tags(
        (name = "topics", description = "What the node stores."),
        (name = "node", description = "How the node is."),
    ),
)]
struct Document;

/// The document as it is served.
pub fn openapi() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

/// This API as OpenAPI 3.1.
#[utoipa::path(get, path = "/openapi.json", tag = "node", responses(
    (status = 200, description = "The document.", body = Object, content_type = "application/json"),
))]
pub async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi())
}

/// Each operation's method, path and summary, in the order of paths.
pub fn operations() -> Vec<(&'static str, String, String)> {
    let mut operations = Vec::new();
    for (path, item) in openapi().paths.paths {
        let mut push = |method, operation: Option<Operation>| {
            if let Some(operation) = operation {
                operations.push((method, path.clone(), operation.summary.unwrap_or_default()));
            }
        };
        push("GET", item.get);
        push("POST", item.post);
        push("PUT", item.put);
        push("PATCH", item.patch);
        push("DELETE", item.delete);
    }
    operations
}
