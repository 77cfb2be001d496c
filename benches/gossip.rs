//! Gossip among 50 nodes of ours in one process on loopback, 1 KiB signed messages, 5 a second: how long until the others
//! have each, and whether they all do. Beside it gossipsub of libp2p alone, over TCP, noise and yamux.
//!
//! Ours verifies an sr25519 signature of the message before it is passed on, and has every other behaviour of a node; the
//! bare one checks gossipsub's own ed25519 signature. Both count from before signing to arrival at the subscriber.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures::StreamExt as _;
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, SwarmBuilder, gossipsub, identity, noise, tcp, yamux};
use serde::{Deserialize, Serialize};
use sundara_benches::{Args, Child, Parent, Report, Target, Usage, quantile};
use sundara_node::net::{GossipPayload, NetConfig, NetHandle, NetIdentity, Topic};
use sundara_proto::cert::{Certificate, Roles};
use sundara_proto::crypto::{HotkeyPair, Network, NodeKeyPair, Signed};
use sundara_proto::id::BlobId;
use sundara_proto::job::{JobSpec, Limits, Program};
use sundara_proto::pb;
use sundara_proto::units::{BlockNumber, ByteCount, UnixMillis};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const NODES: usize = 50;
/// Earlier nodes that each node dials: every node has 16 connections on average.
const DIALS: usize = 8;
/// Bytes of a message, signature and envelope included.
const MESSAGE: usize = 1024;
/// Time between two messages.
const PERIOD: Duration = Duration::from_millis(200);
/// Messages of one run.
const MESSAGES: usize = 100;
/// Time for gossipsub's meshes to form: some heartbeats of a second.
const SETTLE: Duration = Duration::from_secs(8);
/// A mesh is at rest when the process has used less than this share of a core for so many seconds in a row: nodes of
/// ours look for each other first, with both cores. It comes to rest in well less than the longest wait.
const REST_CORES: f64 = 0.25;
const REST_SECONDS: usize = 3;
const REST_WITHIN: Duration = Duration::from_secs(60);
/// When a message that somebody lacks counts as lost.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// Runs of each kind.
const RUNS: usize = 2;
const HOUR: Duration = Duration::from_secs(3600);

const BARE: &str = "bare";
const OURS: &str = "ours";

/// What a run of one kind saw.
#[derive(Serialize, Deserialize)]
struct Seen {
    /// Milliseconds until each other node had each message.
    latencies_ms: Vec<f64>,
    /// Deliveries that did not happen.
    lost: usize,
    /// Processor time a delivery, microseconds, everything of the process included.
    cpu_us: f64,
}

fn main() -> Result<()> {
    if let Some(parent) = Parent::of_this() {
        return parent.run(None, async {
            let hub = Hub::default();
            let publishers = match parent.part.as_str() {
                BARE => bare(&hub).await?,
                _ => ours(&hub).await?,
            };
            parent.tell(&measure(&hub, &publishers).await?)
        });
    }
    let args = Args::of_program();
    let mut report = Report::new("gossip");
    let mut p99 = HashMap::new();
    let mut rows = HashMap::<&str, Vec<Seen>>::new();
    for _ in 0..args.runs(RUNS) {
        for kind in [BARE, OURS] {
            rows.entry(kind).or_default().push(Child::start(kind, &())?.hear()?);
        }
    }
    for (kind, name) in [(BARE, "bare gossipsub"), (OURS, "sundara-node")] {
        let seen = rows.remove(kind).unwrap_or_default();
        let of = |what: fn(&Seen) -> f64| seen.iter().map(what).collect::<Vec<f64>>();
        report.add(format!("{name}, p50"), "ms", &of(|seen| quantile(&seen.latencies_ms, 0.5)));
        p99.insert(kind, of(|seen| quantile(&seen.latencies_ms, 0.99)));
        report.add(format!("{name}, p99"), "ms", &p99[kind]);
        report.add(format!("{name}, processor a delivery"), "us", &of(|seen| seen.cpu_us));
        let lost = of(|seen| seen.lost as f64);
        report.add_with_target(format!("{name}, lost"), "", &[lost.iter().sum()], Target::AtMost(0.0));
    }
    let ratios: Vec<f64> = p99[OURS].iter().zip(&p99[BARE]).map(|(ours, bare)| ours / bare).collect();
    report.add_with_target("p99 of ours / of bare", "", &ratios, Target::AtMost(1.3));
    report.print(&args)
}

/// Where nodes say what arrived.
#[derive(Clone, Default)]
struct Hub(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// By number: when it was made.
    made: HashMap<u64, Instant>,
    arrivals_ms: Vec<f64>,
}

impl Hub {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrived(&self, content: &[u8]) {
        let now = Instant::now();
        let Some(number) = content.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes)) else { return };
        let mut state = self.state();
        if let Some(made) = state.made.get(&number).copied() {
            state.arrivals_ms.push((now - made).as_secs_f64() * 1e3);
        }
    }

    /// Content of `len` bytes that begins with its number.
    fn content(number: u64, len: usize) -> Vec<u8> {
        let mut content = vec![0x5a; len];
        content[..8].copy_from_slice(&number.to_le_bytes());
        content
    }
}

/// Hands the number of a message to a node that is to make and publish it.
type Publisher = mpsc::Sender<u64>;

async fn measure(hub: &Hub, publishers: &[Publisher]) -> Result<Seen> {
    tokio::time::sleep(SETTLE).await;
    come_to_rest().await?;
    let before = Usage::of_this()?;
    let mut beat = tokio::time::interval(PERIOD);
    for number in 0..MESSAGES as u64 {
        beat.tick().await;
        hub.state().made.insert(number, Instant::now());
        // A stride without a common divisor: everyone has a turn.
        let publisher = &publishers[(number as usize * 17) % publishers.len()];
        publisher.send(number).await.map_err(|_| anyhow!("a node has ended"))?;
    }
    let expected = MESSAGES * (publishers.len() - 1);
    let deadline = Instant::now() + LOST_AFTER;
    while hub.state().arrivals_ms.len() < expected && Instant::now() < deadline {
        tokio::time::sleep(PERIOD).await;
    }
    let cpu = Usage::of_this()?.cpu.saturating_sub(before.cpu);
    let latencies_ms = std::mem::take(&mut hub.state().arrivals_ms);
    let lost = expected.saturating_sub(latencies_ms.len());
    Ok(Seen { lost, cpu_us: cpu.as_secs_f64() * 1e6 / expected as f64, latencies_ms })
}

/// Waits until nothing but upkeep goes on in this process.
async fn come_to_rest() -> Result<()> {
    let (began, mut quiet) = (Instant::now(), 0);
    let mut last = Usage::of_this()?.cpu;
    while quiet < REST_SECONDS {
        ensure!(began.elapsed() < REST_WITHIN, "the mesh does not come to rest");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = Usage::of_this()?.cpu;
        quiet = if now.saturating_sub(last).as_secs_f64() < REST_CORES { quiet + 1 } else { 0 };
        last = now;
    }
    Ok(())
}

/// Which earlier nodes node `i` dials.
fn neighbours(i: usize) -> Vec<usize> {
    if i <= DIALS {
        return (0..i).collect();
    }
    // Multiplicative hashing spreads them; the same for both kinds.
    let mut chosen: Vec<usize> = Vec::new();
    let mut state = i as u64;
    while chosen.len() < DIALS {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let one = (state >> 33) as usize % i;
        if !chosen.contains(&one) {
            chosen.push(one);
        }
    }
    chosen
}

async fn bare(hub: &Hub) -> Result<Vec<Publisher>> {
    let topic = gossipsub::IdentTopic::new("bench");
    let mut publishers = Vec::new();
    let mut addresses: Vec<Multiaddr> = Vec::new();
    for i in 0..NODES {
        let behaviour = |key: &identity::Keypair| {
            let authenticity = gossipsub::MessageAuthenticity::Signed(key.clone());
            gossipsub::Behaviour::new(authenticity, gossipsub::Config::default()).map_err(Into::into)
        };
        let mut swarm: libp2p::Swarm<gossipsub::Behaviour> = SwarmBuilder::with_new_identity()
            .with_tokio()
            .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux::Config::default)?
            .with_behaviour(behaviour)?
            .with_swarm_config(|config| config.with_idle_connection_timeout(HOUR))
            .build();
        swarm.behaviour_mut().subscribe(&topic)?;
        swarm.listen_on("/ip4/127.0.0.1/tcp/0".parse()?)?;
        let address = loop {
            if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
                break address;
            }
        };
        addresses.push(address);
        neighbours(i).into_iter().try_for_each(|other| swarm.dial(addresses[other].clone()))?;
        let (publisher, mut orders) = mpsc::channel::<u64>(MESSAGES);
        publishers.push(publisher);
        let (hub, topic) = (hub.clone(), topic.clone());
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    Some(number) = orders.recv() => {
                        // What is not published counts as lost.
                        let _ = swarm.behaviour_mut().publish(topic.clone(), Hub::content(number, MESSAGE));
                    }
                    event = swarm.select_next_some() => {
                        if let SwarmEvent::Behaviour(gossipsub::Event::Message { message, .. }) = event {
                            hub.arrived(&message.data);
                        }
                    }
                }
            }
        });
    }
    Ok(publishers)
}

fn network() -> Network {
    Network::named("bench", 1)
}

fn now() -> UnixMillis {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

async fn ours(hub: &Hub) -> Result<Vec<Publisher>> {
    let mut publishers = Vec::new();
    let mut addresses: Vec<Multiaddr> = Vec::new();
    for i in 0..NODES {
        let mut seed = [7; 32];
        seed[..8].copy_from_slice(&(i as u64).to_le_bytes());
        let (hotkey, node_key) = (HotkeyPair::from_seed(&seed), NodeKeyPair::from_seed(&seed));
        let certificate = Certificate {
            node: node_key.node_id(),
            network: network(),
            roles: Roles::LIGHT,
            issued_at: now(),
            expires_at: now().plus(HOUR),
            serial: 1,
        };
        let certificate = Signed::sign(&network(), &hotkey, certificate);
        let identity = NetIdentity { seed: seed.into(), certificate, known: Vec::new() };
        let config = NetConfig {
            listen: vec!["/ip4/127.0.0.1/tcp/0".parse()?],
            bootstrap: neighbours(i).into_iter().map(|other| addresses[other].clone()).collect(),
            assume_reachable: true,
            keep_private_addresses: true,
            ..NetConfig::default()
        };
        let (net, driver) = NetHandle::start(config, identity)?;
        tokio::spawn(driver.run(CancellationToken::new()));
        addresses.push(net.listeners().await.into_iter().next().context("a node does not listen")?);
        let mut messages = net.subscribe(Topic::Jobs).await;
        let (publisher, mut orders) = mpsc::channel::<u64>(MESSAGES);
        publishers.push(publisher);
        let hub = hub.clone();
        tokio::spawn(async move {
            let me = net.local().node;
            loop {
                tokio::select! {
                    Some(number) = orders.recv() => {
                        // What is not published counts as lost.
                        let _ = net.publish(Topic::Jobs, message(&hotkey, number)).await;
                    }
                    Some(message) = messages.recv() => {
                        if let GossipPayload::Job { inline_input: Some(input), .. } = &message.payload
                            && message.from != me
                        {
                            hub.arrived(input);
                        }
                    }
                }
            }
        });
    }
    Ok(publishers)
}

/// A signed job whose input fills the message.
fn message(hotkey: &HotkeyPair, number: u64) -> pb::Gossip {
    let of_len = |len: usize| {
        let input = Hub::content(number, len);
        let spec = JobSpec {
            network: network(),
            block: BlockNumber(0),
            nonce: u128::from(number).to_le_bytes(),
            not_after: now().plus(HOUR),
            program: Program::Builtin { name: "echo".to_owned() },
            input: BlobId::of(&input),
            input_len: ByteCount(input.len() as u64),
            params: Default::default(),
            seed: 0,
            limits: Limits::default(),
            replicas: 1,
            hardware_class: String::new(),
            stream: false,
        };
        let spec = Signed::sign(&network(), hotkey, spec);
        let request = pb::JobRequest { spec: Some(spec.to_wire()), inline_input: Some(input.into()), announce: true };
        pb::Gossip { kind: Some(pb::gossip::Kind::Job(request)) }
    };
    // Measured once: everything but the input has the same length each time.
    static ENVELOPE: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    let envelope = *ENVELOPE.get_or_init(|| prost::Message::encoded_len(&of_len(512)) - 512);
    of_len(MESSAGE - envelope)
}
