//! What a validator learns that only listens: too little to score an epoch before its pages are open.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use sundara_proto::attestation::Outcome;
use sundara_proto::batch::Batch;
use sundara_proto::crypto::{Context, HotkeyPair, Network, Signed};
use sundara_proto::id::{BlobId, Digest, EnvId, Hotkey, JobId};
use sundara_proto::pb;
use sundara_proto::rules::merkle;
use sundara_proto::units::{ByteCount, UnixMillis};
use sundara_proto::verdict::{Replica, Standing, Verdict, VerdictKind};

use super::consistency_time;

const JOBS: u32 = 200;
const PAGE: usize = 50;

fn network() -> Network {
    Network::named("listening", 1)
}

/// An epoch's verdicts; `faster` says which of two miners won each job.
fn epoch(faster: impl Fn(u32) -> bool) -> Vec<Verdict> {
    (0..JOBS)
        .map(|n| {
            let job = JobId(Context::JOB.digest_one(&n.to_le_bytes()).0);
            let replica = |miner: u8, wins: bool| Replica {
                miner: Hotkey([miner; 32]),
                standing: Standing::Agreed,
                attestation: Some(Digest([miner; 32])),
                commitment: Some(Digest([miner; 32])),
                latency_us: if wins { 900 } else { 1_100 },
            };
            Verdict {
                job,
                attempt: 0,
                rank: 0,
                kind: VerdictKind::Quorum(2),
                outcome: Some(Outcome::Completed),
                output: BlobId(job.0),
                output_len: ByteCount(8),
                env_id: EnvId([9; 32]),
                replicas: vec![replica(1, faster(n)), replica(2, !faster(n))],
                epoch: 5,
                issued_at: UnixMillis(1_750_000_000_000),
                incentive: super::builtin_incentive(),
            }
        })
        .collect()
}

/// What the validator publishes: signed roots on gossip, and the pages that it keeps.
fn publish(key: &HotkeyPair, verdicts: &[Verdict]) -> (Vec<Signed<Batch>>, Vec<Vec<Bytes>>) {
    let mut previous = Digest([0; 32]);
    let mut batches = Vec::new();
    let mut pages = Vec::new();
    for (n, part) in verdicts.chunks(PAGE).enumerate() {
        let entry = |verdict: &Verdict| {
            let signed = Signed::sign(&network(), key, verdict.clone()).to_wire();
            Bytes::from(pb::Entry { kind: Some(pb::entry::Kind::Verdict(signed)) }.encode_to_vec())
        };
        let page: Vec<Bytes> = part.iter().map(entry).collect();
        let batch = Batch {
            network: network(),
            epoch: 5,
            sequence: n as u64,
            root: merkle::root(page.iter().map(|entry| &entry[..])).unwrap(),
            count: u32::try_from(page.len()).unwrap(),
            previous,
            issued_at: UnixMillis(1_750_000_000_000).plus(Duration::from_secs(n as u64)),
        };
        let signed = Signed::sign(&network(), key, batch);
        previous = signed.digest();
        batches.push(signed);
        pages.push(page);
    }
    (batches, pages)
}

/// A batch without its digests: all of it that a listener can read anything from.
fn readable(batch: &Batch) -> Batch {
    Batch { root: Digest([0; 32]), previous: Digest([0; 32]), ..batch.clone() }
}

#[test]
fn a_listener_cannot_tell_two_epochs_apart_that_score_differently() {
    let key = HotkeyPair::from_seed(&[1; 32]);
    let (even, odd) = (epoch(|n| n % 4 == 0), epoch(|n| n % 4 != 0));
    assert_ne!(consistency_time(&even), consistency_time(&odd));
    let (heard_even, _) = publish(&key, &even);
    let (heard_odd, _) = publish(&key, &odd);
    let all = |heard: &[Signed<Batch>]| heard.iter().map(|batch| readable(batch.value())).collect::<Vec<_>>();
    assert_eq!(all(&heard_even), all(&heard_odd));
    // No miner, job or time rides along in clear.
    for batch in &heard_even {
        let bytes = batch.to_wire().encode_to_vec();
        for miner in [[1_u8; 32], [2; 32]] {
            assert!(!bytes.windows(32).any(|window| window == miner));
        }
    }
}

#[test]
fn a_right_guess_cannot_be_confirmed_by_the_root() {
    let key = HotkeyPair::from_seed(&[1; 32]);
    let verdicts = epoch(|n| n % 3 == 0);
    let (heard, pages) = publish(&key, &verdicts);
    // The listener guesses every verdict to the last field. It lacks the signatures, which are random: even the author,
    // with its key, could not make the same page twice.
    let (again, _) = publish(&key, &verdicts);
    for (batch, other) in heard.iter().zip(&again) {
        assert_ne!(batch.root, other.root);
    }
    // With the pages open, everyone has the author's scores, bit for bit, and knows that they are the pages meant.
    let mut shown = Vec::new();
    for (batch, page) in heard.iter().zip(&pages) {
        assert_eq!(merkle::root(page.iter().map(|entry| &entry[..])), Some(batch.root));
        for entry in page {
            let Some(pb::entry::Kind::Verdict(raw)) = pb::Entry::decode(&entry[..]).unwrap().kind else { panic!() };
            let verdict = Signed::<Verdict>::verify(&network(), raw).unwrap();
            assert_eq!(verdict.validator(), key.hotkey());
            shown.push(verdict.value().clone());
        }
    }
    assert_eq!(consistency_time(&shown), consistency_time(&verdicts));
}
