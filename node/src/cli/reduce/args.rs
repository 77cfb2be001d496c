//! Flags of `reduce`.

use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use sundara_proto::rules::round::dtype::{Dtype, Wire};

use crate::api::rounds;

/// Verbs of map-reduce.
#[derive(Debug, Subcommand)]
pub enum ReduceCommand {
    /// Measure rounds between processes on this machine, check what comes out, and show how they do without a reducer.
    Bench(BenchArgs),
    /// One process of a bench, which speaks to it over standard input and output.
    #[command(hide = true)]
    BenchNode(BenchNodeArgs),
}

/// How much can be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Every lie is found and its author named.
    Verified,
    /// Bit by bit in the order of ranks.
    Exact,
    /// Unchecked.
    Off,
}

/// How small words are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// As the tensor has it.
    None,
    /// 16 bits.
    Bf16,
    /// 8 bits there, 16 back.
    Int8,
}

/// Who sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Topology {
    /// Nodes apart from the members.
    Reducers,
    /// Every member a part.
    Butterfly,
}

/// What a round does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Op {
    /// All-reduce to the sum.
    Sum,
    /// All-reduce to the mean.
    Mean,
    /// The first member's tensor to all others.
    Broadcast,
}

/// A bench of rounds.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Members of the group, a process each.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(super) members: u16,
    /// Reducers, a process each.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) reducers: u16,
    /// Size of each member's tensor of f32: bytes, or with KiB, MiB, GiB.
    #[arg(long, default_value = "100MiB", value_name = "SIZE", value_parser = size)]
    pub(super) size: u64,
    /// Measured rounds; one more, the first, is checked against an independent sum.
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) rounds: u32,
    /// How much of a round can be checked by its members.
    #[arg(long, value_enum, default_value_t = Mode::Verified)]
    pub(super) mode: Mode,
    /// How small words are on the wire.
    #[arg(long, value_enum, default_value_t = Compress::None)]
    pub(super) compress: Compress,
    /// Who sums.
    #[arg(long, value_enum, default_value_t = Topology::Reducers)]
    pub(super) topology: Topology,
    /// What a round does.
    #[arg(long, value_enum, default_value_t = Op::Sum)]
    pub(super) op: Op,
    /// In one more round, kill the process of a reducer halfway.
    #[arg(long)]
    pub(super) kill_reducer: bool,
    /// Threads of each process for its network and its tasks; 0: one a core.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(super) threads: usize,
    /// Fixes the members' numbers.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(super) seed: u64,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

/// A process of a bench.
#[derive(Clone, Debug, Args)]
pub struct BenchNodeArgs {
    /// Threads for its network and its tasks; 0: one a core.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(super) threads: usize,
}

impl BenchArgs {
    /// What does not go together.
    pub(super) fn check(&self) -> Result<(), String> {
        let wrong = |message: &str| Err(message.to_owned());
        if self.size < 4 || !self.size.is_multiple_of(4) {
            return wrong("--size: at least one f32, and a whole number of them");
        }
        if self.kill_reducer && self.topology == Topology::Butterfly {
            return wrong("--kill-reducer: with --topology butterfly the reducers are members");
        }
        if self.kill_reducer && self.reducers < 2 {
            return wrong("--kill-reducer: nobody would be left to sum; --reducers 2 or more");
        }
        Ok(())
    }

    pub(super) fn elements(&self) -> usize {
        usize::try_from(self.size / 4).unwrap_or(usize::MAX)
    }

    /// Processes that only sum.
    pub(super) fn reducers_apart(&self) -> usize {
        if self.topology == Topology::Butterfly { 0 } else { usize::from(self.reducers) }
    }

    /// Whether what compression leaves away of one round is added to the next.
    pub(super) fn carries_errors(&self) -> bool {
        self.compress != Compress::None && self.op != Op::Broadcast
    }

    /// Bytes of tensors that a member holds at its peak: the numbers that the bench keeps for the next round, the round's
    /// input and output, and what compression left away.
    pub(super) fn held_by_a_member(&self) -> u64 {
        (3 + u64::from(self.carries_errors())) * self.size
    }

    /// Largest error of the checked round, relative to the sum of the members' norms.
    ///
    /// Verified sums of f32 promise 6e-7; sums in f32 round at each of their additions. A compressed word is off by at most
    /// half of a step, which is at most the block's largest number over Q (`Wire::q`); that number is hardly ever above five
    /// times the norm of one element. A broadcast changes nothing.
    pub(super) fn error_max(&self) -> f64 {
        let members = usize::from(self.members);
        let wire = Wire::of(Dtype::F32, self.compress.into(), members);
        match (self.op, self.compress, wire) {
            (Op::Broadcast, ..) => 0.0,
            (_, Compress::Bf16 | Compress::Int8, Some(wire)) => 5.0 / f64::from(wire.q()),
            _ if self.mode == Mode::Verified => 6e-7,
            _ => 6e-7_f64.max(members as f64 / f64::from(1 << 24)),
        }
    }
}

impl From<Compress> for rounds::Compress {
    fn from(compress: Compress) -> Self {
        match compress {
            Compress::None => Self::None,
            Compress::Bf16 => Self::Bf16,
            Compress::Int8 => Self::Int8,
        }
    }
}

impl From<Mode> for rounds::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Verified => Self::Verified,
            Mode::Exact => Self::Exact,
            Mode::Off => Self::Off,
        }
    }
}

impl From<Topology> for rounds::Topology {
    fn from(topology: Topology) -> Self {
        match topology {
            Topology::Reducers => Self::Reducers,
            Topology::Butterfly => Self::Butterfly,
        }
    }
}

/// Bytes, from `4096`, `25MiB` or `1 GiB`.
fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        other => return Err(format!("`{other}` is no unit: use KiB, MiB or GiB")),
    };
    let number: u64 = number.parse().map_err(|_| "a whole number is wanted, as in 25MiB".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "more than any machine has".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(["7", "3KiB", "25 MiB", "1GiB"].map(size), [Ok(7), Ok(3 << 10), Ok(25 << 20), Ok(1 << 30)]);
        assert!(["", "MiB", "1MB", "1.5GiB", "99999999999GiB"].iter().all(|text| size(text).is_err()));
    }
}
