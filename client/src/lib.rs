//! The Rust client of Drava.
#![forbid(unsafe_code)]

pub mod session;
