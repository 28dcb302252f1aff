//! A window of compaction: the next extents in the order of the index, read in the order in which they lie on disk.
//!
//! What one partition has in the victims is spread over all of them, a little in each block. Read one by one in the order
//! of the index, each extent costs the disk a request and a page or two. So rows are gathered for as many extents as memory
//! allows, and what lies close together is read at once, whoever it belongs to; the copy then takes the extents from
//! memory. The victims are read about as many times over as they are larger than a window, so a pass is only some windows
//! large.
//!
//! What a long read did not bring, because the disk has lost a page of it or because the extent is too large, is read alone
//! when its turn comes.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use drava_protocol::PartitionId;

use super::CompactError;
use crate::block::EXTENT_HEADER_BYTES;
use crate::index::ExtentRow;
use crate::io::{ALIGNMENT, File, Io};
use crate::recovery::all;
use crate::segment::SegmentId;
use crate::store::Inner;

/// Read at a time, in one read or in several small ones. Larger extents are read alone, in pieces of this.
pub(super) const READ_BYTES_MAX: u64 = 256 << 10;
/// Small reads beside one another: durable writes stand in a long queue of them.
const READS_MAX: usize = 8;
/// Extents this far apart are read together: the gap costs the disk less than another request.
const GAP_BYTES_MAX: u64 = 16 << 10;
/// What a row takes beside its extent: itself, its place, and where its extent lies in memory.
const ROW_BYTES: u64 = size_of::<(PartitionId, ExtentRow)>() as u64 + 64;
/// The list of rows grows by so many: one that doubles would take as much again for nothing.
const ROWS_MORE: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Window {
    /// In the order of the index.
    rows: Vec<(PartitionId, ExtentRow)>,
    /// The rows by the places of their extents.
    places: BTreeMap<(SegmentId, u64), u32>,
    /// Extents as they came from the disk, headers included.
    extents: Vec<u8>,
    /// Where in `extents` each row's extent starts. `None`: it was not read.
    starts: Vec<Option<u32>>,
    /// Memory of all of these once they are filled.
    bytes: u64,
}

/// Extents that are read at once.
struct Stretch {
    segment: SegmentId,
    /// Whole pages.
    span: Range<u64>,
    rows: Vec<u32>,
}

impl Window {
    /// Memory that it takes, with what is being read for it.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes + READ_BYTES_MAX
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(super) fn has_room(&self, row: &ExtentRow, bytes_max: u64) -> bool {
        self.is_empty() || self.bytes() + row_bytes(row) <= bytes_max
    }

    pub(super) fn push(&mut self, partition: PartitionId, row: ExtentRow) {
        if is_read_with_others(&row) {
            self.places.insert((row.segment, row.position), self.rows.len() as u32);
        }
        self.bytes += row_bytes(&row);
        if self.rows.len() == self.rows.capacity() {
            self.rows.reserve_exact(ROWS_MORE);
        }
        self.rows.push((partition, row));
    }

    pub(super) fn rows(&self) -> &[(PartitionId, ExtentRow)] {
        &self.rows
    }

    /// The extent of the row, if it was read with others.
    pub(super) fn extent(&self, index: usize) -> Option<&[u8]> {
        let start = (*self.starts.get(index)?)? as usize;
        Some(&self.extents[start..start + extent_bytes(&self.rows[index].1) as usize])
    }

    /// Keeps the memory for the next rows.
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.places.clear();
        self.extents.clear();
        self.starts.clear();
        self.bytes = 0;
    }
}

impl<I: Io, T: 'static> Inner<I, T> {
    /// Reads the extents of the window that lie close together. Returns the bytes that were read.
    pub(super) async fn read_window(&self, window: &mut Window) -> Result<u64, CompactError> {
        let Window { rows, places, extents, starts, .. } = window;
        let small = rows.iter().filter(|(_, row)| is_read_with_others(row));
        extents.reserve_exact(small.map(|(_, row)| extent_bytes(row) as usize).sum());
        starts.resize(rows.len(), None);
        let mut stretches = stretches(std::mem::take(places), rows).peekable();
        let mut read_bytes = 0;
        while let Some(first) = stretches.next() {
            let mut bytes = first.bytes();
            let mut together = vec![first];
            while together.len() < READS_MAX
                && let Some(next) = stretches.next_if(|next| bytes + next.bytes() <= READ_BYTES_MAX)
            {
                bytes += next.bytes();
                together.push(next);
            }
            self.give_way(bytes).await?;
            read_bytes += bytes;
            let reads = all(together.iter().map(|stretch| self.read_stretch(stretch)).collect()).await;
            for (stretch, read) in together.iter().zip(reads) {
                // What failed may be one page of it.
                let Ok(read) = read else { continue };
                for &index in &stretch.rows {
                    let row = &rows[index as usize].1;
                    let start = (row.position - stretch.span.start) as usize;
                    if let Some(extent) = read.get(start..start + extent_bytes(row) as usize) {
                        starts[index as usize] = Some(extents.len() as u32);
                        extents.extend_from_slice(extent);
                    }
                }
            }
        }
        Ok(read_bytes)
    }

    async fn read_stretch(&self, stretch: &Stretch) -> io::Result<<I::File as File>::Read> {
        let file = self.journal.file(stretch.segment).await?;
        file.read_at(stretch.span.start, stretch.bytes() as usize).await
    }

    /// Reads one extent, its header included. Adds what is read to `read_bytes`.
    pub(super) async fn read_extent(&self, row: &ExtentRow, read_bytes: &mut u64) -> Result<Vec<u8>, CompactError> {
        let failed = |source| CompactError::Read { segment: row.segment.0, source };
        let file = self.journal.file(row.segment).await.map_err(failed)?;
        let Range { start, end } = pages(row);
        let mut bytes = Vec::with_capacity((end - start) as usize);
        while bytes.len() < (end - start) as usize {
            let at = start + bytes.len() as u64;
            let piece_bytes = (end - at).min(READ_BYTES_MAX);
            self.give_way(piece_bytes).await?;
            *read_bytes += piece_bytes;
            let piece = file.read_at(at, piece_bytes as usize).await.map_err(failed)?;
            bytes.extend_from_slice(&piece);
            if (piece.len() as u64) < piece_bytes {
                break;
            }
        }
        // A file that ends early may end within the last page.
        let wanted = (row.position - start) as usize;
        bytes.drain(..wanted.min(bytes.len()));
        if (bytes.len() as u64) < extent_bytes(row) {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        bytes.truncate(extent_bytes(row) as usize);
        Ok(bytes)
    }
}

impl Stretch {
    fn bytes(&self) -> u64 {
        self.span.end - self.span.start
    }
}

/// Finds one stretch after the other, so that a window of small extents is not gone through at once.
fn stretches(
    places: BTreeMap<(SegmentId, u64), u32>,
    rows: &[(PartitionId, ExtentRow)],
) -> impl Iterator<Item = Stretch> {
    let mut places = places.into_iter().peekable();
    std::iter::from_fn(move || {
        let ((segment, _), index) = places.next()?;
        let mut stretch = Stretch { segment, span: pages(&rows[index as usize].1), rows: vec![index] };
        while let Some((_, index)) = places.next_if(|((next, position), index)| {
            let joined = stretch.span.end.max(pages(&rows[*index as usize].1).end) - stretch.span.start;
            *next == segment && *position <= stretch.span.end + GAP_BYTES_MAX && joined <= READ_BYTES_MAX
        }) {
            stretch.span.end = stretch.span.end.max(pages(&rows[index as usize].1).end);
            stretch.rows.push(index);
        }
        Some(stretch)
    })
}

fn is_read_with_others(row: &ExtentRow) -> bool {
    let Range { start, end } = pages(row);
    end - start <= READ_BYTES_MAX
}

/// Of the extent, header included.
fn extent_bytes(row: &ExtentRow) -> u64 {
    EXTENT_HEADER_BYTES as u64 + u64::from(row.body_bytes)
}

/// What a row and its extent take in memory.
fn row_bytes(row: &ExtentRow) -> u64 {
    ROW_BYTES + extent_bytes(row)
}

/// The pages that the extent lies in.
fn pages(row: &ExtentRow) -> Range<u64> {
    let start = row.position & !(ALIGNMENT as u64 - 1);
    start..(row.position + extent_bytes(row)).next_multiple_of(ALIGNMENT as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(segment: u32, position: u64, body_bytes: u32) -> (PartitionId, ExtentRow) {
        (PartitionId(1), ExtentRow { segment: SegmentId(segment), position, body_bytes, ..ExtentRow::default() })
    }

    /// Segment, pages and rows of each stretch.
    fn found(rows: &[(PartitionId, ExtentRow)]) -> Vec<(u32, Range<u64>, Vec<u32>)> {
        let mut window = Window::default();
        rows.iter().for_each(|(partition, row)| window.push(*partition, *row));
        let page = ALIGNMENT as u64;
        stretches(window.places, &window.rows)
            .map(|stretch| (stretch.segment.0, stretch.span.start / page..stretch.span.end / page, stretch.rows))
            .collect()
    }

    #[test]
    fn what_lies_close_together_is_read_at_once() {
        let kib = 1 << 10;
        let rows = [row(2, 40 * kib, 1000), row(1, 4 * kib, 1000), row(2, 4 * kib, 1000), row(2, 6 * kib, 30_000)];
        assert_eq!(found(&rows), [(1, 1..2, vec![1]), (2, 1..11, vec![2, 3, 0])]);
        let apart = [row(1, 4 * kib, 1000), row(1, 8 * kib + GAP_BYTES_MAX + 16, 1000)];
        assert_eq!(found(&apart), [(1, 1..2, vec![0]), (1, 6..7, vec![1])]);
    }

    #[test]
    fn a_stretch_has_an_end_and_what_is_larger_is_left_to_itself() {
        let many: Vec<_> = (0..600u64).map(|index| row(1, 4096 + index * 1072, 1008)).collect();
        let spans: Vec<_> = found(&many).into_iter().map(|(_, span, _)| span).collect();
        assert_eq!(spans, [1..65, 64..128, 127..159], "a page in two stretches is read twice");
        assert_eq!(found(&[row(1, 4096, READ_BYTES_MAX as u32)]), []);
        let largest = READ_BYTES_MAX as u32 - EXTENT_HEADER_BYTES as u32;
        assert_eq!(found(&[row(1, 4096, largest)]), [(1, 1..65, vec![0])]);
    }

    #[test]
    fn a_window_takes_one_row_whatever_its_size() {
        let mut window = Window::default();
        let (partition, large) = row(1, 4096, 10 << 20);
        assert!(window.has_room(&large, 1 << 20));
        window.push(partition, large);
        assert!(!window.has_room(&row(1, 20 << 20, 16).1, 1 << 20));
        assert!(10 << 20 < window.bytes());
        window.clear();
        assert!(window.has_room(&large, 1 << 20) && window.is_empty());
    }
}
