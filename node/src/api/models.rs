//! Models as a program that embeds the node sees them.

use std::path::PathBuf;

use sundara_proto::crypto::{HotkeyPair, Signed};
use sundara_proto::id::ModelId;
use sundara_proto::model::ModelRecord;

use crate::services::registry::{ModelRef, RegistryHandle};

pub use crate::blobs::Collected;
pub use crate::services::registry::{Listed, LocalModel, Progress, Published, RegistryError, Shown};

/// Models of one node: publish, find, fetch, keep. Models are named `PUBLISHER/NAME` or `PUBLISHER/NAME@VERSION`, the
/// publisher as its ss58 address; without a version the latest is meant. Every method is cancel safe.
#[derive(Clone)]
pub struct Models {
    pub(crate) registry: RegistryHandle,
    pub(crate) key: HotkeyPair,
}

impl Models {
    /// Packs a directory with a model.toml and publishes it under this node's hotkey. It is pinned here.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn publish(&self, dir: impl Into<PathBuf>) -> Result<Published, RegistryError> {
        self.registry.publish(dir, &self.key).await
    }

    /// The signed record that a name stands for now.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn resolve(&self, model: &str) -> Result<Signed<ModelRecord>, RegistryError> {
        self.registry.resolve(model).await
    }

    /// Models that are here or were heard of.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn list(&self) -> Result<Vec<Listed>, RegistryError> {
        self.registry.list().await
    }

    /// A model's record and manifest. Its files are not fetched.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn show(&self, model: &str) -> Result<Shown, RegistryError> {
        self.registry.show(model).await
    }

    /// Fetches what is missing of a model, and holds it while the answer lives.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn fetch(&self, model: &str) -> Result<LocalModel, RegistryError> {
        self.registry.fetch(model).await
    }

    /// Publications and fetches under way that were asked for here.
    pub fn progress(&self) -> Vec<Progress> {
        self.registry.progress()
    }

    /// Keeps a model that is here whatever the disk cap says, or no longer.
    ///
    /// # Errors
    /// [`RegistryError::NotHere`] for one that is not.
    pub async fn set_pinned(&self, model: &str, pinned: bool) -> Result<ModelId, RegistryError> {
        let id = self.here(model).await?;
        self.registry.set_pinned(id, pinned).await.map(|()| id)
    }

    /// Deletes a model's files here, except those that another model uses too.
    ///
    /// # Errors
    /// [`RegistryError::NotHere`] for one that is not; an error while a job runs it.
    pub async fn remove(&self, model: &str) -> Result<Collected, RegistryError> {
        self.registry.remove(self.here(model).await?).await
    }

    /// Deletes every model file that is neither pinned nor in use.
    ///
    /// # Errors
    /// The blob store's.
    pub async fn gc(&self) -> Result<Collected, RegistryError> {
        self.registry.gc().await
    }

    /// The model that a name means on this disk. Asks nobody: what is here can be pinned and removed without a network.
    async fn here(&self, model: &str) -> Result<ModelId, RegistryError> {
        let wanted: ModelRef = model.parse()?;
        let known = self.registry.list().await?;
        let named = known.iter().filter(|listed| {
            listed.publisher == Some(wanted.name.publisher)
                && listed.name == wanted.name.name
                && wanted.version.is_none_or(|version| listed.version == version)
        });
        match named.filter(|listed| listed.local).max_by_key(|listed| listed.version) {
            Some(listed) => Ok(listed.model),
            None => Err(RegistryError::NotHere { model: self.registry.resolve(model).await?.model }),
        }
    }
}
