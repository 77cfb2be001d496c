//! What the network says about itself and its peers. Plain values, ready to be shown.

use serde::Serialize;
use sundara_proto::cert::Roles;
use sundara_proto::id::{Hotkey, NodeId};

use super::rpc::PeerIdentity;

/// A peer came or went. For certified peers only.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PeerEvent {
    /// Certified by both sides: requests may be made.
    Connected(PeerIdentity),
    /// Its last connection ended.
    Gone(NodeId),
}

/// How a peer is. Not having asked is not the same as having got no answer, and neither is an answer that shows a fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum PeerState {
    /// Heard of, never tried.
    Unknown,
    /// Tried; no connection came about.
    Unreachable {
        /// The last thing that failed.
        reason: String,
    },
    /// Reached, and something is wrong.
    Unhealthy {
        /// What.
        reason: String,
    },
    /// Connected and certified; answers pings.
    Healthy,
}

/// One peer.
#[derive(Clone, Debug, Serialize)]
pub struct PeerStatus {
    /// Its node.
    pub node: NodeId,
    /// Its libp2p name.
    pub peer_id: String,
    /// Who answers for it, once its certificate was seen.
    pub hotkey: Option<Hotkey>,
    /// What its certificate says that it does.
    pub roles: Option<Roles>,
    /// Name and release of its software.
    pub agent: String,
    /// How it is.
    #[serde(flatten)]
    pub state: PeerState,
    /// Addresses at which it may be reached, at most 8.
    pub addresses: Vec<String>,
    /// Open connections.
    pub connections: usize,
    /// Whether one of them was made by the peer.
    pub inbound: bool,
    /// Round trip, microseconds.
    pub rtt_us: Option<u64>,
    /// By how many milliseconds its clock was certainly ahead of ours at the handshake; below 0, behind.
    pub clock_skew_ms: Option<i64>,
    /// Gossip score; below -80 it is not listened to.
    pub gossip_score: Option<f64>,
    /// Milliseconds since it was last heard of.
    pub last_seen_ms: u64,
}

/// An address to join through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BootstrapStatus {
    /// As configured.
    pub address: String,
    /// Whether a certified connection to it is open.
    pub connected: bool,
    /// Attempts since it was last connected.
    pub attempts: u64,
    /// Why the last attempt failed.
    pub last_error: Option<String>,
}

/// Whether others can reach this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Reachability {
    /// Nobody has probed yet.
    #[default]
    Unknown,
    /// An address was confirmed or is configured.
    Public,
    /// Probes failed.
    Private,
}

/// The network as this node sees it.
#[derive(Clone, Debug, Serialize)]
pub struct NetStatus {
    /// This node.
    pub node: NodeId,
    /// Its libp2p name.
    pub peer_id: String,
    /// Who answers for it.
    pub hotkey: Hotkey,
    /// Mesh: first 8 hexadecimal digits of the genesis, and the netuid.
    pub network: String,
    /// Addresses listened on, with the peer id.
    pub listen: Vec<String>,
    /// Addresses that others are told.
    pub external: Vec<String>,
    /// Whether others can reach this node.
    pub reachability: Reachability,
    /// What to do when they cannot.
    pub reachability_hint: Option<String>,
    /// Whether this node serves DHT keys.
    pub dht_server: bool,
    /// Certified peers connected.
    pub connected: usize,
    /// Peers known.
    pub known: usize,
    /// Every bootstrap address and how it is.
    pub bootstrap: Vec<BootstrapStatus>,
    /// What an operator should know: two nodes with one identity, wrong clocks. The latest 16.
    pub warnings: Vec<String>,
}
