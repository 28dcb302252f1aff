//! Where the metadata of a node lies: the `meta` folder of its data directory.

use std::io;
use std::path::Path;

use drava_raft::disk::Records;
use drava_raft::{FileDisk, MetaDisk, Position};
use futures_util::future::LocalBoxFuture;

/// Metadata is little: a segment of the log is written over days, or by a test in a second.
const SEGMENT_BYTES: u64 = 1 << 20;

/// The metadata's disk of a node.
pub struct NodeMetaDisk(FileDisk);

impl NodeMetaDisk {
    /// Opens the folder, a new one if it is not there. On the control executor.
    pub async fn open(dir: &Path) -> io::Result<NodeMetaDisk> {
        FileDisk::open(dir, SEGMENT_BYTES).map(NodeMetaDisk)
    }
}

impl MetaDisk for NodeMetaDisk {
    fn replay(&self) -> LocalBoxFuture<'_, io::Result<Records>> {
        self.0.replay()
    }

    fn append(&self, records: Vec<Vec<u8>>) -> LocalBoxFuture<'_, io::Result<Position>> {
        self.0.append(records)
    }

    fn trim(&self, before: Position) -> LocalBoxFuture<'_, io::Result<()>> {
        self.0.trim(before)
    }

    fn save_snapshot(&self, file: Vec<u8>) -> LocalBoxFuture<'_, io::Result<()>> {
        self.0.save_snapshot(file)
    }

    fn load_snapshot(&self) -> LocalBoxFuture<'_, io::Result<Option<Vec<u8>>>> {
        self.0.load_snapshot()
    }

    fn close(&self) -> LocalBoxFuture<'_, io::Result<()>> {
        self.0.close()
    }
}
