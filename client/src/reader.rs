//! The reader: pulls messages from any place, and keeps no cursor.
//!
//! Each partition has a task that fetches with a long poll and hands whole answers to the reader through one bounded
//! channel; the reader unpacks them one batch at a time. Messages of one partition come in order, those of different
//! partitions in no order.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use drava_protocol::message::{Fetch, Locate, PartitionPlace, Place};
use drava_protocol::topic::TopicName;
use drava_protocol::{ErrorCode, Retry};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::client::Inner;
use crate::connection::Connection;
use crate::error::{CallError, ReadError, TopicError};
use crate::record::{Message, Unpacker};
use crate::session::Answer;

/// Answers that wait for the reader, per partition.
const FETCHED_MAX: usize = 2;
/// Fetched ahead, in bytes, for each answer.
const FETCH_BYTES: u32 = 1024 * 1024;
const LONG_POLL: Duration = Duration::from_secs(5);
/// Bounds what a packed batch may unpack to.
pub(crate) const UNPACKED_BYTES_MAX: u32 = 64 * 1024 * 1024;

/// Builds a [`Reader`].
#[derive(Clone, Debug)]
pub struct ReaderBuilder {
    inner: Arc<Inner>,
    topic: String,
    from: Place,
    partition: Option<u32>,
    until_end: bool,
    fetch_bytes: u32,
    long_poll: Duration,
}

impl ReaderBuilder {
    pub(crate) fn new(inner: Arc<Inner>, topic: String) -> ReaderBuilder {
        ReaderBuilder {
            inner,
            topic,
            from: Place::Earliest,
            partition: None,
            until_end: false,
            fetch_bytes: FETCH_BYTES,
            long_poll: LONG_POLL,
        }
    }

    /// Where to start in every partition. Default: the oldest message that is kept.
    pub fn from(mut self, place: Place) -> Self {
        self.from = place;
        self
    }

    /// Read this partition alone, by its 0-based place in the topic. Default: all.
    pub fn partition(mut self, index: u32) -> Self {
        self.partition = Some(index);
        self
    }

    /// End where each partition ends at the time of building. Default: wait for new messages for ever.
    pub fn until_end(mut self) -> Self {
        self.until_end = true;
        self
    }

    /// Bytes to ask for at once; each partition holds up to three times as many. Default: 1 MiB.
    pub fn fetch_bytes(mut self, bytes: u32) -> Self {
        self.fetch_bytes = bytes.max(1);
        self
    }

    /// How long the node waits for new messages before it answers with none. Default: 5 s.
    pub fn long_poll(mut self, wait: Duration) -> Self {
        self.long_poll = wait;
        self
    }

    /// Looks the topic up, finds the start in each partition, and begins to fetch.
    pub async fn build(self) -> Result<Reader, ReadError> {
        let name = TopicName::parse(&self.topic).map_err(TopicError::from)?;
        let topic = self.inner.lookup(&name).await?;
        let places = chosen(&topic.name, topic.partitions, self.partition)?;
        let mut lanes = Vec::with_capacity(places.len());
        for place in places {
            let (position, end) = self.locate(&name, &place).await?;
            lanes.push(Lane {
                inner: self.inner.clone(),
                topic: name.clone(),
                index: place.index,
                partition: place.partition,
                position,
                end,
                fetch_bytes: self.fetch_bytes,
                long_poll: self.long_poll,
            });
        }
        let (fetched, chunks) = mpsc::channel(FETCHED_MAX * lanes.len());
        let spawn = |lane: Lane| (lane.index, tokio::spawn(lane.run(fetched.clone())).abort_handle());
        let lanes = lanes.into_iter().map(spawn).collect();
        Ok(Reader { chunks, current: None, lanes })
    }

    /// The offset to start from, and the one to end before.
    async fn locate(&self, topic: &TopicName, place: &PartitionPlace) -> Result<(u64, Option<u64>), ReadError> {
        let mut backoff = self.inner.backoff();
        let give_up_at = tokio::time::Instant::now() + self.inner.options.request_timeout;
        let mut place = place.clone();
        loop {
            match self.locate_once(&place).await {
                Ok((offset, end)) => return Ok((offset, self.until_end.then_some(end))),
                Err(error) if error.retry() == Retry::No || give_up_at <= tokio::time::Instant::now() => {
                    return Err(error.into());
                }
                Err(_) => {
                    tokio::time::sleep(backoff.pause()).await;
                    place = self.inner.owner(topic, place.index).await?.0;
                }
            }
        }
    }

    async fn locate_once(&self, place: &PartitionPlace) -> Result<(u64, u64), CallError> {
        let connection = self.inner.connection_to(place).await?;
        let request = Locate { partition: place.partition, place: self.from };
        match connection.call(request, self.inner.options.request_timeout).await?.answer {
            Answer::Located { offset, start_offset: _, end_offset } => Ok((offset, end_offset)),
            other => unreachable!("the session checked the kind of {other:?}"),
        }
    }
}

/// The partitions that an application wants: one or all.
pub(crate) fn chosen(
    topic: &str,
    places: Vec<PartitionPlace>,
    index: Option<u32>,
) -> Result<Vec<PartitionPlace>, TopicError> {
    let partitions = places.len() as u32;
    let chosen: Vec<_> = places.into_iter().filter(|place| index.is_none_or(|index| place.index == index)).collect();
    if chosen.is_empty() {
        return Err(TopicError::UnknownPartition { topic: topic.to_owned(), index: index.unwrap_or(0), partitions });
    }
    Ok(chosen)
}

/// Reads messages of one topic. Fetching stops when it is dropped.
#[derive(Debug)]
pub struct Reader {
    chunks: mpsc::Receiver<Result<Chunk, ReadError>>,
    current: Option<(Chunk, Unpacker)>,
    /// The partitions that are read on, and their tasks.
    lanes: Vec<(u32, AbortHandle)>,
}

/// What one fetch brought.
#[derive(Debug)]
struct Chunk {
    partition: u32,
    /// Messages below are not wanted.
    position: u64,
    /// Messages from here on are not wanted.
    end: u64,
    payload: Bytes,
}

impl Reader {
    /// The next message; none at the end, if the reader was built to end.
    ///
    /// After an error the partition that it names is not read on; the others are. [`ReadError::Damaged`] is no end: what
    /// lies behind the damage follows.
    pub async fn next(&mut self) -> Result<Option<Message>, ReadError> {
        loop {
            if let Some(message) = self.buffered()? {
                return Ok(Some(message));
            }
            let Some(chunk) = self.chunks.recv().await else { return Ok(None) };
            let chunk = chunk?;
            if self.lanes.iter().all(|(partition, _)| *partition != chunk.partition) {
                continue;
            }
            let unpacker = Unpacker::new(chunk.partition, chunk.position, chunk.payload.clone(), UNPACKED_BYTES_MAX);
            self.current = Some((chunk, unpacker));
        }
    }

    /// The next message that is here already, without waiting for more.
    fn buffered(&mut self) -> Result<Option<Message>, ReadError> {
        let Some((chunk, unpacker)) = &mut self.current else { return Ok(None) };
        match unpacker.next() {
            Ok(Some(message)) if message.offset < chunk.end => return Ok(Some(message)),
            Ok(_) => self.current = None,
            Err(source) => {
                let (partition, offset) = (chunk.partition, chunk.position);
                self.current = None;
                for (_, task) in self.lanes.extract_if(.., |(index, _)| *index == partition) {
                    task.abort();
                }
                return Err(ReadError::Batch { partition, offset, source });
            }
        }
        Ok(None)
    }
}

/// Fetches one partition.
struct Lane {
    inner: Arc<Inner>,
    topic: TopicName,
    index: u32,
    partition: u64,
    position: u64,
    end: Option<u64>,
    fetch_bytes: u32,
    long_poll: Duration,
}

enum Step {
    Fetched {
        payload: Bytes,
        next_offset: u64,
        elsewhere: bool,
    },
    /// Messages that cannot be read, up to this offset.
    Damaged {
        next_offset: u64,
    },
    /// Try again after a pause, here or wherever the partition is now.
    Pause,
}

impl Lane {
    /// Ends when the reader is dropped, at the end, or after an error that it told the reader.
    async fn run(mut self, fetched: mpsc::Sender<Result<Chunk, ReadError>>) {
        let mut backoff = self.inner.backoff();
        let mut connection = None;
        while self.end.is_none_or(|end| self.position < end) {
            let Ok(permit) = fetched.reserve().await else { return };
            let step = tokio::select! {
                step = self.fetch(&mut connection) => step,
                () = fetched.closed() => return,
            };
            match step {
                Err(error) => return permit.send(Err(error)),
                Ok(Step::Pause) => {
                    connection = None;
                    drop(permit);
                    tokio::select! {
                        () = tokio::time::sleep(backoff.pause()) => {}
                        () = fetched.closed() => return,
                    }
                }
                Ok(Step::Damaged { next_offset }) => {
                    let (partition, offset) = (self.index, self.position);
                    if next_offset <= offset {
                        return permit.send(Err(ReadError::NoProgress { partition, offset, next_offset }));
                    }
                    backoff.reset();
                    self.position = next_offset;
                    let offsets = offset..self.end.map_or(next_offset, |end| end.min(next_offset));
                    let topic = self.topic.as_str().to_owned();
                    permit.send(Err(ReadError::Damaged { topic, partition, offsets }));
                }
                Ok(Step::Fetched { payload, next_offset, elsewhere }) => {
                    backoff.reset();
                    if elsewhere {
                        connection = None;
                    }
                    if payload.is_empty() && next_offset <= self.position {
                        continue;
                    }
                    let (partition, offset) = (self.index, self.position);
                    if next_offset <= offset {
                        return permit.send(Err(ReadError::NoProgress { partition, offset, next_offset }));
                    }
                    self.position = next_offset;
                    let end = self.end.unwrap_or(u64::MAX);
                    permit.send(Ok(Chunk { partition, position: offset, end, payload }));
                }
            }
        }
    }

    async fn fetch(&self, connection: &mut Option<Connection>) -> Result<Step, ReadError> {
        let current = match connection {
            Some(current) => current,
            None => match self.inner.owner(&self.topic, self.index).await {
                Ok((place, _)) if place.partition != self.partition => {
                    return Err(TopicError::UnknownTopic(self.topic.as_str().to_owned()).into());
                }
                Ok((_, found)) => connection.insert(found),
                Err(error) if error.is_passing() => return Ok(Step::Pause),
                Err(error) => return Err(error.into()),
            },
        };
        let request = Fetch {
            partition: self.partition,
            offset: self.position,
            bytes_max: self.fetch_bytes,
            wait_ms: self.long_poll.as_millis().min(u128::from(u32::MAX)) as u32,
        };
        match current.call(request, self.long_poll + self.inner.options.request_timeout).await {
            Ok(reply) => match reply.answer {
                Answer::Fetched { next_offset, .. } => {
                    Ok(Step::Fetched { payload: reply.payload, next_offset, elsewhere: reply.elsewhere })
                }
                Answer::Damaged { next_offset, .. } => Ok(Step::Damaged { next_offset }),
                other => unreachable!("the session checked the kind of {other:?}"),
            },
            Err(CallError::Refused(refusal)) if refusal.code == ErrorCode::OffsetOutOfRange => {
                Err(ReadError::OutOfRange { partition: self.index, offset: self.position, refusal })
            }
            Err(error) if error.retry() == Retry::No => Err(error.into()),
            Err(_) => Ok(Step::Pause),
        }
    }
}
