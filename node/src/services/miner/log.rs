//! The log of what was offered: declined, accepted, served, and why. What `job list` shows on a miner.
//!
//! Owns its keyspace and the receipts that go with it. A job is logged when it is accepted and again when it is over, each
//! with its receipts in one store batch. The writes are relaxed: a crash may lose the last moments of the log, and with
//! them jobs whose validator sees the miner gone anyway.
//!
//! Invariants: at most `miner.log_max` offers and a margin are kept, the oldest go first; a job that was accepted before a
//! crash and is not over is marked lost at the next start; the same attempt of it is not taken again.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sundara_proto::batch::{Receipt, Stage};
use sundara_proto::crypto::Signed;
use sundara_proto::id::{Hotkey, JobId};
use sundara_proto::job::{JobSpec, Program};
use sundara_proto::pb;
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::WireMessage as _;
use tokio::time::Instant;

use super::admission::Decline;
use crate::service::wall_now;
use crate::services::EntrySender;
use crate::store::{
    JsonTable, KeyRange, Keyspace, MAX_SCAN_RECORDS, SharedStore, StoreError, Table, WriteBatch, delete_range, time_key,
};

/// Offers beyond `miner.log_max` before the oldest are deleted, so that each deletion is worth its batch.
const TRIM_MARGIN: u64 = 512;
/// Declined offers logged a second: a flood of them must not push out what was served.
const DECLINES_LOGGED_A_SECOND: u32 = 10;
/// Attempts remembered, so that none is run twice.
const RECENT_MAX: usize = 8_192;

const OFFERS: JsonTable<LoggedOffer> = Table::new(Keyspace::MinerJobs);

/// What became of an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OfferState {
    /// Not taken; the detail says why.
    Declined,
    /// Taken, not over yet.
    Accepted,
    /// Its result was shown to its validator.
    Served,
    /// Every executor broke.
    Faulted,
    /// Stopped: abandoned, past its deadline, or its validator was gone.
    Abandoned,
    /// This node stopped while it ran.
    Lost,
}

/// One offer as the log keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedOffer {
    /// The job.
    pub job: JobId,
    /// The attempt, from 0.
    pub attempt: u32,
    /// Who offered it.
    pub validator: Hotkey,
    /// What runs, for people.
    pub program: String,
    /// When it was offered; Unix milliseconds.
    pub at: UnixMillis,
    /// What became of it.
    pub state: OfferState,
    /// Reason, outcome or fault, for people.
    pub detail: String,
    /// Milliseconds from the offer to its end.
    pub took_ms: Option<u64>,
}

/// A logged job that is not over.
#[derive(Clone, Debug)]
pub(super) struct Ticket {
    key: bytes::Bytes,
    entry: LoggedOffer,
    since: Instant,
    /// When an executor began.
    pub(super) started: Option<UnixMillis>,
}

pub(super) struct JobLog {
    store: SharedStore,
    entries: EntrySender,
    miner: Hotkey,
    max: u64,
    count: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Highest attempt taken, by job and validator.
    recent: HashMap<(JobId, Hotkey), u32>,
    order: VecDeque<(JobId, Hotkey)>,
    /// Start of the present second of declines, and how many it has.
    declines: Option<(Instant, u32)>,
}

impl JobLog {
    /// Reads the log of an earlier run and settles what it left open.
    pub(super) fn open(store: SharedStore, entries: EntrySender, miner: Hotkey, max: u64) -> Result<Self, StoreError> {
        let mut state = State::default();
        let mut count = 0;
        let mut range = Some(KeyRange::all());
        let mut lost = WriteBatch::new();
        while let Some(r) = range {
            let (rows, next) = OFFERS.scan(store.as_ref(), &r, MAX_SCAN_RECORDS)?;
            range = next;
            for (key, mut entry) in rows {
                count += 1;
                if entry.state != OfferState::Declined {
                    state.remember((entry.job, entry.validator), entry.attempt);
                }
                if entry.state == OfferState::Accepted {
                    entry.state = OfferState::Lost;
                    entry.detail = "this node stopped while the job ran".to_owned();
                    OFFERS.put(&mut lost, key, &entry);
                }
                if !lost.has_room(4 << 10) {
                    drop(store.commit(std::mem::take(&mut lost)));
                }
            }
        }
        // Not put off: the log is asked for as soon as this node is up.
        drop(store.commit(lost));
        Ok(Self { store, entries, miner, max, count: AtomicU64::new(count), state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Highest attempt of a job that this validator's offers had taken, running or over.
    pub(super) fn recent(&self, job: &JobId, validator: &Hotkey) -> Option<u32> {
        self.state().recent.get(&(*job, *validator)).copied()
    }

    /// Newest first.
    pub(super) fn newest(&self, limit: usize) -> Result<Vec<LoggedOffer>, StoreError> {
        let mut found = Vec::new();
        let mut range = Some(KeyRange::all().reversed());
        while let Some(r) = range
            && found.len() < limit
        {
            let (rows, next) = OFFERS.scan(self.store.as_ref(), &r, limit - found.len())?;
            found.extend(rows.into_iter().map(|(_, entry)| entry));
            range = next;
        }
        Ok(found)
    }

    pub(super) fn declined(&self, spec: &Signed<JobSpec>, attempt: u32, validator: Hotkey, decline: &Decline) {
        if !self.state().may_log_decline(Instant::now()) {
            return;
        }
        let detail = format!("{}: {}", reason_in_words(decline.reason), decline.detail);
        let entry = entry(spec, attempt, validator, OfferState::Declined, detail);
        let mut batch = WriteBatch::new();
        OFFERS.put(&mut batch, key_of(&entry), &entry);
        self.count.fetch_add(1, Ordering::Relaxed);
        drop(self.store.commit_relaxed(batch));
    }

    /// Logs that a job was taken, with its receipt.
    pub(super) fn accepted(&self, spec: &Signed<JobSpec>, attempt: u32, validator: Hotkey) -> Ticket {
        let entry = entry(spec, attempt, validator, OfferState::Accepted, String::new());
        let key = key_of(&entry);
        self.state().remember((entry.job, validator), attempt);
        let mut batch = WriteBatch::new();
        OFFERS.put(&mut batch, key.clone(), &entry);
        self.count.fetch_add(1, Ordering::Relaxed);
        let staged = self.entries.stage(&mut batch, self.receipt(&entry, Stage::Accepted, entry.at));
        drop(self.store.commit_relaxed(batch));
        self.entries.send(staged);
        Ticket { key, entry, since: Instant::now(), started: None }
    }

    /// Logs how a job ended, with the receipts of its start and, when it was served, of its end.
    pub(super) fn ended(&self, ticket: &Ticket, state: OfferState, detail: &str, finished: Option<UnixMillis>) {
        let took = u64::try_from(ticket.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let entry = LoggedOffer { state, detail: detail.to_owned(), took_ms: Some(took), ..ticket.entry.clone() };
        let mut batch = WriteBatch::new();
        OFFERS.put(&mut batch, ticket.key.clone(), &entry);
        let steps = [(Stage::Started, ticket.started), (Stage::Finished, finished)];
        let staged: Vec<_> = steps
            .into_iter()
            .filter_map(|(stage, at)| Some(self.entries.stage(&mut batch, self.receipt(&entry, stage, at?))))
            .collect();
        drop(self.store.commit_relaxed(batch));
        staged.into_iter().for_each(|entry| self.entries.send(entry));
    }

    fn receipt(&self, entry: &LoggedOffer, stage: Stage, at: UnixMillis) -> pb::Entry {
        let receipt = Receipt {
            job: entry.job,
            attempt: entry.attempt,
            stage,
            validator: entry.validator,
            miner: self.miner,
            at,
        };
        pb::Entry { kind: Some(pb::entry::Kind::Receipt(receipt.to_raw())) }
    }

    /// Deletes the oldest offers beyond the limit.
    pub(super) async fn trim(&self) -> Result<(), StoreError> {
        let over = self.count.load(Ordering::Relaxed).saturating_sub(self.max);
        if over < TRIM_MARGIN.min(self.max.max(1)) {
            return Ok(());
        }
        let deleted = delete_range(self.store.as_ref(), Keyspace::MinerJobs, &KeyRange::all(), over).await?;
        self.count.fetch_sub(deleted, Ordering::Relaxed);
        Ok(())
    }
}

impl State {
    fn remember(&mut self, key: (JobId, Hotkey), attempt: u32) {
        match self.recent.get_mut(&key) {
            Some(known) => *known = attempt.max(*known),
            None => {
                if self.order.len() >= RECENT_MAX
                    && let Some(oldest) = self.order.pop_front()
                {
                    self.recent.remove(&oldest);
                }
                self.recent.insert(key, attempt);
                self.order.push_back(key);
            }
        }
    }

    fn may_log_decline(&mut self, now: Instant) -> bool {
        let (since, count) = self.declines.get_or_insert((now, 0));
        if now.duration_since(*since) >= Duration::from_secs(1) {
            (*since, *count) = (now, 0);
        }
        *count += 1;
        *count <= DECLINES_LOGGED_A_SECOND
    }
}

fn entry(spec: &Signed<JobSpec>, attempt: u32, validator: Hotkey, state: OfferState, detail: String) -> LoggedOffer {
    let program = match &spec.program {
        Program::Model { model, .. } => format!("model {model}"),
        Program::Builtin { name } => format!("builtin {name}"),
    };
    LoggedOffer { job: spec.id(), attempt, validator, program, at: wall_now(), state, detail, took_ms: None }
}

/// Sorts by time; unique, since a validator offers an attempt once at a time.
fn key_of(entry: &LoggedOffer) -> bytes::Bytes {
    let id = [entry.job.as_bytes().as_slice(), entry.validator.as_bytes(), &entry.attempt.to_be_bytes()].concat();
    time_key(entry.at.0, &id)
}

fn reason_in_words(reason: pb::declined::Reason) -> String {
    reason.as_str_name().to_lowercase().replace('_', " ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use sundara_proto::crypto::{HotkeyPair, Network};
    use sundara_proto::id::BlobId;
    use sundara_proto::job::Limits;
    use sundara_proto::units::{BlockNumber, ByteCount};

    fn spec(nonce: u8) -> Signed<JobSpec> {
        let network = Network::named("log", 1);
        let spec = JobSpec {
            network,
            block: BlockNumber(0),
            nonce: [nonce; 16],
            not_after: UnixMillis(u64::MAX >> 1),
            program: Program::Builtin { name: "echo".into() },
            input: BlobId::of(b""),
            input_len: ByteCount(0),
            params: bytes::Bytes::new(),
            seed: 0,
            limits: Limits::default(),
            replicas: 1,
            hardware_class: String::new(),
            stream: false,
        };
        Signed::sign(&network, &HotkeyPair::from_seed(&[9; 32]), spec)
    }

    fn open(store: &SharedStore, max: u64) -> (JobLog, crate::services::EntryReceiver) {
        let (tx, rx) = crate::services::entries(store).unwrap();
        (JobLog::open(store.clone(), tx, Hotkey([1; 32]), max).unwrap(), rx)
    }

    fn decline() -> Decline {
        Decline { reason: pb::declined::Reason::WrongClass, detail: "no executor here is of class `gpu`".into() }
    }

    #[tokio::test]
    async fn what_was_promised_before_a_crash_is_lost_and_not_taken_again() {
        let store: SharedStore = Arc::new(crate::store::MemoryStore::new());
        let validator = Hotkey([7; 32]);
        let (served, running) = (spec(1), spec(2));
        {
            let (log, _rx) = open(&store, 100);
            let mut ticket = log.accepted(&served, 0, validator);
            ticket.started = Some(wall_now());
            log.ended(&ticket, OfferState::Served, "completed", Some(wall_now()));
            log.accepted(&running, 3, validator);
            log.declined(&spec(3), 0, validator, &decline());
        }
        let (log, rx) = open(&store, 100);
        assert_eq!(rx.left_over.len(), 4, "the receipts wait for a batch");
        assert_eq!(log.recent(&running.id(), &validator), Some(3));
        assert_eq!(log.recent(&served.id(), &validator), Some(0));
        assert_eq!(log.recent(&spec(3).id(), &validator), None, "a declined offer may come again");
        assert_eq!(log.recent(&running.id(), &Hotkey([8; 32])), None);
        let all = log.newest(10).unwrap();
        let state = |id| all.iter().find(|e| e.job == id).unwrap().state;
        assert_eq!(state(running.id()), OfferState::Lost);
        assert_eq!(state(served.id()), OfferState::Served);
        let declined = all.iter().find(|e| e.state == OfferState::Declined).unwrap();
        assert_eq!(declined.detail, "wrong class: no executor here is of class `gpu`");
    }

    #[tokio::test]
    async fn the_log_is_bounded() {
        let store: SharedStore = Arc::new(crate::store::MemoryStore::new());
        let (log, _rx) = open(&store, 10);
        for attempt in 0..40 {
            log.accepted(&spec(1), attempt, Hotkey([7; 32]));
        }
        log.trim().await.unwrap();
        let left = log.newest(100).unwrap();
        assert_eq!(left.len(), 10);
        assert!(left.iter().all(|e| e.attempt >= 30), "the oldest went");
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_declines_is_logged_in_part() {
        let store: SharedStore = Arc::new(crate::store::MemoryStore::new());
        let (log, _rx) = open(&store, 10_000);
        for attempt in 0..500 {
            log.declined(&spec(1), attempt, Hotkey([7; 32]), &decline());
        }
        assert_eq!(log.newest(1_000).unwrap().len(), DECLINES_LOGGED_A_SECOND as usize);
        tokio::time::advance(Duration::from_secs(1)).await;
        log.declined(&spec(1), 500, Hotkey([7; 32]), &decline());
        assert_eq!(log.newest(1_000).unwrap().len(), DECLINES_LOGGED_A_SECOND as usize + 1);
    }
}
