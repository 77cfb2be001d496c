//! Key files: the hotkey that answers for a node, and the node key that makes its PeerId.
//!
//! Owns their layout and their safety. Invariants:
//! - a key file is never overwritten, not through a symbolic link either: losing a key loses identity and rewards;
//! - it appears under its name whole or not at all, whatever kills the process meanwhile;
//! - it is readable by its owner only, and one that others can read is refused, with the command that mends it;
//! - no secret is logged, shown by `Debug` or named in an error, and buffers that held one are wiped.
//!
//! A hotkey file is JSON as btwallet writes it, so that wallets made by either side work for the other. Encrypted
//! files are recognised and refused in words.

mod hotkey;
mod node;
mod private;

pub use hotkey::{
    HotkeyFile, create_hotkey, import_hotkey, load_hotkey, load_or_create_hotkey, show_hotkey, write_hotkey_seed,
};
pub use node::{create_node_key, load_node_key, load_or_create_node_key};
pub use private::read as read_secret_file;

use std::io;
use std::path::{Path, PathBuf};

/// What is wrong with a key file, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Something has that name already.
    #[error(
        "{path} exists and a key file is never overwritten; choose another name, or move the old file away yourself"
    )]
    Exists {
        /// The name that is taken.
        path: PathBuf,
    },
    /// There is no such file.
    #[error("there is no key file {path}; make one with `sundara-node key new`, or name another in [keys]")]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Others than the owner may read or write it.
    #[error("{path} has mode {mode:04o}: others can read this key; run `chmod 600 {path}`")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not what a key file looks like.
    #[error("{path} is not a key file: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, without any of its content.
        reason: String,
    },
    /// It holds the public half only.
    #[error("{path} holds no secret (no phrase, seed or private key); name the hotkey file itself, not its `pub.txt`")]
    PublicOnly {
        /// The file.
        path: PathBuf,
    },
    /// A wallet's encrypted file.
    #[error(
        "{path} is encrypted ({scheme}); write it out decrypted with the wallet's own tool, mode 0600, and name that file"
    )]
    Encrypted {
        /// The file.
        path: PathBuf,
        /// Which encryption it names.
        scheme: &'static str,
    },
    /// The phrase is no BIP39 phrase.
    #[error("the phrase is not a BIP39 phrase of 12 to 24 English words with a valid checksum")]
    Phrase,
    /// An operation of the file system failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl KeyError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }

    fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), reason: reason.into() }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
