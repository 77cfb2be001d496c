//! What members and reducers sign about one chunk.

use bytes::Bytes;

use super::{Rank, Ranks, chunk_index, digests, rank};
use crate::crypto::{Context, Payload, Scheme, Signed};
use crate::id::{Digest, Hotkey, RoundId};
use crate::pb;
use crate::rules::round::layout::GROUP;
use crate::rules::round::tags::P;
use crate::wire::{self, WireError, WireMessage, limit};

/// What a member commits to beside its words in verified mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FixedCommit {
    /// [`crate::rules::round::fixed::scales_digest`] of its own exponents.
    pub scale: Digest,
    /// The same of the shared ones.
    pub shared: Digest,
    /// [`nonce_hash`] of its nonce.
    pub nonce: Digest,
}

/// Commitment to a nonce.
pub fn nonce_hash(nonce: &[u8; 32]) -> Digest {
    Context::NONCE.digest_one(nonce)
}

/// What a member is about to send. Signed by the member, before its words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkCommit {
    /// The round.
    pub round: RoundId,
    /// Which run at the chunk.
    pub attempt: u32,
    /// The chunk.
    pub chunk: u32,
    /// Who.
    pub rank: Rank,
    /// BLAKE3 of the words.
    pub root: Digest,
    /// Bytes of the words.
    pub len: u64,
    /// In verified mode.
    pub fixed: Option<FixedCommit>,
}

impl Signed<ChunkCommit> {
    /// What a SumCommit names it by.
    pub fn digest(&self) -> Digest {
        Context::CHUNK_COMMIT.digest_one(self.payload())
    }
}

/// Longest chunk: as many words as there can be, each of 8 bytes.
const LEN_MAX: u64 = (limit::CHUNK_GROUPS * GROUP * 8) as u64;

impl WireMessage for ChunkCommit {
    type Raw = pb::ChunkCommit;
    const MAX: usize = 512;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        if raw.len > LEN_MAX {
            return Err(WireError::field("len"));
        }
        let fixed = |f: pb::FixedCommit| {
            Ok(FixedCommit {
                scale: wire::id(&f.scale, "scale")?,
                shared: wire::id(&f.shared, "shared")?,
                nonce: wire::id(&f.nonce, "nonce")?,
            })
        };
        Ok(Self {
            round: wire::id(&raw.round, "round")?,
            attempt: raw.attempt,
            chunk: chunk_index(raw.chunk)?,
            rank: rank(raw.rank, "rank")?,
            root: wire::id(&raw.root, "root")?,
            len: raw.len,
            fixed: raw.fixed.map(fixed).transpose().map_err(|e: WireError| e)?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        let fixed =
            |f: FixedCommit| pb::FixedCommit { scale: f.scale.into(), shared: f.shared.into(), nonce: f.nonce.into() };
        pb::ChunkCommit {
            round: self.round.into(),
            attempt: self.attempt,
            chunk: self.chunk,
            rank: self.rank.into(),
            root: self.root.into(),
            len: self.len,
            fixed: self.fixed.map(fixed),
        }
    }
}

impl Payload for ChunkCommit {
    const CONTEXT: &'static str = "chunk-commit";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// The words of a member came and have the root that it committed to. Signed by the reducer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkReceipt {
    /// The round.
    pub round: RoundId,
    /// Which run at the chunk.
    pub attempt: u32,
    /// The chunk.
    pub chunk: u32,
    /// Whose words.
    pub rank: Rank,
    /// Their root.
    pub root: Digest,
}

impl WireMessage for ChunkReceipt {
    type Raw = pb::ChunkReceipt;
    const MAX: usize = 256;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Ok(Self {
            round: wire::id(&raw.round, "round")?,
            attempt: raw.attempt,
            chunk: chunk_index(raw.chunk)?,
            rank: rank(raw.rank, "rank")?,
            root: wire::id(&raw.root, "root")?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::ChunkReceipt {
            round: self.round.into(),
            attempt: self.attempt,
            chunk: self.chunk,
            rank: self.rank.into(),
            root: self.root.into(),
        }
    }
}

impl Payload for ChunkReceipt {
    const CONTEXT: &'static str = "chunk-receipt";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// What a reducer summed, and what came out. Signed by the reducer, before the output.
///
/// An honest reducer signs it only if every commitment names the shared exponents that the reducer sent, exponents that
/// the shared ones cover, and the chunk's own length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumCommit {
    /// The round.
    pub round: RoundId,
    /// Which run at the chunk.
    pub attempt: u32,
    /// The chunk.
    pub chunk: u32,
    /// Whose words were summed: at least one rank.
    pub participants: Ranks,
    /// [`Signed::<ChunkCommit>::digest`] of each, ranks ascending.
    pub commits: Vec<Digest>,
    /// [`crate::rules::round::fixed::scales_digest`] of the shared exponents, in verified mode.
    pub shared: Option<Digest>,
    /// BLAKE3 of the output words.
    pub out_root: Digest,
}

impl Signed<SumCommit> {
    /// What a NonceSet, ChunkTags and reports name it by.
    pub fn digest(&self) -> Digest {
        Context::SUM_COMMIT.digest_one(self.payload())
    }

    /// Who summed.
    pub fn reducer(&self) -> Hotkey {
        Hotkey(self.signer())
    }
}

impl WireMessage for SumCommit {
    type Raw = pb::SumCommit;
    const MAX: usize = 10 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        let participants = Ranks::from_bytes(&raw.participants, "participants")?;
        let commits = digests(&raw.commits, limit::MEMBERS, "commits")?;
        if participants.is_empty() || participants.len() != commits.len() {
            return Err(WireError::field("commits"));
        }
        let shared = (!raw.shared.is_empty()).then(|| wire::id(&raw.shared, "shared")).transpose()?;
        Ok(Self {
            round: wire::id(&raw.round, "round")?,
            attempt: raw.attempt,
            chunk: chunk_index(raw.chunk)?,
            participants,
            commits: commits.into_iter().map(Digest).collect(),
            shared,
            out_root: wire::id(&raw.out_root, "out_root")?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::SumCommit {
            round: self.round.into(),
            attempt: self.attempt,
            chunk: self.chunk,
            participants: self.participants.to_bytes(),
            commits: self.commits.iter().flat_map(|digest| digest.0).collect::<Vec<u8>>().into(),
            shared: self.shared.map_or_else(Bytes::new, Bytes::from),
            out_root: self.out_root.into(),
        }
    }
}

impl Payload for SumCommit {
    const CONTEXT: &'static str = "sum-commit";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// The nonces that rho is made of. Signed by the reducer, so that nobody can be given others than its fellows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NonceSet {
    /// The round.
    pub round: RoundId,
    /// Which run at the chunk.
    pub attempt: u32,
    /// The chunk.
    pub chunk: u32,
    /// Digest of the SumCommit.
    pub sum: Digest,
    /// Of every participant, ranks ascending; zeros for one that came late.
    pub nonces: Vec<[u8; 32]>,
}

impl Signed<NonceSet> {
    /// What ChunkTags name it by.
    pub fn digest(&self) -> Digest {
        Context::NONCE_SET.digest_one(self.payload())
    }
}

impl WireMessage for NonceSet {
    type Raw = pb::NonceSet;
    const MAX: usize = 10 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Ok(Self {
            round: wire::id(&raw.round, "round")?,
            attempt: raw.attempt,
            chunk: chunk_index(raw.chunk)?,
            sum: wire::id(&raw.sum, "sum")?,
            nonces: digests(&raw.nonces, limit::MEMBERS, "nonces")?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::NonceSet {
            round: self.round.into(),
            attempt: self.attempt,
            chunk: self.chunk,
            sum: self.sum.into(),
            nonces: self.nonces.concat().into(),
        }
    }
}

impl Payload for NonceSet {
    const CONTEXT: &'static str = "nonce-set";
    const SCHEME: Scheme = Scheme::Sr25519;
}

/// Digest by which [`ChunkTags`] name the tags of the output.
pub fn out_digest(tags: &[u64]) -> Digest {
    let mut hasher = Context::OUT_TAGS.hasher();
    for tag in tags {
        hasher.update(&tag.to_le_bytes());
    }
    Digest(*hasher.finalize().as_bytes())
}

/// A member's checksums of its own words, and of the output that it got. Signed by the member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkTags {
    /// The round.
    pub round: RoundId,
    /// Which run at the chunk.
    pub attempt: u32,
    /// The chunk.
    pub chunk: u32,
    /// Who.
    pub rank: Rank,
    /// Digest of the SumCommit.
    pub sum: Digest,
    /// Digest of the NonceSet.
    pub nonces: Digest,
    /// One a group of its own words, each below 2^61 - 1.
    pub tags: Vec<u64>,
    /// [`out_digest`] of the output's.
    pub out: Digest,
}

impl WireMessage for ChunkTags {
    type Raw = pb::ChunkTags;
    const MAX: usize = 4 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        if raw.tags.len() > limit::CHUNK_GROUPS || raw.tags.iter().any(|tag| *tag >= P) {
            return Err(WireError::field("tags"));
        }
        Ok(Self {
            round: wire::id(&raw.round, "round")?,
            attempt: raw.attempt,
            chunk: chunk_index(raw.chunk)?,
            rank: rank(raw.rank, "rank")?,
            sum: wire::id(&raw.sum, "sum")?,
            nonces: wire::id(&raw.nonces, "nonces")?,
            tags: raw.tags,
            out: wire::id(&raw.out, "out")?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::ChunkTags {
            round: self.round.into(),
            attempt: self.attempt,
            chunk: self.chunk,
            rank: self.rank.into(),
            sum: self.sum.into(),
            nonces: self.nonces.into(),
            tags: self.tags.clone(),
            out: self.out.into(),
        }
    }
}

impl Payload for ChunkTags {
    const CONTEXT: &'static str = "chunk-tags";
    const SCHEME: Scheme = Scheme::Sr25519;
}
