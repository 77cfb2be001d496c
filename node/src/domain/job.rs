//! A validator's whole view of its jobs.
//!
//! **Owns** every decision between a submission and its verdict: which miners are asked, when replicas reveal, what is
//! audited, who is blamed, what is tried again, and when a job is given up. **Does not own** signatures (the services
//! verify what comes in and sign what goes out), the store, streams, or the bytes of inputs and outputs.
//!
//! ```text
//! Submitted -> [waiting] -> offered -> accepted -> committed -> revealing -> [auditing] -> Finish
//!                  ^           |           |           |            |            |
//!                  +-----------+-----------+-- decline, loss, stall, no agreement: next miner or next attempt
//! ```
//! A single replica skips committed and revealing.
//!
//! **Invariants**
//! - A job that was acknowledged ends: with a result, or with a reason. Every state has a deadline.
//! - [`Output::Persist`] comes before the [`Output::Acknowledge`] of the same job.
//! - Replicas of one attempt have distinct owners and one environment, which this validator's executor shares.
//! - No commitment counts once a reveal was asked for; what is revealed must match what was committed.
//! - Nobody is blamed for a result but by this validator's own executor.
//! - Maps and queues are bounded by [`JobConfig`]; no input makes the machine walk over all jobs or all miners.

#[cfg(test)]
mod any;
mod config;
mod core;
mod io;
mod place;
mod record;
mod replies;
mod settle;
mod state;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod trust;
mod wheel;

use std::collections::HashMap;
use std::time::Duration;

use sundara_proto::id::{Digest, Hotkey, JobId};
use sundara_proto::job::JobSpec;
use sundara_proto::units::UnixMillis;

pub use config::JobConfig;
pub use io::{AuditResult, Decline, Evidence, Input, Offence, Output, Part, Ruling, Submission};
pub use record::{CleanRecord, JobRecord, MinerRecord};
pub use trust::KnownMiner;

use self::core::Core;
use replies::Loss;
use state::{Job, NEVER, Phase, Stage};
use wheel::Timer;

use super::Now;
use super::audit::EpochSecret;
use super::schedule::MinerProfile;

/// See the module.
#[derive(Debug)]
pub struct JobMachine {
    jobs: HashMap<JobId, Box<Job>>,
    core: Core,
}

impl JobMachine {
    /// A machine without jobs. `incentive` stands in every verdict; `seed` breaks ties between miners and should be
    /// unpredictable to them. Give the store's records next, then [`Input::Auditor`] and the miners.
    pub fn new(config: JobConfig, incentive: Digest, epoch: EpochSecret, seed: [u8; 32]) -> Self {
        Self { jobs: HashMap::new(), core: Core::new(config, incentive, epoch, seed) }
    }

    /// Jobs without a verdict.
    pub fn live(&self) -> usize {
        self.jobs.len()
    }

    /// Until when a miner is out of scheduling for an offence, and why.
    pub fn dropped(&self, miner: &Hotkey, now: UnixMillis) -> Option<(UnixMillis, &str)> {
        let trust = self.core.trust.get(miner)?;
        (trust.dropped_until > now).then_some((trust.dropped_until, trust.reason.as_str()))
    }

    /// What is known of a miner, for people. `None` for one that is neither known nor remembered.
    pub fn known(&self, miner: &Hotkey, now: Now) -> Option<KnownMiner> {
        KnownMiner::of(self.core.fleet.view(miner, now.mono), self.core.trust.get(miner))
    }

    /// Takes what happened and says what is to be done, in order.
    pub fn handle(&mut self, input: Input, now: Now) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Submitted(submission) => self.submitted(*submission, now, &mut out),
            Input::Restored { job, record } => self.restored(job, &record, now, &mut out),
            Input::RestoredMiner(record) => self.restored_miner(&record, now),
            Input::RestoredClean(record) => self.core.trust.set_clean(record),
            Input::Miner(profile) => self.miner(*profile, now),
            Input::PeerHere(node) => {
                if let Some((miner, _)) = self.core.fleet.set_connected(&node, true, now.mono) {
                    self.core.free_classes(&miner);
                }
            }
            Input::PeerGone(node) => self.peer_gone(&node, now, &mut out),
            Input::Auditor { engines } => self.auditor(engines, now),
            Input::Accepted(part) => self.on(part.job, &mut out, |core, job, out| {
                core.accepted(job, &part, now, out);
            }),
            Input::Declined { part, reason, detail } => self.on(part.job, &mut out, |core, job, out| {
                core.declined(job, &part, (reason, detail), now, out);
            }),
            Input::Committed { part, commitment } => self.on(part.job, &mut out, |core, job, out| {
                core.committed(job, &part, commitment, now, out);
            }),
            Input::Revealed { part, attestation, salt } => self.on(part.job, &mut out, |core, job, out| {
                core.revealed(job, &part, (attestation, salt), now, out);
            }),
            Input::Output { part, offset, data } => self.on(part.job, &mut out, |core, job, out| {
                core.output(job, &part, (offset, data), now, out);
            }),
            Input::Fault { part, reason } => self.on(part.job, &mut out, |core, job, out| {
                core.lost(job, &part, Loss::Fault, reason, now, out);
            }),
            Input::Undelivered { part, reason } => self.on(part.job, &mut out, |core, job, out| {
                core.lost(job, &part, Loss::Connection, reason, now, out);
            }),
            Input::BadReply { part, reason } => self.on(part.job, &mut out, |core, job, out| {
                if let Some(place) = job.slot_of(&part) {
                    core.offend(job, place, (Offence::ForeignAttestation, reason, None), now, out);
                }
            }),
            Input::Audited { job, attempt, result } => self.on(job, &mut out, |core, job, out| {
                if job.attempt == attempt {
                    core.audited(job, result, now, out);
                }
            }),
            Input::Cancelled { job } => self.on(job, &mut out, |core, job, out| {
                core.fail(job, "cancelled by its requester".to_owned(), now, out);
            }),
            Input::EpochTurned(epoch) => self.core.epoch = epoch,
            Input::Banned { miner, until, reason } => self.banned(miner, until, reason, now, &mut out),
            Input::TimerFired => self.timers(now, &mut out),
        }
        self.serve(now, &mut out);
        if let Some(at) = self.core.wheel.announce() {
            out.push(Output::SetTimer { at });
        }
        out
    }

    /// Applies a change to a live job and sees to what follows from it.
    fn on(&mut self, id: JobId, out: &mut Vec<Output>, change: impl FnOnce(&mut Core, &mut Job, &mut Vec<Output>)) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        change(&mut self.core, job, out);
        if job.phase == Phase::Done {
            self.jobs.remove(&id);
            return;
        }
        let deadline = job.next_deadline();
        if deadline < job.armed {
            job.armed = deadline;
            self.core.wheel.set(deadline, Timer::Job(id));
        }
    }

    fn submitted(&mut self, submission: Submission, now: Now, out: &mut Vec<Output>) {
        let id = submission.job;
        if let Some(job) = self.jobs.get(&id) {
            let attempt = job.started.then_some(job.attempt);
            out.push(Output::Attach { job: id, rank: job.submission.rank, attempt });
            return;
        }
        if self.core.seen.contains(&id) {
            out.push(Output::Replay { job: id });
            return;
        }
        if let Err((reason, retryable)) = self.admissible(&submission.spec, now) {
            out.push(Output::Refuse { job: id, reason, retryable });
            return;
        }
        let job = Job::new(submission, 0, now.wall);
        let record = Box::new(JobRecord::open(&job.submission, 0, now.wall));
        out.push(Output::Persist { job: id, record });
        out.push(Output::Acknowledge { job: id, rank: job.submission.rank });
        self.jobs.insert(id, Box::new(job));
        self.on(id, out, |core, job, out| {
            core.fill(job, now, out);
        });
    }

    /// Whether there is room for a job, and an environment in which it can run.
    fn admissible(&self, spec: &JobSpec, now: Now) -> Result<(), (String, bool)> {
        let config = &self.core.config;
        let latest = now.wall.plus(JobSpec::NOT_AFTER_MAX).plus(UnixMillis::SKEW_MAX);
        if spec.not_after < now.wall || spec.not_after > latest {
            let which = if spec.not_after < now.wall { "has passed" } else { "is more than 24 h ahead" };
            return Err((format!("not_after {which} by this validator's clock"), false));
        }
        if self.jobs.len() >= config.live_max {
            return Err((format!("this validator holds {} jobs already: dispatch.live_max", config.live_max), true));
        }
        if self.core.seen.len() >= config.seen_max {
            let text = "job ids are remembered already: dispatch.seen_max, or a shorter not_after";
            return Err((format!("{} {text}", config.seen_max), true));
        }
        if self.core.fleet.engines().is_empty() {
            let text = "this validator has no executor of its own, and could not audit a result: attach one";
            return Err((text.to_owned(), true));
        }
        let (owners, wanted) = (self.core.fleet.owners(&spec.hardware_class), usize::from(spec.replicas));
        if owners < wanted {
            let class = if spec.hardware_class.is_empty() { "any" } else { &spec.hardware_class };
            return Err((
                format!(
                    "no environment can run this job: {wanted} replicas need {wanted} miners of distinct owners with one                      engine, which this validator's executor has too; class {class} has {owners} here"
                ),
                true,
            ));
        }
        Ok(())
    }

    fn restored(&mut self, id: JobId, record: &JobRecord, now: Now, out: &mut Vec<Output>) {
        if self.jobs.contains_key(&id) || self.core.seen.contains(&id) {
            return;
        }
        if record.finished {
            if record.seen_until() <= now.wall {
                out.push(Output::Forget { job: id });
            } else {
                self.core.remember(id, record.seen_until(), now);
            }
            return;
        }
        let Ok(submission) = record.submission() else {
            // Not a record that this code wrote: the store owns saying so, and there is nobody to answer.
            return;
        };
        let attempt = record.attempt.saturating_add(1);
        let job = Job::new(submission, attempt, UnixMillis(record.accepted_at_ms));
        let record = Box::new(JobRecord::open(&job.submission, attempt, job.accepted_at));
        out.push(Output::Persist { job: id, record });
        self.jobs.insert(id, Box::new(job));
        self.on(id, out, |core, job, out| {
            core.fill(job, now, out);
        });
    }

    fn restored_miner(&mut self, record: &MinerRecord, now: Now) {
        self.core.trust.restore(record, now.wall);
        if let Some(miner) = record.hotkey() {
            self.core.keep_off(&miner, UnixMillis(record.dropped_until_ms), now);
        }
    }

    fn miner(&mut self, profile: MinerProfile, now: Now) {
        let (hotkey, expires_at) = (profile.hotkey, profile.expires_at);
        if expires_at <= now.wall {
            return;
        }
        let known = self.core.fleet.contains(&hotkey);
        if !self.core.fleet.upsert(profile, now.mono) {
            return;
        }
        if !known {
            self.core.wheel.set(now.mono + now.wall.until(expires_at), Timer::Expire(hotkey));
            let dropped = self.core.trust.get(&hotkey).map(|trust| trust.dropped_until);
            if let Some(until) = dropped.filter(|until| *until > now.wall) {
                self.core.keep_off(&hotkey, until, now);
            }
        }
        self.core.free_classes(&hotkey);
    }

    fn peer_gone(&mut self, node: &sundara_proto::id::NodeId, now: Now, out: &mut Vec<Output>) {
        let Some((miner, lost)) = self.core.fleet.set_connected(node, false, now.mono) else { return };
        for id in lost {
            self.on(id, out, |core, job, out| {
                let part = job.part(miner);
                core.lost(job, &part, Loss::Connection, "its connection broke".to_owned(), now, out);
            });
        }
    }

    fn auditor(&mut self, mut engines: Vec<sundara_proto::id::EngineId>, now: Now) {
        engines.dedup();
        engines.truncate(sundara_proto::wire::limit::ADVERT_ITEMS);
        if engines != self.core.fleet.engines() {
            self.core.fleet.set_engines(engines, now.mono);
            self.core.waiting.free_all();
        }
    }

    fn banned(&mut self, miner: Hotkey, until: UnixMillis, reason: String, now: Now, out: &mut Vec<Output>) {
        let trust = self.core.trust.entry(miner, now.wall);
        if trust.dropped_until >= until {
            return;
        }
        trust.dropped_until = until;
        trust.reason.clone_from(&reason);
        out.push(Output::PersistMiner(Box::new(self.core.trust.record(&miner))));
        self.core.drop_until(&miner, until, reason, now, out);
    }

    fn timers(&mut self, now: Now, out: &mut Vec<Output>) {
        for timer in self.core.wheel.due(now.mono) {
            match timer {
                Timer::Job(id) => self.overdue(id, now, out),
                Timer::Forget(id) => {
                    if self.core.seen.remove(&id) {
                        out.push(Output::Forget { job: id });
                    }
                }
                Timer::Wake(miner) => {
                    if self.core.fleet.wake(&miner, now.mono).is_none() {
                        self.core.free_classes(&miner);
                    }
                }
                Timer::Expire(miner) => {
                    if let Some(expires_at) = self.core.fleet.expire(&miner, now.wall, now.mono) {
                        // The wall clock may stand still or go back; the next look is never at once.
                        let wait = now.wall.until(expires_at).max(Duration::from_secs(1));
                        self.core.wheel.set(now.mono + wait, Timer::Expire(miner));
                    }
                }
            }
        }
    }

    /// Some deadline of a job passed, or was moved since its timer was set.
    fn overdue(&mut self, id: JobId, now: Now, out: &mut Vec<Output>) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.armed = NEVER;
        }
        self.on(id, out, |core, job, out| core.overdue(job, now, out));
    }

    /// Serves those that wait: for miners, where slots came free, and for the validator's own executor.
    fn serve(&mut self, now: Now, out: &mut Vec<Output>) {
        // Every round places at least one job; a round in which none finds a miner is the last of its class.
        let mut classes = self.core.waiting.take_freed();
        while let Some(class) = classes.pop() {
            let mut placed = false;
            for id in self.core.waiting.heads(&class) {
                self.on(id, out, |core, job, out| placed |= core.fill(job, now, out));
            }
            if placed {
                classes.push(class);
            }
            if classes.is_empty() {
                classes = self.core.waiting.take_freed();
            }
        }
        while self.core.audits_running < self.core.config.audits_max.max(1) {
            let Some(id) = self.core.audit_queue.pop_front() else { break };
            self.on(id, out, |core, job, out| core.start_audit(job, now, out));
        }
    }
}

#[cfg(test)]
impl JobMachine {
    /// Nothing is held by jobs that are over.
    pub(crate) fn assert_idle(&self) {
        assert!(self.jobs.is_empty());
        assert_eq!(self.core.waiting.len(), 0, "jobs wait that are over");
        assert_eq!((self.core.audits_running, self.core.audit_queue.len()), (0, 0), "audits of jobs that are over");
        assert_eq!(self.core.fleet.all_in_flight(), 0, "slots of jobs that are over");
    }
}

impl Core {
    fn overdue(&mut self, job: &mut Job, now: Now, out: &mut Vec<Output>) {
        // Every round moves a stage on, and new deadlines lie ahead, so this ends.
        while let Some(place) = job.slots.iter().position(|slot| slot.pending() && slot.deadline <= now.mono) {
            let Some(seat) = job.slots[place].seat else { return };
            let reason = match job.slots[place].stage {
                Stage::Offered => {
                    format!("did not answer its offer within {} ms (dispatch.accept_ms)", self.config.accept_ms)
                }
                Stage::Asked(_) => format!("did not reveal within {} ms (dispatch.reveal_ms)", self.config.reveal_ms),
                _ => "gave no result in time".to_owned(),
            };
            let part = job.part(seat.miner);
            self.lost(job, &part, Loss::Stall, reason, now, out);
        }
        match job.phase {
            Phase::Placing if job.wait_until <= now.mono => self.leave_empty(job, now, out),
            Phase::Auditing { until } if until <= now.mono => {
                out.push(Output::AbandonAudit { job: job.id() });
                let reason = "it did not end in time".to_owned();
                self.audited(job, AuditResult::Failed { reason }, now, out);
            }
            _ => {}
        }
    }
}
