//! Which miners take a job.
//!
//! **Owns** the [`Fleet`] (what is known of every miner, indexed by engine and class so that a choice never walks over all
//! of them) and [`solve`], the pure choice among candidates. **Does not own** why a miner is off (the job machine says
//! until when) nor memory sizes: a miner declines what is too large for it.
//!
//! **Invariants**: a pick has distinct owners, one engine, the class that was asked for, and only miners with a free
//! slot that are present, connected and not off. Ties are broken by a seeded draw, so nobody foresees who is asked. Of
//! miners of one price and load none is passed over for good, whatever models it lacks.

mod fleet;
mod pool;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use sundara_proto::advert::ExecutorClass;
use sundara_proto::id::{EngineId, Hotkey, ModelId, NodeId};
use sundara_proto::units::UnixMillis;

pub use fleet::Fleet;

use super::Owner;

/// A miner as its advert and the chain describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MinerProfile {
    /// Who.
    pub hotkey: Hotkey,
    /// Who stands behind it.
    pub owner: Owner,
    /// Where offers go.
    pub node: NodeId,
    /// What it can run.
    pub classes: Vec<ExecutorClass>,
    /// Models whose blobs it has.
    pub models: Vec<ModelId>,
    /// When the advert lapses.
    pub expires_at: UnixMillis,
}

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Want<'a> {
    /// Hardware class; empty for any.
    pub class: &'a str,
    /// Engine, where replicas of the attempt already run on one.
    pub engine: Option<EngineId>,
    /// Preferred: miners that have this model. Others come to their turn too, though rarely.
    pub model: Option<ModelId>,
    /// Miners, all of distinct owners.
    pub count: usize,
    /// Owners that take part already.
    pub owners: &'a [Owner],
    /// Miners that are not to be asked.
    pub exclude: &'a [Hotkey],
}

/// A free slot at a miner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Who.
    pub miner: Hotkey,
    /// Who stands behind it.
    pub owner: Owner,
    /// Where offers go.
    pub node: NodeId,
    /// Which of the miner's classes.
    pub class: u8,
    /// Announced price in rao a second.
    pub price: u64,
    /// The miner has the model.
    pub has_model: bool,
}

/// A miner as scheduling sees it, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MinerView {
    /// Its advert has not lapsed.
    pub present: bool,
    /// Not known to be unreachable.
    pub connected: bool,
    /// Not asked for so many milliseconds more.
    pub off_for_ms: u64,
    /// Jobs that it has a part of.
    pub running: usize,
    /// Offers made to it since it was first known.
    pub offers: u64,
    /// Offers made to all miners since start.
    pub offers_to_all: u64,
    /// Models that it says it has.
    pub models: Vec<ModelId>,
    /// What it can run.
    pub classes: Vec<ClassView>,
}

/// One class of a [`MinerView`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ClassView {
    /// Hardware class.
    pub name: String,
    /// Slots offered.
    pub slots: u32,
    /// Slots in use by this validator.
    pub in_flight: u32,
    /// Announced price in rao a second.
    pub price: u64,
    /// Engines that this validator's executor has too.
    pub engines: usize,
    /// A slot can be had now.
    pub free: bool,
}

/// One miner that could take a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The slot.
    pub seat: Seat,
    /// It lacks the model, and is not due yet to be asked all the same.
    pub held_back: bool,
    /// Part of its slots in use, in 1/1024.
    pub load: u32,
    /// Drawn anew whenever the load changes.
    pub tie: u64,
}

/// Chooses `count` candidates of distinct owners: those that are not held back first, then the cheapest, the least loaded, and by
/// the draw. `None` when there are fewer owners than that.
pub fn solve(candidates: &mut [Candidate], count: usize) -> Option<Vec<Seat>> {
    candidates.sort_unstable_by_key(|c| (c.held_back, c.seat.price, c.load, c.tie, c.seat.miner));
    let mut chosen: Vec<Seat> = Vec::with_capacity(count);
    for candidate in candidates.iter() {
        if chosen.len() == count {
            break;
        }
        if chosen.iter().all(|seat| seat.owner != candidate.seat.owner) {
            chosen.push(candidate.seat);
        }
    }
    (chosen.len() == count).then_some(chosen)
}
