//! What a wasm job costs inside the runtime: a new store, an instance of a module that is compiled already, the call, the
//! output collected. Beside it the same module on bare wasmtime, which counts no output, keeps no deadline and changes no
//! thread; and starts from a warm image of 90 MB.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use sundara_benches::{Args, Report, Target, median, quantile};
use sundara_runtime::{
    Artifact, ExecutionRequest, JobRuntime as _, ModuleSource, Outcome, OutputSink, Program, Setup, WasmConfig,
    WasmRuntime, WasmTarget, collect,
};

/// Runs of each kind, and jobs of one run.
const RUNS: usize = 5;
const JOBS: usize = 10_000;
/// Jobs at once, where many are.
const AT_ONCE: usize = 16;
/// Starts from a warm image in one run.
const STARTS: usize = 50;

/// Copies up to 256 bytes of standard input to standard output.
const ECHO: &str = r#"(module
    (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 2)
    (data (i32.const 0) "\00\01\00\00\00\01\00\00")
    (func (export "_start")
        (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 4)))
        (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"#;

/// Init reads 90 MB of weights; `touch_all` adds up one word a page, `_start` reads one.
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
const WEIGHTS_LEN: u64 = 94_371_840;

fn main() -> Result<()> {
    let args = Args::of_program();
    let mut report = Report::new("dispatch");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    bare(&args, &mut report).map_err(|error| anyhow!("bare wasmtime: {error:#}"))?;
    runtime.block_on(async {
        small_jobs(&args, &mut report, WasmTarget::Native).await?;
        small_jobs(&args, &mut report, WasmTarget::Pulley).await?;
        warm_image(&args, &mut report).await
    })?;
    report.print(&args)
}

fn micros(times: &[Duration]) -> Vec<f64> {
    times.iter().map(|time| time.as_secs_f64() * 1e6).collect()
}

/// What a guest sees on bare wasmtime: its input and a place for its output.
struct Bare {
    input: Vec<u8>,
    output: Vec<u8>,
}

/// A host call of preview 1 that moves the bytes of one vector between guest memory and `move_bytes`.
fn moves(
    mut caller: wasmtime::Caller<'_, Bare>,
    vector: u32,
    moved_at: u32,
    move_bytes: fn(&mut Bare, &mut [u8]) -> usize,
) -> wasmtime::Result<i32> {
    let memory = caller.get_export("memory").and_then(wasmtime::Extern::into_memory);
    let memory = memory.ok_or_else(|| wasmtime::Error::msg("no memory"))?;
    let (bytes, host) = memory.data_and_store_mut(&mut caller);
    let word = |at: u32| {
        let word = bytes.get(at as usize..).and_then(|rest| rest.first_chunk::<4>());
        word.map(|word| u32::from_le_bytes(*word) as usize).ok_or_else(|| wasmtime::Error::msg("out of bounds"))
    };
    let (at, length) = (word(vector)?, word(vector + 4)?);
    let room = bytes.get_mut(at..at + length).ok_or_else(|| wasmtime::Error::msg("out of bounds"))?;
    let moved = move_bytes(host, room);
    memory.write(&mut caller, moved_at as usize, &u32::try_from(moved)?.to_le_bytes())?;
    Ok(0)
}

/// The floor: pooled instances, fuel and epochs as the runtime has them, everything on this thread.
fn bare(args: &Args, report: &mut Report) -> wasmtime::Result<()> {
    let mut config = wasmtime::Config::new();
    config.consume_fuel(true).epoch_interruption(true).cranelift_nan_canonicalization(true);
    config.allocation_strategy(wasmtime::InstanceAllocationStrategy::pooling());
    let engine = wasmtime::Engine::new(&config)?;
    let mut linker = wasmtime::Linker::<Bare>::new(&engine);
    let world = "wasi_snapshot_preview1";
    linker.func_wrap(world, "fd_read", |caller: wasmtime::Caller<'_, Bare>, _: u32, at: u32, _: u32, moved: u32| {
        moves(caller, at, moved, |host, room| {
            let length = host.input.len().min(room.len());
            room[..length].copy_from_slice(&host.input[..length]);
            length
        })
    })?;
    linker.func_wrap(
        world,
        "fd_write",
        |caller: wasmtime::Caller<'_, Bare>, _: u32, at: u32, _: u32, moved: u32| {
            moves(caller, at, moved, |host, room| {
                host.output.extend_from_slice(room);
                room.len()
            })
        },
    )?;
    let module = linker.instantiate_pre(&wasmtime::Module::new(&engine, wat::parse_str(ECHO)?)?)?;
    let input = vec![7; 256];
    let run = || -> wasmtime::Result<Duration> {
        let mut times = Vec::with_capacity(JOBS);
        for _ in 0..JOBS {
            let start = Instant::now();
            let mut store = wasmtime::Store::new(&engine, Bare { input: input.clone(), output: Vec::new() });
            store.set_fuel(1_000_000_000)?;
            store.set_epoch_deadline(1);
            let instance = module.instantiate(&mut store)?;
            instance.get_typed_func::<(), ()>(&mut store, "_start")?.call(&mut store, ())?;
            if store.data().output != input {
                return Err(wasmtime::Error::msg("the guest copied something else"));
            }
            drop(store);
            times.push(start.elapsed());
        }
        Ok(Duration::from_secs_f64(median(&micros(&times)) / 1e6))
    };
    run()?;
    let medians = (0..args.runs(RUNS)).map(|_| run()).collect::<wasmtime::Result<Vec<_>>>()?;
    report.add("bare wasmtime, one thread", "us", &micros(&medians));
    Ok(())
}

fn setup(text: &str) -> Result<Setup> {
    Ok(Setup::new(Program::Wasm(ModuleSource::inline(wat::parse_str(text)?))))
}

/// Times of `count` jobs one after another: from the call to the collected output, and of that between the start of the
/// guest and its end. From a task, as a node runs them.
async fn one_by_one(
    runtime: &Arc<WasmRuntime>,
    request: &ExecutionRequest,
    count: usize,
) -> Result<(Vec<Duration>, Vec<Duration>)> {
    let (runtime, request) = (Arc::clone(runtime), request.clone());
    tokio::spawn(async move { in_a_task(&runtime, &request, count).await }).await?
}

async fn in_a_task(
    runtime: &WasmRuntime,
    request: &ExecutionRequest,
    count: usize,
) -> Result<(Vec<Duration>, Vec<Duration>)> {
    let (mut whole, mut inside) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for _ in 0..count {
        let request = request.clone();
        let start = Instant::now();
        let (execution, _) = collect(runtime, request, Default::default()).await?;
        whole.push(start.elapsed());
        ensure!(execution.outcome == Outcome::Completed, "{:?}", execution.outcome);
        inside.push(execution.usage.wall);
    }
    Ok((whole, inside))
}

async fn small_jobs(args: &Args, report: &mut Report, target: WasmTarget) -> Result<()> {
    let runtime = Arc::new(WasmRuntime::new(WasmConfig { target, ..WasmConfig::default() })?);
    let mut request = ExecutionRequest::new(Arc::new(setup(ECHO)?), vec![7; 256]);
    request.limits.memory_bytes = 16 << 20;
    one_by_one(&runtime, &request, JOBS).await?;
    let (mut whole, mut late, mut inside, mut many) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.runs(RUNS) {
        let (outside, worker) = one_by_one(&runtime, &request, JOBS).await?;
        whole.push(median(&micros(&outside)));
        late.push(quantile(&micros(&outside), 0.99));
        inside.push(median(&micros(&worker)));
        many.push(at_once(&runtime, &request).await?.as_secs_f64() * 1e6);
    }
    let name = |what: &str| format!("{target:?}: {what}");
    match target {
        WasmTarget::Native => {
            report.add_with_target(name("request to collected output, p50"), "us", &whole, Target::AtMost(20.0));
        }
        WasmTarget::Pulley => report.add(name("request to collected output, p50"), "us", &whole),
    }
    report.add(name("the same, p99"), "us", &late);
    report.add(name("of it from start to end of the guest, p50"), "us", &inside);
    report.add(name("a job, 16 at a time"), "us", &many);
    Ok(())
}

/// Time a job, with many on their way.
async fn at_once(runtime: &Arc<WasmRuntime>, request: &ExecutionRequest) -> Result<Duration> {
    let start = Instant::now();
    let tasks: Vec<_> = (0..AT_ONCE)
        .map(|_| {
            let (runtime, request) = (Arc::clone(runtime), request.clone());
            tokio::spawn(async move {
                for _ in 0..JOBS / AT_ONCE {
                    runtime.run(request.clone(), OutputSink::discard(), Default::default()).await?;
                }
                Ok::<_, sundara_runtime::RuntimeError>(())
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    Ok(start.elapsed() / u32::try_from(JOBS)?)
}

async fn warm_image(args: &Args, report: &mut Report) -> Result<()> {
    let dir = args.temp_dir()?;
    let weights: Vec<u8> =
        (0..WEIGHTS_LEN).map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 | 1).collect();
    let path = dir.path().join("w");
    std::fs::write(&path, &weights)?;
    let mut setup = setup(WEIGHTS)?;
    setup.init = Some("init".into());
    setup.artifacts.push(Artifact { name: "w".into(), digest: *blake3::hash(&weights).as_bytes(), path });
    let mut request = ExecutionRequest::new(Arc::new(setup), "");
    request.limits.memory_bytes = 256 << 20;
    let (mut made, mut mapped, mut starts, mut touched) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for run in 0..args.runs(RUNS) {
        let cache_dir = Some(dir.path().join(format!("cache-{run}")));
        let settings = || WasmConfig { workers: 1, cache_dir: cache_dir.clone(), ..WasmConfig::default() };
        let runtime = Arc::new(WasmRuntime::new(settings())?);
        let start = Instant::now();
        runtime.prepare(&request.setup, &request.limits).await?;
        made.push(start.elapsed().as_secs_f64() * 1e3);
        for (entry, medians) in [("_start", &mut starts), ("touch_all", &mut touched)] {
            request.entry = entry.into();
            one_by_one(&runtime, &request, 3).await?;
            medians.push(median(&micros(&one_by_one(&runtime, &request, STARTS).await?.0)));
        }
        drop(runtime);
        let runtime = WasmRuntime::new(settings())?;
        let start = Instant::now();
        runtime.prepare(&request.setup, &request.limits).await?;
        mapped.push(start.elapsed().as_secs_f64() * 1e3);
    }
    report.add("image of 90 MB: made", "ms", &made);
    report.add("image of 90 MB: verified and mapped again", "ms", &mapped);
    report.add("image of 90 MB: a job that reads one page", "us", &starts);
    report.add("image of 90 MB: a job that reads every page", "us", &touched);
    Ok(())
}
