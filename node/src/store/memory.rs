//! A store that keeps everything in memory and nothing beyond the process: for tests and short-lived light nodes.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use super::{
    Commit, KeyRange, Keyspace, MAX_SCAN_BYTES, MAX_SCAN_RECORDS, Page, Pending, Store, StoreError, StoreStatus,
    WriteBatch,
};

/// A [`Store`] in memory. "Durable" means here: until the process ends. Bounded only by what its users delete.
#[derive(Debug, Default)]
pub struct MemoryStore {
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    records: BTreeMap<Keyspace, BTreeMap<Bytes, Bytes>>,
    status: StoreStatus,
    closed: bool,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    // A panic while the lock was held cannot have left half a batch: applying one cannot panic.
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn apply(&mut self, batch: WriteBatch) -> Result<Commit, StoreError> {
        if self.closed {
            return Err(StoreError::Closed);
        }
        batch.check()?;
        if batch.is_empty() {
            return Ok(Commit { seq: self.status.applied_seq });
        }
        for op in batch.ops() {
            let records = self.records.entry(op.keyspace).or_default();
            let old = match &op.value {
                Some(value) => {
                    self.status.records += 1;
                    self.status.live_bytes += (op.key.len() + value.len()) as u64;
                    records.insert(op.key.clone(), value.clone())
                }
                None => records.remove(&op.key),
            };
            if let Some(old) = old {
                self.status.records -= 1;
                self.status.live_bytes -= (op.key.len() + old.len()) as u64;
            }
        }
        self.status.applied_seq += 1;
        self.status.durable_seq = self.status.applied_seq;
        Ok(Commit { seq: self.status.applied_seq })
    }
}

impl Store for MemoryStore {
    fn get(&self, keyspace: Keyspace, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(self.read().records.get(&keyspace).and_then(|records| records.get(key)).cloned())
    }

    fn scan(&self, keyspace: Keyspace, range: &KeyRange, limit: usize) -> Result<Page, StoreError> {
        let state = self.read();
        let Some(records) = state.records.get(&keyspace).filter(|_| !range.is_empty()) else {
            return Ok(Page::default());
        };
        let forward = records.range::<[u8], _>(range.bounds()).map(|(key, value)| Ok((key.clone(), value.clone())));
        if range.is_reversed() { page(forward.rev(), range, limit) } else { page(forward, range, limit) }
    }

    fn commit(&self, batch: WriteBatch) -> Pending {
        Pending::done(self.write().apply(batch))
    }

    fn commit_relaxed(&self, batch: WriteBatch) -> Pending {
        self.commit(batch)
    }

    fn close(&self) -> Pending {
        let mut state = self.write();
        state.closed = true;
        Pending::done(Ok(Commit { seq: state.status.applied_seq }))
    }

    fn status(&self) -> StoreStatus {
        self.read().status.clone()
    }
}

/// Collects records into a page within the limits of a scan.
pub(super) fn page(
    records: impl Iterator<Item = Result<(Bytes, Bytes), StoreError>>,
    range: &KeyRange,
    limit: usize,
) -> Result<Page, StoreError> {
    let limit = limit.min(MAX_SCAN_RECORDS);
    let mut page = Page::default();
    let mut bytes = 0;
    for record in records {
        let (key, value) = record?;
        bytes += key.len() + value.len();
        let full = page.items.len() >= limit || (bytes > MAX_SCAN_BYTES && !page.items.is_empty());
        if full {
            let rest = page.items.last().map_or_else(|| range.clone(), |(last, _)| range.beyond(last));
            page.next = Some(rest);
            break;
        }
        page.items.push((key, value));
    }
    Ok(page)
}
