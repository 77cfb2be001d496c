//! What a node counts, as OpenMetrics text. Every name begins with `sundara_`.
//!
//! Services count in structs of their own; what they only know as a state (sizes, numbers held) is read when it is asked for.

use std::fmt;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::Status;
use crate::builder::Parts;

/// All of it, as of now.
pub(super) fn text(parts: &Parts, status: &Status) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("sundara");
    parts.net.metrics().register(&mut registry);
    state(&mut registry, parts, status);
    #[cfg(feature = "executor")]
    work(&mut registry, parts, status);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Gauge::<i64>::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

fn state(registry: &mut Registry, parts: &Parts, status: &Status) {
    gauge(registry, "ready", "Whether the node can do its work", status.is_ready().into());
    let store = registry.sub_registry_with_prefix("store");
    gauge(store, "records", "Records held", status.store.records);
    gauge(store, "live_bytes", "Bytes of keys and values held", status.store.live_bytes);
    gauge(store, "disk_bytes", "Bytes of the store's files at the last checkpoint", status.store.disk_bytes);
    gauge(store, "queued_batches", "Batches not yet applied", status.store.queued_batches);
    gauge(store, "failed", "Whether the store takes no writes any more", status.store.failed.is_some().into());
    let figures = parts.transfers.figures();
    let transfer = registry.sub_registry_with_prefix("transfer");
    gauge(transfer, "sent_bytes", "Bytes of blobs sent since the start", figures.sent_bytes_total);
    gauge(transfer, "received_bytes", "Bytes of blobs received since the start", figures.received_bytes_total);
    gauge(transfer, "refused_streams", "Streams turned away at a cap since the start", figures.refused_streams_total);
    gauge(transfer, "bad_pieces", "Pieces that did not match their hash since the start", figures.bad_pieces_total);
    gauge(transfer, "fetched", "Fetches that ended well since the start", figures.fetched_total);
    gauge(transfer, "fetches_failed", "Fetches that did not since the start", figures.failed_total);
    let usage = parts.blobs.usage();
    let blobs = registry.sub_registry_with_prefix("blobs");
    gauge(blobs, "held", "Blobs, incomplete ones included", usage.blobs);
    gauge(blobs, "used_bytes", "Bytes that blobs take on disk", usage.used.0);
    gauge(blobs, "max_bytes", "Bytes that they may take", usage.max.0);
}

#[cfg(feature = "executor")]
fn work(registry: &mut Registry, parts: &Parts, status: &Status) {
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::family::Family;

    if let Some(miner) = &parts.work.miner {
        miner.metrics().register(registry);
    }
    let executors = registry.sub_registry_with_prefix("executors");
    let sum = |of: fn(&super::ExecutorStatus) -> u32| status.executors.iter().map(|e| u64::from(of(e))).sum();
    gauge(executors, "held", "Executors that are here", status.executors.len() as u64);
    gauge(executors, "slots", "Jobs that they run at once", sum(|e| e.slots));
    gauge(executors, "running", "Orders that they hold", sum(|e| e.running));
    if let Some(dispatch) = &status.dispatch {
        let registry = registry.sub_registry_with_prefix("dispatch");
        gauge(registry, "live", "Jobs waiting or running", dispatch.live as u64);
        gauge(registry, "caught", "Miners dropped for an offence and still remembered", dispatch.caught.len() as u64);
        let verdicts = Family::<[(&'static str, &'static str); 1], Counter>::default();
        for (kind, count) in ["quorum", "audited", "unaudited", "rejected", "failed"].into_iter().zip(dispatch.verdicts)
        {
            verdicts.get_or_create(&[("kind", kind)]).inc_by(count);
        }
        registry.register("verdicts", "Verdicts since the start", verdicts);
    }
}
