//! What a person sees of a testnet while it works, and at the end.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use crossterm::cursor::MoveToPreviousLine;
use crossterm::terminal::{Clear, ClearType};

use crate::testnet::{ReduceReport, Report, Tally, Testnet};

/// Draws over itself on standard error, where that is a terminal.
pub(super) struct View {
    nodes: String,
    /// Lines drawn last time; `None` draws nothing.
    drawn: Option<u16>,
}

impl View {
    pub(super) fn new(testnet: &Testnet, json: bool) -> Self {
        let byzantine = testnet.miners().iter().filter(|miner| miner.misbehaviour.is_some()).count();
        let (validators, miners) = (testnet.validators().len(), testnet.miners().len());
        let nodes = format!(
            "{} nodes: {validators} validator(s), {miners} miners ({byzantine} byzantine), 1 client",
            testnet.nodes()
        );
        Self { nodes, drawn: (!json && io::stderr().is_terminal()).then_some(0) }
    }

    /// Draws the state; what cannot be drawn is left out.
    pub(super) fn draw(&mut self, tally: &Tally, reduce: Option<&ReduceReport>, elapsed: Duration) {
        let Some(drawn) = self.drawn else { return };
        let mut lines = lines(&self.nodes, tally, elapsed);
        lines.extend(reduce.map(|reduce| format!("rounds    {}", rounds(reduce))));
        let mut err = io::stderr().lock();
        let back = match drawn {
            0 => Ok(()),
            lines => crossterm::queue!(err, MoveToPreviousLine(lines), Clear(ClearType::FromCursorDown)),
        };
        let shown = back.and_then(|()| writeln!(err, "{}", lines.join("\n"))).and_then(|()| err.flush());
        self.drawn = shown.ok().and_then(|()| u16::try_from(lines.len()).ok());
    }
}

fn lines(nodes: &str, tally: &Tally, elapsed: Duration) -> Vec<String> {
    let (jobs, latency) = (tally.counts(), tally.latency());
    let ended = jobs.verified + jobs.failed + jobs.rejected;
    let rate = if elapsed.is_zero() { 0.0 } else { jobs.verified as f64 / elapsed.as_secs_f64() };
    vec![
        format!("nodes     {nodes}"),
        format!(
            "jobs      {} submitted, {} running, {rate:.1} verified a second",
            jobs.submitted,
            jobs.submitted - ended
        ),
        format!(
            "verdicts  {} verified, {} rejected, {} failed; p50 {:.1} ms, p99 {:.1} ms",
            jobs.verified, jobs.rejected, jobs.failed, latency.p50, latency.p99
        ),
        format!("caught    {} miner(s)", tally.caught_count()),
    ]
}

fn rounds(r: &ReduceReport) -> String {
    let right = if r.correct || r.rounds == 0 { "" } else { ", NOT ALL RIGHT" };
    format!("{} all-reduces in {:.2} s{right}, {} reducer(s) blamed", r.rounds, r.wall_s, r.blamed.len())
}

/// A report for people.
pub(super) fn report(r: &Report) -> String {
    let mut lines = vec![
        format!(
            "{} jobs over {} nodes in {:.2} s: {} verified, {} rejected, {} failed",
            r.jobs.submitted, r.nodes, r.wall_s, r.jobs.verified, r.jobs.rejected, r.jobs.failed
        ),
        format!(
            "{:.1} jobs a second; submitted to verdict p50 {:.1} ms, p99 {:.1} ms",
            r.jobs_per_second, r.latency_ms.p50, r.latency_ms.p99
        ),
    ];
    lines.extend(r.reduce.as_ref().map(rounds));
    for miner in &r.miners {
        let honest = match (miner.byzantine, miner.caught) {
            (false, false) => "honest",
            (false, true) => "honest, and blamed",
            (true, true) => "byzantine, caught",
            (true, false) => "byzantine, not caught",
        };
        lines.push(format!("  {}  {:>6} jobs  {honest}", miner.hotkey, miner.jobs));
    }
    lines.join("\n")
}
