//! The DHT: what is found, and what is never stored.

use libp2p::kad::{Quorum, Record, RecordKey};
use prost::Message as _;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{BlobId, Digest, ModelId};
use sundara_proto::model::ModelRecord;
use sundara_proto::names;
use sundara_proto::units::UnixMillis;

use crate::kit::{HOUR, Node, hotkey, network, now, until};
use crate::raw::Raw;

fn record(version: u64) -> ModelRecord {
    let now = now();
    ModelRecord {
        network: network(),
        name: "digits".to_owned(),
        version,
        model: ModelId([version as u8; 32]),
        manifest: BlobId([version as u8; 32]),
        issued_at: now,
        expires_at: now.plus(HOUR),
    }
}

fn signed(signer: u32, record: ModelRecord) -> Vec<u8> {
    Signed::sign(&network(), &hotkey(signer), record).to_wire().encode_to_vec()
}

fn key(publisher: u32) -> Digest {
    names::model_record_key(&network(), &hotkey(publisher).hotkey(), "digits")
}

/// Nodes that know each other as servers of the DHT.
async fn mesh(count: u32) -> Vec<Node> {
    let mut nodes = vec![Node::memory(1).await];
    for number in 2..=count {
        let node = Node::memory(number).await;
        node.join(&nodes[0]).await;
        nodes.push(node);
    }
    nodes
}

#[tokio::test]
async fn a_record_is_found_by_others_and_a_higher_version_wins() {
    let nodes = mesh(4).await;
    for version in [1, 2] {
        let value = signed(1, record(version));
        until(|| async { nodes[1].net.put_record(key(1), value.clone()).await.is_ok() }).await;
        until(|| async {
            let found = nodes[3].net.get_records(key(1)).await.unwrap_or_default();
            found.first() == Some(&value)
        })
        .await;
    }
    assert!(nodes[2].net.get_records(key(2)).await.unwrap_or_default().is_empty());
}

#[tokio::test]
async fn providers_are_found_and_taken_back() {
    let nodes = mesh(4).await;
    let blob = names::blob_provider_key(&network(), &BlobId([1; 32]));
    until(|| async {
        nodes[1].net.provide(blob).await.is_ok()
            && nodes[3].net.find_providers(blob).await.unwrap_or_default() == [nodes[1].id()]
    })
    .await;
    nodes[1].net.stop_providing(blob).await.unwrap();
}

#[tokio::test]
async fn what_does_not_hold_is_refused_before_it_leaves() {
    let node = Node::memory(1).await;
    let expired = ModelRecord { issued_at: UnixMillis(1), expires_at: UnixMillis(2), ..record(1) };
    for (value, words) in [
        (b"nonsense".to_vec(), "form"),
        (signed(2, record(1)), "key"),
        (signed(1, expired), "expired"),
        (vec![0; 10_000], "signed message"),
    ] {
        let error = node.net.put_record(key(1), value).await.unwrap_err().to_string();
        assert!(error.contains(words) || error.contains("signed message"), "{error}");
    }
}

#[tokio::test]
async fn a_peer_cannot_store_foreign_older_or_expired_records() {
    let node = Node::memory(1).await;
    let raw = Raw::certified(3, &node.address).await;
    let server = sundara_node::net::peer_id(node.id());
    let put = |value: Vec<u8>, at: Digest| {
        let raw = &raw;
        async move {
            let record = Record::new(RecordKey::new(&at.as_bytes()), value);
            raw.kad(move |kad| kad.put_record_to(record, std::iter::once(server), Quorum::One)).await;
        }
    };
    let metrics = node.net.metrics();
    let good = signed(5, record(2));
    put(good.clone(), key(5)).await;
    until(|| async { metrics.dht_records_stored.get() == 1 }).await;

    let hour_ago = UnixMillis(now().0 - 3_600_000);
    let expired = ModelRecord { issued_at: hour_ago, expires_at: UnixMillis(now().0 - 1), ..record(3) };
    let ahead = ModelRecord { issued_at: now().plus(HOUR), expires_at: now().plus(HOUR * 2), ..record(3) };
    let mut forged = Signed::sign(&network(), &hotkey(5), record(9)).to_wire();
    forged.signature = bytes::Bytes::from(vec![1; 64]);
    let equivocation = ModelRecord { model: ModelId([77; 32]), expires_at: now().plus(HOUR * 3), ..record(2) };
    let cases = [
        signed(3, record(9)),
        signed(5, record(1)),
        signed(5, expired),
        signed(5, ahead),
        signed(5, equivocation),
        forged.encode_to_vec(),
        vec![0; 3000],
    ];
    for (count, case) in (1..).zip(cases) {
        put(case, key(5)).await;
        until(|| async { metrics.dht_records_refused.get() == count }).await;
    }
    assert_eq!(metrics.dht_records_stored.get(), 1);
    assert_eq!(node.net.get_records(key(5)).await.unwrap(), [good]);
    // A higher version of the same publisher does win.
    let newer = signed(5, record(3));
    put(newer.clone(), key(5)).await;
    until(|| async { node.net.get_records(key(5)).await.unwrap() == [newer.clone()] }).await;
}
