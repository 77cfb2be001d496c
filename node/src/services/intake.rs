//! Intake: the door of a validator. Checks what requesters send before anything is kept, and carries the answers back.
//!
//! **Owns** the requests `submit`, `watch` and `cancel`, and the topic of requests that no validator took directly.
//! **Does not own** the jobs: what it admits goes to dispatch over a bounded channel.
//!
//! **Invariants**: a request holds one task and at most its own input; only the requester learns of its job; nothing is
//! admitted whose signature, dates, limits, input or model do not check.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sundara_proto::crypto::{Network, Signed};
use sundara_proto::id::{BlobId, Hotkey, JobId, ModelId, NodeId};
use sundara_proto::job::{JobSpec, Limits, Program};
use sundara_proto::pb;
use sundara_proto::pb::job_event::Kind as Event;
use sundara_proto::rules::env::Environment;
use sundara_proto::rules::select;
use sundara_proto::units::{ByteCount, UnixMillis};
use sundara_proto::wire::limit;
use tokio::sync::{Semaphore, mpsc};

use super::directory::Directory;
use super::{Admitted, Place, WATCH_QUEUED_MAX, Watcher};
use crate::blobs::{Access, Blobs, Sources, TransferHandle};
use crate::domain::Now;
use crate::domain::admission::{Admission, AdmissionConfig, Verdict as Ruling};
use crate::domain::job::Submission;
use crate::net::{FailureCode, GossipMessage, GossipPayload, Inbound, NetHandle, Reply};
use crate::service::{Tasks, wall_now};
use crate::services::registry::RegistryHandle;

/// Requests being answered at once: each is a task of a few KiB, and holds its input until dispatch has it.
const REQUESTS_MAX: usize = 16_384;
/// A validator of lower rank is asked whether it has an announced job for this long.
const ASK_WITHIN: Duration = Duration::from_secs(2);
/// Candidate i of an announced job claims it after i times this.
const CLAIM_AFTER: Duration = Duration::from_secs(5);
/// A submission waits this long for its model's files: less than a requester waits for its acknowledgement.
const MODEL_WITHIN: Duration = Duration::from_secs(3);
/// Announced jobs waiting for their turn.
const ANNOUNCED_MAX: usize = 1_024;
/// Nodes that an announced job's input is asked of.
const ANNOUNCED_SOURCES_MAX: usize = 8;

/// Whose jobs a validator takes, and how large.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct IntakeConfig {
    /// Limits that a job may ask for at most.
    pub limits_max: Limits,
    /// Who may submit, and how much.
    pub admission: AdmissionConfig,
}

impl Default for IntakeConfig {
    /// An hour of one core.
    fn default() -> Self {
        let limits_max =
            Limits { fuel: 10_000_000_000_000, memory: ByteCount::gib(4), output: limit::INPUT, wall_ms: 3_600_000 };
        Self { limits_max, admission: AdmissionConfig::default() }
    }
}

/// What the service needs from the rest of the node.
pub(crate) struct IntakeParts {
    pub(crate) config: IntakeConfig,
    pub(crate) network: Network,
    pub(crate) net: NetHandle,
    pub(crate) registry: RegistryHandle,
    pub(crate) transfer: TransferHandle,
    pub(crate) blobs: Blobs,
    pub(crate) directory: Directory,
    /// Hotkeys that count as validators; empty: every connected one.
    pub(crate) validators: Vec<Hotkey>,
    /// Requests of kinds `submit`, `watch` and `cancel`.
    pub(crate) requests: mpsc::Receiver<Inbound>,
    /// The topic of jobs.
    pub(crate) announced: mpsc::Receiver<GossipMessage>,
    pub(crate) admitted: mpsc::Sender<Admitted>,
    pub(crate) tasks: Tasks,
}

/// Starts the service; it ends with its tasks.
pub(crate) fn start(parts: IntakeParts) {
    let IntakeParts { config, network, net, registry, transfer, blobs, directory, validators, .. } = parts;
    let (requests, announced, admitted, tasks) = (parts.requests, parts.announced, parts.admitted, parts.tasks);
    let admission = Arc::new(Mutex::new(Admission::new(config.admission.clone())));
    let begun = tokio::time::Instant::now();
    let door = Arc::new(Door {
        config,
        network,
        net,
        registry,
        transfer,
        blobs,
        directory,
        validators,
        admitted,
        admission,
        begun,
        tasks: tasks.clone(),
    });
    tasks.spawn("requests", door.clone().requests(requests));
    tasks.spawn("announced", door.announced(announced));
}

struct Door {
    config: IntakeConfig,
    network: Network,
    net: NetHandle,
    registry: RegistryHandle,
    transfer: TransferHandle,
    blobs: Blobs,
    directory: Directory,
    validators: Vec<Hotkey>,
    admitted: mpsc::Sender<Admitted>,
    admission: Arc<Mutex<Admission>>,
    begun: tokio::time::Instant,
    tasks: Tasks,
}

/// Why a request is not admitted.
struct No {
    reason: String,
    retryable: bool,
}

fn never(reason: impl Into<String>) -> No {
    No { reason: reason.into(), retryable: false }
}

fn elsewhere(reason: impl Into<String>) -> No {
    No { reason: reason.into(), retryable: true }
}

impl Door {
    async fn requests(self: Arc<Self>, mut requests: mpsc::Receiver<Inbound>) {
        let token = self.tasks.token();
        let room = Arc::new(Semaphore::new(REQUESTS_MAX));
        loop {
            let inbound = tokio::select! {
                () = token.cancelled() => return,
                inbound = requests.recv() => match inbound { Some(inbound) => inbound, None => return },
            };
            let Ok(place) = room.clone().try_acquire_owned() else {
                inbound.reply.fail(FailureCode::Busy, "too many requests are being answered".to_owned());
                continue;
            };
            let door = self.clone();
            self.tasks.spawn("request", async move {
                door.answer(inbound).await;
                drop(place);
            });
        }
    }

    async fn answer(&self, inbound: Inbound) {
        let Inbound { peer, request, reply, .. } = inbound;
        match request {
            pb::request::Kind::Submit(request) => {
                let (watcher, events) = mpsc::channel(WATCH_QUEUED_MAX);
                let admitted = match self.signed(request, peer.hotkey) {
                    Ok((spec, inline)) => self.admit(spec, inline, &[peer.node], watcher).await,
                    Err(no) => Err(no),
                };
                match admitted {
                    Ok(()) => carry(events, reply).await,
                    Err(no) => refuse(reply, no).await,
                }
            }
            pb::request::Kind::Watch(request) => match JobId::try_from(request.job.as_ref()) {
                Ok(job) => {
                    let (watcher, events) = mpsc::channel(WATCH_QUEUED_MAX);
                    let _stopped = self.admitted.send(Admitted::Watch { job, asker: peer.hotkey, watcher }).await;
                    carry(events, reply).await;
                }
                Err(e) => reply.fail(FailureCode::Malformed, e.to_string()),
            },
            pb::request::Kind::Cancel(request) => match JobId::try_from(request.job.as_ref()) {
                Ok(job) => {
                    let _stopped = self.admitted.send(Admitted::Cancel { job, asker: peer.hotkey }).await;
                    finish(reply, pb::response::Kind::Done(pb::Done {})).await;
                }
                Err(e) => reply.fail(FailureCode::Malformed, e.to_string()),
            },
            _ => reply.fail(FailureCode::NotServed, "not a request for intake".to_owned()),
        }
    }

    /// The spec of a request, if its signature holds and the peer is who signed it.
    fn signed(&self, request: pb::JobRequest, from: Hotkey) -> Result<(Signed<JobSpec>, Option<Bytes>), No> {
        let raw = request.spec.ok_or_else(|| never("request without a spec"))?;
        let spec = Signed::<JobSpec>::verify(&self.network, raw).map_err(|e| never(format!("spec: {e}")))?;
        if spec.requester() != from {
            return Err(never("a job is submitted by the hotkey that signed it, or announced"));
        }
        Ok((spec, request.inline_input))
    }

    /// Checks everything and hands the job to dispatch, and with it its place among its requester's: a job counts until it
    /// ends, whether or not its requester stays.
    async fn admit(
        &self,
        spec: Signed<JobSpec>,
        inline: Option<Bytes>,
        from: &[NodeId],
        watcher: Watcher,
    ) -> Result<(), No> {
        self.check(&spec)?;
        let job = spec.id();
        let now = Now { mono: self.begun.elapsed(), wall: wall_now() };
        let ruling = self.admission.lock().unwrap_or_else(PoisonError::into_inner).admit(&spec, job, now);
        let place = match ruling {
            Ruling::Admitted => Some(Place { admission: self.admission.clone(), job }),
            Ruling::Known => None,
            Ruling::Refused { reason, retryable } => return Err(No { reason, retryable }),
        };
        let (submission, inline_input) = self.resolve(spec, job, inline, from).await?;
        let order = Admitted::Submit { submission: Box::new(submission), inline_input, watcher, place };
        let full = "validator is busy: its queue of submissions is full";
        self.admitted.try_send(order).map_err(|_| elsewhere(full))
    }

    fn check(&self, spec: &JobSpec) -> Result<(), No> {
        let now = wall_now();
        if spec.network != self.network {
            return Err(never("job is for another mesh"));
        }
        if spec.not_after <= now {
            return Err(never(format!("job expired {} ms ago", now.0 - spec.not_after.0)));
        }
        if spec.not_after > now.plus(JobSpec::NOT_AFTER_MAX + UnixMillis::SKEW_MAX) {
            return Err(never(format!("not_after is more than {} h ahead", JobSpec::NOT_AFTER_MAX.as_secs() / 3600)));
        }
        if !spec.limits.within(&self.config.limits_max) {
            return Err(elsewhere(format!("limits exceed intake.limits_max = {:?}", self.config.limits_max)));
        }
        Ok(())
    }

    /// Finds input and model.
    async fn resolve(
        &self,
        spec: Signed<JobSpec>,
        job: JobId,
        inline: Option<Bytes>,
        from: &[NodeId],
    ) -> Result<(Submission, Option<Bytes>), No> {
        let inline = match inline {
            Some(bytes) if bytes.len() > limit::INLINE => return Err(never("inline input is too large")),
            Some(bytes) if BlobId::of(&bytes) != spec.input || bytes.len() as u64 != spec.input_len.0 => {
                return Err(never("inline input is not what the spec names"));
            }
            Some(bytes) => Some(bytes),
            // Too large for the request, or for an announcement of it.
            None => {
                let sources = Sources::peers(from.iter().copied());
                let fetched = self.transfer.fetch(spec.input, spec.input_len, sources, Access::local()).await;
                fetched.map_err(|e| elsewhere(format!("input cannot be fetched from the requester: {e}")))?;
                if spec.input_len.0 <= limit::INLINE as u64 { Some(self.small_blob(spec.input).await?) } else { None }
            }
        };
        let environment = match &spec.program {
            Program::Builtin { name } => Environment::of_builtin(name),
            Program::Model { model, manifest, .. } => {
                let found = self.registry.manifest_of(*model, *manifest, from).await;
                let found = found.map_err(|e| elsewhere(format!("model {model}: {e}")))?;
                if !spec.hardware_class.is_empty()
                    && !found.hardware_class.is_empty()
                    && spec.hardware_class != found.hardware_class
                {
                    return Err(never(format!(
                        "job asks for class {}, its model needs {}",
                        spec.hardware_class, found.hardware_class
                    )));
                }
                self.have(*model, *manifest, from).await;
                Environment::of_model(*model, &found)
            }
        };
        let rank = self.rank(&job).unwrap_or(u32::MAX);
        Ok((Submission { job, spec: Arc::new(spec), environment, rank }, inline))
    }

    /// The bytes of a fetched input that is kept with its job, not as a blob.
    async fn small_blob(&self, input: BlobId) -> Result<Bytes, No> {
        let bytes = self.blobs.get(input, ByteCount(limit::INLINE as u64)).await;
        let bytes = bytes.map_err(|e| elsewhere(format!("input cannot be read: {e}")))?;
        if let Err(e) = self.blobs.remove(input).await {
            tracing::debug!(blob = %input, error = %e, "blob not removed");
        }
        Ok(bytes)
    }

    /// Gets the model's files: this validator audits with them, and miners that lack them are sent to it. A model that
    /// takes long is fetched on, while the job goes its way.
    async fn have(&self, model: ModelId, manifest: BlobId, from: &[NodeId]) {
        let (registry, from) = (self.registry.clone(), from.to_vec());
        let fetch = async move {
            if let Err(e) = registry.local(model, manifest, from).await {
                tracing::info!(%model, error = %e, "model not fetched yet");
            }
        };
        let (done, fetched) = tokio::sync::oneshot::channel();
        self.tasks.spawn("model", async move {
            fetch.await;
            // Nobody may wait any more.
            let _late = done.send(());
        });
        let _in_time_or_later = tokio::time::timeout(MODEL_WITHIN, fetched).await;
    }

    /// This validator's place in the job's order of owners, among those that it knows of.
    fn rank(&self, job: &JobId) -> Option<u32> {
        let order = self.order(job);
        let own = self.net.local().hotkey;
        order.iter().position(|h| *h == own).and_then(|i| u32::try_from(i).ok())
    }

    fn order(&self, job: &JobId) -> Vec<Hotkey> {
        // Stakes are equal until the ledger says otherwise. A listed validator counts even while it is away, so that those
        // who stand in for it know that they do.
        let candidates: Vec<(Hotkey, u64)> = if self.validators.is_empty() {
            self.directory.snapshot().validators.keys().map(|h| (*h, 1)).collect()
        } else {
            self.validators.iter().map(|h| (*h, 1)).collect()
        };
        select::owner_order(job, &candidates)
    }

    async fn announced(self: Arc<Self>, mut topic: mpsc::Receiver<GossipMessage>) {
        let token = self.tasks.token();
        let room = Arc::new(Semaphore::new(ANNOUNCED_MAX));
        loop {
            let message = tokio::select! {
                () = token.cancelled() => return,
                message = topic.recv() => match message { Some(message) => message, None => return },
            };
            let GossipPayload::Job { spec, inline_input, .. } = message.payload else { continue };
            let Ok(place) = room.clone().try_acquire_owned() else { continue };
            let door = self.clone();
            self.tasks.spawn("announced-job", async move {
                door.claim(spec, inline_input, message.from).await;
                drop(place);
            });
        }
    }

    /// Waits for this validator's turn at an announced job, and takes it unless another has.
    async fn claim(&self, spec: Signed<JobSpec>, inline: Option<Bytes>, neighbour: NodeId) {
        let job = spec.id();
        let order = self.order(&job);
        let own = self.net.local().hotkey;
        let Some(rank) = order.iter().position(|h| *h == own) else { return };
        tokio::select! {
            () = self.tasks.token().cancelled_owned() => return,
            () = tokio::time::sleep(CLAIM_AFTER * u32::try_from(rank).unwrap_or(u32::MAX)) => {}
        }
        for earlier in &order[..rank] {
            if self.has(earlier, &job).await {
                return;
            }
        }
        // The requester's own nodes, where they are connected, have the input and the model.
        let view = self.directory.snapshot();
        let requester = view.peers.values().filter(|p| p.hotkey == spec.requester()).map(|p| p.node);
        let from: Vec<NodeId> = requester.chain([neighbour]).take(ANNOUNCED_SOURCES_MAX).collect();
        // Nobody is told: the requester asks.
        let (watcher, _) = mpsc::channel(1);
        match self.admit(spec, inline, &from, watcher).await {
            Ok(()) => tracing::info!(%job, rank, "took an announced job"),
            Err(no) => tracing::debug!(%job, reason = %no.reason, "announced job not taken"),
        }
    }

    /// Whether a validator of lower rank says that it has the job.
    async fn has(&self, validator: &Hotkey, job: &JobId) -> bool {
        let Some(node) = self.directory.snapshot().validators.get(validator).copied() else { return false };
        let request = pb::request::Kind::Watch(pb::WatchJob { job: (*job).into() });
        let answer = tokio::time::timeout(ASK_WITHIN, self.net.request_one(node, request)).await;
        // The first answer says it; dropping the rest cancels the watch.
        matches!(answer, Ok(Ok(pb::response::Kind::Job(pb::JobEvent { kind: Some(Event::Acknowledged(_)) }))))
    }
}

async fn refuse(reply: Reply, no: No) {
    let refused = pb::Refused { reason: no.reason, retryable: no.retryable };
    finish(reply, pb::response::Kind::Job(pb::JobEvent { kind: Some(Event::Refused(refused)) })).await;
}

async fn finish(reply: Reply, response: pb::response::Kind) {
    // A caller that is gone wants no answer.
    let _gone = reply.finish(response).await;
}

/// Carries events to the peer until the last one, or until the peer is gone.
async fn carry(mut events: mpsc::Receiver<Event>, mut reply: Reply) {
    loop {
        let event = tokio::select! {
            () = reply.closed() => return,
            event = events.recv() => event,
        };
        let Some(event) = event else { break };
        let last = matches!(event, Event::Finished(_) | Event::Refused(_));
        let response = pb::response::Kind::Job(pb::JobEvent { kind: Some(event) });
        if last {
            return finish(reply, response).await;
        }
        if reply.send(response).await.is_err() {
            return;
        }
    }
    // Dispatch let go without a last event: the job was cancelled, or the node stops.
    reply.fail(FailureCode::Busy, "the validator let go of this request; ask again".to_owned());
}
