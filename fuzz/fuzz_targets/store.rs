//! A disk that holds anything: a store is opened on it and read, a record log is opened on it, its segments are listed.
//!
//! The claims and how bytes become segments and rows of the index are in `storage/tests/common/untrusted.rs`, which the
//! property tests of `storage/` share.
#![no_main]

#[path = "../../storage/tests/common/untrusted.rs"]
mod untrusted;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((which, recipe)) = data.split_first() else { return };
    match which % 8 {
        0 => untrusted::open_records(recipe),
        1 => untrusted::dump(recipe),
        _ => drop(untrusted::open_and_read(recipe)),
    }
});
