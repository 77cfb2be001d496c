//! `testnet`.

use super::args::{LogArgs, TestnetArgs};
use super::exit::{CliError, CliResult, Exit};

pub(super) fn run(_: TestnetArgs, _: &LogArgs) -> CliResult {
    Err(CliError::new(Exit::Failure, "the testnet does not run yet"))
}
