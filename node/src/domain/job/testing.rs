//! Makings of tests: jobs, miners and attestations without the cost of signatures, which the machine never checks.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sundara_proto::advert::ExecutorClass;
use sundara_proto::attestation::{
    Attestation, Countersignature, CountersignedAttestation, ExecutorCert, Outcome, Usage,
};
use sundara_proto::crypto::{Network, Payload, Signed};
use sundara_proto::id::{BlobId, Digest, EngineId, EnvId, Hotkey, NodeId};
use sundara_proto::job::{JobSpec, Limits, Program};
use sundara_proto::pb;
use sundara_proto::rules::env::{Environment, engine_id};
use sundara_proto::rules::select;
use sundara_proto::units::{BlockNumber, ByteCount, UnixMillis};

use super::{Part, Submission};
use crate::domain::schedule::MinerProfile;
use crate::domain::{Now, Owner};

pub(crate) fn network() -> Network {
    Network::named("test", 1)
}

pub(crate) fn engine() -> EngineId {
    engine_id("test", "1")
}

/// `ms` milliseconds into the test, on both clocks.
pub(crate) fn at(ms: u64) -> Now {
    Now { mono: Duration::from_millis(ms), wall: UnixMillis(1_700_000_000_000 + ms) }
}

/// A key of the `n`-th of something.
pub(crate) fn key(kind: u8, n: u32) -> [u8; 32] {
    let mut bytes = [kind; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    bytes
}

pub(crate) fn hotkey(n: u32) -> Hotkey {
    Hotkey(key(1, n))
}

pub(crate) fn profile(n: u32, slots: u32) -> MinerProfile {
    let class = ExecutorClass { hardware_class: "cpu".to_owned(), slots, engines: vec![engine()], price: 0 };
    MinerProfile {
        hotkey: hotkey(n),
        owner: Owner(key(2, n)),
        node: NodeId(key(3, n)),
        classes: vec![class],
        models: Vec::new(),
        expires_at: at(1_000_000_000).wall,
    }
}

/// A payload with a signature that only a test takes for one.
pub(crate) fn unsigned<T: Payload>(signer: [u8; 32], value: &T) -> Signed<T> {
    let raw = pb::Signed {
        payload: value.encode().into(),
        signer: Bytes::copy_from_slice(&signer),
        signature: Bytes::from_static(&[7; 64]),
    };
    Signed::trusted(raw).unwrap()
}

pub(crate) fn spec(n: u64, replicas: u8) -> JobSpec {
    let mut nonce = [0; 16];
    nonce[..8].copy_from_slice(&n.to_le_bytes());
    JobSpec {
        network: network(),
        block: BlockNumber(0),
        nonce,
        not_after: at(3_600_000).wall,
        program: Program::Builtin { name: "echo".to_owned() },
        input: BlobId::of(b"input"),
        input_len: ByteCount(5),
        params: Bytes::new(),
        seed: n,
        limits: Limits { fuel: 10_000_000_000, memory: ByteCount::mib(1), output: ByteCount::kib(1), wall_ms: 1_000 },
        replicas,
        hardware_class: String::new(),
        stream: false,
    }
}

pub(crate) fn submission_of(spec: &JobSpec) -> Submission {
    let spec = unsigned(key(9, 0), spec);
    Submission { job: spec.id(), spec: Arc::new(spec), environment: Environment::of_builtin("echo"), rank: 0 }
}

pub(crate) fn submission(n: u64, replicas: u8) -> Submission {
    submission_of(&spec(n, replicas))
}

pub(crate) fn env_id() -> EnvId {
    Environment::of_builtin("echo").env_id(&engine())
}

/// What a run of the job attests when it writes `output`.
pub(crate) fn attestation(part: &Part, output: &[u8], now: Now) -> Attestation {
    let cert = ExecutorCert {
        network: network(),
        executor: NodeId([4; 32]),
        hardware_class: "cpu".to_owned(),
        issued_at: now.wall,
        expires_at: now.wall.plus(Duration::from_secs(3_600)),
    };
    Attestation {
        job: part.job,
        attempt: part.attempt,
        env_id: env_id(),
        input: BlobId::of(b"input"),
        outcome: Outcome::Completed,
        output: BlobId::of(output),
        output_len: ByteCount(output.len() as u64),
        usage: Usage { fuel: 1_000_000, peak_memory: ByteCount(0), wall_us: 10 },
        executor_cert: unsigned(part.miner.0, &cert).to_wire(),
        started_at: now.wall,
        finished_at: now.wall,
    }
}

pub(crate) fn countersigned(part: &Part, attestation: &Attestation) -> Arc<CountersignedAttestation> {
    let attestation = unsigned([4; 32], attestation);
    let over =
        Countersignature { attestation: attestation.digest(), job: attestation.job, attempt: attestation.attempt };
    Arc::new(CountersignedAttestation { attestation, countersignature: unsigned(part.miner.0, &over) })
}

pub(crate) fn commitment(part: &Part, attestation: &Attestation, salt: &[u8; 32]) -> Digest {
    let result = attestation.result_digest().unwrap();
    select::result_commitment(&part.job, part.attempt, &part.miner, &result, salt)
}
