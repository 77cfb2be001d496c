//! One offer: asks a miner, checks what it answers, and tells the machine in the machine's own words. Runs in a task of its
//! own, so that signatures are checked on whichever core is free and a slow miner holds up nobody.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use sundara_proto::attestation::{AttestationError, CountersignedAttestation, cert_digest};
use sundara_proto::crypto::Network;
use sundara_proto::id::{BlobId, Digest, Hotkey, NodeId};
use sundara_proto::pb;
use sundara_proto::pb::work_event::Kind as Work;
use sundara_proto::wire::limit;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::FromOffer;
use crate::blobs::{Access, Blobs, Reader, Sources, TransferHandle};
use crate::domain::job::{Decline, Input, Part};
use crate::net::NetHandle;

/// Added to the machine's own deadline, which fires first: what the task holds ends even if the machine forgot it.
const DEADLINE_MARGIN: Duration = Duration::from_secs(30);

/// An offer to be sent.
pub(super) struct Order {
    pub(super) part: Part,
    pub(super) node: NodeId,
    pub(super) request: pb::Offer,
    /// Input that the miner fetches from here.
    pub(super) input: Option<BlobId>,
    pub(super) requester: Hotkey,
    pub(super) deadline: Duration,
}

/// What an offer's task holds of the node.
pub(super) struct Courier {
    pub(super) network: Network,
    pub(super) net: NetHandle,
    pub(super) blobs: Blobs,
    pub(super) transfer: TransferHandle,
    pub(super) certs: Arc<CertCache>,
    pub(super) inputs: mpsc::Sender<FromOffer>,
}

/// How one answer left the offer.
enum Step {
    /// More may come.
    On,
    /// That was all.
    Over,
}

impl Courier {
    /// Offers, and follows the answers to the last one.
    pub(super) async fn offer(self, order: Order, cut: CancellationToken) {
        let part = order.part;
        if let Some(input) = order.input
            && let Err(e) = self.blobs.grant(input, Access::only([Reader::Hotkey(part.miner)])).await
        {
            let reason = format!("input cannot be shown to the miner: {e}");
            return self.say(Input::Undelivered { part, reason }).await;
        }
        let patience = order.deadline + DEADLINE_MARGIN;
        let ended = tokio::select! {
            () = cut.cancelled() => return,
            ended = tokio::time::timeout(patience, self.follow(order)) => ended,
        };
        match ended {
            Ok(None) => {}
            Ok(Some(input)) => self.say(input).await,
            Err(_) => self.say(Input::Undelivered { part, reason: "no last answer in time".to_owned() }).await,
        }
    }

    /// The input that ends the offer, unless an answer did.
    async fn follow(&self, order: Order) -> Option<Input> {
        let part = order.part;
        let undelivered = |e: String| Some(Input::Undelivered { part, reason: e });
        let mut answers = match self.net.request(order.node, pb::request::Kind::Offer(order.request)).await {
            Ok(answers) => answers,
            Err(e) => return undelivered(e.to_string()),
        };
        while let Some(answer) = answers.next().await {
            let work = match answer {
                Ok(pb::response::Kind::Work(pb::WorkEvent { kind: Some(work) })) => work,
                Ok(_) => return Some(Input::BadReply { part, reason: "not an answer to an offer".to_owned() }),
                Err(e) => return undelivered(e.to_string()),
            };
            if let Step::Over = self.on_work(part, order.node, order.requester, work).await {
                return None;
            }
        }
        undelivered("the miner ended its answers early".to_owned())
    }

    /// Asks for what was committed to.
    pub(super) async fn reveal(
        self,
        part: Part,
        node: NodeId,
        requester: Hotkey,
        within: Duration,
        cut: CancellationToken,
    ) {
        let request = pb::request::Kind::Reveal(pb::Reveal { job: part.job.into(), attempt: part.attempt });
        let answer = tokio::select! {
            () = cut.cancelled() => return,
            answer = tokio::time::timeout(within + DEADLINE_MARGIN, self.net.request_one(node, request)) => answer,
        };
        let input = match answer {
            Ok(Ok(pb::response::Kind::Work(pb::WorkEvent {
                kind: Some(work @ (Work::Revealed(_) | Work::Fault(_))),
            }))) => {
                self.on_work(part, node, requester, work).await;
                return;
            }
            Ok(Ok(_)) => Input::BadReply { part, reason: "not an answer to a reveal".to_owned() },
            Ok(Err(e)) => Input::Undelivered { part, reason: e.to_string() },
            Err(_) => Input::Undelivered { part, reason: "no reveal in time".to_owned() },
        };
        self.say(input).await;
    }

    async fn on_work(&self, part: Part, node: NodeId, requester: Hotkey, work: Work) -> Step {
        let (input, step) = match work {
            Work::Accepted(_) => (Input::Accepted(part), Step::On),
            Work::Declined(d) => (declined(part, d), Step::Over),
            Work::Output(o) => (Input::Output { part, offset: o.offset, data: o.data }, Step::On),
            Work::Committed(c) => match Digest::try_from(c.commitment.as_ref()) {
                Ok(commitment) => (Input::Committed { part, commitment }, Step::Over),
                Err(e) => (Input::BadReply { part, reason: e.to_string() }, Step::Over),
            },
            Work::Revealed(r) => {
                let from = self.revealed(part, node, requester, r).await;
                let _stopped = self.inputs.send(from).await;
                return Step::Over;
            }
            Work::Fault(f) => (Input::Fault { part, reason: shorten(f.reason) }, Step::Over),
            Work::ExecutorResult(_) => {
                let reason = "an executor's answer, not countersigned".to_owned();
                (Input::BadReply { part, reason }, Step::Over)
            }
        };
        self.say(input).await;
        step
    }

    /// Checks signatures and output bytes. Whether the result is right is the machine's business.
    async fn revealed(&self, part: Part, node: NodeId, requester: Hotkey, r: pb::Revealed) -> FromOffer {
        let bad = |reason: String| FromOffer { input: Input::BadReply { part, reason }, output: None };
        let Some(raw) = r.attestation else { return bad("no attestation".to_owned()) };
        let attestation = match self.certs.verify(&self.network, raw) {
            Ok(attestation) => attestation,
            Err(e) => return bad(e.to_string()),
        };
        let salt = if r.salt.is_empty() { Ok([0; 32]) } else { r.salt.as_ref().try_into() };
        let Ok(salt) = salt else { return bad("salt is not 32 bytes".to_owned()) };
        let (digest, len) = (attestation.attestation.output, attestation.attestation.output_len);
        let output = match r.inline_output {
            Some(bytes) if bytes.len() > limit::INLINE => return bad("inline output is too large".to_owned()),
            Some(bytes) if BlobId::of(&bytes) != digest => return bad("output is not what was attested".to_owned()),
            Some(bytes) => Some((digest, bytes)),
            None if len.0 == 0 => Some((digest, Bytes::new())),
            None => {
                let sources = Sources::peers([node]);
                let readers = Access::only([Reader::Hotkey(requester)]);
                if let Err(e) = self.transfer.fetch(digest, len, sources, readers).await {
                    let reason = format!("output of {len} cannot be fetched: {e}");
                    return FromOffer { input: Input::Undelivered { part, reason }, output: None };
                }
                None
            }
        };
        FromOffer { input: Input::Revealed { part, attestation: Arc::new(attestation), salt }, output }
    }

    async fn say(&self, input: Input) {
        // The loop is gone only when the node is.
        let _stopped = self.inputs.send(FromOffer { input, output: None }).await;
    }
}

fn declined(part: Part, d: pb::Declined) -> Input {
    use pb::declined::Reason as R;
    let reason = match d.reason() {
        // Of the wrong class is only who has just lost an executor: its next advert will say so, or that it is back.
        R::Busy | R::ShuttingDown | R::DiskFull | R::NoExecutor | R::WrongClass | R::Unspecified => Decline::Later,
        R::Duplicate => Decline::Duplicate,
        R::NotAdmitted | R::PublisherNotAllowed | R::LimitsTooHigh | R::Expired | R::Malformed | R::Unsupported => {
            Decline::NotThis
        }
    };
    Input::Declined { part, reason, detail: shorten(d.detail) }
}

/// A peer's text, bounded.
fn shorten(text: String) -> String {
    if text.len() <= limit::TEXT { text } else { text.chars().take(limit::TEXT / 4).collect() }
}

/// Executor certificates that were verified before: each is shown with every attestation, and a check costs as much as
/// the rest of the job's bookkeeping.
#[derive(Default)]
pub(crate) struct CertCache {
    known: Mutex<HashSet<Digest>>,
}

/// Certificates remembered; a validator sees a few hundred executors, each renewed once a day.
const CERTS_KNOWN_MAX: usize = 4_096;

impl CertCache {
    fn verify(
        &self,
        network: &Network,
        raw: pb::CountersignedAttestation,
    ) -> Result<CountersignedAttestation, AttestationError> {
        let verified = CountersignedAttestation::verify_known(network, raw, |digest| self.known().contains(digest))?;
        let digest = cert_digest(&verified.attestation.executor_cert);
        let mut known = self.known();
        if known.len() >= CERTS_KNOWN_MAX {
            known.clear();
        }
        known.insert(digest);
        Ok(verified)
    }

    fn known(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
