//! Sundara's default: consistent results, ranked by time.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use sundara_proto::id::{Hotkey, JobId};
use sundara_proto::units::UnixMillis;
use sundara_proto::verdict::{Standing, Verdict};

use super::{Score, Scores};

/// For each request that a miner took part in: 0 when its result was inconsistent or it gave none, else
/// (n - rank) / n among the n consistent results, rank 0 the fastest and equal times equal ranks. A miner's score is the
/// mean over its requests, rounded down to a millionth.
///
/// Where several validators ruled on one job the verdict of the lowest rank counts; of two of the same rank, the earlier.
/// The order of `verdicts` does not matter.
pub fn consistency_time<'a>(verdicts: impl IntoIterator<Item = &'a Verdict>) -> Scores {
    let mut tally = Tally::default();
    for verdict in verdicts {
        tally.add(verdict);
    }
    tally.sums().scores()
}

/// Points of miners, summed over requests that are different jobs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Sum of points and number of requests.
    miners: BTreeMap<Hotkey, (u64, u64)>,
}

impl Sums {
    /// Adds a verdict over a job that was not added before.
    pub fn add(&mut self, verdict: &Verdict) {
        self.add_points(points(verdict));
    }

    fn add_points(&mut self, points: impl IntoIterator<Item = (Hotkey, u64)>) {
        for (miner, points) in points {
            let (sum, requests) = self.miners.entry(miner).or_default();
            *sum = sum.saturating_add(points);
            *requests += 1;
        }
    }

    /// Each miner's score.
    pub fn scores(&self) -> Scores {
        self.each().map(|(miner, score, _)| (miner, score)).collect()
    }

    /// Each miner's score, and in how many requests it took part.
    pub fn each(&self) -> impl Iterator<Item = (Hotkey, Score, u64)> + '_ {
        self.miners.iter().map(|(miner, (sum, requests))| (*miner, Score(sum / (*requests).max(1)), *requests))
    }
}

/// Verdicts of several validators, each job once. Holds about 130 bytes a job of one replica, 40 more for each other.
#[derive(Debug, Default)]
pub struct Tally {
    jobs: BTreeMap<JobId, Ruled>,
}

/// What is kept of a job: its place first, then its points, so that two that are equal have equal effect.
type Ruled = (u32, UnixMillis, u32, Vec<(Hotkey, u64)>);

impl Tally {
    /// Takes a verdict in; of two over one job the better placed stays.
    pub fn add(&mut self, verdict: &Verdict) {
        let points: Vec<(Hotkey, u64)> = points(verdict).into_iter().collect();
        let ruled = (verdict.rank, verdict.issued_at, verdict.attempt, points);
        match self.jobs.entry(verdict.job) {
            Entry::Vacant(entry) => {
                entry.insert(ruled);
            }
            Entry::Occupied(mut entry) => {
                if ruled < *entry.get() {
                    entry.insert(ruled);
                }
            }
        }
    }

    /// Jobs that were ruled on.
    pub fn jobs(&self) -> usize {
        self.jobs.len()
    }

    /// What they come to.
    pub fn sums(&self) -> Sums {
        let mut sums = Sums::default();
        for (_, _, _, points) in self.jobs.values() {
            sums.add_points(points.iter().copied());
        }
        sums
    }
}

/// Points of everyone that took part in one request, each miner once.
fn points(verdict: &Verdict) -> BTreeMap<Hotkey, u64> {
    let mut points: BTreeMap<Hotkey, u64> = verdict.replicas.iter().map(|replica| (replica.miner, 0)).collect();
    if !verdict.kind.is_verified() {
        return points;
    }
    let mut times: Vec<u64> = Vec::new();
    let consistent = || verdict.replicas.iter().filter(|replica| replica.standing == Standing::Agreed);
    times.extend(consistent().map(|replica| replica.latency_us));
    let n = times.len() as u64;
    for replica in consistent() {
        let rank = times.iter().filter(|time| **time < replica.latency_us).count() as u64;
        points.insert(replica.miner, (n - rank) * Score::ONE.0 / n);
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;
    use sundara_proto::id::{BlobId, Digest, EnvId};
    use sundara_proto::units::ByteCount;
    use sundara_proto::verdict::{Replica, VerdictKind};

    fn verdict(job: u8, rank: u32, kind: VerdictKind, replicas: &[(u8, Standing, u64)]) -> Verdict {
        let replica = |&(miner, standing, latency_us): &(u8, Standing, u64)| Replica {
            miner: Hotkey([miner; 32]),
            standing,
            attestation: None,
            commitment: None,
            latency_us,
        };
        Verdict {
            job: JobId([job; 32]),
            attempt: 0,
            rank,
            kind,
            outcome: None,
            output: BlobId([0; 32]),
            output_len: ByteCount(0),
            env_id: EnvId([0; 32]),
            replicas: replicas.iter().map(replica).collect(),
            epoch: 0,
            issued_at: UnixMillis(0),
            incentive: Digest([0; 32]),
        }
    }

    fn scores(verdicts: &[Verdict]) -> Vec<(u8, u64)> {
        consistency_time(verdicts).into_iter().map(|(miner, score)| (miner.0[0], score.0)).collect()
    }

    #[test]
    fn consistent_results_rank_by_time_and_others_get_nothing() {
        use Standing::{Agreed, Disagreed, Faulted, Withheld};
        let quorum = VerdictKind::Quorum(2);
        let replicas =
            [(1, Agreed, 30), (2, Agreed, 10), (3, Agreed, 20), (4, Agreed, 20), (5, Disagreed, 1), (6, Withheld, 1)];
        let one = verdict(1, 0, quorum.clone(), &replicas);
        assert_eq!(
            scores(std::slice::from_ref(&one)),
            [(1, 250_000), (2, 1_000_000), (3, 750_000), (4, 750_000), (5, 0), (6, 0)]
        );
        let failed = verdict(2, 0, VerdictKind::Failed(String::new()), &[(2, Faulted, 0), (7, Agreed, 0)]);
        assert_eq!(scores(&[one, failed]).iter().find(|(miner, _)| *miner == 2), Some(&(2, 500_000)));
    }

    #[test]
    fn the_lowest_rank_counts_and_order_does_not() {
        let agreed = |miner| [(miner, Standing::Agreed, 5)];
        let first = verdict(1, 0, VerdictKind::Unaudited, &agreed(1));
        let second = verdict(1, 1, VerdictKind::Unaudited, &agreed(2));
        let expected = [(1, 1_000_000)];
        assert_eq!(scores(&[first.clone(), second.clone()]), expected);
        assert_eq!(scores(&[second, first]), expected);
        // Equal in every place: still the same, whichever comes first.
        let (one, other) =
            (verdict(1, 0, VerdictKind::Unaudited, &agreed(1)), verdict(1, 0, VerdictKind::Unaudited, &agreed(2)));
        assert_eq!(scores(&[one.clone(), other.clone()]), scores(&[other, one]));
    }

    #[test]
    fn sums_of_different_jobs_are_what_a_tally_of_them_is() {
        let verdicts: Vec<Verdict> = (0..20)
            .map(|n| {
                verdict(n, 0, VerdictKind::Quorum(2), &[(1, Standing::Agreed, u64::from(n)), (2, Standing::Agreed, 7)])
            })
            .collect();
        let mut sums = Sums::default();
        verdicts.iter().for_each(|verdict| sums.add(verdict));
        assert_eq!(sums.scores(), consistency_time(&verdicts));
        assert!(sums.each().all(|(_, _, requests)| requests == 20));
    }
}
