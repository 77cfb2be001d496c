//! Whose models this miner runs.
//!
//! A job names a model by digest, not its publisher. Where `miner.publishers` is set, a model counts as a publisher's when
//! the publisher's signed record of the manifest's name names this very model. That takes a look into the
//! DHT, which an offer does not wait for: the first offer of an unknown model is declined, the next one is answered.
//!
//! Invariants: an empty list asks nobody; at most [`KNOWN_MAX`] models are remembered and [`ASKING_MAX`] looked up at once;
//! a no is asked again after [`NO_HOLDS`], since a publisher may publish later.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sundara_proto::id::{BlobId, Hotkey, ModelId, NodeId};
use sundara_proto::job::{JobSpec, Program};
use tokio::time::Instant;

use super::admission::PublisherAllowed;
use crate::service::Tasks;
use crate::services::registry::{RegistryError, RegistryHandle};

/// Models remembered.
const KNOWN_MAX: usize = 1_024;
/// Models looked up at once.
const ASKING_MAX: usize = 8;
/// How long a no is believed.
const NO_HOLDS: Duration = Duration::from_secs(60);

/// The check. Clones share what is known.
#[derive(Clone)]
pub(super) struct Publishers {
    inner: Arc<Inner>,
}

struct Inner {
    allowed: Vec<Hotkey>,
    registry: RegistryHandle,
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
    pub(super) fn new(allowed: Vec<Hotkey>, registry: RegistryHandle, tasks: &Tasks) -> Self {
        let tasks = tasks.clone();
        Self { inner: Arc::new(Inner { allowed, registry, tasks, known: Mutex::default() }) }
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
                Err(error) => {
                    tracing::debug!(%model, %error, "publisher not found out");
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
    async fn published(&self, model: ModelId, manifest: BlobId, source: NodeId) -> Result<bool, RegistryError> {
        let name = match self.registry.manifest_of(model, manifest, &[source]).await {
            Ok(manifest) => manifest.name,
            // The job names a manifest that is not its model's: nobody published that.
            Err(RegistryError::WrongManifest { .. }) => return Ok(false),
            Err(e) => return Err(e),
        };
        Ok(self.registry.vouched_by(model, &name, &self.allowed).await?.is_some())
    }
}
