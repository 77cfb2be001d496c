//! The store's section of the configuration.

use serde::{Deserialize, Serialize};

/// Settings of a [`SledStore`](super::SledStore).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct StoreConfig {
    /// Memory for pages that are read often. An idle node is to stay below 60 MiB in all.
    pub cache_bytes: u64,
    /// Room that must stay free on the disk; below it writes are refused and nothing else is harmed.
    pub disk_reserve_bytes: u64,
    /// Longest time for which a relaxed commit waits for another commit to share its flush with.
    pub relaxed_delay_ms: u64,
    /// Journal beyond which the database itself is synced and the journal begun anew: more means fewer syncs, and
    /// longer opening after a crash (16 MiB replay in about a second). At most 128 MiB.
    pub checkpoint_bytes: u64,
    /// Open a damaged store with whatever can still be read, and forget that more was acknowledged. The damaged files
    /// are moved aside, not deleted.
    pub accept_data_loss: bool,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            cache_bytes: 16 * 1024 * 1024,
            disk_reserve_bytes: 64 * 1024 * 1024,
            relaxed_delay_ms: 100,
            checkpoint_bytes: 16 * 1024 * 1024,
            accept_data_loss: false,
        }
    }
}
