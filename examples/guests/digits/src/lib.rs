//! A classifier for 8x8 images of handwritten digits, and the gradient that trains it.
//!
//! Owns the network (64 pixels, 32 rectified hidden units, 10 classes), its loss and its gradient, the data set with
//! its fixed split, and the trained parameters. Does not own the guest's inputs and outputs: `main.rs` does.
//!
//! Invariants: every function is pure; arithmetic is f32 (f64 inside `exp` and `ln`) in one fixed order, without
//! libm and without fused multiply-add, so that a host and any wasm engine compute the same bits.

mod data;
mod network;

pub use data::{DATASET, Record, RecordError, TRAINED, images, records, test_records, train_records};
pub use network::{
    CLASSES, HIDDEN, PARAMETERS, PIXEL_MAX, PIXELS, Parameters, ParametersError, Prediction, classify, loss_gradient,
};
