//! Names of models: publishes them, finds them, and makes sure that what a job needs is on this disk.
//!
//! **Owns** the catalogue (its rule is `domain::catalog`), this node's own publications and their renewal, and the list of
//! models that are here. **Does not own** bytes (the `blobs` port), their transport (asked for through a
//! [`TransferHandle`]), or the DHT.
//!
//! **Invariants**
//! - A version is persisted before it is announced; equal or lower versions are refused, also after a restart.
//! - What [`RegistryHandle::local`] returns is complete, verified in this process, and stays while it is held.
//! - Any number of jobs that ask for one model at once cause one fetch.
//! - A record counts only under the key that signed it, whatever DHT key it was found under.

mod books;
mod error;
mod local;
mod mesh;
pub(crate) mod pack;
mod progress;
mod publish;

use std::collections::HashMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use sundara_proto::crypto::{HotkeyPair, Network, Signed};
use sundara_proto::id::{BlobId, Hotkey, ModelId, NodeId};
use sundara_proto::model::{ModelManifest, ModelRecord};
use sundara_proto::names::model_record_key;
use sundara_proto::units::{ByteCount, UnixMillis};
use sundara_proto::wire;

use crate::blobs::{BlobFile, Blobs, Collected, TransferHandle, lock};
use crate::domain::catalog::{Catalog, ModelName};
use crate::net::NetHandle;
use crate::service::{Tasks, wall_now};
use crate::store::SharedStore;

pub use error::RegistryError;
pub use local::LocalModel;
pub use progress::Progress;
pub use publish::Published;

/// Settings of the registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistryConfig {
    /// Life of a signed record, at most 7 days. A publisher that is gone for longer lets its names lapse.
    pub record_life_s: u64,
    /// How often own records are put into the DHT anew; they are signed anew once half their life is over.
    pub republish_every_s: u64,
    /// Publish files by a second name instead of a copy, where the file system can: saves the room of a copy, but writing to
    /// the original afterwards damages the published blob (which is noticed, and named).
    pub publish_by_link: bool,
}

impl Default for RegistryConfig {
    /// 7 days; 6 hours, a quarter of the day after which a DHT node forgets a record.
    fn default() -> Self {
        Self { record_life_s: ModelRecord::LIFE_MAX.as_secs(), republish_every_s: 6 * 3600, publish_by_link: false }
    }
}

/// What the registry needs of the DHT.
#[async_trait]
pub(crate) trait RecordNet: Send + Sync + 'static {
    /// Stores a record at the nodes nearest to its key.
    ///
    /// # Errors
    /// In words.
    async fn put_record(&self, key: sundara_proto::id::Digest, value: Vec<u8>) -> Result<(), String>;
    /// Every record found under a key.
    ///
    /// # Errors
    /// In words.
    async fn get_records(&self, key: sundara_proto::id::Digest) -> Result<Vec<Vec<u8>>, String>;
}

/// A model by name: `PUBLISHER/NAME` or `PUBLISHER/NAME@VERSION`, the publisher as an ss58 address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ModelRef {
    /// Publisher and name.
    pub name: ModelName,
    /// The version; without one, the latest.
    pub version: Option<u64>,
}

impl FromStr for ModelRef {
    type Err = RegistryError;

    fn from_str(text: &str) -> Result<Self, RegistryError> {
        let bad = || RegistryError::BadName { text: text.chars().take(200).collect() };
        let (publisher, rest) = text.split_once('/').ok_or_else(bad)?;
        let (name, version) = match rest.split_once('@') {
            Some((name, version)) => (name, Some(version.parse().map_err(|_| bad())?)),
            None => (rest, None),
        };
        let name = wire::name(name.to_owned(), "name").ok().filter(|n| !n.is_empty()).ok_or_else(bad)?;
        Ok(Self { name: ModelName { publisher: publisher.parse().map_err(|_| bad())?, name }, version })
    }
}

/// One line of a list of models.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Who signed its record; `None` for a model that is here without a known name.
    pub publisher: Option<Hotkey>,
    /// Its name; empty when the manifest is not here and no record names it.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// The model.
    pub model: ModelId,
    /// Blob of its manifest.
    pub manifest: BlobId,
    /// When its record expires.
    pub expires_at: Option<UnixMillis>,
    /// Whether all of it is here.
    pub local: bool,
    /// Whether it is kept whatever the disk cap says.
    pub pinned: bool,
    /// Whether its publisher signed two models for this version.
    pub equivocal: bool,
    /// Whether it is the latest version of its name.
    pub latest: bool,
}

/// A record and what it stands for.
#[derive(Clone, Debug)]
pub struct Shown {
    /// The record.
    pub record: Signed<ModelRecord>,
    /// The manifest.
    pub manifest: ModelManifest,
    /// Bytes of all its files.
    pub size: ByteCount,
    /// Whether all of it is here.
    pub local: bool,
}

pub(crate) struct Inner {
    network: Network,
    config: RegistryConfig,
    blobs: Blobs,
    transfer: TransferHandle,
    store: SharedStore,
    net: Arc<dyn RecordNet>,
    /// Signs what is published; `None` on a node without a hotkey.
    hotkey: Option<HotkeyPair>,
    clock: fn() -> UnixMillis,
    catalog: Mutex<Catalog>,
    /// One publication at a time: a version is compared and written as one step.
    publishing: tokio::sync::Mutex<()>,
    /// Told when a publication was not put into the DHT.
    unannounced: tokio::sync::Notify,
    fetching: Mutex<HashMap<ModelId, Arc<tokio::sync::Mutex<()>>>>,
    ready: Mutex<HashMap<ModelId, local::Ready>>,
    /// As many as there are callers of `publish` and `fetch`.
    under_way: Mutex<Vec<Arc<progress::UnderWay>>>,
}

/// What the registry is made of.
pub(crate) struct RegistryParts {
    /// Settings.
    pub config: RegistryConfig,
    /// Mesh in which names hold.
    pub network: Network,
    /// The DHT.
    pub net: NetHandle,
    /// Where names are kept.
    pub store: SharedStore,
    /// Where bytes are.
    pub blobs: Blobs,
    /// Who fetches them.
    pub transfer: TransferHandle,
    /// Renews this hotkey's records before they expire; `None`: they are put again until they do.
    pub hotkey: Option<HotkeyPair>,
    /// Runs the renewal.
    pub tasks: Tasks,
}

/// Opens the registry on what the store remembers, and starts to renew own records.
///
/// # Errors
/// When the store cannot be read.
pub(crate) fn start(parts: RegistryParts) -> Result<RegistryHandle, RegistryError> {
    let handle = RegistryHandle::open(Inner {
        network: parts.network,
        config: parts.config,
        blobs: parts.blobs,
        transfer: parts.transfer,
        store: parts.store,
        net: Arc::new(parts.net),
        hotkey: parts.hotkey,
        clock: wall_now,
        catalog: Mutex::default(),
        publishing: tokio::sync::Mutex::default(),
        unannounced: tokio::sync::Notify::new(),
        fetching: Mutex::default(),
        ready: Mutex::default(),
        under_way: Mutex::default(),
    })?;
    let renewal = publish::renew(handle.0.clone(), parts.tasks.token());
    parts.tasks.spawn("renew", renewal);
    Ok(handle)
}

/// The registry. Clones share it. Every method is cancel safe: what was begun is either done or begun again.
#[derive(Clone)]
pub(crate) struct RegistryHandle(Arc<Inner>);

impl std::fmt::Debug for RegistryHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryHandle").field("network", &self.0.network).finish_non_exhaustive()
    }
}

/// A model to be installed again at start is looked for among these many rows at most.
const ROWS_MAX: usize = 4096;
/// How long a model that was just verified counts as such: spares a busy executor a look at every file for every job.
const READY_FOR: Duration = Duration::from_secs(5);
/// Allow-listed publishers asked about one model.
const ALLOWED_ASKED_MAX: usize = 64;

impl RegistryHandle {
    /// On what the store remembers.
    fn open(inner: Inner) -> Result<Self, RegistryError> {
        let catalog = books::restore(&inner.store, &inner.network, inner.now())?;
        *lock(&inner.catalog) = catalog;
        Ok(Self(Arc::new(inner)))
    }

    /// Packs the directory, stores it and announces it under `key`. What is published is pinned.
    ///
    /// # Errors
    /// [`RegistryError::Pack`], [`RegistryError::VersionNotHigher`], and the stores'.
    pub(crate) async fn publish(&self, dir: impl Into<PathBuf>, key: &HotkeyPair) -> Result<Published, RegistryError> {
        publish::publish(&self.0, dir.into(), key.clone()).await
    }

    /// The record that `PUBLISHER/NAME[@VERSION]` stands for, from the DHT and from what was heard before.
    ///
    /// # Errors
    /// [`RegistryError::BadName`]; [`RegistryError::Unresolved`]; [`RegistryError::Dht`] when nothing is known and the DHT
    /// cannot be asked.
    pub(crate) async fn resolve(&self, reference: &str) -> Result<Signed<ModelRecord>, RegistryError> {
        self.resolve_ref(&reference.parse()?).await
    }

    /// As [`RegistryHandle::resolve`], of a parsed reference.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn resolve_ref(&self, model: &ModelRef) -> Result<Signed<ModelRecord>, RegistryError> {
        books::resolve(&self.0, model).await
    }

    /// Every model that is here or was heard of.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub(crate) async fn list(&self) -> Result<Vec<Listed>, RegistryError> {
        books::list(&self.0).await
    }

    /// The manifest behind a record, fetched if need be.
    ///
    /// # Errors
    /// As [`RegistryHandle::local`].
    pub(crate) async fn manifest(&self, record: &ModelRecord) -> Result<ModelManifest, RegistryError> {
        self.manifest_of(record.model, record.manifest, &[]).await
    }

    /// A model's manifest, fetched if need be. `hints` are nodes that probably have it.
    ///
    /// # Errors
    /// As [`RegistryHandle::local`].
    pub(crate) async fn manifest_of(
        &self,
        model: ModelId,
        manifest: BlobId,
        hints: &[NodeId],
    ) -> Result<ModelManifest, RegistryError> {
        local::manifest(&self.0, model, manifest, hints.to_vec()).await
    }

    /// A record and its manifest, which is fetched if need be; the files are not.
    ///
    /// # Errors
    /// As [`RegistryHandle::resolve`] and [`RegistryHandle::local`].
    pub(crate) async fn show(&self, reference: &str) -> Result<Shown, RegistryError> {
        let record = self.resolve(reference).await?;
        let manifest = self.manifest(&record).await?;
        let size = ByteCount(manifest.blobs().map(|a| a.len.0).sum());
        let local = manifest.blobs().all(|a| self.0.blobs.has(&a.blob));
        Ok(Shown { record, manifest, size, local })
    }

    /// Makes sure that a named model is here.
    ///
    /// # Errors
    /// As [`RegistryHandle::resolve`] and [`RegistryHandle::local`].
    pub(crate) async fn fetch(&self, reference: &str) -> Result<LocalModel, RegistryError> {
        let record = self.resolve(reference).await?;
        let manifest = self.manifest(&record).await?;
        let _listed = progress::fetching(&self.0, reference, &manifest);
        self.local(record.model, record.manifest, Vec::new()).await
    }

    /// Publications and fetches under way.
    pub(crate) fn progress(&self) -> Vec<Progress> {
        progress::all(&self.0)
    }

    /// A model's files, fetched where they are missing. `hints` are nodes that probably have them: whoever sent the job.
    ///
    /// # Errors
    /// [`RegistryError::Transfer`], [`RegistryError::WrongManifest`], and the blob store's.
    pub(crate) async fn local(
        &self,
        model: ModelId,
        manifest: BlobId,
        hints: Vec<NodeId>,
    ) -> Result<LocalModel, RegistryError> {
        local::local(&self.0, model, manifest, hints).await
    }

    /// Which of the `allowed` publishers vouches for a model, by a record that counts now. `None`: none of them does.
    /// A miner with an allow-list declines such a job.
    ///
    /// # Errors
    /// [`RegistryError::Dht`] when that cannot be found out.
    pub(crate) async fn vouched_by(
        &self,
        model: ModelId,
        name: &str,
        allowed: &[Hotkey],
    ) -> Result<Option<Hotkey>, RegistryError> {
        books::vouched_by(&self.0, model, name, allowed).await
    }

    /// Keeps a model that is here whatever the disk cap says, or no longer.
    ///
    /// # Errors
    /// [`RegistryError::NotHere`].
    pub(crate) async fn set_pinned(&self, model: ModelId, pinned: bool) -> Result<(), RegistryError> {
        local::set_pinned(&self.0, model, pinned).await
    }

    /// Deletes a model's files, except those that another model here uses too.
    ///
    /// # Errors
    /// [`RegistryError::NotHere`]; [`crate::blobs::BlobError::InUse`] while a job runs it.
    pub(crate) async fn remove(&self, model: ModelId) -> Result<Collected, RegistryError> {
        local::remove(&self.0, model).await
    }

    /// Deletes everything public that is neither pinned nor in use.
    ///
    /// # Errors
    /// The blob store's.
    pub(crate) async fn gc(&self) -> Result<Collected, RegistryError> {
        local::gc(&self.0).await
    }
}

impl Inner {
    fn now(&self) -> UnixMillis {
        (self.clock)()
    }

    fn key(&self, name: &ModelName) -> sundara_proto::id::Digest {
        model_record_key(&self.network, &name.publisher, &name.name)
    }
}

/// Files of a model, held.
pub(crate) type Files = Vec<BlobFile>;

#[cfg(test)]
#[path = "registry/tests.rs"]
mod tests;
