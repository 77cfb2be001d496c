//! Rules: functions that every honest node computes to the same bits.

pub mod compare;
pub mod env;
pub mod merkle;
pub mod round;
pub mod select;
