//! Executors: who works for this node, and how processes of their own come to.
//!
//! Owns invitations, the Attach request, the certificates of attached executors and who of them is here. Does not own
//! who runs what ([`super::work::pool`]) nor the executor's own side (`executor::attached`).
//!
//! ```text
//! executor                                  owner
//!    ── Attach{token, class} ─────────────▶ token known by its digest, unused, not expired: used from now on
//!    ◀── Attached{certificate, 24 h} ────── in the pool while connected
//!    ── Attach{no token, class} ──────────▶ renewal: known executors only
//! ```
//!
//! Invariants: a token is durable as used before its executor gets a certificate, and only that executor can use it
//! again; an executor leaves the pool when its connection ends; what is kept of executors and invitations is bounded.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sundara_proto::advert::ExecutorClass;
use sundara_proto::crypto::{HotkeyPair, Network};
use sundara_proto::id::{Digest, NodeId};
use sundara_proto::pb;
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::{WireMessage as _, limit};
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use super::work::certs;
use super::work::invite::{Invite, TOKEN_LEN, Token};
use super::work::pool::Pool;
use crate::net::{FailureCode, Inbound, NetHandle, PeerEvent, Reply, RequestKind};
use crate::service::{Tasks, wall_now};
use crate::store::{JsonTable, KeyRange, Keyspace, SharedStore, StoreError, Table, WriteBatch};

/// Invitations and executors remembered, each.
const KEPT_MAX: usize = 1_024;
/// An executor that was not seen for so long must be invited again.
const FORGET_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);
/// Slots that one executor may claim: more than any machine has.
const SLOTS_MAX: u32 = 4_096;
/// Longest life of an invitation.
pub(crate) const INVITE_LIFE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

const INVITES: JsonTable<InviteRecord> = Table::new(Keyspace::Executors);
const EXECUTORS: JsonTable<ExecutorRecord> = Table::new(Keyspace::Executors);

#[derive(Clone, Debug, Serialize, Deserialize)]
struct InviteRecord {
    expires_at: UnixMillis,
    used_by: Option<NodeId>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ExecutorRecord {
    first_at: UnixMillis,
    last_at: UnixMillis,
    hardware_class: String,
}

/// An executor as its owner knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownExecutor {
    /// Its node key.
    pub node: NodeId,
    /// Whether it is here now.
    pub attached: bool,
    /// Whether it runs inside this node; that one cannot be sent away.
    pub in_process: bool,
    /// Its class.
    pub hardware_class: String,
    /// Jobs that it runs at once; 0 while it is away.
    pub slots: u32,
    /// Orders that it holds.
    pub running: u32,
}

fn invite_key(digest: &Digest) -> Vec<u8> {
    [b"invite/", digest.as_bytes().as_slice()].concat()
}

fn executor_key(node: &NodeId) -> Vec<u8> {
    [b"executor/", node.as_bytes().as_slice()].concat()
}

/// Why an Attach was refused, in words for the executor's operator.
#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error("{0}")]
    Forbidden(&'static str),
    #[error("attach request is malformed")]
    Malformed,
    #[error("this owner has as many executors as it takes")]
    Full,
    #[error("the owner's store: {0}")]
    Store(#[from] StoreError),
}

/// What the service needs from the rest of the node.
pub(crate) struct ExecutorsParts {
    pub(crate) network: Network,
    /// Vouches for executors.
    pub(crate) key: HotkeyPair,
    pub(crate) net: NetHandle,
    pub(crate) store: SharedStore,
    pub(crate) pool: Pool,
    pub(crate) tasks: Tasks,
}

/// Handle of the service. Clones share it.
#[derive(Clone)]
pub(crate) struct ExecutorsHandle {
    network: Network,
    net: NetHandle,
    key: HotkeyPair,
    store: SharedStore,
    pool: Pool,
}

/// Starts the service; it ends with its tasks.
///
/// # Errors
/// When the store cannot be read.
pub(crate) fn start(parts: ExecutorsParts) -> Result<ExecutorsHandle, StoreError> {
    let ExecutorsParts { network, key, net, store, pool, tasks } = parts;
    let handle = ExecutorsHandle { network, net: net.clone(), key, store, pool };
    // Subscribed before the first Attach can come, so that nobody who goes is missed.
    let peers = net.subscribe_peers();
    let requests = net.serve(&[RequestKind::Attach]);
    let swept = handle.sweep()?;
    if !swept.is_empty() {
        // Deletions by retention need not be durable.
        drop(handle.store.commit_relaxed(swept));
    }
    tasks.spawn("attach", handle.clone().serve(requests, peers, tasks.token()));
    Ok(handle)
}

impl ExecutorsHandle {
    /// Writes down a new token and returns the invitation that carries it.
    ///
    /// # Errors
    /// When the store cannot keep it.
    pub(crate) async fn invite(&self, addresses: Vec<String>, life: Duration) -> Result<Invite, StoreError> {
        let local = self.net.local();
        let expires_at = wall_now().plus(life.min(INVITE_LIFE_MAX));
        let token = Token::random();
        let digest = Token::digest(&token.bytes());
        let mut batch = self.sweep()?;
        INVITES.put(&mut batch, invite_key(&digest), &InviteRecord { expires_at, used_by: None });
        self.store.commit(batch).await?;
        Ok(Invite {
            genesis: Digest(self.network.genesis),
            netuid: self.network.netuid,
            owner: local.hotkey,
            node: local.node,
            addresses: addresses.into_iter().take(limit::ADVERT_ITEMS).collect(),
            token,
            expires_at,
        })
    }

    /// Executors that are here, and those that this owner knows and that are away.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub(crate) fn list(&self) -> Result<Vec<KnownExecutor>, StoreError> {
        let (rows, _) = EXECUTORS.scan(self.store.as_ref(), &KeyRange::prefix(b"executor/"), KEPT_MAX * 2)?;
        let here = self.pool.list();
        let mut list: Vec<KnownExecutor> = here
            .iter()
            .map(|e| KnownExecutor {
                node: e.node,
                attached: true,
                in_process: e.in_process,
                hardware_class: e.hardware_class.clone(),
                slots: e.slots,
                running: e.running,
            })
            .collect();
        for (key, record) in rows {
            let node = key.strip_prefix(b"executor/".as_slice()).and_then(|node| NodeId::try_from(node).ok());
            if let Some(node) = node.filter(|node| here.iter().all(|e| e.node != *node)) {
                let hardware_class = record.hardware_class;
                let (attached, in_process, slots, running) = (false, false, 0, 0);
                list.push(KnownExecutor { node, attached, in_process, hardware_class, slots, running });
            }
        }
        Ok(list)
    }

    /// Sends an executor away; it must be invited again. Whether it was known.
    ///
    /// # Errors
    /// When the store cannot forget it.
    pub(crate) async fn revoke(&self, node: NodeId) -> Result<bool, StoreError> {
        let known = EXECUTORS.get(self.store.as_ref(), &executor_key(&node))?.is_some();
        let mut batch = WriteBatch::new();
        EXECUTORS.delete(&mut batch, executor_key(&node));
        for (key, record) in self.invites()? {
            if record.used_by == Some(node) {
                INVITES.delete(&mut batch, key);
            }
        }
        self.store.commit(batch).await?;
        if known {
            self.pool.remove(&node);
            self.exempt().await;
            // It hears of it when it comes back, at once.
            self.net.disconnect(node, "this executor was sent away").await;
        }
        Ok(known)
    }

    fn invites(&self) -> Result<Vec<(bytes::Bytes, InviteRecord)>, StoreError> {
        let range = KeyRange::prefix(b"invite/");
        INVITES.scan(self.store.as_ref(), &range, KEPT_MAX * 2).map(|(rows, _)| rows)
    }

    /// Deletions of what is out of date, or too much.
    fn sweep(&self) -> Result<WriteBatch, StoreError> {
        let now = wall_now();
        let mut batch = WriteBatch::new();
        let mut invites = self.invites()?;
        invites.sort_by_key(|(_, record)| std::cmp::Reverse(record.expires_at));
        for (i, (key, record)) in invites.into_iter().enumerate() {
            if record.expires_at < now || i >= KEPT_MAX {
                INVITES.delete(&mut batch, key);
            }
        }
        let (mut known, _) = EXECUTORS.scan(self.store.as_ref(), &KeyRange::prefix(b"executor/"), KEPT_MAX * 2)?;
        known.sort_by_key(|(_, record)| std::cmp::Reverse(record.last_at));
        for (i, (key, record)) in known.into_iter().enumerate() {
            if record.last_at.plus(FORGET_AFTER) < now || i >= KEPT_MAX {
                EXECUTORS.delete(&mut batch, key);
            }
        }
        Ok(batch)
    }

    async fn serve(
        self,
        mut requests: mpsc::Receiver<Inbound>,
        mut peers: broadcast::Receiver<PeerEvent>,
        token: CancellationToken,
    ) {
        loop {
            tokio::select! {
                biased;
                () = token.cancelled() => return,
                event = peers.recv() => match event {
                    Ok(PeerEvent::Gone(node)) => self.pool.remove_attached(&node),
                    Ok(_) => {}
                    // Whoever went unnoticed is noticed by its next order, which moves on.
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                inbound = requests.recv() => match inbound {
                    Some(inbound) => self.on_request(inbound).await,
                    None => return,
                },
            }
        }
    }

    async fn on_request(&self, inbound: Inbound) {
        let (peer, request, reply) = inbound.into_parts();
        let pb::request::Kind::Attach(attach) = request else {
            reply.fail(FailureCode::NotServed, "not an attach request");
            return;
        };
        match self.attach(peer.node, attach).await {
            Ok(cert) => {
                tracing::info!(executor = %peer.node, "executor attached");
                answer(reply, cert).await;
                self.exempt().await;
            }
            Err(e) => {
                tracing::warn!(executor = %peer.node, error = %e, "executor turned away");
                let code = match e {
                    AttachError::Forbidden(_) => FailureCode::Forbidden,
                    AttachError::Malformed => FailureCode::Malformed,
                    AttachError::Full => FailureCode::Busy,
                    AttachError::Store(_) => FailureCode::Internal,
                };
                reply.fail(code, e.to_string());
            }
        }
    }

    async fn attach(&self, node: NodeId, attach: pb::Attach) -> Result<pb::Signed, AttachError> {
        let raw = attach.class.ok_or(AttachError::Malformed)?;
        let class = ExecutorClass::from_raw(raw).map_err(|_| AttachError::Malformed)?;
        if class.slots == 0 || class.slots > SLOTS_MAX || node == self.net.local().node {
            return Err(AttachError::Malformed);
        }
        let now = wall_now();
        let mut batch = WriteBatch::new();
        let known = EXECUTORS.get(self.store.as_ref(), &executor_key(&node))?;
        if known.is_none() {
            self.redeem(node, &attach.token, now, &mut batch)?;
        }
        let record = ExecutorRecord {
            first_at: known.map_or(now, |k| k.first_at),
            last_at: now,
            hardware_class: class.hardware_class.clone(),
        };
        EXECUTORS.put(&mut batch, executor_key(&node), &record);
        self.store.commit(batch).await?;
        let cert = certs::issue(&self.network, &self.key, node, &class.hardware_class, now);
        if !self.pool.add_attached(node, class) {
            return Err(AttachError::Full);
        }
        Ok(cert.to_wire())
    }

    /// Marks a token as used by `node`, or says why it cannot be.
    fn redeem(&self, node: NodeId, token: &[u8], now: UnixMillis, batch: &mut WriteBatch) -> Result<(), AttachError> {
        if token.is_empty() {
            let text =
                "this owner does not know the executor: start it with --invite and a file from `executor invite`";
            return Err(AttachError::Forbidden(text));
        }
        if token.len() != TOKEN_LEN {
            return Err(AttachError::Malformed);
        }
        let key = invite_key(&Token::digest(token));
        let record = INVITES.get(self.store.as_ref(), &key)?;
        let record = record.ok_or(AttachError::Forbidden("the invitation is unknown here, or was withdrawn"))?;
        if record.used_by.is_some_and(|by| by != node) {
            return Err(AttachError::Forbidden("the invitation was used by another executor: each needs its own"));
        }
        if record.expires_at < now {
            return Err(AttachError::Forbidden("the invitation has expired: write a new one with `executor invite`"));
        }
        INVITES.put(batch, key, &InviteRecord { used_by: Some(node), ..record });
        Ok(())
    }

    /// The node's slots for inbound peers do not count its own executors.
    async fn exempt(&self) {
        let nodes = self.pool.list().into_iter().filter(|e| !e.in_process).map(|e| e.node).collect();
        self.net.set_exempt(nodes).await;
    }
}

async fn answer(reply: Reply, cert: pb::Signed) {
    let attached = pb::response::Kind::Attached(pb::Attached { executor_cert: Some(cert) });
    // An executor that is gone comes again.
    let _ = reply.finish(attached).await;
}
