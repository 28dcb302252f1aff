//! A small disk that fills up: publishing is refused with a time to come back, all else goes on, and publishing resumes by
//! itself when there is room. Nothing acknowledged is lost on the way.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::disk::{Disk, skipped};
use common::{Node, NodeOptions, PATIENCE, Received, Wire, batch_of, wait_until};
use drava_protocol::ErrorCode;
use drava_protocol::batch::Seal;
use drava_protocol::message::{
    Ack, DeleteTopic, DescribePartition, Fetch, Kind, Place, Publish, Subscribe, Topic, TopicPolicy,
};

const DISK_BYTES: u64 = 320 << 20;
const RESERVE_BYTES: u64 = 96 << 20;
const SEGMENT_BYTES: u64 = 8 << 20;
const PAYLOAD_BYTES: usize = 60_000;
const BLOCK_BYTES: u64 = 4096;

/// A node on a small disk of its own, with some messages in a topic. `None`: no such disk can be made here.
fn start(dir: &Path) -> Option<(Disk, NodeOptions, Node, Writer)> {
    let disk = match Disk::make(&dir.join("disk.img"), &dir.join("disk"), DISK_BYTES) {
        Ok(disk) => disk,
        Err(reason) => {
            skipped(&reason);
            return None;
        }
    };
    let mut options = NodeOptions::new(&disk.mount.join("data"))
        .with("DRAVA_STORAGE_SEGMENT_BYTES", SEGMENT_BYTES)
        .with("DRAVA_STORAGE_DISK_RESERVE_BYTES", RESERVE_BYTES)
        .with("DRAVA_STORAGE_INDEX_FLUSH_BYTES", 4 << 20);
    options.shards = 1;
    let node = Node::start(&options);
    let mut kept = Writer::new(&node, "kept", TopicPolicy::default());
    for _ in 0..300 {
        kept.publish().unwrap();
    }
    Some((disk, options, node, kept))
}

/// kill -9, and a start with the writers on the new node.
fn restart<const N: usize>(node: Node, options: &NodeOptions, writers: [&mut Writer; N]) -> Node {
    node.kill();
    let node = Node::start(options);
    for writer in writers {
        writer.topic = node.connect().lookup(&writer.topic.name);
        writer.wire = node.connect_owner(&writer.topic, 0);
    }
    node
}

/// A topic of one partition, and all that was acknowledged on it.
struct Writer {
    topic: Topic,
    wire: Wire,
    acked: BTreeMap<u64, Vec<u8>>,
    /// Messages that were answered with a failed write: they are stored, or not.
    unknown: usize,
}

impl Writer {
    fn new(node: &Node, name: &str, policy: TopicPolicy) -> Writer {
        let topic = node.connect().topic(name, policy);
        let wire = node.connect_owner(&topic, 0);
        Writer { topic, wire, acked: BTreeMap::new(), unknown: 0 }
    }

    fn partition(&self) -> u64 {
        self.topic.partitions[0].partition
    }

    /// Publishes one message; the refusal, if there is one.
    fn publish(&mut self) -> Result<(), Received> {
        let number = self.acked.len();
        let mut payload = format!("{}:{number}:", self.topic.name).into_bytes();
        payload.resize(PAYLOAD_BYTES, number as u8);
        let publish = Publish { partition: self.partition() };
        let answer = self.wire.call_with(&publish, &batch_of(&Seal::default(), &[&payload])).unwrap();
        if answer.kind == Kind::Error {
            self.unknown += usize::from(answer.code() == ErrorCode::StorageFailed);
            return Err(answer);
        }
        let offset = expect!(answer, Published).base_offset;
        assert!(self.acked.insert(offset, payload).is_none(), "offset {offset} was given twice");
        Ok(())
    }

    /// Publishes until the disk is full.
    fn fill(&mut self) {
        let before = self.acked.len();
        let refused = loop {
            match self.publish() {
                Ok(()) => assert!(self.acked.len() < 100_000, "the disk never fills"),
                Err(refused) => break refused,
            }
        };
        assert_full(&refused);
        println!("{}: full after {} more messages", self.topic.name, self.acked.len() - before);
    }

    fn resumes(&mut self) {
        let began = Instant::now();
        wait_until("publishing resumes by itself", || match self.publish() {
            Ok(()) => true,
            Err(refused) => {
                assert_full(&refused);
                false
            }
        });
        println!("{}: publishing resumed after {:?}", self.topic.name, began.elapsed());
    }

    fn assert_whole(&mut self) {
        let partition = self.partition();
        let read = self.wire.read_all(partition, 0);
        // Compared by hand: a failure should not print megabytes.
        let more = read.len() as i64 - self.acked.len() as i64;
        assert!((0..=self.unknown as i64).contains(&more), "{} has {more} messages more than it took", self.topic.name);
        for (offset, payload) in &self.acked {
            assert!(read.get(offset) == Some(payload), "{} lost or changed offset {offset}", self.topic.name);
        }
    }
}

fn assert_full(refused: &Received) {
    assert_eq!(refused.code(), ErrorCode::StorageFull, "{:?}", refused.error());
    assert!(0 < refused.error().retry_after_ms, "a full disk is refused with a time to come back");
}

/// Takes all room but `left` bytes, as a neighbour on the same disk would.
fn neighbour(disk: &Disk, left: u64) -> PathBuf {
    let path = disk.mount.join("neighbour");
    let file = std::fs::File::create(&path).unwrap();
    // In pieces that become smaller: the file system needs blocks of its own for a large one.
    let (mut taken, mut piece) = (0, DISK_BYTES);
    while BLOCK_BYTES <= piece {
        let bytes = piece.min(disk.free_bytes().saturating_sub(left));
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), taken, bytes.max(1)) {
            Ok(()) if bytes == 0 => break,
            Ok(()) => taken += bytes,
            Err(rustix::io::Errno::NOSPC) => piece /= 2,
            Err(error) => panic!("take the room: {error}"),
        }
    }
    path
}

#[test]
fn a_full_disk_refuses_publishing_alone_and_takes_it_up_again_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let Some((disk, options, node, mut kept)) = start(dir.path()) else { return };
    // A neighbour takes the room, with some of the reserve, and leaves again.
    let taken = neighbour(&disk, RESERVE_BYTES / 2);
    kept.fill();
    kept.assert_whole();
    // A start on a full disk serves, so that what fills it can be read and deleted.
    let node = restart(node, &options, [&mut kept]);
    kept.assert_whole();
    std::fs::remove_file(&taken).unwrap();
    kept.resumes();

    let mut deleted = Writer::new(&node, "deleted", TopicPolicy::default());
    deleted.fill();
    assert_full(&kept.publish().unwrap_err());
    assert!(RESERVE_BYTES / 2 <= disk.free_bytes(), "the reserve was used up: {} bytes free", disk.free_bytes());

    // Consuming goes on, from the disk too, and so does acknowledging.
    deleted.assert_whole();
    kept.assert_whole();
    acknowledge(&mut kept);

    let node = restart(node, &options, [&mut kept, &mut deleted]);
    deleted.assert_whole();
    assert_cursor(&mut kept);

    // A deleted topic gives its room back, and publishing resumes without anybody's help.
    expect!(node.connect().call(&DeleteTopic { name: "deleted".to_owned() }).unwrap(), Done);
    kept.resumes();

    // Retention gives room back as well: more than the disk holds goes through a topic that keeps little.
    let policy = TopicPolicy { retention_bytes: 24 << 20, ..TopicPolicy::default() };
    let mut passing = Writer::new(&node, "passing", policy);
    let deadline = Instant::now() + PATIENCE;
    while (passing.acked.len() as u64 * PAYLOAD_BYTES as u64) < 3 * DISK_BYTES / 2 {
        assert!(Instant::now() < deadline, "retention does not keep up: {} messages", passing.acked.len());
        if let Err(refused) = passing.publish() {
            assert_full(&refused);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    kept.assert_whole();

    let node = restart(node, &options, [&mut kept]);
    kept.assert_whole();
    assert_cursor(&mut kept);
    assert!(node.stop().success());
}

#[test]
fn a_disk_without_one_free_byte_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some((disk, options, node, mut kept)) = start(dir.path()) else { return };
    // What a neighbour takes is not the node's to keep: the reserve is gone as well, and what the node writes fails.
    let taken = neighbour(&disk, 0);
    // Long enough for the index to write its tables, which it cannot.
    let deadline = Instant::now() + Duration::from_secs(15);
    while Instant::now() < deadline {
        match kept.publish() {
            Ok(()) => {}
            // The metadata may notice first; whatever it is called, it is an answer.
            Err(refused) => {
                assert!([ErrorCode::StorageFull, ErrorCode::StorageFailed].contains(&refused.code()), "{refused:?}");
                std::thread::sleep(Duration::from_millis(500));
            }
        }
    }
    kept.assert_whole();
    // The index may have failed meanwhile: then the shard says so, and stays read-only until a start.
    std::fs::remove_file(&taken).unwrap();
    match kept.publish() {
        Ok(()) => println!("publishing resumed by itself"),
        Err(refused) if refused.code() == ErrorCode::StorageFull => kept.resumes(),
        Err(refused) => {
            assert_eq!(refused.code(), ErrorCode::StorageFailed, "{:?}", refused.error());
            println!("read-only until the next start");
        }
    }
    kept.assert_whole();
    let node = restart(node, &options, [&mut kept]);
    kept.assert_whole();
    kept.publish().unwrap();
    assert!(node.stop().success());
}

const SUBSCRIPTION: &str = "reader";
const CURSOR: u64 = 250;

/// Moves a cursor durably; the subscription begins with it.
fn acknowledge(writer: &mut Writer) {
    let (partition, subscription) = (writer.partition(), SUBSCRIPTION.to_owned());
    let subscribe = Subscribe { partition, consumer: 1, subscription, start: Place::Earliest, take_over: false };
    expect!(writer.wire.call(&subscribe).unwrap(), Subscribed);
    expect!(writer.wire.call(&Ack { consumer: 1, offset: CURSOR }).unwrap(), Done);
    let fetch = Fetch { partition, offset: CURSOR, bytes_max: 1, wait_ms: 0 };
    assert!(!writer.wire.call(&fetch).unwrap().payload.is_empty());
}

fn assert_cursor(writer: &mut Writer) {
    let partition = writer.partition();
    let state = expect!(writer.wire.call(&DescribePartition { partition }).unwrap(), PartitionState);
    assert_eq!(state.subscriptions.iter().map(|cursor| cursor.offset).collect::<Vec<_>>(), [CURSOR]);
}
