//! The DHT: queries of this node, records of peers, and who is in the routing table.

use std::collections::HashMap;
use std::time::Instant;

use libp2p::kad::{
    self, GetProvidersOk, GetRecordOk, InboundRequest, ProviderRecord, QueryId, QueryResult, Quorum, Record, RecordKey,
    store::RecordStore as _,
};
use libp2p::{Multiaddr, PeerId};
use sundara_proto::id::{Digest, NodeId};
use tokio::sync::oneshot;

use super::NetDriver;
use super::gossip::Work;
use crate::net::dht::{self, Checked, Command, DhtError, FOUND_MAX, QUERIES_MAX};
use crate::net::id::node_id;
use crate::net::limits::is_global;

/// Providers told to one caller.
const PROVIDERS_MAX: usize = 64;
/// Answers after which a lookup of a record ends: as many as would have to lie together.
const ENOUGH_RECORDS: usize = 5;

/// A query and who waits for it.
enum Waiting {
    Put(oneshot::Sender<Result<(), DhtError>>),
    Get {
        done: oneshot::Sender<Result<Vec<Vec<u8>>, DhtError>>,
        found: Vec<Vec<u8>>,
    },
    Provide(oneshot::Sender<Result<(), DhtError>>),
    FindProviders {
        done: oneshot::Sender<Result<Vec<NodeId>, DhtError>>,
        found: Vec<NodeId>,
    },
    /// Looks for the addresses of a peer that somebody wants to reach.
    FindPeer(PeerId),
}

/// Queries that run.
#[derive(Default)]
pub(super) struct Queries {
    running: HashMap<QueryId, Waiting>,
}

fn key_of(key: Digest) -> RecordKey {
    RecordKey::new(&key.as_bytes())
}

impl NetDriver {
    fn kad(&mut self) -> &mut kad::Behaviour<dht::Store> {
        &mut self.swarm.behaviour_mut().kad.inner
    }

    pub(super) fn purge_records(&mut self, now: Instant) {
        self.kad().store_mut().purge(now);
    }

    pub(super) fn on_dht(&mut self, command: Command) {
        // A caller that is gone does not need the answer; so in this whole file.
        let busy = self.queries.running.len() >= QUERIES_MAX;
        match command {
            Command::Put { done, .. } if busy => drop(done.send(Err(DhtError::Busy))),
            Command::Get { done, .. } if busy => drop(done.send(Err(DhtError::Busy))),
            Command::Provide { done, .. } if busy => drop(done.send(Err(DhtError::Busy))),
            Command::FindProviders { done, .. } if busy => drop(done.send(Err(DhtError::Busy))),
            Command::Put { key, value, done } => self.put(key, value, done),
            Command::Get { key, done } => {
                let query = self.kad().get_record(key_of(key));
                self.queries.running.insert(query, Waiting::Get { done, found: Vec::new() });
            }
            Command::Provide { key, done } => match self.kad().start_providing(key_of(key)) {
                Ok(query) => {
                    self.queries.running.insert(query, Waiting::Provide(done));
                }
                Err(error) => drop(done.send(Err(DhtError::Full(error.to_string())))),
            },
            Command::StopProviding { key, done } => {
                self.kad().stop_providing(&key_of(key));
                drop(done.send(Ok(())));
            }
            Command::FindProviders { key, done } => {
                let query = self.kad().get_providers(key_of(key));
                self.queries.running.insert(query, Waiting::FindProviders { done, found: Vec::new() });
            }
        }
    }

    fn put(&mut self, key: Digest, value: Vec<u8>, done: oneshot::Sender<Result<(), DhtError>>) {
        let checked = match dht::check(&self.shared.network, key.as_ref(), &value, dht::wall_clock()) {
            Ok(checked) => checked,
            Err(why) => return drop(done.send(Err(DhtError::Refused(why)))),
        };
        let mut record = Record::new(key_of(key), value);
        record.expires = Some(Instant::now() + checked.life);
        match self.kad().put_record(record, Quorum::One) {
            Ok(query) => {
                self.queries.running.insert(query, Waiting::Put(done));
            }
            Err(error) => drop(done.send(Err(DhtError::Full(error.to_string())))),
        }
    }

    /// Looks for the addresses of a peer. Says whether a query could be started.
    pub(super) fn find_peer(&mut self, peer: PeerId) -> bool {
        if self.queries.running.len() >= QUERIES_MAX {
            return false;
        }
        let query = self.kad().get_closest_peers(peer);
        self.queries.running.insert(query, Waiting::FindPeer(peer));
        true
    }

    pub(super) fn on_kad(&mut self, event: kad::Event) {
        match event {
            kad::Event::OutboundQueryProgressed { id, result, step, .. } => self.on_progress(id, result, step.last),
            kad::Event::InboundRequest { request } => self.on_dht_request(request),
            _ => {}
        }
    }

    fn on_progress(&mut self, id: QueryId, result: QueryResult, last: bool) {
        match result {
            QueryResult::GetRecord(Ok(GetRecordOk::FoundRecord(found))) => self.on_found(id, found.record.value),
            QueryResult::GetProviders(Ok(GetProvidersOk::FoundProviders { providers, .. })) => {
                if let Some(Waiting::FindProviders { found, .. }) = self.queries.running.get_mut(&id) {
                    let me = self.swarm.local_peer_id();
                    for node in providers.iter().filter(|p| *p != me).filter_map(node_id) {
                        if found.len() < PROVIDERS_MAX && !found.contains(&node) {
                            found.push(node);
                        }
                    }
                }
            }
            QueryResult::GetClosestPeers(Ok(ref found)) => {
                let now = tokio::time::Instant::now();
                for info in found.peers.iter().take(PROVIDERS_MAX) {
                    for address in info.addrs.iter().take(dht::ADDRESSES) {
                        self.peers.learn(info.peer_id, address.clone(), now);
                    }
                }
                self.finish(id, None, last);
                return;
            }
            QueryResult::PutRecord(Err(error)) => return self.finish(id, Some(put_error(&error)), last),
            QueryResult::StartProviding(Err(_))
            | QueryResult::GetProviders(Err(_))
            | QueryResult::GetRecord(Err(kad::GetRecordError::Timeout { .. })) => {
                return self.finish(id, Some(DhtError::TimedOut), last);
            }
            _ => {}
        }
        self.finish(id, None, last);
    }

    fn on_found(&mut self, id: QueryId, value: Vec<u8>) {
        let Some(Waiting::Get { found, .. }) = self.queries.running.get_mut(&id) else { return };
        if found.len() < FOUND_MAX {
            found.push(value);
        }
        if found.len() >= ENOUGH_RECORDS
            && let Some(mut query) = self.kad().query_mut(&id)
        {
            query.finish();
        }
    }

    /// Ends a query at its last event. What was found before a timeout still counts.
    fn finish(&mut self, id: QueryId, error: Option<DhtError>, last: bool) {
        if !last {
            return;
        }
        match self.queries.running.remove(&id) {
            Some(Waiting::Put(done)) => drop(done.send(error.map_or(Ok(()), Err))),
            Some(Waiting::Provide(done)) => drop(done.send(error.map_or(Ok(()), Err))),
            Some(Waiting::Get { done, found }) => {
                let answer = if found.is_empty() { error.map_or(Ok(found), Err) } else { Ok(found) };
                drop(done.send(answer));
            }
            Some(Waiting::FindProviders { done, found }) => {
                let answer = if found.is_empty() { error.map_or(Ok(found), Err) } else { Ok(found) };
                drop(done.send(answer));
            }
            Some(Waiting::FindPeer(peer)) => self.on_peer_looked_up(peer),
            None => {}
        }
    }

    fn on_dht_request(&mut self, request: InboundRequest) {
        match request {
            InboundRequest::PutRecord { source, record: Some(record), .. } => {
                let room = self.judge.try_send(Work::Record { from: source, record });
                if room.is_err() {
                    self.shared.metrics.dht_records_refused.inc();
                }
            }
            InboundRequest::AddProvider { record: Some(record) } => self.on_provider(record),
            _ => {}
        }
    }

    /// A record of a peer, checked by the worker.
    pub(super) fn on_record_checked(
        &mut self,
        from: PeerId,
        mut record: Record,
        checked: Result<Box<Checked>, &'static str>,
    ) {
        let network = self.shared.network;
        let stored = checked.and_then(|new| {
            let kad = self.kad();
            // What lies there was checked when it was stored; an expired one no longer counts.
            let old = kad.store_mut().get(&record.key).map(|old| old.value.clone());
            let old = old.and_then(|old| dht::check(&network, record.key.as_ref(), &old, dht::wall_clock()).ok());
            if let Some(old) = old
                && !dht::replaces(&new.record, &old.record)
            {
                return Err("it is not newer than what is stored");
            }
            record.expires = Some(Instant::now() + new.life);
            record.publisher = None;
            kad.store_mut().put(record).map_err(|_| "the store is full")
        });
        match stored {
            Ok(()) => drop(self.shared.metrics.dht_records_stored.inc()),
            Err(why) => {
                self.shared.metrics.dht_records_refused.inc();
                tracing::debug!(peer = %from, why, "DHT record refused");
            }
        }
    }

    fn on_provider(&mut self, mut record: ProviderRecord) {
        let life = Instant::now() + dht::PROVIDER_LIFE;
        record.expires = Some(record.expires.map_or(life, |at| at.min(life)));
        let provider = record.provider;
        record.addresses.retain(|address| self.is_useful(&provider, address));
        if self.kad().store_mut().add_provider(record).is_err() {
            self.shared.metrics.dht_records_refused.inc();
        }
    }

    /// Whether an address of a peer is worth keeping: private ones are, only of peers that we reach over private ones
    /// ourselves. Others would poison the routing tables of everyone outside.
    pub(super) fn is_useful(&self, peer: &PeerId, address: &Multiaddr) -> bool {
        if is_global(address) || self.config.keep_private_addresses {
            return true;
        }
        self.connections.values().any(|c| c.peer == *peer && !c.relayed && !is_global(&c.address))
    }

    /// Puts a certified peer that serves the DHT into the routing table, or takes it out.
    pub(super) fn update_routing(&mut self, peer: PeerId) {
        let Some(known) = self.peers.get(&peer) else { return };
        if known.serves_dht && self.is_agreed(&peer) {
            let first = self.routing_is_empty();
            for address in self.peers.get(&peer).map(|p| p.addresses.clone()).unwrap_or_default() {
                self.kad().add_address(&peer, address);
            }
            if first {
                // Nothing to ask is said by the error, and the next peer asks again.
                let _ = self.kad().bootstrap();
            }
        } else {
            self.kad().remove_peer(&peer);
        }
    }

    fn routing_is_empty(&mut self) -> bool {
        self.kad().kbuckets().next().is_none()
    }
}

fn put_error(error: &kad::PutRecordError) -> DhtError {
    match error {
        kad::PutRecordError::QuorumFailed { .. } => DhtError::NoPeers("none answered".to_owned()),
        kad::PutRecordError::Timeout { .. } => DhtError::TimedOut,
    }
}
