//! Files that only their owner may read: created whole and never over another, read with care.

use std::collections::hash_map::RandomState;
use std::fs::{self, File, OpenOptions};
use std::hash::BuildHasher;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::KeyError;

/// Largest key file read; a real one is below 1 KiB.
const FILE_BYTES_MAX: usize = 16 << 10;

/// Writes `content` to a new file of mode 0600. The content is complete and on disk before the name exists: it is
/// written to a temporary name and then linked, and a link never replaces what is there. Its directory is made, mode 0700, where it is missing.
pub(super) fn create(path: &Path, content: &[u8]) -> Result<(), KeyError> {
    // Said early for the common case; the link below decides.
    if fs::symlink_metadata(path).is_ok() {
        return Err(KeyError::Exists { path: path.to_path_buf() });
    }
    let dir = parent(path);
    make_private_dir(dir)?;
    let temporary = temporary_name(path)?;
    let written = write_new(&temporary, content).and_then(|()| link(&temporary, path));
    // Whatever happened, the secret is not to lie about under a second name.
    let removed = fs::remove_file(&temporary);
    written?;
    removed.map_err(|e| KeyError::io("remove", &temporary, e))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| KeyError::io("flush", dir, e))
}

/// Reads a file that must be readable by its owner only. A symbolic link is followed: what counts is the file it names.
pub fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let mut file = File::open(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => KeyError::Missing { path: path.to_path_buf() },
        _ => KeyError::io("open", path, e),
    })?;
    let meta = file.metadata().map_err(|e| KeyError::io("inspect", path, e))?;
    if !meta.is_file() {
        return Err(KeyError::malformed(path, "it is not a regular file"));
    }
    check_mode(path, &meta)?;
    // Room for the whole at once: a buffer that grows leaves copies of the secret behind.
    let mut content = Zeroizing::new(vec![0; FILE_BYTES_MAX + 1]);
    let mut len = 0;
    loop {
        match file.read(&mut content[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(KeyError::io("read", path, e)),
        }
    }
    if len > FILE_BYTES_MAX {
        return Err(KeyError::malformed(path, format!("it has more than {FILE_BYTES_MAX} bytes")));
    }
    content.truncate(len);
    Ok(content)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

fn temporary_name(path: &Path) -> Result<PathBuf, KeyError> {
    let Some(name) = path.file_name() else {
        return Err(KeyError::malformed(path, "it names no file"));
    };
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".new-{:016x}", RandomState::new().hash_one(0)));
    Ok(path.with_file_name(hidden))
}

fn write_new(path: &Path, content: &[u8]) -> Result<(), KeyError> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).map_err(|e| KeyError::io("create", path, e))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(|e| KeyError::io("write", path, e))
}

fn link(from: &Path, to: &Path) -> Result<(), KeyError> {
    fs::hard_link(from, to).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => KeyError::Exists { path: to.to_path_buf() },
        _ => KeyError::io("create", to, e),
    })
}

fn make_private_dir(dir: &Path) -> Result<(), KeyError> {
    if dir.is_dir() {
        return Ok(());
    }
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir).map_err(|e| KeyError::io("create", dir, e))
}

#[cfg(unix)]
fn check_mode(path: &Path, meta: &fs::Metadata) -> Result<(), KeyError> {
    use std::os::unix::fs::PermissionsExt;
    let mode = meta.permissions().mode() & 0o7777;
    if mode & 0o077 == 0 { Ok(()) } else { Err(KeyError::Exposed { path: path.to_path_buf(), mode }) }
}

#[cfg(not(unix))]
fn check_mode(_: &Path, _: &fs::Metadata) -> Result<(), KeyError> {
    Ok(())
}
