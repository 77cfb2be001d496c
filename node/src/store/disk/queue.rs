//! The bounded queue between the store's handles and its writer.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::store::{Commit, MAX_BATCH_BYTES, Pending, StoreError, StoreStatus, WriteBatch};

/// Most batches queued: some seconds of work at the rate of a slow disk, and more than any service has in flight.
const QUEUE_BATCHES: usize = 4_096;

/// Most bytes queued.
const QUEUE_BYTES: u64 = 64 * 1024 * 1024;

/// Most batches that share a flush: an acknowledgement waits for all of its group.
const GROUP_BATCHES: usize = 1_024;

/// A group is closed once it has this many bytes.
const GROUP_BYTES: usize = MAX_BATCH_BYTES;

/// A group of at least so many that wait says that more are coming, and the next one is kept open for a while: the disk is
/// asked less often, which is worth more than the moment to those who are many, and costs one alone nothing.
const LINGER_FROM: usize = 4;
const LINGER: Duration = Duration::from_millis(2);

/// Once the queue was empty for this long, nobody waits for the disk, and the mark is synced.
const IDLE: Duration = Duration::from_millis(20);

type Reply = oneshot::Sender<Result<Commit, StoreError>>;

/// A batch on its way, and where its outcome goes.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) batch: WriteBatch,
    urgent: bool,
    reply: Reply,
}

#[derive(Debug)]
enum Message {
    Write(Request),
    Close(Reply),
}

#[derive(Debug, Default)]
struct Shared {
    queued_batches: AtomicU64,
    queued_bytes: AtomicU64,
    closed: AtomicBool,
    status: Mutex<StoreStatus>,
}

/// The end that handles write into.
#[derive(Debug)]
pub(super) struct Queue {
    sender: SyncSender<Message>,
    shared: Arc<Shared>,
}

/// The writer's end.
#[derive(Debug)]
pub(super) struct Inbox {
    receiver: Receiver<Message>,
    shared: Arc<Shared>,
    closing: Option<Reply>,
    /// How many waited for the last group.
    waited: usize,
}

/// What the writer is to do next.
#[derive(Debug)]
pub(super) enum Next {
    /// Commit the requests gathered.
    Group,
    /// Nobody waits: do what was put off.
    Idle,
    /// Write out everything and stop; the reply, if anybody wants one.
    Close(Option<ClosingReply>),
}

/// The reply of a close.
#[derive(Debug)]
pub(super) struct ClosingReply(Reply);

pub(super) fn channel() -> (Queue, Inbox) {
    let (sender, receiver) = sync_channel(QUEUE_BATCHES);
    let shared = Arc::<Shared>::default();
    (Queue { sender, shared: Arc::clone(&shared) }, Inbox { receiver, shared, closing: None, waited: 0 })
}

impl Queue {
    /// Queues a batch, or says at once why not.
    pub(super) fn push(&self, batch: WriteBatch, urgent: bool) -> Pending {
        if let Err(err) = batch.check() {
            return Pending::done(Err(err));
        }
        let shared = &self.shared;
        if shared.closed.load(Ordering::Acquire) {
            return Pending::done(Err(StoreError::Closed));
        }
        let bytes = batch.bytes() as u64;
        if shared.queued_bytes.fetch_add(bytes, Ordering::AcqRel) + bytes > QUEUE_BYTES {
            shared.queued_bytes.fetch_sub(bytes, Ordering::AcqRel);
            return Pending::done(Err(self.busy()));
        }
        shared.queued_batches.fetch_add(1, Ordering::AcqRel);
        let (reply, outcome) = oneshot::channel();
        match self.sender.try_send(Message::Write(Request { batch, urgent, reply })) {
            Ok(()) => Pending::waiting(outcome),
            Err(refused) => {
                shared.queued_bytes.fetch_sub(bytes, Ordering::AcqRel);
                shared.queued_batches.fetch_sub(1, Ordering::AcqRel);
                Pending::done(Err(match refused {
                    TrySendError::Full(_) => self.busy(),
                    TrySendError::Disconnected(_) => StoreError::Closed,
                }))
            }
        }
    }

    /// Asks the writer to finish. The first call counts; any other resolves at once.
    pub(super) fn close(&self) -> Pending {
        let closed = Ok(Commit { seq: self.status().applied_seq });
        if self.shared.closed.swap(true, Ordering::AcqRel) {
            return Pending::done(closed);
        }
        let (reply, outcome) = oneshot::channel();
        // A full queue takes the message once the writer has gone on: it never waits for the one who closes.
        match self.sender.send(Message::Close(reply)) {
            Ok(()) => Pending::waiting(outcome),
            Err(_) => Pending::done(closed),
        }
    }

    pub(super) fn status(&self) -> StoreStatus {
        let mut status = self.shared.status.lock().unwrap_or_else(PoisonError::into_inner).clone();
        status.queued_batches = self.shared.queued_batches.load(Ordering::Acquire);
        status
    }

    fn busy(&self) -> StoreError {
        StoreError::Busy { queued_batches: self.shared.queued_batches.load(Ordering::Acquire) }
    }
}

impl Inbox {
    /// Waits for work and gathers what may share a flush: everything queued once one of it is urgent (and what comes
    /// within [`LINGER`] while many wait), and before that whatever comes within `relaxed_delay`.
    pub(super) fn gather(&mut self, group: &mut Vec<Request>, owes_sync: bool, relaxed_delay: Duration) -> Next {
        if self.closing.is_some() {
            return Next::Close(self.closing.take().map(ClosingReply));
        }
        let first = if owes_sync {
            match self.receiver.recv_timeout(IDLE) {
                Err(RecvTimeoutError::Timeout) => return Next::Idle,
                other => other.ok(),
            }
        } else {
            self.receiver.recv().ok()
        };
        let Some(first) = first else { return Next::Close(None) };
        let mut bytes = 0;
        let mut urgent = self.take(first, group, &mut bytes);
        let begun = Instant::now();
        let linger = if self.waited >= LINGER_FROM { LINGER } else { Duration::ZERO };
        while group.len() < GROUP_BATCHES && bytes < GROUP_BYTES && self.closing.is_none() {
            let patience = if urgent { linger } else { relaxed_delay };
            let left = patience.saturating_sub(begun.elapsed());
            let message =
                if left.is_zero() { self.receiver.try_recv().ok() } else { self.receiver.recv_timeout(left).ok() };
            let Some(message) = message else { break };
            urgent |= self.take(message, group, &mut bytes);
        }
        self.waited = group.iter().filter(|request| request.urgent).count();
        Next::Group
    }

    /// Adds a message to the group; says whether somebody waits for it.
    fn take(&mut self, message: Message, group: &mut Vec<Request>, bytes: &mut usize) -> bool {
        match message {
            Message::Write(request) => {
                self.shared.queued_batches.fetch_sub(1, Ordering::AcqRel);
                self.shared.queued_bytes.fetch_sub(request.batch.bytes() as u64, Ordering::AcqRel);
                *bytes += request.batch.bytes();
                let urgent = request.urgent;
                group.push(request);
                urgent
            }
            Message::Close(reply) => {
                self.closing = Some(reply);
                true
            }
        }
    }

    /// Changes the figures that handles report.
    pub(super) fn update_status(&self, update: impl FnOnce(&mut StoreStatus)) {
        update(&mut self.shared.status.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Request {
    /// Tells the one who waits, if he still does.
    pub(super) fn finish(self, outcome: Result<Commit, StoreError>) {
        let _ = self.reply.send(outcome);
    }
}

impl ClosingReply {
    pub(super) fn finish(self, outcome: Result<Commit, StoreError>) {
        let _ = self.0.send(outcome);
    }
}
