//! Streams of our own protocols: /cert for everyone, /rpc and /blob for certified peers.
//!
//! Owns opening and accepting, tied to the connection on which it happens; what runs on a stream is decided by the event
//! loop. libp2p-stream would do the same for one protocol at a time, but it drops inbound streams when their acceptor lags,
//! picks a connection at random, and keeps a sender for every connection that ever was.
//!
//! Invariants: while a peer's gate is shut, only /cert is offered to it and only /cert is opened. Streams per connection
//! are bounded by the muxer, negotiations by the swarm.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{ReadyUpgrade, UpgradeInfo};
use libp2p::core::{Endpoint, InboundUpgrade};
use libp2p::swarm::behaviour::FromSwarm;
use libp2p::swarm::handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound};
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, NetworkBehaviour, NotifyHandler, Stream,
    StreamProtocol, StreamUpgradeError, SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};

use super::gate::{Gates, PeerGate};

/// Names an opening, chosen by the caller.
pub(super) type Token = u64;

/// What happened on a connection.
#[derive(Debug)]
pub(super) enum Event {
    /// The peer opened a stream.
    Inbound { peer: PeerId, connection: ConnectionId, protocol: StreamProtocol, stream: Stream },
    /// An opening of ours came to an end.
    Opened { token: Token, result: Result<Stream, String> },
}

/// Opens and accepts streams. See the module.
pub(super) struct Behaviour {
    gates: Gates,
    cert: StreamProtocol,
    all: Arc<[StreamProtocol]>,
    keep: Arc<AtomicBool>,
    pending: VecDeque<ToSwarm<Event, Open>>,
}

impl Behaviour {
    /// `others` are offered to certified peers only. While `keep` is set, connections of certified peers stay open
    /// without traffic.
    pub(super) fn new(gates: Gates, cert: StreamProtocol, others: Vec<StreamProtocol>, keep: Arc<AtomicBool>) -> Self {
        let all = std::iter::once(cert.clone()).chain(others).collect();
        Self { gates, cert, all, keep, pending: VecDeque::new() }
    }

    /// Opens a stream on one connection. Exactly one [`Event::Opened`] follows, unless the connection closes first.
    pub(super) fn open(&mut self, peer: PeerId, connection: ConnectionId, protocol: StreamProtocol, token: Token) {
        self.pending.push_back(ToSwarm::NotifyHandler {
            peer_id: peer,
            handler: NotifyHandler::One(connection),
            event: Open { protocol, token },
        });
    }

    fn handler(&self, peer: &PeerId) -> Handler {
        Handler {
            gate: self.gates.of(peer),
            cert: [self.cert.clone()].into(),
            all: self.all.clone(),
            keep: self.keep.clone(),
            opening: VecDeque::new(),
            events: VecDeque::new(),
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Event;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(&peer))
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(&peer))
    }

    fn on_swarm_event(&mut self, _: FromSwarm) {}

    fn on_connection_handler_event(&mut self, peer: PeerId, connection: ConnectionId, event: THandlerOutEvent<Self>) {
        let event = match event {
            HandlerEvent::Inbound { protocol, stream } => Event::Inbound { peer, connection, protocol, stream },
            HandlerEvent::Opened { token, result } => Event::Opened { token, result },
        };
        self.pending.push_back(ToSwarm::GenerateEvent(event));
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        // The loop that calls `open` polls the swarm next, so that no waker is needed.
        self.pending.pop_front().map_or(Poll::Pending, Poll::Ready)
    }
}

/// Asks a handler for a stream.
#[derive(Debug)]
pub(super) struct Open {
    protocol: StreamProtocol,
    token: Token,
}

/// What a handler reports.
#[derive(Debug)]
pub(super) enum HandlerEvent {
    Inbound { protocol: StreamProtocol, stream: Stream },
    Opened { token: Token, result: Result<Stream, String> },
}

/// One connection's streams.
pub(super) struct Handler {
    gate: Arc<PeerGate>,
    cert: Arc<[StreamProtocol]>,
    all: Arc<[StreamProtocol]>,
    keep: Arc<AtomicBool>,
    opening: VecDeque<Open>,
    events: VecDeque<HandlerEvent>,
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Open;
    type ToBehaviour = HandlerEvent;
    type InboundProtocol = AnyOf;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Token;

    fn listen_protocol(&self) -> SubstreamProtocol<AnyOf> {
        let list = if self.gate.is_inbound_open() { &self.all } else { &self.cert };
        SubstreamProtocol::new(AnyOf { list: list.clone(), next: 0 }, ())
    }

    fn connection_keep_alive(&self) -> bool {
        // A connection whose handshake runs is closed by the loop's own timeout, not for being idle.
        !self.gate.is_outbound_open() || self.keep.load(Ordering::Relaxed)
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Token, Self::ToBehaviour>> {
        if let Some(event) = self.events.pop_front() {
            return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(event));
        }
        if let Some(Open { protocol, token }) = self.opening.pop_front() {
            let protocol = SubstreamProtocol::new(ReadyUpgrade::new(protocol), token);
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
        }
        if !self.gate.is_outbound_open() {
            self.gate.wait(cx);
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, open: Open) {
        self.opening.push_back(open);
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<Self::InboundProtocol, Self::OutboundProtocol, (), Token>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
                protocol: (protocol, stream), ..
            }) => {
                self.events.push_back(HandlerEvent::Inbound { protocol, stream });
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol: stream, info: token }) => {
                self.events.push_back(HandlerEvent::Opened { token, result: Ok(stream) });
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info: token, error }) => {
                let reason = match error {
                    StreamUpgradeError::Timeout => "opening a stream timed out".to_owned(),
                    StreamUpgradeError::NegotiationFailed => "the peer does not speak this protocol".to_owned(),
                    StreamUpgradeError::Io(error) => error.to_string(),
                    StreamUpgradeError::Apply(error) => match error {},
                };
                self.events.push_back(HandlerEvent::Opened { token, result: Err(reason) });
            }
            _ => {}
        }
    }
}

/// Accepts any of a list of protocols.
#[derive(Clone, Debug)]
pub(super) struct AnyOf {
    list: Arc<[StreamProtocol]>,
    next: usize,
}

impl Iterator for AnyOf {
    type Item = StreamProtocol;
    fn next(&mut self) -> Option<StreamProtocol> {
        let protocol = self.list.get(self.next)?.clone();
        self.next += 1;
        Some(protocol)
    }
}

impl UpgradeInfo for AnyOf {
    type Info = StreamProtocol;
    type InfoIter = Self;
    fn protocol_info(&self) -> Self {
        self.clone()
    }
}

impl InboundUpgrade<Stream> for AnyOf {
    type Output = (StreamProtocol, Stream);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;
    fn upgrade_inbound(self, stream: Stream, protocol: StreamProtocol) -> Self::Future {
        ready(Ok((protocol, stream)))
    }
}
