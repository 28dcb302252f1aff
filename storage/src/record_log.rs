//! A log of records on the journal, without an index: for the metadata group.
//!
//! Records are numbered from 1 without a gap. Whoever appends while a write is in flight shares the next one. All is
//! read back at open, so the log is kept short with [`RecordLog::trim`]: every block repeats where the log starts, so
//! that the start is on disk before a segment in front of it is used again.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use drava_protocol::{LedgerId, PartitionId, ShardId};
use drava_runtime::local::{Notify, OneshotSender, oneshot};

use crate::block::{BLOCK_BYTES_MAX, BlockWriter, EXTENT_HEADER_BYTES, ExtentHeader, ExtentKind, HEADER_BYTES};
use crate::index::Trim;
use crate::io::{ALIGNMENT, Io};
use crate::journal::{Journal, JournalConfig};
use crate::memory::Memory;
use crate::pool::{self, BufferPool};
use crate::recovery::{self, Visited, Visitor, open_error};
use crate::segment::{self, SegmentId};
use crate::state::RowChange;
use crate::store::{FlushError, OpenError};

/// Appends share a block up to this size.
const BLOCK_BYTES_SHARED: usize = 1 << 20;
const POOL_FREE_BYTES_MAX: usize = 1 << 20;
const RECORD_HEADER_BYTES: usize = 8;
/// Written where a shard's journal has the shard.
pub(crate) const SHARD: ShardId = ShardId(u16::MAX);
/// All records belong to one ledger.
const LEDGER: LedgerId = LedgerId { partition: PartitionId(0), sequence: 0 };

#[derive(Clone, Debug)]
pub struct RecordLogConfig {
    pub segment_bytes: u64,
    /// No new segments are made when the file system has less than this free.
    pub disk_reserve_bytes: u64,
}

impl Default for RecordLogConfig {
    fn default() -> Self {
        RecordLogConfig { segment_bytes: 4 << 20, disk_reserve_bytes: 0 }
    }
}

/// The number of a record: 1 is the first that the log ever had, the next is one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordPosition(pub u64);

impl RecordPosition {
    /// The position of the `count`th record after this one.
    pub fn after(self, count: u64) -> RecordPosition {
        RecordPosition(self.0 + count)
    }
}

/// The log. Clones share it.
pub struct RecordLog<I: Io>(Rc<Inner<I>>);

impl<I: Io> Clone for RecordLog<I> {
    fn clone(&self) -> Self {
        RecordLog(self.0.clone())
    }
}

struct Inner<I: Io> {
    journal: Rc<Journal<I, Written<I>>>,
    pool: BufferPool<I>,
    config: RecordLogConfig,
    dir: PathBuf,
    staged: RefCell<VecDeque<Append>>,
    next_record: Cell<u64>,
    /// The log starts here; what is asked, and what is durable.
    start_wanted: Cell<u64>,
    start: Cell<u64>,
    /// Block sequence and last record of each block, oldest first.
    blocks: RefCell<VecDeque<(u64, u64)>>,
    woken: Rc<Notify>,
    stopped: Cell<bool>,
}

struct Append {
    first_record: u64,
    records: Vec<Vec<u8>>,
    done: OneshotSender<Result<(), FlushError>>,
}

/// A block in flight.
struct Written<I: Io> {
    appends: Vec<Append>,
    buffer: Rc<I::Buffer>,
    last_record: u64,
    start: u64,
}

impl<I: Io> RecordLog<I> {
    /// Opens or makes the log in `dir` and reads all of its records, with their positions.
    ///
    /// Errors: a damaged log is not opened, for what is missing from it was promised to somebody.
    pub async fn open(
        io: I,
        dir: &Path,
        config: RecordLogConfig,
    ) -> Result<(RecordLog<I>, Vec<(RecordPosition, Vec<u8>)>), OpenError> {
        let mut segments = recovery::survey(&io, dir, SHARD, &|_| None).await?;
        let mut found = Found { next_record: 1, start: 1, ..Found::default() };
        let replayed = recovery::replay(&io, dir, SHARD, &mut segments, None, &mut found).await?;
        let Found { mut records, blocks, live, start, mut next_record, gap } = found;
        if let Some(damaged) = replayed.damaged.first() {
            let path = segment::path(dir, SegmentId(damaged.segment));
            let reason = format!("damaged from {} to {}", damaged.start_position, damaged.end_position);
            return Err(OpenError::Segment { path, reason });
        }
        next_record = next_record.max(start);
        records.retain(|(position, _)| start <= position.0);
        let first = records.first().map_or(next_record, |(position, _)| position.0);
        if let Some((expected, found)) =
            gap.filter(|(_, found)| start < *found).or((first != start).then_some((start, first)))
        {
            let reason = format!("record {expected} should follow, {found} does");
            return Err(OpenError::Segment { path: dir.to_owned(), reason });
        }
        for id in live {
            if let Some(segment) = segments[id.0 as usize].as_mut() {
                segment.live_bytes += 1;
            }
        }
        let end = replayed.end.unwrap_or_default();
        let woken = Rc::new(Notify::default());
        let journal_config = JournalConfig {
            dir: dir.to_owned(),
            shard: SHARD,
            segment_bytes: config.segment_bytes,
            segments_spare: 0,
            disk_reserve_bytes: config.disk_reserve_bytes,
        };
        let journal = Rc::new(Journal::new(io.clone(), journal_config, segments, Some(end), woken.clone()));
        if !journal.has_segment() {
            journal.prepare().await.map_err(open_error("make the first segment of the log"))?;
        }
        let inner = Rc::new(Inner {
            journal: journal.clone(),
            pool: BufferPool::new(io.clone(), POOL_FREE_BYTES_MAX, Rc::new(Memory::new(u64::MAX))),
            config,
            dir: dir.to_owned(),
            staged: RefCell::default(),
            next_record: Cell::new(next_record),
            start_wanted: Cell::new(start),
            start: Cell::new(start),
            blocks: RefCell::new(blocks),
            woken,
            stopped: Cell::new(false),
        });
        inner.release();
        io.spawn(journal.run());
        io.spawn(inner.clone().run());
        Ok((RecordLog(inner), records))
    }

    /// Appends records side by side; durable when it returns. Returns the position of the first.
    ///
    /// Appends are durable in the order of the calls. Errors: `TooLarge`, `Full`; after any other nothing is appended
    /// any more.
    pub async fn append(&self, records: Vec<Vec<u8>>) -> Result<RecordPosition, FlushError> {
        let inner = &self.0;
        if let Some(error) = inner.journal.failed() {
            return Err(error);
        }
        if inner.stopped.get() {
            return Err(FlushError::Stopped);
        }
        let first_record = inner.next_record.get();
        if records.is_empty() {
            return Ok(RecordPosition(first_record));
        }
        let bytes = pool::class_bytes(block_bytes(records.iter().map(|record| record_bytes(record)).sum()));
        let limit_bytes = (inner.config.segment_bytes - segment::HEADER_BYTES).min(BLOCK_BYTES_MAX as u64);
        if limit_bytes < bytes as u64 {
            return Err(FlushError::TooLarge { bytes: bytes as u64, limit_bytes });
        }
        if !inner.journal.has_room(bytes as u64) {
            return Err(FlushError::Full);
        }
        let (done, written) = oneshot();
        inner.next_record.set(first_record + records.len() as u64);
        inner.staged.borrow_mut().push_back(Append { first_record, records, done });
        inner.woken.notify();
        written.await.unwrap_or(Err(FlushError::Stopped))?;
        Ok(RecordPosition(first_record))
    }

    /// Records before this one are not needed any more. Takes effect in the background; the log starts at `before` or
    /// earlier when it is opened again.
    pub fn trim(&self, before: RecordPosition) {
        let inner = &self.0;
        assert!(before.0 <= inner.next_record.get(), "trim to {before:?}, next is {}", inner.next_record.get());
        if inner.start_wanted.get() < before.0 {
            inner.start_wanted.set(before.0);
            inner.woken.notify();
        }
    }

    /// The position that the next record gets.
    pub fn next_position(&self) -> RecordPosition {
        RecordPosition(self.0.next_record.get())
    }

    /// Ends the background work. What was not durable by then fails.
    pub async fn close(&self) {
        let inner = &self.0;
        inner.stopped.set(true);
        inner.journal.fail(FlushError::Stopped);
        inner.journal.stop();
        inner.journal.quiesced().await;
    }
}

/// What the blocks of a log hold.
#[derive(Default)]
struct Found {
    records: Vec<(RecordPosition, Vec<u8>)>,
    blocks: VecDeque<(u64, u64)>,
    /// The segment of each block.
    live: Vec<SegmentId>,
    start: u64,
    next_record: u64,
    /// The record that should have come, and the one that did.
    gap: Option<(u64, u64)>,
}

impl Visitor for Found {
    fn block(&mut self, block: &Visited<'_>) {
        self.live.push(block.segment);
        for extent in block.extents {
            let body = extent.body(block.bytes);
            match extent.header.kind {
                ExtentKind::Records => {
                    let first = extent.header.first_entry;
                    if first != self.next_record && !self.blocks.is_empty() {
                        self.gap = Some((self.next_record, first));
                    }
                    self.records.extend((first..).map(RecordPosition).zip(decode_records(body)));
                    self.next_record = first + extent.header.entry_count as u64;
                }
                ExtentKind::State => RowChange::decode_all(LEDGER.partition, body, |change| {
                    if let RowChange::Trim(trim) = change {
                        self.start = self.start.max(trim.start_offset);
                    }
                }),
                ExtentKind::Data => {}
            }
        }
        self.blocks.push_back((block.header.id.sequence, self.next_record - 1));
    }

    fn lost(&mut self, _extent: &ExtentHeader) {
        // A damaged log is not opened at all.
    }

    fn may_be_gone(&self) -> u64 {
        // Behind the start the numbers of the records tell.
        u64::MAX
    }
}

impl<I: Io> Inner<I> {
    async fn run(self: Rc<Self>) {
        loop {
            self.woken.notified().await;
            while let Some(completed) = self.journal.completed() {
                match completed {
                    Ok(completed) => {
                        let Written { appends, buffer, last_record, start } = completed.payload;
                        self.pool.give(buffer);
                        self.journal.add_live(completed.placement.segment, 1);
                        self.blocks.borrow_mut().push_back((completed.placement.id.sequence, last_record));
                        if self.start.get() < start {
                            self.start.set(start);
                            self.release();
                        }
                        appends.into_iter().for_each(|append| append.done.send(Ok(())));
                    }
                    Err((error, written)) => {
                        tracing::error!(dir = %self.dir.display(), error = %error, "a write to the log failed");
                        written.appends.into_iter().for_each(|append| append.done.send(Err(error.clone())));
                    }
                }
            }
            if let Some(error) = self.journal.failed() {
                let staged = self.staged.take();
                staged.into_iter().for_each(|append| append.done.send(Err(error.clone())));
                if self.stopped.get() {
                    break;
                }
                continue;
            }
            self.start_flush();
        }
    }

    /// Writes what is staged if nothing is in flight.
    fn start_flush(&self) {
        let start = self.start_wanted.get();
        let mut staged = self.staged.borrow_mut();
        if 0 < self.journal.in_flight() || (staged.is_empty() && start == self.start.get()) {
            return;
        }
        let mut count = 0;
        let mut body_bytes = 0;
        for append in staged.iter() {
            let bytes: usize = append.records.iter().map(|record| record_bytes(record)).sum();
            if 0 < count && self.shared_bytes_max() < body_bytes + bytes {
                break;
            }
            body_bytes += bytes;
            count += 1;
        }
        let bytes = pool::class_bytes(block_bytes(body_bytes));
        let Some(placement) = self.journal.place(bytes as u64) else { return };
        let appends: Vec<Append> = staged.drain(..count).collect();
        drop(staged);
        let mut buffer = self.pool.take_exact(bytes);
        let out = Rc::get_mut(&mut buffer).expect("the pool gives what nobody else holds").as_mut();
        let mut writer = BlockWriter::new(out, placement.id.sequence);
        let trim = RowChange::Trim(Trim { partition: LEDGER.partition, first_ledger: 0, start_offset: start });
        let extent = |kind, first_entry, entry_count, body_bytes: usize| ExtentHeader {
            kind,
            body_bytes: body_bytes as u32,
            ledger: LEDGER,
            first_entry,
            entry_count,
            base_offset: 0,
            record_count: 0,
            max_append_time_ms: 0,
            block_sequence: 0,
        };
        writer.extent(&extent(ExtentKind::State, 0, 1, trim.encoded_bytes()));
        let mut row = Vec::new();
        trim.encode(&mut row);
        writer.checked(&row);
        let mut last_record = self.blocks.borrow().back().map_or(start - 1, |(_, last)| *last);
        if let Some(first) = appends.first().map(|append| append.first_record) {
            let records: usize = appends.iter().map(|append| append.records.len()).sum();
            writer.extent(&extent(ExtentKind::Records, first, records as u32, body_bytes));
            for record in appends.iter().flat_map(|append| &append.records) {
                row.clear();
                row.extend_from_slice(&(record.len() as u32).to_le_bytes());
                row.extend_from_slice(&[0; 4]);
                row.extend_from_slice(record);
                row.resize(record_bytes(record), 0);
                writer.checked(&row);
            }
            last_record = first + records as u64 - 1;
        }
        let crc = writer.finish(&placement.id);
        self.journal.write(placement, buffer.clone(), crc, Written { appends, buffer, last_record, start });
    }

    /// What appends may share: a block that surely fits into a segment.
    fn shared_bytes_max(&self) -> usize {
        BLOCK_BYTES_SHARED.min(self.config.segment_bytes as usize / 2)
    }

    /// Lets segments go that hold nothing from the start on.
    fn release(&self) {
        let mut blocks = self.blocks.borrow_mut();
        let mut released = None;
        while let Some(&(sequence, last_record)) = blocks.front() {
            // The last block says where the log goes on.
            if self.start.get() <= last_record || blocks.len() == 1 {
                break;
            }
            released = Some(sequence);
            blocks.pop_front();
        }
        if let Some(sequence) = released {
            self.journal.release_through(sequence);
            self.journal.set_covered(sequence);
        }
    }
}

pub(crate) fn record_bytes(record: &[u8]) -> usize {
    (RECORD_HEADER_BYTES + record.len()).next_multiple_of(16)
}

/// The block that holds records of `body_bytes`.
fn block_bytes(body_bytes: usize) -> usize {
    (HEADER_BYTES + 2 * EXTENT_HEADER_BYTES + 32 + body_bytes).next_multiple_of(ALIGNMENT)
}

pub(crate) fn decode_records(body: &[u8]) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    let mut rest = body;
    while let Some((head, after)) = rest.split_first_chunk::<RECORD_HEADER_BYTES>() {
        let bytes = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some(record) = after.get(..bytes) else { break };
        records.push(record.to_vec());
        rest = rest.get(record_bytes(record)..).unwrap_or_default();
    }
    records
}
