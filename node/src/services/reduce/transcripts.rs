//! What was signed in rounds that this node served, for validators: they check sums from tags alone.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use sundara_proto::crypto::Signed;
use sundara_proto::id::RoundId;
use sundara_proto::pb;
use sundara_proto::round::{NonceSet, SumCommit, Transcript, TranscriptChunk, TranscriptRequest};

use super::terms::Round;

/// Rounds that are remembered.
const ROUNDS_MAX: usize = 64;
/// Bytes that all of them may take, roughly: 0.1 % of what was summed.
const BYTES_MAX: usize = 64 << 20;

struct Kept {
    id: RoundId,
    open: pb::Signed,
    chunks: BTreeMap<u32, TranscriptChunk>,
    parts: Vec<std::ops::Range<u32>>,
    bytes: usize,
}

/// The transcripts of a node.
#[derive(Default)]
pub(super) struct Transcripts {
    rounds: Mutex<VecDeque<Kept>>,
}

impl Transcripts {
    /// A round begins.
    pub(super) fn open(&self, round: &Round) {
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        if rounds.iter().any(|kept| kept.id == round.id) {
            return;
        }
        rounds.push_back(Kept {
            id: round.id,
            open: round.open.to_wire(),
            chunks: BTreeMap::new(),
            parts: round.shape.parts.clone(),
            bytes: 0,
        });
        while rounds.len() > ROUNDS_MAX
            || (rounds.len() > 1 && rounds.iter().map(|k| k.bytes).sum::<usize>() > BYTES_MAX)
        {
            rounds.pop_front();
        }
    }

    /// A chunk settles; a later attempt replaces an earlier one.
    pub(super) fn settle(
        &self,
        round: &Round,
        chunk: u32,
        sum: Option<&Signed<SumCommit>>,
        commits: Vec<pb::Signed>,
        nonces: Option<&Signed<NonceSet>>,
        tags: Vec<pb::Signed>,
    ) {
        let Some(sum) = sum else { return };
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(kept) = rounds.iter_mut().find(|kept| kept.id == round.id) else { return };
        let size = |signed: &pb::Signed| signed.payload.len() + 96;
        kept.bytes += commits.iter().chain(&tags).map(size).sum::<usize>() + sum.wire_len();
        let nonces = nonces.map(Signed::to_wire);
        kept.chunks.insert(chunk, TranscriptChunk { sum: sum.to_wire(), commits, nonces, tags });
    }

    /// A page, if the round is remembered.
    pub(super) fn page(&self, request: &TranscriptRequest) -> Option<Transcript> {
        let rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = rounds.iter().find(|kept| kept.id == request.round)?;
        let part = kept.parts.get(request.part as usize)?;
        let from = request.chunk.max(part.start);
        let mut page = Transcript { open: Some(kept.open.clone()), ..Transcript::default() };
        let mut bytes = kept.open.payload.len();
        for (chunk, entry) in kept.chunks.range(from..part.end.max(from)) {
            if bytes >= Transcript::PAGE {
                page.next = Some(*chunk);
                break;
            }
            let signed = entry.commits.iter().chain(&entry.tags).chain([&entry.sum]).chain(&entry.nonces);
            bytes += signed.map(|s| s.payload.len() + 96).sum::<usize>();
            page.chunks.push(entry.clone());
        }
        Some(page)
    }
}
