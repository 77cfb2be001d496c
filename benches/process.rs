//! The processes of a bench: this program again in another part, and what any process uses.
//!
//! Parent and child talk in lines of JSON over the child's standard input and output. A child ends when its input does, so
//! none outlives a parent that fails.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Says to a started program that it is a child, and in which part.
const PART: &str = "SUNDARA_BENCH_PART";
/// What the part needs to know, as JSON.
const ORDER: &str = "SUNDARA_BENCH_ORDER";

/// Another process of this program. Killed when dropped.
#[derive(Debug)]
pub struct Child {
    process: std::process::Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    part: String,
}

impl Child {
    /// Starts this program again as `part`, which finds `order` through [`Parent::of_this`].
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(part: &str, order: &impl Serialize) -> Result<Self> {
        Self::start_with(part, order, &[])
    }

    /// [`Child::start`] with environment variables on top.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start_with(part: &str, order: &impl Serialize, variables: &[(&str, &str)]) -> Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .env(PART, part)
            .env(ORDER, serde_json::to_string(order)?)
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {part}"))?;
        let input = process.stdin.take().ok_or_else(|| anyhow!("{part} has no input"))?;
        let output = process.stdout.take().ok_or_else(|| anyhow!("{part} has no output"))?;
        Ok(Self { process, input, output: BufReader::new(output), part: part.to_owned() })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends it a message.
    ///
    /// # Errors
    /// When it has ended.
    pub fn tell(&mut self, message: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(message)? + "\n";
        self.input.write_all(line.as_bytes()).with_context(|| format!("{} has ended", self.part))
    }

    /// Waits for its next message.
    ///
    /// # Errors
    /// When it ends instead, or says something else.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            return Err(anyhow!("{} ended: its reason is above", self.part));
        }
        serde_json::from_str(&line).with_context(|| format!("{} said `{}`", self.part, line.trim()))
    }

    /// What it uses now.
    ///
    /// # Errors
    /// As [`Usage::of`].
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.id())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The process that started this one.
#[derive(Debug)]
pub struct Parent {
    /// What this process is to be.
    pub part: String,
    order: String,
}

impl Parent {
    /// `None` in the process that the user started.
    pub fn of_this() -> Option<Self> {
        let part = std::env::var(PART).ok()?;
        Some(Self { part, order: std::env::var(ORDER).unwrap_or_default() })
    }

    /// Runs the part on a tokio runtime of `workers` threads, or as many as the node's binary has: one a core.
    ///
    /// # Errors
    /// The part's.
    pub fn run(&self, workers: Option<usize>, part: impl Future<Output = Result<()>>) -> Result<()> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        if let Some(workers) = workers {
            builder.worker_threads(workers);
        }
        let runtime = builder.enable_all().build()?;
        let ended = runtime.block_on(part);
        // A thread that still listens to the parent is not waited for.
        runtime.shutdown_background();
        ended
    }

    /// What the parent wants of this part.
    ///
    /// # Errors
    /// When it is of another shape.
    pub fn order<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(&self.order).with_context(|| format!("order of {}: `{}`", self.part, self.order))
    }

    /// Sends the parent a message.
    ///
    /// # Errors
    /// When the parent is gone.
    pub fn tell(&self, message: &impl Serialize) -> Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(message)?)?;
        Ok(out.flush()?)
    }

    /// Waits for the next message; `None` when the parent wants no more.
    ///
    /// # Errors
    /// When it is of another shape.
    ///
    /// Not cancel-safe: the message that was waited for is lost.
    pub async fn hear<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        let line = tokio::task::spawn_blocking(|| {
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line).map(|_| line)
        });
        let line = line.await??;
        if line.is_empty() { Ok(None) } else { Ok(Some(serde_json::from_str(&line)?)) }
    }

    /// Waits until the parent is gone or wants no more. What it says meanwhile is not heard.
    pub async fn ended(&self) {
        let ended = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink()));
        // An input that cannot be read is a parent that is gone.
        let _ = ended.await;
    }
}

/// What a process uses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Memory held now, bytes.
    pub rss: u64,
    /// Most memory held since the start or since [`Usage::forget_peak`], bytes.
    pub peak_rss: u64,
    /// Processor time since the start, all threads, user and system.
    pub cpu: Duration,
}

/// Ticks of /proc's processor times a second: a constant of Linux towards programs, whatever the kernel's own clock is.
const TICKS_PER_S: f64 = 100.0;

impl Usage {
    /// Reads /proc.
    ///
    /// # Errors
    /// When the process is gone, or the system is not Linux.
    pub fn of(process: u32) -> Result<Self> {
        let status = read(process, "status")?;
        let stat = read(process, "stat")?;
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
                .ok_or_else(|| anyhow!("/proc/{process}/status has no {name}"))
        };
        // The second field is the program's name in brackets and may hold anything.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok());
        let (user, system) =
            ticks(11).zip(ticks(12)).ok_or_else(|| anyhow!("/proc/{process}/stat has no processor times"))?;
        Ok(Self {
            rss: kib("VmRSS:")? << 10,
            peak_rss: kib("VmHWM:")? << 10,
            cpu: Duration::from_secs_f64((user + system) / TICKS_PER_S),
        })
    }

    /// This process.
    ///
    /// # Errors
    /// When the system is not Linux.
    pub fn of_this() -> Result<Self> {
        Self::of(std::process::id())
    }

    /// Lets `peak_rss` of a process of ours begin anew.
    ///
    /// # Errors
    /// When the system does not allow it.
    pub fn forget_peak(process: u32) -> Result<()> {
        let path = format!("/proc/{process}/clear_refs");
        std::fs::write(&path, "5").with_context(|| path)
    }
}

fn read(process: u32, file: &str) -> Result<String> {
    let path = format!("/proc/{process}/{file}");
    std::fs::read_to_string(&path).with_context(|| format!("{path} (this bench needs Linux)"))
}
