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

/// Bits of a limb of r: a limb times a 32-bit word is below 2^53, so that 512 of them add up in a 64-bit lane.
const LIMB: u32 = 21;
/// Values that are multiplied at a time, so that each lane adds up `GROUP / LANES` products.
const LANES: usize = 8;

/// The numbers r of one chunk, in limbs: r = r0 + 2^21 r1 + 2^42 r2.
#[derive(Clone)]
pub struct TagKey {
    limbs: Box<[[i32; GROUP]; 3]>,
}

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
        let mut limbs = Box::new([[0; GROUP]; 3]);
        for k in 0..GROUP {
            let mut r = stream.next_u64() & P;
            while r == P {
                r = stream.next_u64() & P;
            }
            for (i, limb) in limbs.iter_mut().enumerate() {
                limb[k] = (r >> (LIMB * i as u32)) as i32 & ((1 << LIMB) - 1);
            }
        }
        Self { limbs }
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
        for group in words.chunks(GROUP * word.len()) {
            out.push(level.run(Tag { limbs: &self.limbs, words: group, word }));
        }
    }
}

struct Tag<'a> {
    limbs: &'a [[i32; GROUP]; 3],
    words: &'a [u8],
    word: Word,
}

impl Kernel for Tag<'_> {
    type Out = u64;

    #[inline(always)]
    fn run(self) -> u64 {
        match self.word {
            Word::W8 => reduce(sums(self.limbs, self.words.as_chunks().0, |w| i64::from(i8::from_le_bytes(w)))),
            Word::W16 => reduce(sums(self.limbs, self.words.as_chunks().0, |w| i64::from(i16::from_le_bytes(w)))),
            Word::W32 => reduce(sums(self.limbs, self.words.as_chunks().0, |w| i64::from(i32::from_le_bytes(w)))),
            Word::W64 => {
                let words = self.words.as_chunks().0;
                let low = reduce(sums(self.limbs, words, |w| i64::from(i64::from_le_bytes(w) as u32)));
                let high = reduce(sums(self.limbs, words, |w| i64::from_le_bytes(w) >> 32));
                add_mod(low, times_power(high, 32))
            }
        }
    }
}

/// Sums of the products of each limb, exact: each of 512 products a lane is below 2^53.
#[inline(always)]
fn sums<const N: usize>(limbs: &[[i32; GROUP]; 3], words: &[[u8; N]], value: impl Fn([u8; N]) -> i64) -> [i128; 3] {
    let mut lanes = [[0_i64; LANES]; 3];
    let (whole, rest) = words.as_chunks::<LANES>();
    for (i, eight) in whole.iter().enumerate() {
        for (limb, lanes) in limbs.iter().zip(&mut lanes) {
            let r = &limb[i * LANES..(i + 1) * LANES];
            for lane in 0..LANES {
                lanes[lane] += value(eight[lane]) * i64::from(r[lane]);
            }
        }
    }
    let done = whole.len() * LANES;
    for (limb, lanes) in limbs.iter().zip(&mut lanes) {
        for (lane, word) in rest.iter().enumerate() {
            lanes[lane] += value(*word) * i64::from(limb[done + lane]);
        }
    }
    lanes.map(|lanes| lanes.iter().map(|lane| i128::from(*lane)).sum())
}

/// s0 + 2^21 s1 + 2^42 s2 mod p.
#[inline(always)]
fn reduce(sums: [i128; 3]) -> u64 {
    let total = sums[0] + (sums[1] << LIMB) + (sums[2] << (2 * LIMB));
    total.rem_euclid(i128::from(P)) as u64
}

/// a 2^n mod p.
const fn times_power(a: u64, n: u32) -> u64 {
    (((a as u128) << n) % P as u128) as u64
}
