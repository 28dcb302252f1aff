//! Idempotent producers of one partition: a repeated batch is answered as the first time and appended once.
//!
//! A producer counts its messages; each batch carries the sequence of its first. Two states are kept apart:
//!
//! - what was **admitted** decides about the next batch: a duplicate may come while the first is still in flight;
//! - what is **durable** is what may be saved. Saving an admitted sequence would be a lie after a crash: the retry of a
//!   batch that never reached the disk would be answered as a duplicate, and its messages lost.

use std::collections::VecDeque;

use drava_protocol::batch;
use rustc_hash::FxHashMap;

/// Producers remembered for one partition. Beyond it the one that published longest ago is forgotten.
pub const PRODUCERS_MAX: usize = 4096;
/// Runs of sequences whose offsets are remembered for one producer.
const RUNS_MAX: usize = 16;

/// What to do with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Append it. With a producer: tell [`Producers::appended`] when it is staged and [`Producers::durable`] when it is
    /// on disk.
    Append { producer: Option<ProducerSlot> },
    /// It was appended before, at this offset if that is still remembered.
    Duplicate { base_offset: Option<u64> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    #[error("producer {producer} expects sequence {expected}; the batch starts at {got}: an earlier batch is missing")]
    Gap { producer: u64, expected: u64, got: u64 },
    #[error("producer {producer} expects sequence {expected}; the batch covers {first} to {last}")]
    Overlap { producer: u64, expected: u64, first: u64, last: u64 },
    #[error("producer {producer} is at epoch {current}; the batch has {got}")]
    Fenced { producer: u64, current: u32, got: u32 },
    #[error("producer {producer} is at the last epoch there is; open one with another id")]
    LastEpoch { producer: u64 },
}

/// The place of a producer in its partition's table, valid until the table forgets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProducerSlot {
    index: u32,
    generation: u32,
}

/// A run of messages whose sequences and offsets go up together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    sequence: u64,
    offset: u64,
    records: u64,
}

#[derive(Clone, Debug)]
struct Producer {
    id: u64,
    generation: u32,
    epoch: u32,
    /// The sequence that the next batch must have.
    next_sequence: u64,
    /// Newest last.
    runs: VecDeque<Run>,
    durable_sequence: u64,
    /// The durable state is not yet in the index.
    dirty: bool,
}

/// All idempotent producers of one partition.
#[derive(Clone, Debug, Default)]
pub struct Producers {
    by_id: FxHashMap<u64, u32>,
    slots: Vec<Producer>,
    dirty: Vec<u32>,
    /// Forgotten producers whose rows must go.
    forgotten: Vec<u64>,
    generation: u32,
}

impl Producers {
    /// Decides about a batch. Its sequence counts only once [`Producers::appended`] is told: staging may still fail.
    pub fn admit(&mut self, header: &batch::Header) -> Result<Admission, AdmitError> {
        if header.producer == 0 {
            return Ok(Admission::Append { producer: None });
        }
        let Some(&index) = self.by_id.get(&header.producer) else {
            if header.base_sequence != 0 {
                return Err(AdmitError::Gap { producer: header.producer, expected: 0, got: header.base_sequence });
            }
            let index = self.insert(header.producer, header.producer_epoch, 0);
            return Ok(self.slots[index as usize].append(index));
        };
        let producer = &self.slots[index as usize];
        if header.producer_epoch < producer.epoch {
            let (producer, current) = (producer.id, producer.epoch);
            return Err(AdmitError::Fenced { producer, current, got: header.producer_epoch });
        }
        let end = header.base_sequence.saturating_add(u64::from(header.record_count));
        let expected = producer.next_sequence;
        if header.base_sequence == expected {
            return Ok(producer.append(index));
        }
        if end <= expected {
            return Ok(Admission::Duplicate { base_offset: producer.offset_of(header.base_sequence) });
        }
        let id = producer.id;
        if header.base_sequence < expected {
            return Err(AdmitError::Overlap { producer: id, expected, first: header.base_sequence, last: end - 1 });
        }
        Err(AdmitError::Gap { producer: id, expected, got: header.base_sequence })
    }

    /// The admitted batch is staged at `offset`: the producer's next batch comes after it.
    pub fn appended(&mut self, slot: ProducerSlot, header: &batch::Header, offset: u64) {
        let producer = &mut self.slots[slot.index as usize];
        assert_eq!(producer.generation, slot.generation, "the producer was forgotten between admission and append");
        let records = u64::from(header.record_count);
        producer.epoch = header.producer_epoch;
        producer.remember(Run { sequence: header.base_sequence, offset, records });
        producer.next_sequence = header.base_sequence + records;
    }

    /// Opens a producer under a new epoch; returns the epoch and the next sequence. The caller saves the row that
    /// [`Producers::encode`] gives before it answers, so that the older epoch stays fenced after a crash.
    ///
    /// Errors: `LastEpoch`; epochs come from clients, who may claim any.
    pub fn open(&mut self, producer: u64) -> Result<(u32, u64), AdmitError> {
        let index = match self.by_id.get(&producer) {
            Some(&index) => index,
            None => self.insert(producer, 0, 0),
        };
        let producer = &mut self.slots[index as usize];
        producer.epoch = producer.epoch.checked_add(1).ok_or(AdmitError::LastEpoch { producer: producer.id })?;
        Ok((producer.epoch, producer.next_sequence))
    }

    /// A batch of the producer in `slot` reached the disk; its messages end before sequence `end_sequence`.
    pub fn durable(&mut self, slot: ProducerSlot, end_sequence: u64) {
        let producer = &mut self.slots[slot.index as usize];
        if producer.generation != slot.generation {
            return;
        }
        assert!(
            end_sequence <= producer.next_sequence,
            "durable up to {end_sequence}, admitted up to {}",
            producer.next_sequence
        );
        producer.durable_sequence = end_sequence;
        if !producer.dirty {
            producer.dirty = true;
            self.dirty.push(slot.index);
        }
    }

    /// Batches of the producer in `slot` that were in flight will not become durable: their sequences are admitted again.
    /// They fail together, so what is durable is where the producer stands.
    pub fn failed(&mut self, slot: ProducerSlot) {
        let producer = &mut self.slots[slot.index as usize];
        if producer.generation != slot.generation {
            return;
        }
        let durable_sequence = producer.durable_sequence;
        producer.next_sequence = durable_sequence;
        producer.runs.retain_mut(|run| {
            run.records = run.records.min(durable_sequence.saturating_sub(run.sequence));
            0 < run.records
        });
    }

    /// Gives the rows of all producers whose durable state changed since the last call: `put(id, value)`, and
    /// `None` as value for forgotten ones.
    pub fn collect(&mut self, mut put: impl FnMut(u64, Option<Vec<u8>>)) {
        for id in self.forgotten.drain(..) {
            if !self.by_id.contains_key(&id) {
                put(id, None);
            }
        }
        for index in self.dirty.drain(..) {
            let producer = &mut self.slots[index as usize];
            if producer.dirty {
                producer.dirty = false;
                put(producer.id, Some(producer.encode()));
            }
        }
    }

    /// The row of one producer as it is durable now.
    pub fn encode(&self, producer: u64) -> Option<Vec<u8>> {
        self.by_id.get(&producer).map(|&index| self.slots[index as usize].encode())
    }

    /// Takes over a saved row.
    pub fn restore(&mut self, producer: u64, row: &[u8]) -> Result<(), RowError> {
        let decoded = Producer::decode(producer, row).ok_or(RowError { producer, bytes: row.len() })?;
        let index = self.insert(producer, decoded.epoch, decoded.next_sequence);
        self.slots[index as usize].runs = decoded.runs;
        Ok(())
    }

    /// A batch found in the journal after the last saved rows. Those already in the rows change nothing.
    pub fn replay(&mut self, id: u64, epoch: u32, base_sequence: u64, records: u32, offset: u64) {
        if id == 0 {
            return;
        }
        let index = match self.by_id.get(&id) {
            Some(&index) => index,
            None => self.insert(id, epoch, base_sequence),
        };
        let producer = &mut self.slots[index as usize];
        producer.epoch = producer.epoch.max(epoch);
        let end = base_sequence.saturating_add(u64::from(records));
        if end <= producer.next_sequence {
            return;
        }
        producer.remember(Run { sequence: base_sequence, offset, records: u64::from(records) });
        producer.next_sequence = end;
        producer.durable_sequence = end;
        if !producer.dirty {
            producer.dirty = true;
            self.dirty.push(index);
        }
    }

    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    fn insert(&mut self, id: u64, epoch: u32, next_sequence: u64) -> u32 {
        self.generation += 1;
        let producer = Producer {
            id,
            generation: self.generation,
            epoch,
            next_sequence,
            runs: VecDeque::new(),
            durable_sequence: next_sequence,
            dirty: false,
        };
        let index = if self.slots.len() < PRODUCERS_MAX {
            self.slots.push(producer);
            self.slots.len() as u32 - 1
        } else {
            let oldest = self.least_recent();
            let old = std::mem::replace(&mut self.slots[oldest as usize], producer);
            self.by_id.remove(&old.id);
            self.forgotten.push(old.id);
            oldest
        };
        self.by_id.insert(id, index);
        index
    }

    /// The producer whose last batch has the lowest offset. Linear, and only when the table is full and a new one comes.
    fn least_recent(&self) -> u32 {
        let last_offset = |p: &Producer| p.runs.back().map_or(0, |run| run.offset + run.records);
        let (index, _) =
            self.slots.iter().enumerate().min_by_key(|(_, p)| last_offset(p)).expect("a full table is not empty");
        index as u32
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved row of producer {producer} has {bytes} bytes and is none")]
pub struct RowError {
    pub producer: u64,
    pub bytes: usize,
}

impl Producer {
    fn append(&self, index: u32) -> Admission {
        Admission::Append { producer: Some(ProducerSlot { index, generation: self.generation }) }
    }

    fn remember(&mut self, run: Run) {
        if let Some(last) = self.runs.back_mut()
            && last.sequence + last.records == run.sequence
            && last.offset + last.records == run.offset
        {
            last.records += run.records;
            return;
        }
        if self.runs.len() == RUNS_MAX {
            self.runs.pop_front();
        }
        self.runs.push_back(run);
    }

    fn offset_of(&self, sequence: u64) -> Option<u64> {
        self.runs
            .iter()
            .rev()
            .find(|run| run.sequence <= sequence && sequence < run.sequence + run.records)
            .map(|run| run.offset + (sequence - run.sequence))
    }

    /// epoch u32, next sequence u64, then runs of three u64 each, little-endian: only what is durable.
    fn encode(&self) -> Vec<u8> {
        let mut row = Vec::with_capacity(12 + self.runs.len() * 24);
        row.extend_from_slice(&self.epoch.to_le_bytes());
        row.extend_from_slice(&self.durable_sequence.to_le_bytes());
        for run in &self.runs {
            let records = run.records.min(self.durable_sequence.saturating_sub(run.sequence));
            if 0 < records {
                for value in [run.sequence, run.offset, records] {
                    row.extend_from_slice(&value.to_le_bytes());
                }
            }
        }
        row
    }

    fn decode(id: u64, row: &[u8]) -> Option<Producer> {
        let (epoch, rest) = row.split_first_chunk::<4>()?;
        let (next, rest) = rest.split_first_chunk::<8>()?;
        let next_sequence = u64::from_le_bytes(*next);
        let (runs, tail) = rest.as_chunks::<24>();
        if !tail.is_empty() || RUNS_MAX < runs.len() {
            return None;
        }
        let value = |run: &[u8; 24], at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&run[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let runs = runs
            .iter()
            .map(|run| Run { sequence: value(run, 0), offset: value(run, 8), records: value(run, 16) })
            .collect();
        Some(Producer {
            id,
            generation: 0,
            epoch: u32::from_le_bytes(*epoch),
            next_sequence,
            runs,
            durable_sequence: next_sequence,
            dirty: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(producer: u64, epoch: u32, base_sequence: u64, record_count: u32) -> batch::Header {
        batch::Header {
            base_offset: 0,
            append_time_ms: 0,
            batch_bytes: 64,
            crc: 0,
            compression: batch::Compression::None,
            record_count,
            records_bytes: 0,
            producer,
            producer_epoch: epoch,
            base_sequence,
            max_timestamp_ms: 0,
        }
    }

    /// Admits and stages a batch that is expected to be new.
    fn append(producers: &mut Producers, header: batch::Header, offset: u64) -> ProducerSlot {
        match producers.admit(&header) {
            Ok(Admission::Append { producer: Some(slot) }) => {
                producers.appended(slot, &header, offset);
                slot
            }
            other => panic!("expected an append, got {other:?}"),
        }
    }

    #[test]
    fn a_repeated_batch_is_answered_with_its_first_offset() {
        let mut producers = Producers::default();
        append(&mut producers, header(7, 0, 0, 10), 100);
        append(&mut producers, header(7, 0, 10, 5), 200);
        assert_eq!(producers.admit(&header(7, 0, 0, 10)), Ok(Admission::Duplicate { base_offset: Some(100) }));
        assert_eq!(producers.admit(&header(7, 0, 10, 5)), Ok(Admission::Duplicate { base_offset: Some(200) }));
    }

    #[test]
    fn gaps_and_overlaps_are_refused_and_change_nothing() {
        let mut producers = Producers::default();
        assert_eq!(producers.admit(&header(7, 0, 3, 1)), Err(AdmitError::Gap { producer: 7, expected: 0, got: 3 }));
        append(&mut producers, header(7, 0, 0, 10), 0);
        assert!(matches!(producers.admit(&header(7, 0, 11, 1)), Err(AdmitError::Gap { expected: 10, got: 11, .. })));
        assert!(matches!(producers.admit(&header(7, 0, 5, 10)), Err(AdmitError::Overlap { expected: 10, .. })));
        append(&mut producers, header(7, 0, 10, 1), 10);
    }

    #[test]
    fn a_batch_that_could_not_be_staged_is_admitted_again() {
        let mut producers = Producers::default();
        let first = header(7, 0, 0, 10);
        assert!(matches!(producers.admit(&first), Ok(Admission::Append { .. })));
        assert!(matches!(producers.admit(&first), Ok(Admission::Append { .. })));
    }

    #[test]
    fn a_new_epoch_fences_the_old() {
        let mut producers = Producers::default();
        append(&mut producers, header(7, 0, 0, 1), 0);
        assert_eq!(producers.open(7), Ok((1, 1)));
        assert!(matches!(producers.admit(&header(7, 0, 1, 1)), Err(AdmitError::Fenced { current: 1, got: 0, .. })));
        append(&mut producers, header(7, 1, 1, 1), 1);
    }

    #[test]
    fn only_durable_sequences_are_saved() {
        let mut producers = Producers::default();
        let first = append(&mut producers, header(7, 0, 0, 10), 0);
        append(&mut producers, header(7, 0, 10, 10), 10);
        producers.durable(first, 10);
        let mut rows = Vec::new();
        producers.collect(|id, row| rows.push((id, row.unwrap())));
        assert_eq!(rows.len(), 1);

        // After a crash that lost the second batch its retry is appended, not answered as a duplicate.
        let mut restored = Producers::default();
        restored.restore(rows[0].0, &rows[0].1).unwrap();
        assert_eq!(restored.admit(&header(7, 0, 0, 10)), Ok(Admission::Duplicate { base_offset: Some(0) }));
        append(&mut restored, header(7, 0, 10, 10), 10);
    }

    #[test]
    fn what_failed_in_flight_is_admitted_again() {
        let mut producers = Producers::default();
        let first = append(&mut producers, header(7, 0, 0, 10), 0);
        append(&mut producers, header(7, 0, 10, 10), 10);
        let third = append(&mut producers, header(7, 0, 20, 10), 20);
        producers.durable(first, 10);
        producers.failed(third);
        assert_eq!(producers.admit(&header(7, 0, 0, 10)), Ok(Admission::Duplicate { base_offset: Some(0) }));
        assert!(matches!(producers.admit(&header(7, 0, 20, 10)), Err(AdmitError::Gap { expected: 10, .. })));
        // The retry gets another offset than the try that failed, and that is the one a repetition is answered with.
        let again = append(&mut producers, header(7, 0, 10, 10), 40);
        producers.durable(again, 20);
        assert_eq!(producers.admit(&header(7, 0, 10, 10)), Ok(Admission::Duplicate { base_offset: Some(40) }));
    }

    #[test]
    fn replay_continues_saved_rows_and_repeats_nothing() {
        let mut producers = Producers::default();
        let first = append(&mut producers, header(7, 2, 0, 10), 0);
        producers.durable(first, 10);
        let row = producers.encode(7).unwrap();
        let mut restored = Producers::default();
        restored.restore(7, &row).unwrap();
        restored.replay(7, 2, 0, 10, 0);
        restored.replay(7, 2, 10, 5, 50);
        assert_eq!(restored.admit(&header(7, 2, 10, 5)), Ok(Admission::Duplicate { base_offset: Some(50) }));
        assert_eq!(restored.open(7), Ok((3, 15)));
    }

    #[test]
    fn the_table_forgets_the_oldest_when_it_is_full() {
        let mut producers = Producers::default();
        for id in 1..=PRODUCERS_MAX as u64 + 1 {
            append(&mut producers, header(id, 0, 0, 1), id);
        }
        assert_eq!(producers.len(), PRODUCERS_MAX);
        let mut gone = Vec::new();
        producers.collect(|id, row| {
            if row.is_none() {
                gone.push(id)
            }
        });
        assert_eq!(gone, [1]);
    }

    #[test]
    fn a_row_of_other_bytes_is_an_error() {
        let mut producers = Producers::default();
        assert!(producers.restore(7, &[0; 5]).is_err());
        assert!(producers.restore(7, &[0; 13]).is_err());
        assert!(producers.is_empty());
    }
}
