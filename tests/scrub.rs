//! A byte on the disk changes: who finds it, who is told, and what is served all the same.

mod common;

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{Node, NodeOptions, wait_until};
use drava_storage::dump::{self, ItemKind};
use serde_json::Value;

const LINES: u64 = 4000;

fn drava(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drava"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn client(node: &Node, arguments: &[&str]) -> Output {
    drava(arguments).env("DRAVA_SERVER", node.listen.to_string()).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{output:?}"))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Writes numbered lines in small batches.
fn produce(node: &Node) {
    let mut child = drava(&["produce", "orders", "--create", "--batch-bytes", "4KiB"])
        .env("DRAVA_SERVER", node.listen.to_string())
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for line in 0..LINES {
        writeln!(stdin, "line {line} {}", "x".repeat(80)).unwrap();
    }
    drop(stdin);
    assert!(child.wait().unwrap().success());
}

/// Flips a bit in the payload of a batch in the middle of the journal; returns the segment.
fn damage_one_batch(data_dir: &Path) -> PathBuf {
    let segment = data_dir.join("shard-000/00000000.segment");
    let batches: Vec<u64> = dump::segment(&segment)
        .unwrap()
        .map(|item| item.unwrap())
        .filter(|item| matches!(item.kind, ItemKind::Batch { .. }))
        .map(|item| item.position)
        .collect();
    assert!(20 < batches.len(), "{} batches", batches.len());
    let position = batches[batches.len() / 2] + 100;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&segment).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, position).unwrap();
    file.write_all_at(&[byte[0] ^ 4], position).unwrap();
    segment
}

/// The offsets of the lines that came out.
fn offsets(output: &Output) -> BTreeSet<u64> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["offset"].as_u64().unwrap()).collect()
}

#[test]
fn damage_is_found_offline_named_to_readers_and_listed() {
    let folder = tempfile::tempdir().unwrap();
    let data_dir = folder.path().join("data");
    let dir = data_dir.to_str().unwrap();
    let options = NodeOptions { shards: 1, ..NodeOptions::new(&data_dir) };
    let unscrubbed = options.clone().with("DRAVA_STORAGE_SCRUB_BYTES_PER_S", 0);
    let node = Node::start(&unscrubbed);
    produce(&node);
    let refused = drava(&["scrub", "--data-dir", dir]).output().unwrap();
    assert_eq!(code(&refused), 7);
    assert!(stderr(&refused).contains(&format!("pid {}", node.pid())), "{}", stderr(&refused));
    assert_eq!(code(&drava(&["log", "verify", dir]).output().unwrap()), 7);
    assert!(node.stop().success());

    let clean = drava(&["scrub", "--data-dir", dir]).output().unwrap();
    assert_eq!(code(&clean), 0, "{}", stderr(&clean));
    assert!(clean.stdout.is_empty() && stderr(&clean).contains("of 2 stores were checked"), "{}", stderr(&clean));

    let segment = damage_one_batch(&data_dir);
    let found = drava(&["scrub", "--data-dir", dir, "--output", "json"]).output().unwrap();
    assert_eq!(code(&found), 9, "{}", stderr(&found));
    let report: Value = serde_json::from_slice(&found.stdout).unwrap();
    let damage = &report[0]["damage"];
    assert_eq!((damage.as_array().unwrap().len(), &damage[0]["kind"]), (1, &Value::from("batches")), "{report}");
    let range = &damage[0]["messages"][0];
    let lost = range["first_offset"].as_u64().unwrap()..range["next_offset"].as_u64().unwrap();
    assert!(!lost.is_empty() && lost.end < LINES, "{lost:?}");
    for path in [dir, segment.parent().unwrap().to_str().unwrap(), segment.to_str().unwrap()] {
        let found = drava(&["log", "verify", path]).output().unwrap();
        assert_eq!(code(&found), 9, "{path}: {}", stderr(&found));
        let text = String::from_utf8(found.stdout).unwrap();
        assert!(text.contains(&format!("{} to {}", lost.start, lost.end - 1)), "{path}: {text}");
    }
    assert_eq!(code(&drava(&["log", "verify", data_dir.join("meta/log").to_str().unwrap()]).output().unwrap()), 0);

    let node = Node::start(&unscrubbed);
    assert_eq!(code(&drava(&["log", "verify", dir, "--while-in-use"]).output().unwrap()), 9);
    assert_eq!(node.http("GET", "/v1/damage", None).json()["total"], 0, "nobody has looked yet");
    let expected: BTreeSet<u64> = (0..LINES).filter(|offset| !lost.contains(offset)).collect();
    let named =
        format!("the messages {} to {} of partition 0 of /public/default/orders are damaged", lost.start, lost.end - 1);
    let read = client(&node, &["consume", "orders", "--format", "json"]);
    assert_eq!(code(&read), 9);
    assert!(stderr(&read).contains(&named), "{}", stderr(&read));
    assert_eq!(offsets(&read), expected, "all that can be read is");
    let with_cursor = ["consume", "orders", "--format", "json", "--subscription", "billing"];
    let read = client(&node, &with_cursor);
    assert_eq!(code(&read), 9);
    assert!(stderr(&read).contains(&named), "{}", stderr(&read));
    assert_eq!(offsets(&read), expected);
    let again = client(&node, &with_cursor);
    assert_eq!((code(&again), again.stdout.len()), (0, 0), "the cursor is past the hole: {}", stderr(&again));

    let listed = node.http("GET", "/v1/damage", None).json();
    assert_eq!(listed["total"], 1, "{listed}");
    let entry = &listed["damage"][0];
    assert_eq!(entry["messages"]["topic"], "/public/default/orders");
    assert_eq!(
        (&entry["messages"]["first_offset"], &entry["found_by"]),
        (&lost.start.into(), &"read".into()),
        "{entry}"
    );
    let lost_messages = lost.end - lost.start;
    assert_eq!(node.metric("drava_store_damaged_ranges"), 1.0);
    assert_eq!(node.metric("drava_store_damaged_messages"), lost_messages as f64);
    assert_eq!(node.http("GET", "/readyz", None).status, 200, "the rest is served");
    assert_eq!(node.http("GET", "/healthz", None).status, 200);
    produce(&node);
    assert!(node.stop().success());

    let node = Node::start(&options);
    wait_until("a pass of the scrubber", || 1.0 <= node.metric("drava_store_scrub_passes_total"));
    assert_eq!(node.http("GET", "/v1/damage", None).json(), listed, "it is remembered, and listed once");
    assert_eq!(node.http("DELETE", "/v1/topics/orders", None).status, 204);
    wait_until("the damage to go with its topic", || node.metric("drava_store_damaged_ranges") == 0.0);
    assert!(node.stop().success());
}
