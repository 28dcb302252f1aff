//! openraft's own suite for log stores and state machines, on each of our disks.

use std::rc::Rc;

use drava_raft::log_store::LogStore;
use drava_raft::machine::Machine;
use drava_raft::types::TypeConfig;
use drava_raft::{FileDisk, MemoryDisk, MetaDisk};
use drava_runtime::{Executor, ExecutorConfig};
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

/// Segments of a few records, so that trims happen.
const SEGMENT_BYTES: u64 = 200;

async fn stores(disk: Rc<dyn MetaDisk>) -> (LogStore, Machine) {
    let log = LogStore::open(disk.clone()).await.expect("a new log opens");
    (log, Machine::new(disk))
}

struct OnMemory;

impl StoreBuilder<TypeConfig, LogStore, Machine, ()> for OnMemory {
    async fn build(&self) -> Result<((), LogStore, Machine), StorageError<TypeConfig>> {
        let (log, machine) = stores(Rc::new(MemoryDisk::default())).await;
        Ok(((), log, machine))
    }
}

struct OnFiles;

impl StoreBuilder<TypeConfig, LogStore, Machine, tempfile::TempDir> for OnFiles {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, Machine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().expect("a directory for the test");
        let disk = FileDisk::open(dir.path(), SEGMENT_BYTES).expect("a new directory opens");
        let (log, machine) = stores(Rc::new(disk)).await;
        Ok((dir, log, machine))
    }
}

#[test]
fn openraft_accepts_the_log_in_memory() {
    Executor::run(ExecutorConfig::new("suite", None), async { Suite::test_all(OnMemory).await })
        .expect("an executor")
        .expect("the suite passes");
}

#[test]
fn openraft_accepts_the_log_on_files() {
    Executor::run(ExecutorConfig::new("suite", None), async { Suite::test_all(OnFiles).await })
        .expect("an executor")
        .expect("the suite passes");
}
