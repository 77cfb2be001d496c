//! The one loop that owns the swarm.
//!
//! Owns the order in which things are looked at, and the state that handlers share. The handlers stand in the files below
//! by subject; every one is synchronous. `select!` is the only await.
//!
//! Order: shutdown, commands, results of tasks (handshakes, ended streams, checked gossip), the tick, the swarm. Commands
//! come before swarm events, so that a flood of the latter cannot keep a service waiting.
//!
//! Invariants: nothing here waits for a peer, a service or a lock held across an await; what is handed upward is handed by
//! `try_send`; every map is bounded by connections, which are limited, or by a constant that stands beside it.

mod connections;
mod discovery;
pub(super) mod gossip;
mod handshakes;
mod links;
mod queries;
mod streams;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use libp2p::swarm::{self, ConnectionId, Swarm, SwarmEvent};
use libp2p::{Multiaddr, PeerId, core::transport::ListenerId};
use sundara_proto::cert::Certificate;
use sundara_proto::crypto::{NodeKeyPair, Signed};
use sundara_proto::id::Hotkey;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use super::behaviour::{self, Behaviour, BehaviourEvent};
use super::bootstrap::Bootstrap;
use super::bulk;
use super::gate::{Gates, PeerGate};
use super::limits::Slots;
use super::nat::Nat;
use super::peers::Peers;
use super::rpc::PeerIdentity;
use super::status::{NetStatus, PeerEvent, PeerStatus, Reachability};
use super::{
    COMMANDS, Command, NetConfig, NetError, NetHandle, NetIdentity, NetMetrics, PEER_EVENTS, Shared, Standing, cert,
    id, rpc, scoring, transport,
};

/// Bootstrap retries, timeouts and upkeep are looked at so often.
const TICK: Duration = Duration::from_millis(500);
/// Results of tasks waiting for the loop. Tasks wait when it is full; the loop never waits for them.
const RESULTS: usize = 1024;
/// A connection without traffic is closed after this, unless there is room to keep it.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Up to so many connections are kept open without traffic, so that the mesh stays in touch.
const KEEP_CONNECTIONS: u32 = 128;
/// Inbound streams of one connection that negotiate at once.
const NEGOTIATING: usize = 64;
/// Warnings kept for the status.
const WARNINGS: usize = 16;
/// Time for streams and connections to end when the node shuts down.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// A certified peer.
struct Session {
    identity: PeerIdentity,
    certificate: Signed<Certificate>,
    version: u32,
    instance: [u8; 16],
    /// The peer has accepted our certificate too.
    agreed: bool,
    gate: Arc<PeerGate>,
    /// Bytes of its requests that wait for a service.
    queued: Arc<AtomicUsize>,
    /// Bulk streams that it has open here.
    bulk: bulk::Counts,
    /// Request streams that it has open here.
    serving: usize,
}

/// An open connection.
struct Connection {
    peer: PeerId,
    address: Multiaddr,
    dialled: bool,
    relayed: bool,
    opened: Instant,
    certified: bool,
    /// A handshake of the peer runs.
    handshaking: bool,
    /// Bulk streams of ours on it.
    bulk: bulk::Counts,
    /// Why this node closes it.
    closing: Option<String>,
}

/// What a task tells the loop.
#[derive(Debug)]
enum TaskEnd {
    /// A request stream of ours ended.
    Client {
        peer: PeerId,
    },
    /// A request stream of a peer ended; the reason if the peer is at fault.
    Server {
        peer: PeerId,
        fault: Option<String>,
    },
    Judged(gossip::Judged),
}

/// The network's loop. Does nothing until [`NetDriver::run`] is polled.
pub struct NetDriver {
    swarm: Swarm<Behaviour>,
    config: NetConfig,
    shared: Arc<Shared>,
    ours: cert::Ours,
    commands: mpsc::Receiver<Command>,
    handshakes: (mpsc::Sender<cert::Event>, mpsc::Receiver<cert::Event>),
    results: (mpsc::Sender<TaskEnd>, mpsc::Receiver<TaskEnd>),
    judge: mpsc::Sender<gossip::Work>,
    judge_queue: Option<mpsc::Receiver<gossip::Work>>,
    tasks: TaskTracker,
    stop: CancellationToken,

    gates: Gates,
    keep: Arc<AtomicBool>,
    connections: HashMap<ConnectionId, Connection>,
    sessions: HashMap<PeerId, Session>,
    peers: Peers,
    slots: Slots,
    bootstrap: Bootstrap,
    nat: Nat,
    standings: HashMap<Hotkey, Standing>,
    /// Highest serial seen of a hotkey, and the node that it is for.
    serials: HashMap<Hotkey, (u64, PeerId)>,
    conflicts: handshakes::Conflicts,
    links: links::Links,
    queries: queries::Queries,
    all_bulk: bulk::Counts,
    my_bulk: bulk::Counts,

    listeners: HashMap<ListenerId, Vec<Multiaddr>>,
    relay_listeners: HashMap<ListenerId, PeerId>,
    waiting_listeners: Vec<oneshot::Sender<Vec<Multiaddr>>>,
    warnings: VecDeque<String>,
    ticks: u64,
}

impl NetHandle {
    /// Puts the network together and begins to listen. Nothing moves until the driver is run.
    ///
    /// Must be called within a tokio runtime; the network uses that one.
    ///
    /// # Errors
    /// [`NetError::Listen`] when an address cannot be listened on, [`NetError::Certificate`] when the certificate is for
    /// another key.
    pub fn start(config: NetConfig, identity: NetIdentity) -> Result<(Self, NetDriver), NetError> {
        let node = NodeKeyPair::from_seed(&identity.seed).node_id();
        if identity.certificate.node != node {
            return Err(NetError::Certificate);
        }
        let keypair = id::keypair(&identity.seed).ok_or(NetError::Certificate)?;
        let network = identity.certificate.network;
        let local = PeerIdentity { node, hotkey: identity.certificate.hotkey(), roles: identity.certificate.roles };

        let (gates, keep) = (Gates::default(), Arc::new(AtomicBool::new(true)));
        let metrics = NetMetrics::default();
        let (transport, relay_client) = transport::build(config.transport, &keypair, &metrics)?;
        let behaviour = behaviour::build(&config, &network, &keypair, &gates, keep.clone(), relay_client)?;
        let swarm_config = swarm::Config::with_tokio_executor()
            .with_idle_connection_timeout(IDLE_TIMEOUT)
            .with_max_negotiating_inbound_streams(NEGOTIATING);
        let swarm = Swarm::new(transport, behaviour, keypair.public().to_peer_id(), swarm_config);

        let (commands, queue) = mpsc::channel(COMMANDS);
        let shared = Arc::new(Shared {
            local,
            network,
            commands,
            links: Default::default(),
            services: Arc::new(rpc::server::Services::new(metrics.clone())),
            subscribers: Default::default(),
            bulk: Default::default(),
            peer_events: broadcast::channel(PEER_EVENTS).0,
            metrics,
        });
        let (judge, judge_queue) = mpsc::channel(gossip::QUEUE);
        let now = Instant::now();
        let public = config.assume_reachable || !config.announce.is_empty();
        let ours = cert::Ours {
            network,
            certificate: identity.certificate,
            versions: config.versions.clone(),
            instance: rand::random(),
        };
        let mut driver = NetDriver {
            swarm,
            bootstrap: Bootstrap::new(&config.bootstrap, config.bootstrap_retry, now),
            slots: Slots::new(config.limits.clone()),
            nat: Nat::new(public),
            config,
            shared: shared.clone(),
            ours,
            commands: queue,
            handshakes: mpsc::channel(RESULTS),
            results: mpsc::channel(RESULTS),
            judge,
            judge_queue: Some(judge_queue),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            gates,
            keep,
            connections: HashMap::new(),
            sessions: HashMap::new(),
            peers: Peers::default(),
            standings: HashMap::new(),
            serials: HashMap::new(),
            conflicts: Default::default(),
            links: Default::default(),
            queries: Default::default(),
            all_bulk: bulk::Counts::default(),
            my_bulk: bulk::Counts::default(),
            listeners: HashMap::new(),
            relay_listeners: HashMap::new(),
            waiting_listeners: Vec::new(),
            warnings: VecDeque::new(),
            ticks: 0,
        };
        for address in &identity.known {
            if let Some(peer) = super::bootstrap::peer_of(address) {
                driver.peers.learn(peer, address.clone(), now);
            }
        }
        driver.listen()?;
        Ok((Self { shared }, driver))
    }
}

impl NetDriver {
    fn listen(&mut self) -> Result<(), NetError> {
        for address in self.config.listen.clone() {
            let id = self
                .swarm
                .listen_on(address.clone())
                .map_err(|error| NetError::Listen { address, reason: connections::transport_reason(&error) })?;
            self.listeners.insert(id, Vec::new());
        }
        for address in self.config.announce.clone() {
            self.swarm.add_external_address(address);
        }
        if self.nat.reachability() == Reachability::Public {
            self.set_dht_server(true);
        }
        Ok(())
    }

    /// Runs until `shutdown` is cancelled, then ends every stream and connection.
    ///
    /// Not cancel-safe: dropped, it takes the network with it.
    pub async fn run(mut self, shutdown: CancellationToken) {
        if let Some(queue) = self.judge_queue.take() {
            let worker = gossip::worker(self.shared.clone(), queue, self.results.0.clone());
            self.spawn(worker);
        }
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                command = self.commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => break,
                },
                Some(event) = self.handshakes.1.recv() => self.on_handshake(event),
                Some(result) = self.results.1.recv() => self.on_task_end(result),
                _ = tick.tick() => self.on_tick(Instant::now()),
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
            }
        }
        self.close().await;
    }

    async fn close(mut self) {
        self.commands.close();
        self.stop.cancel();
        self.tasks.close();
        self.shared.links.write().unwrap_or_else(PoisonError::into_inner).clear();
        let peers: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            // Already closing is closed too.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let drain = async {
            while self.swarm.network_info().connection_counters().num_established() > 0 {
                self.swarm.select_next_some().await;
            }
            self.tasks.wait().await;
        };
        if tokio::time::timeout(SHUTDOWN_GRACE, drain).await.is_err() {
            tracing::debug!("connections did not end in time; they are dropped");
        }
    }

    /// A task that ends with the network.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// The same for what concerns one peer, under its span.
    fn spawn_for(&self, peer: PeerId, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn(task.instrument(tracing::debug_span!("peer", %peer)));
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Link { to, done } => self.on_link(id::peer_id(to), done),
            Command::OpenBulk { to, kind, done } => self.on_open_bulk(id::peer_id(to), kind, done),
            Command::Publish { topic, data, done } => {
                // A caller that is gone does not need the answer; so below.
                let _ = done.send(self.publish(topic, data));
            }
            Command::Topic(topic) => self.subscribe(topic),
            Command::Dht(command) => self.on_dht(command),
            Command::Dial { address, done } => self.on_dial(address, done),
            Command::Disconnect { node, reason } => self.disconnect(id::peer_id(node), reason),
            Command::Peers(done) => {
                let _ = done.send(self.peer_statuses());
            }
            Command::Status(done) => {
                let _ = done.send(self.status());
            }
            Command::Listeners(done) => {
                self.waiting_listeners.push(done);
                self.answer_listeners();
            }
            Command::Certificate(certificate) => self.on_certificate(*certificate),
            Command::Standings(standings) => self.on_standings(standings),
            Command::Exempt(nodes) => self.slots.set_exempt(nodes),
        }
    }

    fn on_task_end(&mut self, end: TaskEnd) {
        match end {
            TaskEnd::Client { peer } => self.on_client_ended(peer),
            TaskEnd::Server { peer, fault } => {
                if let Some(session) = self.sessions.get_mut(&peer) {
                    session.serving = session.serving.saturating_sub(1);
                }
                if let Some(reason) = fault {
                    self.shared.metrics.rpc_streams_broken.inc();
                    tracing::debug!(%peer, %reason, "request stream of a peer ended");
                }
            }
            TaskEnd::Judged(judged) => self.on_judged(judged),
        }
    }

    fn on_swarm_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(BehaviourEvent::Streams(event)) => self.on_stream(event),
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(event)) => self.on_gossip(event),
            SwarmEvent::Behaviour(BehaviourEvent::Kad(event)) => self.on_kad(event),
            SwarmEvent::Behaviour(BehaviourEvent::Identify(event)) => self.on_identify(event),
            SwarmEvent::Behaviour(BehaviourEvent::Ping(event)) => self.on_ping(event),
            SwarmEvent::Behaviour(BehaviourEvent::Mdns(event)) => self.on_mdns(event),
            SwarmEvent::Behaviour(BehaviourEvent::AutonatClient(event)) => self.on_probe(event),
            SwarmEvent::Behaviour(event) => tracing::trace!(?event, "libp2p"),
            event => self.on_connection_event(event),
        }
    }

    fn on_tick(&mut self, now: Instant) {
        self.ticks += 1;
        self.try_bootstrap(now);
        self.cut_uncertified(now);
        let every = |period: Duration| self.ticks.is_multiple_of((period.as_millis() / TICK.as_millis()).max(1) as u64);
        let (often, seldom) = (every(Duration::from_secs(10)), every(Duration::from_secs(60)));
        if often {
            self.cut_expired();
            self.dial_more();
            self.take_relays();
            self.unsubscribe_idle();
        }
        if seldom {
            self.peers.collect_garbage(now);
            self.gates.purge();
            self.purge_records(now.into_std());
        }
        let counters = self.swarm.network_info().connection_counters().clone();
        self.keep.store(counters.num_established() < KEEP_CONNECTIONS, Ordering::Relaxed);
        let metrics = &self.shared.metrics;
        metrics.connections.set(i64::from(counters.num_established()));
        metrics.peers_certified.set(self.sessions.values().filter(|s| s.agreed).count() as i64);
        metrics.peers_known.set(self.peers.len() as i64);
    }

    fn on_standings(&mut self, standings: HashMap<Hotkey, Standing>) {
        self.standings = standings;
        let scores: Vec<(PeerId, f64)> = self.sessions.iter().map(|(peer, s)| (*peer, self.score_of(s))).collect();
        for (peer, score) in scores {
            self.swarm.behaviour_mut().gossip.inner.set_application_score(&peer, score);
        }
    }

    fn score_of(&self, session: &Session) -> f64 {
        scoring::standing(self.standings.get(&session.identity.hotkey))
    }

    fn warn(&mut self, text: String) {
        tracing::warn!("{text}");
        if self.warnings.len() >= WARNINGS {
            self.warnings.pop_front();
        }
        if self.warnings.back() != Some(&text) {
            self.warnings.push_back(text);
        }
    }

    fn announce(&self, event: PeerEvent) {
        // Nobody listens: nothing to tell.
        let _ = self.shared.peer_events.send(event);
    }

    fn answer_listeners(&mut self) {
        if self.listeners.values().any(Vec::is_empty) {
            return;
        }
        let me = *self.swarm.local_peer_id();
        let all = |list: &HashMap<ListenerId, Vec<Multiaddr>>| -> Vec<Multiaddr> {
            list.values().flatten().filter_map(|a| a.clone().with_p2p(me).ok()).collect()
        };
        for done in self.waiting_listeners.drain(..) {
            let _ = done.send(all(&self.listeners));
        }
    }

    fn peer_statuses(&self) -> Vec<PeerStatus> {
        let now = Instant::now();
        let status = |(peer, known): (&PeerId, &super::peers::Peer)| {
            let open: Vec<&Connection> = self.connections.values().filter(|c| c.peer == *peer).collect();
            Some(PeerStatus {
                node: id::node_id(peer)?,
                peer_id: peer.to_string(),
                hotkey: known.hotkey,
                roles: known.roles,
                agent: known.agent.clone(),
                state: known.state.clone(),
                addresses: known.addresses.iter().map(ToString::to_string).collect(),
                connections: open.len(),
                inbound: open.iter().any(|c| !c.dialled),
                rtt_us: known.rtt.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
                clock_skew_ms: known.skew_ms,
                gossip_score: self.swarm.behaviour().gossip.inner.peer_score(peer),
                last_seen_ms: u64::try_from(now.duration_since(known.last_seen).as_millis()).unwrap_or(u64::MAX),
            })
        };
        self.peers.iter().filter_map(status).collect()
    }

    fn status(&self) -> NetStatus {
        let me = *self.swarm.local_peer_id();
        let full = |address: &Multiaddr| address.clone().with_p2p(me).map_or_else(|a| a.to_string(), |a| a.to_string());
        NetStatus {
            node: self.shared.local.node,
            peer_id: me.to_string(),
            hotkey: self.shared.local.hotkey,
            network: self.shared.network.tag(),
            listen: self.swarm.listeners().map(full).collect(),
            external: self.swarm.external_addresses().map(full).collect(),
            reachability: self.nat.reachability(),
            reachability_hint: self.nat.hint(),
            dht_server: self.swarm.behaviour().kad.inner.mode() == libp2p::kad::Mode::Server,
            connected: self.sessions.values().filter(|s| s.agreed).count(),
            known: self.peers.len(),
            bootstrap: self.bootstrap.status(),
            warnings: self.warnings.iter().cloned().collect(),
        }
    }

    fn set_dht_server(&mut self, server: bool) {
        let mode = if server { libp2p::kad::Mode::Server } else { libp2p::kad::Mode::Client };
        let kad = &mut self.swarm.behaviour_mut().kad.inner;
        if kad.mode() != mode {
            tracing::info!(?mode, "DHT mode");
            kad.set_mode(Some(mode));
        }
    }

    fn on_certificate(&mut self, certificate: Signed<Certificate>) {
        self.ours.certificate = certificate;
        let open: Vec<ConnectionId> =
            self.connections.iter().filter(|(_, c)| c.certified && c.closing.is_none()).map(|(id, _)| *id).collect();
        for connection in open {
            self.start_handshake(connection);
        }
    }

    /// The certificate that this peer showed, while it is connected.
    fn session(&self, peer: &PeerId) -> Option<&Session> {
        self.sessions.get(peer)
    }

    fn is_agreed(&self, peer: &PeerId) -> bool {
        self.session(peer).is_some_and(|s| s.agreed)
    }
}
