//! The examples as their readers run them: processes of their own, against a mesh on this machine.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use sundara_node::JobOrder;
use sundara_node::config::HttpConfig;
use sundara_node::http;
use sundara_node::testnet::{Testnet, digit_images};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

/// Long enough for a debug build on a busy machine; a test that reaches it hangs.
const PATIENCE: Duration = Duration::from_secs(180);

const MANIFEST: &str = "name = \"digits\"\nversion = 1\nprogram = \"digits.wasm\"\n";

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("the test made no progress")
}

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// An example, built with the tests' own profile into their own directory. Where all tests are run, it is there already.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().unwrap().parent().unwrap();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = std::process::Command::new(cargo);
    build.args(["build", "--quiet", "--workspace", "--locked", "--example", name]).current_dir(here());
    build.arg("--target-dir").arg(profile.parent().unwrap());
    if profile.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().unwrap().success(), "cargo build --example {name}");
    let mut command = Command::new(profile.join("examples").join(name));
    command.kill_on_drop(true);
    command
}

/// The arguments by which an example joins the mesh.
fn mesh(testnet: &Testnet) -> [String; 3] {
    [testnet.name().to_owned(), testnet.bootstrap()[0].clone(), testnet.validators()[0].hotkey.to_string()]
}

fn printed(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    out.into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_light_node_submits_streams_and_checks() {
    let mut light_node = example("light_node");
    let testnet = within(Testnet::builder().miners(2).start()).await.unwrap();
    let output = within(light_node.args(mesh(&testnet)).output()).await.unwrap();
    let printed = printed(&output);
    let (streamed, verdict) = printed.split_once('\n').unwrap();
    assert_eq!(streamed, "hello, mesh");
    // A new miner is audited at first, and the job's own two attestations stand in either case.
    assert!(verdict.starts_with("Quorum(2), ") || verdict.starts_with("Audited, "), "{verdict}");
    assert!(verdict.trim_end().ends_with("2 attestations hold"), "{verdict}");
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_published_from_a_node_of_ones_own_and_runs() {
    let mut publish_model = example("publish_model");
    let testnet = within(Testnet::builder().miners(2).start()).await.unwrap();
    let model = tempfile::tempdir().unwrap();
    std::fs::write(model.path().join("model.toml"), MANIFEST).unwrap();
    std::fs::copy(here().join("guests/digits/digits.wasm"), model.path().join("digits.wasm")).unwrap();
    let data = tempfile::tempdir().unwrap();
    let mut publisher =
        publish_model.args(mesh(&testnet)).args([data.path(), model.path()]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(publisher.stdout.take().unwrap()).lines();
    let name = within(lines.next_line()).await.unwrap().expect("it says the model's name");
    assert!(name.ends_with("/digits@1"), "{name}");
    // A node that has just joined may find nobody to tell yet, and tells again in a moment.
    within(async {
        while testnet.client().models().resolve(&name).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    let (image, label) = digit_images().swap_remove(0);
    let order = JobOrder::model(name).input(image).replicas(2);
    let result = within(testnet.client().jobs().submit(order).await.unwrap().result()).await.unwrap();
    let line = String::from_utf8(result.output.clone().unwrap().to_vec()).unwrap();
    assert!(line.starts_with(&format!("{{\"label\":{label},")), "{line}");
    assert_eq!(result.verify().unwrap().attestations.len(), 2);
    publisher.kill().await.unwrap();
    within(testnet.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn python_submits_and_streams_through_the_api() {
    let python = Command::new("python3").arg("--version").output().await;
    if !python.is_ok_and(|output| output.status.success()) {
        println!("skipped: python3 is not installed");
        return;
    }
    let testnet = within(Testnet::builder().miners(2).start()).await.unwrap();
    let mut config = HttpConfig::default();
    config.listen = ([127, 0, 0, 1], 0).into();
    let spool = tempfile::tempdir().unwrap();
    let api = http::serve(testnet.client().clone(), &config, spool.path().to_path_buf()).await.unwrap();
    let proof = spool.path().join("job.proof");
    let output = Command::new("python3")
        .arg(here().join("light_node.py"))
        .args(["--api", &format!("http://{}", api.address()), "--text", "hello from python"])
        .arg("--proof")
        .arg(&proof)
        .kill_on_drop(true)
        .output();
    let output = within(output).await.unwrap();
    assert_eq!(printed(&output), "hello from python");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("completed in"), "{said}");
    assert!(proof.metadata().unwrap().len() > 0);
    api.shutdown().await;
    within(testnet.shutdown()).await;
}

#[test]
fn the_readme_shows_the_example() {
    let readme = std::fs::read_to_string(here().parent().unwrap().join("README.md")).unwrap();
    let section = readme.split("## Embedding in ten lines").nth(1).unwrap();
    let shown = section.split("```rust\n").nth(1).unwrap().split("```").next().unwrap();
    let example = std::fs::read_to_string(here().join("light_node.rs")).unwrap();
    let mut lines = example.lines().map(|line| line.split(" // ").next().unwrap().trim());
    for line in shown.lines().filter(|line| !line.is_empty()) {
        assert!(lines.any(|found| found == line.trim()), "light_node.rs has no line, or not here: {line}");
    }
}
