//! Which reducer sums which part, in pieces of what size, and how long silence may last.

use std::time::Duration;

/// Bytes of memory that a member may use for chunks under way.
pub const MEMBER_BYTES: u64 = 48 << 20;
/// Bytes of memory that a reducer may use for chunks, beyond 4 MiB for each member.
pub const REDUCER_BYTES: u64 = 40 << 20;
/// The same, for each member.
pub const REDUCER_BYTES_A_MEMBER: u64 = 4 << 20;
/// Memory that stays free on a machine that lends the rest.
pub const SPARE_BYTES: u64 = 500 << 20;
/// Chunks that a part should have at least, so that one is sent while another is summed and a third comes back.
const PIPELINE: u64 = 3;
/// Smallest chunk, in groups: below it signatures and round trips cost more than the data.
const CHUNK_MIN: u32 = 8;

/// Memory that a machine lends as a reducer: half of what is free beyond [`SPARE_BYTES`].
pub fn capacity(free: u64) -> u64 {
    free.saturating_sub(SPARE_BYTES) / 2
}

/// A reducer as the leader knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Index among the round's nodes.
    pub node: usize,
    /// Memory that it lends, in bytes.
    pub memory: u64,
    /// What it carried, in bytes a second; `None`: never measured.
    pub bandwidth: Option<u64>,
}

/// Who gets a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Index of the reducer among the round's nodes.
    pub reducer: usize,
    /// Reducers that could take over, best first.
    pub spare: Vec<usize>,
    /// Share of the groups.
    pub groups: u64,
}

/// Sizes and shares of a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Parts in order.
    pub parts: Vec<Assignment>,
    /// Groups of a chunk.
    pub chunk_groups: u32,
}

/// Shares `groups` (of `group_bytes` on the wire) among the reducers in proportion to what they carried, no more to one
/// than its memory serves; each part's spares are the others, the fastest first. `members` send at once.
///
/// Returns nothing when there is no reducer.
pub fn plan(groups: u64, group_bytes: u64, members: u64, reducers: &[Candidate]) -> Option<Plan> {
    if reducers.is_empty() {
        return None;
    }
    let known: Vec<u64> = reducers.iter().filter_map(|r| r.bandwidth).collect();
    // One that was never measured counts as an average one.
    let average = if known.is_empty() { 1 } else { known.iter().sum::<u64>() / known.len() as u64 };
    let least = group_bytes * (members + 1) * u64::from(CHUNK_MIN);
    let usable: Vec<&Candidate> = reducers.iter().filter(|r| r.memory >= least).collect();
    let usable = if usable.is_empty() { reducers.iter().collect() } else { usable };
    let weights: Vec<u64> = usable.iter().map(|r| r.bandwidth.unwrap_or(average).max(1)).collect();
    let shares = share(groups, &weights);
    let mut order: Vec<usize> = (0..usable.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(weights[*i]));
    let parts: Vec<Assignment> = shares
        .iter()
        .enumerate()
        .filter(|(_, groups)| **groups > 0)
        .map(|(i, groups)| {
            // Rotated, so that the parts of two reducers that fail together go to different ones.
            let others = order.iter().cycle().skip(i + 1).take(order.len()).filter(|o| **o != i);
            Assignment { reducer: usable[i].node, spare: others.map(|o| usable[*o].node).collect(), groups: *groups }
        })
        .collect();
    let largest = parts.iter().map(|p| p.groups).max().unwrap_or(1);
    Some(Plan { parts, chunk_groups: chunk_groups(largest, group_bytes, members) })
}

/// Groups of a chunk: a power of two up to 256; three chunks fit a reducer's memory, and a part has several.
pub fn chunk_groups(part_groups: u64, group_bytes: u64, members: u64) -> u32 {
    let budget = REDUCER_BYTES + members * REDUCER_BYTES_A_MEMBER;
    let fits = budget / (3 * (members + 1) * group_bytes.max(1));
    let pipelined = (part_groups / PIPELINE).max(u64::from(CHUNK_MIN));
    let most = fits.min(pipelined).clamp(1, 256);
    1 << most.ilog2()
}

/// Splits `total` in proportion to weights, exactly; remainders go to the largest fractions, the first among equals.
fn share(total: u64, weights: &[u64]) -> Vec<u64> {
    let sum: u128 = weights.iter().map(|w| u128::from(*w)).sum::<u128>().max(1);
    let exact = |w: u64| u128::from(total) * u128::from(w);
    let mut shares: Vec<u64> = weights.iter().map(|w| u64::try_from(exact(*w) / sum).unwrap_or(total)).collect();
    let mut rest = total - shares.iter().sum::<u64>();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|i| (std::cmp::Reverse(exact(weights[*i]) % sum), *i));
    for i in order.into_iter().cycle().take(weights.len()) {
        if rest == 0 {
            break;
        }
        shares[i] += 1;
        rest -= 1;
    }
    shares
}

/// What earlier rounds of a group have shown of its reducers and of its pace.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// Bytes a second of a whole round, smoothed.
    rate: Option<f64>,
}

/// Silence is never taken for trouble before this: a scheduler's hiccup on a busy machine lasts that long.
pub const STALL_MIN: Duration = Duration::from_millis(500);
/// Silence that is trouble while nothing is known of the pace.
pub const STALL_UNKNOWN: Duration = Duration::from_secs(5);

impl Pace {
    /// A round of so many bytes took so long.
    pub fn record(&mut self, bytes: u64, took: Duration) {
        let rate = bytes as f64 / took.as_secs_f64().max(1e-6);
        // A third of the newest: one odd round does not rule the next deadline.
        self.rate = Some(self.rate.map_or(rate, |old| old + (rate - old) / 3.0));
    }

    /// Time that a round of so many bytes will take, if that can be said.
    pub fn predict(&self, bytes: u64) -> Option<Duration> {
        self.rate.map(|rate| Duration::from_secs_f64((bytes as f64 / rate.max(1.0)).min(86_400.0)))
    }

    /// Silence that is trouble: a quarter of the predicted round, within limits.
    pub fn stall(&self, bytes: u64) -> Duration {
        self.predict(bytes).map_or(STALL_UNKNOWN, |round| (round / 4).clamp(STALL_MIN, Duration::from_secs(60)))
    }
}
