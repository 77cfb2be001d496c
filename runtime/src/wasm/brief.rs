//! The brief lane: a small job runs on its caller's own thread, since the way to a worker and back costs more than it.
//!
//! Owns what may run there and for how long. A run that asks for more is thrown away and begun again on a worker: nothing
//! of it was seen, and a job has no effect but its output.
//!
//! Invariants: one run at a time, so that an executor with two threads or more goes on; a run ends by fuel within a
//! fraction of a millisecond, and by the clock where fuel does not say how long something takes (filling memory); it
//! waits for nothing, reads no file, takes little memory, and has as much stack as a guest may use; a result that the
//! smaller limits had a part in does not count.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Semaphore;

use super::config::GUEST_STACK_BYTES;
use super::program::{Code, Loaded, Ready};
use super::run::{self, Job};
use crate::control::RunControl;
use crate::limits::Limits;
use crate::outcome::{Execution, Outcome};
use crate::watchdog::Watchdog;
use crate::{ExecutionRequest, OutputSink};

/// Instances in use here at once.
pub(super) const AT_ONCE: usize = 1;
/// Fuel of a run: 0.1 to 0.2 ms of machine code.
const FUEL: u64 = 300_000;
/// The clock's limit: rarely met, so its thread is rarely woken.
const WALL: Duration = Duration::from_millis(20);
/// Memory of a run: what is touched must be wiped again on this thread.
const MEMORY_BYTES: u64 = 4 << 20;
/// Input of a run.
const INPUT_BYTES: usize = 64 << 10;
/// Machine code of a program: bounds how much memory it fills between two looks at the clock.
const CODE_BYTES: usize = 512 << 10;
/// What a guest's stack and the host calls at its end may take.
const STACK_BYTES: usize = GUEST_STACK_BYTES + (256 << 10);
/// A program that asked for more is not tried again for so many runs.
const PASSED_OVER: u32 = 256;

/// What was learnt of a program.
#[derive(Debug, Default)]
pub(crate) struct History {
    passed_over: AtomicU32,
}

impl History {
    fn is_due(&self) -> bool {
        self.passed_over.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err()
    }
}

/// The lane.
#[derive(Debug)]
pub(super) struct Brief {
    free: Semaphore,
}

impl Brief {
    pub(super) fn new() -> Self {
        Self { free: Semaphore::new(AT_ONCE) }
    }

    /// Runs the job, if it is as small as it looks. `None`: it belongs on a worker.
    pub(super) fn run(
        &self,
        engine: &wasmtime::Engine,
        watchdog: &Watchdog,
        loaded: &Arc<Loaded>,
        request: &ExecutionRequest,
    ) -> Option<(Execution, Bytes)> {
        let Loaded::Ready(ready) = &**loaded else { return None };
        let fits = fits(engine, ready, request) && has_other_threads() && stack::left() >= STACK_BYTES;
        if !fits || !ready.history.is_due() {
            return None;
        }
        let _free = self.free.try_acquire().ok()?;
        let ran = attempt(engine, watchdog, loaded, request);
        if ran.is_none() {
            ready.history.passed_over.store(PASSED_OVER, Ordering::Relaxed);
        }
        ran
    }
}

fn fits(engine: &wasmtime::Engine, ready: &Ready, request: &ExecutionRequest) -> bool {
    let Code::Core(pre) = &ready.code else { return false };
    ready.cold_init.is_none()
        && !engine.is_pulley()
        && request.setup.artifacts.is_empty()
        && request.input.len() <= INPUT_BYTES
        && pre.module().text().len() <= CODE_BYTES
}

/// Whether the caller's executor goes on while one of its threads is busy.
fn has_other_threads() -> bool {
    Handle::try_current().is_ok_and(|handle| {
        handle.runtime_flavor() == RuntimeFlavor::MultiThread && handle.metrics().num_workers() > AT_ONCE
    })
}

/// How much stack a thread has. Its maker chose that, and says it to nobody.
mod stack {
    use std::cell::Cell;
    use std::hint::black_box;

    thread_local! {
        /// Where this thread's stack ends, once it was looked up; 0 where that cannot be found out.
        static END: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Bytes below this call; 0 where that cannot be found out.
    pub(super) fn left() -> usize {
        let local = 0_u8;
        let here = black_box(&raw const local).addr();
        let end = END.get().unwrap_or_else(|| {
            let end = end_of(here).unwrap_or_default();
            END.set(Some(end));
            end
        });
        if end == 0 { 0 } else { here.saturating_sub(end) }
    }

    /// The lowest address of the mapping that `address` lies in. Only Linux tells. Its main thread's stack is mapped as it
    /// grows, so that what is found there is too little, which is safe.
    fn end_of(address: usize) -> Option<usize> {
        let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
        maps.lines().find_map(|line| {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            let (from, to) = (usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?);
            (from..to).contains(&address).then_some(from)
        })
    }

    #[cfg(test)]
    mod tests {
        #[test]
        #[cfg(target_os = "linux")]
        fn a_thread_knows_its_stack() {
            let thread = std::thread::Builder::new().stack_size(3 << 20).spawn(super::left);
            let left = thread.map(std::thread::JoinHandle::join);
            let left = left.ok().and_then(Result::ok).unwrap_or_default();
            assert!(left > 5 << 19 && left <= 3 << 20, "{left}");
        }
    }
}

fn attempt(
    engine: &wasmtime::Engine,
    watchdog: &Watchdog,
    loaded: &Arc<Loaded>,
    request: &ExecutionRequest,
) -> Option<(Execution, Bytes)> {
    let mut request = request.clone();
    let asked = request.limits;
    request.limits = Limits {
        fuel: asked.fuel.min(FUEL),
        memory_bytes: asked.memory_bytes.min(MEMORY_BYTES),
        wall: asked.wall.min(WALL),
        ..asked
    };
    let control = Arc::new(RunControl::default());
    let _deadline = watchdog.guard(request.limits.wall, &control);
    let job = Job {
        engine: engine.clone(),
        loaded: Arc::clone(loaded),
        request,
        output: OutputSink::held(),
        control,
        env_id: [0; 32],
    };
    let (execution, store) = run::execute(job);
    let (execution, mut store) = (execution.ok()?, store?);
    let host = store.data_mut();
    let cut_short = match execution.outcome {
        Outcome::OutOfFuel | Outcome::MemoryLimit | Outcome::Aborted(_) | Outcome::Indeterminate(_) => true,
        _ => host.limiter.refused(),
    };
    (!cut_short).then(|| (execution, host.stdout.take_held()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{
        JobRuntime as _, ModuleSource, OUTPUT_CHUNK_BYTES_MAX, Program, Setup, WasmConfig, WasmRuntime, collect,
    };

    /// The body of `_start`, with a memory that may grow, and `$write` of some bytes.
    fn program(body: &str) -> Arc<Setup> {
        let text = format!(
            r#"(module
            (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
            (memory (export "memory") 2)
            (func $write (param $length i32)
                (i32.store (i32.const 4) (local.get $length))
                (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
            (func (export "_start") (local $n i32) {body}))"#
        );
        Arc::new(Setup::new(Program::Wasm(ModuleSource::inline(wat::parse_str(text).unwrap()))))
    }

    const SPIN: &str = "(loop $next (local.set $n (i32.add (local.get $n) (i32.const 1)))
        (br_if $next (i32.lt_u (local.get $n) (i32.const 100000))))";
    const FILL: &str = "(loop $next (memory.fill (i32.const 0) (i32.const 1) (i32.const 131072))
        (local.set $n (i32.add (local.get $n) (i32.const 1)))
        (br_if $next (i32.lt_u (local.get $n) (i32.const 30000))))";

    /// What a program comes to in the brief lane, if it ends there, and on a worker.
    async fn both(body: &str) -> (Option<(Execution, Bytes)>, (Execution, Bytes)) {
        let runtime = WasmRuntime::new(WasmConfig::default()).unwrap();
        let mut request = ExecutionRequest::new(program(body), "");
        request.limits.output_bytes = 1 << 20;
        runtime.prepare(&request.setup, &request.limits).await.unwrap();
        let wanted = runtime.wanted(&request.setup, &request.limits).unwrap();
        let loaded = runtime.program(wanted).await.unwrap();
        let brief = runtime.brief.run(&runtime.engine, &runtime.watchdog, &loaded, &request);
        // While somebody else has the lane.
        let _taken = runtime.brief.free.try_acquire().unwrap();
        (brief, collect(&runtime, request, Default::default()).await.unwrap())
    }

    async fn on_a_thread_of_tokio(body: &'static str) -> (Option<(Execution, Bytes)>, (Execution, Bytes)) {
        tokio::spawn(both(body)).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_ends_here_is_what_a_worker_makes_of_it() {
        for body in ["", "(call $write (i32.const 300))", "unreachable", "(call $write (i32.const 65000)) unreachable"]
        {
            let (brief, (execution, output)) = on_a_thread_of_tokio(body).await;
            let (ours, written) = brief.unwrap_or_else(|| panic!("{body} is brief"));
            assert_eq!((ours.outcome, ours.output_digest), (execution.outcome, execution.output_digest), "{body}");
            assert_eq!(ours.usage.fuel, execution.usage.fuel, "{body}");
            assert_eq!(ours.usage.peak_memory_bytes, execution.usage.peak_memory_bytes, "{body}");
            assert_eq!(written, output, "{body}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_asks_for_more_goes_to_a_worker() {
        let grow = "(if (i32.ne (memory.grow (i32.const 100)) (i32.const 2)) (then unreachable))";
        let flood = "(call $write (i32.const 65536)) (call $write (i32.const 1))";
        for (body, output_bytes) in [(SPIN, 0), (FILL, 0), (grow, 0), (flood, OUTPUT_CHUNK_BYTES_MAX + 1)] {
            let (brief, (execution, output)) = on_a_thread_of_tokio(body).await;
            assert!(brief.is_none(), "{body}: {brief:?}");
            assert_eq!((execution.outcome, output.len()), (Outcome::Completed, output_bytes), "{body}");
        }
        let (brief, (execution, _)) = on_a_thread_of_tokio("(call 2)").await;
        assert!(brief.is_none() && matches!(execution.outcome, Outcome::Indeterminate(_)), "{:?}", execution.outcome);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_program_that_asked_for_more_is_passed_over_for_a_while() {
        let history = History::default();
        assert!(history.is_due() && history.is_due());
        history.passed_over.store(2, Ordering::Relaxed);
        assert_eq!([(); 4].map(|()| history.is_due()), [false, false, true, true]);
    }

    #[tokio::test]
    async fn an_executor_with_one_thread_is_not_held_up() {
        assert!(both("").await.0.is_none());
    }
}
