//! Standard output on its way to the caller: a bounded channel of byte chunks, streamed while the job runs.
//!
//! Owns delivery, back-pressure and the running digest of all bytes. The output itself is kept nowhere: a caller that
//! wants it whole collects the stream ([`crate::collect`]). Chunk boundaries mean nothing and differ from run to run.
//!
//! Invariants: every byte is hashed in order before it is offered; at most [`OUTPUT_CHUNKS_MAX`] chunks of at most
//! [`OUTPUT_CHUNK_BYTES_MAX`] bytes wait; a receiver that is gone stops delivery, never the job.

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::control::RunControl;
use crate::outcome::AbortReason;

/// Chunks that may wait for a slow receiver: with the chunk size, 1 MiB a job.
pub const OUTPUT_CHUNKS_MAX: usize = 16;
/// Largest chunk. Small writes are sent as they come and gathered up to this while the receiver is slow.
pub const OUTPUT_CHUNK_BYTES_MAX: usize = 64 << 10;

/// The sending side, handed to [`crate::JobRuntime::run`].
#[derive(Debug)]
pub struct OutputSink {
    sender: Option<mpsc::Sender<Bytes>>,
    held: bool,
}

/// The receiving side. Dropping it lets the job go on undelivered.
#[derive(Debug)]
pub struct OutputStream {
    receiver: mpsc::Receiver<Bytes>,
}

impl OutputSink {
    /// A connected pair.
    pub fn channel() -> (Self, OutputStream) {
        let (sender, receiver) = mpsc::channel(OUTPUT_CHUNKS_MAX);
        (Self { sender: Some(sender), held: false }, OutputStream { receiver })
    }

    /// A sink that delivers nothing: only the digest is wanted.
    pub fn discard() -> Self {
        Self { sender: None, held: false }
    }

    /// A sink that delivers nothing and keeps one chunk: a run that writes more ends as if it had taken too long.
    pub(crate) fn held() -> Self {
        Self { sender: None, held: true }
    }

    /// Delivers what a run wrote into a held sink.
    pub(crate) async fn deliver(self, written: Bytes) {
        if let Some(sender) = self.sender.filter(|_| !written.is_empty()) {
            // A receiver that is gone wants nothing.
            let _ = sender.send(written).await;
        }
    }
}

impl OutputStream {
    /// The next chunk; `None` after the last one. Cancel safe.
    pub async fn recv(&mut self) -> Option<Bytes> {
        self.receiver.recv().await
    }
}

/// Why a write did not go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteEnd {
    /// The output limit is reached; the bytes up to it are delivered.
    Limit,
    /// The run was stopped while the channel was full.
    Stopped(AbortReason),
}

/// The guest's side: hashes, counts, bounds and delivers.
#[derive(Debug)]
pub(crate) struct OutputWriter {
    sender: Option<mpsc::Sender<Bytes>>,
    held: bool,
    /// Bytes written while the channel was full; below [`OUTPUT_CHUNK_BYTES_MAX`] between writes.
    pending: Vec<u8>,
    hasher: blake3::Hasher,
    written: u64,
    limit: u64,
}

impl OutputWriter {
    /// A writer that takes `limit` bytes.
    pub(crate) fn new(sink: OutputSink, limit: u64) -> Self {
        Self {
            sender: sink.sender,
            held: sink.held,
            pending: Vec::new(),
            hasher: blake3::Hasher::new(),
            written: 0,
            limit,
        }
    }

    /// Bytes taken so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Bytes that the limit leaves.
    pub(crate) fn room(&self) -> u64 {
        self.limit - self.written
    }

    /// BLAKE3 of the bytes taken so far.
    pub(crate) fn digest(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }

    /// Takes bytes up to the limit; blocks while the channel and a chunk behind it are full.
    pub(crate) fn write(&mut self, bytes: &[u8], control: &RunControl) -> Result<(), WriteEnd> {
        let taken = usize::try_from(self.room()).unwrap_or(usize::MAX).min(bytes.len());
        let (kept, excess) = bytes.split_at(taken);
        self.hasher.update(kept);
        self.written += kept.len() as u64;
        for piece in kept.chunks(OUTPUT_CHUNK_BYTES_MAX) {
            self.offer(piece, control)?;
        }
        if excess.is_empty() { Ok(()) } else { Err(WriteEnd::Limit) }
    }

    /// Delivers what is still waiting; called once, at the end.
    pub(crate) fn finish(&mut self, control: &RunControl) -> Result<(), WriteEnd> {
        while !self.held && !self.pending.is_empty() {
            self.flush(control)?;
        }
        self.sender = None;
        Ok(())
    }

    /// What a held sink kept.
    pub(crate) fn take_held(&mut self) -> Bytes {
        Bytes::from(std::mem::take(&mut self.pending))
    }

    /// Sends a piece at once where there is room, else gathers it.
    fn offer(&mut self, piece: &[u8], control: &RunControl) -> Result<(), WriteEnd> {
        if self.held {
            if self.pending.len() + piece.len() > OUTPUT_CHUNK_BYTES_MAX {
                return Err(WriteEnd::Stopped(AbortReason::WallClock));
            }
            self.pending.extend_from_slice(piece);
            return Ok(());
        }
        if self.pending.is_empty() {
            let Some(sender) = &self.sender else {
                return Ok(());
            };
            let closed = match sender.try_reserve() {
                Ok(permit) => {
                    permit.send(Bytes::copy_from_slice(piece));
                    return Ok(());
                }
                Err(error) => matches!(error, mpsc::error::TrySendError::Closed(())),
            };
            if closed {
                self.sender = None;
                return Ok(());
            }
        }
        if self.pending.len() + piece.len() > OUTPUT_CHUNK_BYTES_MAX {
            self.flush(control)?;
        }
        self.pending.extend_from_slice(piece);
        if let Some(Ok(permit)) = self.sender.as_ref().map(mpsc::Sender::try_reserve) {
            permit.send(Bytes::from(std::mem::take(&mut self.pending)));
        }
        Ok(())
    }

    /// Sends the gathered bytes, waiting for room.
    fn flush(&mut self, control: &RunControl) -> Result<(), WriteEnd> {
        let chunk = Bytes::from(std::mem::take(&mut self.pending));
        let Some(sender) = &self.sender else {
            return Ok(());
        };
        if let Err(mpsc::error::TrySendError::Full(chunk)) = sender.try_send(chunk) {
            // An error means that the receiver is gone, which stops delivery and not the job.
            let _ = control.wait(sender.send(chunk)).map_err(WriteEnd::Stopped)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_limit_cuts_at_its_byte() {
        let (sink, mut stream) = OutputSink::channel();
        let control = RunControl::default();
        let mut writer = OutputWriter::new(sink, 5);
        assert_eq!(writer.write(b"abc", &control), Ok(()));
        assert_eq!(writer.write(b"de", &control), Ok(()));
        assert_eq!(writer.write(b"fgh", &control), Err(WriteEnd::Limit));
        writer.finish(&control).unwrap();
        assert_eq!(writer.digest(), *blake3::hash(b"abcde").as_bytes());
        let mut all = Vec::new();
        while let Ok(chunk) = stream.receiver.try_recv() {
            all.extend_from_slice(&chunk);
        }
        assert_eq!(all, b"abcde");
    }

    #[test]
    fn a_slow_receiver_gathers_chunks_and_a_stop_ends_the_wait() {
        let (sink, mut stream) = OutputSink::channel();
        let control = RunControl::default();
        let mut writer = OutputWriter::new(sink, u64::MAX);
        // Without a receiver that takes anything, the channel fills, then one chunk gathers; all of it is delivered.
        let mut sent = 0;
        while sent < OUTPUT_CHUNKS_MAX + OUTPUT_CHUNK_BYTES_MAX {
            writer.write(b"x", &control).unwrap();
            sent += 1;
        }
        control.stop(AbortReason::WallClock);
        assert_eq!(writer.write(b"x", &control), Err(WriteEnd::Stopped(AbortReason::WallClock)));
        let mut chunks = 0;
        while stream.receiver.try_recv().is_ok() {
            chunks += 1;
        }
        assert_eq!(chunks, OUTPUT_CHUNKS_MAX);
    }

    #[test]
    fn a_receiver_that_is_gone_stops_nothing() {
        let (sink, stream) = OutputSink::channel();
        drop(stream);
        let control = RunControl::default();
        let mut writer = OutputWriter::new(sink, u64::MAX);
        for _ in 0..100 {
            writer.write(&[7; OUTPUT_CHUNK_BYTES_MAX], &control).unwrap();
        }
        writer.finish(&control).unwrap();
        assert_eq!(writer.written(), 100 * OUTPUT_CHUNK_BYTES_MAX as u64);
    }
}
