//! Rejoin: remembers peers that this node was connected to, so that a restart finds the mesh without its bootstrap.
//!
//! **Owns** that list in the store. **Does not own** dialling: the network gets the list when it starts and treats it as
//! any addresses that it heard of.
//!
//! **Invariants**: only peers with a certificate that held are on the list; it is one record of bounded size; losing it
//! costs a node nothing but its bootstrap's help.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sundara_proto::cert::Roles;
use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::net::{NetHandle, PeerEvent, PeerStatus};
use crate::service::Tasks;
use crate::store::{JsonTable, Keyspace, SharedStore, Store, StoreError, Table, WriteBatch};

/// Peers remembered: several times what a node holds connections to by itself.
const PEERS_MAX: usize = 64;
/// Addresses remembered of each.
const ADDRESSES_MAX: usize = 4;
/// The list is written this often while the node runs,
const EVERY: Duration = Duration::from_secs(300);
/// and so soon after someone came, with those who come at the same time.
const AFTER_CONNECT: Duration = Duration::from_secs(5);

const PEERS: JsonTable<Vec<Known>> = Table::new(Keyspace::Peers);
const KEY: &[u8] = b"rejoin";

/// A peer on the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    peer: String,
    addresses: Vec<String>,
}

/// The list of an earlier run, as addresses with `/p2p/PEER` at their end.
///
/// # Errors
/// When the store cannot be read.
pub(crate) fn known(store: &dyn Store) -> Result<Vec<libp2p::Multiaddr>, StoreError> {
    let list = PEERS.get(store, KEY)?.unwrap_or_default();
    let full = |known: Known| known.addresses.into_iter().map(move |a| format!("{a}/p2p/{}", known.peer));
    Ok(list.into_iter().flat_map(full).filter_map(|address| address.parse().ok()).collect())
}

/// Handle of the service.
pub(crate) struct Rejoin {
    net: NetHandle,
    store: SharedStore,
}

/// Starts the service; it ends with its tasks.
pub(crate) fn start(net: NetHandle, store: SharedStore, tasks: &Tasks) -> Rejoin {
    let events = net.subscribe_peers();
    let running = Rejoin { net: net.clone(), store: store.clone() };
    tasks.spawn("remember", running.run(events, tasks.token()));
    Rejoin { net, store }
}

impl Rejoin {
    async fn run(self, mut events: broadcast::Receiver<PeerEvent>, token: CancellationToken) {
        let mut due = Instant::now() + EVERY;
        loop {
            tokio::select! {
                biased;
                () = token.cancelled() => return,
                () = tokio::time::sleep_until(due) => {
                    self.save().await;
                    due = Instant::now() + EVERY;
                }
                event = events.recv() => match event {
                    Ok(PeerEvent::Connected(_)) | Err(broadcast::error::RecvError::Lagged(_)) => {
                        due = due.min(Instant::now() + AFTER_CONNECT);
                    }
                    Ok(PeerEvent::Gone(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                },
            }
        }
    }

    /// Writes down who is here, and those of before who are not, as far as there is room.
    pub(crate) async fn save(&self) {
        let before = match PEERS.get(self.store.as_ref(), KEY) {
            Ok(list) => list.unwrap_or_default(),
            Err(e) => {
                tracing::warn!(error = %e, "the list of peers to rejoin through cannot be read; it begins anew");
                Vec::new()
            }
        };
        let list = merged(self.net.peers().await, before.clone());
        if list == before {
            return;
        }
        let mut batch = WriteBatch::new();
        PEERS.put(&mut batch, KEY, &list);
        if let Err(e) = self.store.commit_relaxed(batch).await {
            tracing::warn!(error = %e, "peers to rejoin through are not remembered");
        }
    }
}

/// Those connected now, validators first, then those of before.
fn merged(now: Vec<PeerStatus>, before: Vec<Known>) -> Vec<Known> {
    let mut here: Vec<PeerStatus> =
        now.into_iter().filter(|p| p.connections > 0 && p.hotkey.is_some() && !p.addresses.is_empty()).collect();
    let rules = |p: &PeerStatus| p.roles.is_some_and(|roles| roles.contains(Roles::VALIDATOR));
    here.sort_by(|a, b| rules(b).cmp(&rules(a)).then_with(|| a.peer_id.cmp(&b.peer_id)));
    let mut list: Vec<Known> = here
        .into_iter()
        .map(|p| Known { peer: p.peer_id, addresses: p.addresses.into_iter().take(ADDRESSES_MAX).collect() })
        .collect();
    for old in before {
        if list.iter().all(|known| known.peer != old.peer) {
            list.push(old);
        }
    }
    list.truncate(PEERS_MAX);
    list
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    fn old(n: usize) -> Known {
        Known { peer: format!("old-{n:04}"), addresses: vec!["/ip4/192.0.2.1/tcp/1".to_owned()] }
    }

    #[test]
    fn the_list_is_bounded_and_keeps_what_it_knew_when_nobody_is_here() {
        let before: Vec<Known> = (0..200).map(old).collect();
        let list = merged(Vec::new(), before.clone());
        assert_eq!(list, before[..PEERS_MAX]);
    }

    #[test]
    fn what_is_kept_comes_back_as_addresses() {
        let store = MemoryStore::new();
        assert!(known(&store).unwrap().is_empty());
        let peer = libp2p::PeerId::random();
        let list = vec![
            Known { peer: peer.to_string(), addresses: vec!["/ip4/192.0.2.1/tcp/1".to_owned()] },
            Known { peer: "nobody".to_owned(), addresses: vec!["/ip4/192.0.2.1/tcp/1".to_owned()] },
        ];
        let mut batch = WriteBatch::new();
        PEERS.put(&mut batch, KEY, &list);
        store.commit(batch).wait().unwrap();
        assert_eq!(known(&store).unwrap(), [format!("/ip4/192.0.2.1/tcp/1/p2p/{peer}").parse().unwrap()]);
    }
}
