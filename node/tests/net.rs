//! The network over libp2p's in-process transport, and over TCP on loopback where that is the point.
#![allow(clippy::unwrap_used)]

#[path = "net/kit.rs"]
mod kit;
#[path = "net/talking.rs"]
mod talking;
