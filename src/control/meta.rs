//! Where the metadata of a node lies: the `meta` folder of its data directory.

use std::io;
use std::path::Path;
use std::rc::Rc;

use drava_raft::{FileDisk, MetaDisk};

/// Metadata is little: a segment of the log is written over days, or by a test in a second.
const SEGMENT_BYTES: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
#[error("open the metadata in {dir}: {source}")]
pub struct OpenError {
    dir: String,
    source: io::Error,
}

/// Opens the metadata's disk, a new one if the folder is not there. On the control executor.
pub async fn open(dir: &Path) -> Result<Rc<dyn MetaDisk>, OpenError> {
    match FileDisk::open(dir, SEGMENT_BYTES) {
        Ok(disk) => Ok(Rc::new(disk)),
        Err(source) => Err(OpenError { dir: dir.display().to_string(), source }),
    }
}
