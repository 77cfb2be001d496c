//! The `[net]` section: what an operator may choose about the network.

use std::ops::RangeInclusive;
use std::time::Duration;

use libp2p::Multiaddr;
use serde::{Deserialize, Serialize};
use sundara_proto::cert::Certificate;
use sundara_proto::crypto::Signed;
use sundara_proto::id::Hotkey;
use sundara_proto::names::PROTOCOL_VERSION;

/// Default port of the mesh, TCP and UDP.
pub const DEFAULT_PORT: u16 = 4101;

/// Addresses listened on by default: TCP and QUIC on every IPv4 interface.
pub fn default_listen() -> Vec<Multiaddr> {
    [format!("/ip4/0.0.0.0/tcp/{DEFAULT_PORT}"), format!("/ip4/0.0.0.0/udp/{DEFAULT_PORT}/quic-v1")]
        .iter()
        .filter_map(|text| text.parse().ok())
        .collect()
}

/// Settings of the network.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetConfig {
    /// Addresses to listen on. Default: TCP and QUIC on port 4101 of every IPv4 interface. Empty: none, the node only
    /// dials.
    #[serde(deserialize_with = "addresses")]
    pub listen: Vec<Multiaddr>,
    /// Addresses by which others reach this node, told to peers as they are. Setting one makes the node a server of
    /// the DHT without waiting for a probe. Default: none, found by autonat.
    #[serde(deserialize_with = "addresses")]
    pub announce: Vec<Multiaddr>,
    /// Nodes to join through, tried for ever. With or without `/p2p/PEERID`. Default: none.
    #[serde(deserialize_with = "addresses")]
    pub bootstrap: Vec<Multiaddr>,
    /// Finds nodes on the local network by multicast DNS. Default: false.
    pub mdns: bool,
    /// Counts this node as reachable without a probe; for test networks on one machine, where autonat has nobody to
    /// ask. Default: false.
    pub assume_reachable: bool,
    /// Relays for nodes behind NAT. Costs bandwidth. Default: false.
    pub relay_server: bool,
    /// Takes a slot at relays when autonat says that this node is not reachable. Off for pure clients, which nobody
    /// needs to reach. Default: true.
    pub relay_client: bool,
    /// Keeps private and loopback addresses of peers that are reached through public ones. Default: false, since they
    /// poison the DHT.
    pub keep_private_addresses: bool,
    /// Connections that the node tries to hold by itself. Default: 16.
    pub target_peers: usize,
    /// When not empty, only peers of these hotkeys are let in. Default: empty, anyone with a certificate.
    pub allow: Vec<Hotkey>,
    /// Hotkeys that are never let in. Default: empty.
    pub deny: Vec<Hotkey>,
    /// Limits of connections, slots and memory.
    pub limits: NetLimits,
    /// Which transports are built. Not an operator's choice.
    #[serde(skip)]
    pub transport: TransportKind,
    /// Versions of /rpc and /blob that are spoken. A range, so that tests can run a mesh of two versions.
    #[serde(skip, default = "default_versions")]
    pub versions: RangeInclusive<u32>,
    /// How long the first retry of a bootstrap address waits; doubles up to a minute.
    #[serde(skip, default = "default_retry")]
    pub bootstrap_retry: Duration,
}

/// Reads a multiaddress of a setting. The empty text is one to libp2p, and leads nowhere.
///
/// # Errors
/// Why it is none, for its operator to read.
pub fn address(text: &str) -> Result<Multiaddr, String> {
    if text.trim().is_empty() {
        return Err("the address is empty; write /ip4/HOST/tcp/PORT, or leave it out".to_owned());
    }
    text.parse().map_err(|e| format!("`{text}`: {e}"))
}

fn addresses<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<Multiaddr>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    texts.iter().map(|text| address(text).map_err(serde::de::Error::custom)).collect()
}

fn default_versions() -> RangeInclusive<u32> {
    PROTOCOL_VERSION..=PROTOCOL_VERSION
}

fn default_retry() -> Duration {
    Duration::from_secs(1)
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            listen: default_listen(),
            announce: Vec::new(),
            bootstrap: Vec::new(),
            mdns: false,
            assume_reachable: false,
            relay_server: false,
            relay_client: true,
            keep_private_addresses: false,
            target_peers: 16,
            allow: Vec::new(),
            deny: Vec::new(),
            limits: NetLimits::default(),
            transport: TransportKind::default(),
            versions: default_versions(),
            bootstrap_retry: default_retry(),
        }
    }
}

/// Transports to build.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportKind {
    /// TCP with noise and yamux, QUIC, relayed connections; names through DNS.
    #[default]
    Internet,
    /// libp2p's in-process transport, with the same noise and yamux. For tests.
    Memory,
}

/// Limits of connections, slots and memory. Each protects this node from peers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetLimits {
    /// Inbound connections whose handshake runs. Each costs a key exchange. Default: 64.
    pub pending_inbound: u32,
    /// Inbound connections. Default: 256.
    pub inbound: u32,
    /// Connections in all. Default: 512.
    pub connections: u32,
    /// Connections of one peer: one for messages, more for bulk. Default: 4.
    pub connections_per_peer: u32,
    /// Share of `inbound` that is kept for registered peers, 0 to 1. Default: 0.6, as verification.md has it.
    pub registered_share: f64,
    /// Inbound peers of one owner (coldkey). Default: 2.
    pub peers_per_owner: usize,
    /// Inbound peers of one /24 (IPv6: /48). Default: 2.
    pub peers_per_subnet: usize,
    /// Leaves loopback addresses out of `peers_per_subnet`. Default: true.
    pub exempt_loopback: bool,
    /// Memory of the process above which no new connection is made or taken, in bytes; 0 for no limit. Default: 4 GiB.
    pub memory_bytes: u64,
}

impl Default for NetLimits {
    fn default() -> Self {
        Self {
            pending_inbound: 64,
            inbound: 256,
            connections: 512,
            connections_per_peer: 4,
            registered_share: 0.6,
            peers_per_owner: 2,
            peers_per_subnet: 2,
            exempt_loopback: true,
            memory_bytes: 4 << 30,
        }
    }
}

/// Who this node is on the mesh. Made by the builder from the key files.
#[derive(Clone)]
pub struct NetIdentity {
    /// Secret seed of the node key.
    pub seed: zeroize::Zeroizing<[u8; 32]>,
    /// The hotkey's word for that key; says the network and the roles too.
    pub certificate: Signed<Certificate>,
    /// Nodes met before, to rejoin after a restart.
    pub known: Vec<Multiaddr>,
}

impl std::fmt::Debug for NetIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetIdentity").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// Why the network does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {reason}; change net.listen or --listen, or stop what uses the port")]
    Listen {
        /// The address.
        address: Multiaddr,
        /// What the system said.
        reason: String,
    },
    /// The certificate is for another key.
    #[error("the certificate is for another node key than the one in use: sign a new one")]
    Certificate,
    /// A part of libp2p would not be set up.
    #[error("cannot set up {part}: {reason}")]
    Setup {
        /// Which part.
        part: &'static str,
        /// Why.
        reason: String,
    },
    /// The node is shutting down.
    #[error("network is shut down")]
    Closed,
}
