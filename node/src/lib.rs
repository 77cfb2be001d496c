//! skeleton
pub mod store;
