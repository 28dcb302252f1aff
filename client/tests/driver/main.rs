//! The tokio driver against a node in memory that breaks, moves, refuses and stalls.

mod fake;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use drava_client::{
    Client, Compression, ConnectError, Consumer, ErrorCode, OpenProducerError, Place, Producer, ReadError, Record,
    Retry, SendError, SubscribeError, TopicError, TopicPolicy,
};
use fake::{FakeNode, Publishes};

const TOPIC: &str = "/public/default/orders";

async fn node_with_topic(partitions: u32) -> (FakeNode, Client) {
    let node = FakeNode::start().await;
    let client = client(&node).await;
    client.create_topic("orders", TopicPolicy { partitions, ..TopicPolicy::default() }).await.unwrap();
    (node, client)
}

/// A client with connections of its own.
async fn client(node: &FakeNode) -> Client {
    let (min, max) = (Duration::from_millis(1), Duration::from_millis(4));
    Client::builder(node.address()).backoff(min, max).connect().await.unwrap()
}

/// Enqueues the numbers as text and waits for all receipts; their offsets.
async fn publish(producer: &Producer, numbers: std::ops::Range<u64>) -> Vec<u64> {
    let mut pending = Vec::new();
    for number in numbers {
        pending.push(producer.enqueue(number.to_string()).await.unwrap());
    }
    producer.flush().await.unwrap();
    let mut offsets = Vec::new();
    for receipt in pending {
        offsets.push(receipt.await.unwrap().offset.unwrap());
    }
    offsets
}

fn texts(numbers: std::ops::Range<u64>) -> Vec<String> {
    numbers.map(|number| number.to_string()).collect()
}

fn stored(node: &FakeNode) -> Vec<String> {
    node.with_partition(TOPIC, 0, |partition| partition.payloads())
}

async fn take(consumer: &mut Consumer, count: usize) -> Vec<String> {
    let mut payloads = Vec::new();
    for _ in 0..count {
        let message = consumer.next().await.unwrap();
        payloads.push(String::from_utf8(message.payload.to_vec()).unwrap());
    }
    payloads
}

#[tokio::test]
async fn topics_are_created_listed_described_and_deleted() {
    let (_node, client) = node_with_topic(3).await;
    for name in ["a", "b", "c", "d"] {
        client.create_topic(name, TopicPolicy::default()).await.unwrap();
    }
    let exists = client.create_topic("orders", TopicPolicy::default()).await.unwrap_err();
    assert!(matches!(&exists, TopicError::TopicExists(name) if name == "orders"), "{exists}");
    assert_eq!(client.ensure_topic("orders", TopicPolicy::default()).await.unwrap().partitions.len(), 3);
    let names: Vec<String> = ["a", "b", "c", "d", "orders"].map(|name| format!("/public/default/{name}")).into();
    assert_eq!(client.list_topics("").await.unwrap(), names);
    assert_eq!(client.list_topics("/public/default/o").await.unwrap(), [TOPIC]);
    assert_eq!(client.describe("orders").await.unwrap().len(), 3);
    client.delete_topic("orders").await.unwrap();
    let unknown = client.lookup("orders").await.unwrap_err();
    assert!(matches!(unknown, TopicError::UnknownTopic(_)), "{unknown}");
    assert_eq!(unknown.retry(), Retry::No);
    assert!(matches!(client.lookup("no good").await, Err(TopicError::Name(_))));
}

#[tokio::test]
async fn a_client_without_rights_is_told_so() {
    let node = FakeNode::start().await;
    let refused = Client::builder(node.address()).token("wrong").connect().await.unwrap_err();
    assert!(matches!(refused, ConnectError::Refused(_)), "{refused}");
    assert_eq!((refused.code(), refused.retry()), (Some(ErrorCode::Unauthenticated), Retry::No));
    assert!(matches!(Client::connect("nonsense").await, Err(ConnectError::Address(_))));
}

#[tokio::test]
async fn receipts_tell_the_offsets_of_records() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").batch_count(7).compression(Compression::Lz4).build().await.unwrap();
    assert_eq!(producer.send("first").await.unwrap().offset, Some(0));
    assert_eq!(publish(&producer, 0..100).await, (1..101).collect::<Vec<_>>());
    assert_eq!(stored(&node)[1..], texts(0..100));
}

#[tokio::test]
async fn records_of_a_key_share_a_partition_and_those_without_go_round() {
    let (_node, client) = node_with_topic(4).await;
    let producer = client.producer("orders").build().await.unwrap();
    for key in ["a", "b", "c", "d", "e"] {
        let expected = drava_client::partition_of_key(key.as_bytes(), 4);
        for _ in 0..3 {
            assert_eq!(producer.send(Record::new("x").key(key)).await.unwrap().partition, expected);
        }
    }
    let mut counts = BTreeMap::new();
    for _ in 0..40 {
        *counts.entry(producer.send("x").await.unwrap().partition).or_insert(0) += 1;
    }
    assert_eq!(counts, BTreeMap::from([(0, 10), (1, 10), (2, 10), (3, 10)]), "each was sent alone, so each had a turn");
}

#[tokio::test]
async fn every_record_is_stored_once_and_in_order_though_connections_break() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").batch_count(5).build().await.unwrap();
    node.with(|state| state.publishes = Publishes::BreakEach(17));
    assert_eq!(publish(&producer, 0..3000).await, (0..3000).collect::<Vec<_>>());
    assert_eq!(stored(&node), texts(0..3000));
    assert!(600 < node.with(|state| state.publishes_seen), "some were sent again");
}

#[tokio::test]
async fn a_partition_that_moved_is_found_again() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").batch_count(5).build().await.unwrap();
    let lookups = node.with(|state| state.lookups);
    assert_eq!(publish(&producer, 0..100).await, (0..100).collect::<Vec<_>>());
    assert_eq!(node.with(|state| state.lookups), lookups);
    node.with_partition(TOPIC, 0, |partition| partition.owner = 1);
    assert_eq!(publish(&producer, 100..200).await, (100..200).collect::<Vec<_>>());
    assert_eq!(stored(&node), texts(0..200));
    assert!(lookups < node.with(|state| state.lookups));
    assert_eq!(node.with_partition(TOPIC, 0, |partition| partition.came_to.last().copied()), Some(1));
}

#[tokio::test]
async fn a_core_that_forwards_is_left_for_the_owner() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").batch_count(5).build().await.unwrap();
    node.with(|state| state.forwards = true);
    node.with_partition(TOPIC, 0, |partition| partition.owner = 1);
    assert_eq!(publish(&producer, 0..500).await, (0..500).collect::<Vec<_>>());
    assert_eq!(publish(&producer, 500..600).await, (500..600).collect::<Vec<_>>());
    assert_eq!(stored(&node), texts(0..600));
    let came_to = node.with_partition(TOPIC, 0, |partition| partition.came_to.clone());
    assert_eq!((came_to.first(), came_to.last()), (Some(&0), Some(&1)));
    assert!(came_to.is_sorted(), "nothing goes the old way after the first that went the new");
}

#[tokio::test]
async fn a_node_that_shuts_down_and_comes_back_loses_nothing() {
    let (node, client) = node_with_topic(1).await;
    let producer = Arc::new(client.producer("orders").batch_count(5).build().await.unwrap());
    node.with(|state| state.publishes = Publishes::Refused(ErrorCode::ShuttingDown));
    let publishing = tokio::spawn({
        let producer = producer.clone();
        async move { publish(&producer, 0..500).await }
    });
    node.wait_for(|state| 10 < state.publishes_seen).await;
    node.cut_connections();
    node.with(|state| state.publishes = Publishes::Refused(ErrorCode::Busy));
    let seen = node.with(|state| state.publishes_seen);
    node.wait_for(|state| seen + 10 < state.publishes_seen).await;
    node.with(|state| state.publishes = Publishes::Served);
    assert_eq!(publishing.await.unwrap(), (0..500).collect::<Vec<_>>());
    assert_eq!(stored(&node), texts(0..500));
}

#[tokio::test]
async fn a_slow_node_holds_its_producers_back() {
    let (node, client) = node_with_topic(1).await;
    let builder = client.producer("orders").batch_count(5).window(1 << 20, 4);
    let producer = Arc::new(builder.build().await.unwrap());
    node.with(|state| state.publishes = Publishes::Held);
    let taken = Arc::new(AtomicU64::new(0));
    let publishing = tokio::spawn({
        let (producer, taken) = (producer.clone(), taken.clone());
        async move {
            for number in 0..200u64 {
                drop(producer.enqueue(number.to_string()).await.unwrap());
                taken.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    // Four batches on their way and one that fills.
    while taken.load(Ordering::Relaxed) < 25 {
        tokio::task::yield_now().await;
    }
    for _ in 0..10_000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(taken.load(Ordering::Relaxed), 25);
    node.with(|state| state.publishes = Publishes::Served);
    publishing.await.unwrap();
    producer.flush().await.unwrap();
    assert_eq!(stored(&node), texts(0..200));
}

#[tokio::test]
async fn a_producer_that_gets_no_ack_gives_up() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").delivery_timeout(Duration::from_millis(30)).build().await.unwrap();
    node.with(|state| state.publishes = Publishes::Held);
    assert!(matches!(producer.send("x").await, Err(SendError::TimedOut { .. })));
    node.with(|state| state.publishes = Publishes::Served);
    assert!(matches!(producer.send("y").await, Err(SendError::TimedOut { .. })), "its sequences are uncertain now");
}

#[tokio::test]
async fn a_producer_is_fenced_by_the_next_of_its_id() {
    let (node, client) = node_with_topic(1).await;
    let first = client.producer("orders").id(5).build().await.unwrap();
    assert_eq!(publish(&first, 0..10).await.len(), 10);
    let second = client.producer("orders").id(5).build().await.unwrap();
    let fenced = first.send("late").await.unwrap_err();
    assert!(matches!(fenced, SendError::Fenced(_)), "{fenced}");
    assert_eq!((fenced.code(), fenced.retry()), (Some(ErrorCode::ProducerFenced), Retry::No));
    assert!(matches!(first.flush().await, Err(SendError::Fenced(_))));
    assert_eq!(publish(&second, 10..20).await, (10..20).collect::<Vec<_>>());
    assert_eq!(stored(&node), texts(0..20));
}

#[tokio::test]
async fn what_ends_a_producer_is_told_apart() {
    let (node, client) = node_with_topic(1).await;
    let unknown = client.producer("nothing").build().await.unwrap_err();
    assert!(matches!(unknown, OpenProducerError::Topic(TopicError::UnknownTopic(_))), "{unknown}");
    let producer = client.producer("orders").build().await.unwrap();
    let too_large = producer.send(vec![0; 1 << 20]).await.unwrap_err();
    assert!(matches!(too_large, SendError::TooLarge { batch_bytes_max: 65536, .. }), "{too_large}");
    producer.send("fits").await.unwrap();
    node.with_partition(TOPIC, 0, |partition| partition.producers.clear());
    let forgotten = producer.send("x").await.unwrap_err();
    assert!(matches!(forgotten, SendError::SequenceGap(_)), "{forgotten}");
    let producer = client.producer("orders").build().await.unwrap();
    client.delete_topic("orders").await.unwrap();
    let gone = producer.send("x").await.unwrap_err();
    assert!(matches!(gone, SendError::UnknownTopic(_)), "{gone}");
}

#[tokio::test]
async fn a_dropped_producer_sends_what_it_took() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").linger(Duration::from_secs(3600)).build().await.unwrap();
    for number in 0..10u64 {
        drop(producer.enqueue(number.to_string()).await.unwrap());
    }
    drop(producer);
    node.wait_for(|state| state.partitions.values().all(|partition| partition.end_offset == 10)).await;
    assert_eq!(stored(&node), texts(0..10));
}

#[tokio::test]
async fn a_reader_reads_from_any_place_and_ends_where_it_was_told() {
    let (_node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").batch_count(10).build().await.unwrap();
    publish(&producer, 0..100).await;
    for (place, first) in [(Place::Earliest, 0), (Place::Offset(37), 37), (Place::Latest, 100), (Place::Time(0), 0)] {
        let mut reader = client.reader("orders").from(place).until_end().build().await.unwrap();
        let mut offsets = Vec::new();
        while let Some(message) = reader.next().await.unwrap() {
            assert_eq!(message.payload, message.offset.to_string());
            offsets.push(message.offset);
        }
        assert_eq!(offsets, (first..100).collect::<Vec<_>>(), "{place:?}");
    }
    let mut reader = client.reader("orders").from(Place::Offset(500)).build().await.unwrap();
    let beyond = reader.next().await.unwrap_err();
    assert!(matches!(beyond, ReadError::OutOfRange { partition: 0, offset: 500, .. }), "{beyond}");
    let none = client.reader("orders").partition(3).build().await.unwrap_err();
    assert!(matches!(none, ReadError::Topic(TopicError::UnknownPartition { .. })), "{none}");
}

#[tokio::test]
async fn a_reader_follows_all_partitions_through_lost_connections_and_moves() {
    let (node, client) = node_with_topic(3).await;
    let producer = client.producer("orders").batch_count(5).build().await.unwrap();
    let mut reader = client.reader("orders").build().await.unwrap();
    let mut next = [0; 3];
    let mut seen = Vec::new();
    for round in 0..5u64 {
        let mut sent = Vec::new();
        for number in round * 100..round * 100 + 100 {
            sent.push(producer.enqueue(number.to_string()).await.unwrap());
        }
        producer.flush().await.unwrap();
        for _ in 0..100 {
            let message = reader.next().await.unwrap().unwrap();
            assert_eq!(message.offset, next[message.partition as usize], "none skipped, none twice");
            next[message.partition as usize] += 1;
            seen.push(String::from_utf8(message.payload.to_vec()).unwrap().parse::<u64>().unwrap());
        }
        node.with_partition(TOPIC, 1, |partition| partition.owner = round as usize % 2);
        node.cut_connections();
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..500).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_subscription_goes_on_where_its_last_consumer_acked() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").batch_count(4).build().await.unwrap();
    publish(&producer, 0..20).await;
    let mut consumer = client.subscribe("orders", "s").build().await.unwrap();
    let mut last = None;
    for _ in 0..7 {
        last = Some(consumer.next().await.unwrap());
    }
    consumer.ack(&last.unwrap());
    assert_eq!(take(&mut consumer, 5).await, texts(7..12), "taken and not acked");
    consumer.close().await.unwrap();
    assert_eq!(node.with_partition(TOPIC, 0, |partition| partition.subscriptions["s"].cursor), 7);
    let mut consumer = client.subscribe("orders", "s").build().await.unwrap();
    assert_eq!(take(&mut consumer, 13).await, texts(7..20));
    publish(&producer, 20..25).await;
    assert_eq!(take(&mut consumer, 5).await, texts(20..25));
}

#[tokio::test]
async fn a_consumer_seeks_back_and_forth_and_gets_nothing_of_the_old_place() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").batch_count(4).build().await.unwrap();
    publish(&producer, 0..1000).await;
    // Fewer bytes than the partition has: seeking has to give back the credit of what it throws away.
    let mut consumer = client.subscribe("orders", "s").window_bytes(2000).build().await.unwrap();
    assert_eq!(take(&mut consumer, 100).await, texts(0..100));
    for (place, offset) in
        [(Place::Offset(10), 10), (Place::Offset(701), 701), (Place::Earliest, 0), (Place::Offset(2), 2)].repeat(5)
    {
        consumer.ack_below(0, 600);
        assert_eq!(consumer.seek(0, place).await.unwrap(), offset);
        assert_eq!(take(&mut consumer, 50).await, texts(offset..offset + 50));
    }
    assert_eq!(
        node.with_partition(TOPIC, 0, |partition| partition.subscriptions["s"].cursor),
        2,
        "acks before are void"
    );
    let message = consumer.next().await.unwrap();
    consumer.ack(&message);
    consumer.flush().await.unwrap();
    assert_eq!(node.with_partition(TOPIC, 0, |partition| partition.subscriptions["s"].cursor), 53);

    assert_eq!(consumer.seek(0, Place::Latest).await.unwrap(), 1000);
    publish(&producer, 1000..1010).await;
    assert_eq!(take(&mut consumer, 10).await, texts(1000..1010));
    assert!(matches!(consumer.seek(1, Place::Earliest).await, Err(SubscribeError::Closed)));
}

#[tokio::test]
async fn a_seek_survives_a_lost_connection() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").batch_count(4).build().await.unwrap();
    publish(&producer, 0..100).await;
    let mut consumer = client.subscribe("orders", "s").build().await.unwrap();
    for offset in [40, 20, 60, 0, 80] {
        let cut = {
            let node = node.clone();
            async move { node.cut_connections() }
        };
        let (sought, ()) = tokio::join!(consumer.seek(0, Place::Offset(offset)), cut);
        assert_eq!(sought.unwrap(), offset);
        assert_eq!(take(&mut consumer, 10).await, texts(offset..offset + 10));
    }
}

#[tokio::test]
async fn a_consumer_goes_on_through_lost_connections_and_moves_without_skipping() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").batch_count(3).build().await.unwrap();
    let mut consumer = client.subscribe("orders", "s").window_bytes(400).build().await.unwrap();
    for round in 0..8u64 {
        publish(&producer, round * 50..round * 50 + 50).await;
        for number in round * 50..round * 50 + 50 {
            let message = consumer.next().await.unwrap();
            assert_eq!((message.offset, &message.payload[..]), (number, number.to_string().as_bytes()));
            if number % 10 == 3 {
                consumer.ack(&message);
            }
            if number % 16 == 7 {
                node.with_partition(TOPIC, 0, |partition| partition.owner = round as usize % 2);
                node.cut_connections();
            }
        }
    }
    consumer.flush().await.unwrap();
    assert_eq!(node.with_partition(TOPIC, 0, |partition| partition.subscriptions["s"].cursor), 394);
    let overrun = node.with(|state| state.overrun_max);
    assert!(overrun <= 200, "{overrun} bytes beyond the credit, one batch is less");
}

#[tokio::test]
async fn a_consumer_that_takes_nothing_is_sent_no_more_than_its_window() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").batch_count(1).build().await.unwrap();
    let mut consumer = client.subscribe("orders", "s").window_bytes(1000).build().await.unwrap();
    publish(&producer, 0..200).await;
    // What is not acked is not lost: it comes as the application takes it.
    assert_eq!(take(&mut consumer, 200).await, texts(0..200));
    assert!(node.with(|state| state.overrun_max) < 200);
}

#[tokio::test]
async fn a_subscription_is_exclusive_and_can_be_taken_over() {
    let (_node, first_client) = node_with_topic(1).await;
    let producer = first_client.producer("orders").build().await.unwrap();
    publish(&producer, 0..3).await;
    let mut first = first_client.subscribe("orders", "s").build().await.unwrap();
    let message = first.next().await.unwrap();
    let busy = first_client.subscribe("orders", "s").build().await.unwrap_err();
    assert!(matches!(busy, SubscribeError::Busy(_)), "{busy}");
    let mut second = first_client.subscribe("orders", "s").take_over().build().await.unwrap();
    first.ack(&message);
    let lost = first.flush().await.unwrap_err();
    assert!(matches!(lost, SubscribeError::Lost(_)), "{lost}");
    assert_eq!(take(&mut second, 3).await, texts(0..3));
    assert!(matches!(first_client.subscribe("orders", "").build().await, Err(SubscribeError::Name(0))));
}

#[tokio::test]
async fn a_dropped_consumer_lets_its_subscription_go() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").build().await.unwrap();
    publish(&producer, 0..3).await;
    let mut consumer = client.subscribe("orders", "s").build().await.unwrap();
    let message = consumer.next().await.unwrap();
    consumer.ack(&message);
    drop(consumer);
    node.wait_for(|state| state.partitions.values().all(|partition| partition.subscriptions["s"].holder.is_none()))
        .await;
    assert_eq!(node.with_partition(TOPIC, 0, |partition| partition.subscriptions["s"].cursor), 1);
    client.delete_subscription("orders", "s").await.unwrap();
    assert!(node.with_partition(TOPIC, 0, |partition| partition.subscriptions.is_empty()));
}

#[tokio::test]
async fn damage_is_told_and_never_passed_over() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").batch_count(5).build().await.unwrap();
    publish(&producer, 0..50).await;
    node.with_partition(TOPIC, 0, |partition| *partition.batches[2].last_mut().unwrap() ^= 1);
    let mut reader = client.reader("orders").until_end().build().await.unwrap();
    for number in 0..10 {
        assert_eq!(reader.next().await.unwrap().unwrap().offset, number);
    }
    let damaged = reader.next().await.unwrap_err();
    assert!(matches!(damaged, ReadError::Batch { partition: 0, offset: 10, .. }), "{damaged}");
    assert!(reader.next().await.unwrap().is_none(), "what comes after is not read");
    let mut after = client.reader("orders").from(Place::Offset(15)).until_end().build().await.unwrap();
    assert_eq!(after.next().await.unwrap().unwrap().offset, 15);
    let mut consumer = client.subscribe("orders", "s").build().await.unwrap();
    for _ in 0..10 {
        let message = consumer.next().await.unwrap();
        consumer.ack(&message);
    }
    assert!(matches!(consumer.next().await, Err(SubscribeError::Batch { partition: 0, offset: 10, .. })));
    assert!(matches!(consumer.next().await, Err(SubscribeError::Closed)));
    node.wait_for(|state| state.partitions.values().all(|partition| partition.subscriptions["s"].cursor == 10)).await;
}

#[tokio::test]
async fn a_consumer_that_closes_while_its_node_is_away_is_told_so() {
    let (node, client) = node_with_topic(1).await;
    let producer = client.producer("orders").build().await.unwrap();
    publish(&producer, 0..3).await;
    let mut consumer = client.subscribe("orders", "s").build().await.unwrap();
    let message = consumer.next().await.unwrap();
    let other = self::client(&node).await;
    node.cut_connections();
    // Somebody else has the subscription now, so that it cannot be had again.
    let _busy = loop {
        match other.subscribe("orders", "s").take_over().build().await {
            Ok(consumer) => break consumer,
            Err(error) => assert_ne!(error.retry(), Retry::No, "{error}"),
        }
    };
    consumer.ack(&message);
    let error = consumer.close().await.unwrap_err();
    assert!(matches!(error, SubscribeError::Call(_) | SubscribeError::Lost(_)), "{error}");
    assert_eq!(node.with_partition(TOPIC, 0, |partition| partition.subscriptions["s"].cursor), 0);
}
