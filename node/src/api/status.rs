//! How a node is, as values ready to be shown.

use serde::Serialize;
use sundara_proto::id::Hotkey;

use crate::builder::Parts;
use crate::net::NetStatus;
use crate::presets::{self, Role};
#[cfg(feature = "executor")]
pub use crate::services::{dispatch::DispatchStatus, executor::attached::AttachState, work::pool::ExecutorStatus};
use crate::store::StoreStatus;

/// How a node is.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Release.
    pub version: &'static str,
    /// What it was asked to be.
    pub roles: Vec<Role>,
    /// Who answers for it.
    pub hotkey: Hotkey,
    /// The network as it sees it; `None` while it shuts down.
    pub net: Option<NetStatus>,
    /// Its store.
    pub store: StoreStatus,
    /// Its executors, where it has any.
    #[cfg(feature = "executor")]
    pub executors: Vec<ExecutorStatus>,
    /// Where an executor's attachment to its owner stands.
    #[cfg(feature = "executor")]
    pub attached: Option<AttachState>,
    /// A validator's jobs.
    #[cfg(feature = "executor")]
    pub dispatch: Option<DispatchStatus>,
    /// What it still needs before it can do its work, each with what to do.
    pub missing: Vec<String>,
}

impl Status {
    pub(crate) async fn of(parts: &Parts) -> Self {
        let net = parts.net.status().await.ok();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            roles: parts.config.node.roles.clone(),
            hotkey: parts.net.local().hotkey,
            store: parts.store.status(),
            #[cfg(feature = "executor")]
            executors: parts.work.pool.as_ref().map(|pool| pool.list()).unwrap_or_default(),
            #[cfg(feature = "executor")]
            attached: parts.work.attached.as_ref().map(|a| a.state().borrow().clone()),
            #[cfg(feature = "executor")]
            dispatch: parts.work.dispatch.as_ref().map(|d| d.status()),
            missing: missing(parts, net.as_ref()),
            net,
        }
    }

    /// Whether the node can do its work now.
    pub fn is_ready(&self) -> bool {
        self.net.as_ref().is_some_and(|net| net.connected > 0) && self.store.failed.is_none()
    }
}

/// What stands between the node and its work, in words.
fn missing(parts: &Parts, net: Option<&NetStatus>) -> Vec<String> {
    let mut missing = Vec::new();
    let Some(net) = net else { return missing };
    let serves = presets::serves(&parts.config.node.roles);
    if net.bootstrap.is_empty() && net.connected == 0 {
        missing.push("a node to join through: --bootstrap ADDR, or --network FILE".to_owned());
    }
    for bootstrap in net.bootstrap.iter().filter(|b| !b.connected) {
        let reason = bootstrap.last_error.as_deref().unwrap_or("not tried yet");
        missing.push(format!("bootstrap {}: {reason}; retrying", bootstrap.address));
    }
    #[cfg(feature = "executor")]
    if let Some(attached) = &parts.work.attached
        && let AttachState::Attaching { last_error } = &*attached.state().borrow()
    {
        let reason = last_error.as_deref().unwrap_or("not tried yet");
        missing.push(format!("its owner: {reason}; retrying"));
    }
    if serves && let Some(hint) = &net.reachability_hint {
        missing.push(hint.clone());
    }
    if parts.config.jobs.trusted_validators.is_empty() {
        missing
            .push("validators to believe, for submitting jobs: jobs.trusted_validators, or --network FILE".to_owned());
    }
    if serves {
        missing.push("registration on a chain: this release runs meshes without one".to_owned());
    }
    missing
}
