//! `drava produce`: publishes the lines of a file or of standard input.
//!
//! 1. A thread reads blocks and cuts them after their last delimiter, so that each block holds whole lines.
//! 2. The command cuts the lines, without copying, and gives each to the producer; it waits only when the producer's
//!    window is full.
//! 3. The producer makes batches, keeps several on their way, and repeats what was not acknowledged, with its sequence:
//!    every line is stored once.
//! 4. At the end the last acknowledgement is waited for. Anything that was not acknowledged makes the command fail.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use clap::{Args, ValueEnum};
use drava_client::{Compression, Producer, Record};
use indicatif::{ProgressBar, ProgressStyle};
use memchr::memmem::Finder;
use serde_json::json;
use tokio::sync::mpsc;

use super::connect::{ServerOptions, block_on};
use super::output::{Output, print_json};
use super::{Failure, quantity, topic};
use crate::config::option::bytes_text;

/// Read at once.
const BLOCK_BYTES: usize = 1 << 20;
/// Blocks that wait for the producer; the reading thread waits when there are more.
const BLOCKS_MAX: usize = 4;
/// No line is longer: no node takes larger batches.
const LINE_BYTES_MAX: usize = 64 << 20;
/// Batches of a partition on their way.
const WINDOW_BATCHES: usize = 32;

/// Publish lines, each once and in order, and wait until they are stored.
#[derive(Debug, Args)]
pub struct ProduceCommand {
    /// /tenant/namespace/name; a bare name stands for /public/default/name.
    topic: String,
    #[command(flatten)]
    server: ServerOptions,
    /// Read this file; else standard input.
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// What ends a message; not part of it. Escapes: \n \r \t \0 \\ \xHH.
    #[arg(long, default_value = "\\n", value_parser = quantity::separator, value_name = "TEXT")]
    delimiter: Separator,
    /// What is before the first of these in a line is its key; a line without one has no key.
    #[arg(long, value_parser = quantity::separator, value_name = "TEXT")]
    key_separator: Option<Separator>,
    /// The largest batch; a longer line has a batch of its own.
    #[arg(long, default_value = "256KiB", value_parser = quantity::bytes, value_name = "SIZE")]
    batch_bytes: u64,
    /// How long a line may wait for others to share its batch.
    #[arg(long, default_value_t = 2, value_name = "MS")]
    linger_ms: u64,
    /// How batches are packed. The node passes them on as they are.
    #[arg(long, value_enum, default_value = "none")]
    compression: CompressionName,
    /// Create the topic unless it exists.
    #[arg(long)]
    create: bool,
    /// Partitions of a topic that --create creates.
    #[arg(long, default_value_t = 1, requires = "create", value_parser = clap::value_parser!(u32).range(1..=1024))]
    partitions: u32,
    /// Say nothing at the end.
    #[arg(long, short)]
    quiet: bool,
    /// The form of the summary: text on standard error, or JSON on standard output.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Bytes that divide. An alias, or clap would take it for a list.
type Separator = Vec<u8>;

#[derive(Clone, Copy, Debug, ValueEnum)]
enum CompressionName {
    None,
    Lz4,
    Zstd,
}

impl From<CompressionName> for Compression {
    fn from(name: CompressionName) -> Compression {
        match name {
            CompressionName::None => Compression::None,
            CompressionName::Lz4 => Compression::Lz4,
            CompressionName::Zstd => Compression::Zstd,
        }
    }
}

/// What was given to the producer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    messages: u64,
    /// Keys and payloads.
    bytes: u64,
}

impl ProduceCommand {
    pub fn run(self) -> Result<(), Failure> {
        block_on(self.produce())
    }

    async fn produce(self) -> Result<(), Failure> {
        let (input, input_bytes) = self.open()?;
        let client = self.server.connect().await?;
        if self.create {
            topic::ensure(&client, &self.topic, self.partitions).await?;
        }
        let batch_bytes = usize::try_from(self.batch_bytes).unwrap_or(usize::MAX);
        let producer = client
            .producer(&self.topic)
            .batch_bytes(batch_bytes)
            .linger(Duration::from_millis(self.linger_ms))
            .window(batch_bytes.saturating_mul(WINDOW_BATCHES), WINDOW_BATCHES)
            .compression(self.compression.into())
            .build()
            .await?;
        let progress = self.progress(input_bytes);
        let began = Instant::now();
        let mut totals = Totals::default();
        let sent = self.send(&producer, input, &mut totals, &progress).await;
        // Whatever stopped the reading: what was taken before is to be stored.
        let flushed = producer.flush().await.map_err(Failure::from);
        progress.finish_and_clear();
        sent.and(flushed).map_err(|failure| {
            let text = format!(
                "{}\n{} messages were read; those that were not acknowledged may be stored or not",
                failure.text, totals.messages
            );
            Failure::new(failure.exit, text)
        })?;
        self.summary(totals, began.elapsed())
    }

    fn open(&self) -> Result<(Box<dyn Read + Send>, Option<u64>), Failure> {
        let Some(path) = &self.file else { return Ok((Box::new(io::stdin()), None)) };
        let file = File::open(path).map_err(|error| Failure::io(&path.display().to_string(), &error))?;
        let size_bytes = file.metadata().ok().filter(|metadata| metadata.is_file()).map(|metadata| metadata.len());
        Ok((Box::new(file), size_bytes))
    }

    async fn send(
        &self,
        producer: &Producer,
        input: Box<dyn Read + Send>,
        totals: &mut Totals,
        progress: &ProgressBar,
    ) -> Result<(), Failure> {
        let (blocks, mut received) = mpsc::channel(BLOCKS_MAX);
        let delimiter = self.delimiter.clone();
        std::thread::spawn(move || read_blocks(input, &delimiter, &blocks));
        let delimiter = Finder::new(&self.delimiter);
        let key_separator = self.key_separator.as_ref().map(Finder::new);
        // With this much taken at once the connection gets its turn, so that sending and reading overlap.
        let turn_bytes = self.batch_bytes.min(BLOCK_BYTES as u64) as usize;
        let mut taken_bytes = 0;
        while let Some(block) = received.recv().await {
            let mut block = block.map_err(|error| Failure::io("the input", &error))?;
            progress.inc(block.len() as u64);
            while let Some(line) = next_line(&mut block, &delimiter) {
                let record = record(line, key_separator.as_ref());
                let size = record.payload.len() + record.key.as_ref().map_or(0, Bytes::len);
                let place = totals.messages;
                producer.enqueue(record).await.map(drop).map_err(|error| {
                    let failure = Failure::from(error);
                    Failure::new(failure.exit, format!("message {}: {}", place + 1, failure.text))
                })?;
                totals.messages += 1;
                totals.bytes += size as u64;
                taken_bytes += size;
                if turn_bytes <= taken_bytes {
                    taken_bytes = 0;
                    tokio::task::yield_now().await;
                }
            }
        }
        Ok(())
    }

    fn progress(&self, input_bytes: Option<u64>) -> ProgressBar {
        // With lines typed by hand there is nothing to show.
        let typed = self.file.is_none() && io::stdin().is_terminal();
        if self.quiet || typed || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let (bar, template) = match input_bytes {
            Some(bytes) => {
                (ProgressBar::new(bytes), "{bar:40} {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left")
            }
            None => (ProgressBar::new_spinner(), "{spinner} {bytes}, {binary_bytes_per_sec}"),
        };
        bar.with_style(ProgressStyle::with_template(template).expect("the template is right"))
    }

    fn summary(&self, totals: Totals, took: Duration) -> Result<(), Failure> {
        if self.output == Output::Json {
            return print_json(&json!({
                "messages": totals.messages,
                "bytes": totals.bytes,
                "seconds": took.as_secs_f64(),
            }));
        }
        if !self.quiet {
            let seconds = took.as_secs_f64().max(1e-9);
            let line = format!(
                "{} messages, {} in {:.2} s: {:.0} messages/s, {}/s, all acknowledged",
                totals.messages,
                bytes_text(totals.bytes),
                took.as_secs_f64(),
                totals.messages as f64 / seconds,
                bytes_text((totals.bytes as f64 / seconds) as u64),
            );
            drop(writeln!(io::stderr(), "{line}"));
        }
        Ok(())
    }
}

/// Cuts the first line off `block`; the delimiter is dropped. A rest without delimiter is the last line of the input.
fn next_line(block: &mut Bytes, delimiter: &Finder<'_>) -> Option<Bytes> {
    if block.is_empty() {
        return None;
    }
    match delimiter.find(block) {
        Some(position) => {
            let line = block.split_to(position);
            drop(block.split_to(delimiter.needle().len()));
            Some(line)
        }
        None => Some(std::mem::take(block)),
    }
}

fn record(line: Bytes, key_separator: Option<&Finder<'_>>) -> Record {
    match key_separator.and_then(|separator| Some((separator.find(&line)?, separator.needle().len()))) {
        Some((position, length)) => Record::new(line.slice(position + length..)).key(line.slice(..position)),
        None => Record::new(line),
    }
}

/// Reads `input` to its end into blocks of whole lines; only the last may lack its delimiter.
fn read_blocks(mut input: impl Read, delimiter: &[u8], blocks: &mpsc::Sender<io::Result<Bytes>>) {
    let finder = Finder::new(delimiter);
    let mut buffer = BytesMut::zeroed(BLOCK_BYTES);
    let mut filled = 0;
    loop {
        if filled == buffer.len() {
            if LINE_BYTES_MAX <= filled {
                let text = format!("a line is longer than {}", bytes_text(LINE_BYTES_MAX as u64));
                drop(blocks.blocking_send(Err(io::Error::new(io::ErrorKind::InvalidData, text))));
                return;
            }
            buffer.resize(filled * 2, 0);
        }
        let read_bytes = match input.read(&mut buffer[filled..]) {
            Ok(read_bytes) => read_bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                drop(blocks.blocking_send(Err(error)));
                return;
            }
        };
        let before = filled;
        filled += read_bytes;
        let whole = if read_bytes == 0 {
            filled
        } else {
            // The delimiter may have begun in what was there before.
            let searched_from = (before + 1).saturating_sub(delimiter.len());
            // Front to back, as the lines are cut: a delimiter such as `--` is found elsewhere in `---` from the back.
            let found = finder.find_iter(&buffer[searched_from..filled]).last();
            found.map_or(0, |position| searched_from + position + delimiter.len())
        };
        if 0 < whole {
            let mut next = BytesMut::zeroed(BLOCK_BYTES.max(filled - whole));
            next[..filled - whole].copy_from_slice(&buffer[whole..filled]);
            filled -= whole;
            buffer.truncate(whole);
            if blocks.blocking_send(Ok(std::mem::replace(&mut buffer, next).freeze())).is_err() {
                return;
            }
        }
        if read_bytes == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a few bytes at a time.
    struct Trickle<'a>(&'a [u8], usize);

    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let size = self.0.len().min(self.1).min(buffer.len());
            buffer[..size].copy_from_slice(&self.0[..size]);
            self.0 = &self.0[size..];
            Ok(size)
        }
    }

    fn lines(input: &[u8], delimiter: &[u8], step: usize) -> Vec<Vec<u8>> {
        let (sender, mut receiver) = mpsc::channel(input.len() + 2);
        read_blocks(Trickle(input, step), delimiter, &sender);
        drop(sender);
        let finder = Finder::new(delimiter);
        let mut found = Vec::new();
        while let Some(block) = receiver.blocking_recv() {
            let mut block = block.unwrap();
            while let Some(line) = next_line(&mut block, &finder) {
                found.push(line.to_vec());
            }
        }
        found
    }

    #[test]
    fn every_line_comes_once_however_the_input_is_cut() {
        let cases: [(&str, &str, &[&str]); 8] = [
            ("", "\n", &[]),
            ("a", "\n", &["a"]),
            ("a\n", "\n", &["a"]),
            ("\n", "\n", &[""]),
            ("a\n\nb", "\n", &["a", "", "b"]),
            ("one--two--", "--", &["one", "two"]),
            ("one---two", "--", &["one", "-two"]),
            ("a\r\nb\n", "\n", &["a\r", "b"]),
        ];
        for (input, delimiter, expected) in cases {
            for step in 1..=input.len() + 1 {
                let found = lines(input.as_bytes(), delimiter.as_bytes(), step);
                let expected: Vec<Vec<u8>> = expected.iter().map(|line| line.as_bytes().to_vec()).collect();
                assert_eq!(found, expected, "{input:?} in steps of {step}");
            }
        }
    }

    #[test]
    fn a_line_may_be_longer_than_a_block() {
        let mut input = vec![b'x'; BLOCK_BYTES * 2 + 7];
        input.push(b'\n');
        input.extend_from_slice(b"next");
        let found = lines(&input, b"\n", 100_000);
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [BLOCK_BYTES * 2 + 7, 4]);
    }

    #[test]
    fn a_key_is_what_is_before_the_first_separator() {
        let separator = Finder::new(b":");
        let keyed = record(Bytes::from_static(b"a:b:c"), Some(&separator));
        assert_eq!((keyed.key.as_deref(), &keyed.payload[..]), (Some(&b"a"[..]), &b"b:c"[..]));
        let plain = record(Bytes::from_static(b"abc"), Some(&separator));
        assert_eq!((plain.key, &plain.payload[..]), (None, &b"abc"[..]));
    }
}
