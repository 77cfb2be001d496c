//! What miners answer.

use std::sync::Arc;

use bytes::Bytes;
use sundara_proto::attestation::CountersignedAttestation;
use sundara_proto::id::Digest;
use sundara_proto::verdict::Standing;

use super::core::Core;
use super::io::{Decline, Evidence, Offence, Output, Part};
use super::state::{Finding, Job, Phase, Stage};
use crate::domain::Now;
use crate::domain::verify::{Expected, Objection, opens};

/// Why a miner's part came to nothing although it had taken it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// The connection broke, or a message could not be delivered.
    Connection,
    /// A deadline passed.
    Stall,
    /// It said so itself.
    Fault,
}

impl Core {
    pub(super) fn accepted(&mut self, job: &mut Job, part: &Part, now: Now, out: &mut Vec<Output>) {
        let Some(place) = job.slot_of(part) else { return };
        if !matches!(job.slots[place].stage, Stage::Offered) {
            return;
        }
        let has_model = job.slots[place].seat.is_some_and(|seat| seat.has_model);
        let execution = self.config.execution(&job.submission.spec, has_model);
        let slot = &mut job.slots[place];
        slot.stage = Stage::Accepted;
        slot.deadline = now.mono + execution;
        if !std::mem::replace(&mut job.started, true) {
            out.push(Output::Started { job: job.id(), attempt: job.attempt });
        }
    }

    pub(super) fn declined(
        &mut self,
        job: &mut Job,
        part: &Part,
        answer: (Decline, String),
        now: Now,
        out: &mut Vec<Output>,
    ) {
        let Some(place) = job.slot_of(part) else { return };
        let (reason, detail) = answer;
        match job.slots[place].stage {
            Stage::Offered => {}
            // Only its echo: the part is running.
            Stage::Accepted if reason == Decline::Duplicate => return,
            // Takes its word back.
            Stage::Accepted => return self.lost(job, part, Loss::Fault, detail, now, out),
            _ => return,
        }
        match reason {
            Decline::Later => self.pause(&part.miner, self.config.pause_ms, now),
            Decline::NotThis | Decline::Duplicate => job.excluded.push(part.miner),
        }
        self.replace(job, place, format!("declined: {detail}"), now, out);
    }

    pub(super) fn committed(
        &mut self,
        job: &mut Job,
        part: &Part,
        commitment: Digest,
        now: Now,
        out: &mut Vec<Output>,
    ) {
        let Some(place) = job.slot_of(part) else { return };
        if job.phase != Phase::Placing || !job.replicated() {
            // After the first reveal a commitment proves nothing; for a single replica there is no use for one.
            return;
        }
        // Messages may overtake each other: a commitment says that the offer was accepted.
        self.accepted(job, part, now, out);
        let slot = &mut job.slots[place];
        if !matches!(slot.stage, Stage::Accepted) {
            return;
        }
        slot.stage = Stage::Committed(commitment);
        slot.latency = now.mono.saturating_sub(slot.offered_mono);
        self.advance(job, now, out);
    }

    pub(super) fn output(&mut self, job: &mut Job, part: &Part, chunk: (u64, Bytes), now: Now, out: &mut Vec<Output>) {
        let Some(place) = job.slot_of(part) else { return };
        let streaming = sundara_proto::rules::select::streaming_replica(&job.id(), job.attempt, job.slots.len());
        if !job.submission.spec.stream || place != streaming || job.phase != Phase::Placing {
            return;
        }
        self.accepted(job, part, now, out);
        let (offset, data) = chunk;
        let end = offset.saturating_add(data.len() as u64);
        let new = offset <= job.streamed && end > job.streamed && end <= job.submission.spec.limits.output.0;
        if !matches!(job.slots[place].stage, Stage::Accepted) || !new {
            return;
        }
        // A miner that replaced another begins at 0 again; what the requester has already is cut off.
        let skip = usize::try_from(job.streamed - offset).unwrap_or(data.len());
        let fresh = Output::ForwardOutput {
            job: job.id(),
            attempt: job.attempt,
            offset: job.streamed,
            data: data.slice(skip.min(data.len())..),
        };
        job.streamed = end;
        out.push(fresh);
    }

    pub(super) fn revealed(
        &mut self,
        job: &mut Job,
        part: &Part,
        answer: (Arc<CountersignedAttestation>, [u8; 32]),
        now: Now,
        out: &mut Vec<Output>,
    ) {
        let (attestation, salt) = answer;
        let Some(place) = job.slot_of(part) else { return };
        let Some((_, env_id)) = job.engine else { return };
        let offered_at = job.slots[place].offered_wall;
        let expected = Expected::of(*part, &job.submission.spec, env_id, offered_at, now.wall);
        let checked = expected.check(&attestation);
        let result = attestation.attestation.result_digest();
        let commitment = match (&job.slots[place].stage, job.phase) {
            (Stage::Asked(commitment), Phase::Revealing) => Some(*commitment),
            // A run that came to no result has nothing to commit to.
            (Stage::Offered | Stage::Accepted, Phase::Placing) if !job.replicated() || result.is_none() => None,
            _ => return,
        };
        match checked {
            Err(Objection::Foreign(what)) => {
                let evidence = (Offence::ForeignAttestation, what.to_owned(), Some(attestation));
                return self.offend(job, place, evidence, now, out);
            }
            Err(Objection::Unusable(what)) => {
                return self.lost(job, part, Loss::Fault, what.to_owned(), now, out);
            }
            Ok(()) => {}
        }
        let Some(digest) = result else {
            let outcome = format!("execution ended {:?}: no result", attestation.attestation.outcome);
            // Reaching the wall limit once is bad luck or a slow machine: another one tries.
            job.excluded.push(part.miner);
            return self.lost(job, part, Loss::Fault, outcome, now, out);
        };
        if commitment.is_some_and(|commitment| !opens(part, &commitment, &digest, &salt)) {
            let what = "revealed something else than it had committed to".to_owned();
            return self.offend(job, place, (Offence::BrokenCommitment, what, Some(attestation)), now, out);
        }
        if !job.replicated() {
            self.accepted(job, part, now, out);
            job.slots[place].latency = now.mono.saturating_sub(job.slots[place].offered_mono);
        }
        self.vacate(job, place, now);
        self.trust.entry(part.miner, now.wall).strikes = 0;
        let name = attestation.attestation.digest();
        job.slots[place].stage = Stage::Revealed(Box::new(Finding { attestation, name, digest, commitment }));
        self.advance(job, now, out);
    }

    /// A part that was taken came to nothing, without an offence; or a reveal did not come.
    pub(super) fn lost(
        &mut self,
        job: &mut Job,
        part: &Part,
        loss: Loss,
        reason: String,
        now: Now,
        out: &mut Vec<Output>,
    ) {
        let Some(place) = job.slot_of(part) else { return };
        match job.slots[place].stage {
            Stage::Offered | Stage::Accepted | Stage::Committed(_) => {
                self.strike(&part.miner, now);
                if loss == Loss::Stall
                    && let Some(seat) = job.slots[place].seat
                {
                    out.push(Output::SendAbandon { part: *part, node: seat.node, reason: reason.clone() });
                }
                self.replace(job, place, reason, now, out);
            }
            Stage::Asked(_) => self.withheld(job, place, loss, reason, now, out),
            _ => {}
        }
    }

    /// A commitment without a reveal is a failure. A miner that stays connected and keeps silent chose to; one whose
    /// connection broke may not have, so it is only noted, and a few such notes ban it.
    fn withheld(&mut self, job: &mut Job, place: usize, loss: Loss, reason: String, now: Now, out: &mut Vec<Output>) {
        if loss != Loss::Connection {
            return self.offend(job, place, (Offence::Withheld, reason, None), now, out);
        }
        let Some(seat) = job.slots[place].seat else { return };
        if self.trust.withheld_by_loss(seat.miner, now.wall) {
            return self.offend(job, place, (Offence::Withheld, reason, None), now, out);
        }
        self.strike(&seat.miner, now);
        self.fail_place(job, place, Standing::Withheld, &reason, now);
        self.advance(job, now, out);
    }

    /// Takes a place out whose reveal was asked for.
    fn fail_place(&mut self, job: &mut Job, place: usize, standing: Standing, reason: &str, now: Now) {
        self.vacate(job, place, now);
        let slot = &mut job.slots[place];
        let commitment = match slot.stage {
            Stage::Asked(commitment) | Stage::Committed(commitment) => Some(commitment),
            _ => None,
        };
        if let Some(seat) = slot.seat {
            job.trouble = format!("miner {}: {reason}", seat.miner);
        }
        slot.stage = Stage::Failed(standing, commitment);
    }

    /// A miner did what no honest one does: keep the evidence, drop it, go on without it.
    pub(super) fn offend(
        &mut self,
        job: &mut Job,
        place: usize,
        what: (Offence, String, Option<Arc<CountersignedAttestation>>),
        now: Now,
        out: &mut Vec<Output>,
    ) {
        let (offence, detail, accused) = what;
        let Some(seat) = job.slots[place].seat else { return };
        let part = job.part(seat.miner);
        let commitment = match job.slots[place].stage {
            Stage::Asked(commitment) | Stage::Committed(commitment) => Some(commitment),
            _ => None,
        };
        let evidence =
            Evidence { part, offence, accused, reference: None, commitment, detail: detail.clone(), at: now.wall };
        self.punish(job, evidence, now, out);
        job.excluded.push(seat.miner);
        match job.slots[place].stage {
            Stage::Asked(_) => {
                let standing = if offence == Offence::Withheld { Standing::Withheld } else { Standing::Faulted };
                self.fail_place(job, place, standing, &detail, now);
                self.advance(job, now, out);
            }
            Stage::Offered | Stage::Accepted | Stage::Committed(_) => self.replace(job, place, detail, now, out),
            _ => {}
        }
    }
}
