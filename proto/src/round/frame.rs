//! Frames of the stream between a member and a reducer. Signed messages inside are not verified by parsing.

use bytes::Bytes;

use super::{Rank, Ranks, chunk_index, rank};
use crate::pb;
use crate::rules::round::layout::{BLOCK, GROUP};
use crate::rules::round::tree::Opening;
use crate::wire::{self, WireError, WireMessage, limit, required};

/// Exponents of a chunk at most, one a block.
const EXPONENTS: usize = limit::CHUNK_GROUPS * GROUP / BLOCK;

/// One frame. `attempt` and `chunk` say what it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RoundFrame {
    /// Member to reducer, first: the round. The reducer's answer is its first Receipt, ScaleSet or Abort.
    Hello {
        /// The RoundOpen.
        open: pb::Signed,
        /// The RoundAmends, in order.
        amends: Vec<pb::Signed>,
    },
    /// Member to reducer: it has words, under these exponents.
    Scale {
        /// Which run.
        attempt: u32,
        /// The chunk.
        chunk: u32,
        /// One byte a block; empty where words need none.
        exponents: Bytes,
    },
    /// Reducer to member: everyone's exponents, and leave to send words.
    ScaleSet {
        /// Which run.
        attempt: u32,
        /// The chunk.
        chunk: u32,
        /// Whose.
        ranks: Ranks,
        /// As in Scale, ranks ascending, all of one length.
        exponents: Vec<Bytes>,
    },
    /// Member to reducer: a ChunkCommit. Its words follow, outside frames.
    Commit(pb::Signed),
    /// Reducer to member: a ChunkReceipt.
    Receipt(pb::Signed),
    /// Reducer to member: the output's words follow, outside frames.
    Sum {
        /// The SumCommit.
        sum: pb::Signed,
        /// ChunkCommits of the participants, ranks ascending.
        commits: Vec<pb::Signed>,
    },
    /// Reducer to member: it waits for others, so the silence is not its own.
    Waiting {
        /// In which part.
        part: u32,
        /// For whom.
        ranks: Ranks,
    },
    /// Member to reducer, once it has the SumCommit.
    Nonce {
        /// Which run.
        attempt: u32,
        /// The chunk.
        chunk: u32,
        /// What its ChunkCommit has the hash of.
        nonce: [u8; 32],
    },
    /// Reducer to member: a NonceSet.
    Nonces(pb::Signed),
    /// Member to reducer: a ChunkTags.
    Tags(pb::Signed),
    /// Reducer to member: everyone's.
    TagSet {
        /// Which run.
        attempt: u32,
        /// The chunk.
        chunk: u32,
        /// ChunkTags, ranks ascending.
        tags: Vec<pb::Signed>,
    },
    /// Member to reducer: the checksums agree, nothing of the chunk need be kept for this member.
    Settled {
        /// Which run.
        attempt: u32,
        /// The chunk.
        chunk: u32,
    },
    /// Member to reducer: they do not. Answered by Openings of the group: every participant's and the output's.
    Dispute {
        /// Which run.
        attempt: u32,
        /// The chunk.
        chunk: u32,
        /// First group of the chunk that does not agree.
        group: u32,
    },
    /// The opening of a group. It is [`Opening::verify`] that checks it.
    Opening {
        /// Which run.
        attempt: u32,
        /// The chunk.
        chunk: u32,
        /// Group of the chunk.
        group: u32,
        /// Whose input; `None` for the output.
        rank: Option<Rank>,
        /// The words and what proves them.
        opening: Opening,
    },
    /// Either: it goes no further, with a chunk or with all.
    Abort {
        /// Which run.
        attempt: u32,
        /// The chunk; `None` for all.
        chunk: Option<u32>,
        /// Why, for people.
        reason: String,
    },
    /// Either: still there. The number comes back in the other's.
    Ping(u64),
}

impl WireMessage for RoundFrame {
    type Raw = pb::RoundFrame;
    const MAX: usize = limit::ROUND_FRAME;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        use pb::round_frame::Kind;
        Ok(match required(raw.kind, "kind")? {
            Kind::Hello(f) => {
                Self::Hello { open: required(f.open, "open")?, amends: at_most(f.amends, limit::AMENDS, "amends")? }
            }
            Kind::Scale(f) => {
                Self::Scale { attempt: f.attempt, chunk: chunk_index(f.chunk)?, exponents: exponents(f.exponents)? }
            }
            Kind::ScaleSet(f) => scale_set(f)?,
            Kind::Commit(signed) => Self::Commit(signed),
            Kind::Receipt(signed) => Self::Receipt(signed),
            Kind::Sum(f) => {
                Self::Sum { sum: required(f.sum, "sum")?, commits: at_most(f.commits, limit::MEMBERS, "commits")? }
            }
            Kind::Waiting(f) => Self::Waiting { part: part(f.part)?, ranks: Ranks::from_bytes(&f.ranks, "ranks")? },
            Kind::Nonce(f) => {
                Self::Nonce { attempt: f.attempt, chunk: chunk_index(f.chunk)?, nonce: wire::array(&f.nonce, "nonce")? }
            }
            Kind::Nonces(signed) => Self::Nonces(signed),
            Kind::Tags(signed) => Self::Tags(signed),
            Kind::TagSet(f) => Self::TagSet {
                attempt: f.attempt,
                chunk: chunk_index(f.chunk)?,
                tags: at_most(f.tags, limit::MEMBERS, "tags")?,
            },
            Kind::Settled(f) => Self::Settled { attempt: f.attempt, chunk: chunk_index(f.chunk)? },
            Kind::Dispute(f) => {
                Self::Dispute { attempt: f.attempt, chunk: chunk_index(f.chunk)?, group: group(f.group)? }
            }
            Kind::Opening(f) => Self::Opening {
                attempt: f.attempt,
                chunk: chunk_index(f.chunk)?,
                group: group(f.group)?,
                rank: f.rank.map(|r| rank(r, "rank")).transpose()?,
                opening: Opening::from_raw(f.opening)?,
            },
            Kind::Abort(f) => Self::Abort {
                attempt: f.attempt,
                chunk: f.chunk.map(chunk_index).transpose()?,
                reason: wire::text(f.reason, limit::TEXT, "reason")?,
            },
            Kind::Ping(number) => Self::Ping(number),
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::RoundFrame { kind: Some(self.kind()) }
    }
}

impl RoundFrame {
    fn kind(&self) -> pb::round_frame::Kind {
        use pb::round_frame::Kind;
        match self.clone() {
            Self::Hello { open, amends } => Kind::Hello(pb::RoundHello { open: Some(open), amends }),
            Self::Scale { attempt, chunk, exponents } => Kind::Scale(pb::RoundScale { attempt, chunk, exponents }),
            Self::ScaleSet { attempt, chunk, ranks, exponents } => {
                Kind::ScaleSet(pb::RoundScales { attempt, chunk, ranks: ranks.to_bytes(), exponents })
            }
            Self::Commit(signed) => Kind::Commit(signed),
            Self::Receipt(signed) => Kind::Receipt(signed),
            Self::Sum { sum, commits } => Kind::Sum(pb::RoundSum { sum: Some(sum), commits }),
            Self::Waiting { part, ranks } => Kind::Waiting(pb::RoundWaiting { part, ranks: ranks.to_bytes() }),
            Self::Nonce { attempt, chunk, nonce } => {
                Kind::Nonce(pb::RoundNonce { attempt, chunk, nonce: Bytes::copy_from_slice(&nonce) })
            }
            Self::Nonces(signed) => Kind::Nonces(signed),
            Self::Tags(signed) => Kind::Tags(signed),
            Self::TagSet { attempt, chunk, tags } => Kind::TagSet(pb::RoundTagSet { attempt, chunk, tags }),
            Self::Settled { attempt, chunk } => Kind::Settled(pb::RoundSettled { attempt, chunk }),
            Self::Dispute { attempt, chunk, group } => Kind::Dispute(pb::RoundDispute { attempt, chunk, group }),
            Self::Opening { attempt, chunk, group, rank, opening } => Kind::Opening(pb::RoundOpening {
                attempt,
                chunk,
                group,
                rank: rank.map(u32::from),
                opening: Some(opening.to_raw()),
            }),
            Self::Abort { attempt, chunk, reason } => Kind::Abort(pb::RoundAbort { attempt, chunk, reason }),
            Self::Ping(number) => Kind::Ping(number),
        }
    }
}

fn exponents(bytes: Bytes) -> Result<Bytes, WireError> {
    if bytes.len() > EXPONENTS { Err(WireError::field("exponents")) } else { Ok(bytes) }
}

fn scale_set(f: pb::RoundScales) -> Result<RoundFrame, WireError> {
    let ranks = Ranks::from_bytes(&f.ranks, "ranks")?;
    let exponents: Vec<Bytes> = f.exponents.into_iter().map(exponents).collect::<Result<_, WireError>>()?;
    let one_length = exponents.windows(2).all(|pair| pair[0].len() == pair[1].len());
    if exponents.is_empty() || exponents.len() != ranks.len() || !one_length {
        return Err(WireError::field("exponents"));
    }
    Ok(RoundFrame::ScaleSet { attempt: f.attempt, chunk: chunk_index(f.chunk)?, ranks, exponents })
}

/// A part of a round.
pub(super) fn part(value: u32) -> Result<u32, WireError> {
    if (value as usize) < limit::PARTS { Ok(value) } else { Err(WireError::field("part")) }
}

/// A group of a chunk.
pub(super) fn group(value: u32) -> Result<u32, WireError> {
    if (value as usize) < limit::CHUNK_GROUPS { Ok(value) } else { Err(WireError::field("group")) }
}

/// A list of at most `max`.
pub(super) fn at_most<T>(list: Vec<T>, max: usize, field: &'static str) -> Result<Vec<T>, WireError> {
    if list.len() > max { Err(WireError::field(field)) } else { Ok(list) }
}
