//! A connection that publishes.
//!
//! Between waits it takes the answers that came, then sends what is due and what the window has room for. What is
//! unsent stays small, so that batches are stamped shortly before they leave and lie in the cache when they do.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use drava_client::glommio_driver::{Connection, DriverError};
use drava_client::session::{Answer, Event, Limits};
use drava_protocol::message::OpenProducer;

use super::keys::KeySource;
use super::options::LoadOptions;
use super::plan::{CLIENT, Route};
use super::shared::{Phase, Seen, Shared};
use crate::payload::{Batches, KEY_BYTES, Next, Shape, clock_ns};
use crate::schedule::Schedule;
use crate::verify::stream_id;

/// Beyond this, nothing more is stamped until the socket has taken some.
const UNSENT_BYTES_MAX: usize = 256 << 10;
/// A connection whose answers stay away this long after the end gives up.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often a connection that waits looks whether the run is over.
const LOOK_EVERY: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub struct Producer {
    pub options: Rc<LoadOptions>,
    pub shared: Arc<Shared>,
    pub route: Route,
    /// Number of the run, in the streams' names.
    pub run: u32,
    /// Number of the connection's first stream.
    pub first_stream: u32,
    /// The part of the whole rate that is this connection's, in messages a second.
    pub rate: Option<f64>,
    /// Its place between the connections, 0..1: they do not send all at the same moment.
    pub place: f64,
}

/// What comes back with an answer.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    lane: u32,
    intended_ns: u64,
}

/// One stream into one partition.
struct Lane {
    partition: u64,
    stream: u64,
    batches: Batches,
    /// Sequence of the next message; messages acknowledged.
    next: u64,
    acknowledged: u64,
    /// Offset of the last acknowledged batch.
    last_offset: Option<u64>,
}

impl Producer {
    pub async fn run(self) {
        let shared = self.shared.clone();
        if let Err(error) = self.publish().await {
            shared.fail(format!("a publishing connection failed: {}", chain(&error)));
        }
        shared.producers_left.fetch_sub(1, Ordering::AcqRel);
        shared.workers_left.fetch_sub(1, Ordering::AcqRel);
    }

    async fn publish(self) -> Result<(), ProduceError> {
        let options = &self.options;
        let limits = Limits { in_flight_max: options.in_flight, ..Limits::default() };
        let mut connection: Connection<Sent> = Connection::connect(self.route.address, limits, CLIENT).await?;
        let mut lanes = self.open_lanes(&mut connection).await?;
        let seed = stream_id(self.run, self.first_stream);
        let mut keys = KeySource::new(options.keys, options.key_count, seed);
        let mut key = || keys.as_mut().map_or([0; KEY_BYTES], KeySource::draw);
        let (messages, batch_bytes) = (u64::from(options.batch), u64::from(options.batch) * u64::from(options.size));
        let mut packed = Vec::new();
        let mut seen = Vec::new();
        let mut lane_next = self.first_stream as usize % lanes.len();
        let mut exhausted = false;
        if !self.shared.started().await {
            return Ok(());
        }
        let mut schedule = self.rate.map(|rate| {
            let batches_per_s = rate / f64::from(options.batch);
            Schedule::new(clock_ns() + (self.place * 1e9 / batches_per_s) as u64, batches_per_s)
        });
        let mut progress_ns = clock_ns();
        loop {
            let now = clock_ns();
            while let Some(incoming) = connection.received()? {
                match incoming.event {
                    Event::Answer { tag, answer, .. } => {
                        let lane = &mut lanes[tag.lane as usize];
                        lane.acknowledge(answer.map_err(DriverError::Refused)?, messages)?;
                        seen.push(Seen { intended_ns: tag.intended_ns, ended_ns: now, messages: options.batch });
                    }
                    Event::Refused(refusal) => return Err(DriverError::Refused(refusal).into()),
                    Event::Welcome(_) | Event::Deliver { .. } | Event::Damaged { .. } | Event::Ignored => {}
                }
            }
            if !seen.is_empty() {
                progress_ns = now;
                let batches = seen.len() as u64;
                self.shared.record(&self.shared.published, &mut seen);
                self.shared.published.count(batches * messages, batches * batch_bytes);
            }

            let stopping = exhausted || self.shared.phase() == Phase::Stopping;
            while !stopping && !exhausted && connection.session().0.has_room() {
                if UNSENT_BYTES_MAX <= connection.unsent_bytes() {
                    break;
                }
                let intended_ns = match &mut schedule {
                    None => now,
                    Some(schedule) => match schedule.take(now) {
                        Some(intended_ns) => intended_ns,
                        None => break,
                    },
                };
                if !self.shared.take_budget(messages) {
                    exhausted = true;
                    break;
                }
                let lane = &mut lanes[lane_next];
                let next = Next {
                    stream: lane.stream,
                    sequence: lane.next,
                    // Delivery, too, counts from the intended time.
                    sent_ns: intended_ns,
                    event_time_ms: SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_millis() as u64),
                };
                let tag = Sent { lane: lane_next as u32, intended_ns };
                let (session, out) = connection.session();
                match lane.batches.batch_bytes() {
                    Some(bytes) => {
                        let fill = |out: &mut Vec<u8>| lane.batches.append(&next, &mut key, out);
                        session.publish_with(lane.partition, bytes, tag, out, fill).map_err(DriverError::Request)?;
                    }
                    None => {
                        packed.clear();
                        lane.batches.append(&next, &mut key, &mut packed);
                        session.publish(lane.partition, &packed, tag, out).map_err(DriverError::Request)?;
                    }
                }
                lane.next += messages;
                lane_next = (lane_next + 1) % lanes.len();
            }

            let in_flight = connection.session().0.in_flight();
            if (stopping || exhausted) && in_flight == 0 {
                break;
            }
            if stopping && (self.shared.has_failed() || PATIENCE.as_nanos() < (now - progress_ns) as u128) {
                let unanswered = u64::from(in_flight) * messages;
                return if self.shared.has_failed() { Ok(()) } else { Err(ProduceError::Unanswered { unanswered }) };
            }
            // What is overdue waits for the socket or for an answer and not for the clock: a timer that is over at once would
            // keep the executor from looking at either.
            let can_send = connection.session().0.has_room() && connection.unsent_bytes() < UNSENT_BYTES_MAX;
            let due = match &schedule {
                Some(schedule) if !stopping && can_send => schedule.wait(clock_ns()),
                Some(_) | None => LOOK_EVERY,
            };
            turn_or(&mut connection, due.min(LOOK_EVERY)).await?;
        }
        for lane in &lanes {
            self.shared.stream_ended(lane.stream, lane.acknowledged);
        }
        Ok(())
    }

    async fn open_lanes(&self, connection: &mut Connection<Sent>) -> Result<Vec<Lane>, ProduceError> {
        let options = &self.options;
        let shape = Shape {
            message_bytes: options.size as usize,
            batch: options.batch,
            keyed: options.keys != super::options::Keys::None,
            compression: options.compression(),
        };
        let mut lanes = Vec::with_capacity(self.route.partitions.len());
        for (index, &partition) in self.route.partitions.iter().enumerate() {
            let stream = stream_id(self.run, self.first_stream + index as u32);
            let (producer, epoch) = if options.no_sequences {
                (0, 0)
            } else {
                // The stream's name is unique in this run, and the run's number is drawn.
                match connection.call(&OpenProducer { partition, producer: stream }).await? {
                    Answer::ProducerOpened { epoch, next_sequence: 0 } => (stream, epoch),
                    other => return Err(ProduceError::Answer(Box::new(other))),
                }
            };
            lanes.push(Lane {
                partition,
                stream,
                batches: Batches::new(shape, producer, epoch),
                next: 0,
                acknowledged: 0,
                last_offset: None,
            });
        }
        Ok(lanes)
    }
}

impl Lane {
    fn acknowledge(&mut self, answer: Answer, messages: u64) -> Result<(), ProduceError> {
        let Answer::Published { base_offset, duplicate: false } = answer else {
            return Err(ProduceError::Answer(Box::new(answer)));
        };
        // Publishes on one partition are answered in order, and each has offsets of its own.
        if self.last_offset.is_some_and(|last| base_offset < last + messages) {
            return Err(ProduceError::Offset { base_offset, last: self.last_offset });
        }
        self.last_offset = Some(base_offset);
        self.acknowledged += messages;
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum ProduceError {
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error("the node answered a new batch with {0:?}")]
    Answer(Box<Answer>),
    #[error("a batch was acknowledged at offset {base_offset} after one at {last:?}")]
    Offset { base_offset: u64, last: Option<u64> },
    #[error("{unanswered} messages were never answered")]
    Unanswered { unanswered: u64 },
}

/// A turn of the connection, or the time that it may take at most.
pub(super) async fn turn_or<T>(connection: &mut Connection<T>, at_most: Duration) -> Result<(), DriverError> {
    if at_most.is_zero() {
        drava_runtime::yield_now().await;
        return poll_fn(|cx| match connection.poll_turn(cx) {
            Poll::Ready(turn) => Poll::Ready(turn.map(drop)),
            Poll::Pending => Poll::Ready(Ok(())),
        })
        .await;
    }
    let mut timer = pin!(drava_runtime::time::sleep(at_most));
    poll_fn(|cx| match connection.poll_turn(cx) {
        Poll::Ready(turn) => Poll::Ready(turn.map(drop)),
        Poll::Pending => timer.as_mut().poll(cx).map(|()| Ok(())),
    })
    .await
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
