//! Which results count, and which agree.
//!
//! **Owns** the checks that need no execution and no signature (the service verified those): that an attestation is of
//! this job, attempt, input and environment, by this miner, now; that it fits its commitment; and how many equal results
//! make a quorum. **Does not own** what is done about it.

use sundara_proto::attestation::{CountersignedAttestation, ExecutorCert};
use sundara_proto::id::{BlobId, Digest, EnvId};
use sundara_proto::job::{JobSpec, Limits};
use sundara_proto::rules::select;
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::WireMessage as _;

use super::job::Part;

/// What an honest answer to an offer must say.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// Whose answer to what.
    pub part: Part,
    /// The spec's input.
    pub input: BlobId,
    /// Environment of the attempt.
    pub env_id: EnvId,
    /// Limits of the spec.
    pub limits: Limits,
    /// Hardware class of the spec; empty for any.
    pub class: &'a str,
    /// When the offer went out, by this node's wall clock.
    pub offered_at: UnixMillis,
    /// This node's wall clock.
    pub now: UnixMillis,
}

/// Why an attestation does not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Objection {
    /// No honest miner sends it.
    Foreign(&'static str),
    /// An honest miner with a wrong clock or a defect may have sent it: no result, but no offence.
    Unusable(&'static str),
}

impl<'a> Expected<'a> {
    /// What is expected of `part` of a job.
    pub fn of(part: Part, spec: &'a JobSpec, env_id: EnvId, offered_at: UnixMillis, now: UnixMillis) -> Self {
        Self { part, input: spec.input, env_id, limits: spec.limits, class: &spec.hardware_class, offered_at, now }
    }

    /// Checks an attestation whose signatures were verified.
    ///
    /// # Errors
    /// The first objection.
    pub fn check(&self, countersigned: &CountersignedAttestation) -> Result<(), Objection> {
        let attestation = countersigned.attestation.value();
        let foreign = [
            (countersigned.miner() == self.part.miner, "attestation is countersigned by another miner"),
            (attestation.job == self.part.job, "attestation is of another job"),
            (attestation.attempt == self.part.attempt, "attestation is of another attempt"),
            (attestation.input == self.input, "attestation is of another input"),
            (attestation.env_id == self.env_id, "attestation is of another environment"),
        ];
        if let Some((_, what)) = foreign.into_iter().find(|(good, _)| !good) {
            return Err(Objection::Foreign(what));
        }
        let skew = UnixMillis::SKEW_MAX;
        let unusable = [
            // A start before the offer would let an expired certificate pass.
            (attestation.started_at.plus(skew) >= self.offered_at, "attestation starts before its offer: check clocks"),
            (attestation.finished_at <= self.now.plus(skew), "attestation ends in the future: check clocks"),
            (attestation.output_len <= self.limits.output, "attestation has more output than its limit"),
            (attestation.usage.fuel <= self.limits.fuel, "attestation has more fuel than its limit"),
            (self.class.is_empty() || self.has_class(countersigned), "executor is of another hardware class"),
        ];
        match unusable.into_iter().find(|(good, _)| !good) {
            Some((_, what)) => Err(Objection::Unusable(what)),
            None => Ok(()),
        }
    }

    fn has_class(&self, countersigned: &CountersignedAttestation) -> bool {
        ExecutorCert::decode(&countersigned.attestation.executor_cert.payload)
            .is_ok_and(|cert| cert.hardware_class == self.class)
    }
}

/// Whether what was revealed is what was committed to.
pub fn opens(part: &Part, commitment: &Digest, result: &Digest, salt: &[u8; 32]) -> bool {
    select::result_commitment(&part.job, part.attempt, &part.miner, result, salt) == *commitment
}

/// Equal results of distinct owners that a quorum needs, of `replicas` asked for: more than half, and at least two.
pub fn quorum_needed(replicas: usize) -> usize {
    (replicas / 2 + 1).max(2)
}

/// Whether all results are the same one.
pub fn unanimous(results: &[Digest]) -> bool {
    results.windows(2).all(|pair| pair[0] == pair[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quorum_is_a_majority_of_at_least_two() {
        let needed: Vec<usize> = (1..=7).map(quorum_needed).collect();
        assert_eq!(needed, [2, 2, 2, 3, 3, 4, 4]);
    }
}
