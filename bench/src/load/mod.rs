//! Load on a running node.
//!
//! The way of a run:
//!
//! 1. [`plan`] makes the topics, asks where their partitions live, and spreads them over connections, each to the core
//!    that owns them.
//! 2. [`engine`] starts an executor a client core; each connection is a task of [`producer`] or [`consumer`]. When all
//!    are connected the run begins: warm-up, the measured stretch, and the rest until all answers are in.
//! 3. The engine's own thread sleeps and now and then takes a sample: counters, latencies, CPU.
//! 4. What came is checked message by message ([`crate::verify`]); [`outcome`] is what a run leaves behind.

pub mod consumer;
pub mod engine;
pub mod keys;
pub mod options;
pub mod outcome;
pub mod plan;
pub mod producer;
pub mod shared;

pub use engine::{RunError, run};
pub use options::{Kind, LoadOptions};
pub use outcome::Outcome;
