//! What a partition does, decided without IO.
//!
//! 1. [`producers`] looks at the sequence of a batch: append it, answer it again, or refuse it.
//! 2. The shard stages the batch in its store and tells [`partition`] when it is durable.
//! 3. [`subscriptions`] moves cursors by acks and seeks, and says which have to be saved.
//!
//! No file, socket, clock or random source is used here: the same code runs in the node and in a simulator.

pub mod partition;
pub mod producers;
pub mod subscriptions;

pub use partition::Partition;
