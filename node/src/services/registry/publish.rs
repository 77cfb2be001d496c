//! Publishing a directory, and keeping what was published alive.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prost::Message as _;
use serde::Serialize;
use sundara_proto::crypto::{HotkeyPair, Signed};
use sundara_proto::id::{BlobId, Hotkey, ModelId};
use sundara_proto::model::{Artifact, ModelManifest, ModelRecord};
use sundara_proto::units::{ByteCount, UnixMillis};
use sundara_proto::wire::{WireMessage, limit};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::books::{self, InstalledRow};
use super::pack::{self, Pack};
use super::{Inner, RegistryError, local, progress};
use crate::blobs::{Access, ImportMode, Sources, lock};
use crate::domain::catalog::{ModelName, name_of};

/// After a record could not be put into the DHT: when it is tried again, at first and at most.
const RETRY_FIRST: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(600);

/// What a publication made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Published {
    /// Under whose hotkey.
    pub publisher: Hotkey,
    /// The name.
    pub name: String,
    /// The version.
    pub version: u64,
    /// The model.
    pub model: ModelId,
    /// Blob of the manifest.
    pub manifest: BlobId,
    /// Files, the program included.
    pub files: usize,
    /// Their bytes.
    pub size: ByteCount,
    /// Why the DHT does not have the record yet; it is tried again. `None`: it has.
    pub unannounced: Option<String>,
}

pub(crate) async fn publish(inner: &Arc<Inner>, dir: PathBuf, hotkey: HotkeyPair) -> Result<Published, RegistryError> {
    // The whole publication runs to its end even when the caller leaves: half a model helps nobody.
    let inner = inner.clone();
    let task = tokio::spawn(async move { publish_all(&inner, &hotkey, dir).await });
    task.await.unwrap_or(Err(RegistryError::Blob(crate::blobs::BlobError::Closed)))
}

async fn publish_all(inner: &Inner, hotkey: &HotkeyPair, dir: PathBuf) -> Result<Published, RegistryError> {
    let _one = inner.publishing.lock().await;
    let of = dir.display().to_string();
    let pack = tokio::task::spawn_blocking(move || pack::read(&dir)).await;
    let pack = pack.unwrap_or_else(|e| Err(pack::PackError::Parse { path: PathBuf::new(), reason: e.to_string() }))?;
    let name = ModelName { publisher: hotkey.hotkey(), name: pack.name.clone() };
    // Another node of this hotkey may have published meanwhile; without the DHT what is known here must do.
    if let Err(e) = books::look_up(inner, &name).await {
        tracing::debug!(error = %e, "publishing without asking the dht for earlier versions");
    }
    refuse_old(inner, &name, pack.version)?;
    let manifest = import(inner, pack, of).await?;
    let encoded = manifest.encode();
    if encoded.len() > limit::MANIFEST {
        return Err(RegistryError::ManifestTooLarge);
    }
    let encoded_len = ByteCount(encoded.len() as u64);
    let model = ModelManifest::id_of(&encoded);
    let blob = inner.blobs.put(encoded.into(), Access::Public).await?;
    books::put_installed(inner, &model, InstalledRow { manifest: blob, pinned: false }).await?;
    local::set_pinned(inner, model, true).await?;
    let record = sign(inner, hotkey, &name.name, manifest.version, model, blob);
    // Persisted, then announced.
    books::hear(inner, record.clone()).await?;
    let unannounced = put(inner, &record).await.err();
    // They are here: this makes the node provide them at once.
    let blobs = manifest.blobs().map(|a| (a.blob, a.len)).chain([(blob, encoded_len)]);
    for (blob, len) in blobs {
        inner.transfer.fetch(blob, len, Sources::default(), Access::Public).await?;
    }
    if let Some(reason) = &unannounced {
        tracing::warn!(name = name.name, reason, "published here; the dht does not have the record yet");
        inner.unannounced.notify_one();
    }
    Ok(Published {
        publisher: name.publisher,
        name: name.name,
        version: manifest.version,
        model,
        manifest: blob,
        files: manifest.blobs().count(),
        size: ByteCount(manifest.blobs().map(|a| a.len.0).sum()),
        unannounced,
    })
}

fn refuse_old(inner: &Inner, name: &ModelName, version: u64) -> Result<(), RegistryError> {
    match lock(&inner.catalog).floor(name) {
        Some(highest) if version <= highest => {
            Err(RegistryError::VersionNotHigher { name: name.name.clone(), version, highest })
        }
        _ => Ok(()),
    }
}

async fn import(inner: &Inner, pack: Pack, of: String) -> Result<ModelManifest, RegistryError> {
    // A file that has gone is told of when its turn comes.
    let len = |(_, path): &(String, PathBuf)| std::fs::metadata(path).map_or(0, |meta| meta.len());
    let hashed = Arc::new(AtomicU64::new(0));
    let _listed = progress::hashing(inner, of, pack.files.iter().map(len).sum(), hashed.clone());
    let mode = if inner.config.publish_by_link { ImportMode::Link } else { ImportMode::Copy };
    let mut artifacts = Vec::with_capacity(pack.files.len());
    for (name, path) in pack.files {
        let made = inner.blobs.import_counted(path, mode, Access::Public, hashed.clone()).await?;
        artifacts.push(Artifact { name, blob: made.id, len: made.len });
    }
    let program = artifacts.remove(0);
    Ok(ModelManifest {
        name: pack.name,
        version: pack.version,
        engine: pack.engine,
        program,
        artifacts,
        limits: pack.limits,
        determinism: pack.determinism,
        tier: pack.tier,
        hardware_class: pack.hardware_class,
        init: pack.init,
        entry: pack.entry,
        description: pack.description,
        license: pack.license,
    })
}

fn sign(
    inner: &Inner,
    hotkey: &HotkeyPair,
    name: &str,
    version: u64,
    model: ModelId,
    manifest: BlobId,
) -> Signed<ModelRecord> {
    let life = Duration::from_secs(inner.config.record_life_s).clamp(Duration::from_secs(60), ModelRecord::LIFE_MAX);
    let issued_at = inner.now();
    let record = ModelRecord {
        network: inner.network,
        name: name.to_owned(),
        version,
        model,
        manifest,
        issued_at,
        expires_at: issued_at.plus(life),
    };
    Signed::sign(&inner.network, hotkey, record)
}

async fn put(inner: &Inner, record: &Signed<ModelRecord>) -> Result<(), String> {
    inner.net.put_record(inner.key(&name_of(record)), record.to_wire().encode_to_vec()).await
}

/// Puts own records into the DHT again and again, signed anew once half their life is over.
pub(crate) async fn renew(inner: Arc<Inner>, token: CancellationToken) {
    let every = Duration::from_secs(inner.config.republish_every_s.max(60));
    let mut retry = RETRY_FIRST;
    loop {
        let all_put = renew_all(&inner).await;
        let wait = if all_put { every } else { retry };
        retry = if all_put { RETRY_FIRST } else { (retry * 2).min(RETRY_MAX) };
        tokio::select! {
            () = token.cancelled() => return,
            () = sleep(wait) => {}
            // At once would fail again: the node may have just started.
            () = async { inner.unannounced.notified().await; sleep(RETRY_FIRST).await } => {}
        }
    }
}

/// Renews and puts the latest version of each own name. Whether the DHT took all of them.
pub(crate) async fn renew_all(inner: &Inner) -> bool {
    let Some(hotkey) = inner.hotkey.clone() else { return true };
    let own: Vec<Signed<ModelRecord>> = {
        let catalog = lock(&inner.catalog);
        let own = catalog.iter().filter(|k| k.latest && !k.equivocal && k.record.publisher() == hotkey.hotkey());
        own.map(|k| k.record.clone()).collect()
    };
    let mut all_put = true;
    for record in own {
        let record = match renewed(inner, &hotkey, record).await {
            Ok(record) => record,
            Err(e) => {
                tracing::warn!(error = %e, "an own record could not be renewed");
                all_put = false;
                continue;
            }
        };
        if let Err(reason) = put(inner, &record).await {
            tracing::debug!(name = record.name, reason, "own record not put into the dht; trying again");
            all_put = false;
        }
    }
    all_put
}

async fn renewed(
    inner: &Inner,
    hotkey: &HotkeyPair,
    record: Signed<ModelRecord>,
) -> Result<Signed<ModelRecord>, RegistryError> {
    let half: UnixMillis = record.issued_at.plus(record.issued_at.until(record.expires_at) / 2);
    // A model that its operator removed here is no longer vouched for: its record lapses.
    if inner.now() < half || !inner.blobs.has(&record.manifest) {
        return Ok(record);
    }
    let record = sign(inner, hotkey, &record.name, record.version, record.model, record.manifest);
    books::hear(inner, record.clone()).await?;
    Ok(record)
}
