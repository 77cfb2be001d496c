//! Offers that are taken.

use bytes::Bytes;
use sundara_proto::batch::{Receipt, Stage};
use sundara_proto::cert::Roles;
use sundara_proto::id::BlobId;
use sundara_proto::pb;
use sundara_proto::pb::work_event::Kind as Work;
use sundara_proto::units::ByteCount;
use sundara_proto::wire::{WireMessage as _, limit};

use super::super::OfferState;
use super::{bytes, next, reveal_as, revealed, scene};
use crate::blobs::{Access, Reader, Sources};
use crate::net::{FailureCode, RpcError};
use crate::services::work::harness::{TestNode, offer, spec};
use crate::services::work::{ExecutorEvent, ExecutorFault, ExecutorHandle};
use sundara_proto::id::NodeId;

#[tokio::test]
async fn a_single_replica_is_shown_at_once_with_receipts_and_a_log() {
    let mut scene = scene(10, None, |_| {}).await;
    let spec = spec("echo", b"hello", 1, |_| {});
    let mut answers = scene.accepted(&spec, b"hello", false).await;
    let revealed = revealed(&mut answers).await;
    assert!(answers.next().await.is_none());
    let attestation = scene.verified(&revealed).attestation;
    assert_eq!((attestation.job, attestation.output), (spec.id(), BlobId::of(b"hello")));
    assert_eq!(bytes(&revealed).map(|b| &b[..]), Some(&b"hello"[..]));
    scene.idle().await;
    let log = scene.miner.log(10).unwrap();
    assert_eq!(log.len(), 1);
    assert_eq!(
        (log[0].state, log[0].job, log[0].validator),
        (OfferState::Served, spec.id(), scene.validator.key.hotkey())
    );
    let mut stages = Vec::new();
    while let Ok(staged) = scene.receipts.rx.try_recv() {
        let Some(pb::entry::Kind::Receipt(receipt)) = staged.entry.kind else { panic!("not a receipt") };
        let receipt = Receipt::from_raw(receipt).unwrap();
        assert_eq!((receipt.job, receipt.miner), (spec.id(), scene.node.key.hotkey()));
        stages.push(receipt.stage);
    }
    assert_eq!(stages, [Stage::Accepted, Stage::Started, Stage::Finished]);
}

#[tokio::test]
async fn a_commitment_binds_and_only_its_validator_sees_the_result() {
    let scene = scene(12, None, |_| {}).await;
    let stranger = TestNode::start(14, Roles::VALIDATOR).await;
    stranger.join(&scene.node).await;
    let spec = spec("echo", b"secret", 1, |_| {});
    let commitment = scene.committed(&spec, b"secret").await;
    let refused = reveal_as(&stranger, &scene.node, &spec).await;
    assert!(matches!(refused, Err(RpcError::Refused { code: FailureCode::NotServed, .. })), "{refused:?}");
    let revealed = scene.reveal(&spec).await.unwrap();
    assert_eq!(scene.recomputed(&revealed), commitment);
    assert!(matches!(scene.reveal(&spec).await, Err(RpcError::Refused { .. })), "shown once");
    scene.idle().await;
}

#[tokio::test]
async fn a_reveal_before_the_commitment_shows_nothing() {
    let scene = scene(15, None, |_| {}).await;
    let spec = spec("sleep", b"", 1, |_| {});
    let _answers = scene.accepted(&spec, b"", true).await;
    let early = scene.reveal(&spec).await;
    assert!(matches!(early, Err(RpcError::Refused { code: FailureCode::Busy, .. })), "{early:?}");
}

#[tokio::test]
async fn an_abandoned_job_stops_and_a_later_attempt_replaces_an_earlier_one() {
    let scene = scene(17, None, |_| {}).await;
    let sleep = spec("sleep", b"", 1, |_| {});
    let mut answers = scene.accepted(&sleep, b"", true).await;
    scene.abandon(&sleep).await;
    assert!(answers.next().await.unwrap().is_err(), "the offer ends without a result");
    scene.idle().await;
    assert_eq!(scene.miner.log(1).unwrap()[0].state, OfferState::Abandoned);

    let echo = spec("echo", b"x", 2, |_| {});
    scene.committed(&echo, b"x").await;
    let mut second = offer(&echo, b"x", &scene.validator, true);
    second.attempt = 1;
    let mut answers = scene.send(second).await;
    assert!(matches!(next(&mut answers).await, Work::Accepted(_)));
    assert!(matches!(next(&mut answers).await, Work::Committed(_)));
    assert!(scene.reveal(&echo).await.is_err(), "attempt 0 is not held any more");
}

#[tokio::test]
async fn a_job_whose_validator_is_gone_stops() {
    let scene = scene(19, None, |_| {}).await;
    let sleep = spec("sleep", b"", 1, |_| {});
    drop(scene.accepted(&sleep, b"", true).await);
    scene.idle().await;
    let log = scene.miner.log(1).unwrap();
    assert_eq!(log[0].state, OfferState::Abandoned);
    assert!(log[0].detail.contains("gone"), "{}", log[0].detail);
}

#[tokio::test]
async fn output_streams_while_the_job_runs() {
    let scene = scene(21, None, |_| {}).await;
    let flood = spec("flood", b"", 1, |s| s.limits.output = ByteCount::mib(3));
    let mut offer = offer(&flood, b"", &scene.validator, false);
    offer.stream = true;
    let mut answers = scene.send(offer).await;
    assert!(matches!(next(&mut answers).await, Work::Accepted(_)));
    let mut seen = 0;
    loop {
        match next(&mut answers).await {
            Work::Output(output) => {
                assert_eq!(output.offset, seen);
                seen += output.data.len() as u64;
            }
            Work::Revealed(r) => {
                assert_eq!(scene.verified(&r).attestation.output_len.0, seen);
                assert_eq!(seen, 3 << 20);
                return;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_large_output_is_fetched_by_its_validator_and_by_nobody_else() {
    let scene = scene(23, None, |_| {}).await;
    let stranger = TestNode::start(25, Roles::VALIDATOR).await;
    stranger.join(&scene.node).await;
    let input = Bytes::from(vec![9; 2 * limit::INLINE]);
    scene.validator.put_input(&input, Reader::Hotkey(scene.node.key.hotkey())).await;
    let spec = spec("echo", &input, 1, |_| {});
    let mut answers = scene.accepted(&spec, &input, false).await;
    let revealed = revealed(&mut answers).await;
    assert!(bytes(&revealed).is_none());
    let (output, len) = (BlobId::of(&input), ByteCount(input.len() as u64));
    let from = || Sources::peers([scene.node.id()]);
    assert!(stranger.transfer.fetch(output, len, from(), Access::local()).await.is_err());
    scene.validator.transfer.fetch(output, len, from(), Access::local()).await.unwrap();
}

/// An executor that only ever faults.
fn broken(scene: &super::Scene) -> ExecutorHandle {
    let (handle, mut commands) = ExecutorHandle::channel(8, Vec::new(), "cpu");
    scene.node.tasks.spawn("broken", async move {
        while let Some(command) = commands.recv().await {
            let fault = ExecutorFault::passing("disk on fire");
            let _ = command.side.send(ExecutorEvent::Fault(fault)).await;
        }
    });
    handle
}

#[tokio::test]
async fn a_fault_sends_the_job_to_another_executor_and_only_the_last_to_the_validator() {
    let scene = super::bare_scene(26, None, |_| {}).await;
    scene.pool.add_in_process(NodeId([1; 32]), broken(&scene));
    let spec_of = |nonce| spec("echo", b"x", nonce, |_| {});
    let mut answers = scene.accepted(&spec_of(1), b"x", true).await;
    let Work::Fault(fault) = next(&mut answers).await else { panic!("no fault") };
    assert!(fault.retryable && fault.reason.contains("disk on fire"), "{}", fault.reason);
    scene.idle().await;
    assert_eq!(scene.miner.log(1).unwrap()[0].state, OfferState::Faulted);

    // The broken one rests; a good one beside it is tried first, and after it broke, the order moves on to it.
    scene.pool.add_in_process(scene.node.id(), scene.node.executor(&scene.node.key, None));
    for nonce in 2..12 {
        let spec = spec_of(nonce);
        scene.committed(&spec, b"x").await;
        scene.verified(&scene.reveal(&spec).await.unwrap());
    }
}

#[tokio::test]
async fn draining_lets_what_runs_end_and_takes_nothing_new() {
    let scene = scene(28, None, |_| {}).await;
    let echo = spec("echo", b"x", 1, |_| {});
    scene.committed(&echo, b"x").await;
    let mut drained = Box::pin(scene.miner.drain());
    assert!(futures::poll!(drained.as_mut()).is_pending(), "a held result is not over");
    let declined = scene.declined(offer(&spec("echo", b"y", 2, |_| {}), b"y", &scene.validator, true)).await;
    assert_eq!(declined.reason(), pb::declined::Reason::ShuttingDown);
    scene.reveal(&echo).await.unwrap();
    drained.await;
}
