//! An order at an attached executor: the same Offer that the miner got, over /rpc.
//!
//! ```text
//! owner ── Offer ──▶ executor
//!       ◀── Accepted | Declined ──
//!       ◀── Output* ──────────────
//!       ◀── ExecutorResult | Fault
//! ```
//!
//! What the executor says is checked here: its signature, its certificate, that the attestation is about this order, and
//! that the output is the attested one. Whatever is wrong with it is the executor's fault and never reaches a validator.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use sundara_proto::attestation::{Attestation, verify_attestation};
use sundara_proto::crypto::Signed;
use sundara_proto::id::{BlobId, NodeId};
use sundara_proto::pb;
use sundara_proto::units::ByteCount;
use sundara_proto::wire::limit;
use tokio::time::Instant;

use super::PoolParts;
use crate::blobs::{Access, Blobs, Reader, Sources, TransferHandle};
use crate::net::{NetHandle, Responses};
use crate::service::Workers;
use crate::services::work::{Executed, ExecutorEvent, ExecutorFault, Order, Run, RunSide};

/// An executor answers an offer at once; one that does not is stuck.
const ACCEPT_WITHIN: Duration = Duration::from_secs(3);

/// What a remote run works with.
struct Remote {
    network: sundara_proto::crypto::Network,
    owner: sundara_proto::id::Hotkey,
    net: NetHandle,
    blobs: Blobs,
    transfer: TransferHandle,
    workers: Workers,
    executor: NodeId,
    order: Order,
    /// The input's blob counts a use for this order.
    staged: AtomicBool,
}

/// Runs `order` at an attached executor.
pub(super) fn run(parts: &PoolParts, executor: NodeId, order: Order) -> Run {
    let (run, side) = Run::pair();
    let remote = Remote {
        network: parts.network,
        owner: parts.owner,
        net: parts.net.clone(),
        blobs: parts.blobs.clone(),
        transfer: parts.transfer.clone(),
        workers: parts.workers.clone(),
        executor,
        order,
        staged: AtomicBool::new(false),
    };
    parts.tasks.spawn("attached-order", async move {
        let cancel = side.cancel.clone();
        tokio::select! {
            biased;
            // Dropping the responses tells the executor to stop.
            () = cancel.cancelled() => {}
            () = remote.run(&side) => {}
        }
        if remote.staged.load(Ordering::Relaxed) {
            let _ = remote.blobs.remove(remote.order.spec.input).await;
        }
    });
    run
}

impl Remote {
    async fn run(&self, side: &RunSide) {
        let last = match self.offer(side).await {
            Ok(executed) => ExecutorEvent::Finished(Box::new(executed)),
            Err(fault) => ExecutorEvent::Fault(fault),
        };
        let _ = side.send(last).await;
    }

    async fn offer(&self, side: &RunSide) -> Result<Executed, ExecutorFault> {
        self.stage_input().await?;
        self.converse(side).await
    }

    /// Makes a large input readable for the executor.
    async fn stage_input(&self) -> Result<(), ExecutorFault> {
        if self.order.inline_input.is_some() || self.order.spec.input_len.0 == 0 {
            return Ok(());
        }
        let access = Access::only([Reader::Node(self.executor)]);
        let (spec, sources) = (&self.order.spec, Sources::peers(self.order.sources.iter().copied()));
        self.transfer
            .fetch(spec.input, spec.input_len, sources, access)
            .await
            .map(|()| self.staged.store(true, Ordering::Relaxed))
            .map_err(|e| ExecutorFault { reason: format!("input: {e}"), retryable: e.is_retryable() })
    }

    async fn converse(&self, side: &RunSide) -> Result<Executed, ExecutorFault> {
        let broken = |e: &dyn std::fmt::Display| ExecutorFault::passing(format!("attached executor: {e}"));
        let left = self.order.deadline.saturating_duration_since(Instant::now());
        let offer = pb::Offer {
            spec: Some(self.order.spec.to_wire()),
            attempt: self.order.attempt,
            commit_reveal: false,
            stream: self.order.stream,
            inline_input: self.order.inline_input.clone(),
            deadline_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
            validator: self.order.validator.into(),
        };
        let request = self.net.request(self.executor, pb::request::Kind::Offer(offer));
        let first = async {
            let mut responses = request.await?;
            let first = responses.next().await;
            Ok::<_, crate::net::RpcError>((responses, first))
        };
        let (mut responses, first) = tokio::time::timeout(ACCEPT_WITHIN, first)
            .await
            .map_err(|_| ExecutorFault::passing(format!("no answer within {} s", ACCEPT_WITHIN.as_secs())))?
            .map_err(|e| broken(&e))?;
        match first.transpose().map_err(|e| broken(&e))?.and_then(work_event) {
            Some(pb::work_event::Kind::Accepted(_)) => {}
            Some(pb::work_event::Kind::Declined(declined)) => {
                return Err(ExecutorFault::passing(format!("attached executor declined: {}", declined.detail)));
            }
            _ => return Err(ExecutorFault::lasting("attached executor answered neither accepted nor declined")),
        }
        let _ = side.send(ExecutorEvent::Started).await;
        self.follow(&mut responses, side).await
    }

    async fn follow(&self, responses: &mut Responses, side: &RunSide) -> Result<Executed, ExecutorFault> {
        loop {
            let next = responses.next().await;
            let event = match next {
                None => return Err(ExecutorFault::passing("attached executor ended without a result")),
                Some(Err(e)) => return Err(ExecutorFault::passing(format!("attached executor: {e}"))),
                Some(Ok(response)) => work_event(response),
            };
            match event {
                Some(pb::work_event::Kind::Output(output)) => {
                    let event = ExecutorEvent::Output { offset: output.offset, data: output.data };
                    if side.send(event).await.is_err() {
                        return Err(ExecutorFault::passing("not wanted any more"));
                    }
                }
                Some(pb::work_event::Kind::ExecutorResult(result)) => return self.accept(result).await,
                Some(pb::work_event::Kind::Fault(f)) => {
                    return Err(ExecutorFault { reason: f.reason, retryable: f.retryable });
                }
                _ => return Err(ExecutorFault::lasting("attached executor sent what no executor sends")),
            }
        }
    }

    /// Checks what the executor attests, and brings a large output here.
    async fn accept(&self, result: pb::ExecutorResult) -> Result<Executed, ExecutorFault> {
        let wrong = |what: &str| ExecutorFault::lasting(format!("attached executor's result: {what}"));
        let raw = result.attestation.ok_or_else(|| wrong("no attestation"))?;
        let network = self.network;
        let checked = self.workers.run(move || verify_attestation(&network, raw)).await;
        let (attestation, cert) =
            checked.map_err(|e| ExecutorFault::passing(e.to_string()))?.map_err(|e| wrong(&e.to_string()))?;
        if attestation.executor() != self.executor || cert.owner() != self.owner {
            return Err(wrong("signed by another executor, or certified by another owner"));
        }
        let about = (attestation.job, attestation.attempt, attestation.input);
        if about != (self.order.job, self.order.attempt, self.order.spec.input) {
            return Err(wrong("it is about another job, attempt or input"));
        }
        let inline_output = self.output(&attestation, result.inline_output).await?;
        Ok(Executed { attestation, inline_output })
    }

    async fn output(
        &self,
        attestation: &Signed<Attestation>,
        inline: Option<Bytes>,
    ) -> Result<Option<Bytes>, ExecutorFault> {
        let small = attestation.output_len.0 <= limit::INLINE as u64;
        match inline {
            Some(bytes) if small => {
                let same = bytes.len() as u64 == attestation.output_len.0 && BlobId::of(&bytes) == attestation.output;
                same.then_some(Some(bytes)).ok_or_else(|| ExecutorFault::lasting("output is not the attested one"))
            }
            None if !small => {
                let most: ByteCount = self.order.spec.limits.output;
                if attestation.output_len > most {
                    return Err(ExecutorFault::lasting("output is larger than the job's limit"));
                }
                let access = Access::only([Reader::Hotkey(self.order.validator)]);
                let sources = Sources::peers([self.executor]);
                let fetched = self.transfer.fetch(attestation.output, attestation.output_len, sources, access).await;
                fetched.map(|()| None).map_err(|e| ExecutorFault::passing(format!("output: {e}")))
            }
            _ => Err(ExecutorFault::lasting("output is inline where it should be a blob, or the other way round")),
        }
    }
}

fn work_event(response: pb::response::Kind) -> Option<pb::work_event::Kind> {
    match response {
        pb::response::Kind::Work(event) => event.kind,
        _ => None,
    }
}
