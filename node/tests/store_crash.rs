//! What the store on disk promises when its process is killed and when its files are damaged.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sundara_node::store::{KeyRange, Keyspace, SledStore, Store, StoreConfig, StoreError, WriteBatch};

const JOBS: Keyspace = Keyspace::Jobs;
const LAST: Keyspace = Keyspace::JobEvents;

/// Threads of the writer; each writes a sequence of its own.
const WRITERS: u64 = 4;
/// A writer deletes what it wrote this many steps before.
const WINDOW: u64 = 40;

const DIR_ENV: &str = "SUNDARA_STORE_CRASH_DIR";
const CASES_ENV: &str = "SUNDARA_STORE_CORRUPTIONS";
const SEED_ENV: &str = "SUNDARA_STORE_SEED";

/// One test at a time: a process that is being started holds, for a moment, every lock that this one has.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A small journal, so that checkpoints fall into the moments that are hit.
fn config() -> StoreConfig {
    let mut config = StoreConfig::default();
    config.disk_reserve_bytes = 0;
    config.checkpoint_bytes = 64 * 1024;
    config
}

fn seed() -> u64 {
    let seed = std::env::var(SEED_ENV).ok().map(|seed| seed.parse().unwrap());
    let seed = seed.unwrap_or_else(rand::random);
    println!("{SEED_ENV}={seed}");
    seed
}

fn key(writer: u64, step: u64) -> Vec<u8> {
    [writer.to_be_bytes(), step.to_be_bytes()].concat()
}

/// Mostly small, some above what is kept in one piece.
fn value(writer: u64, step: u64) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(writer << 32 ^ step);
    let len = if rng.random_bool(0.1) { rng.random_range(0..20_000) } else { rng.random_range(0..600) };
    let mut value = vec![0; len];
    rng.fill(&mut value[..]);
    value
}

/// One step: the record, the number of the last one in another keyspace, the oldest record deleted.
fn step_batch(writer: u64, step: u64) -> WriteBatch {
    let mut batch = WriteBatch::new();
    batch.put(JOBS, key(writer, step), value(writer, step));
    batch.put(LAST, writer.to_be_bytes().to_vec(), step.to_be_bytes().to_vec());
    if step > WINDOW {
        batch.delete(JOBS, key(writer, step - WINDOW));
    }
    batch
}

fn last_step(store: &dyn Store, writer: u64) -> u64 {
    let last = store.get(LAST, &writer.to_be_bytes()).unwrap();
    last.map_or(0, |last| u64::from_be_bytes(last[..].try_into().unwrap()))
}

/// Checks that the store holds whole steps only, and says how far each writer got.
fn check_steps(store: &dyn Store) -> Vec<u64> {
    (0..WRITERS)
        .map(|writer| {
            let last = last_step(store, writer);
            let found = store.scan(JOBS, &KeyRange::prefix(&writer.to_be_bytes()), 4_096).unwrap();
            let expected =
                (last.saturating_sub(WINDOW) + 1..=last).map(|step| (key(writer, step), value(writer, step)));
            let found = found.items.into_iter().map(|(key, value)| (key.to_vec(), value.to_vec())).collect::<Vec<_>>();
            assert!(
                found == expected.collect::<Vec<_>>(),
                "writer {writer} holds something else than steps up to {last}"
            );
            last
        })
        .collect()
}

/// Writes steps until told to stop, telling each that was acknowledged.
fn write_steps(store: &SledStore, stop: &AtomicBool, acknowledged: impl Fn(u64, u64) + Sync) {
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let acknowledged = &acknowledged;
            scope.spawn(move || {
                let mut step = last_step(store, writer);
                while !stop.load(Ordering::Relaxed) {
                    step += 1;
                    store.commit(step_batch(writer, step)).wait().unwrap();
                    acknowledged(writer, step);
                }
            });
        }
    });
}

/// Not a test of its own: the process that the tests below start and kill. It checks what the one before it left, and
/// says how far that goes, before it writes on. (It, and not the test's own process: sled's background threads outlive a
/// database that is closed, and may cut its file when the next process has it.)
#[test]
fn writer_process() {
    let Some(dir) = std::env::var_os(DIR_ENV) else { return };
    let store = SledStore::open(Path::new(&dir), &config()).unwrap_or_else(|err| panic!("{err}"));
    for (writer, step) in check_steps(&store).into_iter().enumerate() {
        say(&format!("holds {writer} {step}"));
    }
    write_steps(&store, &AtomicBool::new(false), |writer, step| say(&format!("ack {writer} {step}")));
}

/// One write call a line: a kill leaves whole lines.
fn say(line: &str) {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(format!("{line}\n").as_bytes()).unwrap();
    stdout.flush().unwrap();
}

fn start_writer(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer_process", "--nocapture", "--test-threads=1"])
        .env(DIR_ENV, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Reads what the writer says until its end: that it holds all that was acknowledged before, then acknowledgements, which
/// raise `acknowledged`. Tells when the first came.
fn read_acks(stdout: ChildStdout, acknowledged: &[AtomicU64], first: &SyncSender<()>) {
    for line in BufReader::new(stdout).split(b'\n') {
        let line = String::from_utf8_lossy(&line.unwrap()).into_owned();
        let said = |word: &str| {
            let (writer, step) = line.split_once(word)?.1.split_once(' ')?;
            Some((writer.parse::<usize>().ok()?, step.parse::<u64>().ok()?))
        };
        if let Some((writer, step)) = said("holds ") {
            let before = acknowledged[writer].load(Ordering::Relaxed);
            assert!(step >= before, "writer {writer} has steps up to {step} of {before}");
        }
        let Some((writer, step)) = said("ack ") else { continue };
        acknowledged[writer].fetch_max(step, Ordering::Relaxed);
        // Full when the first was told already.
        let _ = first.try_send(());
    }
}

/// Starts a writer over `dir` and lets `stop` end it: `stop` gets the process and a channel that tells the first
/// acknowledgement (or, by its end, that there will be none).
fn with_writer(dir: &Path, acknowledged: &[AtomicU64], stop: impl FnOnce(&mut Child, &Receiver<()>)) {
    let mut child = start_writer(dir);
    let stdout = child.stdout.take().unwrap();
    let (first, told) = sync_channel(1);
    std::thread::scope(|scope| {
        scope.spawn(move || read_acks(stdout, acknowledged, &first));
        stop(&mut child, &told);
        child.wait().unwrap();
    });
}

fn no_acks() -> Vec<AtomicU64> {
    (0..WRITERS).map(|_| AtomicU64::new(0)).collect()
}

fn assert_nothing_lost(store: &dyn Store, acknowledged: &[AtomicU64], when: &str) {
    for (writer, (last, acknowledged)) in check_steps(store).into_iter().zip(acknowledged).enumerate() {
        let acknowledged = acknowledged.load(Ordering::Relaxed);
        assert!(last >= acknowledged, "{when}: writer {writer} has steps up to {last} of {acknowledged}");
    }
}

#[test]
fn a_writer_killed_200_times_loses_nothing_acknowledged() {
    let _turn = turn();
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    let (mut dir, mut acknowledged) = (tempfile::tempdir().unwrap(), no_acks());
    let mut damaged = 0;
    for round in 0..200 {
        let mut lost = false;
        // One in four is hit while it opens, the others once they write.
        let (while_opening, pause) = (rng.random_bool(0.25), Duration::from_micros(rng.random_range(0..40_000)));
        with_writer(dir.path(), &acknowledged, |child, first| {
            // None: the store did not open, and said why above.
            let opened = while_opening || first.recv().is_ok();
            std::thread::sleep(pause);
            child.kill().unwrap();
            damaged += u32::from(!opened);
            lost = !opened;
        });
        if lost {
            println!("round {round}: the store named itself damaged");
            (dir, acknowledged) = (tempfile::tempdir().unwrap(), no_acks());
        }
    }
    // sled 0.34.7 does not always come back from a kill: seen in about one of 600 while other processes kept the disk busy
    // (spacejam/sled#1533 tells of the same). It is named, never silent; what is acknowledged and lost without a word has
    // no excuse.
    assert!(damaged <= 2, "{damaged} of 200 kills damaged the store");
    let store = SledStore::open(dir.path(), &config()).unwrap_or_else(|err| panic!("in the end: {err}"));
    assert_nothing_lost(&store, &acknowledged, "in the end");
    let steps = acknowledged.iter().map(|steps| steps.load(Ordering::Relaxed)).sum::<u64>();
    println!("{steps} commits acknowledged over 200 kills");
}

/// A file system of its own in a file, unmounted when dropped.
struct LoopMount(PathBuf);

impl LoopMount {
    fn of(image: &Path, at: &Path) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(image).arg(at).stderr(Stdio::null()).status();
        mounted.is_ok_and(|status| status.success()).then(|| Self(at.to_path_buf()))
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// An empty ext4 image, if this machine can make one.
fn new_image(path: &Path) -> Option<()> {
    std::fs::File::create(path).unwrap().set_len(128 << 20).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(path).stderr(Stdio::null()).status();
    made.is_ok_and(|status| status.success()).then_some(())
}

/// Copies the image until it did not change meanwhile: what a disk holds at one moment.
fn snapshot(image: &Path, copy: &Path) {
    loop {
        std::fs::copy(image, copy).unwrap();
        if std::fs::read(image).unwrap() == std::fs::read(copy).unwrap() {
            return;
        }
    }
}

#[test]
fn a_power_cut_loses_nothing_acknowledged() {
    let _turn = turn();
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    for round in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        let (image, copy) = (dir.path().join("image"), dir.path().join("copy"));
        let Some(disk) = new_image(&image).and_then(|()| LoopMount::of(&image, &dir.path().join("disk"))) else {
            eprintln!("skipped: the power cut needs root, mkfs.ext4 and a loop device");
            return;
        };
        let acknowledged = no_acks();
        let mut at_the_cut = no_acks();
        with_writer(&disk.0, &acknowledged, |child, first| {
            first.recv().unwrap();
            std::thread::sleep(Duration::from_millis(rng.random_range(0..1_000)));
            let stopped = Command::new("kill").args(["-STOP", &child.id().to_string()]).status().unwrap();
            assert!(stopped.success());
            // Every acknowledgement told so far; the page cache above the image is what the cut takes away.
            at_the_cut = acknowledged.iter().map(|steps| AtomicU64::new(steps.load(Ordering::Relaxed))).collect();
            snapshot(&image, &copy);
            child.kill().unwrap();
        });
        drop(disk);
        let disk = LoopMount::of(&copy, &dir.path().join("copied disk")).unwrap();
        let store = SledStore::open(&disk.0, &config()).unwrap_or_else(|err| panic!("round {round}: {err}"));
        assert_nothing_lost(&store, &at_the_cut, &format!("round {round}"));
        println!("round {round}: {at_the_cut:?} steps acknowledged at the cut");
        drop(store);
    }
}

/// Ways in which a file goes bad.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Truncate,
    Zero,
    Flip,
    Delete,
}

fn damage(path: &Path, kind: Damage, at: u64, len: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = at as usize;
    let end = bytes.len().min(at + len as usize);
    match kind {
        Damage::Delete => return std::fs::remove_file(path).unwrap(),
        Damage::Truncate => bytes.truncate(at),
        Damage::Zero => bytes[at..end].fill(0),
        Damage::Flip => bytes[at] ^= 1 << (len % 8),
    }
    std::fs::write(path, bytes).unwrap();
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.metadata().unwrap().is_dir() {
            copy_dir(&entry.path(), &to.join(entry.file_name()));
        } else {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.metadata().unwrap().is_dir() {
            files.extend(files_in(&entry.path()));
        } else if entry.file_name() != "lock" {
            files.push(entry.path());
        }
    }
    files.sort();
    files
}

/// A store with some history, and a copy of its files as a kill leaves them: `(closed, killed, steps)`.
fn damaged_base(dir: &Path) -> (PathBuf, PathBuf, Vec<u64>) {
    let (open, killed) = (dir.join("closed"), dir.join("killed"));
    let mut store = SledStore::open(&open, &config()).unwrap();
    let mut steps = vec![0; WRITERS as usize];
    for round in 0..150 {
        if round == 75 {
            // So that sled has a snapshot to recover from.
            drop(store);
            store = SledStore::open(&open, &config()).unwrap();
        }
        for (writer, step) in steps.iter_mut().enumerate() {
            *step += 1;
            store.commit(step_batch(writer as u64, *step)).wait().unwrap();
        }
    }
    copy_dir(&open, &killed);
    drop(store);
    (open, killed, steps)
}

/// A directory in memory where there is one: thousands of files are made, synced and deleted.
fn quick_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

#[test]
fn damaged_files_are_named_or_harmless() {
    let _turn = turn();
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    let dir = quick_dir();
    let (closed, killed, steps) = damaged_base(dir.path());
    let cases = std::env::var(CASES_ENV).map_or(240, |cases| cases.parse().unwrap());
    let (mut harmless, mut named) = (0, 0);
    for case in 0..cases {
        let base = [&closed, &killed][case % 2];
        let dir = dir.path().join(format!("case {case}"));
        copy_dir(base, &dir);
        let files = files_in(&dir);
        let file = &files[case / 2 % files.len()];
        let size = std::fs::metadata(file).unwrap().len();
        let kind = [Damage::Truncate, Damage::Zero, Damage::Flip, Damage::Flip, Damage::Delete][rng.random_range(0..5)];
        let at = match rng.random_range(0..4) {
            0 => rng.random_range(0..size.min(64)),
            1 => size - 1 - rng.random_range(0..size.min(64)),
            _ => rng.random_range(0..size),
        };
        damage(file, kind, at, 1 << rng.random_range(0..14));
        let what = format!("case {case}: {kind:?} at {at} of {size} in {}", file.display());
        match SledStore::open(&dir, &config()) {
            Ok(store) => {
                assert_eq!(check_steps(&store), steps, "{what}");
                harmless += 1;
            }
            Err(err @ StoreError::Damaged { .. }) => {
                assert!(err.to_string().contains(dir.to_str().unwrap()), "{what}: {err}");
                assert!(err.to_string().contains("accept_data_loss"), "{what}: {err}");
                check_again_and_salvage(&dir, &steps, &format!("{what}: {err}"));
                named += 1;
            }
            Err(err) => panic!("{what}: {err}"),
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
    println!("{cases} damaged files: {harmless} harmless, {named} named");
    assert!(harmless > 0 && named > 0);
}

/// The next attempt must not be worse: an error again, or everything is there. With the loss accepted a damaged store
/// opens, holds nothing that was not written, and works.
fn check_again_and_salvage(dir: &Path, steps: &[u64], what: &str) {
    match SledStore::open(dir, &config()) {
        Ok(store) => return assert_eq!(check_steps(&store), steps, "{what}"),
        Err(again) => assert!(matches!(again, StoreError::Damaged { .. }), "{what}, and the next time: {again}"),
    }
    let mut config = config();
    config.accept_data_loss = true;
    let store = SledStore::open(dir, &config).unwrap_or_else(|err| panic!("{what}: {err}"));
    for (found, held) in store.scan(JOBS, &KeyRange::all(), 4_096).unwrap().items {
        let (writer, step) = found.split_first_chunk::<8>().unwrap();
        let (writer, step) = (u64::from_be_bytes(*writer), u64::from_be_bytes(step.try_into().unwrap()));
        assert_eq!(held, value(writer, step), "{what}");
    }
    store.commit(step_batch(0, 10_000)).wait().unwrap();
    drop(store);
    let store = SledStore::open(dir, &self::config()).unwrap_or_else(|err| panic!("{what}: {err}"));
    assert_eq!(last_step(&store, 0), 10_000, "{what}");
}
