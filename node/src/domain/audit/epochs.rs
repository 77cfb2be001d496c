//! The secrets of epochs: committed to before, drawn with during, revealed after.

use sundara_proto::batch::AuditEpoch;
use sundara_proto::crypto::Network;
use sundara_proto::id::{Digest, Hotkey};
use sundara_proto::rules::select;
use sundara_proto::verdict::{Standing, Verdict, VerdictKind};

/// A validator's secret of one epoch. Its commitment is published before the epoch, the secret itself in the next one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct EpochSecret {
    /// The epoch.
    pub epoch: u64,
    /// Unknown to everyone else until the epoch is over.
    pub secret: [u8; 32],
}

impl EpochSecret {
    /// What is published before the epoch.
    pub fn commitment(&self) -> Digest {
        select::audit_commitment(self.epoch, &self.secret)
    }
}

impl std::fmt::Debug for EpochSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EpochSecret({}, secret not shown)", self.epoch)
    }
}

/// A validator's secrets around the present epoch. Persist [`Epochs::secrets`] before publishing an announcement: a
/// validator that forgets what it committed to cannot show its draws.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epochs {
    previous: Option<EpochSecret>,
    current: EpochSecret,
    next: EpochSecret,
}

impl Epochs {
    /// Begins in `epoch`, with two fresh random secrets.
    pub fn new(epoch: u64, current: [u8; 32], next: [u8; 32]) -> Self {
        Self {
            previous: None,
            current: EpochSecret { epoch, secret: current },
            next: EpochSecret { epoch: epoch + 1, secret: next },
        }
    }

    /// Goes on after a restart in `epoch` with what was stored; `fresh` fills what is missing. Stored secrets of other
    /// epochs than the present, the one before and the next are dropped.
    pub fn restored(epoch: u64, stored: &[EpochSecret], fresh: [[u8; 32]; 2]) -> Self {
        let find = |wanted: u64| stored.iter().copied().find(|s| s.epoch == wanted);
        let or_fresh = |wanted, secret| find(wanted).unwrap_or(EpochSecret { epoch: wanted, secret });
        Self {
            previous: epoch.checked_sub(1).and_then(find),
            current: or_fresh(epoch, fresh[0]),
            next: or_fresh(epoch + 1, fresh[1]),
        }
    }

    /// The secret to draw with now.
    pub fn current(&self) -> EpochSecret {
        self.current
    }

    /// All secrets that a restart needs.
    pub fn secrets(&self) -> Vec<EpochSecret> {
        self.previous.into_iter().chain([self.current, self.next]).collect()
    }

    /// Moves on to `epoch` when it is later than the present one: `true` then. `fresh` are random secrets, of which as
    /// many are used as epochs were skipped.
    pub fn turn(&mut self, epoch: u64, fresh: [[u8; 32]; 2]) -> bool {
        if epoch <= self.current.epoch {
            return false;
        }
        *self = Self::restored(epoch, &self.secrets(), fresh);
        true
    }

    /// What is published: the commitment to the next epoch, and the secret of the last one. `first`: the commitment to
    /// the present epoch, for a validator that was not there to make it before.
    pub fn announcement(&self, network: Network, first: bool) -> AuditEpoch {
        let committed = if first { &self.current } else { &self.next };
        AuditEpoch {
            network,
            epoch: committed.epoch,
            commitment: committed.commitment(),
            revealed: self.previous.map(|s| (s.epoch, s.secret)),
        }
    }
}

/// A result that was not audited although its draw said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neglect {
    /// Whose result.
    pub miner: Hotkey,
    /// What the draw was made over.
    pub commitment: Digest,
}

/// Draws a verdict's audits again, as anyone can once the epoch's secret is revealed: replicas whose draw fell below
/// `floor` and that the verdict nevertheless gives as agreed without an audit. Compare the secret with the commitment of
/// its epoch first.
pub fn recheck(secret: &EpochSecret, verdict: &Verdict, floor: f64) -> Vec<Neglect> {
    let unaudited = matches!(verdict.kind, VerdictKind::Unaudited | VerdictKind::Quorum(_));
    if !unaudited || verdict.epoch != secret.epoch {
        return Vec::new();
    }
    let agreed = verdict.replicas.iter().filter(|replica| replica.standing == Standing::Agreed);
    agreed
        .filter_map(|replica| Some((replica.miner, replica.commitment.or(replica.attestation)?)))
        .filter(|(miner, commitment)| select::is_audited(&secret.secret, &verdict.job, miner, commitment, floor))
        .map(|(miner, commitment)| Neglect { miner, commitment })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sundara_proto::id::{BlobId, EnvId, JobId};
    use sundara_proto::units::{ByteCount, UnixMillis};
    use sundara_proto::verdict::Replica;

    #[test]
    fn every_commitment_is_published_an_epoch_ahead_and_opened_an_epoch_later() {
        let network = Network::named("t", 1);
        let mut epochs = Epochs::new(7, [7; 32], [8; 32]);
        let mut promised = vec![epochs.announcement(network, true), epochs.announcement(network, false)];
        for epoch in 8..=20 {
            let fresh = u8::try_from(epoch + 1).unwrap_or(0);
            assert!(epochs.turn(epoch, [[99; 32], [fresh; 32]]));
            assert!(!epochs.turn(epoch, [[98; 32], [98; 32]]), "an epoch turns once");
            let announced = epochs.announcement(network, false);
            let (revealed_epoch, secret) = announced.revealed.unwrap_or_default();
            assert_eq!(revealed_epoch, epoch - 1);
            let before = promised.iter().find(|a| a.epoch == revealed_epoch);
            let opened = select::audit_commitment(revealed_epoch, &secret);
            assert_eq!(before.map(|a| a.commitment), Some(opened));
            assert_ne!(secret, epochs.current().secret, "the present secret stays secret");
            promised.push(announced);
        }
    }

    #[test]
    fn a_neglected_draw_is_found_by_anyone() {
        let secret = EpochSecret { epoch: 4, secret: [3; 32] };
        let mut neglected = 0;
        for n in 0..2_000_u32 {
            let mut commitment = [0; 32];
            commitment[..4].copy_from_slice(&n.to_le_bytes());
            let replica = Replica {
                miner: Hotkey([1; 32]),
                standing: Standing::Agreed,
                attestation: Some(Digest(commitment)),
                commitment: None,
                latency_us: 1,
            };
            let verdict = |kind, epoch| Verdict {
                job: JobId([2; 32]),
                attempt: 0,
                rank: 0,
                kind,
                outcome: None,
                output: BlobId([0; 32]),
                output_len: ByteCount(0),
                env_id: EnvId([0; 32]),
                replicas: vec![replica.clone()],
                epoch,
                issued_at: UnixMillis(0),
                incentive: Digest([0; 32]),
            };
            neglected += recheck(&secret, &verdict(VerdictKind::Unaudited, 4), super::super::FLOOR).len();
            assert_eq!(recheck(&secret, &verdict(VerdictKind::Audited, 4), 1.0), []);
            assert_eq!(recheck(&secret, &verdict(VerdictKind::Unaudited, 5), 1.0), [], "another epoch's secret");
        }
        // A validator that never audits shows in 4.2 % of its verdicts: binomial(2000, 0.042), 6 standard deviations.
        assert!((30..=138).contains(&neglected), "{neglected}");
    }

    #[test]
    fn a_restart_keeps_its_promises_and_skipped_epochs_are_dropped() {
        let epochs = Epochs::new(7, [7; 32], [8; 32]);
        let again = Epochs::restored(8, &epochs.secrets(), [[1; 32], [2; 32]]);
        assert_eq!(again.current(), EpochSecret { epoch: 8, secret: [8; 32] });
        assert_eq!(again.secrets().first().map(|s| s.secret), Some([7; 32]));
        let late = Epochs::restored(30, &epochs.secrets(), [[1; 32], [2; 32]]);
        assert_eq!(late.secrets().len(), 2);
        assert_eq!(late.current().secret, [1; 32]);
    }
}
