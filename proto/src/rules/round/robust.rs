//! Aggregates that bear bad members: in exact mode, of floats.
//!
//! Below 8 members the coordinate median; from there on one step of centred clipping around the aggregate before, and the
//! trimmed mean where there is none before (Karimireddy et al., arXiv 2012.10333; not Krum). All arithmetic is f64 in the
//! order of ranks and elements, rounded once, so it comes out the same everywhere.
//!
//! The norms of centred clipping are of one chunk, not of the whole tensor: a reducer has no more, and each chunk is
//! clipped for itself. A member that is bad in few chunks is clipped in those. So a group alone cannot be computed again
//! from openings, as it can for the median and the trimmed mean; a validator computes the chunk.

use super::dtype::{Dtype, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::round::RoundOp;
use crate::wire::limit;

/// An aggregate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Aggregator {
    /// The median of each element; the mean of the two middle ones where their number is even.
    Median,
    /// The mean of each element without its least and greatest quarters, at least one value each from three members on.
    TrimmedMean,
    /// c + mean of (x - c) min(1, tau / |x - c|), for c the aggregate before and tau 1.5 times the median of the norms.
    CentredClip,
}

impl Aggregator {
    /// What `members` use when they leave it open. `has_previous` says whether there is an aggregate before.
    pub fn pick(members: usize, has_previous: bool) -> Self {
        match (members, has_previous) {
            (0..8, _) => Self::Median,
            (_, true) => Self::CentredClip,
            (_, false) => Self::TrimmedMean,
        }
    }

    /// Of a round's operation.
    pub fn of(op: RoundOp) -> Option<Self> {
        match op {
            RoundOp::Median => Some(Self::Median),
            RoundOp::TrimmedMean => Some(Self::TrimmedMean),
            RoundOp::CentredClip => Some(Self::CentredClip),
            _ => None,
        }
    }
}

/// Aggregates one chunk's `inputs`, ranks ascending, elements of `dtype`, into `out`. `previous` is the aggregate before,
/// of the same elements; centred clipping without one begins at the coordinate median. Values that are not finite count
/// as extremes; a member whose distance is not finite does not move centred clipping.
///
/// # Panics
/// When `dtype` has no floats, when there is no input or more than 256, or when lengths differ.
pub fn aggregate(aggregator: Aggregator, dtype: Dtype, inputs: &[&[u8]], previous: Option<&[u8]>, out: &mut [u8]) {
    assert!(dtype.is_float(), "robust aggregates are of floats");
    assert!(!inputs.is_empty() && inputs.len() <= limit::MEMBERS, "1 to 256 inputs");
    let lengths = inputs.iter().copied().chain(previous).all(|input| input.len() == out.len());
    assert!(lengths, "inputs of one length");
    match aggregator {
        Aggregator::Median => by_element(dtype, inputs, out, median),
        Aggregator::TrimmedMean => by_element(dtype, inputs, out, trimmed_mean),
        Aggregator::CentredClip => centred_clip(dtype, inputs, previous, out),
    }
}

fn by_element(dtype: Dtype, inputs: &[&[u8]], out: &mut [u8], of: fn(&mut [f64]) -> f64) {
    let mut values = [0.0; limit::MEMBERS];
    let values = &mut values[..inputs.len()];
    for i in 0..out.len() / dtype.len() {
        for (value, input) in values.iter_mut().zip(inputs) {
            *value = load(dtype, input, i);
        }
        store(dtype, out, i, of(values));
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { values[middle - 1] / 2.0 + values[middle] / 2.0 }
}

fn trimmed_mean(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let cut = if values.len() < 3 { 0 } else { (values.len() / 4).max(1) };
    let kept = &values[cut..values.len() - cut];
    kept.iter().fold(0.0, |sum, value| sum + value) / kept.len() as f64
}

fn centred_clip(dtype: Dtype, inputs: &[&[u8]], previous: Option<&[u8]>, out: &mut [u8]) {
    let count = out.len() / dtype.len();
    let mut centre: Vec<f64> = match previous {
        Some(previous) => (0..count).map(|i| load(dtype, previous, i)).collect(),
        None => {
            by_element(dtype, inputs, out, median);
            (0..count).map(|i| load(dtype, out, i)).collect()
        }
    };
    let norm = |input: &&[u8]| {
        let squares = (0..count).map(|i| load(dtype, input, i) - centre[i]).map(|d| d * d);
        squares.fold(0.0, |sum, square| sum + square).sqrt()
    };
    let norms: Vec<f64> = inputs.iter().map(norm).collect();
    let mut finite: Vec<f64> = norms.iter().copied().filter(|norm| norm.is_finite()).collect();
    let tau = if finite.is_empty() { 0.0 } else { 1.5 * median(&mut finite) };
    let weights: Vec<f64> = norms
        .iter()
        .map(|norm| match norm {
            n if !n.is_finite() => 0.0,
            n if *n <= tau => 1.0,
            n => tau / n,
        })
        .collect();
    for (i, centre) in centre.iter_mut().enumerate() {
        let moved = inputs.iter().zip(&weights).filter(|(_, weight)| **weight > 0.0);
        let step = moved.fold(0.0, |sum, (input, weight)| sum + (load(dtype, input, i) - *centre) * weight);
        *centre += step / inputs.len() as f64;
        store(dtype, out, i, *centre);
    }
}

fn load(dtype: Dtype, bytes: &[u8], i: usize) -> f64 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes(bytes.as_chunks().0[i]).into(),
        Dtype::F16 => f16_to_f32(u16::from_le_bytes(bytes.as_chunks().0[i])).into(),
        Dtype::Bf16 => bf16_to_f32(u16::from_le_bytes(bytes.as_chunks().0[i])).into(),
        _ => f64::from_le_bytes(bytes.as_chunks().0[i]),
    }
}

/// Rounds to nearest, for f16 and bf16 by way of f32; every NaN becomes the quiet one.
fn store(dtype: Dtype, bytes: &mut [u8], i: usize, value: f64) {
    match dtype {
        Dtype::F32 => {
            let value = if value.is_nan() { f32::from_bits(0x7fc0_0000) } else { value as f32 };
            bytes.as_chunks_mut().0[i] = value.to_le_bytes();
        }
        Dtype::F16 => bytes.as_chunks_mut().0[i] = f32_to_f16(value as f32).to_le_bytes(),
        Dtype::Bf16 => bytes.as_chunks_mut().0[i] = f32_to_bf16(value as f32).to_le_bytes(),
        _ => {
            let value = if value.is_nan() { f64::from_bits(0x7ff8_0000_0000_0000) } else { value };
            bytes.as_chunks_mut().0[i] = value.to_le_bytes();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn of(aggregator: Aggregator, inputs: &[Vec<f32>], previous: Option<&[f32]>) -> Vec<f32> {
        let inputs: Vec<Vec<u8>> = inputs.iter().map(|input| bytes(input)).collect();
        let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
        let previous = previous.map(bytes);
        let mut out = vec![0; inputs[0].len()];
        aggregate(aggregator, Dtype::F32, &inputs, previous.as_deref(), &mut out);
        out.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    #[test]
    fn few_use_the_median_and_many_clip() {
        assert_eq!(Aggregator::pick(7, true), Aggregator::Median);
        assert_eq!(Aggregator::pick(8, true), Aggregator::CentredClip);
        assert_eq!(Aggregator::pick(8, false), Aggregator::TrimmedMean);
    }

    #[test]
    fn aggregates_of_small_numbers() {
        let inputs = [vec![1.0], vec![2.0], vec![3.0], vec![1e30]];
        assert_eq!(of(Aggregator::Median, &inputs, None), [2.5]);
        assert_eq!(of(Aggregator::TrimmedMean, &inputs, None), [2.5]);
        // Norms 1, 2, 3, 1e30 around 0: tau is 1.5 * 2.5 = 3.75, and (1 + 2 + 3 + 3.75) / 4 the step.
        assert_eq!(of(Aggregator::CentredClip, &inputs, Some(&[0.0])), [2.4375]);
        assert_eq!(of(Aggregator::Median, &inputs[..3], None), [2.0]);
        let bad = [vec![1.0], vec![f32::NAN], vec![2.0], vec![f32::INFINITY], vec![1.5]];
        assert_eq!(of(Aggregator::Median, &bad, None), [2.0]);
        assert_eq!(of(Aggregator::CentredClip, &bad, Some(&[1.0])), [1.25]);
    }

    proptest! {
        #[test]
        fn a_minority_cannot_take_it_far(
            honest in prop::collection::vec(prop::collection::vec(-1_f32..1.0, 6), 5..9),
            lie in prop::collection::vec(prop_oneof![-1e30_f32..1e30, Just(f32::NAN), Just(f32::NEG_INFINITY)], 6),
        ) {
            let mut inputs = honest;
            inputs.insert(1, lie.clone());
            inputs.push(lie);
            for aggregator in [Aggregator::Median, Aggregator::TrimmedMean, Aggregator::CentredClip] {
                // A quarter on each side of fewer than 8 is one value: both liars may lie on one side.
                if aggregator == Aggregator::TrimmedMean && inputs.len() < 8 {
                    continue;
                }
                for value in of(aggregator, &inputs, Some(&[0.0; 6])) {
                    // Norms of honest ones are at most sqrt 6; so the step is at most 1.5 of that.
                    prop_assert!(value.abs() <= 3.7, "{aggregator:?}: {value}");
                }
            }
        }
    }
}
