//! Which vector unit the kernels use. The one file of this crate with unsafe code.
//!
//! Kernels are plain loops over integers and floats that the compiler vectorises. Here they are compiled three times, for
//! the target's baseline, for AVX2 and for AVX-512, and the widest that the processor has is called. No kernel adds floats
//! in an order that depends on the width, and none is compiled with fused multiply-add, so all give the same bits: tests
//! run each kernel at every [`Level::supported`].
//!
//! A kernel is a value whose `run` is `#[inline(always)]`, down to its innermost loop: only what is inlined into a function
//! with a target feature is compiled for that feature.
//!
//! [`to_i32`] is here too: an `as` cast saturates, and what that takes keeps the compiler from vectorising the loop around
//! it, which is then seven times slower.

/// A vector unit. Only those that this processor has can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Unit);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The widest that this processor has: what all kernels use.
#[inline]
pub fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            return Level(Unit::Avx512);
        }
        if is_x86_feature_detected!("avx2") {
            return Level(Unit::Avx2);
        }
    }
    Level::PORTABLE
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx2")
}

impl Level {
    /// The target's baseline: SSE2 on x86-64, NEON on aarch64.
    pub const PORTABLE: Self = Self(Unit::Portable);

    /// All that this processor has, the baseline first.
    pub fn supported() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                all.push(Self(Unit::Avx2));
            }
            if has_avx512() {
                all.push(Self(Unit::Avx512));
            }
        }
        all
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self.0 {
            Unit::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Unit::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Unit::Avx512 => "avx512",
        }
    }

    /// Runs `kernel` as compiled for this unit.
    #[inline]
    #[allow(unsafe_code)]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self.0 {
            Unit::Portable => kernel.run(),
            // SAFETY: a Level of this unit is made only where the processor was found to have all its features.
            #[cfg(target_arch = "x86_64")]
            Unit::Avx2 => unsafe { avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Unit::Avx512 => unsafe { avx512(kernel) },
        }
    }
}

/// `x` as an integer, cut towards zero, at most 2^30 from it; a NaN becomes one of the ends.
#[inline(always)]
#[allow(unsafe_code)]
pub(super) fn to_i32(x: f32) -> i32 {
    const END: f32 = (1 << 30) as f32;
    let x = if x > -END { x } else { -END };
    let x = if x < END { x } else { END };
    // SAFETY: a number between -2^30 and 2^30; a NaN went to -2^30 in the first comparison.
    unsafe { x.to_int_unchecked() }
}

/// A loop to be compiled for every unit. `run` and all that it calls must be `#[inline(always)]`.
pub(super) trait Kernel {
    /// What comes out.
    type Out;
    /// The loop.
    fn run(self) -> Self::Out;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<K: Kernel>(kernel: K) -> K::Out {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
fn avx512<K: Kernel>(kernel: K) -> K::Out {
    kernel.run()
}
