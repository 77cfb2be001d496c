//! The directory: its lock, its generations, its room on the disk.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::{DirLock, io_error};
use crate::store::StoreError;

const LOCK: &str = "lock";
const GENERATION: &str = "gen-";
/// A generation that is being built.
const DRAFT: &str = "new-";
/// A generation that is being deleted.
const REMAINS: &str = "old-";
const DAMAGED: &str = "damaged-";

/// Takes the lock of `dir` for this handle, or names the process that has it.
pub(super) fn lock(dir: &Path) -> Result<DirLock, StoreError> {
    let path = dir.join(LOCK);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = file.map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // An unreadable or still empty file costs the number, not the message.
            let _ = file.take(20).read_to_string(&mut pid);
            let pid = Some(pid.trim()).filter(|pid| !pid.is_empty()).unwrap_or("unknown").to_owned();
            return Err(StoreError::InUse { path: dir.to_path_buf(), pid });
        }
        Err(TryLockError::Error(err)) => return Err(StoreError::io("lock", &path, err)),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(io_error("write", &path))?;
    Ok(DirLock { _file: file })
}

/// Makes the entries of a directory durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|file| file.sync_all()).map_err(io_error("sync", dir))
}

/// Allots `bytes` from `from` on to a file and makes it that long; whether it did.
pub(super) fn lengthen(file: &File, from: u64, bytes: u64) -> bool {
    #[cfg(target_os = "linux")]
    return rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), from, bytes).is_ok();
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (file, from, bytes);
        false
    }
}

/// Bytes that this user may still write on the file system of `path`.
#[cfg(unix)]
pub(super) fn free_bytes(path: &Path) -> Result<u64, StoreError> {
    let stat = rustix::fs::statvfs(path).map_err(|err| StoreError::io("ask for free room on", path, err.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes that this user may still write: not asked on this platform, a write that fails says it.
#[cfg(not(unix))]
pub(super) fn free_bytes(_path: &Path) -> Result<u64, StoreError> {
    Ok(u64::MAX)
}

/// Bytes of all files under `dir`. A file that vanishes meanwhile counts nothing.
pub(super) fn dir_bytes(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let bytes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => dir_bytes(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    });
    bytes.sum()
}

/// The newest generation, if there is one; leftovers of interrupted rebuilds are deleted.
pub(super) fn newest_generation(dir: &Path) -> Result<Option<u64>, StoreError> {
    let mut generations = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io_error("list", dir))? {
        let entry = entry.map_err(io_error("list", dir))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.starts_with(DRAFT) || name.starts_with(REMAINS) {
            std::fs::remove_dir_all(entry.path()).map_err(io_error("delete", entry.path()))?;
        }
        generations.extend(name.strip_prefix(GENERATION).and_then(|number| number.parse::<u64>().ok()));
    }
    generations.sort_unstable();
    let newest = generations.pop();
    for older in generations {
        delete_generation(dir, older)?;
    }
    Ok(newest)
}

pub(super) fn generation_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{GENERATION}{number:08}"))
}

/// The directory in which generation `number` is built, empty.
pub(super) fn new_draft(dir: &Path, number: u64) -> Result<PathBuf, StoreError> {
    let draft = dir.join(format!("{DRAFT}{number:08}"));
    if draft.exists() {
        std::fs::remove_dir_all(&draft).map_err(io_error("delete", &draft))?;
    }
    std::fs::create_dir(&draft).map_err(io_error("create", &draft))?;
    Ok(draft)
}

/// Makes a finished draft the newest generation, durably.
pub(super) fn publish_draft(dir: &Path, number: u64, draft: &Path) -> Result<(), StoreError> {
    sync_dir(draft)?;
    std::fs::rename(draft, generation_path(dir, number)).map_err(io_error("rename", draft))?;
    sync_dir(dir)
}

/// Deletes a generation. Interrupted, it leaves nothing that looks like one.
pub(super) fn delete_generation(dir: &Path, number: u64) -> Result<(), StoreError> {
    let remains = dir.join(format!("{REMAINS}{number:08}"));
    let path = generation_path(dir, number);
    std::fs::rename(&path, &remains).map_err(io_error("rename", &path))?;
    std::fs::remove_dir_all(&remains).map_err(io_error("delete", &remains))
}

/// Sets a generation aside under the first free name and returns that.
pub(super) fn set_aside(dir: &Path, number: u64) -> Result<PathBuf, StoreError> {
    let path = generation_path(dir, number);
    let free = (1u32..).map(|n| dir.join(format!("{DAMAGED}{n}"))).find(|aside| !aside.exists());
    let aside = free.unwrap_or_else(|| dir.join(DAMAGED));
    std::fs::rename(&path, &aside).map_err(io_error("rename", &path))?;
    sync_dir(dir)?;
    Ok(aside)
}
