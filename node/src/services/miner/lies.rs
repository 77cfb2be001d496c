//! What a dishonest miner does, so that a test mesh can show that it is caught. Never on in a real node: see
//! [`Misbehaviour`]. A wrong or colluding result is made where results are attested, in the executor; here are the two
//! that cheat at the commitment.

use sundara_proto::cert::Roles;
use sundara_proto::id::Digest;
use sundara_proto::pb;

use super::offer::{Accepted, revealed};
use super::{Answer, Held, Inner, Misbehaviour};
use crate::net::{FailureCode, PeerIdentity, Reply};
use crate::services::work::pool::Reservation;
use crate::services::work::{ExecutorEvent, Order};

/// What stands behind a dishonest commitment.
#[derive(Clone)]
pub(super) enum Lie {
    /// Nothing yet: the answer is looked for when the reveal is asked for.
    Copied(Box<Order>),
    /// A result that is never shown.
    Withheld,
}

/// Other miners that a copier asks for their result.
const ASKED_MAX: usize = 4;

impl Inner {
    pub(super) async fn serve_with_lie(
        &self,
        lie: Misbehaviour,
        mut job: Accepted,
        place: Reservation,
        mut reply: Reply,
    ) {
        let copies = lie == Misbehaviour::Copy;
        if !job.commit_reveal {
            if copies {
                let _ = self.ask_others(&job.order).await;
                drop(place);
                let fault = crate::services::work::ExecutorFault::passing("nobody to copy from");
                return self.fail(&job, super::offer::Stop::Fault(fault), reply).await;
            }
            // Accepted, and then silence.
            tokio::select! {
                () = reply.closed() => {}
                () = job.stop.cancelled() => {}
                () = tokio::time::sleep_until(job.deadline) => {}
            }
            return self.stopped(&job, "withheld");
        }
        let salt: [u8; 32] = rand::random();
        if copies {
            drop(place);
            let _ = self.ask_others(&job.order).await;
            let order = Box::new(job.order.clone());
            return self.commit(job, Answer::Lie(Lie::Copied(order)), salt, Digest(rand::random()), reply).await;
        }
        match self.execute(&mut job, place, &mut reply).await {
            Ok(shown) => {
                let attestation = &shown.attestation.attestation;
                let result = attestation.result_digest().unwrap_or_else(|| attestation.digest());
                let commitment = self.commitment(&job, &result, &salt);
                self.forget_output(&shown);
                self.commit(job, Answer::Lie(Lie::Withheld), salt, commitment, reply).await;
            }
            Err(stop) => self.fail(&job, stop, reply).await,
        }
    }

    /// Asks other miners for their result, as if this node were the validator. Honest ones refuse.
    async fn ask_others(&self, order: &Order) -> Option<pb::Revealed> {
        let own = self.net.local().node;
        let others = self
            .net
            .peers()
            .await
            .into_iter()
            .filter(|p| p.node != own && p.roles.is_some_and(|roles| roles.contains(Roles::MINER)));
        for peer in others.take(ASKED_MAX) {
            let reveal = pb::Reveal { job: order.job.into(), attempt: order.attempt };
            match self.net.request_one(peer.node, pb::request::Kind::Reveal(reveal)).await {
                Ok(pb::response::Kind::Work(pb::WorkEvent { kind: Some(pb::work_event::Kind::Revealed(r)) })) => {
                    return Some(r);
                }
                Ok(_) | Err(_) => tracing::debug!(peer = %peer.node, "would not be copied"),
            }
        }
        None
    }

    pub(super) async fn reveal_lie(&self, held: Held, peer: PeerIdentity, reply: Reply) -> Result<(), Held> {
        let Answer::Lie(lie) = held.answer.clone() else { return Err(held) };
        match lie {
            Lie::Withheld => {
                tokio::select! {
                    () = reply.closed() => {}
                    () = tokio::time::sleep_until(held.until) => {}
                }
                self.drop_held(held, "withheld");
            }
            Lie::Copied(order) => {
                // Others have committed by now; their answers are still not to be had. What is left is to run the job
                // late and to show a right result under a commitment that was made without one.
                let _ = (self.ask_others(&order).await, peer);
                match self.run_late(*order).await {
                    Some(shown) => {
                        let salt = bytes::Bytes::copy_from_slice(&held.salt);
                        let _ = reply.finish(revealed(&shown, salt)).await;
                        self.forget_output(&shown);
                    }
                    None => reply.fail(FailureCode::Internal, "no result"),
                }
                self.drop_held(held, "copied");
            }
        }
        Ok(())
    }

    async fn run_late(&self, order: Order) -> Option<super::Shown> {
        let place = self.pool.reserve(&order.spec.hardware_class).ok()?;
        let mut run = self.pool.run_at(place, order);
        while let Some(event) = run.next().await {
            if let ExecutorEvent::Finished(executed) = event {
                return Some(self.countersign(*executed));
            }
        }
        None
    }
}
