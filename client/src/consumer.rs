//! The consumer of a durable, exclusive subscription.
//!
//! Each partition has a *lane*: a task that subscribes at the owning core, grants it credit, and hands deliveries to the
//! consumer through one bounded channel. Credit goes back to the node as the application takes messages, so that what
//! waits is never more than one window for each partition. An ack marks everything up to its message as done; the lane
//! sends the newest mark, and lets the node confirm it now and then, which also shows whether another consumer took over.
//!
//! After a lost connection the node begins again at its cursor. What the application has taken already is not handed to
//! it twice in the life of one consumer; what it had not taken is delivered again, and nothing is skipped.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use drava_protocol::message::{Ack, Place, SUBSCRIPTION_NAME_BYTES_MAX, Seek, Subscribe};
use drava_protocol::topic::TopicName;
use drava_protocol::{ErrorCode, Retry};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::client::Inner;
use crate::connection::{Connection, Inbox};
use crate::error::{CallError, SubscribeError, TopicError};
use crate::reader::{UNPACKED_BYTES_MAX, chosen};
use crate::record::{Message, Unpacker};
use crate::session::Answer;

/// Deliveries that wait for the consumer in the channel, per partition; the rest of the window waits in the inbox.
const DELIVERIES_MAX: usize = 2;
const WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// Acks that the node was told of are confirmed this often.
const CONFIRM_PERIOD: Duration = Duration::from_secs(1);
/// After so many periods without an ack the node is asked whether the subscription is still ours.
const QUIET_PERIODS_MAX: u32 = 10;

/// Builds a [`Consumer`].
#[derive(Clone, Debug)]
pub struct ConsumerBuilder {
    inner: Arc<Inner>,
    topic: String,
    subscription: String,
    start: Place,
    partition: Option<u32>,
    take_over: bool,
    window_bytes: u32,
}

impl ConsumerBuilder {
    pub(crate) fn new(inner: Arc<Inner>, topic: String, subscription: String) -> ConsumerBuilder {
        ConsumerBuilder {
            inner,
            topic,
            subscription,
            start: Place::Earliest,
            partition: None,
            take_over: false,
            window_bytes: WINDOW_BYTES,
        }
    }

    /// Where a subscription starts that does not exist yet. Default: the oldest message that is kept.
    pub fn start(mut self, place: Place) -> Self {
        self.start = place;
        self
    }

    /// Consume this partition alone, by its 0-based place in the topic. Default: all.
    pub fn partition(mut self, index: u32) -> Self {
        self.partition = Some(index);
        self
    }

    /// Take the subscription over from the consumer that has it. Default: [`SubscribeError::Busy`].
    pub fn take_over(mut self) -> Self {
        self.take_over = true;
        self
    }

    /// Bytes that each partition may deliver ahead of the application. Default: 2 MiB.
    pub fn window_bytes(mut self, bytes: u32) -> Self {
        self.window_bytes = bytes.clamp(1, i32::MAX as u32);
        self
    }

    /// Looks the topic up and subscribes to its partitions.
    pub async fn build(self) -> Result<Consumer, SubscribeError> {
        let name_bytes = self.subscription.len();
        if name_bytes == 0 || SUBSCRIPTION_NAME_BYTES_MAX < name_bytes {
            return Err(SubscribeError::Name(name_bytes));
        }
        let name = TopicName::parse(&self.topic).map_err(TopicError::from)?;
        let topic = self.inner.lookup(&name).await?;
        let places = chosen(&topic.name, topic.partitions, self.partition)?;
        let (events, chunks) = mpsc::channel(DELIVERIES_MAX * places.len());
        let mut consumer = Consumer { chunks, current: None, lanes: Vec::new() };
        let mut tasks = Vec::new();
        for place in places {
            let shared = Arc::new(Shared::default());
            let (requests, asked) = mpsc::channel(1);
            let mut lane = Lane {
                inner: self.inner.clone(),
                topic: name.clone(),
                subscription: self.subscription.clone(),
                start: self.start,
                take_over: self.take_over,
                window_bytes: self.window_bytes,
                index: place.index,
                partition: place.partition,
                position: 0,
                pending: None,
                seek: None,
                seeks: 0,
                shared: shared.clone(),
            };
            let attached = lane.attach_first().await?;
            consumer.lanes.push(LaneDoor { index: place.index, shared, requests, seeks: 0 });
            tasks.push((lane, attached, asked));
        }
        for (lane, attached, asked) in tasks {
            tokio::spawn(lane.run(attached, asked, events.clone()));
        }
        Ok(consumer)
    }
}

/// Receives the messages of a durable subscription. Dropping it leaves acks that were not flushed to chance: call
/// [`Consumer::close`].
pub struct Consumer {
    chunks: mpsc::Receiver<Result<Chunk, SubscribeError>>,
    current: Option<Current>,
    lanes: Vec<LaneDoor>,
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("partitions", &self.lanes.len()).finish_non_exhaustive()
    }
}

struct LaneDoor {
    index: u32,
    shared: Arc<Shared>,
    requests: mpsc::Sender<LaneRequest>,
    /// Chunks from before this many seeks are of an old place.
    seeks: u64,
}

enum LaneRequest {
    /// Go on from another place; answered with its offset and the number of seeks with this one.
    Seek(LaneSeek),
    /// Confirm all acks.
    Flush(oneshot::Sender<Result<(), SubscribeError>>),
    /// Confirm all acks and end.
    Close(oneshot::Sender<Result<(), SubscribeError>>),
}

struct LaneSeek {
    place: Place,
    done: oneshot::Sender<Result<Sought, SubscribeError>>,
}

#[derive(Clone, Copy, Debug)]
struct Sought {
    offset: u64,
    seeks: u64,
}

/// What the application tells a lane without waiting.
#[derive(Debug, Default)]
struct Shared {
    /// Everything below is done.
    acked: AtomicU64,
    /// Taken by the application and not yet granted again.
    taken: Mutex<Taken>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Taken {
    bytes: u32,
    /// The subscription that the bytes belong to: credit of one that is over is worth nothing.
    incarnation: u64,
}

struct Chunk {
    partition: u32,
    position: u64,
    payload: Bytes,
    incarnation: u64,
    /// How often the lane had sought when it came.
    seeks: u64,
}

struct Current {
    partition: u32,
    position: u64,
    /// Given back when the last message is taken.
    credit_bytes: u32,
    incarnation: u64,
    unpacker: Unpacker,
}

impl Consumer {
    /// The next message. Messages of one partition come in order, those of different partitions in no order.
    ///
    /// After an error the partition that it is about is not consumed on; the others are. `Closed` when none is left.
    /// [`SubscribeError::Damaged`] is no end: what lies behind the damage follows, and an ack of it passes the damage.
    pub async fn next(&mut self) -> Result<Message, SubscribeError> {
        loop {
            if let Some(current) = &mut self.current {
                match current.unpacker.next() {
                    Ok(Some(message)) => return Ok(message),
                    Ok(None) => self.give_back(),
                    Err(source) => {
                        let (partition, offset) = (current.partition, current.position);
                        self.current = None;
                        // An ack of what comes after would move the cursor past what was never read.
                        self.lanes.retain(|lane| lane.index != partition);
                        return Err(SubscribeError::Batch { partition, offset, source });
                    }
                }
            }
            let chunk = self.chunks.recv().await.ok_or(SubscribeError::Closed)??;
            let Some(lane) = self.lanes.iter().find(|lane| lane.index == chunk.partition) else { continue };
            if chunk.seeks < lane.seeks {
                lane.shared.give_back(chunk.incarnation, chunk.payload.len() as u32);
                continue;
            }
            self.current = Some(Current {
                partition: chunk.partition,
                position: chunk.position,
                credit_bytes: chunk.payload.len() as u32,
                incarnation: chunk.incarnation,
                unpacker: Unpacker::new(chunk.partition, chunk.position, chunk.payload, UNPACKED_BYTES_MAX),
            });
        }
    }

    /// Marks `message` and all before it in its partition as done. Sent soon; [`Consumer::flush`] waits until the cursor
    /// is durable.
    pub fn ack(&self, message: &Message) {
        self.ack_below(message.partition, message.offset.saturating_add(1));
    }

    /// Marks everything below `offset` in a partition as done. Does nothing for a partition that is not consumed.
    pub fn ack_below(&self, partition: u32, offset: u64) {
        if let Some(lane) = self.lanes.iter().find(|lane| lane.index == partition)
            && lane.shared.acked.fetch_max(offset, Ordering::AcqRel) < offset
        {
            lane.shared.changed.notify_one();
        }
    }

    /// Moves the cursor of a partition to `place`, backwards too, and returns its offset there, which is within what is
    /// kept. The next message of the partition is the first at that offset or after; acks of earlier messages count no
    /// more. Where the cursor is after an error, or when the returned future is dropped, is not known: seek again.
    ///
    /// A lost connection is waited for. Errors: `Closed` for a partition that is not consumed, or not any more.
    pub async fn seek(&mut self, partition: u32, place: Place) -> Result<u64, SubscribeError> {
        let lane = self.lanes.iter_mut().find(|lane| lane.index == partition).ok_or(SubscribeError::Closed)?;
        let (done, heard) = oneshot::channel();
        let seek = LaneSeek { place, done };
        lane.requests.send(LaneRequest::Seek(seek)).await.map_err(|_| SubscribeError::Closed)?;
        let sought = heard.await.unwrap_or(Err(SubscribeError::Closed))?;
        lane.seeks = sought.seeks;
        if self.current.as_ref().is_some_and(|current| current.partition == partition) {
            self.give_back();
        }
        Ok(sought.offset)
    }

    /// Returns when all acks are durable.
    pub async fn flush(&self) -> Result<(), SubscribeError> {
        for lane in &self.lanes {
            let (done, heard) = oneshot::channel();
            lane.requests.send(LaneRequest::Flush(done)).await.map_err(|_| SubscribeError::Closed)?;
            heard.await.unwrap_or(Err(SubscribeError::Closed))?;
        }
        Ok(())
    }

    /// Makes all acks durable and lets the subscription go; the next consumer goes on from there.
    pub async fn close(mut self) -> Result<(), SubscribeError> {
        // Lanes must not wait for room in the channel while they are asked to end.
        self.chunks.close();
        for lane in &self.lanes {
            let (done, heard) = oneshot::channel();
            lane.requests.send(LaneRequest::Close(done)).await.map_err(|_| SubscribeError::Closed)?;
            heard.await.unwrap_or(Err(SubscribeError::Closed))?;
        }
        Ok(())
    }

    fn give_back(&mut self) {
        let Some(current) = self.current.take() else { return };
        if let Some(lane) = self.lanes.iter().find(|lane| lane.index == current.partition) {
            lane.shared.give_back(current.incarnation, current.credit_bytes);
        }
    }
}

impl Shared {
    fn give_back(&self, incarnation: u64, bytes: u32) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.incarnation == incarnation {
            taken.bytes = taken.bytes.saturating_add(bytes);
            drop(taken);
            self.changed.notify_one();
        }
    }

    /// A new subscription begins: credit of earlier ones is void.
    fn begin(&self) -> u64 {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.incarnation += 1;
        taken.bytes = 0;
        taken.incarnation
    }

    /// The credit to grant now, once it is worth a frame.
    fn take_credit(&self, min: u32) -> Option<u32> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        (min <= taken.bytes).then(|| std::mem::take(&mut taken.bytes))
    }
}

/// The consumer of one partition.
struct Lane {
    inner: Arc<Inner>,
    topic: TopicName,
    subscription: String,
    start: Place,
    take_over: bool,
    window_bytes: u32,
    index: u32,
    partition: u64,
    /// The next offset to hand to the application.
    position: u64,
    /// Waits for room in the channel. It counts in `position`, so it outlives its connection.
    pending: Option<Result<Chunk, SubscribeError>>,
    /// Asked for and not answered yet. It outlives its connection, too.
    seek: Option<LaneSeek>,
    seeks: u64,
    shared: Arc<Shared>,
}

/// A subscription on one connection.
struct Attached {
    connection: Connection,
    consumer: u32,
    inbox: Arc<Inbox>,
    incarnation: u64,
    /// What the node was told is done.
    acked: u64,
    /// What it confirmed.
    confirmed: u64,
}

enum Left {
    Lost,
    Over,
}

impl Lane {
    /// Subscribes for the first time: what is not passing is told at once.
    async fn attach_first(&mut self) -> Result<Attached, SubscribeError> {
        let mut backoff = self.inner.backoff();
        let give_up_at = tokio::time::Instant::now() + self.inner.options.request_timeout;
        loop {
            match self.attach().await {
                Ok((attached, offset)) => {
                    self.position = offset;
                    return Ok(attached);
                }
                Err(error @ SubscribeError::Busy(_)) => return Err(error),
                Err(error) if error.retry() == Retry::No || give_up_at <= tokio::time::Instant::now() => {
                    return Err(error);
                }
                Err(_) => tokio::time::sleep(backoff.pause()).await,
            }
        }
    }

    /// Subscribes and grants the whole window. Returns the offset that deliveries start at.
    async fn attach(&self) -> Result<(Attached, u64), SubscribeError> {
        let (place, connection) = self.inner.owner(&self.topic, self.index).await?;
        // The topic was deleted and made again: that one knows nothing of our acks.
        if place.partition != self.partition {
            return Err(TopicError::UnknownTopic(self.topic.as_str().to_owned()).into());
        }
        let timeout = self.inner.options.request_timeout;
        let inbox = Arc::new(Inbox::default());
        let consumer = connection.new_consumer();
        let subscribe = Subscribe {
            partition: self.partition,
            consumer,
            subscription: self.subscription.clone(),
            start: self.start,
            take_over: self.take_over,
        };
        let reply = connection.subscribe(subscribe, inbox.clone(), timeout).await.map_err(subscribe_error)?;
        let Answer::Subscribed { offset, .. } = reply.answer else {
            unreachable!("the session checked the kind");
        };
        let incarnation = self.shared.begin();
        let attached = Attached { connection, consumer, inbox, incarnation, acked: 0, confirmed: 0 };
        attached.connection.flow(consumer, self.window_bytes).await?;
        Ok((attached, offset))
    }

    /// Keeps the lane attached until it is over.
    async fn run(
        mut self,
        attached: Attached,
        mut requests: mpsc::Receiver<LaneRequest>,
        chunks: mpsc::Sender<Result<Chunk, SubscribeError>>,
    ) {
        let mut backoff = self.inner.backoff();
        let mut attached = Some(attached);
        let mut busy_since = None;
        loop {
            let mut current = match attached.take() {
                Some(attached) => attached,
                None => match self.attach().await {
                    Ok((attached, _)) => attached,
                    Err(error) => {
                        // The node may need a while to see that the connection broke which we were subscribed on. A
                        // consumer that came meanwhile keeps the subscription.
                        let busy = matches!(error, SubscribeError::Busy(_));
                        let since = *busy_since.get_or_insert_with(Instant::now);
                        let lost = busy && self.inner.options.request_timeout <= since.elapsed();
                        if lost || error.retry() == Retry::No {
                            return self.end(error, requests, &chunks).await;
                        }
                        if !busy {
                            busy_since = None;
                        }
                        tracing::debug!(topic = %self.topic, partition = self.index, %error, "could not subscribe again");
                        tokio::select! {
                            () = tokio::time::sleep(backoff.pause()) => {}
                            () = chunks.closed() => return reply(requests, CallError::Disconnected.into()).await,
                        }
                        continue;
                    }
                },
            };
            busy_since = None;
            let began = Instant::now();
            match self.drive(&mut current, &mut requests, &chunks).await {
                Ok(Left::Over) => return,
                Ok(Left::Lost) => {
                    // An answer that did not come in time says nothing about the connection: there we would be in our
                    // own way.
                    if !current.connection.is_closed() {
                        self.dropped(&current).await;
                    }
                }
                Err(error) => return self.end(error, requests, &chunks).await,
            }
            if self.inner.options.backoff_max <= began.elapsed() {
                backoff.reset();
            }
            tokio::time::sleep(backoff.pause()).await;
        }
    }

    /// Tells the application, whatever it waits for.
    async fn end(
        &self,
        error: SubscribeError,
        mut requests: mpsc::Receiver<LaneRequest>,
        chunks: &mpsc::Sender<Result<Chunk, SubscribeError>>,
    ) {
        tokio::select! {
            biased;
            request = requests.recv() => respond(request, error),
            permit = chunks.reserve() => match permit {
                Ok(permit) => permit.send(Err(error)),
                // It is closing, and will ask how that went.
                Err(_) => reply(requests, error).await,
            },
        }
    }

    async fn drive(
        &mut self,
        attached: &mut Attached,
        requests: &mut mpsc::Receiver<LaneRequest>,
        chunks: &mpsc::Sender<Result<Chunk, SubscribeError>>,
    ) -> Result<Left, SubscribeError> {
        let mut confirm = tokio::time::interval(CONFIRM_PERIOD);
        confirm.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut quiet_periods = 0;
        loop {
            if let Some(seek) = self.seek.take()
                && let Err(error) = self.seek(attached, seek).await
            {
                return lost_or(error);
            }
            if self.pending.is_none() {
                self.pending = self.next_chunk(attached);
            }
            if attached.inbox.is_doubted()
                && let Err(error) = self.probe(attached).await
            {
                return lost_or(error);
            }
            if let Some(bytes) = self.shared.take_credit((self.window_bytes / 4).max(1))
                && attached.connection.flow(attached.consumer, bytes).await.is_err()
            {
                return Ok(Left::Lost);
            }
            let acked = self.shared.acked.load(Ordering::Acquire);
            if attached.acked < acked {
                if attached.connection.ack(attached.consumer, acked).await.is_err() {
                    return Ok(Left::Lost);
                }
                attached.acked = acked;
            }
            tokio::select! {
                request = requests.recv() => match request {
                    Some(LaneRequest::Seek(seek)) => self.seek = Some(seek),
                    Some(LaneRequest::Flush(done)) => {
                        match self.confirm(attached).await {
                            Ok(()) => drop(done.send(Ok(()))),
                            Err(error) => {
                                let over = error.retry() == Retry::No;
                                drop(done.send(Err(error)));
                                return Ok(if over { Left::Over } else { Left::Lost });
                            }
                        }
                    }
                    Some(LaneRequest::Close(done)) => {
                        let mut closed = self.confirm(attached).await;
                        if closed.is_ok() {
                            let timeout = self.inner.options.request_timeout;
                            let ended = attached.connection.close_consumer(attached.consumer, timeout).await;
                            closed = ended.map(drop).map_err(subscribe_error);
                        }
                        drop(done.send(closed));
                        return Ok(Left::Over);
                    }
                    None => return Ok(self.dropped(attached).await),
                },
                permit = chunks.reserve(), if self.pending.is_some() && !chunks.is_closed() => {
                    // Closing: what is delivered now is delivered again to the next consumer.
                    let chunk = self.pending.take().expect("the branch is for one");
                    if let Ok(permit) = permit {
                        permit.send(chunk);
                    }
                },
                () = attached.inbox.arrived.notified(), if self.pending.is_none() => {}
                () = self.shared.changed.notified() => {}
                _ = confirm.tick() => {
                    quiet_periods += 1;
                    let unconfirmed = attached.confirmed < attached.acked;
                    if unconfirmed || QUIET_PERIODS_MAX <= quiet_periods {
                        quiet_periods = 0;
                        if let Err(error) = self.probe(attached).await {
                            return lost_or(error);
                        }
                    }
                }
                () = attached.connection.closed() => return Ok(Left::Lost),
            }
        }
    }

    /// The next delivery that holds something new.
    fn next_chunk(&mut self, attached: &Attached) -> Option<Result<Chunk, SubscribeError>> {
        while let Some(delivery) = attached.inbox.pop() {
            if delivery.next_offset <= self.position {
                self.shared.give_back(attached.incarnation, delivery.payload.len() as u32);
                continue;
            }
            let position = std::mem::replace(&mut self.position, delivery.next_offset);
            let (partition, incarnation) = (self.index, attached.incarnation);
            return Some(match delivery.damaged_from {
                None => Ok(Chunk { partition, position, payload: delivery.payload, incarnation, seeks: self.seeks }),
                Some(first_offset) => {
                    let offsets = first_offset.max(position)..delivery.next_offset;
                    Err(SubscribeError::Damaged { topic: self.topic.as_str().to_owned(), partition, offsets })
                }
            });
        }
        None
    }

    /// Moves the cursor, and forgets what came from the old place. An error that passes leaves the seek to the next
    /// connection; another one is told to whoever asked, and ends the lane.
    async fn seek(&mut self, attached: &mut Attached, seek: LaneSeek) -> Result<(), SubscribeError> {
        if seek.done.is_closed() {
            return Ok(());
        }
        let request = Seek { consumer: attached.consumer, place: seek.place };
        let timeout = self.inner.options.request_timeout;
        let reply = match attached.connection.seek(request, attached.inbox.clone(), timeout).await {
            Ok(reply) => reply,
            Err(error) => {
                let error = subscribe_error(error);
                if error.retry() == Retry::No {
                    drop(seek.done.send(Err(error)));
                    return Err(SubscribeError::Closed);
                }
                self.seek = Some(seek);
                return Err(error);
            }
        };
        let Answer::Located { offset, .. } = reply.answer else {
            unreachable!("the session checked the kind");
        };
        let pending_bytes = self.pending.take().and_then(Result::ok).map_or(0, |chunk| chunk.payload.len() as u32);
        self.shared.give_back(attached.incarnation, pending_bytes + attached.inbox.take_cleared_bytes());
        self.position = offset;
        self.seeks += 1;
        self.shared.acked.store(offset, Ordering::Release);
        (attached.acked, attached.confirmed) = (offset, offset);
        // Whoever asked may have stopped waiting.
        drop(seek.done.send(Ok(Sought { offset, seeks: self.seeks })));
        Ok(())
    }

    /// Makes the newest ack durable.
    async fn confirm(&self, attached: &mut Attached) -> Result<(), SubscribeError> {
        if self.shared.acked.load(Ordering::Acquire) == attached.confirmed {
            return Ok(());
        }
        self.probe(attached).await
    }

    /// The same, and even if there is nothing new: the answer tells whether the subscription is still ours.
    async fn probe(&self, attached: &mut Attached) -> Result<(), SubscribeError> {
        let acked = self.shared.acked.load(Ordering::Acquire);
        let request = Ack { consumer: attached.consumer, offset: acked };
        attached.connection.call(request, self.inner.options.request_timeout).await.map_err(subscribe_error)?;
        attached.acked = attached.acked.max(acked);
        attached.confirmed = acked;
        Ok(())
    }

    /// The consumer ends without anybody who waits for it: the last ack is sent.
    async fn dropped(&self, attached: &Attached) -> Left {
        let timeout = self.inner.options.request_timeout;
        let acked = self.shared.acked.load(Ordering::Acquire);
        let ended = async {
            if attached.acked < acked {
                attached.connection.ack(attached.consumer, acked).await?;
            }
            attached.connection.close_consumer(attached.consumer, timeout).await
        };
        // The subscription stays ours until the connection ends if this fails; there is no one to tell.
        if let Err(error) = ended.await {
            tracing::debug!(%error, "could not close a consumer");
        }
        Left::Over
    }
}

/// Tells the error to whoever asks next, if anybody does before the consumer is gone.
async fn reply(mut requests: mpsc::Receiver<LaneRequest>, error: SubscribeError) {
    respond(requests.recv().await, error);
}

fn respond(request: Option<LaneRequest>, error: SubscribeError) {
    // Whoever asked may have stopped waiting.
    match request {
        Some(LaneRequest::Flush(done) | LaneRequest::Close(done)) => drop(done.send(Err(error))),
        Some(LaneRequest::Seek(seek)) => drop(seek.done.send(Err(error))),
        None => {}
    }
}

/// Whether to subscribe again after an error.
fn lost_or(error: SubscribeError) -> Result<Left, SubscribeError> {
    match error.retry() {
        Retry::No => Err(error),
        Retry::Here | Retry::Elsewhere => Ok(Left::Lost),
    }
}

fn subscribe_error(error: CallError) -> SubscribeError {
    match error {
        CallError::Refused(refusal) if refusal.code == ErrorCode::SubscriptionBusy => SubscribeError::Busy(refusal),
        CallError::Refused(refusal) if refusal.code == ErrorCode::UnknownSubscription => SubscribeError::Lost(refusal),
        other => SubscribeError::Call(other),
    }
}
