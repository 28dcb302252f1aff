//! The admin over real TCP on a real executor, with a node made up.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use drava_protocol::message::{PartitionPlace, PartitionState, SubscriptionState, TopicPolicy};
use drava_protocol::topic::TopicName;
use drava_protocol::{ErrorCode, NodeId, PartitionId, ShardId, Term, TopicId};
use drava_raft::{Image, Owner, Partition, Topic};
use drava_runtime::foreign::{ReplySender, reply};
use drava_runtime::task::Stop;
use drava_runtime::{Executor, ExecutorConfig, ExecutorHandle};
use drava_storage::{Damage, DamagedMessages, DamagedPlace, FoundBy};
use serde_json::{Value, json};

use super::admin::Local;
use super::problem::status;
use super::{Admin, HttpConfig, HttpServer, openapi, routes};
use crate::control::Readiness;
use crate::control::request::Refused;
use crate::shard::stats::ShardStats;

/// A read that lasts longer has failed: generous, since the machine may be busy.
const READ_TIMEOUT: Duration = Duration::from_secs(20);

/// A node made up of a metadata image.
struct FakeNode {
    image: RefCell<Arc<Image>>,
    readiness: Readiness,
}

impl FakeNode {
    fn new() -> Self {
        let readiness = Readiness { leader: true, shards_serving: 2, shards: 2, draining: false };
        FakeNode { image: RefCell::default(), readiness }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Image) -> T) -> T {
        let mut image = (**self.image.borrow()).clone();
        image.version += 1;
        let result = change(&mut image);
        *self.image.borrow_mut() = Arc::new(image);
        result
    }

    fn add(&self, name: TopicName, policy: TopicPolicy) -> Arc<Topic> {
        self.change(|image| {
            let id = image.version;
            let partitions: Vec<PartitionId> =
                (0..u64::from(policy.partitions)).map(|index| PartitionId(id * 100 + index)).collect();
            let owner = Owner { node: NodeId(1), shard: ShardId(0) };
            for (index, &id) in partitions.iter().enumerate() {
                let index = index as u32;
                image.partitions.insert(id, Partition { id, topic: name.clone(), index, owner, term: Term(1) });
            }
            let topic = Arc::new(Topic { id: TopicId(id), name: name.clone(), policy, partitions, created_ms: 17 });
            image.topics.insert(name, topic.clone());
            topic
        })
    }
}

/// Describing this partition panics.
const PANICS: PartitionId = PartitionId(u64::MAX);

impl Admin for FakeNode {
    fn image(&self) -> Arc<Image> {
        self.image.borrow().clone()
    }

    fn create_topic(
        &self,
        name: TopicName,
        policy: TopicPolicy,
        exists_ok: bool,
    ) -> Local<'_, Result<Arc<Topic>, Refused>> {
        Box::pin(async move {
            if policy.partitions == 0 {
                return Err(Refused { code: ErrorCode::InvalidArgument, text: "0 partitions".to_owned() });
            }
            if name.short() == "no-leader" {
                return Err(Refused { code: ErrorCode::MetadataUnavailable, text: "no leader".to_owned() });
            }
            if name.short() == "hangs" {
                future_pending().await
            }
            if let Some(topic) = self.image().topics.get(&name) {
                return if exists_ok {
                    Ok(topic.clone())
                } else {
                    Err(Refused { code: ErrorCode::TopicExists, text: "exists".to_owned() })
                };
            }
            drava_runtime::yield_now().await;
            Ok(self.add(name, policy))
        })
    }

    fn delete_topic(&self, name: TopicName) -> Local<'_, Result<(), Refused>> {
        Box::pin(async move {
            let unknown = || Refused { code: ErrorCode::UnknownTopic, text: "unknown".to_owned() };
            self.change(|image| image.topics.remove(&name)).map(drop).ok_or_else(unknown)
        })
    }

    fn shard_stats(&self) -> Local<'_, Vec<ShardStats>> {
        Box::pin(async {
            (0..2).map(|shard| ShardStats { shard, messages_published: 7, ..ShardStats::default() }).collect()
        })
    }

    fn damage(&self) -> Local<'_, Vec<(u16, Vec<Damage>)>> {
        Box::pin(async {
            let place = DamagedPlace { segment: 3, generation: 9, positions: 4096..8192 };
            let damage = |place, messages| Damage { place, messages, found_at_ms: 7, found_by: FoundBy::Scrub };
            let messages = |id| DamagedMessages { partition: PartitionId(id), offsets: 5..9 };
            let first = vec![damage(None, Some(messages(u64::MAX - 1))), damage(Some(place.clone()), None)];
            let served = self.image.borrow().partitions.keys().next().copied().map_or(0, |id| id.0);
            vec![(0, first), (1, vec![damage(Some(place), Some(messages(served)))])]
        })
    }

    fn describe_partition(&self, partition: PartitionId) -> Local<'_, Option<PartitionState>> {
        Box::pin(async move {
            assert!(partition != PANICS, "the panic that the test asked for");
            Some(PartitionState {
                partition: partition.0,
                start_offset: 5,
                end_offset: 25,
                ledgers: 2,
                stored_bytes: 4096,
                subscriptions: vec![SubscriptionState { name: "billing".to_owned(), offset: 15, connected: true }],
            })
        })
    }

    fn readiness(&self) -> Readiness {
        self.readiness
    }

    fn place(&self, partition: PartitionId) -> Option<PartitionPlace> {
        let shard = (partition.0 % 2) as u16;
        let index = (partition.0 % 100) as u32;
        Some(PartitionPlace { partition: partition.0, index, node: 1, shard, host: String::new(), port: 7401 + shard })
    }
}

async fn future_pending() {
    std::future::pending().await
}

/// A served admin; dropping it stops and joins it.
struct Node {
    address: SocketAddr,
    stop: Option<ReplySender<()>>,
    executor: Option<ExecutorHandle<()>>,
}

impl Node {
    fn start(config: HttpConfig, node: impl FnOnce() -> FakeNode + Send + 'static) -> Node {
        let (address_sender, address) = std::sync::mpsc::channel();
        let (stop_sender, stop_asked) = reply::<()>();
        let executor = Executor::start(ExecutorConfig::new("http-test", None), move || async move {
            let server = HttpServer::bind(config).expect("a free port");
            address_sender.send(server.address()).expect("the test waits");
            let stop = Stop::default();
            let stop_there = stop.clone();
            drava_runtime::spawn(async move {
                stop_asked.await;
                stop_there.stop();
            });
            server.serve(Rc::new(node()), stop).await;
        });
        Node {
            address: address.recv().expect("it binds"),
            stop: Some(stop_sender),
            executor: Some(executor.expect("an executor")),
        }
    }

    fn with_topics() -> Node {
        Node::start(config(), topics)
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("it listens");
        stream.set_read_timeout(Some(READ_TIMEOUT)).expect("a timeout");
        stream
    }

    fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "")
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        let head = if body.is_empty() { "" } else { "content-type: application/json\r\n" };
        self.raw(&format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\n{head}content-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        ))
    }

    /// Sends `request` and reads to the end of the connection.
    fn raw(&self, request: &str) -> Answer {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).expect("it takes the request");
        Answer::read(stream)
    }

    fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.send(());
        }
        if let Some(executor) = self.executor.take() {
            executor.join().expect("the executor ends well");
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop();
    }
}

fn config() -> HttpConfig {
    HttpConfig::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
}

/// `orders` with 3 partitions, `/acme/web/clicks` with 1, and `panics`.
fn topics() -> FakeNode {
    let node = FakeNode::new();
    let name = |name| TopicName::parse(name).expect("a name");
    node.add(name("orders"), TopicPolicy { partitions: 3, ..TopicPolicy::default() });
    node.add(name("/acme/web/clicks"), TopicPolicy::default());
    let panics = name("panics");
    node.change(|image| {
        let topic = Topic {
            id: TopicId(99),
            name: panics.clone(),
            policy: TopicPolicy::default(),
            partitions: vec![PANICS],
            created_ms: 0,
        };
        image.topics.insert(panics, Arc::new(topic));
    });
    node
}

#[derive(Debug)]
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn read(mut stream: TcpStream) -> Answer {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("the whole answer");
        Answer::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> Answer {
        let text = String::from_utf8(bytes.to_vec()).expect("text");
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head in `{text}`"));
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).expect("a status line");
        let headers = lines
            .map(|line| line.split_once(": ").expect("a header"))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        Answer { status: status.parse().expect("a number"), headers, body: body.to_owned() }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// Asserts that this is a well-formed problem of that code.
    fn is_problem(&self, http_status: u16, code: ErrorCode) {
        assert_eq!(self.status, http_status, "{self:?}");
        assert_eq!(self.headers["content-type"], "application/problem+json");
        let problem = self.json();
        assert_eq!(problem["status"], http_status);
        assert_eq!(problem["code"], code as u16, "{self:?}");
        assert_eq!(problem["name"], format!("{code:?}"));
        assert_eq!(problem["type"], format!("urn:drava:error:{code:?}"));
        assert!(problem["title"].is_string() && problem["detail"].is_string() && problem["retry"].is_string());
    }
}

#[test]
fn health_is_told_with_version() {
    let answer = Node::with_topics().get("/healthz");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "application/json");
    assert_eq!(answer.json()["status"], "ok");
    assert_eq!(answer.json()["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn readiness_gives_its_reasons() {
    let ready = Node::with_topics().get("/readyz");
    assert_eq!(ready.status, 200);
    assert_eq!(ready.json()["ready"], true);
    assert_eq!(ready.json()["reasons"], json!([]));

    let node = Node::start(config(), || FakeNode {
        readiness: Readiness { leader: false, shards_serving: 1, shards: 2, draining: true },
        ..FakeNode::new()
    });
    let not = node.get("/readyz");
    assert_eq!(not.status, 503);
    assert_eq!(not.json()["ready"], false);
    assert_eq!(not.json()["reasons"].as_array().map(Vec::len), Some(3));
    assert_eq!(not.json()["shards_serving"], 1);
    assert_eq!(node.get("/healthz").status, 200, "a node that is not ready is alive");
}

#[test]
fn topics_are_created_described_listed_and_deleted() {
    let node = Node::start(config(), FakeNode::new);
    let policy = json!({
        "partitions": 3, "durability": "memory", "retention_ms": 60_000, "retention_bytes": 1_000_000,
        "trim_consumed": true, "cache": "10%", "replicas": 3, "ack_quorum": 2,
    });
    let created = node.ask("POST", "/v1/topics", &json!({"name": "orders", "policy": policy}).to_string());
    assert_eq!(created.status, 201, "{created:?}");
    assert_eq!(created.headers["location"], "/v1/topics/public/default/orders");
    assert_eq!(created.json()["name"], "/public/default/orders");
    assert_eq!(created.json()["policy"], policy);
    assert_eq!(created.json()["created_ms"], 17);

    for path in ["/v1/topics/orders", "/v1/topics/public/default/orders", "/v1/topics/%2Fpublic%2Fdefault%2Forders"] {
        let described = node.get(path);
        assert_eq!(described.status, 200, "{path}: {described:?}");
        assert_eq!(described.json()["topic"], created.json());
        let partitions = described.json()["partitions"].clone();
        assert_eq!(partitions.as_array().map(Vec::len), Some(3));
        assert_eq!(
            partitions[1],
            json!({
                "partition": 101, "index": 1,
                "place": {"node": 1, "shard": 1, "host": null, "port": 7402},
                "state": {
                    "start_offset": 5, "end_offset": 25, "ledgers": 2, "stored_bytes": 4096,
                    "subscriptions": [{"name": "billing", "offset": 15, "backlog_messages": 10, "connected": true}],
                },
            })
        );
    }
    assert_eq!(node.get("/v1/topics").json()["topics"], json!([created.json()]));

    let deleted = node.ask("DELETE", "/v1/topics/orders", "");
    assert_eq!((deleted.status, deleted.body.as_str()), (204, ""));
    node.ask("DELETE", "/v1/topics/orders", "").is_problem(404, ErrorCode::UnknownTopic);
    node.get("/v1/topics/orders").is_problem(404, ErrorCode::UnknownTopic);
    assert_eq!(node.get("/v1/topics").json(), json!({"topics": [], "next_after": null}));
}

#[test]
fn a_policy_left_out_is_the_default() {
    let node = Node::start(config(), FakeNode::new);
    let created = node.ask("POST", "/v1/topics", r#"{"name": "/acme/web/shop/clicks", "policy": {"partitions": 2}}"#);
    assert_eq!(created.status, 201, "{created:?}");
    assert_eq!(
        created.json()["policy"],
        json!({
            "partitions": 2, "durability": "disk", "retention_ms": 0, "retention_bytes": 0, "trim_consumed": false,
            "cache": "shared", "replicas": 1, "ack_quorum": 1,
        })
    );
    assert_eq!(node.get("/v1/topics/acme/web/shop/clicks").status, 200);
}

#[test]
fn an_existing_topic_is_a_conflict_unless_that_is_fine() {
    let node = Node::with_topics();
    node.ask("POST", "/v1/topics", r#"{"name":"orders"}"#).is_problem(409, ErrorCode::TopicExists);
    let answer = node.ask("POST", "/v1/topics", r#"{"name":"orders","exists_ok":true}"#);
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["policy"]["partitions"], 3);
}

#[test]
fn the_list_is_paged_and_filtered() {
    let node = Node::start(config(), || {
        let node = FakeNode::new();
        for name in ["a1", "a2", "a3", "b1", "/acme/web/a1", "/zoo/web/a1"] {
            node.add(TopicName::parse(name).expect("a name"), TopicPolicy::default());
        }
        node
    });
    let names = |answer: &Answer| -> Vec<String> {
        let topics = answer.json()["topics"].as_array().expect("a list").clone();
        topics.iter().map(|topic| topic["name"].as_str().expect("a name").to_owned()).collect()
    };
    let mut after = String::new();
    let mut all = Vec::new();
    loop {
        let page = node.get(&format!("/v1/topics?limit=2&after={after}"));
        let page_names = names(&page);
        assert!(page_names.len() <= 2);
        all.extend(page_names);
        match page.json()["next_after"].as_str() {
            Some(next) => after = next.to_owned(),
            None => break,
        }
    }
    let defaults = ["/public/default/a1", "/public/default/a2", "/public/default/a3", "/public/default/b1"];
    assert_eq!(all, [&["/acme/web/a1"], &defaults[..], &["/zoo/web/a1"]].concat());
    assert_eq!(names(&node.get("/v1/topics?prefix=a")), &defaults[..3]);
    assert_eq!(names(&node.get("/v1/topics?prefix=a&after=a1&limit=1")), &defaults[1..2]);
    assert_eq!(node.get("/v1/topics?prefix=a&after=a2&limit=1").json()["next_after"], Value::Null);
    assert_eq!(names(&node.get("/v1/topics?prefix=/acme/")), ["/acme/web/a1"]);
    assert_eq!(names(&node.get("/v1/topics?prefix=/nobody/")), [""; 0]);
    for query in ["limit=0", "limit=1001", "limit=x", "limt=1", "limit=-1"] {
        node.get(&format!("/v1/topics?{query}")).is_problem(400, ErrorCode::InvalidArgument);
    }
}

#[test]
fn lookup_tells_port_and_core_of_each_partition() {
    let node = Node::with_topics();
    let answer = node.get("/v1/lookup?topic=orders");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["topic"]["name"], "/public/default/orders");
    let partitions = answer.json()["partitions"].clone();
    assert_eq!(partitions.as_array().map(Vec::len), Some(3));
    assert_eq!(
        partitions[2],
        json!({"partition": 102, "index": 2, "place": {"node": 1, "shard": 0, "host": null, "port": 7401}})
    );
    assert_eq!(node.get("/v1/lookup?topic=%2Facme%2Fweb%2Fclicks").status, 200);
    node.get("/v1/lookup?topic=nothing").is_problem(404, ErrorCode::UnknownTopic);
    node.get("/v1/lookup?topic=a%20b").is_problem(400, ErrorCode::InvalidTopicName);
    node.get("/v1/lookup").is_problem(400, ErrorCode::InvalidArgument);
    node.get("/v1/lookup?topic=orders&x=1").is_problem(400, ErrorCode::InvalidArgument);
}

#[test]
fn malformed_bodies_are_refused() {
    let node = Node::with_topics();
    let refused = [
        "{",
        "[]",
        "nonsense",
        r#"{"nam":"x"}"#,
        r#"{"name":"x","surprise":1}"#,
        r#"{"name":"x","policy":{"retention":1}}"#,
        r#"{"name":"x","policy":{"partitions":-1}}"#,
        r#"{"name":"x","policy":{"durability":"Disk"}}"#,
        r#"{"name":"x","policy":{"trim_consumed":"true"}}"#,
        r#"{"name":"x","policy":{"trim_consumed":1}}"#,
        r#"{"name":"x","policy":{"trim_consumed":null}}"#,
        r#"{"name":"x","policy":{"cache":"0%"}}"#,
        r#"{"name":"x","policy":{"cache":4096}}"#,
        r#"{"name":"x","policy":{"replicas":256}}"#,
        r#"{"name":"x"} trailing"#,
    ];
    for body in refused {
        node.ask("POST", "/v1/topics", body).is_problem(400, ErrorCode::MalformedBody);
    }
    node.ask("POST", "/v1/topics", r#"{"name":"x","policy":{"partitions":0}}"#)
        .is_problem(400, ErrorCode::InvalidArgument);
    for name in ["", "a b", "/too/few", "../up", "/a//b"] {
        node.ask("POST", "/v1/topics", &json!({ "name": name }).to_string())
            .is_problem(400, ErrorCode::InvalidTopicName);
    }
    node.ask("POST", "/v1/topics", "").is_problem(415, ErrorCode::InvalidArgument);
    node.raw("POST /v1/topics HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        .is_problem(415, ErrorCode::InvalidArgument);
    node.get("/v1/topics/a%20b").is_problem(400, ErrorCode::InvalidTopicName);
    node.get("/v1/topics/%FF").is_problem(400, ErrorCode::InvalidTopicName);
    node.get("/v1/topics/two/parts").is_problem(400, ErrorCode::InvalidTopicName);
}

#[test]
fn large_bodies_are_refused_announced_or_not() {
    let node = Node::with_topics();
    // Announced: refused before the body comes.
    node.raw("POST /v1/topics HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 70000\r\n\r\n")
        .is_problem(413, ErrorCode::FrameTooLarge);
    // Not announced: refused when it has grown too large.
    let chunk = format!("{:x}\r\n{}\r\n", 0x4001, " ".repeat(0x4001));
    let mut stream = node.connect();
    let head =
        "POST /v1/topics HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(format!("{head}{}", chunk.repeat(4)).as_bytes()).expect("it takes what is just too much");
    Answer::read(stream).is_problem(413, ErrorCode::FrameTooLarge);
    // As large as is allowed.
    let body = format!("{}{}", r#"{"name":"fits"}"#, " ".repeat(64 * 1024 - 15));
    assert_eq!(node.ask("POST", "/v1/topics", &body).status, 201);
}

#[test]
fn unknown_paths_and_methods_are_problems() {
    let node = Node::with_topics();
    for path in ["/nothing", "/v1", "/v1/topics/", "/v2/topics", "/healthz/x"] {
        node.get(path).is_problem(404, ErrorCode::InvalidArgument);
    }
    let answer = node.ask("PUT", "/v1/topics", "{}");
    answer.is_problem(405, ErrorCode::InvalidArgument);
    let allowed: BTreeSet<&str> = answer.headers["allow"].split(',').collect();
    assert_eq!(allowed, BTreeSet::from(["GET", "HEAD", "POST"]));
    node.ask("DELETE", "/metrics", "").is_problem(405, ErrorCode::InvalidArgument);
}

#[test]
fn without_a_leader_changes_are_unavailable() {
    let answer = Node::with_topics().ask("POST", "/v1/topics", r#"{"name":"no-leader"}"#);
    answer.is_problem(503, ErrorCode::MetadataUnavailable);
    assert_eq!(answer.headers["retry-after"], "1");
    assert_eq!(answer.json()["retry"], "here");
}

#[test]
fn a_handler_that_hangs_is_answered_503() {
    let config = HttpConfig { request_timeout: Duration::from_millis(50), ..config() };
    let node = Node::start(config, topics);
    node.ask("POST", "/v1/topics", r#"{"name":"hangs"}"#).is_problem(503, ErrorCode::Busy);
    assert_eq!(node.get("/healthz").status, 200);
}

#[test]
fn a_panic_in_a_handler_is_answered_500_and_the_node_goes_on() {
    let node = Node::with_topics();
    // On one connection, to see that it goes on, too.
    let mut stream = node.connect();
    let request = "GET /v1/topics/panics HTTP/1.1\r\nhost: x\r\n\r\n";
    let last = "GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(format!("{request}{request}{last}").as_bytes()).expect("it takes the requests");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("the answers");
    assert_eq!(text.matches("HTTP/1.1 500").count(), 2, "{text}");
    assert_eq!(text.matches("HTTP/1.1 200").count(), 1, "{text}");
    node.get("/v1/topics/panics").is_problem(500, ErrorCode::Internal);
    assert!(node.get("/metrics").body.contains("\ndrava_http_panics_total 3\n"));
}

#[test]
fn a_client_that_does_not_finish_its_head_is_cut() {
    let config = HttpConfig { header_timeout: Duration::from_millis(100), ..config() };
    let node = Node::start(config, topics);
    for head in ["", "GET /healthz HTTP/1.1\r\nhost: x\r\n"] {
        let mut stream = node.connect();
        stream.write_all(head.as_bytes()).expect("it takes the bytes");
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("the node closes");
        assert!(rest.is_empty() || Answer::parse(&rest).status == 408, "{rest:?}");
    }
    // A connection that is kept alive is not kept for ever.
    let mut stream = node.connect();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").expect("it takes the request");
    assert_eq!(Answer::read(stream).status, 200);
}

#[test]
fn a_client_that_does_not_finish_its_body_is_told() {
    let config = HttpConfig { body_timeout: Duration::from_millis(100), ..config() };
    let node = Node::start(config, topics);
    node.raw("POST /v1/topics HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{")
        .is_problem(408, ErrorCode::SlowClient);
}

#[test]
fn a_huge_head_is_refused() {
    let node = Node::with_topics();
    let answer = node.raw(&format!("GET /healthz HTTP/1.1\r\nhost: x\r\nx: {}", "y".repeat(16 * 1024 - 35)));
    assert_eq!(answer.status, 431, "{answer:?}");
}

#[test]
fn connections_above_the_limit_are_refused() {
    let config = HttpConfig { connections_max: 2, ..config() };
    let node = Node::start(config, topics);
    let mut held: Vec<TcpStream> = (0..2).map(|_| node.connect()).collect();
    for stream in &mut held {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").expect("it takes the request");
        let mut first = [0; 12];
        stream.read_exact(&mut first).expect("an answer");
        assert_eq!(&first, b"HTTP/1.1 200");
    }
    let refused = node.get("/healthz");
    refused.is_problem(503, ErrorCode::TooManyConnections);
    drop(held);
    // The places are free once the node has seen that the clients left.
    let free = std::iter::repeat_with(|| node.get("/healthz").status).take(1000).any(|status| status == 200);
    assert!(free, "closed connections still count");
}

#[test]
fn stopping_closes_idle_connections_and_ends() {
    let mut node = Node::with_topics();
    let mut idle = node.connect();
    idle.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").expect("it takes the request");
    let mut first = [0; 12];
    idle.read_exact(&mut first).expect("an answer");
    node.stop();
    let mut rest = Vec::new();
    idle.read_to_end(&mut rest).expect("the node closes the idle connection");
    assert!(TcpStream::connect(node.address).is_err(), "nobody listens any more");
}

#[test]
fn stopping_does_not_wait_for_ever() {
    let config = HttpConfig { drain_timeout: Duration::from_millis(50), ..config() };
    let mut node = Node::start(config, topics);
    let mut stuck = node.connect();
    stuck.write_all(b"GET /healthz HTTP/1.1\r\n").expect("it takes half a head");
    assert_eq!(node.get("/healthz").status, 200);
    node.stop();
    let mut rest = Vec::new();
    assert_eq!(stuck.read_to_end(&mut rest).expect("the node closes"), 0);
}

#[test]
fn a_port_that_another_has_to_itself_is_an_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let config = HttpConfig::new(taken.local_addr().expect("an address"));
    let second = Executor::run(ExecutorConfig::new("http-second", None), async { HttpServer::bind(config).map(drop) });
    let error = second.expect("an executor").expect_err("the port is taken");
    assert_eq!(error.source.kind(), std::io::ErrorKind::AddrInUse);
}

#[test]
fn metrics_are_open_metrics_with_a_shard_label() {
    let answer = Node::with_topics().get("/metrics");
    assert_eq!(answer.status, 200);
    assert!(answer.headers["content-type"].starts_with("application/openmetrics-text"));
    for line in [
        "# HELP drava_published_messages Messages appended.",
        "# TYPE drava_published_messages counter",
        "drava_published_messages_total{shard=\"0\"} 7",
        "drava_published_messages_total{shard=\"1\"} 7",
        "# UNIT drava_store_flush_seconds seconds",
        "drava_topics 3",
        "drava_ready 1",
        concat!("drava_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\",arch=\""),
        "process_resident_memory_bytes ",
        "process_open_fds ",
        "process_cpu_seconds_total ",
        "drava_control_ticker_ticks_total ",
        "drava_uptime_seconds ",
    ] {
        assert!(answer.body.lines().any(|got| got.starts_with(line)), "no `{line}` in\n{}", answer.body);
    }
    assert!(answer.body.ends_with("# EOF\n"));
    let figure = |name: &str| -> f64 {
        let line = answer.body.lines().find(|line| line.starts_with(name)).expect("there");
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    };
    assert!(figure("process_resident_memory_bytes ") > 1e6);
    assert!(figure("process_open_fds ") > 3.0);
}

#[test]
fn damage_is_listed_by_pages_with_the_names_of_topics() {
    let node = Node::with_topics();
    let all = node.get("/v1/damage").json();
    assert_eq!((&all["total"], &all["next_start"]), (&json!(3), &Value::Null));
    let entries = all["damage"].as_array().expect("a list");
    assert_eq!(entries.len(), 3);
    assert_eq!(entries[0]["messages"]["topic"], Value::Null, "its topic is not there");
    assert_eq!(entries[1]["messages"], Value::Null);
    assert_eq!(entries[1]["place"]["end_position"], 8192);
    assert!(entries[2]["messages"]["topic"].as_str().is_some_and(|name| name.starts_with('/')), "{all}");
    assert_eq!((&entries[2]["shard"], &entries[2]["found_by"]), (&json!(1), &json!("scrub")));
    let page = node.get("/v1/damage?start=1&limit=1").json();
    assert_eq!(page["damage"], json!([entries[1]]));
    assert_eq!(page["next_start"], 2);
    assert_eq!(node.get("/v1/damage?start=18446744073709551615").json()["damage"], json!([]));
    for bad in ["limit=0", "limit=1001", "start=-1", "from=1"] {
        assert_eq!(node.get(&format!("/v1/damage?{bad}")).status, 400, "{bad}");
    }
}

#[test]
fn the_page_lists_every_endpoint() {
    let answer = Node::with_topics().get("/");
    assert_eq!(answer.status, 200);
    assert!(answer.headers["content-type"].starts_with("text/html"));
    for (_, path, _) in openapi::operations() {
        assert!(answer.body.contains(&path), "no {path}");
    }
}

#[test]
fn every_error_code_has_its_status() {
    for code in ErrorCode::ALL {
        assert!(status(*code).is_client_error() || status(*code).is_server_error(), "{code}");
    }
}

#[test]
fn the_document_and_the_router_have_the_same_operations() {
    let documented: BTreeSet<(String, String)> =
        openapi::operations().into_iter().map(|(method, path, _)| (method.to_owned(), path)).collect();
    let routed: BTreeSet<(String, String)> =
        routes::routes().into_iter().map(|(method, path, _)| (method.to_string(), path.replace("{*", "{"))).collect();
    assert_eq!(documented, routed);
    assert!(openapi::operations().iter().all(|(_, _, summary)| !summary.is_empty()), "each has a summary");
}

#[test]
fn the_document_is_served_with_the_version_and_its_references_resolve() {
    let answer = Node::with_topics().get("/openapi.json");
    assert_eq!(answer.status, 200);
    let document = answer.json();
    assert!(document["openapi"].as_str().expect("a version").starts_with("3.1"));
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    let mut references = Vec::new();
    collect_references(&document, &mut references);
    assert!(references.iter().any(|reference| reference.ends_with("/Problem")));
    for reference in references {
        let pointer = reference.strip_prefix('#').unwrap_or_else(|| panic!("{reference} leaves the document"));
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
    // Every answer with a body has a schema; a refusal is always a problem.
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            for (status, response) in operation["responses"].as_object().expect("responses") {
                if let Some(contents) = response["content"].as_object() {
                    assert!(contents.values().all(|content| content["schema"].is_object()), "{method} {path} {status}");
                    assert!(
                        status.starts_with('2')
                            || path == "/readyz"
                            || contents.contains_key("application/problem+json"),
                        "{method} {path} {status}"
                    );
                } else {
                    assert_eq!(status, "204", "{method} {path}");
                }
            }
        }
    }
}

fn collect_references(value: &Value, references: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(reference)) = fields.get("$ref") {
                references.push(reference.clone());
            }
            fields.values().for_each(|value| collect_references(value, references));
        }
        Value::Array(items) => items.iter().for_each(|value| collect_references(value, references)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn every_documented_operation_answers_as_documented() {
    let document = serde_json::to_value(openapi::openapi()).expect("JSON");
    let node = Node::with_topics();
    for (method, path, _) in openapi::operations() {
        let operation = &document["paths"][&path][method.to_ascii_lowercase()];
        let target = match path.as_str() {
            "/v1/lookup" => "/v1/lookup?topic=orders".to_owned(),
            path => path.replace("{name}", "acme/web/clicks"),
        };
        let body = if operation["requestBody"].is_object() { r#"{"name":"made"}"# } else { "" };
        let answer = node.ask(method, &target, body);
        let documented = &operation["responses"][answer.status.to_string()];
        assert!(documented.is_object(), "{method} {path} answered {answer:?}");
        assert!((200..300).contains(&answer.status), "{method} {path} answered {answer:?}");
        let Some(contents) = documented["content"].as_object() else {
            assert_eq!(answer.body, "");
            continue;
        };
        let media_type = answer.headers["content-type"].split(';').next().expect("a type");
        let schema = &contents.get(media_type).unwrap_or_else(|| panic!("{method} {path}: {media_type}"))["schema"];
        if media_type == "application/json" {
            assert_fits(&document, schema, &answer.json(), &path);
        }
    }
    // And a refusal.
    let problem = node.get("/v1/topics/nothing");
    assert_fits(&document, &document["components"]["schemas"]["Problem"], &problem.json(), "problem");
}

/// Asserts that `value` is what `schema` describes: its fields, all of them, and their types.
fn assert_fits(document: &Value, schema: &Value, value: &Value, place: &str) {
    if let Some(reference) = schema["$ref"].as_str() {
        let target = document.pointer(&reference[1..]).expect("checked by another test");
        return assert_fits(document, target, value, place);
    }
    if let Some(one_of) = schema["oneOf"].as_array() {
        let nullable = one_of.iter().any(|schema| schema["type"] == "null");
        if value.is_null() {
            assert!(nullable, "{place} is null");
        } else {
            let schema = one_of.iter().find(|schema| schema["type"] != "null").expect("another");
            assert_fits(document, schema, value, place);
        }
        return;
    }
    let kinds: Vec<&str> = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        kind => kind.as_str().into_iter().collect(),
    };
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    assert!(kinds.contains(&kind), "{place} is {kind}, documented as {kinds:?}");
    match value {
        Value::Object(fields) => {
            let Some(properties) = schema["properties"].as_object() else { return };
            for (name, value) in fields {
                let schema = properties.get(name).unwrap_or_else(|| panic!("{place}.{name} is not documented"));
                assert_fits(document, schema, value, &format!("{place}.{name}"));
            }
            for name in schema["required"].as_array().into_iter().flatten() {
                assert!(fields.contains_key(name.as_str().expect("a name")), "{place} lacks {name}");
            }
        }
        Value::Array(items) => {
            items.iter().for_each(|item| assert_fits(document, &schema["items"], item, &format!("{place}[]")));
        }
        Value::String(text) => {
            if let Some(values) = schema["enum"].as_array() {
                assert!(values.contains(&json!(text)), "{place} is `{text}`, documented as {values:?}");
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
