//! The high-water mark: the number of the last acknowledged batch, kept outside journal and sled.
//!
//! It is written before each acknowledgement (so a killed process leaves an exact mark) and synced when the store is
//! idle, at checkpoints and every few groups (so a power cut leaves one that lags by those few; the journal itself
//! was synced before them). Two slots are written in turn: a torn write spoils one, the other holds the number before.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::io_error;
use crate::store::StoreError;

/// Slots lie in blocks of their own, so that one torn block cannot spoil both.
const SLOT_DISTANCE: u64 = 4_096;
const MAGIC: &[u8; 8] = b"SNDMARK1";
const SLOT_BYTES: usize = 8 + 8 + 8;

/// The open mark.
#[derive(Debug)]
pub(super) struct Mark {
    file: File,
    path: PathBuf,
    slot: u64,
    /// The number last written.
    pub(super) seq: u64,
    synced: bool,
}

impl Mark {
    pub(super) const FILE: &'static str = "mark";

    /// Makes the mark of a new generation, durable except for its directory entry.
    pub(super) fn create(generation: &Path, seq: u64) -> Result<Self, StoreError> {
        let path = generation.join(Self::FILE);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(io_error("create", &path))?;
        let mut mark = Self { file, path, slot: 0, seq, synced: false };
        mark.write(seq)?;
        mark.write(seq)?;
        mark.sync()?;
        Ok(mark)
    }

    /// Opens the mark; the higher of the readable slots counts.
    pub(super) fn open(generation: &Path) -> Result<Self, StoreError> {
        let path = generation.join(Self::FILE);
        let mut file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::damaged(&path, "the file is missing"));
            }
            Err(err) => return Err(StoreError::io("open", &path, err)),
        };
        let slots =
            [read_slot(&mut file, 0), read_slot(&mut file, 1)].map(|slot| slot.map_err(io_error("read", &path)));
        let [first, second] = slots;
        let (first, second) = (first?, second?);
        let slot = u64::from(first >= second);
        let Some(seq) = first.max(second) else {
            return Err(StoreError::damaged(&path, "neither slot is readable"));
        };
        Ok(Self { file, path, slot, seq, synced: true })
    }

    /// Writes `seq` into the slot that is not the last one. Survives a kill, not yet a power cut.
    pub(super) fn write(&mut self, seq: u64) -> Result<(), StoreError> {
        let mut slot = [0; SLOT_BYTES];
        slot[..8].copy_from_slice(MAGIC);
        slot[8..16].copy_from_slice(&seq.to_le_bytes());
        let check = check(&slot[..16]);
        slot[16..].copy_from_slice(&check);
        self.file
            .seek(SeekFrom::Start(self.slot * SLOT_DISTANCE))
            .and_then(|_| self.file.write_all(&slot))
            .map_err(io_error("write", &self.path))?;
        (self.slot, self.seq, self.synced) = (1 - self.slot, seq, false);
        Ok(())
    }

    /// Makes the last write survive a power cut.
    pub(super) fn sync(&mut self) -> Result<(), StoreError> {
        if !self.synced {
            self.file.sync_data().map_err(io_error("sync", &self.path))?;
            self.synced = true;
        }
        Ok(())
    }

    /// Whether the last write survives a power cut.
    pub(super) fn is_synced(&self) -> bool {
        self.synced
    }
}

fn read_slot(file: &mut File, slot: u64) -> io::Result<Option<u64>> {
    let mut bytes = [0; SLOT_BYTES];
    file.seek(SeekFrom::Start(slot * SLOT_DISTANCE))?;
    match file.read_exact(&mut bytes) {
        Ok(()) => {}
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(err) => return Err(err),
    }
    let whole = &bytes[..8] == MAGIC && bytes[16..] == check(&bytes[..16]);
    Ok(whole.then(|| bytes[8..16].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))))
}

fn check(bytes: &[u8]) -> [u8; 8] {
    let mut check = [0; 8];
    check.copy_from_slice(&blake3::hash(bytes).as_bytes()[..8]);
    check
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Mark, SLOT_DISTANCE};
    use crate::store::StoreError;

    #[test]
    fn a_torn_slot_leaves_the_number_before_and_two_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut mark = Mark::create(dir.path(), 7).unwrap();
        mark.write(8).unwrap();
        mark.write(9).unwrap();
        drop(mark);
        assert_eq!(Mark::open(dir.path()).unwrap().seq, 9);

        let path = dir.path().join(Mark::FILE);
        let good = std::fs::read(&path).unwrap();
        let mut seen = Vec::new();
        for slot in [0, SLOT_DISTANCE as usize] {
            let mut torn = good.clone();
            torn[slot + 10] ^= 1;
            std::fs::write(&path, &torn).unwrap();
            seen.push(Mark::open(dir.path()).unwrap().seq);
        }
        seen.sort_unstable();
        assert_eq!(seen, [8, 9]);

        std::fs::write(&path, vec![0; good.len()]).unwrap();
        assert!(matches!(Mark::open(dir.path()), Err(StoreError::Damaged { .. })));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(Mark::open(dir.path()), Err(StoreError::Damaged { .. })));
    }

    #[test]
    fn an_opened_mark_goes_on_in_the_older_slot() {
        let dir = tempfile::tempdir().unwrap();
        let mut mark = Mark::create(dir.path(), 0).unwrap();
        for seq in 1..10 {
            mark.write(seq).unwrap();
            drop(mark);
            mark = Mark::open(dir.path()).unwrap();
            assert_eq!(mark.seq, seq);
        }
    }
}
