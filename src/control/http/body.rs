//! What the client sent, read strictly: bounded in size and time, of the announced type, without unknown fields.

use axum::body::{Body, Bytes};
use axum::extract::Query;
use axum::extract::rejection::QueryRejection;
use axum::http::{HeaderMap, StatusCode, header};
use drava_protocol::ErrorCode;
use futures_lite::future;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use super::problem::Problem;
use super::server::HttpConfig;

/// Entries on one page when the client does not say.
pub const PAGE_LIMIT_DEFAULT: u32 = 100;
const PAGE_LIMIT_MAX: u32 = 1000;

/// Reads a JSON body. The type refuses unknown fields (`deny_unknown_fields`).
pub async fn json<T: DeserializeOwned>(headers: &HeaderMap, body: Body, config: &HttpConfig) -> Result<T, Problem> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    if !media_type.eq_ignore_ascii_case("application/json") {
        return Err(Problem::with_status(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ErrorCode::InvalidArgument,
            "the body must be JSON: send `content-type: application/json`",
        ));
    }
    let bytes = read(headers, body, config).await?;
    serde_json::from_slice(&bytes).map_err(|error| Problem::new(ErrorCode::MalformedBody, error.to_string()))
}

/// The query, or what is wrong with it.
pub fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, Problem> {
    query.map(|Query(query)| query).map_err(|rejection| Problem::invalid(rejection.body_text()))
}

/// How many entries a page may have.
pub fn page_limit(limit: u32) -> Result<usize, Problem> {
    if !(1..=PAGE_LIMIT_MAX).contains(&limit) {
        return Err(Problem::invalid(format!("limit is {limit}; it must be in 1..={PAGE_LIMIT_MAX}")));
    }
    Ok(limit as usize)
}

async fn read(headers: &HeaderMap, body: Body, config: &HttpConfig) -> Result<Bytes, Problem> {
    let bytes_max = config.body_bytes_max;
    let too_large =
        || Problem::new(ErrorCode::FrameTooLarge, format!("the body is over the limit of {bytes_max} bytes"));
    let announced =
        headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok()).unwrap_or(0);
    if bytes_max < announced {
        return Err(too_large());
    }
    let read = async { Some(Limited::new(body, bytes_max).collect().await) };
    let late = async {
        drava_runtime::time::sleep(config.body_timeout).await;
        None
    };
    match future::or(read, late).await {
        Some(Ok(collected)) => Ok(collected.to_bytes()),
        Some(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Some(Err(error)) => Err(Problem::new(ErrorCode::MalformedBody, format!("the body ended early: {error}"))),
        None => Err(Problem::new(
            ErrorCode::SlowClient,
            format!("the body did not come within {} ms", config.body_timeout.as_millis()),
        )),
    }
}
