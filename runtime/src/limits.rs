//! What one execution may use at most: fuel, memory, output bytes and wall time.
//!
//! Owns the limits as values and the defaults with their reasons. Does not enforce them: each backend does, and each
//! limit has an outcome of its own (see [`crate::Outcome`]). Fuel, memory and output are counted, so that two machines
//! stop at the same instruction; wall time is measured, so that a stop by it is never a result.

use std::time::Duration;

/// Default fuel: one stage of a long job (verification.md: about 1e10, at 2-4e9 a second a few seconds of work).
pub const FUEL_DEFAULT: u64 = 10_000_000_000;
/// Default memory cap: room for a 100 MB model with its working set.
pub const MEMORY_BYTES_DEFAULT: u64 = 512 << 20;
/// Default output cap: a result is small, bulk results are asked for in the job.
pub const OUTPUT_BYTES_DEFAULT: u64 = 16 << 20;
/// Default wall limit: ten times what the default fuel takes on a slow machine.
pub const WALL_DEFAULT: Duration = Duration::from_secs(60);
/// Bytes of standard error that are kept (the last ones); outside every digest.
pub const STDERR_TAIL_BYTES: usize = 16 << 10;

/// What one execution may use at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Deterministic work units; a wasm instruction is about one, a host call costs its bytes and a base charge.
    pub fuel: u64,
    /// Bytes of linear memory, all memories of the instance together.
    pub memory_bytes: u64,
    /// Bytes of standard output; the byte after the last one ends the run.
    pub output_bytes: u64,
    /// Wall time from the start of the entry (not of queueing, compiling or initialising).
    pub wall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            fuel: FUEL_DEFAULT,
            memory_bytes: MEMORY_BYTES_DEFAULT,
            output_bytes: OUTPUT_BYTES_DEFAULT,
            wall: WALL_DEFAULT,
        }
    }
}
