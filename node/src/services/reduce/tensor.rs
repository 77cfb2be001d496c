//! Tensors as callers hand them in, and the element space of a round over them.

use std::ops::Range;

use bytes::Bytes;
use sundara_proto::rules::round::dtype::Dtype;

/// A flat tensor: elements of one type, in memory order. Shapes are the caller's own business.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    data: Data,
}

#[derive(Clone, Debug, PartialEq)]
enum Data {
    F32(Vec<f32>),
    F64(Vec<f64>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    /// Little-endian elements of any type.
    Raw(Dtype, Vec<u8>),
}

/// Why a tensor is not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The bytes are no whole number of elements.
    #[error("{len} bytes are no whole number of {dtype:?} elements of {size} bytes")]
    Length {
        /// Bytes that came.
        len: usize,
        /// Type of the elements.
        dtype: Dtype,
        /// Bytes of one.
        size: usize,
    },
    /// Of another type.
    #[error("the tensor holds {is:?} elements, not {asked:?}")]
    Type {
        /// What it holds.
        is: Dtype,
        /// What was asked for.
        asked: Dtype,
    },
}

macro_rules! from_vec {
    ($($variant:ident $type:ty, $into:ident;)*) => {
        $(
            impl From<Vec<$type>> for Tensor {
                fn from(values: Vec<$type>) -> Self {
                    Self { data: Data::$variant(values) }
                }
            }
        )*
        impl Tensor {
            $(
                #[doc = concat!("The elements, if they are `", stringify!($type), "`.")]
                ///
                /// # Errors
                /// [`TensorError::Type`].
                pub fn $into(self) -> Result<Vec<$type>, TensorError> {
                    let (is, asked) = (self.dtype(), Dtype::$variant);
                    match self.data {
                        Data::$variant(values) => Ok(values),
                        Data::Raw(dtype, bytes) if dtype == asked => Ok(bytemuck::pod_collect_to_vec(&bytes)),
                        _ => Err(TensorError::Type { is, asked }),
                    }
                }
            )*
        }
    };
}

from_vec! {
    F32 f32, into_f32;
    F64 f64, into_f64;
    I32 i32, into_i32;
    I64 i64, into_i64;
}

impl Tensor {
    /// From little-endian bytes: the way for half types, whose elements are their 16 bits.
    ///
    /// # Errors
    /// [`TensorError::Length`].
    pub fn from_bytes(dtype: Dtype, bytes: Vec<u8>) -> Result<Self, TensorError> {
        let (len, size) = (bytes.len(), dtype.len());
        if len.is_multiple_of(size) {
            Ok(Self { data: Data::Raw(dtype, bytes) })
        } else {
            Err(TensorError::Length { len, dtype, size })
        }
    }

    /// All zeros.
    pub fn zeros(dtype: Dtype, elements: usize) -> Self {
        let data = match dtype {
            Dtype::F32 => Data::F32(vec![0.0; elements]),
            Dtype::F64 => Data::F64(vec![0.0; elements]),
            Dtype::I32 => Data::I32(vec![0; elements]),
            Dtype::I64 => Data::I64(vec![0; elements]),
            Dtype::F16 | Dtype::Bf16 => Data::Raw(dtype, vec![0; elements * dtype.len()]),
        };
        Self { data }
    }

    /// Type of its elements.
    pub fn dtype(&self) -> Dtype {
        match &self.data {
            Data::F32(_) => Dtype::F32,
            Data::F64(_) => Dtype::F64,
            Data::I32(_) => Dtype::I32,
            Data::I64(_) => Dtype::I64,
            Data::Raw(dtype, _) => *dtype,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.as_bytes().len() / self.dtype().len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.as_bytes().is_empty()
    }

    /// Its elements as bytes, little-endian.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.data {
            Data::F32(values) => bytemuck::cast_slice(values),
            Data::F64(values) => bytemuck::cast_slice(values),
            Data::I32(values) => bytemuck::cast_slice(values),
            Data::I64(values) => bytemuck::cast_slice(values),
            Data::Raw(_, bytes) => bytes,
        }
    }

    /// The same, to write into.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.data {
            Data::F32(values) => bytemuck::cast_slice_mut(values),
            Data::F64(values) => bytemuck::cast_slice_mut(values),
            Data::I32(values) => bytemuck::cast_slice_mut(values),
            Data::I64(values) => bytemuck::cast_slice_mut(values),
            Data::Raw(_, bytes) => bytes,
        }
    }

    /// The bytes, copied only where they are not bytes already.
    pub fn into_bytes(self) -> Bytes {
        match self.data {
            Data::Raw(_, bytes) => bytes.into(),
            _ => Bytes::copy_from_slice(self.as_bytes()),
        }
    }
}

/// Several tensors of one type as one element space.
#[derive(Debug)]
pub(super) struct Space {
    tensors: Vec<Tensor>,
    /// Byte at which each begins, and the end of the last.
    starts: Vec<usize>,
}

impl Space {
    /// The caller has checked that all have one type.
    pub(super) fn new(tensors: Vec<Tensor>) -> Self {
        let mut starts = vec![0];
        for tensor in &tensors {
            starts.push(starts[starts.len() - 1] + tensor.as_bytes().len());
        }
        Self { tensors, starts }
    }

    pub(super) fn into_tensors(self) -> Vec<Tensor> {
        self.tensors
    }

    /// Calls `with` for each piece of a byte range that lies in one tensor: offset within the range, and the bytes.
    pub(super) fn read<'a>(&'a self, range: &Range<usize>, mut with: impl FnMut(usize, &'a [u8])) {
        for (tensor, start) in self.tensors.iter().zip(&self.starts) {
            let bytes = tensor.as_bytes();
            let (from, to) = (range.start.max(*start), range.end.min(start + bytes.len()));
            if from < to {
                with(from - range.start, &bytes[from - start..to - start]);
            }
        }
    }

    /// The bytes of a range: lent where they lie in one tensor, else gathered in `scratch`.
    pub(super) fn bytes<'a>(&'a self, range: &Range<usize>, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let mut whole = None;
        self.read(range, |offset, piece| {
            if offset == 0 && piece.len() == range.len() {
                whole = Some(piece);
            }
        });
        if let Some(whole) = whole {
            return whole;
        }
        scratch.clear();
        self.read(range, |_, piece| scratch.extend_from_slice(piece));
        scratch
    }

    /// Writes bytes from `offset` on.
    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) {
        let range = offset..offset + bytes.len();
        for (tensor, start) in self.tensors.iter_mut().zip(&self.starts) {
            let into = tensor.as_bytes_mut();
            let (from, to) = (range.start.max(*start), range.end.min(start + into.len()));
            if from < to {
                into[from - start..to - start].copy_from_slice(&bytes[from - offset..to - offset]);
            }
        }
    }

    /// The bytes of a range to write into, if they lie in one tensor.
    pub(super) fn slot(&mut self, range: &Range<usize>) -> Option<&mut [u8]> {
        for (tensor, start) in self.tensors.iter_mut().zip(&self.starts) {
            let into = tensor.as_bytes_mut();
            if range.start >= *start && range.end <= start + into.len() && !range.is_empty() {
                return Some(&mut into[range.start - start..range.end - start]);
            }
        }
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn tensors_keep_their_elements() {
        assert_eq!(Tensor::from(vec![1.5_f32, -2.0]).into_f32().unwrap(), [1.5, -2.0]);
        let raw = Tensor::from_bytes(Dtype::I64, 7_i64.to_le_bytes().to_vec()).unwrap();
        assert_eq!(raw.into_i64().unwrap(), [7]);
        assert!(Tensor::from_bytes(Dtype::F32, vec![0; 6]).is_err());
        assert!(Tensor::from(vec![1_i32]).into_f32().is_err());
        assert_eq!(Tensor::zeros(Dtype::Bf16, 3).len(), 3);
    }

    #[test]
    fn a_space_reads_and_writes_across_its_tensors() {
        let mut space = Space::new(vec![vec![1_i32, 2].into(), Vec::<i32>::new().into(), vec![3_i32, 4, 5].into()]);
        let mut scratch = Vec::new();
        assert_eq!(space.bytes(&(0..8), &mut scratch), bytemuck::cast_slice::<i32, u8>(&[1, 2]));
        assert_eq!(space.bytes(&(4..16), &mut scratch), bytemuck::cast_slice::<i32, u8>(&[2, 3, 4]));
        space.write(4, bytemuck::cast_slice(&[9_i32, 8, 7]));
        assert!(space.slot(&(4..12)).is_none());
        space.slot(&(16..20)).unwrap().fill(0);
        let tensors: Vec<Vec<i32>> = space.into_tensors().into_iter().map(|t| t.into_i32().unwrap()).collect();
        assert_eq!(tensors, [vec![1, 9], vec![], vec![8, 7, 0]]);
    }
}
