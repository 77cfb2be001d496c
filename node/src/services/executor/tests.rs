//! The executor over real ports: what is attested, and what is a fault instead.

use bytes::Bytes;
use sundara_proto::attestation::{Outcome, verify_attestation};
use sundara_proto::cert::Roles;
use sundara_proto::crypto::{HotkeyPair, Signed};
use sundara_proto::id::BlobId;
use sundara_proto::units::{ByteCount, UnixMillis};
use sundara_proto::wire::limit;
use tokio::time::Instant;

use crate::blobs::Reader;
use crate::service::wall_now;
use crate::services::work::harness::{TestNode, network, order, spec};
use crate::services::work::{Executed, ExecutorEvent, ExecutorFault, ExecutorHandle, Misbehaviour, Order, certs};

async fn end(executor: &ExecutorHandle, order: Order) -> Result<Executed, ExecutorFault> {
    let mut run = executor.run(order);
    while let Some(event) = run.next().await {
        match event {
            ExecutorEvent::Started | ExecutorEvent::Output { .. } => {}
            ExecutorEvent::Finished(executed) => return Ok(*executed),
            ExecutorEvent::Fault(fault) => return Err(fault),
        }
    }
    panic!("a run ends with a result or a fault");
}

#[tokio::test]
async fn a_result_is_attested_under_the_owners_certificate() {
    let node = TestNode::start(1, Roles::MINER).await;
    let owner = HotkeyPair::from_seed(&[50; 32]);
    let executor = node.executor(&owner, None);
    let spec = spec("echo", b"hello", 1, |_| {});
    let done = end(&executor, order(&spec, b"hello", &node)).await.unwrap();
    assert_eq!(done.inline_output.as_deref(), Some(&b"hello"[..]));
    let (attestation, cert) = verify_attestation(&network(), done.attestation.to_wire()).unwrap();
    assert_eq!((cert.owner(), attestation.executor()), (owner.hotkey(), node.id()));
    assert_eq!((attestation.job, attestation.input), (spec.id(), spec.input));
    assert_eq!((attestation.outcome, attestation.output), (Outcome::Completed, BlobId::of(b"hello")));
    assert!(attestation.usage.fuel > 0 && attestation.result_digest().is_some());

    let again = end(&executor, order(&spec, b"hello", &node)).await.unwrap();
    assert_eq!(again.attestation.result_digest(), attestation.result_digest(), "equal jobs, equal digests");
}

#[tokio::test]
async fn what_the_job_does_is_an_outcome_and_what_this_machine_suffers_a_fault() {
    let node = TestNode::start(2, Roles::MINER).await;
    let executor = node.executor(&node.key, None);
    for (name, params, outcome) in [
        ("exit", "3", Outcome::ExitCode(3)),
        ("trap", "", Outcome::Trap(1)),
        ("spin", "", Outcome::OutOfFuel),
        ("flood", "", Outcome::OutputLimit),
    ] {
        let spec = spec(name, b"", 1, |s| {
            s.params = Bytes::from_static(params.as_bytes());
            s.limits.fuel = 1 << 24;
            s.limits.output = ByteCount::kib(64);
        });
        let done = end(&executor, order(&spec, b"", &node)).await.unwrap();
        assert_eq!(done.attestation.outcome, outcome, "{name}");
        assert!(done.attestation.result_digest().is_some(), "{name}");
    }
    // Stopped by the wall clock: attested, without a digest.
    let slow = spec("sleep", b"", 1, |s| s.limits.wall_ms = 10);
    let done = end(&executor, order(&slow, b"", &node)).await.unwrap();
    assert_eq!((done.attestation.outcome, done.attestation.result_digest()), (Outcome::Aborted, None));
    assert_eq!((done.attestation.output, done.attestation.output_len), (BlobId::of(b""), ByteCount(0)));

    let greedy = spec("echo", b"", 1, |s| s.limits.memory = ByteCount::gib(3));
    let fault = end(&executor, order(&greedy, b"", &node)).await.unwrap_err();
    assert!(!fault.retryable && fault.reason.contains("executor.limits.memory"), "{fault}");
    let unknown = spec("no-such-job", b"", 1, |_| {});
    assert!(end(&executor, order(&unknown, b"", &node)).await.is_err());
    let mut swapped = order(&spec("echo", b"one", 1, |_| {}), b"one", &node);
    swapped.inline_input = Some(Bytes::from_static(b"two"));
    assert!(end(&executor, swapped).await.unwrap_err().reason.contains("input"));
    let mut late = order(&slow, b"", &node);
    late.deadline = Instant::now();
    assert!(end(&executor, late).await.unwrap_err().reason.contains("deadline"));
}

#[tokio::test]
async fn without_a_valid_certificate_nothing_is_attested() {
    let node = TestNode::start(3, Roles::MINER).await;
    let spec = spec("echo", b"x", 1, |_| {});
    let none = node.executor_with(None, None);
    assert!(end(&none, order(&spec, b"x", &node)).await.unwrap_err().retryable);
    let past = UnixMillis(wall_now().0 - 2 * 24 * 3600 * 1000);
    let expired = certs::issue(&network(), &node.key, node.id(), "cpu", past);
    let executor = node.executor_with(Some(expired), None);
    let fault = end(&executor, order(&spec, b"x", &node)).await.unwrap_err();
    assert!(fault.reason.contains("expired"), "{fault}");
}

#[tokio::test]
async fn large_inputs_and_outputs_travel_as_blobs() {
    let validator = TestNode::start(4, Roles::VALIDATOR).await;
    let node = TestNode::start(5, Roles::MINER).await;
    node.join(&validator).await;
    let input = Bytes::from(vec![7; 3 * limit::INLINE]);
    validator.put_input(&input, Reader::Hotkey(node.key.hotkey())).await;
    let executor = node.executor(&node.key, None);
    let spec = spec("echo", &input, 1, |_| {});
    let done = end(&executor, order(&spec, &input, &validator)).await.unwrap();
    assert!(done.inline_output.is_none());
    assert_eq!((done.attestation.output, done.attestation.output_len.0), (BlobId::of(&input), input.len() as u64));
    assert_eq!(node.blobs.get(done.attestation.output, ByteCount::mib(1)).await.unwrap(), input);
}

#[tokio::test]
async fn streamed_output_is_the_whole_output_in_order() {
    let node = TestNode::start(6, Roles::MINER).await;
    let executor = node.executor(&node.key, None);
    let spec = spec("flood", b"", 1, |s| s.limits.output = ByteCount::mib(4));
    let mut run = executor.run(Order { stream: true, ..order(&spec, b"", &node) });
    let mut seen = 0;
    loop {
        match run.next().await.unwrap() {
            ExecutorEvent::Started => {}
            ExecutorEvent::Output { offset, data } => {
                assert_eq!(offset, seen);
                seen += data.len() as u64;
            }
            ExecutorEvent::Finished(done) => {
                assert_eq!((seen, done.attestation.output_len.0), (4 << 20, 4 << 20));
                return;
            }
            ExecutorEvent::Fault(fault) => panic!("{fault}"),
        }
    }
}

#[tokio::test]
async fn a_dropped_run_gives_its_slot_back() {
    let node = TestNode::start(7, Roles::MINER).await;
    let executor = node.executor(&node.key, None);
    let sleep = spec("sleep", b"", 1, |_| {});
    let mut held = Vec::new();
    for _ in 0..executor.slots {
        let mut run = executor.run(order(&sleep, b"", &node));
        assert!(matches!(run.next().await, Some(ExecutorEvent::Started)));
        held.push(run);
    }
    let spec = spec("echo", b"x", 1, |_| {});
    let mut waiting = Box::pin(end(&executor, order(&spec, b"x", &node)));
    assert!(futures::poll!(waiting.as_mut()).is_pending());
    drop(held);
    assert!(waiting.await.is_ok());
}

#[tokio::test]
async fn lies_are_well_signed() {
    let node = TestNode::start(8, Roles::MINER).await;
    let other = TestNode::start(9, Roles::MINER).await;
    let spec = spec("echo", b"truth", 1, |_| {});
    let honest = end(&node.executor(&node.key, None), order(&spec, b"truth", &node)).await.unwrap();
    let wrong = node.executor(&node.key, Some(Misbehaviour::WrongResult));
    let wrong = end(&wrong, order(&spec, b"truth", &node)).await.unwrap();
    assert!(verify_attestation(&network(), wrong.attestation.to_wire()).is_ok());
    assert_ne!(wrong.attestation.result_digest(), honest.attestation.result_digest());
    let digest = async |node: &TestNode| {
        let executor = node.executor(&node.key, Some(Misbehaviour::Collude));
        let lie: Signed<_> = end(&executor, order(&spec, b"truth", node)).await.unwrap().attestation;
        lie.result_digest().unwrap()
    };
    let (one, two) = (digest(&node).await, digest(&other).await);
    assert_eq!(one, two, "who colludes agrees");
    assert_ne!(Some(one), honest.attestation.result_digest());
}
