//! Models as a program that embeds the node sees them.

use sundara_proto::crypto::HotkeyPair;

use crate::services::registry::RegistryHandle;

/// Models of one node: publish, find, fetch, keep.
#[derive(Clone)]
pub struct Models {
    pub(crate) registry: RegistryHandle,
    pub(crate) key: HotkeyPair,
}
