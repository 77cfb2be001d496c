//! What goes into the job machine and what comes out.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sundara_proto::attestation::{Attestation, CountersignedAttestation};
use sundara_proto::crypto::Signed;
use sundara_proto::id::{Digest, EngineId, EnvId, Hotkey, JobId, NodeId};
use sundara_proto::job::JobSpec;
use sundara_proto::rules::env::Environment;
use sundara_proto::units::UnixMillis;
use sundara_proto::verdict::Verdict;

use super::record::{CleanRecord, JobRecord, MinerRecord};
use crate::domain::audit::EpochSecret;
use crate::domain::schedule::MinerProfile;

/// One miner's part in one attempt at one job: what an offer and its answers are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Part {
    /// The job.
    pub job: JobId,
    /// The attempt, from 0.
    pub attempt: u32,
    /// The miner.
    pub miner: Hotkey,
}

/// A job as intake admitted it: signature, network, dates and limits are checked.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Digest of the spec as signed.
    pub job: JobId,
    /// What is asked.
    pub spec: Arc<Signed<JobSpec>>,
    /// The environment but for the engine, from the model's manifest.
    pub environment: Environment,
    /// This validator's place in the job's order of owners. Above 0 earlier digests may be public: always audited.
    pub rank: u32,
}

/// What became of an audit.
#[derive(Clone, Debug)]
pub enum AuditResult {
    /// This validator's own executor ran the job.
    Attested(Arc<Signed<Attestation>>),
    /// It could not. The machine tries again, a few times.
    Failed {
        /// Why, for people.
        reason: String,
    },
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A requester asks. A job that is known already is not run again: see [`Output::Attach`] and [`Output::Replay`].
    Submitted(Box<Submission>),
    /// A job record found in the store after a restart; all are given before anything else. An open job enters a new
    /// attempt, a finished one is only remembered.
    Restored {
        /// Its id.
        job: JobId,
        /// What was last persisted.
        record: Box<JobRecord>,
    },
    /// What was known of a miner before a restart.
    RestoredMiner(Box<MinerRecord>),
    /// A miner's clean audits in one environment before a restart.
    RestoredClean(CleanRecord),
    /// A miner's verified advert, new or replaced.
    Miner(Box<MinerProfile>),
    /// A node is connected (again).
    PeerHere(NodeId),
    /// A node is not reachable: what it was doing is lost.
    PeerGone(NodeId),
    /// Engines of this validator's own executor. Jobs are placed on these alone, since no other could be audited.
    Auditor {
        /// Empty while there is none.
        engines: Vec<EngineId>,
    },
    /// The miner took the offer.
    Accepted(Part),
    /// The miner did not take it.
    Declined {
        /// Whose answer.
        part: Part,
        /// What it means for the next offer.
        reason: Decline,
        /// For people.
        detail: String,
    },
    /// The miner has a result and has said a salted digest of it.
    Committed {
        /// Whose.
        part: Part,
        /// [`sundara_proto::rules::select::result_commitment`].
        commitment: Digest,
    },
    /// The result. The service has verified all signatures; everything else is checked here.
    Revealed {
        /// Whose.
        part: Part,
        /// Executor's word and miner's.
        attestation: Arc<CountersignedAttestation>,
        /// Salt of the commitment; zeros where there was none.
        salt: [u8; 32],
    },
    /// A chunk of streamed output.
    Output {
        /// Whose.
        part: Part,
        /// Place of the chunk in the output.
        offset: u64,
        /// The chunk.
        data: Bytes,
    },
    /// Every executor of the miner broke. The job is not to blame.
    Fault {
        /// Whose.
        part: Part,
        /// For people.
        reason: String,
    },
    /// The answer cannot be what an honest miner sends: malformed, or signatures that do not verify.
    BadReply {
        /// Whose.
        part: Part,
        /// What was wrong.
        reason: String,
    },
    /// The offer or the reveal could not be delivered, or its stream broke before the last answer.
    Undelivered {
        /// Whose.
        part: Part,
        /// For people.
        reason: String,
    },
    /// Answer to [`Output::RequestAudit`].
    Audited {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: u32,
        /// What came of it.
        result: AuditResult,
    },
    /// The requester wants no result any more.
    Cancelled {
        /// The job.
        job: JobId,
    },
    /// A new epoch, with the secret that its audits are drawn by.
    EpochTurned(EpochSecret),
    /// A miner is not to be used: an operator's word, or a fraud proof that checked out.
    Banned {
        /// The miner.
        miner: Hotkey,
        /// Until when.
        until: UnixMillis,
        /// Why.
        reason: String,
    },
    /// The time of the last [`Output::SetTimer`] has come. Harmless at any other time.
    TimerFired,
}

/// Why a miner turns an offer down, as far as scheduling cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decline {
    /// Busy, shutting down, out of disk or without its executor: ask again after a while, meanwhile others.
    Later,
    /// This job will not run there: not admitted, limits too high, publisher not allowed, unsupported.
    NotThis,
    /// It knows the offer already: its earlier answer was lost.
    Duplicate,
}

/// What is to be done, in this order. Outputs for which [`Output::needs_persist`] holds wait until every
/// [`Output::Persist`] and [`Output::Finish`] of the same job before them is durable; the others need not.
#[derive(Clone, Debug)]
pub enum Output {
    /// Write the record under its job.
    Persist {
        /// The job.
        job: JobId,
        /// What a restart needs.
        record: Box<JobRecord>,
    },
    /// Write what is known of a miner. Losing it costs more audits, nothing else.
    PersistMiner(Box<MinerRecord>),
    /// Write a miner's clean audits in one environment. Losing it costs more audits, nothing else.
    PersistClean(CleanRecord),
    /// Tell the requester that the job will finish or fail with a reason.
    Acknowledge {
        /// The job.
        job: JobId,
        /// This validator's rank.
        rank: u32,
    },
    /// The submitted job is already running here: acknowledge, and let this requester watch too.
    Attach {
        /// The job.
        job: JobId,
        /// Rank under which it runs.
        rank: u32,
        /// Present attempt, where one has begun.
        attempt: Option<u32>,
    },
    /// The submitted job has its verdict: answer from the store.
    Replay {
        /// The job.
        job: JobId,
    },
    /// The submitted job is not taken.
    Refuse {
        /// The job.
        job: JobId,
        /// Names the setting to change.
        reason: String,
        /// Another validator, or a later time, may do.
        retryable: bool,
    },
    /// Offer a part to a miner.
    SendOffer {
        /// To whom, for which attempt.
        part: Part,
        /// Its node.
        node: NodeId,
        /// Commit first, reveal on request.
        commit_reveal: bool,
        /// This replica streams its output.
        stream: bool,
        /// Environment in which an honest result is attested.
        env_id: EnvId,
        /// What the whole part may take from now.
        deadline: Duration,
    },
    /// All commitments are in: ask for the result.
    SendReveal {
        /// Of whom.
        part: Part,
        /// Its node.
        node: NodeId,
    },
    /// The part is no longer wanted.
    SendAbandon {
        /// Of whom.
        part: Part,
        /// Its node.
        node: NodeId,
        /// For people.
        reason: String,
    },
    /// Run the job on this validator's own executor and answer with [`Input::Audited`].
    RequestAudit {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: u32,
        /// Engine to run it on.
        engine: EngineId,
        /// Environment to attest.
        env_id: EnvId,
        /// After this the machine goes on without it.
        deadline: Duration,
    },
    /// The audit is no longer wanted.
    AbandonAudit {
        /// The job.
        job: JobId,
    },
    /// An attempt began: a miner took the offer. Provisional output of earlier attempts is void.
    Started {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: u32,
    },
    /// Provisional output for the requester. Offsets rise without gaps within an attempt.
    ForwardOutput {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: u32,
        /// Place of the chunk.
        offset: u64,
        /// The chunk.
        data: Bytes,
    },
    /// The job is over: sign the verdict, write record and verdict in one batch, then tell everyone who watches.
    Finish(Box<Ruling>),
    /// Keep, and publish as a fraud proof where it is one.
    RecordEvidence(Box<Evidence>),
    /// A miner is out of scheduling for a while. Told for logs and metrics; the machine already acts on it.
    DropMiner {
        /// The miner.
        miner: Hotkey,
        /// Why.
        reason: String,
        /// Until when.
        until: UnixMillis,
    },
    /// Send [`Input::TimerFired`] at this time; replaces the time set before.
    SetTimer {
        /// On the clock of [`crate::domain::Now::mono`].
        at: Duration,
    },
    /// The job's id need not be known any more: delete its record.
    Forget {
        /// The job.
        job: JobId,
    },
}

impl Output {
    /// Whether it tells someone what a crash must not take back.
    pub fn needs_persist(&self) -> bool {
        matches!(self, Self::Acknowledge { .. } | Self::Attach { .. } | Self::Replay { .. })
    }
}

/// A verdict to be signed, and what stands behind it.
#[derive(Clone, Debug, PartialEq)]
pub struct Ruling {
    /// The draft: complete but for the signature.
    pub verdict: Verdict,
    /// Attestations, in the order of the verdict's replicas that have one.
    pub attestations: Vec<Arc<CountersignedAttestation>>,
    /// Replaces the job's record.
    pub record: JobRecord,
}

/// What a miner did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Offence {
    /// Another result than the validator's own executor found in the same environment. Anyone can check it.
    WrongResult,
    /// Revealed something else than it had committed to.
    BrokenCommitment,
    /// Committed and did not reveal.
    Withheld,
    /// An attestation of another job, attempt, input, environment, time or signer, or with bad signatures.
    ForeignAttestation,
}

impl Offence {
    /// As stored and shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::WrongResult => "wrong_result",
            Self::BrokenCommitment => "broken_commitment",
            Self::Withheld => "withheld",
            Self::ForeignAttestation => "foreign_attestation",
        }
    }
}

/// What is kept of an offence.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// Who.
    pub part: Part,
    /// What.
    pub offence: Offence,
    /// What it attested, where it did.
    pub accused: Option<Arc<CountersignedAttestation>>,
    /// What this validator's executor found. With `accused` and the spec it makes a fraud proof.
    pub reference: Option<Arc<Signed<Attestation>>>,
    /// What it had committed to.
    pub commitment: Option<Digest>,
    /// For people.
    pub detail: String,
    /// When.
    pub at: UnixMillis,
}
