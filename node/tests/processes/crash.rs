//! Power cuts: kill -9 of a miner, an executor and a validator in the middle of jobs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use sundara_node::store::{KeyRange, Keyspace, SledStore, Store as _, StoreConfig};
use sundara_node::{JobEvent, JobFailure, JobHandle, JobOrder, Node};
use sundara_proto::id::JobId;
use sundara_proto::verdict::Standing;

use super::kit::{COUNTED, Mesh, NodeProcess, begun, end, found, local_config, publish_countdown, turn, within};

/// Some seconds of work: enough to find out who does it.
const LONG: u64 = 3_000_000_000;
/// Work that is over at once.
const SHORT: u64 = 1_000;

fn count(model: &str, n: u64) -> JobOrder {
    JobOrder::model(model).input(n.to_le_bytes().to_vec())
}

async fn submit(node: &Node, order: JobOrder) -> JobHandle {
    node.jobs().submit(order).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_finds_the_mesh_again_without_its_bootstrap() {
    let _turn = turn().await;
    let mut mesh = Mesh::start(2, 1).await;
    let second = mesh.validators[1].hotkey.to_string();
    let sees = async |node: &NodeProcess| {
        let peers = node.json(&["peers"]).await;
        let healthy = |peer: &Value| peer["hotkey"] == *second && peer["state"] == "healthy";
        peers.as_array().unwrap().iter().any(healthy).then_some(())
    };
    // It begins with the first validator alone, hears of the second, and is ended in the middle of things.
    mesh.write_network(&mesh.validators[0].addresses);
    let mut light = mesh.node("light", "light", &local_config("")).await;
    found("it hears of the second", || sees(&light)).await;
    // Whom it saw is on its disk a few seconds later; a stop in order writes it at once.
    light.process.signal("TERM");
    assert_eq!(light.process.ended().await, Some(0));

    mesh.write_network(&[]);
    mesh.validators[0].process.kill().await;
    light.restart().await;
    assert_eq!(light.json(&["status"]).await["net"]["bootstrap"], serde_json::json!([]));
    found("it finds the second by itself", || sees(&light)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_jobs_of_a_killed_miner_go_to_another() {
    let _turn = turn().await;
    let mut mesh = Mesh::start(1, 3).await;
    let requester = mesh.requester().await;
    let model = publish_countdown(&requester, &mesh.path("model")).await;
    let job = submit(&requester, count(&model, LONG).stream(true)).await;
    begun(&job).await;
    let killed = mesh.miner_of(&job).await;
    mesh.miners[killed].process.kill().await;
    let result = end(&job).await.unwrap();
    assert_eq!(result.output.as_deref(), Some(COUNTED));
    assert!(result.verdict.attempt > 0, "{:?}", result.verdict);
    let lost = mesh.miners[killed].hotkey;
    let agreed = result.verdict.replicas.iter().filter(|r| r.standing == Standing::Agreed);
    assert!(agreed.clone().count() > 0 && agreed.into_iter().all(|r| r.miner != lost), "{:?}", result.verdict);
    assert!(result.verify().is_ok());
    // It comes back under its key, says what it lost, and is asked again: it lost a job, it did not cheat.
    mesh.miners[killed].restart().await;
    assert_eq!(mesh.miners[killed].hotkey, lost);
    let list = mesh.miners[killed].json(&["job", "list"]).await;
    let id = job.id().to_string();
    let logged = list["miner"].as_array().unwrap().iter().find(|offer| offer["job"] == *id).cloned();
    // The last moments of the log may be lost with the machine, by its own word.
    assert!(logged.is_none_or(|offer| offer["state"] == "lost"), "{list}");
    let all = submit(&requester, count(&model, SHORT).replicas(3)).await;
    let result = end(&all).await.unwrap();
    assert!(result.verdict.replicas.iter().any(|r| r.miner == lost && r.standing == Standing::Agreed));
    let status = mesh.validators[0].json(&["status"]).await;
    assert_eq!(status["dispatch"]["caught"].as_array().unwrap().len(), 0, "{status}");
    requester.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_executor_is_a_fault_of_its_miner_and_not_of_the_job() {
    let _turn = turn().await;
    let mesh = Mesh::start(1, 1).await;
    let requester = mesh.requester().await;
    let model = publish_countdown(&requester, &mesh.path("model")).await;
    // A class of its own, so that its jobs run nowhere else.
    let mut executor = super::attach::executor(&mesh, "box", &mesh.miners[0], "--miner", "box").await;
    let job = submit(&requester, count(&model, LONG).stream(true).hardware_class("box")).await;
    begun(&job).await;
    executor.process.kill().await;
    // The miner knows what happened, and says so.
    let id = job.id().to_string();
    let reason = found("the fault is in the miner's log", || async {
        let list = mesh.miners[0].json(&["job", "list"]).await;
        let offers = list["miner"].as_array().unwrap().clone();
        let faulted = offers.into_iter().find(|offer| offer["job"] == *id && offer["state"] == "faulted")?;
        Some(faulted["detail"].as_str().unwrap().to_owned())
    })
    .await;
    assert!(reason.contains("executor"), "{reason}");
    executor.restart().await;
    let result = end(&job).await.unwrap();
    assert_eq!(result.output.as_deref(), Some(COUNTED));
    let status = mesh.validators[0].json(&["status"]).await;
    assert_eq!(status["dispatch"]["caught"].as_array().unwrap().len(), 0, "{status}");
    requester.shutdown().await;
}

/// Ends of jobs that a test counts while they come.
#[derive(Default)]
struct Seen {
    events: AtomicUsize,
    changed: tokio::sync::Notify,
}

/// Follows one job to its end; fails when an acknowledged job ends without a word, or twice, or wrongly.
async fn follow(requester: Node, number: u64, seen: Arc<Seen>) -> (JobId, Result<(), JobFailure>) {
    let input = format!("job {number}");
    let expected = blake3::hash(input.as_bytes()).to_hex();
    let order = JobOrder::builtin("blake3").input(input.into_bytes()).replicas(2);
    let job = submit(&requester, order).await;
    let mut events = job.events();
    let mut ends = 0;
    while let Some(event) = within("an event of a job", events.next()).await {
        seen.events.fetch_add(1, Ordering::Relaxed);
        seen.changed.notify_waiters();
        ends += usize::from(matches!(event, JobEvent::Finished(_) | JobEvent::Failed(_)));
    }
    assert_eq!(ends, 1, "job {number}");
    let end = job.result().await.map(|result| {
        assert_eq!(result.output.as_deref(), Some(expected.as_bytes()), "job {number}");
        assert!(result.verify().is_ok(), "job {number}");
    });
    (job.id(), end)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_validator_killed_twenty_times_keeps_its_word() {
    const KILLS: usize = 20;
    const AT_ONCE: u64 = 6;
    let _turn = turn().await;
    let seed: u64 = std::env::var("SUNDARA_PROCESSES_SEED").map_or_else(|_| rand::random(), |s| s.parse().unwrap());
    println!("SUNDARA_PROCESSES_SEED={seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut mesh = Mesh::start(1, 3).await;
    let requester = mesh.requester().await;
    let seen = Arc::new(Seen::default());
    let stop = tokio_util::sync::CancellationToken::new();
    let streams: Vec<_> = (0..AT_ONCE)
        .map(|stream| {
            let (requester, seen, stop) = (requester.clone(), seen.clone(), stop.clone());
            tokio::spawn(async move {
                let mut ended = Vec::new();
                for i in 0.. {
                    if stop.is_cancelled() {
                        break;
                    }
                    ended.push(follow(requester.clone(), i * AT_ONCE + stream, seen.clone()).await);
                }
                ended
            })
        })
        .collect();
    for _ in 0..KILLS {
        // In the middle of the work that is under way, or while the validator still reads what it knew.
        if rng.random_bool(0.8) {
            let target = seen.events.load(Ordering::Relaxed) + rng.random_range(1..30);
            let reached = async {
                loop {
                    let changed = seen.changed.notified();
                    if seen.events.load(Ordering::Relaxed) >= target {
                        return;
                    }
                    changed.await;
                }
            };
            within("the jobs go on", reached).await;
        }
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..50_000))).await;
        mesh.validators[0].process.kill().await;
        mesh.validators[0].restart().await;
    }
    stop.cancel();
    let mut ended = Vec::new();
    for stream in streams {
        ended.extend(within("the last jobs end", stream).await.unwrap());
    }
    let failed: Vec<_> = ended.iter().filter_map(|(id, end)| Some((id, end.as_ref().err()?))).collect();
    println!("{} jobs ended, {} of them without a result: {failed:?}", ended.len(), failed.len());
    assert!(failed.iter().all(|(_, failure)| matches!(failure, JobFailure::Failed(why) if !why.is_empty())));
    let status = mesh.validators[0].json(&["status"]).await;
    assert_eq!(status["dispatch"]["live"], 0, "{status}");
    assert_eq!(status["dispatch"]["caught"].as_array().unwrap().len(), 0, "{status}");
    requester.shutdown().await;
    // What is on the disk is what was said.
    let validator = mesh.validators.remove(0);
    let dir = validator.dir.join("store");
    validator.stop().await;
    let store = SledStore::open(&dir, &StoreConfig::default()).unwrap();
    for (id, end) in &ended {
        let kept = store.get(Keyspace::Verdicts, id.as_ref()).unwrap();
        assert!(kept.is_some(), "the verdict of job {id}, which ended as {end:?}, is not kept");
    }
    let inputs = store.scan(Keyspace::Inputs, &KeyRange::all(), 10).unwrap().items;
    assert!(inputs.is_empty(), "inputs are kept of jobs that ended: {inputs:?}");
}
