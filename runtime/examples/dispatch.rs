//! Measures what a wasm job costs inside the runtime: `cargo run --release -p sundara-runtime --example dispatch`.
//!
//! Prints medians and 99th percentiles: one job at a time through the public interface (with the hop to a worker and
//! back), many at once, and a start from a warm image of 90 MB.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sundara_runtime::{
    Artifact, ExecutionRequest, JobRuntime, ModuleSource, Outcome, OutputSink, Program, Setup, WasmConfig, WasmRuntime,
    WasmTarget, collect,
};

/// Copies standard input to standard output.
const ECHO: &str = r#"(module
    (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 2)
    (data (i32.const 0) "\00\00\01\00\00\00\01\00")
    (func (export "_start")
        (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 4)))
        (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"#;

/// Init reads 90 MB of weights; the start adds up one word a page.
const WEIGHTS: &str = r#"(module
    (import "wasi_snapshot_preview1" "path_open"
        (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 1600)
    (data (i32.const 16) "model/w")
    (func (export "init")
        (drop (call $open (i32.const 3) (i32.const 0) (i32.const 16) (i32.const 7) (i32.const 0)
            (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 8)))
        (i32.store (i32.const 0) (i32.const 65536)) (i32.store (i32.const 4) (i32.const 94371840))
        (drop (call $read (i32.load (i32.const 8)) (i32.const 0) (i32.const 1) (i32.const 12))))
    (func (export "touch_all") (local $at i32) (local $sum i32)
        (local.set $at (i32.const 65536))
        (loop $next
            (local.set $sum (i32.add (local.get $sum) (i32.load (local.get $at))))
            (local.set $at (i32.add (local.get $at) (i32.const 4096)))
            (br_if $next (i32.lt_u (local.get $at) (i32.const 94437376))))
        (i32.store (i32.const 12) (local.get $sum)))
    (func (export "_start") (i32.store (i32.const 12) (i32.load (i32.const 80000000)))))"#;

fn module(text: &str) -> Result<Program, Box<dyn std::error::Error>> {
    Ok(Program::Wasm(ModuleSource::inline(wat::parse_str(text)?)))
}

fn report(name: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |part: usize| times[(times.len() - 1) * part / 100];
    println!("{name:<44} p50 {:>9.1?}  p99 {:>9.1?}  n {}", at(50), at(99), times.len());
}

async fn one_by_one(
    runtime: &WasmRuntime,
    request: &ExecutionRequest,
    count: usize,
) -> Result<(Vec<Duration>, Vec<Duration>), sundara_runtime::RuntimeError> {
    let (mut whole, mut inside) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let start = Instant::now();
        let (execution, _) = collect(runtime, request.clone(), Default::default()).await?;
        whole.push(start.elapsed());
        inside.push(execution.usage.wall);
        assert_eq!(execution.outcome, Outcome::Completed);
    }
    Ok((whole, inside))
}

async fn small_jobs(target: WasmTarget) -> Result<(), Box<dyn std::error::Error>> {
    let runtime = Arc::new(WasmRuntime::new(WasmConfig { target, ..WasmConfig::default() })?);
    let mut request = ExecutionRequest::new(Arc::new(Setup::new(module(ECHO)?)), vec![7; 64]);
    request.limits.memory_bytes = 16 << 20;
    one_by_one(&runtime, &request, 1_000).await?;
    let (whole, inside) = one_by_one(&runtime, &request, 20_000).await?;
    report(&format!("{target:?}: echo 64 B, run to result"), whole);
    report(&format!("{target:?}: echo 64 B, of it on the worker"), inside);

    let start = Instant::now();
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let (runtime, request) = (Arc::clone(&runtime), request.clone());
            tokio::spawn(async move {
                for _ in 0..2_500 {
                    let _ = runtime.run(request.clone(), OutputSink::discard(), Default::default()).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await?;
    }
    let each = start.elapsed() / 40_000;
    println!("{:<44} {each:.1?} a job", format!("{target:?}: echo 64 B, 16 at a time"));
    Ok(())
}

async fn warm_image() -> Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::temp_dir().join(format!("sundara-dispatch-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let weights: Vec<u8> =
        (0..94_371_840_u64).map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 | 1).collect();
    let path = directory.join("w");
    std::fs::write(&path, &weights)?;
    let mut setup = Setup::new(module(WEIGHTS)?);
    setup.init = Some("init".into());
    setup.artifacts.push(Artifact { name: "w".into(), digest: *blake3::hash(&weights).as_bytes(), path });
    let mut request = ExecutionRequest::new(Arc::new(setup), "");
    request.limits.memory_bytes = 256 << 20;
    for (name, cache_dir) in [("in memory", None), ("on disk", Some(directory.join("cache")))] {
        let settings = || WasmConfig { workers: 1, cache_dir: cache_dir.clone(), ..WasmConfig::default() };
        let runtime = WasmRuntime::new(settings())?;
        let start = Instant::now();
        runtime.prepare(&request.setup, &request.limits).await?;
        println!("{:<44} {:.1?}", format!("image of 90 MB, {name}: made"), start.elapsed());
        for entry in ["_start", "touch_all"] {
            request.entry = entry.into();
            one_by_one(&runtime, &request, 3).await?;
            let (whole, _) = one_by_one(&runtime, &request, 200).await?;
            report(&format!("image of 90 MB, {name}: {entry}"), whole);
        }
        drop(runtime);
        if cache_dir.is_some() {
            let runtime = WasmRuntime::new(settings())?;
            let start = Instant::now();
            runtime.prepare(&request.setup, &request.limits).await?;
            println!("{:<44} {:.1?}", "image of 90 MB: verified and mapped again", start.elapsed());
        }
    }
    std::fs::remove_dir_all(&directory)?;
    Ok(())
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    small_jobs(WasmTarget::Native).await?;
    small_jobs(WasmTarget::Pulley).await?;
    warm_image().await
}
