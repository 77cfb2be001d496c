//! The network: one libp2p swarm, driven by one loop, used through [`NetHandle`].
//!
//! Owns connections, certificates, requests and responses, gossip, the DHT, bulk streams, limits, scores and what is
//! known of peers. Does not own what any of it means: services hold a handle and decide.
//!
//! ```text
//! NetHandle --commands--> event loop (select: shutdown, commands, handshakes, gossip verdicts, tick, swarm events)
//!    |                        | owns the swarm; arms are synchronous on_* handlers
//!    |                        '-- certified peers: request streams (one driver task each), blob streams
//!    '--requests go straight to the peer's stream driver, past the loop
//! ```
//!
//! | file | holds |
//! | --- | --- |
//! | `event_loop`, `event_loop/` | the one select loop and its handlers |
//! | `behaviour`, `gate`, `streams`, `transport`, `read_ahead`, `muxer` | how libp2p is put together |
//! | `cert` | the handshake on /cert, before anything else of ours |
//! | `rpc/`, `gossip`, `dht`, `bulk` | the four ways of talking |
//! | `scoring`, `limits`, `peers`, `bootstrap`, `nat` | policy towards peers |
//!
//! Invariants: a peer without a valid certificate gets nothing but /cert, identify and ping; nothing that a peer sends
//! can make the loop wait, panic, or grow memory beyond the named limits.

mod behaviour;
mod bootstrap;
mod bulk;
mod cert;
mod config;
mod dht;
mod event_loop;
mod gate;
mod gossip;
mod id;
mod limits;
mod metrics;
mod muxer;
mod nat;
mod peers;
mod read_ahead;
mod rpc;
mod scoring;
mod status;
mod streams;
mod transport;

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use libp2p::{Multiaddr, PeerId};
use sundara_proto::cert::Certificate;
use sundara_proto::crypto::{Network, Signed};
use sundara_proto::id::{Digest, Hotkey, NodeId};
use sundara_proto::pb;
use tokio::sync::{broadcast, mpsc, oneshot};

use bulk::Bulk;
pub use bulk::{BulkError, BulkStream, IDLE_TIMEOUT as BLOB_IDLE_TIMEOUT, STREAMS_PER_PEER as BLOB_STREAMS_PER_PEER};
pub use config::{DEFAULT_PORT, NetConfig, NetError, NetIdentity, NetLimits, TransportKind, address, default_listen};
pub use dht::DhtError;
pub use event_loop::NetDriver;
pub use gossip::{Fault, GossipError, GossipMessage, GossipPayload, Topic};
pub use id::{node_id, peer_id};
pub use metrics::NetMetrics;
pub use rpc::{FailureCode, Gone, Inbound, PeerIdentity, Reply, RequestKind, Responses, RpcError};
pub use status::{BootstrapStatus, NetStatus, PeerEvent, PeerState, PeerStatus, Reachability};

/// Commands waiting for the loop.
const COMMANDS: usize = 1024;
/// Requests waiting for one service.
const SERVICE_QUEUE: usize = 4096;
/// Peer events that a subscriber may lag behind before it loses some.
const PEER_EVENTS: usize = 1024;
/// A dead peer must not cost its caller more than this, dialling and certificates included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);

/// Time that answers have to go out before a node stops.
pub const FLUSH_WITHIN: Duration = Duration::from_secs(2);

/// What the ledger says of a hotkey, for scores and slots.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Standing {
    /// Stake in whole units of the chain's token.
    pub stake: f64,
    /// Trust, 0 to 1; 0.5 says nothing.
    pub trust: f64,
    /// The owner (coldkey).
    pub owner: Option<[u8; 32]>,
}

/// What the loop is asked to do. Answers come through the channel inside; a dropped one means shutdown.
#[derive(Debug)]
enum Command {
    /// A request stream to a peer, made if need be.
    Link {
        to: NodeId,
        done: oneshot::Sender<Result<rpc::client::ClientLink, String>>,
    },
    /// A bulk stream to a peer.
    OpenBulk {
        to: NodeId,
        kind: Bulk,
        done: oneshot::Sender<Result<BulkStream, String>>,
    },
    Publish {
        topic: Topic,
        data: bytes::Bytes,
        done: oneshot::Sender<Result<(), GossipError>>,
    },
    /// Subscribers of the topic came or went.
    Topic(Topic),
    Dht(dht::Command),
    Dial {
        address: Multiaddr,
        done: oneshot::Sender<Result<PeerIdentity, String>>,
    },
    Disconnect {
        node: NodeId,
        reason: String,
    },
    Peers(oneshot::Sender<Vec<PeerStatus>>),
    Status(oneshot::Sender<NetStatus>),
    Listeners(oneshot::Sender<Vec<Multiaddr>>),
    Certificate(Box<Signed<Certificate>>),
    Standings(HashMap<Hotkey, Standing>),
    Exempt(Vec<NodeId>),
}

/// What handle and loop share. Nothing in it is held across an await.
#[derive(Debug)]
struct Shared {
    local: PeerIdentity,
    network: Network,
    commands: mpsc::Sender<Command>,
    /// Open request streams; the fast path of a request.
    links: RwLock<HashMap<NodeId, rpc::client::ClientLink>>,
    services: Arc<rpc::server::Services>,
    subscribers: gossip::SharedSubscribers,
    bulk: [Acceptor; Bulk::ALL.len()],
    peer_events: broadcast::Sender<PeerEvent>,
    metrics: NetMetrics,
}

type Acceptor = RwLock<Option<mpsc::Sender<(PeerIdentity, BulkStream)>>>;

impl Shared {
    fn acceptor(&self, kind: Bulk) -> &Acceptor {
        &self.bulk[kind as usize]
    }

    /// Hands a stream to whoever takes its kind. `false`: nobody does, or not fast enough.
    fn deliver(&self, kind: Bulk, from: PeerIdentity, stream: BulkStream) -> bool {
        let sender = self.acceptor(kind).read().unwrap_or_else(PoisonError::into_inner).clone();
        sender.is_some_and(|sender| sender.try_send((from, stream)).is_ok())
    }

    fn link(&self, to: NodeId) -> Option<rpc::client::ClientLink> {
        let links = self.links.read().unwrap_or_else(PoisonError::into_inner);
        links.get(&to).filter(|link| !link.is_closed()).cloned()
    }
}

/// The network, for services. Cheap to clone; works until the loop ends, then every call fails with `Closed`.
#[derive(Clone, Debug)]
pub struct NetHandle {
    shared: Arc<Shared>,
}

impl NetHandle {
    /// This node, as peers see it.
    pub fn local(&self) -> PeerIdentity {
        self.shared.local
    }

    /// The mesh.
    pub fn network(&self) -> Network {
        self.shared.network
    }

    /// This node's libp2p name.
    pub fn peer_id(&self) -> PeerId {
        id::peer_id(self.shared.local.node)
    }

    /// What is counted.
    pub fn metrics(&self) -> &NetMetrics {
        &self.shared.metrics
    }

    /// Asks a peer; connects first if need be. The answers come as a stream. A request to this node itself goes to its
    /// own service.
    ///
    /// # Errors
    /// [`RpcError::Unreachable`] within [`CONNECT_TIMEOUT`] when no certified connection comes about.
    ///
    /// Cancel-safe: dropped before it returns, the peer is told to stop, or never hears of it.
    pub async fn request(&self, to: NodeId, mut request: pb::request::Kind) -> Result<Responses, RpcError> {
        self.shared.metrics.rpc_requests_out.inc();
        if to == self.shared.local.node {
            let (responses, inbound) = rpc::local(self.shared.local, request);
            return match self.shared.services.deliver(inbound) {
                rpc::server::Delivered::Taken => Ok(responses),
                rpc::server::Delivered::Refused(code, detail) => {
                    Err(RpcError::Refused { code, detail: detail.to_owned() })
                }
            };
        }
        // A link that has just ended gives the request back; the second one is new.
        for _ in 0..2 {
            let link = match self.shared.link(to) {
                Some(link) => link,
                None => self.link(to).await?,
            };
            match link.open(request).await {
                Ok(result) => return result,
                Err(back) => request = back,
            }
        }
        Err(RpcError::Unreachable { node: to, reason: "the connection ends as soon as it is made".to_owned() })
    }

    /// [`NetHandle::request`] for one answer.
    pub async fn request_one(&self, to: NodeId, request: pb::request::Kind) -> Result<pb::response::Kind, RpcError> {
        let mut responses = self.request(to, request).await?;
        responses.next().await.unwrap_or(Err(RpcError::Empty))
    }

    async fn link(&self, to: NodeId) -> Result<rpc::client::ClientLink, RpcError> {
        let (done, answer) = oneshot::channel();
        self.command(Command::Link { to, done }).await.map_err(|Stopped| RpcError::Closed)?;
        match tokio::time::timeout(CONNECT_TIMEOUT, answer).await {
            Ok(Ok(Ok(link))) => Ok(link),
            Ok(Ok(Err(reason))) => Err(RpcError::Unreachable { node: to, reason }),
            Ok(Err(_)) => Err(RpcError::Closed),
            Err(_) => Err(RpcError::Unreachable { node: to, reason: timed_out() }),
        }
    }

    /// Takes requests of these kinds from now on; an earlier receiver of a kind gets no more of it. A full receiver (it
    /// holds 4,096) makes peers hear BUSY.
    pub fn serve(&self, kinds: &[RequestKind]) -> mpsc::Receiver<Inbound> {
        let (sender, receiver) = mpsc::channel(SERVICE_QUEUE);
        self.shared.services.set(kinds, &sender);
        receiver
    }

    /// Sends a message to everyone who listens to the topic, this node's own subscribers included.
    ///
    /// # Errors
    /// [`GossipError::NoPeers`] when only this node's own subscribers got it.
    pub async fn publish(&self, topic: Topic, gossip: pb::Gossip) -> Result<(), GossipError> {
        let shared = &self.shared;
        let (data, payload) = gossip::encode_own(&shared.network, topic, &gossip)?;
        let message = GossipMessage { from: shared.local.node, payload };
        shared.subscribers.deliver(topic, &message, &shared.metrics);
        shared.metrics.gossip_published.inc();
        let (done, answer) = oneshot::channel();
        self.command(Command::Publish { topic, data, done }).await.map_err(|Stopped| GossipError::Closed)?;
        answer.await.unwrap_or(Err(GossipError::Closed))
    }

    /// Messages of a topic, verified. A subscriber that lags by more than 1,024 loses messages, which is counted.
    pub async fn subscribe(&self, topic: Topic) -> mpsc::Receiver<GossipMessage> {
        let receiver = self.shared.subscribers.add(topic);
        // After shutdown the receiver simply stays empty.
        drop(self.command(Command::Topic(topic)).await);
        receiver
    }

    /// Passes a topic's messages on, verified, whether or not anyone here listens to it: gossip travels only through
    /// nodes that take part in its topic.
    pub async fn carry(&self, topic: Topic) {
        self.shared.subscribers.carry(topic);
        drop(self.command(Command::Topic(topic)).await);
    }

    /// Stores a record in the DHT: at this node and at those nearest to the key.
    pub async fn put_record(&self, key: Digest, value: Vec<u8>) -> Result<(), DhtError> {
        self.dht(|done| dht::Command::Put { key, value, done }).await
    }

    /// Every well-formed, signed, unexpired record found under the key, newest first. Empty when there is none.
    pub async fn get_records(&self, key: Digest) -> Result<Vec<Vec<u8>>, DhtError> {
        let found = self.dht(|done| dht::Command::Get { key, done }).await?;
        Ok(dht::select(&self.shared.network, key, found, dht::wall_clock()))
    }

    /// Says that this node provides what the key stands for, now and again, until [`NetHandle::stop_providing`].
    pub async fn provide(&self, key: Digest) -> Result<(), DhtError> {
        self.dht(|done| dht::Command::Provide { key, done }).await
    }

    /// Takes it back; others forget within a day.
    pub async fn stop_providing(&self, key: Digest) -> Result<(), DhtError> {
        self.dht(|done| dht::Command::StopProviding { key, done }).await
    }

    /// Nodes that provide what the key stands for, without this node.
    pub async fn find_providers(&self, key: Digest) -> Result<Vec<NodeId>, DhtError> {
        self.dht(|done| dht::Command::FindProviders { key, done }).await
    }

    async fn dht<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, DhtError>>) -> dht::Command,
    ) -> Result<T, DhtError> {
        let (done, answer) = oneshot::channel();
        self.command(Command::Dht(command(done))).await.map_err(|Stopped| DhtError::Closed)?;
        answer.await.unwrap_or(Err(DhtError::Closed))
    }

    /// Opens a stream for blobs; connects first if need be. Streams to one peer are spread over two connections.
    pub async fn open_blob(&self, to: NodeId) -> Result<BulkStream, BulkError> {
        self.open_bulk(to, Bulk::Blob).await
    }

    /// Opens a stream for map-reduce rounds; connects first if need be. Streams to one peer are spread over two
    /// connections.
    pub async fn open_round(&self, to: NodeId) -> Result<BulkStream, BulkError> {
        self.open_bulk(to, Bulk::Round).await
    }

    async fn open_bulk(&self, to: NodeId, kind: Bulk) -> Result<BulkStream, BulkError> {
        if to == self.shared.local.node {
            let (ours, theirs) = BulkStream::local(kind);
            let taken = self.shared.deliver(kind, self.shared.local, theirs);
            return if taken { Ok(ours) } else { Err(BulkError::NotServed) };
        }
        let (done, answer) = oneshot::channel();
        self.command(Command::OpenBulk { to, kind, done }).await.map_err(|Stopped| BulkError::Closed)?;
        match tokio::time::timeout(CONNECT_TIMEOUT, answer).await {
            Ok(Ok(Ok(stream))) => Ok(stream),
            Ok(Ok(Err(reason))) => Err(BulkError::Unreachable { node: to, reason }),
            Ok(Err(_)) => Err(BulkError::Closed),
            Err(_) => Err(BulkError::Unreachable { node: to, reason: timed_out() }),
        }
    }

    /// Takes the blob streams that peers open from now on; an earlier receiver gets no more.
    pub fn accept_blobs(&self) -> mpsc::Receiver<(PeerIdentity, BulkStream)> {
        self.accept_bulk(Bulk::Blob)
    }

    /// Takes the round streams that peers open from now on; an earlier receiver gets no more.
    pub fn accept_rounds(&self) -> mpsc::Receiver<(PeerIdentity, BulkStream)> {
        self.accept_bulk(Bulk::Round)
    }

    fn accept_bulk(&self, kind: Bulk) -> mpsc::Receiver<(PeerIdentity, BulkStream)> {
        let (sender, receiver) = mpsc::channel(bulk::ACCEPT_QUEUE);
        *self.shared.acceptor(kind).write().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        receiver
    }

    /// Connects to an address, with or without `/p2p/PEERID`, and waits for both certificates.
    ///
    /// # Errors
    /// What failed, in words.
    pub async fn dial(&self, address: Multiaddr) -> Result<PeerIdentity, String> {
        let (done, answer) = oneshot::channel();
        let closed = || "network is shut down".to_owned();
        self.command(Command::Dial { address, done }).await.map_err(|Stopped| closed())?;
        match tokio::time::timeout(CONNECT_TIMEOUT, answer).await {
            Ok(answer) => answer.unwrap_or_else(|_| Err(closed())),
            Err(_) => Err(timed_out()),
        }
    }

    /// Ends all connections to a peer, and says why in the log and in its status.
    pub async fn disconnect(&self, node: NodeId, reason: impl Into<String>) {
        drop(self.command(Command::Disconnect { node, reason: reason.into() }).await);
    }

    /// Waits until the answers of this node's services are handed to the network, for at most [`FLUSH_WITHIN`]: what was
    /// done last before a shutdown is worth nothing unless its asker hears of it.
    pub async fn flush(&self) {
        // Whoever takes no answers for so long gets none.
        drop(tokio::time::timeout(FLUSH_WITHIN, self.shared.services.unsent().none()).await);
    }

    /// Everything known of peers. Empty after shutdown.
    pub async fn peers(&self) -> Vec<PeerStatus> {
        self.ask(Command::Peers).await.unwrap_or_default()
    }

    /// The network as this node sees it.
    pub async fn status(&self) -> Result<NetStatus, NetError> {
        self.ask(Command::Status).await.ok_or(NetError::Closed)
    }

    /// Addresses listened on, `/p2p/PEERID` included; waits until every listener has one. Empty when the node only
    /// dials.
    pub async fn listeners(&self) -> Vec<Multiaddr> {
        self.ask(Command::Listeners).await.unwrap_or_default()
    }

    /// Comings and goings of certified peers from now on.
    pub fn subscribe_peers(&self) -> broadcast::Receiver<PeerEvent> {
        self.shared.peer_events.subscribe()
    }

    /// Replaces this node's certificate and shows it to every connected peer. Must be for the same key and mesh.
    pub async fn set_certificate(&self, certificate: Signed<Certificate>) -> Result<(), NetError> {
        if certificate.node != self.shared.local.node || certificate.network != self.shared.network {
            return Err(NetError::Certificate);
        }
        self.command(Command::Certificate(Box::new(certificate))).await.map_err(|Stopped| NetError::Closed)
    }

    /// What the ledger says of hotkeys; replaces what it said before. Sets gossip scores and who counts as registered.
    pub async fn set_standings(&self, standings: HashMap<Hotkey, Standing>) {
        drop(self.command(Command::Standings(standings)).await);
    }

    /// Nodes that slots do not limit: a miner's own executors. Replaces the earlier list.
    pub async fn set_exempt(&self, nodes: Vec<NodeId>) {
        drop(self.command(Command::Exempt(nodes)).await);
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (done, answer) = oneshot::channel();
        self.command(command(done)).await.ok()?;
        answer.await.ok()
    }

    async fn command(&self, command: Command) -> Result<(), Stopped> {
        self.shared.commands.send(command).await.map_err(|_| Stopped)
    }
}

/// The loop has ended.
struct Stopped;

fn timed_out() -> String {
    format!("no certified connection within {} s", CONNECT_TIMEOUT.as_secs())
}
