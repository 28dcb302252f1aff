//! The one source of chance of a run: the same seed gives the same numbers, on every machine and for ever.

use std::cell::Cell;
use std::ops::Range;
use std::time::Duration;

/// SplitMix64. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
#[derive(Debug)]
pub struct Random(Cell<u64>);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(Cell::new(seed))
    }

    pub fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `limit`, which is not 0. The bias is below one in a billion for the limits of a simulation.
    pub fn below(&self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn in_range(&self, range: Range<u64>) -> u64 {
        range.start + self.below(range.end - range.start)
    }

    pub fn one_in(&self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// True in `per_mille` of a thousand cases. 0 asks for no number.
    pub fn chance(&self, per_mille: u64) -> bool {
        per_mille != 0 && self.below(1000) < per_mille
    }

    pub fn pick<'a, T>(&self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }

    pub fn micros(&self, range: Range<u64>) -> Duration {
        Duration::from_micros(self.in_range(range))
    }
}
