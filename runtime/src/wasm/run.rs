//! One run: a fresh store, an instance from the pool, the entry, and what it came to.
//!
//! Owns the order in which limits are armed and the mapping from errors to outcomes. Runs on a worker thread.
//!
//! Invariants: fuel is counted from before instantiation where there is no init export, and from the entry where there
//! is one; a stop that came before the store was armed is seen after; output is delivered before the run is over.

use std::sync::Arc;
use std::time::Instant;

use wasmtime::{Engine, Instance, InstancePre, PoolConcurrencyLimitError, Store, Trap, UpdateDeadline};

use super::host::{Ended, Host};
use super::image::{init_outcome, initialize};
use super::limits::INIT_FUEL;
use super::program::{Code, ComponentCode, Loaded, Ready};
use crate::control::RunControl;
use crate::limits::STDERR_TAIL_BYTES;
use crate::outcome::{Execution, IndeterminateReason, InvalidModule, Outcome, TrapKind, Usage};
use crate::output::{OutputSink, WriteEnd};
use crate::request::ENTRY_DEFAULT;
use crate::{AbortReason, ExecutionRequest, RuntimeError};

/// What a reactor exports to be called before anything else.
pub(super) const INITIALIZE: &str = "_initialize";

/// One job, ready for a worker.
pub(crate) struct Job {
    pub(crate) engine: Engine,
    pub(crate) loaded: Arc<Loaded>,
    pub(crate) request: ExecutionRequest,
    pub(crate) output: OutputSink,
    pub(crate) control: Arc<RunControl>,
    /// Keys an init export that has to run here.
    pub(crate) env_id: [u8; 32],
}

/// Why the entry was not, or not fully, run.
enum Failure {
    /// Anything that unwound the guest.
    Guest(wasmtime::Error),
    /// The same during an init export.
    Init(wasmtime::Error),
    /// The program has no such entry.
    NoEntry(String),
}

impl From<wasmtime::Error> for Failure {
    fn from(error: wasmtime::Error) -> Self {
        Self::Guest(error)
    }
}

/// Lets a stop reach the guest: the engine's epoch moves when some run is stopped, and each looks whether it is meant.
pub(super) fn arm(store: &mut Store<Host>, control: &Arc<RunControl>) {
    let watched = Arc::clone(control);
    store.epoch_deadline_callback(move |_| match watched.stopped() {
        Some(_) => Ok(UpdateDeadline::Interrupt),
        None => Ok(UpdateDeadline::Continue(1)),
    });
    store.set_epoch_deadline(1);
}

/// The execution of a program that is refused everywhere, or cannot be compiled here.
pub(crate) fn refused(outcome: Outcome, why: &str) -> Execution {
    Execution {
        outcome,
        output_digest: outcome.is_result().then(|| *blake3::hash(b"").as_bytes()),
        usage: Usage::default(),
        stderr_tail: bytes::Bytes::copy_from_slice(&why.as_bytes()[..why.len().min(STDERR_TAIL_BYTES)]),
    }
}

/// Runs a job to its end. The store comes back beside the result, so that the result need not wait until the
/// instance's memory is wiped.
pub(crate) fn execute(job: Job) -> (Result<Execution, RuntimeError>, Option<Store<Host>>) {
    let Job { engine, loaded, request, output, control, env_id } = job;
    let ready = match &*loaded {
        Loaded::Ready(ready) => ready,
        Loaded::Refused(outcome, why) => return (Ok(refused(*outcome, why)), None),
    };
    let start = Instant::now();
    let mut store = Store::new(&engine, Host::for_job(&request, output, Arc::clone(&control)));
    store.limiter(|host| &mut host.limiter);
    arm(&mut store, &control);
    // A stop before this line moved the epoch before the store looked at it.
    if let Some(reason) = control.stopped() {
        return (Ok(Execution::never_started(reason)), None);
    }
    let execution = judge(&mut store, ready, &request, &env_id, start);
    (execution, Some(store))
}

/// Runs the entry and says what it came to.
fn judge(
    store: &mut Store<Host>,
    ready: &Ready,
    request: &ExecutionRequest,
    env_id: &[u8; 32],
    start: Instant,
) -> Result<Execution, RuntimeError> {
    let (ended, is_component) = match &ready.code {
        Code::Core(pre) => (core(store, pre, ready, request, env_id), false),
        Code::Component(code) => (component(store, code, request), true),
    };
    let outcome = match ended {
        Ok(0) => Outcome::Completed,
        Ok(code) => with_memory_limit(store.data(), Outcome::ExitCode(code)),
        Err(Failure::Guest(error)) => classify(store.data_mut(), error, is_component)?,
        Err(Failure::NoEntry(why)) => {
            store.data_mut().stderr.push(why.as_bytes());
            Outcome::InvalidModule(InvalidModule::NoEntry)
        }
        Err(Failure::Init(error)) => {
            let why = format!("init: {error:#}");
            return Ok(refused(init_outcome(classify(store.data_mut(), error, is_component)?), &why));
        }
    };
    finish(store, request, outcome, start)
}

/// Instantiates and calls a core module; the exit code.
fn core(
    store: &mut Store<Host>,
    pre: &InstancePre<Host>,
    ready: &Ready,
    request: &ExecutionRequest,
    env_id: &[u8; 32],
) -> Result<i32, Failure> {
    let instance = match &ready.cold_init {
        Some(init) => {
            let instance = cold_start(store, pre, init, request, env_id).map_err(Failure::Init)?;
            store.set_fuel(request.limits.fuel)?;
            instance
        }
        None => {
            store.set_fuel(request.limits.fuel)?;
            pre.instantiate(&mut *store)?
        }
    };
    let entry = request.entry.as_str();
    if request.setup.init.is_some() {
        // An image has been initialised, and only what follows counts.
        store.set_fuel(request.limits.fuel)?;
    } else if entry != ENTRY_DEFAULT
        && let Some(initialize) = instance.get_func(&mut *store, INITIALIZE)
        && let Ok(initialize) = initialize.typed::<(), ()>(&*store)
    {
        initialize.call(&mut *store, ())?;
    }
    let function = instance.get_func(&mut *store, entry).filter(|_| entry != INITIALIZE);
    let function = function.ok_or_else(|| Failure::NoEntry(format!("no function `{entry}` is exported")))?;
    if let Ok(function) = function.typed::<(), ()>(&*store) {
        function.call(&mut *store, ())?;
        return Ok(0);
    }
    match function.typed::<(), i32>(&*store) {
        Ok(function) => Ok(function.call(&mut *store, ())?),
        Err(_) => Err(Failure::NoEntry(format!("`{entry}` is neither () -> () nor () -> i32"))),
    }
}

/// Runs init in this very instance, in the world of an init export, then puts the job's world in its place.
fn cold_start(
    store: &mut Store<Host>,
    pre: &InstancePre<Host>,
    init: &str,
    request: &ExecutionRequest,
    env_id: &[u8; 32],
) -> wasmtime::Result<Instance> {
    let control = Arc::clone(&store.data().control);
    let host = Host::for_init(&request.setup, env_id, request.limits.memory_bytes, control);
    let mut job = std::mem::replace(store.data_mut(), host);
    store.set_fuel(INIT_FUEL)?;
    let instance = pre.instantiate(&mut *store)?;
    initialize(store, &instance, init)?;
    std::mem::swap(&mut job.limiter, &mut store.data_mut().limiter);
    job.limiter.restart(request.limits.memory_bytes);
    *store.data_mut() = job;
    Ok(instance)
}

/// Instantiates and calls a component; the exit code.
fn component(store: &mut Store<Host>, code: &ComponentCode, request: &ExecutionRequest) -> Result<i32, Failure> {
    let entry = request.entry.as_str();
    let index = code.entry(entry).ok_or_else(|| Failure::NoEntry(format!("no function `{entry}` is exported")))?;
    store.set_fuel(request.limits.fuel)?;
    let instance = code.pre.instantiate(&mut *store)?;
    if request.setup.init.is_some() {
        store.set_fuel(request.limits.fuel)?;
    }
    if let Ok(function) = instance.get_typed_func::<(), (Result<(), ()>,)>(&mut *store, index) {
        let (result,) = function.call(&mut *store, ())?;
        return Ok(i32::from(result.is_err()));
    }
    match instance.get_typed_func::<(), ()>(&mut *store, index) {
        Ok(function) => {
            function.call(&mut *store, ())?;
            Ok(0)
        }
        Err(_) => Err(Failure::NoEntry(format!("`{entry}` is neither func() nor func() -> result"))),
    }
}

/// What an error that unwound a guest means. `Err` is a fault of this machine.
pub(super) fn classify(host: &mut Host, error: wasmtime::Error, component: bool) -> Result<Outcome, RuntimeError> {
    let outcome = match host.ended.take() {
        Some(Ended::Exit(0)) => return Ok(Outcome::Completed),
        Some(Ended::Exit(code)) => Outcome::ExitCode(code),
        Some(Ended::OutputLimit) => Outcome::OutputLimit,
        Some(Ended::OutOfFuel) => Outcome::OutOfFuel,
        Some(Ended::Misuse) => Outcome::Trap(TrapKind::HostCall),
        Some(Ended::Aborted(reason)) => Outcome::Aborted(reason),
        Some(Ended::Fault(fault)) => return Err(fault),
        None if host.limiter.host_failed() => Outcome::Indeterminate(IndeterminateReason::HostMemory),
        None => match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => Outcome::Aborted(host.control.stopped().unwrap_or(AbortReason::Cancelled)),
            Some(Trap::StackOverflow) => Outcome::Indeterminate(IndeterminateReason::StackOverflow),
            Some(Trap::OutOfFuel) => Outcome::OutOfFuel,
            Some(trap) => Outcome::Trap(trap_kind(*trap)),
            None if error.is::<PoolConcurrencyLimitError>() => {
                return Err(RuntimeError::Engine(format!("no free slot: {error:#}")));
            }
            // An instance that starts above the memory limit.
            None if host.limiter.refused() => Outcome::MemoryLimit,
            // A value that breaks the rules of the component model.
            None if component => Outcome::Trap(TrapKind::HostCall),
            None => return Err(RuntimeError::Engine(format!("{error:#}"))),
        },
    };
    Ok(with_memory_limit(host, outcome))
}

/// A guest that was refused memory and then gave up ended by the memory limit, however it gave up.
fn with_memory_limit(host: &Host, outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::Trap(_) | Outcome::ExitCode(_) if host.limiter.refused() => Outcome::MemoryLimit,
        outcome => outcome,
    }
}

fn trap_kind(trap: Trap) -> TrapKind {
    match trap {
        Trap::UnreachableCodeReached => TrapKind::Unreachable,
        Trap::MemoryOutOfBounds => TrapKind::MemoryOutOfBounds,
        Trap::TableOutOfBounds => TrapKind::TableOutOfBounds,
        Trap::IndirectCallToNull => TrapKind::IndirectCallToNull,
        Trap::BadSignature => TrapKind::BadSignature,
        Trap::IntegerOverflow => TrapKind::IntegerOverflow,
        Trap::IntegerDivisionByZero => TrapKind::IntegerDivisionByZero,
        Trap::BadConversionToInteger => TrapKind::BadConversionToInteger,
        Trap::NullReference => TrapKind::NullReference,
        _ => TrapKind::Other,
    }
}

/// Delivers what is left and reads the counters.
fn finish(
    store: &mut Store<Host>,
    request: &ExecutionRequest,
    mut outcome: Outcome,
    start: Instant,
) -> Result<Execution, RuntimeError> {
    let limit = request.limits.fuel;
    let left = store.get_fuel().map_err(|error| RuntimeError::Engine(format!("{error:#}")))?;
    let host = store.data_mut();
    if outcome.is_result()
        && let Err(WriteEnd::Stopped(reason)) = host.stdout.finish(&host.control)
    {
        outcome = Outcome::Aborted(reason);
    }
    let usage = Usage {
        fuel: if outcome == Outcome::OutOfFuel { limit } else { limit.saturating_sub(left) },
        peak_memory_bytes: host.limiter.peak_bytes(),
        wall: start.elapsed(),
        output_bytes: host.stdout.written(),
    };
    Ok(Execution {
        outcome,
        output_digest: outcome.is_result().then(|| host.stdout.digest()),
        usage,
        stderr_tail: host.stderr.take(),
    })
}
