//! What of a store cannot be read any more: found by recovery, by readers and by the scrubber, kept in the index, and
//! told to the operator until nobody could ask for it.
//!
//! An entry names a place on the disk, messages, or both. One with messages goes when these are deleted, for until then
//! every reader meets the hole. One without, a place whose messages are not known or that held none, goes when its
//! segment is used again. Source: `storage/README.md`, "Index".

use std::ops::Range;

use drava_protocol::PartitionId;

use crate::block::EXTENT_HEADER_BYTES;
use crate::index::ExtentRow;
use crate::io::Io;
use crate::segment::SegmentId;
use crate::store::Inner;

/// Entries beyond these are told to the log alone: a disk that is this bad needs no longer list.
pub const ENTRIES_MAX: usize = 4096;
const VALUE_BYTES: usize = 70;
const VERSION: u8 = 1;
const HAS_PLACE: u8 = 1;
const HAS_MESSAGES: u8 = 2;

/// Who found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FoundBy {
    Recovery = 1,
    Read = 2,
    Scrub = 3,
    Compaction = 4,
}

impl FoundBy {
    pub fn name(self) -> &'static str {
        match self {
            FoundBy::Recovery => "recovery",
            FoundBy::Read => "read",
            FoundBy::Scrub => "scrub",
            FoundBy::Compaction => "compaction",
        }
    }

    fn from_number(number: u8) -> Option<FoundBy> {
        let all = [FoundBy::Recovery, FoundBy::Read, FoundBy::Scrub, FoundBy::Compaction];
        all.into_iter().find(|found_by| *found_by as u8 == number)
    }
}

/// Bytes of one use of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedPlace {
    pub segment: u32,
    pub generation: u64,
    /// From the start of the segment.
    pub positions: Range<u64>,
}

/// Messages that were acknowledged and cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedMessages {
    pub partition: PartitionId,
    /// Not empty.
    pub offsets: Range<u64>,
}

/// Something that cannot be read any more. At least one of place and messages is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// `None`: the segment that held it is gone.
    pub place: Option<DamagedPlace>,
    /// `None`: not known, or there were none.
    pub messages: Option<DamagedMessages>,
    pub found_at_ms: u64,
    pub found_by: FoundBy,
}

impl Damage {
    /// Whether the other is about the same, or goes on where this ends.
    fn joins(&self, other: &Damage) -> bool {
        match (&self.messages, &other.messages) {
            (Some(a), Some(b)) => a.partition == b.partition && touch(&a.offsets, &b.offsets),
            (None, None) => self.overlaps(other),
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    fn overlaps(&self, other: &Damage) -> bool {
        match (&self.place, &other.place) {
            (Some(a), Some(b)) => {
                (a.segment, a.generation) == (b.segment, b.generation) && touch(&a.positions, &b.positions)
            }
            _ => false,
        }
    }

    /// Whether the other says nothing beyond this.
    fn covers(&self, other: &Damage) -> bool {
        let within = |outer: &Range<u64>, inner: &Range<u64>| outer.start <= inner.start && inner.end <= outer.end;
        match (&self.messages, &other.messages) {
            (Some(a), Some(b)) => a.partition == b.partition && within(&a.offsets, &b.offsets),
            // Whose messages are known needs no entry that does not know them.
            (Some(_), None) => self.overlaps(other),
            (None, Some(_)) => false,
            (None, None) => match (&self.place, &other.place) {
                (Some(a), Some(b)) => self.overlaps(other) && within(&a.positions, &b.positions),
                _ => false,
            },
        }
    }

    /// Takes the other in. Who found it first keeps the credit.
    fn absorb(&mut self, other: Damage) {
        if self.overlaps(&other)
            && let (Some(place), Some(more)) = (&mut self.place, &other.place)
        {
            place.positions = union(&place.positions, &more.positions);
        }
        self.place = self.place.take().or(other.place);
        if let (Some(messages), Some(more)) = (&mut self.messages, other.messages) {
            messages.offsets = union(&messages.offsets, &more.offsets);
        }
        if other.found_at_ms < self.found_at_ms {
            (self.found_at_ms, self.found_by) = (other.found_at_ms, other.found_by);
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(VALUE_BYTES);
        let has_place = if self.place.is_some() { HAS_PLACE } else { 0 };
        let has_messages = if self.messages.is_some() { HAS_MESSAGES } else { 0 };
        out.extend_from_slice(&[VERSION, self.found_by as u8, has_place | has_messages, 0, 0, 0]);
        out.extend_from_slice(&self.found_at_ms.to_le_bytes());
        let place = self.place.clone().unwrap_or(DamagedPlace { segment: 0, generation: 0, positions: 0..0 });
        out.extend_from_slice(&u64::from(place.segment).to_le_bytes());
        let (partition, offsets) =
            self.messages.as_ref().map_or((0, 0..0), |messages| (messages.partition.0, messages.offsets.clone()));
        let numbers =
            [place.generation, place.positions.start, place.positions.end, partition, offsets.start, offsets.end];
        out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        out
    }

    /// The partition and the row of an entry that goes to another store: there the place says nothing. `None`: nothing is
    /// left of it without the place.
    pub(crate) fn without_place(self) -> Option<(PartitionId, Vec<u8>)> {
        let partition = self.messages.as_ref()?.partition;
        Some((partition, Damage { place: None, ..self }.encode()))
    }

    pub(crate) fn decode(value: &[u8]) -> Option<Damage> {
        let (&[version, found_by, flags, ..], numbers) = value.split_first_chunk::<6>()?;
        if version != VERSION || value.len() != VALUE_BYTES {
            return None;
        }
        let numbers = numbers.as_chunks::<8>().0;
        let number = |index: usize| u64::from_le_bytes(numbers[index]);
        let place = DamagedPlace {
            segment: u32::try_from(number(1)).ok()?,
            generation: number(2),
            positions: number(3)..number(4),
        };
        let messages = DamagedMessages { partition: PartitionId(number(5)), offsets: number(6)..number(7) };
        if flags & HAS_MESSAGES != 0 && messages.offsets.is_empty() {
            return None;
        }
        Some(Damage {
            place: (flags & HAS_PLACE != 0).then_some(place),
            messages: (flags & HAS_MESSAGES != 0).then_some(messages),
            found_at_ms: number(0),
            found_by: FoundBy::from_number(found_by)?,
        })
    }
}

fn touch(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start <= b.end && b.start <= a.end
}

fn union(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    a.start.min(b.start)..a.end.max(b.end)
}

/// A row of the index: its number, and its value unless it is deleted.
pub(crate) type DamageRow = (u64, Option<Vec<u8>>);

/// All that is known to be damaged in one store. A state machine: the owner writes the rows to the index.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    /// By number of the row.
    entries: Vec<(u64, Damage)>,
    next_number: u64,
    changes: Vec<DamageRow>,
    overflowed: bool,
}

impl Registry {
    /// What the index kept. Rows that cannot be read are forgotten: a scrub finds again what is still there.
    pub(crate) fn load(rows: Vec<(u64, Vec<u8>)>) -> Registry {
        let mut registry = Registry::default();
        for (number, value) in rows {
            registry.next_number = registry.next_number.max(number.saturating_add(1));
            match Damage::decode(&value) {
                Some(damage) => registry.entries.push((number, damage)),
                None => registry.changes.push((number, None)),
            }
        }
        registry
    }

    /// Takes what was found. `false`: it was known.
    pub(crate) fn add(&mut self, damage: Damage) -> bool {
        debug_assert!(damage.messages.as_ref().is_none_or(|messages| !messages.offsets.is_empty()), "{damage:?}");
        if self.entries.iter().any(|(_, known)| known.covers(&damage)) {
            return false;
        }
        let mut whole = damage;
        let mut number = None;
        // A range that closes a gap joins both of its neighbours; and what it explains needs no entry of its own.
        while let Some(index) = self.entries.iter().position(|(_, known)| known.joins(&whole) || whole.covers(known)) {
            let (taken, known) = self.entries.remove(index);
            if known.messages.is_some() == whole.messages.is_some() {
                whole.absorb(known);
            }
            if let Some(other) = number.replace(taken) {
                self.changes.push((other, None));
            }
        }
        if number.is_none() && ENTRIES_MAX <= self.entries.len() {
            self.overflowed = true;
            return false;
        }
        let number = number.unwrap_or_else(|| {
            self.next_number += 1;
            self.next_number - 1
        });
        self.changes.push((number, Some(whole.encode())));
        self.entries.push((number, whole));
        true
    }

    /// Forgets what nobody can ask for any more, and places that hold something else now.
    ///
    /// `kept`: from which offset on a partition keeps its messages; `None`: it is deleted. `in_use`: whether that use of
    /// a segment goes on.
    pub(crate) fn expire(&mut self, kept: impl Fn(PartitionId) -> Option<u64>, in_use: impl Fn(&DamagedPlace) -> bool) {
        let changes = &mut self.changes;
        self.entries.retain_mut(|(number, damage)| {
            let gone = damage.place.as_ref().is_some_and(|place| !in_use(place));
            let stays = match &damage.messages {
                Some(messages) => kept(messages.partition).is_some_and(|start| start < messages.offsets.end),
                None => !gone,
            };
            if !stays {
                changes.push((*number, None));
            } else if gone {
                damage.place = None;
                changes.push((*number, Some(damage.encode())));
            }
            stays
        });
    }

    /// What the index has to learn, since the last call.
    pub(crate) fn take_changes(&mut self) -> Vec<DamageRow> {
        std::mem::take(&mut self.changes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn has_changes(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Whether something was found that the list had no room for; said once.
    pub(crate) fn take_overflowed(&mut self) -> bool {
        std::mem::take(&mut self.overflowed)
    }

    /// All entries: those with messages by partition and offset, then the others by place.
    pub(crate) fn list(&self) -> Vec<Damage> {
        let mut list: Vec<Damage> = self.entries.iter().map(|(_, damage)| damage.clone()).collect();
        list.sort_by_key(|damage| {
            let messages = damage.messages.as_ref().map(|messages| (messages.partition, messages.offsets.start));
            let place = damage.place.as_ref().map(|place| (place.segment, place.positions.start));
            (messages.is_none(), messages, place)
        });
        list
    }

    /// Entries, and messages that they name.
    pub(crate) fn count(&self) -> (u64, u64) {
        let messages = self.entries.iter().filter_map(|(_, damage)| damage.messages.as_ref());
        let count = messages.map(|messages| messages.offsets.end - messages.offsets.start);
        (self.entries.len() as u64, count.fold(0, u64::saturating_add))
    }
}

impl<I: Io, T: 'static> Inner<I, T> {
    /// Notes what is missing of an extent. `false`: the extent lies elsewhere by now or is deleted, and what was found at
    /// its old place says nothing.
    pub(crate) async fn report(
        &self,
        partition: PartitionId,
        row: &ExtentRow,
        missing: &[Range<u64>],
        found_by: FoundBy,
    ) -> bool {
        if !self.is_current(partition, row).await {
            return false;
        }
        let generation = self.generation_of(row);
        for offsets in missing {
            let place = generation.map(|generation| DamagedPlace {
                segment: row.segment.0,
                generation,
                positions: row.position..row.position + EXTENT_HEADER_BYTES as u64 + u64::from(row.body_bytes),
            });
            self.note(place, partition, offsets.clone(), found_by);
        }
        true
    }

    /// Notes the messages from `offset` on of which nothing is known although they were durable once, if that is so.
    /// Returns them.
    pub(crate) async fn report_hole(
        &self,
        partition: PartitionId,
        offset: u64,
        place: Option<DamagedPlace>,
        found_by: FoundBy,
    ) -> Option<Range<u64>> {
        let row = self.index.extents(partition, offset, 1).await.ok()?.first().copied();
        let offsets = {
            let partitions = self.partitions.borrow();
            let found = &partitions.list[*partitions.by_id.get(&partition)? as usize];
            // The index had its answer ready before this: what is in memory came later.
            let tail = found.tail.iter().find(|extent| offset < extent.next_offset);
            let known = [row.as_ref(), tail].into_iter().flatten().map(|extent| extent.first_offset);
            offset.max(found.start_offset)..known.min().unwrap_or(found.end_offset).min(found.end_offset)
        };
        if offsets.is_empty() {
            return None;
        }
        self.note(place, partition, offsets.clone(), found_by);
        Some(offsets)
    }

    fn note(&self, place: Option<DamagedPlace>, partition: PartitionId, offsets: Range<u64>, found_by: FoundBy) {
        let messages = Some(DamagedMessages { partition, offsets: offsets.clone() });
        let segment = place.as_ref().map(|place| place.segment);
        let damage = Damage { place, messages, found_at_ms: self.io.wall_clock_ms(), found_by };
        let (added, overflowed) = {
            let mut registry = self.damage.borrow_mut();
            (registry.add(damage), registry.take_overflowed())
        };
        if added || overflowed {
            let listed = !overflowed;
            tracing::error!(shard = self.config.shard.0, %partition, ?offsets, segment, found_by = found_by.name(), listed, "messages are damaged on disk");
        }
    }

    /// Whether an extent is still where the row says.
    async fn is_current(&self, partition: PartitionId, row: &ExtentRow) -> bool {
        // `None`: nobody can ask for it any more.
        let in_tail = || {
            let partitions = self.partitions.borrow();
            let found = &partitions.list[*partitions.by_id.get(&partition)? as usize];
            (found.start_offset < row.next_offset).then(|| found.tail.iter().any(|extent| extent == row))
        };
        match in_tail() {
            None => return false,
            Some(true) => return true,
            Some(false) => {}
        }
        let indexed = self.index.extents(partition, row.first_offset, 1).await;
        indexed.is_ok_and(|rows| rows.first() == Some(row)) && in_tail().is_some()
    }

    /// Forgets damage that nobody can meet any more, and sees to it that the index learns of all changes.
    pub(crate) fn tidy_damage(&self) {
        let mut registry = self.damage.borrow_mut();
        if !registry.is_empty() {
            let partitions = self.partitions.borrow();
            let kept = |id| {
                let found = partitions.by_id.get(&id).map(|slot| &partitions.list[*slot as usize]);
                found.filter(|found| !found.deleted).map(|found| found.start_offset)
            };
            registry.expire(kept, |place| self.journal.generation(SegmentId(place.segment)) == Some(place.generation));
        }
        if registry.has_changes() || self.scrub.borrow().has_change() {
            self.indexing.borrow_mut().changed = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(segment: u32, positions: Range<u64>) -> Option<DamagedPlace> {
        Some(DamagedPlace { segment, generation: u64::from(segment) + 10, positions })
    }

    fn damage(place: Option<DamagedPlace>, messages: Option<(u64, Range<u64>)>) -> Damage {
        let messages = messages.map(|(id, offsets)| DamagedMessages { partition: PartitionId(id), offsets });
        Damage { place, messages, found_at_ms: 7, found_by: FoundBy::Scrub }
    }

    /// The registry as it is after a restart, from all that it said to the index.
    fn reloaded(registry: &mut Registry, rows: &mut std::collections::BTreeMap<u64, Vec<u8>>) -> Registry {
        for (number, value) in registry.take_changes() {
            match value {
                Some(value) => drop(rows.insert(number, value)),
                None => drop(rows.remove(&number)),
            }
        }
        Registry::load(rows.clone().into_iter().collect())
    }

    #[test]
    fn what_is_known_is_listed_once_and_survives() {
        let mut rows = Default::default();
        let mut registry = Registry::default();
        assert!(registry.add(damage(place(1, 4096..8192), Some((5, 10..20)))));
        assert!(!registry.add(damage(place(1, 4096..8192), Some((5, 12..20)))));
        assert!(registry.add(damage(place(1, 12288..16384), Some((5, 30..40)))));
        assert!(registry.add(damage(None, Some((6, 20..30)))));
        assert_eq!(registry.count(), (3, 30));
        // Between two: they are one from now on.
        assert!(registry.add(damage(place(1, 8192..12288), Some((5, 20..30)))));
        let expected = [damage(place(1, 4096..16384), Some((5, 10..40))), damage(None, Some((6, 20..30)))];
        assert_eq!(registry.list(), expected);
        let mut again = reloaded(&mut registry, &mut rows);
        assert_eq!(again.list(), expected);
        assert!(again.add(damage(None, Some((7, 0..1)))));
        assert_eq!(reloaded(&mut again, &mut rows).count(), (3, 41), "numbers are not used twice");
    }

    #[test]
    fn a_place_goes_when_its_messages_are_known() {
        let mut registry = Registry::default();
        assert!(registry.add(damage(place(1, 4096..8192), None)));
        assert!(registry.add(damage(place(1, 4200..5000), Some((5, 1..2)))));
        assert!(registry.add(damage(place(1, 5000..6000), Some((6, 1..2)))));
        assert!(!registry.add(damage(place(1, 4096..8192), None)));
        assert_eq!(registry.count(), (2, 2));
        assert!(registry.add(damage(place(2, 4096..8192), None)), "another segment");
    }

    #[test]
    fn entries_go_with_what_they_are_about() {
        let mut rows = Default::default();
        let mut registry = Registry::default();
        registry.add(damage(place(1, 4096..8192), Some((5, 10..20))));
        registry.add(damage(place(1, 8192..9000), Some((6, 10..20))));
        registry.add(damage(place(1, 12288..16384), None));
        registry.expire(|_| Some(19), |_| true);
        assert_eq!(registry.count().0, 3);
        registry.expire(|id| (id.0 == 5).then_some(19), |place| place.segment != 1);
        assert_eq!(registry.list(), [damage(None, Some((5, 10..20)))]);
        registry.expire(|_| Some(20), |_| true);
        assert_eq!(registry.list(), []);
        assert_eq!(reloaded(&mut registry, &mut rows).list(), []);
        assert!(rows.is_empty());
    }

    #[test]
    fn a_row_that_cannot_be_read_is_forgotten() {
        let good = damage(place(1, 0..4096), Some((5, 1..2))).encode();
        assert_eq!(good.len(), VALUE_BYTES);
        for cut in 0..good.len() {
            assert_eq!(Damage::decode(&good[..cut]), None);
        }
        let mut registry = Registry::load(vec![(3, vec![1, 2]), (4, good)]);
        assert_eq!(registry.count().0, 1);
        assert_eq!(registry.take_changes(), [(3, None)]);
    }

    #[test]
    fn the_list_does_not_grow_without_end() {
        let mut registry = Registry::default();
        for index in 0..ENTRIES_MAX as u64 {
            assert!(registry.add(damage(None, Some((1, index * 2..index * 2 + 1)))));
        }
        assert!(!registry.add(damage(None, Some((2, 0..1)))));
        assert!(registry.take_overflowed() && !registry.take_overflowed());
        assert!(registry.add(damage(None, Some((1, 1..2)))), "what joins takes no room");
    }
}
