//! Where the metadata of a node lies: the `meta` folder of its data directory.
//!
//! - `log/` holds the raft log, by the same journal code as the shards' entries.
//! - `snapshot` is the newest snapshot; `snapshot.new` one that is being written, of no worth until it is renamed.
//!
//! A full disk is no failure: writes wait until there is room, proposals meanwhile time out, and the data goes on.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use drava_raft::disk::Records;
use drava_raft::{MetaDisk, Position};
use drava_runtime::foreign::reply;
use drava_storage::{FlushError, GlommioIo, Io, OpenError, RecordLog, RecordLogConfig, RecordPosition};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

/// Between two tries on a full disk.
const FULL_PAUSE: Duration = Duration::from_secs(1);

/// The metadata's disk of a node. Lives on the control executor.
pub struct NodeMetaDisk {
    log: RecordLog<GlommioIo>,
    /// What the log held at the open, until somebody asks.
    replay: std::cell::Cell<Records>,
    dir: Rc<Path>,
}

impl NodeMetaDisk {
    /// Opens the folder, a new one if it is not there.
    pub async fn open(dir: &Path) -> Result<NodeMetaDisk, OpenError> {
        let io = GlommioIo::new();
        let log_dir = dir.join("log");
        let created = io.create_dir(&log_dir).await;
        created.map_err(|source| OpenError::Io { what: format!("make {}", log_dir.display()), source })?;
        // No reserve of the disk is kept from it: what shards leave free is there for the metadata.
        let (log, records) = RecordLog::open(io, &log_dir, RecordLogConfig::default()).await?;
        let replay = records.into_iter().map(|(position, record)| (Position(0, position.0), record)).collect();
        Ok(NodeMetaDisk { log, replay: std::cell::Cell::new(replay), dir: dir.into() })
    }
}

impl MetaDisk for NodeMetaDisk {
    fn replay(&self) -> LocalBoxFuture<'_, io::Result<Records>> {
        std::future::ready(Ok(self.replay.take())).boxed_local()
    }

    fn append(&self, records: Vec<Vec<u8>>) -> LocalBoxFuture<'_, io::Result<Position>> {
        async move {
            loop {
                match self.log.append(records.clone()).await {
                    Ok(position) => return Ok(Position(0, position.0)),
                    Err(FlushError::Full) => wait_for_room("log").await,
                    Err(error) => return Err(io::Error::other(error)),
                }
            }
        }
        .boxed_local()
    }

    fn trim(&self, before: Position) -> LocalBoxFuture<'_, io::Result<()>> {
        self.log.trim(RecordPosition(before.1));
        std::future::ready(Ok(())).boxed_local()
    }

    fn save_snapshot(&self, file: Vec<u8>) -> LocalBoxFuture<'_, io::Result<()>> {
        async move {
            let file: std::sync::Arc<[u8]> = file.into();
            loop {
                let (file, dir) = (file.clone(), self.dir.to_path_buf());
                match on_thread(move || replace_snapshot(&dir, &file)).await {
                    Err(error) if error.kind() == io::ErrorKind::StorageFull => wait_for_room("snapshot").await,
                    saved => return saved,
                }
            }
        }
        .boxed_local()
    }

    fn load_snapshot(&self) -> LocalBoxFuture<'_, io::Result<Option<Vec<u8>>>> {
        let path = self.dir.join("snapshot");
        on_thread(move || match fs::read(path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .boxed_local()
    }

    fn close(&self) -> LocalBoxFuture<'_, io::Result<()>> {
        self.log.close().map(Ok).boxed_local()
    }
}

async fn wait_for_room(what: &str) {
    tracing::warn!("the disk is full: the metadata {what} waits for room, topics cannot be changed");
    drava_runtime::time::sleep(FULL_PAUSE).await;
}

fn replace_snapshot(dir: &Path, bytes: &[u8]) -> io::Result<()> {
    let new: PathBuf = dir.join("snapshot.new");
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, dir.join("snapshot"))?;
    // The new name is on disk, too, before the log is trimmed by what the file holds.
    File::open(dir)?.sync_all()
}

/// Runs what blocks on a thread of its own: snapshots are rare.
async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let (sender, answer) = reply();
    let thread = std::thread::Builder::new().name("meta-snapshot".to_owned());
    thread.spawn(move || sender.send(work()))?;
    answer.await.unwrap_or_else(|| Err(io::Error::other("the thread of the metadata snapshot panicked")))
}

#[cfg(test)]
mod tests {
    use drava_protocol::NodeId;
    use drava_protocol::message::TopicPolicy;
    use drava_protocol::topic::TopicName;
    use drava_raft::{Command, GroupConfig, MetadataGroup, Registration, StartError};
    use drava_runtime::{Executor, ExecutorConfig};

    use super::*;

    /// A snapshot every 20 entries.
    async fn start(dir: &Path) -> Result<MetadataGroup, StartError> {
        let config = GroupConfig { snapshot_entries: 20, kept_entries: 3, ..GroupConfig::new(NodeId(1)) };
        let disk = NodeMetaDisk::open(dir).await.expect("the disk opens");
        MetadataGroup::start(config, Rc::new(disk)).await
    }

    async fn create(group: &MetadataGroup, topic: &str) {
        let name = TopicName::parse(topic).unwrap();
        let command = Command::CreateTopic { name, policy: TopicPolicy::default(), created_ms: 1 };
        group.propose(command).await.expect("the topic is created");
    }

    /// On the file system of the build: that of /tmp may not take direct writes.
    fn directory() -> tempfile::TempDir {
        let near = std::env::current_exe().unwrap();
        tempfile::tempdir_in(near.parent().unwrap()).unwrap()
    }

    #[test]
    fn metadata_survives_restarts_past_snapshots() {
        let dir = directory();
        for life in 0..4 {
            // An executor of its own for each life, as a process has.
            let meta = dir.path().to_owned();
            Executor::run(ExecutorConfig::new("test", None), async move {
                let group = start(&meta).await.expect("the group starts");
                assert_eq!(group.image().topics.len(), life * 30);
                let shard_ports = vec![7401];
                let registration =
                    Registration { node: 1, incarnation: 1, host: String::new(), shared_port: 7400, shard_ports };
                group.propose(Command::RegisterNode(registration)).await.unwrap();
                for round in 0..30 {
                    create(&group, &format!("life-{life}-round-{round}")).await;
                }
                group.shutdown().await;
            })
            .unwrap();
        }
        assert!(dir.path().join("snapshot").exists());
        assert!(!dir.path().join("snapshot.new").exists());
    }

    #[test]
    fn a_damaged_snapshot_is_an_error() {
        let dir = directory();
        fs::write(dir.path().join("snapshot"), b"not a snapshot, but long enough for a head").unwrap();
        Executor::run(ExecutorConfig::new("test", None), async {
            let error = start(dir.path()).await.err().expect("it does not start");
            assert!(matches!(error, StartError::Snapshot(_)), "{error}");
        })
        .unwrap();
    }
}
