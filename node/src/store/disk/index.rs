//! The records in sled.
//!
//! One tree; a key is the keyspace's number and the caller's key. A value above [`INLINE_BYTES`] is cut into chunks
//! under keys of their own: sled would put a page above 128 KiB into a file that it never syncs, and would write
//! sixteen large neighbours anew for every change of one.
//!
//! What was written last is not here yet: see [`super::young`].
//!
//! A writer holds the lock for one batch, a reader for one read: no reader sees half a batch. No disk is waited for
//! under it, except by a read of a page that is not in the cache.

use std::any::Any;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use sled::IVec;

use super::files::sync_dir;
use super::io_error;
use super::journal::RawOp;
use super::tally::{Entry, Tally};
use super::young::Records;
use crate::store::{KeyRange, StoreError};

/// Largest value that is kept in one piece: 17 of them, the most in a page, stay below sled's 128 KiB.
const INLINE_BYTES: usize = 4_096;

/// The keyspace number under which chunks lie; no keyspace has it.
const CHUNKS: u8 = u8::MAX;

const WHOLE: u8 = 0;
const CHUNKED: u8 = 1;

/// sled lets go of its file on a thread of its own; this is how long a closed one is waited for.
const LOCK_RETRIES: u32 = 400;
const LOCK_RETRY_PAUSE: Duration = Duration::from_millis(5);

/// An open sled database.
#[derive(Debug)]
pub(super) struct Index {
    db: sled::Db,
    path: PathBuf,
}

/// Writes that become old under the lock at once, so that readers go on at a checkpoint.
const AGED_AT_ONCE: usize = 64;

/// All records, as readers and the writer share them; `None` once the store is closed.
#[derive(Debug)]
pub(super) struct SharedIndex(RwLock<Option<Records>>);

impl SharedIndex {
    pub(super) fn new(index: Index) -> Self {
        Self(RwLock::new(Some(Records::new(index))))
    }

    /// Reads under the lock. A panic within was caught below and has left nothing half done.
    pub(super) fn read<T>(&self, read: impl FnOnce(&Records) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let index = self.0.read().unwrap_or_else(PoisonError::into_inner);
        read(index.as_ref().ok_or(StoreError::Closed)?)
    }

    /// Applies one batch; readers see all of it or nothing.
    pub(super) fn apply<'a>(&self, ops: impl IntoIterator<Item = RawOp<'a>>) -> Result<(), StoreError> {
        let mut records = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let records = records.as_mut().ok_or(StoreError::Closed)?;
        ops.into_iter().try_for_each(|op| records.apply(op))
    }

    /// Makes everything applied so far survive a power cut without the journal.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        let mut more = true;
        while more {
            let mut records = self.0.write().unwrap_or_else(PoisonError::into_inner);
            let records = records.as_mut().ok_or(StoreError::Closed)?;
            for _ in 0..AGED_AT_ONCE {
                more = records.age()?;
                if !more {
                    break;
                }
            }
        }
        self.read(|records| records.old().sync())
    }

    /// Takes the records out, so that they are closed when the caller drops them.
    pub(super) fn take(&self) -> Option<Records> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Index {
    pub(super) const DIR: &'static str = "db";

    /// Opens the database of a generation, making it if `create`.
    pub(super) fn open(generation: &Path, cache_bytes: u64, create: bool) -> Result<Self, StoreError> {
        let path = generation.join(Self::DIR);
        if !create {
            for file in [path.join("conf"), path.join("db"), path.join("blobs")] {
                if !file.exists() {
                    return Err(StoreError::damaged(&file, "it is missing"));
                }
            }
        }
        // No flushes of its own: the journal keeps what is not written yet, checkpoints flush.
        let config = sled::Config::new().path(&path).cache_capacity(cache_bytes).flush_every_ms(None);
        let mut tries = 0;
        let db = loop {
            match guard(&path, || config.open()) {
                Err(StoreError::Io { source, .. }) if tries < LOCK_RETRIES && is_lock_error(&source) => {
                    tries += 1;
                    std::thread::sleep(LOCK_RETRY_PAUSE);
                }
                opened => break opened?,
            }
        };
        Ok(Self { db, path })
    }

    pub(super) fn get(&self, full_key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        match guard(&self.path, || self.db.get(full_key))? {
            Some(stored) => self.value(full_key, &stored).map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn has(&self, full_key: &[u8]) -> Result<bool, StoreError> {
        guard(&self.path, || self.db.contains_key(full_key))
    }

    /// Full keys within bounds, with what is stored under them.
    pub(super) fn range(
        &self,
        bounds: (Bound<Vec<u8>>, Bound<Vec<u8>>),
        reversed: bool,
    ) -> impl Iterator<Item = Result<(IVec, IVec), StoreError>> {
        let mut records = self.db.range::<Vec<u8>, _>(bounds);
        std::iter::from_fn(move || {
            let next = || if reversed { records.next_back().transpose() } else { records.next().transpose() };
            guard(&self.path, next).transpose()
        })
    }

    /// Carries out one write.
    pub(super) fn apply(&self, op: RawOp<'_>) -> Result<(), StoreError> {
        self.put(&full_key(op.keyspace, op.key), op.value)
    }

    /// Puts a value under a full key, or deletes it. What it replaces goes first, so that a crash in between, and a
    /// replay, leave no chunk behind.
    pub(super) fn put(&self, full_key: &[u8], value: Option<&[u8]>) -> Result<(), StoreError> {
        guard(&self.path, || {
            if let Some(old) = self.db.get(full_key)? {
                for chunk in 0..chunks_of(&old) {
                    self.db.remove(chunk_key(full_key, chunk))?;
                }
            }
            let Some(value) = value else { return self.db.remove(full_key).map(drop) };
            let mut stored = Vec::with_capacity(1 + value.len().min(INLINE_BYTES));
            if value.len() <= INLINE_BYTES {
                stored.push(WHOLE);
                stored.extend_from_slice(value);
            } else {
                for (chunk, part) in value.chunks(INLINE_BYTES).enumerate() {
                    self.db.insert(chunk_key(full_key, chunk as u32), part)?;
                }
                stored.push(CHUNKED);
                stored.extend_from_slice(&(value.len() as u32).to_le_bytes());
            }
            self.db.insert(full_key, stored).map(drop)
        })
    }

    /// Reads every record from the first to the last, or from the last to the first, and hands it on.
    pub(super) fn for_each(
        &self,
        reversed: bool,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut records = self.db.range(..[CHUNKS]);
        loop {
            let record =
                guard(
                    &self.path,
                    || {
                        if reversed { records.next_back().transpose() } else { records.next().transpose() }
                    },
                )?;
            let Some((full_key, stored)) = record else { return Ok(()) };
            each(&full_key, &self.value(&full_key, &stored)?)?;
        }
    }

    /// Tallies every record.
    pub(super) fn tally(&self) -> Result<Tally, StoreError> {
        let mut tally = Tally::default();
        self.for_each(false, |full_key, value| {
            tally.add(Entry::of(full_key, value));
            Ok(())
        })?;
        Ok(tally)
    }

    /// Makes everything applied so far survive a power cut.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        guard(&self.path, || self.db.flush())?;
        let file = self.path.join("db");
        std::fs::File::open(&file).and_then(|file| file.sync_all()).map_err(io_error("sync", &file))?;
        sync_dir(&self.path)
    }

    pub(super) fn value(&self, full_key: &[u8], stored: &IVec) -> Result<Bytes, StoreError> {
        if let Some((&WHOLE, value)) = stored.split_first() {
            return Ok(Bytes::copy_from_slice(value));
        }
        let damaged = || StoreError::damaged(&self.path, "a record is not whole");
        let len = chunked_len(stored).ok_or_else(damaged)?;
        let mut value = Vec::with_capacity(len);
        for chunk in 0..chunks_of(stored) {
            let part = guard(&self.path, || self.db.get(chunk_key(full_key, chunk)))?;
            value.extend_from_slice(&part.ok_or_else(damaged)?);
        }
        if value.len() == len { Ok(value.into()) } else { Err(damaged()) }
    }
}

/// A range of a keyspace as full keys.
pub(super) fn ranged(keyspace: u8, range: &KeyRange) -> (Bound<Vec<u8>>, Bound<Vec<u8>>) {
    let (start, end) = range.bounds();
    let start = match start {
        Bound::Unbounded => Bound::Included(vec![keyspace]),
        bound => bound.map(|key| full_key(keyspace, key)),
    };
    let end = match end {
        Bound::Unbounded => Bound::Excluded(vec![keyspace + 1]),
        bound => bound.map(|key| full_key(keyspace, key)),
    };
    (start, end)
}

/// The keyspace's number and the key.
pub(super) fn full_key(keyspace: u8, key: &[u8]) -> Vec<u8> {
    let mut full_key = Vec::with_capacity(1 + key.len());
    full_key.push(keyspace);
    full_key.extend_from_slice(key);
    full_key
}

// The fixed length of the number keeps the chunks of two keys apart.
fn chunk_key(full_key: &[u8], chunk: u32) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + full_key.len() + 4);
    key.push(CHUNKS);
    key.extend_from_slice(full_key);
    key.extend_from_slice(&chunk.to_be_bytes());
    key
}

fn chunked_len(stored: &[u8]) -> Option<usize> {
    match stored.split_first()? {
        (&CHUNKED, len) => Some(u32::from_le_bytes(len.try_into().ok()?) as usize),
        _ => None,
    }
}

fn chunks_of(stored: &[u8]) -> u32 {
    chunked_len(stored).map_or(0, |len| len.div_ceil(INLINE_BYTES) as u32)
}

fn is_lock_error(err: &std::io::Error) -> bool {
    err.to_string().contains("could not acquire lock")
}

/// Calls sled; an error or a panic of it becomes an error that names its directory.
fn guard<T>(path: &Path, call: impl FnOnce() -> sled::Result<T>) -> Result<T, StoreError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sled::Error::Io(err))) if err.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(StoreError::damaged(path, format!("a file ends too early: {err}")))
        }
        Ok(Err(sled::Error::Io(err))) => Err(StoreError::io("use the database in", path, err)),
        Ok(Err(err)) => Err(StoreError::damaged(path, err.to_string())),
        Err(panic) => Err(StoreError::damaged(path, format!("the database gave up: {}", panic_text(&*panic)))),
    }
}

/// What a panic said.
pub(super) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("an assertion failed").to_owned()
}
