//! The control core: metadata and the admin, on an executor of its own and never on the data path.
//!
//! - [`driver`] runs it: it changes metadata and keeps the shards at the newest image.
//! - [`request`] is the door for shards and the boot.
//! - [`shards`] is how it talks to the shards.
//! - [`meta_disk`] is where the metadata lies.
//! - [`http`] is the admin.

pub mod driver;
pub mod http;
pub mod meta_disk;
pub mod request;
mod shards;
#[cfg(test)]
mod tests;

pub use driver::{ControlConfig, ControlCore, ControlEnds, ControlError, ControlStarted, Readiness, run};
pub use request::{ControlRequest, Refused};
