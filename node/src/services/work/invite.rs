//! Invitations: a file that lets one executor attach to one owner, once.
//!
//! Owns the file and the token in it. The owner keeps only the token's digest, so that its store gives no token away.

use std::io::{self, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sundara_proto::crypto::{Context, Network};
use sundara_proto::id::{Digest, Hotkey, NodeId};
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::limit;

/// Largest invitation that is read.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Bytes of a token: enough that none is ever guessed.
pub(crate) const TOKEN_LEN: usize = 32;

/// What `executor invite` writes and `--invite FILE` reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invite {
    /// Genesis of the mesh, 64 hexadecimal digits.
    pub genesis: Digest,
    /// Subnet.
    pub netuid: u16,
    /// Hotkey of the miner or validator that invites.
    pub owner: Hotkey,
    /// Its node key; the PeerId follows from it.
    pub node: NodeId,
    /// Where it can be reached, as multiaddresses.
    pub addresses: Vec<String>,
    /// Secret: whoever has it may attach one executor.
    pub token: Token,
    /// After this the token is worth nothing; Unix milliseconds.
    pub expires_at: UnixMillis,
}

/// A one-time secret. Shown by its file only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Token([u8; TOKEN_LEN]);

impl Token {
    pub(crate) fn random() -> Self {
        Self(rand::random())
    }

    /// The bytes as they are sent.
    pub(crate) fn bytes(&self) -> bytes::Bytes {
        bytes::Bytes::copy_from_slice(&self.0)
    }

    /// What the owner keeps.
    pub(crate) fn digest(token: &[u8]) -> Digest {
        Context::INVITE.digest_one(token)
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(secret)")
    }
}

impl From<Token> for String {
    fn from(token: Token) -> Self {
        hex::encode(token.0)
    }
}

impl TryFrom<String> for Token {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let mut bytes = [0; TOKEN_LEN];
        hex::decode_to_slice(&text, &mut bytes).map_err(|_| "token must be 64 hexadecimal digits".to_owned())?;
        Ok(Self(bytes))
    }
}

/// Why an invitation cannot be used or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InviteError {
    /// The file.
    #[error("invitation {path}: {source}")]
    File {
        /// Its name.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// Not an invitation.
    #[error("invitation {path} is not readable: {reason}; have the owner write a new one with `executor invite`")]
    Malformed {
        /// Its name.
        path: String,
        /// What was wrong.
        reason: String,
    },
    /// For another mesh.
    #[error("invitation is for mesh {theirs}, this node is on {ours}: start with the owner's --network")]
    WrongNetwork {
        /// Tag in the file.
        theirs: String,
        /// Our tag.
        ours: String,
    },
}

impl Invite {
    /// The mesh.
    pub fn network(&self) -> Network {
        Network { genesis: self.genesis.0, netuid: self.netuid }
    }

    /// Reads an invitation.
    ///
    /// # Errors
    /// See [`InviteError`].
    pub fn read(path: &Path) -> Result<Self, InviteError> {
        let name = path.display().to_string();
        let file = |source| InviteError::File { path: path.display().to_string(), source };
        let len = std::fs::metadata(path).map_err(file)?.len();
        if len > FILE_BYTES_MAX {
            return Err(InviteError::Malformed { path: name, reason: format!("{len} bytes is too long") });
        }
        let text = std::fs::read_to_string(path).map_err(file)?;
        let invite: Self = toml::from_str(&text)
            .map_err(|e| InviteError::Malformed { path: name.clone(), reason: e.message().to_owned() })?;
        if invite.addresses.len() > limit::ADVERT_ITEMS {
            return Err(InviteError::Malformed { path: name, reason: "too many addresses".to_owned() });
        }
        Ok(invite)
    }

    /// Writes an invitation to a new file that nobody else can read.
    ///
    /// # Errors
    /// [`InviteError::File`], also when the file exists.
    pub fn write(&self, path: &Path) -> Result<(), InviteError> {
        let file = |source| InviteError::File { path: path.display().to_string(), source };
        let text = toml::to_string(self).map_err(|e| file(io::Error::other(e)))?;
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut out = options.open(path).map_err(file)?;
        out.write_all(text.as_bytes()).and_then(|()| out.sync_all()).map_err(file)
    }

    /// Refuses an invitation to another mesh.
    ///
    /// # Errors
    /// [`InviteError::WrongNetwork`].
    pub fn check(&self, network: &Network) -> Result<(), InviteError> {
        if self.network() == *network {
            return Ok(());
        }
        Err(InviteError::WrongNetwork { theirs: self.network().tag(), ours: network.tag() })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_invitation_survives_its_file_and_keeps_its_secret() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("invite.toml");
        let network = Network::named("test", 7);
        let invite = Invite {
            genesis: Digest(network.genesis),
            netuid: network.netuid,
            owner: Hotkey([1; 32]),
            node: NodeId([2; 32]),
            addresses: vec!["/ip4/127.0.0.1/tcp/4101".to_owned()],
            token: Token::random(),
            expires_at: UnixMillis(u64::from(u32::MAX)),
        };
        invite.write(&path).unwrap();
        assert_eq!(Invite::read(&path).unwrap(), invite);
        assert!(matches!(invite.write(&path), Err(InviteError::File { .. })), "never overwritten");
        #[cfg(unix)]
        {
            let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
            assert_eq!(mode & 0o777, 0o600);
        }
        assert!(!format!("{invite:?}").contains(&String::from(invite.token.clone())));
        assert!(invite.check(&network).is_ok());
        let error = invite.check(&Network::named("other", 7)).unwrap_err().to_string();
        assert!(error.contains("--network"), "{error}");
        std::fs::write(&path, "token = 7").unwrap();
        assert!(matches!(Invite::read(&path), Err(InviteError::Malformed { .. })));
    }
}
