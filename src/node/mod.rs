//! Boots a node.
//!
//! 1. [`probe`] looks at the host.
//! 2. [`data_dir`] is locked and checked.
//! 3. [`ports`] are settled.
//! 4. [`reshard`] brings the directory to the number of shards of this start.

pub mod boot;
pub mod data_dir;
pub mod ports;
pub mod probe;
pub mod reshard;
