//! Paths and what stands behind them. The table here, openapi.json and [`ROUTES`] say the same; a test compares them.

mod jobs;
mod models;
mod node;

#[cfg(test)]
pub(super) use node::OPENAPI;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Request};
use axum::http::header;
use axum::routing::{delete, get, post};
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::error::{ApiError, Code};
use super::guard::{self, Hosts, Peer};
use crate::api::Node;
use crate::config::HttpConfig;

/// Most bytes of a JSON body: an inline input of 256 KiB as base64, and the rest of a request.
const JSON_BYTES_MAX: usize = 1 << 20;
/// Most items of a list.
const LIST_MAX: usize = 1_000;
/// Items of a list where the request says nothing.
const LIST_DEFAULT: usize = 100;
/// Time for a whole JSON body; a client on the same machine needs milliseconds.
const JSON_WITHIN: Duration = Duration::from_secs(30);

/// Every route: method and path.
#[cfg(test)]
pub(super) const ROUTES: [(&str, &str); 27] = [
    ("get", "/health"),
    ("get", "/ready"),
    ("get", "/metrics"),
    ("get", "/v1/openapi.json"),
    ("get", "/v1/status"),
    ("get", "/v1/peers"),
    ("get", "/v1/evidence"),
    ("get", "/v1/scores"),
    ("post", "/v1/jobs"),
    ("get", "/v1/jobs"),
    ("get", "/v1/jobs/{id}"),
    ("delete", "/v1/jobs/{id}"),
    ("get", "/v1/jobs/{id}/events"),
    ("get", "/v1/jobs/{id}/output"),
    ("get", "/v1/jobs/{id}/proof"),
    ("get", "/v1/miner/jobs"),
    ("get", "/v1/executors"),
    ("delete", "/v1/executors/{id}"),
    ("post", "/v1/executors/invites"),
    ("get", "/v1/models"),
    ("post", "/v1/models"),
    ("get", "/v1/models/show"),
    ("post", "/v1/models/fetch"),
    ("get", "/v1/models/progress"),
    ("post", "/v1/models/pin"),
    ("post", "/v1/models/rm"),
    ("post", "/v1/models/gc"),
];

/// What every route needs.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) node: Node,
    /// One permit an upload that runs.
    uploads: Arc<Semaphore>,
    /// Where uploads lie until their job has them.
    spool: PathBuf,
    /// Ends event streams when the API shuts down.
    stop: CancellationToken,
}

/// The API of `node`. Uploads are spooled into `spool`.
pub(super) fn router(node: Node, config: &HttpConfig, spool: PathBuf, stop: CancellationToken) -> Router {
    let shared = Shared { node, uploads: Arc::new(Semaphore::new(config.uploads_max.max(1))), spool, stop };
    Router::new()
        .route("/health", get(node::health))
        .route("/ready", get(node::ready))
        .route("/metrics", get(node::metrics))
        .route("/v1/openapi.json", get(node::openapi))
        .route("/v1/status", get(node::status))
        .route("/v1/peers", get(node::peers))
        .route("/v1/evidence", get(node::evidence))
        .route("/v1/scores", get(node::scores))
        .route("/v1/jobs", post(jobs::submit).get(jobs::list))
        .route("/v1/jobs/{id}", get(jobs::show).merge(delete(jobs::cancel)))
        .route("/v1/jobs/{id}/events", get(jobs::events))
        .route("/v1/jobs/{id}/output", get(jobs::output))
        .route("/v1/jobs/{id}/proof", get(jobs::proof))
        .route("/v1/miner/jobs", get(node::miner_jobs))
        .route("/v1/executors", get(node::executors))
        .route("/v1/executors/{id}", delete(node::revoke))
        .route("/v1/executors/invites", post(node::invite))
        .route("/v1/models", get(models::list).merge(post(models::publish)))
        .route("/v1/models/show", get(models::show))
        .route("/v1/models/fetch", post(models::fetch))
        .route("/v1/models/progress", get(models::progress))
        .route("/v1/models/pin", post(models::pin))
        .route("/v1/models/rm", post(models::rm))
        .route("/v1/models/gc", post(models::gc))
        // Bodies are bounded where they are read, each by its own limit.
        .layer(DefaultBodyLimit::disable())
        .layer(axum::middleware::from_fn_with_state(Hosts::new(&config.hosts), guard::check))
        .with_state(shared)
}

/// A JSON body. The type of the body must say so: a page of another site cannot send that type unasked.
pub(super) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        if media_type(&request) != Some("application/json") {
            let error = ApiError::new(Code::UnsupportedMedia, "the body must be JSON");
            return Err(error.hint("send it with `content-type: application/json`"));
        }
        let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|len| len.to_str().ok()?.parse().ok());
        if announced.is_some_and(|len: usize| len > JSON_BYTES_MAX) {
            return Err(too_large());
        }
        let read = tokio::time::timeout(JSON_WITHIN, axum::body::to_bytes(request.into_body(), JSON_BYTES_MAX));
        let read = read.await.map_err(|_| ApiError::new(Code::Timeout, "the body did not come within 30 s"))?;
        let bytes = read.map_err(|e| body_error(&e))?;
        let value = serde_json::from_slice(&bytes);
        value.map(Self).map_err(|e| ApiError::new(Code::BadRequest, format!("the body does not fit: {e}")))
    }
}

/// A query. Unknown names are refused.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, _: &S) -> Result<Self, ApiError> {
        Self::of(&parts.uri)
    }
}

impl<T: DeserializeOwned> Query<T> {
    fn of(uri: &axum::http::Uri) -> Result<Self, ApiError> {
        let query = axum::extract::Query::<T>::try_from_uri(uri);
        let unfit =
            |e: QueryRejection| ApiError::new(Code::BadRequest, format!("the query does not fit: {}", e.body_text()));
        query.map(|query| Self(query.0)).map_err(unfit)
    }
}

/// The media type of a request's body, without parameters.
fn media_type(request: &Request) -> Option<&str> {
    let value = request.headers().get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim())
}

fn body_error(error: &axum::Error) -> ApiError {
    let source = std::error::Error::source(error);
    match source.is_some_and(|source| source.is::<http_body_util::LengthLimitError>()) {
        true => too_large(),
        false => ApiError::new(Code::BadRequest, format!("the body broke off: {error}")),
    }
}

fn too_large() -> ApiError {
    let error = ApiError::new(Code::TooLarge, format!("a JSON body has at most {JSON_BYTES_MAX} bytes"));
    error.hint(
        "send a large input as the body itself, `content-type: application/octet-stream`, and the rest as the query",
    )
}

/// Refuses callers from other machines: for routes that name files of this one.
fn local_only(peer: Option<axum::Extension<Peer>>) -> Result<(), ApiError> {
    match peer {
        Some(axum::Extension(Peer(peer))) if !peer.ip().to_canonical().is_loopback() => {
            let error = ApiError::new(Code::Forbidden, "this route reads files of the node's machine");
            Err(error.hint("call it on that machine"))
        }
        _ => Ok(()),
    }
}

fn list_limit(asked: Option<usize>) -> usize {
    asked.unwrap_or(LIST_DEFAULT).min(LIST_MAX)
}
