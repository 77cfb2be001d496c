//! What the job machine asks to be kept over a restart. Stored forms: a field's number and meaning never change.

use bytes::Bytes;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{EnvId, Hotkey};
use sundara_proto::job::JobSpec;
use sundara_proto::pb;
use sundara_proto::rules::env::Environment;
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::{self, WireError};

use super::io::Submission;

/// A job, as far as a restart needs it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct JobRecord {
    /// The signed spec; absent once the job is finished.
    #[prost(message, optional, tag = "1")]
    pub spec: Option<pb::Signed>,
    /// This validator's place in the order of owners.
    #[prost(uint32, tag = "2")]
    pub rank: u32,
    /// Highest attempt that may have begun.
    #[prost(uint32, tag = "3")]
    pub attempt: u32,
    /// The verdict is written.
    #[prost(bool, tag = "4")]
    pub finished: bool,
    /// The spec's `not_after`, unix milliseconds.
    #[prost(uint64, tag = "5")]
    pub not_after_ms: u64,
    /// When the job was acknowledged, unix milliseconds.
    #[prost(uint64, tag = "6")]
    pub accepted_at_ms: u64,
    /// Program digest of the environment.
    #[prost(bytes = "bytes", tag = "7")]
    pub program: Bytes,
    /// Model root of the environment.
    #[prost(bytes = "bytes", tag = "8")]
    pub model_root: Bytes,
    /// Quantisation label of the environment.
    #[prost(string, tag = "9")]
    pub quantisation: String,
}

impl JobRecord {
    pub(super) fn open(submission: &Submission, attempt: u32, accepted_at: UnixMillis) -> Self {
        let environment = &submission.environment;
        Self {
            spec: Some(submission.spec.to_wire()),
            rank: submission.rank,
            attempt,
            finished: false,
            not_after_ms: submission.spec.not_after.0,
            accepted_at_ms: accepted_at.0,
            program: Bytes::copy_from_slice(&environment.program),
            model_root: Bytes::copy_from_slice(&environment.model_root),
            quantisation: environment.quantisation.clone(),
        }
    }

    pub(super) fn finished(rank: u32, attempt: u32, not_after: UnixMillis, accepted_at: UnixMillis) -> Self {
        Self {
            rank,
            attempt,
            finished: true,
            not_after_ms: not_after.0,
            accepted_at_ms: accepted_at.0,
            ..Self::default()
        }
    }

    /// The job again, from the record of an open one. Its signature was checked before it was written.
    ///
    /// # Errors
    /// When the record is of a finished job or was not written by this code.
    pub fn submission(&self) -> Result<Submission, WireError> {
        let spec = Signed::<JobSpec>::trusted(wire::required(self.spec.clone(), "spec")?)?;
        Ok(Submission {
            job: spec.id(),
            spec: std::sync::Arc::new(spec),
            environment: Environment {
                program: wire::array(&self.program, "program")?,
                model_root: wire::array(&self.model_root, "model_root")?,
                quantisation: self.quantisation.clone(),
            },
            rank: self.rank,
        })
    }

    /// When the job's id may be forgotten: until then a second submission is answered with the first one's verdict.
    pub fn seen_until(&self) -> UnixMillis {
        UnixMillis(self.not_after_ms).plus(JobSpec::SEEN_GRACE)
    }
}

/// What is known of a miner in all environments together.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MinerRecord {
    /// Its hotkey, 32 bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub miner: Bytes,
    /// Logarithm of the likelihood ratio of cheat to honest.
    #[prost(double, tag = "2")]
    pub suspicion: f64,
    /// Not scheduled before, unix milliseconds.
    #[prost(uint64, tag = "3")]
    pub dropped_until_ms: u64,
    /// Why.
    #[prost(string, tag = "4")]
    pub reason: String,
    /// Offences recorded.
    #[prost(uint32, tag = "5")]
    pub offences: u32,
}

impl MinerRecord {
    /// Whose record; `None` when it was not written by this code.
    pub fn hotkey(&self) -> Option<Hotkey> {
        Hotkey::try_from(self.miner.as_ref()).ok()
    }
}

/// Clean audited results of a miner in one environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CleanRecord {
    /// Who.
    pub miner: Hotkey,
    /// Where.
    pub env_id: EnvId,
    /// How many since the last failure.
    pub clean: u32,
}
