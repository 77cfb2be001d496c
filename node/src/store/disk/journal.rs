//! The journal: batches in the order of their numbers, durable before they reach sled.
//!
//! ```text
//! file    header record*
//! header  magic (8) base seq (8) tally at base (32) check (8)
//! record  body length (4) check (8) body
//! body    seq (8) tally after (32) writes (4) write*
//! write   keyspace (1) key length (2) value length or DELETE (4) key value
//! ```
//! Integers are little-endian; a check is the head of a BLAKE3 digest over the file's base and the bytes, so that a
//! record of an older file never counts. The first record that does not check ends the file; whether that is a torn
//! write or damage is for the reader of several files and the mark to say.
//!
//! Room is taken ahead of the records, and reads as zeros, which are no record: to sync a file that has not grown, the file
//! system need not write what it knows of the file, which takes a third of the time.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::files::{lengthen, sync_dir};
use super::io_error;
use super::tally::Tally;
use crate::store::StoreError;
use crate::store::batch::Op;

/// No journal is longer than this, unless it is damaged: the largest setting of `checkpoint_bytes`, and as much again
/// for the group that began just below it.
const MAX_FILE_BYTES: u64 = 2 * MAX_CHECKPOINT_BYTES;

/// The largest setting of `checkpoint_bytes`: a journal is read into memory when the store opens.
pub(super) const MAX_CHECKPOINT_BYTES: u64 = 128 * 1024 * 1024;

/// The last digit is the version of the files' layout (journal, mark and the keys within sled).
const MAGIC: &[u8; 8] = b"SNDJRNL1";
const LAYOUT: u32 = 1;
const HEADER_BYTES: usize = 8 + 8 + Tally::LEN + 8;
const FRAME_BYTES: usize = 4 + 8;
const DELETE: u32 = u32::MAX;
/// Room taken at once: some hundreds of batches.
const ROOM_BYTES: u64 = 256 * 1024;
const PREFIX: &str = "journal-";
const DRAFT: &str = "journal.new";

/// The journal file that is being written.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    path: PathBuf,
    base_seq: u64,
    len: u64,
    /// Length of the file, as far as it is known to be longer than its records.
    room: u64,
}

/// A write as it stands in a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RawOp<'a> {
    pub(super) keyspace: u8,
    pub(super) key: &'a [u8],
    pub(super) value: Option<&'a [u8]>,
}

/// A journal file, read and checked as far as it goes.
#[derive(Debug)]
pub(super) struct Contents {
    pub(super) path: PathBuf,
    pub(super) base_seq: u64,
    /// Number of the last whole record, or the base.
    pub(super) last_seq: u64,
    /// Tally after the last whole record.
    pub(super) tally: Tally,
    /// Length up to the end of the last whole record.
    pub(super) valid_len: u64,
    bytes: Vec<u8>,
}

impl Journal {
    /// Makes the file that follows batch `base_seq`, and makes it durable.
    pub(super) fn create(generation: &Path, base_seq: u64, tally: Tally) -> Result<Self, StoreError> {
        let path = generation.join(format!("{PREFIX}{base_seq:016x}"));
        let draft = generation.join(DRAFT);
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&base_seq.to_le_bytes());
        header.extend_from_slice(&tally.to_bytes());
        let check = check(base_seq, &header);
        header.extend_from_slice(&check);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&draft);
        let mut file = file.map_err(io_error("create", &draft))?;
        file.write_all(&header).and_then(|()| file.sync_all()).map_err(io_error("write", &draft))?;
        std::fs::rename(&draft, &path).map_err(io_error("create", &path))?;
        sync_dir(generation)?;
        Ok(Self { file, path, base_seq, len: HEADER_BYTES as u64, room: 0 })
    }

    /// Goes on writing after the last whole record of `contents`, cutting off whatever lies behind it.
    pub(super) fn resume(contents: &Contents) -> Result<Self, StoreError> {
        let path = contents.path.clone();
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(io_error("open", &path))?;
        if contents.bytes.len() as u64 > contents.valid_len {
            file.set_len(contents.valid_len).and_then(|()| file.sync_all()).map_err(io_error("truncate", &path))?;
        }
        Ok(Self { file, path, base_seq: contents.base_seq, len: contents.valid_len, room: 0 })
    }

    /// Appends the record of one batch to `records`, the buffer of a group.
    pub(super) fn encode(&self, records: &mut Vec<u8>, seq: u64, tally: Tally, ops: &[Op]) {
        let frame = records.len();
        records.extend_from_slice(&[0; FRAME_BYTES]);
        records.extend_from_slice(&seq.to_le_bytes());
        records.extend_from_slice(&tally.to_bytes());
        records.extend_from_slice(&(ops.len() as u32).to_le_bytes());
        for op in ops {
            records.push(op.keyspace as u8);
            records.extend_from_slice(&(op.key.len() as u16).to_le_bytes());
            records.extend_from_slice(&op.value.as_ref().map_or(DELETE, |value| value.len() as u32).to_le_bytes());
            records.extend_from_slice(&op.key);
            records.extend_from_slice(op.value.as_deref().unwrap_or_default());
        }
        let body = frame + FRAME_BYTES;
        let len = (records.len() - body) as u32;
        let check = check(self.base_seq, &records[body..]);
        records[frame..frame + 4].copy_from_slice(&len.to_le_bytes());
        records[frame + 4..body].copy_from_slice(&check);
    }

    /// Writes a group's records behind the others and makes them durable.
    ///
    /// # Errors
    /// [`AppendError::Undone`] if nothing of it remains and the journal may go on, [`AppendError::Fatal`] if that is
    /// not sure: a failed sync must never be followed by another write.
    pub(super) fn append(&mut self, records: &[u8]) -> Result<(), AppendError> {
        self.take_room(records.len() as u64);
        let written = self.file.seek(SeekFrom::Start(self.len)).and_then(|_| self.file.write_all(records));
        if let Err(err) = written {
            self.room = 0;
            let undone = self.file.set_len(self.len).and_then(|()| self.file.sync_all());
            return Err(match undone {
                Ok(()) => AppendError::Undone(err),
                Err(_) => AppendError::Fatal(StoreError::io("write", &self.path, err)),
            });
        }
        self.file.sync_data().map_err(|err| AppendError::Fatal(StoreError::io("sync", &self.path, err)))?;
        self.len += records.len() as u64;
        Ok(())
    }

    /// Lengthens the file, unless the records fit. A file system that cannot, or is full, says so when they are written.
    fn take_room(&mut self, bytes: u64) {
        let end = self.len + bytes;
        if end <= self.room {
            return;
        }
        let room = end.next_multiple_of(ROOM_BYTES);
        if lengthen(&self.file, self.len, room - self.len) {
            self.room = room;
        }
    }

    /// Deletes every journal of a generation but the file `keep`, and drafts of one.
    pub(super) fn delete_others(generation: &Path, keep: &Path) -> Result<(), StoreError> {
        for entry in std::fs::read_dir(generation).map_err(io_error("list", generation))? {
            let path = entry.map_err(io_error("list", generation))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if (name.starts_with(PREFIX) && path != keep) || name == DRAFT {
                std::fs::remove_file(&path).map_err(io_error("delete", &path))?;
            }
        }
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether any batch is in it.
    pub(super) fn is_empty(&self) -> bool {
        self.len == HEADER_BYTES as u64
    }

    /// Bytes written.
    pub(super) fn len(&self) -> u64 {
        self.len
    }
}

/// Why a group was not appended.
#[derive(Debug)]
pub(super) enum AppendError {
    /// Nothing of the group remains.
    Undone(std::io::Error),
    /// It is not known what remains.
    Fatal(StoreError),
}

impl Contents {
    /// Reads and checks one file.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if its header is not whole, [`StoreError::NewerFormat`] if the layout is unknown.
    fn read(path: PathBuf) -> Result<Self, StoreError> {
        let len = std::fs::metadata(&path).map_err(io_error("read", &path))?.len();
        if len > MAX_FILE_BYTES {
            return Err(StoreError::damaged(&path, format!("it has {len} bytes, more than a journal ever has")));
        }
        let bytes = std::fs::read(&path).map_err(io_error("read", &path))?;
        let (base_seq, tally) = read_header(&path, &bytes)?;
        let mut contents = Self { path, base_seq, last_seq: base_seq, tally, valid_len: HEADER_BYTES as u64, bytes };
        let mut at = HEADER_BYTES;
        while let Some((record, next)) = contents.record(at) {
            if record.seq != contents.last_seq + 1 {
                break;
            }
            (contents.last_seq, contents.tally, contents.valid_len) = (record.seq, record.tally, next as u64);
            at = next;
        }
        Ok(contents)
    }

    /// All files of a generation by their base.
    pub(super) fn read_all(generation: &Path) -> Result<Vec<Result<Self, StoreError>>, StoreError> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(generation).map_err(io_error("list", generation))? {
            let entry = entry.map_err(io_error("list", generation))?;
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX)) {
                paths.push(entry.path());
            }
        }
        paths.sort();
        Ok(paths.into_iter().map(Self::read).collect())
    }

    /// The batches of the file, oldest first.
    pub(super) fn batches(&self) -> impl Iterator<Item = Vec<RawOp<'_>>> {
        let mut at = HEADER_BYTES;
        std::iter::from_fn(move || {
            let (record, next) = self.record(at).filter(|(_, next)| *next as u64 <= self.valid_len)?;
            at = next;
            Some(record.ops)
        })
    }

    /// The record at `at` and the offset behind it, if it is whole.
    fn record(&self, at: usize) -> Option<(Record<'_>, usize)> {
        let (len, rest) = self.bytes.get(at..)?.split_first_chunk::<4>()?;
        let (expected, rest) = rest.split_first_chunk::<8>()?;
        let body = rest.get(..u32::from_le_bytes(*len) as usize)?;
        if check(self.base_seq, body) != *expected {
            return None;
        }
        Some((Record::parse(body)?, at + FRAME_BYTES + body.len()))
    }
}

fn read_header(path: &Path, bytes: &[u8]) -> Result<(u64, Tally), StoreError> {
    let whole = || {
        let (header, _) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let (magic, rest) = header.split_first_chunk::<8>()?;
        let (base_seq, rest) = rest.split_first_chunk::<8>()?;
        let (tally, expected) = rest.split_first_chunk::<{ Tally::LEN }>()?;
        let base_seq = u64::from_le_bytes(*base_seq);
        (check(base_seq, &header[..HEADER_BYTES - 8]) == *expected)
            .then(|| (*magic, base_seq, Tally::from_bytes(tally)))
    };
    let Some((magic, base_seq, tally)) = whole() else {
        return Err(StoreError::damaged(path, "its header is not readable"));
    };
    match magic[7] {
        _ if magic[..7] != MAGIC[..7] => Err(StoreError::damaged(path, "it is not a journal")),
        version if version == MAGIC[7] => Ok((base_seq, tally)),
        version => {
            let found = u32::from(version.wrapping_sub(b'0'));
            Err(StoreError::NewerFormat { path: path.to_path_buf(), found, supported: LAYOUT })
        }
    }
}

struct Record<'a> {
    seq: u64,
    tally: Tally,
    ops: Vec<RawOp<'a>>,
}

impl<'a> Record<'a> {
    fn parse(body: &'a [u8]) -> Option<Self> {
        let (seq, rest) = body.split_first_chunk::<8>()?;
        let (tally, rest) = rest.split_first_chunk::<{ Tally::LEN }>()?;
        let (count, mut rest) = rest.split_first_chunk::<4>()?;
        let mut ops = Vec::new();
        for _ in 0..u32::from_le_bytes(*count) {
            let (&keyspace, tail) = rest.split_first()?;
            let (key_len, tail) = tail.split_first_chunk::<2>()?;
            let (value_len, tail) = tail.split_first_chunk::<4>()?;
            let (key, tail) = tail.split_at_checked(usize::from(u16::from_le_bytes(*key_len)))?;
            let value_len = u32::from_le_bytes(*value_len);
            let (value, tail) = if value_len == DELETE {
                (None, tail)
            } else {
                let (value, tail) = tail.split_at_checked(value_len as usize)?;
                (Some(value), tail)
            };
            ops.push(RawOp { keyspace, key, value });
            rest = tail;
        }
        rest.is_empty().then(|| Self { seq: u64::from_le_bytes(*seq), tally: Tally::from_bytes(tally), ops })
    }
}

fn check(base_seq: u64, bytes: &[u8]) -> [u8; 8] {
    let digest = blake3::Hasher::new().update(&base_seq.to_le_bytes()).update(bytes).finalize();
    let mut check = [0; 8];
    check.copy_from_slice(&digest.as_bytes()[..8]);
    check
}
