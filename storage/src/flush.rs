//! Group commit: from staged entries to durable, readable, indexed ones.
//!
//! One task does it all, in this order: give back what completed, then start what may start. A flush starts at once
//! when none is in flight; while some are, another starts only when enough is staged to be worth a write of its own.
//! So one writer alone waits for nobody, and many writers share a write without a timer.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::PartitionId;

use crate::block::{BlockWriter, ExtentKind};
use crate::index::{Covered, ExtentRow, IndexBatch};
use crate::io::{ALIGNMENT, Io};
use crate::journal::Completed;
use crate::pool::{self, Block};
use crate::segment::SegmentId;
use crate::stage::{Group, StagedExtent};
use crate::state::{Checkpoint, RowChange, StateBatch};
use crate::store::{FlushError, FlushSink, Inner, Partitions};

/// An index batch goes out when it has this many extents,
const INDEX_EXTENTS_MIN: usize = 1024;
/// or the journal grew by this much,
const INDEX_BYTES_MIN: u64 = 32 << 20;
/// or at the next round of housekeeping.
pub(crate) const HOUSEKEEPING: Duration = Duration::from_millis(500);
/// The index is made durable after this long, if anything changed, so that dead segments can be used again.
const INDEX_FLUSH_INTERVAL: Duration = Duration::from_secs(10);
/// What a row takes in a batch, beside the bytes of its key and value.
const INDEX_ROW_BYTES: u64 = size_of::<(PartitionId, ExtentRow)>() as u64;
/// Partitions looked at in one round of housekeeping before others may run.
const HOUSEKEEPING_BITE: usize = 256;

/// A block in flight.
pub(crate) struct Flushing<I: Io, T> {
    pub(crate) group: Group<T>,
    pub(crate) block: Block<I>,
}

/// What the next index batch has, and how the last ones went.
pub(crate) struct Indexing {
    pub(crate) batch: Box<IndexBatch>,
    /// Partitions whose rows changed.
    pub(crate) touched: Vec<u32>,
    /// Where the journal goes on after the last completed block.
    pub(crate) covered: Covered,
    /// The last completed block that the index has.
    pub(crate) indexed_sequence: u64,
    /// Journal bytes since the last batch and since the last flush of the index.
    pub(crate) bytes: u64,
    pub(crate) unflushed_bytes: u64,
    pub(crate) changed: bool,
    pub(crate) unflushed: bool,
    pub(crate) flushed_at: Duration,
    pub(crate) generation: u64,
    pub(crate) wanted: bool,
    pub(crate) flush_wanted: bool,
    /// Bytes that the index has let go since it was last made durable. Until then a crash brings the rows back that point
    /// to them, so they keep their segments.
    pub(crate) released: BTreeMap<SegmentId, u64>,
}

impl<I: Io, T: 'static> Inner<I, T> {
    pub(crate) async fn run_flusher(self: Rc<Self>, sink: Rc<RefCell<dyn FlushSink<T>>>) {
        let mut row = Vec::new();
        while !self.stopped.get() {
            self.woken.notified().await;
            loop {
                let completed = self.complete(&sink);
                let started = self.start_flush(&mut row) || self.start_mark();
                if !completed && !started {
                    break;
                }
                self.io.yield_if_needed().await;
            }
        }
    }

    /// Gives back one block, or all of them after a failure. `false`: there is none.
    fn complete(&self, sink: &Rc<RefCell<dyn FlushSink<T>>>) -> bool {
        match self.journal.completed() {
            None => {
                if let Some(error) = self.journal.failed().filter(|_| !self.staging.borrow().is_empty()) {
                    self.give_up(&error, None, sink);
                }
                false
            }
            Some(Ok(completed)) => {
                let mut group = self.settle(completed);
                if !group.tokens.is_empty() {
                    sink.borrow_mut().flushed(&mut group.tokens);
                    assert!(group.tokens.is_empty(), "the sink drains its tokens");
                }
                for waiter in group.waiters.drain(..) {
                    waiter.send(());
                }
                self.staging.borrow_mut().recycle(group);
                self.progress.notify_all();
                true
            }
            Some(Err((error, flushing))) => {
                self.give_up(&error, Some(flushing), sink);
                true
            }
        }
    }

    /// After a failed write: gives back all that is in flight or staged, takes the partitions back to what is durable,
    /// and lets the journal roll if it can. Rows of state go on their way again then: the shard has acted on them.
    fn give_up(&self, error: &FlushError, first: Option<Flushing<I, T>>, sink: &Rc<RefCell<dyn FlushSink<T>>>) {
        let mut lost: Vec<Group<T>> = first.into_iter().map(|flushing| flushing.group).collect();
        while let Some(Err((_, flushing))) = self.journal.completed() {
            lost.push(flushing.group);
        }
        lost.extend(std::iter::from_fn(|| self.staging.borrow_mut().take_front()));
        self.in_flight_bytes.set(0);
        let mut partitions = self.partitions.borrow_mut();
        for extent in lost.iter().flat_map(|group| &group.extents) {
            partitions.list[extent.partition_index as usize].roll_back();
        }
        let rolls = self.journal.roll();
        tracing::error!(
            shard = self.config.shard.0,
            error = %error,
            blocks = lost.len(),
            read_only = !rolls,
            "a write failed; what was in flight is given up"
        );
        let mut tokens = Vec::new();
        for mut group in lost {
            tokens.append(&mut group.tokens);
            if rolls {
                self.stage_rows_again(&mut group, &mut partitions);
            }
        }
        drop(partitions);
        if !tokens.is_empty() {
            sink.borrow_mut().failed(&mut tokens, error);
            assert!(tokens.is_empty(), "the sink drains its tokens");
        }
        self.progress.notify_all();
    }

    fn stage_rows_again(&self, group: &mut Group<T>, partitions: &mut Partitions) {
        let mut staging = self.staging.borrow_mut();
        let mut waiters = std::mem::take(&mut group.waiters);
        for index in 0..group.extents.len() {
            let StagedExtent { partition_index, ref header, .. } = group.extents[index];
            if header.kind != ExtentKind::State {
                continue;
            }
            let partition = &mut partitions.list[partition_index as usize];
            group.take_rows(index, |change| {
                // Retention decides anew about a trim, and a checkpoint is begun anew.
                if !matches!(change, RowChange::Trim(_) | RowChange::Checkpoint(_)) {
                    staging.row(partition.partition, partition_index, change, &mut partition.state_chain);
                }
            });
        }
        if let Some(last) = staging.back() {
            last.waiters.append(&mut waiters);
        }
    }

    /// Makes the entries of a durable block readable and notes what the index must learn.
    fn settle(&self, completed: Completed<Flushing<I, T>>) -> Group<T> {
        let Flushing { mut group, block } = completed.payload;
        let placement = completed.placement;
        let sequence = placement.id.sequence;
        let is_mark = group.extents.is_empty();
        let mut figures = self.figures.get();
        if !is_mark {
            figures.flushes += 1;
            figures.flushed_bytes += completed.block_bytes;
            figures.flush_micros_total += completed.took.as_micros() as u64;
            self.unvouched.notify();
        }
        if !is_mark {
            self.in_flight_bytes.set(self.in_flight_bytes.get() - group.body_bytes as u64);
        }

        let mut partitions = self.partitions.borrow_mut();
        let mut indexing = self.indexing.borrow_mut();
        let indexing = &mut *indexing;
        let mut cache = self.cache.borrow_mut();
        if indexing.generation != placement.id.generation {
            indexing.generation = placement.id.generation;
            indexing.batch.generations.push((placement.segment, placement.id.generation));
        }
        let wanted = group.extents.iter().filter(|extent| {
            extent.header.kind == ExtentKind::Data && partitions.list[extent.partition_index as usize].is_cached()
        });
        let wanted = wanted.count() as u32;
        block.written();
        cache.insert(sequence, Rc::new(block), wanted);
        let mut index_bytes = 0;
        let mut live_bytes = 0;
        for index in 0..group.extents.len() {
            let extent = &group.extents[index];
            let partition = &mut partitions.list[extent.partition_index as usize];
            if !partition.touched {
                partition.touched = true;
                indexing.touched.push(extent.partition_index);
            }
            if extent.header.kind == ExtentKind::Data {
                let header = &extent.header;
                let row = ExtentRow::of(header, sequence, placement.segment, placement.position, extent.position);
                partition.extend(row);
                let first_cached = cache.first_sequence();
                partition.limit_cache(row.body_bytes as u64, first_cached, |sequence| cache.release(sequence));
                partition.trim_tail(cache.first_sequence(), indexing.indexed_sequence);
                partition.count_memory(&self.memory);
                indexing.batch.extents.push((partition.partition, row));
                index_bytes += INDEX_ROW_BYTES;
                live_bytes += row.body_bytes as u64;
                continue;
            }
            let batch = &mut indexing.batch;
            index_bytes += group.extents[index].header.body_bytes as u64;
            index_bytes += group.extents[index].header.entry_count as u64 * INDEX_ROW_BYTES;
            group.take_rows(index, |change| match change {
                RowChange::Put { key, value } => batch.state.push((partition.partition, key, Some(value))),
                RowChange::Delete { key } => batch.state.push((partition.partition, key, None)),
                RowChange::Trim(trim) => {
                    figures.ledgers_deleted += partition.trim(&trim);
                    batch.trims.push(trim);
                }
                RowChange::Drop => {
                    figures.ledgers_deleted += partition.ledgers.count() as u64;
                    partition.ledgers = Default::default();
                    partition.tail = Default::default();
                    partition.dropped = true;
                    batch.dropped.push(partition.partition);
                }
                RowChange::Checkpoint(Checkpoint::End { generation, .. }) => {
                    batch.checkpoint = Some(generation);
                    self.journal.set_checkpoint(generation);
                }
                RowChange::Checkpoint(
                    Checkpoint::Row { .. } | Checkpoint::Partition { .. } | Checkpoint::Extent { .. },
                ) => {}
            });
        }
        self.journal.add_live(placement.segment, live_bytes);
        self.memory.index_waits(index_bytes);
        drop(cache);
        self.make_room(self.staging.borrow().memory_bytes(), 0);
        indexing.covered = Covered { end: completed.end, sealed: false };
        // The index has nothing to learn of a mark.
        indexing.changed |= !is_mark;
        indexing.bytes += completed.block_bytes;
        indexing.unflushed_bytes += completed.block_bytes;
        self.checkpoints.borrow_mut().grown_bytes += completed.block_bytes;
        if INDEX_EXTENTS_MIN <= indexing.batch.extents.len() || INDEX_BYTES_MIN <= indexing.bytes {
            indexing.wanted = true;
            self.index_woken.notify();
        }
        self.figures.set(figures);
        group
    }

    /// Writes the oldest group if it may go now.
    fn start_flush(&self, row: &mut Vec<u8>) -> bool {
        let mut staging = self.staging.borrow_mut();
        let Some(body_bytes) = staging.front_bytes() else { return false };
        let in_flight = self.journal.in_flight();
        let enough = in_flight == 0 || self.config.flush_bytes_min as u64 <= staging.bytes();
        if !enough || self.config.flushes_in_flight_max <= in_flight || self.journal.is_marking() {
            return false;
        }
        if self.memory.index_is_behind() {
            // What is durable must stay in memory until the index has it. The next batch wakes the flusher.
            self.indexing.borrow_mut().wanted = true;
            self.index_woken.notify();
            return false;
        }
        let mut block_bytes = pool::class_bytes(body_bytes);
        self.make_room(staging.memory_bytes(), block_bytes as u64);
        if 0 < in_flight && self.memory.is_over(staging.memory_bytes(), block_bytes as u64) {
            // Large blocks go one at a time where there is no memory for more.
            return false;
        }
        let mut placement = self.journal.place(block_bytes as u64);
        if placement.is_none() && self.journal.has_room(block_bytes as u64) {
            // The next segment is being made ready.
            return false;
        }
        if placement.is_none() {
            // A full disk: the exact size may still fit.
            block_bytes = body_bytes.next_multiple_of(ALIGNMENT);
            placement = self.journal.place(block_bytes as u64);
        }
        let Some(placement) = placement else { return false };
        let mut group = staging.take_front().expect("it was looked at");
        drop(staging);
        self.in_flight_bytes.set(self.in_flight_bytes.get() + group.body_bytes as u64);
        let mut buffer = self.pool.take_exact(block_bytes);
        let bytes = Rc::get_mut(&mut buffer).expect("the pool gives what nobody else holds").as_mut();
        let mut writer = BlockWriter::new(bytes, placement.id.sequence);
        group.write(&mut writer, row);
        let crc = writer.finish(&placement.id);
        let block = Block::new(buffer.clone(), self.pool.clone());
        self.journal.write(placement, buffer, crc, Flushing { group, block });
        true
    }

    /// The cache lets go of what the others need.
    pub(crate) fn make_room(&self, staged: u64, more: u64) {
        let mut cache = self.cache.borrow_mut();
        while self.memory.is_over(staged, more) && cache.evict() {}
    }

    /// Sends index batches, one at a time; while the thread is busy the next one gathers.
    pub(crate) async fn run_indexer(self: Rc<Self>, sink: Rc<RefCell<dyn FlushSink<T>>>) {
        while !self.stopped.get() {
            self.index_woken.notified().await;
            if self.indexing.borrow().wanted && !self.journal.is_failed() {
                let flush_due = {
                    let indexing = self.indexing.borrow();
                    indexing.flush_wanted || self.config.index_flush_bytes <= indexing.unflushed_bytes
                };
                let flush_due = flush_due && (!self.journal.is_full() || self.has_index_room().await);
                if let Err(error) = self.send_index_batch(Some(&sink), flush_due, false).await {
                    tracing::error!(shard = self.config.shard.0, error = %error, "the index failed; the shard takes no more entries");
                    self.journal.fail(error);
                }
            }
        }
    }

    /// A flush of the index takes room, which is part of the reserve. Where others have eaten into that, it waits: the
    /// index would fail for good on a disk without any.
    pub(crate) async fn has_index_room(&self) -> bool {
        let free_bytes = self.io.free_bytes(&self.config.dir).await;
        free_bytes.is_ok_and(|free_bytes| self.config.disk_reserve_bytes / 2 <= free_bytes)
    }

    /// Brings the index up to the last completed block.
    pub(crate) async fn send_index_batch(
        &self,
        sink: Option<&Rc<RefCell<dyn FlushSink<T>>>>,
        flush: bool,
        sealed: bool,
    ) -> Result<(), FlushError> {
        // The sink may call the store, so nothing of it is borrowed here.
        let mut state = StateBatch::default();
        if let Some(sink) = sink {
            sink.borrow_mut().collect_state(&mut state);
        }
        let (batch, unflushed_bytes, covered_sequence) = {
            let mut partitions = self.partitions.borrow_mut();
            let mut indexing = self.indexing.borrow_mut();
            let indexing = &mut *indexing;
            let mut batch = std::mem::take(&mut indexing.batch);
            batch.state.append(&mut state.rows);
            for index in indexing.touched.drain(..) {
                let partition = &mut partitions.list[index as usize];
                partition.touched = false;
                // As long as its end is not durable it may be there after a crash, and the index covers what it has by then:
                // without its row nobody would know of it, and its messages would take their room for ever.
                if partition.dropped {
                    continue;
                }
                batch.partitions.push((partition.partition, partition.row()));
            }
            // Every ledger that an extent of this batch belongs to, once.
            let mut last = None;
            for (id, extent) in &batch.extents {
                if last == Some((*id, extent.ledger)) {
                    continue;
                }
                last = Some((*id, extent.ledger));
                let known = partitions.by_id.get(id).map(|&index| &partitions.list[index as usize]);
                // Those that are being deleted are found by no id.
                let deleted = || partitions.list.iter().find(|other| other.partition == *id && !other.dropped);
                let Some(partition) = known.or_else(deleted) else { continue };
                if let Some(row) = partition.ledgers.row(extent.ledger) {
                    batch.ledgers.push((partition.ledger(extent.ledger), row));
                }
            }
            batch.ledgers.sort_unstable_by_key(|(ledger, _)| *ledger);
            batch.ledgers.dedup_by_key(|(ledger, _)| *ledger);
            batch.covered = Covered { sealed, ..indexing.covered };
            batch.flush = flush;
            batch.damage = self.damage.borrow_mut().take_changes();
            batch.scrub = self.scrub.borrow_mut().take_change();
            indexing.wanted = false;
            indexing.flush_wanted = false;
            indexing.changed = false;
            indexing.unflushed |= !flush;
            indexing.bytes = 0;
            let unflushed_bytes = std::mem::take(&mut indexing.unflushed_bytes);
            (batch, unflushed_bytes, indexing.covered.end.next_sequence.saturating_sub(1))
        };
        let sent_bytes = self.memory.index_sent();
        let applied = self.index.apply(batch).await.map_err(|error| FlushError::Index(error.to_string()))?;
        self.memory.index_has(sent_bytes);
        self.woken.notify();
        self.foreign.release(&applied.released_foreign);
        let mut figures = self.figures.get();
        figures.index_batches += 1;
        self.figures.set(figures);
        let mut indexing = self.indexing.borrow_mut();
        indexing.indexed_sequence = indexing.indexed_sequence.max(covered_sequence);
        for (segment, bytes) in applied.released {
            *indexing.released.entry(segment).or_default() += bytes;
        }
        if applied.flushed || cfg!(feature = "mutant-index-order") {
            indexing.flushed_at = self.io.now();
            indexing.unflushed = false;
            let released = std::mem::take(&mut indexing.released);
            drop(indexing);
            for (segment, bytes) in released {
                self.journal.remove_live(segment, bytes);
            }
            self.foreign.flushed();
            self.journal.set_covered(covered_sequence);
        } else {
            indexing.unflushed_bytes += unflushed_bytes;
        }
        Ok(())
    }

    /// What is due by the clock: retention, ledgers that grow old, index batches, memory.
    pub(crate) async fn run_housekeeping(self: Rc<Self>) {
        let mut next = 0;
        while !self.stopped.get() {
            self.io.sleep(HOUSEKEEPING).await;
            if self.stopped.get() {
                break;
            }
            let now_ms = self.io.wall_clock_ms();
            let count = self.partitions.borrow().list.len();
            let mut looked = 0;
            while looked < count {
                for _ in 0..HOUSEKEEPING_BITE.min(count - looked) {
                    self.tidy(next % count, now_ms);
                    next = (next + 1) % count;
                    looked += 1;
                }
                self.io.yield_if_needed().await;
            }
            self.backlog.expire(self.io.now());
            self.make_room(self.staging.borrow().memory_bytes(), 0);
            self.tidy_damage();
            let mut indexing = self.indexing.borrow_mut();
            let flush_due = (indexing.unflushed || indexing.changed)
                && (indexing.flushed_at + INDEX_FLUSH_INTERVAL <= self.io.now() || self.journal.waits_for_index());
            if indexing.changed || flush_due {
                indexing.wanted = true;
                indexing.flush_wanted |= flush_due;
                self.index_woken.notify();
            }
        }
    }

    pub(crate) fn tidy(&self, index: usize, now_ms: u64) {
        let indexed_sequence = self.indexing.borrow().indexed_sequence;
        let first_cached = self.cache.borrow().first_sequence();
        let mut partitions = self.partitions.borrow_mut();
        let partition = &mut partitions.list[index];
        partition.trim_tail(first_cached, indexed_sequence);
        partition.shrink();
        partition.stretch_roll();
        partition.count_memory(&self.memory);
        if self.journal.is_failed() {
            return;
        }
        // What is staged ahead of it must not take its room: without any it would wait in front of everything else.
        if !self.journal.has_room(self.staging.borrow().bytes() + self.in_flight_bytes.get() + ALIGNMENT as u64) {
            return;
        }
        let Some(trim) = partition.expired(now_ms) else { return };
        partition.trimming = true;
        let id = partition.partition;
        self.staging.borrow_mut().row(id, index as u32, RowChange::Trim(trim), &mut partition.state_chain);
        self.woken.notify();
    }
}
