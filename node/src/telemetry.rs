//! Log lines of the binary: to standard error, and to a file where one is set.
//!
//! Owns the one global subscriber and the panic hook, both set by `main` only: a program that embeds a node has its own.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::sync::Arc;

use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::fmt::writer::{BoxMakeWriter, MakeWriterExt};
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

use crate::config::{LogConfig, LogFormat};

/// Why there are no log lines.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The filter is none.
    #[error(
        "log.level = `{filter}` is no filter: {source}; use error, warn, info, debug, trace, or target=level with commas"
    )]
    Filter {
        /// As given.
        filter: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// The file cannot be opened.
    #[error("cannot append to log.file = {path}: {source}")]
    File {
        /// Which.
        path: std::path::PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Somebody else has set a subscriber.
    #[error("a log subscriber is set already")]
    Taken(#[from] TryInitError),
}

/// Sets the subscriber and a panic hook that logs. Once a process.
///
/// # Errors
/// See [`TelemetryError`].
pub fn init(config: &LogConfig) -> Result<(), TelemetryError> {
    set(config, true)
}

/// [`init`], with nothing on standard error: for a program that draws there.
///
/// # Errors
/// See [`TelemetryError`].
pub fn init_file_only(config: &LogConfig) -> Result<(), TelemetryError> {
    set(config, false)
}

fn set(config: &LogConfig, stderr: bool) -> Result<(), TelemetryError> {
    let filter = EnvFilter::builder()
        .parse(&config.level)
        .map_err(|source| TelemetryError::Filter { filter: config.level.clone(), source })?;
    let file = match &config.file {
        None => None,
        Some(path) => {
            let opened = File::options().create(true).append(true).open(path);
            Some(opened.map_err(|source| TelemetryError::File { path: path.clone(), source })?)
        }
    };
    // Colours would go into the file too.
    let ansi = file.is_none() && stderr && io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let writer = match file {
        Some(file) if stderr => BoxMakeWriter::new(io::stderr.and(Arc::new(file))),
        Some(file) => BoxMakeWriter::new(Arc::new(file)),
        None if !stderr => BoxMakeWriter::new(io::sink),
        None => BoxMakeWriter::new(io::stderr),
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(ansi);
    match config.format {
        LogFormat::Text => lines.finish().try_init()?,
        LogFormat::Json => lines.json().flatten_event(true).finish().try_init()?,
    }
    log_panics();
    Ok(())
}

/// A panic is a line like any other, so that it reaches the file and has the form that was asked for.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let what = panic.payload();
        let message = what.downcast_ref::<&str>().copied().or(what.downcast_ref::<String>().map(String::as_str));
        let at = panic.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
        tracing::error!(
            at,
            thread,
            message = message.unwrap_or("no message"),
            "a task panicked: this is a mistake in the program"
        );
    }));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_names_its_setting() {
        let filter = LogConfig { level: "sundara_node=loud".into(), ..LogConfig::default() };
        let message = init(&filter).unwrap_err().to_string();
        assert!(message.contains("log.level = `sundara_node=loud`"), "{message}");
        let file = LogConfig { file: Some("/nowhere/x.log".into()), ..LogConfig::default() };
        assert!(init(&file).unwrap_err().to_string().contains("log.file = /nowhere/x.log"));
    }
}
