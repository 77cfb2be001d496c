//! Writing a blob that arrives piece by piece.
//!
//! **Invariants**
//! - Only verified bytes are written, each to its place; the encoding is checked here, not by the caller.
//! - At most one [`Partial`] of a blob exists in this process.
//! - Whatever a map or an earlier process claims is hashed again before it counts: data, outboard and map may be torn in
//!   any order by a crash, so none of them is synced while a fetch runs, and none is believed after one.
//! - A private blob is synced before it counts as complete, since someone may acknowledge a job on it. A public one is not:
//!   every group is hashed again before its first use after a start, and can be fetched again.

use std::fs::{self, File};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sundara_proto::blob::GroupRanges;
use sundara_proto::id::BlobId;
use sundara_proto::units::ByteCount;

use super::access::Access;
use super::error::BlobError;
use super::index::{Checked, Entry};
use super::layout::{Meta, Stamp, now, write_at};
use super::read;
use super::tree::{self, Shape};
use super::{Blobs, lock};

/// Groups written between two writes of the map: 64 MiB. A killed fetch finds the rest by hashing.
const MAP_EVERY: u64 = 4096;

/// Why a piece was not stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PieceError {
    /// Not what the tree says: whoever sent it lied, or its disk is damaged.
    #[error("group {group} does not match the blob's hash")]
    Bad {
        /// First bad group.
        group: u64,
    },
    /// Right, but it could not be written.
    #[error(transparent)]
    Blob(#[from] BlobError),
}

/// What there is to write.
#[derive(Debug)]
pub enum Opened {
    /// Nothing: the blob is complete.
    Complete,
    /// Some groups.
    Partial(Partial),
}

/// The one writer of an incomplete blob. Dropping it keeps what was written.
#[derive(Debug)]
pub struct Partial {
    blobs: Blobs,
    shape: Shape,
    data: File,
    outboard: Option<Arc<File>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    have: GroupRanges,
    unmapped: u64,
}

impl Partial {
    /// Opens or creates the files; hashes what is there. Blocks.
    pub(crate) fn open(blobs: &Blobs, id: BlobId, len: ByteCount, access: &Access) -> Result<Opened, BlobError> {
        let shape = Shape::new(id, len);
        let Some(had) = claim(blobs, &shape, access)? else { return Ok(Opened::Complete) };
        Self::open_files(blobs, shape, had).map(Opened::Partial).inspect_err(|_| {
            if let Some(entry) = blobs.index().get_mut(&id) {
                entry.writing = false;
            }
        })
    }

    fn open_files(blobs: &Blobs, shape: Shape, had: bool) -> Result<Self, BlobError> {
        let (layout, id) = (blobs.layout(), shape.id());
        let open = |path: &std::path::Path, len: u64| {
            let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
            file.and_then(|f| f.set_len(len).map(|()| f)).map_err(BlobError::io("open", path))
        };
        layout.make_dir(&id)?;
        if !had {
            let meta = blobs.index().get(&id).map(Entry::meta);
            layout.write_meta(&id, &meta.unwrap_or_else(|| Meta::new(shape.len(), Access::local(), 0)), false)?;
        }
        let data = open(&layout.part(&id), shape.len().0)?;
        let outboard = match shape.outboard_len() {
            0 => None,
            len => Some(Arc::new(open(&layout.outboard(&id), len)?)),
        };
        let have = if had {
            let have = read::scan(&shape, &data, outboard.clone()).map_err(BlobError::io("read", &layout.part(&id)))?;
            tracing::debug!(blob = %id, held = have.count(), groups = shape.groups(), "resuming a partial blob");
            have
        } else {
            GroupRanges::empty()
        };
        let partial =
            Self { blobs: blobs.clone(), shape, data, outboard, state: Mutex::new(State { have, unmapped: 0 }) };
        partial.publish();
        Ok(partial)
    }

    /// Which blob.
    pub fn id(&self) -> BlobId {
        self.shape.id()
    }

    /// Its length.
    pub fn len(&self) -> ByteCount {
        self.shape.len()
    }

    /// Whether the blob has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len().0 == 0
    }

    /// Groups not yet here.
    pub fn missing(&self) -> GroupRanges {
        let mut missing = GroupRanges::all(self.len());
        missing.subtract(&self.state().have);
        missing
    }

    /// Verifies `encoded`, the encoding of `groups`, and writes it. Blocks. Several threads may do so at once.
    ///
    /// # Errors
    /// [`PieceError::Bad`] when a hash does not match; nothing of the piece is kept then.
    pub fn store(&self, groups: &GroupRanges, encoded: &[u8]) -> Result<(), PieceError> {
        let verified = tree::verify(&self.shape, groups, encoded).map_err(|bad| PieceError::Bad { group: bad.0 })?;
        let write = BlobError::io("write", &self.blobs.layout().part(&self.id()));
        self.write(verified).map_err(write)?;
        let map = {
            let mut state = self.state();
            state.have.extend(groups);
            state.unmapped += groups.count();
            (state.unmapped >= MAP_EVERY).then(|| {
                state.unmapped = 0;
                state.have.clone()
            })
        };
        self.publish();
        if let Some(have) = map {
            self.blobs.layout().write_map(&self.id(), &have)?;
        }
        Ok(())
    }

    fn write(&self, mut verified: tree::Verified<'_>) -> std::io::Result<()> {
        for (offset, bytes) in verified.data {
            write_at(&self.data, offset, bytes)?;
        }
        let Some(outboard) = &self.outboard else { return Ok(()) };
        // Pairs of neighbouring groups are neighbours in post order too: few writes.
        verified.parents.sort_unstable_by_key(|(at, _)| *at);
        let mut run: Vec<u8> = Vec::with_capacity(verified.parents.len() * tree::PAIR_LEN);
        let mut start = 0;
        for (at, pair) in verified.parents {
            if at != start + run.len() as u64 {
                write_at(outboard, start, &run)?;
                run.clear();
            }
            if run.is_empty() {
                start = at;
            }
            run.extend_from_slice(pair);
        }
        write_at(outboard, start, &run)
    }

    /// Makes a complete blob of it. Blocks.
    ///
    /// # Errors
    /// [`BlobError::Incomplete`] when groups are missing; the partial blob stays.
    pub fn finish(&self) -> Result<(), BlobError> {
        let id = self.id();
        let have = self.state().have.clone();
        if have != GroupRanges::all(self.len()) {
            return Err(BlobError::Incomplete { blob: id, held: have.count(), groups: self.shape.groups() });
        }
        let layout = self.blobs.layout();
        let durable = self.blobs.index().get(&id).is_some_and(|e| !e.access.is_public());
        if durable {
            self.data.sync_all().map_err(BlobError::io("sync", &layout.part(&id)))?;
            if let Some(outboard) = &self.outboard {
                outboard.sync_all().map_err(BlobError::io("sync", &layout.outboard(&id)))?;
            }
        }
        {
            let _files = self.blobs.files();
            let gone = self.blobs.index().get(&id).is_none_or(|e| e.partial.is_none());
            if !gone {
                fs::rename(layout.part(&id), layout.data(&id)).map_err(BlobError::io("rename", &layout.part(&id)))?;
                let _ = fs::remove_file(layout.map(&id));
                let stamp = Stamp::of(&self.data).map_err(BlobError::io("look at", &layout.data(&id)))?;
                if let Some(entry) = self.blobs.index().get_mut(&id) {
                    entry.partial = None;
                    entry.last_used = now();
                    entry.checked = Some(Checked { stamp, groups: have, since: now() });
                }
            }
        }
        if durable { layout.sync_dir(&id) } else { Ok(()) }
    }

    /// Tells the index what is held.
    fn publish(&self) {
        let have = self.state().have.clone();
        if let Some(entry) = self.blobs.index().get_mut(&self.id())
            && entry.partial.is_some()
        {
            entry.partial = Some(have);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let id = self.id();
        let unfinished = self.blobs.index().get_mut(&id).is_some_and(|entry| {
            entry.writing = false;
            entry.partial.is_some()
        });
        if unfinished && let Err(e) = self.blobs.layout().write_map(&id, &self.state().have) {
            tracing::debug!(blob = %id, error = %e, "the map of a partial blob was not written");
        }
    }
}

/// Takes the right to write. `None`: the blob is complete. Otherwise whether files of it may exist.
fn claim(blobs: &Blobs, shape: &Shape, access: &Access) -> Result<Option<bool>, BlobError> {
    let id = shape.id();
    let victims = {
        let mut index = lock(&blobs.inner().index);
        if let Some(entry) = index.get_mut(&id) {
            if entry.partial.is_none() {
                return Ok(None);
            }
            if entry.writing {
                return Err(BlobError::BeingWritten { blob: id });
            }
            if entry.shape.len() == shape.len() {
                entry.writing = true;
                entry.access.widen(access);
                return Ok(Some(true));
            }
            if !entry.held().is_empty() {
                return Err(BlobError::WrongLength { blob: id, known: entry.shape.len(), claimed: shape.len() });
            }
            index.remove(&id);
        }
        let victims = index.reserve(shape.disk_len(), blobs.config().max_bytes.0)?;
        index.release(shape.disk_len());
        let meta = Meta::new(shape.len(), access.clone(), 0);
        let mut entry = Entry::new(*shape, meta, Some(GroupRanges::empty()), now());
        entry.writing = true;
        index.insert(entry);
        victims
    };
    blobs.unlink(&victims);
    Ok(Some(false))
}
