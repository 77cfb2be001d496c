//! Certificates: who is let in, who is cut, and why.

use std::collections::HashMap;
use std::sync::Arc;

use libp2p::PeerId;
use libp2p::swarm::ConnectionId;
use sundara_proto::id::Hotkey;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Connection, NetDriver, Session, TICK};
use crate::net::cert::{self, Side, Verified};
use crate::net::id::{node_id, peer_id};
use crate::net::rpc::PeerIdentity;
use crate::net::scoring;
use crate::net::status::PeerEvent;
use crate::net::{behaviour, dht};

/// Hotkeys whose serials are remembered.
const SERIALS_MAX: usize = 65_536;

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
        let peer = connection.peer;
        if side == Side::Listener {
            if connection.handshaking {
                // One at a time: a peer has no reason to open two.
                self.shared.metrics.streams_refused.inc();
                return;
            }
            connection.handshaking = true;
        }
        let task = cert::run(stream, side, self.ours.clone(), node, id, self.handshakes.0.clone());
        self.spawn_for(peer, task);
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
    pub(super) fn settle_conflict(&mut self, peer: PeerId, old: ConnectionId) {
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
            bulk: crate::net::bulk::Counts::default(),
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
    fn note_serial(&mut self, hotkey: Hotkey, serial: u64, peer: PeerId) {
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
        self.flush_bulk(peer);
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

    /// Cuts connections on which no certificate was shown in time: slow-loris peers, or other software.
    pub(super) fn cut_uncertified(&mut self, now: Instant) {
        // The handshake's own timeout comes first where one runs, with better words.
        let limit = cert::TIMEOUT + TICK * 4;
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
}
