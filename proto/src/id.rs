//! Names of things: digests and public keys, each a type of its own.
//!
//! Every digest but [`BlobId`] has a derive context (see [`crate::crypto::Context`]); a blob's id is the plain BLAKE3 hash
//! of its bytes, because it is also the root of its bao tree.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sp_core::crypto::{AccountId32, Ss58AddressFormat, Ss58Codec};

/// Why bytes or text are no id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdError {
    /// Wrong number of bytes.
    #[error("{what} must have 32 bytes, got {len}")]
    Length {
        /// The type that was wanted.
        what: &'static str,
        /// Bytes that came.
        len: usize,
    },
    /// Not hexadecimal, or not ss58 of format 42.
    #[error("{what} `{text}` is not {form}")]
    Text {
        /// The type that was wanted.
        what: &'static str,
        /// The text that came, shortened.
        text: String,
        /// What would have been right.
        form: &'static str,
    },
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

macro_rules! bytes32 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// The bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }
        }

        impl From<[u8; 32]> for $name {
            fn from(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }
        }

        impl AsRef<[u8]> for $name {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = IdError;
            fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
                let array = bytes.try_into().map_err(|_| IdError::Length { what: stringify!($name), len: bytes.len() })?;
                Ok(Self(array))
            }
        }

        impl From<$name> for bytes::Bytes {
            fn from(id: $name) -> bytes::Bytes {
                bytes::Bytes::copy_from_slice(&id.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

macro_rules! hex32 {
    ($(#[$doc:meta])* $name:ident) => {
        bytes32!($(#[$doc])* $name);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), hex::encode(&self.0[..6]))
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let mut bytes = [0; 32];
                hex::decode_to_slice(text, &mut bytes).map_err(|_| IdError::Text {
                    what: stringify!($name),
                    text: shorten(text),
                    form: "64 hexadecimal digits",
                })?;
                Ok(Self(bytes))
            }
        }
    };
}

hex32!(
    /// Any derived digest that needs no type of its own.
    Digest
);
hex32!(
    /// A job: digest of the JobSpec's payload bytes as signed.
    JobId
);
hex32!(
    /// One version of a model: digest of its manifest bytes.
    ModelId
);
hex32!(
    /// A group of members: digest of network, creator and name.
    GroupId
);
hex32!(
    /// A round of a group: digest of the RoundOpen's payload bytes as signed.
    RoundId
);
hex32!(
    /// A blob: BLAKE3 of its content, also the root of its bao tree.
    BlobId
);
hex32!(
    /// Environment identity: results are compared exactly only inside one.
    EnvId
);
hex32!(
    /// An engine: its version and the flags that can change a result.
    EngineId
);
hex32!(
    /// A node's ed25519 public key, from which its PeerId follows.
    NodeId
);
bytes32!(
    /// An sr25519 public key: who answers for a node. Written as ss58, format 42.
    Hotkey
);

impl BlobId {
    /// Id of `content`.
    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }
}

/// ss58 format of Bittensor and of generic Substrate chains.
const SS58_FORMAT: u16 = 42;

impl fmt::Display for Hotkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&AccountId32::new(self.0).to_ss58check_with_version(Ss58AddressFormat::custom(SS58_FORMAT)))
    }
}

impl fmt::Debug for Hotkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hotkey({self})")
    }
}

impl FromStr for Hotkey {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let bad = || IdError::Text { what: "Hotkey", text: shorten(text), form: "an ss58 address of format 42" };
        let (account, format) = AccountId32::from_ss58check_with_version(text).map_err(|_| bad())?;
        if format != Ss58AddressFormat::custom(SS58_FORMAT) {
            return Err(bad());
        }
        Ok(Self(account.into()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn hotkeys_are_written_as_ss58() {
        let alice = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY";
        let hotkey: Hotkey = alice.parse().unwrap();
        assert_eq!(hotkey.to_string(), alice);
        assert!(
            "15oF4uVJwmo4TdGW7VfQxNLavjCXviqxT9S1MgbjMNHr6Sp5".parse::<Hotkey>().is_err(),
            "format 0 is another network's"
        );
        assert!("nonsense".parse::<Hotkey>().is_err());
    }

    #[test]
    fn digests_round_trip_as_hex() {
        let id = BlobId::of(b"abc");
        assert_eq!(id.to_string().parse::<BlobId>().unwrap(), id);
        assert!(matches!(BlobId::try_from(&[0_u8; 31][..]), Err(IdError::Length { len: 31, .. })));
    }
}
