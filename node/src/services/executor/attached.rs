//! An executor in a process of its own: stays attached to its owner and serves the owner's offers.
//!
//! Owns the connection to the owner, the certificate and its renewal, and the offers. Does not own how jobs are run: they
//! go to the same executor that a miner has inside.
//!
//! ```text
//! dial ─▶ Attach ─▶ certified ──(half its life, or the owner is gone)──▶ Attach again
//!   ▲        │ refused, unreachable
//!   └────────┴─ wait: 0.5 s, doubling up to 30 s
//! ```
//!
//! Invariants: only the owner's offers are served; a certificate counts only when the owner in the invitation signed it
//! for this node; no state is without an exit, and its reason is in [`AttachState`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use libp2p::Multiaddr;
use serde::Serialize;
use sundara_proto::advert::ExecutorClass;
use sundara_proto::attestation::ExecutorCert;
use sundara_proto::crypto::{Network, Signed};
use sundara_proto::id::{BlobId, NodeId};
use sundara_proto::job::JobSpec;
use sundara_proto::pb;
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::WireMessage as _;
use tokio::sync::{Semaphore, broadcast, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::super::work::certs::CERT_RENEW_AFTER;
use super::super::work::invite::Invite;
use super::super::work::{ExecutorEvent, ExecutorHandle, OUTPUTS_KEPT_MAX, Order, Run, forget_outputs};
use crate::blobs::Blobs;
use crate::net::{FailureCode, Inbound, NetHandle, PeerEvent, PeerIdentity, Reply, RequestKind};
use crate::service::{Tasks, Workers, wall_now};
use crate::store::{Keyspace, SharedStore, WriteBatch};

/// First pause before the owner is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Longest pause.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Offers that may be under way for each slot. The owner's pool holds fewer.
const OFFERS_PER_SLOT: u32 = 16;
/// Large outputs stay for the owner to fetch this long.
const OUTPUT_KEPT: Duration = Duration::from_secs(600);
/// Longest order that is taken; no attempt is longer than a job may live.
const DEADLINE_MAX: Duration = JobSpec::NOT_AFTER_MAX;

/// Where the attachment stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum AttachState {
    /// Not yet, or not any more; tries again by itself.
    Attaching {
        /// What went wrong last.
        last_error: Option<String>,
    },
    /// At work for its owner.
    Attached {
        /// The certificate lapses then; it is renewed long before. Unix milliseconds.
        until: UnixMillis,
    },
}

/// What the service needs from the rest of the node.
pub(crate) struct AttachedParts {
    pub(crate) network: Network,
    /// Who owns it, where, and the token. An invitation that was used stays good for its executor.
    pub(crate) invite: Invite,
    /// Further addresses of the owner, as given on the command line.
    pub(crate) addresses: Vec<Multiaddr>,
    pub(crate) net: NetHandle,
    pub(crate) store: SharedStore,
    pub(crate) blobs: Blobs,
    pub(crate) executor: ExecutorHandle,
    /// The executor reads its certificate from the other end.
    pub(crate) cert: watch::Sender<Option<Signed<ExecutorCert>>>,
    pub(crate) tasks: Tasks,
}

/// Handle of the service. Clones share it.
#[derive(Clone)]
pub(crate) struct AttachedHandle {
    #[allow(dead_code, reason = "read by tests")]
    state: watch::Receiver<AttachState>,
    draining: CancellationToken,
    places: Arc<Semaphore>,
    places_max: u32,
}

impl AttachedHandle {
    /// As of now, and as it changes.
    #[allow(dead_code, reason = "read by tests")]
    pub(crate) fn state(&self) -> watch::Receiver<AttachState> {
        self.state.clone()
    }

    /// Declines what comes, and waits until what runs has ended.
    pub(crate) async fn drain(&self) {
        self.draining.cancel();
        // An error means that the service is gone, and its jobs with it.
        drop(self.places.acquire_many(self.places_max).await);
    }
}

/// Starts the service; it ends with its tasks.
pub(crate) fn start(parts: AttachedParts) -> AttachedHandle {
    let (state, state_rx) = watch::channel(AttachState::Attaching { last_error: None });
    let places_max = parts.executor.slots.saturating_mul(OFFERS_PER_SLOT).max(1);
    let places = Arc::new(Semaphore::new(places_max as usize));
    let draining = CancellationToken::new();
    let offers = parts.net.serve(&[RequestKind::Offer]);
    let peers = parts.net.subscribe_peers();
    let server = Server {
        network: parts.network,
        invite: parts.invite.clone(),
        executor: parts.executor.clone(),
        workers: Workers::new("offers", 2),
        places: places.clone(),
        draining: draining.clone(),
        tasks: parts.tasks.clone(),
    };
    let (outputs, outputs_rx) = mpsc::channel(OUTPUTS_KEPT_MAX);
    let token = parts.tasks.token();
    parts.tasks.spawn("outputs", forget_outputs(parts.blobs, outputs_rx, OUTPUT_KEPT, token.clone()));
    parts.tasks.spawn("offers", Arc::new(server).serve(offers, outputs, token.clone()));
    let tasks = parts.tasks.clone();
    let attacher = Attacher {
        network: parts.network,
        invite: parts.invite,
        addresses: parts.addresses,
        net: parts.net,
        store: parts.store,
        executor: parts.executor,
        cert: parts.cert,
        state,
    };
    tasks.spawn("attach", async move {
        tokio::select! {
            () = token.cancelled() => {}
            () = attacher.run(peers) => {}
        }
    });
    AttachedHandle { state: state_rx, draining, places, places_max }
}

struct Attacher {
    network: Network,
    invite: Invite,
    addresses: Vec<Multiaddr>,
    net: NetHandle,
    store: SharedStore,
    executor: ExecutorHandle,
    cert: watch::Sender<Option<Signed<ExecutorCert>>>,
    state: watch::Sender<AttachState>,
}

const CERT_KEY: &[u8] = b"executor/cert";

impl Attacher {
    async fn run(self, mut peers: broadcast::Receiver<PeerEvent>) {
        self.restore();
        let mut pause = RETRY;
        loop {
            match self.attach().await {
                Ok(cert) => {
                    pause = RETRY;
                    tracing::info!(owner = %self.invite.owner, "attached");
                    self.state.send_replace(AttachState::Attached { until: cert.expires_at });
                    self.cert.send_replace(Some(cert));
                    self.until_due(&mut peers).await;
                }
                Err(reason) => {
                    tracing::warn!(owner = %self.invite.owner, %reason, retry_s = pause.as_secs_f64(), "not attached");
                    self.state.send_replace(AttachState::Attaching { last_error: Some(reason) });
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
            }
        }
    }

    /// A certificate of an earlier run holds until it lapses.
    fn restore(&self) {
        let stored = self.store.get(Keyspace::Meta, CERT_KEY).ok().flatten();
        let cert = stored
            .and_then(|bytes| <pb::Signed as prost::Message>::decode(bytes).ok())
            .and_then(|raw| self.checked(raw).ok())
            .filter(|cert| cert.expires_at > wall_now());
        if cert.is_some() {
            self.cert.send_replace(cert);
        }
    }

    fn checked(&self, raw: pb::Signed) -> Result<Signed<ExecutorCert>, String> {
        let cert = Signed::<ExecutorCert>::verify(&self.network, raw).map_err(|e| format!("certificate: {e}"))?;
        let right =
            cert.network == self.network && cert.executor == self.net.local().node && cert.owner() == self.invite.owner;
        if right { Ok(cert) } else { Err("certificate is for another executor, owner or mesh".to_owned()) }
    }

    async fn attach(&self) -> Result<Signed<ExecutorCert>, String> {
        let owner = self.reach().await?;
        let known = self.cert.borrow().is_some();
        let first = self.ask(owner, !known).await;
        let answer = match first {
            // An owner that lost its records may still take the token.
            Err((FailureCode::Forbidden, _)) if known => self.ask(owner, true).await,
            other => other,
        };
        let cert = self.checked(answer.map_err(|(_, reason)| reason)?)?;
        let mut batch = WriteBatch::new();
        batch.put(Keyspace::Meta, CERT_KEY, prost::Message::encode_to_vec(&cert.to_wire()));
        // Losing it costs one use of the token, which stays good for this executor.
        drop(self.store.commit_relaxed(batch));
        Ok(cert)
    }

    /// Connects to the owner, at any of its addresses.
    async fn reach(&self) -> Result<NodeId, String> {
        let owner = self.invite.node;
        let mut reasons = Vec::new();
        let invited = self.invite.addresses.iter().filter_map(|text| text.parse::<Multiaddr>().ok());
        for address in self.addresses.iter().cloned().chain(invited) {
            match self.net.dial(address.clone()).await {
                Ok(peer) if peer.node == owner => return Ok(owner),
                // The owner may have got a new node key; its hotkey is what counts.
                Ok(peer) if peer.hotkey == self.invite.owner => return Ok(peer.node),
                Ok(peer) => reasons.push(format!("{address} is {}, not the owner", peer.hotkey)),
                Err(reason) => reasons.push(format!("{address}: {reason}")),
            }
        }
        // Perhaps the mesh knows where it is now.
        tracing::debug!(reasons = %reasons.join("; "), "no address of the owner answers");
        Ok(owner)
    }

    async fn ask(&self, owner: NodeId, with_token: bool) -> Result<pb::Signed, (FailureCode, String)> {
        let class = ExecutorClass {
            hardware_class: self.executor.hardware_class.to_string(),
            slots: self.executor.slots,
            engines: self.executor.engines.to_vec(),
            price: 0,
        };
        let token = if with_token { self.invite.token.bytes() } else { Bytes::new() };
        let request = pb::request::Kind::Attach(pb::Attach { token, class: Some(class.to_raw()) });
        match self.net.request_one(owner, request).await {
            Ok(pb::response::Kind::Attached(attached)) => {
                attached.executor_cert.ok_or((FailureCode::Malformed, "owner sent no certificate".to_owned()))
            }
            Ok(_) => Err((FailureCode::Malformed, "owner answered with something else".to_owned())),
            Err(crate::net::RpcError::Refused { code, detail }) => Err((code, format!("owner refused: {detail}"))),
            Err(e) => Err((FailureCode::Unspecified, e.to_string())),
        }
    }

    /// Returns when the certificate is to be renewed, or the owner is gone.
    async fn until_due(&self, peers: &mut broadcast::Receiver<PeerEvent>) {
        let renew = tokio::time::sleep(CERT_RENEW_AFTER);
        tokio::pin!(renew);
        loop {
            tokio::select! {
                () = &mut renew => return,
                event = peers.recv() => match event {
                    Ok(PeerEvent::Gone(node)) if node == self.invite.node => return,
                    Ok(_) => {}
                    // It may have been the owner.
                    Err(broadcast::error::RecvError::Lagged(_)) => return,
                    Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
                },
            }
        }
    }
}

struct Server {
    network: Network,
    invite: Invite,
    executor: ExecutorHandle,
    workers: Workers,
    places: Arc<Semaphore>,
    draining: CancellationToken,
    tasks: Tasks,
}

impl Server {
    async fn serve(
        self: Arc<Self>,
        mut offers: mpsc::Receiver<Inbound>,
        outputs: mpsc::Sender<BlobId>,
        token: CancellationToken,
    ) {
        loop {
            let inbound = tokio::select! {
                biased;
                () = token.cancelled() => return,
                inbound = offers.recv() => match inbound { Some(inbound) => inbound, None => return },
            };
            let (peer, request, reply) = inbound.into_parts();
            let pb::request::Kind::Offer(offer) = request else {
                reply.fail(FailureCode::NotServed, "not an offer");
                continue;
            };
            if peer.hotkey != self.invite.owner {
                reply.fail(FailureCode::Forbidden, "this executor works for another owner");
                continue;
            }
            let (server, outputs) = (self.clone(), outputs.clone());
            if self.draining.is_cancelled() {
                self.decline(reply, pb::declined::Reason::ShuttingDown, "the executor is shutting down");
                continue;
            }
            let Ok(place) = self.places.clone().try_acquire_owned() else {
                self.decline(reply, pb::declined::Reason::Busy, "all places are taken");
                continue;
            };
            self.tasks.spawn("offer", async move {
                server.on_offer(peer, offer, reply, &outputs).await;
                drop(place);
            });
        }
    }

    fn decline(&self, reply: Reply, reason: pb::declined::Reason, detail: &str) {
        let declined = pb::Declined { reason: reason.into(), detail: detail.to_owned() };
        self.tasks.spawn("decline", async move {
            let _ = reply.finish(work(pb::work_event::Kind::Declined(declined))).await;
        });
    }

    async fn on_offer(&self, peer: PeerIdentity, offer: pb::Offer, mut reply: Reply, outputs: &mpsc::Sender<BlobId>) {
        let network = self.network;
        let raw = offer.spec.unwrap_or_default();
        let spec = match self.workers.run(move || Signed::<JobSpec>::verify(&network, raw)).await {
            Ok(Ok(spec)) => spec,
            Ok(Err(e)) => return self.decline(reply, pb::declined::Reason::Malformed, &e.to_string()),
            Err(e) => return reply.fail(FailureCode::Internal, e.to_string()),
        };
        if reply.send(work(pb::work_event::Kind::Accepted(pb::Accepted {}))).await.is_err() {
            return;
        }
        let order = Order {
            job: spec.id(),
            spec: Arc::new(spec),
            attempt: offer.attempt,
            inline_input: offer.inline_input,
            stream: offer.stream,
            sources: vec![peer.node],
            // The owner fetches what is large, and hands it on.
            validator: peer.hotkey,
            deadline: Instant::now() + Duration::from_millis(offer.deadline_ms).min(DEADLINE_MAX),
        };
        let run = self.executor.run(order);
        relay(run, reply, outputs).await;
    }
}

/// Passes events to the owner until the last, or until the owner wants no more.
async fn relay(mut run: Run, mut reply: Reply, outputs: &mpsc::Sender<BlobId>) {
    loop {
        let event = tokio::select! {
            biased;
            () = reply.closed() => return,
            event = run.next() => event,
        };
        let last = match event {
            Some(ExecutorEvent::Started) => continue,
            Some(ExecutorEvent::Output { offset, data }) => {
                let output = pb::Output { attempt: 0, offset, data };
                if reply.send(work(pb::work_event::Kind::Output(output))).await.is_err() {
                    return;
                }
                continue;
            }
            Some(ExecutorEvent::Finished(done)) => {
                if done.inline_output.is_none() {
                    // Full: the blob store's own age limit removes it.
                    let _ = outputs.try_send(done.attestation.output);
                }
                pb::work_event::Kind::ExecutorResult(pb::ExecutorResult {
                    attestation: Some(done.attestation.to_wire()),
                    inline_output: done.inline_output,
                })
            }
            Some(ExecutorEvent::Fault(fault)) => {
                pb::work_event::Kind::Fault(pb::ExecutorFault { reason: fault.reason, retryable: fault.retryable })
            }
            None => return reply.fail(FailureCode::Internal, "the executor stopped"),
        };
        let _ = reply.finish(work(last)).await;
        return;
    }
}

fn work(kind: pb::work_event::Kind) -> pb::response::Kind {
    pb::response::Kind::Work(pb::WorkEvent { kind: Some(kind) })
}
