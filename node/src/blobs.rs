//! Content-addressed files: models, inputs and outputs that are too large for a message.
//!
//! **Owns** the files under the blob directory (see `layout` for the names), their outboards, who may read each, pins, the
//! disk cap, and every comparison of bytes with hashes. Also the two ends of the channel on which anyone asks for a blob to
//! be fetched ([`TransferHandle`]); the transfer service answers it.
//!
//! **Does not own** streams and peers (the transfer service), nor when a job's blobs may go (the services that put them).
//!
//! **Invariants**
//! - A blob under its final name is complete; nothing enters the store without its hashes matching.
//! - Bytes are hashed once a process and file state before they are used or served; what fails is taken out of service,
//!   named in the log, announced on [`Blobs::damaged`], and kept as a partial blob for a fetch to mend.
//! - A private blob is durable when a call that makes it returns; a public one can be fetched again.
//! - Memory is independent of a blob's length, except where a caller asks for the bytes themselves ([`Blobs::get`]).
//! - The sum of all files stays below `blobs.max_bytes`: public blobs that nobody pinned go first, least recently used
//!   first, and when those do not suffice a write is refused in words.

mod access;
mod error;
mod fetch;
mod import;
mod index;
mod layout;
mod partial;
mod read;
mod scan;
mod tree;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sundara_proto::blob::GroupRanges;
use sundara_proto::id::BlobId;
use sundara_proto::units::{ByteCount, UnixMillis};
use tokio::sync::broadcast;

pub use access::{Access, Asker, MAX_READERS, Reader};
pub use error::BlobError;
pub use fetch::{BlobLen, FetchRequest, Fetching, Sources, TransferError, TransferHandle, transfer_channel};
pub use import::{ImportMode, Imported};
pub use partial::{Opened, Partial, PieceError};
pub use read::{BlobReader, ENCODER_BUFFER_MIN, Encoder};

use index::{Checked, Entry, Index};
use layout::{Layout, Stamp, now};

/// How long a hash comparison counts while the file seems unchanged: disks rot without changing a file's times.
const TRUST_FOR: Duration = Duration::from_secs(24 * 3600);

/// How often a use is noted on disk: eviction needs the order of uses, not their moments.
const NOTE_USE_EVERY: Duration = Duration::from_secs(60);

/// Damaged blobs announced and not yet heard of. A listener that lags mends the rest when they are next used.
const DAMAGED_QUEUE: usize = 64;

/// Settings of the blob store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BlobsConfig {
    /// Most bytes that blobs and their outboards take on disk.
    pub max_bytes: ByteCount,
    /// Private blobs that nothing used for so long are removed by [`Blobs::gc`]: whoever put them is gone. Longer than the
    /// longest life of a job, 24 h.
    pub private_max_age_s: u64,
}

impl Default for BlobsConfig {
    /// 64 GiB, enough for a dozen models of 5 GiB; three days.
    fn default() -> Self {
        Self { max_bytes: ByteCount::gib(64), private_max_age_s: 3 * 24 * 3600 }
    }
}

/// What is known of one blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlobInfo {
    /// Its id.
    pub id: BlobId,
    /// Its length.
    pub len: ByteCount,
    /// Whether anyone may read it.
    pub public: bool,
    /// Whether an operator or publisher keeps it.
    pub pinned: bool,
    /// Whether all of it is here.
    pub complete: bool,
    /// Bytes of it that are here.
    pub held: ByteCount,
    /// When it was last read, written or served.
    pub last_used: UnixMillis,
}

/// Room taken and allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BlobUsage {
    /// Blobs, incomplete ones included.
    pub blobs: u64,
    /// Bytes on disk, outboards and the missing parts of incomplete blobs included.
    pub used: ByteCount,
    /// The cap.
    pub max: ByteCount,
}

/// What [`Blobs::gc`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Blobs removed.
    pub blobs: u64,
    /// Bytes freed.
    pub bytes: ByteCount,
}

#[derive(Debug)]
pub(crate) struct Inner {
    layout: Layout,
    config: BlobsConfig,
    pub(crate) index: Mutex<Index>,
    /// Held while files change their names, so that a removal and an arrival of one blob cannot cross. Taken before `index`.
    files: Mutex<()>,
    damaged: broadcast::Sender<BlobId>,
}

/// The blob store of a node. Clones share it.
#[derive(Clone, Debug)]
pub struct Blobs(Arc<Inner>);

/// Keeps a blob from being evicted or deleted while a job uses its file.
#[derive(Debug)]
pub struct BlobHold {
    blobs: Blobs,
    id: BlobId,
}

impl Drop for BlobHold {
    fn drop(&mut self) {
        if let Some(entry) = self.blobs.index().get_mut(&self.id) {
            entry.holds = entry.holds.saturating_sub(1);
        }
    }
}

/// A verified file, kept in place while this lives. Must not be written to.
#[derive(Debug)]
pub struct BlobFile {
    path: PathBuf,
    _hold: BlobHold,
}

impl BlobFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Blobs {
    /// Opens the store in `dir`, creating it where it is missing, and settles what a crash left behind.
    ///
    /// # Errors
    /// When the directory cannot be made or read.
    pub async fn open(dir: impl Into<PathBuf>, config: BlobsConfig) -> Result<Self, BlobError> {
        let (damaged, _) = broadcast::channel(DAMAGED_QUEUE);
        let blobs = Self(Arc::new(Inner {
            layout: Layout::new(dir.into()),
            config,
            index: Mutex::new(Index::default()),
            files: Mutex::new(()),
            damaged,
        }));
        blobs.blocking(scan::settle).await?;
        Ok(blobs)
    }

    /// Stores `bytes`. Durable when it returns. The blob counts one use more, which [`Blobs::remove`] takes back.
    ///
    /// # Errors
    /// [`BlobError::NoSpace`], [`BlobError::DiskFull`], [`BlobError::Io`].
    pub async fn put(&self, bytes: Bytes, access: Access) -> Result<BlobId, BlobError> {
        self.blocking(move |blobs| import::put(blobs, &bytes, &access)).await
    }

    /// Stores the file at `path`, in memory of a few pages whatever its length. Counts as [`Blobs::put`] does.
    ///
    /// # Errors
    /// As [`Blobs::put`].
    pub async fn import_file(
        &self,
        path: impl Into<PathBuf>,
        mode: ImportMode,
        access: Access,
    ) -> Result<Imported, BlobError> {
        self.import_counted(path, mode, access, Arc::default()).await
    }

    /// As [`Blobs::import_file`]; `hashed` grows with the bytes that are done.
    pub(crate) async fn import_counted(
        &self,
        path: impl Into<PathBuf>,
        mode: ImportMode,
        access: Access,
        hashed: Arc<AtomicU64>,
    ) -> Result<Imported, BlobError> {
        let path = path.into();
        self.blocking(move |blobs| import::import_file(blobs, &path, mode, &access, &hashed)).await
    }

    /// The bytes of a complete blob of at most `max`, compared with its id.
    ///
    /// # Errors
    /// [`BlobError::NotFound`], [`BlobError::Incomplete`], [`BlobError::TooLarge`], [`BlobError::Corrupt`].
    pub async fn get(&self, id: BlobId, max: ByteCount) -> Result<Bytes, BlobError> {
        let len = self.complete_len(&id)?;
        if len > max {
            return Err(BlobError::TooLarge { len, max });
        }
        self.blocking(move |blobs| {
            let path = blobs.layout().data(&id);
            let bytes = std::fs::read(&path).map_err(BlobError::io("read", &path))?;
            if BlobId::of(&bytes) != id {
                blobs.mark_bad(&id, 0..sundara_proto::blob::group_count(len));
                return Err(BlobError::Corrupt { blob: id, group: 0 });
            }
            blobs.note_use(&id);
            Ok(bytes.into())
        })
        .await
    }

    /// The file of a complete blob, hashed unless this process did so before and the file seems unchanged since.
    ///
    /// # Errors
    /// As [`Blobs::get`].
    pub async fn path(&self, id: BlobId) -> Result<BlobFile, BlobError> {
        self.complete_len(&id)?;
        let hold = self.hold(&id).ok_or(BlobError::NotFound { blob: id })?;
        self.blocking(move |blobs| {
            blobs.check_all(&id)?;
            blobs.note_use(&id);
            Ok(BlobFile { path: blobs.layout().data(&id), _hold: hold })
        })
        .await
    }

    /// Whether all of it is here.
    pub fn has(&self, id: &BlobId) -> bool {
        self.index().get(id).is_some_and(|e| e.partial.is_none())
    }

    /// Groups of it that are here; those of an earlier process are hashed before they are served.
    pub fn held(&self, id: &BlobId) -> GroupRanges {
        self.index().get(id).map_or(GroupRanges::empty(), Entry::held)
    }

    /// What is known of it.
    pub fn info(&self, id: &BlobId) -> Option<BlobInfo> {
        self.index().get(id).map(info)
    }

    /// Every blob.
    pub fn list(&self) -> Vec<BlobInfo> {
        self.index().iter().map(info).collect()
    }

    /// Room taken and allowed.
    pub fn usage(&self) -> BlobUsage {
        let index = self.index();
        BlobUsage { blobs: index.iter().count() as u64, used: ByteCount(index.used()), max: self.config().max_bytes }
    }

    /// Keeps a blob in place while the guard lives; `None` when it is not here.
    pub fn hold(&self, id: &BlobId) -> Option<BlobHold> {
        self.index().get_mut(id)?.holds += 1;
        Some(BlobHold { blobs: self.clone(), id: *id })
    }

    /// If the blob is complete: lets `access` in too, counts a use as [`Blobs::put`] does, and returns true.
    ///
    /// # Errors
    /// When that cannot be written down.
    pub async fn adopt(&self, id: BlobId, access: Access) -> Result<bool, BlobError> {
        self.blocking(move |blobs| import::adopt(blobs, &id, &access)).await
    }

    /// Lets `access` read the blob too, without counting a use. False when the blob is not here.
    ///
    /// # Errors
    /// When it cannot be written down.
    pub async fn grant(&self, id: BlobId, access: Access) -> Result<bool, BlobError> {
        self.blocking(move |blobs| blobs.change_meta(&id, |entry| entry.access.widen(&access))).await
    }

    /// Keeps a blob whatever the disk cap says, or no longer. False when it is not here.
    ///
    /// # Errors
    /// When it cannot be written down.
    pub async fn set_pinned(&self, id: BlobId, pinned: bool) -> Result<bool, BlobError> {
        self.blocking(move |blobs| {
            blobs.change_meta(&id, |entry| std::mem::replace(&mut entry.pinned, pinned) != pinned)
        })
        .await
    }

    /// Takes one use back. A private blob without any left is deleted; a public one stays until it is evicted. Returns
    /// whether it is gone.
    ///
    /// # Errors
    /// When the change cannot be written down.
    pub async fn remove(&self, id: BlobId) -> Result<bool, BlobError> {
        self.blocking(move |blobs| {
            let last = {
                let mut index = blobs.index();
                let Some(entry) = index.get_mut(&id) else { return Ok(false) };
                entry.refs = entry.refs.saturating_sub(1);
                entry.refs == 0 && !entry.access.is_public() && !entry.writing && !entry.pinned
            };
            if last {
                blobs.delete_files(&id);
                return Ok(true);
            }
            blobs.change_meta(&id, |_| true).map(|_| false)
        })
        .await
    }

    /// Deletes a blob, pinned or not. False when it is not here.
    ///
    /// # Errors
    /// [`BlobError::InUse`] while a job or a fetch uses it.
    pub async fn delete(&self, id: BlobId) -> Result<bool, BlobError> {
        self.blocking(move |blobs| {
            match blobs.index().get(&id) {
                None => return Ok(false),
                Some(entry) if entry.holds > 0 || entry.writing => return Err(BlobError::InUse { blob: id }),
                Some(_) => {}
            }
            blobs.delete_files(&id);
            Ok(true)
        })
        .await
    }

    /// Removes every public blob that is neither pinned nor in use, and private ones that outlived
    /// `blobs.private_max_age_s`.
    ///
    /// # Errors
    /// Only when the store is closing.
    pub async fn gc(&self) -> Result<Collected, BlobError> {
        self.blocking(|blobs| {
            let dead = blobs.outlived();
            let mut collected = Collected::default();
            let before = blobs.index().used();
            for id in &dead {
                blobs.delete_files(id);
            }
            let victims = blobs.index().evict_to(0);
            blobs.unlink(&victims);
            collected.blobs = (dead.len() + victims.len()) as u64;
            collected.bytes = ByteCount(before.saturating_sub(blobs.index().used()));
            Ok(collected)
        })
        .await
    }

    /// Removes private blobs that outlived `blobs.private_max_age_s`: what [`Blobs::gc`] does without an operator's wish.
    ///
    /// # Errors
    /// Only when the store is closing.
    pub async fn expire(&self) -> Result<u64, BlobError> {
        self.blocking(|blobs| {
            let dead = blobs.outlived();
            dead.iter().for_each(|id| blobs.delete_files(id));
            Ok(dead.len() as u64)
        })
        .await
    }

    /// Opens a blob for a peer; `None` when it is not here, or not for that peer. Blocks for as long as opening a file does.
    pub fn reader(&self, id: &BlobId, asker: &Asker) -> Option<BlobReader> {
        let (shape, complete) = {
            let index = self.index();
            let entry = index.get(id).filter(|e| e.access.allows(asker))?;
            (entry.shape, entry.partial.is_none())
        };
        let open = |path: PathBuf| std::fs::File::open(path).ok().map(Arc::new);
        let layout = self.layout();
        // A blob may become complete, or damaged, between the look and the opening: the other name then.
        let (first, second) = (layout.data(id), layout.part(id));
        let (first, second) = if complete { (first, second) } else { (second, first) };
        let data = open(first).or_else(|| open(second))?;
        let outboard = if shape.outboard_len() > 0 { Some(open(layout.outboard(id))?) } else { None };
        self.note_use(id);
        Some(BlobReader { blobs: self.clone(), shape, data, outboard })
    }

    /// Whether a peer may read the blob, and any of it is here.
    pub fn may_read(&self, id: &BlobId, asker: &Asker) -> bool {
        self.index().get(id).is_some_and(|e| e.access.allows(asker))
    }

    /// Opens a blob for writing what arrives of it, resuming what is there.
    ///
    /// # Errors
    /// [`BlobError::BeingWritten`], [`BlobError::WrongLength`], [`BlobError::NoSpace`], [`BlobError::Io`].
    pub async fn partial(&self, id: BlobId, len: ByteCount, access: Access) -> Result<Opened, BlobError> {
        self.blocking(move |blobs| Partial::open(blobs, id, len, &access)).await
    }

    /// Hears of blobs that were found damaged.
    pub fn damaged(&self) -> broadcast::Receiver<BlobId> {
        self.0.damaged.subscribe()
    }

    /// Runs file work off the async threads. Dropping the future does not stop it.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, BlobError> + Send + 'static,
    ) -> Result<T, BlobError> {
        let blobs = self.clone();
        tokio::task::spawn_blocking(move || work(&blobs)).await.unwrap_or(Err(BlobError::Closed))
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }
    pub(crate) fn layout(&self) -> &Layout {
        &self.0.layout
    }
    pub(crate) fn config(&self) -> &BlobsConfig {
        &self.0.config
    }
    pub(crate) fn index(&self) -> MutexGuard<'_, Index> {
        lock(&self.0.index)
    }
    pub(crate) fn files(&self) -> MutexGuard<'_, ()> {
        lock(&self.0.files)
    }

    fn complete_len(&self, id: &BlobId) -> Result<ByteCount, BlobError> {
        let index = self.index();
        let entry = index.get(id).ok_or(BlobError::NotFound { blob: *id })?;
        match &entry.partial {
            None => Ok(entry.shape.len()),
            Some(have) => Err(BlobError::Incomplete { blob: *id, held: have.count(), groups: entry.shape.groups() }),
        }
    }

    /// Hashes what this process has not hashed yet.
    fn check_all(&self, id: &BlobId) -> Result<(), BlobError> {
        let shape = self.index().get(id).map(|e| e.shape).ok_or(BlobError::NotFound { blob: *id })?;
        let open = |path: PathBuf| std::fs::File::open(&path).map(Arc::new).map_err(BlobError::io("open", &path));
        let data = open(self.layout().data(id))?;
        let outboard = if shape.outboard_len() > 0 { Some(open(self.layout().outboard(id))?) } else { None };
        let reader = BlobReader { blobs: self.clone(), shape, data, outboard };
        let stamp = Stamp::of(&reader.data).map_err(BlobError::io("look at", &self.layout().data(id)))?;
        let mut unchecked = GroupRanges::all(shape.len());
        unchecked.subtract(&self.trusted(id, &stamp));
        let mut encoder = reader.encode(&unchecked)?;
        let mut scratch = vec![0; 4 * ENCODER_BUFFER_MIN];
        while encoder.fill(&mut scratch)? > 0 {}
        Ok(())
    }

    /// Groups hashed by this process in the file state `stamp`.
    pub(crate) fn trusted(&self, id: &BlobId, stamp: &Stamp) -> GroupRanges {
        let index = self.index();
        let Some(checked) = index.get(id).filter(|e| e.partial.is_none()).and_then(|e| e.checked.as_ref()) else {
            return GroupRanges::empty();
        };
        let fresh = checked.stamp == *stamp && checked.since.until(now()) < TRUST_FOR;
        if fresh { checked.groups.clone() } else { GroupRanges::empty() }
    }

    pub(crate) fn add_trusted(&self, id: &BlobId, stamp: &Stamp, groups: &GroupRanges) {
        if groups.is_empty() {
            return;
        }
        let mut index = self.index();
        let Some(entry) = index.get_mut(id).filter(|e| e.partial.is_none()) else { return };
        match &mut entry.checked {
            Some(checked) if checked.stamp == *stamp && checked.since.until(now()) < TRUST_FOR => {
                checked.groups.extend(groups);
            }
            other => *other = Some(Checked { stamp: *stamp, groups: groups.clone(), since: now() }),
        }
    }

    /// Takes a damaged blob out of service: it becomes a partial one that lacks the groups of `range`.
    pub(crate) fn mark_bad(&self, id: &BlobId, range: Range<u64>) {
        let _files = self.files();
        let was_complete = {
            let mut index = self.index();
            let Some(entry) = index.get_mut(id) else { return };
            let was_complete = entry.partial.is_none();
            let mut have = entry.held();
            have.remove(range.clone());
            entry.partial = Some(have);
            entry.checked = None;
            was_complete
        };
        let layout = self.layout();
        tracing::error!(
            blob = %id, from = range.start, to = range.end, file = %layout.data(id).display(),
            "blob is damaged on disk: not served until fetched again",
        );
        if was_complete && let Err(e) = import::demote(layout, id) {
            tracing::warn!(blob = %id, error = %e, "a damaged blob could not be set aside: it is fetched anew");
        }
        let _ = layout.write_map(id, &self.held(id));
        let _ = self.0.damaged.send(*id);
    }

    fn change_meta(&self, id: &BlobId, change: impl FnOnce(&mut Entry) -> bool) -> Result<bool, BlobError> {
        // The name lock keeps the order of two writers of one meta file.
        let _files = self.files();
        let (meta, durable) = {
            let mut index = self.index();
            let Some(entry) = index.get_mut(id) else { return Ok(false) };
            if !change(entry) {
                return Ok(true);
            }
            (entry.meta(), !entry.access.is_public())
        };
        self.layout().write_meta(id, &meta, durable)?;
        self.layout().touch_meta(id, now());
        Ok(true)
    }

    /// Notes that a blob is used, on disk at most every [`NOTE_USE_EVERY`].
    pub(crate) fn note_use(&self, id: &BlobId) {
        let when = now();
        let note = {
            let mut index = self.index();
            let Some(entry) = index.get_mut(id) else { return };
            entry.last_used = when;
            let due = entry.noted_used.until(when) >= NOTE_USE_EVERY;
            if due {
                entry.noted_used = when;
            }
            due
        };
        if note {
            self.layout().touch_meta(id, when);
        }
    }

    fn outlived(&self) -> Vec<BlobId> {
        let age = Duration::from_secs(self.config().private_max_age_s);
        let when = now();
        let index = self.index();
        let dead = index.iter().filter(|e| {
            let idle = !e.pinned && e.holds == 0 && !e.writing;
            !e.access.is_public() && idle && e.last_used.until(when) > age
        });
        dead.map(|e| e.shape.id()).collect()
    }

    fn delete_files(&self, id: &BlobId) {
        let left = {
            let _files = self.files();
            self.index().remove(id);
            self.layout().discard(id)
        };
        left.iter().for_each(|path| {
            let _ = std::fs::remove_file(path);
        });
    }

    /// Unlinks blobs that the index has dropped, unless they came back meanwhile.
    pub(crate) fn unlink(&self, ids: &[BlobId]) {
        for id in ids {
            let left = {
                let _files = self.files();
                if self.index().get(id).is_some() {
                    continue;
                }
                self.layout().discard(id)
            };
            tracing::debug!(blob = %id, "evicted to stay below `blobs.max_bytes`");
            left.iter().for_each(|path| {
                let _ = std::fs::remove_file(path);
            });
        }
    }
}

/// Bytes of the encoding of `groups` of a blob.
pub fn encoded_len(blob: BlobId, len: ByteCount, groups: &GroupRanges) -> u64 {
    tree::Shape::new(blob, len).encoded_len(groups)
}

/// Whether `encoded` is the encoding of `groups` of a blob of `len`. When the last group is among them, this proves the
/// length.
pub fn proves(blob: BlobId, len: ByteCount, groups: &GroupRanges, encoded: &[u8]) -> bool {
    tree::verify(&tree::Shape::new(blob, len), groups, encoded).is_ok()
}

fn info(entry: &Entry) -> BlobInfo {
    let held = match &entry.partial {
        None => entry.shape.len(),
        Some(have) => ByteCount((have.count() * sundara_proto::blob::GROUP_LEN).min(entry.shape.len().0)),
    };
    BlobInfo {
        id: entry.shape.id(),
        len: entry.shape.len(),
        public: entry.access.is_public(),
        pinned: entry.pinned,
        complete: entry.partial.is_none(),
        held,
        last_used: entry.last_used,
    }
}

/// A lock whose holder panicked still guards plain data that is valid between statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "blobs/tests.rs"]
mod tests;
