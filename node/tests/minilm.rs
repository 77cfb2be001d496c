//! A real model through the mesh: all-MiniLM-L6-v2, published, fetched, and run by two miners from warm images.
//!
//! Needs the model's files in SUNDARA_MINILM_DIR (README.md, "Full tests").

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use sundara_examples::{guests, sentence_model};
use sundara_node::JobOrder;
use sundara_node::testnet::Testnet;
use sundara_proto::attestation::Outcome;
use sundara_proto::verdict::VerdictKind;

/// Four nodes make the warm image at once, in a debug build on a busy machine; a test that reaches it hangs.
const PATIENCE: Duration = Duration::from_secs(900);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("the test made no progress")
}

/// The sentence and its vector as sentence-transformers made it.
fn reference() -> (String, Vec<f64>) {
    let document = std::fs::read(guests().join("embed/vectors.json")).unwrap();
    let document: serde_json::Value = serde_json::from_slice(&document).unwrap();
    let entry = &document["vectors"][0];
    (entry["sentence"].as_str().unwrap().to_owned(), serde_json::from_value(entry["vector"].clone()).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_miners_embed_a_sentence_alike() {
    let Some(files) = std::env::var_os("SUNDARA_MINILM_DIR").map(PathBuf::from) else {
        println!("skipped: SUNDARA_MINILM_DIR is not set (README.md, \"Full tests\")");
        return;
    };
    let directory = sentence_model(&files, Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap_or_else(|e| panic!("{e}"));
    let testnet = within(Testnet::builder().miners(2).start()).await.unwrap();
    let client = testnet.client();
    let published = within(client.models().publish(directory)).await.unwrap();
    let model = format!("{}/{}", published.publisher, published.name);
    let (sentence, expected) = reference();
    for _ in 0..2 {
        let order = JobOrder::model(&model).input(sentence.clone()).replicas(2);
        let result = within(client.jobs().submit(order).await.unwrap().result()).await.unwrap();
        assert_eq!(result.outcome(), Some(Outcome::Completed));
        assert!(matches!(result.kind(), VerdictKind::Quorum(2) | VerdictKind::Audited), "{:?}", result.kind());
        assert_eq!(result.verify().unwrap().attestations.len(), 2);
        let vector: Vec<f64> = serde_json::from_slice(result.output.as_ref().unwrap()).unwrap();
        assert_eq!(vector.len(), expected.len());
        // Both are of length one.
        let cosine: f64 = vector.iter().zip(&expected).map(|(x, y)| x * y).sum();
        assert!(cosine >= 0.9999, "cosine {cosine}");
        println!("{:?} after {:?}", result.kind(), result.latency);
    }
    within(testnet.shutdown()).await;
}
