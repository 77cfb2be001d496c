//! Where the files of a blob lie, and the small record beside them.
//!
//! ```text
//! blobs/3f/3f..a0            the bytes of a complete blob: its presence under this name says that it is complete
//! blobs/3f/3f..a0.obao       outboard, post order; none for a blob of one group
//! blobs/3f/3f..a0.meta       length, readers, pin, references (JSON); its mtime is the blob's last use
//! blobs/3f/3f..a0.part       bytes of an incomplete blob, sparse
//! blobs/3f/3f..a0.map        groups that the .part claims to hold; a hint, never believed without hashing
//! blobs/tmp/                 files being made; emptied at start
//! ```
//!
//! Order of writing a new blob: data and outboard to tmp (synced where the blob is durable), outboard renamed into place,
//! meta, data last. A crash before the last step leaves orphans that the scan removes; after it the blob is whole.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sundara_proto::blob::GroupRanges;
use sundara_proto::id::BlobId;
use sundara_proto::units::{ByteCount, UnixMillis};

use super::access::Access;
use super::error::BlobError;

/// Version of [`Meta`] and of the map that this code writes; it reads no later one.
const FORMAT: u32 = 1;

/// Most ranges that a map holds: enough for a fetch that took every other unit of a TiB; more means damage.
const MAP_RANGES_MAX: usize = 1 << 20;

/// What is known of a blob beside its bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Meta {
    format: u32,
    pub(crate) len: ByteCount,
    pub(crate) access: Access,
    pub(crate) pinned: bool,
    /// How often it was put and not removed. A partial blob has none.
    pub(crate) refs: u32,
}

impl Meta {
    pub(crate) fn new(len: ByteCount, access: Access, refs: u32) -> Self {
        Self { format: FORMAT, len, access, pinned: false, refs }
    }
}

/// The directory and the names in it.
#[derive(Debug)]
pub(crate) struct Layout {
    root: PathBuf,
    temp_serial: AtomicU64,
}

impl Layout {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root, temp_serial: AtomicU64::new(0) }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn temp_dir(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// A name in tmp that nobody else uses.
    pub(crate) fn temp(&self) -> PathBuf {
        let serial = self.temp_serial.fetch_add(1, Ordering::Relaxed);
        self.temp_dir().join(format!("{}-{serial}", std::process::id()))
    }

    fn file(&self, id: &BlobId, suffix: &str) -> PathBuf {
        let name = id.to_string();
        self.root.join(&name[..2]).join(format!("{name}{suffix}"))
    }
    pub(crate) fn data(&self, id: &BlobId) -> PathBuf {
        self.file(id, "")
    }
    pub(crate) fn part(&self, id: &BlobId) -> PathBuf {
        self.file(id, ".part")
    }
    pub(crate) fn outboard(&self, id: &BlobId) -> PathBuf {
        self.file(id, ".obao")
    }
    pub(crate) fn meta(&self, id: &BlobId) -> PathBuf {
        self.file(id, ".meta")
    }
    pub(crate) fn map(&self, id: &BlobId) -> PathBuf {
        self.file(id, ".map")
    }

    pub(crate) fn make_dir(&self, id: &BlobId) -> Result<(), BlobError> {
        let dir = self.root.join(&id.to_string()[..2]);
        fs::create_dir_all(&dir).map_err(BlobError::io("create", &dir))
    }

    /// Makes renames in the blob's directory survive a power cut.
    pub(crate) fn sync_dir(&self, id: &BlobId) -> Result<(), BlobError> {
        let dir = self.root.join(&id.to_string()[..2]);
        File::open(&dir).and_then(|d| d.sync_all()).map_err(BlobError::io("sync", &dir))
    }

    /// Replaces a small file as a whole: readers see the old content or the new.
    pub(crate) fn replace(&self, path: &Path, content: &[u8], durable: bool) -> Result<(), BlobError> {
        let temp = self.temp();
        let written = File::create(&temp).and_then(|mut f| {
            f.write_all(content)?;
            if durable { f.sync_all() } else { Ok(()) }
        });
        let moved = written.and_then(|()| fs::rename(&temp, path));
        moved.map_err(|e| {
            let _ = fs::remove_file(&temp);
            BlobError::io("write", path)(e)
        })
    }

    pub(crate) fn write_meta(&self, id: &BlobId, meta: &Meta, durable: bool) -> Result<(), BlobError> {
        let text =
            serde_json::to_vec(meta).map_err(|e| BlobError::io("encode", &self.meta(id))(std::io::Error::other(e)))?;
        self.replace(&self.meta(id), &text, durable)
    }

    /// `None` when it is missing, torn or of a later format.
    pub(crate) fn read_meta(&self, id: &BlobId) -> Option<(Meta, UnixMillis)> {
        let path = self.meta(id);
        let bytes = fs::read(&path).ok()?;
        let meta: Meta = serde_json::from_slice(&bytes).ok().filter(|m: &Meta| m.format == FORMAT)?;
        let used = fs::metadata(&path).and_then(|m| m.modified()).ok()?;
        Some((meta, unix_millis(used)))
    }

    /// Notes a use. Losing it only makes the blob look older.
    pub(crate) fn touch_meta(&self, id: &BlobId, now: UnixMillis) {
        let when = UNIX_EPOCH + Duration::from_millis(now.0);
        if let Ok(file) = File::options().append(true).open(self.meta(id)) {
            let _ = file.set_modified(when);
        }
    }

    pub(crate) fn write_map(&self, id: &BlobId, have: &GroupRanges) -> Result<(), BlobError> {
        let mut bytes = FORMAT.to_le_bytes().to_vec();
        have.to_pairs().iter().for_each(|bound| bytes.extend_from_slice(&bound.to_le_bytes()));
        let check = bao_tree::blake3::hash(&bytes);
        bytes.extend_from_slice(check.as_bytes());
        self.replace(&self.map(id), &bytes, false)
    }

    /// What the map claims; `None` when it is missing or torn.
    pub(crate) fn read_map(&self, id: &BlobId) -> Option<GroupRanges> {
        let bytes = fs::read(self.map(id)).ok()?;
        let (body, check) = bytes.split_last_chunk::<32>()?;
        let (format, pairs) = body.split_first_chunk::<4>()?;
        if bao_tree::blake3::hash(body) != *check || u32::from_le_bytes(*format) != FORMAT {
            return None;
        }
        let (words, rest) = pairs.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|w| u64::from_le_bytes(*w)).collect();
        GroupRanges::from_pairs(&words, MAP_RANGES_MAX).ok().filter(|_| rest.is_empty())
    }

    /// Moves every file of a blob to tmp, which is quick, and returns what is left to unlink, which may not be.
    pub(crate) fn discard(&self, id: &BlobId) -> Vec<PathBuf> {
        let files = [self.data(id), self.part(id), self.map(id), self.meta(id), self.outboard(id)];
        let moved = files.into_iter().filter_map(|path| {
            let temp = self.temp();
            fs::rename(&path, &temp).is_ok().then_some(temp)
        });
        moved.collect()
    }
}

/// Kinds of file that the scan finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Data,
    Part,
    Outboard,
    Meta,
    Map,
}

/// What a file name says; `None` for files that are not ours.
pub(crate) fn parse_name(name: &OsStr) -> Option<(BlobId, Kind)> {
    let name = name.to_str()?;
    let (id, kind) = match name.split_once('.') {
        None => (name, Kind::Data),
        Some((id, "part")) => (id, Kind::Part),
        Some((id, "obao")) => (id, Kind::Outboard),
        Some((id, "meta")) => (id, Kind::Meta),
        Some((id, "map")) => (id, Kind::Map),
        Some(_) => return None,
    };
    Some((id.parse().ok()?, kind))
}

pub(crate) fn unix_millis(time: SystemTime) -> UnixMillis {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

pub(crate) fn now() -> UnixMillis {
    unix_millis(SystemTime::now())
}

/// Identity of a file's content as the file system tells it: changes when anyone writes to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    len: u64,
    modified: Option<SystemTime>,
    changed: (i64, i64),
    inode: u64,
}

impl Stamp {
    pub(crate) fn of(file: &File) -> std::io::Result<Self> {
        file.metadata().map(|m| Self::from(&m))
    }
}

impl From<&fs::Metadata> for Stamp {
    fn from(m: &fs::Metadata) -> Self {
        #[cfg(unix)]
        let (changed, inode) = {
            use std::os::unix::fs::MetadataExt;
            ((m.ctime(), m.ctime_nsec()), m.ino())
        };
        #[cfg(not(unix))]
        let (changed, inode) = ((0, 0), 0);
        Self { len: m.len(), modified: m.modified().ok(), changed, inode }
    }
}

/// Writes all of `bytes` at `offset`, whatever other threads do with the file.
pub(crate) fn write_at(file: &File, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
    }
    #[cfg(windows)]
    {
        let (mut offset, mut bytes) = (offset, bytes);
        while !bytes.is_empty() {
            let n = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
            (offset, bytes) = (offset + n as u64, &bytes[n..]);
        }
        Ok(())
    }
}

/// Whether other names lead to the same bytes, so that writing would change a file that is not ours.
pub(crate) fn is_shared(m: &fs::Metadata) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        m.nlink() > 1
    }
    #[cfg(not(unix))]
    {
        let _ = m;
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn layout() -> (tempfile::TempDir, Layout, BlobId) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        let id = BlobId([0x3f; 32]);
        fs::create_dir_all(layout.temp_dir()).unwrap();
        layout.make_dir(&id).unwrap();
        (dir, layout, id)
    }

    #[test]
    fn a_map_is_read_whole_or_not_at_all() {
        let (_dir, layout, id) = layout();
        let mut have = GroupRanges::of(3..9);
        have.insert(20..21);
        layout.write_map(&id, &have).unwrap();
        assert_eq!(layout.read_map(&id), Some(have));
        let good = fs::read(layout.map(&id)).unwrap();
        for cut in 0..good.len() {
            fs::write(layout.map(&id), &good[..cut]).unwrap();
            assert_eq!(layout.read_map(&id), None, "torn at {cut}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(layout.map(&id), &bad).unwrap();
            assert_eq!(layout.read_map(&id), None, "changed at {at}");
        }
    }

    #[test]
    fn meta_keeps_access_and_last_use() {
        let (_dir, layout, id) = layout();
        layout.write_meta(&id, &Meta::new(ByteCount(7), Access::local(), 2), false).unwrap();
        layout.touch_meta(&id, UnixMillis(1_000_000));
        let (meta, used) = layout.read_meta(&id).unwrap();
        assert_eq!((meta.len, meta.access, meta.refs, used), (ByteCount(7), Access::local(), 2, UnixMillis(1_000_000)));
        fs::write(layout.meta(&id), b"{\"format\":1,").unwrap();
        assert!(layout.read_meta(&id).is_none(), "torn");
    }

    #[test]
    fn names_say_what_a_file_is() {
        let (_dir, layout, id) = layout();
        for (path, kind) in [
            (layout.data(&id), Kind::Data),
            (layout.part(&id), Kind::Part),
            (layout.outboard(&id), Kind::Outboard),
            (layout.meta(&id), Kind::Meta),
            (layout.map(&id), Kind::Map),
        ] {
            assert_eq!(parse_name(path.file_name().unwrap()), Some((id, kind)));
        }
        assert_eq!(parse_name(OsStr::new("lost+found")), None);
    }
}
