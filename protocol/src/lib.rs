//! The Drava wire protocol, without IO: what is on the wire and nothing of how it gets there.
//!
//! The way of the bytes:
//!
//! 1. [`frame`] cuts a byte stream into frames: a fixed header, an archived body, a raw payload.
//! 2. [`message`] gives each body its type; bodies are rkyv archives and are read where they lie.
//! 3. [`batch`] is the payload of a publish, of a delivery and of a ledger entry: one layout from producer to disk to
//!    consumer.
//! 4. [`error`] numbers what can go wrong, and says whether and where to try again.
//!
//! Every byte is drawn in `protocol/README.md`.
#![forbid(unsafe_code)]

pub mod batch;
pub mod error;
pub mod frame;
pub mod id;
pub mod message;
pub mod topic;

#[cfg(test)]
mod readme;

pub use error::{ErrorCode, Retry};
pub use id::{EntryId, LedgerId, MessageOffset, NodeId, PartitionId, ProducerId, ShardId, Term, TopicId};
