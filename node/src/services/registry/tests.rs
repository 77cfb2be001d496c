#![allow(clippy::unwrap_used)]

use std::collections::HashMap as Map;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use prost::Message as _;
use sundara_proto::id::Digest;

use super::*;
use crate::blobs::{Access, BlobError};
use crate::domain::catalog::Unresolved;
use crate::services::transfer::TransferConfig;
use crate::services::transfer::testing::{Mesh, TestNode};
use crate::store::MemoryStore;

const NOW: UnixMillis = UnixMillis(1_900_000_000_000);

/// A DHT that believes everything.
#[derive(Default)]
struct Dht {
    records: Mutex<Map<Digest, Vec<Vec<u8>>>>,
    down: Mutex<bool>,
    puts: AtomicU64,
}

#[async_trait]
impl RecordNet for Arc<Dht> {
    async fn put_record(&self, key: Digest, value: Vec<u8>) -> Result<(), String> {
        if *lock(&self.down) {
            return Err("no peers".to_owned());
        }
        self.puts.fetch_add(1, Ordering::Relaxed);
        let mut records = lock(&self.records);
        let values = records.entry(key).or_default();
        values.retain(|old| *old != value);
        values.push(value);
        Ok(())
    }

    async fn get_records(&self, key: Digest) -> Result<Vec<Vec<u8>>, String> {
        if *lock(&self.down) {
            Err("no peers".to_owned())
        } else {
            Ok(lock(&self.records).get(&key).cloned().unwrap_or_default())
        }
    }
}

fn key(n: u8) -> HotkeyPair {
    HotkeyPair::from_seed(&[n; 32])
}

fn network() -> Network {
    Network::named("test", 1)
}

fn registry_at(
    node: &TestNode,
    dht: &Arc<Dht>,
    store: SharedStore,
    hotkey: Option<HotkeyPair>,
    clock: fn() -> UnixMillis,
) -> RegistryHandle {
    RegistryHandle::open(Inner {
        network: network(),
        config: RegistryConfig::default(),
        blobs: node.blobs.clone(),
        transfer: node.transfer.clone(),
        store,
        net: Arc::new(dht.clone()),
        hotkey,
        clock,
        catalog: Mutex::default(),
        publishing: tokio::sync::Mutex::default(),
        unannounced: tokio::sync::Notify::new(),
        fetching: Mutex::default(),
        ready: Mutex::default(),
        under_way: Mutex::default(),
    })
    .unwrap()
}

fn registry(node: &TestNode, dht: &Arc<Dht>) -> RegistryHandle {
    registry_at(node, dht, Arc::new(MemoryStore::new()), None, || NOW)
}

/// A directory with a model: program, two artifacts.
fn model(dir: &Path, version: u64) -> PathBuf {
    let dir = dir.join(format!("model-{version}"));
    fs::create_dir_all(&dir).unwrap();
    let text = format!("name = \"digits\"\nversion = {version}\nprogram = \"d.wasm\"\nlicense = \"MIT\"\n");
    fs::write(dir.join("model.toml"), text).unwrap();
    fs::write(dir.join("d.wasm"), format!("program {version}")).unwrap();
    fs::write(dir.join("weights.bin"), vec![version as u8; 700_000]).unwrap();
    fs::write(dir.join("labels.txt"), b"0 1 2").unwrap();
    dir
}

fn reference(by: u8, version: Option<u64>) -> String {
    let publisher = key(by).hotkey();
    version.map_or(format!("{publisher}/digits"), |v| format!("{publisher}/digits@{v}"))
}

struct World {
    dir: tempfile::TempDir,
    dht: Arc<Dht>,
    a: TestNode,
    b: TestNode,
}

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let a = mesh.node(1, dir.path(), TransferConfig::default()).await;
    let b = mesh.node(2, dir.path(), TransferConfig::default()).await;
    World { dir, dht: Arc::default(), a, b }
}

#[tokio::test(start_paused = true)]
async fn what_one_publishes_another_finds_and_fetches() {
    let w = world().await;
    let (publisher, finder) = (registry(&w.a, &w.dht), registry(&w.b, &w.dht));
    let published = publisher.publish(model(w.dir.path(), 1), &key(1)).await.unwrap();
    assert_eq!((published.files, published.unannounced.clone()), (3, None));
    let shown = finder.show(&reference(1, None)).await.unwrap();
    assert_eq!((shown.record.model, shown.manifest.version, shown.local), (published.model, 1, false));
    assert_eq!(shown.size, published.size);
    let local = finder.fetch(&reference(1, Some(1))).await.unwrap();
    assert_eq!(fs::read_to_string(&local.program).unwrap(), "program 1");
    let names: Vec<&str> = local.artifacts.iter().map(|(name, _, _)| name.as_str()).collect();
    assert_eq!(names, ["labels.txt", "weights.bin"]);
    assert_eq!(fs::read(&local.artifacts[1].2).unwrap(), vec![1; 700_000]);
    let listed = finder.list().await.unwrap();
    assert!(matches!(&listed[..], [one] if one.local && one.latest && !one.pinned && one.name == "digits"));
    let own = publisher.list().await.unwrap();
    assert!(own[0].pinned && own[0].publisher == Some(key(1).hotkey()));
}

#[tokio::test(start_paused = true)]
async fn versions_only_go_up_also_after_a_restart() {
    let w = world().await;
    let store: SharedStore = Arc::new(MemoryStore::new());
    let first = registry_at(&w.a, &w.dht, store.clone(), None, || NOW);
    first.publish(model(w.dir.path(), 3), &key(1)).await.unwrap();
    *lock(&w.dht.down) = true;
    let again = registry_at(&w.a, &w.dht, store, None, || NOW);
    for version in [3, 2] {
        let refused = again.publish(model(w.dir.path(), version), &key(1)).await.unwrap_err();
        assert!(matches!(refused, RegistryError::VersionNotHigher { highest: 3, .. }), "{refused}");
    }
    again.publish(model(w.dir.path(), 2), &key(2)).await.unwrap();
    let late = again.publish(model(w.dir.path(), 4), &key(1)).await.unwrap();
    assert!(late.unannounced.is_some(), "published all the same, and said");
    // Another node of the same hotkey knows from the DHT alone.
    *lock(&w.dht.down) = false;
    let refused = registry(&w.b, &w.dht).publish(model(w.dir.path(), 3), &key(1)).await.unwrap_err();
    assert!(matches!(refused, RegistryError::VersionNotHigher { highest: 3, .. }), "{refused}");
}

fn forged(by: u8, version: u64, digest: u8, life_s: (i64, i64)) -> Vec<u8> {
    let at = |s: i64| UnixMillis(NOW.0.saturating_add_signed(s * 1000));
    let record = ModelRecord {
        network: network(),
        name: "digits".to_owned(),
        version,
        model: ModelId([digest; 32]),
        manifest: BlobId([digest; 32]),
        issued_at: at(life_s.0),
        expires_at: at(life_s.1),
    };
    Signed::sign(&network(), &key(by), record).to_wire().encode_to_vec()
}

#[tokio::test(start_paused = true)]
async fn records_that_do_not_count_never_win() {
    let w = world().await;
    let (publisher, finder) = (registry(&w.a, &w.dht), registry(&w.b, &w.dht));
    let genuine = publisher.publish(model(w.dir.path(), 5), &key(1)).await.unwrap();
    let dht_key = model_record_key(&network(), &key(1).hotkey(), "digits");
    let mut tampered = forged(1, 9, 66, (-10, 1000));
    let last = tampered.len() - 1;
    tampered[last] ^= 1;
    let attacks = [
        ("another key's", forged(2, 99, 66, (-10, 1000))),
        ("older, replayed", forged(1, 4, 66, (-5, 9000))),
        ("expired", forged(1, 99, 66, (-100, -1))),
        ("from the future", forged(1, 99, 66, (100, 1000))),
        ("tampered with", tampered),
        ("junk", vec![0xff; 300]),
        ("nothing", Vec::new()),
    ];
    for (what, bytes) in attacks {
        lock(&w.dht.records).entry(dht_key).or_default().push(bytes);
        for reader in [&finder, &publisher] {
            let record = reader.resolve(&reference(1, None)).await.unwrap();
            assert_eq!((record.version, record.model), (5, genuine.model), "{what}");
        }
    }
    // The publisher's own second word for one version leaves none.
    lock(&w.dht.records).entry(dht_key).or_default().push(forged(1, 5, 77, (-1, 1000)));
    for reader in [&finder, &publisher] {
        let failed = reader.resolve(&reference(1, None)).await.unwrap_err();
        assert!(matches!(failed, RegistryError::Unresolved(Unresolved::Equivocation { version: 5, .. })), "{failed}");
    }
    let next = publisher.publish(model(w.dir.path(), 6), &key(1)).await.unwrap();
    assert_eq!(finder.resolve(&reference(1, None)).await.unwrap().model, next.model);
}

#[tokio::test(start_paused = true)]
async fn many_jobs_cause_one_fetch() {
    let w = world().await;
    let (publisher, finder) = (registry(&w.a, &w.dht), registry(&w.b, &w.dht));
    let published = publisher.publish(model(w.dir.path(), 1), &key(1)).await.unwrap();
    let jobs: Vec<_> = (0..40)
        .map(|_| {
            let (finder, hint) = (finder.clone(), w.a.id);
            tokio::spawn(async move { finder.local(published.model, published.manifest, vec![hint]).await })
        })
        .collect();
    for job in jobs {
        assert_eq!(job.await.unwrap().unwrap().model, published.model);
    }
    assert_eq!(w.b.stats.figures().fetched_total, 4, "manifest, program, two artifacts");
}

#[tokio::test(start_paused = true)]
async fn a_manifest_that_is_not_the_models_is_refused() {
    let w = world().await;
    let finder = registry(&w.b, &w.dht);
    let junk = w.b.blobs.put(b"not a manifest".to_vec().into(), Access::Public).await.unwrap();
    let failed = finder.local(ModelId([1; 32]), junk, Vec::new()).await.unwrap_err();
    assert!(matches!(failed, RegistryError::WrongManifest { .. }) && !failed.is_retryable(), "{failed}");
}

#[tokio::test(start_paused = true)]
async fn pins_hold_and_removal_spares_what_others_use() {
    let w = world().await;
    let (publisher, finder) = (registry(&w.a, &w.dht), registry(&w.b, &w.dht));
    publisher.publish(model(w.dir.path(), 1), &key(1)).await.unwrap();
    publisher.publish(model(w.dir.path(), 2), &key(1)).await.unwrap();
    let one = finder.fetch(&reference(1, Some(1))).await.unwrap();
    let two = finder.fetch(&reference(1, Some(2))).await.unwrap();
    let shared = one.artifacts[0].1;
    assert_eq!(shared, two.artifacts[0].1, "both have the same labels");
    assert!(matches!(finder.remove(one.model).await, Err(RegistryError::Blob(BlobError::InUse { .. }))));
    finder.set_pinned(two.model, true).await.unwrap();
    let (one_model, two_model) = (one.model, two.model);
    drop((one, two));
    finder.remove(one_model).await.unwrap();
    assert!(w.b.blobs.has(&shared));
    assert!(matches!(finder.remove(one_model).await, Err(RegistryError::NotHere { .. })));
    finder.gc().await.unwrap();
    assert_eq!(finder.list().await.unwrap().iter().filter(|l| l.local && l.pinned).count(), 1);
    finder.set_pinned(two_model, false).await.unwrap();
    finder.gc().await.unwrap();
    assert_eq!(finder.list().await.unwrap().iter().filter(|l| l.local).count(), 0);
    assert!(w.a.blobs.has(&shared), "the publisher's are pinned");
    publisher.gc().await.unwrap();
    assert!(w.a.blobs.has(&shared));
}

#[tokio::test(start_paused = true)]
async fn a_damaged_model_is_mended_before_it_runs() {
    let w = world().await;
    let (publisher, finder) = (registry(&w.a, &w.dht), registry(&w.b, &w.dht));
    let published = publisher.publish(model(w.dir.path(), 1), &key(1)).await.unwrap();
    let weights = finder.local(published.model, published.manifest, vec![w.a.id]).await.unwrap().artifacts[1].2.clone();
    tokio::time::advance(READY_FOR).await;
    fs::write(&weights, vec![9; 700_000]).unwrap();
    let file = fs::File::options().append(true).open(&weights).unwrap();
    file.set_modified(std::time::SystemTime::now() + Duration::from_secs(9)).unwrap();
    let local = finder.local(published.model, published.manifest, vec![w.a.id]).await.unwrap();
    assert_eq!(fs::read(&local.artifacts[1].2).unwrap(), vec![1; 700_000]);
}

#[tokio::test(start_paused = true)]
async fn an_allow_list_asks_who_vouches() {
    let w = world().await;
    let (publisher, miner) = (registry(&w.a, &w.dht), registry(&w.b, &w.dht));
    let published = publisher.publish(model(w.dir.path(), 1), &key(1)).await.unwrap();
    let ask = |allowed: Vec<u8>| {
        let miner = miner.clone();
        let allowed: Vec<Hotkey> = allowed.into_iter().map(|n| key(n).hotkey()).collect();
        async move { miner.vouched_by(published.model, "digits", &allowed).await.unwrap() }
    };
    assert_eq!(ask(vec![3, 1]).await, Some(key(1).hotkey()));
    assert_eq!(ask(vec![3]).await, None);
    assert_eq!(ask(vec![]).await, None);
}

static CLOCK: AtomicU64 = AtomicU64::new(NOW.0);

#[tokio::test(start_paused = true)]
async fn own_records_are_renewed_before_they_expire() {
    let w = world().await;
    let clock = || UnixMillis(CLOCK.load(Ordering::Relaxed));
    let publisher = registry_at(&w.a, &w.dht, Arc::new(MemoryStore::new()), Some(key(1)), clock);
    let finder = registry_at(&w.b, &w.dht, Arc::new(MemoryStore::new()), None, clock);
    publisher.publish(model(w.dir.path(), 1), &key(1)).await.unwrap();
    let first = finder.resolve(&reference(1, None)).await.unwrap();
    assert!(publish::renew_all(&publisher.0).await);
    assert_eq!(finder.resolve(&reference(1, None)).await.unwrap(), first, "young: put again as it is");
    let day = 24 * 3600 * 1000;
    CLOCK.fetch_add(4 * day, Ordering::Relaxed);
    assert!(publish::renew_all(&publisher.0).await);
    let renewed = finder.resolve(&reference(1, None)).await.unwrap();
    assert!(renewed.expires_at > first.expires_at && renewed.model == first.model && renewed.version == 1);
    *lock(&w.dht.down) = true;
    assert!(!publish::renew_all(&publisher.0).await, "tried again soon");
    CLOCK.fetch_add(8 * day, Ordering::Relaxed);
    assert!(matches!(
        finder.resolve(&reference(1, None)).await,
        Err(RegistryError::Unresolved(Unresolved::Expired { .. }))
    ));
}

#[test]
fn references_are_read_or_refused_in_words() {
    let publisher = key(1).hotkey();
    let parsed: ModelRef = format!("{publisher}/a.b-c@7").parse().unwrap();
    assert_eq!((parsed.name.name.as_str(), parsed.version), ("a.b-c", Some(7)));
    for bad in
        ["", "digits", "x/digits", &format!("{publisher}/"), &format!("{publisher}/a@x"), &format!("{publisher}/a/b")]
    {
        let error = bad.parse::<ModelRef>().unwrap_err().to_string();
        assert!(error.contains("PUBLISHER/NAME"), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_that_the_dht_did_not_take_is_put_again_soon() {
    let w = world().await;
    let publisher = registry_at(&w.a, &w.dht, Arc::new(MemoryStore::new()), Some(key(1)), || NOW);
    let stop = tokio_util::sync::CancellationToken::new();
    let renewal = tokio::spawn(publish::renew(publisher.0.clone(), stop.clone()));
    tokio::task::yield_now().await;
    *lock(&w.dht.down) = true;
    assert!(publisher.publish(model(w.dir.path(), 1), &key(1)).await.unwrap().unannounced.is_some());
    *lock(&w.dht.down) = false;
    let finder = registry(&w.b, &w.dht);
    let found = async {
        while finder.resolve(&reference(1, None)).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    // In the paused clock's seconds; the regular renewal is hours away.
    tokio::time::timeout(std::time::Duration::from_secs(60), found).await.unwrap();
    stop.cancel();
    renewal.await.unwrap();
}
