//! `drava consume`: writes the messages of a topic to standard output.
//!
//! Messages are gathered in a large buffer that is written when it is full or when none is there at the moment. With a
//! subscription, what was written is then acknowledged: never the other way round.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::AsFd;

use clap::{Args, ValueEnum};
use drava_client::{Client, Consumer, Message, Place, ReadError, Reader, SubscribeError};

use super::connect::{ServerOptions, block_on};
use super::{Exit, Failure, json, quantity};

/// Written at once.
const BUFFER_BYTES: usize = 1 << 20;

/// Write the messages of a topic to standard output.
#[derive(Debug, Args)]
pub struct ConsumeCommand {
    /// /tenant/namespace/name; a bare name stands for /public/default/name.
    topic: String,
    #[command(flatten)]
    server: ServerOptions,
    /// Where to start: earliest, latest, offset:NUMBER or time:WHEN, which is a date with time and zone
    /// (time:2026-11-21T10:00:00Z), so long ago (time:-10m) or milliseconds since 1970. With a subscription: where it starts
    /// if it does not exist yet.
    #[arg(long, default_value = "earliest", value_parser = quantity::place, value_name = "PLACE")]
    from: Place,
    /// Wait for new messages; else end where the topic ends now.
    #[arg(long, short)]
    follow: bool,
    /// End after so many messages.
    #[arg(long, short = 'n', value_name = "NUMBER")]
    count: Option<u64>,
    /// Only this partition, by its place in the topic: 0 is the first.
    #[arg(long, value_name = "INDEX")]
    partition: Option<u32>,
    /// Use this durable subscription, and acknowledge what was written.
    #[arg(long, value_name = "NAME")]
    subscription: Option<String>,
    /// Take the subscription over from the consumer that has it.
    #[arg(long, requires = "subscription")]
    take_over: bool,
    /// raw: the payload. json: one object a line, with partition, offset, times, key and headers.
    #[arg(long, value_enum, default_value = "raw")]
    format: Format,
    /// Written after each raw message. Escapes: \n \r \t \0 \\ \xHH.
    #[arg(long, default_value = "\\n", value_parser = quantity::separator, value_name = "TEXT")]
    delimiter: Separator,
    /// Write the key, if a message has one, and this before each raw message.
    #[arg(long, value_parser = quantity::separator, value_name = "TEXT")]
    key_separator: Option<Separator>,
}

/// An alias, or clap would take it for a list.
type Separator = Vec<u8>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Raw,
    Json,
}

impl ConsumeCommand {
    pub fn run(self) -> Result<(), Failure> {
        let stdout =
            io::stdout().as_fd().try_clone_to_owned().map_err(|error| Failure::io("standard output", &error))?;
        let writer = Writer {
            // Not `Stdout`, which looks for the last line end in every buffer.
            out: File::from(stdout),
            buffer: Vec::with_capacity(BUFFER_BYTES + BUFFER_BYTES / 4),
            format: self.format,
            delimiter: self.delimiter.clone(),
            key_separator: self.key_separator.clone(),
            left: self.count.unwrap_or(u64::MAX),
        };
        block_on(async move {
            let client = self.server.connect().await?;
            match self.subscription.clone() {
                None => self.read(&client, writer).await,
                Some(name) => self.subscribe(&client, &name, writer).await,
            }
        })
    }

    async fn read(&self, client: &Client, mut writer: Writer) -> Result<(), Failure> {
        let mut builder = client.reader(&self.topic).from(self.from);
        if let Some(index) = self.partition {
            builder = builder.partition(index);
        }
        if !self.follow {
            self.check_end(client).await?;
            builder = builder.until_end();
        }
        let mut reader = builder.build().await?;
        let mut missing = Missing::default();
        let outcome = tokio::select! {
            outcome = write_all(&mut reader, &mut writer, &mut missing) => outcome,
            _ = tokio::signal::ctrl_c() => Ok(()),
        };
        // Also after an error: what came before it was asked for.
        let flushed = writer.flush();
        outcome.and(flushed).or_else(Stop::into_result).and(missing.into_result())
    }

    /// An offset that no partition has reached yet is a mistake, unless somebody waits for it.
    async fn check_end(&self, client: &Client) -> Result<(), Failure> {
        let Place::Offset(offset) = self.from else { return Ok(()) };
        let states = client.describe(&self.topic).await?;
        let chosen = (0u32..).zip(&states).filter(|(index, _)| self.partition.is_none_or(|chosen| chosen == *index));
        match chosen.map(|(_, state)| state.end_offset).max() {
            Some(end_offset) if end_offset < offset => Err(Failure::new(
                Exit::BeyondEnd,
                format!(
                    "offset {offset} is beyond the end of {}: the next message gets offset {end_offset}; --follow waits",
                    self.topic
                ),
            )),
            // No partition: the reader says so.
            Some(_) | None => Ok(()),
        }
    }

    async fn subscribe(&self, client: &Client, name: &str, mut writer: Writer) -> Result<(), Failure> {
        let mut builder = client.subscribe(&self.topic, name).start(self.from);
        if let Some(index) = self.partition {
            builder = builder.partition(index);
        }
        if self.take_over {
            builder = builder.take_over();
        }
        let mut consumer = builder.build().await?;
        let mut ends = if self.follow { None } else { Some(self.ends(client, name).await?) };
        let mut written = BTreeMap::new();
        let mut missing = Missing::default();
        let outcome = tokio::select! {
            outcome = deliver_all(&mut consumer, &mut writer, &mut ends, &mut written, &mut missing) => outcome,
            _ = tokio::signal::ctrl_c() => Ok(()),
        };
        let outcome = match writer.flush() {
            Ok(()) => {
                acknowledge(&consumer, &mut written);
                outcome
            }
            Err(stop) => outcome.and(Err(stop)),
        };
        let closed = consumer.close().await.map_err(Failure::from);
        outcome.or_else(Stop::into_result).and(closed).and(missing.into_result())
    }

    /// By index of a partition that holds messages beyond the cursor: the offset to end before.
    async fn ends(&self, client: &Client, subscription: &str) -> Result<BTreeMap<u32, u64>, Failure> {
        let states = client.describe(&self.topic).await?;
        let mut ends = BTreeMap::new();
        for (index, state) in (0u32..).zip(&states) {
            if self.partition.is_some_and(|partition| partition != index) {
                continue;
            }
            let cursor = state.subscriptions.iter().find(|found| found.name == subscription).map(|found| found.offset);
            if cursor.unwrap_or(state.start_offset).max(state.start_offset) < state.end_offset {
                ends.insert(index, state.end_offset);
            }
        }
        Ok(ends)
    }
}

async fn write_all(reader: &mut Reader, writer: &mut Writer, missing: &mut Missing) -> Result<(), Stop> {
    while 0 < writer.left {
        // What is here already is gathered; only when nothing is, the buffer is written before we wait.
        let next = match futures_lite::future::poll_once(reader.next()).await {
            Some(next) => next,
            None => {
                writer.flush()?;
                reader.next().await
            }
        };
        match next {
            Ok(Some(message)) => drop(writer.write(&message)?),
            Ok(None) => break,
            Err(error @ ReadError::Damaged { .. }) => {
                let ReadError::Damaged { offsets, .. } = &error else { unreachable!("matched above") };
                missing.note(offsets, &error);
            }
            Err(error) => return Err(Failure::from(error).into()),
        }
    }
    Ok(())
}

async fn deliver_all(
    consumer: &mut Consumer,
    writer: &mut Writer,
    ends: &mut Option<BTreeMap<u32, u64>>,
    written: &mut BTreeMap<u32, u64>,
    missing: &mut Missing,
) -> Result<(), Stop> {
    while 0 < writer.left && ends.as_ref().is_none_or(|ends| !ends.is_empty()) {
        let next = match futures_lite::future::poll_once(consumer.next()).await {
            Some(next) => next,
            None => {
                writer.flush()?;
                acknowledge(consumer, written);
                consumer.next().await
            }
        };
        let message = match next {
            Ok(message) => message,
            Err(error @ SubscribeError::Damaged { .. }) => {
                let SubscribeError::Damaged { partition, offsets, .. } = &error else { unreachable!("matched above") };
                missing.note(offsets, &error);
                // Said once is enough: the cursor goes past what nobody will ever read.
                written.insert(*partition, offsets.end);
                if let Some(ends) = ends
                    && ends.get(partition).is_some_and(|end| *end <= offsets.end)
                {
                    ends.remove(partition);
                }
                continue;
            }
            Err(error) => return Err(Failure::from(error).into()),
        };
        if let Some(ends) = ends {
            // Messages of a partition that has reached its end are left for the next time.
            match ends.get(&message.partition) {
                Some(end) if message.offset < *end => {
                    if message.offset + 1 == *end {
                        ends.remove(&message.partition);
                    }
                }
                Some(_) => {
                    ends.remove(&message.partition);
                    continue;
                }
                None => continue,
            }
        }
        let flushed = writer.write(&message)?;
        written.insert(message.partition, message.offset + 1);
        if flushed == Flushed::Yes {
            acknowledge(consumer, written);
        }
    }
    Ok(())
}

/// Messages that the node has lost. They are told at once, and counted for the exit code.
#[derive(Debug, Default)]
struct Missing {
    messages: u64,
}

impl Missing {
    fn note(&mut self, offsets: &Range<u64>, error: &dyn std::error::Error) {
        self.messages = self.messages.saturating_add(offsets.end - offsets.start);
        drop(writeln!(io::stderr(), "drava: {error}; going on at {}", offsets.end));
    }

    fn into_result(self) -> Result<(), Failure> {
        match self.messages {
            0 => Ok(()),
            messages => Err(Failure::new(
                Exit::Damaged,
                format!("{messages} messages are damaged on disk and were left out; everything else was written"),
            )),
        }
    }
}

/// Acknowledges what was written, by partition: everything below.
fn acknowledge(consumer: &Consumer, written: &mut BTreeMap<u32, u64>) {
    while let Some((partition, below)) = written.pop_first() {
        consumer.ack_below(partition, below);
    }
}

/// Why writing ended before the messages did.
#[derive(Debug)]
enum Stop {
    /// Nobody reads on: `| head` has seen enough.
    Unread,
    Failed(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Stop {
        Stop::Failed(failure)
    }
}

impl Stop {
    fn into_result(self) -> Result<(), Failure> {
        match self {
            Stop::Unread => Ok(()),
            Stop::Failed(failure) => Err(failure),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flushed {
    /// Everything up to and with this message.
    Yes,
    No,
}

struct Writer {
    out: File,
    buffer: Vec<u8>,
    format: Format,
    delimiter: Vec<u8>,
    key_separator: Option<Vec<u8>>,
    /// Messages that are still wanted.
    left: u64,
}

impl Writer {
    fn write(&mut self, message: &Message) -> Result<Flushed, Stop> {
        match self.format {
            Format::Raw => {
                if let (Some(separator), Some(key)) = (&self.key_separator, &message.key) {
                    self.buffer.extend_from_slice(key);
                    self.buffer.extend_from_slice(separator);
                }
                self.buffer.extend_from_slice(&message.payload);
                self.buffer.extend_from_slice(&self.delimiter);
            }
            Format::Json => {
                serde_json::to_writer(&mut self.buffer, &json::message(message)).expect("messages become JSON");
                self.buffer.push(b'\n');
            }
        }
        self.left -= 1;
        if self.buffer.len() < BUFFER_BYTES {
            return Ok(Flushed::No);
        }
        self.flush()?;
        Ok(Flushed::Yes)
    }

    fn flush(&mut self) -> Result<(), Stop> {
        let written = self.out.write_all(&self.buffer);
        self.buffer.clear();
        written.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Stop::Unread,
            _ => Stop::Failed(Failure::io("standard output", &error)),
        })
    }
}
