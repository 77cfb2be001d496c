//! Finding peers and being found: bootstrap, identify, ping, multicast DNS, probes, relays.

use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError};
use libp2p::{Multiaddr, PeerId, autonat, identify, mdns, ping};
use sundara_proto::wire::limit;
use tokio::time::Instant;

use super::connections::{dial_opts, dial_reason, without_peer};
use super::{NetDriver, Reachability};
use crate::net::bootstrap::peer_of;
use crate::net::cert;
use crate::net::limits::is_global;

/// Peers dialled at once to reach the target number.
const DIALS_A_ROUND: usize = 4;
/// Addresses looked at of one identify or multicast message.
const ADDRESSES_A_MESSAGE: usize = 32;

impl NetDriver {
    pub(super) fn try_bootstrap(&mut self, now: Instant) {
        for (index, address) in self.bootstrap.due(now) {
            if let Some(peer) = peer_of(&address)
                && self.is_agreed(&peer)
            {
                self.bootstrap.on_certified(peer);
                continue;
            }
            let opts = dial_opts(&address);
            let connection = opts.connection_id();
            match self.swarm.dial(opts) {
                Ok(()) => self.bootstrap.on_dialling(index, connection),
                Err(error) => self.bootstrap.on_not_dialled(index, dial_reason(&error), now),
            }
        }
    }

    /// Dials known peers while there are fewer than wanted.
    pub(super) fn dial_more(&mut self) {
        let open = self.sessions.len();
        if open >= self.config.target_peers {
            return;
        }
        let wanted = (self.config.target_peers - open).min(DIALS_A_ROUND);
        let mut candidates: Vec<(Instant, PeerId)> = self
            .peers
            .iter()
            .filter(|(_, p)| !p.connected && !p.addresses.is_empty())
            .map(|(id, p)| (p.last_seen, *id))
            .collect();
        // The one heard of longest ago first, so that no dead one is tried twice before another.
        candidates.sort_by_key(|(seen, _)| *seen);
        for (_, peer) in candidates.into_iter().take(wanted) {
            self.peers.entry(peer, Instant::now()).last_seen = Instant::now();
            // What fails is noted by its event.
            let _ = self.dial_peer(peer);
        }
    }

    /// Dials a peer at all known addresses, unless it is connected or being dialled.
    pub(super) fn dial_peer(&mut self, peer: PeerId) -> Result<ConnectionId, DialError> {
        let addresses = self.peers.get(&peer).map(|p| p.addresses.clone()).unwrap_or_default();
        let opts = DialOpts::peer_id(peer)
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .addresses(addresses)
            .extend_addresses_through_behaviour()
            .build();
        let connection = opts.connection_id();
        self.swarm.dial(opts).map(|()| connection)
    }

    pub(super) fn on_identify(&mut self, event: identify::Event) {
        let identify::Event::Received { peer_id: peer, info, .. } = event else { return };
        let now = Instant::now();
        let kad = sundara_proto::names::kad_protocol(&self.shared.network);
        let useful: Vec<Multiaddr> = info
            .listen_addrs
            .iter()
            .take(ADDRESSES_A_MESSAGE)
            .filter(|a| self.is_useful(&peer, a))
            .map(without_peer)
            .collect();
        for address in useful {
            self.peers.learn(peer, address, now);
        }
        let known = self.peers.entry(peer, now);
        known.agent = cert::clean(&info.agent_version, limit::NAME);
        known.serves_dht = info.protocols.iter().any(|p| p.as_ref() == kad);
        known.relays = info.protocols.contains(&libp2p::relay::HOP_PROTOCOL_NAME);
        known.last_seen = now;
        self.update_routing(peer);
    }

    pub(super) fn on_ping(&mut self, event: ping::Event) {
        let result = match event.result {
            Ok(rtt) => Ok(rtt),
            Err(ping::Failure::Unsupported) => return,
            Err(error) => Err(format!("ping: {error}")),
        };
        let certified = self.is_agreed(&event.peer);
        // libp2p keeps the first failure of a row to itself, so this is the second. A wire that was cut says nothing: without
        // this the system would hold the connection for a quarter of an hour, and nobody would make a new one.
        if let Err(reason) = &result {
            self.close_connection(event.connection, reason.clone());
        }
        self.peers.on_ping(event.peer, result, certified, Instant::now());
    }

    pub(super) fn on_mdns(&mut self, event: mdns::Event) {
        let mdns::Event::Discovered(found) = event else { return };
        for (peer, address) in found.into_iter().take(ADDRESSES_A_MESSAGE) {
            self.peers.learn(peer, without_peer(&address), Instant::now());
            // What fails is noted by its event.
            let _ = self.dial_peer(peer);
        }
    }

    pub(super) fn on_probe(&mut self, event: autonat::v2::client::Event) {
        // A success comes as a confirmed external address too.
        if let Err(error) = event.result
            && is_global(&event.tested_addr)
        {
            tracing::debug!(address = %event.tested_addr, server = %event.server, %error, "not reachable");
            if self.nat.on_probe_failed(event.tested_addr)
                && let Some(hint) = self.nat.hint()
            {
                self.warn(hint);
            }
        }
    }

    /// A private node asks connected relays for slots.
    pub(super) fn take_relays(&mut self) {
        if !self.config.relay_client || self.nat.reachability() != Reachability::Private {
            return;
        }
        let relays: Vec<(PeerId, Multiaddr)> = self
            .connections
            .values()
            .filter(|c| c.dialled && c.certified && !c.relayed)
            .filter(|c| self.peers.get(&c.peer).is_some_and(|p| p.relays))
            .map(|c| (c.peer, without_peer(&c.address)))
            .collect();
        for (relay, address) in relays {
            if !self.nat.wants_relay() || self.nat.uses_relay(&relay) {
                continue;
            }
            let circuit = address.with(Protocol::P2p(relay)).with(Protocol::P2pCircuit);
            if let Ok(listener) = self.swarm.listen_on(circuit) {
                self.nat.on_relay_asked(relay);
                self.relay_listeners.insert(listener, relay);
            }
        }
    }
}
