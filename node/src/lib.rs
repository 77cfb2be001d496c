//! A node of the sundara mesh: jobs, models and signed results between peers.
//!
//! A program that embeds a light node starts at [`Node::builder`]:
//!
//! ```no_run
//! use sundara_node::{JobOrder, Node};
//!
//! # async fn example(bootstrap: &str, validator: &str) -> Result<(), Box<dyn std::error::Error>> {
//! let node = Node::builder().bootstrap([bootstrap]).trust([validator.parse()?]).start().await?;
//! let job = node.jobs().submit(JobOrder::builtin("echo").input("hello").replicas(2)).await?;
//! let result = job.result().await?;
//! println!("{:?}: {:?}", result.kind(), result.output);
//! node.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! The library runs on the caller's tokio runtime and installs no subscriber, panic hook or signal handler, and opens no
//! API port unless it is asked to. `node/ARCHITECTURE.md` says how it is built.

pub mod api;
pub mod blobs;
pub mod builder;
#[cfg(feature = "cli")]
pub mod cli;
pub mod config;
pub mod domain;
#[cfg(feature = "http")]
pub mod http;
pub mod net;
pub mod presets;
pub mod service;
mod services;
#[cfg(test)]
mod sim;
pub mod store;
#[cfg(feature = "cli")]
pub mod telemetry;
#[cfg(feature = "executor")]
pub mod testnet;

pub use api::rounds;
pub use api::{
    JobEvent, JobFailure, JobHandle, JobOrder, JobPhase, JobResult, Jobs, Models, Node, StartError, Status,
    SubmitError, Traffic,
};
pub use builder::NodeBuilder;
pub use presets::Role;
pub use sundara_proto::crypto::Network;
