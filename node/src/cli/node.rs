//! A running node: start, banner, shutdown.

use super::args::{LogArgs, NodeArgs};
use super::exit::{CliError, CliResult, Exit};

pub(super) fn run(_: &NodeArgs, _: &LogArgs) -> CliResult {
    Err(CliError::new(Exit::Failure, "nodes do not run yet"))
}
