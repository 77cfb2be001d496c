//! One value of every message of rounds, with every field set. They never change: what they encode to is frozen.

use bytes::Bytes;
use sundara_proto::crypto::{HotkeyPair, Signed};
use sundara_proto::id::{BlobId, Digest, GroupId, Hotkey, NodeId, RoundId};
use sundara_proto::round::*;
use sundara_proto::rules::round::dtype::{Compress, Dtype, Wire};
use sundara_proto::rules::round::tags::TagKey;
use sundara_proto::rules::round::tree::{ChunkTree, Opening};
use sundara_proto::rules::round::{fixed, tags};
use sundara_proto::units::ByteCount;
use sundara_proto::wire::WireMessage;

use super::values::{T, network, raw_signed};

fn member(n: u8) -> GroupMember {
    GroupMember { hotkey: Hotkey([n; 32]), node: NodeId([n + 1; 32]) }
}

pub(crate) fn settings() -> RoundSettings {
    RoundSettings { mode: Mode::Verified, compress: Compress::Bf16, topology: Topology::Butterfly, demand_all: true }
}

pub(crate) fn roster() -> GroupRoster {
    GroupRoster {
        name: "run-1".to_owned(),
        version: 2,
        members: vec![member(70), member(72)],
        settings: settings(),
        min_members: 2,
    }
}

pub(crate) fn invitation(invitee: Invitee) -> Invitation {
    Invitation { group: GroupId([74; 32]), invitee, expires_at: T }
}

pub(crate) fn state_digest() -> StateDigest {
    StateDigest { group: GroupId([74; 32]), seq: 75, blob: BlobId([76; 32]), len: ByteCount(77) }
}

pub(crate) fn open() -> RoundOpen {
    let seat = |rank: Rank, n: u8| RoundMember { rank, hotkey: Hotkey([n; 32]), node: NodeId([n + 1; 32]) };
    RoundOpen {
        group: GroupId([74; 32]),
        roster: 2,
        seq: 78,
        leader: 1,
        op: RoundOp::Reduce { root: 3 },
        dtype: Dtype::F32,
        lens: vec![5_000, 20_000],
        settings: settings(),
        members: vec![seat(1, 70), seat(3, 72)],
        parts: vec![
            RoundPart { reducer: member(70), backup: Some(member(79)), groups: 0..3 },
            RoundPart { reducer: member(72), backup: None, groups: 3..7 },
        ],
        chunk_groups: 2,
        deadline_ms: 80,
    }
}

pub(crate) fn ops() -> [RoundOp; 11] {
    use RoundOp::*;
    [Sum, Mean, Min, Max, Median, TrimmedMean, CentredClip, Reduce { root: 1 }, Broadcast { root: 3 }, Gather, Barrier]
}

pub(crate) fn amend() -> RoundAmend {
    RoundAmend {
        round: RoundId([81; 32]),
        number: 2,
        leader: 3,
        dropped: [1, 9].into_iter().collect(),
        moves: vec![PartMove { part: 1, reducer: member(82) }],
        keep: [0, 2, 11].into_iter().collect(),
    }
}

pub(crate) fn close() -> RoundClose {
    let sums = sums_digest([Digest([83; 32]), Digest([84; 32])]);
    RoundClose { round: RoundId([81; 32]), amend: 2, chunks: 2, sums, dropped: [1].into_iter().collect() }
}

pub(crate) fn commit() -> ChunkCommit {
    ChunkCommit {
        round: RoundId([81; 32]),
        attempt: 1,
        chunk: 2,
        rank: 3,
        root: Digest([85; 32]),
        len: 86,
        fixed: Some(FixedCommit { scale: Digest([87; 32]), shared: Digest([88; 32]), nonce: nonce_hash(&[89; 32]) }),
    }
}

pub(crate) fn receipt() -> ChunkReceipt {
    ChunkReceipt { round: RoundId([81; 32]), attempt: 1, chunk: 2, rank: 3, root: Digest([85; 32]) }
}

pub(crate) fn sum() -> SumCommit {
    SumCommit {
        round: RoundId([81; 32]),
        attempt: 1,
        chunk: 2,
        participants: [3, 200].into_iter().collect(),
        commits: vec![Digest([90; 32]), Digest([91; 32])],
        shared: Some(Digest([88; 32])),
        out_root: Digest([92; 32]),
    }
}

pub(crate) fn nonces() -> NonceSet {
    let nonces = vec![[89; 32], [0; 32]];
    NonceSet { round: RoundId([81; 32]), attempt: 1, chunk: 2, sum: Digest([93; 32]), nonces }
}

pub(crate) fn tags() -> ChunkTags {
    ChunkTags {
        round: RoundId([81; 32]),
        attempt: 1,
        chunk: 2,
        rank: 3,
        sum: Digest([93; 32]),
        nonces: Digest([94; 32]),
        tags: vec![0, 1, tags::P - 1],
        out: out_digest(&[5, 6]),
    }
}

fn words() -> Vec<u8> {
    (0..40_000_u32).flat_map(|k| k.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect()
}

pub(crate) fn opening() -> Opening {
    let words = &words()[..36 << 10];
    // The last leaf is short, so that the frozen line is.
    ChunkTree::of(words).open(words, 2, 4).unwrap()
}

pub(crate) fn case() -> BlameCase {
    BlameCase {
        open: raw_signed(),
        amends: vec![raw_signed()],
        sum: raw_signed(),
        commits: vec![raw_signed()],
        nonces: Some(raw_signed()),
        tags: vec![raw_signed()],
        accuser: Some(0),
        out_tags: vec![1, 2],
        group: 95,
        inputs: vec![opening()],
        output: Some(opening()),
        scales: vec![Bytes::from_static(&[1, 2])],
        shared: Bytes::from_static(&[3]),
    }
}

pub(crate) fn proof(evidence: Evidence) -> RoundProof {
    RoundProof { network: network(), accused: Hotkey([96; 32]), evidence }
}

pub(crate) fn equivocation(kind: EquivocationKind) -> Evidence {
    Evidence::Equivocation(Equivocation { kind, first: raw_signed(), second: raw_signed() })
}

pub(crate) fn evidence() -> Vec<(&'static str, Evidence)> {
    let omission = Omission { receipt: raw_signed(), sum: raw_signed(), commit: Some(raw_signed()) };
    vec![
        ("blame", Evidence::Blame(Box::new(case()))),
        ("equivocation.open", equivocation(EquivocationKind::Open)),
        ("equivocation.amend", equivocation(EquivocationKind::Amend)),
        ("equivocation.commit", equivocation(EquivocationKind::Commit)),
        ("equivocation.sum", equivocation(EquivocationKind::Sum)),
        ("equivocation.nonces", equivocation(EquivocationKind::Nonces)),
        ("omission", Evidence::Omission(omission)),
        ("case", Evidence::Case { blob: BlobId([97; 32]), len: ByteCount(98) }),
    ]
}

pub(crate) fn frames() -> Vec<(&'static str, RoundFrame)> {
    use RoundFrame as F;
    let (attempt, chunk) = (1, 2);
    let exponents = Bytes::from_static(&[7, 8]);
    vec![
        ("hello", F::Hello { open: raw_signed(), amends: vec![raw_signed()] }),
        ("scale", F::Scale { attempt, chunk, exponents: exponents.clone() }),
        (
            "scale-set",
            F::ScaleSet {
                attempt,
                chunk,
                ranks: [1, 3].into_iter().collect(),
                exponents: vec![exponents.clone(), exponents],
            },
        ),
        ("commit", F::Commit(raw_signed())),
        ("receipt", F::Receipt(raw_signed())),
        ("sum", F::Sum { sum: raw_signed(), commits: vec![raw_signed()] }),
        ("waiting", F::Waiting { part: 1, ranks: [3].into_iter().collect() }),
        ("nonce", F::Nonce { attempt, chunk, nonce: [9; 32] }),
        ("nonces", F::Nonces(raw_signed())),
        ("tags", F::Tags(raw_signed())),
        ("tag-set", F::TagSet { attempt, chunk, tags: vec![raw_signed()] }),
        ("settled", F::Settled { attempt, chunk }),
        ("dispute", F::Dispute { attempt, chunk, group: 4 }),
        ("opening", F::Opening { attempt, chunk, group: 4, rank: Some(0), opening: opening() }),
        ("abort", F::Abort { attempt, chunk: Some(0), reason: "over".to_owned() }),
        ("ping", F::Ping(5)),
    ]
}

pub(crate) fn join() -> JoinGroup {
    let token = Bytes::from_static(&[99; 32]);
    JoinGroup { group: GroupId([74; 32]), rank: Some(0), invitation: Some(raw_signed()), token }
}

pub(crate) fn ready() -> RoundReady {
    RoundReady {
        group: GroupId([74; 32]),
        roster: 2,
        seq: 78,
        op: RoundOp::Mean,
        dtype: Dtype::Bf16,
        lens: lens_digest(&[5, 6]),
        settings: settings(),
        open: Some(raw_signed()),
        amends: vec![raw_signed()],
    }
}

pub(crate) fn events() -> Vec<(&'static str, RoundEvent)> {
    vec![
        ("open", RoundEvent::Open(raw_signed())),
        ("amend", RoundEvent::Amend(raw_signed())),
        ("close", RoundEvent::Close(raw_signed())),
        ("failed", RoundEvent::Failed { reason: "too few".to_owned(), ranks: [2].into_iter().collect() }),
        ("probe", RoundEvent::Probe),
    ]
}

pub(crate) fn reports() -> Vec<(&'static str, RoundReport)> {
    let report = |kind| RoundReport { round: RoundId([81; 32]), kind };
    let fault = |kind| {
        let fault = RoundFault {
            part: 1,
            node: NodeId([100; 32]),
            kind,
            detail: "why".to_owned(),
            evidence: Some(equivocation(EquivocationKind::Sum)),
            waiting: [4].into_iter().collect(),
            amend: 5,
        };
        report(RoundReportKind::Fault(Box::new(fault)))
    };
    let status = RoundStatus { settled: [0, 9].into_iter().collect(), progress: 6, amend: 5 };
    let done = RoundDone { first: 3, sums: vec![Digest([93; 32])], amend: 5 };
    vec![
        ("done", report(RoundReportKind::Done(done))),
        ("status", report(RoundReportKind::Status(status))),
        ("unreachable", fault(FaultKind::Unreachable)),
        ("stalled", fault(FaultKind::Stalled)),
        ("bad-data", fault(FaultKind::BadData)),
        ("refused", fault(FaultKind::Refused)),
        ("lied", fault(FaultKind::Lied)),
    ]
}

pub(crate) fn transcript_request() -> TranscriptRequest {
    TranscriptRequest { round: RoundId([81; 32]), part: 1, chunk: 2 }
}

pub(crate) fn transcript() -> Transcript {
    let chunk = TranscriptChunk {
        sum: raw_signed(),
        commits: vec![raw_signed()],
        nonces: Some(raw_signed()),
        tags: vec![raw_signed()],
    };
    Transcript { open: Some(raw_signed()), amends: vec![raw_signed()], chunks: vec![chunk], next: Some(0) }
}

pub(crate) fn opening_request() -> OpeningRequest {
    OpeningRequest { round: RoundId([81; 32]), attempt: 1, chunk: 2, group: 4, rank: Some(0) }
}

/// Name and encoding of every message of rounds, signed payloads among them.
pub(crate) fn all() -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = vec![
        ("payload.group-roster".to_owned(), roster().encode()),
        ("payload.group-invitation.hotkey".to_owned(), invitation(Invitee::Hotkey(Hotkey([70; 32]))).encode()),
        ("payload.group-invitation.bearer".to_owned(), invitation(Invitee::Bearer(Digest([71; 32]))).encode()),
        ("payload.state-digest".to_owned(), state_digest().encode()),
        ("payload.round-amend".to_owned(), amend().encode()),
        ("payload.round-close".to_owned(), close().encode()),
        ("payload.chunk-commit".to_owned(), commit().encode()),
        ("payload.chunk-receipt".to_owned(), receipt().encode()),
        ("payload.sum-commit".to_owned(), sum().encode()),
        ("payload.nonce-set".to_owned(), nonces().encode()),
        ("payload.chunk-tags".to_owned(), tags().encode()),
        ("round.join".to_owned(), join().encode()),
        ("round.ready".to_owned(), ready().encode()),
        ("round.transcript-request".to_owned(), transcript_request().encode()),
        ("round.transcript".to_owned(), transcript().encode()),
        ("round.opening-request".to_owned(), opening_request().encode()),
        ("payload.round-open".to_owned(), open().encode()),
    ];
    for (n, op) in ops().into_iter().enumerate() {
        let settings = RoundSettings { mode: Mode::Off, compress: Compress::None, ..settings() };
        all.push((format!("payload.round-open.op-{n:02}"), RoundOpen { op, settings, ..open() }.encode()));
    }
    for (n, dtype) in Dtype::ALL.into_iter().enumerate() {
        let settings = RoundSettings { mode: Mode::Exact, compress: Compress::None, ..RoundSettings::default() };
        all.push((format!("payload.round-open.dtype-{n}"), RoundOpen { dtype, settings, ..open() }.encode()));
    }
    let int8 = RoundSettings { compress: Compress::Int8, ..settings() };
    all.push(("payload.round-open.int8".to_owned(), RoundOpen { settings: int8, ..open() }.encode()));
    all.extend(evidence().into_iter().map(|(n, e)| (format!("payload.round-proof.{n}"), proof(e).encode())));
    all.extend(frames().into_iter().map(|(n, f)| (format!("round.frame.{n}"), f.encode())));
    all.extend(events().into_iter().map(|(n, e)| (format!("round.event.{n}"), e.encode())));
    all.extend(reports().into_iter().map(|(n, r)| (format!("round.report.{n}"), r.encode())));
    all
}

/// Rules whose every bit is agreed upon.
#[allow(dead_code, reason = "golden.rs alone freezes them")]
pub(crate) fn rules() -> Vec<(&'static str, String)> {
    let rho = tags::rho(&RoundId([81; 32]), 2, &Digest([93; 32]), &sum().commits, &nonces().nonces);
    let key = TagKey::new(&rho);
    let words = words();
    let of = |word| {
        let mut all = Vec::new();
        key.tags(&words[..100_000], word, &mut all);
        all.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
    };
    let tensor: Vec<u8> = (0..700)
        .flat_map(|k: i32| (((k * 7_919 % 1_009) - 500) as f32 * 2_f32.powi(k / 100 * 9 - 30)).to_le_bytes())
        .collect();
    let mut rules = vec![
        ("group-id", GroupId::of(&network(), &Hotkey([1; 32]), "run-1").to_string()),
        ("token-digest", token_digest(&GroupId([74; 32]), &[99; 32]).to_string()),
        ("round-id", Signed::sign(&network(), &HotkeyPair::from_seed(&[1; 32]), open()).id().to_string()),
        ("round-rho", rho.to_string()),
        ("round-tags.w8", of(sundara_proto::rules::round::dtype::Word::W8)),
        ("round-tags.w16", of(sundara_proto::rules::round::dtype::Word::W16)),
        ("round-tags.w32", of(sundara_proto::rules::round::dtype::Word::W32)),
        ("round-tags.w64", of(sundara_proto::rules::round::dtype::Word::W64)),
        ("round-root", ChunkTree::of(&words).root().to_string()),
        ("round-opening", blake3::hash(&opening_bytes(&words)).to_string()),
    ];
    let named = [
        ("round-fixed.i32", Compress::None, 3),
        ("round-fixed.i32-wide", Compress::None, 200),
        ("round-fixed.i16", Compress::Bf16, 3),
        ("round-fixed.i8", Compress::Int8, 3),
    ];
    for (name, compress, members) in named {
        let wire = Wire::of(Dtype::F32, compress, members).unwrap();
        let exponents = fixed::block_exponents(wire, Dtype::F32, &tensor, None).unwrap();
        let mut words = vec![0; 700 * wire.input().len()];
        let mut residual = vec![0.001; 700];
        fixed::quantise(wire, Dtype::F32, &tensor, &exponents, &mut words, Some(&mut residual));
        let mut sum = vec![0; 700 * wire.output().len()];
        fixed::sum_into(wire, &mut sum, &words);
        fixed::sum_into(wire, &mut sum, &words);
        let mut mean = vec![0; tensor.len()];
        fixed::dequantise(wire, Dtype::F32, &sum, &exponents, 3, &mut mean).unwrap();
        let residual: Vec<u8> = residual.iter().flat_map(|r: &f32| r.to_le_bytes()).collect();
        let all = [exponents.clone(), words, residual, sum, mean].concat();
        rules.push((name, format!("{},{}", hex::encode(exponents), blake3::hash(&all))));
    }
    rules
}

#[allow(dead_code, reason = "as above")]
fn opening_bytes(words: &[u8]) -> Vec<u8> {
    let opening = ChunkTree::of(words).open(words, 5, 4).unwrap().to_raw();
    [opening.data, opening.siblings].concat()
}
