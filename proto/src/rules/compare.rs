//! When two outputs are the same.
//!
//! Inside one environment exact results are compared by digest and never come here. Outputs declared numeric by their
//! manifest are compared element by element, in operations that IEEE 754 fixes, so that every node judges alike.

use crate::model::Determinism;

/// Why outputs cannot be compared as their manifest says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// The manifest names an element type that this version does not know.
    #[error("output type `{0}` is not known: f32 or f64")]
    Dtype(String),
    /// The reference is no sequence of such elements: the manifest is wrong, not the peer.
    #[error("reference of {len} bytes is no sequence of {dtype}")]
    Reference {
        /// Its length in bytes.
        len: usize,
        /// The declared type.
        dtype: String,
    },
}

/// Whether `output` agrees with `reference`, which was computed by someone trusted.
///
/// # Errors
/// When the declaration does not fit the reference. An output that does not fit simply disagrees.
pub fn agrees(determinism: &Determinism, output: &[u8], reference: &[u8]) -> Result<bool, CompareError> {
    match determinism {
        Determinism::Exact => Ok(output == reference),
        Determinism::Tolerance { atol, rtol, dtype } => {
            let close = |a: f64, b: f64| is_close(a, b, *atol, *rtol);
            match dtype.as_str() {
                "f32" => all::<4>(dtype, output, reference, |bytes| f32::from_le_bytes(bytes).into(), close),
                "f64" => all::<8>(dtype, output, reference, f64::from_le_bytes, close),
                other => Err(CompareError::Dtype(other.to_owned())),
            }
        }
    }
}

/// `|a - b| <= atol + rtol * |b|`; infinities only equal themselves, and a NaN agrees with a NaN.
fn is_close(a: f64, b: f64, atol: f64, rtol: f64) -> bool {
    if a.is_nan() || b.is_nan() {
        return a.is_nan() && b.is_nan();
    }
    if a.is_infinite() || b.is_infinite() {
        return a == b;
    }
    (a - b).abs() <= atol + rtol * b.abs()
}

fn all<const N: usize>(
    dtype: &str,
    output: &[u8],
    reference: &[u8],
    element: impl Fn([u8; N]) -> f64,
    close: impl Fn(f64, f64) -> bool,
) -> Result<bool, CompareError> {
    let (wanted, rest) = reference.as_chunks::<N>();
    if !rest.is_empty() {
        return Err(CompareError::Reference { len: reference.len(), dtype: dtype.to_owned() });
    }
    let (given, _) = output.as_chunks::<N>();
    Ok(output.len() == reference.len() && given.iter().zip(wanted).all(|(a, b)| close(element(*a), element(*b))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tolerance(atol: f64, rtol: f64, dtype: &str) -> Determinism {
        Determinism::Tolerance { atol, rtol, dtype: dtype.to_owned() }
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn exact_means_every_byte() {
        assert_eq!(agrees(&Determinism::Exact, b"ab", b"ab"), Ok(true));
        assert_eq!(agrees(&Determinism::Exact, b"ab", b"abc"), Ok(false));
    }

    #[test]
    fn tolerance_is_absolute_plus_relative_to_the_reference() {
        // a, b, atol, rtol -> agrees
        let table = [
            (1.0, 1.0, 0.0, 0.0, true),
            (0.0, -0.0, 0.0, 0.0, true),
            (1.5, 1.0, 0.5, 0.0, true),
            (1.5000001, 1.0, 0.5, 0.0, false),
            (110.0, 100.0, 0.0, 0.1, true),
            // Relative to the second: 10 is more than a tenth of 90.
            (100.0, 90.0, 0.0, 0.1, false),
            (f32::NAN, f32::NAN, 0.0, 0.0, true),
            (f32::NAN, 1.0, 1e9, 1e9, false),
            (1.0, f32::NAN, 1e9, 1e9, false),
            (f32::INFINITY, f32::INFINITY, 0.0, 0.0, true),
            (f32::MAX, f32::INFINITY, 1e300, 1e300, false),
            (f32::NEG_INFINITY, f32::INFINITY, 1e9, 1e9, false),
        ];
        for (a, b, atol, rtol, expected) in table {
            let got = agrees(&tolerance(atol, rtol, "f32"), &f32s(&[2.0, a]), &f32s(&[2.0, b]));
            assert_eq!(got, Ok(expected), "{a} {b} {atol} {rtol}");
        }
    }

    #[test]
    fn lengths_must_match_and_declarations_must_fit() {
        let near = tolerance(1.0, 0.0, "f64");
        assert_eq!(agrees(&near, &[0; 8], &[0; 16]), Ok(false));
        assert_eq!(agrees(&near, &[0; 15], &[0; 16]), Ok(false));
        assert_eq!(agrees(&near, &[], &[]), Ok(true));
        assert!(matches!(agrees(&near, &[0; 16], &[0; 15]), Err(CompareError::Reference { len: 15, .. })));
        assert!(matches!(agrees(&tolerance(1.0, 0.0, "f16"), &[], &[]), Err(CompareError::Dtype(_))));
    }
}
