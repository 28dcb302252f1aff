//! What is staged for the next blocks.
//!
//! A group becomes one block. Its entries are chained per ledger as they come, so that writing them out side by side
//! needs no sorting and no lookup: a partition remembers its extent in the newest group.

use std::collections::VecDeque;

use drava_protocol::frame::padded;
use drava_protocol::{LedgerId, PartitionId};
use drava_runtime::chunk::Slice;
use drava_runtime::local::OneshotSender;

use crate::block::{self, BlockWriter, ExtentHeader, ExtentKind};
use crate::index::Trim;
use crate::state::RowChange;

/// Ends a chain.
const NONE: u32 = u32::MAX;
/// Emptied groups kept for their memory.
const FREE_MAX: usize = 8;

pub(crate) struct StagedEntry {
    pub(crate) bytes: Slice,
    pub(crate) base_offset: u64,
    pub(crate) append_time_ms: u64,
    next: u32,
}

pub(crate) struct StagedRow {
    pub(crate) change: RowChange,
    next: u32,
}

/// The entries or rows of one ledger in a group.
#[derive(Clone, Debug)]
pub(crate) struct StagedExtent {
    /// Index of the partition in the store.
    pub(crate) partition_index: u32,
    pub(crate) header: ExtentHeader,
    head: u32,
    tail: u32,
    /// Of the header, from the start of the block. Known once the block is written.
    pub(crate) position: u32,
}

/// Where a partition's last extent of a kind is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ChainPlace {
    /// 0: nowhere.
    group: u64,
    extent: u32,
}

pub(crate) struct Group<T> {
    number: u64,
    pub(crate) entries: Vec<StagedEntry>,
    pub(crate) rows: Vec<StagedRow>,
    pub(crate) extents: Vec<StagedExtent>,
    pub(crate) tokens: Vec<T>,
    /// Told when the group is durable.
    pub(crate) waiters: Vec<OneshotSender<()>>,
    /// The block's header and all extents.
    pub(crate) body_bytes: usize,
}

impl<T> Group<T> {
    pub(crate) fn new() -> Group<T> {
        Group {
            number: 0,
            entries: Vec::new(),
            rows: Vec::new(),
            extents: Vec::new(),
            tokens: Vec::new(),
            waiters: Vec::new(),
            body_bytes: block::HEADER_BYTES,
        }
    }

    /// Adds the entry or row `index`, which alone would be an extent with this header, to the extent of its chain, or begins
    /// one. Returns what it follows there.
    fn chain(&mut self, header: ExtentHeader, partition_index: u32, chain: &mut ChainPlace, index: u32) -> Option<u32> {
        self.body_bytes += header.body_bytes as usize;
        let known = chain.group == self.number;
        let extent = self.extents.get_mut(chain.extent as usize);
        if let Some(extent) = extent.filter(|extent| known && extent.header.ledger == header.ledger) {
            let all = &mut extent.header;
            all.body_bytes += header.body_bytes;
            all.entry_count += header.entry_count;
            all.record_count += header.record_count;
            all.max_append_time_ms = all.max_append_time_ms.max(header.max_append_time_ms);
            return Some(std::mem::replace(&mut extent.tail, index));
        }
        *chain = ChainPlace { group: self.number, extent: self.extents.len() as u32 };
        self.body_bytes += block::EXTENT_HEADER_BYTES;
        self.extents.push(StagedExtent { partition_index, header, head: index, tail: index, position: 0 });
        None
    }

    /// Writes header-less content of the block; remembers where each extent starts.
    pub(crate) fn write(&mut self, writer: &mut BlockWriter<'_>, row: &mut Vec<u8>) {
        for extent in &mut self.extents {
            extent.position = writer.position() as u32;
            writer.extent(&extent.header);
            let mut next = extent.head;
            while next != NONE {
                if extent.header.kind == ExtentKind::Data {
                    let entry = &self.entries[next as usize];
                    writer.batch(&entry.bytes, entry.base_offset, entry.append_time_ms);
                    next = entry.next;
                } else {
                    let staged = &self.rows[next as usize];
                    row.clear();
                    staged.change.encode(row);
                    writer.checked(row);
                    next = staged.next;
                }
            }
        }
        // The bytes are copied: whoever received them may have the memory back.
        self.entries.clear();
    }
}

pub(crate) struct Staging<T> {
    groups: VecDeque<Group<T>>,
    free: Vec<Group<T>>,
    block_bytes_max: usize,
    last_number: u64,
    /// Body bytes of all groups.
    bytes: u64,
}

impl<T> Staging<T> {
    pub(crate) fn new(block_bytes_max: usize) -> Staging<T> {
        Staging { groups: VecDeque::new(), free: Vec::new(), block_bytes_max, last_number: 0, bytes: 0 }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// What is staged takes in memory, with all that is remembered of it.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let groups = self.groups.iter().chain(&self.free);
        self.bytes + groups.map(|group| group.lists_bytes() as u64).sum::<u64>()
    }

    /// What the next block takes, without padding.
    pub(crate) fn front_bytes(&self) -> Option<usize> {
        self.groups.front().map(|group| group.body_bytes)
    }

    pub(crate) fn take_front(&mut self) -> Option<Group<T>> {
        let group = self.groups.pop_front()?;
        self.bytes -= group.body_bytes as u64;
        Some(group)
    }

    /// The newest group.
    pub(crate) fn back(&mut self) -> Option<&mut Group<T>> {
        self.groups.back_mut()
    }

    /// Takes a group back for its memory.
    pub(crate) fn recycle(&mut self, mut group: Group<T>) {
        if FREE_MAX <= self.free.len() {
            return;
        }
        group.entries.clear();
        group.rows.clear();
        group.extents.clear();
        group.tokens.clear();
        group.waiters.clear();
        group.body_bytes = block::HEADER_BYTES;
        self.free.push(group);
    }

    /// Whether an entry of `bytes` begins a group.
    pub(crate) fn begins_group(&self, bytes: usize) -> bool {
        let need = bytes + block::EXTENT_HEADER_BYTES;
        self.groups.back().is_none_or(|group| self.block_bytes_max < group.body_bytes + need)
    }

    /// The newest group, or a new one, with room for `bytes` and an extent header.
    fn group_for(&mut self, bytes: usize) -> &mut Group<T> {
        if self.begins_group(bytes) {
            self.last_number += 1;
            let mut group = self.free.pop().unwrap_or_else(Group::new);
            group.number = self.last_number;
            self.bytes += group.body_bytes as u64;
            self.groups.push_back(group);
        }
        self.groups.back_mut().expect("there is one now")
    }

    pub(crate) fn entry(&mut self, new: NewStaged, chain: &mut ChainPlace, token: T) {
        let body_bytes = padded(new.bytes.len());
        let header = ExtentHeader {
            kind: ExtentKind::Data,
            body_bytes: body_bytes as u32,
            ledger: new.ledger,
            first_entry: new.entry,
            entry_count: 1,
            base_offset: new.base_offset,
            record_count: new.record_count as u64,
            max_append_time_ms: new.append_time_ms,
            block_sequence: 0,
        };
        let group = self.group_for(body_bytes);
        let before = group.body_bytes;
        let index = group.entries.len() as u32;
        group.entries.push(StagedEntry {
            bytes: new.bytes,
            base_offset: new.base_offset,
            append_time_ms: new.append_time_ms,
            next: NONE,
        });
        group.tokens.push(token);
        if let Some(last) = group.chain(header, new.partition_index, chain, index) {
            group.entries[last as usize].next = index;
        }
        let added = group.body_bytes - before;
        self.bytes += added as u64;
    }

    pub(crate) fn row(
        &mut self,
        partition: PartitionId,
        partition_index: u32,
        change: RowChange,
        chain: &mut ChainPlace,
    ) -> &mut Group<T> {
        let body_bytes = change.encoded_bytes();
        let header = ExtentHeader {
            kind: ExtentKind::State,
            body_bytes: body_bytes as u32,
            ledger: LedgerId { partition, sequence: 0 },
            first_entry: 0,
            entry_count: 1,
            base_offset: 0,
            record_count: 0,
            max_append_time_ms: 0,
            block_sequence: 0,
        };
        let group = self.group_for(body_bytes);
        let before = group.body_bytes;
        let index = group.rows.len() as u32;
        group.rows.push(StagedRow { change, next: NONE });
        if let Some(last) = group.chain(header, partition_index, chain, index) {
            group.rows[last as usize].next = index;
        }
        let added = group.body_bytes - before;
        self.bytes += added as u64;
        self.groups.back_mut().expect("the group of this row")
    }
}

pub(crate) struct NewStaged {
    pub(crate) partition_index: u32,
    pub(crate) ledger: LedgerId,
    pub(crate) entry: u64,
    pub(crate) bytes: Slice,
    pub(crate) base_offset: u64,
    pub(crate) record_count: u32,
    pub(crate) append_time_ms: u64,
}

impl<T> Group<T> {
    /// What its lists take in memory.
    fn lists_bytes(&self) -> usize {
        self.entries.capacity() * size_of::<StagedEntry>()
            + self.rows.capacity() * size_of::<StagedRow>()
            + self.extents.capacity() * size_of::<StagedExtent>()
            + self.tokens.capacity() * size_of::<T>()
    }

    /// The rows of one state extent, in order, handed out.
    pub(crate) fn take_rows(&mut self, extent_index: usize, mut visit: impl FnMut(RowChange)) {
        let mut next = self.extents[extent_index].head;
        while next != NONE {
            let row = &mut self.rows[next as usize];
            visit(std::mem::replace(&mut row.change, RowChange::Trim(Trim::default())));
            next = row.next;
        }
    }
}
