//! Why the registry could not do what was asked.

use sundara_proto::id::{BlobId, ModelId};
use sundara_proto::wire::WireError;

use super::pack::PackError;
use crate::blobs::{BlobError, TransferError};
use crate::domain::catalog::Unresolved;
use crate::store::StoreError;

/// Errors of the registry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// Not a model's name.
    #[error("`{text}` is no model: write PUBLISHER/NAME or PUBLISHER/NAME@VERSION, the publisher as its ss58 address")]
    BadName {
        /// What was written.
        text: String,
    },
    /// The directory cannot be published as it is.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// Versions only go up.
    #[error(
        "version {version} of `{name}` is not above {highest}, which was published before: raise `version` in model.toml"
    )]
    VersionNotHigher {
        /// The name.
        name: String,
        /// What model.toml says.
        version: u64,
        /// The highest that was published or heard of.
        highest: u64,
    },
    /// The manifest would be too large to send.
    #[error("the manifest is too large: use fewer artifacts or shorter texts in model.toml")]
    ManifestTooLarge,
    /// The name stands for nothing.
    #[error(transparent)]
    Unresolved(#[from] Unresolved),
    /// The DHT cannot be asked, and nothing is known without it.
    #[error("the dht could not be asked: {0}")]
    Dht(String),
    /// The blob is not the manifest of that model.
    #[error("blob {manifest} is not the manifest of model {model}: whoever named it is wrong ({reason})")]
    WrongManifest {
        /// The model.
        model: ModelId,
        /// The blob.
        manifest: BlobId,
        /// In words.
        reason: String,
    },
    /// Not on this disk.
    #[error("model {model} is not here: fetch it first")]
    NotHere {
        /// Which.
        model: ModelId,
    },
    /// It could not be fetched.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The blob store's.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The record store's.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A stored record does not parse.
    #[error("a stored record is damaged: {0}")]
    Damaged(#[from] WireError),
}

impl RegistryError {
    /// Whether asking again later may help without anyone's doing.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Dht(_) => true,
            Self::Transfer(e) => e.is_retryable(),
            Self::Blob(e) => e.is_retryable(),
            _ => false,
        }
    }
}
