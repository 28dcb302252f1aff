//! The command line against a real node: what users type, and what their scripts rely on.

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{Node, NodeOptions};

/// A command of ours that talks to `node`.
fn drava(node: &Node, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drava"));
    command.args(arguments.split(' ')).env("DRAVA_SERVER", node.listen.to_string());
    command
}

fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

/// Standard output of a command that must succeed.
fn stdout(command: &mut Command) -> String {
    let output = output(command);
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Exit code and standard error of a command.
fn failure(command: &mut Command) -> (i32, String) {
    let output = output(command);
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn produce_text(node: &Node, arguments: &str, text: &str) {
    let mut child = drava(node, arguments).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

/// Lines of lengths from 0 to over a block, in all more than `bytes`. The same each time.
fn write_lines(path: &Path, bytes: usize) {
    let mut file = std::io::BufWriter::new(File::create(path).unwrap());
    let mut written = 0;
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    for number in 0.. {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let length = match number % 50_000 {
            10_000 => 1_500_000,
            _ if number % 17 == 0 => 0,
            _ => (random >> 33) as usize % 300,
        };
        let letter = [b'a' + (number % 26) as u8];
        let mut line = if length == 0 { Vec::new() } else { format!("{number} {random:x} ").into_bytes() };
        line.extend(letter.iter().cycle().take(length));
        line.push(b'\n');
        file.write_all(&line).unwrap();
        written += line.len();
        if bytes < written {
            break;
        }
    }
    file.flush().unwrap();
}

fn assert_same_bytes(expected: &Path, found: &Path) {
    let mut files = [expected, found].map(|path| BufReader::with_capacity(1 << 20, File::open(path).unwrap()));
    let mut position = 0u64;
    loop {
        let [a, b] = &mut files;
        let (a_bytes, b_bytes) = (a.fill_buf().unwrap(), b.fill_buf().unwrap());
        let size = a_bytes.len().min(b_bytes.len());
        assert!(a_bytes[..size] == b_bytes[..size], "the files differ in the MiB after byte {position}");
        assert!(0 < size || a_bytes.len() == b_bytes.len(), "one file ends at byte {position}, the other goes on");
        if size == 0 {
            return;
        }
        a.consume(size);
        b.consume(size);
        position += size as u64;
    }
}

#[test]
fn a_real_file_comes_back_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(&folder.path().join("data")));
    let (lines, back) = (folder.path().join("lines"), folder.path().join("back"));
    write_lines(&lines, 56 << 20);
    for compression in ["none", "lz4"] {
        let arguments = format!("produce file-{compression} --create --compression {compression} --file");
        let summary = output(drava(&node, &arguments).arg(&lines));
        let text = String::from_utf8_lossy(&summary.stderr).into_owned();
        assert!(summary.status.success() && text.contains("all acknowledged"), "{text}");
        let status = drava(&node, &format!("consume file-{compression}")).stdout(File::create(&back).unwrap()).status();
        assert!(status.unwrap().success());
        assert_same_bytes(&lines, &back);
    }
}

#[test]
fn exit_codes_say_what_went_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(&folder.path().join("data"));
    let node = Node::start(&options);
    assert_eq!(
        stdout(&mut drava(&node, "topic create orders --partitions 2 --output json")).matches("\"port\"").count(),
        2
    );
    let cases = [
        ("topic create orders", 5, "exists already"),
        ("topic describe nothing", 4, "no topic"),
        ("topic delete nothing", 4, "no topic"),
        ("produce nothing", 4, "no topic"),
        ("consume nothing", 4, "no topic"),
        ("consume orders --partition 2", 4, "no partition 2"),
        ("consume orders --from offset:1", 10, "offset 1 is beyond the end of orders: the next message gets offset 0"),
        ("consume orders --partition 2 --from offset:1", 4, "no partition 2"),
        ("consume orders --from time:yesterday", 2, "time:-10m"),
        ("topic create white\tspace", 2, "characters"),
        ("produce orders --file /no/such/file", 1, "/no/such/file"),
        ("topic list --server 127.0.0.1:1", 3, "127.0.0.1:1"),
        ("topic list --server nowhere", 2, "host:port"),
        ("node --shards 65 --log-level loud", 2, "--log-level"),
        ("log dump /no/such/segment", 1, "/no/such/segment"),
    ];
    for (arguments, code, text) in cases {
        let (found, error) = failure(&mut drava(&node, arguments));
        assert_eq!(found, code, "{arguments}: {error}");
        assert!(error.contains(text), "{arguments}: {error}");
    }
    let (code, error) = failure(options.command().stderr(Stdio::piped()));
    assert_eq!(code, 7, "{error}");
    assert!(error.contains(&format!("pid {}", node.pid())), "{error}");
    assert!(node.stop().success());
}

#[test]
fn a_subscription_goes_on_where_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(&folder.path().join("data")));
    produce_text(&node, "produce numbers --create --quiet", "1\n2\n3\n4\n5");
    let consume = |arguments: &str| stdout(&mut drava(&node, &format!("consume numbers {arguments}")));
    assert_eq!(consume("--subscription s --count 2"), "1\n2\n");
    assert_eq!(consume("--subscription s --count 1"), "3\n");
    assert_eq!(consume("--subscription s"), "4\n5\n");
    assert_eq!(consume("--subscription s"), "");
    assert_eq!(consume("--subscription other --from offset:4"), "5\n");
    assert_eq!(consume("--count 1 --from offset:3"), "4\n");
    assert_eq!(consume("--from offset:5"), "", "at the end, and not beyond it");
    assert_eq!(consume("--from time:-1h"), "1\n2\n3\n4\n5\n");
    assert_eq!(consume("--from time:2200-01-01T00:00:00Z"), "");
    assert_eq!(consume("--from latest"), "");
}

#[test]
fn keys_delimiters_and_json_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(&folder.path().join("data")));
    produce_text(&node, "produce chat --create --key-separator : --delimiter ;", "a:hello;plain;b:x:y;");
    let raw = stdout(&mut drava(&node, "consume chat --key-separator = --delimiter |"));
    assert_eq!(raw, "a=hello|plain|b=x:y|");
    let json = stdout(&mut drava(&node, "consume chat --format json"));
    let messages: Vec<serde_json::Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(messages.len(), 3);
    assert_eq!((&messages[0]["key"], &messages[0]["payload"]), (&"a".into(), &"hello".into()));
    assert_eq!((messages[1].get("key"), &messages[1]["offset"]), (None, &1.into()));
}

#[test]
fn following_shows_what_comes_and_a_reader_that_leaves_is_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(&folder.path().join("data")));
    produce_text(&node, "produce tail --create --quiet", "first");
    let mut follow = drava(&node, "consume tail --follow").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    produce_text(&node, "produce tail --quiet", "second");
    lines.read_line(&mut line).unwrap();
    assert_eq!(line, "first\nsecond\n");
    // As `| head` does.
    drop(lines);
    produce_text(&node, "produce tail --quiet", "third");
    assert!(follow.wait().unwrap().success());
}

#[test]
fn the_doctor_and_the_dump_look_without_touching() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let doctor = |data: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drava"));
        command.args(["doctor", "--output", "json", "--listen", "127.0.0.1:0", "--storage-disk-reserve-bytes", "0"]);
        let findings = stdout(command.args(["--admin-listen", "127.0.0.1:0", "--data-dir"]).arg(data));
        serde_json::from_str::<Vec<serde_json::Value>>(&findings).unwrap()
    };
    assert!(doctor(&data).iter().all(|finding| finding["outcome"] != "failed"));
    assert!(!data.exists());
    let node = Node::start(&NodeOptions::new(&data));
    assert!(doctor(&data).iter().any(|finding| finding["found"].as_str().unwrap().contains(&node.pid().to_string())));
    produce_text(&node, "produce orders --create --quiet", "one\ntwo");
    let mut found = String::new();
    for shard in ["shard-000", "shard-001"] {
        for entry in std::fs::read_dir(data.join(shard)).unwrap() {
            found.push_str(&stdout(drava(&node, "log dump").arg(entry.unwrap().path())));
        }
    }
    assert!(found.contains("of 2 records"), "{found}");
}

#[test]
fn the_printed_configuration_is_one_that_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("drava.toml");
    let print = |extra: &[&str]| {
        stdout(
            Command::new(env!("CARGO_BIN_EXE_drava"))
                .args(["node", "--print-config"])
                .args(extra)
                .env("DRAVA_NODE_ID", "7"),
        )
    };
    let first = print(&["--storage-cache-bytes", "16MiB"]);
    assert!(first.contains("cache_bytes = 16777216") && first.contains("node_id = 7"), "{first}");
    std::fs::write(&file, &first).unwrap();
    assert_eq!(print(&["--config", file.to_str().unwrap()]), first);
    std::fs::write(&file, "[storage]\nsegmnt_bytes = 1\n").unwrap();
    let (code, error) = failure(Command::new(env!("CARGO_BIN_EXE_drava")).args(["node", "--config"]).arg(&file));
    assert_eq!(code, 2);
    assert!(error.contains("did you mean storage.segment_bytes?"), "{error}");
}

#[test]
fn completions_are_made_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = stdout(Command::new(env!("CARGO_BIN_EXE_drava")).args(["completions", shell]));
        assert!(script.contains("print-config"), "{shell}");
    }
    // A reader that has seen enough.
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_drava")).args(["completions", "bash"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 1];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert!(child.wait().unwrap().success());
}
