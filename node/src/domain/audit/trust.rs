//! What checks say about a miner.

use std::collections::VecDeque;

/// At this logarithm of the likelihood ratio a miner is banned: one in a million honest miners would be (Wald's bound).
pub const BAN_AT: f64 = 13.8;
/// At this one it is cleared and the test begins again: one in a thousand cheats would be.
pub const CLEAR_AT: f64 = -6.9;

/// One thing seen of a miner that a cheat and an honest miner do at different rates. The cheat is one that lies in every
/// tenth job: a bolder one is caught sooner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// An audit found its result right. P = 0.9 for the cheat, 0.9999 for the honest.
    Clean,
    /// A result or commitment that it cannot defend. P = 0.1 and 1e-4 (a broken machine): two of them ban.
    Proven,
    /// It committed and did not reveal. P = 0.1 and 0.01 (a crash or a lost connection).
    Withheld,
}

impl Observation {
    fn log_ratio(self) -> f64 {
        match self {
            Self::Clean => (0.9_f64 / 0.9999).ln(),
            Self::Proven => (0.1_f64 / 1e-4).ln(),
            Self::Withheld => (0.1_f64 / 0.01).ln(),
        }
    }
}

/// The running sequential test of one miner.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Suspicion(f64);

impl Suspicion {
    /// From what was stored; what is no number starts anew.
    pub fn restored(value: f64) -> Self {
        Self(if value.is_finite() { value.clamp(CLEAR_AT, BAN_AT) } else { 0.0 })
    }

    /// The logarithm of the likelihood ratio.
    pub fn value(self) -> f64 {
        self.0
    }

    /// Adds an observation; `true` when the miner is banned by it. A cleared miner starts at 0 again, so that trust
    /// cannot be saved up.
    pub fn observe(&mut self, observation: Observation) -> bool {
        self.0 += observation.log_ratio();
        if self.0 <= CLEAR_AT {
            self.0 = 0.0;
        }
        // Two proven offences sum to 13.8155 and a clean audit between them takes 0.105 away: the bound is for offences
        // in a row, as the test wants it.
        let banned = self.0 >= BAN_AT;
        self.0 = self.0.min(BAN_AT);
        banned
    }
}

/// Pay of a miner's last jobs, lost when it is caught.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldPay {
    last: VecDeque<u64>,
    sum: u64,
}

impl HeldPay {
    /// Adds a job's pay and lets go of what is older than `jobs` jobs.
    pub fn push(&mut self, worth: u64, jobs: usize) {
        self.last.push_back(worth);
        self.sum = self.sum.saturating_add(worth);
        while self.last.len() > jobs {
            let gone = self.last.pop_front().unwrap_or(0);
            self.sum = self.sum.saturating_sub(gone);
        }
    }

    /// All that is held.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// Takes everything away; returns how much it was.
    pub fn forfeit(&mut self) -> u64 {
        self.last.clear();
        std::mem::take(&mut self.sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_proven_offences_ban_and_one_does_not() {
        let mut suspicion = Suspicion::default();
        assert!(!suspicion.observe(Observation::Proven));
        assert!(suspicion.observe(Observation::Proven));
        assert_eq!(suspicion.value(), BAN_AT);
    }

    #[test]
    fn sixty_six_clean_audits_clear_and_nothing_is_saved_up() {
        let mut suspicion = Suspicion::default();
        let until_cleared = (1..).find(|_| {
            suspicion.observe(Observation::Clean);
            suspicion.value() == 0.0
        });
        assert_eq!(until_cleared, Some(66));
        for _ in 0..10_000 {
            suspicion.observe(Observation::Clean);
            assert!(suspicion.value() > CLEAR_AT && suspicion.value() <= 0.0);
        }
    }

    #[test]
    fn stored_nonsense_starts_anew() {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(Suspicion::restored(value).value(), 0.0);
        }
        assert_eq!(Suspicion::restored(1e9).value(), BAN_AT);
    }

    #[test]
    fn held_pay_is_the_sum_of_the_last_jobs() {
        let mut held = HeldPay::default();
        for worth in 1..=100 {
            held.push(worth, 30);
        }
        assert_eq!(held.sum(), (71..=100).sum::<u64>());
        assert_eq!(held.forfeit(), (71..=100).sum::<u64>());
        assert_eq!(held.sum(), 0);
    }
}
