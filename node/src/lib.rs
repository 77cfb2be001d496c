//! skeleton
pub mod domain;
pub mod net;
pub mod service;
pub mod store;
