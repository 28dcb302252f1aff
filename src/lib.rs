//! The Drava node: everything that knows all the parts.
//!
//! - [`cli`] is what the user types, one file a command.
//! - [`config`] declares each option once.
//! - [`node`] boots: probe, lock, recover, start the shards, serve, drain.
//! - [`shard`] is the edge on a data core: connections, the mesh, the store.
//! - [`broker`] decides what a partition does: state machines without IO.
//! - [`control`] is the control core: the metadata group and the HTTP admin.

pub mod broker;
pub mod cli;
pub mod config;
pub mod control;
pub mod node;
pub mod shard;
