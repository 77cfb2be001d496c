//! An open round as this node's machines and drivers see it.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use sundara_proto::crypto::Signed;
use sundara_proto::id::RoundId;
use sundara_proto::round::{ChunkSet, GroupMember, Mode, Rank, RoundAmend, RoundOp, RoundOpen};
use sundara_proto::rules::round::dtype::Wire;
use sundara_proto::rules::round::layout::{Chunk, ChunkMap};
use sundara_proto::wire::WireError;

use super::lane::RoundKey;
use crate::domain::round::{Change, Proof, Shape};

/// A round that was opened, checked, and laid out.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) open: Signed<RoundOpen>,
    pub(super) id: RoundId,
    pub(super) key: RoundKey,
    pub(super) map: ChunkMap,
    pub(super) shape: Shape,
    /// In verified mode.
    pub(super) wire: Option<Wire>,
}

impl Round {
    pub(super) fn new(open: Signed<RoundOpen>) -> Result<Self, WireError> {
        let map = open.check()?;
        let id = open.id();
        let shape = shape_of(&open, &map);
        Ok(Self { key: key_of(&id), wire: open.wire(), shape, map, id, open })
    }

    pub(super) fn chunk(&self, chunk: u32) -> Option<Chunk> {
        self.map.chunk(chunk)
    }

    /// Bytes of the tensors that a chunk covers.
    pub(super) fn bytes_of(&self, chunk: &Chunk) -> Range<usize> {
        let size = self.open.dtype.len() as u64;
        let at = |element: u64| usize::try_from(element * size).unwrap_or(usize::MAX);
        at(chunk.elements.start)..at(chunk.elements.end)
    }

    /// Bytes of a chunk's input.
    pub(super) fn input_len(&self, chunk: &Chunk) -> usize {
        chunk.len() * self.open.word_lens().0
    }

    /// Bytes of a chunk's output.
    pub(super) fn output_len(&self, chunk: &Chunk) -> usize {
        // What only one member sends comes back as it went.
        if self.is_sole(chunk.index) { self.input_len(chunk) } else { chunk.len() * self.open.word_lens().1 }
    }

    /// Whether one member alone sends the chunk.
    pub(super) fn is_sole(&self, chunk: u32) -> bool {
        self.shape.sole.get(chunk as usize).is_some_and(Option::is_some)
    }

    pub(super) fn stall(&self) -> Duration {
        Duration::from_millis(self.open.deadline_ms)
    }

    /// Reducers named by the round, each once: those of the parts, then the backups.
    pub(super) fn nodes(&self) -> Vec<GroupMember> {
        let mut seen = BTreeSet::new();
        let of = self.open.parts.iter().map(|p| p.reducer).chain(self.open.parts.iter().filter_map(|p| p.backup));
        of.filter(|m| seen.insert(m.node)).collect()
    }
}

/// A round's name on lanes.
pub(super) fn key_of(id: &RoundId) -> RoundKey {
    let first: [u8; 8] = id.0.first_chunk().copied().unwrap_or_default();
    u64::from_le_bytes(first)
}

fn shape_of(open: &RoundOpen, map: &ChunkMap) -> Shape {
    let proof = match open.settings.mode {
        Mode::Verified if open.op.is_sum() => Proof::Tags,
        Mode::Verified | Mode::Exact => Proof::Sampled,
        Mode::Off => Proof::Off,
    };
    let sole = match open.op {
        RoundOp::Broadcast { root } => vec![Some(root); map.chunks() as usize],
        _ => Vec::new(),
    };
    let receiver = match open.op {
        RoundOp::Reduce { root } => Some(root),
        _ => None,
    };
    Shape {
        members: open.members.iter().map(|m| m.rank).collect(),
        proof,
        parts: (0..map.parts()).map(|part| map.part_chunks(part)).collect(),
        sole,
        receiver,
    }
}

/// Place of a reducer among the nodes, added if it is new.
pub(super) fn place(nodes: &mut Vec<GroupMember>, reducer: &GroupMember) -> usize {
    nodes.iter().position(|n| n.node == reducer.node).unwrap_or_else(|| {
        nodes.push(*reducer);
        nodes.len() - 1
    })
}

/// What an amendment changes, for the machines. `before`: the amendment before it.
pub(super) fn change_of(
    round: &Round,
    before: Option<&RoundAmend>,
    amend: &RoundAmend,
    nodes: &mut Vec<GroupMember>,
) -> Change {
    let out = |rank: &Rank| before.is_some_and(|b| b.dropped.contains(*rank));
    Change {
        number: amend.number,
        dropped: amend.dropped.iter().filter(|rank| !out(rank)).collect(),
        moved: amend.moves.iter().map(|m| (m.part as usize, place(nodes, &m.reducer))).collect(),
        keep: (0..round.map.chunks()).map(|chunk| amend.keep.contains(chunk)).collect(),
    }
}

/// The chunks of a list of flags.
pub(super) fn set_of(flags: &[bool]) -> ChunkSet {
    flags.iter().zip(0_u32..).filter(|(flag, _)| **flag).map(|(_, chunk)| chunk).collect()
}
