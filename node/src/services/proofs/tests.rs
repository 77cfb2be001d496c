//! Proofs on the in-process network: what is kept, of whom, and who is dropped for it.

use std::sync::Arc;
use std::time::Duration;

use sundara_proto::attestation::{
    Attestation, Countersignature, CountersignedAttestation, ExecutorCert, Outcome, Usage,
};
use sundara_proto::cert::Roles;
use sundara_proto::crypto::{HotkeyPair, NodeKeyPair};
use sundara_proto::id::{BlobId, EnvId};
use sundara_proto::job::JobSpec;
use sundara_proto::pb;
use sundara_proto::units::{ByteCount, UnixMillis};

use super::*;
use crate::services::work::harness::{TestNode, network, spec};
use crate::store::MemoryStore;

const INPUT: &[u8] = b"input";

fn attested(owner: &HotkeyPair, spec: &Signed<JobSpec>, output: &[u8]) -> Signed<Attestation> {
    let executor = NodeKeyPair::from_seed(&[200; 32]);
    let now = wall_now();
    let cert = ExecutorCert {
        network: network(),
        executor: executor.node_id(),
        hardware_class: "cpu".to_owned(),
        issued_at: now,
        expires_at: now.plus(Duration::from_secs(3_600)),
    };
    let value = Attestation {
        job: spec.id(),
        attempt: 0,
        env_id: EnvId([5; 32]),
        input: BlobId::of(INPUT),
        outcome: Outcome::Completed,
        output: BlobId::of(output),
        output_len: ByteCount(output.len() as u64),
        usage: Usage { fuel: 1, peak_memory: ByteCount(0), wall_us: 1 },
        executor_cert: Signed::sign(&network(), owner, cert).to_wire(),
        started_at: now,
        finished_at: now,
    };
    Signed::sign(&network(), &executor, value)
}

/// The same job whenever it is asked for.
fn job(nonce: u8) -> Signed<JobSpec> {
    spec("echo", INPUT, nonce, |spec| spec.not_after = UnixMillis(2_000_000_000_000))
}

/// `accuser` says that `accused` gave a wrong result; `finder` owns the executor that found the right one.
fn proof_by(accuser: &HotkeyPair, finder: &HotkeyPair, accused: &HotkeyPair, nonce: u8) -> Signed<FraudProof> {
    let spec = job(nonce);
    let wrong = attested(accused, &spec, b"wrong");
    let over = Countersignature { attestation: wrong.digest(), job: spec.id(), attempt: 0 };
    let accused =
        CountersignedAttestation { attestation: wrong, countersignature: Signed::sign(&network(), accused, over) };
    let proof = FraudProof {
        network: network(),
        spec: spec.to_wire(),
        accused: accused.to_raw(),
        reference: attested(finder, &spec, b"right").to_wire(),
    };
    Signed::sign(&network(), accuser, proof)
}

fn proof(accuser: &HotkeyPair, accused: &HotkeyPair, nonce: u8) -> Signed<FraudProof> {
    proof_by(accuser, accuser, accused, nonce)
}

fn key(n: u8) -> HotkeyPair {
    HotkeyPair::from_seed(&[n; 32])
}

fn keeper(config: EvidenceConfig, trusted: &HotkeyPair) -> (Keeper, mpsc::Receiver<Convicted>) {
    let (tx, rx) = mpsc::channel(8);
    let keeper = Keeper {
        config,
        store: Arc::new(MemoryStore::new()),
        trusted: vec![trusted.hotkey()],
        convicted: Some(tx),
        own: key(99).hotkey(),
        known: HashSet::new(),
        strangers: HashMap::new(),
    };
    (keeper, rx)
}

#[test]
fn a_proof_holds_only_with_the_accusers_own_executor_against_it() {
    let (accuser, accused) = (key(1), key(2));
    assert_eq!(proof(&accuser, &accused, 1).check(), Some(accused.hotkey()));
    assert_eq!(proof_by(&accuser, &key(3), &accused, 1).check(), None, "another's executor said it");
    let (miner, of, attempt) = proof(&accuser, &accused, 1).about().unwrap();
    assert_eq!((miner, of, attempt), (accused.hotkey(), job(1).id(), 0));
}

#[tokio::test]
async fn proofs_are_kept_once_and_only_those_of_trusted_validators_count() {
    let (trusted, stranger, liar) = (key(1), key(2), key(3));
    let (mut keeper, mut convicted) = keeper(EvidenceConfig::default(), &trusted);
    for _ in 0..3 {
        keeper.on_proof(&proof(&trusted, &liar, 1)).await.unwrap();
        keeper.on_proof(&proof(&stranger, &liar, 2)).await.unwrap();
    }
    let kept = casebook::list(keeper.store.as_ref(), 10).unwrap();
    assert_eq!(kept.len(), 2);
    assert!(kept.iter().all(|case| case.accused == liar.hotkey() && case.proven));
    assert!(kept.iter().all(|case| case.believed == (case.accuser == trusted.hotkey())));
    let told = convicted.try_recv().unwrap();
    assert_eq!((told.miner, told.accuser), (liar.hotkey(), trusted.hotkey()));
    assert!(convicted.try_recv().is_err(), "told once, and nothing of the stranger's");
    // After a restart the same proof is known.
    keeper.known.clear();
    keeper.look().unwrap();
    keeper.on_proof(&proof(&trusted, &liar, 1)).await.unwrap();
    assert!(convicted.try_recv().is_err());
}

#[tokio::test]
async fn strangers_fill_nothing_and_make_room_for_those_who_count() {
    let (trusted, liar) = (key(1), key(3));
    let config = EvidenceConfig { kept_max: 10, per_stranger_max: 4, ..EvidenceConfig::default() };
    let (mut keeper, mut convicted) = keeper(config, &trusted);
    for accuser in 10..20 {
        for nonce in 0..8 {
            keeper.on_proof(&proof(&key(accuser), &liar, nonce)).await.unwrap();
        }
    }
    let of = |keeper: &Keeper, who: u8| {
        let kept = casebook::list(keeper.store.as_ref(), 100).unwrap();
        kept.iter().filter(|case| case.accuser == key(who).hotkey()).count()
    };
    assert_eq!((of(&keeper, 10), of(&keeper, 11), of(&keeper, 12), of(&keeper, 13)), (4, 4, 2, 0));
    for nonce in 0..3 {
        keeper.on_proof(&proof(&trusted, &liar, nonce)).await.unwrap();
        assert!(convicted.try_recv().is_ok());
    }
    keeper.sweep().await.unwrap();
    assert_eq!(of(&keeper, 1), 3);
    assert_eq!(keeper.known.len(), 10);
}

#[tokio::test]
async fn a_proof_on_gossip_reaches_the_casebook_and_scheduling() {
    let accuser = TestNode::start(60, Roles::VALIDATOR).await;
    let listener = TestNode::start(61, Roles::VALIDATOR).await;
    let (tx, mut convicted) = mpsc::channel(4);
    start(ProofsParts {
        config: EvidenceConfig::default(),
        net: listener.net.clone(),
        store: listener.store.clone(),
        trusted: vec![accuser.key.hotkey()],
        convicted: Some(tx),
        tasks: listener.tasks.child("proofs"),
    })
    .await
    .unwrap();
    listener.join(&accuser).await;
    let liar = key(3);
    let gossip =
        |nonce| pb::Gossip { kind: Some(pb::gossip::Kind::FraudProof(proof(&accuser.key, &liar, nonce).to_wire())) };
    // The listener's subscription takes a moment to arrive; until then nobody listens.
    let mut nonce = 0;
    let told = loop {
        let published = accuser.net.publish(Topic::Proofs, gossip(nonce)).await;
        nonce += 1;
        if published.is_ok() {
            break convicted.recv().await.unwrap();
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(told.miner, liar.hotkey());
    assert_eq!(casebook::list(listener.store.as_ref(), 10).unwrap().len(), 1);
}
