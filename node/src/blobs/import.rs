//! Making complete blobs of local bytes and files.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sundara_proto::blob::GroupRanges;
use sundara_proto::id::BlobId;
use sundara_proto::units::ByteCount;

use super::Blobs;
use super::access::Access;
use super::error::BlobError;
use super::index::{Checked, Entry};
use super::layout::{self, Layout, Meta, Stamp, now};
use super::tree::{Shape, hash_into};

/// Buffer between the hasher and an outboard's file: 4 MiB of data make 16 KiB of outboard.
const OUTBOARD_BUFFER: usize = 16 << 10;

/// How a file becomes a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ImportMode {
    /// A copy of its own; shares the blocks where the file system can.
    #[default]
    Copy,
    /// A second name for the same file: no bytes are copied and none are taken twice. Writing to the original then damages
    /// the blob, which is noticed before it is served. Falls back to a copy on another file system.
    Link,
}

/// What an import made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Its id.
    pub id: BlobId,
    /// Its length.
    pub len: ByteCount,
}

/// A file in tmp that goes away unless it is moved into place.
struct Temp(PathBuf);

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

pub(crate) fn put(blobs: &Blobs, bytes: &[u8], access: &Access) -> Result<BlobId, BlobError> {
    let len = ByteCount(bytes.len() as u64);
    let temp = Temp(blobs.layout().temp());
    // Small and common: when it is here already nothing is written.
    let id = BlobId::of(bytes);
    if adopt(blobs, &id, access)? {
        return Ok(id);
    }
    let room = Room::take(blobs, &Shape::new(id, len))?;
    let write = BlobError::io("write", &temp.0);
    let file = File::create_new(&temp.0).and_then(|mut f| f.write_all(bytes).map(|()| f)).map_err(write)?;
    let outboard = make_outboard(blobs, bytes, len)?;
    install(blobs, temp, file, outboard, Shape::new(id, len), access)?;
    drop(room);
    Ok(id)
}

pub(crate) fn import_file(
    blobs: &Blobs,
    path: &Path,
    mode: ImportMode,
    access: &Access,
    hashed: &AtomicU64,
) -> Result<Imported, BlobError> {
    let temp = Temp(blobs.layout().temp());
    let len = fs::metadata(path).map_err(BlobError::io("read", path))?.len();
    let room = Room::take(blobs, &Shape::new(BlobId([0; 32]), ByteCount(len)))?;
    let linked = mode == ImportMode::Link && fs::hard_link(path, &temp.0).is_ok();
    if !linked {
        fs::copy(path, &temp.0).map_err(BlobError::io("copy", path))?;
    }
    // What is hashed is our own file, so a source that changes meanwhile cannot make a blob that is not its id.
    let file = File::open(&temp.0).map_err(BlobError::io("open", &temp.0))?;
    let len = ByteCount(file.metadata().map_err(BlobError::io("look at", &temp.0))?.len());
    let outboard = make_outboard(blobs, Counting { from: &file, read: hashed }, len)?;
    let id = outboard.id;
    if !adopt(blobs, &id, access)? {
        install(blobs, temp, file, outboard, Shape::new(id, len), access)?;
    }
    drop(room);
    Ok(Imported { id, len })
}

/// Counts what is read.
struct Counting<'a> {
    from: &'a File,
    read: &'a AtomicU64,
}

impl Read for Counting<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(into)?;
        self.read.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// Room promised to a writer, given back when it ends.
struct Room<'a> {
    blobs: &'a Blobs,
    bytes: u64,
}

impl<'a> Room<'a> {
    fn take(blobs: &'a Blobs, shape: &Shape) -> Result<Self, BlobError> {
        let bytes = shape.disk_len();
        let victims = blobs.index().reserve(bytes, blobs.config().max_bytes.0)?;
        blobs.unlink(&victims);
        Ok(Self { blobs, bytes })
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.blobs.index().release(self.bytes);
    }
}

struct NewOutboard {
    id: BlobId,
    file: Option<(Temp, File)>,
}

fn make_outboard(blobs: &Blobs, data: impl io::Read, len: ByteCount) -> Result<NewOutboard, BlobError> {
    let temp = Temp(blobs.layout().temp());
    if Shape::new(BlobId([0; 32]), len).outboard_len() == 0 {
        let id = hash_into(data, len, io::sink()).map_err(BlobError::io("hash", &temp.0))?;
        return Ok(NewOutboard { id, file: None });
    }
    let file = File::create_new(&temp.0).map_err(BlobError::io("write", &temp.0))?;
    let mut out = BufWriter::with_capacity(OUTBOARD_BUFFER, &file);
    let hashed = hash_into(data, len, &mut out).and_then(|id| out.flush().map(|()| id));
    drop(out);
    let id = hashed.map_err(BlobError::io("hash into", &temp.0))?;
    Ok(NewOutboard { id, file: Some((temp, file)) })
}

/// Moves finished files into place, in the order that makes a crash harmless.
fn install(
    blobs: &Blobs,
    temp: Temp,
    file: File,
    outboard: NewOutboard,
    shape: Shape,
    access: &Access,
) -> Result<(), BlobError> {
    let (layout, id) = (blobs.layout(), shape.id());
    file.sync_all().map_err(BlobError::io("sync", &temp.0))?;
    if let Some((temp, file)) = &outboard.file {
        file.sync_all().map_err(BlobError::io("sync", &temp.0))?;
    }
    layout.make_dir(&id)?;
    {
        let _files = blobs.files();
        let mut meta = Meta::new(shape.len(), access.clone(), 1);
        if let Some(entry) = blobs.index().get(&id) {
            meta.access.widen(&entry.access);
            meta.refs = entry.refs.saturating_add(1);
            meta.pinned = entry.pinned;
        }
        let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(BlobError::io("rename", from));
        if let Some((temp, _)) = &outboard.file {
            rename(&temp.0, &layout.outboard(&id))?;
        }
        layout.write_meta(&id, &meta, true)?;
        rename(&temp.0, &layout.data(&id))?;
        let _ = fs::remove_file(layout.part(&id));
        let _ = fs::remove_file(layout.map(&id));
        let stamp = Stamp::of(&file).map_err(BlobError::io("look at", &layout.data(&id)))?;
        let mut index = blobs.index();
        let (holds, writing) = index.get(&id).map_or((0, false), |e| (e.holds, e.writing));
        let mut entry = Entry::new(shape, meta, None, now());
        (entry.holds, entry.writing) = (holds, writing);
        entry.checked = Some(Checked { stamp, groups: GroupRanges::all(shape.len()), since: now() });
        index.insert(entry);
    }
    layout.sync_dir(&id)
}

pub(crate) fn adopt(blobs: &Blobs, id: &BlobId, access: &Access) -> Result<bool, BlobError> {
    let _files = blobs.files();
    let (meta, durable) = {
        let mut index = blobs.index();
        let Some(entry) = index.get_mut(id).filter(|e| e.partial.is_none()) else { return Ok(false) };
        let widened = entry.access.widen(access);
        entry.last_used = now();
        let counted = !access.is_public();
        if counted {
            entry.refs = entry.refs.saturating_add(1);
        }
        if !widened && !counted {
            return Ok(true);
        }
        (entry.meta(), !entry.access.is_public())
    };
    blobs.layout().write_meta(id, &meta, durable)?;
    Ok(true)
}

/// Gives the file of a damaged blob its partial name. A file with other names is copied first: it is mended in place.
pub(crate) fn demote(layout: &Layout, id: &BlobId) -> Result<(), BlobError> {
    let (data, part) = (layout.data(id), layout.part(id));
    let shared = fs::metadata(&data).is_ok_and(|m| layout::is_shared(&m));
    if shared {
        let temp = Temp(layout.temp());
        fs::copy(&data, &temp.0).map_err(BlobError::io("copy", &data))?;
        fs::rename(&temp.0, &part).map_err(BlobError::io("rename", &temp.0))?;
        return fs::remove_file(&data).map_err(BlobError::io("remove", &data));
    }
    fs::rename(&data, &part).map_err(BlobError::io("rename", &data))
}
