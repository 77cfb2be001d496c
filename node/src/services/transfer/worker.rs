//! One stream of one provider within a fetch: asks ahead, receives, hands over to be verified and written.
//!
//! While a unit is verified and written on the blocking pool the next one is received, so network and disk overlap; no more
//! than two units are in memory.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::BytesMut;
use sundara_proto::blob::{BlobHeader, BlobRequest, GROUP_LEN, GroupRanges};
use sundara_proto::id::NodeId;
use sundara_proto::units::ByteCount;
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::plan::{Plan, Wish, WorkerId};
use super::stream::{StreamError, frame, read_all, read_message, write_all};
use super::{BlobIo, Shared, TransferError};
use crate::blobs::{Partial, PieceError, encoded_len, lock};

/// Longest wait for a stream, a dial and the handshakes before it included.
pub(crate) const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// A unit: the least that is asked for, and what goes from one provider to another. 256 KiB, the frame that libp2p streams
/// carry best.
const UNIT_GROUPS: u64 = 16;
/// Units asked for at once from a provider that is fast enough: larger requests cost less of everything.
const UNITS_MAX: u64 = 4;
/// How long the answer to one request should take: what is lost when its provider fails, and the slack at the end.
const REQUEST_TIME: Duration = Duration::from_millis(100);
/// Requests on their way at least, so that the provider never waits for one, and at most.
const DEPTH_MIN: usize = 2;
const DEPTH_MAX: usize = 16;
/// How much time's worth of requests is on its way: longer than any round trip, short enough for others to take over.
const AHEAD: Duration = Duration::from_secs(1);
/// How often a worker without work looks again, and asks a partial provider what it has now.
const LOOK_AGAIN: Duration = Duration::from_millis(300);

/// How a worker ended.
#[derive(Debug)]
pub(crate) enum End {
    /// Nothing is left to fetch.
    Done,
    /// The provider does not have the blob, or not for us.
    NotFound,
    /// Later, perhaps.
    Busy,
    /// The stream broke or stalled.
    Failed(String),
    /// Wrong bytes, or messages against the rules.
    Lied(String),
    /// Our own side cannot go on.
    Fatal(TransferError),
}

/// A worker's last word.
pub(crate) struct Ended {
    pub(crate) id: WorkerId,
    /// Units that it delivered.
    pub(crate) units: u32,
    pub(crate) end: End,
}

/// One fetch, as its workers share it.
pub(crate) struct Job {
    pub(crate) shared: Arc<Shared>,
    pub(crate) partial: Arc<Partial>,
    plan: Mutex<Plan>,
    /// Told when groups are done or given back.
    pub(crate) changed: Notify,
    /// Bytes received: what counts as progress.
    pub(crate) received: AtomicU64,
    /// Groups stored by this fetch.
    pub(crate) stored: AtomicU64,
    began: Instant,
}

impl Job {
    pub(crate) fn new(shared: Arc<Shared>, partial: Partial) -> Self {
        let plan = Mutex::new(Plan::new(partial.missing(), UNIT_GROUPS));
        Self {
            shared,
            partial: Arc::new(partial),
            plan,
            changed: Notify::new(),
            received: AtomicU64::new(0),
            stored: AtomicU64::new(0),
            began: Instant::now(),
        }
    }

    pub(crate) fn plan(&self) -> MutexGuard<'_, Plan> {
        lock(&self.plan)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }
}

enum Ask {
    Groups(GroupRanges),
    Holdings,
}

type Stored = (Vec<u8>, GroupRanges, Result<(), PieceError>);

struct Worker {
    job: Arc<Job>,
    id: WorkerId,
    from: ReadHalf<Box<dyn BlobIo>>,
    to: WriteHalf<Box<dyn BlobIo>>,
    asked: VecDeque<Ask>,
    /// What the provider has; `None`: everything, as far as is known.
    holds: Option<GroupRanges>,
    storing: Option<JoinHandle<Stored>>,
    spare: Option<Vec<u8>>,
    units_done: u32,
    began: Instant,
}

/// Works for `job` on a stream to `node`, until there is nothing left to do or the provider is of no more use, which
/// `stop` may say too.
pub(crate) async fn work(job: Arc<Job>, node: NodeId, id: WorkerId, stop: Arc<AtomicBool>) -> Ended {
    let mut units = 0;
    let end = match timeout(OPEN_TIMEOUT, job.shared.net.open(node)).await {
        Err(_) => End::Failed("did not answer".to_owned()),
        Ok(Err(e)) => End::Failed(format!("could not be reached: {e}")),
        Ok(Ok(stream)) => {
            let (from, to) = tokio::io::split(stream);
            let mut worker = Worker {
                job: job.clone(),
                id,
                from,
                to,
                asked: VecDeque::new(),
                holds: None,
                storing: None,
                spare: None,
                units_done: 0,
                began: Instant::now(),
            };
            let end = worker.run(&stop).await.unwrap_or_else(|end| end);
            // What is being stored may yet complete; the outcome decides whether others fetch it again.
            let late = worker.settle().await;
            units = worker.units_done;
            match late {
                Err(late) if matches!(end, End::Done | End::Failed(_) | End::NotFound | End::Busy) => late,
                _ => end,
            }
        }
    };
    job.plan().give_back(id, None);
    job.changed.notify_waiters();
    Ended { id, units, end }
}

impl Worker {
    /// `Ok` and `Err` both are ends: `?` leaves early.
    async fn run(&mut self, stop: &AtomicBool) -> Result<End, End> {
        loop {
            if stop.load(Ordering::Relaxed) {
                return Ok(End::Failed("was dropped".to_owned()));
            }
            self.ask().await?;
            match self.asked.pop_front() {
                Some(ask) => self.receive(ask).await?,
                None => {
                    self.settle().await?;
                    if self.job.plan().is_done() {
                        return Ok(End::Done);
                    }
                    self.wait().await?;
                }
            }
        }
    }

    /// Units that come in `time` at the rate so far.
    fn units_in(&self, time: Duration) -> f64 {
        f64::from(self.units_done) / self.began.elapsed().as_secs_f64().max(1e-3) * time.as_secs_f64()
    }

    /// Units to ask for at once.
    fn request_units(&self) -> u64 {
        (self.units_in(REQUEST_TIME) as u64).clamp(1, UNITS_MAX)
    }

    /// Requests that may be on their way.
    fn depth(&self) -> usize {
        ((self.units_in(AHEAD) / self.request_units() as f64) as usize).clamp(DEPTH_MIN, DEPTH_MAX)
    }

    async fn ask(&mut self) -> Result<(), End> {
        let mut sent = false;
        while self.asked.len() < self.depth() {
            let may_steal = self.asked.is_empty();
            let wish = Wish { holds: self.holds.as_ref(), units: self.request_units(), may_steal };
            let taken = self.job.plan().take(self.id, wish, self.job.now());
            let Some(groups) = taken else { break };
            self.request(groups.clone()).await?;
            self.asked.push_back(Ask::Groups(groups));
            sent = true;
        }
        if sent { self.to.flush().await.map_err(|e| StreamError::Io(e).into()) } else { Ok(()) }
    }

    async fn request(&mut self, groups: GroupRanges) -> Result<(), End> {
        let blob = self.job.partial.id();
        let request = frame(&BlobRequest { blob, groups }).map_err(StreamError::from)?;
        Ok(write_all(&mut self.to, &request, self.job.shared.progress_timeout()).await?)
    }

    /// Nothing to ask for: others are on it, or the provider lacks what is left.
    async fn wait(&mut self) -> Result<(), End> {
        let _ = timeout(LOOK_AGAIN, self.job.changed.notified()).await;
        if self.holds.is_some() {
            self.request(GroupRanges::empty()).await?;
            self.to.flush().await.map_err(StreamError::from)?;
            self.asked.push_back(Ask::Holdings);
        }
        Ok(())
    }

    async fn receive(&mut self, ask: Ask) -> Result<(), End> {
        let patience = self.job.shared.progress_timeout();
        let header = read_message::<BlobHeader>(&mut self.from, patience).await?;
        let (len, groups) = match header {
            Some(BlobHeader::Found { len, groups }) => (len, groups),
            Some(BlobHeader::NotFound) => return Err(End::NotFound),
            Some(BlobHeader::Busy) => return Err(End::Busy),
            None => return Err(End::Failed("closed the stream".to_owned())),
        };
        if len != self.job.partial.len() {
            let (blob, known) = (self.job.partial.id(), self.job.partial.len());
            return Err(End::Lied(format!("says that blob {blob} is {len} long, but it is {known}")));
        }
        let asked = match ask {
            Ask::Holdings => {
                self.holds = Some(groups);
                return Ok(());
            }
            Ask::Groups(asked) => asked,
        };
        if groups.intersect(&asked) != groups {
            return Err(End::Lied("sent groups that nobody asked for".to_owned()));
        }
        if groups != asked {
            self.lacks(&asked, &groups);
        }
        if groups.is_empty() { Ok(()) } else { self.body(len, groups).await }
    }

    /// A provider of a part: what it lacks goes to others, and it is asked what it has.
    fn lacks(&mut self, asked: &GroupRanges, got: &GroupRanges) {
        let mut missing = asked.clone();
        missing.subtract(got);
        let mut holds = self.holds.take().unwrap_or_else(|| GroupRanges::all(self.job.partial.len()));
        holds.subtract(&missing);
        self.holds = Some(holds);
        self.job.plan().give_back(self.id, Some(&missing));
        self.job.changed.notify_waiters();
    }

    async fn body(&mut self, len: ByteCount, groups: GroupRanges) -> Result<(), End> {
        let shared = self.job.shared.clone();
        let size = usize::try_from(encoded_len(self.job.partial.id(), len, &groups)).unwrap_or(usize::MAX);
        let mut buffer = self.spare.take().unwrap_or_default();
        if buffer.len() < size {
            buffer = BytesMut::zeroed(size.max((UNITS_MAX * UNIT_GROUPS * (GROUP_LEN + 128)) as usize)).into();
        }
        shared.download.pass(size).await;
        read_all(&mut self.from, &mut buffer[..size], shared.progress_timeout(), |n| {
            self.job.received.fetch_add(n as u64, Ordering::Relaxed);
            shared.stats.add_received(n);
        })
        .await?;
        self.settle().await?;
        if self.job.plan().still_open(&groups).is_empty() {
            // Another was faster.
            self.job.plan().done(self.id, &groups);
            self.spare = Some(buffer);
            return Ok(());
        }
        let partial = self.job.partial.clone();
        self.storing = Some(tokio::task::spawn_blocking(move || {
            let stored = partial.store(&groups, &buffer[..size]);
            (buffer, groups, stored)
        }));
        Ok(())
    }

    /// Waits for what is being verified and written.
    async fn settle(&mut self) -> Result<(), End> {
        let Some(storing) = self.storing.take() else { return Ok(()) };
        let Ok((buffer, groups, stored)) = storing.await else { return Err(End::Fatal(TransferError::Closed)) };
        self.spare = Some(buffer);
        match stored {
            Ok(()) => {
                let units = groups.count().div_ceil(UNIT_GROUPS);
                self.units_done = self.units_done.saturating_add(u32::try_from(units).unwrap_or(u32::MAX));
                self.job.plan().done(self.id, &groups);
                self.job.stored.fetch_add(groups.count(), Ordering::Relaxed);
                self.job.changed.notify_waiters();
                Ok(())
            }
            Err(PieceError::Bad { group }) => {
                let blob = self.job.partial.id();
                Err(End::Lied(format!("sent group {group} of blob {blob} with bytes that do not match its hash")))
            }
            Err(PieceError::Blob(e)) => Err(End::Fatal(TransferError::store(self.job.partial.id(), &e))),
        }
    }
}

impl From<StreamError> for End {
    fn from(e: StreamError) -> Self {
        match e {
            StreamError::Wire(_) => Self::Lied(e.to_string()),
            StreamError::Io(_) | StreamError::Stalled(_) => Self::Failed(e.to_string()),
        }
    }
}
