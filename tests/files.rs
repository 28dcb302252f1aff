//! Real files through the command line: `drava produce` and `drava consume` give back what they were given.

mod common;

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{Node, NodeOptions, Random};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Exit codes, as `drava --help` lists them.
const USAGE: i32 = 2;
const CANNOT_CONNECT: i32 = 3;
const NOT_FOUND: i32 = 4;
const CONFLICT: i32 = 5;

/// A file is a real one from here on.
const FILE_BYTES_MIN: u64 = 52_000_000;
/// One line that is almost as large as a frame may be.
const LONG_LINE_BYTES: usize = 4_000_000;

fn drava(node: &Node, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drava"));
    command.args(args).env("DRAVA_SERVER", node.listen.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(node: &Node, args: &[&str]) -> Output {
    drava(node, args).output().unwrap()
}

fn succeed(node: &Node, args: &[&str]) -> Vec<u8> {
    let output = run(node, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn succeed_json(node: &Node, args: &[&str]) -> Value {
    serde_json::from_slice(&succeed(node, args)).unwrap()
}

fn fail(node: &Node, args: &[&str], code: i32) -> String {
    let output = run(node, args);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    assert!(!text.is_empty() && !text.contains("panicked"), "{args:?}: {text}");
    text
}

/// What is known of a file.
struct Written {
    lines: u64,
    sha256: [u8; 32],
}

/// Writes lines of all kinds, the same for the same seed: empty ones, text, UTF-8, any bytes, lines of many lengths, and
/// a very long one. Each ends with a newline, the last one only if `ends_with_newline`.
fn write_lines(path: &Path, seed: u64, ends_with_newline: bool) -> Written {
    let mut random = Random(seed);
    let mut out = BufWriter::new(File::create(path).unwrap());
    let (mut bytes, mut lines, mut digest) = (0, 0, Sha256::new());
    let mut line = Vec::new();
    while bytes < FILE_BYTES_MIN {
        line.clear();
        match random.below(20) {
            0 => {}
            1 => line.extend_from_slice("žluťoučký kůň 🐴 \u{feff}\t".as_bytes()),
            2 => line.extend((0..random.below(700)).map(|i| (i * 37 + lines as usize) as u8).filter(|b| *b != b'\n')),
            3 => line.extend_from_slice(b"\r"),
            4 => line.extend(std::iter::repeat_n(b'z', random.below(20_000))),
            _ => {
                let words = random.below(40);
                line.extend_from_slice(format!("line {lines}: {}", "some words ".repeat(words)).as_bytes());
            }
        }
        if lines == 50_000 {
            line = std::iter::repeat_n(b"0123456789abcdef", LONG_LINE_BYTES / 16).flatten().copied().collect();
        }
        if ends_with_newline || bytes + (line.len() as u64) < FILE_BYTES_MIN {
            line.push(b'\n');
        } else {
            line.extend_from_slice(b"the end, and no newline");
        }
        out.write_all(&line).unwrap();
        digest.update(&line);
        bytes += line.len() as u64;
        lines += 1;
    }
    out.flush().unwrap();
    assert!(50_000 < lines, "the long line is among {lines}");
    Written { lines, sha256: digest.finalize().into() }
}

/// Lines and digest of what a command writes.
fn digest_of(mut command: Command) -> Written {
    let mut child = command.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (mut lines, mut digest) = (0, Sha256::new());
    let mut buffer = vec![0; 1 << 20];
    loop {
        let bytes = stdout.read(&mut buffer).unwrap();
        if bytes == 0 {
            break;
        }
        lines += buffer[..bytes].iter().filter(|byte| **byte == b'\n').count() as u64;
        digest.update(&buffer[..bytes]);
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Written { lines, sha256: digest.finalize().into() }
}

#[test]
fn a_real_file_comes_back_with_the_same_digest_every_line_once_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(&dir.path().join("data")));
    let path = dir.path().join("lines");
    let written = write_lines(&path, 1, true);
    let file = path.to_str().unwrap();
    let summary = succeed_json(&node, &["produce", "lines", "--create", "--file", file, "--output", "json"]);
    assert_eq!(summary["messages"], written.lines);

    let count = written.lines.to_string();
    let consumed = digest_of(drava(&node, &["consume", "lines", "--from", "earliest", "--count", &count]));
    assert_eq!((consumed.lines, consumed.sha256), (written.lines, written.sha256));
    // There is nothing more: to the end it is the same.
    let consumed = digest_of(drava(&node, &["consume", "lines"]));
    assert_eq!((consumed.lines, consumed.sha256), (written.lines, written.sha256));
    let described = succeed_json(&node, &["topic", "describe", "lines", "--output", "json"]);
    assert_eq!(described["partitions"][0]["end_offset"], written.lines);

    // And again from the disk, after the node was killed.
    node.kill();
    let node = Node::start(&NodeOptions::new(&dir.path().join("data")));
    let consumed = digest_of(drava(&node, &["consume", "lines"]));
    assert_eq!((consumed.lines, consumed.sha256), (written.lines, written.sha256));
}

#[test]
fn a_real_file_from_standard_input_comes_back_through_a_subscription() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(&dir.path().join("data")));
    let path = dir.path().join("lines");
    let written = write_lines(&path, 2, false);
    let mut produce = drava(&node, &["produce", "piped", "--create", "--compression", "lz4"]);
    let output = produce.stdin(File::open(&path).unwrap()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // The file has no newline at its end; `consume` writes one after every message.
    let mut digest = Sha256::new();
    std::io::copy(&mut File::open(&path).unwrap(), &mut digest).unwrap();
    assert_eq!(<[u8; 32]>::from(digest.clone().finalize()), written.sha256);
    digest.update(b"\n");
    let consumed = digest_of(drava(&node, &["consume", "piped", "--subscription", "s"]));
    assert_eq!((consumed.lines, consumed.sha256), (written.lines, digest.finalize().into()));
    // All of it was acknowledged.
    assert_eq!(digest_of(drava(&node, &["consume", "piped", "--subscription", "s"])).lines, 0);
    let described = succeed_json(&node, &["topic", "describe", "piped", "--output", "json"]);
    let cursor = json!([{"name": "s", "offset": written.lines, "connected": false}]);
    assert_eq!(described["partitions"][0]["subscriptions"], cursor);
}

/// Gives `input` to a command as its standard input.
fn feed(mut command: Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn the_same_lines_come_back_with_and_without_a_newline_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let cases: [(&str, &[u8], &[u8]); 6] = [
        ("nothing", b"", b""),
        ("one-empty", b"\n", b"\n"),
        ("closed", b"a\nb\n", b"a\nb\n"),
        ("open", b"a\nb", b"a\nb\n"),
        ("empties", b"\n\na\n\n", b"\n\na\n\n"),
        ("bytes", b"\xff\xfe\0\r\n\x80\n", b"\xff\xfe\0\r\n\x80\n"),
    ];
    for (topic, input, expected) in cases {
        let output = feed(drava(&node, &["produce", topic, "--create", "--quiet"]), input);
        assert!(output.status.success(), "{topic}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(succeed(&node, &["consume", topic]), expected, "{topic}");
    }
    // Delimiters and keys of one's own.
    let args = ["produce", "keyed", "--create", "--delimiter", ";;", "--key-separator", "="];
    assert!(feed(drava(&node, &args), b"k=v;;no key;;k=a=b").status.success());
    assert_eq!(succeed(&node, &["consume", "keyed", "--key-separator", ":"]), b"k:v\nno key\nk:a=b\n");
    assert_eq!(succeed(&node, &["consume", "keyed", "--from", "offset:1", "--count", "1"]), b"no key\n");
    assert_eq!(succeed(&node, &["consume", "keyed", "--from", "latest"]), b"");
}

#[test]
fn messages_as_json_carry_all_that_a_message_has() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let args = ["produce", "events", "--create", "--key-separator", ":"];
    assert!(feed(drava(&node, &args), b"k:text\n\xff\xfe\n\"quoted\"").status.success());
    let text = String::from_utf8(succeed(&node, &["consume", "events", "--format", "json"])).unwrap();
    let messages: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(messages.len(), 3);
    assert_eq!((&messages[0]["key"], &messages[0]["payload"]), (&json!("k"), &json!("text")));
    assert_eq!(messages[1]["payload_base64"], "//4=");
    assert_eq!((&messages[2]["key"], &messages[2]["payload"]), (&Value::Null, &json!("\"quoted\"")));
    for (offset, message) in messages.iter().enumerate() {
        assert_eq!((&message["partition"], &message["offset"]), (&json!(0), &json!(offset)));
        assert!(0 < message["append_time_ms"].as_u64().unwrap());
    }
}

#[test]
fn what_cannot_be_done_ends_with_its_documented_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(&dir.path().join("data")));
    let help = String::from_utf8(succeed(&node, &["--help"])).unwrap();
    for code in [USAGE, CANNOT_CONNECT, NOT_FOUND, CONFLICT] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{code}  "))), "{help}");
    }
    let file = dir.path().join("lines");
    std::fs::write(&file, "a\nb\n").unwrap();
    let file = file.to_str().unwrap();
    assert!(fail(&node, &["produce", "unknown", "--file", file], NOT_FOUND).contains("unknown"));
    fail(&node, &["consume", "unknown"], NOT_FOUND);
    fail(&node, &["topic", "describe", "unknown"], NOT_FOUND);
    fail(&node, &["topic", "delete", "unknown"], NOT_FOUND);
    succeed(&node, &["topic", "create", "known"]);
    fail(&node, &["topic", "create", "known"], CONFLICT);
    succeed(&node, &["topic", "create", "known", "--exists-ok"]);
    fail(&node, &["topic", "create", "not a name"], USAGE);
    fail(&node, &["produce", "known", "--batch-bytes", "much"], USAGE);
    fail(&node, &["no-such-command"], USAGE);
    assert!(fail(&node, &["produce", "known", "--file", "/no/such/file"], 1).contains("/no/such/file"));
    // A line that no batch holds is named; the lines before it are stored.
    let long = dir.path().join("long");
    std::fs::write(&long, [b"first\n", &vec![b'x'; 5 << 20][..], b"\nlast\n"].concat()).unwrap();
    assert!(fail(&node, &["produce", "known", "--file", long.to_str().unwrap()], 1).contains("message 2"));
    assert_eq!(succeed(&node, &["consume", "known"]), b"first\n");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    fail(&node, &["topic", "list", "--server", &nobody], CANNOT_CONNECT);
}

#[test]
fn topics_are_managed_from_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    assert_eq!(succeed_json(&node, &["topic", "list", "--output", "json"]), json!([]));
    let args = ["topic", "create", "orders", "--partitions", "2", "--durability", "memory", "--retention", "7d"];
    let created = succeed_json(&node, &[&args[..], &["--trim-consumed", "--output", "json"]].concat());
    assert_eq!(created["name"], "/public/default/orders");
    assert_eq!(created["policy"]["retention_ms"], 7 * 86_400_000u64);
    assert_eq!(created["policy"]["trim_consumed"], true);
    succeed(&node, &["topic", "create", "/acme/shop/orders"]);
    let names = json!(["/acme/shop/orders", "/public/default/orders"]);
    assert_eq!(succeed_json(&node, &["topic", "list", "--output", "json"]), names);
    assert_eq!(succeed_json(&node, &["topic", "list", "/acme/", "--output", "json"]), json!(["/acme/shop/orders"]));
    assert!(feed(drava(&node, &["produce", "orders"]), b"a\nb\nc\n").status.success());
    let described = succeed_json(&node, &["topic", "describe", "orders", "--output", "json"]);
    assert_eq!(described["policy"], created["policy"]);
    let other = succeed_json(&node, &["topic", "describe", "/acme/shop/orders", "--output", "json"]);
    assert_eq!(other["policy"]["trim_consumed"], false);
    let partitions = described["partitions"].as_array().unwrap();
    assert_eq!(partitions.iter().map(|partition| partition["end_offset"].as_u64().unwrap()).sum::<u64>(), 3);
    for (partition, port) in partitions.iter().zip(&node.shards) {
        assert_eq!((&partition["node"], partition["port"].as_u64()), (&json!(1), Some(u64::from(*port))));
    }
    // For people: the same, readable.
    let table = String::from_utf8(succeed(&node, &["topic", "describe", "orders"])).unwrap();
    assert!(table.contains("/public/default/orders") && table.contains("durability memory"), "{table}");
    assert!(table.contains("consumed messages deleted"), "{table}");
    let deleted = succeed_json(&node, &["topic", "delete", "orders", "--output", "json"]);
    assert_eq!(deleted, json!({"deleted": "orders"}));
    assert_eq!(succeed_json(&node, &["topic", "list", "--output", "json"]), json!(["/acme/shop/orders"]));
}
