//! The miner over real ports: a validator's node offers, and looks at what comes back.

mod attached;
mod declines;
mod lies;
mod offers;

use bytes::Bytes;
use sundara_proto::attestation::CountersignedAttestation;
use sundara_proto::cert::Roles;
use sundara_proto::crypto::Signed;
use sundara_proto::id::Digest;
use sundara_proto::job::JobSpec;
use sundara_proto::pb;
use sundara_proto::pb::work_event::Kind as Work;
use sundara_proto::rules::select::result_commitment;

use super::{MinerConfig, MinerHandle, MinerParts, Misbehaviour};
use crate::net::{Responses, RpcError};
use crate::service::Workers;
use crate::services::executor::ExecutorConfig;
use crate::services::work::harness::{TestNode, network, offer};
use crate::services::work::pool::Pool;
use crate::services::{EntryReceiver, entries};

/// A miner with a validator connected to it.
struct Scene {
    validator: TestNode,
    node: TestNode,
    pool: Pool,
    miner: MinerHandle,
    receipts: EntryReceiver,
}

/// Starts a miner with one executor inside.
async fn scene(number: u8, misbehaviour: Option<Misbehaviour>, change: impl FnOnce(&mut MinerConfig)) -> Scene {
    let scene = bare_scene(number, misbehaviour, change).await;
    let executor = scene.node.executor(&scene.node.key, misbehaviour);
    scene.pool.add_in_process(scene.node.id(), executor);
    scene
}

/// Starts a miner without executors.
async fn bare_scene(number: u8, misbehaviour: Option<Misbehaviour>, change: impl FnOnce(&mut MinerConfig)) -> Scene {
    let validator = TestNode::start(number, Roles::VALIDATOR).await;
    let node = TestNode::start(number + 1, Roles::MINER).await;
    let pool = node.pool();
    let (sender, receipts) = entries(&node.store).unwrap();
    let mut config = MinerConfig { free_disk_min: sundara_proto::units::ByteCount(0), ..MinerConfig::default() };
    change(&mut config);
    let miner = super::start(MinerParts {
        config,
        limits: ExecutorConfig::default().limits,
        network: network(),
        key: node.key.clone(),
        net: node.net.clone(),
        store: node.store.clone(),
        blobs: node.blobs.clone(),
        registry: node.registry.clone(),
        pool: pool.clone(),
        workers: Workers::new("miner", 2),
        entries: sender,
        data_dir: node.dir.path().to_path_buf(),
        misbehaviour,
        tasks: node.tasks.child("miner"),
    })
    .unwrap();
    validator.join(&node).await;
    Scene { validator, node, pool, miner, receipts }
}

impl Scene {
    async fn send(&self, offer: pb::Offer) -> Responses {
        self.validator.net.request(self.node.id(), pb::request::Kind::Offer(offer)).await.unwrap()
    }

    async fn offer(&self, spec: &Signed<JobSpec>, input: &[u8], commit_reveal: bool) -> Responses {
        self.send(offer(spec, input, &self.validator, commit_reveal)).await
    }

    /// An offer that must be accepted.
    async fn accepted(&self, spec: &Signed<JobSpec>, input: &[u8], commit_reveal: bool) -> Responses {
        let mut answers = self.offer(spec, input, commit_reveal).await;
        assert!(matches!(next(&mut answers).await, Work::Accepted(_)));
        answers
    }

    /// Runs an offer to its commitment.
    async fn committed(&self, spec: &Signed<JobSpec>, input: &[u8]) -> Digest {
        let mut answers = self.accepted(spec, input, true).await;
        let Work::Committed(c) = next(&mut answers).await else { panic!("no commitment") };
        Digest::try_from(c.commitment.as_ref()).unwrap()
    }

    async fn declined(&self, offer: pb::Offer) -> pb::Declined {
        let mut answers = self.send(offer).await;
        let Work::Declined(declined) = next(&mut answers).await else { panic!("not declined") };
        assert!(answers.next().await.is_none(), "a decline is the last answer");
        declined
    }

    async fn reveal(&self, spec: &Signed<JobSpec>) -> Result<pb::Revealed, RpcError> {
        reveal_as(&self.validator, &self.node, spec).await
    }

    async fn abandon(&self, spec: &Signed<JobSpec>) {
        let abandon = pb::Abandon { job: spec.id().into(), attempt: 0, reason: "test".to_owned() };
        let done = self.validator.net.request_one(self.node.id(), pb::request::Kind::Abandon(abandon)).await;
        assert!(matches!(done, Ok(pb::response::Kind::Done(_))));
    }

    /// Waits until no job is live.
    async fn idle(&self) {
        let mut live = self.miner.inner.live.subscribe();
        live.wait_for(|n| *n == 0).await.unwrap();
    }

    fn verified(&self, revealed: &pb::Revealed) -> CountersignedAttestation {
        let raw = revealed.attestation.clone().unwrap();
        let attestation = CountersignedAttestation::verify(&network(), raw).unwrap();
        assert_eq!(attestation.miner(), self.node.key.hotkey());
        attestation
    }

    /// What an honest miner would have committed to, given what was revealed.
    fn recomputed(&self, revealed: &pb::Revealed) -> Digest {
        let attestation = self.verified(revealed).attestation;
        let salt: [u8; 32] = revealed.salt.as_ref().try_into().unwrap();
        let digest = attestation.result_digest().unwrap();
        result_commitment(&attestation.job, attestation.attempt, &self.node.key.hotkey(), &digest, &salt)
    }
}

async fn reveal_as(asker: &TestNode, miner: &TestNode, spec: &Signed<JobSpec>) -> Result<pb::Revealed, RpcError> {
    let reveal = pb::Reveal { job: spec.id().into(), attempt: 0 };
    match asker.net.request_one(miner.id(), pb::request::Kind::Reveal(reveal)).await? {
        pb::response::Kind::Work(pb::WorkEvent { kind: Some(Work::Revealed(revealed)) }) => Ok(revealed),
        other => panic!("not a reveal: {other:?}"),
    }
}

async fn next(answers: &mut Responses) -> Work {
    match answers.next().await.unwrap().unwrap() {
        pb::response::Kind::Work(pb::WorkEvent { kind: Some(work) }) => work,
        other => panic!("not a work event: {other:?}"),
    }
}

async fn revealed(answers: &mut Responses) -> pb::Revealed {
    match next(answers).await {
        Work::Revealed(revealed) => revealed,
        other => panic!("not a reveal: {other:?}"),
    }
}

fn bytes(revealed: &pb::Revealed) -> Option<&Bytes> {
    revealed.inline_output.as_ref()
}
