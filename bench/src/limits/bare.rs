//! The bare path: what a durable publish costs with no broker around it.
//!
//! 1. A task per connection reads and cuts frames, all into the same memory: a header of [`HEADER_BYTES`] and a payload.
//! 2. It checks the payload's CRC32C and copies the frame once, into the block that is being filled.
//! 3. The committer writes blocks durably over a segment that was written before, some at once. While none is under way
//!    it writes what there is; otherwise it waits until a write returns or enough has gathered to be worth another.
//! 4. When a block and all before it are durable, each of its frames is acknowledged by its number.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::Mutex;
use std::task::Poll;
use std::time::{Duration, Instant};

use drava_runtime::Executor;
use drava_runtime::file::{DmaBuffer, DmaFile};
use drava_runtime::local::Notify;
use drava_runtime::net::{TcpListener, TcpStream};
use futures_lite::{AsyncRead, AsyncWrite};

use super::loopback::{Running, connect};
use super::{Bare, LimitsError, cores, disk, executor, join};
use crate::cpu::ThreadId;
use crate::latency::Latency;
use crate::measure::{Meter, Phase, Stretch, measure};

/// Number of the frame on its connection (u32), CRC32C of the payload (u32), payload bytes (u32), zeros.
const HEADER_BYTES: usize = 16;
const ACK_BYTES: usize = 4;
const RECEIVE_BYTES: usize = 256 << 10;
const FRAME_BYTES_MAX: usize = 128 << 10;
const BLOCK_BYTES: usize = 512 << 10;
const ALIGNMENT: usize = 4096;
/// With a write under way, another begins when this much has gathered.
const WORTH_ANOTHER_BYTES: usize = 128 << 10;

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub payload_bytes: usize,
    pub connections: usize,
    pub in_flight: usize,
    /// Frames a second on all connections, each with its latency from when it was due. `None`: as fast as they go.
    pub rate: Option<f64>,
}

pub const FRAMES: Shape = Shape { payload_bytes: 64 << 10, connections: 4, in_flight: 16, rate: None };
pub const SINGLES: Shape = Shape { payload_bytes: 1 << 10, connections: 32, in_flight: 128, rate: None };
/// Frames that may be under way when they are sent by the clock: no limit to speak of.
const PACED_IN_FLIGHT: usize = 128;
/// Frames that lie prepared in the memory of a connection.
const RING_FRAMES_MAX: usize = 128;
const WRITES_IN_FLIGHT: [usize; 3] = [1, 2, 4];

/// Tries how many writes at once are best in short runs, then measures with that.
pub fn best(segment: &Path, segment_bytes: u64, shape: &Shape, stretch: Stretch) -> Result<Bare, LimitsError> {
    let short = Stretch { warm_up: stretch.warm_up / 2, measured: stretch.measured / 3 };
    let mut best: Option<Bare> = None;
    for writes_in_flight in WRITES_IN_FLIGHT {
        let tried = run(segment, segment_bytes, shape, writes_in_flight, short)?;
        if best.is_none_or(|best| best.mib_per_s < tried.mib_per_s) {
            best = Some(tried);
        }
    }
    let writes_in_flight = best.expect("at least one was tried").writes_in_flight;
    run(segment, segment_bytes, shape, writes_in_flight, stretch)
}

/// Frames by the clock at half the rate of `full`: what the machine's own hiccups do to the tail of latencies.
pub fn half(segment: &Path, segment_bytes: u64, full: &Bare, stretch: Stretch) -> Result<Bare, LimitsError> {
    let shape = Shape { in_flight: PACED_IN_FLIGHT, rate: Some(full.frames_per_s / 2.0), ..FRAMES };
    run(segment, segment_bytes, &shape, full.writes_in_flight, stretch)
}

pub fn run(
    segment: &Path,
    segment_bytes: u64,
    shape: &Shape,
    writes_in_flight: usize,
    stretch: Stretch,
) -> Result<Bare, LimitsError> {
    let (server_core, client_core) = cores();
    let (server, server_thread, port) =
        start_server(server_core, segment.to_owned(), segment_bytes, shape.connections, writes_in_flight)?;
    let meter = Arc::new(Meter::default());
    let latencies = Arc::new(Mutex::new(Latency::default()));
    let (client, client_thread) = {
        let (meter, latencies, shape) = (meter.clone(), latencies.clone(), *shape);
        connect("bare-client", client_core, port, shape.connections, move |stream| {
            client(stream, shape, meter.clone(), latencies.clone())
        })?
    };
    let measured = measure(&meter, stretch, &[server_thread, client_thread]);
    join(client)?;
    join(server)?;
    let measured = measured.map_err(LimitsError::io("read the CPU clocks"))?;
    let latency = latencies.lock().unwrap_or_else(std::sync::PoisonError::into_inner).quantiles();
    Ok(Bare {
        payload_bytes: shape.payload_bytes,
        connections: shape.connections,
        in_flight: shape.in_flight,
        paced: shape.rate.is_some(),
        writes_in_flight,
        mib_per_s: measured.mib_per_s(),
        frames_per_s: measured.messages_per_s(),
        latency,
        server_cpu_s_per_gib: measured.cpu_s_per_gib(0),
        server_cpu_s_per_million: measured.cpu_s_per_million(0),
        client_cpu_s_per_gib: measured.cpu_s_per_gib(1),
    })
}

fn start_server(
    core: usize,
    segment: PathBuf,
    segment_bytes: u64,
    connections: usize,
    writes_in_flight: usize,
) -> Result<(Running, ThreadId, u16), LimitsError> {
    let (ready, address) = std::sync::mpsc::channel();
    let running = Executor::start(executor("bare-server", core), move || async move {
        let file = Rc::new(disk::open_durable(&segment).await?);
        let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(drava_runtime::io_error);
        let listener = listener.map_err(LimitsError::io("listen"))?;
        let port = listener.local_addr().map_err(drava_runtime::io_error).map_err(LimitsError::io("listen"))?.port();
        ready.send((ThreadId::current(), port)).expect("the starter waits");
        serve(listener, file, segment_bytes, connections, writes_in_flight).await
    })
    .map_err(LimitsError::io("start an executor"))?;
    match address.recv() {
        Ok((thread, port)) => Ok((running, thread, port)),
        Err(_) => join(running).and(Err(LimitsError::Io { what: "listen", source: io::ErrorKind::Other.into() })),
    }
}

/// Frames of one connection that lie side by side in a block: number of the first, and how many.
#[derive(Clone, Copy, Debug)]
struct Run {
    connection: usize,
    first: u32,
    count: u32,
}

/// A block being filled, or full and waiting for its write.
struct Block {
    buffer: DmaBuffer,
    used: usize,
    runs: Vec<Run>,
}

/// A block under way to the disk, in the order of the segment.
struct Commit {
    runs: Vec<Run>,
    durable: bool,
}

struct Journal {
    file: Rc<DmaFile>,
    /// All connections receive into the same memory, which so stays in the cache: room for a begun frame, then for a read.
    receive: RefCell<Vec<u8>>,
    filling: RefCell<Option<Block>>,
    full: RefCell<VecDeque<Block>>,
    commits: RefCell<VecDeque<Commit>>,
    /// Number of the commit at the front of `commits`.
    first_commit: Cell<u64>,
    writing: Cell<usize>,
    spare_runs: RefCell<Vec<Vec<Run>>>,
    failed: RefCell<Option<io::Error>>,
    changed: Notify,
    closed: Cell<bool>,
}

type Connection = Rc<RefCell<TcpStream>>;

async fn serve(
    listener: TcpListener,
    file: Rc<DmaFile>,
    segment_bytes: u64,
    connections: usize,
    writes_in_flight: usize,
) -> Result<(), LimitsError> {
    let journal = Rc::new(Journal {
        file,
        receive: RefCell::new(vec![0; FRAME_BYTES_MAX + RECEIVE_BYTES]),
        filling: RefCell::default(),
        full: RefCell::default(),
        commits: RefCell::default(),
        first_commit: Cell::new(0),
        writing: Cell::new(0),
        spare_runs: RefCell::default(),
        failed: RefCell::default(),
        changed: Notify::default(),
        closed: Cell::new(false),
    });
    let mut streams: Vec<Connection> = Vec::new();
    for _ in 0..connections {
        let stream = listener.accept().await.map_err(drava_runtime::io_error).map_err(LimitsError::io("accept"))?;
        stream.set_nodelay(true).map_err(drava_runtime::io_error).map_err(LimitsError::io("set TCP_NODELAY"))?;
        streams.push(Rc::new(RefCell::new(stream)));
    }
    let receiving: Vec<_> = streams
        .iter()
        .enumerate()
        .map(|(index, stream)| drava_runtime::spawn(receive(index, stream.clone(), journal.clone())))
        .collect();
    let committing = drava_runtime::spawn(commit(journal.clone(), streams, segment_bytes, writes_in_flight));
    for received in receiving {
        received.await.expect("the executor runs on")?;
    }
    journal.closed.set(true);
    journal.changed.notify();
    committing.await.expect("the executor runs on").map_err(LimitsError::io("commit"))
}

async fn receive(index: usize, stream: Connection, journal: Rc<Journal>) -> Result<(), LimitsError> {
    // The begun frame that the last read ended with.
    let mut begun: Vec<u8> = Vec::new();
    loop {
        let more = poll_fn(|cx| {
            let mut memory = journal.receive.borrow_mut();
            let mut stream = stream.borrow_mut();
            let bytes = match Pin::new(&mut *stream).poll_read(cx, &mut memory[FRAME_BYTES_MAX..]) {
                Poll::Ready(bytes) => bytes.map_err(LimitsError::io("receive"))?,
                Poll::Pending => return Poll::Pending,
            };
            if bytes == 0 {
                return Poll::Ready(Ok(false));
            }
            let start = FRAME_BYTES_MAX - begun.len();
            memory[start..FRAME_BYTES_MAX].copy_from_slice(&begun);
            let rest = journal.stage_frames(index, &memory[start..FRAME_BYTES_MAX + bytes])?;
            begun.clear();
            begun.extend_from_slice(rest);
            Poll::Ready(Ok(true))
        });
        if !more.await? {
            return Ok(());
        }
        drava_runtime::executor::mark_active();
        journal.changed.notify();
        drava_runtime::yield_if_needed().await;
    }
}

impl Journal {
    /// Checks and stages the whole frames of `input`; returns what is left.
    fn stage_frames<'a>(&self, connection: usize, input: &'a [u8]) -> Result<&'a [u8], LimitsError> {
        let mut rest = input;
        while let Some(head) = rest.first_chunk::<HEADER_BYTES>() {
            let frame_bytes = HEADER_BYTES + u32_at(head, 8) as usize;
            if FRAME_BYTES_MAX < frame_bytes {
                return Err(LimitsError::Io { what: "receive", source: io::ErrorKind::InvalidData.into() });
            }
            let Some((frame, after)) = rest.split_at_checked(frame_bytes) else { break };
            if crc32c::crc32c(&frame[HEADER_BYTES..]) != u32_at(head, 4) {
                return Err(LimitsError::Checksum);
            }
            self.stage(connection, u32_at(head, 0), frame);
            rest = after;
        }
        Ok(rest)
    }

    fn stage(&self, connection: usize, number: u32, frame: &[u8]) {
        let mut filling = self.filling.borrow_mut();
        if filling.as_ref().is_some_and(|block| block.buffer.len() < block.used + frame.len()) {
            self.full.borrow_mut().extend(filling.take());
        }
        let block = filling.get_or_insert_with(|| Block {
            buffer: self.file.alloc_dma_buffer(BLOCK_BYTES),
            used: 0,
            runs: self.spare_runs.borrow_mut().pop().unwrap_or_default(),
        });
        block.buffer.as_bytes_mut()[block.used..block.used + frame.len()].copy_from_slice(frame);
        block.used += frame.len();
        match block.runs.last_mut() {
            Some(run) if run.connection == connection && run.first.wrapping_add(run.count) == number => run.count += 1,
            Some(_) | None => block.runs.push(Run { connection, first: number, count: 1 }),
        }
    }

    /// What to write next, if it is time to write.
    fn next_block(&self, writes_in_flight: usize) -> Option<Block> {
        if self.writing.get() == writes_in_flight {
            return None;
        }
        if let Some(block) = self.full.borrow_mut().pop_front() {
            return Some(block);
        }
        let mut filling = self.filling.borrow_mut();
        let gathered = filling.as_ref().map_or(0, |block| block.used);
        if self.writing.get() == 0 || WORTH_ANOTHER_BYTES <= gathered { filling.take() } else { None }
    }

    fn is_empty(&self) -> bool {
        self.filling.borrow().is_none() && self.full.borrow().is_empty() && self.commits.borrow().is_empty()
    }
}

async fn commit(
    journal: Rc<Journal>,
    streams: Vec<Connection>,
    segment_bytes: u64,
    writes_in_flight: usize,
) -> io::Result<()> {
    let mut position = 0;
    let mut acks: Vec<Vec<u8>> = vec![Vec::new(); streams.len()];
    loop {
        if let Some(error) = journal.failed.take() {
            return Err(error);
        }
        acknowledge(&journal, &streams, &mut acks).await?;
        while let Some(mut block) = journal.next_block(writes_in_flight) {
            let bytes = block.used.next_multiple_of(ALIGNMENT);
            block.buffer.as_bytes_mut()[block.used..bytes].fill(0);
            block.buffer.trim_to_size(bytes);
            if segment_bytes < position + bytes as u64 {
                position = 0;
            }
            let number = journal.first_commit.get() + journal.commits.borrow().len() as u64;
            journal.commits.borrow_mut().push_back(Commit { runs: block.runs, durable: false });
            journal.writing.set(journal.writing.get() + 1);
            drava_runtime::spawn(write(journal.clone(), block.buffer, position, number));
            position += bytes as u64;
        }
        if journal.closed.get() && journal.is_empty() {
            return Ok(());
        }
        journal.changed.notified().await;
    }
}

async fn write(journal: Rc<Journal>, buffer: DmaBuffer, position: u64, number: u64) {
    let bytes = buffer.len();
    let result = journal.file.write_at(buffer, position).await;
    journal.writing.set(journal.writing.get() - 1);
    match result {
        Ok(written) if written == bytes => {
            let index = (number - journal.first_commit.get()) as usize;
            journal.commits.borrow_mut()[index].durable = true;
        }
        Ok(_) => *journal.failed.borrow_mut() = Some(io::ErrorKind::WriteZero.into()),
        Err(error) => *journal.failed.borrow_mut() = Some(drava_runtime::io_error(error)),
    }
    journal.changed.notify();
}

/// Acknowledges what is durable with all before it: one write a connection.
async fn acknowledge(journal: &Journal, streams: &[Connection], acks: &mut [Vec<u8>]) -> io::Result<()> {
    let mut any = false;
    while journal.commits.borrow().front().is_some_and(|commit| commit.durable) {
        let mut commit = journal.commits.borrow_mut().pop_front().expect("there is a first");
        journal.first_commit.set(journal.first_commit.get() + 1);
        for run in commit.runs.drain(..) {
            let out = &mut acks[run.connection];
            (0..run.count).for_each(|i| out.extend_from_slice(&run.first.wrapping_add(i).to_le_bytes()));
        }
        journal.spare_runs.borrow_mut().push(commit.runs);
        any = true;
    }
    if !any {
        return Ok(());
    }
    for (stream, out) in streams.iter().zip(acks) {
        let mut sent = 0;
        while sent < out.len() {
            sent += poll_fn(|cx| Pin::new(&mut *stream.borrow_mut()).poll_write(cx, &out[sent..])).await?;
        }
        out.clear();
    }
    Ok(())
}

/// Keeps `in_flight` frames under way, or sends them by the clock. Frames lie prepared in a ring, in the order of sending,
/// so that what may be sent is one run of bytes; only their numbers are written anew.
async fn client(
    mut stream: TcpStream,
    shape: Shape,
    meter: Arc<Meter>,
    latencies: Arc<Mutex<Latency>>,
) -> io::Result<()> {
    let frame_bytes = HEADER_BYTES + shape.payload_bytes;
    let mut frame = vec![0x5A; frame_bytes];
    let crc = crc32c::crc32c(&frame[HEADER_BYTES..]);
    frame[4..8].copy_from_slice(&crc.to_le_bytes());
    frame[8..12].copy_from_slice(&(shape.payload_bytes as u32).to_le_bytes());
    let ring_frames = shape.in_flight.min(RING_FRAMES_MAX);
    let mut ring = frame.repeat(ring_frames);
    let ring_bytes = ring.len() as u64;
    let mut clock = shape.rate.map(|rate| FrameClock::new(rate / shape.connections as f64));
    // When each frame under way was sent, or was due.
    let mut sent_at = VecDeque::with_capacity(shape.in_flight);
    let mut latency = Latency::default();
    let mut measuring = false;
    // In frames: numbered, acknowledged. In bytes: handed to the socket.
    let (mut numbered, mut acked, mut sent) = (0u64, 0u64, 0u64);
    let mut answers = [0; 4096];
    let mut answers_filled = 0;
    loop {
        drava_runtime::executor::mark_active();
        let phase = meter.phase();
        if phase == Phase::Measuring && !measuring {
            measuring = true;
            latency.reset();
        }
        let now = Instant::now();
        let end = (acked + shape.in_flight as u64).min(sent / frame_bytes as u64 + ring_frames as u64);
        while phase != Phase::Stopping && numbered < end {
            let at = match &mut clock {
                None => now,
                Some(clock) => match clock.take_due(now) {
                    Some(due) => due,
                    None => break,
                },
            };
            let slot = (numbered % ring_frames as u64) as usize;
            ring[slot * frame_bytes..][..4].copy_from_slice(&(numbered as u32).to_le_bytes());
            sent_at.push_back(at);
            numbered += 1;
        }
        if phase == Phase::Stopping && acked == numbered {
            break;
        }
        // Send what is there, then hear what came; wait when neither goes on, at most until the next frame is due.
        let is_blocked = Cell::new(false);
        let turn = poll_fn(|cx| {
            let end = numbered * frame_bytes as u64;
            is_blocked.set(false);
            while sent < end {
                let from = (sent % ring_bytes) as usize;
                let bytes = (end - sent).min(ring_bytes - from as u64) as usize;
                match Pin::new(&mut stream).poll_write(cx, &ring[from..from + bytes])? {
                    Poll::Ready(written) => sent += written as u64,
                    Poll::Pending => {
                        is_blocked.set(true);
                        break;
                    }
                }
            }
            match Pin::new(&mut stream).poll_read(cx, &mut answers[answers_filled..])? {
                Poll::Ready(0) => Poll::Ready(Err(io::Error::from(io::ErrorKind::UnexpectedEof))),
                Poll::Ready(bytes) => Poll::Ready(Ok(bytes)),
                Poll::Pending => Poll::Pending,
            }
        });
        let due = async {
            match clock.as_ref().filter(|_| phase != Phase::Stopping && numbered < end) {
                // A full socket is tried again when it has room for more than crumbs.
                Some(clock) if !is_blocked.get() => {
                    drava_runtime::time::sleep(clock.due.saturating_duration_since(now)).await;
                    Ok(0)
                }
                _ => std::future::pending().await,
            }
        };
        let received = futures_lite::future::or(turn, due).await?;
        answers_filled += received;
        let now = Instant::now();
        let count = answers_filled / ACK_BYTES;
        for answer in answers[..count * ACK_BYTES].chunks_exact(ACK_BYTES) {
            let number = u32::from_le_bytes([answer[0], answer[1], answer[2], answer[3]]);
            let (true, Some(at)) = (number == acked as u32, sent_at.pop_front()) else {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "acknowledged out of order"));
            };
            latency.record(now - at);
            acked += 1;
        }
        answers.copy_within(count * ACK_BYTES..answers_filled, 0);
        answers_filled -= count * ACK_BYTES;
        meter.count(count as u64, (count * shape.payload_bytes) as u64);
    }
    latencies.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(&latency);
    Ok(())
}

/// When frames are due.
struct FrameClock {
    due: Instant,
    period: Duration,
}

impl FrameClock {
    fn new(frames_per_s: f64) -> FrameClock {
        FrameClock { due: Instant::now(), period: Duration::from_secs_f64(1.0 / frames_per_s) }
    }

    fn take_due(&mut self, now: Instant) -> Option<Instant> {
        let due = self.due;
        (due <= now).then(|| {
            self.due = due + self.period;
            due
        })
    }
}

fn u32_at(bytes: &[u8; HEADER_BYTES], position: usize) -> u32 {
    u32::from_le_bytes([bytes[position], bytes[position + 1], bytes[position + 2], bytes[position + 3]])
}
