//! One process of a bench: a node that does what its parent says, line by line, until standard input ends.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use tokio::sync::broadcast;

use super::args::{BenchNodeArgs, Op};
use super::check;
use super::crew::{Answer, Join, Order, Usage};
use crate::api::Node;
use crate::api::rounds::{Admission, Blamed, Dtype, Group, GroupSpec, Op as Combine, Reducers, RoundSettings, Tensor};
use crate::cli::exit::{CliResult, Exit};
use crate::cli::out::Out;

/// For all processes of the bench to see one another, and for all members to join.
const MEET_WITHIN: Duration = Duration::from_secs(60);

pub(super) fn run(args: &BenchNodeArgs) -> CliResult {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if args.threads > 0 {
        builder.worker_threads(args.threads);
    }
    let runtime = builder.enable_all().build()?;
    let ended = runtime.block_on(serve());
    // The thread that reads standard input is not waited for.
    runtime.shutdown_background();
    ended.map_err(Into::into)
}

async fn serve() -> anyhow::Result<Exit> {
    let out = Out { json: true };
    let mut process = Process::default();
    while let Some(line) = next_line().await? {
        let answer = match process.obey(serde_json::from_str(&line)?).await {
            Ok(answer) => answer,
            Err(error) => Answer::Failed(format!("{error:#}")),
        };
        out.line(&serde_json::to_string(&answer)?)?;
    }
    Ok(Exit::Ok)
}

/// `None`: the parent wants no more, or is gone.
async fn next_line() -> anyhow::Result<Option<String>> {
    let read = || std::io::stdin().lines().next().transpose();
    Ok(tokio::task::spawn_blocking(read).await??)
}

#[derive(Default)]
struct Process {
    node: Option<Node>,
    seat: Option<Seat>,
}

/// A member's.
struct Seat {
    group: Group,
    op: Op,
    /// The member's numbers, kept for the next round.
    numbers: Vec<f32>,
    input: Option<Tensor>,
    result: Option<Tensor>,
    blamed: broadcast::Receiver<Blamed>,
}

impl Process {
    async fn obey(&mut self, order: Order) -> anyhow::Result<Answer> {
        match order {
            Order::Start { network, bootstrap, reducer } => return self.start(&network, &bootstrap, reducer).await,
            Order::Meet { others } => {
                let met = tokio::time::timeout(MEET_WITHIN, self.node()?.wait_for_peers(others)).await;
                met.with_context(|| format!("it does not see {others} others"))?;
            }
            Order::Join(join) => self.seat = Some(sit_down(self.node()?, &join).await?),
            Order::Prepare => self.seat()?.prepare(),
            Order::Go => self.seat()?.go().await?,
            Order::Digest { write } => {
                let result = self.seat()?.result.take().ok_or_else(|| anyhow!("no round has run"))?;
                if let Some(file) = write {
                    std::fs::write(file, result.as_bytes())?;
                }
                return Ok(Answer::Digest(blake3::hash(result.as_bytes()).to_string()));
            }
            Order::Usage => return Ok(Answer::Usage(self.usage()?)),
            Order::Blamed => {
                let mut blamed = Vec::new();
                while let Ok(proven) = self.seat()?.blamed.try_recv() {
                    blamed.push(proven.hotkey);
                }
                return Ok(Answer::Blamed(blamed));
            }
        }
        Ok(Answer::Done)
    }

    async fn start(&mut self, network: &str, bootstrap: &[String], reducer: bool) -> anyhow::Result<Answer> {
        let node = Node::builder()
            .network(crate::Network::named(network, 0))
            .loopback()
            .bootstrap(bootstrap)
            .configure(|config| config.rounds.serve = Some(reducer))
            .start()
            .await?;
        let answer = Answer::Ready { node: node.node_id(), hotkey: node.hotkey(), addresses: node.addresses().await };
        self.node = Some(node);
        Ok(answer)
    }

    fn node(&self) -> anyhow::Result<&Node> {
        self.node.as_ref().ok_or_else(|| anyhow!("not started"))
    }

    fn seat(&mut self) -> anyhow::Result<&mut Seat> {
        self.seat.as_mut().ok_or_else(|| anyhow!("not in a group"))
    }

    fn usage(&self) -> anyhow::Result<Usage> {
        Ok(Usage { cpu_s: cpu_s(), sent: self.node()?.traffic().sent.0, peak: peak() })
    }
}

/// Ticks of /proc's processor times a second: a constant of Linux towards programs, whatever the kernel's own clock is.
const TICKS_PER_S: f64 = 100.0;

/// Processor time of all threads so far, user and system; 0 where the system does not say it as Linux does.
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field is the program's name in brackets and may hold anything; the times are 14 and 15.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_S
}

/// Memory at most so far, bytes; 0 where the system does not say it as Linux does.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default() << 10
}

async fn sit_down(node: &Node, join: &Join) -> anyhow::Result<Seat> {
    const NAME: &str = "bench";
    let rounds = node.rounds();
    let mut spec = GroupSpec::new(NAME, join.members.into());
    spec.min_members = join.members.into();
    spec.admission = Admission::Anyone;
    spec.reducers = Reducers::Nodes(join.reducers.clone());
    spec.settings = RoundSettings {
        mode: join.mode.into(),
        compress: join.compress.into(),
        topology: join.topology.into(),
        ..RoundSettings::default()
    };
    spec.form_within = MEET_WITHIN;
    spec.rank = Some(join.rank);
    let blamed = rounds.blamed();
    let group = match join.rank {
        0 => rounds.create(spec).await?,
        _ => rounds.join(join.creator, NAME, None, &spec).await?,
    };
    if group.rank() != join.rank {
        bail!("rank {} instead of {}", group.rank(), join.rank);
    }
    let numbers = check::tensor(join.seed, join.rank.into(), join.elements);
    Ok(Seat { group, op: join.op, numbers, input: None, result: None, blamed })
}

impl Seat {
    fn prepare(&mut self) {
        self.result = None;
        let brings = self.op != Op::Broadcast || self.group.rank() == 0;
        self.input = Some(match brings {
            true => self.numbers.clone().into(),
            false => Tensor::zeros(Dtype::F32, self.numbers.len()),
        });
    }

    async fn go(&mut self) -> anyhow::Result<()> {
        let input = self.input.take().ok_or_else(|| anyhow!("no tensor was made ready"))?;
        let result = match self.op {
            Op::Sum => self.group.all_reduce(input, Combine::Sum).await,
            Op::Mean => self.group.all_reduce(input, Combine::Mean).await,
            Op::Broadcast => self.group.broadcast(input, 0).await,
        };
        self.result = Some(result?);
        Ok(())
    }
}
