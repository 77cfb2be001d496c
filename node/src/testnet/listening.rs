//! What a validator knows of an epoch that it only listened to: nothing until the pages are open, then everything.

use std::time::Duration;

use sundara_proto::names::Topic;
use sundara_proto::pb;
use sundara_proto::units::EpochLength;

use super::Testnet;
use crate::api::{Draws, JobOrder, Node};
use crate::net::{FailureCode, GossipPayload, RpcError};
use crate::service::wall_now;
use crate::services::pages::OPEN_AFTER_EPOCHS;

/// Long enough for a debug build on a busy machine; a test that reaches it hangs.
const PATIENCE: Duration = Duration::from_secs(180);

#[tokio::test(flavor = "multi_thread")]
async fn a_validator_that_only_listens_scores_an_epoch_once_its_pages_open_and_not_before() {
    tokio::time::timeout(PATIENCE, listen()).await.expect("the test made no progress");
}

async fn listen() {
    let length = EpochLength::from_ms(4_000).unwrap();
    let testnet = Testnet::builder().validators(2).miners(2).configure(move |config| config.network.epoch_ms = length);
    let testnet = testnet.start().await.unwrap();
    let [ruler, listener] = [0, 1].map(|i| testnet.validators()[i].node().unwrap().clone());
    // It believes one of the validators, so the other gets no job.
    let client = Node::builder().network(testnet.network()).bootstrap(testnet.bootstrap()).trust([ruler.hotkey()]);
    let client = client.loopback().start().await.unwrap();
    client.wait_for_validators(1).await;
    // From here on the listener hears the commitment of every epoch before it begins.
    let first = length.epoch(wall_now()) + 2;
    let mut heard = listener.parts.net.subscribe(Topic::Batches).await;
    let epoch = loop {
        for _ in 0..2 {
            let order = JobOrder::builtin("echo").input("hello").replicas(2);
            client.jobs().submit(order).await.unwrap().result().await.unwrap();
        }
        let message = heard.recv().await.unwrap();
        let GossipPayload::Batch(batch) = message.payload else { panic!("not a batch") };
        if batch.author() != ruler.hotkey() || batch.epoch < first {
            continue;
        }
        let request = pb::request::Kind::Page(pb::PageRequest { root: batch.root.into() });
        let answer = listener.parts.net.request_one(ruler.node_id(), request).await;
        let known = listener.scores(Some(batch.epoch)).await.unwrap().unwrap();
        if length.epoch(wall_now()) >= batch.epoch + OPEN_AFTER_EPOCHS {
            // This machine was so slow that the page may have been open when it was asked for.
            continue;
        }
        assert!(
            matches!(answer, Err(RpcError::Refused { code: FailureCode::Forbidden, .. })),
            "a page was shown before its time: {answer:?}"
        );
        assert!(!known.settled && known.miners.is_empty() && known.jobs == 0, "{known:?}");
        break batch.epoch;
    };
    ruler.wait_for_settled(epoch).await;
    listener.wait_for_settled(epoch).await;
    let author = ruler.scores(Some(epoch)).await.unwrap().unwrap();
    let copy = listener.scores(Some(epoch)).await.unwrap().unwrap();
    assert!(author.settled && author.complete && copy.settled && copy.complete, "{author:?} {copy:?}");
    assert!(author.jobs >= 1 && author.miners.iter().any(|miner| miner.score > 0), "{author:?}");
    assert_eq!((author.jobs, &author.miners), (copy.jobs, &copy.miners), "the same evidence, the same scores");
    let shown = &copy.validators[0];
    assert_eq!((shown.hotkey, shown.verdicts, shown.missing, shown.bad), (ruler.hotkey(), author.jobs, 0, 0));
    assert_eq!((shown.draws, shown.neglected), (Draws::Checked, 0), "{shown:?}");
    client.shutdown().await;
    testnet.shutdown().await;
}
