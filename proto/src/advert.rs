//! What a node offers.

use std::time::Duration;

use bytes::Bytes;

use crate::cert::Roles;
use crate::crypto::{Network, Payload, Scheme, Signed};
use crate::id::{EngineId, Hotkey, ModelId, NodeId};
use crate::pb;
use crate::units::UnixMillis;
use crate::wire::{self, WireError, WireMessage, limit};

/// Executors of one hardware class behind a miner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecutorClass {
    /// Name of the class.
    pub hardware_class: String,
    /// Jobs that run at once.
    pub slots: u32,
    /// Engines; replicas of an exact job share one.
    pub engines: Vec<EngineId>,
    /// Announced price in rao a second of execution; 0 for none.
    pub price: u64,
}

impl WireMessage for ExecutorClass {
    type Raw = pb::ExecutorClass;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        if raw.engines.len() > limit::ADVERT_ITEMS {
            return Err(WireError::field("engines"));
        }
        Ok(Self {
            hardware_class: wire::name(raw.hardware_class, "hardware_class")?,
            slots: raw.slots,
            engines: raw.engines.iter().map(|e| wire::id(e, "engine")).collect::<Result<_, _>>()?,
            price: raw.price,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::ExecutorClass {
            hardware_class: self.hardware_class.clone(),
            slots: self.slots,
            engines: self.engines.iter().map(|e| Bytes::from(*e)).collect(),
            price: self.price,
        }
    }
}

/// A node's capabilities. Signed by its hotkey; a higher sequence replaces a lower one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advert {
    /// Mesh in which it holds.
    pub network: Network,
    /// The node.
    pub node: NodeId,
    /// Rises with every advert of this node.
    pub sequence: u64,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// At most [`Advert::LIFE_MAX`] later.
    pub expires_at: UnixMillis,
    /// What it does.
    pub roles: Roles,
    /// What it can run.
    pub classes: Vec<ExecutorClass>,
    /// Multiaddresses from outside.
    pub addresses: Vec<String>,
    /// Models whose blobs it has.
    pub models: Vec<ModelId>,
}

impl Advert {
    /// Longest life of one advert: a node that died is forgotten after it.
    pub const LIFE_MAX: Duration = Duration::from_secs(300);
}

impl Signed<Advert> {
    /// Who answers for the node.
    pub fn hotkey(&self) -> Hotkey {
        Hotkey(self.signer())
    }
}

impl WireMessage for Advert {
    type Raw = pb::Advert;
    const MAX: usize = 16 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        let bounded = raw.classes.len().max(raw.addresses.len()).max(raw.models.len()) <= limit::ADVERT_ITEMS;
        let (issued_at, expires_at) = (UnixMillis(raw.issued_at_ms), UnixMillis(raw.expires_at_ms));
        if !bounded || expires_at > issued_at.plus(Self::LIFE_MAX) {
            return Err(WireError::field(if bounded { "expires_at_ms" } else { "advert" }));
        }
        Ok(Self {
            network: Network { genesis: wire::array(&raw.genesis, "genesis")?, netuid: wire::netuid(raw.netuid)? },
            node: wire::id(&raw.node, "node")?,
            sequence: raw.sequence,
            issued_at,
            expires_at,
            roles: Roles(raw.roles),
            classes: raw.classes.into_iter().map(ExecutorClass::from_raw).collect::<Result<_, _>>()?,
            addresses: raw
                .addresses
                .into_iter()
                .map(|a| wire::text(a, limit::TEXT, "addresses"))
                .collect::<Result<_, _>>()?,
            models: raw.models.iter().map(|m| wire::id(m, "models")).collect::<Result<_, _>>()?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::Advert {
            genesis: Bytes::copy_from_slice(&self.network.genesis),
            netuid: self.network.netuid.into(),
            node: self.node.into(),
            sequence: self.sequence,
            issued_at_ms: self.issued_at.0,
            expires_at_ms: self.expires_at.0,
            roles: self.roles.0,
            classes: self.classes.iter().map(ExecutorClass::to_raw).collect(),
            addresses: self.addresses.clone(),
            models: self.models.iter().map(|m| Bytes::from(*m)).collect(),
        }
    }
}

impl Payload for Advert {
    const CONTEXT: &'static str = "advert";
    const SCHEME: Scheme = Scheme::Sr25519;
}
