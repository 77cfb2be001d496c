//! Whole rounds of the three machines over a network in memory: every step at which somebody can die is tried.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use sundara_proto::id::Digest;

use super::leader::{self, LeaderMachine, Status, Terms};
use super::member::{self, MemberMachine};
use super::reducer::{self, ReducerMachine};
use super::{At, Change, Proof, Rank, Shape};

const STALL: Duration = Duration::from_millis(500);
const PARTS: u32 = 3;
const CHUNKS_A_PART: u32 = 5;

/// Who fails, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Its process ends: its peers see the connection close.
    ReducerDies(usize),
    /// It takes everything and says nothing any more.
    ReducerStalls(usize),
    MemberDies(Rank),
    /// It hangs: its connections stay open.
    MemberHangs(Rank),
}

#[derive(Clone, Debug)]
enum Event {
    ToReducer { node: usize, from: Rank, kind: Up, at: At },
    ToMember { rank: Rank, from: usize, kind: Down },
    ToLeader(leader::Input),
    Amend(Rank, Change),
    Probe(Rank),
    Close(Rank, Vec<Digest>),
    LaneLost { rank: Rank, node: usize },
    MemberTimer(Rank),
    ReducerTimer(usize),
    LeaderTimer,
}

#[derive(Clone, Copy, Debug)]
enum Up {
    Offer,
    Data,
    Nonce,
    Tags,
    Settled,
}

#[derive(Clone, Debug)]
enum Down {
    Grant(At),
    Receipt(At),
    Sum(At, Digest, Vec<Rank>),
    Nonces(At),
    TagSet(At),
    Waiting(usize, Vec<Rank>),
}

struct Member {
    machine: MemberMachine,
    /// Whose inputs are in each chunk that it holds.
    inside: BTreeMap<u32, (u32, Vec<Rank>)>,
    closed: Option<Vec<Digest>>,
    failed: bool,
}

struct World {
    rng: ChaCha8Rng,
    now: Duration,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    events: BTreeMap<u64, Event>,
    next: u64,
    steps: u64,
    members: BTreeMap<Rank, Member>,
    reducers: Vec<ReducerMachine>,
    leader: LeaderMachine,
    serving: Vec<usize>,
    dead_members: Vec<Rank>,
    hung_members: Vec<Rank>,
    dead_reducers: Vec<usize>,
    silent_reducers: Vec<usize>,
    changes: Vec<Change>,
    dropped: Vec<Rank>,
    failure: Option<String>,
    fault: (Fault, u64),
}

impl World {
    fn new(seed: u64, members: Rank, proof: Proof, fault: (Fault, u64)) -> Self {
        let shape = Shape {
            members: (0..members).collect(),
            proof,
            parts: (0..PARTS).map(|p| p * CHUNKS_A_PART..(p + 1) * CHUNKS_A_PART).collect(),
            sole: Vec::new(),
            receiver: None,
        };
        let serving: Vec<usize> = (0..PARTS as usize).collect();
        let spare = serving.iter().map(|now| (0..PARTS as usize).filter(|n| n != now).collect()).collect();
        let terms = Terms { stall: STALL, answer: STALL * 2, min_members: 1, demand_all: false };
        let member = |rank| {
            let mut machine = MemberMachine::new(rank, shape.clone(), 4, STALL);
            machine.assign(serving.iter().copied());
            (rank, Member { machine, inside: BTreeMap::new(), closed: None, failed: false })
        };
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            next: 0,
            steps: 0,
            members: (0..members).map(member).collect(),
            reducers: serving.iter().map(|n| ReducerMachine::new(shape.clone(), vec![*n], 2, STALL / 2)).collect(),
            leader: LeaderMachine::new(0, shape, terms, serving.clone(), spare, Duration::ZERO),
            serving,
            dead_members: Vec::new(),
            hung_members: Vec::new(),
            dead_reducers: Vec::new(),
            silent_reducers: Vec::new(),
            changes: Vec::new(),
            dropped: Vec::new(),
            failure: None,
            fault,
        }
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.next += 1;
        self.queue.push(Reverse((self.now + delay, self.next)));
        self.events.insert(self.next, event);
    }

    /// A message: one to twenty milliseconds.
    fn send(&mut self, event: Event) {
        let delay = Duration::from_micros(self.rng.random_range(1_000..20_000));
        self.after(delay, event);
    }

    fn at(&mut self, when: Duration, event: Event) {
        self.after(when.saturating_sub(self.now), event);
    }

    fn run(mut self) -> Self {
        let ranks: Vec<Rank> = self.members.keys().copied().collect();
        for rank in ranks {
            self.member(rank, member::Input::Begin);
        }
        while let Some(Reverse((time, id))) = self.queue.pop() {
            let Some(event) = self.events.remove(&id) else { continue };
            self.now = time;
            self.steps += 1;
            if self.steps == self.fault.1 {
                self.strike();
            }
            self.handle(event);
            let mut left = self.members.iter().filter(|(rank, _)| !self.is_out(**rank));
            if self.failure.is_some() || left.all(|(_, member)| member.closed.is_some()) {
                break;
            }
            assert!(self.steps < 200_000, "the round does not end");
        }
        self
    }

    fn strike(&mut self) {
        match self.fault.0 {
            Fault::None => {}
            Fault::ReducerDies(node) => {
                self.dead_reducers.push(node);
                let ranks: Vec<Rank> = self.members.keys().copied().collect();
                for rank in ranks {
                    self.send(Event::LaneLost { rank, node });
                }
            }
            Fault::ReducerStalls(node) => self.silent_reducers.push(node),
            Fault::MemberDies(rank) => {
                self.dead_members.push(rank);
                self.send(Event::ToLeader(leader::Input::Gone(rank)));
            }
            Fault::MemberHangs(rank) => self.hung_members.push(rank),
        }
    }

    fn is_out(&self, rank: Rank) -> bool {
        self.dead_members.contains(&rank) || self.hung_members.contains(&rank) || self.dropped.contains(&rank)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::ToReducer { node, from, kind, at } => {
                if self.dead_reducers.contains(&node) {
                    return self.send(Event::LaneLost { rank: from, node });
                }
                let input = match kind {
                    Up::Offer => reducer::Input::Offered { rank: from, at },
                    Up::Data => reducer::Input::Received { rank: from, at },
                    Up::Nonce => reducer::Input::Nonce { rank: from, at },
                    Up::Tags => reducer::Input::Tags { rank: from, at },
                    Up::Settled => reducer::Input::Settled { rank: from, at },
                };
                self.reducer(node, input);
            }
            Event::ToMember { rank, from, kind } => self.on_down(rank, from, kind),
            Event::ToLeader(input) => self.lead(input),
            Event::Amend(rank, change) => {
                if change.dropped.contains(&rank) {
                    if let Some(member) = self.members.get_mut(&rank) {
                        member.failed = true;
                    }
                    return;
                }
                self.member(rank, member::Input::Changed(change));
            }
            Event::Probe(rank) => {
                if self.is_out(rank) {
                    return;
                }
                let machine = &self.members[&rank].machine;
                let status = Status { settled: machine.settled(), progress: self.steps, changes: machine.changes() };
                self.send(Event::ToLeader(leader::Input::Status { rank, status }));
            }
            Event::Close(rank, sums) => {
                if !self.is_out(rank)
                    && let Some(member) = self.members.get_mut(&rank)
                {
                    member.closed = Some(sums);
                }
            }
            Event::LaneLost { rank, node } => {
                let parts: Vec<usize> = {
                    let machine = &self.members[&rank].machine;
                    (0..PARTS as usize).filter(|p| machine.reducer(*p) == Some(node)).collect()
                };
                for part in parts {
                    self.member(rank, member::Input::Lost { part, reason: "closed".to_owned() });
                }
            }
            Event::MemberTimer(rank) => self.member(rank, member::Input::Timer),
            Event::ReducerTimer(node) => self.reducer(node, reducer::Input::Timer),
            Event::LeaderTimer => self.lead(leader::Input::Timer),
        }
    }

    fn on_down(&mut self, rank: Rank, from: usize, kind: Down) {
        let serves = |world: &Self, at: At| {
            let machine = &world.members[&rank].machine;
            machine.is_current(at) && machine.reducer((at.chunk / CHUNKS_A_PART) as usize) == Some(from)
        };
        match kind {
            Down::Grant(at) if serves(self, at) => self.member(rank, member::Input::Granted(at)),
            Down::Receipt(at) if serves(self, at) => self.member(rank, member::Input::Receipt(at)),
            Down::Sum(at, sum, ranks) if serves(self, at) => {
                if let Some(member) = self.members.get_mut(&rank) {
                    member.inside.insert(at.chunk, (at.attempt, ranks));
                }
                self.member(rank, member::Input::Sum { at, sum });
                self.member(rank, member::Input::Output(at));
            }
            Down::Nonces(at) if serves(self, at) => self.member(rank, member::Input::Nonces(at)),
            Down::TagSet(at) if serves(self, at) => self.member(rank, member::Input::Agreed(at)),
            Down::Waiting(part, ranks) => self.member(rank, member::Input::Waiting { part, ranks }),
            _ => {}
        }
    }

    fn member(&mut self, rank: Rank, input: member::Input) {
        if self.is_out(rank) {
            return;
        }
        let now = self.now;
        let Some(member) = self.members.get_mut(&rank) else { return };
        for output in member.machine.handle(input, now) {
            self.perform(rank, output);
        }
    }

    fn perform(&mut self, rank: Rank, output: member::Output) {
        use member::Output as O;
        let node = |world: &Self, at: At| {
            world.members[&rank].machine.reducer((at.chunk / CHUNKS_A_PART) as usize).unwrap_or(0)
        };
        let mut up = |at: At, kind: Up| {
            let node = node(self, at);
            self.send(Event::ToReducer { node, from: rank, kind, at });
        };
        match output {
            O::Offer(at) => up(at, Up::Offer),
            O::Prepare(at) => self.member(rank, member::Input::Prepared(at)),
            O::Send(at) => up(at, Up::Data),
            O::Nonce(at) => up(at, Up::Nonce),
            O::Tag(at) => self.member(rank, member::Input::Tagged(at)),
            O::SendTags(at) => up(at, Up::Tags),
            O::Settled(at) => up(at, Up::Settled),
            O::Fault { part, waiting, reason } => {
                let changes = self.members[&rank].machine.changes();
                self.send(Event::ToLeader(leader::Input::Fault { rank, part, waiting, reason, changes }));
            }
            O::Done => {
                let machine = &self.members[&rank].machine;
                let (sums, changes) = (machine.sums(), machine.changes());
                self.send(Event::ToLeader(leader::Input::Done { rank, sums, changes }));
            }
            O::SetTimer(when) => self.at(when, Event::MemberTimer(rank)),
            O::Expect(_) | O::Keep(_) | O::Forget(_) => {}
        }
    }

    fn reducer(&mut self, node: usize, input: reducer::Input) {
        if self.dead_reducers.contains(&node) {
            return;
        }
        // Whoever speaks of a change brings it along.
        while (self.reducers[node].changes() as usize) < self.changes.len() {
            let change = self.changes[self.reducers[node].changes() as usize].clone();
            let mine = (0..PARTS as usize).filter(|part| self.serving[*part] == node).collect();
            let outputs = self.reducers[node].handle(reducer::Input::Changed { change, mine }, self.now);
            self.reduce(node, outputs);
        }
        let outputs = self.reducers[node].handle(input, self.now);
        self.reduce(node, outputs);
    }

    fn reduce(&mut self, node: usize, outputs: Vec<reducer::Output>) {
        use reducer::Output as O;
        for output in outputs {
            match output {
                O::Grant { at, .. } => self.broadcast(node, &Down::Grant(at)),
                O::Receipt { rank, at } => self.down(rank, node, Down::Receipt(at)),
                O::Sum { at, senders } => {
                    let mut bytes = vec![u8::try_from(node).unwrap_or(0)];
                    bytes.extend(at.chunk.to_le_bytes().iter().chain(&at.attempt.to_le_bytes()).chain(&senders));
                    let sum = Digest(*blake3::hash(&bytes).as_bytes());
                    self.broadcast(node, &Down::Sum(at, sum, senders));
                    let outputs = self.reducers[node].handle(reducer::Input::Summed(at), self.now);
                    self.reduce(node, outputs);
                }
                O::Nonces { at, .. } => self.broadcast(node, &Down::Nonces(at)),
                O::TagSet(at) => self.broadcast(node, &Down::TagSet(at)),
                O::Waiting { part, ranks } => self.broadcast(node, &Down::Waiting(part, ranks)),
                O::SetTimer(when) => self.at(when, Event::ReducerTimer(node)),
                O::Free(_) => {}
            }
        }
    }

    fn broadcast(&mut self, node: usize, kind: &Down) {
        let live: Vec<Rank> = self.reducers[node].live().collect();
        for rank in live {
            self.down(rank, node, kind.clone());
        }
    }

    fn down(&mut self, rank: Rank, node: usize, kind: Down) {
        if !self.silent_reducers.contains(&node) {
            self.send(Event::ToMember { rank, from: node, kind });
        }
    }

    fn lead(&mut self, input: leader::Input) {
        for output in self.leader.handle(input, self.now) {
            let live: Vec<Rank> = self.members.keys().copied().filter(|r| !self.dropped.contains(r)).collect();
            match output {
                leader::Output::Probe => live.into_iter().for_each(|rank| self.send(Event::Probe(rank))),
                leader::Output::Amend(change) => {
                    self.changes.push(change.clone());
                    for (part, node) in &change.moved {
                        self.serving[*part] = *node;
                    }
                    live.into_iter().for_each(|rank| self.send(Event::Amend(rank, change.clone())));
                    self.dropped.extend(&change.dropped);
                    // Members tell the reducers of it at once.
                    for node in 0..self.reducers.len() {
                        self.after(Duration::from_millis(20), Event::ReducerTimer(node));
                    }
                }
                leader::Output::Close { sums, .. } => {
                    live.into_iter().for_each(|rank| self.send(Event::Close(rank, sums.clone())));
                }
                leader::Output::Fail { reason, .. } => self.failure = Some(reason),
                leader::Output::SetTimer(when) => self.at(when, Event::LeaderTimer),
            }
        }
    }

    /// That everyone who is left has the same result, of those who took part.
    fn check(&self, what: &str) {
        assert_eq!(self.failure, None, "{what}");
        let left: Vec<&Member> = self.members.iter().filter(|(r, _)| !self.is_out(**r)).map(|(_, m)| m).collect();
        assert!(!left.is_empty(), "{what}");
        for member in &left {
            let Some(closed) = &member.closed else { panic!("{what}: a member has no result") };
            assert_eq!(*closed, member.machine.sums(), "{what}");
            let inside = |m: &Member| m.inside.values().map(|(_, ranks)| ranks.clone()).collect::<Vec<_>>();
            assert_eq!(inside(member), inside(left[0]), "{what}");
            assert_eq!(member.inside.len(), (PARTS * CHUNKS_A_PART) as usize, "{what}");
        }
        for (rank, _) in self.members.iter().filter(|(r, _)| !self.is_out(**r)) {
            assert!(left[0].inside.values().all(|(_, ranks)| ranks.contains(rank)), "{what}: {rank} is missing");
        }
        let guilty = |r: &Rank| self.dead_members.contains(r) || self.hung_members.contains(r);
        assert!(self.dropped.iter().all(guilty), "{what}: somebody who lives was left out: {:?}", self.dropped);
    }
}

fn clean(proof: Proof, seed: u64) -> World {
    let world = World::new(seed, 4, proof, (Fault::None, 0)).run();
    world.check("clean");
    assert!(world.changes.is_empty(), "nothing fails and the round is amended");
    world
}

#[test]
fn a_round_in_which_nothing_fails_closes_without_a_change() {
    for proof in [Proof::Tags, Proof::Sampled, Proof::Off] {
        for seed in 0..20 {
            clean(proof, seed);
        }
    }
}

#[test]
fn a_reducer_may_die_or_stall_at_any_step() {
    for proof in [Proof::Tags, Proof::Sampled] {
        let steps = clean(proof, 1).steps;
        for step in 1..=steps {
            for fault in [Fault::ReducerDies(1), Fault::ReducerStalls(2)] {
                World::new(1, 4, proof, (fault, step)).run().check(&format!("{fault:?} at {step} of {steps}"));
            }
        }
    }
}

#[test]
fn a_member_may_die_or_hang_at_any_step() {
    for proof in [Proof::Tags, Proof::Sampled] {
        let steps = clean(proof, 2).steps;
        for step in 1..=steps {
            for fault in [Fault::MemberDies(2), Fault::MemberHangs(3)] {
                World::new(2, 4, proof, (fault, step)).run().check(&format!("{fault:?} at {step} of {steps}"));
            }
        }
    }
}
