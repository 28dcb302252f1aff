//! kill -9 under load, again and again: nothing acknowledged is lost, nothing is stored twice, no offset is used again.

mod common;

use std::path::Path;

use drava_bench::suite::kill;

/// `DRAVA_KILL_ROUNDS` for the long form, 100 in `scripts/soak`.
const ROUNDS: u64 = 30;

#[test]
fn nothing_acknowledged_is_lost_over_rounds_of_kill_9() {
    let rounds = common::how_many("DRAVA_KILL_ROUNDS", ROUNDS);
    let dir = tempfile::tempdir().unwrap();
    let bin = Path::new(env!("CARGO_BIN_EXE_drava"));
    let outcome = kill::run(bin, &dir.path().join("data"), &dir.path().join("log"), rounds)
        .unwrap_or_else(|error| panic!("{}", common::chain(&error)));
    println!("{}", outcome.show());
    assert_eq!(outcome.findings.faults(), 0, "{:?}", outcome.findings.first_fault);
    assert!(rounds * kill::ACKS_MIN <= outcome.findings.acked, "the load was too small to prove anything");
}
