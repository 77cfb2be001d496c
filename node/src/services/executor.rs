//! Executor: runs orders inside this node and attests what came of them.
//!
//! Owns the way from an order to a signed attestation: model and input fetched and checked, limits settled, a slot, the
//! run, its output kept, the attestation. Does not own who may order (the `miner`, `audit` and `attached` services), which
//! executor takes an order ([`super::work::pool`]), nor how wasm is run (the runtime crate).
//!
//! ```text
//! Order ─▶ [model][input] ─▶ slot ─▶ run ─▶ output ─▶ sign ─▶ Finished
//!             │      │                │        │        └ no certificate ┐
//!             └──────┴────────────────┴────────┴──────────────────────────▶ Fault
//! ```
//!
//! Invariants: at most `slots` jobs run at once and at most [`HELD_MAX`] orders are held; a job's own failure is an
//! outcome and is attested, a failure of this machine is a fault and is not; what is attested was bounded by the job's and
//! the model's limits alone, never by this node's, so that every honest executor attests the same; a run whose order is
//! dropped stops.

pub(crate) mod attached;
mod models;
mod output;
mod run;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use sundara_proto::crypto::{Context, Network, NodeKeyPair};
use sundara_proto::id::EngineId;
use sundara_proto::job::Limits;
use sundara_proto::units::ByteCount;
use sundara_runtime::{JobKind, RuntimeSet};
use tokio::sync::{Semaphore, mpsc};

use super::work::certs::CertSlot;
use super::work::{Command, ExecutorEvent, ExecutorFault, ExecutorHandle, Misbehaviour, Order, RunSide};
use crate::blobs::{Blobs, TransferHandle};
use crate::service::Tasks;
use crate::services::registry::RegistryHandle;
use models::Models;

/// Orders held at once, running or waiting for model, input or slot. The pool in front asks for far less; this is for
/// whoever goes past it.
const HELD_MAX: usize = 1_024;
/// Slots of a machine that will not say how many cores it has.
const SLOTS_FALLBACK: u32 = 2;

/// How this node executes jobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ExecutorConfig {
    /// Jobs that run at once. Default: 0, one for each core.
    pub slots: u32,
    /// Most that one job may ask for. A job that asks for more is declined; none is run with less than it asks for.
    pub limits: Limits,
    /// Name of this machine's class; jobs may ask for one. Default: `cpu`.
    pub hardware_class: String,
}

impl Default for ExecutorConfig {
    /// Ten stages of verification.md of fuel, 2 GiB, 256 MiB of output (all that the protocol carries), ten minutes.
    fn default() -> Self {
        Self {
            slots: 0,
            limits: Limits {
                fuel: 100_000_000_000,
                memory: ByteCount::gib(2),
                output: Limits::MAX.output,
                wall_ms: 600_000,
            },
            hardware_class: "cpu".to_owned(),
        }
    }
}

impl ExecutorConfig {
    /// Slots, with 0 resolved.
    pub fn slots(&self) -> u32 {
        let cores = || std::thread::available_parallelism().ok().and_then(|n| u32::try_from(n.get()).ok());
        if self.slots == 0 { cores().unwrap_or(SLOTS_FALLBACK) } else { self.slots }
    }
}

/// What the service needs from the rest of the node.
pub(crate) struct ExecutorParts {
    pub(crate) config: ExecutorConfig,
    pub(crate) network: Network,
    /// Signs attestations.
    pub(crate) key: NodeKeyPair,
    /// The owner's word for that key, as it is renewed.
    pub(crate) cert: CertSlot,
    pub(crate) runtime: RuntimeSet,
    pub(crate) registry: RegistryHandle,
    pub(crate) blobs: Blobs,
    pub(crate) transfer: TransferHandle,
    /// For outputs that do not fit into memory; cleared at start.
    pub(crate) scratch: PathBuf,
    /// Lies of a test mesh.
    pub(crate) misbehaviour: Option<Misbehaviour>,
    pub(crate) tasks: Tasks,
}

struct Inner {
    config: ExecutorConfig,
    network: Network,
    key: NodeKeyPair,
    cert: CertSlot,
    runtime: RuntimeSet,
    models: Models,
    blobs: Blobs,
    transfer: TransferHandle,
    scratch: PathBuf,
    misbehaviour: Option<Misbehaviour>,
    slots: Arc<Semaphore>,
    held: AtomicUsize,
}

/// Starts the executor; it ends with its tasks.
///
/// # Errors
/// When the scratch directory cannot be made.
pub(crate) fn start(parts: ExecutorParts) -> std::io::Result<ExecutorHandle> {
    output::clear_scratch(&parts.scratch)?;
    let slots = parts.config.slots();
    let engines: Vec<EngineId> =
        parts.runtime.kinds().first().and_then(|k| engine_of(&parts.runtime, *k)).into_iter().collect();
    let (handle, commands) = ExecutorHandle::channel(slots, engines, &parts.config.hardware_class);
    let inner = Inner {
        models: Models::new(parts.registry, parts.runtime.clone()),
        slots: Arc::new(Semaphore::new(slots as usize)),
        held: AtomicUsize::new(0),
        config: parts.config,
        network: parts.network,
        key: parts.key,
        cert: parts.cert,
        runtime: parts.runtime,
        blobs: parts.blobs,
        transfer: parts.transfer,
        scratch: parts.scratch,
        misbehaviour: parts.misbehaviour,
    };
    let (inner, tasks, token) = (Arc::new(inner), parts.tasks.clone(), parts.tasks.token());
    let warm = inner.clone();
    parts.tasks.spawn("warm", async move {
        tokio::select! {
            () = token.cancelled() => {}
            () = warm.models.keep_warm() => {}
        }
    });
    parts.tasks.spawn("commands", serve(inner, commands, tasks));
    Ok(handle)
}

/// Identity of what an executor runs jobs of `kind` on: one for all of its backends together, because a validator that
/// picks an engine for a job does not know the kinds behind it. `None` when there is no backend for the kind.
pub(crate) fn engine_of(runtime: &RuntimeSet, kind: JobKind) -> Option<EngineId> {
    runtime.get(kind).ok()?;
    let mut backends: Vec<EngineId> =
        runtime.kinds().iter().filter_map(|k| Some(runtime.get(*k).ok()?.engine_id())).collect();
    backends.sort_unstable();
    let fields: Vec<&[u8]> = backends.iter().map(AsRef::as_ref).collect();
    Some(EngineId(Context::ENGINE.digest(&fields).0))
}

async fn serve(inner: Arc<Inner>, mut commands: mpsc::Receiver<Command>, tasks: Tasks) {
    let token = tasks.token();
    loop {
        let command = tokio::select! {
            biased;
            () = token.cancelled() => return,
            command = commands.recv() => command,
        };
        match command {
            None => return,
            Some(Command { order, side }) => inner.clone().on_order(*order, side, &tasks),
        }
    }
}

impl Inner {
    fn on_order(self: Arc<Self>, order: Order, side: RunSide, tasks: &Tasks) {
        if self.held.fetch_add(1, Ordering::Relaxed) >= HELD_MAX {
            self.held.fetch_sub(1, Ordering::Relaxed);
            // The channel is new and has room.
            let fault = ExecutorFault::passing(format!("{HELD_MAX} orders are held already"));
            let _ = side.events.try_send(ExecutorEvent::Fault(fault));
            return;
        }
        let token = tasks.token();
        tasks.spawn("run", async move {
            let held = Held(&self.held);
            let cancel = side.cancel.clone();
            let last = tokio::select! {
                biased;
                () = cancel.cancelled() => None,
                () = token.cancelled() => Some(ExecutorEvent::Fault(ExecutorFault::passing("executor is shut down"))),
                ended = self.execute(&order, &side) => Some(match ended {
                    Ok(executed) => ExecutorEvent::Finished(Box::new(executed)),
                    Err(fault) => ExecutorEvent::Fault(fault),
                }),
            };
            drop(held);
            if let Some(last) = last {
                let kept = kept_output(&last);
                if side.send(last).await.is_err()
                    && let Some(output) = kept
                {
                    // Nobody took charge of it.
                    let _ = self.blobs.remove(output).await;
                }
            }
        });
    }
}

/// The output that lies among the blobs on account of this event.
fn kept_output(event: &ExecutorEvent) -> Option<sundara_proto::id::BlobId> {
    match event {
        ExecutorEvent::Finished(done) if done.inline_output.is_none() => Some(done.attestation.output),
        _ => None,
    }
}

/// Counts an order down when it ends.
struct Held<'a>(&'a AtomicUsize);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
