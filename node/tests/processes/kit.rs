//! Nodes as processes, commands as processes, and what they print.
//!
//! Nothing here outlives its test: a node is killed when it is dropped, and stops by itself when this process ends
//! without dropping it, because its standard input ends with it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use sundara_node::{JobEvent, JobFailure, JobHandle, JobResult, Node};
use sundara_proto::crypto::Network;
use sundara_proto::id::Hotkey;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{Mutex, MutexGuard};

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_sundara-node");
/// Longer than anything takes in a debug build on a busy machine; what reaches it hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Subnet of the meshes here.
const NETUID: u16 = 3;

/// The right to run a mesh.
pub async fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::const_new(());
    TURN.lock().await
}

/// Fails when `future` makes no progress.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

/// Waits until `probe` finds something. Polls, since another process has no event for it.
pub async fn found<T, F: Future<Output = Option<T>>>(what: &str, mut probe: impl FnMut() -> F) -> T {
    let poll = async {
        loop {
            if let Some(found) = probe().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    within(what, poll).await
}

/// What a command came to.
#[derive(Debug)]
pub struct Ran {
    /// `None` when a signal ended it.
    pub code: Option<i32>,
    pub out: Vec<u8>,
    pub err: String,
}

impl Ran {
    /// Standard output of a command that succeeded.
    #[track_caller]
    pub fn ok(&self) -> String {
        assert_eq!(self.code, Some(0), "{}\n{}", self.err, String::from_utf8_lossy(&self.out));
        String::from_utf8(self.out.clone()).unwrap()
    }

    /// The JSON that a command printed that succeeded.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.ok()).unwrap()
    }

    /// Standard error of a command that ended with `code`.
    #[track_caller]
    pub fn failed(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{}\n{}", self.err, String::from_utf8_lossy(&self.out));
        &self.err
    }
}

/// Runs a command of the binary to its end.
pub async fn run(args: &[&str]) -> Ran {
    run_as(Command::new(BINARY).args(args)).await
}

/// As [`run`], for a command that was made by hand.
pub async fn run_as(command: &mut Command) -> Ran {
    let what = format!("{:?}", command.as_std());
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = within(&what, output).await.unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    Ran { code: output.status.code(), out: output.stdout, err }
}

/// Command lines of all processes that name `dir`, which is to say: of those that belong to the test of that directory.
pub fn processes_of(dir: &Path) -> Vec<String> {
    let dir = dir.to_str().unwrap();
    let line = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok();
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .filter_map(|pid| line(&pid))
        .map(|line| line.replace('\0', " "))
        .filter(|line| line.contains(dir))
        .collect()
}

/// A running process with a log file, killed when dropped.
pub struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    log: PathBuf,
    /// Where in the log this run begins.
    begin: usize,
}

impl Process {
    /// Starts `command`; standard error goes to the end of `log`, standard output too.
    pub fn start(command: &mut Command, log: PathBuf) -> Self {
        let file = std::fs::File::options().create(true).append(true).open(&log).unwrap();
        let begin = file.metadata().unwrap().len() as usize;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        Self { child, stdin, log, begin }
    }

    /// What this run has logged so far.
    pub fn log(&self) -> String {
        let whole = std::fs::read(&self.log).unwrap();
        String::from_utf8_lossy(&whole[self.begin..]).into_owned()
    }

    /// Waits until a line of the log satisfies `find`; fails when the process ends before.
    pub async fn logged<T>(&mut self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        let poll = async {
            loop {
                // Looked at before the log, so that the last lines of a process that ended are seen.
                let ended = self.child.try_wait().unwrap();
                let log = self.log();
                if let Some(found) = log.lines().find_map(&find) {
                    return found;
                }
                assert!(ended.is_none(), "{what}: the process ended with {}:\n{log}", ended.unwrap());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, poll).await {
            Ok(found) => found,
            Err(_) => panic!("{what}: not within {PATIENCE:?}:\n{}", self.log()),
        }
    }

    /// Sends SIGTERM, SIGINT, SIGSTOP and the like.
    pub fn signal(&self, name: &str) {
        // Our own child, not yet waited for: the id is still its own.
        let pid = self.child.id().expect("the process runs").to_string();
        assert!(std::process::Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    /// Ends it at once, as a power cut would.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Waits for its end; `None` when a signal ended it.
    pub async fn ended(&mut self) -> Option<i32> {
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        ended.unwrap_or_else(|_| panic!("the process does not end:\n{}", self.log())).unwrap().code()
    }

    /// Closes its standard input.
    pub fn close_input(&mut self) {
        self.stdin = None;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            eprintln!("--- {}", self.log.display());
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// A node of the binary.
pub struct NodeProcess {
    pub process: Process,
    pub dir: PathBuf,
    pub hotkey: Hotkey,
    pub addresses: Vec<String>,
    pub api: String,
    flags: Vec<String>,
    /// Words before the binary's name: `ip netns exec NAME`.
    prefix: Vec<String>,
}

/// A node's settings on this machine: any free port, reachable there.
pub fn local_config(more: &str) -> String {
    format!(
        "[net]\nlisten = [\"/ip4/127.0.0.1/tcp/0\"]\nassume_reachable = true\nkeep_private_addresses = true\n\n\
         [http]\nlisten = \"127.0.0.1:0\"\n\n{more}"
    )
}

impl NodeProcess {
    /// Starts a node on `dir` and waits for its banner. `config` is its configuration file.
    pub async fn start(dir: &Path, config: &str, flags: &[&str]) -> Self {
        Self::start_in(&[], dir, config, flags).await
    }

    /// As [`Self::start`], behind the words of `prefix`.
    pub async fn start_in(prefix: &[String], dir: &Path, config: &str, flags: &[&str]) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("config.toml"), config).unwrap();
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        Self::launch(prefix.to_vec(), dir.to_path_buf(), flags, &[]).await
    }

    async fn launch(prefix: Vec<String>, dir: PathBuf, flags: Vec<String>, listen: &[String]) -> Self {
        let mut words = prefix.iter().map(String::as_str).chain([BINARY]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).args(&flags).arg("--data-dir").arg(&dir).env("SUNDARA_NODE__STOP_WITH_STDIN", "true");
        command.args(listen.iter().flat_map(|address| ["--listen", address]));
        let mut process = Process::start(&mut command, dir.join("node.log"));
        // Everything above it in the banner is there with it.
        let api = process.logged("banner", |line| Some(line.strip_prefix("  api       ")?.to_owned())).await;
        let log = process.log();
        let hotkey = log.lines().find_map(|line| line.strip_prefix("  hotkey    ")).unwrap().parse().unwrap();
        let first = log.lines().skip_while(|line| !line.starts_with("  address   "));
        let addresses =
            first.take_while(|line| !line.starts_with("  api ")).map(|line| line[12..].to_owned()).collect();
        Self { process, dir, hotkey, addresses, api, flags, prefix }
    }

    /// Starts it again on the same data and addresses after it ended.
    pub async fn restart(&mut self) {
        let listen: Vec<String> =
            self.addresses.iter().map(|address| address.split("/p2p/").next().unwrap().to_owned()).collect();
        *self = Self::launch(self.prefix.clone(), self.dir.clone(), self.flags.clone(), &listen).await;
    }

    /// Runs a command that speaks to it.
    pub async fn run(&self, args: &[&str]) -> Ran {
        let mut words = self.prefix.iter().map(String::as_str).chain([BINARY]);
        let mut command = Command::new(words.next().unwrap());
        run_as(command.args(words).args(args).args(["--api", &self.api])).await
    }

    /// What such a command prints with `--json`.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> impl Future<Output = Value> {
        let args: Vec<String> = args.iter().chain(&["--json"]).map(|arg| (*arg).to_owned()).collect();
        async move {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            self.run(&args).await.json()
        }
    }

    /// Ends it in order.
    pub async fn stop(mut self) {
        self.process.signal("TERM");
        assert_eq!(self.process.ended().await, Some(0), "{}", self.process.log());
    }
}

/// Validators and miners, each a process.
pub struct Mesh {
    pub validators: Vec<NodeProcess>,
    pub miners: Vec<NodeProcess>,
    pub network_file: PathBuf,
    /// Hotkeys of the validators.
    trusted: Vec<String>,
    name: String,
    dir: tempfile::TempDir,
}

impl Mesh {
    pub async fn start(validators: usize, miners: usize) -> Self {
        Self::start_with(validators, miners, "").await
    }

    /// `config` is put into every node's configuration file.
    pub async fn start_with(validators: usize, miners: usize, config: &str) -> Self {
        let mut mesh = Self::empty(validators).await;
        let config = local_config(config);
        for i in 0..validators {
            let node = mesh.node(&format!("validator-{i}"), "validator", &config).await;
            mesh.validators.push(node);
            let known: Vec<String> = mesh.validators.iter().flat_map(|v| v.addresses.clone()).collect();
            mesh.write_network(&known);
        }
        for i in 0..miners {
            let node = mesh.node(&format!("miner-{i}"), "miner", &config).await;
            mesh.miners.push(node);
        }
        mesh
    }

    /// A mesh with the keys of its validators, of which no node runs yet.
    pub async fn empty(validators: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut trusted = Vec::new();
        for i in 0..validators {
            let key = dir.path().join(format!("validator-{i}"));
            let made = run(&["key", "new", "--data-dir", key.to_str().unwrap(), "--json"]).await.json();
            trusted.push(made["hotkey"].as_str().unwrap().to_owned());
        }
        let name = format!("processes-{}", rand::random::<u64>());
        let network_file = dir.path().join("network.toml");
        let mesh = Self { validators: Vec::new(), miners: Vec::new(), network_file, trusted, name, dir };
        mesh.write_network(&[]);
        mesh
    }

    /// Writes the network's file, with these addresses to begin with.
    pub fn write_network(&self, bootstrap: &[String]) {
        let (name, trusted) = (&self.name, &self.trusted);
        let text = format!(
            "name = {name:?}\nnetuid = {NETUID}\nbootstrap = {bootstrap:?}\ntrusted_validators = {trusted:?}\n"
        );
        std::fs::write(&self.network_file, text).unwrap();
    }

    fn flags<'a>(&'a self, role: &'a str) -> [&'a str; 4] {
        ["--role", role, "--network", self.network_file.to_str().unwrap()]
    }

    /// A further node of this mesh.
    pub async fn node(&self, name: &str, role: &str, config: &str) -> NodeProcess {
        NodeProcess::start(&self.path(name), config, &self.flags(role)).await
    }

    /// A place in the mesh's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A light node in this process, connected to every validator.
    pub async fn requester(&self) -> Node {
        let node = Node::builder()
            .network(Network::named(&self.name, NETUID))
            .bootstrap(self.validators.iter().flat_map(|v| &v.addresses))
            .trust(self.validators.iter().map(|v| v.hotkey))
            .loopback()
            .start()
            .await
            .unwrap();
        within("validators", node.wait_for_validators(self.validators.len())).await;
        node
    }

    /// The miner that runs `job` now.
    pub async fn miner_of(&self, job: &JobHandle) -> usize {
        let id = job.id().to_string();
        found("a miner runs the job", || async {
            for (i, miner) in self.miners.iter().enumerate() {
                let list = miner.json(&["job", "list"]).await;
                let offers = list["miner"].as_array().unwrap();
                if offers.iter().any(|offer| offer["job"] == *id && offer["state"] == "accepted") {
                    return Some(i);
                }
            }
            None
        })
        .await
    }
}

/// A program that shows when it is in the middle: it writes `begun`, counts from its input down to zero, writes `ended`.
/// The input is the count, 8 bytes little-endian; each step is about a nanosecond.
pub const COUNTDOWN: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "begun\n")
  (data (i32.const 80) "ended\n")
  (func $say (param $text i32)
    (i32.store (i32.const 0) (local.get $text))
    (i32.store (i32.const 4) (i32.const 6))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16))))
  (func (export "_start") (local $n i64)
    (i32.store (i32.const 0) (i32.const 32))
    (i32.store (i32.const 4) (i32.const 8))
    (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 16)))
    (call $say (i32.const 64))
    (local.set $n (i64.load (i32.const 32)))
    (loop $next
      (if (i64.ne (local.get $n) (i64.const 0)) (then
        (local.set $n (i64.sub (local.get $n) (i64.const 1)))
        (br $next))))
    (call $say (i32.const 80))))"#;

/// What [`COUNTDOWN`] writes.
pub const COUNTED: &[u8] = b"begun\nended\n";

/// Writes [`COUNTDOWN`] as a model's directory.
pub fn write_countdown(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("countdown.wasm"), wat::parse_str(COUNTDOWN).unwrap()).unwrap();
    let manifest = "name = \"countdown\"\nversion = 1\nprogram = \"countdown.wasm\"\nlicense = \"MIT\"\n\n\
                    [limits]\nfuel = 100000000000\nmemory = 1048576\noutput = 1024\nwall_ms = 60000\n";
    std::fs::write(dir.join("model.toml"), manifest).unwrap();
}

/// Publishes [`COUNTDOWN`] from `node`; returns its name.
pub async fn publish_countdown(node: &Node, dir: &Path) -> String {
    write_countdown(dir);
    node.models().publish(dir).await.unwrap();
    format!("{}/countdown", node.hotkey())
}

/// Waits until a job says that it is in the middle.
pub async fn begun(job: &JobHandle) {
    use futures::StreamExt as _;
    let mut events = job.events();
    let begun = async {
        loop {
            match events.next().await {
                Some(JobEvent::Output { data, .. }) if data.starts_with(b"begun") => return,
                Some(JobEvent::Failed(failure)) => panic!("the job failed before it was in the middle: {failure}"),
                Some(JobEvent::Finished(_)) | None => panic!("the job ended before it was seen in the middle"),
                Some(_) => {}
            }
        }
    };
    within("the job begins", begun).await;
}

/// The one end of a job, with the check that there is no second one.
pub async fn end(job: &JobHandle) -> Result<std::sync::Arc<JobResult>, JobFailure> {
    use futures::StreamExt as _;
    let events: Vec<JobEvent> = within("the job ends", job.events().collect()).await;
    let ends = events.iter().filter(|event| matches!(event, JobEvent::Finished(_) | JobEvent::Failed(_))).count();
    assert_eq!(ends, 1, "{events:?}");
    job.result().await
}
