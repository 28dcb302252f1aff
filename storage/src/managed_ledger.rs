//! A partition: its ledgers as one endless stream, with the newest extents in memory.

use std::collections::VecDeque;

use drava_protocol::{LedgerId, PartitionId};

use crate::index::{ExtentRow, PartitionRow, Trim};
use crate::ledger::{Added, Ledgers, RollPolicy, Writer};
use crate::memory::Memory;
use crate::stage::ChainPlace;
use crate::store::PartitionLimits;

/// Extents kept in memory although the index has them and their blocks are gone from the cache.
const TAIL_EXTENTS_MIN: usize = 8;
/// Room for extents that is not worth giving back.
const TAIL_CAPACITY_MIN: usize = 4 * TAIL_EXTENTS_MIN;

pub(crate) struct ManagedLedger {
    pub(crate) partition: PartitionId,
    pub(crate) limits: PartitionLimits,
    /// When the next ledger begins: `roll_base` for the ledgers that there are.
    pub(crate) roll: RollPolicy,
    /// The owner has opened it since the store was opened: retention runs.
    pub(crate) opened: bool,
    pub(crate) deleted: bool,
    /// And that is durable.
    pub(crate) dropped: bool,
    pub(crate) floor: Option<u64>,
    pub(crate) start_offset: u64,
    pub(crate) end_offset: u64,
    pub(crate) next_offset: u64,
    pub(crate) ledgers: Ledgers,
    pub(crate) writer: Writer,
    pub(crate) data_chain: ChainPlace,
    pub(crate) state_chain: ChainPlace,
    /// Durable extents, newest last, dense at the end of the partition.
    pub(crate) tail: VecDeque<ExtentRow>,
    /// Tail extents popped so far: makes `limited` an index that stays.
    popped: u64,
    /// Extents before this one were taken out of the cache by the partition's own limit.
    limited: u64,
    /// Bytes from `limited` on. Counted only with a limit.
    cached_bytes: u64,
    /// A trim is on its way through the journal.
    pub(crate) trimming: bool,
    /// It is in the list of those that the next index batch must write.
    pub(crate) touched: bool,
    /// What `memory` was last told that it takes.
    counted_bytes: u64,
    roll_base: RollPolicy,
}

impl ManagedLedger {
    pub(crate) fn new(partition: PartitionId, row: PartitionRow, ledgers: Ledgers, roll: RollPolicy) -> ManagedLedger {
        ManagedLedger {
            partition,
            limits: PartitionLimits::default(),
            roll,
            opened: false,
            deleted: false,
            dropped: false,
            floor: None,
            start_offset: row.start_offset,
            end_offset: row.end_offset,
            next_offset: row.end_offset,
            ledgers,
            writer: Writer::after(row.last_ledger),
            data_chain: ChainPlace::default(),
            state_chain: ChainPlace::default(),
            tail: VecDeque::new(),
            popped: 0,
            limited: 0,
            cached_bytes: 0,
            trimming: false,
            touched: false,
            counted_bytes: 0,
            roll_base: roll,
        }
    }

    pub(crate) fn row(&self) -> PartitionRow {
        let last_ledger = self.ledgers.last().map_or(0, |(sequence, _)| *sequence).max(self.writer.sequence);
        PartitionRow { start_offset: self.start_offset, end_offset: self.end_offset, last_ledger }
    }

    /// Takes the next extent, which is durable now.
    pub(crate) fn extend(&mut self, extent: ExtentRow) {
        assert!(self.end_offset <= extent.first_offset, "{} ends at {}: {extent:?}", self.partition, self.end_offset);
        self.ledgers.add(&Added {
            sequence: extent.ledger,
            first_offset: extent.first_offset,
            next_offset: extent.next_offset,
            bytes: extent.body_bytes as u64,
            entries: extent.entry_count as u64,
            max_append_time_ms: extent.max_append_time_ms,
        });
        self.end_offset = extent.next_offset;
        self.next_offset = self.next_offset.max(extent.next_offset);
        self.tail.push_back(extent);
    }

    /// Sets what it may keep.
    pub(crate) fn limit(&mut self, limits: PartitionLimits, roll: RollPolicy) {
        if limits.cache_bytes != self.limits.cache_bytes {
            let from = self.limited.saturating_sub(self.popped) as usize;
            self.cached_bytes = self.tail.iter().skip(from).map(|extent| extent.body_bytes as u64).sum();
        }
        self.limits = limits;
        self.roll_base = roll;
        self.stretch_roll();
    }

    /// Ledgers came or went.
    pub(crate) fn stretch_roll(&mut self) {
        self.roll = self.roll_base.stretched(self.ledgers.count());
    }

    /// Whether any of its extents may stay in the cache.
    pub(crate) fn is_cached(&self) -> bool {
        self.limits.cache_bytes != Some(0)
    }

    /// Counts an extent that the cache has; `release` is told the blocks that the partition's limit lets go.
    pub(crate) fn limit_cache(&mut self, bytes: u64, first_cached_sequence: u64, mut release: impl FnMut(u64)) {
        let Some(limit) = self.limits.cache_bytes else { return };
        if limit == 0 {
            // The cache was never told to keep it.
            self.limited = self.popped + self.tail.len() as u64;
            return;
        }
        self.cached_bytes += bytes;
        while limit < self.cached_bytes || self.front_is_evicted(first_cached_sequence) {
            let index = self.limited.saturating_sub(self.popped) as usize;
            let Some(extent) = self.tail.get(index) else { break };
            if first_cached_sequence <= extent.block_sequence {
                release(extent.block_sequence);
            }
            self.cached_bytes = self.cached_bytes.saturating_sub(extent.body_bytes as u64);
            self.limited += 1;
        }
    }

    fn front_is_evicted(&self, first_cached_sequence: u64) -> bool {
        let index = self.limited.saturating_sub(self.popped) as usize;
        self.tail.get(index).is_some_and(|extent| extent.block_sequence < first_cached_sequence)
    }

    /// Forgets extents that the index has and the cache has not, or not for this partition.
    pub(crate) fn trim_tail(&mut self, first_cached_sequence: u64, indexed_sequence: u64) {
        while TAIL_EXTENTS_MIN < self.tail.len() {
            let front = &self.tail[0];
            let cached = first_cached_sequence <= front.block_sequence && self.limited <= self.popped;
            if cached || indexed_sequence < front.block_sequence {
                break;
            }
            self.pop_tail();
        }
    }

    /// Gives back what a burst made large.
    pub(crate) fn shrink(&mut self) {
        if TAIL_CAPACITY_MIN.max(4 * self.tail.len()) < self.tail.capacity() {
            self.tail.shrink_to(2 * self.tail.len());
        }
    }

    /// Tells `memory` what the partition takes now.
    pub(crate) fn count_memory(&mut self, memory: &Memory) {
        let tail_bytes = (self.tail.capacity() * size_of::<ExtentRow>()) as u64;
        // The list of partitions grows by doubling.
        let bytes = 2 * size_of::<ManagedLedger>() as u64 + tail_bytes + self.ledgers.memory_bytes();
        memory.recount(self.counted_bytes, bytes);
        self.counted_bytes = bytes;
    }

    fn pop_tail(&mut self) {
        let Some(extent) = self.tail.pop_front() else { return };
        self.popped += 1;
        if self.limited < self.popped {
            self.limited = self.popped;
            self.cached_bytes = self.cached_bytes.saturating_sub(extent.body_bytes as u64);
        }
    }

    /// Forgets the places of extents up to `next_offset`: the index has newer ones.
    pub(crate) fn forget_tail(&mut self, next_offset: u64) {
        while self.tail.front().is_some_and(|extent| extent.next_offset <= next_offset) {
            self.pop_tail();
        }
    }

    /// The tail extent that holds `offset`, by index. `None`: it is older than the tail, or in none.
    pub(crate) fn find(&self, offset: u64) -> Option<usize> {
        let index = self.tail.partition_point(|extent| extent.next_offset <= offset);
        self.tail.get(index).filter(|extent| extent.first_offset <= offset).map(|_| index)
    }

    /// Forgets what was staged or in flight: it will not become durable. The next entry starts a ledger of its own, so
    /// that no place in a ledger is given out twice.
    pub(crate) fn roll_back(&mut self) {
        self.next_offset = self.end_offset;
        self.writer = Writer::after(self.writer.sequence);
        self.trimming = false;
    }

    /// The ledgers that retention lets go now.
    pub(crate) fn expired(&mut self, now_ms: u64) -> Option<Trim> {
        if !self.opened || self.deleted || self.trimming {
            return None;
        }
        self.writer.close_old(now_ms, &self.roll);
        let all_durable = self.end_offset == self.next_offset;
        let first_ledger = self.ledgers.keep_from(now_ms, &self.limits, self.floor, &self.writer, all_durable)?;
        let mut kept = self.ledgers.clone();
        kept.trim(first_ledger);
        let start_offset = kept.first_offset().unwrap_or(self.end_offset);
        Some(Trim { partition: self.partition, first_ledger, start_offset })
    }

    /// Carries out a trim that is durable; returns how many ledgers went.
    pub(crate) fn trim(&mut self, trim: &Trim) -> u64 {
        self.trimming = false;
        let count = self.ledgers.trim(trim.first_ledger);
        self.start_offset = self.start_offset.max(trim.start_offset).min(self.end_offset);
        while self.tail.front().is_some_and(|extent| extent.next_offset <= self.start_offset) {
            self.pop_tail();
        }
        count
    }

    pub(crate) fn ledger(&self, sequence: u32) -> LedgerId {
        LedgerId { partition: self.partition, sequence }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn partition(cache_bytes: Option<u64>) -> ManagedLedger {
        let limits = PartitionLimits { cache_bytes, ..PartitionLimits::default() };
        let roll = RollPolicy::new(1 << 30, Duration::from_secs(3600), &limits);
        let mut partition = ManagedLedger::new(PartitionId(1), PartitionRow::default(), Ledgers::default(), roll);
        partition.limit(limits, roll);
        partition
    }

    /// Extents of 100 bytes, one in each block; returns the blocks that were released.
    fn extend(partition: &mut ManagedLedger, blocks: std::ops::Range<u64>) -> Vec<u64> {
        let mut released = Vec::new();
        for block in blocks {
            partition.extend(ExtentRow {
                ledger: 1,
                first_offset: block,
                next_offset: block + 1,
                body_bytes: 100,
                block_sequence: block,
                ..ExtentRow::default()
            });
            partition.limit_cache(100, 0, |sequence| released.push(sequence));
        }
        released
    }

    #[test]
    fn what_the_cache_has_not_is_not_remembered() {
        for (cache_bytes, released, remembered) in [(None, 0, 1000), (Some(0), 0, 8), (Some(5000), 950, 50)] {
            let mut partition = partition(cache_bytes);
            assert_eq!(extend(&mut partition, 0..1000), (0..released).collect::<Vec<_>>());
            partition.trim_tail(0, 499);
            assert!(500 <= partition.tail.len(), "the index has not the others");
            // The shard's cache goes back to block 0, for the sake of another partition.
            partition.trim_tail(0, 999);
            assert_eq!(partition.tail.len(), remembered, "with {cache_bytes:?}");
        }
    }

    #[test]
    fn memory_of_a_burst_is_given_back() {
        let memory = Memory::new(u64::MAX);
        let mut partition = partition(Some(0));
        partition.count_memory(&memory);
        let before = memory.figures(0, 0).bookkeeping;
        extend(&mut partition, 0..10_000);
        partition.count_memory(&memory);
        let burst = memory.figures(0, 0).bookkeeping;
        partition.trim_tail(0, 10_000);
        partition.shrink();
        partition.count_memory(&memory);
        let after = memory.figures(0, 0).bookkeeping;
        assert!(before + 4096 < burst && after < before + 4096, "{before}, then {burst}, then {after} bytes");
    }
}
