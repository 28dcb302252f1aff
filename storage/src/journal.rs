//! The journal: blocks, one after the other, in segments that are used again.
//!
//! The owner asks where the next block goes ([`Journal::place`]), fills a buffer and hands it over ([`Journal::write`]).
//! Several writes may be in flight; [`Journal::completed`] gives them back strictly in order, so a block counts only
//! when all before it do. After a failed write nothing behind it counts: what reached the disk is not known. The owner
//! takes everything back that was in flight, forgets it and lets the journal roll ([`Journal::roll`]): the segment is
//! given up, and a fresh one takes over from the last durable block if the disk answers the write of its header. The
//! header says from which block on the old segments do not count ([`segment::Cut`]).
//!
//! A task ([`Journal::run`]) has the next segment ready before it is needed: a dead one, a spare, or a new one.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::ShardId;
use drava_runtime::local::{Broadcast, Notify};

use crate::block::BlockId;
use crate::io::{ALIGNMENT, File, Io};
use crate::segment::{self, CUTS_MAX, Cut, SegmentHeader, SegmentId, SegmentKind};
use crate::store::FlushError;

/// Sealed segments kept open for readers.
const OPEN_SEALED_MAX: usize = 64;
/// Spare segments are filled only after the journal has been quiet for this long.
const QUIET: Duration = Duration::from_millis(200);
/// How long to wait before trying again to make a segment on a full or failing disk.
const RETRY: Duration = Duration::from_millis(500);
const FILL_BYTES: usize = 1 << 20;
/// Longer writes are told at debug level: what an operator looks for who sees late acknowledgements.
const SLOW_WRITE: Duration = Duration::from_millis(20);
/// Dead segments kept for the next burst, beside the spares; the room of others goes back to the file system.
const DEAD_KEPT: usize = 4;
/// The same while the journal is being written. Retention lets many segments die at once; those that were unlinked then
/// would be made anew a moment later, and new ones are several times slower to write.
const DEAD_KEPT_BUSY: usize = 32;

#[derive(Clone, Debug)]
pub(crate) struct JournalConfig {
    pub(crate) dir: PathBuf,
    pub(crate) shard: ShardId,
    pub(crate) segment_bytes: u64,
    pub(crate) segments_spare: usize,
    pub(crate) disk_reserve_bytes: u64,
}

/// A segment as it was found or is now.
#[derive(Debug)]
pub(crate) struct Segment<F> {
    /// 0: not used yet.
    pub(crate) generation: u64,
    pub(crate) bytes: u64,
    /// What the file had once and has no more.
    pub(crate) cut_off_bytes: u64,
    pub(crate) file: Option<Rc<F>>,
    /// Bytes of extents that somebody may still read.
    pub(crate) live_bytes: u64,
    /// The highest block in it, once it is sealed.
    pub(crate) last_sequence: u64,
    pub(crate) role: Role,
    /// Every byte of it was written once, so that writes to it change no metadata of the file system.
    pub(crate) filled: bool,
    pub(crate) kind: SegmentKind,
    /// The compactor reads from it: it is not used again before that ends, dead or not.
    pub(crate) pinned: bool,
    /// What its header says of other segments.
    pub(crate) cuts: Vec<Cut>,
    /// A write to it failed. It is removed when nobody needs it, not written again.
    pub(crate) suspect: bool,
    /// Its header could not be read, or made no sense, when the journal was opened: it may have named a later use than this.
    pub(crate) unread: bool,
}

/// Later than any use that a header could name which was not read at this start: each failed start may have made some.
const UNREAD_GENERATIONS: u64 = 1 << 20;

/// The highest generation that may have been given out. One that is given out twice makes the next start take one of the two
/// segments for the other's place in the chain.
pub(crate) fn highest_generation<F>(segments: &[Option<Segment<F>>]) -> u64 {
    let highest = segments.iter().flatten().map(|segment| segment.generation).max().unwrap_or(0);
    let unread = segments.iter().flatten().any(|segment| segment.unread);
    highest + if unread { UNREAD_GENERATIONS } else { 0 }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Spare,
    Prepared,
    Active,
    Sealed,
    /// The compactor writes to it.
    Compacting,
}

/// A sealed segment with live extents, as the compactor sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SealedSegment {
    pub(crate) id: SegmentId,
    pub(crate) generation: u64,
    pub(crate) bytes: u64,
    pub(crate) live_bytes: u64,
    pub(crate) kind: SegmentKind,
}

/// Whether the compactor waits for a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CompactionSegment {
    NotWanted,
    Wanted,
    Ready(SegmentId),
    /// There is no room for one.
    Refused,
}

/// Where the journal goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct JournalEnd {
    pub(crate) segment: SegmentId,
    pub(crate) generation: u64,
    pub(crate) position: u64,
    pub(crate) next_sequence: u64,
    pub(crate) previous_crc: u32,
}

impl Default for JournalEnd {
    /// Of a new journal, whose first block is 1.
    fn default() -> JournalEnd {
        JournalEnd { segment: SegmentId::default(), generation: 0, position: 0, next_sequence: 1, previous_crc: 0 }
    }
}

impl JournalEnd {
    /// A new journal ends nowhere, and one of a store that follows others goes on behind their generations all the same. A
    /// segment of generation 0 was made and not used: the node died before its header was written.
    pub(crate) fn names_a_segment(&self) -> bool {
        0 < self.generation && segment::HEADER_BYTES <= self.position
    }
}

/// Where a block goes and what its header says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placement {
    pub(crate) id: BlockId,
    pub(crate) segment: SegmentId,
    pub(crate) position: u64,
}

pub(crate) struct Completed<P> {
    pub(crate) placement: Placement,
    pub(crate) block_bytes: u64,
    /// Where the journal goes on after this block.
    pub(crate) end: JournalEnd,
    pub(crate) took: Duration,
    pub(crate) payload: P,
}

struct InFlight<P> {
    completed: Completed<P>,
    started: Duration,
    result: Option<Result<(), FlushError>>,
}

pub(crate) struct Journal<I: Io, P> {
    io: I,
    config: JournalConfig,
    state: RefCell<State<I, P>>,
    /// Told when a write ended or a segment became ready.
    woken: Rc<Notify>,
    wanted: Notify,
    stopped: Cell<bool>,
    /// Writes that the disk has not answered.
    writing: Cell<usize>,
    /// Files are being made, filled or removed.
    keeping: Cell<bool>,
    /// Changes when one of these has ended.
    answered: Broadcast,
    /// The compactor's segment is ready, or there will be none.
    compaction_answered: Broadcast,
}

/// What the keeper of the segments waits for before it looks again.
enum Pause {
    None,
    Retry,
    Quiet,
    Wanted,
}

struct State<I: Io, P> {
    segments: Vec<Option<Segment<I::File>>>,
    active: Option<(SegmentId, u64)>,
    prepared: Option<SegmentId>,
    segment_wanted: bool,
    /// The active segment was made in haste and a better one is prepared.
    leave_active: bool,
    next_sequence: u64,
    durable_sequence: u64,
    previous_crc: u32,
    generation: u64,
    in_flight: VecDeque<InFlight<P>>,
    failed: Option<FlushError>,
    full: bool,
    /// Blocks up to this one need no replay any more.
    covered_sequence: u64,
    /// Sealed segments that are open, oldest first.
    opened: VecDeque<SegmentId>,
    /// Numbers of segments that are gone although the index has extents in them. Were they given out again, what the
    /// index lets go of the old ones would be taken for a part of the new, and those used again too early.
    gone: BTreeSet<SegmentId>,
    recycled: u64,
    written_at: Duration,
    compaction: CompactionSegment,
    /// Where the journal goes on after the last durable block.
    durable_end: JournalEnd,
    /// Blocks that do not count, as far as segments that may hold some are there.
    cuts: Vec<Cut>,
    /// A write failed and the next segment is not ready yet.
    rolling: Option<Roll>,
    rolls: u64,
    /// A durable block says that all up to this one were durable.
    vouched_sequence: u64,
    /// The last block that holds nothing.
    mark_sequence: u64,
    /// Segments of this generation and later ones hold the last whole checkpoint and what came after it.
    checkpoint_generation: u64,
}

/// The blocks that the segment which takes over will cut off.
#[derive(Clone, Copy, Debug)]
struct Roll {
    from_generation: u64,
    sequence: u64,
}

impl<I: Io, P: 'static> Journal<I, P> {
    /// A journal over the segments found, which goes on at `end`; `None` when nothing was ever written.
    pub(crate) fn new(
        io: I,
        config: JournalConfig,
        mut segments: Vec<Option<Segment<I::File>>>,
        end: Option<JournalEnd>,
        woken: Rc<Notify>,
    ) -> Journal<I, P> {
        let generation = end.map_or(0, |end| end.generation).max(highest_generation(&segments));
        let mut active = None;
        if let Some(end) = end {
            let slot = segments.get_mut(end.segment.0 as usize).and_then(Option::as_mut);
            if let Some(segment) = slot.filter(|segment| end.names_a_segment() && segment.generation == end.generation)
            {
                segment.role = Role::Active;
                active = Some((end.segment, end.position));
            }
        }
        let next_sequence = end.unwrap_or_default().next_sequence;
        let mut cuts = Vec::new();
        for cut in segments.iter().flatten().flat_map(|segment| &segment.cuts) {
            if !cuts.contains(cut) {
                cuts.push(*cut);
            }
        }
        Journal {
            io,
            config,
            state: RefCell::new(State {
                segments,
                active,
                prepared: None,
                segment_wanted: false,
                leave_active: false,
                next_sequence,
                durable_sequence: next_sequence - 1,
                previous_crc: end.map_or(0, |end| end.previous_crc),
                generation,
                in_flight: VecDeque::new(),
                failed: None,
                full: false,
                covered_sequence: 0,
                opened: VecDeque::new(),
                gone: BTreeSet::new(),
                recycled: 0,
                written_at: Duration::ZERO,
                compaction: CompactionSegment::NotWanted,
                durable_end: end.unwrap_or_default(),
                cuts,
                rolling: None,
                rolls: 0,
                vouched_sequence: 0,
                mark_sequence: 0,
                checkpoint_generation: u64::MAX,
            }),
            woken,
            wanted: Notify::default(),
            stopped: Cell::new(false),
            writing: Cell::new(0),
            keeping: Cell::new(false),
            answered: Broadcast::default(),
            compaction_answered: Broadcast::default(),
        }
    }

    /// Where a block of `block_bytes` would go now. `None`: no segment is ready yet; the owner is woken when one is.
    pub(crate) fn place(&self, block_bytes: u64) -> Option<Placement> {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        if state.failed.is_some() || state.rolling.is_some() {
            return None;
        }
        if let Some((id, position)) = state.active {
            let segment = state.segments[id.0 as usize].as_mut().expect("the active segment exists");
            if position + block_bytes <= segment.bytes && !(state.leave_active && state.prepared.is_some()) {
                return Some(state.placement(self.config.shard, id, position));
            }
        }
        let Some(next) = state.prepared.take() else {
            state.segment_wanted = true;
            self.wanted.notify();
            return None;
        };
        if let Some((id, _)) = state.active.take() {
            let last_sequence = state.next_sequence - 1;
            let segment = state.segments[id.0 as usize].as_mut().expect("the active segment exists");
            segment.role = Role::Sealed;
            segment.last_sequence = last_sequence;
            state.opened.push_back(id);
            state.close_some();
        }
        state.segments[next.0 as usize].as_mut().expect("a prepared segment exists").role = Role::Active;
        state.active = Some((next, segment::HEADER_BYTES));
        state.segment_wanted = false;
        state.leave_active = false;
        self.wanted.notify();
        Some(state.placement(self.config.shard, next, segment::HEADER_BYTES))
    }

    /// Starts writing a block where [`Journal::place`] said, with nothing placed in between. `crc` is its checksum.
    pub(crate) fn write(self: &Rc<Self>, placement: Placement, buffer: Rc<I::Buffer>, crc: u32, payload: P) {
        let block_bytes = (*buffer).as_ref().len() as u64;
        let mut state = self.state.borrow_mut();
        assert!(placement.id.sequence == state.next_sequence, "block {} is next", state.next_sequence);
        assert!(state.active == Some((placement.segment, placement.position)), "placed somewhere else");
        let end = JournalEnd {
            segment: placement.segment,
            generation: placement.id.generation,
            position: placement.position + block_bytes,
            next_sequence: placement.id.sequence + 1,
            previous_crc: crc,
        };
        state.active = Some((end.segment, end.position));
        state.next_sequence = end.next_sequence;
        state.previous_crc = crc;
        let started = self.io.now();
        state.written_at = started;
        let file = state.segments[placement.segment.0 as usize].as_ref().and_then(|segment| segment.file.clone());
        let file = file.expect("the active segment is open");
        state.in_flight.push_back(InFlight {
            completed: Completed { placement, block_bytes, end, took: Duration::ZERO, payload },
            started,
            result: None,
        });
        if !state.segment_wanted && state.prepared.is_none() {
            self.wanted.notify();
        }
        drop(state);
        self.writing.set(self.writing.get() + 1);
        let journal = self.clone();
        self.io.spawn(async move {
            let mut result = file.write_at(buffer, placement.position).await;
            if result.is_err() && cfg!(feature = "mutant-resume-after-failed-sync") {
                result = file.sync().await;
            }
            let result = result.map_err(|error| FlushError::Write {
                segment: placement.segment.0,
                position: placement.position,
                message: error.to_string(),
            });
            journal.ended(placement.id.sequence, result);
        });
    }

    fn ended(&self, sequence: u64, result: Result<(), FlushError>) {
        let now = self.io.now();
        let mut state = self.state.borrow_mut();
        state.written_at = now;
        let entry = state.in_flight.iter_mut().find(|entry| entry.completed.placement.id.sequence == sequence);
        // Absent when a write before it failed and all were given up.
        if let Some(entry) = entry {
            entry.completed.took = now.saturating_sub(entry.started);
            if SLOW_WRITE < entry.completed.took {
                let Completed { placement, block_bytes, took, .. } = &entry.completed;
                tracing::debug!(
                    shard = self.config.shard.0,
                    segment = placement.segment.0,
                    block_bytes,
                    ?took,
                    "a slow write"
                );
            }
            entry.result = Some(result);
        }
        drop(state);
        self.writing.set(self.writing.get() - 1);
        self.answered.notify_all();
        self.woken.notify();
    }

    /// Waits until the disk has answered every write.
    pub(crate) async fn quiesced(&self) {
        while 0 < self.writing.get() {
            self.answered.changed(self.answered.version()).await;
        }
    }

    /// The next block in order that is durable. After a failure: the error once for every block that was in flight.
    pub(crate) fn completed(&self) -> Option<Result<Completed<P>, (FlushError, P)>> {
        let mut state = self.state.borrow_mut();
        if let Some(error) = state.failed.clone() {
            return state.in_flight.pop_front().map(|entry| Err((error, entry.completed.payload)));
        }
        let result = match state.in_flight.front_mut()?.result.take() {
            None if cfg!(feature = "mutant-early-ack") => Ok(()),
            result => result?,
        };
        let entry = state.in_flight.pop_front().expect("looked at above");
        match result {
            Ok(()) => {
                state.durable_sequence = entry.completed.placement.id.sequence;
                state.durable_end = entry.completed.end;
                state.vouched_sequence = entry.completed.placement.id.durable_sequence;
                Some(Ok(entry.completed))
            }
            Err(error) => {
                state.failed = Some(error.clone());
                Some(Err((error, entry.completed.payload)))
            }
        }
    }

    /// After a failed write, once all blocks in flight were given back: gives up what may hold any of them and has a
    /// fresh segment made ready, in which the journal goes on from the last durable block. `false`: it failed for good.
    pub(crate) fn roll(&self) -> bool {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        assert!(state.in_flight.is_empty(), "{} blocks are in flight", state.in_flight.len());
        let of_the_disk = matches!(state.failed, Some(FlushError::Write { .. }));
        if !of_the_disk || self.stopped.get() || CUTS_MAX <= state.cuts.len() {
            return false;
        }
        let end = state.durable_end;
        for segment in state.segments.iter_mut().flatten().filter(|segment| segment.kind == SegmentKind::Journal) {
            match segment.role {
                Role::Active | Role::Sealed if end.generation <= segment.generation => {
                    segment.role = Role::Sealed;
                    segment.last_sequence = state.durable_sequence;
                    segment.suspect = true;
                }
                // Its header has to say where the journal goes on; another is written.
                Role::Prepared => segment.role = Role::Spare,
                Role::Active | Role::Sealed | Role::Spare | Role::Compacting => {}
            }
        }
        state.failed = None;
        state.rolling = Some(Roll { from_generation: end.generation, sequence: end.next_sequence });
        state.rolls += 1;
        (state.active, state.prepared) = (None, None);
        (state.segment_wanted, state.leave_active) = (true, false);
        (state.next_sequence, state.previous_crc) = (end.next_sequence, end.previous_crc);
        state.mark_sequence = state.mark_sequence.min(state.durable_sequence);
        self.wanted.notify();
        true
    }

    /// Whether the last block holds something, and nothing says that it was durable.
    pub(crate) fn wants_mark(&self) -> bool {
        let state = self.state.borrow();
        let last = state.durable_sequence;
        state.failed.is_none()
            && state.rolling.is_none()
            && state.next_sequence == last + 1
            && state.vouched_sequence.max(state.covered_sequence) < last
            && state.mark_sequence != last
    }

    /// For how long nothing was written.
    pub(crate) fn quiet_for(&self) -> Duration {
        self.io.now().saturating_sub(self.state.borrow().written_at)
    }

    /// The block `sequence`, which is in flight, is a mark.
    pub(crate) fn mark_written(&self, sequence: u64) {
        self.state.borrow_mut().mark_sequence = sequence;
    }

    /// Whether a mark is in flight.
    pub(crate) fn is_marking(&self) -> bool {
        let state = self.state.borrow();
        state.durable_sequence < state.mark_sequence && !state.in_flight.is_empty()
    }

    /// How often a write failed and the journal went on in another segment.
    pub(crate) fn rolls(&self) -> u64 {
        self.state.borrow().rolls
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.state.borrow().in_flight.len()
    }

    pub(crate) fn failed(&self) -> Option<FlushError> {
        self.state.borrow().failed.clone()
    }

    pub(crate) fn is_failed(&self) -> bool {
        self.state.borrow().failed.is_some()
    }

    /// Ends the journal because of what happened elsewhere.
    pub(crate) fn fail(&self, error: FlushError) {
        self.state.borrow_mut().failed.get_or_insert(error);
        self.woken.notify();
    }

    /// Whether `bytes` more can be placed without a segment that does not exist: `false` on a full disk.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        let state = self.state.borrow();
        if !state.full || state.prepared.is_some() {
            return true;
        }
        state.active.is_some_and(|(id, position)| {
            let segment = state.segments[id.0 as usize].as_ref().expect("the active segment exists");
            position + bytes <= segment.bytes
        })
    }

    /// Whether the next block has a place.
    pub(crate) fn has_segment(&self) -> bool {
        let state = self.state.borrow();
        state.active.is_some() || state.prepared.is_some()
    }

    /// Blocks up to `sequence` are never replayed again: dead segments before it may be used again.
    pub(crate) fn set_covered(&self, sequence: u64) {
        let mut state = self.state.borrow_mut();
        state.covered_sequence = state.covered_sequence.max(sequence);
        drop(state);
        self.wanted.notify();
    }

    /// These segments are gone, and the index has extents in them.
    pub(crate) fn set_gone(&self, segments: BTreeSet<SegmentId>) {
        self.state.borrow_mut().gone = segments;
    }

    /// The last whole checkpoint starts in the segment of this generation: dead segments before it may be used again.
    /// Without a call, nothing is kept for the sake of checkpoints.
    pub(crate) fn set_checkpoint(&self, generation: u64) {
        self.state.borrow_mut().checkpoint_generation = generation;
        self.wanted.notify();
    }

    /// The disk has no room for a new segment.
    pub(crate) fn is_full(&self) -> bool {
        self.state.borrow().full
    }

    /// Whether the disk is full and a segment could be used again if the index were made durable.
    pub(crate) fn waits_for_index(&self) -> bool {
        let state = self.state.borrow();
        let state = &*state;
        let unused = |s: &Segment<I::File>| s.role == Role::Sealed && s.live_bytes == 0;
        state.full && state.segments.iter().flatten().any(|s| unused(s) && !state.is_forgotten(s))
    }

    /// Whether the disk is full and a segment could be used again if there were a later checkpoint.
    pub(crate) fn waits_for_checkpoint(&self) -> bool {
        let state = self.state.borrow();
        let state = &*state;
        state.full && state.segments.iter().flatten().any(|s| state.is_forgotten(s) && !state.is_dead(s))
    }

    pub(crate) fn add_live(&self, segment: SegmentId, bytes: u64) {
        if let Some(segment) = self.state.borrow_mut().segments.get_mut(segment.0 as usize).and_then(Option::as_mut) {
            segment.live_bytes += bytes;
        }
    }

    pub(crate) fn remove_live(&self, segment: SegmentId, bytes: u64) {
        if let Some(segment) = self.state.borrow_mut().segments.get_mut(segment.0 as usize).and_then(Option::as_mut) {
            debug_assert!(bytes <= segment.live_bytes, "{bytes} of {} live bytes end", segment.live_bytes);
            segment.live_bytes = segment.live_bytes.saturating_sub(bytes);
        }
    }

    /// Nothing in sealed segments is live any more whose last block is at most `sequence`.
    pub(crate) fn release_through(&self, sequence: u64) {
        for segment in self.state.borrow_mut().segments.iter_mut().flatten() {
            if segment.role == Role::Sealed && segment.last_sequence <= sequence {
                segment.live_bytes = 0;
            }
        }
    }

    /// Segments in use, spare ones, those used again so far, and live bytes.
    pub(crate) fn figures(&self) -> (u64, u64, u64, u64) {
        let state = self.state.borrow();
        let mut figures = (0, 0, state.recycled, 0);
        for segment in state.segments.iter().flatten() {
            match segment.role {
                Role::Spare | Role::Prepared => figures.1 += 1,
                Role::Active | Role::Sealed | Role::Compacting => figures.0 += 1,
            }
            figures.3 += segment.live_bytes;
        }
        figures
    }

    /// Segments that the compactor may take: covered, with something live in them, and before `sequence`. Oldest use
    /// first.
    pub(crate) fn sealed_before(&self, sequence: u64) -> Vec<SealedSegment> {
        let state = self.state.borrow();
        let mut found: Vec<_> = state
            .segments
            .iter()
            .enumerate()
            .filter_map(|(index, segment)| Some((index, segment.as_ref()?)))
            .filter(|(_, segment)| {
                segment.role == Role::Sealed
                    && !segment.pinned
                    && 0 < segment.live_bytes
                    && segment.last_sequence < sequence
                    && segment.last_sequence <= state.covered_sequence
            })
            .map(|(index, segment)| SealedSegment {
                id: SegmentId(index as u32),
                generation: segment.generation,
                bytes: segment.bytes,
                live_bytes: segment.live_bytes,
                kind: segment.kind,
            })
            .collect();
        found.sort_unstable_by_key(|segment| segment.generation);
        found
    }

    /// All sealed segments of the journal before `sequence` with something live in them, and their generations.
    pub(crate) fn live_journal_before(&self, sequence: u64) -> Vec<(SegmentId, u64)> {
        let state = self.state.borrow();
        let all = state.segments.iter().enumerate();
        let all = all.filter_map(|(index, segment)| Some((SegmentId(index as u32), segment.as_ref()?)));
        all.filter(|(_, segment)| {
            segment.role == Role::Sealed
                && segment.kind == SegmentKind::Journal
                && 0 < segment.live_bytes
                && segment.last_sequence < sequence
        })
        .map(|(id, segment)| (id, segment.generation))
        .collect()
    }

    /// Whether these segments may be used again once nothing in them is live.
    pub(crate) fn pin(&self, segments: &[SegmentId], pinned: bool) {
        let mut state = self.state.borrow_mut();
        for id in segments {
            if let Some(segment) = state.segments.get_mut(id.0 as usize).and_then(Option::as_mut) {
                segment.pinned = pinned;
            }
        }
        drop(state);
        self.wanted.notify();
    }

    /// Whether the blocks in the segment are the journal's, numbered over its life.
    pub(crate) fn is_journal(&self, id: SegmentId) -> bool {
        let state = self.state.borrow();
        let segment = state.segments.get(id.0 as usize).and_then(Option::as_ref);
        segment.is_some_and(|segment| segment.kind == SegmentKind::Journal)
    }

    /// When something was last written to the journal.
    pub(crate) fn written_at(&self) -> Duration {
        self.state.borrow().written_at
    }

    /// A segment for the compactor to fill, with its generation and size. `None`: there is no room for one.
    pub(crate) async fn segment_for_compaction(&self) -> Option<(SegmentId, u64, u64)> {
        self.state.borrow_mut().compaction = CompactionSegment::Wanted;
        self.wanted.notify();
        loop {
            let version = self.compaction_answered.version();
            let answer = self.state.borrow().compaction;
            let ready = match answer {
                CompactionSegment::Ready(id) => Some(id),
                CompactionSegment::Wanted if !self.stopped.get() && !self.is_failed() => None,
                CompactionSegment::Wanted | CompactionSegment::Refused | CompactionSegment::NotWanted => return None,
            };
            if let Some(id) = ready {
                let mut state = self.state.borrow_mut();
                state.compaction = CompactionSegment::NotWanted;
                let segment = state.segments[id.0 as usize].as_ref().expect("a segment made ready exists");
                return Some((id, segment.generation, segment.bytes));
            }
            self.compaction_answered.changed(version).await;
        }
    }

    /// The compactor's segment, for [`Journal::write_compacted`].
    pub(crate) async fn open_compacted(&self, id: SegmentId) -> io::Result<Rc<I::File>> {
        self.io.open_for_sync(&segment::path(&self.config.dir, id)).await.map(Rc::new)
    }

    /// Writes to the compactor's segment; durable after [`Journal::sync_compacted`].
    pub(crate) async fn write_compacted(&self, file: &I::File, buffer: Rc<I::Buffer>, position: u64) -> io::Result<()> {
        self.counted(file.write_at(buffer, position)).await
    }

    pub(crate) async fn sync_compacted(&self, file: &I::File) -> io::Result<()> {
        self.counted(file.sync()).await
    }

    /// Whoever closes the journal waits until such work is done.
    async fn counted(&self, work: impl Future<Output = io::Result<()>>) -> io::Result<()> {
        if self.stopped.get() {
            return Err(io::Error::other("the journal is closed"));
        }
        self.writing.set(self.writing.get() + 1);
        let done = work.await;
        self.writing.set(self.writing.get() - 1);
        self.answered.notify_all();
        done
    }

    /// The compactor is done with its segment, which lives as long as something in it does.
    pub(crate) fn seal_compacted(&self, id: SegmentId) {
        let mut state = self.state.borrow_mut();
        if let Some(segment) = state.segments[id.0 as usize].as_mut() {
            segment.role = Role::Sealed;
        }
        state.opened.push_back(id);
        state.close_some();
        drop(state);
        self.wanted.notify();
    }

    /// Which use of a segment this is; `None`: there is no such segment, or it holds nothing.
    pub(crate) fn generation(&self, id: SegmentId) -> Option<u64> {
        let state = self.state.borrow();
        let segment = state.segments.get(id.0 as usize)?.as_ref()?;
        (segment.role != Role::Spare && 0 < segment.generation).then_some(segment.generation)
    }

    /// Sealed segments in which something is live, in the order of their generations: generation, segment, bytes.
    pub(crate) fn live_segments(&self) -> Vec<(u64, SegmentId, u64)> {
        let state = self.state.borrow();
        let all = state.segments.iter().enumerate();
        let live = all.filter_map(|(index, segment)| Some((SegmentId(index as u32), segment.as_ref()?)));
        let live = live.filter(|(_, segment)| segment.role == Role::Sealed && 0 < segment.live_bytes);
        let mut found: Vec<_> = live.map(|(id, segment)| (segment.generation, id, segment.bytes)).collect();
        found.sort_unstable();
        found
    }

    /// Whether a write has been under way for longer than `limit`: background work makes room.
    pub(crate) fn is_late(&self, limit: Duration) -> bool {
        let state = self.state.borrow();
        let unanswered = state.in_flight.iter().find(|entry| entry.result.is_none());
        unanswered.is_some_and(|entry| entry.started + limit < self.io.now())
    }

    /// The file of a segment, opened when it is not open.
    pub(crate) async fn file(&self, id: SegmentId) -> io::Result<Rc<I::File>> {
        {
            let state = self.state.borrow();
            let segment = state.segments.get(id.0 as usize).and_then(Option::as_ref);
            let segment = segment.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
            if let Some(file) = &segment.file {
                return Ok(file.clone());
            }
        }
        let file = Rc::new(self.io.open(&segment::path(&self.config.dir, id)).await?);
        let mut state = self.state.borrow_mut();
        if let Some(segment) = state.segments.get_mut(id.0 as usize).and_then(Option::as_mut) {
            match &segment.file {
                Some(opened) => return Ok(opened.clone()),
                None => segment.file = Some(file.clone()),
            }
            state.opened.push_back(id);
            state.close_some();
        }
        Ok(file)
    }

    /// Ends [`Journal::run`].
    pub(crate) fn stop(&self) {
        self.stopped.set(true);
        self.wanted.notify();
        self.compaction_answered.notify_all();
    }

    /// Has a segment ready when one is needed, until [`Journal::stop`].
    pub(crate) async fn run(self: Rc<Self>) {
        while !self.stopped.get() && !self.is_failed() {
            self.keeping.set(true);
            let pause = self.keep().await;
            self.keeping.set(false);
            self.answered.notify_all();
            match pause {
                Pause::None => {}
                Pause::Retry => self.io.sleep(RETRY).await,
                Pause::Quiet => self.wanted_or(QUIET).await,
                Pause::Wanted => self.wanted.notified().await,
            }
        }
        self.compaction_answered.notify_all();
    }

    /// After [`Journal::stop`]: waits until no file is made or removed any more. Whoever opens the directory next must not
    /// meet somebody else in it.
    pub(crate) async fn kept(&self) {
        while self.keeping.get() {
            self.answered.changed(self.answered.version()).await;
        }
    }

    /// Does what is due first.
    async fn keep(&self) -> Pause {
        if self.is_rolling() {
            return self.finish_roll().await;
        }
        if self.needs_segment() {
            if let Err(error) = self.prepare().await {
                tracing::error!(shard = self.config.shard.0, error = %error, "no journal segment could be made");
                self.state.borrow_mut().full = true;
            }
            return if self.state.borrow().full { Pause::Retry } else { Pause::None };
        }
        if self.state.borrow().compaction == CompactionSegment::Wanted {
            self.prepare_for_compaction().await;
            return Pause::None;
        }
        if let Some(id) = self.surplus() {
            return match self.remove(id).await {
                Ok(()) => Pause::None,
                Err(error) => {
                    tracing::warn!(shard = self.config.shard.0, error = %error, "a dead segment could not be removed");
                    Pause::Retry
                }
            };
        }
        if self.needs_spare() {
            if !self.is_quiet() {
                return Pause::Quiet;
            }
            return match self.fill_spare().await {
                Ok(()) => Pause::None,
                Err(error) => {
                    tracing::warn!(shard = self.config.shard.0, error = %error, "no spare segment could be made");
                    Pause::Retry
                }
            };
        }
        // More than are kept once it is quiet, which nobody tells.
        if self.has_many_dead() { Pause::Quiet } else { Pause::Wanted }
    }

    fn is_rolling(&self) -> bool {
        self.state.borrow().rolling.is_some()
    }

    /// Makes the segment ready that takes over. The write of its header is what tells whether the disk answers: if it
    /// fails, too, the journal is at its end.
    async fn finish_roll(&self) -> Pause {
        // Late answers must not be taken for those of blocks that get the same sequences.
        self.quiesced().await;
        match self.prepare().await {
            Ok(()) if !self.is_rolling() => {
                tracing::warn!(shard = self.config.shard.0, "the journal goes on in a fresh segment");
                self.woken.notify();
                Pause::None
            }
            Ok(()) => Pause::Retry,
            Err(error) => {
                tracing::error!(shard = self.config.shard.0, error = %error, "the disk fails; nothing is written any more");
                self.fail(FlushError::Roll { message: error.to_string() });
                Pause::None
            }
        }
    }

    /// Waits for `time`, or until somebody wants a segment: under load one lasts for milliseconds.
    async fn wanted_or(&self, time: Duration) {
        futures_lite::future::or(self.wanted.notified(), self.io.sleep(time)).await;
    }

    fn needs_segment(&self) -> bool {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        // A new journal starts in a segment that was merely allocated. Once there is a written one it moves over,
        // unless it has come too far to leave the rest of the segment empty.
        // One of another size, from before a change of the configuration, is never taken.
        let filled =
            state.segments.iter().flatten().any(|segment| {
                segment.role == Role::Spare && segment.filled && segment.bytes == self.config.segment_bytes
            });
        if let Some(id) = state.prepared {
            let segment = state.segments[id.0 as usize].as_mut().expect("a prepared segment exists");
            if segment.filled || !filled {
                return false;
            }
            segment.role = Role::Spare;
            state.prepared = None;
            return true;
        }
        let early = state.active.is_some_and(|(id, position)| {
            let segment = state.segments[id.0 as usize].as_ref().expect("the active segment exists");
            !segment.filled && position < segment.bytes / 64
        });
        if filled && early {
            state.leave_active = true;
            return true;
        }
        // While the active segment is nearly empty there is time to fill a spare first.
        state.segment_wanted
            || state.active.is_none_or(|(id, position)| {
                let segment = state.segments[id.0 as usize].as_ref().expect("the active segment exists");
                segment.bytes / 4 < position
            })
    }

    fn needs_spare(&self) -> bool {
        let state = self.state.borrow();
        let dead = state.segments.iter().flatten().filter(|segment| state.is_dead(segment)).count();
        let spare = state.segments.iter().flatten().filter(|segment| segment.role == Role::Spare).count();
        !state.full && dead + spare + usize::from(state.prepared.is_some()) < self.config.segments_spare
    }

    fn has_many_dead(&self) -> bool {
        let state = self.state.borrow();
        let dead = state.segments.iter().flatten().filter(|segment| state.is_dead(segment)).count();
        self.config.segments_spare + DEAD_KEPT < dead
    }

    /// A dead segment that nobody will need soon, or that has not the size of today's.
    fn surplus(&self) -> Option<SegmentId> {
        let state = self.state.borrow();
        let dead = |segment: &&Option<Segment<I::File>>| segment.as_ref().is_some_and(|s| state.is_dead(s));
        let odd = state.segments.iter().position(|segment| {
            let unused = |s: &Segment<I::File>| s.role == Role::Spare || state.is_dead(s);
            segment.as_ref().is_some_and(|s| unused(s) && s.bytes != self.config.segment_bytes)
        });
        let kept = if self.is_quiet() { DEAD_KEPT } else { DEAD_KEPT_BUSY };
        let many = self.config.segments_spare + kept < state.segments.iter().filter(dead).count();
        let suspect = state.segments.iter().position(|s| s.as_ref().is_some_and(|s| state.is_dead(s) && s.suspect));
        let found = suspect.or(odd).or_else(|| state.segments.iter().rposition(|s| dead(&s)).filter(|_| many));
        found.map(|index| SegmentId(index as u32))
    }

    async fn remove(&self, id: SegmentId) -> io::Result<()> {
        self.io.remove(&segment::path(&self.config.dir, id)).await?;
        let mut state = self.state.borrow_mut();
        // Whoever still reads from it holds the file.
        state.segments[id.0 as usize] = None;
        state.opened.retain(|opened| *opened != id);
        Ok(())
    }

    fn is_quiet(&self) -> bool {
        let state = self.state.borrow();
        state.in_flight.is_empty() && state.written_at + QUIET <= self.io.now()
    }

    /// Makes the first segment of a new journal ready, or the next.
    pub(crate) async fn prepare(&self) -> io::Result<()> {
        self.prepare_for(SegmentKind::Journal).await
    }

    async fn prepare_for_compaction(&self) {
        if let Err(error) = self.prepare_for(SegmentKind::Compacted).await {
            tracing::warn!(shard = self.config.shard.0, error = %error, "no segment could be made for compaction");
        }
        let mut state = self.state.borrow_mut();
        if state.compaction == CompactionSegment::Wanted {
            state.compaction = CompactionSegment::Refused;
        }
        drop(state);
        self.compaction_answered.notify_all();
    }

    async fn prepare_for(&self, kind: SegmentKind) -> io::Result<()> {
        let found = {
            let mut state = self.state.borrow_mut();
            let state = &mut *state;
            let dead = state.segments.iter().position(|segment| {
                segment.as_ref().is_some_and(|s| state.is_dead(s) && s.bytes == self.config.segment_bytes && !s.suspect)
            });
            let spare = || {
                let spare = |s: &Segment<I::File>| s.role == Role::Spare && s.bytes == self.config.segment_bytes;
                let spares = state.segments.iter().enumerate().filter(|(_, s)| s.as_ref().is_some_and(spare));
                let best = spares.max_by_key(|(_, s)| s.as_ref().is_some_and(|s| s.filled));
                best.map(|(index, _)| index)
            };
            state.recycled += u64::from(dead.is_some());
            // Spares are for the journal: compaction has the time to make a segment.
            let spare = if kind == SegmentKind::Journal { spare() } else { None };
            dead.or(spare).map(|index| SegmentId(index as u32))
        };
        tracing::debug!(shard = self.config.shard.0, ?found, "making the next segment ready");
        let id = match found {
            Some(id) => id,
            // That there is no room for compaction does not mean that the journal has none.
            None if kind == SegmentKind::Compacted && !self.has_free_room().await? => return Ok(()),
            None => match self.create().await? {
                Some(id) => id,
                None => return Ok(()),
            },
        };
        let file = self.file(id).await?;
        let (generation, cuts, rolls, bytes) = {
            let mut state = self.state.borrow_mut();
            state.generation +=
                if cfg!(feature = "mutant-reuse-generation") { u64::from(state.generation == 0) } else { 1 };
            // Cuts are about the chain, which compacted segments are no part of.
            let cuts = match kind {
                SegmentKind::Journal => state.cuts_for(id, state.generation),
                SegmentKind::Compacted => Vec::new(),
            };
            let bytes = state.segments[id.0 as usize].as_ref().map_or(0, |segment| segment.bytes);
            (state.generation, cuts, state.rolls, bytes)
        };
        let mut buffer = self.io.buffer(ALIGNMENT);
        let header = SegmentHeader { shard: self.config.shard, segment: id, generation, kind, bytes };
        segment::encode(&header, buffer.as_mut());
        segment::encode_cuts(&cuts, buffer.as_mut());
        file.write_at(Rc::new(buffer), 0).await?;
        let mut state = self.state.borrow_mut();
        let rolled = state.rolls != rolls;
        state.opened.retain(|opened| *opened != id);
        let segment = state.segments[id.0 as usize].as_mut().expect("found or made above");
        segment.generation = generation;
        segment.kind = kind;
        segment.cuts.clone_from(&cuts);
        if rolled && kind == SegmentKind::Journal {
            // A write failed in the meantime, and this header does not say so.
            segment.role = Role::Spare;
            return Ok(());
        }
        segment.live_bytes = 0;
        segment.last_sequence = 0;
        segment.file = Some(file);
        match kind {
            SegmentKind::Journal => {
                segment.role = Role::Prepared;
                state.prepared = Some(id);
                state.full = false;
                state.cuts = cuts;
                state.rolling = None;
            }
            SegmentKind::Compacted => {
                segment.role = Role::Compacting;
                state.compaction = CompactionSegment::Ready(id);
            }
        }
        drop(state);
        tracing::debug!(shard = self.config.shard.0, segment = id.0, "the next segment is ready");
        self.woken.notify();
        Ok(())
    }

    async fn has_free_room(&self) -> io::Result<bool> {
        let free_bytes = self.io.free_bytes(&self.config.dir).await?;
        Ok(self.config.disk_reserve_bytes.saturating_add(self.config.segment_bytes) <= free_bytes)
    }

    /// A new file. `None`: the disk has no room above the reserve.
    async fn create(&self) -> io::Result<Option<SegmentId>> {
        let config = &self.config;
        let free_bytes = self.io.free_bytes(&config.dir).await?;
        if free_bytes < config.disk_reserve_bytes.saturating_add(config.segment_bytes) {
            let mut state = self.state.borrow_mut();
            if !state.full {
                tracing::error!(shard = config.shard.0, free_bytes, "the disk has no room for a journal segment");
            }
            state.full = true;
            return Ok(None);
        }
        let id = {
            let mut state = self.state.borrow_mut();
            let state = &mut *state;
            let is_free = |index: &usize| {
                state.segments.get(*index).is_none_or(Option::is_none)
                    && !state.gone.contains(&SegmentId(*index as u32))
            };
            let index = (0..).find(is_free).expect("there are more numbers than segments");
            if state.segments.len() <= index {
                state.segments.resize_with(index + 1, || None);
            }
            SegmentId(index as u32)
        };
        let path = segment::path(&config.dir, id);
        let file = match self.io.create(&path, config.segment_bytes).await {
            Ok(file) => file,
            Err(error) => {
                // A file made in part must not stand in the way of the next try.
                drop(self.io.remove(&path).await);
                return Err(error);
            }
        };
        if !cfg!(feature = "mutant-no-dir-sync") {
            self.io.sync_dir(&config.dir).await?;
        }
        self.state.borrow_mut().segments[id.0 as usize] = Some(Segment {
            generation: 0,
            bytes: config.segment_bytes,
            cut_off_bytes: 0,
            file: Some(Rc::new(file)),
            live_bytes: 0,
            last_sequence: 0,
            role: Role::Spare,
            filled: false,
            kind: SegmentKind::Journal,
            pinned: false,
            cuts: Vec::new(),
            suspect: false,
            unread: false,
        });
        Ok(Some(id))
    }

    /// Makes a spare segment and writes all of it, so that later writes change no metadata of the file system.
    async fn fill_spare(&self) -> io::Result<()> {
        let Some(id) = self.create().await? else {
            return Ok(());
        };
        let file = self.file(id).await?;
        let mut buffer = self.io.buffer(FILL_BYTES);
        buffer.as_mut().fill(0);
        let buffer = Rc::new(buffer);
        let mut position = 0;
        while position + (FILL_BYTES as u64) <= self.config.segment_bytes {
            if self.stopped.get() || self.needs_segment() {
                // It is needed before it is done; the rest is written as it is.
                return Ok(());
            }
            if !self.is_quiet() {
                self.wanted_or(QUIET / 4).await;
                continue;
            }
            file.write_at(buffer.clone(), position).await?;
            position += FILL_BYTES as u64;
        }
        if let Some(segment) = self.state.borrow_mut().segments[id.0 as usize].as_mut() {
            segment.filled = true;
        }
        Ok(())
    }
}

impl<I: Io, P> State<I, P> {
    fn placement(&self, shard: ShardId, segment: SegmentId, position: u64) -> Placement {
        let generation = self.segments[segment.0 as usize].as_ref().expect("a placed segment exists").generation;
        let id = BlockId {
            kind: SegmentKind::Journal,
            shard,
            generation,
            sequence: self.next_sequence,
            durable_sequence: self.durable_sequence,
            previous_crc: self.previous_crc,
        };
        Placement { id, segment, position }
    }

    /// What the header of a segment that is made ready says: the cuts that still matter, and the one of this roll.
    fn cuts_for(&self, id: SegmentId, generation: u64) -> Vec<Cut> {
        let covered = |cut: &&Cut| {
            let mut others = self.segments.iter().enumerate().filter(|(index, _)| *index != id.0 as usize);
            others.any(|(_, segment)| segment.as_ref().is_some_and(|segment| cut.covers(segment.generation)))
        };
        let mut cuts: Vec<Cut> = self.cuts.iter().filter(covered).copied().collect();
        if let Some(Roll { from_generation, sequence }) = self.rolling {
            cuts.push(Cut { from_generation, generation, sequence });
        }
        cuts
    }

    fn is_dead(&self, segment: &Segment<I::File>) -> bool {
        // Only the journal's own blocks repeat rows and change them.
        let needed = segment.kind == SegmentKind::Journal && self.checkpoint_generation <= segment.generation;
        self.is_forgotten(segment) && !needed
    }

    /// Nothing in it is live or will be replayed.
    fn is_forgotten(&self, segment: &Segment<I::File>) -> bool {
        segment.role == Role::Sealed
            && segment.live_bytes == 0
            && segment.last_sequence <= self.covered_sequence
            && !segment.pinned
    }

    fn close_some(&mut self) {
        while OPEN_SEALED_MAX < self.opened.len() {
            let id = self.opened.pop_front().expect("longer than the limit");
            if let Some(segment) = self.segments[id.0 as usize].as_mut().filter(|s| s.role == Role::Sealed) {
                // Whoever reads from it or writes to it holds a reference.
                segment.file = None;
            }
        }
    }
}
