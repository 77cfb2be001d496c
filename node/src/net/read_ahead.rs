//! Reads sockets in large pieces under noise, whose own reads take 8 KiB, and counts what passes.
//!
//! Owns one buffer a connection. It grows while reads fill it and shrinks when they no longer do, so that hundreds of
//! connections that only gossip hold a few KiB each. Writing passes through.
//!
//! Invariant: a connection holds at most [`MOST`] here.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::{AsyncRead, AsyncWrite};

use super::metrics::NetMetrics;

/// Size to begin with, and to return to: what noise asks for at once.
const LEAST: usize = 8 << 10;
/// Four noise frames. More brings nothing.
const MOST: usize = 256 << 10;
/// So many reads in a row that would have fitted into half of the buffer halve it.
const SMALL_READS: u32 = 64;

/// A socket with a buffer in front of its reading half.
#[derive(Debug)]
pub(super) struct ReadAhead<C> {
    socket: C,
    buffer: Vec<u8>,
    /// Bytes of the buffer that were read and not yet taken.
    from: usize,
    to: usize,
    small: u32,
    metrics: NetMetrics,
}

impl<C> ReadAhead<C> {
    pub(super) fn new(socket: C, metrics: NetMetrics) -> Self {
        Self { socket, buffer: Vec::new(), from: 0, to: 0, small: 0, metrics }
    }

    /// Fits the buffer, which is empty, to what the last read brought.
    fn fit(&mut self) {
        let size = self.buffer.len();
        if size == 0 {
            self.buffer = vec![0; LEAST];
        } else if self.to == 0 {
            // Nothing was there yet: that says nothing of how much comes.
        } else if self.to == size {
            self.small = 0;
            if size < MOST {
                self.buffer = vec![0; size * 2];
            }
        } else if self.to > size / 2 || size == LEAST {
            self.small = 0;
        } else {
            self.small += 1;
            if self.small >= SMALL_READS {
                self.small = 0;
                self.buffer = vec![0; size / 2];
            }
        }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for ReadAhead<C> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.from == this.to {
            this.fit();
            (this.from, this.to) = (0, 0);
            this.to = ready!(Pin::new(&mut this.socket).poll_read(cx, &mut this.buffer))?;
            this.metrics.tcp_bytes_in.inc_by(this.to as u64);
        }
        let n = out.len().min(this.to - this.from);
        out[..n].copy_from_slice(&this.buffer[this.from..this.from + n]);
        this.from += n;
        Poll::Ready(Ok(n))
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for ReadAhead<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.socket).poll_write(cx, bytes))?;
        self.metrics.tcp_bytes_out.inc_by(n as u64);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures::executor::block_on;
    use futures::{AsyncReadExt as _, io::Cursor};

    use super::*;

    #[test]
    fn everything_arrives_in_order_and_the_buffer_grows_to_its_bound() {
        let content: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
        let mut socket = ReadAhead::new(Cursor::new(content.clone()), NetMetrics::default());
        let mut read = vec![0; content.len()];
        for part in read.chunks_mut(LEAST) {
            block_on(socket.read_exact(part)).unwrap();
        }
        assert!(read == content);
        assert_eq!(socket.buffer.len(), MOST);
        assert_eq!(block_on(socket.read(&mut [0; 10])).unwrap(), 0, "the end");
        assert_eq!(socket.metrics.tcp_bytes_in.get(), content.len() as u64);
    }

    /// Gives ten bytes a read.
    struct Drip;

    impl AsyncRead for Drip {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
            let n = out.len().min(10);
            out[..n].fill(1);
            Poll::Ready(Ok(n))
        }
    }

    #[test]
    fn a_connection_that_only_drips_gives_its_buffer_back() {
        let mut socket = ReadAhead { buffer: vec![0; MOST], ..ReadAhead::new(Drip, NetMetrics::default()) };
        for _ in 0..SMALL_READS * 6 {
            block_on(socket.read(&mut [0; 10])).unwrap();
        }
        assert_eq!(socket.buffer.len(), LEAST);
    }
}
