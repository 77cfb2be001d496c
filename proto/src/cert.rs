//! Certificates: a hotkey vouches for a node key.

use std::fmt;

use bytes::Bytes;
use serde::{Serialize, Serializer};

use crate::crypto::{Network, Payload, Scheme, Signed, SignedError};
use crate::id::{Hotkey, NodeId};
use crate::pb;
use crate::units::UnixMillis;
use crate::wire::{self, WireError, WireMessage};

/// What a node does for the mesh, as its certificate and adverts claim. A set of bits.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Roles(pub u32);

impl Roles {
    /// Submits jobs, fetches models.
    pub const LIGHT: Self = Self(1);
    /// Runs jobs for one owner.
    pub const EXECUTOR: Self = Self(2);
    /// Takes offers.
    pub const MINER: Self = Self(4);
    /// Schedules and verifies.
    pub const VALIDATOR: Self = Self(8);

    const KNOWN: [(Self, &'static str); 4] =
        [(Self::LIGHT, "light"), (Self::EXECUTOR, "executor"), (Self::MINER, "miner"), (Self::VALIDATOR, "validator")];

    /// Whether every role of `other` is among these.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    /// Both sets together.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Names of those that this version knows.
    fn names(self) -> impl Iterator<Item = &'static str> {
        Self::KNOWN.into_iter().filter(move |(role, _)| self.contains(*role)).map(|(_, name)| name)
    }
}

impl fmt::Display for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().collect::<Vec<_>>().join(","))
    }
}

/// For people and programs that show it: the list of names.
impl Serialize for Roles {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

impl fmt::Debug for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Roles({self})")
    }
}

/// A hotkey's word that a node is its own. Signed by the hotkey.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The node vouched for.
    pub node: NodeId,
    /// Mesh in which it holds.
    pub network: Network,
    /// What the node does.
    pub roles: Roles,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// After this it is worth nothing.
    pub expires_at: UnixMillis,
    /// A higher serial of the same hotkey revokes lower ones of other nodes.
    pub serial: u64,
}

/// Why a peer's certificate is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertError {
    /// Malformed, or not signed by its signer.
    #[error(transparent)]
    Signed(#[from] SignedError),
    /// For another PeerId than the one that shows it.
    #[error("certificate is for another node than the one that shows it")]
    WrongNode,
    /// For another mesh.
    #[error("certificate is for mesh {theirs}, this node is on {ours}: check --network, netuid and chain")]
    WrongNetwork {
        /// Tag in the certificate.
        theirs: String,
        /// Our tag.
        ours: String,
    },
    /// Too old.
    #[error("certificate expired {ago_ms} ms ago: the peer must renew it, or a clock is wrong")]
    Expired {
        /// Since when, in milliseconds.
        ago_ms: u64,
    },
    /// Signed in what is the future here.
    #[error("certificate is dated {ahead_ms} ms ahead of this node's clock: check both clocks")]
    FromTheFuture {
        /// How far, in milliseconds.
        ahead_ms: u64,
    },
}

impl Certificate {
    /// Verifies a certificate shown by `node` (as the noise handshake proved it) at `now`.
    pub fn verify(
        network: &Network,
        node: NodeId,
        now: UnixMillis,
        raw: pb::Signed,
    ) -> Result<Signed<Self>, CertError> {
        // The network is looked at first, so that a peer of another mesh is told so rather than "bad signature".
        let claimed = Self::decode(&raw.payload).map_err(SignedError::from)?;
        if claimed.network != *network {
            return Err(CertError::WrongNetwork { theirs: claimed.network.tag(), ours: network.tag() });
        }
        let cert = Signed::<Self>::verify(network, raw)?;
        if cert.node != node {
            return Err(CertError::WrongNode);
        }
        if cert.expires_at < now {
            return Err(CertError::Expired { ago_ms: now.0 - cert.expires_at.0 });
        }
        if cert.issued_at > now.plus(UnixMillis::SKEW_MAX) {
            return Err(CertError::FromTheFuture { ahead_ms: cert.issued_at.0 - now.0 });
        }
        Ok(cert)
    }
}

impl Signed<Certificate> {
    /// The hotkey that vouches.
    pub fn hotkey(&self) -> Hotkey {
        Hotkey(self.signer())
    }
}

impl WireMessage for Certificate {
    type Raw = pb::Certificate;
    const MAX: usize = 1 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Ok(Self {
            node: wire::id(&raw.node, "node")?,
            network: Network { genesis: wire::array(&raw.genesis, "genesis")?, netuid: wire::netuid(raw.netuid)? },
            roles: Roles(raw.roles),
            issued_at: UnixMillis(raw.issued_at_ms),
            expires_at: UnixMillis(raw.expires_at_ms),
            serial: raw.serial,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::Certificate {
            node: self.node.into(),
            genesis: Bytes::copy_from_slice(&self.network.genesis),
            netuid: self.network.netuid.into(),
            roles: self.roles.0,
            issued_at_ms: self.issued_at.0,
            expires_at_ms: self.expires_at.0,
            serial: self.serial,
        }
    }
}

impl Payload for Certificate {
    const CONTEXT: &'static str = "certificate";
    const SCHEME: Scheme = Scheme::Sr25519;
}
