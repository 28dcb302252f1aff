//! Clients that break the rules, by mistake or on purpose: each gets a typed error or a bounded wait, and the node
//! serves everybody else meanwhile.

mod common;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{Node, NodeOptions, PATIENCE, Random, Received, Wire, batch_of, wait_until};
use drava_protocol::batch::{self, Seal};
use drava_protocol::frame::{self, BODY_BYTES_MAX, HEADER_BYTES, PAYLOAD_BYTES_MAX_DEFAULT};
use drava_protocol::message::{
    Ack, CachePolicy, CloseConsumer, CreateTopic, DeleteSubscription, DeleteTopic, DescribePartition, Fetch, Flow,
    Hello, Kind, ListTopics, Locate, Lookup, Message, OpenProducer, Ping, Place, Publish, Seek, Subscribe, Topic,
    TopicPolicy,
};
use drava_protocol::{ErrorCode, batch::RECORDS_MAX};

fn policy(partitions: u32) -> TopicPolicy {
    TopicPolicy { partitions, ..TopicPolicy::default() }
}

fn hello() -> Hello {
    Hello { version_min: frame::VERSION, version_max: frame::VERSION, client: "test".to_owned(), token: None }
}

/// Header and padded body of a message; announces `payload_bytes` and does not bring them.
fn encoded<M: Message>(message: &M, payload_bytes: u32) -> Vec<u8> {
    let mut out = Vec::new();
    frame::encode(message, 0, 1, payload_bytes, &mut out);
    out
}

/// A whole frame of a message.
fn framed<M: Message>(message: &M, payload: &[u8]) -> Vec<u8> {
    let mut out = encoded(message, payload.len() as u32);
    out.extend_from_slice(payload);
    out.extend_from_slice(frame::padding(payload.len()));
    out
}

/// The archive of a message.
fn archived<M: Message>(message: &M) -> Vec<u8> {
    let mut out = Vec::new();
    message.archive_to(&mut out);
    out
}

/// A frame of any kind around any body, with the right checksum.
fn frame_around(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = encoded(&Ping {}, 0);
    out[5] = kind;
    out[16..20].copy_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(body);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&out[..28]), body);
    out[28..32].copy_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(frame::padding(body.len()));
    out
}

/// A connection or a session with the node.
fn client(address: SocketAddr, greeted: bool) -> Wire {
    if greeted { Wire::connect(address).unwrap() } else { Wire::raw(address).unwrap() }
}

/// Sends what a node may refuse before it has all come.
fn send_raw(wire: &mut Wire, bytes: &[u8]) {
    match wire.stream.write_all(bytes) {
        Err(error) if !is_closed(&error) => panic!("{error}"),
        Ok(()) | Err(_) => {}
    }
}

fn is_closed(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

/// The node says why, and then closes.
fn assert_refused(wire: &mut Wire, code: ErrorCode, what: &str) {
    let answer = wire.receive().unwrap_or_else(|error| panic!("{what}: no answer: {error}"));
    assert_eq!(answer.kind, Kind::Error, "{what}: {answer:?}");
    assert_eq!(answer.code(), code, "{what}: {}", answer.error().text);
    assert!(!answer.error().text.is_empty(), "{what}");
    assert_ended(wire, what);
}

fn assert_ended(wire: &mut Wire, what: &str) {
    match wire.receive() {
        Ok(more) => panic!("{what}: the connection goes on with {more:?}"),
        Err(error) => assert!(is_closed(&error), "{what}: {error}"),
    }
}

#[test]
fn bytes_that_are_no_frame_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let header = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = framed(&Lookup { name: "a topic name that is not inline".to_owned() }, &[]);
        change(&mut bytes);
        bytes
    };
    let announced =
        |at: usize, bytes: u32| header(&move |frame| frame[at..at + 4].copy_from_slice(&bytes.to_le_bytes()));
    let cases: Vec<(&str, Vec<u8>, ErrorCode)> = vec![
        ("HTTP", b"GET / HTTP/1.1\r\nHost: node\r\n\r\n".to_vec(), ErrorCode::MalformedFrame),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), ErrorCode::MalformedFrame),
        ("one wrong byte", b"X".to_vec(), ErrorCode::MalformedFrame),
        ("zeros", vec![0; 4096], ErrorCode::MalformedFrame),
        ("noise", Random(1).bytes(1 << 20), ErrorCode::MalformedFrame),
        ("version 0", header(&|frame| frame[4] = 0), ErrorCode::UnsupportedVersion),
        ("version 2", header(&|frame| frame[4] = 2), ErrorCode::UnsupportedVersion),
        ("kind 0", header(&|frame| frame[5] = 0), ErrorCode::UnexpectedFrame),
        ("kind 255", header(&|frame| frame[5] = 255), ErrorCode::UnexpectedFrame),
        ("reserved", header(&|frame| frame[26] = 1), ErrorCode::MalformedFrame),
        ("a bit of the flags", header(&|frame| frame[6] ^= 1), ErrorCode::FrameChecksum),
        ("a bit of the correlation", header(&|frame| frame[15] ^= 0x80), ErrorCode::FrameChecksum),
        ("a bit of the checksum", header(&|frame| frame[31] ^= 1), ErrorCode::FrameChecksum),
        ("a bit of the body", header(&|frame| frame[HEADER_BYTES] ^= 4), ErrorCode::FrameChecksum),
        // Refused by its header alone: the rest is never sent.
        ("body a byte too large", announced(16, BODY_BYTES_MAX + 1), ErrorCode::FrameTooLarge),
        ("body of 4 GiB", announced(16, u32::MAX), ErrorCode::FrameTooLarge),
        ("payload a byte too large", announced(20, PAYLOAD_BYTES_MAX_DEFAULT + 1), ErrorCode::FrameTooLarge),
        ("payload of 4 GiB", announced(20, u32::MAX), ErrorCode::FrameTooLarge),
    ];
    let malformed_before = node.metric("drava_frames_malformed_total");
    for greeted in [false, true] {
        for (what, bytes, code) in &cases {
            let mut wire = client(node.listen, greeted);
            send_raw(&mut wire, bytes);
            assert_refused(&mut wire, *code, what);
        }
    }
    let malformed = node.metric("drava_frames_malformed_total") - malformed_before;
    assert_eq!(malformed, 2.0 * cases.len() as f64);
    node.assert_serves();
}

#[test]
fn a_session_begins_with_hello_and_a_common_version() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let with = |version_min, version_max, client: &str| {
        framed(&Hello { version_min, version_max, client: client.to_owned(), token: None }, &[])
    };
    let publish = framed(&Publish { partition: 1 }, &batch_of(&Seal::default(), &["x"]));
    let cases: Vec<(&str, Vec<u8>, ErrorCode)> = vec![
        ("Ping", framed(&Ping {}, &[]), ErrorCode::HandshakeRequired),
        ("Lookup", framed(&Lookup { name: "orders".to_owned() }, &[]), ErrorCode::HandshakeRequired),
        ("Publish", publish, ErrorCode::HandshakeRequired),
        ("Flow", framed(&Flow { consumer: 1, bytes: 1 }, &[]), ErrorCode::HandshakeRequired),
        ("no body", frame_around(Kind::Hello as u8, &[]), ErrorCode::MalformedBody),
        ("half a body", frame_around(Kind::Hello as u8, &archived(&hello())[1..]), ErrorCode::MalformedBody),
        ("newer versions", with(2, 9, "test"), ErrorCode::UnsupportedVersion),
        ("older versions", with(0, 0, "test"), ErrorCode::UnsupportedVersion),
        ("the highest below the lowest", with(9, 0, "test"), ErrorCode::UnsupportedVersion),
        ("a long name", with(1, 1, &"n".repeat(257)), ErrorCode::MalformedBody),
    ];
    for (what, bytes, code) in &cases {
        let mut wire = Wire::raw(node.listen).unwrap();
        send_raw(&mut wire, bytes);
        assert_refused(&mut wire, *code, what);
    }
    // Many versions, one of them ours; the longest name.
    let mut wire = Wire::raw(node.listen).unwrap();
    wire.stream.write_all(&with(0, 200, &"n".repeat(256))).unwrap();
    assert_eq!(expect!(wire.receive().unwrap(), Welcome).version, frame::VERSION);
    // Once is enough.
    wire.stream.write_all(&framed(&hello(), &[])).unwrap();
    assert_refused(&mut wire, ErrorCode::UnexpectedFrame, "a second Hello");
    node.assert_serves();
}

#[test]
fn kinds_that_only_nodes_send_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let from_nodes = [
        Kind::Welcome,
        Kind::Error,
        Kind::Done,
        Kind::Topics,
        Kind::Topic,
        Kind::PartitionState,
        Kind::ProducerOpened,
        Kind::Published,
        Kind::Fetched,
        Kind::Located,
        Kind::Damaged,
        Kind::Subscribed,
        Kind::Deliver,
    ];
    for kind in from_nodes {
        for body in [&[][..], &[0; 64][..]] {
            let mut wire = node.connect();
            wire.stream.write_all(&frame_around(kind as u8, body)).unwrap();
            assert_refused(&mut wire, ErrorCode::UnexpectedFrame, &format!("{kind:?}"));
        }
    }
    node.assert_serves();
}

/// Every request, with text that lies outside its field where it has any.
fn requests(partition: u64) -> Vec<(Kind, Vec<u8>)> {
    fn of<M: Message>(message: M) -> (Kind, Vec<u8>) {
        (M::KIND, archived(&message))
    }
    let text = "text that is longer than a field".to_owned();
    let subscribe =
        Subscribe { partition, consumer: 1, subscription: text.clone(), start: Place::Earliest, take_over: false };
    vec![
        of(CreateTopic { name: text.clone(), policy: policy(1), exists_ok: true }),
        of(DeleteTopic { name: text.clone() }),
        of(ListTopics { prefix: text.clone(), after: text.clone(), limit: 10 }),
        of(Lookup { name: text.clone() }),
        of(DescribePartition { partition }),
        of(OpenProducer { partition, producer: 1 }),
        of(Publish { partition }),
        of(Fetch { partition, offset: 0, bytes_max: 1, wait_ms: 0 }),
        of(Locate { partition, place: Place::Latest }),
        of(subscribe),
        of(Flow { consumer: 1, bytes: 1 }),
        of(Ack { consumer: 1, offset: 1 }),
        of(Seek { consumer: 1, place: Place::Latest }),
        of(CloseConsumer { consumer: 1 }),
        of(DeleteSubscription { partition, subscription: text }),
    ]
}

#[test]
fn bodies_that_are_no_archives_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("bodies", policy(2));
    // One partition lives on the core that is asked, the other is a forward away.
    for place in &topic.partitions {
        for (kind, body) in requests(place.partition) {
            let mut cases = vec![("nothing", Vec::new()), ("without its first byte", body[1..].to_vec())];
            cases.push(("one byte", body[body.len() - 1..].to_vec()));
            if let Some(at) = body.windows(4).position(|text| text == b"text") {
                let mut no_text = body.clone();
                no_text[at] = 0xff;
                cases.push(("text that is no UTF-8", no_text));
            }
            for (what, body) in cases {
                let mut wire = node.connect_owner(&topic, 0);
                wire.stream.write_all(&frame_around(kind as u8, &body)).unwrap();
                assert_refused(&mut wire, ErrorCode::MalformedBody, &format!("{kind:?}, {what}"));
            }
        }
    }
    // A policy with a bool that is neither: the only byte that differs is set to 2.
    let create = |trim_consumed| {
        let policy = TopicPolicy { trim_consumed, ..policy(1) };
        archived(&CreateTopic { name: "refused".to_owned(), policy, exists_ok: false })
    };
    let mut neither = create(false);
    let at = neither.iter().zip(create(true)).position(|(no, yes)| *no != yes).unwrap();
    neither[at] = 2;
    let mut wire = node.connect();
    wire.stream.write_all(&frame_around(Kind::CreateTopic as u8, &neither)).unwrap();
    assert_refused(&mut wire, ErrorCode::MalformedBody, "a bool of 2");
    node.assert_serves();
}

/// A batch of two records, with `change` made to its bytes and the checksum put right.
fn changed_batch(change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = batch_of(&Seal::default(), &["first", "second"]);
    change(&mut bytes);
    let crc = crc32c::crc32c(&bytes[batch::CHECKED_FROM..]);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn put(bytes: &mut [u8], at: usize, number: u32) {
    bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
}

#[test]
fn a_bad_batch_is_answered_with_its_code_and_the_connection_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("batches", policy(2));
    let whole = changed_batch(|_| {});
    let sealed = |producer, producer_epoch, base_sequence| {
        batch_of(&Seal { producer, producer_epoch, base_sequence, ..Seal::default() }, &["a", "b"])
    };
    let mut wrong_crc = whole.clone();
    wrong_crc[20] ^= 1;
    let mut wrong_record = whole.clone();
    *wrong_record.last_mut().unwrap() ^= 1;
    let cases: Vec<(&str, Vec<u8>, ErrorCode)> = vec![
        ("no batch", Vec::new(), ErrorCode::MalformedBatch),
        ("half a header", whole[..63].to_vec(), ErrorCode::MalformedBatch),
        ("a header alone", whole[..64].to_vec(), ErrorCode::MalformedBatch),
        ("a byte short", whole[..whole.len() - 1].to_vec(), ErrorCode::MalformedBatch),
        ("a byte more", [&whole[..], &[0]].concat(), ErrorCode::MalformedBatch),
        ("two batches", [&whole[..], &whole[..]].concat(), ErrorCode::MalformedBatch),
        ("says it is shorter than a header", changed_batch(|b| put(b, 16, 63)), ErrorCode::MalformedBatch),
        ("says it is 4 GiB", changed_batch(|b| put(b, 16, u32::MAX)), ErrorCode::MalformedBatch),
        ("a bit of its checksum", wrong_crc, ErrorCode::BatchChecksum),
        ("a bit of its last record", wrong_record, ErrorCode::BatchChecksum),
        ("version 0", changed_batch(|b| b[24] = 0), ErrorCode::MalformedBatch),
        ("version 2", changed_batch(|b| b[24] = 2), ErrorCode::MalformedBatch),
        ("compression 3", changed_batch(|b| b[25] = 3), ErrorCode::MalformedBatch),
        ("reserved", changed_batch(|b| b[27] = 1), ErrorCode::MalformedBatch),
        ("no records", changed_batch(|b| put(b, 28, 0)), ErrorCode::MalformedBatch),
        ("more records than there is room for", changed_batch(|b| put(b, 28, 5)), ErrorCode::MalformedBatch),
        ("more records than allowed", changed_batch(|b| put(b, 28, RECORDS_MAX + 1)), ErrorCode::MalformedBatch),
        ("says it unpacks to less", changed_batch(|b| put(b, 44, 1)), ErrorCode::MalformedBatch),
        ("says it unpacks to more", changed_batch(|b| put(b, 44, 1 << 20)), ErrorCode::MalformedBatch),
        (
            "unpacks to more than a frame may hold",
            changed_batch(|b| {
                b[25] = 1;
                put(b, 44, PAYLOAD_BYTES_MAX_DEFAULT + 1);
            }),
            ErrorCode::BatchTooLarge,
        ),
        ("passes the last sequence", changed_batch(|b| b[48..56].fill(0xff)), ErrorCode::MalformedBatch),
        ("of an unknown producer, not from its start", sealed(7, 0, 1), ErrorCode::SequenceGap),
    ];
    for place in &topic.partitions {
        // On the core of the first partition: the second is reached by a forward.
        let mut wire = node.connect_owner(&topic, 0);
        let partition = place.partition;
        for (what, payload, code) in &cases {
            let answer = wire.call_with(&Publish { partition }, payload).unwrap();
            assert_eq!(answer.kind, Kind::Error, "{what}");
            assert_eq!(answer.code(), *code, "{what}: {}", answer.error().text);
        }
        // None of them took an offset.
        assert_eq!(wire.publish(partition, &whole).base_offset, 0);
        // Sequences of a producer that is known.
        expect!(wire.call(&OpenProducer { partition, producer: 7 }).unwrap(), ProducerOpened);
        expect!(wire.call(&OpenProducer { partition, producer: 7 }).unwrap(), ProducerOpened);
        assert_eq!(wire.publish(partition, &sealed(7, 2, 0)).base_offset, 2);
        for (what, batch, code) in [
            ("an older epoch", sealed(7, 1, 2), ErrorCode::ProducerFenced),
            ("a gap", sealed(7, 2, 3), ErrorCode::SequenceGap),
            ("an overlap", sealed(7, 2, 1), ErrorCode::SequenceOverlap),
        ] {
            assert_eq!(wire.call_with(&Publish { partition }, &batch).unwrap().code(), code, "{what}");
        }
        assert!(wire.publish(partition, &sealed(7, 2, 0)).duplicate);
        assert_eq!(wire.publish(partition, &sealed(7, 2, 2)).base_offset, 4);
        assert_eq!(wire.read_all(partition, 0).len(), 6);
    }
}

#[test]
fn a_producer_that_claims_the_last_epoch_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("epochs", policy(1));
    let partition = topic.partitions[0].partition;
    let mut wire = node.connect_owner(&topic, 0);
    let last = Seal { producer: 9, producer_epoch: u32::MAX, ..Seal::default() };
    wire.publish(partition, &batch_of(&last, &["a"]));
    // There is no epoch after it, and no older one may come back.
    let refused = wire.call(&OpenProducer { partition, producer: 9 }).unwrap();
    assert_eq!(refused.code(), ErrorCode::ProducerFenced);
    let older = Seal { producer_epoch: 0, base_sequence: 1, ..last };
    let refused = wire.call_with(&Publish { partition }, &batch_of(&older, &["b"])).unwrap();
    assert_eq!(refused.code(), ErrorCode::ProducerFenced);
    node.assert_serves();
}

#[test]
fn what_is_unknown_or_out_of_range_is_named_and_the_connection_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("known", policy(2));
    let partition = topic.partitions[0].partition;
    let mut wire = node.connect_owner(&topic, 0);
    let one = batch_of(&Seal::default(), &["x"]);
    for unknown in [0, 999, u64::MAX] {
        for (kind, body) in requests(unknown) {
            let addressed = [
                Kind::DescribePartition,
                Kind::OpenProducer,
                Kind::Publish,
                Kind::Fetch,
                Kind::Locate,
                Kind::Subscribe,
                Kind::DeleteSubscription,
            ];
            if addressed.contains(&kind) {
                wire.stream.write_all(&frame_around(kind as u8, &body)).unwrap();
                assert_eq!(wire.receive().unwrap().code(), ErrorCode::UnknownPartition, "{kind:?} of {unknown}");
            }
        }
    }
    for name in ["unknown", "/public/other/known"] {
        assert_eq!(wire.call(&Lookup { name: name.to_owned() }).unwrap().code(), ErrorCode::UnknownTopic);
        assert_eq!(wire.call(&DeleteTopic { name: name.to_owned() }).unwrap().code(), ErrorCode::UnknownTopic);
    }
    let long = "n".repeat(256);
    for name in ["", "/", "a b", "a\0b", "../known", "/a/b", "/a//b", "/a/b/", "ä", &long] {
        let name = name.to_owned();
        let create = CreateTopic { name: name.clone(), policy: policy(1), exists_ok: true };
        assert_eq!(wire.call(&create).unwrap().code(), ErrorCode::InvalidTopicName, "{name:?}");
        assert_eq!(wire.call(&Lookup { name: name.clone() }).unwrap().code(), ErrorCode::InvalidTopicName, "{name:?}");
        assert_eq!(wire.call(&DeleteTopic { name }).unwrap().code(), ErrorCode::InvalidTopicName);
    }
    let again = CreateTopic { name: "known".to_owned(), policy: policy(2), exists_ok: false };
    assert_eq!(wire.call(&again).unwrap().code(), ErrorCode::TopicExists);
    for policy in [
        policy(0),
        policy(1025),
        policy(u32::MAX),
        TopicPolicy { replicas: 0, ..policy(1) },
        TopicPolicy { ack_quorum: 0, ..policy(1) },
        TopicPolicy { ack_quorum: 2, ..policy(1) },
        TopicPolicy { cache: CachePolicy::from_number(u64::MAX), ..policy(1) },
    ] {
        let create = CreateTopic { name: "refused".to_owned(), policy, exists_ok: false };
        assert_eq!(wire.call(&create).unwrap().code(), ErrorCode::InvalidArgument, "{create:?}");
    }
    for limit in [0, 1001, u32::MAX] {
        let list = ListTopics { prefix: String::new(), after: String::new(), limit };
        assert_eq!(wire.call(&list).unwrap().code(), ErrorCode::InvalidArgument, "limit {limit}");
    }
    wire.publish(partition, &one);
    for offset in [2, u64::MAX] {
        let fetch = Fetch { partition, offset, bytes_max: u32::MAX, wait_ms: u32::MAX };
        assert_eq!(wire.call(&fetch).unwrap().code(), ErrorCode::OffsetOutOfRange, "offset {offset}");
    }
    assert_eq!(wire.call(&OpenProducer { partition, producer: 0 }).unwrap().code(), ErrorCode::InvalidArgument);
    // Consumers and subscriptions.
    assert_eq!(wire.call(&Ack { consumer: 1, offset: 1 }).unwrap().code(), ErrorCode::UnknownSubscription);
    let seek = Seek { consumer: 1, place: Place::Earliest };
    assert_eq!(wire.call(&seek).unwrap().code(), ErrorCode::UnknownSubscription);
    let delete = DeleteSubscription { partition, subscription: "none".to_owned() };
    assert_eq!(wire.call(&delete).unwrap().code(), ErrorCode::UnknownSubscription);
    expect!(wire.call(&CloseConsumer { consumer: 1 }).unwrap(), Done);
    wire.send(&Flow { consumer: 1, bytes: u32::MAX }, &[]).unwrap();
    let subscribe = |partition, consumer, name: &str| Subscribe {
        partition,
        consumer,
        subscription: name.to_owned(),
        start: Place::Earliest,
        take_over: false,
    };
    for name in ["", &"n".repeat(129)] {
        assert_eq!(wire.call(&subscribe(partition, 1, name)).unwrap().code(), ErrorCode::InvalidArgument, "{name:?}");
    }
    expect!(wire.call(&subscribe(partition, 1, "s")).unwrap(), Subscribed);
    assert_eq!(wire.call(&subscribe(partition, 1, "t")).unwrap().code(), ErrorCode::InvalidArgument, "consumer in use");
    assert_eq!(wire.call(&subscribe(partition, 2, "s")).unwrap().code(), ErrorCode::SubscriptionBusy);
    assert_eq!(wire.call(&Ack { consumer: 1, offset: u64::MAX }).unwrap().code(), ErrorCode::InvalidArgument);
    let elsewhere = wire.call(&subscribe(topic.partitions[1].partition, 3, "s")).unwrap();
    assert_eq!(elsewhere.code(), ErrorCode::WrongOwner);
    assert_eq!(elsewhere.owner_port, topic.partitions[1].port);
    // All of it on one connection, which still serves.
    assert_eq!(wire.publish(partition, &one).base_offset, 1);
}

#[test]
fn a_subscription_that_starts_beyond_the_end_loses_nothing_that_comes_later() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("later", policy(1));
    let partition = topic.partitions[0].partition;
    let subscribe = Subscribe {
        partition,
        consumer: 1,
        subscription: "s".to_owned(),
        start: Place::Offset(u64::MAX),
        take_over: false,
    };
    {
        let mut wire = node.connect_owner(&topic, 0);
        assert_eq!(expect!(wire.call(&subscribe).unwrap(), Subscribed).offset, 0);
        for message in ["first", "second"] {
            wire.publish(partition, &batch_of(&Seal::default(), &[message]));
        }
        expect!(wire.call(&Ack { consumer: 1, offset: 1 }).unwrap(), Done);
        expect!(wire.call(&CloseConsumer { consumer: 1 }).unwrap(), Done);
    }
    let mut wire = node.connect_owner(&topic, 0);
    assert_eq!(expect!(wire.call(&subscribe).unwrap(), Subscribed).offset, 1, "the second was not acknowledged");
}

#[test]
fn a_client_that_says_nothing_is_disconnected_and_a_session_may_be_silent() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path());
    let node =
        Node::start(&options.with("DRAVA_NETWORK_HELLO_TIMEOUT_MS", 300).with("DRAVA_NETWORK_FRAME_TIMEOUT_MS", 300));
    let mut session = node.connect();
    let mut silent: Vec<Wire> = (0..20).map(|_| Wire::raw(node.listen).unwrap()).collect();
    for wire in &mut silent {
        assert_refused(wire, ErrorCode::HandshakeRequired, "silent");
    }
    // Longer silent than any of them.
    assert_eq!(session.call(&Ping {}).unwrap().kind, Kind::Pong);
}

#[test]
fn a_client_that_stops_inside_a_frame_is_disconnected() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()).with("DRAVA_NETWORK_FRAME_TIMEOUT_MS", 500));
    let topic = node.connect().topic("slow", policy(1));
    let partition = topic.partitions[0].partition;
    let payload = batch_of(&Seal::default(), &[vec![b'x'; 100_000]]);
    let whole = framed(&Publish { partition }, &payload);
    for stop_at in [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 3, 60, 1000, whole.len() - 1] {
        let mut wire = node.connect_owner(&topic, 0);
        // After a request that is whole, with the next one behind it in the same write.
        let bytes = [&framed(&Ping {}, &[])[..], &whole[..stop_at]].concat();
        wire.stream.write_all(&bytes).unwrap();
        assert_eq!(wire.receive().unwrap().kind, Kind::Pong);
        assert_refused(&mut wire, ErrorCode::SlowClient, &format!("stops at {stop_at}"));
    }
    // Always another byte, and never the frame.
    let mut wire = node.connect_owner(&topic, 0);
    let mut dripping = wire.stream.try_clone().unwrap();
    let drip = std::thread::spawn(move || {
        for byte in &whole[..whole.len() - 1] {
            if dripping.write_all(&[*byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    assert_refused(&mut wire, ErrorCode::SlowClient, "drips");
    drip.join().unwrap();
    assert_eq!(node.connect_owner(&topic, 0).publish(partition, &payload).base_offset, 0, "nothing half was stored");
}

#[test]
fn announced_bytes_are_not_allocated_before_they_come() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()).with("DRAVA_NETWORK_RECEIVE_BYTES_MAX", 32 << 20));
    let topic = node.connect().topic("announced", policy(1));
    let head = encoded(&Publish { partition: topic.partitions[0].partition }, PAYLOAD_BYTES_MAX_DEFAULT);
    node.assert_serves();
    let before = node.resident_bytes();
    let mut wires: Vec<Wire> = (0..400).map(|_| node.connect()).collect();
    for wire in &mut wires {
        wire.stream.write_all(&head).unwrap();
    }
    node.assert_serves();
    let grown = node.resident_bytes().saturating_sub(before);
    assert!(grown < 100 << 20, "400 announcements of 4 MiB took {} MiB", grown >> 20);
}

#[test]
fn half_sent_frames_do_not_keep_others_from_being_served() {
    let dir = tempfile::tempdir().unwrap();
    // Room for 16 receive chunks a shard, and 300 connections that begin a frame.
    let options = NodeOptions::new(dir.path()).with("DRAVA_NETWORK_RECEIVE_BYTES_MAX", 8 << 20);
    let node = Node::start(&options.with("DRAVA_NETWORK_FRAME_TIMEOUT_MS", 3_600_000));
    let topic = node.connect().topic("shared", policy(2));
    let payload = batch_of(&Seal::default(), &[vec![b'x'; 100_000]]);
    let mut halves = Vec::new();
    for index in 0..300 {
        let place = &topic.partitions[index % 2];
        let mut wire = node.connect_owner(&topic, index % 2);
        let bytes = framed(&Publish { partition: place.partition }, &payload);
        wire.stream.write_all(&bytes[..10_000]).unwrap();
        halves.push((wire, bytes));
    }
    for index in 0..2 {
        let partition = topic.partitions[index].partition;
        let mut wire = node.connect_owner(&topic, index);
        for offset in 0..50 {
            assert_eq!(wire.publish(partition, &payload).base_offset, offset);
        }
    }
    // Those who go on are served, too.
    for (wire, bytes) in &mut halves {
        wire.stream.write_all(&bytes[10_000..]).unwrap();
    }
    for (wire, _) in &mut halves {
        expect!(wire.receive().unwrap(), Published);
    }
}

#[test]
fn large_frames_on_many_connections_at_once_all_get_through() {
    let dir = tempfile::tempdir().unwrap();
    // Together they are several times what a shard may hold while it receives.
    let node = Node::start(&NodeOptions::new(dir.path()).with("DRAVA_NETWORK_RECEIVE_BYTES_MAX", 8 << 20));
    let topic = node.connect().topic("large", policy(1));
    let partition = topic.partitions[0].partition;
    let payload = batch_of(&Seal::default(), &[vec![b'x'; 3_500_000]]);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            let mut wire = node.connect_owner(&topic, 0);
            let payload = &payload;
            scope.spawn(move || {
                for _ in 0..2 {
                    wire.publish(partition, payload);
                }
            });
        }
    });
    let state = node.connect_owner(&topic, 0).call(&DescribePartition { partition }).unwrap();
    assert_eq!(expect!(state, PartitionState).end_offset, 32);
}

#[test]
fn large_frames_that_stop_halfway_hold_others_up_for_the_frame_timeout_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path()).with("DRAVA_NETWORK_RECEIVE_BYTES_MAX", 8 << 20);
    let node = Node::start(&options.with("DRAVA_NETWORK_FRAME_TIMEOUT_MS", 1000));
    let topic = node.connect().topic("halfway", policy(1));
    let partition = topic.partitions[0].partition;
    let payload = batch_of(&Seal::default(), &[vec![b'x'; 3_500_000]]);
    let bytes = framed(&Publish { partition }, &payload);
    let halves: Vec<Wire> = (0..20)
        .map(|_| {
            let mut wire = node.connect_owner(&topic, 0);
            // The node takes as much as it has room for, and this client does not wait for more.
            wire.stream.set_nonblocking(true).unwrap();
            let mut sent = 0;
            while let Ok(more) = wire.stream.write(&bytes[sent..3_000_000]) {
                sent += more;
                if sent == 3_000_000 {
                    break;
                }
            }
            wire
        })
        .collect();
    let mut wire = node.connect_owner(&topic, 0);
    assert_eq!(wire.publish(partition, &payload).base_offset, 0);
    drop(halves);
    node.assert_serves();
}

#[test]
fn connections_beyond_the_limit_are_told_so_and_find_room_later() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions { shards: 1, ..NodeOptions::new(dir.path()) };
    let node = Node::start(&options.with("DRAVA_NETWORK_CONNECTIONS_MAX", 5));
    let mut sessions: Vec<Wire> = (0..5).map(|_| node.connect()).collect();
    for _ in 0..20 {
        let mut wire = Wire::raw(node.listen).unwrap();
        let refused = wire.receive().unwrap();
        assert_eq!(refused.code(), ErrorCode::TooManyConnections);
        assert!(0 < refused.error().retry_after_ms);
        assert_ended(&mut wire, "refused");
    }
    assert_eq!(node.metric("drava_connections_refused_total"), 20.0);
    for wire in &mut sessions {
        assert_eq!(wire.call(&Ping {}).unwrap().kind, Kind::Pong);
    }
    sessions.truncate(4);
    drop(sessions.pop());
    wait_until("a closed connection makes room", || {
        let mut wire = Wire::raw(node.listen).unwrap();
        send_raw(&mut wire, &framed(&hello(), &[]));
        wire.receive().is_ok_and(|answer| answer.kind == Kind::Welcome)
    });
}

#[test]
fn more_requests_than_may_wait_are_read_later_and_all_answered() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()).with("DRAVA_NETWORK_IN_FLIGHT_MAX", 4));
    let topic = node.connect().topic("pipelined", policy(2));
    for (index, place) in topic.partitions.iter().enumerate() {
        let mut wire = node.connect_owner(&topic, index);
        let mut sender = wire.sender();
        let partition = place.partition;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for i in 0..3000 {
                    sender.send(&Publish { partition }, &batch_of(&Seal::default(), &[format!("{i}")])).unwrap();
                }
            });
            for i in 0..3000 {
                let answer = wire.receive().unwrap();
                assert_eq!(answer.correlation, i + 1, "publishes to one partition are answered in order");
                assert_eq!(expect!(answer, Published).base_offset, i);
            }
        });
        assert_eq!(wire.read_all(partition, 0).len(), 3000);
    }
}

#[test]
fn thousands_of_requests_to_the_wrong_core_are_all_answered_and_lose_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("forwarded", policy(2));
    // Both ways at the same time, from several connections, so that the channels between the cores fill up.
    let acknowledged: Vec<(usize, BTreeMap<u64, Vec<u8>>)> = std::thread::scope(|scope| {
        let publishers: Vec<_> = (0..6)
            .map(|publisher| {
                let (node, topic) = (&node, &topic);
                scope.spawn(move || {
                    let index = publisher % 2;
                    let place = &topic.partitions[index];
                    let mut wire = node.connect_owner(topic, 1 - index);
                    (index, publish_pipelined(&mut wire, place.partition, place.port, publisher, 3000))
                })
            })
            .collect();
        publishers.into_iter().map(|publisher| publisher.join().unwrap()).collect()
    });
    for (index, place) in topic.partitions.iter().enumerate() {
        let stored = node.connect_owner(&topic, index).read_all(place.partition, 0);
        let mut acknowledged_count = 0;
        for (_, acknowledged) in acknowledged.iter().filter(|(of, _)| *of == index) {
            acknowledged_count += acknowledged.len();
            for (offset, payload) in acknowledged {
                assert_eq!(stored.get(offset), Some(payload), "offset {offset} was acknowledged");
            }
        }
        assert!(0 < acknowledged_count);
        assert_eq!(stored.len(), acknowledged_count, "what was answered Busy was not taken");
    }
    node.assert_serves();
}

/// Publishes without waiting for answers; returns what was acknowledged, by offset.
fn publish_pipelined(
    wire: &mut Wire,
    partition: u64,
    owner_port: u16,
    publisher: usize,
    count: u64,
) -> BTreeMap<u64, Vec<u8>> {
    let payload = |i: u64| format!("publisher {publisher} message {i} {}", "x".repeat(500)).into_bytes();
    let mut stream = wire.stream.try_clone().unwrap();
    let mut acknowledged = BTreeMap::new();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for i in 0..count {
                let batch = batch_of(&Seal::default(), &[payload(i)]);
                let mut frame = Vec::new();
                frame::encode(&Publish { partition }, 0, i, batch.len() as u32, &mut frame);
                frame.extend_from_slice(&batch);
                frame.extend_from_slice(frame::padding(batch.len()));
                stream.write_all(&frame).unwrap();
            }
        });
        let mut answered = vec![false; count as usize];
        for _ in 0..count {
            let answer = wire.receive().unwrap();
            let i = answer.correlation;
            assert!(!std::mem::replace(&mut answered[i as usize], true), "request {i} was answered twice");
            if answer.kind == Kind::Error {
                assert_eq!(answer.code(), ErrorCode::Busy);
                continue;
            }
            assert_eq!(answer.owner_port, owner_port, "the answer names the port to use");
            let taken = acknowledged.insert(expect!(answer, Published).base_offset, payload(i));
            assert_eq!(taken, None, "an offset was given twice");
        }
    });
    acknowledged
}

/// What the clients that do not read ask for.
const UNREAD_BYTES: usize = 1 << 20;

#[test]
fn clients_that_never_read_are_cut_and_the_memory_they_cost_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    // A small cache: most of what is asked for has to be read from the disk.
    let options = NodeOptions::new(dir.path())
        .with("DRAVA_STORAGE_CACHE_BYTES", 4 << 20)
        .with("DRAVA_NETWORK_RECEIVE_BYTES_MAX", 16 << 20)
        .with("DRAVA_NETWORK_WRITE_TIMEOUT_MS", 3000);
    let node = Node::start(&options);
    let topic = node.connect().topic("unread", policy(2));
    let batch = batch_of(&Seal::default(), &[vec![b'x'; UNREAD_BYTES - 1000]]);
    for (index, place) in topic.partitions.iter().enumerate() {
        let mut wire = node.connect_owner(&topic, index);
        for _ in 0..48 {
            wire.publish(place.partition, &batch);
        }
    }
    let before = node.resident_bytes();
    let mut unread = Vec::new();
    for number in 0..4u32 {
        let index = number as usize % 2;
        let (own, other) = (topic.partitions[index].partition, topic.partitions[1 - index].partition);
        // Pushed to without end.
        let mut subscriber = node.connect_owner(&topic, index);
        let subscription = format!("s{number}");
        let start = Place::Earliest;
        let subscribe = Subscribe { partition: own, consumer: 1, subscription, start, take_over: false };
        expect!(subscriber.call(&subscribe).unwrap(), Subscribed);
        subscriber.send(&Flow { consumer: 1, bytes: u32::MAX }, &[]).unwrap();
        unread.push(subscriber);
        // Fetches of what is there, here and on the other core, and of what comes later.
        for (partition, offset) in [(own, 0), (other, 0), (own, 48), (other, 48)] {
            let mut fetcher = node.connect_owner(&topic, index);
            for i in 0..1000 {
                let offset = if offset == 0 { i % 48 } else { offset };
                fetcher.send(&Fetch { partition, offset, bytes_max: u32::MAX, wait_ms: 20_000 }, &[]).unwrap();
            }
            unread.push(fetcher);
        }
    }
    // Everybody else is served, and what they publish wakes those who wait for it.
    let mut resident_max = 0;
    // Answers that fit into the sockets' own buffers break no limit; those of the fetches for the other core may be few,
    // because most of them are answered `Busy`.
    let gone = || node.metric("drava_connections") < 3.0 + 8.0;
    let mut served = 0;
    let deadline = std::time::Instant::now() + PATIENCE;
    while !gone() {
        assert!(std::time::Instant::now() < deadline, "clients that never read are still connected");
        for (index, place) in topic.partitions.iter().enumerate() {
            let mut wire = node.connect_owner(&topic, index);
            let base_offset = wire.publish(place.partition, &batch).base_offset;
            let read = wire.read_all(place.partition, base_offset);
            assert_eq!(read.len(), 1);
            served += 1;
        }
        resident_max = resident_max.max(node.resident_bytes());
    }
    assert!(0 < served);
    let grown = resident_max.saturating_sub(before);
    println!("20 clients that never read: {} MiB more at most", grown >> 20);
    assert!(grown < 400 << 20, "clients that never read took {} MiB", grown >> 20);
    drop(unread);
    node.assert_serves();
}

#[test]
fn waits_of_clients_that_went_away_end_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("awaited", policy(1));
    let partition = topic.partitions[0].partition;
    node.assert_serves();
    let before = node.resident_bytes();
    let fetch = framed(&Fetch { partition, offset: 0, bytes_max: 1 << 20, wait_ms: 60_000 }, &[]).repeat(1000);
    let ping = framed(&Ping {}, &[]);
    for _ in 0..200 {
        let mut wire = node.connect_owner(&topic, 0);
        wire.stream.write_all(&fetch).unwrap();
        wire.stream.write_all(&ping).unwrap();
        // Answered after the fetches were taken.
        assert_eq!(wire.receive().unwrap().kind, Kind::Pong);
    }
    node.assert_serves();
    let grown = node.resident_bytes().saturating_sub(before);
    println!("200,000 waits of clients that are gone: {} MiB", grown >> 20);
    assert!(grown < 64 << 20, "200,000 waits of clients that are gone hold {} MiB", grown >> 20);
}

#[test]
fn large_batches_for_the_other_core_do_not_pile_up_between_the_cores() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path()).with("DRAVA_NETWORK_RECEIVE_BYTES_MAX", 16 << 20);
    let node = Node::start(&options.with("DRAVA_STORAGE_CACHE_BYTES", 8 << 20));
    let topic = node.connect().topic("large", policy(2));
    let batch = batch_of(&Seal::default(), &[vec![b'x'; 2_000_000]]);
    node.assert_serves();
    let before = node.resident_bytes();
    let resident_max = AtomicU64::new(0);
    let taken: u64 = std::thread::scope(|scope| {
        let publishers: Vec<_> = (0..8)
            .map(|number| {
                let (node, topic, batch, resident_max) = (&node, &topic, &batch, &resident_max);
                scope.spawn(move || {
                    let index = number % 2;
                    let partition = topic.partitions[index].partition;
                    let mut wire = node.connect_owner(topic, 1 - index);
                    let mut sender = wire.sender();
                    let sending = scope.spawn(move || {
                        for _ in 0..30 {
                            sender.send(&Publish { partition }, batch).unwrap();
                        }
                    });
                    let mut taken = 0;
                    for _ in 0..30 {
                        let answer = wire.receive().unwrap();
                        match answer.kind {
                            Kind::Published => taken += 1,
                            _ => assert_eq!(answer.code(), ErrorCode::Busy),
                        }
                        resident_max.fetch_max(node.resident_bytes(), Ordering::Relaxed);
                    }
                    sending.join().unwrap();
                    taken
                })
            })
            .collect();
        publishers.into_iter().map(|publisher| publisher.join().unwrap()).sum()
    });
    let grown = resident_max.into_inner().saturating_sub(before);
    println!("480 MB of batches for the other core, {taken} of 240 taken: {} MiB more at most", grown >> 20);
    // The cache of both shards, what they receive and stage, and what is under way between them.
    assert!(grown < 250 << 20, "batches for the other core took {} MiB", grown >> 20);
    let stored = topic.partitions.iter().enumerate().map(|(index, place)| {
        let state = node.connect_owner(&topic, index).call(&DescribePartition { partition: place.partition }).unwrap();
        expect!(state, PartitionState).end_offset
    });
    assert_eq!(stored.sum::<u64>(), taken, "what was answered Busy was not taken");
}

#[test]
fn a_client_that_asks_without_end_and_never_reads_is_held_back() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()).with("DRAVA_NETWORK_WRITE_TIMEOUT_MS", 1000));
    let before = node.resident_bytes();
    let mut wire = node.connect();
    let pings = framed(&Ping {}, &[]).repeat(10_000);
    // Answers pile up until the node reads no more, and then cuts.
    wire.stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut sent = 0u64;
    let error = loop {
        match wire.stream.write(&pings) {
            Ok(bytes) => sent += bytes as u64,
            Err(error) => break error,
        }
        assert!(sent < 1 << 30, "a node that reads without end");
    };
    assert!(is_closed(&error), "{error}");
    let grown = node.resident_bytes().saturating_sub(before);
    assert!(grown < 100 << 20, "one client that never reads took {} MiB", grown >> 20);
    node.assert_serves();
}

#[test]
fn ten_thousand_idle_connections_cost_little_and_others_are_served() {
    const IDLE: u64 = 10_000;
    // The kernel's sockets of this side are in this process.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let idle = limit.maximum.map_or(IDLE, |maximum| IDLE.min(maximum.saturating_sub(1500)));
    if idle < IDLE {
        println!("this process may open {:?} files: {idle} connections instead of {IDLE}", limit.maximum);
    }
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("busy", policy(2));
    node.assert_serves();
    let before = node.resident_bytes();
    let mut sessions: Vec<TcpStream> = Vec::new();
    // From several addresses, because each has only so many ports.
    for source in 0..5u8 {
        let source = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2 + source), 0));
        for _ in 0..idle / 5 {
            sessions.push(connect_from(source, node.listen));
        }
    }
    let greeting = framed(&hello(), &[]);
    for stream in &mut sessions {
        stream.write_all(&greeting).unwrap();
    }
    for stream in &mut sessions {
        let mut answer = [0; HEADER_BYTES];
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[5], Kind::Welcome as u8);
    }
    assert!(idle as f64 <= node.metric("drava_connections"));
    let batch = batch_of(&Seal::default(), &[vec![b'x'; 1000]]);
    for (index, place) in topic.partitions.iter().enumerate() {
        let mut wire = node.connect_owner(&topic, index);
        for offset in 0..500 {
            assert_eq!(wire.publish(place.partition, &batch).base_offset, offset);
        }
        assert_eq!(wire.read_all(place.partition, 0).len(), 500);
    }
    let grown = node.resident_bytes().saturating_sub(before);
    println!("{idle} idle connections: {} MiB", grown >> 20);
    assert!(grown < 200 << 20, "{idle} idle connections took {} MiB", grown >> 20);
    drop(sessions);
    wait_until("the node noticed that they are gone", || node.metric("drava_connections") < 10.0);
    node.assert_serves();
}

fn connect_from(source: SocketAddr, to: SocketAddr) -> TcpStream {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &source).unwrap();
    connect(&socket, &to).unwrap();
    TcpStream::from(socket)
}

#[test]
fn clients_that_come_and_go_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("restless", policy(2));
    let files = || std::fs::read_dir(format!("/proc/{}/fd", node.pid())).unwrap().count();
    node.assert_serves();
    let before = files();
    let batch = batch_of(&Seal::default(), &[vec![b'x'; 2000]]);
    for i in 0..600u32 {
        let index = i as usize % 2;
        let partition = topic.partitions[(i / 2) as usize % 2].partition;
        let mut wire = node.connect_owner(&topic, index);
        let subscription = format!("s{}", i % 7);
        let start = Place::Earliest;
        let subscribe = Subscribe { partition, consumer: i, subscription, start, take_over: true };
        // Whatever is under way, the connection ends: with a reset, or half closed, or in the middle of a frame.
        wire.send(&subscribe, &[]).unwrap();
        wire.send(&Flow { consumer: i, bytes: 1 << 20 }, &[]).unwrap();
        wire.send(&Fetch { partition, offset: 0, bytes_max: 1 << 20, wait_ms: 10_000 }, &[]).unwrap();
        wire.send(&Publish { partition }, &batch).unwrap();
        match i % 3 {
            0 => drop(wire),
            1 => wire.stream.shutdown(Shutdown::Write).unwrap(),
            _ => send_raw(&mut wire, &framed(&Publish { partition }, &batch)[..100]),
        }
    }
    wait_until("the node has let go of them", || {
        node.metric("drava_connections") < 3.0 && node.metric("drava_consumers") == 0.0 && files() <= before + 20
    });
    node.assert_serves();
}

/// One conversation that a node understands from its first to its last byte.
fn conversation(random: &mut Random, topic: &Topic) -> Vec<Vec<u8>> {
    let mut frames = vec![framed(&hello(), &[])];
    for _ in 0..1 + random.below(8) {
        let partition = topic.partitions[random.below(topic.partitions.len())].partition;
        let request = random.below(18);
        frames.push(match request {
            0..15 => {
                let (kind, body) = requests(partition).swap_remove(request);
                let mut frame = frame_around(kind as u8, &body);
                if kind == Kind::Publish {
                    let seal = Seal { producer: random.below(3) as u64, ..Seal::default() };
                    frame = framed(&Publish { partition }, &batch_of(&seal, &["some", "messages", ""]));
                }
                frame
            }
            15 => framed(&Ping {}, &[]),
            16 => framed(&Fetch { partition, offset: 0, bytes_max: u32::MAX, wait_ms: 1 }, &[]),
            _ => framed(&Publish { partition }, &batch_of(&Seal::default(), &[random.bytes(3000)])),
        });
    }
    frames
}

/// Changes a few bytes, anywhere; half of the time the checksum of the frame is put right, so that the change gets
/// past it.
fn mutate(random: &mut Random, frame: &mut Vec<u8>) {
    for _ in 0..1 + random.below(4) {
        match random.below(8) {
            0 => {
                let at = random.below(frame.len() + 1);
                let more = random.below(40);
                let more = random.bytes(more);
                frame.splice(at..at, more);
            }
            1 => {
                let at = random.below(frame.len());
                let to = (at + 1 + random.below(16)).min(frame.len());
                frame.drain(at..to);
            }
            2 => {
                let at = random.below(frame.len());
                let to = (at + 8).min(frame.len());
                frame[at..to].fill(if random.below(2) == 0 { 0xff } else { 0 });
            }
            _ => {
                let at = random.below(frame.len());
                frame[at] ^= 1 << random.below(8);
            }
        }
        if frame.is_empty() {
            return;
        }
    }
    if frame.len() < HEADER_BYTES || random.below(2) == 0 {
        return;
    }
    let body_bytes = u32::from_le_bytes([frame[16], frame[17], frame[18], frame[19]]) as usize;
    if let Some(body) = frame.get(HEADER_BYTES..HEADER_BYTES.saturating_add(body_bytes)) {
        let crc = crc32c::crc32c_append(crc32c::crc32c(&frame[..28]), body);
        frame[28..32].copy_from_slice(&crc.to_le_bytes());
    }
}

#[test]
fn no_mutation_of_a_conversation_ends_the_node() {
    const SEED: u64 = 0x6472_6176_6100_0001;
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()).with("DRAVA_NETWORK_FRAME_TIMEOUT_MS", 500));
    let topic = node.connect().topic("mutated", policy(2));
    let mut random = Random(SEED);
    let mut open: Vec<Wire> = Vec::new();
    for round in 0..1500 {
        let mut frames = conversation(&mut random, &topic);
        let at = random.below(frames.len());
        mutate(&mut random, &mut frames[at]);
        let mut wire = Wire::raw(SocketAddr::new(node.listen.ip(), node.shards[round % 2])).unwrap();
        send_raw(&mut wire, &frames.concat());
        open.push(wire);
        // Some are left open for a while, so that what they started meets the others.
        if 40 < open.len() {
            let index = random.below(open.len());
            drop(open.swap_remove(index));
        }
        if round % 100 == 99 {
            let (status, _) = node.http_get("/healthz");
            assert_eq!(status, 200, "seed {SEED:#x}, round {round}");
        }
    }
    drop(open);
    // A mutated name may have made a topic; what was known is served as before.
    node.assert_serves();
    let topic = node.connect().topic("mutated", policy(2));
    for (index, place) in topic.partitions.iter().enumerate() {
        node.connect_owner(&topic, index).read_all(place.partition, 0);
    }
    assert!(node.stop().success());
    Node::start(&NodeOptions::new(dir.path())).assert_serves();
}

/// Answers until the connection ends.
fn answers(wire: &mut Wire) -> Vec<Received> {
    std::iter::from_fn(|| wire.receive().ok()).collect()
}

#[test]
fn answers_that_were_due_come_before_the_connection_is_closed_for_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let mut wire = node.connect();
    let mut bytes = framed(&Ping {}, &[]).repeat(100);
    bytes.extend_from_slice(b"no frame at all, but long enough to be looked at");
    wire.stream.write_all(&bytes).unwrap();
    let answers = answers(&mut wire);
    assert_eq!(answers.len(), 101);
    assert!(answers[..100].iter().all(|answer| answer.kind == Kind::Pong));
    assert_eq!(answers[100].code(), ErrorCode::MalformedFrame);
}
