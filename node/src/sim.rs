//! A seeded discrete-event simulator over [`crate::domain`].
//!
//! **Owns** a world in which one validator's job machine, its store, its requesters and many miners of every kind of
//! honesty exchange messages that may be late, lost, doubled or overtaken, and in which the validator may be killed
//! between any two of its acts. **Does not own** any rule: the machine is the one that a node runs.
//!
//! **Invariants checked in every run** (see [`world::World::finish`]): whoever was told "acknowledged" is told one
//! verdict and never another; every job ends; no slot and no audit stays taken; a verified result is the right one
//! unless everyone who vouched for it lied alike; an honest miner is never accused of a lie.
//!
//! A run is a function of its [`Setup`]; a failing one prints it.
#![allow(clippy::unwrap_used)]

mod miner;
mod tests;
mod world;

use crate::domain::job::JobConfig;

/// How a miner behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// Does as it should.
    Honest,
    /// Gives a wrong result in so many of 1,000 jobs.
    Wrong(u32),
    /// Honest for so many jobs, then always wrong.
    TrustThenWrong(u32),
    /// Commits to anything, then reveals what its peer revealed.
    Copier,
    /// Commits and never reveals.
    Withholder,
    /// Gives the same wrong result as every other colluder.
    Colluder,
    /// Never answers.
    Dead,
    /// Accepts and needs an hour.
    Slow,
    /// Accepts and breaks.
    Faulting,
    /// Declines everything.
    Declining,
    /// Hands in an attestation that it made for another job.
    Replayer,
}

impl Behaviour {
    /// Whether it may be accused of a lie.
    fn lies(self) -> bool {
        matches!(
            self,
            Self::Wrong(_)
                | Self::TrustThenWrong(_)
                | Self::Copier
                | Self::Withholder
                | Self::Colluder
                | Self::Replayer
        )
    }
}

/// What the network does to messages, in parts of 1,000.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weather {
    pub(crate) lost: u32,
    pub(crate) doubled: u32,
    /// Longest delay in microseconds; messages overtake each other.
    pub(crate) delay_us: u64,
    /// Chance, each second, that a miner loses its connection and state for a while.
    pub(crate) churn: u32,
}

/// Everything that a run depends on.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) seed: u64,
    pub(crate) miners: Vec<Behaviour>,
    pub(crate) jobs: u64,
    pub(crate) replicas: u8,
    /// Time between submissions in microseconds.
    pub(crate) interval_us: u64,
    pub(crate) config: JobConfig,
    pub(crate) weather: Weather,
    /// The validator is killed before its n-th act.
    pub(crate) kill_at: Option<u64>,
    /// Miners come with so many clean audits and full held-back pay.
    pub(crate) trusted: Option<u32>,
    /// The run ends with the first offence.
    pub(crate) stop_at_offence: bool,
}

impl Setup {
    pub(crate) fn new(seed: u64, miners: &[Behaviour], jobs: u64, replicas: u8) -> Self {
        Self {
            seed,
            miners: miners.to_vec(),
            jobs,
            replicas,
            interval_us: 5_000,
            config: JobConfig::default(),
            weather: Weather { delay_us: 2_000, ..Weather::default() },
            kill_at: None,
            trusted: None,
            stop_at_offence: false,
        }
    }
}
