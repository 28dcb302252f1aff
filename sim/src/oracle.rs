//! What must hold. It is told what the workload does and what the store answers, and panics with what is wrong.
//!
//! - Nothing that was acknowledged, or seen by a reader, is lost or changed, unless it was damaged on purpose: then a
//!   read answers so and names it.
//! - No offset is given out twice.
//! - A cursor is never below what was acknowledged, and retention never passes one.
//! - A partition that was dropped stays dropped.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use drava_protocol::{PartitionId, batch};
use drava_storage::{PartitionLimits, ReadError, Recovered, RecoveredPartition, Run, Span};

/// What an entry or row is known by.
pub type Token = u64;

#[derive(Debug, Default)]
pub struct Oracle {
    pub partitions: BTreeMap<PartitionId, Partition>,
    /// Staged, and neither acknowledged nor failed.
    pub pending: BTreeMap<Token, Staged>,
    tokens: Token,
    /// Messages that were compared with what was appended.
    pub checked: u64,
    pub acked: u64,
    /// A checkpoint was damaged: when the index is lost, too, rows and starts go back, and what was dropped may be there
    /// again. Messages are excused by it only in old stores, of which nothing else says what is in them.
    pub checkpoint_damaged: bool,
}

#[derive(Clone, Debug)]
pub enum Staged {
    Entry { partition: PartitionId, base_offset: u64 },
    Cursor { partition: PartitionId, cursor: u8, offset: u64 },
}

#[derive(Debug)]
pub struct Partition {
    pub limits: PartitionLimits,
    pub entries: Vec<Entry>,
    /// Everything below is acknowledged.
    pub acked_end: u64,
    /// Everything below was given to a reader.
    seen_end: u64,
    /// The highest start that was seen: what is below never comes back.
    pub start: u64,
    /// The highest start of all, also from before damage that took it back. What is below need not be there.
    trimmed: u64,
    /// Retention must not pass it.
    pub floor: Option<u64>,
    pub cursors: BTreeMap<u8, Cursor>,
    pub life: Life,
    /// Something of it was damaged that the index may not have: its end, its sequences and rows may go back.
    pub damaged: bool,
    /// Their writes failed or died with the node, and their offsets were given out again. Until one of those is acknowledged
    /// a crash may bring these back: what is sent again goes to the same place, and sectors of both make one of them whole.
    given_up: Vec<Entry>,
    /// Everything below is in stores that drain.
    foreign_end: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    Live,
    /// Asked for and not answered.
    Dropping,
    Dropped,
}

#[derive(Debug)]
pub struct Entry {
    pub base_offset: u64,
    pub append_time_ms: u64,
    pub header: batch::Header,
    pub bytes: Rc<Vec<u8>>,
    damaged: bool,
    /// Its write failed: it may be there after a crash, until its offset is given out again.
    failed: bool,
}

impl Entry {
    pub fn next_offset(&self) -> u64 {
        self.base_offset + self.header.record_count as u64
    }
}

#[derive(Debug, Default)]
pub struct Cursor {
    pub acked: u64,
    /// The highest that was asked for.
    pub staged: u64,
}

impl Partition {
    pub fn new(limits: PartitionLimits, cursors: u8) -> Partition {
        Partition {
            limits,
            entries: Vec::new(),
            acked_end: 0,
            seen_end: 0,
            start: 0,
            trimmed: 0,
            floor: None,
            cursors: (0..cursors).map(|cursor| (cursor, Cursor::default())).collect(),
            life: Life::Live,
            damaged: false,
            given_up: Vec::new(),
            foreign_end: 0,
        }
    }

    pub fn next_offset(&self) -> u64 {
        self.entries.last().map_or(self.acked_end, Entry::next_offset).max(self.acked_end)
    }

    fn promised_end(&self) -> u64 {
        self.acked_end.max(self.seen_end)
    }

    /// The entries with messages in `range`.
    fn within(&self, range: &Range<u64>) -> Range<usize> {
        let first = self.entries.partition_point(|entry| entry.next_offset() <= range.start);
        let end = self.entries.partition_point(|entry| entry.base_offset < range.end);
        first..end.max(first)
    }

    fn at(&self, base_offset: u64) -> Option<&Entry> {
        let index = self.entries.binary_search_by_key(&base_offset, |entry| entry.base_offset).ok()?;
        Some(&self.entries[index])
    }

    /// The entry that a producer's batch became.
    pub fn find(&self, header: &batch::Header) -> Option<&Entry> {
        self.entries.iter().rev().find(|entry| {
            !entry.failed
                && entry.header.producer == header.producer
                && entry.header.base_sequence == header.base_sequence
        })
    }

    /// Where retention may go to: nowhere without limits, and no further than the lowest cursor.
    fn start_max(&self) -> u64 {
        let limits = &self.limits;
        let kept = limits.retention_age.is_none() && limits.retention_bytes.is_none() && !limits.trim_consumed;
        let start_max = if kept { 0 } else { self.floor.unwrap_or(u64::MAX).min(self.promised_end()) };
        // Damage may take the first of what is kept.
        let rest = self.entries.iter().filter(|entry| start_max < entry.next_offset());
        rest.take_while(|entry| entry.damaged).last().map_or(start_max, Entry::next_offset)
    }

    fn saw_start(&mut self, id: PartitionId, start: u64) {
        assert!(start <= self.start_max(), "{id} starts at {start}; at most {} is allowed", self.start_max());
        self.start = self.start.max(start);
        self.trimmed = self.trimmed.max(start);
    }

    /// Takes back what was given up and is there after all.
    fn take_back(&mut self, found: &RecoveredPartition) {
        for batch in found.replayed.iter().filter(|batch| self.acked_end <= batch.base_offset) {
            let is_it = |entry: &Entry| {
                (entry.base_offset, entry.append_time_ms) == (batch.base_offset, batch.append_time_ms)
                    && (entry.header.record_count, entry.header.base_sequence)
                        == (batch.record_count, batch.base_sequence)
                    && entry.header.producer == batch.producer
            };
            if self.at(batch.base_offset).is_some_and(is_it) {
                continue;
            }
            let Some(index) = self.given_up.iter().position(is_it) else { continue };
            let entry = self.given_up.swap_remove(index);
            let first = self.entries.partition_point(|entry| entry.base_offset < batch.base_offset);
            self.entries.truncate(first);
            self.entries.push(entry);
        }
    }

    fn check_span(&mut self, id: PartitionId, span: &Range<u64>) {
        assert!(
            self.start <= span.start || self.damaged,
            "{id} starts at {}; it had started at {}",
            span.start,
            self.start
        );
        let promised_end = self.promised_end();
        if span.end < promised_end {
            let lost = &self.entries[self.within(&(span.end..promised_end))];
            // Of what was trimmed only the index and the checkpoint know where it ended; both are gone.
            let start_max = if self.damaged { self.start_max() } else { 0 };
            let gone = |entry: &Entry| entry.damaged || entry.next_offset() <= start_max;
            let excused = lost.iter().all(gone);
            assert!(excused, "{id} ends at {}; up to {promised_end} was acknowledged or seen", span.end);
        }
        assert!(span.end <= self.next_offset(), "{id} ends at {}; only {} was given out", span.end, self.next_offset());
        self.saw_start(id, span.start);
    }
}

impl Oracle {
    fn token(&mut self, staged: Staged) -> Token {
        self.tokens += 1;
        self.pending.insert(self.tokens, staged);
        self.tokens
    }

    /// A token for an entry that is about to be appended at `base_offset`.
    pub fn append(
        &mut self,
        id: PartitionId,
        base_offset: u64,
        append_time_ms: u64,
        header: batch::Header,
        bytes: Rc<Vec<u8>>,
    ) -> Token {
        let partition = self.partitions.get_mut(&id).expect("a known partition");
        let first = partition.entries.partition_point(|entry| entry.base_offset < base_offset);
        for entry in partition.entries.drain(first..) {
            assert!(entry.failed, "{id}: offset {base_offset} is given out; {} was before", entry.base_offset);
            partition.given_up.push(entry);
        }
        let next = partition.next_offset();
        assert!(base_offset == next, "{id}: offset {base_offset} is given out; {next} is next");
        partition.entries.push(Entry { base_offset, append_time_ms, header, bytes, damaged: false, failed: false });
        self.token(Staged::Entry { partition: id, base_offset })
    }

    /// The append of this token was refused.
    pub fn refused(&mut self, token: Token) {
        match self.pending.remove(&token).expect("staged just now") {
            Staged::Entry { partition, .. } => {
                drop(self.partitions.get_mut(&partition).expect("a known partition").entries.pop());
            }
            Staged::Cursor { .. } => {}
        }
    }

    pub fn cursor(&mut self, id: PartitionId, cursor: u8, offset: u64) -> Token {
        let partition = self.partitions.get_mut(&id).expect("a known partition");
        let model = partition.cursors.get_mut(&cursor).expect("a known cursor");
        model.staged = model.staged.max(offset);
        self.token(Staged::Cursor { partition: id, cursor, offset })
    }

    pub fn acked(&mut self, token: Token) -> Staged {
        let staged = self.pending.remove(&token);
        let staged = staged.unwrap_or_else(|| panic!("token {token} is acknowledged; it failed, or was never staged"));
        self.acked += 1;
        match staged {
            Staged::Entry { partition: id, base_offset } => {
                let partition = self.partitions.get_mut(&id).expect("a known partition");
                assert!(
                    base_offset == partition.acked_end,
                    "{id}: {base_offset} is acknowledged; {} is next",
                    partition.acked_end
                );
                let entry = partition.at(base_offset).expect("a pending entry is in the model");
                partition.acked_end = entry.next_offset();
                partition.given_up.clear();
            }
            Staged::Cursor { partition: id, cursor, offset } => {
                let partition = self.partitions.get_mut(&id).expect("a known partition");
                let model = partition.cursors.get_mut(&cursor).expect("a known cursor");
                model.acked = model.acked.max(offset);
            }
        }
        staged
    }

    /// Whether it is on disk is not known.
    pub fn failed(&mut self, token: Token) {
        let staged = self.pending.remove(&token);
        let staged =
            staged.unwrap_or_else(|| panic!("token {token} failed after it was acknowledged, or was never staged"));
        if let Staged::Entry { partition, base_offset } = staged {
            let partition = self.partitions.get_mut(&partition).expect("a known partition");
            let entry = partition.entries.iter_mut().find(|entry| entry.base_offset == base_offset);
            entry.expect("a pending entry is in the model").failed = true;
        }
    }

    pub fn read(&mut self, id: PartitionId, asked: u64, runs: &[Run], next_offset: u64) {
        let partition = self.partitions.get_mut(&id).expect("a known partition");
        let Some(first) = runs.first() else {
            assert!(next_offset == asked, "{id}: a read at {asked} without runs goes on at {next_offset}");
            return;
        };
        let mut expected = first.first_offset;
        assert!(expected <= asked, "{id}: a read at {asked} starts at {expected}");
        for run in runs {
            assert!(run.first_offset == expected, "{id}: a run starts at {}, not {expected}", run.first_offset);
            let mut rest = &run[..];
            while !rest.is_empty() {
                let entry = partition.at(expected);
                let entry = entry.unwrap_or_else(|| panic!("{id}: there is a batch at {expected}; none was appended"));
                let bytes = entry.bytes.len();
                let same =
                    rest.len() >= bytes && rest[batch::BROKER_BYTES..bytes] == entry.bytes[batch::BROKER_BYTES..];
                assert!(same, "{id}: the batch at {expected} is not what was appended");
                let broker = batch::broker_fields(entry.base_offset, entry.append_time_ms);
                assert!(rest[..broker.len()] == broker, "{id}: the batch at {expected} has other broker fields");
                self.checked += entry.header.record_count as u64;
                expected = entry.next_offset();
                rest = &rest[drava_protocol::frame::padded(bytes)..];
            }
            assert!(run.next_offset == expected, "{id}: a run ends at {}, not {expected}", run.next_offset);
        }
        assert!(
            asked < expected && next_offset == expected,
            "{id}: a read at {asked} up to {expected} goes on at {next_offset}"
        );
        partition.seen_end = partition.seen_end.max(expected);
    }

    /// Returns where to read on.
    pub fn read_failed(&mut self, id: PartitionId, offset: u64, error: &ReadError, disk_fails: bool) -> Option<u64> {
        let partition = self.partitions.get_mut(&id).expect("a known partition");
        match error {
            ReadError::Trimmed { start_offset, .. } => {
                assert!(offset < *start_offset, "{id}: {offset} is trimmed with the start at {start_offset}");
                partition.saw_start(id, *start_offset);
                Some(*start_offset)
            }
            ReadError::Damaged { range } => {
                assert!(range.contains(&offset), "{id}: a read at {offset} names {range:?}");
                for entry in &partition.entries[partition.within(range)] {
                    assert!(
                        entry.damaged || partition.damaged && entry.next_offset() <= partition.trimmed,
                        "{id}: {range:?} is said to be damaged; nobody touched {}",
                        entry.base_offset
                    );
                }
                Some(range.end)
            }
            ReadError::PastEnd { end_offset, .. } => {
                assert!(
                    partition.promised_end() <= *end_offset,
                    "{id}: a read at {offset} is past the end at {end_offset}"
                );
                None
            }
            ReadError::Io { .. } | ReadError::Index(_) => {
                assert!(disk_fails, "{id}: a read at {offset} fails on a good disk: {error}");
                None
            }
            ReadError::Deleted => {
                assert!(partition.life != Life::Live, "{id} is deleted; nobody asked for it");
                None
            }
        }
    }

    pub fn damaged(&mut self, id: PartitionId, range: &Range<u64>) {
        let Some(partition) = self.partitions.get_mut(&id) else { return };
        for index in partition.within(range) {
            partition.entries[index].damaged = true;
        }
        partition.damaged = true;
    }

    /// The node died: nobody will hear of what is pending.
    pub fn crashed(&mut self) {
        self.pending.clear();
    }

    /// What a store that is about to be closed has replayed: the next to open it finds no trace of how that came.
    pub fn replayed(&mut self, found: &[RecoveredPartition]) {
        for found in found {
            let partition = self.partitions.get_mut(&found.partition).filter(|partition| partition.life == Life::Live);
            if let Some(partition) = partition {
                partition.take_back(found);
            }
        }
    }

    /// The node has new stores, and all there was is in old ones.
    pub fn resharded(&mut self) {
        self.partitions.values_mut().for_each(|partition| partition.foreign_end = partition.acked_end);
        // The new stores have checkpoints of their own.
        self.checkpoint_damaged = false;
    }

    /// Checks what was found at open, in all stores, and goes on from there.
    pub fn recovered(&mut self, stores: &[Recovered]) {
        let mut found: BTreeMap<PartitionId, &RecoveredPartition> = BTreeMap::new();
        for partition in stores.iter().flat_map(|store| &store.partitions) {
            let other = found.insert(partition.partition, partition);
            assert!(other.is_none(), "{} is in two stores", partition.partition);
        }
        // Made anew, of nothing if all of the journal is gone.
        let is_anew = |store: &Recovered| store.index_rebuilt || store.partitions.is_empty();
        if self.checkpoint_damaged && stores.iter().any(is_anew) {
            for partition in self.partitions.values_mut() {
                partition.damaged = true;
                let in_old_stores = partition.within(&(0..partition.foreign_end));
                partition.entries[in_old_stores].iter_mut().for_each(|entry| entry.damaged = true);
            }
        }
        for (&id, partition) in &mut self.partitions {
            let found = found.remove(&id);
            match (partition.life, found) {
                (Life::Dropped, None) => continue,
                (Life::Dropped, Some(_)) => {
                    assert!(partition.damaged, "{id} was dropped and is there again");
                    continue;
                }
                (Life::Dropping, None) => {
                    partition.life = Life::Dropped;
                    continue;
                }
                // Some of it may be gone. It is asked for again.
                (Life::Dropping, Some(_)) => continue,
                (Life::Live, _) => {}
            }
            if let Some(found) = found {
                partition.take_back(found);
            }
            let span = found.map_or(0..0, |found| found.start_offset..found.end_offset);
            partition.check_span(id, &span);
            let kept = partition.entries.partition_point(|entry| entry.base_offset < span.end);
            let dropped = partition.entries.split_off(kept);
            partition.given_up.extend(dropped);
            partition.entries.iter_mut().for_each(|entry| entry.failed = false);
            let end = partition.entries.last().map_or(span.end, Entry::next_offset);
            assert!(end == span.end, "{id} ends at {}, within the entry that ends at {end}", span.end);
            // What is served now was made durable.
            (partition.acked_end, partition.seen_end) = (span.end, span.end);
            partition.start = span.start;
            for (&cursor, model) in &mut partition.cursors {
                let value = found.and_then(|found| found.state.iter().find(|(key, _)| *key == cursor_key(cursor)));
                let value = value.map_or(0, |(_, value)| cursor_offset(value));
                let fine = model.acked <= value && value <= model.staged;
                assert!(
                    fine || partition.damaged,
                    "{id}: cursor {cursor} is at {value}; {} is acknowledged, {} was asked for",
                    model.acked,
                    model.staged
                );
                *model = Cursor { acked: value, staged: value };
            }
        }
        if let Some((id, _)) = found.pop_first() {
            panic!("{id} is there; nobody made it");
        }
    }

    pub fn check_span(&mut self, id: PartitionId, span: &Span) {
        let partition = self.partitions.get_mut(&id).expect("a known partition");
        partition.check_span(id, &(span.start_offset..span.end_offset));
    }
}

pub fn cursor_key(cursor: u8) -> Vec<u8> {
    vec![b'c', cursor]
}

pub fn cursor_offset(value: &[u8]) -> u64 {
    let value = value.first_chunk().unwrap_or_else(|| panic!("a cursor's row has {} bytes", value.len()));
    u64::from_le_bytes(*value)
}
