//! Nodes for tests: each with a network of its own, ended with the test.

use std::time::Duration;

use libp2p::Multiaddr;
use sundara_node::net::{NetConfig, NetHandle, NetIdentity, PeerStatus, TransportKind};
use sundara_proto::cert::{Certificate, Roles};
use sundara_proto::crypto::{HotkeyPair, Network, NodeKeyPair, Signed};
use sundara_proto::id::NodeId;
use sundara_proto::units::UnixMillis;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub const HOUR: Duration = Duration::from_secs(3600);

pub fn network() -> Network {
    Network::named("tests", 7)
}

pub fn now() -> UnixMillis {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap();
    UnixMillis(since.as_millis() as u64)
}

/// A seed that no other number gives.
pub fn seed(kind: u8, number: u32) -> [u8; 32] {
    let mut seed = [kind; 32];
    seed[..4].copy_from_slice(&number.to_le_bytes());
    seed
}

pub fn hotkey(number: u32) -> HotkeyPair {
    HotkeyPair::from_seed(&seed(1, number))
}

pub fn node_key(number: u32) -> NodeKeyPair {
    NodeKeyPair::from_seed(&seed(2, number))
}

/// A certificate that holds for an hour.
pub fn certificate(number: u32) -> Certificate {
    let now = now();
    Certificate {
        node: node_key(number).node_id(),
        network: network(),
        roles: Roles::LIGHT,
        issued_at: now,
        expires_at: now.plus(HOUR),
        serial: 1,
    }
}

pub fn identity_with(number: u32, signer: u32, certificate: Certificate) -> NetIdentity {
    let certificate = Signed::sign(&certificate.network.clone(), &hotkey(signer), certificate);
    NetIdentity { seed: seed(2, number).into(), certificate, known: Vec::new() }
}

pub fn identity(number: u32) -> NetIdentity {
    identity_with(number, number, certificate(number))
}

pub fn memory() -> NetConfig {
    NetConfig {
        listen: vec!["/memory/0".parse().unwrap()],
        transport: TransportKind::Memory,
        assume_reachable: true,
        bootstrap_retry: Duration::from_millis(50),
        ..NetConfig::default()
    }
}

pub fn tcp() -> NetConfig {
    NetConfig {
        listen: vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()],
        assume_reachable: true,
        bootstrap_retry: Duration::from_millis(50),
        ..NetConfig::default()
    }
}

/// A running network.
pub struct Node {
    pub net: NetHandle,
    pub address: Multiaddr,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Node {
    pub async fn start(config: NetConfig, identity: NetIdentity) -> Self {
        let (net, driver) = NetHandle::start(config, identity).unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(driver.run(stop.clone()));
        let address = net.listeners().await.first().cloned().unwrap_or_else(Multiaddr::empty);
        Self { net, address, stop, task: Some(task) }
    }

    pub async fn memory(number: u32) -> Self {
        Self::start(memory(), identity(number)).await
    }

    pub fn id(&self) -> NodeId {
        self.net.local().node
    }

    /// Connected to the other, certified by both.
    pub async fn join(&self, other: &Node) {
        let identity = self.net.dial(other.address.clone()).await.unwrap();
        assert_eq!(identity.node, other.id());
        until(|| async { other.net.peers().await.iter().any(|p| p.node == self.id() && p.connections > 0) }).await;
    }

    pub async fn peer(&self, node: NodeId) -> Option<PeerStatus> {
        self.net.peers().await.into_iter().find(|p| p.node == node)
    }

    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            task.await.unwrap();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Waits until something is so; fails after half a minute. Polls, since what is waited for has no event of its own.
pub async fn until<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) {
    let poll = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), poll).await.expect("it did not come about in 30 s");
}
