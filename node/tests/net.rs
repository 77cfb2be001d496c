//! The network over libp2p's in-process transport, and over TCP on loopback where that is the point.
#![allow(clippy::unwrap_used, unreachable_pub)]

#[path = "net/hostile.rs"]
mod hostile;
#[path = "net/kit.rs"]
mod kit;
#[path = "net/policy.rs"]
mod policy;
#[path = "net/raw.rs"]
mod raw;
#[path = "net/records.rs"]
mod records;
#[path = "net/talking.rs"]
mod talking;
