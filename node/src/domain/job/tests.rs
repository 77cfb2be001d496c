//! Tables over the machine; sequences of every kind are the simulator's.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use bytes::Bytes;
use sundara_proto::attestation::Outcome;
use sundara_proto::id::{Digest, EnvId, JobId};
use sundara_proto::units::UnixMillis;
use sundara_proto::verdict::{Standing, VerdictKind};

use super::testing::*;
use super::*;
use crate::domain::audit::AuditConfig;

/// A config whose draws never choose an audit once the miners are trusted from the start.
fn trusting() -> JobConfig {
    JobConfig {
        audit: AuditConfig { floor: 0.0, clean_min: 0, held_jobs: 30, colluding_share: 0.0 },
        ..Default::default()
    }
}

fn machine(config: JobConfig, miners: u32) -> JobMachine {
    let epoch = EpochSecret { epoch: 3, secret: [5; 32] };
    let mut machine = JobMachine::new(config, Digest([6; 32]), epoch, [1; 32]);
    machine.handle(Input::Auditor { engines: vec![engine()] }, at(0));
    for n in 0..miners {
        machine.handle(Input::Miner(Box::new(profile(n, 4))), at(0));
    }
    machine
}

/// Makes every miner trusted enough that `trusting()` never audits: clean audits, and much pay held back.
fn trust(machine: &mut JobMachine, miners: u32) {
    for n in 0..miners {
        machine.handle(
            Input::RestoredClean(CleanRecord { miner: hotkey(n), env_id: env_id(), clean: u32::MAX - 1 }),
            at(0),
        );
        machine.core.trust.entry(hotkey(n), at(0).wall).held.push(u64::MAX / 2, 30);
    }
}

fn offers(out: &[Output]) -> Vec<Part> {
    out.iter().filter_map(|o| if let Output::SendOffer { part, .. } = o { Some(*part) } else { None }).collect()
}

fn reveals(out: &[Output]) -> Vec<Part> {
    out.iter().filter_map(|o| if let Output::SendReveal { part, .. } = o { Some(*part) } else { None }).collect()
}

fn ruling(out: &[Output]) -> Option<Ruling> {
    out.iter().find_map(|o| if let Output::Finish(ruling) = o { Some((**ruling).clone()) } else { None })
}

fn evidence(out: &[Output]) -> Vec<(Hotkey, Offence)> {
    out.iter()
        .filter_map(|o| if let Output::RecordEvidence(e) = o { Some((e.part.miner, e.offence)) } else { None })
        .collect()
}

fn audits(out: &[Output]) -> Vec<(JobId, u32)> {
    out.iter()
        .filter_map(|o| if let Output::RequestAudit { job, attempt, .. } = o { Some((*job, *attempt)) } else { None })
        .collect()
}

fn reveal(part: Part, output: &[u8], salt: [u8; 32], now: Now) -> Input {
    Input::Revealed { part, attestation: countersigned(&part, &attestation(&part, output, now)), salt }
}

fn commit(part: Part, output: &[u8], salt: [u8; 32], now: Now) -> Input {
    Input::Committed { part, commitment: commitment(&part, &attestation(&part, output, now), &salt) }
}

fn reference(job: JobId, attempt: u32, output: &[u8], now: Now) -> Input {
    let part = Part { job, attempt, miner: hotkey(999) };
    let attested = unsigned([8; 32], &attestation(&part, output, now));
    Input::Audited { job, attempt, result: AuditResult::Attested(Arc::new(attested)) }
}

/// Submits and takes all offers; returns the parts.
fn begin(machine: &mut JobMachine, submission: Submission, now: Now) -> Vec<Part> {
    let out = machine.handle(Input::Submitted(Box::new(submission)), now);
    let parts = offers(&out);
    for part in &parts {
        machine.handle(Input::Accepted(*part), now);
    }
    parts
}

#[test]
fn a_job_is_persisted_before_it_is_acknowledged_and_offered() {
    let mut machine = machine(trusting(), 3);
    let out = machine.handle(Input::Submitted(Box::new(submission(1, 1))), at(1));
    let kinds: Vec<u8> = out
        .iter()
        .map(|o| match o {
            Output::Persist { .. } => 0,
            Output::Acknowledge { .. } => 1,
            Output::SendOffer { .. } => 2,
            Output::SetTimer { .. } => 3,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(kinds, [0, 1, 2, 3]);
    assert!(out[1].needs_persist() && !out[2].needs_persist());
}

#[test]
fn a_single_trusted_replica_is_unaudited() {
    let mut machine = machine(trusting(), 3);
    trust(&mut machine, 3);
    let parts = begin(&mut machine, submission(1, 1), at(1));
    let out = machine.handle(reveal(parts[0], b"right", [0; 32], at(9)), at(9));
    let verdict = ruling(&out).unwrap().verdict;
    assert_eq!(verdict.kind, VerdictKind::Unaudited);
    assert_eq!(verdict.replicas[0].standing, Standing::Agreed);
    assert_eq!((verdict.replicas[0].latency_us, verdict.epoch), (8_000, 3));
    assert_eq!(verdict.output, sundara_proto::id::BlobId::of(b"right"));
    assert_eq!(machine.live(), 0);
    let again = machine.handle(Input::Submitted(Box::new(submission(1, 1))), at(10));
    assert!(matches!(again[..], [Output::Replay { .. }]), "{again:?}");
}

#[test]
fn a_new_miner_is_audited_and_a_wrong_result_is_blamed_with_proof() {
    let mut machine = machine(JobConfig::default(), 3);
    let parts = begin(&mut machine, submission(1, 1), at(1));
    let out = machine.handle(reveal(parts[0], b"wrong", [0; 32], at(2)), at(2));
    let [(job, attempt)] = audits(&out)[..] else { panic!("{out:?}") };
    let out = machine.handle(reference(job, attempt, b"right", at(3)), at(3));
    assert_eq!(evidence(&out), [(parts[0].miner, Offence::WrongResult)]);
    assert!(machine.dropped(&parts[0].miner, at(3).wall).is_some());
    let known = machine.known(&parts[0].miner, at(3)).unwrap();
    let view = known.view.unwrap();
    assert_eq!((known.offences, view.offers, view.off_for_ms > 0), (1, 1, true));
    assert_eq!((view.running, view.classes[0].in_flight, view.classes[0].free), (0, 0, false));
    assert!(machine.known(&hotkey(999), at(3)).is_none());
    // Another miner takes the next attempt, which is audited whatever the draw: the digest is known now.
    let next = offers(&out);
    assert_eq!(next.len(), 1);
    assert!(next[0].miner != parts[0].miner && next[0].attempt == 1);
    machine.handle(Input::Accepted(next[0]), at(4));
    let out = machine.handle(reveal(next[0], b"right", [0; 32], at(5)), at(5));
    assert_eq!(audits(&out), [(job, 1)]);
    let out = machine.handle(reference(job, 1, b"right", at(6)), at(6));
    assert_eq!(ruling(&out).unwrap().verdict.kind, VerdictKind::Audited);
}

#[test]
fn false_fuel_and_a_forged_output_are_wrong_results_whenever_they_are_audited() {
    type Change = fn(&mut sundara_proto::attestation::Attestation);
    let claims: [(&str, Change); 4] = [
        ("more fuel", |a| a.usage.fuel += 1),
        ("less fuel", |a| a.usage.fuel -= 1),
        ("another output", |a| a.output = sundara_proto::id::BlobId([1; 32])),
        ("another end", |a| a.outcome = Outcome::ExitCode(1)),
    ];
    for (name, change) in claims {
        // New miners are audited always.
        let mut machine = machine(JobConfig::default(), 3);
        let parts = begin(&mut machine, submission(1, 1), at(1));
        let mut claimed = attestation(&parts[0], b"right", at(2));
        change(&mut claimed);
        let attestation = countersigned(&parts[0], &claimed);
        let out = machine.handle(Input::Revealed { part: parts[0], attestation, salt: [0; 32] }, at(2));
        let [(job, attempt)] = audits(&out)[..] else { panic!("{name}: {out:?}") };
        let out = machine.handle(reference(job, attempt, b"right", at(3)), at(3));
        assert_eq!(evidence(&out), [(parts[0].miner, Offence::WrongResult)], "{name}");
    }
}

#[test]
fn replicas_reveal_only_when_all_have_committed_and_agree_to_a_quorum() {
    let mut machine = machine(trusting(), 4);
    trust(&mut machine, 4);
    let parts = begin(&mut machine, submission(1, 3), at(1));
    assert_eq!(parts.len(), 3);
    for (i, part) in parts.iter().enumerate() {
        let out = machine.handle(commit(*part, b"right", [i as u8; 32], at(5)), at(5));
        assert_eq!(reveals(&out).len(), if i == 2 { 3 } else { 0 });
    }
    for (i, part) in parts.iter().enumerate() {
        let out = machine.handle(reveal(*part, b"right", [i as u8; 32], at(5)), at(6));
        assert_eq!(ruling(&out).map(|r| r.verdict.kind), (i == 2).then_some(VerdictKind::Quorum(3)));
        if let Some(ruling) = ruling(&out) {
            assert_eq!(ruling.attestations.len(), 3);
            assert!(ruling.verdict.replicas.iter().all(|r| r.commitment.is_some() && r.latency_us == 4_000));
        }
    }
}

#[test]
fn what_is_revealed_must_match_what_was_committed() {
    let mut machine = machine(trusting(), 2);
    trust(&mut machine, 2);
    let parts = begin(&mut machine, submission(1, 2), at(1));
    machine.handle(commit(parts[0], b"right", [1; 32], at(2)), at(2));
    // The copier commits to anything, waits, and hands in its peer's result.
    machine.handle(commit(parts[1], b"anything", [2; 32], at(2)), at(2));
    machine.handle(reveal(parts[0], b"right", [1; 32], at(2)), at(3));
    let out = machine.handle(reveal(parts[1], b"right", [2; 32], at(2)), at(4));
    assert_eq!(evidence(&out), [(parts[1].miner, Offence::BrokenCommitment)]);
    // One result is no quorum of two: the validator looks for itself.
    let (job, attempt) = audits(&out)[0];
    let out = machine.handle(reference(job, attempt, b"right", at(5)), at(5));
    let verdict = ruling(&out).unwrap().verdict;
    assert_eq!(verdict.kind, VerdictKind::Audited);
    let standings: Vec<Standing> =
        parts.iter().map(|part| verdict.replicas.iter().find(|r| r.miner == part.miner).unwrap().standing).collect();
    assert_eq!(standings, [Standing::Agreed, Standing::Faulted]);
}

#[test]
fn no_commitment_counts_after_the_first_reveal_and_a_missing_reveal_is_an_offence() {
    let config = trusting();
    let (accept, reveal_ms) = (config.accept_ms, config.reveal_ms);
    let mut machine = machine(config, 2);
    trust(&mut machine, 2);
    let out = machine.handle(Input::Submitted(Box::new(submission(1, 2))), at(1));
    let parts = offers(&out);
    machine.handle(Input::Accepted(parts[0]), at(1));
    machine.handle(commit(parts[0], b"right", [1; 32], at(2)), at(2));
    // The other never answers; nobody else is there; after the wait the one commitment is opened.
    machine.handle(Input::TimerFired, at(1 + accept + 50));
    let late = 1 + accept + 100 + JobConfig::default().queue_wait_ms;
    let out = machine.handle(Input::TimerFired, at(late));
    let asked = reveals(&out);
    assert_eq!(asked, [parts[0]]);
    let out = machine.handle(commit(parts[1], b"right", [2; 32], at(late)), at(late));
    assert!(reveals(&out).is_empty() && evidence(&out).is_empty());
    let out = machine.handle(Input::TimerFired, at(late + reveal_ms + 50));
    assert_eq!(evidence(&out), [(parts[0].miner, Offence::Withheld)]);
}

#[test]
fn disagreement_is_decided_by_the_validators_own_executor() {
    let mut machine = machine(trusting(), 3);
    trust(&mut machine, 3);
    let parts = begin(&mut machine, submission(1, 3), at(1));
    let outputs: [&[u8]; 3] = [b"wrong", b"right", b"wrong"];
    for (part, output) in parts.iter().zip(outputs) {
        machine.handle(commit(*part, output, [1; 32], at(2)), at(2));
    }
    let mut last = Vec::new();
    for (part, output) in parts.iter().zip(outputs) {
        last = machine.handle(reveal(*part, output, [1; 32], at(2)), at(3));
    }
    let (job, attempt) = audits(&last)[0];
    let out = machine.handle(reference(job, attempt, b"right", at(4)), at(4));
    // Two that collude are still wrong.
    assert_eq!(evidence(&out), [(parts[0].miner, Offence::WrongResult), (parts[2].miner, Offence::WrongResult)]);
    let verdict = ruling(&out).unwrap().verdict;
    assert_eq!(verdict.output, sundara_proto::id::BlobId::of(b"right"));
    assert_eq!(verdict.kind, VerdictKind::Audited);
}

#[test]
fn foreign_attestations_are_offences_and_wrong_clocks_are_not() {
    type Change = fn(&mut sundara_proto::attestation::Attestation);
    let foreign: [(&str, Change); 4] = [
        ("job", |a| a.job = JobId([1; 32])),
        ("attempt", |a| a.attempt = 7),
        ("input", |a| a.input = sundara_proto::id::BlobId([1; 32])),
        ("environment", |a| a.env_id = EnvId([1; 32])),
    ];
    let unusable: [(&str, Change); 4] = [
        ("backdated past an expired certificate", |a| a.started_at = UnixMillis(0)),
        ("future", |a| a.finished_at = UnixMillis(u64::MAX)),
        ("output", |a| a.output_len = sundara_proto::units::ByteCount(u64::MAX)),
        ("aborted", |a| a.outcome = Outcome::Aborted),
    ];
    let all = foreign.iter().map(|c| (c, true)).chain(unusable.iter().map(|c| (c, false)));
    for ((name, change), offence) in all {
        let mut machine = machine(trusting(), 2);
        trust(&mut machine, 2);
        let parts = begin(&mut machine, submission(1, 1), at(1));
        let mut attested = attestation(&parts[0], b"right", at(2));
        change(&mut attested);
        let input = Input::Revealed { part: parts[0], attestation: countersigned(&parts[0], &attested), salt: [0; 32] };
        let out = machine.handle(input, at(2));
        assert_eq!(!evidence(&out).is_empty(), offence, "{name}");
        assert!(ruling(&out).is_none(), "{name}");
        assert_eq!(offers(&out).iter().filter(|p| p.miner != parts[0].miner).count(), 1, "{name}: another miner");
    }
    // Countersigned by someone else than the miner that was asked.
    let mut machine = machine(trusting(), 2);
    let parts = begin(&mut machine, submission(1, 1), at(1));
    let other = Part { miner: hotkey(77), ..parts[0] };
    let attested = attestation(&parts[0], b"right", at(2));
    let input = Input::Revealed { part: parts[0], attestation: countersigned(&other, &attested), salt: [0; 32] };
    assert_eq!(evidence(&machine.handle(input, at(2))), [(parts[0].miner, Offence::ForeignAttestation)]);
}

#[test]
fn a_decline_goes_to_the_next_miner_and_a_dead_miner_to_the_next_attempt() {
    let mut machine = machine(trusting(), 3);
    trust(&mut machine, 3);
    let out = machine.handle(Input::Submitted(Box::new(submission(1, 1))), at(1));
    let first = offers(&out)[0];
    let decline = Input::Declined { part: first, reason: Decline::NotThis, detail: "limits too high".to_owned() };
    let second = offers(&machine.handle(decline, at(2)))[0];
    assert!(second.attempt == 0 && second.miner != first.miner);
    let out = machine.handle(Input::Accepted(second), at(3));
    assert!(matches!(out[..], [Output::Started { attempt: 0, .. }, ..]), "{out:?}");
    let node = profile(u32::from_be_bytes(second.miner.0[..4].try_into().unwrap()), 1).node;
    let out = machine.handle(Input::PeerGone(node), at(4));
    let third = offers(&out)[0];
    assert!(third.attempt == 1 && third.miner != first.miner && third.miner != second.miner);
    assert!(out.iter().any(|o| matches!(o, Output::Persist { record, .. } if record.attempt == 1)));
}

#[test]
fn output_is_forwarded_once_and_without_gaps_when_a_replica_is_replaced() {
    let mut machine = machine(trusting(), 4);
    trust(&mut machine, 4);
    let streaming = JobSpec { stream: true, ..spec(1, 2) };
    let out = machine.handle(Input::Submitted(Box::new(submission_of(&streaming))), at(1));
    let stream_of = |out: &[Output]| {
        out.iter().find_map(|o| match o {
            Output::SendOffer { part, stream: true, .. } => Some(*part),
            _ => None,
        })
    };
    let first = stream_of(&out).unwrap();
    let chunk =
        |part, offset, text: &'static str| Input::Output { part, offset, data: Bytes::from_static(text.as_bytes()) };
    let forwarded = |out: Vec<Output>| -> Vec<(u64, Bytes)> {
        out.into_iter()
            .filter_map(|o| match o {
                Output::ForwardOutput { offset, data, .. } => Some((offset, data)),
                _ => None,
            })
            .collect()
    };
    assert_eq!(forwarded(machine.handle(chunk(first, 0, "hello "), at(2))), [(0, Bytes::from("hello "))]);
    let out = machine.handle(Input::Fault { part: first, reason: "broke".to_owned() }, at(3));
    let second = stream_of(&out).unwrap();
    assert_eq!(second.attempt, 0);
    assert_eq!(forwarded(machine.handle(chunk(second, 0, "hel"), at(4))), []);
    assert_eq!(forwarded(machine.handle(chunk(second, 3, "lo wor"), at(4))), [(6, Bytes::from("wor"))]);
    assert_eq!(forwarded(machine.handle(chunk(second, 20, "gap"), at(4))), []);
    assert_eq!(forwarded(machine.handle(chunk(first, 9, "old"), at(4))), [], "the first has no say any more");
}

#[test]
fn what_cannot_run_is_refused_before_it_starts_with_the_setting_named() {
    let refusal = |machine: &mut JobMachine, submission: Submission, now| {
        let out = machine.handle(Input::Submitted(Box::new(submission)), now);
        match &out[..] {
            [Output::Refuse { reason, retryable, .. }] => (reason.clone(), *retryable),
            other => panic!("{other:?}"),
        }
    };
    let mut none = JobMachine::new(trusting(), Digest([0; 32]), EpochSecret { epoch: 0, secret: [0; 32] }, [0; 32]);
    assert!(refusal(&mut none, submission(1, 1), at(1)).0.contains("executor of its own"));
    let mut two = machine(trusting(), 2);
    let (reason, retryable) = refusal(&mut two, submission(1, 3), at(1));
    assert!(reason.contains("3 replicas") && reason.contains("has 2 here") && retryable, "{reason}");
    let gpu = JobSpec { hardware_class: "gpu".to_owned(), ..spec(1, 1) };
    assert!(refusal(&mut two, submission_of(&gpu), at(1)).0.contains("class gpu"));
    let (reason, retryable) = refusal(&mut two, submission(1, 1), at(3_600_001));
    assert!(reason.contains("not_after") && !retryable);
    let mut small = machine(JobConfig { live_max: 1, ..trusting() }, 2);
    begin(&mut small, submission(1, 1), at(1));
    assert!(refusal(&mut small, submission(2, 1), at(1)).0.contains("dispatch.live_max"));
}

#[test]
fn jobs_wait_for_a_free_slot_in_order_and_give_up_with_a_reason() {
    // Shorter than any execution, so that no slot comes free by a miner's stall.
    let wait = 2_000;
    let mut machine = machine(JobConfig { queue_wait_ms: wait, ..trusting() }, 1);
    trust(&mut machine, 1);
    let running: Vec<Part> = (0..4).flat_map(|n| begin(&mut machine, submission(n, 1), at(1))).collect();
    assert_eq!(running.len(), 4);
    assert!(begin(&mut machine, submission(10, 1), at(2)).is_empty());
    assert!(begin(&mut machine, submission(11, 1), at(3)).is_empty());
    assert_eq!(machine.core.waiting.len(), 2);
    let out = machine.handle(reveal(running[0], b"right", [0; 32], at(4)), at(4));
    assert_eq!(offers(&out).iter().map(|p| p.job).collect::<Vec<_>>(), [submission(10, 1).job]);
    let mut reasons = Vec::new();
    for ms in (0..=wait + 200).step_by(50) {
        for output in machine.handle(Input::TimerFired, at(5 + ms)) {
            if let Output::Finish(ruling) = output
                && ruling.verdict.job == submission(11, 1).job
            {
                reasons.push(ruling.verdict.kind);
            }
        }
    }
    assert!(
        matches!(&reasons[..], [VerdictKind::Failed(why)] if why.contains("dispatch.queue_wait_ms")),
        "{reasons:?}"
    );
    assert_eq!(machine.core.waiting.len(), 0);
}

#[test]
fn a_cancelled_job_frees_its_miners() {
    let mut machine = machine(trusting(), 1);
    let parts = begin(&mut machine, submission(1, 1), at(1));
    assert_eq!(machine.core.fleet.in_flight(&parts[0].miner), 1);
    let out = machine.handle(Input::Cancelled { job: parts[0].job }, at(2));
    assert!(out.iter().any(|o| matches!(o, Output::SendAbandon { part, .. } if *part == parts[0])));
    assert!(matches!(ruling(&out).unwrap().verdict.kind, VerdictKind::Failed(why) if why.contains("cancelled")));
    assert_eq!(machine.core.fleet.in_flight(&parts[0].miner), 0);
}

#[test]
fn an_audit_that_cannot_run_is_tried_again_and_then_said() {
    let mut machine = machine(JobConfig::default(), 1);
    let parts = begin(&mut machine, submission(1, 1), at(1));
    let mut out = machine.handle(reveal(parts[0], b"right", [0; 32], at(2)), at(2));
    for _ in 0..JobConfig::default().audit_tries {
        let (job, attempt) = audits(&out)[0];
        let result = AuditResult::Failed { reason: "no memory".to_owned() };
        out = machine.handle(Input::Audited { job, attempt, result }, at(3));
    }
    let verdict = ruling(&out).unwrap().verdict;
    assert!(matches!(&verdict.kind, VerdictKind::Failed(why) if why.contains("no memory")), "{verdict:?}");
    assert!(verdict.replicas.is_empty(), "nobody is said to be right or wrong");
    assert!(evidence(&out).is_empty());
}

#[test]
fn after_a_restart_open_jobs_run_again_audited_and_finished_ones_are_remembered() {
    let mut before = machine(trusting(), 2);
    let out = before.handle(Input::Submitted(Box::new(submission(1, 1))), at(1));
    let record =
        out.iter().find_map(|o| if let Output::Persist { record, .. } = o { Some(record.clone()) } else { None });
    let encoded = prost::Message::encode_to_vec(&*record.unwrap());
    let record: JobRecord = prost::Message::decode(&encoded[..]).unwrap();

    let mut after = machine(trusting(), 2);
    trust(&mut after, 2);
    let job = submission(1, 1).job;
    let out = after.handle(Input::Restored { job, record: Box::new(record) }, at(500));
    let part = offers(&out)[0];
    assert_eq!((part.job, part.attempt), (job, 1));
    after.handle(Input::Accepted(part), at(501));
    let out = after.handle(reveal(part, b"right", [0; 32], at(502)), at(502));
    assert_eq!(audits(&out), [(job, 1)]);
    let out = after.handle(reference(job, 1, b"right", at(503)), at(503));
    let ruling = ruling(&out).unwrap();
    assert_eq!(ruling.verdict.attempt, 1);

    let mut third = machine(trusting(), 2);
    third.handle(Input::Restored { job, record: Box::new(ruling.record.clone()) }, at(600));
    let out = third.handle(Input::Submitted(Box::new(submission(1, 1))), at(601));
    assert!(matches!(out[..], [Output::Replay { .. }]), "{out:?}");
    let forgotten: Vec<Output> = third.handle(Input::TimerFired, at(3_600_000 + 60_050));
    assert!(forgotten.iter().any(|o| matches!(o, Output::Forget { job: gone } if *gone == job)));
}

#[test]
fn a_dropped_miner_stays_dropped_over_a_restart_and_comes_back_after_its_time() {
    let mut before = machine(JobConfig::default(), 1);
    let parts = begin(&mut before, submission(1, 1), at(1));
    before.handle(reveal(parts[0], b"wrong", [0; 32], at(2)), at(2));
    let out = before.handle(reference(parts[0].job, 0, b"right", at(3)), at(3));
    let record = out.iter().find_map(|o| if let Output::PersistMiner(r) = o { Some(r.clone()) } else { None }).unwrap();
    let mut after = JobMachine::new(trusting(), Digest([0; 32]), EpochSecret { epoch: 0, secret: [0; 32] }, [0; 32]);
    after.handle(Input::RestoredMiner(record), at(10));
    after.handle(Input::Auditor { engines: vec![engine()] }, at(10));
    after.handle(Input::Miner(Box::new(profile(0, 4))), at(10));
    let soon = JobSpec { not_after: at(20_000_000).wall, ..spec(2, 1) };
    let out = after.handle(Input::Submitted(Box::new(submission_of(&soon))), at(11));
    assert!(matches!(out[..], [Output::Refuse { .. }]), "{out:?}");
    let four_hours = 4 * 3_600_000;
    after.handle(Input::TimerFired, at(four_hours + 100));
    let out = after.handle(Input::Submitted(Box::new(submission_of(&soon))), at(four_hours + 101));
    assert_eq!(offers(&out).len(), 1, "{out:?}");
}

#[test]
fn colluders_that_agree_are_caught_when_the_draw_falls_on_them() {
    let mut machine = machine(JobConfig::default(), 2);
    let parts = begin(&mut machine, submission(1, 2), at(1));
    for part in &parts {
        machine.handle(commit(*part, b"wrong", [1; 32], at(2)), at(2));
    }
    machine.handle(reveal(parts[0], b"wrong", [1; 32], at(2)), at(3));
    let out = machine.handle(reveal(parts[1], b"wrong", [1; 32], at(2)), at(3));
    let (job, attempt) = audits(&out)[0];
    let out = machine.handle(reference(job, attempt, b"right", at(4)), at(4));
    assert_eq!(evidence(&out).len(), 2);
}
