//! Types of elements and of the words on the wire.
//!
//! Conversions are written out here and not left to the machine: a processor's own conversion from f64 to f16 may go by
//! way of f32 and round twice, another's does not.

use crate::pb;
use crate::wire::WireError;

/// Type of a tensor's elements. All are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dtype {
    /// IEEE 754 single.
    F32,
    /// IEEE 754 half.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// IEEE 754 double.
    F64,
    /// 32-bit two's complement.
    I32,
    /// 64-bit two's complement.
    I64,
}

impl Dtype {
    /// Every type.
    pub const ALL: [Self; 6] = [Self::F32, Self::F16, Self::Bf16, Self::F64, Self::I32, Self::I64];

    /// Bytes of an element.
    #[allow(clippy::len_without_is_empty)]
    pub const fn len(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// Whether elements are floating point.
    pub const fn is_float(self) -> bool {
        !matches!(self, Self::I32 | Self::I64)
    }

    /// From the wire.
    pub fn from_raw(raw: Option<pb::TensorType>) -> Result<Self, WireError> {
        use pb::tensor_type::Kind;
        match Kind::try_from(raw.unwrap_or_default().kind) {
            Ok(Kind::F32) => Ok(Self::F32),
            Ok(Kind::F16) => Ok(Self::F16),
            Ok(Kind::Bf16) => Ok(Self::Bf16),
            Ok(Kind::F64) => Ok(Self::F64),
            Ok(Kind::I32) => Ok(Self::I32),
            Ok(Kind::I64) => Ok(Self::I64),
            Ok(Kind::Unspecified) | Err(_) => Err(WireError::field("dtype")),
        }
    }

    /// As sent.
    pub fn to_raw(self) -> pb::TensorType {
        use pb::tensor_type::Kind;
        let kind = match self {
            Self::F32 => Kind::F32,
            Self::F16 => Kind::F16,
            Self::Bf16 => Kind::Bf16,
            Self::F64 => Kind::F64,
            Self::I32 => Kind::I32,
            Self::I64 => Kind::I64,
        };
        pb::TensorType { kind: kind.into() }
    }
}

/// How much smaller than the tensor its words are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compress {
    /// As the type has it: i32 words of f32 and i32, i16 words of f16 and bf16.
    #[default]
    None,
    /// i16 words.
    Bf16,
    /// i8 words.
    Int8,
}

/// Width of a word on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Word {
    /// i8.
    W8,
    /// i16, little-endian.
    W16,
    /// i32, little-endian.
    W32,
    /// i64, little-endian.
    W64,
}

impl Word {
    /// Bytes of a word.
    #[allow(clippy::len_without_is_empty)]
    pub const fn len(self) -> usize {
        match self {
            Self::W8 => 1,
            Self::W16 => 2,
            Self::W32 => 4,
            Self::W64 => 8,
        }
    }
}

/// What words of a verified round mean: fixed by the type, the compression and the number of members it opened with.
///
/// | input | output | |input word| up to Q |
/// | --- | --- | --- |
/// | i32 | i32, above 16 members i64 | 2^(30 - ceil(log2 m)), above 16 members 2^26 |
/// | i16 | i16 | floor(32767 / m) |
/// | i8 | i16 | min(127, floor(32767 / m)) |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wire {
    input: Word,
    members: u16,
}

impl Wire {
    /// Words of a round of `members` (1 to 256) over tensors of `dtype`. `None` where only exact mode serves: f64 and i64,
    /// compressed integers.
    pub const fn of(dtype: Dtype, compress: Compress, members: usize) -> Option<Self> {
        if members == 0 || members > 256 {
            return None;
        }
        let input = match (dtype, compress) {
            (Dtype::F32 | Dtype::I32, Compress::None) => Word::W32,
            (Dtype::F32, Compress::Bf16) | (Dtype::F16 | Dtype::Bf16, Compress::None | Compress::Bf16) => Word::W16,
            (Dtype::F32 | Dtype::F16 | Dtype::Bf16, Compress::Int8) => Word::W8,
            _ => return None,
        };
        Some(Self { input, members: members as u16 })
    }

    /// Width of input words.
    pub const fn input(self) -> Word {
        self.input
    }

    /// Width of output words.
    pub const fn output(self) -> Word {
        match self.input {
            Word::W32 if self.members > 16 => Word::W64,
            Word::W32 => Word::W32,
            _ => Word::W16,
        }
    }

    /// Members that the round opened with.
    pub const fn members(self) -> usize {
        self.members as usize
    }

    /// Largest absolute value of an input word.
    pub const fn q(self) -> u32 {
        let m = self.members as u32;
        match self.input {
            Word::W32 | Word::W64 if m > 16 => 1 << 26,
            Word::W32 | Word::W64 => 1 << (30 - m.next_power_of_two().trailing_zeros()),
            Word::W16 => 32_767 / m,
            Word::W8 => {
                if 32_767 / m < 127 {
                    32_767 / m
                } else {
                    127
                }
            }
        }
    }

    /// Largest absolute value of an output word when `participants` took part.
    pub const fn q_out(self, participants: usize) -> u64 {
        self.q() as u64 * participants as u64
    }

    /// Exponent byte 1 stands for this power of two; byte e for `2^(e - 1 + first_exponent)`.
    ///
    /// f32 values are multiples of 2^-149, and with i32 words no scale above 2^102 is needed. Narrower words need up to
    /// 2^122, so theirs begin at 2^-132.
    pub const fn first_exponent(self) -> i32 {
        match self.input {
            Word::W32 | Word::W64 => -149,
            Word::W16 | Word::W8 => -132,
        }
    }
}

/// Exact value of an f16.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    // The exponent moves by 112 as a multiplication by 2^112, which is right for subnormals too; infinity and NaN get the
    // exponent that the multiplication does not give them.
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000);
    let special = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | special | u32::from(bits >> 15) << 31)
}

/// The f16 nearest to `value`, ties to even. NaN becomes the quiet one, 0x7e00.
#[inline(always)]
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let rounded = if magnitude > 0x7f80_0000 {
        return 0x7e00;
    } else if magnitude >= 0x477f_f000 {
        0x7c00
    } else if magnitude < 0x3880_0000 {
        // Subnormal: adding 0.5 puts the last place of the f16 into the last place of the sum, which is then rounded.
        ((f32::from_bits(magnitude) + 0.5).to_bits() - 0x3f00_0000) as u16
    } else {
        ((magnitude - 0x3800_0000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13) as u16
    };
    sign | rounded
}

/// Exact value of a bf16.
#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The bf16 nearest to `value`, ties to even. NaN becomes the quiet one, 0x7fc0.
#[inline(always)]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        return 0x7fc0;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_come_back_and_lie_between_their_neighbours() {
        for bits in 0..=u16::MAX {
            let (f16, bf16) = (f16_to_f32(bits), bf16_to_f32(bits));
            if f16.is_nan() {
                assert_eq!(f32_to_f16(f16), 0x7e00);
            } else {
                assert_eq!(f32_to_f16(f16), bits);
            }
            if bf16.is_nan() {
                assert_eq!(f32_to_bf16(bf16), 0x7fc0);
            } else {
                assert_eq!(f32_to_bf16(bf16), bits);
            }
        }
        assert_eq!(f16_to_f32(0x3c00), 1.0);
        assert_eq!(f16_to_f32(0x0001), 2_f32.powi(-24));
        assert_eq!(f16_to_f32(0x7c00), f32::INFINITY);
        assert_eq!(f16_to_f32(0xfbff), -65_504.0);
    }

    /// Between each two neighbours the middle goes to the even one, and what is beside the middle to the nearer.
    #[test]
    fn halves_round_to_the_nearest_and_ties_to_even() {
        for bits in 0..0x7bff_u16 {
            let (low, high) = (f16_to_f32(bits), f16_to_f32(bits + 1));
            let middle = low + (high - low) / 2.0;
            let even = bits + (bits & 1);
            assert_eq!(f32_to_f16(middle), even, "{bits:x}");
            assert_eq!(f32_to_f16(middle.next_up()), bits + 1, "{bits:x}");
            assert_eq!(f32_to_f16(middle.next_down()), bits, "{bits:x}");
            assert_eq!(f32_to_f16(-middle), even | 0x8000, "{bits:x}");
        }
        assert_eq!(f32_to_f16(65_520.0), 0x7c00);
        assert_eq!(f32_to_f16(65_519.996), 0x7bff);
        for bits in 0..0x7f7f_u16 {
            let middle = f32::from_bits(u32::from(bits) << 16 | 0x8000);
            assert_eq!(f32_to_bf16(middle), bits + (bits & 1), "{bits:x}");
            assert_eq!(f32_to_bf16(middle.next_up()), bits + 1, "{bits:x}");
            assert_eq!(f32_to_bf16(middle.next_down()), bits, "{bits:x}");
        }
        assert_eq!(f32_to_bf16(f32::MAX), 0x7f80);
    }

    #[test]
    fn sums_fit_their_words_for_every_number_of_members() {
        for m in 1..=256_usize {
            for (dtype, compress) in
                [(Dtype::F32, Compress::None), (Dtype::F32, Compress::Bf16), (Dtype::F16, Compress::Int8)]
            {
                let wire = Wire::of(dtype, compress, m).map(|w| (w.q(), w.q_out(m), w.output()));
                let Some((q, out, word)) = wire else { panic!("{m} members have no words") };
                let max = match word {
                    Word::W16 => 32_767,
                    Word::W32 => 1 << 30,
                    _ => 1 << 34,
                };
                assert!(q >= 127 && out <= max, "{m}: {q} {out}");
            }
        }
        assert_eq!(Wire::of(Dtype::F64, Compress::None, 2), None);
        assert_eq!(Wire::of(Dtype::F32, Compress::None, 257), None);
    }
}
