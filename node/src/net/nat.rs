//! Whether others can reach this node, and what to do when they cannot.
//!
//! autonat (v2) has peers dial back one address at a time. One confirmed address makes the node public; probes that fail
//! without one that succeeds make it private, and then it asks connected relays for a slot. Sans-IO.

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};

use super::status::Reachability;

/// Failed probes without a success before the node counts as private: one may be the prober's own fault.
const FAILED_PROBES: u32 = 3;
/// Relays at which a private node takes a slot.
pub(super) const RELAYS: usize = 2;

/// What probes have shown.
#[derive(Debug)]
pub(super) struct Nat {
    reachability: Reachability,
    failed: u32,
    last_failed: Option<Multiaddr>,
    /// Relays that were asked for a slot.
    relays: Vec<PeerId>,
}

impl Nat {
    /// `public` when an address is configured or the node is told that it can be reached.
    pub(super) fn new(public: bool) -> Self {
        let reachability = if public { Reachability::Public } else { Reachability::Unknown };
        Self { reachability, failed: 0, last_failed: None, relays: Vec::new() }
    }

    pub(super) fn reachability(&self) -> Reachability {
        self.reachability
    }

    /// An address was confirmed.
    pub(super) fn on_confirmed(&mut self) {
        self.reachability = Reachability::Public;
        self.failed = 0;
    }

    /// The last confirmed address is gone.
    pub(super) fn on_expired(&mut self) {
        self.reachability = Reachability::Unknown;
    }

    /// A probe failed. Says whether the node has just become private.
    pub(super) fn on_probe_failed(&mut self, address: Multiaddr) -> bool {
        self.last_failed = Some(address);
        self.failed = self.failed.saturating_add(1);
        let turns = self.failed >= FAILED_PROBES && self.reachability == Reachability::Unknown;
        if turns {
            self.reachability = Reachability::Private;
        }
        turns
    }

    /// What an operator can do.
    pub(super) fn hint(&self) -> Option<String> {
        if self.reachability != Reachability::Private {
            return None;
        }
        let port = self.last_failed.as_ref().and_then(port).map_or(String::new(), |p| format!(" {p}"));
        Some(format!(
            "others cannot reach this node: forward port{port} (TCP and UDP) to it and open it in the firewall, or set \
             net.announce to an address that works; until then peers reach it through relays"
        ))
    }

    /// Whether another relay should be asked.
    pub(super) fn wants_relay(&self) -> bool {
        self.reachability == Reachability::Private && self.relays.len() < RELAYS
    }

    /// Whether this relay has been asked already.
    pub(super) fn uses_relay(&self, peer: &PeerId) -> bool {
        self.relays.contains(peer)
    }

    pub(super) fn on_relay_asked(&mut self, peer: PeerId) {
        self.relays.push(peer);
    }

    pub(super) fn on_relay_gone(&mut self, peer: &PeerId) {
        self.relays.retain(|relay| relay != peer);
    }
}

fn port(address: &Multiaddr) -> Option<u16> {
    address.iter().find_map(|part| match part {
        Protocol::Tcp(port) | Protocol::Udp(port) => Some(port),
        _ => None,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn one_failed_probe_proves_nothing_and_the_hint_names_the_port() {
        let address: Multiaddr = "/ip4/203.0.113.7/tcp/4101".parse().unwrap();
        let mut nat = Nat::new(false);
        assert!(!nat.on_probe_failed(address.clone()));
        assert_eq!(nat.reachability(), Reachability::Unknown);
        nat.on_probe_failed(address.clone());
        assert!(nat.on_probe_failed(address.clone()));
        assert!(nat.hint().unwrap().contains("4101"));
        assert!(nat.wants_relay());
        nat.on_confirmed();
        assert_eq!((nat.reachability(), nat.hint()), (Reachability::Public, None));
    }
}
