//! Whose models this miner runs.
//!
//! A job names a model by digest, not its publisher. Where `miner.publishers` is set, a model counts as a publisher's when
//! the publisher's signed record of the manifest's name and version names this very model. That takes a look into the
//! DHT, which an offer does not wait for: the first offer of an unknown model is declined, the next one is answered.
//!
//! Invariants: an empty list asks nobody; at most [`KNOWN_MAX`] models are remembered and [`ASKING_MAX`] looked up at once;
//! a no is asked again after [`NO_HOLDS`], since a publisher may publish later.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sundara_proto::id::{BlobId, Hotkey, ModelId, NodeId};
use sundara_proto::job::{JobSpec, Program};
use sundara_proto::model::ModelManifest;
use sundara_proto::units::ByteCount;
use sundara_proto::wire::{WireMessage as _, limit};
use tokio::time::Instant;

use super::admission::PublisherAllowed;
use crate::blobs::{Access, BlobLen, Blobs, Sources, TransferHandle};
use crate::service::Tasks;
use crate::services::registry::RegistryHandle;

/// Models remembered.
const KNOWN_MAX: usize = 1_024;
/// Models looked up at once.
const ASKING_MAX: usize = 8;
/// How long a no is believed.
const NO_HOLDS: Duration = Duration::from_secs(60);
/// Longest manifest.
const MANIFEST_MAX: ByteCount = ByteCount(limit::MANIFEST as u64);

/// The check. Clones share what is known.
#[derive(Clone)]
pub(super) struct Publishers {
    inner: Arc<Inner>,
}

struct Inner {
    allowed: Vec<Hotkey>,
    registry: RegistryHandle,
    blobs: Blobs,
    transfer: TransferHandle,
    tasks: Tasks,
    known: Mutex<HashMap<ModelId, Known>>,
}

#[derive(Clone, Copy)]
enum Known {
    Asking,
    Yes,
    No { since: Instant },
}

impl Publishers {
    pub(super) fn new(
        allowed: Vec<Hotkey>,
        registry: RegistryHandle,
        blobs: Blobs,
        transfer: TransferHandle,
        tasks: &Tasks,
    ) -> Self {
        let tasks = tasks.clone();
        Self { inner: Arc::new(Inner { allowed, registry, blobs, transfer, tasks, known: Mutex::default() }) }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<ModelId, Known>> {
        self.inner.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known now; an unknown model is looked up behind the answer. `source` probably has the manifest.
    pub(super) fn allows(&self, spec: &JobSpec, source: NodeId) -> PublisherAllowed {
        let Program::Model { model, manifest, .. } = &spec.program else { return PublisherAllowed::Yes };
        if self.inner.allowed.is_empty() {
            return PublisherAllowed::Yes;
        }
        let mut known = self.known();
        match known.get(model) {
            Some(Known::Yes) => return PublisherAllowed::Yes,
            Some(Known::No { since }) if since.elapsed() < NO_HOLDS => return PublisherAllowed::No,
            Some(Known::Asking) => return PublisherAllowed::Unknown,
            Some(Known::No { .. }) | None => {}
        }
        let asking = known.values().filter(|k| matches!(k, Known::Asking)).count();
        if asking < ASKING_MAX {
            if known.len() >= KNOWN_MAX {
                known.retain(|_, k| matches!(k, Known::Asking));
            }
            known.insert(*model, Known::Asking);
            drop(known);
            self.look_up(*model, *manifest, source);
        }
        PublisherAllowed::Unknown
    }

    fn look_up(&self, model: ModelId, manifest: BlobId, source: NodeId) {
        let this = self.clone();
        self.inner.tasks.spawn("publisher", async move {
            let found = match this.inner.published(model, manifest, source).await {
                Ok(true) => Some(Known::Yes),
                Ok(false) => Some(Known::No { since: Instant::now() }),
                Err(reason) => {
                    tracing::debug!(%model, %reason, "publisher not found out");
                    None
                }
            };
            let mut known = this.known();
            match found {
                Some(found) => drop(known.insert(model, found)),
                // Asked again with the next offer.
                None => drop(known.remove(&model)),
            }
        });
    }
}

impl Inner {
    /// Whether one of the allowed publishers signed a record of this model.
    async fn published(&self, model: ModelId, manifest: BlobId, source: NodeId) -> Result<bool, String> {
        if !self.blobs.has(&manifest) {
            let len = BlobLen::AtMost(MANIFEST_MAX);
            let fetched = self.transfer.fetch(manifest, len, Sources::dht([source]), Access::Public).await;
            fetched.map_err(|e| e.to_string())?;
        }
        let bytes = self.blobs.get(manifest, MANIFEST_MAX).await.map_err(|e| e.to_string())?;
        if ModelManifest::id_of(&bytes) != model {
            // The job names a manifest that is not its model's: nobody published that.
            return Ok(false);
        }
        let Ok(manifest) = ModelManifest::decode(&bytes) else { return Ok(false) };
        for publisher in &self.allowed {
            let reference = format!("{publisher}/{}@{}", manifest.name, manifest.version);
            match self.registry.resolve(&reference).await {
                Ok(record) if record.model == model => return Ok(true),
                Ok(_) => {}
                Err(e) => tracing::debug!(%reference, error = %e, "no record"),
            }
        }
        Ok(false)
    }
}
