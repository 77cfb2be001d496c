//! Executors in processes of their own, for a miner and for a validator.

use std::path::PathBuf;

use sundara_node::JobOrder;
use sundara_proto::verdict::VerdictKind;

use super::kit::{Mesh, NodeProcess, end, found, local_config, run, turn};

/// Has `owner` write an invitation; `more` goes to the command.
async fn invite(mesh: &Mesh, owner: &NodeProcess, name: &str, more: &[&str]) -> PathBuf {
    let file = mesh.path(name);
    let args = [&["executor", "invite", file.to_str().unwrap()], more].concat();
    owner.run(&args).await.ok();
    file
}

/// Flags of an executor; `whose` is `--miner` or `--validator`. The mesh is in the invitation.
fn flags<'a>(whose: &'a str, owner: &'a NodeProcess, file: &'a str) -> Vec<&'a str> {
    vec!["--role", "executor", whose, &owner.addresses[0], "--invite", file]
}

/// Starts an executor of `owner` with this hardware class, and waits until it is attached.
pub async fn executor(mesh: &Mesh, name: &str, owner: &NodeProcess, whose: &str, class: &str) -> NodeProcess {
    let file = invite(mesh, owner, &format!("{name}.invite"), &[]).await;
    let config = local_config(&format!("[executor]\nslots = 1\nhardware_class = {class:?}\n"));
    let flags = flags(whose, owner, file.to_str().unwrap());
    let mut executor = NodeProcess::start(&mesh.path(name), &config, &flags).await;
    executor.process.logged("attached", |line| line.contains("attached owner=").then_some(())).await;
    executor
}

/// Waits until the owner lists an attached executor, and returns what it says of it.
async fn listed(owner: &NodeProcess, fits: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
    found("the owner lists its executor", || async {
        let status = owner.json(&["status"]).await;
        let executors = status["executors"].as_array().unwrap().clone();
        executors.into_iter().find(|executor| executor["in_process"] == false && fits(executor))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invited_executor_serves_its_miner() {
    let _turn = turn().await;
    let mesh = Mesh::start(1, 1).await;
    let requester = mesh.requester().await;
    let miner = &mesh.miners[0];
    let box_one = executor(&mesh, "box", miner, "--miner", "box").await;
    assert_eq!(listed(miner, |_| true).await["hardware_class"], "box");
    let order = JobOrder::builtin("echo").input("hello").hardware_class("box");
    let job = requester.jobs().submit(order).await.unwrap();
    let result = end(&job).await.unwrap();
    assert_eq!(result.output.as_deref(), Some(&b"hello"[..]));
    // Its key is under the attestation, its miner's hotkey over it.
    let proof = result.verify().unwrap();
    let attested = &proof.attestations[0];
    let node = box_one.json(&["status"]).await["net"]["node"].clone();
    assert_eq!(serde_json::json!(attested.attestation.executor()), node);
    assert_eq!(attested.miner(), miner.hotkey);
    requester.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_lists_its_executors_and_sends_them_away() {
    let _turn = turn().await;
    let mesh = Mesh::start(1, 1).await;
    let miner = &mesh.miners[0];
    let mut one = executor(&mesh, "box", miner, "--miner", "box").await;
    let node = one.json(&["status"]).await["net"]["node"].as_str().unwrap().to_owned();
    let list = async || {
        let list = miner.json(&["executor", "list"]).await;
        list.as_array().unwrap().iter().find(|executor| executor["node"] == *node).cloned()
    };
    let known = found("it is listed", &list).await;
    assert_eq!(
        (&known["attached"], &known["slots"], &known["hardware_class"]),
        (&true.into(), &1.into(), &"box".into())
    );
    let table = miner.run(&["executor", "list"]).await.ok();
    assert!(table.contains("inside") && table.contains("attached") && table.contains(&node), "{table}");

    // One that is away is known.
    one.process.kill().await;
    let away = async || list().await.filter(|executor| executor["attached"] == false);
    found("it is away", away).await;
    assert!(miner.run(&["executor", "list"]).await.ok().contains("away"));
    one.restart().await;
    found("it is back", async || list().await.filter(|executor| executor["attached"] == true)).await;

    // Sent away it stays away: its certificate is renewed no more.
    assert_eq!(miner.json(&["executor", "revoke", &node]).await["revoked"], node.as_str());
    assert!(list().await.is_none());
    one.process.logged("told", |line| line.contains("not attached").then_some(())).await;
    one.process.kill().await;
    one.restart().await;
    one.process.logged("told again", |line| line.contains("not attached").then_some(())).await;
    assert!(list().await.is_none());
    let unknown = miner.run(&["executor", "revoke", &node]).await;
    assert!(unknown.failed(4).contains("executor"), "{unknown:?}");
    // A miner and a validator have executors, a light node has none.
    let light = mesh.node("light", "light", &local_config("")).await;
    assert_eq!(light.json(&["executor", "list"]).await, serde_json::json!([]));
    light.run(&["executor", "revoke", &node]).await.failed(4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invited_executor_audits_for_its_validator() {
    let _turn = turn().await;
    let mesh = Mesh::start(1, 2).await;
    let requester = mesh.requester().await;
    let validator = &mesh.validators[0];
    let _trusted = executor(&mesh, "trusted", validator, "--validator", "cpu").await;
    listed(validator, |_| true).await;
    // A new miner is audited at every job, and audits go to the executor that is there for them.
    let job = requester.jobs().submit(JobOrder::builtin("echo").input("hello")).await.unwrap();
    assert_eq!(end(&job).await.unwrap().kind(), &VerdictKind::Audited);
    assert_eq!(listed(validator, |e| e["done"].as_u64() > Some(0)).await["done"], 1);
    requester.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_expired_or_used_invitation_is_refused_in_words() {
    let _turn = turn().await;
    let mesh = Mesh::start(1, 1).await;
    let miner = &mesh.miners[0];
    let config = local_config("[executor]\nslots = 1\n");

    // No invitation, and one that is none.
    let without = run(&["--role", "executor", "--data-dir", mesh.path("none").to_str().unwrap(), "--api", "off"]).await;
    assert!(without.failed(2).contains("--invite FILE"), "{without:?}");
    let junk = mesh.path("junk.invite");
    std::fs::write(&junk, "{}").unwrap();
    let args = flags("--miner", miner, junk.to_str().unwrap());
    let dir = mesh.path("junk");
    let refused = run(&[&args[..], &["--data-dir", dir.to_str().unwrap(), "--api", "off"]].concat()).await;
    assert!(refused.failed(2).contains("executor invite"), "{refused:?}");

    // Settings that name another mesh than the invitation.
    let mine = invite(&mesh, miner, "mine.invite", &[]).await;
    let elsewhere = mesh.path("elsewhere.toml");
    std::fs::write(&elsewhere, "name = \"elsewhere\"\n").unwrap();
    let args = flags("--miner", miner, mine.to_str().unwrap());
    let more = ["--network", elsewhere.to_str().unwrap(), "--data-dir", dir.to_str().unwrap(), "--api", "off"];
    let refused = run(&[&args[..], &more].concat()).await;
    assert!(refused.failed(2).contains("--network"), "{refused:?}");

    // A file that exists is not overwritten, least of all a key.
    let over = miner.run(&["executor", "invite", junk.to_str().unwrap()]).await;
    assert!(over.failed(1).contains("junk.invite"), "{over:?}");

    // Used by one, then shown by another; and one whose time is over before it is shown.
    let file = invite(&mesh, miner, "used.invite", &[]).await;
    let first = flags("--miner", miner, file.to_str().unwrap());
    let mut one = NodeProcess::start(&mesh.path("one"), &config, &first).await;
    one.process.logged("attached", |line| line.contains("attached owner=").then_some(())).await;
    let expired = invite(&mesh, miner, "expired.invite", &["--life", "0"]).await;
    let expired = flags("--miner", miner, expired.to_str().unwrap());
    let guessed = mesh.path("guessed.invite");
    let text = std::fs::read_to_string(&file).unwrap();
    let token = text.lines().find(|line| line.starts_with("token = ")).unwrap();
    std::fs::write(&guessed, text.replace(token, &format!("token = {:?}", "0".repeat(64)))).unwrap();
    let guessed = flags("--miner", miner, guessed.to_str().unwrap());
    for (name, flags, words) in
        [("used", &first, "used by another"), ("expired", &expired, "expired"), ("guessed", &guessed, "unknown")]
    {
        let mut other = NodeProcess::start(&mesh.path(name), &config, flags).await;
        let reason = other.process.logged(name, |line| line.contains("not attached").then(|| line.to_owned())).await;
        assert!(reason.contains(words), "{name}: {reason}");
        // It says so to whoever asks, too, and goes on trying.
        let missing = other.json(&["status"]).await["missing"].to_string();
        assert!(missing.contains("its owner"), "{missing}");
    }
}
