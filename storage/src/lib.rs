//! The store of one shard: what was appended is on disk before anybody is told so.
//!
//! The way of an entry:
//!
//! 1. [`Store::append`] stages it: a reference to the received bytes and a place in its ledger, nothing else.
//! 2. The flusher gathers what was staged into one aligned block ([`block`]), entries of one ledger side by side, and
//!    copies each once.
//! 3. `journal` writes the block with O_DIRECT and O_DSYNC into a preallocated segment ([`segment`]).
//! 4. Blocks complete strictly in order: their entries become readable, then [`FlushSink::flushed`] hears their tokens.
//! 5. The written buffer is the ledger cache from then on (`cache`); readers of the tail get slices of it.
//! 6. Where extents lie goes to the index (`index`, RocksDB on a thread of its own), in batches that also say how far
//!    into the journal they reach.
//! 7. A reader behind the cache reads extents from the segments, with read-ahead (`backlog`).
//! 8. `compact` brings live extents together in segments of their own, where much is dead or lies apart.
//! 9. `recovery` replays the journal from where the durable index ends. `ledger` says what may be deleted, `journal`
//!    uses dead segments again.
//!
//! What all of this may hold in memory has one limit (`memory`); the cache gives way to the rest.
//!
//! A [`Store`] lives on the executor that opened it. Files and clocks are behind [`Io`]. Formats: `storage/README.md`.

// The tests inside share what those outside have.
#[cfg(test)]
extern crate self as drava_storage;

mod backlog;
pub mod block;
pub mod budget;
mod cache;
mod checkpoint;
mod compact;
mod damage;
pub mod dump;
mod flush;
pub mod foreign;
pub mod index;
pub mod io;
mod journal;
mod ledger;
mod managed_ledger;
mod mark;
mod memory;
mod open;
mod pool;
mod rebuild;
mod record_log;
mod recovery;
pub mod reshard;
mod scrub;
pub mod segment;
mod stage;
mod state;
mod store;
pub mod verify;

pub use budget::Budget;
pub use compact::CompactError;
pub use damage::{Damage, DamagedMessages, DamagedPlace, FoundBy};
pub use foreign::{ForeignStores, StoreId};
pub use index::{Index, IndexDb, IndexError};
pub use io::Io;
pub use io::glommio::GlommioIo;
pub use memory::MemoryFigures;
pub use record_log::{RecordLog, RecordLogConfig, RecordPosition};
pub use state::StateBatch;
pub use store::{
    AppendError, Cached, DamagedRange, FlushError, FlushSink, LostRange, NewEntry, OpenError, PartitionLimits,
    PartitionSlot, ReadError, Rebuilt, Recovered, RecoveredPartition, ReplayedBatch, Run, Span, Store, StoreConfig,
    StoreFigures, TornTail,
};
