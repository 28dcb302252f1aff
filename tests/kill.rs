//! kill -9 under load, again and again: nothing acknowledged is lost, nothing is stored twice, no offset is used again.

mod common;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{Node, NodeOptions, Wire, batch_of, records_of};
use drava_protocol::batch::Seal;
use drava_protocol::message::{Fetch, Publish, Published, TopicPolicy};

/// `DRAVA_KILL_ROUNDS` for the long form.
const ROUNDS: u64 = 30;
const PRODUCERS: u64 = 6;
const PARTITIONS: u32 = 4;
/// Batches that a producer has in flight.
const WINDOW: usize = 32;

/// One producer over all rounds: what it sent, and what it was told.
struct Producer {
    id: u64,
    partition_index: usize,
    /// Sequence of the next new message.
    next_sequence: u64,
    /// Base sequence and records of batches that were not answered yet, in order.
    unanswered: VecDeque<(u64, u64)>,
    /// Offset by sequence, of every message that was acknowledged.
    acked: BTreeMap<u64, u64>,
    duplicates: u64,
}

impl Producer {
    fn payload(id: u64, sequence: u64) -> Vec<u8> {
        // Of different sizes, so that entries lie everywhere in their blocks.
        let mut payload = format!("{id}:{sequence}:").into_bytes();
        payload.resize(payload.len() + (sequence * 37 % 1500) as usize, b'.');
        payload
    }

    fn batch(&self, base_sequence: u64, records: u64) -> Vec<u8> {
        let payloads: Vec<_> = (0..records).map(|i| Self::payload(self.id, base_sequence + i)).collect();
        batch_of(&Seal { producer: self.id, base_sequence, ..Seal::default() }, &payloads)
    }

    /// Publishes until the connection breaks. First again what was not answered, under the same sequences.
    fn run(&mut self, address: SocketAddr, partition: u64, stop: &AtomicBool, acks: &AtomicU64) -> std::io::Result<()> {
        let mut wire = Wire::connect(address)?;
        let mut in_flight = 0;
        for &(base_sequence, records) in &self.unanswered {
            wire.send(&Publish { partition }, &self.batch(base_sequence, records))?;
            in_flight += 1;
        }
        while !stop.load(Ordering::Relaxed) {
            while in_flight < WINDOW {
                let records = self.next_sequence % 5 + 1;
                let batch = self.batch(self.next_sequence, records);
                self.unanswered.push_back((self.next_sequence, records));
                self.next_sequence += records;
                wire.send(&Publish { partition }, &batch)?;
                in_flight += 1;
            }
            let Published { base_offset, duplicate } = expect!(wire.receive()?, Published);
            in_flight -= 1;
            let (base_sequence, records) = self.unanswered.pop_front().expect("an answer to something sent");
            self.duplicates += u64::from(duplicate);
            assert_ne!(base_offset, u64::MAX, "a recent duplicate is answered with its offset");
            for i in 0..records {
                self.acked.insert(base_sequence + i, base_offset + i);
            }
            acks.fetch_add(records, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[test]
fn nothing_acknowledged_is_lost_over_rounds_of_kill_9() {
    let rounds = std::env::var("DRAVA_KILL_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let dir = tempfile::tempdir().unwrap();
    // A small segment and a small index flush: every round crosses segments, and replays start in different places.
    let options = NodeOptions::new(dir.path()).with("DRAVA_STORAGE_INDEX_FLUSH_BYTES", 16 << 20);
    let mut producers: Vec<Producer> = (0..PRODUCERS)
        .map(|i| Producer {
            id: i + 1,
            partition_index: i as usize % PARTITIONS as usize,
            next_sequence: 0,
            unanswered: VecDeque::new(),
            acked: BTreeMap::new(),
            duplicates: 0,
        })
        .collect();
    let acks = Arc::new(AtomicU64::new(0));
    for round in 0..rounds {
        let node = Node::start(&options);
        let policy = TopicPolicy { partitions: PARTITIONS, ..TopicPolicy::default() };
        let topic = node.connect().topic("kill", policy);
        let stop = AtomicBool::new(false);
        let before = acks.load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            for producer in &mut producers {
                let place = topic.partitions[producer.partition_index].clone();
                let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), place.port);
                let (stop, acks) = (&stop, &acks);
                // The connection breaks when the node is killed: that is the point.
                scope.spawn(move || drop(producer.run(address, place.partition, stop, acks)));
            }
            // Load first, then the kill, at a moment that differs from round to round.
            while acks.load(Ordering::Relaxed) < before + 200 {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(20 + round * 29 % 170));
            node.kill();
            stop.store(true, Ordering::Relaxed);
        });
    }

    let node = Node::start(&options);
    let topic = node.connect().lookup("kill");
    let mut checked = 0;
    for (index, place) in topic.partitions.iter().enumerate() {
        let mut wire = Wire::connect(SocketAddr::new(node.listen.ip(), place.port)).unwrap();
        let stored = read_sequences(&mut wire, place.partition);
        for producer in producers.iter().filter(|producer| producer.partition_index == index) {
            let mut expected_sequence = 0;
            let mut offsets = BTreeMap::new();
            for (offset, (id, sequence)) in &stored {
                if *id == producer.id {
                    assert_eq!(
                        *sequence, expected_sequence,
                        "producer {id} at offset {offset}: lost, doubled or reordered"
                    );
                    expected_sequence += 1;
                    offsets.insert(*sequence, *offset);
                }
            }
            for (sequence, offset) in &producer.acked {
                assert_eq!(offsets.get(sequence), Some(offset), "producer {} was acknowledged {sequence}", producer.id);
                checked += 1;
            }
        }
    }
    let duplicates: u64 = producers.iter().map(|producer| producer.duplicates).sum();
    println!(
        "{rounds} rounds of kill -9: {checked} acknowledged messages checked, {duplicates} batches answered as duplicates"
    );
    assert!(rounds * 200 <= checked, "the load was too small to prove anything");
}

/// Producer and sequence by offset; every offset once and without a gap, every payload whole.
fn read_sequences(wire: &mut Wire, partition: u64) -> BTreeMap<u64, (u64, u64)> {
    let mut found = BTreeMap::new();
    let mut offset = 0;
    loop {
        let answer = wire.call(&Fetch { partition, offset, bytes_max: 1 << 20, wait_ms: 0 }).unwrap();
        let payload = answer.payload.clone();
        let fetched = expect!(answer, Fetched);
        for (at, bytes) in records_of(&payload) {
            if at < offset {
                continue;
            }
            assert_eq!(at, found.len() as u64, "offsets are dense");
            let text = String::from_utf8(bytes.clone()).unwrap();
            let mut parts = text.split(':');
            let mut number = || parts.next().unwrap().parse::<u64>().unwrap();
            let (id, sequence) = (number(), number());
            assert_eq!(bytes, Producer::payload(id, sequence), "the payload at offset {at} is not what was sent");
            found.insert(at, (id, sequence));
        }
        if fetched.next_offset == offset {
            return found;
        }
        offset = fetched.next_offset;
    }
}
