//! Models on this disk: fetched once, verified, held while in use.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use sundara_proto::id::{BlobId, ModelId, NodeId};
use sundara_proto::model::{Artifact, ModelManifest};
use sundara_proto::units::ByteCount;
use sundara_proto::wire::{WireMessage, limit};
use tokio::time::Instant;

use super::books::{self, InstalledRow};
use super::{Files, Inner, READY_FOR, RegistryError};
use crate::blobs::{Access, BlobError, BlobLen, Collected, Sources, lock};

/// A model whose files are here, verified, and kept in place while this lives.
#[derive(Clone, Debug)]
pub struct LocalModel {
    /// The model.
    pub model: ModelId,
    /// Its manifest.
    pub manifest: ModelManifest,
    /// The program's file. Not to be written to.
    pub program: PathBuf,
    /// Name under /model, blob and file of each artifact. Not to be written to.
    pub artifacts: Vec<(String, BlobId, PathBuf)>,
    _files: Arc<Files>,
}

/// A model that was verified a moment ago.
#[derive(Clone)]
pub(crate) struct Ready {
    model: LocalModel,
    /// Blob of its manifest.
    blob: BlobId,
    since: Instant,
}

pub(crate) async fn local(
    inner: &Inner,
    model: ModelId,
    manifest: BlobId,
    hints: Vec<NodeId>,
) -> Result<LocalModel, RegistryError> {
    if let Some(ready) = ready(inner, &model) {
        return Ok(ready.model);
    }
    // Those who come meanwhile wait here and find it ready.
    let turn = lock(&inner.fetching).entry(model).or_default().clone();
    let guard = turn.lock().await;
    let result = match ready(inner, &model) {
        Some(ready) => Ok(ready.model),
        None => install(inner, model, manifest, hints).await,
    };
    drop(guard);
    let mut fetching = lock(&inner.fetching);
    // Ours and the map's: nobody else waits.
    if Arc::strong_count(&turn) <= 2 {
        fetching.remove(&model);
    }
    result
}

/// Forgets what was verified too long ago, so that it can be evicted, and returns `model` if it is still fresh.
fn ready(inner: &Inner, model: &ModelId) -> Option<Ready> {
    let mut ready = lock(&inner.ready);
    ready.retain(|_, r| r.since.elapsed() < READY_FOR);
    ready.get(model).cloned()
}

async fn install(inner: &Inner, model: ModelId, blob: BlobId, hints: Vec<NodeId>) -> Result<LocalModel, RegistryError> {
    let manifest = manifest(inner, model, blob, hints.clone()).await?;
    let mut files = Files::new();
    for artifact in manifest.blobs() {
        files.push(artifact_file(inner, artifact, &hints).await?);
    }
    let path = |at: usize| files[at].path().to_owned();
    let artifacts = manifest.artifacts.iter().enumerate().map(|(i, a)| (a.name.clone(), a.blob, path(i + 1))).collect();
    let program = path(0);
    let local = LocalModel { model, manifest, program, artifacts, _files: Arc::new(files) };
    lock(&inner.ready).insert(model, Ready { model: local.clone(), blob, since: Instant::now() });
    Ok(local)
}

/// The verified file of an artifact. A file that turns out damaged is fetched again, once.
async fn artifact_file(
    inner: &Inner,
    artifact: &Artifact,
    hints: &[NodeId],
) -> Result<crate::blobs::BlobFile, RegistryError> {
    let fetch = || inner.transfer.fetch(artifact.blob, artifact.len, Sources::dht(hints.to_vec()), Access::Public);
    if !inner.blobs.has(&artifact.blob) {
        fetch().await?;
    }
    match inner.blobs.path(artifact.blob).await {
        Err(BlobError::Corrupt { .. } | BlobError::NotFound { .. } | BlobError::Incomplete { .. }) => {
            fetch().await?;
            Ok(inner.blobs.path(artifact.blob).await?)
        }
        other => Ok(other?),
    }
}

/// A model's manifest, fetched if need be, and noted as here.
pub(crate) async fn manifest(
    inner: &Inner,
    model: ModelId,
    blob: BlobId,
    hints: Vec<NodeId>,
) -> Result<ModelManifest, RegistryError> {
    // A busy validator asks for every job.
    if let Some(ready) = ready(inner, &model).filter(|r| r.blob == blob) {
        return Ok(ready.model.manifest);
    }
    if let Ok(manifest) = manifest_here(inner, model, blob).await {
        return Ok(manifest);
    }
    if !inner.blobs.has(&blob) {
        let max = ByteCount(limit::MANIFEST as u64);
        inner.transfer.fetch(blob, BlobLen::AtMost(max), Sources::dht(hints), Access::Public).await?;
    }
    let manifest = manifest_here(inner, model, blob).await?;
    if books::installed_one(inner, &model)?.is_none() {
        books::put_installed(inner, &model, InstalledRow { manifest: blob, pinned: false }).await?;
    }
    Ok(manifest)
}

pub(crate) async fn manifest_here(inner: &Inner, model: ModelId, blob: BlobId) -> Result<ModelManifest, RegistryError> {
    let bytes = inner.blobs.get(blob, ByteCount(limit::MANIFEST as u64)).await?;
    let wrong = |reason: String| RegistryError::WrongManifest { model, manifest: blob, reason };
    if ModelManifest::id_of(&bytes) != model {
        return Err(wrong("its digest is another model's".to_owned()));
    }
    ModelManifest::decode(&bytes).map_err(|e| wrong(e.to_string()))
}

async fn here(inner: &Inner, model: ModelId) -> Result<(InstalledRow, ModelManifest), RegistryError> {
    let row = books::installed_one(inner, &model)?.ok_or(RegistryError::NotHere { model })?;
    let manifest = manifest_here(inner, model, row.manifest).await;
    manifest.map(|m| (row, m)).map_err(|_| RegistryError::NotHere { model })
}

pub(crate) async fn set_pinned(inner: &Inner, model: ModelId, pinned: bool) -> Result<(), RegistryError> {
    let (row, manifest) = here(inner, model).await?;
    if pinned && let Some(missing) = manifest.blobs().find(|a| !inner.blobs.has(&a.blob)) {
        tracing::debug!(model = %model, artifact = missing.name, "cannot pin an incomplete model");
        return Err(RegistryError::NotHere { model });
    }
    books::put_installed(inner, &model, InstalledRow { pinned, ..row }).await?;
    let shared = if pinned { HashSet::new() } else { used_by_others(inner, model, true).await? };
    for blob in blobs_of(&row, &manifest).filter(|b| !shared.contains(b)) {
        inner.blobs.set_pinned(blob, pinned).await?;
    }
    Ok(())
}

fn blobs_of<'a>(row: &InstalledRow, manifest: &'a ModelManifest) -> impl Iterator<Item = BlobId> + use<'a> {
    std::iter::once(row.manifest).chain(manifest.blobs().map(|a| a.blob))
}

/// Blobs of the other models here, or of the pinned ones among them.
async fn used_by_others(inner: &Inner, model: ModelId, pinned_only: bool) -> Result<HashSet<BlobId>, RegistryError> {
    let mut used = HashSet::new();
    for (other, row) in books::installed(inner)? {
        if other == model || (pinned_only && !row.pinned) {
            continue;
        }
        if let Ok(manifest) = manifest_here(inner, other, row.manifest).await {
            used.extend(blobs_of(&row, &manifest));
        }
    }
    Ok(used)
}

pub(crate) async fn remove(inner: &Inner, model: ModelId) -> Result<Collected, RegistryError> {
    let (row, manifest) = here(inner, model).await?;
    lock(&inner.ready).remove(&model);
    let shared = used_by_others(inner, model, false).await?;
    let mut gone = Collected::default();
    // The manifest last: until then the model can be named and removed again.
    let blobs: Vec<BlobId> = blobs_of(&row, &manifest).filter(|b| !shared.contains(b)).collect();
    for blob in blobs.into_iter().rev() {
        let len = inner.blobs.info(&blob).map_or(ByteCount(0), |info| info.held);
        if inner.blobs.delete(blob).await? {
            gone.blobs += 1;
            gone.bytes.0 += len.0;
        }
    }
    books::drop_installed(inner, &[model]).await?;
    Ok(gone)
}

pub(crate) async fn gc(inner: &Inner) -> Result<Collected, RegistryError> {
    lock(&inner.ready).clear();
    let collected = inner.blobs.gc().await?;
    let rows = books::installed(inner)?;
    let gone: Vec<ModelId> =
        rows.into_iter().filter(|(_, row)| !inner.blobs.has(&row.manifest)).map(|(model, _)| model).collect();
    if !gone.is_empty() {
        books::drop_installed(inner, &gone).await?;
    }
    Ok(collected)
}
