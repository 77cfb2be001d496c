//! The whole system in one process: real sockets on loopback, real stores, real wasm.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use sundara_node::domain::admission::ClientLimits;
use sundara_node::testnet::{Testnet, Workload};
use sundara_node::{JobEvent, JobFailure, JobOrder, JobPhase, Node};
use sundara_proto::attestation::Outcome;
use sundara_proto::crypto::HotkeyPair;
use sundara_proto::job::Limits;
use sundara_proto::units::ByteCount;
use sundara_proto::verdict::VerdictKind;

/// Long enough for a debug build on a busy machine; a test that reaches it hangs.
const PATIENCE: Duration = Duration::from_secs(180);

/// One mesh at a time: each has up to a dozen nodes, which time one another out when there is no processor left for them.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("the test made no progress")
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_the_default_testnet_are_verified_and_provable() {
    let _turn = TURN.lock().await;
    let testnet = within(Testnet::builder().start()).await.unwrap();
    let workload = within(Workload::publish(testnet.client(), testnet.data_dir(), 12)).await.unwrap();
    let jobs = futures::stream::iter(0..12).map(|i| {
        let order = workload.order(i, 2);
        let client = testnet.client().clone();
        async move { (i, client.jobs().submit(order).await.unwrap().result().await) }
    });
    let ended: Vec<_> = within(jobs.buffer_unordered(6).collect()).await;
    assert_eq!(ended.len(), 12);
    for (i, end) in ended {
        let result = end.unwrap();
        assert!(workload.is_right(i, result.output.as_ref().unwrap()), "job {i}");
        assert!(matches!(result.kind(), VerdictKind::Quorum(2) | VerdictKind::Audited), "{:?}", result.kind());
        let proof = result.verify().unwrap();
        assert!(!proof.attestations.is_empty());
    }
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_liar_is_caught_and_no_result_is_wrong() {
    let _turn = TURN.lock().await;
    let testnet = within(Testnet::builder().miners(7).byzantine(4).start()).await.unwrap();
    let workload = within(Workload::publish(testnet.client(), testnet.data_dir(), 40)).await.unwrap();
    let mut wrong = 0;
    // Until all four are caught: new miners are audited at every job, so each is when it is asked; one that failed without
    // proof is not asked for a while.
    let validator = testnet.validators()[0].node().unwrap().clone();
    let liars: Vec<_> = testnet.miners().iter().filter_map(|m| Some((m.hotkey, m.misbehaviour?))).collect();
    let mut i = 0;
    let free = async || {
        let caught = validator.status().await.dispatch.unwrap().caught;
        liars.iter().filter(|(liar, _)| caught.iter().all(|c| c.miner != *liar)).copied().collect::<Vec<_>>()
    };
    let until_caught = async {
        while !free().await.is_empty() {
            let order = workload.order(i, 2);
            match testnet.client().jobs().submit(order).await.unwrap().result().await {
                Ok(result) => wrong += usize::from(!workload.is_right(i, result.output.as_ref().unwrap())),
                Err(e) => panic!("job {i}: {e}"),
            }
            i += 1;
        }
    };
    if tokio::time::timeout(PATIENCE, until_caught).await.is_err() {
        for miner in testnet.miners() {
            println!("{} {:?}: {:#?}", miner.hotkey, miner.misbehaviour, validator.known_miner(miner.hotkey).await);
        }
        panic!("after {i} jobs {:?} are not caught", free().await);
    }
    assert_eq!(wrong, 0);
    let honest: Vec<_> = testnet.miners().iter().filter(|m| m.misbehaviour.is_none()).map(|m| m.hotkey).collect();
    let caught = validator.status().await.dispatch.unwrap().caught;
    assert!(honest.iter().all(|h| caught.iter().all(|c| c.miner != *h)), "an honest miner was blamed: {caught:?}");
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn output_streams_while_the_job_runs_and_is_provisional_until_the_verdict() {
    let _turn = TURN.lock().await;
    let testnet = within(Testnet::builder().miners(2).start()).await.unwrap();
    let input = vec![7_u8; 100_000];
    let order = JobOrder::builtin("echo").input(input.clone()).stream(true);
    let job = testnet.client().jobs().submit(order).await.unwrap();
    let events: Vec<JobEvent> = within(job.events().collect()).await;
    let mut streamed = Vec::new();
    for event in &events {
        if let JobEvent::Output { offset, data, .. } = event {
            assert_eq!(*offset, streamed.len() as u64);
            streamed.extend_from_slice(data);
        }
    }
    assert_eq!(streamed, input);
    assert!(matches!(events.first(), Some(JobEvent::Acknowledged { rank: 0, .. })));
    assert!(matches!(events.last(), Some(JobEvent::Finished(_))));
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_inputs_and_outputs_travel_as_blobs() {
    let _turn = TURN.lock().await;
    let testnet = within(Testnet::builder().miners(2).start()).await.unwrap();
    let input: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    let job = testnet.client().jobs().submit(JobOrder::builtin("echo").input(input.clone()).replicas(2)).await.unwrap();
    let result = within(job.result()).await.unwrap();
    assert!(result.output.is_none(), "an output of 3 MB does not ride in a message");
    assert_eq!(within(job.output()).await.unwrap(), input);
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_results_of_their_own_kind() {
    let _turn = TURN.lock().await;
    let testnet = within(Testnet::builder().miners(2).start()).await.unwrap();
    let short = Limits { fuel: 10_000_000, ..Limits::default() };
    for (job, limits, expected) in [
        ("spin", short, Outcome::OutOfFuel),
        ("flood", short, Outcome::OutOfFuel),
        ("flood", Limits::default(), Outcome::OutputLimit),
        ("alloc", Limits { memory: ByteCount::mib(16), ..Limits::default() }, Outcome::MemoryLimit),
        ("exit", short, Outcome::ExitCode(7)),
    ] {
        let order = JobOrder::builtin(job).params("7").limits(limits).replicas(2);
        let handle = testnet.client().jobs().submit(order).await.unwrap();
        let result = within(handle.result()).await.unwrap_or_else(|e| panic!("{job}: {e}"));
        assert_eq!(result.outcome(), Some(expected), "{job}");
    }
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_can_be_cancelled_while_it_runs() {
    let _turn = TURN.lock().await;
    let testnet = within(Testnet::builder().miners(2).start()).await.unwrap();
    let job = testnet.client().jobs().submit(JobOrder::builtin("sleep")).await.unwrap();
    let mut events = job.events();
    within(async {
        while let Some(event) = events.next().await {
            if matches!(event, JobEvent::Started { .. }) {
                return;
            }
        }
        panic!("the job ended before it started");
    })
    .await;
    job.cancel().await;
    // This node's own word, or its validator's verdict where that was faster.
    let end = within(job.result()).await.unwrap_err();
    let by_verdict = JobFailure::Failed("cancelled by its requester".to_owned());
    assert!(end == JobFailure::Cancelled || end == by_verdict, "{end:?}");
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_the_loss_of_its_miner() {
    let _turn = TURN.lock().await;
    let mut testnet = within(Testnet::builder().miners(3).start()).await.unwrap();
    let workload = Arc::new(within(Workload::publish(testnet.client(), testnet.data_dir(), 4)).await.unwrap());
    // A job that runs until it is stopped holds one miner; that miner then goes away without a word.
    let job = testnet
        .client()
        .jobs()
        .submit(JobOrder::builtin("sleep").limits(Limits { wall_ms: 5_000, ..Limits::default() }))
        .await
        .unwrap();
    let mut events = job.events();
    within(async {
        while let Some(event) = events.next().await {
            if matches!(event, JobEvent::Started { .. }) {
                return;
            }
        }
    })
    .await;
    let gone = testnet.miners_mut().remove(0);
    within(gone.node().unwrap().shutdown()).await;
    for i in 0..4 {
        let result =
            within(testnet.client().jobs().submit(workload.order(i, 2)).await.unwrap().result()).await.unwrap();
        assert!(workload.is_right(i, result.output.as_ref().unwrap()));
    }
    job.cancel().await;
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_validators_share_the_jobs_and_stand_in_for_each_other() {
    let _turn = TURN.lock().await;
    let mut testnet = within(Testnet::builder().validators(2).miners(3).start()).await.unwrap();
    let workload = within(Workload::publish(testnet.client(), testnet.data_dir(), 8)).await.unwrap();
    let mut owners = std::collections::BTreeSet::new();
    for i in 0..16 {
        let result =
            within(testnet.client().jobs().submit(workload.order(i, 2)).await.unwrap().result()).await.unwrap();
        owners.insert(result.verdict.validator());
    }
    assert_eq!(owners.len(), 2, "with equal stakes 16 jobs of one owner have a chance of 3 in 100,000");
    let gone = testnet.validators_mut().remove(0);
    within(gone.node().unwrap().shutdown()).await;
    for i in 0..4 {
        let result =
            within(testnet.client().jobs().submit(workload.order(i, 2)).await.unwrap().result()).await.unwrap();
        assert_ne!(result.verdict.validator(), gone.hotkey);
    }
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn announced_jobs_are_taken_followed_and_count_no_longer_than_they_run() {
    let _turn = TURN.lock().await;
    // One job at a time: a second one is taken only if the first was let go.
    let one = ClientLimits { jobs_per_s: 1_000, burst: 1_000, concurrent: 1 };
    let testnet = Testnet::builder().miners(2).configure(move |config| config.intake.admission.anyone = Some(one));
    let testnet = within(testnet.start()).await.unwrap();
    let validator = testnet.validators()[0].hotkey;
    // The second input does not fit into an announcement, the third not into a message: both are fetched.
    for (i, len) in [10, 10_000, 300_000].into_iter().enumerate() {
        let input = vec![i as u8; len];
        let order = JobOrder::builtin("echo").input(input.clone()).replicas(2).announce(true);
        let job = testnet.client().jobs().submit(order).await.unwrap();
        let result = within(job.result()).await.unwrap();
        assert_eq!(result.verdict.validator(), validator);
        assert_eq!(within(job.output()).await.unwrap(), input);
        assert_eq!(job.summary().phase, JobPhase::Finished);
    }
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_counts_until_it_ends_though_its_requester_has_gone() {
    let _turn = TURN.lock().await;
    let one = ClientLimits { jobs_per_s: 1_000, burst: 1_000, concurrent: 1 };
    let testnet = Testnet::builder().miners(1).configure(move |config| config.intake.admission.anyone = Some(one));
    let testnet = within(testnet.start()).await.unwrap();
    let validator = &testnet.validators()[0];
    let requester = async || {
        let node = Node::builder().hotkey(HotkeyPair::from_seed(&[7; 32])).network(testnet.network());
        let node = node.bootstrap(testnet.bootstrap()).trust([validator.hotkey]).loopback();
        within(node.start()).await.unwrap()
    };
    let first = requester().await;
    // It sleeps until its wall limit, and then it is too late to try again.
    let limits = Limits { wall_ms: 10_000, ..Limits::default() };
    let order = JobOrder::builtin("sleep").limits(limits).not_after(Duration::from_secs(8));
    let mut events = first.jobs().submit(order).await.unwrap().events();
    while !matches!(within(events.next()).await.unwrap(), JobEvent::Started { .. }) {}
    within(first.shutdown()).await;

    let second = requester().await;
    let job = second.jobs().submit(JobOrder::builtin("echo").input("hello")).await.unwrap();
    within(job.result()).await.unwrap();
    let verdicts = validator.node().unwrap().status().await.dispatch.unwrap().verdicts;
    assert_eq!(verdicts[4], 1, "the first had to end before the second was taken: {verdicts:?}");
    within(second.shutdown()).await;
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_reaches_no_validator_goes_on_gossip() {
    let _turn = TURN.lock().await;
    let testnet = within(Testnet::builder().miners(2).start()).await.unwrap();
    let validator = &testnet.validators()[0];
    let miner = testnet.miners()[0].node().unwrap();
    // It believes the validator and never connects to it.
    let apart = Node::builder()
        .network(testnet.network())
        .bootstrap(miner.addresses().await)
        .trust([validator.hotkey])
        .configure(|config| config.net.deny.push(validator.hotkey))
        .loopback()
        .start()
        .await
        .unwrap();
    let order = JobOrder::builtin("echo").input("hello");
    let job = apart.jobs().submit(order).await.unwrap();
    let mut looks = tokio::time::interval(Duration::from_millis(20));
    within(async {
        while validator.node().unwrap().status().await.dispatch.unwrap().verdicts.iter().sum::<u64>() == 0 {
            looks.tick().await;
        }
    })
    .await;
    // It was done, and nobody who is connected can say so.
    assert_eq!(job.summary().phase, JobPhase::Submitting);
    job.cancel().await;
    assert_eq!(within(job.result()).await.unwrap_err(), JobFailure::Cancelled);
    within(apart.shutdown()).await;
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_validator_starts_again_with_what_it_knows_of_its_miners() {
    let _turn = TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let testnet = within(Testnet::builder().miners(2).seed(5).data_dir(dir.path()).start()).await.unwrap();
        // New miners are audited at every job: each leaves a count of clean audits.
        for _ in 0..3 {
            let order = JobOrder::builtin("echo").input("hello").replicas(1);
            let result = within(testnet.client().jobs().submit(order).await.unwrap().result()).await.unwrap();
            assert_eq!(*result.kind(), VerdictKind::Audited);
        }
        within(testnet.shutdown()).await;
    }
}
