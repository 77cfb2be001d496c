//! The leader's side of a round: gathers members, opens the round, performs what the leader's machine decides.
//!
//! One task a round. Members' requests reach it through [`Input`]; what it tells them goes through one forwarder each, so
//! that a slow member holds nobody up.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sundara_proto::crypto::Signed;
use sundara_proto::id::{Digest, Hotkey, NodeId, RoundId};
use sundara_proto::pb;
use sundara_proto::round::{
    Equivocation, EquivocationKind, Evidence, GroupMember, PartMove, Rank, RoundAmend, RoundClose, RoundMember,
    RoundOp, RoundOpen, RoundPart, RoundSettings, SumCommit, Topology, sums_digest,
};
use sundara_proto::rules::round::dtype::{Dtype, Wire};
use sundara_proto::rules::round::layout;
use sundara_proto::wire::WireMessage as _;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::group::Group;
use super::terms::{Round, change_of};
use super::{Ctx, RoundFailure};
use crate::domain::round::leader::{self, Guilty, LeaderMachine, Status, Terms};
use crate::domain::round::{Change, plan};
use crate::net::Reply;

/// What one member brings to a round. All must agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    pub(super) op: RoundOp,
    pub(super) dtype: Dtype,
    /// Elements of each tensor.
    pub(super) lens: Vec<u64>,
    pub(super) settings: RoundSettings,
}

/// What a member knows of a round whose leader is gone.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub(super) open: Option<Signed<RoundOpen>>,
    pub(super) amends: Vec<Signed<RoundAmend>>,
}

/// What reaches the leader's task.
#[allow(clippy::large_enum_variant)] // A few at a time.
pub(super) enum Input {
    /// A member has its tensor ready; the answers go there.
    Ready { rank: Rank, ready: pb::RoundReady, reply: Reply },
    /// A member has something to report.
    Report { rank: Rank, kind: pb::round_report::Kind },
    /// A member's forwarder ended.
    Gone { rank: Rank },
    /// Proof, judged.
    Convicted { guilty: Hotkey },
}

/// Reports and arrivals that wait for the leader.
pub(super) const INPUTS_QUEUED_MAX: usize = 1_024;
/// Unsettled sums that a member tells of in one answer.
pub(super) const UNSETTLED_MAX: usize = 64;
/// Events that wait for one member.
const EVENTS_QUEUED_MAX: usize = 64;

struct Follower {
    events: mpsc::Sender<pb::round_event::Kind>,
}

/// Leads one round of a group to its end. `spec` is this node's own; `known` is what it took over.
pub(super) async fn lead(
    ctx: Arc<Ctx>,
    group: Arc<Group>,
    seq: u64,
    spec: Spec,
    known: Known,
    mut inputs: mpsc::Receiver<Input>,
    own: mpsc::Sender<Input>,
) {
    let mut leader = Leader {
        ctx,
        group,
        seq,
        spec,
        followers: BTreeMap::new(),
        own,
        began: Instant::now(),
        done: BTreeMap::new(),
        sums: HashMap::new(),
        convicted: Arc::default(),
    };
    let ended = match known.open {
        Some(open) => leader.resume(open, known.amends, &mut inputs).await,
        None => leader.begin(&mut inputs).await,
    };
    if let Err(failure) = ended {
        leader.fail(&failure);
    }
    // Forwarders empty their queues and end.
}

struct Leader {
    ctx: Arc<Ctx>,
    group: Arc<Group>,
    seq: u64,
    spec: Spec,
    followers: BTreeMap<Rank, Follower>,
    own: mpsc::Sender<Input>,
    began: Instant,
    /// Sums reported so far by members whose report comes in pieces.
    done: BTreeMap<Rank, Vec<Digest>>,
    /// Sum commitments of chunks that do not settle, by chunk, attempt and reducer.
    sums: HashMap<(u32, u32, Hotkey), pb::Signed>,
    /// Who is convicted already: once is enough.
    convicted: Arc<Mutex<HashSet<Hotkey>>>,
}

impl Leader {
    async fn begin(&mut self, inputs: &mut mpsc::Receiver<Input>) -> Result<(), RoundFailure> {
        let known = self.gather(inputs).await?;
        if let Some(open) = known.open {
            return self.resume(open, known.amends, inputs).await;
        }
        let open = self.open().await?;
        self.tell_all(&pb::round_event::Kind::Open(open.to_wire()));
        self.conduct(open, Vec::new(), inputs).await
    }

    /// Waits for everybody, up to the group's patience. A member that knows the round as open brings it along.
    async fn gather(&mut self, inputs: &mut mpsc::Receiver<Input>) -> Result<Known, RoundFailure> {
        let deadline = self.began + self.group.terms.gather;
        let mut known = Known::default();
        loop {
            let roster = self.group.roster();
            let expected: BTreeSet<Rank> = (0..=Rank::MAX).take(roster.members.len()).collect();
            let missing: Vec<Rank> = expected.iter().copied().filter(|r| !self.followers.contains_key(r)).collect();
            if missing.is_empty() {
                self.group.note_away(missing);
                return Ok(known);
            }
            // Nobody waits for members that are not even connected, once everyone else is here.
            let here = self.ctx.directory.snapshot();
            let away = |rank: &Rank| roster.member(*rank).is_none_or(|m| !here.peers.contains_key(&m.node));
            let wait = if self.group.were_away(&missing) { std::time::Duration::ZERO } else { self.group.terms.absent };
            let patience = self.began + wait;
            let until = if missing.iter().all(away) { patience.min(deadline) } else { deadline };
            tokio::select! {
                input = inputs.recv() => match input {
                    Some(Input::Ready { rank, ready, reply }) => {
                        if let Some(found) = self.ready(rank, ready, reply)? {
                            known = found;
                        }
                    }
                    Some(Input::Gone { rank }) => {
                        self.followers.remove(&rank);
                    }
                    Some(Input::Report { .. } | Input::Convicted { .. }) => {}
                    None => return Err(RoundFailure::closed()),
                },
                () = self.ctx.directory.changed() => {}
                () = tokio::time::sleep_until(until) => {
                    let least = (roster.min_members as usize).max(1);
                    if self.spec.settings.demand_all || self.followers.len() < least {
                        let reason = format!(
                            "{} of {} members came within {} s; missing are ranks {missing:?}",
                            self.followers.len(), roster.members.len(), self.began.elapsed().as_secs()
                        );
                        return Err(RoundFailure::members(reason, missing));
                    }
                    self.group.note_away(missing);
                    return Ok(known);
                }
            }
        }
    }

    /// Takes a member in, if it brings what this node brings. What it knows of an open round, if it does.
    fn ready(&mut self, rank: Rank, ready: pb::RoundReady, reply: Reply) -> Result<Option<Known>, RoundFailure> {
        let own = self.spec.to_ready(&self.group, self.seq, &Known::default());
        let agree =
            ready.op == own.op && ready.dtype == own.dtype && ready.lens == own.lens && ready.settings == own.settings;
        let known = known_from(&self.ctx, &ready);
        if let Some(state) = ready.state.and_then(|s| Signed::verify(&self.ctx.network, s).ok()) {
            self.group.note_state(state);
        }
        let follower = self.follow(rank, reply);
        if agree {
            self.followers.insert(rank, follower);
            return Ok(known);
        }
        let reason = format!(
            "rank {rank} brings another operation, type, length or setting to round {} than rank {}",
            self.seq,
            self.group.rank()
        );
        let failure = RoundFailure::members(reason, vec![rank]);
        // It hears why; the others hear it from the round's failure.
        self.followers.insert(rank, follower);
        Err(failure)
    }

    /// A member's forwarder.
    fn follow(&self, rank: Rank, mut reply: Reply) -> Follower {
        let (events, mut queue) = mpsc::channel::<pb::round_event::Kind>(EVENTS_QUEUED_MAX);
        let own = self.own.clone();
        self.ctx.spawn("follower", async move {
            loop {
                let event = tokio::select! {
                    event = queue.recv() => event,
                    () = reply.closed() => break,
                };
                let Some(event) = event else { return };
                let last = matches!(event, pb::round_event::Kind::Close(_) | pb::round_event::Kind::Failed(_));
                let event = pb::response::Kind::Round(pb::RoundEvent { kind: Some(event) });
                if last {
                    // Whoever is gone does not need it.
                    let _ = reply.finish(event).await;
                    return;
                }
                if reply.send(event).await.is_err() {
                    break;
                }
            }
            drop(own.send(Input::Gone { rank }).await);
        });
        Follower { events }
    }

    /// Plans and signs the round.
    async fn open(&self) -> Result<Signed<RoundOpen>, RoundFailure> {
        let roster = self.group.roster();
        let members: Vec<RoundMember> = self
            .followers
            .keys()
            .filter_map(|rank| {
                roster.member(*rank).map(|m| RoundMember { rank: *rank, hotkey: m.hotkey, node: m.node })
            })
            .collect();
        let elements: u64 = self.spec.lens.iter().sum();
        let groups = layout::groups(elements);
        let mut reducers: Vec<GroupMember> = match self.spec.settings.topology {
            Topology::Butterfly => members.iter().map(|m| GroupMember { hotkey: m.hotkey, node: m.node }).collect(),
            Topology::Reducers => self.group.reducers(&self.ctx).await,
        };
        if groups > 0 && reducers.is_empty() {
            return Err(RoundFailure::new(
                "no reducer is connected: connect miners, name reducers for the group, or use the butterfly topology",
            ));
        }
        // The first part goes round, so that small tensors do not always load the same reducer.
        if !reducers.is_empty() && self.spec.settings.topology == Topology::Reducers {
            let turn = usize::try_from(self.seq).unwrap_or(0) % reducers.len();
            reducers.rotate_left(turn);
        }
        let word = Wire::of(self.spec.dtype, self.spec.settings.compress, members.len().max(1))
            .map_or(self.spec.dtype.len(), |wire| wire.input().len());
        let group_bytes = (word * layout::GROUP) as u64;
        let candidates: Vec<plan::Candidate> =
            reducers.iter().enumerate().map(|(node, reducer)| self.group.candidate(node, &reducer.node)).collect();
        let planned = plan::plan(groups, group_bytes, members.len() as u64, &candidates);
        let mut parts = Vec::new();
        let mut next = 0;
        let chunk_groups = planned.as_ref().map_or(1, |p| p.chunk_groups);
        for part in planned.map(|p| p.parts).unwrap_or_default() {
            let backup = part.spare.first().map(|node| reducers[*node]);
            parts.push(RoundPart { reducer: reducers[part.reducer], backup, groups: next..next + part.groups });
            next += part.groups;
        }
        let bytes = elements * self.spec.dtype.len() as u64;
        let open = RoundOpen {
            group: self.group.id,
            roster: roster.version,
            seq: self.seq,
            leader: self.group.rank(),
            op: self.spec.op,
            dtype: self.spec.dtype,
            lens: self.spec.lens.clone(),
            settings: self.spec.settings,
            members,
            parts,
            chunk_groups,
            deadline_ms: u64::try_from(self.group.stall(bytes).as_millis()).unwrap_or(u64::MAX),
        };
        open.check().map_err(|e| RoundFailure::new(format!("the round cannot be planned: {e}")))?;
        Ok(Signed::sign(&self.ctx.network, &self.ctx.key, open))
    }

    /// Goes on with a round that another leader opened.
    async fn resume(
        &mut self,
        open: Signed<RoundOpen>,
        amends: Vec<Signed<RoundAmend>>,
        inputs: &mut mpsc::Receiver<Input>,
    ) -> Result<(), RoundFailure> {
        let deadline = Instant::now() + self.answer_within(&open);
        let dropped: BTreeSet<Rank> = amends.iter().flat_map(|a| a.dropped.iter().collect::<Vec<_>>()).collect();
        let me = self.group.rank();
        let live = || open.members.iter().map(|m| m.rank).filter(|r| *r >= me && !dropped.contains(r));
        let mut best = amends;
        while !live().all(|rank| self.followers.contains_key(&rank)) {
            tokio::select! {
                input = inputs.recv() => match input {
                    Some(Input::Ready { rank, ready, reply }) => {
                        if let Some(found) = self.ready(rank, ready, reply)?
                            && found.amends.len() > best.len()
                        {
                            best = found.amends;
                        }
                    }
                    Some(Input::Gone { rank }) => {
                        self.followers.remove(&rank);
                    }
                    Some(Input::Report { .. } | Input::Convicted { .. }) => {}
                    None => return Err(RoundFailure::closed()),
                },
                () = tokio::time::sleep_until(deadline) => break,
            }
        }
        self.tell_all(&pb::round_event::Kind::Open(open.to_wire()));
        for amend in &best {
            self.tell_all(&pb::round_event::Kind::Amend(amend.to_wire()));
        }
        self.conduct(open, best, inputs).await
    }

    fn answer_within(&self, open: &RoundOpen) -> Duration {
        Duration::from_millis(open.deadline_ms).max(self.group.terms.answer)
    }

    /// From the open round to its end.
    async fn conduct(
        &mut self,
        open: Signed<RoundOpen>,
        amends: Vec<Signed<RoundAmend>>,
        inputs: &mut mpsc::Receiver<Input>,
    ) -> Result<(), RoundFailure> {
        let laid = Round::new(open.clone()).map_err(|e| RoundFailure::new(format!("the round is malformed: {e}")))?;
        let (round, shape) = (laid.id, laid.shape.clone());
        let members = open.members.iter().map(|m| (m.hotkey, m.rank)).collect();
        self.ctx.leading.opened(round, &self.own, members);
        let mut nodes = laid.nodes();
        if open.settings.topology == Topology::Reducers {
            for spare in self.group.spares(&self.ctx, &open) {
                super::terms::place(&mut nodes, &spare);
            }
        }
        let index = |m: &GroupMember| nodes.iter().position(|n| n.node == m.node).unwrap_or(0);
        let serving: Vec<usize> = open.parts.iter().map(|p| index(&p.reducer)).collect();
        let spare = spares(&open, &nodes, &serving);
        let terms = Terms {
            stall: Duration::from_millis(open.deadline_ms),
            answer: self.answer_within(&open),
            min_members: self.group.roster().min_members as usize,
            demand_all: open.settings.demand_all,
        };
        let start = Instant::now();
        let mut machine = LeaderMachine::new(self.group.rank(), shape.clone(), terms, serving, spare, Duration::ZERO);
        let mut changes: Vec<Change> = Vec::new();
        for (i, amend) in amends.iter().enumerate() {
            let before = i.checked_sub(1).and_then(|i| amends.get(i)).map(|a| a.value());
            changes.push(change_of(&laid, before, amend, &mut nodes));
        }
        let here: BTreeSet<Rank> = self.followers.keys().copied().collect();
        let gone: Vec<Rank> = open.members.iter().map(|m| m.rank).filter(|r| !here.contains(r)).collect();
        machine.take_over(&changes, gone);
        let mut number = changes.len() as u32;
        let mut timer = Instant::now();
        let mut timer_set = true;
        loop {
            let input = tokio::select! {
                input = inputs.recv() => match input {
                    Some(Input::Ready { rank, ready, reply }) => {
                        self.rejoin(rank, &ready, reply, &open, &amends);
                        continue;
                    }
                    Some(Input::Report { rank, kind }) => match self.report(rank, kind, &open, number) {
                        Some(input) => input,
                        None => continue,
                    },
                    Some(Input::Gone { rank }) => {
                        self.followers.remove(&rank);
                        leader::Input::Gone(rank)
                    }
                    Some(Input::Convicted { guilty }) => match self.guilty(&open, &nodes, guilty) {
                        Some(guilty) => leader::Input::Convicted(guilty),
                        None => continue,
                    },
                    None => return Err(RoundFailure::closed()),
                },
                () = tokio::time::sleep_until(timer), if timer_set => {
                    timer_set = false;
                    leader::Input::Timer
                }
            };
            for output in machine.handle(input, start.elapsed()) {
                match output {
                    leader::Output::Probe => self.tell_all(&pb::round_event::Kind::Probe(pb::RoundProbe {})),
                    leader::Output::Amend(change) => {
                        number = change.number;
                        self.done.clear();
                        tracing::info!(round = %round, number, dropped = ?change.dropped, moved = ?change.moved, "round amended");
                        let amend = self.amend(&open, round, &change, &nodes, &machine);
                        self.tell_all(&pb::round_event::Kind::Amend(amend.to_wire()));
                    }
                    leader::Output::Close { sums, dropped } => {
                        let bytes = open.lens.iter().sum::<u64>() * open.dtype.len() as u64;
                        self.group.record(bytes, start.elapsed());
                        let close = RoundClose {
                            round,
                            amend: number,
                            chunks: shape.chunks(),
                            sums: sums_digest(sums),
                            dropped: dropped.into_iter().collect(),
                        };
                        let close = Signed::sign(&self.ctx.network, &self.ctx.key, close);
                        self.tell_all(&pb::round_event::Kind::Close(close.to_wire()));
                        self.ctx.leading.ended(&round);
                        return Ok(());
                    }
                    leader::Output::Fail { reason, ranks } => {
                        self.ctx.leading.ended(&round);
                        return Err(RoundFailure::members(reason, ranks));
                    }
                    leader::Output::SetTimer(at) => {
                        timer = start + at;
                        timer_set = true;
                    }
                }
            }
        }
    }

    fn amend(
        &self,
        open: &RoundOpen,
        round: RoundId,
        change: &Change,
        nodes: &[GroupMember],
        machine: &LeaderMachine,
    ) -> Signed<RoundAmend> {
        let live: BTreeSet<Rank> = machine.live().collect();
        let amend = RoundAmend {
            round,
            number: change.number,
            leader: self.group.rank(),
            dropped: open.members.iter().map(|m| m.rank).filter(|r| !live.contains(r)).collect(),
            moves: change
                .moved
                .iter()
                .map(|(part, node)| PartMove { part: *part as u32, reducer: nodes[*node] })
                .collect(),
            keep: change.keep.iter().zip(0_u32..).filter(|(keep, _)| **keep).map(|(_, chunk)| chunk).collect(),
        };
        Signed::sign(&self.ctx.network, &self.ctx.key, amend)
    }

    /// A member that comes again, or late, to an open round.
    fn rejoin(
        &mut self,
        rank: Rank,
        _ready: &pb::RoundReady,
        reply: Reply,
        open: &Signed<RoundOpen>,
        amends: &[Signed<RoundAmend>],
    ) {
        let follower = self.follow(rank, reply);
        if open.members.iter().any(|m| m.rank == rank) {
            let all = std::iter::once(pb::round_event::Kind::Open(open.to_wire()))
                .chain(amends.iter().map(|a| pb::round_event::Kind::Amend(a.to_wire())));
            for event in all {
                // A new follower's queue has room.
                drop(follower.events.try_send(event));
            }
            self.followers.insert(rank, follower);
        } else {
            let reason = format!("round {} runs without rank {rank}; the next one waits for it", self.seq);
            drop(follower.events.try_send(failed(&RoundFailure::members(reason, vec![rank]))));
        }
    }

    /// A report as the machine takes it.
    fn report(
        &mut self,
        rank: Rank,
        kind: pb::round_report::Kind,
        open: &Signed<RoundOpen>,
        number: u32,
    ) -> Option<leader::Input> {
        use pb::round_report::Kind;
        let chunks = open.check().map_or(0, |map| map.chunks()) as usize;
        match kind {
            Kind::Done(done) => {
                if done.amend != number {
                    return None;
                }
                let (sums, rest) = done.sums.as_chunks::<32>();
                let have = self.done.entry(rank).or_default();
                if !rest.is_empty() || done.first as usize != have.len() || have.len() + sums.len() > chunks {
                    tracing::debug!(rank, "a report of sums that does not fit");
                    self.done.remove(&rank);
                    return None;
                }
                have.extend(sums.iter().map(|s| Digest(*s)));
                if have.len() < chunks {
                    return None;
                }
                let sums = self.done.remove(&rank).unwrap_or_default();
                Some(leader::Input::Done { rank, sums, changes: number })
            }
            Kind::Fault(fault) => {
                if fault.kind() == pb::round_fault::Kind::Refused {
                    return Some(leader::Input::Refused { rank, reason: fault.detail });
                }
                if let Some(evidence) = fault.evidence {
                    self.examine(rank, evidence, open);
                    return None;
                }
                let waiting = sundara_proto::round::Ranks::from_bytes(&fault.waiting, "waiting").ok()?;
                tracing::info!(rank, part = fault.part, reason = %fault.detail, ?waiting, "a member reports trouble");
                Some(leader::Input::Fault {
                    rank,
                    part: fault.part as usize,
                    waiting: waiting.iter().collect(),
                    reason: fault.detail,
                    changes: fault.amend,
                })
            }
            Kind::Status(status) => {
                self.compare(rank, status.sums, open);
                let set = sundara_proto::round::ChunkSet::from_bytes(&status.settled, "settled").ok()?;
                let settled = (0..chunks as u32).map(|chunk| set.contains(chunk)).collect();
                let status = Status { settled, progress: status.progress, changes: status.amend };
                Some(leader::Input::Status { rank, status })
            }
        }
    }

    /// Compares the sum commitments that members hold: two different ones of a chunk and attempt convict their reducer.
    fn compare(&mut self, rank: Rank, sums: Vec<pb::Signed>, open: &RoundOpen) {
        for raw in sums.into_iter().take(UNSETTLED_MAX) {
            let Ok(sum) = Signed::<SumCommit>::trusted(raw.clone()) else { continue };
            let place = (sum.chunk, sum.attempt, sum.reducer());
            let Some(other) = self.sums.get(&place) else {
                self.sums.insert(place, raw);
                continue;
            };
            if other.payload != raw.payload {
                let pair = Equivocation { kind: EquivocationKind::Sum, first: other.clone(), second: raw };
                self.examine(rank, Evidence::Equivocation(pair).to_raw(), open);
            }
        }
        if self.sums.len() > open.parts.len() * UNSETTLED_MAX {
            self.sums.clear();
        }
    }

    /// Judges evidence, once all of it is here; [`Input::Convicted`] follows if it proves anything.
    fn examine(&self, rank: Rank, evidence: pb::RoundEvidence, open: &RoundOpen) {
        let Some(accuser) = open.member(rank).map(|m| m.node) else { return };
        let (ctx, own, convicted) = (self.ctx.clone(), self.own.clone(), self.convicted.clone());
        self.ctx.spawn("examine", async move {
            let Ok(evidence) = Evidence::from_raw(evidence) else { return };
            let whole = match &evidence {
                Evidence::Case { blob, len } => super::evidence::fetch(&ctx, *blob, *len, accuser).await,
                _ => Some(evidence.clone()),
            };
            let Some(whole) = whole else { return };
            let network = ctx.network;
            let judged = ctx.workers.run(move || super::evidence::check(&network, &whole)).await;
            for guilty in judged.unwrap_or_default() {
                if !super::lock(&convicted).insert(guilty) {
                    continue;
                }
                // A leader that has just ended has no use for it, but the mesh has.
                ctx.proven(guilty, &evidence);
                drop(own.send(Input::Convicted { guilty }).await);
            }
        });
    }

    /// Who a hotkey is in this round.
    fn guilty(&self, open: &RoundOpen, nodes: &[GroupMember], guilty: Hotkey) -> Option<Guilty> {
        if let Some(member) = open.members.iter().find(|m| m.hotkey == guilty) {
            // In a butterfly a member is a reducer too; whoever lies in either is out.
            return Some(Guilty::Member(member.rank));
        }
        nodes.iter().position(|n| n.hotkey == guilty).map(|node| {
            self.group.distrust(&nodes[node].node);
            Guilty::Reducer(node)
        })
    }

    fn tell_all(&mut self, event: &pb::round_event::Kind) {
        // One that does not take its events is as good as gone; its forwarder ends with the sender.
        let full: Vec<Rank> = self
            .followers
            .iter()
            .filter(|(_, follower)| follower.events.try_send(event.clone()).is_err())
            .map(|(rank, _)| *rank)
            .collect();
        for rank in full {
            self.followers.remove(&rank);
            drop(self.own.try_send(Input::Gone { rank }));
        }
    }

    fn fail(&mut self, failure: &RoundFailure) {
        tracing::info!(group = %self.group.id, seq = self.seq, reason = %failure.reason, "round failed");
        self.tell_all(&failed(failure));
    }
}

fn failed(failure: &RoundFailure) -> pb::round_event::Kind {
    let ranks: sundara_proto::round::Ranks = failure.ranks.iter().copied().collect();
    pb::round_event::Kind::Failed(pb::RoundFailed { reason: failure.reason.clone(), ranks: ranks.to_bytes() })
}

/// For each part, who could take it over: the named backup first, then the others.
fn spares(open: &RoundOpen, nodes: &[GroupMember], serving: &[usize]) -> Vec<Vec<usize>> {
    let place = |node: &NodeId| nodes.iter().position(|n| n.node == *node);
    open.parts
        .iter()
        .zip(serving)
        .map(|(part, now)| {
            let backup = part.backup.as_ref().and_then(|b| place(&b.node));
            let first = backup.into_iter();
            let others = (0..nodes.len()).map(|i| (i + now + 1) % nodes.len());
            let mut list: Vec<usize> = first.chain(others).filter(|node| node != now).collect();
            let mut seen = BTreeSet::new();
            list.retain(|node| seen.insert(*node));
            list
        })
        .collect()
}

fn known_from(ctx: &Ctx, ready: &pb::RoundReady) -> Option<Known> {
    let open = Signed::<RoundOpen>::verify(&ctx.network, ready.open.clone()?).ok()?;
    let amends: Result<Vec<_>, _> =
        ready.amends.iter().map(|a| Signed::<RoundAmend>::verify(&ctx.network, a.clone())).collect();
    Some(Known { open: Some(open), amends: amends.ok()? })
}

impl Spec {
    /// As a member says it to the leader.
    pub(super) fn to_ready(&self, group: &Group, seq: u64, known: &Known) -> pb::RoundReady {
        sundara_proto::round::RoundReady {
            group: group.id,
            roster: group.roster().version,
            seq,
            op: self.op,
            dtype: self.dtype,
            lens: sundara_proto::round::lens_digest(&self.lens),
            settings: self.settings,
            open: known.open.as_ref().map(Signed::to_wire),
            amends: known.amends.iter().map(Signed::to_wire).collect(),
        }
        .to_raw()
    }
}
