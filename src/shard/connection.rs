//! One client connection on a data core.
//!
//! One task a connection reads and writes. It reads into a chunk of the shard's pool, cuts frames off it where they lie
//! and hands each to the shard; answers come back into the outgoing queue from wherever they are made (this task, the
//! flush that made an entry durable, a consumer's task) and wake it. It takes no chunk while nothing arrives, so that
//! ten thousand idle connections cost next to nothing.
//!
//! Reading pauses, and the client's sends with it, while the connection has too many requests or answers waiting, or the
//! shard too much staged: memory is bounded, and nothing is dropped.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice};
use std::ops::Deref;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use drava_protocol::frame::{self, Decoded};
use drava_protocol::message::{self, Kind, Message};
use drava_protocol::{ErrorCode, frame::Frame};
use drava_runtime::chunk::{Chunk, ChunkPool, Slice};
use drava_runtime::local::{Broadcast, Wait};
use drava_runtime::net::TcpStream;
use drava_storage::Run;
use futures_lite::io::{AsyncRead, AsyncWrite};

use super::Shard;
use super::consumer::Consumer;

/// The least room for a read; with less a new chunk is taken.
const READ_BYTES_MIN: usize = 4 * 1024;
/// How long an unfinished frame may keep a whole chunk.
pub const COMPACT_AFTER: Duration = Duration::from_secs(1);
/// The same while others wait for memory.
pub const COMPACT_AFTER_PRESSED: Duration = Duration::from_millis(20);
/// Answers and deliveries waiting to be sent; beyond it the connection is not read and nothing more is delivered.
pub const OUT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// The same for all connections of a shard together; beyond it each may queue no more than [`OUT_BYTES_CROWDED`].
pub const OUT_TOTAL_BYTES_MAX: usize = 128 * 1024 * 1024;
pub const OUT_BYTES_CROWDED: usize = 64 * 1024;
/// The pieces of one write.
const WRITE_SLICES_MAX: usize = 16;

/// What all who answer on a connection share. Lives on one shard.
#[derive(Debug)]
pub struct Connection {
    pub id: u64,
    out: RefCell<Out>,
    waker: RefCell<Option<Waker>>,
    /// Requests that were read and not yet answered.
    in_flight: Cell<u32>,
    /// Send what is queued, then close.
    closing: Cell<bool>,
    /// Close at once.
    aborted: Cell<bool>,
    greeted: Cell<bool>,
    accepted_at: Instant,
    /// Since when the oldest unfinished frame waits for its rest.
    partial_since: Cell<Option<Instant>>,
    /// Since when the client has not taken what is queued.
    stuck_since: Cell<Option<Instant>>,
    consumers: RefCell<BTreeMap<u32, Rc<Consumer>>>,
    /// Changes when queued bytes went out, and when the connection is over.
    room: Broadcast,
    /// Changes when the connection is over.
    ended: Broadcast,
    /// Queued on all connections of the shard.
    out_total: Rc<Cell<usize>>,
    /// Give back what of the chunk is not used by the unfinished frame.
    compact: Cell<bool>,
}

/// Bytes and runs to be sent, in order.
#[derive(Debug, Default)]
struct Out {
    pieces: VecDeque<Piece>,
    /// Answers after the last piece; most connections never need more than this.
    tail: Vec<u8>,
    /// Sent of the first piece.
    sent: usize,
    bytes: usize,
    spare: Vec<u8>,
}

#[derive(Debug)]
enum Piece {
    Bytes(Vec<u8>),
    Run(Run),
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Piece::Bytes(bytes) => bytes,
            Piece::Run(run) => run,
        }
    }
}

impl Out {
    fn seal_tail(&mut self) {
        if !self.tail.is_empty() {
            let tail = std::mem::replace(&mut self.tail, std::mem::take(&mut self.spare));
            self.pieces.push_back(Piece::Bytes(tail));
        }
    }

    fn consume(&mut self, mut bytes: usize) {
        self.bytes -= bytes;
        while 0 < bytes {
            let left = self.pieces.front().expect("no more was sent than was queued").len() - self.sent;
            if bytes < left {
                self.sent += bytes;
                return;
            }
            bytes -= left;
            self.sent = 0;
            if let Some(Piece::Bytes(mut done)) = self.pieces.pop_front() {
                done.clear();
                // A buffer that a burst made large is not kept.
                if self.spare.capacity() == 0 && done.capacity() <= 64 * 1024 {
                    self.spare = done;
                }
            }
        }
    }
}

/// What the connection's task found to do.
enum Turn {
    Received,
    Closed,
}

impl Connection {
    pub fn new(id: u64, out_total: Rc<Cell<usize>>) -> Connection {
        Connection {
            id,
            out: RefCell::default(),
            waker: RefCell::default(),
            in_flight: Cell::new(0),
            closing: Cell::new(false),
            aborted: Cell::new(false),
            greeted: Cell::new(false),
            accepted_at: Instant::now(),
            partial_since: Cell::new(None),
            stuck_since: Cell::new(None),
            consumers: RefCell::default(),
            room: Broadcast::default(),
            ended: Broadcast::default(),
            out_total,
            compact: Cell::new(false),
        }
    }

    /// Queues the answer to a request.
    pub fn answer<M: Message>(&self, correlation: u64, message: &M) {
        self.answered();
        self.push(correlation, message);
    }

    /// Queues the answer to a request, with stored batches as its payload.
    pub fn answer_with<M: Message>(&self, correlation: u64, message: &M, runs: &mut Vec<Run>) {
        self.answered();
        self.push_with(correlation, message, runs);
    }

    /// Queues a frame that was encoded elsewhere, as the answer to a request.
    pub fn answer_encoded(&self, frame: &[u8]) {
        self.answered();
        let mut out = self.out.borrow_mut();
        out.tail.extend_from_slice(frame);
        self.queued(out, frame.len());
    }

    pub fn answer_error(&self, correlation: u64, code: ErrorCode, retry_after_ms: u32, text: &str) {
        self.answer(correlation, &message::Error { code: code as u16, retry_after_ms, text: text.to_owned() });
        if code.closes_connection() {
            self.close();
        }
    }

    /// As [`Connection::answer_error`], naming the port of the core that owns the partition.
    pub fn answer_wrong_owner(&self, correlation: u64, owner_port: u16) {
        let mut frame = Vec::new();
        let text = "the partition lives on another core of this node".to_owned();
        let body = message::Error { code: ErrorCode::WrongOwner as u16, retry_after_ms: 0, text };
        frame::encode(&body, 0, correlation, 0, &mut frame);
        frame::set_owner_port(&mut frame, owner_port);
        self.answer_encoded(&frame);
    }

    /// A request that has no answer was taken.
    pub fn unanswered(&self) {
        self.answered();
    }

    /// Queues a frame that answers no request.
    pub fn push<M: Message>(&self, correlation: u64, message: &M) {
        let mut out = self.out.borrow_mut();
        let before = out.tail.len();
        frame::encode(message, 0, correlation, 0, &mut out.tail);
        let bytes = out.tail.len() - before;
        self.queued(out, bytes);
    }

    /// Queues a frame with stored batches as its payload; takes the runs.
    pub fn push_with<M: Message>(&self, correlation: u64, message: &M, runs: &mut Vec<Run>) {
        let payload_bytes: usize = runs.iter().map(|run| run.len()).sum();
        debug_assert!(payload_bytes.is_multiple_of(frame::ALIGNMENT), "runs are padded");
        let mut out = self.out.borrow_mut();
        let before = out.tail.len();
        frame::encode(message, 0, correlation, payload_bytes as u32, &mut out.tail);
        let bytes = out.tail.len() - before + payload_bytes;
        out.seal_tail();
        out.pieces.extend(runs.drain(..).map(Piece::Run));
        self.queued(out, bytes);
    }

    /// Sends what is queued, then closes.
    pub fn close(&self) {
        self.closing.set(true);
        self.wake();
    }

    /// Closes without sending what is queued.
    pub fn abort(&self) {
        self.aborted.set(true);
        self.wake();
    }

    /// Nobody reads from it any more.
    pub fn is_gone(&self) -> bool {
        self.aborted.get()
    }

    pub fn is_idle(&self) -> bool {
        self.in_flight.get() == 0 && self.out.borrow().bytes == 0
    }

    /// Whether more may be queued: less is allowed when all connections together have much queued.
    pub fn has_room(&self) -> bool {
        self.out.borrow().bytes < self.out_bytes_max()
    }

    /// Whether nothing more is sent, whatever is queued.
    pub fn is_over(&self) -> bool {
        self.aborted.get()
    }

    /// A wait for [`Connection::is_over`].
    pub fn ended(&self) -> Wait<'_> {
        self.ended.wait()
    }

    /// Returns when more may be queued, or when the connection is over and nobody waits for it.
    pub async fn room(&self) {
        let mut wait = self.room.wait();
        std::future::poll_fn(|cx| {
            if self.has_room() || self.aborted.get() {
                wait.leave();
                return Poll::Ready(());
            }
            wait.enter(cx);
            Poll::Pending
        })
        .await
    }

    fn out_bytes_max(&self) -> usize {
        if self.out_total.get() < OUT_TOTAL_BYTES_MAX { OUT_BYTES_MAX } else { OUT_BYTES_CROWDED }
    }

    pub fn consumer(&self, id: u32) -> Option<Rc<Consumer>> {
        self.consumers.borrow().get(&id).cloned()
    }

    pub fn consumer_count(&self) -> usize {
        self.consumers.borrow().len()
    }

    pub fn add_consumer(&self, id: u32, consumer: Rc<Consumer>) -> Option<Rc<Consumer>> {
        self.consumers.borrow_mut().insert(id, consumer)
    }

    pub fn remove_consumer(&self, id: u32) -> Option<Rc<Consumer>> {
        self.consumers.borrow_mut().remove(&id)
    }

    /// What of the time limits the connection has broken at `now`.
    pub fn overdue(&self, now: Instant, limits: &super::Limits) -> Option<Overdue> {
        let past = |since: Instant, limit| limit < now.saturating_duration_since(since);
        if self.stuck_since.get().is_some_and(|since| past(since, limits.write_timeout)) {
            return Some(Overdue::Write);
        }
        if self.closing.get() {
            return None;
        }
        if !self.greeted.get() && past(self.accepted_at, limits.hello_timeout) {
            return Some(Overdue::Hello);
        }
        if self.partial_since.get().is_some_and(|since| past(since, limits.frame_timeout)) {
            return Some(Overdue::Frame);
        }
        None
    }

    /// An unfinished frame that has waited for `after` shall hold no more memory than it fills.
    pub fn compact_if_slow(&self, now: Instant, after: Duration) {
        if self.partial_since.get().is_some_and(|since| after < now.saturating_duration_since(since)) {
            self.compact.set(true);
            self.wake();
        }
    }

    fn queued(&self, mut out: RefMut<'_, Out>, bytes: usize) {
        if self.aborted.get() {
            // Nobody is there to send it.
            self.out_total.set(self.out_total.get() - out.bytes);
            *out = Out::default();
            return;
        }
        out.bytes += bytes;
        drop(out);
        self.out_total.set(self.out_total.get() + bytes);
        self.wake();
    }

    fn answered(&self) {
        let waiting = self.in_flight.get();
        assert!(0 < waiting, "an answer without a request");
        self.in_flight.set(waiting - 1);
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// A time limit that a client has broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overdue {
    /// It has not said `Hello`.
    Hello,
    /// It has begun a frame and not finished it.
    Frame,
    /// It does not take what was sent.
    Write,
}

/// Whether memory for receiving may pass what all connections may have together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Budget {
    Within,
    /// For the one connection that holds the overdraft, and for moving to less memory.
    Beyond,
}

/// The receiving side: the chunk being filled, and what of it is still to be parsed.
#[derive(Debug, Default)]
struct Receiver {
    chunk: Option<Chunk>,
    parsed: usize,
    /// What the unfinished frame needs in all, as far as it is known.
    frame_bytes: usize,
}

impl Receiver {
    fn unparsed(&self) -> usize {
        self.chunk.as_ref().map_or(0, |chunk| chunk.filled_bytes() - self.parsed)
    }

    /// Makes sure that there is a chunk with room for a read, if possible for the rest of the frame. `false`: the pool
    /// has none now.
    fn ensure_room(&mut self, pool: &ChunkPool, budget: Budget) -> bool {
        let have = self.unparsed();
        let missing = if self.frame_bytes == 0 { READ_BYTES_MIN } else { self.frame_bytes - have };
        let mut grows = false;
        if let Some(chunk) = &self.chunk {
            // The unfinished frame is larger than a chunk, or came slowly: its memory grows as it fills.
            grows = self.parsed == 0 && chunk.capacity() != pool.chunk_bytes();
            // What is only announced takes no memory: a frame that no chunk holds fills this one first.
            let fills = grows || pool.chunk_bytes() < have + missing;
            let needed = if fills { missing.min(READ_BYTES_MIN) } else { missing.max(READ_BYTES_MIN) };
            if needed <= chunk.spare_bytes() {
                return true;
            }
        }
        let wanted = if !grows && have + READ_BYTES_MIN <= pool.chunk_bytes() {
            pool.chunk_bytes()
        } else {
            (have + missing).min(2 * have + READ_BYTES_MIN)
        };
        self.move_to(pool, wanted, budget)
    }

    /// Lets go of what the unfinished frame does not fill.
    fn compact(&mut self, pool: &ChunkPool) {
        let lean = self.unparsed() + READ_BYTES_MIN;
        if self.chunk.as_ref().is_some_and(|chunk| 2 * lean < chunk.capacity()) {
            self.move_to(pool, lean, Budget::Beyond);
        }
    }

    fn move_to(&mut self, pool: &ChunkPool, capacity: usize, budget: Budget) -> bool {
        let fresh = match budget {
            Budget::Within => pool.take_sized(capacity),
            Budget::Beyond => Some(pool.take_beyond(capacity)),
        };
        let Some(mut fresh) = fresh else { return false };
        if let Some(old) = &self.chunk {
            fresh.extend(&old.filled()[self.parsed..]);
        }
        self.chunk = Some(fresh);
        self.parsed = 0;
        true
    }

    /// Nothing more arrives now: gives the chunk back unless it holds part of a frame.
    fn idle(&mut self) {
        if self.unparsed() == 0 {
            self.chunk = None;
            self.parsed = 0;
        }
    }
}

/// What the connection waits for beside its socket.
struct Waits<'a> {
    /// Staged bytes to become durable.
    room: Wait<'a>,
    /// Receive memory to come back.
    memory: Wait<'a>,
}

/// Serves one connection until either side closes it.
pub async fn serve(shard: Rc<Shard>, connection: Rc<Connection>, mut stream: TcpStream) {
    let mut receiver = Receiver::default();
    let mut waits = Waits { room: shard.room.wait(), memory: shard.chunks.wait_returned() };
    loop {
        match std::future::poll_fn(|cx| turn(&shard, &connection, &mut stream, &mut receiver, &mut waits, cx)).await {
            Ok(Turn::Received) => {}
            Ok(Turn::Closed) => break,
            Err(error) => {
                tracing::debug!(connection = connection.id, %error, "connection lost");
                break;
            }
        }
        drava_runtime::executor::mark_active();
        shard.set_clock();
        parse(&shard, &connection, &mut receiver);
        // A client that sends without a pause does not keep the others waiting.
        drava_runtime::yield_if_needed().await;
    }
    let consumers: Vec<_> = connection.consumers.take().into_values().collect();
    for consumer in consumers {
        shard.detach(&connection, &consumer);
    }
    let unsent = std::mem::take(&mut *connection.out.borrow_mut()).bytes;
    connection.out_total.set(connection.out_total.get() - unsent);
    connection.aborted.set(true);
    connection.room.notify_all();
    connection.ended.notify_all();
    shard.release_overdraft(connection.id);
    shard.disconnected(connection.id);
}

/// Sends what is queued, then reads. Ready when bytes came or the connection is over.
fn turn(
    shard: &Rc<Shard>,
    connection: &Connection,
    stream: &mut TcpStream,
    receiver: &mut Receiver,
    waits: &mut Waits<'_>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Turn>> {
    if connection.aborted.get() {
        return Poll::Ready(Ok(Turn::Closed));
    }
    let all_sent = send(shard, connection, stream, cx)?;
    if connection.closing.get() {
        if all_sent {
            return Poll::Ready(Ok(Turn::Closed));
        }
        register(connection, cx);
        return Poll::Pending;
    }
    // Frames that were left over while the connection had no room are taken up before more is read.
    if may_take(shard, connection, waits, cx) {
        if receiver.unparsed() != 0 && receiver.frame_bytes == 0 {
            return Poll::Ready(Ok(Turn::Received));
        }
        if receiver.ensure_room(&shard.chunks, Budget::Within)
            || (shard.claim_overdraft(connection.id) && receiver.ensure_room(&shard.chunks, Budget::Beyond))
        {
            // Whoever waits again does so behind those who wait already.
            waits.memory.leave();
            let chunk = receiver.chunk.as_mut().expect("ensure_room left a chunk");
            match Pin::new(stream).poll_read(cx, chunk.spare()) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(Turn::Closed)),
                Poll::Ready(Ok(bytes)) => {
                    chunk.advance(bytes);
                    shard.counters.bytes_received.add(bytes as u64);
                    return Poll::Ready(Ok(Turn::Received));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    receiver.idle();
                    if receiver.unparsed() == 0 {
                        shard.release_overdraft(connection.id);
                    }
                    if connection.compact.take() {
                        receiver.compact(&shard.chunks);
                    }
                }
            }
        } else {
            shard.relieve_memory();
            waits.memory.enter(cx);
        }
    }
    register(connection, cx);
    Poll::Pending
}

fn register(connection: &Connection, cx: &mut Context<'_>) {
    let mut waker = connection.waker.borrow_mut();
    if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
        *waker = Some(cx.waker().clone());
    }
}

/// Whether another request may be taken now; if the shard has no room, `cx` is woken when it has.
fn may_take(shard: &Shard, connection: &Connection, waits: &mut Waits<'_>, cx: &mut Context<'_>) -> bool {
    if shard.limits.in_flight_max <= connection.in_flight.get() || !connection.has_room() {
        return false;
    }
    if shard.has_room() {
        return true;
    }
    waits.room.enter(cx);
    false
}

/// Writes as much as the socket takes; `true` when nothing is left.
fn send(shard: &Shard, connection: &Connection, stream: &mut TcpStream, cx: &mut Context<'_>) -> io::Result<bool> {
    let mut out = connection.out.borrow_mut();
    if out.bytes == 0 {
        return Ok(true);
    }
    // With the least that the limit may have been when somebody found no room.
    let was_full = OUT_BYTES_CROWDED <= out.bytes;
    out.seal_tail();
    loop {
        if out.bytes == 0 {
            connection.stuck_since.set(None);
            break;
        }
        let mut slices = [IoSlice::new(&[]); WRITE_SLICES_MAX];
        let mut used = 0;
        for (slot, piece) in slices.iter_mut().zip(&out.pieces) {
            let sent = if used == 0 { out.sent } else { 0 };
            *slot = IoSlice::new(&piece[sent..]);
            used += 1;
        }
        match Pin::new(&mut *stream).poll_write_vectored(cx, &slices[..used]) {
            Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Poll::Ready(Ok(bytes)) => {
                out.consume(bytes);
                connection.out_total.set(connection.out_total.get() - bytes);
                connection.stuck_since.set(None);
                shard.counters.bytes_sent.add(bytes as u64);
            }
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Pending => {
                if connection.stuck_since.get().is_none() {
                    connection.stuck_since.set(Some(Instant::now()));
                }
                break;
            }
        }
    }
    let left = out.bytes;
    drop(out);
    if was_full && connection.has_room() {
        connection.room.notify_all();
        for consumer in connection.consumers.borrow().values() {
            consumer.wake();
        }
    }
    Ok(left == 0)
}

/// Hands every whole frame to the shard, as far as there is room for its answer.
fn parse(shard: &Rc<Shard>, connection: &Rc<Connection>, receiver: &mut Receiver) {
    let Some(chunk) = &receiver.chunk else { return };
    receiver.frame_bytes = 0;
    while receiver.parsed < chunk.filled_bytes() {
        if connection.closing.get() {
            return;
        }
        if shard.limits.in_flight_max <= connection.in_flight.get() || !connection.has_room() || !shard.has_room() {
            break;
        }
        match frame::decode(&chunk.filled()[receiver.parsed..], shard.limits.payload_bytes_max) {
            Ok(Decoded::Frame(frame, bytes)) => {
                shard.counters.frames_received.add(1);
                let start = receiver.parsed + frame.payload_position();
                let payload = start..start + frame.header.payload_bytes as usize;
                receiver.parsed += bytes;
                take(shard, connection, &frame, || chunk.slice(payload));
            }
            Ok(Decoded::NeedBytes(bytes)) => {
                receiver.frame_bytes = bytes;
                break;
            }
            Err(error) => {
                shard.counters.frames_malformed.add(1);
                tracing::debug!(connection = connection.id, %error, "malformed frame");
                connection.in_flight.set(connection.in_flight.get() + 1);
                connection.answer_error(0, error.code(), 0, &error.to_string());
                return;
            }
        }
    }
    let partial = (receiver.frame_bytes != 0).then(|| connection.partial_since.get().unwrap_or_else(Instant::now));
    connection.partial_since.set(partial);
    receiver.idle();
    if partial.is_none() {
        shard.release_overdraft(connection.id);
    }
}

fn take(shard: &Rc<Shard>, connection: &Rc<Connection>, frame: &Frame<'_>, payload: impl FnOnce() -> Slice) {
    connection.in_flight.set(connection.in_flight.get() + 1);
    if !connection.greeted.get() {
        if frame.header.kind != Kind::Hello {
            let text = "the first frame of a connection is Hello";
            return connection.answer_error(frame.header.correlation, ErrorCode::HandshakeRequired, 0, text);
        }
        if shard.hello(connection, frame) {
            connection.greeted.set(true);
        }
        return;
    }
    shard.request(connection, frame, payload);
}
