//! Any sequence of inputs whatever: the machine neither panics nor keeps a job for ever.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use sundara_proto::attestation::Outcome;
use sundara_proto::id::{Digest, JobId};
use sundara_proto::verdict::Verdict;

use super::testing::*;
use super::*;

#[derive(Clone, Debug)]
enum Op {
    Submit(u64),
    Cancel(u64),
    Wait(u64),
    Here(u32),
    Gone(u32),
    Advert(u32),
    Ban(u32),
    Auditor(bool),
    Epoch(u64),
    /// To the n-th offer made so far, what kind of answer, with what in it.
    Answer(usize, u8, u8),
    /// To the n-th audit asked for.
    Audit(usize, u8),
    /// About a part that was never offered.
    Stray(u64, u32, u32, u8),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..8_u64).prop_map(Op::Submit),
        1 => (0..8_u64).prop_map(Op::Cancel),
        4 => prop_oneof![0..200_u64, 0..100_000_u64].prop_map(Op::Wait),
        1 => (0..5_u32).prop_map(Op::Here),
        1 => (0..5_u32).prop_map(Op::Gone),
        1 => (0..5_u32).prop_map(Op::Advert),
        1 => (0..5_u32).prop_map(Op::Ban),
        1 => any::<bool>().prop_map(Op::Auditor),
        1 => (0..9_u64).prop_map(Op::Epoch),
        24 => (0..40_usize, 0..12_u8, 0..3_u8).prop_map(|(n, kind, what)| Op::Answer(n, kind, what)),
        6 => (0..10_usize, 0..4_u8).prop_map(|(n, what)| Op::Audit(n, what)),
        1 => (0..8_u64, 0..5_u32, 0..5_u32, 0..12_u8).prop_map(|(j, a, m, kind)| Op::Stray(j, a, m, kind)),
    ]
}

fn answer(part: Part, kind: u8, what: u8, now: Now) -> Input {
    let outputs: [&[u8]; 3] = [b"right", b"right", b"wrong"];
    let output = outputs[usize::from(what)];
    match kind {
        0 | 1 => Input::Accepted(part),
        2 => {
            let reason = [Decline::Later, Decline::NotThis, Decline::Duplicate][usize::from(what)];
            Input::Declined { part, reason, detail: "no".to_owned() }
        }
        3 | 4 => Input::Committed { part, commitment: commitment(&part, &attestation(&part, output, now), &[0; 32]) },
        5..=7 => {
            let attested = attestation(&part, output, now);
            Input::Revealed { part, attestation: countersigned(&part, &attested), salt: [0; 32] }
        }
        8 => Input::Output { part, offset: u64::from(what) * 2, data: Bytes::from_static(b"out") },
        9 => Input::Fault { part, reason: "broke".to_owned() },
        10 if what == 0 => Input::BadReply { part, reason: "nonsense".to_owned() },
        10 => Input::Undelivered { part, reason: "gone".to_owned() },
        _ => {
            let mut attested = attestation(&part, output, now);
            attested.outcome = Outcome::Indeterminate;
            Input::Revealed { part, attestation: countersigned(&part, &attested), salt: [0; 32] }
        }
    }
}

/// What was said so far.
#[derive(Default)]
struct Heard {
    offers: Vec<Part>,
    audits: Vec<(JobId, u32)>,
    acknowledged: BTreeSet<JobId>,
    verdicts: BTreeMap<JobId, Verdict>,
    timer: Option<Duration>,
}

impl Heard {
    fn hear(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::SendOffer { part, .. } => self.offers.push(part),
                Output::RequestAudit { job, attempt, .. } => self.audits.push((job, attempt)),
                Output::Acknowledge { job, .. } => {
                    self.acknowledged.insert(job);
                }
                Output::Finish(ruling) => {
                    // What is signed must also be readable.
                    let verdict = ruling.verdict;
                    use sundara_proto::wire::WireMessage as _;
                    assert_eq!(Verdict::decode(&Bytes::from(verdict.encode())).unwrap(), verdict);
                    assert!(self.verdicts.insert(verdict.job, verdict).is_none(), "a second verdict");
                }
                Output::SetTimer { at } => self.timer = Some(at),
                _ => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_job_ends_after_any_sequence_of_inputs(ops in proptest::collection::vec(op(), 1..120), seed in any::<u8>()) {
        let mut machine =
            JobMachine::new(JobConfig::default(), Digest([6; 32]), EpochSecret { epoch: 0, secret: [seed; 32] }, [seed; 32]);
        let mut heard = Heard::default();
        let mut ms = 0;
        machine.handle(Input::Auditor { engines: vec![engine()] }, at(0));
        for n in 0..4 {
            machine.handle(Input::Miner(Box::new(profile(n, 2))), at(0));
        }
        for op in ops {
            let now = at(ms);
            let job = |n: u64| submission(n, 1 + u8::try_from(n % 4).unwrap());
            let input = match op {
                Op::Submit(n) => Input::Submitted(Box::new(job(n))),
                Op::Cancel(n) => Input::Cancelled { job: job(n).job },
                Op::Wait(more) => {
                    ms += more;
                    Input::TimerFired
                }
                Op::Here(n) => Input::PeerHere(profile(n, 2).node),
                Op::Gone(n) => Input::PeerGone(profile(n, 2).node),
                Op::Advert(n) => Input::Miner(Box::new(profile(n, n))),
                Op::Ban(n) => {
                    Input::Banned { miner: hotkey(n), until: at(ms + 1_000).wall, reason: "said so".to_owned() }
                }
                Op::Auditor(some) => Input::Auditor { engines: if some { vec![engine()] } else { vec![] } },
                Op::Epoch(epoch) => Input::EpochTurned(EpochSecret { epoch, secret: [seed; 32] }),
                Op::Answer(n, kind, what) => match heard.offers.len().checked_sub(n + 1) {
                    Some(place) => answer(heard.offers[place], kind, what, now),
                    None => continue,
                },
                Op::Audit(n, what) => {
                    let Some(place) = heard.audits.len().checked_sub(n + 1) else { continue };
                    let (job, attempt) = heard.audits[place];
                    let part = Part { job, attempt, miner: hotkey(99) };
                    let result = match what {
                        0 => AuditResult::Failed { reason: "no\u{7} room".repeat(500) },
                        1 => AuditResult::Attested(Arc::new(unsigned([8; 32], &attestation(&part, b"wrong", now)))),
                        _ => AuditResult::Attested(Arc::new(unsigned([8; 32], &attestation(&part, b"right", now)))),
                    };
                    Input::Audited { job, attempt, result }
                }
                Op::Stray(n, attempt, miner, kind) => {
                    answer(Part { job: job(n).job, attempt, miner: hotkey(miner) }, kind, 0, now)
                }
            };
            heard.hear(machine.handle(input, at(ms)));
        }
        // From here on nobody says anything; only the timer that the machine asked for goes off.
        let mut wakes = 0;
        while machine.live() > 0 {
            let next = heard.timer.take().expect("a machine with jobs has a timer set");
            ms = ms.max(u64::try_from(next.as_millis()).unwrap());
            heard.hear(machine.handle(Input::TimerFired, at(ms)));
            wakes += 1;
            prop_assert!(wakes < 10_000, "jobs that never end");
        }
        machine.assert_idle();
        for job in &heard.acknowledged {
            prop_assert!(heard.verdicts.contains_key(job));
        }
        prop_assert_eq!(heard.acknowledged.len(), heard.verdicts.len());
    }
}
