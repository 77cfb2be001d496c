//! A mesh of members and reducers.

use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _};
use sundara_node::rounds::{Admission, Group, GroupSpec, GroupTimes, Lie, Reducers};
use sundara_node::{Network, Node};

/// Long enough for a debug build on a busy machine; a test that reaches it hangs.
const PATIENCE: Duration = Duration::from_secs(170);

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("the test made no progress")
}

pub(crate) struct Mesh {
    pub(crate) members: Vec<Node>,
    pub(crate) reducers: Vec<Node>,
    dir: tempfile::TempDir,
}

impl Mesh {
    pub(crate) async fn start(members: usize, reducers: usize) -> Self {
        Self::start_with(members, reducers, |_| Lie::None, |_| Lie::None).await
    }

    /// With liars: what each member and each reducer does wrong.
    pub(crate) async fn start_with(
        members: usize,
        reducers: usize,
        member: impl Fn(usize) -> Lie,
        reducer: impl Fn(usize) -> Lie,
    ) -> Self {
        if std::env::var_os("RUST_LOG").is_some() {
            // Only the first of several succeeds.
            drop(
                tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).try_init(),
            );
        }
        let network = Network::named(&format!("rounds {}", rand::random::<u64>()), 1);
        let mut first: Vec<String> = Vec::new();
        let mut nodes = Vec::new();
        for i in 0..members + reducers {
            let lie = if i < members { member(i) } else { reducer(i - members) };
            let node = Node::builder()
                .network(network)
                .loopback()
                .bootstrap(&first)
                .configure(|config| config.rounds.serve = Some(i >= members))
                .lie(lie)
                .start()
                .await
                .unwrap();
            first.extend(node.addresses().await);
            nodes.push(node);
        }
        for node in &nodes {
            node.wait_for_peers(members + reducers - 1).await;
        }
        let reducers = nodes.split_off(members);
        Self { members: nodes, reducers, dir: tempfile::tempdir().unwrap() }
    }

    /// A file that holds these bytes.
    pub(crate) fn file(&self, bytes: &[u8]) -> std::path::PathBuf {
        let path = self.dir.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// A group of all members, in the order of ranks.
    pub(crate) async fn group(&self, name: &str, change: impl Fn(&mut GroupSpec)) -> Vec<Group> {
        let mut spec = GroupSpec::new(name, self.members.len());
        spec.admission = Admission::Anyone;
        spec.reducers = Reducers::Nodes(self.reducers.iter().map(Node::node_id).collect());
        spec.times = GroupTimes { gather: Duration::from_secs(60), ..GroupTimes::default() };
        change(&mut spec);
        let creator = (self.members[0].node_id(), self.members[0].hotkey());
        let creating = self.members[0].rounds();
        let joining = self.members[1..].iter().zip(1..).map(|(node, rank)| {
            let (rounds, mut spec) = (node.rounds(), spec.clone());
            spec.rank = Some(rank);
            async move { rounds.join(creator, name, None, &spec).await.unwrap() }
        });
        let (first, mut rest) =
            futures::future::join(creating.create(spec.clone()), futures::future::join_all(joining)).await;
        rest.push(first.unwrap());
        rest.sort_by_key(Group::rank);
        rest
    }

    pub(crate) async fn shutdown(self) {
        futures::future::join_all(self.members.iter().chain(&self.reducers).map(Node::shutdown)).await;
    }
}

/// Standard normal numbers, by seed.
pub(crate) fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..len)
        .map(|_| {
            let (a, b): (f64, f64) = (rng.random_range(f64::EPSILON..1.0), rng.random());
            ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
        })
        .collect()
}
