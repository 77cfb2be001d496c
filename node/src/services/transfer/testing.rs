//! A mesh of pipes for tests: nodes that serve for real, and streams on which a man in the middle misbehaves.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use sundara_proto::id::{BlobId, Hotkey, NodeId};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;

use super::{BlobIo, BlobNet, Transfer, TransferConfig, TransferStats};
use crate::blobs::{Asker, Blobs, BlobsConfig, TransferHandle, lock, transfer_channel};
use crate::service::Tasks;

/// Bytes in flight in a pipe.
const PIPE: usize = 64 << 10;

/// What a provider's bytes go through on their way.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    None,
    /// The byte at this place is changed.
    Flip(u64),
    /// After so many bytes nothing more comes.
    Stall(u64),
    /// After so many bytes the stream ends.
    Close(u64),
    /// One byte of each 1,024 arrives, the stream never ends.
    Drip,
}

#[derive(Default)]
pub(crate) struct Mesh {
    nodes: Mutex<HashMap<NodeId, mpsc::Sender<(Asker, DuplexStream)>>>,
    faults: Mutex<HashMap<NodeId, Fault>>,
    pub(crate) providers: Mutex<HashMap<BlobId, HashSet<NodeId>>>,
    pub(crate) reports: Mutex<Vec<NodeId>>,
}

pub(crate) struct PipeNet {
    local: Asker,
    mesh: Arc<Mesh>,
}

/// One node: a store, a service, and the handle to ask it with.
pub(crate) struct TestNode {
    pub(crate) id: NodeId,
    pub(crate) blobs: Blobs,
    pub(crate) transfer: TransferHandle,
    pub(crate) stats: Arc<TransferStats>,
    pub(crate) tasks: Tasks,
}

impl Mesh {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Starts node number `n`; its hotkey has the same number.
    pub(crate) async fn node(self: &Arc<Self>, n: u8, dir: &Path, config: TransferConfig) -> TestNode {
        self.node_with(n, dir, config, BlobsConfig::default()).await
    }

    pub(crate) async fn node_with(
        self: &Arc<Self>,
        n: u8,
        dir: &Path,
        config: TransferConfig,
        blobs: BlobsConfig,
    ) -> TestNode {
        let blobs = Blobs::open(dir.join(format!("node-{n}")), blobs).await.unwrap();
        let local = Asker { node: NodeId([n; 32]), hotkey: Some(Hotkey([n; 32])) };
        let (inbound, streams) = mpsc::channel(64);
        lock(&self.nodes).insert(local.node, inbound);
        let net = Arc::new(PipeNet { local, mesh: self.clone() });
        let (transfer, requests) = transfer_channel();
        let tasks = Tasks::new();
        let service = Transfer::new(blobs.clone(), net, config, requests, tasks.child("transfer"));
        let stats = service.stats();
        tasks.spawn("run", service.run(streams));
        TestNode { id: local.node, blobs, transfer, stats, tasks }
    }

    /// A node that answers every stream with `bytes` and reads on.
    pub(crate) fn scripted(&self, node: NodeId, bytes: Vec<u8>) {
        let (inbound, mut streams) = mpsc::channel::<(Asker, DuplexStream)>(64);
        lock(&self.nodes).insert(node, inbound);
        tokio::spawn(async move {
            while let Some((_, mut stream)) = streams.recv().await {
                let bytes = bytes.clone();
                tokio::spawn(async move {
                    let _ = stream.write_all(&bytes).await;
                    let mut sink = Vec::new();
                    let _ = stream.read_to_end(&mut sink).await;
                });
            }
        });
    }

    pub(crate) fn fault(&self, node: NodeId, fault: Fault) {
        lock(&self.faults).insert(node, fault);
    }
}

#[async_trait]
impl BlobNet for PipeNet {
    fn local(&self) -> NodeId {
        self.local.node
    }

    async fn open(&self, peer: NodeId) -> io::Result<Box<dyn BlobIo>> {
        let node = lock(&self.mesh.nodes).get(&peer).cloned().ok_or(io::ErrorKind::NotConnected)?;
        let fault = lock(&self.mesh.faults).get(&peer).copied().unwrap_or(Fault::None);
        let (ours, middle_near) = duplex(PIPE);
        let (middle_far, theirs) = duplex(PIPE);
        tokio::spawn(in_the_middle(middle_near, middle_far, fault));
        node.send((self.local, theirs)).await.map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(ours))
    }

    async fn find_providers(&self, blob: BlobId) -> Vec<NodeId> {
        let mut found: Vec<_> = lock(&self.mesh.providers).get(&blob).into_iter().flatten().copied().collect();
        found.sort_unstable();
        found
    }

    async fn provide(&self, blob: BlobId) {
        lock(&self.mesh.providers).entry(blob).or_default().insert(self.local.node);
    }

    async fn stop_providing(&self, blob: BlobId) {
        lock(&self.mesh.providers).entry(blob).or_default().remove(&self.local.node);
    }

    async fn report(&self, peer: NodeId, _reason: String) {
        lock(&self.mesh.reports).push(peer);
    }
}

async fn in_the_middle(near: DuplexStream, far: DuplexStream, fault: Fault) {
    let (mut from_near, mut to_near) = tokio::io::split(near);
    let (mut from_far, mut to_far) = tokio::io::split(far);
    let requests = async {
        let _ = tokio::io::copy(&mut from_near, &mut to_far).await;
        let _ = to_far.shutdown().await;
    };
    let answers = async {
        let mut buffer = vec![0; 8 << 10];
        let mut at = 0_u64;
        while let Ok(n @ 1..) = from_far.read(&mut buffer).await {
            let mut bytes = buffer[..n].to_vec();
            match fault {
                Fault::Flip(place) if (at..at + n as u64).contains(&place) => bytes[(place - at) as usize] ^= 4,
                Fault::Stall(after) if at >= after => std::future::pending().await,
                Fault::Close(after) if at >= after => break,
                Fault::Drip if at > 1024 => {
                    bytes.truncate(1);
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                }
                _ => {}
            }
            at += n as u64;
            if to_near.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = to_near.shutdown().await;
    };
    tokio::select! {
        () = answers => {}
        () = async { requests.await; std::future::pending().await } => {}
    }
}
