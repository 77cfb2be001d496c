//! The asking side of one stream: sends requests, hands answers to their callers.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures::{AsyncRead, AsyncWrite};
use prost::Message as _;
use sundara_proto::pb;
use sundara_proto::wire::{self, WireError, limit};
use tokio::sync::mpsc;

use super::frame::{Framed, LinkError};
use super::{Asked, COMMANDS, FRAMES_A_POLL, Inbox, OPEN_MAX, Pushed, Responses, RpcError, truncate};

/// What a caller wants of the stream.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // Most are the large one, and it moves once.
pub(crate) enum Command {
    Open { id: u64, request: pb::Request, inbox: Arc<Inbox> },
    Credit { id: u64, n: u32 },
    Cancel { id: u64 },
}

/// Sends requests over one stream. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct ClientLink {
    commands: mpsc::Sender<Command>,
    ids: Arc<AtomicU64>,
    open: Arc<AtomicUsize>,
}

impl ClientLink {
    /// A link and the future that drives it over `stream`.
    pub(crate) fn new<S: AsyncRead + AsyncWrite + Unpin>(stream: S) -> (Self, ClientDriver<S>) {
        let (commands, queue) = mpsc::channel(COMMANDS);
        let open = Arc::new(AtomicUsize::new(0));
        let driver = ClientDriver {
            framed: Framed::new(stream, limit::RPC_FRAME),
            queue,
            closing: false,
            calls: HashMap::new(),
            open: open.clone(),
        };
        (Self { commands, ids: Arc::new(AtomicU64::new(1)), open }, driver)
    }

    /// Whether the stream has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.commands.is_closed()
    }

    /// Opens a request. `Err` gives the request back when the stream has ended.
    pub(crate) async fn open(&self, kind: pb::request::Kind) -> Result<Result<Responses, RpcError>, pb::request::Kind> {
        let request = pb::Request { kind: Some(kind) };
        let len = request.encoded_len();
        if len > limit::RPC_REQUEST {
            return Ok(Err(WireError::TooLarge { len, max: limit::RPC_REQUEST }.into()));
        }
        if self.open.load(Ordering::Relaxed) >= OPEN_MAX {
            return Ok(Err(RpcError::TooMany));
        }
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let inbox = Arc::new(Inbox::default());
        match self.commands.send(Command::Open { id, request, inbox: inbox.clone() }).await {
            Ok(()) => {
                let asked = Asked::Remote { id, commands: self.commands.clone() };
                Ok(Ok(Responses { inbox, asked, unpaid: 0, ended: false }))
            }
            Err(mpsc::error::SendError(Command::Open { request: pb::Request { kind: Some(kind) }, .. })) => Err(kind),
            Err(_) => Ok(Err(RpcError::Closed)),
        }
    }
}

/// Drives the asking side; ends with the reason for which the stream ended.
pub(crate) struct ClientDriver<S> {
    framed: Framed<S>,
    queue: mpsc::Receiver<Command>,
    closing: bool,
    calls: HashMap<u64, Arc<Inbox>>,
    open: Arc<AtomicUsize>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ClientDriver<S> {
    fn on_command(&mut self, command: Command) {
        use pb::frame::Body;
        match command {
            Command::Open { id, request, inbox } => {
                self.calls.insert(id, inbox);
                self.framed.push(&pb::Frame { id, last: false, body: Some(Body::Request(request)) });
            }
            Command::Credit { id, n } => {
                if self.calls.contains_key(&id) {
                    self.framed.push(&pb::Frame { id, last: false, body: Some(Body::Credit(n)) });
                }
            }
            Command::Cancel { id } => {
                if self.calls.remove(&id).is_some() {
                    self.framed.push(&pb::Frame { id, last: false, body: Some(Body::Cancel(true)) });
                }
            }
        }
        self.open.store(self.calls.len(), Ordering::Relaxed);
    }

    fn on_frame(&mut self, frame: pb::Frame) -> Result<(), LinkError> {
        use pb::frame::Body;
        match frame.body {
            Some(Body::Response(pb::Response { kind })) => self.on_response(frame.id, kind, frame.last),
            Some(Body::Failure(failure)) => {
                if let Some(inbox) = self.calls.remove(&frame.id) {
                    let mut detail: String = failure.detail.chars().filter(|c| !c.is_control()).collect();
                    truncate(&mut detail);
                    inbox.fail(RpcError::Refused { code: failure.code(), detail });
                }
                self.open.store(self.calls.len(), Ordering::Relaxed);
                Ok(())
            }
            Some(Body::Request(_) | Body::Cancel(_) | Body::Credit(_)) => {
                Err(LinkError::Protocol("a request on the stream of answers"))
            }
            None => Err(LinkError::Protocol("a frame of no known kind")),
        }
    }

    fn on_response(&mut self, id: u64, kind: Option<pb::response::Kind>, last: bool) -> Result<(), LinkError> {
        // Answers to a request that was cancelled meanwhile are still under way: not a fault.
        let Some(inbox) = self.calls.get(&id) else { return Ok(()) };
        match kind {
            Some(kind) => match inbox.push(Ok(kind), last) {
                Pushed::Queued => {}
                Pushed::CallerGone if last => {}
                Pushed::CallerGone => {
                    self.on_command(Command::Cancel { id });
                    return Ok(());
                }
                Pushed::Overflow => return Err(LinkError::Protocol("more answers than were asked for")),
            },
            None if last => inbox.finish_empty(),
            None => return Err(LinkError::Protocol("an empty answer")),
        }
        if last {
            self.calls.remove(&id);
            self.open.store(self.calls.len(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn poll_link(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        let mut handled = 0;
        loop {
            while self.framed.has_room() && !self.closing {
                match self.queue.poll_recv(cx) {
                    Poll::Ready(Some(command)) => self.on_command(command),
                    Poll::Ready(None) => self.closing = true,
                    Poll::Pending => break,
                }
            }
            let full = !self.framed.has_room();
            let written = self.framed.poll_write(cx)?.is_ready();
            if self.closing && written && self.calls.is_empty() {
                return Poll::Ready(Ok(()));
            }
            match self.framed.poll_frame(cx)? {
                Poll::Ready(Some(body)) => {
                    self.on_frame(wire::decode_raw(body, limit::RPC_FRAME)?)?;
                    handled += 1;
                }
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                // A full buffer that has just been written makes room for commands that nobody would wake us for.
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

impl<S: AsyncRead + AsyncWrite + Unpin> Future for ClientDriver<S> {
    type Output = Result<(), LinkError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let ended = std::task::ready!(this.poll_link(cx));
        let reason = match &ended {
            Ok(()) => "the stream was closed".to_owned(),
            Err(error) => error.to_string(),
        };
        this.queue.close();
        while let Ok(command) = this.queue.try_recv() {
            if let Command::Open { inbox, .. } = command {
                inbox.fail(RpcError::Disconnected { reason: reason.clone() });
            }
        }
        for (_, inbox) in this.calls.drain() {
            inbox.fail(RpcError::Disconnected { reason: reason.clone() });
        }
        this.open.store(0, Ordering::Relaxed);
        Poll::Ready(ended)
    }
}

impl<S> Drop for ClientDriver<S> {
    /// A driver that is dropped (shutdown) leaves no caller waiting.
    fn drop(&mut self) {
        self.queue.close();
        while let Ok(command) = self.queue.try_recv() {
            if let Command::Open { inbox, .. } = command {
                inbox.fail(RpcError::Closed);
            }
        }
        for (_, inbox) in self.calls.drain() {
            inbox.fail(RpcError::Closed);
        }
    }
}
