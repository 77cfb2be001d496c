//! Dispatch: the driver of the job machine. Port events go in, outputs are performed.
//!
//! **Owns** the live jobs of a validator: their inputs until the verdict, their watchers, the offers under way, and their
//! records in the store. **Does not own** any decision: those are [`crate::domain::job`]'s.
//!
//! **Invariants**: what a requester is told is durable first; outputs are performed in the order in which the machine gave
//! them, those that wait for the store excepted; the loop awaits nothing but its one `select!`.

mod live;
mod offer;
mod perform;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use sundara_proto::crypto::{HotkeyPair, Network};
use sundara_proto::id::{BlobId, Digest, Hotkey, JobId};
use sundara_proto::pb;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::directory::Directory;
use super::{Admitted, AuditNews, AuditOrder, Convicted, EntrySender};
use crate::blobs::{Blobs, TransferHandle};
use crate::domain::Now;
use crate::domain::audit::EpochSecret;
use crate::domain::job::{CleanRecord, Input, JobConfig, JobMachine, JobRecord, KnownMiner, MinerRecord};
use crate::domain::schedule::MinerProfile;
use crate::net::{NetHandle, PeerEvent};
use crate::service::{Tasks, wall_now};
use crate::store::{KeyRange, Keyspace, ProtoTable, SharedStore, StoreError, Table, WriteBatch};

pub(crate) use live::LiveJobs;

/// Inputs from offer tasks, on their way to the machine. A full queue holds back the tasks, not the loop.
const INPUTS_QUEUED_MAX: usize = 4_096;
/// Questions about miners, on their way to the machine.
const QUESTIONS_QUEUED_MAX: usize = 16;

const JOBS: ProtoTable<JobRecord> = Table::new(Keyspace::Jobs);
const MINERS: ProtoTable<MinerRecord> = Table::new(Keyspace::Scores);

/// What a running validator says of its jobs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DispatchStatus {
    /// Waiting or running.
    pub live: usize,
    /// Verdicts by kind since start: quorum, audited, unaudited, rejected, failed.
    pub verdicts: [u64; 5],
    /// Miners that were dropped for an offence since start, newest last, at most 64.
    pub caught: Vec<Caught>,
}

/// A miner that was dropped from scheduling.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caught {
    /// Who.
    pub miner: Hotkey,
    /// Why.
    pub reason: String,
    /// Unix milliseconds.
    pub at_ms: u64,
}

/// Asks what is known of a miner.
type Question = (Hotkey, oneshot::Sender<Option<KnownMiner>>);

/// What the service needs from the rest of the node.
pub(crate) struct DispatchParts {
    pub(crate) config: JobConfig,
    pub(crate) network: Network,
    pub(crate) key: HotkeyPair,
    pub(crate) incentive: Digest,
    pub(crate) net: NetHandle,
    pub(crate) directory: Directory,
    pub(crate) store: SharedStore,
    pub(crate) blobs: Blobs,
    pub(crate) transfer: TransferHandle,
    pub(crate) entries: EntrySender,
    pub(crate) admitted: mpsc::Receiver<Admitted>,
    pub(crate) audits: mpsc::Sender<AuditOrder>,
    pub(crate) audit_news: mpsc::Receiver<AuditNews>,
    /// Miners as their adverts describe them.
    pub(crate) miners: mpsc::Receiver<MinerProfile>,
    /// Miners that others' fraud proofs name.
    pub(crate) convicted: mpsc::Receiver<Convicted>,
    pub(crate) epoch: EpochSecret,
    pub(crate) tasks: Tasks,
}

/// Handle of the service.
#[derive(Clone)]
pub(crate) struct DispatchHandle {
    status: watch::Receiver<DispatchStatus>,
    questions: mpsc::Sender<Question>,
    drain: CancellationToken,
}

impl DispatchHandle {
    /// As of now.
    pub(crate) fn status(&self) -> DispatchStatus {
        self.status.borrow().clone()
    }

    /// What the machine knows of a miner; `None` too while the node stops. Cancel safe.
    pub(crate) async fn known(&self, miner: Hotkey) -> Option<KnownMiner> {
        let (answer, answered) = oneshot::channel();
        self.questions.send((miner, answer)).await.ok()?;
        answered.await.ok()?
    }

    /// Takes no more jobs and waits until none is live.
    pub(crate) async fn drain(&self) {
        self.drain.cancel();
        let mut status = self.status.clone();
        // An error means that the loop is gone, and its jobs with it: they go on at the next start.
        let _gone = status.wait_for(|s| s.live == 0).await;
    }
}

/// A store commit under way, and what to do once it is durable.
type Commit = Pin<Box<dyn Future<Output = (Result<(), StoreError>, perform::Deferred)> + Send>>;

pub(crate) struct Dispatch {
    config: JobConfig,
    network: Network,
    key: HotkeyPair,
    net: NetHandle,
    directory: Directory,
    store: SharedStore,
    blobs: Blobs,
    transfer: TransferHandle,
    entries: EntrySender,
    audits: mpsc::Sender<AuditOrder>,
    inputs: mpsc::Sender<FromOffer>,
    tasks: Tasks,
    machine: JobMachine,
    live: LiveJobs,
    commits: FuturesUnordered<Commit>,
    timer: Option<Instant>,
    begun: Instant,
    status: watch::Sender<DispatchStatus>,
    certs: Arc<offer::CertCache>,
}

/// Starts the service; it ends with its tasks.
///
/// # Errors
/// When the records of an earlier run cannot be read.
pub(crate) fn start(parts: DispatchParts) -> Result<DispatchHandle, StoreError> {
    let begun = Instant::now();
    let machine = JobMachine::new(parts.config.clone(), parts.incentive, parts.epoch, rand::random());
    let (inputs, inputs_rx) = mpsc::channel(INPUTS_QUEUED_MAX);
    let (questions, questions_rx) = mpsc::channel(QUESTIONS_QUEUED_MAX);
    let (status, status_rx) = watch::channel(DispatchStatus::default());
    let drain = CancellationToken::new();
    // Subscribed before the first look at who is here.
    let peers = parts.net.subscribe_peers();
    let mut dispatch = Dispatch {
        config: parts.config,
        network: parts.network,
        key: parts.key,
        net: parts.net,
        directory: parts.directory,
        store: parts.store,
        blobs: parts.blobs,
        transfer: parts.transfer,
        entries: parts.entries,
        audits: parts.audits,
        inputs,
        tasks: parts.tasks.clone(),
        machine,
        live: LiveJobs::default(),
        commits: FuturesUnordered::new(),
        timer: None,
        begun,
        status,
        certs: Arc::default(),
    };
    dispatch.restore()?;
    dispatch.look();
    let feeds = Feeds {
        admitted: parts.admitted,
        audit_news: parts.audit_news,
        miners: parts.miners,
        convicted: parts.convicted,
        inputs: inputs_rx,
        questions: questions_rx,
        peers,
        drain: drain.clone(),
    };
    let token = parts.tasks.token();
    parts.tasks.spawn("loop", dispatch.run(feeds, token));
    Ok(DispatchHandle { status: status_rx, questions, drain })
}

/// What an offer's task tells the loop.
pub(crate) struct FromOffer {
    input: Input,
    /// Result bytes that came with it, already compared with the attested digest.
    output: Option<(BlobId, Bytes)>,
}

/// Everything that the loop listens to.
struct Feeds {
    admitted: mpsc::Receiver<Admitted>,
    audit_news: mpsc::Receiver<AuditNews>,
    miners: mpsc::Receiver<MinerProfile>,
    convicted: mpsc::Receiver<Convicted>,
    inputs: mpsc::Receiver<FromOffer>,
    questions: mpsc::Receiver<Question>,
    peers: broadcast::Receiver<PeerEvent>,
    drain: CancellationToken,
}

impl Dispatch {
    fn now(&self) -> Now {
        Now { mono: self.begun.elapsed(), wall: wall_now() }
    }

    async fn run(mut self, mut feeds: Feeds, token: CancellationToken) {
        loop {
            let draining = feeds.drain.is_cancelled();
            let at = self.timer.unwrap_or_else(Instant::now);
            tokio::select! {
                () = token.cancelled() => break,
                Some((result, deferred)) = self.commits.next() => self.on_committed(result, deferred),
                Some(from) = feeds.inputs.recv() => self.on_offer(from),
                Some(news) = feeds.audit_news.recv() => self.on_audit_news(news),
                Some(miner) = feeds.miners.recv() => self.take(Input::Miner(Box::new(miner))),
                event = feeds.peers.recv() => self.on_peer(event),
                Some(convicted) = feeds.convicted.recv() => self.on_convicted(convicted),
                Some(admitted) = feeds.admitted.recv() => self.on_admitted(admitted, draining),
                Some((miner, answer)) = feeds.questions.recv() => {
                    // Whoever asked may have gone.
                    let _gone = answer.send(self.machine.known(&miner, self.now()));
                }
                () = tokio::time::sleep_until(at), if self.timer.is_some() => {
                    self.timer = None;
                    self.take(Input::TimerFired);
                }
            }
            let live = self.live.len();
            self.status.send_if_modified(|s| std::mem::replace(&mut s.live, live) != live);
        }
        // What is on its way to the disk is worth waiting for; the tasks' grace time bounds it.
        while self.commits.next().await.is_some() {}
    }

    /// Reads what an earlier run left. Open jobs begin anew; nobody watches them until their requesters ask again.
    fn restore(&mut self) -> Result<(), StoreError> {
        self.each(&JOBS, |dispatch, key, record: JobRecord| {
            let Ok(job) = JobId::try_from(key) else { return };
            if !record.finished {
                match record.submission() {
                    Ok(submission) => dispatch.live.restored(&submission),
                    Err(e) => tracing::error!(%job, error = %e, "a job record is unreadable; the job is lost"),
                }
            }
            dispatch.take(Input::Restored { job, record: Box::new(record) });
        })?;
        // Two kinds of records, told apart by their keys. As many are kept as the machine holds in memory: what it forgot
        // while it ran is still in the store.
        let (mut trust, mut clean) = (self.config.trust_max(), self.config.clean_counts_max);
        let mut surplus = WriteBatch::new();
        let mut range = Some(KeyRange::all());
        while let Some(r) = range {
            let page = self.store.scan(Keyspace::Scores, &r, crate::store::MAX_SCAN_RECORDS)?;
            for (key, value) in page.items {
                let left = if key.len() == 32 { &mut trust } else { &mut clean };
                if *left == 0 {
                    surplus.delete(Keyspace::Scores, key);
                    continue;
                }
                *left -= 1;
                let input = match key.len() {
                    32 => MinerRecord::decode(value).ok().map(|record| Input::RestoredMiner(Box::new(record))),
                    _ => perform::clean_from(&key, &value).map(Input::RestoredClean),
                };
                match input {
                    Some(input) => self.take(input),
                    None => tracing::error!("a record of a miner's trust is unreadable; the miner begins anew"),
                }
            }
            if !surplus.is_empty() {
                drop(self.store.commit_relaxed(std::mem::take(&mut surplus)));
            }
            range = page.next;
        }
        Ok(())
    }

    fn each<V: prost::Message + Default>(
        &mut self,
        table: &ProtoTable<V>,
        mut f: impl FnMut(&mut Self, &[u8], V),
    ) -> Result<(), StoreError> {
        let store = self.store.clone();
        let mut range = Some(KeyRange::all());
        while let Some(r) = range {
            let (rows, next) = table.scan(&*store, &r, crate::store::MAX_SCAN_RECORDS)?;
            for (key, value) in rows {
                f(self, &key, value);
            }
            range = next;
        }
        Ok(())
    }

    fn take(&mut self, input: Input) {
        let outputs = self.machine.handle(input, self.now());
        self.perform(outputs);
    }

    fn on_offer(&mut self, from: FromOffer) {
        if let (Some((digest, bytes)), Input::Revealed { part, .. }) = (from.output, &from.input) {
            self.live.add_output(&part.job, digest, bytes);
        }
        self.take(from.input);
    }

    fn on_audit_news(&mut self, news: AuditNews) {
        match news {
            AuditNews::Done { job, attempt, result } => self.take(Input::Audited { job, attempt, result }),
            AuditNews::Engines(engines) => self.take(Input::Auditor { engines }),
            AuditNews::Epoch(secret) => self.take(Input::EpochTurned(secret)),
        }
    }

    fn on_convicted(&mut self, Convicted { miner, accuser, job }: Convicted) {
        let until = wall_now().plus(Duration::from_millis(self.config.drop_ms));
        self.take(Input::Banned { miner, until, reason: format!("fraud proof of {accuser} over job {job}") });
    }

    fn on_peer(&mut self, event: Result<PeerEvent, broadcast::error::RecvError>) {
        match event {
            Ok(PeerEvent::Connected(peer)) => self.take(Input::PeerHere(peer.node)),
            Ok(PeerEvent::Gone(node)) => self.take(Input::PeerGone(node)),
            // Deadlines find what was missed; who is here now is looked up again.
            Err(broadcast::error::RecvError::Lagged(_)) => self.look(),
            // The network ends only with the node; the token is next.
            Err(broadcast::error::RecvError::Closed) => {}
        }
    }

    /// Tells the machine who is connected.
    fn look(&mut self) {
        let view = self.directory.snapshot();
        for node in view.peers.keys() {
            self.take(Input::PeerHere(*node));
        }
    }

    fn on_admitted(&mut self, admitted: Admitted, draining: bool) {
        match admitted {
            Admitted::Submit { watcher, .. } if draining => {
                live::tell(
                    &watcher,
                    pb::job_event::Kind::Refused(pb::Refused {
                        reason: "validator is shutting down".to_owned(),
                        retryable: true,
                    }),
                );
            }
            Admitted::Submit { submission, inline_input, watcher, place } => {
                self.live.submitted(&submission, inline_input, watcher, place);
                self.take(Input::Submitted(submission));
            }
            Admitted::Watch { job, asker, watcher } => self.on_watch(job, asker, watcher),
            Admitted::Cancel { job, asker } => {
                if self.live.get(&job).is_some_and(|live| live.spec.requester() == asker) {
                    self.take(Input::Cancelled { job });
                }
            }
        }
    }
}

/// A miner's clean audits in one environment, as stored: key hotkey and env_id, value the count.
pub(crate) fn clean_key(clean: &CleanRecord) -> Vec<u8> {
    [clean.miner.as_ref(), clean.env_id.as_ref()].concat()
}
