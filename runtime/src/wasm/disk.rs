//! Compiled code and warm images on this machine's disk: made here, never fetched, never trusted blindly.
//!
//! ```text
//! DIR/key            32 random bytes, made once, mode 0600
//! DIR/HEX.cwasm      what the compiler wrote
//! DIR/HEX.mac        keyed BLAKE3 of the name, the length and the content
//! ```
//!
//! Invariants: a file reaches the engine only after its whole content matched its keyed hash; files appear by rename
//! alone; whatever does not match (torn, altered, copied from another machine, made by another version) is deleted and
//! made again. A failing disk costs speed, never a result: reading and writing errors are logged and treated as a miss.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rand::TryRng;
use wasmtime::component::Component;
use wasmtime::{Engine, Module};

use super::trusted;

const MAC_CONTEXT: &str = "sundara-node compiled wasm v1";
const KEY_FILE: &str = "key";
const CODE: &str = "cwasm";
const MAC: &str = "mac";

/// The directory.
#[derive(Debug)]
pub(crate) struct DiskCache {
    directory: PathBuf,
    key: [u8; 32],
    bytes_max: u64,
}

impl DiskCache {
    /// Opens or makes the directory and its key.
    pub(crate) fn open(directory: &Path, bytes_max: u64) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        restrict(directory, 0o700)?;
        let secret = read_or_make_key(directory)?;
        let key = blake3::derive_key(MAC_CONTEXT, &secret);
        Ok(Self { directory: directory.to_owned(), key, bytes_max })
    }

    /// A module of ours, mapped from its file.
    pub(crate) fn module(&self, engine: &Engine, name: &[u8; 32]) -> Option<Module> {
        self.load(name, |file, _| trusted::module(engine, file))
    }

    /// A component of ours, mapped from its file.
    pub(crate) fn component(&self, engine: &Engine, name: &[u8; 32]) -> Option<Component> {
        self.load(name, |_, path| trusted::component(engine, path))
    }

    /// Keeps compiled code; then drops what was unused longest until the rest fits.
    pub(crate) fn store(&self, name: &[u8; 32], code: &[u8]) {
        let written = self
            .replace(&self.path(name, CODE), code)
            .and_then(|()| self.replace(&self.path(name, MAC), self.mac(name, code).as_bytes()));
        if let Err(error) = written {
            tracing::warn!(directory = %self.directory.display(), %error, "cannot keep compiled wasm");
        }
        if let Err(error) = self.shrink(name) {
            tracing::warn!(directory = %self.directory.display(), %error, "cannot shrink the cache of compiled wasm");
        }
    }

    fn load<T>(&self, name: &[u8; 32], map: impl FnOnce(File, &Path) -> wasmtime::Result<T>) -> Option<T> {
        let path = self.path(name, CODE);
        let file = File::open(&path).ok()?;
        let loaded = match self.verified(name, &file) {
            Ok(true) => {
                let _ = file.set_modified(SystemTime::now());
                map(file, &path).map_err(|error| format!("{error:#}"))
            }
            Ok(false) => Err("keyed hash does not match".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        loaded
            .map_err(|reason| {
                tracing::warn!(file = %path.display(), reason, "compiled wasm is unusable and will be made again");
                self.remove(&path);
            })
            .ok()
    }

    /// Whether the whole content of an open file is what we wrote under this name.
    fn verified(&self, name: &[u8; 32], file: &File) -> io::Result<bool> {
        let kept: [u8; 32] = match fs::read(self.path(name, MAC))?.try_into() {
            Ok(kept) => kept,
            Err(_) => return Ok(false),
        };
        let mut hasher = self.hasher(name, file.metadata()?.len());
        let mut reader = file;
        let mut block = vec![0; 1 << 20];
        loop {
            match reader.read(&mut block)? {
                0 => break,
                count => hasher.update(&block[..count]),
            };
        }
        // `Hash` compares in constant time.
        Ok(hasher.finalize() == blake3::Hash::from_bytes(kept))
    }

    fn mac(&self, name: &[u8; 32], code: &[u8]) -> blake3::Hash {
        self.hasher(name, code.len() as u64).update(code).finalize()
    }

    fn hasher(&self, name: &[u8; 32], length: u64) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(name).update(&length.to_le_bytes());
        hasher
    }

    fn path(&self, name: &[u8; 32], extension: &str) -> PathBuf {
        self.directory.join(format!("{}.{extension}", blake3::Hash::from_bytes(*name).to_hex()))
    }

    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        write_atomically(&self.directory, path, content)
    }

    fn remove(&self, code: &Path) {
        let _ = fs::remove_file(code);
        let _ = fs::remove_file(code.with_extension(MAC));
    }

    fn shrink(&self, newest: &[u8; 32]) -> io::Result<()> {
        let keep = self.path(newest, CODE);
        let mut files = Vec::new();
        let mut total = 0;
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == CODE) {
                let metadata = entry.metadata()?;
                total += metadata.len();
                files.push((metadata.modified()?, metadata.len(), path));
            }
        }
        files.sort();
        for (_, bytes, path) in files {
            if total <= self.bytes_max {
                break;
            }
            if path != keep {
                self.remove(&path);
                total -= bytes;
            }
        }
        Ok(())
    }
}

fn read_or_make_key(directory: &Path) -> io::Result<[u8; 32]> {
    let path = directory.join(KEY_FILE);
    match fs::read(&path) {
        // A damaged key invalidates every file, which is safe.
        Ok(bytes) => Ok(*blake3::hash(&bytes).as_bytes()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut bytes = [0; 32];
            rand::rngs::SysRng.try_fill_bytes(&mut bytes).map_err(io::Error::other)?;
            write_atomically(directory, &path, &bytes)?;
            // Read back: another process may have been first, and the file is what both will use.
            Ok(*blake3::hash(&fs::read(&path)?).as_bytes())
        }
        Err(error) => Err(error),
    }
}

/// Writes a private file beside its place, flushes it, and renames it into place.
fn write_atomically(directory: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let mut salt = [0; 8];
    rand::rngs::SysRng.try_fill_bytes(&mut salt).map_err(io::Error::other)?;
    let temporary = directory.join(format!("{:016x}.tmp", u64::from_le_bytes(salt)));
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&temporary).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(unix)]
fn restrict(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))
}

#[cfg(not(unix))]
fn restrict(_path: &Path, _mode: u32) -> io::Result<()> {
    Ok(())
}
