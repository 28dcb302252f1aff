//! The standard set of workloads on fresh nodes, each figure beside its limit.
//!
//! The limits are measured first, in the same run. Each row then starts a node of its own on an empty data directory,
//! loads it, and is judged. With two cores the node's shard runs on the first and the load generator on the last.

mod beside;
pub mod file;
pub mod kill;
pub mod node;
pub mod row;
mod storage;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use serde_json::json;

use beside::Limit;
pub use node::{Node, NodeError};
pub use row::{Row, Target};

use crate::cpu::process_memory;
use crate::latency::show_us;
use crate::limits::{self, Limits, LimitsConfig, LimitsError, Scratch};
use crate::load::engine::describe;
use crate::load::{self, Kind, LoadOptions, Outcome};
use crate::machine::Machine;
use crate::measure::{GIB, MIB};
use crate::progress::Progress;
use crate::table;

/// Messages of a batch that has about 64 KiB, as the bare path's frames.
const BATCH: u32 = 64;
const MESSAGE_BYTES: u32 = 1 << 10;
/// What a shard may hold by its defaults: receive buffers, staged bytes, cache.
const SHARD_BUDGET_BYTES: f64 = (64.0 + 32.0 + 128.0) * MIB;
/// Old messages go, so that segments are written over as in a node that has run for a while.
const RETENTION_BYTES: u64 = 512 << 20;
/// Small enough for the cache of one shard.
const CACHED_BYTES: u64 = 64 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum RowId {
    /// A real file through the command line, there and back
    RealFile,
    /// Durable publishing in batches of 64 KiB, one shard and two
    PublishBatch,
    /// Durable publishing of single messages
    PublishSingle,
    /// CPU of the node for publish-batch
    PublishCpu,
    /// Consuming what is in the cache
    Tail,
    /// Consuming what is only on disk
    Backlog,
    /// Publishing and consuming at once
    Both,
    /// Many topics against one
    Topics,
    /// Durable publishing, one message in flight
    #[value(name = "latency-1")]
    LatencyOne,
    /// From publishing to delivery, one message in flight
    LatencyE2e,
    /// Durable publishing at half of the highest rate
    LatencyHalf,
    /// Start of an empty node, and of a full one after kill -9
    Start,
    /// Memory of an idle node and of one under load
    Memory,
    /// Restart after kill -9 with a long journal
    Recover,
    /// Bytes written for each byte published
    WriteAmp,
    /// Catching up with a quiet topic, before and after compaction
    Defrag,
    /// Publishing while compaction and scrubbing run
    Background,
    /// Publishing while retention deletes
    Retention,
    /// kill -9 under load in a loop: acknowledged messages that are lost
    Kill,
}

#[derive(Clone, Debug, clap::Args)]
pub struct SuiteOptions {
    /// The node's binary
    #[arg(long, value_name = "PATH")]
    pub node_bin: PathBuf,
    /// Short runs and little data: shows that everything works, not how fast it is
    #[arg(long)]
    pub quick: bool,
    /// Write the rows here
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Where data directories and measured files lie meanwhile [default: ~/.cache/drava/bench]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Only these rows
    #[arg(value_enum, value_name = "ID")]
    pub rows: Vec<RowId>,
}

#[derive(Debug, thiserror::Error)]
pub enum SuiteError {
    #[error("measure the limits")]
    Limits(#[from] LimitsError),
    #[error("make a directory for the nodes' data")]
    Scratch(#[source] std::io::Error),
    #[error("find {path}")]
    Bin {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// A row could not be measured.
#[derive(Debug, thiserror::Error)]
enum RowError {
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error("measure the limit beside it")]
    Limits(#[from] LimitsError),
    #[error("{0}")]
    Load(String),
    #[error("{faults} faults: {first}")]
    Faults { faults: u64, first: String },
    #[error(transparent)]
    File(#[from] file::FileError),
    #[error("kill -9 in a loop")]
    Kill(#[from] kill::KillError),
    #[error("read the node's memory")]
    Memory(#[source] std::io::Error),
    #[error("make a data directory")]
    Data(#[source] std::io::Error),
    #[error("read what the node has written")]
    Process(#[source] std::io::Error),
    #[error("read the node's metrics")]
    Metrics(#[source] std::io::Error),
    #[error("compaction has not ended in time; {compacted_mib:.0} MiB were copied")]
    Compaction { compacted_mib: f64 },
}

/// The directory for measured files: on a real disk, unlike what /tmp may be.
pub fn default_dir() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("drava").join("bench")
}

/// Measures the limits and the rows that were asked for. Rows that fail are in the result with the reason.
pub fn run(options: &SuiteOptions) -> Result<Vec<Row>, SuiteError> {
    let node_bin = options.node_bin.canonicalize();
    let node_bin = node_bin.map_err(|source| SuiteError::Bin { path: options.node_bin.clone(), source })?;
    let dir = options.dir.clone().unwrap_or_else(default_dir);
    let progress = Progress::new("limits");
    let limits = limits::run(&LimitsConfig::new(dir.clone(), options.quick), |step| progress.say(step))?;
    drop(progress);
    eprintln!("{}", table::limits(&limits));
    let wanted: BTreeSet<RowId> = if options.rows.is_empty() {
        RowId::value_variants().iter().copied().collect()
    } else {
        options.rows.iter().copied().collect()
    };
    let scratch = Scratch::new(&dir).map_err(SuiteError::Scratch)?;
    let mut suite = Suite {
        node_bin,
        scratch,
        quick: options.quick,
        limits,
        machine: Machine::here(),
        publish_batch: None,
        rows: Vec::new(),
        nodes: 0,
    };
    let needs_backlog = wanted.contains(&RowId::Backlog) || wanted.contains(&RowId::Start);
    for id in wanted {
        let measured = match id {
            RowId::RealFile => suite.real_file(),
            RowId::PublishBatch => suite.publish_batch_rows(),
            RowId::PublishSingle => suite.publish_single(),
            RowId::PublishCpu => suite.publish_cpu(),
            RowId::Tail => suite.tail(),
            // Both look at one data directory of 4 GiB.
            RowId::Backlog if needs_backlog => suite.backlog_and_start(),
            RowId::Backlog => Ok(()),
            RowId::Both => suite.both(),
            RowId::Topics => suite.topics(),
            RowId::LatencyOne => suite.latency_one(),
            RowId::LatencyE2e => suite.latency_e2e(),
            RowId::LatencyHalf => suite.latency_half(),
            RowId::Start if suite.rows.iter().any(|row| row.id == "start") => Ok(()),
            RowId::Start => suite.backlog_and_start(),
            RowId::Memory => suite.memory(),
            RowId::Recover => suite.recover(),
            RowId::WriteAmp => suite.write_amplification(),
            RowId::Defrag => suite.defragmentation(),
            RowId::Background => suite.background(),
            RowId::Retention => suite.retention(),
            RowId::Kill => suite.kill(),
        };
        if let Err(error) = measured {
            suite.could_not(id, &error);
        }
    }
    Ok(suite.rows)
}

struct Suite {
    node_bin: PathBuf,
    scratch: Scratch,
    quick: bool,
    limits: Limits,
    machine: Machine,
    /// Several rows are judged by it.
    publish_batch: Option<(Outcome, Limit)>,
    rows: Vec<Row>,
    nodes: u32,
}

/// A figure and what it is judged by.
struct Judged<'a> {
    id: &'a str,
    what: &'a str,
    value: f64,
    unit: &'a str,
    limit: Option<f64>,
    target: Target,
    note: String,
    settings: serde_json::Value,
}

/// A node and its data directory, which goes with it.
struct Running {
    node: Node,
    data_dir: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        // A node that is killed cannot write any more. What stays goes with the scratch directory.
        drop(self.node.kill());
        drop(std::fs::remove_dir_all(&self.data_dir));
    }
}

impl Suite {
    fn publish_batch_rows(&mut self) -> Result<(), RowError> {
        let (outcome, limit) = self.publish_batch()?;
        let large = {
            let running = self.start(1)?;
            let options = LoadOptions { batch: 1000, in_flight: 2, ..self.load(&running) };
            self.drive(Kind::Produce, &options)?
        };
        let large = rate(&large);
        let note = format!("p50 {}, p99 {}; in batches of 1000: {large:.0} MiB/s", p50(&outcome), p99(&outcome));
        self.judge(Judged {
            id: "publish-batch",
            what: "durable publish, batches of 64 × 1 KiB, 4 connections, one shard",
            value: rate(&outcome),
            unit: "MiB/s",
            limit: Some(limit.value),
            target: Target::PartOfLimit(0.8),
            note,
            settings: settings(&outcome),
        });
        let outcome = {
            let running = self.start(2)?;
            let cores = all_cores();
            let options = LoadOptions { topics: 4, cores, connections: 4, ..self.load(&running) };
            self.drive(Kind::Produce, &options)?
        };
        self.judge(Judged {
            id: "publish-batch-2",
            what: "the same, sum over two shards",
            value: rate(&outcome),
            unit: "MiB/s",
            limit: None,
            target: Target::None,
            note: "the load generator runs on the shards' cores, too".to_owned(),
            settings: settings(&outcome),
        });
        Ok(())
    }

    /// The load that others are compared with; run once.
    fn publish_batch(&mut self) -> Result<(Outcome, Limit), RowError> {
        if let Some(measured) = &self.publish_batch {
            return Ok(measured.clone());
        }
        let measured = self.beside(Suite::bare_frames, |suite| {
            let running = suite.start(1)?;
            let options = suite.load(&running);
            suite.drive(Kind::Produce, &options)
        })?;
        self.publish_batch = Some(measured.clone());
        Ok(measured)
    }

    fn publish_single(&mut self) -> Result<(), RowError> {
        let (outcome, limit) = self.beside(Suite::bare_singles, |suite| {
            let running = suite.start(1)?;
            let options = LoadOptions { batch: 1, connections: 32, in_flight: 128, ..suite.load(&running) };
            suite.drive(Kind::Produce, &options)
        })?;
        let published = outcome.published.as_ref().map_or(0.0, |published| published.messages_per_s);
        let cpu = outcome.node.map_or(0.0, |node| node.cpu_s_per_million);
        let note = format!("p50 {}, p99 {}; {cpu:.2} CPU s a million", p50(&outcome), p99(&outcome));
        self.judge(Judged {
            id: "publish-single",
            what: "durable publish of single 1 KiB messages, 32 producers × 128 in flight",
            value: published,
            unit: "msg/s",
            limit: Some(limit.value),
            target: Target::PartOfLimit(0.4),
            note,
            settings: settings(&outcome),
        });
        Ok(())
    }

    fn publish_cpu(&mut self) -> Result<(), RowError> {
        let (outcome, limit) = self.publish_batch()?;
        self.judge(Judged {
            id: "publish-cpu",
            what: "CPU of the node, publish-batch",
            value: cpu_s_per_gib(&outcome),
            unit: "CPU s/GiB",
            limit: Some(limit.cpu_s_per_gib),
            target: Target::TimesLimit(1.4),
            note: String::new(),
            settings: settings(&outcome),
        });
        Ok(())
    }

    fn tail(&mut self) -> Result<(), RowError> {
        let running = self.start(1)?;
        let fill = LoadOptions {
            topics: 4,
            messages: Some(CACHED_BYTES / u64::from(MESSAGE_BYTES)),
            retention_bytes: 0,
            ..self.load(&running)
        };
        self.drive(Kind::Produce, &fill)?;
        let options = LoadOptions { messages: None, repeat: true, ..fill };
        let (outcome, limit) = self.beside(Suite::sender, |suite| suite.drive(Kind::Consume, &options))?;
        self.judge(Judged {
            id: "tail",
            what: "consume from the cache, 4 connections",
            value: rate(&outcome),
            unit: "MiB/s",
            limit: Some(limit.value),
            target: Target::PartOfLimit(0.8),
            note: format!("every message verified; load generator {:.0} % busy", client_share(&outcome)),
            settings: settings(&outcome),
        });
        self.judge(Judged {
            id: "tail-cpu",
            what: "CPU of the node, tail",
            value: cpu_s_per_gib(&outcome),
            unit: "CPU s/GiB",
            limit: Some(limit.cpu_s_per_gib),
            target: Target::TimesLimit(1.4),
            note: String::new(),
            settings: settings(&outcome),
        });
        Ok(())
    }

    fn backlog_and_start(&mut self) -> Result<(), RowError> {
        let mut running = self.start(1)?;
        let empty = running.node.ready_after;
        let bytes = if self.quick { 256 << 20 } else { 4u64 << 30 };
        let fill =
            LoadOptions { messages: Some(bytes / u64::from(MESSAGE_BYTES)), retention_bytes: 0, ..self.load(&running) };
        self.drive(Kind::Produce, &fill)?;
        let log = self.log_path();
        running.restart_after_kill(&self.node_bin, 1, &log)?;
        let full = running.node.ready_after;
        let options = LoadOptions {
            addr: running.node.ports.listen,
            node_pid: Some(running.node.pid()),
            consumers: Some(1),
            ..fill
        };
        let outcome = self.drive(Kind::Consume, &options)?;
        let gib = bytes as f64 / GIB;
        self.judge(Judged {
            id: "backlog",
            what: "catch-up read from disk after a restart, one consumer",
            value: rate(&outcome),
            unit: "MiB/s",
            limit: Some(self.limits.loopback.mib_per_s.min(self.limits.read_mib_per_s)),
            target: Target::PartOfLimit(0.6),
            note: format!("{gib:.2} GiB, every message verified; {:.2} CPU s/GiB", cpu_s_per_gib(&outcome)),
            settings: settings(&outcome),
        });
        self.judge(Judged {
            id: "start",
            what: "start to ready, empty data directory",
            value: empty.as_secs_f64(),
            unit: "s",
            limit: None,
            target: Target::AtMost(0.2),
            note: String::new(),
            settings: json!({"shards": 1}),
        });
        self.judge(Judged {
            id: "start-full",
            what: "start to ready after kill -9",
            value: full.as_secs_f64(),
            unit: "s",
            limit: None,
            target: Target::AtMost(1.0),
            note: format!("{gib:.2} GiB of messages"),
            settings: json!({"shards": 1}),
        });
        Ok(())
    }

    fn both(&mut self) -> Result<(), RowError> {
        let alone = rate(&self.publish_batch()?.0);
        let running = self.start(1)?;
        let options = LoadOptions { connections: 1, consumers: Some(1), in_flight: 64, ..self.load(&running) };
        let outcome = self.drive(Kind::Mixed, &options)?;
        let published = outcome.published.as_ref().map_or(0.0, |direction| direction.mib_per_s);
        let delivered = outcome.delivered.as_ref().map_or(0.0, |direction| direction.mib_per_s);
        self.judge(Judged {
            id: "both",
            what: "publish and consume at once, 1 + 1 connections; the slower way",
            value: published.min(delivered),
            unit: "MiB/s",
            limit: Some(alone),
            target: Target::PartOfLimit(0.45),
            note: format!("published {published:.0}, delivered {delivered:.0} MiB/s; limit: publish-batch"),
            settings: settings(&outcome),
        });
        Ok(())
    }

    fn topics(&mut self) -> Result<(), RowError> {
        let many = if self.quick { 100 } else { 1000 };
        let mut rates = Vec::new();
        let mut last = None;
        for topics in [1, many] {
            let running = self.start(1)?;
            // Nothing is deleted: with many topics no ledger would be full, and only one of the two would recycle.
            let options = LoadOptions { topics, retention_bytes: 0, ..self.load(&running) };
            let outcome = self.drive(Kind::Produce, &options)?;
            rates.push(rate(&outcome));
            last = Some(outcome);
        }
        let settings = last.as_ref().map_or(serde_json::Value::Null, settings);
        self.judge(Judged {
            id: "topics",
            what: "publish to many topics; limit: the same load on one topic",
            value: rates[1],
            unit: "MiB/s",
            limit: Some(rates[0]),
            target: Target::PartOfLimit(0.85),
            note: format!("{many} topics; both without retention"),
            settings,
        });
        Ok(())
    }

    fn latency_one(&mut self) -> Result<(), RowError> {
        let (outcome, limit) = self.beside(Suite::one_in_flight, |suite| {
            let running = suite.start(1)?;
            let options = LoadOptions { batch: 1, connections: 1, in_flight: 1, ..suite.load(&running) };
            suite.drive(Kind::Produce, &options)
        })?;
        self.judge(Judged {
            id: "latency-1",
            what: "durable publish of 1 KiB, one in flight, p50; limit: durable 4 KiB write + round trip",
            value: published_us(&outcome, |latency| latency.p50_us),
            unit: "µs",
            limit: Some(limit.value),
            target: Target::TimesLimit(1.25),
            note: format!("p99 {}, max {}", p99(&outcome), show_us(published_us(&outcome, |latency| latency.max_us))),
            settings: settings(&outcome),
        });
        Ok(())
    }

    fn latency_e2e(&mut self) -> Result<(), RowError> {
        let (outcome, limit) = self.beside(Suite::one_in_flight, |suite| {
            let running = suite.start(1)?;
            let options =
                LoadOptions { batch: 1, connections: 1, consumers: Some(1), in_flight: 1, ..suite.load(&running) };
            suite.drive(Kind::Tail, &options)
        })?;
        let delivered = outcome.delivered.as_ref().map(|delivered| delivered.latency).unwrap_or_default();
        self.judge(Judged {
            id: "latency-e2e",
            what: "durable publish to delivery of 1 KiB, one in flight, p50; limit: as latency-1",
            value: delivered.p50_us,
            unit: "µs",
            limit: Some(limit.value),
            target: Target::TimesLimit(1.4),
            note: format!("p99 {}, max {}", show_us(delivered.p99_us), show_us(delivered.max_us)),
            settings: settings(&outcome),
        });
        Ok(())
    }

    fn latency_half(&mut self) -> Result<(), RowError> {
        let highest = self.publish_batch()?.0.published.map_or(0.0, |published| published.messages_per_s);
        let running = self.start(1)?;
        // The window is no limit here: what is due is sent. Warmed up until retention recycles segments, as on a node that
        // has run for a while.
        let warm_up = if self.quick { 0.3 } else { 8.0 };
        let options = LoadOptions { rate: Some(highest / 2.0), in_flight: 1024, warm_up, ..self.load(&running) };
        let outcome = self.drive(Kind::Produce, &options)?;
        let bare = self.limits.bare_half;
        let us = |pick: fn(&crate::latency::Quantiles) -> f64| show_us(published_us(&outcome, pick));
        let note = format!(
            "p50 {}, p99.9 {}, max {}; {:.0} MiB/s; the bare path at half of its rate: p50 {}, p99 {}, max {}",
            us(|latency| latency.p50_us),
            us(|latency| latency.p99_9_us),
            us(|latency| latency.max_us),
            rate(&outcome),
            show_us(bare.latency.p50_us),
            show_us(bare.latency.p99_us),
            show_us(bare.latency.max_us),
        );
        let limit = self.limits.write(64 << 10).latency.p99_us + self.limits.round_trip.p99_us;
        self.judge(Judged {
            id: "latency-half",
            what: "durable publish at half of the highest rate, open loop, p99; limit: p99 of 64 KiB write + round trip",
            value: published_us(&outcome, |latency| latency.p99_us),
            unit: "µs",
            limit: Some(limit),
            target: Target::TimesLimit(3.0),
            note,
            settings: settings(&outcome),
        });
        Ok(())
    }

    fn memory(&mut self) -> Result<(), RowError> {
        let idle = {
            let running = self.start(2)?;
            std::thread::sleep(Duration::from_secs(if self.quick { 1 } else { 5 }));
            process_memory(running.node.pid()).map_err(RowError::Memory)?
        };
        self.judge(Judged {
            id: "memory",
            what: "memory of an idle node, 2 shards",
            value: idle.resident_bytes as f64 / MIB,
            unit: "MiB",
            limit: None,
            target: Target::AtMost(64.0),
            note: format!("peak {:.0} MiB", idle.peak_bytes as f64 / MIB),
            settings: json!({"shards": 2}),
        });
        let outcome = {
            let running = self.start(2)?;
            let options = LoadOptions { topics: 4, cores: all_cores(), ..self.load(&running) };
            self.drive(Kind::Produce, &options)?
        };
        self.judge(Judged {
            id: "memory-load",
            what: "peak memory under full publish load, 2 shards; limit: the configured budget",
            value: outcome.node.map_or(0.0, |node| node.peak_rss_bytes as f64 / MIB),
            unit: "MiB",
            limit: Some(2.0 * SHARD_BUDGET_BYTES / MIB),
            target: Target::TimesLimit(1.25),
            note: "budget: receive buffers, staged bytes and cache of both shards".to_owned(),
            settings: settings(&outcome),
        });
        Ok(())
    }

    fn real_file(&mut self) -> Result<(), RowError> {
        let bytes = if self.quick { 8 << 20 } else { 64 << 20 };
        let running = self.start(1)?;
        let seen = file::there_and_back(&self.node_bin, &running.node.ports, self.scratch.path(), bytes)?;
        self.judge(Judged {
            id: "real-file",
            what: "a file of lines through `drava produce` and `drava consume`; lines that differ",
            value: seen.lines_that_differ as f64,
            unit: "lines",
            limit: None,
            target: Target::AtMost(0.0),
            note: seen.show(),
            settings: json!({"bytes": bytes, "lines": seen.lines}),
        });
        Ok(())
    }

    fn kill(&mut self) -> Result<(), RowError> {
        let rounds = if self.quick { 3 } else { 100 };
        self.nodes += 1;
        let data_dir = self.scratch.path().join(format!("node-{}", self.nodes));
        let outcome = kill::run(&self.node_bin, &data_dir, &self.log_path(), rounds)?;
        let findings = &outcome.findings;
        let other_faults = findings.faults() - findings.lost;
        if 0 < other_faults {
            let first = findings.first_fault.clone().unwrap_or_default();
            return Err(RowError::Faults { faults: findings.faults(), first });
        }
        self.judge(Judged {
            id: "kill",
            what: "kill -9 under load in a loop; acknowledged messages lost",
            value: findings.lost as f64,
            unit: "messages",
            limit: None,
            target: Target::AtMost(0.0),
            note: outcome.show(),
            settings: json!({"rounds": rounds, "shards": 2}),
        });
        // What stays of an error goes with the scratch directory.
        drop(std::fs::remove_dir_all(&data_dir));
        Ok(())
    }

    fn start(&mut self, shards: u16) -> Result<Running, RowError> {
        self.start_with(shards, &[])
    }

    /// A fresh node with more options.
    fn start_with(&mut self, shards: u16, options: &[&str]) -> Result<Running, RowError> {
        self.nodes += 1;
        let data_dir = self.scratch.path().join(format!("node-{}", self.nodes));
        std::fs::create_dir_all(&data_dir).map_err(RowError::Data)?;
        let node = Node::start(&self.node_bin, &data_dir, shards, options, &self.log_path())?;
        Ok(Running { node, data_dir })
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.path().join(format!("node-{}.log", self.nodes))
    }

    /// The load that most rows vary: durable batches of 64 × 1 KiB on 4 connections to one topic.
    fn load(&self, running: &Running) -> LoadOptions {
        LoadOptions {
            addr: running.node.ports.listen,
            node_pid: Some(running.node.pid()),
            size: MESSAGE_BYTES,
            batch: BATCH,
            connections: 4,
            in_flight: 16,
            retention_bytes: RETENTION_BYTES,
            warm_up: if self.quick { 0.3 } else { 3.0 },
            duration: if self.quick { 1.0 } else { 8.0 },
            ..LoadOptions::default()
        }
    }

    fn drive(&self, kind: Kind, options: &LoadOptions) -> Result<Outcome, RowError> {
        let progress = Progress::new(table::kind_name(kind));
        let outcome = load::run(kind, options, &progress).map_err(|error| RowError::Load(describe(&error)))?;
        match &outcome.verification {
            Some(found) if 0 < found.faults() => {
                let first = found.first_fault.clone().unwrap_or_default();
                Err(RowError::Faults { faults: found.faults(), first })
            }
            Some(_) | None => Ok(outcome),
        }
    }

    fn judge(&mut self, judged: Judged<'_>) {
        let Judged { id, what, value, unit, limit, target, note, settings } = judged;
        let row = Row {
            id: id.to_owned(),
            what: what.to_owned(),
            value: Some(value),
            unit: unit.to_owned(),
            limit,
            ratio: limit.filter(|limit| 0.0 < *limit).map(|limit| value / limit),
            target: target.show(unit),
            met: target.is_met(value, limit),
            note,
            settings,
            machine: self.machine.clone(),
            commit: self.machine.commit.clone(),
        };
        let mut line = format!("{id}: {}", row.show_value());
        if let Some(ratio) = row.ratio {
            // Writing into a string does not fail.
            let _ = write!(line, " of {} ({ratio:.2})", row.show_limit());
        }
        eprintln!("{line}  {}", row.note);
        self.rows.push(row);
    }

    fn could_not(&mut self, id: RowId, error: &RowError) {
        let id = id.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
        let mut note = format!("could not be measured: {error}");
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            let _ = write!(note, ": {error}");
            cause = error.source();
        }
        eprintln!("{id}: {note}");
        self.rows.push(Row {
            id,
            what: String::new(),
            value: None,
            unit: String::new(),
            limit: None,
            ratio: None,
            target: String::new(),
            met: Some(false),
            note,
            settings: serde_json::Value::Null,
            machine: self.machine.clone(),
            commit: self.machine.commit.clone(),
        });
    }
}

impl Running {
    /// Kills the node and starts it again on the same data.
    fn restart_after_kill(&mut self, bin: &Path, shards: u16, log: &Path) -> Result<(), NodeError> {
        self.restart_after_kill_with(bin, shards, log, &[])
    }

    fn restart_after_kill_with(
        &mut self,
        bin: &Path,
        shards: u16,
        log: &Path,
        options: &[&str],
    ) -> Result<(), NodeError> {
        self.node.kill()?;
        self.node = Node::start(bin, &self.data_dir, shards, options, log)?;
        Ok(())
    }
}

fn settings(outcome: &Outcome) -> serde_json::Value {
    serde_json::to_value(&outcome.options).unwrap_or_default()
}

fn rate(outcome: &Outcome) -> f64 {
    outcome.main_direction().map_or(0.0, |direction| direction.mib_per_s)
}

fn published_us(outcome: &Outcome, pick: impl Fn(&crate::latency::Quantiles) -> f64) -> f64 {
    outcome.published.as_ref().map_or(0.0, |published| pick(&published.latency))
}

fn p50(outcome: &Outcome) -> String {
    show_us(published_us(outcome, |latency| latency.p50_us))
}

fn p99(outcome: &Outcome) -> String {
    show_us(published_us(outcome, |latency| latency.p99_us))
}

fn cpu_s_per_gib(outcome: &Outcome) -> f64 {
    outcome.node.map_or(0.0, |node| node.cpu_s_per_gib)
}

/// How busy the load generator's cores were, in percent of one core.
fn client_share(outcome: &Outcome) -> f64 {
    100.0 * outcome.client_cpu_s / outcome.elapsed_s
}

fn all_cores() -> Vec<usize> {
    let (first, last) = limits::cores();
    if first == last { vec![first] } else { vec![first, last] }
}
