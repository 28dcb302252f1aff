//! Frames and bodies under arbitrary, mutated and truncated bytes.

use drava_protocol::error::ErrorCode;
use drava_protocol::frame::{
    self, ALIGNMENT, BODY_BYTES_MAX, Decoded, FrameError, HEADER_BYTES, PAYLOAD_BYTES_MAX_DEFAULT, padded, padding,
};
use drava_protocol::message::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;

const LIMIT: u32 = 4096;

/// What the properties need of a body, whatever its kind.
trait Specimen: std::fmt::Debug {
    fn kind(&self) -> Kind;
    fn frame(&self, flags: u16, correlation: u64, payload: &[u8]) -> Vec<u8>;
    /// Whether `body` reads as this very message.
    fn reads_from(&self, body: &[u8]) -> bool;
}

impl<M: Body + PartialEq + std::fmt::Debug> Specimen for M {
    fn kind(&self) -> Kind {
        M::KIND
    }

    fn frame(&self, flags: u16, correlation: u64, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        frame::encode(self, flags, correlation, payload.len() as u32, &mut out);
        out.extend_from_slice(payload);
        out.extend_from_slice(padding(payload.len()));
        out
    }

    fn reads_from(&self, body: &[u8]) -> bool {
        access::<M>(body).is_ok() && decode::<M>(body).as_ref() == Ok(self)
    }
}

/// Reads `body` as `kind` and walks through all that it holds.
fn read(kind: Kind, body: &[u8]) -> bool {
    fn walk<M: Body + std::fmt::Debug>(body: &[u8]) -> bool
    where
        M::Archived: std::fmt::Debug,
    {
        let archived = access::<M>(body).map(|archived| format!("{archived:?}"));
        let copied = decode::<M>(body).map(|message| format!("{message:?}"));
        assert_eq!(archived.is_ok(), copied.is_ok(), "access and decode agree");
        archived.is_ok()
    }
    match kind {
        Kind::Hello => walk::<Hello>(body),
        Kind::Welcome => walk::<Welcome>(body),
        Kind::Error => walk::<Error>(body),
        Kind::Ping => walk::<Ping>(body),
        Kind::Pong => walk::<Pong>(body),
        Kind::Done => walk::<Done>(body),
        Kind::CreateTopic => walk::<CreateTopic>(body),
        Kind::DeleteTopic => walk::<DeleteTopic>(body),
        Kind::ListTopics => walk::<ListTopics>(body),
        Kind::Topics => walk::<Topics>(body),
        Kind::Lookup => walk::<Lookup>(body),
        Kind::Topic => walk::<Topic>(body),
        Kind::DescribePartition => walk::<DescribePartition>(body),
        Kind::PartitionState => walk::<PartitionState>(body),
        Kind::OpenProducer => walk::<OpenProducer>(body),
        Kind::ProducerOpened => walk::<ProducerOpened>(body),
        Kind::Publish => walk::<Publish>(body),
        Kind::Published => walk::<Published>(body),
        Kind::Fetch => walk::<Fetch>(body),
        Kind::Fetched => walk::<Fetched>(body),
        Kind::Damaged => walk::<Damaged>(body),
        Kind::Locate => walk::<Locate>(body),
        Kind::Located => walk::<Located>(body),
        Kind::Subscribe => walk::<Subscribe>(body),
        Kind::Subscribed => walk::<Subscribed>(body),
        Kind::Flow => walk::<Flow>(body),
        Kind::Deliver => walk::<Deliver>(body),
        Kind::Ack => walk::<Ack>(body),
        Kind::Seek => walk::<Seek>(body),
        Kind::CloseConsumer => walk::<CloseConsumer>(body),
        Kind::DeleteSubscription => walk::<DeleteSubscription>(body),
    }
}

/// Short ones lie inside the archived string, long ones outside.
fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z/é]{0,9}", "[a-z/é]{0,80}"]
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        Just(Place::Earliest),
        Just(Place::Latest),
        any::<u64>().prop_map(Place::Offset),
        any::<u64>().prop_map(Place::Time),
    ]
}

fn policy() -> impl Strategy<Value = TopicPolicy> {
    let durability = prop_oneof![Just(Durability::Disk), Just(Durability::Memory)];
    (any::<(u32, u64, u64, bool, u64, u8, u8)>(), durability).prop_map(|(numbers, durability)| {
        let (partitions, retention_ms, retention_bytes, trim_consumed, cache, replicas, ack_quorum) = numbers;
        let cache = CachePolicy::from_number(cache);
        TopicPolicy {
            partitions,
            durability,
            retention_ms,
            retention_bytes,
            trim_consumed,
            cache,
            replicas,
            ack_quorum,
        }
    })
}

fn partition_place() -> impl Strategy<Value = PartitionPlace> {
    (any::<(u64, u32, u64, u16, u16)>(), text()).prop_map(|((partition, index, node, shard, port), host)| {
        PartitionPlace { partition, index, node, shard, host, port }
    })
}

fn subscription_state() -> impl Strategy<Value = SubscriptionState> {
    (text(), any::<(u64, bool)>()).prop_map(|(name, (offset, connected))| SubscriptionState { name, offset, connected })
}

fn boxed<M: Specimen + 'static>(message: M) -> Box<dyn Specimen> {
    Box::new(message)
}

fn specimen_of(kind: Kind) -> BoxedStrategy<Box<dyn Specimen>> {
    match kind {
        Kind::Hello => (any::<(u8, u8)>(), text(), option::of(text()))
            .prop_map(|((version_min, version_max), client, token)| {
                boxed(Hello { version_min, version_max, client, token })
            })
            .boxed(),
        Kind::Welcome => any::<(u8, u64, u16, u16, u32, u32, u64)>()
            .prop_map(|(version, node, shard, shard_count, payload_bytes_max, in_flight_max, features)| {
                boxed(Welcome { version, node, shard, shard_count, payload_bytes_max, in_flight_max, features })
            })
            .boxed(),
        Kind::Error => (any::<(u16, u32)>(), text())
            .prop_map(|((code, retry_after_ms), text)| boxed(Error { code, retry_after_ms, text }))
            .boxed(),
        Kind::Ping => Just(()).prop_map(|()| boxed(Ping {})).boxed(),
        Kind::Pong => Just(()).prop_map(|()| boxed(Pong {})).boxed(),
        Kind::Done => Just(()).prop_map(|()| boxed(Done {})).boxed(),
        Kind::CreateTopic => (text(), policy(), any::<bool>())
            .prop_map(|(name, policy, exists_ok)| boxed(CreateTopic { name, policy, exists_ok }))
            .boxed(),
        Kind::DeleteTopic => text().prop_map(|name| boxed(DeleteTopic { name })).boxed(),
        Kind::ListTopics => (text(), text(), any::<u32>())
            .prop_map(|(prefix, after, limit)| boxed(ListTopics { prefix, after, limit }))
            .boxed(),
        Kind::Topics => {
            (vec(text(), 0..20), any::<bool>()).prop_map(|(names, more)| boxed(Topics { names, more })).boxed()
        }
        Kind::Lookup => text().prop_map(|name| boxed(Lookup { name })).boxed(),
        Kind::Topic => (any::<u64>(), text(), policy(), vec(partition_place(), 0..8))
            .prop_map(|(topic, name, policy, partitions)| boxed(Topic { topic, name, policy, partitions }))
            .boxed(),
        Kind::DescribePartition => any::<u64>().prop_map(|partition| boxed(DescribePartition { partition })).boxed(),
        Kind::PartitionState => (any::<(u64, u64, u64, u32, u64)>(), vec(subscription_state(), 0..8))
            .prop_map(|((partition, start_offset, end_offset, ledgers, stored_bytes), subscriptions)| {
                boxed(PartitionState { partition, start_offset, end_offset, ledgers, stored_bytes, subscriptions })
            })
            .boxed(),
        Kind::OpenProducer => {
            any::<(u64, u64)>().prop_map(|(partition, producer)| boxed(OpenProducer { partition, producer })).boxed()
        }
        Kind::ProducerOpened => any::<(u32, u64)>()
            .prop_map(|(epoch, next_sequence)| boxed(ProducerOpened { epoch, next_sequence }))
            .boxed(),
        Kind::Publish => any::<u64>().prop_map(|partition| boxed(Publish { partition })).boxed(),
        Kind::Published => any::<(u64, bool)>()
            .prop_map(|(base_offset, duplicate)| boxed(Published { base_offset, duplicate }))
            .boxed(),
        Kind::Fetch => any::<(u64, u64, u32, u32)>()
            .prop_map(|(partition, offset, bytes_max, wait_ms)| boxed(Fetch { partition, offset, bytes_max, wait_ms }))
            .boxed(),
        Kind::Fetched => any::<(u64, u64, u64)>()
            .prop_map(|(next_offset, start_offset, end_offset)| {
                boxed(Fetched { next_offset, start_offset, end_offset })
            })
            .boxed(),
        Kind::Locate => {
            (any::<u64>(), place()).prop_map(|(partition, place)| boxed(Locate { partition, place })).boxed()
        }
        Kind::Located => any::<(u64, u64, u64)>()
            .prop_map(|(offset, start_offset, end_offset)| boxed(Located { offset, start_offset, end_offset }))
            .boxed(),
        Kind::Subscribe => (any::<(u64, u32, bool)>(), text(), place())
            .prop_map(|((partition, consumer, take_over), subscription, start)| {
                boxed(Subscribe { partition, consumer, subscription, start, take_over })
            })
            .boxed(),
        Kind::Subscribed => any::<(u64, u64, u64)>()
            .prop_map(|(offset, start_offset, end_offset)| boxed(Subscribed { offset, start_offset, end_offset }))
            .boxed(),
        Kind::Flow => any::<(u32, u32)>().prop_map(|(consumer, bytes)| boxed(Flow { consumer, bytes })).boxed(),
        Kind::Deliver => any::<(u32, u64, u64)>()
            .prop_map(|(consumer, next_offset, end_offset)| boxed(Deliver { consumer, next_offset, end_offset }))
            .boxed(),
        Kind::Ack => any::<(u32, u64)>().prop_map(|(consumer, offset)| boxed(Ack { consumer, offset })).boxed(),
        Kind::Seek => (any::<u32>(), place()).prop_map(|(consumer, place)| boxed(Seek { consumer, place })).boxed(),
        Kind::CloseConsumer => any::<u32>().prop_map(|consumer| boxed(CloseConsumer { consumer })).boxed(),
        Kind::Damaged => any::<(u64, u32, u64, u64)>()
            .prop_map(|(partition, consumer, first_offset, next_offset)| {
                boxed(Damaged { partition, consumer, first_offset, next_offset })
            })
            .boxed(),
        Kind::DeleteSubscription => (any::<u64>(), text())
            .prop_map(|(partition, subscription)| boxed(DeleteSubscription { partition, subscription }))
            .boxed(),
    }
}

fn specimen() -> impl Strategy<Value = Box<dyn Specimen>> {
    proptest::sample::select(Kind::ALL).prop_flat_map(specimen_of)
}

fn decoded(bytes: &[u8]) -> (frame::Frame<'_>, usize) {
    match frame::decode(bytes, LIMIT) {
        Ok(Decoded::Frame(frame, taken)) => (frame, taken),
        other => panic!("not a frame: {other:?}"),
    }
}

proptest! {
    #[test]
    fn every_message_and_its_frame_round_trip(
        message in specimen(), flags: u16, correlation: u64, payload in vec(any::<u8>(), 0..200), after in vec(any::<u8>(), 0..40),
    ) {
        let mut bytes = message.frame(flags, correlation, &payload);
        let frame_bytes = bytes.len();
        prop_assert_eq!(frame_bytes % ALIGNMENT, 0);
        bytes.extend_from_slice(&after);
        let (frame, taken) = decoded(&bytes);
        prop_assert_eq!(taken, frame_bytes);
        prop_assert_eq!(frame.header.kind, message.kind());
        prop_assert_eq!((frame.header.flags, frame.header.correlation), (flags, correlation));
        prop_assert_eq!(frame.header.owner_port, 0);
        prop_assert_eq!(frame.payload, &payload[..]);
        prop_assert_eq!(&bytes[frame.payload_position()..][..payload.len()], &payload[..]);
        prop_assert!(message.reads_from(frame.body));
    }

    #[test]
    fn a_truncated_frame_asks_for_what_is_missing(message in specimen(), payload in vec(any::<u8>(), 0..100)) {
        let bytes = message.frame(0, 1, &payload);
        for have in 0..bytes.len() {
            let asked = match frame::decode(&bytes[..have], LIMIT) {
                Ok(Decoded::NeedBytes(asked)) => asked,
                other => return Err(TestCaseError::fail(format!("{have} bytes: {other:?}"))),
            };
            prop_assert_eq!(asked, if have < HEADER_BYTES { HEADER_BYTES } else { bytes.len() });
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused_or_ask_for_no_more_than_allowed(
        mut bytes in vec(any::<u8>(), 0..300), magic: bool, limit in 0..=LIMIT,
    ) {
        if magic && 6 <= bytes.len() {
            bytes[..4].copy_from_slice(&frame::MAGIC);
            bytes[4] = frame::VERSION;
            bytes[5] %= 60;
        }
        match frame::decode(&bytes, limit) {
            Ok(Decoded::Frame(_, taken)) => prop_assert!(taken <= bytes.len()),
            Ok(Decoded::NeedBytes(asked)) => {
                prop_assert!(bytes.len() < asked);
                prop_assert!(asked <= HEADER_BYTES + BODY_BYTES_MAX as usize + padded(limit as usize));
            }
            Err(error) => prop_assert!(error.code().closes_connection()),
        }
    }

    #[test]
    fn any_changed_bit_of_header_or_body_is_noticed(message in specimen(), at: Index, bit in 0..8u8) {
        let mut bytes = message.frame(3, 1, &[]);
        let (frame, _) = decoded(&bytes);
        let covered = HEADER_BYTES + frame.header.body_bytes as usize;
        bytes[at.index(covered)] ^= 1 << bit;
        match frame::decode(&bytes, LIMIT) {
            Ok(Decoded::Frame(..)) => return Err(TestCaseError::fail("taken for a good frame")),
            // A length that grew: the frame that it announces is not there yet.
            Ok(Decoded::NeedBytes(asked)) => prop_assert!(bytes.len() < asked),
            Err(_) => {}
        }
    }

    #[test]
    fn a_mutated_archive_is_refused_or_read_safely(
        message in specimen(), changes in vec((any::<Index>(), any::<u8>()), 1..6), cut in option::of(any::<Index>()), as_kind in proptest::sample::select(Kind::ALL),
    ) {
        let bytes = message.frame(0, 1, &[]);
        let mut body = decoded(&bytes).0.body.to_vec();
        for (at, value) in changes {
            if !body.is_empty() {
                let at = at.index(body.len());
                body[at] = value;
            }
        }
        if let Some(cut) = cut {
            body.truncate(cut.index(body.len() + 1));
        }
        read(message.kind(), &body);
        read(as_kind, &body);
    }

    #[test]
    fn arbitrary_bodies_are_refused_or_read_safely(kind in proptest::sample::select(Kind::ALL), body in vec(any::<u8>(), 0..200)) {
        read(kind, &body);
    }

    #[test]
    fn the_owner_port_can_be_set_afterwards(message in specimen(), port: u16) {
        let mut bytes = message.frame(0, 9, b"payload");
        frame::set_owner_port(&mut bytes, port);
        let (frame, _) = decoded(&bytes);
        prop_assert_eq!(frame.header.owner_port, port);
        prop_assert!(message.reads_from(frame.body));
    }
}

#[test]
fn limits_are_told_from_the_header_alone() {
    let mut bytes = Vec::new();
    frame::encode(&Publish { partition: 1 }, 0, 1, LIMIT + 1, &mut bytes);
    assert_eq!(
        frame::decode(&bytes[..HEADER_BYTES], LIMIT).unwrap_err(),
        FrameError::PayloadTooLarge { announced: LIMIT + 1, limit: LIMIT }
    );
    bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = frame::decode(&bytes[..HEADER_BYTES], u32::MAX).unwrap_err();
    assert_eq!(error, FrameError::BodyTooLarge { announced: u32::MAX, limit: BODY_BYTES_MAX });
    assert_eq!(error.code(), ErrorCode::FrameTooLarge);
}

#[test]
fn another_protocol_is_told_from_its_first_byte() {
    assert_eq!(frame::decode(b"G", LIMIT).unwrap_err(), FrameError::Magic(*b"G\0\0\0"));
    assert!(matches!(frame::decode(b"DRV", LIMIT), Ok(Decoded::NeedBytes(HEADER_BYTES))));
}

#[test]
fn the_largest_answers_fit_into_a_body() {
    let largest: [Box<dyn Specimen>; 3] = [
        Box::new(Topics {
            names: vec!["n".repeat(drava_protocol::topic::NAME_BYTES_MAX); TOPICS_MAX as usize],
            more: true,
        }),
        Box::new(Topic {
            topic: 1,
            name: "n".repeat(drava_protocol::topic::NAME_BYTES_MAX),
            policy: TopicPolicy::default(),
            partitions: vec![
                PartitionPlace {
                    partition: 1,
                    index: 0,
                    node: 1,
                    shard: 0,
                    host: "h".repeat(HOST_BYTES_MAX),
                    port: 1
                };
                PARTITIONS_MAX as usize
            ],
        }),
        Box::new(PartitionState {
            partition: 1,
            start_offset: 0,
            end_offset: 0,
            ledgers: 0,
            stored_bytes: 0,
            subscriptions: vec![
                SubscriptionState {
                    name: "s".repeat(SUBSCRIPTION_NAME_BYTES_MAX),
                    offset: 0,
                    connected: false
                };
                SUBSCRIPTIONS_MAX as usize
            ],
        }),
    ];
    for message in largest {
        let bytes = message.frame(0, 1, &[]);
        let Ok(Decoded::Frame(frame, _)) = frame::decode(&bytes, PAYLOAD_BYTES_MAX_DEFAULT) else {
            panic!("{:?} does not decode", message.kind());
        };
        assert!(message.reads_from(frame.body));
    }
}

#[test]
fn a_body_that_is_too_large_leaves_the_buffer_as_it_was() {
    let mut out = b"before".to_vec();
    let error = frame::try_encode(&Lookup { name: "n".repeat(BODY_BYTES_MAX as usize) }, 0, 1, 0, &mut out);
    assert!(matches!(error, Err(FrameError::BodyTooLarge { .. })));
    assert_eq!(out, b"before");
}

#[test]
fn two_strings_may_not_share_their_bytes() {
    // Strings that overlap would let a small body unpack into a large copy.
    let mut bytes = Vec::new();
    frame::encode(&Topics { names: vec!["x".repeat(40); 2], more: false }, 0, 1, 0, &mut bytes);
    let mut body = decoded(&bytes).0.body.to_vec();
    assert!(read(Kind::Topics, &body));
    // The strings lie at 0 and 40, their 8-byte headers at 80 and 88: length, then distance.
    let distance = i32::from_le_bytes(body[92..96].try_into().unwrap());
    body[92..96].copy_from_slice(&(distance - 40).to_le_bytes());
    assert!(!read(Kind::Topics, &body));
}
