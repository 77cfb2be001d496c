//! Ranges of keys and pages of records.

use std::ops::Bound;

use bytes::Bytes;

/// A range of keys within one keyspace, and the direction to walk it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRange {
    start: Bound<Bytes>,
    end: Bound<Bytes>,
    reversed: bool,
}

impl KeyRange {
    /// Every key.
    #[must_use]
    pub fn all() -> Self {
        Self { start: Bound::Unbounded, end: Bound::Unbounded, reversed: false }
    }

    /// Every key that begins with `prefix`.
    #[must_use]
    pub fn prefix(prefix: &[u8]) -> Self {
        let end = successor(prefix).map_or(Bound::Unbounded, |end| Bound::Excluded(Bytes::from(end)));
        Self { start: Bound::Included(Bytes::copy_from_slice(prefix)), end, reversed: false }
    }

    /// The same range without keys below `start`.
    #[must_use]
    pub fn from(mut self, start: &[u8]) -> Self {
        self.start = Bound::Included(Bytes::copy_from_slice(start));
        self
    }

    /// The same range without `key` and the keys below it.
    #[must_use]
    pub fn after(mut self, key: &[u8]) -> Self {
        self.start = Bound::Excluded(Bytes::copy_from_slice(key));
        self
    }

    /// The same range without `end` and the keys above it.
    #[must_use]
    pub fn until(mut self, end: &[u8]) -> Self {
        self.end = Bound::Excluded(Bytes::copy_from_slice(end));
        self
    }

    /// The same range, walked from its last key to its first.
    #[must_use]
    pub fn reversed(mut self) -> Self {
        self.reversed = !self.reversed;
        self
    }

    /// Whether the range is walked from its last key to its first.
    #[must_use]
    pub fn is_reversed(&self) -> bool {
        self.reversed
    }

    /// Whether no key can lie in the range.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match (&self.start, &self.end) {
            (Bound::Unbounded, Bound::Excluded(end)) => end.is_empty(),
            (Bound::Included(start), Bound::Included(end)) => start > end,
            (Bound::Included(start) | Bound::Excluded(start), Bound::Included(end) | Bound::Excluded(end)) => {
                start >= end
            }
            _ => false,
        }
    }

    /// The bounds, for implementations.
    #[must_use]
    pub fn bounds(&self) -> (Bound<&[u8]>, Bound<&[u8]>) {
        (self.start.as_ref().map(|key| &key[..]), self.end.as_ref().map(|key| &key[..]))
    }

    /// What remains of the range once the walk has passed `key`.
    #[must_use]
    pub fn beyond(&self, key: &[u8]) -> Self {
        let rest = self.clone();
        if self.reversed { rest.until(key) } else { rest.after(key) }
    }
}

/// The smallest key above every key that begins with `prefix`; `None` if there is none.
pub(super) fn successor(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|&byte| byte != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

/// Records of one scan, in the order of its range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Keys and values.
    pub items: Vec<(Bytes, Bytes)>,
    /// What remains to be scanned; `None` when the range is exhausted.
    pub next: Option<KeyRange>,
}

#[cfg(test)]
mod tests {
    use super::{KeyRange, successor};

    #[test]
    fn successor_bounds_a_prefix() {
        assert_eq!(successor(b"ab"), Some(b"ac".to_vec()));
        assert_eq!(successor(&[1, 255, 255]), Some(vec![2]));
        assert_eq!(successor(&[255]), None);
        assert_eq!(successor(b""), None);
    }

    #[test]
    fn empty_ranges_are_known() {
        assert!(KeyRange::all().from(b"b").until(b"b").is_empty());
        assert!(KeyRange::all().after(b"b").until(b"b").is_empty());
        assert!(KeyRange::all().from(b"c").until(b"b").is_empty());
        assert!(KeyRange::all().until(b"").is_empty());
        assert!(!KeyRange::prefix(b"b").is_empty());
        assert!(!KeyRange::all().is_empty());
    }
}
