//! The programs of this package live beside this file: `light_node.rs`, `publish_model.rs`, and `light_node.py`.
//!
//! What is shared with tests and benches stands here: building the wasm guests under `guests/` from their sources.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Why a guest was not built.
#[derive(Debug)]
#[non_exhaustive]
pub enum GuestError {
    /// The toolchain cannot compile for wasm32-wasip1, or there is none.
    NoTarget,
    /// The build itself failed.
    Failed(String),
}

impl fmt::Display for GuestError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTarget => write!(out, "no target wasm32-wasip1: rustup target add wasm32-wasip1"),
            Self::Failed(why) => write!(out, "the guest was not built: {why}"),
        }
    }
}

impl std::error::Error for GuestError {}

/// The folder of the guests.
pub fn guests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guests")
}

/// Builds a guest from its source, under its own lock, as `guests/build.sh` does it for everybody. Everything is written
/// below `scratch`; with the same directory again, little has to be done. Returns where the module is.
///
/// # Errors
/// See [`GuestError`].
pub fn build_guest(name: &str, scratch: &Path) -> Result<PathBuf, GuestError> {
    let print = ["--print", "target-libdir", "--target", "wasm32-wasip1"];
    let found = Command::new("rustc").args(print).current_dir(guests()).output();
    let library = found.ok().filter(|output| output.status.success());
    let library = library.map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    if !library.is_some_and(|path| path.is_dir()) {
        return Err(GuestError::NoTarget);
    }
    let module = scratch.join(format!("{name}.wasm"));
    let built = Command::new("sh")
        .arg(guests().join("build.sh"))
        .arg(name)
        .arg(&module)
        .env("CARGO_TARGET_DIR", scratch.join(format!("guest-{name}")))
        .output();
    match built {
        Ok(Output { status, .. }) if status.success() => Ok(module),
        Ok(output) => Err(GuestError::Failed(String::from_utf8_lossy(&output.stderr).into_owned())),
        Err(error) => Err(GuestError::Failed(error.to_string())),
    }
}

/// Assembles the directory of the sentence model, ready to be published: the guest `embed`, its manifest, and the files of
/// all-MiniLM-L6-v2 from `files`. Returns the directory, which is below `scratch`.
///
/// # Errors
/// See [`GuestError`].
pub fn sentence_model(files: &Path, scratch: &Path) -> Result<PathBuf, GuestError> {
    let module = build_guest("embed", scratch)?;
    let directory = scratch.join("sentence-model");
    let copy = |from: PathBuf, name: &str| match std::fs::copy(&from, directory.join(name)) {
        Ok(_) => Ok(()),
        Err(error) => Err(GuestError::Failed(format!("{}: {error}", from.display()))),
    };
    std::fs::create_dir_all(&directory).map_err(|error| GuestError::Failed(error.to_string()))?;
    copy(module, "embed.wasm")?;
    copy(guests().join("embed/model.toml"), "model.toml")?;
    SENTENCE_MODEL_FILES.into_iter().try_for_each(|name| copy(files.join(name), name))?;
    Ok(directory)
}

/// The artifacts of the sentence model.
pub const SENTENCE_MODEL_FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];
