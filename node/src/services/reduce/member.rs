//! A member's side of one round: performs what its machine decides.
//!
//! One task a round. Messages come over lanes, heavy work runs on the workers, the leader is followed by
//! [`super::follow`]. Bytes of a chunk are held from its grant to its settlement and no longer.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{Digest, Hotkey, NodeId};
use sundara_proto::pb;
use sundara_proto::pb::round_frame::Kind as Frame;
use sundara_proto::round::{
    ChunkCommit, ChunkReceipt, ChunkTags, Evidence, FixedCommit, GroupMember, NonceSet, Omission, Rank, Ranks,
    RoundAmend, SumCommit, nonce_hash, sums_digest,
};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::compute::{self, Prepared, Refusal, Tagged};
use super::evidence::Dispute;
use super::group::Group;
use super::lane::{EVENTS_QUEUED_MAX, Event, Lane};
use super::leader::UNSETTLED_MAX;
use super::tensor::Space;
use super::terms::{Round, change_of, set_of};
use super::{Ctx, Outcome, RoundFailure};
use crate::blobs::Access;
use crate::domain::round::member::{Input, MemberMachine, Output};
use crate::domain::round::{At, Proof, plan};

/// Results of work and of dialling that wait for the round.
const COMPUTED_QUEUED_MAX: usize = 1_024;

/// What the leader says, checked, on its way to the round.
#[derive(Debug)]
pub(super) enum Order {
    Amend(Signed<RoundAmend>),
    /// Say how far you are.
    Probe,
    /// Over; digest of the sums that count, and who left.
    Close {
        sums: Digest,
        dropped: Ranks,
    },
    Failed(RoundFailure),
}

/// What a member tells its leader.
pub(super) type Report = pb::round_report::Kind;

/// What workers and dials come back with.
#[allow(clippy::large_enum_variant)] // A few at a time.
enum Computed {
    Lane {
        node: NodeId,
        result: Result<Lane, String>,
    },
    Scales {
        at: At,
        result: Result<Vec<u8>, Refusal>,
    },
    Prepared {
        at: At,
        result: Result<Prepared, Refusal>,
    },
    Tagged {
        at: At,
        tagged: Tagged,
    },
    /// Signatures of everyone's tags are good or not.
    TagSet {
        at: At,
        tags: Option<Vec<Signed<ChunkTags>>>,
    },
    Kept(Result<(), Refusal>),
    /// Who is guilty by the openings of a group.
    Judged {
        at: At,
        guilty: Vec<Hotkey>,
        evidence: Evidence,
    },
}

/// What is held of a chunk that is under way.
struct Held {
    at: At,
    /// This member's own exponents.
    scales: Bytes,
    /// Everyone's, as granted.
    granted: BTreeMap<Rank, Bytes>,
    shared: Arc<Vec<u8>>,
    words: Option<Arc<Vec<u8>>>,
    residual: Option<Vec<f32>>,
    commit: Option<Signed<ChunkCommit>>,
    nonce: [u8; 32],
    receipt: Option<pb::Signed>,
    sum: Option<Signed<SumCommit>>,
    commits: Vec<pb::Signed>,
    out: Option<Arc<Vec<u8>>>,
    out_root: Digest,
    nonces: Option<Signed<NonceSet>>,
    tags: Option<pb::Signed>,
    own_tags: Vec<u64>,
    out_tags: Vec<u64>,
    dispute: Option<Dispute>,
}

impl Held {
    fn new(at: At) -> Self {
        Self {
            at,
            scales: Bytes::new(),
            granted: BTreeMap::new(),
            shared: Arc::default(),
            words: None,
            residual: None,
            commit: None,
            nonce: rand::random(),
            receipt: None,
            sum: None,
            commits: Vec::new(),
            out: None,
            out_root: Digest([0; 32]),
            nonces: None,
            tags: None,
            own_tags: Vec::new(),
            out_tags: Vec::new(),
            dispute: None,
        }
    }
}

/// Everything of one round at a member.
pub(super) struct Member {
    ctx: Arc<Ctx>,
    group: Arc<Group>,
    round: Arc<Round>,
    rank: Rank,
    space: Arc<Space>,
    out: Arc<Mutex<Space>>,
    machine: MemberMachine,
    start: Instant,
    nodes: Vec<GroupMember>,
    lanes: HashMap<NodeId, Lane>,
    dialling: HashMap<NodeId, Vec<At>>,
    live: Ranks,
    amends: Vec<Signed<RoundAmend>>,
    held: HashMap<u32, Held>,
    events: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    computed: (mpsc::Sender<Computed>, mpsc::Receiver<Computed>),
    reports: mpsc::Sender<Report>,
    /// Results that are being written.
    keeping: usize,
    /// Grows whenever something moves.
    progress: u64,
    participants: Vec<u16>,
    /// When a chunk of each part settled last.
    part_done: Vec<Instant>,
}

impl Member {
    pub(super) fn new(
        ctx: Arc<Ctx>,
        group: Arc<Group>,
        round: Arc<Round>,
        space: Arc<Space>,
        out: Space,
        reports: mpsc::Sender<Report>,
    ) -> Self {
        let rank = group.rank();
        let largest = round.chunk(0).map_or(1, |c| round.input_len(&c) + round.output_len(&c)) as u64;
        let window = usize::try_from(plan::MEMBER_BYTES / largest.max(1)).unwrap_or(1).max(round.shape.parts.len());
        let mut machine = MemberMachine::new(rank, round.shape.clone(), window, round.stall());
        let nodes = round.nodes();
        let index = |node: &NodeId| nodes.iter().position(|n| n.node == *node).unwrap_or(0);
        machine.assign(round.open.parts.iter().map(|p| index(&p.reducer.node)));
        let chunks = round.map.chunks() as usize;
        Self {
            rank,
            machine,
            start: Instant::now(),
            nodes,
            lanes: HashMap::new(),
            dialling: HashMap::new(),
            live: round.open.ranks(),
            amends: Vec::new(),
            held: HashMap::new(),
            events: mpsc::channel(EVENTS_QUEUED_MAX),
            computed: mpsc::channel(COMPUTED_QUEUED_MAX),
            reports,
            keeping: 0,
            progress: 0,
            participants: vec![0; chunks],
            part_done: vec![Instant::now(); round.shape.parts.len()],
            ctx,
            group,
            round,
            space,
            out: Arc::new(Mutex::new(out)),
        }
    }

    /// Goes through the round. Ends when the leader closes it, or it fails.
    pub(super) async fn run(mut self, orders: &mut mpsc::Receiver<Order>) -> Result<Outcome, RoundFailure> {
        let result = self.conduct(orders).await;
        if result.is_ok() {
            self.measure();
        }
        for lane in self.lanes.values() {
            lane.forget(self.round.key);
        }
        let dropped = result?;
        let (round, took) = (self.round.id, self.start.elapsed());
        for (_, held) in self.held.drain() {
            recycle(&self.ctx, held);
        }
        let out = Arc::into_inner(self.out).map(|out| out.into_inner().unwrap_or_else(PoisonError::into_inner));
        let out = out.ok_or_else(|| RoundFailure::new("a result is still being written"))?;
        Ok(Outcome {
            round,
            tensors: out.into_tensors(),
            members: self.round.open.members.iter().map(|m| m.rank).collect(),
            dropped: dropped.iter().collect(),
            participants: self.participants,
            took,
        })
    }

    async fn conduct(&mut self, orders: &mut mpsc::Receiver<Order>) -> Result<Ranks, RoundFailure> {
        let mut closing: Option<(Digest, Ranks)> = None;
        let mut timer: Option<Instant> = None;
        self.act(Input::Begin, &mut timer)?;
        loop {
            if let Some((sums, dropped)) = &closing
                && self.keeping == 0
            {
                if *sums != sums_digest(self.machine.sums()) {
                    return Err(RoundFailure::new("the leader closed the round over other sums than this member's"));
                }
                return Ok(*dropped);
            }
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(Order::Amend(amend)) => self.amend(amend, &mut timer)?,
                    Some(Order::Probe) => self.status(),
                    Some(Order::Close { sums, dropped }) => closing = Some((sums, dropped)),
                    Some(Order::Failed(failure)) => return Err(failure),
                    None => return Err(RoundFailure::closed()),
                },
                computed = self.computed.1.recv() => match computed {
                    Some(computed) => self.on_computed(computed, &mut timer)?,
                    None => return Err(RoundFailure::closed()),
                },
                event = self.events.1.recv() => match event {
                    Some(event) => self.on_event(event, &mut timer)?,
                    None => return Err(RoundFailure::closed()),
                },
                () = sleep_until(timer), if timer.is_some() => {
                    timer = None;
                    self.act(Input::Timer, &mut timer)?;
                }
            }
        }
    }

    /// What the reducers of this round carried, for the next plans. Parts that moved say nothing of either.
    fn measure(&self) {
        if !self.amends.is_empty() {
            return;
        }
        for (part, done) in self.round.open.parts.iter().zip(&self.part_done) {
            let groups = part.groups.end - part.groups.start;
            let bytes =
                (groups as usize * sundara_proto::rules::round::layout::GROUP * self.round.open.dtype.len()) as f64;
            let took = done.saturating_duration_since(self.start).as_secs_f64();
            if took > 0.0 {
                self.group.record_reducer(part.reducer.node, bytes / took);
            }
        }
    }

    fn report(&self, report: Report) {
        // The reporter's queue is larger than what a round reports between two amendments; a lost report is made up for
        // by the next stall.
        drop(self.reports.try_send(report));
    }

    fn status(&self) {
        self.report(Report::Status(pb::RoundStatus {
            settled: set_of(&self.machine.settled()).to_bytes(),
            progress: self.progress,
            amend: self.machine.changes(),
            sums: self.held.values().filter_map(|h| h.sum.as_ref()).take(UNSETTLED_MAX).map(Signed::to_wire).collect(),
        }));
    }

    fn fault(&self, part: usize, kind: pb::round_fault::Kind, detail: String, waiting: Ranks) {
        self.report(self.fault_of(part, kind, detail, waiting, None));
    }

    fn fault_of(
        &self,
        part: usize,
        kind: pb::round_fault::Kind,
        detail: String,
        waiting: Ranks,
        evidence: Option<&Evidence>,
    ) -> Report {
        let node = self.machine.reducer(part).and_then(|i| self.nodes.get(i)).map_or(Bytes::new(), |n| n.node.into());
        Report::Fault(pb::RoundFault {
            part: u32::try_from(part).unwrap_or(0),
            node,
            kind: kind.into(),
            detail,
            evidence: evidence.map(Evidence::to_raw),
            waiting: waiting.to_bytes(),
            amend: self.machine.changes(),
        })
    }

    fn amend(&mut self, amend: Signed<RoundAmend>, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        if amend.number != self.machine.changes() + 1 {
            return Ok(());
        }
        if amend.dropped.contains(self.rank) {
            let reason = "the group went on without this member: it was too slow, or could not be reached".to_owned();
            return Err(RoundFailure::members(reason, vec![self.rank]));
        }
        let change = change_of(&self.round, self.amends.last().map(|a| a.value()), &amend, &mut self.nodes);
        for rank in &change.dropped {
            self.live.remove(*rank);
        }
        for lane in self.lanes.values() {
            let hello = pb::RoundHello { open: Some(self.round.open.to_wire()), amends: vec![amend.to_wire()] };
            // One that cannot take it is found by its silence.
            lane.send(self.round.key, Frame::Hello(hello));
        }
        self.amends.push(amend);
        self.act(Input::Changed(change), timer)
    }

    fn act(&mut self, input: Input, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            for output in self.machine.handle(input, self.start.elapsed()) {
                self.perform(output, timer)?;
            }
        }
        Ok(())
    }

    fn perform(&mut self, output: Output, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        match output {
            Output::Expect(_) => {}
            Output::Offer(at) => self.offer(at),
            Output::Prepare(at) => self.prepare(at),
            Output::Send(at) => self.send(at),
            Output::Nonce(at) => {
                let nonce =
                    self.held.get(&at.chunk).map(|held| Bytes::copy_from_slice(&held.nonce)).unwrap_or_default();
                self.tell(at, Frame::Nonce(pb::RoundNonce { attempt: at.attempt, chunk: at.chunk, nonce }));
            }
            Output::Tag(at) => self.tag(at),
            Output::SendTags(at) => {
                if let Some(tags) = self.held.get(&at.chunk).and_then(|held| held.tags.clone()) {
                    self.tell(at, Frame::Tags(tags));
                }
            }
            Output::Keep(at) => self.keep(at),
            Output::Settled(at) => {
                if let Some(done) = self.round.shape.part_of(at.chunk).and_then(|part| self.part_done.get_mut(part)) {
                    *done = Instant::now();
                }
                self.tell(at, Frame::Settled(pb::RoundSettled { attempt: at.attempt, chunk: at.chunk }));
                if !self.round.shape.receives(self.rank)
                    && let Some(held) = self.held.remove(&at.chunk)
                {
                    recycle(&self.ctx, held);
                }
            }
            Output::Forget(at) => {
                if let Some(held) = self.held.remove(&at.chunk) {
                    recycle(&self.ctx, held);
                }
                for lane in self.lanes.values() {
                    lane.unexpect(self.round.key, at);
                }
                for waiting in self.dialling.values_mut() {
                    waiting.retain(|w| *w != at);
                }
            }
            Output::Fault { part, waiting, reason } => {
                let kind = pb::round_fault::Kind::Stalled;
                self.fault(part, kind, reason, waiting.into_iter().collect());
            }
            Output::Done => self.done(),
            Output::SetTimer(at) => *timer = Some(self.start + at),
        }
        Ok(())
    }

    fn done(&self) {
        let sums = self.machine.sums();
        for (i, piece) in sums.chunks(sundara_proto::wire::limit::REPORT_SUMS).enumerate() {
            let first = u32::try_from(i * sundara_proto::wire::limit::REPORT_SUMS).unwrap_or(u32::MAX);
            let bytes: Vec<u8> = piece.iter().flat_map(|sum| sum.0).collect();
            self.report(Report::Done(pb::RoundDone { first, sums: bytes.into(), amend: self.machine.changes() }));
        }
        if sums.is_empty() {
            self.report(Report::Done(pb::RoundDone { first: 0, sums: Bytes::new(), amend: self.machine.changes() }));
        }
    }

    fn reducer_of(&self, chunk: u32) -> Option<GroupMember> {
        let part = self.round.shape.part_of(chunk)?;
        self.nodes.get(self.machine.reducer(part)?).copied()
    }

    fn lane_of(&self, chunk: u32) -> Option<&Lane> {
        self.lanes.get(&self.reducer_of(chunk)?.node)
    }

    fn tell(&self, at: At, frame: Frame) {
        let sent = self.lane_of(at.chunk).is_some_and(|lane| lane.send(self.round.key, frame));
        if !sent {
            tracing::debug!(chunk = at.chunk, "a message found no lane; its silence will be reported");
        }
    }

    /// Computes the scales of a chunk, where there are any; [`Self::announce`] follows.
    fn offer(&mut self, at: At) {
        self.held.insert(at.chunk, Held::new(at));
        if self.round.wire.is_none() || !self.round.shape.sends(self.rank, at.chunk) {
            return self.announce(at);
        }
        let (round, space, tx) = (self.round.clone(), self.space.clone(), self.computed.0.clone());
        let residual = self.group.residual(&self.round, at.chunk);
        self.ctx.compute(move || {
            let result = compute::scales(&round, &space, at.chunk, residual.as_deref());
            drop(tx.blocking_send(Computed::Scales { at, result }));
        });
    }

    /// Says that the chunk can come, over a lane that is made if need be.
    fn announce(&mut self, at: At) {
        let Some(reducer) = self.reducer_of(at.chunk) else { return };
        if let Some(lane) = self.lanes.get(&reducer.node).filter(|lane| !lane.is_over()).cloned() {
            return self.announce_on(&lane, at);
        }
        let waiting = self.dialling.entry(reducer.node).or_default();
        waiting.push(at);
        if waiting.len() > 1 {
            return;
        }
        let (ctx, tx, node) = (self.ctx.clone(), self.computed.0.clone(), reducer.node);
        self.ctx.spawn("dial", async move {
            let result = ctx.lanes.get(&ctx, node).await;
            // A round that is over does not need it.
            drop(tx.send(Computed::Lane { node, result }).await);
        });
    }

    fn announce_on(&self, lane: &Lane, at: At) {
        let (Some(held), Some(chunk)) = (self.held.get(&at.chunk), self.round.chunk(at.chunk)) else { return };
        if self.round.shape.receives(self.rank) {
            let hash = self.round.shape.proof != Proof::Off;
            let buffer = self.ctx.buffers.take(self.round.output_len(&chunk));
            lane.expect(self.round.key, at, buffer, hash);
        }
        let scale = pb::RoundScale { attempt: at.attempt, chunk: at.chunk, exponents: held.scales.clone() };
        lane.send(self.round.key, Frame::Scale(scale));
    }

    fn on_lane(
        &mut self,
        node: NodeId,
        result: Result<Lane, String>,
        timer: &mut Option<Instant>,
    ) -> Result<(), RoundFailure> {
        let waiting = self.dialling.remove(&node).unwrap_or_default();
        match result {
            Ok(lane) => {
                let (key, events) = (self.round.key, self.events.0.clone());
                if !lane.route(key, events) {
                    return self.lost(node, "the stream ended as soon as it was made", timer);
                }
                let amends = self.amends.iter().map(Signed::to_wire).collect();
                let hello = pb::RoundHello { open: Some(self.round.open.to_wire()), amends };
                lane.send(key, Frame::Hello(hello));
                for at in waiting.into_iter().filter(|at| self.machine.is_current(*at)) {
                    self.announce_on(&lane, at);
                }
                self.lanes.insert(node, lane);
                Ok(())
            }
            Err(reason) => self.lost(node, &reason, timer),
        }
    }

    /// A reducer is gone: every part that it serves is in trouble.
    fn lost(&mut self, node: NodeId, reason: &str, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        self.lanes.remove(&node);
        for part in 0..self.round.shape.parts.len() {
            let serves = self.machine.reducer(part).and_then(|i| self.nodes.get(i)).is_some_and(|n| n.node == node);
            if serves {
                self.act(Input::Lost { part, reason: reason.to_owned() }, timer)?;
            }
        }
        Ok(())
    }

    /// The reducer of a chunk broke the rules, without proof.
    fn distrust(&mut self, at: At, reason: &str, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        tracing::info!(chunk = at.chunk, reason, "a reducer broke the rules");
        match self.round.shape.part_of(at.chunk) {
            Some(part) => self.act(Input::Lost { part, reason: reason.to_owned() }, timer),
            None => Ok(()),
        }
    }

    /// Proof that somebody lied in a chunk.
    fn accuse(&mut self, at: At, evidence: &Evidence, reason: &str) {
        if let Some(fault) = self.accusation(at, evidence, reason) {
            self.report(fault);
        }
    }

    fn accusation(&self, at: At, evidence: &Evidence, reason: &str) -> Option<Report> {
        let part = self.round.shape.part_of(at.chunk)?;
        let kind = pb::round_fault::Kind::Lied;
        Some(self.fault_of(part, kind, reason.to_owned(), Ranks::empty(), Some(evidence)))
    }

    fn on_event(&mut self, event: Event, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        self.progress += 1;
        match event {
            Event::Frame { peer, frame } => self.on_frame(peer.node, frame, timer),
            Event::Words { peer, at, words, root } => {
                let from = self.reducer_of(at.chunk).is_some_and(|r| r.node == peer.node);
                let Some(held) = self.held.get_mut(&at.chunk).filter(|held| held.at == at && from) else {
                    self.ctx.buffers.give(words);
                    return Ok(());
                };
                held.out = Some(Arc::new(words));
                held.out_root = Digest(root);
                self.check_output(at, timer)
            }
            Event::Moved { chunk } => match self.round.shape.part_of(chunk) {
                Some(part) => self.act(Input::Progress(part), timer),
                None => Ok(()),
            },
            Event::Sent { at } => self.act(Input::Sent(at), timer),
            Event::Gone { peer, reason } => self.lost(peer.node, &reason, timer),
        }
    }

    fn on_frame(&mut self, from: NodeId, frame: Frame, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        match frame {
            Frame::ScaleSet(set) => {
                let at = At { chunk: set.chunk, attempt: set.attempt };
                if self.is_from(from, at) { self.granted(at, set, timer) } else { Ok(()) }
            }
            Frame::Receipt(raw) => {
                let Ok(receipt) = Signed::<ChunkReceipt>::trusted(raw.clone()) else { return Ok(()) };
                let at = At { chunk: receipt.chunk, attempt: receipt.attempt };
                if !self.is_from(from, at) {
                    return Ok(());
                }
                if let Some(held) = self.held.get_mut(&at.chunk) {
                    held.receipt = Some(raw);
                }
                self.act(Input::Receipt(at), timer)
            }
            Frame::Sum(sum) => self.on_sum(from, sum, timer),
            Frame::Nonces(raw) => self.on_nonces(from, raw, timer),
            Frame::TagSet(set) => {
                let at = At { chunk: set.chunk, attempt: set.attempt };
                if self.is_from(from, at) {
                    self.check_tag_set(at, set.tags);
                }
                Ok(())
            }
            Frame::Opening(opening) => {
                let at = At { chunk: opening.chunk, attempt: opening.attempt };
                if self.is_from(from, at) { self.on_opening(at, opening) } else { Ok(()) }
            }
            Frame::Waiting(waiting) => {
                let Ok(ranks) = Ranks::from_bytes(&waiting.ranks, "ranks") else { return Ok(()) };
                let part = waiting.part as usize;
                let serves = self.machine.reducer(part).and_then(|i| self.nodes.get(i)).is_some_and(|n| n.node == from);
                if !serves {
                    return Ok(());
                }
                self.act(Input::Waiting { part, ranks: ranks.iter().collect() }, timer)
            }
            Frame::Abort(abort) => {
                let reason: String = abort.reason.chars().take(200).collect();
                match abort.chunk {
                    Some(chunk) => {
                        let at = At { chunk, attempt: abort.attempt };
                        if self.is_from(from, at) { self.distrust(at, &reason, timer) } else { Ok(()) }
                    }
                    None => self.lost(from, &reason, timer),
                }
            }
            _ => Ok(()),
        }
    }

    /// Whether this node serves the present attempt of the chunk.
    fn is_from(&self, from: NodeId, at: At) -> bool {
        self.machine.is_current(at)
            && self.held.contains_key(&at.chunk)
            && self.reducer_of(at.chunk).is_some_and(|r| r.node == from)
    }

    fn granted(&mut self, at: At, set: pb::RoundScales, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        if self.round.wire.is_some() && !self.round.is_sole(at.chunk) {
            let Ok(ranks) = Ranks::from_bytes(&set.ranks, "ranks") else {
                return self.distrust(at, "malformed ranks", timer);
            };
            let Some(held) = self.held.get_mut(&at.chunk) else { return Ok(()) };
            let own = ranks.position(self.rank).and_then(|place| set.exponents.get(place));
            let even = set.exponents.iter().all(|e| e.len() == held.scales.len());
            if ranks.len() != set.exponents.len() || !even || own != Some(&held.scales) {
                return self.distrust(at, "scales without this member's own", timer);
            }
            held.shared = Arc::new(compute::shared(&set.exponents));
            held.granted = ranks.iter().zip(set.exponents).collect();
        }
        self.act(Input::Granted(at), timer)
    }

    fn prepare(&mut self, at: At) {
        let Some(held) = self.held.get(&at.chunk) else { return };
        let (round, space, tx) = (self.round.clone(), self.space.clone(), self.computed.0.clone());
        let (shared, buffers) = (held.shared.clone(), self.ctx.buffers.clone());
        let residual = self.group.residual(&self.round, at.chunk);
        self.ctx.compute(move || {
            let result = compute::prepare(&round, &space, at.chunk, &shared, residual, &buffers);
            drop(tx.blocking_send(Computed::Prepared { at, result }));
        });
    }

    fn send(&mut self, at: At) {
        let Some(held) = self.held.get(&at.chunk) else { return };
        let (Some(commit), Some(words)) = (&held.commit, held.words.clone()) else { return };
        let commit = commit.to_wire();
        let Some(lane) = self.lane_of(at.chunk).cloned() else { return };
        let sent = lane.send(self.round.key, Frame::Commit(commit)) && lane.send_words(self.round.key, at, words);
        if !sent {
            tracing::debug!(chunk = at.chunk, "words found no lane; their silence will be reported");
        }
    }

    fn tag(&mut self, at: At) {
        let Some(held) = self.held.get(&at.chunk) else { return };
        let (Some(sum), Some(nonces), Some(words)) = (&held.sum, &held.nonces, held.words.clone()) else { return };
        let rho = compute::rho(&self.round, at.chunk, sum, nonces);
        let participants = sum.participants.len();
        let (round, out, tx) = (self.round.clone(), held.out.clone(), self.computed.0.clone());
        self.ctx.compute(move || {
            let tagged = compute::tags(&round, rho, &words, out.as_deref().map(Vec::as_slice), participants);
            drop(tx.blocking_send(Computed::Tagged { at, tagged }));
        });
    }

    fn keep(&mut self, at: At) {
        let Some(mut held) = self.held.remove(&at.chunk) else { return };
        let (Some(out), Some(sum)) = (held.out.take(), &held.sum) else { return recycle(&self.ctx, held) };
        let participants = sum.participants.len();
        if let Some(place) = self.participants.get_mut(at.chunk as usize) {
            *place = u16::try_from(participants).unwrap_or(u16::MAX);
        }
        if let Some(residual) = held.residual.take() {
            self.group.keep_residual(&self.round, at.chunk, &residual);
        }
        let (round, space, tx) = (self.round.clone(), self.out.clone(), self.computed.0.clone());
        let (shared, ctx) = (held.shared.clone(), self.ctx.clone());
        recycle(&self.ctx, held);
        self.keeping += 1;
        self.ctx.compute(move || {
            let result = {
                let mut space = space.lock().unwrap_or_else(PoisonError::into_inner);
                compute::finish(&round, &mut space, at.chunk, &shared, &out, participants)
            };
            drop(space);
            ctx.buffers.give_shared(out);
            drop(tx.blocking_send(Computed::Kept(result)));
        });
    }

    fn on_computed(&mut self, computed: Computed, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        self.progress += 1;
        match computed {
            Computed::Lane { node, result } => self.on_lane(node, result, timer),
            Computed::Scales { at, result } => {
                let scales = result.map_err(|refusal| self.refuse(refusal))?;
                if !self.machine.is_current(at) {
                    return Ok(());
                }
                if let Some(held) = self.held.get_mut(&at.chunk) {
                    held.scales = scales.into();
                    self.announce(at);
                }
                Ok(())
            }
            Computed::Prepared { at, result } => {
                let prepared = result.map_err(|refusal| self.refuse(refusal))?;
                self.on_prepared(at, prepared, timer)
            }
            Computed::Tagged { at, tagged } => self.on_tagged(at, tagged, timer),
            Computed::TagSet { at, tags } => self.on_tag_set(at, tags, timer),
            Computed::Judged { at, guilty, evidence } => self.on_judged(at, &guilty, evidence, timer),
            Computed::Kept(result) => {
                self.keeping -= 1;
                result.map_err(|refusal| RoundFailure::new(format!("of the result, {refusal}")))
            }
        }
    }

    /// This member's own tensor cannot take part.
    fn refuse(&self, refusal: Refusal) -> RoundFailure {
        let reason = format!("rank {}: {refusal}", self.rank);
        self.fault(0, pb::round_fault::Kind::Refused, reason.clone(), Ranks::from_iter([self.rank]));
        RoundFailure::members(reason, vec![self.rank])
    }

    fn on_prepared(&mut self, at: At, prepared: Prepared, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        if !self.machine.is_current(at) {
            self.ctx.buffers.give(prepared.words);
            return Ok(());
        }
        let Some(held) = self.held.get_mut(&at.chunk) else { return Ok(()) };
        let fixed = (self.round.shape.proof == Proof::Tags).then(|| FixedCommit {
            scale: compute::scales_digest(&held.scales),
            shared: compute::scales_digest(&held.shared),
            nonce: nonce_hash(&held.nonce),
        });
        let commit = ChunkCommit {
            round: self.round.id,
            attempt: at.attempt,
            chunk: at.chunk,
            rank: self.rank,
            root: Digest(prepared.root),
            len: prepared.words.len() as u64,
            fixed,
        };
        held.commit = Some(Signed::sign(&self.ctx.network, &self.ctx.key, commit));
        held.words = Some(Arc::new(prepared.words));
        held.residual = prepared.residual;
        self.act(Input::Prepared(at), timer)
    }

    fn on_sum(&mut self, from: NodeId, frame: pb::RoundSum, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        let Some(raw) = frame.sum else { return Ok(()) };
        let Ok(sum) = Signed::<SumCommit>::verify(&self.ctx.network, raw) else {
            return self.lost(from, "a sum commitment that is not signed well", timer);
        };
        let at = At { chunk: sum.chunk, attempt: sum.attempt };
        if !self.is_from(from, at) || sum.round != self.round.id {
            return Ok(());
        }
        let reducer = self.reducer_of(at.chunk);
        if reducer.is_none_or(|r| r.hotkey != sum.reducer()) {
            return self.lost(from, "a sum commitment that another hotkey signed", timer);
        }
        let sends = self.round.shape.sends(self.rank, at.chunk);
        let Some(held) = self.held.get_mut(&at.chunk) else { return Ok(()) };
        if held.sum.is_some() {
            return Ok(());
        }
        let named = sum.participants.position(self.rank).and_then(|place| sum.commits.get(place)).copied();
        let own = held.commit.as_ref().map(|commit| commit.digest());
        if sends && named != own {
            let evidence = held.receipt.clone().map(|receipt| {
                let named = named.and_then(|_| {
                    sum.participants.position(self.rank).and_then(|place| frame.commits.get(place)).cloned()
                });
                Evidence::Omission(Omission { receipt, sum: sum.to_wire(), commit: named })
            });
            if let Some(evidence) = evidence {
                self.accuse(at, &evidence, "a sum without an input that its reducer signed for");
            }
            return self.distrust(at, "a sum without this member's input", timer);
        }
        let expected: Ranks = self.live.iter().filter(|rank| self.round.shape.sends(*rank, at.chunk)).collect();
        if sum.participants != expected {
            return self.distrust(at, "a sum over other members than those that are in", timer);
        }
        if let Err(reason) = compute::check_commits(&self.round, &sum, &frame.commits, &held.granted, &held.shared) {
            return self.distrust(at, reason, timer);
        }
        let digest = sum.digest();
        held.sum = Some(sum);
        held.commits = frame.commits;
        self.check_output(at, timer)?;
        self.act(Input::Sum { at, sum: digest }, timer)
    }

    /// Compares the output with its commitment, as soon as both are here.
    fn check_output(&mut self, at: At, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        let Some(held) = self.held.get(&at.chunk) else { return Ok(()) };
        let (Some(sum), Some(_)) = (&held.sum, &held.out) else { return Ok(()) };
        if self.round.shape.proof != Proof::Off && held.out_root != sum.out_root {
            return self.distrust(at, "a sum that does not have its committed root", timer);
        }
        if self.round.is_sole(at.chunk) && self.round.shape.proof != Proof::Off {
            // The only input is the output: its sender's own signature says so.
            let root =
                held.commits.first().and_then(|c| Signed::<ChunkCommit>::verify(&self.ctx.network, c.clone()).ok());
            let sender = sum.participants.iter().next().and_then(|rank| self.round.open.member(rank));
            let by_sender = |c: &Signed<ChunkCommit>| sender.is_some_and(|s| s.hotkey.0 == c.signer());
            if root.as_ref().is_none_or(|c| {
                c.root != sum.out_root || !by_sender(c) || c.round != self.round.id || c.chunk != at.chunk
            }) {
                return self.distrust(at, "a copy that its sender did not commit to", timer);
            }
        } else if self.round.shape.proof == Proof::Sampled && self.is_sampled(at) {
            let groups = self.round.chunk(at.chunk).map_or(1, |c| c.group_count()).max(1);
            let group = rand::random_range(0..u32::try_from(groups).unwrap_or(1));
            if let Some(held) = self.held.get_mut(&at.chunk) {
                held.dispute = Some(Dispute::sample(group));
            }
            let dispute = pb::RoundDispute { attempt: at.attempt, chunk: at.chunk, group };
            self.tell(at, Frame::Dispute(dispute));
            return Ok(());
        }
        self.act(Input::Output(at), timer)
    }

    /// Whether this member looks at a group of the chunk: each does at about one chunk in as many as there are members,
    /// so that together they look at each chunk once, and each at one chunk at least.
    fn is_sampled(&self, at: At) -> bool {
        let members = u32::from(u8::try_from(self.live.len()).unwrap_or(u8::MAX)).max(1);
        at.chunk % members == u32::from(self.rank) % members || rand::random_range(0..members) == 0
    }

    fn on_nonces(&mut self, from: NodeId, raw: pb::Signed, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        let Ok(nonces) = Signed::<NonceSet>::verify(&self.ctx.network, raw) else {
            return self.lost(from, "nonces that are not signed well", timer);
        };
        let at = At { chunk: nonces.chunk, attempt: nonces.attempt };
        if !self.is_from(from, at) || self.reducer_of(at.chunk).is_none_or(|r| r.hotkey.0 != nonces.signer()) {
            return Ok(());
        }
        let Some(held) = self.held.get_mut(&at.chunk) else { return Ok(()) };
        let Some(sum) = &held.sum else { return Ok(()) };
        let own = sum.participants.position(self.rank).and_then(|place| nonces.nonces.get(place)).copied();
        let mine = own.is_some_and(|own| own == held.nonce || own == [0; 32]);
        let fits = nonces.sum == sum.digest() && nonces.nonces.len() == sum.participants.len() && mine;
        if !fits || !compute::check_nonces(&held.commits, &nonces.nonces) {
            return self.distrust(at, "nonces that do not fit their commitments", timer);
        }
        held.nonces = Some(nonces);
        self.act(Input::Nonces(at), timer)
    }

    fn on_tagged(&mut self, at: At, tagged: Tagged, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        if !self.machine.is_current(at) {
            return Ok(());
        }
        let Some(held) = self.held.get_mut(&at.chunk) else { return Ok(()) };
        let (Some(sum), Some(nonces)) = (&held.sum, &held.nonces) else { return Ok(()) };
        held.own_tags = tagged.input.clone();
        held.out_tags = tagged.output;
        let tags = ChunkTags {
            round: self.round.id,
            attempt: at.attempt,
            chunk: at.chunk,
            rank: self.rank,
            sum: sum.digest(),
            nonces: nonces.digest(),
            tags: self.ctx.lie.tags(tagged.input),
            out: sundara_proto::round::out_digest(&held.out_tags),
        };
        held.tags = Some(Signed::sign(&self.ctx.network, &self.ctx.key, tags).to_wire());
        if !tagged.in_range {
            // Nothing that honest members send can add up to this.
            return self.dispute(at, 0, timer);
        }
        self.act(Input::Tagged(at), timer)
    }

    fn check_tag_set(&self, at: At, tags: Vec<pb::Signed>) {
        let (network, tx) = (self.ctx.network, self.computed.0.clone());
        self.ctx.compute(move || {
            let checked: Result<Vec<_>, _> =
                tags.into_iter().map(|tags| Signed::<ChunkTags>::verify(&network, tags)).collect();
            drop(tx.blocking_send(Computed::TagSet { at, tags: checked.ok() }));
        });
    }

    fn on_tag_set(
        &mut self,
        at: At,
        tags: Option<Vec<Signed<ChunkTags>>>,
        timer: &mut Option<Instant>,
    ) -> Result<(), RoundFailure> {
        if !self.machine.is_current(at) {
            return Ok(());
        }
        let Some(held) = self.held.get_mut(&at.chunk) else { return Ok(()) };
        let (Some(tags), Some(sum), Some(nonces)) = (tags, &held.sum, &held.nonces) else {
            return self.distrust(at, "tags that are not signed well", timer);
        };
        let whole = compute::check_tags(&self.round, at, sum, nonces, &tags);
        let total = match whole {
            Ok(total) => total,
            Err(reason) => return self.distrust(at, reason, timer),
        };
        let bad = total.iter().zip(&held.out_tags).position(|(a, b)| a != b);
        let raw: Vec<pb::Signed> = tags.iter().map(Signed::to_wire).collect();
        if let Some(group) = bad {
            held.dispute = Some(Dispute::new(raw));
            return self.dispute(at, u32::try_from(group).unwrap_or(0), timer);
        }
        let digest = sundara_proto::round::out_digest(&total);
        let receives = |rank: Rank| self.round.shape.receives(rank);
        if tags.iter().all(|t| t.out == digest || !receives(t.rank)) {
            return self.act(Input::Agreed(at), timer);
        }
        // Somebody else was given another output, or says so: it is for that one to dispute. Until then nothing settles.
        tracing::info!(chunk = at.chunk, "another member's output differs");
        Ok(())
    }

    /// Asks for the openings of a group that does not add up.
    fn dispute(&mut self, at: At, group: u32, timer: &mut Option<Instant>) -> Result<(), RoundFailure> {
        tracing::info!(chunk = at.chunk, group, "the tags of a group do not add up");
        let Some(held) = self.held.get_mut(&at.chunk) else { return Ok(()) };
        held.dispute.get_or_insert_with(|| Dispute::new(Vec::new())).group = group;
        let dispute = pb::RoundDispute { attempt: at.attempt, chunk: at.chunk, group };
        self.tell(at, Frame::Dispute(dispute));
        match self.round.shape.part_of(at.chunk) {
            Some(part) => self.act(Input::Progress(part), timer),
            None => Ok(()),
        }
    }

    fn on_opening(&mut self, at: At, opening: pb::RoundOpening) -> Result<(), RoundFailure> {
        let Some(held) = self.held.get_mut(&at.chunk) else { return Ok(()) };
        let (Some(dispute), Some(sum)) = (&mut held.dispute, &held.sum) else { return Ok(()) };
        if !dispute.take(opening, &sum.participants) {
            return Ok(());
        }
        let dispute_sample = dispute.sample;
        let case = dispute.case(
            &self.round.open,
            &self.amends,
            sum,
            &held.commits,
            held.nonces.as_ref(),
            (!dispute_sample).then_some((self.rank, held.out_tags.as_slice())),
        );
        let (network, tx) = (self.ctx.network, self.computed.0.clone());
        self.ctx.compute(move || {
            let evidence = Evidence::Blame(Box::new(case));
            let guilty = super::evidence::check(&network, &evidence);
            drop(tx.blocking_send(Computed::Judged { at, guilty, evidence }));
        });
        Ok(())
    }

    /// What the openings of a group came to.
    fn on_judged(
        &mut self,
        at: At,
        guilty: &[Hotkey],
        evidence: Evidence,
        timer: &mut Option<Instant>,
    ) -> Result<(), RoundFailure> {
        if !self.machine.is_current(at) {
            return Ok(());
        }
        let sample = self.held.get(&at.chunk).and_then(|h| h.dispute.as_ref()).is_some_and(|d| d.sample);
        tracing::debug!(chunk = at.chunk, ?guilty, sample, "a group was opened and judged");
        match (guilty, evidence) {
            ([], _) if sample => self.act(Input::Output(at), timer),
            ([], _) => self.distrust(at, "openings that prove nothing", timer),
            (_, Evidence::Blame(case)) => {
                let (evidence, blob) = Evidence::of_case(*case);
                let what = "a group does not add up";
                let Some(fault) = self.accusation(at, &evidence, what) else { return Ok(()) };
                let Some(blob) = blob else {
                    self.report(fault);
                    return Ok(());
                };
                // Whoever hears of the case fetches it at once.
                let (ctx, reports) = (self.ctx.clone(), self.reports.clone());
                self.ctx.spawn("case", async move {
                    match ctx.blobs.put(blob, Access::Public).await {
                        Ok(_) => drop(reports.send(fault).await),
                        Err(e) => tracing::error!(error = %e, "a case could not be kept"),
                    }
                });
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn recycle(ctx: &Ctx, held: Held) {
    for buffer in [held.words, held.out].into_iter().flatten() {
        ctx.buffers.give_shared(buffer);
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
