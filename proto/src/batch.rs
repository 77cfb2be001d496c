//! Evidence in bulk: entries behind one signed Merkle root, and the proofs and audit secrets that go on gossip at once.
//!
//! A root says that the entries exist and in which order; the page itself travels by stream, to strangers only once the
//! epoch's weights are revealed. So a validator that only listens cannot reproduce an epoch's scores in time to copy them.

use bytes::Bytes;

use crate::attestation::CountersignedAttestation;
use crate::crypto::{Context, Network, Payload, Scheme, Signed};
use crate::id::{Digest, Hotkey, JobId};
use crate::pb;
use crate::units::UnixMillis;
use crate::wire::{self, WireError, WireMessage, limit};

/// A signed root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Mesh in which it holds.
    pub network: Network,
    /// Epoch in which its entries count.
    pub epoch: u64,
    /// Place among the signer's batches, from 0.
    pub sequence: u64,
    /// Root over the entries' encodings, see [`crate::rules::merkle`].
    pub root: Digest,
    /// Entries, 1 to 500.
    pub count: u32,
    /// Digest of the signer's batch before this one; zeros for the first.
    pub previous: Digest,
    /// By the signer's clock.
    pub issued_at: UnixMillis,
}

impl Signed<Batch> {
    /// Who made it.
    pub fn author(&self) -> Hotkey {
        Hotkey(self.signer())
    }
    /// What the next one names as `previous`.
    pub fn digest(&self) -> Digest {
        Context::BATCH.digest_one(self.payload())
    }
}

impl WireMessage for Batch {
    type Raw = pb::Batch;
    const MAX: usize = 1 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        if raw.count == 0 || raw.count as usize > limit::PAGE_ENTRIES {
            return Err(WireError::field("count"));
        }
        Ok(Self {
            network: Network { genesis: wire::array(&raw.genesis, "genesis")?, netuid: wire::netuid(raw.netuid)? },
            epoch: raw.epoch,
            sequence: raw.sequence,
            root: wire::id(&raw.root, "root")?,
            count: raw.count,
            previous: wire::id(&raw.previous, "previous")?,
            issued_at: UnixMillis(raw.issued_at_ms),
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::Batch {
            genesis: Bytes::copy_from_slice(&self.network.genesis),
            netuid: self.network.netuid.into(),
            epoch: self.epoch,
            sequence: self.sequence,
            root: self.root.into(),
            count: self.count,
            previous: self.previous.into(),
            issued_at_ms: self.issued_at.0,
        }
    }
}

impl Payload for Batch {
    const CONTEXT: &'static str = "batch";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// A step of a job, as one party saw it. Signed as an entry of that party's batch; the other party's batch has its twin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: u32,
    /// Which step.
    pub stage: Stage,
    /// Whose job it is.
    pub validator: Hotkey,
    /// Who works on it.
    pub miner: Hotkey,
    /// When, by the writer's clock.
    pub at: UnixMillis,
}

/// Step of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The miner took the offer.
    Accepted,
    /// An executor began.
    Started,
    /// The attestation was handed over.
    Finished,
}

impl WireMessage for Receipt {
    type Raw = pb::Receipt;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        use pb::receipt::Stage as S;
        let stage = match S::try_from(raw.stage) {
            Ok(S::Accepted) => Stage::Accepted,
            Ok(S::Started) => Stage::Started,
            Ok(S::Finished) => Stage::Finished,
            Ok(S::Unspecified) | Err(_) => return Err(WireError::field("stage")),
        };
        Ok(Self {
            job: wire::id(&raw.job, "job")?,
            attempt: raw.attempt,
            stage,
            validator: wire::id(&raw.validator, "validator")?,
            miner: wire::id(&raw.miner, "miner")?,
            at: UnixMillis(raw.at_ms),
        })
    }

    fn to_raw(&self) -> Self::Raw {
        use pb::receipt::Stage as S;
        let stage = match self.stage {
            Stage::Accepted => S::Accepted,
            Stage::Started => S::Started,
            Stage::Finished => S::Finished,
        };
        pb::Receipt {
            job: self.job.into(),
            attempt: self.attempt,
            stage: stage.into(),
            validator: self.validator.into(),
            miner: self.miner.into(),
            at_ms: self.at.0,
        }
    }
}

/// Commitment to an epoch's audit secret, and the secret of an earlier epoch. Signed by the validator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEpoch {
    /// Mesh in which it holds.
    pub network: Network,
    /// Epoch that the commitment is for.
    pub epoch: u64,
    /// See [`crate::rules::select::audit_commitment`].
    pub commitment: Digest,
    /// Secret of an ended epoch: epoch number and 32 bytes.
    pub revealed: Option<(u64, [u8; 32])>,
}

impl WireMessage for AuditEpoch {
    type Raw = pb::AuditEpoch;
    const MAX: usize = 1 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        let revealed = if raw.revealed_secret.is_empty() {
            None
        } else {
            Some((raw.revealed_epoch, wire::array(&raw.revealed_secret, "revealed_secret")?))
        };
        Ok(Self {
            network: Network { genesis: wire::array(&raw.genesis, "genesis")?, netuid: wire::netuid(raw.netuid)? },
            epoch: raw.epoch,
            commitment: wire::id(&raw.commitment, "commitment")?,
            revealed,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        let (revealed_epoch, secret) = self.revealed.unwrap_or_default();
        pb::AuditEpoch {
            genesis: Bytes::copy_from_slice(&self.network.genesis),
            netuid: self.network.netuid.into(),
            epoch: self.epoch,
            commitment: self.commitment.into(),
            revealed_secret: if self.revealed.is_some() { Bytes::copy_from_slice(&secret) } else { Bytes::new() },
            revealed_epoch,
        }
    }
}

impl Payload for AuditEpoch {
    const CONTEXT: &'static str = "audit-epoch";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// A result that its signers cannot defend: anyone can run the job in the same environment and see. Signed by the
/// accuser, whose own executor's attestation stands against the accused one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FraudProof {
    /// Mesh in which it holds.
    pub network: Network,
    /// The job, as signed by its requester. Unverified here.
    pub spec: pb::Signed,
    /// The accused result. Unverified here: see [`CountersignedAttestation::verify`].
    pub accused: pb::CountersignedAttestation,
    /// What the accuser's executor found. Unverified here.
    pub reference: pb::Signed,
}

impl WireMessage for FraudProof {
    type Raw = pb::FraudProof;
    const MAX: usize = limit::PAYLOAD;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Ok(Self {
            network: Network { genesis: wire::array(&raw.genesis, "genesis")?, netuid: wire::netuid(raw.netuid)? },
            spec: wire::required(raw.spec, "spec")?,
            accused: wire::required(raw.accused, "accused")?,
            reference: wire::required(raw.reference, "reference")?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::FraudProof {
            genesis: Bytes::copy_from_slice(&self.network.genesis),
            netuid: self.network.netuid.into(),
            spec: Some(self.spec.clone()),
            accused: Some(self.accused.clone()),
            reference: Some(self.reference.clone()),
        }
    }
}

impl Payload for FraudProof {
    const CONTEXT: &'static str = "fraud-proof";
    const SCHEME: Scheme = Scheme::Sr25519;
}

impl Signed<FraudProof> {
    /// Who says so.
    pub fn accuser(&self) -> Hotkey {
        Hotkey(self.signer())
    }

    /// As [`FraudProof::check`], and that the reference is the accuser's own: by an executor that it certified.
    pub fn check(&self) -> Option<Hotkey> {
        let reference = crate::attestation::verify_attestation(&self.network, self.reference.clone()).ok()?;
        (reference.1.owner() == self.accuser()).then(|| self.value().check()).flatten()
    }

    /// The accused miner, the job and the attempt, read without checking a signature.
    pub fn about(&self) -> Option<(Hotkey, JobId, u32)> {
        let accused = Hotkey::try_from(self.accused.countersignature.as_ref()?.signer.as_ref()).ok()?;
        let attested = self.accused.attestation.clone()?;
        let attempt = Signed::<crate::attestation::Attestation>::trusted(attested).ok()?.attempt;
        let spec = Signed::<crate::job::JobSpec>::trusted(self.spec.clone()).ok()?;
        Some((accused, spec.id(), attempt))
    }
}

impl FraudProof {
    /// Checks everything that needs no execution: all signatures, one job and environment, two different results.
    /// Returns the accused miner.
    pub fn check(&self) -> Option<Hotkey> {
        let spec = Signed::<crate::job::JobSpec>::verify(&self.network, self.spec.clone()).ok()?;
        let accused = CountersignedAttestation::verify(&self.network, self.accused.clone()).ok()?;
        let (reference, _) = crate::attestation::verify_attestation(&self.network, self.reference.clone()).ok()?;
        let job = spec.id();
        let same_run = accused.attestation.job == job
            && reference.job == job
            && accused.attestation.env_id == reference.env_id
            && accused.attestation.input == spec.input
            && reference.input == spec.input;
        let results = (accused.attestation.result_digest()?, reference.result_digest()?);
        (same_run && results.0 != results.1).then(|| accused.miner())
    }
}
