//! The lowest live rank of a round: who takes part, what changes when something fails, when the result counts.
//!
//! Invariants: nobody is dropped who answers, except on proof or when others have waited for it through
//! [`PATIENCE`] probes; a part goes to each reducer at most once; a round ends, with a result or with a reason.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sundara_proto::id::Digest;

use super::{Change, Rank, Shape};

/// Probes in a row that a member may be waited for while it still makes progress. Beyond it, it costs the others more
/// than its share is worth.
pub const PATIENCE: u32 = 8;
/// Times of `stall` without any chunk being settled anywhere after which the round fails.
const GIVE_UP: u32 = 40;

/// Times of `stall` without a word from anyone after which the leader asks.
const QUIET: u32 = 2;

/// What a member says of its state.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Chunks settled there.
    pub settled: Vec<bool>,
    /// Grows whenever something moves there.
    pub progress: u64,
    /// Changes applied there.
    pub changes: u32,
}

/// Who is proven guilty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Guilty {
    /// A reducer, by its index among the round's nodes.
    Reducer(usize),
    /// A member.
    Member(Rank),
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A member has every chunk.
    Done {
        /// Who.
        rank: Rank,
        /// Digest of each chunk's sum commitment.
        sums: Vec<Digest>,
        /// Changes applied there.
        changes: u32,
    },
    /// A member has trouble with a part.
    Fault {
        /// Who.
        rank: Rank,
        /// With which part.
        part: usize,
        /// For whom the reducer says that it waits; empty when it says nothing.
        waiting: Vec<Rank>,
        /// In words.
        reason: String,
        /// Changes applied there: trouble from before a change is over.
        changes: u32,
    },
    /// A member's tensor cannot take part: its own doing, which no other reducer mends.
    Refused {
        /// Who.
        rank: Rank,
        /// In words.
        reason: String,
    },
    /// Proof, checked.
    Convicted(Guilty),
    /// Answer to a probe.
    Status {
        /// Who.
        rank: Rank,
        /// What it says.
        status: Status,
    },
    /// A member's connection is gone.
    Gone(Rank),
    /// A timer that was asked for.
    Timer,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Ask every live member for its status.
    Probe,
    /// Sign and tell every live member.
    Amend(Change),
    /// Sign and tell every live member: these sums count.
    Close {
        /// Digest of each chunk's sum commitment.
        sums: Vec<Digest>,
        /// Who left.
        dropped: Vec<Rank>,
    },
    /// Tell every member that the round has failed.
    Fail {
        /// In words.
        reason: String,
        /// Who is to blame, if anyone.
        ranks: Vec<Rank>,
    },
    /// Wake the machine then.
    SetTimer(Duration),
}

/// Limits of a round.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Silence that counts as trouble.
    pub stall: Duration,
    /// Time to answer a probe.
    pub answer: Duration,
    /// Fewer live members end the round.
    pub min_members: usize,
    /// Nobody may be left out.
    pub demand_all: bool,
}

#[derive(Debug, Default)]
struct Suspicion {
    /// Reported by these, with nobody named.
    silent: BTreeSet<Rank>,
    /// Named as waited for.
    waiting: BTreeSet<Rank>,
    reason: String,
}

#[derive(Debug)]
struct Probe {
    until: Duration,
    answers: BTreeMap<Rank, Status>,
}

/// See the module.
#[derive(Debug)]
pub struct LeaderMachine {
    me: Rank,
    shape: Shape,
    terms: Terms,
    /// Candidates for each part, best first; the one that serves it is taken out.
    spare: Vec<Vec<usize>>,
    serving: Vec<usize>,
    live: BTreeSet<Rank>,
    dropped: BTreeSet<Rank>,
    bad: BTreeSet<usize>,
    changes: u32,
    done: BTreeMap<Rank, Vec<Digest>>,
    suspicion: BTreeMap<usize, Suspicion>,
    convicted: BTreeSet<Guilty>,
    gone: BTreeSet<Rank>,
    probe: Option<Probe>,
    progress: BTreeMap<Rank, (u64, u32)>,
    settled_most: usize,
    moved_at: Duration,
    /// When a member said something last.
    heard: Duration,
    ended: bool,
    timer: Option<Duration>,
}

impl LeaderMachine {
    /// `spare`: for each part, reducers (indices among the round's nodes) that could take it over, best first. `serving`:
    /// who has it now.
    pub fn new(
        me: Rank,
        shape: Shape,
        terms: Terms,
        serving: Vec<usize>,
        spare: Vec<Vec<usize>>,
        now: Duration,
    ) -> Self {
        Self {
            me,
            live: shape.members.iter().copied().collect(),
            shape,
            terms,
            spare,
            serving,
            dropped: BTreeSet::new(),
            bad: BTreeSet::new(),
            changes: 0,
            done: BTreeMap::new(),
            suspicion: BTreeMap::new(),
            convicted: BTreeSet::new(),
            gone: BTreeSet::new(),
            probe: None,
            progress: BTreeMap::new(),
            settled_most: 0,
            moved_at: now,
            heard: now,
            ended: false,
            timer: None,
        }
    }

    /// Takes over a round from a leader that is gone: the changes so far, and who has left before.
    pub fn take_over(&mut self, changes: &[Change], gone: impl IntoIterator<Item = Rank>) {
        for change in changes {
            self.changes = change.number;
            for (part, reducer) in &change.moved {
                self.serve(*part, *reducer);
            }
            for rank in &change.dropped {
                self.live.remove(rank);
                self.dropped.insert(*rank);
            }
        }
        self.gone.extend(gone);
    }

    /// Members that are in.
    pub fn live(&self) -> impl Iterator<Item = Rank> + '_ {
        self.live.iter().copied()
    }

    /// Whether it has closed or failed.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// Takes what happened and says what is to be done.
    pub fn handle(&mut self, input: Input, now: Duration) -> Vec<Output> {
        let mut out = Vec::new();
        if self.ended {
            return out;
        }
        if !matches!(input, Input::Timer) {
            self.heard = now;
        }
        match input {
            Input::Done { rank, sums, changes } => {
                if changes == self.changes && self.live.contains(&rank) {
                    self.moved_at = now;
                    self.done.insert(rank, sums);
                }
            }
            Input::Fault { rank, part, waiting, reason, changes } => {
                if changes == self.changes && self.live.contains(&rank) && part < self.shape.parts.len() {
                    let suspicion = self.suspicion.entry(part).or_default();
                    if waiting.is_empty() || waiting.contains(&rank) {
                        suspicion.silent.insert(rank);
                    } else {
                        suspicion.waiting.extend(waiting.into_iter().filter(|r| self.live.contains(r)));
                    }
                    suspicion.reason = reason;
                    self.probe(now, &mut out);
                }
            }
            Input::Refused { rank, reason } => {
                if self.live.contains(&rank) {
                    self.fail(reason, vec![rank], &mut out);
                }
            }
            Input::Convicted(guilty) => {
                self.convicted.insert(guilty);
                self.probe(now, &mut out);
            }
            Input::Status { rank, status } => self.status(rank, status, now, &mut out),
            Input::Gone(rank) => {
                if self.live.contains(&rank) && rank != self.me {
                    self.gone.insert(rank);
                    self.probe(now, &mut out);
                }
            }
            Input::Timer => {
                self.timer = None;
                if self.probe.as_ref().is_some_and(|probe| now >= probe.until) {
                    self.judge(now, &mut out);
                } else if self.probe.is_none()
                    && (!self.gone.is_empty() || now >= self.heard + self.terms.stall * QUIET)
                {
                    // Members that are done have nothing to complain of; one that hangs is found by asking.
                    self.heard = now;
                    self.probe(now, &mut out);
                }
                if now >= self.moved_at + (self.terms.stall + self.terms.answer) * GIVE_UP {
                    self.fail("nothing has moved for too long".to_owned(), Vec::new(), &mut out);
                }
            }
        }
        self.close(&mut out);
        self.arm(now, &mut out);
        out
    }

    /// Asks everyone how far they are, unless that is being asked.
    fn probe(&mut self, now: Duration, out: &mut Vec<Output>) {
        if self.probe.is_none() {
            self.probe = Some(Probe { until: now + self.terms.answer, answers: BTreeMap::new() });
            out.push(Output::Probe);
        }
    }

    fn status(&mut self, rank: Rank, status: Status, now: Duration, out: &mut Vec<Output>) {
        let settled = status.settled.iter().filter(|s| **s).count();
        if settled > self.settled_most {
            (self.settled_most, self.moved_at) = (settled, now);
        }
        let Some(probe) = self.probe.as_mut().filter(|_| status.changes == self.changes) else { return };
        probe.answers.insert(rank, status);
        let all = self.live.iter().all(|rank| self.gone.contains(rank) || probe.answers.contains_key(rank));
        if all {
            self.judge(now, out);
        }
    }

    /// All have answered, or had the time to.
    fn judge(&mut self, now: Duration, out: &mut Vec<Output>) {
        let Some(probe) = self.probe.take() else { return };
        let mut drop: BTreeSet<Rank> =
            self.live.iter().copied().filter(|r| *r != self.me && !probe.answers.contains_key(r)).collect();
        let mut moves = BTreeSet::new();
        for guilty in std::mem::take(&mut self.convicted) {
            match guilty {
                Guilty::Member(rank) => drop.extend(self.live.contains(&rank).then_some(rank)),
                Guilty::Reducer(node) => {
                    self.bad.insert(node);
                    moves.extend((0..self.serving.len()).filter(|part| self.serving[*part] == node));
                }
            }
        }
        let mut reasons = Vec::new();
        for (part, suspicion) in std::mem::take(&mut self.suspicion) {
            let waited: Vec<Rank> = suspicion.waiting.iter().copied().filter(|r| !drop.contains(r)).collect();
            if !suspicion.silent.is_empty() {
                moves.insert(part);
                reasons.push(suspicion.reason);
            } else if !waited.is_empty() {
                // They answer. As long as they move they may be slow, but not for ever.
                drop.extend(waited.into_iter().filter(|rank| self.too_slow(*rank, &probe)));
            }
        }
        for (rank, status) in &probe.answers {
            let before = self.progress.get(rank).map_or(0, |(progress, _)| *progress);
            let patience = self.progress.get(rank).map_or(0, |(_, patience)| *patience);
            self.progress.insert(*rank, (status.progress.max(before), patience));
        }
        drop.remove(&self.me);
        self.gone.clear();
        self.amend(drop, moves, &probe, reasons, now, out);
    }

    /// Whether a member that answers but is waited for should be left out.
    fn too_slow(&mut self, rank: Rank, probe: &Probe) -> bool {
        let now = probe.answers.get(&rank).map_or(0, |status| status.progress);
        let (before, waited) = self.progress.get(&rank).copied().unwrap_or((0, 0));
        let (moved, waited) = (now > before, waited + 1);
        self.progress.insert(rank, (before, if moved { waited } else { waited + PATIENCE / 4 }));
        waited > PATIENCE && rank != self.me
    }

    fn amend(
        &mut self,
        drop: BTreeSet<Rank>,
        moves: BTreeSet<usize>,
        probe: &Probe,
        reasons: Vec<String>,
        now: Duration,
        out: &mut Vec<Output>,
    ) {
        if drop.is_empty() && moves.is_empty() {
            return;
        }
        if self.terms.demand_all && !drop.is_empty() {
            let ranks: Vec<Rank> = drop.into_iter().collect();
            return self.fail(format!("the group demands all members, and {ranks:?} left"), ranks, out);
        }
        let stays = self.live.len() - drop.len();
        if stays < self.terms.min_members {
            let reason = format!("{stays} members are left, and the group asks for {}", self.terms.min_members);
            return self.fail(reason, drop.into_iter().collect(), out);
        }
        let mut moved = Vec::new();
        for part in moves {
            let spare = &mut self.spare[part];
            spare.retain(|node| !self.bad.contains(node));
            if spare.is_empty() {
                let why = reasons.first().cloned().unwrap_or_default();
                let reason = format!("no reducer is left for part {part}: {why}; name more reducers for the group");
                return self.fail(reason, Vec::new(), out);
            }
            let node = spare.remove(0);
            moved.push((part, node));
            self.serve(part, node);
        }
        for rank in &drop {
            self.live.remove(rank);
            self.dropped.insert(*rank);
        }
        let has = |chunk: usize| {
            let of = |rank: &Rank| probe.answers.get(rank).and_then(|s| s.settled.get(chunk)).copied().unwrap_or(false);
            self.live.iter().all(of)
        };
        let keep = (0..self.shape.chunks() as usize).map(has).collect();
        self.changes += 1;
        self.done.clear();
        self.suspicion.clear();
        self.moved_at = now;
        out.push(Output::Amend(Change { number: self.changes, dropped: drop.into_iter().collect(), moved, keep }));
    }

    fn serve(&mut self, part: usize, node: usize) {
        if let (Some(serving), Some(spare)) = (self.serving.get_mut(part), self.spare.get_mut(part)) {
            *serving = node;
            spare.retain(|n| *n != node);
        }
    }

    fn close(&mut self, out: &mut Vec<Output>) {
        if self.ended || !self.live.iter().all(|rank| self.done.contains_key(rank)) {
            return;
        }
        let mut all = self.done.iter().filter(|(rank, _)| self.live.contains(rank));
        let Some((_, first)) = all.next() else { return };
        let differs: Vec<Rank> = all.filter(|(_, sums)| *sums != first).map(|(rank, _)| *rank).collect();
        if !differs.is_empty() {
            let reason = "members hold sums of different commitments".to_owned();
            return self.fail(reason, differs, out);
        }
        let (sums, dropped) = (first.clone(), self.dropped.iter().copied().collect());
        self.ended = true;
        out.push(Output::Close { sums, dropped });
    }

    fn fail(&mut self, reason: String, ranks: Vec<Rank>, out: &mut Vec<Output>) {
        self.ended = true;
        out.push(Output::Fail { reason, ranks });
    }

    fn arm(&mut self, now: Duration, out: &mut Vec<Output>) {
        if self.ended {
            return;
        }
        let give_up = self.moved_at + (self.terms.stall + self.terms.answer) * GIVE_UP;
        let quiet = self.heard + self.terms.stall * QUIET;
        let due = self.probe.as_ref().map_or(quiet, |probe| probe.until).min(give_up);
        if self.timer.is_none_or(|timer| timer > due || timer <= now) {
            self.timer = Some(due);
            out.push(Output::SetTimer(due));
        }
    }
}
