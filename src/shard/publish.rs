//! Publishing: from a checked batch to its acknowledgement.
//!
//! 1. [`Shard::publish`] checks the batch where it was received: lengths, checksum, sequence.
//! 2. The store stages it; nothing is copied yet. With `memory` durability the producer is answered here.
//! 3. The store writes it with all that came in the meantime, and tells the [`Sink`] when it is on disk.
//! 4. The sink answers the producers of all entries in that write and wakes who waits for the partitions' ends.

use std::rc::{Rc, Weak};

use drava_protocol::message::{Done, Durability, Located, ProducerOpened, Published};
use drava_protocol::{ErrorCode, batch};
use drava_runtime::chunk::Slice;
use drava_storage::{AppendError, FlushError, FlushSink, NewEntry, StateBatch};

use super::consumer::Consumer;
use super::{Responder, Shard};
use crate::broker::partition::{end_sequence, producer_key};
use crate::broker::producers::{Admission, AdmitError, ProducerSlot};

/// A pause before a client publishes again where the disk is full.
const RETRY_AFTER_FULL_MS: u32 = 1000;

/// What the shard remembers of a staged record until it is durable.
#[derive(Debug)]
pub struct Token {
    partition: u32,
    on_durable: OnDurable,
}

#[derive(Debug)]
enum OnDurable {
    Published {
        responder: Option<Responder>,
        correlation: u64,
        base_offset: u64,
        producer: Option<(ProducerSlot, u64)>,
    },
    ProducerOpened {
        responder: Responder,
        correlation: u64,
        opened: ProducerOpened,
    },
    Done {
        responder: Responder,
        correlation: u64,
    },
    Sought {
        responder: Responder,
        correlation: u64,
        located: Located,
        consumer: Rc<Consumer>,
    },
}

/// A repeated batch whose first copy is still in flight: answered when that is durable.
#[derive(Debug)]
pub struct WaitingDuplicate {
    /// Durable once the partition's end has reached this.
    end_offset: u64,
    responder: Responder,
    correlation: u64,
    base_offset: u64,
}

impl Token {
    /// Answers `Done` when the record is durable.
    pub fn done(partition: u32, responder: Responder, correlation: u64) -> Token {
        Token { partition, on_durable: OnDurable::Done { responder, correlation } }
    }

    /// When the cursor is durable, answers where it is and sends the consumer there: what is delivered after the answer
    /// is of the new place.
    pub fn sought(responder: Responder, correlation: u64, located: Located, consumer: Rc<Consumer>) -> Token {
        let partition = consumer.partition;
        Token { partition, on_durable: OnDurable::Sought { responder, correlation, located, consumer } }
    }
}

impl Shard {
    /// Takes one batch for the hosted partition `index`.
    pub(super) fn publish(&self, index: u32, responder: Responder, correlation: u64, bytes: Slice) {
        let refuse = |responder: &Responder, code, retry_after_ms, text: &str| {
            self.counters.publish_errors.add(1);
            self.answer_error(responder, correlation, code, retry_after_ms, text);
        };
        if self.draining.get() {
            return refuse(&responder, ErrorCode::ShuttingDown, 0, "the node is shutting down");
        }
        // The checksum is compared before anything else looks at the batch, and before it is acknowledged in any way.
        let header = match batch::check(&bytes) {
            Ok(header) => header,
            Err(error) => return refuse(&responder, error.code(), 0, &error.to_string()),
        };
        // Unpacked, a batch is no larger than a frame may be: consumers allocate no more than that.
        if self.limits.payload_bytes_max < header.records_bytes {
            let error =
                batch::BatchError::TooLarge { said: header.records_bytes, limit: self.limits.payload_bytes_max };
            return refuse(&responder, error.code(), 0, &error.to_string());
        }
        let mut hosted = self.hosted.borrow_mut();
        let hosted = hosted[index as usize].as_mut().expect("the index of a hosted partition");
        let span = self.store.span(hosted.slot);
        let producer = match hosted.partition.producers.admit(&header) {
            Ok(Admission::Append { producer }) => producer,
            Ok(Admission::Duplicate { base_offset }) => {
                self.counters.duplicates.add(1);
                let end = base_offset.map_or(0, |base| base + u64::from(header.record_count));
                let base_offset = base_offset.unwrap_or(u64::MAX);
                if end <= span.end_offset {
                    self.answer(&responder, correlation, &Published { base_offset, duplicate: true });
                } else {
                    let waiting = WaitingDuplicate { end_offset: end, responder, correlation, base_offset };
                    hosted.waiting.push_back(waiting);
                }
                return;
            }
            Err(error) => return refuse(&responder, admit_code(&error), 0, &error.to_string()),
        };
        let base_offset = span.next_offset;
        let at_once = hosted.partition.durability == Durability::Memory;
        let batch_bytes = bytes.len() as u64;
        let token = Token {
            partition: index,
            on_durable: OnDurable::Published {
                responder: (!at_once).then(|| responder.clone()),
                correlation,
                base_offset,
                producer: producer.map(|slot| (slot, end_sequence(&header))),
            },
        };
        let entry = NewEntry { bytes, header, base_offset, append_time_ms: self.now_ms() };
        if let Err((error, _)) = self.store.append(hosted.slot, entry, token) {
            let (code, pause) = append_code(&error);
            return refuse(&responder, code, pause, &error.to_string());
        }
        if let Some(slot) = producer {
            hosted.partition.producers.appended(slot, &header, base_offset);
        }
        self.counters.batches_published.add(1);
        self.counters.messages_published.add(u64::from(header.record_count));
        self.counters.publish_bytes.add(batch_bytes);
        if at_once {
            self.answer(&responder, correlation, &Published { base_offset, duplicate: false });
        }
    }

    /// Opens a producer under a new epoch; answered when the epoch is durable, so that the old one stays fenced.
    pub(super) fn open_producer(&self, index: u32, responder: Responder, correlation: u64, producer: u64) {
        if producer == 0 {
            let text = "a producer id is not 0";
            return self.answer_error(&responder, correlation, ErrorCode::InvalidArgument, 0, text);
        }
        let mut hosted = self.hosted.borrow_mut();
        let hosted = hosted[index as usize].as_mut().expect("the index of a hosted partition");
        let (epoch, next_sequence) = match hosted.partition.producers.open(producer) {
            Ok(opened) => opened,
            Err(error) => {
                return self.answer_error(&responder, correlation, admit_code(&error), 0, &error.to_string());
            }
        };
        let row = hosted.partition.producers.encode(producer).expect("an open producer has a row");
        let token = Token {
            partition: index,
            on_durable: OnDurable::ProducerOpened {
                responder: responder.clone(),
                correlation,
                opened: ProducerOpened { epoch, next_sequence },
            },
        };
        if let Err(error) = self.store.append_state(hosted.slot, &producer_key(producer), Some(&row), Some(token)) {
            let (code, pause) = append_code(&error);
            self.answer_error(&responder, correlation, code, pause, &error.to_string());
        }
    }
}

impl Shard {
    /// The partition of a repeated batch was deleted before the first copy became durable.
    pub(super) fn answer_deleted(&self, waiting: &WaitingDuplicate) {
        let text = "the partition was deleted";
        self.answer_error(&waiting.responder, waiting.correlation, ErrorCode::UnknownPartition, 0, text);
    }
}

/// What a client is told of a batch or a producer that was not admitted.
fn admit_code(error: &AdmitError) -> ErrorCode {
    match error {
        AdmitError::Gap { .. } => ErrorCode::SequenceGap,
        AdmitError::Overlap { .. } => ErrorCode::SequenceOverlap,
        AdmitError::Fenced { .. } | AdmitError::LastEpoch { .. } => ErrorCode::ProducerFenced,
    }
}

/// What a client is told of an append that the store refused, and the pause before it tries again.
pub fn append_code(error: &AppendError) -> (ErrorCode, u32) {
    match error {
        AppendError::ReadOnly => (ErrorCode::StorageFailed, 0),
        AppendError::Full => (ErrorCode::StorageFull, RETRY_AFTER_FULL_MS),
        AppendError::TooLarge { .. } => (ErrorCode::BatchTooLarge, 0),
        AppendError::RowTooLarge { .. } => (ErrorCode::InvalidArgument, 0),
        AppendError::Deleted => (ErrorCode::UnknownPartition, 0),
    }
}

/// Hears from the store what became durable. Weak: the store outlives no shard, and the shard holds the store.
pub struct Sink(pub Weak<Shard>);

impl FlushSink<Token> for Sink {
    fn flushed(&mut self, tokens: &mut Vec<Token>) {
        let Some(shard) = self.0.upgrade() else { return tokens.clear() };
        let mut hosted = shard.hosted.borrow_mut();
        let mut touched = shard.touched.borrow_mut();
        for Token { partition, on_durable } in tokens.drain(..) {
            let hosted = hosted[partition as usize].as_mut();
            match on_durable {
                OnDurable::Published { responder, correlation, base_offset, producer } => {
                    // The ack: the entry and all before it in this partition are on disk now, not a moment earlier.
                    if let Some(responder) = responder {
                        shard.answer(&responder, correlation, &Published { base_offset, duplicate: false });
                    }
                    let Some(hosted) = hosted else { continue };
                    if let Some((slot, end_sequence)) = producer {
                        hosted.partition.producers.durable(slot, end_sequence);
                    }
                    if !hosted.touched {
                        hosted.touched = true;
                        touched.push(partition);
                    }
                }
                OnDurable::ProducerOpened { responder, correlation, opened } => {
                    shard.answer(&responder, correlation, &opened);
                }
                OnDurable::Done { responder, correlation } => shard.answer(&responder, correlation, &Done {}),
                OnDurable::Sought { responder, correlation, located, consumer } => {
                    shard.answer(&responder, correlation, &located);
                    consumer.go_to(located.offset);
                }
            }
        }
        for partition in touched.drain(..) {
            let Some(hosted) = hosted[partition as usize].as_mut() else { continue };
            hosted.touched = false;
            hosted.dirty_producers = true;
            hosted.readers.notify_all();
            let end_offset = shard.store.span(hosted.slot).end_offset;
            while hosted.waiting.front().is_some_and(|waiting| waiting.end_offset <= end_offset) {
                let WaitingDuplicate { responder, correlation, base_offset, .. } =
                    hosted.waiting.pop_front().expect("a front was seen");
                shard.answer(&responder, correlation, &Published { base_offset, duplicate: true });
            }
        }
        shard.room.notify_all();
    }

    fn failed(&mut self, tokens: &mut Vec<Token>, error: &FlushError) {
        let Some(shard) = self.0.upgrade() else { return tokens.clear() };
        if shard.store.is_read_only() && !shard.read_only.replace(true) {
            tracing::error!(shard = %shard.id, %error, "the journal failed: this shard takes no more publishes");
        }
        // Whether these are on disk is unknown: never an ack, and never a "no".
        let text = "a write to disk failed; whether the entry is stored is not known";
        let fail = |responder: &Responder, correlation| {
            shard.counters.publish_errors.add(1);
            shard.answer_error(responder, correlation, ErrorCode::StorageFailed, 0, text);
        };
        let mut hosted = shard.hosted.borrow_mut();
        for Token { partition, on_durable } in tokens.drain(..) {
            match on_durable {
                OnDurable::Published { responder, correlation, producer, .. } => {
                    if let Some(responder) = responder {
                        fail(&responder, correlation);
                    }
                    // The client sends it again, and then it is no duplicate.
                    if let (Some(hosted), Some((slot, _))) = (hosted[partition as usize].as_mut(), producer) {
                        hosted.partition.producers.failed(slot);
                    }
                }
                OnDurable::ProducerOpened { responder, correlation, .. }
                | OnDurable::Done { responder, correlation }
                | OnDurable::Sought { responder, correlation, .. } => fail(&responder, correlation),
            }
        }
        for hosted in hosted.iter_mut().flatten() {
            for waiting in std::mem::take(&mut hosted.waiting) {
                fail(&waiting.responder, waiting.correlation);
            }
        }
        shard.room.notify_all();
    }

    fn collect_state(&mut self, out: &mut StateBatch) {
        let Some(shard) = self.0.upgrade() else { return };
        for hosted in shard.hosted.borrow_mut().iter_mut().flatten() {
            if !std::mem::take(&mut hosted.dirty_producers) {
                continue;
            }
            let id = hosted.partition.id;
            hosted.partition.producers.collect(|producer, row| match row {
                Some(row) => out.put(id, &producer_key(producer), &row),
                None => out.delete(id, &producer_key(producer)),
            });
        }
    }
}

/// The sink of a shard, as the store wants it.
pub fn sink(shard: &Rc<Shard>) -> Rc<std::cell::RefCell<dyn FlushSink<Token>>> {
    Rc::new(std::cell::RefCell::new(Sink(Rc::downgrade(shard))))
}
