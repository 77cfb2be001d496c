//! libp2p's behaviours put together. No logic: settings and their reasons only.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use libp2p::identity::Keypair;
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    PeerId, StreamProtocol, autonat, connection_limits, dcutr, gossipsub, identify, kad, mdns,
    memory_connection_limits, ping, relay,
};
use sundara_proto::crypto::Network;
use sundara_proto::names::{self, Topic};
use sundara_proto::wire::limit;

use super::config::{NetConfig, NetError, TransportKind};
use super::gate::{Gated, Gates};
use super::gossip::size_limit;
use super::limits::SubnetLimits;
use super::{dht, scoring, streams};

/// Bytes that gossipsub's own frame adds to a message: topic and framing.
const GOSSIP_OVERHEAD: usize = 512;
/// Mesh degree, and how far it may drift: gossipsub's own defaults.
const MESH: (usize, usize, usize) = (4, 6, 12);
/// Two identify exchanges; also finds out about new addresses.
const IDENTIFY_INTERVAL: Duration = Duration::from_secs(300);
/// A query that has not ended by then finds nothing more; a dead peer costs one of three parallel slots.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that does not answer for so long is not healthy.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
const PING_INTERVAL: Duration = Duration::from_secs(15);

#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    limits: connection_limits::Behaviour,
    subnets: SubnetLimits,
    memory: Toggle<memory_connection_limits::Behaviour>,
    pub(super) streams: streams::Behaviour,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    pub(super) gossip: Gated<gossipsub::Behaviour>,
    pub(super) kad: Gated<kad::Behaviour<dht::Store>>,
    autonat_client: Toggle<Gated<autonat::v2::client::Behaviour>>,
    autonat_server: Toggle<Gated<autonat::v2::server::Behaviour>>,
    relay_client: Toggle<Gated<relay::client::Behaviour>>,
    relay_server: Toggle<Gated<relay::Behaviour>>,
    dcutr: Toggle<Gated<dcutr::Behaviour>>,
    mdns: Toggle<mdns::tokio::Behaviour>,
}

/// All of them, as the configuration wants.
pub(super) fn build(
    config: &NetConfig,
    network: &Network,
    keypair: &Keypair,
    gates: &Gates,
    keep: Arc<AtomicBool>,
    relay_client: Option<relay::client::Behaviour>,
) -> Result<Behaviour, NetError> {
    let me = keypair.public().to_peer_id();
    let internet = config.transport == TransportKind::Internet;
    let probes = internet && !config.assume_reachable && config.announce.is_empty();
    let gated = |on: bool| on.then(|| gates.clone());
    let identify = identify::Config::new(names::identify_protocol(network), keypair.public())
        .with_agent_version(names::AGENT.to_owned())
        .with_interval(IDENTIFY_INTERVAL)
        .with_push_listen_addr_updates(true)
        .with_cache_size(0);
    Ok(Behaviour {
        limits: connection_limits::Behaviour::new(limits(config)),
        subnets: SubnetLimits::new(config.limits.clone()),
        memory: memory(config).into(),
        streams: streams(config, network, gates, keep),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::new(ping::Config::new().with_interval(PING_INTERVAL).with_timeout(PING_TIMEOUT)),
        gossip: Gated::new(gossip(network)?, gates.clone()),
        kad: Gated::new(kad(network, me), gates.clone()),
        autonat_client: gated(probes).map(|g| Gated::new(autonat::v2::client::Behaviour::default(), g)).into(),
        autonat_server: gated(internet).map(|g| Gated::new(autonat::v2::server::Behaviour::default(), g)).into(),
        relay_client: relay_client.map(|inner| Gated::new(inner, gates.clone())).into(),
        // Circuits are capped by libp2p's defaults: 128 KiB and 2 minutes, enough for hole punching.
        relay_server: gated(config.relay_server)
            .map(|g| Gated::new(relay::Behaviour::new(me, Default::default()), g))
            .into(),
        dcutr: gated(probes).map(|g| Gated::new(dcutr::Behaviour::new(me), g)).into(),
        mdns: mdns(config, me)?.into(),
    })
}

fn limits(config: &NetConfig) -> connection_limits::ConnectionLimits {
    let limits = &config.limits;
    connection_limits::ConnectionLimits::default()
        .with_max_pending_incoming(Some(limits.pending_inbound))
        .with_max_pending_outgoing(Some(limits.connections))
        .with_max_established_incoming(Some(limits.inbound))
        .with_max_established_per_peer(Some(limits.connections_per_peer))
        .with_max_established(Some(limits.connections))
}

fn memory(config: &NetConfig) -> Option<memory_connection_limits::Behaviour> {
    let bytes = usize::try_from(config.limits.memory_bytes).unwrap_or(usize::MAX);
    (bytes > 0).then(|| memory_connection_limits::Behaviour::with_max_bytes(bytes))
}

fn streams(config: &NetConfig, network: &Network, gates: &Gates, keep: Arc<AtomicBool>) -> streams::Behaviour {
    let name = |text: String| StreamProtocol::try_from_owned(text).ok();
    let others = config
        .versions
        .clone()
        .flat_map(|v| {
            [names::rpc_protocol(network, v), names::blob_protocol(network, v), names::round_protocol(network, v)]
        })
        .filter_map(name)
        .collect();
    streams::Behaviour::new(gates.clone(), cert_protocol(network), others, keep)
}

/// The handshake's protocol.
pub(super) fn cert_protocol(network: &Network) -> StreamProtocol {
    // Begins with a slash by construction, which is all that can be wrong with one.
    StreamProtocol::try_from_owned(names::cert_protocol(network)).unwrap_or(StreamProtocol::new("/sundara/cert"))
}

/// A topic as gossipsub names it.
pub(super) fn topic(network: &Network, topic: Topic) -> gossipsub::IdentTopic {
    gossipsub::IdentTopic::new(topic.name(network))
}

fn gossip(network: &Network) -> Result<gossipsub::Behaviour, NetError> {
    let failed = |reason: &dyn std::fmt::Display| NetError::Setup { part: "gossipsub", reason: reason.to_string() };
    let mut config = gossipsub::ConfigBuilder::default();
    config
        .mesh_n_low(MESH.0)
        .mesh_n(MESH.1)
        .mesh_n_high(MESH.2)
        // What we sign is inside the messages; gossipsub's own signature would say nothing more and cost one more.
        .validation_mode(gossipsub::ValidationMode::Anonymous)
        .validate_messages()
        .message_id_fn(message_id)
        .max_transmit_size(limit::GOSSIP + GOSSIP_OVERHEAD)
        .idontwant_message_size_threshold(1024);
    for one in Topic::ALL {
        config.max_transmit_size_for_topic(size_limit(one) + GOSSIP_OVERHEAD, topic(network, one).hash());
    }
    let config = config.build().map_err(|error| failed(&error))?;
    let mut behaviour =
        gossipsub::Behaviour::new(gossipsub::MessageAuthenticity::Anonymous, config).map_err(|error| failed(&error))?;
    let topics = Topic::ALL.into_iter().map(|one| topic(network, one).hash());
    behaviour.with_peer_score(scoring::parameters(topics), scoring::thresholds()).map_err(|error| failed(&error))?;
    Ok(behaviour)
}

/// Equal bytes on one topic are one message, whoever sends them.
fn message_id(message: &gossipsub::Message) -> gossipsub::MessageId {
    let mut hasher = blake3::Hasher::new();
    hasher.update(message.topic.as_str().as_bytes());
    hasher.update(&[0]);
    hasher.update(&message.data);
    gossipsub::MessageId::new(&hasher.finalize().as_bytes()[..20])
}

fn kad(network: &Network, me: PeerId) -> kad::Behaviour<dht::Store> {
    let protocol =
        StreamProtocol::try_from_owned(names::kad_protocol(network)).unwrap_or(StreamProtocol::new("/sundara/kad/1"));
    let mut config = kad::Config::new(protocol);
    config
        .set_query_timeout(QUERY_TIMEOUT)
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        // Only certified peers that serve the DHT, with addresses that others can use: see `dht`.
        .set_kbucket_inserts(kad::BucketInserts::Manual)
        .set_caching(kad::Caching::Disabled)
        // The registry signs anew and puts again by itself.
        .set_publication_interval(None)
        .set_provider_publication_interval(Some(Duration::from_secs(6 * 3600)))
        .set_provider_record_ttl(Some(dht::PROVIDER_LIFE))
        .set_parallelism(NonZeroUsize::MIN.saturating_add(2))
        .set_max_packet_size(16 << 10);
    let mut kad = kad::Behaviour::with_config(me, dht::Store::new(me), config);
    kad.set_mode(Some(kad::Mode::Client));
    kad
}

fn mdns(config: &NetConfig, me: PeerId) -> Result<Option<mdns::tokio::Behaviour>, NetError> {
    if !config.mdns {
        return Ok(None);
    }
    mdns::tokio::Behaviour::new(mdns::Config::default(), me)
        .map(Some)
        .map_err(|error| NetError::Setup { part: "mdns, see net.mdns", reason: error.to_string() })
}
