//! Groups and rounds of map-reduce: what members, reducers, the leader and validators say to each other.
//!
//! A group's creator signs its [`GroupRoster`]; a member's place in it is its rank. The lowest live rank leads: it opens,
//! amends and closes rounds. Each part of the element space (see [`crate::rules::round::layout`]) has a reducer.
//!
//! ```text
//! member (rpc)                  leader (rpc)             member (/round)              reducer (/round)
//!   RoundReady           --->                              Hello{RoundOpen}     --->
//!                        <---   RoundOpen                  then, for each chunk of the part, verified mode:
//!                        <---   RoundAmend ...             Scale                --->
//!   RoundReport          --->                                                   <---  ScaleSet
//!                        <---   RoundClose                 ChunkCommit, words   --->
//!                                                                               <---  ChunkReceipt
//!                                                                               <---  SumCommit + ChunkCommits, words
//!                                                          Nonce                --->
//!                                                                               <---  NonceSet
//!                                                          ChunkTags            --->
//!                                                                               <---  TagSet
//!                                                          Settled or Dispute   --->
//! ```
//!
//! Exact mode has empty scales and neither nonces nor tags; `off` has words alone. Words travel outside frames. Everything
//! that can convict is signed by a hotkey and carries the round, the attempt and the chunk. A
//! [`RoundId`](crate::id::RoundId) is the digest of the RoundOpen's payload, so it stands for the group, the members and
//! every setting. `attempt` counts the runs at one chunk: a chunk begins again, with the next number, when its reducer or
//! its participants change.
//!
//! The reducer signs the nonces too: a member that was given others than its fellows computes other tags, and without a
//! signature it could not be told from a liar.

mod chunk;
mod frame;
mod group;
mod open;
mod proof;
mod report;
mod sets;

pub use chunk::{ChunkCommit, ChunkReceipt, ChunkTags, FixedCommit, NonceSet, SumCommit, nonce_hash, out_digest};
pub use frame::RoundFrame;
pub use group::{GroupMember, GroupRoster, Invitation, Invitee, StateDigest, token_digest};
pub use open::{PartMove, RoundAmend, RoundClose, RoundMember, RoundOpen, RoundPart, lens_digest, sums_digest};
pub use proof::{BlameCase, Equivocation, EquivocationKind, Evidence, Omission, RoundProof};
pub use report::{
    FaultKind, JoinGroup, OpeningRequest, RoundDone, RoundEvent, RoundFault, RoundReady, RoundReport, RoundReportKind,
    RoundStatus, Transcript, TranscriptChunk, TranscriptRequest,
};
pub use sets::{ChunkSet, Ranks};

use crate::pb;
use crate::rules::round::dtype::Compress;
use crate::wire::{WireError, limit};

/// Place of a member in its group's roster. Fits a byte because a group has at most [`limit::MEMBERS`] members.
pub type Rank = u8;

/// A rank of a field.
fn rank(value: u32, field: &'static str) -> Result<Rank, WireError> {
    u8::try_from(value).map_err(|_| WireError::field(field))
}

/// The number of a chunk of a field.
fn chunk_index(value: u32) -> Result<u32, WireError> {
    if (value as usize) < limit::CHUNKS { Ok(value) } else { Err(WireError::field("chunk")) }
}

/// Digests written one behind the other, at most `max`.
fn digests(bytes: &[u8], max: usize, field: &'static str) -> Result<Vec<[u8; 32]>, WireError> {
    let (digests, rest) = bytes.as_chunks::<32>();
    if rest.is_empty() && digests.len() <= max { Ok(digests.to_vec()) } else { Err(WireError::field(field)) }
}

/// How much of a round can be checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Sums of integers with checksums: every lie is found and its author named.
    #[default]
    Verified,
    /// In the order of ranks, bit by bit; sampled groups are computed again.
    Exact,
    /// Unchecked.
    Off,
}

/// Who sums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Topology {
    /// Nodes that were chosen for it.
    #[default]
    Reducers,
    /// Every member a part.
    Butterfly,
}

/// How the rounds of a group run. The default is verified, uncompressed, with reducers, and goes on without late members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RoundSettings {
    /// How much can be checked.
    pub mode: Mode,
    /// How small the words are.
    pub compress: Compress,
    /// Who sums.
    pub topology: Topology,
    /// The round fails rather than leave a live member out.
    pub demand_all: bool,
}

impl RoundSettings {
    /// From the wire.
    pub fn from_raw(raw: Option<pb::RoundSettings>) -> Result<Self, WireError> {
        use pb::round_settings::{Compress as C, Mode as M, Topology as T};
        let raw = raw.ok_or(WireError::field("settings"))?;
        Ok(Self {
            mode: match M::try_from(raw.mode) {
                Ok(M::Verified) => Mode::Verified,
                Ok(M::Exact) => Mode::Exact,
                Ok(M::Off) => Mode::Off,
                Ok(M::Unspecified) | Err(_) => return Err(WireError::field("mode")),
            },
            compress: match C::try_from(raw.compress) {
                Ok(C::None) => Compress::None,
                Ok(C::Bf16) => Compress::Bf16,
                Ok(C::Int8) => Compress::Int8,
                Err(_) => return Err(WireError::field("compress")),
            },
            topology: match T::try_from(raw.topology) {
                Ok(T::Reducers) => Topology::Reducers,
                Ok(T::Butterfly) => Topology::Butterfly,
                Err(_) => return Err(WireError::field("topology")),
            },
            demand_all: raw.demand_all,
        })
    }

    /// As sent.
    pub fn to_raw(self) -> pb::RoundSettings {
        use pb::round_settings::{Compress as C, Mode as M, Topology as T};
        let mode = match self.mode {
            Mode::Verified => M::Verified,
            Mode::Exact => M::Exact,
            Mode::Off => M::Off,
        };
        let compress = match self.compress {
            Compress::None => C::None,
            Compress::Bf16 => C::Bf16,
            Compress::Int8 => C::Int8,
        };
        let topology = match self.topology {
            Topology::Reducers => T::Reducers,
            Topology::Butterfly => T::Butterfly,
        };
        pb::RoundSettings {
            mode: mode.into(),
            compress: compress.into(),
            topology: topology.into(),
            demand_all: self.demand_all,
        }
    }
}

/// What the members of a round do with their tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RoundOp {
    /// The sum.
    Sum,
    /// The sum over the number of those that took part in the chunk.
    Mean,
    /// The least of each element.
    Min,
    /// The greatest of each element.
    Max,
    /// Coordinate median.
    Median,
    /// Mean without the extremes.
    TrimmedMean,
    /// One clipped step from the previous aggregate.
    CentredClip,
    /// The sum, for one rank alone.
    Reduce {
        /// Who gets it.
        root: Rank,
    },
    /// One rank's tensor, for all.
    Broadcast {
        /// Whose.
        root: Rank,
    },
    /// Everyone's tensor, for all.
    Gather,
    /// Nothing: all have arrived.
    Barrier,
}

impl RoundOp {
    /// Whether it is a sum of words, possibly divided: what verified mode can check.
    pub fn is_sum(self) -> bool {
        matches!(self, Self::Sum | Self::Mean | Self::Reduce { .. })
    }

    /// Whether members' tensors are combined into one at all.
    pub fn is_reduction(self) -> bool {
        !matches!(self, Self::Broadcast { .. } | Self::Gather | Self::Barrier)
    }

    /// From the wire.
    pub fn from_raw(raw: Option<pb::RoundOp>) -> Result<Self, WireError> {
        use pb::round_op::Kind;
        let raw = raw.ok_or(WireError::field("op"))?;
        let root = rank(raw.root, "op.root")?;
        let plain = |op| if root == 0 { Ok(op) } else { Err(WireError::field("op.root")) };
        match Kind::try_from(raw.kind) {
            Ok(Kind::Sum) => plain(Self::Sum),
            Ok(Kind::Mean) => plain(Self::Mean),
            Ok(Kind::Min) => plain(Self::Min),
            Ok(Kind::Max) => plain(Self::Max),
            Ok(Kind::Median) => plain(Self::Median),
            Ok(Kind::TrimmedMean) => plain(Self::TrimmedMean),
            Ok(Kind::CentredClip) => plain(Self::CentredClip),
            Ok(Kind::Reduce) => Ok(Self::Reduce { root }),
            Ok(Kind::Broadcast) => Ok(Self::Broadcast { root }),
            Ok(Kind::Gather) => plain(Self::Gather),
            Ok(Kind::Barrier) => plain(Self::Barrier),
            Ok(Kind::Unspecified) | Err(_) => Err(WireError::field("op")),
        }
    }

    /// As sent.
    pub fn to_raw(self) -> pb::RoundOp {
        use pb::round_op::Kind;
        let (kind, root) = match self {
            Self::Sum => (Kind::Sum, 0),
            Self::Mean => (Kind::Mean, 0),
            Self::Min => (Kind::Min, 0),
            Self::Max => (Kind::Max, 0),
            Self::Median => (Kind::Median, 0),
            Self::TrimmedMean => (Kind::TrimmedMean, 0),
            Self::CentredClip => (Kind::CentredClip, 0),
            Self::Reduce { root } => (Kind::Reduce, root),
            Self::Broadcast { root } => (Kind::Broadcast, root),
            Self::Gather => (Kind::Gather, 0),
            Self::Barrier => (Kind::Barrier, 0),
        };
        pb::RoundOp { kind: kind.into(), root: root.into() }
    }
}
