//! A validator's whole view of its jobs.
//!
//! **Owns** every decision between a submission and its verdict: which miners are asked, when replicas reveal, what is
//! audited, who is blamed, what is tried again, and when a job is given up. **Does not own** signatures (the services
//! verify what comes in and sign what goes out), the store, streams, or the bytes of inputs and outputs.
//!
//! ```text
//! Submitted -> [waiting] -> offered -> accepted -> committed -> revealing -> [auditing] -> Finish
//!                  ^           |           |           |            |            |
//!                  +-----------+-----------+-- decline, loss, stall, no agreement: next miner or next attempt
//! ```
//! A single replica skips committed and revealing.
//!
//! **Invariants**
//! - A job that was acknowledged ends: with a result, or with a reason. Every state has a deadline.
//! - [`Output::Persist`] comes before the [`Output::Acknowledge`] of the same job.
//! - Replicas of one attempt have distinct owners and one environment, which this validator's executor shares.
//! - No commitment counts once a reveal was asked for; what is revealed must match what was committed.
//! - Nobody is blamed for a result but by this validator's own executor.
//! - Maps and queues are bounded by [`JobConfig`]; no input makes the machine walk over all jobs or all miners.

mod config;
mod io;
mod record;

use sundara_proto::id::Digest;

pub use config::JobConfig;
pub use io::{AuditResult, Decline, Evidence, Input, Offence, Output, Part, Ruling, Submission};
pub use record::{CleanRecord, JobRecord, MinerRecord};

use super::Now;
use super::audit::EpochSecret;

/// See the module.
#[derive(Debug)]
pub struct JobMachine {
    config: JobConfig,
}

impl JobMachine {
    /// A machine without jobs. `incentive` stands in every verdict; `seed` breaks ties between miners and should be
    /// unpredictable to them. Give the store's records next, then [`Input::Auditor`] and the miners.
    pub fn new(config: JobConfig, incentive: Digest, epoch: EpochSecret, seed: [u8; 32], now: Now) -> Self {
        let _ = (incentive, epoch, seed, now);
        Self { config }
    }

    /// Takes what happened and says what is to be done, in order.
    pub fn handle(&mut self, input: Input, now: Now) -> Vec<Output> {
        let _ = (input, now, &self.config);
        Vec::new()
    }
}
