//! A real node in a process of its own, and a client that speaks the wire protocol over a blocking socket.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod disk;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use drava_protocol::batch::{self, Builder, NewRecord, Seal};
use drava_protocol::frame::{self, Decoded};
use drava_protocol::message::{
    self, CreateTopic, Fetch, Hello, Kind, Lookup, Message, Publish, Published, Topic, TopicPolicy,
};

/// How long anything may take before a test gives up. Generous: the machine may be busy, and no test measures time.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A node with a data directory, ended with this value.
pub struct Node {
    child: Child,
    pub listen: SocketAddr,
    pub shards: Vec<u16>,
    pub admin: SocketAddr,
}

/// How to start a node.
#[derive(Clone)]
pub struct NodeOptions {
    pub data_dir: PathBuf,
    pub shards: u16,
    /// Port 0: the system chooses, for the shards too.
    pub listen: SocketAddr,
    /// Environment variables of options, such as `DRAVA_NETWORK_FRAME_TIMEOUT_MS`.
    pub env: Vec<(&'static str, String)>,
}

impl NodeOptions {
    pub fn new(data_dir: &Path) -> NodeOptions {
        NodeOptions {
            data_dir: data_dir.to_owned(),
            shards: 2,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            env: Vec::new(),
        }
    }

    pub fn with(mut self, variable: &'static str, value: impl ToString) -> NodeOptions {
        self.env.push((variable, value.to_string()));
        self
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drava"));
        command
            .args(["node", "--data-dir"])
            .arg(&self.data_dir)
            .args(["--listen", &self.listen.to_string(), "--admin-listen", "127.0.0.1:0"])
            .args(["--shards", &self.shards.to_string()])
            // Small, so that tests roll, recycle and recover; unpinned, so that they run side by side.
            .env("DRAVA_CORES", "none")
            .env("DRAVA_STORAGE_SEGMENT_BYTES", (8u64 << 20).to_string())
            .env("DRAVA_STORAGE_DISK_RESERVE_BYTES", "0")
            .env("DRAVA_LOG_LEVEL", "warn")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        command
    }
}

impl Node {
    /// Starts a node and waits until it serves.
    pub fn start(options: &NodeOptions) -> Node {
        Node::try_start(options, Stdio::inherit())
            .unwrap_or_else(|status| panic!("the node ended before it served: {status}"))
    }

    /// Starts a node with its log in `log` and waits until it serves; the exit status of one that does not.
    pub fn try_start(options: &NodeOptions, log: impl Into<Stdio>) -> Result<Node, ExitStatus> {
        let ports_file = options.data_dir.join("ports.json");
        drop(std::fs::remove_file(&ports_file));
        let child = options.command().stderr(log).spawn().expect("the node's binary starts");
        // Ends the process also when the waiting fails.
        let mut unready = Unready(Some(child));
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = unready.0.as_mut().expect("it is still here").try_wait().unwrap() {
                return Err(status);
            }
            assert!(Instant::now() < deadline, "the node does not serve after {PATIENCE:?}");
            let ports = std::fs::read_to_string(&ports_file).ok();
            let ports = ports.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
            if let Some(ports) = ports {
                let address = |key: &str| ports[key].as_str().unwrap().parse().unwrap();
                let shards = ports["shards"].as_array().unwrap().iter().map(|port| port.as_u64().unwrap() as u16);
                let (listen, admin, shards) = (address("listen"), address("admin"), shards.collect());
                return Ok(Node { listen, shards, admin, child: unready.0.take().expect("it is still here") });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// kill -9.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and the exit status.
    pub fn stop(self) -> ExitStatus {
        self.terminate();
        self.wait()
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// The exit status of a node that was told to stop.
    pub fn wait(mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the node does not stop after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The exit status of a node that ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    pub fn connect(&self) -> Wire {
        Wire::connect(self.listen).expect("a session with the node")
    }

    /// A session with the core that owns a partition of the topic's first.
    pub fn connect_owner(&self, topic: &Topic, index: usize) -> Wire {
        let port = topic.partitions[index].port;
        Wire::connect(SocketAddr::new(self.listen.ip(), port)).expect("a session with the owning core")
    }

    /// GET of a path of the admin: status and body.
    pub fn http_get(&self, path: &str) -> (u16, String) {
        let answer = self.http("GET", path, None);
        (answer.status, answer.body)
    }

    /// One request to the admin, with a JSON body if there is one.
    pub fn http(&self, method: &str, path: &str, json: Option<&str>) -> HttpAnswer {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n");
        if let Some(json) = json {
            request += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", json.len());
        }
        request += "\r\n";
        request += json.unwrap_or_default();
        HttpAnswer::read(&mut self.http_send(request.as_bytes()))
    }

    /// Sends bytes to the admin.
    pub fn http_send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    }

    /// A metric, summed over all shards.
    pub fn metric(&self, name: &str) -> f64 {
        let (status, text) = self.http_get("/metrics");
        assert_eq!(status, 200);
        let values: Vec<f64> = text
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])))
            .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
            .collect();
        assert!(!values.is_empty(), "there is no metric {name}");
        values.iter().sum()
    }

    /// Resident memory of the node, in bytes. Source: proc_pid_statm(5).
    pub fn resident_bytes(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/statm", self.pid())).unwrap();
        let pages: u64 = text.split_ascii_whitespace().nth(1).unwrap().parse().unwrap();
        pages * rustix::param::page_size() as u64
    }

    /// Fails unless the node lives and takes and gives messages as if nothing had happened.
    pub fn assert_serves(&self) {
        let (status, body) = self.http_get("/healthz");
        assert_eq!(status, 200, "{body}");
        let topic = self.connect().topic("still-served", TopicPolicy { partitions: 2, ..TopicPolicy::default() });
        for (index, place) in topic.partitions.iter().enumerate() {
            let mut wire = self.connect_owner(&topic, index);
            let base_offset = wire.publish(place.partition, &batch_of(&Seal::default(), &["alive"])).base_offset;
            let read = wire.read_all(place.partition, base_offset);
            assert_eq!(read.into_values().collect::<Vec<_>>(), [b"alive"]);
        }
    }
}

/// What the admin answered.
#[derive(Debug)]
pub struct HttpAnswer {
    pub status: u16,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl HttpAnswer {
    /// Reads an answer that ends with its connection.
    pub fn read(stream: &mut TcpStream) -> HttpAnswer {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP answer: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let headers = head.lines().skip(1).map(|line| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_ascii_lowercase(), value.trim().to_owned())
        });
        HttpAnswer { status, headers: headers.collect(), body: body.to_owned() }
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// How many rounds or cases of a test: the number in `variable`, which the long forms set, or `usual`.
pub fn how_many(variable: &str, usual: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")),
        Err(_) => usual,
    }
}

/// An error and what caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Waits until `condition` holds, at most for [`PATIENCE`].
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "still waiting after {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Numbers that are the same on every run with the same seed (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to `bound`, without it.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// A node that does not serve yet.
struct Unready(Option<Child>);

impl Drop for Unready {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A frame with its own memory.
#[derive(Clone, Debug)]
pub struct Received {
    pub kind: Kind,
    pub correlation: u64,
    pub owner_port: u16,
    pub body: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Received {
    pub fn error(&self) -> message::Error {
        assert_eq!(self.kind, Kind::Error, "{self:?}");
        message::decode(&self.body).unwrap()
    }

    pub fn code(&self) -> drava_protocol::ErrorCode {
        drava_protocol::ErrorCode::from_number(self.error().code).unwrap()
    }
}

/// Decodes the body of a frame that must be of that kind.
#[macro_export]
macro_rules! expect {
    ($received:expr, $kind:ident) => {{
        let received = $received;
        if received.kind == drava_protocol::message::Kind::Error {
            panic!("expected {}, got {:?}", stringify!($kind), received.error());
        }
        assert_eq!(received.kind, drava_protocol::message::Kind::$kind);
        drava_protocol::message::decode::<drava_protocol::message::$kind>(&received.body).unwrap()
    }};
}

/// One session over a blocking socket.
pub struct Wire {
    pub stream: TcpStream,
    buffer: Vec<u8>,
    correlation: u64,
}

impl Wire {
    /// A connection without a session.
    pub fn raw(address: SocketAddr) -> std::io::Result<Wire> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Wire { stream, buffer: Vec::new(), correlation: 0 })
    }

    pub fn connect(address: SocketAddr) -> std::io::Result<Wire> {
        let mut wire = Wire::raw(address)?;
        let hello =
            Hello { version_min: frame::VERSION, version_max: frame::VERSION, client: "test".to_owned(), token: None };
        let answer = wire.call(&hello)?;
        expect!(answer, Welcome);
        Ok(wire)
    }

    /// The same connection for a thread that only sends; its correlations start at 1.
    pub fn sender(&self) -> Wire {
        Wire { stream: self.stream.try_clone().unwrap(), buffer: Vec::new(), correlation: 0 }
    }

    pub fn send<M: Message>(&mut self, message: &M, payload: &[u8]) -> std::io::Result<u64> {
        self.correlation += 1;
        let mut out = Vec::new();
        frame::encode(message, 0, self.correlation, payload.len() as u32, &mut out);
        out.extend_from_slice(payload);
        out.extend_from_slice(frame::padding(payload.len()));
        self.stream.write_all(&out)?;
        Ok(self.correlation)
    }

    pub fn receive(&mut self) -> std::io::Result<Received> {
        loop {
            match frame::decode(&self.buffer, u32::MAX).expect("a node sends valid frames") {
                Decoded::Frame(frame, bytes) => {
                    let received = Received {
                        kind: frame.header.kind,
                        correlation: frame.header.correlation,
                        owner_port: frame.header.owner_port,
                        body: frame.body.to_vec(),
                        payload: frame.payload.to_vec(),
                    };
                    self.buffer.drain(..bytes);
                    return Ok(received);
                }
                Decoded::NeedBytes(_) => {
                    let mut chunk = [0; 64 * 1024];
                    match self.stream.read(&mut chunk)? {
                        0 => return Err(ErrorKind::UnexpectedEof.into()),
                        bytes => self.buffer.extend_from_slice(&chunk[..bytes]),
                    }
                }
            }
        }
    }

    /// A request without payload and its answer.
    pub fn call<M: Message>(&mut self, message: &M) -> std::io::Result<Received> {
        self.call_with(message, &[])
    }

    pub fn call_with<M: Message>(&mut self, message: &M, payload: &[u8]) -> std::io::Result<Received> {
        let correlation = self.send(message, payload)?;
        let answer = self.receive()?;
        assert_eq!(answer.correlation, correlation, "{answer:?}");
        Ok(answer)
    }

    /// Makes a topic, or finds it as it is.
    pub fn topic(&mut self, name: &str, policy: TopicPolicy) -> Topic {
        let create = CreateTopic { name: name.to_owned(), policy, exists_ok: true };
        expect!(self.call(&create).unwrap(), Topic)
    }

    pub fn lookup(&mut self, name: &str) -> Topic {
        expect!(self.call(&Lookup { name: name.to_owned() }).unwrap(), Topic)
    }

    pub fn publish(&mut self, partition: u64, batch: &[u8]) -> Published {
        expect!(self.call_with(&Publish { partition }, batch).unwrap(), Published)
    }

    /// All records from `offset` to the end that the partition has now: offset and payload.
    pub fn read_all(&mut self, partition: u64, mut offset: u64) -> BTreeMap<u64, Vec<u8>> {
        let mut records = BTreeMap::new();
        loop {
            let fetch = Fetch { partition, offset, bytes_max: 1 << 20, wait_ms: 0 };
            let answer = self.call(&fetch).unwrap();
            let payload = answer.payload.clone();
            let fetched = expect!(answer, Fetched);
            for (at, bytes) in records_of(&payload) {
                if offset <= at {
                    assert!(records.insert(at, bytes).is_none(), "offset {at} was read twice");
                }
            }
            if fetched.next_offset == offset {
                assert_eq!(offset, fetched.end_offset, "a fetch below the end answered nothing");
                return records;
            }
            offset = fetched.next_offset;
        }
    }
}

/// Offsets and payloads of the batches in the payload of a frame.
pub fn records_of(mut payload: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut records = Vec::new();
    while !payload.is_empty() {
        let header = batch::header(payload).unwrap();
        let bytes = header.batch_bytes as usize;
        batch::check(&payload[..bytes]).unwrap();
        let opened = batch::Records::open(payload, 64 << 20).unwrap();
        for record in opened.iter() {
            let record = record.unwrap();
            records.push((record.offset, record.payload.to_vec()));
        }
        payload = &payload[frame::padded(bytes)..];
    }
    records
}

/// A batch of records with these payloads.
pub fn batch_of<P: AsRef<[u8]>>(seal: &Seal, payloads: &[P]) -> Vec<u8> {
    let mut builder = Builder::new(64 << 20);
    for payload in payloads {
        builder.push(&NewRecord { payload: payload.as_ref(), event_time_ms: 1, ..NewRecord::default() }).unwrap();
    }
    let mut out = Vec::new();
    builder.seal(seal, &mut out);
    out
}
