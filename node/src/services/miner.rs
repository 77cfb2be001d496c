//! Miner: takes offers of validators, has its executors run them, and answers for what they attest.
//!
//! Owns the answer to an offer (taken, or declined at once with the reason and the setting), the countersignature, the
//! commitment and its reveal, and the log of what was offered. Does not own how jobs run (`executor`), which executor runs
//! one ([`super::work::pool`]), nor what a validator thinks of it.
//!
//! ```text
//! Offer ─ admission ─▶ Declined
//!    └─▶ Accepted ─▶ executor ─▶ countersigned ─┬─ k = 1 ─▶ Revealed
//!           │            │                      └─▶ Committed ── Reveal ──▶ Revealed
//!           │            └ every executor broke ─▶ Fault             (or dropped after its deadline)
//!           └ Abandon, or the validator is gone ─▶ stopped
//! ```
//!
//! Invariants: an offer is answered once; what was accepted is in the log before its result is shown; a result is shown
//! to the validator that offered the job and to nobody else, and after a commitment only on its Reveal; jobs running and
//! results held are bounded; nothing runs past the offer's deadline.

mod admission;
mod lies;
mod log;
mod metrics;
mod offer;
mod publishers;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sundara_proto::attestation::CountersignedAttestation;
use sundara_proto::crypto::{HotkeyPair, Network, Signed};
use sundara_proto::id::{BlobId, Hotkey, JobId};
use sundara_proto::job::{JobSpec, Limits};
use sundara_proto::pb;
use sundara_proto::units::ByteCount;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::EntrySender;
use super::work::pool::{NoRoom, Pool};
use crate::blobs::Blobs;
use crate::net::{FailureCode, Inbound, NetHandle, PeerIdentity, Reply, RequestKind};
use crate::service::{Tasks, Workers, wall_now};
use crate::services::registry::RegistryHandle;
use crate::store::{SharedStore, StoreError};
use admission::{Decline, Facts};
use log::JobLog;
use publishers::Publishers;

pub(crate) use metrics::MinerMetrics;

pub(crate) use super::work::Misbehaviour;
pub use log::{LoggedOffer, OfferState};

/// Results that wait for their reveal. One holds at most 128 KiB and its attestation.
const HELD_MAX: usize = 1_024;
/// A committed result is kept this long after the offer's deadline: the reveal may come when all replicas are in.
const HELD_AFTER_DEADLINE: Duration = Duration::from_secs(30);
/// Large outputs stay for the validator to fetch this long after they were shown.
const OUTPUT_KEPT: Duration = Duration::from_secs(600);
/// Time between looks for what has expired.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// Sweeps between looks at the disk.
const DISK_EVERY: u32 = 10;

/// What this miner takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct MinerConfig {
    /// Validators whose offers are taken. Default: empty, every node that is certified as a validator.
    pub validators: Vec<Hotkey>,
    /// Validators whose offers are never taken. Default: empty.
    pub deny_validators: Vec<Hotkey>,
    /// Publishers whose models are run. Default: empty, everyone's.
    pub publishers: Vec<Hotkey>,
    /// Whether jobs that need no model are run. Default: true.
    pub builtin_jobs: bool,
    /// Largest input that is fetched. Default: 256 MiB, all that the protocol carries.
    pub input_max: ByteCount,
    /// Offers are declined while the data directory's file system has less room than this. Default: 256 MiB.
    pub free_disk_min: ByteCount,
    /// Offers kept in the log. Default: 10,000.
    pub log_max: u64,
}

impl Default for MinerConfig {
    fn default() -> Self {
        Self {
            validators: Vec::new(),
            deny_validators: Vec::new(),
            publishers: Vec::new(),
            builtin_jobs: true,
            input_max: sundara_proto::wire::limit::INPUT,
            free_disk_min: ByteCount::mib(256),
            log_max: 10_000,
        }
    }
}

/// What the service needs from the rest of the node.
pub(crate) struct MinerParts {
    pub(crate) config: MinerConfig,
    /// Most that one job may ask for: `executor.limits`.
    pub(crate) limits: Limits,
    pub(crate) network: Network,
    /// Countersigns.
    pub(crate) key: HotkeyPair,
    pub(crate) net: NetHandle,
    pub(crate) store: SharedStore,
    pub(crate) blobs: Blobs,
    pub(crate) registry: RegistryHandle,
    pub(crate) pool: Pool,
    /// Checks signatures and signs.
    pub(crate) workers: Workers,
    /// Receipts, on their way to a batch.
    pub(crate) entries: EntrySender,
    /// Whose free room counts.
    pub(crate) data_dir: PathBuf,
    pub(crate) misbehaviour: Option<Misbehaviour>,
    pub(crate) tasks: Tasks,
}

/// One job of one validator. Attempts replace each other.
type Key = (JobId, Hotkey);

/// A job that was taken.
struct Taken {
    attempt: u32,
    stop: CancellationToken,
    stage: Stage,
}

enum Stage {
    Running,
    /// Committed; shown when asked for.
    Held(Box<Held>),
}

/// A result that waits for its reveal.
struct Held {
    answer: Answer,
    salt: [u8; 32],
    until: Instant,
    ticket: log::Ticket,
}

/// What is shown in the end.
#[derive(Clone)]
enum Answer {
    Honest(Shown),
    /// See [`lies`].
    Lie(lies::Lie),
}

/// A countersigned result.
#[derive(Clone)]
struct Shown {
    attestation: Arc<CountersignedAttestation>,
    inline_output: Option<Bytes>,
}

struct Inner {
    config: MinerConfig,
    limits: Limits,
    network: Network,
    key: HotkeyPair,
    net: NetHandle,
    pool: Pool,
    workers: Workers,
    log: JobLog,
    publishers: Publishers,
    misbehaviour: Option<Misbehaviour>,
    tasks: Tasks,
    metrics: MinerMetrics,
    draining: CancellationToken,
    disk_low: AtomicBool,
    taken: Mutex<HashMap<Key, Taken>>,
    /// Number of jobs taken and not over, for whoever drains.
    live: watch::Sender<usize>,
    /// Large outputs that were shown, with the time to remove them.
    shown: mpsc::Sender<BlobId>,
}

/// Handle of the service. Clones share it.
#[derive(Clone)]
pub(crate) struct MinerHandle {
    inner: Arc<Inner>,
}

impl MinerHandle {
    /// The newest offers first, with what became of them.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub(crate) fn log(&self, limit: usize) -> Result<Vec<LoggedOffer>, StoreError> {
        self.inner.log.newest(limit)
    }

    /// What is counted.
    pub(crate) fn metrics(&self) -> &MinerMetrics {
        &self.inner.metrics
    }

    /// Declines what comes, and waits until every job that was taken is over.
    pub(crate) async fn drain(&self) {
        self.inner.draining.cancel();
        let mut live = self.inner.live.subscribe();
        // An error means that the service is gone, and its jobs with it.
        let _gone = live.wait_for(|n| *n == 0).await;
    }
}

/// Starts the service; it ends with its tasks.
///
/// # Errors
/// When the log of an earlier run cannot be read.
pub(crate) fn start(parts: MinerParts) -> Result<MinerHandle, StoreError> {
    let (shown, shown_rx) = mpsc::channel(HELD_MAX);
    let miner = parts.net.local().hotkey;
    let inner = Arc::new(Inner {
        log: JobLog::open(parts.store, parts.entries, miner, parts.config.log_max)?,
        publishers: Publishers::new(parts.config.publishers.clone(), parts.registry, &parts.tasks),
        config: parts.config,
        limits: parts.limits,
        network: parts.network,
        key: parts.key,
        net: parts.net.clone(),
        pool: parts.pool,
        workers: parts.workers,
        misbehaviour: parts.misbehaviour,
        tasks: parts.tasks.clone(),
        metrics: MinerMetrics::default(),
        draining: CancellationToken::new(),
        disk_low: AtomicBool::new(false),
        taken: Mutex::default(),
        live: watch::Sender::new(0),
        shown,
    });
    let requests = parts.net.serve(&[RequestKind::Offer, RequestKind::Reveal, RequestKind::Abandon]);
    let token = parts.tasks.token();
    parts.tasks.spawn("requests", inner.clone().run(requests, token.clone()));
    parts.tasks.spawn("sweep", inner.clone().sweep(parts.data_dir, token.clone()));
    parts.tasks.spawn("outputs", super::work::forget_outputs(parts.blobs, shown_rx, OUTPUT_KEPT, token));
    Ok(MinerHandle { inner })
}

impl Inner {
    fn taken(&self) -> MutexGuard<'_, HashMap<Key, Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self: Arc<Self>, mut requests: mpsc::Receiver<Inbound>, token: CancellationToken) {
        loop {
            let inbound = tokio::select! {
                biased;
                () = token.cancelled() => return,
                inbound = requests.recv() => match inbound { Some(inbound) => inbound, None => return },
            };
            let (peer, request, reply) = inbound.into_parts();
            match request {
                pb::request::Kind::Offer(offer) => self.on_offer(peer, offer, reply),
                pb::request::Kind::Reveal(reveal) => self.on_reveal(peer, &reveal, reply),
                pb::request::Kind::Abandon(abandon) => self.on_abandon(peer, &abandon, reply),
                _ => reply.fail(FailureCode::NotServed, "not a request for a miner"),
            }
        }
    }

    fn on_offer(self: &Arc<Self>, peer: PeerIdentity, offer: pb::Offer, reply: Reply) {
        self.metrics.offers.inc();
        // The signature is checked in the offer's own task; until then the spec is only read.
        let spec = match offer.spec.clone().map(Signed::<JobSpec>::trusted) {
            Some(Ok(spec)) => spec,
            Some(Err(e)) => return self.decline(reply, peer, None, &Decline::malformed(&e.to_string())),
            None => return self.decline(reply, peer, None, &Decline::malformed("the offer has no spec")),
        };
        let job = spec.id();
        if let Err(decline) = self.admit(peer, &offer, &spec, job) {
            return self.decline(reply, peer, Some((&spec, offer.attempt)), &decline);
        }
        let place = match self.pool.reserve(&spec.hardware_class) {
            Ok(place) => place,
            Err(no_room) => {
                let decline = no_place(no_room, &spec.hardware_class);
                return self.decline(reply, peer, Some((&spec, offer.attempt)), &decline);
            }
        };
        let stop = CancellationToken::new();
        self.take((job, peer.hotkey), Taken { attempt: offer.attempt, stop: stop.clone(), stage: Stage::Running });
        let inner = self.clone();
        self.tasks.spawn("offer", async move {
            let key = (job, peer.hotkey);
            let attempt = offer.attempt;
            let run = offer::Accepting { peer, offer, job, place, stop };
            inner.clone().serve_offer(run, reply).await;
            inner.release_running(&key, attempt);
        });
    }

    fn admit(&self, peer: PeerIdentity, offer: &pb::Offer, spec: &JobSpec, job: JobId) -> Result<(), Decline> {
        let (known, held) = {
            let taken = self.taken();
            let known = taken.get(&(job, peer.hotkey)).map(|t| t.attempt);
            let held = taken.values().filter(|t| matches!(t.stage, Stage::Held(_))).count();
            (known.or_else(|| self.log.recent(&job, &peer.hotkey)), held)
        };
        let facts = Facts {
            now: wall_now(),
            network: self.network,
            peer,
            offer,
            spec,
            limits: &self.limits,
            known_attempt: known,
            shutting_down: self.draining.is_cancelled(),
            disk_low: self.disk_low.load(Ordering::Relaxed),
            reveals_full: held >= HELD_MAX,
            publisher_allowed: self.publishers.allows(spec, peer.node),
        };
        admission::decide(&self.config, &facts)
    }

    /// Notes a job as taken; an earlier attempt of the same validator is over.
    fn take(&self, key: Key, new: Taken) {
        let old = self.taken().insert(key, new);
        self.count_live();
        if let Some(old) = old {
            old.stop.cancel();
            if let Stage::Held(held) = old.stage {
                self.drop_held(*held, "a later attempt replaced it");
            }
        }
    }

    /// Forgets a job whose task is over, unless its result is held now or another attempt took its place.
    fn release_running(&self, key: &Key, attempt: u32) {
        {
            let mut taken = self.taken();
            if taken.get(key).is_some_and(|t| t.attempt == attempt && matches!(t.stage, Stage::Running)) {
                taken.remove(key);
            }
        }
        self.count_live();
    }

    fn count_live(&self) {
        let live = self.taken().len();
        self.live.send_if_modified(|old| std::mem::replace(old, live) != live);
    }

    fn decline(&self, reply: Reply, peer: PeerIdentity, what: Option<(&Signed<JobSpec>, u32)>, decline: &Decline) {
        self.metrics.declined.inc();
        if let Some((spec, attempt)) = what {
            self.log.declined(spec, attempt, peer.hotkey, decline);
        }
        let declined = pb::Declined { reason: decline.reason.into(), detail: decline.detail.clone() };
        self.tasks.spawn("decline", async move {
            // A validator that is gone needs no answer.
            let _ = reply.finish(work(pb::work_event::Kind::Declined(declined))).await;
        });
    }

    fn on_reveal(self: &Arc<Self>, peer: PeerIdentity, reveal: &pb::Reveal, reply: Reply) {
        let Ok(job) = JobId::try_from(reveal.job.as_ref()) else {
            return reply.fail(FailureCode::Malformed, "job must have 32 bytes");
        };
        let key = (job, peer.hotkey);
        let held = {
            let mut taken = self.taken();
            match taken.get(&key) {
                Some(t) if t.attempt == reveal.attempt && matches!(t.stage, Stage::Held(_)) => taken.remove(&key),
                Some(t) if t.attempt == reveal.attempt => {
                    return reply.fail(FailureCode::Busy, "the result has not been committed to yet");
                }
                // Also what another validator's job gets: it is not told that the job exists.
                _ => return reply.fail(FailureCode::NotServed, "no such result is held for this validator"),
            }
        };
        let Some(Taken { stage: Stage::Held(held), stop, attempt }) = held else { return };
        let inner = self.clone();
        self.tasks.spawn("reveal", async move {
            if let Err(held) = inner.reveal(*held, peer, reply).await {
                // The answer did not arrive: it may be asked for again.
                let stage = Stage::Held(Box::new(held));
                inner.taken().entry(key).or_insert(Taken { attempt, stop, stage });
            }
            inner.count_live();
        });
    }

    fn on_abandon(self: &Arc<Self>, peer: PeerIdentity, abandon: &pb::Abandon, reply: Reply) {
        let Ok(job) = JobId::try_from(abandon.job.as_ref()) else {
            return reply.fail(FailureCode::Malformed, "job must have 32 bytes");
        };
        let key = (job, peer.hotkey);
        let gone = {
            let mut taken = self.taken();
            match taken.get(&key) {
                // A job that runs is released by its own task.
                Some(t) if t.attempt == abandon.attempt && matches!(t.stage, Stage::Running) => {
                    t.stop.cancel();
                    None
                }
                Some(t) if t.attempt == abandon.attempt => taken.remove(&key),
                _ => None,
            }
        };
        if let Some(Taken { stage: Stage::Held(held), .. }) = gone {
            self.drop_held(*held, "abandoned by its validator");
            self.count_live();
        }
        self.tasks.spawn("abandon", async move {
            let _ = reply.finish(pb::response::Kind::Done(pb::Done {})).await;
        });
    }

    /// Lets a held result go without showing it.
    fn drop_held(&self, held: Held, why: &str) {
        self.log.ended(&held.ticket, OfferState::Abandoned, why, None);
        if let Answer::Honest(shown) = &held.answer {
            self.forget_output(shown);
        }
    }

    /// A large output is removed after a while.
    fn forget_output(&self, shown: &Shown) {
        if shown.inline_output.is_none() {
            // Full: the blob store's own age limit removes it.
            let _ = self.shown.try_send(shown.attestation.attestation.output);
        }
    }

    async fn sweep(self: Arc<Self>, data_dir: PathBuf, token: CancellationToken) {
        let mut tick = tokio::time::interval(SWEEP_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut round = 0_u32;
        loop {
            tokio::select! {
                () = token.cancelled() => return,
                _ = tick.tick() => {}
            }
            self.drop_expired();
            if let Err(e) = self.log.trim().await {
                tracing::warn!(error = %e, "the job log could not be trimmed");
            }
            if round.is_multiple_of(DISK_EVERY) {
                self.look_at_disk(&data_dir).await;
            }
            round = round.wrapping_add(1);
        }
    }

    fn drop_expired(&self) {
        let now = Instant::now();
        let mut expired = Vec::new();
        {
            let mut taken = self.taken();
            let due: Vec<Key> = taken
                .iter()
                .filter(|(_, t)| matches!(&t.stage, Stage::Held(held) if held.until <= now))
                .map(|(key, _)| *key)
                .collect();
            expired.extend(due.iter().filter_map(|key| taken.remove(key)));
        }
        for Taken { stage, .. } in expired {
            if let Stage::Held(held) = stage {
                self.drop_held(*held, "its validator never asked for the reveal");
            }
        }
        self.count_live();
    }

    async fn look_at_disk(&self, data_dir: &std::path::Path) {
        let dir = data_dir.to_path_buf();
        let Ok(Some(free)) = self.workers.run(move || free_bytes(&dir)).await else { return };
        let low = free < self.config.free_disk_min.0;
        if self.disk_low.swap(low, Ordering::Relaxed) != low {
            let free = ByteCount(free);
            if low {
                tracing::warn!(%free, minimum = %self.config.free_disk_min, "disk is low: offers are declined until \
                    there is room; free some, or lower miner.free_disk_min");
            } else {
                tracing::info!(%free, "disk has room again");
            }
        }
    }
}

/// Room on the file system of `dir`; `None` when the system does not say.
fn free_bytes(dir: &std::path::Path) -> Option<u64> {
    let dir = dir.canonicalize().ok()?;
    let disks = sysinfo::Disks::new_with_refreshed_list().ok()?;
    let holds = |disk: &&sysinfo::Disk| dir.starts_with(disk.mount_point());
    let disk = disks.iter().filter(holds).max_by_key(|disk| disk.mount_point().as_os_str().len())?;
    Some(disk.available_space())
}

fn no_place(no_room: NoRoom, class: &str) -> Decline {
    use pb::declined::Reason;
    let (reason, detail) = match no_room {
        NoRoom::NoExecutor => (Reason::NoExecutor, "no executor is attached to this miner".to_owned()),
        NoRoom::WrongClass => (Reason::WrongClass, format!("no executor here is of class `{class}`")),
        NoRoom::Busy => (Reason::Busy, "every executor is full: raise executor.slots or add executors".to_owned()),
    };
    Decline { reason, detail }
}

fn work(kind: pb::work_event::Kind) -> pb::response::Kind {
    pb::response::Kind::Work(pb::WorkEvent { kind: Some(kind) })
}
