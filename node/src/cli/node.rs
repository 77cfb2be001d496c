//! A running node: start, banner, what is missing, shutdown.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use super::args::{LogArgs, NodeArgs};
use super::exit::{CliError, CliResult, Exit};
use super::out;
use super::signals::Signals;
use crate::api::{Invite, Node, Status};
use crate::builder::NodeBuilder;
use crate::config::{Config, LogFormat, NetworkConfig};
use crate::http::{self, Server};
use crate::presets::Role;
use crate::telemetry;

/// Written whole once the node listens: its addresses as a JSON list. Removed when it stops.
const LISTENING_FILE: &str = "listening.json";
/// How often it is looked at what the node still misses. Nothing waits for it but the operator's eyes.
const LOOK_EVERY: Duration = Duration::from_secs(10);

pub(super) fn run(args: &NodeArgs, log: &LogArgs) -> CliResult {
    let config = args.resolve(log)?.value;
    if config.node.roles.is_empty() {
        let message = "say what the node is to be: --role light, executor, miner or validator, several with commas; `sundara-node --help` lists commands";
        return Err(CliError::new(Exit::Usage, message));
    }
    telemetry::init(&config.log).map_err(|e| CliError::new(Exit::Usage, e))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(serve(config));
    // What still blocks a thread after the shutdown is not waited for.
    runtime.shutdown_background();
    ended
}

async fn serve(config: Config) -> CliResult {
    let mut signals = Signals::new()?;
    let listening = config.node.data_dir.join(LISTENING_FILE);
    remove(&listening)?;
    let node = tokio::select! {
        started = builder(&config)?.start() => started?,
        () = signals.next() => return Ok(Exit::Interrupted),
    };
    let api = match config.http.enabled {
        true => Some(http::serve(node.clone(), &config.http, config.node.data_dir.join("spool")).await),
        false => None,
    };
    let api = match api.transpose() {
        Ok(api) => api,
        Err(error) => {
            node.shutdown().await;
            return Err(error.into());
        }
    };
    let ended = work(&node, api.as_ref(), &config, &listening, &mut signals).await;
    tracing::info!("shutting down: running jobs are drained; a second signal stops at once");
    let shutdown = async {
        if let Some(api) = api {
            api.shutdown().await;
        }
        node.shutdown().await;
    };
    let exit = tokio::select! {
        () = shutdown => ended,
        () = signals.next() => Ok(Exit::Interrupted),
    };
    remove(&listening)?;
    exit
}

/// Until a signal comes, or the node is not whole any more.
async fn work(
    node: &Node,
    api: Option<&Server>,
    config: &Config,
    listening: &Path,
    signals: &mut Signals,
) -> CliResult {
    let show = async {
        let addresses = node.addresses().await;
        write_whole(listening, &serde_json::to_vec(&addresses)?)?;
        let status = node.status().await;
        banner(node, &status, &addresses, api, config);
        watch(node, status).await
    };
    tokio::select! {
        () = signals.next() => Ok(Exit::Ok),
        () = standard_input_ends(), if config.node.stop_with_stdin => Ok(Exit::Ok),
        failure = node.failed() => {
            let message = format!("task {} broke: {}; start the node again", failure.task, failure.detail);
            Err(CliError::new(Exit::Failure, message))
        }
        ended = show => ended,
    }
}

fn builder(config: &Config) -> Result<NodeBuilder, CliError> {
    let builder = Node::builder().config(config.clone());
    if !config.node.roles.contains(&Role::Executor) {
        return Ok(builder);
    }
    let Some(file) = &config.attach.invite else {
        let message = "an executor needs its owner's invitation: --role executor --miner ADDR --invite FILE (the owner writes it with `executor invite`)";
        return Err(CliError::new(Exit::Usage, message));
    };
    let invite = Invite::read(file).map_err(|e| CliError::new(Exit::Usage, e))?;
    // The invitation names its mesh; settings that name another are a mistake.
    if config.network != NetworkConfig::default() {
        invite.check(&config.network.network()).map_err(|e| CliError::new(Exit::Usage, e))?;
    }
    let owner = config.attach.miner.iter().chain(&config.attach.validator).map(|address| {
        address.parse().map_err(|e| CliError::new(Exit::Usage, format!("attach: address `{address}`: {e}")))
    });
    Ok(builder.invited(invite, owner.collect::<Result<_, _>>()?))
}

fn banner(node: &Node, status: &Status, addresses: &[String], api: Option<&Server>, config: &Config) {
    let roles = config.node.roles.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let api = api.map_or_else(|| "off".to_owned(), |api| format!("http://{}", api.address()));
    let (hotkey, peer_id, mesh) = (node.hotkey(), node.peer_id(), node.network().tag());
    if config.log.format == LogFormat::Json {
        let (version, missing) = (status.version, &status.missing);
        tracing::info!(version, %roles, %hotkey, peer_id, mesh, ?addresses, api, ?missing, "the node runs");
        return;
    }
    let mut lines = vec![
        format!("sundara-node {} runs as {roles} on mesh {mesh}", status.version),
        format!("  hotkey    {hotkey}"),
        format!("  peer id   {peer_id}"),
    ];
    let labelled = |label: &'static str, items: &[String]| {
        let line = move |(i, item): (usize, &String)| format!("  {:<9} {item}", if i == 0 { label } else { "" });
        items.iter().enumerate().map(line).collect::<Vec<_>>()
    };
    lines.extend(labelled("address", addresses));
    lines.push(format!("  api       {api}"));
    lines.push(format!("  data      {}", config.node.data_dir.display()));
    lines.extend(labelled("missing", &status.missing));
    out::note(&lines.join("\n"));
}

/// Says when something comes to be missing, and when nothing is any more.
async fn watch(node: &Node, first: Status) -> CliResult {
    let mut known: BTreeSet<String> = first.missing.into_iter().collect();
    let mut ready = false;
    loop {
        let status = node.status().await;
        let missing: BTreeSet<String> = status.missing.iter().cloned().collect();
        for new in missing.difference(&known) {
            tracing::warn!("missing: {new}");
        }
        for gone in known.difference(&missing) {
            tracing::info!("no longer missing: {gone}");
        }
        if status.is_ready() != ready {
            ready = !ready;
            match ready {
                true => tracing::info!(peers = status.net.as_ref().map(|net| net.connected), "ready"),
                false => tracing::warn!("not ready: see `sundara-node status`"),
            }
        }
        known = missing;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Returns when whoever holds the other end of standard input is gone. The thread that waits for it ends with the process.
async fn standard_input_ends() {
    let read = || std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
    let ended = tokio::task::spawn_blocking(read).await;
    tracing::info!(whole = matches!(ended, Ok(Ok(_))), "standard input ended (node.stop_with_stdin)");
}

/// Writes a file that others read, so that they never see a part of it.
fn write_whole(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, content)?;
    std::fs::rename(&temporary, path)
}

fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
