//! Executors in processes of their own, attached to a miner by invitation.

use std::time::Duration;

use bytes::Bytes;
use sundara_proto::advert::ExecutorClass;
use sundara_proto::attestation::ExecutorCert;
use sundara_proto::cert::Roles;
use sundara_proto::crypto::Signed;
use sundara_proto::id::BlobId;
use sundara_proto::pb;
use sundara_proto::units::{ByteCount, UnixMillis};
use sundara_proto::wire::{WireMessage as _, limit};
use tokio::sync::watch;

use super::{Scene, bare_scene, bytes, next, revealed};
use crate::blobs::{Access, Reader, Sources};
use crate::net::{FailureCode, RpcError};
use crate::services::executor::attached::{self, AttachState, AttachedHandle, AttachedParts};
use crate::services::executors::{self, ExecutorsHandle, ExecutorsParts};
use crate::services::work::ExecutorHandle;
use crate::services::work::harness::{TestNode, network, offer, spec};
use crate::services::work::invite::Invite;
use crate::store::{KeyRange, Keyspace};

const HOUR: Duration = Duration::from_secs(3600);

fn owner(scene: &Scene) -> ExecutorsHandle {
    executors::start(ExecutorsParts {
        network: network(),
        key: scene.node.key.clone(),
        net: scene.node.net.clone(),
        store: scene.node.store.clone(),
        pool: scene.pool.clone(),
        tasks: scene.node.tasks.child("executors"),
    })
    .unwrap()
}

async fn invite(scene: &Scene, owner: &ExecutorsHandle) -> Invite {
    owner.invite(vec![scene.node.address.to_string()], HOUR).await.unwrap()
}

fn attach(node: &TestNode, invite: Invite) -> AttachedHandle {
    let (tx, cert) = watch::channel(None);
    attach_with(node, invite, node.executor_in(cert, None), tx)
}

fn attach_with(
    node: &TestNode,
    invite: Invite,
    executor: ExecutorHandle,
    cert: watch::Sender<Option<Signed<ExecutorCert>>>,
) -> AttachedHandle {
    attached::start(AttachedParts {
        network: network(),
        invite,
        addresses: Vec::new(),
        net: node.net.clone(),
        store: node.store.clone(),
        blobs: node.blobs.clone(),
        executor,
        cert,
        tasks: node.tasks.child("attached"),
    })
}

async fn attached_now(handle: &AttachedHandle) {
    handle.state().wait_for(|s| matches!(s, AttachState::Attached { .. })).await.unwrap();
}

async fn ask_to_attach(node: &TestNode, owner: &TestNode, token: Bytes) -> Result<pb::response::Kind, RpcError> {
    let class = ExecutorClass { hardware_class: "cpu".to_owned(), slots: 1, engines: Vec::new(), price: 0 };
    let attach = pb::Attach { token, class: Some(class.to_raw()) };
    node.net.request_one(owner.id(), pb::request::Kind::Attach(attach)).await
}

fn forbidden(answer: &Result<pb::response::Kind, RpcError>) -> bool {
    matches!(answer, Err(RpcError::Refused { code: FailureCode::Forbidden, .. }))
}

#[tokio::test]
async fn an_invited_executor_works_for_its_miner() {
    let scene = bare_scene(60, None, |_| {}).await;
    let owner = owner(&scene);
    let node = TestNode::start(62, Roles::EXECUTOR).await;
    let attached = attach(&node, invite(&scene, &owner).await);
    attached_now(&attached).await;
    let spec = spec("echo", b"far away", 1, |_| {});
    let mut answers = scene.accepted(&spec, b"far away", false).await;
    let revealed = revealed(&mut answers).await;
    let attestation = scene.verified(&revealed).attestation;
    assert_eq!(attestation.executor(), node.id(), "the executor signed, the miner answers for it");
    assert_eq!(bytes(&revealed).map(|b| &b[..]), Some(&b"far away"[..]));
}

#[tokio::test]
async fn large_inputs_and_outputs_pass_through_the_miner() {
    let scene = bare_scene(64, None, |_| {}).await;
    let owner = owner(&scene);
    let node = TestNode::start(66, Roles::EXECUTOR).await;
    let attached = attach(&node, invite(&scene, &owner).await);
    attached_now(&attached).await;
    let input = Bytes::from(vec![3; 3 * limit::INLINE]);
    scene.validator.put_input(&input, Reader::Hotkey(scene.node.key.hotkey())).await;
    let spec = spec("echo", &input, 1, |_| {});
    let mut answers = scene.accepted(&spec, &input, false).await;
    let revealed = revealed(&mut answers).await;
    assert!(bytes(&revealed).is_none());
    let len = ByteCount(input.len() as u64);
    let from = Sources::peers([scene.node.id()]);
    scene.validator.transfer.fetch(BlobId::of(&input), len, from, Access::local()).await.unwrap();
}

#[tokio::test]
async fn an_invitation_admits_one_executor_and_keeps_its_token_secret() {
    let scene = bare_scene(68, None, |_| {}).await;
    let owner = owner(&scene);
    let (one, two) = (TestNode::start(70, Roles::EXECUTOR).await, TestNode::start(71, Roles::EXECUTOR).await);
    one.join(&scene.node).await;
    two.join(&scene.node).await;
    let invite = invite(&scene, &owner).await;
    let token = invite.token.bytes();
    assert!(forbidden(&ask_to_attach(&two, &scene.node, Bytes::new()).await), "nobody comes without an invitation");
    assert!(forbidden(&ask_to_attach(&two, &scene.node, vec![1; 32].into()).await), "nor with another's");
    assert!(ask_to_attach(&one, &scene.node, token.clone()).await.is_ok());
    assert!(ask_to_attach(&one, &scene.node, token.clone()).await.is_ok(), "an answer that was lost is given again");
    assert!(ask_to_attach(&one, &scene.node, Bytes::new()).await.is_ok(), "a renewal");
    assert!(forbidden(&ask_to_attach(&two, &scene.node, token.clone()).await), "used");
    owner.revoke(one.id()).await.unwrap();
    for shown in [Bytes::new(), token.clone()] {
        // Sent away, it lost its connection, and makes another.
        loop {
            let answer = ask_to_attach(&one, &scene.node, shown.clone()).await;
            if forbidden(&answer) {
                break;
            }
            assert!(answer.is_err(), "sent away");
            one.join(&scene.node).await;
        }
    }
    let stored = scene.node.store.scan(Keyspace::Executors, &KeyRange::all(), 100).unwrap();
    let holds = |bytes: &[u8]| bytes.windows(token.len()).any(|w| w == token.as_ref());
    assert!(stored.items.iter().all(|(key, value)| !holds(key) && !holds(value)), "only its digest is kept");
}

#[tokio::test]
async fn an_invitation_lapses() {
    let scene = bare_scene(72, None, |_| {}).await;
    let owner = owner(&scene);
    let node = TestNode::start(74, Roles::EXECUTOR).await;
    node.join(&scene.node).await;
    let invite = owner.invite(Vec::new(), Duration::ZERO).await.unwrap();
    assert!(invite.expires_at <= crate::service::wall_now());
    // It lapses with the millisecond after the one that it was written in.
    while crate::service::wall_now() <= UnixMillis(invite.expires_at.0) {
        tokio::task::yield_now().await;
    }
    assert!(forbidden(&ask_to_attach(&node, &scene.node, invite.token.bytes()).await));
}

#[tokio::test]
async fn an_executor_serves_its_owner_alone() {
    let scene = bare_scene(75, None, |_| {}).await;
    let owner = owner(&scene);
    let node = TestNode::start(77, Roles::EXECUTOR).await;
    let attached = attach(&node, invite(&scene, &owner).await);
    attached_now(&attached).await;
    scene.validator.join(&node).await;
    let offer = offer(&spec("echo", b"x", 1, |_| {}), b"x", &scene.validator, false);
    let answer = scene.validator.net.request_one(node.id(), pb::request::Kind::Offer(offer)).await;
    assert!(forbidden(&answer), "{answer:?}");
}

#[tokio::test]
async fn an_executor_whose_connection_breaks_comes_back_without_a_new_invitation() {
    let scene = bare_scene(82, None, |_| {}).await;
    let owner = owner(&scene);
    let node = TestNode::start(84, Roles::EXECUTOR).await;
    let attached = attach(&node, invite(&scene, &owner).await);
    attached_now(&attached).await;
    let mut offering = scene.pool.offering();
    scene.node.net.disconnect(node.id(), "test").await;
    offering.wait_for(Vec::is_empty).await.unwrap();
    offering.wait_for(|classes| !classes.is_empty()).await.unwrap();
    let spec = spec("echo", b"again", 1, |_| {});
    scene.committed(&spec, b"again").await;
    scene.verified(&scene.reveal(&spec).await.unwrap());
}

#[tokio::test]
async fn an_executor_drains_before_it_goes() {
    let scene = bare_scene(86, None, |_| {}).await;
    let owner = owner(&scene);
    let node = TestNode::start(88, Roles::EXECUTOR).await;
    let (executor, mut commands) = ExecutorHandle::channel(4, Vec::new(), "cpu");
    let attached = attach_with(&node, invite(&scene, &owner).await, executor, watch::channel(None).0);
    attached_now(&attached).await;
    let running = spec("echo", b"", 1, |_| {});
    let mut answers = scene.accepted(&running, b"", true).await;
    let command = commands.recv().await.unwrap();
    let mut drained = Box::pin(attached.drain());
    assert!(futures::poll!(drained.as_mut()).is_pending());
    let mut late = scene.accepted(&spec("echo", b"x", 2, |_| {}), b"x", true).await;
    let pb::work_event::Kind::Fault(fault) = next(&mut late).await else { panic!("not a fault") };
    assert!(fault.reason.contains("shutting down"), "{}", fault.reason);
    assert!(futures::poll!(drained.as_mut()).is_pending(), "what runs is waited for");
    drop(command);
    assert!(matches!(next(&mut answers).await, pb::work_event::Kind::Fault(_)));
    drained.await;
}

#[tokio::test]
async fn jobs_of_an_executor_that_dies_move_to_another() {
    let scene = bare_scene(78, None, |_| {}).await;
    let owner = owner(&scene);
    let node = TestNode::start(80, Roles::EXECUTOR).await;
    // Takes orders and never answers.
    let (silent, mut commands) = ExecutorHandle::channel(4, Vec::new(), "cpu");
    let attached = attach_with(&node, invite(&scene, &owner).await, silent, watch::channel(None).0);
    attached_now(&attached).await;
    let mut running = Vec::new();
    for nonce in 0..4 {
        let spec = spec("echo", b"x", nonce, |_| {});
        let answers = scene.accepted(&spec, b"x", true).await;
        let command = commands.recv().await.unwrap();
        assert_eq!(command.order.job, spec.id());
        running.push((answers, spec, command));
    }
    scene.pool.add_in_process(scene.node.id(), scene.node.executor(&scene.node.key, None));
    node.tasks.shutdown_within(Duration::ZERO).await;
    for (mut answers, spec, _command) in running {
        assert!(matches!(next(&mut answers).await, pb::work_event::Kind::Committed(_)));
        let attestation = scene.verified(&scene.reveal(&spec).await.unwrap()).attestation;
        assert_eq!(attestation.executor(), scene.node.id());
    }
    assert!(scene.pool.list().iter().all(|e| e.in_process), "the dead one is out of the pool");
}
