//! Batches of writes and the future of their commit.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{Keyspace, StoreError};

/// Longest key: an id or two and a time; long keys would fill the index pages.
pub const MAX_KEY_BYTES: usize = 256;

/// Largest value. Records are small; a page of 500 batch entries is the largest. Bigger bytes are blobs.
pub const MAX_VALUE_BYTES: usize = 1024 * 1024;

/// Most writes in one batch: one batch must not hold up the readers for long.
pub const MAX_BATCH_OPS: usize = 4_096;

/// Most bytes of keys and values in one batch.
pub const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Op {
    pub(super) keyspace: Keyspace,
    pub(super) key: Bytes,
    /// `None` deletes.
    pub(super) value: Option<Bytes>,
}

/// Writes over any keyspaces that take effect together. A later write of a key in one batch wins over an earlier one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriteBatch {
    ops: Vec<Op>,
    bytes: usize,
}

impl WriteBatch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `value` under `key`.
    pub fn put(&mut self, keyspace: Keyspace, key: impl Into<Bytes>, value: impl Into<Bytes>) -> &mut Self {
        self.push(Op { keyspace, key: key.into(), value: Some(value.into()) })
    }

    /// Deletes `key`; nothing happens if it is not there.
    pub fn delete(&mut self, keyspace: Keyspace, key: impl Into<Bytes>) -> &mut Self {
        self.push(Op { keyspace, key: key.into(), value: None })
    }

    /// Adds the writes of `other`, after those of this batch.
    pub fn append(&mut self, other: Self) -> &mut Self {
        self.bytes += other.bytes;
        self.ops.extend(other.ops);
        self
    }

    /// Number of writes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there are no writes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of keys and values.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether another write of `bytes` would still fit.
    #[must_use]
    pub fn has_room(&self, bytes: usize) -> bool {
        self.ops.len() < MAX_BATCH_OPS && self.bytes + bytes <= MAX_BATCH_BYTES
    }

    fn push(&mut self, op: Op) -> &mut Self {
        self.bytes += op.key.len() + op.value.as_ref().map_or(0, Bytes::len);
        self.ops.push(op);
        self
    }

    pub(super) fn ops(&self) -> &[Op] {
        &self.ops
    }

    pub(super) fn check(&self) -> Result<(), StoreError> {
        let within = |what, bytes, limit_bytes| {
            if bytes > limit_bytes { Err(StoreError::TooLarge { what, bytes, limit_bytes }) } else { Ok(()) }
        };
        within("a batch's list of writes", self.ops.len(), MAX_BATCH_OPS)?;
        within("a batch", self.bytes, MAX_BATCH_BYTES)?;
        for op in &self.ops {
            within("a key", op.key.len(), MAX_KEY_BYTES)?;
            within("a value", op.value.as_ref().map_or(0, Bytes::len), MAX_VALUE_BYTES)?;
        }
        Ok(())
    }
}

/// The receipt of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Commit {
    /// The batch's number: one more than that of the batch before it.
    pub seq: u64,
}

/// The outcome of a queued batch. Cancel-safe: dropping it changes nothing about the batch.
#[derive(Debug)]
pub struct Pending(State);

#[derive(Debug)]
enum State {
    Done(Option<Result<Commit, StoreError>>),
    Waiting(oneshot::Receiver<Result<Commit, StoreError>>),
}

impl Pending {
    pub(super) fn done(outcome: Result<Commit, StoreError>) -> Self {
        Self(State::Done(Some(outcome)))
    }

    pub(super) fn waiting(receiver: oneshot::Receiver<Result<Commit, StoreError>>) -> Self {
        Self(State::Waiting(receiver))
    }

    /// Waits on the calling thread: for code that may block.
    ///
    /// # Errors
    /// As the future.
    pub fn wait(self) -> Result<Commit, StoreError> {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut pending = std::pin::pin!(self);
        loop {
            match pending.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(outcome) => return outcome,
                Poll::Pending => std::thread::park(),
            }
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Future for Pending {
    type Output = Result<Commit, StoreError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::Done(outcome) => Poll::Ready(outcome.take().unwrap_or(Err(StoreError::Closed))),
            State::Waiting(receiver) => {
                Pin::new(receiver).poll(cx).map(|outcome| outcome.unwrap_or(Err(StoreError::Closed)))
            }
        }
    }
}
