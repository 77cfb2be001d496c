//! The listener: accepts, bounds and ends connections.
//!
//! Written over hyper because a connection needs what `axum::serve` does not give: a limit on their number and on the time
//! that a request's head may take (slow loris).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::guard::Peer;
use crate::config::HttpConfig;
use crate::service::Tasks;

/// Time for a request's line and headers; a client on the same machine needs microseconds.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of a request's head.
const HEAD_BYTES_MAX: usize = 32 << 10;
/// Pause after `accept` failed, for want of file descriptors mostly: they come back when connections end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the API is not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The address is one that other machines reach.
    #[error(
        "http.listen = {0} is not a loopback address and the API asks nobody who they are; set http.allow_remote = true if something in front of it does"
    )]
    NotLoopback(SocketAddr),
    /// The address cannot be bound.
    #[error(
        "cannot serve the API on {address}: {source}; set http.listen (--api) to a free address, or http.enabled = false"
    )]
    Bind {
        /// Which address.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
}

/// Binds the address of `config`, after checking that it is a permitted one.
pub(super) async fn bind(config: &HttpConfig) -> Result<TcpListener, HttpError> {
    let address = config.listen;
    if !address.ip().is_loopback() && !config.allow_remote {
        return Err(HttpError::NotLoopback(address));
    }
    TcpListener::bind(address).await.map_err(|source| HttpError::Bind { address, source })
}

/// Accepts until the tasks' token is cancelled; connections then finish their running request.
pub(super) async fn accept(listener: TcpListener, router: Router, connections_max: usize, tasks: Tasks) {
    let token = tasks.token();
    let slots = Arc::new(Semaphore::new(connections_max.max(1)));
    loop {
        let accepted = tokio::select! {
            () = token.cancelled() => return,
            accepted = next(&listener, &slots) => accepted,
        };
        match accepted {
            Ok((stream, peer, slot)) => {
                let router = router.clone();
                tasks.spawn("connection", connection(stream, peer, router, tasks.token(), slot));
            }
            Err(error) => {
                tracing::warn!(%error, "the API could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn next(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    // The slot comes first: beyond the limit clients wait in the system's queue and cost nothing.
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, slot))
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    token: CancellationToken,
    slot: OwnedSemaphorePermit,
) {
    // Answers are small and someone waits for each: no batching by the system.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "set_nodelay");
    }
    let service = TowerToHyperService::new(router.layer(axum::Extension(Peer(peer))));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = token.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, %peer, "a connection of the API ended");
    }
    drop(slot);
}
