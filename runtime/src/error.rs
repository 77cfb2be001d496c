//! Faults of this executor, kept apart from faults of the job.
//!
//! Whatever a correct executor would answer too is an [`crate::Outcome`] (a trap, an invalid module, a limit); what
//! only this machine suffers is a [`RuntimeError`], and another executor may well succeed.

use std::sync::Arc;

/// A fault of the executor. The job's own faults are outcomes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The request is malformed in a way its sender should have refused.
    #[error("invalid request: {0}")]
    InvalidRequest(String),
    /// The request asks for more than this executor is configured to give.
    #[error("{limit} of {asked} is above this executor's {allowed}; raise {setting}")]
    LimitTooHigh {
        /// Which limit.
        limit: &'static str,
        /// What the request asks.
        asked: u64,
        /// What is configured.
        allowed: u64,
        /// The setting to change.
        setting: &'static str,
    },
    /// No backend for this kind of job.
    #[error("no runtime for {0:?} jobs on this executor")]
    Unsupported(crate::JobKind),
    /// The builtin job is unknown.
    #[error("no builtin job named {0:?}")]
    UnknownBuiltin(String),
    /// The program's bytes do not have the digest they were asked under.
    #[error("program bytes do not match digest {}", hex(.expected))]
    DigestMismatch {
        /// The digest asked for.
        expected: [u8; 32],
    },
    /// A program or artifact could not be read, or was shorter than at the start of the run.
    #[error("cannot read {what}")]
    Read {
        /// What was read.
        what: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The queue in front of the execution pool is full.
    #[error("{queued} executions are waiting already; raise wasm.queue or add executors")]
    Busy {
        /// How many wait.
        queued: usize,
    },
    /// The engine could not be made or failed for reasons of this machine.
    #[error("wasm engine: {0}")]
    Engine(String),
    /// The program could not be loaded; all that waited for it get the same fault.
    #[error(transparent)]
    Loading(Arc<RuntimeError>),
    /// The runtime is shutting down.
    #[error("the runtime is shutting down")]
    Closed,
}

impl RuntimeError {
    /// Whether the same request may succeed later on this executor.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Busy { .. } => true,
            Self::Loading(fault) => fault.is_retryable(),
            _ => false,
        }
    }
}

/// Lower-case hex of a digest, for messages.
fn hex(digest: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*digest).to_hex().to_string()
}
