//! Small wasm jobs through a whole mesh on loopback, beside Ray's no-op tasks on the same machine in the same run.
//!
//! A validator, three miners and a light node in one process, real sockets and stores. One replica, the steady audit
//! rate; every result is attested, persisted, and given a signed verdict that the requester checks. Ray is measured where
//! `python3` (or `$SUNDARA_RAY_PYTHON`) has it; it neither verifies nor keeps anything.
//!
//! Latency is from submit to verdict, one job at a time. CPU is that of the whole machine, so it must be idle otherwise.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures::StreamExt as _;
use serde::Deserialize;
use sundara_benches::{Args, Report, Target, median, quantile};
use sundara_node::testnet::Testnet;
use sundara_node::{JobOrder, Node};

/// Reads at most 64 bytes and writes them: about the least that a command can do.
const ECHO: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64))
    (i32.store (i32.const 4) (i32.const 64))
    (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
    (i32.store (i32.const 4) (i32.load (i32.const 8)))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"#;

const MANIFEST: &str = r#"name = "echo"
version = 1
engine = "wasm"
program = "echo.wasm"
description = "Writes what it reads"
license = "MIT"

[determinism]
class = "exact"
"#;

/// Jobs before anything is measured: enough audits that each miner is audited at the steady rate.
const WARM_UP: usize = 1_000;
/// Jobs one at a time.
const SINGLES: usize = 2_000;
/// Jobs of one round of the throughput measurement.
const BATCH: usize = 5_000;
/// Of these, so many in flight.
const IN_FLIGHT: usize = 512;

/// One system's figures, a sample a round.
#[derive(Debug, Deserialize)]
struct Figures {
    per_second: Vec<f64>,
    /// Of the whole machine, a job.
    cpu_us: Vec<f64>,
    /// Waits of single jobs.
    ms: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::of_program();
    let rounds = args.runs(5);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (ours, audited) = runtime.block_on(ours(rounds))?;
    drop(runtime);
    let ray = ray(rounds)?;
    let mut report = Report::new("jobs");
    report.add_with_target("submit to verdict, p50", "ms", &[quantile(&ours.ms, 0.5)], Target::AtMost(3.0));
    report.add("submit to verdict, p99", "ms", &[quantile(&ours.ms, 0.99)]);
    report.add("jobs a second", "", &ours.per_second);
    report.add("CPU a job", "us", &ours.cpu_us);
    report.add("share of jobs audited", "", &[audited]);
    if let Some(ray) = ray {
        report.add("ray: p50", "ms", &[quantile(&ray.ms, 0.5)]);
        report.add("ray: p99", "ms", &[quantile(&ray.ms, 0.99)]);
        report.add("ray: tasks a second", "", &ray.per_second);
        report.add("ray: CPU a task", "us", &ray.cpu_us);
        let rate = median(&ours.per_second) / median(&ray.per_second);
        report.add_with_target("rate / ray's", "", &[rate], Target::AtLeast(1.0));
        let cpu = median(&ours.cpu_us) / median(&ray.cpu_us);
        report.add_with_target("CPU / ray's", "", &[cpu], Target::AtMost(1.0));
    }
    report.print(&args)
}

async fn ours(rounds: usize) -> anyhow::Result<(Figures, f64)> {
    let testnet = Testnet::builder().start().await?;
    let client = testnet.client();
    let source = testnet.data_dir().join("echo-model");
    std::fs::create_dir_all(&source)?;
    std::fs::write(source.join("echo.wasm"), wat::parse_str(ECHO)?)?;
    std::fs::write(source.join("model.toml"), MANIFEST)?;
    client.models().publish(&source).await?;
    let model = format!("{}/echo", client.hotkey());
    let mut number = 0_u64;
    let mut order = || {
        number += 1;
        // Distinct inputs, so that no two jobs are one.
        JobOrder::model(model.clone()).input(number.to_le_bytes().to_vec())
    };
    round(client, (0..WARM_UP).map(|_| order()).collect()).await?;
    let audits = audits_of(&testnet).await;
    let mut figures = Figures { per_second: Vec::new(), cpu_us: Vec::new(), ms: Vec::new() };
    for _ in 0..SINGLES {
        let start = Instant::now();
        run(client, order()).await?;
        figures.ms.push(start.elapsed().as_secs_f64() * 1e3);
    }
    for _ in 0..rounds {
        let orders: Vec<JobOrder> = (0..BATCH).map(|_| order()).collect();
        let (cpu, start) = (machine_cpu_seconds()?, Instant::now());
        round(client, orders).await?;
        figures.per_second.push(BATCH as f64 / start.elapsed().as_secs_f64());
        figures.cpu_us.push((machine_cpu_seconds()? - cpu) / BATCH as f64 * 1e6);
    }
    let measured = audits_of(&testnet).await - audits;
    testnet.shutdown().await;
    Ok((figures, measured as f64 / (SINGLES + rounds * BATCH) as f64))
}

/// Verdicts after an audit so far.
async fn audits_of(testnet: &Testnet) -> u64 {
    let mut audits = 0;
    for node in testnet.validators().iter().filter_map(|v| v.node()) {
        audits += node.status().await.dispatch.map_or(0, |d| d.verdicts[1]);
    }
    audits
}

async fn round(client: &Node, orders: Vec<JobOrder>) -> anyhow::Result<()> {
    let mut jobs = futures::stream::iter(orders).map(|order| run(client, order)).buffer_unordered(IN_FLIGHT);
    while let Some(result) = jobs.next().await {
        result?;
    }
    Ok(())
}

async fn run(client: &Node, order: JobOrder) -> anyhow::Result<()> {
    let result = tokio::time::timeout(Duration::from_secs(120), async {
        anyhow::Ok(client.jobs().submit(order).await?.result().await?)
    })
    .await
    .context("a job hangs")??;
    ensure!(result.output.as_ref().is_some_and(|o| o.len() == 8), "a wrong output: {:?}", result.output);
    Ok(())
}

/// Ray's figures, or `None` where it is not installed.
fn ray(rounds: usize) -> anyhow::Result<Option<Figures>> {
    let python = std::env::var("SUNDARA_RAY_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has_ray = std::process::Command::new(&python).args(["-c", "import ray"]).output();
    if !has_ray.is_ok_and(|o| o.status.success()) {
        eprintln!("ray is not installed for {python}: pip install ray, or set SUNDARA_RAY_PYTHON");
        return Ok(None);
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/compare/ray_noop.py");
    let numbers = [rounds, BATCH, SINGLES].map(|n| n.to_string());
    let output = std::process::Command::new(&python).arg(script).args(numbers).output()?;
    ensure!(output.status.success(), "ray failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(Some(serde_json::from_slice(&output.stdout)?))
}

/// Busy time of all cores since the start of the machine.
fn machine_cpu_seconds() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat").context("/proc/stat (this bench needs Linux)")?;
    let first = stat.lines().next().unwrap_or_default();
    // user, nice, system, idle, iowait, irq, softirq, in ticks of 10 ms.
    let ticks: Vec<f64> = first.split_whitespace().skip(1).filter_map(|t| t.parse().ok()).collect();
    ensure!(ticks.len() >= 7, "/proc/stat begins with `{first}`");
    Ok((ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]) / 100.0)
}
