//! What a requester asks for.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::crypto::{Context, Network, Payload, Scheme, Signed};
use crate::id::{BlobId, Hotkey, JobId, ModelId};
use crate::pb;
use crate::units::{BlockNumber, ByteCount, UnixMillis};
use crate::wire::{self, WireError, WireMessage, limit};

/// What one execution may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Units of wasm fuel, roughly one an instruction: about 2-4e9 a second of one core.
    pub fuel: u64,
    /// Linear memory and tables.
    pub memory: ByteCount,
    /// Bytes of standard output.
    pub output: ByteCount,
    /// Wall time of the execution, in milliseconds. Reaching it is no result, but an abort.
    pub wall_ms: u64,
}

impl Limits {
    /// Most that the protocol carries; nodes configure less.
    pub const MAX: Self =
        Self { fuel: u64::MAX >> 1, memory: ByteCount::gib(4), output: ByteCount::mib(256), wall_ms: 24 * 3600 * 1000 };

    /// Wall time as a duration.
    pub fn wall(&self) -> Duration {
        Duration::from_millis(self.wall_ms)
    }

    /// The smaller of each.
    #[must_use]
    pub fn min(&self, other: &Self) -> Self {
        Self {
            fuel: self.fuel.min(other.fuel),
            memory: self.memory.min(other.memory),
            output: self.output.min(other.output),
            wall_ms: self.wall_ms.min(other.wall_ms),
        }
    }

    /// Whether no limit exceeds `other`'s.
    pub fn within(&self, other: &Self) -> bool {
        self.min(other) == *self
    }

    pub(crate) fn from_raw(raw: pb::Limits) -> Result<Self, WireError> {
        let limits = Self {
            fuel: raw.fuel,
            memory: ByteCount(raw.memory_bytes),
            output: ByteCount(raw.output_bytes),
            wall_ms: raw.wall_ms,
        };
        if limits.within(&Self::MAX) { Ok(limits) } else { Err(WireError::field("limits")) }
    }

    pub(crate) fn to_raw(self) -> pb::Limits {
        pb::Limits { fuel: self.fuel, memory_bytes: self.memory.0, output_bytes: self.output.0, wall_ms: self.wall_ms }
    }
}

impl Default for Limits {
    /// 1e10 units of fuel (one stage of verification.md), 512 MiB, 16 MiB of output, a minute.
    fn default() -> Self {
        Self { fuel: 10_000_000_000, memory: ByteCount::mib(512), output: ByteCount::mib(16), wall_ms: 60_000 }
    }
}

/// What runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Program {
    /// A published model.
    Model {
        /// Which.
        model: ModelId,
        /// Blob of its manifest.
        manifest: BlobId,
        /// Export that is called; empty for the manifest's default.
        entry: String,
    },
    /// A reference job that every node has.
    Builtin {
        /// Its name.
        name: String,
    },
}

/// A job as its requester signed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobSpec {
    /// Mesh in which it runs.
    pub network: Network,
    /// Block of the metagraph that the requester saw.
    pub block: BlockNumber,
    /// Makes the id unique; a retry keeps it.
    pub nonce: [u8; 16],
    /// No validator begins it later.
    pub not_after: UnixMillis,
    /// What runs.
    pub program: Program,
    /// Standard input.
    pub input: BlobId,
    /// Its length.
    pub input_len: ByteCount,
    /// Readable by the job as /job/params, at most 4 KiB.
    pub params: Bytes,
    /// Readable by the job as /job/seed, and the key of its randomness.
    pub seed: u64,
    /// What one execution may use.
    pub limits: Limits,
    /// Replicas wanted, 1 to 16.
    pub replicas: u8,
    /// Hardware class wanted; empty for any.
    pub hardware_class: String,
    /// Whether output is streamed while it is made.
    pub stream: bool,
}

impl JobSpec {
    /// Longest time between signing and `not_after`.
    pub const NOT_AFTER_MAX: Duration = Duration::from_secs(24 * 3600);
    /// How long ids seen are kept after `not_after`.
    pub const SEEN_GRACE: Duration = Duration::from_secs(60);
}

impl JobId {
    /// Key of the randomness that the job sees: the same for each of its replicas, attempts and auditors.
    pub fn randomness_key(&self) -> [u8; 32] {
        Context::JOB_SEED.digest_one(self.as_ref()).0
    }
}

impl Signed<JobSpec> {
    /// Digest of the payload as signed.
    pub fn id(&self) -> JobId {
        JobId(Context::JOB.digest_one(self.payload()).0)
    }
    /// Who asks.
    pub fn requester(&self) -> Hotkey {
        Hotkey(self.signer())
    }
}

impl WireMessage for JobSpec {
    type Raw = pb::JobSpec;
    const MAX: usize = 16 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        let program = match wire::required(raw.program, "program")? {
            pb::job_spec::Program::Model(m) => Program::Model {
                model: wire::id(&m.model, "model")?,
                manifest: wire::id(&m.manifest, "manifest")?,
                entry: wire::name(m.entry, "entry")?,
            },
            pb::job_spec::Program::Builtin(b) => Program::Builtin { name: wire::name(b.name, "builtin")? },
        };
        let replicas = u8::try_from(raw.replicas).map_err(|_| WireError::field("replicas"))?;
        if replicas == 0 || usize::from(replicas) > limit::REPLICAS {
            return Err(WireError::field("replicas"));
        }
        if raw.params.len() > limit::PARAMS {
            return Err(WireError::field("params"));
        }
        if raw.input_len > limit::INPUT.0 {
            return Err(WireError::field("input_len"));
        }
        Ok(Self {
            network: Network { genesis: wire::array(&raw.genesis, "genesis")?, netuid: wire::netuid(raw.netuid)? },
            block: BlockNumber(raw.block),
            nonce: wire::array(&raw.nonce, "nonce")?,
            not_after: UnixMillis(raw.not_after_ms),
            program,
            input: wire::id(&raw.input, "input")?,
            input_len: ByteCount(raw.input_len),
            params: raw.params,
            seed: raw.seed,
            limits: Limits::from_raw(wire::required(raw.limits, "limits")?)?,
            replicas,
            hardware_class: wire::name(raw.hardware_class, "hardware_class")?,
            stream: raw.stream,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        let program = match &self.program {
            Program::Model { model, manifest, entry } => pb::job_spec::Program::Model(pb::ModelProgram {
                model: (*model).into(),
                manifest: (*manifest).into(),
                entry: entry.clone(),
            }),
            Program::Builtin { name } => pb::job_spec::Program::Builtin(pb::BuiltinProgram { name: name.clone() }),
        };
        pb::JobSpec {
            genesis: Bytes::copy_from_slice(&self.network.genesis),
            netuid: self.network.netuid.into(),
            block: self.block.0,
            nonce: Bytes::copy_from_slice(&self.nonce),
            not_after_ms: self.not_after.0,
            program: Some(program),
            input: self.input.into(),
            input_len: self.input_len.0,
            params: self.params.clone(),
            seed: self.seed,
            limits: Some(self.limits.to_raw()),
            replicas: self.replicas.into(),
            hardware_class: self.hardware_class.clone(),
            stream: self.stream,
        }
    }
}

impl Payload for JobSpec {
    const CONTEXT: &'static str = "job-spec";
    const SCHEME: Scheme = Scheme::Sr25519;
}
