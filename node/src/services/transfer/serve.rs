//! The providing side of a /blob stream.
//!
//! One task a stream: a reader that takes requests and reads the disk, and a writer that sends; between them a queue of
//! [`PIECES`] buffers, so the disk is read while the last piece is on its way and a slow peer holds three buffers, never more.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sundara_proto::blob::{BlobHeader, BlobRequest, GroupRanges};
use sundara_proto::wire::limit;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::Shared;
use super::stream::{StreamError, frame, read_message, write_all};
use crate::blobs::{Asker, BlobError, BlobReader, Blobs, Encoder};

/// Bytes read from the disk and sent at once: the frame size that libp2p streams carry best (256 KiB, measured).
const PIECE: usize = 256 << 10;
/// Pieces on their way from disk to stream, the one being written included.
const PIECES: usize = 2;

/// What the reader hands to the writer.
enum Piece {
    Header(Bytes),
    Data(Vec<u8>, usize),
}

/// Serves one stream until the peer ends it, breaks the rules, or stalls.
pub(crate) async fn serve(
    shared: &Arc<Shared>,
    asker: Asker,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<(), StreamError> {
    let (mut from, mut to) = tokio::io::split(stream);
    let Some(_slot) = shared.slots.take(asker.node) else {
        // The request is taken first, so that the peer reads an answer and not a reset.
        let patience = shared.progress_timeout();
        let _: Option<BlobRequest> = read_message(&mut from, patience).await?;
        write_all(&mut to, &frame(&BlobHeader::Busy)?, patience).await?;
        to.shutdown().await?;
        return Ok(());
    };
    let (pieces, mut queue) = mpsc::channel(PIECES);
    let (spare, mut spares) = mpsc::channel(PIECES + 2);
    for _ in 0..=PIECES {
        let _ = spare.try_send(Vec::new());
    }
    let reading = async {
        let mut cached: Option<Arc<BlobReader>> = None;
        while let Some(request) = read_message::<BlobRequest>(&mut from, shared.idle_timeout()).await? {
            if !answer(shared, &asker, request, &mut cached, &pieces, &mut spares).await? {
                break;
            }
        }
        drop(pieces);
        Ok::<_, StreamError>(())
    };
    let writing = async {
        let patience = shared.progress_timeout();
        while let Some(piece) = queue.recv().await {
            match piece {
                Piece::Header(header) => write_all(&mut to, &header, patience).await?,
                Piece::Data(buffer, len) => {
                    send(shared, &mut to, &buffer[..len], patience).await?;
                    let _ = spare.try_send(buffer);
                }
            }
            if queue.is_empty() {
                to.flush().await?;
            }
        }
        to.shutdown().await?;
        Ok(())
    };
    tokio::try_join!(reading, writing).map(drop)
}

async fn send(
    shared: &Shared,
    to: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    patience: Duration,
) -> Result<(), StreamError> {
    for part in bytes.chunks(shared.upload.quantum()) {
        shared.upload.pass(part.len()).await;
        write_all(to, part, patience).await?;
        shared.stats.add_sent(part.len());
    }
    Ok(())
}

/// Answers one request; false when the stream must end, because a promised body cannot be delivered.
async fn answer(
    shared: &Arc<Shared>,
    asker: &Asker,
    request: BlobRequest,
    cached: &mut Option<Arc<BlobReader>>,
    pieces: &mpsc::Sender<Piece>,
    spares: &mut mpsc::Receiver<Vec<u8>>,
) -> Result<bool, StreamError> {
    let wants_body = !request.groups.is_empty();
    let Some((header, mut encoder)) = begin(&shared.blobs, asker, &request, cached).await else {
        return Ok(pieces.send(Piece::Header(frame(&BlobHeader::NotFound)?)).await.is_ok());
    };
    if pieces.send(Piece::Header(frame(&header)?)).await.is_err() {
        return Ok(false);
    }
    while let Some(mut reading) = encoder.take().filter(|_| wants_body) {
        if reading.is_done() {
            break;
        }
        // Every buffer comes back through the writer, so there are never more than the first ones.
        let Some(buffer) = spares.recv().await else { return Ok(false) };
        match fill(reading, buffer).await {
            Ok((reading, buffer, len)) => {
                encoder = Some(reading);
                if pieces.send(Piece::Data(buffer, len)).await.is_err() {
                    return Ok(false);
                }
            }
            Err(e) => {
                tracing::warn!(blob = %request.blob, error = %e, "a blob could not be served to its end");
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Opens the blob, unless the last request did, and starts the encoding. `None`: not held, or not for this peer.
async fn begin(
    blobs: &Blobs,
    asker: &Asker,
    request: &BlobRequest,
    cached: &mut Option<Arc<BlobReader>>,
) -> Option<(BlobHeader, Option<Encoder>)> {
    if !blobs.may_read(&request.blob, asker) {
        *cached = None;
        return None;
    }
    let reader = match cached.take().filter(|r| r.id() == request.blob) {
        Some(reader) => reader,
        None => {
            let (blobs, blob, asker) = (blobs.clone(), request.blob, *asker);
            let opened = tokio::task::spawn_blocking(move || blobs.reader(&blob, &asker)).await.ok()??;
            Arc::new(opened)
        }
    };
    let held = reader.held();
    let groups = if request.groups.is_empty() { held } else { held.intersect(&request.groups) };
    let groups: GroupRanges = groups.first(limit::BLOB_HEADER_RANGES);
    let encoder = if request.groups.is_empty() { None } else { Some(reader.encode(&groups).ok()?) };
    let header = BlobHeader::Found { len: reader.len(), groups };
    *cached = Some(reader);
    Some((header, encoder))
}

/// Reads the next piece off the async threads.
async fn fill(mut encoder: Encoder, mut buffer: Vec<u8>) -> Result<(Encoder, Vec<u8>, usize), BlobError> {
    let work = tokio::task::spawn_blocking(move || {
        buffer.resize(PIECE, 0);
        let len = encoder.fill(&mut buffer)?;
        Ok((encoder, buffer, len))
    });
    work.await.unwrap_or(Err(BlobError::Closed))
}
