//! Flags and commands: nouns, then verbs.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

use super::exit;
use super::reduce::ReduceCommand;
use crate::config::{Config, ConfigError, LogFormat, Resolved, Sources};
use crate::presets::Role;

/// Default address of the local API.
pub(super) const API_DEFAULT: &str = "http://127.0.0.1:4102";

/// A mesh of verified compute.
///
/// With `--role` it runs a node; the commands below speak to a node that runs already, or work on files.
#[derive(Debug, Parser)]
#[command(name = "sundara-node", version, after_help = exit::help(), max_term_width = 110)]
pub struct Cli {
    /// What to do instead of running a node.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Flags of a node.
    #[command(flatten)]
    pub node: NodeArgs,
    /// How to log.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Log flags, for every command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct LogArgs {
    /// What to log: error, warn, info, debug, trace, or tracing's filter syntax.
    #[arg(long, global = true, value_name = "FILTER", help_heading = "Logging")]
    pub log_level: Option<String>,
    /// Form of a log line on standard error.
    #[arg(long, global = true, value_enum, value_name = "FORM", help_heading = "Logging")]
    pub log_format: Option<LogFormat>,
}

/// Flags of a node; each overrides a setting.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Running a node")]
pub struct NodeArgs {
    /// What the node does: light, executor, miner, validator; they combine (validator,miner).
    #[arg(long, value_delimiter = ',', value_name = "ROLE")]
    pub role: Vec<Role>,
    /// Configuration file; config.toml in the data directory unless named.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where keys, store and blobs are [default: ~/.sundara].
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// File of a network: its name or genesis, netuid, bootstrap, chain, incentive, trusted validators.
    #[arg(long, value_name = "FILE")]
    pub network: Option<PathBuf>,
    /// Multiaddress to listen on; may be repeated.
    #[arg(long, value_name = "MULTIADDR")]
    pub listen: Vec<String>,
    /// Multiaddress under which others reach this node; may be repeated.
    #[arg(long, value_name = "MULTIADDR")]
    pub announce: Vec<String>,
    /// Multiaddress of a node to begin with, /p2p/PEER at its end; may be repeated.
    #[arg(long, value_name = "MULTIADDR")]
    pub bootstrap: Vec<String>,
    /// Address of the local API, `off` for none [default: 127.0.0.1:4102].
    #[arg(long, value_name = "ADDR")]
    pub api: Option<String>,
    /// The miner that this executor works for (its multiaddress).
    #[arg(long, value_name = "MULTIADDR", conflicts_with = "validator")]
    pub miner: Option<String>,
    /// The validator whose trusted executor this is (its multiaddress).
    #[arg(long, value_name = "MULTIADDR")]
    pub validator: Option<String>,
    /// File that the owner wrote with `executor invite`; needed once.
    #[arg(long, value_name = "FILE")]
    pub invite: Option<PathBuf>,
}

/// Flags of a command that speaks to a running node.
#[derive(Clone, Debug, Args)]
pub struct ClientArgs {
    /// The node's API.
    #[arg(long, env = "SUNDARA_API", default_value = API_DEFAULT, value_name = "URL")]
    pub api: String,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Commands by noun.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a whole mesh on this machine and let it work.
    Testnet(TestnetArgs),
    /// Key files.
    #[command(subcommand)]
    Key(KeyCommand),
    /// The configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Executors of a miner or validator.
    #[command(subcommand)]
    Executor(ExecutorCommand),
    /// Jobs: submitted from here, or offered to the miner that runs here.
    #[command(subcommand)]
    Job(JobCommand),
    /// Published models.
    #[command(subcommand)]
    Model(ModelCommand),
    /// The nodes that the running node is connected to.
    Peers(ClientArgs),
    /// How the running node is.
    Status(ClientArgs),
    /// What an epoch comes to for each miner, as the running validator knows it.
    Scores {
        /// The epoch's number [default: the present one].
        #[arg(long, value_name = "N")]
        epoch: Option<u64>,
        /// The node.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Offences that the running node found or heard of, newest first.
    Evidence {
        /// At most so many.
        #[arg(long, default_value_t = 50, value_name = "N")]
        limit: usize,
        /// The node.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Map-reduce of tensors.
    #[command(subcommand)]
    Reduce(ReduceCommand),
    /// Proofs of results.
    #[command(subcommand)]
    Attestation(AttestationCommand),
}

/// A mesh on this machine.
#[derive(Clone, Debug, Args)]
pub struct TestnetArgs {
    /// Validators.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub validators: u16,
    /// Miners.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub miners: u16,
    /// Executors of each miner.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub executors_per_miner: u16,
    /// How many of the miners lie: wrong result, copy, withhold, collude, in rotation; in rounds each falsifies sums.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub byzantine: u16,
    /// Miners that run each job.
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub replicas: u8,
    /// Jobs to run; without it they keep coming until it is stopped.
    #[arg(long, value_name = "N")]
    pub jobs: Option<u64>,
    /// Beside the jobs, so many verified all-reduce rounds between four light nodes through the miners.
    #[arg(long, value_name = "ROUNDS")]
    pub reduce: Option<u64>,
    /// Each node as a process of its own.
    #[arg(long)]
    pub processes: bool,
    /// End when jobs and rounds are done; exit code 0 only if every job got a correct verified result, and every round the
    /// right sum.
    #[arg(long)]
    pub exit: bool,
    /// Print JSON; with --exit one object at the end.
    #[arg(long)]
    pub json: bool,
    /// Keep the mesh there and resume it at the next start.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Fixes keys, inputs and draws.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

/// Verbs of keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key file; an existing one is never overwritten.
    New {
        /// Where; `hotkey` (or `node.key`) in the data directory unless named.
        file: Option<PathBuf>,
        /// A node key instead of a hotkey.
        #[arg(long)]
        node: bool,
        /// Read the hotkey's BIP39 phrase from a file, or from standard input with `-`, instead of drawing one.
        #[arg(long, value_name = "FILE", conflicts_with = "node")]
        phrase_file: Option<PathBuf>,
        /// Data directory for the file's default place.
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show the public part of a key file.
    Show {
        /// Which; both of the data directory unless named.
        file: Option<PathBuf>,
        /// Data directory.
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Verbs of the configuration.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Show every setting in force and where it came from.
    Show {
        /// As they would be given to the node.
        #[command(flatten)]
        node: Box<NodeArgs>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Verbs of executors.
#[derive(Debug, Subcommand)]
pub enum ExecutorCommand {
    /// Write a one-time invite for an executor of the running miner or validator.
    Invite {
        /// File to write; it is a secret until it is used.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Seconds for which it may be used [default: one day].
        #[arg(long, value_name = "SECONDS")]
        life: Option<u64>,
        /// The node.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List the executors of the running miner or validator, those that are away included.
    List(ClientArgs),
    /// Send an attached executor away; it must be invited again.
    Revoke {
        /// Its node key, as `executor list` shows it.
        node: String,
        /// The node.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// Verbs of jobs.
#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// Submit a job.
    Submit(Box<SubmitArgs>),
    /// Follow a job until its verdict.
    Watch {
        /// The job.
        id: String,
        /// Write its output to standard output while it is made.
        #[arg(long)]
        stream: bool,
        /// Write the verified output to a file.
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Write the proof to a file, for `attestation verify`.
        #[arg(long, value_name = "FILE")]
        proof: Option<PathBuf>,
        /// The node.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List jobs submitted here, and on a miner those offered, declined and served with reasons.
    List {
        /// At most so many of each.
        #[arg(long, default_value_t = 50, value_name = "N")]
        limit: usize,
        /// The node.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Stop a job.
    Cancel {
        /// The job.
        id: String,
        /// The node.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// A job to submit.
#[derive(Clone, Debug, Args)]
pub struct SubmitArgs {
    /// Published model, PUBLISHER/NAME[@VERSION].
    #[arg(required_unless_present = "builtin", conflicts_with = "builtin")]
    pub model: Option<String>,
    /// Reference job that every node has, instead of a model.
    #[arg(long, value_name = "NAME")]
    pub builtin: Option<String>,
    /// File that the job reads as standard input, `-` for this command's own.
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Text that the job reads as /job/params; @FILE reads it from a file.
    #[arg(long, value_name = "TEXT")]
    pub params: Option<String>,
    /// Export to call instead of the model's default.
    #[arg(long, value_name = "NAME")]
    pub entry: Option<String>,
    /// Seed of the job's randomness.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Miners of distinct owners that run it, 1 to 16.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub replicas: u8,
    /// Hardware class wanted.
    #[arg(long, value_name = "CLASS")]
    pub hardware_class: Option<String>,
    /// Seconds within which a validator must begin it.
    #[arg(long, value_name = "SECONDS")]
    pub not_after: Option<u64>,
    /// Put it on gossip and leave before the result.
    #[arg(long, conflicts_with_all = ["wait", "stream"])]
    pub announce: bool,
    /// Write output to standard output while it is made; implies --wait.
    #[arg(long)]
    pub stream: bool,
    /// Wait for the verdict and write the verified output to standard output.
    #[arg(long)]
    pub wait: bool,
    /// Write the verified output to a file instead; implies --wait.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Write the proof to a file, for `attestation verify`; implies --wait.
    #[arg(long, value_name = "FILE")]
    pub proof: Option<PathBuf>,
    /// The node.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Verbs of models.
#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    /// Pack a directory with a model.toml and publish it under the node's hotkey.
    Publish {
        /// The directory, on the node's machine.
        dir: PathBuf,
        /// The node.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List the models that the node has or has published.
    List(ClientArgs),
    /// Show a model's manifest.
    Show(ModelArgs),
    /// Fetch a model's blobs, then provide them in turn.
    Fetch(ModelArgs),
    /// Keep a model whatever the disk cap says.
    Pin {
        /// Keep it no longer.
        #[arg(long)]
        undo: bool,
        /// Which.
        #[command(flatten)]
        model: ModelArgs,
    },
    /// Remove a model from this node.
    Rm(ModelArgs),
    /// Remove blobs that nothing needs.
    Gc(ClientArgs),
}

/// One model.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// PUBLISHER/NAME[@VERSION].
    pub model: String,
    /// The node.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Verbs of proofs.
#[derive(Debug, Subcommand)]
pub enum AttestationCommand {
    /// Check a proof, with no network.
    Verify {
        /// As `job submit --proof` or `job watch --proof` wrote it.
        file: PathBuf,
        /// Validator to believe (ss58); may be repeated. Without it the proof's own validator is only named.
        #[arg(long, value_name = "HOTKEY")]
        validator: Vec<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

impl NodeArgs {
    /// Sources of the configuration: these flags, the process's environment and the files that they name.
    pub fn sources(&self, log: &LogArgs) -> Result<Sources, ConfigError> {
        let mut flags: Vec<(&'static str, Value, &'static str)> = Vec::new();
        let mut list = |key, values: Vec<Value>, flag| {
            if !values.is_empty() {
                flags.push((key, Value::Array(values), flag));
            }
        };
        list("node.roles", self.role.iter().map(|role| json!(role)).collect(), "--role");
        list("net.listen", self.listen.iter().map(|a| json!(a)).collect(), "--listen");
        list("net.announce", self.announce.iter().map(|a| json!(a)).collect(), "--announce");
        list("net.bootstrap", self.bootstrap.iter().map(|a| json!(a)).collect(), "--bootstrap");
        let mut set = |key, value: Option<Value>, flag| flags.extend(value.map(|value| (key, value, flag)));
        set("node.data_dir", self.data_dir.as_ref().map(|dir| json!(dir)), "--data-dir");
        set("attach.miner", self.miner.as_ref().map(|address| json!(address)), "--miner");
        set("attach.validator", self.validator.as_ref().map(|address| json!(address)), "--validator");
        set("attach.invite", self.invite.as_ref().map(|file| json!(file)), "--invite");
        set("log.level", log.log_level.as_ref().map(|level| json!(level)), "--log-level");
        set("log.format", log.log_format.map(|format| json!(format)), "--log-format");
        match self.api.as_deref() {
            Some("off") => set("http.enabled", Some(json!(false)), "--api"),
            api => set("http.listen", api.map(|api| json!(api.trim_start_matches("http://"))), "--api"),
        }
        let environment = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        Ok(Sources {
            file: self.config.clone(),
            environment: environment.collect(),
            network: self.network.clone(),
            flags,
        })
    }

    /// The configuration that these flags, the environment and the files come to.
    pub fn resolve(&self, log: &LogArgs) -> Result<Resolved<Config>, ConfigError> {
        Config::resolve(&self.sources(log)?)
    }
}
