//! Runs untrusted jobs: deterministic wasm, builtin reference jobs, limits, warm images.
//!
//! Owns execution and nothing else: no network, no store, no signatures, no scheduling. A caller hands over an
//! [`ExecutionRequest`], receives standard output as it comes through an [`OutputSink`], and gets an [`Execution`]:
//! how the run ended, the digest of its output and what it used.
//!
//! Invariants: a run whose [`Outcome`] is a result has the same output, outcome and fuel on every machine of one
//! environment ([`JobRuntime::env_id`]); a run that wall time, cancellation or the machine ended has no digest; a
//! fault of this executor is a [`RuntimeError`], never an outcome. Work that takes the processor runs on the backend's
//! own bounded threads, never on the caller's async executor.
//!
//! ```no_run
//! # async fn example() -> Result<(), sundara_runtime::RuntimeError> {
//! use std::sync::Arc;
//! use sundara_runtime::{BuiltinRuntime, ExecutionRequest, Setup, collect};
//! let request = ExecutionRequest::new(Arc::new(Setup::builtin("echo")), "hello");
//! let (execution, output) = collect(&BuiltinRuntime::new(), request, Default::default()).await?;
//! assert_eq!((&output[..], execution.usage.output_bytes), (&b"hello"[..], 5));
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use sundara_proto::id::EngineId;
use tokio_util::sync::CancellationToken;

pub mod builtin;
mod control;
mod env;
mod error;
pub mod limits;
mod outcome;
mod output;
mod pool;
mod random;
mod request;
mod set;
pub mod wasm;
mod watchdog;

pub use builtin::BuiltinRuntime;
pub use env::Environment;
pub use error::RuntimeError;
pub use limits::Limits;
pub use outcome::{AbortReason, Execution, IndeterminateReason, InitFault, InvalidModule, Outcome, TrapKind, Usage};
pub use output::{OUTPUT_CHUNK_BYTES_MAX, OUTPUT_CHUNKS_MAX, OutputSink, OutputStream};
pub use request::{
    ARTIFACT_NAME_BYTES_MAX, ARTIFACTS_MAX, Artifact, ENTRY_DEFAULT, ExecutionRequest, JobKind, ModuleBytes,
    ModuleSource, Program, Setup,
};
pub use set::RuntimeSet;
pub use wasm::{WasmConfig, WasmRuntime, WasmTarget};

/// One backend.
#[async_trait]
pub trait JobRuntime: Send + Sync {
    /// The kind of job it runs.
    fn kind(&self) -> JobKind;

    /// Compiles the program and makes its warm image ahead of the first job; [`Self::run`] does it otherwise.
    ///
    /// A program that no machine can run is not an error here: `run` answers with the outcome. Cancel safe: work
    /// already begun finishes and is kept.
    ///
    /// # Errors
    /// Faults of this executor only.
    async fn prepare(&self, setup: &Arc<Setup>, limits: &Limits) -> Result<(), RuntimeError>;

    /// Runs one job to its end.
    ///
    /// Standard output goes to `output` while the job runs; a full channel holds the job back (wall time runs on).
    /// Cancelling `cancel`, or dropping the future, stops the job at its next loop iteration, call or host call.
    ///
    /// # Errors
    /// Faults of this executor only; the job's own are in [`Execution::outcome`].
    async fn run(
        &self,
        request: ExecutionRequest,
        output: OutputSink,
        cancel: CancellationToken,
    ) -> Result<Execution, RuntimeError>;

    /// Identity of the engine: its version, and every flag that can change a result.
    fn engine_id(&self) -> EngineId;

    /// Identity of the environment that a program runs in here.
    fn env_id(&self, environment: &Environment) -> [u8; 32] {
        environment.env_id(&self.engine_id()).0
    }
}

/// Runs one job and gathers its output, at most `limits.output_bytes` of it.
///
/// # Errors
/// As [`JobRuntime::run`].
pub async fn collect(
    runtime: &dyn JobRuntime,
    request: ExecutionRequest,
    cancel: CancellationToken,
) -> Result<(Execution, Bytes), RuntimeError> {
    let (sink, mut stream) = OutputSink::channel();
    let gather = async {
        let mut whole = BytesMut::new();
        while let Some(chunk) = stream.recv().await {
            whole.extend_from_slice(&chunk);
        }
        whole.freeze()
    };
    let (execution, output) = tokio::join!(runtime.run(request, sink, cancel), gather);
    Ok((execution?, output))
}
