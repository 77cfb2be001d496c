//! Node key files: an ed25519 seed as 64 hexadecimal digits.

use std::path::Path;

use sp_core::{Pair as _, ed25519};
use sundara_proto::crypto::NodeKeyPair;
use zeroize::Zeroizing;

use super::{KeyError, private};

/// Makes a new node key and writes it to `path`, which must not exist.
pub fn create_node_key(path: &Path) -> Result<NodeKeyPair, KeyError> {
    let (_, seed) = ed25519::Pair::generate();
    let seed = Zeroizing::new(seed);
    let mut text = Zeroizing::new(vec![b'\n'; 65]);
    hex::encode_to_slice(seed.as_slice(), &mut text[..64]).map_err(|e| KeyError::malformed(path, e.to_string()))?;
    private::create(path, &text)?;
    Ok(NodeKeyPair::from_seed(&seed))
}

/// Reads a node key.
pub fn load_node_key(path: &Path) -> Result<NodeKeyPair, KeyError> {
    let content = private::read(path)?;
    let mut seed = Zeroizing::new([0; 32]);
    hex::decode_to_slice(content.trim_ascii(), &mut *seed)
        .map_err(|_| KeyError::malformed(path, "a node key is 64 hexadecimal digits"))?;
    Ok(NodeKeyPair::from_seed(&seed))
}

/// [`load_node_key`], after [`create_node_key`] where there is no file yet. Two processes that race make one key.
pub fn load_or_create_node_key(path: &Path) -> Result<NodeKeyPair, KeyError> {
    match load_node_key(path) {
        Err(KeyError::Missing { .. }) => match create_node_key(path) {
            Err(KeyError::Exists { .. }) => load_node_key(path),
            made => made,
        },
        other => other,
    }
}
