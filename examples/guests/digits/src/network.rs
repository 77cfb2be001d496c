//! The network, its prediction, loss and gradient.
//!
//! Owns the order of every floating-point operation. Invariants: inner loops run over independent outputs, so that
//! vector code and scalar code add in the same order; no result depends on anything but the arguments.

use std::fmt;

/// Pixels of an image.
pub const PIXELS: usize = 64;
/// The largest value of a pixel.
pub const PIXEL_MAX: u8 = 16;
/// Hidden units.
pub const HIDDEN: usize = 32;
/// Digits.
pub const CLASSES: usize = 10;
/// Length of the parameter vector.
pub const PARAMETERS: usize = PIXELS * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES;

/// Pixels are divided by this; a power of two, so that the division is exact.
const PIXEL_SCALE: f32 = 1.0 / 16.0;

/// The network's parameters, a flat vector of [`PARAMETERS`] values: hidden weights (a row of [`HIDDEN`] for each
/// pixel), hidden biases, output weights (a row of [`CLASSES`] for each hidden unit), output biases.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters(Vec<f32>);

/// Why bytes or values are not parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParametersError {
    /// Another length than [`PARAMETERS`] values.
    Length {
        /// Values found; bytes are counted as whole values, rounded up.
        found: usize,
    },
    /// A value is infinite or not a number.
    NotFinite {
        /// Its position.
        index: usize,
    },
}

impl fmt::Display for ParametersError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { found } => {
                write!(out, "found {found} parameters, expected {PARAMETERS} little-endian f32 values")
            }
            Self::NotFinite { index } => write!(out, "parameter {index} is not finite"),
        }
    }
}

impl std::error::Error for ParametersError {}

impl Parameters {
    /// Bytes of the wire form, little-endian f32.
    pub const BYTES: usize = 4 * PARAMETERS;

    /// Takes the values in the order of this type's documentation.
    pub fn new(values: Vec<f32>) -> Result<Self, ParametersError> {
        if values.len() != PARAMETERS {
            return Err(ParametersError::Length { found: values.len() });
        }
        match values.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(ParametersError::NotFinite { index }),
            None => Ok(Self(values)),
        }
    }

    /// Reads little-endian f32 values.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ParametersError> {
        let (values, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(ParametersError::Length { found: values.len() + 1 });
        }
        Self::new(values.iter().map(|value| f32::from_le_bytes(*value)).collect())
    }

    /// The wire form.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// The values in order.
    pub fn as_slice(&self) -> &[f32] {
        &self.0
    }

    /// The values in order, for an optimiser's step.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

/// The flat vector's four parts.
struct Parts<T> {
    hidden_weights: T,
    hidden_biases: T,
    output_weights: T,
    output_biases: T,
}

fn parts(values: &[f32]) -> Parts<&[f32]> {
    let (hidden_weights, rest) = values.split_at(PIXELS * HIDDEN);
    let (hidden_biases, rest) = rest.split_at(HIDDEN);
    let (output_weights, output_biases) = rest.split_at(HIDDEN * CLASSES);
    Parts { hidden_weights, hidden_biases, output_weights, output_biases }
}

fn parts_mut(values: &mut [f32]) -> Parts<&mut [f32]> {
    let (hidden_weights, rest) = values.split_at_mut(PIXELS * HIDDEN);
    let (hidden_biases, rest) = rest.split_at_mut(HIDDEN);
    let (output_weights, output_biases) = rest.split_at_mut(HIDDEN * CLASSES);
    Parts { hidden_weights, hidden_biases, output_weights, output_biases }
}

/// What the network says of one image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// The most probable digit; the smaller one of equals.
    pub label: u8,
    /// Probability of each digit; they sum to 1 within rounding.
    pub scores: [f32; CLASSES],
}

/// Classifies one image.
pub fn classify(parameters: &Parameters, image: &[u8; PIXELS]) -> Prediction {
    let forward = forward(&parts(&parameters.0), image);
    let mut label = 0;
    for (class, logit) in forward.logits.iter().enumerate() {
        if *logit > forward.logits[label] {
            label = class;
        }
    }
    Prediction { label: label as u8, scores: softmax(&forward.logits).0 }
}

/// Mean cross-entropy of a batch and its gradient, both means over the batch.
///
/// Returns 0 and zeros for an empty batch. Records are taken in order, so that equal batches give equal bits.
pub fn loss_gradient(parameters: &Parameters, batch: &[crate::Record<'_>]) -> (f32, Vec<f32>) {
    let weights = parts(&parameters.0);
    let mut gradient = vec![0.0; PARAMETERS];
    let mut sums = parts_mut(&mut gradient);
    let mut loss = 0.0;
    for record in batch {
        loss += backward(&weights, &mut sums, record);
    }
    let divisor = batch.len().max(1) as f32;
    for value in &mut gradient {
        *value /= divisor;
    }
    (loss / divisor, gradient)
}

struct Forward {
    hidden: [f32; HIDDEN],
    logits: [f32; CLASSES],
}

fn forward(weights: &Parts<&[f32]>, image: &[u8; PIXELS]) -> Forward {
    let mut hidden = [0.0; HIDDEN];
    hidden.copy_from_slice(weights.hidden_biases);
    for (pixel, row) in image.iter().zip(weights.hidden_weights.as_chunks::<HIDDEN>().0) {
        // Half of all pixels are paper.
        if *pixel != 0 {
            add_scaled(&mut hidden, row, f32::from(*pixel) * PIXEL_SCALE);
        }
    }
    for unit in &mut hidden {
        *unit = if *unit > 0.0 { *unit } else { 0.0 };
    }
    let mut logits = [0.0; CLASSES];
    logits.copy_from_slice(weights.output_biases);
    for (unit, row) in hidden.iter().zip(weights.output_weights.as_chunks::<CLASSES>().0) {
        add_scaled(&mut logits, row, *unit);
    }
    Forward { hidden, logits }
}

/// Adds one record's gradient to `sums` and returns its loss.
fn backward(weights: &Parts<&[f32]>, sums: &mut Parts<&mut [f32]>, record: &crate::Record<'_>) -> f32 {
    let Forward { hidden, logits } = forward(weights, record.image);
    let (mut slope, log_sum) = softmax(&logits);
    let label = usize::from(record.label);
    slope[label] -= 1.0;
    let rows = weights.output_weights.as_chunks::<CLASSES>().0;
    let row_sums = sums.output_weights.as_chunks_mut::<CLASSES>().0;
    let mut hidden_slope = [0.0; HIDDEN];
    for (unit, (row, row_sum)) in rows.iter().zip(row_sums).enumerate() {
        if hidden[unit] > 0.0 {
            add_scaled(row_sum, &slope, hidden[unit]);
            hidden_slope[unit] = row.iter().zip(&slope).fold(0.0, |sum, (weight, slope)| sum + weight * slope);
        }
    }
    for (sum, slope) in sums.output_biases.iter_mut().zip(slope) {
        *sum += slope;
    }
    for (pixel, row_sum) in record.image.iter().zip(sums.hidden_weights.as_chunks_mut::<HIDDEN>().0) {
        if *pixel != 0 {
            add_scaled(row_sum, &hidden_slope, f32::from(*pixel) * PIXEL_SCALE);
        }
    }
    for (sum, slope) in sums.hidden_biases.iter_mut().zip(hidden_slope) {
        *sum += slope;
    }
    log_sum - logits[label]
}

fn add_scaled<const N: usize>(sums: &mut [f32; N], row: &[f32; N], factor: f32) {
    for (sum, value) in sums.iter_mut().zip(row) {
        *sum += value * factor;
    }
}

/// The probabilities, and the logarithm of the sum of the logits' exponentials.
fn softmax(logits: &[f32; CLASSES]) -> ([f32; CLASSES], f32) {
    let max = logits.iter().fold(f32::MIN, |max, logit| if *logit > max { *logit } else { max });
    let powers = logits.map(|logit| exp(f64::from(logit - max)));
    let sum = powers.iter().fold(0.0, |sum, power| sum + power);
    (powers.map(|power| (power / sum) as f32), max + ln(sum) as f32)
}

/// e to the power of `x` for `x <= 0`, within 1e-11 of the true value's size; 0 below -700.
fn exp(x: f64) -> f64 {
    if x < -700.0 || x.is_nan() {
        return 0.0;
    }
    // Truncation rounds to nearest here, because the argument is not positive.
    let exponent = (x * std::f64::consts::LOG2_E - 0.5) as i64;
    let rest = x - exponent as f64 * std::f64::consts::LN_2;
    let mut series = 1.0;
    for term in (1..=11).rev() {
        series = 1.0 + series * rest / f64::from(term);
    }
    series * f64::from_bits(((1023 + exponent) as u64) << 52)
}

/// The natural logarithm of a sum of softmax powers, that is for `1 <= x <= 10`.
fn ln(x: f64) -> f64 {
    let mut mantissa = x;
    let mut halvings = 0.0;
    while mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        halvings += 1.0;
    }
    // ln m = 2 artanh((m - 1) / (m + 1)), and the argument is at most 0.172.
    let z = (mantissa - 1.0) / (mantissa + 1.0);
    let mut series = 0.0;
    for term in (0..8).rev() {
        series = series * z * z + 1.0 / f64::from(2 * term + 1);
    }
    halvings * std::f64::consts::LN_2 + 2.0 * z * series
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{TRAINED, test_records, train_records};

    #[test]
    fn exp_and_ln_are_close_to_libm() {
        for step in 0..7000 {
            let x = -f64::from(step) / 100.0;
            assert!((exp(x) / x.exp() - 1.0).abs() < 1e-11, "exp({x})");
            let y = 1.0 + f64::from(step) * 9.0 / 7000.0;
            assert!((ln(y) - y.ln()).abs() < 1e-11, "ln({y})");
        }
        assert_eq!(exp(-1e9), 0.0);
    }

    #[test]
    fn gradient_agrees_with_differences() {
        // Trained parameters have hardly a gradient; a third of each has.
        let mut parameters = Parameters::from_bytes(TRAINED).unwrap();
        parameters.as_mut_slice().iter_mut().for_each(|value| *value /= 3.0);
        let records = train_records();
        let batch = &records[..50];
        let (_, gradient) = loss_gradient(&parameters, batch);
        let loss_at = |index: usize, shift: f32| {
            let mut moved = parameters.clone();
            moved.as_mut_slice()[index] += shift;
            f64::from(loss_gradient(&moved, batch).0)
        };
        let largest = gradient.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
        for index in (0..PARAMETERS).step_by(37) {
            let slope = (loss_at(index, 0.01) - loss_at(index, -0.01)) / 0.02;
            let error = (slope - f64::from(gradient[index])).abs();
            assert!(error < 0.02 * f64::from(largest), "parameter {index}: {slope} against {}", gradient[index]);
        }
    }

    #[test]
    fn trained_parameters_generalise() {
        let parameters = Parameters::from_bytes(TRAINED).unwrap();
        let records = test_records();
        assert_eq!((records.len(), train_records().len()), (449, 1348));
        let right = records.iter().filter(|record| classify(&parameters, record.image).label == record.label).count();
        assert!(right * 100 >= records.len() * 97, "{right} of {}", records.len());
    }

    #[test]
    fn foreign_parameters_are_refused() {
        assert_eq!(Parameters::from_bytes(&[0; 7]), Err(ParametersError::Length { found: 2 }));
        let mut values = vec![0.0; PARAMETERS];
        values[9] = f32::NAN;
        assert_eq!(Parameters::new(values), Err(ParametersError::NotFinite { index: 9 }));
    }
}
