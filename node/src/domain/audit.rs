//! How often results are checked, and the secrets by which checks are drawn.

use serde::{Deserialize, Serialize};
use sundara_proto::id::Digest;
use sundara_proto::rules::select;

/// A validator's secret of one epoch. Its commitment is published before the epoch, the secret itself in the next one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct EpochSecret {
    /// The epoch.
    pub epoch: u64,
    /// Unknown to everyone else until the epoch is over.
    pub secret: [u8; 32],
}

impl EpochSecret {
    /// What is published before the epoch.
    pub fn commitment(&self) -> Digest {
        select::audit_commitment(self.epoch, &self.secret)
    }
}

impl std::fmt::Debug for EpochSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EpochSecret({})", self.epoch)
    }
}

/// How often results are checked: section `jobs.audit` of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// Lowest probability: what stops a miner that builds trust and then cheats.
    pub floor: f64,
    /// Clean audits in an environment before the probability falls below 1.
    pub clean_min: u32,
    /// Jobs whose pay is held back.
    pub held_jobs: usize,
    /// Share of checkers that may collude with the miner.
    pub colluding_share: f64,
}

impl Default for AuditConfig {
    /// Figures of verification.md: 4.2 %, 10 audits, 30 jobs, 20 %.
    fn default() -> Self {
        Self { floor: 0.042, clean_min: 10, held_jobs: 30, colluding_share: 0.2 }
    }
}
