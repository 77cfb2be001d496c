//! Verified mode: floats become integers under exponents that all members share, and integers add up alike everywhere.
//!
//! ```text
//! member    block_exponents   -> Scale           one byte a block of 256 elements
//! reducer   max_exponents     -> ScaleSet        the greatest of each block rules
//! member    covers, quantise  -> words           q = round-half-even(x 2^-s), |q| <= Q
//! reducer   check_range, sum_into, finish -> output words
//! member    dequantise        -> tensor          word 2^s / divisor in f64, rounded once
//! ```
//!
//! An exponent byte is 0 where a block is all zeros, else 1 + s - [`Wire::first_exponent`]. Words of i32 tensors are the
//! elements themselves, under byte 1 for 2^0.
//!
//! With error feedback x is the element plus the residual, what quantising took away the time before.
//!
//! Lengths are the caller's own business: functions here panic when slices do not fit each other, and refuse what members
//! can do wrong.

use super::dtype::{Dtype, Wire, Word, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use super::layout::{BLOCK, blocks};
use super::simd::{Kernel, Level, level, to_i32};
use crate::crypto::Context;
use crate::id::Digest;

/// Why a tensor has no words, or words no tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("element {index} is {kind}")]
pub struct Refusal {
    /// The element, counted from the first that was given.
    pub index: usize,
    /// What it is.
    pub kind: RefusalKind,
}

/// See [`Refusal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RefusalKind {
    /// Not a number.
    #[error("not a number")]
    Nan,
    /// Infinite.
    #[error("infinite")]
    Infinite,
    /// Beyond what words, or the result's type, can say.
    #[error("too large")]
    Overflow,
}

/// Digest by which a ChunkCommit names exponents.
pub fn scales_digest(exponents: &[u8]) -> Digest {
    Context::SCALES.digest_one(exponents)
}

/// Exponents of the blocks of `tensor`, elements of `dtype` that begin at a block. `residual` has as many values as
/// `tensor` elements.
pub fn block_exponents(wire: Wire, dtype: Dtype, tensor: &[u8], residual: Option<&[f32]>) -> Result<Vec<u8>, Refusal> {
    let elements = tensor.len() / dtype.len();
    assert!(residual.is_none_or(|r| r.len() == elements), "a residual an element");
    if dtype == Dtype::I32 {
        return match first_beyond(Word::W32, tensor, wire.q().into()) {
            Some(index) => Err(Refusal { index, kind: RefusalKind::Overflow }),
            None => Ok(vec![1; blocks(elements)]),
        };
    }
    let mut out = Vec::with_capacity(blocks(elements));
    let mut maxima = [0_u32; 64];
    for start in (0..elements).step_by(BLOCK * maxima.len()) {
        let end = (start + BLOCK * maxima.len()).min(elements);
        let tensor = &tensor[start * dtype.len()..end * dtype.len()];
        let maxima = &mut maxima[..blocks(end - start)];
        level().run(Maxima { dtype, tensor, residual: residual.map(|r| &r[start..end]), out: maxima });
        for (i, bits) in maxima.iter().enumerate() {
            if *bits >= f32::INFINITY.to_bits() {
                return Err(refused(dtype, tensor, residual.map(|r| &r[start..end]), i * BLOCK, start));
            }
            out.push(exponent(wire, f32::from_bits(*bits)));
        }
    }
    Ok(out)
}

/// The first element from `from` on that is not finite. Cold.
fn refused(dtype: Dtype, tensor: &[u8], residual: Option<&[f32]>, from: usize, start: usize) -> Refusal {
    for i in from..tensor.len() / dtype.len() {
        let value = element(dtype, tensor, i);
        let sum = value + residual.map_or(0.0, |r| r[i]);
        let kind = match (value.is_nan(), sum.is_finite()) {
            (_, true) => continue,
            (true, _) => RefusalKind::Nan,
            (false, _) if value.is_infinite() => RefusalKind::Infinite,
            (false, _) => RefusalKind::Overflow,
        };
        return Refusal { index: start + i, kind };
    }
    unreachable!("a block whose maximum is not finite has an element that is not")
}

/// Byte of the smallest power of two under which `max`, finite, comes to no more than Q.
fn exponent(wire: Wire, max: f32) -> u8 {
    if max == 0.0 {
        return 0;
    }
    let (value, q) = (f64::from(max), f64::from(wire.q()));
    // A half goes to the even one: Q + 1/2 comes to Q where that is even.
    let fits = |scaled: f64| if wire.q().is_multiple_of(2) { scaled <= q + 0.5 } else { scaled < q + 0.5 };
    let power = |v: f64| (v.to_bits() >> 52) as i32 - 1_023;
    let mut s = (power(value) - power(q) - 1).max(wire.first_exponent());
    while !fits(value * power_of_two(-s)) {
        s += 1;
    }
    (s - wire.first_exponent() + 1) as u8
}

/// 2^n for n within the exponents of f64.
fn power_of_two(n: i32) -> f64 {
    f64::from_bits(((n + 1_023) as u64) << 52)
}

/// The power of two that a byte stands for; a block of zeros has the smallest.
fn scale_of(wire: Wire, dtype: Dtype, byte: u8) -> i32 {
    if dtype == Dtype::I32 { 0 } else { wire.first_exponent() + i32::from(byte.max(1)) - 1 }
}

/// Raises `shared` to the exponents of one more member.
pub fn max_exponents(shared: &mut [u8], member: &[u8]) {
    assert_eq!(shared.len(), member.len(), "one exponent a block");
    shared.iter_mut().zip(member).for_each(|(s, m)| *s = (*s).max(*m));
}

/// Whether shared exponents are at least a member's own: what a member checks before it quantises, since smaller ones
/// would take its words beyond Q.
pub fn covers(shared: &[u8], own: &[u8]) -> bool {
    shared.len() == own.len() && shared.iter().zip(own).all(|(s, o)| s >= o)
}

/// Writes the words of `tensor` under `shared` exponents that [`covers`] its own. `out` has the words' bytes. With a
/// `residual` the words are of element plus residual, and what they leave away is the new residual.
pub fn quantise(wire: Wire, dtype: Dtype, tensor: &[u8], shared: &[u8], out: &mut [u8], residual: Option<&mut [f32]>) {
    quantise_at(level(), wire, dtype, tensor, shared, out, residual);
}

/// As [`quantise`], by a given vector unit: what tests and benches compare.
pub fn quantise_at(
    level: Level,
    wire: Wire,
    dtype: Dtype,
    tensor: &[u8],
    shared: &[u8],
    out: &mut [u8],
    residual: Option<&mut [f32]>,
) {
    let elements = tensor.len() / dtype.len();
    assert_eq!(out.len(), elements * wire.input().len(), "a word an element");
    assert_eq!(shared.len(), blocks(elements), "one exponent a block");
    assert!(residual.as_ref().is_none_or(|r| r.len() == elements), "a residual an element");
    if dtype == Dtype::I32 {
        out.copy_from_slice(tensor);
        return;
    }
    level.run(Quantise { wire, dtype, tensor, shared, out, residual });
}

/// Whether every word is within `-q..=q`. A reducer asks before it adds a member's words, a member before it takes an
/// output.
pub fn check_range(word: Word, words: &[u8], q: u64) -> bool {
    level().run(Range { word, words, q })
}

/// Index of the first word beyond `-q..=q`.
pub fn first_beyond(word: Word, words: &[u8], q: u64) -> Option<usize> {
    let piece = 4_096 * word.len();
    let start = words.chunks(piece).position(|piece| !check_range(word, piece, q))?;
    let inside = words[start * piece..].chunks(word.len()).position(|one| !check_range(word, one, q))?;
    Some(start * 4_096 + inside)
}

/// Adds a member's words to a sum of output words. Sums of words in range stay in range; others wrap.
pub fn sum_into(wire: Wire, sum: &mut [u8], words: &[u8]) {
    sum_into_at(level(), wire, sum, words);
}

/// As [`sum_into`], by a given vector unit: what tests and benches compare.
pub fn sum_into_at(level: Level, wire: Wire, sum: &mut [u8], words: &[u8]) {
    let count = words.len() / wire.input().len();
    assert_eq!(sum.len(), count * wire.output().len(), "an output word a word");
    level.run(Add { wire, sum, words });
}

/// Checks a sum before it goes out: every output word within what `participants` can have come to. Its error is the
/// first that is not.
pub fn finish(wire: Wire, sum: &[u8], participants: usize) -> Result<(), Refusal> {
    match first_beyond(wire.output(), sum, wire.q_out(participants)) {
        Some(index) => Err(Refusal { index, kind: RefusalKind::Overflow }),
        None => Ok(()),
    }
}

/// Writes the result of checked output words into `tensor`: word 2^s / `divisor`, 1 for a sum and the number of
/// participants for a mean. Floats may come out infinite where a sum is beyond their type; integers that are refuse.
pub fn dequantise(
    wire: Wire,
    dtype: Dtype,
    words: &[u8],
    shared: &[u8],
    divisor: u32,
    tensor: &mut [u8],
) -> Result<(), Refusal> {
    let elements = tensor.len() / dtype.len();
    assert_eq!(words.len(), elements * wire.output().len(), "an output word an element");
    assert_eq!(shared.len(), blocks(elements), "one exponent a block");
    assert!((1..=256).contains(&divisor), "a divisor is a number of members");
    if dtype == Dtype::I32 {
        // |word| / divisor, rounded, is within i32 where |word| is below divisor 2^31: checked before anything is written.
        let limit = (1_u64 << 31) * u64::from(divisor) - u64::from(divisor);
        if let Some(index) = first_beyond(wire.output(), words, limit) {
            return Err(Refusal { index, kind: RefusalKind::Overflow });
        }
    }
    level().run(Dequantise { wire, dtype, words, shared, divisor, tensor });
    Ok(())
}

fn element(dtype: Dtype, tensor: &[u8], i: usize) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes(tensor.as_chunks().0[i]),
        Dtype::F16 => f16_to_f32(u16::from_le_bytes(tensor.as_chunks().0[i])),
        Dtype::Bf16 => bf16_to_f32(u16::from_le_bytes(tensor.as_chunks().0[i])),
        _ => unreachable!("no wire for other types"),
    }
}

#[inline(always)]
fn from_f32(bytes: [u8; 4]) -> f32 {
    f32::from_le_bytes(bytes)
}
#[inline(always)]
fn from_f16(bytes: [u8; 2]) -> f32 {
    f16_to_f32(u16::from_le_bytes(bytes))
}
#[inline(always)]
fn from_bf16(bytes: [u8; 2]) -> f32 {
    bf16_to_f32(u16::from_le_bytes(bytes))
}

/// Bits of the largest magnitude of each block: as integers they compare as the floats do, and what is not finite is
/// greater than all that is.
struct Maxima<'a> {
    dtype: Dtype,
    tensor: &'a [u8],
    residual: Option<&'a [f32]>,
    out: &'a mut [u32],
}

impl Kernel for Maxima<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        match self.dtype {
            Dtype::F32 => maxima(self.tensor.as_chunks().0, from_f32, self.residual, self.out),
            Dtype::F16 => maxima(self.tensor.as_chunks().0, from_f16, self.residual, self.out),
            Dtype::Bf16 => maxima(self.tensor.as_chunks().0, from_bf16, self.residual, self.out),
            _ => unreachable!("no wire for other types"),
        }
    }
}

#[inline(always)]
fn maxima<const N: usize>(
    tensor: &[[u8; N]],
    value: impl Fn([u8; N]) -> f32 + Copy,
    residual: Option<&[f32]>,
    out: &mut [u32],
) {
    const MAGNITUDE: u32 = 0x7fff_ffff;
    for (b, (block, max)) in tensor.chunks(BLOCK).zip(out).enumerate() {
        *max = match residual {
            None => block.iter().fold(0, |max, x| max.max(value(*x).to_bits() & MAGNITUDE)),
            Some(residual) => {
                let rest = &residual[b * BLOCK..b * BLOCK + block.len()];
                block.iter().zip(rest).fold(0, |max, (x, r)| max.max((value(*x) + r).to_bits() & MAGNITUDE))
            }
        };
    }
}

struct Quantise<'a> {
    wire: Wire,
    dtype: Dtype,
    tensor: &'a [u8],
    shared: &'a [u8],
    out: &'a mut [u8],
    residual: Option<&'a mut [f32]>,
}

impl Kernel for Quantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        match self.dtype {
            Dtype::F32 => self.of(from_f32),
            Dtype::F16 => self.of(from_f16),
            Dtype::Bf16 => self.of(from_bf16),
            _ => unreachable!("no wire for other types"),
        }
    }
}

impl Quantise<'_> {
    #[inline(always)]
    fn of<const N: usize>(self, value: impl Fn([u8; N]) -> f32 + Copy) {
        match self.wire.input() {
            Word::W32 => self.to(value, |q: f32| to_i32(q).to_le_bytes()),
            Word::W16 => self.to(value, |q: f32| (to_i32(q) as i16).to_le_bytes()),
            Word::W8 => self.to(value, |q: f32| (to_i32(q) as i8).to_le_bytes()),
            Word::W64 => unreachable!("no input words of 8 bytes"),
        }
    }

    #[inline(always)]
    fn to<const N: usize, const M: usize>(
        mut self,
        value: impl Fn([u8; N]) -> f32 + Copy,
        word: impl Fn(f32) -> [u8; M] + Copy,
    ) {
        let tensor = self.tensor.as_chunks::<N>().0.chunks(BLOCK);
        let out = self.out.as_chunks_mut::<M>().0.chunks_mut(BLOCK);
        for (b, ((tensor, out), byte)) in tensor.zip(out).zip(self.shared).enumerate() {
            let s = scale_of(self.wire, self.dtype, *byte);
            // 2^-s may be above what an f32 can say; two factors are not, and neither product is rounded unless the word
            // is 0 anyway.
            let (first, second) = (power_of_two((-s).min(127)) as f32, power_of_two((-s - 127).max(0)) as f32);
            match &mut self.residual {
                None => {
                    for (x, out) in tensor.iter().zip(out) {
                        *out = word(round(value(*x) * first * second));
                    }
                }
                Some(residual) => {
                    let back = power_of_two(s) as f32;
                    let rest = &mut residual[b * BLOCK..b * BLOCK + tensor.len()];
                    for ((x, out), r) in tensor.iter().zip(out).zip(rest) {
                        let x = value(*x) + *r;
                        let q = round(x * first * second);
                        *out = word(q);
                        // Only a word that stands for 2^128 is clamped; every other difference is exact.
                        *r = x - (q * back).clamp(f32::MIN, f32::MAX);
                    }
                }
            }
        }
    }
}

/// The nearest integer, ties to even: adding 2^23 leaves no place for a fraction. From there on all f32 are integers.
#[inline(always)]
fn round(x: f32) -> f32 {
    const ALL_INTEGERS: f32 = 8_388_608.0;
    let shift = ALL_INTEGERS.copysign(x);
    if x.abs() < ALL_INTEGERS { (x + shift) - shift } else { x }
}

struct Range<'a> {
    word: Word,
    words: &'a [u8],
    q: u64,
}

impl Kernel for Range<'_> {
    type Out = bool;

    #[inline(always)]
    fn run(self) -> bool {
        macro_rules! within {
            ($int:ty) => {{
                let q = <$int>::try_from(self.q).unwrap_or(<$int>::MAX);
                // -2^(n-1) is beyond every q that has a negative.
                let words = self.words.as_chunks().0.iter().map(|word| <$int>::from_le_bytes(*word));
                let (low, high) = words.fold((0, 0), |(low, high): ($int, $int), x| (low.min(x), high.max(x)));
                low >= -q && high <= q
            }};
        }
        match self.word {
            Word::W8 => within!(i8),
            Word::W16 => within!(i16),
            Word::W32 => within!(i32),
            Word::W64 => within!(i64),
        }
    }
}

struct Add<'a> {
    wire: Wire,
    sum: &'a mut [u8],
    words: &'a [u8],
}

impl Kernel for Add<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        macro_rules! add {
            ($from:ty, $to:ty) => {
                for (sum, word) in self.sum.as_chunks_mut().0.iter_mut().zip(self.words.as_chunks().0) {
                    *sum = <$to>::from_le_bytes(*sum).wrapping_add(<$from>::from_le_bytes(*word).into()).to_le_bytes();
                }
            };
        }
        match (self.wire.input(), self.wire.output()) {
            (Word::W32, Word::W32) => add!(i32, i32),
            (Word::W32, _) => add!(i32, i64),
            (Word::W16, _) => add!(i16, i16),
            _ => add!(i8, i16),
        }
    }
}

struct Dequantise<'a> {
    wire: Wire,
    dtype: Dtype,
    words: &'a [u8],
    shared: &'a [u8],
    divisor: u32,
    tensor: &'a mut [u8],
}

impl Kernel for Dequantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        match self.wire.output() {
            Word::W32 => self.of(|w| f64::from(i32::from_le_bytes(w))),
            Word::W16 => self.of(|w| f64::from(i16::from_le_bytes(w))),
            // Checked words are below 2^34, and below 2^51 adding 1.5 2^52 to a double puts the integer into its last bits.
            Word::W64 => self.of(|w| {
                const SHIFT: f64 = 6_755_399_441_055_744.0;
                f64::from_bits(SHIFT.to_bits().wrapping_add_signed(i64::from_le_bytes(w))) - SHIFT
            }),
            Word::W8 => unreachable!("no output words of one byte"),
        }
    }
}

impl Dequantise<'_> {
    #[inline(always)]
    fn of<const N: usize>(self, value: impl Fn([u8; N]) -> f64 + Copy) {
        match self.dtype {
            Dtype::F32 => self.to(value, |x| (x as f32).to_le_bytes()),
            // Words of these are below 2^15 and divisors up to 256, so a result is not so near to the middle of two
            // halves that rounding to f32 first could take it there: rounded twice is rounded once.
            Dtype::F16 => self.to(value, |x| f32_to_f16(x as f32).to_le_bytes()),
            Dtype::Bf16 => self.to(value, |x| f32_to_bf16(x as f32).to_le_bytes()),
            Dtype::I32 => self.to(value, |x| (x.round_ties_even() as i32).to_le_bytes()),
            _ => unreachable!("no wire for other types"),
        }
    }

    #[inline(always)]
    fn to<const N: usize, const M: usize>(
        self,
        value: impl Fn([u8; N]) -> f64 + Copy,
        element: impl Fn(f64) -> [u8; M] + Copy,
    ) {
        let words = self.words.as_chunks::<N>().0.chunks(BLOCK);
        let tensor = self.tensor.as_chunks_mut::<M>().0.chunks_mut(BLOCK);
        let divisor = f64::from(self.divisor);
        for ((words, tensor), byte) in words.zip(tensor).zip(self.shared) {
            let scale = power_of_two(scale_of(self.wire, self.dtype, *byte));
            if self.divisor.is_power_of_two() {
                // Exact, so it is the same as a division.
                let factor = scale / divisor;
                for (word, out) in words.iter().zip(tensor) {
                    *out = element(value(*word) * factor);
                }
            } else {
                for (word, out) in words.iter().zip(tensor) {
                    *out = element(value(*word) * scale / divisor);
                }
            }
        }
    }
}
