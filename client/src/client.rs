//! The client: where applications begin.
//!
//! It keeps one connection to each core that it has to do with, shared by all producers, readers and consumers, and asks
//! the node that it was given which core owns which partition. A connection that is lost is opened again by whoever needs
//! it next.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use drava_protocol::message::{
    CreateTopic, DeleteSubscription, DeleteTopic, DescribePartition, ListTopics, Lookup, PartitionPlace,
    PartitionState, TOPICS_MAX, Topic, TopicPolicy,
};
use drava_protocol::topic::TopicName;
use drava_protocol::{ErrorCode, Retry};
use tokio::sync::Mutex;

use crate::backoff::Backoff;
use crate::connection::{Connection, Reply};
use crate::consumer::ConsumerBuilder;
use crate::error::{CallError, ConnectError, TopicError};
use crate::producer::ProducerBuilder;
use crate::reader::ReaderBuilder;
use crate::session::{Answer, Request};

const TOKEN_BYTES_MAX: usize = 16 * 1024;
const CLIENT_NAME_BYTES_MAX: usize = 256;

/// What a client is built with.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub token: Option<String>,
    pub client_name: String,
    pub connect_timeout: Duration,
    pub request_timeout: Duration,
    pub keep_alive: Duration,
    pub backoff_min: Duration,
    pub backoff_max: Duration,
}

/// Builds a [`Client`].
#[derive(Clone, Debug)]
pub struct ClientBuilder {
    address: String,
    options: Options,
}

impl ClientBuilder {
    /// Credentials.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.options.token = Some(token.into());
        self
    }

    /// What the operator of the node sees this client as; at most 256 bytes. Default: name and version of this crate.
    pub fn client_name(mut self, name: impl Into<String>) -> Self {
        self.options.client_name = name.into();
        self
    }

    /// How long opening a connection may take, handshake included. Default: 5 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.options.connect_timeout = timeout;
        self
    }

    /// How long to wait for the answer to anything but a publish, which has its own. Default: 30 s.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.options.request_timeout = timeout;
        self
    }

    /// A connection silent for this long is asked for a sign of life, and given up after three times. Default: 10 s.
    pub fn keep_alive(mut self, period: Duration) -> Self {
        self.options.keep_alive = period.max(Duration::from_millis(1));
        self
    }

    /// Pauses between attempts to reconnect: the first, and the longest that they double up to. Default: 20 ms, 2 s.
    pub fn backoff(mut self, min: Duration, max: Duration) -> Self {
        self.options.backoff_min = min.max(Duration::from_millis(1));
        self.options.backoff_max = max.max(self.options.backoff_min);
        self
    }

    /// Connects. Fails at once when the node does not answer; later losses are repaired in the background.
    pub async fn connect(self) -> Result<Client, ConnectError> {
        let (host, port) = parse_address(&self.address)?;
        let lengths = [
            ("token", self.options.token.as_ref().map_or(0, String::len), TOKEN_BYTES_MAX),
            ("client name", self.options.client_name.len(), CLIENT_NAME_BYTES_MAX),
        ];
        for (what, bytes, bytes_max) in lengths {
            if bytes_max < bytes {
                return Err(ConnectError::TooLong { what, bytes, bytes_max });
            }
        }
        let inner = Inner { host, port, options: self.options, connections: Mutex::default() };
        inner.any_connection().await?;
        Ok(Client { inner: Arc::new(inner) })
    }
}

/// A node, or the nodes of a cluster, to talk to. Cheap to clone; clones share their connections.
#[derive(Clone, Debug)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

impl Client {
    /// Connects to the node at `address`, `host:port`, with defaults for everything.
    pub async fn connect(address: impl Into<String>) -> Result<Client, ConnectError> {
        Self::builder(address).connect().await
    }

    /// Options, then [`ClientBuilder::connect`].
    pub fn builder(address: impl Into<String>) -> ClientBuilder {
        ClientBuilder {
            address: address.into(),
            options: Options {
                token: None,
                client_name: concat!("drava-client/", env!("CARGO_PKG_VERSION")).to_owned(),
                connect_timeout: Duration::from_secs(5),
                request_timeout: Duration::from_secs(30),
                keep_alive: Duration::from_secs(10),
                backoff_min: Duration::from_millis(20),
                backoff_max: Duration::from_secs(2),
            },
        }
    }

    /// Creates a topic. Errors: `TopicExists`, and all of [`TopicError`].
    pub async fn create_topic(&self, name: &str, policy: TopicPolicy) -> Result<Topic, TopicError> {
        self.create(name, policy, false).await
    }

    /// Creates a topic, or returns the one that exists already, whatever its policy.
    pub async fn ensure_topic(&self, name: &str, policy: TopicPolicy) -> Result<Topic, TopicError> {
        self.create(name, policy, true).await
    }

    async fn create(&self, name: &str, policy: TopicPolicy, exists_ok: bool) -> Result<Topic, TopicError> {
        let full = TopicName::parse(name)?;
        let request = CreateTopic { name: full.as_str().to_owned(), policy, exists_ok };
        let reply = self.inner.call(request).await.map_err(|error| topic_error(name, error))?;
        Ok(topic_of(reply))
    }

    /// Deletes a topic with everything in it.
    pub async fn delete_topic(&self, name: &str) -> Result<(), TopicError> {
        let full = TopicName::parse(name)?;
        let request = DeleteTopic { name: full.as_str().to_owned() };
        self.inner.call(request).await.map_err(|error| topic_error(name, error))?;
        Ok(())
    }

    /// The full names of all topics that start with `prefix`, in order. An empty prefix means all.
    pub async fn list_topics(&self, prefix: &str) -> Result<Vec<String>, TopicError> {
        let mut names: Vec<String> = Vec::new();
        if drava_protocol::topic::NAME_BYTES_MAX < prefix.len() {
            return Ok(names);
        }
        loop {
            let after = names.last().cloned().unwrap_or_default();
            let request = ListTopics { prefix: prefix.to_owned(), after: after.clone(), limit: TOPICS_MAX };
            let reply = self.inner.call(request).await.map_err(TopicError::Call)?;
            let Answer::Topics(topics) = reply.answer else { unreachable!("the session checked the kind") };
            // A node that goes in circles must not keep us here.
            let moved = topics.names.first().is_some_and(|first| after < *first);
            let more = topics.more && moved;
            names.extend(topics.names);
            if !more {
                return Ok(names);
            }
        }
    }

    /// A topic's policy and where its partitions live.
    pub async fn lookup(&self, name: &str) -> Result<Topic, TopicError> {
        self.inner.lookup(&TopicName::parse(name)?).await
    }

    /// The offsets, size and subscriptions of each partition of a topic, in order.
    pub async fn describe(&self, name: &str) -> Result<Vec<PartitionState>, TopicError> {
        let topic = self.lookup(name).await?;
        let mut states = Vec::with_capacity(topic.partitions.len());
        for place in &topic.partitions {
            let request = DescribePartition { partition: place.partition };
            let connection = self.inner.connection_to(place).await.map_err(|e| TopicError::Call(e.into()))?;
            let reply = connection.call(request, self.inner.options.request_timeout).await;
            let Answer::PartitionState(state) = reply.map_err(TopicError::Call)?.answer else {
                unreachable!("the session checked the kind");
            };
            states.push(*state);
        }
        Ok(states)
    }

    /// Ends a subscription on every partition of a topic, with its cursors.
    pub async fn delete_subscription(&self, topic: &str, subscription: &str) -> Result<(), TopicError> {
        let topic = self.lookup(topic).await?;
        for place in &topic.partitions {
            let subscription = subscription.chars().take(drava_protocol::message::SUBSCRIPTION_NAME_BYTES_MAX + 1);
            let request = DeleteSubscription { partition: place.partition, subscription: subscription.collect() };
            let connection = self.inner.connection_to(place).await.map_err(|e| TopicError::Call(e.into()))?;
            connection.call(request, self.inner.options.request_timeout).await.map_err(TopicError::Call)?;
        }
        Ok(())
    }

    /// A producer: options, then [`ProducerBuilder::build`].
    pub fn producer(&self, topic: impl Into<String>) -> ProducerBuilder {
        ProducerBuilder::new(self.inner.clone(), topic.into())
    }

    /// A reader without a cursor: options, then [`ReaderBuilder::build`].
    pub fn reader(&self, topic: impl Into<String>) -> ReaderBuilder {
        ReaderBuilder::new(self.inner.clone(), topic.into())
    }

    /// A consumer of the durable, exclusive subscription `name`: options, then [`ConsumerBuilder::build`].
    pub fn subscribe(&self, topic: impl Into<String>, name: impl Into<String>) -> ConsumerBuilder {
        ConsumerBuilder::new(self.inner.clone(), topic.into(), name.into())
    }
}

/// The connection to one core, if there is one.
type Door = Arc<Mutex<Option<Connection>>>;

/// What clones of a client share.
#[derive(Debug)]
pub(crate) struct Inner {
    host: String,
    port: u16,
    pub options: Options,
    /// By host and port. One lock each, so that a core that does not answer delays only those who need it. As many as the
    /// cluster has cores.
    connections: Mutex<HashMap<(String, u16), Door>>,
}

impl Inner {
    /// The connection to the address that the client was given.
    pub async fn any_connection(&self) -> Result<Connection, ConnectError> {
        self.connection(&self.host, self.port).await
    }

    /// The connection to the owner of a partition.
    pub async fn connection_to(&self, place: &PartitionPlace) -> Result<Connection, ConnectError> {
        let host = if place.host.is_empty() { &self.host } else { &place.host };
        self.connection(host, place.port).await
    }

    async fn connection(&self, host: &str, port: u16) -> Result<Connection, ConnectError> {
        let entry = self.connections.lock().await.entry((host.to_owned(), port)).or_default().clone();
        let mut entry = entry.lock().await;
        if let Some(connection) = entry.as_ref().filter(|connection| !connection.is_closed()) {
            return Ok(connection.clone());
        }
        let connection = Connection::open(host, port, &self.options).await?;
        *entry = Some(connection.clone());
        Ok(connection)
    }

    /// Asks whichever core answers at the client's address.
    async fn call<M: Request + Send + 'static>(&self, request: M) -> Result<Reply, CallError> {
        self.any_connection().await?.call(request, self.options.request_timeout).await
    }

    pub async fn lookup(&self, topic: &TopicName) -> Result<Topic, TopicError> {
        let request = Lookup { name: topic.as_str().to_owned() };
        let reply = self.call(request).await.map_err(|error| topic_error(topic.as_str(), error))?;
        Ok(topic_of(reply))
    }

    /// Where one partition of a topic lives now, and a connection to its owner.
    pub async fn owner(&self, topic: &TopicName, index: u32) -> Result<(PartitionPlace, Connection), TopicError> {
        let found = self.lookup(topic).await?;
        let partitions = found.partitions.len() as u32;
        let place = found.partitions.into_iter().find(|place| place.index == index);
        let place = place.ok_or(TopicError::UnknownPartition { topic: found.name, index, partitions })?;
        let connection = self.connection_to(&place).await.map_err(|error| TopicError::Call(error.into()))?;
        Ok((place, connection))
    }

    pub fn backoff(&self) -> Backoff {
        Backoff::new(self.options.backoff_min, self.options.backoff_max)
    }
}

impl TopicError {
    /// Whether the same may succeed after a pause, here or elsewhere.
    pub(crate) fn is_passing(&self) -> bool {
        self.retry() != Retry::No
    }
}

fn topic_of(reply: Reply) -> Topic {
    match reply.answer {
        Answer::Topic(topic) => *topic,
        other => unreachable!("the session checked the kind of {other:?}"),
    }
}

fn topic_error(name: &str, error: CallError) -> TopicError {
    match &error {
        CallError::Refused(refusal) if refusal.code == ErrorCode::UnknownTopic => {
            TopicError::UnknownTopic(name.to_owned())
        }
        CallError::Refused(refusal) if refusal.code == ErrorCode::TopicExists => {
            TopicError::TopicExists(name.to_owned())
        }
        CallError::Refused(_) | CallError::Connect(_) | CallError::Disconnected | CallError::TimedOut { .. } => {
            TopicError::Call(error)
        }
    }
}

/// `host:port`, with IPv6 hosts in brackets.
fn parse_address(address: &str) -> Result<(String, u16), ConnectError> {
    let malformed = || ConnectError::Address(address.to_owned());
    let (host, port) = address.rsplit_once(':').ok_or_else(malformed)?;
    let port = port.parse().map_err(|_| malformed())?;
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host = bracketed.unwrap_or(host);
    if host.is_empty() || (bracketed.is_none() && host.contains(':')) {
        return Err(malformed());
    }
    Ok((host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hosts_and_ports() {
        assert_eq!(parse_address("127.0.0.1:7400").unwrap(), ("127.0.0.1".to_owned(), 7400));
        assert_eq!(parse_address("[::1]:7400").unwrap(), ("::1".to_owned(), 7400));
        for malformed in ["", "host", ":1", "host:", "host:70000", "::1:7400", "host:x"] {
            assert!(matches!(parse_address(malformed), Err(ConnectError::Address(_))), "{malformed}");
        }
    }
}
