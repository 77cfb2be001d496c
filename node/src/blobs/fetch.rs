//! Asking for a blob to be fetched: the caller's end and the service's end of one bounded channel.

use std::time::Duration;

use sundara_proto::id::{BlobId, NodeId};
use sundara_proto::units::ByteCount;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::access::Access;
use super::error::BlobError;

/// Requests that wait for the service. Callers beyond wait on the channel.
const REQUEST_QUEUE: usize = 64;

/// What the caller knows of a blob's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobLen {
    /// From a signed or hashed message. A provider that says otherwise is wrong.
    Exact(ByteCount),
    /// Unknown; a blob that proves longer is refused.
    AtMost(ByteCount),
}

impl From<ByteCount> for BlobLen {
    fn from(len: ByteCount) -> Self {
        Self::Exact(len)
    }
}

/// Where a blob may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// Peers that are likely to have it; tried first.
    pub hints: Vec<NodeId>,
    /// Whether to ask the DHT too. For public blobs only: asking tells the world that one is interested.
    pub dht: bool,
}

impl Sources {
    /// These peers and no other.
    pub fn peers(hints: impl IntoIterator<Item = NodeId>) -> Self {
        Self { hints: hints.into_iter().collect(), dht: false }
    }

    /// Whoever the DHT names, and these peers.
    pub fn dht(hints: impl IntoIterator<Item = NodeId>) -> Self {
        Self { hints: hints.into_iter().collect(), dht: true }
    }
}

/// Why a blob could not be fetched.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// Nobody who was asked has it, may give it, or could be reached.
    #[error("no provider of blob {blob} could be used: {}", tell(.tried))]
    NoProvider {
        /// Which.
        blob: BlobId,
        /// Who was asked, and what came of it.
        tried: Vec<(NodeId, String)>,
    },
    /// Providers there were, but nothing arrived any more.
    #[error("blob {blob} made no progress for {idle:?}: {}", tell(.tried))]
    Stalled {
        /// Which.
        blob: BlobId,
        /// For how long.
        idle: Duration,
        /// Who was asked, and what came of it.
        tried: Vec<(NodeId, String)>,
    },
    /// Longer than the caller takes.
    #[error("blob {blob} of {len} exceeds the limit of {max}")]
    TooLarge {
        /// Which.
        blob: BlobId,
        /// Its proven length.
        len: ByteCount,
        /// The limit.
        max: ByteCount,
    },
    /// The local store refused.
    #[error("blob {blob} could not be stored: {reason}")]
    Store {
        /// Which.
        blob: BlobId,
        /// In the store's words.
        reason: String,
        /// Whether the same call may succeed later.
        retryable: bool,
    },
    /// Too many callers wait for this blob, or too many fetches are queued.
    #[error("too many fetches wait: raise `transfer.fetches_max` or try again later")]
    Busy,
    /// The transfer service is not running, or stops.
    #[error("blob transfer is shutting down")]
    Closed,
}

impl TransferError {
    /// Whether asking again later may help without anyone's doing.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoProvider { .. } | Self::Stalled { .. } | Self::Busy => true,
            Self::Store { retryable, .. } => *retryable,
            Self::TooLarge { .. } | Self::Closed => false,
        }
    }

    /// The store's refusal, as the waiters of one fetch share it.
    pub fn store(blob: BlobId, error: &BlobError) -> Self {
        Self::Store { blob, reason: error.to_string(), retryable: error.is_retryable() }
    }
}

fn tell(list: &[(NodeId, String)]) -> String {
    if list.is_empty() {
        return "none is known, neither by hint nor in the dht".to_owned();
    }
    let text: Vec<String> = list.iter().map(|(node, why)| format!("{node} {why}")).collect();
    text.join("; ")
}

/// A request as the service takes it.
#[derive(Debug)]
pub struct FetchRequest {
    /// Which blob.
    pub blob: BlobId,
    /// What is known of its length.
    pub len: BlobLen,
    /// Where it may be.
    pub sources: Sources,
    /// Who may read it here afterwards.
    pub access: Access,
    /// Where the result goes.
    pub reply: oneshot::Sender<Result<(), TransferError>>,
    /// Bytes held so far and in all.
    pub progress: watch::Sender<(ByteCount, ByteCount)>,
    /// Cancelled when the caller no longer waits.
    pub gone: CancellationToken,
}

/// Asks the transfer service for blobs. Clones share the channel.
#[derive(Clone, Debug)]
pub struct TransferHandle(mpsc::Sender<FetchRequest>);

/// Both ends.
pub fn transfer_channel() -> (TransferHandle, mpsc::Receiver<FetchRequest>) {
    let (tx, rx) = mpsc::channel(REQUEST_QUEUE);
    (TransferHandle(tx), rx)
}

/// A fetch under way. Dropping it ends the fetch, unless another caller waits for the same blob; what arrived is kept.
#[derive(Debug)]
pub struct Fetching {
    reply: oneshot::Receiver<Result<(), TransferError>>,
    progress: watch::Receiver<(ByteCount, ByteCount)>,
    _guard: DropGuard,
}

impl Fetching {
    /// Waits for the end. Cancel safe.
    ///
    /// # Errors
    /// As [`TransferHandle::fetch`].
    pub async fn done(&mut self) -> Result<(), TransferError> {
        (&mut self.reply).await.unwrap_or(Err(TransferError::Closed))
    }

    /// Bytes held so far and in all, as they change.
    pub fn progress(&self) -> watch::Receiver<(ByteCount, ByteCount)> {
        self.progress.clone()
    }
}

impl TransferHandle {
    /// Makes sure that a blob is here, complete and verified, and that `access` may read it. One fetch runs for any number
    /// of callers. Dropping the future ends the fetch when nobody else waits; what arrived is kept and resumed.
    ///
    /// A public blob is provided afterwards, also when it was here before.
    ///
    /// A private `access` counts a use, which [`super::Blobs::remove`] takes back.
    ///
    /// # Errors
    /// See [`TransferError`].
    pub async fn fetch(
        &self,
        blob: BlobId,
        len: impl Into<BlobLen>,
        sources: Sources,
        access: Access,
    ) -> Result<(), TransferError> {
        self.start(blob, len, sources, access).await?.done().await
    }

    /// As [`TransferHandle::fetch`], with progress to look at.
    ///
    /// # Errors
    /// [`TransferError::Closed`].
    pub async fn start(
        &self,
        blob: BlobId,
        len: impl Into<BlobLen>,
        sources: Sources,
        access: Access,
    ) -> Result<Fetching, TransferError> {
        let (reply, result) = oneshot::channel();
        let (progress, seen) = watch::channel((ByteCount(0), ByteCount(0)));
        let gone = CancellationToken::new();
        let guard = gone.clone().drop_guard();
        let request = FetchRequest { blob, len: len.into(), sources, access, reply, progress, gone };
        self.0.send(request).await.map_err(|_| TransferError::Closed)?;
        Ok(Fetching { reply: result, progress: seen, _guard: guard })
    }
}
