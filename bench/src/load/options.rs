//! What a run does, as options of the command line and as settings in its result.

use std::net::SocketAddr;
use std::time::Duration;

use clap::ValueEnum;
use drava_protocol::batch::Compression;
use drava_protocol::message::Durability;
use serde::{Deserialize, Serialize};

use crate::payload::STAMP_BYTES;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Publish only.
    Produce,
    /// Read what lies in the topics.
    Consume,
    /// Publish at a rate and follow at the end of the topics.
    Tail,
    /// Publish and consume at once, as fast as both go.
    Mixed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DurabilityOption {
    Disk,
    Memory,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keys {
    None,
    /// All keys equally often.
    Uniform,
    /// Few keys often, many keys seldom.
    Zipf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompressionOption {
    None,
    Lz4,
    Zstd,
}

#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct LoadOptions {
    /// The node: address of its shared port or of one of its cores
    #[arg(long, default_value = "127.0.0.1:7400", help_heading = "Target")]
    pub addr: SocketAddr,
    /// Process id of the node, to tell its CPU time and memory
    #[arg(long, value_name = "PID", help_heading = "Target")]
    pub node_pid: Option<u32>,
    /// Topics are named PREFIX-0, PREFIX-1, …
    #[arg(long, value_name = "PREFIX", default_value = "bench", help_heading = "Target")]
    pub topic: String,
    /// Topics to spread the load over; made where they are missing
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000), help_heading = "Target")]
    pub topics: u32,
    /// Partitions of each topic
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Target")]
    pub partitions: u32,
    /// When the node acknowledges: after the durable write, or from memory
    #[arg(long, value_enum, default_value = "disk", help_heading = "Target")]
    pub durability: DurabilityOption,
    /// Oldest messages of a partition go when it holds more than this many bytes; 0 keeps all
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = parse_bytes, help_heading = "Target")]
    pub retention_bytes: u64,

    /// Bytes of each message
    #[arg(long, value_name = "BYTES", default_value = "1k", value_parser = parse_message_bytes, help_heading = "Load")]
    pub size: u32,
    /// Messages of each batch; 1 sends every message by itself
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_048_576), help_heading = "Load")]
    pub batch: u32,
    /// Messages a second in all, sent on time whether or not the node keeps up; without it, as fast as answers come
    #[arg(long, value_name = "PER_SECOND", help_heading = "Load")]
    pub rate: Option<f64>,
    /// Connections that publish
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=10_000), help_heading = "Load")]
    pub connections: u32,
    /// Connections that consume [default: as many as publish]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=10_000), help_heading = "Load")]
    pub consumers: Option<u32>,
    /// Batches that wait for their answer on each connection
    #[arg(long, value_name = "COUNT", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536), help_heading = "Load")]
    pub in_flight: u32,
    /// Keys of the messages
    #[arg(long, value_enum, default_value = "none", help_heading = "Load")]
    pub keys: Keys,
    /// Different keys
    #[arg(long, value_name = "COUNT", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000), help_heading = "Load")]
    pub key_count: u32,
    /// How batches are packed
    #[arg(long, value_enum, default_value = "none", help_heading = "Load")]
    pub compression: CompressionOption,
    /// Publish without producer sequences: a repeated batch would be appended twice
    #[arg(long, help_heading = "Load")]
    pub no_sequences: bool,
    /// Bytes under way to each consuming connection
    #[arg(long, value_name = "BYTES", default_value = "8m", value_parser = parse_bytes, help_heading = "Load")]
    pub credit: u64,
    /// Read the topics again from their start when their end is reached
    #[arg(long, help_heading = "Load")]
    pub repeat: bool,

    /// Seconds to measure, after the warm-up; consuming without --repeat ends when all is read
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, help_heading = "Run")]
    pub duration: f64,
    /// Seconds of load before the measured stretch
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, help_heading = "Run")]
    pub warm_up: f64,
    /// Messages in all, instead of a duration; there is no warm-up then
    #[arg(long, value_name = "COUNT", help_heading = "Run")]
    pub messages: Option<u64>,
    /// Cores of the load generator, one executor each [default: the last core]
    #[arg(long, value_name = "CORES", value_delimiter = ',', help_heading = "Run")]
    pub cores: Vec<usize>,
    /// Do not look at what was delivered
    #[arg(long, help_heading = "Run")]
    pub no_verify: bool,
}

impl Default for LoadOptions {
    /// As the command line without arguments.
    fn default() -> LoadOptions {
        #[derive(clap::Parser)]
        struct Alone {
            #[command(flatten)]
            options: LoadOptions,
        }
        <Alone as clap::Parser>::parse_from(["drava-bench"]).options
    }
}

impl LoadOptions {
    pub fn compression(&self) -> Compression {
        match self.compression {
            CompressionOption::None => Compression::None,
            CompressionOption::Lz4 => Compression::Lz4,
            CompressionOption::Zstd => Compression::Zstd,
        }
    }

    pub fn durability(&self) -> Durability {
        match self.durability {
            DurabilityOption::Disk => Durability::Disk,
            DurabilityOption::Memory => Durability::Memory,
        }
    }

    pub fn consumers(&self) -> u32 {
        self.consumers.unwrap_or(self.connections)
    }

    /// How long to measure. `None`: until all messages are sent or read.
    pub fn measured(&self, kind: Kind) -> Option<Duration> {
        (!self.is_finite(kind)).then(|| Duration::from_secs_f64(self.duration.max(0.0)))
    }

    /// A run that ends by itself is measured from its first message.
    pub fn warm_up(&self, kind: Kind) -> Duration {
        if self.is_finite(kind) { Duration::ZERO } else { Duration::from_secs_f64(self.warm_up.max(0.0)) }
    }

    fn is_finite(&self, kind: Kind) -> bool {
        match kind {
            Kind::Consume => !self.repeat,
            Kind::Produce | Kind::Tail | Kind::Mixed => self.messages.is_some(),
        }
    }

    pub fn cores(&self) -> Vec<usize> {
        if self.cores.is_empty() { vec![crate::limits::cores().1] } else { self.cores.clone() }
    }

    pub fn topic_name(&self, index: u32) -> String {
        format!("{}-{index}", self.topic)
    }
}

/// Reads `4096`, `64k`, `1m` or `2g`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let number = lower.trim_end_matches("ib").trim_end_matches('b');
    let (digits, shift) = match number.chars().last() {
        Some('k') => (&number[..number.len() - 1], 10),
        Some('m') => (&number[..number.len() - 1], 20),
        Some('g') => (&number[..number.len() - 1], 30),
        _ => (number, 0),
    };
    let value: u64 = digits.trim().parse().map_err(|_| format!("`{text}` is no size such as 4096, 64k, 1m or 2g"))?;
    value.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is too large"))
}

fn parse_message_bytes(text: &str) -> Result<u32, String> {
    const MESSAGE_BYTES_MAX: u64 = 1 << 30;
    let bytes = parse_bytes(text)?;
    if !(STAMP_BYTES as u64..=MESSAGE_BYTES_MAX).contains(&bytes) {
        return Err(format!("a message has {STAMP_BYTES} to {MESSAGE_BYTES_MAX} bytes: it carries what is checked"));
    }
    Ok(bytes as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("64k", 65_536), ("64KiB", 65_536), ("1MB", 1 << 20), ("2g", 2 << 30)]
        {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "k", "-1", "1x", "99999999999g"] {
            parse_bytes(text).unwrap_err();
        }
        parse_message_bytes("31").unwrap_err();
        assert_eq!(parse_message_bytes("32"), Ok(32));
    }

    #[test]
    fn the_default_measures_durable_batches_of_1_kib() {
        let options = LoadOptions::default();
        assert_eq!((options.size, options.batch, options.durability), (1024, 64, DurabilityOption::Disk));
        assert!(!options.no_verify);
    }
}
