//! How a run ended, and what it used.
//!
//! Owns the line between results and non-results. A result (completed, exit code, trap, a counted limit) is the same
//! on every machine of one environment and has a digest. A run that wall time, cancellation or the machine ended has
//! none and counts against reliability only. Codes are stable: they are hashed and go on the wire.

use std::time::Duration;

use bytes::Bytes;

/// Derive context of [`Execution::digest`].
const RESULT_CONTEXT: &str = "sundara-node execution result v1";

/// Why a wasm instruction could not go on. The numbers are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum TrapKind {
    /// An `unreachable` instruction: how Rust and C abort.
    Unreachable = 1,
    /// A load, store or bulk operation outside linear memory.
    MemoryOutOfBounds = 2,
    /// A table access out of bounds.
    TableOutOfBounds = 3,
    /// An indirect call to a null entry.
    IndirectCallToNull = 4,
    /// An indirect call with another signature.
    BadSignature = 5,
    /// An integer overflow (`i32.div_s` of the minimum by -1).
    IntegerOverflow = 6,
    /// A division by zero.
    IntegerDivisionByZero = 7,
    /// A float that does not fit the integer asked for.
    BadConversionToInteger = 8,
    /// A null reference.
    NullReference = 9,
    /// The guest handed the host a pointer or handle that is not its own, or called an interface that does not exist.
    HostCall = 10,
    /// Any other trap that wasm defines.
    Other = 255,
}

/// What is wrong with a program that validates on no machine of this environment. The numbers are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum InvalidModule {
    /// Not valid wasm under the enabled features.
    Malformed = 1,
    /// An import that the host does not provide.
    UnknownImport = 2,
    /// No such entry or init export, or one with another signature.
    NoEntry = 3,
    /// More memories, tables, instances or bytes than the environment allows.
    TooLarge = 4,
    /// A component with an init export whose memory cannot be snapshot.
    NoSnapshot = 5,
}

/// How the init export failed. The numbers are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum InitFault {
    /// It trapped.
    Trap = 1,
    /// It called `proc_exit`.
    Exit = 2,
    /// It used up its own fuel.
    OutOfFuel = 3,
    /// It ran into the memory limit.
    MemoryLimit = 4,
}

/// Why a run was stopped from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AbortReason {
    /// The wall limit.
    WallClock,
    /// The caller cancelled, or dropped the run.
    Cancelled,
}

/// Why a run ended in a way that differs between machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IndeterminateReason {
    /// The native stack overflowed; its depth is the machine's.
    StackOverflow,
    /// Valid wasm that this machine's compiler could not compile.
    Compile,
    /// The operating system refused memory within the limits.
    HostMemory,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// The entry returned, or exited with code 0.
    Completed,
    /// The guest exited with another code.
    ExitCode(i32),
    /// The guest trapped.
    Trap(TrapKind),
    /// The fuel limit.
    OutOfFuel,
    /// The memory limit: a growth was refused and the guest did not recover, or the module starts above it.
    MemoryLimit,
    /// The output limit; exactly `limits.output_bytes` were delivered.
    OutputLimit,
    /// The program is not one that this environment runs.
    InvalidModule(InvalidModule),
    /// The init export failed.
    InitFailed(InitFault),
    /// Stopped from outside. No result.
    Aborted(AbortReason),
    /// Ended by a property of the machine. No result.
    Indeterminate(IndeterminateReason),
}

impl Outcome {
    /// Whether every machine of the environment ends this way, so that the run has a digest.
    pub fn is_result(&self) -> bool {
        !matches!(self, Self::Aborted(_) | Self::Indeterminate(_))
    }

    /// Stable class and detail of a result, `None` where there is none. What [`Execution::digest`] hashes.
    pub fn code(&self) -> Option<(u8, i32)> {
        match *self {
            Self::Completed => Some((0, 0)),
            Self::ExitCode(code) => Some((1, code)),
            Self::Trap(kind) => Some((2, kind as i32)),
            Self::OutOfFuel => Some((3, 0)),
            Self::MemoryLimit => Some((4, 0)),
            Self::OutputLimit => Some((5, 0)),
            Self::InvalidModule(what) => Some((6, what as i32)),
            Self::InitFailed(fault) => Some((7, fault as i32)),
            Self::Aborted(_) | Self::Indeterminate(_) => None,
        }
    }
}

/// What a run used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Fuel of the entry alone (never of init); equal on every machine.
    pub fuel: u64,
    /// Peak bytes of linear memory; equal on every machine.
    pub peak_memory_bytes: u64,
    /// Wall time of the entry. Differs between machines.
    pub wall: Duration,
    /// Bytes of standard output.
    pub output_bytes: u64,
}

/// The result of [`crate::JobRuntime::run`].
#[derive(Clone, Debug)]
pub struct Execution {
    /// How it ended.
    pub outcome: Outcome,
    /// BLAKE3 of the whole standard output; `None` when the outcome is no result.
    pub output_digest: Option<[u8; 32]>,
    /// What it used.
    pub usage: Usage,
    /// The last bytes of standard error, and the runtime's own words on a fault. Outside every digest.
    pub stderr_tail: Bytes,
}

impl Execution {
    /// A run that was stopped before it began.
    pub(crate) fn never_started(reason: AbortReason) -> Self {
        Self {
            outcome: Outcome::Aborted(reason),
            output_digest: None,
            usage: Usage::default(),
            stderr_tail: Bytes::new(),
        }
    }

    /// Digest over outcome, output length and output digest, which replicas compare; `None` where there is no result.
    pub fn digest(&self) -> Option<[u8; 32]> {
        let (class, detail) = self.outcome.code()?;
        let output = self.output_digest?;
        let mut hasher = blake3::Hasher::new_derive_key(RESULT_CONTEXT);
        hasher.update(&[class]);
        hasher.update(&detail.to_le_bytes());
        hasher.update(&self.usage.output_bytes.to_le_bytes());
        hasher.update(&output);
        Some(*hasher.finalize().as_bytes())
    }
}
