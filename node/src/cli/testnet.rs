//! `testnet`: a mesh on this machine, its work, and how to join it.

mod view;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use sundara_chain::keys;
use sundara_proto::id::{Digest, Hotkey};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::args::{LogArgs, TestnetArgs};
use super::exit::{CliError, CliResult, Exit};
use super::out::{self, Out};
use super::signals::Signals;
use crate::api::{JobFailure, StartError};
use crate::config::{HttpConfig, LogConfig, NetworkFile};
use crate::http::{self, Server};
use crate::telemetry;
use crate::testnet::{ReduceReport, Report, Tally, Testnet, Workload};
use view::View;

/// Jobs of `--exit` without `--jobs`.
const JOBS_DEFAULT: u64 = 100;
/// Jobs in flight: enough to keep the miners busy, few enough that the first verdict is not behind a queue.
const IN_FLIGHT_MAX: usize = 64;
/// Pause between jobs that come without end: the mesh is to be seen working, not to take the machine.
const PACE: Duration = Duration::from_millis(250);
/// How often the view is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(200);

/// What is printed once the mesh stands.
#[derive(Debug, Serialize)]
struct Standing {
    nodes: usize,
    mesh: String,
    validators: Vec<Hotkey>,
    bootstrap: Vec<String>,
    api: Option<String>,
    network_file: PathBuf,
    data_dir: PathBuf,
    logs: Vec<PathBuf>,
    spare_hotkey: Hotkey,
    spare_dir: PathBuf,
    model: String,
    accuracy: f64,
}

pub(super) fn run(args: TestnetArgs, log: &LogArgs) -> CliResult {
    let usage = |message: &str| Err(CliError::new(Exit::Usage, message.to_owned()));
    if usize::from(args.replicas) > usize::from(args.miners) || args.replicas == 0 {
        return usage("--replicas: a job runs on 1 to --miners miners");
    }
    if args.jobs == Some(0) || args.reduce == Some(0) {
        return usage("--jobs, --reduce: at least one");
    }
    let temporary = if args.data_dir.is_none() { Some(tempfile::tempdir()?) } else { None };
    let dir = match (&args.data_dir, &temporary) {
        (Some(dir), _) => dir.clone(),
        (None, Some(temporary)) => temporary.path().to_path_buf(),
        (None, None) => return usage("--data-dir"),
    };
    std::fs::create_dir_all(&dir).with_context(|| format!("--data-dir {}", dir.display()))?;
    let log_file = dir.join("testnet.log");
    start_log(log, &log_file)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let mut signals = Signals::new()?;
        let stop = CancellationToken::new();
        let mut mesh = std::pin::pin!(mesh(&args, &dir, &log_file, stop.clone()));
        // The first signal ends the work, the second one the program.
        tokio::select! {
            ended = mesh.as_mut() => return ended,
            () = signals.next() => stop.cancel(),
        }
        tokio::select! {
            ended = mesh => ended,
            () = signals.next() => Ok(Exit::Interrupted),
        }
    });
    runtime.shutdown_background();
    if !matches!(ended, Ok(Exit::Ok | Exit::Interrupted)) && temporary.is_some() {
        // What happened is in the log; it is worth more than a clean temporary directory.
        let kept = temporary.map(tempfile::TempDir::keep);
        out::note(&format!("the log is in {}", kept.unwrap_or(dir).join("testnet.log").display()));
    }
    ended
}

fn start_log(log: &LogArgs, file: &Path) -> Result<(), CliError> {
    let mut config = LogConfig::default();
    config.file = Some(file.to_path_buf());
    config.level = log.log_level.clone().unwrap_or(config.level);
    config.format = log.log_format.unwrap_or_default();
    // Lines on standard error would tear the view.
    telemetry::init_file_only(&config).map_err(|e| CliError::new(Exit::Usage, e))
}

async fn mesh(args: &TestnetArgs, dir: &Path, log_file: &Path, stop: CancellationToken) -> CliResult {
    let bar = out::spinner(format!("starting {} nodes", args.validators + args.miners + 1));
    let mut builder = Testnet::builder()
        .validators(args.validators.into())
        .miners(args.miners.into())
        .executors_per_miner(args.executors_per_miner.into())
        .byzantine(args.byzantine.into())
        .data_dir(dir);
    if let Some(seed) = args.seed {
        builder = builder.seed(seed);
    }
    if args.processes {
        builder = builder.processes(std::env::current_exe().context("the path of this program")?);
    }
    let testnet = tokio::select! {
        started = builder.start() => started?,
        () = stop.cancelled() => return Ok(Exit::Interrupted),
    };
    let api = serve_api(&testnet, dir).await;
    bar.set_message("publishing the classifier");
    let wanted = args.jobs.or(args.exit.then_some(JOBS_DEFAULT));
    let images = usize::try_from(wanted.unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
    let workload = Arc::new(Workload::publish(testnet.client(), dir, images).await?);
    bar.finish_and_clear();

    let standing = standing(&testnet, &workload, api.as_ref(), dir, log_file)?;
    let out = Out { json: args.json };
    if !args.exit {
        out.show(&standing, in_words)?;
    }
    let started = Instant::now();
    let tally = Arc::new(Mutex::new(Tally::default()));
    let view = View::new(&testnet, args.json);
    let reduce = Mutex::new(args.reduce.map(|_| ReduceReport::default()));
    let work = Work {
        testnet: &testnet,
        workload,
        tally: tally.clone(),
        replicas: args.replicas,
        reduce: &reduce,
        stop: stop.clone(),
    };
    let wall = work.run(wanted, args.reduce, in_flight(args), view, started).await?;
    let mut report = report(&testnet, &tally, wall).await;
    report.reduce = lock(&reduce).take();
    if wanted.is_some() || args.reduce.is_some() || args.exit {
        out.show(&report, view::report)?;
    }
    if !args.exit && !stop.is_cancelled() {
        out::note("the mesh stays up; ctrl-c ends it");
        stop.cancelled().await;
    }
    if let Some(api) = api {
        api.shutdown().await;
    }
    testnet.shutdown().await;
    Ok(match args.exit {
        true if wanted.is_some_and(|wanted| report.jobs.submitted < wanted) => Exit::Interrupted,
        true if report.reduce.as_ref().map(|reduce| reduce.rounds) < args.reduce => Exit::Interrupted,
        true if !report.is_clean() => Exit::Job,
        _ => Exit::Ok,
    })
}

/// The API of the client: at its usual address if that is free, else at another.
async fn serve_api(testnet: &Testnet, dir: &Path) -> Option<Server> {
    let mut config = HttpConfig::default();
    let spool = dir.join("spool");
    if let Ok(server) = http::serve(testnet.client().clone(), &config, spool.clone()).await {
        return Some(server);
    }
    config.listen.set_port(0);
    match http::serve(testnet.client().clone(), &config, spool).await {
        Ok(server) => Some(server),
        Err(error) => {
            tracing::warn!(%error, "the client's API is not served");
            None
        }
    }
}

fn in_flight(args: &TestnetArgs) -> usize {
    let slots = usize::from(args.miners) * usize::from(args.executors_per_miner.max(1));
    (2 * slots / usize::from(args.replicas.max(1))).clamp(1, IN_FLIGHT_MAX)
}

/// Jobs on their way through the mesh.
struct Work<'a> {
    testnet: &'a Testnet,
    workload: Arc<Workload>,
    tally: Arc<Mutex<Tally>>,
    replicas: u8,
    /// Rounds so far, where some are wanted.
    reduce: &'a Mutex<Option<ReduceReport>>,
    stop: CancellationToken,
}

impl Work<'_> {
    /// Runs `wanted` jobs, or jobs without end until it is stopped, and beside them rounds; returns the time from the first
    /// job to the last.
    async fn run(
        &self,
        wanted: Option<u64>,
        rounds: Option<u64>,
        in_flight: usize,
        mut view: View,
        started: Instant,
    ) -> Result<Duration, StartError> {
        let mut running = JoinSet::new();
        let mut reducing = std::pin::pin!(self.rounds(rounds));
        let mut reduced = rounds.is_none();
        let mut last = started.elapsed();
        let mut next = 0_u64;
        let mut draw = tokio::time::interval(DRAW_EVERY);
        let mut pace = tokio::time::interval(PACE);
        loop {
            let more = wanted.is_none_or(|wanted| next < wanted) && !self.stop.is_cancelled();
            if !more && running.is_empty() && (reduced || self.stop.is_cancelled()) {
                break;
            }
            let room = more && running.len() < in_flight;
            tokio::select! {
                _ = draw.tick() => self.show(&mut view, started),
                () = self.stop.cancelled(), if !self.stop.is_cancelled() => {}
                Some(_) = running.join_next() => last = started.elapsed(),
                ended = reducing.as_mut(), if !reduced => {
                    ended?;
                    reduced = true;
                }
                () = ready_for(wanted, &mut pace), if room => {
                    running.spawn(self.job(next));
                    next += 1;
                }
            }
        }
        self.show(&mut view, started);
        Ok(last)
    }

    fn show(&self, view: &mut View, started: Instant) {
        view.draw(&lock(&self.tally), lock(self.reduce).as_ref(), started.elapsed());
    }

    /// All rounds that are wanted, one after another.
    async fn rounds(&self, wanted: Option<u64>) -> Result<(), StartError> {
        let Some(wanted) = wanted else { return Ok(()) };
        let seen = |report: &ReduceReport| *lock(self.reduce) = Some(report.clone());
        self.testnet.reduce(wanted, seen).await.map(drop)
    }

    /// One job, from order to tally.
    fn job(&self, number: u64) -> impl Future<Output = ()> + Send + 'static {
        let (jobs, workload, tally) = (self.testnet.client().jobs(), self.workload.clone(), self.tally.clone());
        let replicas = self.replicas;
        async move {
            let i = usize::try_from(number).unwrap_or_default();
            lock(&tally).submitted();
            let end = match jobs.submit(workload.order(i, replicas)).await {
                Ok(job) => match job.result().await {
                    Ok(result) => job.output().await.map(|output| (result, output)),
                    Err(failure) => Err(failure),
                },
                Err(error) => Err(JobFailure::Failed(error.to_string())),
            };
            match end {
                Ok((result, output)) => lock(&tally).ended(&Ok(result), workload.is_right(i, &output)),
                Err(failure) => {
                    tracing::warn!(number, %failure, "a job of the testnet ended without a result");
                    lock(&tally).ended(&Err(failure), false);
                }
            }
        }
    }
}

/// At once where the number of jobs is fixed, at an even pace where they come without end.
async fn ready_for(wanted: Option<u64>, pace: &mut tokio::time::Interval) {
    if wanted.is_none() {
        pace.tick().await;
    }
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn report(testnet: &Testnet, tally: &Mutex<Tally>, wall: Duration) -> Report {
    for validator in testnet.validators() {
        if let Some(node) = validator.node()
            && let Some(dispatch) = node.status().await.dispatch
        {
            lock(tally).caught(dispatch.caught.iter().map(|caught| caught.miner));
        }
    }
    lock(tally).report(testnet, wall)
}

/// Writes what another node needs to join, and gathers what is printed.
fn standing(
    testnet: &Testnet,
    workload: &Workload,
    api: Option<&Server>,
    dir: &Path,
    log_file: &Path,
) -> Result<Standing, CliError> {
    let mut network = NetworkFile::default();
    network.genesis = Some(Digest(testnet.network().genesis));
    network.netuid = Some(testnet.network().netuid);
    network.bootstrap = testnet.bootstrap().to_vec();
    network.trusted_validators = testnet.validators().iter().map(|validator| validator.hotkey).collect();
    let network_file = dir.join("network.toml");
    std::fs::write(&network_file, toml::to_string(&network).context("network.toml")?)?;
    let spare_dir = dir.join("spare");
    let spare = keys::load_or_create_hotkey(&spare_dir.join("hotkey"))?;
    std::fs::write(spare_dir.join("config.toml"), SPARE_CONFIG)?;
    let children = testnet.validators().iter().chain(testnet.miners()).filter_map(|member| member.log());
    Ok(Standing {
        nodes: testnet.nodes(),
        mesh: testnet.name().to_owned(),
        validators: network.trusted_validators,
        bootstrap: testnet.bootstrap().to_vec(),
        api: api.map(|api| format!("http://{}", api.address())),
        network_file,
        data_dir: dir.to_path_buf(),
        logs: std::iter::once(log_file.to_path_buf()).chain(children.map(Path::to_path_buf)).collect(),
        spare_hotkey: spare.hotkey(),
        spare_dir,
        model: workload.model.clone(),
        accuracy: workload.accuracy(),
    })
}

/// A node on this machine: any free port, reachable on loopback.
const SPARE_CONFIG: &str = "# A node of your own on this testnet.
[net]
listen = [\"/ip4/127.0.0.1/tcp/0\"]
assume_reachable = true
keep_private_addresses = true

[http]
listen = \"127.0.0.1:0\"
";

fn in_words(s: &Standing) -> String {
    let mut lines = vec![format!("A mesh of {} nodes runs here.", s.nodes)];
    let mut add = |label: &str, text: String| lines.push(format!("  {label:<10} {text}"));
    add("mesh", s.mesh.clone());
    for validator in &s.validators {
        add("validator", validator.to_string());
    }
    for address in &s.bootstrap {
        add("bootstrap", address.clone());
    }
    add("api", s.api.clone().unwrap_or_else(|| "not served".to_owned()));
    for log in &s.logs {
        add("log", log.display().to_string());
    }
    add("network", s.network_file.display().to_string());
    add("spare key", format!("{} in {}", s.spare_hotkey, s.spare_dir.display()));
    add("model", format!("{} (right on {:.1} % of the images of this run)", s.model, s.accuracy * 100.0));
    let api = s.api.as_deref().unwrap_or("URL");
    lines.push(String::new());
    lines.push("Submit a job:".to_owned());
    lines.push(format!("  sundara-node job submit --builtin echo --input README.md --replicas 2 --wait --api {api}"));
    lines.push("Attach a miner of your own:".to_owned());
    lines.push(format!(
        "  sundara-node --role miner --network {} --data-dir {}",
        s.network_file.display(),
        s.spare_dir.display()
    ));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spare_nodes_configuration_is_one() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("config.toml"), SPARE_CONFIG).expect("written");
        let flags = vec![("node.data_dir", serde_json::json!(dir.path()), "--data-dir")];
        let sources = crate::config::Sources { flags, ..Default::default() };
        let config = crate::config::Config::resolve(&sources).expect("resolved").value;
        assert!(config.net.assume_reachable);
        assert_eq!(config.http.listen.port(), 0);
    }
}
