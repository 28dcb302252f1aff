//! One producer on one partition, without its connection and clock.
//!
//! The way of a record:
//!
//! 1. [`ProducerCore::push`] puts it into the open batch, and says which batch that is and the place in it.
//! 2. The open batch is sealed when it is full, when its first record waited for the linger, or when a flush is asked for,
//!    but only while the window has room: while it has none, the batch goes on filling, so that batches grow under load.
//!    Sealing gives the batch its sequence for good.
//! 3. [`ProducerCore::next_send`] hands out sealed batches in order, as one *attempt*.
//! 4. An answer ends a batch; batches end in the order of their sequences. After a lost connection, or an error that asks
//!    to try again, a new attempt sends every batch again that was not acknowledged, in order and with its sequence: the
//!    node answers those it has as duplicates, which count as acknowledged.
//!
//! Time is handed in as the duration since any fixed moment.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use drava_protocol::batch::{BatchError, Builder, Compression, HEADER_BYTES, NewRecord, Seal};
use drava_protocol::{ErrorCode, Retry};

use crate::session::Refusal;

/// A pause after an error that asks to try again and names no pause.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug)]
pub struct ProducerConfig {
    /// A batch is sealed before it passes this many bytes, header included and before compression.
    pub batch_bytes_max: usize,
    /// What the node accepts. A record that alone passes `batch_bytes_max` has a batch of its own up to this.
    pub lone_record_batch_bytes_max: usize,
    /// A batch is sealed with this many records.
    pub batch_count_max: u32,
    /// What the first record of a batch waits for company. Zero: only while the window is full.
    pub linger: Duration,
    /// Bytes of sealed batches that may wait for their acks. One batch may always.
    pub window_bytes_max: usize,
    /// Sealed batches that may wait for their acks.
    pub window_batches_max: usize,
    pub compression: Compression,
}

impl Default for ProducerConfig {
    fn default() -> ProducerConfig {
        ProducerConfig {
            batch_bytes_max: 64 * 1024,
            lone_record_batch_bytes_max: 64 * 1024,
            batch_count_max: 10_000,
            linger: Duration::ZERO,
            window_bytes_max: 4 * 1024 * 1024,
            window_batches_max: 64,
            compression: Compression::None,
        }
    }
}

/// Who the producer is to the partition, as `ProducerOpened` told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Not 0.
    pub producer: u64,
    pub epoch: u32,
    pub next_sequence: u64,
}

/// The place of a record: the how-manieth batch of this core, and the how-manieth record of it, both from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    pub batch: u64,
    pub index: u32,
}

/// A record that was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// Wait until a batch is acknowledged.
    #[error("the window and the open batch are full")]
    WindowFull,
    #[error("a batch of this record alone has {batch_bytes} bytes; at most {batch_bytes_max} are allowed")]
    TooLarge { batch_bytes: usize, batch_bytes_max: usize },
    #[error("the record has more than 65535 headers, or a header name of more than 65535 bytes")]
    Headers,
}

/// A batch to be sent.
#[derive(Clone, Debug)]
pub struct Transmit {
    pub batch: u64,
    pub attempt: u32,
    pub bytes: Bytes,
}

/// A batch that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    pub batch: u64,
    /// Offset of its first record; none for a duplicate so old that the node does not remember.
    pub base_offset: Option<u64>,
}

/// What an error of the node means for the producer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It came from an attempt that is over.
    Stale,
    /// A new attempt follows by itself.
    RetryHere,
    /// Ask again where the partition lives, then report [`ProducerCore::connected`].
    RetryElsewhere,
    /// No batch of this producer can succeed any longer. What was not acknowledged is unknown.
    Fatal,
}

#[derive(Debug)]
struct Sealed {
    bytes: Bytes,
    acknowledged: Option<Acknowledged>,
}

#[derive(Debug)]
pub struct ProducerCore {
    config: ProducerConfig,
    identity: Identity,
    open: Builder,
    /// When the open batch is to be sealed at the latest; none while it is empty.
    seal_at: Option<Duration>,
    flushing: bool,
    /// Oldest first. At most `window_batches_max`.
    sealed: VecDeque<Sealed>,
    sealed_bytes: usize,
    /// Number of the first of `sealed`.
    first_batch: u64,
    /// How many of `sealed` were sent in this attempt.
    sent: usize,
    attempt: u32,
    connected: bool,
    /// Nothing is sent before this.
    resume_at: Option<Duration>,
}

impl ProducerCore {
    /// A producer that is not connected yet.
    pub fn new(config: ProducerConfig, identity: Identity) -> ProducerCore {
        assert!(identity.producer != 0, "producer 0 means none");
        assert!(0 < config.window_batches_max && 0 < config.batch_count_max, "a producer must be able to send");
        ProducerCore {
            config,
            identity,
            open: Builder::new(config.lone_record_batch_bytes_max.max(config.batch_bytes_max)),
            seal_at: None,
            flushing: false,
            sealed: VecDeque::new(),
            sealed_bytes: 0,
            first_batch: 0,
            sent: 0,
            attempt: 0,
            connected: false,
            resume_at: None,
        }
    }

    /// Takes a record into the open batch.
    pub fn push(&mut self, now: Duration, record: &NewRecord<'_>) -> Result<Ticket, PushError> {
        if self.open.record_count() == self.config.batch_count_max && !self.seal() {
            return Err(PushError::WindowFull);
        }
        let batch_bytes = self.open.batch_bytes() + Builder::record_bytes(record);
        if self.config.batch_bytes_max < batch_bytes && !self.open.is_empty() && !self.seal() {
            return Err(PushError::WindowFull);
        }
        loop {
            match self.open.push(record) {
                Ok(()) => break,
                Err(BatchError::Full(_)) if !self.open.is_empty() => {
                    if !self.seal() {
                        return Err(PushError::WindowFull);
                    }
                }
                Err(BatchError::Full(record_bytes)) => {
                    let batch_bytes_max = self.config.lone_record_batch_bytes_max.max(self.config.batch_bytes_max);
                    return Err(PushError::TooLarge { batch_bytes: HEADER_BYTES + record_bytes, batch_bytes_max });
                }
                Err(_) => return Err(PushError::Headers),
            }
        }
        self.seal_at.get_or_insert(now.saturating_add(self.config.linger));
        Ok(Ticket { batch: self.open_batch(), index: self.open.record_count() - 1 })
    }

    /// Number of the batch that takes the next record.
    pub fn open_batch(&self) -> u64 {
        self.first_batch + self.sealed.len() as u64
    }

    /// Nothing waits: neither for being sent nor for an answer.
    pub fn is_idle(&self) -> bool {
        self.open.is_empty() && self.sealed.is_empty()
    }

    /// The open batch has records and waits for company; with [`ProducerCore::deadline`] it is sealed.
    pub fn is_open_batch_full(&self) -> bool {
        self.open.record_count() == self.config.batch_count_max
            || self.config.batch_bytes_max <= self.open.batch_bytes() + drava_protocol::batch::RECORD_HEADER_BYTES
    }

    /// Batches of this attempt that were sent and not answered.
    pub fn in_flight(&self) -> usize {
        self.sent
    }

    /// The open batch does not wait for its linger, however often the window delays it.
    pub fn flush(&mut self) {
        self.flushing = !self.open.is_empty();
    }

    /// There is a connection to the owner: a new attempt begins.
    pub fn connected(&mut self) {
        self.begin_attempt();
        self.connected = true;
    }

    /// The connection is lost: nothing is sent until the next [`ProducerCore::connected`].
    pub fn disconnected(&mut self) {
        self.begin_attempt();
        self.connected = false;
    }

    /// The next batch to be sent now, if any. Call until there is none.
    pub fn next_send(&mut self, now: Duration) -> Option<Transmit> {
        if self.resume_at.is_some_and(|at| now < at) {
            return None;
        }
        self.resume_at = None;
        if self.flushing || self.seal_at.is_some_and(|at| at <= now) || self.is_open_batch_full() {
            self.seal();
        }
        if !self.connected {
            return None;
        }
        // Answers come in order, but a batch of an earlier attempt may have been acknowledged since.
        while self.sealed.get(self.sent).is_some_and(|sealed| sealed.acknowledged.is_some()) {
            self.sent += 1;
        }
        let sealed = self.sealed.get(self.sent)?;
        let batch = self.first_batch + self.sent as u64;
        self.sent += 1;
        Some(Transmit { batch, attempt: self.attempt, bytes: sealed.bytes.clone() })
    }

    /// When to call [`ProducerCore::next_send`] again though nothing else happened.
    pub fn deadline(&self) -> Option<Duration> {
        if self.resume_at.is_some() {
            return self.resume_at;
        }
        // A batch that has waited long enough and is still open waits for the window, not for the time.
        self.seal_at.filter(|_| self.has_room())
    }

    /// `batch` is appended, by whichever attempt. Calls `done` for it and for those after it that were waiting for it.
    pub fn on_published(&mut self, batch: u64, base_offset: u64, mut done: impl FnMut(Acknowledged)) {
        let Some(index) = batch.checked_sub(self.first_batch) else { return };
        let Some(sealed) = self.sealed.get_mut(index as usize) else { return };
        let base_offset = Some(base_offset).filter(|&offset| offset != u64::MAX);
        sealed.acknowledged.get_or_insert(Acknowledged { batch, base_offset });
        while let Some(acknowledged) = self.sealed.front().and_then(|sealed| sealed.acknowledged) {
            let sealed = self.sealed.pop_front().expect("it was just seen");
            self.sealed_bytes -= sealed.bytes.len();
            self.first_batch += 1;
            self.sent = self.sent.saturating_sub(1);
            done(acknowledged);
        }
    }

    /// The node refused `batch` in `attempt`.
    pub fn on_refused(&mut self, now: Duration, batch: u64, attempt: u32, refusal: &Refusal) -> Verdict {
        if attempt != self.attempt || batch < self.first_batch || self.open_batch() <= batch {
            return Verdict::Stale;
        }
        let pause = match refusal.retry_after_ms {
            0 => RETRY_PAUSE,
            ms => Duration::from_millis(u64::from(ms)),
        };
        match refusal.retry() {
            Retry::Here => {
                self.begin_attempt();
                self.resume_at = Some(now.saturating_add(pause));
                Verdict::RetryHere
            }
            Retry::Elsewhere => {
                self.begin_attempt();
                self.connected = false;
                self.resume_at = Some(now.saturating_add(pause));
                Verdict::RetryElsewhere
            }
            // An earlier batch of ours is still to be answered: it never arrived, and what comes after it cannot fit. Every
            // other gap means that the node has forgotten this producer.
            Retry::No if refusal.code == ErrorCode::SequenceGap && batch != self.first_batch => {
                self.begin_attempt();
                self.resume_at = Some(now.saturating_add(pause));
                Verdict::RetryHere
            }
            Retry::No => Verdict::Fatal,
        }
    }

    fn begin_attempt(&mut self) {
        self.attempt = self.attempt.wrapping_add(1);
        self.sent = 0;
    }

    fn has_room(&self) -> bool {
        self.sealed.is_empty()
            || (self.sealed.len() < self.config.window_batches_max
                && self.sealed_bytes + self.open.batch_bytes() <= self.config.window_bytes_max)
    }

    /// Seals the open batch if there is one and the window has room for it.
    fn seal(&mut self) -> bool {
        if self.open.is_empty() || !self.has_room() {
            return false;
        }
        let records = self.open.record_count();
        let seal = Seal {
            producer: self.identity.producer,
            producer_epoch: self.identity.epoch,
            base_sequence: self.identity.next_sequence,
            compression: self.config.compression,
        };
        let mut bytes = Vec::with_capacity(self.open.batch_bytes());
        self.open.seal(&seal, &mut bytes);
        self.identity.next_sequence += u64::from(records);
        self.sealed_bytes += bytes.len();
        self.sealed.push_back(Sealed { bytes: bytes.into(), acknowledged: None });
        self.seal_at = None;
        self.flushing = false;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use drava_protocol::batch;

    const MS: Duration = Duration::from_millis(1);

    fn core(config: ProducerConfig) -> ProducerCore {
        let mut core = ProducerCore::new(config, Identity { producer: 9, epoch: 3, next_sequence: 100 });
        core.connected();
        core
    }

    fn config() -> ProducerConfig {
        ProducerConfig { batch_count_max: 2, window_batches_max: 3, ..ProducerConfig::default() }
    }

    fn push(core: &mut ProducerCore, now: Duration, payload: &[u8]) -> Result<Ticket, PushError> {
        core.push(now, &NewRecord { payload, ..NewRecord::default() })
    }

    /// Numbers and base sequences of what is sent now.
    fn sends(core: &mut ProducerCore, now: Duration) -> Vec<(u64, u64)> {
        std::iter::from_fn(|| core.next_send(now))
            .map(|transmit| {
                let header = batch::check(&transmit.bytes).unwrap();
                assert_eq!((header.producer, header.producer_epoch), (9, 3));
                (transmit.batch, header.base_sequence)
            })
            .collect()
    }

    fn acks(core: &mut ProducerCore, batch: u64, base_offset: u64) -> Vec<(u64, Option<u64>)> {
        let mut done = Vec::new();
        core.on_published(batch, base_offset, |acknowledged| done.push((acknowledged.batch, acknowledged.base_offset)));
        done
    }

    fn refusal(code: ErrorCode, retry_after_ms: u32) -> Refusal {
        Refusal { code, retry_after_ms, text: String::new() }
    }

    #[test]
    fn a_batch_is_sealed_by_count_by_bytes_by_linger_and_by_a_flush() {
        let config =
            ProducerConfig { batch_bytes_max: 200, lone_record_batch_bytes_max: 400, linger: 5 * MS, ..config() };
        let mut core = core(config);
        assert_eq!(push(&mut core, MS, b"a"), Ok(Ticket { batch: 0, index: 0 }));
        assert_eq!(core.deadline(), Some(6 * MS));
        assert_eq!(sends(&mut core, 5 * MS), []);
        assert_eq!(sends(&mut core, 6 * MS), [(0, 100)], "its linger is over");
        assert_eq!(push(&mut core, 7 * MS, b"b"), Ok(Ticket { batch: 1, index: 0 }));
        assert_eq!(push(&mut core, 7 * MS, b"c"), Ok(Ticket { batch: 1, index: 1 }));
        assert_eq!(sends(&mut core, 7 * MS), [(1, 101)], "it has its count");
        assert_eq!(push(&mut core, 8 * MS, &[0; 90]), Ok(Ticket { batch: 2, index: 0 }));
        assert_eq!(push(&mut core, 8 * MS, &[0; 90]), Ok(Ticket { batch: 3, index: 0 }), "both do not fit 200 bytes");
        assert_eq!(sends(&mut core, 8 * MS), [(2, 103)]);
        assert_eq!(acks(&mut core, 0, 0), [(0, Some(0))]);
        core.flush();
        assert_eq!(sends(&mut core, 8 * MS), [(3, 104)]);
        assert_eq!(acks(&mut core, 1, 1), [(1, Some(1))]);
        assert_eq!(acks(&mut core, 2, 3), [(2, Some(3))]);
        assert_eq!(push(&mut core, 8 * MS, b"d"), Ok(Ticket { batch: 4, index: 0 }));
        assert_eq!(push(&mut core, 8 * MS, &[0; 320]), Ok(Ticket { batch: 5, index: 0 }), "a batch of its own");
        assert_eq!(sends(&mut core, 8 * MS), [(4, 105), (5, 106)], "it waits for no company");
        let too_large = PushError::TooLarge { batch_bytes: 64 + 16 + 321, batch_bytes_max: 400 };
        assert_eq!(push(&mut core, 8 * MS, &[0; 321]), Err(too_large));
    }

    #[test]
    fn a_full_window_holds_records_back_until_an_ack() {
        let mut core = core(config());
        for n in 0..8 {
            push(&mut core, MS, &[n]).unwrap();
            sends(&mut core, Duration::ZERO);
        }
        assert_eq!(core.in_flight(), 3);
        assert_eq!(push(&mut core, MS, b"x"), Err(PushError::WindowFull));
        assert_eq!(core.deadline(), None, "it waits for an answer, not for the time");
        assert_eq!(acks(&mut core, 0, 0), [(0, Some(0))]);
        assert_eq!(push(&mut core, MS, b"x"), Ok(Ticket { batch: 4, index: 0 }));
        assert_eq!(sends(&mut core, Duration::ZERO), [(3, 106)]);
    }

    #[test]
    fn the_window_counts_bytes_and_one_batch_always_fits() {
        let config = ProducerConfig { batch_count_max: 1, window_bytes_max: 100, ..config() };
        let mut core = core(config);
        push(&mut core, MS, &[0; 500]).unwrap();
        assert_eq!(sends(&mut core, MS), [(0, 100)]);
        push(&mut core, MS, &[0; 500]).unwrap();
        assert_eq!(sends(&mut core, MS), []);
        assert_eq!(push(&mut core, MS, &[0; 500]), Err(PushError::WindowFull));
        acks(&mut core, 0, 7);
        assert_eq!(sends(&mut core, MS), [(1, 101)]);
    }

    #[test]
    fn a_lost_connection_sends_all_that_is_unacked_again_in_order_and_with_its_sequence() {
        let mut core = core(config());
        for n in 0..6 {
            push(&mut core, MS, &[n]).unwrap();
        }
        assert_eq!(sends(&mut core, MS), [(0, 100), (1, 102), (2, 104)]);
        assert_eq!(acks(&mut core, 0, 50), [(0, Some(50))]);
        core.disconnected();
        assert_eq!(sends(&mut core, MS), []);
        core.connected();
        assert_eq!(sends(&mut core, MS), [(1, 102), (2, 104)]);
        // The first was appended before the connection broke, and is answered as a duplicate.
        assert_eq!(acks(&mut core, 1, u64::MAX), [(1, None)]);
        assert_eq!(acks(&mut core, 2, 54), [(2, Some(54))]);
        assert!(core.is_idle());
    }

    #[test]
    fn batches_end_in_order_even_if_their_answers_do_not() {
        let mut core = core(config());
        for n in 0..6 {
            push(&mut core, MS, &[n]).unwrap();
        }
        sends(&mut core, MS);
        assert_eq!(acks(&mut core, 2, 4), []);
        assert_eq!(acks(&mut core, 1, 2), []);
        core.disconnected();
        core.connected();
        assert_eq!(sends(&mut core, MS), [(0, 100)], "what is acknowledged is not sent again");
        assert_eq!(acks(&mut core, 0, 0), [(0, Some(0)), (1, Some(2)), (2, Some(4))]);
        assert_eq!(acks(&mut core, 0, 0), [], "late answers change nothing");
    }

    #[test]
    fn a_busy_node_is_asked_again_after_its_pause_and_gaps_behind_it_are_expected() {
        let mut core = core(config());
        for n in 0..4 {
            push(&mut core, MS, &[n]).unwrap();
        }
        let attempt = core.next_send(MS).unwrap().attempt;
        sends(&mut core, MS);
        assert_eq!(core.on_refused(MS, 0, attempt, &refusal(ErrorCode::Busy, 30)), Verdict::RetryHere);
        assert_eq!(core.on_refused(MS, 1, attempt, &refusal(ErrorCode::SequenceGap, 0)), Verdict::Stale);
        assert_eq!(core.deadline(), Some(31 * MS));
        assert_eq!(sends(&mut core, 30 * MS), []);
        assert_eq!(sends(&mut core, 31 * MS), [(0, 100), (1, 102)]);
    }

    #[test]
    fn a_partition_that_moved_is_looked_for_again() {
        let mut core = core(config());
        push(&mut core, MS, b"a").unwrap();
        let attempt = core.next_send(2 * MS).unwrap().attempt;
        let verdict = core.on_refused(MS, 0, attempt, &refusal(ErrorCode::WrongOwner, 0));
        assert_eq!(verdict, Verdict::RetryElsewhere);
        assert_eq!(sends(&mut core, 90 * MS), []);
        core.connected();
        assert_eq!(sends(&mut core, 90 * MS), [(0, 100)]);
    }

    #[test]
    fn a_fenced_producer_and_a_forgotten_one_are_over() {
        for code in [ErrorCode::ProducerFenced, ErrorCode::SequenceGap, ErrorCode::StorageFailed] {
            let mut core = core(config());
            push(&mut core, MS, b"a").unwrap();
            let attempt = core.next_send(2 * MS).unwrap().attempt;
            assert_eq!(core.on_refused(MS, 0, attempt, &refusal(code, 0)), Verdict::Fatal, "{code}");
        }
    }
}
