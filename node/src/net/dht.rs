//! The DHT: which records may be stored here, and which of those found win.
//!
//! Owns the rules for records and provider entries, and the store's bounds. Does not own routing (Kademlia) nor which
//! version of a model a node runs (the registry).
//!
//! Invariants: a value is stored only if it is a [`ModelRecord`], signed, unexpired, of this mesh, and under the key that
//! follows from its signer and name; it replaces only an older one. Records of a peer without a certificate never arrive.

mod store;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::Message as _;
use sundara_proto::crypto::{Network, Signed};
use sundara_proto::id::{Digest, NodeId};
use sundara_proto::model::ModelRecord;
use sundara_proto::names;
use sundara_proto::pb;
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::{self, limit};
use tokio::sync::oneshot;

pub(super) use store::{ADDRESSES, Store};

/// Life of a provider entry at others; renewed every six hours.
pub(super) const PROVIDER_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Lookups of this node that run at once.
pub(super) const QUERIES_MAX: usize = 256;
/// Records found by one lookup that are looked at.
pub(super) const FOUND_MAX: usize = 64;

/// Why a DHT call failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DhtError {
    /// Peers would not take it.
    #[error("record is refused: {0}")]
    Refused(&'static str),
    /// Nobody else stores it.
    #[error("no reachable peer took it: {0}; is a bootstrap connected?")]
    NoPeers(String),
    /// This node holds as many as it may.
    #[error("{0}")]
    Full(String),
    /// Too many lookups run.
    #[error("too many DHT queries run at once: try later")]
    Busy,
    /// The query ran out of time.
    #[error("DHT query timed out")]
    TimedOut,
    /// The node is shutting down.
    #[error("network is shut down")]
    Closed,
}

/// What the loop is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    Put { key: Digest, value: Vec<u8>, done: oneshot::Sender<Result<(), DhtError>> },
    Get { key: Digest, done: oneshot::Sender<Result<Vec<Vec<u8>>, DhtError>> },
    Provide { key: Digest, done: oneshot::Sender<Result<(), DhtError>> },
    StopProviding { key: Digest, done: oneshot::Sender<Result<(), DhtError>> },
    FindProviders { key: Digest, done: oneshot::Sender<Result<Vec<NodeId>, DhtError>> },
}

/// A record that may be stored, and until when.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) record: Signed<ModelRecord>,
    pub(super) life: Duration,
}

/// Checks a value against its key. `now` by our clock.
pub(super) fn check(network: &Network, key: &[u8], value: &[u8], now: UnixMillis) -> Result<Checked, &'static str> {
    let value = bytes::Bytes::copy_from_slice(value.get(..limit::DHT_RECORD.min(value.len())).unwrap_or_default());
    let raw: pb::Signed = wire::decode_raw(value, limit::DHT_RECORD).map_err(|_| "it is not a signed message")?;
    let record = Signed::<ModelRecord>::verify(network, raw).map_err(|_| "its signature or form is wrong")?;
    if record.network != *network {
        return Err("it is for another mesh");
    }
    let right = names::model_record_key(network, &record.publisher(), &record.name);
    if right.as_ref() != key {
        return Err("it is under a key that its publisher and name do not have");
    }
    if record.expires_at <= now {
        return Err("it has expired");
    }
    if record.issued_at > now.plus(UnixMillis::SKEW_MAX) {
        return Err("it is dated ahead");
    }
    let life = now.until(record.expires_at);
    Ok(Checked { record, life })
}

/// Whether `new` takes the place of `old` under one key: a higher version does, and of one version a later signature of
/// the same model. Another digest for the same version is equivocation: neither wins here, readers see both.
pub(super) fn replaces(new: &ModelRecord, old: &ModelRecord) -> bool {
    (new.version, new.model == old.model, new.expires_at) > (old.version, true, old.expires_at)
}

/// The records of a lookup that hold, best first, without doubles.
pub(super) fn select(network: &Network, key: Digest, found: Vec<Vec<u8>>, now: UnixMillis) -> Vec<Vec<u8>> {
    let mut good: Vec<Signed<ModelRecord>> = Vec::new();
    for value in found.into_iter().take(FOUND_MAX) {
        if let Ok(checked) = check(network, key.as_ref(), &value, now)
            && !good.contains(&checked.record)
        {
            good.push(checked.record);
        }
    }
    good.sort_by_key(|record| std::cmp::Reverse((record.version, record.expires_at)));
    good.into_iter().map(|record| record.to_wire().encode_to_vec()).collect()
}

/// This machine's clock. Decides only what is stale, never who is to blame.
pub(super) fn wall_clock() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
