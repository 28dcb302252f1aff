//! A node of threads and vectors: enough of the protocol for the load generator, and faults on demand.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drava_protocol::batch;
use drava_protocol::frame::{self, Decoded, Frame};
use drava_protocol::message::{self, Kind, Message, PartitionPlace, Place};

/// What the node does wrong with the batch of this number when it delivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    Lose(usize),
    Repeat(usize),
    /// Delivers the next batch before this one.
    Swap(usize),
    /// Changes a bit of the last message.
    Flip(usize),
    /// Acknowledges and forgets.
    Forget(usize),
}

#[derive(Default)]
struct State {
    topics: BTreeMap<String, message::Topic>,
    partitions: BTreeMap<u64, Partition>,
    published: usize,
}

#[derive(Default)]
struct Partition {
    batches: Vec<Vec<u8>>,
    end: u64,
}

struct Reader {
    consumer: u32,
    partition: u64,
    /// Batches delivered.
    next: usize,
    credit: i64,
}

#[derive(Clone)]
struct Node {
    port: u16,
    fault: Fault,
    state: Arc<Mutex<State>>,
}

/// Starts a node that lives as long as the test's process.
pub fn start(fault: Fault) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let node = Node { port: address.port(), fault, state: Arc::default() };
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (node, stream) = (node.clone(), stream.unwrap());
            std::thread::spawn(move || node.serve(stream));
        }
    });
    address
}

impl Node {
    fn serve(&self, mut stream: TcpStream) {
        stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut input = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        let mut readers = Vec::new();
        loop {
            let mut out = Vec::new();
            match stream.read(&mut buffer) {
                Ok(0) => return,
                Ok(bytes) => input.extend_from_slice(&buffer[..bytes]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => return,
            }
            let mut consumed = 0;
            while let Decoded::Frame(frame, bytes) = frame::decode(&input[consumed..], 1 << 24).unwrap() {
                self.answer(&frame, &mut readers, &mut out);
                consumed += bytes;
            }
            input.drain(..consumed);
            for reader in &mut readers {
                self.deliver(reader, &mut out);
            }
            if stream.write_all(&out).is_err() {
                return;
            }
        }
    }

    fn answer(&self, frame: &Frame<'_>, readers: &mut Vec<Reader>, out: &mut Vec<u8>) {
        let correlation = frame.header.correlation;
        let mut state = self.state.lock().unwrap();
        match frame.header.kind {
            Kind::Hello => reply(
                correlation,
                &message::Welcome {
                    version: 1,
                    node: 1,
                    shard: 0,
                    shard_count: 1,
                    payload_bytes_max: 1 << 22,
                    in_flight_max: 1024,
                    features: 0,
                },
                out,
            ),
            Kind::CreateTopic => {
                let body: message::CreateTopic = message::decode(frame.body).unwrap();
                let id = state.topics.len() as u64 + 1;
                let topic = state.topics.entry(body.name.clone()).or_insert_with(|| message::Topic {
                    topic: id,
                    name: body.name,
                    partitions: (0..body.policy.partitions)
                        .map(|index| PartitionPlace {
                            partition: id * 1000 + u64::from(index),
                            index,
                            node: 1,
                            shard: 0,
                            host: String::new(),
                            port: self.port,
                        })
                        .collect(),
                    policy: body.policy,
                });
                reply(correlation, topic, out);
            }
            Kind::Lookup => {
                let body: message::Lookup = message::decode(frame.body).unwrap();
                match state.topics.get(&body.name) {
                    Some(topic) => reply(correlation, topic, out),
                    None => refuse(correlation, drava_protocol::ErrorCode::UnknownTopic, out),
                }
            }
            Kind::OpenProducer => reply(correlation, &message::ProducerOpened { epoch: 1, next_sequence: 0 }, out),
            Kind::Publish => {
                let body: message::Publish = message::decode(frame.body).unwrap();
                let header = batch::check(frame.payload).unwrap();
                let number = state.published;
                state.published += 1;
                let partition = state.partitions.entry(body.partition).or_default();
                let base_offset = partition.end;
                if self.fault != Fault::Forget(number) {
                    let mut bytes = frame.payload.to_vec();
                    bytes[..batch::BROKER_BYTES].copy_from_slice(&batch::broker_fields(base_offset, 1));
                    partition.batches.push(bytes);
                    partition.end += u64::from(header.record_count);
                }
                let acknowledged = if self.fault == Fault::Forget(number) { partition.end + 1000 } else { base_offset };
                reply(correlation, &message::Published { base_offset: acknowledged, duplicate: false }, out);
            }
            Kind::Subscribe => {
                let body: message::Subscribe = message::decode(frame.body).unwrap();
                let partition = state.partitions.entry(body.partition).or_default();
                let (next, offset) = match body.start {
                    Place::Latest => (partition.batches.len(), partition.end),
                    Place::Earliest | Place::Offset(_) | Place::Time(_) => (0, 0),
                };
                readers.push(Reader { consumer: body.consumer, partition: body.partition, next, credit: 0 });
                let answer = message::Subscribed { offset, start_offset: 0, end_offset: partition.end };
                reply(correlation, &answer, out);
            }
            Kind::Flow => {
                let body: message::Flow = message::decode(frame.body).unwrap();
                let reader = readers.iter_mut().find(|reader| reader.consumer == body.consumer).unwrap();
                reader.credit += i64::from(body.bytes);
            }
            Kind::Seek => {
                let body: message::Seek = message::decode(frame.body).unwrap();
                let reader = readers.iter_mut().find(|reader| reader.consumer == body.consumer).unwrap();
                assert_eq!(body.place, Place::Earliest);
                reader.next = 0;
                let end_offset = state.partitions[&reader.partition].end;
                reply(correlation, &message::Located { offset: 0, start_offset: 0, end_offset }, out);
            }
            Kind::Ack => assert_eq!(correlation, 0, "acks of a load have no answer"),
            Kind::CloseConsumer => {
                let body: message::CloseConsumer = message::decode(frame.body).unwrap();
                readers.retain(|reader| reader.consumer != body.consumer);
                reply(correlation, &message::Done {}, out);
            }
            Kind::DeleteSubscription => reply(correlation, &message::Done {}, out),
            other => panic!("the load generator sent {other:?}"),
        }
    }

    fn deliver(&self, reader: &mut Reader, out: &mut Vec<u8>) {
        let state = self.state.lock().unwrap();
        let partition = &state.partitions[&reader.partition];
        while 0 < reader.credit && reader.next < partition.batches.len() {
            let number = reader.next;
            let numbers: &[usize] = match self.fault {
                Fault::Lose(at) if at == number => &[],
                Fault::Repeat(at) if at == number => &[number, number],
                // Wait until there are two to swap.
                Fault::Swap(at) if at == number && number + 1 == partition.batches.len() => return,
                Fault::Swap(at) if at == number => {
                    reader.next += 1;
                    &[number + 1, number]
                }
                _ => &[number],
            };
            reader.next += 1;
            let mut payload = Vec::new();
            for &number in numbers {
                let mut bytes = partition.batches[number].clone();
                if self.fault == Fault::Flip(number) {
                    let middle = bytes.len() - 40;
                    bytes[middle] ^= 1;
                }
                payload.extend_from_slice(&bytes);
                payload.extend_from_slice(frame::padding(bytes.len()));
            }
            if payload.is_empty() {
                continue;
            }
            reader.credit -= payload.len() as i64;
            let last = batch::header(&partition.batches[reader.next - 1]).unwrap();
            let next_offset = last.base_offset + u64::from(last.record_count);
            let body = message::Deliver { consumer: reader.consumer, next_offset, end_offset: partition.end };
            frame::encode(&body, 0, 0, payload.len() as u32, out);
            out.extend_from_slice(&payload);
            out.extend_from_slice(frame::padding(payload.len()));
        }
    }
}

fn reply<M: Message>(correlation: u64, message: &M, out: &mut Vec<u8>) {
    frame::encode(message, 0, correlation, 0, out);
}

fn refuse(correlation: u64, code: drava_protocol::ErrorCode, out: &mut Vec<u8>) {
    let body = message::Error { code: code as u16, retry_after_ms: 0, text: "no".to_owned() };
    frame::encode(&body, 0, correlation, 0, out);
}
