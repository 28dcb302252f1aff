//! Opening a store: what the durable index has, then what the journal has beyond it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::PartitionId;
use drava_runtime::local::{Broadcast, Notify};

use crate::backlog::Backlog;
use crate::block::{ExtentHeader, ExtentKind};
use crate::cache::BlockCache;
use crate::checkpoint::Checkpoints;
use crate::compact::Compactor;
use crate::damage::Registry;
use crate::flush::Indexing;
use crate::foreign::Foreign;
use crate::index::{Covered, ExtentRow, Index, IndexBatch, IndexThread, SegmentRow};
use crate::io::{ALIGNMENT, Io};
use crate::journal::{Journal, JournalConfig, Role, Segment};
use crate::ledger::{Ledgers, RollPolicy, Writer};
use crate::managed_ledger::ManagedLedger;
use crate::memory::Memory;
use crate::pool::BufferPool;
use crate::rebuild::Rebuild;
use crate::recovery::{self, Visited, Visitor, open_error};
use crate::scrub::Scrub;
use crate::segment::{self, SegmentId, SegmentKind};
use crate::stage::Staging;
use crate::state::{Checkpoint, RowChange, StateBatch};
use crate::store::{
    Inner, OpenError, PartitionLimits, Partitions, Recovered, RecoveredPartition, ReplayedBatch, StoreConfig,
    StoreFigures,
};

/// What replay makes of the blocks.
struct Replay {
    partitions: Partitions,
    roll: RollPolicy,
    state: BTreeMap<PartitionId, BTreeMap<Vec<u8>, Vec<u8>>>,
    batches: BTreeMap<PartitionId, Vec<ReplayedBatch>>,
    index: IndexBatch,
    live: Vec<(SegmentId, u64)>,
}

pub(crate) async fn open<I: Io, T: 'static>(
    io: I,
    config: StoreConfig,
    index: Index,
    derive: impl FnOnce(&[RecoveredPartition], &mut StateBatch),
) -> Result<(Inner<I, T>, Recovered), OpenError> {
    validate(&config)?;
    let started = io.now();
    let index = IndexThread::start(&io, index)?;
    let loaded = index.load().await?;
    let known = |id: SegmentId| {
        let found = loaded.segments.iter().find(|(segment, row)| *segment == id && 0 < row.live_bytes);
        let active = loaded.covered.filter(|covered| covered.end.segment == id && covered.end.names_a_segment());
        let active = active.map(|covered| (covered.end.generation, SegmentKind::Journal));
        active.or(found.map(|(_, row)| (row.generation, row.kind)))
    };
    let mut segments = recovery::survey(&io, &config.dir, config.shard, &known).await?;
    let mut gone = BTreeSet::new();
    for &(id, SegmentRow { generation, live_bytes, .. }) in &loaded.segments {
        let segment = segments.get_mut(id.0 as usize).and_then(Option::as_mut);
        if 0 < live_bytes && segment.as_ref().is_none_or(|segment| segment.generation != generation) {
            let shard = config.shard.0;
            tracing::error!(shard, segment = id.0, live_bytes, "a segment with live entries is gone");
        }
        match segment {
            // Of another use, too: until the index lets go of the old one nothing tells what of it is gone.
            Some(segment) => segment.live_bytes = live_bytes,
            None if 0 < live_bytes => drop(gone.insert(id)),
            None => {}
        }
    }

    let limits = PartitionLimits::default();
    let roll = RollPolicy::new(config.ledger_bytes_max, config.ledger_age_max, &limits);
    let covered = loaded.covered;
    let mut replay = Replay {
        partitions: Partitions::default(),
        roll,
        state: BTreeMap::new(),
        batches: BTreeMap::new(),
        index: IndexBatch::default(),
        live: Vec::new(),
    };
    for (id, found) in loaded.partitions {
        let partition = ManagedLedger::new(id, found.row, Ledgers::from_rows(found.ledgers), roll);
        let slot = replay.partitions.list.len() as u32;
        replay.partitions.by_id.insert(id, slot);
        replay.partitions.list.push(partition);
        replay.state.insert(id, found.state.into_iter().collect());
    }
    let sealed = covered.is_some_and(|covered| covered.sealed);
    let mut made_anew = None;
    let mut foreign_live = loaded.foreign;
    let replayed = if covered.is_some() {
        recovery::replay(&io, &config.dir, config.shard, &mut segments, covered, &mut replay).await?
    } else {
        let used = segments.iter().flatten().filter(|segment| 0 < segment.generation);
        let bytes_total = used.map(|segment| segment.bytes).sum();
        let mut rebuild = Rebuild::new(&io, &index, config.shard, bytes_total);
        let replayed = recovery::replay(&io, &config.dir, config.shard, &mut segments, None, &mut rebuild).await?;
        recovery::read_compacted(&io, &config.dir, config.shard, &mut segments, &mut rebuild).await?;
        let finished = rebuild.finish(roll).await?;
        replay.partitions = finished.partitions;
        replay.state = finished.state;
        replay.batches = finished.batches;
        replay.index = finished.index;
        replay.live = finished.live;
        foreign_live = finished.foreign;
        made_anew = Some(finished.rebuilt).filter(|_| 0 < replayed.blocks);
        replayed
    };
    let checkpoint = replay.index.checkpoint.or(loaded.checkpoint).unwrap_or(0);
    // Without a checkpoint all of the journal is behind the last one.
    let grown = |segment: &&Segment<I::File>| {
        segment.kind == SegmentKind::Journal && segment.role != Role::Spare && checkpoint <= segment.generation
    };
    let checkpoints = Checkpoints {
        grown_bytes: segments.iter().flatten().filter(grown).map(|segment| segment.bytes).sum(),
        bytes: replay.state.values().flatten().map(|(key, value)| (key.len() + value.len() + 32) as u64).sum(),
    };
    for &(id, bytes) in &replay.live {
        if let Some(segment) = segments[id.0 as usize].as_mut() {
            segment.live_bytes += bytes;
        }
    }
    let rebuilt = covered.is_none() && 0 < replayed.blocks;
    let end = replayed.end.unwrap_or_default();

    let Replay { mut partitions, state, mut batches, index: mut batch, .. } = replay;
    let mut state = state;
    // What was replayed goes to the index with the next batch, which has the state that the shard derives from it. Were it
    // covered any earlier, a crash in between would leave the index without that state, and the entries would not be
    // replayed again: a producer's retry would be appended twice.
    let pending = 0 < replayed.blocks;
    let mut touched = Vec::new();
    for (slot, partition) in partitions.list.iter_mut().enumerate() {
        if partition.deleted {
            continue;
        }
        partition.next_offset = partition.end_offset;
        partition.writer = Writer::after(partition.row().last_ledger);
        if pending {
            partition.touched = true;
            touched.push(slot as u32);
        }
    }
    let found: Vec<RecoveredPartition> = partitions
        .by_id
        .iter()
        .map(|(id, slot)| {
            let partition = &partitions.list[*slot as usize];
            RecoveredPartition {
                partition: *id,
                start_offset: partition.start_offset,
                end_offset: partition.end_offset,
                state: state.remove(id).unwrap_or_default().into_iter().collect(),
                replayed: batches.remove(id).unwrap_or_default(),
            }
        })
        .collect();
    let mut derived = StateBatch::default();
    derive(&found, &mut derived);
    batch.state.append(&mut derived.rows);
    let foreign = Foreign::new(io.clone(), config.foreign.clone(), foreign_live);
    let known_end = covered.unwrap_or_default().end;
    if sealed {
        // From here on the journal is not closed any more.
        let covered = Covered { end: known_end, sealed: false };
        index.apply(Box::new(IndexBatch { covered, flush: true, ..IndexBatch::default() })).await?;
    }

    let woken = Rc::new(Notify::default());
    let journal = Rc::new(Journal::new(
        io.clone(),
        JournalConfig {
            dir: config.dir.clone(),
            shard: config.shard,
            segment_bytes: config.segment_bytes,
            segments_spare: config.segments_spare,
            disk_reserve_bytes: config.disk_reserve_bytes,
        },
        segments,
        Some(end),
        woken.clone(),
    ));
    let indexed_sequence = known_end.next_sequence - 1;
    journal.set_covered(indexed_sequence);
    journal.set_checkpoint(checkpoint);
    journal.set_gone(gone);
    if !journal.has_segment() {
        journal.prepare().await.map_err(open_error("make the first journal segment"))?;
    }
    let memory = Rc::new(Memory::new(config.memory_bytes));
    for partition in &mut partitions.list {
        partition.trim_tail(end.next_sequence, indexed_sequence);
        partition.shrink();
        partition.count_memory(&memory);
    }

    let damage = Registry::load(loaded.damage);
    let scrub = Scrub::load(&loaded.scrub, &replayed.damaged, |segment| journal.generation(SegmentId(segment)));

    let recovered = Recovered {
        partitions: found,
        replayed_blocks: replayed.blocks,
        replayed_bytes: replayed.bytes,
        took: io.now().saturating_sub(started),
        damaged: replayed.damaged,
        torn: replayed.torn,
        index_rebuilt: rebuilt,
        rebuilt: made_anew,
    };
    let inner = Inner {
        pool: Rc::new(BufferPool::new(io.clone(), memory.buffers_bytes_max() as usize, memory.clone())),
        staging: RefCell::new(Staging::new(config.block_bytes_max)),
        partitions: RefCell::new(partitions),
        cache: RefCell::new(BlockCache::new(end.next_sequence, config.cache_bytes)),
        backlog: Backlog::new(config.read_ahead_bytes),
        indexing: RefCell::new(Indexing {
            batch: Box::new(batch),
            touched,
            covered: Covered { end, sealed: false },
            indexed_sequence,
            bytes: 0,
            unflushed_bytes: 0,
            changed: pending,
            unflushed: false,
            flushed_at: Duration::ZERO,
            generation: 0,
            wanted: pending,
            flush_wanted: pending,
            released: BTreeMap::new(),
        }),
        figures: Cell::new(StoreFigures::default()),
        in_flight_bytes: Cell::new(0),
        woken,
        index_woken: Notify::default(),
        progress: Broadcast::default(),
        stopped: Cell::new(false),
        sink: RefCell::new(None),
        compactor: Compactor::new(config.compaction_bytes_per_s),
        memory,
        damage: RefCell::new(damage),
        scrub: RefCell::new(scrub),
        checkpoints: RefCell::new(checkpoints),
        unvouched: Notify::default(),
        mark_wanted: Cell::new(false),
        journal,
        index,
        config,
        io,
        foreign,
    };
    // A node that is killed again and again soon after its start would replay more each time. Damage is found anew by the
    // next replay, until it is in the index: what has some is left to the first batch after the start.
    let is_long = inner.config.index_flush_bytes <= recovered.replayed_bytes;
    if is_long && recovered.damaged.is_empty() && inner.has_index_room().await {
        inner.send_index_batch(None, true, false).await?;
    }
    Ok((inner, recovered))
}

fn validate(config: &StoreConfig) -> Result<(), OpenError> {
    let check = |fine: bool, what: &str| if fine { Ok(()) } else { Err(OpenError::Config(what.into())) };
    check(config.segment_bytes.is_multiple_of(ALIGNMENT as u64), "segment_bytes is a multiple of 4096")?;
    check(config.segment_bytes <= u32::MAX as u64, "segment_bytes is below 4 GiB")?;
    check(ALIGNMENT <= config.block_bytes_max, "block_bytes_max is at least 4096")?;
    check(
        2 * config.block_bytes_max as u64 + segment::HEADER_BYTES <= config.segment_bytes,
        "segment_bytes holds at least two blocks of block_bytes_max",
    )?;
    check(config.compaction_garbage_percent <= 100, "compaction_garbage_percent is at most 100")?;
    check(0 < config.flushes_in_flight_max, "flushes_in_flight_max is at least 1")?;
    // Half is for readers, a quarter for blocks in flight; the cache has what is left.
    let writing_bytes = config.flushes_in_flight_max as u64 * config.block_bytes_max as u64;
    check(4 * writing_bytes <= config.memory_bytes, "memory_bytes is at least 4 times all blocks that may be in flight")
}

impl Visitor for Replay {
    fn block(&mut self, block: &Visited<'_>) {
        for extent in block.extents.iter().filter(|extent| extent.header.kind == ExtentKind::Data) {
            let header = &extent.header;
            let partition = self.partitions.get_or_insert(header.ledger.partition, self.roll);
            let last_ledger = partition.ledgers.last().map_or(0, |(sequence, _)| *sequence);
            if partition.deleted || header.base_offset < partition.end_offset || header.ledger.sequence < last_ledger {
                if partition.end_offset < header.next_offset() {
                    tracing::error!(?header, "an extent of the journal does not follow its partition; it is skipped");
                }
                continue;
            }
            let row =
                ExtentRow::of(header, header.block_sequence, block.segment, block.position, extent.position as u32);
            partition.extend(row);
            partition.writer = Writer::after(partition.row().last_ledger);
            self.index.extents.push((partition.partition, row));
            self.live.push((block.segment, row.body_bytes as u64));
            let batches = block.batches[extent.batches.clone()].iter().map(ReplayedBatch::of);
            self.batches.entry(partition.partition).or_default().extend(batches);
        }
        // A partition's last row may drop it, whatever comes before it in the block.
        for extent in block.extents.iter().filter(|extent| extent.header.kind == ExtentKind::State) {
            let id = extent.header.ledger.partition;
            RowChange::decode_all(id, extent.body(block.bytes), |change| self.change(id, change));
        }
        self.index.generations.push((block.segment, block.header.id.generation));
        self.index.generations.dedup();
    }

    /// Messages that were acknowledged and cannot be read: their offsets are not given out again.
    fn lost(&mut self, header: &ExtentHeader) {
        let Some(&slot) = self.partitions.by_id.get(&header.ledger.partition) else { return };
        let partition = &mut self.partitions.list[slot as usize];
        if partition.end_offset <= header.base_offset {
            tracing::error!(ledger = %header.ledger, from = header.base_offset, to = header.next_offset(), "messages are lost to damage");
            partition.end_offset = header.next_offset();
        }
    }
}

impl Replay {
    fn change(&mut self, id: PartitionId, change: RowChange) {
        // It repeats what the index has; the partition may be gone since.
        if let RowChange::Checkpoint(row) = change {
            if let Checkpoint::End { generation, .. } = row {
                self.index.checkpoint = Some(generation);
            }
            return;
        }
        let partition = self.partitions.get_or_insert(id, self.roll);
        match change {
            RowChange::Put { key, value } => {
                self.state.entry(id).or_default().insert(key.clone(), value.clone());
                self.index.state.push((id, key, Some(value)));
            }
            RowChange::Delete { key } => {
                self.state.entry(id).or_default().remove(&key);
                self.index.state.push((id, key, None));
            }
            RowChange::Trim(trim) => {
                partition.end_offset = partition.end_offset.max(trim.start_offset);
                partition.trim(&trim);
                self.index.trims.push(trim);
            }
            RowChange::Drop => {
                (partition.deleted, partition.dropped) = (true, true);
                partition.ledgers = Ledgers::default();
                partition.tail.clear();
                self.partitions.by_id.remove(&id);
                self.state.remove(&id);
                self.batches.remove(&id);
                self.index.dropped.push(id);
            }
            RowChange::Checkpoint(_) => {}
        }
    }
}
