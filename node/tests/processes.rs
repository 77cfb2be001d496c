//! The real binary as real processes: nodes that are killed, cut off, drained and asked, and the commands that ask them.
//!
//! One mesh runs at a time ([`kit::turn`]): each has processes enough for two cores.
#![allow(clippy::unwrap_used, unreachable_pub)]

#[path = "processes/attach.rs"]
mod attach;
#[path = "processes/commands.rs"]
mod commands;
#[path = "processes/crash.rs"]
mod crash;
#[path = "processes/kit.rs"]
mod kit;
#[path = "processes/namespaces.rs"]
mod namespaces;
#[path = "processes/reduce.rs"]
mod reduce;
#[path = "processes/shutdown.rs"]
mod shutdown;
#[path = "processes/testnet.rs"]
mod testnet;
