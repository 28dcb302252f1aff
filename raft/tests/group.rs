//! A group of one through restarts, crashes and damage.

use std::collections::BTreeSet;
use std::future::Future;
use std::rc::Rc;

use drava_protocol::message::TopicPolicy;
use drava_protocol::topic::TopicName;
use drava_protocol::{ErrorCode, NodeId};
use drava_raft::disk::Content;
use drava_raft::snapshot::SnapshotError;
use drava_raft::{
    Applied, Command, Effect, FileDisk, GroupConfig, Image, MemoryDisk, MetaDisk, MetadataGroup, ProposeError,
    Registration, Rejected, StartError,
};
use drava_runtime::{Executor, ExecutorConfig};

fn run(test: impl Future<Output = ()>) {
    Executor::run(ExecutorConfig::new("test", None), test).expect("an executor");
}

/// A snapshot every 20 entries.
fn config() -> GroupConfig {
    GroupConfig { snapshot_entries: 20, kept_entries: 3, ..GroupConfig::new(NodeId(1)) }
}

fn register(shards: u16) -> Command {
    Command::RegisterNode(Registration {
        node: 1,
        incarnation: 5,
        host: String::new(),
        shared_port: 7400,
        shard_ports: (0..shards).map(|shard| 7401 + shard).collect(),
    })
}

fn name(topic: &str) -> TopicName {
    TopicName::parse(topic).unwrap()
}

fn create(topic: &str) -> Command {
    let policy = TopicPolicy { partitions: 2, ..TopicPolicy::default() };
    Command::CreateTopic { name: name(topic), policy, created_ms: 1 }
}

fn delete(topic: &str) -> Command {
    Command::DeleteTopic { name: name(topic), expected: None }
}

async fn start(disk: &MemoryDisk) -> MetadataGroup {
    MetadataGroup::start(config(), Rc::new(disk.clone())).await.expect("the group starts")
}

fn start_error(result: Result<MetadataGroup, StartError>) -> StartError {
    match result {
        Ok(_) => panic!("the group started"),
        Err(error) => error,
    }
}

/// Proposes a topic and returns its ids: its own, then its partitions'.
async fn ids_of(group: &MetadataGroup, topic: &str) -> Vec<u64> {
    match group.propose(create(topic)).await.expect("the topic is created").effect {
        Effect::TopicCreated(topic) => [topic.id.0].into_iter().chain(topic.partitions.iter().map(|p| p.0)).collect(),
        other => panic!("not created: {other:?}"),
    }
}

#[test]
fn a_new_group_leads_and_applies() {
    run(async {
        let group = start(&MemoryDisk::default()).await;
        assert!(group.is_leader());
        let applied = group.propose(register(2)).await.unwrap();
        assert_eq!(applied.version, 1);
        assert_eq!(group.propose(register(2)).await, Ok(Applied { version: 1, effect: Effect::Nothing }));
        ids_of(&group, "a").await;
        let error = group.propose(create("a")).await.unwrap_err();
        assert_eq!(error, ProposeError::Rejected(Rejected::TopicExists(name("a"))));
        assert_eq!(error.code(), ErrorCode::TopicExists);
        assert_eq!(group.image().topics.len(), 1);
        group.shutdown().await;
        let error = group.propose(create("b")).await.unwrap_err();
        assert_eq!(error, ProposeError::ShutDown);
    });
}

#[test]
fn changes_are_seen_by_whoever_waits() {
    run(async {
        let group = start(&MemoryDisk::default()).await;
        let waiting = drava_runtime::spawn({
            let group = group.clone();
            async move { group.image_after(1).await }
        });
        group.propose(register(1)).await.unwrap();
        group.propose(create("a")).await.unwrap();
        assert_eq!(waiting.await.unwrap().version, 2);
        assert_eq!(group.image_after(0).await.version, 2);
        group.shutdown().await;
    });
}

/// Each life creates and deletes enough for several snapshots; nothing changes over a restart, and no id comes back.
async fn live_many_lives<D: MetaDisk + 'static>(mut open: impl FnMut() -> D) {
    let mut used = BTreeSet::new();
    let mut before: Option<Image> = None;
    for life in 0..6 {
        let group = MetadataGroup::start(config(), Rc::new(open())).await.expect("the group starts");
        match &before {
            Some(before) => assert_eq!(*group.image(), *before, "life {life}"),
            None => drop(group.propose(register(3)).await.unwrap()),
        }
        for round in 0..35 {
            let topic = format!("life-{life}-round-{round}");
            for id in ids_of(&group, &topic).await.into_iter().skip(1) {
                assert!(used.insert(id), "partition id {id} was used before");
            }
            if round % 3 != 0 {
                group.propose(delete(&topic)).await.unwrap();
            }
        }
        before = Some((*group.image()).clone());
        group.shutdown().await;
    }
}

#[test]
fn state_and_ids_survive_restarts_past_snapshots_and_purges() {
    run(async {
        let disk = MemoryDisk::default();
        live_many_lives(|| disk.clone()).await;
        let content = disk.content();
        assert!(content.snapshot.is_some());
        assert!(content.records.len() < 150, "{} records are kept of over 1000", content.records.len());
    });
}

#[test]
fn state_and_ids_survive_restarts_on_files() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        live_many_lives(|| FileDisk::open(dir.path(), 500).unwrap()).await;
        let files = std::fs::read_dir(dir.path()).unwrap().count();
        assert!(files < 60, "{files} files are kept");
    });
}

/// What a crash at any moment leaves: after each record of each write, each snapshot, each trim. From each of them the
/// group starts again, has all that had been acknowledged by then, and goes on with new ids.
#[test]
fn nothing_acknowledged_is_lost_in_a_crash_at_any_moment() {
    run(async {
        let disk = MemoryDisk::default();
        disk.record_crashes();
        let group = start(&disk).await;
        group.propose(register(2)).await.unwrap();
        // What was acknowledged when this many crash points had passed: the image and the greatest partition id.
        let mut acknowledged = Vec::new();
        for round in 0..60 {
            let topic = format!("t-{round}");
            let ids = ids_of(&group, &topic).await;
            acknowledged.push((disk.crashes().len(), group.image(), *ids.last().unwrap()));
            if round % 2 == 0 {
                group.propose(delete(&topic)).await.unwrap();
                acknowledged.push((disk.crashes().len(), group.image(), *ids.last().unwrap()));
            }
        }
        group.shutdown().await;

        let crashes = disk.crashes();
        let snapshots: BTreeSet<_> = crashes.iter().filter_map(|content| content.snapshot.clone()).collect();
        assert!(3 <= snapshots.len(), "the test is to cross snapshots");
        for (index, content) in crashes.into_iter().enumerate() {
            let group = start(&MemoryDisk::with(content)).await;
            let last = acknowledged.iter().rfind(|(crash, ..)| *crash <= index + 1);
            if let Some((_, image, last_id)) = last {
                let found = group.image();
                assert!(image.version <= found.version, "crash {index}: version {} is gone", image.version);
                if image.version == found.version {
                    assert_eq!(*image, found, "crash {index}");
                }
                let new = ids_of(&group, "after").await;
                assert!(*last_id < new[1], "crash {index}: partition id {} was used before", new[1]);
            }
            group.shutdown().await;
        }
    });
}

#[test]
fn a_crash_between_snapshot_and_purge_repeats_nothing() {
    run(async {
        let disk = MemoryDisk::default();
        disk.record_crashes();
        let group = start(&disk).await;
        group.propose(register(2)).await.unwrap();
        for round in 0..30 {
            group.propose(create(&format!("t-{round}"))).await.unwrap();
        }
        group.shutdown().await;
        let crashed = disk.crashes().into_iter().find(|content| content.snapshot.is_some()).expect("a snapshot");
        let first = start(&MemoryDisk::with(crashed.clone())).await;
        let (versions, topics) = (first.image().version, first.image().topics.len());
        first.shutdown().await;
        assert_eq!(versions, topics as u64 + 1, "each topic is one change, and the node one");

        let again = MemoryDisk::with(crashed);
        for _ in 0..3 {
            let group = start(&again).await;
            assert_eq!(group.image().version, versions);
            group.shutdown().await;
        }
    });
}

#[test]
fn votes_only_grow_over_restarts() {
    run(async {
        let disk = MemoryDisk::default();
        let mut terms = Vec::new();
        for _ in 0..4 {
            let group = start(&disk).await;
            group.propose(register(1)).await.unwrap();
            terms.push(group.term());
            group.shutdown().await;
        }
        assert!(terms.is_sorted_by(|a, b| a < b), "a term was led twice: {terms:?}");
    });
}

async fn disk_with_snapshot() -> Content {
    let disk = MemoryDisk::default();
    let group = start(&disk).await;
    group.propose(register(2)).await.unwrap();
    for round in 0..50 {
        group.propose(create(&format!("t-{round}"))).await.unwrap();
    }
    group.shutdown().await;
    disk.content()
}

#[test]
fn damage_is_an_error_at_the_start() {
    run(async {
        let good = disk_with_snapshot().await;
        let start = async |content: Content| {
            start_error(MetadataGroup::start(config(), Rc::new(MemoryDisk::with(content))).await)
        };

        let mut damaged = good.clone();
        damaged.snapshot.as_mut().unwrap()[40] ^= 1;
        assert!(matches!(start(damaged).await, StartError::Snapshot(SnapshotError::Checksum { .. })));

        let mut cut = good.clone();
        cut.snapshot.as_mut().unwrap().truncate(30);
        assert!(matches!(start(cut).await, StartError::Snapshot(SnapshotError::Checksum { .. })));

        let gone = Content { snapshot: None, ..good.clone() };
        assert!(matches!(start(gone).await, StartError::SnapshotMissing { snapshot: None, .. }));

        let mut hole = good.clone();
        let last_entry = hole.records.len() - 2;
        hole.records.retain(|(number, record)| record[1] != 0 || *number % 3 != 0);
        assert!(hole.records.len() < last_entry + 2);
        assert!(matches!(start(hole).await, StartError::Replay(_)));

        let mut garbage = good;
        garbage.records.last_mut().unwrap().1 = vec![1, 200, 200];
        assert!(matches!(start(garbage).await, StartError::Replay(_)));
    });
}

#[test]
fn another_nodes_metadata_is_refused() {
    run(async {
        let disk = MemoryDisk::with(disk_with_snapshot().await);
        let config = GroupConfig { node: NodeId(2), ..config() };
        let error = start_error(MetadataGroup::start(config, Rc::new(disk)).await);
        assert!(matches!(error, StartError::OtherNode { node: NodeId(2), .. }), "{error}");
    });
}

#[test]
fn a_failed_write_stops_the_group_and_acknowledges_nothing() {
    run(async {
        for changes in 0..6 {
            let disk = MemoryDisk::default();
            let group = start(&disk).await;
            group.propose(register(1)).await.unwrap();
            disk.fail_after(changes);
            let mut acknowledged = 0;
            let error = loop {
                match group.propose(create(&format!("t-{acknowledged}"))).await {
                    Ok(_) => acknowledged += 1,
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, ProposeError::Failed(_)), "{error}");
            assert_eq!(error.code(), ErrorCode::Internal);
            let failed = group.failed().await;
            assert!(failed.reason.contains("told to fail"), "{failed}");
            group.shutdown().await;

            let group = start(&MemoryDisk::with(disk.content())).await;
            assert!(acknowledged <= group.image().topics.len());
            group.shutdown().await;
        }
    });
}
