//! Bulk streams between certified peers: blobs, and the tensors of map-reduce rounds. What is said on them is their
//! services' business.
//!
//! Invariants: a peer has at most [`Bulk::per_peer`] of a kind open here, all peers at most [`Bulk::all`]; a blob stream
//! on which nothing moves for [`IDLE_TIMEOUT`] while somebody waits for it ends with an error of kind `TimedOut`. A round
//! stream may rest between rounds; its rounds have deadlines of their own.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{AsyncRead as _, AsyncWrite as _};
use sundara_proto::crypto::Network;
use sundara_proto::id::NodeId;
use sundara_proto::names;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::time::{Instant, Sleep};

/// What a bulk stream carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Bulk {
    /// Ranges of blobs.
    Blob,
    /// Map-reduce rounds.
    Round,
}

impl Bulk {
    /// Every kind.
    pub(super) const ALL: [Self; 2] = [Self::Blob, Self::Round];

    /// Its protocol.
    pub(super) fn protocol(self, network: &Network, version: u32) -> String {
        match self {
            Self::Blob => names::blob_protocol(network, version),
            Self::Round => names::round_protocol(network, version),
        }
    }

    /// Streams that one peer may have open here.
    pub(super) const fn per_peer(self) -> usize {
        match self {
            Self::Blob => STREAMS_PER_PEER,
            Self::Round => ROUND_STREAMS_PER_PEER,
        }
    }

    /// Streams that all peers may have open here.
    pub(super) const fn all(self) -> usize {
        match self {
            Self::Blob => STREAMS_MAX,
            Self::Round => ROUND_STREAMS_MAX,
        }
    }

    const fn idle(self) -> Option<Duration> {
        match self {
            Self::Blob => Some(IDLE_TIMEOUT),
            Self::Round => None,
        }
    }
}

/// Streams open now, by kind.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    blob: Arc<AtomicUsize>,
    round: Arc<AtomicUsize>,
}

impl Counts {
    pub(super) fn of(&self, kind: Bulk) -> &Arc<AtomicUsize> {
        match kind {
            Bulk::Blob => &self.blob,
            Bulk::Round => &self.round,
        }
    }

    /// Of every kind.
    pub(super) fn total(&self) -> usize {
        self.blob.load(Ordering::Relaxed) + self.round.load(Ordering::Relaxed)
    }
}

/// Round streams that one peer may have open here: two for each of 16 groups at once, both ways.
const ROUND_STREAMS_PER_PEER: usize = 64;
/// Round streams that all peers may have open here.
const ROUND_STREAMS_MAX: usize = 1024;
/// Blob streams that one peer may have open here.
pub const STREAMS_PER_PEER: usize = 16;
/// Blob streams that all peers may have open here.
pub(super) const STREAMS_MAX: usize = 256;
/// Inbound streams waiting for the transfer service.
pub(super) const ACCEPT_QUEUE: usize = 64;
/// Nothing moved for so long: the other side is gone, or means to keep us busy.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections to one peer over which bulk streams are spread: a second one nearly doubles what two cores carry.
pub(super) const CONNECTIONS: usize = 2;
/// Buffer of a stream to oneself.
const LOCAL_BUFFER: usize = 256 << 10;

/// Why no stream was opened.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BulkError {
    /// No connection, and none could be made.
    #[error("peer {node} is not reachable: {reason}")]
    Unreachable {
        /// The peer.
        node: NodeId,
        /// The last thing that failed.
        reason: String,
    },
    /// Nobody serves blobs on this node.
    #[error("this node serves no blobs")]
    NotServed,
    /// The node is shutting down.
    #[error("network is shut down")]
    Closed,
}

/// One open stream of a peer, counted until it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    peer: Arc<AtomicUsize>,
    all: Arc<AtomicUsize>,
}

impl Slot {
    /// A place for one more stream; `None` when peer or node has its fill.
    pub(super) fn take(kind: Bulk, peer: &Counts, all: &Counts) -> Option<Self> {
        let slot = Self { peer: peer.of(kind).clone(), all: all.of(kind).clone() };
        let before = (slot.peer.fetch_add(1, Ordering::Relaxed), slot.all.fetch_add(1, Ordering::Relaxed));
        // When it does not fit, dropping `slot` takes the place back.
        (before.0 < kind.per_peer() && before.1 < kind.all()).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.peer.fetch_sub(1, Ordering::Relaxed);
        self.all.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
enum Transport {
    Mesh(libp2p::swarm::Stream),
    Local(DuplexStream),
}

/// A byte stream to a peer: tokio's `AsyncRead` and `AsyncWrite`. Close the writing half with `shutdown`.
///
/// Buffers of 64 KiB and more carry twice what 4 KiB do.
#[derive(Debug)]
pub struct BulkStream {
    transport: Transport,
    /// `None`: it may rest.
    idle: Option<(Duration, Pin<Box<Sleep>>)>,
    /// Since when somebody waits for the stream and nothing moves.
    waiting: Option<Instant>,
    _slot: Option<Slot>,
}

impl BulkStream {
    pub(super) fn mesh(kind: Bulk, stream: libp2p::swarm::Stream, slot: Option<Slot>) -> Self {
        Self::new(kind, Transport::Mesh(stream), slot)
    }

    /// The two ends of a stream to oneself.
    pub(super) fn local(kind: Bulk) -> (Self, Self) {
        let (a, b) = tokio::io::duplex(LOCAL_BUFFER);
        (Self::new(kind, Transport::Local(a), None), Self::new(kind, Transport::Local(b), None))
    }

    fn new(kind: Bulk, transport: Transport, slot: Option<Slot>) -> Self {
        let idle = kind.idle().map(|limit| (limit, Box::pin(tokio::time::sleep(limit))));
        Self { transport, idle, waiting: None, _slot: slot }
    }

    /// Notes progress, or ends what has waited too long. The timer is moved only when it fires.
    fn progress<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.waiting = None;
            return polled;
        }
        let Some((limit, idle)) = &mut self.idle else { return Poll::Pending };
        let deadline = *self.waiting.get_or_insert_with(Instant::now) + *limit;
        while idle.as_mut().poll(cx).is_ready() {
            if Instant::now() >= deadline {
                let text = format!("nothing moved on the stream for {} s", limit.as_secs());
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, text)));
            }
            idle.as_mut().reset(deadline);
        }
        Poll::Pending
    }
}

impl AsyncRead for BulkStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = match &mut self.transport {
            Transport::Local(stream) => Pin::new(stream).poll_read(cx, buf),
            Transport::Mesh(stream) => {
                Pin::new(stream).poll_read(cx, buf.initialize_unfilled()).map_ok(|n| buf.advance(n))
            }
        };
        self.progress(cx, polled)
    }
}

impl AsyncWrite for BulkStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = match &mut self.transport {
            Transport::Local(stream) => Pin::new(stream).poll_write(cx, buf),
            Transport::Mesh(stream) => Pin::new(stream).poll_write(cx, buf),
        };
        self.progress(cx, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = match &mut self.transport {
            Transport::Local(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Mesh(stream) => Pin::new(stream).poll_flush(cx),
        };
        self.progress(cx, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = match &mut self.transport {
            Transport::Local(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Mesh(stream) => Pin::new(stream).poll_close(cx),
        };
        self.progress(cx, polled)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_on_which_nothing_moves_ends_and_a_slow_one_does_not() {
        let (mut ours, mut theirs) = BulkStream::local(Bulk::Blob);
        let mut byte = [0];
        for _ in 0..5 {
            tokio::time::sleep(IDLE_TIMEOUT * 9 / 10).await;
            theirs.write_all(&[1]).await.unwrap();
            ours.read_exact(&mut byte).await.unwrap();
        }
        let began = Instant::now();
        let error = ours.read_exact(&mut byte).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= IDLE_TIMEOUT && began.elapsed() < IDLE_TIMEOUT * 2);
    }

    #[test]
    fn streams_of_a_peer_are_counted_until_they_are_dropped() {
        let (peer, all) = (Counts::default(), Counts::default());
        let mut slots: Vec<Slot> =
            (0..STREAMS_PER_PEER).map(|_| Slot::take(Bulk::Blob, &peer, &all).unwrap()).collect();
        assert!(Slot::take(Bulk::Blob, &peer, &all).is_none());
        slots.pop();
        assert!(Slot::take(Bulk::Blob, &peer, &all).is_some());
        assert!(Slot::take(Bulk::Round, &peer, &all).is_some(), "each kind has places of its own");
        drop(slots);
        assert_eq!((peer.total(), all.total()), (0, 0));
    }
}
