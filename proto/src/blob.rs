//! What is said on /blob: which groups of a blob are wanted, and which are held.
//!
//! ```text
//! fetcher                          provider
//!   BlobRequest{blob, groups} --->
//!                             <--- BlobHeader{FOUND, len, groups}   groups = wanted and held
//!                             <--- their bao encoding, without a frame: its length follows from len and groups
//!   BlobRequest ...           --->                                  requests may be sent ahead of answers
//! ```
//!
//! A request without groups is answered by a header alone, whose groups are all that the provider holds. NOT_FOUND and
//! BUSY carry nothing else. A provider that cannot go on closes the stream.

use std::ops::Range;

use crate::id::BlobId;
use crate::pb;
use crate::units::ByteCount;
use crate::wire::{self, WireError, WireMessage, limit};

/// Bytes of a group: what is verified as one on arrival. Sixteen BLAKE3 chunks, the width of the widest vector unit.
pub const GROUP_LEN: u64 = 16 << 10;

/// Number of groups of a blob. An empty blob has one, empty, group.
pub const fn group_count(len: ByteCount) -> u64 {
    let groups = len.0.div_ceil(GROUP_LEN);
    if groups == 0 { 1 } else { groups }
}

/// A set of groups: ascending, disjoint, non-empty ranges that do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct GroupRanges(Vec<Range<u64>>);

impl GroupRanges {
    /// No group.
    pub const fn empty() -> Self {
        Self(Vec::new())
    }

    /// The groups of `range`.
    pub fn of(range: Range<u64>) -> Self {
        let mut set = Self::empty();
        set.insert(range);
        set
    }

    /// Every group of a blob of `len`.
    pub fn all(len: ByteCount) -> Self {
        Self::of(0..group_count(len))
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + ExactSizeIterator + '_ {
        self.0.iter().cloned()
    }

    /// Whether there is no group in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of groups.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|r| r.end - r.start).sum()
    }

    /// First group beyond the last range; 0 when empty.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |r| r.end)
    }

    /// Whether `group` is in it.
    pub fn contains(&self, group: u64) -> bool {
        let i = self.0.partition_point(|r| r.end <= group);
        self.0.get(i).is_some_and(|r| r.start <= group)
    }

    /// Whether all of `range` is in it.
    pub fn covers(&self, range: &Range<u64>) -> bool {
        let i = self.0.partition_point(|r| r.end <= range.start);
        range.is_empty() || self.0.get(i).is_some_and(|r| r.start <= range.start && range.end <= r.end)
    }

    /// Adds the groups of `range`.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        // All ranges that overlap or touch become one.
        let from = self.0.partition_point(|r| r.end < range.start);
        let to = self.0.partition_point(|r| r.start <= range.end);
        let (mut start, mut end) = (range.start, range.end);
        if from < to {
            start = start.min(self.0[from].start);
            end = end.max(self.0[to - 1].end);
        }
        self.0.splice(from..to, std::iter::once(start..end));
    }

    /// Takes the groups of `range` out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let from = self.0.partition_point(|r| r.end <= range.start);
        let to = self.0.partition_point(|r| r.start < range.end);
        if from >= to {
            return;
        }
        let head = self.0[from].start..range.start;
        let tail = range.end..self.0[to - 1].end;
        let kept = [head, tail].into_iter().filter(|r| !r.is_empty());
        self.0.splice(from..to, kept);
    }

    /// Adds every group of `other`.
    pub fn extend(&mut self, other: &Self) {
        other.iter().for_each(|r| self.insert(r));
    }

    /// Takes every group of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        other.iter().for_each(|r| self.remove(r));
    }

    /// Groups that are in both.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Self {
        let (mut out, mut i, mut j) = (Vec::new(), 0, 0);
        while let (Some(a), Some(b)) = (self.0.get(i), other.0.get(j)) {
            let (start, end) = (a.start.max(b.start), a.end.min(b.end));
            if start < end {
                out.push(start..end);
            }
            if a.end < b.end { i += 1 } else { j += 1 }
        }
        Self(out)
    }

    /// The first `max` ranges: what fits into a message.
    #[must_use]
    pub fn first(&self, max: usize) -> Self {
        Self(self.0[..self.0.len().min(max)].to_vec())
    }

    /// Bounds, ascending, as on the wire.
    pub fn to_pairs(&self) -> Vec<u64> {
        self.0.iter().flat_map(|r| [r.start, r.end]).collect()
    }

    /// From bounds: an even number of them, strictly ascending, at most `max` ranges.
    pub fn from_pairs(pairs: &[u64], max: usize) -> Result<Self, WireError> {
        let ascending = pairs.windows(2).all(|w| w[0] < w[1]);
        if !ascending || !pairs.len().is_multiple_of(2) || pairs.len() / 2 > max {
            return Err(WireError::field("groups"));
        }
        Ok(Self(pairs.chunks_exact(2).map(|p| p[0]..p[1]).collect()))
    }
}

/// Asks for groups of a blob; no group asks for the header alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobRequest {
    /// Which blob.
    pub blob: BlobId,
    /// Which of its groups; those beyond its end are ignored.
    pub groups: GroupRanges,
}

impl WireMessage for BlobRequest {
    type Raw = pb::BlobRequest;
    const MAX: usize = limit::BLOB_REQUEST;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        Ok(Self {
            blob: wire::id(&raw.blob, "blob")?,
            groups: GroupRanges::from_pairs(&raw.groups, limit::BLOB_REQUEST_RANGES)?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::BlobRequest { blob: self.blob.into(), groups: self.groups.to_pairs() }
    }
}

/// Answer to a [`BlobRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlobHeader {
    /// The encoding of `groups` follows, if the request named any.
    Found {
        /// Length of the blob, as the provider says: proven only by the groups.
        len: ByteCount,
        /// Groups that are wanted and held; all that are held where none was named.
        groups: GroupRanges,
    },
    /// Not held, or not for this peer: which of them is not told.
    NotFound,
    /// Too many transfers: later, or from another.
    Busy,
}

impl WireMessage for BlobHeader {
    type Raw = pb::BlobHeader;
    const MAX: usize = limit::BLOB_FRAME;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        use pb::blob_header::Status;
        match Status::try_from(raw.status) {
            Ok(Status::Found) => {
                let len = ByteCount(raw.len);
                let groups = GroupRanges::from_pairs(&raw.groups, limit::BLOB_HEADER_RANGES)?;
                if len > limit::BLOB || groups.end() > group_count(len) {
                    return Err(WireError::field(if len > limit::BLOB { "len" } else { "groups" }));
                }
                Ok(Self::Found { len, groups })
            }
            Ok(Status::NotFound) => Ok(Self::NotFound),
            Ok(Status::Busy) => Ok(Self::Busy),
            _ => Err(WireError::field("status")),
        }
    }

    fn to_raw(&self) -> Self::Raw {
        use pb::blob_header::Status;
        match self {
            Self::Found { len, groups } => {
                pb::BlobHeader { status: Status::Found.into(), len: len.0, groups: groups.to_pairs() }
            }
            Self::NotFound => pb::BlobHeader { status: Status::NotFound.into(), ..Default::default() },
            Self::Busy => pb::BlobHeader { status: Status::Busy.into(), ..Default::default() },
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn model(set: &GroupRanges) -> BTreeSet<u64> {
        set.iter().flatten().collect()
    }

    fn is_canonical(set: &GroupRanges) -> bool {
        set.0.iter().all(|r| r.start < r.end) && set.0.windows(2).all(|w| w[0].end < w[1].start)
    }

    proptest! {
        #[test]
        fn a_range_set_behaves_like_a_set(ops in prop::collection::vec((any::<bool>(), 0_u64..60, 0_u64..12), 0..40)) {
            let (mut set, mut wanted) = (GroupRanges::empty(), BTreeSet::new());
            for (add, start, len) in ops {
                if add {
                    set.insert(start..start + len);
                    wanted.extend(start..start + len);
                } else {
                    set.remove(start..start + len);
                    (start..start + len).for_each(|g| { wanted.remove(&g); });
                }
                prop_assert!(is_canonical(&set));
                prop_assert_eq!(&model(&set), &wanted);
                prop_assert_eq!(set.count(), wanted.len() as u64);
                for g in 0..75 {
                    prop_assert_eq!(set.contains(g), wanted.contains(&g));
                    prop_assert_eq!(set.covers(&(g..g + 3)), (g..g + 3).all(|x| wanted.contains(&x)));
                }
            }
            prop_assert_eq!(GroupRanges::from_pairs(&set.to_pairs(), 100).unwrap(), set);
        }

        #[test]
        fn two_sets_meet_where_both_are(
            a in prop::collection::vec((0_u64..60, 1_u64..9), 0..9), b in prop::collection::vec((0_u64..60, 1_u64..9), 0..9),
        ) {
            let build = |ranges: Vec<(u64, u64)>| {
                let mut set = GroupRanges::empty();
                ranges.into_iter().for_each(|(s, l)| set.insert(s..s + l));
                set
            };
            let (a, b) = (build(a), build(b));
            let both = a.intersect(&b);
            prop_assert!(is_canonical(&both));
            prop_assert_eq!(model(&both), model(&a).intersection(&model(&b)).copied().collect());
            let mut without = a.clone();
            without.subtract(&b);
            prop_assert_eq!(model(&without), model(&a).difference(&model(&b)).copied().collect());
        }

        #[test]
        fn any_bytes_parse_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let bytes = bytes::Bytes::from(bytes);
            if let Ok(request) = BlobRequest::decode(&bytes) {
                prop_assert_eq!(BlobRequest::decode(&request.encode().into()).unwrap(), request);
            }
            if let Ok(header) = BlobHeader::decode(&bytes) {
                prop_assert_eq!(BlobHeader::decode(&header.encode().into()).unwrap(), header);
            }
        }
    }

    #[test]
    fn bounds_that_do_not_ascend_are_refused() {
        for bad in [&[1_u64][..], &[2, 1], &[1, 1], &[0, 2, 2, 3], &[0, 4, 2, 6]] {
            assert!(GroupRanges::from_pairs(bad, 10).is_err(), "{bad:?}");
        }
        assert!(GroupRanges::from_pairs(&[0, 1, 2, 3], 1).is_err(), "more than the limit");
    }

    #[test]
    fn a_header_may_not_claim_more_than_its_length() {
        let header = BlobHeader::Found { len: ByteCount(GROUP_LEN), groups: GroupRanges::of(0..2) };
        assert!(BlobHeader::decode(&header.encode().into()).is_err());
        let vast = BlobHeader::Found { len: ByteCount(u64::MAX), groups: GroupRanges::of(0..2) };
        assert!(BlobHeader::decode(&vast.encode().into()).is_err());
    }

    #[test]
    fn the_largest_messages_fit_their_limits() {
        let set =
            |n: u64, max: u64| GroupRanges((0..n).map(|i| max - 4 * n + 4 * i..max - 4 * n + 4 * i + 2).collect());
        let groups = set(limit::BLOB_HEADER_RANGES as u64, group_count(limit::BLOB));
        let header = BlobHeader::Found { len: limit::BLOB, groups };
        assert!(header.encode().len() <= BlobHeader::MAX);
        let groups = set(limit::BLOB_REQUEST_RANGES as u64, u64::MAX);
        assert!(BlobRequest { blob: BlobId([9; 32]), groups }.encode().len() <= BlobRequest::MAX);
    }
}
