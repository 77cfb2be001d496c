//! Connections and certificates: who is let in, who is cut, and why.

use std::collections::HashMap;
use std::sync::Arc;

use libp2p::core::transport::TransportError;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, ListenError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, autonat, identify, mdns, ping};
use sundara_proto::wire::limit;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{BehaviourEvent, Connection, NetDriver, Reachability, Session};
use crate::net::bootstrap::peer_of;
use crate::net::cert::{self, Side, Verified};
use crate::net::id::{node_id, peer_id};
use crate::net::limits::is_global;
use crate::net::rpc::PeerIdentity;
use crate::net::scoring;
use crate::net::status::PeerEvent;
use crate::net::{behaviour, dht};

/// Hotkeys whose serials are remembered.
const SERIALS_MAX: usize = 65_536;
/// Peers dialled at once to reach the target number.
const DIALS_A_ROUND: usize = 4;

type Answer = oneshot::Sender<Result<(), String>>;

/// Two processes that show one node key: the older connection is asked whether it still lives.
#[derive(Default)]
pub(super) struct Conflicts(HashMap<PeerId, Conflict>);

struct Conflict {
    old: ConnectionId,
    new: ConnectionId,
    newcomer: Box<Verified>,
    answer: Answer,
}

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
                blobs: Arc::default(),
                closing: None,
            },
        );
        self.links.on_dial_established(id, peer);
        if dialled {
            self.start_handshake(id);
        }
        self.on_bulk_connection(peer, id);
    }

    /// Shows our certificate on a connection.
    pub(super) fn start_handshake(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get(&id) else { return };
        let token = self.links.open_cert(id);
        let protocol = behaviour::cert_protocol(&self.shared.network);
        self.swarm.behaviour_mut().streams.open(connection.peer, id, protocol, token);
    }

    /// Runs a handshake on a stream of /cert.
    pub(super) fn run_handshake(&mut self, id: ConnectionId, stream: libp2p::swarm::Stream, side: Side) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Some(node) = node_id(&connection.peer) else {
            return self.close_connection(id, "the peer's key is not ed25519".to_owned());
        };
        if side == Side::Listener {
            if connection.handshaking {
                // One at a time: a peer has no reason to open two.
                self.shared.metrics.streams_refused.inc();
                return;
            }
            connection.handshaking = true;
        }
        let task = cert::run(stream, side, self.ours.clone(), node, id, self.handshakes.0.clone());
        self.spawn(task);
    }

    pub(super) fn on_handshake(&mut self, event: cert::Event) {
        match event {
            cert::Event::Verified { connection, peer, answer } => self.on_verified(connection, peer, answer),
            cert::Event::Agreed { connection } => self.on_agreed(connection),
            cert::Event::Refused { connection, reason, by_peer } => {
                self.shared.metrics.handshakes_refused.inc();
                let reason = if by_peer { format!("refused by the peer: {reason}") } else { reason };
                self.on_handshake_failed(connection, reason);
            }
            cert::Event::Broken { connection, reason } => {
                self.shared.metrics.handshakes_failed.inc();
                self.on_handshake_failed(connection, reason);
            }
        }
    }

    /// The peer's Hello holds by itself; decides whether it is let in.
    fn on_verified(&mut self, id: ConnectionId, verified: Box<Verified>, answer: Answer) {
        let peer = peer_id(verified.node);
        if self.connections.get(&id).is_none_or(|c| c.closing.is_some()) {
            return drop(answer.send(Err("the connection ended".to_owned())));
        }
        // The older of two processes with one key answers on its own connection: then both live.
        if let Some(conflict) = self.conflicts.0.remove(&peer) {
            if conflict.old == id {
                self.name_conflict(conflict);
            } else {
                self.conflicts.0.insert(peer, conflict);
            }
        }
        let other = self.session(&peer).is_some_and(|s| s.instance != verified.instance);
        if other && let Some(old) = self.older_connection(&peer, id) {
            if self.conflicts.0.contains_key(&peer) {
                return drop(answer.send(Err("another process with this node key is being looked into".to_owned())));
            }
            self.conflicts.0.insert(peer, Conflict { old, new: id, newcomer: verified, answer });
            return self.start_handshake(old);
        }
        self.admit(id, peer, *verified, answer);
    }

    fn older_connection(&self, peer: &PeerId, than: ConnectionId) -> Option<ConnectionId> {
        let others = self.connections.iter().filter(|(id, c)| c.peer == *peer && **id != than && c.certified);
        others.min_by_key(|(_, c)| c.opened).map(|(id, _)| *id)
    }

    fn name_conflict(&mut self, conflict: Conflict) {
        let node = conflict.newcomer.node;
        let at = self.connections.get(&conflict.old).map(|c| c.address.to_string()).unwrap_or_default();
        let from = self.connections.get(&conflict.new).map(|c| c.address.to_string()).unwrap_or_default();
        self.warn(format!("two live processes use the node key of {node}: one at {at}, one at {from}"));
        let words = format!(
            "another live process uses the same node key (seen at {at}): two nodes with one identity; stop one, or give it \
             a key of its own"
        );
        drop(conflict.answer.send(Err(words)));
    }

    /// The older of two processes did not answer, or its connection is gone: the newcomer is the node.
    fn settle_conflict(&mut self, peer: PeerId, old: ConnectionId) {
        let Some(conflict) = self.conflicts.0.remove(&peer) else { return };
        if conflict.old != old {
            if conflict.new != old {
                self.conflicts.0.insert(peer, conflict);
            }
            return;
        }
        self.close_connection(old, "the process behind it has been replaced".to_owned());
        self.admit(conflict.new, peer, *conflict.newcomer, conflict.answer);
    }

    fn admit(&mut self, id: ConnectionId, peer: PeerId, verified: Verified, answer: Answer) {
        let decision = self.decide(id, peer, &verified);
        if let Err(reason) = &decision {
            let (hotkey, node) = (verified.certificate.hotkey(), verified.node);
            tracing::debug!(%peer, %hotkey, %node, %reason, "peer refused");
            return drop(answer.send(decision));
        }
        let now = Instant::now();
        let identity = PeerIdentity {
            node: verified.node,
            hotkey: verified.certificate.hotkey(),
            roles: verified.certificate.roles,
        };
        let known = self.peers.entry(peer, now);
        known.hotkey = Some(identity.hotkey);
        known.roles = Some(identity.roles);
        known.skew_ms = Some(verified.skew_ms);
        known.agent = verified.agent;
        if let Some(words) = cert::skew_in_words(verified.skew_ms) {
            self.warn(format!("peer {}: {words}", verified.node));
        }
        let gate = self.gates.of(&peer);
        gate.open_inbound();
        let dialled = self.connections.get(&id).is_some_and(|c| c.dialled);
        let session = self.sessions.entry(peer).or_insert_with(|| Session {
            identity,
            certificate: verified.certificate.clone(),
            version: verified.version,
            instance: verified.instance,
            agreed: false,
            gate: gate.clone(),
            queued: Arc::default(),
            blobs: Arc::default(),
            serving: 0,
        });
        session.identity = identity;
        session.certificate = verified.certificate;
        session.version = verified.version;
        session.instance = verified.instance;
        if dialled {
            // We dialled, so the peer has shown its certificate after it had verified ours.
            gate.open_outbound();
        }
        let score = self.session(&peer).map_or(scoring::UNCERTIFIED, |session| self.score_of(session));
        self.swarm.behaviour_mut().gossip.inner.set_application_score(&peer, score);
        drop(answer.send(Ok(())));
    }

    /// What only this node can say: lists, revocation, slots.
    fn decide(&mut self, id: ConnectionId, peer: PeerId, verified: &Verified) -> Result<(), String> {
        let hotkey = verified.certificate.hotkey();
        if self.config.deny.contains(&hotkey) {
            return Err(format!("hotkey {hotkey} is on this node's deny list"));
        }
        if !self.config.allow.is_empty() && !self.config.allow.contains(&hotkey) {
            return Err(format!("hotkey {hotkey} is not on this node's allow list"));
        }
        let serial = verified.certificate.serial;
        match self.serials.get(&hotkey) {
            Some((newer, node)) if *node != peer && *newer > serial => {
                return Err(format!(
                    "this certificate (serial {serial}) is revoked: hotkey {hotkey} vouches for another node with serial \
                     {newer}; sign a new one, or stop one of the two nodes"
                ));
            }
            Some((same, node)) if *node != peer && *same == serial && self.is_agreed(node) => {
                let words = format!(
                    "hotkey {hotkey} vouches for two live nodes with one serial ({serial}): sign this node's certificate \
                     with a higher one, or stop one of the two nodes"
                );
                self.warn(format!("two live nodes of one hotkey: {node} and {peer}; {words}"));
                return Err(words);
            }
            _ => {}
        }
        let connection = self.connections.get(&id).ok_or("the connection ended")?;
        if !connection.dialled && !self.is_agreed(&peer) {
            let standing = self.standings.get(&hotkey);
            let ledger = !self.standings.is_empty();
            self.slots.admit(peer, verified.node, &connection.address, standing, ledger)?;
        }
        self.note_serial(hotkey, serial, peer);
        Ok(())
    }

    /// Remembers the highest serial of a hotkey, and cuts the node that it revokes.
    fn note_serial(&mut self, hotkey: sundara_proto::id::Hotkey, serial: u64, peer: PeerId) {
        let before = self.serials.get(&hotkey).copied();
        if before.is_some_and(|(highest, _)| highest > serial) {
            return;
        }
        if before.is_some() || self.serials.len() < SERIALS_MAX {
            self.serials.insert(hotkey, (serial, peer));
        }
        if let Some((old, node)) = before
            && node != peer
            && self.sessions.contains_key(&node)
        {
            self.warn(format!(
                "hotkey {hotkey} now vouches for {peer} (serial {serial}); {node} (serial {old}) is cut"
            ));
            self.disconnect(node, "its certificate was revoked by one with a higher serial".to_owned());
        }
    }

    fn on_agreed(&mut self, id: ConnectionId) {
        let now = Instant::now();
        let Some(connection) = self.connections.get_mut(&id) else { return };
        (connection.certified, connection.handshaking) = (true, false);
        let peer = connection.peer;
        // An answer of the older of two processes has been dealt with when it was verified.
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        let (identity, fresh) = (session.identity, !session.agreed);
        session.agreed = true;
        session.gate.open_outbound();
        if !fresh {
            return;
        }
        tracing::debug!(%peer, node = %identity.node, hotkey = %identity.hotkey, roles = %identity.roles, "peer certified");
        self.peers.on_certified(peer, now);
        self.bootstrap.on_certified(peer);
        self.update_routing(peer);
        self.announce(PeerEvent::Connected(identity));
        self.links.on_dial_certified(peer, identity);
        self.open_link(peer);
        self.flush_blobs(peer);
    }

    fn on_handshake_failed(&mut self, id: ConnectionId, reason: String) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.handshaking = false;
        let (peer, certified) = (connection.peer, connection.certified);
        self.settle_conflict(peer, id);
        // A renewal that fails, for instance since the peer ran out of time, leaves what was agreed until it expires.
        if certified && self.is_agreed(&peer) && !reason.starts_with("refused") {
            return;
        }
        self.close_connection(id, reason);
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

    /// Cuts connections on which no certificate was shown in time: slow-loris peers, or other software.
    pub(super) fn cut_uncertified(&mut self, now: Instant) {
        // The handshake's own timeout comes first where one runs, with better words.
        let limit = cert::TIMEOUT + super::TICK * 4;
        let late = |c: &Connection| !c.certified && c.closing.is_none() && now.duration_since(c.opened) > limit;
        let late: Vec<ConnectionId> = self.connections.iter().filter(|(_, c)| late(c)).map(|(id, _)| *id).collect();
        for id in late {
            self.shared.metrics.handshakes_failed.inc();
            self.close_connection(id, format!("no certificate within {} s", cert::TIMEOUT.as_secs()));
        }
    }

    /// Cuts peers whose certificates have expired without a newer one.
    pub(super) fn cut_expired(&mut self) {
        let now = dht::wall_clock();
        let expired: Vec<PeerId> =
            self.sessions.iter().filter(|(_, s)| s.certificate.expires_at < now).map(|(peer, _)| *peer).collect();
        for peer in expired {
            self.disconnect(peer, "its certificate has expired: the peer must renew it".to_owned());
        }
    }

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
        let useful: Vec<Multiaddr> =
            info.listen_addrs.iter().take(32).filter(|a| self.is_useful(&peer, a)).map(without_peer).collect();
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
        self.peers.on_ping(event.peer, result, certified, Instant::now());
    }

    pub(super) fn on_mdns(&mut self, event: mdns::Event) {
        let mdns::Event::Discovered(found) = event else { return };
        for (peer, address) in found.into_iter().take(64) {
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
