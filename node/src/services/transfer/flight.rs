//! One fetch: keeps workers on the providers that are of use, and tells those who wait how it ended.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use sundara_proto::blob::{GROUP_LEN, group_count};
use sundara_proto::id::{BlobId, NodeId};
use sundara_proto::units::ByteCount;
use sundara_proto::wire::limit;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::plan::WorkerId;
use super::probe::{self, Probed};
use super::worker::{End, Ended, Job, work};
use super::{BlobLen, Shared, Sources, TransferError};
use crate::blobs::{Access, BlobError, FetchRequest, Opened, Partial};

/// How often a provider that fails is tried again, and how long first; doubles each time.
const RETRIES: u32 = 3;
const RETRY_FIRST: Duration = Duration::from_millis(250);
/// Longest time between two questions to a busy provider.
const BUSY_RETRY_MAX: Duration = Duration::from_secs(2);
/// Look-ups in the DHT without any usable provider before giving up, and the time between them: a record may be on its way.
const LOOKUPS: u32 = 3;
const LOOKUP_EVERY: Duration = Duration::from_secs(2);
/// When more providers are looked for while some work.
const LOOKUP_MORE_EVERY: Duration = Duration::from_secs(15);
/// Providers remembered by one fetch.
const PROVIDERS_KNOWN_MAX: usize = 64;
/// Without a byte for so long another provider is tried beside the present ones.
const HEDGE_AFTER: Duration = Duration::from_secs(1);
/// How long a writer that is being cancelled is waited for.
const WRITER_PATIENCE: Duration = Duration::from_secs(10);

struct Waiter {
    access: Access,
    reply: oneshot::Sender<Result<(), TransferError>>,
    progress: watch::Sender<(ByteCount, ByteCount)>,
    gone: CancellationToken,
}

impl From<FetchRequest> for Waiter {
    fn from(r: FetchRequest) -> Self {
        Self { access: r.access, reply: r.reply, progress: r.progress, gone: r.gone }
    }
}

/// Resolves when nobody waits any more.
async fn all_gone(waiters: &mut Vec<Waiter>) {
    while let Some(last) = waiters.last() {
        last.gone.cancelled().await;
        waiters.pop();
    }
}

/// Fetches for `first` and all who join.
pub(crate) async fn run(
    shared: Arc<Shared>,
    first: FetchRequest,
    mut joins: mpsc::Receiver<FetchRequest>,
    token: CancellationToken,
) {
    let (blob, len, sources, access) = (first.blob, first.len, first.sources.clone(), first.access.clone());
    let mut waiters = vec![Waiter::from(first)];
    let (hint, hints) = mpsc::channel(PROVIDERS_KNOWN_MAX);
    let (progress, mut seen) = watch::channel((ByteCount(0), ByteCount(0)));
    let outcome = {
        let mut fetch = Box::pin(fetch(&shared, blob, len, sources, access, hints, progress));
        loop {
            tokio::select! {
                biased;
                () = token.cancelled() => break Err(TransferError::Closed),
                outcome = &mut fetch => break outcome,
                Some(request) = joins.recv() => {
                    request.sources.hints.iter().for_each(|node| { let _ = hint.try_send(*node); });
                    waiters.push(request.into());
                }
                Ok(()) = seen.changed() => {
                    let now = *seen.borrow_and_update();
                    waiters.iter().for_each(|w| { w.progress.send_replace(now); });
                }
                () = all_gone(&mut waiters) => return,
            }
        }
    };
    joins.close();
    while let Some(request) = joins.recv().await {
        waiters.push(request.into());
    }
    let counter = if outcome.is_ok() { &shared.stats.fetched } else { &shared.stats.failed };
    counter.fetch_add(1, Ordering::Relaxed);
    if let Err(e) = &outcome {
        tracing::info!(blob = %blob, error = %e, "blob not fetched");
    }
    let mut public = false;
    for waiter in waiters {
        public |= waiter.access.is_public();
        let result = match &outcome {
            Ok(()) => adopt(&shared, blob, waiter.access).await,
            Err(e) => Err(e.clone()),
        };
        let _ = waiter.reply.send(result);
    }
    // Nobody waits for the DHT.
    if outcome.is_ok() && public {
        shared.provide(blob).await;
    }
}

async fn adopt(shared: &Shared, blob: BlobId, access: Access) -> Result<(), TransferError> {
    match shared.blobs.adopt(blob, access).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(TransferError::store(blob, &BlobError::NotFound { blob })),
        Err(e) => Err(TransferError::store(blob, &e)),
    }
}

async fn fetch(
    shared: &Arc<Shared>,
    blob: BlobId,
    len: BlobLen,
    sources: Sources,
    access: Access,
    hints: mpsc::Receiver<NodeId>,
    progress: watch::Sender<(ByteCount, ByteCount)>,
) -> Result<(), TransferError> {
    if shared.blobs.has(&blob) {
        return Ok(());
    }
    let _permit = shared.fetches.acquire().await.map_err(|_| TransferError::Closed)?;
    let mut providers = Providers::new(shared.clone(), blob, sources, hints);
    let len = match len {
        BlobLen::Exact(len) => len,
        BlobLen::AtMost(max) => match shared.blobs.info(&blob).filter(|i| i.held.0 > 0 || i.complete) {
            Some(known) => known.len,
            None => providers.learn_len(max).await?,
        },
    };
    if len > limit::BLOB {
        return Err(TransferError::TooLarge { blob, len, max: limit::BLOB });
    }
    let Some(partial) = open(shared, blob, len, access).await? else { return Ok(()) };
    let job = Arc::new(Job::new(shared.clone(), partial));
    supervise(&job, &mut providers, &progress).await?;
    let partial = job.partial.clone();
    let finished = tokio::task::spawn_blocking(move || partial.finish()).await;
    finished.unwrap_or(Err(BlobError::Closed)).map_err(|e| TransferError::store(blob, &e))
}

/// `None`: complete already. A fetch that was cancelled a moment ago may still be writing its last unit.
async fn open(shared: &Shared, blob: BlobId, len: ByteCount, access: Access) -> Result<Option<Partial>, TransferError> {
    let deadline = Instant::now() + WRITER_PATIENCE;
    loop {
        match shared.blobs.partial(blob, len, access.clone()).await {
            Ok(Opened::Complete) => return Ok(None),
            Ok(Opened::Partial(partial)) => return Ok(Some(partial)),
            Err(BlobError::BeingWritten { .. }) if Instant::now() < deadline => {
                sleep(Duration::from_millis(20)).await;
            }
            Err(e) => return Err(TransferError::store(blob, &e)),
        }
    }
}

type Workers<'a> = FuturesUnordered<BoxFuture<'a, Ended>>;

/// Runs workers until nothing is missing.
async fn supervise(
    job: &Arc<Job>,
    providers: &mut Providers,
    progress: &watch::Sender<(ByteCount, ByteCount)>,
) -> Result<(), TransferError> {
    let stall = job.shared.progress_timeout() * 2;
    let total = job.partial.len();
    let at_start = group_count(total).saturating_sub(job.partial.missing().count());
    let mut workers: Workers<'_> = FuturesUnordered::new();
    let (mut last_bytes, mut last_moved) = (0, Instant::now());
    while !job.plan().is_done() {
        providers.start_workers(job, &mut workers, last_moved);
        if workers.is_empty() && providers.is_hopeless() {
            return Err(TransferError::NoProvider { blob: job.partial.id(), tried: providers.tried() });
        }
        let wake = providers.next_due().min(last_moved + stall).min(Instant::now() + HEDGE_AFTER);
        tokio::select! {
            Some(ended) = workers.next(), if !workers.is_empty() => providers.on_end(job, ended).await?,
            () = providers.step() => {}
            () = job.changed.notified() => {}
            () = sleep_until(wake) => {}
        }
        let bytes = job.received.load(Ordering::Relaxed);
        if bytes != last_bytes {
            (last_bytes, last_moved) = (bytes, Instant::now());
        } else if last_moved.elapsed() >= stall {
            return Err(TransferError::Stalled { blob: job.partial.id(), idle: stall, tried: providers.tried() });
        }
        let held = (at_start + job.stored.load(Ordering::Relaxed)) * GROUP_LEN;
        progress.send_replace((ByteCount(held.min(total.0)), total));
    }
    // Those that still work do so in vain: dropping them closes their streams.
    Ok(())
}

struct Provider {
    node: NodeId,
    streams: usize,
    next_stream: usize,
    failures: u32,
    refusals: u32,
    retry_at: Option<Instant>,
    /// Out for this fetch.
    out: bool,
    last: String,
    stop: Arc<AtomicBool>,
}

/// Who may have the blob, in order of arrival.
struct Providers {
    shared: Arc<Shared>,
    blob: BlobId,
    list: Vec<Provider>,
    hints: mpsc::Receiver<NodeId>,
    dht: bool,
    lookup: Option<BoxFuture<'static, Vec<NodeId>>>,
    lookups: u32,
    lookup_at: Option<Instant>,
}

impl Providers {
    fn new(shared: Arc<Shared>, blob: BlobId, sources: Sources, hints: mpsc::Receiver<NodeId>) -> Self {
        let lookup_at = sources.dht.then(Instant::now);
        let mut providers =
            Self { shared, blob, list: Vec::new(), hints, dht: sources.dht, lookup: None, lookups: 0, lookup_at };
        sources.hints.into_iter().for_each(|node| providers.add(node));
        providers
    }

    fn add(&mut self, node: NodeId) {
        let known = self.list.iter().any(|p| p.node == node) || node == self.shared.net.local();
        if known || self.list.len() >= PROVIDERS_KNOWN_MAX {
            return;
        }
        let banned = self.shared.is_banned(&node);
        let last = if banned { "sent wrong bytes before" } else { "was not needed" };
        self.list.push(Provider {
            node,
            streams: 0,
            next_stream: 0,
            failures: 0,
            refusals: 0,
            retry_at: None,
            out: banned,
            last: last.to_owned(),
            stop: Arc::default(),
        });
    }

    fn tried(&self) -> Vec<(NodeId, String)> {
        self.list.iter().map(|p| (p.node, p.last.clone())).collect()
    }

    /// Nobody is left and none can turn up.
    fn is_hopeless(&self) -> bool {
        let waits = self.lookup.is_some() || self.lookup_at.is_some();
        !waits && self.list.iter().all(|p| p.out)
    }

    /// When something is due that is not yet. What is due already waits for work, not for time.
    fn next_due(&self) -> Instant {
        let now = Instant::now();
        let retries = self.list.iter().filter(|p| !p.out).filter_map(|p| p.retry_at);
        let lookup = self.lookup_at.filter(|_| self.lookup.is_none());
        let far = now + Duration::from_secs(3600);
        retries.chain(lookup).filter(|at| *at > now).min().unwrap_or(far)
    }

    /// Takes a hint or a look-up's result. Cancel safe.
    async fn step(&mut self) {
        if self.lookup.is_none() && self.lookup_at.is_some_and(|at| at <= Instant::now()) {
            let (net, blob) = (self.shared.net.clone(), self.blob);
            self.lookup = Some(Box::pin(async move { net.find_providers(blob).await }));
            self.lookup_at = None;
            self.lookups += 1;
        }
        let lookup = async {
            match &mut self.lookup {
                Some(lookup) => lookup.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            found = lookup => {
                self.lookup = None;
                found.into_iter().for_each(|node| self.add(node));
                let usable = self.list.iter().any(|p| !p.out);
                let again = if usable { Some(LOOKUP_MORE_EVERY) } else { (self.lookups < LOOKUPS).then_some(LOOKUP_EVERY) };
                self.lookup_at = again.map(|wait| Instant::now() + wait);
            }
            hint = self.hints.recv() => match hint {
                Some(node) => self.add(node),
                None => std::future::pending().await,
            },
        }
    }

    /// Puts workers on providers: as many as there is work for, the least used provider first.
    fn start_workers(&mut self, job: &Arc<Job>, workers: &mut Workers<'_>, last_moved: Instant) {
        let config = &self.shared.config;
        let units = usize::try_from(job.plan().units_left()).unwrap_or(usize::MAX);
        let most = config.providers_max.max(1) * config.streams_per_provider.max(1);
        let hedge = usize::from(last_moved.elapsed() >= HEDGE_AFTER);
        let idle_work = if workers.is_empty() { units.max(1) } else { units };
        let mut wanted = idle_work.min(most.saturating_sub(workers.len())).max(hedge);
        let (streams, providers_max) = (config.streams_per_provider.max(1), config.providers_max.max(1));
        let now = Instant::now();
        while wanted > 0 && workers.len() < most {
            let busy = self.list.iter().filter(|p| p.streams > 0).count();
            let Some(at) = self.pick(now, streams, busy < providers_max) else { return };
            let p = &mut self.list[at];
            let id = WorkerId { provider: at, stream: p.next_stream };
            p.streams += 1;
            p.next_stream += 1;
            p.retry_at = None;
            workers.push(Box::pin(work(job.clone(), p.node, id, p.stop.clone())));
            wanted -= 1;
        }
    }

    fn pick(&self, now: Instant, streams: usize, more: bool) -> Option<usize> {
        let ready = |p: &Provider| {
            let due = !p.out && p.retry_at.is_none_or(|at| at <= now);
            due && p.streams < streams && (p.streams > 0 || more)
        };
        let fit = self.list.iter().enumerate().filter(|(_, p)| ready(p));
        fit.min_by_key(|(at, p)| (p.streams, *at)).map(|(at, _)| at)
    }

    async fn on_end(&mut self, job: &Job, ended: Ended) -> Result<(), TransferError> {
        let Some(p) = self.list.get_mut(ended.id.provider) else { return Ok(()) };
        p.streams = p.streams.saturating_sub(1);
        if ended.units > 0 {
            (p.failures, p.refusals) = (0, 0);
        }
        let mut lie = None;
        match ended.end {
            End::Done => "served".clone_into(&mut p.last),
            End::NotFound => {
                p.out = true;
                "does not have it, or not for this node".clone_into(&mut p.last);
            }
            End::Busy => p.busy(),
            End::Failed(reason) => p.fail(reason),
            End::Lied(reason) => {
                p.out = true;
                p.stop.store(true, Ordering::Relaxed);
                p.last.clone_from(&reason);
                lie = Some((p.node, reason));
            }
            End::Fatal(e) => return Err(e),
        }
        if let Some((node, reason)) = lie {
            job.shared.ban(node, reason).await;
        }
        let none_left = self.list.iter().all(|p| p.out);
        if none_left && self.dht && self.lookup.is_none() && self.lookups < LOOKUPS {
            self.lookup_at.get_or_insert(Instant::now());
        }
        Ok(())
    }

    /// The blob's length, from whoever proves it first.
    async fn learn_len(&mut self, max: ByteCount) -> Result<ByteCount, TransferError> {
        let mut queue: VecDeque<usize> = VecDeque::new();
        let (mut seen, mut too_long) = (0, None);
        loop {
            queue.extend(seen..self.list.len());
            seen = self.list.len();
            let Some(at) = queue.pop_front() else {
                if self.lookup.is_none() && self.lookup_at.is_none() {
                    return Err(match too_long {
                        Some(len) => TransferError::TooLarge { blob: self.blob, len, max },
                        None => TransferError::NoProvider { blob: self.blob, tried: self.tried() },
                    });
                }
                let due = self.next_due();
                tokio::select! {
                    () = self.step() => {}
                    () = sleep_until(due), if due > Instant::now() => {}
                }
                // Those who answered badly are not asked again by a probe; the next look-up may name others.
                continue;
            };
            if self.list[at].out {
                continue;
            }
            let node = self.list[at].node;
            match probe::length(&self.shared, node, self.blob, max).await {
                Probed::Len(len) => return Ok(len),
                Probed::TooLong(len) => {
                    self.list[at].last = format!("says that it is {len} long");
                    self.list[at].out = true;
                    too_long = Some(len);
                }
                Probed::Nothing(reason) => self.list[at].last = reason,
                Probed::Lied(reason) => {
                    self.list[at].last.clone_from(&reason);
                    self.list[at].out = true;
                    self.shared.ban(node, reason).await;
                }
            }
        }
    }
}

impl Provider {
    /// Asked again for as long as the fetch has patience: being busy is no fault.
    fn busy(&mut self) {
        "is busy".clone_into(&mut self.last);
        self.retry_at = Some(Instant::now() + (RETRY_FIRST * 2_u32.pow(self.refusals.min(4))).min(BUSY_RETRY_MAX));
        self.refusals += 1;
    }

    /// Out after some tries, which its other streams share.
    fn fail(&mut self, reason: String) {
        self.last = reason;
        self.failures += 1;
        if self.failures > RETRIES {
            self.out = true;
        } else {
            self.retry_at = Some(Instant::now() + RETRY_FIRST * 2_u32.pow(self.failures - 1));
        }
    }
}
