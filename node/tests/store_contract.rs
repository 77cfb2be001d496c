//! One contract for every store, and what the store on disk adds to it: reopening, versions, its lock.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use sundara_node::store::{
    JsonTable, KeyRange, Keyspace, MAX_BATCH_OPS, MAX_KEY_BYTES, MAX_SCAN_RECORDS, MAX_VALUE_BYTES, MemoryStore,
    Migration, MigrationStep, Page, SledStore, Store, StoreConfig, StoreError, Table, WriteBatch, delete_range,
    retain_step, time_key, time_key_id, time_key_unix_ms,
};

const JOBS: Keyspace = Keyspace::Jobs;
const EVENTS: Keyspace = Keyspace::JobEvents;

fn config() -> StoreConfig {
    // The machine that runs the tests may have little room left; what a full disk does is tested elsewhere.
    let mut config = StoreConfig::default();
    config.disk_reserve_bytes = 0;
    config
}

fn open(dir: &Path) -> SledStore {
    SledStore::open(dir, &config()).unwrap()
}

fn put(keyspace: Keyspace, key: &[u8], value: &[u8]) -> WriteBatch {
    let mut batch = WriteBatch::new();
    batch.put(keyspace, key.to_vec(), value.to_vec());
    batch
}

fn keys(page: &Page) -> Vec<&[u8]> {
    page.items.iter().map(|(key, _)| &key[..]).collect()
}

/// Runs a test of the contract on every implementation.
fn on_every_store(test: impl Fn(&dyn Store)) {
    test(&MemoryStore::new());
    let dir = tempfile::tempdir().unwrap();
    test(&open(dir.path()));
}

#[test]
fn a_batch_takes_effect_whole_and_in_order() {
    on_every_store(|store| {
        let before = store.status().applied_seq;
        let mut batch = WriteBatch::new();
        batch.put(JOBS, "a", "1").put(EVENTS, "a", "2").put(JOBS, "gone", "3").delete(JOBS, "gone").put(JOBS, "a", "4");
        assert_eq!(store.commit(batch).wait().unwrap().seq, before + 1);
        assert_eq!(store.get(JOBS, b"a").unwrap().as_deref(), Some(&b"4"[..]));
        assert_eq!(store.get(EVENTS, b"a").unwrap().as_deref(), Some(&b"2"[..]));
        assert_eq!(store.get(JOBS, b"gone").unwrap(), None);
        assert_eq!(store.get(Keyspace::Peers, b"a").unwrap(), None);

        let mut batch = WriteBatch::new();
        batch.delete(JOBS, "a").delete(JOBS, "never there");
        assert_eq!(store.commit_relaxed(batch).wait().unwrap().seq, before + 2);
        assert_eq!(store.get(JOBS, b"a").unwrap(), None);
        assert_eq!(store.flush().wait().unwrap().seq, before + 2);
        assert_eq!(store.status().durable_seq, before + 2);
    });
}

#[test]
fn scans_walk_ranges_both_ways_and_in_pages() {
    on_every_store(|store| {
        let mut batch = WriteBatch::new();
        for key in ["a", "ab", "abc", "b", "ba", "c"] {
            batch.put(JOBS, key, key);
        }
        batch.put(EVENTS, "ab", "other").put(JOBS, vec![0xff, 0xff], "top").put(JOBS, vec![0xff, 0xff, 1], "above");
        store.commit(batch).wait().unwrap();

        let scan = |range: &KeyRange, limit| store.scan(JOBS, range, limit).unwrap();
        assert_eq!(keys(&scan(&KeyRange::prefix(b"ab"), 10)), [&b"ab"[..], b"abc"]);
        assert_eq!(keys(&scan(&KeyRange::prefix(&[0xff]), 10)), [&[0xff, 0xff][..], &[0xff, 0xff, 1]]);
        assert_eq!(keys(&scan(&KeyRange::all().from(b"b").until(b"c"), 10)), [&b"b"[..], b"ba"]);
        assert_eq!(keys(&scan(&KeyRange::all().after(b"b").until(b"c"), 10)), [&b"ba"[..]]);
        assert_eq!(keys(&scan(&KeyRange::prefix(b"a").reversed(), 2)), [&b"abc"[..], b"ab"]);
        assert_eq!(scan(&KeyRange::all().from(b"c").until(b"a"), 10), Page::default());
        assert_eq!(store.scan(Keyspace::Peers, &KeyRange::all(), 10).unwrap(), Page::default());
        assert_eq!(scan(&KeyRange::all(), 0).items, []);
        assert!(scan(&KeyRange::all(), 0).next.is_some());

        for range in [KeyRange::all(), KeyRange::all().reversed(), KeyRange::prefix(b"a")] {
            let whole = scan(&range, 100);
            assert_eq!(whole.next, None);
            let (mut paged, mut rest) = (Vec::new(), Some(range));
            while let Some(range) = rest {
                let page = scan(&range, 2);
                assert!(page.items.len() <= 2);
                paged.extend(page.items);
                rest = page.next;
            }
            assert_eq!(paged, whole.items);
        }
    });
}

#[test]
fn a_scan_is_bounded_in_records_and_bytes() {
    on_every_store(|store| {
        for chunk in (0..MAX_SCAN_RECORDS as u32 + 5).collect::<Vec<_>>().chunks(MAX_BATCH_OPS) {
            let mut batch = WriteBatch::new();
            for number in chunk {
                batch.put(JOBS, number.to_be_bytes().to_vec(), "");
            }
            store.commit(batch).wait().unwrap();
        }
        let page = store.scan(JOBS, &KeyRange::all(), usize::MAX).unwrap();
        assert_eq!(page.items.len(), MAX_SCAN_RECORDS);
        assert_eq!(store.scan(JOBS, &page.next.unwrap(), usize::MAX).unwrap().items.len(), 5);

        for key in 0..20_u8 {
            store.commit(put(EVENTS, &[key], &vec![key; MAX_VALUE_BYTES])).wait().unwrap();
        }
        let page = store.scan(EVENTS, &KeyRange::all(), usize::MAX).unwrap();
        assert_eq!(page.items.len(), 15, "16 MiB less the keys");
        assert!(page.items.iter().all(|(key, value)| value.len() == MAX_VALUE_BYTES && value[0] == key[0]));
    });
}

#[test]
fn what_is_too_large_is_refused_and_named() {
    on_every_store(|store| {
        let refused = |batch: WriteBatch, what: &str| match store.commit(batch).wait() {
            Err(StoreError::TooLarge { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{what}: {other:?}"),
        };
        refused(put(JOBS, &vec![0; MAX_KEY_BYTES + 1], b""), "a key");
        refused(put(JOBS, b"k", &vec![0; MAX_VALUE_BYTES + 1]), "a value");
        let mut many = WriteBatch::new();
        for number in 0..=MAX_BATCH_OPS as u32 {
            many.delete(JOBS, number.to_be_bytes().to_vec());
        }
        refused(many, "a batch's list of writes");
        let mut heavy = WriteBatch::new();
        for key in 0..9_u8 {
            heavy.put(JOBS, vec![key], vec![0; MAX_VALUE_BYTES]);
        }
        refused(heavy, "a batch");
        assert_eq!(store.scan(JOBS, &KeyRange::all(), 10).unwrap(), Page::default());
        store.commit(put(JOBS, &vec![255; MAX_KEY_BYTES], &vec![7; MAX_VALUE_BYTES])).wait().unwrap();
        assert_eq!(store.get(JOBS, &vec![255; MAX_KEY_BYTES]).unwrap().unwrap(), vec![7; MAX_VALUE_BYTES]);
    });
}

#[test]
fn values_of_every_size_replace_each_other() {
    on_every_store(|store| {
        let sizes = [0, 1, 4_095, 4_096, 4_097, 8_192, 200_000, 3, 8_193, 0];
        for size in sizes {
            store.commit(put(JOBS, b"k", &vec![size as u8; size])).wait().unwrap();
            assert_eq!(store.get(JOBS, b"k").unwrap().unwrap(), vec![size as u8; size]);
            assert_eq!(store.status().live_bytes - meta_bytes(store), 1 + size as u64);
        }
    });
}

/// Bytes of the store's own records.
fn meta_bytes(store: &dyn Store) -> u64 {
    let page = store.scan(Keyspace::Meta, &KeyRange::all(), 100).unwrap();
    page.items.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum()
}

#[test]
fn a_closed_store_refuses_writes() {
    on_every_store(|store| {
        let last = store.commit(put(JOBS, b"k", b"v"));
        store.close().wait().unwrap();
        assert!(last.wait().is_ok(), "what was queued before is written");
        assert!(matches!(store.commit(put(JOBS, b"k", b"w")).wait(), Err(StoreError::Closed)));
        assert!(store.close().wait().is_ok());
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_from_many_tasks_are_all_kept_and_numbered() {
    let dir = tempfile::tempdir().unwrap();
    let stores: [Arc<dyn Store>; 2] = [Arc::new(MemoryStore::new()), Arc::new(open(dir.path()))];
    for store in stores {
        let before = store.status().applied_seq;
        let tasks = (0..16_u32).map(|task| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut numbers = Vec::new();
                for round in 0..50_u32 {
                    let mut batch = WriteBatch::new();
                    batch.put(JOBS, [task.to_be_bytes(), round.to_be_bytes()].concat(), "v");
                    batch.put(EVENTS, task.to_be_bytes().to_vec(), round.to_be_bytes().to_vec());
                    numbers.push(store.commit(batch).await.unwrap().seq);
                    assert_eq!(store.get(EVENTS, &task.to_be_bytes()).unwrap().unwrap(), round.to_be_bytes().to_vec());
                }
                assert!(numbers.is_sorted_by(|a, b| a < b));
                numbers
            })
        });
        let mut numbers = Vec::new();
        for task in tasks.collect::<Vec<_>>() {
            numbers.extend(task.await.unwrap());
        }
        numbers.sort_unstable();
        assert_eq!(numbers, (before + 1..=before + 800).collect::<Vec<_>>());
        assert_eq!(store.scan(JOBS, &KeyRange::all(), 1_000).unwrap().items.len(), 800);
    }
}

#[tokio::test]
async fn retention_deletes_in_bounded_steps() {
    let dir = tempfile::tempdir().unwrap();
    let stores: [Box<dyn Store>; 2] = [Box::new(MemoryStore::new()), Box::new(open(dir.path()))];
    for store in stores {
        let store = &*store;
        let mut batch = WriteBatch::new();
        for time in 0..2_000_u64 {
            batch.put(Keyspace::JobExpiry, time_key(time, b"id"), "");
        }
        store.commit(batch).await.unwrap();
        let old = KeyRange::all().until(&time_key(1_500, b""));

        let step = retain_step(store, Keyspace::JobExpiry, &old, |key, _| {
            assert_eq!(time_key_id(key), b"id");
            time_key_unix_ms(key).unwrap().is_multiple_of(2)
        })
        .await
        .unwrap();
        assert_eq!((step.scanned, step.deleted), (512, 256));
        assert_eq!(delete_range(store, Keyspace::JobExpiry, &old, 100).await.unwrap(), 100);
        assert_eq!(delete_range(store, Keyspace::JobExpiry, &old, u64::MAX).await.unwrap(), 1_500 - 256 - 100);
        let left = store.scan(Keyspace::JobExpiry, &KeyRange::all(), 1_000).unwrap();
        assert_eq!(left.items.len(), 500);
        assert_eq!(time_key_unix_ms(&left.items[0].0), Some(1_500));
    }
}

#[test]
fn a_table_names_the_keyspace_of_what_does_not_decode() {
    const SCORES: JsonTable<Vec<u32>> = Table::new(Keyspace::Scores);
    on_every_store(|store| {
        let mut batch = WriteBatch::new();
        SCORES.put(&mut batch, "good", &vec![1, 2]);
        store.commit(batch).wait().unwrap();
        let (rows, next) = SCORES.scan(store, &KeyRange::all(), 10).unwrap();
        assert_eq!((rows.len(), &rows[0].1, next), (1, &vec![1, 2], None));
        store.commit(put(Keyspace::Scores, b"bad", b"{")).wait().unwrap();
        let err = SCORES.get(store, b"bad").unwrap_err();
        assert!(err.to_string().contains("scores"), "{err}");
    });
}

#[test]
fn a_second_handle_is_refused_and_told_who_has_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    let err = SledStore::open(dir.path(), &config()).unwrap_err();
    assert!(matches!(err, StoreError::InUse { .. }));
    assert!(err.to_string().contains(&format!("process {}", std::process::id())), "{err}");
    first.close().wait().unwrap();
    drop(first);
    drop(open(dir.path()));
}

/// A migration that takes the records of a keyspace in steps of two and writes their values twice over.
fn double(store: &dyn Store, cursor: Option<bytes::Bytes>) -> Result<MigrationStep, String> {
    let range = cursor.map_or(KeyRange::all(), |cursor| KeyRange::all().after(&cursor));
    let page = store.scan(JOBS, &range, 2).map_err(|err| err.to_string())?;
    let mut step = MigrationStep { next: page.items.last().map(|(key, _)| key.clone()), ..MigrationStep::default() };
    for (key, value) in page.items {
        if &value[..] == b"bad" {
            return Err("a record is of no known kind".into());
        }
        step.batch.put(JOBS, key, [&value[..], &value[..]].concat());
    }
    Ok(step)
}

const DOUBLE: Migration = Migration { name: "double", step: double };

#[test]
fn an_older_format_is_migrated_step_by_step_and_a_newer_one_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for key in ["a", "b", "c", "d", "e"] {
        store.commit(put(JOBS, key.as_bytes(), key.as_bytes())).wait().unwrap();
    }
    drop(store);

    let store = SledStore::open_with(dir.path(), &config(), &[DOUBLE, DOUBLE]).unwrap();
    let values = store.scan(JOBS, &KeyRange::all(), 10).unwrap().items;
    assert_eq!(
        values.iter().map(|(_, value)| &value[..]).collect::<Vec<_>>(),
        [b"aaaa", b"bbbb", b"cccc", b"dddd", b"eeee"]
    );
    drop(store);

    let store = SledStore::open_with(dir.path(), &config(), &[DOUBLE, DOUBLE]).unwrap();
    assert_eq!(store.get(JOBS, b"a").unwrap().as_deref(), Some(&b"aaaa"[..]), "a migration runs once");
    drop(store);

    let err = SledStore::open(dir.path(), &config()).unwrap_err();
    assert!(matches!(err, StoreError::NewerFormat { found: 3, supported: 1, .. }), "{err}");
    assert!(err.to_string().contains("has format 3, this version knows up to 1"), "{err}");
}

#[test]
fn a_migration_that_fails_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for (key, value) in [("a", "1"), ("b", "2"), ("c", "bad")] {
        store.commit(put(JOBS, key.as_bytes(), value.as_bytes())).wait().unwrap();
    }
    drop(store);
    let err = SledStore::open_with(dir.path(), &config(), &[DOUBLE]).unwrap_err();
    assert!(matches!(err, StoreError::Migration { from: 1, to: 2, .. }), "{err}");

    let store = open(dir.path());
    assert_eq!(store.get(JOBS, b"a").unwrap().as_deref(), Some(&b"11"[..]));
    store.commit(put(JOBS, b"c", b"3")).wait().unwrap();
    drop(store);
    let store = SledStore::open_with(dir.path(), &config(), &[DOUBLE]).unwrap();
    for (key, value) in [(b"a", b"11"), (b"b", b"22"), (b"c", b"33")] {
        assert_eq!(store.get(JOBS, key).unwrap().as_deref(), Some(&value[..]), "each record is migrated once");
    }
}

/// What a program may do to a store.
#[derive(Clone, Debug)]
enum Action {
    Commit(Vec<(u8, u8, Option<usize>)>),
    Scan { prefix: Option<u8>, from: u8, limit: usize, reversed: bool },
    Reopen,
}

fn action() -> impl Strategy<Value = Action> {
    let size = prop_oneof![4 => 0_usize..64, 2 => 3_000_usize..9_000, 1 => 20_000_usize..60_000];
    let write = (0_u8..3, any::<u8>(), prop::option::weighted(0.6, size));
    prop_oneof![
        12 => prop::collection::vec(write, 1..20).prop_map(Action::Commit),
        6 => (prop::option::of(0_u8..4), any::<u8>(), 0_usize..40, any::<bool>())
            .prop_map(|(prefix, from, limit, reversed)| Action::Scan { prefix, from, limit, reversed }),
        1 => Just(Action::Reopen),
    ]
}

/// Keys of one to three bytes in few families, so that ranges and neighbours meet.
fn model_key(seed: u8) -> Vec<u8> {
    vec![seed % 4, seed / 4 % 8, seed / 32][..1 + usize::from(seed % 3)].to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_store_on_disk_does_what_the_store_in_memory_does(actions in prop::collection::vec(action(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let memory = MemoryStore::new();
        let mut disk = Some(open(dir.path()));
        for (step, action) in actions.into_iter().enumerate() {
            let store = disk.as_ref().unwrap();
            match action {
                Action::Commit(writes) => {
                    let mut batch = WriteBatch::new();
                    for (keyspace, key, size) in writes {
                        let keyspace = [JOBS, EVENTS, Keyspace::Rounds][usize::from(keyspace)];
                        match size {
                            Some(size) => batch.put(keyspace, model_key(key), vec![step as u8; size]),
                            None => batch.delete(keyspace, model_key(key)),
                        };
                    }
                    memory.commit(batch.clone()).wait().unwrap();
                    store.commit(batch).wait().unwrap();
                }
                Action::Scan { prefix, from, limit, reversed } => {
                    let range = match prefix {
                        Some(prefix) => KeyRange::prefix(&[prefix]),
                        None => KeyRange::all().from(&model_key(from)),
                    };
                    let range = if reversed { range.reversed() } else { range };
                    for keyspace in [JOBS, EVENTS, Keyspace::Rounds] {
                        prop_assert_eq!(store.scan(keyspace, &range, limit).unwrap(), memory.scan(keyspace, &range, limit).unwrap());
                    }
                }
                Action::Reopen => {
                    drop(disk.take());
                    disk = Some(open(dir.path()));
                }
            }
        }
        drop(disk.take());
        let store = open(dir.path());
        for &keyspace in Keyspace::ALL.iter().filter(|&&keyspace| keyspace != Keyspace::Meta) {
            let all = KeyRange::all();
            prop_assert_eq!(store.scan(keyspace, &all, 5_000).unwrap(), memory.scan(keyspace, &all, 5_000).unwrap());
        }
        prop_assert_eq!(store.status().live_bytes, memory.status().live_bytes + meta_bytes(&store));
    }
}
