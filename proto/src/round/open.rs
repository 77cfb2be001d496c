//! What the leader says: a round opens, changes, closes.

use std::ops::Range;

use super::{ChunkSet, GroupMember, Mode, Rank, Ranks, RoundOp, RoundSettings, rank};
use crate::crypto::{Context, Payload, Scheme, Signed};
use crate::id::{Digest, GroupId, Hotkey, NodeId, RoundId};
use crate::pb;
use crate::rules::round::dtype::{Dtype, Wire};
use crate::rules::round::layout::ChunkMap;
use crate::wire::{self, WireError, WireMessage, limit};

/// A member that takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RoundMember {
    /// Its place in the roster.
    pub rank: Rank,
    /// Signs.
    pub hotkey: Hotkey,
    /// Is dialled.
    pub node: NodeId,
}

/// A range of groups and who sums them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundPart {
    /// Who sums.
    pub reducer: GroupMember,
    /// To whom members turn when no receipt comes.
    pub backup: Option<GroupMember>,
    /// Which groups.
    pub groups: Range<u64>,
}

/// A round opens. Signed by the lowest live rank; two different ones of a group and seq are an equivocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundOpen {
    /// The group.
    pub group: GroupId,
    /// Version of its roster.
    pub roster: u64,
    /// The round's place among those of the group.
    pub seq: u64,
    /// Rank of the signer.
    pub leader: Rank,
    /// What is done.
    pub op: RoundOp,
    /// With elements of this type.
    pub dtype: Dtype,
    /// Elements of each tensor, none of them empty; together, in order, they are one element space.
    pub lens: Vec<u64>,
    /// How.
    pub settings: RoundSettings,
    /// Who takes part, ranks ascending.
    pub members: Vec<RoundMember>,
    /// Who sums what: in order, covering every group once.
    pub parts: Vec<RoundPart>,
    /// Groups of a chunk: a power of two, 1 to 256.
    pub chunk_groups: u32,
    /// Milliseconds that a stage may take.
    pub deadline_ms: u64,
}

impl RoundOpen {
    /// Elements of all tensors; saturates.
    pub fn elements(&self) -> u64 {
        self.lens.iter().fold(0, |sum, len| sum.saturating_add(*len))
    }

    /// What its words mean, in verified mode; `None` in others.
    pub fn wire(&self) -> Option<Wire> {
        let verified = self.settings.mode == Mode::Verified && self.op.is_sum();
        verified.then(|| Wire::of(self.dtype, self.settings.compress, self.members.len())).flatten()
    }

    /// Bytes of a chunk's input word and output word: the type's own outside verified mode.
    pub fn word_lens(&self) -> (usize, usize) {
        self.wire().map_or((self.dtype.len(), self.dtype.len()), |wire| (wire.input().len(), wire.output().len()))
    }

    /// The member of a rank, unless it takes no part.
    pub fn member(&self, rank: Rank) -> Option<&RoundMember> {
        let place = self.members.binary_search_by_key(&rank, |member| member.rank).ok()?;
        self.members.get(place)
    }

    /// Ranks that take part.
    pub fn ranks(&self) -> Ranks {
        self.members.iter().map(|member| member.rank).collect()
    }

    /// That the fields fit together, and what follows from them: where the chunks are. What came from the wire has been
    /// through this; a leader calls it for the round that it is about to sign.
    pub fn check(&self) -> Result<ChunkMap, WireError> {
        let ensure = |holds: bool, field| if holds { Ok(()) } else { Err(WireError::field(field)) };
        let ascending = self.members.windows(2).all(|pair| pair[0].rank < pair[1].rank);
        ensure(ascending && !self.members.is_empty() && self.members.len() <= limit::MEMBERS, "members")?;
        ensure(self.member(self.leader).is_some(), "leader")?;
        if let RoundOp::Reduce { root } | RoundOp::Broadcast { root } = self.op {
            ensure(self.member(root).is_some(), "op.root")?;
        }
        let verified = self.settings.mode == Mode::Verified;
        ensure(!verified || !self.op.is_reduction() || self.wire().is_some(), "mode")?;
        ensure(verified || self.settings.compress == Default::default(), "compress")?;
        ensure(self.lens.len() <= limit::TENSORS && self.lens.iter().all(|len| *len > 0), "lens")?;
        ensure(self.parts.len() <= limit::PARTS, "parts")?;
        let parts: Vec<Range<u64>> = self.parts.iter().map(|part| part.groups.clone()).collect();
        ChunkMap::new(self.elements(), &parts, self.chunk_groups).ok_or(WireError::field("parts"))
    }
}

impl Signed<RoundOpen> {
    /// The round.
    pub fn id(&self) -> RoundId {
        RoundId(Context::ROUND.digest_one(self.payload()).0)
    }

    /// Whether the signer is the leader that it names.
    pub fn is_by_its_leader(&self) -> bool {
        self.member(self.leader).is_some_and(|leader| leader.hotkey.0 == self.signer())
    }
}

/// Digest of tensors' lengths, by which members see that they mean the same tensors.
pub fn lens_digest(lens: &[u64]) -> Digest {
    let bytes: Vec<u8> = lens.iter().flat_map(|len| len.to_le_bytes()).collect();
    Context::ROUND_LENS.digest_one(&bytes)
}

impl WireMessage for RoundOpen {
    type Raw = pb::RoundOpen;
    const MAX: usize = limit::ROUND_OPEN;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        if raw.members.len() > limit::MEMBERS || raw.parts.len() > limit::PARTS {
            return Err(WireError::field("members or parts"));
        }
        let open = Self {
            group: wire::id(&raw.group, "group")?,
            roster: raw.roster,
            seq: raw.seq,
            leader: rank(raw.leader, "leader")?,
            op: RoundOp::from_raw(raw.op)?,
            dtype: Dtype::from_raw(raw.dtype)?,
            lens: raw.lens,
            settings: RoundSettings::from_raw(raw.settings)?,
            members: raw.members.into_iter().map(member_from_raw).collect::<Result<_, WireError>>()?,
            parts: raw.parts.into_iter().map(part_from_raw).collect::<Result<_, WireError>>()?,
            chunk_groups: raw.chunk_groups,
            deadline_ms: raw.deadline_ms,
        };
        open.check()?;
        Ok(open)
    }

    fn to_raw(&self) -> Self::Raw {
        let member =
            |m: &RoundMember| pb::RoundMember { rank: m.rank.into(), hotkey: m.hotkey.into(), node: m.node.into() };
        let part = |p: &RoundPart| pb::RoundPart {
            reducer: Some(p.reducer.to_raw()),
            backup: p.backup.map(GroupMember::to_raw),
            first: p.groups.start,
            groups: p.groups.end.saturating_sub(p.groups.start),
        };
        pb::RoundOpen {
            group: self.group.into(),
            roster: self.roster,
            seq: self.seq,
            leader: self.leader.into(),
            op: Some(self.op.to_raw()),
            dtype: Some(self.dtype.to_raw()),
            lens: self.lens.clone(),
            settings: Some(self.settings.to_raw()),
            members: self.members.iter().map(member).collect(),
            parts: self.parts.iter().map(part).collect(),
            chunk_groups: self.chunk_groups,
            deadline_ms: self.deadline_ms,
        }
    }
}

fn member_from_raw(raw: pb::RoundMember) -> Result<RoundMember, WireError> {
    Ok(RoundMember {
        rank: rank(raw.rank, "members.rank")?,
        hotkey: wire::id(&raw.hotkey, "members.hotkey")?,
        node: wire::id(&raw.node, "members.node")?,
    })
}

fn part_from_raw(raw: pb::RoundPart) -> Result<RoundPart, WireError> {
    let end = raw.first.checked_add(raw.groups).ok_or(WireError::field("parts.groups"))?;
    Ok(RoundPart {
        reducer: GroupMember::from_raw(wire::required(raw.reducer, "parts.reducer")?)?,
        backup: raw.backup.map(GroupMember::from_raw).transpose()?,
        groups: raw.first..end,
    })
}

impl Payload for RoundOpen {
    const CONTEXT: &'static str = "round-open";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// A part moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PartMove {
    /// Which.
    pub part: u32,
    /// To whom.
    pub reducer: GroupMember,
}

/// A round changes: ranks are dropped, parts move. Signed by the lowest rank still live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundAmend {
    /// The round.
    pub round: RoundId,
    /// Its place among the round's amendments, from 1.
    pub number: u32,
    /// Rank of the signer.
    pub leader: Rank,
    /// All ranks dropped so far.
    pub dropped: Ranks,
    /// Parts that move now, ascending.
    pub moves: Vec<PartMove>,
    /// Chunks that stay settled.
    pub keep: ChunkSet,
}

impl RoundAmend {
    /// Whether it may stand in `open`'s round: by a live member, over parts and ranks that exist.
    pub fn fits(&self, open: &RoundOpen) -> bool {
        self.dropped.is_subset(&open.ranks())
            && open.member(self.leader).is_some()
            && !self.dropped.contains(self.leader)
            && self.moves.iter().all(|one| (one.part as usize) < open.parts.len())
    }
}

impl WireMessage for RoundAmend {
    type Raw = pb::RoundAmend;
    const MAX: usize = 32 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        let ascending = raw.moves.windows(2).all(|pair| pair[0].part < pair[1].part);
        if raw.moves.len() > limit::PARTS || !ascending {
            return Err(WireError::field("moves"));
        }
        if raw.number == 0 || raw.number as usize > limit::AMENDS {
            return Err(WireError::field("number"));
        }
        let moved = |one: pb::PartMove| {
            if one.part as usize >= limit::PARTS {
                return Err(WireError::field("moves.part"));
            }
            let reducer = GroupMember::from_raw(wire::required(one.reducer, "moves.reducer")?)?;
            Ok(PartMove { part: one.part, reducer })
        };
        Ok(Self {
            round: wire::id(&raw.round, "round")?,
            number: raw.number,
            leader: rank(raw.leader, "leader")?,
            dropped: Ranks::from_bytes(&raw.dropped, "dropped")?,
            moves: raw.moves.into_iter().map(moved).collect::<Result<_, WireError>>()?,
            keep: ChunkSet::from_bytes(&raw.keep, "keep")?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        let moved = |one: &PartMove| pb::PartMove { part: one.part, reducer: Some(one.reducer.to_raw()) };
        pb::RoundAmend {
            round: self.round.into(),
            number: self.number,
            leader: self.leader.into(),
            dropped: self.dropped.to_bytes(),
            moves: self.moves.iter().map(moved).collect(),
            keep: self.keep.to_bytes(),
        }
    }
}

impl Payload for RoundAmend {
    const CONTEXT: &'static str = "round-amend";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// A round is over: every chunk has settled. Signed by the leader.
///
/// It names one digest over all SumCommits, since those of 65,536 chunks are 2 MiB: each member has seen them and computes
/// it too. Where two differ, the members' reports (see [`super::RoundDone`]) say in which chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundClose {
    /// The round.
    pub round: RoundId,
    /// Number of the last amendment, 0 for none.
    pub amend: u32,
    /// Number of chunks.
    pub chunks: u32,
    /// [`sums_digest`] of all chunks.
    pub sums: Digest,
    /// Ranks that the result is without.
    pub dropped: Ranks,
}

/// Digest over the digests of all chunks' SumCommits, in order.
pub fn sums_digest(sums: impl IntoIterator<Item = Digest>) -> Digest {
    let mut hasher = Context::ROUND_SUMS.hasher();
    for sum in sums {
        hasher.update(sum.as_ref());
    }
    Digest(*hasher.finalize().as_bytes())
}

impl WireMessage for RoundClose {
    type Raw = pb::RoundClose;
    const MAX: usize = 256;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        if raw.chunks as usize > limit::CHUNKS || raw.amend as usize > limit::AMENDS {
            return Err(WireError::field("chunks or amend"));
        }
        Ok(Self {
            round: wire::id(&raw.round, "round")?,
            amend: raw.amend,
            chunks: raw.chunks,
            sums: wire::id(&raw.sums, "sums")?,
            dropped: Ranks::from_bytes(&raw.dropped, "dropped")?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::RoundClose {
            round: self.round.into(),
            amend: self.amend,
            chunks: self.chunks,
            sums: self.sums.into(),
            dropped: self.dropped.to_bytes(),
        }
    }
}

impl Payload for RoundClose {
    const CONTEXT: &'static str = "round-close";
    const SCHEME: Scheme = Scheme::Sr25519;
}
