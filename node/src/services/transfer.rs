//! Moving blobs between nodes: serves those that are here, fetches those that are asked for.
//!
//! **Owns** the /blob streams of both directions, their caps of number and bandwidth, the choice of providers, and which
//! blobs this node provides in the DHT. A fetch takes ranges from several providers at once; each 16 KiB group is verified on
//! arrival (by the blob store); a provider that sends a wrong one is dropped and named; what it had goes to others. What
//! arrived survives a restart.
//!
//! **Does not own** files and hashes (the `blobs` port), nor names and records of models (the registry service).
//!
//! **Invariants**
//! - One fetch of a blob runs at a time, for any number of callers; it ends when the last of them is gone.
//! - Nothing waits for ever: opening, each header, each 32 KiB either way, and a whole fetch without a byte have a limit.
//! - A served stream holds at most three pieces of memory, a fetching one two units, whatever the peer does.
//! - Whether a blob exists is not told to those who may not read it.
//! - Every complete public blob is provided, and no other: settled every [`RECONCILE_EVERY`], and at once after a fetch.
//!
//! ```text
//!   callers --TransferHandle--> Transfer::run --one task a blob--> flight: supervises
//!                                  |                                 worker --stream--> provider
//!   peers ------/blob-----------> serve, one task a stream           worker --stream--> provider
//! ```

mod flight;
mod mesh;
mod pace;
mod plan;
mod probe;
mod serve;
mod stream;
mod worker;

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use sundara_proto::id::{BlobId, NodeId};
use sundara_proto::units::ByteCount;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::blobs::{Access, Asker, BlobLen, Blobs, FetchRequest, Sources, TransferError, lock};
use crate::net::NetHandle;
use crate::service::Tasks;

use pace::Pace;

/// How often the set of provided blobs is compared with what is here.
const RECONCILE_EVERY: Duration = Duration::from_secs(60);
/// How often private blobs that outlived their time are looked for.
const EXPIRE_EVERY: Duration = Duration::from_secs(3600);
/// Callers that wait for one blob beyond those already served by its flight.
const JOIN_QUEUE: usize = 256;
/// Different blobs being fetched or queued at once: each is a task with small state.
const FLIGHTS_MAX: usize = 1024;
/// How long a provider that sent wrong bytes is not asked again.
const BAN: Duration = Duration::from_secs(600);
/// Banned providers remembered; beyond, the oldest are forgiven.
const BANS_MAX: usize = 1024;

/// Settings of transfers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TransferConfig {
    /// Cap on bytes a second sent to all peers; 0 for none.
    pub max_upload_bytes_per_s: ByteCount,
    /// Cap on bytes a second received from all peers; 0 for none.
    pub max_download_bytes_per_s: ByteCount,
    /// Streams served at once.
    pub serve_streams_max: usize,
    /// Streams served to one peer at once.
    pub serve_streams_per_peer_max: usize,
    /// Blobs fetched at once; further ones wait.
    pub fetches_max: usize,
    /// Providers used at once for one blob.
    pub providers_max: usize,
    /// Streams to one provider; two ride on two connections.
    pub streams_per_provider: usize,
    /// A peer that moves less than 32 KiB in this time is dropped; a fetch to which nothing came for twice as long ends.
    pub progress_timeout_s: u64,
    /// A served stream without a request for so long is closed.
    pub idle_timeout_s: u64,
}

impl Default for TransferConfig {
    /// No bandwidth caps; 64 streams of 3 x 256 KiB keep serving below 48 MiB of buffers.
    fn default() -> Self {
        Self {
            max_upload_bytes_per_s: ByteCount(0),
            max_download_bytes_per_s: ByteCount(0),
            serve_streams_max: 64,
            serve_streams_per_peer_max: 8,
            fetches_max: 16,
            providers_max: 8,
            streams_per_provider: 2,
            progress_timeout_s: 20,
            idle_timeout_s: 30,
        }
    }
}

/// A byte stream to a peer.
pub(crate) trait BlobIo: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> BlobIo for T {}

/// What transfers need of the network: the mesh, or pipes in memory.
#[async_trait]
pub(crate) trait BlobNet: Send + Sync + 'static {
    /// This node, never asked for a blob.
    fn local(&self) -> NodeId;
    /// Opens a /blob stream.
    async fn open(&self, peer: NodeId) -> io::Result<Box<dyn BlobIo>>;
    /// Who provides a blob.
    async fn find_providers(&self, blob: BlobId) -> Vec<NodeId>;
    /// Says that this node provides a blob, until [`BlobNet::stop_providing`].
    async fn provide(&self, blob: BlobId);
    /// Takes it back.
    async fn stop_providing(&self, blob: BlobId);
    /// A peer sent bytes that do not match their hash.
    async fn report(&self, peer: NodeId, reason: String);
}

/// Figures of transfers since the start.
#[derive(Debug, Default)]
pub(crate) struct TransferStats {
    sent: AtomicU64,
    received: AtomicU64,
    refused: AtomicU64,
    bad: AtomicU64,
    fetched: AtomicU64,
    failed: AtomicU64,
}

/// [`TransferStats`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct TransferFigures {
    /// Bytes of encodings sent.
    pub sent_bytes_total: u64,
    /// Bytes of encodings received.
    pub received_bytes_total: u64,
    /// Streams turned away because a cap was reached.
    pub refused_streams_total: u64,
    /// Pieces that did not match their hash.
    pub bad_pieces_total: u64,
    /// Fetches that ended well.
    pub fetched_total: u64,
    /// Fetches that did not.
    pub failed_total: u64,
}

impl TransferStats {
    fn add_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }
    fn add_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// The figures now.
    pub(crate) fn figures(&self) -> TransferFigures {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TransferFigures {
            sent_bytes_total: get(&self.sent),
            received_bytes_total: get(&self.received),
            refused_streams_total: get(&self.refused),
            bad_pieces_total: get(&self.bad),
            fetched_total: get(&self.fetched),
            failed_total: get(&self.failed),
        }
    }
}

/// Places for served streams.
#[derive(Debug)]
pub(crate) struct Slots {
    all_max: usize,
    peer_max: usize,
    taken: Mutex<HashMap<NodeId, usize>>,
}

/// One place, given back when dropped.
pub(crate) struct Slot<'a> {
    slots: &'a Slots,
    peer: NodeId,
}

impl Slots {
    fn new(all_max: usize, peer_max: usize) -> Self {
        Self { all_max, peer_max, taken: Mutex::default() }
    }

    fn take(&self, peer: NodeId) -> Option<Slot<'_>> {
        let mut taken = lock(&self.taken);
        let all: usize = taken.values().sum();
        let of_peer = taken.get(&peer).copied().unwrap_or(0);
        if all >= self.all_max || of_peer >= self.peer_max {
            return None;
        }
        taken.insert(peer, of_peer + 1);
        Some(Slot { slots: self, peer })
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut taken = lock(&self.slots.taken);
        if let Some(n) = taken.get_mut(&self.peer) {
            *n -= 1;
            if *n == 0 {
                taken.remove(&self.peer);
            }
        }
    }
}

/// What all streams and fetches share.
pub(crate) struct Shared {
    blobs: Blobs,
    net: Arc<dyn BlobNet>,
    config: TransferConfig,
    upload: Pace,
    download: Pace,
    slots: Slots,
    fetches: Semaphore,
    stats: Arc<TransferStats>,
    banned: Mutex<HashMap<NodeId, Instant>>,
    provided: Mutex<HashSet<BlobId>>,
}

impl Shared {
    fn progress_timeout(&self) -> Duration {
        Duration::from_secs(self.config.progress_timeout_s.max(1))
    }
    fn idle_timeout(&self) -> Duration {
        Duration::from_secs(self.config.idle_timeout_s.max(1))
    }

    fn is_banned(&self, peer: &NodeId) -> bool {
        lock(&self.banned).get(peer).is_some_and(|until| *until > Instant::now())
    }

    async fn ban(&self, peer: NodeId, reason: String) {
        tracing::warn!(peer = %peer, reason, "provider dropped");
        self.stats.bad.fetch_add(1, Ordering::Relaxed);
        {
            let mut banned = lock(&self.banned);
            let now = Instant::now();
            banned.retain(|_, until| *until > now);
            if banned.len() >= BANS_MAX
                && let Some(oldest) = banned.iter().min_by_key(|(_, until)| **until).map(|(peer, _)| *peer)
            {
                banned.remove(&oldest);
            }
            banned.insert(peer, now + BAN);
        }
        self.net.report(peer, reason).await;
    }

    fn provided(&self) -> MutexGuard<'_, HashSet<BlobId>> {
        self.provided.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn provide(&self, blob: BlobId) {
        if self.provided().insert(blob) {
            self.net.provide(blob).await;
        }
    }

    /// Provides what is here and public, and nothing else.
    async fn reconcile(&self) {
        let here: HashSet<BlobId> =
            self.blobs.list().into_iter().filter(|b| b.public && b.complete).map(|b| b.id).collect();
        let (gone, new): (Vec<_>, Vec<_>) = {
            let provided = self.provided();
            (provided.difference(&here).copied().collect(), here.difference(&provided).copied().collect())
        };
        for blob in gone {
            self.provided().remove(&blob);
            self.net.stop_providing(blob).await;
        }
        for blob in new {
            self.provide(blob).await;
        }
    }
}

/// The transfer service of a node.
pub(crate) struct Transfer {
    shared: Arc<Shared>,
    requests: mpsc::Receiver<FetchRequest>,
    tasks: Tasks,
    flights: HashMap<BlobId, mpsc::Sender<FetchRequest>>,
}

/// What the transfer service is made of.
pub(crate) struct TransferParts {
    /// Settings.
    pub config: TransferConfig,
    /// Streams and providers.
    pub net: NetHandle,
    /// Where bytes are.
    pub blobs: Blobs,
    /// The service's end of [`crate::blobs::transfer_channel`].
    pub requests: mpsc::Receiver<FetchRequest>,
    /// Runs it.
    pub tasks: Tasks,
}

/// Starts the service; it ends with its tasks. Returns its figures, for metrics.
pub(crate) fn start(parts: TransferParts) -> Arc<TransferStats> {
    let inbound = parts.net.accept_blobs();
    let net = Arc::new(parts.net);
    let transfer = Transfer::new(parts.blobs, net, parts.config, parts.requests, parts.tasks.clone());
    let stats = transfer.stats();
    parts.tasks.spawn("run", transfer.run(inbound));
    stats
}

impl Transfer {
    /// A service that answers `requests` (from [`crate::blobs::transfer_channel`]); it runs under `tasks`.
    pub(crate) fn new(
        blobs: Blobs,
        net: Arc<dyn BlobNet>,
        config: TransferConfig,
        requests: mpsc::Receiver<FetchRequest>,
        tasks: Tasks,
    ) -> Self {
        let shared = Shared {
            blobs,
            net,
            upload: Pace::new(config.max_upload_bytes_per_s.0),
            download: Pace::new(config.max_download_bytes_per_s.0),
            slots: Slots::new(config.serve_streams_max, config.serve_streams_per_peer_max),
            fetches: Semaphore::new(config.fetches_max.max(1)),
            stats: Arc::default(),
            banned: Mutex::default(),
            provided: Mutex::default(),
            config,
        };
        Self { shared: Arc::new(shared), requests, tasks, flights: HashMap::new() }
    }

    /// Its figures, for metrics.
    pub(crate) fn stats(&self) -> Arc<TransferStats> {
        self.shared.stats.clone()
    }

    /// Runs until the tasks are shut down. `inbound` are the streams that peers open.
    pub(crate) async fn run<P, S>(mut self, mut inbound: mpsc::Receiver<(P, S)>)
    where
        P: Into<Asker> + Send + 'static,
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let token = self.tasks.token();
        let mut damaged = self.shared.blobs.damaged();
        let mut reconcile = interval(RECONCILE_EVERY);
        let mut expire = interval(EXPIRE_EVERY);
        reconcile.set_missed_tick_behavior(MissedTickBehavior::Delay);
        expire.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut accepting = true;
        loop {
            tokio::select! {
                biased;
                () = token.cancelled() => return,
                request = self.requests.recv() => match request {
                    Some(request) => self.on_request(request),
                    // Every handle is gone: serving goes on.
                    None => token.cancelled().await,
                },
                stream = inbound.recv(), if accepting => match stream {
                    Some((peer, stream)) => self.on_stream(peer.into(), stream),
                    None => accepting = false,
                },
                blob = damaged.recv() => self.on_damaged(blob),
                _ = reconcile.tick() => self.on_tick(),
                _ = expire.tick() => self.on_expire(),
            }
        }
    }

    fn on_request(&mut self, request: FetchRequest) {
        let Some(flight) = self.flights.get(&request.blob) else { return self.start(request) };
        match flight.try_send(request) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(request)) => {
                let _ = request.reply.send(Err(TransferError::Busy));
            }
            // It has ended meanwhile.
            Err(mpsc::error::TrySendError::Closed(request)) => self.start(request),
        }
    }

    fn start(&mut self, request: FetchRequest) {
        self.flights.retain(|_, flight| !flight.is_closed());
        if self.flights.len() >= FLIGHTS_MAX {
            let _ = request.reply.send(Err(TransferError::Busy));
            return;
        }
        let (join, joins) = mpsc::channel(JOIN_QUEUE);
        self.flights.insert(request.blob, join);
        let flight = flight::run(self.shared.clone(), request, joins, self.tasks.token());
        self.tasks.spawn("fetch", flight);
    }

    fn on_stream(&self, asker: Asker, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
        let (shared, token) = (self.shared.clone(), self.tasks.token());
        self.tasks.spawn("serve", async move {
            tokio::select! {
                () = token.cancelled() => {}
                served = serve::serve(&shared, asker, stream) => if let Err(e) = served {
                    tracing::debug!(peer = %asker.node, error = %e, "blob stream ended");
                },
            }
        });
    }

    /// A public blob was found damaged: fetch what is bad, for nobody in particular.
    fn on_damaged(&mut self, blob: Result<BlobId, broadcast::error::RecvError>) {
        let Ok(blob) = blob else { return };
        let Some(info) = self.shared.blobs.info(&blob).filter(|info| info.public) else { return };
        let (reply, _) = oneshot::channel();
        let (progress, _) = watch::channel((ByteCount(0), info.len));
        let request = FetchRequest {
            blob,
            len: BlobLen::Exact(info.len),
            sources: Sources::dht([]),
            access: Access::Public,
            reply,
            progress,
            gone: CancellationToken::new(),
        };
        self.on_request(request);
    }

    fn on_tick(&mut self) {
        self.flights.retain(|_, flight| !flight.is_closed());
        let shared = self.shared.clone();
        self.tasks.spawn("provide", async move { shared.reconcile().await });
    }

    fn on_expire(&self) {
        let shared = self.shared.clone();
        self.tasks.spawn("expire", async move {
            match shared.blobs.expire().await {
                Ok(0) => {}
                Ok(removed) => tracing::info!(removed, "removed private blobs that nobody claimed"),
                Err(e) => tracing::warn!(error = %e, "private blobs could not be expired"),
            }
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing;
#[cfg(test)]
#[path = "transfer/tests.rs"]
mod tests;
