//! From results to a verdict.

use std::sync::Arc;
use std::time::Duration;

use sundara_proto::attestation::Attestation;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{BlobId, Digest, EnvId};
use sundara_proto::rules::select;
use sundara_proto::units::ByteCount;
use sundara_proto::verdict::{Replica, Standing, Verdict, VerdictKind};
use sundara_proto::wire::limit;

use super::core::Core;
use super::io::{AuditResult, Evidence, Offence, Output, Ruling};
use super::place::places;
use super::record::{CleanRecord, JobRecord};
use super::state::{Finding, Job, Phase, Slot, Stage};
use super::wheel::Timer;
use crate::domain::Now;
use crate::domain::audit::Observation;
use crate::domain::verify;

/// Units of fuel whose pay is counted as one.
const FUEL_UNIT: u64 = 1_000_000;

impl Core {
    /// Goes on as far as the answers in hand allow.
    pub(super) fn advance(&mut self, job: &mut Job, now: Now, out: &mut Vec<Output>) {
        match job.phase {
            Phase::Placing => {
                let awaited = |slot: &Slot| matches!(slot.stage, Stage::Empty | Stage::Offered | Stage::Accepted);
                if job.slots.iter().any(awaited) {
                    return;
                }
                if job.slots.iter().any(|slot| slot.result().is_some()) {
                    self.settle(job, now, out);
                } else if job.slots.iter().any(|slot| matches!(slot.stage, Stage::Committed(_))) {
                    self.ask_for_reveals(job, now, out);
                } else {
                    let reason = self.no_miner(job);
                    self.fail(job, reason, now, out);
                }
            }
            Phase::Revealing if !job.slots.iter().any(Slot::pending) => self.settle(job, now, out),
            Phase::Revealing | Phase::AuditQueued | Phase::Auditing { .. } | Phase::Done => {}
        }
    }

    fn no_miner(&self, job: &Job) -> String {
        let spec = &job.submission.spec;
        let class = if spec.hardware_class.is_empty() { "any" } else { &spec.hardware_class };
        let known = self.fleet.owners(&spec.hardware_class);
        let last = if job.trouble.is_empty() { "all were busy" } else { &job.trouble };
        format!(
            "no miner was free within {} ms (dispatch.queue_wait_ms): {} replicas wanted, {known} owners known for class \
             {class}; {last}",
            self.config.queue_wait_ms,
            job.slots.len(),
        )
    }

    fn ask_for_reveals(&mut self, job: &mut Job, now: Now, out: &mut Vec<Output>) {
        job.phase = Phase::Revealing;
        for place in 0..job.slots.len() {
            let slot = &mut job.slots[place];
            if let (Stage::Committed(commitment), Some(seat)) = (&slot.stage, slot.seat) {
                slot.stage = Stage::Asked(*commitment);
                slot.deadline = now.mono + self.config.reveal();
                out.push(Output::SendReveal { part: job.part(seat.miner), node: seat.node });
            }
        }
    }

    /// All results are in that will come.
    fn settle(&mut self, job: &mut Job, now: Now, out: &mut Vec<Output>) {
        let digests: Vec<Digest> = job.slots.iter().filter_map(|slot| slot.result().map(|r| r.digest)).collect();
        let Some(first) = digests.first().copied() else {
            return self.next_attempt(job, false, now, out);
        };
        let enough = !job.replicated() || digests.len() >= verify::quorum_needed(job.slots.len());
        let settled = enough && verify::unanimous(&digests);
        job.epoch = self.epoch.epoch;
        if !settled || job.digests_known || self.drawn(job, now) {
            job.phase = Phase::AuditQueued;
            self.audit_queue.push_back(job.id());
            return;
        }
        let kind = if job.replicated() {
            VerdictKind::Quorum(u8::try_from(digests.len()).unwrap_or(u8::MAX))
        } else {
            VerdictKind::Unaudited
        };
        self.finish(job, kind, Some(first), now, out);
    }

    /// Whether the epoch's secret chooses any of the results for an audit.
    fn drawn(&self, job: &Job, now: Now) -> bool {
        let Some((_, env_id)) = job.engine else { return true };
        job.slots.iter().any(|slot| {
            let (Some(result), Some(seat)) = (slot.result(), slot.seat) else { return false };
            let trust = self.trust.get(&seat.miner);
            if trust.is_some_and(|trust| trust.dropped_until > now.wall) {
                return true;
            }
            let held = trust.map_or(0, |trust| trust.held.sum());
            let clean = self.trust.clean(&seat.miner, &env_id);
            let p = self.config.audit.probability(clean, worth(slot, result), held);
            let commitment = result.commitment.unwrap_or(result.name);
            select::is_audited(&self.epoch.secret, &job.id(), &seat.miner, &commitment, p)
        })
    }

    /// Sends a queued job to this validator's executor.
    pub(super) fn start_audit(&mut self, job: &mut Job, now: Now, out: &mut Vec<Output>) {
        let (Phase::AuditQueued, Some((engine, env_id))) = (job.phase, job.engine) else { return };
        let deadline = self.config.execution(&job.submission.spec, false);
        job.phase = Phase::Auditing { until: now.mono + deadline };
        self.audits_running += 1;
        out.push(Output::RequestAudit { job: job.id(), attempt: job.attempt, engine, env_id, deadline });
    }

    pub(super) fn audited(&mut self, job: &mut Job, result: AuditResult, now: Now, out: &mut Vec<Output>) {
        if !matches!(job.phase, Phase::Auditing { .. }) {
            return;
        }
        self.audits_running -= 1;
        job.phase = Phase::AuditQueued;
        let reference = match result {
            AuditResult::Attested(reference) => self.check_reference(job, reference),
            AuditResult::Failed { reason } => Err(reason),
        };
        match reference {
            Ok((reference, truth)) => self.judge(job, &reference, truth, now, out),
            Err(reason) => {
                job.audit_tries += 1;
                if job.audit_tries < self.config.audit_tries {
                    self.audit_queue.push_back(job.id());
                    return;
                }
                let text = format!(
                    "the audit of this result could not be run in {} tries (dispatch.audit_tries) on the validator's own \
                     executor: {reason}",
                    job.audit_tries
                );
                self.fail(job, text, now, out);
            }
        }
    }

    fn check_reference(
        &self,
        job: &Job,
        reference: Arc<Signed<Attestation>>,
    ) -> Result<(Arc<Signed<Attestation>>, Digest), String> {
        let expected = (job.id(), job.submission.spec.input, job.engine.map(|(_, env_id)| env_id));
        if (reference.job, reference.input, Some(reference.env_id)) != expected {
            return Err("the executor attested another job, input or environment".to_owned());
        }
        match reference.result_digest() {
            Some(digest) => Ok((reference, digest)),
            None => Err(format!("execution ended {:?} there", reference.outcome)),
        }
    }

    /// Compares every result with what this validator's own executor found.
    fn judge(
        &mut self,
        job: &mut Job,
        reference: &Arc<Signed<Attestation>>,
        truth: Digest,
        now: Now,
        out: &mut Vec<Output>,
    ) {
        let Some((_, env_id)) = job.engine else { return };
        let mut agreed = 0;
        for place in places(job, |stage| matches!(stage, Stage::Revealed(_))) {
            let (Some(result), Some(seat)) = (job.slots[place].result().cloned(), job.slots[place].seat) else {
                continue;
            };
            if result.digest == truth {
                agreed += 1;
                let clean = self.trust.clean(&seat.miner, &env_id).saturating_add(1);
                let record = CleanRecord { miner: seat.miner, env_id, clean };
                self.trust.set_clean(record);
                self.trust.entry(seat.miner, now.wall).suspicion.observe(Observation::Clean);
                out.push(Output::PersistClean(record));
                continue;
            }
            let detail = "its result differs from this validator's own in the same environment".to_owned();
            job.trouble = format!("miner {}: {detail}", seat.miner);
            job.excluded.push(seat.miner);
            let evidence = Evidence {
                part: job.part(seat.miner),
                offence: Offence::WrongResult,
                accused: Some(result.attestation),
                reference: Some(reference.clone()),
                commitment: result.commitment,
                detail,
                at: now.wall,
            };
            self.punish(job, evidence, now, out);
        }
        job.truth = Some(truth);
        if agreed > 0 {
            self.finish(job, VerdictKind::Audited, Some(truth), now, out);
        } else {
            self.next_attempt(job, true, now, out);
        }
    }

    /// Records an offence and drops the miner.
    pub(super) fn punish(&mut self, job: &Job, evidence: Evidence, now: Now, out: &mut Vec<Output>) {
        let miner = evidence.part.miner;
        let until = self.trust.offend(miner, evidence.offence, &self.time_off, &evidence.detail, now.wall);
        if let Some((_, env_id)) = job.engine {
            let record = CleanRecord { miner, env_id, clean: 0 };
            self.trust.set_clean(record);
            out.push(Output::PersistClean(record));
        }
        let reason = evidence.detail.clone();
        out.push(Output::RecordEvidence(Box::new(evidence)));
        out.push(Output::PersistMiner(Box::new(self.trust.record(&miner))));
        self.drop_until(&miner, until, reason, now, out);
    }

    pub(super) fn fail(&mut self, job: &mut Job, reason: String, now: Now, out: &mut Vec<Output>) {
        self.finish(job, VerdictKind::Failed(reason), None, now, out);
    }

    /// Ends the job. `result`: digest of the result that stands.
    pub(super) fn finish(
        &mut self,
        job: &mut Job,
        kind: VerdictKind,
        result: Option<Digest>,
        now: Now,
        out: &mut Vec<Output>,
    ) {
        if job.phase == Phase::Done {
            return;
        }
        if matches!(job.phase, Phase::Auditing { .. }) {
            self.audits_running -= 1;
            out.push(Output::AbandonAudit { job: job.id() });
        }
        self.stop_waiting(job);
        self.abandon(job, "the job is over", now, out);
        job.phase = Phase::Done;
        let truth = result.or(job.truth);
        let (replicas, attestations) = self.take_part(job, truth, now);
        let winner = job.slots.iter().filter_map(Slot::result).find(|r| result == Some(r.digest));
        let attested = winner.map(|winner| winner.attestation.attestation.value());
        let spec = &job.submission.spec;
        let verdict = Verdict {
            job: job.id(),
            attempt: job.attempt,
            rank: job.submission.rank,
            kind: bounded(kind),
            outcome: attested.map(|a| a.outcome),
            output: attested.map_or_else(|| BlobId::of(&[]), |a| a.output),
            output_len: attested.map_or(ByteCount(0), |a| a.output_len),
            env_id: job.engine.map_or(EnvId([0; 32]), |(_, env_id)| env_id),
            replicas,
            // The epoch of the draw, so that the draw can be made again; without one, the present.
            epoch: if result.is_some() { job.epoch } else { self.epoch.epoch },
            issued_at: now.wall,
            incentive: self.incentive,
        };
        let record = JobRecord::finished(verdict.rank, verdict.attempt, spec.not_after, job.accepted_at);
        self.remember(job.id(), record.seen_until(), now);
        out.push(Output::Finish(Box::new(Ruling { verdict, attestations, record })));
    }

    /// Who took part, with attestations in the same order; and the pay of those whose result stands.
    fn take_part(
        &mut self,
        job: &Job,
        truth: Option<Digest>,
        now: Now,
    ) -> (Vec<Replica>, Vec<Arc<sundara_proto::attestation::CountersignedAttestation>>) {
        let mut replicas = Vec::with_capacity(job.slots.len() + job.casualties.len());
        let mut attestations = Vec::new();
        for slot in &job.slots {
            let Some(seat) = slot.seat else { continue };
            let latency_us = u64::try_from(slot.latency.as_micros()).unwrap_or(u64::MAX);
            let (standing, attestation, commitment) = match &slot.stage {
                Stage::Revealed(result) => {
                    // Without a truth nobody is said to be right or wrong.
                    let Some(truth) = truth else { continue };
                    attestations.push(result.attestation.clone());
                    let standing = if result.digest == truth {
                        let pay = worth(slot, result);
                        let held_jobs = self.config.audit.held_jobs;
                        self.trust.entry(seat.miner, now.wall).held.push(pay, held_jobs);
                        Standing::Agreed
                    } else {
                        Standing::Disagreed
                    };
                    (standing, Some(result.name), result.commitment)
                }
                Stage::Failed(standing, commitment) => (*standing, None, *commitment),
                _ => continue,
            };
            replicas.push(Replica { miner: seat.miner, standing, attestation, commitment, latency_us });
        }
        replicas.extend(job.casualties.iter().cloned());
        replicas.truncate(limit::REPLICAS);
        (replicas, attestations)
    }

    /// Remembers a finished job's id.
    pub(super) fn remember(
        &mut self,
        job: sundara_proto::id::JobId,
        until: sundara_proto::units::UnixMillis,
        now: Now,
    ) {
        self.seen.insert(job);
        let wait: Duration = now.wall.until(until);
        self.wheel.set(now.mono + wait, Timer::Forget(job));
    }
}

/// Pay of a result: announced price times fuel, and something for the smallest job.
fn worth(slot: &Slot, result: &Finding) -> u64 {
    let fuel = result.attestation.attestation.usage.fuel / FUEL_UNIT + 1;
    slot.seat.map_or(1, |seat| seat.price.max(1)).saturating_mul(fuel)
}

/// A verdict's reason is bounded text without control characters, whatever a miner's detail held.
fn bounded(kind: VerdictKind) -> VerdictKind {
    let clean = |reason: String| {
        let mut text: String = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        while text.len() > limit::TEXT {
            text.pop();
        }
        text
    };
    match kind {
        VerdictKind::Rejected(reason) => VerdictKind::Rejected(clean(reason)),
        VerdictKind::Failed(reason) => VerdictKind::Failed(clean(reason)),
        other => other,
    }
}
