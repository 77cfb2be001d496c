//! The store on disk: sled holds the records, a journal beside it makes them durable.
//!
//! **Owns** the store's directory and everything in it. **Does not own** what other parts of a node keep on disk.
//!
//! # Why sled does not stand alone
//!
//! Read in the source of sled 0.34.7, and shown by `tests/store_crash.rs`:
//! - On Linux a flush is `sync_file_range`, which neither writes the file's length nor empties the disk's cache: what
//!   was flushed survives a kill, not a power cut.
//! - Recovery stops at a torn batch, skips the rest of a segment at the first bad checksum and passes over missing
//!   blob files, all without an error: flushed records can be missing and nobody is told.
//! - `apply_batch` takes a lock over all databases of the process, under which other databases' flushes wait.
//! - Asserts stand where a damaged file should give an error.
//!
//! So a batch goes to the journal first, one `fdatasync` for all that are in flight, becomes visible, and is then
//! acknowledged. It goes into sled when it is no longer [young](young), which most records do not live to be. sled is flushed and truly synced at checkpoints only; the journal since the last one is replayed
//! when the store opens. Replaying is idempotent, so it does not matter how much of it sled had already kept.
//!
//! # Why nothing is lost silently
//!
//! - Each journal record carries a checksum, the batch's number and a [tally](tally) of all records held after it. When
//!   the store opens, every record is read and tallied: whatever sled lost or brought back shows.
//! - The [mark](mark) is a file of two slots with the number of the last acknowledged batch: a journal that ends
//!   before it has lost its tail. One that ends after it, in a torn record, was never acknowledged and is cut.
//! - Damage is an error that names the file. `accept_data_loss` sets the damaged files aside and goes on with what
//!   can be read.
//!
//! # Files
//!
//! ```text
//! lock                     held while open; names the process
//! gen-00000001/            the records; a rebuild makes the next generation and renames it into place
//!   db/                    sled
//!   journal-<hex number>   batches above that number
//!   mark                   number of the last acknowledged batch
//! damaged-1/               a generation set aside by accept_data_loss, for the operator to look at and delete
//! ```

mod files;
mod generation;
mod index;
mod journal;
mod mark;
mod queue;
mod tally;
mod writer;
mod young;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;

use self::index::SharedIndex;
use self::queue::Queue;
use super::migrate::{self, Migration};
use super::{KeyRange, Keyspace, Page, Pending, Store, StoreConfig, StoreError, StoreStatus, WriteBatch};

/// The [`Store`] on disk.
///
/// One process opens a directory at a time. Opening reads every record once (200 MB/s and more), so it belongs on a
/// blocking thread; so does dropping the last handle, which writes out what is queued ([`Store::close`] does it
/// without blocking).
#[derive(Debug)]
pub struct SledStore {
    queue: Queue,
    index: Arc<SharedIndex>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl SledStore {
    /// Opens the store in `dir`, making it if it is not there, and brings its format up to date.
    ///
    /// # Errors
    /// [`StoreError::InUse`], [`StoreError::NewerFormat`], [`StoreError::Migration`], [`StoreError::Damaged`],
    /// [`StoreError::DiskFull`], [`StoreError::Io`].
    pub fn open(dir: &Path, config: &StoreConfig) -> Result<Self, StoreError> {
        Self::open_with(dir, config, migrate::MIGRATIONS)
    }

    /// [`SledStore::open`] with other migrations than this version's: format 1 and one more for each.
    #[doc(hidden)]
    pub fn open_with(dir: &Path, config: &StoreConfig, migrations: &[Migration]) -> Result<Self, StoreError> {
        std::fs::create_dir_all(dir).map_err(|err| StoreError::io("create", dir, err))?;
        let lock = files::lock(dir)?;
        let loaded = generation::open(dir, config)?;
        let index = Arc::clone(&loaded.index);
        let (queue, inbox) = queue::channel();
        let thread = writer::Writer::new(loaded, config, dir, inbox)?.spawn(lock)?;
        let store = Self { queue, index, writer: Mutex::new(Some(thread)) };
        migrate::run(&store, dir, migrations, config.accept_data_loss)?;
        Ok(store)
    }
}

impl Store for SledStore {
    fn get(&self, keyspace: Keyspace, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.index.read(|index| index.get(keyspace as u8, key))
    }

    fn scan(&self, keyspace: Keyspace, range: &KeyRange, limit: usize) -> Result<Page, StoreError> {
        self.index.read(|index| index.scan(keyspace as u8, range, limit))
    }

    fn commit(&self, batch: WriteBatch) -> Pending {
        self.queue.push(batch, true)
    }

    fn commit_relaxed(&self, batch: WriteBatch) -> Pending {
        self.queue.push(batch, false)
    }

    fn close(&self) -> Pending {
        self.queue.close()
    }

    fn status(&self) -> StoreStatus {
        self.queue.status()
    }
}

impl Drop for SledStore {
    fn drop(&mut self) {
        drop(self.queue.close());
        let thread = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The writer catches its own panics; there is nobody left to tell if it did not.
            let _ = thread.join();
        }
    }
}

/// The lock file, held open for as long as the store is.
#[derive(Debug)]
struct DirLock {
    _file: File,
}

/// A path of the store and the action that failed on it, for errors.
fn io_error(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.into();
    move |err| StoreError::io(action, &path, err)
}
