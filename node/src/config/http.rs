//! Settings of the local HTTP API. They stand here and not beside the routes, because imports point down only.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Section `http`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct HttpConfig {
    /// Whether it is served at all.
    pub enabled: bool,
    /// Where. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Whether `listen` may be an address that other machines reach. The API asks nobody who they are: put something in
    /// front of it that does.
    pub allow_remote: bool,
    /// Names by which browsers and clients may address it besides IP addresses and `localhost`. Any other `Host` is
    /// refused, so that a web page cannot reach it under a name of its own (DNS rebinding).
    pub hosts: Vec<String>,
    /// Connections at once; further ones wait. One takes about 32 KiB.
    pub connections_max: usize,
    /// Uploads of inputs at once: each is a file of up to 256 MiB in the data directory until its job has it.
    pub uploads_max: usize,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            listen: SocketAddr::from(([127, 0, 0, 1], 4102)),
            allow_remote: false,
            hosts: Vec::new(),
            connections_max: 256,
            uploads_max: 4,
        }
    }
}
