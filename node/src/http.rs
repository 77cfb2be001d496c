//! The local HTTP API: what the command line and other programs on this machine use.
//!
//! Owns routes, limits and the error map. Everything behind a route is `api`'s; nothing here decides. Invariants: it is
//! bound to loopback unless the operator says otherwise; a web page cannot use it through a browser (`guard`); bodies,
//! connections and uploads are bounded; every error has the form of [`ApiError`].

mod error;
#[expect(dead_code, reason = "served once the node's front door is there")]
mod guard;
#[expect(dead_code, reason = "served once the node's front door is there")]
mod serve;
mod types;

pub use error::{ApiError, Code, ErrorBody};
pub use serve::HttpError;
pub use types::{
    EventView, InlineBytes, InviteRequest, Items, JobRequest, JobView, Limit, MinerView, ModelRequest, PinRequest,
    PublishRequest, ResultView,
};
