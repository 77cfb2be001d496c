//! What the store on disk does at its limits: a full disk, a full queue, and a million jobs that come and go.
#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use sundara_node::store::{
    KeyRange, Keyspace, MAX_VALUE_BYTES, Pending, SledStore, Store, StoreConfig, StoreError, WriteBatch, time_key,
};

const JOBS: Keyspace = Keyspace::Jobs;
const LIFETIMES_ENV: &str = "SUNDARA_STORE_LIFETIMES";

fn config(disk_reserve_bytes: u64) -> StoreConfig {
    let mut config = StoreConfig::default();
    config.disk_reserve_bytes = disk_reserve_bytes;
    config
}

fn open(dir: &Path, disk_reserve_bytes: u64) -> SledStore {
    SledStore::open(dir, &config(disk_reserve_bytes)).unwrap()
}

fn record(number: u32) -> WriteBatch {
    let mut batch = WriteBatch::new();
    batch.put(JOBS, number.to_be_bytes().to_vec(), vec![number as u8; 30_000]);
    batch
}

/// Checks that records `0..count` are there, and at most one more: the last, whose outcome was an error.
fn check_records(store: &dyn Store, count: u32) {
    for number in 0..count {
        let held = store.get(JOBS, &number.to_be_bytes()).unwrap();
        assert!(held.is_some_and(|held| held == vec![number as u8; 30_000]), "record {number} of {count}");
    }
    let beyond = KeyRange::all().from(&(count + 1).to_be_bytes());
    assert!(store.scan(JOBS, &beyond, 1).unwrap().items.is_empty());
}

/// A small file system in memory, unmounted when dropped.
struct SmallDisk {
    at: tempfile::TempDir,
}

impl SmallDisk {
    fn new(megabytes: u32) -> Option<Self> {
        let at = tempfile::tempdir().unwrap();
        let options = format!("size={megabytes}m");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at.path()).stderr(Stdio::null());
        if !mount.status().is_ok_and(|status| status.success()) {
            eprintln!("skipped: a small disk needs root and tmpfs");
            return None;
        }
        Some(Self { at })
    }

    fn store(&self) -> PathBuf {
        self.at.path().join("store")
    }

    /// Takes `megabytes` away until the file is deleted.
    fn fill(&self, megabytes: usize) -> PathBuf {
        let path = self.at.path().join("filler");
        std::fs::write(&path, vec![1; megabytes << 20]).unwrap();
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.at.path()).status();
    }
}

#[test]
fn a_nearly_full_disk_refuses_writes_and_takes_them_again_once_there_is_room() {
    let Some(disk) = SmallDisk::new(32) else { return };
    let filler = disk.fill(16);
    let store = open(&disk.store(), 8 << 20);
    let mut count = 0;
    let err = loop {
        match store.commit(record(count)).wait() {
            Ok(_) => count += 1,
            Err(err) => break err,
        }
    };
    assert!(matches!(err, StoreError::DiskFull { .. }) && err.is_retryable(), "{err}");
    assert!(err.to_string().contains("store.disk_reserve_bytes"), "{err}");
    check_records(&store, count);
    assert!(store.commit(record(count)).wait().is_err(), "it stays full");

    let mut delete = WriteBatch::new();
    delete.delete(JOBS, 0_u32.to_be_bytes().to_vec());
    store.commit(delete).wait().expect("deletions are how room is made");
    store.commit(record(0)).wait().unwrap_err();

    std::fs::remove_file(filler).unwrap();
    for number in [0, count] {
        store.commit(record(number)).wait().unwrap();
    }
    drop(store);
    check_records(&open(&disk.store(), 0), count + 1);
}

#[test]
fn a_disk_that_is_really_full_costs_nothing_acknowledged() {
    for megabytes in [5, 6, 7, 9, 12] {
        let Some(disk) = SmallDisk::new(24) else { return };
        let filler = disk.fill(24 - megabytes);
        let store = open(&disk.store(), 0);
        let mut count = 0;
        let err = loop {
            match store.commit(record(count)).wait() {
                Ok(_) => count += 1,
                Err(err) => break err,
            }
        };
        // Full in the journal, nothing is written; full in sled, the batch is in the journal and writing stops.
        assert!(matches!(err, StoreError::DiskFull { .. } | StoreError::Failed { .. }), "{err}");
        let said = err.to_string();
        assert!(said.contains("full") || said.contains("No space left"), "{said}");
        println!("{megabytes} MiB: {count} records, then: {said}");
        drop(store);
        std::fs::remove_file(filler).unwrap();

        let store = open(&disk.store(), 0);
        check_records(&store, count);
        for number in count..count + 20 {
            store.commit(record(number)).wait().unwrap();
        }
        drop(store);
        check_records(&open(&disk.store(), 0), count + 20);
    }
}

#[test]
fn a_full_queue_refuses_and_loses_nothing_it_took() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 0);
    let mut taken = VecDeque::new();
    let mut busy = 0;
    for number in 0..400_u32 {
        let mut batch = WriteBatch::new();
        batch.put(JOBS, number.to_be_bytes().to_vec(), vec![0; MAX_VALUE_BYTES]);
        taken.push_back((number, store.commit(batch)));
    }
    for (number, outcome) in taken {
        match outcome.wait() {
            Ok(_) => assert!(store.get(JOBS, &number.to_be_bytes()).unwrap().is_some()),
            Err(err) => {
                assert!(matches!(err, StoreError::Busy { .. }) && err.is_retryable(), "{err}");
                busy += 1;
            }
        }
    }
    assert!(busy > 0, "400 MiB were queued at once");
    store.commit(record(0)).wait().unwrap();
}

/// The writes by which a job is taken in, and those by which it ends; the job `WINDOW` before it is forgotten then.
const WINDOW: u64 = 1_000;

fn job_id(number: u64) -> Vec<u8> {
    // Spread over the keyspace as digests are.
    let mut id = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes().to_vec();
    id.resize(32, number as u8);
    id
}

fn event_key(number: u64, event: u8) -> Vec<u8> {
    [&job_id(number)[..], &[event]].concat()
}

fn job_begins(number: u64) -> WriteBatch {
    let mut batch = WriteBatch::new();
    batch.put(JOBS, job_id(number), vec![1; 600]).put(Keyspace::JobEvents, event_key(number, 0), vec![2; 100]);
    batch.put(Keyspace::JobExpiry, time_key(number, &job_id(number)), "");
    batch
}

fn job_ends(number: u64) -> WriteBatch {
    let mut batch = WriteBatch::new();
    batch.put(JOBS, job_id(number), vec![3; 700]).put(Keyspace::Verdicts, job_id(number), vec![4; 300]);
    batch.put(Keyspace::JobEvents, event_key(number, 1), vec![2; 100]);
    batch.put(Keyspace::JobEvents, event_key(number, 2), vec![2; 100]);
    if let Some(old) = number.checked_sub(WINDOW) {
        batch.delete(JOBS, job_id(old)).delete(Keyspace::Verdicts, job_id(old));
        batch.delete(Keyspace::JobExpiry, time_key(old, &job_id(old)));
        for event in 0..3 {
            batch.delete(Keyspace::JobEvents, event_key(old, event));
        }
    }
    batch
}

fn dir_bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().filter_map(|entry| {
        let entry = entry.unwrap();
        // The store deletes and truncates files meanwhile.
        let meta = entry.metadata().ok()?;
        Some(if meta.is_dir() { dir_bytes(&entry.path()) } else { meta.len() })
    });
    entries.sum()
}

/// Runs `SUNDARA_STORE_LIFETIMES` lives of jobs (20,000 where it is not set, 1,000,000 in the full run).
#[test]
fn jobs_that_come_and_go_leave_the_disk_bounded() {
    const DISK_LIMIT: u64 = 96 << 20;
    let lifetimes = std::env::var(LIFETIMES_ENV).map_or(20_000, |lifetimes| lifetimes.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 0);
    let begun = Instant::now();
    let mut in_flight: VecDeque<Pending> = VecDeque::new();
    let mut peak = 0;
    for number in 0..lifetimes {
        in_flight.push_back(store.commit(job_begins(number)));
        in_flight.push_back(store.commit(job_ends(number)));
        while in_flight.len() > 128 {
            in_flight.pop_front().unwrap().wait().unwrap();
        }
        if number % (lifetimes / 50) == 0 {
            peak = peak.max(dir_bytes(dir.path()));
        }
    }
    store.close().wait().unwrap();
    let wall = begun.elapsed();
    let status = store.status();
    drop(store);
    let left = dir_bytes(dir.path());
    let reopening = Instant::now();
    let store = open(dir.path(), 0);
    println!(
        "{lifetimes} lifetimes in {:.1} s ({:.0}/s): {} records of {} bytes held, {} bytes on disk, {peak} at most; reopened in {:.2} s",
        wall.as_secs_f64(),
        lifetimes as f64 / wall.as_secs_f64(),
        status.records,
        status.live_bytes,
        left,
        reopening.elapsed().as_secs_f64(),
    );
    assert_eq!(status.records, 6 * WINDOW + 1, "the last {WINDOW} jobs, and the format");
    assert!(peak < DISK_LIMIT && left < DISK_LIMIT, "{peak} bytes at most, {left} left");
    assert_eq!(store.scan(JOBS, &KeyRange::all(), 4_000).unwrap().items.len() as u64, WINDOW);
    let blobs = std::fs::read_dir(dir.path().join("gen-00000001/db/blobs")).unwrap();
    assert_eq!(blobs.count(), 0, "no value is left to a file that sled does not sync");
}
