//! Fetching a model of 1 GiB: two nodes in two processes on loopback, into fresh files, every byte verified. Beside it the
//! raw streams of `raw`, which verify nothing, from file to fresh file; and two slow providers against one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use sundara_benches::raw::{self, Carried, Pair, Settings};
use sundara_benches::{Args, Child, Parent, Report, Target, Usage, median};
use sundara_node::{Network, Node};
use sundara_proto::units::ByteCount;

/// Bytes of the model's one artifact.
const LEN: u64 = 1 << 30;
/// The same where providers are slow.
const SLOW_LEN: u64 = 512 << 20;
/// What a slow provider sends, bytes a second.
const SLOW: u64 = 100_000_000;
/// Runs of each kind.
const RUNS: usize = 5;
const SLOW_RUNS: usize = 3;
/// A mesh of two or three nodes on loopback stands well before that.
const PATIENCE: Duration = Duration::from_secs(30);

const PROVIDER: &str = "provider";
const FETCHER: &str = "fetcher";

fn main() -> Result<()> {
    if let Some(parent) = Parent::of_this() {
        return match parent.part.as_str() {
            PROVIDER => {
                let order: ProviderOrder = parent.order()?;
                parent.run(order.workers, provide(&parent, order))
            }
            FETCHER => {
                let order: FetcherOrder = parent.order()?;
                parent.run(order.workers, fetch(&parent, order))
            }
            _ => raw::run_part(&parent).map(drop),
        };
    }
    let args = Args::of_program();
    let mut report = Report::new("blobs");
    beside_raw(&args, &mut report)?;
    from_two(&args, &mut report)?;
    report.print(&args)
}

fn beside_raw(args: &Args, report: &mut Report) -> Result<()> {
    let dir = args.temp_dir()?;
    let model = write_model(dir.path(), LEN)?;
    let settings = Settings::default();
    let mut pair = Pair::start(&settings, Some(model.join(WEIGHTS)))?;
    let mut meshes = Vec::new();
    for (name, workers) in [("with as many workers as raw", Some(settings.workers)), ("with a worker a core", None)] {
        let dir = dir.path().join(name);
        std::fs::create_dir(&dir)?;
        let mesh = Mesh::start(&dir, &model, MeshOrder { providers: 1, upload_bytes_per_s: 0, workers })?;
        meshes.push(Measured::new(name, mesh)?);
    }
    let mut ceiling = Vec::new();
    for run in 0..=args.runs(RUNS) {
        let sink = dir.path().join("sink");
        let raw = pair.carry(LEN, Some(sink.clone()))?;
        std::fs::remove_file(sink)?;
        for measured in &mut meshes {
            measured.fetch(&raw, run > 0)?;
        }
        // The first run warms the page cache, and windows.
        if run > 0 {
            ceiling.push(LEN as f64 / 1e9 / raw.seconds);
        }
    }
    report.add("raw streams, file to fresh file", "GB/s", &ceiling);
    for measured in &meshes {
        measured.report(report)?;
    }
    Ok(())
}

/// A mesh of one provider, and what its fetches took.
struct Measured {
    name: &'static str,
    mesh: Mesh,
    idle: (Usage, Usage),
    rates: Vec<f64>,
    ratios: Vec<f64>,
    costs: Vec<f64>,
}

impl Measured {
    fn new(name: &'static str, mesh: Mesh) -> Result<Self> {
        let idle = (mesh.providers[0].usage()?, mesh.fetcher.usage()?);
        mesh.forget_peaks()?;
        Ok(Self { name, mesh, idle, rates: Vec::new(), ratios: Vec::new(), costs: Vec::new() })
    }

    fn fetch(&mut self, raw: &Carried, counts: bool) -> Result<()> {
        let before = self.mesh.cpu()?;
        let seconds = self.mesh.fetch()?;
        let cpu = self.mesh.cpu()?.saturating_sub(before);
        self.mesh.forget_model()?;
        if counts {
            let gigabytes = LEN as f64 / 1e9;
            self.rates.push(gigabytes / seconds);
            self.ratios.push(raw.seconds / seconds);
            self.costs.push(cpu.as_secs_f64() / gigabytes);
        }
        Ok(())
    }

    fn report(&self, report: &mut Report) -> Result<()> {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let grown =
            |child: &Child, idle: Usage| Ok::<_, anyhow::Error>(mib(child.usage()?.peak_rss.saturating_sub(idle.rss)));
        report.add(format!("fetch, verified, {}", self.name), "GB/s", &self.rates);
        report.add("  processor", "s/GB", &self.costs);
        report.add_with_target("  / raw streams", "", &self.ratios, Target::AtLeast(0.85));
        let most = Target::AtMost(64.0);
        let (provider, fetcher) =
            (grown(&self.mesh.providers[0], self.idle.0)?, grown(&self.mesh.fetcher, self.idle.1)?);
        report.add_with_target("  memory of the fetcher over idle, peak", "MiB", &[fetcher], most);
        report.add_with_target("  memory of the provider over idle, peak", "MiB", &[provider], most);
        Ok(())
    }
}

fn from_two(args: &Args, report: &mut Report) -> Result<()> {
    let dir = args.temp_dir()?;
    let model = write_model(dir.path(), SLOW_LEN)?;
    let mut rates = Vec::new();
    for providers in [1, 2] {
        let dir = dir.path().join(providers.to_string());
        std::fs::create_dir(&dir)?;
        let mut mesh = Mesh::start(&dir, &model, MeshOrder { providers, upload_bytes_per_s: SLOW, workers: None })?;
        let mut samples = Vec::new();
        for _ in 0..args.runs(SLOW_RUNS) {
            samples.push(SLOW_LEN as f64 / 1e6 / mesh.fetch()?);
            mesh.forget_model()?;
        }
        report.add(format!("{providers} provider(s) of 100 MB/s"), "MB/s", &samples);
        rates.push(samples);
    }
    let one = median(&rates[0]);
    let ratios: Vec<f64> = rates[1].iter().map(|rate| rate / one).collect();
    report.add_with_target("two slow providers / one", "", &ratios, Target::AtLeast(1.8));
    Ok(())
}

const WEIGHTS: &str = "weights.bin";

/// A model whose program does nothing and whose weights have `len` bytes.
fn write_model(dir: &Path, len: u64) -> Result<PathBuf> {
    let model = dir.join("model");
    std::fs::create_dir(&model)?;
    std::fs::write(model.join("model.toml"), "name = \"large\"\nversion = 1\nprogram = \"empty.wasm\"\n")?;
    std::fs::write(model.join("empty.wasm"), b"\0asm\x01\0\0\0")?;
    raw::write_source(&model.join(WEIGHTS), len)?;
    Ok(model)
}

/// Providers of one model, and a node that fetches it.
struct Mesh {
    providers: Vec<Child>,
    fetcher: Child,
    model: String,
}

/// How a mesh is to be.
struct MeshOrder {
    providers: usize,
    /// Cap of each provider; 0 for none.
    upload_bytes_per_s: u64,
    /// tokio workers of each node; as the binary has them where there is none.
    workers: Option<usize>,
}

impl Mesh {
    fn start(dir: &Path, model: &Path, order: MeshOrder) -> Result<Self> {
        let MeshOrder { providers, upload_bytes_per_s, workers } = order;
        let mut started = Vec::new();
        let mut serving: Vec<Serving> = Vec::new();
        for i in 0..providers {
            let order = ProviderOrder {
                data_dir: dir.join(format!("provider-{i}")),
                model: model.to_owned(),
                upload_bytes_per_s,
                workers,
                bootstrap: serving.iter().map(|s| s.address.clone()).collect(),
            };
            let mut child = Child::start(PROVIDER, &order)?;
            serving.push(child.hear()?);
            started.push(child);
        }
        let order = FetcherOrder {
            data_dir: dir.join("fetcher"),
            workers,
            bootstrap: serving.iter().map(|s| s.address.clone()).collect(),
        };
        let mut fetcher = Child::start(FETCHER, &order)?;
        fetcher.hear::<()>()?;
        let model = serving.first().context("there is no provider")?.model.clone();
        Ok(Self { providers: started, fetcher, model })
    }

    /// Seconds.
    fn fetch(&mut self) -> Result<f64> {
        self.fetcher.tell(&Order::Fetch { model: self.model.clone() })?;
        self.fetcher.hear()
    }

    fn forget_model(&mut self) -> Result<()> {
        self.fetcher.tell(&Order::Forget { model: self.model.clone() })?;
        self.fetcher.hear()
    }

    fn forget_peaks(&self) -> Result<()> {
        self.providers.iter().chain([&self.fetcher]).try_for_each(|child| Usage::forget_peak(child.id()))
    }

    fn cpu(&self) -> Result<Duration> {
        self.providers.iter().chain([&self.fetcher]).map(|child| Ok(child.usage()?.cpu)).sum()
    }
}

#[derive(Serialize, Deserialize)]
struct ProviderOrder {
    data_dir: PathBuf,
    model: PathBuf,
    upload_bytes_per_s: u64,
    workers: Option<usize>,
    bootstrap: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Serving {
    address: String,
    model: String,
}

#[derive(Serialize, Deserialize)]
struct FetcherOrder {
    data_dir: PathBuf,
    workers: Option<usize>,
    bootstrap: Vec<String>,
}

#[derive(Serialize, Deserialize)]
enum Order {
    Fetch { model: String },
    Forget { model: String },
}

async fn start(data_dir: PathBuf, bootstrap: &[String], upload_bytes_per_s: u64) -> Result<Node> {
    let node = Node::builder()
        .network(Network::named("bench", 1))
        .data_dir(data_dir)
        .bootstrap(bootstrap)
        .configure(|config| config.transfer.max_upload_bytes_per_s = ByteCount(upload_bytes_per_s))
        .loopback()
        .start()
        .await?;
    let connected = async {
        while node.peers().await.iter().filter(|peer| peer.connections > 0).count() < bootstrap.len() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, connected).await.context("the nodes do not connect")?;
    Ok(node)
}

async fn provide(parent: &Parent, order: ProviderOrder) -> Result<()> {
    let node = start(order.data_dir, &order.bootstrap, order.upload_bytes_per_s).await?;
    let published = node.models().publish(order.model).await?;
    let address = node.addresses().await.into_iter().next().context("the node does not listen")?;
    parent.tell(&Serving { address, model: format!("{}/large", published.publisher) })?;
    parent.ended().await;
    node.shutdown().await;
    Ok(())
}

async fn fetch(parent: &Parent, order: FetcherOrder) -> Result<()> {
    let node = start(order.data_dir, &order.bootstrap, 0).await?;
    parent.tell(&())?;
    while let Some(order) = parent.hear().await? {
        match order {
            Order::Fetch { model } => {
                let began = Instant::now();
                let local = node.models().fetch(&model).await?;
                let seconds = began.elapsed().as_secs_f64();
                ensure!(local.artifacts.len() == 1, "the model has one artifact");
                parent.tell(&seconds)?;
            }
            Order::Forget { model } => {
                node.models().remove(&model).await?;
                parent.tell(&())?;
            }
        }
    }
    node.shutdown().await;
    Ok(())
}
