//! skeleton
pub mod blobs;
#[cfg(feature = "cli")]
pub mod cli;
pub mod config;
pub mod domain;
#[cfg(feature = "http")]
pub mod http;
pub mod net;
pub mod presets;
pub mod service;
pub mod services;
#[cfg(test)]
mod sim;
pub mod store;
#[cfg(feature = "cli")]
pub mod telemetry;
