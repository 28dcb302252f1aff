//! The metadata group. (Being written.)
pub mod image;
pub use image::{Image, Owner, Partition, Topic};
