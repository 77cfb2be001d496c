//! Who gets a place: inbound slots by registration, owner and subnet, and a cap on raw connections of one subnet.
//!
//! Many identities on one host could otherwise surround a node. Two places decide: [`SubnetLimits`] before anything is
//! known of a connection but its address, [`Slots`] when its certificate has been seen. Totals, pending handshakes and
//! memory are libp2p's own limits behaviours.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::net::IpAddr;
use std::task::{Context, Poll};

use libp2p::core::transport::PortUse;
use libp2p::core::{Endpoint, multiaddr::Protocol};
use libp2p::swarm::behaviour::{ConnectionClosed, FromSwarm, ListenFailure};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};
use sundara_proto::id::NodeId;

use super::Standing;
use super::config::NetLimits;

/// Connections of one subnet beyond what its slots need: those whose certificate has not been seen yet.
const UNCERTIFIED_PER_SUBNET: usize = 8;

/// A /24 of IPv4 or a /48 of IPv6: what one party usually holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Subnet {
    V4([u8; 3]),
    V6([u16; 3]),
}

/// The subnet that counts for an address: none for relayed and in-process connections, and none for loopback where that
/// is exempt.
pub(super) fn subnet(address: &Multiaddr, exempt_loopback: bool) -> Option<Subnet> {
    if address.iter().any(|part| part == Protocol::P2pCircuit) {
        return None;
    }
    let ip = ip(address)?;
    if exempt_loopback && ip.is_loopback() {
        return None;
    }
    Some(match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            Subnet::V4([a, b, c])
        }
        IpAddr::V6(ip) => {
            let [a, b, c, ..] = ip.segments();
            Subnet::V6([a, b, c])
        }
    })
}

/// The IP address that a multiaddress begins with.
pub(super) fn ip(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next()? {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.into()),
        _ => None,
    }
}

/// Whether an address means anything outside its own network.
pub(super) fn is_global(address: &Multiaddr) -> bool {
    match ip(address) {
        Some(IpAddr::V4(ip)) => {
            let [a, b, ..] = ip.octets();
            // 100.64/10 is carrier-grade NAT.
            let shared = a == 100 && (64..128).contains(&b);
            !(ip.is_private() || ip.is_loopback() || ip.is_link_local() || ip.is_unspecified() || shared)
        }
        Some(IpAddr::V6(ip)) => {
            !(ip.is_loopback() || ip.is_unspecified() || ip.is_unique_local() || ip.is_unicast_link_local())
        }
        None => address.iter().any(|part| {
            matches!(part, Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_) | Protocol::Dnsaddr(_))
        }),
    }
}

/// Inbound places of certified peers.
#[derive(Debug)]
pub(super) struct Slots {
    limits: NetLimits,
    exempt: HashSet<NodeId>,
    taken: HashMap<PeerId, Taken>,
}

#[derive(Clone, Copy, Debug)]
struct Taken {
    subnet: Option<Subnet>,
    owner: Option<[u8; 32]>,
    registered: bool,
}

impl Slots {
    pub(super) fn new(limits: NetLimits) -> Self {
        Self { limits, exempt: HashSet::new(), taken: HashMap::new() }
    }

    pub(super) fn set_exempt(&mut self, nodes: impl IntoIterator<Item = NodeId>) {
        self.exempt = nodes.into_iter().collect();
    }

    /// Takes a place for a certified peer that connected to us. `standing` is what the ledger says of its hotkey;
    /// `ledger` is whether there is a ledger at all, without which nobody can be registered.
    ///
    /// # Errors
    /// Why there is none, in words for the peer.
    pub(super) fn admit(
        &mut self,
        peer: PeerId,
        node: NodeId,
        address: &Multiaddr,
        standing: Option<&Standing>,
        ledger: bool,
    ) -> Result<(), String> {
        if self.exempt.contains(&node) || self.taken.contains_key(&peer) {
            return Ok(());
        }
        let subnet = subnet(address, self.limits.exempt_loopback);
        let new = Taken { subnet, owner: standing.and_then(|s| s.owner), registered: standing.is_some() };
        let count = |same: &dyn Fn(&Taken) -> bool| self.taken.values().filter(|taken| same(taken)).count();
        if new.subnet.is_some() && count(&|t| t.subnet == new.subnet) >= self.limits.peers_per_subnet {
            let max = self.limits.peers_per_subnet;
            return Err(format!("all {max} inbound slots of your subnet are taken here: connect to other nodes"));
        }
        if new.owner.is_some() && count(&|t| t.owner == new.owner) >= self.limits.peers_per_owner {
            let max = self.limits.peers_per_owner;
            return Err(format!("all {max} inbound slots of your coldkey are taken here: connect to other nodes"));
        }
        let open = (f64::from(self.limits.inbound) * (1.0 - self.limits.registered_share.clamp(0.0, 1.0))) as usize;
        if ledger && !new.registered && count(&|t| !t.registered) >= open {
            return Err(format!("all {open} inbound slots for unregistered nodes are taken: register, or try later"));
        }
        self.taken.insert(peer, new);
        Ok(())
    }

    /// Gives the place of a peer back.
    pub(super) fn release(&mut self, peer: &PeerId) {
        self.taken.remove(peer);
    }
}

/// Denies inbound connections of a subnet that has too many, certified or not.
pub(super) struct SubnetLimits {
    limits: NetLimits,
    open: HashMap<ConnectionId, Subnet>,
    counts: HashMap<Subnet, usize>,
}

impl SubnetLimits {
    pub(super) fn new(limits: NetLimits) -> Self {
        Self { limits, open: HashMap::new(), counts: HashMap::new() }
    }

    fn forget(&mut self, id: ConnectionId) {
        if let Some(subnet) = self.open.remove(&id)
            && let Some(count) = self.counts.get_mut(&subnet)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&subnet);
            }
        }
    }
}

/// Too many connections of one subnet.
#[derive(Debug, thiserror::Error)]
#[error("too many inbound connections of one subnet: see net.limits.peers_per_subnet")]
struct SubnetFull;

impl NetworkBehaviour for SubnetLimits {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        let Some(subnet) = subnet(remote, self.limits.exempt_loopback) else { return Ok(()) };
        let certified = self.limits.peers_per_subnet * self.limits.connections_per_peer as usize;
        let count = self.counts.entry(subnet).or_insert(0);
        if *count >= certified + UNCERTIFIED_PER_SUBNET {
            return Err(ConnectionDenied::new(SubnetFull));
        }
        *count += 1;
        self.open.insert(id, subnet);
        Ok(())
    }

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        match event {
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. })
            | FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) => self.forget(connection_id),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn address(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    fn admit(slots: &mut Slots, at: &str, standing: Option<&Standing>, ledger: bool) -> Result<(), String> {
        slots.admit(PeerId::random(), NodeId([0; 32]), &address(at), standing, ledger)
    }

    #[test]
    fn fifty_sybils_of_one_subnet_get_two_slots() {
        let mut slots = Slots::new(NetLimits::default());
        let taken = (0..50).filter(|i| admit(&mut slots, &format!("/ip4/8.8.8.{i}/tcp/1"), None, false).is_ok());
        assert_eq!(taken.count(), 2);
        assert!(admit(&mut slots, "/ip4/8.8.9.1/tcp/1", None, false).is_ok());
        for _ in 0..50 {
            assert!(admit(&mut slots, "/ip4/127.0.0.1/tcp/1", None, false).is_ok(), "loopback is exempt");
        }
    }

    #[test]
    fn an_owner_gets_two_and_most_slots_are_for_the_registered() {
        let limits = NetLimits { inbound: 10, ..NetLimits::default() };
        let mut slots = Slots::new(limits);
        let owned = Standing { owner: Some([1; 32]), ..Standing::default() };
        let of_owner =
            (0..5).filter(|i| admit(&mut slots, &format!("/ip4/8.1.{i}.1/tcp/1"), Some(&owned), true).is_ok());
        assert_eq!(of_owner.count(), 2);
        let strangers = (0..9).filter(|i| admit(&mut slots, &format!("/ip4/8.2.{i}.1/tcp/1"), None, true).is_ok());
        assert_eq!(strangers.count(), 4);
    }

    #[test]
    fn a_place_is_given_back_and_executors_are_exempt() {
        let mut slots = Slots::new(NetLimits { peers_per_subnet: 1, ..NetLimits::default() });
        let (peer, at) = (PeerId::random(), address("/ip4/8.8.8.1/tcp/1"));
        slots.admit(peer, NodeId([0; 32]), &at, None, false).unwrap();
        assert!(admit(&mut slots, "/ip4/8.8.8.2/tcp/1", None, false).unwrap_err().contains("subnet"));
        slots.set_exempt([NodeId([9; 32])]);
        slots.admit(PeerId::random(), NodeId([9; 32]), &at, None, false).unwrap();
        slots.release(&peer);
        assert!(admit(&mut slots, "/ip4/8.8.8.2/tcp/1", None, false).is_ok());
    }

    #[test]
    fn what_means_something_outside_is_global() {
        for text in ["/ip4/8.8.8.8/tcp/1", "/dns/example.org/tcp/1", "/ip6/2001:db8::1/udp/1/quic-v1"] {
            assert!(is_global(&address(text)), "{text}");
        }
        for text in
            ["/ip4/10.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1", "/ip4/100.64.0.1/tcp/1", "/ip6/::1/tcp/1", "/memory/1"]
        {
            assert!(!is_global(&address(text)), "{text}");
        }
    }
}
