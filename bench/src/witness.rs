//! Producers that remember what they were told, and the check of a node against it.
//!
//! 1. Each [`Producer`] publishes idempotently to one partition. A payload tells who sent it, and in which place.
//! 2. [`Witness::publish_while`] lets all of them publish while something happens to the node. What was not answered when a
//!    connection broke is sent again under the same sequences the next time, as a client does.
//! 3. [`Acks`] holds the offset of every acknowledged message; a copy taken at any moment says what must be there.
//! 4. [`check`] reads all that a node has and compares: nothing acknowledged is gone or elsewhere, nothing is there twice
//!    or out of order, and every byte is what was sent.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use drava_client::session::Answer;
use drava_protocol::batch::{self, BatchError, Builder, NewRecord, Records, Seal};
use drava_protocol::frame;
use drava_protocol::message::{CreateTopic, Lookup, Topic, TopicPolicy};
use rustc_hash::FxHashSet;

use crate::blocking::{Blocking, BlockingError};

const PARTITIONS: u32 = 4;
const PRODUCERS: u64 = 6;
/// Batches that a producer has in flight.
const WINDOW: usize = 32;
const RECORDS_MAX: u64 = 5;
/// Payloads differ in size, so that entries lie everywhere in their blocks.
const PAYLOAD_BYTES_MAX: u64 = 1500;
const BATCH_BYTES_MAX: usize = 1 << 20;
/// What an unpacked batch may have; these are small and not packed.
const UNPACKED_BYTES_MAX: u32 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    #[error(transparent)]
    Node(#[from] BlockingError),
    #[error("the node answered batch {answered} of producer {producer} where {expected:?} was the next")]
    Order { producer: u64, answered: u64, expected: Option<u64> },
    #[error("batch {base_sequence} of producer {producer} was answered as a duplicate without its offset")]
    Forgotten { producer: u64, base_sequence: u64 },
    #[error("partition {partition} gave a batch that is none at offset {offset}")]
    Batch {
        partition: u64,
        offset: u64,
        #[source]
        source: BatchError,
    },
}

/// The producers of one topic over all the lives of a node.
pub struct Witness {
    topic: String,
    producers: Vec<Producer>,
    acks: Acks,
}

/// One producer: what it sent, and what was not answered.
struct Producer {
    id: u64,
    /// Sequence of the next new message.
    next_sequence: u64,
    /// Base sequence and count of records of batches that were not answered yet, in order.
    unanswered: VecDeque<(u64, u64)>,
}

/// What was acknowledged. Producers add to it while they publish.
#[derive(Debug)]
pub struct Acks {
    /// By producer: the offset of each acknowledged message, by sequence.
    offsets: Vec<Mutex<Vec<u64>>>,
    messages: AtomicU64,
    duplicates: AtomicU64,
}

/// What was acknowledged up to a moment.
#[derive(Clone, Debug)]
pub struct Told {
    offsets: Vec<Vec<u64>>,
}

/// What a node has, beside what it had acknowledged.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Acknowledged messages that were looked for.
    pub acked: u64,
    /// Messages that are there, acknowledged or not.
    pub stored: u64,
    /// Acknowledged, and nowhere.
    pub lost: u64,
    /// Stored more than once.
    pub doubled: u64,
    /// Acknowledged offsets that hold another message now.
    pub reused_offsets: u64,
    /// Stored before an earlier one of the same producer, or without it.
    pub out_of_order: u64,
    /// Not what was sent.
    pub changed: u64,
    /// Offsets that were skipped.
    pub gaps: u64,
    pub first_fault: Option<String>,
}

impl Findings {
    pub fn faults(&self) -> u64 {
        self.lost + self.doubled + self.reused_offsets + self.out_of_order + self.changed + self.gaps
    }

    fn fault(&mut self, count: impl FnOnce(&mut Findings) -> &mut u64, text: impl FnOnce() -> String) {
        *count(self) += 1;
        self.first_fault.get_or_insert_with(text);
    }
}

impl Acks {
    /// Messages that were acknowledged so far.
    pub fn messages(&self) -> u64 {
        self.messages.load(Ordering::Relaxed)
    }

    /// Batches that were answered as duplicates: they were stored before a connection broke, and answered after.
    pub fn duplicates(&self) -> u64 {
        self.duplicates.load(Ordering::Relaxed)
    }

    /// All that was acknowledged before this call.
    pub fn told(&self) -> Told {
        let offsets = self.offsets.iter().map(|offsets| offsets.lock().expect("a producer panicked").clone());
        Told { offsets: offsets.collect() }
    }
}

impl Witness {
    pub fn new(topic: &str) -> Witness {
        let producers = (1..=PRODUCERS).map(|id| Producer { id, next_sequence: 0, unanswered: VecDeque::new() });
        let offsets = (0..PRODUCERS).map(|_| Mutex::new(Vec::new())).collect();
        let acks = Acks { offsets, messages: AtomicU64::new(0), duplicates: AtomicU64::new(0) };
        Witness { topic: topic.to_owned(), producers: producers.collect(), acks }
    }

    pub fn acks(&self) -> &Acks {
        &self.acks
    }

    /// Lets all producers publish to the node at `address` while `happening` runs. The node may end meanwhile; whatever else
    /// goes wrong is an error.
    pub fn publish_while<R>(
        &mut self,
        address: SocketAddr,
        happening: impl FnOnce(&Acks) -> R,
    ) -> Result<R, WitnessError> {
        let topic = make_topic(address, &self.topic)?;
        let stop = AtomicBool::new(false);
        let acks = &self.acks;
        std::thread::scope(|scope| {
            let running: Vec<_> = self
                .producers
                .iter_mut()
                .map(|producer| {
                    let place = &topic.partitions[partition_of(producer.id) as usize];
                    let (stop, owner) = (&stop, SocketAddr::new(address.ip(), place.port));
                    scope.spawn(move || producer.publish(owner, place.partition, acks, stop))
                })
                .collect();
            let stopping = StopOnDrop(&stop);
            let happened = happening(acks);
            drop(stopping);
            for producer in running {
                match producer.join().expect("a producer panicked") {
                    // The node ended: that is the point.
                    Ok(()) | Err(WitnessError::Node(BlockingError::Connection(_))) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(happened)
        })
    }
}

/// Ends the producers also when what happens meanwhile panics.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Producer {
    /// Publishes until it is stopped or the connection breaks. First again what was not answered.
    fn publish(
        &mut self,
        owner: SocketAddr,
        partition: u64,
        acks: &Acks,
        stop: &AtomicBool,
    ) -> Result<(), WitnessError> {
        let mut node = Blocking::connect(owner)?;
        for &(base_sequence, records) in &self.unanswered {
            node.publish(partition, &self.batch(base_sequence, records), base_sequence)?;
        }
        while !stop.load(Ordering::Relaxed) {
            while self.unanswered.len() < WINDOW {
                let (base_sequence, records) = (self.next_sequence, self.next_sequence % RECORDS_MAX + 1);
                self.next_sequence += records;
                // Noted before it is sent: a batch that went out in part may be stored.
                self.unanswered.push_back((base_sequence, records));
                node.publish(partition, &self.batch(base_sequence, records), base_sequence)?;
            }
            let (answered, answer, _) = node.answer()?;
            self.note(answered, answer, acks)?;
        }
        Ok(())
    }

    fn note(&mut self, answered: u64, answer: Answer, acks: &Acks) -> Result<(), WitnessError> {
        let producer = self.id;
        let Answer::Published { base_offset, duplicate } = answer else {
            return Err(BlockingError::Unexpected(Box::new(answer)).into());
        };
        let next = self.unanswered.pop_front();
        let Some((_, records)) = next.filter(|(base_sequence, _)| *base_sequence == answered) else {
            return Err(WitnessError::Order { producer, answered, expected: next.map(|(sequence, _)| sequence) });
        };
        if base_offset == u64::MAX {
            return Err(WitnessError::Forgotten { producer, base_sequence: answered });
        }
        let mut offsets = acks.offsets[producer as usize - 1].lock().expect("the reader of acks panicked");
        assert_eq!(offsets.len() as u64, answered, "answers come in order");
        offsets.extend(base_offset..base_offset + records);
        acks.messages.fetch_add(records, Ordering::Relaxed);
        acks.duplicates.fetch_add(u64::from(duplicate), Ordering::Relaxed);
        Ok(())
    }

    fn batch(&self, base_sequence: u64, records: u64) -> Vec<u8> {
        let mut builder = Builder::new(BATCH_BYTES_MAX);
        for sequence in base_sequence..base_sequence + records {
            let payload = payload(self.id, sequence);
            let record = NewRecord { payload: &payload, event_time_ms: 1, ..NewRecord::default() };
            builder.push(&record).expect("a few small records fit");
        }
        let mut batch = Vec::new();
        builder.seal(&Seal { producer: self.id, base_sequence, ..Seal::default() }, &mut batch);
        batch
    }
}

/// Reads all partitions of `topic` and compares them with what was acknowledged.
pub fn check(address: SocketAddr, topic: &str, told: &Told) -> Result<Findings, WitnessError> {
    let topic = lookup(address, topic)?;
    let mut findings = Findings::default();
    for (index, place) in topic.partitions.iter().enumerate() {
        let owner = SocketAddr::new(address.ip(), place.port);
        let stored = read(owner, place.partition, &mut findings)?;
        for id in (1..=PRODUCERS).filter(|id| partition_of(*id) as usize == index) {
            compare(id, &stored, &told.offsets[id as usize - 1], &mut findings);
        }
    }
    Ok(findings)
}

/// Compares one producer's messages with what it was told.
fn compare(id: u64, stored: &[Option<(u64, u64)>], told: &[u64], findings: &mut Findings) {
    let mut expected = 0;
    let mut present = FxHashSet::default();
    for (offset, found) in stored.iter().enumerate() {
        let Some((_, sequence)) = found.filter(|(producer, _)| *producer == id) else { continue };
        let text = || format!("producer {id}: offset {offset} holds message {sequence}, the next is {expected}");
        if sequence < expected {
            findings.fault(|findings| &mut findings.doubled, text);
        } else if expected < sequence {
            findings.fault(|findings| &mut findings.out_of_order, text);
        }
        expected = expected.max(sequence + 1);
        present.insert(sequence);
    }
    for (sequence, &offset) in told.iter().enumerate() {
        let sequence = sequence as u64;
        let found = stored.get(offset as usize).copied().flatten();
        let text = || format!("producer {id}: message {sequence} was acknowledged at {offset}, which holds {found:?}");
        findings.acked += 1;
        if found.is_some_and(|found| found != (id, sequence)) {
            findings.fault(|findings| &mut findings.reused_offsets, text);
        }
        if !present.contains(&sequence) {
            findings.fault(|findings| &mut findings.lost, text);
        }
    }
}

/// Producer and sequence by offset. `None`: skipped or changed.
fn read(owner: SocketAddr, partition: u64, findings: &mut Findings) -> Result<Vec<Option<(u64, u64)>>, WitnessError> {
    let mut node = Blocking::<()>::connect(owner)?;
    let mut stored: Vec<Option<(u64, u64)>> = Vec::new();
    let mut offset = 0;
    loop {
        let batches = node.fetch(partition, offset)?;
        let broken = |source| WitnessError::Batch { partition, offset, source };
        let mut rest = &batches.payload[..];
        while !rest.is_empty() {
            let batch_bytes = batch::header(rest).map_err(broken)?.batch_bytes as usize;
            // One that is cut off is told by its check.
            let batch = rest.get(..batch_bytes).unwrap_or(rest);
            batch::check(batch).map_err(broken)?;
            for record in Records::open(batch, UNPACKED_BYTES_MAX).map_err(broken)?.iter() {
                let record = record.map_err(broken)?;
                if record.offset < offset {
                    continue;
                }
                while (stored.len() as u64) < record.offset {
                    let at = stored.len();
                    findings.fault(|findings| &mut findings.gaps, || format!("partition {partition}: no offset {at}"));
                    stored.push(None);
                }
                let sender = sender_of(record.payload);
                if sender.is_none() {
                    let at = record.offset;
                    findings.fault(
                        |findings| &mut findings.changed,
                        || format!("partition {partition}: the payload at {at} is not what was sent"),
                    );
                }
                findings.stored += 1;
                stored.push(sender);
            }
            rest = rest.get(frame::padded(batch_bytes)..).unwrap_or_default();
        }
        if batches.next_offset == offset {
            return Ok(stored);
        }
        offset = batches.next_offset;
    }
}

fn make_topic(address: SocketAddr, name: &str) -> Result<Topic, WitnessError> {
    let policy = TopicPolicy { partitions: PARTITIONS, ..TopicPolicy::default() };
    let create = CreateTopic { name: name.to_owned(), policy, exists_ok: true };
    topic_of(Blocking::<()>::connect(address)?.call(&create, ())?.0)
}

fn lookup(address: SocketAddr, name: &str) -> Result<Topic, WitnessError> {
    topic_of(Blocking::<()>::connect(address)?.call(&Lookup { name: name.to_owned() }, ())?.0)
}

fn topic_of(answer: Answer) -> Result<Topic, WitnessError> {
    match answer {
        Answer::Topic(topic) => Ok(*topic),
        other => Err(BlockingError::Unexpected(Box::new(other)).into()),
    }
}

fn partition_of(id: u64) -> u32 {
    (id % u64::from(PARTITIONS)) as u32
}

/// Producer, sequence, and bytes that follow from both.
fn payload(id: u64, sequence: u64) -> Vec<u8> {
    let mut payload = [id.to_le_bytes(), sequence.to_le_bytes()].concat();
    // No bit of either is lost: what follows tells both.
    let mut state = id.rotate_left(48) ^ sequence;
    for _ in 0..sequence.wrapping_mul(37) % PAYLOAD_BYTES_MAX {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        payload.push((state >> 56) as u8);
    }
    payload
}

/// Who sent a payload, and in which place, if it is one that was sent.
fn sender_of(bytes: &[u8]) -> Option<(u64, u64)> {
    let (id, rest) = bytes.split_first_chunk::<8>()?;
    let (sequence, _) = rest.split_first_chunk::<8>()?;
    let (id, sequence) = (u64::from_le_bytes(*id), u64::from_le_bytes(*sequence));
    (payload(id, sequence) == bytes).then_some((id, sequence))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(stored: &[Option<(u64, u64)>], told: &[u64]) -> Findings {
        let mut findings = Findings::default();
        compare(1, stored, told, &mut findings);
        findings
    }

    #[test]
    fn what_was_acknowledged_must_be_where_it_was_acknowledged() {
        let stored = [Some((1, 0)), Some((2, 0)), Some((1, 1)), Some((1, 2))];
        assert_eq!(compared(&stored, &[0, 2]).faults(), 0);
        assert_eq!(compared(&stored, &[0, 2]).acked, 2);
        // Beyond the end, where nothing is.
        let lost = compared(&stored, &[0, 2, 3, 4]);
        assert_eq!((lost.lost, lost.faults()), (1, 1));
        // At the place of another producer.
        let reused = compared(&stored, &[0, 1]);
        assert_eq!((reused.reused_offsets, reused.lost), (1, 0));
        assert!(reused.first_fault.unwrap().contains("acknowledged at 1"));
    }

    #[test]
    fn doubled_and_skipped_messages_are_found() {
        assert_eq!(compared(&[Some((1, 0)), Some((1, 0)), Some((1, 1))], &[]).doubled, 1);
        assert_eq!(compared(&[Some((1, 0)), Some((1, 2))], &[]).out_of_order, 1);
        assert_eq!(compared(&[None, Some((1, 0))], &[]).faults(), 0);
    }

    #[test]
    fn a_payload_with_one_changed_bit_has_no_sender() {
        let mut bytes = payload(3, 41);
        assert_eq!(sender_of(&bytes), Some((3, 41)));
        for at in 0..bytes.len() {
            bytes[at] ^= 1;
            assert_eq!(sender_of(&bytes), None);
            bytes[at] ^= 1;
        }
        assert_eq!(sender_of(&bytes[..20]), None);
    }
}
