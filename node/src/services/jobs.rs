//! Jobs client: signs orders, finds validators for them and believes only proven results.
//!
//! **Owns** the jobs that this node submitted, from the order to the verdict, and their records in the store.
//!
//! **Does not own** anything of how a job is run: that is the validator's.
//!
//! **Invariants**: a job ends once; a result is handed out only with a verdict of a trusted validator over this very job
//! and, where the output is inline, over these very bytes; the number of open jobs is bounded.

mod drive;
mod track;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use sundara_proto::crypto::{HotkeyPair, Network, Signed};
use sundara_proto::id::{BlobId, Hotkey, JobId};
use sundara_proto::job::{JobSpec, Limits, Program};
use sundara_proto::names::Topic;
use sundara_proto::pb;
use sundara_proto::units::{BlockNumber, ByteCount, UnixMillis};
use sundara_proto::wire::limit;

use crate::api::jobs::{
    JobEvent, JobFailure, JobInput, JobOrder, JobPhase, JobResult, JobSummary, ProgramRef, SubmitError,
};
use crate::blobs::{Access, Blobs, ImportMode, Reader, Sources, TransferHandle};
use crate::net::{GossipError, NetHandle};
use crate::service::Tasks;
use crate::services::directory::Directory;
use crate::services::registry::RegistryHandle;
use crate::store::{
    JsonTable, KeyRange, Keyspace, MAX_SCAN_RECORDS, SharedStore, Store, StoreError, Table, WriteBatch, delete_range,
    time_key,
};

pub(crate) use track::Tracked;

/// How a node submits jobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct JobsConfig {
    /// Hotkeys of the validators whose verdicts are believed. Without a chain there must be one at least.
    pub trusted_validators: Vec<Hotkey>,
    /// Jobs open at once; one holds about 10 KiB and its input.
    pub open_max: usize,
    /// Ended jobs kept for `job list`.
    pub kept_max: usize,
}

impl Default for JobsConfig {
    fn default() -> Self {
        Self { trusted_validators: Vec::new(), open_max: 8_192, kept_max: 10_000 }
    }
}

/// A resolved reference is used this long before the registry is asked again.
const RESOLVED_FOR: Duration = Duration::from_secs(5);
/// Resolved references kept.
const RESOLVED_MAX: usize = 256;

/// What is kept of an ended job.
#[derive(Serialize, Deserialize)]
struct Kept {
    program: String,
    phase: JobPhase,
    submitted_at: UnixMillis,
    detail: String,
}

const REQUESTS: JsonTable<Kept> = Table::new(Keyspace::Requests);

/// Handle of the service. Clones share it.
#[derive(Clone)]
pub(crate) struct JobsClient {
    inner: Arc<Inner>,
}

/// What the service needs from the rest of the node.
pub(crate) struct JobsClientParts {
    pub(crate) config: JobsConfig,
    pub(crate) network: Network,
    pub(crate) key: HotkeyPair,
    pub(crate) net: NetHandle,
    pub(crate) directory: Directory,
    pub(crate) store: SharedStore,
    pub(crate) blobs: Blobs,
    pub(crate) transfer: TransferHandle,
    pub(crate) registry: RegistryHandle,
    pub(crate) tasks: Tasks,
}

struct Resolved {
    program: Program,
    limits: Limits,
    at: Instant,
}

pub(crate) struct Inner {
    config: JobsConfig,
    network: Network,
    key: HotkeyPair,
    net: NetHandle,
    store: SharedStore,
    blobs: Blobs,
    transfer: TransferHandle,
    registry: RegistryHandle,
    tasks: Tasks,
    directory: Directory,
    jobs: Mutex<Jobs>,
    resolved: Mutex<HashMap<(String, String), Resolved>>,
    /// Why the last round of candidates took nothing, for the message of a job that expires.
    waiting: Mutex<Option<String>>,
}

/// Open jobs, and the newest ended ones in order.
#[derive(Default)]
struct Jobs {
    all: HashMap<JobId, Arc<Tracked>>,
    ended: std::collections::VecDeque<JobId>,
}

pub(crate) fn wall_now() -> UnixMillis {
    crate::service::wall_now()
}

impl JobsClient {
    /// Starts the service; it ends with its tasks.
    pub(crate) fn start(parts: JobsClientParts) -> Self {
        let (store, kept_max) = (parts.store.clone(), parts.config.kept_max);
        parts.tasks.spawn("retain", async move {
            // This run deletes its own; those of earlier runs it would not know.
            if let Err(e) = retain(store.as_ref(), kept_max).await {
                tracing::warn!(error = %e, "old jobs cannot be deleted");
            }
        });
        Self {
            inner: Arc::new(Inner {
                config: parts.config,
                network: parts.network,
                key: parts.key,
                net: parts.net,
                store: parts.store,
                blobs: parts.blobs,
                transfer: parts.transfer,
                registry: parts.registry,
                tasks: parts.tasks,
                directory: parts.directory,
                jobs: Mutex::default(),
                resolved: Mutex::default(),
                waiting: Mutex::default(),
            }),
        }
    }

    pub(crate) async fn submit(&self, order: JobOrder) -> Result<Arc<Tracked>, SubmitError> {
        let inner = &self.inner;
        if inner.config.trusted_validators.is_empty() {
            return Err(SubmitError::NoTrust);
        }
        check(&order)?;
        let (program, limits) = inner.resolve(&order).await?;
        let (input, input_len, inline_input) = inner.take_input(&order.input).await?;
        let now = wall_now();
        let spec = JobSpec {
            network: inner.network,
            block: BlockNumber(0),
            nonce: rand::random(),
            not_after: now.plus(order.not_after),
            program,
            input,
            input_len,
            params: order.params.clone(),
            seed: order.seed,
            limits,
            replicas: order.replicas,
            hardware_class: order.hardware_class.clone(),
            stream: order.stream,
        };
        let spec = Signed::sign(&inner.network, &inner.key, spec);
        if order.announce {
            inner.serve_input(&spec, inline_input.as_ref()).await?;
        }
        let job = Arc::new(Tracked::new(spec, inline_input, order.announce, now));
        inner.admit(&job)?;
        inner.tasks.spawn("job", drive::drive(inner.clone(), job.clone()));
        Ok(job)
    }

    pub(crate) fn get(&self, id: JobId) -> Option<Arc<Tracked>> {
        self.inner.jobs().all.get(&id).cloned()
    }

    pub(crate) fn list(&self, limit: usize) -> Vec<JobSummary> {
        let mut summaries: Vec<JobSummary> = self.inner.jobs().all.values().map(|job| job.summary()).collect();
        if summaries.len() < limit {
            summaries.extend(self.inner.kept(limit));
        }
        summaries.sort_by(|a, b| b.submitted_at.cmp(&a.submitted_at).then_with(|| a.id.cmp(&b.id)));
        summaries.dedup_by_key(|s| s.id);
        summaries.truncate(limit);
        summaries
    }

    pub(crate) async fn cancel(&self, job: &Tracked) {
        if let Some(validator) = job.validator()
            && let Some(node) = self.inner.directory.snapshot().validators.get(&validator)
        {
            let request = pb::request::Kind::Cancel(pb::CancelJob { job: job.id().into() });
            if let Err(e) = self.inner.net.request_one(*node, request).await {
                tracing::debug!(job = %job.id(), %validator, error = %e, "cancel not delivered");
            }
        }
        job.cancelled.cancel();
    }

    pub(crate) async fn output(&self, job: &Tracked, result: &JobResult) -> Result<Bytes, JobFailure> {
        if let Some(bytes) = &result.output {
            return Ok(bytes.clone());
        }
        let (blob, len) = (result.verdict.output, result.verdict.output_len);
        let hints = job.validator().and_then(|v| self.inner.directory.snapshot().validators.get(&v).copied());
        let sources = Sources::peers(hints);
        let mine = Access::only([Reader::Hotkey(self.inner.key.hotkey())]);
        let gone = |e: String| JobFailure::Failed(format!("output {blob} cannot be fetched: {e}"));
        self.inner.transfer.fetch(blob, len, sources, mine).await.map_err(|e| gone(e.to_string()))?;
        self.inner.blobs.get(blob, limit::INPUT).await.map_err(|e| gone(e.to_string()))
    }
}

/// Deletes the oldest kept jobs beyond `kept_max`.
async fn retain(store: &dyn Store, kept_max: usize) -> Result<(), StoreError> {
    let mut kept = 0_usize;
    let mut range = Some(KeyRange::all());
    while let Some(r) = range {
        let page = store.scan(Keyspace::Requests, &r, MAX_SCAN_RECORDS)?;
        kept += page.items.len();
        range = page.next;
    }
    let over = kept.saturating_sub(kept_max) as u64;
    if over > 0 {
        delete_range(store, Keyspace::Requests, &KeyRange::all(), over).await?;
    }
    Ok(())
}

/// What goes on gossip.
fn announcement(spec: &Signed<JobSpec>, inline_input: Option<Bytes>) -> pb::JobRequest {
    pb::JobRequest { spec: Some(spec.to_wire()), inline_input, announce: true }
}

/// Refuses what no validator would take.
fn check(order: &JobOrder) -> Result<(), SubmitError> {
    let bad = |text: String| Err(SubmitError::Order(text));
    if order.params.len() > limit::PARAMS {
        return bad(format!(
            "params of {} bytes exceed {}: put them into the input",
            order.params.len(),
            limit::PARAMS
        ));
    }
    if order.replicas == 0 || usize::from(order.replicas) > limit::REPLICAS {
        return bad(format!("replicas must be 1 to {}, not {}", limit::REPLICAS, order.replicas));
    }
    if order.not_after > JobSpec::NOT_AFTER_MAX {
        return bad(format!("not_after must be at most {} h", JobSpec::NOT_AFTER_MAX.as_secs() / 3600));
    }
    if let Some(limits) = order.limits
        && !limits.within(&Limits::MAX)
    {
        return bad(format!("limits exceed the protocol's {:?}", Limits::MAX));
    }
    Ok(())
}

impl Inner {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, job: &Arc<Tracked>) -> Result<(), SubmitError> {
        let mut jobs = self.jobs();
        let open = jobs.all.len() - jobs.ended.len();
        if open >= self.config.open_max {
            return Err(SubmitError::TooMany { open, max: self.config.open_max });
        }
        jobs.all.insert(job.id(), job.clone());
        Ok(())
    }

    /// Notes a job's end, keeps a line of it, and forgets the oldest ended ones.
    fn ended(&self, job: &Arc<Tracked>, event: JobEvent) {
        job.push(event);
        let forgotten = {
            let mut jobs = self.jobs();
            jobs.ended.push_back(job.id());
            let over = jobs.ended.len().saturating_sub(self.config.kept_max);
            let forgotten: Vec<JobId> = jobs.ended.drain(..over).collect();
            forgotten.into_iter().filter_map(|id| jobs.all.remove(&id)).collect::<Vec<_>>()
        };
        let mut batch = WriteBatch::new();
        for old in &forgotten {
            REQUESTS.delete(&mut batch, time_key(old.submitted_at.0, old.id().as_ref()));
        }
        let summary = job.summary();
        let kept = Kept {
            program: summary.program,
            phase: summary.phase,
            submitted_at: summary.submitted_at,
            detail: summary.detail,
        };
        REQUESTS.put(&mut batch, time_key(kept.submitted_at.0, job.id().as_ref()), &kept);
        // The requester has its result; a crash that loses this line loses only a line of `job list`.
        drop(self.store.commit_relaxed(batch));
    }

    fn kept(&self, limit: usize) -> Vec<JobSummary> {
        let rows = match REQUESTS.scan(&*self.store, &KeyRange::all().reversed(), limit) {
            Ok((rows, _)) => rows,
            Err(e) => {
                tracing::warn!(error = %e, "kept jobs cannot be listed");
                return Vec::new();
            }
        };
        rows.into_iter()
            .filter_map(|(key, kept)| {
                let id = JobId::try_from(crate::store::time_key_id(&key)).ok()?;
                Some(JobSummary {
                    id,
                    program: kept.program,
                    phase: kept.phase,
                    submitted_at: kept.submitted_at,
                    detail: kept.detail,
                })
            })
            .collect()
    }

    async fn resolve(&self, order: &JobOrder) -> Result<(Program, Limits), SubmitError> {
        let reference = match &order.program {
            ProgramRef::Builtin(name) => {
                return Ok((Program::Builtin { name: name.clone() }, order.limits.unwrap_or_default()));
            }
            ProgramRef::Model(reference) => reference,
        };
        let key = (reference.clone(), order.entry.clone());
        if let Some(known) = self.resolved().get(&key).filter(|r| r.at.elapsed() < RESOLVED_FOR) {
            return Ok((known.program.clone(), order.limits.unwrap_or(known.limits)));
        }
        let fail = |reason: String| SubmitError::Model { reference: reference.clone(), reason };
        let record = self.registry.resolve(reference).await.map_err(|e| fail(e.to_string()))?;
        let manifest = self.registry.manifest(&record).await.map_err(|e| fail(e.to_string()))?;
        let program = Program::Model { model: record.model, manifest: record.manifest, entry: order.entry.clone() };
        let mut resolved = self.resolved();
        if resolved.len() >= RESOLVED_MAX {
            resolved.clear();
        }
        let limits = manifest.limits;
        resolved.insert(key, Resolved { program: program.clone(), limits, at: Instant::now() });
        Ok((program, order.limits.unwrap_or(limits)))
    }

    fn resolved(&self) -> MutexGuard<'_, HashMap<(String, String), Resolved>> {
        self.resolved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Digest and length of the input, and its bytes when they ride in the request.
    async fn take_input(&self, input: &JobInput) -> Result<(BlobId, ByteCount, Option<Bytes>), SubmitError> {
        // Whoever rules on the job fetches the input from here.
        let readers = || Access::only(self.config.trusted_validators.iter().map(|h| Reader::Hotkey(*h)));
        let fail = |e: String| SubmitError::Input(e);
        match input {
            JobInput::Bytes(bytes) if bytes.len() <= limit::INLINE => {
                Ok((BlobId::of(bytes), ByteCount(bytes.len() as u64), Some(bytes.clone())))
            }
            JobInput::Bytes(bytes) if bytes.len() as u64 > limit::INPUT.0 => {
                Err(fail(format!("{} exceed the limit of {}", ByteCount(bytes.len() as u64), limit::INPUT)))
            }
            JobInput::Bytes(bytes) => {
                let id = self.blobs.put(bytes.clone(), readers()).await.map_err(|e| fail(e.to_string()))?;
                Ok((id, ByteCount(bytes.len() as u64), None))
            }
            JobInput::File(path) => {
                let in_words = |e: std::io::Error| fail(format!("{}: {e}", path.display()));
                let len = tokio::fs::metadata(path).await.map_err(in_words)?.len();
                if len > limit::INPUT.0 {
                    return Err(fail(format!("{} exceed the limit of {}", ByteCount(len), limit::INPUT)));
                }
                if len <= limit::INLINE as u64 {
                    let bytes = Bytes::from(tokio::fs::read(path).await.map_err(in_words)?);
                    return Ok((BlobId::of(&bytes), ByteCount(bytes.len() as u64), Some(bytes)));
                }
                let imported = self
                    .blobs
                    .import_file(path.clone(), ImportMode::Copy, readers())
                    .await
                    .map_err(|e| fail(e.to_string()))?;
                Ok((imported.id, imported.len, None))
            }
        }
    }

    /// Makes an input that does not fit into an announcement fetchable by those whose verdict is believed.
    async fn serve_input(&self, spec: &Signed<JobSpec>, inline_input: Option<&Bytes>) -> Result<(), SubmitError> {
        let Some(input) = inline_input else { return Ok(()) };
        if announcement(spec, Some(input.clone())).encoded_len() <= limit::GOSSIP_JOB {
            return Ok(());
        }
        if announcement(spec, None).encoded_len() > limit::GOSSIP_JOB {
            let reason = format!("an announced request holds at most {} bytes: send fewer params", limit::GOSSIP_JOB);
            return Err(SubmitError::Order(reason));
        }
        let readers = Access::only(self.config.trusted_validators.iter().map(|h| Reader::Hotkey(*h)));
        self.blobs.put(input.clone(), readers).await.map_err(|e| SubmitError::Input(e.to_string()))?;
        Ok(())
    }

    /// Puts the request on gossip, for a validator that this node does not reach. The input rides along where it fits;
    /// else it is fetched from here.
    async fn announce(&self, job: &Tracked) -> Result<(), String> {
        let mut request = announcement(&job.spec, job.inline_input.clone());
        if request.encoded_len() > limit::GOSSIP_JOB {
            request.inline_input = None;
        }
        let len = request.encoded_len();
        if len > limit::GOSSIP_JOB {
            return Err(format!("a request of {len} bytes does not fit into an announcement"));
        }
        let gossip = pb::Gossip { kind: Some(pb::gossip::Kind::Job(request)) };
        match self.net.publish(Topic::Jobs, gossip).await {
            Ok(()) | Err(GossipError::Duplicate) => Ok(()),
            Err(e) => Err(e.to_string()),
        }
    }

    fn note_waiting(&self, reason: Option<String>) {
        let text = reason.unwrap_or_else(|| "none of the trusted validators is connected".to_owned());
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    }

    fn why_waiting(&self) -> String {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.clone().unwrap_or_else(|| "its validator gave no verdict in time".to_owned())
    }

    /// Waits for another validator to come or go, at most `pause`.
    async fn directory_changed(&self, pause: Duration) {
        let _elapsed_is_fine = tokio::time::timeout(pause, self.directory.changed()).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    #[tokio::test]
    async fn kept_jobs_of_earlier_runs_go_oldest_first() {
        let store = MemoryStore::new();
        let mut batch = WriteBatch::new();
        for n in 0..50_u64 {
            let kept = Kept {
                program: "builtin echo".to_owned(),
                phase: JobPhase::Finished,
                submitted_at: UnixMillis(n),
                detail: String::new(),
            };
            REQUESTS.put(&mut batch, time_key(n, &[7; 32]), &kept);
        }
        store.commit(batch).wait().unwrap();
        retain(&store, 20).await.unwrap();
        let (left, _) = REQUESTS.scan(&store, &KeyRange::all(), 100).unwrap();
        assert_eq!((left.len(), left[0].1.submitted_at), (20, UnixMillis(30)));
        retain(&store, 20).await.unwrap();
        assert_eq!(REQUESTS.scan(&store, &KeyRange::all(), 100).unwrap().0.len(), 20);
    }
}
