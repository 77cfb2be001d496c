//! Exact mode: reduction in the order of ranks, to the same bits on every machine.
//!
//! Plain additions, one member after the other; no fused multiply-add, no trees. f16 and bf16 are added up as f32 and
//! rounded once at the end, i32 as i64, i64 as i128: sums of integers wrap, means of them are cut towards zero. Which NaN
//! an operation makes differs between processors, so every NaN that comes out is the quiet one without sign. For the least
//! and the greatest -0 is below +0, and a NaN is both.

use super::dtype::{Dtype, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use super::simd::{Kernel, Level, level};
use crate::round::RoundOp;

/// What exact mode computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExactOp {
    /// The sum.
    Sum,
    /// The sum over the number of inputs.
    Mean,
    /// The least.
    Min,
    /// The greatest.
    Max,
}

impl ExactOp {
    /// Of a round's operation; `None` for aggregates, see [`super::robust`], and where nothing is reduced.
    pub fn of(op: RoundOp) -> Option<Self> {
        match op {
            RoundOp::Sum | RoundOp::Reduce { .. } => Some(Self::Sum),
            RoundOp::Mean => Some(Self::Mean),
            RoundOp::Min => Some(Self::Min),
            RoundOp::Max => Some(Self::Max),
            _ => None,
        }
    }
}

/// Elements whose accumulators are kept in the first cache at a time.
const TILE: usize = 512;

/// Reduces `inputs`, ranks ascending, elements of `dtype`, into `out`.
///
/// # Panics
/// When there is no input, or when lengths differ from that of `out`.
pub fn reduce(op: ExactOp, dtype: Dtype, inputs: &[&[u8]], out: &mut [u8]) {
    reduce_at(level(), op, dtype, inputs, out);
}

/// As [`reduce`], by a given vector unit: what tests compare.
pub fn reduce_at(level: Level, op: ExactOp, dtype: Dtype, inputs: &[&[u8]], out: &mut [u8]) {
    assert!(!inputs.is_empty() && inputs.iter().all(|input| input.len() == out.len()), "inputs of one length");
    level.run(Reduce { op, dtype, inputs, out });
}

struct Reduce<'a> {
    op: ExactOp,
    dtype: Dtype,
    inputs: &'a [&'a [u8]],
    out: &'a mut [u8],
}

impl Kernel for Reduce<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        match self.dtype {
            Dtype::F32 => self.of::<Single, 4>(),
            Dtype::F16 => self.of::<Half, 2>(),
            Dtype::Bf16 => self.of::<Brain, 2>(),
            Dtype::F64 => self.of::<Double, 8>(),
            Dtype::I32 => self.of::<Int, 4>(),
            Dtype::I64 => self.of::<Long, 8>(),
        }
    }
}

impl Reduce<'_> {
    #[inline(always)]
    fn of<E: Element<N>, const N: usize>(self) {
        match self.op {
            ExactOp::Sum => self.fold::<E, N>(E::add, E::store),
            ExactOp::Mean => {
                let count = self.inputs.len() as u32;
                self.fold::<E, N>(E::add, move |acc| E::store(E::divide(acc, count)));
            }
            ExactOp::Min => self.fold::<E, N>(E::min, E::store),
            ExactOp::Max => self.fold::<E, N>(E::max, E::store),
        }
    }

    #[inline(always)]
    fn fold<E: Element<N>, const N: usize>(
        self,
        step: impl Fn(E::Acc, E::Acc) -> E::Acc + Copy,
        end: impl Fn(E::Acc) -> [u8; N] + Copy,
    ) {
        let Some((first, others)) = self.inputs.split_first() else { return };
        let mut acc = [E::load([0; N]); TILE];
        for (tile, out) in self.out.as_chunks_mut::<N>().0.chunks_mut(TILE).enumerate() {
            let acc = &mut acc[..out.len()];
            let of = |input: &&'_ [u8]| tile * TILE..(tile * TILE + out.len()).min(input.len() / N);
            for (acc, x) in acc.iter_mut().zip(&first.as_chunks::<N>().0[of(first)]) {
                *acc = E::load(*x);
            }
            for input in others {
                for (acc, x) in acc.iter_mut().zip(&input.as_chunks::<N>().0[of(input)]) {
                    *acc = step(*acc, E::load(*x));
                }
            }
            for (acc, out) in acc.iter().zip(out) {
                *out = end(*acc);
            }
        }
    }
}

trait Element<const N: usize> {
    type Acc: Copy;
    fn load(bytes: [u8; N]) -> Self::Acc;
    fn add(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn divide(a: Self::Acc, count: u32) -> Self::Acc;
    fn min(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn max(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn store(a: Self::Acc) -> [u8; N];
}

macro_rules! float {
    ($name:ident, $len:literal, $acc:ty, $count:expr, $load:expr, $store:expr) => {
        struct $name;
        impl Element<$len> for $name {
            type Acc = $acc;
            #[inline(always)]
            fn load(bytes: [u8; $len]) -> $acc {
                $load(bytes)
            }
            #[inline(always)]
            fn add(a: $acc, b: $acc) -> $acc {
                a + b
            }
            #[inline(always)]
            fn divide(a: $acc, count: u32) -> $acc {
                a / $count(count)
            }
            #[inline(always)]
            fn min(a: $acc, b: $acc) -> $acc {
                let less = b.is_nan() || b < a || (b == a && b.is_sign_negative());
                if less && !a.is_nan() { b } else { a }
            }
            #[inline(always)]
            fn max(a: $acc, b: $acc) -> $acc {
                let more = b.is_nan() || b > a || (b == a && b.is_sign_positive());
                if more && !a.is_nan() { b } else { a }
            }
            #[inline(always)]
            fn store(a: $acc) -> [u8; $len] {
                $store(a).to_le_bytes()
            }
        }
    };
}

float!(Single, 4, f32, |n| n as f32, f32::from_le_bytes, |x: f32| {
    if x.is_nan() { f32::from_bits(0x7fc0_0000) } else { x }
});
float!(Double, 8, f64, f64::from, f64::from_le_bytes, |x: f64| {
    if x.is_nan() { f64::from_bits(0x7ff8_0000_0000_0000) } else { x }
});
float!(Half, 2, f32, |n| n as f32, |b| f16_to_f32(u16::from_le_bytes(b)), f32_to_f16);
float!(Brain, 2, f32, |n| n as f32, |b| bf16_to_f32(u16::from_le_bytes(b)), f32_to_bf16);

macro_rules! int {
    ($name:ident, $len:literal, $int:ty, $acc:ty) => {
        struct $name;
        impl Element<$len> for $name {
            type Acc = $acc;
            #[inline(always)]
            fn load(bytes: [u8; $len]) -> $acc {
                <$int>::from_le_bytes(bytes).into()
            }
            #[inline(always)]
            fn add(a: $acc, b: $acc) -> $acc {
                // 256 members: never beyond the wider type.
                a.wrapping_add(b)
            }
            #[inline(always)]
            fn divide(a: $acc, count: u32) -> $acc {
                a / <$acc>::from(count)
            }
            #[inline(always)]
            fn min(a: $acc, b: $acc) -> $acc {
                a.min(b)
            }
            #[inline(always)]
            fn max(a: $acc, b: $acc) -> $acc {
                a.max(b)
            }
            #[inline(always)]
            fn store(a: $acc) -> [u8; $len] {
                (a as $int).to_le_bytes()
            }
        }
    };
}

int!(Int, 4, i32, i64);
int!(Long, 8, i64, i128);
