//! A whole mesh on this machine, for people to look at and for tests of other projects.
//!
//! **Owns** the assembly of nodes over real TCP on loopback, in this process or as child processes, and the default
//! workload: digit images through the embedded classifier. **Does not own** any behaviour of a node: every node is built by
//! [`crate::builder`], as any program would.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use sundara_node::testnet::Testnet;
//! use sundara_node::JobOrder;
//! let net = Testnet::builder().miners(3).start().await?;
//! let job = net.client().jobs().submit(JobOrder::builtin("echo").input("hello").replicas(2)).await?;
//! assert_eq!(job.result().await?.output.as_deref(), Some(&b"hello"[..]));
//! net.shutdown().await;
//! # Ok(())
//! # }
//! ```

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod listening;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod private;
mod processes;
mod report;
mod rounds;
mod workload;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha20Rng;
use sundara_proto::crypto::{HotkeyPair, Network};
use sundara_proto::id::Hotkey;

use crate::api::rounds::Lie;
use crate::api::{Misbehaviour, Node, StartError};
use crate::config::Config;
use crate::presets::Role;

pub use processes::ChildNode;
pub use report::{JobCounts, Latency, MinerReport, Report, Tally};
pub use rounds::ReduceReport;
pub use workload::{Workload, WorkloadError, digit_images};

/// Name of the mesh that a testnet is.
pub const NETWORK_NAME: &str = "testnet";
/// How long the nodes may take to find one another before the start is called a failure.
const ASSEMBLE_WITHIN: Duration = Duration::from_secs(60);
/// Nodes of one testnet: each has its own sockets, store and threads.
const NODES_MAX: usize = 256;

/// What to assemble.
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is started"]
pub struct TestnetBuilder {
    validators: usize,
    miners: usize,
    executors_per_miner: usize,
    byzantine: usize,
    seed: Option<u64>,
    data_dir: Option<PathBuf>,
    binary: Option<PathBuf>,
    configure: Option<Configure>,
}

/// Changes the configuration of a node in this process.
#[derive(Clone)]
struct Configure(Arc<dyn Fn(&mut Config) + Send + Sync>);

impl std::fmt::Debug for Configure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Configure")
    }
}

/// A running testnet. Dropping it stops it without ceremony; [`Testnet::shutdown`] does it in order.
pub struct Testnet {
    name: String,
    network: Network,
    client: Node,
    validators: Vec<Member>,
    miners: Vec<Member>,
    bootstrap: Vec<String>,
    data_dir: PathBuf,
    /// Removes `data_dir` with the testnet, unless it was named.
    _temporary: Option<tempfile::TempDir>,
}

/// One validator or miner.
pub struct Member {
    /// Its hotkey.
    pub hotkey: Hotkey,
    /// How it lies, for a byzantine miner.
    pub misbehaviour: Option<Misbehaviour>,
    running: Running,
}

#[allow(clippy::large_enum_variant)] // A handful of them, never copied about.
enum Running {
    Here(Node),
    Child(ChildNode),
}

impl Member {
    /// The node, where it runs in this process.
    pub fn node(&self) -> Option<&Node> {
        match &self.running {
            Running::Here(node) => Some(node),
            Running::Child(_) => None,
        }
    }

    /// The log file of a child process, where it is one.
    pub fn log(&self) -> Option<&Path> {
        match &self.running {
            Running::Here(_) => None,
            Running::Child(child) => Some(child.log()),
        }
    }

    async fn stop(self) {
        match self.running {
            Running::Here(node) => node.shutdown().await,
            Running::Child(child) => child.stop().await,
        }
    }

    /// The child process, where it is one.
    pub fn child(&mut self) -> Option<&mut ChildNode> {
        match &mut self.running {
            Running::Here(_) => None,
            Running::Child(child) => Some(child),
        }
    }
}

impl Testnet {
    /// One validator and three honest miners with one executor each, in this process.
    pub fn builder() -> TestnetBuilder {
        TestnetBuilder {
            validators: 1,
            miners: 3,
            executors_per_miner: 1,
            byzantine: 0,
            seed: None,
            data_dir: None,
            binary: None,
            configure: None,
        }
    }

    /// The light node that submits jobs.
    pub fn client(&self) -> &Node {
        &self.client
    }
    /// The validators.
    pub fn validators(&self) -> &[Member] {
        &self.validators
    }
    /// The miners, byzantine ones last.
    pub fn miners(&self) -> &[Member] {
        &self.miners
    }
    /// The validators, to stop or kill one.
    pub fn validators_mut(&mut self) -> &mut Vec<Member> {
        &mut self.validators
    }
    /// The miners, to stop or kill one.
    pub fn miners_mut(&mut self) -> &mut Vec<Member> {
        &mut self.miners
    }
    /// Addresses by which another node joins.
    pub fn bootstrap(&self) -> &[String] {
        &self.bootstrap
    }
    /// The mesh's name: the testnet's [`NETWORK_NAME`] and its seed.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// The mesh.
    pub fn network(&self) -> Network {
        self.network
    }
    /// Where its nodes keep their data.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }
    /// Nodes, the client included.
    pub fn nodes(&self) -> usize {
        self.validators.len() + self.miners.len() + 1
    }

    /// Stops the client first, then the validators, which need the miners to end what they run, then the miners.
    pub async fn shutdown(self) {
        self.client.shutdown().await;
        for group in [self.validators, self.miners] {
            futures::future::join_all(group.into_iter().map(Member::stop)).await;
        }
    }
}

impl TestnetBuilder {
    /// Validators, at least one.
    pub fn validators(mut self, n: usize) -> Self {
        self.validators = n;
        self
    }
    /// Miners, byzantine ones included.
    pub fn miners(mut self, n: usize) -> Self {
        self.miners = n;
        self
    }
    /// Jobs that each miner runs at once.
    pub fn executors_per_miner(mut self, n: usize) -> Self {
        self.executors_per_miner = n;
        self
    }
    /// How many of the miners lie: wrong result, copy, withhold, collude, in rotation. As reducers of rounds they change a
    /// sum, leave a member out of it, count one twice, or subtract it.
    pub fn byzantine(mut self, n: usize) -> Self {
        self.byzantine = n;
        self
    }
    /// Fixes every key and draw that does not depend on time.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }
    /// Keeps all data there, and resumes from it.
    pub fn data_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.data_dir = Some(dir.into());
        self
    }
    /// Runs validators and miners as child processes of this `sundara-node` binary.
    pub fn processes(mut self, binary: impl Into<PathBuf>) -> Self {
        self.binary = Some(binary.into());
        self
    }

    /// Changes settings of every node that runs in this process, the client included; child processes take theirs from
    /// their environment. What a node is (roles, keys, mesh, addresses) is the testnet's own to say.
    pub fn configure(mut self, change: impl Fn(&mut Config) + Send + Sync + 'static) -> Self {
        self.configure = Some(Configure(Arc::new(change)));
        self
    }

    /// Starts all nodes and waits until the client sees every validator and every validator sees every miner.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is left running.
    pub async fn start(self) -> Result<Testnet, StartError> {
        self.check()?;
        let (data_dir, temporary) = match &self.data_dir {
            Some(dir) => (dir.clone(), None),
            None => {
                let dir = tempfile::tempdir().map_err(|e| StartError::Data(format!("temporary directory: {e}")))?;
                (dir.path().to_path_buf(), Some(dir))
            }
        };
        let plan = Plan::new(&self, &data_dir)?;
        let mut validators: Vec<Member> = Vec::new();
        let mut bootstrap: Vec<String> = Vec::new();
        for i in 0..self.validators {
            let member = plan.member(Role::Validator, i, &bootstrap, None).await?;
            bootstrap.extend(plan.address_of(&member).await?);
            validators.push(member);
        }
        let mut miners = Vec::new();
        for i in 0..self.miners {
            let honest = self.miners - self.byzantine;
            let lies = i.checked_sub(honest).map(Lies::rotated);
            miners.push(plan.member(Role::Miner, i, &bootstrap, lies).await?);
        }
        let client = plan.client(&bootstrap).await?;
        let testnet = Testnet {
            name: plan.name,
            network: plan.network,
            client,
            validators,
            miners,
            bootstrap,
            data_dir,
            _temporary: temporary,
        };
        testnet.assembled().await?;
        Ok(testnet)
    }

    fn check(&self) -> Result<(), StartError> {
        let nodes = self.validators + self.miners + 1;
        let reason = if self.validators == 0 {
            "a testnet needs a validator: --validators 1".to_owned()
        } else if self.byzantine > self.miners {
            format!("{} byzantine miners of {}: raise --miners", self.byzantine, self.miners)
        } else if nodes > NODES_MAX {
            format!("{nodes} nodes exceed {NODES_MAX}")
        } else {
            return Ok(());
        };
        Err(StartError::Config(reason))
    }
}

impl Testnet {
    /// Waits until jobs can run.
    async fn assembled(&self) -> Result<(), StartError> {
        let wanted = self.miners.len();
        let ready = async {
            for member in &self.validators {
                if let Running::Here(node) = &member.running {
                    node.wait_for_miners(wanted).await;
                }
            }
            self.client.wait_for_validators(self.validators.len()).await;
        };
        tokio::time::timeout(ASSEMBLE_WITHIN, ready).await.map_err(|_| {
            StartError::Config(format!("the nodes did not find one another within {} s", ASSEMBLE_WITHIN.as_secs()))
        })
    }
}

/// How a byzantine miner lies, in jobs and in rounds.
struct Lies {
    jobs: Misbehaviour,
    rounds: Lie,
}

impl Lies {
    /// Those of the `i`th liar.
    fn rotated(i: usize) -> Self {
        let jobs = Misbehaviour::ROTATION[i % Misbehaviour::ROTATION.len()];
        Self { jobs, rounds: rounds::LIES[i % rounds::LIES.len()] }
    }
}

/// Everything that is fixed before the first node starts.
struct Plan {
    name: String,
    network: Network,
    /// Seeds of the hotkeys.
    validator_seeds: Vec<[u8; 32]>,
    miner_seeds: Vec<[u8; 32]>,
    client_seed: [u8; 32],
    executors_per_miner: usize,
    data_dir: PathBuf,
    binary: Option<PathBuf>,
    configure: Option<Configure>,
}

impl Plan {
    fn new(builder: &TestnetBuilder, data_dir: &Path) -> Result<Self, StartError> {
        std::fs::create_dir_all(data_dir).map_err(|e| StartError::Data(format!("{}: {e}", data_dir.display())))?;
        let seed = stored_seed(data_dir, builder.seed)?;
        let mut keys = ChaCha20Rng::seed_from_u64(seed);
        let mut draw = || keys.random();
        let name = format!("{NETWORK_NAME}-{seed:016x}");
        Ok(Self {
            network: Network::named(&name, 0),
            name,
            client_seed: draw(),
            validator_seeds: (0..builder.validators).map(|_| draw()).collect(),
            miner_seeds: (0..builder.miners).map(|_| draw()).collect(),
            executors_per_miner: builder.executors_per_miner,
            data_dir: data_dir.to_path_buf(),
            binary: builder.binary.clone(),
            configure: builder.configure.clone(),
        })
    }

    fn configure(&self, config: &mut Config) {
        if let Some(Configure(change)) = &self.configure {
            change(config);
        }
    }

    fn slots(&self) -> u32 {
        u32::try_from(self.executors_per_miner).unwrap_or(u32::MAX)
    }

    fn trusted(&self) -> Vec<Hotkey> {
        self.validator_seeds.iter().map(|seed| HotkeyPair::from_seed(seed).hotkey()).collect()
    }

    async fn member(
        &self,
        role: Role,
        i: usize,
        bootstrap: &[String],
        lies: Option<Lies>,
    ) -> Result<Member, StartError> {
        let (name, seed) = match role {
            Role::Validator => ("validator", &self.validator_seeds[i]),
            _ => ("miner", &self.miner_seeds[i]),
        };
        let key = HotkeyPair::from_seed(seed);
        let dir = self.data_dir.join(format!("{name}-{i}"));
        let hotkey = key.hotkey();
        // A liar runs in this process: no file or flag of the binary can make a node lie.
        let running = match (&self.binary, &lies) {
            (Some(binary), None) => {
                let spec = processes::ChildSpec {
                    binary,
                    role,
                    dir: &dir,
                    network: self.network,
                    bootstrap,
                    trusted: &self.trusted(),
                    slots: self.slots(),
                };
                Running::Child(ChildNode::spawn(&spec, seed).await?)
            }
            _ => {
                let builder = Node::builder()
                    .role(role)
                    .network(self.network)
                    .hotkey(key)
                    .data_dir(dir)
                    .bootstrap(bootstrap.iter().cloned())
                    .trust(self.trusted())
                    .configure(|config| {
                        config.executor.slots = self.slots();
                        self.configure(config);
                    })
                    .loopback();
                let builder = match &lies {
                    Some(lies) => builder.misbehave(Some(lies.jobs)).lie(lies.rounds),
                    None => builder,
                };
                Running::Here(builder.start().await?)
            }
        };
        Ok(Member { hotkey, misbehaviour: lies.map(|lies| lies.jobs), running })
    }

    async fn address_of(&self, member: &Member) -> Result<Vec<String>, StartError> {
        match &member.running {
            Running::Here(node) => Ok(node.addresses().await),
            Running::Child(child) => Ok(child.addresses().to_vec()),
        }
    }

    async fn client(&self, bootstrap: &[String]) -> Result<Node, StartError> {
        Node::builder()
            .role(Role::Light)
            .network(self.network)
            .hotkey(HotkeyPair::from_seed(&self.client_seed))
            .data_dir(self.data_dir.join("client"))
            .bootstrap(bootstrap.iter().cloned())
            .trust(self.trusted())
            .configure(|config| self.configure(config))
            .loopback()
            .start()
            .await
    }
}

/// The testnet's seed: as given, as kept from an earlier run in this directory, or drawn now.
fn stored_seed(dir: &Path, given: Option<u64>) -> Result<u64, StartError> {
    let file = dir.join("testnet-seed");
    let fail = |e: std::io::Error| StartError::Data(format!("{}: {e}", file.display()));
    match std::fs::read_to_string(&file) {
        Ok(text) => {
            let kept = text.trim().parse().map_err(|e| StartError::Data(format!("{}: {e}", file.display())))?;
            match given {
                Some(seed) if seed != kept => Err(StartError::Config(format!(
                    "--seed {seed} differs from {kept}, with which this directory was made: leave --seed out, or name another --data-dir"
                ))),
                _ => Ok(kept),
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let seed = given.unwrap_or_else(rand::random);
            std::fs::write(&file, format!("{seed}\n")).map_err(fail)?;
            Ok(seed)
        }
        Err(e) => Err(fail(e)),
    }
}
