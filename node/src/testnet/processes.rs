//! Nodes of a testnet as child processes of the `sundara-node` binary.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use sundara_chain::keys;
use sundara_proto::crypto::Network;
use sundara_proto::id::Hotkey;
use tokio::process::{Child, ChildStdin, Command};

use crate::api::StartError;
use crate::presets::Role;

/// Time in which a child must listen.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// Time that a child has to drain and end after it was asked to.
const STOP_WITHIN: Duration = crate::api::DRAIN_WITHIN.saturating_add(Duration::from_secs(15));
/// How often the child's state file is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What a child is to be.
pub(super) struct ChildSpec<'a> {
    pub(super) binary: &'a Path,
    pub(super) role: Role,
    pub(super) dir: &'a Path,
    pub(super) network: Network,
    pub(super) bootstrap: &'a [String],
    pub(super) trusted: &'a [Hotkey],
    pub(super) slots: u32,
}

/// A running child. Killed when dropped; stops by itself when this process is gone without having dropped it.
pub struct ChildNode {
    child: Child,
    /// Its end tells the child to drain and stop.
    stdin: Option<ChildStdin>,
    addresses: Vec<String>,
    log: PathBuf,
    restart: Restart,
}

/// How to start it again.
struct Restart {
    binary: PathBuf,
    dir: PathBuf,
    /// Where it listened before: the others know it by these addresses. Empty: any free port.
    listen: Vec<String>,
}

impl ChildNode {
    /// Writes key and configuration, starts the binary and waits until it listens.
    pub(super) async fn spawn(spec: &ChildSpec<'_>, seed: &[u8; 32]) -> Result<Self, StartError> {
        let data = |e: std::io::Error| StartError::Data(format!("{}: {e}", spec.dir.display()));
        std::fs::create_dir_all(spec.dir).map_err(data)?;
        let hotkey = spec.dir.join("hotkey");
        if !hotkey.exists() {
            keys::write_hotkey_seed(&hotkey, seed)?;
        }
        std::fs::write(spec.dir.join("config.toml"), configuration(spec)).map_err(data)?;
        let restart = Restart { binary: spec.binary.to_path_buf(), dir: spec.dir.to_path_buf(), listen: Vec::new() };
        restart.start().await
    }

    /// Addresses by which other nodes reach it.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Its log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Ends it at once, as a power cut would.
    ///
    /// # Errors
    /// When the process cannot be signalled.
    pub async fn kill(&mut self) -> std::io::Result<()> {
        self.child.kill().await
    }

    /// Starts it again on the same data and addresses after [`Self::kill`].
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn restart(&mut self) -> Result<(), StartError> {
        *self = self.restart.start().await?;
        Ok(())
    }

    /// Asks it to drain and end, and kills it when it does not.
    pub async fn stop(mut self) {
        drop(self.stdin.take());
        if tokio::time::timeout(STOP_WITHIN, self.child.wait()).await.is_ok() {
            return;
        }
        if let Err(e) = self.child.kill().await {
            tracing::warn!(error = %e, "a child process could not be killed");
        }
    }
}

impl Restart {
    async fn start(&self) -> Result<ChildNode, StartError> {
        let data = |e: std::io::Error| StartError::Data(format!("{}: {e}", self.dir.display()));
        let state = self.dir.join("listening.json");
        if let Err(e) = std::fs::remove_file(&state)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            return Err(data(e));
        }
        let log = self.dir.join("node.log");
        let output = std::fs::OpenOptions::new().create(true).append(true).open(&log).map_err(data)?;
        let mut child = Command::new(&self.binary)
            .arg("--data-dir")
            .arg(&self.dir)
            .args(self.listen.iter().flat_map(|address| ["--listen", address]))
            .env("SUNDARA_NODE__STOP_WITH_STDIN", "true")
            .stdin(Stdio::piped())
            .stdout(output.try_clone().map_err(data)?)
            .stderr(output)
            // A terminal's ctrl-c is for this process, which stops its children in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| StartError::Config(format!("{}: {e}", self.binary.display())))?;
        // Waiting for a child closes the standard input that it holds.
        let stdin = child.stdin.take();
        let ready = tokio::time::timeout(READY_WITHIN, listening(&state));
        let addresses = tokio::select! {
            ready = ready => ready.map_err(|_| {
                StartError::Config(format!("a child did not listen within {} s: see {}", READY_WITHIN.as_secs(), log.display()))
            })?,
            ended = child.wait() => {
                let status = ended.map_err(data)?;
                return Err(StartError::Config(format!("a child ended with {status}: see {}", log.display())));
            }
        };
        let listen = addresses.iter().map(|address| without_peer(address).to_owned()).collect();
        let restart = Restart { binary: self.binary.clone(), dir: self.dir.clone(), listen };
        Ok(ChildNode { child, stdin, addresses, log, restart })
    }
}

/// A multiaddress without the PeerId at its end.
fn without_peer(address: &str) -> &str {
    address.split_once("/p2p/").map_or(address, |(address, _)| address)
}

/// Waits for the file that a node writes, in one piece, once it listens.
async fn listening(state: &Path) -> Vec<String> {
    loop {
        if let Ok(text) = tokio::fs::read(state).await
            && let Ok(addresses) = serde_json::from_slice::<Vec<String>>(&text)
            && !addresses.is_empty()
        {
            return addresses;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The child's configuration file. It is kept, so that the same child can be started again by hand.
fn configuration(spec: &ChildSpec<'_>) -> String {
    let list = |items: &[String]| items.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>().join(", ");
    let trusted: Vec<String> = spec.trusted.iter().map(ToString::to_string).collect();
    format!(
        "[node]\nroles = [\"{}\"]\n\n[network]\ngenesis = \"{}\"\nnetuid = {}\n\n\
         [net]\nlisten = [\"/ip4/127.0.0.1/tcp/0\"]\nbootstrap = [{}]\nassume_reachable = true\nkeep_private_addresses = true\n\n\
         [jobs]\ntrusted_validators = [{}]\n\n[executor]\nslots = {}\n\n[http]\nlisten = \"127.0.0.1:0\"\n",
        spec.role,
        hex::encode(spec.network.genesis),
        spec.network.netuid,
        list(spec.bootstrap),
        list(&trusted),
        spec.slots,
    )
}
