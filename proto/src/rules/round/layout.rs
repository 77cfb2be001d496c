//! The element space of a round: all its tensors, one behind the other, cut into blocks, groups, parts and chunks.
//!
//! ```text
//! elements  0 ........................................................ N
//! groups    |4096|4096|4096|4096|4096|4096|4096|4096|4096|4096|4096|rest|   16 blocks of 256 elements each
//! parts     |       part 0 (3 groups)      |           part 1          |
//! chunks    | chunk 0 (2 groups) | chunk 1 | chunk 2 | chunk 3 ...     |   chunk_groups = 2, numbered through
//! ```
//!
//! A chunk is of one part. Only the last group, and with it the last block, may be shorter than the others.

use std::ops::Range;

use crate::wire::limit;

/// Elements that share an exponent.
pub const BLOCK: usize = 256;
/// Elements under one checksum.
pub const GROUP: usize = 4_096;

/// Number of blocks of `elements` that begin at a block.
pub const fn blocks(elements: usize) -> usize {
    elements.div_ceil(BLOCK)
}

/// Number of groups of `elements` that begin at a group.
pub const fn groups(elements: u64) -> u64 {
    elements.div_ceil(GROUP as u64)
}

/// One chunk's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its number in the round.
    pub index: u32,
    /// The part that it is of.
    pub part: usize,
    /// Its groups, counted through the round.
    pub groups: Range<u64>,
    /// Its elements, counted through the round.
    pub elements: Range<u64>,
}

impl Chunk {
    /// Number of elements, at most 2^20.
    pub fn len(&self) -> usize {
        (self.elements.end - self.elements.start) as usize
    }

    /// Whether there is none: never, of a chunk that [`ChunkMap::chunk`] gave.
    pub fn is_empty(&self) -> bool {
        self.elements.is_empty()
    }

    /// Number of groups, 1 to 256.
    pub fn group_count(&self) -> usize {
        (self.groups.end - self.groups.start) as usize
    }

    /// Elements of one of its groups, counted from the chunk's first; empty beyond its end.
    pub fn group(&self, group: usize) -> Range<usize> {
        let at = |g: usize| (g * GROUP).min(self.len());
        at(group)..at(group + 1)
    }
}

/// Where chunks and parts are. Pure arithmetic over the fields of a RoundOpen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkMap {
    elements: u64,
    chunk_groups: u64,
    /// Groups of each part.
    parts: Vec<Range<u64>>,
    /// Number of each part's first chunk; behind them the number of all.
    firsts: Vec<u32>,
}

impl ChunkMap {
    /// Of `elements` over `parts`, ranges of groups which must follow each other without gaps, none of them empty, and
    /// cover all groups. `chunk_groups` is a power of two up to 256. `None` when something of that does not hold, or when
    /// there would be more than [`limit::CHUNKS`] chunks.
    pub fn new(elements: u64, parts: &[Range<u64>], chunk_groups: u32) -> Option<Self> {
        let valid = chunk_groups.is_power_of_two() && chunk_groups as usize <= limit::CHUNK_GROUPS;
        if !valid || elements > (limit::CHUNKS * limit::CHUNK_GROUPS * GROUP) as u64 {
            return None;
        }
        let chunk_groups = u64::from(chunk_groups);
        let (mut next, mut chunks) = (0, 0_u64);
        let mut firsts = Vec::with_capacity(parts.len() + 1);
        for part in parts {
            if part.start != next || part.is_empty() {
                return None;
            }
            next = part.end;
            firsts.push(u32::try_from(chunks).ok()?);
            chunks = chunks.checked_add((part.end - part.start).div_ceil(chunk_groups))?;
        }
        if next != groups(elements) || chunks > limit::CHUNKS as u64 {
            return None;
        }
        firsts.push(u32::try_from(chunks).ok()?);
        Some(Self { elements, chunk_groups, parts: parts.to_vec(), firsts })
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.elements
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u32 {
        self.firsts.last().copied().unwrap_or(0)
    }

    /// Number of parts.
    pub fn parts(&self) -> usize {
        self.parts.len()
    }

    /// Numbers of a part's chunks; empty for a part that does not exist.
    pub fn part_chunks(&self, part: usize) -> Range<u32> {
        match self.firsts.get(part..part + 2) {
            Some(&[first, end]) => first..end,
            _ => 0..0,
        }
    }

    /// Elements of a part; empty for a part that does not exist.
    pub fn part_elements(&self, part: usize) -> Range<u64> {
        self.parts.get(part).map_or(0..0, |groups| self.elements_of(groups))
    }

    /// A chunk's place, unless there is none of that number.
    pub fn chunk(&self, index: u32) -> Option<Chunk> {
        if index >= self.chunks() {
            return None;
        }
        let part = self.firsts.partition_point(|first| *first <= index) - 1;
        let whole = &self.parts[part];
        let start = whole.start + u64::from(index - self.firsts[part]) * self.chunk_groups;
        let groups = start..(start + self.chunk_groups).min(whole.end);
        Some(Chunk { index, part, elements: self.elements_of(&groups), groups })
    }

    fn elements_of(&self, groups: &Range<u64>) -> Range<u64> {
        let at = |g: u64| (g * GROUP as u64).min(self.elements);
        at(groups.start)..at(groups.end)
    }
}

/// Ranges of `total` groups in proportion to `weights`, in their order; without any weight all get the same. A range is
/// empty where its weight is too small: a part of a round must not be, so leave such ones out. `total` is below 2^48.
pub fn partition(total: u64, weights: &[u64]) -> Vec<Range<u64>> {
    let sum: u128 = weights.iter().map(|w| u128::from(*w)).sum();
    let weight = |w: u64| if sum == 0 { 1 } else { u128::from(w) };
    let all = if sum == 0 { weights.len() as u128 } else { sum };
    let (mut before, mut start) = (0_u128, 0_u64);
    weights
        .iter()
        .map(|w| {
            before += weight(*w);
            // Fewer than 2^16 weights below 2^64, times a total below 2^48.
            let end = (u128::from(total) * before / all) as u64;
            let range = start..end;
            start = end;
            range
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_element_is_in_one_chunk(
            elements in 0_u64..2_000_000, weights in prop::collection::vec(0_u64..9, 1..9), shift in 0_u32..=8,
        ) {
            let parts: Vec<_> =
                partition(groups(elements), &weights).into_iter().filter(|range| !range.is_empty()).collect();
            let map = ChunkMap::new(elements, &parts, 1 << shift);
            let Some(map) = map else { return Err(TestCaseError::fail("refused")) };
            let mut next = 0;
            for index in 0..map.chunks() {
                let Some(chunk) = map.chunk(index) else { return Err(TestCaseError::fail("no chunk")) };
                prop_assert_eq!(chunk.elements.start, next);
                prop_assert!(!chunk.is_empty() && chunk.group_count() <= 1 << shift);
                prop_assert!(map.part_chunks(chunk.part).contains(&index));
                let part = map.part_elements(chunk.part);
                prop_assert!(part.start <= chunk.elements.start && chunk.elements.end <= part.end);
                let inside: usize = (0..chunk.group_count()).map(|g| chunk.group(g).len()).sum();
                prop_assert_eq!(inside, chunk.len());
                next = chunk.elements.end;
            }
            prop_assert_eq!(next, elements);
            prop_assert_eq!(map.chunk(map.chunks()), None);
        }

        #[test]
        fn shares_are_in_proportion(total in 0_u64..1 << 40, weights in prop::collection::vec(any::<u64>(), 1..20)) {
            let ranges = partition(total, &weights);
            prop_assert_eq!(ranges.first().map(|r| r.start), Some(0));
            prop_assert_eq!(ranges.last().map(|r| r.end), Some(total));
            prop_assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
            let sum: f64 = weights.iter().map(|w| *w as f64).sum();
            for (range, weight) in ranges.iter().zip(&weights) {
                let share = total as f64 * (*weight as f64 / sum);
                prop_assert!(((range.end - range.start) as f64 - share).abs() <= 1.0 + share * 1e-9);
            }
        }
    }

    #[test]
    fn parts_with_gaps_are_refused() {
        let one = |parts: &[Range<u64>], groups| ChunkMap::new(10_000, parts, groups).is_some();
        assert!(one(&[0..1, 1..3], 1));
        assert!(!one(&[0..1, 2..3], 1), "a gap");
        assert!(!one(&[0..3, 3..3], 1), "an empty part");
        assert!(!one(&[0..1, 1..2], 1), "too short");
        assert!(!one(&[0..1, 1..4], 1), "too long");
        assert!(!one(&[0..1, 1..3], 3), "no power of two");
        assert!(!one(&[0..1, 1..3], 512), "too large a chunk");
        assert_eq!(ChunkMap::new(0, &[], 1).map(|m| m.chunks()), Some(0));
        let many = limit::CHUNKS as u64 + 1;
        assert!(ChunkMap::new(many * GROUP as u64, std::slice::from_ref(&(0..many)), 1).is_none());
    }
}
