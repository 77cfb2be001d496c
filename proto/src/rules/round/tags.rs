//! Checksums of groups: what shows that a sum is the sum.
//!
//! p = 2^61 - 1. A group's tag is the sum of r_k x_k mod p over its words x_k, where the 4,096 numbers r are drawn after
//! everyone has committed to its words: from rho, which depends on every commitment and on a nonce of every member. Tags
//! are linear, so the tags of the inputs of a group add up to the tag of its sum; a sum that is wrong in any way passes
//! with 2^-61. That holds for words below p: [`super::fixed::check_range`] comes first.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::dtype::Word;
use super::layout::GROUP;
use super::simd::{Kernel, Level, level};
use crate::crypto::Context;
use crate::id::{Digest, RoundId};

/// The modulus, 2^61 - 1.
pub const P: u64 = (1 << 61) - 1;

/// Seed of a chunk's checksums. `commits` and `nonces` are those of the participants, ranks ascending; a nonce that came
/// late is zeros.
pub fn rho(round: &RoundId, chunk: u32, sum: &Digest, commits: &[Digest], nonces: &[[u8; 32]]) -> Digest {
    let commits: Vec<u8> = commits.iter().flat_map(|digest| digest.0).collect();
    let fields: [&[u8]; 5] = [round.as_ref(), &chunk.to_le_bytes(), sum.as_ref(), &commits, nonces.as_flattened()];
    Context::ROUND_RHO.digest(&fields)
}

/// Two tags, each below p, added.
pub const fn add_mod(a: u64, b: u64) -> u64 {
    let sum = a + b;
    if sum >= P { sum - P } else { sum }
}

/// Adds `tags` to `sums`, group by group.
pub fn add_all(sums: &mut [u64], tags: &[u64]) {
    sums.iter_mut().zip(tags).for_each(|(sum, tag)| *sum = add_mod(*sum, *tag));
}

/// Groups whose tags are computed together: each number r is loaded once for all of them, and their sums still fit the
/// sixteen registers of AVX2.
const TOGETHER: usize = 3;

/// The numbers r of one chunk, cut into limbs that make products of 64 bits.
///
/// A processor multiplies 32-bit lanes into 64-bit ones, and 61 bits do not fit a lane. Words of 32 bits take three limbs
/// of 21 bits: a product is below 2^53, and 1,024 of them add up in 64 bits. Words of 16 and 8 bits take two limbs, of 31
/// and 30 bits: products below 2^47, a whole group of which adds up. Nothing is reduced before the end of a group.
#[derive(Clone)]
pub struct TagKey {
    /// r = a + 2^21 b + 2^42 c.
    wide: Box<[[i32; GROUP]; 3]>,
    /// r = a + 2^31 b.
    narrow: Box<[[i32; GROUP]; 2]>,
}

const WIDE: u32 = 21;
const NARROW: u32 = 31;

impl std::fmt::Debug for TagKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TagKey")
    }
}

impl TagKey {
    /// Draws the numbers: 8 bytes each of ChaCha8's stream under `rho`, little-endian, the lower 61 bits; p itself is
    /// drawn again.
    pub fn new(rho: &Digest) -> Self {
        let mut stream = ChaCha8Rng::from_seed(rho.0);
        let (mut wide, mut narrow) = (Box::new([[0; GROUP]; 3]), Box::new([[0; GROUP]; 2]));
        let limb = |r: u64, bits: u32, i: u32| (r >> (bits * i) & ((1 << bits) - 1)) as i32;
        for k in 0..GROUP {
            let mut r = stream.next_u64() & P;
            while r == P {
                r = stream.next_u64() & P;
            }
            (0..).zip(wide.iter_mut()).for_each(|(i, limbs)| limbs[k] = limb(r, WIDE, i));
            (0..).zip(narrow.iter_mut()).for_each(|(i, limbs)| limbs[k] = limb(r, NARROW, i));
        }
        Self { wide, narrow }
    }

    /// Tag of one group, at most 4,096 words of `word`'s width.
    ///
    /// # Panics
    /// When there are more words, or not whole ones.
    pub fn tag(&self, words: &[u8], word: Word) -> u64 {
        let mut tag = Vec::with_capacity(1);
        assert!(words.len() <= GROUP * word.len(), "one group");
        self.tags(words, word, &mut tag);
        tag.first().copied().unwrap_or(0)
    }

    /// Appends the tags of a chunk's groups, or of consecutive whole groups of it.
    ///
    /// # Panics
    /// When there are not whole words.
    pub fn tags(&self, words: &[u8], word: Word, out: &mut Vec<u64>) {
        self.tags_at(level(), words, word, out);
    }

    /// As [`Self::tags`], by a given vector unit: what tests and benches compare.
    pub fn tags_at(&self, level: Level, words: &[u8], word: Word, out: &mut Vec<u64>) {
        assert!(words.len().is_multiple_of(word.len()), "whole words");
        let group = GROUP * word.len();
        let (together, rest) = words.split_at(words.len() / (group * TOGETHER) * (group * TOGETHER));
        for groups in together.chunks_exact(group * TOGETHER) {
            let words: [&[u8]; TOGETHER] = std::array::from_fn(|g| &groups[g * group..(g + 1) * group]);
            out.extend(level.run(Tags { key: self, words, word }));
        }
        for group in rest.chunks(group) {
            out.extend(level.run(Tags { key: self, words: [group], word }));
        }
    }
}

/// Tags of groups of one length.
struct Tags<'a, const G: usize> {
    key: &'a TagKey,
    words: [&'a [u8]; G],
    word: Word,
}

impl<const G: usize> Kernel for Tags<'_, G> {
    type Out = [u64; G];

    #[inline(always)]
    fn run(self) -> [u64; G] {
        let (wide, narrow) = (&self.key.wide, &self.key.narrow);
        match self.word {
            Word::W8 => {
                let value = |w, r| i64::from(i8::from_le_bytes(w)) * i64::from(r);
                sums(narrow, self.words.map(|w| w.as_chunks().0), value).map(|s| reduce(&s, NARROW))
            }
            Word::W16 => {
                let value = |w, r| i64::from(i16::from_le_bytes(w)) * i64::from(r);
                sums(narrow, self.words.map(|w| w.as_chunks().0), value).map(|s| reduce(&s, NARROW))
            }
            Word::W32 => {
                let value = |w, r| i64::from(i32::from_le_bytes(w)) * i64::from(r);
                sums(wide, self.words.map(|w| w.as_chunks().0), value).map(|s| reduce(&s, WIDE))
            }
            Word::W64 => {
                // Both factors without sign, or both with it: the processor has no instruction for a mixture.
                let low = |w, r: i32| i64::from(i64::from_le_bytes(w) as u32) * i64::from(r as u32);
                let high = |w, r| i64::from((i64::from_le_bytes(w) >> 32) as i32) * i64::from(r);
                let low = sums(wide, self.words.map(|w| w.as_chunks().0), low).map(|s| reduce(&s, WIDE));
                let high = sums(wide, self.words.map(|w| w.as_chunks().0), high).map(|s| reduce(&s, WIDE));
                std::array::from_fn(|g| add_mod(low[g], times_power(high[g], 32)))
            }
        }
    }
}

/// Sums of the products with each limb, for each group. A product is below 2^53, so 1,024 of them do not wrap.
#[inline(always)]
fn sums<const N: usize, const G: usize, const L: usize>(
    limbs: &[[i32; GROUP]; L],
    groups: [&[[u8; N]]; G],
    product: impl Fn([u8; N], i32) -> i64 + Copy,
) -> [[i128; L]; G] {
    const SEGMENT: usize = 1_024;
    let mut totals = [[0; L]; G];
    let len = groups.iter().map(|group| group.len()).min().unwrap_or(0);
    for start in (0..len).step_by(SEGMENT) {
        let end = (start + SEGMENT).min(len);
        let limbs: [&[i32]; L] = std::array::from_fn(|l| &limbs[l][start..end]);
        let words: [&[[u8; N]]; G] = groups.map(|group| &group[start..end]);
        let mut sums = [[0_i64; L]; G];
        // One plain loop over equally long slices: that is what the compiler vectorises.
        for k in 0..end - start {
            for g in 0..G {
                for l in 0..L {
                    sums[g][l] = sums[g][l].wrapping_add(product(words[g][k], limbs[l][k]));
                }
            }
        }
        for g in 0..G {
            for l in 0..L {
                totals[g][l] += i128::from(sums[g][l]);
            }
        }
    }
    totals
}

/// s0 + 2^bits s1 + 2^(2 bits) s2 mod p.
#[inline(always)]
fn reduce(sums: &[i128], bits: u32) -> u64 {
    let total = (0..).zip(sums).fold(0, |total, (i, sum)| total + (sum << (bits * i)));
    total.rem_euclid(i128::from(P)) as u64
}

/// a 2^n mod p.
const fn times_power(a: u64, n: u32) -> u64 {
    (((a as u128) << n) % P as u128) as u64
}
