//! What is held, in memory: the truth between two scans of the directory.
//!
//! Pure bookkeeping under one short lock; files are touched by the callers. **Invariant:** `used` is the sum of the disk
//! bytes of all entries and reservations, with partial blobs counted at their full length, so a fetch that began cannot run
//! out of room.

use std::collections::HashMap;

use sundara_proto::blob::GroupRanges;
use sundara_proto::id::BlobId;
use sundara_proto::units::{ByteCount, UnixMillis};

use super::access::Access;
use super::error::BlobError;
use super::layout::{Meta, Stamp};
use super::tree::Shape;

/// Room made at once beyond what is needed, as a fraction of the cap: evicting sorts, so not for every blob.
const SLACK_DIVISOR: u64 = 50;

/// Groups whose bytes this process has hashed, and the file state in which it did.
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub(crate) stamp: Stamp,
    pub(crate) groups: GroupRanges,
    pub(crate) since: UnixMillis,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) shape: Shape,
    pub(crate) access: Access,
    pub(crate) pinned: bool,
    pub(crate) refs: u32,
    /// Running users in this process; nothing evicts it meanwhile.
    pub(crate) holds: u32,
    /// `None`: complete. Otherwise the groups held.
    pub(crate) partial: Option<GroupRanges>,
    /// A fetch writes to it.
    pub(crate) writing: bool,
    pub(crate) last_used: UnixMillis,
    /// Last use as noted on disk.
    pub(crate) noted_used: UnixMillis,
    pub(crate) checked: Option<Checked>,
}

impl Entry {
    pub(crate) fn new(shape: Shape, meta: Meta, partial: Option<GroupRanges>, last_used: UnixMillis) -> Self {
        Self {
            shape,
            access: meta.access,
            pinned: meta.pinned,
            refs: meta.refs,
            holds: 0,
            partial,
            writing: false,
            last_used,
            noted_used: last_used,
            checked: None,
        }
    }

    pub(crate) fn meta(&self) -> Meta {
        let mut meta = Meta::new(self.shape.len(), self.access.clone(), self.refs);
        meta.pinned = self.pinned;
        meta
    }

    pub(crate) fn held(&self) -> GroupRanges {
        self.partial.clone().unwrap_or_else(|| GroupRanges::all(self.shape.len()))
    }

    pub(crate) fn evictable(&self) -> bool {
        self.access.is_public() && !self.pinned && self.holds == 0 && !self.writing
    }
}

#[derive(Debug, Default)]
pub(crate) struct Index {
    entries: HashMap<BlobId, Entry>,
    used: u64,
    reserved: u64,
}

impl Index {
    pub(crate) fn get(&self, id: &BlobId) -> Option<&Entry> {
        self.entries.get(id)
    }

    pub(crate) fn get_mut(&mut self, id: &BlobId) -> Option<&mut Entry> {
        self.entries.get_mut(id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    pub(crate) fn insert(&mut self, entry: Entry) {
        let add = entry.shape.disk_len();
        if let Some(old) = self.entries.insert(entry.shape.id(), entry) {
            self.used = self.used.saturating_sub(old.shape.disk_len());
        }
        self.used = self.used.saturating_add(add);
    }

    pub(crate) fn remove(&mut self, id: &BlobId) -> Option<Entry> {
        let entry = self.entries.remove(id)?;
        self.used = self.used.saturating_sub(entry.shape.disk_len());
        Some(entry)
    }

    /// Bytes on disk, those promised to writers included.
    pub(crate) fn used(&self) -> u64 {
        self.used.saturating_add(self.reserved)
    }

    /// Promises `bytes` to a writer. Returns the blobs that must go for it: they are out of the index already, and the
    /// caller unlinks their files.
    pub(crate) fn reserve(&mut self, bytes: u64, max: u64) -> Result<Vec<BlobId>, BlobError> {
        let mut victims = Vec::new();
        if self.used().saturating_add(bytes) > max {
            let evictable = self.entries.values().filter(|e| e.evictable()).map(|e| e.shape.disk_len()).sum::<u64>();
            let fixed = self.used().saturating_sub(evictable);
            if fixed.saturating_add(bytes) > max {
                return Err(BlobError::NoSpace {
                    needed: ByteCount(bytes),
                    used: ByteCount(fixed),
                    max: ByteCount(max),
                });
            }
            victims = self.evict_to(max.saturating_sub(bytes).saturating_sub(max / SLACK_DIVISOR));
        }
        self.reserved = self.reserved.saturating_add(bytes);
        Ok(victims)
    }

    /// Ends a promise, kept or not.
    pub(crate) fn release(&mut self, bytes: u64) {
        self.reserved = self.reserved.saturating_sub(bytes);
    }

    /// Takes out the least recently used blobs that may go, until at most `target` bytes are used.
    pub(crate) fn evict_to(&mut self, target: u64) -> Vec<BlobId> {
        let mut candidates: Vec<_> =
            self.entries.values().filter(|e| e.evictable()).map(|e| (e.last_used, e.shape.id())).collect();
        candidates.sort_unstable();
        let mut victims = Vec::new();
        for (_, id) in candidates {
            if self.used() <= target {
                break;
            }
            self.remove(&id);
            victims.push(id);
        }
        victims
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(n: u8, len: u64, access: Access, used: u64) -> Entry {
        let len = ByteCount(len);
        Entry::new(Shape::new(BlobId([n; 32]), len), Meta::new(len, access, 1), None, UnixMillis(used))
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let mut index = Index::default();
        for (n, used) in [(1, 30), (2, 10), (3, 20)] {
            index.insert(entry(n, 1000, Access::Public, used));
        }
        let gone = index.reserve(1500, 3000).unwrap();
        assert_eq!(gone, [BlobId([2; 32]), BlobId([3; 32])]);
        assert_eq!(index.used(), 2500);
        index.release(1500);
        assert_eq!(index.used(), 1000);
    }

    #[test]
    fn pinned_private_and_held_blobs_stay() {
        let mut index = Index::default();
        index.insert(entry(1, 1000, Access::local(), 1));
        index.insert(entry(2, 1000, Access::Public, 2));
        index.insert(entry(3, 1000, Access::Public, 3));
        index.get_mut(&BlobId([2; 32])).unwrap().pinned = true;
        index.get_mut(&BlobId([3; 32])).unwrap().holds = 1;
        let refused = index.reserve(500, 3000).unwrap_err();
        assert!(refused.to_string().contains("blobs.max_bytes"), "{refused}");
        assert_eq!(index.iter().count(), 3, "a refusal evicts nothing");
        index.get_mut(&BlobId([3; 32])).unwrap().holds = 0;
        assert_eq!(index.reserve(500, 3000).unwrap(), [BlobId([3; 32])]);
    }

    proptest! {
        #[test]
        fn the_cap_holds_and_the_sum_is_right(
            max in 1_000_u64..9_000, blobs in prop::collection::vec((1_u64..4_000, any::<bool>(), any::<bool>()), 0..30),
        ) {
            let mut index = Index::default();
            for (n, (len, public, pinned)) in blobs.into_iter().enumerate() {
                let access = if public { Access::Public } else { Access::local() };
                let mut e = entry(n as u8, len, access, n as u64);
                e.pinned = pinned;
                let size = e.shape.disk_len();
                if index.reserve(size, max).is_ok() {
                    index.release(size);
                    index.insert(e);
                }
                prop_assert!(index.used() <= max);
                prop_assert_eq!(index.used(), index.iter().map(|e| e.shape.disk_len()).sum::<u64>());
            }
        }
    }
}
