//! Pages as they are kept: keys, values, and when they are open. Acts on nothing by itself.
//!
//! The service `batches` writes this node's and serves all; `scores` reads them, and keeps others' for as long as it needs.

use bytes::Bytes;
use prost::Message as _;
use sundara_proto::batch::Batch;
use sundara_proto::id::Digest;
use sundara_proto::pb;

use crate::store::{KeyRange, Keyspace, Store, StoreError, WriteBatch};

/// Epochs after which the pages of one are open to anyone: the whole epoch after its end goes by, in which weights are
/// committed and revealed.
pub(crate) const OPEN_AFTER_EPOCHS: u64 = 2;

/// Key of this node's batch: epoch and sequence, in order of age.
pub(crate) fn batch_key(epoch: u64, sequence: u64) -> Vec<u8> {
    [epoch.to_be_bytes(), sequence.to_be_bytes()].concat()
}

/// Epoch and sequence of a [`batch_key`].
pub(crate) fn batch_place(key: &[u8]) -> Option<(u64, u64)> {
    let (epoch, sequence) = key.split_at_checked(8)?;
    Some((u64::from_be_bytes(epoch.try_into().ok()?), u64::from_be_bytes(sequence.try_into().ok()?)))
}

/// This node's batches of an epoch.
pub(crate) fn of_epoch(epoch: u64) -> KeyRange {
    KeyRange::prefix(&epoch.to_be_bytes())
}

/// A stored batch.
pub(crate) fn batch_from(value: &[u8]) -> Option<Batch> {
    use sundara_proto::wire::WireMessage as _;
    Batch::decode(&pb::Signed::decode(value).ok()?.payload).ok()
}

/// Key of another validator's page, which is never served: a root that it took from us must not lead to ours.
pub(crate) fn foreign_key(author: &[u8], root: &Digest) -> Vec<u8> {
    [author, root.as_ref()].concat()
}

/// Puts a page into `batch` under its root, or a [`foreign_key`]: its epoch, then itself.
pub(crate) fn put(batch: &mut WriteBatch, key: impl Into<Bytes>, epoch: u64, page: &pb::Page) {
    let mut value = epoch.to_be_bytes().to_vec();
    value.extend(page.encode_to_vec());
    batch.put(Keyspace::Pages, key, value);
}

/// A page and its epoch.
///
/// # Errors
/// When the store cannot be read.
pub(crate) fn get(store: &dyn Store, key: &[u8]) -> Result<Option<(u64, pb::Page)>, StoreError> {
    let Some(value) = store.get(Keyspace::Pages, key)? else { return Ok(None) };
    let Some((epoch, page)) = value.split_first_chunk::<8>() else { return Ok(None) };
    Ok(pb::Page::decode(page).ok().map(|page| (u64::from_be_bytes(*epoch), page)))
}
