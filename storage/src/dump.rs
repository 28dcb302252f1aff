//! Reading a segment offline, for people: what is in it, item by item. Blocking; nothing is changed.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use drava_protocol::batch;
use drava_protocol::frame::padded;

use crate::block::{self, BlockError, BlockHeader, EXTENT_HEADER_BYTES, ExtentHeader, ExtentKind};
use crate::io::ALIGNMENT;
use crate::segment::{self, SegmentHeader, SegmentKind};
use crate::state::{Checkpoint, RowChange};

/// Something in a segment and where it starts, in bytes from the start of the file.
#[derive(Clone, Debug)]
pub struct Item {
    pub position: u64,
    pub kind: ItemKind,
}

#[derive(Clone, Debug)]
pub enum ItemKind {
    /// `None`: made and never used.
    Segment(Option<SegmentHeader>),
    Block(BlockHeader),
    Extent(ExtentHeader),
    Batch {
        header: batch::Header,
        good: bool,
    },
    /// A batch whose header cannot be read.
    BadBatch,
    /// A row of state: what is done to it, its key, the length of its value.
    Row {
        change: &'static str,
        key: Vec<u8>,
        value_bytes: usize,
    },
    Record {
        bytes: u32,
    },
    /// A block of this use of the segment that is not whole.
    BadBlock(BlockError),
    /// Bytes that are no block of this use: never written, or left from an earlier use.
    Nothing {
        end_position: u64,
    },
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>10} ", self.position)?;
        match &self.kind {
            ItemKind::Segment(None) => write!(f, "segment, not used yet"),
            ItemKind::Segment(Some(header)) => {
                let kind = match header.kind {
                    SegmentKind::Journal => "journal",
                    SegmentKind::Compacted => "compacted",
                };
                write!(
                    f,
                    "{kind} segment {} of shard {}, generation {}",
                    header.segment, header.shard, header.generation
                )
            }
            ItemKind::Block(header) => write!(
                f,
                "block {} ({} bytes, {} extents, durable through {})",
                header.id.sequence, header.block_bytes, header.extent_count, header.id.durable_sequence
            ),
            ItemKind::Extent(header) => write!(
                f,
                "  {:?} ledger {} entries {}..{} messages {}..{} ({} bytes)",
                header.kind,
                header.ledger,
                header.first_entry,
                header.first_entry + header.entry_count as u64,
                header.base_offset,
                header.next_offset(),
                header.body_bytes
            ),
            ItemKind::Batch { header, good } => write!(
                f,
                "    batch at {} of {} records, {} bytes, {:?}, producer {}/{} from {}, appended {}{}",
                header.base_offset,
                header.record_count,
                header.batch_bytes,
                header.compression,
                header.producer,
                header.producer_epoch,
                header.base_sequence,
                header.append_time_ms,
                if *good { "" } else { ", CHECKSUM DIFFERS" }
            ),
            ItemKind::BadBatch => write!(f, "    batch, UNREADABLE"),
            ItemKind::Row { change, key, value_bytes } => {
                write!(f, "    {change} {} ({value_bytes} bytes)", key.escape_ascii())
            }
            ItemKind::Record { bytes } => write!(f, "    record of {bytes} bytes"),
            ItemKind::BadBlock(error) => write!(f, "BAD BLOCK: {error}"),
            ItemKind::Nothing { end_position } => write!(f, "nothing up to {end_position}"),
        }
    }
}

/// The items of the segment at `path`, front to back. Ends after the first error of the disk.
pub fn segment(path: &Path) -> io::Result<Dump> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    let mut head = [0; ALIGNMENT];
    file.read_exact_at(&mut head, 0)?;
    let header = segment::decode(&head).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let first = Item { position: 0, kind: ItemKind::Segment(header) };
    Ok(Dump {
        file,
        bytes,
        position: segment::HEADER_BYTES,
        header,
        items: VecDeque::from([first]),
        nothing_from: None,
    })
}

#[derive(Debug)]
pub struct Dump {
    file: File,
    bytes: u64,
    position: u64,
    header: Option<SegmentHeader>,
    items: VecDeque<Item>,
    nothing_from: Option<u64>,
}

impl Iterator for Dump {
    type Item = io::Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.items.is_empty() {
            if self.bytes <= self.position {
                let position = self.nothing_from.take()?;
                return Some(Ok(Item { position, kind: ItemKind::Nothing { end_position: self.bytes } }));
            }
            if let Err(error) = self.block() {
                self.position = self.bytes;
                self.nothing_from = None;
                return Some(Err(error));
            }
        }
        self.items.pop_front().map(Ok)
    }
}

impl Dump {
    /// Reads what is at the position, and goes on behind it.
    fn block(&mut self) -> io::Result<()> {
        let position = self.position;
        let mut head = [0; block::HEADER_BYTES];
        self.file.read_exact_at(&mut head, position)?;
        let ours = |header: &BlockHeader| {
            self.header
                .is_some_and(|segment| segment.generation == header.id.generation && segment.shard == header.id.shard)
                && position + header.block_bytes as u64 <= self.bytes
        };
        let Some(header) = block::header(&head).ok().filter(ours) else {
            self.nothing_from.get_or_insert(position);
            self.position += ALIGNMENT as u64;
            return Ok(());
        };
        if let Some(from) = self.nothing_from.take() {
            self.items.push_back(Item { position: from, kind: ItemKind::Nothing { end_position: position } });
        }
        let mut bytes = vec![0; header.block_bytes as usize];
        self.file.read_exact_at(&mut bytes, position)?;
        if let Err(error) = block::check(&bytes) {
            self.items.push_back(Item { position, kind: ItemKind::BadBlock(error) });
            self.position += ALIGNMENT as u64;
            return Ok(());
        }
        self.items.push_back(Item { position, kind: ItemKind::Block(header) });
        for (extent, start) in block::extents(&header, &bytes).flatten() {
            self.items.push_back(Item { position: position + start as u64, kind: ItemKind::Extent(extent) });
            let body_start = start + EXTENT_HEADER_BYTES;
            let body = &bytes[body_start..body_start + extent.body_bytes as usize];
            self.extent(&extent, body, position + body_start as u64);
        }
        self.position += header.block_bytes as u64;
        Ok(())
    }

    fn extent(&mut self, extent: &ExtentHeader, body: &[u8], mut position: u64) {
        match extent.kind {
            ExtentKind::Data => {
                for bytes in block::batches(body).flatten() {
                    let kind = match batch::header(bytes) {
                        Ok(header) => ItemKind::Batch { header, good: batch::check_appended(bytes).is_ok() },
                        Err(_) => ItemKind::BadBatch,
                    };
                    self.items.push_back(Item { position, kind });
                    position += padded(bytes.len()) as u64;
                }
            }
            ExtentKind::State => RowChange::decode_all(extent.ledger.partition, body, |change| {
                let bytes = change.encoded_bytes() as u64;
                let (change, key, value_bytes) = match change {
                    RowChange::Put { key, value } => ("put", key, value.len()),
                    RowChange::Delete { key } => ("delete", key, 0),
                    RowChange::Trim(trim) => ("trim to", trim.start_offset.to_string().into_bytes(), 0),
                    RowChange::Drop => ("drop the partition", Vec::new(), 0),
                    RowChange::Checkpoint(Checkpoint::Row { key, value, .. }) => ("as indexed", key, value.len()),
                    RowChange::Checkpoint(Checkpoint::Partition { .. }) => ("partition as indexed", Vec::new(), 0),
                    RowChange::Checkpoint(Checkpoint::Extent { .. }) => ("extent as indexed", Vec::new(), 0),
                    RowChange::Checkpoint(Checkpoint::End { .. }) => ("end of a checkpoint", Vec::new(), 0),
                };
                self.items.push_back(Item { position, kind: ItemKind::Row { change, key, value_bytes } });
                position += bytes;
            }),
            ExtentKind::Records => {
                for record in crate::record_log::decode_records(body) {
                    let bytes = record.len() as u32;
                    self.items.push_back(Item { position, kind: ItemKind::Record { bytes } });
                    position += crate::record_log::record_bytes(&record) as u64;
                }
            }
        }
    }
}
