//! Each lie shows what a validator catches it by.

use sundara_proto::id::BlobId;

use super::super::Misbehaviour;
use super::{reveal_as, scene};
use crate::services::work::harness::spec;

#[tokio::test]
async fn a_wrong_result_is_bound_by_its_commitment() {
    let scene = scene(40, Some(Misbehaviour::WrongResult), |_| {}).await;
    let spec = spec("echo", b"truth", 1, |_| {});
    let commitment = scene.committed(&spec, b"truth").await;
    let revealed = scene.reveal(&spec).await.unwrap();
    assert_eq!(scene.recomputed(&revealed), commitment, "the liar stands by its lie");
    let attestation = scene.verified(&revealed).attestation;
    assert_ne!(attestation.output, BlobId::of(b"truth"));
    assert_eq!(BlobId::of(&revealed.inline_output.unwrap()), attestation.output);
}

#[tokio::test]
async fn a_copier_gets_nothing_from_others_and_breaks_its_commitment() {
    let honest = scene(42, None, |_| {}).await;
    let copier = scene(44, Some(Misbehaviour::Copy), |_| {}).await;
    copier.node.join(&honest.node).await;
    let spec = spec("echo", b"truth", 1, |_| {});
    honest.committed(&spec, b"truth").await;
    assert!(reveal_as(&copier.node, &honest.node, &spec).await.is_err(), "an honest miner tells only its validator");
    let commitment = copier.committed(&spec, b"truth").await;
    let revealed = copier.reveal(&spec).await.unwrap();
    assert_eq!(copier.verified(&revealed).attestation.output, BlobId::of(b"truth"), "the answer is right");
    assert_ne!(copier.recomputed(&revealed), commitment, "and is not the one that was committed to");
}

#[tokio::test]
async fn who_withholds_commits_and_stays_silent() {
    let scene = scene(46, Some(Misbehaviour::Withhold), |_| {}).await;
    let (first, second) = (spec("echo", b"a", 1, |_| {}), spec("echo", b"b", 2, |_| {}));
    scene.committed(&first, b"a").await;
    let mut silent = Box::pin(scene.reveal(&first));
    assert!(futures::poll!(silent.as_mut()).is_pending());
    // A whole other job later there is still no answer.
    scene.committed(&second, b"b").await;
    assert!(futures::poll!(silent.as_mut()).is_pending());
}

#[tokio::test]
async fn who_colludes_agrees_on_the_same_wrong_answer() {
    let one = scene(48, Some(Misbehaviour::Collude), |_| {}).await;
    let two = scene(50, Some(Misbehaviour::Collude), |_| {}).await;
    let spec = spec("echo", b"truth", 1, |_| {});
    let mut digests = Vec::new();
    for scene in [&one, &two] {
        let commitment = scene.committed(&spec, b"truth").await;
        let revealed = scene.reveal(&spec).await.unwrap();
        assert_eq!(scene.recomputed(&revealed), commitment);
        digests.push(scene.verified(&revealed).attestation.result_digest().unwrap());
    }
    assert_eq!(digests[0], digests[1]);
}
