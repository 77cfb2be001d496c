//! How a command ends: the table of exit codes, and errors that carry one.

use std::fmt;
use std::process::ExitCode;

/// Exit codes with their meanings, as `--help` shows them.
pub const EXIT_CODES: [(Exit, &str); 8] = [
    (Exit::Ok, "done; also a node or testnet that a signal asked to stop, and that did so in order"),
    (Exit::Failure, "failed; the message says why"),
    (Exit::Usage, "wrong flags or configuration"),
    (Exit::Unreachable, "the local API cannot be reached"),
    (Exit::Refused, "refused, or there is no such thing"),
    (Exit::Job, "the job ended without a verified result, or its program did not complete"),
    (Exit::Proof, "the proof does not hold"),
    (Exit::Interrupted, "stopped by a signal before it was done"),
];

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// Failed.
    Failure = 1,
    /// Wrong flags or configuration.
    Usage = 2,
    /// The API cannot be reached.
    Unreachable = 3,
    /// The node refused, or there is no such thing.
    Refused = 4,
    /// No verified result.
    Job = 5,
    /// A proof that does not hold.
    Proof = 6,
    /// A signal.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error with the exit code that it ends the command with.
#[derive(Debug)]
pub struct CliError {
    /// The code.
    pub exit: Exit,
    /// What went wrong and what to do about it.
    pub error: anyhow::Error,
}

impl CliError {
    /// With a message of its own.
    pub fn new(exit: Exit, message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self { exit, error: anyhow::Error::msg(message) }
    }
}

impl<E: Into<anyhow::Error>> From<E> for CliError {
    fn from(error: E) -> Self {
        let error: anyhow::Error = error.into();
        let usage = error.is::<crate::config::ConfigError>();
        Self { exit: if usage { Exit::Usage } else { Exit::Failure }, error }
    }
}

/// What a command comes to.
pub type CliResult = Result<Exit, CliError>;

/// The table as text for `--help`.
pub(super) fn help() -> String {
    let lines = EXIT_CODES.iter().map(|(exit, meaning)| format!("  {:<4} {meaning}", *exit as u8));
    std::iter::once("Exit codes:".to_owned()).chain(lines).collect::<Vec<_>>().join("\n")
}
