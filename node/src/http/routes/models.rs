//! Routes of models.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};
use sundara_proto::model::{Artifact, ModelManifest};

use super::{JsonBody, Query, Shared, local_only};
use crate::api::{Progress, RegistryError};
use crate::http::error::{ApiError, Code};
use crate::http::guard::Peer;
use crate::http::types::{Items, ModelRequest, Nothing, PinRequest, PublishRequest};

/// `GET /v1/models`.
pub(super) async fn list(State(shared): State<Shared>) -> Result<Response, ApiError> {
    let items = shared.node.models().list().await.map_err(refused)?;
    Ok(Json(Items { items }).into_response())
}

/// `POST /v1/models`: publishes a directory of this machine.
pub(super) async fn publish(
    State(shared): State<Shared>,
    peer: Option<Extension<Peer>>,
    JsonBody(body): JsonBody<PublishRequest>,
) -> Result<Response, ApiError> {
    local_only(peer)?;
    if !body.path.is_absolute() {
        return Err(ApiError::new(
            Code::BadRequest,
            "`path` must be absolute: the node has a working directory of its own",
        ));
    }
    let published = shared.node.models().publish(body.path).await.map_err(refused)?;
    Ok((StatusCode::CREATED, Json(published)).into_response())
}

/// `GET /v1/models/show`.
pub(super) async fn show(
    State(shared): State<Shared>,
    Query(body): Query<ModelRequest>,
) -> Result<Json<Value>, ApiError> {
    let shown = shared.node.models().show(&body.model).await.map_err(refused)?;
    let record = &shown.record;
    Ok(Json(json!({
        "publisher": record.publisher(),
        "name": record.name,
        "version": record.version,
        "model": record.model,
        "manifest_blob": record.manifest,
        "issued_at_ms": record.issued_at.0,
        "expires_at_ms": record.expires_at.0,
        "size_bytes": shown.size.0,
        "local": shown.local,
        "manifest": manifest(&shown.manifest),
    })))
}

/// `POST /v1/models/fetch`: answers when all of it is here.
pub(super) async fn fetch(
    State(shared): State<Shared>,
    JsonBody(body): JsonBody<ModelRequest>,
) -> Result<Json<Value>, ApiError> {
    let local = shared.node.models().fetch(&body.model).await.map_err(refused)?;
    let bytes: u64 = local.manifest.blobs().map(|artifact| artifact.len.0).sum();
    Ok(Json(json!({ "model": local.model, "files": local.artifacts.len() + 1, "size_bytes": bytes })))
}

/// `GET /v1/models/progress`: publications and fetches under way.
pub(super) async fn progress(State(shared): State<Shared>) -> Json<Items<Progress>> {
    Json(Items { items: shared.node.models().progress() })
}

/// `POST /v1/models/pin`.
pub(super) async fn pin(
    State(shared): State<Shared>,
    JsonBody(body): JsonBody<PinRequest>,
) -> Result<Json<Value>, ApiError> {
    let pinned = body.pinned.unwrap_or(true);
    let model = shared.node.models().set_pinned(&body.model, pinned).await.map_err(refused)?;
    Ok(Json(json!({ "model": model, "pinned": pinned })))
}

/// `POST /v1/models/rm`.
pub(super) async fn rm(
    State(shared): State<Shared>,
    JsonBody(body): JsonBody<ModelRequest>,
) -> Result<Response, ApiError> {
    Ok(Json(shared.node.models().remove(&body.model).await.map_err(refused)?).into_response())
}

/// `POST /v1/models/gc`.
pub(super) async fn gc(State(shared): State<Shared>, JsonBody(_): JsonBody<Nothing>) -> Result<Response, ApiError> {
    Ok(Json(shared.node.models().gc().await.map_err(refused)?).into_response())
}

/// A manifest for people and programs.
fn manifest(manifest: &ModelManifest) -> Value {
    let file = |a: &Artifact| json!({ "name": a.name, "blob": a.blob, "bytes": a.len.0 });
    json!({
        "engine": manifest.engine,
        "program": file(&manifest.program),
        "artifacts": manifest.artifacts.iter().map(file).collect::<Vec<_>>(),
        "limits": manifest.limits,
        "determinism": manifest.determinism,
        "tier": manifest.tier,
        "hardware_class": manifest.hardware_class,
        "init": manifest.init,
        "entry": manifest.entry,
        "description": manifest.description,
        "license": manifest.license,
    })
}

fn refused(error: RegistryError) -> ApiError {
    let code = match &error {
        RegistryError::BadName { .. } => Code::BadRequest,
        RegistryError::Unresolved(_) | RegistryError::NotHere { .. } => Code::NotFound,
        RegistryError::Pack(_) | RegistryError::VersionNotHigher { .. } => Code::Refused,
        RegistryError::Store(_) | RegistryError::Damaged(_) => Code::Internal,
        other if other.is_retryable() => Code::Unavailable,
        _ => Code::Refused,
    };
    ApiError::new(code, error.to_string())
}
