//! The Rust client of Drava.
#![forbid(unsafe_code)]

pub mod producer_core;
pub mod session;

#[cfg(feature = "glommio")]
pub mod glommio_driver;
