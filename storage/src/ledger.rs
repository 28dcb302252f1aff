//! The ledgers of a partition: when one ends, and when one may go. Plain state, told the time.

use std::collections::VecDeque;
use std::time::Duration;

use crate::index::LedgerRow;
use crate::store::PartitionLimits;

/// Ledgers are not rolled at less than this for the sake of retention.
const ROLL_BYTES_MIN: u64 = 1 << 20;
const ROLL_AGE_MIN: Duration = Duration::from_secs(1);
/// Where what is consumed goes at once, ledgers are rolled at this: about as much is kept although it was consumed.
const CONSUMED_ROLL_BYTES: u64 = 16 << 20;
const CONSUMED_ROLL_AGE: Duration = Duration::from_secs(60);

/// With each so many ledgers of a partition the next ones are twice as long. Every one is remembered: one an hour, in ten
/// thousand partitions that keep all for ever, would fill the memory in a year.
const LEDGERS_PER_DOUBLING: usize = 32;

/// When a ledger is full or old. Retention deletes whole ledgers, so it wants them smaller than what it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RollPolicy {
    pub(crate) bytes_max: u64,
    pub(crate) age_max_ms: u64,
}

impl RollPolicy {
    pub(crate) fn new(bytes_max: u64, age_max: Duration, limits: &PartitionLimits) -> RollPolicy {
        let mut bytes_max =
            limits.retention_bytes.map_or(bytes_max, |keep| bytes_max.min((keep / 4).max(ROLL_BYTES_MIN)));
        let mut age_max = limits.retention_age.map_or(age_max, |keep| age_max.min((keep / 4).max(ROLL_AGE_MIN)));
        if limits.trim_consumed {
            bytes_max = bytes_max.min(CONSUMED_ROLL_BYTES);
            age_max = age_max.min(CONSUMED_ROLL_AGE);
        }
        RollPolicy { bytes_max, age_max_ms: age_max.as_millis() as u64 }
    }

    /// For a partition that has so many ledgers.
    pub(crate) fn stretched(&self, ledgers: usize) -> RollPolicy {
        let times = 1u64 << (ledgers / LEDGERS_PER_DOUBLING).min(32);
        RollPolicy {
            bytes_max: self.bytes_max.saturating_mul(times),
            age_max_ms: self.age_max_ms.saturating_mul(times),
        }
    }
}

/// The ledger that entries are staged into. Ahead of [`Ledgers`], which knows only what is durable.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Writer {
    /// Of the open ledger, or of the last one.
    pub(crate) sequence: u32,
    open: bool,
    pub(crate) next_entry: u64,
    bytes: u64,
    first_append_time_ms: u64,
}

impl Writer {
    /// The writer of an owner that has just opened the partition: its first entry starts a new ledger.
    pub(crate) fn after(last_sequence: u32) -> Writer {
        Writer { sequence: last_sequence, ..Writer::default() }
    }

    /// Makes place for an entry; returns the ledger's sequence and the entry's place in it.
    pub(crate) fn add(&mut self, bytes: u64, now_ms: u64, policy: &RollPolicy) -> (u32, u64) {
        if !self.open || policy.bytes_max < self.bytes + bytes && 0 < self.bytes || self.is_old(now_ms, policy) {
            *self = Writer {
                sequence: self.sequence + 1,
                open: true,
                first_append_time_ms: now_ms,
                next_entry: 0,
                bytes: 0,
            };
        }
        let entry = self.next_entry;
        self.next_entry += 1;
        self.bytes += bytes;
        (self.sequence, entry)
    }

    fn is_old(&self, now_ms: u64, policy: &RollPolicy) -> bool {
        policy.age_max_ms <= now_ms.saturating_sub(self.first_append_time_ms)
    }

    /// Closes a ledger that is old, so that retention may have it although nothing is appended.
    pub(crate) fn close_old(&mut self, now_ms: u64, policy: &RollPolicy) {
        if self.open && self.is_old(now_ms, policy) {
            self.open = false;
        }
    }

    fn is_closed(&self, sequence: u32) -> bool {
        sequence < self.sequence || !self.open
    }
}

/// The durable ledgers, oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledgers {
    rows: VecDeque<(u32, LedgerRow)>,
    bytes: u64,
}

/// What became durable of one ledger.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Added {
    pub(crate) sequence: u32,
    pub(crate) first_offset: u64,
    pub(crate) next_offset: u64,
    pub(crate) bytes: u64,
    pub(crate) entries: u64,
    pub(crate) max_append_time_ms: u64,
}

impl Ledgers {
    pub(crate) fn from_rows(rows: Vec<(u32, LedgerRow)>) -> Ledgers {
        let bytes = rows.iter().map(|(_, row)| row.bytes).sum();
        Ledgers { rows: rows.into(), bytes }
    }

    pub(crate) fn add(&mut self, added: &Added) {
        self.bytes += added.bytes;
        if let Some((sequence, row)) = self.rows.back_mut() {
            assert!(*sequence <= added.sequence, "ledger {} after {sequence}", added.sequence);
            if *sequence == added.sequence {
                row.next_offset = added.next_offset;
                row.bytes += added.bytes;
                row.entries += added.entries;
                row.max_append_time_ms = row.max_append_time_ms.max(added.max_append_time_ms);
                return;
            }
        }
        let row = LedgerRow {
            first_offset: added.first_offset,
            next_offset: added.next_offset,
            bytes: added.bytes,
            entries: added.entries,
            first_append_time_ms: added.max_append_time_ms,
            max_append_time_ms: added.max_append_time_ms,
        };
        self.rows.push_back((added.sequence, row));
    }

    pub(crate) fn last(&self) -> Option<&(u32, LedgerRow)> {
        self.rows.back()
    }

    pub(crate) fn row(&self, sequence: u32) -> Option<LedgerRow> {
        let index = self.rows.binary_search_by_key(&sequence, |(sequence, _)| *sequence).ok()?;
        Some(self.rows[index].1)
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = (u32, LedgerRow)> {
        self.rows.iter().copied()
    }

    pub(crate) fn first_offset(&self) -> Option<u64> {
        self.rows.front().map(|(_, row)| row.first_offset)
    }

    pub(crate) fn count(&self) -> usize {
        self.rows.len()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What the rows take in memory.
    pub(crate) fn memory_bytes(&self) -> u64 {
        (self.rows.capacity() * size_of::<(u32, LedgerRow)>()) as u64
    }

    /// The first ledger with an entry of `time_ms` or later: its offsets.
    pub(crate) fn since(&self, time_ms: u64) -> Option<std::ops::Range<u64>> {
        let (_, row) = self.rows.iter().find(|(_, row)| time_ms <= row.max_append_time_ms)?;
        Some(row.first_offset..row.next_offset)
    }

    /// The first ledger that retention keeps, by sequence, if there are any before it.
    ///
    /// `floor`: nothing is deleted from there on. `all_durable`: nothing is staged, so that the last ledger is whole.
    pub(crate) fn keep_from(
        &self,
        now_ms: u64,
        limits: &PartitionLimits,
        floor: Option<u64>,
        writer: &Writer,
        all_durable: bool,
    ) -> Option<u32> {
        let age_ms = limits.retention_age.map(|age| age.as_millis() as u64);
        let mut left_bytes = self.bytes;
        let mut keep = None;
        for (index, (sequence, row)) in self.rows.iter().enumerate() {
            let whole = index + 1 < self.rows.len() || all_durable;
            let old = age_ms.is_some_and(|age| row.max_append_time_ms.saturating_add(age) <= now_ms);
            let over = limits.retention_bytes.is_some_and(|bytes| bytes < left_bytes);
            let free = floor.is_none_or(|floor| row.next_offset <= floor);
            let consumed = limits.trim_consumed && floor.is_some();
            if !(whole && writer.is_closed(*sequence) && (old || over || consumed) && free) {
                break;
            }
            left_bytes -= row.bytes;
            keep = Some(sequence + 1);
        }
        keep
    }

    /// Whether retention will have taken a ledger before it has been kept as long again as it was: moving it is work
    /// for nothing.
    pub(crate) fn is_doomed(&self, sequence: u32, now_ms: u64, limits: &PartitionLimits, floor: Option<u64>) -> bool {
        let Ok(index) = self.rows.binary_search_by_key(&sequence, |(sequence, _)| *sequence) else { return false };
        let (_, row) = self.rows[index];
        if floor.is_some_and(|floor| floor < row.next_offset) {
            return false;
        }
        let kept_ms = now_ms.saturating_sub(row.max_append_time_ms);
        let old = limits.retention_age.is_some_and(|age| age.as_millis() as u64 / 2 <= kept_ms);
        let over = limits.retention_bytes.is_some_and(|bytes| {
            let newer_bytes: u64 = self.rows.range(index + 1..).map(|(_, row)| row.bytes).sum();
            bytes / 2 <= newer_bytes
        });
        old || over || limits.trim_consumed && floor.is_some()
    }

    /// Forgets ledgers before `first_ledger`; returns how many.
    pub(crate) fn trim(&mut self, first_ledger: u32) -> u64 {
        let mut count = 0;
        while let Some((sequence, row)) = self.rows.front() {
            if first_ledger <= *sequence {
                break;
            }
            self.bytes -= row.bytes;
            self.rows.pop_front();
            count += 1;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: RollPolicy = RollPolicy { bytes_max: 100, age_max_ms: 1000 };

    fn ledgers(rows: &[(u32, u64, u64, u64, u64)]) -> Ledgers {
        let mut ledgers = Ledgers::default();
        for &(sequence, first_offset, next_offset, bytes, max_append_time_ms) in rows {
            ledgers.add(&Added { sequence, first_offset, next_offset, bytes, entries: 1, max_append_time_ms });
        }
        ledgers
    }

    #[test]
    fn a_ledger_rolls_by_bytes_by_age_and_at_open() {
        let mut writer = Writer::after(4);
        assert_eq!(writer.add(60, 0, &POLICY), (5, 0));
        assert_eq!(writer.add(40, 10, &POLICY), (5, 1));
        assert_eq!(writer.add(1, 20, &POLICY), (6, 0));
        assert_eq!(writer.add(500, 30, &POLICY), (7, 0), "an entry larger than a ledger has one of its own");
        assert_eq!(writer.add(1, 40, &POLICY), (8, 0));
        assert_eq!(writer.add(1, 1039, &POLICY), (8, 1));
        assert_eq!(writer.add(1, 1040, &POLICY), (9, 0));
    }

    #[test]
    fn a_partition_that_keeps_all_has_few_ledgers() {
        const HOUR_MS: u64 = 3_600_000;
        let policy = RollPolicy { bytes_max: u64::MAX, age_max_ms: HOUR_MS };
        let mut ledgers = Ledgers::default();
        let mut writer = Writer::default();
        for hour in 0..10 * 365 * 24 {
            let now_ms = hour * HOUR_MS;
            let (sequence, _) = writer.add(1, now_ms, &policy.stretched(ledgers.count()));
            let (first_offset, next_offset) = (hour, hour + 1);
            ledgers.add(&Added {
                sequence,
                first_offset,
                next_offset,
                bytes: 1,
                entries: 1,
                max_append_time_ms: now_ms,
            });
        }
        assert!(ledgers.count() < 400, "{} ledgers after ten years", ledgers.count());
        assert!(32 < ledgers.count(), "the first are an hour each");
    }

    #[test]
    fn retention_never_takes_the_open_ledger_nor_passes_the_floor() {
        let ledgers = ledgers(&[(1, 0, 10, 50, 100), (2, 10, 20, 50, 200), (3, 20, 30, 50, 300)]);
        let age = PartitionLimits { retention_age: Some(Duration::from_millis(50)), ..PartitionLimits::default() };
        let mut writer = Writer::after(2);
        writer.add(50, 300, &POLICY);
        assert_eq!(ledgers.keep_from(10_000, &age, None, &writer, true), Some(3), "ledger 3 is open");
        assert_eq!(ledgers.keep_from(10_000, &age, Some(19), &writer, true), Some(2), "the floor is in ledger 2");
        assert_eq!(ledgers.keep_from(10_000, &age, Some(0), &writer, true), None);
        assert_eq!(ledgers.keep_from(160, &age, None, &writer, true), Some(2), "ledger 2 is young");
        writer.close_old(10_000, &POLICY);
        assert_eq!(ledgers.keep_from(10_000, &age, None, &writer, true), Some(4));
        assert_eq!(ledgers.keep_from(10_000, &age, None, &writer, false), Some(3), "more of ledger 3 is in flight");
        assert_eq!(ledgers.keep_from(10_000, &PartitionLimits::default(), None, &writer, true), None);
    }

    #[test]
    fn consumed_ledgers_go_when_a_cursor_has_passed_them_and_only_then() {
        let ledgers = ledgers(&[(1, 0, 10, 50, 100), (2, 10, 20, 50, 200), (3, 20, 30, 50, 300)]);
        let limits = PartitionLimits { trim_consumed: true, ..PartitionLimits::default() };
        let mut writer = Writer::after(2);
        writer.add(50, 300, &POLICY);
        let keep = |floor, writer: &Writer| ledgers.keep_from(400, &limits, floor, writer, true);
        assert_eq!(keep(None, &writer), None, "nobody has consumed anything");
        assert_eq!(keep(Some(9), &writer), None);
        assert_eq!(keep(Some(19), &writer), Some(2));
        assert_eq!(keep(Some(30), &writer), Some(3), "ledger 3 is open");
        assert_eq!(keep(Some(30), &Writer::after(3)), Some(4));
        let roll = RollPolicy::new(1 << 30, Duration::from_secs(3600), &limits);
        assert_eq!(roll, RollPolicy { bytes_max: CONSUMED_ROLL_BYTES, age_max_ms: 60_000 });
    }

    #[test]
    fn what_retention_will_take_soon_is_known() {
        let ledgers = ledgers(&[(1, 0, 10, 50, 100), (2, 10, 20, 50, 200), (3, 20, 30, 50, 300)]);
        let doomed = |limits: PartitionLimits, now_ms, floor| {
            [1, 2, 3].map(|sequence| ledgers.is_doomed(sequence, now_ms, &limits, floor))
        };
        let age = PartitionLimits { retention_age: Some(Duration::from_millis(1000)), ..PartitionLimits::default() };
        assert_eq!(doomed(age, 700, None), [true, true, false]);
        assert_eq!(doomed(age, 700, Some(15)), [true, false, false], "the floor holds ledger 2");
        let bytes = PartitionLimits { retention_bytes: Some(200), ..PartitionLimits::default() };
        assert_eq!(doomed(bytes, 0, None), [true, false, false]);
        let consumed = PartitionLimits { trim_consumed: true, ..PartitionLimits::default() };
        assert_eq!(doomed(consumed, 0, Some(20)), [true, true, false]);
        assert_eq!(doomed(consumed, 0, None), [false; 3]);
        assert_eq!(doomed(PartitionLimits::default(), u64::MAX, None), [false; 3]);
    }

    #[test]
    fn retention_by_bytes_deletes_only_while_there_is_more() {
        let mut ledgers = ledgers(&[(1, 0, 10, 50, 100), (2, 10, 20, 50, 200), (3, 20, 30, 50, 300)]);
        let limits = PartitionLimits { retention_bytes: Some(100), ..PartitionLimits::default() };
        let writer = Writer::after(3);
        assert_eq!(ledgers.keep_from(0, &limits, None, &writer, true), Some(2));
        assert_eq!(ledgers.trim(2), 1);
        assert_eq!((ledgers.bytes(), ledgers.first_offset()), (100, Some(10)));
        assert_eq!(ledgers.keep_from(0, &limits, None, &writer, true), None);
    }
}
