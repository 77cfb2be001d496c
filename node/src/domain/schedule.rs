//! Which miners take a job.

use sundara_proto::advert::ExecutorClass;
use sundara_proto::id::{Hotkey, ModelId, NodeId};
use sundara_proto::units::UnixMillis;

use super::Owner;

/// A miner as its advert and the chain describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MinerProfile {
    /// Who.
    pub hotkey: Hotkey,
    /// Who stands behind it.
    pub owner: Owner,
    /// Where offers go.
    pub node: NodeId,
    /// What it can run.
    pub classes: Vec<ExecutorClass>,
    /// Models whose blobs it has.
    pub models: Vec<ModelId>,
    /// When the advert lapses.
    pub expires_at: UnixMillis,
}
