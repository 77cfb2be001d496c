//! Groups: who is in, how their rounds run, and what earlier rounds have shown.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sundara_proto::cert::Roles;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{GroupId, Hotkey, NodeId};
use sundara_proto::pb;
use sundara_proto::round::{GroupMember, GroupRoster, Mode, Rank, RoundOp, RoundOpen, RoundSettings, StateDigest};
use sundara_proto::rules::round::dtype::{Compress, Dtype, Wire};
use tokio::sync::watch;

use super::Ctx;
use super::terms::Round;
use crate::domain::round::plan::{Candidate, Pace};

/// Which reducers a group uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reducers {
    /// Any connected miners, at most so many; the leader waits a moment for them.
    Any(usize),
    /// These nodes.
    Nodes(Vec<NodeId>),
}

impl Default for Reducers {
    fn default() -> Self {
        Self::Any(4)
    }
}

/// How long a group waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupTimes {
    /// For all members to bring their tensors to a round.
    pub gather: Duration,
    /// For members that are not even connected, once all others are there.
    pub absent: Duration,
    /// For a member to answer its leader.
    pub answer: Duration,
}

impl Default for GroupTimes {
    /// A minute for a slow gradient, two seconds for one that is gone or does not answer.
    fn default() -> Self {
        Self { gather: Duration::from_secs(60), absent: Duration::from_secs(2), answer: Duration::from_secs(2) }
    }
}

/// A group of which this node is a member.
pub(super) struct Group {
    pub(super) id: GroupId,
    pub(super) terms: GroupTimes,
    pub(super) choice: Reducers,
    rank: Rank,
    roster: watch::Receiver<Arc<Signed<GroupRoster>>>,
    next: AtomicU64,
    pace: Mutex<Pace>,
    bandwidth: Mutex<HashMap<NodeId, f64>>,
    distrusted: Mutex<HashSet<NodeId>>,
    /// Reducers that the last round found; all that are wanted before the first.
    found: AtomicUsize,
    /// Members that were away when the last round opened.
    away: Mutex<BTreeSet<Rank>>,
    /// What members said of their states, the newest of each.
    states: Mutex<HashMap<Hotkey, Signed<StateDigest>>>,
    /// What compression left away, by the lengths of the tensors.
    residuals: Mutex<HashMap<Vec<u64>, Vec<f32>>>,
}

/// Residuals of different tensors that are kept.
const RESIDUALS_MAX: usize = 8;

impl Group {
    pub(super) fn new(
        id: GroupId,
        rank: Rank,
        terms: GroupTimes,
        choice: Reducers,
        roster: watch::Receiver<Arc<Signed<GroupRoster>>>,
        next: u64,
    ) -> Self {
        Self {
            id,
            terms,
            choice,
            rank,
            roster,
            next: AtomicU64::new(next),
            pace: Mutex::default(),
            bandwidth: Mutex::default(),
            distrusted: Mutex::default(),
            found: AtomicUsize::new(usize::MAX),
            away: Mutex::default(),
            states: Mutex::default(),
            residuals: Mutex::default(),
        }
    }

    pub(super) fn rank(&self) -> Rank {
        self.rank
    }

    pub(super) fn roster(&self) -> Arc<Signed<GroupRoster>> {
        self.roster.borrow().clone()
    }

    /// The number of the next round.
    pub(super) fn turn(&self, rounds: u64) -> u64 {
        self.next.fetch_add(rounds, Ordering::Relaxed)
    }

    /// The number that the next round will have.
    pub(super) fn upcoming(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// What members said of their states, as they go on the wire.
    pub(super) fn states(&self) -> Vec<pb::Signed> {
        lock(&self.states).values().map(Signed::to_wire).collect()
    }

    /// What a member says of its state; an older word than its last does not count.
    pub(super) fn note_state(&self, state: Signed<StateDigest>) {
        let hotkey = Hotkey(state.signer());
        if state.group != self.id || self.roster().rank_of(&hotkey).is_none() {
            return;
        }
        let mut states = lock(&self.states);
        if states.get(&hotkey).is_none_or(|old| old.seq <= state.seq) {
            states.insert(hotkey, state);
        }
    }

    /// What this node said of its own state last.
    pub(super) fn own_state(&self, me: &Hotkey) -> Option<pb::Signed> {
        lock(&self.states).get(me).map(Signed::to_wire)
    }

    /// How a round of this operation and type runs: what cannot be checked by tags is checked by samples.
    pub(super) fn settings_for(&self, op: RoundOp, dtype: Dtype) -> RoundSettings {
        let roster = self.roster();
        let settings = roster.settings;
        let tagged = op.is_sum() && Wire::of(dtype, settings.compress, roster.members.len()).is_some();
        if settings.mode != Mode::Verified || tagged || !op.is_reduction() {
            return settings;
        }
        RoundSettings { mode: Mode::Exact, compress: Compress::None, ..settings }
    }

    /// Silence that is trouble in a round of so many bytes.
    pub(super) fn stall(&self, bytes: u64) -> Duration {
        lock(&self.pace).stall(bytes)
    }

    /// A round of so many bytes took so long.
    pub(super) fn record(&self, bytes: u64, took: Duration) {
        if bytes > 0 {
            lock(&self.pace).record(bytes, took);
        }
    }

    /// A reducer carried its part at this rate, in bytes a second.
    pub(super) fn record_reducer(&self, node: NodeId, rate: f64) {
        let mut known = lock(&self.bandwidth);
        let old = known.get(&node).copied().unwrap_or(rate);
        known.insert(node, old + (rate - old) / 3.0);
    }

    /// Whether these members were away when the last round opened: nobody waits for them again until they come.
    pub(super) fn were_away(&self, ranks: &[Rank]) -> bool {
        let away = lock(&self.away);
        ranks.iter().all(|rank| away.contains(rank))
    }

    /// Who is away as a round opens.
    pub(super) fn note_away(&self, ranks: Vec<Rank>) {
        *lock(&self.away) = ranks.into_iter().collect();
    }

    /// A reducer lied: it gets nothing more of this group.
    pub(super) fn distrust(&self, node: &NodeId) {
        lock(&self.distrusted).insert(*node);
    }

    /// A reducer as the planner takes it.
    pub(super) fn candidate(&self, node: usize, id: &NodeId) -> Candidate {
        let known = lock(&self.bandwidth);
        let (least, most) = known.values().fold((f64::MAX, 0.0_f64), |(a, b), rate| (a.min(*rate), b.max(*rate)));
        // Rates of one round differ by chance; shares that follow each of them would never rest.
        let bandwidth = known.get(id).filter(|_| most > 2.0 * least).map(|rate| *rate as u64);
        Candidate { node, memory: u64::MAX, bandwidth }
    }

    /// Reducers for a round, after a moment's wait for those that are asked for.
    pub(super) async fn reducers(&self, ctx: &Ctx) -> Vec<GroupMember> {
        let wanted = match &self.choice {
            Reducers::Any(count) => *count,
            Reducers::Nodes(nodes) => nodes.len(),
        };
        // Those for whom the last round waited in vain are not waited for again.
        let wait_for = self.found.load(Ordering::Relaxed).min(wanted);
        let enough = ctx.directory.wait_for(|_| self.usable(ctx).len() >= wait_for);
        // Fewer do as well, and none is said by the planner.
        drop(tokio::time::timeout(self.terms.absent, enough).await);
        let mut found = self.usable(ctx);
        found.truncate(wanted);
        self.found.store(found.len(), Ordering::Relaxed);
        found
    }

    /// Connected reducers that never lied, in the order of their keys.
    fn usable(&self, ctx: &Ctx) -> Vec<GroupMember> {
        let (here, bad) = (ctx.directory.snapshot(), lock(&self.distrusted));
        let mut found: Vec<GroupMember> = here
            .peers
            .values()
            .filter(|peer| !bad.contains(&peer.node))
            .filter(|peer| match &self.choice {
                Reducers::Any(_) => peer.roles.contains(Roles::MINER),
                Reducers::Nodes(nodes) => nodes.contains(&peer.node),
            })
            .map(|peer| GroupMember { hotkey: peer.hotkey, node: peer.node })
            .collect();
        found.sort_by_key(|m| m.node.0);
        found
    }

    /// Reducers that an open round does not name, and that could stand in.
    pub(super) fn spares(&self, ctx: &Ctx, open: &RoundOpen) -> Vec<GroupMember> {
        let named: BTreeSet<NodeId> = open.parts.iter().map(|p| p.reducer.node).collect();
        self.usable(ctx).into_iter().filter(|m| !named.contains(&m.node)).collect()
    }

    /// What compression left away of a chunk in earlier rounds over tensors of the same lengths.
    pub(super) fn residual(&self, round: &Round, chunk: u32) -> Option<Vec<f32>> {
        let place = round.chunk(chunk).filter(|_| compresses(round) && !round.is_sole(chunk))?;
        let residuals = lock(&self.residuals);
        let range = element(place.elements.start)..element(place.elements.end);
        let known = residuals.get(&round.open.lens).and_then(|all| all.get(range.clone()));
        Some(known.map_or_else(|| vec![0.0; range.len()], <[f32]>::to_vec))
    }

    /// Keeps what compression left away of a chunk.
    pub(super) fn keep_residual(&self, round: &Round, chunk: u32, residual: &[f32]) {
        let Some(place) = round.chunk(chunk) else { return };
        let mut residuals = lock(&self.residuals);
        if residuals.len() >= RESIDUALS_MAX && !residuals.contains_key(&round.open.lens) {
            residuals.clear();
        }
        let all = residuals.entry(round.open.lens.clone()).or_default();
        all.resize(element(round.open.elements()), 0.0);
        if let Some(slot) = all.get_mut(element(place.elements.start)..element(place.elements.end)) {
            slot.copy_from_slice(residual);
        }
    }
}

fn element(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// Whether words are smaller than elements.
fn compresses(round: &Round) -> bool {
    round.wire.is_some() && round.open.settings.compress != Compress::None
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
