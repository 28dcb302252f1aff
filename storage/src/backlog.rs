//! Readers behind the cache: extents from disk, with read-ahead, in memory of their own.
//!
//! Whoever reads on where the last read ended is a stream. A stream reads chunks ahead: adjacent extents of its
//! partition in one read of the segment. It starts small and doubles its window while the reader follows. All streams
//! share one budget, so that catching up takes nothing from the cache of the tail. What a reader was given counts as held
//! by readers until it lets go, and when those hold much, chunks are small and nothing is read ahead.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::PartitionId;
use drava_runtime::local::Broadcast;

use crate::block::{self, EXTENT_HEADER_BYTES};
use crate::damage::FoundBy;
use crate::index::ExtentRow;
use crate::io::{ALIGNMENT, File, Io};
use crate::memory::{Charge, Charged, RunMemory};
use crate::store::{Inner, ReadError, Run};

const CHUNK_BYTES_MAX: u64 = 1 << 20;
/// Extents this far apart are still fetched with one read.
pub(crate) const GAP_BYTES_MAX: u64 = 32 << 10;
const WINDOW_BYTES_MIN: u64 = 256 << 10;
/// The budget of all streams, in read-ahead windows.
const WINDOWS: u64 = 4;
/// More readers than this at a time take turns.
const STREAMS_MAX: usize = 256;
/// A chunk while readers hold much.
const CHUNK_BYTES_PRESSED: u64 = 128 << 10;
const STREAM_IDLE: Duration = Duration::from_secs(5);
/// Rows asked from the index at a time.
const ROWS_FIRST: usize = 16;
const ROWS_NEXT: usize = 256;

pub(crate) struct Backlog {
    streams: RefCell<Vec<Rc<Stream>>>,
    /// What the chunks of all streams take.
    bytes: Rc<Cell<u64>>,
    bytes_max: u64,
    window_bytes_max: u64,
}

pub(crate) struct Stream {
    partition_index: u32,
    partition: PartitionId,
    chunks: RefCell<VecDeque<Rc<Chunk>>>,
    /// Known extents from `next_offset` on.
    rows: RefCell<VecDeque<ExtentRow>>,
    /// The chunks end here.
    next_offset: Cell<u64>,
    window_bytes: Cell<u64>,
    used_at: Cell<Duration>,
    planning: Cell<bool>,
    planned: Broadcast,
}

/// Messages fetched with one read.
struct Chunk {
    offsets: Range<u64>,
    bytes: u64,
    state: RefCell<ChunkState>,
    ready: Broadcast,
    /// The budget that it counts in.
    budget: Rc<Cell<u64>>,
}

enum ChunkState {
    Reading,
    Ready {
        memory: Rc<dyn RunMemory>,
        pieces: Vec<Piece>,
    },
    /// The messages lie elsewhere by now, or are deleted.
    Moved,
    Failed(ReadError),
}

/// Good batches side by side in memory.
pub(crate) struct Piece {
    offsets: Range<u64>,
    bytes: Range<usize>,
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.budget.set(self.budget.get() - self.bytes);
    }
}

/// What came of planning the next chunk of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Planned {
    Chunk,
    /// What follows is in the cache, or not there yet.
    Nothing,
    /// Readers hold as much as they may.
    NoRoom,
}

impl Backlog {
    pub(crate) fn new(read_ahead_bytes: u64) -> Backlog {
        let window_bytes_max = read_ahead_bytes.max(CHUNK_BYTES_MAX);
        Backlog {
            streams: RefCell::default(),
            bytes: Rc::default(),
            bytes_max: WINDOWS * window_bytes_max,
            window_bytes_max,
        }
    }

    /// Forgets streams that nobody reads.
    pub(crate) fn expire(&self, now: Duration) {
        self.streams.borrow_mut().retain(|stream| now < stream.used_at.get() + STREAM_IDLE);
    }

    /// Extents of this partition were moved: what was planned and is not being read yet is asked again.
    pub(crate) fn forget_rows(&self, partition_index: u32) {
        for stream in self.streams.borrow().iter().filter(|stream| stream.partition_index == partition_index) {
            stream.rows.borrow_mut().clear();
        }
    }

    /// The stream that a read at `offset` goes on with, or a new one, and whether it is new.
    fn stream(&self, partition_index: u32, partition: PartitionId, offset: u64, now: Duration) -> (Rc<Stream>, bool) {
        let mut streams = self.streams.borrow_mut();
        let found = streams.iter().find(|stream| {
            stream.partition_index == partition_index && (stream.next_offset.get() == offset || stream.has(offset))
        });
        if let Some(stream) = found {
            stream.used_at.set(now);
            return (stream.clone(), false);
        }
        if STREAMS_MAX <= streams.len() {
            let oldest = (0..streams.len()).min_by_key(|&index| streams[index].used_at.get());
            streams.swap_remove(oldest.expect("there are many"));
        }
        let stream = Rc::new(Stream {
            partition_index,
            partition,
            chunks: RefCell::default(),
            rows: RefCell::default(),
            next_offset: Cell::new(offset),
            window_bytes: Cell::new(0),
            used_at: Cell::new(now),
            planning: Cell::new(false),
            planned: Broadcast::default(),
        });
        streams.push(stream.clone());
        (stream, true)
    }

    fn room(&self) -> bool {
        self.bytes.get() < self.bytes_max
    }

    /// Forgets the stream, other than `stream`, that was not read for the longest and has chunks. `false`: there is none.
    pub(crate) fn shed(&self, stream: Option<&Rc<Stream>>) -> bool {
        let mut streams = self.streams.borrow_mut();
        let is_other = |other: &Rc<Stream>| stream.is_none_or(|stream| !Rc::ptr_eq(other, stream));
        let others = streams.iter().enumerate().filter(|(_, other)| is_other(other) && !other.is_empty());
        let Some((index, _)) = others.min_by_key(|(_, other)| other.used_at.get()) else { return false };
        streams.swap_remove(index);
        true
    }
}

impl Stream {
    fn has(&self, offset: u64) -> bool {
        self.chunk(offset).is_some()
    }

    fn chunk(&self, offset: u64) -> Option<Rc<Chunk>> {
        let chunks = self.chunks.borrow();
        let index = chunks.partition_point(|chunk| chunk.offsets.end <= offset);
        chunks.get(index).filter(|chunk| chunk.offsets.contains(&offset)).cloned()
    }

    fn drop_before(&self, offset: u64) {
        let mut chunks = self.chunks.borrow_mut();
        while chunks.front().is_some_and(|chunk| chunk.offsets.end <= offset) {
            chunks.pop_front();
        }
    }

    /// It has nothing that takes memory.
    fn is_empty(&self) -> bool {
        self.chunks.borrow().is_empty()
    }

    fn bytes_ahead(&self) -> u64 {
        self.chunks.borrow().iter().map(|chunk| chunk.bytes).sum()
    }
}

impl<I: Io, T: 'static> Inner<I, T> {
    /// Reads from disk; waits while readers hold as much memory as they may. `Ok(None)`: the messages are in memory after
    /// all.
    pub(crate) async fn read_backlog(
        self: &Rc<Self>,
        partition_index: u32,
        offset: u64,
        bytes_max: usize,
        out: &mut Vec<Run>,
    ) -> Result<Option<u64>, ReadError> {
        let partition = self.partitions.borrow().list[partition_index as usize].partition;
        let (stream, new) = self.backlog.stream(partition_index, partition, offset, self.io.now());
        stream.drop_before(offset);
        let bytes_max = self.answer_bytes_max(bytes_max);
        // A reader that jumps about gets what it asks for; one that goes on gets more and more ahead.
        let window_bytes = if new {
            WINDOW_BYTES_MIN.min(bytes_max as u64)
        } else {
            (stream.window_bytes.get() * 2).clamp(WINDOW_BYTES_MIN, self.backlog.window_bytes_max)
        };
        stream.window_bytes.set(window_bytes);
        let chunk = loop {
            let freed = self.memory.freed().version();
            if let Some(chunk) = stream.chunk(offset) {
                break chunk;
            }
            if stream.next_offset.get() != offset {
                // Somebody else who reads the same stream went on: begin anew.
                self.backlog.streams.borrow_mut().retain(|other| !Rc::ptr_eq(other, &stream));
                return Ok(None);
            }
            match self.plan(&stream).await? {
                Planned::Chunk => {}
                Planned::Nothing => return Ok(None),
                // What was read ahead of others goes first; then they must let go.
                Planned::NoRoom if self.backlog.shed(Some(&stream)) => {}
                Planned::NoRoom => {
                    self.memory.freed().changed(freed).await;
                }
            }
        };
        if !new && !stream.planning.get() && stream.bytes_ahead() < window_bytes && self.may_read_ahead() {
            let (inner, stream) = (self.clone(), stream.clone());
            self.io.spawn(async move { inner.read_ahead(&stream).await });
        }
        loop {
            let version = chunk.ready.version();
            match &*chunk.state.borrow() {
                ChunkState::Reading => {}
                ChunkState::Failed(error) => {
                    let error = error.clone();
                    stream.chunks.borrow_mut().retain(|other| !Rc::ptr_eq(other, &chunk));
                    stream.next_offset.set(u64::MAX);
                    return Err(self.trimmed(partition_index, offset).unwrap_or(match error {
                        ReadError::Damaged { range } => ReadError::Damaged { range: offset..range.end },
                        error => error,
                    }));
                }
                ChunkState::Moved => {
                    self.backlog.streams.borrow_mut().retain(|other| !Rc::ptr_eq(other, &stream));
                    return Ok(None);
                }
                ChunkState::Ready { memory, pieces } => {
                    let served = serve(memory, pieces, &chunk.offsets, offset, bytes_max, out);
                    return served.map(Some).map_err(|error| self.trimmed(partition_index, offset).unwrap_or(error));
                }
            }
            chunk.ready.changed(version).await;
        }
    }

    /// The error of a read whose messages were deleted meanwhile.
    fn trimmed(&self, partition_index: u32, offset: u64) -> Option<ReadError> {
        let partitions = self.partitions.borrow();
        let partition = &partitions.list[partition_index as usize];
        if partition.deleted {
            return Some(ReadError::Deleted);
        }
        let start_offset = partition.start_offset;
        (offset < start_offset).then_some(ReadError::Trimmed { offset, start_offset })
    }

    fn may_read_ahead(&self) -> bool {
        self.backlog.room() && !self.memory.is_pressed()
    }

    async fn read_ahead(self: Rc<Self>, stream: &Rc<Stream>) {
        while stream.bytes_ahead() < stream.window_bytes.get() && self.may_read_ahead() {
            // An error here comes again when somebody reads there.
            if !matches!(self.plan(stream).await, Ok(Planned::Chunk)) {
                break;
            }
        }
    }

    /// Adds one chunk to the stream and starts to read it.
    async fn plan(self: &Rc<Self>, stream: &Rc<Stream>) -> Result<Planned, ReadError> {
        if stream.planning.get() {
            stream.planned.changed(stream.planned.version()).await;
            return Ok(Planned::Chunk);
        }
        stream.planning.set(true);
        let planned = self.plan_alone(stream).await;
        stream.planning.set(false);
        stream.planned.notify_all();
        planned
    }

    async fn plan_alone(self: &Rc<Self>, stream: &Rc<Stream>) -> Result<Planned, ReadError> {
        let offset = stream.next_offset.get();
        if offset == u64::MAX {
            return Ok(Planned::Nothing);
        }
        stream.rows.borrow_mut().retain(|row| offset < row.next_offset);
        if stream.rows.borrow().is_empty() {
            let in_tail = {
                let partitions = self.partitions.borrow();
                let partition = &partitions.list[stream.partition_index as usize];
                if partition.end_offset <= offset {
                    return Ok(Planned::Nothing);
                }
                let in_tail = partition.tail.front().is_some_and(|extent| extent.first_offset <= offset);
                if in_tail {
                    let from = partition.tail.partition_point(|extent| extent.next_offset <= offset);
                    stream.rows.borrow_mut().extend(partition.tail.iter().skip(from).take(ROWS_NEXT));
                }
                in_tail
            };
            if !in_tail {
                let count = if stream.chunks.borrow().is_empty() { ROWS_FIRST } else { ROWS_NEXT };
                let rows = self.index.extents(stream.partition, offset, count).await;
                let mut rows = rows.map_err(|error| ReadError::Index(error.to_string()))?;
                // Rows that the index has not may be in memory: those follow without a gap.
                let partitions = self.partitions.borrow();
                let partition = &partitions.list[stream.partition_index as usize];
                if let Some(trimmed) = (offset < partition.start_offset)
                    .then_some(ReadError::Trimmed { offset, start_offset: partition.start_offset })
                {
                    return Err(trimmed);
                }
                if rows.is_empty() {
                    rows.extend(partition.tail.iter().filter(|extent| offset < extent.next_offset));
                }
                stream.rows.borrow_mut().extend(rows);
            }
        }
        let chunk_bytes_max = if self.memory.is_pressed() { CHUNK_BYTES_PRESSED } else { CHUNK_BYTES_MAX };
        let mut extents = Vec::new();
        let offsets = {
            let mut rows = stream.rows.borrow_mut();
            let end_offset = self.partitions.borrow().list[stream.partition_index as usize].end_offset;
            match rows.front().copied() {
                // Nothing is known of these messages although they were durable once.
                None => offset..end_offset,
                Some(first) if offset < first.first_offset => offset..first.first_offset,
                Some(first) => {
                    if self.is_cached(stream.partition_index, &first) {
                        rows.clear();
                        return Ok(Planned::Nothing);
                    }
                    let first_bytes = EXTENT_HEADER_BYTES as u64 + first.body_bytes as u64;
                    if !self.memory.admits(first_bytes.max(chunk_bytes_max) + 2 * ALIGNMENT as u64) {
                        return Ok(Planned::NoRoom);
                    }
                    let mut next_offset = first.first_offset;
                    let mut end = first.position;
                    while let Some(row) = rows.front().copied() {
                        let row_end = row.position + EXTENT_HEADER_BYTES as u64 + row.body_bytes as u64;
                        let joins = row.first_offset == next_offset
                            && (row.store, row.segment) == (first.store, first.segment)
                            && end <= row.position
                            && row.position - end <= GAP_BYTES_MAX
                            && row_end - first.position <= chunk_bytes_max
                            && !self.is_cached(stream.partition_index, &row);
                        if !(joins || extents.is_empty()) {
                            break;
                        }
                        extents.push(row);
                        (next_offset, end) = (row.next_offset, row_end);
                        rows.pop_front();
                    }
                    first.first_offset..next_offset
                }
            }
        };
        let span = extents.first().zip(extents.last()).map(|(first, last): (&ExtentRow, &ExtentRow)| {
            let start = first.position & !(ALIGNMENT as u64 - 1);
            let end = last.position + EXTENT_HEADER_BYTES as u64 + last.body_bytes as u64;
            start..end.next_multiple_of(ALIGNMENT as u64)
        });
        let bytes = span.as_ref().map_or(0, |span| span.end - span.start);
        if span.is_none() {
            self.report_hole(stream.partition, offsets.start, None, FoundBy::Read).await;
        }
        self.make_room(self.staging.borrow().memory_bytes(), bytes);
        let charge = self.memory.charge(bytes);
        let budget = self.backlog.bytes.clone();
        budget.set(budget.get() + bytes);
        let state = match &span {
            Some(_) => ChunkState::Reading,
            None => ChunkState::Failed(ReadError::Damaged { range: offsets.clone() }),
        };
        let chunk = Rc::new(Chunk { offsets, bytes, state: RefCell::new(state), ready: Broadcast::default(), budget });
        stream.next_offset.set(chunk.offsets.end);
        stream.chunks.borrow_mut().push_back(chunk.clone());
        if let Some(span) = span {
            let (inner, partition) = (self.clone(), stream.partition);
            self.io.spawn(async move {
                let state = inner.fetch(partition, &extents, span, charge).await.unwrap_or_else(ChunkState::Failed);
                *chunk.state.borrow_mut() = state;
                chunk.ready.notify_all();
            });
        }
        Ok(Planned::Chunk)
    }

    /// Whether memory serves it. Blocks of compacted segments and of other stores are numbered on their own and never in
    /// the cache; and a block may be there for other partitions alone, when this one has had its share of the cache.
    fn is_cached(&self, partition_index: u32, row: &ExtentRow) -> bool {
        row.store.is_none()
            && self.journal.is_journal(row.segment)
            && self.cache.borrow().get(row.block_sequence).is_some()
            && self.partitions.borrow().list[partition_index as usize].find(row.first_offset).is_some()
    }

    /// Whether a reader that planned with this row would have to ask again.
    #[cfg(test)]
    pub(crate) async fn has_moved(&self, partition: PartitionId, row: ExtentRow) -> bool {
        let start = row.position & !(ALIGNMENT as u64 - 1);
        let end = row.position + EXTENT_HEADER_BYTES as u64 + row.body_bytes as u64;
        let span = start..end.next_multiple_of(ALIGNMENT as u64);
        let charge = self.memory.charge(span.end - span.start);
        let fetched = self.fetch(partition, &[row], span, charge).await;
        matches!(fetched, Ok(ChunkState::Moved))
    }

    /// Reads extents that lie within `span` of one segment and checks that they are what was asked for.
    async fn fetch(
        &self,
        partition: PartitionId,
        extents: &[ExtentRow],
        span: Range<u64>,
        charge: Charge,
    ) -> Result<ChunkState, ReadError> {
        let segment = extents[0].segment;
        let generation = self.generation_of(&extents[0]);
        let failed = |error: std::io::Error| ReadError::Io { segment: segment.0, message: error.to_string() };
        let span_bytes = (span.end - span.start) as usize;
        let mut verify = self.config.verify_reads;
        let memory: Rc<dyn RunMemory> = match self.file_of(&extents[0]).await {
            Ok(file) => match file.read_at(span.start, span_bytes).await {
                Ok(read) => Rc::new(Charged::new(read, charge)),
                Err(error) if is_unreadable(&error) => {
                    // What can be read of it is served. The rest is zeros, which no checksum lets pass.
                    verify = true;
                    let pages = read_pages(&*file, span.start, span_bytes).await.map_err(failed)?;
                    Rc::new(Charged::new(pages, charge))
                }
                Err(error) => return Err(failed(error)),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Rc::new(Charged::new(Vec::new(), charge)),
            Err(error) => return Err(failed(error)),
        };
        if generation != self.generation_of(&extents[0]) {
            // Nothing is live in a segment that is used again, and what was read may be new in part.
            return Ok(ChunkState::Moved);
        }
        let read = memory.bytes();
        let mut figures = self.figures.get();
        figures.disk_read_bytes += read.len() as u64;
        self.figures.set(figures);
        let mut pieces = Vec::with_capacity(extents.len());
        for row in extents {
            let first = pieces.len();
            good_pieces(partition, row, read, (row.position - span.start) as usize, verify, &mut pieces);
            let missing = missing(row, &pieces[first..]);
            if !missing.is_empty() && !self.report(partition, row, &missing, FoundBy::Read).await {
                return Ok(ChunkState::Moved);
            }
        }
        Ok(ChunkState::Ready { memory, pieces })
    }
}

/// Whether the disk says that it has lost what is there, as against not answering at all.
pub(crate) fn is_unreadable(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::ENODATA | libc::EILSEQ))
}

/// Reads page by page what could not be read at once, with zeros for pages that are lost.
pub(crate) async fn read_pages<F: File>(file: &F, start: u64, bytes: usize) -> std::io::Result<Vec<u8>> {
    let mut out = vec![0; bytes];
    for (index, page) in out.chunks_mut(ALIGNMENT).enumerate() {
        match file.read_at(start + (index * ALIGNMENT) as u64, ALIGNMENT).await {
            Ok(read) => {
                let have = read.len().min(page.len());
                page[..have].copy_from_slice(&read[..have]);
            }
            Err(error) if is_unreadable(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(out)
}

/// Appends the good batches of the extent that should be at `start` of `memory`: one piece when all is well, one between
/// any two bad places otherwise. Without `verify` the extent's header alone is compared.
pub(crate) fn good_pieces(
    partition: PartitionId,
    row: &ExtentRow,
    memory: &[u8],
    start: usize,
    verify: bool,
    pieces: &mut Vec<Piece>,
) {
    let body_start = start + EXTENT_HEADER_BYTES;
    let body = body_start..body_start + row.body_bytes as usize;
    let found = memory.get(start..body_start).and_then(|head| block::extent_header(head).ok());
    let found = found.filter(|header| row.describes(partition, header));
    let (Some(header), Some(bytes)) = (found, memory.get(body.clone())) else { return };
    if !verify {
        pieces.push(Piece { offsets: row.first_offset..row.next_offset, bytes: body });
        return;
    }
    let mut piece: Option<Piece> = None;
    block::check_batches(&header, bytes, |batch, position| {
        let offsets = batch.base_offset..batch.base_offset + batch.record_count as u64;
        let start = body_start + position;
        let end = start + drava_protocol::frame::padded(batch.batch_bytes as usize);
        match &mut piece {
            Some(piece) if piece.offsets.end == offsets.start && piece.bytes.end == start => {
                piece.offsets.end = offsets.end;
                piece.bytes.end = end;
            }
            _ => pieces.extend(piece.replace(Piece { offsets, bytes: start..end })),
        }
    });
    pieces.extend(piece);
}

/// The messages of an extent that none of its pieces has.
pub(crate) fn missing(row: &ExtentRow, pieces: &[Piece]) -> Vec<Range<u64>> {
    let mut missing = Vec::new();
    let mut next_offset = row.first_offset;
    for piece in pieces {
        if next_offset < piece.offsets.start {
            missing.push(next_offset..piece.offsets.start);
        }
        next_offset = piece.offsets.end;
    }
    if next_offset < row.next_offset {
        missing.push(next_offset..row.next_offset);
    }
    missing
}

/// Appends what the pieces have from `offset` on.
fn serve(
    memory: &Rc<dyn RunMemory>,
    pieces: &[Piece],
    chunk: &Range<u64>,
    mut offset: u64,
    bytes_max: usize,
    out: &mut Vec<Run>,
) -> Result<u64, ReadError> {
    let mut left = bytes_max;
    let first = pieces.partition_point(|piece| piece.offsets.end <= offset);
    let mut served = false;
    for piece in &pieces[first..] {
        if !piece.offsets.contains(&offset) {
            break;
        }
        let bytes = &memory.bytes()[piece.bytes.clone()];
        let Some(cut) = block::cut(bytes, piece.offsets.clone(), offset, left) else { break };
        let run_bytes = cut.end - cut.start;
        if served && left < run_bytes {
            break;
        }
        let place = piece.bytes.start + cut.start..piece.bytes.start + cut.end;
        out.push(Run::new(memory.clone(), place, cut.first_offset..cut.next_offset));
        served = true;
        left = left.saturating_sub(run_bytes);
        offset = cut.next_offset;
        if left == 0 {
            break;
        }
    }
    if served {
        return Ok(offset);
    }
    let next = pieces.get(first).map_or(chunk.end, |piece| piece.offsets.start.max(offset + 1));
    Err(ReadError::Damaged { range: offset..next })
}
