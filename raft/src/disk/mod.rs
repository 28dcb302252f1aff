//! What the metadata group needs of a disk: a log of records and one snapshot.
//!
//! All calls come from one executor, and the log's calls from one task at a time: group commit is the caller's business.

mod files;
mod memory;

use std::io;

use futures_util::future::LocalBoxFuture;

pub use files::FileDisk;
pub use memory::{Content, MemoryDisk};

/// Where a record lies. Later records have greater positions; what the numbers say is the disk's own business.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position(pub u64, pub u64);

/// Records with their positions, in their order.
pub type Records = Vec<(Position, Vec<u8>)>;

pub trait MetaDisk {
    /// All records that are kept, in the order of their appends. Called once, before anything else.
    fn replay(&self) -> LocalBoxFuture<'_, io::Result<Records>>;

    /// Appends records; they are durable, all of them, when it returns. The position is that of the first, or a lower
    /// one. After an error nothing more may be appended: what was written is unknown.
    fn append(&self, records: Vec<Vec<u8>>) -> LocalBoxFuture<'_, io::Result<Position>>;

    /// Allows the disk to forget records below a position. It may keep some of them.
    fn trim(&self, before: Position) -> LocalBoxFuture<'_, io::Result<()>>;

    /// Replaces the snapshot: after a crash there is the old one or the new one, and the new one once this returned.
    fn save_snapshot(&self, file: Vec<u8>) -> LocalBoxFuture<'_, io::Result<()>>;

    fn load_snapshot(&self) -> LocalBoxFuture<'_, io::Result<Option<Vec<u8>>>>;

    /// The last call. What was appended is durable with or without it.
    fn close(&self) -> LocalBoxFuture<'_, io::Result<()>>;
}
