//! Draws: who owns a job, who streams, what is audited. All from digests, so that anyone can draw them again.

use crate::crypto::Context;
use crate::id::{Digest, Hotkey, JobId};

/// What a validator publishes before an epoch for the secret that it draws audits with.
pub fn audit_commitment(epoch: u64, secret: &[u8; 32]) -> Digest {
    Context::AUDIT_COMMIT.digest(&[&epoch.to_le_bytes(), secret])
}

/// Whether the result behind `commitment` is audited, at probability `p`. The commitment came first, so the miner could
/// not choose its answer by the draw.
pub fn is_audited(secret: &[u8; 32], job: &JobId, miner: &Hotkey, commitment: &Digest, p: f64) -> bool {
    let draw = Context::AUDIT_DRAW.digest(&[secret, job.as_ref(), miner.as_ref(), commitment.as_ref()]);
    unit_interval(&draw) < p
}

/// Salted commitment to a result, before anyone's result is seen.
pub fn result_commitment(job: &JobId, attempt: u32, miner: &Hotkey, result: &Digest, salt: &[u8; 32]) -> Digest {
    Context::RESULT_COMMIT.digest(&[job.as_ref(), &attempt.to_le_bytes(), miner.as_ref(), result.as_ref(), salt])
}

/// Which of `replicas` streams its output to the requester.
pub fn streaming_replica(job: &JobId, attempt: u32, replicas: usize) -> usize {
    let draw = Context::STREAM_DRAW.digest(&[job.as_ref(), &attempt.to_le_bytes()]);
    let word = u64::from_le_bytes(first_eight(&draw));
    usize::try_from(word % replicas.max(1) as u64).unwrap_or(0)
}

/// Order in which validators own a job, the owner first: weighted rendezvous hashing, weight/-ln(u) descending.
///
/// `validators` gives each hotkey's stake; zero-stake validators come last, in hash order. With equal stakes every
/// validator owns an equal part of the jobs, and the loss of one moves only that one's jobs.
pub fn owner_order(job: &JobId, validators: &[(Hotkey, u64)]) -> Vec<Hotkey> {
    let mut scored: Vec<(f64, [u8; 32], Hotkey)> = validators
        .iter()
        .map(|(hotkey, stake)| {
            let draw = Context::OWNER.digest(&[job.as_ref(), hotkey.as_ref()]);
            // u in (0, 1]: the logarithm is finite and its division well defined.
            let u = 1.0 - unit_interval(&draw);
            let score = if *stake == 0 { 0.0 } else { *stake as f64 / portable_neg_ln(u).max(f64::MIN_POSITIVE) };
            (score, draw.0, *hotkey)
        })
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    scored.into_iter().map(|(_, _, hotkey)| hotkey).collect()
}

/// The first 53 bits of a digest as a number in [0, 1).
fn unit_interval(digest: &Digest) -> f64 {
    const SCALE: f64 = 1.0 / (1_u64 << 53) as f64;
    (u64::from_le_bytes(first_eight(digest)) >> 11) as f64 * SCALE
}

fn first_eight(digest: &Digest) -> [u8; 8] {
    let mut word = [0; 8];
    word.copy_from_slice(&digest.0[..8]);
    word
}

/// -ln(u) for u in (0, 1], to the same bits on every machine: only additions, multiplications and divisions, which IEEE
/// 754 fixes, where `f64::ln` is whatever the platform's library makes of it.
///
/// u = m * 2^-k with m in [1/sqrt 2, sqrt 2); ln m = 2 artanh((m-1)/(m+1)) by its series to the 21st power, whose
/// remainder is below 1e-17 there.
fn portable_neg_ln(u: f64) -> f64 {
    const LN_2: f64 = std::f64::consts::LN_2;
    let mut m = u;
    let mut k = 0.0;
    while m < std::f64::consts::FRAC_1_SQRT_2 {
        m *= 2.0;
        k += 1.0;
    }
    let z = (m - 1.0) / (m + 1.0);
    let z2 = z * z;
    let mut term = z;
    let mut sum = 0.0;
    let mut n = 1.0;
    while n <= 21.0 {
        sum += term / n;
        term *= z2;
        n += 2.0;
    }
    k * LN_2 - 2.0 * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hotkeys(n: u8) -> Vec<(Hotkey, u64)> {
        (1..=n).map(|i| (Hotkey([i; 32]), 1)).collect()
    }

    fn job(i: u32) -> JobId {
        JobId(Context::JOB.digest_one(&i.to_le_bytes()).0)
    }

    #[test]
    fn logarithm_agrees_with_the_library_to_one_in_1e14() {
        for i in 1..=10_000 {
            let u = f64::from(i) / 10_000.0;
            let (ours, theirs) = (portable_neg_ln(u), -u.ln());
            assert!((ours - theirs).abs() <= 1e-14 * theirs.abs().max(1.0), "{u}: {ours} {theirs}");
        }
    }

    #[test]
    fn stakes_share_the_jobs_in_proportion() {
        let validators = [(Hotkey([1; 32]), 1), (Hotkey([2; 32]), 3)];
        let owned = (0..20_000).filter(|i| owner_order(&job(*i), &validators)[0] == validators[1].0).count();
        // Binomial(20000, 0.75): 6 standard deviations are 368.
        assert!((14_632..=15_368).contains(&owned), "{owned}");
    }

    #[test]
    fn losing_a_validator_moves_only_its_jobs() {
        let (all, fewer) = (hotkeys(6), hotkeys(5));
        for i in 0..2_000 {
            let order = owner_order(&job(i), &all);
            let rest: Vec<Hotkey> = order.iter().copied().filter(|h| *h != all[5].0).collect();
            assert_eq!(rest, owner_order(&job(i), &fewer));
        }
    }

    #[test]
    fn audits_are_drawn_at_their_rate_and_depend_on_the_commitment() {
        let (secret, miner) = ([9; 32], Hotkey([1; 32]));
        let hits = (0..50_000).filter(|i| is_audited(&secret, &job(*i), &miner, &Digest([0; 32]), 0.042)).count();
        // Binomial(50000, 0.042): mean 2100, 6 standard deviations are 269.
        assert!((1_831..=2_369).contains(&hits), "{hits}");
        let differ = (0..1_000)
            .filter(|i| {
                is_audited(&secret, &job(*i), &miner, &Digest([0; 32]), 0.5)
                    != is_audited(&secret, &job(*i), &miner, &Digest([1; 32]), 0.5)
            })
            .count();
        assert!((400..=600).contains(&differ), "{differ}");
        assert!(is_audited(&secret, &job(1), &miner, &Digest([0; 32]), 1.0));
        assert!(!is_audited(&secret, &job(1), &miner, &Digest([0; 32]), 0.0));
    }
}
