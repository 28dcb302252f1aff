//! Topics that delete what every subscription has passed, on a real node: how far, what stays, and after a kill.

mod common;

use std::time::Duration;

use common::{Node, NodeOptions, Wire, batch_of, wait_until};
use drava_protocol::ErrorCode;
use drava_protocol::batch::Seal;
use drava_protocol::message::{
    Ack, CloseConsumer, DeleteSubscription, DescribePartition, Fetch, PartitionState, Place, Subscribe, Subscribed,
    TopicPolicy,
};

const LEDGER_BYTES: u64 = 256 << 10;
const PAYLOAD_BYTES: usize = 50_000;
/// Batches that a ledger has place for.
const LEDGER_MESSAGES: u64 = LEDGER_BYTES / (PAYLOAD_BYTES as u64 + 100);
const MESSAGES: u64 = 60;

fn consumed() -> TopicPolicy {
    TopicPolicy { trim_consumed: true, ..TopicPolicy::default() }
}

fn options(dir: &tempfile::TempDir) -> NodeOptions {
    let mut options = NodeOptions::new(dir.path()).with("DRAVA_STORAGE_LEDGER_BYTES_MAX", LEDGER_BYTES);
    options.shards = 1;
    options
}

/// A topic of one partition, over a connection of its own.
struct Topic {
    name: &'static str,
    partition: u64,
    wire: Wire,
    consumers: u32,
}

impl Topic {
    fn create(node: &Node, name: &'static str, policy: TopicPolicy) -> Topic {
        let partition = node.connect().topic(name, policy).partitions[0].partition;
        Topic { name, partition, wire: node.connect(), consumers: 0 }
    }

    fn create_full(node: &Node, name: &'static str, policy: TopicPolicy) -> Topic {
        let mut topic = Topic::create(node, name, policy);
        topic.fill();
        topic
    }

    fn fill(&mut self) {
        for number in 0..MESSAGES {
            assert_eq!(self.publish(number as u8), number);
        }
    }

    fn publish(&mut self, byte: u8) -> u64 {
        self.wire.publish(self.partition, &batch_of(&Seal::default(), &[[byte; PAYLOAD_BYTES]])).base_offset
    }

    fn subscribe(&mut self, name: &str) -> Subscribed {
        self.consumers += 1;
        let (partition, consumer) = (self.partition, self.consumers);
        let subscription = name.to_owned();
        let subscribe = Subscribe { partition, consumer, subscription, start: Place::Earliest, take_over: true };
        expect!(self.wire.call(&subscribe).unwrap(), Subscribed)
    }

    /// Attaches a consumer, moves the cursor durably, and lets go.
    fn ack(&mut self, subscription: &str, offset: u64) {
        self.subscribe(subscription);
        let consumer = self.consumers;
        expect!(self.wire.call(&Ack { consumer, offset }).unwrap(), Done);
        expect!(self.wire.call(&CloseConsumer { consumer }).unwrap(), Done);
    }

    fn state(&mut self) -> PartitionState {
        expect!(self.wire.call(&DescribePartition { partition: self.partition }).unwrap(), PartitionState)
    }

    fn cursors(&mut self) -> Vec<(String, u64)> {
        self.state().subscriptions.into_iter().map(|cursor| (cursor.name, cursor.offset)).collect()
    }

    /// Waits until everything below `offset` is deleted, and sees the rest whole.
    fn starts_at(&mut self, offset: u64) {
        let name = self.name;
        wait_until(&format!("{name} starts at {offset}"), || {
            let start_offset = self.state().start_offset;
            assert!(start_offset <= offset, "{name} has lost what is kept up to {offset}: it starts at {start_offset}");
            start_offset == offset
        });
        let read = self.wire.read_all(self.partition, offset);
        assert!(read.keys().copied().eq(offset..self.state().end_offset), "{name} keeps {:?}", read.keys());
        for (at, payload) in read {
            assert!(payload == [at as u8; PAYLOAD_BYTES], "{name} has changed offset {at}");
        }
    }
}

/// The start of the ledger that holds `offset`.
fn ledger_start(offset: u64) -> u64 {
    offset / LEDGER_MESSAGES * LEDGER_MESSAGES
}

#[test]
fn messages_go_when_every_subscription_has_passed_their_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&options(&dir));
    let mut trimmed = Topic::create_full(&node, "trimmed", consumed());
    let mut kept = Topic::create_full(&node, "kept", TopicPolicy::default());
    let mut unread = Topic::create_full(&node, "unread", consumed());
    let stored_bytes = trimmed.state().stored_bytes;

    for topic in [&mut trimmed, &mut kept] {
        topic.subscribe("slow");
        topic.ack("fast", MESSAGES);
    }
    // The slow one holds everything, with the fast one at the end. A later deletion shows that there was time for it.
    let mut passed = Topic::create_full(&node, "passed", consumed());
    passed.ack("only", MESSAGES - 1);
    passed.starts_at(ledger_start(MESSAGES - 1));
    assert_eq!(trimmed.state().start_offset, 0);
    let live_bytes = node.metric("drava_store_live_bytes");
    for topic in [&mut trimmed, &mut kept] {
        topic.ack("slow", 23);
    }
    let start = ledger_start(23);
    assert!(0 < start && start < 23, "the cursor is within a ledger");
    trimmed.starts_at(start);
    let left_bytes = trimmed.state().stored_bytes;
    assert_eq!(left_bytes, stored_bytes / MESSAGES * (MESSAGES - start));
    wait_until("the room is given back", || {
        node.metric("drava_store_live_bytes") <= live_bytes - (stored_bytes - left_bytes) as f64
    });
    // What is gone is gone for whoever comes now.
    let fetch = Fetch { partition: trimmed.partition, offset: start - 1, bytes_max: 1, wait_ms: 0 };
    assert_eq!(trimmed.wire.call(&fetch).unwrap().code(), ErrorCode::OffsetOutOfRange);
    assert_eq!(trimmed.subscribe("new").offset, start);
    trimmed.ack("new", start);
    // Without it nothing goes, and without a subscription neither.
    kept.starts_at(0);
    unread.starts_at(0);

    // A kill changes nothing of this.
    node.kill();
    let node = Node::start(&options(&dir));
    for topic in [&mut trimmed, &mut kept, &mut unread] {
        topic.wire = node.connect();
    }
    assert_eq!(
        trimmed.cursors(),
        [("fast", MESSAGES), ("new", start), ("slow", 23)].map(|(name, at)| (name.to_owned(), at))
    );
    trimmed.starts_at(start);
    trimmed.ack("new", MESSAGES);
    trimmed.ack("slow", 41);
    trimmed.starts_at(ledger_start(41));
    // The last ledger was closed by the kill, so that nothing is left; offsets go on.
    trimmed.ack("slow", MESSAGES);
    trimmed.starts_at(MESSAGES);
    assert_eq!(trimmed.state().stored_bytes, 0);
    assert_eq!(trimmed.publish(MESSAGES as u8), MESSAGES);
    trimmed.starts_at(MESSAGES);
    kept.ack("slow", MESSAGES);
    unread.ack("first", MESSAGES);
    unread.starts_at(MESSAGES);
    kept.starts_at(0);
    assert!(node.stop().success());
}

#[test]
fn no_limit_passes_a_cursor_that_is_behind() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&options(&dir));
    let limited = TopicPolicy { retention_ms: 1, retention_bytes: 1, ..TopicPolicy::default() };
    let both = TopicPolicy { trim_consumed: true, ..limited.clone() };
    let mut topics = [Topic::create(&node, "limited", limited), Topic::create(&node, "both", both)];
    for topic in &mut topics {
        topic.subscribe("stalled");
        topic.subscribe("reads");
        topic.fill();
        topic.ack("reads", 23);
    }
    // With so short a retention a ledger ends with its first second, and then nothing but the cursor holds it.
    std::thread::sleep(Duration::from_millis(1500));
    for topic in &mut topics {
        topic.starts_at(0);
        let subscription = "stalled".to_owned();
        let delete = DeleteSubscription { partition: topic.partition, subscription };
        expect!(topic.wire.call(&delete).unwrap(), Done);
        wait_until("the next cursor is the limit", || 0 < topic.state().start_offset);
        assert!(topic.state().start_offset <= 23);
        let delete = DeleteSubscription { partition: topic.partition, subscription: "reads".to_owned() };
        expect!(topic.wire.call(&delete).unwrap(), Done);
        wait_until("age and size are the only limits", || topic.state().start_offset == MESSAGES);
    }
    assert!(node.stop().success());
}
