//! Reading a journal back: which segments there are, and what was written after a known block.
//!
//! Replay follows the chain: the next block has the next sequence, the generation of its segment and the checksum of
//! the block before it. Where the chain ends there is either nothing more (a torn tail at most), or damage:
//!
//! - Acks go out in order, and each block says up to which block all was durable when it was written. So a bad block
//!   that a later one calls durable was once whole: that is damage, and what it held may have been acknowledged. Its
//!   range is skipped, reported, and never written over while the segment lives.
//! - A bad block that no later one calls durable was never acknowledged: the journal goes on in its place. Blocks that
//!   were in flight behind it cannot come back, because they do not chain to what is written there.
//!
//! After a failed write the journal went on in another segment, whose header cuts off what was in flight: such blocks
//! are as good as not there, whole or not, and the chain goes on in that segment.

use std::path::Path;
use std::rc::Rc;

use drava_protocol::{ShardId, batch};

use crate::block::{self, BlockHeader, BlockId, BlockWriter, EXTENT_HEADER_BYTES, ExtentHeader, ExtentKind};
use crate::index::Covered;
use crate::io::{ALIGNMENT, File, Io};
use crate::journal::{JournalEnd, Role, Segment, highest_generation};
use crate::rebuild::Rebuild;
use crate::segment::{self, COUNTER_MAX, Cut, SegmentError, SegmentHeader, SegmentId, SegmentKind};
use crate::store::{DamagedRange, LostRange, OpenError, TornTail};

const CHUNK_BYTES: usize = 1 << 20;
const WINDOW_BYTES_MIN: usize = 256 << 10;
const WINDOW_BYTES_MAX: usize = 8 << 20;
/// In a segment behind that of a bad block, the first whole block is looked for up to here.
const LOOK_AHEAD_BYTES: u64 = 4 << 20;
/// How much of a damaged range is searched for what it held.
const LOST_BYTES_MAX: u64 = 16 << 20;
/// Segment headers read at a time.
const SURVEY_IN_FLIGHT: usize = 32;

pub(crate) fn open_error(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> OpenError {
    let what = what.into();
    move |source| OpenError::Io { what, source }
}

/// Opens the directory and reads the header of every segment. Those whose header cannot be believed have generation and kind
/// from their blocks or from `known`, which has them for what is in use. What neither knows has generation 0: nothing is read
/// from it, and it is used again.
pub(crate) async fn survey<I: Io>(
    io: &I,
    dir: &Path,
    shard: ShardId,
    known: &dyn Fn(SegmentId) -> Option<(u64, SegmentKind)>,
) -> Result<Vec<Option<Segment<I::File>>>, OpenError> {
    io.create_dir(dir).await.map_err(open_error(format!("make {}", dir.display())))?;
    // A process that died may have made a name here and not made it durable; what is written under it now must not go
    // with the name.
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    for dir in [Some(dir), parent].into_iter().flatten() {
        io.sync_dir(dir).await.map_err(open_error(format!("sync {}", dir.display())))?;
    }
    let files = io.list(dir).await.map_err(open_error(format!("list {}", dir.display())))?;
    let mut found: Vec<(SegmentId, u64)> =
        files.iter().filter_map(|(path, bytes)| Some((segment::parse_name(path)?, *bytes))).collect();
    found.sort_unstable();
    let mut segments: Vec<Option<Segment<I::File>>> = Vec::new();
    for group in found.chunks(SURVEY_IN_FLIGHT) {
        let reads: Vec<_> = group
            .iter()
            .map(|&(id, bytes)| {
                let path = segment::path(dir, id);
                async move {
                    // What is behind the last whole block of the file system, nobody wrote.
                    let whole_bytes = bytes - bytes % ALIGNMENT as u64;
                    if whole_bytes < segment::HEADER_BYTES {
                        // It was being made when the node stopped.
                        io.remove(&path).await.map_err(open_error(format!("remove {}", path.display())))?;
                        return Ok(None);
                    }
                    let file = io.open(&path).await.map_err(open_error(format!("open {}", path.display())))?;
                    let head = file.read_at(0, ALIGNMENT).await;
                    let is_short = whole_bytes < 2 * segment::HEADER_BYTES || whole_bytes != bytes;
                    if is_short && matches!(head.as_ref().map(|head| segment::decode(head)), Ok(Ok(None))) {
                        // It was being made, too: zeros, of which the last were written in part.
                        io.remove(&path).await.map_err(open_error(format!("remove {}", path.display())))?;
                        return Ok(None);
                    }
                    let bytes = whole_bytes;
                    let mut cut_off_bytes = 0;
                    let cuts = head.as_ref().ok().map(|head| segment::decode_cuts(head));
                    let header = head.map(|head| segment::decode(&head));
                    let unread = !matches!(header, Ok(Ok(_)));
                    let stated = match header {
                        Ok(Ok(None)) => None,
                        Ok(Ok(Some(header))) if header.shard == shard && header.segment == id => {
                            cut_off_bytes = header.bytes.saturating_sub(bytes);
                            Some((header.generation, header.kind))
                        }
                        Ok(Ok(Some(header))) => {
                            let reason = format!("it belongs to shard {} as {}", header.shard, header.segment);
                            return Err(OpenError::Segment { path, reason });
                        }
                        Ok(Err(error @ (SegmentError::Version(_) | SegmentError::Kind(_)))) => {
                            return Err(OpenError::Segment { path, reason: error.to_string() });
                        }
                        Ok(Err(error)) => {
                            tracing::error!(path = %path.display(), error = %error, "a segment header is unusable");
                            None
                        }
                        // It may hold what was acknowledged. Whoever cannot read it must not take it for empty.
                        Err(source) if known(id).is_none() => {
                            return Err(OpenError::Io { what: format!("read the header of {}", path.display()), source });
                        }
                        Err(error) => {
                            tracing::error!(path = %path.display(), error = %error, "a segment header cannot be read");
                            None
                        }
                    };
                    let mut use_of_it = stated;
                    if use_of_it.is_none() {
                        // The blocks say what the header said, and so does the index, which may not know of the last use yet.
                        let found = use_by_blocks(&file, bytes, shard).await;
                        let found = found.map_err(open_error(format!("read {}", path.display())))?;
                        use_of_it = found.into_iter().chain(known(id)).max_by_key(|(generation, _)| *generation);
                        if let Some((generation, _)) = use_of_it {
                            tracing::error!(path = %path.display(), generation, "a segment in use has no header");
                        }
                    }
                    let (generation, kind) = use_of_it.unwrap_or_default();
                    if COUNTER_MAX < generation {
                        let reason = format!("generation {generation} is beyond all that are given out");
                        return Err(OpenError::Segment { path, reason });
                    }
                    let cuts = match cuts {
                        Some(Ok(cuts)) if 0 < generation => cuts,
                        Some(Err(error)) if 0 < generation => {
                            tracing::error!(path = %path.display(), error = %error, "the cuts of a segment are unusable");
                            Vec::new()
                        }
                        Some(_) | None => Vec::new(),
                    };
                    let role = if generation == 0 { Role::Spare } else { Role::Sealed };
                    // Closed again: there may be more segments than a process may have open.
                    let filled = 0 < generation;
                    let segment = Segment {
                        generation,
                        bytes,
                        cut_off_bytes,
                        file: None,
                        live_bytes: 0,
                        last_sequence: 0,
                        role,
                        filled,
                        kind,
                        pinned: false,
                        cuts,
                        suspect: false,
                        unread,
                    };
                    Ok(Some((id, segment)))
                }
            })
            .collect();
        for read in all(reads).await {
            if let Some((id, segment)) = read? {
                let index = id.0 as usize;
                if segments.len() <= index {
                    segments.resize_with(index + 1, || None);
                }
                segments[index] = Some(segment);
            }
        }
    }
    Ok(segments)
}

/// What the first whole blocks say of the use of their segment: of several uses the last.
async fn use_by_blocks<F: File>(file: &F, bytes: u64, shard: ShardId) -> std::io::Result<Option<(u64, SegmentKind)>> {
    let mut found: Option<BlockHeader> = None;
    let end_position = bytes.min(segment::HEADER_BYTES + LOOK_AHEAD_BYTES);
    for start in (segment::HEADER_BYTES..end_position).step_by(CHUNK_BYTES) {
        let chunk = file.read_at(start, CHUNK_BYTES.min((end_position - start) as usize)).await?;
        for (page, head) in chunk.chunks(ALIGNMENT).enumerate() {
            let position = start + (page * ALIGNMENT) as u64;
            let header = block::header(head).ok().filter(|header| header.id.shard == shard);
            let newer = header.filter(|header| found.is_none_or(|found| found.id.generation < header.id.generation));
            let Some(header) = newer.filter(|header| position + header.block_bytes as u64 <= bytes) else { continue };
            if block::check(&file.read_at(position, header.block_bytes as usize).await?).is_ok() {
                found = Some(header);
            }
        }
    }
    Ok(found.map(|header| (header.id.generation, header.id.kind)))
}

/// Runs futures beside one another on this task.
pub(crate) async fn all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|cx| {
        let mut pending = false;
        for (future, output) in &mut futures {
            if output.is_none() {
                match future.as_mut().poll(cx) {
                    std::task::Poll::Ready(value) => *output = Some(value),
                    std::task::Poll::Pending => pending = true,
                }
            }
        }
        if pending { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    futures.into_iter().map(|(_, output)| output.expect("all are ready")).collect()
}

/// One block as replay gives it to its visitor.
pub(crate) struct Visited<'a> {
    pub(crate) segment: SegmentId,
    pub(crate) position: u64,
    pub(crate) header: BlockHeader,
    pub(crate) bytes: &'a [u8],
    pub(crate) extents: &'a [VisitedExtent],
    /// The headers of all good batches of the block.
    pub(crate) batches: &'a [batch::Header],
}

#[derive(Clone, Debug)]
pub(crate) struct VisitedExtent {
    pub(crate) header: ExtentHeader,
    /// Of its header, from the start of the block.
    pub(crate) position: usize,
    /// In `Visited::batches`.
    pub(crate) batches: std::ops::Range<usize>,
}

impl VisitedExtent {
    pub(crate) fn body<'a>(&self, block: &'a [u8]) -> &'a [u8] {
        let start = self.position + EXTENT_HEADER_BYTES;
        &block[start..start + self.header.body_bytes as usize]
    }
}

#[derive(Debug, Default)]
pub(crate) struct Replayed {
    pub(crate) blocks: u64,
    pub(crate) bytes: u64,
    pub(crate) damaged: Vec<DamagedRange>,
    pub(crate) torn: Option<TornTail>,
    /// Where the journal goes on; `None` when there is no segment with blocks.
    pub(crate) end: Option<JournalEnd>,
}

/// Who hears what replay finds.
pub(crate) trait Visitor {
    /// A block, in order.
    fn block(&mut self, block: &Visited<'_>);

    /// An extent of a damaged block, as far as its header can still be read: the messages are gone, but their offsets
    /// were given out.
    fn lost(&mut self, extent: &ExtentHeader);

    /// Segments whose blocks all lie up to this one may have been used again: that they are not there is no damage.
    fn may_be_gone(&self) -> u64 {
        0
    }

    /// Called between blocks.
    fn pause(&mut self) -> impl Future<Output = Result<(), OpenError>> {
        std::future::ready(Ok(()))
    }
}

/// Reads all blocks from `covered` on, or all there are. Sealed: the journal was closed in good order there, so that
/// nothing but a block right behind it can follow.
pub(crate) async fn replay<I: Io>(
    io: &I,
    dir: &Path,
    shard: ShardId,
    segments: &mut [Option<Segment<I::File>>],
    covered: Option<Covered>,
    visitor: &mut impl Visitor,
) -> Result<Replayed, OpenError> {
    let start = covered.map(|covered| covered.end);
    let sealed = covered.is_some_and(|covered| covered.sealed);
    let mut order: Vec<(u64, SegmentId)> = segments
        .iter()
        .enumerate()
        .filter_map(|(index, segment)| Some((segment.as_ref()?, SegmentId(index as u32))))
        .filter(|(segment, _)| segment.kind == SegmentKind::Journal)
        .map(|(segment, id)| (segment.generation, id))
        .filter(|(generation, _)| 0 < *generation)
        .collect();
    order.sort_unstable();
    let mut replayed = Replayed::default();
    let mut at = match start {
        Some(start) => order.partition_point(|(generation, _)| *generation < start.generation),
        None => 0,
    };
    if at == order.len() {
        replayed.end = start;
        replayed.damaged = cut_off(segments);
        return Ok(replayed);
    }
    let mut chain = Chain { sequence: start.map(|start| start.next_sequence), crc: start.map(|s| s.previous_crc) };
    let mut position = start
        .filter(|start| start.names_a_segment() && order[at] == (start.generation, start.segment))
        .map_or(segment::HEADER_BYTES, |start| start.position);
    let mut reader = Reader::open(io, dir, segments, order[at], shard).await?;
    let mut block = Parsed::default();
    let mut stale = Vec::new();
    let mut detour: Option<Detour> = None;
    let mut gaps = Vec::new();
    // The highest that a block was taken up to, with its segment in the order.
    let mut taken = (at, 0);
    // Without an index any block fits at the start: a copy that a misdirected write left there would hide those before it.
    let lowest = if start.is_none() { lowest_sequence(&mut reader, &mut block).await? } else { None };
    loop {
        // Without an index, a segment counts for nothing when the very first write to the journal failed in it. Nor does one
        // whose first write failed: it takes over and is taken over, with the same block.
        while let Some(next) = taken_over(segments, &order[at..], chain.sequence.unwrap_or(1)) {
            chain = Chain { sequence: chain.sequence.or(Some(1)), crc: chain.sequence.map_or(Some(0), |_| chain.crc) };
            // Nothing more of this segment counts: the journal went on in another, with this block.
            reader.sync().await?;
            at += next;
            position = segment::HEADER_BYTES;
            reader = Reader::open(io, dir, segments, order[at], shard).await?;
            replayed.end = Some(JournalEnd {
                segment: order[at].1,
                generation: order[at].0,
                position,
                next_sequence: chain.sequence.expect("looked at above"),
                previous_crc: chain.crc.unwrap_or(0),
            });
        }
        // The end is where the last good block ended.
        let mut problem = reader.block(position, &mut block).await?.and_then(|()| chain.fits(&block));
        let hidden = lowest.zip(block.header).is_some_and(|(lowest, header)| lowest < header.id.sequence);
        if chain.sequence.is_none() && hidden {
            problem = Err(Misfit::Damaged);
        }
        let Err(problem) = problem else {
            let header = block.header.expect("parsed");
            if chain.sequence.is_none() && 1 < header.id.sequence {
                let place = damaged_place(order[at], position..position);
                gaps.push(Gap { sequences: 1..header.id.sequence, places: vec![place] });
            }
            visitor.block(&Visited {
                segment: order[at].1,
                position,
                header,
                bytes: &reader.window[(position - reader.start) as usize..][..header.block_bytes as usize],
                extents: &block.extents,
                batches: &block.batches,
            });
            replayed.blocks += 1;
            replayed.bytes += header.block_bytes as u64;
            let start_position = position;
            position += header.block_bytes as u64;
            chain = Chain { sequence: Some(header.id.sequence + 1), crc: Some(header.crc) };
            replayed.end = Some(JournalEnd {
                segment: order[at].1,
                generation: order[at].0,
                position,
                next_sequence: header.id.sequence + 1,
                previous_crc: header.crc,
            });
            seal(segments, order[at].1, header.id.sequence);
            taken = (at, if taken.0 == at { position.max(taken.1) } else { position });
            if block.damaged {
                // It is one of those found behind a bad block, or bad itself.
                note_bad_batches(&mut replayed.damaged, order[at], (start_position, position), &block);
                // A part of it may have strayed here: then it claims room that belongs to the next.
                let claimed = start_position..position;
                position = next_within(&mut reader, claimed, &header).await?.unwrap_or(position);
            }
            if let Some(back) = detour.take_if(|detour| detour.behind <= header.id.sequence) {
                position = if back.behind == header.id.sequence { back.position } else { position };
            }
            visitor.pause().await?;
            continue;
        };
        let found = block.header.map(|header| header.id.sequence);
        tracing::debug!(segment = order[at].1.0, position, expected = chain.sequence, found, ?problem, "no next block");
        if sealed && replayed.blocks == 0 && problem == Misfit::Nothing {
            break;
        }
        // A segment ends where another goes on: the next, unless that was made ready and never used.
        let mut moved = false;
        // Without an index any block would fit, and the rest of a segment whose first block is bad would be passed by: then
        // only the very first block of a journal is taken.
        let known = if chain.sequence.is_some() { &chain } else { &Chain { sequence: Some(1), crc: Some(0) } };
        for (index, &next) in order.iter().enumerate().skip(at + 1) {
            let mut next_reader = Reader::open(io, dir, segments, next, shard).await?;
            let fits = next_reader.block(segment::HEADER_BYTES, &mut block).await?.and_then(|()| known.fits(&block));
            if fits.is_ok() {
                reader.sync().await?;
                (at, position, reader, moved) = (index, segment::HEADER_BYTES, next_reader, true);
                chain = Chain { sequence: known.sequence, crc: known.crc };
                break;
            }
        }
        if moved {
            continue;
        }
        let found = find_later(io, dir, segments, &order, (at, position), &chain, &mut reader).await?;
        stale = found.stale;
        let Some(later) = found.later else {
            if problem != Misfit::Nothing {
                replayed.torn = Some(TornTail { segment: order[at].1.0, position });
            }
            break;
        };
        detour = later.detour;
        let jump = later.at != at;
        let here = !jump && later.position == position && later.ends.is_none();
        // Nothing bad was seen: what is missing was in segments that are not there.
        let absent = if jump { problem == Misfit::Nothing } else { here && position == segment::HEADER_BYTES };
        let end_position = if jump {
            reader.bytes
        } else if here && !absent {
            later.position + later.block_bytes
        } else {
            later.position
        };
        let sequences = chain.sequence.unwrap_or(1)..later.ends.unwrap_or(later.sequence);
        let mut skipped = vec![(at, position..end_position)];
        if jump && segment::HEADER_BYTES < later.position {
            // What is missing may have been at the start of the other as well.
            skipped.push((later.at, segment::HEADER_BYTES..later.position));
            if problem == Misfit::Nothing {
                skipped.remove(0);
            }
        }
        let mut places = Vec::new();
        for (index, positions) in skipped.into_iter().filter(|(_, positions)| absent || !positions.is_empty()) {
            let mut place = damaged_place(order[index], positions);
            if !sequences.is_empty() {
                let mut other;
                let from = if index == at {
                    &mut reader
                } else {
                    other = Reader::open(io, dir, segments, order[index], shard).await?;
                    &mut other
                };
                let lost_bytes = (place.end_position - place.start_position).min(LOST_BYTES_MAX) as usize;
                lost_extents(from.at(place.start_position, lost_bytes).await?, &sequences, &mut place.lost, visitor);
            }
            places.push(place);
        }
        let gap = Gap { sequences, places };
        if absent {
            gaps.push(gap);
        } else {
            gap.report(shard, &mut replayed.damaged);
        }
        if jump {
            reader.sync().await?;
            at = later.at;
            reader = Reader::open(io, dir, segments, order[at], shard).await?;
        }
        position = later.position;
        let (generation, segment) = order[at];
        let next_sequence = later.ends.unwrap_or(later.sequence);
        if later.ends.is_some() || later.block_bytes == 0 {
            // Nobody can check the link to a block that is not whole.
            replayed.end = Some(JournalEnd { segment, generation, position, next_sequence, previous_crc: 0 });
        }
        if later.ends.is_some() {
            replayed.torn = Some(TornTail { segment: segment.0, position });
            break;
        }
        chain = Chain { sequence: Some(later.sequence), crc: None };
    }
    if replayed.end.is_none() {
        // Of a segment that is gone, or of none, the position is no place to write to.
        let is_here = |start: &JournalEnd| (start.generation, start.segment) == order[at] && start.names_a_segment();
        replayed.end = start.filter(is_here).or(Some(JournalEnd {
            segment: order[at].1,
            generation: order[at].0,
            position: segment::HEADER_BYTES,
            next_sequence: start.map_or(1, |start| start.next_sequence),
            previous_crc: start.map_or(0, |start| start.previous_crc),
        }));
    }
    reader.sync().await?;
    if let Some(end) = replayed.end.as_mut().filter(|_| taken.0 == at) {
        // A copy behind the end was taken for a block that is bad in its own place: it is not written over.
        end.position = end.position.max(taken.1);
    }
    if let (Some(end), false) = (replayed.end, stale.is_empty()) {
        let behind = stale.into_iter().filter(|(index, _)| *index == at).map(|(_, position)| position);
        replayed.end = Some(close(io, &reader, end, behind.collect()).await?);
    }
    if let Some(segment) = segments[order[at].1.0 as usize].as_mut() {
        segment.file = Some(reader.file.clone());
    }
    // Segments made ready behind the end hold nothing.
    for &listed in &order[(at + 1).min(order.len())..] {
        retire(io, dir, shard, segments, listed).await?;
    }
    // The last checkpoint says which blocks are needed no more; before it was read that was not known.
    for gap in gaps.into_iter().filter(|gap| visitor.may_be_gone() < gap.sequences.end - 1) {
        gap.report(shard, &mut replayed.damaged);
    }
    replayed.damaged.extend(cut_off(segments));
    Ok(replayed)
}

/// Blocks that were durable and are not there, and where they were or should have been.
struct Gap {
    sequences: std::ops::Range<u64>,
    places: Vec<DamagedRange>,
}

impl Gap {
    fn report(self, shard: ShardId, damaged: &mut Vec<DamagedRange>) {
        for place in self.places {
            tracing::error!(
                shard = shard.0,
                segment = place.segment,
                start_position = place.start_position,
                end_position = place.end_position,
                blocks = ?self.sequences,
                "a part of the journal is damaged or gone; it is skipped"
            );
            damaged.push(place);
        }
    }
}

fn damaged_place((generation, segment): (u64, SegmentId), positions: std::ops::Range<u64>) -> DamagedRange {
    let std::ops::Range { start: start_position, end: end_position } = positions;
    DamagedRange { segment: segment.0, start_position, end_position, generation, lost: Vec::new() }
}

/// The ends of segments in use whose files were cut. What was there is not known.
fn cut_off<F>(segments: &[Option<Segment<F>>]) -> Vec<DamagedRange> {
    let in_use = segments.iter().enumerate().filter_map(|(index, segment)| Some((index as u32, segment.as_ref()?)));
    let cut = in_use.filter(|(_, segment)| segment.role != Role::Spare && 0 < segment.cut_off_bytes);
    cut.map(|(index, segment)| {
        let (start_position, end_position) = (segment.bytes, segment.bytes + segment.cut_off_bytes);
        tracing::error!(
            segment = index,
            start_position,
            end_position,
            "a segment is damaged: the end of its file is gone"
        );
        damaged_place((segment.generation, SegmentId(index)), start_position..end_position)
    })
    .collect()
}

/// Blocks that were in flight behind the end never counted. Were they found again behind damage to what will be written
/// here, nothing would tell them from those that count. So they are erased; and because they may be all that vouches for
/// what is before the end, a mark goes there first. Returns the end behind it.
async fn close<I: Io>(
    io: &I,
    reader: &Reader<I::File>,
    end: JournalEnd,
    stale: Vec<u64>,
) -> Result<JournalEnd, OpenError> {
    if reader.bytes < end.position + ALIGNMENT as u64 {
        return Ok(end);
    }
    let id = BlockId {
        kind: reader.kind,
        shard: reader.shard,
        generation: end.generation,
        sequence: end.next_sequence,
        durable_sequence: end.next_sequence - 1,
        previous_crc: end.previous_crc,
    };
    let mut mark = io.buffer(ALIGNMENT);
    let crc = BlockWriter::new(mark.as_mut(), id.sequence).finish(&id);
    let written = reader.file.write_at(Rc::new(mark), end.position).await;
    written.map_err(open_error(format!("write a mark to segment {}", end.segment)))?;
    let position = end.position + ALIGNMENT as u64;
    for stale in stale.into_iter().filter(|stale| position <= *stale) {
        let mut zeros = io.buffer(ALIGNMENT);
        zeros.as_mut().fill(0);
        let erased = reader.file.write_at(Rc::new(zeros), stale).await;
        erased.map_err(open_error(format!("erase what is behind the end of segment {}", end.segment)))?;
    }
    Ok(JournalEnd { position, next_sequence: end.next_sequence + 1, previous_crc: crc, ..end })
}

/// Makes a segment behind the end a spare. Blocks in it were in flight and never counted: they must not be found again
/// when the journal comes to their sequences, so it gets another generation before anything is written.
async fn retire<I: Io>(
    io: &I,
    dir: &Path,
    shard: ShardId,
    segments: &mut [Option<Segment<I::File>>],
    listed: (u64, SegmentId),
) -> Result<(), OpenError> {
    let reader = Reader::open(io, dir, segments, listed, shard).await?;
    let highest = highest_generation(segments);
    let Some(segment) = segments[listed.1.0 as usize].as_mut() else { return Ok(()) };
    segment.role = Role::Spare;
    segment.generation = highest + 1;
    let mut buffer = io.buffer(ALIGNMENT);
    let (generation, kind, bytes) = (segment.generation, segment.kind, segment.bytes);
    segment::encode(&SegmentHeader { shard, segment: listed.1, generation, kind, bytes }, buffer.as_mut());
    segment::encode_cuts(&segment.cuts, buffer.as_mut());
    let written = reader.file.write_at(Rc::new(buffer), 0).await;
    written.map_err(open_error(format!("write the header of segment {}", listed.1)))
}

/// How many segments further the journal goes on with the block `sequence`, because a write in the first of `order`
/// failed and what is behind it there does not count.
fn taken_over<F>(segments: &[Option<Segment<F>>], order: &[(u64, SegmentId)], sequence: u64) -> Option<usize> {
    let generation = order.first()?.0;
    let cuts = segments.iter().flatten().flat_map(|segment| &segment.cuts);
    let cut = cuts.filter(|cut| cut.covers(generation) && cut.sequence <= sequence).max_by_key(|cut| cut.generation)?;
    // The header that said so is of this generation or a higher one.
    order.iter().position(|(generation, _)| cut.generation <= *generation)
}

/// What cuts a segment of this generation off behind the block `sequence`.
fn next_cut<F>(segments: &[Option<Segment<F>>], generation: u64, sequence: u64) -> Option<&Cut> {
    let cuts = segments.iter().flatten().flat_map(|segment| &segment.cuts);
    cuts.filter(|cut| cut.covers(generation) && sequence < cut.sequence).min_by_key(|cut| cut.sequence)
}

/// The first block that does not count in a segment of this generation.
fn first_cut<F>(segments: &[Option<Segment<F>>], generation: u64) -> u64 {
    let cuts = segments.iter().flatten().flat_map(|segment| &segment.cuts);
    cuts.filter(|cut| cut.covers(generation)).map(|cut| cut.sequence).min().unwrap_or(u64::MAX)
}

/// Finds extent headers of blocks that are not whole. The block's sequence in each vouches for it.
fn lost_extents(bytes: &[u8], sequences: &std::ops::Range<u64>, lost: &mut Vec<LostRange>, visitor: &mut impl Visitor) {
    for position in (0..bytes.len()).step_by(16) {
        let Ok(header) = block::extent_header(&bytes[position..]) else { continue };
        let plausible = header.record_count <= header.entry_count as u64 * batch::RECORDS_MAX as u64;
        if header.kind == ExtentKind::Data && sequences.contains(&header.block_sequence) && plausible {
            let body = &bytes[position + EXTENT_HEADER_BYTES..];
            let header = trusted(&header, &body[..body.len().min(header.body_bytes as usize)]);
            visitor.lost(&header);
            let offsets = header.base_offset..header.next_offset();
            lost.push(LostRange { partition: header.ledger.partition, offsets });
        }
    }
}

/// The header of an extent in a block that is not whole, with offsets as its batches have them if they can all be read: a
/// bit of the header may be what is bad.
fn trusted(header: &ExtentHeader, body: &[u8]) -> ExtentHeader {
    let batches: Option<Vec<_>> = block::batches(body).map(|bytes| batch::check_appended(bytes?).ok()).collect();
    match batches.as_deref() {
        Some([first, rest @ ..]) if rest.len() + 1 == header.entry_count as usize => {
            let record_count =
                first.record_count as u64 + rest.iter().map(|batch| batch.record_count as u64).sum::<u64>();
            ExtentHeader { base_offset: first.base_offset, record_count, ..*header }
        }
        Some(_) | None => *header,
    }
}

/// Notes the batches of a block that are bad, at the place that was reported for it or as one of their own.
fn note_bad_batches(
    damaged: &mut Vec<DamagedRange>,
    (generation, segment): (u64, SegmentId),
    (start_position, end_position): (u64, u64),
    block: &Parsed,
) {
    let known = damaged.last().is_some_and(|last| {
        (last.segment, last.generation) == (segment.0, generation) && end_position <= last.end_position
    });
    if !known {
        damaged.push(damaged_place((generation, segment), start_position..end_position));
    }
    if let Some(last) = damaged.last_mut() {
        last.lost.extend(block.bad.iter().cloned());
    }
}

/// Reads all blocks of compacted segments, the oldest first. What is damaged is passed by: every block says of itself what
/// it holds, and one that never counted holds the same as the place it was copied from.
pub(crate) async fn read_compacted<I: Io>(
    io: &I,
    dir: &Path,
    shard: ShardId,
    segments: &mut [Option<Segment<I::File>>],
    rebuild: &mut Rebuild<'_, I>,
) -> Result<(), OpenError> {
    let compacted = segments.iter().enumerate().filter_map(|(index, segment)| {
        let segment = segment.as_ref().filter(|s| s.kind == SegmentKind::Compacted && 0 < s.generation)?;
        Some((segment.generation, SegmentId(index as u32)))
    });
    let mut order: Vec<(u64, SegmentId)> = compacted.collect();
    order.sort_unstable();
    let mut block = Parsed::default();
    for listed in order {
        let mut reader = Reader::open(io, dir, segments, listed, shard).await?;
        // Cuts are about the journal.
        reader.cut_sequence = u64::MAX;
        // The index will say that its blocks are durable, and what they were copied from may be written over then.
        reader.sync().await?;
        let mut position = segment::HEADER_BYTES;
        while position + (block::HEADER_BYTES as u64) < reader.bytes {
            // A block of which only batches are bad is read like any other.
            let Some(header) = reader.block(position, &mut block).await?.ok().and(block.header) else {
                position += ALIGNMENT as u64;
                continue;
            };
            let visited = Visited {
                segment: listed.1,
                position,
                header,
                bytes: &reader.window[(position - reader.start) as usize..][..header.block_bytes as usize],
                extents: &block.extents,
                batches: &block.batches,
            };
            rebuild.compacted(&visited, &block.bad);
            rebuild.pause().await?;
            // What a block claims whose batches are bad may belong to another: a part of it may have strayed here.
            position += if block.damaged { ALIGNMENT as u64 } else { header.block_bytes as u64 };
        }
    }
    Ok(())
}

fn seal<F>(segments: &mut [Option<Segment<F>>], id: SegmentId, sequence: u64) {
    if let Some(segment) = segments[id.0 as usize].as_mut() {
        segment.last_sequence = sequence;
    }
}

/// What the next block must continue; `None` where that is not known.
#[derive(Clone, Copy)]
struct Chain {
    sequence: Option<u64>,
    crc: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Misfit {
    /// No block of this use of the segment: its end, most of the time.
    Nothing,
    /// Something of this use is there, and it is not whole.
    Damaged,
}

impl Chain {
    fn fits(&self, block: &Parsed) -> Result<(), Misfit> {
        let header = block.header.as_ref().ok_or(Misfit::Nothing)?;
        if self.sequence.is_some_and(|sequence| header.id.sequence < sequence) {
            return Err(Misfit::Nothing);
        }
        if self.sequence.is_some_and(|sequence| sequence != header.id.sequence) {
            return Err(Misfit::Damaged);
        }
        if self.crc.is_some_and(|crc| crc != header.id.previous_crc) {
            return Err(Misfit::Nothing);
        }
        // Only behind a bad block, where a later one has vouched for it, is a block taken with bad batches in it: anywhere
        // else, and at the very start, it may be a torn tail.
        let vouched = self.crc.is_none() && self.sequence.is_some();
        if block.damaged && !vouched { Err(Misfit::Damaged) } else { Ok(()) }
    }
}

impl Chain {
    /// Whether a block is known to be the next.
    fn links(&self, sequence: u64, previous_crc: u32) -> bool {
        (self.sequence, self.crc) == (Some(sequence), Some(previous_crc))
    }
}

/// A block behind a bad one.
#[derive(Clone, Copy)]
struct Later {
    /// Of its segment, in the order.
    at: usize,
    position: u64,
    block_bytes: u64,
    sequence: u64,
    crc: u32,
    previous_crc: u32,
    /// Batches in it are bad.
    damaged: bool,
    /// It was never acknowledged: the journal ends here, and this sequence is the next.
    ends: Option<u64>,
    /// It is a copy, or the first of several: where the journal goes on in the same segment.
    detour: Option<Detour>,
}

impl Later {
    /// Whether the other lies behind this one and is known to be the next.
    fn is_followed_by(&self, next: &Later) -> bool {
        (next.at, next.position) == (self.at, self.position + self.block_bytes)
            && (next.sequence, next.previous_crc) == (self.sequence + 1, self.crc)
    }
}

/// Behind the block of this sequence the next one lies at this position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Detour {
    behind: u64,
    position: u64,
}

/// What was found behind a bad block.
#[derive(Default)]
struct Found {
    /// Where the journal goes on; `None`: it ends before the bad block.
    later: Option<Later>,
    /// Blocks behind the end that never counted: their segments in the order, and their positions.
    stale: Vec<(usize, u64)>,
}

/// Looks at what is behind a bad block.
struct Search {
    /// What is missing; without an index that is at the very start.
    chain: Chain,
    /// Segment in the order, and position.
    bad: (usize, u64),
    seen: Vec<Later>,
    /// All blocks up to this were durable, as later ones say.
    durable: u64,
}

impl Search {
    fn expected(&self) -> u64 {
        self.chain.sequence.unwrap_or(1)
    }

    fn take(&mut self, later: Later, durable_sequence: u64) {
        self.durable = self.durable.max(durable_sequence);
        self.seen.push(later);
    }

    /// The one to go on with. A lower one behind a higher: the higher is a copy that a misdirected write left. Of copies of
    /// one block that one is in its place behind which the next lies; whole ones are better than those with bad batches,
    /// which may be copies of a part; and one in the place of what is missing is the copy.
    fn best(&self) -> Option<Later> {
        let sequence = self.seen.iter().map(|later| later.sequence).min()?;
        let rank = |later: &&Later| {
            let is_copy = (later.at, later.position) == self.bad && !later.damaged && self.expected() < sequence;
            (!self.leads_on(later), later.damaged, is_copy)
        };
        self.seen.iter().filter(|later| later.sequence == sequence).min_by_key(rank).copied()
    }

    /// Where the blocks are that link to this one, in its segment.
    fn next_positions(&self, later: &Later) -> impl Iterator<Item = u64> {
        let next = (later.at, later.sequence + 1, later.crc);
        let is_next = move |block: &&Later| (block.at, block.sequence, block.previous_crc) == next;
        self.seen.iter().filter(is_next).map(|block| block.position)
    }

    fn leads_on(&self, later: &Later) -> bool {
        self.next_positions(later).any(|position| position == later.position + later.block_bytes)
    }

    /// Where to go on behind `best` and what follows it, when that is not behind it: they are copies then, and what they are
    /// copies of lay before them. Whoever searches behind them would not find what comes next there.
    fn detour(&self, best: &Later) -> Option<Detour> {
        let mut last = best;
        while let Some(next) = self.seen.iter().find(|block| last.is_followed_by(block)) {
            last = next;
        }
        let single = last.position == best.position;
        let linked = self.next_positions(last).find(|position| single || *position < best.position);
        let position = linked.or_else(|| self.passed_by(best, last))?;
        Some(Detour { behind: last.sequence, position })
    }

    /// The block that comes next after `last` of all that are known, if it lies before `best`.
    fn passed_by(&self, best: &Later, last: &Later) -> Option<u64> {
        let comes = self.seen.iter().filter(|block| block.at == last.at && last.sequence < block.sequence);
        let next = comes.min_by_key(|block| (block.sequence, block.position < best.position))?;
        (next.position < best.position).then_some(next.position)
    }

    /// Whether that was durable, as far as anybody can tell.
    fn is_settled(&self, best: &Later) -> bool {
        // In a rebuild, segments before this one may have been used again: then nothing is missing here.
        let before = if self.chain.sequence.is_none() { self.expected() } else { best.sequence - 1 };
        let needed = if best.damaged { best.sequence } else { before };
        // The very block that is looked for needs nobody who vouches for it.
        needed <= self.durable || !best.damaged && self.chain.links(best.sequence, best.previous_crc)
    }

    fn finish(self) -> Found {
        let places = |later: &Later| (later.at, later.position);
        let Some(best) = self.best() else { return Found::default() };
        if self.is_settled(&best) {
            return Found { later: Some(Later { detour: self.detour(&best), ..best }), stale: Vec::new() };
        }
        if self.durable < self.expected() {
            return Found { later: None, stale: self.seen.iter().map(places).collect() };
        }
        // What is missing was durable, in part, and this was not.
        let behind = |later: &&Later| later.at == best.at && best.position <= later.position;
        let stale = self.seen.iter().filter(behind).map(places).collect();
        let ends = Some(self.durable.saturating_add(1).min(best.sequence));
        Found { later: Some(Later { ends, ..best }), stale }
    }
}

/// Where the journal goes on behind a bad block, if a block behind it says that the bad one was durable.
async fn find_later<I: Io>(
    io: &I,
    dir: &Path,
    segments: &[Option<Segment<I::File>>],
    order: &[(u64, SegmentId)],
    (at, bad_position): (usize, u64),
    chain: &Chain,
    reader: &mut Reader<I::File>,
) -> Result<Found, OpenError> {
    if cfg!(feature = "mutant-truncate-damage") {
        return Ok(Found::default());
    }
    let mut search = Search { chain: *chain, bad: (at, bad_position), seen: Vec::new(), durable: 0 };
    let expected = search.expected();
    // The journal went on elsewhere from the last durable block: those before it in this segment were durable.
    if let Some(cut) = next_cut(segments, order[at].0, expected) {
        let at = order.iter().position(|(generation, _)| cut.generation <= *generation);
        let Some(at) = at else { return Ok(Found::default()) };
        let (position, sequence) = (segment::HEADER_BYTES, cut.sequence);
        let goes_on = Later {
            at,
            position,
            block_bytes: 0,
            sequence,
            crc: 0,
            previous_crc: 0,
            damaged: false,
            ends: None,
            detour: None,
        };
        search.take(goes_on, sequence - 1);
    }
    // So were those before a cut in a segment that is read later.
    let cuts = segments.iter().flatten().flat_map(|segment| &segment.cuts);
    let behind = cuts.filter(|cut| order[at].0 < cut.generation).map(|cut| cut.sequence.saturating_sub(1));
    search.durable = behind.fold(search.durable, u64::max);
    let shard = reader.shard;
    let mut block = Parsed::default();
    let mut other;
    for (index, &listed) in order.iter().enumerate().skip(at) {
        let (reader, mut position) = if index == at {
            (&mut *reader, bad_position)
        } else {
            other = Reader::open(io, dir, segments, listed, shard).await?;
            (&mut other, segment::HEADER_BYTES)
        };
        while position + (block::HEADER_BYTES as u64) < reader.bytes {
            if index != at && search.seen.is_empty() && LOOK_AHEAD_BYTES < position {
                break;
            }
            // A block whose batches are bad is a block all the same.
            let found = reader.block(position, &mut block).await?.ok().and(block.header);
            let Some(header) = found.filter(|header| expected <= header.id.sequence) else {
                position += ALIGNMENT as u64;
                continue;
            };
            let (block_bytes, damaged) = (header.block_bytes as u64, block.damaged);
            let BlockId { sequence, previous_crc, durable_sequence, .. } = header.id;
            let crc = header.crc;
            let later = Later {
                at: index,
                position,
                block_bytes,
                sequence,
                crc,
                previous_crc,
                damaged,
                ends: None,
                detour: None,
            };
            search.take(later, durable_sequence);
            // What a block claims whose batches are bad may belong to another.
            position += if damaged { ALIGNMENT as u64 } else { block_bytes };
        }
        // Not before all of the segment was looked at: a misdirected write may have left several copies in it.
        if search.best().is_some_and(|best| search.is_settled(&best)) {
            break;
        }
    }
    Ok(search.finish())
}

/// Where in the room that a block claims the one lies that follows it.
async fn next_within<F: File>(
    reader: &mut Reader<F>,
    claimed: std::ops::Range<u64>,
    header: &BlockHeader,
) -> Result<Option<u64>, OpenError> {
    let follows = Chain { sequence: Some(header.id.sequence + 1), crc: Some(header.crc) };
    let mut block = Parsed::default();
    for position in claimed.step_by(ALIGNMENT).skip(1) {
        let found = reader.block(position, &mut block).await?.ok().and(block.header);
        if found.is_some_and(|found| follows.links(found.id.sequence, found.id.previous_crc)) {
            return Ok(Some(position));
        }
    }
    Ok(None)
}

/// The lowest sequence of a whole block in the segment.
async fn lowest_sequence<F: File>(reader: &mut Reader<F>, block: &mut Parsed) -> Result<Option<u64>, OpenError> {
    let mut lowest = None;
    let mut position = segment::HEADER_BYTES;
    while position + (block::HEADER_BYTES as u64) < reader.bytes {
        let found = reader.block(position, block).await?.ok().and(block.header);
        lowest = lowest.into_iter().chain(found.map(|header| header.id.sequence)).min();
        position += found.filter(|_| !block.damaged).map_or(ALIGNMENT as u64, |header| header.block_bytes as u64);
    }
    Ok(lowest)
}

/// A block taken apart.
#[derive(Default)]
struct Parsed {
    header: Option<BlockHeader>,
    extents: Vec<VisitedExtent>,
    batches: Vec<batch::Header>,
    /// The block is good and the inside of some batch is not.
    damaged: bool,
    /// The messages of such batches.
    bad: Vec<LostRange>,
}

/// Reads one segment forward, in large pieces.
struct Reader<F> {
    file: Rc<F>,
    segment: SegmentId,
    generation: u64,
    kind: SegmentKind,
    shard: ShardId,
    bytes: u64,
    /// The first block that does not count.
    cut_sequence: u64,
    /// Position of the window in the segment.
    start: u64,
    window: Vec<u8>,
    read_bytes: usize,
}

impl<F: File> Reader<F> {
    async fn open<I: Io<File = F>>(
        io: &I,
        dir: &Path,
        segments: &[Option<Segment<F>>],
        (generation, segment): (u64, SegmentId),
        shard: ShardId,
    ) -> Result<Reader<F>, OpenError> {
        let listed = segments[segment.0 as usize].as_ref().expect("listed above");
        let (bytes, kind) = (listed.bytes, listed.kind);
        let path = segment::path(dir, segment);
        let file = io.open(&path).await.map_err(open_error(format!("open {}", path.display())))?;
        let file = Rc::new(file);
        Ok(Reader {
            file,
            segment,
            generation,
            kind,
            shard,
            bytes,
            cut_sequence: first_cut(segments, generation),
            start: 0,
            window: Vec::new(),
            read_bytes: WINDOW_BYTES_MIN,
        })
    }

    /// What was read may still be on its way to the disk, written by a process that is gone.
    async fn sync(&self) -> Result<(), OpenError> {
        self.file.sync().await.map_err(open_error(format!("sync segment {}", self.segment)))
    }

    /// Reads the block at `position` into `block`. The outer error is the disk's.
    async fn block(&mut self, position: u64, block: &mut Parsed) -> Result<Result<(), Misfit>, OpenError> {
        block.header = None;
        block.damaged = false;
        block.extents.clear();
        block.batches.clear();
        block.bad.clear();
        if self.bytes < position + ALIGNMENT as u64 {
            return Ok(Err(Misfit::Nothing));
        }
        let header = match block::header(self.at(position, block::HEADER_BYTES).await?) {
            Ok(header) => header,
            Err(_) => return Ok(Err(Misfit::Nothing)),
        };
        if header.id.generation != self.generation
            || header.id.kind != self.kind
            || header.id.shard != self.shard
            || self.cut_sequence <= header.id.sequence
            || self.bytes < position + header.block_bytes as u64
        {
            return Ok(Err(Misfit::Nothing));
        }
        let bytes = self.at(position, header.block_bytes as usize).await?;
        if block::check(bytes).is_err() {
            return Ok(Err(Misfit::Damaged));
        }
        for extent in block::extents(&header, bytes) {
            let (extent, start) = extent.expect("the block was checked");
            let first = block.batches.len();
            let mut visited = VisitedExtent { header: extent, position: start, batches: first..first };
            if extent.kind == ExtentKind::Data {
                let batches = &mut block.batches;
                let bad = block::check_batches(&extent, visited.body(bytes), |header, _| batches.push(*header));
                block.damaged |= !bad.is_empty();
                let partition = extent.ledger.partition;
                block.bad.extend(bad.into_iter().map(|offsets| LostRange { partition, offsets }));
                visited.batches.end = block.batches.len();
            }
            block.extents.push(visited);
        }
        block.header = Some(header);
        Ok(Ok(()))
    }

    async fn at(&mut self, position: u64, bytes: usize) -> Result<&[u8], OpenError> {
        let have_end = self.start + self.window.len() as u64;
        if position < self.start || have_end < position + bytes as u64 {
            if position < self.start || have_end <= position {
                self.window.clear();
                self.start = position;
            } else {
                self.window.drain(..(position - self.start) as usize);
                self.start = position;
            }
            let from = self.start + self.window.len() as u64;
            let wanted = (bytes - self.window.len()).max(self.read_bytes).next_multiple_of(ALIGNMENT) as u64;
            let to = (from + wanted).min(self.bytes);
            self.read_bytes = (self.read_bytes * 2).min(WINDOW_BYTES_MAX);
            let reads = (from..to)
                .step_by(CHUNK_BYTES)
                .map(|chunk| self.file.read_at(chunk, CHUNK_BYTES.min((to - chunk) as usize)))
                .collect();
            for read in all(reads).await {
                let read = read.map_err(open_error(format!("read segment {}", self.segment)))?;
                self.window.extend_from_slice(&read);
            }
        }
        let start = (position - self.start) as usize;
        self.window.get(start..start + bytes).ok_or_else(|| OpenError::Io {
            what: format!("read segment {}", self.segment),
            source: std::io::ErrorKind::UnexpectedEof.into(),
        })
    }
}
