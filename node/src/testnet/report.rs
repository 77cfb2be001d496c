//! What a testnet run came to.

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;
use sundara_proto::id::Hotkey;
use sundara_proto::verdict::{Standing, Verdict};

use super::{ReduceReport, Testnet};
use crate::api::jobs::{JobFailure, JobResult};

/// Counts of jobs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct JobCounts {
    /// Handed to the mesh.
    pub submitted: u64,
    /// Ended with a verified result that is also the right one.
    pub verified: u64,
    /// Ended without a result.
    pub failed: u64,
    /// Ended with a verdict that no result can be trusted, or with a wrong result.
    pub rejected: u64,
}

/// Submitted to verdict, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 99 of 100 are faster.
    pub p99: f64,
}

/// One miner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MinerReport {
    /// Who.
    pub hotkey: Hotkey,
    /// Whether it lies.
    pub byzantine: bool,
    /// Verdicts in which it took part.
    pub jobs: u64,
    /// Whether a verdict caught it: a wrong or withheld result.
    pub caught: bool,
}

/// What `testnet --exit --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Validators, miners and the client.
    pub nodes: usize,
    /// Counts.
    pub jobs: JobCounts,
    /// Latency of verified jobs.
    pub latency_ms: Latency,
    /// Verified jobs over the time from the first submission to the last verdict.
    pub jobs_per_second: f64,
    /// Miners, in the order of the testnet.
    pub miners: Vec<MinerReport>,
    /// From the first submission to the last verdict.
    pub wall_s: f64,
    /// Rounds of map-reduce, where some were wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduce: Option<ReduceReport>,
}

impl Report {
    /// Whether every job got a correct verified result, and every round the right sum.
    pub fn is_clean(&self) -> bool {
        let rounds = self.reduce.as_ref().is_none_or(|reduce| reduce.correct);
        rounds && self.jobs.verified == self.jobs.submitted && self.jobs.submitted > 0
    }
}

/// Gathers the outcomes of jobs into a [`Report`].
#[derive(Debug, Default)]
pub struct Tally {
    counts: JobCounts,
    latencies_us: Vec<u64>,
    miners: HashMap<Hotkey, (u64, bool)>,
}

impl Tally {
    /// A job was submitted.
    pub fn submitted(&mut self) {
        self.counts.submitted += 1;
    }

    /// A job ended; `right` says whether its output is the expected one.
    pub fn ended(&mut self, end: &Result<std::sync::Arc<JobResult>, JobFailure>, right: bool) {
        match end {
            Ok(result) => {
                self.verdict(&result.verdict);
                if right {
                    self.counts.verified += 1;
                    self.latencies_us.push(u64::try_from(result.latency.as_micros()).unwrap_or(u64::MAX));
                } else {
                    self.counts.rejected += 1;
                }
            }
            Err(JobFailure::Rejected(_)) => self.counts.rejected += 1,
            Err(_) => self.counts.failed += 1,
        }
    }

    fn verdict(&mut self, verdict: &Verdict) {
        for replica in &verdict.replicas {
            let (jobs, caught) = self.miners.entry(replica.miner).or_default();
            *jobs += 1;
            *caught |= matches!(replica.standing, Standing::Disagreed | Standing::Withheld);
        }
    }

    /// Miners that the validators themselves say they caught, whichever verdict did it.
    pub fn caught(&mut self, miners: impl IntoIterator<Item = Hotkey>) {
        for miner in miners {
            self.miners.entry(miner).or_default().1 = true;
        }
    }

    /// Miners caught so far.
    pub fn caught_count(&self) -> usize {
        self.miners.values().filter(|(_, caught)| *caught).count()
    }

    /// Counts so far.
    pub fn counts(&self) -> JobCounts {
        self.counts
    }

    /// Latency so far.
    pub fn latency(&self) -> Latency {
        let mut sorted = self.latencies_us.clone();
        sorted.sort_unstable();
        let at = |q: f64| {
            let rank = (q * sorted.len() as f64).ceil() as usize;
            sorted.get(rank.saturating_sub(1)).map_or(0.0, |us| *us as f64 / 1_000.0)
        };
        Latency { p50: at(0.5), p99: at(0.99) }
    }

    /// The report of a run that took `wall`.
    pub fn report(&self, testnet: &Testnet, wall: Duration) -> Report {
        let miners = testnet.miners().iter().map(|member| {
            let (jobs, caught) = self.miners.get(&member.hotkey).copied().unwrap_or_default();
            MinerReport { hotkey: member.hotkey, byzantine: member.misbehaviour.is_some(), jobs, caught }
        });
        let wall_s = wall.as_secs_f64();
        Report {
            nodes: testnet.nodes(),
            jobs: self.counts,
            latency_ms: self.latency(),
            jobs_per_second: if wall_s > 0.0 { self.counts.verified as f64 / wall_s } else { 0.0 },
            miners: miners.collect(),
            wall_s,
            reduce: None,
        }
    }
}
