//! Simulated miners.

use std::collections::HashMap;
use std::sync::Arc;

use sundara_proto::attestation::{Attestation, CountersignedAttestation};
use sundara_proto::id::{Digest, JobId};

use super::Behaviour;
use crate::domain::Now;
use crate::domain::job::testing::{attestation, commitment, countersigned};
use crate::domain::job::{Decline, Input, Part};

/// What every honest executor writes for a job.
pub(super) fn right(job: &JobId) -> Vec<u8> {
    job.0[..8].to_vec()
}

/// A part that a miner works on.
struct Work {
    attestation: Attestation,
    salt: [u8; 32],
}

/// One miner.
pub(super) struct Miner {
    pub(super) behaviour: Behaviour,
    pub(super) up: bool,
    /// Parts accepted so far.
    pub(super) parts: u32,
    work: HashMap<(JobId, u32), Work>,
    /// Latest attempt at each job that it took. As in the real one's log, this outlives the work: a doubled offer that
    /// arrives after the reveal must not make it commit anew.
    taken: HashMap<JobId, u32>,
    /// An attestation of an earlier job.
    old: Option<Arc<CountersignedAttestation>>,
}

/// Random numbers of one act.
pub(super) struct Luck {
    /// Below 1,000.
    pub(super) permille: u32,
    pub(super) bytes: [u8; 32],
}

impl Miner {
    pub(super) fn new(behaviour: Behaviour) -> Self {
        Self { behaviour, up: true, parts: 0, work: HashMap::new(), taken: HashMap::new(), old: None }
    }

    /// Loses its connection and everything it was doing.
    pub(super) fn fall(&mut self) {
        self.up = false;
        self.work.clear();
    }

    /// Answers to an offer, each with a delay in microseconds.
    pub(super) fn offered(&mut self, part: Part, commits: bool, luck: &Luck, now: Now) -> Vec<(u64, Input)> {
        if self.behaviour == Behaviour::Dead {
            return Vec::new();
        }
        if self.taken.get(&part.job).is_some_and(|latest| *latest >= part.attempt) {
            return vec![(0, Input::Declined { part, reason: Decline::Duplicate, detail: "known".to_owned() })];
        }
        if self.behaviour == Behaviour::Declining {
            return vec![(0, Input::Declined { part, reason: Decline::NotThis, detail: "limits too high".to_owned() })];
        }
        self.parts += 1;
        self.taken.insert(part.job, part.attempt);
        let mut answers = vec![(0, Input::Accepted(part))];
        let time = match self.behaviour {
            Behaviour::Slow => 3_600_000_000,
            _ => 200 + u64::from(luck.permille) * 10,
        };
        if self.behaviour == Behaviour::Faulting {
            answers.push((time, Input::Fault { part, reason: "executor broke".to_owned() }));
            return answers;
        }
        let work = Work { attestation: self.attest(&part, luck, now), salt: luck.bytes };
        if commits {
            let commitment = match self.behaviour {
                Behaviour::Copier => Digest(luck.bytes),
                _ => commitment(&part, &work.attestation, &work.salt),
            };
            self.work.insert((part.job, part.attempt), work);
            answers.push((time, Input::Committed { part, commitment }));
        } else {
            let revealed = self.hand_in(part, &work);
            self.work.insert((part.job, part.attempt), work);
            answers.push((time, revealed));
        }
        answers
    }

    fn attest(&self, part: &Part, luck: &Luck, now: Now) -> Attestation {
        let lie = match self.behaviour {
            Behaviour::Wrong(permille) => luck.permille < permille,
            Behaviour::TrustThenWrong(parts) => self.parts > parts,
            // Alone it has nobody to copy from and makes something up.
            Behaviour::Colluder | Behaviour::Copier => true,
            _ => false,
        };
        let output = match (lie, self.behaviour) {
            (false, _) => right(&part.job),
            (true, Behaviour::Colluder) => b"our lie".to_vec(),
            (true, _) => part.miner.0[..5].to_vec(),
        };
        attestation(part, &output, now)
    }

    fn hand_in(&mut self, part: Part, work: &Work) -> Input {
        let mut attested = countersigned(&part, &work.attestation);
        if self.behaviour == Behaviour::Replayer {
            let old = self.old.replace(attested.clone());
            attested = old.unwrap_or(attested);
        }
        Input::Revealed { part, attestation: attested, salt: work.salt }
    }

    /// The answer to a reveal, if any.
    pub(super) fn asked(&mut self, part: Part) -> Option<Input> {
        if matches!(self.behaviour, Behaviour::Withholder | Behaviour::Dead) {
            return None;
        }
        let mut work = self.work.remove(&(part.job, part.attempt))?;
        if self.behaviour == Behaviour::Copier {
            // By now its peer's result is known to it.
            work.attestation.output = sundara_proto::id::BlobId::of(&right(&part.job));
        }
        Some(self.hand_in(part, &work))
    }

    pub(super) fn abandoned(&mut self, part: &Part) {
        self.work.remove(&(part.job, part.attempt));
    }
}
