//! A reducer's side of one round: performs what its machine decides.
//!
//! Inputs of a chunk are held from its grant until every live member has settled it; what was signed about it stays until
//! the round is forgotten, so that validators can check it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{Digest, NodeId};
use sundara_proto::pb;
use sundara_proto::pb::round_frame::Kind as Frame;
use sundara_proto::round::{
    ChunkCommit, ChunkReceipt, ChunkTags, NonceSet, Rank, Ranks, RoundAmend, SumCommit, nonce_hash,
};
use sundara_proto::rules::round::tree;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use super::compute::{self, Summed};
use super::lane::{Event, Lane};
use super::terms::{Round, change_of};
use super::transcripts::Transcripts;
use super::{Ctx, Lie};
use crate::domain::round::reducer::{Input, Output, ReducerMachine};
use crate::domain::round::{At, Proof, plan};

/// A round without a word from anyone is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(120);
/// Results of sums that wait for the round.
const COMPUTED_QUEUED_MAX: usize = 256;

struct Computed {
    at: At,
    result: Result<Summed, Rank>,
}

#[derive(Default)]
struct Held {
    scales: BTreeMap<Rank, Bytes>,
    shared: Vec<u8>,
    commits: BTreeMap<Rank, Signed<ChunkCommit>>,
    /// Words that are whole, with the root that they have.
    inputs: BTreeMap<Rank, (Arc<Vec<u8>>, [u8; 32])>,
    out: Option<Arc<Vec<u8>>>,
    sum: Option<Signed<SumCommit>>,
    nonces: BTreeMap<Rank, [u8; 32]>,
    nonce_set: Option<Signed<NonceSet>>,
    tags: BTreeMap<Rank, pb::Signed>,
    /// Memory, given back when the chunk is freed.
    _memory: Option<OwnedSemaphorePermit>,
}

/// One round at a reducer.
pub(super) struct Reducer {
    ctx: Arc<Ctx>,
    round: Arc<Round>,
    machine: ReducerMachine,
    start: Instant,
    ranks: HashMap<NodeId, Rank>,
    lanes: BTreeMap<Rank, Lane>,
    amends: Vec<Signed<RoundAmend>>,
    held: HashMap<u32, Held>,
    attempts: HashMap<u32, u32>,
    events: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    computed: (mpsc::Sender<Computed>, mpsc::Receiver<Computed>),
    transcripts: Arc<Transcripts>,
    timer: Option<Instant>,
    heard: Instant,
    bytes_in: BTreeMap<Rank, u64>,
}

impl Reducer {
    pub(super) fn new(ctx: Arc<Ctx>, round: Arc<Round>, events: (mpsc::Sender<Event>, mpsc::Receiver<Event>)) -> Self {
        let me = ctx.net.local().node;
        let mine = (0..).zip(&round.open.parts).filter(|(_, p)| p.reducer.node == me).map(|(i, _)| i).collect();
        let largest =
            round.chunk(0).map_or(1, |c| round.input_len(&c) * round.open.members.len() + round.output_len(&c));
        let members = round.open.members.len() as u64;
        let budget = plan::REDUCER_BYTES + members * plan::REDUCER_BYTES_A_MEMBER;
        let window = usize::try_from(budget / (largest as u64).max(1)).unwrap_or(1).clamp(1, 64);
        // Half of the members' patience: they are to hear for whom it waits before they lose it.
        let machine = ReducerMachine::new(round.shape.clone(), mine, window, round.stall() / 2);
        let ranks = round.open.members.iter().map(|m| (m.node, m.rank)).collect();
        let transcripts = ctx.transcripts.clone();
        transcripts.open(&round);
        Self {
            machine,
            start: Instant::now(),
            ranks,
            lanes: BTreeMap::new(),
            amends: Vec::new(),
            held: HashMap::new(),
            attempts: HashMap::new(),
            events,
            computed: mpsc::channel(COMPUTED_QUEUED_MAX),
            transcripts,
            timer: None,
            heard: Instant::now(),
            bytes_in: BTreeMap::new(),
            ctx,
            round,
        }
    }

    /// Serves the round until its members are gone, or nothing comes any more.
    pub(super) async fn run(mut self, mut joining: mpsc::Receiver<(Lane, pb::RoundHello)>) {
        loop {
            let forget = self.heard + FORGET_AFTER;
            tokio::select! {
                biased;
                joined = joining.recv() => match joined {
                    Some((lane, hello)) => self.join(lane, hello),
                    None => break,
                },
                computed = self.computed.1.recv() => match computed {
                    Some(computed) => self.on_computed(computed),
                    None => break,
                },
                event = self.events.1.recv() => match event {
                    Some(event) => {
                        self.heard = Instant::now();
                        self.on_event(event);
                        if self.lanes.is_empty() {
                            break;
                        }
                    }
                    None => break,
                },
                () = sleep_until(self.timer), if self.timer.is_some() => {
                    self.timer = None;
                    self.act(Input::Timer);
                }
                () = tokio::time::sleep_until(forget) => break,
            }
        }
        for lane in self.lanes.values() {
            lane.forget(self.round.key);
        }
        for (_, held) in self.held.drain() {
            recycle(&self.ctx, held);
        }
    }

    /// A member's lane, with the round's amendments as it knows them.
    fn join(&mut self, lane: Lane, hello: pb::RoundHello) {
        self.heard = Instant::now();
        let Some(rank) = self.ranks.get(&lane.peer().node).copied() else { return };
        if !lane.route(self.round.key, self.events.0.clone()) {
            return;
        }
        self.lanes.insert(rank, lane);
        self.amend(hello.amends);
    }

    fn amend(&mut self, amends: Vec<pb::Signed>) {
        for raw in amends {
            let Ok(amend) = Signed::<RoundAmend>::verify(&self.ctx.network, raw) else { return };
            let open = &self.round.open;
            let leader = open.member(amend.leader).is_some_and(|m| m.hotkey.0 == amend.signer());
            let next = amend.number == self.machine.changes() + 1;
            if amend.round != self.round.id || !next || !leader || !amend.fits(open) {
                continue;
            }
            let mut nodes = self.round.nodes();
            let change = change_of(&self.round, self.amends.last().map(|a| a.value()), &amend, &mut nodes);
            for chunk in change.resets(&self.round.shape) {
                self.attempts.insert(chunk, change.number);
                self.free(chunk);
            }
            self.amends.push(amend);
            let mine = self.mine();
            self.act(Input::Changed { change, mine });
        }
    }

    /// Parts that are this node's by the round and its amendments.
    fn mine(&self) -> Vec<usize> {
        let me = self.ctx.net.local().node;
        let mut now: Vec<NodeId> = self.round.open.parts.iter().map(|p| p.reducer.node).collect();
        for amend in &self.amends {
            for moved in &amend.moves {
                if let Some(place) = now.get_mut(moved.part as usize) {
                    *place = moved.reducer.node;
                }
            }
        }
        (0..).zip(now).filter(|(_, node)| *node == me).map(|(part, _)| part).collect()
    }

    fn attempt(&self, chunk: u32) -> u32 {
        self.attempts.get(&chunk).copied().unwrap_or(0)
    }

    fn act(&mut self, input: Input) {
        for output in self.machine.handle(input, self.start.elapsed()) {
            self.perform(output);
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Frame { peer, frame } => {
                if let Some(rank) = self.ranks.get(&peer.node).copied() {
                    self.on_frame(rank, frame);
                }
            }
            Event::Words { peer, at, words, root } => {
                let Some(rank) = self.ranks.get(&peer.node).copied() else { return };
                *self.bytes_in.entry(rank).or_default() += words.len() as u64;
                if self.attempt(at.chunk) != at.attempt {
                    return self.ctx.buffers.give(words);
                }
                match self.held.get_mut(&at.chunk) {
                    Some(held) => {
                        held.inputs.insert(rank, (Arc::new(words), root));
                        self.received(rank, at);
                    }
                    None => self.ctx.buffers.give(words),
                }
            }
            Event::Gone { peer, reason } => {
                if let Some(rank) = self.ranks.get(&peer.node) {
                    tracing::debug!(rank, reason, "a member's lane is gone");
                    self.lanes.remove(rank);
                }
            }
            Event::Moved { .. } | Event::Sent { .. } => {}
        }
    }

    fn on_frame(&mut self, rank: Rank, frame: Frame) {
        match frame {
            Frame::Hello(hello) => self.amend(hello.amends),
            Frame::Scale(scale) => self.on_scale(rank, scale),
            Frame::Commit(raw) => self.on_commit(rank, raw),
            Frame::Nonce(nonce) => {
                let at = At { chunk: nonce.chunk, attempt: nonce.attempt };
                let Ok(value) = <[u8; 32]>::try_from(nonce.nonce.as_ref()) else { return };
                let Some(held) = self.current(at) else { return };
                let committed = held.commits.get(&rank).and_then(|c| c.fixed).map(|fixed| fixed.nonce);
                if committed == Some(nonce_hash(&value)) {
                    held.nonces.insert(rank, value);
                    self.act(Input::Nonce { rank, at });
                }
            }
            Frame::Tags(raw) => {
                let Ok(tags) = Signed::<ChunkTags>::verify(&self.ctx.network, raw.clone()) else { return };
                let at = At { chunk: tags.chunk, attempt: tags.attempt };
                let signer = self.round.open.member(rank).is_some_and(|m| m.hotkey.0 == tags.signer());
                let Some(held) = self.current(at) else { return };
                let fits = held.sum.as_ref().is_some_and(|s| s.digest() == tags.sum)
                    && held.nonce_set.as_ref().is_some_and(|n| n.digest() == tags.nonces);
                if signer && tags.rank == rank && fits {
                    held.tags.insert(rank, raw);
                    self.act(Input::Tags { rank, at });
                }
            }
            Frame::Settled(settled) => {
                self.act(Input::Settled { rank, at: At { chunk: settled.chunk, attempt: settled.attempt } });
            }
            Frame::Dispute(dispute) => self.open_group(rank, &dispute),
            _ => {}
        }
    }

    fn current(&mut self, at: At) -> Option<&mut Held> {
        if self.attempt(at.chunk) != at.attempt {
            return None;
        }
        self.held.get_mut(&at.chunk)
    }

    fn on_scale(&mut self, rank: Rank, scale: pb::RoundScale) {
        let at = At { chunk: scale.chunk, attempt: scale.attempt };
        let Some(chunk) = self.round.chunk(at.chunk) else { return };
        if self.attempt(at.chunk) != at.attempt || !self.machine.is_live(rank) {
            return;
        }
        let scaled =
            self.round.wire.is_some() && self.round.shape.sends(rank, at.chunk) && !self.round.is_sole(at.chunk);
        if scaled && scale.exponents.len() != sundara_proto::rules::round::layout::blocks(chunk.len()) {
            return self.abort(rank, at, "scales of another length than the chunk's");
        }
        self.held.entry(at.chunk).or_default().scales.insert(rank, scale.exponents);
        self.act(Input::Offered { rank, at });
    }

    fn on_commit(&mut self, rank: Rank, raw: pb::Signed) {
        let Ok(commit) = Signed::<ChunkCommit>::verify(&self.ctx.network, raw) else { return };
        let at = At { chunk: commit.chunk, attempt: commit.attempt };
        let signer = self.round.open.member(rank).is_some_and(|m| m.hotkey.0 == commit.signer());
        let (round, Some(chunk)) = (self.round.clone(), self.round.chunk(at.chunk)) else { return };
        let Some(held) = self.current(at) else { return };
        let scaled = round.shape.proof == Proof::Tags && !round.is_sole(at.chunk);
        let scales = !scaled
            || commit.fixed.is_some_and(|fixed| {
                let own = held.scales.get(&rank).map(|s| compute::scales_digest(s));
                own == Some(fixed.scale) && fixed.shared == compute::scales_digest(&held.shared)
            });
        let fits = signer
            && commit.rank == rank
            && commit.round == round.id
            && commit.len == round.input_len(&chunk) as u64
            && scales;
        if !fits {
            return self.abort(rank, at, "a commitment that does not fit the chunk");
        }
        held.commits.entry(rank).or_insert(commit);
        self.received(rank, at);
    }

    /// Whether a member's words and commitment are both here, and agree.
    fn received(&mut self, rank: Rank, at: At) {
        let off = self.round.shape.proof == Proof::Off;
        let Some(held) = self.current(at) else { return };
        let (Some(commit), Some((_, root))) = (held.commits.get(&rank), held.inputs.get(&rank)) else { return };
        if !off && commit.root.0 != *root {
            held.inputs.remove(&rank);
            return self.abort(rank, at, "words that do not have their committed root");
        }
        self.act(Input::Received { rank, at });
    }

    fn abort(&self, rank: Rank, at: At, reason: &str) {
        tracing::info!(rank, chunk = at.chunk, reason, "a member broke the rules");
        if let Some(lane) = self.lanes.get(&rank) {
            let abort = pb::RoundAbort { attempt: at.attempt, chunk: Some(at.chunk), reason: reason.to_owned() };
            lane.send(self.round.key, Frame::Abort(abort));
        }
    }

    fn perform(&mut self, output: Output) {
        match output {
            Output::Grant { at, senders } => self.grant(at, &senders),
            Output::Receipt { rank, at } => self.receipt(rank, at),
            Output::Sum { at, senders } => self.sum(at, &senders),
            Output::Nonces { at, late } => self.nonces(at, &late),
            Output::TagSet(at) => {
                let Some(held) = self.current(at) else { return };
                let tags: Vec<pb::Signed> = held.tags.values().cloned().collect();
                let (round, held) = (self.round.clone(), self.held.get(&at.chunk));
                if let Some(held) = held {
                    let commits = held.commits.values().map(Signed::to_wire).collect();
                    let (sum, nonces) = (held.sum.as_ref(), held.nonce_set.as_ref());
                    self.transcripts.settle(&round, at.chunk, sum, commits, nonces, tags.clone());
                }
                self.broadcast(&Frame::TagSet(pb::RoundTagSet { attempt: at.attempt, chunk: at.chunk, tags }));
            }
            Output::Free(at) => self.free(at.chunk),
            Output::Waiting { part, ranks } => {
                let ranks: Ranks = ranks.into_iter().collect();
                let part = u32::try_from(part).unwrap_or(0);
                self.broadcast(&Frame::Waiting(pb::RoundWaiting { part, ranks: ranks.to_bytes() }));
            }
            Output::SetTimer(at) => self.timer = Some(self.start + at),
        }
    }

    fn grant(&mut self, at: At, senders: &[Rank]) {
        let Some(chunk) = self.round.chunk(at.chunk) else { return };
        let (round, len) = (self.round.clone(), self.round.input_len(&chunk));
        let hash = round.shape.proof != Proof::Off;
        let Some(held) = self.held.get_mut(&at.chunk) else { return };
        for rank in senders {
            if let Some(lane) = self.lanes.get(rank) {
                lane.expect(round.key, at, self.ctx.buffers.take(len), hash);
            }
        }
        let (mut ranks, mut exponents) = (Ranks::empty(), Vec::new());
        if round.wire.is_some() && !round.is_sole(at.chunk) {
            for rank in senders {
                ranks.insert(*rank);
                exponents.push(held.scales.get(rank).cloned().unwrap_or_default());
            }
            held.shared = compute::shared(&exponents);
        }
        let set = pb::RoundScales { attempt: at.attempt, chunk: at.chunk, ranks: ranks.to_bytes(), exponents };
        self.broadcast(&Frame::ScaleSet(set));
    }

    fn receipt(&mut self, rank: Rank, at: At) {
        if self.ctx.lie == Lie::NoReceipts {
            return;
        }
        let Some(root) = self.current(at).and_then(|h| h.commits.get(&rank)).map(|c| c.root) else { return };
        let receipt = ChunkReceipt { round: self.round.id, attempt: at.attempt, chunk: at.chunk, rank, root };
        let receipt = Signed::sign(&self.ctx.network, &self.ctx.key, receipt).to_wire();
        if let Some(lane) = self.lanes.get(&rank) {
            lane.send(self.round.key, Frame::Receipt(receipt));
        }
    }

    fn sum(&mut self, at: At, senders: &[Rank]) {
        if self.ctx.lie == Lie::Stall {
            return;
        }
        let Some(held) = self.held.get(&at.chunk) else { return };
        let inputs: Vec<(Rank, Arc<Vec<u8>>)> =
            senders.iter().filter_map(|rank| Some((*rank, held.inputs.get(rank)?.0.clone()))).collect();
        let (round, tx, buffers, lie) =
            (self.round.clone(), self.computed.0.clone(), self.ctx.buffers.clone(), self.ctx.lie);
        self.ctx.compute(move || {
            let result = compute::sum(&round, at.chunk, &inputs, &buffers, lie);
            drop(tx.blocking_send(Computed { at, result }));
        });
    }

    fn on_computed(&mut self, Computed { at, result }: Computed) {
        let (id, sole) = (self.round.id, self.round.is_sole(at.chunk));
        let scaled = self.round.shape.proof == Proof::Tags && !sole;
        if self.attempt(at.chunk) != at.attempt {
            if let Ok(summed) = result {
                self.ctx.buffers.give_shared(summed.out);
            }
            return;
        }
        let summed = match result {
            Ok(summed) => summed,
            Err(rank) => return self.abort(rank, at, "words beyond the limit"),
        };
        let Some(held) = self.held.get_mut(&at.chunk) else { return };
        let participants: Ranks = held.inputs.keys().copied().collect();
        let mut sum = SumCommit {
            round: id,
            attempt: at.attempt,
            chunk: at.chunk,
            participants,
            commits: participants.iter().filter_map(|r| held.commits.get(&r)).map(|c| c.digest()).collect(),
            shared: scaled.then(|| compute::scales_digest(&held.shared)),
            out_root: Digest(summed.root),
        };
        held.out = Some(summed.out.clone());
        let commits: Vec<pb::Signed> = held.commits.values().map(Signed::to_wire).collect();
        let signed = Signed::sign(&self.ctx.network, &self.ctx.key, sum.clone());
        held.sum = Some(signed.clone());
        let frame = pb::RoundSum { sum: Some(signed.to_wire()), commits };
        // A liar that tells one member another sum than the rest.
        let other = (self.ctx.lie == Lie::TwoSums).then(|| {
            let out = Arc::new(compute::spoiled(&summed.out));
            sum.out_root = Digest(*blake3::hash(&out).as_bytes());
            let signed = Signed::sign(&self.ctx.network, &self.ctx.key, sum);
            (pb::RoundSum { sum: Some(signed.to_wire()), commits: frame.commits.clone() }, out)
        });
        let last = self.lanes.keys().next_back().copied();
        for (rank, lane) in self.lanes.iter().filter(|(rank, _)| self.machine.is_live(**rank)) {
            let (frame, out) = match &other {
                Some((frame, out)) if Some(*rank) == last => (frame.clone(), out.clone()),
                _ => (frame.clone(), summed.out.clone()),
            };
            lane.send(self.round.key, Frame::Sum(frame));
            if self.round.shape.receives(*rank) {
                lane.send_words(self.round.key, at, out);
            }
        }
        if !scaled {
            let (round, held) = (self.round.clone(), self.held.get(&at.chunk));
            if let Some(held) = held {
                let commits = held.commits.values().map(Signed::to_wire).collect();
                self.transcripts.settle(&round, at.chunk, held.sum.as_ref(), commits, None, Vec::new());
            }
        }
        self.act(Input::Summed(at));
    }

    fn nonces(&mut self, at: At, late: &[Rank]) {
        let id = self.round.id;
        let Some(held) = self.current(at) else { return };
        let Some(sum) = &held.sum else { return };
        if !late.is_empty() {
            tracing::info!(chunk = at.chunk, ?late, "members were late with their nonces");
        }
        let of = |rank: Rank| held.nonces.get(&rank).copied().unwrap_or_default();
        let set = NonceSet {
            round: id,
            attempt: at.attempt,
            chunk: at.chunk,
            sum: sum.digest(),
            nonces: sum.participants.iter().map(of).collect(),
        };
        let set = Signed::sign(&self.ctx.network, &self.ctx.key, set);
        if let Some(held) = self.current(at) {
            held.nonce_set = Some(set.clone());
        }
        self.broadcast(&Frame::Nonces(set.to_wire()));
    }

    /// Shows a group: every input and the output.
    fn open_group(&mut self, rank: Rank, dispute: &pb::RoundDispute) {
        let at = At { chunk: dispute.chunk, attempt: dispute.attempt };
        let (input_word, output_word) = self.round.open.word_lens();
        let key = self.round.key;
        let lane = self.lanes.get(&rank).cloned();
        let (Some(lane), Some(held)) = (lane, self.current(at)) else { return };
        let group = dispute.group as usize;
        let frame = |rank: Option<Rank>, opening: Option<tree::Opening>| {
            Frame::Opening(pb::RoundOpening {
                attempt: at.attempt,
                chunk: at.chunk,
                group: dispute.group,
                rank: rank.map(u32::from),
                opening: opening.map(|o| o.to_raw()),
            })
        };
        for (rank, (words, _)) in &held.inputs {
            lane.send(key, frame(Some(*rank), tree::open(words, group, input_word)));
        }
        if let Some(out) = &held.out {
            lane.send(key, frame(None, tree::open(out, group, output_word)));
        }
    }

    fn broadcast(&self, frame: &Frame) {
        for (rank, lane) in &self.lanes {
            if self.machine.is_live(*rank) && !lane.send(self.round.key, frame.clone()) {
                tracing::debug!(rank, "a member takes too few messages");
            }
        }
    }

    fn free(&mut self, chunk: u32) {
        if let Some(held) = self.held.remove(&chunk) {
            recycle(&self.ctx, held);
        }
    }
}

fn recycle(ctx: &Ctx, held: Held) {
    for (_, (words, _)) in held.inputs {
        ctx.buffers.give_shared(words);
    }
    if let Some(out) = held.out {
        ctx.buffers.give_shared(out);
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
