//! Miners of one engine and class, in the order in which they are asked.

use std::collections::{BTreeSet, HashMap};

use sundara_proto::id::Hotkey;

use crate::domain::Owner;

/// Place of a miner's class in a pool: price, load, draw, then who.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    pub(super) price: u64,
    pub(super) load: u32,
    pub(super) tie: u64,
    pub(super) miner: Hotkey,
    pub(super) class: u8,
}

/// Free slots in order, and who could ever have one here.
#[derive(Debug, Default)]
pub(super) struct Pool {
    pub(super) free: BTreeSet<Rank>,
    owners: HashMap<Owner, u32>,
}

impl Pool {
    pub(super) fn count_owner(&mut self, owner: Owner) {
        *self.owners.entry(owner).or_default() += 1;
    }
    pub(super) fn uncount_owner(&mut self, owner: Owner) {
        if let Some(count) = self.owners.get_mut(&owner) {
            *count -= 1;
            if *count == 0 {
                self.owners.remove(&owner);
            }
        }
    }
    /// Distinct owners, busy or free.
    pub(super) fn owners(&self) -> usize {
        self.owners.len()
    }
    pub(super) fn is_empty(&self) -> bool {
        self.free.is_empty() && self.owners.is_empty()
    }
}

/// Pools of one engine: all classes together, and each.
#[derive(Debug, Default)]
pub(super) struct EnginePools {
    any: Pool,
    by_class: HashMap<String, Pool>,
}

impl EnginePools {
    /// The pool of a class; empty for any.
    pub(super) fn pool(&self, class: &str) -> Option<&Pool> {
        if class.is_empty() { Some(&self.any) } else { self.by_class.get(class) }
    }

    /// Applies a change to the pools that a class belongs to, and forgets one that it leaves empty.
    pub(super) fn update(&mut self, class: &str, change: impl Fn(&mut Pool)) {
        change(&mut self.any);
        if class.is_empty() {
            return;
        }
        if let Some(pool) = self.by_class.get_mut(class) {
            change(pool);
            if pool.is_empty() {
                self.by_class.remove(class);
            }
        } else {
            let mut pool = Pool::default();
            change(&mut pool);
            if !pool.is_empty() {
                self.by_class.insert(class.to_owned(), pool);
            }
        }
    }
}
