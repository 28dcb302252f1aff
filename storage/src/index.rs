//! The index of the node.
use std::path::Path;
use std::sync::Arc;

use drava_protocol::ShardId;

#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    #[error("index at {path}")]
    Open {
        path: std::path::PathBuf,
        #[source]
        source: rocksdb::Error,
    },
    #[error("index: {0}")]
    Database(#[from] rocksdb::Error),
    #[error("index row: {0}")]
    Row(&'static str),
    #[error("index thread: {0}")]
    Thread(String),
}

/// The RocksDB database of the node: one column family per shard. Blocking: open it before the executors start.
#[derive(Debug)]
pub struct IndexDb(());

impl IndexDb {
    /// Opens or makes the database and the families of `shards` shards. An unusable database is set aside and made
    /// anew; the stores then rebuild their families from their journals.
    pub fn open(_path: &Path, _shards: u16) -> Result<Arc<IndexDb>, IndexError> {
        unimplemented!()
    }

    /// The family of one shard; for [`crate::Store::open`], on whichever thread.
    pub fn shard(self: &Arc<Self>, _shard: ShardId) -> Index {
        unimplemented!()
    }
}

/// The family of one shard.
#[derive(Debug)]
pub struct Index(());
