//! Checking the segments of a store without its node: every header, the chain of blocks, every checksum. Blocking;
//! nothing is changed.
//!
//! What is damage and what is a torn tail is for recovery to say, so its replay does the reading, over a disk on which
//! nothing can be written ([`DryIo`]). Compacted segments, which the chain passes by, are walked one by one as the
//! scrubber does it. The index is not asked: what nobody needs any more is checked like everything else.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::PartitionId;
use futures_lite::future::block_on;

use crate::block::{self, ExtentHeader, ExtentKind};
use crate::checkpoint::LastWhole;
use crate::index::IndexWorker;
use crate::io::{ALIGNMENT, File as IoFile, Io};
use crate::record_log;
use crate::recovery::{self, Visited, Visitor};
use crate::scrub;
use crate::segment::{self, SegmentHeader, SegmentId, SegmentKind};
use crate::state::{Checkpoint, RowChange};
use crate::store::{OpenError, TornTail};

/// Findings beyond these are counted and not listed.
const FINDINGS_MAX: usize = 10_000;

/// What is wrong with a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// The segment does not say any more what it is. Its blocks were not checked.
    Header,
    /// Blocks that are missing or not whole, although a later one says that they were durable.
    Blocks,
    /// Batches that do not match their checksums, in a block that does.
    Batches,
}

impl FindingKind {
    pub fn name(self) -> &'static str {
        match self {
            FindingKind::Header => "header",
            FindingKind::Blocks => "blocks",
            FindingKind::Batches => "batches",
        }
    }
}

/// Messages of a damaged place, as far as its extents still say which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostMessages {
    pub partition: PartitionId,
    pub offsets: Range<u64>,
}

/// A damaged place in a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub kind: FindingKind,
    pub segment: u32,
    /// From the start of the segment.
    pub positions: Range<u64>,
    pub messages: Vec<LostMessages>,
}

/// What a verification found.
#[derive(Debug, Default)]
pub struct Verified {
    pub segments: u64,
    pub blocks: u64,
    /// Segment bytes: what was there to be read.
    pub bytes: u64,
    /// Damage, in the order of segments and positions.
    pub findings: Vec<Finding>,
    /// Findings that are not listed.
    pub findings_beyond: u64,
    /// A block that was being written when the node stopped. It was never acknowledged, and is no damage.
    pub torn: Option<TornTail>,
}

impl Verified {
    pub fn is_damaged(&self) -> bool {
        !self.findings.is_empty()
    }
}

/// Bytes of the segments in `dir`.
pub fn segment_bytes(dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if segment::parse_name(&entry.path()).is_some() {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}

/// Checks all segments in `dir`, or only those of them that `only` names. `progress` hears of every read, in bytes;
/// what looks damaged is read more than once.
///
/// Errors: the disk does not answer, or a segment is of another store or of a later version.
pub fn verify(dir: &Path, only: Option<&[SegmentId]>, progress: impl Fn(u64) + 'static) -> Result<Verified, OpenError> {
    let io = DryIo { progress: Rc::new(progress) };
    block_on(verify_with(&io, dir, only))
}

async fn verify_with(io: &DryIo, dir: &Path, only: Option<&[SegmentId]>) -> Result<Verified, OpenError> {
    let mut verified = Verified::default();
    let wanted = |id: SegmentId| only.is_none_or(|only| only.contains(&id));
    let mut shard = None;
    for (path, bytes) in io.list(dir).await.map_err(recovery::open_error(format!("list {}", dir.display())))? {
        let Some(id) = segment::parse_name(&path).filter(|id| wanted(*id)) else { continue };
        if bytes < 2 * segment::HEADER_BYTES || bytes % (ALIGNMENT as u64) != 0 {
            // It was being made when the node stopped.
            continue;
        }
        verified.segments += 1;
        verified.bytes += bytes;
        match read_header(&path) {
            Ok(header) => shard = shard.or(header.map(|header| header.shard)),
            Err(HeaderError::Io(source)) => {
                return Err(OpenError::Io { what: format!("read {}", path.display()), source });
            }
            Err(HeaderError::Damaged) => verified.push(Finding {
                kind: FindingKind::Header,
                segment: id.0,
                positions: 0..segment::HEADER_BYTES,
                messages: Vec::new(),
            }),
        }
    }
    // Without one good header there is nothing that the blocks could be held against.
    let Some(shard) = shard else { return Ok(verified) };
    let mut segments = recovery::survey(io, dir, shard, &|_| None).await?;
    for (index, segment) in segments.iter_mut().enumerate() {
        if !wanted(SegmentId(index as u32)) {
            *segment = None;
        }
    }
    let compacted: Vec<(SegmentId, u64, u64)> = segments
        .iter()
        .enumerate()
        .filter_map(|(index, segment)| Some((SegmentId(index as u32), segment.as_ref()?)))
        .filter(|(_, segment)| segment.kind == SegmentKind::Compacted && 0 < segment.generation)
        .map(|(id, segment)| (id, segment.generation, segment.bytes))
        .collect();
    let mut check = Check {
        verified: &mut verified,
        lost: Vec::new(),
        // Of some segments nobody can say what lies between them, and a record log has no checkpoints.
        last_whole: (only.is_none() && shard != record_log::SHARD).then(LastWhole::default),
    };
    let replayed = recovery::replay(io, dir, shard, &mut segments, None, &mut check).await?;
    let mut lost = check.lost;
    verified.blocks += replayed.blocks;
    verified.torn = replayed.torn;
    for range in replayed.damaged {
        let positions = range.start_position..range.end_position;
        // A range that is whole but for batches was visited, too.
        let known = verified.findings.iter().any(|finding| {
            finding.segment == range.segment
                && positions.start <= finding.positions.start
                && finding.positions.end <= positions.end
        });
        if !known {
            let messages = std::mem::take(&mut lost);
            verified.push(Finding { kind: FindingKind::Blocks, segment: range.segment, positions, messages });
        }
    }
    for (id, generation, bytes) in compacted {
        let path = segment::path(dir, id);
        let failed = || recovery::open_error(format!("read {}", path.display()));
        let file = io.open(&path).await.map_err(failed())?;
        let walked = scrub::walk(&file, shard, generation, bytes, &mut async |_| true).await.map_err(failed())?;
        let walked = walked.expect("nothing stops this walk");
        verified.blocks += walked.blocks;
        for positions in walked.suspects {
            verified.push(Finding { kind: FindingKind::Blocks, segment: id.0, positions, messages: Vec::new() });
        }
    }
    verified.findings.sort_by_key(|finding| (finding.segment, finding.positions.start));
    Ok(verified)
}

enum HeaderError {
    Io(io::Error),
    Damaged,
}

/// `Ok(None)`: never used.
fn read_header(path: &Path) -> Result<Option<SegmentHeader>, HeaderError> {
    let mut head = [0; ALIGNMENT];
    let file = File::open(path).map_err(HeaderError::Io)?;
    file.read_exact_at(&mut head, 0).map_err(HeaderError::Io)?;
    match segment::decode(&head) {
        Ok(header) => Ok(header),
        // The survey says so, with the path.
        Err(segment::SegmentError::Version(_)) => Ok(None),
        Err(_) => Err(HeaderError::Damaged),
    }
}

impl Verified {
    fn push(&mut self, finding: Finding) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding);
        } else {
            self.findings_beyond += 1;
        }
    }
}

/// Notes what is bad in the blocks that replay visits.
struct Check<'a> {
    verified: &'a mut Verified,
    lost: Vec<LostMessages>,
    /// `None`: missing segments are no damage.
    last_whole: Option<LastWhole>,
}

impl Visitor for Check<'_> {
    fn block(&mut self, block: &Visited<'_>) {
        if let Some(last_whole) = &mut self.last_whole {
            last_whole.block(block.header.id.sequence);
            for extent in block.extents.iter().filter(|extent| extent.header.kind == ExtentKind::State) {
                RowChange::decode_all(extent.header.ledger.partition, extent.body(block.bytes), |change| {
                    if let RowChange::Checkpoint(Checkpoint::End { covered, .. }) = change {
                        last_whole.end(covered);
                    }
                });
            }
        }
        for extent in block.extents {
            let header = &extent.header;
            if header.kind != ExtentKind::Data || extent.batches.len() == header.entry_count as usize {
                continue;
            }
            let bad = block::check_batches(header, extent.body(block.bytes), |_, _| {});
            let start = block.position + extent.position as u64;
            let end = start + (block::EXTENT_HEADER_BYTES as u64) + u64::from(header.body_bytes);
            let partition = header.ledger.partition;
            self.verified.push(Finding {
                kind: FindingKind::Batches,
                segment: block.segment.0,
                positions: start..end,
                messages: bad.into_iter().map(|offsets| LostMessages { partition, offsets }).collect(),
            });
        }
    }

    fn lost(&mut self, header: &ExtentHeader) {
        if self.lost.len() < FINDINGS_MAX {
            let offsets = header.base_offset..header.next_offset();
            self.lost.push(LostMessages { partition: header.ledger.partition, offsets });
        }
    }

    fn may_be_gone(&self) -> u64 {
        self.last_whole.as_ref().map_or(u64::MAX, LastWhole::covered)
    }
}

/// The disk for a dry run: reads are real, everything else is not done and reported as done.
#[derive(Clone)]
struct DryIo {
    progress: Rc<dyn Fn(u64)>,
}

struct DryFile {
    file: File,
    progress: Rc<dyn Fn(u64)>,
}

impl Io for DryIo {
    type File = DryFile;
    type Buffer = Vec<u8>;

    fn buffer(&self, bytes: usize) -> Vec<u8> {
        vec![0; bytes]
    }

    async fn open(&self, path: &Path) -> io::Result<DryFile> {
        Ok(DryFile { file: File::open(path)?, progress: self.progress.clone() })
    }

    async fn open_for_sync(&self, path: &Path) -> io::Result<DryFile> {
        self.open(path).await
    }

    async fn create(&self, _path: &Path, _bytes: u64) -> io::Result<DryFile> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    async fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::metadata(path).map(drop)
    }

    async fn list(&self, dir: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_file() {
                files.push((entry.path(), metadata.len()));
            }
        }
        Ok(files)
    }

    async fn remove(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn remove_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        Ok(0)
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn wall_clock_ms(&self) -> u64 {
        0
    }

    fn spawn(&self, _task: impl Future<Output = ()> + 'static) {
        unreachable!("a dry run has no tasks");
    }

    async fn sleep(&self, _time: Duration) {}

    fn start_index(&self, _worker: IndexWorker) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn yield_if_needed(&self) {}
}

impl IoFile for DryFile {
    type Buffer = Vec<u8>;
    type Read = Rc<[u8]>;

    async fn write_at(&self, _buffer: Rc<Vec<u8>>, _position: u64) -> io::Result<()> {
        Ok(())
    }

    async fn read_once(&self, position: u64, bytes: usize) -> io::Result<Rc<[u8]>> {
        let mut out = vec![0; bytes];
        let mut have = 0;
        while have < bytes {
            match self.file.read_at(&mut out[have..], position + have as u64) {
                Ok(0) => break,
                Ok(read) => have += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        out.truncate(have);
        (self.progress)(have as u64);
        Ok(out.into())
    }

    async fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
