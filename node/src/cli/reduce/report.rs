//! What a bench prints.

use std::collections::BTreeSet;

use serde::Serialize;
use sundara_proto::id::Hotkey;
use sundara_proto::units::ByteCount;

use super::Round;
use super::args::{BenchArgs, Compress, Mode, Op, Topology};

/// One figure over the rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

/// The round in which a reducer was killed.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Kill {
    pub(super) wall_s: f64,
    /// Over the median of the others.
    pub(super) of_clean: f64,
}

/// What `--json` prints. Times, bytes and rates are of one round.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    wall_s: Spread,
    /// Bytes of the tensor over the median.
    algbw_gb_s: f64,
    /// Median, all processes.
    cpu_s: f64,
    /// Median, sent by all processes.
    wire_bytes: u64,
    /// Sent by the member that sent most in any round.
    member_upload_bytes_max: u64,
    correct: bool,
    blamed: BTreeSet<Hotkey>,
    /// Of the checked round, relative to the sum of the members' norms, and what it may be.
    error: f64,
    error_max: f64,
    /// Of the member and the reducer with the most: at the peak, without the tensors.
    member_memory_bytes_max: u64,
    reducer_memory_bytes_max: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    kill: Option<Kill>,
    members: u16,
    reducers: usize,
    bytes: u64,
    rounds: u32,
    mode: Mode,
    compress: Compress,
    topology: Topology,
    op: Op,
    threads: usize,
}

impl Report {
    pub(super) fn new(
        args: &BenchArgs,
        rounds: &[Round],
        error: f64,
        correct: bool,
        blamed: BTreeSet<Hotkey>,
        kill: Option<Kill>,
    ) -> Self {
        let all = |figure: fn(&Round) -> f64| rounds.iter().map(figure).collect::<Vec<f64>>();
        let most = |figure: fn(&Round) -> &Vec<u64>| rounds.iter().flat_map(figure).copied().max().unwrap_or_default();
        let wall_s = Spread::of(&all(|round| round.wall));
        Self {
            wall_s,
            algbw_gb_s: args.size as f64 / wall_s.median / 1e9,
            cpu_s: median(&all(|round| round.cpu)),
            wire_bytes: median(&all(|round| round.wire as f64)) as u64,
            member_upload_bytes_max: most(|round| &round.uploads),
            correct,
            blamed,
            error,
            error_max: args.error_max(),
            member_memory_bytes_max: most(|round| &round.members_peak),
            reducer_memory_bytes_max: most(|round| &round.reducers_peak),
            kill,
            members: args.members,
            reducers: args.reducers_apart(),
            bytes: args.size,
            rounds: args.rounds,
            mode: args.mode,
            compress: args.compress,
            topology: args.topology,
            op: args.op,
            threads: args.threads,
        }
    }
}

/// The middle of the samples; the mean of the middle two where their number is even.
pub(super) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.len().saturating_sub(1) / 2, sorted.len() / 2);
    match (sorted.get(low), sorted.get(high)) {
        (Some(low), Some(high)) => f64::midpoint(*low, *high),
        _ => f64::NAN,
    }
}

/// A report for people.
pub(super) fn in_words(r: &Report) -> String {
    let what = match r.op {
        Op::Sum => "sum",
        Op::Mean => "mean",
        Op::Broadcast => "broadcast",
    };
    let who = match r.topology {
        Topology::Reducers => format!("{} members, {} reducers", r.members, r.reducers),
        Topology::Butterfly => format!("{} members that sum", r.members),
    };
    let (mode, compress) = (format!("{:?}", r.mode).to_lowercase(), format!("{:?}", r.compress).to_lowercase());
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let size = ByteCount(r.bytes);
    let mut lines = vec![format!("{what} of {size}, {who}, {mode}, compression {compress}: {} rounds", r.rounds)];
    let mut add = |label: &str, text: String| lines.push(format!("  {label:<10} {text}"));
    let wall = r.wall_s;
    add("round", format!("{:.3} s ({:.3} - {:.3}), {:.3} GB/s", wall.median, wall.min, wall.max, r.algbw_gb_s));
    add("processor", format!("{:.2} s a round, all processes", r.cpu_s));
    let upload = r.member_upload_bytes_max as f64 / r.bytes as f64;
    add("wire", format!("{:.3} GB a round; a member sends {upload:.3} of its tensor", r.wire_bytes as f64 / 1e9));
    let reducer =
        if r.reducers == 0 { String::new() } else { format!(", reducer {}", mib(r.reducer_memory_bytes_max)) };
    add("memory", format!("member {} over its tensors{reducer}", mib(r.member_memory_bytes_max)));
    if let Some(kill) = r.kill {
        add("killed", format!("one reducer in mid-round: {:.3} s, {:.2} of a clean round", kill.wall_s, kill.of_clean));
    }
    let right = if r.correct { "yes" } else { "NO" };
    add("correct", format!("{right}; off by {:.1e} of the members' norms, {:.1e} allowed", r.error, r.error_max));
    let blamed: Vec<String> = r.blamed.iter().map(ToString::to_string).collect();
    add("blamed", if blamed.is_empty() { "nobody".to_owned() } else { blamed.join(", ") });
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
