//! The dense layer, where the encoder spends its time.
//!
//! Owns the packed form of a weight matrix and the loop over it. A general matrix product rearranges its operands at
//! each call; for the few rows of a sentence that costs as much as the product. Here the weights are rearranged once,
//! when the model loads, into panels of 16 outputs, and up to four rows are taken at a time while one panel streams by.
//! Arithmetic is 16-bit fixed point, see `fixed`.
//!
//! Invariant: a row's result depends on that row alone. Sentences can therefore run in any batch and give the same
//! bits.

use crate::fixed::{self, DIMENSION_MAX, LANES, Sums, Weights};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, bail};
use std::ops::Range;

/// Vectors of weights in a panel, for one pair of inputs.
const VECTORS: usize = 4;
/// Outputs in a panel.
const PANEL: usize = VECTORS * LANES;
/// Most rows taken together. Measured under Cranelift: 16 vectors of sums do not quite fit its registers, and are
/// still a quarter faster than eight or twelve.
const ROWS_MAX: usize = 4;
/// Pairs of inputs in one turn of the inner loop. Cranelift stores the sums at the end of each turn; with one pair a
/// turn that takes a third of the time, and beyond four it keeps fewer of them in registers.
const UNROLL: usize = 4;

/// What follows the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// Nothing.
    None,
    /// The exact Gaussian error linear unit.
    Gelu,
}

/// A dense layer with its weights packed.
pub(crate) struct Dense {
    /// For each panel, for each pair of inputs, the weights of the panel's outputs in order.
    panels: Vec<[Weights; VECTORS]>,
    /// What an integer step of each output's weights is worth.
    steps: Vec<f32>,
    bias: Vec<f32>,
    inputs: usize,
    activation: Activation,
}

impl Dense {
    /// A layer without outputs, to which [`Self::append`] adds them.
    pub(crate) fn new(inputs: usize, activation: Activation) -> Result<Self> {
        if !inputs.is_multiple_of(2 * UNROLL) || inputs == 0 || inputs > DIMENSION_MAX {
            bail!("a dense layer of {inputs} inputs, expected a multiple of {} up to {DIMENSION_MAX}", 2 * UNROLL);
        }
        Ok(Self { panels: Vec::new(), steps: Vec::new(), bias: Vec::new(), inputs, activation })
    }

    /// Adds outputs: `weights` has a row of inputs for each, `bias` one value for each; both are multiplied by
    /// `scale`. The number of outputs must be a multiple of 16.
    pub(crate) fn append(&mut self, weights: &[f32], bias: &[f32], scale: f32) -> Result<()> {
        if weights.len() != bias.len() * self.inputs || !bias.len().is_multiple_of(PANEL) {
            bail!("a dense layer of {} outputs, expected a multiple of {PANEL}", bias.len());
        }
        self.panels.reserve_exact(weights.len() / (2 * PANEL));
        let mut integers = Vec::with_capacity(PANEL * self.inputs);
        for rows in weights.chunks_exact(PANEL * self.inputs) {
            integers.clear();
            for row in rows.chunks_exact(self.inputs) {
                self.steps.push(fixed::quantise(row, &mut integers) * scale);
            }
            for input in (0..self.inputs).step_by(2) {
                let block = |first: usize| {
                    fixed::weights(std::array::from_fn(|at| integers[(first + at / 2) * self.inputs + input + at % 2]))
                };
                self.panels.push(std::array::from_fn(|vector| block(vector * LANES)));
            }
        }
        self.bias.extend(bias.iter().map(|value| value * scale));
        Ok(())
    }

    fn outputs(&self) -> usize {
        self.bias.len()
    }

    /// The layer applied to each row of `input`.
    fn apply(&self, input: &[f32]) -> Vec<f32> {
        let rows = PackedRows::new(input, self.inputs);
        let mut output = vec![0.0; rows.steps.len() * self.outputs()];
        for (index, panel) in self.panels.chunks_exact(self.inputs / 2).enumerate() {
            for block in &rows.blocks {
                let sums = &mut output[block.start * self.outputs()..block.end * self.outputs()];
                match block.len() {
                    1 => self.apply_panel::<1>(index, panel, &rows, block, sums),
                    2 => self.apply_panel::<2>(index, panel, &rows, block, sums),
                    3 => self.apply_panel::<3>(index, panel, &rows, block, sums),
                    _ => self.apply_panel::<ROWS_MAX>(index, panel, &rows, block, sums),
                }
            }
        }
        output
    }

    /// A panel's outputs of the `N` rows of a block.
    fn apply_panel<const N: usize>(
        &self,
        index: usize,
        panel: &[[Weights; VECTORS]],
        rows: &PackedRows,
        block: &Range<usize>,
        output: &mut [f32],
    ) {
        let sums = multiply::<N>(panel, rows.pairs(block).as_chunks::<N>().0);
        let columns = index * PANEL..(index + 1) * PANEL;
        let (bias, steps) = (&self.bias[columns.clone()], &self.steps[columns.clone()]);
        let outputs = output.chunks_exact_mut(self.outputs()).map(|row| &mut row[columns.clone()]);
        for ((row, sums), output) in block.clone().zip(sums).zip(outputs) {
            let mut values = [0.0; PANEL];
            for (values, sums) in values.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
                *values = fixed::to_floats(sums);
            }
            for ((value, step), bias) in values.iter_mut().zip(steps).zip(bias) {
                *value = *value * (step * rows.steps[row]) + bias;
            }
            if self.activation == Activation::Gelu {
                gelu(&mut values);
            }
            output.copy_from_slice(&values);
        }
    }
}

/// The inner loop. A function of its own: within a larger one the compiler keeps too few sums in registers.
#[inline(never)]
fn multiply<const N: usize>(panel: &[[Weights; VECTORS]], pairs: &[[i32; N]]) -> [[Sums; VECTORS]; N] {
    let mut sums = [[fixed::zero(); VECTORS]; N];
    for (weights, inputs) in panel.as_chunks::<UNROLL>().0.iter().zip(pairs.as_chunks::<UNROLL>().0) {
        for step in 0..UNROLL {
            for row in 0..N {
                for vector in 0..VECTORS {
                    let sum = &mut sums[row][vector];
                    *sum = fixed::multiply_add(*sum, weights[step][vector], inputs[step][row]);
                }
            }
        }
    }
    sums
}

impl CustomOp1 for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, inputs) = layout.shape().dims2()?;
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            bail!("a dense layer takes contiguous f32 values");
        };
        if inputs != self.inputs {
            bail!("a dense layer of {} inputs was given {inputs}", self.inputs);
        }
        Ok((CpuStorage::F32(self.apply(&values[start..end])), Shape::from((rows, self.outputs()))))
    }
}

/// Rows as integers, in blocks within which the rows' values of one pair of inputs stand together.
struct PackedRows {
    blocks: Vec<Range<usize>>,
    words: Vec<i32>,
    words_per_row: usize,
    /// What an integer step of each row is worth.
    steps: Vec<f32>,
}

impl PackedRows {
    fn new(input: &[f32], inputs: usize) -> Self {
        let rows = input.len() / inputs;
        let blocks: Vec<_> = row_blocks(rows).collect();
        let mut packed = Self { blocks, words: Vec::new(), words_per_row: inputs / 2, steps: Vec::new() };
        packed.words.reserve_exact(rows * packed.words_per_row);
        let mut integers = Vec::with_capacity(ROWS_MAX * inputs);
        for block in &packed.blocks {
            integers.clear();
            for row in input[block.start * inputs..block.end * inputs].chunks_exact(inputs) {
                packed.steps.push(fixed::quantise(row, &mut integers));
            }
            for input in (0..inputs).step_by(2) {
                let rows = integers.chunks_exact(inputs);
                packed.words.extend(rows.map(|row| fixed::pair(row[input], row[input + 1])));
            }
        }
        packed
    }

    fn pairs(&self, block: &Range<usize>) -> &[i32] {
        &self.words[block.start * self.words_per_row..block.end * self.words_per_row]
    }
}

/// Splits rows into as few blocks of at most [`ROWS_MAX`] as can be, of equal size within one.
fn row_blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let count = rows.div_ceil(ROWS_MAX);
    (0..count).map(move |block| rows * block / count..rows * (block + 1) / count)
}

/// x/2 (1 + erf(x / sqrt 2)), in place.
fn gelu(values: &mut [f32; PANEL]) {
    for value in values {
        *value *= 0.5 * (1.0 + erf(*value * std::f32::consts::FRAC_1_SQRT_2));
    }
}

/// The error function within 5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
#[inline]
fn erf(x: f32) -> f32 {
    const SERIES: [f32; 5] = [0.254_829_6, -0.284_496_72, 1.421_413_8, -1.453_152_1, 1.061_405_4];
    let size = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * size);
    let series = SERIES.iter().rev().fold(0.0, |sum, coefficient| (sum + coefficient) * t);
    (1.0 - series * exp_negative(-size * size)).copysign(x)
}

/// e to the power of `x` for `x <= 0`, within 3e-7 of its size, 0 for a NaN; without branches, so that it is vector
/// code too.
#[inline]
fn exp_negative(x: f32) -> f32 {
    /// Below this the result is smaller than any normal number.
    const LEAST: f32 = -87.0;
    let x = if x > LEAST { x } else { LEAST };
    // Truncation rounds to nearest here, because the argument is not positive.
    let exponent = (x * std::f32::consts::LOG2_E - 0.5) as i32;
    // ln 2 in two parts, of which the first has few bits: its multiples are exact.
    let rest = x - exponent as f32 * 0.693_359_4 + exponent as f32 * 2.121_944_4e-4;
    let mut series = 1.0;
    for divisor in [6.0, 5.0, 4.0, 3.0, 2.0, 1.0] {
        series = 1.0 + series * rest * (1.0 / divisor);
    }
    series * f32::from_bits(((exponent + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::{Device, Tensor};

    /// Values without structure: multiples of 2^-12 in [-1, 1).
    fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 19) as f32 / 4096.0 - 1.0
        })
        .take(count)
        .collect()
    }

    fn layer(activation: Activation) -> Dense {
        let mut layer = Dense::new(48, activation).unwrap();
        layer.append(&values(48 * 32, 1), &values(32, 2), 1.0).unwrap();
        layer.append(&values(48 * 16, 3), &values(16, 4), 0.5).unwrap();
        layer
    }

    #[test]
    fn agrees_with_a_float_product_for_every_block_size() {
        let half = |values: Vec<f32>| values.into_iter().map(|value| value * 0.5).collect::<Vec<_>>();
        let weights = [values(48 * 32, 1), half(values(48 * 16, 3))].concat();
        let bias = [values(32, 2), half(values(16, 4))].concat();
        let weights = Tensor::from_vec(weights, (48, 48), &Device::Cpu).unwrap();
        let bias = Tensor::from_vec(bias, 48, &Device::Cpu).unwrap();
        for rows in 1..=2 * ROWS_MAX + 1 {
            let input = Tensor::from_vec(values(rows * 48, 5), (rows, 48), &Device::Cpu).unwrap();
            let expected = input.matmul(&weights.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
            let found = input.apply_op1_no_bwd(&layer(Activation::None)).unwrap();
            let error = (expected - found).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            // Lengths are about 4; a step is their 46,000th part, and 48 roundings of each side add up.
            assert!(error < 2e-3, "{rows} rows: {error}");
        }
    }

    #[test]
    fn a_row_gives_the_same_bits_in_any_company() {
        let layer = layer(Activation::Gelu);
        let input = values(11 * 48, 6);
        let together = layer.apply(&input);
        for row in 0..11 {
            let alone = layer.apply(&input[row * 48..(row + 1) * 48]);
            assert_eq!(alone, together[row * 48..(row + 1) * 48], "row {row}");
        }
    }

    #[test]
    fn exp_and_gelu_are_close_to_libm() {
        for step in 0..8700 {
            let x = -(step as f32) / 100.0;
            assert!((f64::from(exp_negative(x)) / f64::from(x).exp() - 1.0).abs() < 3e-7, "exp({x})");
        }
        // gelu(1), gelu(-1), gelu(3), gelu(-6) by a table of the normal distribution.
        let mut found = [0.0; PANEL];
        found[..8].copy_from_slice(&[1.0, -1.0, 3.0, -6.0, 0.0, 20.0, -20.0, 0.5]);
        gelu(&mut found);
        let expected = [0.841_344_75, -0.158_655_25, 2.995_950_3, -5.9e-9, 0.0, 20.0, 0.0, 0.345_731_2];
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 2e-6, "{found} against {expected}");
        }
    }

    #[test]
    fn outputs_that_fill_no_panel_are_refused() {
        assert!(Dense::new(8, Activation::None).unwrap().append(&[0.0; 64], &[0.0; 8], 1.0).is_err());
        assert!(Dense::new(12, Activation::None).is_err());
    }
}
