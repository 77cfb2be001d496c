//! Jobs as a program that embeds the node sees them.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use sundara_proto::attestation::Outcome;
use sundara_proto::crypto::{Network, Signed};
use sundara_proto::id::{Hotkey, JobId};
use sundara_proto::job::{JobSpec, Limits};
use sundara_proto::pb;
use sundara_proto::units::UnixMillis;
use sundara_proto::verdict::{Proof, ProofError, Verdict, VerdictKind};

use crate::services::jobs::{JobsClient, Tracked};

/// What runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProgramRef {
    /// A published model: `PUBLISHER/NAME` or `PUBLISHER/NAME@VERSION`, the publisher as ss58.
    Model(String),
    /// A reference job that every node has, by name.
    Builtin(String),
}

/// Where standard input comes from.
#[derive(Clone, Debug)]
pub enum JobInput {
    /// Bytes in memory.
    Bytes(Bytes),
    /// A file, read as a stream; at most 256 MiB.
    File(PathBuf),
}

/// A job to be submitted. Every field but the program has a default.
#[derive(Clone, Debug)]
#[must_use = "an order does nothing until it is submitted"]
pub struct JobOrder {
    pub(crate) program: ProgramRef,
    pub(crate) entry: String,
    pub(crate) input: JobInput,
    pub(crate) params: Bytes,
    pub(crate) seed: u64,
    pub(crate) limits: Option<Limits>,
    pub(crate) replicas: u8,
    pub(crate) hardware_class: String,
    pub(crate) stream: bool,
    pub(crate) not_after: Duration,
    pub(crate) announce: bool,
}

impl JobOrder {
    /// How long a job may wait for its result unless [`Self::not_after`] says otherwise.
    pub const NOT_AFTER_DEFAULT: Duration = Duration::from_secs(600);

    fn new(program: ProgramRef) -> Self {
        Self {
            program,
            entry: String::new(),
            input: JobInput::Bytes(Bytes::new()),
            params: Bytes::new(),
            seed: 0,
            limits: None,
            replicas: 1,
            hardware_class: String::new(),
            stream: false,
            not_after: Self::NOT_AFTER_DEFAULT,
            announce: false,
        }
    }

    /// Runs a published model, `PUBLISHER/NAME[@VERSION]`.
    pub fn model(reference: impl Into<String>) -> Self {
        Self::new(ProgramRef::Model(reference.into()))
    }
    /// Runs a reference job.
    pub fn builtin(name: impl Into<String>) -> Self {
        Self::new(ProgramRef::Builtin(name.into()))
    }
    /// Export to call instead of the manifest's default.
    pub fn entry(mut self, export: impl Into<String>) -> Self {
        self.entry = export.into();
        self
    }
    /// Standard input.
    pub fn input(mut self, bytes: impl Into<Bytes>) -> Self {
        self.input = JobInput::Bytes(bytes.into());
        self
    }
    /// Standard input from a file.
    pub fn input_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.input = JobInput::File(path.into());
        self
    }
    /// What the job reads as /job/params; at most 4 KiB.
    pub fn params(mut self, bytes: impl Into<Bytes>) -> Self {
        self.params = bytes.into();
        self
    }
    /// What the job reads as /job/seed and the key of its randomness.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }
    /// What one execution may use. Without it, the manifest's limits hold, for builtins the protocol's defaults.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = Some(limits);
        self
    }
    /// On how many miners of distinct owners it runs, 1 to 16.
    pub fn replicas(mut self, replicas: u8) -> Self {
        self.replicas = replicas;
        self
    }
    /// Hardware class that is wanted.
    pub fn hardware_class(mut self, class: impl Into<String>) -> Self {
        self.hardware_class = class.into();
        self
    }
    /// Output comes as it is made, provisional until the verdict.
    pub fn stream(mut self, stream: bool) -> Self {
        self.stream = stream;
        self
    }
    /// How long from now a validator may begin it; at most 24 h.
    pub fn not_after(mut self, from_now: Duration) -> Self {
        self.not_after = from_now;
        self
    }
    /// Puts the request on gossip, for whichever validator takes it: this node may leave before the result. While it
    /// stays it asks the validators that it trusts what became of the job, and fetches the result. An input beyond what
    /// gossip carries (4 KiB with the request) is fetched from here, so leave only once the job is acknowledged.
    pub fn announce(mut self, announce: bool) -> Self {
        self.announce = announce;
        self
    }
}

/// What happens to a job, in order.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum JobEvent {
    /// A validator has persisted it: it will finish or fail with a reason.
    Acknowledged {
        /// The validator.
        validator: Hotkey,
        /// Its place in the job's order of owners.
        rank: u32,
    },
    /// Miners work on it. Output of earlier attempts is void.
    Started {
        /// From 0.
        attempt: u32,
    },
    /// A piece of output, provisional until the verdict.
    Output {
        /// Attempt that made it.
        attempt: u32,
        /// Place in the output, in bytes.
        offset: u64,
        /// The bytes.
        data: Bytes,
    },
    /// The verified result. Last.
    Finished(Arc<JobResult>),
    /// No result. Last.
    Failed(JobFailure),
}

/// A result with what proves it. The verdict's signature and validator, its job and the output's digest were checked
/// before this value was made; [`Self::verify`] checks the attestations behind the verdict too.
#[derive(Clone, Debug)]
pub struct JobResult {
    /// Mesh in which it holds.
    pub network: Network,
    /// What was asked.
    pub spec: Signed<JobSpec>,
    /// What was ruled.
    pub verdict: Signed<Verdict>,
    /// What was attested, as it came.
    pub attestations: Vec<pb::CountersignedAttestation>,
    /// The whole output when it is at most 128 KiB; else see [`JobHandle::output`].
    pub output: Option<Bytes>,
    /// Submitted to verdict received, by this node's monotonic clock.
    pub latency: Duration,
}

impl JobResult {
    /// What the verdict rests on.
    pub fn kind(&self) -> &VerdictKind {
        &self.verdict.kind
    }
    /// How the execution ended.
    pub fn outcome(&self) -> Option<Outcome> {
        self.verdict.outcome
    }
    /// Everything that proves it, as `attestation verify` reads it from a file.
    pub fn proof(&self) -> pb::Proof {
        pb::Proof {
            genesis: Bytes::copy_from_slice(&self.network.genesis),
            netuid: self.network.netuid.into(),
            spec: Some(self.spec.to_wire()),
            verdict: Some(self.verdict.to_wire()),
            attestations: self.attestations.clone(),
        }
    }
    /// Checks every signature, and that the attestations carry the verdict: about 0.1 ms an attestation.
    ///
    /// # Errors
    /// See [`ProofError`].
    pub fn verify(&self) -> Result<Proof, ProofError> {
        Proof::verify(self.proof())
    }
}

/// Why there is no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JobFailure {
    /// Not taken by any validator.
    #[error("no validator took the job: {0}")]
    Refused(String),
    /// The verdict says that no result can be trusted.
    #[error("rejected: {0}")]
    Rejected(String),
    /// The verdict says that there is no result.
    #[error("failed: {0}")]
    Failed(String),
    /// Cancelled by its requester.
    #[error("cancelled")]
    Cancelled,
    /// `not_after` passed without a verdict.
    #[error("no verdict before the job's deadline: {0}")]
    Expired(String),
    /// The node shut down; the job goes on at its validator.
    #[error("the node shut down before the result came")]
    ShutDown,
}

/// Why a job was not submitted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// A field of the order that no node would accept.
    #[error("{0}")]
    Order(String),
    /// The model cannot be resolved.
    #[error("model `{reference}`: {reason}")]
    Model {
        /// As given.
        reference: String,
        /// Why not.
        reason: String,
    },
    /// The input cannot be read or stored.
    #[error("input: {0}")]
    Input(String),
    /// No list of validators to believe.
    #[error("no trusted validators: set jobs.trusted_validators (or --network FILE that lists them)")]
    NoTrust,
    /// Too many open jobs.
    #[error("{open} jobs are open, the limit is jobs.open_max = {max}")]
    TooMany {
        /// Open now.
        open: usize,
        /// The setting.
        max: usize,
    },
    /// The job could not be kept.
    #[error("store: {0}")]
    Store(String),
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobPhase {
    /// Looking for a validator.
    Submitting,
    /// A validator has it.
    Acknowledged,
    /// Miners work on it.
    Running,
    /// Verified.
    Finished,
    /// Ended without a result.
    Failed,
}

/// One line of [`Jobs::list`].
#[derive(Clone, Debug, serde::Serialize)]
pub struct JobSummary {
    /// The job.
    pub id: JobId,
    /// What runs, for people.
    pub program: String,
    /// Where it stands.
    pub phase: JobPhase,
    /// When it was submitted.
    pub submitted_at: UnixMillis,
    /// Kind of the verdict, or why there is none.
    pub detail: String,
}

/// Jobs of one node.
#[derive(Clone)]
pub struct Jobs {
    pub(crate) client: JobsClient,
}

impl Jobs {
    /// Signs and submits. Returns once the job is kept here; watch the handle for the rest.
    ///
    /// Cancel safe: a dropped call submits nothing or everything.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was submitted then.
    pub async fn submit(&self, order: JobOrder) -> Result<JobHandle, SubmitError> {
        let job = self.client.submit(order).await?;
        Ok(JobHandle { job, client: self.client.clone() })
    }

    /// A job of this node, running or kept.
    pub fn get(&self, id: JobId) -> Option<JobHandle> {
        let job = self.client.get(id)?;
        Some(JobHandle { job, client: self.client.clone() })
    }

    /// The newest jobs first, at most `limit`.
    pub fn list(&self, limit: usize) -> Vec<JobSummary> {
        self.client.list(limit)
    }
}

/// A submitted job.
#[derive(Clone)]
pub struct JobHandle {
    job: Arc<Tracked>,
    client: JobsClient,
}

impl JobHandle {
    /// Its id.
    pub fn id(&self) -> JobId {
        self.job.id()
    }

    /// Where it stands.
    pub fn summary(&self) -> JobSummary {
        self.job.summary()
    }

    /// Everything that happened and happens to it, ending after [`JobEvent::Finished`] or [`JobEvent::Failed`].
    /// Output beyond what is kept for late readers (1 MiB a job) is skipped by `offset`; the result has all of it.
    pub fn events(&self) -> Pin<Box<dyn Stream<Item = JobEvent> + Send>> {
        self.job.clone().events()
    }

    /// Waits for the end. Cancel safe.
    ///
    /// # Errors
    /// See [`JobFailure`].
    pub async fn result(&self) -> Result<Arc<JobResult>, JobFailure> {
        self.job.ended().await
    }

    /// Asks the validator to stop. The job ends as [`JobFailure::Cancelled`] unless its verdict came first.
    pub async fn cancel(&self) {
        self.client.cancel(&self.job).await;
    }

    /// The whole output, fetched from the validator when it did not come with the verdict.
    ///
    /// # Errors
    /// As [`Self::result`], or [`JobFailure::Failed`] when nobody serves the output any more.
    pub async fn output(&self) -> Result<Bytes, JobFailure> {
        let result = self.result().await?;
        self.client.output(&self.job, &result).await
    }
}
