//! Keep-limits: deleting what is old in bounded steps, and keys that sort by time.

use bytes::Bytes;

use super::{KeyRange, Keyspace, Store, StoreError, WriteBatch};

/// Records looked at in one step of retention: short enough to share the store with jobs, long enough to get on.
const STEP_RECORDS: usize = 512;

/// What one step of retention did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RetainStep {
    /// Records looked at.
    pub scanned: u64,
    /// Records deleted.
    pub deleted: u64,
    /// Where to go on; `None` when the range is done.
    pub next: Option<KeyRange>,
}

/// Looks at the next records of `range` (512 at most) and deletes those that `keep` does not want.
///
/// One step is one batch; a service calls it again with [`RetainStep::next`] when it has time, so that a long
/// clean-up never holds up a job. Dropping the future may leave the step's deletions done or not, never half done.
///
/// # Errors
/// As [`Store::scan`] and [`Store::commit`].
pub async fn retain_step(
    store: &dyn Store,
    keyspace: Keyspace,
    range: &KeyRange,
    mut keep: impl FnMut(&[u8], &[u8]) -> bool,
) -> Result<RetainStep, StoreError> {
    let page = store.scan(keyspace, range, STEP_RECORDS)?;
    let mut step = RetainStep { scanned: page.items.len() as u64, deleted: 0, next: page.next };
    let mut batch = WriteBatch::new();
    for (key, value) in page.items {
        if !keep(&key, &value) {
            step.deleted += 1;
            batch.delete(keyspace, key);
        }
    }
    if !batch.is_empty() {
        store.commit(batch).await?;
    }
    Ok(step)
}

/// Deletes every record of `range` in bounded steps, at most `limit` records, and says how many went. Cancel-safe:
/// a dropped call has deleted a part of the range.
///
/// # Errors
/// As [`retain_step`].
pub async fn delete_range(
    store: &dyn Store,
    keyspace: Keyspace,
    range: &KeyRange,
    limit: u64,
) -> Result<u64, StoreError> {
    let mut deleted = 0;
    let mut rest = Some(range.clone());
    while let Some(range) = rest.take().filter(|_| deleted < limit) {
        let mut left = limit - deleted;
        let step = retain_step(store, keyspace, &range, |_, _| {
            let keep = left == 0;
            left = left.saturating_sub(1);
            keep
        })
        .await?;
        deleted += step.deleted;
        rest = step.next;
    }
    Ok(deleted)
}

/// A key that sorts by time, then by id: the milliseconds big-endian, then `id`. What is older than `t` is
/// `KeyRange::all().until(&time_key(t, b""))`.
#[must_use]
pub fn time_key(unix_ms: u64, id: &[u8]) -> Bytes {
    let mut key = Vec::with_capacity(8 + id.len());
    key.extend_from_slice(&unix_ms.to_be_bytes());
    key.extend_from_slice(id);
    key.into()
}

/// The time of a [`time_key`], or `None` if it is too short to be one.
#[must_use]
pub fn time_key_unix_ms(key: &[u8]) -> Option<u64> {
    key.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

/// The id of a [`time_key`]; empty if it is too short to be one.
#[must_use]
pub fn time_key_id(key: &[u8]) -> &[u8] {
    key.get(8..).unwrap_or_default()
}
