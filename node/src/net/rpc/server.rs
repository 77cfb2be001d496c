//! The serving side of one stream: hands requests to services, sends their answers.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll};

use futures::{AsyncRead, AsyncWrite};
use prost::Message as _;
use sundara_proto::pb;
use sundara_proto::wire::{self, limit};
use tokio::sync::{Notify, mpsc};

use super::frame::{Framed, LinkError};
use super::{
    COMMANDS, FRAMES_A_POLL, FailureCode, Gone, Inbound, OPEN_MAX, Outbox, PeerIdentity, QueuedBytes, Reply, ReplyTo,
    RequestKind, truncate,
};
use crate::net::metrics::NetMetrics;

/// Which service takes which kind of request. Services change rarely, requests come all the time.
#[derive(Debug)]
pub(crate) struct Services {
    channels: RwLock<[Option<mpsc::Sender<Inbound>>; RequestKind::COUNT]>,
    queued: Arc<AtomicUsize>,
    unsent: Arc<Unsent>,
    metrics: NetMetrics,
}

/// Answers of all streams that are not handed to the network yet.
#[derive(Debug, Default)]
pub(crate) struct Unsent {
    count: AtomicUsize,
    none: Notify,
}

impl Unsent {
    fn one(self: &Arc<Self>) -> OneUnsent {
        self.count.fetch_add(1, Ordering::AcqRel);
        OneUnsent(self.clone())
    }

    /// Waits until there is none. Cancel safe.
    pub(crate) async fn none(&self) {
        loop {
            let mut changed = std::pin::pin!(self.none.notified());
            // Registered before the look, or a change in between would be missed.
            changed.as_mut().enable();
            if self.count.load(Ordering::Acquire) == 0 {
                return;
            }
            changed.await;
        }
    }
}

/// One of them, until it is dropped.
#[derive(Debug)]
struct OneUnsent(Arc<Unsent>);

impl Drop for OneUnsent {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.none.notify_waiters();
        }
    }
}

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Delivered {
    Taken,
    Refused(FailureCode, &'static str),
}

impl Services {
    pub(crate) fn new(metrics: NetMetrics) -> Self {
        Self { channels: RwLock::default(), queued: Arc::default(), unsent: Arc::default(), metrics }
    }

    /// Answers that are on their way out.
    pub(crate) fn unsent(&self) -> &Arc<Unsent> {
        &self.unsent
    }

    /// Sets the receiver of `kinds`; an earlier one gets no more.
    pub(crate) fn set(&self, kinds: &[RequestKind], sender: &mpsc::Sender<Inbound>) {
        let mut channels = self.channels.write().unwrap_or_else(PoisonError::into_inner);
        for kind in kinds {
            channels[*kind as usize] = Some(sender.clone());
        }
    }

    /// Hands a request over without waiting. A request that is not taken is failed by its reply.
    pub(crate) fn deliver(&self, inbound: Inbound) -> Delivered {
        let kind = RequestKind::of(&inbound.request);
        let sender = self.channels.read().unwrap_or_else(PoisonError::into_inner)[kind as usize].clone();
        #[allow(clippy::result_large_err)] // The request comes back to be refused.
        let (code, detail, inbound) = match sender.map(|sender| sender.try_send(inbound)) {
            Some(Ok(())) => {
                self.metrics.rpc_requests_in.inc();
                return Delivered::Taken;
            }
            Some(Err(mpsc::error::TrySendError::Full(inbound))) => {
                (FailureCode::Busy, "the service's queue is full: try later", inbound)
            }
            Some(Err(mpsc::error::TrySendError::Closed(inbound))) => {
                (FailureCode::NotServed, "the service has stopped", inbound)
            }
            None => return Delivered::Refused(FailureCode::NotServed, NOT_SERVED),
        };
        self.metrics.rpc_refused.inc();
        inbound.reply.fail(code, detail);
        Delivered::Refused(code, detail)
    }

    /// Whether anybody takes this kind.
    fn serves(&self, kind: RequestKind) -> bool {
        self.channels.read().unwrap_or_else(PoisonError::into_inner)[kind as usize].is_some()
    }
}

const NOT_SERVED: &str = "this node does not serve such requests: its roles are in its certificate";

#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // Boxing would cost an allocation a message.
enum Command {
    Response { id: u64, response: pb::Response, last: bool, unsent: OneUnsent },
    Failure { id: u64, code: FailureCode, detail: String },
    Wake,
}

/// Sends answers over one stream. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct ReplyLink {
    commands: mpsc::Sender<Command>,
    unsent: Arc<Unsent>,
    /// Requests whose failure found the queue full; at most [`OPEN_MAX`], and the driver looks at every poll, of which
    /// there is at least one more while the queue is full.
    failed: Arc<Mutex<Vec<u64>>>,
}

impl ReplyLink {
    pub(crate) async fn respond(&self, id: u64, kind: pb::response::Kind, last: bool) -> Result<(), Gone> {
        let response = pb::Response { kind: Some(kind) };
        if response.encoded_len() + FRAME_OVERHEAD > limit::RPC_FRAME {
            // Our own mistake: the caller is told rather than left waiting.
            self.fail(id, FailureCode::Internal, "the answer exceeds the frame limit".to_owned());
            return Err(Gone);
        }
        let unsent = self.unsent.one();
        self.commands.send(Command::Response { id, response, last, unsent }).await.map_err(|_| Gone)
    }

    pub(crate) fn fail(&self, id: u64, code: FailureCode, detail: String) {
        let command = Command::Failure { id, code, detail };
        if let Err(mpsc::error::TrySendError::Full(_)) = self.commands.try_send(command) {
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).push(id);
            // The driver may have emptied the queue in between: then this wakes it.
            drop(self.commands.try_send(Command::Wake));
        }
    }
}

/// Bytes of a frame around its response.
const FRAME_OVERHEAD: usize = 32;

/// Drives the serving side; ends with the reason for which the stream ended.
pub(crate) struct ServerDriver<S> {
    framed: Framed<S>,
    peer: PeerIdentity,
    services: Arc<Services>,
    link: ReplyLink,
    queue: mpsc::Receiver<Command>,
    calls: HashMap<u64, Arc<Outbox>>,
    queued: Arc<AtomicUsize>,
    /// Answers in the write buffer.
    unsent: Vec<OneUnsent>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ServerDriver<S> {
    /// `queued` counts the bytes of this peer that wait for a service, over all of its streams.
    pub(crate) fn new(stream: S, peer: PeerIdentity, services: Arc<Services>, queued: Arc<AtomicUsize>) -> Self {
        let (commands, queue) = mpsc::channel(COMMANDS);
        let unsent = services.unsent.clone();
        Self {
            framed: Framed::new(stream, limit::RPC_REQUEST + FRAME_OVERHEAD),
            peer,
            services,
            link: ReplyLink { commands, unsent, failed: Arc::default() },
            queue,
            calls: HashMap::new(),
            queued,
            unsent: Vec::new(),
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Response { id, response, last, unsent } => {
                // A request that was cancelled meanwhile gets nothing more.
                let open = if last { self.close_call(id) } else { self.calls.contains_key(&id) };
                if open {
                    self.framed.push(&pb::Frame { id, last, body: Some(pb::frame::Body::Response(response)) });
                    self.unsent.push(unsent);
                }
            }
            Command::Failure { id, code, detail } => {
                if self.close_call(id) {
                    self.push_failure(id, code, detail);
                }
            }
            Command::Wake => {}
        }
    }

    fn close_call(&mut self, id: u64) -> bool {
        self.calls.remove(&id).inspect(|outbox| outbox.close()).is_some()
    }

    fn push_failure(&mut self, id: u64, code: FailureCode, mut detail: String) {
        truncate(&mut detail);
        let failure = pb::RpcFailure { code: code.into(), detail };
        self.framed.push(&pb::Frame { id, last: true, body: Some(pb::frame::Body::Failure(failure)) });
    }

    fn on_frame(&mut self, frame: pb::Frame, len: usize) -> Result<(), LinkError> {
        use pb::frame::Body;
        match frame.body {
            Some(Body::Request(pb::Request { kind: Some(kind) })) => self.on_request(frame.id, kind, len),
            Some(Body::Request(pb::Request { kind: None })) => {
                // A kind that a newer version has: said, not punished.
                self.push_failure(frame.id, FailureCode::NotServed, "unknown kind of request".to_owned());
                Ok(())
            }
            Some(Body::Credit(n)) => {
                if let Some(outbox) = self.calls.get(&frame.id) {
                    outbox.give(n);
                }
                Ok(())
            }
            Some(Body::Cancel(_)) => {
                self.close_call(frame.id);
                Ok(())
            }
            Some(Body::Response(_) | Body::Failure(_)) => {
                Err(LinkError::Protocol("an answer on the stream of requests"))
            }
            None => Err(LinkError::Protocol("a frame of no known kind")),
        }
    }

    fn on_request(&mut self, id: u64, request: pb::request::Kind, len: usize) -> Result<(), LinkError> {
        if self.calls.len() >= OPEN_MAX {
            self.push_failure(id, FailureCode::Busy, format!("{OPEN_MAX} requests are open: wait for some to finish"));
            return Ok(());
        }
        if !self.services.serves(RequestKind::of(&request)) {
            self.push_failure(id, FailureCode::NotServed, NOT_SERVED.to_owned());
            return Ok(());
        }
        let Some(queued) = QueuedBytes::take(len, &self.queued, &self.services.queued) else {
            self.push_failure(id, FailureCode::Busy, "too many bytes wait to be served: try later".to_owned());
            return Ok(());
        };
        let outbox = Outbox::new();
        match self.calls.entry(id) {
            Entry::Occupied(_) => return Err(LinkError::Protocol("an id that is in use")),
            Entry::Vacant(entry) => entry.insert(outbox.clone()),
        };
        let reply = Reply { outbox, to: Some(ReplyTo::Remote { id, link: self.link.clone() }) };
        self.services.deliver(Inbound { peer: self.peer, request, reply, queued: Some(queued) });
        Ok(())
    }

    fn send_late_failures(&mut self) {
        let failed = std::mem::take(&mut *self.link.failed.lock().unwrap_or_else(PoisonError::into_inner));
        for id in failed {
            if self.close_call(id) {
                self.push_failure(id, FailureCode::Internal, "the service gave up".to_owned());
            }
        }
    }

    fn poll_link(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        let mut handled = 0;
        loop {
            while self.framed.has_room() {
                match self.queue.poll_recv(cx) {
                    Poll::Ready(Some(command)) => self.on_command(command),
                    Poll::Ready(None) | Poll::Pending => break,
                }
            }
            self.send_late_failures();
            let full = !self.framed.has_room();
            let written = self.framed.poll_write(cx)?.is_ready();
            if written {
                self.unsent.clear();
            }
            // While the peer does not read its answers, its requests wait too: failures would grow the buffer.
            if !self.framed.has_room() {
                break;
            }
            match self.framed.poll_frame(cx)? {
                Poll::Ready(Some(body)) => {
                    let len = body.len();
                    self.on_frame(wire::decode_raw(body, limit::RPC_FRAME)?, len)?;
                    handled += 1;
                }
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                // Room has just been made for commands that nobody would wake us for.
                Poll::Pending if written && full => {}
                Poll::Pending => break,
            }
            if handled >= FRAMES_A_POLL {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        self.framed.poll_stalled(cx).map(Err)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Future for ServerDriver<S> {
    type Output = Result<(), LinkError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_link(cx)
    }
}

impl<S> Drop for ServerDriver<S> {
    fn drop(&mut self) {
        self.queue.close();
        for (_, outbox) in self.calls.drain() {
            outbox.close();
        }
    }
}
