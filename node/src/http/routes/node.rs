//! Routes of the node itself.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use sundara_proto::id::NodeId;

use super::{JsonBody, Query, Shared, list_limit};
use crate::api::Status;
use crate::http::error::{ApiError, Code};
use crate::http::types::{Epoch, InviteRequest, Items, Limit};

/// The description of this API, as programs read it.
pub(in crate::http) const OPENAPI: &str = include_str!("../openapi.json");
/// Life of an invite unless the request says otherwise.
const INVITE_LIFE_DEFAULT: Duration = Duration::from_secs(24 * 3600);

/// `GET /health`: the process answers.
pub(super) async fn health() -> Json<serde_json::Value> {
    Json(json!({ "status": "ok" }))
}

/// `GET /ready`: the node can do its work; 503 and what is missing while it cannot.
pub(super) async fn ready(State(shared): State<Shared>) -> Response {
    let status = shared.node.status().await;
    let ready = status.is_ready();
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({ "ready": ready, "missing": status.missing }))).into_response()
}

/// `GET /v1/openapi.json`.
pub(super) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

/// `GET /metrics`: OpenMetrics text.
pub(super) async fn metrics(State(shared): State<Shared>) -> Result<Response, ApiError> {
    let text = shared.node.metrics().await.map_err(|e| ApiError::new(Code::Internal, e.to_string()))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// `GET /v1/status`.
pub(super) async fn status(State(shared): State<Shared>) -> Json<Status> {
    Json(shared.node.status().await)
}

/// `GET /v1/peers`.
pub(super) async fn peers(State(shared): State<Shared>) -> Response {
    Json(Items { items: shared.node.peers().await }).into_response()
}

/// `GET /v1/evidence`: offences that this node found or heard of, with proof.
pub(super) async fn evidence(State(shared): State<Shared>, Query(limit): Query<Limit>) -> Result<Response, ApiError> {
    let cases = shared.node.evidence(list_limit(limit.limit));
    let items = cases.map_err(|e| ApiError::new(Code::Internal, e.to_string()))?;
    Ok(Json(Items { items }).into_response())
}

/// `GET /v1/scores`: what an epoch comes to for each miner, as this validator knows it.
#[cfg(feature = "executor")]
pub(super) async fn scores(State(shared): State<Shared>, Query(which): Query<Epoch>) -> Result<Response, ApiError> {
    let scores = shared.node.scores(which.epoch).await;
    match scores.map_err(|e| ApiError::new(Code::Internal, e.to_string()))? {
        Some(scores) => Ok(Json(scores).into_response()),
        None => Err(ApiError::new(Code::NotServed, "this node scores nobody").hint("ask a validator")),
    }
}

/// `GET /v1/miner/jobs`: offers to this miner with what became of them.
#[cfg(feature = "executor")]
pub(super) async fn miner_jobs(State(shared): State<Shared>, Query(limit): Query<Limit>) -> Result<Response, ApiError> {
    if !shared.node.is_miner() {
        return Err(ApiError::new(Code::NotServed, "this node is no miner").hint("start it with --role miner"));
    }
    let log = shared.node.miner_jobs(list_limit(limit.limit));
    let items = log.map_err(|e| ApiError::new(Code::Internal, e.to_string()))?;
    Ok(Json(Items { items }).into_response())
}

/// `GET /v1/executors`: executors of this miner or validator.
#[cfg(feature = "executor")]
pub(super) async fn executors(State(shared): State<Shared>) -> Result<Response, ApiError> {
    let items = shared.node.executors().map_err(|e| ApiError::new(Code::Internal, e.to_string()))?;
    Ok(Json(Items { items }).into_response())
}

/// `DELETE /v1/executors/{id}`: sends an attached executor away.
#[cfg(feature = "executor")]
pub(super) async fn revoke(State(shared): State<Shared>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let node: NodeId = id.parse().map_err(|_| ApiError::new(Code::BadRequest, "not the node key of an executor"))?;
    match shared.node.revoke_executor(node).await {
        Ok(true) => Ok(Json(json!({ "revoked": node })).into_response()),
        Ok(false) => Err(ApiError::new(Code::NotFound, format!("there is no attached executor {id} here"))),
        Err(e) => Err(ApiError::new(Code::Refused, e.to_string())),
    }
}

/// `POST /v1/executors/invites`: a one-time secret for an executor of this miner or validator.
#[cfg(feature = "executor")]
pub(super) async fn invite(
    State(shared): State<Shared>,
    JsonBody(body): JsonBody<InviteRequest>,
) -> Result<Response, ApiError> {
    let life = body.life_s.map_or(INVITE_LIFE_DEFAULT, Duration::from_secs);
    let invite = shared.node.invite_executor(life).await.map_err(|e| ApiError::new(Code::Refused, e.to_string()))?;
    Ok((StatusCode::CREATED, Json(invite)).into_response())
}
