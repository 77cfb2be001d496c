//! The data set, its split and its record format, and the trained parameters.
//!
//! Owns the meaning of bytes: what an image and a record are. Invariant: a [`Record`] holds pixels of at most
//! [`PIXEL_MAX`] and a label below [`CLASSES`].

use crate::network::{CLASSES, PIXEL_MAX, PIXELS};
use std::fmt;

/// The UCI optical-digits test set: 1,797 records of 65 bytes, in the order of its publication.
///
/// Source and licence: `data/README.md` (E. Alpaydin, C. Kaynak; CC BY 4.0).
pub const DATASET: &[u8] = include_bytes!("../data/digits.bin");

/// The parameters that `examples/train.rs` wrote: little-endian f32, in the order of [`crate::Parameters`].
pub const TRAINED: &[u8] = include_bytes!("../data/weights.bin");

/// Every fourth record is held out of training.
const TEST_STRIDE: usize = 4;

/// One image with its label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Eight rows of eight pixels, each 0 (paper) to [`PIXEL_MAX`] (ink).
    pub image: &'a [u8; PIXELS],
    /// The digit, 0 to 9.
    pub label: u8,
}

impl Record<'_> {
    /// Bytes of one record: the image, then the label.
    pub const BYTES: usize = PIXELS + 1;
}

/// Why bytes are not records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordError {
    /// The input is empty or not a whole number of records.
    Length {
        /// Bytes found.
        found: usize,
        /// Bytes of one record.
        record: usize,
    },
    /// A pixel exceeds [`PIXEL_MAX`].
    Pixel {
        /// Position of the record in the input, from 0.
        record: usize,
    },
    /// A label is not a digit.
    Label {
        /// Position of the record in the input, from 0.
        record: usize,
    },
}

impl fmt::Display for RecordError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { found, record } => {
                write!(out, "the input holds {found} bytes, expected one or more records of {record} bytes")
            }
            Self::Pixel { record } => write!(out, "record {record} has a pixel above {PIXEL_MAX}"),
            Self::Label { record } => write!(out, "record {record} has a label above 9"),
        }
    }
}

impl std::error::Error for RecordError {}

/// Reads labelled records, in order.
pub fn records(bytes: &[u8]) -> Result<Vec<Record<'_>>, RecordError> {
    let (chunks, rest) = bytes.as_chunks::<{ Record::BYTES }>();
    if chunks.is_empty() || !rest.is_empty() {
        return Err(RecordError::Length { found: bytes.len(), record: Record::BYTES });
    }
    let mut parsed = Vec::with_capacity(chunks.len());
    for (index, chunk) in chunks.iter().enumerate() {
        let (image, label) = (chunk.first_chunk::<PIXELS>(), chunk[PIXELS]);
        let Some(image) = image.filter(|image| image.iter().all(|&pixel| pixel <= PIXEL_MAX)) else {
            return Err(RecordError::Pixel { record: index });
        };
        if usize::from(label) >= CLASSES {
            return Err(RecordError::Label { record: index });
        }
        parsed.push(Record { image, label });
    }
    Ok(parsed)
}

/// Reads images without labels, in order: 64 bytes each.
pub fn images(bytes: &[u8]) -> Result<&[[u8; PIXELS]], RecordError> {
    let (images, rest) = bytes.as_chunks::<PIXELS>();
    if images.is_empty() || !rest.is_empty() {
        return Err(RecordError::Length { found: bytes.len(), record: PIXELS });
    }
    match images.iter().position(|image| image.iter().any(|&pixel| pixel > PIXEL_MAX)) {
        Some(record) => Err(RecordError::Pixel { record }),
        None => Ok(images),
    }
}

/// The 449 held-out records: those at positions 3, 7, 11 and so on of [`DATASET`].
pub fn test_records() -> Vec<Record<'static>> {
    split(true)
}

/// The 1,348 records to train on: all others.
pub fn train_records() -> Vec<Record<'static>> {
    split(false)
}

fn split(test: bool) -> Vec<Record<'static>> {
    // The embedded set is checked by a test; were it broken, an empty split would fail every user at once.
    let all = records(DATASET).unwrap_or_default();
    let held_out = |index: usize| index % TEST_STRIDE == TEST_STRIDE - 1;
    all.into_iter().enumerate().filter(|(index, _)| held_out(*index) == test).map(|(_, record)| record).collect()
}
