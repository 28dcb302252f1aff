//! Errors as RFC 9457 problems, with the stable numbers of the wire protocol.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use drava_protocol::ErrorCode;
use drava_protocol::topic::TopicNameError;
use serde::Serialize;
use utoipa::ToSchema;

use crate::control::request::Refused;

pub const CONTENT_TYPE: &str = "application/problem+json";
/// What clients are told to wait before they ask again, in seconds.
const RETRY_AFTER_SECONDS: u16 = 1;

/// Why a request was refused (RFC 9457).
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Problem {
    /// Identifies the kind of problem: `urn:drava:error:` and the name.
    #[serde(rename = "type")]
    #[schema(example = "urn:drava:error:UnknownTopic")]
    kind: String,
    /// The kind of problem, for people.
    #[schema(example = "unknown topic")]
    title: String,
    /// The HTTP status.
    #[schema(example = 404)]
    status: u16,
    /// What happened here, for people.
    detail: String,
    /// The error's stable number, as in the wire protocol.
    #[schema(example = 20)]
    code: u16,
    /// The name of that number.
    #[schema(example = "UnknownTopic")]
    name: String,
    retry: Retry,
}

/// Whether the same request may succeed later, and where.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Retry {
    No,
    Here,
    Elsewhere,
}

impl Problem {
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Problem::with_status(status(code), code, detail)
    }

    /// For what HTTP says more exactly than the error number does.
    pub fn with_status(status: StatusCode, code: ErrorCode, detail: impl Into<String>) -> Self {
        let name = format!("{code:?}");
        Problem {
            kind: format!("urn:drava:error:{name}"),
            title: words(&name),
            status: status.as_u16(),
            detail: detail.into(),
            code: code as u16,
            name,
            retry: match code.retry() {
                drava_protocol::Retry::No => Retry::No,
                drava_protocol::Retry::Here => Retry::Here,
                drava_protocol::Retry::Elsewhere => Retry::Elsewhere,
            },
        }
    }

    pub fn invalid(detail: impl Into<String>) -> Self {
        Problem::new(ErrorCode::InvalidArgument, detail)
    }
}

/// The status that says about the same as `code`.
pub fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::Internal | ErrorCode::StorageFailed | ErrorCode::StorageDamaged => StatusCode::INTERNAL_SERVER_ERROR,
        ErrorCode::MalformedFrame
        | ErrorCode::FrameChecksum
        | ErrorCode::UnsupportedVersion
        | ErrorCode::UnexpectedFrame
        | ErrorCode::MalformedBody
        | ErrorCode::HandshakeRequired
        | ErrorCode::InvalidArgument
        | ErrorCode::InvalidTopicName
        | ErrorCode::MalformedBatch
        | ErrorCode::BatchChecksum
        | ErrorCode::OffsetOutOfRange => StatusCode::BAD_REQUEST,
        ErrorCode::FrameTooLarge | ErrorCode::BatchTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::SlowClient => StatusCode::REQUEST_TIMEOUT,
        ErrorCode::TooManyConnections | ErrorCode::ShuttingDown | ErrorCode::MetadataUnavailable | ErrorCode::Busy => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        ErrorCode::Unauthenticated => StatusCode::UNAUTHORIZED,
        ErrorCode::PermissionDenied => StatusCode::FORBIDDEN,
        ErrorCode::UnknownTopic | ErrorCode::UnknownPartition | ErrorCode::UnknownSubscription => StatusCode::NOT_FOUND,
        ErrorCode::WrongOwner => StatusCode::MISDIRECTED_REQUEST,
        ErrorCode::TopicExists
        | ErrorCode::SequenceGap
        | ErrorCode::SequenceOverlap
        | ErrorCode::ProducerFenced
        | ErrorCode::SubscriptionBusy => StatusCode::CONFLICT,
        ErrorCode::StorageFull => StatusCode::INSUFFICIENT_STORAGE,
    }
}

/// `UnknownTopic` as `unknown topic`.
fn words(name: &str) -> String {
    let mut words = String::with_capacity(name.len() + 4);
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !words.is_empty() {
            words.push(' ');
        }
        words.push(letter.to_ascii_lowercase());
    }
    words
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        Problem::new(refused.code, refused.text)
    }
}

impl From<TopicNameError> for Problem {
    fn from(error: TopicNameError) -> Self {
        Problem::new(ErrorCode::InvalidTopicName, error.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).expect("made from a status");
        let body = serde_json::to_vec(&self).expect("strings and numbers become JSON");
        let mut response = (status, [(header::CONTENT_TYPE, CONTENT_TYPE)], body).into_response();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
        }
        response
    }
}
