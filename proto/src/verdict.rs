//! What a validator rules.

use bytes::Bytes;

use crate::attestation::{AttestationError, CountersignedAttestation, Outcome};
use crate::crypto::{Network, Payload, Scheme, Signed, SignedError};
use crate::id::{BlobId, Digest, EnvId, Hotkey, JobId};
use crate::job::JobSpec;
use crate::pb;
use crate::units::{ByteCount, UnixMillis};
use crate::wire::{self, WireError, WireMessage, limit};

/// What kind of trust a verdict rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VerdictKind {
    /// So many replicas of distinct owners gave the same result.
    Quorum(u8),
    /// Re-executed on the validator's own executor, with the same result.
    Audited,
    /// One replica, and the draw did not choose it. Its owner's held-back pay stands behind it.
    Unaudited,
    /// The result was wrong or could not be agreed on.
    Rejected(String),
    /// There is no result.
    Failed(String),
}

impl VerdictKind {
    /// Whether a result stands behind it.
    pub fn is_verified(&self) -> bool {
        matches!(self, Self::Quorum(_) | Self::Audited | Self::Unaudited)
    }
}

/// What one miner did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Gave the result of the verdict.
    Agreed,
    /// Gave another.
    Disagreed,
    /// Committed, and did not reveal.
    Withheld,
    /// Gave no result in time, or broke.
    Faulted,
}

/// One miner in an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Who.
    pub miner: Hotkey,
    /// What it did.
    pub standing: Standing,
    /// Its attestation, where there is one.
    pub attestation: Option<Digest>,
    /// Its salted commitment, where replicas committed before they revealed. Audits are drawn by it, or by the
    /// attestation's digest where there is none, so that anyone can draw them again.
    pub commitment: Option<Digest>,
    /// Offer to attestation (to commitment where there was one) by the validator's clock, in microseconds.
    pub latency_us: u64,
}

/// A validator's ruling on a job. Signed by its hotkey.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The job.
    pub job: JobId,
    /// The attempt that it rests on.
    pub attempt: u32,
    /// Place of the validator in the job's order of owners.
    pub rank: u32,
    /// What it rests on.
    pub kind: VerdictKind,
    /// How the execution ended; `None` without a result.
    pub outcome: Option<Outcome>,
    /// The result.
    pub output: BlobId,
    /// Its length.
    pub output_len: ByteCount,
    /// Where it was computed.
    pub env_id: EnvId,
    /// Who took part.
    pub replicas: Vec<Replica>,
    /// Epoch in which it counts.
    pub epoch: u64,
    /// By the validator's clock.
    pub issued_at: UnixMillis,
    /// BLAKE3 of the incentive file in force.
    pub incentive: Digest,
}

impl Signed<Verdict> {
    /// The validator.
    pub fn validator(&self) -> Hotkey {
        Hotkey(self.signer())
    }
}

impl WireMessage for Replica {
    type Raw = pb::Replica;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        use pb::replica::Standing as S;
        let standing = match S::try_from(raw.standing) {
            Ok(S::Agreed) => Standing::Agreed,
            Ok(S::Disagreed) => Standing::Disagreed,
            Ok(S::Withheld) => Standing::Withheld,
            Ok(S::Faulted) => Standing::Faulted,
            Ok(S::Unspecified) | Err(_) => return Err(WireError::field("standing")),
        };
        let optional =
            |bytes: &Bytes, field| if bytes.is_empty() { Ok(None) } else { wire::id(bytes, field).map(Some) };
        Ok(Self {
            miner: wire::id(&raw.miner, "miner")?,
            standing,
            attestation: optional(&raw.attestation, "attestation")?,
            commitment: optional(&raw.commitment, "commitment")?,
            latency_us: raw.latency_us,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        use pb::replica::Standing as S;
        let standing = match self.standing {
            Standing::Agreed => S::Agreed,
            Standing::Disagreed => S::Disagreed,
            Standing::Withheld => S::Withheld,
            Standing::Faulted => S::Faulted,
        };
        pb::Replica {
            miner: self.miner.into(),
            standing: standing.into(),
            attestation: self.attestation.map(Bytes::from).unwrap_or_default(),
            commitment: self.commitment.map(Bytes::from).unwrap_or_default(),
            latency_us: self.latency_us,
        }
    }
}

impl WireMessage for Verdict {
    type Raw = pb::Verdict;
    const MAX: usize = 8 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        use pb::verdict::Kind as K;
        let reason = wire::text(raw.reason, limit::TEXT, "reason")?;
        let quorum = u8::try_from(raw.quorum).map_err(|_| WireError::field("quorum"))?;
        let kind = match K::try_from(raw.kind) {
            Ok(K::Quorum) if quorum >= 2 => VerdictKind::Quorum(quorum),
            Ok(K::Audited) => VerdictKind::Audited,
            Ok(K::Unaudited) => VerdictKind::Unaudited,
            Ok(K::Rejected) => VerdictKind::Rejected(reason),
            Ok(K::Failed) => VerdictKind::Failed(reason),
            _ => return Err(WireError::field("kind")),
        };
        let outcome = raw.outcome.map(Outcome::from_raw).transpose()?;
        if kind.is_verified() && !outcome.is_some_and(Outcome::is_result) {
            return Err(WireError::field("outcome"));
        }
        if raw.replicas.len() > limit::REPLICAS {
            return Err(WireError::field("replicas"));
        }
        Ok(Self {
            job: wire::id(&raw.job, "job")?,
            attempt: raw.attempt,
            rank: raw.rank,
            kind,
            outcome,
            output: wire::id(&raw.output, "output")?,
            output_len: ByteCount(raw.output_len),
            env_id: wire::id(&raw.env_id, "env_id")?,
            replicas: raw.replicas.into_iter().map(Replica::from_raw).collect::<Result<_, _>>()?,
            epoch: raw.epoch,
            issued_at: UnixMillis(raw.issued_at_ms),
            incentive: wire::id(&raw.incentive, "incentive")?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        use pb::verdict::Kind as K;
        let (kind, quorum, reason) = match &self.kind {
            VerdictKind::Quorum(n) => (K::Quorum, *n, String::new()),
            VerdictKind::Audited => (K::Audited, 0, String::new()),
            VerdictKind::Unaudited => (K::Unaudited, 0, String::new()),
            VerdictKind::Rejected(reason) => (K::Rejected, 0, reason.clone()),
            VerdictKind::Failed(reason) => (K::Failed, 0, reason.clone()),
        };
        pb::Verdict {
            job: self.job.into(),
            attempt: self.attempt,
            rank: self.rank,
            kind: kind.into(),
            quorum: quorum.into(),
            reason,
            outcome: self.outcome.map(Outcome::to_raw),
            output: self.output.into(),
            output_len: self.output_len.0,
            env_id: self.env_id.into(),
            replicas: self.replicas.iter().map(Replica::to_raw).collect(),
            epoch: self.epoch,
            issued_at_ms: self.issued_at.0,
            incentive: self.incentive.into(),
        }
    }
}

impl Payload for Verdict {
    const CONTEXT: &'static str = "verdict";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// Spec, verdict and attestations of one job: enough to check a result with no network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// Mesh in which it holds.
    pub network: Network,
    /// What was asked.
    pub spec: Signed<JobSpec>,
    /// What was ruled.
    pub verdict: Signed<Verdict>,
    /// What was attested, in the order of the verdict's replicas that have one.
    pub attestations: Vec<CountersignedAttestation>,
}

/// Why a proof does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProofError {
    /// Malformed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A signature that does not match.
    #[error("{part}: {source}")]
    Signed {
        /// Spec or verdict.
        part: &'static str,
        /// What was wrong.
        source: SignedError,
    },
    /// An attestation that proves nothing.
    #[error("attestation of replica {index}: {source}")]
    Attestation {
        /// Place in the file, from 0.
        index: usize,
        /// What was wrong.
        source: AttestationError,
    },
    /// Verdict or attestation of another job, attempt, environment or input.
    #[error("{0} is of another job, attempt or environment")]
    Foreign(&'static str),
    /// The verdict claims what its attestations do not show.
    #[error("the verdict says {claimed} but {shown} attestations of distinct miners agree with its result")]
    Unsupported {
        /// Kind of the verdict.
        claimed: String,
        /// How many agree.
        shown: usize,
    },
}

impl Proof {
    /// Largest encoding read.
    pub const MAX: usize = limit::RPC_FRAME;

    /// Verifies every signature, that all parts are of one job, and that the attestations support the verdict: a
    /// quorum(k) needs k distinct miners that agree with it, a verified result at least one.
    ///
    /// It does not say whether the validator is to be trusted: compare [`Signed::<Verdict>::validator`] with a list.
    pub fn verify(raw: pb::Proof) -> Result<Self, ProofError> {
        let network = Network { genesis: wire::array(&raw.genesis, "genesis")?, netuid: wire::netuid(raw.netuid)? };
        let spec = Signed::<JobSpec>::verify(&network, wire::required(raw.spec, "spec")?)
            .map_err(|source| ProofError::Signed { part: "spec", source })?;
        let verdict = Signed::<Verdict>::verify(&network, wire::required(raw.verdict, "verdict")?)
            .map_err(|source| ProofError::Signed { part: "verdict", source })?;
        if raw.attestations.len() > limit::REPLICAS {
            return Err(WireError::field("attestations").into());
        }
        let attestations = raw
            .attestations
            .into_iter()
            .enumerate()
            .map(|(index, a)| {
                CountersignedAttestation::verify(&network, a)
                    .map_err(|source| ProofError::Attestation { index, source })
            })
            .collect::<Result<Vec<_>, _>>()?;
        check_support(&network, &spec, &verdict, &attestations)?;
        Ok(Self { network, spec, verdict, attestations })
    }

    /// As written to a file.
    pub fn to_raw(&self) -> pb::Proof {
        pb::Proof {
            genesis: Bytes::copy_from_slice(&self.network.genesis),
            netuid: self.network.netuid.into(),
            spec: Some(self.spec.to_wire()),
            verdict: Some(self.verdict.to_wire()),
            attestations: self.attestations.iter().map(CountersignedAttestation::to_raw).collect(),
        }
    }
}

/// Whether verified parts belong together and the attestations carry the verdict.
pub fn check_support(
    network: &Network,
    spec: &Signed<JobSpec>,
    verdict: &Signed<Verdict>,
    attestations: &[CountersignedAttestation],
) -> Result<(), ProofError> {
    let job = spec.id();
    if spec.network != *network {
        return Err(ProofError::Foreign("spec"));
    }
    if verdict.job != job {
        return Err(ProofError::Foreign("verdict"));
    }
    let mut agree: Vec<Hotkey> = Vec::new();
    for countersigned in attestations {
        let attestation = &countersigned.attestation;
        if (attestation.job, attestation.attempt, attestation.input) != (job, verdict.attempt, spec.input) {
            return Err(ProofError::Foreign("an attestation"));
        }
        let same = (Some(attestation.outcome), attestation.output, attestation.output_len, attestation.env_id)
            == (verdict.outcome, verdict.output, verdict.output_len, verdict.env_id);
        if same && !agree.contains(&countersigned.miner()) {
            agree.push(countersigned.miner());
        }
    }
    let needed = match verdict.kind {
        VerdictKind::Quorum(k) => usize::from(k),
        VerdictKind::Audited | VerdictKind::Unaudited => 1,
        VerdictKind::Rejected(_) | VerdictKind::Failed(_) => 0,
    };
    if agree.len() < needed {
        return Err(ProofError::Unsupported { claimed: format!("{:?}", verdict.kind), shown: agree.len() });
    }
    Ok(())
}
