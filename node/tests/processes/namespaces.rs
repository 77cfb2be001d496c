//! Networks as they are: lost packets and partitions, between network namespaces. Needs root, `ip` and `iptables`.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::kit::{Mesh, NodeProcess, Process, found, turn, write_countdown};

/// Work for some seconds: it runs still when the wire is cut.
const LONG: u64 = 3_000_000_000;

/// Runs a program of the system; what it said when it fails.
fn sh(words: &[&str]) -> Result<(), String> {
    let output = Command::new(words[0]).args(&words[1..]).output().map_err(|e| format!("{}: {e}", words[0]))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Namespaces on one bridge, each with a /24 of its own: nodes count peers by /24. Removed when dropped.
struct Wires {
    /// The bridge's, then one a node.
    names: Vec<String>,
}

impl Wires {
    fn new(nodes: usize) -> Result<Self, String> {
        let mark = format!("sn{:x}{:04x}", std::process::id(), rand::random::<u16>());
        let mut wires = Self { names: vec![format!("{mark}-hub")] };
        sh(&["ip", "netns", "add", &wires.names[0]])?;
        let hub = wires.names[0].clone();
        sh(&["ip", "-n", &hub, "link", "add", "br0", "type", "bridge"])?;
        sh(&["ip", "-n", &hub, "link", "set", "br0", "up"])?;
        for i in 0..nodes {
            let name = format!("{mark}-{i}");
            sh(&["ip", "netns", "add", &name])?;
            wires.names.push(name.clone());
            let port = format!("port{i}");
            sh(&["ip", "-n", &hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
            sh(&["ip", "-n", &hub, "link", "set", &port, "master", "br0", "up"])?;
            sh(&["ip", "-n", &name, "address", "add", &format!("{}/16", address(i)), "dev", "eth0"])?;
            sh(&["ip", "-n", &name, "link", "set", "eth0", "up"])?;
            sh(&["ip", "-n", &name, "link", "set", "lo", "up"])?;
            // What the tests need later: a kernel without it is found out now.
            wires.rule(i, &["-N", "probe"])?;
            wires.rule(
                i,
                &["-A", "probe", "-m", "statistic", "--mode", "random", "--probability", "0.5", "-j", "DROP"],
            )?;
        }
        Ok(wires)
    }

    /// The wires, or a word that the test is skipped.
    fn or_skip(nodes: usize) -> Option<Self> {
        match Self::new(nodes) {
            Ok(wires) => Some(wires),
            Err(reason) => {
                println!("skipped: network namespaces need root, ip and iptables with its statistic match: {reason}");
                None
            }
        }
    }

    fn inside(&self, i: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.names[i + 1]].map(str::to_owned).to_vec()
    }

    fn rule(&self, i: usize, words: &[&str]) -> Result<(), String> {
        let inside = self.inside(i);
        let prefix = inside.iter().map(String::as_str).chain(["iptables", "-w"]);
        sh(&prefix.chain(words.iter().copied()).collect::<Vec<_>>())
    }

    /// Drops this share of what arrives at a node.
    fn lose(&self, i: usize, share: &str) {
        let random = ["-m", "statistic", "--mode", "random", "--probability", share, "-j", "DROP"];
        self.rule(i, &[&["-A", "INPUT", "-i", "eth0"], &random[..]].concat()).unwrap();
    }

    /// Drops everything between two nodes.
    fn cut(&self, i: usize, other: usize) {
        for (here, there) in [(i, other), (other, i)] {
            self.rule(here, &["-A", "INPUT", "-s", &address(there), "-j", "DROP"]).unwrap();
        }
    }

    fn heal(&self, i: usize) {
        self.rule(i, &["-F", "INPUT"]).unwrap();
    }
}

fn address(i: usize) -> String {
    format!("10.77.{}.1", i + 1)
}

impl Drop for Wires {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(reason) = sh(&["ip", "netns", "delete", name]) {
                eprintln!("namespace left behind: {reason}");
            }
        }
    }
}

/// A validator (0), miners, and a light node (last), each in a namespace. Fields are dropped in this order.
struct Apart {
    nodes: Vec<NodeProcess>,
    mesh: Mesh,
    wires: Wires,
}

impl Apart {
    async fn start(miners: usize, loss: Option<&str>, validator: &str) -> Option<Self> {
        let wires = Wires::or_skip(miners + 2)?;
        if let Some(share) = loss {
            (0..miners + 2).for_each(|i| wires.lose(i, share));
        }
        let mesh = Mesh::empty(1).await;
        let mut apart = Self { nodes: Vec::new(), mesh, wires };
        for i in 0..miners + 2 {
            let (name, role, more) = match i {
                0 => ("validator-0".to_owned(), "validator", validator),
                i if i <= miners => (format!("miner-{i}"), "miner", ""),
                _ => ("light".to_owned(), "light", ""),
            };
            let config = format!(
                "[net]\nlisten = [\"/ip4/{}/tcp/4101\"]\nassume_reachable = true\nkeep_private_addresses = true\n\n{more}",
                address(i)
            );
            let bootstrap: Vec<String> = apart.nodes.first().map(|v| v.addresses.clone()).unwrap_or_default();
            apart.mesh.write_network(&bootstrap);
            let flags = ["--role", role, "--network", apart.mesh.network_file.to_str().unwrap()];
            let dir = apart.mesh.path(&name);
            let node = NodeProcess::start_in(&apart.wires.inside(i), &dir, &config, &flags).await;
            apart.nodes.push(node);
        }
        Some(apart)
    }

    fn light(&self) -> &NodeProcess {
        self.nodes.last().unwrap()
    }

    /// Waits until the validator is connected to all the others.
    async fn connected(&self) {
        let others = self.nodes.len() - 1;
        found("everyone is connected", || async {
            let peers = self.nodes[0].json(&["peers"]).await;
            let healthy = peers.as_array().unwrap().iter().filter(|p| p["state"] == "healthy").count();
            (healthy >= others).then_some(())
        })
        .await;
    }

    /// A small job on two miners; its result.
    async fn verified(&self, number: usize) -> Value {
        let input = self.mesh.path("input");
        std::fs::write(&input, format!("job {number}")).unwrap();
        let submit = ["job", "submit", "--builtin", "blake3", "--replicas", "2", "--wait", "--input"];
        let result = self.light().json(&[&submit[..], &[input.to_str().unwrap()]].concat()).await;
        let expected = blake3::hash(blake3::hash(format!("job {number}").as_bytes()).to_hex().as_bytes());
        assert_eq!(result["output"], expected.to_hex().as_str(), "{result}");
        result
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_verified_over_wires_that_lose_every_fifth_packet() {
    let _turn = turn().await;
    // From the first packet on: handshakes too.
    let Some(apart) = Apart::start(2, Some("0.2"), "").await else { return };
    for number in 0..5 {
        apart.verified(number).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_ends_jobs_with_a_reason_and_heals() {
    // Waits for deadlines most of the time, so it leaves the turn to others once its nodes run.
    let turn = turn().await;
    let patience = "[dispatch]\nqueue_wait_ms = 5000\nmodel_fetch_ms = 5000\n";
    let Some(apart) = Apart::start(2, None, patience).await else { return };
    apart.connected().await;
    apart.verified(0).await;
    let dir = apart.mesh.path("countdown");
    write_countdown(&dir);
    shorten(&dir);
    let light = apart.light();
    light.run(&["model", "publish", dir.to_str().unwrap()]).await.ok();
    let input = apart.mesh.path("long");
    std::fs::write(&input, LONG.to_le_bytes()).unwrap();
    let mut command = tokio::process::Command::new("ip");
    command.args(&apart.wires.inside(3)[1..]).arg(super::kit::BINARY);
    command.args(["job", "submit", &format!("{}/countdown", light.hotkey), "--input", input.to_str().unwrap()]);
    command.args(["--stream", "--api", &light.api]);
    let mut job = Process::start(&mut command, apart.mesh.path("job.log"));
    job.logged("the job is in the middle", |line| line.contains("begun").then_some(())).await;
    for miner in [1, 2] {
        apart.wires.cut(0, miner);
    }
    drop(turn);
    // The requester reaches its validator, which reaches nobody: it says so.
    let code = job.ended().await;
    assert_eq!(code, Some(5), "{}", job.log());
    let reason = job.log();
    assert!(reason.contains("failed: "), "{reason}");
    for node in [0, 1, 2] {
        apart.wires.heal(node);
    }
    apart.connected().await;
    apart.verified(1).await;
}

/// Lets the model's jobs take ten seconds at most: what runs past that is known to be lost.
fn shorten(dir: &Path) {
    let file = dir.join("model.toml");
    let manifest = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, manifest.replace("wall_ms = 60000", "wall_ms = 10000")).unwrap();
}
