//! The transfers' view of the mesh.

use std::io;

use async_trait::async_trait;
use sundara_proto::id::{BlobId, NodeId};
use sundara_proto::names::blob_provider_key;

use super::{BlobIo, BlobNet};
use crate::blobs::Asker;
use crate::net::{NetHandle, PeerIdentity};

impl From<PeerIdentity> for Asker {
    fn from(peer: PeerIdentity) -> Self {
        Self { node: peer.node, hotkey: Some(peer.hotkey) }
    }
}

#[async_trait]
impl BlobNet for NetHandle {
    fn local(&self) -> NodeId {
        Self::local(self).node
    }

    async fn open(&self, peer: NodeId) -> io::Result<Box<dyn BlobIo>> {
        let stream = self.open_blob(peer).await.map_err(io::Error::other)?;
        Ok(Box::new(stream))
    }

    async fn find_providers(&self, blob: BlobId) -> Vec<NodeId> {
        let key = blob_provider_key(&self.network(), &blob);
        Self::find_providers(self, key).await.unwrap_or_else(|e| {
            tracing::debug!(blob = %blob, error = %e, "providers could not be looked up");
            Vec::new()
        })
    }

    async fn provide(&self, blob: BlobId) {
        if let Err(e) = Self::provide(self, blob_provider_key(&self.network(), &blob)).await {
            tracing::debug!(blob = %blob, error = %e, "blob not announced");
        }
    }

    async fn stop_providing(&self, blob: BlobId) {
        if let Err(e) = Self::stop_providing(self, blob_provider_key(&self.network(), &blob)).await {
            tracing::debug!(blob = %blob, error = %e, "blob still announced");
        }
    }

    async fn report(&self, peer: NodeId, reason: String) {
        self.disconnect(peer, reason).await;
    }
}
