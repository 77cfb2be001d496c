//! Finding miners for a job's places, attempt by attempt.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use sundara_proto::id::{Hotkey, JobId};
use sundara_proto::rules::select;
use sundara_proto::verdict::{Standing, VerdictKind};

use super::core::Core;
use super::io::Output;
use super::record::JobRecord;
use super::state::{Job, NEVER, Phase, Slot, Stage};
use super::wheel::Timer;
use crate::domain::Now;
use crate::domain::schedule::{Seat, Want};

/// Jobs at the head of a line that are tried when a slot comes free: one that wants many replicas does not hold up all
/// others behind it.
const HEADS: usize = 4;

/// Jobs that wait for a free miner, by hardware class, in order of arrival.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    by_class: HashMap<String, BTreeMap<u64, JobId>>,
    sequence: u64,
    /// Classes in which a slot came free since the lines were last served.
    freed: Vec<String>,
}

impl Waiting {
    fn enqueue(&mut self, class: &str, job: JobId) -> u64 {
        self.sequence += 1;
        self.by_class.entry(class.to_owned()).or_default().insert(self.sequence, job);
        self.sequence
    }

    fn remove(&mut self, class: &str, place: u64) {
        if let Some(line) = self.by_class.get_mut(class) {
            line.remove(&place);
            if line.is_empty() {
                self.by_class.remove(class);
            }
        }
    }

    /// A slot of this class came free.
    pub(super) fn free(&mut self, class: &str) {
        if !self.by_class.is_empty() && !self.freed.iter().any(|freed| freed == class) {
            self.freed.push(class.to_owned());
        }
    }

    /// Slots may have come free in any class.
    pub(super) fn free_all(&mut self) {
        self.freed = self.by_class.keys().cloned().collect();
        self.freed.sort_unstable();
    }

    /// Classes to serve: those freed, and those who take any.
    pub(super) fn take_freed(&mut self) -> Vec<String> {
        let mut freed = std::mem::take(&mut self.freed);
        if !freed.is_empty() && !freed.iter().any(String::is_empty) {
            freed.push(String::new());
        }
        freed
    }

    /// The first jobs of a line.
    pub(super) fn heads(&self, class: &str) -> Vec<JobId> {
        self.by_class.get(class).map_or_else(Vec::new, |line| line.values().take(HEADS).copied().collect())
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_class.values().map(BTreeMap::len).sum()
    }
}

impl Core {
    /// Looks for miners for every empty place; a job that finds none waits in line. The first miners of an attempt are
    /// found all at once or not at all, later ones one by one. Returns whether anyone was asked.
    pub(super) fn fill(&mut self, job: &mut Job, now: Now, out: &mut Vec<Output>) -> bool {
        let empty: Vec<usize> = places(job, |stage| matches!(stage, Stage::Empty));
        if empty.is_empty() || job.phase != Phase::Placing {
            return false;
        }
        let fresh = job.engine.is_none();
        if fresh && now.wall > job.submission.spec.not_after {
            self.fail(job, "not_after passed before an attempt could begin".to_owned(), now, out);
            return false;
        }
        let left = usize::try_from(self.config.offers_max.saturating_sub(job.offers)).unwrap_or(usize::MAX);
        if left < if fresh { empty.len() } else { 1 } {
            job.trouble = format!("{} offers were made (dispatch.offers_max); last: {}", job.offers, job.trouble);
            self.leave_empty(job, now, out);
            return false;
        }
        let asked = if fresh {
            self.place(job, &empty, now, out)
        } else {
            let mut asked = 0;
            for place in empty.iter().take(left) {
                asked += usize::from(self.place(job, &[*place], now, out));
            }
            asked > 0
        };
        if job.slots.iter().any(|slot| matches!(slot.stage, Stage::Empty)) {
            self.wait(job, now);
        } else {
            self.stop_waiting(job);
        }
        asked
    }

    /// Chooses miners for `empty` and sends them offers; all or none.
    fn place(&mut self, job: &mut Job, empty: &[usize], now: Now, out: &mut Vec<Output>) -> bool {
        let owners: Vec<_> = job.slots.iter().filter_map(|slot| slot.seat.map(|seat| seat.owner)).collect();
        let spec = job.submission.spec.clone();
        let want = Want {
            class: &spec.hardware_class,
            engine: job.engine.map(|(engine, _)| engine),
            model: job.model(),
            count: empty.len(),
            owners: &owners,
            exclude: &job.excluded,
        };
        let Some((engine, seats)) = self.fleet.pick(&want) else { return false };
        let env_id = match job.engine {
            Some((_, env_id)) => env_id,
            None => job.submission.environment.env_id(&engine),
        };
        job.engine = Some((engine, env_id));
        let streaming = select::streaming_replica(&job.id(), job.attempt, job.slots.len());
        for (place, seat) in empty.iter().zip(seats) {
            self.fleet.occupy(&seat, job.id(), now.mono);
            let execution = self.config.execution(&spec, seat.has_model);
            let mut deadline = self.config.accept() + execution;
            if job.replicated() {
                deadline += self.config.reveal();
            }
            job.offers += 1;
            job.slots[*place] = Slot {
                stage: Stage::Offered,
                seat: Some(seat),
                seated: true,
                deadline: now.mono + self.config.accept(),
                offered_mono: now.mono,
                offered_wall: now.wall,
                latency: Duration::ZERO,
            };
            out.push(Output::SendOffer {
                part: job.part(seat.miner),
                node: seat.node,
                commit_reveal: job.replicated(),
                stream: spec.stream && *place == streaming,
                env_id,
                deadline,
            });
        }
        true
    }

    fn wait(&mut self, job: &mut Job, now: Now) {
        if job.wait_until == NEVER {
            job.wait_until = now.mono + self.config.queue_wait();
        }
        if job.queued.is_none() {
            job.queued = Some(self.waiting.enqueue(&job.submission.spec.hardware_class, job.id()));
        }
    }

    pub(super) fn stop_waiting(&mut self, job: &mut Job) {
        job.wait_until = NEVER;
        if let Some(place) = job.queued.take() {
            self.waiting.remove(&job.submission.spec.hardware_class, place);
        }
    }

    /// Goes on without miners for the places that are empty still.
    pub(super) fn leave_empty(&mut self, job: &mut Job, now: Now, out: &mut Vec<Output>) {
        self.stop_waiting(job);
        for slot in &mut job.slots {
            if matches!(slot.stage, Stage::Empty) {
                slot.stage = Stage::Vacant;
            }
        }
        self.advance(job, now, out);
    }

    /// Gives a place's slot back to its miner's load, once.
    pub(super) fn vacate(&mut self, job: &mut Job, place: usize, now: Now) {
        let id = job.id();
        let slot = &mut job.slots[place];
        if let Some(seat) = slot.seat
            && std::mem::take(&mut slot.seated)
        {
            self.fleet.release(&seat, &id, now.mono);
            if let Some(class) = self.fleet.class_name(&seat) {
                self.waiting.free(class);
            }
        }
    }

    /// A miner is out of an attempt whose reveals were not asked for yet: another takes its place. A single replica that
    /// had begun makes a new attempt, since its provisional output is void.
    pub(super) fn replace(&mut self, job: &mut Job, place: usize, reason: String, now: Now, out: &mut Vec<Output>) {
        let Some(seat) = job.slots[place].seat else { return };
        self.vacate(job, place, now);
        let stage = std::mem::replace(&mut job.slots[place], Slot::empty()).stage;
        job.trouble = format!("miner {}: {reason}", seat.miner);
        let began = matches!(stage, Stage::Accepted | Stage::Committed(_));
        if began {
            job.lose(seat.miner, Standing::Faulted, None);
        }
        if began && !job.replicated() {
            self.next_attempt(job, false, now, out);
        } else {
            self.fill(job, now, out);
            self.advance(job, now, out);
        }
    }

    /// Tries the job again from the start, or gives it up. `rejected`: the results of this attempt were wrong.
    pub(super) fn next_attempt(&mut self, job: &mut Job, rejected: bool, now: Now, out: &mut Vec<Output>) {
        job.digests_known |= job.slots.iter().any(|slot| slot.result().is_some());
        let tried = job.attempt - job.first_attempt + 1;
        if tried >= self.config.attempts_max {
            let reason = format!("{tried} attempts (dispatch.attempts_max) came to nothing; last: {}", job.trouble);
            let kind = if rejected { VerdictKind::Rejected(reason) } else { VerdictKind::Failed(reason) };
            self.finish(job, kind, None, now, out);
            return;
        }
        self.abandon(job, "the attempt is over", now, out);
        self.stop_waiting(job);
        job.attempt += 1;
        job.phase = Phase::Placing;
        job.slots = vec![Slot::empty(); job.slots.len()];
        job.engine = None;
        job.casualties.clear();
        job.started = false;
        job.streamed = 0;
        job.audit_tries = 0;
        job.truth = None;
        let record = Box::new(JobRecord::open(&job.submission, job.attempt, job.accepted_at));
        out.push(Output::Persist { job: job.id(), record });
        self.fill(job, now, out);
    }

    /// Takes all miners off the job and tells those that may still be working.
    pub(super) fn abandon(&mut self, job: &mut Job, reason: &str, now: Now, out: &mut Vec<Output>) {
        for place in 0..job.slots.len() {
            self.vacate(job, place, now);
            let slot = &job.slots[place];
            let busy = slot.pending() || matches!(slot.stage, Stage::Committed(_));
            if let Some(Seat { miner, node, .. }) = slot.seat
                && busy
            {
                out.push(Output::SendAbandon { part: job.part(miner), node, reason: reason.to_owned() });
            }
        }
    }

    /// A failure that proves nothing: the miner is not asked for a while, longer each time in a row.
    pub(super) fn strike(&mut self, miner: &Hotkey, now: Now) {
        let trust = self.trust.entry(*miner, now.wall);
        trust.strikes = trust.strikes.saturating_add(1);
        let factor = 1_u64 << (trust.strikes - 1).min(32);
        let pause = self.config.pause_ms.saturating_mul(factor).min(self.config.pause_max_ms);
        self.pause(miner, pause, now);
    }

    pub(super) fn pause(&mut self, miner: &Hotkey, pause_ms: u64, now: Now) {
        let until = now.mono + Duration::from_millis(pause_ms);
        self.fleet.set_off(miner, until, false, now.mono);
        self.wheel.set(until, Timer::Wake(*miner));
    }
}

/// Places whose stage fits.
pub(super) fn places(job: &Job, fits: impl Fn(&Stage) -> bool) -> Vec<usize> {
    (0..job.slots.len()).filter(|place| fits(&job.slots[*place].stage)).collect()
}
