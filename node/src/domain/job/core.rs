//! What all jobs share.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use sundara_proto::id::{Digest, Hotkey, JobId};
use sundara_proto::units::UnixMillis;

use super::config::JobConfig;
use super::io::Output;
use super::place::Waiting;
use super::trust::{TimeOff, TrustBook};
use super::wheel::{Timer, Wheel};
use crate::domain::Now;
use crate::domain::audit::EpochSecret;
use crate::domain::schedule::Fleet;

/// Everything of the machine but the jobs themselves, so that a job and this can be borrowed side by side.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) config: JobConfig,
    pub(super) incentive: Digest,
    pub(super) epoch: EpochSecret,
    pub(super) fleet: Fleet,
    pub(super) trust: TrustBook,
    pub(super) time_off: TimeOff,
    pub(super) wheel: Wheel,
    /// Finished jobs whose ids are remembered.
    pub(super) seen: HashSet<JobId>,
    pub(super) waiting: Waiting,
    pub(super) audit_queue: VecDeque<JobId>,
    pub(super) audits_running: usize,
}

impl Core {
    pub(super) fn new(config: JobConfig, incentive: Digest, epoch: EpochSecret, seed: [u8; 32]) -> Self {
        Self {
            fleet: Fleet::new(config.miners_max, seed),
            trust: TrustBook::new(config.trust_max(), config.clean_counts_max),
            time_off: TimeOff {
                drop: Duration::from_millis(config.drop_ms),
                ban: Duration::from_millis(config.ban_ms),
            },
            wheel: Wheel::default(),
            seen: HashSet::new(),
            waiting: Waiting::default(),
            audit_queue: VecDeque::new(),
            audits_running: 0,
            config,
            incentive,
            epoch,
        }
    }

    /// Takes a miner out of scheduling for a while.
    pub(super) fn drop_until(
        &mut self,
        miner: &Hotkey,
        until: UnixMillis,
        reason: String,
        now: Now,
        out: &mut Vec<Output>,
    ) {
        self.keep_off(miner, until, now);
        out.push(Output::DropMiner { miner: *miner, reason, until });
    }

    /// Applies a time off by the wall clock to the fleet.
    pub(super) fn keep_off(&mut self, miner: &Hotkey, until: UnixMillis, now: Now) {
        let off_until = now.mono + now.wall.until(until);
        self.fleet.set_off(miner, off_until, true, now.mono);
        self.wheel.set(off_until, Timer::Wake(*miner));
    }

    /// Tells the waiting line which classes of a miner may have free slots now.
    pub(super) fn free_classes(&mut self, miner: &Hotkey) {
        for class in self.fleet.class_names(miner) {
            self.waiting.free(&class);
        }
    }
}
