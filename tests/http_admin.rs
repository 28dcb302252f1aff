//! The HTTP admin of a real node: health, metrics, topics, lookup, the OpenAPI document.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;

use common::{HttpAnswer, Node, NodeOptions, PATIENCE, batch_of};
use drava_protocol::ErrorCode;
use drava_protocol::batch::Seal;
use drava_protocol::message::{Ack, CloseConsumer, DeleteTopic, Durability, Lookup, Place, Subscribe, TopicPolicy};
use serde_json::{Value, json};

fn create(node: &Node, body: &Value) -> HttpAnswer {
    node.http("POST", "/v1/topics", Some(&body.to_string()))
}

/// A problem of RFC 9457 with the number that the wire protocol uses.
fn assert_problem(answer: &HttpAnswer, status: u16, code: ErrorCode) {
    assert_eq!(answer.status, status, "{}", answer.body);
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    let problem = answer.json();
    assert_eq!(problem["code"], code as u16, "{problem}");
    assert_eq!(problem["status"], status);
    assert!(!problem["detail"].as_str().unwrap().is_empty());
}

#[test]
fn a_node_that_serves_says_that_it_lives_and_is_ready() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let health = node.http("GET", "/healthz", None);
    assert_eq!((health.status, &health.json()["status"]), (200, &json!("ok")));
    let ready = node.http("GET", "/readyz", None);
    assert_eq!(ready.status, 200, "{}", ready.body);
    let ready = ready.json();
    assert_eq!(ready["ready"], true);
    assert_eq!((&ready["shards"], &ready["shards_serving"]), (&json!(2), &json!(2)));
    assert_eq!(ready["reasons"], json!([]));
    assert_eq!(node.http("GET", "/", None).status, 200);
}

#[test]
fn topics_are_created_listed_described_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let policy = json!({
        "partitions": 3, "durability": "memory", "retention_ms": 60_000, "retention_bytes": 1 << 30, "trim_consumed": true,
        "cache": "10%",
    });
    let made = create(&node, &json!({"name": "orders", "policy": policy}));
    assert_eq!(made.status, 201, "{}", made.body);
    assert_eq!(made.headers["location"], "/v1/topics/public/default/orders".to_owned());
    let topic = made.json();
    assert_eq!(topic["name"], "/public/default/orders");
    for key in ["partitions", "durability", "retention_ms", "retention_bytes", "trim_consumed", "cache"] {
        assert_eq!(topic["policy"][key], policy[key]);
    }
    assert_problem(&create(&node, &json!({"name": "orders"})), 409, ErrorCode::TopicExists);
    let again = create(&node, &json!({"name": "orders", "exists_ok": true}));
    assert_eq!((again.status, again.json()), (200, topic.clone()), "as it is, whatever the policy asked for");

    for name in ["/acme/shop/a", "/acme/shop/b", "/acme/shop/c"] {
        assert_eq!(create(&node, &json!({"name": name})).status, 201);
    }
    let names = |list: &Value| -> Vec<String> {
        list["topics"].as_array().unwrap().iter().map(|topic| topic["name"].as_str().unwrap().to_owned()).collect()
    };
    let all = node.http("GET", "/v1/topics", None).json();
    assert_eq!(names(&all), ["/acme/shop/a", "/acme/shop/b", "/acme/shop/c", "/public/default/orders"]);
    assert_eq!(all["next_after"], Value::Null);
    let page = node.http("GET", "/v1/topics?prefix=/acme/&limit=2", None).json();
    assert_eq!(names(&page), ["/acme/shop/a", "/acme/shop/b"]);
    let next = format!("/v1/topics?prefix=/acme/&limit=2&after={}", page["next_after"].as_str().unwrap());
    let page = node.http("GET", &next, None).json();
    assert_eq!((names(&page), &page["next_after"]), (vec!["/acme/shop/c".to_owned()], &Value::Null));

    // Short and full names lead to the same topic.
    let short = node.http("GET", "/v1/topics/orders", None).json();
    assert_eq!(short, node.http("GET", made.headers["location"].as_str(), None).json());
    assert_eq!(short["topic"], topic);
    assert_eq!(short["partitions"].as_array().unwrap().len(), 3);

    let deleted = node.http("DELETE", "/v1/topics/orders", None);
    assert_eq!((deleted.status, deleted.body.as_str()), (204, ""));
    assert_problem(&node.http("GET", "/v1/topics/orders", None), 404, ErrorCode::UnknownTopic);
    assert_problem(&node.http("DELETE", "/v1/topics/orders", None), 404, ErrorCode::UnknownTopic);
    let anew = create(&node, &json!({"name": "orders"})).json();
    assert_ne!(anew["id"], topic["id"], "ids are never used again");
}

#[test]
fn a_topic_made_over_http_is_used_over_the_wire_and_the_other_way_round() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    // Over HTTP; at once after the answer the wire knows it.
    assert_eq!(create(&node, &json!({"name": "http", "policy": {"partitions": 2}})).status, 201);
    let topic = node.connect().lookup("http");
    for (index, place) in topic.partitions.iter().enumerate() {
        let mut wire = node.connect_owner(&topic, index);
        for _ in 0..=index {
            wire.publish(place.partition, &batch_of(&Seal::default(), &["a", "b"]));
        }
    }
    let lookup = node.http("GET", "/v1/lookup?topic=http", None).json();
    for (place, found) in topic.partitions.iter().zip(lookup["partitions"].as_array().unwrap()) {
        assert_eq!(found["partition"], place.partition);
        assert_eq!(found["index"], place.index);
        assert_eq!(found["place"]["port"], place.port);
        assert_eq!(found["place"]["shard"], place.shard);
        assert_eq!(found["place"]["host"], Value::Null);
    }
    // A subscription as the description tells it.
    let partition = topic.partitions[1].partition;
    let mut wire = node.connect_owner(&topic, 1);
    let start = Place::Earliest;
    let subscribe = Subscribe { partition, consumer: 1, subscription: "billing".to_owned(), start, take_over: false };
    expect!(wire.call(&subscribe).unwrap(), Subscribed);
    expect!(wire.call(&Ack { consumer: 1, offset: 3 }).unwrap(), Done);
    let state = |index: usize| node.http("GET", "/v1/topics/http", None).json()["partitions"][index]["state"].clone();
    assert_eq!((&state(0)["start_offset"], &state(0)["end_offset"]), (&json!(0), &json!(2)));
    assert_eq!(state(1)["end_offset"], 4);
    let subscription = json!([{"name": "billing", "offset": 3, "backlog_messages": 1, "connected": true}]);
    assert_eq!(state(1)["subscriptions"], subscription);
    expect!(wire.call(&CloseConsumer { consumer: 1 }).unwrap(), Done);
    assert_eq!(state(1)["subscriptions"][0]["connected"], false);
    assert_eq!(node.http("DELETE", "/v1/topics/http", None).status, 204);
    assert_eq!(wire.call(&Lookup { name: "http".to_owned() }).unwrap().code(), ErrorCode::UnknownTopic);

    // Over the wire.
    let policy = TopicPolicy { partitions: 2, durability: Durability::Memory, ..TopicPolicy::default() };
    let topic = node.connect().topic("wire", policy);
    let found = node.http("GET", "/v1/topics/wire", None).json();
    assert_eq!(found["topic"]["id"], topic.topic);
    assert_eq!(found["topic"]["policy"]["durability"], "memory");
    expect!(node.connect().call(&DeleteTopic { name: "wire".to_owned() }).unwrap(), Done);
    assert_problem(&node.http("GET", "/v1/topics/wire", None), 404, ErrorCode::UnknownTopic);
}

#[test]
fn what_is_asked_wrongly_is_a_problem_that_says_what() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    assert_eq!(node.http("GET", "/nothing", None).status, 404);
    let not_allowed = node.http("DELETE", "/healthz", None);
    assert_eq!(not_allowed.status, 405);
    assert!(not_allowed.headers["allow"].contains("GET"), "{:?}", not_allowed.headers);
    for body in ["", "{", "[]", "{\"name\":1}", "{\"name\":\"a\",\"more\":1}", "{\"name\":\"a\",\"policy\":{\"x\":1}}"]
    {
        assert_problem(&node.http("POST", "/v1/topics", Some(body)), 400, ErrorCode::MalformedBody);
    }
    for name in ["", "a b", "/a", "../a"] {
        assert_problem(&create(&node, &json!({"name": name})), 400, ErrorCode::InvalidTopicName);
    }
    for policy in [json!({"partitions": 0}), json!({"partitions": 1025}), json!({"ack_quorum": 2})] {
        let answer = create(&node, &json!({"name": "refused", "policy": policy}));
        assert_problem(&answer, 400, ErrorCode::InvalidArgument);
    }
    for value in [json!(1), json!("yes"), json!(null), json!([])] {
        let answer = create(&node, &json!({"name": "refused", "policy": {"trim_consumed": value}}));
        assert_problem(&answer, 400, ErrorCode::MalformedBody);
    }
    for path in ["/v1/topics?limit=0", "/v1/topics?limit=1001", "/v1/topics?limit=x", "/v1/topics?no=1", "/v1/lookup"] {
        assert_problem(&node.http("GET", path, None), 400, ErrorCode::InvalidArgument);
    }
    assert_problem(&node.http("GET", "/v1/lookup?topic=none", None), 404, ErrorCode::UnknownTopic);
    assert_problem(&node.http("GET", "/v1/topics/none", None), 404, ErrorCode::UnknownTopic);
    assert_problem(&node.http("GET", "/v1/topics/a%20b", None), 400, ErrorCode::InvalidTopicName);
    let large = json!({"name": "n".repeat(100_000)}).to_string();
    assert_problem(&node.http("POST", "/v1/topics", Some(&large)), 413, ErrorCode::FrameTooLarge);
    let form = b"POST /v1/topics HTTP/1.1\r\nHost: node\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}";
    assert_eq!(HttpAnswer::read(&mut node.http_send(form)).status, 415);
    assert_eq!(node.http("GET", "/v1/topics", None).json()["topics"], json!([]), "nothing refused was made");
}

#[test]
fn bytes_that_are_no_http_do_not_disturb_the_admin() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let mut held = Vec::new();
    let long_head = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    for bytes in [&b"DRVA\x01\x01"[..], b"\0\0\0\0", b"GET", b"GET / HTTP/9.9\r\n\r\n", long_head.as_bytes()] {
        let mut stream = TcpStream::connect(node.admin).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // A head that is too long may be refused before all of it is sent.
        drop(stream.write_all(bytes));
        held.push(stream);
    }
    // And a frame's worth of silence: more connections than requests.
    held.extend((0..50).map(|_| TcpStream::connect(node.admin).unwrap()));
    node.assert_serves();
    drop(held);
    node.assert_serves();
}

/// Samples by name and labels, as a scraper reads them.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let mut found = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
        let value = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
        assert_eq!(found.insert(name.to_owned(), value), None, "{name} is there twice");
    }
    found
}

#[test]
fn metrics_have_help_and_type_and_labels_and_move_with_the_load() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let topic = node.connect().topic("counted", TopicPolicy { partitions: 2, ..TopicPolicy::default() });
    let answer = node.http("GET", "/metrics", None);
    assert_eq!(answer.status, 200);
    assert!(answer.headers["content-type"].starts_with("application/openmetrics-text"), "{:?}", answer.headers);
    let text = answer.body;
    assert!(text.ends_with("# EOF\n"));
    let described = |what: &str| -> BTreeSet<String> {
        let prefix = format!("# {what} ");
        let lines = text.lines().filter_map(|line| line.strip_prefix(&prefix));
        lines.map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    };
    let (helps, types) = (described("HELP"), described("TYPE"));
    assert_eq!(helps, types);
    for name in samples(&text).keys() {
        let family = name.split('{').next().unwrap();
        let known = |family: &str| types.contains(family);
        let suffixed = ["_total", "_info"].iter().any(|suffix| family.strip_suffix(suffix).is_some_and(known));
        assert!(known(family) || suffixed, "{name} has no HELP and TYPE");
    }

    let before = samples(&text);
    for (index, place) in topic.partitions.iter().enumerate() {
        let mut wire = node.connect_owner(&topic, index);
        for _ in 0..10 * (index + 1) {
            wire.publish(place.partition, &batch_of(&Seal::default(), &["a", "b", "c"]));
        }
        wire.read_all(place.partition, 0);
        // One that the other core passes on.
        let mut other = node.connect_owner(&topic, 1 - index);
        other.publish(place.partition, &batch_of(&Seal::default(), &["d"]));
    }
    let after = samples(&node.http("GET", "/metrics", None).body);
    let moved = |name: &str, shard: u16| {
        let name = format!("{name}{{shard=\"{shard}\"}}");
        let value = |samples: &BTreeMap<String, f64>| *samples.get(&name).unwrap_or_else(|| panic!("no {name}"));
        value(&after) - value(&before)
    };
    for (index, place) in topic.partitions.iter().enumerate() {
        let shard = place.shard;
        let batches = 10.0 * (index + 1) as f64;
        assert_eq!(moved("drava_published_batches_total", shard), batches + 1.0);
        assert_eq!(moved("drava_published_messages_total", shard), 3.0 * batches + 1.0);
        assert_eq!(moved("drava_requests_forwarded_total", shard), 1.0);
        assert_eq!(moved("drava_connections_accepted_total", shard), 2.0);
        for name in ["drava_published_bytes_total", "drava_received_bytes_total", "drava_sent_bytes_total"] {
            assert!(100.0 < moved(name, shard), "{name}");
        }
        assert!(1.0 <= moved("drava_store_flushes_total", shard));
        assert!(1.0 <= moved("drava_delivered_batches_total", shard));
        assert_eq!(after[&format!("drava_partitions{{shard=\"{shard}\"}}")], 1.0);
        assert_eq!(after[&format!("drava_shard_read_only{{shard=\"{shard}\"}}")], 0.0);
    }
    assert_eq!((after["drava_shards"], after["drava_topics"], after["drava_ready"]), (2.0, 1.0, 1.0));
    assert!(0.0 < after["process_resident_memory_bytes"]);
}

#[test]
fn the_openapi_document_is_served_and_every_path_in_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    let answer = node.http("GET", "/openapi.json", None);
    assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, "application/json"));
    let document = answer.json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    let mut operations = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        operations.extend(item.as_object().unwrap().keys().map(|method| format!("{} {path}", method.to_uppercase())));
    }
    let expected = [
        "DELETE /v1/topics/{name}",
        "GET /",
        "GET /healthz",
        "GET /metrics",
        "GET /openapi.json",
        "GET /readyz",
        "GET /v1/damage",
        "GET /v1/lookup",
        "GET /v1/topics",
        "GET /v1/topics/{name}",
        "POST /v1/topics",
    ];
    assert_eq!(operations, expected.map(str::to_owned).into());
    assert_eq!(create(&node, &json!({"name": "there"})).status, 201);
    for operation in expected.iter().filter(|operation| operation.starts_with("GET ")) {
        let path = operation.strip_prefix("GET ").unwrap().replace("{name}", "there");
        let path = if path == "/v1/lookup" { "/v1/lookup?topic=there".to_owned() } else { path };
        assert_eq!(node.http("GET", &path, None).status, 200, "{operation}");
    }
}

#[test]
fn one_connection_serves_many_requests_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&NodeOptions::new(dir.path()));
    // Pipelined; the last one ends the connection.
    let mut requests = "GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n".repeat(20);
    requests += "GET /healthz HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n";
    let mut text = String::new();
    node.http_send(requests.as_bytes()).read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 21);
}
