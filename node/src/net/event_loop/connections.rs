//! Connections as they come, go and fail.

use libp2p::core::transport::TransportError;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, ListenError, SwarmEvent};
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::{BehaviourEvent, Connection, NetDriver};
use crate::net::bootstrap::peer_of;
use crate::net::id::node_id;
use crate::net::scoring;
use crate::net::status::PeerEvent;

impl NetDriver {
    pub(super) fn on_connection_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        let now = Instant::now();
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                let (dialled, relayed) = (endpoint.is_dialer(), endpoint.is_relayed());
                self.on_established(connection_id, peer_id, endpoint.get_remote_address().clone(), dialled, relayed);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, num_established, cause, .. } => {
                let cause = cause.map(|cause| cause.to_string());
                self.on_closed(connection_id, peer_id, num_established, cause);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                self.shared.metrics.dials_failed.inc();
                let reason = dial_reason(&error);
                self.bootstrap.on_failed(connection_id, &reason, now);
                self.links.on_dial_failed(connection_id, &reason);
                if let Some(peer) = peer_id
                    && !matches!(error, DialError::DialPeerConditionFalse(_))
                {
                    self.peers.on_unreachable(peer, reason.clone(), now);
                    self.on_peer_dial_failed(peer, connection_id, &reason);
                }
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                self.shared.metrics.connections_refused.inc();
                tracing::debug!(from = %send_back_addr, reason = %listen_reason(&error), "inbound connection refused");
            }
            SwarmEvent::NewListenAddr { listener_id, address } => {
                tracing::info!(%address, "listening");
                if let Some(addresses) = self.listeners.get_mut(&listener_id) {
                    addresses.push(address);
                }
                self.answer_listeners();
            }
            SwarmEvent::ListenerClosed { listener_id, reason, .. } => {
                self.listeners.remove(&listener_id);
                if let Some(relay) = self.relay_listeners.remove(&listener_id) {
                    self.nat.on_relay_gone(&relay);
                } else if let Err(error) = reason {
                    self.warn(format!("a listener ended: {error}; see net.listen"));
                }
                self.answer_listeners();
            }
            SwarmEvent::ListenerError { error, .. } => tracing::warn!(%error, "listener"),
            SwarmEvent::ExternalAddrConfirmed { address } => {
                tracing::info!(%address, "reachable from outside");
                self.nat.on_confirmed();
                self.set_dht_server(true);
            }
            SwarmEvent::ExternalAddrExpired { .. } if self.swarm.external_addresses().next().is_none() => {
                let fixed = self.config.assume_reachable || !self.config.announce.is_empty();
                if !fixed {
                    self.nat.on_expired();
                    self.set_dht_server(false);
                }
            }
            _ => {}
        }
    }

    fn on_established(&mut self, id: ConnectionId, peer: PeerId, address: Multiaddr, dialled: bool, relayed: bool) {
        let now = Instant::now();
        self.shared.metrics.connections_opened.inc();
        self.peers.on_connected(peer, now);
        if dialled {
            self.peers.learn(peer, without_peer(&address), now);
        }
        // Until its certificate is seen; with the gate shut it could not be heard anyway.
        let score = self.session(&peer).map_or(scoring::UNCERTIFIED, |session| self.score_of(session));
        self.swarm.behaviour_mut().gossip.inner.set_application_score(&peer, score);
        self.bootstrap.on_established(id, peer);
        self.connections.insert(
            id,
            Connection {
                peer,
                address,
                dialled,
                relayed,
                opened: now,
                certified: false,
                handshaking: false,
                bulk: crate::net::bulk::Counts::default(),
                closing: None,
            },
        );
        self.links.on_dial_established(id, peer);
        if dialled {
            self.start_handshake(id);
        }
        self.on_bulk_connection(peer, id);
    }

    /// Closes one connection and remembers why.
    pub(super) fn close_connection(&mut self, id: ConnectionId, reason: String) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.closing.is_none() {
            connection.closing = Some(reason);
            self.swarm.close_connection(id);
        }
    }

    /// Closes all connections of a peer.
    pub(super) fn disconnect(&mut self, peer: PeerId, reason: String) {
        let open: Vec<ConnectionId> =
            self.connections.iter().filter(|(_, c)| c.peer == peer).map(|(id, _)| *id).collect();
        for id in open {
            self.close_connection(id, reason.clone());
        }
    }

    fn on_closed(&mut self, id: ConnectionId, peer: PeerId, left: u32, cause: Option<String>) {
        let now = Instant::now();
        let closed = self.connections.remove(&id);
        let fault = closed.and_then(|c| c.closing);
        let reason = fault.clone().or(cause.clone()).unwrap_or_else(|| "the connection was closed".to_owned());
        self.settle_conflict(peer, id);
        self.links.on_connection_closed(id, &reason);
        self.bootstrap.on_failed(id, &reason, now);
        if left > 0 {
            return;
        }
        let agreed = self.sessions.remove(&peer).is_some_and(|s| s.agreed);
        self.gates.forget(&peer);
        self.slots.release(&peer);
        if let Some(fault) = fault {
            self.peers.on_fault(peer, fault, now);
        }
        self.peers.on_gone(peer, cause, now);
        self.bootstrap.on_gone(peer, &reason, now);
        self.links.on_peer_gone(peer, &reason);
        self.drop_link(peer);
        if agreed && let Some(node) = node_id(&peer) {
            tracing::debug!(%peer, %reason, "peer gone");
            self.announce(PeerEvent::Gone(node));
        }
    }
}

/// Options for an address, with or without its peer.
pub(super) fn dial_opts(address: &Multiaddr) -> DialOpts {
    match peer_of(address) {
        Some(peer) => {
            DialOpts::peer_id(peer).condition(PeerCondition::NotDialing).addresses(vec![address.clone()]).build()
        }
        None => DialOpts::unknown_peer_id().address(address.clone()).build(),
    }
}

/// An address without the peer at its end.
pub(super) fn without_peer(address: &Multiaddr) -> Multiaddr {
    let mut address = address.clone();
    if let Some(Protocol::P2p(_)) = address.iter().last() {
        address.pop();
    }
    address
}

/// Why an address cannot be listened on or dialled, without libp2p's layers.
pub(super) fn transport_reason(error: &TransportError<std::io::Error>) -> String {
    match error {
        TransportError::MultiaddrNotSupported(_) => "no transport for such an address".to_owned(),
        TransportError::Other(error) => root_cause(error),
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    // Bounded: an error that names itself as its source would never end.
    for _ in 0..16 {
        match cause.source() {
            Some(source) => cause = source,
            None => break,
        }
    }
    cause.to_string()
}

/// Why a dial failed, each address with its own reason.
pub(super) fn dial_reason(error: &DialError) -> String {
    match error {
        DialError::LocalPeerId { address } => {
            format!("{address} is this node itself, or another with the same node key")
        }
        DialError::NoAddresses => "no address of this peer is known".to_owned(),
        DialError::DialPeerConditionFalse(_) => "it is connected or being dialled already".to_owned(),
        DialError::Aborted => "the dial was given up".to_owned(),
        DialError::WrongPeerId { obtained, address } => format!("{address} is another node: {obtained}"),
        DialError::Denied { cause } => format!("not dialled by this node's own limits: {}", root_cause(cause)),
        DialError::Transport(errors) => {
            let all: Vec<String> =
                errors.iter().map(|(a, error)| format!("{a}: {}", transport_reason(error))).collect();
            all.join("; ")
        }
    }
}

fn listen_reason(error: &ListenError) -> String {
    match error {
        ListenError::Denied { cause } => root_cause(cause),
        other => root_cause(other),
    }
}
