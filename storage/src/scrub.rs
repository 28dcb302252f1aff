//! The scrubber: reads sealed segments again and again, so that damage is found while there is something left to do
//! about it, and not by the reader who needs the messages.
//!
//! 1. A pass takes the sealed segments in the order of their generations, journal and compacted alike, and checks
//!    every block and every batch in them ([`walk`]).
//! 2. What does not check out is a suspicion: it may be an extent that nobody needs any more. So the extents of the index
//!    that lie there are read as a reader would ([`Inner::examine`]), and only what a reader would miss is damage.
//! 3. At the end of a pass every extent of the index must lie in a place that the pass found whole, and every partition
//!    must be without holes: that finds blocks whose very headers are gone.
//!
//! How far a pass has come is a row in the index, so that a restart goes on there. Reads are paid from a budget, are
//! small, and wait while the journal has writes that are late.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::{PartitionId, ShardId};

use crate::backlog::{good_pieces, is_unreadable, missing, read_pages};
use crate::block::{self, EXTENT_HEADER_BYTES, ExtentKind};
use crate::budget::Budget;
use crate::damage::{Damage, DamagedPlace, FoundBy};
use crate::index::ExtentRow;
use crate::io::{ALIGNMENT, File, Io};
use crate::segment::{self, SegmentId, SegmentKind};
use crate::store::{DamagedRange, Inner};

/// Read at a time.
pub(crate) const READ_BYTES: usize = 256 << 10;
/// A write that takes longer is late, and scrubbing waits.
const LATE: Duration = Duration::from_millis(5);
const LATE_PAUSE: Duration = Duration::from_millis(20);
/// How often an idle scrubber looks whether a pass is due.
const IDLE: Duration = Duration::from_secs(1);
/// Rows asked from the index at a time.
const ROWS: usize = 1024;
/// More suspicions in one segment are one, from the first to the last.
const SUSPECTS_MAX: usize = 1024;
const VERSION: u8 = 1;

/// How far the scrubber has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// When the pass began, in ms since the epoch; 0: there was none yet.
    started_ms: u64,
    /// Segments up to this generation are done; `None`: the pass has come to its end.
    generation: Option<u64>,
}

impl Progress {
    fn encode(self) -> Vec<u8> {
        let mut out = vec![VERSION, u8::from(self.generation.is_some())];
        out.extend_from_slice(&self.started_ms.to_le_bytes());
        out.extend_from_slice(&self.generation.unwrap_or(0).to_le_bytes());
        out
    }

    fn decode(value: &[u8]) -> Option<Progress> {
        let (&[version, running], numbers) = value.split_first_chunk::<2>()?;
        let &[started, generation] = numbers.as_chunks::<8>().0 else { return None };
        (version == VERSION).then_some(Progress {
            started_ms: u64::from_le_bytes(started),
            generation: (running != 0).then_some(u64::from_le_bytes(generation)),
        })
    }
}

/// The scrubber's part of a store.
#[derive(Debug, Default)]
pub(crate) struct Scrub {
    progress: Progress,
    changed: bool,
    /// What recovery found, until it is known which messages that cost.
    recovered: Vec<DamagedPlace>,
}

impl Scrub {
    pub(crate) fn load(progress: &[u8], damaged: &[DamagedRange], generation: impl Fn(u32) -> Option<u64>) -> Scrub {
        let place = |range: &DamagedRange| DamagedPlace {
            segment: range.segment,
            generation: generation(range.segment).unwrap_or(0),
            positions: range.start_position..range.end_position,
        };
        Scrub {
            progress: Progress::decode(progress).unwrap_or_default(),
            changed: false,
            recovered: damaged.iter().map(place).collect(),
        }
    }

    pub(crate) fn has_change(&self) -> bool {
        self.changed
    }

    pub(crate) fn take_change(&mut self) -> Option<Vec<u8>> {
        std::mem::take(&mut self.changed).then(|| self.progress.encode())
    }

    fn set(&mut self, progress: Progress) {
        self.progress = progress;
        self.changed = true;
    }
}

/// Places that did not check out.
#[derive(Debug, Default)]
struct Suspects {
    by_segment: BTreeMap<SegmentId, (u64, Vec<Range<u64>>)>,
    /// And all that lies in other stores, whose segments no walk goes through.
    foreign: bool,
}

impl Suspects {
    fn add(&mut self, segment: SegmentId, generation: u64, positions: Range<u64>) {
        self.by_segment.entry(segment).or_insert((generation, Vec::new())).1.push(positions);
    }

    fn hit(&self, row: &ExtentRow) -> bool {
        if row.store.is_some() {
            return self.foreign;
        }
        let end = row.position + EXTENT_HEADER_BYTES as u64 + u64::from(row.body_bytes);
        let places = self.by_segment.get(&row.segment).map_or(&[][..], |(_, places)| places);
        places.iter().any(|place| place.start < end && row.position < place.end)
    }

    /// The place that held what is missing between two extents, if there is one to suspect.
    fn between(&self, before: Option<&ExtentRow>, after: Option<&ExtentRow>) -> Option<DamagedPlace> {
        let own = |row: &&ExtentRow| row.store.is_none();
        let (before, after) = (before.filter(own), after.filter(own));
        let all = self.by_segment.iter();
        let mut places = all
            .flat_map(|(segment, (generation, places))| places.iter().map(move |place| (*segment, *generation, place)));
        let (segment, generation, positions) = places.find(|(segment, _, place)| {
            before.is_some_and(|row| row.segment == *segment && row.position < place.start)
                || after.is_some_and(|row| row.segment == *segment && place.end <= row.position)
        })?;
        // What reaches to the end of the segment is no place but a doubt.
        (positions.end != u64::MAX).then(|| DamagedPlace {
            segment: segment.0,
            generation,
            positions: positions.clone(),
        })
    }
}

/// Why a pass ended before its end.
enum Ended {
    Stopped,
    /// The disk or the index does not answer as it should; the next pass tries again.
    Failed(String),
}

impl<I: Io, T: 'static> Inner<I, T> {
    pub(crate) async fn run_scrubber(self: Rc<Self>) {
        self.examine_recovered().await;
        let budget = Budget::new(self.config.scrub_bytes_per_s, READ_BYTES as u64);
        let interval_ms = self.config.scrub_interval.as_millis().min(u128::from(u64::MAX)) as u64;
        while !budget.is_off() && !self.stopped.get() {
            let Progress { started_ms, generation } = self.scrub.borrow().progress;
            let due_ms = if generation.is_some() { 0 } else { started_ms.saturating_add(interval_ms.max(1)) };
            let now_ms = self.io.wall_clock_ms();
            // A clock that was set back must not put off the next pass for ever.
            if now_ms < due_ms && started_ms <= now_ms {
                self.io.sleep(IDLE.min(Duration::from_millis(due_ms - now_ms))).await;
                continue;
            }
            match self.scrub_pass(&budget).await {
                Ok(()) => {}
                Err(Ended::Stopped) => break,
                Err(Ended::Failed(error)) => {
                    tracing::warn!(shard = self.config.shard.0, error, "scrubbing is put off");
                    self.io.sleep(IDLE).await;
                }
            }
        }
    }

    /// Finds out which messages were lost with the places that recovery skipped.
    async fn examine_recovered(&self) {
        let places = std::mem::take(&mut self.scrub.borrow_mut().recovered);
        if places.is_empty() {
            return;
        }
        let mut suspects = Suspects::default();
        for place in places {
            suspects.add(SegmentId(place.segment), place.generation, place.positions.clone());
            let found_at_ms = self.io.wall_clock_ms();
            let damage = Damage { place: Some(place), messages: None, found_at_ms, found_by: FoundBy::Recovery };
            self.damage.borrow_mut().add(damage);
        }
        if let Err(Ended::Failed(error)) = self.examine(&suspects, FoundBy::Recovery, None).await {
            tracing::warn!(shard = self.config.shard.0, error, "it is not known yet which messages are damaged");
        }
    }

    async fn scrub_pass(&self, budget: &Budget) -> Result<(), Ended> {
        let mut progress = self.scrub.borrow().progress;
        if progress.generation.is_none() {
            progress = Progress { started_ms: self.io.wall_clock_ms(), generation: Some(0) };
        }
        let done_generation = progress.generation.unwrap_or(0);
        let mut rest = Suspects { foreign: true, ..Suspects::default() };
        for (generation, segment, bytes) in self.journal.live_segments() {
            if generation <= done_generation {
                continue;
            }
            let found = match self.scrub_segment(segment, generation, bytes, budget).await {
                Ok(found) => found,
                // It died meanwhile.
                Err(Ended::Failed(_)) if self.journal.generation(segment) != Some(generation) => continue,
                Err(ended) => return Err(ended),
            };
            if self.journal.generation(segment) != Some(generation) {
                continue;
            }
            if !found.suspects.is_empty() {
                let mut suspects = Suspects::default();
                found.suspects.into_iter().for_each(|place| suspects.add(segment, generation, place));
                self.examine(&suspects, FoundBy::Scrub, Some(budget)).await?;
            }
            rest.add(segment, generation, found.end..u64::MAX);
            progress.generation = Some(generation);
            self.scrub.borrow_mut().set(progress);
        }
        self.examine(&rest, FoundBy::Scrub, Some(budget)).await?;
        self.scrub.borrow_mut().set(Progress { generation: None, ..progress });
        let mut figures = self.figures.get();
        figures.scrub_passes += 1;
        self.figures.set(figures);
        Ok(())
    }

    async fn scrub_segment(
        &self,
        segment: SegmentId,
        generation: u64,
        bytes: u64,
        budget: &Budget,
    ) -> Result<Walked, Ended> {
        let failed = |error: std::io::Error| Ended::Failed(format!("segment {segment}: {error}"));
        let file = self.journal.file(segment).await.map_err(failed)?;
        let mut pace = async |bytes: u64| self.pace(budget, bytes).await;
        match walk(&*file, self.config.shard, generation, bytes, &mut pace).await {
            Ok(Some(walked)) => Ok(walked),
            Ok(None) => Err(Ended::Stopped),
            Err(error) => Err(failed(error)),
        }
    }

    /// Waits until `bytes` more may be read. `false`: the store is closing.
    async fn pace(&self, budget: &Budget, bytes: u64) -> bool {
        budget.take(&self.io, bytes).await;
        while self.journal.is_late(LATE) && !self.stopped.get() {
            self.io.sleep(LATE_PAUSE).await;
        }
        let mut figures = self.figures.get();
        figures.scrubbed_bytes += bytes;
        self.figures.set(figures);
        self.io.yield_if_needed().await;
        !self.stopped.get()
    }

    /// Looks at every extent that the index has: those in suspected places, or in segments that are gone, are read, and
    /// between two of them nothing may be missing.
    async fn examine(&self, suspects: &Suspects, found_by: FoundBy, budget: Option<&Budget>) -> Result<(), Ended> {
        let count = self.partitions.borrow().list.len();
        for index in 0..count {
            let (partition, start_offset) = {
                let partitions = self.partitions.borrow();
                let found = &partitions.list[index];
                if found.deleted {
                    continue;
                }
                (found.partition, found.start_offset)
            };
            let mut offset = start_offset;
            let mut before: Option<ExtentRow> = None;
            loop {
                let rows = self.index.extents(partition, offset, ROWS).await;
                let rows = rows.map_err(|error| Ended::Failed(error.to_string()))?;
                for row in &rows {
                    if offset < row.first_offset {
                        let place = suspects.between(before.as_ref(), Some(row));
                        self.report_hole(partition, offset, place, found_by).await;
                    }
                    if suspects.hit(row) || row.store.is_none() && self.generation_of(row).is_none() {
                        self.examine_extent(partition, row, found_by, budget).await?;
                    }
                    offset = row.next_offset;
                    before = Some(*row);
                }
                if self.stopped.get() {
                    return Err(Ended::Stopped);
                }
                self.io.yield_if_needed().await;
                if rows.len() < ROWS {
                    break;
                }
            }
            self.report_hole(partition, offset, suspects.between(before.as_ref(), None), found_by).await;
        }
        Ok(())
    }

    /// Reads an extent as a reader would, and notes what of it is missing.
    async fn examine_extent(
        &self,
        partition: PartitionId,
        row: &ExtentRow,
        found_by: FoundBy,
        budget: Option<&Budget>,
    ) -> Result<(), Ended> {
        let failed = |error: std::io::Error| Ended::Failed(format!("segment {}: {error}", row.segment));
        let start = row.position & !(ALIGNMENT as u64 - 1);
        let end = row.position + EXTENT_HEADER_BYTES as u64 + u64::from(row.body_bytes);
        let end = end.next_multiple_of(ALIGNMENT as u64);
        let mut memory = Vec::new();
        match self.file_of(row).await {
            Ok(file) => {
                for from in (start..end).step_by(READ_BYTES) {
                    let bytes = READ_BYTES.min((end - from) as usize);
                    if let Some(budget) = budget
                        && !self.pace(budget, bytes as u64).await
                    {
                        return Err(Ended::Stopped);
                    }
                    memory.extend_from_slice(&read(&*file, from, bytes).await.map_err(failed)?);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let mut pieces = Vec::new();
        good_pieces(partition, row, &memory, (row.position - start) as usize, true, &mut pieces);
        let missing = missing(row, &pieces);
        if !missing.is_empty() {
            self.report(partition, row, &missing, found_by).await;
        }
        Ok(())
    }
}

/// Reads at once, or page by page with zeros for what is lost.
async fn read<F: File>(file: &F, start: u64, bytes: usize) -> std::io::Result<Vec<u8>> {
    match file.read_at(start, bytes).await {
        Ok(read) => Ok(read.to_vec()),
        Err(error) if is_unreadable(&error) => read_pages(file, start, bytes).await,
        Err(error) => Err(error),
    }
}

/// What a walk over one segment found.
#[derive(Debug, Default)]
pub(crate) struct Walked {
    /// Where the last whole block ends. What is behind it was never written in this use, or is not whole.
    pub(crate) end: u64,
    /// Places before the end that do not check out.
    pub(crate) suspects: Vec<Range<u64>>,
    pub(crate) blocks: u64,
}

/// Checks all blocks of one use of a segment and the batches in them. `pace` is asked before every read, with its bytes;
/// `false` ends the walk with `None`.
///
/// Memory: the largest block.
pub(crate) async fn walk<F: File>(
    file: &F,
    shard: ShardId,
    generation: u64,
    segment_bytes: u64,
    pace: &mut impl AsyncFnMut(u64) -> bool,
) -> std::io::Result<Option<Walked>> {
    let mut window = Window { file, segment_bytes, start: segment::HEADER_BYTES, bytes: Vec::new() };
    let mut walked = Walked { end: segment::HEADER_BYTES, ..Walked::default() };
    let mut position = segment::HEADER_BYTES;
    let mut next_sequence = None;
    // What is missing or not whole, each with the first block that it costs.
    let mut doubts: Vec<(u64, Range<u64>)> = Vec::new();
    while position + (ALIGNMENT as u64) <= segment_bytes {
        let Some(bytes) = window.at(position, ALIGNMENT, pace).await? else { return Ok(None) };
        let header = block::header(bytes).ok().filter(|header| {
            header.id.generation == generation
                && header.id.shard == shard
                && position + u64::from(header.block_bytes) <= segment_bytes
                // Blocks that were in flight when the node stopped, and were given up.
                && next_sequence.is_none_or(|next| next <= header.id.sequence)
        });
        let Some(header) = header else {
            position += ALIGNMENT as u64;
            continue;
        };
        let Some(bytes) = window.at(position, header.block_bytes as usize, pace).await? else { return Ok(None) };
        if block::check(bytes).is_err() {
            position += ALIGNMENT as u64;
            continue;
        }
        // Between two blocks there is nothing, or one is missing.
        if walked.end < position {
            doubts.push((next_sequence.unwrap_or(1), walked.end..position));
        }
        for (extent, start) in block::extents(&header, bytes).flatten() {
            let end = start + EXTENT_HEADER_BYTES + extent.body_bytes as usize;
            let body = &bytes[start + EXTENT_HEADER_BYTES..end];
            if extent.kind == ExtentKind::Data && !block::check_batches(&extent, body, |_, _| {}).is_empty() {
                doubts.push((header.id.sequence, position + start as u64..position + end as u64));
            }
        }
        // A copy that was cut short is no damage: it counts only from where all of it is durable, as a later block says.
        let durable_sequence = match header.id.kind {
            SegmentKind::Journal => u64::MAX,
            SegmentKind::Compacted => header.id.durable_sequence,
        };
        let certain = doubts.partition_point(|(sequence, _)| *sequence <= durable_sequence);
        doubts.drain(..certain).for_each(|(_, positions)| walked.suspect(positions));
        next_sequence = Some(header.id.sequence + 1);
        position += u64::from(header.block_bytes);
        walked.end = position;
        walked.blocks += 1;
    }
    Ok(Some(walked))
}

impl Walked {
    fn suspect(&mut self, positions: Range<u64>) {
        let full = SUSPECTS_MAX <= self.suspects.len();
        match self.suspects.last_mut() {
            Some(last) if full || last.end == positions.start => last.end = positions.end,
            _ => self.suspects.push(positions),
        }
    }
}

/// A piece of a segment that moves forward.
struct Window<'a, F> {
    file: &'a F,
    segment_bytes: u64,
    /// Position of `bytes` in the segment.
    start: u64,
    bytes: Vec<u8>,
}

impl<F: File> Window<'_, F> {
    /// The bytes from `position` on, at least `bytes_min` of them; `None`: `pace` said no.
    async fn at(
        &mut self,
        position: u64,
        bytes_min: usize,
        pace: &mut impl AsyncFnMut(u64) -> bool,
    ) -> std::io::Result<Option<&[u8]>> {
        let end = |window: &Self| window.start + window.bytes.len() as u64;
        if end(self) < position + bytes_min as u64 {
            let passed = (position - self.start).min(self.bytes.len() as u64) as usize;
            self.bytes.drain(..passed);
            self.start = position;
        }
        while end(self) < position + bytes_min as u64 {
            let from = end(self);
            let count = READ_BYTES.min((self.segment_bytes - from) as usize);
            if count == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            if !pace(count as u64).await {
                return Ok(None);
            }
            let mut read = read(self.file, from, count).await?;
            // A file that was cut reads as zeros, which are no blocks.
            read.resize(count, 0);
            self.bytes.append(&mut read);
        }
        Ok(Some(&self.bytes[(position - self.start) as usize..]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_comes_back_as_it_was() {
        for progress in [
            Progress::default(),
            Progress { started_ms: 5, generation: Some(9) },
            Progress { started_ms: u64::MAX, generation: Some(0) },
        ] {
            assert_eq!(Progress::decode(&progress.encode()), Some(progress));
        }
        assert_eq!(Progress::decode(&[]), None);
        assert_eq!(Progress::decode(&[9; 18]), None);
        assert_eq!(Progress::decode(&[1; 17]), None);
    }
}
