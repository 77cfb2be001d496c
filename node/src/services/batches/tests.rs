//! Pages: who is shown what, and what is kept.

use bytes::Bytes;
use sundara_proto::cert::Roles;
use sundara_proto::id::JobId;
use sundara_proto::units::UnixMillis;

use super::*;
use crate::services::work::harness::{TestNode, network};

fn receipt(miner: Hotkey, n: u64) -> pb::Entry {
    pb::Entry {
        kind: Some(pb::entry::Kind::Receipt(pb::Receipt {
            job: JobId([1; 32]).into(),
            attempt: 0,
            stage: pb::receipt::Stage::Accepted.into(),
            validator: Hotkey([8; 32]).into(),
            miner: miner.into(),
            at_ms: n,
        })),
    }
}

fn staged(n: u64, entry: pb::Entry) -> Staged {
    Staged { key: n.to_be_bytes(), entry }
}

async fn writer(node: &TestNode, config: BatchesConfig) -> Writer {
    Writer {
        config,
        network: network(),
        length: EpochLength::default(),
        key: node.key.clone(),
        net: node.net.clone(),
        store: node.store.clone(),
        tip: Tip::default(),
        open: Vec::new(),
    }
}

fn batches(store: &SharedStore) -> Vec<Batch> {
    let found = store.scan(Keyspace::Batches, &KeyRange::all(), 1_000).unwrap();
    found.items.iter().map(|(_, value)| pages::batch_from(value).unwrap()).collect()
}

#[tokio::test]
async fn a_party_sees_its_own_entries_before_the_epoch_opens_and_everyone_all_of_them_after() {
    let node = TestNode::start(120, Roles::VALIDATOR).await;
    let mut writer = writer(&node, BatchesConfig::default()).await;
    let (one, other, stranger) = (Hotkey([1; 32]), Hotkey([2; 32]), Hotkey([3; 32]));
    writer.open = vec![staged(0, receipt(one, 1)), staged(1, receipt(other, 2)), staged(2, receipt(one, 3))];
    writer.page().await;
    let root = batches(&node.store)[0].root;
    let request = pb::PageRequest { root: root.into() };
    let length = EpochLength::default();
    let seen = |asker| page_for(&node.store, length, &request, asker).map(|page| page.entries.len());
    assert_eq!((seen(one), seen(other)), (Ok(2), Ok(1)));
    assert_eq!(seen(stranger).unwrap_err().0, FailureCode::Forbidden);
    let unknown = pb::PageRequest { root: Bytes::from_static(&[9; 32]) };
    let not_there = page_for(&node.store, length, &unknown, stranger).unwrap_err();
    assert_eq!(seen(stranger).unwrap_err(), not_there, "whether a page exists is not told");
    // The same page, of an epoch long ago.
    let (_, page) = pages::get(node.store.as_ref(), root.as_ref()).unwrap().unwrap();
    let mut write = WriteBatch::new();
    pages::put(&mut write, root.0.to_vec(), length.epoch(UnixMillis(0)), &page);
    node.store.commit(write).await.unwrap();
    assert_eq!(seen(stranger), Ok(3));
}

#[tokio::test]
async fn pages_are_kept_by_number_and_the_chain_goes_on() {
    let node = TestNode::start(121, Roles::VALIDATOR).await;
    let config = BatchesConfig { keep_pages: 5, ..BatchesConfig::default() };
    let mut writer = writer(&node, config).await;
    for n in 0..20 {
        writer.open = vec![staged(n, receipt(Hotkey([1; 32]), n))];
        writer.page().await;
        node.store.flush().await.unwrap();
    }
    let left = batches(&node.store);
    assert_eq!(left.iter().map(|batch| batch.sequence).collect::<Vec<_>>(), [15, 16, 17, 18, 19]);
    let kept = node.store.scan(Keyspace::Pages, &KeyRange::all(), 100).unwrap().items.len();
    assert_eq!(kept, 5, "a page goes with its root");
    let tip: Tip = serde_json::from_slice(&node.store.get(Keyspace::Meta, TIP_KEY).unwrap().unwrap()).unwrap();
    assert_eq!(tip.next_sequence, 20);
}

#[tokio::test]
async fn pages_go_with_their_epoch() {
    let node = TestNode::start(122, Roles::VALIDATOR).await;
    let mut writer = writer(&node, BatchesConfig { keep_epochs: 3, ..BatchesConfig::default() }).await;
    writer.open = vec![staged(0, receipt(Hotkey([1; 32]), 1))];
    writer.page().await;
    let made_in = batches(&node.store)[0].epoch;
    writer.forget(made_in + 3).unwrap();
    node.store.flush().await.unwrap();
    assert_eq!(batches(&node.store).len(), 1);
    writer.forget(made_in + 4).unwrap();
    node.store.flush().await.unwrap();
    assert!(batches(&node.store).is_empty());
}
