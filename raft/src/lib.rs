//! The metadata of Drava, and the raft group that agrees on it.
//!
//! - [`command`] is what can be asked, [`state`] what it does: pure, the same on every member.
//! - [`image`] is the result as shards and the admin read it, in [`shared_map`]s: a change copies little.
//! - [`group`] runs openraft around the state, on the control core's executor, over a [`disk`].
//! - [`log_store`] and [`machine`] are what openraft asks for; [`record`] and [`snapshot`] are what lies on disk.
//! - [`runtime`] lets openraft run on a Drava executor. No tokio is in the tree.
//!
//! openraft is pinned to one release. Its own suites for runtimes and log stores are tests of this crate, and with the
//! golden files they are the gate of an upgrade.

#![forbid(unsafe_code)]

pub mod command;
pub mod disk;
pub mod group;
pub mod image;
pub mod log_store;
pub mod machine;
mod network;
pub mod record;
pub mod runtime;
pub mod shared_map;
pub mod snapshot;
pub mod state;
mod stored;
pub mod types;

pub use command::{Applied, Command, Effect, Registration, Rejected};
pub use disk::{FileDisk, MemoryDisk, MetaDisk, Position};
pub use group::{GroupConfig, GroupFailed, MetadataGroup, ProposeError, StartError};
pub use image::{Image, Incarnation, Liveness, Node, Owner, Partition, Topic};
pub use shared_map::SharedMap;
pub use state::{State, StateError, shard_of};
