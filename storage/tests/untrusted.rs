//! Opening a store on a disk that holds anything: no panic, no endless work, nothing made up. `fuzz/` claims the same and
//! looks longer; `PROPTEST_CASES=100000` makes these look longer, too.

#[path = "common/untrusted.rs"]
mod untrusted;

use proptest::collection::vec;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn a_store_opens_on_anything_or_says_why_not(recipe in vec(any::<u8>(), 0..1500)) {
        let _depth = untrusted::open_and_read(&recipe);
    }

    #[test]
    fn a_record_log_opens_on_anything_or_says_why_not(recipe in vec(any::<u8>(), 0..1500)) {
        untrusted::open_records(&recipe);
    }

    #[test]
    fn any_segment_can_be_dumped(recipe in vec(any::<u8>(), 0..1500)) {
        untrusted::dump(&recipe);
    }
}

#[test]
fn an_index_that_covers_up_to_nowhere_is_an_error() {
    let block_0 = [250, 33, 88, 88, 170, 170, 170, 170, 254, 255];
    let position_max = [10, 193, 0, 0, 4, 216, 249, 205, 255, 254];
    for recipe in [block_0, position_max] {
        assert_eq!(untrusted::open_and_read(&recipe).blocks, 0);
    }
}

/// Or the tests above would say nothing.
#[test]
fn recipes_lead_to_blocks_that_are_replayed_and_batches_that_are_read() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    let depths: Vec<_> =
        (0..500).map(|_| untrusted::open_and_read(&(0..1500).map(|_| random()).collect::<Vec<u8>>())).collect();
    let replayed = depths.iter().filter(|depth| 2 <= depth.blocks).count();
    let read = depths.iter().filter(|depth| 1 <= depth.runs).count();
    assert!(50 < replayed && 50 < read, "of 500 recipes {replayed} led to blocks and {read} to batches");
}
