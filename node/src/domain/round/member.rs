//! A member's way through one round. See [`super`].
//!
//! Invariants: at most `window` chunks are under way at once, which bounds the member's memory; a part from which nothing
//! comes for `stall` is reported; nothing is done twice within an attempt.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sundara_proto::id::Digest;

use super::{At, Change, Proof, Rank, Shape};

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// The round may begin.
    Begin,
    /// A reducer has room for the chunk and told everyone's scales.
    Granted(At),
    /// Words, root and commitment of the chunk are ready.
    Prepared(At),
    /// All bytes of the chunk are on their way.
    Sent(At),
    /// The reducer signed for the chunk.
    Receipt(At),
    /// A sum commitment that includes this member, checked. Digest of its payload.
    Sum {
        /// The chunk.
        at: At,
        /// Digest of the commitment.
        sum: Digest,
    },
    /// The chunk's output is here, whole, and has the committed root.
    Output(At),
    /// Everyone's nonces are here.
    Nonces(At),
    /// This member's tags are computed and signed.
    Tagged(At),
    /// Everyone's tags are here and agree.
    Agreed(At),
    /// Something moved on a part.
    Progress(usize),
    /// The part's reducer waits for these members.
    Waiting {
        /// The part.
        part: usize,
        /// For whom.
        ranks: Vec<Rank>,
    },
    /// The stream to the part's reducer is gone, or it broke the rules. Reported at once.
    Lost {
        /// The part.
        part: usize,
        /// What went wrong.
        reason: String,
    },
    /// The leader changed the round.
    Changed(Change),
    /// A timer that was asked for.
    Timer,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Tell the part's reducer that this chunk can come, with the scales of its blocks.
    Offer(At),
    /// Compute words, root and commitment.
    Prepare(At),
    /// Send commitment and data.
    Send(At),
    /// Take output for this chunk from now on.
    Expect(At),
    /// Reveal the nonce.
    Nonce(At),
    /// Compute and sign tags of input and output.
    Tag(At),
    /// Send them.
    SendTags(At),
    /// Put the output into the result.
    Keep(At),
    /// Tell the reducer that the chunk is settled here.
    Settled(At),
    /// Forget everything about an attempt.
    Forget(At),
    /// Tell the leader of trouble with a part.
    Fault {
        /// The part.
        part: usize,
        /// For whom its reducer says that it waits.
        waiting: Vec<Rank>,
        /// In words.
        reason: String,
    },
    /// Tell the leader that all chunks are settled here.
    Done,
    /// Wake the machine then.
    SetTimer(Duration),
}

#[derive(Clone, Debug, Default)]
struct Chunk {
    attempt: u32,
    offered: bool,
    granted: bool,
    prepared: bool,
    sent: bool,
    receipt: bool,
    sum: Option<Digest>,
    output: bool,
    nonces: bool,
    tagged: bool,
    agreed: bool,
    settled: bool,
}

#[derive(Clone, Debug)]
struct Part {
    reducer: usize,
    /// Chunks not offered yet.
    idle: BTreeSet<u32>,
    /// Offered and not settled.
    busy: BTreeSet<u32>,
    /// When something came last.
    heard: Duration,
    waiting: Vec<Rank>,
}

/// See the module.
#[derive(Debug)]
pub struct MemberMachine {
    rank: Rank,
    shape: Shape,
    window: usize,
    stall: Duration,
    begun: bool,
    changes: u32,
    chunks: Vec<Chunk>,
    parts: Vec<Part>,
    done: bool,
    timer: Option<Duration>,
    later: BTreeMap<u32, Change>,
}

impl MemberMachine {
    /// `window`: chunks under way at once, at least one a part is allowed. `stall`: silence that is reported.
    pub fn new(rank: Rank, shape: Shape, window: usize, stall: Duration) -> Self {
        let parts = shape.parts.iter().enumerate();
        let parts = parts.map(|(reducer, chunks)| Part {
            reducer,
            idle: chunks.clone().collect(),
            busy: BTreeSet::new(),
            heard: Duration::ZERO,
            waiting: Vec::new(),
        });
        Self {
            rank,
            window: window.max(1),
            stall,
            begun: false,
            changes: 0,
            chunks: vec![Chunk::default(); shape.chunks() as usize],
            parts: parts.collect(),
            shape,
            done: false,
            timer: None,
            later: BTreeMap::new(),
        }
    }

    /// Says which reducer serves each part, as indices among the round's nodes.
    pub fn assign(&mut self, reducers: impl IntoIterator<Item = usize>) {
        for (part, reducer) in self.parts.iter_mut().zip(reducers) {
            part.reducer = reducer;
        }
    }

    /// The reducer of a part, as an index among the round's nodes.
    pub fn reducer(&self, part: usize) -> Option<usize> {
        self.parts.get(part).map(|p| p.reducer)
    }

    /// Which chunks are settled here.
    pub fn settled(&self) -> Vec<bool> {
        self.chunks.iter().map(|c| c.settled).collect()
    }

    /// Digest of the sum commitment of each chunk, zero where there is none.
    pub fn sums(&self) -> Vec<Digest> {
        self.chunks.iter().map(|c| c.sum.unwrap_or(Digest([0; 32]))).collect()
    }

    /// Changes applied.
    pub fn changes(&self) -> u32 {
        self.changes
    }

    /// Whether this attempt is the present one.
    pub fn is_current(&self, at: At) -> bool {
        self.chunks.get(at.chunk as usize).is_some_and(|c| c.attempt == at.attempt)
    }

    /// Takes what happened and says what is to be done.
    pub fn handle(&mut self, input: Input, now: Duration) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Begin => {
                self.begun = true;
                for part in &mut self.parts {
                    part.heard = now;
                }
            }
            Input::Granted(at) => self.step(at, now, &mut out, |chunk| &mut chunk.granted, Some(Output::Prepare(at))),
            Input::Prepared(at) => self.step(at, now, &mut out, |chunk| &mut chunk.prepared, Some(Output::Send(at))),
            Input::Sent(at) => self.step(at, now, &mut out, |chunk| &mut chunk.sent, None),
            Input::Receipt(at) => self.step(at, now, &mut out, |chunk| &mut chunk.receipt, None),
            Input::Sum { at, sum } => {
                if let Some(chunk) = self.current(at, now)
                    && chunk.sum.is_none()
                {
                    chunk.sum = Some(sum);
                    self.after_output(at, &mut out);
                }
            }
            Input::Output(at) => {
                if let Some(chunk) = self.current(at, now)
                    && !chunk.output
                {
                    chunk.output = true;
                    self.after_output(at, &mut out);
                }
            }
            Input::Nonces(at) => self.step(at, now, &mut out, |chunk| &mut chunk.nonces, Some(Output::Tag(at))),
            Input::Tagged(at) => self.step(at, now, &mut out, |chunk| &mut chunk.tagged, Some(Output::SendTags(at))),
            Input::Agreed(at) => {
                if let Some(chunk) = self.current(at, now)
                    && !chunk.agreed
                {
                    chunk.agreed = true;
                    self.settle(at, &mut out);
                }
            }
            Input::Progress(part) => {
                if let Some(part) = self.parts.get_mut(part) {
                    part.heard = now;
                    part.waiting.clear();
                }
            }
            Input::Waiting { part, ranks } => {
                if let Some(part) = self.parts.get_mut(part) {
                    part.waiting = ranks;
                }
            }
            Input::Lost { part, reason } => self.lost(part, reason, now, &mut out),
            Input::Changed(change) => self.changed(change, now, &mut out),
            Input::Timer => {
                self.timer = None;
                self.look_for_stalls(now, &mut out);
            }
        }
        self.offer(now, &mut out);
        self.finish(&mut out);
        self.arm(now, &mut out);
        out
    }

    /// The chunk, if this attempt is the present one; its part has been heard of.
    fn current(&mut self, at: At, now: Duration) -> Option<&mut Chunk> {
        if let Some(part) = self.shape.part_of(at.chunk).and_then(|p| self.parts.get_mut(p)) {
            part.heard = now;
            part.waiting.clear();
        }
        self.chunks.get_mut(at.chunk as usize).filter(|c| c.attempt == at.attempt && c.offered && !c.settled)
    }

    fn step(
        &mut self,
        at: At,
        now: Duration,
        out: &mut Vec<Output>,
        flag: impl FnOnce(&mut Chunk) -> &mut bool,
        then: Option<Output>,
    ) {
        let sends = self.shape.sends(self.rank, at.chunk);
        let Some(chunk) = self.current(at, now) else { return };
        if std::mem::replace(flag(chunk), true) {
            return;
        }
        match then {
            // Whoever sends no input for the chunk has nothing to prepare.
            Some(Output::Prepare(_)) if !sends => {}
            Some(then) => out.push(then),
            None => {}
        }
    }

    fn after_output(&mut self, at: At, out: &mut Vec<Output>) {
        let receives = self.shape.receives(self.rank);
        let sends = self.shape.sends(self.rank, at.chunk);
        let Some(chunk) = self.chunks.get(at.chunk as usize) else { return };
        if chunk.sum.is_none() || (receives && !chunk.output) {
            return;
        }
        match self.shape.proof {
            Proof::Tags if sends => out.push(Output::Nonce(at)),
            // Whoever sent nothing has no tags; the sum is the sender's own input, whose root is signed.
            _ => self.settle(at, out),
        }
    }

    fn settle(&mut self, at: At, out: &mut Vec<Output>) {
        if let Some(chunk) = self.chunks.get_mut(at.chunk as usize) {
            chunk.settled = true;
        }
        if let Some(part) = self.shape.part_of(at.chunk).and_then(|p| self.parts.get_mut(p)) {
            part.busy.remove(&at.chunk);
        }
        if self.shape.receives(self.rank) {
            out.push(Output::Keep(at));
        }
        out.push(Output::Settled(at));
    }

    /// Offers chunks, one part after the other, as long as the window has room.
    fn offer(&mut self, now: Duration, out: &mut Vec<Output>) {
        if !self.begun {
            return;
        }
        let mut under_way: usize = self.parts.iter().map(|p| p.busy.len()).sum();
        // A part with nothing under way may always have one, or one slow reducer would hold up all others.
        loop {
            let next = self.parts.iter_mut().filter(|p| !p.idle.is_empty()).min_by_key(|p| p.busy.len());
            let Some(part) = next else { return };
            if under_way >= self.window && !part.busy.is_empty() {
                return;
            }
            let Some(chunk) = part.idle.pop_first() else { return };
            if part.busy.is_empty() {
                part.heard = now;
            }
            part.busy.insert(chunk);
            under_way += 1;
            let Some(state) = self.chunks.get_mut(chunk as usize) else { return };
            state.offered = true;
            let at = At { chunk, attempt: state.attempt };
            if self.shape.receives(self.rank) {
                out.push(Output::Expect(at));
            }
            out.push(Output::Offer(at));
        }
    }

    fn finish(&mut self, out: &mut Vec<Output>) {
        if self.begun && !self.done && self.chunks.iter().all(|c| c.settled) {
            self.done = true;
            out.push(Output::Done);
        }
    }

    fn look_for_stalls(&mut self, now: Duration, out: &mut Vec<Output>) {
        for (index, part) in self.parts.iter_mut().enumerate() {
            if !part.busy.is_empty() && now >= part.heard + self.stall {
                // Said again after the same time, if nothing comes of it.
                part.heard = now;
                let reason = format!("nothing came for {} ms", self.stall.as_millis());
                out.push(Output::Fault { part: index, waiting: std::mem::take(&mut part.waiting), reason });
            }
        }
    }

    fn lost(&mut self, part: usize, reason: String, now: Duration, out: &mut Vec<Output>) {
        let Some(state) = self.parts.get_mut(part) else { return };
        let open = self.chunks.get(range(&self.shape.parts[part])).is_some_and(|c| c.iter().any(|c| !c.settled));
        if open {
            state.heard = now;
            out.push(Output::Fault { part, waiting: Vec::new(), reason });
        }
    }

    fn changed(&mut self, change: Change, now: Duration, out: &mut Vec<Output>) {
        if change.number <= self.changes {
            return;
        }
        self.later.insert(change.number, change);
        while let Some(change) = self.later.remove(&(self.changes + 1)) {
            self.apply(&change, now, out);
        }
    }

    fn apply(&mut self, change: &Change, now: Duration, out: &mut Vec<Output>) {
        self.changes = change.number;
        // The leader counts afresh who is done, also where nothing is redone.
        self.done = false;
        for (part, reducer) in &change.moved {
            if let Some(part) = self.parts.get_mut(*part) {
                part.reducer = *reducer;
            }
        }
        for chunk in change.resets(&self.shape) {
            let (Some(state), Some(part)) = (self.chunks.get_mut(chunk as usize), self.shape.part_of(chunk)) else {
                continue;
            };
            out.push(Output::Forget(At { chunk, attempt: state.attempt }));
            *state = Chunk { attempt: change.number, ..Chunk::default() };
            if let Some(part) = self.parts.get_mut(part) {
                part.busy.remove(&chunk);
                part.idle.insert(chunk);
                part.heard = now;
                part.waiting.clear();
            }
        }
    }

    fn arm(&mut self, now: Duration, out: &mut Vec<Output>) {
        let due = self.parts.iter().filter(|p| !p.busy.is_empty()).map(|p| p.heard + self.stall).min();
        let Some(due) = due else { return };
        // A timer that fires early finds nothing and arms the next one.
        if self.timer.is_none_or(|timer| timer > due || timer <= now) {
            self.timer = Some(due);
            out.push(Output::SetTimer(due));
        }
    }
}

fn range(chunks: &std::ops::Range<u32>) -> std::ops::Range<usize> {
    chunks.start as usize..chunks.end as usize
}
