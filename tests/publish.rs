//! Publishing and reading back through a real node.

mod common;

use common::{Node, NodeOptions, Wire, batch_of};
use drava_protocol::ErrorCode;
use drava_protocol::batch::Seal;
use drava_protocol::message::{
    Ack, DeleteTopic, DescribePartition, Durability, Fetch, Flow, Kind, Locate, Lookup, OpenProducer, Place, Publish,
    Seek, Subscribe, TopicPolicy,
};

fn policy(partitions: u32) -> TopicPolicy {
    TopicPolicy { partitions, ..TopicPolicy::default() }
}

#[test]
fn what_was_published_is_read_back_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("orders", policy(1));
    assert_eq!(topic.name, "/public/default/orders");
    let partition = topic.partitions[0].partition;
    let mut wire = node.connect_owner(&topic, 0);
    let mut expected = Vec::new();
    for i in 0..50u64 {
        let payloads: Vec<Vec<u8>> = (0..i % 7 + 1).map(|j| format!("message {i}.{j}").into_bytes()).collect();
        let published = wire.publish(partition, &batch_of(&Seal::default(), &payloads));
        assert_eq!(published.base_offset, expected.len() as u64);
        assert!(!published.duplicate);
        expected.extend(payloads);
    }
    let read: Vec<_> = wire.read_all(partition, 0).into_values().collect();
    assert_eq!(read, expected);
    // From the middle of a batch on.
    let read: Vec<_> = wire.read_all(partition, 10).into_values().collect();
    assert_eq!(read, expected[10..]);
}

#[test]
fn acknowledged_messages_survive_kill_and_offsets_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path());
    let mut expected = Vec::new();
    for round in 0..3u64 {
        let node = Node::start(&options);
        let topic = node.connect().topic("orders", policy(1));
        let partition = topic.partitions[0].partition;
        let mut wire = node.connect_owner(&topic, 0);
        assert_eq!(wire.read_all(partition, 0).into_values().collect::<Vec<_>>(), expected);
        for i in 0..20u64 {
            let payload = format!("round {round} message {i}").into_bytes();
            let published = wire.publish(partition, &batch_of(&Seal::default(), &[&payload]));
            assert_eq!(published.base_offset, expected.len() as u64);
            expected.push(payload);
        }
        if round == 1 {
            assert!(node.stop().success());
        } else {
            node.kill();
        }
    }
}

#[test]
fn a_repeated_batch_is_appended_once_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path());
    let first = Seal { producer: 77, base_sequence: 0, ..Seal::default() };
    let second = Seal { producer: 77, base_sequence: 2, ..Seal::default() };
    let partition;
    {
        let node = Node::start(&options);
        let topic = node.connect().topic("orders", policy(1));
        partition = topic.partitions[0].partition;
        let mut wire = node.connect_owner(&topic, 0);
        assert_eq!(wire.publish(partition, &batch_of(&first, &["a", "b"])).base_offset, 0);
        assert_eq!(wire.publish(partition, &batch_of(&second, &["c"])).base_offset, 2);
        let again = wire.publish(partition, &batch_of(&first, &["a", "b"]));
        assert_eq!((again.base_offset, again.duplicate), (0, true));
        // Both copies in flight at once: one is appended, both are answered.
        let third = batch_of(&Seal { producer: 77, base_sequence: 3, ..Seal::default() }, &["d"]);
        wire.send(&Publish { partition }, &third).unwrap();
        wire.send(&Publish { partition }, &third).unwrap();
        let mut answers: Vec<_> = (0..2).map(|_| expect!(wire.receive().unwrap(), Published)).collect();
        answers.sort_by_key(|answer| answer.duplicate);
        assert_eq!((answers[0].base_offset, answers[0].duplicate), (3, false));
        assert_eq!((answers[1].base_offset, answers[1].duplicate), (3, true));
        node.kill();
    }
    for _ in 0..2 {
        let node = Node::start(&options);
        let topic = node.connect().lookup("orders");
        let mut wire = node.connect_owner(&topic, 0);
        let again = wire.publish(partition, &batch_of(&second, &["c"]));
        assert_eq!((again.base_offset, again.duplicate), (2, true));
        let gap = Seal { producer: 77, base_sequence: 9, ..Seal::default() };
        let refused = wire.call_with(&Publish { partition }, &batch_of(&gap, &["x"])).unwrap();
        assert_eq!(refused.code(), ErrorCode::SequenceGap);
        assert_eq!(wire.read_all(partition, 0).len(), 4);
        assert!(node.stop().success());
    }
}

#[test]
fn a_producer_that_was_opened_again_fences_its_former_self() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path());
    let node = Node::start(&options);
    let topic = node.connect().topic("orders", policy(1));
    let partition = topic.partitions[0].partition;
    let mut wire = node.connect_owner(&topic, 0);
    let opened = expect!(wire.call(&OpenProducer { partition, producer: 5 }).unwrap(), ProducerOpened);
    assert_eq!(opened.next_sequence, 0);
    let seal = |epoch, base_sequence| Seal { producer: 5, producer_epoch: epoch, base_sequence, ..Seal::default() };
    wire.publish(partition, &batch_of(&seal(opened.epoch, 0), &["a"]));
    node.kill();

    let node = Node::start(&options);
    let topic = node.connect().lookup("orders");
    let mut wire = node.connect_owner(&topic, 0);
    let again = expect!(wire.call(&OpenProducer { partition, producer: 5 }).unwrap(), ProducerOpened);
    assert!(opened.epoch < again.epoch);
    assert_eq!(again.next_sequence, 1);
    let refused = wire.call_with(&Publish { partition }, &batch_of(&seal(opened.epoch, 1), &["b"])).unwrap();
    assert_eq!(refused.code(), ErrorCode::ProducerFenced);
    wire.publish(partition, &batch_of(&seal(again.epoch, 1), &["b"]));
}

#[test]
fn a_request_on_the_wrong_core_is_forwarded_and_the_answer_names_the_right_port() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("orders", policy(2));
    let place = &topic.partitions[1];
    let wrong = topic.partitions[0].port;
    assert_ne!(place.port, wrong, "the partitions of a topic are spread over the shards");
    let mut wire = Wire::connect(std::net::SocketAddr::new(node.listen.ip(), wrong)).unwrap();
    let publish = Publish { partition: place.partition };
    let answer = wire.call_with(&publish, &batch_of(&Seal::default(), &["over the mesh"])).unwrap();
    assert_eq!(answer.owner_port, place.port);
    assert_eq!(expect!(answer, Published).base_offset, 0);
    assert_eq!(wire.read_all(place.partition, 0)[&0], b"over the mesh");
    // A subscription is bound to the owning core: it is not forwarded, and told where to go.
    let subscribe = Subscribe {
        partition: place.partition,
        consumer: 1,
        subscription: "s".to_owned(),
        start: Place::Earliest,
        take_over: false,
    };
    let answer = wire.call(&subscribe).unwrap();
    assert_eq!((answer.code(), answer.owner_port), (ErrorCode::WrongOwner, place.port));
}

#[test]
fn a_cursor_survives_kill_when_its_ack_was_answered_and_a_burst_is_saved_at_shutdown() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path());
    let subscribe = |partition| Subscribe {
        partition,
        consumer: 9,
        subscription: "billing".to_owned(),
        start: Place::Earliest,
        take_over: false,
    };
    let partition;
    {
        let node = Node::start(&options);
        let topic = node.connect().topic("orders", policy(1));
        partition = topic.partitions[0].partition;
        let mut wire = node.connect_owner(&topic, 0);
        for i in 0..10 {
            wire.publish(partition, &batch_of(&Seal::default(), &[format!("{i}")]));
        }
        assert_eq!(expect!(wire.call(&subscribe(partition)).unwrap(), Subscribed).offset, 0);
        wire.send(&Flow { consumer: 9, bytes: 1 << 20 }, &[]).unwrap();
        let mut delivered = Vec::new();
        while delivered.len() < 10 {
            let push = wire.receive().unwrap();
            assert_eq!(push.kind, Kind::Deliver);
            delivered.extend(common::records_of(&push.payload).into_iter().map(|(offset, _)| offset));
        }
        assert_eq!(delivered, (0..10).collect::<Vec<_>>());
        expect!(wire.call(&Ack { consumer: 9, offset: 4 }).unwrap(), Done);
        node.kill();
    }
    {
        let node = Node::start(&options);
        let topic = node.connect().lookup("orders");
        let mut wire = node.connect_owner(&topic, 0);
        assert_eq!(expect!(wire.call(&subscribe(partition)).unwrap(), Subscribed).offset, 4);
        // Nobody waits for these; the shutdown must save the last of them.
        for offset in [5, 6, 7] {
            let ack = Ack { consumer: 9, offset };
            let mut out = Vec::new();
            drava_protocol::frame::encode(&ack, 0, 0, 0, &mut out);
            std::io::Write::write_all(&mut wire.stream, &out).unwrap();
        }
        let state = expect!(wire.call(&DescribePartition { partition }).unwrap(), PartitionState);
        assert_eq!(state.subscriptions[0].offset, 7);
        assert!(node.stop().success());
    }
    let node = Node::start(&options);
    let topic = node.connect().lookup("orders");
    let mut wire = node.connect_owner(&topic, 0);
    assert_eq!(expect!(wire.call(&subscribe(partition)).unwrap(), Subscribed).offset, 7);
}

#[test]
fn a_long_poll_is_answered_when_a_message_comes() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("orders", policy(1));
    let partition = topic.partitions[0].partition;
    let mut reader = node.connect_owner(&topic, 0);
    let mut writer = node.connect_owner(&topic, 0);
    reader.send(&Fetch { partition, offset: 0, bytes_max: 1 << 20, wait_ms: 50_000 }, &[]).unwrap();
    writer.publish(partition, &batch_of(&Seal::default(), &["now"]));
    let answer = reader.receive().unwrap();
    assert_eq!(common::records_of(&answer.payload), [(0, b"now".to_vec())]);
    // Without a message it ends with what there is: nothing.
    let answer = reader.call(&Fetch { partition, offset: 1, bytes_max: 1 << 20, wait_ms: 20 }).unwrap();
    assert!(answer.payload.is_empty());
    assert_eq!(expect!(answer, Fetched).next_offset, 1);
}

#[test]
fn places_resolve_to_offsets() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("orders", policy(1));
    let partition = topic.partitions[0].partition;
    let mut wire = node.connect_owner(&topic, 0);
    for i in 0..5 {
        wire.publish(partition, &batch_of(&Seal::default(), &[format!("{i}")]));
    }
    let mut locate = |place| expect!(wire.call(&Locate { partition, place }).unwrap(), Located).offset;
    assert_eq!(locate(Place::Earliest), 0);
    assert_eq!(locate(Place::Latest), 5);
    assert_eq!(locate(Place::Time(0)), 0);
    assert_eq!(locate(Place::Time(u64::MAX)), 5);
}

#[test]
fn memory_durability_is_answered_and_readable() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("fast", TopicPolicy { durability: Durability::Memory, ..policy(1) });
    let partition = topic.partitions[0].partition;
    let mut wire = node.connect_owner(&topic, 0);
    for i in 0..100u64 {
        assert_eq!(wire.publish(partition, &batch_of(&Seal::default(), &[format!("{i}")])).base_offset, i);
    }
    let fetch = Fetch { partition, offset: 99, bytes_max: 1 << 20, wait_ms: 50_000 };
    assert_eq!(common::records_of(&wire.call(&fetch).unwrap().payload), [(99, b"99".to_vec())]);
}

#[test]
fn a_deleted_topic_is_gone_and_its_name_starts_anew() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path());
    let first;
    {
        let node = Node::start(&options);
        let topic = node.connect().topic("orders", policy(1));
        first = topic.partitions[0].partition;
        node.connect_owner(&topic, 0).publish(first, &batch_of(&Seal::default(), &["old"]));
        let mut wire = node.connect();
        expect!(wire.call(&DeleteTopic { name: "orders".to_owned() }).unwrap(), Done);
        let gone = wire.call(&Lookup { name: "orders".to_owned() }).unwrap();
        assert_eq!(gone.code(), ErrorCode::UnknownTopic);
        let refused = wire.call_with(&Publish { partition: first }, &batch_of(&Seal::default(), &["x"])).unwrap();
        assert_eq!(refused.code(), ErrorCode::UnknownPartition);
        node.kill();
    }
    let node = Node::start(&options);
    let topic = node.connect().topic("orders", policy(1));
    assert_ne!(topic.partitions[0].partition, first, "partition ids are never used again");
    assert!(node.connect_owner(&topic, 0).read_all(topic.partitions[0].partition, 0).is_empty());
}

#[test]
fn a_seek_is_answered_with_its_place_before_anything_from_there_is_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("orders", policy(1));
    let partition = topic.partitions[0].partition;
    let mut wire = node.connect_owner(&topic, 0);
    for i in 0..10 {
        wire.publish(partition, &batch_of(&Seal::default(), &[format!("{i}")]));
    }
    let subscription = "billing".to_owned();
    let subscribe = Subscribe { partition, consumer: 9, subscription, start: Place::Latest, take_over: false };
    assert_eq!(expect!(wire.call(&subscribe).unwrap(), Subscribed).offset, 10);
    wire.send(&Flow { consumer: 9, bytes: 1 << 20 }, &[]).unwrap();
    for (place, offset) in [(Place::Earliest, 0), (Place::Offset(7), 7)] {
        wire.send(&Seek { consumer: 9, place }, &[]).unwrap();
        let located = expect!(wire.receive().unwrap(), Located);
        assert_eq!((located.offset, located.start_offset, located.end_offset), (offset, 0, 10));
        let mut delivered = Vec::new();
        while delivered.last() != Some(&9) {
            let push = wire.receive().unwrap();
            assert_eq!(push.kind, Kind::Deliver);
            delivered.extend(common::records_of(&push.payload).into_iter().map(|(offset, _)| offset));
        }
        assert_eq!(delivered, (offset..10).collect::<Vec<_>>());
    }
}
