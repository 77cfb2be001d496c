//! A job's output on its way out: passed on while it comes, kept in memory while small, in a file when large.

use std::io;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use sundara_proto::id::{BlobId, Hotkey};
use sundara_proto::wire::limit;
use sundara_runtime::OutputStream;
use tokio::io::AsyncWriteExt as _;

use crate::blobs::{Access, BlobError, Blobs, ImportMode, Reader};
use crate::services::work::{ExecutorEvent, ExecutorFault, RunSide};

/// Removes what a crash left, and makes the directory.
pub(super) fn clear_scratch(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    std::fs::create_dir_all(dir)
}

/// The whole output of one run.
pub(super) enum Whole {
    /// At most 128 KiB.
    Small(Bytes),
    /// More; the file goes away when this is dropped.
    Large(tempfile::TempPath),
}

/// Gathers a run's output until it ends.
pub(super) async fn gather(
    mut stream: OutputStream,
    scratch: &Path,
    side: Option<&RunSide>,
) -> Result<Whole, ExecutorFault> {
    let mut small = BytesMut::new();
    let mut large: Option<(tokio::fs::File, tempfile::TempPath)> = None;
    let mut offset = 0;
    while let Some(chunk) = stream.recv().await {
        match &mut large {
            Some((file, _)) => file.write_all(&chunk).await.map_err(|e| disk(&e, scratch))?,
            None => {
                small.extend_from_slice(&chunk);
                if small.len() > limit::INLINE {
                    let mut spilled = spill(scratch).map_err(|e| disk(&e, scratch))?;
                    spilled.0.write_all(&small).await.map_err(|e| disk(&e, scratch))?;
                    small = BytesMut::new();
                    large = Some(spilled);
                }
            }
        }
        let len = chunk.len() as u64;
        if let Some(side) = side {
            // Nobody listening is noticed where the run is cancelled.
            let _ = side.send(ExecutorEvent::Output { offset, data: chunk }).await;
        }
        offset += len;
    }
    match large {
        None => Ok(Whole::Small(small.freeze())),
        Some((mut file, path)) => {
            file.flush().await.map_err(|e| disk(&e, scratch))?;
            Ok(Whole::Large(path))
        }
    }
}

fn spill(scratch: &Path) -> io::Result<(tokio::fs::File, tempfile::TempPath)> {
    let (file, path) = tempfile::NamedTempFile::new_in(scratch)?.into_parts();
    Ok((tokio::fs::File::from_std(file), path))
}

fn disk(error: &io::Error, scratch: &Path) -> ExecutorFault {
    ExecutorFault::passing(format!("output cannot be written below {}: {error}", scratch.display()))
}

impl Whole {
    /// The bytes of a small output.
    pub(super) fn small(&self) -> Option<&Bytes> {
        match self {
            Self::Small(bytes) => Some(bytes),
            Self::Large(_) => None,
        }
    }

    /// Puts a large output among the blobs, readable for `reader`, and returns small ones as they are.
    pub(super) async fn keep(
        self,
        blobs: &Blobs,
        reader: Hotkey,
        expected: BlobId,
    ) -> Result<Option<Bytes>, ExecutorFault> {
        let path: PathBuf = match &self {
            Self::Small(bytes) => return Ok(Some(bytes.clone())),
            Self::Large(path) => path.to_path_buf(),
        };
        let access = Access::only([Reader::Hotkey(reader)]);
        let imported = blobs.import_file(path, ImportMode::Link, access).await.map_err(|e| store(&e))?;
        if imported.id != expected {
            return Err(ExecutorFault::passing("output on disk is not what the job wrote: check the disk"));
        }
        Ok(None)
    }
}

/// A refusal of the blob store.
pub(super) fn store(error: &BlobError) -> ExecutorFault {
    ExecutorFault::passing(format!("blobs: {error}"))
}
