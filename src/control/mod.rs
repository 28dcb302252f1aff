//! The control core.
pub mod handle;
pub mod request;
