//! Records that are young: durable in the journal, visible, and not yet in sled.
//!
//! Most records of a running node do not live long: an input goes with its verdict, an entry of a page goes with its page,
//! a job's record is written again at each step. To put each of them into sled and take it out again costs several times
//! what the journal does. So the last few thousand writes stay here, the last of each key, and only what is still true
//! once it is old goes into sled.
//!
//! Owns what is young and its bounds. Invariants: what is here hides what sled has under the same key; a record is in one
//! of both at any moment; a checkpoint first makes everything old.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

use bytes::Bytes;

use super::index::{Index, full_key, ranged};
use super::journal::RawOp;
use super::tally::Entry;
use crate::store::{KeyRange, Page, StoreError, memory};

/// Writes that stay young: two seconds of a busy validator's.
const WRITES_MAX: usize = 8_192;
/// Bytes of keys and values that stay young.
const BYTES_MAX: usize = 4 << 20;

#[derive(Debug)]
struct Write {
    /// `None`: deleted.
    value: Option<Bytes>,
    /// Tells it from an earlier life of the same key.
    number: u64,
    /// Whether sled has something under the key.
    hides: bool,
}

/// sled, and what is younger.
#[derive(Debug)]
pub(super) struct Records {
    index: Index,
    young: BTreeMap<Vec<u8>, Write>,
    /// Keys by age. One whose number is another's by now was deleted, and is passed over.
    order: VecDeque<(u64, Vec<u8>)>,
    bytes: usize,
    number: u64,
    writes_max: usize,
}

impl Records {
    pub(super) fn new(index: Index) -> Self {
        Self::with_limit(index, WRITES_MAX)
    }

    fn with_limit(index: Index, writes_max: usize) -> Self {
        let (young, order) = Default::default();
        Self { index, young, order, bytes: 0, number: 0, writes_max }
    }

    /// sled alone: all there is after opening and after a checkpoint.
    pub(super) fn old(&self) -> &Index {
        &self.index
    }

    pub(super) fn get(&self, keyspace: u8, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let full_key = full_key(keyspace, key);
        match self.young.get(&full_key) {
            Some(write) => Ok(write.value.clone()),
            None => self.index.get(&full_key),
        }
    }

    /// The tally's entry of what is held under a full key.
    pub(super) fn entry(&self, full_key: &[u8]) -> Result<Option<Entry>, StoreError> {
        match self.young.get(full_key) {
            Some(write) => Ok(write.value.as_ref().map(|value| Entry::of(full_key, value))),
            None => Ok(self.index.get(full_key)?.map(|value| Entry::of(full_key, &value))),
        }
    }

    pub(super) fn scan(&self, keyspace: u8, range: &KeyRange, limit: usize) -> Result<Page, StoreError> {
        if range.is_empty() {
            return Ok(Page::default());
        }
        let bounds = ranged(keyspace, range);
        let reversed = range.is_reversed();
        let mut old = self.index.range(bounds.clone(), reversed).peekable();
        let young = self.young.range::<Vec<u8>, (Bound<Vec<u8>>, Bound<Vec<u8>>)>(bounds);
        let young: Box<dyn Iterator<Item = (&Vec<u8>, &Write)>> =
            if reversed { Box::new(young.rev()) } else { Box::new(young) };
        let mut young = young.peekable();
        let merged = std::iter::from_fn(move || {
            loop {
                let order = match (old.peek(), young.peek()) {
                    (None, None) => return None,
                    (Some(_), None) | (Some(Err(_)), _) => Ordering::Less,
                    (None, Some(_)) => Ordering::Greater,
                    (Some(Ok((old, _))), Some((young, _))) if reversed => young.as_slice().cmp(old),
                    (Some(Ok((old, _))), Some((young, _))) => old[..].cmp(young.as_slice()),
                };
                if order == Ordering::Less {
                    let record = old.next()?;
                    return Some(record.and_then(|(key, stored)| {
                        Ok((Bytes::copy_from_slice(&key[1..]), self.index.value(&key, &stored)?))
                    }));
                }
                if order == Ordering::Equal {
                    old.next();
                }
                let (key, write) = young.next()?;
                if let Some(value) = &write.value {
                    return Some(Ok((Bytes::copy_from_slice(&key[1..]), value.clone())));
                }
            }
        });
        memory::page(merged, range, limit)
    }

    /// Takes a write. What is too much becomes old, the oldest first.
    pub(super) fn apply(&mut self, op: RawOp<'_>) -> Result<(), StoreError> {
        let full_key = full_key(op.keyspace, op.key);
        let value = op.value.map(Bytes::copy_from_slice);
        let size = |value: &Option<Bytes>| full_key.len() + value.as_ref().map_or(0, Bytes::len);
        self.bytes += size(&value);
        match self.young.get_mut(&full_key) {
            Some(write) => {
                self.bytes -= size(&write.value);
                write.value = value;
                if write.value.is_none() && !write.hides {
                    // It came and went.
                    self.bytes -= full_key.len();
                    self.young.remove(&full_key);
                }
            }
            None => {
                let hides = self.index.has(&full_key)?;
                if value.is_none() && !hides {
                    self.bytes -= full_key.len();
                    return Ok(());
                }
                self.number += 1;
                self.order.push_back((self.number, full_key.clone()));
                self.young.insert(full_key, Write { value, number: self.number, hides });
            }
        }
        while self.order.len() > self.writes_max || self.bytes > BYTES_MAX {
            self.age()?;
        }
        Ok(())
    }

    /// Makes the oldest write old. Whether there was one.
    pub(super) fn age(&mut self) -> Result<bool, StoreError> {
        let Some((number, full_key)) = self.order.pop_front() else { return Ok(false) };
        if let Some(write) = self.young.get(&full_key).filter(|write| write.number == number) {
            self.index.put(&full_key, write.value.as_deref())?;
            self.bytes -= full_key.len() + write.value.as_ref().map_or(0, Bytes::len);
            self.young.remove(&full_key);
        }
        Ok(true)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn records(dir: &std::path::Path, writes_max: usize) -> Records {
        Records::with_limit(Index::open(dir, 1 << 20, true).unwrap(), writes_max)
    }

    fn all(records: &Records, range: &KeyRange) -> Vec<(Bytes, Bytes)> {
        records.scan(1, range, 1_000).unwrap().items
    }

    #[test]
    fn what_came_and_went_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut records = records(dir.path(), 100);
        for n in 0..10_000_u32 {
            let key = n.to_be_bytes();
            records.apply(RawOp { keyspace: 1, key: &key, value: Some(&[7; 100]) }).unwrap();
            records.apply(RawOp { keyspace: 1, key: &key, value: None }).unwrap();
        }
        assert!(records.young.is_empty() && records.order.len() <= 100 && records.bytes == 0);
        assert!(records.index.range((Bound::Unbounded, Bound::Unbounded), false).next().is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn young_and_old_are_read_as_one(
            writes in proptest::collection::vec((0_u8..24, proptest::option::of(0_usize..6_000)), 1..120),
            writes_max in 0_usize..40,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut records = records(dir.path(), writes_max);
            let mut model = BTreeMap::new();
            for (key, len) in writes {
                let value = len.map(|len| Bytes::from(vec![key; len]));
                records.apply(RawOp { keyspace: 1, key: &[key], value: value.as_deref() }).unwrap();
                match value {
                    Some(value) => drop(model.insert(Bytes::copy_from_slice(&[key]), value)),
                    None => drop(model.remove(&[key][..])),
                }
                prop_assert_eq!(records.get(1, &[key]).unwrap(), model.get(&[key][..]).cloned());
                let range = KeyRange::all().from(&[5]).until(&[20]);
                let part: Vec<_> = model.range::<[u8], _>(range.bounds()).map(|(k, v)| (k.clone(), v.clone())).collect();
                prop_assert_eq!(&all(&records, &range), &part);
                let backwards: Vec<_> = part.into_iter().rev().collect();
                prop_assert_eq!(all(&records, &range.reversed()), backwards);
            }
            while records.age().unwrap() {}
            prop_assert!(records.young.is_empty() && records.bytes == 0);
            let whole: Vec<_> = model.into_iter().collect();
            prop_assert_eq!(all(&records, &KeyRange::all()), whole);
        }
    }
}
