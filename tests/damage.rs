//! Random damage to the files of a stopped node: it starts or refuses with a reason, and never gives wrong bytes.
//!
//! A small data directory is made once, with topics, segments that were used again, index tables and metadata. Each case
//! copies it, damages files at random from a seed of its own, and starts a node on the copy:
//!
//! - the node refuses to start, in bounded time, with an exit code that is no panic's and a text;
//! - or it serves: then every message that it gives is the one that was published at that offset, none is skipped in
//!   silence, and what is missing is answered with a typed error, or the node's log says that something is damaged.

mod common;

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Mutex;

use common::{Node, NodeOptions, Random, Wire, batch_of, how_many, records_of};
use drava_protocol::ErrorCode;
use drava_protocol::batch::Seal;
use drava_protocol::message::{self, Ack, DeleteTopic, Fetch, Kind, Lookup, Place, Publish, Subscribe, TopicPolicy};

/// `DRAVA_DAMAGE_CASES` for the long form, 500 in `scripts/soak`; `DRAVA_DAMAGE_SEED` begins elsewhere. Directories of
/// cases that fail are kept in `DRAVA_DAMAGE_KEEP`, as the node left them.
const CASES: u64 = 40;
const SEED: u64 = 1;
/// Exit code of a node that a bug stopped.
const PANIC: i32 = 70;
const TOPICS: [&str; 2] = ["orders", "events"];
const PARTITIONS: u32 = 2;
const SECTOR: u64 = 512;
const BLOCK: u64 = 4096;

/// What was published: payloads by topic, partition and offset.
type Published = BTreeMap<(&'static str, usize), Vec<Vec<u8>>>;

/// How a case ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    /// The node refused to start, and said why.
    Refused,
    /// All messages were there.
    Whole,
    /// Some were answered with a typed error, or the log tells of damage.
    Told,
}

#[test]
fn a_damaged_data_directory_is_refused_or_served_without_one_wrong_byte() {
    let cases = how_many("DRAVA_DAMAGE_CASES", CASES);
    let first = how_many("DRAVA_DAMAGE_SEED", SEED);
    let dir = tempfile::tempdir().unwrap();
    let (stopped, killed) = (dir.path().join("stopped"), dir.path().join("killed"));
    let published = prepare(&stopped, &killed);
    let seeds = Mutex::new((first..first + cases).collect::<VecDeque<u64>>());
    let ends = Mutex::new(BTreeMap::<End, u64>::new());
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for worker in 0..2 {
            let copy = dir.path().join(format!("copy-{worker}"));
            let (seeds, ends, failures, published) = (&seeds, &ends, &failures, &published);
            let (stopped, killed) = (&stopped, &killed);
            scope.spawn(move || {
                loop {
                    let Some(seed) = seeds.lock().unwrap().pop_front() else { return };
                    let mut random = Random(seed);
                    let original = if random.below(2) == 0 { stopped } else { killed };
                    let damage = damage_copy(original, &copy, &mut random);
                    // A failed case does not hide the next ones.
                    match catch_unwind(AssertUnwindSafe(|| run_case(&copy, published, &mut random))) {
                        Ok(end) => *ends.lock().unwrap().entry(end).or_default() += 1,
                        Err(panic) => {
                            let log = fs::read_to_string(log_of(&copy)).unwrap_or_default();
                            let kind = original.file_name().unwrap().to_string_lossy().into_owned();
                            let text = panic_text(&*panic);
                            if let Some(keep) = std::env::var_os("DRAVA_DAMAGE_KEEP") {
                                copy_tree(&copy, &Path::new(&keep).join(format!("case-{seed}")));
                            }
                            failures.lock().unwrap().push(format!(
                                "DRAVA_DAMAGE_SEED={seed} ({kind}): {text}\n  damage: {}\n  log: {}",
                                damage.join("; "),
                                last_lines(&log)
                            ));
                        }
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    println!("{cases} damaged directories: {:?}, {} failed", ends.into_inner().unwrap(), failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn options(data_dir: &Path) -> NodeOptions {
    let mut options = NodeOptions::new(data_dir)
        .with("DRAVA_STORAGE_SEGMENT_BYTES", 4 << 20)
        .with("DRAVA_STORAGE_SEGMENTS_SPARE", 1)
        .with("DRAVA_NETWORK_PAYLOAD_BYTES_MAX", 1 << 20)
        .with("DRAVA_STORAGE_INDEX_FLUSH_BYTES", 1 << 20);
    options.shards = 1;
    options
}

/// Makes the two directories: of a node that was stopped in order, and of the same one killed.
fn prepare(stopped: &Path, killed: &Path) -> Published {
    let mut published = Published::new();
    let node = Node::start(&options(stopped));
    let policy = TopicPolicy { partitions: PARTITIONS, ..TopicPolicy::default() };
    // Deleted soon, so that segments die and are used again, and metadata has a past.
    let passing = node.connect().topic("passing", TopicPolicy::default());
    let mut wire = node.connect_owner(&passing, 0);
    for _ in 0..80 {
        wire.publish(passing.partitions[0].partition, &batch_of(&Seal::default(), &[vec![b'p'; 100_000]]));
    }
    for topic in TOPICS {
        node.connect().topic(topic, policy.clone());
    }
    publish(&node, &mut published, 400);
    expect!(node.connect().call(&DeleteTopic { name: "passing".to_owned() }).unwrap(), Done);
    publish(&node, &mut published, 800);
    let orders = node.connect().lookup("orders");
    let mut owner = node.connect_owner(&orders, 0);
    let partition = orders.partitions[0].partition;
    let subscription = "s".to_owned();
    let subscribe = Subscribe { partition, consumer: 1, subscription, start: Place::Earliest, take_over: false };
    expect!(owner.call(&subscribe).unwrap(), Subscribed);
    expect!(owner.call(&Ack { consumer: 1, offset: 100 }).unwrap(), Done);
    drop(owner);
    // Something behind the messages: the last record of a log is the one whose damage nobody can tell from a torn write. And
    // more than the index waits for: until it knows of a segment, nothing but the file says that there is one.
    let behind = node.connect().topic("behind", TopicPolicy::default());
    let mut wire = node.connect_owner(&behind, 0);
    for _ in 0..40 {
        wire.publish(behind.partitions[0].partition, &batch_of(&Seal::default(), &[vec![b'b'; 100_000]]));
    }
    for name in ["last", "very-last"] {
        let topic = node.connect().topic(name, TopicPolicy::default());
        node.connect_owner(&topic, 0).publish(topic.partitions[0].partition, &batch_of(&Seal::default(), &["end"]));
    }
    node.kill();
    copy_tree(stopped, killed);
    assert!(Node::start(&options(stopped)).stop().success());
    published
}

/// Publishes `count` messages to each partition, of many sizes, in batches of some.
fn publish(node: &Node, published: &mut Published, count: usize) {
    for name in TOPICS {
        let topic = node.connect().lookup(name);
        for (index, place) in topic.partitions.iter().enumerate() {
            let mut wire = node.connect_owner(&topic, index);
            let all = published.entry((name, index)).or_default();
            let end = all.len() + count;
            while all.len() < end {
                let first = all.len();
                let payloads: Vec<_> =
                    (first..(first + 1 + first % 4).min(end)).map(|i| payload(name, index, i)).collect();
                assert_eq!(
                    wire.publish(place.partition, &batch_of(&Seal::default(), &payloads)).base_offset,
                    first as u64
                );
                all.extend(payloads);
            }
        }
    }
}

/// Bytes that differ for every message and at every place in it.
fn payload(topic: &str, index: usize, number: usize) -> Vec<u8> {
    let mut payload = format!("{topic}/{index}/{number}:").into_bytes();
    let bytes = number * 101 % 4000;
    payload.extend(Random(number as u64 ^ (index as u64) << 32 ^ (topic.len() as u64) << 40).bytes(bytes));
    payload
}

/// Copies the directory and damages one to three of its files; what was done.
fn damage_copy(original: &Path, copy: &Path, random: &mut Random) -> Vec<String> {
    if copy.exists() {
        fs::remove_dir_all(copy).unwrap();
    }
    copy_tree(original, copy);
    (0..1 + random.below(3)).map(|_| damage_one(copy, random)).collect()
}

/// Files by what they are: segments, metadata, index, and those that say whose the directory is.
fn groups(dir: &Path) -> [Vec<PathBuf>; 4] {
    let mut groups = <[Vec<PathBuf>; 4]>::default();
    for path in files_below(dir) {
        let below = path.strip_prefix(dir).unwrap();
        let first = below.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
        let group = match first.as_str() {
            "meta" => 1,
            "index" => 2,
            name if name.starts_with("shard-") => 0,
            _ => 3,
        };
        groups[group].push(path);
    }
    groups
}

fn damage_one(dir: &Path, random: &mut Random) -> String {
    let groups = groups(dir);
    let group = loop {
        let group = &groups[[0, 0, 0, 0, 1, 1, 2, 2, 2, 3][random.below(10)]];
        if !group.is_empty() {
            break group;
        }
    };
    let path = &group[random.below(group.len())];
    let mut bytes = fs::read(path).unwrap();
    let mut spots = Spots::new(&bytes);
    let done = match random.below(10) {
        0 | 1 => {
            let flips = 1 + random.below(8);
            for _ in 0..flips {
                let at = spots.any(random);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            format!("{flips} bits flipped, the last at {}", spots.last)
        }
        2 => {
            let range = spots.range(random);
            bytes[range.clone()].fill(0);
            format!("zeros at {range:?}")
        }
        3 => {
            let range = spots.range(random);
            let noise = random.bytes(range.len());
            bytes[range.clone()].copy_from_slice(&noise);
            format!("noise at {range:?}")
        }
        4 => {
            let at = if random.below(4) == 0 { 0 } else { spots.any(random) };
            bytes.truncate(at);
            format!("truncated to {at}")
        }
        5 => {
            fs::remove_file(path).unwrap();
            return format!("{}: deleted", show(dir, path));
        }
        6 => {
            let more = 1 + random.below(64 << 10);
            let noise = if random.below(2) == 0 { vec![0; more] } else { random.bytes(more) };
            bytes.extend(noise);
            format!("{more} bytes longer")
        }
        7 => {
            let (from, to) = (spots.block(random), spots.block(random));
            if from + BLOCK as usize <= bytes.len() && to + BLOCK as usize <= bytes.len() {
                let moved = bytes[from..from + BLOCK as usize].to_vec();
                bytes.copy_within(to..to + BLOCK as usize, from);
                bytes[to..to + BLOCK as usize].copy_from_slice(&moved);
            }
            format!("blocks at {from} and {to} swapped")
        }
        8 => {
            // Written to the wrong place: one block twice, another gone.
            let (from, to) = (spots.block(random), spots.block(random));
            if from + BLOCK as usize <= bytes.len() && to + BLOCK as usize <= bytes.len() {
                bytes.copy_within(from..from + BLOCK as usize, to);
            }
            format!("block at {from} also at {to}")
        }
        _ => {
            let other = &group[random.below(group.len())];
            let theirs = fs::read(other).unwrap();
            fs::write(other, &bytes).unwrap();
            bytes = theirs;
            format!("swapped with {}", show(dir, other))
        }
    };
    fs::write(path, &bytes).unwrap();
    format!("{}: {done}", show(dir, path))
}

fn show(dir: &Path, path: &Path) -> String {
    path.strip_prefix(dir).unwrap_or(path).display().to_string()
}

/// Where to damage a file: mostly where something was written, seldom in the zeros behind.
struct Spots {
    bytes: usize,
    used: usize,
    last: usize,
}

impl Spots {
    fn new(bytes: &[u8]) -> Spots {
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        Spots { bytes: bytes.len(), used, last: 0 }
    }

    /// A position; 0 in an empty file.
    fn any(&mut self, random: &mut Random) -> usize {
        let bound = if random.below(8) == 0 { self.bytes } else { self.used };
        self.last = if bound == 0 { 0 } else { random.below(bound) };
        self.last
    }

    fn block(&mut self, random: &mut Random) -> usize {
        self.any(random) / BLOCK as usize * BLOCK as usize
    }

    /// Bytes, a sector or some blocks: what people, bugs and disks change.
    fn range(&mut self, random: &mut Random) -> std::ops::Range<usize> {
        let (unit, units_max) = [(1, 300), (SECTOR, 1), (BLOCK, 1), (BLOCK, 16)][random.below(4)];
        let start = self.any(random) / unit as usize * unit as usize;
        let bytes = unit as usize * (1 + random.below(units_max));
        start..(start + bytes).min(self.bytes)
    }
}

/// Starts a node on the damaged copy. Panics when it does what it must not.
fn run_case(copy: &Path, published: &Published, random: &mut Random) -> End {
    let options = options(copy);
    let log = File::create(log_of(copy)).unwrap();
    let said = || fs::read_to_string(log_of(copy)).unwrap();
    // The messages that must be there, with those that are published on the way.
    let mut expected = published.clone();
    let mut end = End::Whole;
    let starts = if random.below(4) == 0 { 2 } else { 1 };
    for _ in 0..starts {
        let mut node = match Node::try_start(&options, log.try_clone().unwrap()) {
            Ok(node) => node,
            Err(status) => {
                assert_reason(status, &said());
                return End::Refused;
            }
        };
        let missing = serve_case(&node, &mut expected);
        assert_eq!(node.ended().map(|status| status.to_string()), None, "the node ended while it served");
        let text = said();
        if 0 < missing.silently {
            let told = ["damage", "torn", "quarantine"].iter().any(|word| text.to_lowercase().contains(word));
            assert!(
                told,
                "{} messages are missing and nobody says so, {} with an error",
                missing.silently, missing.told
            );
        }
        if 0 < missing.silently + missing.told {
            end = End::Told;
        }
        let status = node.stop();
        if !status.success() {
            assert_reason(status, &said());
        }
    }
    assert!(!said().contains("panicked"), "the node panicked");
    end
}

/// A node that ends says why, and does not fall.
fn assert_reason(status: ExitStatus, log: &str) {
    assert_eq!(status.signal(), None, "the node was ended by a signal");
    assert_ne!(status.code(), Some(PANIC), "the node ended with a bug");
    assert!(!log.contains("panicked"), "the node panicked");
    assert!(!log.trim().is_empty(), "the node ended with {status} and no word");
}

/// Messages that the node does not give.
#[derive(Default)]
struct Missing {
    /// Answered with a typed error.
    told: usize,
    /// As if they had never been published.
    silently: usize,
}

/// Reads all, publishes where it can, and reads that.
fn serve_case(node: &Node, expected: &mut Published) -> Missing {
    let mut missing = Missing::default();
    for ((name, index), expected) in expected.iter_mut() {
        let answer = node.connect().call(&Lookup { name: (*name).to_owned() }).unwrap();
        if answer.kind == Kind::Error {
            assert_eq!(answer.code(), ErrorCode::UnknownTopic, "{:?}", answer.error());
            missing.silently += expected.len();
            continue;
        }
        let topic = message::decode::<message::Topic>(&answer.body).unwrap();
        let partition = topic.partitions[*index].partition;
        let mut wire = node.connect_owner(&topic, *index);
        let end = read(&mut wire, partition, expected, &mut missing);
        let payload = payload(name, *index, expected.len());
        let answer = wire.call_with(&Publish { partition }, &batch_of(&Seal::default(), &[&payload])).unwrap();
        if answer.kind == Kind::Error {
            let code = answer.code();
            assert!([ErrorCode::StorageDamaged, ErrorCode::StorageFailed].contains(&code), "{:?}", answer.error());
            continue;
        }
        let base_offset = expect!(answer, Published).base_offset;
        let read_back = wire.call(&Fetch { partition, offset: base_offset, bytes_max: 1, wait_ms: 0 }).unwrap();
        assert!(
            records_of(&read_back.payload).contains(&(base_offset, payload.clone())),
            "{name}/{index}: not read back"
        );
        if end == Some(expected.len() as u64) {
            assert_eq!(base_offset, expected.len() as u64, "{name}/{index}: the end moved");
            expected.push(payload);
        }
    }
    missing
}

/// Reads a partition and compares it with what was published to it; its end, where the node tells it.
fn read(wire: &mut Wire, partition: u64, expected: &[Vec<u8>], missing: &mut Missing) -> Option<u64> {
    let mut offset = 0;
    let mut end = None;
    while offset < expected.len() as u64 {
        let answer = wire.call(&Fetch { partition, offset, bytes_max: 1 << 20, wait_ms: 0 }).unwrap();
        if answer.kind == Kind::Damaged {
            let damaged = message::decode::<message::Damaged>(&answer.body).unwrap();
            assert_eq!((damaged.partition, damaged.first_offset), (partition, offset));
            assert!(offset < damaged.next_offset, "{damaged:?}");
            missing.told += (damaged.next_offset.min(expected.len() as u64) - offset) as usize;
            offset = damaged.next_offset;
            continue;
        }
        if answer.kind == Kind::Error {
            let error = answer.error();
            let typed = [ErrorCode::StorageDamaged, ErrorCode::StorageFailed].contains(&answer.code());
            assert!(typed, "offset {offset}: {error:?}");
            assert!(!error.text.contains('/'), "a client is told of paths: {error:?}");
            missing.told += 1;
            offset += 1;
            continue;
        }
        let records = records_of(&answer.payload);
        let fetched = expect!(answer, Fetched);
        end = Some(fetched.end_offset);
        if fetched.next_offset <= offset {
            missing.silently += expected.len() - offset as usize;
            return end;
        }
        let mut next = offset;
        for (at, payload) in records.into_iter().filter(|(at, _)| offset <= *at) {
            assert_eq!(at, next, "offsets were skipped without a word");
            assert!(
                expected.get(at as usize) == Some(&payload),
                "the message at offset {at} is not what was published"
            );
            next += 1;
        }
        assert_eq!(next, fetched.next_offset, "offsets were skipped without a word");
        offset = next;
    }
    end
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    // The order of a directory is not the same on every machine; that of the cases must be.
    files.sort();
    files
}

fn copy_tree(from: &Path, to: &Path) {
    for path in files_below(from) {
        let target = to.join(path.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(&path, &target).unwrap();
    }
}

fn log_of(copy: &Path) -> PathBuf {
    copy.with_extension("log")
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(6)..].join("\n       ")
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without text").to_owned()
}
