//! A reducer's way through one round. See [`super`].
//!
//! Invariants: at most `window` chunks have memory at once, granted in the order in which their offers were complete; the
//! inputs of a chunk are kept until every live member has settled it; whoever is waited for longer than `stall` is named
//! to the members.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use super::{At, Change, Proof, Rank, Shape};

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A member can send the chunk.
    Offered {
        /// Who.
        rank: Rank,
        /// What.
        at: At,
    },
    /// A member's data is here, whole, and as committed.
    Received {
        /// Who.
        rank: Rank,
        /// What.
        at: At,
    },
    /// The sum is computed and its commitment signed.
    Summed(At),
    /// A member revealed its nonce.
    Nonce {
        /// Who.
        rank: Rank,
        /// What.
        at: At,
    },
    /// A member's tags are here, well signed.
    Tags {
        /// Who.
        rank: Rank,
        /// What.
        at: At,
    },
    /// A member has settled the chunk.
    Settled {
        /// Who.
        rank: Rank,
        /// What.
        at: At,
    },
    /// The leader changed the round. `mine`: the parts that are this reducer's from now on.
    Changed {
        /// The change.
        change: Change,
        /// Parts to serve.
        mine: Vec<usize>,
    },
    /// A timer that was asked for.
    Timer,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Make room for the inputs of these members, and tell everyone all scales.
    Grant {
        /// The chunk.
        at: At,
        /// Who sends.
        senders: Vec<Rank>,
    },
    /// Sign for a member's data.
    Receipt {
        /// To whom.
        rank: Rank,
        /// For what.
        at: At,
    },
    /// Sum, commit, and send commitment and output to every live member.
    Sum {
        /// The chunk.
        at: At,
        /// Whose inputs.
        senders: Vec<Rank>,
    },
    /// Send everyone's nonces; those of `late` count as zeros.
    Nonces {
        /// The chunk.
        at: At,
        /// Who did not reveal.
        late: Vec<Rank>,
    },
    /// Send everyone's tags.
    TagSet(At),
    /// Nobody needs the chunk any more.
    Free(At),
    /// Tell the live members for whom this reducer waits.
    Waiting {
        /// The part.
        part: usize,
        /// For whom.
        ranks: Vec<Rank>,
    },
    /// Wake the machine then.
    SetTimer(Duration),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    #[default]
    Offering,
    Queued,
    Receiving,
    Summing,
    Nonces,
    Tags,
    Settling,
    Free,
}

#[derive(Clone, Debug, Default)]
struct Chunk {
    attempt: u32,
    stage: Stage,
    offers: BTreeSet<Rank>,
    received: BTreeSet<Rank>,
    nonces: BTreeSet<Rank>,
    tags: BTreeSet<Rank>,
    settled: BTreeSet<Rank>,
    since: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct ReducerMachine {
    shape: Shape,
    live: BTreeSet<Rank>,
    mine: Vec<usize>,
    window: usize,
    stall: Duration,
    changes: u32,
    chunks: Vec<Chunk>,
    /// Offers complete, no memory yet.
    queue: VecDeque<u32>,
    /// With memory.
    active: BTreeSet<u32>,
    /// Offers came, not from all.
    begun: BTreeSet<u32>,
    timer: Option<Duration>,
}

impl ReducerMachine {
    /// `mine`: the parts that it serves. `window`: chunks with memory at once. `stall`: time after which it says for whom
    /// it waits.
    pub fn new(shape: Shape, mine: Vec<usize>, window: usize, stall: Duration) -> Self {
        Self {
            live: shape.members.iter().copied().collect(),
            chunks: vec![Chunk::default(); shape.chunks() as usize],
            shape,
            mine,
            window: window.max(1),
            stall,
            changes: 0,
            queue: VecDeque::new(),
            active: BTreeSet::new(),
            begun: BTreeSet::new(),
            timer: None,
        }
    }

    /// Whether the present attempt of the chunk is this one and has memory.
    pub fn takes(&self, at: At) -> bool {
        self.chunk(at).is_some_and(|c| c.stage == Stage::Receiving)
    }

    /// Whether the member is in.
    pub fn is_live(&self, rank: Rank) -> bool {
        self.live.contains(&rank)
    }

    /// Members that are in.
    pub fn live(&self) -> impl Iterator<Item = Rank> + '_ {
        self.live.iter().copied()
    }

    /// Changes applied.
    pub fn changes(&self) -> u32 {
        self.changes
    }

    /// Whether all chunks of its parts are settled by everyone.
    pub fn is_idle(&self) -> bool {
        let mut chunks = self.mine.iter().flat_map(|p| self.shape.parts[*p].clone());
        chunks.all(|c| self.chunks[c as usize].stage == Stage::Free)
    }

    /// Takes what happened and says what is to be done.
    pub fn handle(&mut self, input: Input, now: Duration) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Offered { rank, at } => self.offered(rank, at, now),
            Input::Received { rank, at } => self.received(rank, at, now, &mut out),
            Input::Summed(at) => self.summed(at, now, &mut out),
            Input::Nonce { rank, at } => {
                let sends = self.sends(rank, at);
                if let Some(chunk) = self.at(at, Stage::Nonces).filter(|_| sends) {
                    chunk.nonces.insert(rank);
                    self.nonces_in(at, now, false, &mut out);
                }
            }
            Input::Tags { rank, at } => {
                let sends = self.sends(rank, at);
                if let Some(chunk) = self.at(at, Stage::Tags).filter(|_| sends) {
                    chunk.tags.insert(rank);
                    self.tags_in(at, now, &mut out);
                }
            }
            Input::Settled { rank, at } => {
                if let Some(chunk) = self.chunk_mut(at).filter(|c| c.stage >= Stage::Summing && c.stage != Stage::Free)
                {
                    chunk.settled.insert(rank);
                    self.free_settled(at, &mut out);
                }
            }
            Input::Changed { change, mine } => self.changed(&change, mine, now, &mut out),
            Input::Timer => {
                self.timer = None;
                self.look_for_stalls(now, &mut out);
            }
        }
        self.grant(now, &mut out);
        self.arm(now, &mut out);
        out
    }

    fn chunk(&self, at: At) -> Option<&Chunk> {
        self.chunks.get(at.chunk as usize).filter(|c| c.attempt == at.attempt)
    }

    fn chunk_mut(&mut self, at: At) -> Option<&mut Chunk> {
        self.chunks.get_mut(at.chunk as usize).filter(|c| c.attempt == at.attempt)
    }

    fn at(&mut self, at: At, stage: Stage) -> Option<&mut Chunk> {
        self.chunk_mut(at).filter(|c| c.stage == stage)
    }

    fn sends(&self, rank: Rank, at: At) -> bool {
        self.live.contains(&rank) && self.shape.sends(rank, at.chunk)
    }

    /// Live members whose input the chunk needs.
    fn senders(&self, chunk: u32) -> Vec<Rank> {
        self.live.iter().copied().filter(|rank| self.shape.sends(*rank, chunk)).collect()
    }

    fn serves(&self, chunk: u32) -> Option<usize> {
        self.mine.iter().copied().find(|part| self.shape.parts[*part].contains(&chunk))
    }

    fn offered(&mut self, rank: Rank, at: At, now: Duration) {
        if !self.live.contains(&rank) || self.serves(at.chunk).is_none() {
            return;
        }
        let live = self.live.len();
        let Some(chunk) = self.at(at, Stage::Offering) else { return };
        if chunk.offers.is_empty() {
            chunk.since = now;
        }
        chunk.offers.insert(rank);
        if chunk.offers.len() >= live {
            chunk.stage = Stage::Queued;
            self.begun.remove(&at.chunk);
            self.queue.push_back(at.chunk);
        } else {
            self.begun.insert(at.chunk);
        }
    }

    fn grant(&mut self, now: Duration, out: &mut Vec<Output>) {
        while self.active.len() < self.window {
            let Some(chunk) = self.queue.pop_front() else { return };
            let senders = self.senders(chunk);
            let state = &mut self.chunks[chunk as usize];
            (state.stage, state.since) = (Stage::Receiving, now);
            let at = At { chunk, attempt: state.attempt };
            self.active.insert(chunk);
            out.push(Output::Grant { at, senders });
        }
    }

    fn received(&mut self, rank: Rank, at: At, now: Duration, out: &mut Vec<Output>) {
        if !self.sends(rank, at) {
            return;
        }
        let senders = self.senders(at.chunk);
        let Some(chunk) = self.at(at, Stage::Receiving) else { return };
        if !chunk.received.insert(rank) {
            return;
        }
        chunk.since = now;
        out.push(Output::Receipt { rank, at });
        if chunk.received.len() == senders.len() {
            chunk.stage = Stage::Summing;
            out.push(Output::Sum { at, senders });
        }
    }

    fn summed(&mut self, at: At, now: Duration, out: &mut Vec<Output>) {
        let tags =
            self.shape.proof == Proof::Tags && self.shape.sole.get(at.chunk as usize).is_none_or(Option::is_none);
        let Some(chunk) = self.at(at, Stage::Summing) else { return };
        (chunk.stage, chunk.since) = (if tags { Stage::Nonces } else { Stage::Settling }, now);
        self.free_settled(at, out);
    }

    fn nonces_in(&mut self, at: At, now: Duration, late: bool, out: &mut Vec<Output>) {
        let senders = self.senders(at.chunk);
        let Some(chunk) = self.at(at, Stage::Nonces) else { return };
        let missing: Vec<Rank> = senders.into_iter().filter(|r| !chunk.nonces.contains(r)).collect();
        if missing.is_empty() || late {
            (chunk.stage, chunk.since) = (Stage::Tags, now);
            out.push(Output::Nonces { at, late: missing });
        }
    }

    fn tags_in(&mut self, at: At, now: Duration, out: &mut Vec<Output>) {
        let senders = self.senders(at.chunk);
        let Some(chunk) = self.at(at, Stage::Tags) else { return };
        if senders.iter().all(|rank| chunk.tags.contains(rank)) {
            (chunk.stage, chunk.since) = (Stage::Settling, now);
            out.push(Output::TagSet(at));
        }
    }

    fn free_settled(&mut self, at: At, out: &mut Vec<Output>) {
        let Some(chunk) = self.chunk(at) else { return };
        let over = chunk.stage == Stage::Settling && self.live.iter().all(|rank| chunk.settled.contains(rank));
        if over {
            self.release(at.chunk, Stage::Free, out);
        }
    }

    fn release(&mut self, chunk: u32, stage: Stage, out: &mut Vec<Output>) {
        let state = &mut self.chunks[chunk as usize];
        let at = At { chunk, attempt: state.attempt };
        state.stage = stage;
        if self.active.remove(&chunk) {
            out.push(Output::Free(at));
        }
    }

    fn changed(&mut self, change: &Change, mine: Vec<usize>, now: Duration, out: &mut Vec<Output>) {
        if change.number != self.changes + 1 {
            return;
        }
        self.changes = change.number;
        for rank in &change.dropped {
            self.live.remove(rank);
        }
        self.mine = mine;
        for chunk in change.resets(&self.shape) {
            self.release(chunk, Stage::Free, out);
            self.queue.retain(|c| *c != chunk);
            self.begun.remove(&chunk);
            self.chunks[chunk as usize] = Chunk { attempt: change.number, since: now, ..Chunk::default() };
        }
        // What stays is settled by every live member; whoever it waited for has just left.
        for chunk in self.active.clone() {
            let at = At { chunk, attempt: self.chunks[chunk as usize].attempt };
            self.free_settled(at, out);
        }
    }

    /// Members that a chunk waits for.
    fn missing(&self, chunk: u32) -> Vec<Rank> {
        let state = &self.chunks[chunk as usize];
        let lacks = |have: &BTreeSet<Rank>, of: Vec<Rank>| of.into_iter().filter(|r| !have.contains(r)).collect();
        match state.stage {
            Stage::Offering if !state.offers.is_empty() => lacks(&state.offers, self.live.iter().copied().collect()),
            Stage::Receiving => lacks(&state.received, self.senders(chunk)),
            Stage::Tags => lacks(&state.tags, self.senders(chunk)),
            Stage::Settling => lacks(&state.settled, self.live.iter().copied().collect()),
            Stage::Offering | Stage::Queued | Stage::Summing | Stage::Nonces | Stage::Free => Vec::new(),
        }
    }

    fn look_for_stalls(&mut self, now: Duration, out: &mut Vec<Output>) {
        let due: Vec<u32> = self
            .active
            .iter()
            .chain(&self.begun)
            .copied()
            .filter(|c| now >= self.chunks[*c as usize].since + self.stall)
            .collect();
        let mut told: Vec<(usize, BTreeSet<Rank>)> = Vec::new();
        for chunk in due {
            let at = At { chunk, attempt: self.chunks[chunk as usize].attempt };
            if self.chunks[chunk as usize].stage == Stage::Nonces {
                self.nonces_in(at, now, true, out);
                continue;
            }
            self.chunks[chunk as usize].since = now;
            let (missing, Some(part)) = (self.missing(chunk), self.serves(chunk)) else { continue };
            if missing.is_empty() {
                continue;
            }
            match told.iter_mut().find(|(p, _)| *p == part) {
                Some((_, ranks)) => ranks.extend(missing),
                None => told.push((part, missing.into_iter().collect())),
            }
        }
        for (part, ranks) in told {
            out.push(Output::Waiting { part, ranks: ranks.into_iter().collect() });
        }
    }

    fn arm(&mut self, now: Duration, out: &mut Vec<Output>) {
        let since = self.active.iter().chain(&self.begun).map(|c| self.chunks[*c as usize].since).min();
        let Some(due) = since.map(|since| since + self.stall) else { return };
        if self.timer.is_none_or(|timer| timer > due || timer <= now) {
            self.timer = Some(due);
            out.push(Output::SetTimer(due));
        }
    }
}
