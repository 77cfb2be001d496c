//! Protocol ids, gossip topics and DHT keys. Each carries the network's tag, so that meshes never mix.

use crate::crypto::{Context, Network};
use crate::id::{BlobId, Digest, Hotkey};

/// Version of the protocols behind /cert that this code speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Name and release, as told to peers.
pub const AGENT: &str = concat!("sundara-node/", env!("CARGO_PKG_VERSION"));

/// The handshake. Has no version of its own: its first frame never changes.
pub fn cert_protocol(network: &Network) -> String {
    format!("/sundara/{}/cert", network.tag())
}

/// Requests and responses of one peer pair.
pub fn rpc_protocol(network: &Network, version: u32) -> String {
    format!("/sundara/{}/rpc/{version}", network.tag())
}

/// Ranges of blobs.
pub fn blob_protocol(network: &Network, version: u32) -> String {
    format!("/sundara/{}/blob/{version}", network.tag())
}

/// One round's frames between a member and a reducer.
pub fn round_protocol(network: &Network, version: u32) -> String {
    format!("/sundara/{}/round/{version}", network.tag())
}

/// The mesh's own Kademlia.
pub fn kad_protocol(network: &Network) -> String {
    format!("/sundara/{}/kad/1", network.tag())
}

/// What identify says that we speak.
pub fn identify_protocol(network: &Network) -> String {
    format!("/sundara/{}", network.tag())
}

/// Gossip topics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Topic {
    /// Requests that no validator took directly.
    Jobs,
    /// Capability advertisements.
    Adverts,
    /// Signed roots of pages.
    Batches,
    /// Audit commitments and revealed secrets.
    Audits,
    /// Fraud proofs.
    Proofs,
}

impl Topic {
    /// Every topic.
    pub const ALL: [Self; 5] = [Self::Jobs, Self::Adverts, Self::Batches, Self::Audits, Self::Proofs];

    /// Name on the wire.
    pub fn name(self, network: &Network) -> String {
        let topic = match self {
            Self::Jobs => "jobs",
            Self::Adverts => "adverts",
            Self::Batches => "batches",
            Self::Audits => "audits",
            Self::Proofs => "proofs",
        };
        format!("/sundara/{}/{topic}/1", network.tag())
    }
}

/// DHT key of a model's signed record. Names live under their publisher's hotkey.
pub fn model_record_key(network: &Network, publisher: &Hotkey, name: &str) -> Digest {
    Context::DHT_MODEL.digest(&[&network.genesis, &network.netuid.to_le_bytes(), publisher.as_ref(), name.as_bytes()])
}

/// DHT key under which a blob's providers are found.
pub fn blob_provider_key(network: &Network, blob: &BlobId) -> Digest {
    Context::DHT_BLOB.digest(&[&network.genesis, &network.netuid.to_le_bytes(), blob.as_ref()])
}
