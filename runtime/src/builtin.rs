//! Reference jobs compiled into the crate: for tests of everything above the runtime, with the same limits, streaming
//! and outcomes as wasm.
//!
//! Owns the jobs of [`JOBS`] and their fuel rule: one unit a byte read, written or allocated and one a step, so that
//! two machines agree. Not a sandbox: the code is ours.

use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use rand_chacha::rand_core::Rng;
use sundara_proto::id::EngineId;
use tokio_util::sync::CancellationToken;

use crate::control::{RunControl, drive};
use crate::env::EngineIdentity;
use crate::outcome::{Execution, Outcome, TrapKind, Usage};
use crate::output::{OutputWriter, WriteEnd};
use crate::pool::Pool;
use crate::watchdog::Watchdog;
use crate::{ExecutionRequest, JobKind, JobRuntime, Limits, OutputSink, Program, RuntimeError, Setup, random};

/// The jobs. Each reads `input`, `params`, `seed` and `/model` as a wasm guest would.
///
/// | name | does |
/// | --- | --- |
/// | `echo` | writes its input |
/// | `blake3` | writes the lower-case hex BLAKE3 of its input |
/// | `params` | writes its parameters |
/// | `seed` | writes the seed in decimal |
/// | `random` | writes as many random bytes as the parameters say in decimal |
/// | `model` | writes the artifact that the parameters name |
/// | `stderr` | writes its input to standard error |
/// | `exit` | ends with the exit code that the parameters say in decimal |
/// | `trap` | traps |
/// | `spin` | burns fuel for ever |
/// | `flood` | writes zeros for ever |
/// | `alloc` | allocates for ever |
/// | `sleep` | waits until it is stopped |
pub const JOBS: [&str; 13] = [
    "echo", "blake3", "params", "seed", "random", "model", "stderr", "exit", "trap", "spin", "flood", "alloc", "sleep",
];

const IDENTITY: EngineIdentity<'static> = EngineIdentity { flags: "builtin/1", version: env!("CARGO_PKG_VERSION") };
/// Fuel and bytes of one step of the endless jobs.
const STEP: usize = 64 << 10;
/// Callers that may wait for a worker: far above any testnet's burst.
const QUEUE_MAX: usize = 4_096;

/// Runs the reference jobs.
pub struct BuiltinRuntime {
    pool: Pool,
    watchdog: Arc<Watchdog>,
}

impl Default for BuiltinRuntime {
    fn default() -> Self {
        Self::new()
    }
}

impl BuiltinRuntime {
    /// A runtime with one worker a processor.
    pub fn new() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { pool: Pool::new("builtin", threads, QUEUE_MAX), watchdog: Watchdog::new(|| ()) }
    }
}

#[async_trait]
impl JobRuntime for BuiltinRuntime {
    fn kind(&self) -> JobKind {
        JobKind::Builtin
    }

    async fn prepare(&self, setup: &Arc<Setup>, _limits: &Limits) -> Result<(), RuntimeError> {
        setup.validate()?;
        job_name(setup).map(|_| ())
    }

    async fn run(
        &self,
        request: ExecutionRequest,
        output: OutputSink,
        cancel: CancellationToken,
    ) -> Result<Execution, RuntimeError> {
        request.setup.validate()?;
        job_name(&request.setup)?;
        let control = Arc::new(RunControl::default());
        let slot = tokio::select! {
            slot = self.pool.slot() => slot?,
            () = cancel.cancelled() => return Ok(Execution::never_started(crate::AbortReason::Cancelled)),
        };
        let mut job = Job {
            writer: OutputWriter::new(output, request.limits.output_bytes),
            control: Arc::clone(&control),
            stderr: Vec::new(),
            fuel: 0,
            memory: 0,
            request,
        };
        let watchdog = Arc::clone(&self.watchdog);
        let work = slot.run(move || {
            let _deadline = watchdog.guard(job.request.limits.wall, &job.control);
            (job.execute(), ())
        });
        drive(&control, &cancel, || (), work).await?
    }

    fn engine_id(&self) -> EngineId {
        IDENTITY.id()
    }
}

fn job_name(setup: &Setup) -> Result<&str, RuntimeError> {
    match &setup.program {
        Program::Builtin { name } if JOBS.contains(&name.as_str()) => Ok(name),
        Program::Builtin { name } => Err(RuntimeError::UnknownBuiltin(name.clone())),
        Program::Wasm(_) => Err(RuntimeError::Unsupported(JobKind::Wasm)),
    }
}

/// Why a job ended early.
enum End {
    Outcome(Outcome),
    Fault(RuntimeError),
}

impl From<WriteEnd> for End {
    fn from(end: WriteEnd) -> Self {
        Self::Outcome(match end {
            WriteEnd::Limit => Outcome::OutputLimit,
            WriteEnd::Stopped(reason) => Outcome::Aborted(reason),
        })
    }
}

struct Job {
    request: ExecutionRequest,
    writer: OutputWriter,
    control: Arc<RunControl>,
    stderr: Vec<u8>,
    fuel: u64,
    memory: u64,
}

impl Job {
    fn execute(&mut self) -> Result<Execution, RuntimeError> {
        let start = Instant::now();
        let mut outcome = match self.body() {
            Ok(()) => Outcome::Completed,
            Err(End::Outcome(outcome)) => outcome,
            Err(End::Fault(fault)) => return Err(fault),
        };
        if outcome.is_result()
            && let Err(WriteEnd::Stopped(reason)) = self.writer.finish(&self.control)
        {
            outcome = Outcome::Aborted(reason);
        }
        let usage = Usage {
            fuel: self.fuel,
            peak_memory_bytes: self.memory,
            wall: start.elapsed(),
            output_bytes: self.writer.written(),
        };
        let tail = self.stderr.len().saturating_sub(crate::limits::STDERR_TAIL_BYTES);
        Ok(Execution {
            outcome,
            output_digest: outcome.is_result().then(|| self.writer.digest()),
            usage,
            stderr_tail: Bytes::from(self.stderr.split_off(tail)),
        })
    }

    /// Charges fuel, and notices a stop.
    fn burn(&mut self, units: usize) -> Result<(), End> {
        if let Some(reason) = self.control.stopped() {
            return Err(End::Outcome(Outcome::Aborted(reason)));
        }
        self.fuel = self.fuel.saturating_add(units as u64);
        if self.fuel > self.request.limits.fuel {
            self.fuel = self.request.limits.fuel;
            return Err(End::Outcome(Outcome::OutOfFuel));
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.burn(bytes.len())?;
        Ok(self.writer.write(bytes, &self.control)?)
    }

    fn body(&mut self) -> Result<(), End> {
        self.burn(1)?;
        let input = self.request.input.clone();
        let name = job_name(&self.request.setup).map_err(End::Fault)?.to_owned();
        match name.as_str() {
            "echo" => self.write(&input),
            "blake3" => {
                self.burn(input.len())?;
                self.write(blake3::hash(&input).to_hex().as_bytes())
            }
            "params" => self.write(&self.request.params.clone()),
            "seed" => self.write(self.request.seed.to_string().as_bytes()),
            "random" => self.random(),
            "model" => self.model(),
            "stderr" => {
                self.stderr.extend_from_slice(&input);
                self.burn(input.len())
            }
            "exit" => match self.number::<i32>()? {
                0 => Ok(()),
                code => Err(End::Outcome(Outcome::ExitCode(code))),
            },
            "spin" => loop {
                self.burn(STEP)?;
            },
            "flood" => loop {
                self.write(&[0; STEP])?;
            },
            "alloc" => self.alloc(),
            "sleep" => match self.control.wait(std::future::pending::<()>()) {
                Ok(()) => Ok(()),
                Err(reason) => Err(End::Outcome(Outcome::Aborted(reason))),
            },
            _ => Err(End::Outcome(Outcome::Trap(TrapKind::Unreachable))),
        }
    }

    /// The parameters as a decimal number; a trap when they are none.
    fn number<N: std::str::FromStr>(&self) -> Result<N, End> {
        std::str::from_utf8(&self.request.params)
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or(End::Outcome(Outcome::Trap(TrapKind::Unreachable)))
    }

    fn random(&mut self) -> Result<(), End> {
        let mut left: usize = self.number()?;
        let mut stream = random::job_stream(&self.request.job_key, self.request.seed);
        let mut block = [0; STEP];
        while left > 0 {
            let part = left.min(STEP);
            stream.fill_bytes(&mut block[..part]);
            self.write(&block[..part])?;
            left -= part;
        }
        Ok(())
    }

    fn model(&mut self) -> Result<(), End> {
        let setup = Arc::clone(&self.request.setup);
        let params = self.request.params.clone();
        let Some(artifact) = setup.artifacts.iter().find(|artifact| artifact.name.as_bytes() == &params[..]) else {
            return Err(End::Outcome(Outcome::ExitCode(1)));
        };
        let fault = |source| End::Fault(RuntimeError::Read { what: format!("artifact {}", artifact.name), source });
        let mut file = std::fs::File::open(&artifact.path).map_err(fault)?;
        let mut block = vec![0; STEP];
        loop {
            match file.read(&mut block).map_err(fault)? {
                0 => return Ok(()),
                count => self.write(&block[..count])?,
            }
        }
    }

    fn alloc(&mut self) -> Result<(), End> {
        let mut held = Vec::new();
        loop {
            if self.memory + STEP as u64 > self.request.limits.memory_bytes {
                return Err(End::Outcome(Outcome::MemoryLimit));
            }
            self.burn(STEP)?;
            held.push(vec![1_u8; STEP]);
            self.memory += STEP as u64;
        }
    }
}
