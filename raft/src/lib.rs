//! The metadata group. (Being written.)
#![forbid(unsafe_code)]
pub mod command;
pub mod image;
pub mod runtime;
pub mod state;
mod stored;
pub use command::{Applied, Command, Effect, Registration, Rejected};
pub use image::{Image, Incarnation, Liveness, Node, Owner, Partition, Topic};
pub use state::{State, StateError};
