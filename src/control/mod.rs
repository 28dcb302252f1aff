//! The control core.
pub mod handle;
pub mod http;
pub mod request;
