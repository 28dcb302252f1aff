//! What a run has one of: chance, time, a disk, the families of the index, and the trace of all that happened.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use drava_storage::StoreId;
use drava_storage::index::model::ModelKv;

use crate::disk::Disk;
use crate::executor::Executor;
use crate::random::Random;

pub struct World {
    pub random: Random,
    pub executor: Executor,
    pub disk: Disk,
    families: RefCell<BTreeMap<StoreId, ModelKv>>,
    /// The index request that is served now fails.
    pub index_fails: Arc<AtomicBool>,
    pub trace: Trace,
}

/// Every event of the run, hashed; the same seed gives the same hash.
#[derive(Debug)]
pub struct Trace {
    hash: Cell<u64>,
    line: RefCell<String>,
    printed: bool,
}

impl World {
    pub fn new(seed: u64, printed: bool) -> Rc<World> {
        let random = Random::new(seed);
        let disk = Disk::new(&random);
        Rc::new(World {
            executor: Executor::new(),
            disk,
            families: RefCell::default(),
            index_fails: Arc::default(),
            trace: Trace { hash: Cell::new(0xcbf2_9ce4_8422_2325), line: RefCell::default(), printed },
            random,
        })
    }

    /// Opens the database of the index with the families of these stores; all others are dropped.
    pub fn open_families(&self, stores: &[StoreId]) -> Vec<ModelKv> {
        let mut families = self.families.borrow_mut();
        families.retain(|store, _| stores.contains(store));
        stores.iter().map(|store| families.entry(*store).or_default().clone()).collect()
    }

    /// Takes from each family what it may lose.
    pub fn crash_families(&self) {
        for family in self.families.borrow().values() {
            family.crash(|pending| self.random.below(pending as u64 + 1) as usize);
        }
    }

    /// Loses the database.
    pub fn lose_families(&self) {
        self.families.borrow().values().for_each(ModelKv::clear);
    }

    pub fn event(&self, event: std::fmt::Arguments<'_>) {
        self.trace.add(self.executor.now(), event);
    }
}

impl Trace {
    fn add(&self, now: Duration, event: std::fmt::Arguments<'_>) {
        let mut line = self.line.borrow_mut();
        line.clear();
        write!(line, "{:>12} ", now.as_micros()).and_then(|()| line.write_fmt(event)).expect("a string takes all");
        // FNV-1a, eight bytes at a time: it tells runs apart, nobody tries to deceive it.
        let mut hash = self.hash.get();
        for chunk in line.as_bytes().chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            hash = (hash ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3);
            hash ^= hash >> 29;
        }
        self.hash.set(hash);
        if self.printed {
            eprintln!("{line}");
        }
    }

    pub fn hash(&self) -> u64 {
        self.hash.get()
    }
}
