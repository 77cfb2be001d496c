//! The command line: nouns, then verbs.
//!
//! Owns flags, human text, `--json` and exit codes. Commands about a running node speak to its local API and to nothing
//! else; the others work on files, or run a node or a testnet through the same library that programs embed. Invariants:
//! only `main` ends the process; what a command found goes to standard output, everything else to standard error; no
//! secret is a flag.

mod args;
mod attestation;
mod client;
mod config;
mod exit;
mod jobs;
mod keys;
mod models;
mod node;
mod out;
mod reduce;
mod signals;
mod sse;
mod status;
mod testnet;

use clap::Parser as _;
use clap::error::ErrorKind;

pub use args::{Cli, Command, LogArgs, NodeArgs, TestnetArgs};
pub use client::Client;
pub use exit::{CliError, CliResult, EXIT_CODES, Exit};

use crate::config::LogConfig;
use crate::telemetry;

/// Parses `arguments` (the program's name first) and does what they say, on threads of its own. Blocks until it is done.
pub fn run(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Exit {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, and belong to standard output; clap knows.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::Ok,
                _ => Exit::Usage,
            };
        }
    };
    match dispatch(cli) {
        Ok(exit) => exit,
        // The reader of our output has had enough.
        Err(error) if broken_pipe(&error) => Exit::Ok,
        Err(error) => {
            out::note(&format!("sundara-node: {}", in_words(&error)));
            error.exit
        }
    }
}

fn dispatch(cli: Cli) -> CliResult {
    let Cli { command, node, log } = cli;
    let Some(command) = command else { return node::run(&node, &log) };
    if node != NodeArgs::default() {
        let message = "flags of a node do not go with a command; a command's own flags stand after it";
        return Err(CliError::new(Exit::Usage, message));
    }
    match command {
        Command::Testnet(args) => testnet::run(args, &log),
        Command::Key(command) => keys::run(command, &log),
        Command::Config(command) => config::run(command, &log),
        Command::Attestation(command) => attestation::run(command),
        Command::Reduce(command) => reduce::run(command, &log),
        remote => {
            quiet(&log)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(speak(remote))
        }
    }
}

/// Commands that speak to a running node.
async fn speak(command: Command) -> CliResult {
    let work = async {
        match command {
            Command::Executor(command) => status::executor(command).await,
            Command::Job(command) => jobs::run(command).await,
            Command::Model(command) => models::run(command).await,
            Command::Peers(args) => status::peers(args).await,
            Command::Status(args) => status::status(args).await,
            Command::Scores { epoch, client } => status::scores(epoch, client).await,
            Command::Evidence { limit, client } => status::evidence(limit, client).await,
            _ => Err(CliError::new(Exit::Failure, "the command does not speak to a node")),
        }
    };
    let mut signals = signals::Signals::new()?;
    tokio::select! {
        ended = work => ended,
        () = signals.next() => Ok(Exit::Interrupted),
    }
}

/// Log lines of a command: warnings, unless asked for more.
fn quiet(log: &LogArgs) -> Result<(), CliError> {
    let level = log.log_level.clone().unwrap_or_else(|| "warn".into());
    let config = LogConfig { level, format: log.log_format.unwrap_or_default(), ..LogConfig::default() };
    telemetry::init(&config).map_err(|e| CliError::new(Exit::Usage, e))
}

fn broken_pipe(error: &CliError) -> bool {
    let kind = |e: &(dyn std::error::Error + 'static)| e.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    error.error.chain().any(|e| kind(e) == Some(std::io::ErrorKind::BrokenPipe))
}

/// The error and what caused it, in one line.
fn in_words(error: &CliError) -> String {
    let mut words: Vec<String> = Vec::new();
    for part in error.error.chain().map(ToString::to_string) {
        // A message that quotes its source says it already.
        if !words.last().is_some_and(|last| last.contains(&part)) {
            words.push(part);
        }
    }
    words.join(": ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
