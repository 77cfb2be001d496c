//! Nodes for the tests of executors and miners: every port is real, the network is libp2p's in-process transport.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sundara_proto::attestation::ExecutorCert;
use sundara_proto::cert::{Certificate, Roles};
use sundara_proto::crypto::{HotkeyPair, Network, NodeKeyPair, Signed};
use sundara_proto::id::{BlobId, NodeId};
use sundara_proto::job::{JobSpec, Limits, Program};
use sundara_proto::pb;
use sundara_proto::units::{BlockNumber, ByteCount};
use sundara_proto::wire::limit;
use sundara_runtime::{BuiltinRuntime, RuntimeSet};
use tokio::sync::watch;
use tokio::time::Instant;

use super::pool::{Pool, PoolConfig, PoolParts};
use super::{ExecutorHandle, Misbehaviour, Order, certs};
use crate::blobs::{Access, Blobs, BlobsConfig, Reader, TransferHandle, transfer_channel};
use crate::net::{NetConfig, NetHandle, NetIdentity, TransportKind};
use crate::service::{Tasks, Workers, wall_now};
use crate::services::executor::{self, ExecutorConfig, ExecutorParts};
use crate::services::registry::{self, RegistryHandle, RegistryParts};
use crate::services::transfer::{self, TransferParts};
use crate::store::{MemoryStore, SharedStore};

const HOUR: Duration = Duration::from_secs(3600);

pub(crate) fn network() -> Network {
    Network::named("work tests", 3)
}

/// A node without services but those that every node has.
pub(crate) struct TestNode {
    pub(crate) key: HotkeyPair,
    pub(crate) node_key: NodeKeyPair,
    pub(crate) net: NetHandle,
    pub(crate) address: libp2p::Multiaddr,
    pub(crate) store: SharedStore,
    pub(crate) blobs: Blobs,
    pub(crate) transfer: TransferHandle,
    pub(crate) registry: RegistryHandle,
    pub(crate) tasks: Tasks,
    pub(crate) dir: tempfile::TempDir,
}

impl Drop for TestNode {
    fn drop(&mut self) {
        self.tasks.token().cancel();
    }
}

impl TestNode {
    /// A node whose keys follow from `number`.
    pub(crate) async fn start(number: u8, roles: Roles) -> Self {
        let (key, seed) = (HotkeyPair::from_seed(&[number; 32]), [number.wrapping_add(100); 32]);
        let node_key = NodeKeyPair::from_seed(&seed);
        let now = wall_now();
        let certificate = Certificate {
            node: node_key.node_id(),
            network: network(),
            roles,
            issued_at: now,
            expires_at: now.plus(HOUR),
            serial: 1,
        };
        let certificate = Signed::sign(&network(), &key, certificate);
        let config = NetConfig {
            listen: vec!["/memory/0".parse().unwrap()],
            transport: TransportKind::Memory,
            assume_reachable: true,
            ..NetConfig::default()
        };
        let identity = NetIdentity { seed: seed.into(), certificate, known: Vec::new() };
        let (net, driver) = NetHandle::start(config, identity).unwrap();
        let tasks = Tasks::new();
        tasks.spawn("net", driver.run(tasks.token()));
        let address = net.listeners().await.first().cloned().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path().join("blobs"), BlobsConfig::default()).await.unwrap();
        let store: SharedStore = Arc::new(MemoryStore::new());
        let (transfer, requests) = transfer_channel();
        transfer::start(TransferParts {
            config: transfer::TransferConfig::default(),
            net: net.clone(),
            blobs: blobs.clone(),
            requests,
            tasks: tasks.child("transfer"),
        });
        let registry = registry::start(RegistryParts {
            config: registry::RegistryConfig::default(),
            network: network(),
            net: net.clone(),
            store: store.clone(),
            blobs: blobs.clone(),
            transfer: transfer.clone(),
            hotkey: None,
            tasks: tasks.child("registry"),
        })
        .unwrap();
        Self { key, node_key, net, address, store, blobs, transfer, registry, tasks, dir }
    }

    pub(crate) fn id(&self) -> NodeId {
        self.node_key.node_id()
    }

    /// Connected to the other, certified by both.
    pub(crate) async fn join(&self, other: &Self) {
        let mut events = other.net.subscribe_peers();
        assert_eq!(self.net.dial(other.address.clone()).await.unwrap().node, other.id());
        loop {
            if other.net.peers().await.iter().any(|p| p.node == self.id() && p.hotkey.is_some() && p.connections > 0) {
                return;
            }
            let _ = events.recv().await;
        }
    }

    /// An executor with two slots, certified by `owner`.
    pub(crate) fn executor(&self, owner: &HotkeyPair, misbehaviour: Option<Misbehaviour>) -> ExecutorHandle {
        let cert = certs::issue(&network(), owner, self.id(), "cpu", wall_now());
        self.executor_with(Some(cert), misbehaviour)
    }

    pub(crate) fn executor_with(
        &self,
        cert: Option<Signed<ExecutorCert>>,
        misbehaviour: Option<Misbehaviour>,
    ) -> ExecutorHandle {
        let (tx, cert) = watch::channel(cert);
        // The slot stays as it is for the length of the test.
        std::mem::forget(tx);
        self.executor_in(cert, misbehaviour)
    }

    pub(crate) fn executor_in(&self, cert: certs::CertSlot, misbehaviour: Option<Misbehaviour>) -> ExecutorHandle {
        let parts = ExecutorParts {
            config: ExecutorConfig { slots: 2, ..ExecutorConfig::default() },
            network: network(),
            key: self.node_key.clone(),
            cert,
            runtime: RuntimeSet::new().with(Arc::new(BuiltinRuntime::new())),
            registry: self.registry.clone(),
            blobs: self.blobs.clone(),
            transfer: self.transfer.clone(),
            scratch: self.dir.path().join("scratch"),
            misbehaviour,
            tasks: self.tasks.child("executor"),
        };
        executor::start(parts).unwrap()
    }

    /// An empty pool of this node's executors.
    pub(crate) fn pool(&self) -> Pool {
        Pool::new(PoolParts {
            config: PoolConfig::default(),
            network: network(),
            owner: self.key.hotkey(),
            net: self.net.clone(),
            blobs: self.blobs.clone(),
            transfer: self.transfer.clone(),
            workers: Workers::new("pool", 2),
            tasks: self.tasks.child("pool"),
        })
    }

    /// Where this node's input of `spec` is, once it is put there for `reader`.
    pub(crate) async fn put_input(&self, input: &Bytes, reader: Reader) {
        self.blobs.put(input.clone(), Access::only([reader])).await.unwrap();
    }
}

/// A job over a builtin program.
pub(crate) fn spec(name: &str, input: &[u8], nonce: u8, change: impl FnOnce(&mut JobSpec)) -> Signed<JobSpec> {
    let mut spec = JobSpec {
        network: network(),
        block: BlockNumber(0),
        nonce: [nonce; 16],
        not_after: wall_now().plus(HOUR),
        program: Program::Builtin { name: name.to_owned() },
        input: BlobId::of(input),
        input_len: ByteCount(input.len() as u64),
        params: Bytes::new(),
        seed: 1,
        limits: Limits::default(),
        replicas: 2,
        hardware_class: String::new(),
        stream: false,
    };
    change(&mut spec);
    Signed::sign(&network(), &HotkeyPair::from_seed(&[77; 32]), spec)
}

/// The order for a spec, with its input inline where it is small.
pub(crate) fn order(spec: &Signed<JobSpec>, input: &[u8], validator: &TestNode) -> Order {
    Order {
        job: spec.id(),
        spec: Arc::new(spec.clone()),
        attempt: 0,
        inline_input: (input.len() <= limit::INLINE).then(|| Bytes::copy_from_slice(input)),
        stream: false,
        sources: vec![validator.id()],
        validator: validator.key.hotkey(),
        deadline: Instant::now() + HOUR,
    }
}

/// The offer for a spec.
pub(crate) fn offer(spec: &Signed<JobSpec>, input: &[u8], validator: &TestNode, commit_reveal: bool) -> pb::Offer {
    pb::Offer {
        spec: Some(spec.to_wire()),
        attempt: 0,
        commit_reveal,
        stream: false,
        inline_input: (input.len() <= limit::INLINE).then(|| Bytes::copy_from_slice(input)),
        deadline_ms: u64::try_from(HOUR.as_millis()).unwrap(),
        validator: validator.key.hotkey().into(),
    }
}
