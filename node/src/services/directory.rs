//! Who is connected: a small map kept from peer events, so that neither submitting nor scheduling asks the network.

use std::collections::HashMap;
use std::sync::Arc;

use sundara_proto::cert::Roles;
use sundara_proto::id::{Hotkey, NodeId};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::net::{NetHandle, PeerEvent, PeerIdentity, PeerState};
use crate::service::Tasks;

/// Connected peers at one moment, this node included.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct View {
    /// By node.
    pub(crate) peers: HashMap<NodeId, PeerIdentity>,
    /// Those that rule on jobs, by hotkey.
    pub(crate) validators: HashMap<Hotkey, NodeId>,
}

impl View {
    fn new(peers: HashMap<NodeId, PeerIdentity>) -> Self {
        let rule = peers.values().filter(|p| p.roles.contains(Roles::VALIDATOR));
        let validators = rule.map(|p| (p.hotkey, p.node)).collect();
        Self { peers, validators }
    }
}

/// The view, shared and followed.
#[derive(Clone)]
pub(crate) struct Directory {
    now: watch::Receiver<Arc<View>>,
}

impl Directory {
    /// Follows peer events until the tasks end.
    pub(crate) fn start(net: &NetHandle, tasks: &Tasks) -> Self {
        // Subscribed before the first look, so that nobody who comes in between is missed.
        let events = net.subscribe_peers();
        let local = net.local();
        let first = View::new([(local.node, local)].into());
        let (tx, now) = watch::channel(Arc::new(first));
        tasks.spawn("directory", follow(net.clone(), events, tx, tasks.token()));
        Self { now }
    }

    /// As of now.
    pub(crate) fn snapshot(&self) -> Arc<View> {
        self.now.borrow().clone()
    }

    /// Waits until `enough` holds.
    pub(crate) async fn wait_for(&self, mut enough: impl FnMut(&View) -> bool) {
        let mut now = self.now.clone();
        if now.wait_for(|view| enough(view)).await.is_err() {
            // The node shuts down; whoever waits is being cancelled too.
            std::future::pending::<()>().await;
        }
    }

    /// Waits for the next change.
    pub(crate) async fn changed(&self) {
        let before = self.snapshot();
        self.wait_for(|view| *view != *before).await;
    }
}

async fn follow(
    net: NetHandle,
    mut events: broadcast::Receiver<PeerEvent>,
    tx: watch::Sender<Arc<View>>,
    token: CancellationToken,
) {
    let mut peers = look(&net).await;
    loop {
        tx.send_if_modified(|old| {
            let view = View::new(peers.clone());
            let changed = **old != view;
            if changed {
                *old = Arc::new(view);
            }
            changed
        });
        let event = tokio::select! {
            () = token.cancelled() => return,
            event = events.recv() => event,
        };
        match event {
            Ok(PeerEvent::Connected(peer)) => {
                peers.insert(peer.node, peer);
            }
            Ok(PeerEvent::Gone(node)) => {
                peers.remove(&node);
            }
            Err(broadcast::error::RecvError::Lagged(_)) => peers = look(&net).await,
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

async fn look(net: &NetHandle) -> HashMap<NodeId, PeerIdentity> {
    let connected = net.peers().await.into_iter().filter(|p| p.connections > 0 && p.state == PeerState::Healthy);
    let certified = connected.filter_map(|p| Some(PeerIdentity { node: p.node, hotkey: p.hotkey?, roles: p.roles? }));
    let local = net.local();
    certified.chain([local]).map(|p| (p.node, p)).collect()
}
