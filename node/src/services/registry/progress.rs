//! How far publications and fetches are that somebody asked for, for whoever watches them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use sundara_proto::blob::GROUP_LEN;
use sundara_proto::id::BlobId;
use sundara_proto::model::ModelManifest;
use sundara_proto::units::ByteCount;

use super::Inner;
use crate::blobs::lock;

/// A publication or a fetch under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Progress {
    /// The directory that is published, or the name that is fetched, as it was given.
    pub of: String,
    /// Bytes that are hashed, or here.
    pub done: ByteCount,
    /// Bytes in all.
    pub size: ByteCount,
}

/// What counts the bytes of one.
enum Counted {
    Hashed { size: u64, done: Arc<AtomicU64> },
    Fetched(Vec<(BlobId, u64)>),
}

pub(crate) struct UnderWay {
    of: String,
    counted: Counted,
}

/// Takes it from the list when dropped.
pub(super) struct Listed<'a> {
    inner: &'a Inner,
    entry: Arc<UnderWay>,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        lock(&self.inner.under_way).retain(|other| !Arc::ptr_eq(other, &self.entry));
    }
}

/// Lists the hashing of `size` bytes; `done` counts them.
pub(super) fn hashing(inner: &Inner, of: String, size: u64, done: Arc<AtomicU64>) -> Listed<'_> {
    list(inner, UnderWay { of, counted: Counted::Hashed { size, done } })
}

/// Lists the fetch of a model's files.
pub(super) fn fetching<'a>(inner: &'a Inner, of: &str, manifest: &ModelManifest) -> Listed<'a> {
    let blobs = manifest.blobs().map(|a| (a.blob, a.len.0)).collect();
    list(inner, UnderWay { of: of.to_owned(), counted: Counted::Fetched(blobs) })
}

fn list(inner: &Inner, entry: UnderWay) -> Listed<'_> {
    let entry = Arc::new(entry);
    lock(&inner.under_way).push(entry.clone());
    Listed { inner, entry }
}

/// All of them, in the order in which they began.
pub(super) fn all(inner: &Inner) -> Vec<Progress> {
    let listed = lock(&inner.under_way).clone();
    let progress = |entry: &Arc<UnderWay>| {
        let (done, size) = match &entry.counted {
            Counted::Hashed { size, done } => (done.load(Ordering::Relaxed), *size),
            Counted::Fetched(blobs) => {
                // The last group of a blob may be short.
                let here = |(blob, len): &(BlobId, u64)| (inner.blobs.held(blob).count() * GROUP_LEN).min(*len);
                (blobs.iter().map(here).sum(), blobs.iter().map(|(_, len)| len).sum())
            }
        };
        Progress { of: entry.of.clone(), done: ByteCount(done), size: ByteCount(size) }
    };
    listed.iter().map(progress).collect()
}
