//! Jobs that wait or run, beside what the machine knows of them: spec, input, watchers, output.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{BlobId, JobId};
use sundara_proto::job::JobSpec;
use sundara_proto::pb;
use tokio_util::sync::CancellationToken;

use crate::domain::job::{Part, Submission};
use crate::services::{Place, Watcher};
use crate::store::{Keyspace, SharedStore};

/// Inline inputs and outputs held in memory; beyond it they are read from the store when they are needed.
const INLINE_HELD_MAX: usize = 64 << 20;
/// Watchers of one job: the requester, again after a reconnect.
const WATCHERS_MAX: usize = 4;

/// Events of one job kept until it is acknowledged: more than a disk's delay brings, and what is beyond is provisional.
const UNSAID_MAX: usize = 64;

/// One of them.
pub(crate) struct LiveJob {
    pub(crate) spec: Arc<Signed<JobSpec>>,
    /// Where it is held in memory.
    inline_input: Option<Bytes>,
    /// Whether the input rode in the request (and is in the store), or is a blob.
    pub(crate) has_inline_input: bool,
    /// Written with the first record of the job.
    pub(crate) input_kept: bool,
    watchers: Vec<Watcher>,
    /// What came before the job was durable: it may be said once the requester knows that the job is taken. `None` from
    /// then on.
    unsaid: Option<Vec<pb::job_event::Kind>>,
    /// Its requester's, since it came to this run.
    place: Option<Place>,
    /// Result bytes that came with an attestation, by digest.
    outputs: Vec<(BlobId, Bytes)>,
    /// The audit under way.
    pub(crate) audit: Option<CancellationToken>,
    /// Offers that were made, to cut those that are abandoned.
    offers: Vec<(Part, CancellationToken)>,
}

impl LiveJob {
    fn held(&self) -> usize {
        self.inline_input.as_ref().map_or(0, Bytes::len) + self.outputs.iter().map(|(_, b)| b.len()).sum::<usize>()
    }

    /// Input that rode in the request: from memory, or from the store.
    pub(crate) fn inline_input(&self, store: &SharedStore) -> Option<Bytes> {
        if self.inline_input.is_some() || !self.has_inline_input {
            return self.inline_input.clone();
        }
        match store.get(Keyspace::Inputs, self.spec.id().as_ref()) {
            Ok(found) => found,
            Err(e) => {
                tracing::error!(job = %self.spec.id(), error = %e, "input cannot be read");
                None
            }
        }
    }

    /// Output bytes with that digest, where a miner sent them.
    pub(crate) fn output(&self, digest: &BlobId) -> Option<Bytes> {
        self.outputs.iter().find(|(id, _)| id == digest).map(|(_, bytes)| bytes.clone())
    }

    /// Notes an offer, and gives what cuts it and the reveal that follows it.
    pub(crate) fn offered(&mut self, part: Part) -> CancellationToken {
        self.offers.retain(|(p, _)| *p != part);
        self.cut(part)
    }

    /// What cuts the offer of this part.
    pub(crate) fn cut(&mut self, part: Part) -> CancellationToken {
        if let Some((_, known)) = self.offers.iter().find(|(p, _)| *p == part) {
            return known.clone();
        }
        let cut = CancellationToken::new();
        self.offers.push((part, cut.clone()));
        cut
    }

    /// Tells of the job's progress, in order and not before it is acknowledged.
    pub(crate) fn progress(&mut self, event: pb::job_event::Kind) {
        if matches!(event, pb::job_event::Kind::Acknowledged(_)) {
            self.tell(&event);
            self.unsaid.take().unwrap_or_default().iter().for_each(|event| self.tell(event));
            return;
        }
        match &mut self.unsaid {
            None => self.tell(&event),
            Some(unsaid) if unsaid.len() < UNSAID_MAX => unsaid.push(event),
            Some(_) => {}
        }
    }

    pub(crate) fn tell(&self, event: &pb::job_event::Kind) {
        self.watchers.iter().for_each(|w| tell(w, event.clone()));
    }
}

/// Hands an event to a watcher. One that lags misses provisional output; the last event waits for room in a task of its
/// own, because the requester must see its result.
pub(crate) fn tell(watcher: &Watcher, event: pb::job_event::Kind) {
    let last = matches!(event, pb::job_event::Kind::Finished(_) | pb::job_event::Kind::Refused(_));
    if let Err(tokio::sync::mpsc::error::TrySendError::Full(event)) = watcher.try_send(event)
        && last
    {
        let watcher = watcher.clone();
        tokio::spawn(async move {
            // The watcher's own task ends with its peer, and this one with it.
            let _peer_gone = watcher.send(event).await;
        });
    }
}

/// All of them.
#[derive(Default)]
pub(crate) struct LiveJobs {
    jobs: HashMap<JobId, LiveJob>,
    held: usize,
}

impl LiveJobs {
    pub(crate) fn len(&self) -> usize {
        self.jobs.len()
    }

    pub(crate) fn get(&self, job: &JobId) -> Option<&LiveJob> {
        self.jobs.get(job)
    }

    pub(crate) fn get_mut(&mut self, job: &JobId) -> Option<&mut LiveJob> {
        self.jobs.get_mut(job)
    }

    /// A submission that the machine will be told next. Known jobs gain a watcher.
    pub(crate) fn submitted(
        &mut self,
        submission: &Submission,
        inline: Option<Bytes>,
        watcher: Watcher,
        place: Option<Place>,
    ) {
        let len = inline.as_ref().map_or(0, Bytes::len);
        let room = self.held + len <= INLINE_HELD_MAX;
        let live = self.jobs.entry(submission.job).or_insert_with(|| {
            self.held += len;
            LiveJob {
                spec: submission.spec.clone(),
                has_inline_input: inline.is_some(),
                inline_input: inline,
                input_kept: false,
                watchers: Vec::new(),
                unsaid: Some(Vec::new()),
                place: None,
                outputs: Vec::new(),
                audit: None,
                offers: Vec::new(),
            }
        });
        live.place = live.place.take().or(place);
        live.watchers.retain(|w| !w.is_closed());
        if live.watchers.len() < WATCHERS_MAX {
            live.watchers.push(watcher);
        }
        if !room {
            tracing::debug!(job = %submission.job, held = self.held, "inputs in memory are at their limit");
        }
    }

    /// An open job of an earlier run.
    pub(crate) fn restored(&mut self, submission: &Submission) {
        let has_inline_input = submission.spec.input_len.0 <= sundara_proto::wire::limit::INLINE as u64;
        self.jobs.insert(
            submission.job,
            LiveJob {
                spec: submission.spec.clone(),
                inline_input: None,
                has_inline_input,
                input_kept: true,
                watchers: Vec::new(),
                unsaid: None,
                place: None,
                outputs: Vec::new(),
                audit: None,
                offers: Vec::new(),
            },
        );
    }

    pub(crate) fn watch(&mut self, job: &JobId, watcher: Watcher) -> bool {
        let Some(live) = self.jobs.get_mut(job) else { return false };
        live.watchers.retain(|w| !w.is_closed());
        let room = live.watchers.len() < WATCHERS_MAX;
        if room {
            live.watchers.push(watcher);
        }
        room
    }

    /// Input is durable: it need not be held when memory is short.
    pub(crate) fn input_durable(&mut self, job: &JobId) {
        if self.held <= INLINE_HELD_MAX {
            return;
        }
        if let Some(live) = self.jobs.get_mut(job)
            && let Some(bytes) = live.inline_input.take()
        {
            self.held -= bytes.len();
        }
    }

    /// Keeps result bytes that came with an attestation. Each digest once.
    pub(crate) fn add_output(&mut self, job: &JobId, digest: BlobId, bytes: Bytes) {
        let Some(live) = self.jobs.get_mut(job) else { return };
        if live.output(&digest).is_none() {
            self.held += bytes.len();
            live.outputs.push((digest, bytes));
        }
    }

    pub(crate) fn remove(&mut self, job: &JobId) -> Option<LiveJob> {
        let mut live = self.jobs.remove(job)?;
        self.held -= live.held();
        // Before its requester hears of the end, and sends the next.
        drop(live.place.take());
        Some(live)
    }
}
