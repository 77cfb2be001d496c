//! What every backend promises, run against each of them.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{job, request, run, setup, wasm};
use sundara_runtime::{
    AbortReason, Artifact, BuiltinRuntime, JobRuntime, Outcome, OutputSink, RuntimeError, Setup, WasmTarget,
};
use tokio_util::sync::CancellationToken;

/// A backend and its reference jobs.
#[derive(Clone)]
struct Backend {
    runtime: Arc<dyn JobRuntime>,
    setup: fn(&str) -> Setup,
}

impl Backend {
    async fn output(&self, name: &str, input: &[u8], params: &str) -> Vec<u8> {
        let (execution, output) = run(&*self.runtime, request((self.setup)(name), input, params)).await;
        assert_eq!(execution.outcome, Outcome::Completed, "{name}: {:?}", execution.stderr_tail);
        assert_eq!(execution.output_digest, Some(*blake3::hash(&output).as_bytes()), "{name}");
        assert_eq!(execution.usage.output_bytes, output.len() as u64, "{name}");
        assert!(execution.usage.fuel > 0, "{name}");
        output.to_vec()
    }
}

async fn results(backend: Backend) {
    let large: Vec<u8> = (0..3_000_000_u32).map(|at| at as u8).collect();
    assert_eq!(backend.output("echo", b"hello", "").await, b"hello");
    assert_eq!(backend.output("echo", b"", "").await, b"");
    assert_eq!(backend.output("echo", &large, "").await, large);
    assert_eq!(backend.output("params", b"", "a=1").await, b"a=1");
    assert_eq!(backend.output("seed", b"", "").await, b"0");
    let (execution, output) = run(&*backend.runtime, request((backend.setup)("stderr"), b"words", "")).await;
    assert_eq!((&output[..], &execution.stderr_tail[..]), (&b""[..], &b"words"[..]));
}

async fn randomness_follows_the_job(backend: Backend) {
    let ask = |seed, key| {
        let mut request = request((backend.setup)("random"), b"", "100");
        request.seed = seed;
        request.job_key = [key; 32];
        request
    };
    let first = run(&*backend.runtime, ask(1, 1)).await.1;
    assert_eq!(first.len(), 100);
    assert_eq!(first, run(&*backend.runtime, ask(1, 1)).await.1);
    assert_ne!(first, run(&*backend.runtime, ask(2, 1)).await.1);
    assert_ne!(first, run(&*backend.runtime, ask(1, 2)).await.1);
}

async fn artifacts_are_readable(backend: Backend) {
    let directory = tempfile::tempdir().unwrap();
    let mut setup = (backend.setup)("model");
    for (name, content) in [("small", vec![7; 3]), ("deep/large", vec![9; 300_000])] {
        let path = directory.path().join(name.replace('/', "-"));
        std::fs::write(&path, &content).unwrap();
        setup.artifacts.push(Artifact { name: name.into(), digest: *blake3::hash(&content).as_bytes(), path });
    }
    let (execution, output) = run(&*backend.runtime, request(setup.clone(), b"", "deep/large")).await;
    assert_eq!((execution.outcome, output.len()), (Outcome::Completed, 300_000));
    let (execution, _) = run(&*backend.runtime, request(setup.clone(), b"", "none")).await;
    assert_eq!(execution.outcome, Outcome::ExitCode(1));
    // An artifact that the caller promised and that is gone is this executor's fault, not the job's.
    setup.artifacts[0].path = directory.path().join("gone");
    let gone = sundara_runtime::collect(&*backend.runtime, request(setup, b"", "small"), Default::default()).await;
    assert!(matches!(gone, Err(RuntimeError::Read { .. })), "{gone:?}");
}

async fn limits_have_their_own_outcomes(backend: Backend) {
    let ask = |name: &str| request((backend.setup)(name), b"", "3");
    let (execution, _) = run(&*backend.runtime, ask("exit")).await;
    // A preview 2 command can only say that it failed.
    assert!(matches!(execution.outcome, Outcome::ExitCode(1 | 3)), "{:?}", execution.outcome);
    assert!(execution.digest().is_some());
    let (execution, _) = run(&*backend.runtime, ask("trap")).await;
    assert!(matches!(execution.outcome, Outcome::Trap(_)));

    let mut spin = ask("spin");
    spin.limits.fuel = 1_000_000;
    let (execution, _) = run(&*backend.runtime, spin).await;
    assert_eq!((execution.outcome, execution.usage.fuel), (Outcome::OutOfFuel, 1_000_000));
    assert!(execution.digest().is_some());

    let mut flood = ask("flood");
    flood.limits.output_bytes = 100_001;
    let (execution, output) = run(&*backend.runtime, flood).await;
    assert_eq!((execution.outcome, output.len()), (Outcome::OutputLimit, 100_001));
    assert_eq!(execution.output_digest, Some(*blake3::hash(&[0; 100_001]).as_bytes()));

    let mut alloc = ask("alloc");
    alloc.limits.memory_bytes = 4 << 20;
    let (execution, _) = run(&*backend.runtime, alloc).await;
    assert_eq!((execution.outcome, execution.usage.peak_memory_bytes), (Outcome::MemoryLimit, 4 << 20));

    let mut spin = ask("spin");
    spin.limits.fuel = u64::MAX / 4;
    spin.limits.wall = Duration::from_millis(30);
    let (execution, _) = run(&*backend.runtime, spin).await;
    assert_eq!(execution.outcome, Outcome::Aborted(AbortReason::WallClock));
    assert_eq!((execution.digest(), execution.output_digest), (None, None));
}

async fn cancelling_and_dropping_end_a_run(backend: Backend) {
    let endless = move || {
        let mut spin = request((backend.setup)("spin"), b"", "");
        spin.limits.fuel = u64::MAX / 4;
        spin
    };
    let cancel = CancellationToken::new();
    let running = {
        let (runtime, cancel) = (Arc::clone(&backend.runtime), cancel.clone());
        tokio::spawn(async move { runtime.run(endless(), OutputSink::discard(), cancel).await })
    };
    tokio::task::yield_now().await;
    cancel.cancel();
    assert_eq!(running.await.unwrap().unwrap().outcome, Outcome::Aborted(AbortReason::Cancelled));
    // More dropped runs than there are workers: each has to give its worker back for the last job to run.
    for _ in 0..8 {
        let run = backend.runtime.run(endless(), OutputSink::discard(), CancellationToken::new());
        let _ = tokio::time::timeout(Duration::from_millis(5), run).await;
    }
    assert_eq!(backend.output("echo", b"still here", "").await, b"still here");
}

async fn a_slow_reader_holds_the_job_back(backend: Backend) {
    let mut flood = request((backend.setup)("flood"), b"", "");
    flood.limits.output_bytes = 64 << 20;
    let (sink, mut stream) = OutputSink::channel();
    let cancel = CancellationToken::new();
    let running = {
        let (runtime, cancel) = (Arc::clone(&backend.runtime), cancel.clone());
        tokio::spawn(async move { runtime.run(flood, sink, cancel).await })
    };
    assert!(stream.recv().await.is_some());
    // The job is blocked on a full channel by now or soon; cancelling reaches it there too.
    cancel.cancel();
    let execution = running.await.unwrap().unwrap();
    assert_eq!(execution.outcome, Outcome::Aborted(AbortReason::Cancelled));
    assert!(execution.usage.output_bytes < 64 << 20);
    // A reader that is gone stops nothing.
    let mut flood = request((backend.setup)("flood"), b"", "");
    flood.limits.output_bytes = 8 << 20;
    let (sink, stream) = OutputSink::channel();
    drop(stream);
    let execution = backend.runtime.run(flood, sink, CancellationToken::new()).await.unwrap();
    assert_eq!((execution.outcome, execution.usage.output_bytes), (Outcome::OutputLimit, 8 << 20));
}

async fn the_environment_is_told_apart(backend: Backend) {
    let one = (backend.setup)("echo").environment();
    let other = (backend.setup)("seed").environment();
    assert_eq!(backend.runtime.env_id(&one), backend.runtime.env_id(&one));
    assert_ne!(backend.runtime.env_id(&one), backend.runtime.env_id(&other));
}

async fn everything_repeats(backend: Backend) {
    for name in ["echo", "seed", "random", "exit", "trap"] {
        let first = run(&*backend.runtime, request((backend.setup)(name), b"input", "7")).await;
        let second = run(&*backend.runtime, request((backend.setup)(name), b"input", "7")).await;
        assert_eq!(common::comparable(&first.0), common::comparable(&second.0), "{name}");
        assert_eq!((first.1, first.0.digest()), (second.1, second.0.digest()), "{name}");
    }
}

macro_rules! suite {
    ($($name:ident: $backend:expr;)*) => {
        $(mod $name {
            use super::*;
            suite!(@tests $backend; results randomness_follows_the_job artifacts_are_readable
                limits_have_their_own_outcomes cancelling_and_dropping_end_a_run a_slow_reader_holds_the_job_back
                the_environment_is_told_apart everything_repeats);
        })*
    };
    (@tests $backend:expr; $($test:ident)*) => {
        $(#[tokio::test]
        async fn $test() {
            super::$test($backend).await;
        })*
    };
}

suite! {
    builtin: Backend { runtime: Arc::new(BuiltinRuntime::new()), setup: |name| Setup::builtin(name) };
    wasm_native: Backend { runtime: Arc::new(wasm(WasmTarget::Native)), setup: |name| setup(job(name)) };
    wasm_pulley: Backend { runtime: Arc::new(wasm(WasmTarget::Pulley)), setup: |name| setup(job(name)) };
    wasm_component: Backend {
        runtime: Arc::new(wasm(WasmTarget::Native)),
        setup: |name| setup(common::component(&job(name))),
    };
}
