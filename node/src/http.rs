//! The local HTTP API: what the command line and other programs on this machine use.
//!
//! Owns routes, limits and the error map. Everything behind a route is `api`'s; nothing here decides. Invariants: it is
//! bound to loopback unless the operator says otherwise; a web page cannot use it through a browser (`guard`); bodies,
//! connections and uploads are bounded; every error has the form of [`ApiError`].

mod error;
mod guard;
mod routes;
mod serve;
mod types;

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::api::Node;
use crate::config::HttpConfig;
use crate::service::Tasks;

pub use error::{ApiError, Code, ErrorBody};
pub use serve::HttpError;
pub use types::{
    Epoch, EventView, InlineBytes, InviteRequest, Items, JobRequest, JobView, Limit, MinerView, ModelRequest, Nothing,
    PinRequest, PublishRequest, ResultView,
};

/// The API of one node, while it is served.
pub struct Server {
    address: SocketAddr,
    tasks: Tasks,
}

/// Serves the API of `node`. Inputs that are uploaded lie in `spool` until their jobs have them.
///
/// # Errors
/// See [`HttpError`].
pub async fn serve(node: Node, config: &HttpConfig, spool: PathBuf) -> Result<Server, HttpError> {
    let listener = serve::bind(config).await?;
    let address = listener.local_addr().map_err(|source| HttpError::Bind { address: config.listen, source })?;
    let tasks = Tasks::new().child("http");
    let router = routes::router(node, config, spool, tasks.token());
    tasks.spawn("accept", serve::accept(listener, router, config.connections_max, tasks.clone()));
    Ok(Server { address, tasks })
}

impl Server {
    /// Where it is served.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no new connection, lets running requests end, and is gone after a grace time. Event streams end.
    pub async fn shutdown(self) {
        self.tasks.shutdown().await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
