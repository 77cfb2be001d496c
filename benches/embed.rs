//! One sentence's embedding by all-MiniLM-L6-v2, warm: inside the runtime, and through a mesh on this machine from submit
//! to verdict, on one miner and on two.
//!
//! Needs the model's files in SUNDARA_MINILM_DIR (README.md, "Full tests").

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sundara_benches::{Args, Report, Target, median, quantile};
use sundara_examples::{SENTENCE_MODEL_FILES, sentence_model};
use sundara_node::JobOrder;
use sundara_node::testnet::Testnet;
use sundara_proto::attestation::Outcome;
use sundara_runtime::{
    Artifact, ExecutionRequest, JobRuntime as _, ModuleSource, Program, Setup, WasmConfig, WasmRuntime, collect,
};

/// Runs of each kind, and jobs of one run.
const RUNS: usize = 5;
const JOBS: usize = 40;
/// Jobs before the first that counts: miners that are new are audited at every job.
const WARM_UP: usize = 40;
/// What the mesh may take, in milliseconds.
const TARGET_MS: f64 = 40.0;

const SENTENCE: &str = "This is an example sentence";
const INIT: &str = "wizer-initialize";

fn main() -> Result<()> {
    let args = Args::of_program();
    let Some(files) = std::env::var_os("SUNDARA_MINILM_DIR").map(PathBuf::from) else {
        eprintln!("skipped: SUNDARA_MINILM_DIR is not set (README.md, \"Full tests\")");
        return Ok(());
    };
    let model = sentence_model(&files, Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let mut report = Report::new("embed");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        alone(&args, &mut report, &model).await?;
        through_a_mesh(&args, &mut report, &model).await
    })?;
    report.print(&args)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

async fn alone(args: &Args, report: &mut Report, model: &Path) -> Result<()> {
    let mut setup = Setup::new(Program::Wasm(ModuleSource::inline(std::fs::read(model.join("embed.wasm"))?)));
    setup.init = Some(INIT.into());
    for name in SENTENCE_MODEL_FILES {
        let path = model.join(name);
        let digest = *blake3::hash(&std::fs::read(&path)?).as_bytes();
        setup.artifacts.push(Artifact { name: name.into(), digest, path });
    }
    let cache = args.temp_dir()?;
    let settings = WasmConfig { cache_dir: Some(cache.path().to_path_buf()), ..WasmConfig::default() };
    let runtime = WasmRuntime::new(settings)?;
    let mut request = ExecutionRequest::new(Arc::new(setup), SENTENCE);
    // As in the model's manifest.
    request.limits.memory_bytes = 256 << 20;
    request.limits.fuel = 20_000_000_000;
    let start = Instant::now();
    runtime.prepare(&request.setup, &request.limits).await?;
    report.add("runtime alone: compiled, initialised, image made", "ms", &[millis(start.elapsed())]);
    let mut medians = Vec::new();
    for run in 0..=args.runs(RUNS) {
        let mut times = Vec::with_capacity(JOBS);
        for _ in 0..JOBS {
            let request = request.clone();
            let start = Instant::now();
            let (execution, output) = collect(&runtime, request, Default::default()).await?;
            times.push(millis(start.elapsed()));
            ensure!(execution.outcome == sundara_runtime::Outcome::Completed, "{:?}", execution.outcome);
            ensure!(output.starts_with(b"[0.0676"), "another embedding: {output:?}");
        }
        if run > 0 {
            medians.push(median(&times));
        }
    }
    report.add("runtime alone: one sentence, p50", "ms", &medians);
    Ok(())
}

async fn through_a_mesh(args: &Args, report: &mut Report, model: &Path) -> Result<()> {
    let testnet = Testnet::builder().start().await?;
    let published = testnet.client().models().publish(model).await?;
    let name = format!("{}/{}", published.publisher, published.name);
    for replicas in [1, 2] {
        let first = one(&testnet, &name, replicas).await?;
        for _ in 0..WARM_UP {
            one(&testnet, &name, replicas).await?;
        }
        let (mut middle, mut late) = (Vec::new(), Vec::new());
        for _ in 0..args.runs(RUNS) {
            let mut times = Vec::with_capacity(JOBS);
            for _ in 0..JOBS {
                times.push(millis(one(&testnet, &name, replicas).await?));
            }
            middle.push(median(&times));
            late.push(quantile(&times, 0.99));
        }
        let mesh = |what: &str| format!("mesh, k={replicas}: {what}");
        report.add(mesh("the first job, with fetch and image"), "ms", &[millis(first)]);
        report.add_with_target(mesh("submit to verdict, p50"), "ms", &middle, Target::AtMost(TARGET_MS));
        report.add(mesh("submit to verdict, p99"), "ms", &late);
    }
    testnet.shutdown().await;
    Ok(())
}

/// One job, from submit to verdict.
async fn one(testnet: &Testnet, model: &str, replicas: u8) -> Result<Duration> {
    let order = JobOrder::model(model).input(SENTENCE).replicas(replicas);
    let start = Instant::now();
    let result = testnet.client().jobs().submit(order).await?.result().await?;
    let took = start.elapsed();
    ensure!(result.outcome() == Some(Outcome::Completed), "{:?}", result.outcome());
    let output = result.output.as_ref().context("the output comes with the verdict")?;
    ensure!(output.starts_with(b"[0.0676"), "another embedding");
    Ok(took)
}
