//! The power goes under load, at random moments: what was acknowledged before is there when the node starts again.
//!
//! The node's data lie on an ext4 file system in a file, and that file lies on another one. Freezing the outer file system
//! stops its writes between two of them, so a copy of the inner one is what a disk holds at one moment: all that the
//! kernel had given to the disk by then. What was in the page cache alone is not in it, as after a power cut, and the copy
//! is mounted with its journal replayed. The node knows nothing of it and goes on.
//!
//! What this does not show: a disk that loses what it had taken and not flushed. The loop device hands on all writes at
//! once. The simulator's disk does that.

mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::disk::{Disk, skipped};
use common::{Node, NodeOptions, Random, batch_of, chain, how_many, wait_until};
use drava_bench::witness::{self, Acks, Findings, Told, Witness};
use drava_protocol::batch::Seal;
use drava_protocol::message::{Ack, DescribePartition, Place, Subscribe, TopicPolicy};

/// `DRAVA_POWER_CUTS` for the long form.
const CUTS: u64 = 4;
/// A new disk after so many, so that what is read at the end of each stays small.
const CUTS_PER_DISK: u64 = 5;
const DISK_BYTES: u64 = 2 << 30;
/// Messages that must be acknowledged between two cuts.
const ACKS_MIN: u64 = 200;
const TOPIC: &str = "load";

#[test]
fn what_was_acknowledged_before_the_power_went_is_there_after() {
    let cuts = how_many("DRAVA_POWER_CUTS", CUTS);
    let seed = how_many("DRAVA_POWER_CUT_SEED", u64::from(std::process::id()));
    println!("DRAVA_POWER_CUT_SEED={seed}");
    let mut random = Random(seed);
    let mut total = Findings::default();
    let mut done = 0;
    while done < cuts {
        let dir = tempfile::tempdir().unwrap();
        let outer = match Disk::make(&dir.path().join("outer.img"), &dir.path().join("outer"), DISK_BYTES * 5 / 4) {
            Ok(disk) => disk,
            Err(reason) => return skipped(&reason),
        };
        let inner = Disk::make(&outer.mount.join("disk.img"), &dir.path().join("disk"), DISK_BYTES).unwrap();
        let options = options(&inner.mount);
        let node = Node::start(&options);
        let clerk = Clerk::default();
        let mut witness = Witness::new(TOPIC);
        let happened = witness.publish_while(node.listen, |acks| {
            std::thread::scope(|scope| {
                let working = scope.spawn(|| clerk.work(&node));
                let stopping = StopOnDrop(&clerk.stop);
                for _ in 0..CUTS_PER_DISK.min(cuts - done) {
                    let copy = dir.path().join("cut.img");
                    let (told, noted) = cut(&outer, &inner, &copy, acks, &clerk, &mut random);
                    let findings = boot(&copy, &dir.path().join("cut"), &told, &noted);
                    assert_eq!(findings.faults(), 0, "{:?}", findings.first_fault);
                    total.acked += findings.acked;
                    total.stored += findings.stored;
                    done += 1;
                }
                drop(stopping);
                working.join().unwrap();
            });
        });
        happened.unwrap_or_else(|error| panic!("the node that knows nothing of it: {}", chain(&error)));
        // The disk that was copied from is as whole as its copies.
        node.kill();
        let node = Node::start(&options);
        let findings = witness::check(node.listen, TOPIC, &witness.acks().told()).unwrap();
        assert_eq!(findings.faults(), 0, "{:?}", findings.first_fault);
        node.kill();
    }
    println!(
        "{cuts} power cuts: {} acknowledged messages checked, {} stored, 0 lost, doubled, moved or changed",
        total.acked, total.stored
    );
    assert!(cuts * ACKS_MIN <= total.acked, "the load was too small to prove anything");
}

fn options(mount: &Path) -> NodeOptions {
    // Small segments and index flushes: cuts hit files that are made, recycled, renamed.
    NodeOptions::new(&mount.join("data"))
        .with("DRAVA_STORAGE_SEGMENT_BYTES", 8 << 20)
        .with("DRAVA_STORAGE_INDEX_FLUSH_BYTES", 4 << 20)
}

/// Copies the disk under load at a random moment. What must be on the copy: all that was told before the freeze began.
fn cut(outer: &Disk, inner: &Disk, copy: &Path, acks: &Acks, clerk: &Clerk, random: &mut Random) -> (Told, Noted) {
    let before = acks.messages();
    wait_until("messages are acknowledged", || before + ACKS_MIN <= acks.messages());
    std::thread::sleep(Duration::from_micros(random.below(400_000) as u64));
    let (told, noted) = (acks.told(), clerk.noted.lock().unwrap().clone());
    outer.copy_at_once(&inner.image, copy);
    (told, noted)
}

/// Starts a node on a copy, compares, and publishes to it.
fn boot(copy: &Path, mount: &Path, told: &Told, noted: &Noted) -> Findings {
    let disk = Disk::mount(copy, mount).unwrap();
    let node = Node::start(&options(&disk.mount));
    let findings = witness::check(node.listen, TOPIC, told);
    let findings = findings.unwrap_or_else(|error| panic!("the copy: {}", chain(&error)));
    let mut wire = node.connect();
    for name in &noted.topics {
        // Panics for a topic that is unknown.
        wire.lookup(name);
    }
    let topic = wire.lookup(Clerk::CURSORS);
    let mut owner = node.connect_owner(&topic, 0);
    let partition = topic.partitions[0].partition;
    let state = expect!(owner.call(&DescribePartition { partition }).unwrap(), PartitionState);
    let cursor = state.subscriptions.first().map_or(0, |subscription| subscription.offset);
    assert!(noted.cursor <= cursor, "the cursor was acknowledged at {} and is at {cursor}", noted.cursor);
    node.assert_serves();
    assert!(node.stop().success());
    drop(disk);
    std::fs::remove_file(copy).unwrap();
    findings
}

/// Makes topics and moves a cursor, and notes what was answered.
#[derive(Default)]
struct Clerk {
    noted: Mutex<Noted>,
    stop: AtomicBool,
}

#[derive(Clone, Default)]
struct Noted {
    topics: Vec<String>,
    cursor: u64,
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Clerk {
    const CURSORS: &str = "cursors";

    fn work(&self, node: &Node) {
        let listen: SocketAddr = node.listen;
        let mut wire = common::Wire::connect(listen).unwrap();
        let topic = wire.topic(Self::CURSORS, TopicPolicy::default());
        let partition = topic.partitions[0].partition;
        let mut owner = node.connect_owner(&topic, 0);
        let subscription = "clerk".to_owned();
        let subscribe = Subscribe { partition, consumer: 1, subscription, start: Place::Earliest, take_over: false };
        expect!(owner.call(&subscribe).unwrap(), Subscribed);
        for number in 1.. {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            owner.publish(partition, &batch_of(&Seal::default(), &[format!("{number}")]));
            expect!(owner.call(&Ack { consumer: 1, offset: number }).unwrap(), Done);
            self.noted.lock().unwrap().cursor = number;
            let name = format!("topic-{number}");
            wire.topic(&name, TopicPolicy::default());
            self.noted.lock().unwrap().topics.push(name);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
