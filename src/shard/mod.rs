//! The edge on a data core.
pub mod command;
pub mod stats;
