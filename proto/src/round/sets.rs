//! Sets of ranks and of chunks: bit n of byte n / 8, without trailing zero bytes, so that a set has one encoding.

use bytes::Bytes;

use super::Rank;
use crate::wire::{WireError, limit};

/// A set of ranks.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Ranks([u64; 4]);

impl Ranks {
    /// No rank.
    pub const fn empty() -> Self {
        Self([0; 4])
    }

    /// Adds a rank.
    pub fn insert(&mut self, rank: Rank) {
        self.0[usize::from(rank) / 64] |= 1 << (rank % 64);
    }

    /// Takes a rank out.
    pub fn remove(&mut self, rank: Rank) {
        self.0[usize::from(rank) / 64] &= !(1 << (rank % 64));
    }

    /// Whether a rank is in it.
    pub fn contains(&self, rank: Rank) -> bool {
        self.0[usize::from(rank) / 64] >> (rank % 64) & 1 == 1
    }

    /// Number of ranks, at most 256.
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// The ranks, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Rank> + '_ {
        (0..=Rank::MAX).filter(|rank| self.contains(*rank))
    }

    /// The place of a rank among those of the set, unless it is not in it.
    pub fn position(&self, rank: Rank) -> Option<usize> {
        self.contains(rank).then(|| self.iter().take_while(|r| *r < rank).count())
    }

    /// Whether every rank of it is in `other`.
    pub fn is_subset(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).all(|(a, b)| a & !b == 0)
    }

    /// As on the wire.
    pub fn to_bytes(&self) -> Bytes {
        trimmed(self.0.iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    /// From the wire.
    pub fn from_bytes(bytes: &[u8], field: &'static str) -> Result<Self, WireError> {
        let bytes = checked(bytes, limit::MEMBERS, field)?;
        let mut set = Self::empty();
        for (i, byte) in bytes.iter().enumerate() {
            set.0[i / 8] |= u64::from(*byte) << (i % 8 * 8);
        }
        Ok(set)
    }
}

impl FromIterator<Rank> for Ranks {
    fn from_iter<I: IntoIterator<Item = Rank>>(ranks: I) -> Self {
        let mut set = Self::empty();
        ranks.into_iter().for_each(|rank| set.insert(rank));
        set
    }
}

impl std::fmt::Debug for Ranks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// A set of chunks of one round.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct ChunkSet(Vec<u8>);

impl ChunkSet {
    /// No chunk.
    pub const fn empty() -> Self {
        Self(Vec::new())
    }

    /// Adds a chunk. One beyond [`limit::CHUNKS`] is in no set: it is not added.
    pub fn insert(&mut self, chunk: u32) {
        let place = chunk as usize / 8;
        if chunk as usize >= limit::CHUNKS {
            return;
        }
        if self.0.len() <= place {
            self.0.resize(place + 1, 0);
        }
        self.0[place] |= 1 << (chunk % 8);
    }

    /// Takes a chunk out.
    pub fn remove(&mut self, chunk: u32) {
        if let Some(byte) = self.0.get_mut(chunk as usize / 8) {
            *byte &= !(1 << (chunk % 8));
            self.0.truncate(self.0.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1));
        }
    }

    /// Whether a chunk is in it.
    pub fn contains(&self, chunk: u32) -> bool {
        self.0.get(chunk as usize / 8).is_some_and(|byte| byte >> (chunk % 8) & 1 == 1)
    }

    /// Number of chunks.
    pub fn len(&self) -> usize {
        self.0.iter().map(|byte| byte.count_ones() as usize).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first chunk that is beyond all of the set; 0 when empty.
    pub fn end(&self) -> u32 {
        self.0.last().map_or(0, |byte| self.0.len() as u32 * 8 - byte.leading_zeros())
    }

    /// The chunks, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.end()).filter(|chunk| self.contains(*chunk))
    }

    /// As on the wire.
    pub fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }

    /// From the wire.
    pub fn from_bytes(bytes: &[u8], field: &'static str) -> Result<Self, WireError> {
        Ok(Self(checked(bytes, limit::CHUNKS, field)?.to_vec()))
    }
}

impl FromIterator<u32> for ChunkSet {
    fn from_iter<I: IntoIterator<Item = u32>>(chunks: I) -> Self {
        let mut set = Self::empty();
        chunks.into_iter().for_each(|chunk| set.insert(chunk));
        set
    }
}

impl std::fmt::Debug for ChunkSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

fn trimmed(mut bytes: Vec<u8>) -> Bytes {
    bytes.truncate(bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1));
    bytes.into()
}

fn checked<'a>(bytes: &'a [u8], bits: usize, field: &'static str) -> Result<&'a [u8], WireError> {
    if bytes.len() > bits / 8 || bytes.last() == Some(&0) { Err(WireError::field(field)) } else { Ok(bytes) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sets_behave_like_sets(ops in prop::collection::vec((any::<bool>(), any::<u8>()), 0..60)) {
            let (mut ranks, mut chunks, mut wanted) = (Ranks::empty(), ChunkSet::empty(), BTreeSet::new());
            for (add, n) in ops {
                if add {
                    ranks.insert(n);
                    chunks.insert(n.into());
                    wanted.insert(n);
                } else {
                    ranks.remove(n);
                    chunks.remove(n.into());
                    wanted.remove(&n);
                }
            }
            prop_assert_eq!(ranks.iter().collect::<Vec<_>>(), wanted.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(chunks.iter().collect::<Vec<_>>(), wanted.iter().map(|n| u32::from(*n)).collect::<Vec<_>>());
            prop_assert_eq!((ranks.len(), chunks.len()), (wanted.len(), wanted.len()));
            prop_assert_eq!((ranks.is_empty(), chunks.is_empty()), (wanted.is_empty(), wanted.is_empty()));
            prop_assert_eq!(chunks.end(), wanted.last().map_or(0, |n| u32::from(*n) + 1));
            for (place, rank) in wanted.iter().enumerate() {
                prop_assert_eq!(ranks.position(*rank), Some(place));
            }
            prop_assert_eq!(Ranks::from_bytes(&ranks.to_bytes(), "r").unwrap(), ranks);
            prop_assert_eq!(ChunkSet::from_bytes(&chunks.to_bytes(), "c").unwrap(), chunks);
        }
    }

    #[test]
    fn a_set_has_one_encoding() {
        assert!(Ranks::from_bytes(&[1, 0], "r").is_err());
        assert!(Ranks::from_bytes(&[1; 33], "r").is_err());
        assert!(ChunkSet::from_bytes(&[0], "c").is_err());
        assert!(ChunkSet::from_bytes(&vec![1; limit::CHUNKS / 8 + 1], "c").is_err());
        let mut set = ChunkSet::empty();
        set.insert(limit::CHUNKS as u32);
        assert!(set.is_empty());
    }
}
