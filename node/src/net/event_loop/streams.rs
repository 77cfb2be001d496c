//! Streams as they open: to whom they go, and who drives them.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use libp2p::PeerId;
use libp2p::swarm::{ConnectionId, Stream, StreamProtocol};
use sundara_proto::names;

use super::links::Opening;
use super::{NetDriver, TaskEnd};
use crate::net::behaviour;
use crate::net::bulk::{Bulk, BulkStream, Slot};
use crate::net::cert::Side;
use crate::net::id::node_id;
use crate::net::rpc::client::ClientLink;
use crate::net::rpc::server::ServerDriver;
use crate::net::streams;

/// Request streams that one peer may have open here: one, and one more while it replaces it.
const SERVING_MAX: usize = 2;

impl NetDriver {
    pub(super) fn on_stream(&mut self, event: streams::Event) {
        match event {
            streams::Event::Inbound { peer, connection, protocol, stream } => {
                self.on_inbound(peer, connection, &protocol, stream);
            }
            streams::Event::Opened { token, result } => match self.links.opened(token) {
                Some(Opening::Cert { connection }) => match result {
                    Ok(stream) => self.run_handshake(connection, stream, Side::Dialler),
                    Err(reason) => {
                        let reason = format!(
                            "no certificates can be exchanged ({reason}): the peer is of another mesh, \
                            or not a node of this kind"
                        );
                        self.shared.metrics.handshakes_failed.inc();
                        self.close_connection(connection, reason);
                    }
                },
                Some(Opening::Link { peer, .. }) => self.on_link_opened(peer, result),
                Some(Opening::Bulk { peer, connection, kind, done }) => {
                    let counter = self.connections.get(&connection).map(|c| c.bulk.clone()).unwrap_or_default();
                    // The place was counted when the opening began; the slot counts it until the stream is dropped.
                    let slot = |stream| BulkStream::mesh(kind, stream, Slot::take(kind, &counter, &self.my_bulk));
                    let stream = result.map(slot);
                    counter.of(kind).fetch_sub(1, Ordering::Relaxed);
                    // A caller that is gone does not need it.
                    drop(done.send(stream));
                    self.forget_satisfied(peer);
                }
                None => {}
            },
        }
    }

    fn on_inbound(&mut self, peer: PeerId, connection: ConnectionId, protocol: &StreamProtocol, stream: Stream) {
        if *protocol == behaviour::cert_protocol(&self.shared.network) {
            return self.run_handshake(connection, stream, Side::Listener);
        }
        let Some(session) = self.sessions.get(&peer) else {
            // The gate has opened for nobody without a session; the session may just have ended.
            self.shared.metrics.streams_refused.inc();
            return;
        };
        let is = |name: fn(&sundara_proto::crypto::Network, u32) -> String| {
            self.config.versions.clone().any(|v| name(&self.shared.network, v) == protocol.as_ref())
        };
        if is(names::rpc_protocol) {
            self.serve_requests(peer, stream);
            return;
        }
        let kind = if is(names::blob_protocol) {
            Bulk::Blob
        } else if is(names::round_protocol) {
            Bulk::Round
        } else {
            return;
        };
        let taken = Slot::take(kind, &session.bulk, &self.all_bulk).is_some_and(|slot| {
            self.shared.deliver(kind, session.identity, BulkStream::mesh(kind, stream, Some(slot)))
        });
        let metrics = &self.shared.metrics;
        match kind {
            _ if !taken => metrics.streams_refused.inc(),
            Bulk::Blob => metrics.blob_streams_in.inc(),
            Bulk::Round => metrics.round_streams_in.inc(),
        };
    }

    fn serve_requests(&mut self, peer: PeerId, stream: Stream) {
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        if session.serving >= SERVING_MAX {
            self.shared.metrics.streams_refused.inc();
            return;
        }
        session.serving += 1;
        let (services, queued) = (self.shared.services.clone(), session.queued.clone());
        let driver = ServerDriver::new(stream, session.identity, services, queued);
        let results = self.results.0.clone();
        self.spawn_for(peer, async move {
            let fault = driver.await.err().map(|error| error.to_string());
            // The loop is gone only when the node shuts down.
            drop(results.send(TaskEnd::Server { peer, fault }).await);
        });
    }

    /// Drives a request stream of ours, and puts it where requests find it.
    pub(super) fn drive_client(&mut self, peer: PeerId, stream: Stream) -> ClientLink {
        let (link, driver) = ClientLink::new(stream);
        if let Some(node) = node_id(&peer) {
            self.shared.links.write().unwrap_or_else(PoisonError::into_inner).insert(node, link.clone());
        }
        let results = self.results.0.clone();
        self.spawn_for(peer, async move {
            if let Err(error) = driver.await {
                tracing::debug!(%error, "request stream ended");
            }
            drop(results.send(TaskEnd::Client { peer }).await);
        });
        link
    }
}
