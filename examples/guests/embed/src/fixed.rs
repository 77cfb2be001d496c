//! 16-bit fixed point: vectors as integers with one scale each, and the product of such vectors.
//!
//! Owns the choice of scales and the vector instruction. Why integers: wasm that gives the same bits on every machine
//! has to canonicalise NaNs after each float operation, which makes a float product take six instructions for four
//! multiplications. `i32x4.dot_i16x8_s` and an addition do eight in two, nothing has to be canonicalised, and the
//! weights take half the memory. A rounded vector is off by the square root of a twelfth of its dimension over 46,000:
//! 0.012 % of its length for 384 values, 0.025 % for 1,536 (more where one value towers over the rest). Embeddings
//! move by less than 1e-6 in cosine.
//!
//! Invariant: no sum overflows. Each vector is scaled to a length of at most [`LENGTH_MAX`]; rounding adds at most
//! half the square root of the dimension; and by Cauchy and Schwarz no partial sum of products exceeds the product of
//! the two lengths.

/// Longest vector after scaling. With the rounding of [`DIMENSION_MAX`] values, 46,064: its square is below 2^31.
const LENGTH_MAX: f32 = 46_000.0;
/// Most values of a vector.
pub(crate) const DIMENSION_MAX: usize = 16_384;
/// The largest value of 16 bits.
const VALUE_MAX: f32 = 32_767.0;

/// Outputs that one [`Weights`] serves.
pub(crate) const LANES: usize = 4;

/// Two inputs' weights for each of four outputs: input 0 and 1 of output 0, then of output 1, and so on.
#[cfg(target_arch = "wasm32")]
pub(crate) type Weights = core::arch::wasm32::v128;
/// Two inputs' weights for each of four outputs: input 0 and 1 of output 0, then of output 1, and so on.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) type Weights = [i16; 2 * LANES];

/// Running sums of four outputs.
#[cfg(target_arch = "wasm32")]
pub(crate) type Sums = core::arch::wasm32::v128;
/// Running sums of four outputs.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) type Sums = [i32; LANES];

/// Puts weights side by side as [`Weights`] has them.
pub(crate) fn weights(values: [i16; 2 * LANES]) -> Weights {
    #[cfg(target_arch = "wasm32")]
    {
        let [a, b, c, d, e, f, g, h] = values;
        core::arch::wasm32::i16x8(a, b, c, d, e, f, g, h)
    }
    #[cfg(not(target_arch = "wasm32"))]
    values
}

/// Sums of nothing.
pub(crate) fn zero() -> Sums {
    #[cfg(target_arch = "wasm32")]
    {
        core::arch::wasm32::i32x4_splat(0)
    }
    #[cfg(not(target_arch = "wasm32"))]
    [0; LANES]
}

/// Adds the products of two inputs, as [`pair`] joined them, with their weights.
#[inline(always)]
pub(crate) fn multiply_add(sums: Sums, weights: Weights, inputs: i32) -> Sums {
    #[cfg(target_arch = "wasm32")]
    {
        use core::arch::wasm32::{i32x4_add, i32x4_dot_i16x8, i32x4_splat};
        i32x4_add(sums, i32x4_dot_i16x8(weights, i32x4_splat(inputs)))
    }
    #[cfg(not(target_arch = "wasm32"))]
    std::array::from_fn(|lane| {
        let (low, high) = (i32::from(inputs as i16), inputs >> 16);
        sums[lane] + low * i32::from(weights[2 * lane]) + high * i32::from(weights[2 * lane + 1])
    })
}

/// The sums as floats.
pub(crate) fn to_floats(sums: Sums) -> [f32; LANES] {
    #[cfg(target_arch = "wasm32")]
    {
        use core::arch::wasm32::i32x4_extract_lane as lane;
        [lane::<0>(sums), lane::<1>(sums), lane::<2>(sums), lane::<3>(sums)].map(|sum| sum as f32)
    }
    #[cfg(not(target_arch = "wasm32"))]
    sums.map(|sum| sum as f32)
}

/// Two neighbouring inputs in one word, the first one low.
pub(crate) fn pair(first: i16, second: i16) -> i32 {
    i32::from(first) & 0xffff | i32::from(second) << 16
}

/// Scales `values` to integers, appends them to `integers` and returns what one integer step is worth.
///
/// A vector with a value that is not finite, or without a value that is normal, becomes zeros. There may be at most
/// [`DIMENSION_MAX`] values, a multiple of eight.
pub(crate) fn quantise(values: &[f32], integers: &mut Vec<i16>) -> f32 {
    let largest = across(values, |largest, value| if value.abs() > largest { value.abs() } else { largest })
        .into_iter()
        .fold(0.0, f32::max);
    // Squares of values that were not scaled first could vanish or overflow.
    let inverse = 1.0 / largest;
    let squares: f32 = across(values, |sum, value| sum + (value * inverse) * (value * inverse)).into_iter().sum();
    let step = largest * (squares.sqrt() / LENGTH_MAX).max(1.0 / VALUE_MAX);
    let scale = if squares.is_finite() && step.is_normal() { 1.0 / step } else { 0.0 };
    integers.extend(values.iter().map(|value| (value * scale).round_ties_even() as i16));
    if scale == 0.0 { 0.0 } else { step }
}

/// Folds every eighth value, for each of eight beginnings: sums that stand side by side make vector code.
fn across(values: &[f32], fold: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    let mut folded = [0.0; 8];
    for chunk in values.as_chunks::<8>().0 {
        for (folded, value) in folded.iter_mut().zip(chunk) {
            *folded = fold(*folded, *value);
        }
    }
    folded
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn length(integers: &[i16]) -> f64 {
        integers.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn no_vector_is_too_long_and_no_value_too_large() {
        let spike = |rest: f32| (0..1536).map(|index| if index == 7 { 3.0 } else { rest }).collect::<Vec<_>>();
        let tiny = vec![1e-30; 384];
        let cases =
            [vec![0.7; DIMENSION_MAX], spike(0.0), spike(0.01), spike(1.0), tiny, vec![0.0; 8], vec![1e30; 384]];
        for values in cases {
            let mut integers = Vec::new();
            let step = quantise(&values, &mut integers);
            assert!(length(&integers).powi(2) < f64::from(i32::MAX), "{:?}", &values[..8]);
            for (value, integer) in values.iter().zip(&integers) {
                let error = f64::from(*value) - f64::from(*integer) * f64::from(step);
                assert!(error.abs() <= 0.51 * f64::from(step), "{value}: {integer} x {step}");
            }
        }
        let mut integers = Vec::new();
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            quantise(&[1.0, 1.0, odd, 1.0, 1.0, 1.0, 1.0, 1.0], &mut integers);
        }
        assert_eq!(integers, [0; 24]);
    }

    #[test]
    fn the_longest_vectors_do_not_overflow() {
        let mut integers = Vec::new();
        quantise(&[1.0; DIMENSION_MAX], &mut integers);
        let mut sums = zero();
        for values in integers.as_chunks::<2>().0 {
            let [first, second] = *values;
            let block = weights([first, second, -first, -second, first, second, first, second]);
            sums = multiply_add(sums, block, pair(first, second));
        }
        let expected = length(&integers).powi(2) as f32;
        assert_eq!(to_floats(sums), [expected, -expected, expected, expected]);
    }

    #[test]
    fn pairs_keep_their_signs() {
        let sums = multiply_add(zero(), weights([1, 0, 0, 1, -1, 0, 3, -5]), pair(-7, 11));
        assert_eq!(to_floats(sums), [-7.0, 11.0, 7.0, -76.0]);
    }
}
