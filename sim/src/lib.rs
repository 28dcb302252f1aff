//! A deterministic simulation of the storage: one seed decides about everything that happens, so that a failure is seen
//! again as often as one likes.
//!
//! 1. [`executor`] runs the store and its background work on one thread, in an order that the seed chooses, with a clock
//!    that jumps to the next timer.
//! 2. [`disk`] is a disk in memory that loses what a disk may lose; [`io`] is the storage's seam to it.
//! 3. [`workload`] does what the shards of a node do, with crashes, faults and damage in between ([`damage`]), and now and
//!    then a start with another number of shards ([`layout`]).
//! 4. [`oracle`] says what must hold, and panics when it does not.
//!
//! The index is `drava_storage`'s own model of a database; that model and RocksDB pass one contract test.

pub mod damage;
pub mod disk;
pub mod executor;
pub mod io;
pub mod layout;
pub mod oracle;
pub mod random;
pub mod workload;
pub mod world;

// The broker's own file: depending on the whole node would make each build of a mutant take minutes.
#[path = "../../src/broker/producers.rs"]
pub mod producers;

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Steps of a run unless somebody says otherwise.
pub const STEPS: u64 = 400;

/// What came of one seed.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub seed: u64,
    /// Of the trace: the same for the same seed and steps.
    pub hash: u64,
    pub crashes: u64,
    pub acked: u64,
    /// Messages that were compared with what was appended.
    pub checked: u64,
    /// What did not hold.
    pub failure: Option<String>,
}

/// Runs one seed. A failed assertion, the oracle's or the storage's own, is a failure of the seed.
pub fn run(seed: u64, steps: u64, printed: bool) -> Outcome {
    let run = workload::Run::new(seed, steps, printed);
    let ended = catch_unwind(AssertUnwindSafe(|| run.run()));
    let failure = ended.err().map(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string())).unwrap_or_else(|| "a panic".into())
    });
    let (acked, checked) = run.oracle.try_borrow().map_or((0, 0), |oracle| (oracle.acked, oracle.checked));
    let outcome = Outcome { seed, hash: run.world.trace.hash(), crashes: run.crashes.get(), acked, checked, failure };
    // The tasks hold the run; after a panic, dropping them may panic again.
    drop(catch_unwind(AssertUnwindSafe(|| run.world.executor.kill_all())));
    outcome
}
