//! The Rust client of Drava.
#![forbid(unsafe_code)]

pub mod session;

#[cfg(feature = "glommio")]
pub mod glommio_driver;
