//! What is on the wire stays as it is.
//!
//! `golden/vectors.txt` holds one line for every message kind, signature, digest context, name and rule. A test that
//! fails here means that a shipped protocol would change: that needs a new protocol version, not a new vector. Lines for
//! new kinds are added by `cargo test -p sundara-proto --test golden -- --ignored add_missing`; it never changes one.
//!
//! sr25519 signatures are randomised: the stored one must verify. ed25519 ones are not: they must come out again.
#![allow(clippy::unwrap_used)]

#[path = "golden/frames.rs"]
mod frames;
#[path = "golden/rounds.rs"]
mod rounds;
#[path = "golden/values.rs"]
mod values;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use bytes::Bytes;
use prost::Message as _;
use sundara_proto::cert::Certificate;
use sundara_proto::crypto::{Context, HotkeyPair, Payload, Scheme, Signed, SignedError};
use sundara_proto::id::{BlobId, Digest, Hotkey, JobId};
use sundara_proto::model::{Determinism, ModelManifest};
use sundara_proto::names::{self, Topic};
use sundara_proto::pb;
use sundara_proto::rules::{env, merkle, select};
use sundara_proto::wire::{WireError, WireMessage};

use values::network;

fn hotkey() -> HotkeyPair {
    HotkeyPair::from_seed(&[1; 32])
}

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/vectors.txt")
}

/// The frozen lines, `name value` each.
fn frozen() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path()).unwrap_or_default();
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split_once(' ').expect("name and value")).map(|(n, v)| (n.to_owned(), v.to_owned())).collect()
}

/// Everything that comes out the same each time.
fn fixed() -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut put = |name: String, value: String| assert!(all.insert(name.clone(), value).is_none(), "{name} twice");
    for (name, context) in contexts() {
        put(format!("context.{name}"), context.digest(&[b"golden", b"", b"vector"]).to_string());
        put(format!("context-one.{name}"), context.digest_one(b"golden").to_string());
    }
    for (name, value) in names_on_the_wire() {
        put(format!("name.{name}"), value);
    }
    for (name, value) in rules().into_iter().chain(rounds::rules()) {
        put(format!("rule.{name}"), value);
    }
    for (name, encoded) in frames::all().into_iter().chain(payloads()).chain(rounds::all()) {
        put(format!("wire.{name}"), hex::encode(encoded));
    }
    all
}

fn contexts() -> Vec<(&'static str, Context)> {
    vec![
        ("job", Context::JOB),
        ("model", Context::MODEL),
        ("attestation", Context::ATTESTATION),
        ("result", Context::RESULT),
        ("result-commit", Context::RESULT_COMMIT),
        ("env", Context::ENV),
        ("engine", Context::ENGINE),
        ("batch-leaf", Context::BATCH_LEAF),
        ("batch-node", Context::BATCH_NODE),
        ("batch", Context::BATCH),
        ("owner", Context::OWNER),
        ("audit-commit", Context::AUDIT_COMMIT),
        ("audit-draw", Context::AUDIT_DRAW),
        ("stream-draw", Context::STREAM_DRAW),
        ("dht-model", Context::DHT_MODEL),
        ("dht-blob", Context::DHT_BLOB),
        ("genesis", Context::GENESIS),
        ("job-seed", Context::JOB_SEED),
        ("invite", Context::INVITE),
        ("group", Context::GROUP),
        ("group-token", Context::GROUP_TOKEN),
        ("round", Context::ROUND),
        ("round-lens", Context::ROUND_LENS),
        ("round-sums", Context::ROUND_SUMS),
        ("round-rho", Context::ROUND_RHO),
        ("chunk-commit", Context::CHUNK_COMMIT),
        ("sum-commit", Context::SUM_COMMIT),
        ("nonce-set", Context::NONCE_SET),
        ("nonce", Context::NONCE),
        ("scales", Context::SCALES),
        ("out-tags", Context::OUT_TAGS),
    ]
}

fn names_on_the_wire() -> Vec<(String, String)> {
    let net = network();
    let mut all = vec![
        ("tag".to_owned(), net.tag()),
        ("cert".to_owned(), names::cert_protocol(&net)),
        ("rpc".to_owned(), names::rpc_protocol(&net, 1)),
        ("blob".to_owned(), names::blob_protocol(&net, 1)),
        ("round".to_owned(), names::round_protocol(&net, 1)),
        ("kad".to_owned(), names::kad_protocol(&net)),
        ("identify".to_owned(), names::identify_protocol(&net)),
        ("dht-model".to_owned(), names::model_record_key(&net, &Hotkey([1; 32]), "digits").to_string()),
        ("dht-blob".to_owned(), names::blob_provider_key(&net, &BlobId([1; 32])).to_string()),
        ("hotkey".to_owned(), hotkey().hotkey().to_string()),
        ("node".to_owned(), values::node().node_id().to_string()),
    ];
    all.extend(Topic::ALL.iter().map(|topic| (format!("topic.{topic:?}").to_lowercase(), topic.name(&net))));
    all
}

fn rules() -> Vec<(&'static str, String)> {
    let (job, miner, digest) = (JobId([1; 32]), Hotkey([2; 32]), Digest([3; 32]));
    let validators: Vec<(Hotkey, u64)> = (0..6_u8).map(|n| (Hotkey([n; 32]), u64::from(n) * 100)).collect();
    let order: Vec<String> = select::owner_order(&job, &validators).iter().map(|h| h.0[0].to_string()).collect();
    let draws: String =
        (0..64_u8).map(|n| if select::is_audited(&[n; 32], &job, &miner, &digest, 0.25) { '1' } else { '0' }).collect();
    let streams: Vec<String> = (0..8).map(|n| select::streaming_replica(&job, n, 3).to_string()).collect();
    let entries: [&[u8]; 5] = [b"a", b"b", b"", b"d", b"e"];
    let engine = env::engine_id("flags", "1.2.3");
    let manifest = values::manifest(Determinism::Exact);
    let model = ModelManifest::id_of(&manifest.encode());
    let spec = Context::JOB.digest_one(&values::job_spec().encode());
    vec![
        ("job-id", spec.to_string()),
        ("model-id", model.to_string()),
        ("blob-id", BlobId::of(b"golden").to_string()),
        ("engine-id", engine.to_string()),
        ("env-id.model", env::Environment::of_model(model, &manifest).env_id(&engine).to_string()),
        ("env-id.builtin", env::Environment::of_builtin("echo").env_id(&engine).to_string()),
        ("result", values::attestation().result_digest().unwrap().to_string()),
        ("result-commitment", select::result_commitment(&job, 4, &miner, &digest, &[5; 32]).to_string()),
        ("audit-commitment", select::audit_commitment(6, &[7; 32]).to_string()),
        ("audit-draws", draws),
        ("owner-order", order.join(",")),
        ("streaming-replica", streams.join(",")),
        ("merkle-root", merkle::root(entries).unwrap().to_string()),
    ]
}

/// Encodings of signed payloads, and of parsed messages that are parts of others.
fn payloads() -> Vec<(String, Vec<u8>)> {
    let mut all = vec![
        ("payload.job-spec".to_owned(), values::job_spec().encode()),
        ("payload.job-spec.builtin".to_owned(), values::builtin_spec().encode()),
        ("payload.executor-cert".to_owned(), values::executor_cert().encode()),
        ("payload.attestation".to_owned(), values::attestation().encode()),
        ("payload.countersignature".to_owned(), values::countersignature().encode()),
        ("payload.certificate".to_owned(), values::certificate().encode()),
        ("payload.advert".to_owned(), values::advert().encode()),
        ("payload.model-record".to_owned(), values::model_record().encode()),
        ("payload.batch".to_owned(), values::batch().encode()),
        ("payload.audit-epoch".to_owned(), values::audit_epoch().encode()),
        ("payload.fraud-proof".to_owned(), values::fraud_proof().encode()),
        ("manifest.exact".to_owned(), values::manifest(Determinism::Exact).encode()),
        ("manifest.tolerance".to_owned(), values::manifest(values::tolerance()).encode()),
        ("receipt".to_owned(), values::receipt().encode()),
    ];
    for (name, kind) in values::verdict_kinds() {
        all.push((format!("payload.verdict.{name}"), values::verdict(kind).encode()));
    }
    all
}

/// One signed message kind: its frozen form must verify and say what it said.
fn check_signed<T: Payload + PartialEq + std::fmt::Debug>(frozen: &BTreeMap<String, String>, value: T) {
    let name = format!("signed.{}", T::CONTEXT);
    let stored = hex::decode(frozen.get(&name).unwrap_or_else(|| panic!("{name} is not frozen"))).unwrap();
    let raw = pb::Signed::decode(&stored[..]).unwrap();
    let verified = Signed::<T>::verify(&network(), raw.clone()).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(*verified.value(), value, "{name}");
    assert_eq!(*verified.payload(), value.encode(), "{name}");
    if T::SCHEME == Scheme::Ed25519 {
        assert_eq!(raw, sign(value).to_wire(), "{name}");
    }
    // Another network, and any flipped bit of payload, signer or signature, is refused.
    let other = sundara_proto::crypto::Network::named("golden", 8);
    assert_eq!(Signed::<T>::verify(&other, raw.clone()).err(), Some(SignedError::BadSignature), "{name}");
    for place in [0, 40, 63] {
        let mut bad = raw.clone();
        let mut signature = bad.signature.to_vec();
        signature[place] ^= 1;
        bad.signature = Bytes::from(signature);
        assert!(Signed::<T>::verify(&network(), bad).is_err(), "{name}");
    }
}

fn sign<T: Payload>(value: T) -> Signed<T> {
    match T::SCHEME {
        Scheme::Sr25519 => Signed::sign(&network(), &hotkey(), value),
        Scheme::Ed25519 => Signed::sign(&network(), &values::node(), value),
    }
}

/// Calls the macro `$with` on a value of every signed kind.
macro_rules! every_signed {
    ($with:ident) => {
        $with!(values::job_spec());
        $with!(values::executor_cert());
        $with!(values::attestation());
        $with!(values::countersignature());
        $with!(values::certificate());
        $with!(values::advert());
        $with!(values::model_record());
        $with!(values::batch());
        $with!(values::audit_epoch());
        $with!(values::fraud_proof());
        $with!(values::verdict(sundara_proto::verdict::VerdictKind::Quorum(2)));
        $with!(rounds::roster());
        $with!(rounds::invitation(sundara_proto::round::Invitee::Hotkey(Hotkey([70; 32]))));
        $with!(rounds::state_digest());
        $with!(rounds::open());
        $with!(rounds::amend());
        $with!(rounds::close());
        $with!(rounds::commit());
        $with!(rounds::receipt());
        $with!(rounds::sum());
        $with!(rounds::nonces());
        $with!(rounds::tags());
        $with!(rounds::proof(rounds::equivocation(sundara_proto::round::EquivocationKind::Sum)));
    };
}

#[test]
fn the_wire_is_as_it_was() {
    let frozen = frozen();
    for (name, value) in fixed() {
        assert_eq!(frozen.get(&name), Some(&value), "{name}");
    }
}

#[test]
fn signatures_of_old_still_verify() {
    let frozen = frozen();
    macro_rules! check {
        ($value:expr) => {
            check_signed(&frozen, $value)
        };
    }
    every_signed!(check);
}

/// Encoded as a certificate is, and signed as something else.
#[derive(Clone, Debug, PartialEq)]
struct Twin(Certificate);

impl WireMessage for Twin {
    type Raw = pb::Certificate;
    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Certificate::from_raw(raw).map(Self)
    }
    fn to_raw(&self) -> Self::Raw {
        self.0.to_raw()
    }
}

impl Payload for Twin {
    const CONTEXT: &'static str = "twin";
    const SCHEME: Scheme = Scheme::Sr25519;
}

#[test]
fn a_signature_of_one_kind_is_none_of_another() {
    // The same key over the same bytes: the context alone keeps them apart.
    let cert = sign(values::certificate()).to_wire();
    assert!(Signed::<Certificate>::verify(&network(), cert.clone()).is_ok());
    assert_eq!(Signed::<Twin>::verify(&network(), cert).err(), Some(SignedError::BadSignature));
    let mut seen = std::collections::BTreeSet::new();
    macro_rules! context {
        ($value:expr) => {{
            fn of<T: Payload>(_: &T) -> &'static str {
                T::CONTEXT
            }
            assert!(seen.insert(of(&$value)), "two kinds share a context")
        }};
    }
    every_signed!(context);
}

#[test]
fn nothing_frozen_is_left_out_of_the_test() {
    let fixed = fixed();
    let unknown: Vec<String> =
        frozen().into_keys().filter(|name| !fixed.contains_key(name) && !name.starts_with("signed.")).collect();
    assert_eq!(unknown, Vec::<String>::new());
}

/// Writes lines for kinds that have none yet.
#[test]
#[ignore = "writes golden/vectors.txt"]
fn add_missing() {
    let mut lines = frozen();
    for (name, value) in fixed() {
        lines.entry(name).or_insert(value);
    }
    macro_rules! add {
        ($value:expr) => {{
            fn name<T: Payload>(_: &T) -> String {
                format!("signed.{}", T::CONTEXT)
            }
            let value = $value;
            let name = name(&value);
            lines.entry(name).or_insert_with(|| hex::encode(sign(value).to_wire().encode_to_vec()));
        }};
    }
    every_signed!(add);
    let mut text = String::from("# Frozen by tests/golden.rs. A line is added once and never changed.\n");
    for (name, value) in lines {
        writeln!(text, "{name} {value}").unwrap();
    }
    std::fs::write(path(), text).unwrap();
}
