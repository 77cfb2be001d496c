//! A running sum over all records, by which a lost or revived record is noticed.
//!
//! The sum of the records' fingerprints modulo 2^128 does not depend on their order, and one write changes it without
//! looking at the others. It is made to notice accidents: 2^-128 for a damaged set of records to tally. It is not made
//! against somebody who writes the files himself.

/// What one record adds to a tally.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    fingerprint: u128,
    bytes: u64,
}

impl Entry {
    /// The entry of `value` under the full key (keyspace number and key).
    pub(super) fn of(full_key: &[u8], value: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(full_key.len() as u32).to_le_bytes()).update(full_key).update(value);
        let mut fingerprint = [0; 16];
        fingerprint.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        // The keyspace's byte is ours, not the caller's.
        let bytes = (full_key.len().saturating_sub(1) + value.len()) as u64;
        Self { fingerprint: u128::from_le_bytes(fingerprint), bytes }
    }
}

/// Sum, number and bytes of a set of records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    sum: u128,
    pub(super) records: u64,
    pub(super) bytes: u64,
}

impl Tally {
    /// Length of [`Tally::to_bytes`].
    pub(super) const LEN: usize = 32;

    pub(super) fn add(&mut self, entry: Entry) {
        self.sum = self.sum.wrapping_add(entry.fingerprint);
        self.records = self.records.wrapping_add(1);
        self.bytes = self.bytes.wrapping_add(entry.bytes);
    }

    pub(super) fn remove(&mut self, entry: Entry) {
        self.sum = self.sum.wrapping_sub(entry.fingerprint);
        self.records = self.records.wrapping_sub(1);
        self.bytes = self.bytes.wrapping_sub(entry.bytes);
    }

    pub(super) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(&self.sum.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.records.to_le_bytes());
        bytes[24..].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let (sum, rest) = bytes.split_at(16);
        let (records, held) = rest.split_at(8);
        let word = |part: &[u8]| part.iter().rev().fold(0, |word: u64, &byte| word << 8 | u64::from(byte));
        Self {
            sum: sum.iter().rev().fold(0, |sum, &byte| sum << 8 | u128::from(byte)),
            records: word(records),
            bytes: word(held),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Entry, Tally};

    #[test]
    fn a_tally_forgets_order_and_notices_every_part() {
        let (a, b) = (Entry::of(b"\x01a", b"1"), Entry::of(b"\x01b", b"22"));
        let mut there = Tally::default();
        there.add(a);
        there.add(b);
        let mut back = Tally::default();
        back.add(b);
        back.add(a);
        assert_eq!(there, back);
        assert_eq!((there.records, there.bytes), (2, 5));
        assert_eq!(Tally::from_bytes(&there.to_bytes()), there);
        there.remove(b);
        there.remove(a);
        assert_eq!(there, Tally::default());
        assert_ne!(Entry::of(b"\x01a", b"bc"), Entry::of(b"\x01ab", b"c"));
        assert_ne!(Entry::of(b"\x01a", b"b"), Entry::of(b"\x02a", b"b"));
    }
}
