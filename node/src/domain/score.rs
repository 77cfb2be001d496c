//! What an epoch's verdicts come to: one number a miner.
//!
//! **Owns** the scorers, each a pure function from an epoch's evidence to [`Score`]s. **Does not own** weights, shares
//! between tasks, or the chain. The same evidence gives the same scores on every validator, bit for bit: integers only,
//! in a fixed order.

mod consistency_time;
#[cfg(test)]
mod listening;

use std::collections::BTreeMap;

use sundara_proto::id::{Digest, Hotkey};

pub use consistency_time::{Sums, Tally, consistency_time};

/// A miner's score in millionths; 1,000,000 is the best of one task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Score(pub u64);

impl Score {
    /// The best score.
    pub const ONE: Self = Self(1_000_000);
}

/// Scores by miner.
pub type Scores = BTreeMap<Hotkey, Score>;

/// The incentive file in force where none is configured.
pub const BUILTIN_INCENTIVE: &str = include_str!("score/incentive.toml");

/// Digest of [`BUILTIN_INCENTIVE`], as it stands in verdicts.
pub fn builtin_incentive() -> Digest {
    Digest(*blake3::hash(BUILTIN_INCENTIVE.as_bytes()).as_bytes())
}
