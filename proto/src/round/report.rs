//! What goes over /rpc: joining a group, being ready, what came of a round, and what validators ask.

use bytes::Bytes;

use super::frame::{at_most, group, part};
use super::{ChunkSet, Evidence, Rank, Ranks, RoundOp, RoundSettings, chunk_index, digests, rank};
use crate::id::{Digest, GroupId, NodeId, RoundId};
use crate::pb;
use crate::rules::round::dtype::Dtype;
use crate::wire::{self, WireError, WireMessage, limit, required};

/// Let me in. To the group's creator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinGroup {
    /// The group.
    pub group: GroupId,
    /// Rank that the asker had, or wants.
    pub rank: Option<Rank>,
    /// An [`super::Invitation`], where the creator's own list does not name the asker. Unverified here.
    pub invitation: Option<pb::Signed>,
    /// For an invitation that names a token; else empty.
    pub token: Bytes,
}

impl WireMessage for JoinGroup {
    type Raw = pb::JoinGroup;
    const MAX: usize = 1 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        if !matches!(raw.token.len(), 0 | 32) {
            return Err(WireError::field("token"));
        }
        Ok(Self {
            group: wire::id(&raw.group, "group")?,
            rank: raw.rank.map(|r| rank(r, "rank")).transpose()?,
            invitation: raw.invitation,
            token: raw.token,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::JoinGroup {
            group: self.group.into(),
            rank: self.rank.map(u32::from),
            invitation: self.invitation.clone(),
            token: self.token.clone(),
        }
    }
}

/// I have a tensor. To the leader, which opens the round when enough members say the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundReady {
    /// The group.
    pub group: GroupId,
    /// Version of the roster that the member has.
    pub roster: u64,
    /// Which round.
    pub seq: u64,
    /// What is to be done.
    pub op: RoundOp,
    /// Type of the tensors.
    pub dtype: Dtype,
    /// [`super::lens_digest`] of their lengths.
    pub lens: Digest,
    /// How.
    pub settings: RoundSettings,
    /// To the next rank, when the leader is gone in mid-round: the RoundOpen as the member has it. Unverified here.
    pub open: Option<pb::Signed>,
    /// With it, the RoundAmends, in order.
    pub amends: Vec<pb::Signed>,
}

impl WireMessage for RoundReady {
    type Raw = pb::RoundReady;
    const MAX: usize = 176 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Ok(Self {
            group: wire::id(&raw.group, "group")?,
            roster: raw.roster,
            seq: raw.seq,
            op: RoundOp::from_raw(raw.op)?,
            dtype: Dtype::from_raw(raw.dtype)?,
            lens: wire::id(&raw.lens, "lens")?,
            settings: RoundSettings::from_raw(raw.settings)?,
            open: raw.open,
            amends: at_most(raw.amends, limit::AMENDS, "amends")?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::RoundReady {
            group: self.group.into(),
            roster: self.roster,
            seq: self.seq,
            op: Some(self.op.to_raw()),
            dtype: Some(self.dtype.to_raw()),
            lens: self.lens.into(),
            settings: Some(self.settings.to_raw()),
            open: self.open.clone(),
            amends: self.amends.clone(),
            state: None,
        }
    }
}

/// What the leader tells of a round. Signed messages are not verified by parsing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RoundEvent {
    /// A [`super::RoundOpen`].
    Open(pb::Signed),
    /// A [`super::RoundAmend`].
    Amend(pb::Signed),
    /// A [`super::RoundClose`].
    Close(pb::Signed),
    /// It came to nothing.
    Failed {
        /// Why, for people.
        reason: String,
        /// Because of whom.
        ranks: Ranks,
    },
    /// How far are you? Answered by a report of `Status`.
    Probe,
}

impl WireMessage for RoundEvent {
    type Raw = pb::RoundEvent;
    const MAX: usize = limit::ROUND_OPEN + (1 << 10);

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        use pb::round_event::Kind;
        Ok(match required(raw.kind, "kind")? {
            Kind::Open(signed) => Self::Open(signed),
            Kind::Amend(signed) => Self::Amend(signed),
            Kind::Close(signed) => Self::Close(signed),
            Kind::Failed(f) => Self::Failed {
                reason: wire::text(f.reason, limit::TEXT, "reason")?,
                ranks: Ranks::from_bytes(&f.ranks, "ranks")?,
            },
            Kind::Probe(pb::RoundProbe {}) => Self::Probe,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        use pb::round_event::Kind;
        let kind = match self.clone() {
            Self::Open(signed) => Kind::Open(signed),
            Self::Amend(signed) => Kind::Amend(signed),
            Self::Close(signed) => Kind::Close(signed),
            Self::Failed { reason, ranks } => Kind::Failed(pb::RoundFailed { reason, ranks: ranks.to_bytes() }),
            Self::Probe => Kind::Probe(pb::RoundProbe {}),
        };
        pb::RoundEvent { kind: Some(kind) }
    }
}

/// What kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// It cannot be dialled.
    Unreachable,
    /// Nothing came within the deadline.
    Stalled,
    /// What came does not fit what it should, and nothing signed proves it.
    BadData,
    /// It would not.
    Refused,
    /// The evidence proves it.
    Lied,
}

/// Digests of settled chunks' SumCommits. A round of many chunks is told in several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundDone {
    /// The first chunk of these.
    pub first: u32,
    /// Of the chunks from there on, at most [`limit::REPORT_SUMS`].
    pub sums: Vec<Digest>,
    /// Number of the last amendment that the member has applied.
    pub amend: u32,
}

/// How far a member is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoundStatus {
    /// Chunks that settled.
    pub settled: ChunkSet,
    /// Grows whenever something moves at the member.
    pub progress: u64,
    /// Number of the last amendment that the member has applied.
    pub amend: u32,
}

/// Someone did not do what it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundFault {
    /// In which part.
    pub part: u32,
    /// Who.
    pub node: NodeId,
    /// What.
    pub kind: FaultKind,
    /// For people.
    pub detail: String,
    /// What proves it, for `Lied`.
    pub evidence: Option<Evidence>,
    /// For whom the reducer says that it waits.
    pub waiting: Ranks,
    /// Number of the last amendment that the member has applied.
    pub amend: u32,
}

/// How a member gets on. To the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundReport {
    /// In which round.
    pub round: RoundId,
    /// How.
    pub kind: RoundReportKind,
}

/// See [`RoundReport`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RoundReportKind {
    /// These settled.
    Done(RoundDone),
    /// Something went wrong.
    Fault(Box<RoundFault>),
    /// So far, in answer to a probe.
    Status(RoundStatus),
}

impl WireMessage for RoundReport {
    type Raw = pb::RoundReport;
    const MAX: usize = 128 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        use pb::round_report::Kind;
        let kind = match required(raw.kind, "kind")? {
            Kind::Done(done) => {
                let sums = digests(&done.sums, limit::REPORT_SUMS, "sums")?;
                if done.first as usize + sums.len() > limit::CHUNKS {
                    return Err(WireError::field("first"));
                }
                let sums = sums.into_iter().map(Digest).collect();
                RoundReportKind::Done(RoundDone { first: done.first, sums, amend: done.amend })
            }
            Kind::Fault(fault) => RoundReportKind::Fault(Box::new(fault_from_raw(fault)?)),
            Kind::Status(status) => RoundReportKind::Status(RoundStatus {
                settled: ChunkSet::from_bytes(&status.settled, "settled")?,
                progress: status.progress,
                amend: status.amend,
            }),
        };
        Ok(Self { round: wire::id(&raw.round, "round")?, kind })
    }

    fn to_raw(&self) -> Self::Raw {
        use pb::round_report::Kind;
        let kind = match &self.kind {
            RoundReportKind::Done(done) => {
                let sums: Vec<u8> = done.sums.iter().flat_map(|sum| sum.0).collect();
                Kind::Done(pb::RoundDone { first: done.first, sums: sums.into(), amend: done.amend })
            }
            RoundReportKind::Fault(fault) => Kind::Fault(fault_to_raw(fault)),
            RoundReportKind::Status(status) => Kind::Status(pb::RoundStatus {
                settled: status.settled.to_bytes(),
                progress: status.progress,
                amend: status.amend,
                sums: Vec::new(),
            }),
        };
        pb::RoundReport { round: self.round.into(), kind: Some(kind) }
    }
}

fn fault_from_raw(raw: pb::RoundFault) -> Result<RoundFault, WireError> {
    use pb::round_fault::Kind;
    let kind = match Kind::try_from(raw.kind) {
        Ok(Kind::Unreachable) => FaultKind::Unreachable,
        Ok(Kind::Stalled) => FaultKind::Stalled,
        Ok(Kind::BadData) => FaultKind::BadData,
        Ok(Kind::Refused) => FaultKind::Refused,
        Ok(Kind::Lied) => FaultKind::Lied,
        Ok(Kind::Unspecified) | Err(_) => return Err(WireError::field("fault.kind")),
    };
    Ok(RoundFault {
        part: part(raw.part)?,
        node: wire::id(&raw.node, "node")?,
        kind,
        detail: wire::text(raw.detail, limit::TEXT, "detail")?,
        evidence: raw.evidence.map(Evidence::from_raw).transpose()?,
        waiting: Ranks::from_bytes(&raw.waiting, "waiting")?,
        amend: raw.amend,
    })
}

fn fault_to_raw(fault: &RoundFault) -> pb::RoundFault {
    use pb::round_fault::Kind;
    let kind = match fault.kind {
        FaultKind::Unreachable => Kind::Unreachable,
        FaultKind::Stalled => Kind::Stalled,
        FaultKind::BadData => Kind::BadData,
        FaultKind::Refused => Kind::Refused,
        FaultKind::Lied => Kind::Lied,
    };
    pb::RoundFault {
        part: fault.part,
        node: fault.node.into(),
        kind: kind.into(),
        detail: fault.detail.clone(),
        evidence: fault.evidence.as_ref().map(Evidence::to_raw),
        waiting: fault.waiting.to_bytes(),
        amend: fault.amend,
    }
}

/// What settled in a part of a round, from `chunk` on. Validator to leader or reducer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TranscriptRequest {
    /// The round.
    pub round: RoundId,
    /// The part.
    pub part: u32,
    /// First chunk of the page, counted through the round.
    pub chunk: u32,
}

impl WireMessage for TranscriptRequest {
    type Raw = pb::TranscriptRequest;
    const MAX: usize = 256;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Ok(Self { round: wire::id(&raw.round, "round")?, part: part(raw.part)?, chunk: chunk_index(raw.chunk)? })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::TranscriptRequest { round: self.round.into(), part: self.part, chunk: self.chunk }
    }
}

/// A settled chunk as it was signed. Unverified here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TranscriptChunk {
    /// The SumCommit.
    pub sum: pb::Signed,
    /// The participants' ChunkCommits, ranks ascending.
    pub commits: Vec<pb::Signed>,
    /// The NonceSet; `None` in exact mode.
    pub nonces: Option<pb::Signed>,
    /// The participants' ChunkTags, ranks ascending; fewer than commits where some came late.
    pub tags: Vec<pb::Signed>,
}

/// A page of what settled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    /// The RoundOpen, where asked from a part's first chunk on.
    pub open: Option<pb::Signed>,
    /// The RoundAmends, with `open`.
    pub amends: Vec<pb::Signed>,
    /// Chunks, in order.
    pub chunks: Vec<TranscriptChunk>,
    /// Chunk to ask for next; `None` on the last page.
    pub next: Option<u32>,
}

impl Transcript {
    /// A page ends once it has so many bytes. The largest chunk, of 256 members, takes about 720 KiB and still fits the
    /// frame behind that; a RoundOpen and its amendments above this size are a page of their own.
    pub const PAGE: usize = 256 << 10;
}

impl WireMessage for Transcript {
    type Raw = pb::Transcript;
    const MAX: usize = limit::RPC_FRAME;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        let chunk = |c: pb::TranscriptChunk| {
            Ok(TranscriptChunk {
                sum: required(c.sum, "sum")?,
                commits: at_most(c.commits, limit::MEMBERS, "commits")?,
                nonces: c.nonces,
                tags: at_most(c.tags, limit::MEMBERS, "tags")?,
            })
        };
        Ok(Self {
            open: raw.open,
            amends: at_most(raw.amends, limit::AMENDS, "amends")?,
            chunks: raw.chunks.into_iter().map(chunk).collect::<Result<_, WireError>>()?,
            next: raw.next.map(chunk_index).transpose()?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        let chunk = |c: &TranscriptChunk| pb::TranscriptChunk {
            sum: Some(c.sum.clone()),
            commits: c.commits.clone(),
            nonces: c.nonces.clone(),
            tags: c.tags.clone(),
        };
        pb::Transcript {
            open: self.open.clone(),
            amends: self.amends.clone(),
            chunks: self.chunks.iter().map(chunk).collect(),
            next: self.next,
        }
    }
}

/// Show me a group. To a reducer, answered by [`super::RoundFrame::Opening`]'s message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpeningRequest {
    /// The round.
    pub round: RoundId,
    /// Which run at the chunk.
    pub attempt: u32,
    /// The chunk.
    pub chunk: u32,
    /// Group of the chunk.
    pub group: u32,
    /// Whose input; `None` for the output.
    pub rank: Option<Rank>,
}

impl WireMessage for OpeningRequest {
    type Raw = pb::OpeningRequest;
    const MAX: usize = 256;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Ok(Self {
            round: wire::id(&raw.round, "round")?,
            attempt: raw.attempt,
            chunk: chunk_index(raw.chunk)?,
            group: group(raw.group)?,
            rank: raw.rank.map(|r| rank(r, "rank")).transpose()?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::OpeningRequest {
            round: self.round.into(),
            attempt: self.attempt,
            chunk: self.chunk,
            group: self.group,
            rank: self.rank.map(u32::from),
        }
    }
}
