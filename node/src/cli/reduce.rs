//! `reduce`: map-reduce from the command line. `bench` runs rounds between processes on this machine and measures them.
//!
//! ```text
//! bench ──lines of JSON──▶ bench-node (a member each, then a reducer each) ══ the mesh, on loopback ══ bench-node
//! ```
//!
//! Invariants: a round's time begins when all members are told to go and ends when all have said that they are done; what
//! the bench itself does to tensors (copies, digests, the check) is outside of it, in time and in processor time. The check
//! knows nothing of the mesh: it makes the members' numbers again and adds them in f64.

mod args;
mod check;
mod child;
mod crew;
mod report;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;

pub(super) use args::ReduceCommand;

use super::args::LogArgs;
use super::exit::{CliError, CliResult, Exit};
use super::out::{self, Out};
use super::signals::Signals;
use args::BenchArgs;
use crew::{Answer, Crew, Order, Usage};
use report::{Kill, Report, Spread};

pub(super) fn run(command: ReduceCommand, log: &LogArgs) -> CliResult {
    super::quiet(log)?;
    match command {
        ReduceCommand::Bench(args) => bench(&args),
        ReduceCommand::BenchNode(args) => child::run(&args),
    }
}

fn bench(args: &BenchArgs) -> CliResult {
    args.check().map_err(|message| CliError::new(Exit::Usage, message))?;
    let dir = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let mut signals = Signals::new()?;
        tokio::select! {
            ended = measure(args, dir.path()) => ended,
            () = signals.next() => Ok(Exit::Interrupted),
        }
    });
    if ended.is_err() {
        // What the processes said is worth more than a clean temporary directory.
        out::note(&format!("the logs are in {}", dir.keep().display()));
    }
    ended
}

async fn measure(args: &BenchArgs, dir: &Path) -> CliResult {
    let bar = out::count_bar("starting".to_owned(), u64::from(args.rounds) + 1);
    let mut bench = Bench { args, crew: Crew::start(args, dir).await?, walls: Vec::new() };
    bar.set_message("checked round");
    let file = dir.join("result");
    let first = bench.round(Some(&file), None).await?;
    bar.inc(1);
    let error = check::error(&file, args).context("the result of the checked round")?;
    std::fs::remove_file(&file)?;
    let mut correct = error <= args.error_max() && first.same();
    let mut rounds = Vec::new();
    bar.set_message("rounds");
    for _ in 0..args.rounds {
        let round = bench.round(None, None).await?;
        bench.walls.push(round.wall);
        correct &= round.agrees_with(&first, args);
        rounds.push(round);
        bar.inc(1);
    }
    let clean = report::median(&bench.walls);
    let kill = match args.kill_reducer {
        true => {
            bar.set_message("round in which a reducer is killed");
            let round = bench.round(None, Some(Duration::from_secs_f64(clean / 2.0))).await?;
            correct &= round.agrees_with(&first, args);
            Some(Kill { wall_s: round.wall, of_clean: round.wall / clean })
        }
        false => None,
    };
    bar.finish_and_clear();
    let blamed = bench.crew.blamed().await?;
    let report = Report::new(args, &rounds, error, correct, blamed, kill);
    Out { json: args.json }.show(&report, report::in_words)?;
    Ok(if correct { Exit::Ok } else { Exit::Failure })
}

/// What one round came to.
struct Round {
    /// Seconds.
    wall: f64,
    /// Seconds of processor, all processes.
    cpu: f64,
    /// Bytes that all processes sent.
    wire: u64,
    /// Bytes that each member sent.
    uploads: Vec<u64>,
    /// Bytes of memory at most, beyond the tensors: each member, each reducer.
    members_peak: Vec<u64>,
    reducers_peak: Vec<u64>,
    /// Of each member's result.
    digests: Vec<String>,
}

impl Round {
    /// Whether all members got the same.
    fn same(&self) -> bool {
        self.digests.windows(2).all(|pair| pair[0] == pair[1])
    }

    /// Whether they also got what they got in the checked round. Compressed rounds carry what was left away to the next
    /// one, so their results differ.
    fn agrees_with(&self, checked: &Self, args: &BenchArgs) -> bool {
        self.same() && (args.carries_errors() || self.digests.first() == checked.digests.first())
    }
}

struct Bench<'a> {
    args: &'a BenchArgs,
    crew: Crew,
    walls: Vec<f64>,
}

impl Bench<'_> {
    /// One round; the first member writes its result to `file`, and a reducer is killed after `kill`.
    async fn round(&mut self, file: Option<&Path>, kill: Option<Duration>) -> anyhow::Result<Round> {
        let crew = &mut self.crew;
        crew.members(&Order::Prepare).await?;
        let before = crew.usage().await?;
        let began = Instant::now();
        match kill {
            None => drop(crew.members(&Order::Go).await?),
            Some(after) => crew.members_while_one_is_killed(&Order::Go, after).await?,
        }
        let wall = began.elapsed().as_secs_f64();
        let after = crew.usage().await?;
        let mut digests = Vec::new();
        let mut write = file.map(Path::to_path_buf);
        let members = usize::from(self.args.members);
        for i in 0..members {
            // One after another: the file is the first one's.
            match crew.member(i, &Order::Digest { write: write.take() }).await? {
                Answer::Digest(digest) => digests.push(digest),
                other => anyhow::bail!("a member answered {other:?}"),
            }
        }
        let spent: Vec<Usage> = after.iter().map(|(who, usage)| usage.since(before.get(who))).collect();
        let is_member = |i: &usize| *i < members;
        let peaks = |members: bool, held: u64| {
            let all = after.iter().filter(|(who, _)| is_member(who) == members);
            all.map(|(_, usage)| usage.peak.saturating_sub(held)).collect()
        };
        Ok(Round {
            wall,
            cpu: spent.iter().map(|usage| usage.cpu_s).sum(),
            wire: spent.iter().map(|usage| usage.sent).sum(),
            uploads: after.iter().zip(&spent).filter(|((who, _), _)| is_member(who)).map(|(_, u)| u.sent).collect(),
            members_peak: peaks(true, self.args.held_by_a_member()),
            reducers_peak: peaks(false, 0),
            digests,
        })
    }
}

impl Spread {
    fn of(samples: &[f64]) -> Self {
        Self {
            median: report::median(samples),
            min: samples.iter().copied().fold(f64::INFINITY, f64::min),
            max: samples.iter().copied().fold(0.0, f64::max),
        }
    }
}
