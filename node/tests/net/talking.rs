//! What works between honest nodes.

use bytes::Bytes;
use sundara_node::net::{FailureCode, Inbound, PeerEvent, PeerState, RequestKind, RpcError, Topic};
use sundara_proto::batch::AuditEpoch;
use sundara_proto::crypto::Signed;
use sundara_proto::id::Digest;
use sundara_proto::pb::{self, request, response};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::kit::{self, Node, hotkey, network, until};

pub fn watch(number: u8) -> request::Kind {
    request::Kind::Watch(pb::WatchJob { job: Bytes::copy_from_slice(&[number; 32]) })
}

pub fn done() -> response::Kind {
    response::Kind::Done(pb::Done {})
}

fn output(offset: u64) -> response::Kind {
    let output = pb::Output { attempt: 1, offset, data: Bytes::from(vec![7; 1000]) };
    response::Kind::Job(pb::JobEvent { kind: Some(pb::job_event::Kind::Output(output)) })
}

/// Answers every request with Done.
pub fn serve_done(node: &Node) -> tokio::task::JoinHandle<()> {
    let mut requests = node.net.serve(&[RequestKind::Watch]);
    tokio::spawn(async move {
        while let Some(inbound) = requests.recv().await {
            let (_, _, reply) = inbound.into_parts();
            reply.finish(done()).await.ok();
        }
    })
}

#[tokio::test]
async fn a_request_is_answered_over_memory_and_tcp() {
    for config in [kit::memory(), kit::tcp()] {
        let a = Node::start(config.clone(), kit::identity(1)).await;
        let b = Node::start(config, kit::identity(2)).await;
        a.join(&b).await;
        let mut requests = b.net.serve(&[RequestKind::Watch]);
        let asked = tokio::spawn({
            let (net, to) = (a.net.clone(), b.id());
            async move { net.request_one(to, watch(9)).await }
        });
        let Inbound { peer, request, reply, .. } = requests.recv().await.unwrap();
        assert_eq!(peer, a.net.local());
        assert_eq!(request, watch(9));
        reply.finish(done()).await.unwrap();
        assert_eq!(asked.await.unwrap().unwrap(), done());
        a.stop().await;
        b.stop().await;
    }
}

#[tokio::test]
async fn a_request_dials_by_itself_and_to_oneself_needs_no_connection() {
    let (a, b) = (Node::memory(1).await, Node::memory(2).await);
    let serving = serve_done(&a);
    a.join(&b).await;
    // b did not dial, and its request goes over the same connection.
    assert_eq!(b.net.request_one(a.id(), watch(1)).await.unwrap(), done());
    assert_eq!(a.net.request_one(a.id(), watch(1)).await.unwrap(), done());
    let refused = a.net.request_one(b.id(), watch(1)).await.unwrap_err();
    assert!(matches!(refused, RpcError::Refused { code: FailureCode::NotServed, .. }), "{refused}");
    let unknown = a.net.request_one(kit::node_key(99).node_id(), watch(1)).await.unwrap_err();
    assert!(matches!(unknown, RpcError::Unreachable { .. }), "{unknown}");
    serving.abort();
}

#[tokio::test]
async fn a_slow_reader_slows_the_server_and_loses_nothing() {
    let (a, b) = (Node::memory(1).await, Node::memory(2).await);
    a.join(&b).await;
    let mut requests = b.net.serve(&[RequestKind::Watch]);
    for to_self in [false, true] {
        let asker = if to_self { &b } else { &a };
        let mut responses = asker.net.request(b.id(), watch(1)).await.unwrap();
        let (_, _, mut reply) = requests.recv().await.unwrap().into_parts();
        let (sent, mut progress) = tokio::sync::watch::channel(0_u64);
        let server = tokio::spawn(async move {
            for offset in 0..200 {
                reply.send(output(offset)).await.unwrap();
                sent.send_replace(offset + 1);
            }
            reply.finish(done()).await.unwrap();
        });
        // The server stops at its credit while nobody reads.
        progress.wait_for(|n| *n == 16).await.unwrap();
        tokio::task::yield_now().await;
        assert_eq!(*progress.borrow(), 16);
        for offset in 0..200 {
            assert_eq!(responses.next().await.unwrap().unwrap(), output(offset));
        }
        assert_eq!(responses.next().await.unwrap().unwrap(), done());
        assert!(responses.next().await.is_none());
        server.await.unwrap();
    }
}

#[tokio::test]
async fn whoever_loses_interest_is_noticed() {
    let (a, b) = (Node::memory(1).await, Node::memory(2).await);
    a.join(&b).await;
    let mut requests = b.net.serve(&[RequestKind::Watch]);
    // The caller drops its responses: the server hears of it.
    let responses = a.net.request(b.id(), watch(1)).await.unwrap();
    let (_, _, reply) = requests.recv().await.unwrap().into_parts();
    assert!(!reply.is_closed());
    drop(responses);
    reply.closed().await;
    // The server drops its reply: the caller hears of it.
    let mut responses = a.net.request(b.id(), watch(2)).await.unwrap();
    drop(requests.recv().await.unwrap());
    let error = responses.next().await.unwrap().unwrap_err();
    assert!(matches!(error, RpcError::Refused { code: FailureCode::Internal, .. }), "{error}");
    assert!(responses.next().await.is_none());
    // The server's node goes: the caller hears of it.
    let mut responses = a.net.request(b.id(), watch(3)).await.unwrap();
    let held = requests.recv().await.unwrap();
    b.stop().await;
    let error = responses.next().await.unwrap().unwrap_err();
    assert!(error.is_retryable(), "{error}");
    held.reply.closed().await;
}

#[tokio::test]
async fn ten_thousand_requests_share_one_stream() {
    let (a, b) = (Node::memory(1).await, Node::memory(2).await);
    a.join(&b).await;
    let serving = serve_done(&b);
    let mut all = tokio::task::JoinSet::new();
    for worker in 0..100_u8 {
        let (net, to) = (a.net.clone(), b.id());
        all.spawn(async move {
            for _ in 0..100 {
                assert_eq!(net.request_one(to, watch(worker)).await.unwrap(), done());
            }
        });
    }
    while let Some(result) = all.join_next().await {
        result.unwrap();
    }
    assert_eq!(b.net.metrics().rpc_requests_in.get(), 10_000);
    serving.abort();
}

#[tokio::test]
async fn gossip_reaches_everyone_once_verified() {
    let nodes = [Node::memory(1).await, Node::memory(2).await, Node::memory(3).await];
    nodes[0].join(&nodes[1]).await;
    nodes[1].join(&nodes[2]).await;
    let mut inboxes = Vec::new();
    for node in &nodes {
        inboxes.push(node.net.subscribe(Topic::Audits).await);
    }
    let audit = AuditEpoch { network: network(), epoch: 5, commitment: Digest([3; 32]), revealed: None };
    let signed = Signed::sign(&network(), &hotkey(1), audit.clone());
    let message = pb::Gossip { kind: Some(pb::gossip::Kind::AuditEpoch(signed.to_wire())) };
    until(|| async { nodes[0].net.publish(Topic::Audits, message.clone()).await.is_ok() }).await;
    for inbox in &mut inboxes {
        let got = inbox.recv().await.unwrap();
        assert!(matches!(got.payload, sundara_node::net::GossipPayload::AuditEpoch(got) if *got == audit));
    }
    let wrong = nodes[0].net.publish(Topic::Jobs, message).await.unwrap_err();
    assert!(wrong.to_string().contains("topic"), "{wrong}");
}

#[tokio::test]
async fn blobs_flow_both_ways_and_over_a_second_connection() {
    for config in [kit::memory(), kit::tcp()] {
        let a = Node::start(config.clone(), kit::identity(1)).await;
        let b = Node::start(config, kit::identity(2)).await;
        a.join(&b).await;
        let mut blobs = b.net.accept_blobs();
        let mut open = Vec::new();
        for number in 0..4_u8 {
            let mut ours = a.net.open_blob(b.id()).await.unwrap();
            ours.write_all(&[number; 100_000]).await.unwrap();
            ours.shutdown().await.unwrap();
            let (peer, mut theirs) = blobs.recv().await.unwrap();
            assert_eq!(peer, a.net.local());
            let mut got = Vec::new();
            theirs.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, [number; 100_000]);
            theirs.write_all(b"thanks").await.unwrap();
            theirs.shutdown().await.unwrap();
            let mut answer = String::new();
            ours.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "thanks");
            open.push((ours, theirs));
        }
        assert_eq!(a.peer(b.id()).await.unwrap().connections, 2, "bulk is spread over two");
    }
}

#[tokio::test]
async fn peers_come_and_go_with_events_and_states() {
    let (a, b) = (Node::memory(1).await, Node::memory(2).await);
    let mut events = a.net.subscribe_peers();
    a.join(&b).await;
    assert!(matches!(events.recv().await.unwrap(), PeerEvent::Connected(peer) if peer == b.net.local()));
    let status = a.peer(b.id()).await.unwrap();
    assert_eq!(status.state, PeerState::Healthy);
    assert_eq!(status.hotkey, Some(b.net.local().hotkey));
    assert!(status.agent.starts_with("sundara-node/"), "{}", status.agent);
    let gone = b.id();
    b.stop().await;
    assert!(matches!(events.recv().await.unwrap(), PeerEvent::Gone(node) if node == gone));
}
