//! Proofs: keeps the fraud proofs that are on gossip, and tells a validator's scheduling whom to drop.
//!
//! The network has checked what a proof shows by itself: all signatures, one job and environment, two different results,
//! the second by an executor of the accuser. Which of the two results is right it does not show, and the job's input is
//! gone by then; so a proof counts here only when its accuser is a validator whose verdicts count too. Proofs of others
//! are kept and shown, a few of each.
//!
//! **Owns** that rule, and the casebook's limits. **Does not own** what this validator found itself: dispatch writes that.
//!
//! **Invariants**: a proof is kept once; nobody fills the casebook alone; scheduling hears of a proof after it is kept.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use sundara_proto::batch::FraudProof;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{Hotkey, JobId};
use sundara_proto::names::Topic;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Convicted;
use super::casebook::{self, EvidenceConfig, StoredCase};
use crate::net::{GossipMessage, GossipPayload, NetHandle};
use crate::service::{Tasks, wall_now};
use crate::store::{SharedStore, StoreError, WriteBatch};

/// How often old evidence is looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(3600);

/// What the service needs from the rest of the node.
pub(crate) struct ProofsParts {
    pub(crate) config: EvidenceConfig,
    pub(crate) net: NetHandle,
    pub(crate) store: SharedStore,
    /// Validators whose word counts.
    pub(crate) trusted: Vec<Hotkey>,
    /// Where scheduling hears of it; `None` on nodes that schedule nothing.
    pub(crate) convicted: Option<mpsc::Sender<Convicted>>,
    pub(crate) tasks: Tasks,
}

/// Starts the service; it ends with its tasks.
///
/// # Errors
/// When the casebook cannot be read.
pub(crate) async fn start(parts: ProofsParts) -> Result<(), StoreError> {
    let ProofsParts { config, net, store, trusted, convicted, tasks } = parts;
    let own = net.local().hotkey;
    let heard = net.subscribe(Topic::Proofs).await;
    let mut keeper =
        Keeper { config, store, trusted, convicted, own, known: HashSet::new(), strangers: HashMap::new() };
    keeper.look()?;
    tasks.spawn("keep", keeper.run(heard, tasks.token()));
    Ok(())
}

/// Accuser, accused, job.
type Id = (Hotkey, Hotkey, JobId);

struct Keeper {
    config: EvidenceConfig,
    store: SharedStore,
    trusted: Vec<Hotkey>,
    convicted: Option<mpsc::Sender<Convicted>>,
    own: Hotkey,
    /// Cases that are kept; as many as the casebook holds.
    known: HashSet<Id>,
    /// Cases of accusers whose word does not count.
    strangers: HashMap<Hotkey, usize>,
}

impl Keeper {
    /// Reads what is kept.
    fn look(&mut self) -> Result<(), StoreError> {
        let (mut known, mut strangers) = (HashSet::new(), HashMap::new());
        casebook::each(self.store.as_ref(), |case| {
            let (Ok(accuser), Ok(accused), Ok(job)) = (
                Hotkey::try_from(&case.accuser[..]),
                Hotkey::try_from(&case.accused[..]),
                JobId::try_from(&case.job[..]),
            ) else {
                return;
            };
            known.insert((accuser, accused, job));
            if !case.believed {
                *strangers.entry(accuser).or_default() += 1;
            }
        })?;
        (self.known, self.strangers) = (known, strangers);
        Ok(())
    }

    async fn run(mut self, mut heard: mpsc::Receiver<GossipMessage>, token: CancellationToken) {
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        loop {
            let message = tokio::select! {
                biased;
                () = token.cancelled() => return,
                _ = sweep.tick() => {
                    if let Err(e) = self.sweep().await {
                        tracing::error!(error = %e, "old evidence cannot be looked for");
                    }
                    continue;
                }
                message = heard.recv() => match message { Some(message) => message, None => return },
            };
            let GossipPayload::FraudProof(proof) = message.payload else { continue };
            if let Err(e) = self.on_proof(&proof).await {
                tracing::error!(error = %e, "a fraud proof could not be kept");
            }
        }
    }

    async fn sweep(&mut self) -> Result<(), StoreError> {
        casebook::retain(self.store.as_ref(), &self.config, wall_now()).await?;
        self.look()
    }

    async fn on_proof(&mut self, proof: &Signed<FraudProof>) -> Result<(), StoreError> {
        let accuser = proof.accuser();
        let Some((accused, job, attempt)) = proof.about() else { return Ok(()) };
        let id = (accuser, accused, job);
        // What this node found is in the casebook already, with more than the proof shows.
        if accuser == self.own || self.known.contains(&id) {
            return Ok(());
        }
        let believed = self.trusted.contains(&accuser);
        let of_stranger = self.strangers.get(&accuser).copied().unwrap_or(0);
        let full = self.known.len() >= self.config.kept_max;
        if !believed && (full || of_stranger >= self.config.per_stranger_max) {
            tracing::debug!(%accuser, "no room for another proof of an accuser that is not trusted here");
            return Ok(());
        }
        if full {
            // The oldest make room for one that counts.
            self.sweep().await?;
        }
        if accused == self.own {
            tracing::warn!(%accuser, %job, "a fraud proof accuses this node");
        }
        let case = StoredCase {
            offence: "wrong_result".to_owned(),
            detail: "a fraud proof from gossip".to_owned(),
            job: job.into(),
            attempt,
            at_ms: wall_now().0,
            proof: Some(proof.to_wire()),
            accused: accused.into(),
            accuser: accuser.into(),
            believed,
            ..StoredCase::default()
        };
        let mut batch = WriteBatch::new();
        case.record(&mut batch);
        self.store.commit(batch).await?;
        self.known.insert(id);
        if !believed {
            *self.strangers.entry(accuser).or_default() += 1;
        } else if let Some(convicted) = &self.convicted {
            // Dispatch is gone only when the node is.
            let _stopped = convicted.send(Convicted { miner: accused, accuser, job }).await;
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "executor"))]
#[allow(clippy::unwrap_used)]
mod tests;
