//! Adverts: what this node offers, told to the mesh; and what others offer.
//!
//! Owns this node's signed advert and the table of the others'. Does not own what is done with it: dispatch gets miners
//! through a channel and schedules as it likes.
//!
//! An advert goes out every [`PUBLISH_EVERY`], when what it says changes, and shortly after a peer came, so that a
//! validator that starts late knows its miners within a second or two. Gossip has checked signature, mesh and form before
//! an advert gets here.
//!
//! Invariants: of one node only the advert of the highest sequence counts, and none after its expiry; the table holds at
//! most [`TABLE_MAX`] nodes and [`NODES_PER_HOTKEY_MAX`] of one hotkey; adverts of this node are at least
//! [`PUBLISH_GAP`] apart.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sundara_proto::advert::{Advert, ExecutorClass};
use sundara_proto::cert::Roles;
use sundara_proto::crypto::{HotkeyPair, Network, Signed};
use sundara_proto::id::{Hotkey, ModelId, NodeId};
use sundara_proto::names::Topic;
use sundara_proto::pb;
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::limit;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::domain::schedule::MinerProfile;
use crate::net::{GossipError, GossipMessage, GossipPayload, NetHandle, PeerEvent};
use crate::service::{Tasks, wall_now};

/// Time between adverts of which nothing changed.
pub(crate) const PUBLISH_EVERY: Duration = Duration::from_secs(60);
/// Shortest time between two adverts.
pub(crate) const PUBLISH_GAP: Duration = Duration::from_millis(500);
/// A new peer needs this long to say which topics it listens to.
const AFTER_CONNECT: Duration = Duration::from_millis(200);
/// Adverts on account of new peers between two regular ones: in a large mesh peers come all the time.
const CONNECT_BUDGET: u32 = 8;
/// Shortest time between adverts on account of a validator that came. Without one it schedules nothing here, and one that
/// restarts again and again has no budget to use up.
const VALIDATOR_GAP: Duration = Duration::from_secs(2);
/// Life of an advert: three may be lost before its node is forgotten. Below [`Advert::LIFE_MAX`].
const LIFE: Duration = Duration::from_secs(200);
/// Nodes whose adverts are kept: each takes about 1 KiB.
const TABLE_MAX: usize = 4_096;
/// Nodes of one hotkey, so that nobody fills the table alone.
const NODES_PER_HOTKEY_MAX: usize = 8;
/// Addresses told.
const ADDRESSES_MAX: usize = 16;

/// What the service needs from the rest of the node.
pub(crate) struct AdvertsParts {
    pub(crate) network: Network,
    pub(crate) key: HotkeyPair,
    pub(crate) net: NetHandle,
    /// What the pool of executors can run; `None` on nodes that run nothing.
    pub(crate) offering: Option<watch::Receiver<Vec<ExecutorClass>>>,
    /// Models whose blobs are here.
    pub(crate) models: watch::Receiver<Vec<ModelId>>,
    /// Where dispatch hears of miners; `None` on nodes that schedule nothing.
    pub(crate) miners: Option<mpsc::Sender<MinerProfile>>,
    pub(crate) tasks: Tasks,
}

/// Handle of the service. Clones share it.
#[derive(Clone)]
pub(crate) struct AdvertsHandle {
    /// Number of miners that could run something.
    miners: watch::Receiver<usize>,
}

impl AdvertsHandle {
    /// Waits until `n` miners that could run a job are known. Cancel safe.
    pub(crate) async fn wait_for_miners(&self, n: usize) {
        let mut miners = self.miners.clone();
        if miners.wait_for(|known| *known >= n).await.is_err() {
            // The node shuts down; whoever waits is being cancelled too.
            std::future::pending::<()>().await;
        }
    }
}

/// Starts the service; it ends with its tasks.
pub(crate) async fn start(parts: AdvertsParts) -> AdvertsHandle {
    let table = Mutex::new(Table::default());
    let (count, miners) = watch::channel(0);
    let heard = parts.net.subscribe(Topic::Adverts).await;
    let peers = parts.net.subscribe_peers();
    let token = parts.tasks.token();
    let listener = Listener { network: parts.network, table, count, feed: parts.miners };
    parts.tasks.spawn("listen", listener.run(heard, token.clone()));
    if let Some(offering) = parts.offering {
        let publisher = Publisher {
            network: parts.network,
            key: parts.key,
            net: parts.net,
            offering,
            models: parts.models,
            last: None,
            budget: CONNECT_BUDGET,
            sequence: 0,
        };
        parts.tasks.spawn("publish", publisher.run(peers, token));
    }
    AdvertsHandle { miners }
}

struct Publisher {
    network: Network,
    key: HotkeyPair,
    net: NetHandle,
    offering: watch::Receiver<Vec<ExecutorClass>>,
    models: watch::Receiver<Vec<ModelId>>,
    last: Option<Instant>,
    budget: u32,
    sequence: u64,
}

impl Publisher {
    async fn run(mut self, mut peers: broadcast::Receiver<PeerEvent>, token: CancellationToken) {
        let mut due = Instant::now();
        // A source that is gone says nothing new; what it said last holds.
        let (mut classes_change, mut models_change) = (true, true);
        loop {
            let wake = tokio::select! {
                biased;
                () = token.cancelled() => return,
                () = tokio::time::sleep_until(due) => None,
                changed = self.offering.changed(), if classes_change => {
                    classes_change = changed.is_ok();
                    changed.ok().map_or(Some(PUBLISH_EVERY), |()| Some(Duration::ZERO))
                }
                changed = self.models.changed(), if models_change => {
                    models_change = changed.is_ok();
                    changed.ok().map_or(Some(PUBLISH_EVERY), |()| Some(Duration::ZERO))
                }
                event = peers.recv() => match event {
                    Ok(PeerEvent::Connected(peer)) if peer.roles.contains(Roles::VALIDATOR) => {
                        let gap = self.last.map_or(Duration::ZERO, |last| VALIDATOR_GAP.saturating_sub(last.elapsed()));
                        Some(AFTER_CONNECT.max(gap))
                    }
                    Ok(PeerEvent::Connected(_)) | Err(broadcast::error::RecvError::Lagged(_)) => self.for_newcomer(),
                    Ok(_) => continue,
                    Err(broadcast::error::RecvError::Closed) => return,
                },
            };
            let now = Instant::now();
            if let Some(delay) = wake {
                let gap_over = self.last.map_or(now, |last| last + PUBLISH_GAP);
                due = due.min(gap_over.max(now + delay));
                continue;
            }
            due = now + self.publish().await;
        }
    }

    fn for_newcomer(&mut self) -> Option<Duration> {
        self.budget = self.budget.saturating_sub(1);
        // Without a budget the newcomer waits for the regular advert.
        Some(if self.budget == 0 { PUBLISH_EVERY } else { AFTER_CONNECT })
    }

    /// Sends one advert and says when the next is due.
    async fn publish(&mut self) -> Duration {
        if self.last.is_none_or(|last| last.elapsed() >= PUBLISH_EVERY) {
            self.budget = CONNECT_BUDGET;
        }
        self.last = Some(Instant::now());
        let advert = self.advert().await;
        let gossip = pb::Gossip { kind: Some(pb::gossip::Kind::Advert(advert.to_wire())) };
        match self.net.publish(Topic::Adverts, gossip).await {
            Ok(()) => PUBLISH_EVERY,
            // A peer that has just come is not on the topic yet; one that never comes costs one advert a minute.
            Err(GossipError::NoPeers) if self.budget > 0 => {
                self.budget -= 1;
                PUBLISH_GAP * 2
            }
            Err(e) => {
                tracing::debug!(error = %e, "advert not published");
                PUBLISH_EVERY
            }
        }
    }

    async fn advert(&mut self) -> Signed<Advert> {
        let now = wall_now();
        // The time, so that it rises over restarts too.
        self.sequence = now.0.max(self.sequence + 1);
        let local = self.net.local();
        let addresses = match self.net.status().await {
            Ok(status) if !status.external.is_empty() => status.external,
            Ok(status) => status.listen,
            Err(_) => Vec::new(),
        };
        let mut classes = self.offering.borrow_and_update().clone();
        classes.truncate(limit::ADVERT_ITEMS);
        let mut models = self.models.borrow_and_update().clone();
        models.truncate(limit::ADVERT_ITEMS);
        let advert = Advert {
            network: self.network,
            node: local.node,
            sequence: self.sequence,
            issued_at: now,
            expires_at: now.plus(LIFE),
            roles: local.roles,
            classes,
            addresses: addresses.into_iter().take(ADDRESSES_MAX).collect(),
            models,
        };
        Signed::sign(&self.network, &self.key, advert)
    }
}

#[derive(Default)]
struct Table {
    /// Under the hotkey that signed too: nobody can keep a node out by speaking for it first.
    nodes: HashMap<(NodeId, Hotkey), Arc<Signed<Advert>>>,
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Table {
    /// Takes an advert in, unless it is old or there is no room. True when it is news.
    fn insert(&mut self, advert: &Arc<Signed<Advert>>, now: UnixMillis) -> bool {
        let in_time = advert.issued_at <= now.plus(UnixMillis::SKEW_MAX) && advert.expires_at >= now;
        if !in_time {
            return false;
        }
        let key = (advert.node, advert.hotkey());
        match self.nodes.get(&key) {
            Some(known) if known.sequence >= advert.sequence => return false,
            Some(_) => {}
            None => {
                if self.is_full_for(&advert.hotkey()) {
                    self.expire(now);
                }
                if self.is_full_for(&advert.hotkey()) {
                    return false;
                }
            }
        }
        self.nodes.insert(key, advert.clone());
        true
    }

    fn is_full_for(&self, hotkey: &Hotkey) -> bool {
        let of_hotkey = self.nodes.values().filter(|a| a.hotkey() == *hotkey).count();
        self.nodes.len() >= TABLE_MAX || of_hotkey >= NODES_PER_HOTKEY_MAX
    }

    fn expire(&mut self, now: UnixMillis) {
        self.nodes.retain(|_, advert| advert.expires_at >= now);
    }

    fn miners(&self, now: UnixMillis) -> usize {
        self.nodes.values().filter(|a| a.expires_at >= now && could_run(a)).count()
    }
}

fn could_run(advert: &Advert) -> bool {
    advert.roles.contains(Roles::MINER) && advert.classes.iter().any(|c| c.slots > 0 && !c.engines.is_empty())
}

struct Listener {
    network: Network,
    table: Mutex<Table>,
    count: watch::Sender<usize>,
    feed: Option<mpsc::Sender<MinerProfile>>,
}

impl Listener {
    async fn run(self, mut heard: mpsc::Receiver<GossipMessage>, token: CancellationToken) {
        let mut sweep = tokio::time::interval(PUBLISH_EVERY);
        loop {
            let message = tokio::select! {
                biased;
                () = token.cancelled() => return,
                message = heard.recv() => match message { Some(message) => message, None => return },
                _ = sweep.tick() => {
                    lock(&self.table).expire(wall_now());
                    self.recount();
                    continue;
                }
            };
            let GossipPayload::Advert(advert) = message.payload else { continue };
            self.on_advert(Arc::new(advert));
        }
    }

    fn on_advert(&self, advert: Arc<Signed<Advert>>) {
        if advert.network != self.network || !lock(&self.table).insert(&advert, wall_now()) {
            return;
        }
        if let Some(feed) = &self.feed
            && advert.roles.contains(Roles::MINER)
        {
            let profile = MinerProfile {
                hotkey: advert.hotkey(),
                owner: advert.hotkey().into(),
                node: advert.node,
                classes: advert.classes.clone(),
                models: advert.models.clone(),
                expires_at: advert.expires_at,
            };
            if feed.try_send(profile).is_err() {
                tracing::debug!(miner = %advert.hotkey(), "dispatch lags; the miner's next advert will do");
            }
        }
        self.recount();
    }

    fn recount(&self) {
        let known = lock(&self.table).miners(wall_now());
        self.count.send_if_modified(|old| std::mem::replace(old, known) != known);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::services::work::harness::{TestNode, network};
    use sundara_proto::id::EngineId;

    fn advert(key: u8, node: u8, sequence: u64, expires_at: u64) -> Arc<Signed<Advert>> {
        let network = Network::named("adverts", 1);
        let class =
            ExecutorClass { hardware_class: "cpu".into(), slots: 1, engines: vec![EngineId([1; 32])], price: 0 };
        let advert = Advert {
            network,
            node: NodeId([node; 32]),
            sequence,
            issued_at: UnixMillis(1_000),
            expires_at: UnixMillis(expires_at),
            roles: Roles::MINER,
            classes: vec![class],
            addresses: Vec::new(),
            models: Vec::new(),
        };
        Arc::new(Signed::sign(&network, &HotkeyPair::from_seed(&[key; 32]), advert))
    }

    #[test]
    fn the_highest_sequence_of_a_node_wins() {
        let mut table = Table::default();
        let now = UnixMillis(1_000);
        assert!(table.insert(&advert(1, 1, 5, 9_000), now));
        assert!(!table.insert(&advert(1, 1, 5, 9_500), now), "the same again");
        assert!(!table.insert(&advert(1, 1, 4, 9_500), now), "an older one");
        assert!(table.insert(&advert(1, 1, 6, 9_500), now));
        assert_eq!(table.miners(now), 1);
        assert!(table.insert(&advert(2, 1, 2, 9_500), now), "who speaks for a node first keeps nobody else out");
    }

    #[test]
    fn adverts_lapse_and_free_their_place() {
        let mut table = Table::default();
        assert!(table.insert(&advert(1, 1, 5, 2_000), UnixMillis(1_000)));
        assert!(!table.insert(&advert(1, 2, 5, 2_000), UnixMillis(2_001)), "lapsed on arrival");
        assert_eq!(table.miners(UnixMillis(2_001)), 0);
        table.expire(UnixMillis(2_001));
        assert!(table.nodes.is_empty());
    }

    #[test]
    fn no_hotkey_fills_the_table() {
        let mut table = Table::default();
        let now = UnixMillis(1_000);
        let taken = (0..50).filter(|n| table.insert(&advert(1, *n, 1, 9_000), now)).count();
        assert_eq!(taken, NODES_PER_HOTKEY_MAX);
        assert!(table.insert(&advert(2, 99, 1, 9_000), now), "others still get in");
    }

    /// A miner's side: the handle, and what its pool offers.
    async fn advertise(node: &TestNode) -> watch::Sender<Vec<ExecutorClass>> {
        let (classes, offering) = watch::channel(Vec::new());
        start(AdvertsParts {
            network: network(),
            key: node.key.clone(),
            net: node.net.clone(),
            offering: Some(offering),
            models: watch::channel(vec![ModelId([4; 32])]).1,
            miners: None,
            tasks: node.tasks.child("adverts"),
        })
        .await;
        classes
    }

    #[tokio::test]
    async fn a_validator_that_comes_late_learns_its_miners() {
        let miner = TestNode::start(90, Roles::MINER).await;
        let classes = advertise(&miner).await;
        classes.send_replace(vec![ExecutorClass {
            hardware_class: "cpu".into(),
            slots: 2,
            engines: vec![EngineId([1; 32])],
            price: 0,
        }]);
        let validator = TestNode::start(91, Roles::VALIDATOR).await;
        let (feed, mut miners) = mpsc::channel(4);
        let adverts = start(AdvertsParts {
            network: network(),
            key: validator.key.clone(),
            net: validator.net.clone(),
            offering: None,
            models: watch::channel(Vec::new()).1,
            miners: Some(feed),
            tasks: validator.tasks.child("adverts"),
        })
        .await;
        validator.join(&miner).await;
        adverts.wait_for_miners(1).await;
        let mut profile = miners.recv().await.unwrap();
        // An advert from before its executor came may have been first.
        while profile.classes.is_empty() {
            profile = miners.recv().await.unwrap();
        }
        assert_eq!((profile.hotkey, profile.node), (miner.key.hotkey(), miner.id()));
        assert_eq!((profile.classes[0].slots, &profile.models[..]), (2, &[ModelId([4; 32])][..]));
        // Its executors go: the validator hears that too.
        classes.send_replace(Vec::new());
        let mut known = adverts.miners.clone();
        known.wait_for(|n| *n == 0).await.unwrap();
    }
}
