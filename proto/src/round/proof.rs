//! What proves that someone lied. Judged by [`crate::rules::round::blame`].
//!
//! Two kinds are small: an [`Equivocation`] and an [`Omission`] are two or three signed messages. A [`BlameCase`] has an
//! opening of every participant, 16 KiB and more each, so from three or four members on it does not fit a gossip message.
//! It could be cut to what convicts (one member's opening for a lying member), but a sum that is wrong needs all of them.
//! So on gossip and in reports a case travels whole where it fits [`limit::EVIDENCE`], and else as a reference to a blob,
//! which the accuser provides: its receiver convicts nobody before it has fetched and judged it.

use bytes::Bytes;

use super::frame::{at_most, group};
use super::{Rank, rank};
use crate::crypto::{Network, Payload, Scheme, Signed};
use crate::id::{BlobId, Hotkey};
use crate::pb;
use crate::rules::round::tags::P;
use crate::rules::round::tree::Opening;
use crate::units::ByteCount;
use crate::wire::{self, WireError, WireMessage, limit, required};

/// Everything that anyone needs to see who lied about one group of one chunk. Nothing in it is verified by parsing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlameCase {
    /// The RoundOpen.
    pub open: pb::Signed,
    /// RoundAmends that moved the part to its reducer.
    pub amends: Vec<pb::Signed>,
    /// The SumCommit.
    pub sum: pb::Signed,
    /// The participants' ChunkCommits, ranks ascending.
    pub commits: Vec<pb::Signed>,
    /// The NonceSet; `None` in exact mode, or where no tags are in question.
    pub nonces: Option<pb::Signed>,
    /// The participants' ChunkTags, ranks ascending; those that are missing are not judged.
    pub tags: Vec<pb::Signed>,
    /// Who disputes. `None` where a validator opened a group.
    pub accuser: Option<Rank>,
    /// What the accuser's ChunkTags hold the digest of.
    pub out_tags: Vec<u64>,
    /// Group of the chunk.
    pub group: u32,
    /// Of the participants' inputs, ranks ascending. Empty in a case about scales.
    pub inputs: Vec<Opening>,
    /// Of the output. `None` in a case about scales.
    pub output: Option<Opening>,
    /// The participants' exponents, ranks ascending; in a case about scales alone.
    pub scales: Vec<Bytes>,
    /// The shared exponents; in a case about scales alone.
    pub shared: Bytes,
}

impl BlameCase {
    pub(super) fn inner_from_raw(raw: pb::BlameCase) -> Result<Self, WireError> {
        if raw.out_tags.len() > limit::CHUNK_GROUPS || raw.out_tags.iter().any(|tag| *tag >= P) {
            return Err(WireError::field("out_tags"));
        }
        let inputs = at_most(raw.inputs, limit::MEMBERS, "inputs")?;
        Ok(Self {
            open: required(raw.open, "open")?,
            amends: at_most(raw.amends, limit::AMENDS, "amends")?,
            sum: required(raw.sum, "sum")?,
            commits: at_most(raw.commits, limit::MEMBERS, "commits")?,
            nonces: raw.nonces,
            tags: at_most(raw.tags, limit::MEMBERS, "tags")?,
            accuser: raw.accuser.map(|r| rank(r, "accuser")).transpose()?,
            out_tags: raw.out_tags,
            group: group(raw.group)?,
            inputs: inputs.into_iter().map(|o| Opening::from_raw(Some(o))).collect::<Result<_, WireError>>()?,
            output: raw.output.map(|o| Opening::from_raw(Some(o))).transpose()?,
            scales: at_most(raw.scales, limit::MEMBERS, "scales")?,
            shared: raw.shared,
        })
    }

    /// Its blob's id, when it travels as one.
    pub fn blob(&self) -> BlobId {
        BlobId::of(&self.encode())
    }
}

impl WireMessage for BlameCase {
    type Raw = pb::BlameCase;
    const MAX: usize = limit::BLAME_CASE;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Self::inner_from_raw(raw)
    }

    fn to_raw(&self) -> Self::Raw {
        pb::BlameCase {
            open: Some(self.open.clone()),
            amends: self.amends.clone(),
            sum: Some(self.sum.clone()),
            commits: self.commits.clone(),
            nonces: self.nonces.clone(),
            tags: self.tags.clone(),
            accuser: self.accuser.map(u32::from),
            out_tags: self.out_tags.clone(),
            group: self.group,
            inputs: self.inputs.iter().map(Opening::to_raw).collect(),
            output: self.output.as_ref().map(Opening::to_raw),
            scales: self.scales.clone(),
            shared: self.shared.clone(),
        }
    }
}

/// Of what there are two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EquivocationKind {
    /// RoundOpens of a group and seq.
    Open,
    /// RoundAmends with one number.
    Amend,
    /// ChunkCommits of a rank, attempt and chunk.
    Commit,
    /// SumCommits of an attempt and chunk.
    Sum,
    /// NonceSets of an attempt and chunk.
    Nonces,
}

/// Two different messages of one signer for one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Equivocation {
    /// Of what.
    pub kind: EquivocationKind,
    /// One of them.
    pub first: pb::Signed,
    /// The other.
    pub second: pb::Signed,
}

impl Equivocation {
    fn from_raw(raw: pb::Equivocation) -> Result<Self, WireError> {
        use pb::equivocation::Kind;
        let kind = match Kind::try_from(raw.kind) {
            Ok(Kind::Open) => EquivocationKind::Open,
            Ok(Kind::Amend) => EquivocationKind::Amend,
            Ok(Kind::Commit) => EquivocationKind::Commit,
            Ok(Kind::Sum) => EquivocationKind::Sum,
            Ok(Kind::Nonces) => EquivocationKind::Nonces,
            Ok(Kind::Unspecified) | Err(_) => return Err(WireError::field("equivocation.kind")),
        };
        Ok(Self { kind, first: required(raw.first, "first")?, second: required(raw.second, "second")? })
    }

    fn to_raw(&self) -> pb::Equivocation {
        use pb::equivocation::Kind;
        let kind = match self.kind {
            EquivocationKind::Open => Kind::Open,
            EquivocationKind::Amend => Kind::Amend,
            EquivocationKind::Commit => Kind::Commit,
            EquivocationKind::Sum => Kind::Sum,
            EquivocationKind::Nonces => Kind::Nonces,
        };
        pb::Equivocation { kind: kind.into(), first: Some(self.first.clone()), second: Some(self.second.clone()) }
    }
}

/// A reducer signed for an input that its sum leaves out or changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Omission {
    /// The ChunkReceipt.
    pub receipt: pb::Signed,
    /// The SumCommit of the same attempt and chunk.
    pub sum: pb::Signed,
    /// The ChunkCommit that the sum names for the rank; `None` where it names none.
    pub commit: Option<pb::Signed>,
}

/// What proves a lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// One group, opened.
    Blame(Box<BlameCase>),
    /// Two messages.
    Equivocation(Equivocation),
    /// A receipt.
    Omission(Omission),
    /// An encoded [`BlameCase`], to be fetched.
    Case {
        /// Its blob.
        blob: BlobId,
        /// Its length.
        len: ByteCount,
    },
}

impl Evidence {
    /// A case as it travels: whole where it fits, else by its blob, whose bytes the caller then provides.
    pub fn of_case(case: BlameCase) -> (Self, Option<Bytes>) {
        let encoded = Bytes::from(case.encode());
        if encoded.len() <= limit::EVIDENCE {
            return (Self::Blame(Box::new(case)), None);
        }
        (Self::Case { blob: BlobId::of(&encoded), len: ByteCount(encoded.len() as u64) }, Some(encoded))
    }

    /// From the wire. Proves nothing: see [`crate::rules::round::blame`].
    pub fn from_raw(raw: pb::RoundEvidence) -> Result<Self, WireError> {
        use pb::round_evidence::Kind;
        if prost::Message::encoded_len(&raw) > limit::EVIDENCE + 16 {
            return Err(WireError::field("evidence"));
        }
        Ok(match required(raw.kind, "evidence")? {
            Kind::Blame(case) => Self::Blame(Box::new(BlameCase::inner_from_raw(case)?)),
            Kind::Equivocation(raw) => Self::Equivocation(Equivocation::from_raw(raw)?),
            Kind::Omission(raw) => Self::Omission(Omission {
                receipt: required(raw.receipt, "receipt")?,
                sum: required(raw.sum, "sum")?,
                commit: raw.commit,
            }),
            Kind::Case(case) if case.len <= limit::BLAME_CASE as u64 => {
                Self::Case { blob: wire::id(&case.blob, "case.blob")?, len: ByteCount(case.len) }
            }
            Kind::Case(_) => return Err(WireError::field("case.len")),
        })
    }

    /// As sent.
    pub fn to_raw(&self) -> pb::RoundEvidence {
        use pb::round_evidence::Kind;
        let kind = match self {
            Self::Blame(case) => Kind::Blame(case.to_raw()),
            Self::Equivocation(pair) => Kind::Equivocation(pair.to_raw()),
            Self::Omission(omission) => Kind::Omission(pb::Omission {
                receipt: Some(omission.receipt.clone()),
                sum: Some(omission.sum.clone()),
                commit: omission.commit.clone(),
            }),
            Self::Case { blob, len } => Kind::Case(pb::CaseRef { blob: (*blob).into(), len: len.0 }),
        };
        pb::RoundEvidence { kind: Some(kind) }
    }
}

/// Someone lied in a round. Signed by who says so, which is not necessarily who was lied to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundProof {
    /// Mesh in which it holds.
    pub network: Network,
    /// Who lied.
    pub accused: Hotkey,
    /// What proves it.
    pub evidence: Evidence,
}

impl WireMessage for RoundProof {
    type Raw = pb::RoundProof;
    const MAX: usize = limit::EVIDENCE + (1 << 10);

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Ok(Self {
            network: Network { genesis: wire::array(&raw.genesis, "genesis")?, netuid: wire::netuid(raw.netuid)? },
            accused: wire::id(&raw.accused, "accused")?,
            evidence: Evidence::from_raw(required(raw.evidence, "evidence")?)?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::RoundProof {
            genesis: Bytes::copy_from_slice(&self.network.genesis),
            netuid: self.network.netuid.into(),
            accused: self.accused.into(),
            evidence: Some(self.evidence.to_raw()),
        }
    }
}

impl Payload for RoundProof {
    const CONTEXT: &'static str = "round-proof";
    const SCHEME: Scheme = Scheme::Sr25519;
}

impl Signed<RoundProof> {
    /// Who says so.
    pub fn accuser(&self) -> Hotkey {
        Hotkey(self.signer())
    }
}
