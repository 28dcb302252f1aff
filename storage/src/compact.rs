//! Compaction: live extents are brought together in segments of their own, so that the room between them comes back and
//! catching up reads long stretches.
//!
//! Two things make segments victims. **Garbage**: most of what they hold is dead. **Fragments**: they hold so many
//! partitions that a reader of one has to jump about. A pass over some victims:
//!
//! 1. The index is scanned for their live extents, in its own order: by partition, then by offset. As many as memory
//!    allows are a [`window`], which is read in the order of the disk, with long reads.
//! 2. In the order of the index again checksums are compared, and neighbours of one ledger joined. What does not verify
//!    stays where it is, and so does its segment.
//! 3. Blocks are written to a compacted segment, and synced some MiB at a time.
//! 4. Of what is durable the index learns the new places, in a batch that moves an extent only where its row is still the
//!    one that was copied: what was deleted meanwhile stays deleted.
//! 5. That batch is made durable. Only then the old extents count as dead, and their segments may be used again.
//!
//! A crash before 5 finds the old places in the index or the new ones, and both whole. Readers that planned with an old
//! row find another use of its segment, or other bytes, and ask the index again (`backlog`).
//!
//! All of it yields: one small piece of IO at a time, under a budget, and not while the flusher waits for the disk.

mod window;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::{PartitionId, ShardId, batch};

use crate::backlog::GAP_BYTES_MAX;
use crate::block::{self, BlockId, BlockWriter, EXTENT_HEADER_BYTES, ExtentHeader};
use crate::budget::Budget;
use crate::damage::FoundBy;
use crate::flush::HOUSEKEEPING;
use crate::index::{ExtentKey, ExtentRow, IndexError, Move, MoveBatch, Scanned};
use crate::io::{ALIGNMENT, Io};
use crate::journal::SealedSegment;
use crate::segment::{self, SegmentId, SegmentKind};
use crate::store::Inner;
use window::Window;

/// Written at a time: a write of the journal that comes next waits for no more than this.
const IO_BYTES_MAX: usize = 64 << 10;
/// Synced at a time. Each sync empties the cache of the disk, and the less is in it the sooner that is done.
const SYNC_BYTES: u64 = 4 << 20;
/// What may be read or written at once after a while without.
const BURST_BYTES: u64 = 1 << 20;
/// What compaction writes, unless a single extent is larger: as much as a reader of the backlog fetches at once, and
/// little enough that the rest of a segment is not left empty for the sake of a block.
const BLOCK_BYTES_MAX: u64 = 1 << 20;
const SEGMENT_BLOCKS_MIN: u64 = 8;
/// Old rows that one index batch replaces; bounds memory and how long the index is busy with it.
const MOVED_ROWS_MAX: usize = 8192;
/// Victims of one pass. Each partition's extents in all of them become contiguous.
const VICTIMS_MAX: usize = 8;
const VICTIM_BYTES_MAX: u64 = 512 << 20;
/// What a pass copies, in windows. The victims are read once for each: twice as many make the runs of a partition twice as
/// long, and cost two times the reads for each byte.
const PASS_WINDOWS: u64 = 2;
/// A pass over garbage must win at least this many segments.
const GAIN_SEGMENTS_MIN: u64 = 2;
/// A disk that takes longer for a write of the journal is left alone,
const LATE: Duration = Duration::from_millis(5);
/// for this long at a time,
const PAUSE: Duration = Duration::from_millis(5);
/// and for so many pauses: under a load that never ends compaction goes on, slowly.
const PAUSES_MAX: u32 = 20;
/// A journal that was not written for so long is quiet: fewer fragments are worth a pass.
const QUIET: Duration = Duration::from_secs(10);
/// Looking at all rows of the index takes at most one part in so many of the time.
const CENSUS_SHARE: u32 = 20;
/// Behind each piece of a scan the index rests so many times as long, while the journal is not quiet: a core that goes
/// through rows is not there for those who publish.
const SCAN_RESTS: u32 = 3;
const SCAN_REST_MAX: Duration = Duration::from_millis(20);

/// Compaction of one store: what it may take, and what it found out.
#[derive(Debug)]
pub(crate) struct Compactor {
    budget: Budget,
    /// For what is written: a window that was read in time is not written at once.
    write_budget: Budget,
    /// Segments by generation that are not fragmented, and those with damage in them: neither is looked at again.
    judged: RefCell<BTreeMap<SegmentId, u64>>,
    damaged: RefCell<BTreeMap<SegmentId, u64>>,
    running: Cell<bool>,
    census_at: Cell<Duration>,
    figures: Cell<CompactionFigures>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CompactionFigures {
    pub(crate) compacted_bytes: u64,
    pub(crate) compactions: u64,
    pub(crate) dropped_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum CompactError {
    #[error("read of segment {segment}")]
    Read {
        segment: u32,
        #[source]
        source: io::Error,
    },
    #[error("write to compacted segment {segment}")]
    Write {
        segment: u32,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("there is no room for a compacted segment")]
    NoRoom,
    #[error("the store is closed")]
    Stopped,
}

/// What a census found in one segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Found {
    live_bytes: u64,
    /// Reads that it takes to catch up with all that is live in it.
    reads: u64,
    /// Live bytes that retention takes soon.
    doomed_bytes: u64,
}

impl Found {
    /// Moving it is worth the while: most of it will still be there for as long as it has been.
    fn lasts(&self) -> bool {
        0 < self.live_bytes && 2 * self.doomed_bytes <= self.live_bytes
    }
}

impl Compactor {
    pub(crate) fn new(bytes_per_s: u64) -> Compactor {
        Compactor {
            budget: Budget::new(bytes_per_s, BURST_BYTES),
            write_budget: Budget::new(bytes_per_s, BURST_BYTES),
            judged: RefCell::default(),
            damaged: RefCell::default(),
            running: Cell::new(false),
            census_at: Cell::default(),
            figures: Cell::default(),
        }
    }

    pub(crate) fn figures(&self) -> CompactionFigures {
        self.figures.get()
    }

    fn count(&self, change: impl FnOnce(&mut CompactionFigures)) {
        let mut figures = self.figures.get();
        change(&mut figures);
        self.figures.set(figures);
    }
}

impl<I: Io, T: 'static> Inner<I, T> {
    /// Looks from time to time whether anything is worth compacting.
    pub(crate) async fn run_compactor(self: Rc<Self>) {
        if self.compactor.budget.is_off() {
            return;
        }
        let mut looked_at = self.io.now();
        while !self.stopped.get() {
            self.io.sleep(HOUSEKEEPING).await;
            let now = self.io.now();
            if now < looked_at + self.config.compaction_interval || now < self.compactor.census_at.get() {
                continue;
            }
            looked_at = now;
            match self.compact(self.is_quiet()).await {
                Ok(_) | Err(CompactError::Stopped) => {}
                Err(error) if self.stopped.get() => tracing::debug!(error = %error, "compaction ended with the store"),
                Err(error) => {
                    let source = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(shard = self.config.shard.0, error = %error, source, "compaction gave up for now");
                }
            }
        }
    }

    /// Compacts what is due, and says whether there was anything. One at a time: `false` while another runs.
    ///
    /// `quiet`: there is time for what is hardly worth it.
    pub(crate) async fn compact(&self, quiet: bool) -> Result<bool, CompactError> {
        if self.compactor.budget.is_off() || self.compactor.running.replace(true) {
            return Ok(false);
        }
        let compacted = self.compact_due(quiet).await;
        self.compactor.running.set(false);
        compacted
    }

    async fn compact_due(&self, quiet: bool) -> Result<bool, CompactError> {
        let candidates = self.compaction_candidates();
        if !self.is_worth_a_census(&candidates, quiet) {
            return Ok(false);
        }
        let (census, took) = self.census().await?;
        self.compactor.census_at.set(self.io.now() + took * CENSUS_SHARE);
        let found = |segment: &SealedSegment| census.get(&segment.id).copied().unwrap_or_default();

        let garbage = choose_garbage(&candidates, found, self.config.compaction_garbage_percent, self.pass_bytes_max());
        let left = |segment: &&SealedSegment| !garbage.contains(&segment.id);
        let left: Vec<_> = candidates.iter().filter(left).copied().collect();
        let mut fragmented = Vec::new();
        for segment in left.iter().filter(|segment| segment.kind == SegmentKind::Journal) {
            let found = found(segment);
            if found.lasts() && found.live_bytes < found.reads * self.config.compaction_fragment_bytes {
                fragmented.push(*segment);
            } else {
                self.compactor.judged.borrow_mut().insert(segment.id, segment.generation);
            }
        }
        let mut passes: Vec<_> = fragment_passes(&fragmented, quiet, self.pass_bytes_max());
        if !garbage.is_empty() {
            passes.insert(0, garbage);
        }
        let is_same = |id: &SegmentId| {
            let chosen = candidates.iter().find(|segment| segment.id == *id);
            chosen.is_some_and(|segment| self.journal.generation(*id) == Some(segment.generation))
        };
        for victims in &mut passes {
            // While others were compacted these may have died and be used again.
            victims.retain(is_same);
            Pass::new(self, victims).run().await?;
        }
        Ok(!passes.is_empty())
    }

    /// Sealed segments behind the cache: what is in it needs no disk, and much of it may be dead before it leaves.
    fn compaction_candidates(&self) -> Vec<SealedSegment> {
        let mut found = self.journal.sealed_before(self.cache.borrow().first_sequence());
        let damaged = self.compactor.damaged.borrow();
        found.retain(|segment| damaged.get(&segment.id) != Some(&segment.generation));
        found
    }

    /// Segments of the journal behind the cache that are fragmented, as far as anybody has looked at them: all others wait
    /// for that.
    pub(crate) fn fragmented_segments(&self) -> u64 {
        if self.compactor.budget.is_off() {
            return 0;
        }
        let (judged, damaged) = (self.compactor.judged.borrow(), self.compactor.damaged.borrow());
        let sealed = self.journal.live_journal_before(self.cache.borrow().first_sequence());
        let waits = |(id, generation): &&(SegmentId, u64)| {
            judged.get(id) != Some(generation) && damaged.get(id) != Some(generation)
        };
        sealed.iter().filter(waits).count() as u64
    }

    /// What a pass may copy.
    fn pass_bytes_max(&self) -> u64 {
        (PASS_WINDOWS * self.memory.window_bytes_max()).min(VICTIM_BYTES_MAX)
    }

    /// What a window may take now, when the cache has let go of all it has.
    fn window_bytes_max(&self) -> u64 {
        let cached = self.cache.borrow().block_bytes();
        self.memory.window_bytes_left(self.staging.borrow().memory_bytes(), cached)
    }

    fn is_quiet(&self) -> bool {
        self.journal.written_at() + QUIET <= self.io.now()
    }

    /// What can be known without the rows of the index.
    fn is_worth_a_census(&self, candidates: &[SealedSegment], quiet: bool) -> bool {
        let as_counted = |segment: &SealedSegment| Found { live_bytes: segment.live_bytes, ..Found::default() };
        let percent = self.config.compaction_garbage_percent;
        let garbage = !choose_garbage(candidates, as_counted, percent, self.pass_bytes_max()).is_empty();
        let judged = self.compactor.judged.borrow();
        let unjudged = candidates
            .iter()
            .filter(|segment| {
                segment.kind == SegmentKind::Journal && judged.get(&segment.id) != Some(&segment.generation)
            })
            .count();
        garbage || if quiet { 0 < unjudged } else { VICTIMS_MAX <= unjudged }
    }

    /// The next rows of the index, and how long that took. Rests while others have work.
    async fn scan(
        &self,
        from: ExtentKey,
        segments: Option<Vec<SegmentId>>,
    ) -> Result<(Scanned, Duration), CompactError> {
        let began = self.io.now();
        let scanned = self.index.scan(from, segments).await?;
        let took = self.io.now().saturating_sub(began);
        if !self.is_quiet() {
            self.io.sleep((took * SCAN_RESTS).min(SCAN_REST_MAX)).await;
        }
        Ok((scanned, took))
    }

    /// Looks at every row of the index once; returns how long that took without the rests.
    async fn census(&self) -> Result<(BTreeMap<SegmentId, Found>, Duration), CompactError> {
        let now_ms = self.io.wall_clock_ms();
        let mut census: BTreeMap<SegmentId, Found> = BTreeMap::new();
        let mut last: Option<(PartitionId, ExtentRow)> = None;
        // Of the last row's ledger.
        let mut doomed = false;
        let mut all_took = Duration::ZERO;
        let mut from = Some(FIRST);
        while let Some(key) = from {
            if self.stopped.get() {
                return Err(CompactError::Stopped);
            }
            let (scanned, took) = self.scan(key, None).await?;
            all_took += took;
            for (partition, row) in scanned.rows {
                if last.is_none_or(|(id, last)| id != partition || last.ledger != row.ledger) {
                    doomed = self.is_doomed(partition, row.ledger, now_ms);
                }
                let joins = last.is_some_and(|(id, last)| id == partition && reads_on(&last, &row));
                let found = census.entry(row.segment).or_default();
                found.live_bytes += row.body_bytes as u64;
                found.reads += u64::from(!joins);
                found.doomed_bytes += if doomed { row.body_bytes as u64 } else { 0 };
                last = Some((partition, row));
            }
            from = scanned.next;
            self.io.yield_if_needed().await;
        }
        Ok((census, all_took))
    }

    fn is_doomed(&self, partition: PartitionId, ledger: u32, now_ms: u64) -> bool {
        let partitions = self.partitions.borrow();
        let Some(&slot) = partitions.by_id.get(&partition) else { return true };
        let partition = &partitions.list[slot as usize];
        partition.ledgers.is_doomed(ledger, now_ms, &partition.limits, partition.floor)
    }

    /// Takes from the budget, and lets the flusher go first.
    async fn give_way(&self, bytes: u64) -> Result<(), CompactError> {
        self.compactor.budget.take(&self.io, bytes).await;
        for _ in 0..PAUSES_MAX {
            if !self.journal.is_late(LATE) || self.stopped.get() {
                break;
            }
            self.io.sleep(PAUSE).await;
        }
        self.io.yield_if_needed().await;
        if self.stopped.get() { Err(CompactError::Stopped) } else { Ok(()) }
    }

    /// The extents up to `next_offset` lie somewhere else now.
    fn forget_places(&self, partition: PartitionId, next_offset: u64) {
        let mut partitions = self.partitions.borrow_mut();
        let Some(&slot) = partitions.by_id.get(&partition) else { return };
        partitions.list[slot as usize].forget_tail(next_offset);
        self.backlog.forget_rows(slot);
    }
}

/// Where a scan of all extents starts.
const FIRST: ExtentKey = (PartitionId(0), 0);

/// Whether a reader of the backlog gets `row` with the read that gets the extent before it.
fn reads_on(before: &ExtentRow, row: &ExtentRow) -> bool {
    let end = before.position + EXTENT_HEADER_BYTES as u64 + before.body_bytes as u64;
    before.segment == row.segment && end <= row.position && row.position - end <= GAP_BYTES_MAX
}

/// The emptiest segments, if moving what is live in them wins enough. `found` tells what is. More than `live_bytes_max` is
/// moved only where less would not win enough.
fn choose_garbage(
    candidates: &[SealedSegment],
    found: impl Fn(&SealedSegment) -> Found,
    garbage_percent: u32,
    live_bytes_max: u64,
) -> Vec<SegmentId> {
    let mut victims: Vec<(u64, &SealedSegment)> = candidates
        .iter()
        .map(|segment| (found(segment), segment))
        .filter(|(found, segment)| {
            let dead_bytes = segment.bytes.saturating_sub(found.live_bytes);
            found.lasts() && garbage_percent as u64 * segment.bytes <= dead_bytes * 100
        })
        .map(|(found, segment)| (found.live_bytes, segment))
        .collect();
    victims.sort_unstable_by_key(|(live_bytes, segment)| (*live_bytes, segment.generation));
    victims.truncate(VICTIMS_MAX);
    let Some(segment_bytes) = victims.iter().map(|(_, segment)| segment.bytes).max() else { return Vec::new() };
    let (mut bytes, mut live_bytes, mut count) = (0, 0, 0);
    let wins = |count: u64, live_bytes: u64| live_bytes.div_ceil(segment_bytes) + GAIN_SEGMENTS_MIN <= count;
    for (live, segment) in &victims {
        bytes += segment.bytes;
        if VICTIM_BYTES_MAX < bytes || live_bytes_max < live_bytes + live && wins(count, live_bytes) {
            break;
        }
        live_bytes += live;
        count += 1;
    }
    if !wins(count, live_bytes) {
        return Vec::new();
    }
    victims[..count as usize].iter().map(|(_, segment)| segment.id).collect()
}

/// Runs of the oldest fragmented segments, of `bytes_max` each unless a single segment is larger. The last may be short, but
/// only if there is time for it.
fn fragment_passes(fragmented: &[SealedSegment], quiet: bool, bytes_max: u64) -> Vec<Vec<SegmentId>> {
    let mut passes: Vec<Vec<SegmentId>> = Vec::new();
    let mut bytes = 0;
    let is_full = |pass: &Vec<SegmentId>, bytes: u64| pass.len() == VICTIMS_MAX || bytes_max < bytes;
    for segment in fragmented {
        if passes.last().is_none_or(|pass| is_full(pass, bytes + segment.bytes)) {
            passes.push(Vec::new());
            bytes = 0;
        }
        bytes += segment.bytes;
        passes.last_mut().expect("there is one now").push(segment.id);
    }
    let next_bytes = fragmented.last().map_or(0, |segment| segment.bytes);
    let short = passes.last().is_some_and(|pass| !is_full(pass, bytes + next_bytes));
    if short && !quiet {
        passes.pop();
    }
    passes
}

/// One pass: the live extents of some segments go to new ones.
struct Pass<'a, I: Io, T: 'static> {
    inner: &'a Inner<I, T>,
    victims: Vec<SegmentId>,
    window: Window,
    /// Memory that the window has in the account of the store.
    window_bytes: u64,
    /// Read from the victims.
    read_bytes: u64,
    output: Option<Output<I::File>>,
    /// Extents of the next block. Their bodies are in `bodies`, one behind the other.
    gathered: Vec<Gathered>,
    bodies: Vec<u8>,
    block: Vec<u8>,
    /// Written, and not in the index yet.
    moves: Vec<Move>,
    moved_rows: usize,
    /// Moved in the index, and that is not durable yet.
    released: BTreeMap<SegmentId, u64>,
}

/// The segment that is being filled.
struct Output<F> {
    file: Rc<F>,
    segment: SegmentId,
    generation: u64,
    bytes: u64,
    position: u64,
    next_sequence: u64,
    previous_crc: u32,
    /// The last block that is durable.
    durable_sequence: u64,
    unsynced_bytes: u64,
}

struct Gathered {
    header: ExtentHeader,
    from: Vec<ExtentRow>,
}

impl<'a, I: Io, T: 'static> Pass<'a, I, T> {
    fn new(inner: &'a Inner<I, T>, victims: &[SegmentId]) -> Pass<'a, I, T> {
        // What dies meanwhile must not be written over while it is read.
        inner.journal.pin(victims, true);
        Pass {
            inner,
            victims: victims.to_vec(),
            window: Window::default(),
            window_bytes: 0,
            read_bytes: 0,
            output: None,
            gathered: Vec::new(),
            bodies: Vec::new(),
            block: Vec::new(),
            moves: Vec::new(),
            moved_rows: 0,
            released: BTreeMap::new(),
        }
    }

    async fn run(mut self) -> Result<(), CompactError> {
        let began = self.inner.io.now();
        let before = self.inner.compactor.figures().compacted_bytes;
        self.copy().await?;
        self.finish_output().await?;
        self.inner.compactor.count(|figures| figures.compactions += 1);
        tracing::info!(
            shard = self.inner.config.shard.0,
            segments = self.victims.len(),
            bytes = self.inner.compactor.figures().compacted_bytes - before,
            read_bytes = self.read_bytes,
            took = ?self.inner.io.now().saturating_sub(began),
            "segments were compacted"
        );
        Ok(())
    }

    /// Copies every live extent of the victims.
    async fn copy(&mut self) -> Result<(), CompactError> {
        let mut from = Some(FIRST);
        while let Some(key) = from {
            let (scanned, _) = self.inner.scan(key, Some(self.victims.clone())).await?;
            let window_bytes_max = self.inner.window_bytes_max();
            for (partition, row) in scanned.rows {
                if !self.window.has_room(&row, window_bytes_max) {
                    self.copy_window().await?;
                }
                self.window.push(partition, row);
            }
            self.count_window();
            from = scanned.next;
            self.inner.give_way(0).await?;
        }
        self.copy_window().await?;
        self.write_block().await
    }

    /// Reads what is in the window, and puts it into blocks.
    async fn copy_window(&mut self) -> Result<(), CompactError> {
        self.count_window();
        // Put back when it is copied.
        let mut window = std::mem::take(&mut self.window);
        self.read_bytes += self.inner.read_window(&mut window).await?;
        for (index, (partition, row)) in window.rows().iter().enumerate() {
            match window.extent(index) {
                Some(extent) => self.take(*partition, row, Ok(extent)).await?,
                None => match self.inner.read_extent(row, &mut self.read_bytes).await {
                    Ok(extent) => self.take(*partition, row, Ok(&extent)).await?,
                    Err(CompactError::Stopped) => return Err(CompactError::Stopped),
                    Err(error) => self.take(*partition, row, Err(error)).await?,
                },
            }
            self.inner.io.yield_if_needed().await;
        }
        window.clear();
        self.window = window;
        Ok(())
    }

    /// Memory of the window counts until the pass ends: it is kept for the next one.
    fn count_window(&mut self) {
        if self.window_bytes < self.window.bytes() {
            self.window_bytes = self.window.bytes();
            self.inner.memory.set_window(self.window_bytes);
            self.inner.make_room(self.inner.staging.borrow().memory_bytes(), 0);
        }
    }

    /// Puts an extent into the next block, behind the one before it if they belong together.
    async fn take(
        &mut self,
        partition: PartitionId,
        row: &ExtentRow,
        bytes: Result<&[u8], CompactError>,
    ) -> Result<(), CompactError> {
        let checked = bytes.map_err(Unfit::Unreadable).and_then(|bytes| Ok((check(partition, row, bytes)?, bytes)));
        let (header, bytes) = match checked {
            Ok(checked) => checked,
            Err(unfit) => {
                self.leave(partition, row, unfit).await;
                return Ok(());
            }
        };
        let body = &bytes[EXTENT_HEADER_BYTES..];
        let segment_bytes = self.inner.config.segment_bytes;
        if segment_bytes - segment::HEADER_BYTES < block_bytes(1, body.len()) {
            // Segments were larger once.
            self.leave(partition, row, Unfit::TooLarge).await;
            return Ok(());
        }
        let block_bytes = block_bytes(self.gathered.len() + 1, self.bodies.len() + body.len());
        if !self.gathered.is_empty() && BLOCK_BYTES_MAX.min(segment_bytes / SEGMENT_BLOCKS_MIN) < block_bytes {
            self.write_block().await?;
        }
        self.bodies.extend_from_slice(body);
        match self.gathered.last_mut() {
            Some(last) if last.header.is_followed_by(&header) => {
                last.header.body_bytes += header.body_bytes;
                last.header.entry_count += header.entry_count;
                last.header.record_count += header.record_count;
                last.header.max_append_time_ms = last.header.max_append_time_ms.max(header.max_append_time_ms);
                last.from.push(*row);
            }
            _ => self.gathered.push(Gathered { header, from: vec![*row] }),
        }
        Ok(())
    }

    /// An extent that is not what was written stays where it is, and so does its segment.
    async fn leave(&self, partition: PartitionId, row: &ExtentRow, unfit: Unfit) {
        let inner = self.inner;
        if let Unfit::Damaged(offsets) = &unfit
            && !inner.report(partition, row, offsets, FoundBy::Compaction).await
        {
            // It was deleted meanwhile.
            return;
        }
        let (shard, segment, position) = (inner.config.shard.0, row.segment.0, row.position);
        let error = &unfit as &dyn std::error::Error;
        tracing::warn!(shard, segment, position, %partition, error, "an extent cannot be moved; its segment stays");
        if let Some(generation) = inner.journal.generation(row.segment) {
            inner.compactor.damaged.borrow_mut().insert(row.segment, generation);
        }
    }

    /// Writes what was gathered.
    async fn write_block(&mut self) -> Result<(), CompactError> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let block_bytes = block_bytes(self.gathered.len(), self.bodies.len());
        let full = self.output.as_ref().is_some_and(|output| output.bytes < output.position + block_bytes);
        if full {
            self.finish_output().await?;
        }
        if self.output.is_none() {
            let segment = self.inner.journal.segment_for_compaction().await;
            let (segment, generation, bytes) = segment.ok_or(CompactError::NoRoom)?;
            let file = match self.inner.journal.open_compacted(segment).await {
                Ok(file) => file,
                Err(source) => {
                    self.inner.journal.seal_compacted(segment);
                    return Err(CompactError::Write { segment: segment.0, source });
                }
            };
            self.output = Some(Output {
                file,
                segment,
                generation,
                bytes,
                position: segment::HEADER_BYTES,
                next_sequence: 1,
                previous_crc: 0,
                durable_sequence: 0,
                unsynced_bytes: 0,
            });
        }
        let output = self.output.as_mut().expect("there is one now");
        let mut block = std::mem::take(&mut self.block);
        block.resize(block_bytes as usize, 0);
        let id = output.next_block(self.inner.config.shard);
        let mut writer = BlockWriter::new(&mut block, id.sequence);
        let mut bodies = &self.bodies[..];
        for Gathered { header, from } in self.gathered.drain(..) {
            let in_block = writer.position() as u32;
            writer.extent(&header);
            let (body, rest) = bodies.split_at(header.body_bytes as usize);
            bodies = rest;
            for batch in block::batches(body).flatten() {
                writer.batch(batch, block::batch_base_offset(batch), batch::append_time_ms(batch));
            }
            let to = ExtentRow {
                next_offset: header.next_offset(),
                segment: output.segment,
                position: output.position + in_block as u64,
                in_block,
                body_bytes: header.body_bytes,
                entry_count: header.entry_count,
                max_append_time_ms: header.max_append_time_ms,
                block_sequence: id.sequence,
                ..from[0]
            };
            self.moved_rows += from.len();
            self.moves.push(Move { partition: header.ledger.partition, from, to });
        }
        self.bodies.clear();
        let crc = writer.finish(&id);
        for (index, piece) in block.chunks(IO_BYTES_MAX).enumerate() {
            let mut buffer = self.inner.io.buffer(piece.len());
            buffer.as_mut().copy_from_slice(piece);
            let position = output.position + (index * IO_BYTES_MAX) as u64;
            self.inner.compactor.write_budget.take(&self.inner.io, piece.len() as u64).await;
            self.inner.give_way(0).await?;
            let written = self.inner.journal.write_compacted(&output.file, Rc::new(buffer), position).await;
            written.map_err(output.failed())?;
        }
        self.block = block;
        output.wrote(block_bytes, crc);
        let sync = SYNC_BYTES <= output.unsynced_bytes;
        self.inner.compactor.count(|figures| figures.compacted_bytes += block_bytes);
        if MOVED_ROWS_MAX <= self.moved_rows {
            self.switch(Durable::Later).await?;
        } else if sync {
            self.sync().await?;
        }
        Ok(())
    }

    /// Makes all that was written durable. Before that no row may name it: the old place would be let go, and a power cut
    /// would take the new one.
    async fn sync(&mut self) -> Result<(), CompactError> {
        let Some(output) = &mut self.output else { return Ok(()) };
        if 0 < output.unsynced_bytes && !cfg!(feature = "mutant-no-compaction-sync") {
            self.inner.journal.sync_compacted(&output.file).await.map_err(output.failed())?;
        }
        output.unsynced_bytes = 0;
        output.durable_sequence = output.next_sequence - 1;
        Ok(())
    }

    /// A last block without extents says that those before it were durable: what of them is not whole is damage then, and
    /// no copy that was cut short.
    async fn write_mark(&mut self) -> Result<(), CompactError> {
        let Some(output) = self.output.as_mut().filter(|output| output.position < output.bytes) else { return Ok(()) };
        let id = output.next_block(self.inner.config.shard);
        let mut mark = self.inner.io.buffer(ALIGNMENT);
        let crc = BlockWriter::new(mark.as_mut(), id.sequence).finish(&id);
        let written = self.inner.journal.write_compacted(&output.file, Rc::new(mark), output.position).await;
        written.map_err(output.failed())?;
        output.wrote(ALIGNMENT as u64, crc);
        Ok(())
    }

    /// Ends the segment that is being filled: all that was moved to it is found there from now on, whatever happens.
    async fn finish_output(&mut self) -> Result<(), CompactError> {
        if self.output.is_none() {
            return Ok(());
        }
        self.switch(Durable::Now).await?;
        self.release();
        self.write_mark().await?;
        if let Some(output) = self.output.take() {
            self.inner.journal.seal_compacted(output.segment);
        }
        Ok(())
    }

    /// Tells the index where the extents are now.
    async fn switch(&mut self, durable: Durable) -> Result<(), CompactError> {
        self.sync().await?;
        let Some(output) = &self.output else { return Ok(()) };
        let moves = std::mem::take(&mut self.moves);
        self.moved_rows = 0;
        let mut ends: Vec<(PartitionId, u64)> = moves.iter().map(|m| (m.partition, m.to.next_offset)).collect();
        // Counted before the index knows: it may tell of their end before it tells us of their move.
        let bytes = moves.iter().map(|m| m.to.body_bytes as u64).sum();
        self.inner.journal.add_live(output.segment, bytes);
        let (segment, generation) = (output.segment, output.generation);
        let batch = MoveBatch { moves, segment, generation, flush: durable == Durable::Now };
        let moved = self.inner.index.move_extents(Box::new(batch)).await?;
        self.inner.journal.remove_live(segment, moved.dropped_bytes);
        self.inner.compactor.count(|figures| figures.dropped_bytes += moved.dropped_bytes);
        for (segment, bytes) in moved.released {
            *self.released.entry(segment).or_default() += bytes;
        }
        // The last of each partition, which comes last.
        ends.reverse();
        ends.dedup_by_key(|(partition, _)| *partition);
        for (partition, next_offset) in ends {
            self.inner.forget_places(partition, next_offset);
        }
        Ok(())
    }

    /// The old places are dead. Only after a durable switch.
    fn release(&mut self) {
        for (segment, bytes) in std::mem::take(&mut self.released) {
            self.inner.journal.remove_live(segment, bytes);
        }
    }
}

impl<F> Output<F> {
    fn next_block(&self, shard: ShardId) -> BlockId {
        BlockId {
            kind: SegmentKind::Compacted,
            shard,
            generation: self.generation,
            sequence: self.next_sequence,
            durable_sequence: self.durable_sequence,
            previous_crc: self.previous_crc,
        }
    }

    fn wrote(&mut self, block_bytes: u64, crc: u32) {
        self.position += block_bytes;
        self.unsynced_bytes += block_bytes;
        self.next_sequence += 1;
        self.previous_crc = crc;
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> CompactError + use<F> {
        let segment = self.segment.0;
        move |source| CompactError::Write { segment, source }
    }
}

impl<I: Io, T: 'static> Drop for Pass<'_, I, T> {
    fn drop(&mut self) {
        // After an error: what is in the segment and in the index lives on, the rest is dead.
        if let Some(output) = self.output.take() {
            self.inner.journal.seal_compacted(output.segment);
        }
        self.inner.journal.pin(&self.victims, false);
        self.inner.memory.set_window(0);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durable {
    Now,
    Later,
}

impl ExtentHeader {
    /// Whether both are one extent when `next` is put behind this one.
    fn is_followed_by(&self, next: &ExtentHeader) -> bool {
        self.ledger == next.ledger
            && self.next_offset() == next.base_offset
            && self.first_entry + self.entry_count as u64 == next.first_entry
    }
}

/// What a block takes on disk.
fn block_bytes(extents: usize, bodies_bytes: usize) -> u64 {
    (block::HEADER_BYTES + extents * EXTENT_HEADER_BYTES + bodies_bytes).next_multiple_of(ALIGNMENT) as u64
}

/// Why an extent cannot be moved.
#[derive(Debug, thiserror::Error)]
enum Unfit {
    #[error("it cannot be read")]
    Unreadable(#[source] CompactError),
    #[error("the messages {0:?} are not what was written")]
    Damaged(Vec<Range<u64>>),
    #[error("its messages are good, but their append times are not what was written")]
    AppendTimes,
    #[error("it is larger than a segment of today")]
    TooLarge,
}

/// Checks that the bytes are the extent of the row, every batch of it, as far as anything in it can tell.
fn check(partition: PartitionId, row: &ExtentRow, bytes: &[u8]) -> Result<ExtentHeader, Unfit> {
    let header = block::extent_header(bytes).ok().filter(|header| row.describes(partition, header));
    let header = header.ok_or_else(|| Unfit::Damaged(std::iter::once(row.first_offset..row.next_offset).collect()))?;
    let mut latest_ms = 0;
    let mut count = 0;
    let mut bad = block::check_batches(&header, &bytes[EXTENT_HEADER_BYTES..], |batch: &batch::Header, _| {
        latest_ms = latest_ms.max(batch.append_time_ms);
        count += 1;
    });
    if bad.is_empty() && count != header.entry_count {
        bad.push(row.first_offset..row.next_offset);
    }
    if !bad.is_empty() {
        return Err(Unfit::Damaged(bad));
    }
    // The broker's fields are covered by the checksum of the block, which was not read: at least they must agree.
    if latest_ms != header.max_append_time_ms || latest_ms != row.max_append_time_ms {
        return Err(Unfit::AppendTimes);
    }
    Ok(header)
}

#[cfg(test)]
mod tests;
