//! Settings of the job machine: section `dispatch` of the configuration.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Bounds and deadlines of a validator's jobs. Times are in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobConfig {
    /// Jobs held at once, waiting or running: about 2 KiB each, and the input beside it.
    pub live_max: usize,
    /// Ids remembered after the verdict, until `not_after` and a minute: about 100 bytes each.
    pub seen_max: usize,
    /// Miners known at once: about 2 KiB each.
    pub miners_max: usize,
    /// (miner, environment) pairs whose clean audits are counted; the oldest is forgotten first and starts anew.
    pub clean_counts_max: usize,
    /// Attempts at one job. Three replicas of a job that no machine finishes are enough to say so.
    pub attempts_max: u32,
    /// Offers made for one job over all attempts: a job that everyone declines ends.
    pub offers_max: u32,
    /// Time to accept or decline (ComputeHorde: 7 s).
    pub accept_ms: u64,
    /// Start-up of an executor of a class that is not listed (ComputeHorde's class `test`: 3 s).
    pub startup_ms: u64,
    /// Start-up by hardware class.
    pub startup_by_class_ms: BTreeMap<String, u64>,
    /// Added to every execution (ComputeHorde: 5 s).
    pub leeway_ms: u64,
    /// Time to fetch a model that the miner's advert does not list.
    pub model_fetch_ms: u64,
    /// Slowest link that an input or output may take, bytes a second.
    pub transfer_bytes_per_s: u64,
    /// Time to reveal after a commitment.
    pub reveal_ms: u64,
    /// How long a job, or a part that lost its miner, waits for a free one.
    pub queue_wait_ms: u64,
    /// Audits that run at once on this validator's own executor; the others wait in line.
    pub audits_max: usize,
    /// Tries at one audit.
    pub audit_tries: u32,
    /// Time off for a cheat or a withheld result (ComputeHorde: 4 h).
    pub drop_ms: u64,
    /// Time off once the sequential test says cheat.
    pub ban_ms: u64,
    /// First pause after a failure that proves nothing; doubles with each in a row.
    pub pause_ms: u64,
    /// Longest such pause.
    pub pause_max_ms: u64,
    /// Audit settings.
    pub audit: crate::domain::audit::AuditConfig,
}

impl Default for JobConfig {
    fn default() -> Self {
        let by_class = [("gpu-24gb", 240_000), ("llm.a6000", 30_000), ("cpu.8c.16gb", 30_000), ("test", 3_000)];
        Self {
            live_max: 10_000,
            seen_max: 1_000_000,
            miners_max: 4_096,
            clean_counts_max: 100_000,
            attempts_max: 4,
            offers_max: 64,
            accept_ms: 7_000,
            startup_ms: 3_000,
            startup_by_class_ms: by_class.into_iter().map(|(class, ms)| (class.to_owned(), ms)).collect(),
            leeway_ms: 5_000,
            model_fetch_ms: 60_000,
            transfer_bytes_per_s: 1 << 20,
            reveal_ms: 10_000,
            queue_wait_ms: 60_000,
            audits_max: 4,
            audit_tries: 3,
            drop_ms: 4 * 3_600_000,
            ban_ms: 30 * 24 * 3_600_000,
            pause_ms: 250,
            pause_max_ms: 600_000,
            audit: crate::domain::audit::AuditConfig::default(),
        }
    }
}

/// Entries of the trust book for each miner that may be known at once: hotkeys come and go.
const TRUST_PER_MINER: usize = 16;

impl JobConfig {
    /// Miners in whom trust is remembered.
    pub fn trust_max(&self) -> usize {
        self.miners_max.saturating_mul(TRUST_PER_MINER)
    }
    pub(super) fn accept(&self) -> Duration {
        Duration::from_millis(self.accept_ms)
    }
    pub(super) fn reveal(&self) -> Duration {
        Duration::from_millis(self.reveal_ms)
    }
    pub(super) fn queue_wait(&self) -> Duration {
        Duration::from_millis(self.queue_wait_ms)
    }
    /// From acceptance to result: start-up, leeway, transfers, model, execution.
    pub(super) fn execution(&self, spec: &sundara_proto::job::JobSpec, has_model: bool) -> Duration {
        let startup = self.startup_by_class_ms.get(&spec.hardware_class).copied().unwrap_or(self.startup_ms);
        let bytes = spec.input_len.0.saturating_add(spec.limits.output.0);
        let transfer = bytes.saturating_mul(1_000) / self.transfer_bytes_per_s.max(1);
        let fetch = if has_model { 0 } else { self.model_fetch_ms };
        [startup, self.leeway_ms, transfer, fetch, spec.limits.wall_ms]
            .into_iter()
            .fold(Duration::ZERO, |sum, ms| sum.saturating_add(Duration::from_millis(ms)))
    }
}
