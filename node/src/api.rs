//! The front door: a running node, and what programs do with it.
//!
//! Everything here is cheap to clone and safe to call from any task of the runtime in which the node was started. The
//! node installs nothing global: no subscriber, no panic hook, no signal handler.

pub mod jobs;
mod metrics;
mod models;
pub mod rounds;
mod status;

use std::sync::Arc;
use std::time::Duration;

use sundara_proto::crypto::Network;
use sundara_proto::id::{Hotkey, NodeId};
use sundara_proto::units::ByteCount;

use crate::builder::{NodeBuilder, Parts};
use crate::net::PeerStatus;
use crate::services::casebook;
use crate::store::StoreError;

pub use crate::builder::StartError;
#[cfg(feature = "executor")]
pub use crate::domain::job::KnownMiner;
pub use crate::services::casebook::Case;
#[cfg(feature = "executor")]
pub use crate::services::{
    executors::KnownExecutor,
    miner::{LoggedOffer, OfferState},
    scores::{Draws, EpochScores, MinerScore, ValidatorPages},
    work::Misbehaviour,
    work::invite::{Invite, InviteError, Token},
};
pub use jobs::{
    JobEvent, JobFailure, JobHandle, JobInput, JobOrder, JobPhase, JobResult, JobSummary, Jobs, ProgramRef, SubmitError,
};
pub use models::{Collected, Listed, LocalModel, Models, Progress, Published, RegistryError, Shown};
pub use status::Status;
#[cfg(feature = "executor")]
pub use status::{AttachState, DispatchStatus, ExecutorStatus};

/// A running node. Clones share it; it stops with [`Node::shutdown`] or when the last clone is dropped.
#[derive(Clone)]
pub struct Node {
    pub(crate) parts: Arc<Parts>,
}

/// Bytes over TCP, with all that encryption and framing add. QUIC's are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Handed to the system.
    pub sent: ByteCount,
    /// Got from it.
    pub received: ByteCount,
}

impl Node {
    /// A builder with every default: a light node without a chain. It listens on free ports, so that several programs
    /// that embed one get along on one machine.
    pub fn builder() -> NodeBuilder {
        NodeBuilder::default().listen(["/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1"])
    }

    /// Who answers for this node.
    pub fn hotkey(&self) -> Hotkey {
        self.parts.net.local().hotkey
    }

    /// This node's key, from which its PeerId follows.
    pub fn node_id(&self) -> NodeId {
        self.parts.net.local().node
    }

    /// This node's libp2p name.
    pub fn peer_id(&self) -> String {
        self.parts.net.peer_id().to_string()
    }

    /// The mesh that it is on.
    pub fn network(&self) -> Network {
        self.parts.net.network()
    }

    /// Addresses that it listens on, each with its PeerId: what another node's `bootstrap` takes. Waits until every
    /// listener has one.
    pub async fn addresses(&self) -> Vec<String> {
        self.parts.net.listeners().await.iter().map(ToString::to_string).collect()
    }

    /// Jobs: submit, follow, cancel.
    pub fn jobs(&self) -> Jobs {
        Jobs { client: self.parts.jobs.clone() }
    }

    /// Models: publish, find, fetch, keep.
    pub fn models(&self) -> Models {
        Models { registry: self.parts.registry.clone(), key: self.parts.key.clone() }
    }

    /// Map-reduce: groups and their rounds.
    pub fn rounds(&self) -> rounds::Rounds {
        rounds::Rounds { handle: self.parts.rounds.clone(), key: self.parts.key.clone() }
    }

    /// Bytes that it sent and received so far.
    pub fn traffic(&self) -> Traffic {
        let metrics = self.parts.net.metrics();
        Traffic { sent: ByteCount(metrics.tcp_bytes_out.get()), received: ByteCount(metrics.tcp_bytes_in.get()) }
    }

    /// Everything known of other nodes.
    pub async fn peers(&self) -> Vec<PeerStatus> {
        self.parts.net.peers().await
    }

    /// How this node is.
    pub async fn status(&self) -> Status {
        Status::of(&self.parts).await
    }

    /// What the node counts, as OpenMetrics text.
    ///
    /// # Errors
    /// When a metric cannot be written, a mistake in our own code.
    pub async fn metrics(&self) -> Result<String, std::fmt::Error> {
        metrics::text(&self.parts, &self.status().await)
    }

    /// Evidence of offences, found by this node or proven by others, newest first.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn evidence(&self, limit: usize) -> Result<Vec<Case>, StoreError> {
        casebook::list(self.parts.store.as_ref(), limit)
    }

    /// What an epoch comes to for each miner, as far as this validator knows: of the present epoch unless one is named.
    /// `None` on other nodes.
    ///
    /// # Errors
    /// When the store cannot be read.
    #[cfg(feature = "executor")]
    pub async fn scores(&self, epoch: Option<u64>) -> Result<Option<EpochScores>, StoreError> {
        match &self.parts.work.scores {
            Some(scores) => scores.scores(epoch).await.map(Some),
            None => Ok(None),
        }
    }

    /// Waits until a validator has settled this epoch or a later one with nothing missing; at once on other nodes.
    #[cfg(feature = "executor")]
    pub async fn wait_for_settled(&self, epoch: u64) {
        if let Some(scores) = &self.parts.work.scores {
            scores.wait_for_settled(epoch).await;
        }
    }

    /// What this validator knows of a miner: whether it could be asked now, and what is held against it. `None` for one
    /// that it does not know, and on other nodes.
    #[cfg(feature = "executor")]
    pub async fn known_miner(&self, miner: Hotkey) -> Option<KnownMiner> {
        self.parts.work.dispatch.as_ref()?.known(miner).await
    }

    /// Whether it takes offers.
    pub fn is_miner(&self) -> bool {
        crate::presets::bundle(&self.parts.config.node.roles).miner
    }

    /// Offers that this miner declined or served, newest first. Empty on other nodes.
    ///
    /// # Errors
    /// When the store cannot be read.
    #[cfg(feature = "executor")]
    pub fn miner_jobs(&self, limit: usize) -> Result<Vec<LoggedOffer>, StoreError> {
        match &self.parts.work.miner {
            Some(miner) => miner.log(limit),
            None => Ok(Vec::new()),
        }
    }

    /// A one-time invitation for an executor of this miner or validator, as `executor invite` writes it to a file.
    ///
    /// # Errors
    /// When this node owns no executors, or the store cannot keep the token.
    #[cfg(feature = "executor")]
    pub async fn invite_executor(&self, life: Duration) -> Result<Invite, StartError> {
        let owner = self.parts.work.executors.as_ref().ok_or_else(|| {
            StartError::Config("only miners and validators own executors: start with --role miner or validator".into())
        })?;
        let addresses = self.addresses().await;
        owner.invite(addresses, life).await.map_err(|e| StartError::Data(e.to_string()))
    }

    /// Executors of this miner or validator, those that are away included. Empty on other nodes.
    ///
    /// # Errors
    /// When the store cannot be read.
    #[cfg(feature = "executor")]
    pub fn executors(&self) -> Result<Vec<KnownExecutor>, StoreError> {
        self.parts.work.executors.as_ref().map_or_else(|| Ok(Vec::new()), |owner| owner.list())
    }

    /// Sends an attached executor away: its orders move on, and it must be invited again. `false` for one that was never
    /// attached.
    ///
    /// # Errors
    /// When this node owns no executors, or the store cannot forget it.
    #[cfg(feature = "executor")]
    pub async fn revoke_executor(&self, node: NodeId) -> Result<bool, StartError> {
        let owner = self.parts.work.executors.as_ref().ok_or_else(|| {
            StartError::Config("only miners and validators own executors: start with --role miner or validator".into())
        })?;
        owner.revoke(node).await.map_err(|e| StartError::Data(e.to_string()))
    }

    /// Waits until `n` other nodes are connected. For tests and start-up scripts.
    pub async fn wait_for_peers(&self, n: usize) {
        self.parts.directory.wait_for(|view| view.peers.len() > n).await;
    }

    /// Waits until `n` trusted validators are connected. For tests and start-up scripts.
    pub async fn wait_for_validators(&self, n: usize) {
        let trusted = &self.parts.config.jobs.trusted_validators;
        let here =
            |view: &crate::services::directory::View| view.validators.keys().filter(|h| trusted.contains(h)).count();
        self.parts.directory.wait_for(|view| here(view) >= n).await;
    }

    /// Waits until a validator knows `n` miners that could run a job; at once on other nodes.
    #[cfg(feature = "executor")]
    pub async fn wait_for_miners(&self, n: usize) {
        if let Some(adverts) = &self.parts.work.adverts {
            adverts.wait_for_miners(n).await;
        }
    }

    /// Waits until some task of the node panics: a node that is not whole any more should be restarted. Cancel safe.
    pub async fn failed(&self) -> crate::service::TaskFailure {
        self.parts.tasks.failure().await
    }

    /// Takes nothing new, lets running jobs end within [`DRAIN_WITHIN`], then stops every task and closes the store.
    pub async fn shutdown(&self) {
        self.parts.shutdown(DRAIN_WITHIN).await;
    }
}

/// How long a shutdown waits for running jobs.
pub const DRAIN_WITHIN: Duration = Duration::from_secs(30);
