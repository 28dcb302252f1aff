//! A connection that consumes: a durable subscription on each of its partitions, with credit for what is under way.
//!
//! Deliveries are checked where they lie in the receive buffer; afterwards the connection gives back the credit that
//! they used and acknowledges what it has seen.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use drava_client::glommio_driver::{Connection, DriverError};
use drava_client::session::{Answer, Event, Limits};
use drava_protocol::batch::{self, BatchError, Records};
use drava_protocol::frame;
use drava_protocol::message::{DeleteSubscription, Place, Seek, Subscribe};

use super::options::{Kind, LoadOptions};
use super::plan::{CLIENT, Route};
use super::producer::{chain, turn_or};
use super::shared::{Phase, Seen, Shared};
use crate::payload::clock_ns;
use crate::verify::{Expect, Verifier};

/// How long a consumer waits for messages that were acknowledged and do not come.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Credit is given back when this part of it is used.
const RETURN_PART: u64 = 4;
const UNPACKED_BYTES_MAX: u32 = 256 << 20;

#[derive(Debug)]
pub struct Consumer {
    pub options: Rc<LoadOptions>,
    pub shared: Arc<Shared>,
    pub route: Route,
    pub kind: Kind,
    pub run: u32,
}

/// The subscription of one partition.
struct Lane {
    /// Offset of the next message.
    next: u64,
    /// Where the partition ended when reading began.
    end: u64,
    /// Delivered bytes whose credit was not given back.
    used_bytes: u64,
    /// A seek is under way: what comes is from before it.
    seeking: bool,
    changed: bool,
}

#[derive(Debug, thiserror::Error)]
enum ConsumeError {
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error("a delivered batch is malformed")]
    Batch(#[from] BatchError),
    #[error("the node answered with {0:?}")]
    Answer(Box<Answer>),
}

impl Consumer {
    pub async fn run(self) {
        let shared = self.shared.clone();
        if let Err(error) = self.consume().await {
            shared.fail(format!("a consuming connection failed: {}", chain(&error)));
        }
        shared.workers_left.fetch_sub(1, Ordering::AcqRel);
    }

    async fn consume(self) -> Result<(), ConsumeError> {
        let expect = match self.kind {
            Kind::Consume => Expect::Anything,
            Kind::Produce | Kind::Tail | Kind::Mixed => Expect::Run(self.run),
        };
        let mut verifier = (!self.options.no_verify).then(|| Verifier::new(expect));
        let ended = self.follow(&mut verifier).await;
        if let Some(verifier) = verifier {
            self.shared.looked(verifier);
        }
        ended
    }

    async fn follow(&self, verifier: &mut Option<Verifier>) -> Result<(), ConsumeError> {
        let mut connection: Connection<u32> =
            Connection::connect(self.route.address, Limits::default(), CLIENT).await?;
        let mut lanes = self.subscribe(&mut connection).await?;
        let credit = (self.options.credit / lanes.len() as u64).clamp(64 << 10, 1 << 30) as u32;
        if !self.shared.started().await {
            return Ok(());
        }
        for consumer in 0..lanes.len() as u32 {
            let (session, out) = connection.session();
            session.flow(consumer, credit, out).map_err(DriverError::Request)?;
        }
        let mut seen: Vec<Seen> = Vec::new();
        let mut touched: Vec<u32> = Vec::new();
        let mut progress_ns = clock_ns();
        loop {
            let mut messages = 0;
            let now = clock_ns();
            while let Some(incoming) = connection.received()? {
                match incoming.event {
                    Event::Deliver { consumer, next_offset, .. } => {
                        let lane = &mut lanes[consumer as usize];
                        lane.used_bytes += incoming.payload.len() as u64;
                        if !lane.changed {
                            lane.changed = true;
                            touched.push(consumer);
                        }
                        if !lane.seeking {
                            messages += lane.deliver(incoming.payload, now, verifier, &mut seen)?;
                            lane.next = next_offset;
                        }
                    }
                    // The verifier misses what is not delivered.
                    Event::Damaged { consumer, next_offset, .. } => lanes[consumer as usize].next = next_offset,
                    Event::Answer { tag, answer, .. } => match answer.map_err(DriverError::Refused)? {
                        Answer::Located { offset, end_offset, .. } => {
                            let lane = &mut lanes[tag as usize];
                            (lane.next, lane.end, lane.seeking) = (offset, end_offset, false);
                        }
                        Answer::Done => {}
                        other => return Err(ConsumeError::Answer(Box::new(other))),
                    },
                    Event::Refused(refusal) => return Err(DriverError::Refused(refusal).into()),
                    Event::Welcome(_) | Event::Ignored => {}
                }
            }
            if 0 < messages {
                progress_ns = now;
                if self.kind == Kind::Consume {
                    // How old a stored message is says nothing about the node.
                    seen.clear();
                }
                self.shared.record(&self.shared.delivered, &mut seen);
                self.shared.delivered.count(messages, messages * u64::from(self.options.size));
            }
            for consumer in touched.drain(..) {
                self.after_delivery(&mut connection, &mut lanes, consumer, credit)?;
            }
            if self.is_over(&lanes, now.saturating_sub(progress_ns)) {
                break;
            }
            if self.options.repeat && lanes.iter().any(|lane| lane.at_end() && !lane.seeking) {
                // Streams run through several partitions' batches only within one connection, and all of them start
                // over together.
                self.seek_to_start(&mut connection, &mut lanes, verifier)?;
            }
            turn_or(&mut connection, LOOK_EVERY).await?;
        }
        self.leave(&mut connection, lanes.len() as u32).await
    }

    async fn subscribe(&self, connection: &mut Connection<u32>) -> Result<Vec<Lane>, ConsumeError> {
        let mut lanes = Vec::with_capacity(self.route.partitions.len());
        for (index, &partition) in self.route.partitions.iter().enumerate() {
            let start = match self.kind {
                Kind::Consume | Kind::Produce => Place::Earliest,
                Kind::Tail | Kind::Mixed => Place::Latest,
            };
            let subscribe = Subscribe {
                partition,
                consumer: index as u32,
                subscription: self.subscription(),
                start,
                take_over: false,
            };
            let (session, out) = connection.session();
            session.subscribe(&subscribe, index as u32, out).map_err(DriverError::Request)?;
            match connection.answer().await? {
                Answer::Subscribed { offset, end_offset, .. } => {
                    lanes.push(Lane { next: offset, end: end_offset, used_bytes: 0, seeking: false, changed: false })
                }
                other => return Err(ConsumeError::Answer(Box::new(other))),
            }
        }
        Ok(lanes)
    }

    /// Gives credit back and acknowledges, once enough has come.
    fn after_delivery(
        &self,
        connection: &mut Connection<u32>,
        lanes: &mut [Lane],
        consumer: u32,
        credit: u32,
    ) -> Result<(), ConsumeError> {
        let lane = &mut lanes[consumer as usize];
        lane.changed = false;
        if lane.used_bytes < u64::from(credit) / RETURN_PART {
            return Ok(());
        }
        let (session, out) = connection.session();
        session.flow(consumer, lane.used_bytes as u32, out).map_err(DriverError::Request)?;
        // While topics are read over and over the cursor stays where it is.
        if !self.options.repeat {
            session.ack(consumer, lane.next, out).map_err(DriverError::Request)?;
        }
        lane.used_bytes = 0;
        Ok(())
    }

    fn seek_to_start(
        &self,
        connection: &mut Connection<u32>,
        lanes: &mut [Lane],
        verifier: &mut Option<Verifier>,
    ) -> Result<(), ConsumeError> {
        if !lanes.iter().all(Lane::at_end) {
            return Ok(());
        }
        if let Some(verifier) = verifier {
            verifier.restart();
        }
        for (consumer, lane) in lanes.iter_mut().enumerate() {
            lane.seeking = true;
            let seek = Seek { consumer: consumer as u32, place: Place::Earliest };
            let (session, out) = connection.session();
            session.request(&seek, consumer as u32, out).map_err(DriverError::Request)?;
        }
        Ok(())
    }

    fn is_over(&self, lanes: &[Lane], idle_ns: u64) -> bool {
        if self.shared.has_failed() {
            return true;
        }
        let impatient = PATIENCE.as_nanos() < idle_ns as u128;
        match self.kind {
            Kind::Consume | Kind::Produce => {
                let read = !self.options.repeat && lanes.iter().all(Lane::at_end);
                read || impatient || self.shared.phase() == Phase::Stopping
            }
            Kind::Tail | Kind::Mixed => {
                let sent = self.shared.producers_left.load(Ordering::Acquire) == 0;
                let all = self.shared.published.counts().0 <= self.shared.delivered.counts().0;
                sent && (all || impatient)
            }
        }
    }

    /// Ends the subscriptions: their cursors would keep old messages from going.
    async fn leave(&self, connection: &mut Connection<u32>, consumers: u32) -> Result<(), ConsumeError> {
        if self.shared.has_failed() {
            return Ok(());
        }
        for consumer in 0..consumers {
            let (session, out) = connection.session();
            session.close_consumer(consumer, consumer, out).map_err(DriverError::Request)?;
            let partition = self.route.partitions[consumer as usize];
            let delete = DeleteSubscription { partition, subscription: self.subscription() };
            session.request(&delete, consumer, out).map_err(DriverError::Request)?;
            while 0 < connection.session().0.in_flight() {
                connection.turn().await?;
                while let Some(incoming) = connection.received()? {
                    match incoming.event {
                        Event::Answer { answer: Err(refusal), .. } | Event::Refused(refusal) => {
                            return Err(DriverError::Refused(refusal).into());
                        }
                        Event::Answer { .. }
                        | Event::Welcome(_)
                        | Event::Deliver { .. }
                        | Event::Damaged { .. }
                        | Event::Ignored => {}
                    }
                }
            }
        }
        Ok(())
    }

    fn subscription(&self) -> String {
        format!("bench-{:08x}", self.run)
    }
}

impl Lane {
    fn at_end(&self) -> bool {
        self.end <= self.next
    }

    /// Looks at the batches of one delivery; returns how many messages it brought.
    fn deliver(
        &mut self,
        payload: &[u8],
        now_ns: u64,
        verifier: &mut Option<Verifier>,
        seen: &mut Vec<Seen>,
    ) -> Result<u64, ConsumeError> {
        let mut messages = 0;
        let mut position = 0;
        while position < payload.len() {
            let header = batch::header(&payload[position..])?;
            let batch = &payload[position..position + header.batch_bytes as usize];
            position += frame::padded(header.batch_bytes as usize);
            let end = header.base_offset + u64::from(header.record_count);
            let Some(verifier) = verifier else {
                messages += u64::from(header.record_count);
                self.next = end;
                continue;
            };
            // A batch may begin below the place that was asked for; its first messages are then not ours.
            let wanted_from = if header.base_offset < self.next && self.next < end {
                self.next
            } else {
                verifier.offsets(self.next, header.base_offset);
                header.base_offset
            };
            let records = Records::open(batch, UNPACKED_BYTES_MAX)?;
            for record in records.iter() {
                let record = record?;
                if record.offset < wanted_from {
                    continue;
                }
                messages += 1;
                let Some(stamp) = verifier.message(record.payload) else { continue };
                match seen.last_mut() {
                    Some(last) if last.intended_ns == stamp.sent_ns && last.ended_ns == now_ns => last.messages += 1,
                    Some(_) | None => seen.push(Seen { intended_ns: stamp.sent_ns, ended_ns: now_ns, messages: 1 }),
                }
            }
            self.next = end;
        }
        Ok(messages)
    }
}
