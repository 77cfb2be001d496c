//! How often results are checked, what a check says about a miner, and the secrets by which checks are drawn.
//!
//! **Owns** the probability of an audit, the sequential test, the pay held back, and the turn of the epochs' secrets.
//! **Does not own** the draw itself: every node must compute it to the same bits, so it lies in
//! [`sundara_proto::rules::select`].
//!
//! ```text
//! epoch:          e-1            |       e        |      e+1
//! published:   commitment(e) ... | commitment(e+1)| secret(e), commitment(e+2)
//! drawn with:   secret(e-1)      |   secret(e)    |  secret(e+1)
//! ```

mod epochs;
mod trust;

use serde::{Deserialize, Serialize};

pub use epochs::{EpochSecret, Epochs, Neglect, recheck};
pub use trust::{BAN_AT, CLEAR_AT, HeldPay, Observation, Suspicion};

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
        Self { floor: FLOOR, clean_min: 10, held_jobs: 30, colluding_share: 0.2 }
    }
}

/// The floor that third parties hold a validator to: every result whose draw falls below it was to be audited.
pub const FLOOR: f64 = 0.042;

impl AuditConfig {
    /// Probability that a result is audited: 1 until `clean_min` clean audits, then
    /// `max(floor, 1/clean, worth / ((1-r)(worth + held)))`.
    ///
    /// `worth` is this job's pay, `held` the sum of the pay that the miner would lose, in one unit.
    pub fn probability(&self, clean: u32, worth: u64, held: u64) -> f64 {
        if clean < self.clean_min.max(1) {
            return 1.0;
        }
        let (worth, held) = (worth.max(1) as f64, held as f64);
        let at_stake = worth / ((1.0 - self.colluding_share).max(f64::MIN_POSITIVE) * (worth + held));
        self.floor.max(1.0 / f64::from(clean)).max(at_stake).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probability_follows_the_formula() {
        let config = AuditConfig::default();
        // clean, worth, held -> p
        let table = [
            (0, 1, 1_000_000, 1.0),
            (9, 1, 1_000_000, 1.0),
            (10, 1, 1_000_000, 0.1),
            (20, 1, 1_000_000, 0.05),
            (24, 1, 1_000_000, 0.042),
            (1_000_000, 1, 1_000_000, 0.042),
            // Equal pay, 30 held: 1 / (0.8 * 31) is below the floor.
            (1_000, 100, 3_000, 0.042),
            // A job worth all that is held: 1 / (0.8 * 2).
            (1_000, 3_000, 3_000, 0.625),
            // Nothing held: no penalty, so always.
            (1_000, 5, 0, 1.0),
            (1_000, 0, 0, 1.0),
        ];
        for (clean, worth, held, p) in table {
            let got = config.probability(clean, worth, held);
            assert!((got - p).abs() < 1e-12, "{clean} {worth} {held}: {got} is not {p}");
        }
    }
}
