//! Map-reduce rounds: who sums what, what follows what, and what happens when somebody dies, stalls or lies.
//!
//! **Owns** three machines and a rule: [`plan`] (which reducer gets which part), [`leader`] (opens, amends and closes a
//! round), [`member`] (one member's way through it), [`reducer`] (one reducer's). **Does not own** bytes, digests,
//! signatures or sums: their drivers compute those by `sundara_proto::rules` and tell the machines how it came out.
//!
//! ```text
//! member            leader (lowest live rank)         reducers
//!   Ready ────────▶ all there, or deadline
//!   ◀────────────── Open (signed)
//!   Offer ───────────────────────────────────────────▶ all offers in, memory free
//!   ◀──────────────────────────────────────────────── Grant (everyone's scales)
//!   commitment, data ────────────────────────────────▶ receipt; all in: sum
//!   ◀──────────────────────────────────────────────── sum commitment, sum
//!   nonce ───────────────────────────────────────────▶ all in
//!   ◀──────────────────────────────────────────────── nonces
//!   tags ────────────────────────────────────────────▶ all in
//!   ◀──────────────────────────────────────────────── everyone's tags: settled
//!   Done ─────────▶ all done alike
//!   ◀────────────── Close: the result counts
//!   Fault ────────▶ who answers? Amend: drop members, move parts, redo the chunks that not everybody has
//! ```
//!
//! Invariants: a result is handed out only after the leader's Close, so all members end with the same bytes; a chunk is
//! redone from the start under the number of the amendment that reset it, and frames of earlier attempts count for
//! nothing; every wait has a deadline.

pub mod leader;
pub mod member;
pub mod plan;
pub mod reducer;
#[cfg(test)]
#[allow(clippy::panic)]
mod sim;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use sundara_proto::round::Rank;

/// One try at one chunk. Attempts are numbered by the amendment that began them, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct At {
    /// The chunk, counted through the round.
    pub chunk: u32,
    /// The amendment that reset it last; 0 for none.
    pub attempt: u32,
}

/// How much is proven about each chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// Nothing: sums are taken as they come.
    Off,
    /// Roots, and openings of samples.
    Sampled,
    /// Scales, roots, nonces and tags.
    Tags,
}

/// What the machines need to know of an open round.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Members as the round opened, ranks ascending.
    pub members: Vec<Rank>,
    /// What is proven.
    pub proof: Proof,
    /// Chunks of each part.
    pub parts: Vec<Range<u32>>,
    /// Who sends input for a chunk: everyone where `None`, else this rank alone (broadcast, gather).
    pub sole: Vec<Option<Rank>>,
    /// Who gets the output: everyone where `None`, else this rank alone (reduce).
    pub receiver: Option<Rank>,
}

impl Shape {
    /// Chunks of the round.
    pub fn chunks(&self) -> u32 {
        self.parts.iter().map(|p| p.end).max().unwrap_or(0)
    }

    /// The part of a chunk.
    pub fn part_of(&self, chunk: u32) -> Option<usize> {
        self.parts.iter().position(|p| p.contains(&chunk))
    }

    /// Whether this rank sends input for the chunk.
    pub fn sends(&self, rank: Rank, chunk: u32) -> bool {
        match self.sole.get(chunk as usize) {
            Some(Some(sole)) => *sole == rank,
            _ => true,
        }
    }

    /// Whether this rank gets the chunk's output.
    pub fn receives(&self, rank: Rank) -> bool {
        self.receiver.is_none_or(|receiver| receiver == rank)
    }
}

/// A change to an open round, as every member and reducer applies it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Its number, from 1.
    pub number: u32,
    /// Members that are out from now on.
    pub dropped: Vec<Rank>,
    /// Parts that go to another reducer: part, and index of the reducer among the round's nodes.
    pub moved: Vec<(usize, usize)>,
    /// Chunks that every live member has, and keeps.
    pub keep: Vec<bool>,
}

impl Change {
    /// Chunks that start again: all that are not kept when members left, else those of the moved parts.
    pub fn resets(&self, shape: &Shape) -> Vec<u32> {
        let kept = |chunk: u32| self.keep.get(chunk as usize).copied().unwrap_or(false);
        let touched = |part: usize| !self.dropped.is_empty() || self.moved.iter().any(|(p, _)| *p == part);
        let parts = shape.parts.iter().enumerate().filter(|(part, _)| touched(*part));
        parts.flat_map(|(_, chunks)| chunks.clone()).filter(|chunk| !kept(*chunk)).collect()
    }
}
