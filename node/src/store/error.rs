//! What can go wrong at the store's boundary, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An error of the [`Store`](super::Store). Cheap to clone: one failed flush fails every batch that shared it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Too much is queued; the batch was not taken.
    #[error("the store has {queued_batches} batches queued, the most it takes; try again later")]
    Busy {
        /// Batches queued at that moment.
        queued_batches: u64,
    },
    /// The disk has less room than the store's reserve; the batch was not written, and nothing else was harmed.
    #[error(
        "the disk under {path} is full ({free_bytes} bytes free, {needed_bytes} needed); make room, or lower store.disk_reserve_bytes"
    )]
    DiskFull {
        /// The store's directory.
        path: PathBuf,
        /// Bytes free for this user.
        free_bytes: u64,
        /// Bytes that must be free before a write.
        needed_bytes: u64,
    },
    /// A key, value or batch beyond its limit: an error of the caller.
    #[error("{what} has {bytes} bytes, above the limit of {limit_bytes}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// Another process (or another handle of this one) has the directory open.
    #[error("the store in {path} is in use by process {pid}; stop that process, or give this one its own --data-dir")]
    InUse {
        /// The store's directory.
        path: PathBuf,
        /// The process that holds it, as it wrote itself into the lock file ("unknown" if it did not get to).
        pid: String,
    },
    /// The data were written by a newer version of this program.
    #[error(
        "the store in {path} has format {found}, this version knows up to {supported}; run the newer version again, or use a fresh --data-dir"
    )]
    NewerFormat {
        /// The store's directory.
        path: PathBuf,
        /// Format found.
        found: u32,
        /// Newest format that this version reads.
        supported: u32,
    },
    /// A step of a migration failed; the data are as before that step.
    #[error("the store in {path} could not be brought from format {from} to {to}: {reason}")]
    Migration {
        /// The store's directory.
        path: PathBuf,
        /// Format before the step.
        from: u32,
        /// Format after the step.
        to: u32,
        /// What went wrong.
        reason: String,
    },
    /// Something that was acknowledged cannot be read back.
    #[error(
        "{path} is damaged: {detail}; restore the data directory from a backup, set store.accept_data_loss = true to go on with what can still be read, or use a fresh --data-dir"
    )]
    Damaged {
        /// The file (or directory) that is damaged.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// An earlier failure stopped all writing; what was acknowledged before it is safe. Open the store again.
    #[error("the store stopped after a failure: {reason}; what was acknowledged is safe, restart the node to go on")]
    Failed {
        /// The first failure.
        reason: String,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
    /// A value does not decode as its table says.
    #[error("a record of keyspace {keyspace} does not decode: {reason}")]
    Codec {
        /// The keyspace's name.
        keyspace: &'static str,
        /// The decoder's complaint.
        reason: String,
    },
    /// An operation of the file system failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's error.
        source: Arc<io::Error>,
    },
}

impl StoreError {
    /// Whether the same batch may succeed later on the same open store.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::DiskFull { .. })
    }

    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source: Arc::new(source) }
    }

    pub(super) fn damaged(path: &Path, detail: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_path_buf(), detail: detail.into() }
    }
}
