//! One value of every kind, with every field set. They never change: what they encode to is frozen.

use std::time::Duration;

use bytes::Bytes;
use sundara_proto::advert::{Advert, ExecutorClass};
use sundara_proto::attestation::{Attestation, Countersignature, ExecutorCert, Outcome, Usage};
use sundara_proto::batch::{AuditEpoch, Batch, FraudProof, Receipt, Stage};
use sundara_proto::cert::{Certificate, Roles};
use sundara_proto::crypto::{Network, NodeKeyPair};
use sundara_proto::id::{BlobId, Digest, EngineId, EnvId, Hotkey, JobId, ModelId, NodeId};
use sundara_proto::job::{JobSpec, Limits, Program};
use sundara_proto::model::{Artifact, Determinism, ModelManifest, ModelRecord};
use sundara_proto::pb;
use sundara_proto::units::{BlockNumber, ByteCount, UnixMillis};
use sundara_proto::verdict::{Replica, Standing, Verdict, VerdictKind};

pub(crate) const T: UnixMillis = UnixMillis(1_750_000_000_000);

pub(crate) fn network() -> Network {
    Network::named("golden", 7)
}

pub(crate) fn node() -> NodeKeyPair {
    NodeKeyPair::from_seed(&[2; 32])
}

pub(crate) fn raw_signed() -> pb::Signed {
    pb::Signed {
        payload: Bytes::from_static(b"payload"),
        signer: Bytes::from_static(&[3; 32]),
        signature: Bytes::from_static(&[4; 64]),
    }
}

pub(crate) fn job_spec() -> JobSpec {
    JobSpec {
        network: network(),
        block: BlockNumber(42),
        nonce: [5; 16],
        not_after: T.plus(Duration::from_secs(60)),
        program: Program::Model { model: ModelId([6; 32]), manifest: BlobId([7; 32]), entry: "classify".to_owned() },
        input: BlobId::of(b"input"),
        input_len: ByteCount(5),
        params: Bytes::from_static(b"params"),
        seed: 8,
        limits: Limits { fuel: 9, memory: ByteCount(10), output: ByteCount(11), wall_ms: 12 },
        replicas: 3,
        hardware_class: "cpu.8c.16gb".to_owned(),
        stream: true,
    }
}

pub(crate) fn builtin_spec() -> JobSpec {
    JobSpec { program: Program::Builtin { name: "echo".to_owned() }, ..job_spec() }
}

pub(crate) fn executor_cert() -> ExecutorCert {
    ExecutorCert {
        network: network(),
        executor: node().node_id(),
        hardware_class: "test".to_owned(),
        issued_at: T,
        expires_at: T.plus(Duration::from_secs(86_400)),
    }
}

pub(crate) fn attestation() -> Attestation {
    Attestation {
        job: JobId([13; 32]),
        attempt: 14,
        env_id: EnvId([15; 32]),
        input: BlobId([16; 32]),
        outcome: Outcome::ExitCode(17),
        output: BlobId([18; 32]),
        output_len: ByteCount(19),
        usage: Usage { fuel: 20, peak_memory: ByteCount(21), wall_us: 22 },
        executor_cert: raw_signed(),
        started_at: T,
        finished_at: T.plus(Duration::from_millis(23)),
    }
}

pub(crate) fn countersignature() -> Countersignature {
    Countersignature { attestation: Digest([24; 32]), job: JobId([25; 32]), attempt: 26 }
}

pub(crate) fn replicas() -> Vec<Replica> {
    let standings = [Standing::Agreed, Standing::Disagreed, Standing::Withheld, Standing::Faulted];
    let replica = |(i, standing): (u8, Standing)| Replica {
        miner: Hotkey([i; 32]),
        standing,
        attestation: (i % 2 == 0).then_some(Digest([i + 10; 32])),
        commitment: (i < 2).then_some(Digest([i + 20; 32])),
        latency_us: u64::from(i) + 1,
    };
    (0_u8..).zip(standings).map(replica).collect()
}

pub(crate) fn verdict(kind: VerdictKind) -> Verdict {
    Verdict {
        job: JobId([27; 32]),
        attempt: 28,
        rank: 29,
        kind,
        outcome: Some(Outcome::Completed),
        output: BlobId([30; 32]),
        output_len: ByteCount(31),
        env_id: EnvId([32; 32]),
        replicas: replicas(),
        epoch: 33,
        issued_at: T,
        incentive: Digest([34; 32]),
    }
}

pub(crate) fn verdict_kinds() -> [(&'static str, VerdictKind); 5] {
    [
        ("quorum", VerdictKind::Quorum(2)),
        ("audited", VerdictKind::Audited),
        ("unaudited", VerdictKind::Unaudited),
        ("rejected", VerdictKind::Rejected("why".to_owned())),
        ("failed", VerdictKind::Failed("why not".to_owned())),
    ]
}

pub(crate) fn certificate() -> Certificate {
    Certificate {
        node: node().node_id(),
        network: network(),
        roles: Roles::MINER.with(Roles::VALIDATOR),
        issued_at: T,
        expires_at: T.plus(Duration::from_secs(35)),
        serial: 36,
    }
}

pub(crate) fn executor_class() -> ExecutorClass {
    let engines = vec![EngineId([38; 32]), EngineId([39; 32])];
    ExecutorClass { hardware_class: "gpu-24gb".to_owned(), slots: 37, engines, price: 40 }
}

pub(crate) fn advert() -> Advert {
    Advert {
        network: network(),
        node: NodeId([41; 32]),
        sequence: 42,
        issued_at: T,
        expires_at: T.plus(Duration::from_secs(43)),
        roles: Roles::MINER,
        classes: vec![executor_class()],
        addresses: vec!["/ip4/10.0.0.1/tcp/4101".to_owned()],
        models: vec![ModelId([44; 32])],
    }
}

pub(crate) fn manifest(determinism: Determinism) -> ModelManifest {
    let artifact =
        |n: u8, name: &str| Artifact { name: name.to_owned(), blob: BlobId([n; 32]), len: ByteCount(n.into()) };
    ModelManifest {
        name: "digits".to_owned(),
        version: 45,
        engine: "wasm".to_owned(),
        program: artifact(46, "digits.wasm"),
        artifacts: vec![artifact(47, "weights.bin"), artifact(48, "labels.txt")],
        limits: Limits { fuel: 49, memory: ByteCount(50), output: ByteCount(51), wall_ms: 52 },
        determinism,
        tier: 53,
        hardware_class: "test".to_owned(),
        init: "init".to_owned(),
        entry: "classify".to_owned(),
        description: "handwritten digits".to_owned(),
        license: "MIT".to_owned(),
    }
}

pub(crate) fn tolerance() -> Determinism {
    Determinism::Tolerance { atol: 0.5, rtol: 0.25, dtype: "f32".to_owned() }
}

pub(crate) fn model_record() -> ModelRecord {
    ModelRecord {
        network: network(),
        name: "digits".to_owned(),
        version: 54,
        model: ModelId([55; 32]),
        manifest: BlobId([56; 32]),
        issued_at: T,
        expires_at: T.plus(Duration::from_secs(57)),
    }
}

pub(crate) fn batch() -> Batch {
    Batch {
        network: network(),
        epoch: 58,
        sequence: 59,
        root: Digest([60; 32]),
        count: 61,
        previous: Digest([62; 32]),
        issued_at: T,
    }
}

pub(crate) fn receipt() -> Receipt {
    Receipt {
        job: JobId([63; 32]),
        attempt: 64,
        stage: Stage::Started,
        validator: Hotkey([65; 32]),
        miner: Hotkey([66; 32]),
        at: T,
    }
}

pub(crate) fn audit_epoch() -> AuditEpoch {
    AuditEpoch { network: network(), epoch: 67, commitment: Digest([68; 32]), revealed: Some((66, [69; 32])) }
}

pub(crate) fn countersigned() -> pb::CountersignedAttestation {
    pb::CountersignedAttestation { attestation: Some(raw_signed()), countersignature: Some(raw_signed()) }
}

pub(crate) fn fraud_proof() -> FraudProof {
    FraudProof { network: network(), spec: raw_signed(), accused: countersigned(), reference: raw_signed() }
}
