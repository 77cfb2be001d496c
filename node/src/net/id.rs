//! The two names of a node: our [`NodeId`] (its ed25519 public key) and libp2p's [`PeerId`] (a multihash of the same key).
//!
//! An ed25519 PeerId holds the whole key, so each can be had from the other without a lookup.

use libp2p::PeerId;
use libp2p::identity::Keypair;
use libp2p::multihash::Multihash;
use sundara_proto::id::NodeId;

/// Multihash code of "the digest is the data itself".
const IDENTITY: u64 = 0;
/// Protobuf of a libp2p public key: type (field 1) = Ed25519 (1), data (field 2) of 32 bytes.
const KEY_PREFIX: [u8; 4] = [0x08, 0x01, 0x12, 0x20];

/// The PeerId of a node.
pub fn peer_id(node: NodeId) -> PeerId {
    let mut key = [0_u8; 36];
    key[..4].copy_from_slice(&KEY_PREFIX);
    key[4..].copy_from_slice(node.as_bytes());
    // 36 bytes fit a multihash of 64 and the inline limit of 42: neither step can fail.
    Multihash::<64>::wrap(IDENTITY, &key)
        .ok()
        .and_then(|hash| PeerId::from_multihash(hash).ok())
        .unwrap_or_else(PeerId::random)
}

/// The node behind a PeerId; `None` for keys that are not ed25519.
pub fn node_id(peer: &PeerId) -> Option<NodeId> {
    let hash: &Multihash<64> = peer.as_ref();
    let key = hash.digest().strip_prefix(&KEY_PREFIX)?;
    (hash.code() == IDENTITY).then(|| NodeId::try_from(key).ok()).flatten()
}

/// The libp2p key pair of a node's 32-byte seed; [`sundara_proto::crypto::NodeKeyPair::from_seed`] is the same key.
pub(super) fn keypair(seed: &[u8; 32]) -> Option<Keypair> {
    let mut seed = *seed;
    Keypair::ed25519_from_bytes(&mut seed).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use sundara_proto::crypto::NodeKeyPair;

    #[test]
    fn both_names_come_from_one_seed() {
        let seed = [7; 32];
        let node = NodeKeyPair::from_seed(&seed).node_id();
        let peer = keypair(&seed).unwrap().public().to_peer_id();
        assert_eq!(peer_id(node), peer);
        assert_eq!(node_id(&peer), Some(node));
    }

    #[test]
    fn a_peer_id_of_another_key_type_is_no_node() {
        assert_eq!(node_id(&PeerId::random()), None);
    }
}
