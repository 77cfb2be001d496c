//! The one error map: what goes wrong behind a route, as a status and a JSON body.
//!
//! `{"error": {"code": "...", "message": "...", "hint": "..."}}`. Codes are stable, messages are for people, a hint says
//! what to change and may be absent.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

/// Kinds of errors, as clients tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Code {
    /// The request is not one.
    BadRequest,
    /// The `Host` or `Origin` is not this node's, or the route is for this machine only.
    Forbidden,
    /// There is no such thing.
    NotFound,
    /// The method does not fit the path.
    MethodNotAllowed,
    /// It is not in a state for this.
    Conflict,
    /// More bytes than the limit.
    TooLarge,
    /// The body's media type is not one of those that the route takes.
    UnsupportedMedia,
    /// The node would not do it.
    Refused,
    /// A limit of the node is reached; later it may go.
    Busy,
    /// This node does not play the role.
    NotServed,
    /// The job ended without a verified result.
    JobFailed,
    /// The node is at fault.
    Internal,
    /// The node starts or stops.
    Unavailable,
    /// The other side took too long.
    Timeout,
}

impl Code {
    /// The status that goes with it.
    pub fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound | Self::NotServed => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Conflict | Self::JobFailed => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMedia => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Refused => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Busy => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
        }
    }
}

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// Its kind.
    pub code: Code,
    /// What went wrong, for people.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// The body of an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ApiError,
}

impl ApiError {
    /// An error without a hint.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    /// With what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// There is no such thing.
    pub fn not_found(what: &str, id: impl std::fmt::Display) -> Self {
        Self::new(Code::NotFound, format!("there is no {what} {id} here"))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.code == Code::Internal {
            tracing::error!(message = %self.message, "a request failed inside the node");
        }
        (self.code.status(), Json(ErrorBody { error: self })).into_response()
    }
}
