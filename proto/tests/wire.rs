//! Every message comes back from the wire as it was sent, and no bytes whatever make the parser panic or accept what it
//! cannot send again.
#![allow(clippy::unwrap_used)]

#[path = "golden/frames.rs"]
mod frames;
#[path = "golden/rounds.rs"]
mod rounds;
#[path = "golden/values.rs"]
mod values;

use std::fmt::Debug;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;
use sundara_proto::advert::{Advert, ExecutorClass};
use sundara_proto::attestation::{
    Attestation, Countersignature, CountersignedAttestation, ExecutorCert, Outcome, Usage,
};
use sundara_proto::batch::{AuditEpoch, Batch, FraudProof, Receipt, Stage};
use sundara_proto::blob::{BlobHeader, BlobRequest};
use sundara_proto::cert::{Certificate, Roles};
use sundara_proto::crypto::{Network, Signed};
use sundara_proto::id::{BlobId, Digest, EngineId, EnvId, Hotkey, JobId, ModelId, NodeId, RoundId};
use sundara_proto::job::{JobSpec, Limits, Program};
use sundara_proto::model::{Artifact, Determinism, ModelManifest, ModelRecord};
use sundara_proto::pb;
use sundara_proto::round::*;
use sundara_proto::rules::round::blame;
use sundara_proto::units::{BlockNumber, ByteCount, UnixMillis};
use sundara_proto::verdict::{Proof, Replica, Standing, Verdict, VerdictKind};
use sundara_proto::wire::{self, WireMessage};

fn b32() -> impl Strategy<Value = [u8; 32]> {
    any::<[u8; 32]>()
}
fn name() -> impl Strategy<Value = String> {
    "([a-zA-Z0-9_-][a-zA-Z0-9._-]{0,20})?"
}
fn some_name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,20}"
}
fn text() -> impl Strategy<Value = String> {
    "\\PC{0,60}"
}
fn millis() -> impl Strategy<Value = UnixMillis> {
    any::<u64>().prop_map(UnixMillis)
}
fn bytes(max: usize) -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..=max).prop_map(Bytes::from)
}
fn network() -> impl Strategy<Value = Network> {
    (b32(), any::<u16>()).prop_map(|(genesis, netuid)| Network { genesis, netuid })
}
fn raw_signed() -> impl Strategy<Value = pb::Signed> {
    (bytes(80), bytes(40), bytes(70)).prop_map(|(payload, signer, signature)| pb::Signed { payload, signer, signature })
}
fn limits() -> impl Strategy<Value = Limits> {
    (0..=Limits::MAX.fuel, 0..=Limits::MAX.memory.0, 0..=Limits::MAX.output.0, 0..=Limits::MAX.wall_ms).prop_map(
        |(fuel, memory, output, wall_ms)| Limits {
            fuel,
            memory: ByteCount(memory),
            output: ByteCount(output),
            wall_ms,
        },
    )
}
fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        any::<i32>().prop_map(Outcome::ExitCode),
        any::<i32>().prop_map(Outcome::Trap),
        proptest::sample::select(vec![
            Outcome::Completed,
            Outcome::OutOfFuel,
            Outcome::MemoryLimit,
            Outcome::OutputLimit,
            Outcome::InvalidModule,
            Outcome::Aborted,
            Outcome::Indeterminate,
        ]),
    ]
}

fn job_spec() -> impl Strategy<Value = JobSpec> {
    let program = prop_oneof![
        (b32(), b32(), name()).prop_map(|(model, manifest, entry)| Program::Model {
            model: ModelId(model),
            manifest: BlobId(manifest),
            entry
        }),
        name().prop_map(|name| Program::Builtin { name }),
    ];
    let what = (program, b32(), 0..=wire::limit::INPUT.0, bytes(100), any::<u64>(), limits());
    let how = (1..=16_u8, name(), any::<bool>());
    (network(), any::<u64>(), any::<[u8; 16]>(), millis(), what, how).prop_map(
        |(network, block, nonce, not_after, (program, input, input_len, params, seed, limits), how)| JobSpec {
            network,
            block: BlockNumber(block),
            nonce,
            not_after,
            program,
            input: BlobId(input),
            input_len: ByteCount(input_len),
            params,
            seed,
            limits,
            replicas: how.0,
            hardware_class: how.1,
            stream: how.2,
        },
    )
}

fn executor_cert() -> impl Strategy<Value = ExecutorCert> {
    (network(), b32(), name(), millis(), millis()).prop_map(
        |(network, executor, hardware_class, issued_at, expires_at)| ExecutorCert {
            network,
            executor: NodeId(executor),
            hardware_class,
            issued_at,
            expires_at,
        },
    )
}

fn attestation() -> impl Strategy<Value = Attestation> {
    let ids = (b32(), any::<u32>(), b32(), b32(), b32());
    let usage = (any::<u64>(), any::<u64>(), any::<u64>());
    (ids, outcome(), any::<u64>(), usage, raw_signed(), (millis(), millis())).prop_map(
        |((job, attempt, env_id, input, output), outcome, output_len, usage, executor_cert, times)| Attestation {
            job: JobId(job),
            attempt,
            env_id: EnvId(env_id),
            input: BlobId(input),
            outcome,
            output: BlobId(output),
            output_len: ByteCount(output_len),
            usage: Usage { fuel: usage.0, peak_memory: ByteCount(usage.1), wall_us: usage.2 },
            executor_cert,
            started_at: times.0,
            finished_at: times.1,
        },
    )
}

fn countersignature() -> impl Strategy<Value = Countersignature> {
    (b32(), b32(), any::<u32>()).prop_map(|(attestation, job, attempt)| Countersignature {
        attestation: Digest(attestation),
        job: JobId(job),
        attempt,
    })
}

fn replica() -> impl Strategy<Value = Replica> {
    let standing =
        proptest::sample::select(vec![Standing::Agreed, Standing::Disagreed, Standing::Withheld, Standing::Faulted]);
    let digest = || proptest::option::of(b32().prop_map(Digest));
    (b32(), standing, digest(), digest(), any::<u64>()).prop_map(
        |(miner, standing, attestation, commitment, latency_us)| Replica {
            miner: Hotkey(miner),
            standing,
            attestation,
            commitment,
            latency_us,
        },
    )
}

fn verdict() -> impl Strategy<Value = Verdict> {
    let kind = prop_oneof![
        (2..=16_u8).prop_map(VerdictKind::Quorum),
        Just(VerdictKind::Audited),
        Just(VerdictKind::Unaudited),
        text().prop_map(VerdictKind::Rejected),
        text().prop_map(VerdictKind::Failed),
    ];
    let ids = (b32(), b32(), b32(), b32());
    let numbers = (any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>());
    (ids, numbers, kind, proptest::option::of(outcome()), vec(replica(), 0..5), millis()).prop_map(
        |((job, output, env_id, incentive), (attempt, rank, output_len, epoch), kind, outcome, replicas, issued_at)| {
            let outcome = if kind.is_verified() {
                Some(outcome.filter(|outcome| outcome.is_result()).unwrap_or(Outcome::Completed))
            } else {
                outcome
            };
            Verdict {
                job: JobId(job),
                attempt,
                rank,
                kind,
                outcome,
                output: BlobId(output),
                output_len: ByteCount(output_len),
                env_id: EnvId(env_id),
                replicas,
                epoch,
                issued_at,
                incentive: Digest(incentive),
            }
        },
    )
}

fn certificate() -> impl Strategy<Value = Certificate> {
    (b32(), network(), any::<u32>(), millis(), millis(), any::<u64>()).prop_map(
        |(node, network, roles, issued_at, expires_at, serial)| Certificate {
            node: NodeId(node),
            network,
            roles: Roles(roles),
            issued_at,
            expires_at,
            serial,
        },
    )
}

fn executor_class() -> impl Strategy<Value = ExecutorClass> {
    (name(), any::<u32>(), vec(b32().prop_map(EngineId), 0..4), any::<u64>())
        .prop_map(|(hardware_class, slots, engines, price)| ExecutorClass { hardware_class, slots, engines, price })
}

fn advert() -> impl Strategy<Value = Advert> {
    let lists = (vec(executor_class(), 0..3), vec(text(), 0..3), vec(b32().prop_map(ModelId), 0..3));
    (network(), b32(), any::<u64>(), 0..u64::MAX / 2, 0..=300_000_u64, any::<u32>(), lists).prop_map(
        |(network, node, sequence, issued, life, roles, (classes, addresses, models))| Advert {
            network,
            node: NodeId(node),
            sequence,
            issued_at: UnixMillis(issued),
            expires_at: UnixMillis(issued + life),
            roles: Roles(roles),
            classes,
            addresses,
            models,
        },
    )
}

fn manifest() -> impl Strategy<Value = ModelManifest> {
    let determinism = prop_oneof![
        Just(Determinism::Exact),
        (0.0..1e300_f64, 0.0..1.0_f64, proptest::sample::select(vec!["f32", "f64"]))
            .prop_map(|(atol, rtol, dtype)| Determinism::Tolerance { atol, rtol, dtype: dtype.to_owned() }),
    ];
    let artifacts = proptest::collection::btree_map(some_name(), (b32(), any::<u64>()), 0..5);
    let artifact = |name, (blob, len)| Artifact { name, blob: BlobId(blob), len: ByteCount(len) };
    let words = (some_name(), name(), name(), name(), text(), text());
    (words, (some_name(), (b32(), any::<u64>())), artifacts, limits(), determinism, any::<u64>(), any::<u32>())
        .prop_map(move |(words, program, artifacts, limits, determinism, version, tier)| ModelManifest {
            name: words.0,
            version,
            engine: "wasm".to_owned(),
            program: artifact(program.0, program.1),
            artifacts: artifacts.into_iter().map(|(name, rest)| artifact(name, rest)).collect(),
            limits,
            determinism,
            tier,
            hardware_class: words.1,
            init: words.2,
            entry: words.3,
            description: words.4,
            license: words.5.chars().take(20).collect(),
        })
}

fn model_record() -> impl Strategy<Value = ModelRecord> {
    let life = 0..=604_800_000_u64;
    (network(), some_name(), any::<u64>(), b32(), b32(), 0..u64::MAX / 2, life).prop_map(
        |(network, name, version, model, manifest, issued, life)| ModelRecord {
            network,
            name,
            version,
            model: ModelId(model),
            manifest: BlobId(manifest),
            issued_at: UnixMillis(issued),
            expires_at: UnixMillis(issued + life),
        },
    )
}

fn batch() -> impl Strategy<Value = Batch> {
    (network(), any::<u64>(), any::<u64>(), b32(), 1..=500_u32, b32(), millis()).prop_map(
        |(network, epoch, sequence, root, count, previous, issued_at)| Batch {
            network,
            epoch,
            sequence,
            root: Digest(root),
            count,
            previous: Digest(previous),
            issued_at,
        },
    )
}

fn receipt() -> impl Strategy<Value = Receipt> {
    let stage = proptest::sample::select(vec![Stage::Accepted, Stage::Started, Stage::Finished]);
    (b32(), any::<u32>(), stage, b32(), b32(), millis()).prop_map(|(job, attempt, stage, validator, miner, at)| {
        Receipt { job: JobId(job), attempt, stage, validator: Hotkey(validator), miner: Hotkey(miner), at }
    })
}

fn audit_epoch() -> impl Strategy<Value = AuditEpoch> {
    (network(), any::<u64>(), b32(), proptest::option::of((any::<u64>(), b32()))).prop_map(
        |(network, epoch, commitment, revealed)| AuditEpoch {
            network,
            epoch,
            commitment: Digest(commitment),
            revealed,
        },
    )
}

fn fraud_proof() -> impl Strategy<Value = FraudProof> {
    (network(), raw_signed(), raw_signed(), raw_signed(), raw_signed()).prop_map(
        |(network, spec, attestation, countersignature, reference)| FraudProof {
            network,
            spec,
            accused: pb::CountersignedAttestation {
                attestation: Some(attestation),
                countersignature: Some(countersignature),
            },
            reference,
        },
    )
}

fn round_trips<T: WireMessage + PartialEq + Debug>(value: &T) -> Result<(), TestCaseError> {
    let encoded = Bytes::from(value.encode());
    prop_assert!(encoded.len() <= T::MAX, "{} bytes are more than {}", encoded.len(), T::MAX);
    prop_assert_eq!(&T::decode(&encoded).map_err(|e| TestCaseError::fail(e.to_string()))?, value);
    Ok(())
}

/// Whatever parses is the same after another trip.
fn is_stable<T: WireMessage + PartialEq + Debug>(bytes: &Bytes) -> Result<(), TestCaseError> {
    if let Ok(value) = T::decode(bytes) {
        let again = T::decode(&Bytes::from(value.encode()));
        prop_assert_eq!(again.map_err(|e| TestCaseError::fail(e.to_string()))?, value);
    }
    Ok(())
}

/// Gives bytes to every parser.
fn every_parser(bytes: &Bytes) -> Result<(), TestCaseError> {
    is_stable::<JobSpec>(bytes)?;
    is_stable::<ExecutorCert>(bytes)?;
    is_stable::<Attestation>(bytes)?;
    is_stable::<Countersignature>(bytes)?;
    is_stable::<Replica>(bytes)?;
    is_stable::<Verdict>(bytes)?;
    is_stable::<Certificate>(bytes)?;
    is_stable::<ExecutorClass>(bytes)?;
    is_stable::<Advert>(bytes)?;
    is_stable::<ModelManifest>(bytes)?;
    is_stable::<ModelRecord>(bytes)?;
    is_stable::<Batch>(bytes)?;
    is_stable::<Receipt>(bytes)?;
    is_stable::<AuditEpoch>(bytes)?;
    is_stable::<FraudProof>(bytes)?;
    is_stable::<BlobRequest>(bytes)?;
    is_stable::<BlobHeader>(bytes)?;
    is_stable::<GroupRoster>(bytes)?;
    is_stable::<Invitation>(bytes)?;
    is_stable::<StateDigest>(bytes)?;
    is_stable::<RoundOpen>(bytes)?;
    is_stable::<RoundAmend>(bytes)?;
    is_stable::<RoundClose>(bytes)?;
    is_stable::<ChunkCommit>(bytes)?;
    is_stable::<ChunkReceipt>(bytes)?;
    is_stable::<SumCommit>(bytes)?;
    is_stable::<NonceSet>(bytes)?;
    is_stable::<ChunkTags>(bytes)?;
    is_stable::<RoundFrame>(bytes)?;
    is_stable::<JoinGroup>(bytes)?;
    is_stable::<RoundReady>(bytes)?;
    is_stable::<RoundEvent>(bytes)?;
    is_stable::<RoundReport>(bytes)?;
    is_stable::<TranscriptRequest>(bytes)?;
    is_stable::<Transcript>(bytes)?;
    is_stable::<OpeningRequest>(bytes)?;
    is_stable::<BlameCase>(bytes)?;
    is_stable::<RoundProof>(bytes)?;
    if let Ok(case) = BlameCase::decode(bytes) {
        let _ = blame::judge(&values::network(), &case);
    }
    if let Ok(proof) = RoundProof::decode(bytes) {
        let _ = blame::judge_evidence(&values::network(), &proof.evidence);
    }
    let max = wire::limit::RPC_FRAME;
    let _ = wire::decode_raw::<pb::Frame>(bytes.clone(), max);
    let _ = wire::decode_raw::<pb::Hello>(bytes.clone(), wire::limit::HELLO);
    let _ = wire::decode_raw::<pb::Gossip>(bytes.clone(), wire::limit::GOSSIP);
    if let Ok(raw) = wire::decode_raw::<pb::Proof>(bytes.clone(), max) {
        let _ = Proof::verify(raw);
    }
    if let Ok(raw) = wire::decode_raw::<pb::CountersignedAttestation>(bytes.clone(), max) {
        let _ = CountersignedAttestation::verify(&values::network(), raw);
    }
    if let Ok(raw) = wire::decode_raw::<pb::Signed>(bytes.clone(), max) {
        let _ = Signed::<JobSpec>::verify(&values::network(), raw.clone());
        let _ = Signed::<JobSpec>::trusted(raw);
    }
    Ok(())
}

/// Encodings to damage: real messages reach further into the parsers than random bytes do.
fn corpus() -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = frames::all().into_iter().map(|(_, bytes)| bytes).collect();
    all.extend([
        values::job_spec().encode(),
        values::builtin_spec().encode(),
        values::executor_cert().encode(),
        values::attestation().encode(),
        values::countersignature().encode(),
        values::certificate().encode(),
        values::advert().encode(),
        values::manifest(values::tolerance()).encode(),
        values::model_record().encode(),
        values::batch().encode(),
        values::receipt().encode(),
        values::audit_epoch().encode(),
        values::fraud_proof().encode(),
        values::raw_signed().encode_to_vec(),
        values::countersigned().encode_to_vec(),
    ]);
    all.extend(rounds::all().into_iter().map(|(_, bytes)| bytes));
    all.extend(values::verdict_kinds().into_iter().map(|(_, kind)| values::verdict(kind).encode()));
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn jobs_and_attestations_round_trip(
        spec in job_spec(), cert in executor_cert(), attestation in attestation(), counter in countersignature(),
        replica in replica(), verdict in verdict(),
    ) {
        round_trips(&spec)?;
        round_trips(&cert)?;
        round_trips(&attestation)?;
        round_trips(&counter)?;
        round_trips(&replica)?;
        round_trips(&verdict)?;
    }

    #[test]
    fn nodes_and_models_round_trip(
        certificate in certificate(), class in executor_class(), advert in advert(), manifest in manifest(),
        record in model_record(),
    ) {
        round_trips(&certificate)?;
        round_trips(&class)?;
        round_trips(&advert)?;
        round_trips(&manifest)?;
        round_trips(&record)?;
    }

    #[test]
    fn evidence_round_trips(
        batch in batch(), receipt in receipt(), epoch in audit_epoch(), proof in fraud_proof(),
    ) {
        round_trips(&batch)?;
        round_trips(&receipt)?;
        round_trips(&epoch)?;
        round_trips(&proof)?;
    }

    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in bytes(300)) {
        every_parser(&bytes)?;
    }

    #[test]
    fn damaged_messages_are_parsed_or_refused(
        which in any::<proptest::sample::Index>(),
        damage in vec((0..4_u8, any::<proptest::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let corpus = corpus();
        let mut message = corpus[which.index(corpus.len())].clone();
        for (kind, place, byte) in damage {
            let place = place.index(message.len() + 1);
            match kind {
                0 if place < message.len() => message[place] ^= byte | 1,
                1 => message.insert(place, byte),
                2 if place < message.len() => { message.remove(place); }
                _ => message.truncate(place),
            }
        }
        every_parser(&Bytes::from(message))?;
    }
}

#[test]
fn messages_of_rounds_round_trip() {
    fn same<T: WireMessage + PartialEq + Debug>(value: T) {
        round_trips(&value).unwrap();
    }
    same(rounds::roster());
    same(rounds::invitation(Invitee::Hotkey(Hotkey([1; 32]))));
    same(rounds::invitation(Invitee::Bearer(Digest([1; 32]))));
    same(rounds::state_digest());
    same(rounds::open());
    same(rounds::amend());
    same(rounds::close());
    same(rounds::commit());
    same(ChunkCommit { fixed: None, ..rounds::commit() });
    same(rounds::receipt());
    same(rounds::sum());
    same(SumCommit { shared: None, ..rounds::sum() });
    same(rounds::nonces());
    same(rounds::tags());
    same(rounds::case());
    same(rounds::join());
    same(rounds::ready());
    same(rounds::transcript_request());
    same(rounds::transcript());
    same(rounds::opening_request());
    rounds::frames().into_iter().for_each(|(_, frame)| same(frame));
    rounds::events().into_iter().for_each(|(_, event)| same(event));
    rounds::reports().into_iter().for_each(|(_, report)| same(report));
    rounds::evidence().into_iter().for_each(|(_, evidence)| same(rounds::proof(evidence)));
}

/// The fullest messages fit their own limits, and those of what carries them.
#[test]
fn the_largest_messages_of_rounds_fit() {
    let full = |len: usize| pb::Signed {
        payload: vec![7; len].into(),
        signer: vec![7; 32].into(),
        signature: vec![7; 64].into(),
    };
    let party = GroupMember { hotkey: Hotkey([7; 32]), node: NodeId([7; 32]) };
    let ranks: Ranks = (0..=Rank::MAX).collect();
    let seat = |rank: Rank| RoundMember { rank, hotkey: party.hotkey, node: party.node };
    let most = (1_u64 << 36) / 4_096;
    let part = |n: u64| RoundPart { reducer: party, backup: Some(party), groups: most / 256 * n..most / 256 * (n + 1) };
    let open = RoundOpen {
        lens: vec![1 << 24; 4_096],
        op: RoundOp::Sum,
        leader: 0,
        members: (0..=Rank::MAX).map(seat).collect(),
        parts: (0..256).map(part).collect(),
        chunk_groups: 256,
        ..rounds::open()
    };
    assert_eq!(open.check().unwrap().chunks() as usize, wire::limit::CHUNKS);
    let len = open.encode().len();
    assert!(len <= RoundOpen::MAX, "{len}");
    let amend = RoundAmend {
        dropped: ranks,
        moves: (0..256).map(|part| PartMove { part, reducer: party }).collect(),
        keep: (0..wire::limit::CHUNKS as u32).collect(),
        ..rounds::amend()
    };
    let len = amend.encode().len();
    assert!(len <= RoundAmend::MAX, "{len}");
    let sum = SumCommit { participants: ranks, commits: vec![Digest([7; 32]); 256], ..rounds::sum() };
    assert!(sum.encode().len() <= SumCommit::MAX);
    let nonces = NonceSet { nonces: vec![[7; 32]; 256], ..rounds::nonces() };
    assert!(nonces.encode().len() <= NonceSet::MAX);
    let tags = ChunkTags { tags: vec![1 << 60; 256], ..rounds::tags() };
    assert!(tags.encode().len() <= ChunkTags::MAX);

    let fits = |frame: RoundFrame| {
        let len = frame.encode().len();
        assert!(len <= RoundFrame::MAX, "{len}");
    };
    let signed_len = |payload: usize| full(payload);
    fits(RoundFrame::Hello { open: full(RoundOpen::MAX), amends: vec![full(RoundAmend::MAX); wire::limit::AMENDS] });
    let exponents = vec![Bytes::from(vec![7; 4_096]); 256];
    fits(RoundFrame::ScaleSet { attempt: u32::MAX, chunk: 65_535, ranks, exponents });
    let commits = vec![signed_len(rounds::commit().encode().len() + 32); 256];
    fits(RoundFrame::Sum { sum: full(SumCommit::MAX), commits: commits.clone() });
    let all_tags = vec![signed_len(tags.encode().len() + 32); 256];
    fits(RoundFrame::TagSet { attempt: u32::MAX, chunk: 65_535, tags: all_tags.clone() });

    // A page that is not full yet takes one more chunk, and a round's first page is one.
    let chunk = TranscriptChunk {
        sum: full(SumCommit::MAX),
        commits: commits.clone(),
        nonces: Some(full(NonceSet::MAX)),
        tags: all_tags.clone(),
    };
    let page = Transcript { chunks: vec![chunk], next: Some(65_535), ..Transcript::default() };
    let len = page.encode().len();
    assert!(len + Transcript::PAGE <= wire::limit::RPC_FRAME - (1 << 10), "{len}");
    let first = Transcript {
        open: Some(full(RoundOpen::MAX)),
        amends: vec![full(RoundAmend::MAX); wire::limit::AMENDS],
        ..Transcript::default()
    };
    assert!(first.encode().len() <= wire::limit::RPC_FRAME - (1 << 10));
    let done = RoundDone { first: 60_000, sums: vec![Digest([7; 32]); wire::limit::REPORT_SUMS], amend: 16 };
    let report = RoundReport { round: RoundId([7; 32]), kind: RoundReportKind::Done(done) };
    let len = report.encode().len();
    assert!(len <= RoundReport::MAX, "{len}");
    const { assert!(RoundReport::MAX + (1 << 10) <= wire::limit::RPC_REQUEST, "a report is a request") };
    const { assert!(RoundReady::MAX + (1 << 10) <= wire::limit::RPC_REQUEST, "so is a member's word") };

    let words = vec![7; 8 << 20];
    let opening = sundara_proto::rules::round::tree::open(&words, 100, 8).unwrap();
    let case = BlameCase {
        open: full(RoundOpen::MAX),
        amends: vec![full(RoundAmend::MAX); wire::limit::AMENDS],
        sum: full(SumCommit::MAX),
        commits,
        nonces: Some(full(NonceSet::MAX)),
        tags: all_tags,
        out_tags: vec![1 << 60; 256],
        inputs: vec![opening.clone(); 256],
        output: Some(opening),
        scales: Vec::new(),
        ..rounds::case()
    };
    let len = case.encode().len();
    assert!(len <= BlameCase::MAX, "{len}");
    let proof = rounds::proof(Evidence::Case { blob: case.blob(), len: ByteCount(len as u64) });
    assert!(proof.encode().len() < 200);
    const { assert!(RoundProof::MAX + 200 <= wire::limit::GOSSIP, "a proof fits gossip") };
    assert!(RoundProof::decode(&rounds::proof(Evidence::Blame(Box::new(case))).encode().into()).is_err());
}

#[test]
fn what_is_longer_than_its_limit_is_refused_unread() {
    let long = Bytes::from(vec![0; JobSpec::MAX + 1]);
    assert_eq!(JobSpec::decode(&long), Err(wire::WireError::TooLarge { len: JobSpec::MAX + 1, max: JobSpec::MAX }));
}
