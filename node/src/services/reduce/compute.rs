//! The heavy and the fiddly work on one chunk. Functions of bytes; whoever calls the heavy ones is on a worker thread.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use sundara_proto::crypto::{Context, Signed};
use sundara_proto::id::Digest;
use sundara_proto::pb;
use sundara_proto::round::{ChunkCommit, ChunkTags, NonceSet, Rank, RoundOp, SumCommit, nonce_hash};
use sundara_proto::rules::round::dtype::Word;
use sundara_proto::rules::round::exact::{self, ExactOp};
use sundara_proto::rules::round::fixed::{self, RefusalKind};
use sundara_proto::rules::round::layout::{BLOCK, GROUP};
use sundara_proto::rules::round::robust::{self, Aggregator};
use sundara_proto::rules::round::tags::{self, TagKey};
use sundara_proto::rules::round::tree::ChunkHasher;

use super::Lie;
use super::buffers::Buffers;
use super::tensor::Space;
use super::terms::Round;
use crate::domain::round::{At, Proof};

pub(super) use sundara_proto::rules::round::fixed::scales_digest;

/// Elements that are worked on at once, so that a second pass over them finds them in the cache: 256 KiB of i32.
const PIECE: usize = 16 * GROUP;

/// An element that cannot take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Counted through all tensors.
    element: u64,
    kind: RefusalKind,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "element {} is {}", self.element, self.kind)
    }
}

fn refusal(round: &Round, chunk: u32, refused: fixed::Refusal) -> Refusal {
    let start = round.chunk(chunk).map_or(0, |c| c.elements.start);
    Refusal { element: start + refused.index as u64, kind: refused.kind }
}

/// A chunk, ready to be sent.
pub(super) struct Prepared {
    pub(super) words: Vec<u8>,
    pub(super) root: [u8; 32],
    pub(super) residual: Option<Vec<f32>>,
}

/// Exponents of the chunk's blocks.
pub(super) fn scales(round: &Round, space: &Space, chunk: u32, residual: Option<&[f32]>) -> Result<Vec<u8>, Refusal> {
    let (Some(wire), Some(place)) = (round.wire, round.chunk(chunk)) else { return Ok(Vec::new()) };
    let mut scratch = Vec::new();
    let bytes = space.bytes(&round.bytes_of(&place), &mut scratch);
    fixed::block_exponents(wire, round.open.dtype, bytes, residual).map_err(|e| refusal(round, chunk, e))
}

/// The shared exponents of a chunk: the greatest of each block.
pub(super) fn shared(exponents: &[Bytes]) -> Vec<u8> {
    let mut all = exponents.iter();
    let mut shared = all.next().map(|e| e.to_vec()).unwrap_or_default();
    for own in all.filter(|own| own.len() == shared.len()).collect::<Vec<_>>() {
        fixed::max_exponents(&mut shared, own);
    }
    shared
}

/// Words and root of the chunk.
pub(super) fn prepare(
    round: &Round,
    space: &Space,
    chunk: u32,
    shared: &[u8],
    mut residual: Option<Vec<f32>>,
    buffers: &Buffers,
) -> Result<Prepared, Refusal> {
    let Some(place) = round.chunk(chunk) else {
        return Ok(Prepared { words: Vec::new(), root: [0; 32], residual: None });
    };
    let (dtype, hash) = (round.open.dtype, round.shape.proof != Proof::Off);
    let mut scratch = Vec::new();
    let tensor = space.bytes(&round.bytes_of(&place), &mut scratch);
    let mut words = buffers.take(round.input_len(&place));
    let mut hasher = ChunkHasher::new();
    match round.wire.filter(|_| !round.is_sole(chunk)) {
        Some(wire) => {
            let pieces = tensor.chunks(PIECE * dtype.len()).zip(words.chunks_mut(PIECE * wire.input().len()));
            for (i, (tensor, words)) in pieces.enumerate() {
                let start = i * PIECE;
                let end = start + tensor.len() / dtype.len();
                let scales = &shared[start / BLOCK..end.div_ceil(BLOCK)];
                let residual = residual.as_mut().map(|r| &mut r[start..end]);
                fixed::quantise(wire, dtype, tensor, scales, words, residual);
                hasher.update(words);
            }
        }
        None => {
            words.copy_from_slice(tensor);
            if hash {
                hasher.update(&words);
            }
        }
    }
    let root = if hash { hasher.finish().root().0 } else { [0; 32] };
    Ok(Prepared { words, root, residual })
}

/// What came of a sum.
pub(super) struct Summed {
    pub(super) out: Arc<Vec<u8>>,
    pub(super) root: [u8; 32],
}

/// Sums the inputs of a chunk.
///
/// # Errors
/// The rank whose words are beyond the limit.
pub(super) fn sum(
    round: &Round,
    chunk: u32,
    inputs: &[(Rank, Arc<Vec<u8>>)],
    buffers: &Buffers,
    lie: Lie,
) -> Result<Summed, Rank> {
    let hash = |out: &[u8]| if round.shape.proof == Proof::Off { [0; 32] } else { *blake3::hash(out).as_bytes() };
    let Some(place) = round.chunk(chunk) else { return Ok(Summed { out: Arc::default(), root: [0; 32] }) };
    if round.is_sole(chunk) {
        let out = inputs.first().map(|(_, words)| words.clone()).unwrap_or_default();
        let out = if lie == Lie::None { out } else { Arc::new(spoiled(&out)) };
        return Ok(Summed { root: hash(&out), out });
    }
    let mut out = buffers.take(round.output_len(&place));
    match round.wire {
        Some(wire) => {
            let (input, output) = (wire.input().len(), wire.output().len());
            let mut hasher = ChunkHasher::new();
            for (i, sum) in out.chunks_mut(PIECE * output).enumerate() {
                sum.fill(0);
                let (start, count) = (i * PIECE * input, sum.len() / output);
                for (rank, words) in inputs {
                    let words = &words[start..start + count * input];
                    if !fixed::check_range(wire.input(), words, wire.q().into()) {
                        return Err(*rank);
                    }
                    fixed::sum_into(wire, sum, words);
                }
                lie.spoil(sum, wire.output(), inputs, start..start + count * input, wire.input());
                hasher.update(sum);
            }
            return Ok(Summed { out: Arc::new(out), root: hasher.finish().root().0 });
        }
        None => {
            let slices: Vec<&[u8]> = inputs.iter().map(|(_, words)| words.as_slice()).collect();
            let dtype = round.open.dtype;
            match (ExactOp::of(round.open.op), Aggregator::of(round.open.op)) {
                (Some(op), _) => exact::reduce(op, dtype, &slices, &mut out),
                (None, Some(aggregator)) => robust::aggregate(aggregator, dtype, &slices, None, &mut out),
                (None, None) => {}
            }
        }
    }
    if lie != Lie::None {
        out = spoiled(&out);
    }
    Ok(Summed { root: hash(&out), out: Arc::new(out) })
}

/// The same words with one bit changed.
pub(super) fn spoiled(words: &[u8]) -> Vec<u8> {
    let mut words = words.to_vec();
    if let Some(byte) = words.first_mut() {
        *byte ^= 1;
    }
    words
}

impl Lie {
    /// Changes a sum as this liar does.
    fn spoil(
        self,
        sum: &mut [u8],
        output: Word,
        inputs: &[(Rank, Arc<Vec<u8>>)],
        range: std::ops::Range<usize>,
        input: Word,
    ) {
        let Some((_, words)) = inputs.last() else { return };
        let words = &words[range];
        let factor: i64 = match self {
            Self::Flip => {
                sum[0] ^= 1;
                return;
            }
            Self::Drop => -1,
            Self::Double => 1,
            Self::Negate => -2,
            Self::None | Self::TwoSums | Self::Stall | Self::NoReceipts | Self::Tags => return,
        };
        for (out, word) in sum.chunks_exact_mut(output.len()).zip(words.chunks_exact(input.len())) {
            let value = int(out) + factor * int(word);
            let bytes = value.to_le_bytes();
            out.copy_from_slice(&bytes[..output.len()]);
        }
    }

    /// A member's tags, as it tells them.
    pub(super) fn tags(self, mut tags: Vec<u64>) -> Vec<u64> {
        if self == Self::Tags
            && let Some(tag) = tags.first_mut()
        {
            *tag = tags::add_mod(*tag, 1);
        }
        tags
    }
}

/// A little-endian integer of up to 8 bytes.
fn int(bytes: &[u8]) -> i64 {
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut whole = if negative { [0xff; 8] } else { [0; 8] };
    whole[..bytes.len()].copy_from_slice(bytes);
    i64::from_le_bytes(whole)
}

/// Randomness of a chunk's tags.
pub(super) fn rho(round: &Round, chunk: u32, sum: &Signed<SumCommit>, nonces: &NonceSet) -> Digest {
    tags::rho(&round.id, chunk, &sum.digest(), &sum.commits, &nonces.nonces)
}

/// Tags of a member's chunk.
pub(super) struct Tagged {
    pub(super) input: Vec<u64>,
    pub(super) output: Vec<u64>,
    /// Whether the output is within what the participants can have come to.
    pub(super) in_range: bool,
}

/// Tags of input and output.
pub(super) fn tags(round: &Round, rho: Digest, words: &[u8], out: Option<&[u8]>, participants: usize) -> Tagged {
    let mut tagged = Tagged { input: Vec::new(), output: Vec::new(), in_range: true };
    let Some(wire) = round.wire else { return tagged };
    let key = TagKey::new(&rho);
    key.tags(words, wire.input(), &mut tagged.input);
    if let Some(out) = out {
        tagged.in_range = fixed::finish(wire, out, participants).is_ok();
        key.tags(out, wire.output(), &mut tagged.output);
    }
    tagged
}

/// Whether the commitments that come with a sum are those that it names, and fit the scales that were granted.
pub(super) fn check_commits(
    round: &Round,
    sum: &SumCommit,
    commits: &[pb::Signed],
    granted: &BTreeMap<Rank, Bytes>,
    shared: &[u8],
) -> Result<(), &'static str> {
    if commits.len() != sum.commits.len() {
        return Err("a sum without the commitments of its inputs");
    }
    let scaled = round.shape.proof == Proof::Tags;
    let all = scales_digest(shared);
    if scaled && sum.shared != Some(all) {
        return Err("a sum over other scales than it granted");
    }
    for ((rank, named), raw) in sum.participants.iter().zip(&sum.commits).zip(commits) {
        if Context::CHUNK_COMMIT.digest_one(&raw.payload) != *named {
            return Err("a commitment that the sum does not name");
        }
        let commit = Signed::<ChunkCommit>::trusted(raw.clone()).map_err(|_| "a malformed commitment")?;
        let scales = !scaled
            || commit.fixed.is_some_and(|fixed| {
                granted.get(&rank).is_some_and(|own| scales_digest(own) == fixed.scale) && fixed.shared == all
            });
        if commit.rank != rank || !scales {
            return Err("a commitment to other scales than were granted");
        }
    }
    Ok(())
}

/// Whether nonces are those that were committed to, or zeros.
pub(super) fn check_nonces(commits: &[pb::Signed], nonces: &[[u8; 32]]) -> bool {
    commits.len() == nonces.len()
        && commits.iter().zip(nonces).all(|(raw, nonce)| {
            let committed = Signed::<ChunkCommit>::trusted(raw.clone()).ok().and_then(|c| c.fixed).map(|f| f.nonce);
            *nonce == [0; 32] || committed == Some(nonce_hash(nonce))
        })
}

/// The sum of everyone's tags, if they are all there and about the same thing. Signatures are checked already.
pub(super) fn check_tags(
    round: &Round,
    at: At,
    sum: &Signed<SumCommit>,
    nonces: &Signed<NonceSet>,
    tags: &[Signed<ChunkTags>],
) -> Result<Vec<u64>, &'static str> {
    let groups = round.chunk(at.chunk).map_or(0, |c| c.group_count());
    let ranks: Vec<Rank> = tags.iter().map(|t| t.rank).collect();
    if ranks != sum.participants.iter().collect::<Vec<_>>() {
        return Err("tags of other members than took part");
    }
    let (sum, nonces) = (sum.digest(), nonces.digest());
    let mut total = vec![0; groups];
    for one in tags {
        let member = round.open.member(one.rank);
        let fits = one.round == round.id
            && one.chunk == at.chunk
            && one.attempt == at.attempt
            && one.sum == sum
            && one.nonces == nonces
            && one.tags.len() == groups
            && member.is_some_and(|m| m.hotkey.0 == one.signer());
        if !fits {
            return Err("tags that do not fit the chunk");
        }
        tags::add_all(&mut total, &one.tags);
    }
    Ok(total)
}

/// Writes a chunk's result into the tensors.
///
/// # Errors
/// When an integer of the result does not fit its type.
pub(super) fn finish(
    round: &Round,
    space: &mut Space,
    chunk: u32,
    shared: &[u8],
    out: &[u8],
    participants: usize,
) -> Result<(), Refusal> {
    let Some(place) = round.chunk(chunk) else { return Ok(()) };
    let range = round.bytes_of(&place);
    let Some(wire) = round.wire.filter(|_| !round.is_sole(chunk)) else {
        space.write(range.start, out);
        return Ok(());
    };
    let divisor = match round.open.op {
        RoundOp::Mean => u32::try_from(participants).unwrap_or(1).max(1),
        _ => 1,
    };
    let dtype = round.open.dtype;
    if let Some(slot) = space.slot(&range) {
        return fixed::dequantise(wire, dtype, out, shared, divisor, slot).map_err(|e| refusal(round, chunk, e));
    }
    let mut tensor = vec![0; range.len()];
    fixed::dequantise(wire, dtype, out, shared, divisor, &mut tensor).map_err(|e| refusal(round, chunk, e))?;
    space.write(range.start, &tensor);
    Ok(())
}
