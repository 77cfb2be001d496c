//! Peers that break the rules, on every protocol. After each the node must still answer an honest one.

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::{AsyncWriteExt as _, future};
use libp2p::swarm::Stream;
use libp2p_stream::OpenStreamError;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use prost::Message as _;
use sundara_node::net::{RequestKind, Topic};
use sundara_proto::batch::Batch;
use sundara_proto::crypto::Signed;
use sundara_proto::id::Digest;
use sundara_proto::{names, pb, wire};

use crate::kit::{Node, hotkey, network, now, until};
use crate::raw::{Raw, ended, hello, publish, read_frame};
use crate::talking::{done, serve_done, watch};

/// An honest peer gets its answer.
async fn answers(node: &Node, honest: &Node) {
    assert_eq!(honest.net.request_one(node.id(), watch(1)).await.unwrap(), done());
}

#[tokio::test]
async fn without_a_certificate_there_is_nothing_but_cert() {
    let node = Node::memory(1).await;
    let mut raw = Raw::connect(2, &node.address).await;
    let network = network();
    for protocol in [
        names::rpc_protocol(&network, 1),
        names::blob_protocol(&network, 1),
        names::kad_protocol(&network),
        "/meshsub/1.2.0".to_owned(),
    ] {
        let refused = raw.open(&protocol, &node.address).await.unwrap_err();
        assert!(matches!(refused, OpenStreamError::UnsupportedProtocol(_)), "{protocol}: {refused}");
    }
    assert_eq!(raw.handshake(&hello(2), &node.address).await.unwrap().refusal, "");
    for protocol in [names::rpc_protocol(&network, 1), names::kad_protocol(&network)] {
        raw.open(&protocol, &node.address).await.unwrap();
    }
}

#[tokio::test]
async fn a_certificate_replayed_from_another_peer_is_refused() {
    let node = Node::memory(1).await;
    let mut raw = Raw::connect(2, &node.address).await;
    let answer = raw.handshake(&hello(3), &node.address).await.unwrap();
    assert!(answer.refusal.contains("another node"), "{}", answer.refusal);
    assert!(answer.certificate.is_none());
    raw.cut().await;
    assert!(node.net.peers().await.iter().all(|peer| peer.hotkey.is_none()));
}

#[tokio::test]
async fn malformed_frames_on_rpc_end_the_stream_and_nothing_else() {
    let (node, honest) = (Node::memory(1).await, Node::memory(2).await);
    honest.join(&node).await;
    let serving = serve_done(&node);
    let mut raw = Raw::certified(3, &node.address).await;
    let request = |id, kind| pb::Frame {
        id,
        last: false,
        body: Some(pb::frame::Body::Request(pb::Request { kind: Some(kind) })),
    };
    let response =
        pb::Frame { id: 1, last: true, body: Some(pb::frame::Body::Response(pb::Response { kind: Some(done()) })) };
    let framed = |frame: &pb::Frame| wire::encode_frame(frame, 1 << 20).unwrap();
    let prefixed = |len: u32, body: &[u8]| {
        let mut frame = BytesMut::new();
        frame.put_u32_le(len);
        frame.extend_from_slice(body);
        frame.freeze()
    };
    let cases: Vec<Bytes> = vec![
        prefixed(u32::MAX, b""),
        prefixed((1 << 20) + 1, b""),
        prefixed(300 << 10, b""),
        prefixed(4, &[0xff; 4]),
        framed(&response),
        framed(&pb::Frame { id: 1, last: false, body: None }),
        prefixed(100, b"half"),
    ];
    for case in cases {
        let mut stream = raw.rpc(&node.address).await;
        stream.write_all(&case).await.unwrap();
        stream.close().await.unwrap();
        ended(&mut stream).await;
        answers(&node, &honest).await;
    }
    // Twice the same id while the first is open.
    let mut held = node.net.serve(&[RequestKind::Cancel]);
    let mut stream = raw.rpc(&node.address).await;
    let cancel = pb::request::Kind::Cancel(pb::CancelJob { job: Bytes::new() });
    stream.write_all(&framed(&request(7, cancel.clone()))).await.unwrap();
    stream.write_all(&framed(&request(7, cancel))).await.unwrap();
    stream.flush().await.unwrap();
    ended(&mut stream).await;
    let (_, _, reply) = held.recv().await.unwrap().into_parts();
    reply.closed().await;
    // What a newer version may ask for is refused, not punished.
    let mut stream = raw.rpc(&node.address).await;
    let unknown = pb::Frame { id: 9, last: false, body: Some(pb::frame::Body::Request(pb::Request { kind: None })) };
    stream.write_all(&framed(&unknown)).await.unwrap();
    stream.flush().await.unwrap();
    let answer = pb::Frame::decode(read_frame(&mut stream).await.unwrap()).unwrap();
    assert!(matches!(answer.body, Some(pb::frame::Body::Failure(f)) if f.code() == pb::rpc_failure::Code::NotServed));
    serving.abort();
}

/// Random bytes, and honest frames with some bytes changed.
fn hostile_bytes(honest: Bytes) -> impl Strategy<Value = Vec<u8>> {
    let random = proptest::collection::vec(any::<u8>(), 1..400);
    let flips = proptest::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..6);
    let mutated = flips.prop_map(move |flips| {
        let mut bytes = honest.to_vec();
        for (index, flip) in flips {
            let at = index.index(bytes.len());
            bytes[at] ^= flip;
        }
        bytes
    });
    prop_oneof![random, mutated]
}

#[tokio::test]
async fn random_and_mutated_bytes_on_every_stream_leave_the_node_as_it_was() {
    let (node, honest) = (Node::memory(1).await, Node::memory(2).await);
    honest.join(&node).await;
    let serving = serve_done(&node);
    let mut blobs = node.net.accept_blobs();
    // A service that reads what it gets, as the transfer does.
    let reading = tokio::spawn(async move {
        while let Some((_, mut stream)) = blobs.recv().await {
            tokio::spawn(async move {
                let mut rest = Vec::new();
                tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest).await.ok();
            });
        }
    });
    let mut raw = Raw::certified(3, &node.address).await;
    let network = network();
    let frame =
        pb::Frame { id: 1, last: false, body: Some(pb::frame::Body::Request(pb::Request { kind: Some(watch(1)) })) };
    let honest_frame = wire::encode_frame(&frame, 1 << 20).unwrap();
    let honest_hello = wire::encode_frame(&hello(3), 4 << 10).unwrap();
    let mut runner = TestRunner::deterministic();
    for (protocol, frame) in [
        (names::rpc_protocol(&network, 1), honest_frame.clone()),
        (names::blob_protocol(&network, 1), honest_frame.clone()),
        (names::kad_protocol(&network), honest_frame.clone()),
        ("/meshsub/1.2.0".to_owned(), honest_frame),
        (names::cert_protocol(&network), honest_hello),
    ] {
        let strategy = hostile_bytes(frame);
        for round in 0..60 {
            let bytes = strategy.new_tree(&mut runner).unwrap().current();
            // A broken handshake may have cost the connection: that is the node's right.
            let mut stream = match raw.open(&protocol, &node.address).await {
                Ok(stream) => stream,
                Err(_) => {
                    raw = Raw::certified(3, &node.address).await;
                    raw.open(&protocol, &node.address).await.unwrap()
                }
            };
            if stream.write_all(&bytes).await.is_ok() {
                stream.close().await.ok();
            }
            if round % 20 == 0 {
                answers(&node, &honest).await;
            }
        }
        answers(&node, &honest).await;
    }
    assert!(!reading.is_finished() && !serving.is_finished());
    reading.abort();
    serving.abort();
}

fn batch(sequence: u64) -> Signed<Batch> {
    let batch = Batch {
        network: network(),
        epoch: 1,
        sequence,
        root: Digest([1; 32]),
        count: 1,
        previous: Digest([0; 32]),
        issued_at: now(),
    };
    Signed::sign(&network(), &hotkey(3), batch)
}

fn gossip(signed: pb::Signed) -> Vec<u8> {
    pb::Gossip { kind: Some(pb::gossip::Kind::Batch(signed)) }.encode_to_vec()
}

/// A certified raw peer that talks gossip to a node.
struct Gossiper {
    _raw: Raw,
    stream: Stream,
}

impl Gossiper {
    async fn new(node: &Node, number: u32) -> Self {
        let mut raw = Raw::certified(number, &node.address).await;
        let stream = raw.gossip(&node.address).await;
        Self { _raw: raw, stream }
    }

    async fn publish(&mut self, data: Vec<u8>) {
        publish(&mut self.stream, Topic::Batches.name(&network()), data).await;
    }
}

#[tokio::test]
async fn one_invalid_batch_graylists_its_sender() {
    let node = Node::memory(1).await;
    let mut batches = node.net.subscribe(Topic::Batches).await;
    let mut raw = Gossiper::new(&node, 3).await;
    raw.publish(gossip(batch(0).to_wire())).await;
    assert!(batches.recv().await.is_some(), "an honest one comes through");
    let id = crate::kit::node_key(3).node_id();
    assert!(node.peer(id).await.unwrap().gossip_score.unwrap() > -10.0);

    let mut forged = batch(1).to_wire();
    forged.signature = Bytes::from(vec![9; 64]);
    raw.publish(gossip(forged)).await;
    until(|| async { node.peer(id).await.unwrap().gossip_score.unwrap() < -80.0 }).await;
    assert_eq!(node.net.metrics().gossip_rejected.get(), 1);
    // From now on even what is valid is not listened to.
    raw.publish(gossip(batch(2).to_wire())).await;
    let mut honest = Gossiper::new(&node, 4).await;
    honest.publish(gossip(batch(3).to_wire())).await;
    let next = batches.recv().await.unwrap();
    assert!(matches!(next.payload, sundara_node::net::GossipPayload::Batch(b) if b.sequence == 3));
}

#[tokio::test]
async fn malformed_gossip_is_rejected_and_oversized_gossip_never_arrives() {
    let node = Node::memory(1).await;
    let _batches = node.net.subscribe(Topic::Batches).await;
    let mut wrong_network = batch(0).value().clone();
    wrong_network.network.netuid += 1;
    let cases = [
        b"no protobuf at all".to_vec(),
        Vec::new(),
        pb::Gossip { kind: Some(pb::gossip::Kind::Advert(batch(0).to_wire())) }.encode_to_vec(),
        gossip(Signed::sign(&network(), &hotkey(3), wrong_network).to_wire()),
    ];
    for (number, case) in (10..).zip(cases) {
        let mut raw = Gossiper::new(&node, number).await;
        let before = node.net.metrics().gossip_rejected.get();
        raw.publish(case).await;
        until(|| future::ready(node.net.metrics().gossip_rejected.get() == before + 1)).await;
        let status = node.peer(crate::kit::node_key(number).node_id()).await.unwrap();
        assert!(status.gossip_score.unwrap() < -80.0, "{:?}", status.gossip_score);
    }
    let mut raw = Gossiper::new(&node, 20).await;
    raw.publish(vec![0; 100 << 10]).await;
    // The node's codec has ended that stream; another peer still comes through.
    let mut other = Gossiper::new(&node, 21).await;
    other.publish(gossip(batch(9).to_wire())).await;
    until(|| future::ready(node.net.metrics().gossip_delivered.get() == 1)).await;
    assert_eq!(node.net.metrics().gossip_rejected.get(), 4);
}
