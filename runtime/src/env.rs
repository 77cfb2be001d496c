//! Environment identity: inside one, equal jobs give equal bytes; across two, nothing is promised.
//!
//! The encoding is an agreement and stands in [`sundara_proto::rules::env`]. Each backend supplies the words that are its
//! own: engine flags and version.

use sundara_proto::id::EngineId;
use sundara_proto::rules::env::engine_id;

pub use sundara_proto::rules::env::Environment;

/// The part that the backend supplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EngineIdentity<'a> {
    /// Everything that changes semantics: features, canonicalisation, host version.
    pub flags: &'a str,
    /// Engine version, or GPU architecture and driver major.
    pub version: &'a str,
}

impl EngineIdentity<'_> {
    /// What adverts name the engine by.
    pub(crate) fn id(&self) -> EngineId {
        engine_id(self.flags, self.version)
    }
}
