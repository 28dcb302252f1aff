//! From a frame to whoever answers it.

use std::rc::Rc;
use std::time::Duration;

use drava_protocol::frame::{self, Frame};
use drava_protocol::message::{
    self, Ack, BodyError, CloseConsumer, CreateTopic, DeleteSubscription, DeleteTopic, DescribePartition, Fetch, Flow,
    Hello, Kind, ListTopics, Locate, Lookup, OpenProducer, PartitionPlace, Ping, Pong, Publish, Seek, Subscribe,
    Topics, Welcome,
};
use drava_protocol::topic::TopicName;
use drava_protocol::{ErrorCode, PartitionId, ShardId};
use drava_raft::Topic;
use drava_runtime::chunk::Slice;
use drava_runtime::foreign;

use super::connection::Connection;
use super::mesh::{Load, MeshMessage};
use super::{Responder, Shard, consumer};
use crate::control::request::{ControlRequest, Refused};

/// A pause before a client tries again where too much was under way.
const RETRY_AFTER_BUSY_MS: u32 = 10;
const TOPICS_LISTED_MAX: u32 = 1000;
const CLIENT_NAME_BYTES_MAX: usize = 256;

/// Where a partition is, seen from this shard.
enum Whereabouts {
    /// Index of the hosted partition.
    Here(u32),
    Shard(ShardId),
    Node,
    Damaged(String),
    Nowhere,
}

impl Shard {
    /// Answers the first frame. `true`: the session is open.
    pub(super) fn hello(&self, connection: &Connection, frame: &Frame<'_>) -> bool {
        let correlation = frame.header.correlation;
        let hello = match message::decode::<Hello>(frame.body) {
            Ok(hello) => hello,
            Err(error) => {
                connection.answer_error(correlation, ErrorCode::MalformedBody, 0, &error.to_string());
                return false;
            }
        };
        if frame::VERSION < hello.version_min || hello.version_max < frame::VERSION {
            let text = format!(
                "the client speaks versions {} to {}; this node speaks {}",
                hello.version_min,
                hello.version_max,
                frame::VERSION
            );
            connection.answer_error(correlation, ErrorCode::UnsupportedVersion, 0, &text);
            return false;
        }
        if CLIENT_NAME_BYTES_MAX < hello.client.len() {
            let text = format!("a client name has at most {CLIENT_NAME_BYTES_MAX} bytes");
            connection.answer_error(correlation, ErrorCode::MalformedBody, 0, &text);
            return false;
        }
        tracing::debug!(connection = connection.id, client = hello.client, "session opened");
        let welcome = Welcome {
            version: frame::VERSION,
            node: self.node.0,
            shard: self.id.0,
            shard_count: self.ports.len() as u16,
            payload_bytes_max: self.limits.payload_bytes_max,
            in_flight_max: self.limits.in_flight_max,
            features: 0,
        };
        connection.answer(correlation, &welcome);
        true
    }

    /// Takes one request of an open session.
    pub(super) fn request(
        self: &Rc<Self>,
        connection: &Rc<Connection>,
        frame: &Frame<'_>,
        payload: impl FnOnce() -> Slice,
    ) {
        if let Err(error) = self.dispatch(connection, frame, payload) {
            connection.answer_error(frame.header.correlation, ErrorCode::MalformedBody, 0, &error.to_string());
        }
    }

    fn dispatch(
        self: &Rc<Self>,
        connection: &Rc<Connection>,
        frame: &Frame<'_>,
        payload: impl FnOnce() -> Slice,
    ) -> Result<(), BodyError> {
        let correlation = frame.header.correlation;
        let body = frame.body;
        match frame.header.kind {
            // Addressed to a partition: answered here, or by the shard that owns it.
            Kind::Publish => {
                let partition = message::access::<Publish>(body)?.partition.to_native();
                // The hot path: one look-up, no copy.
                let here = self.by_id.borrow().get(&partition).copied();
                if let Some(index) = here {
                    self.publish(index, Responder::Local(connection.clone()), correlation, payload());
                } else {
                    self.forward(connection, frame, partition, &payload());
                }
            }
            Kind::OpenProducer => {
                let partition = message::access::<OpenProducer>(body)?.partition.to_native();
                self.local_or_forward(connection, frame, partition)?;
            }
            Kind::Fetch => {
                let partition = message::access::<Fetch>(body)?.partition.to_native();
                self.local_or_forward(connection, frame, partition)?;
            }
            Kind::Locate => {
                let partition = message::access::<Locate>(body)?.partition.to_native();
                self.local_or_forward(connection, frame, partition)?;
            }
            Kind::DescribePartition => {
                let partition = message::access::<DescribePartition>(body)?.partition.to_native();
                self.local_or_forward(connection, frame, partition)?;
            }
            Kind::DeleteSubscription => {
                let partition = message::access::<DeleteSubscription>(body)?.partition.to_native();
                self.local_or_forward(connection, frame, partition)?;
            }
            // Bound to a connection of the owning core.
            Kind::Subscribe => {
                let subscribe = message::decode::<Subscribe>(body)?;
                match self.whereabouts(subscribe.partition) {
                    Whereabouts::Here(index) => self.subscribe(index, connection, correlation, subscribe),
                    Whereabouts::Shard(shard) => {
                        connection.answer_wrong_owner(correlation, self.ports[usize::from(shard.0)]);
                    }
                    other => self.refuse(&Responder::Local(connection.clone()), correlation, &other),
                }
            }
            Kind::Flow => {
                let flow = message::access::<Flow>(body)?;
                connection.unanswered();
                self.flow(connection, flow.consumer.to_native(), flow.bytes.to_native());
            }
            Kind::Ack => {
                let ack = message::access::<Ack>(body)?;
                self.ack(connection, correlation, ack.consumer.to_native(), ack.offset.to_native());
            }
            Kind::Seek => {
                let seek = message::decode::<Seek>(body)?;
                self.seek(connection, correlation, seek.consumer, seek.place);
            }
            Kind::CloseConsumer => {
                let consumer = message::access::<CloseConsumer>(body)?.consumer.to_native();
                self.close_consumer_of(connection, correlation, consumer);
            }
            // Answered from the metadata image, or by the control core.
            Kind::Lookup => {
                let lookup = message::access::<Lookup>(body)?;
                self.lookup(connection, correlation, &lookup.name);
            }
            Kind::ListTopics => {
                let list = message::decode::<ListTopics>(body)?;
                self.list_topics(connection, correlation, &list);
            }
            Kind::CreateTopic => {
                let create = message::decode::<CreateTopic>(body)?;
                self.create_topic(connection, correlation, create);
            }
            Kind::DeleteTopic => {
                let delete = message::decode::<DeleteTopic>(body)?;
                self.delete_topic(connection, correlation, &delete.name);
            }
            Kind::Ping => {
                message::access::<Ping>(body)?;
                connection.answer(correlation, &Pong {});
            }
            Kind::Hello
            | Kind::Welcome
            | Kind::Error
            | Kind::Pong
            | Kind::Done
            | Kind::Topics
            | Kind::Topic
            | Kind::PartitionState
            | Kind::ProducerOpened
            | Kind::Published
            | Kind::Fetched
            | Kind::Located
            | Kind::Damaged
            | Kind::Subscribed
            | Kind::Deliver => {
                let text = format!("a client does not send {:?} here", frame.header.kind);
                connection.answer_error(correlation, ErrorCode::UnexpectedFrame, 0, &text);
            }
        }
        Ok(())
    }

    fn local_or_forward(
        self: &Rc<Self>,
        connection: &Rc<Connection>,
        frame: &Frame<'_>,
        partition: u64,
    ) -> Result<(), BodyError> {
        match self.whereabouts(partition) {
            Whereabouts::Here(index) => {
                let responder = Responder::Local(connection.clone());
                self.partition_request(index, responder, frame.header.correlation, frame.header.kind, frame.body, None)
            }
            Whereabouts::Shard(_) | Whereabouts::Node | Whereabouts::Damaged(_) | Whereabouts::Nowhere => {
                self.forward(connection, frame, partition, &[]);
                Ok(())
            }
        }
    }

    /// Serves a request for a hosted partition, whoever asked.
    pub(super) fn partition_request(
        self: &Rc<Self>,
        index: u32,
        responder: Responder,
        correlation: u64,
        kind: Kind,
        body: &[u8],
        payload: Option<Slice>,
    ) -> Result<(), BodyError> {
        match kind {
            Kind::Publish => {
                let payload = payload.unwrap_or_else(|| Slice::copy_of(&[]));
                self.publish(index, responder, correlation, payload);
            }
            Kind::OpenProducer => {
                let producer = message::access::<OpenProducer>(body)?.producer.to_native();
                self.open_producer(index, responder, correlation, producer);
            }
            Kind::Fetch => {
                let fetch = message::access::<Fetch>(body)?;
                let fetch = consumer::Fetch {
                    offset: fetch.offset.to_native(),
                    bytes_max: fetch.bytes_max.to_native(),
                    wait: Duration::from_millis(u64::from(fetch.wait_ms.to_native())),
                };
                self.fetch(index, responder, correlation, fetch);
            }
            Kind::Locate => {
                let place = message::decode::<Locate>(body)?.place;
                self.locate(index, responder, correlation, place);
            }
            Kind::DescribePartition => {
                let state = self.partition_state(index);
                self.answer(&responder, correlation, &state);
            }
            Kind::DeleteSubscription => {
                let delete = message::decode::<DeleteSubscription>(body)?;
                self.delete_subscription(index, responder, correlation, &delete.subscription);
            }
            other => unreachable!("{other:?} is not addressed to a partition"),
        }
        Ok(())
    }

    /// Sends a request to the shard that owns the partition, or says why not.
    fn forward(&self, connection: &Rc<Connection>, frame: &Frame<'_>, partition: u64, payload: &[u8]) {
        let responder = Responder::Local(connection.clone());
        let correlation = frame.header.correlation;
        let shard = match self.whereabouts(partition) {
            Whereabouts::Shard(shard) => shard,
            other => return self.refuse(&responder, correlation, &other),
        };
        let kind = frame.header.kind;
        let request = || MeshMessage::Request {
            connection: connection.id,
            correlation,
            kind,
            body: frame.body.to_vec(),
            payload: payload.to_vec(),
        };
        if self.mesh.forward(shard, Load::of(kind, payload), request) {
            self.counters.requests_forwarded.add(1);
        } else {
            let text = "too many requests are under way to the core that owns the partition; ask Lookup for its port";
            self.answer_error(&responder, correlation, ErrorCode::Busy, RETRY_AFTER_BUSY_MS, text);
        }
    }

    /// A message of another shard.
    pub(super) fn mesh_message(self: &Rc<Self>, from: ShardId, message: MeshMessage) {
        match message {
            MeshMessage::Request { connection, correlation, kind, body, payload } => {
                let responder = Responder::Remote { shard: from, connection, load: Load::of(kind, &payload) };
                // Forwarded once: a partition that is not here any more is not chased further.
                let index = match self.partition_of(kind, &body) {
                    Ok(partition) => match self.whereabouts(partition) {
                        Whereabouts::Here(index) => index,
                        other => return self.refuse(&responder, correlation, &other),
                    },
                    Err(error) => {
                        let text = error.to_string();
                        return self.answer_error(&responder, correlation, ErrorCode::MalformedBody, 0, &text);
                    }
                };
                let payload = Some(Slice::copy_of(&payload));
                let taken = self.partition_request(index, responder.clone(), correlation, kind, &body, payload);
                if let Err(error) = taken {
                    self.answer_error(&responder, correlation, ErrorCode::MalformedBody, 0, &error.to_string());
                }
            }
            MeshMessage::Answer { connection, load, frame } => {
                self.mesh.answered(from, load);
                // A client that has gone in the meantime needs no answer.
                if let Some(connection) = self.connections.borrow().get(&connection) {
                    connection.answer_encoded(&frame);
                }
            }
        }
    }

    fn partition_of(&self, kind: Kind, body: &[u8]) -> Result<u64, BodyError> {
        let partition = match kind {
            Kind::Publish => message::access::<Publish>(body)?.partition,
            Kind::OpenProducer => message::access::<OpenProducer>(body)?.partition,
            Kind::Fetch => message::access::<Fetch>(body)?.partition,
            Kind::Locate => message::access::<Locate>(body)?.partition,
            Kind::DescribePartition => message::access::<DescribePartition>(body)?.partition,
            Kind::DeleteSubscription => message::access::<DeleteSubscription>(body)?.partition,
            other => unreachable!("{other:?} is not addressed to a partition"),
        };
        Ok(partition.to_native())
    }

    fn whereabouts(&self, partition: u64) -> Whereabouts {
        if let Some(&index) = self.by_id.borrow().get(&partition) {
            return Whereabouts::Here(index);
        }
        let id = PartitionId(partition);
        if let Some(reason) = self.damaged.borrow().get(&id) {
            return Whereabouts::Damaged(reason.clone());
        }
        match self.image.borrow().partitions.get(&id) {
            Some(partition) if partition.owner.node != self.node => Whereabouts::Node,
            Some(partition) if partition.owner.shard != self.id => Whereabouts::Shard(partition.owner.shard),
            // Owned by this shard and not yet, or no more, served.
            Some(_) | None => Whereabouts::Nowhere,
        }
    }

    fn refuse(&self, responder: &Responder, correlation: u64, whereabouts: &Whereabouts) {
        let (code, text) = match whereabouts {
            Whereabouts::Damaged(reason) => (ErrorCode::StorageDamaged, reason.as_str()),
            Whereabouts::Nowhere => (ErrorCode::UnknownPartition, "there is no such partition on this node"),
            Whereabouts::Node | Whereabouts::Shard(_) | Whereabouts::Here(_) => {
                (ErrorCode::WrongOwner, "the partition lives elsewhere; ask Lookup where")
            }
        };
        self.answer_error(responder, correlation, code, 0, text);
    }

    fn lookup(&self, connection: &Connection, correlation: u64, name: &str) {
        let name = match TopicName::parse(name) {
            Ok(name) => name,
            Err(error) => {
                return connection.answer_error(correlation, ErrorCode::InvalidTopicName, 0, &error.to_string());
            }
        };
        let image = self.image.borrow();
        match image.topics.get(&name) {
            Some(topic) => connection.answer(correlation, &self.topic_message(topic)),
            None => {
                connection.answer_error(correlation, ErrorCode::UnknownTopic, 0, &format!("there is no topic {name}"))
            }
        }
    }

    /// A topic with the places of its partitions, as the newest image has them.
    fn topic_message(&self, topic: &Topic) -> message::Topic {
        let image = self.image.borrow();
        let places = topic.partitions.iter().filter_map(|id| {
            let partition = image.partitions.get(id)?;
            let local = partition.owner.node == self.node;
            let port = self.ports.get(usize::from(partition.owner.shard.0)).copied().filter(|_| local).unwrap_or(0);
            Some(PartitionPlace {
                partition: id.0,
                index: partition.index,
                node: partition.owner.node.0,
                shard: partition.owner.shard.0,
                host: self.advertised_host.clone(),
                port,
            })
        });
        message::Topic {
            topic: topic.id.0,
            name: topic.name.to_string(),
            policy: topic.policy.clone(),
            partitions: places.collect(),
        }
    }

    fn list_topics(&self, connection: &Connection, correlation: u64, list: &ListTopics) {
        if list.limit == 0 || TOPICS_LISTED_MAX < list.limit {
            let text = format!("limit is 1 to {TOPICS_LISTED_MAX}");
            return connection.answer_error(correlation, ErrorCode::InvalidArgument, 0, &text);
        }
        let image = self.image.borrow();
        let mut names = image
            .topics
            .keys()
            .map(TopicName::as_str)
            .filter(|name| name.starts_with(&list.prefix) && *name > list.after.as_str());
        // A body has its own limit; what does not fit comes with the next page.
        let mut bytes_left = frame::BODY_BYTES_MAX as usize / 2;
        let mut page = Vec::new();
        let mut more = false;
        for name in names.by_ref() {
            if page.len() == list.limit as usize || bytes_left < name.len() + 16 {
                more = true;
                break;
            }
            bytes_left -= name.len() + 16;
            page.push(name.to_owned());
        }
        connection.answer(correlation, &Topics { names: page, more });
    }

    fn create_topic(self: &Rc<Self>, connection: &Rc<Connection>, correlation: u64, create: CreateTopic) {
        let name = match TopicName::parse(&create.name) {
            Ok(name) => name,
            Err(error) => {
                return connection.answer_error(correlation, ErrorCode::InvalidTopicName, 0, &error.to_string());
            }
        };
        let (reply, answer) = foreign::reply();
        let request = ControlRequest::CreateTopic { name, policy: create.policy, exists_ok: create.exists_ok, reply };
        let sent = self.control.send(request).is_ok();
        let (shard, connection) = (self.clone(), connection.clone());
        drava_runtime::spawn(async move {
            match if sent { answer.await } else { None } {
                Some(Ok(topic)) => connection.answer(correlation, &shard.topic_message(&topic)),
                Some(Err(refused)) => connection.answer_error(correlation, refused.code, 0, &refused.text),
                None => answer_no_control(&connection, correlation),
            }
        });
    }

    fn delete_topic(&self, connection: &Rc<Connection>, correlation: u64, name: &str) {
        let name = match TopicName::parse(name) {
            Ok(name) => name,
            Err(error) => {
                return connection.answer_error(correlation, ErrorCode::InvalidTopicName, 0, &error.to_string());
            }
        };
        let (reply, answer) = foreign::reply();
        let sent = self.control.send(ControlRequest::DeleteTopic { name, reply }).is_ok();
        let connection = connection.clone();
        drava_runtime::spawn(async move {
            match if sent { answer.await } else { None } {
                Some(Ok(())) => connection.answer(correlation, &message::Done {}),
                Some(Err(Refused { code, text })) => connection.answer_error(correlation, code, 0, &text),
                None => answer_no_control(&connection, correlation),
            }
        });
    }
}

fn answer_no_control(connection: &Connection, correlation: u64) {
    connection.answer_error(correlation, ErrorCode::MetadataUnavailable, 1000, "the control core is gone");
}
