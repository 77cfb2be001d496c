//! What is known of peers, connected or not.
//!
//! Owns states, addresses and last words; does not own connections. Sans-IO: the time is an argument.
//!
//! Invariants: at most [`PEERS_MAX`] peers and [`ADDRESSES_MAX`] addresses of each. Unknown (never tried), unreachable
//! (tried, no connection) and unhealthy (reached, something is wrong) stay three states. Dead entries go by themselves.

use std::collections::HashMap;
use std::time::Duration;

use libp2p::{Multiaddr, PeerId};
use sundara_proto::cert::Roles;
use sundara_proto::id::Hotkey;
use tokio::time::Instant;

use super::status::PeerState;

/// Peers kept in the table.
pub(super) const PEERS_MAX: usize = 4096;
/// Addresses kept of one peer.
pub(super) const ADDRESSES_MAX: usize = 8;
/// An unreachable peer is forgotten after this.
const FORGET_UNREACHABLE: Duration = Duration::from_secs(3600);
/// A peer that was never tried, or has been gone, is forgotten after this.
const FORGET_OTHERS: Duration = Duration::from_secs(24 * 3600);

/// One peer.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) state: PeerState,
    pub(super) addresses: Vec<Multiaddr>,
    pub(super) hotkey: Option<Hotkey>,
    pub(super) roles: Option<Roles>,
    pub(super) agent: String,
    pub(super) rtt: Option<Duration>,
    pub(super) skew_ms: Option<i64>,
    pub(super) serves_dht: bool,
    pub(super) relays: bool,
    pub(super) connected: bool,
    pub(super) last_seen: Instant,
}

/// The table.
#[derive(Debug, Default)]
pub(super) struct Peers(HashMap<PeerId, Peer>);

impl Peers {
    pub(super) fn get(&self, peer: &PeerId) -> Option<&Peer> {
        self.0.get(peer)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&PeerId, &Peer)> {
        self.0.iter()
    }

    /// The entry of a peer, made as unknown if it is new; the least useful entry makes room.
    pub(super) fn entry(&mut self, peer: PeerId, now: Instant) -> &mut Peer {
        if self.0.len() >= PEERS_MAX && !self.0.contains_key(&peer) {
            self.make_room();
        }
        self.0.entry(peer).or_insert_with(|| Peer {
            state: PeerState::Unknown,
            addresses: Vec::new(),
            hotkey: None,
            roles: None,
            agent: String::new(),
            rtt: None,
            skew_ms: None,
            serves_dht: false,
            relays: false,
            connected: false,
            last_seen: now,
        })
    }

    fn make_room(&mut self) {
        let rank = |peer: &Peer| match peer.state {
            PeerState::Unreachable { .. } => 0,
            PeerState::Unknown => 1,
            PeerState::Unhealthy { .. } => 2,
            PeerState::Healthy => 3,
        };
        let idle = self.0.iter().filter(|(_, peer)| !peer.connected);
        if let Some(gone) = idle.min_by_key(|(_, peer)| (rank(peer), peer.last_seen)).map(|(id, _)| *id) {
            self.0.remove(&gone);
        }
    }

    /// An address at which the peer may be. The newest are kept; those that follow `first` are tried first.
    pub(super) fn learn(&mut self, peer: PeerId, address: Multiaddr, now: Instant) {
        let entry = self.entry(peer, now);
        if entry.addresses.contains(&address) {
            return;
        }
        if entry.addresses.len() >= ADDRESSES_MAX {
            entry.addresses.remove(0);
        }
        entry.addresses.push(address);
    }

    /// Both certificates hold.
    pub(super) fn on_certified(&mut self, peer: PeerId, now: Instant) {
        let entry = self.entry(peer, now);
        entry.state = PeerState::Healthy;
        entry.last_seen = now;
    }

    pub(super) fn on_connected(&mut self, peer: PeerId, now: Instant) {
        let entry = self.entry(peer, now);
        entry.connected = true;
        entry.last_seen = now;
    }

    /// Reached, and something is wrong.
    pub(super) fn on_fault(&mut self, peer: PeerId, reason: String, now: Instant) {
        let entry = self.entry(peer, now);
        entry.state = PeerState::Unhealthy { reason };
        entry.last_seen = now;
    }

    /// No connection came about. Says nothing about one that is open.
    pub(super) fn on_unreachable(&mut self, peer: PeerId, reason: String, now: Instant) {
        let entry = self.entry(peer, now);
        if !entry.connected {
            entry.state = PeerState::Unreachable { reason };
        }
    }

    /// A ping came back, or did not.
    pub(super) fn on_ping(&mut self, peer: PeerId, result: Result<Duration, String>, certified: bool, now: Instant) {
        let entry = self.entry(peer, now);
        match result {
            Ok(rtt) => {
                entry.rtt = Some(rtt);
                entry.last_seen = now;
                if certified {
                    entry.state = PeerState::Healthy;
                }
            }
            Err(reason) => entry.state = PeerState::Unhealthy { reason },
        }
    }

    /// The last connection ended: on purpose, or by `fault`. A fault that was noted before stays.
    pub(super) fn on_gone(&mut self, peer: PeerId, fault: Option<String>, now: Instant) {
        let entry = self.entry(peer, now);
        entry.connected = false;
        entry.rtt = None;
        entry.last_seen = now;
        if entry.state == PeerState::Healthy {
            entry.state = match fault {
                Some(reason) => PeerState::Unreachable { reason },
                None => PeerState::Unknown,
            };
        }
    }

    /// Forgets the dead.
    pub(super) fn collect_garbage(&mut self, now: Instant) {
        self.0.retain(|_, peer| {
            let keep = match peer.state {
                PeerState::Unreachable { .. } => FORGET_UNREACHABLE,
                _ => FORGET_OTHERS,
            };
            peer.connected || now.duration_since(peer.last_seen) < keep
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn three_states_stay_apart() {
        let (mut peers, peer, now) = (Peers::default(), PeerId::random(), Instant::now());
        let state = |peers: &Peers| peers.get(&peer).unwrap().state.clone();
        peers.learn(peer, "/ip4/8.8.8.8/tcp/1".parse().unwrap(), now);
        assert_eq!(state(&peers), PeerState::Unknown, "heard of is not tried");
        peers.on_unreachable(peer, "refused".into(), now);
        assert_eq!(state(&peers), PeerState::Unreachable { reason: "refused".into() });
        peers.on_connected(peer, now);
        peers.on_certified(peer, now);
        peers.on_unreachable(peer, "a second dial failed".into(), now);
        assert_eq!(state(&peers), PeerState::Healthy, "an open connection says more than a failed dial");
        peers.on_ping(peer, Err("timed out".into()), true, now);
        assert_eq!(state(&peers), PeerState::Unhealthy { reason: "timed out".into() });
        peers.on_ping(peer, Ok(Duration::from_millis(3)), true, now);
        assert_eq!(state(&peers), PeerState::Healthy);
        peers.on_gone(peer, None, now);
        assert_eq!(state(&peers), PeerState::Unknown);
    }

    #[test]
    fn the_dead_are_forgotten_and_the_table_is_bounded() {
        let (mut peers, now) = (Peers::default(), Instant::now());
        let connected = PeerId::random();
        peers.on_connected(connected, now);
        for _ in 0..PEERS_MAX + 100 {
            peers.on_unreachable(PeerId::random(), "refused".into(), now);
        }
        assert_eq!(peers.len(), PEERS_MAX);
        peers.collect_garbage(now + FORGET_UNREACHABLE);
        assert_eq!(peers.len(), 1);
        assert!(peers.get(&connected).is_some());
    }
}
