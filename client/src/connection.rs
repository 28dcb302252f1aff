//! One TCP connection on tokio, shared by everything that talks to one core of a node.
//!
//! A task owns the socket and the [`Session`]. It takes commands from a bounded channel while the session has room for
//! requests and the outgoing buffer for bytes; that is how a slow node slows its producers. It never waits for those who
//! get the answers: each has room reserved for what it asked for.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use drava_protocol::message::{self, Seek, Subscribe, Welcome};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::client::Options;
use crate::error::{CallError, ConnectError};
use crate::producer::Lane;
use crate::producer_core::Transmit;
use crate::session::{Answer, Correlation, Event, Limits, Received, Request, RequestError, Session, SessionError};

/// Commands that wait for the task of a connection; who has more waits.
const COMMANDS_MAX: usize = 256;
/// No command is taken while more bytes than these wait for the socket.
const UNSENT_BYTES_MAX: usize = 1024 * 1024;
/// The receive buffer grows in steps of at least this.
const RECEIVE_BYTES: usize = 64 * 1024;
/// A node that is silent for so many keepalive periods, asked for a sign of life in each, is gone.
const SILENT_PERIODS_MAX: u32 = 3;

/// A good answer with the payload that it points into.
#[derive(Debug)]
pub(crate) struct Reply {
    pub answer: Answer,
    pub payload: Bytes,
    /// Another core answered: look for the partition again.
    pub elsewhere: bool,
}

type ReplySender = oneshot::Sender<Result<Reply, CallError>>;
type Encode = Box<dyn FnOnce(&mut Session<Tag>, Tag, &mut Vec<u8>) -> Result<Correlation, RequestError> + Send>;

enum Tag {
    Call(ReplySender),
    /// A call that moves a subscription: what its inbox holds when the answer comes is of the old place.
    Seek {
        inbox: Arc<Inbox>,
        reply: ReplySender,
    },
    Publish {
        lane: Arc<Lane>,
        batch: u64,
        attempt: u32,
    },
    KeepAlive,
}

enum Command {
    Call { encode: Encode, reply: ReplySender },
    Seek { seek: Seek, inbox: Arc<Inbox>, reply: ReplySender },
    Publish { lane: Arc<Lane>, partition: u64, transmit: Transmit },
    Attach { consumer: u32, inbox: Arc<Inbox> },
    Detach { consumer: u32 },
    Flow { consumer: u32, bytes: u32 },
    Ack { consumer: u32, offset: u64 },
}

/// Deliveries that wait for their consumer. Bounded by the credit that the consumer grants, which the session enforces;
/// deliveries without bytes are not kept, unless they name damage.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    deliveries: Mutex<VecDeque<Delivery>>,
    pub arrived: Notify,
    /// The node complained about something on this connection: it may be about this consumer.
    doubted: AtomicBool,
    /// Bytes of deliveries that were thrown away, and whose credit nobody has given back yet.
    cleared_bytes: AtomicU32,
}

#[derive(Debug)]
pub(crate) struct Delivery {
    pub next_offset: u64,
    pub payload: Bytes,
    /// Instead of a payload: the first of the messages, up to `next_offset`, that are damaged at the node.
    pub damaged_from: Option<u64>,
}

impl Inbox {
    pub fn pop(&self) -> Option<Delivery> {
        self.deliveries.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Whether to ask if the node still knows the consumer; says so once for each complaint.
    pub fn is_doubted(&self) -> bool {
        self.doubted.swap(false, Ordering::AcqRel)
    }

    fn doubt(&self) {
        self.doubted.store(true, Ordering::Release);
        self.arrived.notify_one();
    }

    /// Throws away what has come so far.
    fn clear(&self) {
        let deliveries = std::mem::take(&mut *self.deliveries.lock().unwrap_or_else(PoisonError::into_inner));
        let bytes = deliveries.iter().map(|delivery| delivery.payload.len() as u32).sum();
        self.cleared_bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    /// The bytes that were thrown away since this was last asked.
    pub fn take_cleared_bytes(&self) -> u32 {
        self.cleared_bytes.swap(0, Ordering::AcqRel)
    }

    fn push(&self, delivery: Delivery) {
        self.deliveries.lock().unwrap_or_else(PoisonError::into_inner).push_back(delivery);
        self.arrived.notify_one();
    }
}

/// The door to a connection's task. When all are dropped, what was sent is finished and the connection closed.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    commands: mpsc::Sender<Command>,
    welcome: Arc<Welcome>,
    next_consumer: Arc<AtomicU32>,
}

impl Connection {
    /// Connects and shakes hands.
    pub async fn open(host: &str, port: u16, options: &Options) -> Result<Connection, ConnectError> {
        let opening = Self::open_untimed(host, port, options);
        match tokio::time::timeout(options.connect_timeout, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(ConnectError::TimedOut { after: options.connect_timeout }),
        }
    }

    async fn open_untimed(host: &str, port: u16, options: &Options) -> Result<Connection, ConnectError> {
        let connect = async {
            let stream = TcpStream::connect((host, port)).await?;
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        let mut stream =
            connect.await.map_err(|source| ConnectError::Connect { host: host.to_owned(), port, source })?;
        let mut session = Session::new(Limits::default());
        let mut hello = Vec::new();
        session.hello(&options.client_name, options.token.as_deref(), &mut hello);
        stream.write_all(&hello).await.map_err(ConnectError::Handshake)?;
        let mut incoming = BytesMut::with_capacity(RECEIVE_BYTES);
        loop {
            match session.receive(&incoming)? {
                Received::Event { event: Event::Welcome(welcome), consumed } => {
                    incoming.advance(consumed);
                    let peer = stream.peer_addr().map_err(ConnectError::Handshake)?;
                    return Ok(Self::start(stream, peer, session, incoming, welcome, options.keep_alive));
                }
                Received::Event { event: Event::Refused(refusal), .. } => return Err(ConnectError::Refused(refusal)),
                // The session lets nothing else pass before Welcome.
                Received::Event { event: _, consumed } => incoming.advance(consumed),
                Received::NeedBytes(_) => {
                    incoming.reserve(RECEIVE_BYTES);
                    let bytes = stream.read_buf(&mut incoming).await.map_err(ConnectError::Handshake)?;
                    if bytes == 0 {
                        return Err(ConnectError::Handshake(std::io::ErrorKind::UnexpectedEof.into()));
                    }
                }
            }
        }
    }

    fn start(
        stream: TcpStream,
        peer: SocketAddr,
        session: Session<Tag>,
        incoming: BytesMut,
        welcome: Welcome,
        keep_alive: Duration,
    ) -> Connection {
        let (commands, waiting) = mpsc::channel(COMMANDS_MAX);
        let task = Task { session, incoming, outgoing: Vec::new(), sent: 0, inboxes: HashMap::new() };
        tokio::spawn(async move {
            match task.run(stream, waiting, keep_alive).await {
                Ok(()) => tracing::debug!(%peer, "closed the connection"),
                Err(error) => tracing::debug!(%peer, %error, "lost the connection"),
            }
        });
        Connection { commands, welcome: Arc::new(welcome), next_consumer: Arc::new(AtomicU32::new(1)) }
    }

    /// The largest batch that the node takes, in bytes.
    pub fn payload_bytes_max(&self) -> u32 {
        self.welcome.payload_bytes_max
    }

    pub fn is_closed(&self) -> bool {
        self.commands.is_closed()
    }

    /// Returns when the connection is lost.
    pub async fn closed(&self) {
        self.commands.closed().await
    }

    /// A number for a consumer that no other on this connection has.
    pub fn new_consumer(&self) -> u32 {
        self.next_consumer.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a request and waits for its answer.
    pub async fn call<M>(&self, message: M, timeout: Duration) -> Result<Reply, CallError>
    where
        M: Request + Send + 'static,
    {
        self.exchange(Box::new(move |session, tag, out| session.request(&message, tag, out)), timeout).await
    }

    /// Subscribes; deliveries come into `inbox`.
    pub async fn subscribe(
        &self,
        subscribe: Subscribe,
        inbox: Arc<Inbox>,
        timeout: Duration,
    ) -> Result<Reply, CallError> {
        let consumer = subscribe.consumer;
        self.command(Command::Attach { consumer, inbox }).await?;
        let subscribed =
            self.exchange(Box::new(move |session, tag, out| session.subscribe(&subscribe, tag, out)), timeout).await;
        if subscribed.is_err() {
            self.command(Command::Detach { consumer }).await?;
        }
        subscribed
    }

    /// Ends a consumer; its subscription stays.
    pub async fn close_consumer(&self, consumer: u32, timeout: Duration) -> Result<Reply, CallError> {
        let closed =
            self.exchange(Box::new(move |session, tag, out| session.close_consumer(consumer, tag, out)), timeout).await;
        self.command(Command::Detach { consumer }).await?;
        closed
    }

    pub async fn flow(&self, consumer: u32, bytes: u32) -> Result<(), CallError> {
        self.command(Command::Flow { consumer, bytes }).await
    }

    /// Moves a cursor without being told when that is durable.
    pub async fn ack(&self, consumer: u32, offset: u64) -> Result<(), CallError> {
        self.command(Command::Ack { consumer, offset }).await
    }

    /// Sends a batch; the answer goes to its lane.
    pub async fn publish(&self, lane: Arc<Lane>, partition: u64, transmit: Transmit) -> Result<(), CallError> {
        self.command(Command::Publish { lane, partition, transmit }).await
    }

    /// Moves the cursor of a consumer. When the answer is here, `inbox` holds deliveries of the new place alone.
    pub async fn seek(&self, seek: Seek, inbox: Arc<Inbox>, timeout: Duration) -> Result<Reply, CallError> {
        self.ask(|reply| Command::Seek { seek, inbox, reply }, timeout).await
    }

    async fn exchange(&self, encode: Encode, timeout: Duration) -> Result<Reply, CallError> {
        self.ask(|reply| Command::Call { encode, reply }, timeout).await
    }

    async fn ask(&self, command: impl FnOnce(ReplySender) -> Command, timeout: Duration) -> Result<Reply, CallError> {
        let (reply, answered) = oneshot::channel();
        let exchange = async {
            self.command(command(reply)).await?;
            answered.await.unwrap_or(Err(CallError::Disconnected))
        };
        tokio::time::timeout(timeout, exchange).await.unwrap_or(Err(CallError::TimedOut { after: timeout }))
    }

    async fn command(&self, command: Command) -> Result<(), CallError> {
        self.commands.send(command).await.map_err(|_| CallError::Disconnected)
    }
}

/// Why a connection ended that nobody closed.
#[derive(Debug, thiserror::Error)]
enum LostError {
    #[error("the connection failed: {0}")]
    Io(#[from] std::io::Error),
    #[error("the node closed the connection")]
    Eof,
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("the node gave no sign of life")]
    Silent,
}

struct Task {
    session: Session<Tag>,
    incoming: BytesMut,
    outgoing: Vec<u8>,
    /// Bytes of `outgoing` that are with the socket.
    sent: usize,
    inboxes: HashMap<u32, Arc<Inbox>>,
}

impl Task {
    /// Ends in order when all doors are dropped and everything was sent.
    async fn run(
        mut self,
        mut stream: TcpStream,
        mut commands: mpsc::Receiver<Command>,
        keep_alive: Duration,
    ) -> Result<(), LostError> {
        let (mut read, mut write) = stream.split();
        let mut tick = tokio::time::interval(keep_alive);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut silent_periods = 0;
        let mut open = true;
        self.on_bytes()?;
        loop {
            if self.sent == self.outgoing.len() {
                self.outgoing.clear();
                self.sent = 0;
                if !open {
                    return Ok(());
                }
            }
            tokio::select! {
                written = write.write(&self.outgoing[self.sent..]), if self.sent < self.outgoing.len() => {
                    self.sent += written?;
                }
                received = read.read_buf(&mut self.incoming) => {
                    if received? == 0 {
                        return Err(LostError::Eof);
                    }
                    silent_periods = 0;
                    self.on_bytes()?;
                }
                command = commands.recv(), if open && self.takes_commands() => match command {
                    None => open = false,
                    Some(command) => {
                        self.on_command(command);
                        // One write for all that came together.
                        while self.takes_commands() && let Ok(command) = commands.try_recv() {
                            self.on_command(command);
                        }
                    }
                },
                _ = tick.tick() => {
                    if silent_periods == SILENT_PERIODS_MAX {
                        return Err(LostError::Silent);
                    }
                    if 0 < silent_periods && self.session.has_room() {
                        let ping = self.session.request(&message::Ping {}, Tag::KeepAlive, &mut self.outgoing);
                        debug_assert!(ping.is_ok(), "{ping:?}");
                    }
                    silent_periods += 1;
                }
            }
        }
    }

    fn takes_commands(&self) -> bool {
        self.session.has_room() && self.outgoing.len() - self.sent < UNSENT_BYTES_MAX
    }

    fn on_command(&mut self, command: Command) {
        let out = &mut self.outgoing;
        match command {
            Command::Call { encode, reply } => {
                // Nobody waits any longer: it timed out before it was sent.
                if reply.is_closed() {
                    return;
                }
                // A request that is refused here drops its tag, and with it the reply; `takes_commands` saw that there is
                // room, and names that a frame cannot hold are refused before they come here.
                if let Err(error) = encode(&mut self.session, Tag::Call(reply), out) {
                    tracing::debug!(%error, "a request was not sent");
                }
            }
            Command::Seek { seek, inbox, reply } => {
                if let Err(error) = self.session.request(&seek, Tag::Seek { inbox, reply }, out) {
                    tracing::debug!(%error, "a seek was not sent");
                }
            }
            Command::Publish { lane, partition, transmit } => {
                let Transmit { batch, attempt, bytes } = transmit;
                let tag = Tag::Publish { lane: lane.clone(), batch, attempt };
                if let Err(error) = self.session.publish(partition, &bytes, tag, out) {
                    lane.on_not_sendable(error);
                }
            }
            Command::Attach { consumer, inbox } => {
                self.inboxes.insert(consumer, inbox);
            }
            Command::Detach { consumer } => {
                self.inboxes.remove(&consumer);
            }
            Command::Flow { consumer, bytes } => {
                if let Err(error) = self.session.flow(consumer, bytes, out) {
                    tracing::debug!(%error, "credit for a consumer that is gone");
                }
            }
            Command::Ack { consumer, offset } => {
                if let Err(error) = self.session.ack(consumer, offset, out) {
                    tracing::debug!(%error, "an ack of a consumer that is gone");
                }
            }
        }
    }

    /// Hears every whole frame that was received, and makes room for the next.
    fn on_bytes(&mut self) -> Result<(), LostError> {
        loop {
            match self.session.receive(&self.incoming)? {
                Received::NeedBytes(bytes) => {
                    // The session never needs more than its limits allow.
                    let missing = bytes.saturating_sub(self.incoming.len());
                    self.incoming.reserve(missing.max(RECEIVE_BYTES));
                    return Ok(());
                }
                Received::Event { event, consumed } => self.on_event(event, consumed),
            }
        }
    }

    fn on_event(&mut self, event: Event<Tag>, consumed: usize) {
        match event {
            Event::Answer { tag: Tag::Publish { lane, batch, attempt }, owner_port, answer, correlation: _ } => {
                self.incoming.advance(consumed);
                lane.on_answer(batch, attempt, owner_port != 0, answer);
            }
            Event::Answer { tag: Tag::Call(reply), owner_port, answer, correlation: _ } => {
                let frame = self.incoming.split_to(consumed).freeze();
                let answer = answer.map_err(CallError::Refused).map(|answer| {
                    let payload = match &answer {
                        Answer::Fetched { payload, .. } => frame.slice(payload.clone()),
                        _ => Bytes::new(),
                    };
                    Reply { answer, payload, elsewhere: owner_port != 0 }
                });
                // Whoever asked may have stopped waiting.
                drop(reply.send(answer));
            }
            Event::Answer { tag: Tag::Seek { inbox, reply }, answer, correlation: _, owner_port } => {
                self.incoming.advance(consumed);
                if answer.is_ok() {
                    inbox.clear();
                }
                let answer = answer.map_err(CallError::Refused);
                let reply_of = |answer| Reply { answer, payload: Bytes::new(), elsewhere: owner_port != 0 };
                // Whoever asked may have stopped waiting.
                drop(reply.send(answer.map(reply_of)));
            }
            Event::Deliver { consumer, next_offset, end_offset: _, payload } => {
                let frame = self.incoming.split_to(consumed).freeze();
                if let Some(inbox) = self.inboxes.get(&consumer)
                    && !payload.is_empty()
                {
                    inbox.push(Delivery { next_offset, payload: frame.slice(payload), damaged_from: None });
                }
            }
            Event::Damaged { consumer, first_offset, next_offset } => {
                self.incoming.advance(consumed);
                if let Some(inbox) = self.inboxes.get(&consumer) {
                    inbox.push(Delivery { next_offset, payload: Bytes::new(), damaged_from: Some(first_offset) });
                }
            }
            Event::Refused(refusal) => {
                self.incoming.advance(consumed);
                tracing::warn!(code = %refusal.code, text = refusal.text, "the node complains about the connection");
                // A subscription that ended at the node is told of without a number.
                self.inboxes.values().for_each(|inbox| inbox.doubt());
            }
            Event::Answer { tag: Tag::KeepAlive, .. } | Event::Welcome(_) | Event::Ignored => {
                self.incoming.advance(consumed);
            }
        }
    }
}
