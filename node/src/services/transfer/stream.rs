//! Frames and bytes on a /blob stream, with a limit on how long nothing may happen.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use sundara_proto::wire::{self, PREFIX_LEN, WireError, WireMessage};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// Bytes that must arrive or leave within the progress timeout: a drip of single bytes is no progress.
pub(crate) const PROGRESS_QUANTUM: usize = 32 << 10;

/// Why a stream is given up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("closed the stream: {0}")]
    Io(#[from] io::Error),
    #[error("sent nothing useful for {0:?}")]
    Stalled(Duration),
    #[error("sent what is no message: {0}")]
    Wire(#[from] WireError),
}

/// Reads one message; `None` where the stream ends before it begins.
pub(crate) async fn read_message<M: WireMessage>(
    from: &mut (impl AsyncRead + Unpin),
    patience: Duration,
) -> Result<Option<M>, StreamError> {
    let read = async {
        let mut prefix = [0; PREFIX_LEN];
        if from.read(&mut prefix[..1]).await? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut prefix[1..]).await?;
        let mut body = vec![0; wire::frame_len(prefix, M::MAX)?];
        from.read_exact(&mut body).await?;
        Ok(Some(M::decode(&Bytes::from(body))?))
    };
    timeout(patience, read).await.unwrap_or(Err(StreamError::Stalled(patience)))
}

/// A message as it goes on the stream.
pub(crate) fn frame<M: WireMessage>(message: &M) -> Result<Bytes, WireError> {
    wire::encode_frame(&message.to_raw(), M::MAX)
}

/// Fills `buffer`; tells `arrived` of every part.
pub(crate) async fn read_all(
    from: &mut (impl AsyncRead + Unpin),
    buffer: &mut [u8],
    patience: Duration,
    arrived: impl Fn(usize),
) -> Result<(), StreamError> {
    for part in buffer.chunks_mut(PROGRESS_QUANTUM) {
        match timeout(patience, from.read_exact(part)).await {
            Ok(read) => arrived(read?),
            Err(_) => return Err(StreamError::Stalled(patience)),
        }
    }
    Ok(())
}

/// Sends `bytes`.
pub(crate) async fn write_all(
    to: &mut (impl AsyncWrite + Unpin),
    mut bytes: &[u8],
    patience: Duration,
) -> Result<(), StreamError> {
    // Handed over whole, so that the transport cuts frames as it likes; a slow peer must take a quantum in time.
    while !bytes.is_empty() {
        let goal = bytes.len().saturating_sub(PROGRESS_QUANTUM);
        let step = async {
            while bytes.len() > goal {
                let n = to.write(bytes).await?;
                if n == 0 {
                    return Err(io::Error::from(io::ErrorKind::WriteZero));
                }
                bytes = &bytes[n..];
            }
            Ok(())
        };
        match timeout(patience, step).await {
            Ok(done) => done?,
            Err(_) => return Err(StreamError::Stalled(patience)),
        }
    }
    Ok(())
}
