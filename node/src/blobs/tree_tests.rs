#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

pub(super) fn content(len: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; len];
    bao_tree::blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

/// Encoding straight from memory, to test against.
fn encode(data: &[u8], groups: &GroupRanges) -> (Shape, Vec<u8>) {
    let len = ByteCount(data.len() as u64);
    let mut outboard = Vec::new();
    let shape = Shape::new(hash_into(data, len, &mut outboard).unwrap(), len);
    assert_eq!(outboard.len() as u64, shape.outboard_len());
    let mut out = Vec::new();
    for step in shape.walk(groups) {
        match step {
            Step::Parent { at, .. } => out.extend_from_slice(&outboard[at as usize..at as usize + PAIR_LEN]),
            Step::Leaf { group, len, .. } => {
                let at = (group * GROUP_LEN) as usize;
                out.extend_from_slice(&data[at..at + len]);
            }
        }
    }
    (shape, out)
}

fn lens() -> impl Strategy<Value = usize> {
    prop_oneof![
        Just(0_usize),
        1_usize..3000,
        (1_usize..20, -1025_isize..1026).prop_map(|(g, d)| (g * GROUP_LEN as usize).saturating_add_signed(d)),
    ]
}

#[test]
fn the_id_is_plain_blake3() {
    for len in [0, 1, 1024, 16383, 16384, 16385, 100_000, 1 << 20] {
        let data = content(len, 1);
        let id = hash_into(&data[..], ByteCount(len as u64), io::sink()).unwrap();
        assert_eq!(id, BlobId::of(&data), "{len}");
    }
}

#[test]
fn the_encoding_is_baos() {
    let data = content(1_000_003, 2);
    let groups = GroupRanges::of(7..23);
    let (_, ours) = encode(&data, &groups);
    let block = BlockSize::from_chunk_log(4);
    let outboard = bao_tree::io::outboard::PreOrderMemOutboard::create(&data, block);
    let chunks = ChunkRanges::from(ChunkNum(7 * 16)..ChunkNum(23 * 16));
    let mut theirs = Vec::new();
    bao_tree::io::sync::encode_ranges_validated(&data[..], &outboard, &chunks, &mut theirs).unwrap();
    assert_eq!(ours, theirs);
}

proptest! {
    #[test]
    fn what_is_encoded_verifies_and_lands_where_it_belongs(
        len in lens(), picks in prop::collection::vec((0_u64..22, 1_u64..6), 1..4),
    ) {
        let data = content(len, 3);
        let mut groups = GroupRanges::empty();
        picks.into_iter().for_each(|(s, l)| groups.insert(s..s + l));
        let groups = groups.intersect(&GroupRanges::all(ByteCount(len as u64)));
        let (shape, encoded) = encode(&data, &groups);
        prop_assert_eq!(encoded.len() as u64, shape.encoded_len(&groups));
        let verified = verify(&shape, &groups, &encoded).unwrap();
        let mut seen = GroupRanges::empty();
        for (offset, bytes) in verified.data {
            let at = offset as usize;
            prop_assert_eq!(&data[at..at + bytes.len()], bytes);
            let first = offset / GROUP_LEN;
            seen.insert(first..first + group_count(ByteCount(bytes.len() as u64)));
        }
        prop_assert_eq!(seen, groups);
    }

    #[test]
    fn a_changed_byte_is_found(len in lens(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let data = content(len.max(1), 4);
        let groups = GroupRanges::all(ByteCount(data.len() as u64));
        let (shape, mut encoded) = encode(&data, &groups);
        let at = at.index(encoded.len());
        encoded[at] ^= 1 << bit;
        prop_assert!(verify(&shape, &groups, &encoded).is_err());
    }

    #[test]
    fn more_or_less_than_the_encoding_is_refused(len in 1_usize..70_000, cut in 1_usize..100) {
        let data = content(len, 5);
        let groups = GroupRanges::all(ByteCount(data.len() as u64));
        let (shape, mut encoded) = encode(&data, &groups);
        prop_assert!(verify(&shape, &groups, &encoded[..encoded.len() - cut.min(encoded.len())]).is_err());
        encoded.push(0);
        prop_assert!(verify(&shape, &groups, &encoded).is_err());
    }

    #[test]
    fn garbage_never_passes(len in 1_u64..200_000, junk in prop::collection::vec(any::<u8>(), 0..40_000)) {
        let shape = Shape::new(BlobId([7; 32]), ByteCount(len));
        prop_assert!(verify(&shape, &GroupRanges::all(ByteCount(len)), &junk).is_err());
    }

    #[test]
    fn another_length_for_the_same_bytes_is_refused(len in 1_usize..100_000, other in 1_u64..100_000) {
        let data = content(len, 6);
        prop_assume!(other != len as u64);
        let groups = GroupRanges::all(ByteCount(len as u64));
        let (shape, encoded) = encode(&data, &groups);
        let wrong = Shape::new(shape.id(), ByteCount(other));
        prop_assert!(verify(&wrong, &GroupRanges::all(ByteCount(other)), &encoded).is_err());
    }
}
