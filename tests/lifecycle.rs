//! How a node begins and ends: in order, or with a refusal that says why.

mod common;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Node, NodeOptions, PATIENCE, Wire, batch_of, wait_until};
use drava_protocol::batch::Seal;
use drava_protocol::message::{CreateTopic, DeleteTopic, Kind, ListTopics, Publish, TopicPolicy};

/// Exit code of a node that the host or the data directory does not suit.
const HOST_UNFIT: i32 = 7;

fn policy(partitions: u32) -> TopicPolicy {
    TopicPolicy { partitions, ..TopicPolicy::default() }
}

/// Runs a node that is to refuse to start; its exit code and what it said.
fn refused(mut command: Command) -> (Option<i32>, String) {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if deadline < Instant::now() {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("a node that should have refused to start runs");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(!text.contains("panicked"), "{text}");
    (status.code(), text)
}

/// Every file below `dir`, by path.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else {
            found.insert(path.display().to_string(), std::fs::read(&path).unwrap());
        }
    }
    found
}

#[test]
fn sigterm_under_load_ends_in_order_and_keeps_all_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path());
    let mut acknowledged: Vec<BTreeMap<u64, Vec<u8>>> = vec![BTreeMap::new(); 4];
    for round in 0..4u64 {
        let node = Node::start(&options);
        let topic = node.connect().topic("load", policy(4));
        let acks = AtomicU64::new(0);
        let stopped = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (index, acknowledged) in acknowledged.iter_mut().enumerate() {
                let (node, topic, acks, stopped) = (&node, &topic, &acks, &stopped);
                // On the owning core, and a forward away.
                let wire = node.connect_owner(topic, if round % 2 == 0 { index } else { (index + 1) % 4 });
                let partition = topic.partitions[index].partition;
                scope.spawn(move || {
                    let error = publish_until_the_end(wire, partition, round, acknowledged, acks).unwrap_err();
                    assert!(stopped.load(Ordering::Relaxed), "the node ended a session too early: {error}");
                });
            }
            while acks.load(Ordering::Relaxed) < 500 {
                std::thread::sleep(Duration::from_millis(1));
            }
            stopped.store(true, Ordering::Relaxed);
            node.terminate();
        });
        assert_eq!(node.wait().code(), Some(0), "round {round}");
    }
    let node = Node::start(&options);
    let topic = node.connect().lookup("load");
    for (index, acknowledged) in acknowledged.iter().enumerate() {
        let stored = node.connect_owner(&topic, index).read_all(topic.partitions[index].partition, 0);
        for (offset, payload) in acknowledged {
            assert_eq!(stored.get(offset), Some(payload), "offset {offset} was acknowledged");
        }
    }
}

/// Keeps 64 batches under way until the node ends the connection or refuses.
fn publish_until_the_end(
    mut wire: Wire,
    partition: u64,
    round: u64,
    acknowledged: &mut BTreeMap<u64, Vec<u8>>,
    acks: &AtomicU64,
) -> std::io::Result<Infallible> {
    let payload = |number: u64| format!("round {round} message {number} {}", ".".repeat(300)).into_bytes();
    let (mut sent, mut answered) = (0, 0);
    loop {
        while sent < answered + 64 {
            wire.send(&Publish { partition }, &batch_of(&Seal::default(), &[payload(sent)]))?;
            sent += 1;
        }
        let answer = wire.receive()?;
        answered += 1;
        if answer.kind == Kind::Error {
            // Not taken: the node is shutting down, or the other core was busy.
            continue;
        }
        // Correlations of a session begin after its Hello.
        let number = answer.correlation - 2;
        let base_offset = expect!(answer, Published).base_offset;
        let taken = acknowledged.insert(base_offset, payload(number));
        assert_eq!(taken, None, "offset {base_offset} was given twice");
        acks.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn an_empty_node_starts_and_serves_and_starts_again_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("not/there/yet");
    let options = NodeOptions::new(&data_dir);
    let format = data_dir.join("format.json");
    let node = Node::start(&options);
    assert_eq!(node.http_get("/readyz").0, 200);
    let first = std::fs::read_to_string(&format).unwrap();
    assert!(node.stop().success());
    let node = Node::start(&options);
    assert_eq!(std::fs::read_to_string(&format).unwrap(), first);
    node.assert_serves();
    assert!(node.stop().success());
}

#[test]
fn a_second_node_on_the_same_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path());
    let node = Node::start(&options);
    let ports = std::fs::read(dir.path().join("ports.json")).unwrap();
    let (code, text) = refused(options.command());
    assert_eq!(code, Some(HOST_UNFIT), "{text}");
    assert!(text.contains("in use") && text.contains(&format!("pid {}", node.pid())), "{text}");
    assert_eq!(std::fs::read(dir.path().join("ports.json")).unwrap(), ports);
    node.assert_serves();
    node.kill();
    // A lock ends with its process.
    Node::start(&options).assert_serves();
}

#[test]
fn a_directory_of_another_format_or_node_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path());
    let node = Node::start(&options);
    let topic = node.connect().topic("kept", policy(1));
    let partition = topic.partitions[0].partition;
    node.connect_owner(&topic, 0).publish(partition, &batch_of(&Seal::default(), &["kept"]));
    assert!(node.stop().success());

    let format = dir.path().join("format.json");
    let ours = std::fs::read_to_string(&format).unwrap();
    let no_format = ours.replace("\"format\":2", "\"form\":1");
    let other_format = ours.replace("\"format\":2", "\"format\":999");
    assert_ne!(other_format, ours);
    let cases: Vec<(&str, &str, NodeOptions, &[&str])> = vec![
        ("another format", &other_format, options.clone(), &["format 999"]),
        ("no format", &no_format, options.clone(), &["format.json"]),
        ("no JSON", "\u{1}\u{2}", options.clone(), &["format.json"]),
        ("another node", &ours, options.clone().with("DRAVA_NODE_ID", 2), &["node 1", "node 2"]),
    ];
    for (what, text, options, words) in cases {
        std::fs::write(&format, text).unwrap();
        let mut before = contents(dir.path());
        let (code, said) = refused(options.command());
        let mut after = contents(dir.path());
        assert_eq!(code, Some(HOST_UNFIT), "{what}: {said}");
        for word in words {
            assert!(said.contains(word), "{what}: {said}");
        }
        // The lock names who held it last.
        let lock = dir.path().join("lock").display().to_string();
        before.remove(&lock);
        after.remove(&lock);
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>(), "{what}");
        assert!(before == after, "{what}: a refused node changed a file");
    }
    std::fs::write(&format, &ours).unwrap();
    let node = Node::start(&options);
    assert_eq!(node.connect_owner(&node.connect().lookup("kept"), 0).read_all(partition, 0)[&0], b"kept");
}

#[test]
fn a_directory_of_somebody_else_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("letters.txt"), "dear").unwrap();
    let (code, text) = refused(NodeOptions::new(dir.path()).command());
    assert_eq!(code, Some(HOST_UNFIT), "{text}");
    assert!(text.contains("no data directory"), "{text}");
    assert_eq!(std::fs::read_to_string(dir.path().join("letters.txt")).unwrap(), "dear");
    assert!(!dir.path().join("format.json").exists());
}

#[test]
fn a_taken_port_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let running = Node::start(&NodeOptions::new(&dir.path().join("first")));
    let stranger = TcpListener::bind("127.0.0.1:0").unwrap();
    let options = NodeOptions::new(&dir.path().join("second"));
    let taken = [
        ("--listen", stranger.local_addr().unwrap()),
        ("--admin-listen", stranger.local_addr().unwrap()),
        // Another node shares its ports among its own cores, and with nobody else.
        ("--listen", running.listen),
        ("--listen", SocketAddr::new(running.listen.ip(), running.shards[1])),
        ("--admin-listen", running.admin),
        ("--admin-listen", running.listen),
    ];
    for (flag, address) in taken {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drava"));
        let other_flag = if flag == "--listen" { "--admin-listen" } else { "--listen" };
        command.args(["node", "--shards", "1", "--data-dir"]).arg(&options.data_dir);
        command.args([flag, &address.to_string(), other_flag, "127.0.0.1:0"]).env("DRAVA_CORES", "none");
        command.env("DRAVA_STORAGE_DISK_RESERVE_BYTES", "0").stdin(Stdio::null()).stdout(Stdio::null());
        let (code, text) = refused(command);
        assert_eq!(code, Some(HOST_UNFIT), "{flag} {address}: {text}");
        assert!(text.contains(&address.to_string()), "{flag} {address}: {text}");
    }
    running.assert_serves();
}

#[test]
fn a_port_is_free_again_at_once_after_a_node_with_connections() {
    let dir = tempfile::tempdir().unwrap();
    let first = Node::start(&NodeOptions { shards: 1, ..NodeOptions::new(dir.path()) });
    let (listen, shard_port) = (first.listen, first.shards[0]);
    let sessions: Vec<Wire> = (0..5).map(|_| first.connect()).collect();
    assert!(first.stop().success());
    drop(sessions);
    // The connections that the node closed wait out their time in the kernel; they are nobody's who listens.
    let options = NodeOptions { shards: 1, listen, ..NodeOptions::new(dir.path()) };
    let again = Node::start(&options.with("DRAVA_SHARD_PORT_BASE", shard_port));
    assert_eq!(again.listen, listen);
    again.assert_serves();
}

#[test]
fn topics_survive_restarts_beyond_a_snapshot_of_the_metadata() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path());
    let mut names: BTreeMap<String, u64> = BTreeMap::new();
    for round in 0..6 {
        let node = Node::start(&options);
        let mut wire = node.connect();
        let listed = list(&mut wire);
        assert_eq!(listed, names.keys().cloned().collect::<Vec<_>>(), "round {round}");
        for (name, id) in &names {
            assert_eq!(wire.lookup(name).topic, *id, "round {round}");
        }
        for number in 0..40 {
            let name = format!("/public/default/r{round}-{number:03}");
            let create = CreateTopic { name: name.clone(), policy: policy(1 + number % 3), exists_ok: false };
            let topic = expect!(wire.call(&create).unwrap(), Topic);
            assert!(names.values().all(|id| *id < topic.topic), "ids of topics go up");
            names.insert(name, topic.topic);
        }
        // Some go again, so that a snapshot has gaps.
        for number in (0..40).step_by(5) {
            let name = format!("/public/default/r{round}-{number:03}");
            expect!(wire.call(&DeleteTopic { name: name.clone() }).unwrap(), Done);
            names.remove(&name);
        }
        if round % 2 == 0 {
            assert!(node.stop().success());
        } else {
            node.kill();
        }
    }
    let node = Node::start(&options);
    assert_eq!(list(&mut node.connect()), names.keys().cloned().collect::<Vec<_>>());
    let name = names.keys().next().unwrap();
    let topic = node.connect().lookup(name);
    node.connect_owner(&topic, 0).publish(topic.partitions[0].partition, &batch_of(&Seal::default(), &["x"]));
}

/// All names, a few at a time.
fn list(wire: &mut Wire) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    loop {
        let after = names.last().cloned().unwrap_or_default();
        let page = expect!(wire.call(&ListTopics { prefix: String::new(), after, limit: 37 }).unwrap(), Topics);
        names.extend(page.names);
        if !page.more {
            return names;
        }
    }
}

#[test]
fn a_node_starts_and_stops_many_times() {
    let dir = tempfile::tempdir().unwrap();
    let options = NodeOptions::new(dir.path());
    for round in 0..12u64 {
        let node = Node::start(&options);
        let topic = node.connect().topic("again", policy(1));
        let partition = topic.partitions[0].partition;
        let mut wire = node.connect_owner(&topic, 0);
        assert_eq!(wire.publish(partition, &batch_of(&Seal::default(), &[format!("{round}")])).base_offset, round);
        assert_eq!(wire.read_all(partition, 0).len() as u64, round + 1);
        if round % 3 == 0 {
            node.kill();
        } else {
            assert!(node.stop().success());
        }
    }
}

#[test]
fn a_node_that_drains_ends_although_clients_wait_for_messages_that_never_come() {
    use drava_protocol::message::{Fetch, Flow, Place, Subscribe};
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()).with("DRAVA_DRAIN_TIMEOUT_MS", 600_000));
    let topic = node.connect().topic("quiet", policy(2));
    let mut waiting = Vec::new();
    for (index, place) in topic.partitions.iter().enumerate() {
        for core in [index, 1 - index] {
            let mut wire = node.connect_owner(&topic, core);
            let partition = place.partition;
            wire.send(&Fetch { partition, offset: 0, bytes_max: 1000, wait_ms: 60_000 }, &[]).unwrap();
            waiting.push(wire);
        }
        let mut wire = node.connect_owner(&topic, index);
        let subscription = "s".to_owned();
        let start = Place::Earliest;
        let partition = place.partition;
        let subscribe = Subscribe { partition, consumer: 1, subscription, start, take_over: false };
        expect!(wire.call(&subscribe).unwrap(), Subscribed);
        wire.send(&Flow { consumer: 1, bytes: 1 << 20 }, &[]).unwrap();
    }
    // And one in the middle of a frame, one that has said nothing.
    let mut half = node.connect();
    std::io::Write::write_all(&mut half.stream, b"DRVA\x01").unwrap();
    let silent = Wire::raw(node.listen).unwrap();
    wait_until("all are connected", || 6.0 <= node.metric("drava_connections"));
    assert_eq!(node.stop().code(), Some(0));
    for wire in &mut waiting {
        // Answered with nothing rather than left without an answer.
        assert!(wire.receive().unwrap().payload.is_empty());
    }
    drop((half, silent));
}
