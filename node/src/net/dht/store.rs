//! What this node keeps for the DHT, in memory, bounded in every direction.
//!
//! Kademlia's own memory store keeps expired provider entries for ever and lets one peer fill it; this one does neither.
//! Invariant: at most [`RECORDS`] records, [`PROVIDER_KEYS`] keys with [`PROVIDERS_PER_KEY`] providers each, and
//! [`KEYS_PER_PROVIDER`] keys for one provider other than this node.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::Instant;

use libp2p::PeerId;
use libp2p::kad::store::{Error, RecordStore, Result};
use libp2p::kad::{ProviderRecord, Record, RecordKey};
use sundara_proto::wire::limit;

/// Records kept; at 4 KiB each that is 16 MiB at most. rust-libp2p's default is 1,024.
const RECORDS: usize = 4096;
/// Keys with providers. A published model has one for each artifact.
const PROVIDER_KEYS: usize = 4096;
/// Providers of one key: the replication factor, as in rust-libp2p.
const PROVIDERS_PER_KEY: usize = 20;
/// Keys that one peer may say it provides here.
const KEYS_PER_PROVIDER: usize = 512;
/// Addresses kept of one provider entry.
pub(in crate::net) const ADDRESSES: usize = 4;

/// The store. See the module.
pub(in crate::net) struct Store {
    me: PeerId,
    records: HashMap<RecordKey, Record>,
    providers: HashMap<RecordKey, Vec<ProviderRecord>>,
    keys_of: HashMap<PeerId, usize>,
}

impl Store {
    pub(in crate::net) fn new(me: PeerId) -> Self {
        Self { me, records: HashMap::new(), providers: HashMap::new(), keys_of: HashMap::new() }
    }

    /// Forgets what has expired.
    pub(in crate::net) fn purge(&mut self, now: Instant) {
        self.records.retain(|_, record| !record.is_expired(now));
        let keys_of = &mut self.keys_of;
        self.providers.retain(|_, providers| {
            providers.retain(|p| {
                let live = !p.is_expired(now);
                if !live {
                    discount(keys_of, &p.provider);
                }
                live
            });
            !providers.is_empty()
        });
    }
}

fn discount(keys_of: &mut HashMap<PeerId, usize>, peer: &PeerId) {
    if let Some(count) = keys_of.get_mut(peer) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            keys_of.remove(peer);
        }
    }
}

impl RecordStore for Store {
    type RecordsIter<'a> = Box<dyn Iterator<Item = Cow<'a, Record>> + 'a>;
    type ProvidedIter<'a> = Box<dyn Iterator<Item = Cow<'a, ProviderRecord>> + 'a>;

    fn get(&self, key: &RecordKey) -> Option<Cow<'_, Record>> {
        self.records.get(key).map(Cow::Borrowed)
    }

    fn put(&mut self, record: Record) -> Result<()> {
        if record.value.len() > limit::DHT_RECORD {
            return Err(Error::ValueTooLarge);
        }
        if self.records.len() >= RECORDS && !self.records.contains_key(&record.key) {
            return Err(Error::MaxRecords);
        }
        self.records.insert(record.key.clone(), record);
        Ok(())
    }

    fn remove(&mut self, key: &RecordKey) {
        self.records.remove(key);
    }

    fn records(&self) -> Self::RecordsIter<'_> {
        Box::new(self.records.values().map(Cow::Borrowed))
    }

    fn add_provider(&mut self, mut record: ProviderRecord) -> Result<()> {
        record.addresses.truncate(ADDRESSES);
        let full = self.providers.len() >= PROVIDER_KEYS && !self.providers.contains_key(&record.key);
        let known = self.providers.get(&record.key).is_some_and(|all| all.contains(&record));
        let used = self.keys_of.get(&record.provider).copied().unwrap_or(0);
        if full || (!known && record.provider != self.me && used >= KEYS_PER_PROVIDER) {
            return Err(Error::MaxProvidedKeys);
        }
        let providers = self.providers.entry(record.key.clone()).or_default();
        if let Some(same) = providers.iter_mut().find(|p| p.provider == record.provider) {
            *same = record;
            return Ok(());
        }
        *self.keys_of.entry(record.provider).or_insert(0) += 1;
        providers.push(record);
        if providers.len() > PROVIDERS_PER_KEY {
            // The one that expires first goes, but never this node.
            let me = self.me;
            let oldest =
                (0..providers.len()).filter(|i| providers[*i].provider != me).min_by_key(|i| providers[*i].expires);
            if let Some(oldest) = oldest {
                let gone = providers.swap_remove(oldest);
                discount(&mut self.keys_of, &gone.provider);
            }
        }
        Ok(())
    }

    fn providers(&self, key: &RecordKey) -> Vec<ProviderRecord> {
        let now = Instant::now();
        let all = self.providers.get(key).map(Vec::as_slice).unwrap_or_default();
        all.iter().filter(|p| !p.is_expired(now)).cloned().collect()
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        Box::new(self.providers.values().flatten().filter(|p| p.provider == self.me).map(Cow::Borrowed))
    }

    fn remove_provider(&mut self, key: &RecordKey, peer: &PeerId) {
        if let Some(providers) = self.providers.get_mut(key) {
            let before = providers.len();
            providers.retain(|p| p.provider != *peer);
            if providers.len() < before {
                discount(&mut self.keys_of, peer);
            }
            if providers.is_empty() {
                self.providers.remove(key);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn entry(key: u32, provider: PeerId) -> ProviderRecord {
        ProviderRecord::new(key.to_le_bytes().to_vec(), provider, Vec::new())
    }

    #[test]
    fn one_peer_cannot_fill_the_store() {
        let mut store = Store::new(PeerId::random());
        let greedy = PeerId::random();
        let taken = (0..2000).filter(|i| store.add_provider(entry(*i, greedy)).is_ok()).count();
        assert_eq!(taken, KEYS_PER_PROVIDER);
        store.remove_provider(&entry(0, greedy).key, &greedy);
        store.add_provider(entry(5000, greedy)).unwrap();
        assert!(store.add_provider(entry(5001, greedy)).is_err());
    }

    #[test]
    fn a_key_keeps_this_node_and_the_freshest_others() {
        let me = PeerId::random();
        let mut store = Store::new(me);
        let now = Instant::now();
        store.add_provider(entry(1, me)).unwrap();
        for life in 0..100 {
            let mut other = entry(1, PeerId::random());
            other.expires = Some(now + std::time::Duration::from_secs(100 + life));
            store.add_provider(other).unwrap();
        }
        let kept = store.providers(&entry(1, me).key);
        assert_eq!(kept.len(), PROVIDERS_PER_KEY);
        assert!(kept.iter().any(|p| p.provider == me));
        assert_eq!(store.provided().count(), 1);
        store.purge(now + std::time::Duration::from_secs(10_000));
        assert_eq!(store.providers(&entry(1, me).key).len(), 1, "only what does not expire is left");
        assert_eq!(store.keys_of.len(), 1);
    }
}
