//! What the miner counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

/// Counters of the miner. Cheap to clone; clones count together. Names as registered are `miner_<field>_total`.
#[derive(Clone, Debug, Default)]
pub(crate) struct MinerMetrics {
    /// Offers that came.
    pub(crate) offers: Counter,
    /// Offers declined.
    pub(crate) declined: Counter,
    /// Offers accepted.
    pub(crate) accepted: Counter,
    /// Results shown to their validator.
    pub(crate) served: Counter,
    /// Jobs that every executor failed to run.
    pub(crate) faulted: Counter,
    /// Jobs that were stopped: abandoned, past their deadline, or their validator was gone.
    pub(crate) abandoned: Counter,
}

impl MinerMetrics {
    /// Puts all of them into a registry under the prefix `miner`.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("miner");
        registry.register("offers", "Offers that came", self.offers.clone());
        registry.register("declined", "Offers declined", self.declined.clone());
        registry.register("accepted", "Offers accepted", self.accepted.clone());
        registry.register("served", "Results shown to their validator", self.served.clone());
        registry.register("faulted", "Jobs that every executor failed to run", self.faulted.clone());
        registry.register("abandoned", "Jobs stopped before their result was shown", self.abandoned.clone());
    }
}
