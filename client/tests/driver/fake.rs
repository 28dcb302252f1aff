//! A node in memory, to be made to misbehave: two cores on two ports that share their partitions.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use drava_protocol::batch;
use drava_protocol::frame::{self, Decoded, Frame};
use drava_protocol::message::{self as m, Kind, Message, PartitionPlace, Place, SubscriptionState, TopicPolicy};
use drava_protocol::{ErrorCode, frame::padding};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

pub const PAYLOAD_BYTES_MAX: u32 = 64 * 1024;
const CORES: usize = 2;

/// What happens to publishes from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publishes {
    Served,
    /// Kept unanswered until this changes.
    Held,
    /// Refused with this code.
    Refused(ErrorCode),
    /// Every so many, counted over all connections, the connection breaks: by turns before the batch is appended and after.
    BreakEach(u64),
}

pub struct State {
    pub topics: BTreeMap<String, Vec<u64>>,
    pub partitions: HashMap<u64, Partition>,
    pub publishes: Publishes,
    /// Publishes that arrived, whatever became of them.
    pub publishes_seen: u64,
    pub lookups: u64,
    /// The wrong core forwards and names the owner, instead of refusing.
    pub forwards: bool,
    /// The most bytes that any consumer was sent beyond its credit.
    pub overrun_max: i64,
    next_partition: u64,
    next_connection: u64,
}

#[derive(Default)]
pub struct Partition {
    pub owner: usize,
    /// Sealed batches with their offsets.
    pub batches: Vec<Vec<u8>>,
    pub end_offset: u64,
    pub producers: HashMap<u64, Producer>,
    pub subscriptions: BTreeMap<String, Subscription>,
    /// The core that each publish came to.
    pub came_to: Vec<usize>,
}

#[derive(Default)]
pub struct Producer {
    pub epoch: u32,
    pub next_sequence: u64,
    offsets: HashMap<u64, u64>,
}

#[derive(Default)]
pub struct Subscription {
    pub cursor: u64,
    pub holder: Option<(u64, u32)>,
    /// Deliveries go on from here.
    sought: Option<u64>,
}

impl Partition {
    /// The payloads of all records, in order.
    pub fn payloads(&self) -> Vec<String> {
        let mut payloads = Vec::new();
        for bytes in &self.batches {
            let records = batch::Records::open(bytes, u32::MAX).unwrap();
            payloads.extend(records.iter().map(|record| String::from_utf8(record.unwrap().payload.to_vec()).unwrap()));
        }
        payloads
    }

    fn append(&mut self, payload: &[u8]) -> Result<m::Published, ErrorCode> {
        let header = batch::check(payload).map_err(|error| error.code())?;
        let producer = self.producers.entry(header.producer).or_default();
        if header.producer_epoch < producer.epoch {
            return Err(ErrorCode::ProducerFenced);
        }
        if header.base_sequence > producer.next_sequence {
            return Err(ErrorCode::SequenceGap);
        }
        if header.base_sequence < producer.next_sequence {
            let base_offset = producer.offsets.get(&header.base_sequence).copied().ok_or(ErrorCode::SequenceOverlap)?;
            return Ok(m::Published { base_offset, duplicate: true });
        }
        let base_offset = self.end_offset;
        producer.offsets.insert(header.base_sequence, base_offset);
        producer.next_sequence += u64::from(header.record_count);
        self.end_offset += u64::from(header.record_count);
        let mut bytes = payload.to_vec();
        bytes[..16].copy_from_slice(&batch::broker_fields(base_offset, 1));
        self.batches.push(bytes);
        Ok(m::Published { base_offset, duplicate: false })
    }

    /// The batch that holds `offset`, padded, and the offset after it.
    fn read(&self, offset: u64) -> Option<(Vec<u8>, u64)> {
        self.batches.iter().find_map(|bytes| {
            let header = batch::header(bytes).unwrap();
            let next = header.base_offset + u64::from(header.record_count);
            (offset < next).then(|| ([bytes, padding(bytes.len())].concat(), next))
        })
    }

    fn locate(&self, place: Place) -> u64 {
        match place {
            Place::Earliest | Place::Time(_) => 0,
            Place::Latest => self.end_offset,
            Place::Offset(offset) => offset,
        }
    }
}

/// Ends with the test's runtime.
#[derive(Clone)]
pub struct FakeNode {
    state: Arc<Mutex<State>>,
    pub ports: [u16; CORES],
    /// Counts changes, for those who wait for one.
    changed: watch::Sender<u64>,
    /// Counts how often all connections were cut.
    cuts: watch::Sender<u64>,
}

impl FakeNode {
    pub async fn start() -> FakeNode {
        let state = State {
            topics: BTreeMap::new(),
            partitions: HashMap::new(),
            publishes: Publishes::Served,
            publishes_seen: 0,
            lookups: 0,
            forwards: false,
            overrun_max: 0,
            next_partition: 1,
            next_connection: 0,
        };
        let listeners = [listener().await, listener().await];
        let node = FakeNode {
            state: Arc::new(Mutex::new(state)),
            ports: [port(&listeners[0]), port(&listeners[1])],
            changed: watch::Sender::new(0),
            cuts: watch::Sender::new(0),
        };
        for (core, listener) in listeners.into_iter().enumerate() {
            let node = node.clone();
            tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    tokio::spawn(node.clone().serve(stream, core));
                }
            });
        }
        node
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.ports[0])
    }

    /// Changes or looks at everything; those who wait for a change look again.
    pub fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let result = f(&mut self.state());
        self.changed.send_modify(|count| *count += 1);
        result
    }

    pub fn with_partition<R>(&self, topic: &str, index: usize, f: impl FnOnce(&mut Partition) -> R) -> R {
        self.with(|state| {
            let partition = state.topics[topic][index];
            f(state.partitions.get_mut(&partition).unwrap())
        })
    }

    /// Returns once `condition` holds.
    pub async fn wait_for(&self, condition: impl Fn(&State) -> bool) {
        let mut changed = self.changed.subscribe();
        while !condition(&self.state()) {
            changed.changed().await.unwrap();
        }
    }

    pub fn cut_connections(&self) {
        self.cuts.send_modify(|count| *count += 1);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    async fn serve(self, stream: TcpStream, core: usize) {
        let id = self.with(|state| {
            state.next_connection += 1;
            state.next_connection
        });
        let (mut read, mut write) = stream.into_split();
        let (out, mut frames) = mpsc::unbounded_channel::<Vec<u8>>();
        let (ended, end) = watch::channel(());
        let connection = Connection { node: self.clone(), core, id, out, credits: Default::default(), end };
        let reading = async {
            let mut buffer = Vec::new();
            loop {
                while let Decoded::Frame(frame, taken) = frame::decode(&buffer, PAYLOAD_BYTES_MAX).unwrap() {
                    if !connection.on_frame(&frame).await {
                        return;
                    }
                    buffer.drain(..taken);
                }
                match read.read_buf(&mut buffer).await {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                }
            }
        };
        let mut cuts = self.cuts.subscribe();
        tokio::pin!(reading);
        let cut = loop {
            tokio::select! {
                frame = frames.recv() => {
                    if write.write_all(&frame.expect("the connection holds the sender")).await.is_err() {
                        break true;
                    }
                }
                () = &mut reading => break false,
                _ = cuts.changed() => break true,
            }
        };
        // A node that breaks at one publish has answered those before.
        while !cut && let Ok(frame) = frames.try_recv() {
            if write.write_all(&frame).await.is_err() {
                break;
            }
        }
        drop(ended);
        self.with(|state| {
            for partition in state.partitions.values_mut() {
                for subscription in partition.subscriptions.values_mut() {
                    if subscription.holder.is_some_and(|(connection, _)| connection == id) {
                        subscription.holder = None;
                    }
                }
            }
        });
    }
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

fn port(listener: &TcpListener) -> u16 {
    listener.local_addr().unwrap().port()
}

/// What a consumer may still be sent, and whose it is.
type Credits = Arc<Mutex<HashMap<u32, (i64, u64, String)>>>;

#[derive(Clone)]
struct Connection {
    node: FakeNode,
    core: usize,
    id: u64,
    out: mpsc::UnboundedSender<Vec<u8>>,
    credits: Credits,
    /// Closed when the connection is over.
    end: watch::Receiver<()>,
}

impl Connection {
    fn send<M: Message>(&self, message: &M, correlation: u64, owner_port: u16, payload: &[u8]) {
        let mut bytes = Vec::new();
        frame::encode(message, 0, correlation, payload.len() as u32, &mut bytes);
        if owner_port != 0 {
            frame::set_owner_port(&mut bytes, owner_port);
        }
        bytes.extend_from_slice(payload);
        bytes.extend_from_slice(padding(payload.len()));
        drop(self.out.send(bytes));
    }

    fn answer<M: Message>(&self, frame: &Frame<'_>, message: &M) {
        self.send(message, frame.header.correlation, 0, &[]);
    }

    fn refuse(&self, frame: &Frame<'_>, code: ErrorCode) {
        let error = m::Error { code: code as u16, retry_after_ms: 1, text: format!("{code:?}") };
        self.answer(frame, &error);
    }

    /// The partition if it exists; the port of its owner if that is another core. Refuses otherwise.
    fn owned(&self, frame: &Frame<'_>, partition: u64) -> Option<u16> {
        let state = self.node.state();
        let Some(found) = state.partitions.get(&partition) else {
            self.refuse(frame, ErrorCode::UnknownPartition);
            return None;
        };
        if found.owner == self.core {
            return Some(0);
        }
        if state.forwards {
            return Some(self.node.ports[found.owner]);
        }
        self.refuse(frame, ErrorCode::WrongOwner);
        None
    }

    fn topic(&self, state: &State, name: &str) -> Option<m::Topic> {
        let partitions = state.topics.get(name)?;
        let places = partitions.iter().enumerate().map(|(index, &partition)| {
            let owner = state.partitions[&partition].owner;
            let (index, shard) = (index as u32, owner as u16);
            PartitionPlace { partition, index, node: 1, shard, host: String::new(), port: self.node.ports[owner] }
        });
        let policy = TopicPolicy { partitions: partitions.len() as u32, ..TopicPolicy::default() };
        Some(m::Topic { topic: 1, name: name.to_owned(), policy, partitions: places.collect() })
    }

    /// Returns whether the connection goes on.
    async fn on_frame(&self, frame: &Frame<'_>) -> bool {
        let body = frame.body;
        match frame.header.kind {
            Kind::Hello => {
                let hello: m::Hello = m::decode(body).unwrap();
                if hello.token.as_deref() == Some("wrong") {
                    self.refuse(frame, ErrorCode::Unauthenticated);
                    return true;
                }
                let welcome = m::Welcome {
                    version: 1,
                    node: 1,
                    shard: self.core as u16,
                    shard_count: CORES as u16,
                    payload_bytes_max: PAYLOAD_BYTES_MAX,
                    in_flight_max: 1000,
                    features: 0,
                };
                self.answer(frame, &welcome);
            }
            Kind::Ping => self.answer(frame, &m::Pong {}),
            Kind::CreateTopic => {
                let request: m::CreateTopic = m::decode(body).unwrap();
                let created = self.node.with(|state| {
                    if state.topics.contains_key(&request.name) {
                        return request.exists_ok;
                    }
                    let partitions: Vec<u64> = (0..u64::from(request.policy.partitions))
                        .map(|index| {
                            let partition = state.next_partition;
                            state.next_partition += 1;
                            let owner = index as usize % CORES;
                            state.partitions.insert(partition, Partition { owner, ..Partition::default() });
                            partition
                        })
                        .collect();
                    state.topics.insert(request.name.clone(), partitions);
                    true
                });
                if created {
                    let topic = self.topic(&self.node.state(), &request.name).unwrap();
                    self.answer(frame, &topic);
                } else {
                    self.refuse(frame, ErrorCode::TopicExists);
                }
            }
            Kind::DeleteTopic => {
                let request: m::DeleteTopic = m::decode(body).unwrap();
                let deleted = self.node.with(|state| {
                    let partitions = state.topics.remove(&request.name);
                    partitions.iter().flatten().for_each(|partition| drop(state.partitions.remove(partition)));
                    partitions.is_some()
                });
                if deleted { self.answer(frame, &m::Done {}) } else { self.refuse(frame, ErrorCode::UnknownTopic) }
            }
            Kind::ListTopics => {
                let request: m::ListTopics = m::decode(body).unwrap();
                let state = self.node.state();
                let after =
                    state.topics.keys().filter(|name| name.starts_with(&request.prefix) && **name > request.after);
                // Two at a time, so that asking for more is tried.
                let mut names: Vec<String> = after.take(3).cloned().collect();
                let more = names.len() == 3;
                names.truncate(2);
                self.answer(frame, &m::Topics { names, more });
            }
            Kind::Lookup => {
                let request: m::Lookup = m::decode(body).unwrap();
                self.node.with(|state| state.lookups += 1);
                match self.topic(&self.node.state(), &request.name) {
                    Some(topic) => self.answer(frame, &topic),
                    None => self.refuse(frame, ErrorCode::UnknownTopic),
                }
            }
            Kind::DescribePartition => {
                let request: m::DescribePartition = m::decode(body).unwrap();
                let state = self.node.state();
                let partition = &state.partitions[&request.partition];
                let subscriptions = partition.subscriptions.iter().map(|(name, subscription)| SubscriptionState {
                    name: name.clone(),
                    offset: subscription.cursor,
                    connected: subscription.holder.is_some(),
                });
                let answer = m::PartitionState {
                    partition: request.partition,
                    start_offset: 0,
                    end_offset: partition.end_offset,
                    ledgers: 1,
                    stored_bytes: partition.batches.iter().map(|bytes| bytes.len() as u64).sum(),
                    subscriptions: subscriptions.collect(),
                };
                self.answer(frame, &answer);
            }
            Kind::OpenProducer => {
                let request: m::OpenProducer = m::decode(body).unwrap();
                if self.owned(frame, request.partition).is_some() {
                    let opened = self.node.with(|state| {
                        let partition = state.partitions.get_mut(&request.partition).unwrap();
                        let producer = partition.producers.entry(request.producer).or_default();
                        producer.epoch += 1;
                        m::ProducerOpened { epoch: producer.epoch, next_sequence: producer.next_sequence }
                    });
                    self.answer(frame, &opened);
                }
            }
            Kind::Publish => return self.on_publish(frame).await,
            Kind::Fetch => {
                let request: m::Fetch = m::decode(body).unwrap();
                if let Some(owner_port) = self.owned(frame, request.partition) {
                    let (connection, correlation) = (self.clone(), frame.header.correlation);
                    tokio::spawn(async move { connection.fetch(request, correlation, owner_port).await });
                }
            }
            Kind::Locate => {
                let request: m::Locate = m::decode(body).unwrap();
                if self.owned(frame, request.partition).is_some() {
                    let state = self.node.state();
                    let partition = &state.partitions[&request.partition];
                    let offset = partition.locate(request.place);
                    let located = m::Located { offset, start_offset: 0, end_offset: partition.end_offset };
                    self.answer(frame, &located);
                }
            }
            Kind::Subscribe => self.on_subscribe(frame),
            Kind::Flow => {
                let request: m::Flow = m::decode(body).unwrap();
                self.node.with(|_| {
                    if let Some(credit) = self.credits.lock().unwrap().get_mut(&request.consumer) {
                        credit.0 += i64::from(request.bytes);
                    }
                });
            }
            Kind::Ack => {
                let request: m::Ack = m::decode(body).unwrap();
                let held = self.with_held(request.consumer, |subscription| {
                    subscription.cursor = subscription.cursor.max(request.offset);
                });
                if frame.header.correlation != 0 {
                    match held {
                        Some(()) => self.answer(frame, &m::Done {}),
                        None => self.refuse(frame, ErrorCode::UnknownSubscription),
                    }
                }
            }
            Kind::Seek => {
                let request: m::Seek = m::decode(body).unwrap();
                let partition = self.credits.lock().unwrap().get(&request.consumer).map(|(_, partition, _)| *partition);
                let end_offset = partition.map_or(0, |id| self.node.state().partitions[&id].end_offset);
                let held = self.with_held(request.consumer, |subscription| {
                    let offset = match request.place {
                        Place::Earliest | Place::Time(_) => 0,
                        Place::Latest => end_offset,
                        Place::Offset(offset) => offset.min(end_offset),
                    };
                    (subscription.cursor, subscription.sought) = (offset, Some(offset));
                    // Before anything is delivered from there.
                    self.answer(frame, &m::Located { offset, start_offset: 0, end_offset });
                });
                if held.is_none() {
                    self.refuse(frame, ErrorCode::UnknownSubscription);
                }
            }
            Kind::CloseConsumer => {
                let request: m::CloseConsumer = m::decode(body).unwrap();
                self.with_held(request.consumer, |subscription| subscription.holder = None);
                self.credits.lock().unwrap().remove(&request.consumer);
                self.answer(frame, &m::Done {});
            }
            Kind::DeleteSubscription => {
                let request: m::DeleteSubscription = m::decode(body).unwrap();
                self.node.with(|state| {
                    state.partitions.get_mut(&request.partition).unwrap().subscriptions.remove(&request.subscription);
                });
                self.answer(frame, &m::Done {});
            }
            kind => panic!("a client does not send {kind:?}"),
        }
        true
    }

    async fn on_publish(&self, frame: &Frame<'_>) -> bool {
        let partition = m::decode::<m::Publish>(frame.body).unwrap().partition;
        let (seen, mode) = self.node.with(|state| {
            state.publishes_seen += 1;
            (state.publishes_seen, state.publishes)
        });
        match mode {
            Publishes::Served => {}
            Publishes::Held => self.node.wait_for(|state| state.publishes != Publishes::Held).await,
            Publishes::Refused(code) => {
                self.refuse(frame, code);
                return true;
            }
            Publishes::BreakEach(each) if seen % (2 * each) == 0 => return false,
            Publishes::BreakEach(_) => {}
        }
        let Some(owner_port) = self.owned(frame, partition) else { return true };
        let appended = self.node.with(|state| {
            let partition = state.partitions.get_mut(&partition).unwrap();
            partition.came_to.push(self.core);
            partition.append(frame.payload)
        });
        if matches!(mode, Publishes::BreakEach(each) if seen % each == 0) {
            return false;
        }
        match appended {
            Ok(published) => self.send(&published, frame.header.correlation, owner_port, &[]),
            Err(code) => self.refuse(frame, code),
        }
        true
    }

    async fn fetch(self, request: m::Fetch, correlation: u64, owner_port: u16) {
        let has_more = |state: &State| {
            state.partitions.get(&request.partition).is_none_or(|partition| request.offset != partition.end_offset)
        };
        let waited =
            tokio::time::timeout(Duration::from_millis(request.wait_ms.into()), self.node.wait_for(has_more)).await;
        let state = self.node.state();
        let Some(partition) = state.partitions.get(&request.partition) else {
            let code = ErrorCode::UnknownPartition as u16;
            let error = m::Error { code, retry_after_ms: 0, text: String::new() };
            return self.send(&error, correlation, 0, &[]);
        };
        if partition.end_offset < request.offset {
            let code = ErrorCode::OffsetOutOfRange as u16;
            let error = m::Error { code, retry_after_ms: 0, text: String::new() };
            return self.send(&error, correlation, 0, &[]);
        }
        let (payload, next_offset) = match waited {
            Ok(()) => partition.read(request.offset).unwrap(),
            Err(_) => (Vec::new(), request.offset),
        };
        let fetched = m::Fetched { next_offset, start_offset: 0, end_offset: partition.end_offset };
        self.send(&fetched, correlation, owner_port, &payload);
    }

    fn on_subscribe(&self, frame: &Frame<'_>) {
        let request: m::Subscribe = m::decode(frame.body).unwrap();
        if self.owned(frame, request.partition).is_none() {
            return;
        }
        let holder = (self.id, request.consumer);
        let attached = self.node.with(|state| {
            let partition = state.partitions.get_mut(&request.partition).unwrap();
            let start = partition.locate(request.start);
            let subscription = partition.subscriptions.entry(request.subscription.clone()).or_insert(Subscription {
                cursor: start,
                holder: None,
                sought: None,
            });
            if subscription.holder.is_some() && !request.take_over {
                return None;
            }
            subscription.holder = Some(holder);
            Some((subscription.cursor, partition.end_offset))
        });
        let Some((offset, end_offset)) = attached else {
            return self.refuse(frame, ErrorCode::SubscriptionBusy);
        };
        let credit = (0, request.partition, request.subscription.clone());
        self.credits.lock().unwrap().insert(request.consumer, credit);
        self.answer(frame, &m::Subscribed { offset, start_offset: 0, end_offset });
        let connection = self.clone();
        tokio::spawn(async move {
            let mut end = connection.end.clone();
            tokio::select! {
                () = connection.deliver(request, offset) => {}
                _ = end.changed() => {}
            }
        });
    }

    /// Pushes one batch at a time while there is credit.
    async fn deliver(&self, request: m::Subscribe, mut position: u64) {
        let holder = Some((self.id, request.consumer));
        let mut changed = self.node.changed.subscribe();
        loop {
            {
                let mut state = self.node.state();
                let Some(partition) = state.partitions.get_mut(&request.partition) else { return };
                match partition.subscriptions.get_mut(&request.subscription) {
                    Some(found) if found.holder == holder => position = found.sought.take().unwrap_or(position),
                    Some(_) | None => return,
                }
                let mut credits = self.credits.lock().unwrap();
                let Some(credit) = credits.get_mut(&request.consumer) else { return };
                if 0 < credit.0
                    && let Some((payload, next_offset)) = partition.read(position)
                {
                    credit.0 -= payload.len() as i64;
                    position = next_offset;
                    let end_offset = partition.end_offset;
                    let deliver = m::Deliver { consumer: request.consumer, next_offset, end_offset };
                    self.send(&deliver, 0, 0, &payload);
                    state.overrun_max = state.overrun_max.max(-credit.0);
                    continue;
                }
            }
            changed.changed().await.unwrap();
        }
    }

    fn with_held(&self, consumer: u32, f: impl FnOnce(&mut Subscription)) -> Option<()> {
        let (_, partition, name) = self.credits.lock().unwrap().get(&consumer)?.clone();
        self.node.with(|state| {
            let subscription = state.partitions.get_mut(&partition)?.subscriptions.get_mut(&name)?;
            (subscription.holder == Some((self.id, consumer))).then(|| f(subscription))
        })
    }
}
