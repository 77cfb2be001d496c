//! What a program that embeds a light node is promised: a small dependency tree, and nothing done behind its back.
//!
//! Nothing else runs in this process, so that what is global can be looked at.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// Crates that nobody who only submits jobs should have to build.
const HEAVY: &[&str] =
    &["axum", "bollard", "clap", "hyper", "subxt", "sundara-runtime", "tracing-subscriber", "wasmtime"];

/// Names of the crates that this package is built from, for this machine.
fn dependencies(features: &str) -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["tree", "--package", "sundara-node", "--no-default-features", "--features", features])
        .args(["--edges", "normal", "--prefix", "none", "--format", "{p}", "--locked", "--offline"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

#[test]
fn a_light_node_is_built_without_engines_and_servers() {
    let light = dependencies("light");
    assert!(light.contains("libp2p") && light.contains("sled"), "the tree is read: {light:?}");
    let heavy: Vec<_> = HEAVY.iter().filter(|name| light.contains(**name)).collect();
    assert!(heavy.is_empty(), "feature `light` pulls {heavy:?}");
    let full = dependencies("full");
    assert!(["axum", "clap", "wasmtime"].iter().all(|name| full.contains(*name)), "they are looked for by name");
}

/// What a process has that its parts share.
#[cfg(target_os = "linux")]
mod process {
    use std::collections::BTreeSet;

    /// TCP ports that this process accepts connections on.
    pub(crate) fn tcp_ports() -> BTreeSet<u16> {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        let sockets: BTreeSet<String> = fds
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .filter_map(|target| Some(target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
            .collect();
        let table = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (v4, v6) = (table("/proc/self/net/tcp"), table("/proc/self/net/tcp6"));
        let lines = v4.lines().skip(1).chain(v6.lines().skip(1));
        lines
            .filter_map(|line| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                // Address, peer and state (0A: listening) come second to fourth, the inode tenth.
                let listens = fields[3] == "0A" && sockets.contains(fields[9]);
                let (_, port) = fields[1].rsplit_once(':')?;
                listens.then(|| u16::from_str_radix(port, 16).unwrap())
            })
            .collect()
    }

    /// Signals that this process handles itself, as the kernel's mask.
    pub(crate) fn handled_signals() -> String {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim().to_owned()
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_node_opens_its_own_port_and_installs_nothing() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    let panics = Arc::new(AtomicUsize::new(0));
    let (counted, before) = (panics.clone(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        counted.fetch_add(1, Ordering::SeqCst);
        before(panic);
    }));
    let (ports, signals) = (process::tcp_ports(), process::handled_signals());

    let node = sundara_node::Node::builder().loopback().start().await.unwrap();
    let [address] = node.addresses().await.try_into().expect("one address");
    let listened: u16 = address.split('/').nth(4).unwrap().parse().unwrap();
    let opened: Vec<u16> = process::tcp_ports().difference(&ports).copied().collect();
    assert_eq!(opened, [listened], "no port but the mesh's");
    assert_eq!(process::handled_signals(), signals, "no signal handler");
    assert!(!tracing::dispatcher::has_been_set(), "no subscriber");
    assert!(std::thread::spawn(|| panic!("to see who hears of it")).join().is_err());
    assert_eq!(panics.load(Ordering::SeqCst), 1, "no panic hook");
    node.shutdown().await;
    assert_eq!(process::tcp_ports(), ports);
}
