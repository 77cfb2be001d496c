//! Messages that rest on the channel and are not signed: one of every kind, as encoded.

use bytes::Bytes;
use prost::Message;
use sundara_proto::blob::{BlobHeader, BlobRequest, GroupRanges};
use sundara_proto::id::BlobId;
use sundara_proto::pb::{self, frame, gossip, job_event, request, response, work_event};
use sundara_proto::units::ByteCount;
use sundara_proto::wire::WireMessage as _;

use super::rounds;
use super::values::{self, countersigned, raw_signed};

fn bytes(n: u8) -> Bytes {
    Bytes::copy_from_slice(&[n; 32])
}

fn job_request() -> pb::JobRequest {
    pb::JobRequest { spec: Some(raw_signed()), inline_input: Some(Bytes::from_static(b"input")), announce: true }
}

fn page() -> pb::Page {
    use pb::entry::Kind;
    let kinds = [
        Kind::Attestation(countersigned()),
        Kind::Verdict(raw_signed()),
        Kind::Receipt(sundara_proto::wire::WireMessage::to_raw(&values::receipt())),
    ];
    pb::Page { entries: kinds.into_iter().map(|kind| pb::Entry { kind: Some(kind) }).collect() }
}

fn requests() -> Vec<(&'static str, request::Kind)> {
    use request::Kind;
    let offer = pb::Offer {
        spec: Some(raw_signed()),
        attempt: 1,
        commit_reveal: true,
        stream: true,
        inline_input: Some(Bytes::from_static(b"in")),
        deadline_ms: 2,
        validator: bytes(3),
    };
    let class = sundara_proto::wire::WireMessage::to_raw(&values::executor_class());
    vec![
        ("submit", Kind::Submit(job_request())),
        ("watch", Kind::Watch(pb::WatchJob { job: bytes(1) })),
        ("cancel", Kind::Cancel(pb::CancelJob { job: bytes(1) })),
        ("offer", Kind::Offer(offer)),
        ("reveal", Kind::Reveal(pb::Reveal { job: bytes(1), attempt: 2 })),
        ("abandon", Kind::Abandon(pb::Abandon { job: bytes(1), attempt: 2, reason: "over".to_owned() })),
        ("attach", Kind::Attach(pb::Attach { token: bytes(1), class: Some(class) })),
        ("page", Kind::Page(pb::PageRequest { root: bytes(1) })),
        ("join-group", Kind::JoinGroup(rounds::join().to_raw())),
        ("round-ready", Kind::RoundReady(rounds::ready().to_raw())),
        ("round-report", Kind::RoundReport(rounds::reports().remove(0).1.to_raw())),
        ("transcript", Kind::Transcript(rounds::transcript_request().to_raw())),
        ("opening", Kind::Opening(rounds::opening_request().to_raw())),
    ]
}

fn responses() -> Vec<(&'static str, response::Kind)> {
    use response::Kind;
    let job = |kind| Kind::Job(pb::JobEvent { kind: Some(kind) });
    let work = |kind| Kind::Work(pb::WorkEvent { kind: Some(kind) });
    let output = || pb::Output { attempt: 1, offset: 2, data: Bytes::from_static(b"out") };
    let finished = pb::Finished {
        verdict: Some(raw_signed()),
        attestations: vec![countersigned()],
        inline_output: Some(Bytes::from_static(b"out")),
    };
    let revealed = pb::Revealed {
        attestation: Some(countersigned()),
        salt: bytes(1),
        inline_output: Some(Bytes::from_static(b"out")),
    };
    let result =
        pb::ExecutorResult { attestation: Some(raw_signed()), inline_output: Some(Bytes::from_static(b"out")) };
    let declined = pb::Declined { reason: pb::declined::Reason::DiskFull.into(), detail: "full".to_owned() };
    vec![
        ("job.acknowledged", job(job_event::Kind::Acknowledged(pb::Acknowledged { rank: 1 }))),
        ("job.started", job(job_event::Kind::Started(pb::Started { attempt: 1 }))),
        ("job.output", job(job_event::Kind::Output(output()))),
        ("job.finished", job(job_event::Kind::Finished(finished))),
        ("job.refused", job(job_event::Kind::Refused(pb::Refused { reason: "no".to_owned(), retryable: true }))),
        ("work.accepted", work(work_event::Kind::Accepted(pb::Accepted {}))),
        ("work.declined", work(work_event::Kind::Declined(declined))),
        ("work.output", work(work_event::Kind::Output(output()))),
        ("work.committed", work(work_event::Kind::Committed(pb::Committed { commitment: bytes(1) }))),
        ("work.revealed", work(work_event::Kind::Revealed(revealed))),
        ("work.executor-result", work(work_event::Kind::ExecutorResult(result))),
        (
            "work.fault",
            work(work_event::Kind::Fault(pb::ExecutorFault { reason: "broke".to_owned(), retryable: true })),
        ),
        ("attached", Kind::Attached(pb::Attached { executor_cert: Some(raw_signed()) })),
        ("page", Kind::Page(page())),
        ("done", Kind::Done(pb::Done {})),
        ("joined", Kind::Joined(pb::Joined { roster: Some(raw_signed()), next: 0, states: Vec::new() })),
        ("round", Kind::Round(rounds::events().remove(0).1.to_raw())),
        ("transcript", Kind::Transcript(rounds::transcript().to_raw())),
        ("opening", Kind::Opening(round_opening())),
    ]
}

fn round_opening() -> pb::RoundOpening {
    let opening = Some(rounds::opening().to_raw());
    pb::RoundOpening { attempt: 1, chunk: 2, group: 3, rank: Some(0), opening }
}

fn gossip() -> Vec<(&'static str, gossip::Kind)> {
    use gossip::Kind;
    vec![
        ("job", Kind::Job(job_request())),
        ("advert", Kind::Advert(raw_signed())),
        ("batch", Kind::Batch(raw_signed())),
        ("audit-epoch", Kind::AuditEpoch(raw_signed())),
        ("fraud-proof", Kind::FraudProof(raw_signed())),
        ("round-proof", Kind::RoundProof(raw_signed())),
    ]
}

/// Name and encoding of every unsigned message.
pub(crate) fn all() -> Vec<(String, Vec<u8>)> {
    let frame = |body| pb::Frame { id: 7, body: Some(body), last: true }.encode_to_vec();
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    for (name, kind) in requests() {
        all.push((format!("request.{name}"), frame(frame::Body::Request(pb::Request { kind: Some(kind) }))));
    }
    for (name, kind) in responses() {
        all.push((format!("response.{name}"), frame(frame::Body::Response(pb::Response { kind: Some(kind) }))));
    }
    let failure = pb::RpcFailure { code: pb::rpc_failure::Code::Busy.into(), detail: "later".to_owned() };
    all.push(("frame.failure".to_owned(), frame(frame::Body::Failure(failure))));
    all.push(("frame.cancel".to_owned(), frame(frame::Body::Cancel(true))));
    all.push(("frame.credit".to_owned(), frame(frame::Body::Credit(9))));
    for (name, kind) in gossip() {
        all.push((format!("gossip.{name}"), pb::Gossip { kind: Some(kind) }.encode_to_vec()));
    }
    let hello = pb::Hello {
        certificate: Some(raw_signed()),
        version_min: 1,
        version_max: 2,
        agent: "sundara-node/0.1.0".to_owned(),
        now_ms: 3,
        refusal: "no".to_owned(),
        instance: Bytes::from_static(&[4; 16]),
    };
    all.push(("hello".to_owned(), hello.encode_to_vec()));
    let mut groups = GroupRanges::of(1..3);
    groups.insert(5..6);
    all.push(("blob.request".to_owned(), BlobRequest { blob: BlobId([1; 32]), groups: groups.clone() }.encode()));
    all.push(("blob.found".to_owned(), BlobHeader::Found { len: ByteCount(100_000), groups }.encode()));
    all.push(("blob.not-found".to_owned(), BlobHeader::NotFound.encode()));
    all.push(("blob.busy".to_owned(), BlobHeader::Busy.encode()));
    let proof = pb::Proof {
        genesis: bytes(1),
        netuid: 2,
        spec: Some(raw_signed()),
        verdict: Some(raw_signed()),
        attestations: vec![countersigned()],
    };
    all.push(("proof".to_owned(), proof.encode_to_vec()));
    all
}
