//! One order from start to attestation.

use bytes::Bytes;
use sundara_proto::attestation::{Attestation, Outcome, Usage};
use sundara_proto::crypto::Signed;
use sundara_proto::id::BlobId;
use sundara_proto::job::{Limits, Program};
use sundara_proto::units::{ByteCount, UnixMillis};
use sundara_runtime::{self as runtime, Execution, ExecutionRequest, OutputSink};

use super::Inner;
use super::models::{Ready, fault, runtime_limits};
use super::output::{Whole, gather, store};
use crate::blobs::{Access, Sources};
use crate::service::wall_now;
use crate::services::work::{Executed, ExecutorEvent, ExecutorFault, Misbehaviour, Order, RunSide};

/// What a run came to, before it is signed.
struct Ran {
    outcome: Outcome,
    output: BlobId,
    output_len: ByteCount,
    usage: Usage,
    started_at: UnixMillis,
    finished_at: UnixMillis,
    whole: Whole,
}

impl Inner {
    /// Runs an order to its attestation. Dropping the future stops the job.
    pub(super) async fn execute(&self, order: &Order, side: &RunSide) -> Result<Executed, ExecutorFault> {
        let within = tokio::time::timeout_at(order.deadline, self.execute_in_time(order, side)).await;
        within.map_err(|_| ExecutorFault::passing("the order's deadline passed before the job ended"))?
    }

    async fn execute_in_time(&self, order: &Order, side: &RunSide) -> Result<Executed, ExecutorFault> {
        let ready = self.models.of(&order.spec, &order.sources).await?;
        let limits = self.settle_limits(&order.spec.limits, ready.limits.as_ref())?;
        let input = self.input(order).await?;
        let slot = self.slots.acquire().await.map_err(|_| ExecutorFault::passing("executor is shut down"))?;
        let _ = side.send(ExecutorEvent::Started).await;
        let ran = match self.misbehaviour {
            Some(Misbehaviour::Collude) => colluded(order),
            _ => self.run(order, &ready, limits, input, side).await?,
        };
        drop(slot);
        let ran = if self.misbehaviour == Some(Misbehaviour::WrongResult) { falsified(ran) } else { ran };
        self.attest(order, &ready, ran).await
    }

    /// What the run is bounded by: the job's and the model's limits. This node's own only say whether it runs at all,
    /// since a result that depended on them would differ from node to node; wall time is no part of a result.
    fn settle_limits(&self, job: &Limits, model: Option<&Limits>) -> Result<Limits, ExecutorFault> {
        let wanted = model.map_or(*job, |model| job.min(model));
        let ours = &self.config.limits;
        for (what, asked, allowed) in [
            ("fuel", wanted.fuel, ours.fuel),
            ("memory", wanted.memory.0, ours.memory.0),
            ("output", wanted.output.0, ours.output.0),
        ] {
            if asked > allowed {
                let text = format!("{what} limit {asked} is above executor.limits.{what} = {allowed}");
                return Err(ExecutorFault::lasting(text));
            }
        }
        Ok(Limits { wall_ms: wanted.wall_ms.min(ours.wall_ms), ..wanted })
    }

    async fn input(&self, order: &Order) -> Result<Bytes, ExecutorFault> {
        let spec = &order.spec;
        let bytes = match &order.inline_input {
            Some(bytes) => bytes.clone(),
            None if spec.input_len.0 == 0 => Bytes::new(),
            None => {
                let sources = Sources::peers(order.sources.iter().copied());
                let fetched = self.transfer.fetch(spec.input, spec.input_len, sources, Access::local()).await;
                fetched.map_err(|e| ExecutorFault { reason: format!("input: {e}"), retryable: e.is_retryable() })?;
                let bytes = self.blobs.get(spec.input, spec.input_len).await;
                let _ = self.blobs.remove(spec.input).await;
                // Hashed by the store.
                return bytes.map_err(|e| store(&e));
            }
        };
        if bytes.len() as u64 != spec.input_len.0 || BlobId::of(&bytes) != spec.input {
            return Err(ExecutorFault::lasting("the input that came with the order is not the one that the job names"));
        }
        Ok(bytes)
    }

    async fn run(
        &self,
        order: &Order,
        ready: &Ready,
        limits: Limits,
        input: Bytes,
        side: &RunSide,
    ) -> Result<Ran, ExecutorFault> {
        let spec = &order.spec;
        let entry = match &spec.program {
            Program::Model { entry, .. } if !entry.is_empty() => entry.clone(),
            _ => ready.entry.clone(),
        };
        let request = ExecutionRequest {
            entry,
            params: spec.params.clone(),
            seed: spec.seed,
            job_key: order.job.randomness_key(),
            limits: runtime_limits(&limits),
            ..ExecutionRequest::new(ready.setup.clone(), input)
        };
        let (sink, stream) = OutputSink::channel();
        let started_at = wall_now();
        let (ended, whole) = tokio::join!(
            self.runtime.run(request, sink, side.cancel.clone()),
            gather(stream, &self.scratch, order.stream.then_some(side)),
        );
        let execution = ended.map_err(|e| {
            if let (runtime::RuntimeError::Read { .. }, Program::Model { model, .. }) = (&e, &spec.program) {
                self.models.forget(model);
            }
            fault(&e)
        })?;
        Ok(settled(&execution, whole?, started_at))
    }

    async fn attest(&self, order: &Order, ready: &Ready, ran: Ran) -> Result<Executed, ExecutorFault> {
        let cert = self.cert.borrow().clone();
        let cert = cert.ok_or_else(|| ExecutorFault::passing("this executor has no certificate of its owner yet"))?;
        if cert.expires_at < ran.started_at {
            return Err(ExecutorFault::passing("the owner's certificate for this executor has expired"));
        }
        let attestation = Attestation {
            job: order.job,
            attempt: order.attempt,
            env_id: ready.env_id,
            input: order.spec.input,
            outcome: ran.outcome,
            output: ran.output,
            output_len: ran.output_len,
            usage: ran.usage,
            executor_cert: cert.to_wire(),
            started_at: ran.started_at,
            finished_at: ran.finished_at,
        };
        let inline_output = ran.whole.keep(&self.blobs, order.validator, ran.output).await?;
        Ok(Executed { attestation: Signed::sign(&self.network, &self.key, attestation), inline_output })
    }
}

fn settled(execution: &Execution, whole: Whole, started_at: UnixMillis) -> Ran {
    let outcome = outcome_of(execution.outcome);
    let digest = execution.output_digest.filter(|_| outcome.is_result());
    let (output, output_len, whole) = match digest {
        Some(digest) => (BlobId(digest), ByteCount(execution.usage.output_bytes), whole),
        None => (BlobId::of(b""), ByteCount(0), Whole::Small(Bytes::new())),
    };
    let usage = Usage {
        fuel: execution.usage.fuel,
        peak_memory: ByteCount(execution.usage.peak_memory_bytes),
        wall_us: u64::try_from(execution.usage.wall.as_micros()).unwrap_or(u64::MAX),
    };
    Ran { outcome, output, output_len, usage, started_at, finished_at: wall_now().max(started_at), whole }
}

/// The runtime's word for an end as it goes on the wire. A model whose init export fails is no model that can be run.
fn outcome_of(outcome: runtime::Outcome) -> Outcome {
    use runtime::Outcome as R;
    match outcome {
        R::Completed => Outcome::Completed,
        R::ExitCode(code) => Outcome::ExitCode(code),
        R::Trap(kind) => Outcome::Trap(kind as i32),
        R::OutOfFuel => Outcome::OutOfFuel,
        R::MemoryLimit => Outcome::MemoryLimit,
        R::OutputLimit => Outcome::OutputLimit,
        R::InvalidModule(_) | R::InitFailed(_) => Outcome::InvalidModule,
        R::Aborted(_) => Outcome::Aborted,
        // Also whatever a later runtime adds: without a meaning on the wire it is no result.
        _ => Outcome::Indeterminate,
    }
}

/// Another output than the job had: [`Misbehaviour::WrongResult`].
fn falsified(ran: Ran) -> Ran {
    let mut bytes = ran.whole.small().map(|b| b.to_vec()).unwrap_or_default();
    match bytes.last_mut() {
        Some(last) => *last ^= 1,
        None => bytes.push(b'!'),
    }
    with_output(ran, bytes)
}

/// An answer that needs no work and no agreement beforehand: [`Misbehaviour::Collude`].
fn colluded(order: &Order) -> Ran {
    let now = wall_now();
    let ran = Ran {
        outcome: Outcome::Completed,
        output: BlobId::of(b""),
        output_len: ByteCount(0),
        usage: Usage { fuel: 1_000, ..Usage::default() },
        started_at: now,
        finished_at: now,
        whole: Whole::Small(Bytes::new()),
    };
    with_output(ran, format!("agreed on {}", order.job).into_bytes())
}

fn with_output(ran: Ran, bytes: Vec<u8>) -> Ran {
    Ran {
        outcome: Outcome::Completed,
        output: BlobId::of(&bytes),
        output_len: ByteCount(bytes.len() as u64),
        whole: Whole::Small(bytes.into()),
        ..ran
    }
}
