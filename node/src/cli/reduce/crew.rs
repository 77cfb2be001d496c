//! The processes of a bench as their parent has them: started, spoken to, killed. And the words of both sides.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use futures::future::try_join_all;
use serde::{Deserialize, Serialize};
use sundara_proto::id::{Hotkey, NodeId};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout, Command};

use super::args::{BenchArgs, Compress, Mode, Op, Topology};
use crate::api::rounds::Rank;

/// For any answer: longer than a slow machine takes for a round of gigabytes.
const ANSWER_WITHIN: Duration = Duration::from_secs(600);

/// What the parent wants, a line each. Every order has one answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// Be a node. Answered by [`Answer::Ready`].
    Start { network: String, bootstrap: Vec<String>, reducer: bool },
    /// See so many others. Answered by [`Answer::Done`], as is all that follows unless it says otherwise.
    Meet { others: usize },
    /// Make the group, or join it.
    Join(Box<Join>),
    /// Make the tensor ready for the next round.
    Prepare,
    /// Run a round.
    Go,
    /// Say what the last round's result is, and write it to a file. Answered by [`Answer::Digest`].
    Digest { write: Option<PathBuf> },
    /// Say what was used so far. Answered by [`Answer::Usage`].
    Usage,
    /// Say who was proven to have lied. Answered by [`Answer::Blamed`].
    Blamed,
}

/// A member's place.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Join {
    pub(super) rank: Rank,
    pub(super) members: u16,
    /// The member of rank 0.
    pub(super) creator: (NodeId, Hotkey),
    pub(super) reducers: Vec<NodeId>,
    pub(super) mode: Mode,
    pub(super) compress: Compress,
    pub(super) topology: Topology,
    pub(super) op: Op,
    pub(super) seed: u64,
    pub(super) elements: usize,
}

/// What a child says, a line each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    Ready { node: NodeId, hotkey: Hotkey, addresses: Vec<String> },
    Done,
    Digest(String),
    Usage(Usage),
    Blamed(Vec<Hotkey>),
    Failed(String),
}

/// What a process used since its start.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Usage {
    /// Seconds of processor, all its threads.
    pub(super) cpu_s: f64,
    /// Bytes sent, with all that encryption and framing add.
    pub(super) sent: u64,
    /// Memory at most, bytes.
    pub(super) peak: u64,
}

impl Usage {
    /// What came on top since `before`.
    pub(super) fn since(&self, before: Option<&Self>) -> Self {
        let before = before.copied().unwrap_or_default();
        Self { cpu_s: self.cpu_s - before.cpu_s, sent: self.sent - before.sent, peak: self.peak }
    }
}

/// One process. Killed when dropped; ends by itself when this process is gone without having dropped it.
struct Child {
    name: String,
    process: tokio::process::Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    log: PathBuf,
}

impl Child {
    fn start(name: String, threads: usize, dir: &Path) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let mut process = Command::new(std::env::current_exe().context("the path of this program")?)
            .args(["reduce", "bench-node", "--threads", &threads.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log)?)
            // A terminal's ctrl-c is for this process.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{name} cannot be started"))?;
        let input = process.stdin.take().ok_or_else(|| anyhow!("{name} has no input"))?;
        let output = process.stdout.take().ok_or_else(|| anyhow!("{name} has no output"))?;
        Ok(Self { name, process, input, output: BufReader::new(output).lines(), log })
    }

    async fn tell(&mut self, order: &Order) -> anyhow::Result<()> {
        let line = serde_json::to_string(order)? + "\n";
        self.input.write_all(line.as_bytes()).await.with_context(|| self.ended())
    }

    async fn hear(&mut self) -> anyhow::Result<Answer> {
        let line = tokio::time::timeout(ANSWER_WITHIN, self.output.next_line()).await;
        let line = line.map_err(|_| anyhow!("{} does not answer", self.name))??;
        match serde_json::from_str(&line.ok_or_else(|| anyhow!(self.ended()))?)? {
            Answer::Failed(reason) => bail!("{}: {reason}", self.name),
            answer => Ok(answer),
        }
    }

    async fn ask(&mut self, order: &Order) -> anyhow::Result<Answer> {
        self.tell(order).await?;
        self.hear().await
    }

    fn ended(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(3).collect();
        format!("{} has ended: {}", self.name, last.into_iter().rev().collect::<Vec<_>>().join(" | "))
    }
}

/// Tells all of them, and waits for all answers.
async fn ask_all(children: &mut [Child], order: &Order) -> anyhow::Result<Vec<Answer>> {
    for child in children.iter_mut() {
        child.tell(order).await?;
    }
    try_join_all(children.iter_mut().map(Child::hear)).await
}

/// All processes of a bench.
pub(super) struct Crew {
    members: Vec<Child>,
    reducers: Vec<Child>,
}

impl Crew {
    /// Starts them, makes them one mesh and the members one group.
    pub(super) async fn start(args: &BenchArgs, dir: &Path) -> anyhow::Result<Self> {
        let network = format!("reduce-bench-{:016x}", rand::random::<u64>());
        let (mut members, mut reducers) = (Vec::new(), Vec::new());
        let (mut bootstrap, mut identities) = (Vec::new(), Vec::new());
        for i in 0..usize::from(args.members) + args.reducers_apart() {
            let reducer = i.checked_sub(args.members.into());
            let name = reducer.map_or_else(|| format!("member-{i}"), |reducer| format!("reducer-{reducer}"));
            let mut child = Child::start(name, args.threads, dir)?;
            let start =
                Order::Start { network: network.clone(), bootstrap: bootstrap.clone(), reducer: reducer.is_some() };
            let Answer::Ready { node, hotkey, addresses } = child.ask(&start).await? else {
                bail!("{} did not start", child.name);
            };
            bootstrap.extend(addresses);
            identities.push((node, hotkey));
            if reducer.is_some() { &mut reducers } else { &mut members }.push(child);
        }
        let mut crew = Self { members, reducers };
        let meet = Order::Meet { others: identities.len() - 1 };
        ask_all(&mut crew.members, &meet).await?;
        ask_all(&mut crew.reducers, &meet).await?;
        let join = |rank: usize| Join {
            rank: Rank::try_from(rank).unwrap_or(Rank::MAX),
            members: args.members,
            creator: identities[0],
            reducers: identities[args.members.into()..].iter().map(|(node, _)| *node).collect(),
            mode: args.mode,
            compress: args.compress,
            topology: args.topology,
            op: args.op,
            seed: args.seed,
            elements: args.elements(),
        };
        for (rank, child) in crew.members.iter_mut().enumerate() {
            child.tell(&Order::Join(Box::new(join(rank)))).await?;
        }
        try_join_all(crew.members.iter_mut().map(Child::hear)).await?;
        Ok(crew)
    }

    /// Tells all members, and waits until all have answered.
    pub(super) async fn members(&mut self, order: &Order) -> anyhow::Result<Vec<Answer>> {
        ask_all(&mut self.members, order).await
    }

    /// The same, and kills the process of a reducer after a time.
    pub(super) async fn members_while_one_is_killed(&mut self, order: &Order, after: Duration) -> anyhow::Result<()> {
        let mut victim = self.reducers.pop().ok_or_else(|| anyhow!("there is no reducer to kill"))?;
        let kill = async {
            tokio::time::sleep(after).await;
            victim.process.kill().await.context("the reducer cannot be killed")
        };
        tokio::try_join!(ask_all(&mut self.members, order), kill).map(drop)
    }

    /// Asks one member.
    pub(super) async fn member(&mut self, rank: usize, order: &Order) -> anyhow::Result<Answer> {
        let child = self.members.get_mut(rank).ok_or_else(|| anyhow!("no member {rank}"))?;
        child.ask(order).await
    }

    /// What each used so far: members by rank, then reducers.
    pub(super) async fn usage(&mut self) -> anyhow::Result<BTreeMap<usize, Usage>> {
        let mut answers = ask_all(&mut self.members, &Order::Usage).await?;
        answers.extend(ask_all(&mut self.reducers, &Order::Usage).await?);
        let usage = |answer| match answer {
            Answer::Usage(usage) => Ok(usage),
            other => Err(anyhow!("asked for its usage, a process answered {other:?}")),
        };
        answers.into_iter().map(usage).enumerate().map(|(i, usage)| Ok((i, usage?))).collect()
    }

    /// Whom any member proved to have lied.
    pub(super) async fn blamed(&mut self) -> anyhow::Result<BTreeSet<Hotkey>> {
        let answers = ask_all(&mut self.members, &Order::Blamed).await?;
        let lists = answers.into_iter().map(|answer| match answer {
            Answer::Blamed(blamed) => Ok(blamed),
            other => Err(anyhow!("asked whom it blames, a member answered {other:?}")),
        });
        Ok(lists.collect::<anyhow::Result<Vec<_>>>()?.into_iter().flatten().collect())
    }
}
