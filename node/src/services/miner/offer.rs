//! One offer that was admitted: signature, acceptance, the run, countersignature, and what the validator is sent.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sundara_proto::attestation::{Countersignature, CountersignedAttestation};
use sundara_proto::crypto::Signed;
use sundara_proto::id::{Digest, JobId};
use sundara_proto::job::JobSpec;
use sundara_proto::pb;
use sundara_proto::rules::select::result_commitment;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::admission::Decline;
use super::log::{OfferState, Ticket};
use super::{Answer, HELD_AFTER_DEADLINE, Held, Inner, Misbehaviour, Shown, Stage, work};
use crate::net::{FailureCode, PeerIdentity, Reply};
use crate::service::wall_now;
use crate::services::work::pool::Reservation;
use crate::services::work::{Executed, ExecutorEvent, ExecutorFault, Order};

/// An admitted offer with its place at an executor.
pub(super) struct Accepting {
    pub(super) peer: PeerIdentity,
    pub(super) offer: pb::Offer,
    pub(super) job: JobId,
    pub(super) place: Reservation,
    /// Cancelled when the job is abandoned or another attempt takes its place.
    pub(super) stop: CancellationToken,
}

/// How a run left its job.
pub(super) enum Stop {
    /// Every executor broke.
    Fault(ExecutorFault),
    /// Nobody wants the result; why.
    Unwanted(&'static str),
}

/// A job that was accepted.
pub(super) struct Accepted {
    pub(super) peer: PeerIdentity,
    pub(super) job: JobId,
    pub(super) attempt: u32,
    pub(super) commit_reveal: bool,
    pub(super) stop: CancellationToken,
    pub(super) deadline: Instant,
    pub(super) order: Order,
    pub(super) ticket: Ticket,
}

impl Inner {
    pub(super) async fn serve_offer(self: Arc<Self>, accepting: Accepting, mut reply: Reply) {
        let Accepting { peer, offer, job, place, stop } = accepting;
        // One signature here and there costs less than to hand it to another thread.
        let spec = match Signed::<JobSpec>::verify(&self.network, offer.spec.unwrap_or_default()) {
            Ok(spec) => Arc::new(spec),
            Err(e) => return self.decline(reply, peer, None, &Decline::malformed(&format!("spec: {e}"))),
        };
        let within = Duration::from_millis(offer.deadline_ms).min(JobSpec::NOT_AFTER_MAX);
        let deadline = Instant::now() + within;
        self.metrics.accepted.inc();
        let ticket = self.log.accepted(&spec, offer.attempt, peer.hotkey);
        let order = Order {
            job,
            spec,
            attempt: offer.attempt,
            inline_input: offer.inline_input,
            stream: offer.stream,
            sources: vec![peer.node],
            validator: peer.hotkey,
            deadline,
        };
        let commit_reveal = offer.commit_reveal;
        let mut job = Accepted { peer, job, attempt: offer.attempt, commit_reveal, stop, deadline, order, ticket };
        if reply.send(work(pb::work_event::Kind::Accepted(pb::Accepted {}))).await.is_err() {
            return self.stopped(&job, "the validator was gone before it heard of the acceptance");
        }
        let lie = match self.misbehaviour {
            Some(lie @ (Misbehaviour::Copy | Misbehaviour::Withhold)) => Some(lie),
            _ => None,
        };
        if let Some(lie) = lie {
            return self.serve_with_lie(lie, job, place, reply).await;
        }
        match self.execute(&mut job, place, &mut reply).await {
            Ok(shown) => self.present(job, shown, reply).await,
            Err(stop) => self.fail(&job, stop, reply).await,
        }
    }

    /// Runs the job and countersigns what came of it. Dropping the future stops the run.
    pub(super) async fn execute(
        &self,
        job: &mut Accepted,
        place: Reservation,
        reply: &mut Reply,
    ) -> Result<Shown, Stop> {
        let (stop, deadline) = (job.stop.clone(), job.deadline);
        tokio::select! {
            biased;
            () = stop.cancelled() => Err(Stop::Unwanted("abandoned by its validator")),
            () = tokio::time::sleep_until(deadline) => Err(Stop::Unwanted("its deadline passed")),
            result = async {
                let executed = self.follow(job, place, reply).await?;
                Ok(self.countersign(executed))
            } => result,
        }
    }

    async fn follow(&self, job: &mut Accepted, place: Reservation, reply: &mut Reply) -> Result<Executed, Stop> {
        const GONE: Stop = Stop::Unwanted("its validator is gone");
        let mut run = self.pool.run_at(place, job.order.clone());
        loop {
            let event = tokio::select! {
                biased;
                () = reply.closed() => return Err(GONE),
                event = run.next() => event,
            };
            match event {
                Some(ExecutorEvent::Started) => job.ticket.started = Some(wall_now()),
                Some(ExecutorEvent::Output { offset, data }) => {
                    let output = pb::Output { attempt: job.attempt, offset, data };
                    reply.send(work(pb::work_event::Kind::Output(output))).await.map_err(|_| GONE)?;
                }
                Some(ExecutorEvent::Finished(executed)) => return Ok(*executed),
                Some(ExecutorEvent::Fault(fault)) => return Err(Stop::Fault(fault)),
                None => return Err(Stop::Fault(ExecutorFault::passing("the executor pool is shut down"))),
            }
        }
    }

    pub(super) fn countersign(&self, executed: Executed) -> Shown {
        let Executed { attestation, inline_output } = executed;
        let over =
            Countersignature { attestation: attestation.digest(), job: attestation.job, attempt: attestation.attempt };
        let countersignature = Signed::sign(&self.network, &self.key, over);
        Shown { attestation: Arc::new(CountersignedAttestation { attestation, countersignature }), inline_output }
    }

    /// Shows the result, or commits to it and holds it.
    async fn present(&self, job: Accepted, shown: Shown, reply: Reply) {
        let result = shown.attestation.attestation.result_digest();
        // A run that came to no result has nothing to commit to.
        let Some(result) = result.filter(|_| job.commit_reveal) else {
            let sent = reply.finish(revealed(&shown, Bytes::new())).await;
            self.showed(&job.ticket, &shown, sent.is_ok());
            return;
        };
        let salt: [u8; 32] = rand::random();
        let commitment = self.commitment(&job, &result, &salt);
        self.commit(job, Answer::Honest(shown), salt, commitment, reply).await;
    }

    pub(super) fn commitment(&self, job: &Accepted, result: &Digest, salt: &[u8; 32]) -> Digest {
        result_commitment(&job.job, job.attempt, &self.net.local().hotkey, result, salt)
    }

    /// Sends a commitment and holds what is behind it.
    pub(super) async fn commit(&self, job: Accepted, answer: Answer, salt: [u8; 32], commitment: Digest, reply: Reply) {
        // Held before it is said: the reveal may be asked for at once.
        let key = (job.job, job.peer.hotkey);
        let held = Held { answer, salt, until: job.deadline + HELD_AFTER_DEADLINE, ticket: job.ticket.clone() };
        let displaced = {
            let mut taken = self.taken();
            match taken.get_mut(&key) {
                Some(t) if t.attempt == job.attempt => {
                    t.stage = Stage::Held(Box::new(held));
                    None
                }
                // Another attempt took its place meanwhile.
                _ => Some(held),
            }
        };
        if let Some(held) = displaced {
            return self.drop_held(held, "a later attempt replaced it");
        }
        let committed = pb::Committed { commitment: commitment.into() };
        if reply.finish(work(pb::work_event::Kind::Committed(committed))).await.is_err() {
            tracing::debug!(job = %job.job, "commitment not delivered; its validator is gone");
        }
    }

    /// Answers a reveal; gives the result back when the answer could not be sent.
    pub(super) async fn reveal(&self, held: Held, peer: PeerIdentity, reply: Reply) -> Result<(), Held> {
        match &held.answer {
            Answer::Honest(shown) => {
                let answer = revealed(shown, Bytes::copy_from_slice(&held.salt));
                if reply.finish(answer).await.is_err() {
                    return Err(held);
                }
                self.showed(&held.ticket, shown, true);
                Ok(())
            }
            Answer::Lie(_) => self.reveal_lie(held, peer, reply).await,
        }
    }

    fn showed(&self, ticket: &Ticket, shown: &Shown, delivered: bool) {
        let attestation = &shown.attestation.attestation;
        if delivered {
            self.metrics.served.inc();
            let detail = format!("{:?}, {} fuel", attestation.outcome, attestation.usage.fuel).to_lowercase();
            self.log.ended(ticket, OfferState::Served, &detail, Some(attestation.finished_at));
        } else {
            self.metrics.abandoned.inc();
            self.log.ended(ticket, OfferState::Abandoned, "its validator was gone before the result", None);
        }
        self.forget_output(shown);
    }

    pub(super) async fn fail(&self, job: &Accepted, stop: Stop, reply: Reply) {
        match stop {
            Stop::Unwanted(why) => {
                self.stopped(job, why);
                reply.fail(FailureCode::Internal, why);
            }
            Stop::Fault(fault) => {
                self.metrics.faulted.inc();
                self.log.ended(&job.ticket, OfferState::Faulted, &fault.reason, None);
                let fault = pb::ExecutorFault { reason: fault.reason, retryable: fault.retryable };
                // A validator that is gone needs no answer.
                let _ = reply.finish(work(pb::work_event::Kind::Fault(fault))).await;
            }
        }
    }

    pub(super) fn stopped(&self, job: &Accepted, why: &str) {
        self.metrics.abandoned.inc();
        self.log.ended(&job.ticket, OfferState::Abandoned, why, None);
    }
}

/// The answer that shows a result.
pub(super) fn revealed(shown: &Shown, salt: Bytes) -> pb::response::Kind {
    work(pb::work_event::Kind::Revealed(pb::Revealed {
        attestation: Some(shown.attestation.to_raw()),
        salt,
        inline_output: shown.inline_output.clone(),
    }))
}
