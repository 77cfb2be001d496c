//! Frames over one stream: reads them whole, coalesces writes, and names a peer that stalls.
//!
//! Invariants: a length prefix above the limit ends the stream before anything is allocated for it; a frame that has begun
//! must end within [`FRAME_TIMEOUT`]; bytes to send must move within [`WRITE_TIMEOUT`].

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{AsyncRead, AsyncWrite};
use prost::Message;
use sundara_proto::wire::{self, PREFIX_LEN, WireError};
use tokio::time::{Instant, Sleep};

/// A frame that has begun must be complete after this: 1 MiB at 100 KB/s takes 10 s. Cuts slow-loris senders.
pub(crate) const FRAME_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes waiting to go out must move within this, or the peer does not read.
pub(crate) const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Read buffer: a few dozen small frames a read. Grows to one large frame and shrinks again.
const READ_BUFFER: usize = 16 << 10;
/// Above this the read buffer is given back once it is empty.
const READ_BUFFER_KEEP: usize = 64 << 10;
/// Write buffer above which no more is taken from the queue.
pub(crate) const OUT_HIGH: usize = 256 << 10;
/// Write buffers above this are given back once they are empty.
const OUT_KEEP: usize = 64 << 10;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The stream itself.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What the peer sent.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer broke a rule of the protocol.
    #[error("peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// The peer does not send or take bytes that it owes.
    #[error("peer stalled: {0}")]
    Stalled(&'static str),
}

/// One stream with its buffers.
pub(crate) struct Framed<S> {
    stream: S,
    max_in: usize,
    data: Vec<u8>,
    start: usize,
    end: usize,
    out: BytesMut,
    dirty: bool,
    partial_since: Option<Instant>,
    stuck_since: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Framed<S> {
    /// Frames longer than `max_in` bytes end the stream.
    pub(crate) fn new(stream: S, max_in: usize) -> Self {
        Self {
            stream,
            max_in,
            data: Vec::new(),
            start: 0,
            end: 0,
            out: BytesMut::new(),
            dirty: false,
            partial_since: None,
            stuck_since: None,
            timer: None,
        }
    }

    /// Whether more may be queued.
    pub(crate) fn has_room(&self) -> bool {
        self.out.len() < OUT_HIGH
    }

    /// Queues a message; [`Framed::poll_write`] sends it.
    pub(crate) fn push<M: Message>(&mut self, message: &M) {
        let len = message.encoded_len();
        self.out.reserve(PREFIX_LEN + len);
        // Senders check the length against the frame limit, which fits 32 bits.
        self.out.put_u32_le(u32::try_from(len).unwrap_or(u32::MAX));
        if let Err(error) = message.encode(&mut self.out) {
            debug_assert!(false, "space was reserved: {error}");
        }
    }

    /// Writes and flushes what is queued. `Ready` when nothing is left.
    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        while !self.out.is_empty() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.out) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into())),
                Poll::Ready(Ok(n)) => {
                    self.out.advance(n);
                    self.dirty = true;
                    self.stuck_since = None;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Pending => {
                    self.stuck_since.get_or_insert_with(Instant::now);
                    return Poll::Pending;
                }
            }
        }
        if self.out.capacity() > OUT_KEEP {
            self.out = BytesMut::new();
        }
        if self.dirty {
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.dirty = false,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Pending => {
                    self.stuck_since.get_or_insert_with(Instant::now);
                    return Poll::Pending;
                }
            }
        }
        self.stuck_since = None;
        Poll::Ready(Ok(()))
    }

    /// The next frame's body; `None` when the peer has closed its side between frames.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, LinkError>> {
        loop {
            if let Some(frame) = self.take_frame()? {
                self.partial_since = None;
                return Poll::Ready(Ok(Some(frame)));
            }
            match Pin::new(&mut self.stream).poll_read(cx, &mut self.data[self.end..]) {
                Poll::Ready(Ok(0)) if self.start == self.end => return Poll::Ready(Ok(None)),
                Poll::Ready(Ok(0)) => {
                    return Poll::Ready(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()));
                }
                Poll::Ready(Ok(n)) => self.end += n,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Pending => {
                    if self.start < self.end {
                        self.partial_since.get_or_insert_with(Instant::now);
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// A whole frame from the buffer, or room made for the rest of one.
    fn take_frame(&mut self) -> Result<Option<Bytes>, LinkError> {
        let have = &self.data[self.start..self.end];
        let mut need = PREFIX_LEN;
        if let Some(prefix) = have.first_chunk::<PREFIX_LEN>() {
            let len = wire::frame_len(*prefix, self.max_in)?;
            need = PREFIX_LEN + len;
            if let Some(frame) = have.get(PREFIX_LEN..need) {
                let frame = Bytes::copy_from_slice(frame);
                self.start += need;
                if self.start == self.end {
                    (self.start, self.end) = (0, 0);
                    if self.data.len() > READ_BUFFER_KEEP {
                        self.data = Vec::new();
                    }
                }
                return Ok(Some(frame));
            }
        }
        if self.start > 0 && (self.data.len() - self.start < need || self.end == self.data.len()) {
            self.data.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let want = need.max(READ_BUFFER);
        if self.data.len() < want {
            self.data.resize(want, 0);
        }
        Ok(None)
    }

    /// `Ready` when the peer stalls. Poll last, after reads and writes have registered what they wait for.
    pub(crate) fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<LinkError> {
        let partial = self.partial_since.map(|since| (since + FRAME_TIMEOUT, "a frame that it began did not end"));
        let stuck = self.stuck_since.map(|since| (since + WRITE_TIMEOUT, "it does not read what it is sent"));
        let Some((deadline, why)) = [partial, stuck].into_iter().flatten().min_by_key(|(at, _)| *at) else {
            return Poll::Pending;
        };
        if Instant::now() >= deadline {
            return Poll::Ready(LinkError::Stalled(why));
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        // A timer set for an earlier stall fires early and is set again; it is never moved later on the fast path.
        if timer.deadline() > deadline || timer.is_elapsed() {
            timer.as_mut().reset(deadline);
        }
        while timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= deadline {
                return Poll::Ready(LinkError::Stalled(why));
            }
            timer.as_mut().reset(deadline);
        }
        Poll::Pending
    }
}
