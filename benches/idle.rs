//! What a node uses while nothing happens: `sundara-node --role miner` and `--role light` on an empty data directory, with
//! every other setting as it comes, except that they listen on free ports of the loopback interface.
//!
//! The nodes are this program in another part: it calls what the binary's `main` calls, under the same allocator.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sundara_benches::{Args, Child, Parent, Report, Target, Usage};

/// How long is measured.
const MEASURE: Duration = Duration::from_secs(60);
/// A node has started, and its first retries are over.
const SETTLE: Duration = Duration::from_secs(5);
/// A node listens well before that.
const START: Duration = Duration::from_secs(30);

const NODE: &str = "node";

fn main() -> Result<()> {
    if let Some(parent) = Parent::of_this() {
        let (role, dir): (String, String) = parent.order()?;
        let mut arguments = vec!["sundara-node", "--role", &role, "--data-dir", &dir, "--api", "127.0.0.1:0"];
        arguments.extend(["--listen", "/ip4/127.0.0.1/tcp/0", "--listen", "/ip4/127.0.0.1/udp/0/quic-v1"]);
        std::thread::spawn(move || {
            // Ends with the parent; that it cannot be read any more says the same.
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            std::process::exit(0);
        });
        let exit = sundara_node::cli::run(arguments.into_iter().map(Into::into));
        ensure!(exit == sundara_node::cli::Exit::Ok, "the node ended with {exit:?}");
        return Ok(());
    }
    let args = Args::of_program();
    let dir = args.temp_dir()?;
    let mut nodes = Vec::new();
    for role in ["miner", "light"] {
        let data = dir.path().join(role);
        let order = (role, data.to_str().context("the directory's name is not UTF-8")?);
        nodes.push((role, Child::start(NODE, &order)?));
        wait_for(&data.join("listening.json"))?;
    }
    std::thread::sleep(SETTLE);
    let usage = |nodes: &[(&str, Child)]| nodes.iter().map(|(_, node)| node.usage()).collect::<Result<Vec<Usage>>>();
    let before = usage(&nodes)?;
    std::thread::sleep(MEASURE);
    let after = usage(&nodes)?;
    let mut report = Report::new("idle");
    for (i, (role, _)) in nodes.iter().enumerate() {
        let cpu = after[i].cpu.saturating_sub(before[i].cpu);
        let share = cpu.as_secs_f64() / MEASURE.as_secs_f64() * 100.0;
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        report.add_with_target(format!("{role}, memory"), "MiB", &[mib(after[i].rss)], Target::AtMost(60.0));
        report.add(format!("{role}, memory at its peak"), "MiB", &[mib(after[i].peak_rss)]);
        report.add_with_target(format!("{role}, of a core"), "%", &[share], Target::AtMost(0.5));
    }
    report.print(&args)
}

fn wait_for(file: &Path) -> Result<()> {
    let deadline = Instant::now() + START;
    while !file.exists() {
        ensure!(Instant::now() < deadline, "the node does not listen: its reason is above");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
