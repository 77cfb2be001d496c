//! Map-reduce of tensors through the mesh: this node as a member, as a leader, and as a reducer.
//!
//! **Owns** groups, the rounds that run, the lanes between members and reducers. **Does not own** decisions (those of
//! [`crate::domain::round`]), nor what words, roots and tags are (`sundara_proto::rules::round`).
//!
//! ```text
//!  api ── RoundsHandle ── follow ──RoundReady──▶ leader (one task a round, on the lowest live rank)
//!                           │  ◀──Open, Amend, Close──
//!                           └─ member (one task a round) ══ lanes ══ reducer (one task a round, on each reducer)
//!                                    └── workers: quantise, hash, tags           └── workers: sum
//! ```
//!
//! | file | holds |
//! | --- | --- |
//! | `group` | groups, and what earlier rounds have shown of their reducers |
//! | `join` | how groups come about |
//! | `follow`, `member` | a member's way through a round |
//! | `leader` | who opens, amends and closes it |
//! | `serve`, `reducer`, `transcripts` | the reducer's side |
//! | `lane`, `buffers` | words and messages between the two |
//! | `compute`, `tensor`, `evidence`, `terms` | pure parts |
//!
//! Invariants: what a peer can make this node hold is bounded by the windows of the rounds that it admitted; a member's
//! tensor is read until its round ends and never written; nothing is handed out before the leader's Close.

mod buffers;
mod compute;
mod evidence;
mod follow;
mod group;
mod join;
mod lane;
mod leader;
mod member;
mod reducer;
mod serve;
mod tensor;
mod terms;
mod transcripts;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sundara_proto::crypto::{HotkeyPair, Network, Signed};
use sundara_proto::id::{GroupId, Hotkey, NodeId, RoundId};
use sundara_proto::round::{Evidence, Rank, RoundOp, RoundProof, StateDigest};
use sundara_proto::units::ByteCount;
use tokio::sync::mpsc;

use crate::blobs::{Blobs, TransferHandle};
use crate::net::{NetHandle, RequestKind};
use crate::service::{Tasks, Workers};
use crate::services::directory::Directory;

pub use group::{GroupTimes, Reducers};
pub use join::{Admission, GroupSpec, JoinError};
pub use tensor::{Tensor, TensorError};

use buffers::Buffers;
use group::Group;
use lane::Lane;
use transcripts::Transcripts;

/// Settings of map-reduce: section `rounds`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RoundsConfig {
    /// Lend this node's bandwidth and memory to groups of others. A miner does so by itself.
    pub serve: Option<bool>,
    /// Rounds of others served at once.
    pub served_max: usize,
    /// Memory lent to rounds of others; 0: half of what is free beyond 500 MiB when a round asks.
    pub memory_max: ByteCount,
    /// Hotkeys whose groups are served; empty: anyone's.
    pub leaders: Vec<Hotkey>,
}

impl Default for RoundsConfig {
    /// 64 rounds with windows of 40 MiB each stay within what a small machine has.
    fn default() -> Self {
        Self { serve: None, served_max: 64, memory_max: ByteCount(0), leaders: Vec::new() }
    }
}

/// How a node misbehaves in rounds, to show that it is caught. Not reachable from any file or flag of a real node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lie {
    /// It does not.
    #[default]
    None,
    /// A reducer changes one integer of each piece of a sum.
    Flip,
    /// A reducer leaves the last member out, and says that it did not.
    Drop,
    /// A reducer adds the last member twice.
    Double,
    /// A reducer subtracts the last member.
    Negate,
    /// A reducer commits to one sum before most members and to another before the last.
    TwoSums,
    /// A reducer takes everything and sums nothing.
    Stall,
    /// A reducer signs for nothing.
    NoReceipts,
    /// A member tells a false checksum.
    Tags,
}

/// Why a round came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
#[non_exhaustive]
pub struct RoundFailure {
    /// In words.
    pub reason: String,
    /// Because of whom, where that can be said.
    pub ranks: Vec<Rank>,
}

impl RoundFailure {
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), ranks: Vec::new() }
    }

    fn members(reason: impl Into<String>, ranks: Vec<Rank>) -> Self {
        Self { reason: reason.into(), ranks }
    }

    fn closed() -> Self {
        Self::new("the node is shutting down")
    }
}

/// What a round came to, the same for every member.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Outcome {
    /// The round.
    pub round: RoundId,
    /// The results, as many and as long as the tensors that went in.
    pub tensors: Vec<Tensor>,
    /// Ranks that the round opened with.
    pub members: Vec<Rank>,
    /// Ranks that left in mid-round.
    pub dropped: Vec<Rank>,
    /// How many members are in each chunk of the result: the divisor of a mean.
    pub participants: Vec<u16>,
    /// From the round's opening to its close.
    pub took: Duration,
}

/// Somebody was proven to have lied.
#[derive(Clone, Debug)]
pub struct Blamed {
    /// Who.
    pub hotkey: Hotkey,
    /// What proves it.
    pub evidence: Evidence,
}

/// A round that is over, and the leader's word on it.
type Closed = ((GroupId, u64), sundara_proto::pb::Signed);

/// Closed rounds remembered, for members whose leader died while it told them.
const CLOSED_MAX: usize = 64;

/// Cases of blame that wait to be told.
const BLAMED_QUEUED_MAX: usize = 256;

/// What the tasks of this service share.
pub(crate) struct Ctx {
    network: Network,
    key: HotkeyPair,
    net: NetHandle,
    directory: Directory,
    blobs: Blobs,
    transfer: TransferHandle,
    tasks: Tasks,
    workers: Workers,
    lanes: Lanes,
    buffers: Buffers,
    transcripts: Arc<Transcripts>,
    leading: Leading,
    groups: Mutex<HashMap<GroupId, Arc<Group>>>,
    creating: join::Creating,
    closed: Mutex<std::collections::VecDeque<Closed>>,
    lie: Lie,
    blamed: tokio::sync::broadcast::Sender<Blamed>,
}

impl Ctx {
    /// Runs a task until it ends, or the node goes down.
    fn spawn(&self, name: &str, future: impl Future<Output = ()> + Send + 'static) {
        let token = self.tasks.token();
        self.tasks.spawn(name, async move {
            tokio::select! {
                () = token.cancelled() => {}
                () = future => {}
            }
        });
    }

    /// Runs `work` on a worker thread, after what waits already.
    fn compute(&self, work: impl FnOnce() + Send + 'static) {
        let workers = self.workers.clone();
        self.spawn("work", async move {
            // It only fails when the node goes down, or by a mistake in our own code, which the log has.
            if let Err(e) = workers.run(work).await {
                tracing::error!(error = %e, "work of a round failed");
            }
        });
    }

    /// Tells the mesh of a lie that is proven.
    fn proven(self: &Arc<Self>, hotkey: Hotkey, evidence: &Evidence) {
        tracing::warn!(%hotkey, "somebody lied in a round, and it is proven");
        // Nobody may be listening here.
        drop(self.blamed.send(Blamed { hotkey, evidence: evidence.clone() }));
        let proof = RoundProof { network: self.network, accused: hotkey, evidence: evidence.clone() };
        let proof = Signed::sign(&self.network, &self.key, proof);
        let ctx = self.clone();
        self.spawn("tell", async move {
            let kind = Some(sundara_proto::pb::gossip::Kind::RoundProof(proof.to_wire()));
            let told = ctx.net.publish(crate::net::Topic::Proofs, sundara_proto::pb::Gossip { kind }).await;
            if let Err(e) = told {
                tracing::debug!(error = %e, "a proof was not told to the mesh");
            }
        });
    }

    /// Remembers how a round ended.
    fn note_closed(&self, group: GroupId, seq: u64, close: sundara_proto::pb::Signed) {
        let mut closed = lock(&self.closed);
        closed.push_back(((group, seq), close));
        if closed.len() > CLOSED_MAX {
            closed.pop_front();
        }
    }

    /// How a round ended, if it did.
    fn closed(&self, group: GroupId, seq: u64) -> Option<sundara_proto::pb::Signed> {
        lock(&self.closed).iter().find(|(place, _)| *place == (group, seq)).map(|(_, close)| close.clone())
    }

    fn group(&self, id: &GroupId) -> Option<Arc<Group>> {
        lock(&self.groups).get(id).cloned()
    }
}

/// Lanes to reducers, one a node, made when they are first needed.
#[derive(Default)]
struct Lanes {
    open: Mutex<HashMap<NodeId, Arc<tokio::sync::Mutex<Option<Lane>>>>>,
}

impl Lanes {
    /// The lane to a node.
    async fn get(&self, ctx: &Ctx, node: NodeId) -> Result<Lane, String> {
        let slot = lock(&self.open).entry(node).or_default().clone();
        let mut slot = slot.lock().await;
        if let Some(lane) = slot.as_ref().filter(|lane| !lane.is_over()) {
            return Ok(lane.clone());
        }
        let lane = lane::open(&ctx.net, &ctx.directory, node, &ctx.tasks).await?;
        *slot = Some(lane.clone());
        Ok(lane)
    }
}

/// Rounds that this node leads, or may have to.
#[derive(Default)]
struct Leading {
    state: Mutex<LeadingState>,
}

#[derive(Default)]
struct LeadingState {
    /// By group and number: where members' requests go, and the other end until the leader starts.
    waiting: HashMap<(GroupId, u64), Inlet>,
    /// Open rounds.
    open: HashMap<RoundId, OpenRound>,
}

/// Where what concerns a round goes, and the other end until its leader starts.
type Inlet = (mpsc::Sender<leader::Input>, Option<mpsc::Receiver<leader::Input>>);

/// A round that this node leads: where reports go, and whose they are.
type OpenRound = (mpsc::Sender<leader::Input>, HashMap<Hotkey, Rank>);

/// Rounds of which members were heard before this node began to lead them.
const WAITING_ROUNDS_MAX: usize = 256;

impl Leading {
    /// Where what concerns a round goes. `None`: there are too many.
    fn sender(&self, group: GroupId, seq: u64) -> Option<mpsc::Sender<leader::Input>> {
        let mut state = lock(&self.state);
        state.waiting.retain(|_, (tx, rx)| rx.is_some() || !tx.is_closed());
        if state.waiting.len() >= WAITING_ROUNDS_MAX && !state.waiting.contains_key(&(group, seq)) {
            return None;
        }
        let entry = state.waiting.entry((group, seq)).or_insert_with(|| {
            let (tx, rx) = mpsc::channel(leader::INPUTS_QUEUED_MAX);
            (tx, Some(rx))
        });
        Some(entry.0.clone())
    }

    /// Takes the other end, once.
    fn take(&self, group: GroupId, seq: u64) -> Option<(mpsc::Sender<leader::Input>, mpsc::Receiver<leader::Input>)> {
        self.sender(group, seq)?;
        let mut state = lock(&self.state);
        let (tx, rx) = state.waiting.get_mut(&(group, seq))?;
        rx.take().map(|rx| (tx.clone(), rx))
    }

    fn opened(&self, round: RoundId, tx: &mpsc::Sender<leader::Input>, members: HashMap<Hotkey, Rank>) {
        lock(&self.state).open.insert(round, (tx.clone(), members));
    }

    fn ended(&self, round: &RoundId) {
        lock(&self.state).open.remove(round);
    }

    /// Where a member's report goes, and its rank.
    fn of(&self, round: &RoundId, member: &Hotkey) -> Option<(mpsc::Sender<leader::Input>, Rank)> {
        let state = lock(&self.state);
        let (tx, members) = state.open.get(round)?;
        Some((tx.clone(), *members.get(member)?))
    }
}

/// Parts of the service.
pub(crate) struct RoundsParts {
    pub(crate) config: RoundsConfig,
    /// Whether the node's roles make it a reducer.
    pub(crate) lends: bool,
    pub(crate) network: Network,
    pub(crate) key: HotkeyPair,
    pub(crate) net: NetHandle,
    pub(crate) directory: Directory,
    pub(crate) blobs: Blobs,
    pub(crate) transfer: TransferHandle,
    pub(crate) lie: Lie,
    pub(crate) tasks: Tasks,
}

/// Uses the service. Clones share it.
#[derive(Clone)]
pub(crate) struct RoundsHandle {
    pub(crate) ctx: Arc<Ctx>,
}

/// Starts it.
pub(crate) fn start(parts: RoundsParts) -> RoundsHandle {
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let ctx = Arc::new(Ctx {
        network: parts.network,
        key: parts.key,
        net: parts.net.clone(),
        directory: parts.directory,
        blobs: parts.blobs,
        transfer: parts.transfer,
        tasks: parts.tasks.clone(),
        workers: Workers::new("rounds", threads),
        lanes: Lanes::default(),
        buffers: Buffers::default(),
        transcripts: Arc::default(),
        leading: Leading::default(),
        groups: Mutex::default(),
        creating: join::Creating::default(),
        closed: Mutex::default(),
        lie: parts.lie,
        blamed: tokio::sync::broadcast::channel(BLAMED_QUEUED_MAX).0,
    });
    let lends = parts.config.serve.unwrap_or(parts.lends);
    let requests = parts.net.serve(&[
        RequestKind::JoinGroup,
        RequestKind::RoundReady,
        RequestKind::RoundReport,
        RequestKind::Transcript,
    ]);
    parts.tasks.spawn("requests", serve::requests(ctx.clone(), requests));
    parts.tasks.spawn("lanes", serve::lanes(ctx.clone(), parts.config, lends, parts.net.accept_rounds()));
    RoundsHandle { ctx }
}

/// A group, for the API.
#[derive(Clone)]
pub(crate) struct GroupRef(Arc<Group>);

impl GroupRef {
    pub(crate) fn rank(&self) -> Rank {
        self.0.rank()
    }

    pub(crate) fn size(&self) -> usize {
        self.0.roster().members.len()
    }

    pub(crate) fn members(&self) -> Vec<sundara_proto::round::GroupMember> {
        self.0.roster().members.clone()
    }

    pub(crate) fn id(&self) -> GroupId {
        self.0.id
    }

    pub(crate) fn turn(&self, rounds: u64) -> u64 {
        self.0.turn(rounds)
    }

    pub(crate) fn upcoming(&self) -> u64 {
        self.0.upcoming()
    }

    pub(crate) fn note_state(&self, state: Signed<StateDigest>) {
        self.0.note_state(state);
    }
}

impl RoundsHandle {
    pub(crate) async fn create(&self, spec: GroupSpec) -> Result<GroupRef, JoinError> {
        join::create(&self.ctx, spec).await.map(GroupRef)
    }

    pub(crate) async fn join(
        &self,
        creator: (NodeId, Hotkey),
        name: &str,
        invitation: Option<sundara_proto::pb::Signed>,
        token: Vec<u8>,
        wish: &GroupSpec,
    ) -> Result<(GroupRef, Vec<Signed<StateDigest>>), JoinError> {
        let ticket = join::Ticket { invitation, token };
        let (group, states) = join::join(&self.ctx, creator, name, &ticket, wish).await?;
        Ok((GroupRef(group), states))
    }

    pub(crate) async fn round(
        &self,
        group: &GroupRef,
        seq: u64,
        op: RoundOp,
        tensors: Vec<Tensor>,
    ) -> Result<Outcome, RoundFailure> {
        let (ctx, group) = (self.ctx.clone(), group.0.clone());
        let (done, result) = tokio::sync::oneshot::channel();
        // A task of its own: a caller that drops its future gives up the result, and the others go on with its tensor.
        self.ctx.spawn("round", async move {
            // A caller that is gone does not want it.
            drop(done.send(follow::round(ctx, group, seq, op, tensors).await));
        });
        result.await.unwrap_or_else(|_| Err(RoundFailure::closed()))
    }

    /// The mesh, and the hotkey under which this node makes groups.
    pub(crate) fn creator(&self) -> (Network, Hotkey) {
        (self.ctx.network, self.ctx.net.local().hotkey)
    }

    pub(crate) fn blobs(&self) -> &Blobs {
        &self.ctx.blobs
    }

    pub(crate) fn transfer(&self) -> &TransferHandle {
        &self.ctx.transfer
    }

    pub(crate) fn blamed(&self) -> tokio::sync::broadcast::Receiver<Blamed> {
        self.ctx.blamed.subscribe()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
