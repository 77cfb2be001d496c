#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use sundara_proto::crypto::{HotkeyPair, Network};
use sundara_proto::id::{BlobId, ModelId};

use super::*;

const DAY: u64 = 24 * 3600 * 1000;
const NOW: UnixMillis = UnixMillis(100 * DAY);

fn key(n: u8) -> HotkeyPair {
    HotkeyPair::from_seed(&[n; 32])
}

/// Signed by `by`, of content `digest`, valid from `from` to `to`, both in days after [`NOW`].
fn record(by: u8, version: u64, digest: u8, from: i64, to: i64) -> Signed<ModelRecord> {
    let network = Network::named("test", 1);
    let at = |days: i64| UnixMillis(NOW.0.saturating_add_signed(days * DAY as i64));
    let value = ModelRecord {
        network,
        name: "digits".to_owned(),
        version,
        model: ModelId([digest; 32]),
        manifest: BlobId([digest; 32]),
        issued_at: at(from),
        expires_at: at(to),
    };
    Signed::sign(&network, &key(by), value)
}

fn name(by: u8) -> ModelName {
    ModelName { publisher: key(by).hotkey(), name: "digits".to_owned() }
}

/// What `digits` of key 1 stands for after hearing `records`: version and digest, or the kind of failure.
fn outcome(records: &[Signed<ModelRecord>], version: Option<u64>) -> Result<(u64, u8), &'static str> {
    let mut catalog = Catalog::default();
    for record in records {
        catalog.handle(Input::Heard(record.clone()), NOW);
    }
    match catalog.resolve(&name(1), version, NOW) {
        Ok(record) => Ok((record.version, record.model.0[0])),
        Err(Unresolved::Unknown { .. }) => Err("unknown"),
        Err(Unresolved::NoVersion { .. }) => Err("no version"),
        Err(Unresolved::Expired { .. }) => Err("expired"),
        Err(Unresolved::Equivocation { .. }) => Err("equivocation"),
    }
}

#[test]
fn the_rule_in_a_table() {
    #[allow(clippy::type_complexity)]
    let cases: [(&str, Vec<Signed<ModelRecord>>, Option<u64>, Result<(u64, u8), &str>); 12] = [
        ("one record", vec![record(1, 1, 10, -1, 1)], None, Ok((1, 10))),
        ("the higher version", vec![record(1, 1, 10, -1, 1), record(1, 2, 20, -2, 1)], None, Ok((2, 20))),
        ("an older one replayed", vec![record(1, 2, 20, -2, 1), record(1, 1, 10, -1, 5)], None, Ok((2, 20))),
        ("an older one asked for", vec![record(1, 2, 20, -2, 1), record(1, 1, 10, -1, 5)], Some(1), Ok((1, 10))),
        ("another key's", vec![record(2, 9, 66, -1, 5)], None, Err("unknown")),
        ("another key's beside it", vec![record(1, 1, 10, -1, 1), record(2, 9, 66, -1, 5)], None, Ok((1, 10))),
        ("expired", vec![record(1, 1, 10, -3, -1)], None, Err("unknown")),
        ("expired, of a higher version", vec![record(1, 1, 10, -1, 1), record(1, 2, 20, -3, -1)], None, Ok((1, 10))),
        ("from the future", vec![record(1, 1, 10, 1, 2)], None, Err("unknown")),
        (
            "two digests of one version",
            vec![record(1, 1, 10, -1, 1), record(1, 1, 11, -1, 2)],
            None,
            Err("equivocation"),
        ),
        (
            "a version above an equivocation",
            vec![record(1, 1, 10, -1, 1), record(1, 1, 11, -1, 2), record(1, 2, 20, -1, 1)],
            None,
            Ok((2, 20)),
        ),
        ("a version nobody has", vec![record(1, 2, 20, -1, 1)], Some(1), Err("no version")),
    ];
    for (what, records, version, wanted) in cases {
        assert_eq!(outcome(&records, version), wanted, "{what}");
        let backwards: Vec<_> = records.into_iter().rev().collect();
        assert_eq!(outcome(&backwards, version), wanted, "{what}, backwards");
    }
}

#[test]
fn a_version_that_expired_keeps_older_ones_down() {
    let mut catalog = Catalog::default();
    catalog.handle(Input::Heard(record(1, 2, 20, -5, 1)), NOW);
    let later = NOW.plus(std::time::Duration::from_secs(2 * 24 * 3600));
    assert!(matches!(catalog.resolve(&name(1), None, later), Err(Unresolved::Expired { version: 2, .. })));
    catalog.handle(Input::Heard(record(1, 1, 10, -1, 6)), later);
    assert!(matches!(catalog.resolve(&name(1), None, later), Err(Unresolved::Expired { version: 2, .. })));
    assert!(catalog.resolve(&name(1), Some(1), later).is_ok(), "by its number it may be asked for");
}

#[test]
fn what_was_persisted_keeps_its_height_and_its_evidence() {
    let mut catalog = Catalog::default();
    let mut kept = None;
    let mut equivocations = 0;
    for r in [record(1, 1, 10, -2, 1), record(1, 3, 30, -2, 1), record(1, 3, 31, -2, 1), record(1, 3, 32, -2, 1)] {
        for output in catalog.handle(Input::Heard(r), NOW) {
            match output {
                Output::Persist(k) => kept = Some(k),
                Output::Equivocation { version, .. } => {
                    assert_eq!(version, 3);
                    equivocations += 1;
                }
                Output::Ignored(reason) => assert_eq!(reason, Reason::Known),
            }
        }
    }
    assert_eq!(equivocations, 1, "said once");
    let mut after = Catalog::default();
    after.handle(Input::Restored(kept.unwrap()), NOW);
    assert_eq!(after.floor(&name(1)), Some(3));
    assert!(matches!(after.resolve(&name(1), None, NOW), Err(Unresolved::Equivocation { .. })));
}

#[test]
fn a_renewed_signature_replaces_the_old_one() {
    let mut catalog = Catalog::default();
    catalog.handle(Input::Heard(record(1, 1, 10, -3, 1)), NOW);
    catalog.handle(Input::Heard(record(1, 1, 10, -1, 4)), NOW);
    assert_eq!(catalog.handle(Input::Heard(record(1, 1, 10, -3, 1)), NOW), [Output::Ignored(Reason::Known)]);
    let later = NOW.plus(std::time::Duration::from_secs(2 * 24 * 3600));
    assert!(catalog.resolve(&name(1), None, later).is_ok());
}

fn any_record() -> impl Strategy<Value = Signed<ModelRecord>> {
    (1_u8..3, 0_u64..5, 0_u8..3, -4_i64..2, -1_i64..3)
        .prop_map(|(by, version, digest, from, to)| record(by, version, digest, from, to))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_order_of_hearing_does_not_matter(
        records in prop::collection::vec(any_record(), 0..12).prop_flat_map(|r| (Just(r.clone()), Just(r).prop_shuffle())),
    ) {
        for version in [None, Some(0), Some(1), Some(2), Some(3), Some(4)] {
            prop_assert_eq!(outcome(&records.0, version), outcome(&records.1, version));
        }
    }

    #[test]
    fn only_the_publishers_own_valid_unrivalled_records_win(records in prop::collection::vec(any_record(), 0..12)) {
        let Ok((version, digest)) = outcome(&records, None) else { return Ok(()) };
        let own: Vec<_> = records
            .iter()
            .filter(|r| r.publisher() == key(1).hotkey() && r.expires_at >= NOW && r.issued_at <= NOW)
            .collect();
        prop_assert!(own.iter().any(|r| r.version == version && r.model.0[0] == digest));
        prop_assert!(own.iter().all(|r| r.version <= version));
        prop_assert!(own.iter().all(|r| r.version != version || r.model.0[0] == digest));
    }

    #[test]
    fn it_stays_within_bounds(versions in prop::collection::vec(0_u64..200, 0..60)) {
        let mut catalog = Catalog::default();
        for version in &versions {
            catalog.handle(Input::Heard(record(1, *version, 1, -1, 1)), NOW);
        }
        prop_assert!(catalog.iter().count() <= VERSIONS_MAX);
        prop_assert_eq!(catalog.floor(&name(1)), versions.iter().copied().max());
    }
}
