//! Roots of chunks, and openings of their groups.
//!
//! A chunk's root is the plain BLAKE3 hash of its words. BLAKE3 is a tree, so part of the words can be shown to belong to a
//! root: an [`Opening`] holds the words of a group, rounded out to 16 KiB, and the chaining values of the subtrees beside
//! the path from there to the root. It says what a bao slice says, with one value a level instead of two.

use blake3::hazmat::{self, ChainingValue, HasherExt, Mode};
use bytes::Bytes;

use super::layout::GROUP;
use crate::id::Digest;
use crate::pb;
use crate::wire::{WireError, limit, required};

/// Bytes that a leaf of an opening covers: a group of i32 words.
pub const LEAF: usize = 16 << 10;

/// Longest data of an opening: a group of 8-byte words.
const DATA_MAX: usize = GROUP * 8;
/// Levels above the leaves of the longest chunk, 8 MiB, are 9; two leaves at the edge of subtrees need both their paths.
const SIBLINGS_MAX: usize = 2 * 9;

/// Hashes a chunk's words as they come, so that each piece is hashed while it is in the cache.
///
/// ```
/// # use sundara_proto::rules::round::tree::ChunkHasher;
/// let mut hasher = ChunkHasher::new();
/// hasher.update(b"some ");
/// hasher.update(b"words");
/// assert_eq!(hasher.finish().root().0, *blake3::hash(b"some words").as_bytes());
/// ```
#[derive(Clone, Debug, Default)]
pub struct ChunkHasher {
    /// Less than a leaf that is not hashed yet, or one whole leaf that may be the last.
    rest: Vec<u8>,
    leaves: Vec<ChainingValue>,
    len: u64,
}

impl ChunkHasher {
    /// Of no words yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes. Pieces of a multiple of 16 KiB are hashed where they are, others are copied first.
    pub fn update(&mut self, mut piece: &[u8]) {
        self.len += piece.len() as u64;
        if !self.rest.is_empty() {
            let missing = (LEAF - self.rest.len()).min(piece.len());
            self.rest.extend_from_slice(&piece[..missing]);
            piece = &piece[missing..];
            if self.rest.len() == LEAF && !piece.is_empty() {
                let rest = std::mem::take(&mut self.rest);
                self.leaf(&rest);
                self.rest = rest;
                self.rest.clear();
            }
        }
        while piece.len() >= LEAF {
            let (leaf, others) = piece.split_at(LEAF);
            // A chunk of one leaf has no chaining value, so the first leaf waits for a second.
            if self.leaves.is_empty() && others.is_empty() {
                break;
            }
            self.leaf(leaf);
            piece = others;
        }
        self.rest.extend_from_slice(piece);
    }

    fn leaf(&mut self, bytes: &[u8]) {
        let at = self.leaves.len() as u64 * LEAF as u64;
        self.leaves.push(leaf_value(bytes, at));
    }

    /// Bytes so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing came yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The tree of all that came.
    pub fn finish(mut self) -> ChunkTree {
        if self.leaves.is_empty() {
            return ChunkTree { root: Digest(*blake3::hash(&self.rest).as_bytes()), leaves: Vec::new() };
        }
        if !self.rest.is_empty() {
            let rest = std::mem::take(&mut self.rest);
            self.leaf(&rest);
        }
        // What came was exactly one leaf after another: the root needs two at least, and has them, since the first one
        // was hashed only once there was more.
        let root = root_of(&self.leaves);
        ChunkTree { root, leaves: self.leaves }
    }
}

/// A chunk's root and what its openings are made of: 32 bytes for each 16 KiB of words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkTree {
    root: Digest,
    leaves: Vec<ChainingValue>,
}

impl ChunkTree {
    /// Of words that are all there.
    pub fn of(words: &[u8]) -> Self {
        let mut hasher = ChunkHasher::new();
        hasher.update(words);
        hasher.finish()
    }

    /// BLAKE3 of the words.
    pub fn root(&self) -> Digest {
        self.root
    }

    /// Opens a group of words of `word_len` bytes. `words` are those that the tree is of. `None` when there is no such
    /// group, or when the words have another length.
    pub fn open(&self, words: &[u8], group: usize, word_len: usize) -> Option<Opening> {
        let span = Span::of(words.len(), group, word_len)?;
        let leaves = words.len().div_ceil(LEAF);
        if !(leaves == self.leaves.len() || leaves == 1 && self.leaves.is_empty()) {
            return None;
        }
        let mut siblings = Vec::new();
        collect(&self.leaves, 0..leaves, &span.leaves, &mut siblings);
        Some(Opening { data: Bytes::copy_from_slice(&words[span.bytes()]), siblings })
    }
}

/// Opens a group of a chunk's words: hashes them all, where [`ChunkTree::open`] hashes none.
pub fn open(words: &[u8], group: usize, word_len: usize) -> Option<Opening> {
    ChunkTree::of(words).open(words, group, word_len)
}

/// Words of a group, and what proves that they are of a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// The leaves that the group touches, at most 32 KiB.
    data: Bytes,
    /// Chaining values of the largest subtrees that the group does not touch, from left to right.
    siblings: Vec<ChainingValue>,
}

impl Opening {
    /// The words of `group` in a chunk of `len` bytes, words of `word_len` bytes, under `root`. `None` when they are not.
    pub fn verify(&self, root: &Digest, len: u64, group: usize, word_len: usize) -> Option<&[u8]> {
        let span = Span::of(usize::try_from(len).ok()?, group, word_len)?;
        let bytes = span.bytes();
        if self.data.len() != bytes.len() {
            return None;
        }
        let leaves = span.len.div_ceil(LEAF);
        let mut path = Path { span: &span, data: &self.data, siblings: self.siblings.iter() };
        let computed = if leaves == 1 {
            *blake3::hash(&self.data).as_bytes()
        } else {
            let (left, right) = path.children(0..leaves)?;
            *hazmat::merge_subtrees_root(&left, &right, Mode::Hash).as_bytes()
        };
        let proven = path.siblings.next().is_none() && computed == root.0;
        let start = span.words.start - bytes.start;
        proven.then(|| &self.data[start..start + span.words.len()])
    }

    /// Bytes of it all.
    pub fn size(&self) -> usize {
        self.data.len() + self.siblings.len() * 32
    }

    /// From the wire. Proves nothing: see [`Self::verify`].
    pub fn from_raw(raw: Option<pb::Opening>) -> Result<Self, WireError> {
        let raw = required(raw, "opening")?;
        let (siblings, rest) = raw.siblings.as_chunks::<32>();
        if raw.data.len() > DATA_MAX || !rest.is_empty() || siblings.len() > SIBLINGS_MAX {
            return Err(WireError::field("opening"));
        }
        Ok(Self { siblings: siblings.to_vec(), data: raw.data })
    }

    /// As sent.
    pub fn to_raw(&self) -> pb::Opening {
        pb::Opening { data: self.data.clone(), siblings: self.siblings.concat().into() }
    }
}

/// Where a group is in a chunk.
struct Span {
    /// Bytes of the chunk.
    len: usize,
    /// Bytes of the group.
    words: std::ops::Range<usize>,
    /// Leaves that these touch.
    leaves: std::ops::Range<usize>,
}

impl Span {
    fn of(len: usize, group: usize, word_len: usize) -> Option<Self> {
        let whole = GROUP * word_len;
        if group >= limit::CHUNK_GROUPS || !matches!(word_len, 1 | 2 | 4 | 8) || !len.is_multiple_of(word_len) {
            return None;
        }
        let words = group * whole..((group + 1) * whole).min(len);
        let leaves = words.start / LEAF..words.end.div_ceil(LEAF);
        (words.start < words.end && len <= limit::CHUNK_GROUPS * GROUP * 8).then_some(Self { len, words, leaves })
    }

    /// Bytes of the leaves.
    fn bytes(&self) -> std::ops::Range<usize> {
        self.leaves.start * LEAF..(self.leaves.end * LEAF).min(self.len)
    }
}

/// A walk from the root down to the leaves of an opening.
struct Path<'a> {
    span: &'a Span,
    data: &'a [u8],
    siblings: std::slice::Iter<'a, ChainingValue>,
}

impl Path<'_> {
    fn children(&mut self, node: std::ops::Range<usize>) -> Option<(ChainingValue, ChainingValue)> {
        let middle = node.start + left_leaves(node.len());
        Some((self.value(node.start..middle)?, self.value(middle..node.end)?))
    }

    fn value(&mut self, node: std::ops::Range<usize>) -> Option<ChainingValue> {
        if node.end <= self.span.leaves.start || self.span.leaves.end <= node.start {
            return self.siblings.next().copied();
        }
        if node.len() == 1 {
            let start = (node.start - self.span.leaves.start) * LEAF;
            let leaf = &self.data[start..(start + LEAF).min(self.data.len())];
            return Some(leaf_value(leaf, node.start as u64 * LEAF as u64));
        }
        let (left, right) = self.children(node)?;
        Some(hazmat::merge_subtrees_non_root(&left, &right, Mode::Hash))
    }
}

/// Values of the largest subtrees of `node` that `wanted` does not touch, from left to right.
fn collect(
    leaves: &[ChainingValue],
    node: std::ops::Range<usize>,
    wanted: &std::ops::Range<usize>,
    out: &mut Vec<ChainingValue>,
) {
    if node.end <= wanted.start || wanted.end <= node.start {
        out.push(subtree(&leaves[node]));
    } else if node.len() > 1 {
        let middle = node.start + left_leaves(node.len());
        collect(leaves, node.start..middle, wanted, out);
        collect(leaves, middle..node.end, wanted, out);
    }
}

/// Leaves of the left child: the largest power of two that leaves some for the right.
fn left_leaves(leaves: usize) -> usize {
    leaves.next_power_of_two() / 2
}

fn leaf_value(bytes: &[u8], at: u64) -> ChainingValue {
    blake3::Hasher::new().set_input_offset(at).update(bytes).finalize_non_root()
}

/// Chaining value over leaves that are not all of a chunk; at least one.
fn subtree(leaves: &[ChainingValue]) -> ChainingValue {
    match leaves {
        [leaf] => *leaf,
        _ => {
            let (left, right) = leaves.split_at(left_leaves(leaves.len()));
            hazmat::merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

/// Root over the leaves of a chunk, at least two.
fn root_of(leaves: &[ChainingValue]) -> Digest {
    let (left, right) = leaves.split_at(left_leaves(leaves.len()));
    Digest(*hazmat::merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash).as_bytes())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_root_is_the_hash_however_the_words_came(
            len in prop_oneof![0_usize..200_000, (0_usize..12).prop_map(|n| n * LEAF)],
            cuts in prop::collection::vec(prop_oneof![1_usize..40_000, Just(LEAF), Just(4 * LEAF)], 1..9),
        ) {
            let words = words(len);
            let (mut hasher, mut rest, mut cuts) = (ChunkHasher::new(), &words[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, others) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                hasher.update(piece);
                rest = others;
            }
            prop_assert_eq!(hasher.len(), len as u64);
            prop_assert_eq!(hasher.finish().root().0, *blake3::hash(&words).as_bytes());
        }

        #[test]
        fn every_group_opens_and_nothing_else_does(
            groups in 1_usize..20, short in 0_usize..GROUP, shift in 0_usize..4, damage in any::<prop::sample::Index>(),
        ) {
            let word_len = 1 << shift;
            let len = (groups * GROUP - short) * word_len;
            let words = words(len);
            let tree = ChunkTree::of(&words);
            for group in 0..groups {
                let opening = tree.open(&words, group, word_len).unwrap();
                let at = group * GROUP * word_len;
                let wanted = &words[at..(at + GROUP * word_len).min(len)];
                prop_assert!(opening.verify(&tree.root(), len as u64, group, word_len) == Some(wanted));
                prop_assert_eq!(&Opening::from_raw(Some(opening.to_raw())).unwrap(), &opening);
                // Another place, another root, any changed byte.
                let other = (group + 1) % groups;
                if wanted != opening.verify(&tree.root(), len as u64, other, word_len).unwrap_or(wanted) {
                    prop_assert!(word_len < 4, "one leaf may hold several groups of short words");
                }
                prop_assert!(opening.verify(&Digest([7; 32]), len as u64, group, word_len).is_none());
                let mut bad = opening.clone();
                let mut data = bad.data.to_vec();
                let place = damage.index(data.len());
                data[place] ^= 1;
                bad.data = data.into();
                prop_assert!(bad.verify(&tree.root(), len as u64, group, word_len).is_none());
                let mut bad = opening;
                bad.siblings.push([0; 32]);
                prop_assert!(bad.verify(&tree.root(), len as u64, group, word_len).is_none());
            }
            prop_assert!(tree.open(&words, groups, word_len).is_none());
        }
    }
}
