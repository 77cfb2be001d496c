//! What an executor says a job came to, and its miner's word for it.

use crate::crypto::{Context, Network, Payload, Scheme, Signed, SignedError};
use crate::id::{BlobId, Digest, EnvId, Hotkey, JobId, NodeId};
use crate::pb;
use crate::units::{ByteCount, UnixMillis};
use crate::wire::{self, WireError, WireMessage};
use bytes::Bytes;

/// How an execution ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The entry returned, or exited with status 0.
    Completed,
    /// Exited with another status.
    ExitCode(i32),
    /// Trapped; the number is the engine's name for why, equal on every machine.
    Trap(i32),
    /// Used up its fuel.
    OutOfFuel,
    /// Asked for more memory than its limit and could not go on.
    MemoryLimit,
    /// Wrote more than its limit.
    OutputLimit,
    /// Not a program that the engine accepts.
    InvalidModule,
    /// Stopped by the wall clock or a cancellation: says nothing about the job.
    Aborted,
    /// Ended in a way that differs between machines (stack overflow): no result.
    Indeterminate,
}

impl Outcome {
    /// Whether every honest executor ends the same way, so that a digest means something.
    pub fn is_result(self) -> bool {
        !matches!(self, Self::Aborted | Self::Indeterminate)
    }

    /// From the wire.
    pub fn from_raw(raw: pb::Outcome) -> Result<Self, WireError> {
        use pb::outcome::Kind;
        let kind = Kind::try_from(raw.kind).map_err(|_| WireError::field("outcome"))?;
        let plain = |outcome| {
            if raw.code == 0 { Ok(outcome) } else { Err(WireError::field("outcome.code")) }
        };
        match kind {
            Kind::Unspecified => Err(WireError::field("outcome")),
            Kind::ExitCode => Ok(Self::ExitCode(raw.code)),
            Kind::Trap => Ok(Self::Trap(raw.code)),
            Kind::Completed => plain(Self::Completed),
            Kind::OutOfFuel => plain(Self::OutOfFuel),
            Kind::MemoryLimit => plain(Self::MemoryLimit),
            Kind::OutputLimit => plain(Self::OutputLimit),
            Kind::InvalidModule => plain(Self::InvalidModule),
            Kind::Aborted => plain(Self::Aborted),
            Kind::Indeterminate => plain(Self::Indeterminate),
        }
    }

    /// As sent.
    pub fn to_raw(self) -> pb::Outcome {
        use pb::outcome::Kind;
        let (kind, code) = match self {
            Self::Completed => (Kind::Completed, 0),
            Self::ExitCode(code) => (Kind::ExitCode, code),
            Self::Trap(code) => (Kind::Trap, code),
            Self::OutOfFuel => (Kind::OutOfFuel, 0),
            Self::MemoryLimit => (Kind::MemoryLimit, 0),
            Self::OutputLimit => (Kind::OutputLimit, 0),
            Self::InvalidModule => (Kind::InvalidModule, 0),
            Self::Aborted => (Kind::Aborted, 0),
            Self::Indeterminate => (Kind::Indeterminate, 0),
        };
        pb::Outcome { kind: kind.into(), code }
    }
}

/// What an execution used. Fuel is exact and compared; the rest is the executor's own word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Units of wasm fuel, without the warm image's.
    pub fuel: u64,
    /// Highest linear memory.
    pub peak_memory: ByteCount,
    /// Wall time in microseconds.
    pub wall_us: u64,
}

/// An owner's word that an executor works for it. Signed by the owner's hotkey.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecutorCert {
    /// Mesh in which it holds.
    pub network: Network,
    /// The executor's node key.
    pub executor: NodeId,
    /// Class of hardware that the owner sells it as.
    pub hardware_class: String,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// At most 24 h later; renewable.
    pub expires_at: UnixMillis,
}

impl WireMessage for ExecutorCert {
    type Raw = pb::ExecutorCert;
    const MAX: usize = 1 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Ok(Self {
            network: Network { genesis: wire::array(&raw.genesis, "genesis")?, netuid: wire::netuid(raw.netuid)? },
            executor: wire::id(&raw.executor, "executor")?,
            hardware_class: wire::name(raw.hardware_class, "hardware_class")?,
            issued_at: UnixMillis(raw.issued_at_ms),
            expires_at: UnixMillis(raw.expires_at_ms),
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::ExecutorCert {
            genesis: Bytes::copy_from_slice(&self.network.genesis),
            netuid: self.network.netuid.into(),
            executor: self.executor.into(),
            hardware_class: self.hardware_class.clone(),
            issued_at_ms: self.issued_at.0,
            expires_at_ms: self.expires_at.0,
        }
    }
}

impl Payload for ExecutorCert {
    const CONTEXT: &'static str = "executor-cert";
    const SCHEME: Scheme = Scheme::Sr25519;
}

impl Signed<ExecutorCert> {
    /// Who vouches for the executor.
    pub fn owner(&self) -> Hotkey {
        Hotkey(self.signer())
    }
}

/// What a job came to, signed by the executor's ed25519 node key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attestation {
    /// The job.
    pub job: JobId,
    /// Which attempt at it, from 0.
    pub attempt: u32,
    /// Environment in which it ran.
    pub env_id: EnvId,
    /// What it read.
    pub input: BlobId,
    /// How it ended.
    pub outcome: Outcome,
    /// What it wrote; the id of the empty blob where there is no result.
    pub output: BlobId,
    /// Its length.
    pub output_len: ByteCount,
    /// What it used.
    pub usage: Usage,
    /// The owner's certificate for the executor, as signed. Not verified by parsing: see [`verify_attestation`].
    pub executor_cert: pb::Signed,
    /// Start, by the executor's clock.
    pub started_at: UnixMillis,
    /// End, by the executor's clock.
    pub finished_at: UnixMillis,
}

impl Attestation {
    /// What replicas are compared by, within one environment: outcome, output and fuel. `None` where there is no result.
    pub fn result_digest(&self) -> Option<Digest> {
        self.outcome.is_result().then(|| {
            let outcome = self.outcome.to_raw();
            Context::RESULT.digest(&[
                self.env_id.as_ref(),
                &outcome.kind.to_le_bytes(),
                &outcome.code.to_le_bytes(),
                self.output.as_ref(),
                &self.output_len.0.to_le_bytes(),
                &self.usage.fuel.to_le_bytes(),
            ])
        })
    }
}

impl Signed<Attestation> {
    /// Digest of payload and signature, by which verdicts and countersignatures name it.
    pub fn digest(&self) -> Digest {
        Context::ATTESTATION.digest(&[self.payload(), self.signature()])
    }
    /// The executor.
    pub fn executor(&self) -> NodeId {
        NodeId(self.signer())
    }
}

impl WireMessage for Attestation {
    type Raw = pb::Attestation;
    const MAX: usize = 4 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        let usage = raw.usage.unwrap_or_default();
        Ok(Self {
            job: wire::id(&raw.job, "job")?,
            attempt: raw.attempt,
            env_id: wire::id(&raw.env_id, "env_id")?,
            input: wire::id(&raw.input, "input")?,
            outcome: Outcome::from_raw(wire::required(raw.outcome, "outcome")?)?,
            output: wire::id(&raw.output, "output")?,
            output_len: ByteCount(raw.output_len),
            usage: Usage { fuel: usage.fuel, peak_memory: ByteCount(usage.peak_memory_bytes), wall_us: usage.wall_us },
            executor_cert: wire::required(raw.executor_cert, "executor_cert")?,
            started_at: UnixMillis(raw.started_at_ms),
            finished_at: UnixMillis(raw.finished_at_ms),
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::Attestation {
            job: self.job.into(),
            attempt: self.attempt,
            env_id: self.env_id.into(),
            input: self.input.into(),
            outcome: Some(self.outcome.to_raw()),
            output: self.output.into(),
            output_len: self.output_len.0,
            usage: Some(pb::Usage {
                fuel: self.usage.fuel,
                peak_memory_bytes: self.usage.peak_memory.0,
                wall_us: self.usage.wall_us,
            }),
            executor_cert: Some(self.executor_cert.clone()),
            started_at_ms: self.started_at.0,
            finished_at_ms: self.finished_at.0,
        }
    }
}

impl Payload for Attestation {
    const CONTEXT: &'static str = "attestation";
    const SCHEME: Scheme = Scheme::Ed25519;
}

/// A miner's word for one of its executors' attestations. Signed by the miner's hotkey.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Countersignature {
    /// [`Signed::<Attestation>::digest`] of the attestation.
    pub attestation: Digest,
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: u32,
}

impl WireMessage for Countersignature {
    type Raw = pb::Countersignature;
    const MAX: usize = 256;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Ok(Self {
            attestation: wire::id(&raw.attestation, "attestation")?,
            job: wire::id(&raw.job, "job")?,
            attempt: raw.attempt,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::Countersignature { attestation: self.attestation.into(), job: self.job.into(), attempt: self.attempt }
    }
}

impl Payload for Countersignature {
    const CONTEXT: &'static str = "countersignature";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// Why an attestation proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttestationError {
    /// Malformed, or a signature that does not match.
    #[error("{part}: {source}")]
    Signed {
        /// Attestation, executor certificate or countersignature.
        part: &'static str,
        /// What was wrong.
        source: SignedError,
    },
    /// The executor certificate names another executor or mesh.
    #[error("executor certificate is for another executor or mesh")]
    ForeignExecutor,
    /// The executor certificate did not hold when the job ran.
    #[error("executor certificate was not valid when the job ran")]
    CertificateExpired,
    /// Certificate and countersignature are of two owners.
    #[error("countersigned by another hotkey than the executor's owner")]
    ForeignOwner,
    /// The countersignature is over another attestation.
    #[error("countersignature is over another attestation")]
    ForeignCountersignature,
}

/// An executor's attestation and its owner's countersignature, both verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CountersignedAttestation {
    /// The executor's word.
    pub attestation: Signed<Attestation>,
    /// The owner's.
    pub countersignature: Signed<Countersignature>,
}

impl CountersignedAttestation {
    /// Verifies three signatures (attestation, executor certificate, countersignature) and that they belong together.
    pub fn verify(network: &Network, raw: pb::CountersignedAttestation) -> Result<Self, AttestationError> {
        Self::verify_known(network, raw, |_| false)
    }

    /// As [`Self::verify`], but leaves out the signature of an executor certificate whose [`cert_digest`] the caller
    /// `knows` from an earlier success: every attestation of an executor shows the same one.
    pub fn verify_known(
        network: &Network,
        raw: pb::CountersignedAttestation,
        known: impl FnOnce(&Digest) -> bool,
    ) -> Result<Self, AttestationError> {
        let malformed = |part| AttestationError::Signed { part, source: WireError::field(part).into() };
        let raw_attestation = raw.attestation.ok_or_else(|| malformed("attestation"))?;
        let raw_counter = raw.countersignature.ok_or_else(|| malformed("countersignature"))?;
        let (attestation, cert) = verify_attestation_known(network, raw_attestation, known)?;
        let countersignature = Signed::<Countersignature>::verify(network, raw_counter)
            .map_err(|source| AttestationError::Signed { part: "countersignature", source })?;
        if cert.owner().0 != countersignature.signer() {
            return Err(AttestationError::ForeignOwner);
        }
        let over = (countersignature.attestation, countersignature.job, countersignature.attempt);
        if over != (attestation.digest(), attestation.job, attestation.attempt) {
            return Err(AttestationError::ForeignCountersignature);
        }
        Ok(Self { attestation, countersignature })
    }

    /// The miner that answers for it.
    pub fn miner(&self) -> Hotkey {
        Hotkey(self.countersignature.signer())
    }

    /// As sent.
    pub fn to_raw(&self) -> pb::CountersignedAttestation {
        pb::CountersignedAttestation {
            attestation: Some(self.attestation.to_wire()),
            countersignature: Some(self.countersignature.to_wire()),
        }
    }
}

/// Digest by which a verified executor certificate is remembered: payload, signer and signature.
pub fn cert_digest(cert: &pb::Signed) -> Digest {
    Context::ATTESTATION.digest(&[b"executor-cert", &cert.payload, &cert.signer, &cert.signature])
}

/// Verifies an executor's attestation and the certificate inside it. The owner's countersignature is checked by
/// [`CountersignedAttestation::verify`]; a validator's own executor has none.
pub fn verify_attestation(
    network: &Network,
    raw: pb::Signed,
) -> Result<(Signed<Attestation>, Signed<ExecutorCert>), AttestationError> {
    verify_attestation_known(network, raw, |_| false)
}

fn verify_attestation_known(
    network: &Network,
    raw: pb::Signed,
    known: impl FnOnce(&Digest) -> bool,
) -> Result<(Signed<Attestation>, Signed<ExecutorCert>), AttestationError> {
    let attestation = Signed::<Attestation>::verify(network, raw)
        .map_err(|source| AttestationError::Signed { part: "attestation", source })?;
    let raw_cert = attestation.executor_cert.clone();
    let cert = if known(&cert_digest(&raw_cert)) {
        Signed::<ExecutorCert>::trusted(raw_cert).map_err(SignedError::from)
    } else {
        Signed::<ExecutorCert>::verify(network, raw_cert)
    };
    let cert = cert.map_err(|source| AttestationError::Signed { part: "executor certificate", source })?;
    if cert.network != *network || cert.executor != attestation.executor() {
        return Err(AttestationError::ForeignExecutor);
    }
    let valid = cert.issued_at <= attestation.started_at.plus(UnixMillis::SKEW_MAX)
        && attestation.started_at <= cert.expires_at;
    if !valid || attestation.finished_at < attestation.started_at {
        return Err(AttestationError::CertificateExpired);
    }
    Ok((attestation, cert))
}
