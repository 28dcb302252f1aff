//! Blocks: what one flush writes, and how much of it must be there for it to count.
//!
//! A block is a header of [`HEADER_BYTES`] and extents; an extent is a header of [`EXTENT_HEADER_BYTES`] and a body:
//! batches of one ledger, rows of state, or records of a record log. The checksum of a block covers everything but the
//! insides of batches, which carry their own: the first [`batch::CHECKED_FROM`] bytes of each batch, with its checksum
//! among them, are covered by the block's. So nothing is hashed twice on the way in, and [`check`] followed by
//! [`check_batches`] vouches for every byte. Source: `storage/README.md`, "Block".

use std::ops::Range;

use drava_protocol::batch;
use drava_protocol::frame::padded;
use drava_protocol::{LedgerId, PartitionId, ShardId};

use crate::io::ALIGNMENT;
use crate::segment::SegmentKind;

pub const VERSION: u16 = 1;
pub const HEADER_BYTES: usize = 64;
pub const EXTENT_HEADER_BYTES: usize = 64;
const CHECKED_HEADER_BYTES: usize = 48;
/// Larger blocks are not written, and not believed when read.
pub const BLOCK_BYTES_MAX: usize = 64 << 20;

/// The fields of a block that its writer decides before the content is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockId {
    /// Of the use of the segment that holds it.
    pub kind: SegmentKind,
    pub shard: ShardId,
    /// Of the segment that holds it.
    pub generation: u64,
    /// Counts up by one over the whole life of the journal.
    pub sequence: u64,
    /// All blocks up to this one were durable when this one was written.
    pub durable_sequence: u64,
    /// The checksum of the block before it: what was left by an earlier run of the node does not chain.
    pub previous_crc: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHeader {
    pub id: BlockId,
    /// On disk, with padding: a multiple of [`ALIGNMENT`].
    pub block_bytes: u32,
    /// Header and extents, without padding.
    pub body_bytes: u32,
    pub extent_count: u32,
    pub crc: u32,
}

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExtentKind {
    /// Batches of a data ledger.
    Data = 1,
    /// Rows of a state ledger.
    State = 2,
    /// Records of a record log.
    Records = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentHeader {
    pub kind: ExtentKind,
    /// Without this header: a multiple of 16.
    pub body_bytes: u32,
    pub ledger: LedgerId,
    pub first_entry: u64,
    pub entry_count: u32,
    pub base_offset: u64,
    pub record_count: u64,
    pub max_append_time_ms: u64,
    /// Of the block that holds it: an extent found elsewhere is not this one.
    pub block_sequence: u64,
}

impl ExtentHeader {
    pub fn next_offset(&self) -> u64 {
        self.base_offset.saturating_add(self.record_count)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    #[error("no block starts here")]
    Magic,
    #[error("block version {0} is not known; this side knows {VERSION}")]
    Version(u16),
    #[error("{have} bytes are too few for what the block says: {said}")]
    Length { said: u64, have: usize },
    #[error("block field {0} is out of range")]
    Field(&'static str),
    #[error("extent {index} of the block is malformed: {what}")]
    Extent { index: u32, what: &'static str },
    #[error("the block has checksum {computed:08x}; its header says {stored:08x}")]
    Checksum { stored: u32, computed: u32 },
}

/// Writes a block into a buffer, front to back.
#[derive(Debug)]
pub struct BlockWriter<'a> {
    bytes: &'a mut [u8],
    position: usize,
    extents: u32,
    crc: u32,
    sequence: u64,
}

impl<'a> BlockWriter<'a> {
    /// `bytes` is the whole block as it will be written.
    pub fn new(bytes: &'a mut [u8], sequence: u64) -> BlockWriter<'a> {
        assert!(bytes.len().is_multiple_of(ALIGNMENT) && bytes.len() <= BLOCK_BYTES_MAX, "{} bytes", bytes.len());
        BlockWriter { bytes, position: HEADER_BYTES, extents: 0, crc: 0, sequence }
    }

    /// Where the next byte goes, from the start of the block.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Starts an extent; its body follows. The block's sequence is filled in.
    pub fn extent(&mut self, header: &ExtentHeader) {
        let mut h = [0; EXTENT_HEADER_BYTES];
        h[0] = header.kind as u8;
        h[4..8].copy_from_slice(&header.body_bytes.to_le_bytes());
        h[8..16].copy_from_slice(&header.ledger.partition.0.to_le_bytes());
        h[16..20].copy_from_slice(&header.ledger.sequence.to_le_bytes());
        h[20..24].copy_from_slice(&header.entry_count.to_le_bytes());
        h[24..32].copy_from_slice(&header.first_entry.to_le_bytes());
        h[32..40].copy_from_slice(&header.base_offset.to_le_bytes());
        h[40..48].copy_from_slice(&header.max_append_time_ms.to_le_bytes());
        h[48..56].copy_from_slice(&header.record_count.to_le_bytes());
        h[56..64].copy_from_slice(&self.sequence.to_le_bytes());
        self.checked(&h);
        self.extents += 1;
    }

    /// Appends one batch with the broker's fields and padding.
    pub fn batch(&mut self, bytes: &[u8], base_offset: u64, append_time_ms: u64) {
        let start = self.position;
        let end = start + padded(bytes.len());
        let out = &mut self.bytes[start..end];
        out[..batch::BROKER_BYTES].copy_from_slice(&batch::broker_fields(base_offset, append_time_ms));
        out[batch::BROKER_BYTES..bytes.len()].copy_from_slice(&bytes[batch::BROKER_BYTES..]);
        out[bytes.len()..].fill(0);
        self.crc = crc32c::crc32c_append(self.crc, &out[..batch::CHECKED_FROM]);
        self.position = end;
    }

    /// Appends rows or records: bytes that the block's checksum covers, a multiple of 16.
    pub fn checked(&mut self, bytes: &[u8]) {
        assert!(bytes.len().is_multiple_of(16), "{} bytes", bytes.len());
        let end = self.position + bytes.len();
        self.bytes[self.position..end].copy_from_slice(bytes);
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.position = end;
    }

    /// Writes the header and zeros behind the extents. Returns the checksum, which the next block repeats.
    pub fn finish(self, id: &BlockId) -> u32 {
        assert!(id.sequence == self.sequence, "extents of block {} in block {}", self.sequence, id.sequence);
        let block_bytes = self.bytes.len() as u32;
        let mut h = [0; HEADER_BYTES];
        h[0..4].copy_from_slice(magic(id.kind));
        h[4..6].copy_from_slice(&VERSION.to_le_bytes());
        h[6..8].copy_from_slice(&id.shard.0.to_le_bytes());
        h[8..16].copy_from_slice(&id.generation.to_le_bytes());
        h[16..24].copy_from_slice(&id.sequence.to_le_bytes());
        h[24..32].copy_from_slice(&id.durable_sequence.to_le_bytes());
        h[32..36].copy_from_slice(&block_bytes.to_le_bytes());
        h[36..40].copy_from_slice(&(self.position as u32).to_le_bytes());
        h[40..44].copy_from_slice(&self.extents.to_le_bytes());
        h[44..48].copy_from_slice(&id.previous_crc.to_le_bytes());
        let crc = crc32c::crc32c_append(self.crc, &h[..CHECKED_HEADER_BYTES]);
        h[48..52].copy_from_slice(&crc.to_le_bytes());
        self.bytes[..HEADER_BYTES].copy_from_slice(&h);
        self.bytes[self.position..].fill(0);
        crc
    }
}

fn magic(kind: SegmentKind) -> &'static [u8; 4] {
    match kind {
        SegmentKind::Journal => b"DRVB",
        SegmentKind::Compacted => b"DRVC",
    }
}

/// Reads the header at the start of `bytes`, which may be shorter than the block. Its checksum is not compared yet.
pub fn header(bytes: &[u8]) -> Result<BlockHeader, BlockError> {
    let Some(h) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Err(BlockError::Length { said: HEADER_BYTES as u64, have: bytes.len() });
    };
    let kinds = [SegmentKind::Journal, SegmentKind::Compacted];
    let kind = kinds.into_iter().find(|kind| h[0..4] == *magic(*kind)).ok_or(BlockError::Magic)?;
    let version = u16::from_le_bytes([h[4], h[5]]);
    if version != VERSION {
        return Err(BlockError::Version(version));
    }
    let header = BlockHeader {
        id: BlockId {
            kind,
            shard: ShardId(u16::from_le_bytes([h[6], h[7]])),
            generation: u64_at(h, 8),
            sequence: u64_at(h, 16),
            durable_sequence: u64_at(h, 24),
            previous_crc: u32_at(h, 44),
        },
        block_bytes: u32_at(h, 32),
        body_bytes: u32_at(h, 36),
        extent_count: u32_at(h, 40),
        crc: u32_at(h, 48),
    };
    let block_bytes = header.block_bytes as usize;
    if block_bytes == 0 || !block_bytes.is_multiple_of(ALIGNMENT) || BLOCK_BYTES_MAX < block_bytes {
        return Err(BlockError::Field("block_bytes"));
    }
    let body_bytes = header.body_bytes as usize;
    if body_bytes < HEADER_BYTES || block_bytes < body_bytes || !body_bytes.is_multiple_of(16) {
        return Err(BlockError::Field("body_bytes"));
    }
    if header.id.sequence <= header.id.durable_sequence {
        return Err(BlockError::Field("durable_sequence"));
    }
    if h[52..64] != [0; 12] {
        return Err(BlockError::Field("reserved"));
    }
    Ok(header)
}

/// Checks the block at the start of `bytes`: its shape and its checksum, which leaves out the insides of batches.
pub fn check(bytes: &[u8]) -> Result<BlockHeader, BlockError> {
    let header = header(bytes)?;
    if bytes.len() < header.block_bytes as usize {
        return Err(BlockError::Length { said: header.block_bytes as u64, have: bytes.len() });
    }
    let mut crc = 0;
    for (index, extent) in extents(&header, bytes).enumerate() {
        let index = index as u32;
        let (extent, position) = extent.map_err(|what| BlockError::Extent { index, what })?;
        if extent.block_sequence != header.id.sequence {
            return Err(BlockError::Extent { index, what: "it belongs to another block" });
        }
        let body_start = position + EXTENT_HEADER_BYTES;
        let body = &bytes[body_start..body_start + extent.body_bytes as usize];
        crc = crc32c::crc32c_append(crc, &bytes[position..body_start]);
        match extent.kind {
            ExtentKind::State | ExtentKind::Records => crc = crc32c::crc32c_append(crc, body),
            ExtentKind::Data => {
                let mut count = 0;
                for batch in batches(body) {
                    let batch = batch.ok_or(BlockError::Extent { index, what: "a batch does not fit" })?;
                    crc = crc32c::crc32c_append(crc, &batch[..batch::CHECKED_FROM]);
                    count += 1;
                }
                if count != extent.entry_count {
                    return Err(BlockError::Extent { index, what: "another number of batches" });
                }
            }
        }
    }
    let computed = crc32c::crc32c_append(crc, &bytes[..CHECKED_HEADER_BYTES]);
    if computed != header.crc {
        return Err(BlockError::Checksum { stored: header.crc, computed });
    }
    Ok(header)
}

/// The extents of a block and where each starts, from the start of the block. Ends after the first error.
pub fn extents<'a>(
    header: &BlockHeader,
    bytes: &'a [u8],
) -> impl Iterator<Item = Result<(ExtentHeader, usize), &'static str>> + use<'a> {
    let end = (header.body_bytes as usize).min(bytes.len());
    let mut position = HEADER_BYTES;
    let mut left = header.extent_count;
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed {
            return None;
        }
        if left == 0 {
            failed = true;
            return (position != end).then_some(Err("bytes behind the last extent"));
        }
        left -= 1;
        let start = position;
        let item = extent_header(&bytes[start..end]).and_then(|extent| {
            let next = start + EXTENT_HEADER_BYTES + extent.body_bytes as usize;
            if end < next {
                return Err("it reaches beyond its block");
            }
            position = next;
            Ok((extent, start))
        });
        failed = item.is_err();
        Some(item)
    })
}

/// Reads the extent header at the start of `bytes`.
pub fn extent_header(bytes: &[u8]) -> Result<ExtentHeader, &'static str> {
    let Some(h) = bytes.first_chunk::<EXTENT_HEADER_BYTES>() else {
        return Err("its header is cut");
    };
    let kind = match h[0] {
        1 => ExtentKind::Data,
        2 => ExtentKind::State,
        3 => ExtentKind::Records,
        _ => return Err("its kind is not known"),
    };
    if h[1..4] != [0; 3] {
        return Err("reserved bytes are not zero");
    }
    let body_bytes = u32_at(h, 4);
    if body_bytes == 0 || !body_bytes.is_multiple_of(16) {
        return Err("its length is no multiple of 16");
    }
    let header = ExtentHeader {
        kind,
        body_bytes,
        ledger: LedgerId { partition: PartitionId(u64_at(h, 8)), sequence: u32_at(h, 16) },
        entry_count: u32_at(h, 20),
        first_entry: u64_at(h, 24),
        base_offset: u64_at(h, 32),
        max_append_time_ms: u64_at(h, 40),
        record_count: u64_at(h, 48),
        block_sequence: u64_at(h, 56),
    };
    if header.entry_count == 0 || header.base_offset.checked_add(header.record_count).is_none() {
        return Err("its counts are out of range");
    }
    Ok(header)
}

/// The batches of an extent's body, each without padding; `None` where one does not fit, and then no more.
pub fn batches(body: &[u8]) -> impl Iterator<Item = Option<&[u8]>> {
    let mut rest = body;
    let mut failed = false;
    std::iter::from_fn(move || {
        if rest.is_empty() || failed {
            return None;
        }
        let bytes = batch_bytes(rest);
        failed = bytes.is_none();
        bytes.map_or(Some(None), |bytes| {
            let batch = &rest[..bytes];
            rest = &rest[padded(bytes)..];
            Some(Some(batch))
        })
    })
}

/// The length of the batch at the start of `body`, if that much is there.
pub fn batch_bytes(body: &[u8]) -> Option<usize> {
    let said = body.get(16..20)?;
    let bytes = u32::from_le_bytes([said[0], said[1], said[2], said[3]]) as usize;
    (batch::HEADER_BYTES <= bytes && padded(bytes) <= body.len()).then_some(bytes)
}

/// Base offset of the batch at the start of `body`.
pub fn batch_base_offset(body: &[u8]) -> u64 {
    u64_at(body, 0)
}

/// The part of an extent that a reader gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// In the body.
    pub start: usize,
    pub end: usize,
    pub first_offset: u64,
    pub next_offset: u64,
}

/// Whole batches of `body`, which holds the messages `offsets`, from the one that holds `offset` on: as many as fit
/// into `bytes_max`, at least one. `None`: the batches do not lead to the offset.
pub fn cut(body: &[u8], offsets: Range<u64>, offset: u64, bytes_max: usize) -> Option<Cut> {
    debug_assert!(offsets.contains(&offset), "{offset} in {offsets:?}");
    // Where the batch at `position` ends, and the offset after it.
    let step = |position: usize| {
        let end = position + padded(batch_bytes(&body[position..])?);
        let next_offset = if end < body.len() { batch_base_offset(body.get(end..end + 8)?) } else { offsets.end };
        Some((end, next_offset))
    };
    let mut cut = Cut { start: 0, end: body.len(), first_offset: offsets.start, next_offset: offsets.end };
    if offset != offsets.start {
        loop {
            let (end, next_offset) = step(cut.start)?;
            if offset < next_offset {
                break;
            }
            if end == body.len() || next_offset <= cut.first_offset {
                return None;
            }
            (cut.start, cut.first_offset) = (end, next_offset);
        }
    }
    if body.len() - cut.start <= bytes_max {
        return Some(cut);
    }
    (cut.end, cut.next_offset) = step(cut.start)?;
    while cut.end < body.len() {
        let (end, next_offset) = step(cut.end)?;
        if bytes_max < end - cut.start {
            break;
        }
        (cut.end, cut.next_offset) = (end, next_offset);
    }
    Some(cut)
}

/// Checks every batch of a data extent, its checksum included, and that together they are what the extent says.
///
/// `visit` gets the header and the start in `body` of each good batch, in order. Returns the messages that are not
/// good; empty when all is well.
pub fn check_batches(
    extent: &ExtentHeader,
    body: &[u8],
    mut visit: impl FnMut(&batch::Header, usize),
) -> Vec<Range<u64>> {
    let mut bad = Vec::new();
    let mut expected = extent.base_offset;
    let mut lost = false;
    let mut position = 0;
    while let Some(bytes) = batch_bytes(&body[position..]) {
        let check = if cfg!(feature = "mutant-skip-crc") { batch::header } else { batch::check_appended };
        let header = check(&body[position..position + bytes]).ok().filter(|header| {
            let next_offset = header.base_offset.checked_add(header.record_count as u64);
            // Without a bad one before it a batch lies at the very offset: the field is outside its own checksum.
            let placed = if lost { expected <= header.base_offset } else { expected == header.base_offset };
            placed && next_offset.is_some_and(|next_offset| next_offset <= extent.next_offset())
        });
        lost = header.is_none();
        if let Some(header) = header {
            if expected < header.base_offset {
                bad.push(expected..header.base_offset);
            }
            visit(&header, position);
            expected = header.base_offset + header.record_count as u64;
        }
        position += padded(bytes);
    }
    if expected < extent.next_offset() {
        bad.push(expected..extent.next_offset());
    }
    bad
}

fn u32_at(bytes: &[u8], position: usize) -> u32 {
    u32::from_le_bytes([bytes[position], bytes[position + 1], bytes[position + 2], bytes[position + 3]])
}

fn u64_at(bytes: &[u8], position: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[position..position + 8]);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Vec<u8> {
        let mut bytes = vec![0xaa; 2 * ALIGNMENT];
        let id = BlockId {
            kind: SegmentKind::Journal,
            shard: ShardId(3),
            generation: 7,
            sequence: 9,
            durable_sequence: 8,
            previous_crc: 5,
        };
        let mut writer = BlockWriter::new(&mut bytes, 9);
        let mut builder = batch::Builder::new(4096);
        let mut body = Vec::new();
        let mut sizes = Vec::new();
        for payload in [&b"one"[..], &[2; 300], b""] {
            builder.push(&batch::NewRecord { payload, ..Default::default() }).unwrap();
            builder.push(&batch::NewRecord { payload, ..Default::default() }).unwrap();
            let before = body.len();
            builder.seal(&batch::Seal::default(), &mut body);
            sizes.push(body.len() - before);
        }
        let ledger = LedgerId { partition: PartitionId(11), sequence: 2 };
        writer.extent(&ExtentHeader {
            kind: ExtentKind::Data,
            body_bytes: sizes.iter().map(|bytes| padded(*bytes) as u32).sum(),
            ledger,
            first_entry: 4,
            entry_count: 3,
            base_offset: 100,
            record_count: 6,
            max_append_time_ms: 1000,
            block_sequence: 0,
        });
        let mut rest = &body[..];
        for (index, size) in sizes.iter().enumerate() {
            writer.batch(&rest[..*size], 100 + 2 * index as u64, 1000);
            rest = &rest[*size..];
        }
        writer.extent(&ExtentHeader {
            kind: ExtentKind::State,
            body_bytes: 32,
            ledger: LedgerId { sequence: 0, ..ledger },
            first_entry: 0,
            entry_count: 1,
            base_offset: 0,
            record_count: 0,
            max_append_time_ms: 0,
            block_sequence: 0,
        });
        writer.checked(&[1; 32]);
        writer.finish(&id);
        bytes
    }

    #[test]
    fn a_block_reads_as_it_was_written() {
        let bytes = sample();
        let header = check(&bytes).unwrap();
        assert_eq!((header.id.shard, header.id.generation, header.id.sequence), (ShardId(3), 7, 9));
        assert_eq!((header.id.durable_sequence, header.id.previous_crc), (8, 5));
        let found: Vec<_> = extents(&header, &bytes).map(Result::unwrap).collect();
        assert_eq!(found.len(), 2);
        let (extent, position) = found[0];
        assert_eq!((extent.first_entry, extent.entry_count, extent.block_sequence), (4, 3, 9));
        let body = &bytes[position + EXTENT_HEADER_BYTES..][..extent.body_bytes as usize];
        let mut offsets = Vec::new();
        assert_eq!(check_batches(&extent, body, |header, _| offsets.push(header.base_offset)), []);
        assert_eq!(offsets, [100, 102, 104]);
        let end = header.body_bytes as usize;
        assert!(bytes[end..].iter().all(|&byte| byte == 0), "what is behind the extents is cleared");
    }

    #[test]
    fn a_cut_starts_at_the_batch_of_the_offset() {
        let bytes = sample();
        let header = check(&bytes).unwrap();
        let (extent, position) = extents(&header, &bytes).next().unwrap().unwrap();
        let body = &bytes[position + EXTENT_HEADER_BYTES..][..extent.body_bytes as usize];
        let offsets = |offset, bytes_max| {
            let cut = cut(body, 100..106, offset, bytes_max).unwrap();
            (cut.first_offset, cut.next_offset)
        };
        assert_eq!(offsets(100, 1 << 20), (100, 106));
        assert_eq!(offsets(103, 1 << 20), (102, 106));
        assert_eq!(offsets(105, 1), (104, 106));
        assert_eq!(offsets(101, 1), (100, 102));
        assert_eq!(cut(&body[..40], 100..106, 103, 1), None, "batches that do not lead there");
    }

    #[test]
    fn every_flipped_bit_is_found_by_the_block_or_by_a_batch() {
        let bytes = sample();
        let header = check(&bytes).unwrap();
        for position in 0..header.body_bytes as usize {
            let mut bad = bytes.clone();
            bad[position] ^= 1;
            let whole = check(&bad).is_ok_and(|header| {
                extents(&header, &bad).flatten().filter(|(extent, _)| extent.kind == ExtentKind::Data).all(
                    |(extent, start)| {
                        let body = &bad[start + EXTENT_HEADER_BYTES..][..extent.body_bytes as usize];
                        check_batches(&extent, body, |_, _| ()).is_empty()
                    },
                )
            });
            // Padding between batches is nobody's.
            let (extent, start) = extents(&header, &bytes).next().unwrap().unwrap();
            let body_start = start + EXTENT_HEADER_BYTES;
            let mut at = body_start;
            let mut padding = false;
            while at < body_start + extent.body_bytes as usize {
                let batch = batch_bytes(&bytes[at..]).unwrap();
                padding |= (at + batch..at + padded(batch)).contains(&position);
                at += padded(batch);
            }
            assert_eq!(whole, padding, "bit 0 of byte {position}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error_and_never_a_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..20_000), graft in any::<bool>()) {
            if graft && 64 <= bytes.len() {
                bytes[..64].copy_from_slice(&sample()[..64]);
            }
            prop_assert!(check(&bytes).is_err());
            let _ends = batches(&bytes).count();
            let _cut = cut(&bytes, 0..10, 5, 100);
            if let Ok(extent) = extent_header(&bytes) {
                check_batches(&extent, &bytes, |_, _| ());
            }
        }

        #[test]
        fn a_changed_block_never_panics(changes in proptest::collection::vec((0usize..8192, any::<u8>()), 1..20)) {
            let mut bytes = sample();
            for (position, value) in changes {
                bytes[position] = value;
            }
            if let Ok(header) = check(&bytes) {
                for (extent, start) in extents(&header, &bytes).flatten() {
                    let body = &bytes[start + EXTENT_HEADER_BYTES..][..extent.body_bytes as usize];
                    check_batches(&extent, body, |_, _| ());
                    let offsets = extent.base_offset..extent.next_offset().max(extent.base_offset + 1);
                    let _cut = cut(body, offsets, extent.base_offset, 100);
                    crate::state::RowChange::decode_all(extent.ledger.partition, body, |_| ());
                }
            }
        }
    }
}
