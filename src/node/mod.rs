//! Boots a node.
//!
//! 1. [`probe`] looks at the host.
//! 2. [`data_dir`] is locked and checked.
//! 3. [`ports`] are settled.

pub mod boot;
pub mod data_dir;
pub mod ports;
pub mod probe;
