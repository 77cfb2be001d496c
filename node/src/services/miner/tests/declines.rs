//! Offers that are not taken: every reason, on the lowest floor that gives it.

use std::time::Duration;

use sundara_proto::cert::Roles;
use sundara_proto::crypto::{HotkeyPair, Network, Signed};
use sundara_proto::id::{Hotkey, NodeId};
use sundara_proto::job::{JobSpec, Limits};
use sundara_proto::pb;
use sundara_proto::pb::declined::Reason;
use sundara_proto::units::{ByteCount, UnixMillis};

use super::super::admission::{Decline, Facts, PublisherAllowed, decide};
use super::super::{MinerConfig, OfferState};
use super::scene;
use crate::net::PeerIdentity;
use crate::service::wall_now;
use crate::services::work::harness::{TestNode, network, offer, spec};

/// Facts of an offer that is taken, after `change`.
fn decided(
    config: &MinerConfig,
    job: &JobSpec,
    change: impl FnOnce(&mut pb::Offer, &mut Facts<'_>),
) -> Result<(), Decline> {
    let validator = Hotkey([5; 32]);
    let limits = Limits::default();
    let mut offered = pb::Offer { validator: validator.into(), deadline_ms: 1_000, ..pb::Offer::default() };
    let blank = pb::Offer::default();
    let mut facts = Facts {
        now: wall_now(),
        network: network(),
        peer: PeerIdentity { node: NodeId([6; 32]), hotkey: validator, roles: Roles::VALIDATOR },
        offer: &blank,
        spec: job,
        limits: &limits,
        known_attempt: None,
        shutting_down: false,
        disk_low: false,
        reveals_full: false,
        publisher_allowed: PublisherAllowed::Yes,
    };
    change(&mut offered, &mut facts);
    decide(config, &Facts { offer: &offered, ..facts })
}

fn job(change: impl FnOnce(&mut JobSpec)) -> Signed<JobSpec> {
    spec("echo", b"", 1, change)
}

fn reason(result: Result<(), Decline>, setting: &str) -> Reason {
    let decline = result.unwrap_err();
    assert!(decline.detail.contains(setting), "`{}` does not name {setting}", decline.detail);
    decline.reason
}

#[test]
fn every_rule_has_its_reason_and_names_its_setting() {
    let base = MinerConfig::default();
    let plain = job(|_| {});
    assert_eq!(decided(&base, &plain, |_, _| {}), Ok(()));
    let of = |change: fn(&mut pb::Offer, &mut Facts<'_>), setting| reason(decided(&base, &plain, change), setting);
    assert_eq!(of(|_, f| f.peer.roles = Roles::LIGHT, "certificate"), Reason::NotAdmitted);
    assert_eq!(of(|o, _| o.validator = Hotkey([1; 32]).into(), "another validator"), Reason::Malformed);
    assert_eq!(of(|_, f| f.network = Network::named("other", 3), "another mesh"), Reason::Malformed);
    assert_eq!(of(|o, _| o.inline_input = Some(vec![0; 7].into()), "inline input"), Reason::Malformed);
    assert_eq!(of(|_, f| f.shutting_down = true, "stops"), Reason::ShuttingDown);
    assert_eq!(of(|_, f| f.known_attempt = Some(0), "before"), Reason::Duplicate);
    assert_eq!(of(|o, _| o.deadline_ms = 0, "no time"), Reason::Expired);
    assert_eq!(of(|_, f| f.disk_low = true, "miner.free_disk_min"), Reason::DiskFull);
    assert_eq!(of(|_, f| f.publisher_allowed = PublisherAllowed::No, "miner.publishers"), Reason::PublisherNotAllowed);
    let unknown = of(|_, f| f.publisher_allowed = PublisherAllowed::Unknown, "miner.publishers");
    assert_eq!(unknown, Reason::PublisherNotAllowed);
    let full = |o: &mut pb::Offer, f: &mut Facts<'_>| (o.commit_reveal, f.reveals_full) = (true, true);
    assert_eq!(reason(decided(&base, &plain, full), "reveal"), Reason::Busy);
    assert_eq!(decided(&base, &plain, |_, f| f.reveals_full = true), Ok(()), "without a commitment nothing is held");
    assert_eq!(decided(&base, &plain, |o, f| (o.attempt, f.known_attempt) = (2, Some(1))), Ok(()), "a later attempt");
}

#[test]
fn jobs_are_declined_for_what_they_ask() {
    let base = MinerConfig::default();
    let of = |job: Signed<JobSpec>, setting| reason(decided(&base, &job, |_, _| {}), setting);
    assert_eq!(of(job(|s| s.limits.fuel *= 2), "executor.limits.fuel"), Reason::LimitsTooHigh);
    assert_eq!(of(job(|s| s.limits.memory = ByteCount::gib(3)), "executor.limits.memory"), Reason::LimitsTooHigh);
    assert_eq!(of(job(|s| s.limits.output = ByteCount::mib(17)), "executor.limits.output"), Reason::LimitsTooHigh);
    let long = job(|s| s.limits.wall_ms = Duration::from_secs(3600).as_millis() as u64);
    assert_eq!(decided(&base, &long, |_, _| {}), Ok(()), "wall time is no part of a result");
    let past = job(|s| s.not_after = UnixMillis(wall_now().0 - 3_000));
    assert_eq!(of(past, "clocks"), Reason::Expired);
    let skewed = job(|s| s.not_after = UnixMillis(wall_now().0 - 500));
    assert_eq!(decided(&base, &skewed, |_, _| {}), Ok(()), "clocks may differ by 2 s");
}

#[test]
fn the_operator_decides_whom_to_work_for_and_on_what() {
    let plain = job(|_| {});
    let others = MinerConfig { validators: vec![Hotkey([8; 32])], ..MinerConfig::default() };
    assert_eq!(reason(decided(&others, &plain, |_, _| {}), "miner.validators"), Reason::NotAdmitted);
    let known = MinerConfig { validators: vec![Hotkey([5; 32])], ..MinerConfig::default() };
    assert_eq!(decided(&known, &plain, |_, _| {}), Ok(()));
    let denied = MinerConfig { deny_validators: vec![Hotkey([5; 32])], ..known };
    assert_eq!(reason(decided(&denied, &plain, |_, _| {}), "miner.deny_validators"), Reason::NotAdmitted);
    let models_only = MinerConfig { builtin_jobs: false, ..MinerConfig::default() };
    assert_eq!(reason(decided(&models_only, &plain, |_, _| {}), "miner.builtin_jobs"), Reason::Unsupported);
    let small = MinerConfig { input_max: ByteCount(10), ..MinerConfig::default() };
    let big = spec("echo", &[0; 11], 1, |_| {});
    assert_eq!(reason(decided(&small, &big, |_, _| {}), "miner.input_max"), Reason::LimitsTooHigh);
}

#[tokio::test]
async fn executors_that_are_missing_wrong_or_full_are_reasons() {
    let scene = super::bare_scene(30, None, |_| {}).await;
    let of = async |spec: Signed<JobSpec>| scene.declined(offer(&spec, b"", &scene.validator, true)).await.reason();
    assert_eq!(of(job(|_| {})).await, Reason::NoExecutor);
    let executor = scene.node.executor(&scene.node.key, None);
    let room = executor.slots * (1 + crate::services::work::pool::PoolConfig::default().queue_per_slot);
    scene.pool.add_in_process(scene.node.id(), executor);
    assert_eq!(of(job(|s| s.hardware_class = "gpu".to_owned())).await, Reason::WrongClass);
    let mut running = Vec::new();
    for nonce in 0..u8::try_from(room).unwrap() {
        running.push(scene.accepted(&spec("sleep", b"", nonce, |_| {}), b"", true).await);
    }
    assert_eq!(of(spec("echo", b"", 200, |_| {})).await, Reason::Busy);
    drop(running);
    scene.idle().await;
    scene.accepted(&spec("echo", b"", 201, |_| {}), b"", true).await;
}

#[tokio::test]
async fn the_wire_gives_reasons_too() {
    let scene = scene(32, None, |_| {}).await;
    let mut forged = offer(&job(|_| {}), b"", &scene.validator, true);
    if let Some(spec) = &mut forged.spec {
        spec.signature = vec![1; 64].into();
    }
    assert_eq!(scene.declined(forged).await.reason(), Reason::Malformed);
    let empty = pb::Offer { spec: None, ..offer(&job(|_| {}), b"", &scene.validator, true) };
    assert_eq!(scene.declined(empty).await.reason(), Reason::Malformed);
    scene.idle().await;

    let twice = spec("sleep", b"", 9, |_| {});
    let _running = scene.accepted(&twice, b"", true).await;
    let again = scene.declined(offer(&twice, b"", &scene.validator, true)).await;
    assert_eq!(again.reason(), Reason::Duplicate);
    let log = scene.miner.log(10).unwrap();
    assert!(log.iter().any(|e| e.state == OfferState::Declined && e.detail.contains("duplicate")), "{log:?}");

    // A light node is no validator, whatever it says.
    let light = TestNode::start(34, Roles::LIGHT).await;
    light.join(&scene.node).await;
    let offered = offer(&job(|_| {}), b"", &light, true);
    let answer = light.net.request_one(scene.node.id(), pb::request::Kind::Offer(offered)).await.unwrap();
    let pb::response::Kind::Work(pb::WorkEvent { kind: Some(pb::work_event::Kind::Declined(d)) }) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(d.reason(), Reason::NotAdmitted);
}

#[tokio::test]
async fn a_publisher_is_found_out_before_its_model_is_run() {
    let publisher = HotkeyPair::from_seed(&[60; 32]).hotkey();
    let scene = scene(35, None, |c| c.publishers = vec![publisher]).await;
    assert_eq!(
        scene.miner.inner.publishers.allows(&job(|_| {}), scene.validator.id()),
        PublisherAllowed::Yes,
        "builtin jobs have no publisher"
    );
    let model = spec("echo", b"", 1, |s| {
        s.program = sundara_proto::job::Program::Model {
            model: sundara_proto::id::ModelId([3; 32]),
            manifest: sundara_proto::id::BlobId([4; 32]),
            entry: String::new(),
        };
    });
    let declined = scene.declined(offer(&model, b"", &scene.validator, true)).await;
    assert_eq!(declined.reason(), Reason::PublisherNotAllowed);
}
