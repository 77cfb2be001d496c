//! Digests with contexts, and signatures over bytes as they were received.
//!
//! Every digest has a derive context, every signature signs the digest of context, network and payload. The payload of a
//! [`Signed`] value is kept exactly as it came and is never encoded again to be verified: two encoders may differ, the
//! signed bytes may not.

use std::fmt;

use bytes::Bytes;
use sp_core::{Pair as _, ed25519, sr25519};

use crate::id::{Digest, Hotkey, NodeId};
use crate::pb;
use crate::wire::{WireError, WireMessage};

/// Contexts of digests. A constant here is on the wire for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context(&'static str);

macro_rules! contexts {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        impl Context {
            $($(#[$doc])* pub const $name: Self = Self(concat!("sundara 1 ", $text));)*
        }
    };
}

contexts! {
    /// JobId from the signed payload bytes of a JobSpec.
    JOB = "job";
    /// ModelId from manifest bytes.
    MODEL = "model";
    /// Digest of an attestation's payload and signature.
    ATTESTATION = "attestation";
    /// What an execution came to: outcome and output. Replicas are compared by it.
    RESULT = "result";
    /// Salted commitment to a result.
    RESULT_COMMIT = "result-commit";
    /// Environment identity.
    ENV = "env";
    /// Engine identity: version and flags.
    ENGINE = "engine";
    /// Leaf of a batch's Merkle tree.
    BATCH_LEAF = "batch-leaf";
    /// Inner node of a batch's Merkle tree.
    BATCH_NODE = "batch-node";
    /// Digest of a signed batch, for the chain of `previous`.
    BATCH = "batch";
    /// Rendezvous order of a job's owners.
    OWNER = "owner";
    /// Commitment to an epoch's audit secret.
    AUDIT_COMMIT = "audit-commit";
    /// Whether a result is audited.
    AUDIT_DRAW = "audit-draw";
    /// Which replica streams.
    STREAM_DRAW = "stream-draw";
    /// DHT key of a model's record.
    DHT_MODEL = "dht-model";
    /// DHT key of a blob's providers.
    DHT_BLOB = "dht-blob";
    /// Genesis of a mesh that has no chain, from its name.
    GENESIS = "genesis";
    /// Randomness of one job's execution.
    JOB_SEED = "job-seed";
    /// Invite of an executor, as its owner stores it.
    INVITE = "invite";
    /// GroupId from a network, a creator and a name.
    GROUP = "group";
    /// Bearer token of an invitation into a group.
    GROUP_TOKEN = "group-token";
    /// RoundId from the signed payload bytes of a RoundOpen.
    ROUND = "round";
    /// Lengths of a round's tensors.
    ROUND_LENS = "round-lens";
    /// The digests of all SumCommits of a round.
    ROUND_SUMS = "round-sums";
    /// Seed of a chunk's checksums.
    ROUND_RHO = "round-rho";
    /// Digest of a signed ChunkCommit.
    CHUNK_COMMIT = "chunk-commit";
    /// Digest of a signed SumCommit.
    SUM_COMMIT = "sum-commit";
    /// Digest of a signed NonceSet.
    NONCE_SET = "nonce-set";
    /// Commitment to a member's nonce.
    NONCE = "nonce";
    /// Exponents of a chunk's blocks.
    SCALES = "scales";
    /// Checksums of a chunk's output.
    OUT_TAGS = "out-tags";
}

impl Context {
    /// A hasher in this context.
    pub fn hasher(self) -> blake3::Hasher {
        blake3::Hasher::new_derive_key(self.0)
    }

    /// Digest of length-prefixed fields: no two lists of fields share an encoding.
    pub fn digest(self, fields: &[&[u8]]) -> Digest {
        let mut hasher = self.hasher();
        for field in fields {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field);
        }
        Digest(*hasher.finalize().as_bytes())
    }

    /// Digest of one field without a prefix.
    pub fn digest_one(self, bytes: &[u8]) -> Digest {
        Digest(*self.hasher().update(bytes).finalize().as_bytes())
    }
}

/// Which mesh: every protocol id, topic, DHT key and signature carries it, so that meshes stay separate.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network {
    /// Hash of the chain's first block; without a chain, derived from the network's name.
    pub genesis: [u8; 32],
    /// Subnet.
    pub netuid: u16,
}

impl Network {
    /// A mesh without a chain.
    pub fn named(name: &str, netuid: u16) -> Self {
        Self { genesis: Context::GENESIS.digest_one(name.as_bytes()).0, netuid }
    }

    /// First 8 hexadecimal digits of the genesis, and the netuid: the part of every name on the wire.
    pub fn tag(&self) -> String {
        format!("{}/{}", hex::encode(&self.genesis[..4]), self.netuid)
    }

    /// Whether a message's own fields name this network.
    pub fn matches(&self, genesis: &[u8], netuid: u32) -> bool {
        self.genesis == genesis && u32::from(self.netuid) == netuid
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Network({})", self.tag())
    }
}

/// Which kind of key signs a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// A hotkey.
    Sr25519,
    /// A node key.
    Ed25519,
}

/// A key that signs. Two kinds exist: [`HotkeyPair`] and [`NodeKeyPair`].
pub trait Signer {
    /// Kind of the key.
    const SCHEME: Scheme;
    /// The public key.
    fn public(&self) -> [u8; 32];
    /// Signature of `message`.
    fn sign_bytes(&self, message: &[u8]) -> [u8; 64];
}

/// An sr25519 key pair. Its `Debug` shows the public part only.
#[derive(Clone)]
pub struct HotkeyPair(sr25519::Pair);

impl HotkeyPair {
    /// From a 32-byte secret seed.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(sr25519::Pair::from_seed(seed))
    }
    /// The public key.
    pub fn hotkey(&self) -> Hotkey {
        Hotkey(self.0.public().0)
    }
}

impl From<sr25519::Pair> for HotkeyPair {
    fn from(pair: sr25519::Pair) -> Self {
        Self(pair)
    }
}

impl fmt::Debug for HotkeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HotkeyPair({})", self.hotkey())
    }
}

impl Signer for HotkeyPair {
    const SCHEME: Scheme = Scheme::Sr25519;
    fn public(&self) -> [u8; 32] {
        self.0.public().0
    }
    fn sign_bytes(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).0
    }
}

/// An ed25519 node key pair. Its `Debug` shows the public part only.
#[derive(Clone)]
pub struct NodeKeyPair(ed25519::Pair);

impl NodeKeyPair {
    /// From a 32-byte secret seed.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(ed25519::Pair::from_seed(seed))
    }
    /// The secret seed, for libp2p's own form of the same key.
    pub fn seed(&self) -> [u8; 32] {
        self.0.seed()
    }
    /// The public key.
    pub fn node_id(&self) -> NodeId {
        NodeId(self.0.public().0)
    }
}

impl fmt::Debug for NodeKeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeKeyPair({})", self.node_id())
    }
}

impl Signer for NodeKeyPair {
    const SCHEME: Scheme = Scheme::Ed25519;
    fn public(&self) -> [u8; 32] {
        self.0.public().0
    }
    fn sign_bytes(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).0
    }
}

/// A message that is signed. `CONTEXT` separates it from every other kind.
pub trait Payload: WireMessage {
    /// Name of the kind in the signed digest; on the wire for ever.
    const CONTEXT: &'static str;
    /// Kind of key that signs it.
    const SCHEME: Scheme;
}

/// What was wrong with a signed message. Every one is the sender's fault and can be checked by anyone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignedError {
    /// Not a message of that kind.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The signature is not the signer's over these bytes in this context.
    #[error("signature does not match its payload and signer")]
    BadSignature,
}

/// A parsed value together with the bytes that were signed.
#[derive(Clone, PartialEq, Eq)]
pub struct Signed<T> {
    value: T,
    raw: pb::Signed,
}

impl<T: Payload> Signed<T> {
    /// Encodes and signs.
    ///
    /// # Panics
    /// When the key is of another scheme than the payload's: that is a mistake in our own code.
    pub fn sign<S: Signer>(network: &Network, key: &S, value: T) -> Self {
        assert!(S::SCHEME == T::SCHEME, "{} is signed by {:?} keys", T::CONTEXT, T::SCHEME);
        let payload = value.encode();
        let signature = key.sign_bytes(signing_digest::<T>(network, &payload).as_ref());
        let raw = pb::Signed {
            payload: payload.into(),
            signer: Bytes::copy_from_slice(&key.public()),
            signature: Bytes::copy_from_slice(&signature),
        };
        Self { value, raw }
    }

    /// Checks bounds, form and signature of a received message.
    pub fn verify(network: &Network, raw: pb::Signed) -> Result<Self, SignedError> {
        let value = T::decode(&raw.payload)?;
        let signer: [u8; 32] = raw.signer.as_ref().try_into().map_err(|_| WireError::field("signer"))?;
        let signature: [u8; 64] = raw.signature.as_ref().try_into().map_err(|_| WireError::field("signature"))?;
        let digest = signing_digest::<T>(network, &raw.payload);
        let good = match T::SCHEME {
            Scheme::Sr25519 => sr25519::Pair::verify(&signature.into(), digest.as_bytes(), &signer.into()),
            Scheme::Ed25519 => ed25519::Pair::verify(&signature.into(), digest.as_bytes(), &signer.into()),
        };
        if good { Ok(Self { value, raw }) } else { Err(SignedError::BadSignature) }
    }

    /// Parses a message whose signature this node checked before, when it wrote it to its own store.
    pub fn trusted(raw: pb::Signed) -> Result<Self, WireError> {
        let value = T::decode(&raw.payload)?;
        if raw.signer.len() != 32 || raw.signature.len() != 64 {
            return Err(WireError::field("signer or signature"));
        }
        Ok(Self { value, raw })
    }

    /// The parsed value.
    pub fn value(&self) -> &T {
        &self.value
    }

    /// The bytes that were signed.
    pub fn payload(&self) -> &Bytes {
        &self.raw.payload
    }

    /// The signer's public key.
    pub fn signer(&self) -> [u8; 32] {
        self.raw.signer.as_ref().try_into().unwrap_or_default()
    }

    /// The signature, 64 bytes.
    pub fn signature(&self) -> &Bytes {
        &self.raw.signature
    }

    /// The message as it goes on the wire.
    pub fn to_wire(&self) -> pb::Signed {
        self.raw.clone()
    }

    /// Encoded size on the wire.
    pub fn wire_len(&self) -> usize {
        prost::Message::encoded_len(&self.raw)
    }
}

impl<T> std::ops::Deref for Signed<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: fmt::Debug> fmt::Debug for Signed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signed({:?} by {})", self.value, hex::encode(&self.raw.signer[..self.raw.signer.len().min(4)]))
    }
}

fn signing_digest<T: Payload>(network: &Network, payload: &[u8]) -> Digest {
    const SIGN: Context = Context("sundara 1 sign");
    SIGN.digest(&[T::CONTEXT.as_bytes(), &network.genesis, &network.netuid.to_le_bytes(), payload])
}
