//! The metadata group. (Being written.)
#![forbid(unsafe_code)]
pub mod image;
pub mod runtime;
pub use image::{Image, Owner, Partition, Topic};
