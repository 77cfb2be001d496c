//! Root over the entries of a batch.
//!
//! Leaves and inner nodes have contexts of their own, so no entry can pass for a node. A level of odd length lifts its
//! last node unchanged; the count in the signed batch fixes the shape.

use crate::crypto::Context;
use crate::id::Digest;

/// Root of `entries`, encoded; `None` when there are none.
pub fn root<'a>(entries: impl IntoIterator<Item = &'a [u8]>) -> Option<Digest> {
    let mut level: Vec<Digest> = entries.into_iter().map(|entry| Context::BATCH_LEAF.digest_one(entry)).collect();
    while level.len() > 1 {
        level = level
            .chunks(2)
            .map(|pair| match pair {
                [left, right] => Context::BATCH_NODE.digest(&[left.as_ref(), right.as_ref()]),
                [single] => *single,
                _ => unreachable!("chunks of two"),
            })
            .collect();
    }
    level.pop()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_and_its_place_count() {
        let base: Vec<&[u8]> = vec![b"a", b"b", b"c", b"d", b"e"];
        let whole = root(base.iter().copied()).unwrap();
        for i in 0..base.len() {
            let mut changed = base.clone();
            changed[i] = b"x";
            assert_ne!(root(changed.iter().copied()).unwrap(), whole);
            let mut swapped = base.clone();
            swapped.swap(i, (i + 1) % base.len());
            assert_ne!(root(swapped.iter().copied()).unwrap(), whole);
        }
        assert_eq!(root(std::iter::empty()), None);
    }
}
