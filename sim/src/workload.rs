//! What the simulated shards do: publishes, reads, cursors, retention, drops, crashes, stops and starts, some of them with
//! another number of shards, on a disk that fails as the seed says.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::PartitionId;
use drava_protocol::batch::{self, Builder, NewRecord, Seal};
use drava_runtime::chunk::Slice;
use drava_storage::foreign::{self, Drained};
use drava_storage::reshard::{self, ReshardError};
use drava_storage::{
    AppendError, Cached, FlushError, FlushSink, ForeignStores, Index, IndexError, Io, NewEntry, PartitionLimits,
    PartitionSlot, ReadError, RecoveredPartition, ReplayedBatch, StateBatch, Store, StoreConfig, StoreId,
};

use crate::damage::BlockName;
use crate::executor::Ended;
use crate::io::SimIo;
use crate::layout::{self, Layout, config_of};
use crate::oracle::{Life, Oracle, Partition, Staged, Token, cursor_key};
use crate::producers::{Admission, ProducerSlot, Producers};
use crate::random::Random;
use crate::world::World;

/// Batches that a producer has under way.
const UNACKED_MAX: usize = 24;
const PARTITIONS_MAX: usize = 6;
/// More than a node has.
const SHARDS_MAX: u64 = 5;
/// Longer than any wait of the store's own.
const PATIENCE: Duration = Duration::from_secs(120);
/// Of a phase between two starts; a store that needs more makes no progress.
const POLLS_MAX: u64 = 5_000_000;

/// What a seed is about. Most see few kinds of faults, so that the oracle excuses little.
#[derive(Debug)]
struct Character {
    damage: bool,
    full: bool,
    write_faults: bool,
    read_faults: bool,
    short_reads: bool,
    sync_faults: bool,
    create_faults: bool,
    index_faults: bool,
    /// Now and then the family of the index is gone after a stop.
    index_loss: bool,
    slow: bool,
    /// Now and then a start has another number of shards.
    reshard: bool,
    /// One step in so many is a crash.
    crash_every: u64,
    /// The most that a record has.
    payload_bytes_max: u64,
}

impl Character {
    fn new(random: &Random) -> Character {
        Character {
            damage: random.one_in(3),
            full: random.one_in(3),
            write_faults: random.one_in(3),
            read_faults: random.one_in(4),
            short_reads: random.one_in(4),
            sync_faults: random.one_in(4),
            create_faults: random.one_in(4),
            index_faults: random.one_in(5),
            index_loss: random.one_in(4),
            slow: random.one_in(3),
            reshard: random.one_in(3),
            crash_every: *random.pick(&[30, 60, 150]),
            payload_bytes_max: *random.pick(&[200, 1000, 6000]),
        }
    }
}

fn store_config(random: &Random) -> StoreConfig {
    let block_bytes_max = *random.pick(&[8 << 10, 16 << 10, 32 << 10]);
    let segment_bytes = (*random.pick(&[36u64 << 10, 64 << 10, 128 << 10])).max(2 * block_bytes_max as u64 + 4096);
    let flushes_in_flight_max = *random.pick(&[1, 2, 4]);
    // Little enough now and then that readers wait for each other and compaction takes several turns.
    let memory_bytes_min = 4 * flushes_in_flight_max as u64 * block_bytes_max as u64;
    let memory_bytes = *random.pick(&[StoreConfig::default().memory_bytes, memory_bytes_min.max(128 << 10)]);
    StoreConfig {
        memory_bytes,
        segment_bytes,
        segments_spare: random.below(3) as usize,
        block_bytes_max,
        flush_bytes_min: *random.pick(&[1, 4 << 10, 16 << 10]),
        flushes_in_flight_max,
        cache_bytes: *random.pick(&[0, 16 << 10, 256 << 10]),
        read_ahead_bytes: *random.pick(&[16 << 10, 256 << 10]),
        ledger_bytes_max: *random.pick(&[4 << 10, 16 << 10, 64 << 10]),
        ledger_age_max: Duration::from_secs(*random.pick(&[2, 30])),
        index_flush_bytes: *random.pick(&[16 << 10, 128 << 10, 1 << 20]),
        disk_reserve_bytes: 64 << 10,
        verify_reads: true,
        scrub_bytes_per_s: *random.pick(&[0, 64 << 10, 10 << 20]),
        scrub_interval: Duration::from_secs(*random.pick(&[1, 20])),
        compaction_bytes_per_s: *random.pick(&[0, 256 << 10, 10 << 20]),
        compaction_interval: Duration::from_millis(*random.pick(&[200, 3000])),
        compaction_garbage_percent: *random.pick(&[10, 50]),
        compaction_fragment_bytes: *random.pick(&[0, 4 << 10, 64 << 10]),
        mark_after: *random.pick(&[None, Some(Duration::from_millis(50)), Some(Duration::from_secs(1))]),
        ..StoreConfig::default()
    }
}

/// A batch as its producer made it.
#[derive(Clone)]
struct Made {
    header: batch::Header,
    bytes: Rc<Vec<u8>>,
}

/// A producer outside the node: it knows what it sent and what was answered, and sends the rest again.
struct Client {
    /// 0: without sequences, and nothing is sent again.
    producer: u64,
    next_sequence: u64,
    unacked: VecDeque<Made>,
    /// Of `unacked`, to the node that runs now.
    sent: usize,
    last_acked: Option<Made>,
}

/// A whole run.
pub struct Run {
    pub world: Rc<World>,
    pub oracle: RefCell<Oracle>,
    /// Of every store.
    config: RefCell<StoreConfig>,
    layout: RefCell<Layout>,
    character: Character,
    clients: RefCell<BTreeMap<PartitionId, Vec<Client>>>,
    /// As the shard has them, for the node that runs now.
    producers: RefCell<BTreeMap<PartitionId, Producers>>,
    sequenced: RefCell<BTreeMap<Token, (PartitionId, ProducerSlot, u64)>>,
    partitions_made: Cell<u64>,
    producers_made: Cell<u64>,
    batches_made: Cell<u64>,
    steps_left: Cell<u64>,
    damaged_blocks: RefCell<Vec<BlockName>>,
    /// Something was damaged in this run.
    was_damaged: Cell<bool>,
    /// Something was damaged since the last start.
    damaged_open: Cell<bool>,
    builder: RefCell<Builder>,
    pub crashes: Cell<u64>,
    /// The node that runs now.
    open: RefCell<Option<Rc<Session>>>,
    /// The store is being closed: reads that are under way end with an error.
    closing: Cell<bool>,
}

/// How a phase ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Crash,
    Sealed,
    /// All steps are done.
    Over,
}

/// Where a partition is, for as long as the node runs.
#[derive(Clone, Copy)]
struct Place {
    shard: usize,
    slot: PartitionSlot,
}

/// The stores while they are open.
struct Session {
    run: Rc<Run>,
    /// By shard.
    stores: Vec<Store<SimIo, Token>>,
    slots: RefCell<BTreeMap<PartitionId, Place>>,
    /// Where sequential readers are.
    readers: Rc<RefCell<BTreeMap<PartitionId, u64>>>,
}

/// Of one shard.
struct Sink {
    run: Rc<Run>,
    shard: usize,
}

impl FlushSink<Token> for Sink {
    fn flushed(&mut self, tokens: &mut Vec<Token>) {
        for token in tokens.drain(..) {
            self.run.flushed(token);
        }
    }

    fn failed(&mut self, tokens: &mut Vec<Token>, error: &FlushError) {
        for token in tokens.drain(..) {
            self.run.failed(token, error);
        }
    }

    fn collect_state(&mut self, out: &mut StateBatch) {
        let layout = self.run.layout.borrow();
        let mut producers = self.run.producers.borrow_mut();
        let own = producers.iter_mut().filter(|(id, _)| layout.shard_of(**id) == self.shard);
        own.for_each(|(id, producers)| collect_rows(*id, producers, out));
    }
}

fn collect_rows(id: PartitionId, producers: &mut Producers, out: &mut StateBatch) {
    producers.collect(|producer, row| match row {
        Some(row) => out.put(id, &producer_key(producer), &row),
        None => out.delete(id, &producer_key(producer)),
    });
}

fn producer_key(producer: u64) -> Vec<u8> {
    let mut key = vec![b'p'];
    key.extend_from_slice(&producer.to_be_bytes());
    key
}

impl Run {
    /// What follows from replayed batches, and may be durable from here on.
    fn derive(&self, found: &[RecoveredPartition], out: &mut StateBatch) {
        self.oracle.borrow_mut().replayed(found);
        for partition in found.iter().filter(|partition| !partition.replayed.is_empty()) {
            collect_rows(partition.partition, &mut producers_of(partition), out);
        }
    }

    pub fn new(seed: u64, steps: u64, printed: bool) -> Rc<Run> {
        let world = World::new(seed, printed);
        let config = store_config(&world.random);
        let character = Character::new(&world.random);
        let shards = if character.reshard { world.random.in_range(1..SHARDS_MAX) as u16 } else { 1 };
        world.event(format_args!("{config:?} {character:?}"));
        Rc::new(Run {
            oracle: RefCell::default(),
            config: RefCell::new(config),
            layout: RefCell::new(Layout::new(shards)),
            character,
            clients: RefCell::default(),
            producers: RefCell::default(),
            sequenced: RefCell::default(),
            partitions_made: Cell::new(0),
            producers_made: Cell::new(0),
            batches_made: Cell::new(0),
            steps_left: Cell::new(steps),
            damaged_blocks: RefCell::default(),
            was_damaged: Cell::new(false),
            damaged_open: Cell::new(false),
            builder: RefCell::new(Builder::new(8 << 20)),
            crashes: Cell::new(0),
            open: RefCell::default(),
            closing: Cell::new(false),
            world,
        })
    }

    /// Starts and stops the store until all steps are done, then once more to look at everything.
    pub fn run(self: &Rc<Self>) {
        let world = &self.world;
        while 0 < self.steps_left.get() {
            // Some crashes come at a moment that no step chooses: while the store opens, or seals.
            let polls = if world.random.one_in(4) { world.random.in_range(1..3000) } else { POLLS_MAX };
            let session = session(self.clone());
            let end = match world.executor.run(&world.random, polls, session) {
                Ended::Done(end) => end,
                Ended::Cut if polls < POLLS_MAX => End::Crash,
                Ended::Cut => panic!("{POLLS_MAX} tasks were polled between two steps: no progress"),
                Ended::Stuck => panic!("everybody waits for somebody else"),
            };
            self.stop(end);
        }
        let mut looks = 0;
        while looks < 2 {
            let last = last_session(self.clone());
            match world.executor.run(&world.random, POLLS_MAX, last) {
                Ended::Done(end) => {
                    looks += u32::from(end == End::Sealed);
                    self.stop(end);
                }
                ended => panic!("the last look at everything does not end: {ended:?}"),
            }
        }
    }

    /// Ends the process, and the power now and then.
    fn stop(&self, end: End) {
        let world = &self.world;
        let power = world.random.one_in(2);
        world.event(format_args!("{end:?}, power fails: {power}"));
        self.crashes.set(self.crashes.get() + u64::from(end != End::Sealed));
        if let Some(session) = self.open.take() {
            // What retention has taken by now is known to be gone, whatever becomes of the row that says so.
            session.check_spans();
        }
        world.executor.kill_all();
        if power {
            world.disk.lose_power(&world.random);
        } else {
            world.disk.lose_process(&world.random);
        }
        world.crash_families();
        if self.character.index_loss && world.random.one_in(4) {
            world.event(format_args!("the index is lost"));
            world.lose_families();
        }
        self.closing.set(false);
        self.oracle.borrow_mut().crashed();
        if self.damaged_open.take() {
            let damaged = self.damaged_blocks.borrow();
            crate::damage::stopped(&self.world, &mut self.oracle.borrow_mut(), &damaged);
        }
        self.sequenced.borrow_mut().clear();
        self.producers.borrow_mut().clear();
        for client in self.clients.borrow_mut().values_mut().flatten() {
            client.sent = 0;
            if client.producer == 0 {
                client.unacked.clear();
            }
        }
        if self.character.damage && 0 < self.steps_left.get() && world.random.one_in(3) {
            self.damage(false);
        }
        if world.random.one_in(10) {
            self.config.replace(store_config(&world.random));
        }
    }

    fn damage(&self, is_open: bool) {
        self.was_damaged.set(true);
        self.damaged_open.set(is_open);
        let (mut oracle, mut damaged) = (self.oracle.borrow_mut(), self.damaged_blocks.borrow_mut());
        let draining: Vec<PathBuf> = layout::dirs(&self.layout.borrow().draining).into_values().collect();
        crate::damage::damage(&self.world, &mut oracle, &mut damaged, &draining, is_open);
    }

    fn flushed(&self, token: Token) {
        self.world.event(format_args!("ack {token}"));
        let staged = self.oracle.borrow_mut().acked(token);
        if let Some((partition, slot, end)) = self.sequenced.borrow_mut().remove(&token)
            && let Some(producers) = self.producers.borrow_mut().get_mut(&partition)
        {
            producers.durable(slot, end);
        }
        let Staged::Entry { partition, base_offset } = staged else { return };
        self.answered(partition, base_offset);
    }

    fn failed(&self, token: Token, error: &FlushError) {
        self.world.event(format_args!("failed {token}: {error}"));
        self.oracle.borrow_mut().failed(token);
        if let Some((partition, slot, _)) = self.sequenced.borrow_mut().remove(&token) {
            if let Some(producers) = self.producers.borrow_mut().get_mut(&partition) {
                producers.failed(slot);
            }
            // All that was under way fails together, and is sent again.
            self.clients.borrow_mut().get_mut(&partition).into_iter().flatten().for_each(|client| client.sent = 0);
        }
    }

    /// The client of the entry hears that it is published.
    fn answered(&self, id: PartitionId, base_offset: u64) {
        let oracle = self.oracle.borrow();
        let partition = &oracle.partitions[&id];
        let index = partition.entries.binary_search_by_key(&base_offset, |entry| entry.base_offset);
        let header = partition.entries[index.expect("a known entry")].header;
        let mut clients = self.clients.borrow_mut();
        for client in clients.get_mut(&id).into_iter().flatten() {
            let first = client.unacked.front().map(|made| made.header.base_sequence);
            if client.producer == header.producer && first == Some(header.base_sequence) {
                client.last_acked = client.unacked.pop_front();
                client.sent = client.sent.saturating_sub(1);
            }
        }
    }

    /// The stores did not open: that is fine on a bad disk, which is good from then on.
    fn excuse(&self, error: &dyn std::error::Error) {
        let (error, world) = (with_sources(error), &self.world);
        let faults = &world.disk.faults;
        let all = [&faults.write, &faults.read, &faults.sync, &faults.create, &faults.index];
        let excused = all.iter().any(|fault| 0 < fault.get()) || world.disk.capacity_bytes.get() != u64::MAX;
        assert!(excused, "the stores do not open: {error}");
        world.event(format_args!("open fails: {error}"));
        faults.clear();
        world.disk.capacity_bytes.set(u64::MAX);
    }

    fn faults_on(&self) {
        let (faults, random, character) = (&self.world.disk.faults, &self.world.random, &self.character);
        let set = |fault: &Cell<u64>, wanted: bool, per_mille: u64| {
            if wanted && random.one_in(2) {
                fault.set(per_mille);
            }
        };
        set(&faults.write, character.write_faults, 8);
        set(&faults.read, character.read_faults, 30);
        set(&faults.short_read, character.short_reads, 50);
        set(&faults.sync, character.sync_faults, 100);
        set(&faults.create, character.create_faults, 200);
        set(&faults.index, character.index_faults, 20);
        set(&faults.slow, character.slow, 20);
    }

    fn make_batch(&self, producer: u64, base_sequence: u64) -> Made {
        let random = &self.world.random;
        let number = self.batches_made.get() + 1;
        self.batches_made.set(number);
        let mut builder = self.builder.borrow_mut();
        for record in 0..random.in_range(1..5) {
            let mut payload = vec![(number + record) as u8; random.below(self.character.payload_bytes_max) as usize];
            let mark = (number << 8 | record).to_le_bytes();
            let marked = payload.len().min(8);
            payload[..marked].copy_from_slice(&mark[..marked]);
            builder.push(&NewRecord { payload: &payload, ..NewRecord::default() }).expect("it is small");
        }
        let mut bytes = Vec::new();
        let producer_epoch = u32::from(producer != 0);
        builder.seal(&Seal { producer, producer_epoch, base_sequence, ..Seal::default() }, &mut bytes);
        let header = batch::check(&bytes).expect("a good batch");
        Made { header, bytes: Rc::new(bytes) }
    }
}

/// Starts the node. `None`: the disk failed, and the process ends.
async fn open(run: &Rc<Run>) -> Option<Rc<Session>> {
    let opened = try_open(run).await;
    opened.map_err(|error| run.excuse(&*error)).ok()
}

async fn try_open(run: &Rc<Run>) -> Result<Rc<Session>, Box<dyn std::error::Error>> {
    let world = &run.world;
    world.disk.faults.clear();
    run.faults_on();
    let shards = run.layout.borrow().shards();
    let wanted = if run.character.reshard && world.random.one_in(3) { world.random.in_range(1..SHARDS_MAX) } else { 0 };
    if wanted != 0 && wanted as usize != shards {
        world.event(format_args!("reshard {shards} to {wanted}"));
        reshard(run, wanted as u16).await?;
    }
    let foreign = drain(run).await?;
    let layout = run.layout.borrow().clone();
    let (mut stores, mut all) = (Vec::new(), Vec::new());
    let indexes = SimIo(world.clone()).indexes(&layout.stores);
    for (shard, (&store, index)) in layout.stores.iter().zip(indexes).enumerate() {
        let config = config_of(&run.config.borrow(), store, foreign.clone());
        let derive = |found: &[RecoveredPartition], out: &mut StateBatch| run.derive(found, out);
        let (store, recovered) = Store::open_with(SimIo(world.clone()), config, index, derive).await?;
        world.event(format_args!(
            "open: {} blocks replayed, damaged {:?}, torn {:?}",
            recovered.replayed_blocks, recovered.damaged, recovered.torn
        ));
        let fine = recovered.damaged.is_empty() || run.was_damaged.get();
        assert!(fine, "nobody damaged anything: {:?}", recovered.damaged);
        for partition in &recovered.partitions {
            let id = partition.partition;
            assert!(layout.shard_of(id) == shard, "{id} is in shard {shard}");
        }
        stores.push(store);
        all.push(recovered);
    }
    run.oracle.borrow_mut().recovered(&all);
    for partition in all.iter().flat_map(|recovered| &recovered.partitions) {
        run.producers.borrow_mut().insert(partition.partition, producers_of(partition));
    }
    let session = Rc::new(Session { run: run.clone(), stores, slots: RefCell::default(), readers: Rc::default() });
    let mut dropped = Vec::new();
    for recovered in all.iter().flat_map(|recovered| &recovered.partitions) {
        let id = recovered.partition;
        let (limits, life) = {
            let oracle = run.oracle.borrow();
            let partition = &oracle.partitions[&id];
            (partition.limits, partition.life)
        };
        let place = session.open_partition(id, limits);
        if life == Life::Live {
            session.slots.borrow_mut().insert(id, place);
        } else {
            // Its drop did not come to its end, or the row of it was damaged.
            dropped.push((id, place));
        }
    }
    // Partitions of which nothing was written yet are not found; the metadata still has them.
    let unfound: Vec<(PartitionId, PartitionLimits)> = {
        let oracle = run.oracle.borrow();
        let live = oracle.partitions.iter().filter(|(_, partition)| partition.life == Life::Live);
        live.map(|(id, partition)| (*id, partition.limits)).collect()
    };
    for (id, limits) in unfound {
        let mut slots = session.slots.borrow_mut();
        slots.entry(id).or_insert_with(|| session.open_partition(id, limits));
    }
    session.set_floors();
    for (shard, store) in session.stores.iter().enumerate() {
        store.start(Rc::new(RefCell::new(Sink { run: run.clone(), shard })));
    }
    dropped.into_iter().for_each(|(id, place)| session.delete(id, place));
    run.open.replace(Some(session.clone()));
    Ok(session)
}

/// The steps of a start with another number of shards.
async fn reshard(run: &Rc<Run>, shards: u16) -> Result<(), ReshardError> {
    let world = &run.world;
    let io = SimIo(world.clone());
    let old = run.layout.borrow().clone();
    let new = old.followed_by(shards);
    let config = |layout: &Layout, store| config_of(&run.config.borrow(), store, layout.unheard());
    let mut all = Vec::new();
    for (&store, index) in old.stores.iter().zip(io.indexes(&old.stores)) {
        let derive = |found: &[RecoveredPartition], out: &mut StateBatch| run.derive(found, out);
        all.push(reshard::seal(io.clone(), config(&old, store), index, derive).await?);
    }
    run.oracle.borrow_mut().recovered(&all);

    // A start that was cut short may have left rows and files.
    drop(io.indexes(&old.stores));
    old.remove_undecided(world);
    let both: Vec<StoreId> = old.stores.iter().chain(&new.stores).copied().collect();
    let mut from = io.indexes(&both);
    let mut to = from.split_off(old.shards());
    let from: Vec<(StoreId, Index)> = old.stores.iter().copied().zip(from).collect();
    let moved = reshard::move_rows(&from, &mut to, &|id| new.shard_of(id))?;
    drop((from, to));
    for (&store, index) in new.stores.iter().zip(io.indexes(&both).into_iter().skip(old.shards())) {
        reshard::anchor(io.clone(), config(&new, store), index).await?;
    }
    world.event(format_args!("resharded to {shards}: {moved:?}"));
    run.layout.replace(new);
    run.oracle.borrow_mut().resharded();
    Ok(())
}

/// Removes what is in old stores for nobody, now and as long as the node runs.
async fn drain(run: &Rc<Run>) -> Result<Option<ForeignStores>, DrainError> {
    let world = &run.world;
    let io = SimIo(world.clone());
    let layout = run.layout.borrow().clone();
    layout.remove_undecided(world);
    let indexes = io.indexes(&layout.stores);
    for index in &indexes {
        if !index.is_made()? {
            return Ok(layout.unheard());
        }
    }
    let holders = foreign::holders(&indexes)?;
    let Drained { left, gone } = foreign::drain(&io, layout::dirs(&layout.draining), holders).await?;
    world.event(format_args!("drained: {gone:?}"));
    run.layout.borrow_mut().draining.retain(|store| !gone.contains(store));
    let Some((foreign, drainer)) = left else { return Ok(None) };
    world.executor.spawn(drainer.run());
    Ok(Some(foreign))
}

#[derive(Debug, thiserror::Error)]
enum DrainError {
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("old stores")]
    Io(#[from] std::io::Error),
}

/// As the shard does it: saved rows first, then the batches behind them.
fn producers_of(partition: &RecoveredPartition) -> Producers {
    let mut producers = Producers::default();
    for (key, value) in &partition.state {
        if let Some((b'p', producer)) = key.split_first() {
            let producer = u64::from_be_bytes(producer.try_into().expect("a key that was written here"));
            producers.restore(producer, value).expect("a row that was written here");
        }
    }
    for batch in &partition.replayed {
        let ReplayedBatch { producer, producer_epoch, base_sequence, record_count, base_offset, .. } = *batch;
        producers.replay(producer, producer_epoch, base_sequence, record_count, base_offset);
    }
    producers
}

async fn session(run: Rc<Run>) -> End {
    let Some(session) = open(&run).await else { return End::Crash };
    let (world, character) = (&run.world, &run.character);
    let random = &world.random;
    while 0 < run.steps_left.get() {
        run.steps_left.set(run.steps_left.get() - 1);
        match random.below(100) {
            0..45 => session.publish(),
            45..65 => session.read(),
            65..75 => session.acknowledge(),
            75..85 => world.executor.sleep(random.micros(100..5_000)).await,
            85..89 => world.executor.sleep(random.micros(100_000..2_000_000)).await,
            89 => world.executor.sleep(random.micros(5_000_000..15_000_000)).await,
            90 => session.make_partition(),
            91 => session.drop_partition(),
            92 if character.damage && random.one_in(3) => run.damage(true),
            93 if character.full => {
                let full = random.one_in(2);
                let used = world.disk.used_bytes() + random.below(200 << 10);
                world.event(format_args!("full: {full}"));
                world.disk.capacity_bytes.set(if full { used } else { u64::MAX });
            }
            94 => {
                world.disk.faults.clear();
                run.faults_on();
            }
            95 => session.drain().await,
            96 => session.check_spans(),
            97 => session.compact(),
            _ => {}
        }
        // A step may be the last of this process, and more often so when nothing can be written any more.
        if random.one_in(character.crash_every) || session.is_read_only() && random.one_in(5) {
            if random.one_in(3) && session.seal().await {
                return End::Sealed;
            }
            return End::Crash;
        }
        if random.one_in(2) {
            world.executor.sleep(random.micros(0..300)).await;
        }
    }
    End::Over
}

/// On a good disk: everything can be read, written, and closed.
async fn last_session(run: Rc<Run>) -> End {
    run.world.disk.capacity_bytes.set(u64::MAX);
    run.world.disk.faults.clear();
    let Some(session) = open(&run).await else { return End::Crash };
    run.world.disk.faults.clear();
    session.verify().await;
    for _ in 0..10 {
        session.publish();
    }
    session.drain().await;
    session.verify().await;
    assert!(session.seal().await, "a store on a good disk is sealed");
    End::Sealed
}

impl Session {
    fn random(&self) -> &Random {
        &self.run.world.random
    }

    fn pick(&self) -> Option<(PartitionId, Place)> {
        let slots = self.slots.borrow();
        let nth = self.random().below(slots.len().max(1) as u64) as usize;
        slots.iter().nth(nth).map(|(id, place)| (*id, *place))
    }

    fn store(&self, place: Place) -> &Store<SimIo, Token> {
        &self.stores[place.shard]
    }

    fn open_partition(&self, id: PartitionId, limits: PartitionLimits) -> Place {
        let shard = self.run.layout.borrow().shard_of(id);
        Place { shard, slot: self.stores[shard].open_partition(id, limits) }
    }

    fn is_read_only(&self) -> bool {
        self.stores.iter().any(Store::is_read_only)
    }

    fn make_partition(&self) {
        if PARTITIONS_MAX <= self.slots.borrow().len() {
            return;
        }
        let (run, random) = (&self.run, self.random());
        run.partitions_made.set(run.partitions_made.get() + 1);
        let id = PartitionId(run.partitions_made.get());
        let limits = PartitionLimits {
            retention_age: random.one_in(3).then(|| Duration::from_secs(random.in_range(2..20))),
            retention_bytes: random.one_in(2).then(|| random.in_range(8..64) << 10),
            cache_bytes: random.one_in(3).then_some(8 << 10),
            trim_consumed: random.one_in(3),
        };
        run.world.event(format_args!("{id} {limits:?}"));
        let clients = (0..random.in_range(1..3)).map(|_| {
            let producer = if random.one_in(3) { 0 } else { run.producers_made.get() + 1 };
            run.producers_made.set(run.producers_made.get().max(producer));
            Client { producer, next_sequence: 0, unacked: VecDeque::new(), sent: 0, last_acked: None }
        });
        run.clients.borrow_mut().insert(id, clients.collect());
        run.oracle.borrow_mut().partitions.insert(id, Partition::new(limits, random.below(3) as u8));
        let place = self.open_partition(id, limits);
        self.slots.borrow_mut().insert(id, place);
        self.set_floors();
    }

    fn drop_partition(&self) {
        if !self.random().one_in(3) {
            return;
        }
        let Some((id, place)) = self.pick() else { return };
        self.slots.borrow_mut().remove(&id);
        self.readers.borrow_mut().remove(&id);
        self.delete(id, place);
    }

    fn delete(&self, id: PartitionId, place: Place) {
        let (run, store) = (self.run.clone(), self.store(place).clone());
        run.world.event(format_args!("drop {id}"));
        run.oracle.borrow_mut().partitions.get_mut(&id).expect("a known partition").life = Life::Dropping;
        run.world.executor.clone().spawn(async move {
            let dropped = store.delete_partition(place.slot).await;
            run.world.event(format_args!("dropped {id}: {dropped:?}"));
            if dropped.is_ok() {
                run.producers.borrow_mut().remove(&id);
                run.oracle.borrow_mut().partitions.get_mut(&id).expect("a known partition").life = Life::Dropped;
            }
        });
    }

    /// Sends what some client sends next: something again, or something new.
    fn publish(&self) {
        let Some((id, place)) = self.pick() else { return self.make_partition() };
        let (run, random) = (&self.run, self.random());
        let (made, again) = {
            let mut clients = run.clients.borrow_mut();
            let clients = clients.get_mut(&id).expect("a partition has clients");
            let nth = random.below(clients.len() as u64) as usize;
            let client = &mut clients[nth];
            if client.producer != 0 && random.one_in(12) {
                // An answer was lost on its way, or the network brings it twice.
                let sent = client.unacked.iter().take(client.sent).next_back().cloned();
                let Some(made) = sent.or_else(|| client.last_acked.clone()) else { return };
                (made, true)
            } else if client.sent < client.unacked.len() {
                (client.unacked[client.sent].clone(), false)
            } else if client.unacked.len() < UNACKED_MAX {
                let made = run.make_batch(client.producer, client.next_sequence);
                client.next_sequence += made.header.record_count as u64;
                client.unacked.push_back(made.clone());
                (made, false)
            } else {
                return;
            }
        };
        self.send(id, place, &made, again);
    }

    fn send(&self, id: PartitionId, place: Place, made: &Made, again: bool) {
        let (run, store) = (&self.run, self.store(place));
        let mut all = run.producers.borrow_mut();
        let producers = all.entry(id).or_default();
        let damaged = run.oracle.borrow().partitions[&id].damaged;
        let admitted = match producers.admit(&made.header) {
            Ok(Admission::Append { producer }) => producer,
            Ok(Admission::Duplicate { base_offset }) => {
                drop(all);
                return self.duplicate(id, made, base_offset, damaged);
            }
            Err(error) => {
                // After damage the producer's sequences may be lost with its messages: it starts as another.
                assert!(damaged, "{id}: {error}");
                run.world.event(format_args!("{id}: {error}"));
                drop(all);
                return self.start_anew(id, made.header.producer);
            }
        };
        if made.header.producer != 0 {
            let oracle = run.oracle.borrow();
            let partition = &oracle.partitions[&id];
            let there = partition.find(&made.header).map(|entry| entry.base_offset);
            assert!(there.is_none() || damaged, "{id}: a batch at {there:?} is admitted again: {:?}", made.header);
        }
        let header = made.header;
        let base_offset = store.span(place.slot).next_offset;
        let append_time_ms = SimIo(run.world.clone()).wall_clock_ms();
        let token = run.oracle.borrow_mut().append(id, base_offset, append_time_ms, header, made.bytes.clone());
        let entry = NewEntry { bytes: Slice::copy_of(&made.bytes), header, base_offset, append_time_ms };
        let appended = store.append(place.slot, entry, token);
        let (producer, sequence) = (header.producer, header.base_sequence);
        let error = appended.as_ref().err().map(|(error, _)| error);
        run.world.event(format_args!("append {token}: {id} at {base_offset}, {producer}:{sequence}, {error:?}"));
        if let Err((error, token)) = appended {
            run.oracle.borrow_mut().refused(token);
            let full = run.world.disk.capacity_bytes.get() != u64::MAX || 0 < run.world.disk.faults.create.get();
            let excused = match error {
                AppendError::Full => {
                    full || self.run.character.full
                        || self.run.character.create_faults
                        || self.run.character.sync_faults
                        || self.run.character.write_faults
                }
                AppendError::ReadOnly => store.is_read_only(),
                AppendError::TooLarge { .. } | AppendError::RowTooLarge { .. } | AppendError::Deleted => false,
            };
            assert!(excused, "{id}: an append is refused: {error}");
            return;
        }
        if let Some(producer) = admitted {
            producers.appended(producer, &header, base_offset);
            let end = header.base_sequence + header.record_count as u64;
            run.sequenced.borrow_mut().insert(token, (id, producer, end));
        }
        if !again {
            let mut clients = run.clients.borrow_mut();
            let client = clients.get_mut(&id).into_iter().flatten().find(|client| {
                let next = client.unacked.get(client.sent);
                client.producer == header.producer && next.is_some_and(|next| Rc::ptr_eq(&next.bytes, &made.bytes))
            });
            if let Some(client) = client {
                if client.producer == 0 {
                    client.unacked.clear();
                } else {
                    client.sent += 1;
                }
            }
        }
    }

    /// The broker says that it has this batch already.
    fn duplicate(&self, id: PartitionId, made: &Made, base_offset: Option<u64>, damaged: bool) {
        let run = &self.run;
        run.world.event(format_args!("{id}: duplicate of {base_offset:?}"));
        let found = {
            let oracle = run.oracle.borrow();
            let partition = &oracle.partitions[&id];
            let found = partition.find(&made.header).map(|entry| (entry.base_offset, entry.next_offset()));
            if let (Some(said), Some((found, _))) = (base_offset, found) {
                assert!(said == found || damaged, "{id}: a duplicate is said to be at {said}; it is at {found}");
            }
            found.map(|(base_offset, end)| (base_offset, end <= partition.acked_end))
        };
        match found {
            Some((base_offset, true)) => run.answered(id, base_offset),
            // The first is under way: the answer waits for it.
            Some((_, false)) => {}
            None => {
                assert!(damaged, "{id}: a batch is called a duplicate and is not there: {:?}", made.header);
                self.start_anew(id, made.header.producer);
            }
        }
    }

    fn start_anew(&self, id: PartitionId, producer: u64) {
        let run = &self.run;
        run.producers_made.set(run.producers_made.get() + 1);
        for client in run.clients.borrow_mut().get_mut(&id).into_iter().flatten() {
            if client.producer == producer {
                *client = Client {
                    producer: run.producers_made.get(),
                    next_sequence: 0,
                    unacked: VecDeque::new(),
                    sent: 0,
                    last_acked: None,
                };
            }
        }
    }

    fn read(&self) {
        let Some((id, place)) = self.pick() else { return };
        let (random, slot) = (self.random(), place.slot);
        let span = self.store(place).span(slot);
        let on = self.readers.borrow().get(&id).copied().unwrap_or(0);
        let offset = match random.below(4) {
            0 if span.start_offset < span.end_offset => random.in_range(span.start_offset..span.end_offset),
            1 => span.start_offset.saturating_sub(random.below(3)),
            _ => on,
        };
        let bytes_max = *random.pick(&[1, 2000, 100_000]);
        let mut runs = Vec::new();
        if random.one_in(4) {
            if let Cached::Hit { next_offset } = self.store(place).read_cached(slot, offset, bytes_max, &mut runs) {
                self.run.oracle.borrow_mut().read(id, offset, &runs, next_offset);
            }
            return;
        }
        let (store, run, readers) = (self.store(place).clone(), self.run.clone(), self.readers.clone());
        run.world.executor.clone().spawn(async move {
            let read = store.read(slot, offset, bytes_max, &mut runs).await;
            if let Some(next_offset) = run.read_done(id, offset, &runs, read).filter(|_| offset == on) {
                readers.borrow_mut().insert(id, next_offset);
            }
        });
    }

    /// Moves a cursor forward.
    fn acknowledge(&self) {
        let Some((id, place)) = self.pick() else { return };
        let (run, random) = (&self.run, self.random());
        let mut oracle = run.oracle.borrow_mut();
        let partition = &oracle.partitions[&id];
        if partition.cursors.is_empty() {
            return;
        }
        let cursor = random.below(partition.cursors.len() as u64) as u8;
        let from = partition.cursors[&cursor].staged;
        if partition.acked_end <= from {
            return;
        }
        let offset = random.in_range(from..partition.acked_end) + 1;
        let token = oracle.cursor(id, cursor, offset);
        drop(oracle);
        let row = offset.to_le_bytes();
        let appended = self.store(place).append_state(place.slot, &cursor_key(cursor), Some(&row), Some(token));
        run.world.event(format_args!("cursor {token}: {id} {cursor} to {offset}, {appended:?}"));
        if let Err(error) = appended {
            run.oracle.borrow_mut().refused(token);
            let excused = matches!(error, AppendError::Full | AppendError::ReadOnly);
            assert!(excused, "{id}: a cursor is refused: {error}");
        }
        self.set_floors();
    }

    /// Tells the store what cursors hold, as far as it is durable.
    fn set_floors(&self) {
        let mut oracle = self.run.oracle.borrow_mut();
        for (id, place) in &*self.slots.borrow() {
            let partition = oracle.partitions.get_mut(id).expect("a known partition");
            let floor = partition.cursors.values().map(|cursor| cursor.acked).min();
            // After damage a cursor may be where retention has been already.
            partition.floor = if partition.damaged { floor.max(partition.floor) } else { floor };
            self.store(*place).set_floor(place.slot, floor);
        }
    }

    fn compact(&self) {
        let store = self.random().pick(&self.stores).clone();
        let run = self.run.clone();
        run.world.executor.clone().spawn(async move {
            let compacted = store.compact().await;
            run.world.event(format_args!("compacted: {compacted:?}"));
        });
    }

    fn check_spans(&self) {
        for (id, place) in &*self.slots.borrow() {
            self.run.oracle.borrow_mut().check_span(*id, &self.store(*place).span(place.slot));
        }
    }

    /// Waits until everything that is under way was answered.
    async fn drain(&self) {
        let world = &self.run.world;
        let started = world.executor.now();
        while !self.run.oracle.borrow().pending.is_empty() && !self.is_read_only() {
            let full = world.disk.capacity_bytes.get() != u64::MAX || 0 < world.disk.faults.create.get();
            let waited = world.executor.now() - started;
            if PATIENCE < waited && (full || 0 < world.disk.faults.sync.get()) {
                return;
            }
            let pending = self.run.oracle.borrow().pending.len();
            assert!(waited <= PATIENCE, "{pending} entries and rows are not answered after {waited:?}");
            world.executor.sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stops in good order. `false`: that is not possible any more.
    async fn seal(&self) -> bool {
        let world = &self.run.world;
        world.disk.capacity_bytes.set(u64::MAX);
        world.disk.faults.clear();
        self.drain().await;
        for store in &self.stores {
            if let Err(error) = store.seal().await {
                world.event(format_args!("seal: {error}"));
                assert!(store.is_read_only(), "a good store is not sealed: {error}");
                return false;
            }
        }
        self.run.closing.set(true);
        for store in &self.stores {
            store.close().await;
        }
        true
    }

    /// Reads all there is and compares it.
    async fn verify(&self) {
        self.check_spans();
        let slots = self.slots.borrow().clone();
        for (id, place) in slots {
            let span = self.store(place).span(place.slot);
            let mut offset = span.start_offset;
            while offset < span.end_offset {
                let mut runs = Vec::new();
                let read = self.store(place).read(place.slot, offset, 50_000, &mut runs).await;
                let next = self.run.read_done(id, offset, &runs, read);
                offset = next.unwrap_or_else(|| panic!("{id}: a read at {offset} does not lead on"));
            }
        }
    }
}

impl Run {
    /// Returns where to read on.
    fn read_done(
        &self,
        id: PartitionId,
        offset: u64,
        runs: &[drava_storage::Run],
        read: Result<u64, ReadError>,
    ) -> Option<u64> {
        let mut oracle = self.oracle.borrow_mut();
        match read {
            Ok(next_offset) => {
                self.world.event(format_args!("read {id} {offset}..{next_offset}"));
                oracle.read(id, offset, runs, next_offset);
                Some(next_offset)
            }
            Err(error) => {
                self.world.event(format_args!("read {id} {offset}: {error}"));
                let fails = self.character.read_faults || self.character.index_faults || self.closing.get();
                oracle.read_failed(id, offset, &error, fails)
            }
        }
    }
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
