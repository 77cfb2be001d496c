//! Who waits for a stream or a connection, and what becomes of it when one ends.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, StreamProtocol};
use libp2p::{Multiaddr, PeerId};
use sundara_proto::names;
use tokio::sync::oneshot;

use super::connections::{dial_opts, dial_reason, without_peer};
use super::{Connection, NetDriver};
use crate::net::bootstrap::peer_of;
use crate::net::bulk::{self, Bulk, BulkStream};
use crate::net::id::{node_id, peer_id};
use crate::net::rpc::PeerIdentity;
use crate::net::rpc::client::ClientLink;
use crate::net::streams::Token;

/// Callers that wait for one peer's connection.
const WAITING_MAX: usize = 4096;
const TOO_MANY: &str = "too many callers wait for a connection to this peer";

type LinkDone = oneshot::Sender<Result<ClientLink, String>>;
type BulkDone = oneshot::Sender<Result<BulkStream, String>>;
type DialDone = oneshot::Sender<Result<PeerIdentity, String>>;

/// A stream that is being opened, by its token.
#[derive(Debug)]
pub(super) enum Opening {
    Cert { connection: ConnectionId },
    Link { peer: PeerId, connection: ConnectionId },
    Bulk { peer: PeerId, connection: ConnectionId, kind: Bulk, done: BulkDone },
}

impl Opening {
    fn connection(&self) -> ConnectionId {
        match self {
            Self::Cert { connection } | Self::Link { connection, .. } | Self::Bulk { connection, .. } => *connection,
        }
    }
}

/// What one peer is waited for.
#[derive(Debug, Default)]
struct Wanted {
    links: Vec<LinkDone>,
    bulk: Vec<(Bulk, BulkDone)>,
    /// A request stream is being opened.
    opening_link: bool,
    /// Its addresses are being looked up in the DHT.
    looking_up: bool,
    /// A further connection for bulk is being dialled.
    bulk_dial: Option<ConnectionId>,
    /// A further connection failed; not tried again while streams wait.
    bulk_failed: bool,
}

/// Everything that waits.
#[derive(Debug, Default)]
pub(super) struct Links {
    next_token: Token,
    opening: HashMap<Token, Opening>,
    wanted: HashMap<PeerId, Wanted>,
    /// Dials that a caller asked for, until they are established.
    dials: HashMap<ConnectionId, DialDone>,
    /// The same, until both sides are certified.
    dialled: HashMap<PeerId, Vec<(ConnectionId, DialDone)>>,
}

impl Links {
    fn open(&mut self, opening: Opening) -> Token {
        self.next_token += 1;
        self.opening.insert(self.next_token, opening);
        self.next_token
    }

    pub(super) fn open_cert(&mut self, connection: ConnectionId) -> Token {
        self.open(Opening::Cert { connection })
    }

    pub(super) fn opened(&mut self, token: Token) -> Option<Opening> {
        self.opening.remove(&token)
    }

    pub(super) fn on_dial_failed(&mut self, connection: ConnectionId, reason: &str) {
        if let Some(done) = self.dials.remove(&connection) {
            // A caller that is gone does not need the answer; so in this whole file.
            drop(done.send(Err(reason.to_owned())));
        }
    }

    pub(super) fn on_dial_established(&mut self, connection: ConnectionId, peer: PeerId) {
        if let Some(done) = self.dials.remove(&connection) {
            self.dialled.entry(peer).or_default().push((connection, done));
        }
    }

    pub(super) fn on_dial_certified(&mut self, peer: PeerId, identity: PeerIdentity) {
        for (_, done) in self.dialled.remove(&peer).unwrap_or_default() {
            drop(done.send(Ok(identity)));
        }
    }

    /// Streams that were being opened on a connection will not be.
    pub(super) fn on_connection_closed(&mut self, connection: ConnectionId, reason: &str) {
        let gone: Vec<Token> =
            self.opening.iter().filter(|(_, o)| o.connection() == connection).map(|(token, _)| *token).collect();
        for token in gone {
            match self.opening.remove(&token) {
                Some(Opening::Bulk { done, .. }) => drop(done.send(Err(reason.to_owned()))),
                Some(Opening::Link { peer, .. }) => {
                    if let Some(wanted) = self.wanted.get_mut(&peer) {
                        wanted.opening_link = false;
                    }
                }
                _ => {}
            }
        }
        for waiting in self.dialled.values_mut() {
            let (gone, rest) = std::mem::take(waiting).into_iter().partition(|(id, _)| *id == connection);
            *waiting = rest;
            let gone: Vec<(ConnectionId, DialDone)> = gone;
            for (_, done) in gone {
                drop(done.send(Err(reason.to_owned())));
            }
        }
        self.dialled.retain(|_, waiting| !waiting.is_empty());
    }

    /// Nothing that waits for this peer will come about.
    pub(super) fn on_peer_gone(&mut self, peer: PeerId, reason: &str) {
        let Some(wanted) = self.wanted.remove(&peer) else { return };
        for done in wanted.links {
            drop(done.send(Err(reason.to_owned())));
        }
        for (_, done) in wanted.bulk {
            drop(done.send(Err(reason.to_owned())));
        }
    }
}

impl NetDriver {
    pub(super) fn on_link(&mut self, peer: PeerId, done: LinkDone) {
        if let Some(link) = node_id(&peer).and_then(|node| self.shared.link(node)) {
            return drop(done.send(Ok(link)));
        }
        let wanted = self.links.wanted.entry(peer).or_default();
        if wanted.links.len() >= WAITING_MAX {
            return drop(done.send(Err(TOO_MANY.to_owned())));
        }
        wanted.links.push(done);
        self.reach(peer);
        self.open_link(peer);
    }

    pub(super) fn on_open_bulk(&mut self, peer: PeerId, kind: Bulk, done: BulkDone) {
        let wanted = self.links.wanted.entry(peer).or_default();
        if wanted.bulk.len() >= WAITING_MAX {
            return drop(done.send(Err(TOO_MANY.to_owned())));
        }
        wanted.bulk.push((kind, done));
        self.reach(peer);
        self.flush_bulk(peer);
    }

    pub(super) fn on_dial(&mut self, address: Multiaddr, done: DialDone) {
        if let Some(peer) = peer_of(&address)
            && let Some(session) = self.session(&peer).filter(|s| s.agreed)
        {
            return drop(done.send(Ok(session.identity)));
        }
        if self.links.dials.len() >= WAITING_MAX {
            return drop(done.send(Err("too many dials run at once".to_owned())));
        }
        let opts = dial_opts(&address);
        let connection = opts.connection_id();
        match self.swarm.dial(opts) {
            Ok(()) => {
                self.links.dials.insert(connection, done);
            }
            Err(error) => drop(done.send(Err(dial_reason(&error)))),
        }
    }

    /// Connects to a peer that somebody waits for, unless it is connected or being dialled.
    fn reach(&mut self, peer: PeerId) {
        if self.connections.values().any(|c| c.peer == peer) {
            return;
        }
        match self.dial_peer(peer) {
            Ok(_) | Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(DialError::NoAddresses) => self.look_up(peer),
            Err(error) => self.links.on_peer_gone(peer, &dial_reason(&error)),
        }
    }

    fn look_up(&mut self, peer: PeerId) {
        let Some(wanted) = self.links.wanted.get_mut(&peer) else { return };
        if wanted.looking_up {
            return;
        }
        wanted.looking_up = true;
        if !self.find_peer(peer) {
            self.links.on_peer_gone(peer, "too many DHT queries run at once");
        }
    }

    pub(super) fn on_peer_looked_up(&mut self, peer: PeerId) {
        if !self.links.wanted.contains_key(&peer) || self.connections.values().any(|c| c.peer == peer) {
            return;
        }
        match self.dial_peer(peer) {
            Ok(_) | Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(error) => self.links.on_peer_gone(peer, &dial_reason(&error)),
        }
    }

    pub(super) fn on_peer_dial_failed(&mut self, peer: PeerId, connection: ConnectionId, reason: &str) {
        if let Some(wanted) = self.links.wanted.get_mut(&peer)
            && wanted.bulk_dial == Some(connection)
        {
            (wanted.bulk_dial, wanted.bulk_failed) = (None, true);
            return self.flush_bulk(peer);
        }
        if !self.connections.values().any(|c| c.peer == peer) {
            self.links.on_peer_gone(peer, reason);
        }
    }

    /// Opens the request stream to a certified peer if somebody waits for it.
    pub(super) fn open_link(&mut self, peer: PeerId) {
        let Some(session) = self.sessions.get(&peer).filter(|s| s.agreed) else { return };
        let name = names::rpc_protocol(&self.shared.network, session.version);
        let Some(wanted) = self.links.wanted.get_mut(&peer) else { return };
        if wanted.links.is_empty() || wanted.opening_link {
            return;
        }
        // Direct before relayed, old before new, so that both directions share one connection.
        let usable = self.connections.iter().filter(|(_, c)| c.peer == peer && c.closing.is_none());
        let Some((id, _)) = usable.min_by_key(|(_, c)| (c.relayed, c.opened)) else { return };
        let (connection, Ok(protocol)) = (*id, StreamProtocol::try_from_owned(name)) else { return };
        wanted.opening_link = true;
        let token = self.links.open(Opening::Link { peer, connection });
        self.swarm.behaviour_mut().streams.open(peer, connection, protocol, token);
    }

    /// Opens the bulk streams that wait, on the least loaded connections; dials a further one where that helps.
    pub(super) fn flush_bulk(&mut self, peer: PeerId) {
        let Some(session) = self.sessions.get(&peer).filter(|s| s.agreed) else { return };
        let version = session.version;
        while let Some(wanted) = self.links.wanted.get_mut(&peer) {
            if wanted.bulk.is_empty() || wanted.bulk_dial.is_some() {
                return;
            }
            let usable = || self.connections.iter().filter(|(_, c)| c.peer == peer && c.closing.is_none());
            let load = |c: &Connection| (c.relayed, c.bulk.total(), std::cmp::Reverse(c.opened));
            let (count, least) = (usable().count(), usable().min_by_key(|(_, c)| load(c)));
            let Some((id, counter)) = least.map(|(id, c)| (*id, c.bulk.clone())) else { return };
            let busy = counter.total() > 0;
            if busy && count < bulk::CONNECTIONS && !wanted.bulk_failed && self.dial_bulk(peer) {
                return;
            }
            let Some((kind, done)) = self.links.wanted.get_mut(&peer).and_then(|w| w.bulk.pop()) else { return };
            let Ok(protocol) = StreamProtocol::try_from_owned(kind.protocol(&self.shared.network, version)) else {
                return;
            };
            // Counted from now on, so that the next one goes elsewhere; corrected when the stream is there.
            counter.of(kind).fetch_add(1, Ordering::Relaxed);
            let token = self.links.open(Opening::Bulk { peer, connection: id, kind, done });
            self.swarm.behaviour_mut().streams.open(peer, id, protocol, token);
        }
    }

    /// Dials a further connection to a connected peer. Says whether one is on its way.
    fn dial_bulk(&mut self, peer: PeerId) -> bool {
        let direct = self.connections.values().find(|c| c.peer == peer && c.dialled && !c.relayed);
        let known = direct.map(|c| vec![without_peer(&c.address)]);
        let addresses = known.or_else(|| self.peers.get(&peer).map(|p| p.addresses.clone())).unwrap_or_default();
        let dialled = (!addresses.is_empty()).then(|| {
            let opts = DialOpts::peer_id(peer).condition(PeerCondition::Always).addresses(addresses).build();
            let connection = opts.connection_id();
            self.swarm.dial(opts).is_ok().then_some(connection)
        });
        let connection = dialled.flatten();
        if let Some(wanted) = self.links.wanted.get_mut(&peer) {
            (wanted.bulk_dial, wanted.bulk_failed) = (connection, connection.is_none());
        }
        connection.is_some()
    }

    /// A connection for bulk has come about.
    pub(super) fn on_bulk_connection(&mut self, peer: PeerId, connection: ConnectionId) {
        if let Some(wanted) = self.links.wanted.get_mut(&peer)
            && wanted.bulk_dial == Some(connection)
        {
            wanted.bulk_dial = None;
            self.flush_bulk(peer);
        }
    }

    /// The request stream is open, or is not to be.
    pub(super) fn on_link_opened(&mut self, peer: PeerId, result: Result<libp2p::swarm::Stream, String>) {
        let waiting = match self.links.wanted.get_mut(&peer) {
            Some(wanted) => {
                wanted.opening_link = false;
                std::mem::take(&mut wanted.links)
            }
            None => Vec::new(),
        };
        self.forget_satisfied(peer);
        let link = result.map(|stream| self.drive_client(peer, stream));
        for done in waiting {
            drop(done.send(link.clone()));
        }
    }

    /// Drops the entry of a peer for whom nobody waits any more.
    pub(super) fn forget_satisfied(&mut self, peer: PeerId) {
        let idle = |w: &Wanted| w.links.is_empty() && w.bulk.is_empty() && w.bulk_dial.is_none();
        if self.links.wanted.get(&peer).is_some_and(idle) {
            self.links.wanted.remove(&peer);
        }
    }

    pub(super) fn drop_link(&mut self, peer: PeerId) {
        if let Some(node) = node_id(&peer) {
            self.shared.links.write().unwrap_or_else(PoisonError::into_inner).remove(&node);
        }
    }

    pub(super) fn on_client_ended(&mut self, peer: PeerId) {
        let mut links = self.shared.links.write().unwrap_or_else(PoisonError::into_inner);
        // A newer link may stand there already.
        links.retain(|node, link| peer_id(*node) != peer || !link.is_closed());
    }
}
