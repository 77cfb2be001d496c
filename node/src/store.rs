//! What a node keeps: keyspaces of records, written in atomic batches that are durable when acknowledged.
//!
//! **Owns** the [`Store`] port, its two implementations ([`SledStore`] on disk, [`MemoryStore`] for tests and nodes
//! that keep nothing), the list of keyspaces, the stored format's version and its migrations, and the helpers that
//! keep what is stored within limits.
//!
//! **Does not own** what the records mean: keys and values are bytes here. The services that write a keyspace own its
//! encoding (see [`Table`]) and its keep-limit (see [`retain_step`]). Bulk bytes (models, inputs, outputs) are files of
//! the blob store; only their index is kept here.
//!
//! **Invariants**
//! - A batch is applied whole or not at all, over all keyspaces that it names, also across a crash.
//! - Once the future of [`Store::commit`] yields `Ok`, the batch survives a crash of the process and of the machine.
//! - Batches of one store are applied in the order in which they were handed in.
//! - Nothing acknowledged is lost silently: a store that misses any of it refuses to open and names what is missing.
//! - Memory, queues, scans and files are bounded; the bounds stand beside their reasons.

mod batch;
mod config;
mod disk;
mod error;
mod keyspace;
mod memory;
mod migrate;
mod range;
mod retain;
mod table;

use bytes::Bytes;

pub use batch::{Commit, MAX_BATCH_BYTES, MAX_BATCH_OPS, MAX_KEY_BYTES, MAX_VALUE_BYTES, Pending, WriteBatch};
pub use config::StoreConfig;
pub use disk::SledStore;
pub use error::StoreError;
pub use keyspace::Keyspace;
pub use memory::MemoryStore;
pub use migrate::{Migration, MigrationStep};
pub use range::{KeyRange, Page};
pub use retain::{RetainStep, delete_range, retain_step, time_key, time_key_id, time_key_unix_ms};
pub use table::{Codec, JsonCodec, JsonTable, ProtoCodec, ProtoTable, Rows, Table};

/// Most records that one [`Store::scan`] returns: a page must fit in memory many times over.
pub const MAX_SCAN_RECORDS: usize = 4_096;

/// Most bytes of keys and values that one [`Store::scan`] returns, the first record excepted.
pub const MAX_SCAN_BYTES: usize = 16 * 1024 * 1024;

/// A shared store, as the builder hands it to services.
pub type SharedStore = std::sync::Arc<dyn Store>;

/// The port through which services keep records.
///
/// Reads are synchronous: they are look-ups in memory or in a warm page cache, microseconds each, and may be called
/// from async code; a service that scans many pages in a row yields between them. Writes are queued by the call and
/// carried out elsewhere; no method waits for a disk on the caller's thread.
///
/// A read sees every batch whose future has resolved, and nothing that is not durable. A single `get` or `scan` never
/// sees half a batch.
pub trait Store: Send + Sync + 'static {
    /// The value under `key`, or `None`.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] or [`StoreError::Failed`] when the record cannot be read.
    fn get(&self, keyspace: Keyspace, key: &[u8]) -> Result<Option<Bytes>, StoreError>;

    /// Records of `range` in key order (or reversed, see [`KeyRange::reversed`]), at most `limit` of them and never
    /// more than [`MAX_SCAN_RECORDS`] or [`MAX_SCAN_BYTES`]; [`Page::next`] goes on where this page ended.
    ///
    /// # Errors
    /// As [`Store::get`].
    fn scan(&self, keyspace: Keyspace, range: &KeyRange, limit: usize) -> Result<Page, StoreError>;

    /// Queues `batch`; the future resolves once it is durable. Many commits in flight share one flush.
    ///
    /// The batch is queued by the call itself, not by the first poll, so order is the order of calls, and dropping the
    /// future does not take the batch back.
    ///
    /// # Errors
    /// Through the future: [`StoreError::Busy`] when too much is queued (nothing was written, try again later),
    /// [`StoreError::TooLarge`], [`StoreError::DiskFull`] (retryable once there is room), [`StoreError::Closed`],
    /// [`StoreError::Failed`].
    #[must_use = "a batch is durable only once this future yields Ok"]
    fn commit(&self, batch: WriteBatch) -> Pending;

    /// Queues `batch` without hurry: it is written together with the next commit, or after
    /// [`StoreConfig::relaxed_delay_ms`] by itself, and the future resolves then. A crash before that loses it, whole;
    /// reads do not see it before. For what can be learned again: peers, adverts, counters. The future may be dropped.
    ///
    /// # Errors
    /// As [`Store::commit`].
    fn commit_relaxed(&self, batch: WriteBatch) -> Pending;

    /// Resolves once everything queued before is durable.
    #[must_use = "the flush is done only once this future resolves"]
    fn flush(&self) -> Pending {
        self.commit(WriteBatch::new())
    }

    /// Writes out what is queued, refuses whatever comes later with [`StoreError::Closed`], and lets go of the files.
    /// Dropping the last handle does the same, on the dropping thread.
    #[must_use = "the store is closed only once this future resolves"]
    fn close(&self) -> Pending;

    /// What the store holds and how it fares, for `/metrics` and `status`.
    fn status(&self) -> StoreStatus;
}

/// Figures of a store at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct StoreStatus {
    /// Number of the last batch that reads see; counts up by one a batch, for the life of the data.
    pub applied_seq: u64,
    /// Number of the last batch known to be durable.
    pub durable_seq: u64,
    /// Records held.
    pub records: u64,
    /// Bytes of keys and values held.
    pub live_bytes: u64,
    /// Bytes of the store's files on disk, as of the last checkpoint; 0 in memory.
    pub disk_bytes: u64,
    /// Batches queued, not yet applied.
    pub queued_batches: u64,
    /// Why the store no longer takes writes, if it does not.
    pub failed: Option<String>,
}
