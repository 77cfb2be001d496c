//! Signals: the first drains what runs, the second stops at once, and exit codes are those of `--help`.

use std::os::unix::fs::PermissionsExt as _;

use sundara_node::{JobHandle, JobOrder, JobPhase, Node};
use tokio::process::Command;

use super::attach::executor;
use super::kit::{
    BINARY, COUNTED, Mesh, NodeProcess, Process, begun, end, found, local_config, publish_countdown, turn,
};

/// Work for some seconds: it runs still when the signal has come.
const LONG: u64 = 2_000_000_000;

async fn running(requester: &Node, model: &str, class: &str) -> JobHandle {
    let order = JobOrder::model(model).input(LONG.to_le_bytes().to_vec()).stream(true).hardware_class(class);
    let job = requester.jobs().submit(order).await.unwrap();
    begun(&job).await;
    job
}

/// Sends a signal and waits until the node says that it drains.
async fn drains(node: &mut NodeProcess, signal: &str) {
    node.process.signal(signal);
    node.process.logged("drain", |line| line.contains("running jobs are drained").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_role_drains_on_the_first_signal() {
    let _turn = turn().await;
    let mut mesh = Mesh::start(1, 2).await;
    let requester = mesh.requester().await;
    let model = publish_countdown(&requester, &mesh.path("model")).await;

    let mut attached = executor(&mesh, "box", &mesh.miners[0], "--miner", "box").await;
    let job = running(&requester, &model, "box").await;
    drains(&mut attached, "TERM").await;
    assert_eq!(job.summary().phase, JobPhase::Running, "it was to be in the middle still");
    let result = end(&job).await.unwrap();
    assert_eq!((result.output.as_deref(), result.verdict.attempt), (Some(COUNTED), 0));
    assert_eq!(attached.process.ended().await, Some(0));

    let job = running(&requester, &model, "").await;
    let mut miner = mesh.miners.remove(mesh.miner_of(&job).await);
    drains(&mut miner, "INT").await;
    assert_eq!(job.summary().phase, JobPhase::Running, "it was to be in the middle still");
    let result = end(&job).await.unwrap();
    assert_eq!((result.output.as_deref(), result.verdict.attempt), (Some(COUNTED), 0));
    assert_eq!(miner.process.ended().await, Some(0));
    assert!(!miner.dir.join("listening.json").exists());

    let job = running(&requester, &model, "").await;
    drains(&mut mesh.validators[0], "TERM").await;
    assert_eq!(job.summary().phase, JobPhase::Running, "it was to be in the middle still");
    let result = end(&job).await.unwrap();
    assert_eq!((result.output.as_deref(), result.verdict.attempt), (Some(COUNTED), 0));
    assert_eq!(mesh.validators[0].process.ended().await, Some(0));
    requester.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_stops_at_once() {
    let _turn = turn().await;
    let mut mesh = Mesh::start(1, 2).await;
    let requester = mesh.requester().await;
    let model = publish_countdown(&requester, &mesh.path("model")).await;
    let job = running(&requester, &model, "").await;
    let mut miner = mesh.miners.remove(mesh.miner_of(&job).await);
    drains(&mut miner, "TERM").await;
    miner.process.signal("TERM");
    assert_eq!(miner.process.ended().await, Some(130));
    // Nobody but that miner lost anything.
    let result = end(&job).await.unwrap();
    assert_eq!(result.output.as_deref(), Some(COUNTED));
    assert!(result.verdict.attempt > 0);
    requester.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_ends_with_the_program_that_runs_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = NodeProcess::start(&dir.path().join("light"), &local_config(""), &["--role", "light"]).await;
    node.process.close_input();
    assert_eq!(node.process.ended().await, Some(0));
    assert!(node.process.log().contains("node.stop_with_stdin"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_miner_without_flags_makes_its_home_and_says_what_is_missing() {
    let home = tempfile::tempdir().unwrap();
    // What would be flags or a file elsewhere: the ports of the machine that tests run on are not ours to take.
    let mut command = Command::new(BINARY);
    command.args(["--role", "miner"]).env("HOME", home.path());
    command.env("SUNDARA_NET__LISTEN", "/ip4/127.0.0.1/tcp/0").env("SUNDARA_HTTP__LISTEN", "127.0.0.1:0");
    let mut miner = Process::start(&mut command, home.path().join("log"));
    miner.logged("banner", |line| line.starts_with("  api ").then_some(())).await;
    let data = home.path().join(".sundara");
    for key in ["hotkey", "node.key"] {
        let mode = std::fs::metadata(data.join(key)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    // The banner is printed in one piece.
    let log = miner.log();
    for words in ["hotkey    5", "peer id   12D3KooW", "address   /ip4/127.0.0.1/tcp/", "api       http://127.0.0.1:"] {
        assert!(log.contains(words), "{words} in\n{log}");
    }
    for missing in ["a node to join through: --bootstrap", "jobs.trusted_validators", "registration on a chain"] {
        assert!(log.contains(missing), "{missing} in\n{log}");
    }
    miner.signal("INT");
    assert_eq!(miner.ended().await, Some(0));

    // With somebody to join through who is not there, it names him and the reason, and goes on trying.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("/ip4/127.0.0.1/tcp/{port}");
    let flags = ["--role", "miner", "--bootstrap", &address];
    let miner = NodeProcess::start(&data, &local_config(""), &flags).await;
    found("the bootstrap is named as missing", || async {
        let missing = miner.json(&["status"]).await["missing"].to_string();
        (missing.contains(&address) && missing.contains("refused") && missing.contains("retrying")).then_some(())
    })
    .await;
    miner.stop().await;
}
