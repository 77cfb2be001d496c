//! Services: drivers that stand between the ports and the domain. They hold ports and never import one another; what they
//! tell each other travels through the channels of this module, which the builder wires.

#[cfg(feature = "executor")]
pub(crate) mod adverts;
#[cfg(feature = "executor")]
pub(crate) mod audit;
#[cfg(feature = "executor")]
pub(crate) mod batches;
pub(crate) mod casebook;
pub(crate) mod directory;
#[cfg(feature = "executor")]
pub(crate) mod dispatch;
#[cfg(feature = "executor")]
pub(crate) mod executor;
#[cfg(feature = "executor")]
pub(crate) mod executors;
#[cfg(feature = "executor")]
pub(crate) mod intake;
pub(crate) mod jobs;
#[cfg(feature = "executor")]
pub(crate) mod miner;
#[cfg(feature = "executor")]
pub(crate) mod pages;
pub(crate) mod proofs;
pub(crate) mod reduce;
pub(crate) mod registry;
pub(crate) mod rejoin;
#[cfg(feature = "executor")]
pub(crate) mod scores;
pub(crate) mod transfer;
#[cfg(feature = "executor")]
pub(crate) mod work;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{EngineId, Hotkey, JobId};
use sundara_proto::job::JobSpec;
use sundara_proto::pb;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::domain::admission::Admission;
use crate::domain::audit::EpochSecret;
use crate::domain::job::{AuditResult, Submission};
use crate::store::{Keyspace, SharedStore, StoreError, WriteBatch};

/// What intake admitted, on its way to dispatch. 1,024 submissions are half a second of the fastest testnet; beyond it
/// intake answers that the validator is busy.
pub(crate) const ADMITTED_QUEUED_MAX: usize = 1_024;
/// Events on their way to one watcher of a job; output beyond it is left out, since the result has it.
pub(crate) const WATCH_QUEUED_MAX: usize = 64;

/// A request about a job that intake checked.
pub(crate) enum Admitted {
    /// Run it, and tell the watcher.
    Submit {
        /// For the job machine.
        submission: Box<Submission>,
        /// Input that rode in the request; `None`: it is in the blob store.
        inline_input: Option<Bytes>,
        /// Dropped when the job ends.
        watcher: Watcher,
        /// Held until the job ends; `None` where it has one already.
        place: Option<Place>,
    },
    /// Tell the watcher about a job that is known already.
    Watch {
        /// The job.
        job: JobId,
        /// Who asks: only the requester is told more than that the job is known.
        asker: Hotkey,
        /// Whom to tell.
        watcher: Watcher,
    },
    /// The requester wants no result any more.
    Cancel {
        /// The job.
        job: JobId,
        /// Who asks: only the requester may.
        asker: Hotkey,
    },
}

/// A job's place among those that its requester may have at once: given back when dropped, whoever listens by then.
pub(crate) struct Place {
    /// Who counts.
    pub(crate) admission: Arc<Mutex<Admission>>,
    /// Which job.
    pub(crate) job: JobId,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.lock().unwrap_or_else(PoisonError::into_inner).release(&self.job);
    }
}

/// Receives the events of one job; ends when dispatch drops it.
pub(crate) type Watcher = mpsc::Sender<pb::job_event::Kind>;

/// An audit that dispatch wants.
pub(crate) struct AuditOrder {
    /// The job.
    pub(crate) job: JobId,
    /// The attempt that is checked.
    pub(crate) attempt: u32,
    /// What to run.
    pub(crate) spec: Arc<Signed<JobSpec>>,
    /// Engine to run it on.
    pub(crate) engine: EngineId,
    /// Input that rode in the request; `None`: it is in the blob store.
    pub(crate) inline_input: Option<Bytes>,
    /// After this nobody waits for it.
    pub(crate) deadline: Duration,
    /// Cancelled when nobody wants it any more.
    pub(crate) cancel: CancellationToken,
}

/// A miner that a trusted validator's fraud proof names, on its way to scheduling.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Convicted {
    /// Who is to be dropped.
    pub(crate) miner: Hotkey,
    /// Whose word it is.
    pub(crate) accuser: Hotkey,
    /// Over which job.
    pub(crate) job: JobId,
}

/// What the audit service tells dispatch.
pub(crate) enum AuditNews {
    /// An order is done, or cannot be.
    Done {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: u32,
        /// What came of it.
        result: AuditResult,
    },
    /// Engines of the validator's own executors changed.
    Engines(Vec<EngineId>),
    /// A new epoch began.
    Epoch(EpochSecret),
}

/// Entries on their way to a batch. 16 pages: what a second of the fastest testnet makes several times over.
const ENTRIES_QUEUED_MAX: usize = 8_192;

/// An entry that is kept in the outbox until a page holds it.
pub(crate) struct Staged {
    /// Key in the outbox.
    pub(crate) key: [u8; 8],
    /// The entry.
    pub(crate) entry: pb::Entry,
}

/// Hands attestations, receipts and verdicts to the batches service.
///
/// Two steps, so that nothing is lost by a crash between them: [`Self::stage`] puts the entry into the writer's own store
/// batch, and after that batch is durable [`Self::send`] hands it on. What was staged and not yet paged is found again at
/// the next start.
#[derive(Clone)]
pub(crate) struct EntrySender {
    next: Arc<AtomicU64>,
    tx: mpsc::Sender<Staged>,
}

/// The other end, for the batches service.
pub(crate) struct EntryReceiver {
    pub(crate) rx: mpsc::Receiver<Staged>,
    /// Staged before the last crash or shutdown.
    pub(crate) left_over: Vec<Staged>,
}

/// Makes the channel, and finds what an earlier run left in the outbox.
pub(crate) fn entries(store: &SharedStore) -> Result<(EntrySender, EntryReceiver), StoreError> {
    let mut left_over = Vec::new();
    let mut next = 0;
    let mut range = Some(crate::store::KeyRange::all());
    while let Some(r) = range {
        let page = store.scan(Keyspace::Outbox, &r, crate::store::MAX_SCAN_RECORDS)?;
        for (key, value) in page.items {
            let (Ok(key), Ok(entry)) = (<[u8; 8]>::try_from(&key[..]), pb::Entry::decode(value)) else {
                tracing::warn!("an entry of the outbox is unreadable and was passed over");
                continue;
            };
            next = u64::from_be_bytes(key) + 1;
            left_over.push(Staged { key, entry });
        }
        range = page.next;
    }
    let (tx, rx) = mpsc::channel(ENTRIES_QUEUED_MAX);
    Ok((EntrySender { next: Arc::new(AtomicU64::new(next)), tx }, EntryReceiver { rx, left_over }))
}

impl EntrySender {
    /// Puts `entry` into the outbox as part of `batch`.
    pub(crate) fn stage(&self, batch: &mut WriteBatch, entry: pb::Entry) -> Staged {
        let key = self.next.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        batch.put(Keyspace::Outbox, key.to_vec(), entry.encode_to_vec());
        Staged { key, entry }
    }

    /// Hands a staged entry on. When the batches service lags, the entry stays in the outbox for the next start.
    pub(crate) fn send(&self, staged: Staged) {
        if self.tx.try_send(staged).is_err() {
            tracing::debug!("batches lag; an entry waits in the outbox");
        }
    }
}
