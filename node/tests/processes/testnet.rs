//! `sundara-node testnet` as people start it.

use std::path::Path;

use serde_json::Value;
use sundara_node::testnet::{Testnet, Workload};
use tokio::process::Command;

use super::kit::{BINARY, Process, end, found, processes_of, run, run_as, turn, within};

fn miners(report: &Value) -> Vec<String> {
    report["miners"].as_array().unwrap().iter().map(|m| m["hotkey"].as_str().unwrap().to_owned()).collect()
}

async fn none_left(dir: &Path) {
    found("no process is left", || async { processes_of(dir).is_empty().then_some(()) }).await;
}

/// Starts a testnet that stays up; returns it with what it says of itself, line by line.
async fn stays_up(dir: &Path, flags: &[&str]) -> (Process, Vec<String>) {
    let mut command = Command::new(BINARY);
    command.args(["testnet", "--data-dir", dir.to_str().unwrap()]).args(flags);
    let mut testnet = Process::start(&mut command, dir.with_extension("log"));
    // The last line of what is printed.
    testnet.logged("the mesh stands", |line| line.contains("--role miner --network").then_some(())).await;
    let lines = testnet.log().lines().map(str::to_owned).collect();
    (testnet, lines)
}

/// What stands behind a label.
fn labelled<'a>(lines: &'a [String], label: &str) -> Vec<&'a str> {
    lines.iter().filter_map(|line| Some(line.strip_prefix("  ")?.strip_prefix(label)?.trim())).collect()
}

/// A printed command as a person would type it.
fn typed(line: &str) -> Command {
    let mut words = line.split_whitespace();
    assert_eq!(words.next(), Some("sundara-node"), "{line}");
    let mut command = Command::new(BINARY);
    command.args(words);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_testnet_of_processes_runs_jobs_resumes_and_leaves_nothing_behind() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("mesh");
    let flags = ["--processes", "--miners", "2", "--data-dir", dir.to_str().unwrap()];
    let once = [&["testnet", "--jobs", "6", "--exit", "--json"], &flags[..]].concat();
    let first = run(&once).await.json();
    assert_eq!(first["jobs"], serde_json::json!({"submitted": 6, "verified": 6, "failed": 0, "rejected": 0}));
    assert_eq!(first["nodes"], 4);
    assert!(first["latency_ms"]["p50"].as_f64() > Some(0.0) && first["jobs_per_second"].as_f64() > Some(0.0));
    assert!(first["miners"].as_array().unwrap().iter().all(|m| m["byzantine"] == false && m["caught"] == false));
    assert_eq!(processes_of(&dir), Vec::<String>::new());

    let again = run(&once).await.json();
    assert_eq!(again["jobs"]["verified"], 6);
    assert_eq!(miners(&again), miners(&first), "the same directory is the same mesh");
    let other = run(&[&once[..], &["--seed", "1"]].concat()).await;
    assert!(other.failed(1).contains("--seed 1 differs"), "{other:?}");

    // The same mesh stays up, says how to reach it, and ends on a signal.
    let (mut testnet, lines) = stays_up(&dir, &["--processes", "--miners", "2"]).await;
    assert_eq!(labelled(&lines, "bootstrap").len(), 1, "{lines:?}");
    let logs = labelled(&lines, "log");
    assert_eq!(logs.len(), 4, "its own, a validator's and two miners': {lines:?}");
    assert!(logs.iter().all(|log| std::fs::metadata(log).unwrap().len() > 0), "{logs:?}");
    assert_eq!(processes_of(&dir).len(), 4, "{:?}", processes_of(&dir));
    testnet.signal("INT");
    assert_eq!(testnet.ended().await, Some(0));
    assert_eq!(processes_of(&dir), Vec::<String>::new());

    // Not even a parent that is killed leaves its children behind.
    let (mut testnet, _) = stays_up(&dir, &["--processes", "--miners", "2"]).await;
    testnet.kill().await;
    none_left(&dir).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_that_a_testnet_prints_work() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("mesh");
    let (mut testnet, lines) = stays_up(&dir, &["--miners", "1", "--replicas", "1", "--jobs", "1"]).await;
    let command = |words: &str| lines.iter().find(|line| line.contains(words)).unwrap().trim().to_owned();
    let api = labelled(&lines, "api")[0].to_owned();

    // A node of one's own: with one miner of the testnet's, two replicas need it.
    let mut attach = typed(&command("--role miner"));
    let mut own = Process::start(&mut attach, dir.with_extension("own.log"));
    own.logged("ready", |line| line.contains(" ready ").then_some(())).await;
    let mut submit = typed(&command("job submit"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let submitted = run_as(submit.current_dir(root)).await;
    assert_eq!(submitted.ok().into_bytes(), std::fs::read(root.join("README.md")).unwrap());
    let spare = labelled(&lines, "spare key")[0].split(' ').next().unwrap();
    let list = run(&["job", "list", "--json", "--api", &api]).await.json();
    let job = list["jobs"].as_array().unwrap().iter().find(|job| job["program"] == "builtin echo").unwrap();
    let took_part = run(&["job", "watch", job["id"].as_str().unwrap(), "--json", "--api", &api]).await.json();
    assert!(took_part["miners"].as_array().unwrap().iter().any(|miner| miner["hotkey"] == spare), "{took_part}");

    own.signal("TERM");
    assert_eq!(own.ended().await, Some(0));
    testnet.signal("TERM");
    assert_eq!(testnet.ended().await, Some(0));
    assert_eq!(processes_of(&dir), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn rounds_of_a_testnet_are_right_though_a_reducer_lies() {
    let _turn = turn().await;
    let flags = ["testnet", "--miners", "4", "--byzantine", "1", "--jobs", "4", "--reduce", "3", "--exit", "--json"];
    let report = run(&flags).await.json();
    let liars: Vec<_> = report["miners"].as_array().unwrap().iter().filter(|m| m["byzantine"] == true).collect();
    let reduce = &report["reduce"];
    assert_eq!((&reduce["rounds"], &reduce["correct"]), (&3.into(), &true.into()), "{report}");
    assert_eq!(reduce["blamed"], serde_json::json!([liars[0]["hotkey"]]), "{report}");
    assert!(reduce["wall_s"].as_f64() > Some(0.0), "{report}");
}

/// The builder that other projects use in their tests.
#[tokio::test(flavor = "multi_thread")]
async fn the_builder_kills_and_restarts_its_processes() {
    let _turn = turn().await;
    let mut testnet = within("start", Testnet::builder().miners(2).processes(BINARY).start()).await.unwrap();
    let dir = testnet.data_dir().to_path_buf();
    let workload = within("model", Workload::publish(testnet.client(), &dir, 2)).await.unwrap();
    for i in 0..2 {
        let child = testnet.validators_mut()[0].child().unwrap();
        let addresses = child.addresses().to_vec();
        let pid = child.pid();
        child.kill().await.unwrap();
        within("restart", child.restart()).await.unwrap();
        assert_eq!(child.addresses(), addresses, "the others know it by these");
        assert_ne!(child.pid(), pid);
        let job = testnet.client().jobs().submit(workload.order(i, 2)).await.unwrap();
        let result = end(&job).await.unwrap();
        assert!(workload.is_right(i, result.output.as_ref().unwrap()));
    }
    within("stop", testnet.shutdown()).await;
    none_left(&dir).await;
}
