//! Segments: the files of a store. Each starts with a header of 4096 bytes; blocks follow.
//!
//! A segment is used many times. Each use has a generation of its own, higher than all before it in the same store, so
//! that blocks of an earlier use are told from those of this one. In one use it is part of the journal, in another it
//! holds what the compactor moved. Source: `storage/README.md`, "Segment".

use std::fmt;
use std::path::{Path, PathBuf};

use drava_protocol::ShardId;

use crate::io::ALIGNMENT;

pub const MAGIC: [u8; 4] = *b"DRVS";
pub const VERSION: u16 = 1;
/// Where the first block starts.
pub const HEADER_BYTES: u64 = ALIGNMENT as u64;
const CHECKED_BYTES: usize = 28;
const EXTENSION: &str = "segment";

/// A file of the journal, by number: the same over all its uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub u32);

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// What one use of a segment is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum SegmentKind {
    /// Its blocks are links of the journal's chain.
    #[default]
    Journal = 0,
    /// Extents that were moved here from other segments. Its blocks are a chain of their own; replay passes it by.
    Compacted = 1,
}

impl SegmentKind {
    pub(crate) fn from_byte(byte: u8) -> Option<SegmentKind> {
        match byte {
            0 => Some(SegmentKind::Journal),
            1 => Some(SegmentKind::Compacted),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    pub shard: ShardId,
    pub segment: SegmentId,
    pub generation: u64,
    pub kind: SegmentKind,
    /// The whole file, in bytes: one that has fewer was cut. 0: not said.
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    #[error("the file is not a segment")]
    Magic,
    #[error("segment version {0} is not known; this side knows {VERSION}")]
    Version(u16),
    #[error("the segment header is damaged")]
    Checksum,
    #[error("segments of kind {0} are not known")]
    Kind(u8),
}

pub fn encode(header: &SegmentHeader, out: &mut [u8]) {
    out.fill(0);
    out[0..4].copy_from_slice(&MAGIC);
    out[4..6].copy_from_slice(&VERSION.to_le_bytes());
    out[6..8].copy_from_slice(&header.shard.0.to_le_bytes());
    out[8..16].copy_from_slice(&header.generation.to_le_bytes());
    out[16..20].copy_from_slice(&header.segment.0.to_le_bytes());
    out[20] = header.kind as u8;
    let pages = u32::try_from(header.bytes / HEADER_BYTES).unwrap_or(0);
    out[24..28].copy_from_slice(&pages.to_le_bytes());
    let crc = crc32c::crc32c(&out[..CHECKED_BYTES]);
    out[28..32].copy_from_slice(&crc.to_le_bytes());
}

/// `None`: all zeros, a segment that was made and not used yet.
pub fn decode(bytes: &[u8]) -> Result<Option<SegmentHeader>, SegmentError> {
    let Some(h) = bytes.first_chunk::<32>() else {
        return Err(SegmentError::Magic);
    };
    if h.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    if h[0..4] != MAGIC {
        return Err(SegmentError::Magic);
    }
    // Before the version: one that is damaged is not another's, and the rest of the store opens.
    if crc32c::crc32c(&h[..CHECKED_BYTES]) != u32::from_le_bytes([h[28], h[29], h[30], h[31]]) {
        return Err(SegmentError::Checksum);
    }
    let version = u16::from_le_bytes([h[4], h[5]]);
    if version != VERSION {
        return Err(SegmentError::Version(version));
    }
    let kind = SegmentKind::from_byte(h[20]).ok_or(SegmentError::Kind(h[20]))?;
    let mut generation = [0; 8];
    generation.copy_from_slice(&h[8..16]);
    Ok(Some(SegmentHeader {
        shard: ShardId(u16::from_le_bytes([h[6], h[7]])),
        segment: SegmentId(u32::from_le_bytes([h[16], h[17], h[18], h[19]])),
        generation: u64::from_le_bytes(generation),
        kind,
        bytes: u64::from(u32::from_le_bytes([h[24], h[25], h[26], h[27]])) * HEADER_BYTES,
    }))
}

/// Generations and sequences go up by one from 1: no node comes this far, and one more is a number still.
pub const COUNTER_MAX: u64 = 1 << 62;

/// Blocks that do not count: a write failed, and the journal went on elsewhere from the last durable block.
///
/// Blocks from `sequence` on, in segments of a generation from `from_generation` to below `generation`, may be whole on
/// disk, and were never acknowledged. Every header says so that is written while such a segment is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    pub from_generation: u64,
    /// Of the segment in which the journal went on.
    pub generation: u64,
    pub sequence: u64,
}

/// More are not written: a disk that fails this often is not written to any more.
pub const CUTS_MAX: usize = 64;
const CUTS_START: usize = 32;
const CUT_BYTES: usize = 24;

impl Cut {
    /// Whether blocks from `sequence` on do not count in segments of this generation.
    pub fn covers(&self, generation: u64) -> bool {
        (self.from_generation..self.generation).contains(&generation)
    }
}

/// Writes the cuts behind a header that [`encode`] wrote. None leaves the zeros that are there.
pub fn encode_cuts(cuts: &[Cut], out: &mut [u8]) {
    assert!(cuts.len() <= CUTS_MAX, "{} cuts", cuts.len());
    if cuts.is_empty() {
        return;
    }
    let body = &mut out[CUTS_START + 8..][..cuts.len() * CUT_BYTES];
    for (cut, out) in cuts.iter().zip(body.chunks_exact_mut(CUT_BYTES)) {
        out[..8].copy_from_slice(&cut.from_generation.to_le_bytes());
        out[8..16].copy_from_slice(&cut.generation.to_le_bytes());
        out[16..].copy_from_slice(&cut.sequence.to_le_bytes());
    }
    let crc = crc32c::crc32c(body);
    out[CUTS_START..CUTS_START + 4].copy_from_slice(&(cuts.len() as u32).to_le_bytes());
    out[CUTS_START + 4..CUTS_START + 8].copy_from_slice(&crc.to_le_bytes());
}

/// The cuts in the first [`HEADER_BYTES`] of a segment.
pub fn decode_cuts(bytes: &[u8]) -> Result<Vec<Cut>, SegmentError> {
    let (head, rest) =
        bytes.get(CUTS_START..).and_then(|rest| rest.split_first_chunk::<8>()).ok_or(SegmentError::Checksum)?;
    let count = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    if count == 0 {
        return Ok(Vec::new());
    }
    let body = rest.get(..count.min(CUTS_MAX + 1) * CUT_BYTES).filter(|_| count <= CUTS_MAX);
    let body = body.ok_or(SegmentError::Checksum)?;
    if crc32c::crc32c(body) != u32::from_le_bytes([head[4], head[5], head[6], head[7]]) {
        return Err(SegmentError::Checksum);
    }
    let field = |cut: &[u8], at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&cut[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let cuts = body.chunks_exact(CUT_BYTES).map(|cut| Cut {
        from_generation: field(cut, 0),
        generation: field(cut, 8),
        sequence: field(cut, 16),
    });
    Ok(cuts.collect())
}

pub fn path(dir: &Path, segment: SegmentId) -> PathBuf {
    dir.join(format!("{:08}.{EXTENSION}", segment.0))
}

/// The number in a file name that [`path`] made.
pub fn parse_name(path: &Path) -> Option<SegmentId> {
    if path.extension()? != EXTENSION {
        return None;
    }
    path.file_stem()?.to_str()?.parse().ok().map(SegmentId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_what_the_segment_is_for_and_its_checksum_covers_it() {
        let mut bytes = vec![0xff; HEADER_BYTES as usize];
        for kind in [SegmentKind::Journal, SegmentKind::Compacted] {
            let header =
                SegmentHeader { shard: ShardId(3), segment: SegmentId(7), generation: 9, kind, bytes: 64 << 20 };
            encode(&header, &mut bytes);
            assert_eq!(decode(&bytes), Ok(Some(header)));
        }
        bytes[20] = SegmentKind::Journal as u8;
        assert_eq!(decode(&bytes), Err(SegmentError::Checksum));
        bytes[20] = 2;
        let crc = crc32c::crc32c(&bytes[..CHECKED_BYTES]);
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(decode(&bytes), Err(SegmentError::Kind(2)));
    }

    #[test]
    fn a_damaged_version_is_not_another_version() {
        let header = SegmentHeader {
            shard: ShardId(3),
            segment: SegmentId(7),
            generation: 9,
            kind: SegmentKind::Journal,
            bytes: 1 << 20,
        };
        let mut bytes = vec![0; HEADER_BYTES as usize];
        encode(&header, &mut bytes);
        assert_eq!(decode(&bytes), Ok(Some(header)));
        bytes[5] ^= 0x20;
        assert_eq!(decode(&bytes), Err(SegmentError::Checksum));
        let crc = crc32c::crc32c(&bytes[..CHECKED_BYTES]);
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(decode(&bytes), Err(SegmentError::Version(0x2001)));
    }
}
