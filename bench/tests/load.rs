//! Whole runs against a node of threads: what goes well, and what a bad node cannot hide.

mod support;

use std::net::SocketAddr;

use drava_bench::load::options::{CompressionOption, Keys};
use drava_bench::load::{Kind, LoadOptions, Outcome, run};
use drava_bench::progress::Progress;
use drava_bench::verify::Findings;
use drava_bench::{compare, report, table};
use support::Fault;

fn options(addr: SocketAddr) -> LoadOptions {
    LoadOptions {
        addr,
        size: 200,
        batch: 10,
        connections: 2,
        in_flight: 4,
        messages: Some(2_000),
        node_pid: Some(std::process::id()),
        ..LoadOptions::default()
    }
}

fn go(kind: Kind, options: &LoadOptions) -> Outcome {
    run(kind, options, &Progress::new("test")).unwrap()
}

#[test]
fn every_message_of_a_budget_is_acknowledged_and_counted() {
    let outcome = go(Kind::Produce, &options(support::start(Fault::None)));
    let published = outcome.published.unwrap();
    assert_eq!((published.messages, published.bytes), (2_000, 400_000));
    assert_eq!(published.latency.count, 2_000);
    assert!(outcome.node.is_some() && outcome.delivered.is_none());
}

#[test]
fn what_was_published_is_consumed_and_verified() {
    let addr = support::start(Fault::None);
    let options = LoadOptions { topics: 3, partitions: 2, keys: Keys::Zipf, ..options(addr) };
    go(Kind::Produce, &options);
    let outcome = go(Kind::Consume, &options);
    assert_eq!(outcome.delivered.as_ref().unwrap().messages, 2_000);
    let found = outcome.verification.unwrap();
    assert_eq!((found.messages, found.faults(), found.foreign), (2_000, 0, 0));
}

#[test]
fn packed_batches_are_verified_too() {
    let addr = support::start(Fault::None);
    for compression in [CompressionOption::Lz4, CompressionOption::Zstd] {
        let outcome = go(Kind::Mixed, &LoadOptions { compression, ..options(addr) });
        assert_eq!(outcome.verification.unwrap(), Findings { messages: 2_000, ..Findings::default() });
    }
}

#[test]
fn a_run_by_time_measures_both_ways() {
    let addr = support::start(Fault::None);
    let timed = LoadOptions { messages: None, duration: 0.6, warm_up: 0.1, rate: Some(5_000.0), ..options(addr) };
    let outcome = go(Kind::Tail, &timed);
    let (published, delivered) = (outcome.published.unwrap(), outcome.delivered.unwrap());
    assert!(0 < published.messages && 0 < delivered.messages);
    assert!(0.0 < published.latency.p50_us && 0.0 < delivered.latency.p50_us);
    assert_eq!(outcome.verification.unwrap().faults(), 0);
    assert!(!outcome.samples.is_empty());
}

#[test]
fn reading_again_and_again_is_verified_each_time() {
    let addr = support::start(Fault::None);
    go(Kind::Produce, &options(addr));
    let again = LoadOptions { messages: None, duration: 0.3, warm_up: 0.0, repeat: true, ..options(addr) };
    let found = go(Kind::Consume, &again).verification.unwrap();
    assert!(2_000 < found.messages, "{found:?}");
    assert_eq!(found.faults(), 0, "{found:?}");
}

fn mixed_with(fault: Fault) -> Findings {
    let one = LoadOptions { connections: 1, messages: Some(200), ..options(support::start(fault)) };
    go(Kind::Mixed, &one).verification.unwrap()
}

#[test]
fn a_node_that_loses_a_batch_is_found_out() {
    let found = mixed_with(Fault::Lose(5));
    assert_eq!((found.lost, found.offset_gaps), (10, 1), "{found:?}");
}

#[test]
fn a_node_that_forgets_an_acknowledged_batch_is_found_out() {
    // The last one: nothing that comes later shows the gap.
    let found = mixed_with(Fault::Forget(19));
    assert_eq!((found.lost, found.messages), (10, 190), "{found:?}");
}

#[test]
fn a_node_that_delivers_twice_is_found_out() {
    let found = mixed_with(Fault::Repeat(5));
    assert_eq!((found.duplicated, found.lost), (10, 0), "{found:?}");
}

#[test]
fn a_node_that_swaps_batches_is_found_out() {
    let found = mixed_with(Fault::Swap(5));
    assert_eq!((found.reordered, found.lost, found.duplicated), (10, 0, 0), "{found:?}");
}

#[test]
fn a_node_that_changes_a_bit_is_found_out() {
    let found = mixed_with(Fault::Flip(5));
    assert_eq!(found.corrupt, 1, "{found:?}");
}

#[test]
fn a_missing_topic_is_told() {
    let addr = support::start(Fault::None);
    let error = run(Kind::Consume, &options(addr), &Progress::new("test")).unwrap_err();
    let text = drava_bench::load::engine::describe(&error);
    assert!(text.contains("UnknownTopic"), "{text}");
}

#[test]
fn a_result_survives_json_and_makes_a_report_a_table_and_a_comparison() {
    let addr = support::start(Fault::None);
    let timed = LoadOptions { messages: None, duration: 1.2, warm_up: 0.0, ..options(addr) };
    let outcome = go(Kind::Mixed, &timed);
    let text = serde_json::to_string(&outcome).unwrap();
    assert_eq!(serde_json::from_str::<Outcome>(&text).unwrap(), outcome);

    let dir = tempfile::tempdir().unwrap();
    let page = std::fs::read_to_string(report::write(&dir.path().join("new"), &outcome).unwrap()).unwrap();
    for part in ["Throughput", "Latency over time", "Latency by percentile", "none lost", "<svg", "p99.99"] {
        assert!(page.contains(part), "{part} is missing");
    }
    assert!(table::outcome(&outcome).contains("published"));
    let mut slower = outcome.clone();
    slower.published.as_mut().unwrap().mib_per_s /= 2.0;
    let comparison = compare::outcomes(&outcome, &slower);
    assert!(comparison.contains("-50.0 %") && comparison.contains("worse"), "{comparison}");
}
