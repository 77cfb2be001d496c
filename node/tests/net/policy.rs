//! Who is let in, who is told why not, and what a node says of its own troubles.

use sundara_node::net::{NetConfig, NetLimits, PeerState, RpcError};
use sundara_proto::cert::Certificate;
use sundara_proto::crypto::Network;
use sundara_proto::units::UnixMillis;

use crate::kit::{self, HOUR, Node, certificate, hotkey, identity, identity_with, memory, network, now, tcp, until};
use crate::talking::{done, serve_done, watch};

/// Why `node` is not let in by `to`, in the words that it hears.
async fn refused(node: &Node, to: &Node) -> String {
    node.net.dial(to.address.clone()).await.unwrap_err()
}

#[tokio::test]
async fn every_bad_certificate_is_refused_in_words_on_both_sides() {
    let node = Node::memory(1).await;
    let now = now();
    let long_ago = UnixMillis(now.0 - 7_200_000);
    let expired = Certificate { issued_at: long_ago, expires_at: long_ago.plus(HOUR), ..certificate(2) };
    let ahead = Certificate { issued_at: now.plus(HOUR), expires_at: now.plus(HOUR * 2), ..certificate(3) };
    for (number, bad, words) in [(2, expired, "expired"), (3, ahead, "ahead of this node's clock")] {
        let peer = Node::start(memory(), identity_with(number, number, bad)).await;
        let reason = refused(&peer, &node).await;
        assert!(reason.contains("refused by the peer") && reason.contains(words), "{reason}");
        // The one that refuses says it in its table too, as unhealthy rather than unreachable.
        until(|| async {
            let seen = node.peer(peer.id()).await;
            seen.is_some_and(|p| matches!(p.state, PeerState::Unhealthy { reason } if reason.contains(words)))
        })
        .await;
        // The other way round the dialler refuses.
        let reason = refused(&node, &peer).await;
        assert!(reason.contains(words), "{reason}");
    }
}

#[tokio::test]
async fn meshes_do_not_mix() {
    let node = Node::memory(1).await;
    let foreign = Certificate { network: Network::named("another mesh", 7), ..certificate(2) };
    let peer = Node::start(memory(), identity_with(2, 2, foreign)).await;
    let reason = refused(&peer, &node).await;
    assert!(reason.contains("another mesh"), "{reason}");
}

#[tokio::test]
async fn a_higher_serial_revokes_the_other_nodes_of_a_hotkey() {
    let node = Node::memory(1).await;
    let with_serial = |number, serial| identity_with(number, 9, Certificate { serial, ..certificate(number) });
    let old = Node::start(memory(), with_serial(2, 5)).await;
    old.join(&node).await;
    let twin = Node::start(memory(), with_serial(3, 5)).await;
    let reason = refused(&twin, &node).await;
    assert!(reason.contains("two live nodes") && reason.contains("serial"), "{reason}");
    let new = Node::start(memory(), with_serial(4, 6)).await;
    new.join(&node).await;
    until(|| async { node.peer(old.id()).await.is_some_and(|p| p.connections == 0) }).await;
    let reason = refused(&old, &node).await;
    assert!(reason.contains("revoked"), "{reason}");
    let warnings = node.net.status().await.unwrap().warnings;
    assert!(warnings.iter().any(|w| w.contains(&hotkey(9).hotkey().to_string())), "{warnings:?}");
}

#[tokio::test]
async fn two_live_processes_with_one_key_are_named_and_a_restart_is_not() {
    let node = Node::memory(1).await;
    let first = Node::memory(2).await;
    first.join(&node).await;
    let second = Node::memory(2).await;
    let reason = refused(&second, &node).await;
    assert!(reason.contains("two nodes with one identity"), "{reason}");
    let warnings = node.net.status().await.unwrap().warnings;
    assert!(warnings.iter().any(|w| w.contains("two live processes")), "{warnings:?}");
    assert_eq!(node.peer(first.id()).await.unwrap().state, PeerState::Healthy, "the first one stays");
    first.stop().await;
    until(|| async { second.net.dial(node.address.clone()).await.is_ok() }).await;
}

#[tokio::test]
async fn lists_of_hotkeys_decide() {
    let config = NetConfig { deny: vec![hotkey(2).hotkey()], ..memory() };
    let denying = Node::start(config, identity(1)).await;
    let config = NetConfig { allow: vec![hotkey(2).hotkey()], ..memory() };
    let allowing = Node::start(config, identity(4)).await;
    let (two, three) = (Node::memory(2).await, Node::memory(3).await);
    assert!(refused(&two, &denying).await.contains("deny list"));
    assert!(refused(&three, &allowing).await.contains("allow list"));
    two.join(&allowing).await;
    three.join(&denying).await;
}

#[tokio::test]
async fn a_mesh_of_two_versions_talks_and_says_where_it_cannot() {
    let with = |versions| NetConfig { versions, ..memory() };
    let old = Node::start(with(1..=1), identity(1)).await;
    let both = Node::start(with(1..=2), identity(2)).await;
    let new = Node::start(with(2..=2), identity(3)).await;
    let serving = [serve_done(&old), serve_done(&both), serve_done(&new)];
    old.join(&both).await;
    both.join(&new).await;
    for (from, to) in [(&old, &both), (&both, &old), (&both, &new), (&new, &both)] {
        assert_eq!(from.net.request_one(to.id(), watch(1)).await.unwrap(), done());
    }
    for (from, to) in [(&old, &new), (&new, &old)] {
        let reason = refused(from, to).await;
        assert!(reason.contains("no common protocol version") && reason.contains("update"), "{reason}");
    }
    serving.iter().for_each(|task| task.abort());
}

#[tokio::test]
async fn fifty_sybils_of_one_subnet_get_two_slots() {
    let limits = NetLimits { exempt_loopback: false, ..NetLimits::default() };
    let node = Node::start(NetConfig { limits, ..tcp() }, identity(1)).await;
    let mut refusals = Vec::new();
    let mut sybils = Vec::new();
    for number in 100..150 {
        let sybil = Node::start(NetConfig { listen: Vec::new(), ..tcp() }, identity(number)).await;
        if let Err(reason) = sybil.net.dial(node.address.clone()).await {
            refusals.push(reason);
        }
        sybils.push(sybil);
    }
    assert_eq!(refusals.len(), 48, "{refusals:?}");
    assert!(refusals[0].contains("slots of your subnet"), "{}", refusals[0]);
    assert_eq!(node.net.status().await.unwrap().connected, 2);
}

#[tokio::test]
async fn a_bootstrap_that_fails_is_named_with_its_reason_and_tried_for_ever() {
    // A port that was free a moment ago: nobody listens there yet.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address: libp2p::Multiaddr = format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap();
    let config = NetConfig { bootstrap: vec![address.clone()], ..tcp() };
    let node = Node::start(config, identity(1)).await;
    let state = || async { node.net.status().await.unwrap().bootstrap.remove(0) };
    until(|| async { state().await.attempts >= 3 }).await;
    let failed = state().await;
    assert_eq!(failed.address, address.to_string());
    assert!(failed.last_error.unwrap().contains("refused"));
    let late = Node::start(NetConfig { listen: vec![address], ..tcp() }, identity(2)).await;
    until(|| async { state().await.connected }).await;
    assert_eq!(state().await.last_error, None);
    // And again when it goes away.
    late.stop().await;
    until(|| async { !state().await.connected && state().await.last_error.is_some() }).await;
}

#[tokio::test]
async fn a_bootstrap_of_another_version_or_mesh_says_so() {
    let new = Node::start(NetConfig { versions: 2..=2, ..memory() }, identity(1)).await;
    let config = NetConfig { bootstrap: vec![new.address.clone()], ..memory() };
    let node = Node::start(config, identity(2)).await;
    until(|| async {
        let status = node.net.status().await.unwrap().bootstrap.remove(0);
        status.last_error.is_some_and(|error| error.contains("no common protocol version"))
    })
    .await;
}

#[tokio::test]
async fn unknown_unreachable_and_healthy_are_told_apart() {
    let ghost = kit::node_key(50).node_id();
    let address = format!("/memory/999999/p2p/{}", sundara_node::net::peer_id(ghost)).parse().unwrap();
    let node = Node::start(memory(), sundara_node::net::NetIdentity { known: vec![address], ..identity(1) }).await;
    assert_eq!(node.peer(ghost).await.unwrap().state, PeerState::Unknown);
    let error = node.net.request_one(ghost, watch(1)).await.unwrap_err();
    assert!(matches!(error, RpcError::Unreachable { .. }), "{error}");
    assert!(matches!(node.peer(ghost).await.unwrap().state, PeerState::Unreachable { .. }));
    let peer = Node::memory(2).await;
    peer.join(&node).await;
    assert_eq!(node.peer(peer.id()).await.unwrap().state, PeerState::Healthy);
}

#[tokio::test]
async fn ten_thousand_idle_connections_are_refused_at_the_limit_without_harm() {
    const ATTEMPTS: usize = 10_000;
    const AT_ONCE: usize = 200;
    let limits = NetLimits { pending_inbound: 16, inbound: 32, ..NetLimits::default() };
    let node = Node::start(NetConfig { limits, ..tcp() }, identity(1)).await;
    let honest = Node::start(tcp(), identity(2)).await;
    let serving = serve_done(&node);
    honest.join(&node).await;
    let port = node
        .address
        .iter()
        .find_map(|part| match part {
            libp2p::multiaddr::Protocol::Tcp(port) => Some(port),
            _ => None,
        })
        .unwrap();
    let mut open = std::collections::VecDeque::new();
    for attempt in 0..ATTEMPTS {
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        open.push_back(stream);
        if open.len() > AT_ONCE {
            open.pop_front();
        }
        if attempt % 1000 == 0 {
            assert_eq!(honest.net.request_one(node.id(), watch(1)).await.unwrap(), done());
        }
    }
    until(|| async { node.net.metrics().connections_refused.get() as usize > ATTEMPTS / 2 }).await;
    assert_eq!(node.net.metrics().connections.get(), 1, "none of them counts as a connection");
    assert_eq!(honest.net.request_one(node.id(), watch(1)).await.unwrap(), done());
    drop(open);
    // A newcomer gets in once they are gone.
    let late = Node::start(NetConfig { bootstrap: vec![node.address.clone()], ..tcp() }, identity(3)).await;
    until(|| async { late.net.status().await.unwrap().connected > 0 }).await;
    serving.abort();
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_to_connected_peers() {
    let (node, peer) = (Node::memory(1).await, Node::memory(2).await);
    peer.join(&node).await;
    let renewed = Certificate { serial: 2, roles: sundara_proto::cert::Roles::MINER, ..certificate(2) };
    let signed = sundara_proto::crypto::Signed::sign(&network(), &hotkey(2), renewed);
    peer.net.set_certificate(signed).await.unwrap();
    until(|| async { node.peer(peer.id()).await.unwrap().roles == Some(sundara_proto::cert::Roles::MINER) }).await;
    let foreign = sundara_proto::crypto::Signed::sign(&network(), &hotkey(3), certificate(3));
    assert!(peer.net.set_certificate(foreign).await.is_err());
    assert_eq!(node.peer(peer.id()).await.unwrap().state, PeerState::Healthy);
}
