//! The wasm backend: deterministic execution on wasmtime, native or interpreted.
//!
//! Owns the engine, its pools, the caches and the host. What may run and what it sees is decided by constants (they
//! are the environment identity); the configuration chooses threads and caches only.
//!
//! ```text
//! run: limits -> program (memory, disk, compile; image) -> memory reserved -> worker -> store -> entry -> outcome
//!                                    compile pool                        |    worker pool
//!                                                                        `-> brief lane: here, if it is small
//! ```
//!
//! Invariants: guests run on worker threads with a stack of known size, at most `workers` at once, and small ones
//! one at a time on their callers' threads; a run starts when
//! its whole memory limit is reserved; stopping costs nothing until it happens (nothing ticks: the engine's epoch
//! moves when a run is to stop); compiled code is made here and never taken from elsewhere.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use sundara_proto::id::EngineId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use wasmtime::Engine;

use crate::control::{RunControl, drive};
use crate::env::EngineIdentity;
use crate::outcome::{AbortReason, Execution};
use crate::pool::Pool;
use crate::request::EXPORT_NAME_BYTES_MAX;
use crate::watchdog::Watchdog;
use crate::{ExecutionRequest, JobKind, JobRuntime, Limits, ModuleSource, OutputSink, Program, RuntimeError, Setup};

mod brief;
mod cache;
mod config;
mod disk;
mod host;
mod image;
mod limits;
mod program;
mod run;
mod trusted;

#[cfg(test)]
mod tests;

pub use config::{WasmConfig, WasmTarget};

use brief::Brief;
use cache::ProgramCache;
use config::{COMPILERS, WASMTIME_VERSION, engine_flags};
use disk::DiskCache;
use limits::MEMORY_BYTES_MAX;
use program::{Loaded, Loader, Wanted};

/// Unit in which memory is reserved: a wasm page.
const PAGE_BYTES: u64 = 64 << 10;
/// Setups that may wait for the compiler.
const COMPILE_QUEUE_MAX: usize = 1_024;
const IMAGE_CONTEXT: &str = "sundara-node warm image v1";

/// Runs wasm jobs.
pub struct WasmRuntime {
    engine: Engine,
    loader: Arc<Loader>,
    programs: ProgramCache,
    brief: Brief,
    workers: Pool,
    compilers: Pool,
    watchdog: Arc<Watchdog>,
    memory: Arc<Semaphore>,
    memory_budget_bytes: u64,
    flags: String,
}

impl WasmRuntime {
    /// Makes the engine and opens the cache directory.
    ///
    /// # Errors
    /// [`RuntimeError::Engine`] when the engine cannot be made (for example too little address space for the pool:
    /// lower `workers`), [`RuntimeError::Read`] when the cache directory cannot be used.
    pub fn new(settings: WasmConfig) -> Result<Self, RuntimeError> {
        let engine = config::engine(&settings)?;
        let disk = match &settings.cache_dir {
            Some(directory) => Some(DiskCache::open(directory, settings.cache_bytes_max).map_err(|source| {
                RuntimeError::Read { what: format!("the wasm cache {}", directory.display()), source }
            })?),
            None => None,
        };
        let loader = Loader::new(engine.clone(), disk);
        let pages = usize::try_from(settings.memory_budget_bytes / PAGE_BYTES).unwrap_or(usize::MAX);
        Ok(Self {
            loader: Arc::new(loader.map_err(|error| RuntimeError::Engine(format!("{error:#}")))?),
            watchdog: Watchdog::new({
                let engine = engine.clone();
                move || engine.increment_epoch()
            }),
            engine,
            programs: ProgramCache::new(settings.programs_max),
            brief: Brief::new(),
            workers: Pool::new("wasm", settings.workers, settings.queue),
            compilers: Pool::new("wasm-compile", COMPILERS, COMPILE_QUEUE_MAX),
            memory: Arc::new(Semaphore::new(pages.min(Semaphore::MAX_PERMITS))),
            memory_budget_bytes: settings.memory_budget_bytes,
            flags: engine_flags(),
        })
    }

    fn identity(&self) -> EngineIdentity<'_> {
        EngineIdentity { flags: &self.flags, version: WASMTIME_VERSION }
    }

    /// The loaded program of a setup.
    async fn program(&self, wanted: Wanted) -> Result<Arc<Loaded>, RuntimeError> {
        let loader = Arc::clone(&self.loader);
        self.programs.get(wanted.name, &self.compilers, move || loader.load(&wanted)).await
    }

    fn wanted(&self, setup: &Arc<Setup>, limits: &Limits) -> Result<Wanted, RuntimeError> {
        setup.validate()?;
        let Program::Wasm(source) = &setup.program else {
            return Err(RuntimeError::Unsupported(setup.program.kind()));
        };
        self.check(limits)?;
        let env_id = if setup.init.is_some() { self.env_id(&setup.environment()) } else { [0; 32] };
        let name = match &setup.init {
            Some(init) => image_name(&env_id, init, setup, limits.memory_bytes),
            None => source.digest,
        };
        let source: ModuleSource = source.clone();
        Ok(Wanted { name, setup: Arc::clone(setup), source, env_id, memory_bytes: limits.memory_bytes })
    }

    fn check(&self, limits: &Limits) -> Result<(), RuntimeError> {
        let asked = limits.memory_bytes;
        if asked > MEMORY_BYTES_MAX {
            return Err(RuntimeError::InvalidRequest(format!("memory limit above {MEMORY_BYTES_MAX} bytes")));
        }
        if asked > self.memory_budget_bytes {
            return Err(RuntimeError::LimitTooHigh {
                limit: "memory",
                asked,
                allowed: self.memory_budget_bytes,
                setting: "wasm.memory_budget_bytes",
            });
        }
        Ok(())
    }

    /// Waits until a run's whole memory limit fits beside the others.
    async fn reserve(&self, bytes: u64) -> Result<OwnedSemaphorePermit, RuntimeError> {
        let pages = u32::try_from(bytes.div_ceil(PAGE_BYTES)).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.memory).acquire_many_owned(pages).await;
        permit.map_err(|_| RuntimeError::Closed)
    }
}

/// All that goes into a warm image.
fn image_name(env_id: &[u8; 32], init: &str, setup: &Setup, memory_bytes: u64) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(IMAGE_CONTEXT);
    hasher.update(env_id).update(&memory_bytes.to_le_bytes());
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(init.as_bytes());
    for artifact in &setup.artifacts {
        field(artifact.name.as_bytes());
        field(&artifact.digest);
    }
    *hasher.finalize().as_bytes()
}

#[async_trait]
impl JobRuntime for WasmRuntime {
    fn kind(&self) -> JobKind {
        JobKind::Wasm
    }

    async fn prepare(&self, setup: &Arc<Setup>, limits: &Limits) -> Result<(), RuntimeError> {
        self.program(self.wanted(setup, limits)?).await.map(|_| ())
    }

    async fn run(
        &self,
        request: ExecutionRequest,
        output: OutputSink,
        cancel: CancellationToken,
    ) -> Result<Execution, RuntimeError> {
        if request.entry.len() > EXPORT_NAME_BYTES_MAX {
            return Err(RuntimeError::InvalidRequest(format!("entry name above {EXPORT_NAME_BYTES_MAX} bytes")));
        }
        let wanted = self.wanted(&request.setup, &request.limits)?;
        let env_id = wanted.env_id;
        let acquire = async {
            let loaded = self.program(wanted).await?;
            if let Loaded::Refused(outcome, why) = &*loaded {
                return Ok(Err((run::refused(*outcome, why), Bytes::new())));
            }
            let memory = self.reserve(request.limits.memory_bytes).await?;
            if let Some(ran) = self.brief.run(&self.engine, &self.watchdog, &loaded, &request) {
                return Ok(Err(ran));
            }
            Ok::<_, RuntimeError>(Ok((loaded, memory, self.workers.slot().await?)))
        };
        let acquired = tokio::select! {
            biased;
            acquired = acquire => acquired?,
            () = cancel.cancelled() => return Ok(Execution::never_started(AbortReason::Cancelled)),
        };
        let (loaded, memory, slot) = match acquired {
            Ok(acquired) => acquired,
            Err((execution, written)) => {
                output.deliver(written).await;
                return Ok(execution);
            }
        };
        let control = Arc::new(RunControl::default());
        let watchdog = Arc::clone(&self.watchdog);
        let engine = self.engine.clone();
        let job = run::Job { engine, loaded, request, output, control: Arc::clone(&control), env_id };
        let work = slot.run(move || {
            let _deadline = watchdog.guard(job.request.limits.wall, &job.control);
            let (execution, store) = run::execute(job);
            (execution, (store, memory))
        });
        drive(&control, &cancel, || self.engine.increment_epoch(), work).await?
    }

    fn engine_id(&self) -> EngineId {
        self.identity().id()
    }
}

impl Drop for WasmRuntime {
    /// Ends init exports that are still running.
    fn drop(&mut self) {
        self.loader.closing.stop(AbortReason::Cancelled);
        self.engine.increment_epoch();
    }
}
