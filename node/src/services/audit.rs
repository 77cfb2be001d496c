//! Audit: re-runs results on the validator's own executors, and keeps the secrets by which audits are drawn.
//!
//! **Owns** the epochs' secrets (kept before they are published) and the runs that dispatch orders. **Does not own** the
//! draw or the comparison: those are the job machine's.
//!
//! **Invariants**: a commitment is published only after its secret is durable; a secret is revealed only when its epoch is
//! over; an order is answered once.

use std::time::Duration;

use prost::Message as _;
use sundara_proto::crypto::{HotkeyPair, Network, Signed};
use sundara_proto::id::EngineId;
use sundara_proto::names::Topic;
use sundara_proto::pb;
use sundara_proto::units::EpochLength;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{AuditNews, AuditOrder};
use crate::domain::audit::{EpochSecret, Epochs};
use crate::domain::job::AuditResult;
use crate::net::NetHandle;
use crate::service::{Tasks, wall_now};
use crate::services::work::pool::Pool;
use crate::services::work::{ExecutorEvent, Order};
use crate::store::{KeyRange, Keyspace, SharedStore, StoreError, WriteBatch};

/// Epochs whose secrets are kept for whoever asks why something was or was not audited.
const SECRETS_KEPT: u64 = 1_000;
/// A commitment is published again this often, for validators that came later.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(60);

/// What the service needs from the rest of the node.
pub(crate) struct AuditParts {
    pub(crate) network: Network,
    /// Of the mesh.
    pub(crate) epoch_length: EpochLength,
    pub(crate) key: HotkeyPair,
    pub(crate) net: NetHandle,
    pub(crate) store: SharedStore,
    /// The validator's own executors.
    pub(crate) pool: Pool,
    pub(crate) orders: mpsc::Receiver<AuditOrder>,
    pub(crate) news: mpsc::Sender<AuditNews>,
    pub(crate) tasks: Tasks,
}

/// A stored secret. Numbers never change.
#[derive(Clone, PartialEq, prost::Message)]
struct StoredSecret {
    #[prost(bytes = "vec", tag = "1")]
    secret: Vec<u8>,
}

/// Secrets around the present epoch, from an earlier run or fresh, durable when this returns.
///
/// # Errors
/// When the store cannot be read or written.
pub(crate) async fn epochs(store: &SharedStore, length: EpochLength) -> Result<Epochs, StoreError> {
    let now = length.epoch(wall_now());
    let from = now.saturating_sub(1).to_be_bytes();
    let page = store.scan(Keyspace::Epochs, &KeyRange::all().from(&from), 8)?;
    let stored: Vec<EpochSecret> = page.items.iter().filter_map(|(key, value)| secret_from(key, value)).collect();
    let epochs = Epochs::restored(now, &stored, [rand::random(), rand::random()]);
    keep(store, &epochs).await?;
    Ok(epochs)
}

fn secret_from(key: &[u8], value: &[u8]) -> Option<EpochSecret> {
    let epoch = u64::from_be_bytes(key.try_into().ok()?);
    let secret = StoredSecret::decode(value).ok()?.secret.try_into().ok()?;
    Some(EpochSecret { epoch, secret })
}

async fn keep(store: &SharedStore, epochs: &Epochs) -> Result<(), StoreError> {
    let mut batch = WriteBatch::new();
    for secret in epochs.secrets() {
        let value = StoredSecret { secret: secret.secret.to_vec() };
        batch.put(Keyspace::Epochs, secret.epoch.to_be_bytes().to_vec(), value.encode_to_vec());
    }
    let old = KeyRange::all().until(&epochs.current().epoch.saturating_sub(SECRETS_KEPT).to_be_bytes());
    for (key, _) in store.scan(Keyspace::Epochs, &old, 64)?.items {
        batch.delete(Keyspace::Epochs, key);
    }
    store.commit(batch).await.map(drop)
}

/// Starts the service; it ends with its tasks.
pub(crate) fn start(parts: AuditParts, epochs: Epochs) {
    let AuditParts { network, epoch_length, key, net, store, pool, orders, news, tasks } = parts;
    let clock = Clock { network, length: epoch_length, key, net: net.clone(), store, news: news.clone(), epochs };
    tasks.spawn("epochs", clock.run(tasks.token()));
    tasks.spawn("engines", follow_engines(pool.engines(), news.clone(), tasks.token()));
    let runner = Runner { net, pool, news, tasks: tasks.clone() };
    tasks.spawn("orders", runner.run(orders, tasks.token()));
}

struct Clock {
    network: Network,
    length: EpochLength,
    key: HotkeyPair,
    net: NetHandle,
    store: SharedStore,
    news: mpsc::Sender<AuditNews>,
    epochs: Epochs,
}

impl Clock {
    async fn run(mut self, token: CancellationToken) {
        self.announce(true).await;
        loop {
            let now = wall_now();
            let next = self.length.begin(self.epochs.current().epoch + 1);
            tokio::select! {
                () = token.cancelled() => return,
                () = tokio::time::sleep(now.until(next).min(ANNOUNCE_EVERY)) => {}
            }
            if self.epochs.turn(self.length.epoch(wall_now()), [rand::random(), rand::random()]) {
                if let Err(e) = keep(&self.store, &self.epochs).await {
                    // Not published, so nothing is promised; the next turn of the loop tries again.
                    tracing::error!(error = %e, "audit secrets could not be kept");
                    continue;
                }
                if self.news.send(AuditNews::Epoch(self.epochs.current())).await.is_err() {
                    return;
                }
            }
            self.announce(false).await;
        }
    }

    async fn announce(&self, first: bool) {
        let mut announcements = vec![self.epochs.announcement(self.network, false)];
        if first {
            announcements.insert(0, self.epochs.announcement(self.network, true));
        }
        for announcement in announcements {
            let signed = Signed::sign(&self.network, &self.key, announcement);
            let gossip = pb::Gossip { kind: Some(pb::gossip::Kind::AuditEpoch(signed.to_wire())) };
            if let Err(e) = self.net.publish(Topic::Audits, gossip).await {
                tracing::debug!(error = %e, "audit commitment not published yet");
            }
        }
    }
}

async fn follow_engines(
    mut engines: watch::Receiver<Vec<EngineId>>,
    news: mpsc::Sender<AuditNews>,
    token: CancellationToken,
) {
    loop {
        let now = engines.borrow_and_update().clone();
        if news.send(AuditNews::Engines(now)).await.is_err() {
            return;
        }
        tokio::select! {
            () = token.cancelled() => return,
            changed = engines.changed() => if changed.is_err() { return },
        }
    }
}

struct Runner {
    net: NetHandle,
    pool: Pool,
    news: mpsc::Sender<AuditNews>,
    tasks: Tasks,
}

impl Runner {
    async fn run(self, mut orders: mpsc::Receiver<AuditOrder>, token: CancellationToken) {
        loop {
            let order = tokio::select! {
                () = token.cancelled() => return,
                order = orders.recv() => match order { Some(order) => order, None => return },
            };
            let (pool, news) = (self.pool.clone(), self.news.clone());
            let (node, hotkey) = (self.net.local().node, self.net.local().hotkey);
            self.tasks.spawn("audit", async move {
                let (job, attempt, cancel) = (order.job, order.attempt, order.cancel.clone());
                let engine = order.engine;
                let work = Order {
                    job,
                    spec: order.spec,
                    attempt,
                    inline_input: order.inline_input,
                    stream: false,
                    sources: vec![node],
                    validator: hotkey,
                    deadline: Instant::now() + order.deadline,
                };
                let result = tokio::select! {
                    () = cancel.cancelled() => return,
                    result = run(&pool, engine, work) => result,
                };
                // Dispatch is gone only when the node is.
                let _stopped = news.send(AuditNews::Done { job, attempt, result }).await;
            });
        }
    }
}

async fn run(pool: &Pool, engine: EngineId, order: Order) -> AuditResult {
    let failed = |reason: String| AuditResult::Failed { reason };
    let mut run = match pool.run(engine, order) {
        Ok(run) => run,
        Err(fault) => return failed(fault.reason),
    };
    while let Some(event) = run.next().await {
        match event {
            ExecutorEvent::Started | ExecutorEvent::Output { .. } => {}
            ExecutorEvent::Finished(executed) => {
                return AuditResult::Attested(std::sync::Arc::new(executed.attestation));
            }
            ExecutorEvent::Fault(fault) => return failed(fault.reason),
        }
    }
    failed("the executor vanished".to_owned())
}
