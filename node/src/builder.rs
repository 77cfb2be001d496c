//! Puts a node together: ports first, then the services of its roles, wired by channels.
//!
//! **Owns** the order of start and of shutdown. **Does not own** behaviour: a service gets its parts and is on its own.

#[cfg(feature = "executor")]
mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sundara_chain::keys;
use sundara_proto::cert::Certificate;
use sundara_proto::crypto::{HotkeyPair, Network, NodeKeyPair, Signed};
use sundara_proto::id::Hotkey;
use sundara_proto::names::Topic;
use tokio::sync::mpsc;

use crate::api::Node;
use crate::blobs::{Blobs, TransferHandle, transfer_channel};
use crate::config::Config;
use crate::net::{self, NetHandle, NetIdentity};
use crate::presets::{self, Bundle, Role};
use crate::service::{Tasks, wall_now};
use crate::services::directory::Directory;
use crate::services::jobs::{JobsClient, JobsClientParts};
use crate::services::proofs;
use crate::services::reduce::{self, Lie, RoundsHandle};
use crate::services::registry::{self, RegistryHandle};
use crate::services::rejoin;
use crate::services::transfer;
#[cfg(feature = "executor")]
use crate::services::work::{Misbehaviour, invite::Invite};
use crate::store::{MemoryStore, SharedStore, SledStore};

/// How long a node's certificate holds. It is renewed at half of it.
const CERTIFICATE_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Convictions on their way to scheduling; a proof is kept before it is told, and a full queue holds gossip back.
const CONVICTED_QUEUED_MAX: usize = 64;

/// Why a node did not start. Nothing is left running.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Settings that do not go together.
    #[error("{0}")]
    Config(String),
    /// The data directory, the store or the blobs.
    #[error("{0}")]
    Data(String),
    /// A key file.
    #[error(transparent)]
    Key(#[from] keys::KeyError),
    /// The network.
    #[error(transparent)]
    Net(#[from] net::NetError),
}

/// Assembles a [`Node`]. Every setting has a default; [`Node::builder`] begins with a light node on any free port.
#[derive(Default)]
#[must_use = "a builder does nothing until it is started"]
pub struct NodeBuilder {
    config: Config,
    /// Set by the program; else `config.network`.
    network: Option<Network>,
    hotkey: Option<HotkeyPair>,
    data_dir: Option<PathBuf>,
    bad_address: Option<String>,
    lie: Lie,
    #[cfg(feature = "executor")]
    misbehaviour: Option<Misbehaviour>,
    #[cfg(feature = "executor")]
    invite: Option<Invite>,
    #[cfg(feature = "executor")]
    owner_addresses: Vec<libp2p::Multiaddr>,
}

impl NodeBuilder {
    /// Takes a whole configuration, its port included.
    pub fn config(mut self, config: Config) -> Self {
        self.data_dir = Some(config.node.data_dir.clone());
        self.config = config;
        self
    }
    /// What the node does; several combine.
    pub fn role(mut self, role: Role) -> Self {
        if !self.config.node.roles.contains(&role) {
            self.config.node.roles.push(role);
        }
        self
    }
    /// The mesh to be on.
    pub fn network(mut self, network: Network) -> Self {
        self.network = Some(network);
        self
    }
    /// Keys, store and blobs are kept there. Without it a light node keeps everything in memory and in a temporary
    /// directory, under keys of its own that end with it.
    pub fn data_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.data_dir = Some(dir.into());
        self
    }
    /// Who answers for the node, instead of the hotkey file in the data directory.
    pub fn hotkey(mut self, key: HotkeyPair) -> Self {
        self.hotkey = Some(key);
        self
    }
    /// Nodes to join through, as multiaddresses.
    pub fn bootstrap<S: AsRef<str>>(mut self, addresses: impl IntoIterator<Item = S>) -> Self {
        for address in addresses {
            match crate::net::address(address.as_ref()) {
                Ok(address) => self.config.net.bootstrap.push(address),
                Err(e) => self.bad_address = Some(format!("bootstrap address: {e}")),
            }
        }
        self
    }
    /// Addresses to listen on, as multiaddresses, instead of any free port.
    pub fn listen<S: AsRef<str>>(mut self, addresses: impl IntoIterator<Item = S>) -> Self {
        self.config.net.listen.clear();
        for address in addresses {
            match crate::net::address(address.as_ref()) {
                Ok(address) => self.config.net.listen.push(address),
                Err(e) => self.bad_address = Some(format!("listen address: {e}")),
            }
        }
        self
    }
    /// Validators whose verdicts are believed.
    pub fn trust(mut self, validators: impl IntoIterator<Item = Hotkey>) -> Self {
        self.config.jobs.trusted_validators.extend(validators);
        self
    }
    /// Changes any other setting.
    pub fn configure(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }
    /// Listens on a free TCP port of the loopback interface and counts as reachable there: for meshes on one machine.
    pub fn loopback(self) -> Self {
        self.listen(["/ip4/127.0.0.1/tcp/0"]).configure(|config| {
            config.net.assume_reachable = true;
            config.net.keep_private_addresses = true;
        })
    }

    /// The owner's invitation of an executor, which names the mesh too, and further addresses of the owner.
    #[cfg(feature = "executor")]
    pub fn invited(mut self, invite: Invite, owner: Vec<libp2p::Multiaddr>) -> Self {
        self.network = Some(invite.network());
        self.config.net.bootstrap.extend(owner.iter().cloned());
        self.invite = Some(invite);
        self.owner_addresses = owner;
        self
    }

    /// Makes a miner lie, to show that it is caught. Not reachable from any file or flag of a real node.
    #[cfg(feature = "executor")]
    pub fn misbehave(mut self, misbehaviour: Option<Misbehaviour>) -> Self {
        self.misbehaviour = misbehaviour;
        self
    }

    /// Makes a member or reducer lie in rounds, to show that it is caught. Not reachable from any file or flag of a real
    /// node.
    pub fn lie(mut self, lie: Lie) -> Self {
        self.lie = lie;
        self
    }

    /// Starts it on the caller's tokio runtime.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(self) -> Result<Node, StartError> {
        if let Some(bad) = self.bad_address {
            return Err(StartError::Config(bad));
        }
        Assembly::new(self)?.start().await
    }
}

/// A node's parts, shared by every clone of [`Node`].
pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) key: HotkeyPair,
    pub(crate) net: NetHandle,
    pub(crate) store: SharedStore,
    pub(crate) blobs: Blobs,
    pub(crate) directory: Directory,
    pub(crate) registry: RegistryHandle,
    pub(crate) jobs: JobsClient,
    pub(crate) rounds: RoundsHandle,
    rejoin: rejoin::Rejoin,
    pub(crate) transfers: Arc<transfer::TransferStats>,
    #[cfg(feature = "executor")]
    pub(crate) work: work::Work,
    pub(crate) tasks: Tasks,
    /// Removes an ephemeral node's blobs with it.
    _temporary: Option<tempfile::TempDir>,
}

impl Parts {
    /// Drains, stops every task, closes the store. Harmless when done twice.
    pub(crate) async fn shutdown(&self, drain: Duration) {
        #[cfg(feature = "executor")]
        if tokio::time::timeout(drain, self.work.drain()).await.is_err() {
            tracing::warn!("jobs still run after {} s; they go on elsewhere or at the next start", drain.as_secs());
        }
        #[cfg(not(feature = "executor"))]
        let _nothing_to_drain = drain;
        self.rejoin.save().await;
        self.net.flush().await;
        self.stop().await;
    }

    /// Stops every task at once and closes the store.
    pub(crate) async fn stop(&self) {
        for task in self.tasks.shutdown().await {
            tracing::warn!(%task, "task did not end in time and was aborted");
        }
        if let Err(e) = self.store.close().await {
            tracing::error!(error = %e, "the store did not close cleanly");
        }
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        // Tasks hold ports, never `Parts`: with the last handle gone nobody can ask for anything.
        self.tasks.token().cancel();
    }
}

/// A node on its way: everything that is decided before the first port opens.
struct Assembly {
    config: Config,
    network: Network,
    hotkey: HotkeyPair,
    node_key: NodeKeyPair,
    bundle: Bundle,
    /// Where it keeps its data; `None` keeps the store in memory.
    data_dir: Option<PathBuf>,
    temporary: Option<tempfile::TempDir>,
    lie: Lie,
    #[cfg(feature = "executor")]
    misbehaviour: Option<Misbehaviour>,
    #[cfg(feature = "executor")]
    invite: Option<Invite>,
    #[cfg(feature = "executor")]
    owner_addresses: Vec<libp2p::Multiaddr>,
}

impl Assembly {
    fn new(builder: NodeBuilder) -> Result<Self, StartError> {
        let mut config = builder.config;
        config.node.roles = presets::or_default(config.node.roles);
        let bundle = presets::bundle(&config.node.roles);
        if !cfg!(feature = "executor") && (bundle.miner || bundle.executor || bundle.validator) {
            let reason = "this build runs light nodes only: build sundara-node with feature `executor`";
            return Err(StartError::Config(reason.to_owned()));
        }
        let works = bundle.miner || bundle.executor || bundle.validator;
        if works && builder.data_dir.is_none() {
            return Err(StartError::Config("a working node keeps records: name its data directory".to_owned()));
        }
        let fail = |e: std::io::Error| StartError::Data(format!("temporary directory: {e}"));
        let temporary = if builder.data_dir.is_none() { Some(tempfile::tempdir().map_err(fail)?) } else { None };
        let (hotkey, node_key) = match &builder.data_dir {
            Some(dir) => {
                let hotkey = match builder.hotkey {
                    Some(key) => key,
                    None => hotkey_of(&config, dir)?,
                };
                (hotkey, keys::load_or_create_node_key(&config.keys.node_file(dir))?)
            }
            None => {
                let hotkey = builder.hotkey.unwrap_or_else(|| HotkeyPair::from_seed(&rand::random()));
                (hotkey, NodeKeyPair::from_seed(&rand::random()))
            }
        };
        Ok(Self {
            network: builder.network.unwrap_or_else(|| config.network.network()),
            config,
            hotkey,
            node_key,
            bundle,
            data_dir: builder.data_dir,
            temporary,
            lie: builder.lie,
            #[cfg(feature = "executor")]
            misbehaviour: builder.misbehaviour,
            #[cfg(feature = "executor")]
            invite: builder.invite,
            #[cfg(feature = "executor")]
            owner_addresses: builder.owner_addresses,
        })
    }

    fn blobs_dir(&self) -> PathBuf {
        match (&self.data_dir, &self.temporary) {
            (Some(dir), _) => dir.join("blobs"),
            (None, Some(temporary)) => temporary.path().join("blobs"),
            (None, None) => std::env::temp_dir(),
        }
    }

    async fn store(&self) -> Result<SharedStore, StartError> {
        let Some(dir) = &self.data_dir else { return Ok(Arc::new(MemoryStore::new())) };
        let (dir, config) = (dir.join("store"), self.config.store.clone());
        // Opening reads every record.
        let opened = tokio::task::spawn_blocking(move || SledStore::open(&dir, &config)).await;
        let store = opened.map_err(|e| StartError::Data(format!("store: {e}")))?;
        Ok(Arc::new(store.map_err(|e| StartError::Data(e.to_string()))?))
    }

    /// A certificate from now on. Its serial is the time: a later one of this hotkey revokes it.
    fn certificate(&self) -> Signed<Certificate> {
        certificate(&self.network, &self.hotkey, &self.node_key, &self.config.node.roles)
    }

    async fn start(self) -> Result<Node, StartError> {
        let tasks = Tasks::new();
        match self.assemble(tasks.clone()).await {
            Ok(parts) => Ok(Node { parts: Arc::new(parts) }),
            Err(e) => {
                tasks.shutdown().await;
                Err(e)
            }
        }
    }

    async fn assemble(mut self, tasks: Tasks) -> Result<Parts, StartError> {
        let data = |e: &dyn std::fmt::Display| StartError::Data(e.to_string());
        let store = self.store().await?;
        let blobs = Blobs::open(self.blobs_dir(), self.config.blobs.clone()).await.map_err(|e| data(&e))?;
        let known = rejoin::known(store.as_ref()).map_err(|e| data(&e))?;
        let identity = NetIdentity { seed: self.node_key.seed().into(), certificate: self.certificate(), known };
        let (net, driver) = NetHandle::start(self.config.net.clone(), identity)?;
        tasks.spawn("net", driver.run(tasks.token()));
        renew_certificate(&self, &net, &tasks);
        let directory = Directory::start(&net, &tasks);
        let rejoin = rejoin::start(net.clone(), store.clone(), &tasks.child("rejoin"));
        // A requester that reaches no validator may reach this node.
        net.carry(Topic::Jobs).await;
        let (transfer, fetches) = transfer_channel();
        let transfers = transfer::start(transfer::TransferParts {
            config: self.config.transfer.clone(),
            net: net.clone(),
            blobs: blobs.clone(),
            requests: fetches,
            tasks: tasks.child("transfer"),
        });
        let registry = registry::start(registry::RegistryParts {
            config: self.config.registry.clone(),
            network: self.network,
            net: net.clone(),
            store: store.clone(),
            blobs: blobs.clone(),
            transfer: transfer.clone(),
            hotkey: Some(self.hotkey.clone()),
            tasks: tasks.child("registry"),
        })
        .map_err(|e| data(&e))?;
        let jobs = JobsClient::start(JobsClientParts {
            config: self.config.jobs.clone(),
            network: self.network,
            key: self.hotkey.clone(),
            net: net.clone(),
            directory: directory.clone(),
            store: store.clone(),
            blobs: blobs.clone(),
            transfer: transfer.clone(),
            registry: registry.clone(),
            tasks: tasks.child("jobs"),
        });
        let rounds = reduce::start(reduce::RoundsParts {
            config: self.config.rounds.clone(),
            lends: self.bundle.reducer,
            network: self.network,
            key: self.hotkey.clone(),
            net: net.clone(),
            directory: directory.clone(),
            blobs: blobs.clone(),
            transfer: transfer.clone(),
            lie: self.lie,
            tasks: tasks.child("rounds"),
        });
        let ports = Ports { net, store, blobs, transfer, registry, directory };
        let (convicted_tx, convicted) = mpsc::channel(CONVICTED_QUEUED_MAX);
        proofs::start(proofs::ProofsParts {
            config: self.config.evidence.clone(),
            net: ports.net.clone(),
            store: ports.store.clone(),
            trusted: self.config.jobs.trusted_validators.clone(),
            convicted: self.bundle.validator.then_some(convicted_tx),
            tasks: tasks.child("proofs"),
        })
        .await
        .map_err(|e| data(&e))?;
        #[cfg(feature = "executor")]
        let work = self.work(&ports, convicted, &tasks).await?;
        #[cfg(not(feature = "executor"))]
        drop(convicted);
        Ok(Parts {
            config: self.config,
            key: self.hotkey,
            net: ports.net,
            store: ports.store,
            blobs: ports.blobs,
            directory: ports.directory,
            registry: ports.registry,
            jobs,
            rounds,
            rejoin,
            transfers,
            #[cfg(feature = "executor")]
            work,
            tasks,
            _temporary: self.temporary.take(),
        })
    }
}

/// Ports and the services that every node has.
struct Ports {
    net: NetHandle,
    store: SharedStore,
    blobs: Blobs,
    transfer: TransferHandle,
    registry: RegistryHandle,
    directory: Directory,
}

fn hotkey_of(config: &Config, dir: &std::path::Path) -> Result<HotkeyPair, StartError> {
    let file = config.keys.hotkey_file(dir);
    // A key that the operator placed elsewhere is never made up: a typing error would otherwise be a new identity.
    Ok(if config.keys.hotkey.is_some() { keys::load_hotkey(&file)? } else { keys::load_or_create_hotkey(&file)? })
}

fn certificate(network: &Network, hotkey: &HotkeyPair, node: &NodeKeyPair, roles: &[Role]) -> Signed<Certificate> {
    let now = wall_now();
    let certificate = Certificate {
        node: node.node_id(),
        network: *network,
        roles: presets::certified(roles),
        issued_at: now,
        expires_at: now.plus(CERTIFICATE_LIFE),
        serial: now.0,
    };
    Signed::sign(network, hotkey, certificate)
}

fn renew_certificate(assembly: &Assembly, net: &NetHandle, tasks: &Tasks) {
    let (network, hotkey, node) = (assembly.network, assembly.hotkey.clone(), assembly.node_key.clone());
    let (roles, net, token) = (assembly.config.node.roles.clone(), net.clone(), tasks.token());
    tasks.spawn("certificate", async move {
        loop {
            tokio::select! {
                () = token.cancelled() => return,
                () = tokio::time::sleep(CERTIFICATE_LIFE / 2) => {}
            }
            if let Err(e) = net.set_certificate(certificate(&network, &hotkey, &node, &roles)).await {
                tracing::error!(error = %e, "certificate not renewed");
            }
        }
    });
}
