//! Who is in a group, who may come in, and what its members hold after a round.

use bytes::Bytes;

use super::{Rank, RoundSettings};
use crate::crypto::{Context, Network, Payload, Scheme, Signed};
use crate::id::{BlobId, Digest, GroupId, Hotkey, NodeId};
use crate::pb;
use crate::units::{ByteCount, UnixMillis};
use crate::wire::{self, WireError, WireMessage, limit};

impl GroupId {
    /// The group that `creator` made under `name`, in all its versions.
    pub fn of(network: &Network, creator: &Hotkey, name: &str) -> Self {
        let fields: [&[u8]; 4] = [&network.genesis, &network.netuid.to_le_bytes(), creator.as_ref(), name.as_bytes()];
        Self(Context::GROUP.digest(&fields).0)
    }
}

/// A hotkey and the node that speaks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupMember {
    /// Signs.
    pub hotkey: Hotkey,
    /// Is dialled.
    pub node: NodeId,
}

impl GroupMember {
    pub(super) fn from_raw(raw: pb::GroupMember) -> Result<Self, WireError> {
        Ok(Self { hotkey: wire::id(&raw.hotkey, "hotkey")?, node: wire::id(&raw.node, "node")? })
    }

    pub(super) fn to_raw(self) -> pb::GroupMember {
        pb::GroupMember { hotkey: self.hotkey.into(), node: self.node.into() }
    }
}

/// Who is in a group and how its rounds run. Signed by its creator; a higher version replaces lower ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupRoster {
    /// Name under which the creator made it.
    pub name: String,
    /// From 1; the members' places change only with it.
    pub version: u64,
    /// A member's place is its rank. No hotkey and no node is there twice.
    pub members: Vec<GroupMember>,
    /// How its rounds run, unless a round says otherwise.
    pub settings: RoundSettings,
    /// A round opens with so many live members at least.
    pub min_members: u32,
}

impl GroupRoster {
    /// Rank of a hotkey.
    pub fn rank_of(&self, hotkey: &Hotkey) -> Option<Rank> {
        let place = self.members.iter().position(|member| member.hotkey == *hotkey)?;
        Rank::try_from(place).ok()
    }

    /// The member of a rank.
    pub fn member(&self, rank: Rank) -> Option<&GroupMember> {
        self.members.get(usize::from(rank))
    }
}

impl Signed<GroupRoster> {
    /// Who made the group.
    pub fn creator(&self) -> Hotkey {
        Hotkey(self.signer())
    }

    /// The group.
    pub fn group(&self, network: &Network) -> GroupId {
        GroupId::of(network, &self.creator(), &self.name)
    }
}

impl WireMessage for GroupRoster {
    type Raw = pb::GroupRoster;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        if raw.members.len() > limit::MEMBERS {
            return Err(WireError::field("members"));
        }
        let members: Vec<GroupMember> =
            raw.members.into_iter().map(GroupMember::from_raw).collect::<Result<_, WireError>>()?;
        let twice = |key: fn(&GroupMember) -> [u8; 32]| {
            let mut keys: Vec<[u8; 32]> = members.iter().map(key).collect();
            keys.sort_unstable();
            keys.windows(2).any(|pair| pair[0] == pair[1])
        };
        if twice(|member| member.hotkey.0) || twice(|member| member.node.0) {
            return Err(WireError::field("members"));
        }
        if raw.min_members == 0 || raw.min_members as usize > limit::MEMBERS {
            return Err(WireError::field("min_members"));
        }
        Ok(Self {
            name: some_name(raw.name)?,
            version: raw.version,
            members,
            settings: RoundSettings::from_raw(raw.settings)?,
            min_members: raw.min_members,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::GroupRoster {
            name: self.name.clone(),
            version: self.version,
            members: self.members.iter().map(|member| member.to_raw()).collect(),
            settings: Some(self.settings.to_raw()),
            min_members: self.min_members,
        }
    }
}

fn some_name(name: String) -> Result<String, WireError> {
    if name.is_empty() { Err(WireError::field("name")) } else { wire::name(name, "name") }
}

impl Payload for GroupRoster {
    const CONTEXT: &'static str = "group-roster";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// Whom an invitation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Invitee {
    /// This hotkey.
    Hotkey(Hotkey),
    /// Whoever shows the token of this [`token_digest`].
    Bearer(Digest),
}

/// Digest by which an invitation names its token.
pub fn token_digest(group: &GroupId, token: &[u8; 32]) -> Digest {
    Context::GROUP_TOKEN.digest(&[group.as_ref(), token])
}

/// A creator's word that someone may join its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invitation {
    /// The group.
    pub group: GroupId,
    /// For whom.
    pub invitee: Invitee,
    /// After this it is worth nothing.
    pub expires_at: UnixMillis,
}

impl Invitation {
    /// Whether it lets `hotkey` into `group` now; `token` is what the asker showed, empty for none. Says nothing about
    /// who signed it.
    pub fn admits(&self, group: &GroupId, hotkey: &Hotkey, token: &[u8], now: UnixMillis) -> bool {
        let meant = match self.invitee {
            Invitee::Hotkey(invited) => invited == *hotkey,
            Invitee::Bearer(digest) => token.try_into().is_ok_and(|token| token_digest(group, token) == digest),
        };
        meant && self.group == *group && now <= self.expires_at
    }
}

impl WireMessage for Invitation {
    type Raw = pb::Invitation;
    const MAX: usize = 256;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        use pb::invitation::Invitee as I;
        Ok(Self {
            group: wire::id(&raw.group, "group")?,
            invitee: match wire::required(raw.invitee, "invitee")? {
                I::Hotkey(hotkey) => Invitee::Hotkey(wire::id(&hotkey, "hotkey")?),
                I::Token(token) => Invitee::Bearer(wire::id(&token, "token")?),
            },
            expires_at: UnixMillis(raw.expires_at_ms),
        })
    }

    fn to_raw(&self) -> Self::Raw {
        use pb::invitation::Invitee as I;
        let invitee = match self.invitee {
            Invitee::Hotkey(hotkey) => I::Hotkey(hotkey.into()),
            Invitee::Bearer(digest) => I::Token(digest.into()),
        };
        pb::Invitation { group: self.group.into(), invitee: Some(invitee), expires_at_ms: self.expires_at.0 }
    }
}

impl Payload for Invitation {
    const CONTEXT: &'static str = "group-invitation";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// What a member's state is after a round: two members that went the same way have the same blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateDigest {
    /// The group.
    pub group: GroupId,
    /// The round's place.
    pub seq: u64,
    /// The state.
    pub blob: BlobId,
    /// Its length.
    pub len: ByteCount,
}

impl WireMessage for StateDigest {
    type Raw = pb::StateDigest;
    const MAX: usize = 256;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        if ByteCount(raw.len) > limit::BLOB {
            return Err(WireError::field("len"));
        }
        Ok(Self {
            group: wire::id(&raw.group, "group")?,
            seq: raw.seq,
            blob: wire::id(&raw.blob, "blob")?,
            len: ByteCount(raw.len),
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::StateDigest { group: self.group.into(), seq: self.seq, blob: Bytes::from(self.blob), len: self.len.0 }
    }
}

impl Payload for StateDigest {
    const CONTEXT: &'static str = "state-digest";
    const SCHEME: Scheme = Scheme::Sr25519;
}
