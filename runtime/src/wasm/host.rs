//! What a guest sees of the world: nothing of this machine, all of it a function of the job.
//!
//! Owns the state behind both WASI worlds ([`p1`], [`p2`]): virtual clocks, randomness keyed by the job, a read-only
//! tree of files, standard streams, memory limits, and the fuel that host calls cost. Deliberately absent: network,
//! environment variables, arguments beyond a fixed one, writable files, real time.
//!
//! Invariants: no method reads a clock, the host's file metadata or its randomness; everything a guest can observe
//! follows from the request; every host call charges [`CALL_FUEL`] and [`BYTE_FUEL`] a byte it moves, so that work
//! done here is bounded by fuel like work done in wasm. A change of any constant here changes outputs or fuel: raise
//! [`HOST_VERSION`] with it.

use std::sync::Arc;

use bytes::Bytes;
use wasmtime::component::ResourceTable;

use crate::control::RunControl;
use crate::limits::STDERR_TAIL_BYTES;
use crate::outcome::AbortReason;
use crate::output::{OutputSink, OutputWriter, WriteEnd};
use crate::random::Randomness;
use crate::request::ExecutionRequest;
use crate::{RuntimeError, Setup};

pub(crate) mod files;
mod limiter;
pub(crate) mod p1;
pub(crate) mod p2;

pub(crate) use files::Files;
pub(crate) use limiter::Limiter;

/// Version of this host in the environment identity.
pub(crate) const HOST_VERSION: u32 = 1;
/// Base fuel of a host call: crossing into the host takes 50 to 100 ns, which is 200 instructions.
pub(crate) const CALL_FUEL: u64 = 200;
/// Fuel of a byte read, written, hashed or generated: such work runs at 1 to 4 GB/s.
pub(crate) const BYTE_FUEL: u64 = 1;
/// Fuel of looking up one path: allocation and tree walk.
pub(crate) const PATH_FUEL: u64 = 2_000;

/// The wall clock, always: 2026-01-01T00:00:00Z, in seconds. Also the time of every file.
pub(crate) const WALL_CLOCK_S: u64 = 1_767_225_600;
/// What one reading of the monotonic clock advances it by, and its resolution.
pub(crate) const TICK_NS: u64 = 1_000;
/// The monotonic clock at the start of a job: an hour, so that subtracting from it does not underflow. Init starts at
/// zero, so that instants kept in a warm image lie in the past.
const JOB_START_NS: u64 = 3_600_000_000_000;

/// The program's only argument.
pub(crate) const ARGUMENTS: [&str; 1] = ["job"];

/// Why the host ends a run, or refuses a call.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The guest gets an error code.
    Errno(Errno),
    /// The run is over.
    End(Ended),
}

/// What a call can fail with; mapped to the numbers of each world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Errno {
    BadDescriptor,
    Exists,
    BadPointer,
    Invalid,
    IsDirectory,
    TooManyDescriptors,
    NameTooLong,
    NoEntry,
    NotDirectory,
    NotSocket,
    NotSupported,
    NotPermitted,
    ReadOnly,
    NotSeekable,
}

/// Why the host ended a run.
#[derive(Debug)]
pub(crate) enum Ended {
    Exit(i32),
    OutputLimit,
    OutOfFuel,
    /// The guest broke the rules of the interface.
    Misuse,
    Aborted(AbortReason),
    Fault(RuntimeError),
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<Ended> for Fault {
    fn from(ended: Ended) -> Self {
        Self::End(ended)
    }
}

impl From<WriteEnd> for Fault {
    fn from(end: WriteEnd) -> Self {
        Self::End(match end {
            WriteEnd::Limit => Ended::OutputLimit,
            WriteEnd::Stopped(reason) => Ended::Aborted(reason),
        })
    }
}

/// The error that unwinds the guest once [`Host::ended`] says why.
#[derive(Debug, thiserror::Error)]
#[error("the host ended the run")]
pub(crate) struct EndedByHost;

/// Virtual time: the wall stands still, the monotonic clock moves by readings and sleeps alone.
#[derive(Debug)]
pub(crate) struct Clock {
    monotonic_ns: u64,
}

impl Clock {
    /// Reads the monotonic clock, which advances it.
    pub(crate) fn now(&mut self) -> u64 {
        self.monotonic_ns = self.monotonic_ns.saturating_add(TICK_NS);
        self.monotonic_ns
    }

    /// The monotonic clock as it stands.
    pub(crate) fn peek(&self) -> u64 {
        self.monotonic_ns
    }

    /// Sleeps: moves the clock to a moment unless it is past.
    pub(crate) fn sleep_until(&mut self, moment_ns: u64) {
        self.monotonic_ns = self.monotonic_ns.max(moment_ns);
    }
}

/// Standard error: the last bytes.
#[derive(Debug, Default)]
pub(crate) struct Tail(Vec<u8>);

impl Tail {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(STDERR_TAIL_BYTES)..];
        self.0.extend_from_slice(kept);
        if self.0.len() > 2 * STDERR_TAIL_BYTES {
            self.0.drain(..self.0.len() - STDERR_TAIL_BYTES);
        }
    }

    pub(crate) fn take(&mut self) -> Bytes {
        let mut bytes = std::mem::take(&mut self.0);
        Bytes::from(bytes.split_off(bytes.len().saturating_sub(STDERR_TAIL_BYTES)))
    }
}

/// Standard input: bytes known from the start.
#[derive(Debug)]
pub(crate) struct Input(Bytes);

impl Input {
    pub(crate) fn left(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn take(&mut self, most: usize) -> Bytes {
        self.0.split_to(most.min(self.0.len()))
    }
}

/// The state behind one store.
pub(crate) struct Host {
    pub(crate) limiter: Limiter,
    pub(crate) clock: Clock,
    pub(crate) files: Files,
    pub(crate) stdin: Input,
    pub(crate) stdout: OutputWriter,
    pub(crate) stderr: Tail,
    pub(crate) control: Arc<RunControl>,
    /// Set when the host ended the run, before the guest is unwound.
    pub(crate) ended: Option<Ended>,
    pub(crate) p1: p1::State,
    pub(crate) resources: ResourceTable,
    pub(crate) randomness: Randomness,
}

impl Host {
    /// The world of a job.
    pub(crate) fn for_job(request: &ExecutionRequest, output: OutputSink, control: Arc<RunControl>) -> Self {
        let limits = &request.limits;
        Self {
            limiter: Limiter::new(limits.memory_bytes),
            clock: Clock { monotonic_ns: JOB_START_NS },
            files: Files::for_job(Arc::clone(&request.setup), request.params.clone(), request.seed),
            stdin: Input(request.input.clone()),
            stdout: OutputWriter::new(output, limits.output_bytes),
            stderr: Tail::default(),
            control,
            ended: None,
            p1: p1::State::default(),
            resources: p2::resource_table(),
            randomness: Randomness::of_job(request.job_key, request.seed),
        }
    }

    /// The world of an init export: no input, no `/job` files, output thrown away, randomness of the environment.
    pub(crate) fn for_init(setup: &Arc<Setup>, env_id: &[u8; 32], memory_bytes: u64, control: Arc<RunControl>) -> Self {
        Self {
            limiter: Limiter::new(memory_bytes),
            clock: Clock { monotonic_ns: 0 },
            files: Files::for_init(Arc::clone(setup)),
            stdin: Input(Bytes::new()),
            stdout: OutputWriter::new(OutputSink::discard(), u64::MAX),
            stderr: Tail::default(),
            control,
            ended: None,
            p1: p1::State::default(),
            resources: p2::resource_table(),
            randomness: Randomness::of_init(*env_id),
        }
    }

    /// Writes to standard output.
    pub(crate) fn write_stdout(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        Ok(self.stdout.write(bytes, &self.control)?)
    }

    /// Remembers why the run is over and makes the error that unwinds the guest.
    pub(crate) fn end(&mut self, ended: Ended) -> wasmtime::Error {
        self.ended.get_or_insert(ended);
        wasmtime::Error::new(EndedByHost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_bounded_and_keeps_the_end() {
        let mut tail = Tail::default();
        for round in 0..100_u8 {
            tail.push(&[round; 10_000]);
        }
        tail.push(b"end");
        let kept = tail.take();
        assert_eq!(kept.len(), STDERR_TAIL_BYTES);
        assert!(kept.ends_with(b"\x63end"));
    }

    #[test]
    fn time_moves_by_readings_and_sleeps() {
        let mut clock = Clock { monotonic_ns: 0 };
        assert_eq!((clock.now(), clock.now()), (TICK_NS, 2 * TICK_NS));
        clock.sleep_until(1);
        assert_eq!(clock.peek(), 2 * TICK_NS);
        clock.sleep_until(1_000_000);
        assert_eq!(clock.now(), 1_000_000 + TICK_NS);
    }
}
