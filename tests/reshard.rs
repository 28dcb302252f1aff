//! A node that is started with another number of shards: everything goes on where it was.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Node, NodeOptions, Random, batch_of, wait_until};
use drava_protocol::batch::Seal;
use drava_protocol::message::{Ack, DeleteTopic, DescribePartition, Place, Subscribe, TopicPolicy};

const PARTITIONS: u32 = 7;
const PRODUCER: u64 = 77;
const TOPICS: [&str; 2] = ["first", "second"];

/// Of one partition: its sequence, its records, its first offset.
type LastBatch = (u64, Vec<Vec<u8>>, u64);

/// What was acknowledged, over all starts.
#[derive(Default)]
struct Expected {
    /// By topic and index of the partition, by offset.
    messages: BTreeMap<(usize, usize), BTreeMap<u64, Vec<u8>>>,
    last: BTreeMap<(usize, usize), LastBatch>,
    cursors: BTreeMap<(usize, usize), u64>,
}

fn policy() -> TopicPolicy {
    TopicPolicy { partitions: PARTITIONS, ..TopicPolicy::default() }
}

fn options(dir: &Path, shards: u16) -> NodeOptions {
    NodeOptions { shards, ..NodeOptions::new(dir) }.with("DRAVA_STORAGE_CACHE_BYTES", 1 << 20)
}

impl Expected {
    /// Everything that was acknowledged is there; a producer's last batch is a duplicate; subscriptions are where they
    /// were.
    fn check(&self, node: &Node, shards: usize) {
        for (topic_index, name) in TOPICS.iter().enumerate() {
            let topic = node.connect().lookup(name);
            for (index, place) in topic.partitions.iter().enumerate() {
                let at = (topic_index, index);
                assert!(usize::from(place.shard) < shards && node.shards[usize::from(place.shard)] == place.port);
                let mut wire = node.connect_owner(&topic, index);
                let stored = wire.read_all(place.partition, 0);
                assert!(stored == self.messages[&at], "{name} {index} with {shards} shards has other messages");
                let (sequence, records, offset) = &self.last[&at];
                let seal = Seal { producer: PRODUCER, base_sequence: *sequence, ..Seal::default() };
                let again = wire.publish(place.partition, &batch_of(&seal, records));
                assert_eq!((again.base_offset, again.duplicate), (*offset, true), "{name} {index}");
                let state =
                    expect!(wire.call(&DescribePartition { partition: place.partition }).unwrap(), PartitionState);
                let cursors: Vec<(String, u64)> =
                    state.subscriptions.into_iter().map(|found| (found.name, found.offset)).collect();
                assert_eq!(cursors, [("s".to_owned(), self.cursors[&at])], "{name} {index}");
            }
        }
    }

    /// Publishes to every partition in the same sequences, and moves its subscription.
    fn publish(&mut self, node: &Node, random: &mut Random) {
        for (topic_index, name) in TOPICS.iter().enumerate() {
            let topic = node.connect().topic(name, policy());
            for (index, place) in topic.partitions.iter().enumerate() {
                let at = (topic_index, index);
                let mut wire = node.connect_owner(&topic, index);
                for _ in 0..10 {
                    let sequence =
                        self.last.get(&at).map_or(0, |(sequence, records, _)| sequence + records.len() as u64);
                    let count = 1 + random.below(5);
                    let records: Vec<Vec<u8>> = (0..count).map(|_| random.bytes(2000)).collect();
                    let seal = Seal { producer: PRODUCER, base_sequence: sequence, ..Seal::default() };
                    let published = wire.publish(place.partition, &batch_of(&seal, &records));
                    let messages = self.messages.entry(at).or_default();
                    assert_eq!((published.base_offset, published.duplicate), (messages.len() as u64, false));
                    messages.extend((published.base_offset..).zip(records.iter().cloned()));
                    self.last.insert(at, (sequence, records, published.base_offset));
                }
                let (partition, subscription) = (place.partition, "s".to_owned());
                let start = Place::Earliest;
                let subscribe = Subscribe { partition, consumer: 1, subscription, start, take_over: true };
                expect!(wire.call(&subscribe).unwrap(), Subscribed);
                let offset = self.messages[&at].len() as u64 - 3;
                expect!(wire.call(&Ack { consumer: 1, offset }).unwrap(), Done);
                self.cursors.insert(at, offset);
            }
        }
    }

    fn wait_for_cursors(&self, node: &Node) {
        let topics: Vec<_> = TOPICS.iter().map(|name| node.connect().lookup(name)).collect();
        for (&(topic, index), offset) in &self.cursors {
            let mut wire = node.connect_owner(&topics[topic], index);
            let partition = topics[topic].partitions[index].partition;
            let state = expect!(wire.call(&DescribePartition { partition }).unwrap(), PartitionState);
            assert_eq!(state.subscriptions[0].offset, *offset);
        }
        // Cursors are saved at an interval.
        std::thread::sleep(Duration::from_millis(400));
    }
}

fn stores(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> =
        entries.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("shard-")).collect();
    found.sort();
    found
}

#[test]
fn a_node_goes_on_with_any_number_of_shards() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected = Expected::default();
    let mut random = Random(5);
    let mut made = 0;
    for (round, shards) in [2, 4, 1, 3, 3, 8, 2].into_iter().enumerate() {
        let node = Node::start(&options(dir.path(), shards));
        made += if round == 4 { 0 } else { usize::from(shards) };
        if round != 0 {
            expected.check(&node, usize::from(shards));
            assert!(0.0 < node.metric("drava_store_foreign_live_bytes"));
        }
        assert!(stores(dir.path()).len() <= made);
        expected.publish(&node, &mut random);
        if round == 4 {
            expected.check(&node, usize::from(shards));
        }
        // In order now and then; most of the time the journals end in the middle.
        if round % 3 == 2 {
            assert!(node.stop().success());
        } else {
            expected.wait_for_cursors(&node);
            node.kill();
        }
    }
    // What was replayed by a start that was killed before it wrote anything is known to the next all the same.
    for shards in [5, 2] {
        Node::start(&options(dir.path(), shards)).kill();
    }
    let node = Node::start(&options(dir.path(), 2));
    expected.check(&node, 2);

    // With the messages the old stores go.
    for name in TOPICS {
        expect!(node.connect().call(&DeleteTopic { name: name.to_owned() }).unwrap(), Done);
    }
    assert!(node.stop().success());
    let node = Node::start(&options(dir.path(), 2));
    assert_eq!(stores(dir.path()).len(), 2, "those of the two shards");
    assert_eq!(node.metric("drava_store_foreign_live_bytes"), 0.0);
    node.assert_serves();
}

#[test]
fn a_directory_of_format_1_opens_with_another_number_of_shards() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected = Expected::default();
    let node = Node::start(&options(dir.path(), 2));
    expected.publish(&node, &mut Random(6));
    expected.wait_for_cursors(&node);
    node.kill();
    let file = dir.path().join("format.json");
    let format: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(format["stores"], serde_json::json!([0, 1]));
    let (node, incarnation) = (&format["node"], &format["incarnation"]);
    let old = serde_json::json!({"format": 1, "node": node, "incarnation": incarnation, "shards": 2});
    std::fs::write(&file, old.to_string()).unwrap();
    let node = Node::start(&options(dir.path(), 3));
    expected.check(&node, 3);
    node.kill();
    let node = Node::start(&options(dir.path(), 3));
    expected.check(&node, 3);
    wait_until("the node serves", || node.http_get("/readyz").0 == 200);
}

#[test]
fn a_lost_index_is_made_anew_while_old_stores_are_read_through_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected = Expected::default();
    let mut random = Random(7);
    let node = Node::start(&options(dir.path(), 1));
    expected.publish(&node, &mut random);
    assert!(node.stop().success());
    assert!(Node::start(&options(dir.path(), 2)).stop().success());
    // At once, and again with messages in the new stores too.
    for _ in 0..2 {
        std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        let node = Node::start(&options(dir.path(), 2));
        expected.check(&node, 2);
        assert!(0.0 < node.metric("drava_store_foreign_live_bytes"));
        expected.publish(&node, &mut random);
        expected.wait_for_cursors(&node);
        node.kill();
    }
    // Lost, and started with another number of shards.
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let node = Node::start(&options(dir.path(), 3));
    expected.check(&node, 3);
    assert!(stores(dir.path()).iter().any(|path| path.ends_with("shard-000")), "messages of the first start lie there");
}
