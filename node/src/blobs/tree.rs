//! The bao tree of a blob: which bytes an encoding has, whether they are right, and where they belong in the files.
//!
//! **Owns** the walk over the tree (bao-tree gives its geometry) and every hash comparison of this store. Nothing becomes
//! part of a stored blob without passing [`verify`]; nothing leaves it without the same comparisons in `read`.
//!
//! **Does not own** files or sockets: works on memory, readers and closures.
//!
//! Outboards are in post order: an import writes one front to back, and the hashes of an aligned range of groups lie
//! side by side.

use std::io::{self, Read, Write};
use std::ops::Range;

use bao_tree::blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use bao_tree::iter::{BaoChunk, ResponseIter};
use bao_tree::{BaoTree, BlockSize, ChunkNum, ChunkRanges, TreeNode};
use sundara_proto::blob::{GROUP_LEN, GroupRanges, group_count};
use sundara_proto::id::BlobId;
use sundara_proto::units::ByteCount;

/// log2 of the BLAKE3 chunks in a group.
const GROUP_CHUNK_LOG: u8 = 4;
const CHUNKS_PER_GROUP: u64 = 1 << GROUP_CHUNK_LOG;
const _: () = assert!(GROUP_LEN == CHUNKS_PER_GROUP * 1024);

/// Bytes of a parent: two hashes.
pub(crate) const PAIR_LEN: usize = 64;

/// A pair of child hashes.
pub(crate) type Pair = [u8; PAIR_LEN];

/// One step of an encoding.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// Two hashes.
    Parent {
        /// Where the pair lies in the outboard, in bytes.
        at: u64,
        /// Groups below it: their number tells near from far ones.
        span: (u64, u64),
        is_root: bool,
        left: bool,
        right: bool,
    },
    /// One group's bytes.
    Leaf { group: u64, len: usize, is_root: bool },
}

/// Id and length of a blob: together they fix its tree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    root: [u8; 32],
    tree: BaoTree,
}

impl Shape {
    pub(crate) fn new(id: BlobId, len: ByteCount) -> Self {
        Self { root: id.0, tree: BaoTree::new(len.0, BlockSize::from_chunk_log(GROUP_CHUNK_LOG)) }
    }

    pub(crate) fn id(&self) -> BlobId {
        BlobId(self.root)
    }

    pub(crate) fn len(&self) -> ByteCount {
        ByteCount(self.tree.size())
    }

    pub(crate) fn groups(&self) -> u64 {
        group_count(self.len())
    }

    /// Bytes of the outboard; 0 for a blob of one group.
    pub(crate) fn outboard_len(&self) -> u64 {
        self.tree.outboard_size()
    }

    /// Bytes that the blob takes on disk.
    pub(crate) fn disk_len(&self) -> u64 {
        self.tree.size().saturating_add(self.outboard_len())
    }

    /// Bytes of the encoding of `groups`.
    pub(crate) fn encoded_len(&self, groups: &GroupRanges) -> u64 {
        self.walk(groups)
            .map(|step| match step {
                Step::Parent { .. } => PAIR_LEN as u64,
                Step::Leaf { len, .. } => len as u64,
            })
            .sum()
    }

    /// The encoding of `groups`, step by step.
    pub(crate) fn walk(&self, groups: &GroupRanges) -> Walk {
        Walk { shape: *self, inner: ResponseIter::new(self.tree, self.chunks(groups)) }
    }

    /// Chunks of `groups`. A range that reaches the end is left open: that is how bao-tree names the last chunk.
    fn chunks(&self, groups: &GroupRanges) -> ChunkRanges {
        let mut chunks = ChunkRanges::empty();
        for range in groups.iter().filter(|r| r.start < self.groups()) {
            let start = ChunkNum(range.start * CHUNKS_PER_GROUP);
            chunks |= if range.end >= self.groups() {
                ChunkRanges::from(start..)
            } else {
                ChunkRanges::from(start..ChunkNum(range.end * CHUNKS_PER_GROUP))
            };
        }
        chunks
    }

    fn outboard_at(&self, node: TreeNode) -> u64 {
        // Every parent that a walk by groups yields is in the outboard.
        self.tree.post_order_offset(node).map_or(0, |offset| offset.value() * PAIR_LEN as u64)
    }
}

/// Iterator of [`Shape::walk`].
pub(crate) struct Walk {
    shape: Shape,
    inner: ResponseIter,
}

impl Iterator for Walk {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        Some(match self.inner.next()? {
            BaoChunk::Parent { node, is_root, left, right, .. } => {
                let chunks = node.chunk_range();
                let span = (chunks.start.0 / CHUNKS_PER_GROUP, chunks.end.0.div_ceil(CHUNKS_PER_GROUP));
                Step::Parent { at: self.shape.outboard_at(node), span, is_root, left, right }
            }
            BaoChunk::Leaf { start_chunk, size, is_root, .. } => {
                Step::Leaf { group: start_chunk.0 / CHUNKS_PER_GROUP, len: size, is_root }
            }
        })
    }
}

/// Hashes that are expected next, on the way down the tree.
#[derive(Debug)]
pub(crate) struct Expected(Vec<ChainingValue>);

impl Expected {
    pub(crate) fn from_root(shape: &Shape) -> Self {
        let mut stack = Vec::with_capacity(64);
        stack.push(shape.root);
        Self(stack)
    }

    /// Whether `pair` is what belongs here; if so, its wanted children are expected next.
    pub(crate) fn parent(&mut self, pair: &Pair, is_root: bool, left: bool, right: bool) -> bool {
        let Some(expected) = self.0.pop() else { return false };
        let (l, r) = halves(pair);
        let actual = if is_root {
            *merge_subtrees_root(&l, &r, Mode::Hash).as_bytes()
        } else {
            merge_subtrees_non_root(&l, &r, Mode::Hash)
        };
        if right {
            self.0.push(r);
        }
        if left {
            self.0.push(l);
        }
        actual == expected
    }

    /// Whether `data` is the group that belongs here.
    pub(crate) fn leaf(&mut self, group: u64, data: &[u8], is_root: bool) -> bool {
        self.0.pop().is_some_and(|expected| leaf_hash(group, data, is_root) == expected)
    }

    /// Passes over a parent that is wrong: below it nothing will match.
    pub(crate) fn poison(&mut self, left: bool, right: bool) {
        self.0.pop();
        self.0.extend(std::iter::repeat_n([0; 32], usize::from(left) + usize::from(right)));
    }

    /// Passes over a group that is known to be right, or whose bytes do not matter.
    pub(crate) fn skip(&mut self) {
        self.0.pop();
    }
}

fn halves(pair: &Pair) -> (ChainingValue, ChainingValue) {
    let (mut l, mut r) = ([0; 32], [0; 32]);
    l.copy_from_slice(&pair[..32]);
    r.copy_from_slice(&pair[32..]);
    (l, r)
}

fn leaf_hash(group: u64, data: &[u8], is_root: bool) -> ChainingValue {
    if is_root {
        return *bao_tree::blake3::hash(data).as_bytes();
    }
    let mut hasher = bao_tree::blake3::Hasher::new();
    hasher.set_input_offset(group * GROUP_LEN).update(data).finalize_non_root()
}

/// Where an encoding that claims to be of `groups` first fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadGroup(pub(crate) u64);

/// Parts of an encoding that passed, by the place where they belong.
#[derive(Debug, Default)]
pub(crate) struct Verified<'a> {
    /// Pairs and their offsets in the outboard.
    pub(crate) parents: Vec<(u64, &'a Pair)>,
    /// Bytes and their offsets in the data; neighbours in both places are one piece.
    pub(crate) data: Vec<(u64, &'a [u8])>,
}

/// Checks every hash of `encoded`, which claims to be the encoding of `groups`.
///
/// Costs one pass of BLAKE3 over it. No byte of it is copied.
pub(crate) fn verify<'a>(shape: &Shape, groups: &GroupRanges, encoded: &'a [u8]) -> Result<Verified<'a>, BadGroup> {
    let mut expected = Expected::from_root(shape);
    let mut out = Verified::default();
    let mut rest: Range<usize> = 0..encoded.len();
    let mut take = |len: usize| {
        let at = rest.start;
        rest.start += len;
        encoded.get(at..at + len).map(|part| (at, part))
    };
    let mut run: Option<(u64, Range<usize>)> = None;
    for step in shape.walk(groups) {
        match step {
            Step::Parent { at, span, is_root, left, right } => {
                let bad = BadGroup(span.0);
                let (_, part) = take(PAIR_LEN).ok_or(bad)?;
                let pair: &Pair = part.try_into().map_err(|_| bad)?;
                if !expected.parent(pair, is_root, left, right) {
                    return Err(bad);
                }
                out.parents.push((at, pair));
            }
            Step::Leaf { group, len, is_root } => {
                let (at, part) = take(len).ok_or(BadGroup(group))?;
                if !expected.leaf(group, part, is_root) {
                    return Err(BadGroup(group));
                }
                let offset = group * GROUP_LEN;
                match &mut run {
                    Some((start, place)) if place.end == at && *start + place.len() as u64 == offset => {
                        place.end = at + len;
                    }
                    _ => {
                        out.data.extend(run.replace((offset, at..at + len)).map(|(o, r)| (o, &encoded[r])));
                    }
                }
            }
        }
    }
    out.data.extend(run.map(|(o, r)| (o, &encoded[r])));
    if rest.is_empty() { Ok(out) } else { Err(BadGroup(shape.groups())) }
}

/// Id of the `len` bytes of `data`; writes their outboard front to back. Memory is one group.
pub(crate) fn hash_into(data: impl Read, len: ByteCount, outboard: impl Write) -> io::Result<BlobId> {
    let tree = BaoTree::new(len.0, BlockSize::from_chunk_log(GROUP_CHUNK_LOG));
    let root = bao_tree::io::sync::outboard_post_order(data, tree, outboard)?;
    Ok(BlobId(*root.as_bytes()))
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
