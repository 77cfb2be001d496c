//! Keeps libp2p's own protocols of the mesh (gossipsub, Kademlia, relay, autonat, dcutr) shut until a peer is certified.
//!
//! Owns one [`PeerGate`] for each peer, in two steps that follow the handshake: *inbound* opens when we have verified the
//! peer's certificate, *outbound* when we know that the peer has verified ours. So neither side ever speaks to a gate that
//! is still shut. Does not own the decision (the event loop).
//!
//! A shut gate lists no protocols to the peer and does not poll the handler behind it, so what that handler would send
//! waits. Invariant: a gate that was opened stays open for as long as a connection of the peer holds it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::UpgradeInfo;
use libp2p::core::{Endpoint, InboundUpgrade};
use libp2p::swarm::behaviour::FromSwarm;
use libp2p::swarm::handler::{
    AddressChange, ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
    InboundUpgradeSend, ListenUpgradeError, UpgradeInfoSend,
};
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, NetworkBehaviour, Stream,
    SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};

/// Handlers of one peer that wait for its gate: all handlers of a connection share one waker.
const WAKERS_MAX: usize = 16;

/// Whether one peer may speak, and be spoken to.
#[derive(Debug, Default)]
pub(super) struct PeerGate {
    inbound: AtomicBool,
    outbound: AtomicBool,
    wakers: Mutex<Vec<Waker>>,
}

impl PeerGate {
    /// The peer's certificate holds: it may speak.
    pub(super) fn open_inbound(&self) {
        self.inbound.store(true, Ordering::Release);
        self.wake();
    }

    /// The peer has accepted ours: it may be spoken to.
    pub(super) fn open_outbound(&self) {
        self.outbound.store(true, Ordering::Release);
        self.wake();
    }

    pub(super) fn is_inbound_open(&self) -> bool {
        self.inbound.load(Ordering::Acquire)
    }

    pub(super) fn is_outbound_open(&self) -> bool {
        self.outbound.load(Ordering::Acquire)
    }

    /// Wakes this task when the gate opens; several handlers of one connection count once.
    pub(super) fn wait(&self, cx: &Context<'_>) {
        let mut wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        if !wakers.iter().any(|w| w.will_wake(cx.waker())) {
            if wakers.len() >= WAKERS_MAX {
                // Connections of one peer are limited to fewer; the oldest belongs to one that is gone.
                wakers.remove(0);
            }
            wakers.push(cx.waker().clone());
        }
    }

    fn wake(&self) {
        let wakers = std::mem::take(&mut *self.wakers.lock().unwrap_or_else(PoisonError::into_inner));
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// The gates of all peers. Held weakly: a gate lives as long as a connection or the loop's session holds it.
#[derive(Clone, Debug, Default)]
pub(super) struct Gates(Arc<Mutex<HashMap<PeerId, Weak<PeerGate>>>>);

impl Gates {
    /// The gate of a peer, shut if it is new.
    pub(super) fn of(&self, peer: &PeerId) -> Arc<PeerGate> {
        let mut gates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = gates.entry(*peer).or_default();
        slot.upgrade().unwrap_or_else(|| {
            let gate = Arc::new(PeerGate::default());
            *slot = Arc::downgrade(&gate);
            gate
        })
    }

    /// The peer's last connection is gone: the next one finds a shut gate, even while old handlers still hold this one.
    pub(super) fn forget(&self, peer: &PeerId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(peer);
    }

    /// Forgets the gates that nobody holds.
    pub(super) fn purge(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, gate| gate.strong_count() > 0);
    }
}

/// A behaviour behind the gates.
pub(super) struct Gated<B> {
    /// The behaviour itself.
    pub(super) inner: B,
    gates: Gates,
}

impl<B> Gated<B> {
    pub(super) fn new(inner: B, gates: Gates) -> Self {
        Self { inner, gates }
    }
}

impl<B: NetworkBehaviour> NetworkBehaviour for Gated<B> {
    type ConnectionHandler = GateHandler<THandler<B>>;
    type ToSwarm = B::ToSwarm;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.inner.handle_pending_inbound_connection(id, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let inner = self.inner.handle_established_inbound_connection(id, peer, local, remote)?;
        Ok(GateHandler { inner, gate: self.gates.of(&peer) })
    }

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.inner.handle_pending_outbound_connection(id, peer, addresses, role)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let inner = self.inner.handle_established_outbound_connection(id, peer, address, role, port)?;
        Ok(GateHandler { inner, gate: self.gates.of(&peer) })
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: THandlerOutEvent<Self>) {
        self.inner.on_connection_handler_event(peer, id, event);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.inner.poll(cx)
    }
}

/// A handler behind its peer's gate.
pub(super) struct GateHandler<H> {
    inner: H,
    gate: Arc<PeerGate>,
}

impl<H: ConnectionHandler> ConnectionHandler for GateHandler<H> {
    type FromBehaviour = H::FromBehaviour;
    type ToBehaviour = H::ToBehaviour;
    type InboundProtocol = GateUpgrade<H::InboundProtocol>;
    type OutboundProtocol = H::OutboundProtocol;
    type InboundOpenInfo = H::InboundOpenInfo;
    type OutboundOpenInfo = H::OutboundOpenInfo;

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol, Self::InboundOpenInfo> {
        let open = self.gate.is_inbound_open();
        self.inner.listen_protocol().map_upgrade(|inner| GateUpgrade { inner, open })
    }

    fn connection_keep_alive(&self) -> bool {
        self.gate.is_inbound_open() && self.inner.connection_keep_alive()
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Self::OutboundOpenInfo, Self::ToBehaviour>> {
        if !self.gate.is_outbound_open() {
            self.gate.wait(cx);
            // It may have opened between the look and the wait.
            if !self.gate.is_outbound_open() {
                return Poll::Pending;
            }
        }
        self.inner.poll(cx)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Option<Self::ToBehaviour>> {
        self.inner.poll_close(cx)
    }

    fn on_behaviour_event(&mut self, event: Self::FromBehaviour) {
        self.inner.on_behaviour_event(event);
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<
            Self::InboundProtocol,
            Self::OutboundProtocol,
            Self::InboundOpenInfo,
            Self::OutboundOpenInfo,
        >,
    ) {
        self.inner.on_connection_event(match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol, info }) => {
                ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol, info })
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol, info }) => {
                ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol, info })
            }
            ConnectionEvent::AddressChange(AddressChange { new_address }) => {
                ConnectionEvent::AddressChange(AddressChange { new_address })
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => {
                ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error })
            }
            ConnectionEvent::ListenUpgradeError(ListenUpgradeError { info, error }) => {
                ConnectionEvent::ListenUpgradeError(ListenUpgradeError { info, error })
            }
            ConnectionEvent::LocalProtocolsChange(change) => ConnectionEvent::LocalProtocolsChange(change),
            ConnectionEvent::RemoteProtocolsChange(change) => ConnectionEvent::RemoteProtocolsChange(change),
            _ => return,
        });
    }
}

/// An upgrade that names no protocol while its gate is shut.
pub(super) struct GateUpgrade<U> {
    inner: U,
    open: bool,
}

impl<U: UpgradeInfoSend> UpgradeInfo for GateUpgrade<U> {
    type Info = U::Info;
    type InfoIter = std::iter::Flatten<std::option::IntoIter<U::InfoIter>>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.open.then(|| self.inner.protocol_info()).into_iter().flatten()
    }
}

impl<U: InboundUpgradeSend> InboundUpgrade<Stream> for GateUpgrade<U> {
    type Output = U::Output;
    type Error = U::Error;
    type Future = U::Future;

    fn upgrade_inbound(self, stream: Stream, info: Self::Info) -> Self::Future {
        self.inner.upgrade_inbound(stream, info)
    }
}
