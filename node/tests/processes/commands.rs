//! Commands against running nodes: what they print, as text and as JSON, and how they end.

use std::path::Path;
use std::process::Stdio;

use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::kit::{BINARY, Mesh, NodeProcess, found, local_config, run, turn, within, write_countdown};

/// A mesh with a light node, and a third miner that runs no builtin jobs.
async fn scene() -> (Mesh, NodeProcess, NodeProcess) {
    let mesh = Mesh::start(1, 2).await;
    let picky = mesh.node("picky", "miner", &local_config("[miner]\nbuiltin_jobs = false\n")).await;
    let light = mesh.node("light", "light", &local_config("")).await;
    (mesh, light, picky)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_submitted_streamed_proven_listed_and_cancelled() {
    let _turn = turn().await;
    let (mesh, light, picky) = scene().await;
    let input = mesh.path("input");
    std::fs::write(&input, "three words here\n").unwrap();
    results(&mesh, &light, &input).await;
    proofs(&mesh, &light, &input).await;
    ends_without_a_result(&light, &input).await;
    declines_and_cancels(&light, &picky, &input).await;
}

async fn results(mesh: &Mesh, light: &NodeProcess, input: &Path) {
    let content = std::fs::read(input).unwrap();
    let submit = ["job", "submit", "--builtin", "echo", "--input", text(input), "--replicas", "2"];
    let waited = light.run(&[&submit[..], &["--wait"]].concat()).await;
    assert_eq!(waited.ok().into_bytes(), content);
    assert!(waited.err.contains("job ") && waited.err.contains("by 2 miner(s)"), "{}", waited.err);

    let result = light.json(&[&submit[..], &["--wait"]].concat()).await;
    assert_eq!(result["outcome"], "completed");
    assert!(["quorum(2)", "audited"].contains(&result["verdict"].as_str().unwrap()), "{result}");
    assert_eq!(result["output"], blake3::hash(&content).to_hex().as_str());
    assert_eq!(result["miners"].as_array().unwrap().len(), 2);

    assert_eq!(light.run(&[&submit[..], &["--stream"]].concat()).await.ok().into_bytes(), content);
    let output = mesh.path("output");
    let to_file = light.run(&[&submit[..], &["--output", text(&output)]].concat()).await;
    assert_eq!((to_file.ok(), std::fs::read(&output).unwrap()), (String::new(), content));

    // From standard input, longer than what rides in one message, with parameters from a file.
    let mut large = Command::new(BINARY);
    large.args(["job", "submit", "--builtin", "blake3", "--input", "-", "--wait", "--params"]);
    large.arg(format!("@{}", text(input))).args(["--api", &light.api]);
    let mut large =
        large.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let bytes = vec![7; 1 << 20];
    let mut stdin = large.stdin.take().unwrap();
    stdin.write_all(&bytes).await.unwrap();
    drop(stdin);
    let ended = within("a large input", large.wait_with_output()).await.unwrap();
    assert_eq!(ended.stdout, blake3::hash(&bytes).to_hex().as_bytes(), "{}", String::from_utf8_lossy(&ended.stderr));

    // Without --wait the id, which can be watched.
    let id = light.run(&submit).await.ok();
    let watched = light.json(&["job", "watch", id.trim()]).await;
    assert_eq!(watched["job"], id.trim());
    let list = light.json(&["job", "list"]).await;
    let jobs = list["jobs"].as_array().unwrap();
    assert!(jobs.iter().any(|job| job["id"] == id.trim() && job["phase"] == "finished"), "{list}");
    assert!(list["miner"].is_null(), "a light node is offered nothing: {list}");
    let table = light.run(&["job", "list", "--limit", "1"]).await.ok();
    assert!(table.starts_with("JOB") && table.contains("builtin echo") && table.lines().count() == 2, "{table}");
}

async fn proofs(mesh: &Mesh, light: &NodeProcess, input: &Path) {
    let proof = mesh.path("proof");
    let submit = ["job", "submit", "--builtin", "echo", "--replicas", "2", "--input", text(input)];
    light.run(&[&submit[..], &["--proof", text(&proof)]].concat()).await.ok();
    let verify = ["attestation", "verify", text(&proof)];
    let words = run(&verify).await.ok();
    assert!(words.contains("The proof holds") && words.contains("name those you believe"), "{words}");
    let validator = mesh.validators[0].hotkey.to_string();
    let proven = run(&[&verify[..], &["--validator", &validator, "--json"]].concat()).await.json();
    assert_eq!((&proven["verified"], &proven["validator_trusted"]), (&Value::Bool(true), &Value::Bool(true)));
    assert_eq!(proven["attestations"].as_array().unwrap().len(), 2);
    let other = mesh.miners[0].hotkey.to_string();
    let distrusted = run(&[&verify[..], &["--validator", &other]].concat()).await;
    assert!(distrusted.failed(6).contains("none of those named"), "{distrusted:?}");

    // Every byte counts: the proof with any one changed, or cut short, proves nothing.
    let good = std::fs::read(&proof).unwrap();
    let bad = mesh.path("bad-proof");
    let tampered = (0..8).map(|i| {
        let mut bytes = good.clone();
        let at = good.len() * i / 8;
        bytes[at] ^= 1;
        bytes
    });
    let cut = [good[..good.len() / 2].to_vec(), Vec::new()];
    for (i, bytes) in tampered.chain(cut).enumerate() {
        std::fs::write(&bad, bytes).unwrap();
        let refused = run(&["attestation", "verify", text(&bad)]).await;
        assert!(refused.failed(6).contains("proves nothing"), "{i}: {refused:?}");
    }
    let nowhere = run(&["attestation", "verify", text(&mesh.path("nowhere"))]).await;
    assert!(nowhere.failed(1).contains("nowhere"), "{nowhere:?}");
}

async fn ends_without_a_result(light: &NodeProcess, input: &Path) {
    let exit = light.run(&["job", "submit", "--builtin", "exit", "--params", "7", "--wait"]).await;
    assert!(exit.failed(5).contains("exit_code(7)"), "{exit:?}");
    let model = format!("{}/nothing", light.hotkey);
    let unknown = light.run(&["job", "submit", &model, "--wait"]).await;
    assert!(unknown.failed(4).contains("nothing"), "{unknown:?}");
    let nowhere = light.run(&["job", "submit", "--builtin", "echo", "--input", "/nowhere"]).await;
    assert!(nowhere.failed(1).contains("--input /nowhere"), "{nowhere:?}");
    let usage = light.run(&["job", "submit", "--builtin", "echo", "--replicas", "0", "--input", text(input)]).await;
    assert!(usage.failed(2).contains("--replicas"), "{usage:?}");
    let stranger = light.run(&["job", "watch", &"0".repeat(64)]).await;
    assert!(stranger.failed(4).contains("no job"), "{stranger:?}");
    let api = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", free.local_addr().unwrap())
    };
    let nobody = run(&["status", "--api", &api]).await;
    assert!(nobody.failed(3).contains("cannot reach the API") && nobody.err.contains(&api), "{nobody:?}");
}

async fn declines_and_cancels(light: &NodeProcess, picky: &NodeProcess, input: &Path) {
    // Three replicas need the miner that will not: the job waits, and can be stopped.
    let submit = ["job", "submit", "--builtin", "echo", "--replicas", "3", "--input", text(input)];
    let id = light.run(&submit).await.ok().trim().to_owned();
    let declined = found("the picky miner declines", || async {
        let list = picky.json(&["job", "list"]).await;
        let offers = list["miner"].as_array().unwrap().clone();
        offers.into_iter().find(|offer| offer["job"] == *id && offer["state"] == "declined")
    })
    .await;
    assert!(declined["detail"].as_str().unwrap().contains("miner.builtin_jobs"), "{declined}");
    let table = picky.run(&["job", "list"]).await.ok();
    assert!(table.contains("declined") && table.contains("miner.builtin_jobs"), "{table}");
    let cancelled = light.json(&["job", "cancel", &id]).await;
    assert_eq!(cancelled["id"], id.as_str());
    let watched = light.run(&["job", "watch", &id, "--json"]).await;
    assert!(watched.failed(5).contains("cancelled"), "{watched:?}");
    let said: Value = serde_json::from_slice(&watched.out).unwrap();
    assert_eq!((&said["job"], &said["failed"]), (&Value::from(id), &Value::from("cancelled")));

    // One that runs.
    let id = light.run(&["job", "submit", "--builtin", "sleep"]).await.ok().trim().to_owned();
    found("it runs", || async {
        let list = light.json(&["job", "list"]).await;
        let jobs = list["jobs"].as_array().unwrap();
        jobs.iter().any(|job| job["id"] == *id && job["phase"] == "running").then_some(())
    })
    .await;
    light.run(&["job", "cancel", &id]).await.ok();
    assert!(light.run(&["job", "watch", &id]).await.failed(5).contains("cancelled"));
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_published_fetched_pinned_and_removed() {
    let _turn = turn().await;
    let mesh = Mesh::start(1, 1).await;
    let light = mesh.node("light", "light", &local_config("")).await;
    let dir = mesh.path("countdown");
    let none = light.run(&["model", "publish", text(&dir)]).await;
    assert!(none.failed(4).contains("model.toml"), "{none:?}");
    write_countdown(&dir);
    let published = light.json(&["model", "publish", text(&dir)]).await;
    let model = format!("{}/countdown", light.hotkey);
    let digest = published["model"].as_str().unwrap();
    let here = |list: &Value| list.as_array().unwrap().iter().find(|m| m["model"] == digest).cloned();
    assert!(here(&light.json(&["model", "list"]).await).is_some_and(|m| m["local"] == true));
    assert!(light.run(&["model", "list"]).await.ok().contains("countdown"));
    // The version does not go up.
    let program = dir.join("countdown.wasm");
    let mut changed = std::fs::read(&program).unwrap();
    // An empty custom section.
    changed.extend([0, 1, 0]);
    std::fs::write(&program, changed).unwrap();
    let again = light.run(&["model", "publish", text(&dir)]).await;
    assert!(again.failed(4).contains("version"), "{again:?}");

    // Another node finds it in the DHT.
    let miner = &mesh.miners[0];
    let shown = found("the record is found", || async {
        let shown = miner.run(&["model", "show", &model, "--json"]).await;
        (shown.code == Some(0)).then(|| shown.json())
    })
    .await;
    assert!(shown.to_string().contains("countdown.wasm"), "{shown}");
    assert!(miner.run(&["model", "show", &model]).await.ok().contains("countdown"));
    miner.json(&["model", "fetch", &model]).await;
    assert!(here(&miner.json(&["model", "list"]).await).is_some_and(|m| m["local"] == true));
    miner.json(&["model", "pin", &model]).await;
    assert!(here(&miner.json(&["model", "list"]).await).is_some_and(|m| m["pinned"] == true));
    miner.json(&["model", "pin", "--undo", &model]).await;
    assert!(here(&miner.json(&["model", "list"]).await).is_some_and(|m| m["pinned"] == false));
    miner.json(&["model", "rm", &model]).await;
    assert!(here(&miner.json(&["model", "list"]).await).is_none_or(|m| m["local"] == false));
    miner.json(&["model", "gc"]).await;
    let unknown = miner.run(&["model", "show", &format!("{}/nothing", light.hotkey)]).await;
    assert!(unknown.failed(4).contains("nothing"), "{unknown:?}");

    // And it runs, by name.
    let input = mesh.path("input");
    std::fs::write(&input, 1_000_u64.to_le_bytes()).unwrap();
    let ran = light.run(&["job", "submit", &model, "--input", text(&input), "--wait"]).await;
    assert_eq!(ran.ok().as_bytes(), super::kit::COUNTED);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_says_how_it_is_and_where_its_settings_come_from() {
    let _turn = turn().await;
    let mesh = Mesh::start(1, 1).await;
    let (validator, miner) = (&mesh.validators[0], &mesh.miners[0]);
    let light = mesh.node("light", "light", &local_config("")).await;
    let of = |peers: &Value, hotkey: &str| {
        peers.as_array().unwrap().iter().find(|p| p["hotkey"] == hotkey && p["state"] == "healthy").cloned()
    };
    let peer = found("the validator is a healthy peer", || async {
        of(&light.json(&["peers"]).await, &validator.hotkey.to_string())
    })
    .await;
    assert!(peer["roles"].to_string().contains("validator"), "{peer}");
    let table = light.run(&["peers"]).await.ok();
    assert!(table.starts_with("PEER_ID") && table.contains("healthy"), "{table}");
    let status = miner.json(&["status"]).await;
    assert_eq!(
        (&status["roles"], &status["hotkey"]),
        (&serde_json::json!(["miner"]), &Value::from(miner.hotkey.to_string()))
    );
    assert_eq!(status["net"]["bootstrap"][0]["connected"], true);
    assert_eq!(status["executors"].as_array().unwrap().len(), 1);
    let words = validator.run(&["status"]).await.ok();
    assert!(words.contains("net.connected") && words.contains("dispatch.live"), "{words}");

    let network = text(&mesh.network_file);
    let data = text(&miner.dir);
    let show = [
        "config",
        "show",
        "--role",
        "miner",
        "--network",
        network,
        "--data-dir",
        data,
        "--listen",
        "/ip4/127.0.0.1/tcp/0",
    ];
    let shown = run(&[&show[..], &["--json"]].concat()).await.json();
    let origin = |key: &str| shown[key]["origin"].clone();
    assert_eq!(origin("net.bootstrap"), serde_json::json!({"from": "network", "at": network}));
    assert_eq!(shown["net.bootstrap"]["value"], serde_json::json!(validator.addresses));
    assert_eq!(origin("net.listen"), serde_json::json!({"from": "flag", "at": "--listen"}));
    assert_eq!(origin("http.listen")["from"], "file");
    assert_eq!(origin("executor.slots"), serde_json::json!({"from": "default"}));
    let words = run(&show).await.ok();
    assert!(words.contains("[net]") && words.contains("# flag --listen") && words.contains("# default"), "{words}");
    // Typing errors are told with their remedy.
    std::fs::write(mesh.path("bad.toml"), "[net]\nlisen = []\n").unwrap();
    let bad = run(&["config", "show", "--config", text(&mesh.path("bad.toml"))]).await;
    assert!(bad.failed(2).contains("net.listen"), "{bad:?}");
}
