//! Work: what a miner or an auditor hands to an executor, and what comes back.
//!
//! Owns the order and its events, the channel to the executor inside this node ([`ExecutorHandle`]), the pool of all
//! executors that this node owns ([`pool`]) and their certificates ([`certs`]). Runs nothing by itself: the services
//! `executor` (runs jobs), `executors` (attaches processes), `miner` and `audit` meet here and never import one another.
//!
//! ```text
//! miner ──┐                        ┌── ExecutorHandle ─▶ executor (this process)
//!         ├─ Order ─▶ Pool ─ picks ┤
//! audit ──┘                        └── Offer over /rpc ─▶ executor (attached process)
//!         ◀── ExecutorEvent* ──────
//! ```
//!
//! Invariants: an order ends with exactly one of `Finished` and `Fault`, or with a closed channel when its [`Run`] was
//! dropped, which stops the work; a fault is the executor's and says nothing about the job; the events that wait are
//! bounded, so that a slow reader holds the job back.

pub(crate) mod certs;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod harness;
pub(crate) mod invite;
pub(crate) mod pool;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sundara_proto::attestation::Attestation;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{BlobId, EngineId, Hotkey, JobId, NodeId};
use sundara_proto::job::JobSpec;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::blobs::Blobs;

/// Events of one run that wait for its reader: with chunks of 64 KiB, 1 MiB a job.
pub(crate) const EVENTS_QUEUED_MAX: usize = 16;
/// Orders on their way to the executor inside this node. More run at once on no machine that we know.
const ORDERS_QUEUED_MAX: usize = 1_024;

/// One execution that is wanted.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    /// Digest of the spec as signed.
    pub(crate) job: JobId,
    /// Verified by whoever took it from the wire.
    pub(crate) spec: Arc<Signed<JobSpec>>,
    /// Which attempt is attested.
    pub(crate) attempt: u32,
    /// The whole input when it is small; else it is fetched by digest from `sources`.
    pub(crate) inline_input: Option<Bytes>,
    /// Output is wanted while it is made.
    pub(crate) stream: bool,
    /// Nodes that have the input and, probably, the model.
    pub(crate) sources: Vec<NodeId>,
    /// Whose work it is; may read the output.
    pub(crate) validator: Hotkey,
    /// After this nobody wants the result.
    pub(crate) deadline: Instant,
}

/// What an executor says of an order.
#[derive(Debug)]
pub(crate) enum ExecutorEvent {
    /// Model and input are here and the job has a slot.
    Started,
    /// The next piece of output. Offsets rise without gaps.
    Output {
        /// Place in the output.
        offset: u64,
        /// At most 64 KiB.
        data: Bytes,
    },
    /// The last event: the job came to an end of its own.
    Finished(Box<Executed>),
    /// The last event: this executor could not run it.
    Fault(ExecutorFault),
}

/// An executor's attested result.
#[derive(Clone, Debug)]
pub(crate) struct Executed {
    /// Signed by the executor; its signature is good and it is about this order.
    pub(crate) attestation: Signed<Attestation>,
    /// The whole output when it is small; else it lies in this node's blobs under the attested digest.
    pub(crate) inline_output: Option<Bytes>,
}

/// Why an executor did not run a job. Never the job's own fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub(crate) struct ExecutorFault {
    /// Names the setting to change where there is one.
    pub(crate) reason: String,
    /// The same executor may do it later.
    pub(crate) retryable: bool,
}

impl ExecutorFault {
    /// The same executor may do it later.
    pub(crate) fn passing(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), retryable: true }
    }

    /// This executor will not do it as it is configured.
    pub(crate) fn lasting(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), retryable: false }
    }
}

/// A run as its owner holds it. Dropping it stops the work.
#[derive(Debug)]
pub(crate) struct Run {
    events: mpsc::Receiver<ExecutorEvent>,
    _cancel: DropGuard,
}

/// A run as its executor holds it.
#[derive(Debug)]
pub(crate) struct RunSide {
    /// Where the events go; full means that the reader lags.
    pub(crate) events: mpsc::Sender<ExecutorEvent>,
    /// Cancelled when nobody wants the result.
    pub(crate) cancel: CancellationToken,
}

impl Run {
    /// A run and its executor's side.
    pub(crate) fn pair() -> (Self, RunSide) {
        let (tx, events) = mpsc::channel(EVENTS_QUEUED_MAX);
        let cancel = CancellationToken::new();
        (Self { events, _cancel: cancel.clone().drop_guard() }, RunSide { events: tx, cancel })
    }

    /// The next event; `None` after the last, or when the executor vanished. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<ExecutorEvent> {
        self.events.recv().await
    }
}

impl RunSide {
    /// Passes an event on; fails when nobody wants it any more.
    pub(crate) async fn send(&self, event: ExecutorEvent) -> Result<(), Unwanted> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(Unwanted),
            sent = self.events.send(event) => sent.map_err(|_| Unwanted),
        }
    }
}

/// The reader of a run is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unwanted;

/// An order on its way to the executor inside this node.
#[derive(Debug)]
pub(crate) struct Command {
    /// What to run.
    pub(crate) order: Box<Order>,
    /// Where the events go.
    pub(crate) side: RunSide,
}

/// The executor inside this node. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct ExecutorHandle {
    commands: mpsc::Sender<Command>,
    /// Jobs that run at once.
    pub(crate) slots: u32,
    /// What it runs them on.
    pub(crate) engines: Arc<[EngineId]>,
    /// Name of its class.
    pub(crate) hardware_class: Arc<str>,
}

impl ExecutorHandle {
    /// A handle, and where its commands come out.
    pub(crate) fn channel(slots: u32, engines: Vec<EngineId>, hardware_class: &str) -> (Self, mpsc::Receiver<Command>) {
        let (commands, rx) = mpsc::channel(ORDERS_QUEUED_MAX);
        (Self { commands, slots, engines: engines.into(), hardware_class: hardware_class.into() }, rx)
    }

    /// Runs an order. What goes wrong on the way comes as a fault.
    pub(crate) fn run(&self, order: Order) -> Run {
        let (run, side) = Run::pair();
        if let Err(refused) = self.commands.try_send(Command { order: Box::new(order), side }) {
            let reason = match refused {
                mpsc::error::TrySendError::Full(_) => "the executor's queue is full",
                mpsc::error::TrySendError::Closed(_) => "the executor is shut down",
            };
            let side = refused.into_inner().side;
            // The channel is new and has room.
            let _ = side.events.try_send(ExecutorEvent::Fault(ExecutorFault::passing(reason)));
        }
        run
    }
}

/// Large outputs that wait for their removal. Beyond it the blob store's own age limit removes them.
pub(crate) const OUTPUTS_KEPT_MAX: usize = 4_096;

/// Takes back one use of each blob, `after` it was named: outputs stay for a while for whoever fetches them.
pub(crate) async fn forget_outputs(
    blobs: Blobs,
    mut made: mpsc::Receiver<BlobId>,
    after: Duration,
    token: CancellationToken,
) {
    let mut kept: VecDeque<(Instant, BlobId)> = VecDeque::new();
    loop {
        let due = kept.front().map(|(at, _)| *at);
        tokio::select! {
            biased;
            () = token.cancelled() => return,
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                if let Some((_, blob)) = kept.pop_front() {
                    let _ = blobs.remove(blob).await;
                }
            }
            blob = made.recv(), if kept.len() < OUTPUTS_KEPT_MAX => match blob {
                Some(blob) => kept.push_back((Instant::now() + after, blob)),
                None => return,
            },
        }
    }
}

/// How a dishonest miner lies. Exists so that a test mesh can show that it is caught; no flag and no configuration file
/// can set it, only code that builds a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Misbehaviour {
    /// Runs the job and attests another output than it had.
    WrongResult,
    /// Commits to nonsense without running the job, asks other miners for their answer, and reveals the right one late.
    Copy,
    /// Commits and never reveals; without commitments, accepts and never answers.
    Withhold,
    /// Attests an answer that all who collude derive from the job's id, so that they agree with each other.
    Collude,
}

impl Misbehaviour {
    /// The order in which a test mesh hands them out.
    pub const ROTATION: [Self; 4] = [Self::WrongResult, Self::Copy, Self::Withhold, Self::Collude];
}
