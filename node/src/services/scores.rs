//! Scores: what an epoch comes to for each miner, from this validator's verdicts at once and from everyone's when their
//! pages are open.
//!
//! ```text
//! epoch            e              |        e+1         |             e+2
//! own verdicts     tallied from own pages as they are written
//! others           roots heard, pages closed           | pages fetched, settled: one result for all who heard all
//! draws            commitment heard (e-1), secret revealed (e+1), drawn again when settled
//! ```
//!
//! A verdict counts in the epoch of the page that holds it, and must have been drawn in that epoch or the one before. Only
//! its author's own page counts: the page's root is signed, so the verdicts in it need no check of their own.
//!
//! **Owns** the roots and audit commitments heard of other validators, the pages fetched for settling, and the settled
//! scores, each with a limit. **Does not own** the scorer ([`crate::domain::score`]), this node's pages (`batches`), nor
//! what becomes of scores: weights on a chain.
//!
//! **Invariants**: an epoch is settled from open pages only, so what a validator that merely listens has before is no
//! score at all; a settled record says whether anything that was heard of is missing in it.

mod books;
mod settle;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sundara_proto::crypto::Network;
use sundara_proto::id::Hotkey;
use sundara_proto::names::Topic;
use sundara_proto::units::EpochLength;
use tokio::sync::watch;

use super::directory::Directory;
use super::pages::OPEN_AFTER_EPOCHS;
use crate::domain::score::Sums;
use crate::net::NetHandle;
use crate::service::{Tasks, WorkError, Workers, wall_now};
use crate::store::{JsonTable, Keyspace, SharedStore, StoreError, Table};

use books::{Listener, OwnBooks};
use settle::Settler;

/// The longest time between two looks at the clock and at this node's own pages.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// An epoch whose evidence is incomplete is looked at again for so many epochs.
const SETTLE_FOR: u64 = 12;

const SETTLED: JsonTable<EpochScores> = Table::new(Keyspace::EpochScores);

/// How much evidence of other validators is kept and counted.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ScoresConfig {
    /// Epochs whose scores are kept.
    pub keep_epochs: u64,
    /// Jobs of an epoch that are counted when it is settled; about 130 bytes of memory each. Beyond it the result says
    /// that it is incomplete.
    pub jobs_max: usize,
    /// Roots kept of one validator in one epoch.
    pub roots_max: u32,
}

impl Default for ScoresConfig {
    /// A week; a thousand jobs a second and more; more pages than such a validator makes.
    fn default() -> Self {
        Self { keep_epochs: 1_008, jobs_max: 1_000_000, roots_max: 10_000 }
    }
}

/// What an epoch came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochScores {
    /// Which epoch.
    pub epoch: u64,
    /// Whether it rests on the pages of all validators. Before they are open it rests on this validator's own verdicts.
    pub settled: bool,
    /// Nothing that was heard of is missing in it.
    pub complete: bool,
    /// Jobs that were ruled on.
    pub jobs: u64,
    /// By hotkey.
    pub miners: Vec<MinerScore>,
    /// What was heard and read of other validators.
    pub validators: Vec<ValidatorPages>,
}

/// A miner's part of an epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MinerScore {
    /// Who.
    pub hotkey: Hotkey,
    /// In millionths; 1,000,000 is the best.
    pub score: u64,
    /// Jobs that it took part in.
    pub jobs: u64,
}

/// What a validator showed of an epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValidatorPages {
    /// Who.
    pub hotkey: Hotkey,
    /// Roots heard.
    pub heard: u64,
    /// Roots that were not heard although later ones were.
    pub missing: u64,
    /// Pages fetched whose entries are what the root says.
    pub read: u64,
    /// Pages that are not what their root says.
    pub bad: u64,
    /// Verdicts that count.
    pub verdicts: u64,
    /// Whether the secret of its draws opens its commitment.
    pub draws: Draws,
    /// Results that it did not audit although its draw said so.
    pub neglected: u64,
}

/// How a validator's audit secret stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Draws {
    /// No commitment was heard, or no secret yet.
    #[default]
    Unrevealed,
    /// The secret is the one that was committed to; every draw was made again with it.
    Checked,
    /// The secret is not the one that was committed to, or there were two commitments.
    Broken,
}

/// What the service needs from the rest of the node.
pub(crate) struct ScoresParts {
    pub(crate) config: ScoresConfig,
    pub(crate) network: Network,
    /// Of the mesh.
    pub(crate) epoch_length: EpochLength,
    pub(crate) net: NetHandle,
    pub(crate) directory: Directory,
    pub(crate) store: SharedStore,
    /// Validators whose verdicts count; empty: every connected one.
    pub(crate) validators: Vec<Hotkey>,
    pub(crate) tasks: Tasks,
}

/// Handle of the service. Clones share it.
#[derive(Clone)]
pub(crate) struct ScoresHandle {
    epoch_length: EpochLength,
    store: SharedStore,
    own: Arc<Mutex<OwnBooks>>,
    workers: Workers,
    settled: watch::Receiver<Option<u64>>,
}

/// Starts the service; it ends with its tasks.
///
/// # Errors
/// When what was heard before cannot be read.
pub(crate) async fn start(parts: ScoresParts) -> Result<ScoresHandle, StoreError> {
    let ScoresParts { config, network, epoch_length, net, directory, store, validators, tasks } = parts;
    let now = epoch_length.epoch(wall_now());
    let own = Arc::new(Mutex::new(OwnBooks::new(now.saturating_sub(OPEN_AFTER_EPOCHS))));
    let (settled_tx, settled) = watch::channel(None);
    let batches = net.subscribe(Topic::Batches).await;
    let audits = net.subscribe(Topic::Audits).await;
    let listener = Listener::new(&config, epoch_length, net.local().hotkey, &directory, &store, validators)?;
    tasks.spawn("listen", listener.run(batches, audits, tasks.token()));
    let settler =
        Settler { config, network, epoch_length, net, directory, store: store.clone(), own: own.clone(), settled_tx };
    tasks.spawn("settle", settler.run(tasks.token()));
    Ok(ScoresHandle { epoch_length, store, own, workers: Workers::new("scores", 1), settled })
}

impl ScoresHandle {
    /// An epoch's scores as far as they are known; of the present epoch unless one is named.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub(crate) async fn scores(&self, epoch: Option<u64>) -> Result<EpochScores, StoreError> {
        let epoch = epoch.unwrap_or_else(|| self.epoch_length.epoch(wall_now()));
        if let Some(settled) = SETTLED.get(self.store.as_ref(), &epoch.to_be_bytes())? {
            return Ok(settled);
        }
        let (own, store) = (self.own.clone(), self.store.clone());
        let work = self.workers.run(move || {
            let mut own = own.lock().unwrap_or_else(PoisonError::into_inner);
            while own.catch_up(store.as_ref())? {}
            Ok(own.of(epoch))
        });
        work.await.unwrap_or_else(|e: WorkError| {
            tracing::error!(error = %e, "scores cannot be read");
            Ok(EpochScores { epoch, ..EpochScores::default() })
        })
    }

    /// Waits until this epoch or a later one is settled with nothing missing. Cancel safe.
    pub(crate) async fn wait_for_settled(&self, epoch: u64) {
        let mut settled = self.settled.clone();
        if settled.wait_for(|last| last.is_some_and(|last| last >= epoch)).await.is_err() {
            // The node shuts down; whoever waits is being cancelled too.
            std::future::pending::<()>().await;
        }
    }
}

/// As shown, in order of hotkeys.
fn miners(sums: &Sums) -> Vec<MinerScore> {
    sums.each().map(|(hotkey, score, jobs)| MinerScore { hotkey, score: score.0, jobs }).collect()
}
