//! The writer: one thread that commits groups of batches, makes checkpoints, and is the only one to change anything.
//!
//! ```text
//! gather -> journal, one fdatasync -> young -> mark -> acknowledge -> sled at a checkpoint, when the journal is full
//! ```

use std::collections::HashMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tracing::error;

use super::files;
use super::generation::{Loaded, account};
use super::index::{SharedIndex, full_key, panic_text};
use super::journal::{AppendError, Journal, MAX_CHECKPOINT_BYTES, RawOp};
use super::mark::Mark;
use super::queue::{Inbox, Next, Request};
use super::tally::{Entry, Tally};
use super::{DirLock, io_error};
use crate::store::batch::Op;
use crate::store::{Commit, StoreConfig, StoreError, WriteBatch};

/// Under load the mark is synced after this many groups; see [`Mark`] for what that leaves open.
const MARK_SYNC_GROUPS: u32 = 64;

/// The buffer of a group is given back to the allocator above this size.
const BUFFER_BYTES: usize = 1024 * 1024;

#[derive(Debug)]
pub(super) struct Writer {
    inbox: Inbox,
    index: Arc<SharedIndex>,
    generation: PathBuf,
    dir: PathBuf,
    journal: Journal,
    mark: Mark,
    groups_since_sync: u32,
    tally: Tally,
    seq: u64,
    records: Vec<u8>,
    disk_reserve_bytes: u64,
    relaxed_delay: Duration,
    checkpoint_bytes: u64,
    failed: Option<String>,
}

impl Writer {
    pub(super) fn new(loaded: Loaded, config: &StoreConfig, dir: &Path, inbox: Inbox) -> Result<Self, StoreError> {
        let mut writer = Self {
            inbox,
            index: loaded.index,
            generation: loaded.generation,
            dir: dir.to_path_buf(),
            journal: loaded.journal,
            mark: loaded.mark,
            groups_since_sync: 0,
            tally: loaded.tally,
            seq: loaded.seq,
            records: Vec::new(),
            disk_reserve_bytes: config.disk_reserve_bytes,
            relaxed_delay: Duration::from_millis(config.relaxed_delay_ms),
            checkpoint_bytes: config.checkpoint_bytes.min(MAX_CHECKPOINT_BYTES),
            failed: None,
        };
        // What was replayed is made safe in sled, and older files are dropped.
        writer.checkpoint()?;
        Ok(writer)
    }

    /// Starts the thread; it keeps the directory's lock until it ends.
    pub(super) fn spawn(self, lock: DirLock) -> Result<JoinHandle<()>, StoreError> {
        let dir = self.dir.clone();
        let run = move || {
            self.run();
            drop(lock);
        };
        std::thread::Builder::new().name("store-writer".into()).spawn(run).map_err(io_error("start a thread for", dir))
    }

    fn run(mut self) {
        let mut group = Vec::new();
        loop {
            match self.inbox.gather(&mut group, !self.mark.is_synced(), self.relaxed_delay) {
                Next::Group => self.serve(&mut group),
                Next::Idle => self.attempt(|writer| writer.mark.sync()).unwrap_or_default(),
                Next::Close(reply) => {
                    let outcome = self.attempt(Self::checkpoint).map(|()| Commit { seq: self.seq });
                    // Readers are done before the files are let go of, and the lock goes last.
                    drop(self.index.take());
                    if let Some(reply) = reply {
                        reply.finish(outcome);
                    }
                    return;
                }
            }
        }
    }

    /// Commits a group and tells everybody in it.
    fn serve(&mut self, group: &mut Vec<Request>) {
        let outcome = self.attempt(|writer| writer.commit(group));
        let first = match outcome {
            Ok(first) => first,
            Err(err) => {
                for request in group.drain(..) {
                    request.finish(Err(err.clone()));
                }
                return;
            }
        };
        let mut seq = first;
        for request in group.drain(..) {
            seq += u64::from(!request.batch.is_empty());
            request.finish(Ok(Commit { seq }));
        }
        if self.journal.len() >= self.checkpoint_bytes {
            // The group is safe already; a failure shows with the next one.
            let _ = self.attempt(Self::checkpoint);
        }
    }

    /// Does something that may fail for good: any error but a full disk, and any panic, stops all writing.
    fn attempt<T>(&mut self, act: impl FnOnce(&mut Self) -> Result<T, StoreError>) -> Result<T, StoreError> {
        if let Some(reason) = &self.failed {
            return Err(StoreError::Failed { reason: reason.clone() });
        }
        let reason = match catch_unwind(AssertUnwindSafe(|| act(self))) {
            Ok(Err(err)) if !err.is_retryable() => err.to_string(),
            Ok(outcome) => return outcome,
            Err(panic) => panic_text(&*panic),
        };
        error!(reason, "the store stopped taking writes");
        self.failed = Some(reason.clone());
        self.inbox.update_status(|status| status.failed = Some(reason.clone()));
        Err(StoreError::Failed { reason })
    }

    /// Makes a group durable and visible; returns the number before its first batch.
    fn commit(&mut self, group: &[Request]) -> Result<u64, StoreError> {
        let first = self.seq;
        let batches = || group.iter().map(|request| &request.batch).filter(|batch| !batch.is_empty());
        let (seq, tally) = self.encode(batches())?;
        if seq == first {
            return Ok(first);
        }
        self.check_room(batches())?;
        match self.journal.append(&self.records) {
            Ok(()) => {}
            Err(AppendError::Undone(err)) if is_full(&err) => {
                return Err(self.disk_full(self.records.len() as u64));
            }
            Err(AppendError::Undone(err)) => return Err(StoreError::io("write", self.journal.path(), err)),
            Err(AppendError::Fatal(err)) => return Err(err),
        }
        for batch in batches() {
            self.index.apply(batch.ops().iter().map(raw))?;
        }
        (self.seq, self.tally) = (seq, tally);
        self.mark.write(seq)?;
        self.groups_since_sync += 1;
        if self.groups_since_sync >= MARK_SYNC_GROUPS {
            self.mark.sync()?;
            self.groups_since_sync = 0;
        }
        self.inbox.update_status(|status| {
            (status.applied_seq, status.durable_seq) = (seq, seq);
            (status.records, status.live_bytes) = (tally.records, tally.bytes);
        });
        Ok(first)
    }

    /// Fills the buffer with the group's records; returns number and tally after them.
    fn encode<'a>(&mut self, batches: impl Iterator<Item = &'a WriteBatch>) -> Result<(u64, Tally), StoreError> {
        let (mut seq, mut tally) = (self.seq, self.tally);
        self.records.clear();
        self.records.shrink_to(BUFFER_BYTES);
        // What earlier writes of this group leave under a key; sled does not have them yet.
        let mut written: HashMap<Vec<u8>, Option<Entry>> = HashMap::new();
        let (index, journal, records) = (&self.index, &self.journal, &mut self.records);
        index.read(|index| {
            for batch in batches {
                for op in batch.ops() {
                    let full_key = full_key(op.keyspace as u8, &op.key);
                    let old = match written.get(&full_key) {
                        Some(&old) => old,
                        None => index.entry(&full_key)?,
                    };
                    let new = op.value.as_ref().map(|value| Entry::of(&full_key, value));
                    account(&mut tally, old, new);
                    written.insert(full_key, new);
                }
                seq += 1;
                journal.encode(records, seq, tally, batch.ops());
            }
            Ok((seq, tally))
        })
    }

    /// Refuses a group that would eat into the reserve. Deletions may use half of it: they are how room is made.
    fn check_room<'a>(&self, mut batches: impl Iterator<Item = &'a WriteBatch>) -> Result<(), StoreError> {
        let only_deletes = batches.all(|batch| batch.ops().iter().all(|op| op.value.is_none()));
        let reserve = if only_deletes { self.disk_reserve_bytes / 2 } else { self.disk_reserve_bytes };
        let needed = reserve.saturating_add(self.records.len() as u64);
        if self.disk_reserve_bytes > 0 && files::free_bytes(&self.dir)? < needed {
            return Err(self.disk_full(needed));
        }
        Ok(())
    }

    fn disk_full(&self, needed_bytes: u64) -> StoreError {
        let free_bytes = files::free_bytes(&self.dir).unwrap_or_default();
        StoreError::DiskFull { path: self.dir.clone(), free_bytes, needed_bytes }
    }

    /// Makes sled itself durable up to the last batch and begins a new journal.
    fn checkpoint(&mut self) -> Result<(), StoreError> {
        self.mark.sync()?;
        if !self.journal.is_empty() {
            self.index.sync()?;
            self.journal = Journal::create(&self.generation, self.seq, self.tally)?;
        }
        Journal::delete_others(&self.generation, self.journal.path())?;
        let disk_bytes = files::dir_bytes(&self.generation);
        let (seq, tally) = (self.seq, self.tally);
        self.inbox.update_status(|status| {
            (status.applied_seq, status.durable_seq, status.disk_bytes) = (seq, seq, disk_bytes);
            (status.records, status.live_bytes) = (tally.records, tally.bytes);
        });
        Ok(())
    }
}

fn is_full(err: &io::Error) -> bool {
    matches!(err.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn raw(op: &Op) -> RawOp<'_> {
    RawOp { keyspace: op.keyspace as u8, key: &op.key, value: op.value.as_deref() }
}
