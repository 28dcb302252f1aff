//! One connection to a node, without its socket.
//!
//! The way of the bytes:
//!
//! 1. The driver opens a TCP connection and calls [`Session::hello`]; every method that asks for something appends
//!    whole frames to an outgoing `Vec<u8>` of the driver, so that one write carries as many as came together.
//! 2. What the socket gives goes, as one contiguous slice, to [`Session::receive`]: one event and the bytes it took at a
//!    time, until it says how many bytes it needs. Payloads are told as ranges of that slice and copied by nobody.
//! 3. Each request carries a tag of the driver's choosing (a channel, a time, a number) and gets it back with its answer,
//!    whatever the order of the answers.
//!
//! No clock, no socket, and no allocation per frame once the table of waiting requests has grown to its size.

use std::ops::Range;

use drava_protocol::frame::{self, Decoded, Frame, FrameError};
use drava_protocol::message::{self, BodyError, Hello, Kind, Message, Welcome};
use drava_protocol::{ErrorCode, Retry};
use rustc_hash::FxHashMap;

/// Correlation of `Hello`. Those of requests are at least `1 << 32`.
const HELLO_CORRELATION: u64 = 1;

/// What this side accepts, whatever the node announces.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The largest payload accepted in one frame, in bytes. A frame that announces more ends the session.
    pub receive_payload_bytes_max: u32,
    /// Requests that may wait for their answers at once; the node may announce fewer.
    pub in_flight_max: u32,
    /// What a delivery may exceed the credit of its consumer by, in bytes: the node sends while any credit is left.
    pub credit_overrun_bytes_max: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            receive_payload_bytes_max: 16 * 1024 * 1024,
            in_flight_max: 4096,
            credit_overrun_bytes_max: 16 * 1024 * 1024,
        }
    }
}

/// A request that has an answer.
pub trait Request: Message {
    /// The kind of a good answer.
    const ANSWER: Kind;
}

macro_rules! requests {
    ($($request:ident => $answer:ident;)*) => {
        $(impl Request for message::$request { const ANSWER: Kind = Kind::$answer; })*
    };
}

// `Publish` and `Subscribe` are not here: they have methods of their own.
requests! {
    Ping => Pong;
    CreateTopic => Topic;
    DeleteTopic => Done;
    ListTopics => Topics;
    Lookup => Topic;
    DescribePartition => PartitionState;
    OpenProducer => ProducerOpened;
    Fetch => Fetched;
    Locate => Located;
    Ack => Done;
    Seek => Located;
    DeleteSubscription => Done;
}

/// Names one waiting request of one session. A number is not used again before 2^32 others took its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Correlation(u64);

impl Correlation {
    fn new(slot: u32, generation: u32) -> Correlation {
        Correlation((u64::from(generation) << 32) | u64::from(slot))
    }

    fn slot(self) -> usize {
        self.0 as u32 as usize
    }

    fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// An error that the node answered with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text} [{code}]")]
pub struct Refusal {
    pub code: ErrorCode,
    /// Pause before trying again, in ms; 0 where none is needed or trying again is no use.
    pub retry_after_ms: u32,
    pub text: String,
}

impl Refusal {
    pub fn retry(&self) -> Retry {
        self.code.retry()
    }
}

/// A good answer. Payloads are ranges of the slice that was given to [`Session::receive`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    Pong,
    Topic(Box<message::Topic>),
    Topics(message::Topics),
    PartitionState(Box<message::PartitionState>),
    ProducerOpened {
        epoch: u32,
        next_sequence: u64,
    },
    Published {
        base_offset: u64,
        duplicate: bool,
    },
    Fetched {
        next_offset: u64,
        start_offset: u64,
        end_offset: u64,
        payload: Range<usize>,
    },
    Located {
        offset: u64,
        start_offset: u64,
        end_offset: u64,
    },
    /// To a fetch: these messages are damaged on disk.
    Damaged {
        first_offset: u64,
        next_offset: u64,
    },
    Subscribed {
        offset: u64,
        start_offset: u64,
        end_offset: u64,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<T> {
    /// The session is open: requests may be sent from now on.
    Welcome(Welcome),
    /// The answer to the request that carried `tag`.
    Answer {
        tag: T,
        correlation: Correlation,
        /// Not 0: another core answered; ask the core on this port next time.
        owner_port: u16,
        answer: Result<Answer, Refusal>,
    },
    /// Batches of a subscription, each padded to 16 bytes, as a range of the slice given to [`Session::receive`].
    Deliver { consumer: u32, next_offset: u64, end_offset: u64, payload: Range<usize> },
    /// Messages of a subscription that are damaged on disk; deliveries go on behind them.
    Damaged { consumer: u32, first_offset: u64, next_offset: u64 },
    /// An error about the connection as a whole; the node closes it when the code says so.
    Refused(Refusal),
    /// The frame says nothing to this side: an answer that nobody waits for any longer, or a delivery to a consumer that
    /// was closed while it was on its way.
    Ignored,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received<T> {
    /// One event, and the bytes of the input that it took.
    Event { event: Event<T>, consumed: usize },
    /// The input holds no whole frame; at least this many bytes are needed from its start.
    NeedBytes(usize),
}

/// The node broke the protocol. The session is over after each of these: close the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    #[error("the node's bytes are not frames of this protocol")]
    Frame(#[from] FrameError),
    #[error("the node sent a malformed frame")]
    Body(#[from] BodyError),
    #[error("the node sent {0:?}, which a node does not send")]
    Unexpected(Kind),
    #[error("the node sent {0:?} before Welcome")]
    NotWelcomed(Kind),
    #[error("the node welcomed twice")]
    WelcomedTwice,
    #[error("the node chose protocol version {0}, which was not offered")]
    Version(u8),
    #[error("the node answered request {0:#x}, which was never sent or was answered before")]
    Correlation(u64),
    #[error("the node answered with {answer:?} where {expected:?} was expected")]
    AnswerKind { expected: Kind, answer: Kind },
    #[error("the node delivered to consumer {0}, which does not exist")]
    UnknownConsumer(u32),
    #[error("the node delivered {overrun_bytes} bytes beyond the credit of consumer {consumer}")]
    CreditExceeded { consumer: u32, overrun_bytes: i64 },
}

/// A request that was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("the node has not said Welcome yet")]
    NotOpen,
    #[error("{in_flight_max} requests wait for their answers already")]
    WindowFull { in_flight_max: u32 },
    #[error("the payload has {payload_bytes} bytes; the node accepts {payload_bytes_max}")]
    PayloadTooLarge { payload_bytes: usize, payload_bytes_max: u32 },
    #[error("consumer {0} exists on this connection already")]
    ConsumerExists(u32),
    #[error("there is no consumer {0} on this connection")]
    UnknownConsumer(u32),
}

/// The core of one connection. `T` is what the driver wants back with each answer.
#[derive(Debug)]
pub struct Session<T> {
    limits: Limits,
    welcome: Option<Welcome>,
    /// Waiting requests; free slots are chained. At most `in_flight_max` long.
    slots: Vec<Slot<T>>,
    free: Option<u32>,
    waiting: u32,
    /// Consumers of this connection. Looked up, never iterated over.
    consumers: FxHashMap<u32, Consumer>,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    state: SlotState<T>,
}

#[derive(Debug)]
enum SlotState<T> {
    Free { next: Option<u32> },
    Waiting(Owed<T>),
}

/// What the node still has to answer.
#[derive(Debug)]
struct Owed<T> {
    /// The consumer that begins or ends with it.
    consumer: Option<u32>,
    /// None: the driver gave up.
    wanted: Option<Wanted<T>>,
}

#[derive(Debug)]
struct Wanted<T> {
    expected: Kind,
    tag: T,
}

#[derive(Debug)]
struct Consumer {
    /// Granted and not yet used, in payload bytes; below 0 by at most one delivery.
    credit_bytes: i64,
    closing: bool,
}

impl<T> Session<T> {
    pub fn new(limits: Limits) -> Session<T> {
        assert!(0 < limits.in_flight_max, "a session without requests is none");
        Session { limits, welcome: None, slots: Vec::new(), free: None, waiting: 0, consumers: FxHashMap::default() }
    }

    /// Appends the first frame of the connection.
    pub fn hello(&mut self, client: &str, token: Option<&str>, out: &mut Vec<u8>) {
        let hello = Hello {
            version_min: frame::VERSION,
            version_max: frame::VERSION,
            client: client.to_owned(),
            token: token.map(str::to_owned),
        };
        frame::encode(&hello, 0, HELLO_CORRELATION, 0, out);
    }

    /// What the node said of itself; none before it did.
    pub fn welcome(&self) -> Option<&Welcome> {
        self.welcome.as_ref()
    }

    /// The largest batch that the node takes, in bytes; 0 before `Welcome`.
    pub fn payload_bytes_max(&self) -> u32 {
        self.welcome.as_ref().map_or(0, |welcome| welcome.payload_bytes_max)
    }

    /// Requests that wait for their answers.
    pub fn in_flight(&self) -> u32 {
        self.waiting
    }

    /// Requests that may wait at once: the lower of what the node and this side allow; 0 before `Welcome`.
    pub fn in_flight_max(&self) -> u32 {
        self.welcome.as_ref().map_or(0, |welcome| welcome.in_flight_max.min(self.limits.in_flight_max))
    }

    /// Whether a request may be sent now.
    pub fn has_room(&self) -> bool {
        self.waiting < self.in_flight_max()
    }

    /// Appends a request without payload. Nothing is appended on an error. The body must fit a frame.
    pub fn request<M: Request>(&mut self, message: &M, tag: T, out: &mut Vec<u8>) -> Result<Correlation, RequestError> {
        let correlation = self.take_slot(M::ANSWER, None, tag)?;
        frame::encode(message, 0, correlation.0, 0, out);
        Ok(correlation)
    }

    /// Appends a publish of `batch`, a sealed batch. Nothing is appended on an error.
    pub fn publish(
        &mut self,
        partition: u64,
        batch: &[u8],
        tag: T,
        out: &mut Vec<u8>,
    ) -> Result<Correlation, RequestError> {
        self.publish_with(partition, batch.len(), tag, out, |out| out.extend_from_slice(batch))
    }

    /// Appends a publish whose batch of `batch_bytes` bytes is written in place by `fill`, for example by
    /// [`drava_protocol::batch::Builder::seal`]. Nothing is appended on an error.
    pub fn publish_with(
        &mut self,
        partition: u64,
        batch_bytes: usize,
        tag: T,
        out: &mut Vec<u8>,
        fill: impl FnOnce(&mut Vec<u8>),
    ) -> Result<Correlation, RequestError> {
        let payload_bytes_max = self.payload_bytes_max();
        if self.welcome.is_some() && (payload_bytes_max as usize) < batch_bytes {
            return Err(RequestError::PayloadTooLarge { payload_bytes: batch_bytes, payload_bytes_max });
        }
        let correlation = self.take_slot(Kind::Published, None, tag)?;
        frame::encode(&message::Publish { partition }, 0, correlation.0, batch_bytes as u32, out);
        let start = out.len();
        fill(out);
        let written = out.len() - start;
        assert!(written == batch_bytes, "a batch of {written} bytes was written where {batch_bytes} were announced");
        out.extend_from_slice(frame::padding(batch_bytes));
        Ok(correlation)
    }

    /// Appends a request for a durable subscription. Deliveries begin after its answer and the first [`Self::flow`].
    pub fn subscribe(
        &mut self,
        subscribe: &message::Subscribe,
        tag: T,
        out: &mut Vec<u8>,
    ) -> Result<Correlation, RequestError> {
        let consumer = subscribe.consumer;
        if self.consumers.contains_key(&consumer) {
            return Err(RequestError::ConsumerExists(consumer));
        }
        let correlation = self.take_slot(Kind::Subscribed, Some(consumer), tag)?;
        self.consumers.insert(consumer, Consumer { credit_bytes: 0, closing: false });
        frame::encode(subscribe, 0, correlation.0, 0, out);
        Ok(correlation)
    }

    /// Appends a grant of credit: the node may deliver `bytes` more payload bytes to `consumer`. Has no answer.
    pub fn flow(&mut self, consumer: u32, bytes: u32, out: &mut Vec<u8>) -> Result<(), RequestError> {
        let state = self.consumers.get_mut(&consumer).filter(|state| !state.closing);
        let state = state.ok_or(RequestError::UnknownConsumer(consumer))?;
        state.credit_bytes += i64::from(bytes);
        frame::encode(&message::Flow { consumer, bytes }, 0, 0, 0, out);
        Ok(())
    }

    /// Appends a cumulative ack that is not answered. [`Self::request`] with [`message::Ack`] is answered once it is
    /// durable.
    pub fn ack(&mut self, consumer: u32, offset: u64, out: &mut Vec<u8>) -> Result<(), RequestError> {
        if !self.consumers.contains_key(&consumer) {
            return Err(RequestError::UnknownConsumer(consumer));
        }
        frame::encode(&message::Ack { consumer, offset }, 0, 0, 0, out);
        Ok(())
    }

    /// Appends the end of a consumer. Its deliveries that are on their way are ignored.
    pub fn close_consumer(&mut self, consumer: u32, tag: T, out: &mut Vec<u8>) -> Result<Correlation, RequestError> {
        if !self.consumers.contains_key(&consumer) {
            return Err(RequestError::UnknownConsumer(consumer));
        }
        let correlation = self.take_slot(Kind::Done, Some(consumer), tag)?;
        if let Some(state) = self.consumers.get_mut(&consumer) {
            state.closing = true;
        }
        frame::encode(&message::CloseConsumer { consumer }, 0, correlation.0, 0, out);
        Ok(correlation)
    }

    /// Gives up waiting for an answer and returns the tag. The request stays in flight: its answer is ignored.
    pub fn abandon(&mut self, correlation: Correlation) -> Option<T> {
        let slot = self.slots.get_mut(correlation.slot())?;
        if slot.generation != correlation.generation() {
            return None;
        }
        match &mut slot.state {
            SlotState::Waiting(owed) => owed.wanted.take().map(|wanted| wanted.tag),
            SlotState::Free { .. } => None,
        }
    }

    /// Ends the session and returns the tags of all requests that were not answered, in no order.
    pub fn into_unanswered(self) -> impl Iterator<Item = T> {
        self.slots.into_iter().filter_map(|slot| match slot.state {
            SlotState::Waiting(owed) => owed.wanted.map(|wanted| wanted.tag),
            SlotState::Free { .. } => None,
        })
    }

    /// Reads the frame at the start of `input`, which may go on after it.
    ///
    /// The limits are checked as soon as the frame's header is there; `NeedBytes` never asks for more than they allow.
    /// Errors: all of [`SessionError`]; the session is over after each.
    pub fn receive(&mut self, input: &[u8]) -> Result<Received<T>, SessionError> {
        // Nothing that comes before Welcome, and Welcome neither, has a payload.
        let payload_bytes_max = if self.welcome.is_some() { self.limits.receive_payload_bytes_max } else { 0 };
        match frame::decode(input, payload_bytes_max)? {
            Decoded::NeedBytes(bytes) => Ok(Received::NeedBytes(bytes)),
            Decoded::Frame(frame, consumed) => Ok(Received::Event { event: self.on_frame(&frame)?, consumed }),
        }
    }

    fn on_frame(&mut self, frame: &Frame<'_>) -> Result<Event<T>, SessionError> {
        let kind = frame.header.kind;
        if self.welcome.is_none() && !matches!(kind, Kind::Welcome | Kind::Error) {
            return Err(SessionError::NotWelcomed(kind));
        }
        match kind {
            Kind::Welcome => self.on_welcome(frame.body),
            Kind::Deliver => self.on_deliver(frame),
            Kind::Error => self.on_error(frame),
            Kind::Damaged if frame.header.correlation == 0 => self.on_damaged(frame.body),
            Kind::Pong
            | Kind::Done
            | Kind::Topics
            | Kind::Topic
            | Kind::PartitionState
            | Kind::ProducerOpened
            | Kind::Published
            | Kind::Fetched
            | Kind::Located
            | Kind::Damaged
            | Kind::Subscribed => self.on_answer(frame),
            Kind::Hello
            | Kind::Ping
            | Kind::CreateTopic
            | Kind::DeleteTopic
            | Kind::ListTopics
            | Kind::Lookup
            | Kind::DescribePartition
            | Kind::OpenProducer
            | Kind::Publish
            | Kind::Fetch
            | Kind::Locate
            | Kind::Subscribe
            | Kind::Flow
            | Kind::Ack
            | Kind::Seek
            | Kind::CloseConsumer
            | Kind::DeleteSubscription => Err(SessionError::Unexpected(kind)),
        }
    }

    fn on_welcome(&mut self, body: &[u8]) -> Result<Event<T>, SessionError> {
        if self.welcome.is_some() {
            return Err(SessionError::WelcomedTwice);
        }
        let welcome: Welcome = message::decode(body)?;
        if welcome.version != frame::VERSION {
            return Err(SessionError::Version(welcome.version));
        }
        self.welcome = Some(welcome.clone());
        Ok(Event::Welcome(welcome))
    }

    fn on_deliver(&mut self, frame: &Frame<'_>) -> Result<Event<T>, SessionError> {
        let body = message::access::<message::Deliver>(frame.body)?;
        let consumer = body.consumer.to_native();
        let state = self.consumers.get_mut(&consumer).ok_or(SessionError::UnknownConsumer(consumer))?;
        if state.closing {
            return Ok(Event::Ignored);
        }
        state.credit_bytes -= i64::from(frame.header.payload_bytes);
        if state.credit_bytes < -i64::from(self.limits.credit_overrun_bytes_max) {
            return Err(SessionError::CreditExceeded { consumer, overrun_bytes: -state.credit_bytes });
        }
        Ok(Event::Deliver {
            consumer,
            next_offset: body.next_offset.to_native(),
            end_offset: body.end_offset.to_native(),
            payload: payload_range(frame),
        })
    }

    fn on_damaged(&mut self, body: &[u8]) -> Result<Event<T>, SessionError> {
        let body = message::access::<message::Damaged>(body)?;
        let consumer = body.consumer.to_native();
        let state = self.consumers.get(&consumer).ok_or(SessionError::UnknownConsumer(consumer))?;
        if state.closing {
            return Ok(Event::Ignored);
        }
        let (first_offset, next_offset) = (body.first_offset.to_native(), body.next_offset.to_native());
        Ok(Event::Damaged { consumer, first_offset, next_offset })
    }

    fn on_error(&mut self, frame: &Frame<'_>) -> Result<Event<T>, SessionError> {
        let body: message::Error = message::decode(frame.body)?;
        let refusal = Refusal {
            // A number of a later version still says that something failed.
            code: ErrorCode::from_number(body.code).unwrap_or(ErrorCode::Internal),
            retry_after_ms: body.retry_after_ms,
            text: body.text,
        };
        if frame.header.correlation == 0 || frame.header.correlation == HELLO_CORRELATION {
            return Ok(Event::Refused(refusal));
        }
        let correlation = Correlation(frame.header.correlation);
        let owed = self.release_slot(correlation)?;
        // A subscription that was refused has no consumer, and one whose end was refused had none at the node.
        if let Some(consumer) = owed.consumer {
            self.consumers.remove(&consumer);
        }
        Ok(match owed.wanted {
            Some(Wanted { tag, expected: _ }) => {
                Event::Answer { tag, correlation, owner_port: frame.header.owner_port, answer: Err(refusal) }
            }
            None => Event::Ignored,
        })
    }

    fn on_answer(&mut self, frame: &Frame<'_>) -> Result<Event<T>, SessionError> {
        let answer = decode_answer(frame)?;
        let correlation = Correlation(frame.header.correlation);
        let owed = self.release_slot(correlation)?;
        let kind = frame.header.kind;
        if let Some(consumer) = owed.consumer
            && kind == Kind::Done
        {
            self.consumers.remove(&consumer);
        }
        match owed.wanted {
            // What cannot be fetched is answered with its name.
            Some(Wanted { expected, tag: _ })
                if expected != kind && (expected, kind) != (Kind::Fetched, Kind::Damaged) =>
            {
                Err(SessionError::AnswerKind { expected, answer: kind })
            }
            Some(Wanted { tag, expected: _ }) => {
                Ok(Event::Answer { tag, correlation, owner_port: frame.header.owner_port, answer: Ok(answer) })
            }
            None => Ok(Event::Ignored),
        }
    }

    fn take_slot(&mut self, expected: Kind, consumer: Option<u32>, tag: T) -> Result<Correlation, RequestError> {
        if self.welcome.is_none() {
            return Err(RequestError::NotOpen);
        }
        if !self.has_room() {
            return Err(RequestError::WindowFull { in_flight_max: self.in_flight_max() });
        }
        let state = SlotState::Waiting(Owed { consumer, wanted: Some(Wanted { expected, tag }) });
        self.waiting += 1;
        let Some(index) = self.free else {
            let index = self.slots.len() as u32;
            self.slots.push(Slot { generation: 1, state });
            return Ok(Correlation::new(index, 1));
        };
        let slot = &mut self.slots[index as usize];
        let SlotState::Free { next } = slot.state else {
            panic!("slot {index} is in the chain of free ones and in use");
        };
        self.free = next;
        // 0 is left out: correlations below 1 << 32 mean other things.
        slot.generation = slot.generation.wrapping_add(1).max(1);
        slot.state = state;
        Ok(Correlation::new(index, slot.generation))
    }

    /// Frees the slot of a request that was answered.
    fn release_slot(&mut self, correlation: Correlation) -> Result<Owed<T>, SessionError> {
        let unknown = SessionError::Correlation(correlation.0);
        let Some(slot) = self.slots.get_mut(correlation.slot()) else {
            return Err(unknown);
        };
        if slot.generation != correlation.generation() || matches!(slot.state, SlotState::Free { .. }) {
            return Err(unknown);
        }
        let state = std::mem::replace(&mut slot.state, SlotState::Free { next: self.free });
        self.free = Some(correlation.slot() as u32);
        self.waiting -= 1;
        match state {
            SlotState::Waiting(owed) => Ok(owed),
            SlotState::Free { .. } => unreachable!("checked above"),
        }
    }
}

fn payload_range(frame: &Frame<'_>) -> Range<usize> {
    let start = frame.payload_position();
    start..start + frame.payload.len()
}

fn decode_answer(frame: &Frame<'_>) -> Result<Answer, SessionError> {
    let body = frame.body;
    Ok(match frame.header.kind {
        Kind::Published => {
            let body = message::access::<message::Published>(body)?;
            Answer::Published { base_offset: body.base_offset.to_native(), duplicate: body.duplicate }
        }
        Kind::Fetched => {
            let body = message::access::<message::Fetched>(body)?;
            Answer::Fetched {
                next_offset: body.next_offset.to_native(),
                start_offset: body.start_offset.to_native(),
                end_offset: body.end_offset.to_native(),
                payload: payload_range(frame),
            }
        }
        Kind::Done => Answer::Done,
        Kind::Pong => Answer::Pong,
        Kind::Topic => Answer::Topic(Box::new(message::decode(body)?)),
        Kind::Topics => Answer::Topics(message::decode(body)?),
        Kind::PartitionState => Answer::PartitionState(Box::new(message::decode(body)?)),
        Kind::ProducerOpened => {
            let body = message::access::<message::ProducerOpened>(body)?;
            Answer::ProducerOpened { epoch: body.epoch.to_native(), next_sequence: body.next_sequence.to_native() }
        }
        Kind::Located => {
            let body = message::access::<message::Located>(body)?;
            Answer::Located {
                offset: body.offset.to_native(),
                start_offset: body.start_offset.to_native(),
                end_offset: body.end_offset.to_native(),
            }
        }
        Kind::Damaged => {
            let body = message::access::<message::Damaged>(body)?;
            Answer::Damaged { first_offset: body.first_offset.to_native(), next_offset: body.next_offset.to_native() }
        }
        Kind::Subscribed => {
            let body = message::access::<message::Subscribed>(body)?;
            Answer::Subscribed {
                offset: body.offset.to_native(),
                start_offset: body.start_offset.to_native(),
                end_offset: body.end_offset.to_native(),
            }
        }
        kind => return Err(SessionError::Unexpected(kind)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use drava_protocol::message::{Deliver, Done, Fetched, Pong, Published};

    const LIMITS: Limits = Limits { receive_payload_bytes_max: 4096, in_flight_max: 8, credit_overrun_bytes_max: 1024 };

    fn welcome() -> Welcome {
        Welcome {
            version: 1,
            node: 7,
            shard: 0,
            shard_count: 2,
            payload_bytes_max: 2048,
            in_flight_max: 4,
            features: 0,
        }
    }

    fn frame<M: Message>(message: &M, correlation: u64, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        frame::encode(message, 0, correlation, payload.len() as u32, &mut out);
        out.extend_from_slice(payload);
        out.extend_from_slice(frame::padding(payload.len()));
        out
    }

    fn open<T>() -> Session<T> {
        let mut session = Session::new(LIMITS);
        session.hello("test", None, &mut Vec::new());
        let bytes = frame(&welcome(), HELLO_CORRELATION, &[]);
        let Ok(Received::Event { event: Event::Welcome(_), consumed }) = session.receive(&bytes) else {
            panic!("welcome is an event");
        };
        assert_eq!(consumed, bytes.len());
        session
    }

    fn event<T>(session: &mut Session<T>, bytes: &[u8]) -> Event<T> {
        match session.receive(bytes).unwrap() {
            Received::Event { event, consumed } => {
                assert_eq!(consumed, bytes.len());
                event
            }
            Received::NeedBytes(bytes) => panic!("needs {bytes} bytes of a whole frame"),
        }
    }

    fn published(correlation: Correlation, base_offset: u64) -> Vec<u8> {
        frame(&Published { base_offset, duplicate: false }, correlation.0, &[])
    }

    #[test]
    fn answers_find_their_requests_in_any_order() {
        let mut session = open();
        let mut out = Vec::new();
        let ids: Vec<_> = (0..4).map(|tag| session.publish(1, &[9; 100], tag, &mut out).unwrap()).collect();
        for (tag, id) in ids.iter().copied().enumerate().rev() {
            let answer = Ok(Answer::Published { base_offset: tag as u64 + 50, duplicate: false });
            let expected = Event::Answer { tag, correlation: id, owner_port: 0, answer };
            assert_eq!(event(&mut session, &published(id, tag as u64 + 50)), expected);
        }
        assert_eq!(session.in_flight(), 0);
    }

    #[test]
    fn what_is_sent_is_what_a_node_reads() {
        let mut session = open();
        let mut out = Vec::new();
        session.publish(1, &[9; 100], (), &mut out).unwrap();
        session.publish_with(2, 33, (), &mut out, |out| out.extend_from_slice(&[8; 33])).unwrap();
        session.request(&message::Ping {}, (), &mut out).unwrap();
        let mut seen = Vec::new();
        let mut rest = &out[..];
        while !rest.is_empty() {
            let Decoded::Frame(frame, bytes) = frame::decode(rest, 4096).unwrap() else { panic!("whole frames") };
            seen.push((frame.header.kind, frame.payload.to_vec()));
            rest = &rest[bytes..];
        }
        let expected = vec![(Kind::Publish, vec![9; 100]), (Kind::Publish, vec![8; 33]), (Kind::Ping, vec![])];
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_stream_cut_at_any_byte_gives_the_same_events() {
        let mut out = Vec::new();
        let mut session: Session<u32> = open();
        let a = session.publish(1, &[1; 10], 0, &mut out).unwrap();
        let b = session
            .request(&message::Fetch { partition: 1, offset: 0, bytes_max: 1, wait_ms: 0 }, 1, &mut out)
            .unwrap();
        let subscribe = message::Subscribe {
            partition: 1,
            consumer: 5,
            subscription: "s".into(),
            start: message::Place::Earliest,
            take_over: false,
        };
        let c = session.subscribe(&subscribe, 2, &mut out).unwrap();
        session.flow(5, 4096, &mut out).unwrap();
        let mut stream = published(a, 3);
        stream.extend(frame(&message::Subscribed { offset: 0, start_offset: 0, end_offset: 1 }, c.0, &[]));
        stream.extend(frame(&Deliver { consumer: 5, next_offset: 9, end_offset: 9 }, 0, &[3; 77]));
        stream.extend(frame(&Fetched { next_offset: 1, start_offset: 0, end_offset: 9 }, b.0, &[4; 130]));
        let script = |cut: usize| {
            let mut session: Session<u32> = open();
            let mut out = Vec::new();
            session.publish(1, &[1; 10], 0, &mut out).unwrap();
            let fetch = message::Fetch { partition: 1, offset: 0, bytes_max: 1, wait_ms: 0 };
            session.request(&fetch, 1, &mut out).unwrap();
            session.subscribe(&subscribe, 2, &mut out).unwrap();
            session.flow(5, 4096, &mut out).unwrap();
            let (mut events, mut done) = (Vec::new(), 0);
            for end in [cut, stream.len()] {
                loop {
                    match session.receive(&stream[done..end]).unwrap() {
                        Received::Event { event, consumed } => {
                            let payload = match &event {
                                Event::Deliver { payload, .. } => stream[done..][payload.clone()].to_vec(),
                                Event::Answer { answer: Ok(Answer::Fetched { payload, .. }), .. } => {
                                    stream[done..][payload.clone()].to_vec()
                                }
                                _ => Vec::new(),
                            };
                            events.push((event, payload));
                            done += consumed;
                        }
                        Received::NeedBytes(bytes) => {
                            assert!(end - done < bytes, "needs {bytes}, has {}", end - done);
                            break;
                        }
                    }
                }
            }
            assert_eq!(done, stream.len());
            events
        };
        let whole = script(stream.len());
        assert_eq!(whole.len(), 4);
        assert_eq!(whole[2].1, [3; 77]);
        assert_eq!(whole[3].1, [4; 130]);
        for cut in 0..stream.len() {
            assert_eq!(script(cut), whole, "cut at {cut}");
        }
    }

    #[test]
    fn an_error_is_the_answer_of_its_request() {
        let mut session = open();
        let id = session.request(&message::Lookup { name: "/a/b/c".into() }, "lookup", &mut Vec::new()).unwrap();
        let error = message::Error { code: 20, retry_after_ms: 4, text: "no such topic".into() };
        let mut bytes = frame(&error, id.0, &[]);
        frame::set_owner_port(&mut bytes, 7402);
        let Event::Answer { tag, owner_port, answer: Err(refusal), .. } = event(&mut session, &bytes) else {
            panic!("an answer");
        };
        assert_eq!((tag, owner_port), ("lookup", 7402));
        assert_eq!((refusal.code, refusal.retry_after_ms, refusal.retry()), (ErrorCode::UnknownTopic, 4, Retry::No));
        let error = message::Error { code: 60_000, retry_after_ms: 0, text: String::new() };
        let Event::Refused(refusal) = event(&mut session, &frame(&error, 0, &[])) else { panic!("no request") };
        assert_eq!(refusal.code, ErrorCode::Internal);
    }

    #[test]
    fn answers_that_nobody_asked_for_end_the_session() {
        let mut session = open();
        let mut out = Vec::new();
        let id = session.publish(1, &[1; 10], (), &mut out).unwrap();
        assert_eq!(session.receive(&published(Correlation(77), 0)), Err(SessionError::Correlation(77)));
        event(&mut session, &published(id, 0));
        assert_eq!(session.receive(&published(id, 0)), Err(SessionError::Correlation(id.0)), "answered twice");
        let next = session.publish(1, &[1; 10], (), &mut out).unwrap();
        assert_ne!(next, id);
        let wrong = SessionError::AnswerKind { expected: Kind::Published, answer: Kind::Pong };
        assert_eq!(session.receive(&frame(&Pong {}, next.0, &[])), Err(wrong));
        assert_eq!(session.receive(&frame(&message::Ping {}, 0, &[])), Err(SessionError::Unexpected(Kind::Ping)));
        let again = frame(&welcome(), HELLO_CORRELATION, &[]);
        assert_eq!(session.receive(&again), Err(SessionError::WelcomedTwice));
    }

    #[test]
    fn nothing_goes_before_welcome() {
        let mut session = Session::new(LIMITS);
        let mut out = Vec::new();
        assert_eq!(session.request(&message::Ping {}, (), &mut out), Err(RequestError::NotOpen));
        assert_eq!(session.publish(1, &[1; 10], (), &mut out), Err(RequestError::NotOpen));
        assert!(out.is_empty());
        assert_eq!(session.receive(&frame(&Pong {}, 9, &[])), Err(SessionError::NotWelcomed(Kind::Pong)));
        let version = frame(&Welcome { version: 2, ..welcome() }, HELLO_CORRELATION, &[]);
        assert_eq!(session.receive(&version), Err(SessionError::Version(2)));
    }

    #[test]
    fn the_limits_hold() {
        let mut session = open();
        let mut out = Vec::new();
        let too_large = RequestError::PayloadTooLarge { payload_bytes: 2049, payload_bytes_max: 2048 };
        assert_eq!(session.publish(1, &[0; 2049], 0, &mut out), Err(too_large));
        let ids: Vec<_> = (0..4).map(|tag| session.publish(1, &[0; 2048], tag, &mut out).unwrap()).collect();
        let sent = out.len();
        assert!(!session.has_room());
        let full = RequestError::WindowFull { in_flight_max: 4 };
        assert_eq!(session.publish(1, &[0; 1], 9, &mut out), Err(full));
        assert_eq!(out.len(), sent, "nothing is appended on an error");
        event(&mut session, &published(ids[2], 0));
        assert!(session.has_room());
        let bytes = frame(&Fetched { next_offset: 1, start_offset: 0, end_offset: 9 }, ids[0].0, &[4; 4097]);
        let refused = FrameError::PayloadTooLarge { announced: 4097, limit: 4096 };
        assert_eq!(session.receive(&bytes[..32]), Err(SessionError::Frame(refused)), "before its payload came");
    }

    #[test]
    fn an_abandoned_request_stays_in_flight_and_its_answer_is_ignored() {
        let mut session = open();
        let id = session.publish(1, &[0; 8], "late", &mut Vec::new()).unwrap();
        assert_eq!(session.abandon(id), Some("late"));
        assert_eq!(session.abandon(id), None);
        assert_eq!(session.in_flight(), 1);
        assert_eq!(event(&mut session, &published(id, 0)), Event::Ignored);
        assert_eq!(session.in_flight(), 0);
        let id = session.publish(1, &[0; 8], "open", &mut Vec::new()).unwrap();
        assert_eq!(session.abandon(Correlation(id.0 + 1)), None);
        assert_eq!(session.into_unanswered().collect::<Vec<_>>(), ["open"]);
    }

    #[test]
    fn deliveries_stay_within_their_credit() {
        let mut session = open();
        let mut out = Vec::new();
        let deliver = |bytes: usize| frame(&Deliver { consumer: 5, next_offset: 9, end_offset: 9 }, 0, &vec![3; bytes]);
        assert_eq!(session.receive(&deliver(1)), Err(SessionError::UnknownConsumer(5)));
        assert_eq!(session.flow(5, 1, &mut out), Err(RequestError::UnknownConsumer(5)));
        let subscribe = message::Subscribe {
            partition: 1,
            consumer: 5,
            subscription: "s".into(),
            start: message::Place::Latest,
            take_over: false,
        };
        let id = session.subscribe(&subscribe, (), &mut out).unwrap();
        assert_eq!(session.subscribe(&subscribe, (), &mut out), Err(RequestError::ConsumerExists(5)));
        event(&mut session, &frame(&message::Subscribed { offset: 0, start_offset: 0, end_offset: 0 }, id.0, &[]));
        session.flow(5, 1000, &mut out).unwrap();
        assert!(matches!(event(&mut session, &deliver(2000)), Event::Deliver { .. }), "one may overrun");
        let exceeded = SessionError::CreditExceeded { consumer: 5, overrun_bytes: 1040 };
        assert_eq!(session.receive(&deliver(40)), Err(exceeded));
        let id = session.close_consumer(5, (), &mut out).unwrap();
        assert_eq!(event(&mut session, &deliver(40)), Event::Ignored, "on its way while the consumer closed");
        event(&mut session, &frame(&Done {}, id.0, &[]));
        assert_eq!(session.receive(&deliver(40)), Err(SessionError::UnknownConsumer(5)));
    }

    #[test]
    fn damaged_streams_end_in_errors_and_never_ask_for_more_than_the_limits() {
        use rand::{RngExt, SeedableRng};
        let mut random = rand::rngs::StdRng::seed_from_u64(4);
        let place =
            message::PartitionPlace { partition: 1, index: 0, node: 1, shard: 0, host: "localhost".into(), port: 1 };
        for _ in 0..20_000 {
            let mut session = open();
            let mut out = Vec::new();
            let published_id = session.publish(1, &[1; 10], (), &mut out).unwrap();
            let lookup = session.request(&message::Lookup { name: "/a/b/c".into() }, (), &mut out).unwrap();
            let topic = message::Topic {
                topic: 1,
                name: "/a/b/c".into(),
                policy: message::TopicPolicy::default(),
                partitions: vec![place.clone(), place.clone()],
            };
            let mut stream = published(published_id, 3);
            stream.extend(frame(&topic, lookup.0, &[]));
            for _ in 0..random.random_range(1..4) {
                let position = random.random_range(0..stream.len());
                stream[position] = random.random();
            }
            // Damage of bodies is tried, too, and not only caught by the checksum of their frame.
            if random.random() {
                let body_bytes = u32::from_le_bytes(stream[16..20].try_into().unwrap()) as usize;
                if body_bytes <= stream.len() - frame::HEADER_BYTES {
                    frame::set_owner_port(&mut stream, 0);
                }
            }
            let mut done = 0;
            loop {
                match session.receive(&stream[done..]) {
                    Ok(Received::Event { consumed, .. }) => done += consumed,
                    Ok(Received::NeedBytes(bytes)) => {
                        let bytes_max = frame::HEADER_BYTES + frame::BODY_BYTES_MAX as usize + 4096;
                        assert!(bytes <= bytes_max, "{bytes} of at most {bytes_max}");
                        break;
                    }
                    Err(_) => break,
                }
            }
        }
    }
}
