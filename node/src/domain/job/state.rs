//! One job.

use std::sync::Arc;
use std::time::Duration;

use sundara_proto::attestation::CountersignedAttestation;
use sundara_proto::id::{Digest, EngineId, EnvId, Hotkey, JobId, ModelId};
use sundara_proto::job::Program;
use sundara_proto::units::UnixMillis;
use sundara_proto::verdict::{Replica, Standing};
use sundara_proto::wire::limit;

use super::io::{Part, Submission};
use crate::domain::schedule::Seat;

/// Never, on the monotonic clock.
pub(super) const NEVER: Duration = Duration::MAX;

/// What a job is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Miners, or their results; commitments where there are several.
    Placing,
    /// Reveals, all of which were asked for.
    Revealing,
    /// A turn on this validator's executor.
    AuditQueued,
    /// The audit.
    Auditing {
        /// When it is given up.
        until: Duration,
    },
    /// Nothing: the verdict is out.
    Done,
}

/// How far a replica is.
#[derive(Clone, Debug)]
pub(super) enum Stage {
    /// No miner yet.
    Empty,
    /// No miner will be found any more.
    Vacant,
    Offered,
    Accepted,
    Committed(Digest),
    /// Committed, and asked to reveal.
    Asked(Digest),
    Revealed(Box<Finding>),
    /// Out, after the reveals were asked for: no other may take its place.
    Failed(Standing, Option<Digest>),
}

/// What a replica revealed.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) attestation: Arc<CountersignedAttestation>,
    /// Digest by which verdicts name the attestation.
    pub(super) name: Digest,
    /// Digest by which results are compared.
    pub(super) digest: Digest,
    pub(super) commitment: Option<Digest>,
}

/// One replica's place.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) stage: Stage,
    /// The miner, from offer on.
    pub(super) seat: Option<Seat>,
    /// Whether the seat is still counted as the miner's load.
    pub(super) seated: bool,
    pub(super) deadline: Duration,
    pub(super) offered_mono: Duration,
    pub(super) offered_wall: UnixMillis,
    pub(super) latency: Duration,
}

impl Slot {
    pub(super) fn empty() -> Self {
        Self {
            stage: Stage::Empty,
            seat: None,
            seated: false,
            deadline: NEVER,
            offered_mono: Duration::ZERO,
            offered_wall: UnixMillis(0),
            latency: Duration::ZERO,
        }
    }

    /// Whether an answer is awaited from its miner.
    pub(super) fn pending(&self) -> bool {
        matches!(self.stage, Stage::Offered | Stage::Accepted | Stage::Asked(_))
    }

    pub(super) fn result(&self) -> Option<&Finding> {
        match &self.stage {
            Stage::Revealed(result) => Some(result),
            _ => None,
        }
    }
}

/// A live job.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) submission: Submission,
    pub(super) accepted_at: UnixMillis,
    pub(super) attempt: u32,
    /// First attempt since the start of this process.
    pub(super) first_attempt: u32,
    pub(super) phase: Phase,
    pub(super) slots: Vec<Slot>,
    /// Engine and environment of the attempt, once its first miner is chosen.
    pub(super) engine: Option<(EngineId, EnvId)>,
    /// Miners of this attempt whose place another took.
    pub(super) casualties: Vec<Replica>,
    /// Miners that will not run this job.
    pub(super) excluded: Vec<Hotkey>,
    pub(super) offers: u32,
    /// Someone may know a digest of an earlier attempt.
    pub(super) digests_known: bool,
    pub(super) started: bool,
    /// Bytes of output forwarded in this attempt.
    pub(super) streamed: u64,
    /// End of waiting for miners; [`NEVER`] while no place is empty.
    pub(super) wait_until: Duration,
    /// Earliest timer set.
    pub(super) armed: Duration,
    /// Place in the line of those that wait for miners.
    pub(super) queued: Option<u64>,
    pub(super) audit_tries: u32,
    /// Epoch whose secret the audit was drawn by.
    pub(super) epoch: u64,
    /// Digest of the result that this validator's own executor found, in this attempt.
    pub(super) truth: Option<Digest>,
    /// Why the last part came to nothing.
    pub(super) trouble: String,
}

impl Job {
    pub(super) fn new(submission: Submission, attempt: u32, accepted_at: UnixMillis) -> Self {
        let replicas = usize::from(submission.spec.replicas);
        Self {
            digests_known: submission.rank > 0 || attempt > 0,
            submission,
            accepted_at,
            attempt,
            first_attempt: attempt,
            phase: Phase::Placing,
            slots: vec![Slot::empty(); replicas],
            engine: None,
            casualties: Vec::new(),
            excluded: Vec::new(),
            offers: 0,
            started: false,
            streamed: 0,
            wait_until: NEVER,
            armed: NEVER,
            queued: None,
            audit_tries: 0,
            epoch: 0,
            truth: None,
            trouble: String::new(),
        }
    }

    pub(super) fn id(&self) -> JobId {
        self.submission.job
    }

    pub(super) fn replicated(&self) -> bool {
        self.slots.len() > 1
    }

    pub(super) fn part(&self, miner: Hotkey) -> Part {
        Part { job: self.id(), attempt: self.attempt, miner }
    }

    pub(super) fn model(&self) -> Option<ModelId> {
        match self.submission.spec.program {
            Program::Model { model, .. } => Some(model),
            Program::Builtin { .. } => None,
        }
    }

    /// Place of a miner's replica, if the part is of the present attempt and still the miner's.
    pub(super) fn slot_of(&self, part: &Part) -> Option<usize> {
        if part.attempt != self.attempt {
            return None;
        }
        self.slots.iter().position(|slot| slot.seat.is_some_and(|seat| seat.miner == part.miner))
    }

    /// When the machine must look at the job again.
    pub(super) fn next_deadline(&self) -> Duration {
        let waiting = match self.phase {
            Phase::Auditing { until } => until,
            Phase::Placing => self.wait_until,
            Phase::Revealing | Phase::AuditQueued | Phase::Done => NEVER,
        };
        self.slots.iter().filter(|slot| slot.pending()).map(|slot| slot.deadline).fold(waiting, Duration::min)
    }

    /// Remembers a miner that took part and whose place is free again, as long as a verdict has room for it.
    pub(super) fn lose(&mut self, miner: Hotkey, standing: Standing, commitment: Option<Digest>) {
        if self.casualties.len() + self.slots.len() < limit::REPLICAS {
            self.casualties.push(Replica { miner, standing, attestation: None, commitment, latency_us: 0 });
        }
    }
}
