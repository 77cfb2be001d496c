//! What can go wrong with stored blobs, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use sundara_proto::id::BlobId;
use sundara_proto::units::ByteCount;

/// Why the blob store could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlobError {
    /// Not held at all.
    #[error("blob {blob} is not in the store")]
    NotFound {
        /// Which.
        blob: BlobId,
    },
    /// Held in part: a fetch would complete it.
    #[error("blob {blob} is incomplete: {held} of {groups} groups are here, fetch the rest first")]
    Incomplete {
        /// Which.
        blob: BlobId,
        /// Groups held.
        held: u64,
        /// Groups that it has.
        groups: u64,
    },
    /// Larger than the caller takes.
    #[error("blob of {len} exceeds the limit of {max}")]
    TooLarge {
        /// Its length.
        len: ByteCount,
        /// The limit.
        max: ByteCount,
    },
    /// Does not fit below the cap, even after evicting all that may go.
    #[error(
        "blob of {needed} does not fit: {used} of {max} are taken by pinned, private and busy blobs; raise \
         `blobs.max_bytes`, unpin models, or run `model gc`"
    )]
    NoSpace {
        /// Bytes wanted, outboard included.
        needed: ByteCount,
        /// Bytes taken that cannot be evicted.
        used: ByteCount,
        /// The cap.
        max: ByteCount,
    },
    /// The file system is full.
    #[error("no space left on the file system of {}: free some, or lower `blobs.max_bytes`", path.display())]
    DiskFull {
        /// File that was being written.
        path: PathBuf,
    },
    /// What lies on disk is not the blob. It is kept as a partial one, without the bad groups, for a fetch to complete.
    #[error("blob {blob} is damaged on disk at group {group}: it is not served until it is fetched again")]
    Corrupt {
        /// Which.
        blob: BlobId,
        /// First bad group.
        group: u64,
    },
    /// A length that contradicts what was verified before.
    #[error("blob {blob} is {known} long, not {claimed}: whoever named that length is wrong")]
    WrongLength {
        /// Which.
        blob: BlobId,
        /// Proven length.
        known: ByteCount,
        /// The other one.
        claimed: ByteCount,
    },
    /// Someone else writes it.
    #[error("blob {blob} is being fetched already")]
    BeingWritten {
        /// Which.
        blob: BlobId,
    },
    /// In use by a running job.
    #[error("blob {blob} is in use by a running job: try again when it has finished")]
    InUse {
        /// Which.
        blob: BlobId,
    },
    /// The file system said no.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried: a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The store's worker was stopped: the node is shutting down.
    #[error("the blob store is shutting down")]
    Closed,
}

impl BlobError {
    /// Whether the same call may succeed later without anyone's doing.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::BeingWritten { .. } | Self::InUse { .. } | Self::Closed)
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Io { action, path, source },
        }
    }
}
