//! Offers to a miner that answers with what it should not.

use std::time::Duration;

use sundara_proto::attestation::{Attestation, Countersignature, CountersignedAttestation, Outcome, Usage};
use sundara_proto::cert::Roles;
use sundara_proto::crypto::{HotkeyPair, Signed};
use sundara_proto::id::EnvId;
use sundara_proto::job::JobSpec;
use sundara_proto::units::ByteCount;

use super::*;
use crate::net::RequestKind;
use crate::service::wall_now;
use crate::services::work::certs;
use crate::services::work::harness::{TestNode, network, offer, spec};

const INPUT: &[u8] = b"input";

struct Scene {
    validator: TestNode,
    miner: TestNode,
    requests: mpsc::Receiver<crate::net::Inbound>,
    spec: Signed<JobSpec>,
}

impl Scene {
    async fn new(number: u8) -> Self {
        let validator = TestNode::start(number, Roles::VALIDATOR).await;
        let miner = TestNode::start(number + 1, Roles::MINER).await;
        validator.join(&miner).await;
        let requests = miner.net.serve(&[RequestKind::Offer]);
        Self { validator, miner, requests, spec: spec("echo", INPUT, 1, |_| {}) }
    }

    /// Offers the job, lets the miner answer so, and returns what the machine is told.
    async fn answered(&mut self, work: Work) -> FromOffer {
        let (inputs, mut told) = mpsc::channel(4);
        let courier = Courier {
            network: network(),
            net: self.validator.net.clone(),
            blobs: self.validator.blobs.clone(),
            transfer: self.validator.transfer.clone(),
            certs: Arc::default(),
            inputs,
        };
        let part = Part { job: self.spec.id(), attempt: 0, miner: self.miner.key.hotkey() };
        let order = Order {
            part,
            node: self.miner.id(),
            request: offer(&self.spec, INPUT, &self.validator, false),
            input: None,
            requester: self.spec.requester(),
            deadline: Duration::from_secs(60),
        };
        let asked = tokio::spawn(courier.offer(order, CancellationToken::new()));
        let inbound = self.requests.recv().await.unwrap();
        let event = pb::WorkEvent { kind: Some(work) };
        inbound.reply.finish(pb::response::Kind::Work(event)).await.unwrap();
        asked.await.unwrap();
        told.recv().await.unwrap()
    }

    /// What the miner attests of the job, signed as it should be.
    fn attested(&self, output: &[u8]) -> CountersignedAttestation {
        let (now, owner) = (wall_now(), &self.miner.key);
        let value = Attestation {
            job: self.spec.id(),
            attempt: 0,
            env_id: EnvId([5; 32]),
            input: BlobId::of(INPUT),
            outcome: Outcome::Completed,
            output: BlobId::of(output),
            output_len: ByteCount(output.len() as u64),
            usage: Usage { fuel: 1, peak_memory: ByteCount(0), wall_us: 1 },
            executor_cert: certs::issue(&network(), owner, self.miner.id(), "cpu", now).to_wire(),
            started_at: now,
            finished_at: now,
        };
        let attestation = Signed::sign(&network(), &self.miner.node_key, value);
        let countersignature = countersign(owner, &attestation);
        CountersignedAttestation { attestation, countersignature }
    }
}

fn countersign(key: &HotkeyPair, over: &Signed<Attestation>) -> Signed<Countersignature> {
    let value = Countersignature { attestation: over.digest(), job: over.job, attempt: over.attempt };
    Signed::sign(&network(), key, value)
}

fn revealed(attestation: &CountersignedAttestation, output: Option<&[u8]>) -> Work {
    Work::Revealed(pb::Revealed {
        attestation: Some(attestation.to_raw()),
        salt: Bytes::new(),
        inline_output: output.map(Bytes::copy_from_slice),
    })
}

#[tokio::test]
async fn a_forged_output_and_what_is_no_answer_are_bad_replies() {
    let mut scene = Scene::new(110).await;
    let honest = scene.attested(b"right");
    let told = scene.answered(revealed(&honest, Some(b"right"))).await;
    assert!(matches!(told.input, Input::Revealed { .. }));
    assert_eq!(told.output, Some((BlobId::of(b"right"), Bytes::from_static(b"right"))));

    let mut foreign_owner = honest.clone();
    foreign_owner.countersignature = countersign(&HotkeyPair::from_seed(&[1; 32]), &honest.attestation);
    let mut raw = honest.to_raw();
    if let Some(attestation) = &mut raw.attestation {
        attestation.signature = Bytes::from_static(&[0; 64]);
    }
    let unsigned = Work::Revealed(pb::Revealed { attestation: Some(raw), salt: Bytes::new(), inline_output: None });
    let salted = |salt: &'static [u8]| {
        Work::Revealed(pb::Revealed {
            attestation: Some(honest.to_raw()),
            salt: Bytes::from_static(salt),
            inline_output: Some(Bytes::from_static(b"right")),
        })
    };
    let too_long = vec![0; limit::INLINE + 1];
    let bad = [
        ("other bytes than were attested", revealed(&honest, Some(b"wrong"))),
        ("fewer", revealed(&honest, Some(b"righ"))),
        ("more than a message takes", revealed(&scene.attested(&too_long), Some(&too_long))),
        ("no attestation", Work::Revealed(pb::Revealed::default())),
        ("no signature", unsigned),
        ("countersigned by another", revealed(&foreign_owner, Some(b"right"))),
        ("a short salt", salted(b"short")),
        ("a short commitment", Work::Committed(pb::Committed { commitment: Bytes::from_static(b"short") })),
    ];
    for (name, work) in bad {
        let told = scene.answered(work).await;
        assert!(matches!(told.input, Input::BadReply { .. }), "{name}: {:?}", told.input);
        assert!(told.output.is_none(), "{name}");
    }
}

#[tokio::test]
async fn an_output_that_cannot_be_fetched_proves_nothing_against_its_miner() {
    let mut scene = Scene::new(112).await;
    // Attested, larger than a message takes, and nowhere.
    let large = vec![1; limit::INLINE + 1];
    let told = scene.answered(revealed(&scene.attested(&large), None)).await;
    assert!(matches!(told.input, Input::Undelivered { .. }), "{:?}", told.input);
}
