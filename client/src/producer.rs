//! The producer: batches records, publishes them to the owners of their partitions, and repairs what breaks on the way.
//!
//! Each partition has a *lane*: a [`ProducerCore`] behind a lock, and a task that keeps it connected to the owning core
//! and sends what the core hands out. [`Producer::send`] puts a record into a lane and waits for the answer of its batch,
//! which the connection's task gives to the lane directly. All records of a batch share one outcome.

use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use drava_protocol::ErrorCode;
use drava_protocol::batch::{Compression, HEADER_BYTES, RECORD_HEADER_BYTES};
use drava_protocol::message::{OpenProducer, PartitionPlace};
use drava_protocol::topic::TopicName;
use tokio::sync::{Notify, watch};

use crate::client::Inner;
use crate::connection::Connection;
use crate::error::{CallError, OpenProducerError, SendError, TopicError};
use crate::producer_core::{Identity, ProducerConfig, ProducerCore, PushError, Verdict};
use crate::record::Record;
use crate::session::{Answer, Refusal, RequestError};

/// Builds a [`Producer`].
#[derive(Clone, Debug)]
pub struct ProducerBuilder {
    inner: Arc<Inner>,
    topic: String,
    config: ProducerConfig,
    id: Option<u64>,
    delivery_timeout: Duration,
}

impl ProducerBuilder {
    pub(crate) fn new(inner: Arc<Inner>, topic: String) -> ProducerBuilder {
        let config = ProducerConfig::default();
        ProducerBuilder { inner, topic, config, id: None, delivery_timeout: Duration::from_secs(120) }
    }

    /// The largest batch, in bytes before compression; lowered to what the node accepts. A record that is larger has a
    /// batch of its own. Default: 64 KiB.
    pub fn batch_bytes(mut self, bytes_max: usize) -> Self {
        self.config.batch_bytes_max = bytes_max;
        self
    }

    /// The most records in a batch. Default: 10,000.
    pub fn batch_count(mut self, count_max: u32) -> Self {
        self.config.batch_count_max = count_max;
        self
    }

    /// What a record may wait for company. Default: nothing; batches then form while earlier ones are on their way.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.config.linger = linger;
        self
    }

    /// Bytes and batches of one partition that may wait for their acks; beyond them [`Producer::send`] waits. Defaults:
    /// 4 MiB, 64.
    pub fn window(mut self, bytes_max: usize, batches_max: usize) -> Self {
        self.config.window_bytes_max = bytes_max;
        self.config.window_batches_max = batches_max;
        self
    }

    /// How batches are packed. Default: not at all.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.config.compression = compression;
        self
    }

    /// The identity that the node tells duplicates by; whoever opens it next fences those before. Not 0. Default: a random
    /// one.
    pub fn id(mut self, id: u64) -> Self {
        self.id = Some(id);
        self
    }

    /// After so long without any ack the producer of a partition gives up. Default: 120 s.
    pub fn delivery_timeout(mut self, timeout: Duration) -> Self {
        self.delivery_timeout = timeout;
        self
    }

    /// Looks the topic up and opens a producer on each of its partitions.
    pub async fn build(self) -> Result<Producer, OpenProducerError> {
        let limits = [
            ("batch_count", self.config.batch_count_max as usize, 1),
            ("batch_bytes", self.config.batch_bytes_max, HEADER_BYTES + RECORD_HEADER_BYTES),
            ("window batches", self.config.window_batches_max, 1),
            ("id", self.id.map_or(1, |id| id.min(1) as usize), 1),
        ];
        for (option, value, min) in limits {
            if value < min {
                return Err(OpenProducerError::Option { option, value, min });
            }
        }
        let name = TopicName::parse(&self.topic).map_err(TopicError::from)?;
        let topic = self.inner.lookup(&name).await?;
        let producer = self.id.unwrap_or_else(|| rand::random::<u64>().max(1));
        let started = Instant::now();
        let mut lanes = Vec::with_capacity(topic.partitions.len());
        let mut tasks = Vec::with_capacity(topic.partitions.len());
        for place in topic.partitions {
            let (lane, connection) = self.open_lane(&name, place, producer, started).await?;
            tasks.push((lane.clone(), connection));
            lanes.push(lane);
        }
        if lanes.is_empty() {
            return Err(TopicError::UnknownPartition { topic: topic.name, index: 0, partitions: 0 }.into());
        }
        // Only now: a lane that was not opened leaves no task behind.
        for (lane, connection) in tasks {
            tokio::spawn(lane.run(self.inner.clone(), name.clone(), connection));
        }
        Ok(Producer { lanes, producer, next_lane: AtomicU32::new(0) })
    }

    async fn open_lane(
        &self,
        topic: &TopicName,
        mut place: PartitionPlace,
        producer: u64,
        started: Instant,
    ) -> Result<(Arc<Lane>, Connection), OpenProducerError> {
        let mut backoff = self.inner.backoff();
        let give_up_at = Instant::now() + self.inner.options.request_timeout;
        loop {
            let opened = self.open_once(&place, producer).await;
            let (connection, epoch, next_sequence) = match opened {
                Ok(opened) => opened,
                Err(error) if error.retry() == drava_protocol::Retry::No || give_up_at <= Instant::now() => {
                    return Err(error.into());
                }
                Err(_) => {
                    tokio::time::sleep(backoff.pause()).await;
                    place = self.inner.owner(topic, place.index).await?.0;
                    continue;
                }
            };
            let batch_bytes_max = connection.payload_bytes_max();
            let mut config = self.config;
            config.batch_bytes_max = config.batch_bytes_max.min(batch_bytes_max as usize);
            config.lone_record_batch_bytes_max = batch_bytes_max as usize;
            if config.batch_bytes_max < HEADER_BYTES + RECORD_HEADER_BYTES {
                return Err(OpenProducerError::NodeBatches { batch_bytes_max });
            }
            let identity = Identity { producer, epoch, next_sequence };
            let state = LaneState {
                core: ProducerCore::new(config, identity),
                outcomes: VecDeque::new(),
                first_outcome: 0,
                failed: None,
                closing: false,
                moved: false,
                stalled_since: None,
                acks: 0,
            };
            let lane = Lane {
                index: place.index,
                partition: place.partition,
                delivery_timeout: self.delivery_timeout,
                started,
                state: Mutex::new(state),
                wake: Notify::new(),
                room: Notify::new(),
            };
            return Ok((Arc::new(lane), connection));
        }
    }

    async fn open_once(&self, place: &PartitionPlace, producer: u64) -> Result<(Connection, u32, u64), CallError> {
        let connection = self.inner.connection_to(place).await?;
        let request = OpenProducer { partition: place.partition, producer };
        match connection.call(request, self.inner.options.request_timeout).await?.answer {
            Answer::ProducerOpened { epoch, next_sequence } => Ok((connection, epoch, next_sequence)),
            other => unreachable!("the session checked the kind of {other:?}"),
        }
    }
}

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// 0-based place of the partition in its topic.
    pub partition: u32,
    /// None when it was stored before a reconnect, so long ago that the node does not remember where.
    pub offset: Option<u64>,
}

/// Publishes records to one topic. Dropping it sends what it took in the background; [`Producer::flush`] waits for that.
pub struct Producer {
    lanes: Vec<Arc<Lane>>,
    producer: u64,
    next_lane: AtomicU32,
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer").field("id", &self.producer).field("partitions", &self.lanes.len()).finish()
    }
}

impl Producer {
    /// The identity that the node tells this producer's duplicates by.
    pub fn id(&self) -> u64 {
        self.producer
    }

    /// Publishes a record and returns its place once it is as safe as the topic promises.
    ///
    /// One `send` after the other waits a round trip for each record: use [`Producer::enqueue`] or several tasks to have
    /// many on their way.
    pub async fn send(&self, record: impl Into<Record>) -> Result<Receipt, SendError> {
        self.enqueue(record).await?.await
    }

    /// Takes a record, and returns a future of its receipt. Waits while the window of its partition is full.
    ///
    /// Records of one task reach their partition in the order in which they were taken. A record is sent even if its
    /// future is dropped.
    pub async fn enqueue(&self, record: impl Into<Record>) -> Result<Pending, SendError> {
        let record = record.into();
        let lane = &self.lanes[self.partition_of(&record) as usize];
        loop {
            // Registered before the attempt, so that no room is missed that comes in between.
            let room = lane.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            match lane.try_push(&record)? {
                Some(pending) => return Ok(pending),
                None => room.await,
            }
        }
    }

    /// Sends what was taken without waiting for more, and returns when all of it is acknowledged.
    pub async fn flush(&self) -> Result<(), SendError> {
        let pending: Vec<_> = self.lanes.iter().filter_map(|lane| lane.flush()).collect();
        for outcome in pending {
            let outcome = outcome?;
            wait(outcome).await?;
        }
        Ok(())
    }

    /// Flushes, then ends the producer.
    pub async fn close(self) -> Result<(), SendError> {
        self.flush().await
    }

    /// With a key: the CRC32C of the key modulo the number of partitions. Without: a partition takes records until its
    /// batch is full or sent, then the next has its turn.
    fn partition_of(&self, record: &Record) -> u32 {
        let count = self.lanes.len() as u32;
        if let Some(key) = &record.key {
            return partition_of_key(key, count);
        }
        if count == 1 {
            return 0;
        }
        let current = self.next_lane.load(Ordering::Relaxed) % count;
        if self.lanes[current as usize].fills_a_batch() {
            return current;
        }
        let next = (current + 1) % count;
        self.next_lane.store(next, Ordering::Relaxed);
        next
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        for lane in &self.lanes {
            lane.close();
        }
    }
}

/// The partition of a key, as every client is to compute it: CRC32C of the key modulo the number of partitions.
pub fn partition_of_key(key: &[u8], partition_count: u32) -> u32 {
    crc32c::crc32c(key) % partition_count
}

impl From<&str> for Record {
    fn from(payload: &str) -> Record {
        Record::new(payload.to_owned())
    }
}

impl From<String> for Record {
    fn from(payload: String) -> Record {
        Record::new(payload)
    }
}

impl From<Vec<u8>> for Record {
    fn from(payload: Vec<u8>) -> Record {
        Record::new(payload)
    }
}

impl From<&[u8]> for Record {
    fn from(payload: &[u8]) -> Record {
        Record::new(payload.to_vec())
    }
}

impl From<bytes::Bytes> for Record {
    fn from(payload: bytes::Bytes) -> Record {
        Record::new(payload)
    }
}

/// How a batch ended: the offset of its first record, if it is known. None while it has not.
type Outcome = Option<Result<Option<u64>, SendError>>;

/// A record on its way. Resolves to its receipt when it is as safe as the topic promises.
#[derive(Debug)]
#[must_use = "a record may still fail; await it, or flush the producer"]
pub struct Pending {
    partition: u32,
    /// The place of the record in its batch.
    index: u32,
    outcome: watch::Receiver<Outcome>,
}

impl IntoFuture for Pending {
    type Output = Result<Receipt, SendError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let base_offset = wait(self.outcome).await?;
            let offset = base_offset.map(|base_offset| base_offset.saturating_add(u64::from(self.index)));
            Ok(Receipt { partition: self.partition, offset })
        })
    }
}

async fn wait(mut outcome: watch::Receiver<Outcome>) -> Result<Option<u64>, SendError> {
    match outcome.wait_for(Option::is_some).await {
        Ok(outcome) => outcome.clone().unwrap_or(Err(SendError::Closed)),
        Err(_) => Err(SendError::Closed),
    }
}

/// The producer of one partition.
pub(crate) struct Lane {
    index: u32,
    partition: u64,
    delivery_timeout: Duration,
    /// Moment 0 of the core.
    started: Instant,
    state: Mutex<LaneState>,
    /// For the task: there may be something to send, or to end for.
    wake: Notify,
    /// For those who wait to have their records taken.
    room: Notify,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("partition", &self.partition).finish_non_exhaustive()
    }
}

struct LaneState {
    core: ProducerCore,
    /// Outcomes of the batches that are not over, the open one last. At most one more than the window has batches.
    outcomes: VecDeque<watch::Sender<Outcome>>,
    /// Number of the batch of the first of `outcomes`.
    first_outcome: u64,
    failed: Option<SendError>,
    closing: bool,
    /// The partition answered from another core: go there once nothing is on its way here. Going at once could let a later
    /// batch overtake an earlier one.
    moved: bool,
    /// Since when records wait and nothing was acknowledged.
    stalled_since: Option<Duration>,
    /// Batches acknowledged.
    acks: u64,
}

/// Why a lane stopped using a connection.
enum Left {
    /// Everything is sent and nobody will give more, or it failed.
    Over,
    Lost,
    Moved,
}

impl Lane {
    fn state(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Takes a record, or says that there is no room now.
    fn try_push(&self, record: &Record) -> Result<Option<Pending>, SendError> {
        let now = self.now();
        let mut state = self.state();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let pushed = record.lend(wall_clock_ms(), |record| state.core.push(now, record));
        let ticket = match pushed {
            Ok(ticket) => ticket,
            Err(PushError::WindowFull) => return Ok(None),
            Err(PushError::TooLarge { batch_bytes, batch_bytes_max }) => {
                return Err(SendError::TooLarge { batch_bytes, batch_bytes_max });
            }
            Err(PushError::Headers) => return Err(SendError::Headers),
        };
        state.stalled_since.get_or_insert(now);
        let place = (ticket.batch - state.first_outcome) as usize;
        let begins = place == state.outcomes.len();
        if begins {
            state.outcomes.push_back(watch::Sender::new(None));
        }
        let outcome = state.outcomes[place].subscribe();
        if begins || state.core.is_open_batch_full() {
            self.wake.notify_one();
        }
        Ok(Some(Pending { partition: self.index, index: ticket.index, outcome }))
    }

    /// Whether the next record would join others.
    fn fills_a_batch(&self) -> bool {
        let state = self.state();
        state.core.open_batch() < state.first_outcome + state.outcomes.len() as u64 && !state.core.is_open_batch_full()
    }

    /// The outcome of the last batch; batches end in order.
    fn flush(&self) -> Option<Result<watch::Receiver<Outcome>, SendError>> {
        let mut state = self.state();
        if let Some(error) = &state.failed {
            return Some(Err(error.clone()));
        }
        state.core.flush();
        self.wake.notify_one();
        state.outcomes.back().map(|outcome| Ok(outcome.subscribe()))
    }

    fn close(&self) {
        let mut state = self.state();
        state.closing = true;
        state.core.flush();
        self.wake.notify_one();
    }

    /// The node answered a batch.
    pub fn on_answer(&self, batch: u64, attempt: u32, elsewhere: bool, answer: Result<Answer, Refusal>) {
        let now = self.now();
        let mut state = self.state();
        // Everybody was told of the failure already.
        if state.failed.is_some() {
            return;
        }
        state.moved |= elsewhere;
        match answer {
            Ok(Answer::Published { base_offset, duplicate: _ }) => {
                let LaneState { core, outcomes, first_outcome, .. } = &mut *state;
                let mut acks = 0;
                core.on_published(batch, base_offset, |acknowledged| {
                    let outcome = outcomes.pop_front().expect("every batch has an outcome");
                    assert!(acknowledged.batch == *first_outcome, "{acknowledged:?}, waiting for {first_outcome}");
                    *first_outcome += 1;
                    acks += 1;
                    outcome.send_replace(Some(Ok(acknowledged.base_offset)));
                });
                state.acks += acks;
                state.stalled_since = if state.core.is_idle() { None } else { Some(now) };
            }
            Ok(other) => unreachable!("the session checked the kind of {other:?}"),
            Err(refusal) => match state.core.on_refused(now, batch, attempt, &refusal) {
                Verdict::Stale | Verdict::RetryHere => {}
                Verdict::RetryElsewhere => state.moved = true,
                Verdict::Fatal => state.fail(match refusal.code {
                    ErrorCode::ProducerFenced => SendError::Fenced(refusal),
                    ErrorCode::SequenceGap => SendError::SequenceGap(refusal),
                    _ => SendError::Refused(refusal),
                }),
            },
        }
        drop(state);
        self.wake.notify_one();
        self.room.notify_waiters();
    }

    /// A batch was not sent: the node takes smaller ones than it did when the producer was opened.
    pub fn on_not_sendable(&self, error: RequestError) {
        let text = error.to_string();
        let refusal = Refusal { code: ErrorCode::BatchTooLarge, retry_after_ms: 0, text };
        self.state().fail(SendError::Refused(refusal));
        self.wake.notify_one();
        self.room.notify_waiters();
    }

    fn fail(&self, error: SendError) {
        self.state().fail(error);
        self.room.notify_waiters();
    }

    /// Keeps the lane connected until it is over.
    async fn run(self: Arc<Self>, inner: Arc<Inner>, topic: TopicName, connection: Connection) {
        let mut backoff = inner.backoff();
        let mut connection = Some(connection);
        loop {
            let current = match connection.take() {
                Some(connection) => connection,
                None => match self.find_owner(&inner, &topic).await {
                    Ok(connection) => connection,
                    Err(error) if !error.is_passing() => {
                        return self.fail(match error {
                            TopicError::UnknownTopic(topic) => SendError::UnknownTopic(topic),
                            other => SendError::Owner(Arc::new(other)),
                        });
                    }
                    Err(error) => {
                        tracing::debug!(%topic, partition = self.index, %error, "no connection to the owner");
                        if self.gave_up() {
                            return;
                        }
                        tokio::time::sleep(backoff.pause()).await;
                        continue;
                    }
                },
            };
            let acks = {
                let mut state = self.state();
                state.moved = false;
                state.core.connected();
                state.acks
            };
            match self.drive(&current).await {
                Left::Over => return,
                Left::Moved => {}
                Left::Lost => self.state().core.disconnected(),
            }
            if acks < self.state().acks {
                backoff.reset();
            }
            tokio::time::sleep(backoff.pause()).await;
        }
    }

    /// The partition that this lane was opened on may be gone and another be in its place; that one knows nothing of us.
    async fn find_owner(&self, inner: &Inner, topic: &TopicName) -> Result<Connection, TopicError> {
        let (place, connection) = inner.owner(topic, self.index).await?;
        if place.partition != self.partition {
            return Err(TopicError::UnknownTopic(topic.as_str().to_owned()));
        }
        Ok(connection)
    }

    /// Sends over one connection for as long as that is right.
    async fn drive(self: &Arc<Self>, connection: &Connection) -> Left {
        loop {
            let (transmit, deadline) = {
                let now = self.now();
                let mut state = self.state();
                if state.is_over() {
                    return Left::Over;
                }
                if state.moved {
                    if state.core.in_flight() == 0 {
                        return Left::Moved;
                    }
                    (None, None)
                } else {
                    (state.core.next_send(now), state.core.deadline())
                }
            };
            if let Some(transmit) = transmit {
                // Sealing made room for an open batch.
                self.room.notify_waiters();
                if connection.publish(self.clone(), self.partition, transmit).await.is_err() {
                    return Left::Lost;
                }
                continue;
            }
            if self.gave_up() {
                return Left::Over;
            }
            let give_up_at = self.state().stalled_since.map(|since| since.saturating_add(self.delivery_timeout));
            let wake_at = deadline.into_iter().chain(give_up_at).min();
            let pause = wake_at.map(|at| at.saturating_sub(self.now()));
            tokio::select! {
                () = self.wake.notified() => {}
                () = connection.closed() => return Left::Lost,
                () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
            }
        }
    }

    /// Fails everything if nothing was acknowledged for too long.
    fn gave_up(&self) -> bool {
        let now = self.now();
        let mut state = self.state();
        let late = state.stalled_since.is_some_and(|since| self.delivery_timeout <= now.saturating_sub(since));
        if late {
            state.fail(SendError::TimedOut { after: self.delivery_timeout });
            drop(state);
            self.room.notify_waiters();
            return true;
        }
        state.is_over()
    }
}

impl LaneState {
    fn is_over(&self) -> bool {
        self.failed.is_some() || (self.closing && self.core.is_idle())
    }

    /// Tells everybody who waits. The first error stays.
    fn fail(&mut self, error: SendError) {
        let error = self.failed.get_or_insert(error).clone();
        for outcome in self.outcomes.drain(..) {
            outcome.send_replace(Some(Err(error.clone())));
            self.first_outcome += 1;
        }
    }
}

fn wall_clock_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
