//! Attestations, proofs and fraud proofs that an attacker would hand in: each is refused, every time.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bytes::Bytes;
use sundara_proto::attestation::{
    Attestation, AttestationError as E, Countersignature, CountersignedAttestation, ExecutorCert, Outcome, Usage,
};
use sundara_proto::batch::FraudProof;
use sundara_proto::crypto::{HotkeyPair, Network, NodeKeyPair, Signed};
use sundara_proto::id::{BlobId, Digest, EnvId, JobId};
use sundara_proto::job::{JobSpec, Limits, Program};
use sundara_proto::pb;
use sundara_proto::units::{BlockNumber, ByteCount, UnixMillis};
use sundara_proto::verdict::{Proof, ProofError, Replica, Standing, Verdict, VerdictKind};

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn network() -> Network {
    Network::named("attacks", 1)
}

fn hotkey(n: u8) -> HotkeyPair {
    HotkeyPair::from_seed(&[n; 32])
}

fn executor(n: u8) -> NodeKeyPair {
    NodeKeyPair::from_seed(&[n; 32])
}

fn spec(nonce: u8) -> Signed<JobSpec> {
    let spec = JobSpec {
        network: network(),
        block: BlockNumber(0),
        nonce: [nonce; 16],
        not_after: NOW.plus(DAY),
        program: Program::Builtin { name: "echo".to_owned() },
        input: BlobId::of(b"input"),
        input_len: ByteCount(5),
        params: Bytes::new(),
        seed: 0,
        limits: Limits::default(),
        replicas: 2,
        hardware_class: String::new(),
        stream: false,
    };
    Signed::sign(&network(), &hotkey(9), spec)
}

fn cert(executor: &NodeKeyPair) -> ExecutorCert {
    ExecutorCert {
        network: network(),
        executor: executor.node_id(),
        hardware_class: "cpu".to_owned(),
        issued_at: NOW,
        expires_at: NOW.plus(DAY),
    }
}

/// What the miner `n` attests with its own executor.
fn attestation(n: u8, job: JobId, output: &[u8]) -> Attestation {
    let cert = cert(&executor(n));
    Attestation {
        job,
        attempt: 0,
        env_id: EnvId([5; 32]),
        input: BlobId::of(b"input"),
        outcome: Outcome::Completed,
        output: BlobId::of(output),
        output_len: ByteCount(output.len() as u64),
        usage: Usage { fuel: 100, peak_memory: ByteCount(0), wall_us: 1 },
        executor_cert: Signed::sign(&network(), &hotkey(n), cert).to_wire(),
        started_at: NOW,
        finished_at: NOW.plus(Duration::from_millis(5)),
    }
}

fn countersign(miner: u8, attestation: &Signed<Attestation>) -> Signed<Countersignature> {
    let over =
        Countersignature { attestation: attestation.digest(), job: attestation.job, attempt: attestation.attempt };
    Signed::sign(&network(), &hotkey(miner), over)
}

fn signed(n: u8, attestation: Attestation) -> Signed<Attestation> {
    Signed::sign(&network(), &executor(n), attestation)
}

fn countersigned(n: u8, attestation: Attestation) -> CountersignedAttestation {
    let attestation = signed(n, attestation);
    let countersignature = countersign(n, &attestation);
    CountersignedAttestation { attestation, countersignature }
}

fn check(attestation: &Signed<Attestation>, countersignature: &Signed<Countersignature>) -> Result<(), E> {
    let raw = pb::CountersignedAttestation {
        attestation: Some(attestation.to_wire()),
        countersignature: Some(countersignature.to_wire()),
    };
    CountersignedAttestation::verify(&network(), raw).map(drop)
}

#[test]
fn an_honest_attestation_holds() {
    let honest = signed(1, attestation(1, spec(1).id(), b"right"));
    assert_eq!(check(&honest, &countersign(1, &honest)), Ok(()));
}

#[test]
fn expired_certificates_wrong_hotkeys_and_replays_are_refused() {
    let job = spec(1).id();
    let with_cert = |change: fn(&mut ExecutorCert)| {
        let mut cert = cert(&executor(1));
        change(&mut cert);
        let executor_cert = Signed::sign(&network(), &hotkey(1), cert).to_wire();
        signed(1, Attestation { executor_cert, ..attestation(1, job, b"right") })
    };
    let expired = with_cert(|cert| cert.expires_at = UnixMillis(NOW.0 - 1));
    assert_eq!(check(&expired, &countersign(1, &expired)), Err(E::CertificateExpired));
    let early = with_cert(|cert| cert.issued_at = NOW.plus(Duration::from_secs(60)));
    assert_eq!(check(&early, &countersign(1, &early)), Err(E::CertificateExpired));
    let of_another_executor = with_cert(|cert| cert.executor = executor(2).node_id());
    assert_eq!(check(&of_another_executor, &countersign(1, &of_another_executor)), Err(E::ForeignExecutor));
    let of_another_mesh = with_cert(|cert| cert.network = Network::named("other", 1));
    assert_eq!(check(&of_another_mesh, &countersign(1, &of_another_mesh)), Err(E::ForeignExecutor));

    // A miner that countersigns the work of another's executor.
    let honest = signed(1, attestation(1, job, b"right"));
    assert_eq!(check(&honest, &countersign(2, &honest)), Err(E::ForeignOwner));
    // A countersignature taken from an earlier attestation of the same miner.
    let other_job = signed(1, attestation(1, spec(2).id(), b"right"));
    assert_eq!(check(&honest, &countersign(1, &other_job)), Err(E::ForeignCountersignature));
    let other_attempt = signed(1, Attestation { attempt: 1, ..attestation(1, job, b"right") });
    assert_eq!(check(&honest, &countersign(1, &other_attempt)), Err(E::ForeignCountersignature));
    // A certificate that its owner did not sign.
    let executor_cert = Signed::sign(&network(), &hotkey(2), cert(&executor(1))).to_wire();
    let forged = pb::Signed { signer: Bytes::copy_from_slice(hotkey(1).hotkey().as_ref()), ..executor_cert };
    let forged = signed(1, Attestation { executor_cert: forged, ..attestation(1, job, b"right") });
    assert!(matches!(check(&forged, &countersign(1, &forged)), Err(E::Signed { part: "executor certificate", .. })));
}

#[test]
fn no_changed_byte_of_an_attestation_passes() {
    let honest = countersigned(1, attestation(1, spec(1).id(), b"right")).to_raw();
    let attestation = honest.attestation.clone().unwrap();
    for at in 0..attestation.payload.len() {
        let mut payload = attestation.payload.to_vec();
        payload[at] ^= 1;
        let changed = pb::Signed { payload: payload.into(), ..attestation.clone() };
        let raw = pb::CountersignedAttestation { attestation: Some(changed), ..honest.clone() };
        assert!(CountersignedAttestation::verify(&network(), raw).is_err(), "byte {at}");
    }
}

#[test]
fn fuel_and_output_are_part_of_what_replicas_are_compared_by() {
    let honest = attestation(1, spec(1).id(), b"right");
    let digest = honest.result_digest().unwrap();
    let false_fuel = Usage { fuel: honest.usage.fuel + 1, ..honest.usage };
    let changed = [
        Attestation { usage: false_fuel, ..honest.clone() },
        Attestation { output: BlobId::of(b"wrong"), ..honest.clone() },
        Attestation { output_len: ByteCount(6), ..honest.clone() },
        Attestation { outcome: Outcome::ExitCode(0), ..honest.clone() },
        Attestation { env_id: EnvId([6; 32]), ..honest.clone() },
    ];
    assert!(changed.iter().all(|other| other.result_digest().unwrap() != digest));
    let same = Attestation { usage: Usage { wall_us: 9, ..honest.usage }, ..honest.clone() };
    assert_eq!(same.result_digest(), Some(digest), "time is not compared");
}

fn fraud(change: impl FnOnce(&mut FraudProof)) -> Signed<FraudProof> {
    let spec = spec(1);
    let mut proof = FraudProof {
        network: network(),
        spec: spec.to_wire(),
        accused: countersigned(1, attestation(1, spec.id(), b"wrong")).to_raw(),
        reference: signed(3, attestation(3, spec.id(), b"right")).to_wire(),
    };
    change(&mut proof);
    Signed::sign(&network(), &hotkey(3), proof)
}

#[test]
fn a_fraud_proof_needs_one_run_two_results_and_an_executor_of_its_accuser() {
    let job = spec(1).id();
    assert_eq!(fraud(|_| {}).check(), Some(hotkey(1).hotkey()));
    let reference = |n: u8, attestation: Attestation| signed(n, attestation).to_wire();
    let same_result = fraud(|p| p.reference = reference(3, attestation(3, job, b"wrong")));
    let strangers_word = fraud(|p| p.reference = reference(4, attestation(4, job, b"right")));
    let another_job = fraud(|p| p.reference = reference(3, attestation(3, spec(2).id(), b"right")));
    let another_environment =
        fraud(|p| p.reference = reference(3, Attestation { env_id: EnvId([6; 32]), ..attestation(3, job, b"right") }));
    let another_input = fraud(|p| {
        p.reference = reference(3, Attestation { input: BlobId::of(b"else"), ..attestation(3, job, b"right") });
    });
    let no_result =
        fraud(|p| p.reference = reference(3, Attestation { outcome: Outcome::Aborted, ..attestation(3, job, b"") }));
    let another_spec = fraud(|p| p.spec = spec(2).to_wire());
    let unsigned = fraud(|p| p.reference.signature = Bytes::from_static(&[0; 64]));
    let all = [
        same_result,
        strangers_word,
        another_job,
        another_environment,
        another_input,
        no_result,
        another_spec,
        unsigned,
    ];
    for (n, proof) in all.iter().enumerate() {
        assert_eq!(proof.check(), None, "proof {n}");
    }
}

fn verdict(spec: &Signed<JobSpec>, kind: VerdictKind) -> Signed<Verdict> {
    let replica = |n: u8| Replica {
        miner: hotkey(n).hotkey(),
        standing: Standing::Agreed,
        attestation: None,
        commitment: None,
        latency_us: 1,
    };
    let verdict = Verdict {
        job: spec.id(),
        attempt: 0,
        rank: 0,
        kind,
        outcome: Some(Outcome::Completed),
        output: BlobId::of(b"right"),
        output_len: ByteCount(5),
        env_id: EnvId([5; 32]),
        replicas: vec![replica(1), replica(2)],
        epoch: 0,
        issued_at: NOW,
        incentive: Digest([0; 32]),
    };
    Signed::sign(&network(), &hotkey(8), verdict)
}

#[test]
fn a_verdict_is_worth_the_attestations_that_carry_it() {
    let spec = spec(1);
    let proof = |kind: VerdictKind, attestations: Vec<CountersignedAttestation>| {
        let verdict = verdict(&spec, kind);
        Proof::verify(Proof { network: network(), spec: spec.clone(), verdict, attestations }.to_raw()).map(drop)
    };
    let right = |n: u8| countersigned(n, attestation(n, spec.id(), b"right"));
    assert_eq!(proof(VerdictKind::Quorum(2), vec![right(1), right(2)]), Ok(()));
    assert_eq!(proof(VerdictKind::Audited, vec![right(1)]), Ok(()));
    let unsupported = |result: Result<(), ProofError>| matches!(result, Err(ProofError::Unsupported { .. }));
    assert!(unsupported(proof(VerdictKind::Quorum(2), vec![right(1), right(1)])), "one miner twice");
    assert!(unsupported(proof(VerdictKind::Quorum(2), vec![right(1)])));
    assert!(unsupported(proof(VerdictKind::Audited, vec![])));
    let wrong = countersigned(2, attestation(2, spec.id(), b"wrong"));
    assert!(unsupported(proof(VerdictKind::Quorum(2), vec![right(1), wrong])), "another result");
    let foreign = countersigned(2, attestation(2, self::spec(2).id(), b"right"));
    assert!(matches!(proof(VerdictKind::Quorum(2), vec![right(1), foreign]), Err(ProofError::Foreign(_))));
    let mut forged = right(2);
    forged.countersignature = countersign(1, &forged.attestation);
    assert!(matches!(
        proof(VerdictKind::Quorum(2), vec![right(1), forged]),
        Err(ProofError::Attestation { index: 1, .. })
    ));
}
