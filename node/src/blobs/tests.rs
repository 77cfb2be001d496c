#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use sundara_proto::blob::{GROUP_LEN, group_count};
use sundara_proto::id::{Hotkey, NodeId};

use super::*;

pub(crate) fn content(len: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; len];
    bao_tree::blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

async fn open(dir: &Path) -> Blobs {
    Blobs::open(dir.join("blobs"), BlobsConfig::default()).await.unwrap()
}

fn anyone() -> Asker {
    Asker { node: NodeId([9; 32]), hotkey: Some(Hotkey([9; 32])) }
}

/// Encoding of `groups`, as a peer would get it.
fn encoding(blobs: &Blobs, id: BlobId, groups: &GroupRanges) -> Result<Vec<u8>, BlobError> {
    let reader = blobs.reader(&id, &anyone()).unwrap();
    let mut encoder = reader.encode(groups)?;
    let (mut out, mut buffer) = (Vec::new(), vec![0; 3 * ENCODER_BUFFER_MIN]);
    loop {
        match encoder.fill(&mut buffer)? {
            0 => return Ok(out),
            n => out.extend_from_slice(&buffer[..n]),
        }
    }
}

/// Flips a byte of a file without anyone noticing by its length.
fn corrupt(path: &Path, at: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at as usize] ^= 0x80;
    let mut file = fs::File::options().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&bytes[at as usize..=at as usize]).unwrap();
    // The clock of file times may tick once in 4 ms: set apart, as a later change would be.
    file.set_modified(std::time::SystemTime::now() + Duration::from_secs(5)).unwrap();
}

async fn partial(blobs: &Blobs, id: BlobId, len: u64) -> Partial {
    match blobs.partial(id, ByteCount(len), Access::Public).await.unwrap() {
        Opened::Partial(partial) => partial,
        Opened::Complete => panic!("complete"),
    }
}

#[tokio::test]
async fn what_is_put_comes_back_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, len) in [0, 1, 1024, 16_384, 16_385, 300_000].into_iter().enumerate() {
        let bytes = content(len, seed as u8);
        let id = open(dir.path()).await.put(bytes.clone().into(), Access::Public).await.unwrap();
        let blobs = open(dir.path()).await;
        assert!(blobs.has(&id));
        assert_eq!(blobs.get(id, ByteCount(1 << 20)).await.unwrap(), bytes);
        let file = blobs.path(id).await.unwrap();
        assert_eq!(fs::read(file.path()).unwrap(), bytes);
        let groups = GroupRanges::all(ByteCount(len as u64));
        assert!(proves(id, ByteCount(len as u64), &groups, &encoding(&blobs, id, &groups).unwrap()));
    }
}

#[tokio::test]
async fn files_are_imported_by_copy_and_by_link() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = open(dir.path()).await;
    for (mode, seed) in [(ImportMode::Copy, 1), (ImportMode::Link, 2)] {
        let bytes = content(100_000, seed);
        let path = dir.path().join(format!("model-{seed}"));
        fs::write(&path, &bytes).unwrap();
        let made = blobs.import_file(&path, mode, Access::Public).await.unwrap();
        assert_eq!(made, Imported { id: BlobId::of(&bytes), len: ByteCount(100_000) });
        assert_eq!(blobs.get(made.id, ByteCount(1 << 20)).await.unwrap(), bytes);
        assert_eq!(fs::read(&path).unwrap(), bytes, "the original stays");
    }
    assert!(fs::read_dir(blobs.layout().temp_dir()).unwrap().next().is_none(), "nothing is left in tmp");
}

#[tokio::test]
async fn a_private_blob_goes_with_its_last_use() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = open(dir.path()).await;
    let reader = |n: u8| Access::only([Reader::Hotkey(Hotkey([n; 32]))]);
    let id = blobs.put(content(50_000, 3).into(), reader(1)).await.unwrap();
    assert_eq!(blobs.put(content(50_000, 3).into(), reader(2)).await.unwrap(), id);
    assert!(blobs.reader(&id, &anyone()).is_none(), "existence is not told");
    for n in [1, 2] {
        let asker = Asker { node: NodeId([7; 32]), hotkey: Some(Hotkey([n; 32])) };
        assert!(blobs.may_read(&id, &asker) && blobs.reader(&id, &asker).is_some());
    }
    assert!(!blobs.remove(id).await.unwrap());
    let blobs = open(dir.path()).await;
    assert!(blobs.has(&id), "one use is left, also after a restart");
    assert!(blobs.remove(id).await.unwrap());
    assert!(!blobs.has(&id));
    assert!(!open(dir.path()).await.has(&id));
    assert_eq!(blobs.usage().used, ByteCount(0));
}

#[tokio::test]
async fn the_cap_evicts_the_least_recently_used_and_then_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let config = BlobsConfig { max_bytes: ByteCount(300_000), ..BlobsConfig::default() };
    let blobs = Blobs::open(dir.path(), config).await.unwrap();
    let a = blobs.put(content(100_000, 1).into(), Access::Public).await.unwrap();
    let b = blobs.put(content(100_000, 2).into(), Access::Public).await.unwrap();
    blobs.index().get_mut(&a).unwrap().last_used = UnixMillis(2);
    blobs.index().get_mut(&b).unwrap().last_used = UnixMillis(1);
    let c = blobs.put(content(100_000, 3).into(), Access::Public).await.unwrap();
    assert!(blobs.has(&a) && !blobs.has(&b) && blobs.has(&c));
    assert!(!blobs.layout().data(&b).exists());
    assert!(blobs.set_pinned(a, true).await.unwrap() && blobs.set_pinned(c, true).await.unwrap());
    let full = blobs.put(content(120_000, 4).into(), Access::Public).await.unwrap_err();
    assert!(full.to_string().contains("blobs.max_bytes"), "{full}");
    assert!(blobs.put(content(60_000, 5).into(), Access::local()).await.is_ok());
    assert!(blobs.usage().used <= ByteCount(300_000));
    blobs.set_pinned(a, false).await.unwrap();
    assert_eq!(blobs.gc().await.unwrap().blobs, 1, "what is pinned or private stays");
    assert!(blobs.has(&c));
}

#[tokio::test]
async fn damage_is_noticed_at_every_door_and_mended_group_by_group() {
    let len = 40 * GROUP_LEN + 5;
    let bytes = content(len as usize, 6);
    let elsewhere = tempfile::tempdir().unwrap();
    let healthy = open(elsewhere.path()).await;
    let id = healthy.put(bytes.clone().into(), Access::Public).await.unwrap();
    for door in ["serve", "path", "get", "serve an outboard", "truncated"] {
        let dir = tempfile::tempdir().unwrap();
        let blobs = open(dir.path()).await;
        blobs.put(bytes.clone().into(), Access::Public).await.unwrap();
        let mut heard = blobs.damaged();
        match door {
            "serve an outboard" => corrupt(&blobs.layout().outboard(&id), 64 * 3),
            "truncated" => fs::File::options().write(true).open(blobs.layout().data(&id)).unwrap().set_len(9).unwrap(),
            _ => corrupt(&blobs.layout().data(&id), 17 * GROUP_LEN + 3),
        }
        let all = GroupRanges::all(ByteCount(len));
        // An outboard's damage shows by its hashes, which are always compared; the data's once the file has changed.
        let failed = match door {
            "path" => blobs.path(id).await.map(drop).unwrap_err(),
            "get" => blobs.get(id, ByteCount(len)).await.map(drop).unwrap_err(),
            _ => encoding(&blobs, id, &all).map(drop).unwrap_err(),
        };
        assert!(matches!(failed, BlobError::Corrupt { blob, .. } if blob == id), "{door}: {failed}");
        assert_eq!(heard.recv().await.unwrap(), id);
        assert!(!blobs.has(&id), "{door}");
        let partial = partial(&blobs, id, len).await;
        let missing = partial.missing();
        assert!(!missing.is_empty(), "{door}");
        if matches!(door, "serve" | "path" | "get") {
            assert_eq!(missing, GroupRanges::of(17..18), "{door}: only the bad group is fetched again");
        }
        partial.store(&missing, &encoding(&healthy, id, &missing).unwrap()).unwrap();
        partial.finish().unwrap();
        assert_eq!(blobs.get(id, ByteCount(len)).await.unwrap(), bytes, "{door}");
    }
}

#[tokio::test]
async fn mending_a_linked_blob_leaves_the_original_alone() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = open(dir.path()).await;
    let path = dir.path().join("weights");
    fs::write(&path, content(200_000, 7)).unwrap();
    let made = blobs.import_file(&path, ImportMode::Link, Access::Public).await.unwrap();
    corrupt(&path, 20_000);
    let damaged = fs::read(&path).unwrap();
    assert!(blobs.path(made.id).await.is_err());
    let mend = partial(&blobs, made.id, 200_000).await;
    let elsewhere = tempfile::tempdir().unwrap();
    let good = open(elsewhere.path()).await;
    good.put(content(200_000, 7).into(), Access::Public).await.unwrap();
    mend.store(&mend.missing(), &encoding(&good, made.id, &mend.missing()).unwrap()).unwrap();
    mend.finish().unwrap();
    assert_eq!(fs::read(&path).unwrap(), damaged);
    assert_eq!(blobs.get(made.id, ByteCount(1 << 20)).await.unwrap(), content(200_000, 7));
}

/// A partial blob in a directory, as a killed process leaves it; `map` says what becomes of the map.
async fn left_behind(dir: &Path, id: BlobId, len: u64, source: &Blobs, have: &GroupRanges, map: &str) {
    let blobs = open(dir).await;
    let writer = partial(&blobs, id, len).await;
    writer.store(have, &encoding(source, id, have).unwrap()).unwrap();
    drop(writer);
    let path = blobs.layout().map(&id);
    match map {
        "missing" => fs::remove_file(path).unwrap(),
        "torn" => fs::write(&path, &fs::read(&path).unwrap()[..7]).unwrap(),
        "lying" => blobs.layout().write_map(&id, &GroupRanges::all(ByteCount(len))).unwrap(),
        "stale" => blobs.layout().write_map(&id, &GroupRanges::of(0..1)).unwrap(),
        _ => {}
    }
}

#[tokio::test]
async fn a_resumed_fetch_believes_hashes_and_not_the_map() {
    let len = 100 * GROUP_LEN - 77;
    let elsewhere = tempfile::tempdir().unwrap();
    let source = open(elsewhere.path()).await;
    let id = source.put(content(len as usize, 8).into(), Access::Public).await.unwrap();
    for map in ["true", "missing", "torn", "lying", "stale"] {
        let dir = tempfile::tempdir().unwrap();
        let mut have = GroupRanges::of(3..40);
        have.insert(64..80);
        left_behind(dir.path(), id, len, &source, &have, map).await;
        let blobs = open(dir.path()).await;
        // What the map claims is never served unhashed.
        let claimed = blobs.held(&id);
        for range in claimed.iter() {
            let part = GroupRanges::of(range);
            if let Ok(encoded) = encoding(&blobs, id, &part) {
                assert!(proves(id, ByteCount(len), &part, &encoded), "{map}");
            }
        }
        let writer = partial(&blobs, id, len).await;
        let mut wanted = GroupRanges::all(ByteCount(len));
        wanted.subtract(&have);
        assert_eq!(writer.missing(), wanted, "{map}");
        assert!(matches!(writer.finish(), Err(BlobError::Incomplete { .. })));
        writer.store(&wanted, &encoding(&source, id, &wanted).unwrap()).unwrap();
        writer.finish().unwrap();
        drop(writer);
        assert_eq!(open(dir.path()).await.get(id, ByteCount(len)).await.unwrap(), content(len as usize, 8), "{map}");
    }
}

#[tokio::test]
async fn bytes_that_a_crash_tore_are_not_believed() {
    let len = 60 * GROUP_LEN;
    let elsewhere = tempfile::tempdir().unwrap();
    let source = open(elsewhere.path()).await;
    let id = source.put(content(len as usize, 9).into(), Access::Public).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let have = GroupRanges::of(0..32);
    left_behind(dir.path(), id, len, &source, &have, "true").await;
    let layout = Layout::new(dir.path().join("blobs"));
    corrupt(&layout.part(&id), 5 * GROUP_LEN);
    let blobs = open(dir.path()).await;
    let writer = partial(&blobs, id, len).await;
    assert!(writer.missing().contains(5) && !writer.missing().contains(6));
    drop(writer);
    // And an outboard that lost its end with the power.
    fs::File::options().write(true).open(layout.outboard(&id)).unwrap().set_len(64).unwrap();
    let writer = partial(&open(dir.path()).await, id, len).await;
    let missing = writer.missing();
    writer.store(&missing, &encoding(&source, id, &missing).unwrap()).unwrap();
    writer.finish().unwrap();
}

#[tokio::test]
async fn wrong_bytes_never_enter() {
    let len = 20 * GROUP_LEN;
    let elsewhere = tempfile::tempdir().unwrap();
    let source = open(elsewhere.path()).await;
    let id = source.put(content(len as usize, 10).into(), Access::Public).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let blobs = open(dir.path()).await;
    let writer = partial(&blobs, id, len).await;
    assert!(matches!(blobs.partial(id, ByteCount(len), Access::Public).await, Err(BlobError::BeingWritten { .. })));
    let groups = GroupRanges::of(2..9);
    let mut encoded = encoding(&source, id, &groups).unwrap();
    let at = encoded.len() - 1;
    encoded[at] ^= 1;
    assert!(matches!(writer.store(&groups, &encoded), Err(PieceError::Bad { group: 8 })));
    assert_eq!(writer.missing().count(), 20, "nothing of a bad piece is kept");
    encoded[at] ^= 1;
    writer.store(&groups, &encoded).unwrap();
    assert_eq!(blobs.held(&id), groups);
    assert!(matches!(blobs.path(id).await, Err(BlobError::Incomplete { held: 7, groups: 20, .. })));
    assert_eq!(encoding(&blobs, id, &groups).unwrap(), encoded, "a part is served before the whole is here");
    drop(writer);
    let wrong = blobs.partial(id, ByteCount(len + 1), Access::Public).await.unwrap_err();
    assert!(matches!(wrong, BlobError::WrongLength { .. }), "{wrong}");
}

#[tokio::test]
async fn leftovers_of_a_kill_are_settled_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("blobs");
    let bytes = content(70_000, 11);
    let (kept, torn, lost) = {
        let blobs = open(dir.path()).await;
        let kept = blobs.put(bytes.clone().into(), Access::Public).await.unwrap();
        let torn = blobs.put(content(70_000, 12).into(), Access::Public).await.unwrap();
        let lost = blobs.put(content(70_000, 13).into(), Access::Public).await.unwrap();
        (kept, torn, lost)
    };
    let layout = Layout::new(root.clone());
    fs::write(layout.temp_dir().join("1-1"), b"half a file").unwrap();
    fs::write(layout.meta(&torn), b"{\"format\":1,\"le").unwrap();
    fs::remove_file(layout.data(&lost)).unwrap();
    fs::write(root.join("notes.txt"), b"not ours").unwrap();
    let blobs = open(dir.path()).await;
    assert!(fs::read_dir(layout.temp_dir()).unwrap().next().is_none());
    assert_eq!(blobs.get(kept, ByteCount(1 << 20)).await.unwrap(), bytes);
    assert!(!blobs.may_read(&torn, &anyone()), "without its record nobody may read it");
    assert!(blobs.grant(torn, Access::Public).await.unwrap() && blobs.may_read(&torn, &anyone()));
    assert!(blobs.info(&lost).is_none() && !layout.outboard(&lost).exists());
    assert!(root.join("notes.txt").exists());
}

#[tokio::test]
async fn a_held_blob_is_neither_evicted_nor_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = open(dir.path()).await;
    let id = blobs.put(content(30_000, 14).into(), Access::Public).await.unwrap();
    let file = blobs.path(id).await.unwrap();
    assert_eq!(blobs.gc().await.unwrap().blobs, 0);
    assert!(matches!(blobs.delete(id).await, Err(BlobError::InUse { .. })));
    drop(file);
    assert!(blobs.delete(id).await.unwrap());
    assert!(!blobs.delete(id).await.unwrap());
}

/// A figure of this process in bytes, where the system tells.
fn own_memory(figure: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with(figure))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Names the file that the child of the next test imports.
const IMPORT: &str = "SUNDARA_TEST_IMPORT";

/// 256 MiB by default; `SUNDARA_FULL_TESTS=1` makes it 5 GiB. The import runs in a process of its own, so that its memory is
/// its own.
#[tokio::test]
async fn importing_a_large_file_keeps_memory_flat() {
    if let Some(path) = std::env::var_os(IMPORT).map(PathBuf::from) {
        let blobs = open(path.parent().unwrap()).await;
        let Some(before) = own_memory("VmRSS:") else { return };
        let made = blobs.import_file(&path, ImportMode::Link, Access::Public).await.unwrap();
        let peak = own_memory("VmHWM:").unwrap();
        assert_eq!(blobs.held(&made.id).count(), group_count(made.len));
        assert!(peak - before < 24 << 20, "memory grew from {before} to {peak} for {}", made.len);
        return;
    }
    let len: u64 = if std::env::var_os("SUNDARA_FULL_TESTS").is_some() { 5 << 30 } else { 256 << 20 };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large");
    let mut file = fs::File::create(&path).unwrap();
    file.set_len(len).unwrap();
    for at in (0..len).step_by(64 << 20) {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(&at.to_le_bytes()).unwrap();
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "blobs::tests::importing_a_large_file_keeps_memory_flat"])
        .env(IMPORT, &path)
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
}
