//! The control core.
pub mod request;
