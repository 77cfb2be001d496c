//! Batches: turns attestations, receipts and verdicts into pages behind signed roots.
//!
//! A root goes on gossip a second after its first entry, or at 500 entries. The page is kept and served by stream: to
//! anyone once the epoch is open, which is one whole epoch after its end, when its weights have been committed and
//! revealed; before that, to a hotkey that stands in some of its entries, those entries alone. So a validator that only
//! listens learns an epoch's scores when they are of no more use to it.
//!
//! **Invariants**: an entry leaves the outbox in the same store batch in which its page is written; every batch names the
//! one before it, and the chain survives restarts; pages are kept for [`BatchesConfig::keep_epochs`].

use std::time::Duration;

use prost::Message as _;
use serde::{Deserialize, Serialize};
use sundara_proto::batch::Batch;
use sundara_proto::crypto::{HotkeyPair, Network, Signed};
use sundara_proto::id::{Digest, Hotkey};
use sundara_proto::names::Topic;
use sundara_proto::pb;
use sundara_proto::rules::merkle;
use sundara_proto::units::EpochLength;
use sundara_proto::verdict::Verdict;
use sundara_proto::wire::{WireMessage as _, limit};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{EntryReceiver, Staged, pages};
use crate::net::{FailureCode, Inbound, NetHandle};
use crate::service::{Tasks, wall_now};
use crate::store::{KeyRange, Keyspace, SharedStore, StoreError, WriteBatch};

/// Time from the first entry to its root.
const PAGE_AFTER: Duration = Duration::from_secs(1);
/// Largest page in bytes: it travels as one response, and the store takes it as one value.
const PAGE_BYTES_MAX: usize = 512 << 10;
/// Pages deleted in one step of retention.
const RETAIN_STEP: usize = 32;

/// How long pages are kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct BatchesConfig {
    /// Epochs (network.epoch_ms without a chain) that pages are kept and served after they were made.
    pub keep_epochs: u64,
    /// Pages kept, the newest: at most 512 KiB each. A page that goes before its epoch is open is evidence that nobody
    /// sees.
    pub keep_pages: u64,
}

impl Default for BatchesConfig {
    /// A day; 32 GiB at most.
    fn default() -> Self {
        Self { keep_epochs: 144, keep_pages: 65_536 }
    }
}

/// Where the chain of batches stands.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Tip {
    next_sequence: u64,
    previous: [u8; 32],
}

const TIP_KEY: &[u8] = b"batches/tip";

/// What the service needs from the rest of the node.
pub(crate) struct BatchesParts {
    pub(crate) config: BatchesConfig,
    pub(crate) network: Network,
    /// Of the mesh.
    pub(crate) epoch_length: EpochLength,
    pub(crate) key: HotkeyPair,
    pub(crate) net: NetHandle,
    pub(crate) store: SharedStore,
    pub(crate) entries: EntryReceiver,
    /// Requests of kind `page`.
    pub(crate) requests: mpsc::Receiver<Inbound>,
    pub(crate) tasks: Tasks,
}

/// Starts the service; it ends with its tasks, after it has paged what it holds.
pub(crate) fn start(parts: BatchesParts) -> Result<(), StoreError> {
    let tip = match parts.store.get(Keyspace::Meta, TIP_KEY)? {
        Some(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
        None => Tip::default(),
    };
    let tasks = parts.tasks.clone();
    let BatchesParts { config, network, epoch_length: length, key, net, store, entries, requests, .. } = parts;
    let open: Vec<Staged> = entries.left_over;
    let writer = Writer { config, network, length, key, net, store: store.clone(), tip, open };
    tasks.spawn("pages", writer.run(entries.rx, tasks.token()));
    tasks.spawn("serve", serve(store, length, requests, tasks.token()));
    Ok(())
}

struct Writer {
    config: BatchesConfig,
    network: Network,
    length: EpochLength,
    key: HotkeyPair,
    net: NetHandle,
    store: SharedStore,
    tip: Tip,
    open: Vec<Staged>,
}

impl Writer {
    async fn run(mut self, mut rx: mpsc::Receiver<Staged>, token: tokio_util::sync::CancellationToken) {
        let mut due = (!self.open.is_empty()).then(|| Instant::now() + PAGE_AFTER);
        loop {
            let at = due.unwrap_or_else(Instant::now);
            let staged = tokio::select! {
                biased;
                () = token.cancelled() => break,
                () = tokio::time::sleep_until(at), if due.is_some() => None,
                staged = rx.recv() => match staged {
                    Some(staged) => Some(staged),
                    None => break,
                },
            };
            if let Some(staged) = staged {
                self.open.push(staged);
                due.get_or_insert_with(|| Instant::now() + PAGE_AFTER);
                if self.open.len() < limit::PAGE_ENTRIES {
                    continue;
                }
            }
            self.page().await;
            due = (!self.open.is_empty()).then(|| Instant::now() + PAGE_AFTER);
        }
        while let Ok(staged) = rx.try_recv() {
            self.open.push(staged);
        }
        self.page().await;
    }

    /// Writes one page, as large as may be, and publishes its root.
    async fn page(&mut self) {
        let taken = self.take();
        if taken.is_empty() {
            return;
        }
        let encoded: Vec<Vec<u8>> = taken.iter().map(|s| s.entry.encode_to_vec()).collect();
        let Some(root) = merkle::root(encoded.iter().map(Vec::as_slice)) else { return };
        let now = wall_now();
        let value = Batch {
            network: self.network,
            epoch: self.length.epoch(now),
            sequence: self.tip.next_sequence,
            root,
            count: u32::try_from(taken.len()).unwrap_or(u32::MAX),
            previous: Digest(self.tip.previous),
            issued_at: now,
        };
        let batch = Signed::sign(&self.network, &self.key, value);
        let tip = Tip { next_sequence: self.tip.next_sequence + 1, previous: batch.digest().0 };
        if let Err(e) = self.keep(&batch, &taken, tip).await {
            // The entries are still in the outbox; this run goes on without them and the next start pages them.
            tracing::error!(error = %e, entries = taken.len(), "a page could not be written");
            return;
        }
        self.tip = tip;
        let gossip = pb::Gossip { kind: Some(pb::gossip::Kind::Batch(batch.to_wire())) };
        if let Err(e) = self.net.publish(Topic::Batches, gossip).await {
            // Nobody listens yet, as in a mesh of one. Pages are asked for by root, and later batches name this one.
            tracing::debug!(error = %e, "root not published");
        }
    }

    fn take(&mut self) -> Vec<Staged> {
        let mut bytes = 0;
        let fit = self.open.iter().take(limit::PAGE_ENTRIES).take_while(|s| {
            bytes += s.entry.encoded_len() + 8;
            bytes <= PAGE_BYTES_MAX
        });
        let n = fit.count().max(usize::from(!self.open.is_empty()));
        self.open.drain(..n).collect()
    }

    async fn keep(&self, batch: &Signed<Batch>, taken: &[Staged], tip: Tip) -> Result<(), StoreError> {
        let page = pb::Page { entries: taken.iter().map(|s| s.entry.clone()).collect() };
        let mut write = WriteBatch::new();
        write.put(Keyspace::Meta, TIP_KEY.to_vec(), serde_json::to_vec(&tip).unwrap_or_default());
        write.put(Keyspace::Batches, pages::batch_key(batch.epoch, batch.sequence), batch.to_wire().encode_to_vec());
        pages::put(&mut write, batch.root.0.to_vec(), batch.epoch, &page);
        for staged in taken {
            write.delete(Keyspace::Outbox, staged.key.to_vec());
        }
        self.store.commit(write).await?;
        self.forget(batch.epoch)
    }

    /// Deletes pages that are older than they are kept for, and the oldest beyond the number kept, a bounded number at a
    /// time.
    fn forget(&self, epoch: u64) -> Result<(), StoreError> {
        let oldest_epoch = epoch.saturating_sub(self.config.keep_epochs);
        // The page just written is not in `tip` yet.
        let oldest_sequence = (self.tip.next_sequence + 1).saturating_sub(self.config.keep_pages.max(1));
        let old = self.store.scan(Keyspace::Batches, &KeyRange::all(), RETAIN_STEP)?;
        let mut write = WriteBatch::new();
        for (key, value) in old.items {
            let kept = pages::batch_place(&key).is_some_and(|(epoch, n)| epoch >= oldest_epoch && n >= oldest_sequence);
            if kept {
                break;
            }
            if let Some(batch) = pages::batch_from(&value) {
                write.delete(Keyspace::Pages, batch.root.0.to_vec());
            }
            write.delete(Keyspace::Batches, key);
        }
        if !write.is_empty() {
            drop(self.store.commit_relaxed(write));
        }
        Ok(())
    }
}

async fn serve(
    store: SharedStore,
    length: EpochLength,
    mut requests: mpsc::Receiver<Inbound>,
    token: tokio_util::sync::CancellationToken,
) {
    loop {
        let inbound = tokio::select! {
            () = token.cancelled() => return,
            inbound = requests.recv() => match inbound { Some(inbound) => inbound, None => return },
        };
        let answer = match &inbound.request {
            pb::request::Kind::Page(request) => page_for(&store, length, request, inbound.peer.hotkey),
            _ => Err((FailureCode::NotServed, "not a request for a page".to_owned())),
        };
        match answer {
            Ok(page) => {
                // A caller that is gone wants no answer.
                let _gone = inbound.reply.finish(pb::response::Kind::Page(page)).await;
            }
            Err((code, detail)) => inbound.reply.fail(code, detail),
        }
    }
}

fn page_for(
    store: &SharedStore,
    length: EpochLength,
    request: &pb::PageRequest,
    asker: Hotkey,
) -> Result<pb::Page, (FailureCode, String)> {
    let unknown = || (FailureCode::Forbidden, "no such page, or it is not open to you yet".to_owned());
    let root = Digest::try_from(&request.root[..]).map_err(|_| unknown())?;
    let found = pages::get(store.as_ref(), root.as_ref()).map_err(|e| (FailureCode::Internal, e.to_string()))?;
    let (epoch, page) = found.ok_or_else(unknown)?;
    let open = length.epoch(wall_now()) >= epoch.saturating_add(pages::OPEN_AFTER_EPOCHS);
    if open {
        return Ok(page);
    }
    let own = page.entries.into_iter().filter(|entry| is_party(entry, &asker));
    let own = pb::Page { entries: own.collect() };
    if own.entries.is_empty() { Err(unknown()) } else { Ok(own) }
}

/// Whether `who` signed an entry, or is named in it as miner or validator.
fn is_party(entry: &pb::Entry, who: &Hotkey) -> bool {
    let is = |bytes: &[u8]| bytes == who.as_ref();
    match &entry.kind {
        Some(pb::entry::Kind::Receipt(r)) => is(&r.validator) || is(&r.miner),
        Some(pb::entry::Kind::Verdict(v)) => {
            is(&v.signer) || Verdict::decode(&v.payload).is_ok_and(|v| v.replicas.iter().any(|r| r.miner == *who))
        }
        Some(pb::entry::Kind::Attestation(a)) => a.countersignature.as_ref().is_some_and(|c| is(&c.signer)),
        None => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
