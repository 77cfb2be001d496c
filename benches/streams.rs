//! What raw streams carry between two processes on loopback: the ceiling of transfers and of map-reduce rounds.

use std::path::Path;

use anyhow::Result;
use sundara_benches::raw::{self, Pair, Settings};
use sundara_benches::{Args, Parent, Report};

/// Bytes a run moves.
const LEN: u64 = 1 << 30;
/// Runs of each setting.
const RUNS: usize = 5;

fn main() -> Result<()> {
    if let Some(parent) = Parent::of_this() {
        return raw::run_part(&parent).map(drop);
    }
    let args = Args::of_program();
    let dir = args.temp_dir()?;
    let source = dir.path().join("source");
    raw::write_source(&source, LEN)?;
    let best = Settings::default();
    let mut report = Report::new("streams");
    for (name, settings) in [
        ("memory to memory", best.clone()),
        ("  over one connection", Settings { connections: 1, ..best.clone() }),
        ("  without read-ahead", Settings { read_ahead: 0, ..best.clone() }),
        ("  frames of 16 KiB", Settings { split: 16 << 10, ..best.clone() }),
        ("  two workers", Settings { workers: 2, ..best.clone() }),
    ] {
        measure(&mut report, name, &settings, &args, None)?;
    }
    for (name, settings) in [
        ("file to fresh file", best.clone()),
        ("  reads and writes on other threads", Settings { pooled: true, ..best.clone() }),
        ("  the same, two workers", Settings { pooled: true, workers: 2, ..best.clone() }),
    ] {
        measure(&mut report, name, &settings, &args, Some((&source, dir.path())))?;
    }
    report.print(&args)
}

fn measure(
    report: &mut Report,
    name: &str,
    settings: &Settings,
    args: &Args,
    files: Option<(&Path, &Path)>,
) -> Result<()> {
    let mut pair = Pair::start(settings, files.map(|(source, _)| source.to_owned()))?;
    let (mut rates, mut costs) = (Vec::new(), Vec::new());
    for run in 0..=args.runs(RUNS) {
        let sink = files.map(|(_, dir)| dir.join("sink"));
        let carried = pair.carry(LEN, sink.clone())?;
        sink.map(std::fs::remove_file).transpose()?;
        // The first run warms windows, buffers and the page cache.
        if run > 0 {
            let gigabytes = LEN as f64 / 1e9;
            rates.push(gigabytes / carried.seconds);
            costs.push((carried.sender_cpu + carried.receiver_cpu).as_secs_f64() / gigabytes);
        }
    }
    report.add(name, "GB/s", &rates);
    report.add(format!("{name}, processor"), "s/GB", &costs);
    Ok(())
}
