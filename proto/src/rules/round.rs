//! Map-reduce: what members and reducers of a round compute, and who is to blame when the figures do not fit.
//!
//! Everything here is a function of bytes. Words, roots, tags and results come out the same on every machine and whatever
//! the vector unit; who sends what to whom is said in [`crate::round`].
//!
//! | module | holds |
//! | --- | --- |
//! | [`dtype`] | types of elements, words and their conversions |
//! | [`layout`] | blocks, groups, chunks and parts of the element space |
//! | [`fixed`] | verified mode: shared exponents, quantising, sums of integers |
//! | [`exact`], [`robust`] | exact mode: reduction in the order of ranks, aggregates that bear bad members |
//! | [`tags`] | checksums of groups |
//! | [`tree`] | roots of chunks and openings of groups |
//! | [`blame`] | who lied |

pub mod blame;
pub mod dtype;
pub mod exact;
pub mod fixed;
pub mod layout;
pub mod robust;
pub mod tags;
pub mod tree;

mod simd;

pub use simd::{Level, level};
