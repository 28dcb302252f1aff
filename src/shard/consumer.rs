//! Consuming: fetches that wait for messages, and subscriptions that are pushed to.
//!
//! A consumer's task sends runs of stored batches while the client has given credit and the connection has room. The
//! tail comes out of the ledger cache in the bytes that were written; what lies behind it is read from the journal. The
//! cursor moves by acks alone, never by what was sent.

use std::cell::Cell;
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use drava_protocol::ErrorCode;
use drava_protocol::message::{Damaged, Deliver, Done, Fetched, Located, Place, Subscribe, Subscribed};
use drava_runtime::local::{Broadcast, Notify};
use drava_runtime::time::Timer;
use drava_storage::{AppendError, Cached, PartitionSlot, ReadError, Run};

use super::connection::Connection;
use super::publish::{Token, append_code};
use super::{Responder, Shard};
use crate::broker::partition::cursor_key;
use crate::broker::subscriptions::{AckError, ConsumerKey, SubscribeError};

/// One delivery or fetch carries at most this much, unless a single batch is larger.
const DELIVERY_BYTES_MAX: usize = 1024 * 1024;
/// How long a fetch may wait at most.
const FETCH_WAIT_MAX: Duration = Duration::from_secs(60);

/// A consumer of one subscription on one connection.
#[derive(Debug)]
pub struct Consumer {
    pub key: ConsumerKey,
    /// Index of the hosted partition.
    pub partition: u32,
    pub subscription: String,
    credit_bytes: Cell<i64>,
    /// Where to go on instead, after a seek.
    seek: Cell<Option<u64>>,
    closed: Cell<bool>,
    wake: Notify,
}

impl Consumer {
    pub fn wake(&self) {
        self.wake.notify();
    }

    /// Deliveries go on at `offset`.
    pub fn go_to(&self, offset: u64) {
        self.seek.set(Some(offset));
        self.wake.notify();
    }

    pub fn close(&self) {
        self.closed.set(true);
        self.wake.notify();
    }
}

impl Shard {
    /// Resolves a place to an offset. Only `Time` has to look at what is stored.
    async fn offset_of(&self, slot: PartitionSlot, place: Place) -> Result<u64, ReadError> {
        let span = self.store.span(slot);
        match place {
            Place::Earliest => Ok(span.start_offset),
            Place::Latest => Ok(span.end_offset),
            Place::Offset(offset) => Ok(offset),
            Place::Time(ms) => self.store.locate_time(slot, ms).await,
        }
    }

    pub(super) fn locate(self: &Rc<Self>, index: u32, responder: Responder, correlation: u64, place: Place) {
        let Some(slot) = self.slot(index) else { return self.answer_gone(&responder, correlation) };
        let shard = self.clone();
        drava_runtime::spawn(async move {
            match shard.offset_of(slot, place).await {
                Ok(offset) => {
                    let span = shard.store.span(slot);
                    let located = Located { offset, start_offset: span.start_offset, end_offset: span.end_offset };
                    shard.answer(&responder, correlation, &located);
                }
                Err(error) => shard.answer_error(&responder, correlation, read_code(&error), 0, &read_text(&error)),
            }
        });
    }

    pub(super) fn fetch(self: &Rc<Self>, index: u32, responder: Responder, correlation: u64, fetch: Fetch) {
        let Some(slot) = self.slot(index) else { return self.answer_gone(&responder, correlation) };
        let span = self.store.span(slot);
        // With `memory` durability a message is acknowledged before it can be read: its reader waits, as for any other.
        if fetch.offset < span.start_offset || span.next_offset < fetch.offset {
            let text = format!("offset {} is outside {} to {}", fetch.offset, span.start_offset, span.end_offset);
            return self.answer_error(&responder, correlation, ErrorCode::OffsetOutOfRange, 0, &text);
        }
        let bytes_max = (fetch.bytes_max as usize).min(DELIVERY_BYTES_MAX);
        let mut runs = Vec::new();
        if self.has_room_for(&responder) {
            match self.store.read_cached(slot, fetch.offset, bytes_max, &mut runs) {
                Cached::Hit { next_offset } => {
                    return self.fetched(slot, &responder, correlation, next_offset, &mut runs);
                }
                Cached::AtEnd if fetch.wait.is_zero() => {
                    return self.fetched(slot, &responder, correlation, fetch.offset, &mut runs);
                }
                Cached::AtEnd | Cached::Miss => {}
            }
        }
        let shard = self.clone();
        drava_runtime::spawn(async move {
            shard.wait_for_messages(index, slot, &fetch, &responder).await;
            // A permit bounds what all fetches of the shard hold in memory at a time. Who does not read what was sent
            // before waits without one.
            let permit = loop {
                shard.room_for(&responder).await;
                let permit = shard.fetches.acquire_static_permit(1).await;
                if shard.has_room_for(&responder) || shard.is_over(&responder) {
                    break permit;
                }
            };
            if shard.is_over(&responder) {
                return;
            }
            if shard.slot(index).is_none() {
                return shard.answer_gone(&responder, correlation);
            }
            if shard.store.span(slot).end_offset <= fetch.offset {
                return shard.fetched(slot, &responder, correlation, fetch.offset, &mut runs);
            }
            match shard.store.read(slot, fetch.offset, bytes_max, &mut runs).await {
                Ok(next_offset) => shard.fetched(slot, &responder, correlation, next_offset, &mut runs),
                Err(ReadError::Damaged { range }) => {
                    if let Some(damaged) = shard.damaged_message(index, 0, &range) {
                        shard.answer(&responder, correlation, &damaged);
                    } else {
                        shard.answer_gone(&responder, correlation);
                    }
                }
                Err(error) => shard.answer_error(&responder, correlation, read_code(&error), 0, &read_text(&error)),
            }
            drop(permit);
        });
    }

    fn fetched(
        &self,
        slot: PartitionSlot,
        responder: &Responder,
        correlation: u64,
        next_offset: u64,
        runs: &mut Vec<Run>,
    ) {
        let span = self.store.span(slot);
        self.count_delivery(runs);
        let fetched = Fetched { next_offset, start_offset: span.start_offset, end_offset: span.end_offset };
        self.answer_with(responder, correlation, &fetched, runs);
    }

    /// What a client is told of messages that the disk has lost; `None`: the partition was deleted.
    fn damaged_message(&self, index: u32, consumer: u32, range: &Range<u64>) -> Option<Damaged> {
        let hosted = self.hosted.borrow();
        let partition = hosted[index as usize].as_ref()?.partition.id.0;
        Some(Damaged { partition, consumer, first_offset: range.start, next_offset: range.end })
    }

    fn readers(&self, index: u32) -> Option<Rc<Broadcast>> {
        self.hosted.borrow()[index as usize].as_ref().map(|hosted| hosted.readers.clone())
    }

    fn answer_gone(&self, responder: &Responder, correlation: u64) {
        self.answer_error(responder, correlation, ErrorCode::UnknownPartition, 0, "the partition was deleted");
    }

    fn count_delivery(&self, runs: &[Run]) {
        self.counters.batches_delivered.add(runs.len() as u64);
        self.counters.delivered_bytes.add(runs.iter().map(|run| run.len() as u64).sum());
    }

    /// Returns when the partition's end is past the fetch's offset, after its wait, or when partition or client is gone.
    async fn wait_for_messages(&self, index: u32, slot: PartitionSlot, fetch: &Fetch, responder: &Responder) {
        let mut timer = Timer::new(fetch.wait.min(FETCH_WAIT_MAX));
        let mut ended = match responder {
            Responder::Local(connection) => Some(connection.ended()),
            // Few of those are under way, and their core takes the answers.
            Responder::Remote { .. } => None,
        };
        let Some(readers) = self.readers(index) else { return };
        let mut changed = readers.wait();
        std::future::poll_fn(|cx| {
            let gone = self.hosted.borrow()[index as usize].is_none();
            if gone || self.is_over(responder) || fetch.offset < self.store.span(slot).end_offset || self.draining.get()
            {
                return Poll::Ready(());
            }
            changed.enter(cx);
            if let Some(ended) = &mut ended {
                ended.enter(cx);
            }
            std::pin::Pin::new(&mut timer).poll(cx)
        })
        .await
    }

    pub(super) fn subscribe(
        self: &Rc<Self>,
        index: u32,
        connection: &Rc<Connection>,
        correlation: u64,
        request: Subscribe,
    ) {
        let shard = self.clone();
        let connection = connection.clone();
        let responder = Responder::Local(connection.clone());
        let Some(slot) = self.slot(index) else { return self.answer_gone(&responder, correlation) };
        drava_runtime::spawn(async move {
            let start = match shard.offset_of(slot, request.start).await {
                Ok(start) => start,
                Err(error) => {
                    return shard.answer_error(&responder, correlation, read_code(&error), 0, &read_text(&error));
                }
            };
            shard.attach(index, &connection, correlation, &request, start);
        });
    }

    fn attach(
        self: &Rc<Self>,
        index: u32,
        connection: &Rc<Connection>,
        correlation: u64,
        request: &Subscribe,
        start: u64,
    ) {
        let responder = Responder::Local(connection.clone());
        let key = ConsumerKey { connection: connection.id, consumer: request.consumer };
        if connection.is_gone() {
            // It broke while the start was looked up: a consumer that nobody is would keep everybody else out.
            return;
        }
        if connection.consumer(request.consumer).is_some() {
            let text = format!("consumer {} is in use on this connection", request.consumer);
            return self.answer_error(&responder, correlation, ErrorCode::InvalidArgument, 0, &text);
        }
        let (attached, slot) = {
            let mut hosted = self.hosted.borrow_mut();
            let Some(hosted) = hosted[index as usize].as_mut() else {
                return self.answer_gone(&responder, correlation);
            };
            // Beyond the end there is nothing yet that could be done already.
            let span = self.store.span(hosted.slot);
            let start = start.clamp(span.start_offset, span.end_offset);
            let attached = hosted.partition.subscriptions.attach(&request.subscription, key, start, request.take_over);
            hosted.dirty_cursors |= attached.as_ref().is_ok_and(|attached| attached.created);
            self.store.set_floor(hosted.slot, hosted.partition.subscriptions.floor());
            (attached, hosted.slot)
        };
        let attached = match attached {
            Ok(attached) => attached,
            Err(error) => {
                let code = match error {
                    SubscribeError::Busy(_) => ErrorCode::SubscriptionBusy,
                    SubscribeError::Name(_) | SubscribeError::TooMany => ErrorCode::InvalidArgument,
                };
                return self.answer_error(&responder, correlation, code, 0, &error.to_string());
            }
        };
        if attached.created {
            self.cursors_dirty();
        }
        if let Some(replaced) = attached.replaced {
            self.close_consumer(replaced);
        }
        let consumer = Rc::new(Consumer {
            key,
            partition: index,
            subscription: request.subscription.clone(),
            credit_bytes: Cell::new(0),
            seek: Cell::new(None),
            closed: Cell::new(false),
            wake: Notify::default(),
        });
        connection.add_consumer(request.consumer, consumer.clone());
        let span = self.store.span(slot);
        let offset = attached.cursor.clamp(span.start_offset, span.end_offset);
        let subscribed = Subscribed { offset, start_offset: span.start_offset, end_offset: span.end_offset };
        self.answer(&responder, correlation, &subscribed);
        drava_runtime::spawn(deliver(self.clone(), connection.clone(), consumer, offset));
    }

    pub(super) fn flow(&self, connection: &Connection, consumer: u32, bytes: u32) {
        if let Some(consumer) = connection.consumer(consumer) {
            consumer.credit_bytes.set(consumer.credit_bytes.get().saturating_add(i64::from(bytes)));
            consumer.wake();
        }
    }

    /// Moves a cursor. With a correlation it is answered when the cursor is durable; without, the cursor is saved soon.
    pub(super) fn ack(&self, connection: &Rc<Connection>, correlation: u64, consumer: u32, offset: u64) {
        let responder = Responder::Local(connection.clone());
        let fail = |error: &AckError| {
            let code = match error {
                AckError::Unknown => ErrorCode::UnknownSubscription,
                AckError::BeyondEnd { .. } => ErrorCode::InvalidArgument,
            };
            self.answer_error(&responder, correlation, code, 0, &error.to_string());
        };
        let Some(consumer) = connection.consumer(consumer) else { return fail(&AckError::Unknown) };
        let mut hosted = self.hosted.borrow_mut();
        let Some(hosted) = hosted[consumer.partition as usize].as_mut() else { return fail(&AckError::Unknown) };
        let end = self.store.span(hosted.slot).end_offset;
        if let Err(error) = hosted.partition.subscriptions.ack(&consumer.subscription, consumer.key, offset, end) {
            return fail(&error);
        }
        if correlation == 0 {
            hosted.dirty_cursors = true;
            connection.unanswered();
            self.cursors_dirty();
            return;
        }
        let token = Token::done(consumer.partition, responder.clone(), correlation);
        self.save_cursor(hosted, &consumer.subscription, token, &responder, correlation);
    }

    /// Saves a cursor that was just moved; `token` answers `correlation` when it is durable.
    fn save_cursor(
        &self,
        hosted: &mut super::Hosted,
        subscription: &str,
        token: Token,
        responder: &Responder,
        correlation: u64,
    ) {
        let saved = hosted.partition.subscriptions.save_one(subscription, |cursor| {
            let row = cursor.to_le_bytes();
            self.store.append_state(hosted.slot, &cursor_key(subscription), Some(&row), Some(token))
        });
        self.store.set_floor(hosted.slot, hosted.partition.subscriptions.floor());
        if let Err(error) = saved {
            hosted.dirty_cursors = true;
            let (code, pause) = append_code(&error);
            self.answer_error(responder, correlation, code, pause, &error.to_string());
        }
    }

    pub(super) fn seek(self: &Rc<Self>, connection: &Rc<Connection>, correlation: u64, consumer: u32, place: Place) {
        let responder = Responder::Local(connection.clone());
        let Some(consumer) = connection.consumer(consumer) else {
            let text = AckError::Unknown.to_string();
            return self.answer_error(&responder, correlation, ErrorCode::UnknownSubscription, 0, &text);
        };
        let Some(slot) = self.slot(consumer.partition) else { return self.answer_gone(&responder, correlation) };
        let shard = self.clone();
        drava_runtime::spawn(async move {
            let offset = match shard.offset_of(slot, place).await {
                Ok(offset) => offset,
                Err(error) => {
                    return shard.answer_error(&responder, correlation, read_code(&error), 0, &read_text(&error));
                }
            };
            let span = shard.store.span(slot);
            let offset = offset.clamp(span.start_offset, span.end_offset);
            let mut hosted = shard.hosted.borrow_mut();
            let moved = hosted[consumer.partition as usize]
                .as_mut()
                .ok_or(AckError::Unknown)
                .and_then(|h| h.partition.subscriptions.seek(&consumer.subscription, consumer.key, offset).map(|()| h));
            match moved {
                Ok(hosted) => {
                    let located = Located { offset, start_offset: span.start_offset, end_offset: span.end_offset };
                    let token = Token::sought(responder.clone(), correlation, located, consumer.clone());
                    shard.save_cursor(hosted, &consumer.subscription, token, &responder, correlation);
                }
                Err(error) => {
                    shard.answer_error(&responder, correlation, ErrorCode::UnknownSubscription, 0, &error.to_string());
                }
            }
        });
    }

    pub(super) fn close_consumer_of(&self, connection: &Rc<Connection>, correlation: u64, consumer: u32) {
        if let Some(consumer) = connection.remove_consumer(consumer) {
            self.detach(connection, &consumer);
        }
        connection.answer(correlation, &Done {});
    }

    pub(super) fn delete_subscription(&self, index: u32, responder: Responder, correlation: u64, subscription: &str) {
        let mut hosted = self.hosted.borrow_mut();
        let hosted = hosted[index as usize].as_mut().expect("the index of a hosted partition");
        if !hosted.partition.subscriptions.delete(subscription) {
            let text = format!("there is no subscription {subscription}");
            return self.answer_error(&responder, correlation, ErrorCode::UnknownSubscription, 0, &text);
        }
        self.store.set_floor(hosted.slot, hosted.partition.subscriptions.floor());
        hosted.readers.notify_all();
        let token = Token::done(index, responder.clone(), correlation);
        if let Err(error) = self.store.append_state(hosted.slot, &cursor_key(subscription), None, Some(token)) {
            let (code, pause) = append_code(&error);
            self.answer_error(&responder, correlation, code, pause, &error.to_string());
        }
    }

    /// The consumer ends; its subscription stays for the next.
    pub(super) fn detach(&self, connection: &Connection, consumer: &Consumer) {
        consumer.close();
        if let Some(hosted) = self.hosted.borrow_mut()[consumer.partition as usize].as_mut() {
            hosted.partition.subscriptions.detach(&consumer.subscription, consumer.key);
        }
        connection.remove_consumer(consumer.key.consumer);
    }
}

/// A fetch as the shard takes it.
#[derive(Clone, Copy, Debug)]
pub struct Fetch {
    pub offset: u64,
    pub bytes_max: u32,
    pub wait: Duration,
}

/// Pushes to one consumer until it ends.
async fn deliver(shard: Rc<Shard>, connection: Rc<Connection>, consumer: Rc<Consumer>, mut position: u64) {
    let mut runs: Vec<Run> = Vec::new();
    let Some(readers) = shard.readers(consumer.partition) else { return };
    let mut changed = readers.wait();
    loop {
        // Wait until the client has credit, the connection room, and the partition messages.
        let slot = std::future::poll_fn(|cx| {
            let hosted = shard.hosted.borrow();
            let hosted = hosted[consumer.partition as usize].as_ref();
            let Some(hosted) = hosted.filter(|h| {
                !consumer.closed.get() && h.partition.subscriptions.holds(&consumer.subscription, consumer.key)
            }) else {
                return Poll::Ready(None);
            };
            if let Some(offset) = consumer.seek.take() {
                position = offset;
            }
            if 0 < consumer.credit_bytes.get()
                && connection.has_room()
                && position < shard.store.span(hosted.slot).end_offset
            {
                return Poll::Ready(Some(hosted.slot));
            }
            changed.enter(cx);
            if consumer.wake.poll_notified(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await;
        let Some(slot) = slot else { break };
        let credit = consumer.credit_bytes.get();
        let bytes_max = usize::try_from(credit).unwrap_or(0).min(DELIVERY_BYTES_MAX);
        let next_offset = match shard.store.read_cached(slot, position, bytes_max, &mut runs) {
            Cached::Hit { next_offset } => next_offset,
            Cached::AtEnd => continue,
            Cached::Miss => match shard.store.read(slot, position, bytes_max, &mut runs).await {
                Ok(next_offset) => next_offset,
                Err(ReadError::Trimmed { start_offset, .. }) => {
                    // Retention was faster than the consumer; go on with what is kept.
                    position = start_offset.max(position + 1);
                    continue;
                }
                Err(ReadError::Damaged { range }) => {
                    // What cannot be read must not keep the consumer from what can; the client is told what it misses.
                    let Some(damaged) = shard.damaged_message(consumer.partition, consumer.key.consumer, &range) else {
                        break;
                    };
                    if !consumer.closed.get() && consumer.seek.get().is_none() {
                        position = range.end;
                        connection.push(0, &damaged);
                    }
                    continue;
                }
                Err(error) => {
                    let text = read_text(&error);
                    tracing::warn!(error = text, subscription = consumer.subscription, "a delivery failed");
                    let body = drava_protocol::message::Error {
                        code: read_code(&error) as u16,
                        retry_after_ms: 0,
                        text: format!("subscription {}: {text}", consumer.subscription),
                    };
                    connection.push(0, &body);
                    break;
                }
            },
        };
        if consumer.closed.get() || consumer.seek.get().is_some() {
            runs.clear();
            continue;
        }
        position = next_offset;
        let bytes: usize = runs.iter().map(|run| run.len()).sum();
        consumer.credit_bytes.set(consumer.credit_bytes.get() - bytes as i64);
        shard.count_delivery(&runs);
        let end_offset = shard.store.span(slot).end_offset;
        let body = Deliver { consumer: consumer.key.consumer, next_offset, end_offset };
        connection.push_with(0, &body, &mut runs);
    }
    shard.detach(&connection, &consumer);
}

/// What a client is told of a read that failed.
pub fn read_code(error: &ReadError) -> ErrorCode {
    match error {
        ReadError::Trimmed { .. } | ReadError::PastEnd { .. } => ErrorCode::OffsetOutOfRange,
        ReadError::Damaged { .. } => ErrorCode::StorageDamaged,
        ReadError::Io { .. } | ReadError::Index(_) => ErrorCode::StorageFailed,
        ReadError::Deleted => ErrorCode::UnknownPartition,
    }
}

/// What a client is told in words: without the paths that the operating system and the index name, which are logged.
fn read_text(error: &ReadError) -> String {
    match error {
        ReadError::Io { segment, .. } => {
            tracing::error!(%error, "a read failed");
            format!("segment {segment} could not be read")
        }
        ReadError::Index(_) => {
            tracing::error!(%error, "a read failed");
            "the index could not be read".to_owned()
        }
        ReadError::Trimmed { .. } | ReadError::PastEnd { .. } | ReadError::Damaged { .. } | ReadError::Deleted => {
            error.to_string()
        }
    }
}

/// Saves cursors that moved, a short while after the first move and at a shutdown.
#[derive(Debug, Default)]
pub struct CursorSaver {
    dirty: Cell<bool>,
    wake: Notify,
}

impl CursorSaver {
    pub fn mark(&self) {
        if !self.dirty.replace(true) {
            self.wake.notify();
        }
    }
}

impl Shard {
    fn cursors_dirty(&self) {
        self.cursor_saver.mark();
    }

    /// Stages every cursor that moved.
    pub(super) fn save_cursors(&self) {
        self.cursor_saver.dirty.set(false);
        for hosted in self.hosted.borrow_mut().iter_mut().flatten() {
            if !std::mem::take(&mut hosted.dirty_cursors) {
                continue;
            }
            let slot = hosted.slot;
            let all_saved = hosted.partition.subscriptions.save(|name, cursor| {
                let row = cursor.to_le_bytes();
                self.store.append_state(slot, &cursor_key(name), Some(&row), None).inspect_err(|error| {
                    // A full disk may have room again; a failed one has not.
                    if matches!(error, AppendError::Full) {
                        self.cursors_dirty();
                    }
                    tracing::warn!(%error, subscription = name, "a cursor could not be saved");
                })
            });
            hosted.dirty_cursors = !all_saved;
            self.store.set_floor(slot, hosted.partition.subscriptions.floor());
        }
    }

    /// Runs for the life of the shard.
    pub(super) async fn save_cursors_as_they_move(self: Rc<Self>) {
        loop {
            self.cursor_saver.wake.notified().await;
            // The timer trails: whatever moves within it is saved with it, and the last move of a burst is saved too.
            drava_runtime::time::sleep(self.limits.cursor_save_interval).await;
            self.save_cursors();
        }
    }
}
