//! Requests and responses between certified peers, over one long-lived stream for each direction of a peer pair.
//!
//! Owns: what a caller ([`Responses`]) and a server ([`Inbound`], [`Reply`]) hold, credit, and the two stream drivers.
//! Does not own: who is certified, dialling and opening of streams (the event loop), what requests mean (services).
//!
//! ```text
//! asking side                                   serving side
//! request() -> Frame{id, request} ------------> Inbound -> a service's channel (try_send; full: BUSY)
//! Responses <- Inbox <- Frame{id, response} <-- Reply::send, one unit of credit each
//!           -- Frame{id, credit} -------------> as the caller consumes
//!           -- Frame{id, cancel} -------------> Reply::closed, when Responses is dropped
//!                     Frame{id, response, last} <-- Reply::finish (needs no credit)
//!                     Frame{id, failure} <-------- Reply::fail, or a Reply that was dropped
//! ```
//!
//! Invariants: a caller never holds more than [`CREDIT`] unread responses of a request; a peer has at most
//! [`OPEN_MAX`] requests open here and at most [`QUEUED_BYTES_PEER`] bytes of them waiting for a service; every open
//! request ends exactly once. A message costs no task and no stream of its own, and writes of one wake-up are coalesced.

pub(super) mod client;
mod frame;
pub(super) mod server;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use sundara_proto::cert::Roles;
use sundara_proto::id::{Hotkey, NodeId};
use sundara_proto::pb;
use sundara_proto::wire::WireError;
use tokio::sync::{Notify, Semaphore, mpsc};

/// Responses that may be under way to a caller that has not read them; part of the protocol, both sides count alike.
const CREDIT: u32 = 16;
/// Requests that one peer may have open here, and that this node may have open at one peer. A requester keeps a request
/// open for each of its jobs in flight.
const OPEN_MAX: usize = 16_384;
/// Bytes of one peer's requests that may wait for a service, so that no peer fills the queue for all.
const QUEUED_BYTES_PEER: usize = 16 << 20;
/// Bytes of all peers' requests that may wait for a service.
const QUEUED_BYTES_ALL: usize = 128 << 20;
/// Commands waiting for one stream.
const COMMANDS: usize = 1024;
/// Frames handled in one poll before other tasks get their turn.
const FRAMES_A_POLL: usize = 64;
/// Longest text of a failure that is sent or kept.
const DETAIL_MAX: usize = 512;

/// Who is on the other side of a certified connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub struct PeerIdentity {
    /// Its node.
    pub node: NodeId,
    /// Who answers for it.
    pub hotkey: Hotkey,
    /// What its certificate says that it does.
    pub roles: Roles,
}

/// Kinds of requests, for [`super::NetHandle::serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum RequestKind {
    /// A job for a validator.
    Submit,
    /// Events of a job after a reconnect.
    Watch,
    /// Stop a job.
    Cancel,
    /// A job for a miner or executor.
    Offer,
    /// All commitments are in.
    Reveal,
    /// Stop an attempt.
    Abandon,
    /// An executor introduces itself.
    Attach,
    /// Entries behind a batch.
    Page,
    /// Into a group.
    JoinGroup,
    /// A tensor for a round.
    RoundReady,
    /// How a member of a round gets on.
    RoundReport,
    /// What settled in a round.
    Transcript,
    /// A group of a chunk.
    Opening,
}

impl RequestKind {
    /// Number of kinds.
    pub(super) const COUNT: usize = 13;

    /// Kind of a request.
    pub fn of(request: &pb::request::Kind) -> Self {
        use pb::request::Kind as K;
        match request {
            K::Submit(_) => Self::Submit,
            K::Watch(_) => Self::Watch,
            K::Cancel(_) => Self::Cancel,
            K::Offer(_) => Self::Offer,
            K::Reveal(_) => Self::Reveal,
            K::Abandon(_) => Self::Abandon,
            K::Attach(_) => Self::Attach,
            K::Page(_) => Self::Page,
            K::JoinGroup(_) => Self::JoinGroup,
            K::RoundReady(_) => Self::RoundReady,
            K::RoundReport(_) => Self::RoundReport,
            K::Transcript(_) => Self::Transcript,
            K::Opening(_) => Self::Opening,
        }
    }
}

/// Why a peer refused a request.
pub use pb::rpc_failure::Code as FailureCode;

/// Why a request got no (more) answers.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RpcError {
    /// No connection, and none could be made.
    #[error("peer {node} is not reachable: {reason}")]
    Unreachable {
        /// The peer.
        node: NodeId,
        /// The last thing that failed.
        reason: String,
    },
    /// The connection ended while answers were due.
    #[error("connection to the peer ended before its answer: {reason}")]
    Disconnected {
        /// What ended it.
        reason: String,
    },
    /// The peer said no.
    #[error("peer refused the request ({code:?}): {detail}")]
    Refused {
        /// Kind of refusal.
        code: FailureCode,
        /// Its words.
        detail: String,
    },
    /// The peer finished without the answer that was asked for.
    #[error("peer answered with no response")]
    Empty,
    /// Our own request is too large.
    #[error(transparent)]
    TooLarge(#[from] WireError),
    /// Too many requests are open at this peer.
    #[error("{OPEN_MAX} requests are open at this peer: wait for some to finish")]
    TooMany,
    /// The node is shutting down.
    #[error("network is shut down")]
    Closed,
}

impl RpcError {
    /// Whether the same request may succeed later, or at another peer.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Disconnected { .. } | Self::TooMany => true,
            Self::Refused { code, .. } => matches!(code, FailureCode::Busy | FailureCode::Internal),
            Self::Empty | Self::TooLarge(_) | Self::Closed => false,
        }
    }
}

/// Result of sending on a [`Reply`]: the asking side is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the asking side wants no more responses")]
pub struct Gone;

/// What a caller has not read yet.
#[derive(Debug, Default)]
pub(super) struct Inbox(Mutex<InboxState>);

#[derive(Debug, Default)]
struct InboxState {
    queue: VecDeque<Result<pb::response::Kind, RpcError>>,
    waker: Option<Waker>,
    /// Nothing follows what is queued.
    done: bool,
    /// The caller is gone.
    dropped: bool,
}

/// What became of a pushed response.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pushed {
    Queued,
    CallerGone,
    /// More than the credit allows: the peer broke the protocol.
    Overflow,
}

impl Inbox {
    fn lock(&self) -> std::sync::MutexGuard<'_, InboxState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, item: Result<pb::response::Kind, RpcError>, last: bool) -> Pushed {
        let waker = {
            let mut state = self.lock();
            if state.dropped {
                return Pushed::CallerGone;
            }
            // The last one and failures need no credit.
            if state.queue.len() >= CREDIT as usize + usize::from(last) {
                return Pushed::Overflow;
            }
            state.done |= last;
            state.queue.push_back(item);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Pushed::Queued
    }

    /// Ends a request that nobody will answer any more.
    pub(super) fn fail(&self, error: RpcError) {
        let waker = {
            let mut state = self.lock();
            if state.done || state.dropped {
                return;
            }
            state.done = true;
            state.queue.push_back(Err(error));
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn finish_empty(&self) {
        let waker = {
            let mut state = self.lock();
            state.done = true;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The serving side of one request: credit, and whether the caller is still there.
#[derive(Debug)]
pub(super) struct Outbox {
    credit: Semaphore,
    closed: AtomicBool,
    on_close: Notify,
}

impl Outbox {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            credit: Semaphore::new(CREDIT as usize),
            closed: AtomicBool::new(false),
            on_close: Notify::new(),
        })
    }

    /// The caller has read `n` more. More than [`CREDIT`] is never held, whatever a peer says.
    pub(super) fn give(&self, n: u32) {
        let room = (CREDIT as usize).saturating_sub(self.credit.available_permits());
        self.credit.add_permits(room.min(n as usize));
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.credit.close();
        self.on_close.notify_waiters();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    async fn closed(&self) {
        loop {
            let closing = self.on_close.notified();
            if self.is_closed() {
                return;
            }
            closing.await;
        }
    }

    async fn take_credit(&self) -> Result<(), Gone> {
        self.credit.acquire().await.map_err(|_| Gone)?.forget();
        Ok(())
    }
}

/// Answers to a request, in order. Dropping it tells the peer to stop.
///
/// A [`futures::Stream`]; ends after the last response, or after one error.
#[derive(Debug)]
pub struct Responses {
    inbox: Arc<Inbox>,
    asked: Asked,
    /// Read since credit was last given back.
    unpaid: u32,
    ended: bool,
}

#[derive(Debug)]
enum Asked {
    Remote { id: u64, commands: mpsc::Sender<client::Command> },
    Local(Arc<Outbox>),
}

impl Responses {
    /// The next answer; `None` after the last. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<pb::response::Kind, RpcError>> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_read(cx)).await
    }

    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<pb::response::Kind, RpcError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let (item, done) = {
            let mut state = self.inbox.lock();
            match state.queue.pop_front() {
                Some(item) => (Some(item), state.done && state.queue.is_empty()),
                None if state.done => (None, true),
                None => {
                    if !state.waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                        state.waker = Some(cx.waker().clone());
                    }
                    return Poll::Pending;
                }
            }
        };
        self.ended = done;
        if !done {
            self.unpaid += 1;
            if self.unpaid >= CREDIT / 2 {
                self.pay();
            }
        }
        Poll::Ready(item)
    }

    fn pay(&mut self) {
        match &self.asked {
            Asked::Local(outbox) => outbox.give(std::mem::take(&mut self.unpaid)),
            // A full queue is tried again at the next read.
            Asked::Remote { id, commands } => {
                if commands.try_send(client::Command::Credit { id: *id, n: self.unpaid }).is_ok() {
                    self.unpaid = 0;
                }
            }
        }
    }
}

impl futures::Stream for Responses {
    type Item = Result<pb::response::Kind, RpcError>;
    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_read(cx)
    }
}

impl Drop for Responses {
    fn drop(&mut self) {
        self.inbox.lock().dropped = true;
        if self.ended {
            return;
        }
        match &self.asked {
            Asked::Local(outbox) => outbox.close(),
            // If the queue is full, the driver notices at the next response that nobody reads.
            Asked::Remote { id, commands } => drop(commands.try_send(client::Command::Cancel { id: *id })),
        }
    }
}

/// A request that a peer, or this node itself, has made.
#[derive(Debug)]
pub struct Inbound {
    /// Who asks.
    pub peer: PeerIdentity,
    /// What.
    pub request: pb::request::Kind,
    /// Where the answers go.
    pub reply: Reply,
    /// Released when a service has taken the request.
    queued: Option<QueuedBytes>,
}

impl Inbound {
    /// Takes the request apart and gives its place in the queue back.
    pub fn into_parts(self) -> (PeerIdentity, pb::request::Kind, Reply) {
        drop(self.queued);
        (self.peer, self.request, self.reply)
    }
}

/// Bytes that wait for a service, counted down when dropped.
#[derive(Debug)]
struct QueuedBytes {
    len: usize,
    peer: Arc<AtomicUsize>,
    all: Arc<AtomicUsize>,
}

impl QueuedBytes {
    fn take(len: usize, peer: &Arc<AtomicUsize>, all: &Arc<AtomicUsize>) -> Option<Self> {
        let queued = Self { len, peer: peer.clone(), all: all.clone() };
        let before = (peer.fetch_add(len, Ordering::Relaxed), all.fetch_add(len, Ordering::Relaxed));
        // When it does not fit, dropping `queued` takes the bytes back.
        (before.0 + len <= QUEUED_BYTES_PEER && before.1 + len <= QUEUED_BYTES_ALL).then_some(queued)
    }
}

impl Drop for QueuedBytes {
    fn drop(&mut self) {
        self.peer.fetch_sub(self.len, Ordering::Relaxed);
        self.all.fetch_sub(self.len, Ordering::Relaxed);
    }
}

/// Where the answers to one request go. Dropping it without [`Reply::finish`] or [`Reply::fail`] tells the caller that
/// the server broke.
#[derive(Debug)]
pub struct Reply {
    outbox: Arc<Outbox>,
    to: Option<ReplyTo>,
}

#[derive(Debug)]
enum ReplyTo {
    Remote { id: u64, link: server::ReplyLink },
    Local(Arc<Inbox>),
}

impl Reply {
    /// Sends one of several answers; waits while the caller lags. Cancel-safe: a cancelled send sent nothing.
    pub async fn send(&mut self, response: pb::response::Kind) -> Result<(), Gone> {
        self.outbox.take_credit().await?;
        match &self.to {
            Some(ReplyTo::Local(inbox)) => match inbox.push(Ok(response), false) {
                Pushed::Queued => Ok(()),
                Pushed::CallerGone | Pushed::Overflow => Err(Gone),
            },
            Some(ReplyTo::Remote { id, link }) => link.respond(*id, response, false).await,
            None => Err(Gone),
        }
    }

    /// Sends the last answer.
    pub async fn finish(mut self, response: pb::response::Kind) -> Result<(), Gone> {
        match self.to.take() {
            Some(ReplyTo::Local(inbox)) => match inbox.push(Ok(response), true) {
                Pushed::Queued => Ok(()),
                Pushed::CallerGone | Pushed::Overflow => Err(Gone),
            },
            Some(ReplyTo::Remote { id, link }) => link.respond(id, response, true).await,
            None => Err(Gone),
        }
    }

    /// Ends the request without an answer.
    pub fn fail(mut self, code: FailureCode, detail: impl Into<String>) {
        self.end(code, detail.into());
    }

    /// Completes when the caller is gone, cancelled or disconnected. Cancel-safe.
    pub async fn closed(&self) {
        self.outbox.closed().await;
    }

    /// Whether the caller is gone.
    pub fn is_closed(&self) -> bool {
        self.outbox.is_closed()
    }

    fn end(&mut self, code: FailureCode, mut detail: String) {
        truncate(&mut detail);
        match self.to.take() {
            Some(ReplyTo::Local(inbox)) => inbox.fail(RpcError::Refused { code, detail }),
            Some(ReplyTo::Remote { id, link }) => link.fail(id, code, detail),
            None => {}
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.to.is_some() {
            self.end(FailureCode::Internal, "the service dropped the request".to_owned());
        }
    }
}

/// Cuts a text to [`DETAIL_MAX`] bytes at a character.
pub(super) fn truncate(text: &mut String) {
    if text.len() > DETAIL_MAX {
        let end = (0..=DETAIL_MAX).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text.truncate(end);
    }
}

/// A request of this node to itself: the same two ends without a stream.
pub(super) fn local(peer: PeerIdentity, request: pb::request::Kind) -> (Responses, Inbound) {
    let (inbox, outbox) = (Arc::new(Inbox::default()), Outbox::new());
    let reply = Reply { outbox: outbox.clone(), to: Some(ReplyTo::Local(inbox.clone())) };
    let responses = Responses { inbox, asked: Asked::Local(outbox), unpaid: 0, ended: false };
    (responses, Inbound { peer, request, reply, queued: None })
}
