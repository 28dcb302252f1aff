//! `drava scrub` and `drava log verify`: check what is on disk, without a node.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use drava_storage::segment::{self, SegmentId};
use drava_storage::verify::{self, Verified};
use serde::Serialize;

use super::options::ConfigOptions;
use super::output::{Output, print, print_json, table};
use super::{Exit, Failure};
use crate::node::data_dir;

/// How often the progress is drawn.
const DRAWN_EVERY: Duration = Duration::from_millis(100);
const BAR_CELLS: u64 = 30;

/// Check everything that a stopped node has stored, as its scrubber does while it runs. Changes nothing.
///
/// Ends with 0 when all is well and with 9 when something is damaged. What was being written when the node stopped is
/// no damage.
#[derive(Debug, Args)]
pub struct ScrubCommand {
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    options: ConfigOptions,
}

impl ScrubCommand {
    pub fn run(self) -> Result<(), Failure> {
        let dir = self.options.load()?.config.data_dir;
        let _held = hold(&dir)?;
        let targets = stores(&dir).map_err(|error| Failure::io(&dir.display().to_string(), &error))?;
        if targets.is_empty() {
            return Err(Failure::new(Exit::NotFound, format!("{} holds no stores", dir.display())));
        }
        check(&targets, self.output)
    }
}

/// Check segments: headers, the chain of blocks, all checksums. Changes nothing.
///
/// Ends with 0 when all is well and with 9 when something is damaged. What was being written when the node stopped is
/// no damage.
#[derive(Debug, Args)]
pub struct VerifyCommand {
    /// Segments, directories of segments such as data/shard-000 or data/meta/log, or whole data directories.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Read on although a node has the directory. What it is writing at that moment may look torn or damaged.
    #[arg(long)]
    while_in_use: bool,
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

impl VerifyCommand {
    pub fn run(self) -> Result<(), Failure> {
        let mut targets = Vec::new();
        // Segments of one directory are checked together: their blocks are one chain.
        let mut alone: BTreeMap<PathBuf, Vec<SegmentId>> = BTreeMap::new();
        let mut held = Vec::new();
        for path in &self.paths {
            let failed = |error: io::Error| Failure::io(&path.display().to_string(), &error);
            let path = path.canonicalize().map_err(failed)?;
            if !self.while_in_use
                && let Some(dir) = path.ancestors().take(4).find(|dir| data_dir::is_made(dir))
            {
                held.extend(hold(dir)?);
            }
            match segment::parse_name(&path).filter(|_| path.is_file()) {
                Some(id) => alone.entry(path.parent().unwrap_or(Path::new(".")).to_owned()).or_default().push(id),
                None if data_dir::is_made(&path) => targets.extend(stores(&path).map_err(failed)?),
                None => {
                    targets.push(Target { bytes: verify::segment_bytes(&path).map_err(failed)?, dir: path, only: None })
                }
            }
        }
        for (dir, only) in alone {
            let bytes = only.iter().filter_map(|id| fs::metadata(segment::path(&dir, *id)).ok());
            targets.push(Target { bytes: bytes.map(|metadata| metadata.len()).sum(), dir, only: Some(only) });
        }
        check(&targets, self.output)
    }
}

/// Keeps a node from starting on the directory. Refused where one runs.
fn hold(dir: &Path) -> Result<Option<File>, Failure> {
    data_dir::hold(dir).map_err(|error| Failure::new(Exit::HostUnfit, error.to_string()))
}

struct Target {
    dir: PathBuf,
    /// `None`: all of its segments.
    only: Option<Vec<SegmentId>>,
    bytes: u64,
}

/// Every directory of segments in a data directory: those of the shards, and the log of the metadata.
fn stores(data_dir: &Path) -> io::Result<Vec<Target>> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir(data_dir)? {
        let path = entry?.path();
        let is_shard = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("shard-"));
        if is_shard && path.is_dir() {
            dirs.push(path);
        }
    }
    dirs.sort();
    dirs.extend(Some(data_dir.join("meta/log")).filter(|dir| dir.is_dir()));
    let target = |dir: PathBuf| Ok(Target { bytes: verify::segment_bytes(&dir)?, dir, only: None });
    dirs.into_iter().map(target).collect()
}

/// A checked store, as JSON.
#[derive(Debug, Serialize)]
struct StoreReport {
    dir: String,
    segments: u64,
    blocks: u64,
    bytes: u64,
    damage: Vec<DamageReport>,
    /// Damaged places that are not listed, because there are so many.
    damage_beyond: u64,
    /// What was being written when the node stopped; it was never acknowledged.
    torn: Option<TornReport>,
}

#[derive(Debug, Serialize)]
struct DamageReport {
    segment: u32,
    start_position: u64,
    end_position: u64,
    /// header, blocks or batches.
    kind: &'static str,
    /// As far as it can still be told.
    messages: Vec<MessagesReport>,
}

#[derive(Debug, Serialize)]
struct MessagesReport {
    partition: u64,
    first_offset: u64,
    next_offset: u64,
}

#[derive(Debug, Serialize)]
struct TornReport {
    segment: u32,
    position: u64,
}

impl StoreReport {
    fn new(dir: &Path, verified: Verified) -> StoreReport {
        let messages = |lost: verify::LostMessages| MessagesReport {
            partition: lost.partition.0,
            first_offset: lost.offsets.start,
            next_offset: lost.offsets.end,
        };
        let damage = verified.findings.into_iter().map(|finding| DamageReport {
            segment: finding.segment,
            start_position: finding.positions.start,
            end_position: finding.positions.end,
            kind: finding.kind.name(),
            messages: finding.messages.into_iter().map(messages).collect(),
        });
        StoreReport {
            dir: dir.display().to_string(),
            segments: verified.segments,
            blocks: verified.blocks,
            bytes: verified.bytes,
            damage: damage.collect(),
            damage_beyond: verified.findings_beyond,
            torn: verified.torn.map(|torn| TornReport { segment: torn.segment, position: torn.position }),
        }
    }

    fn places(&self) -> u64 {
        self.damage.len() as u64 + self.damage_beyond
    }
}

fn check(targets: &[Target], output: Output) -> Result<(), Failure> {
    let mut done_bytes = 0;
    let total_bytes = targets.iter().map(|target| target.bytes).sum();
    let mut reports = Vec::with_capacity(targets.len());
    for target in targets {
        let bar = Bar::new(done_bytes, target.bytes, total_bytes);
        let verified = verify::verify(&target.dir, target.only.as_deref(), move |bytes| bar.add(bytes));
        // The line of the bar is for whatever comes next.
        clear_bar();
        let verified = verified.map_err(|error| {
            let text = super::exit::with_sources(&error);
            Failure::new(Exit::Storage, format!("{}: {text}", target.dir.display()))
        })?;
        done_bytes += target.bytes;
        reports.push(StoreReport::new(&target.dir, verified));
    }
    match output {
        Output::Json => print_json(&reports)?,
        Output::Table => {
            if reports.iter().any(|report| !report.damage.is_empty()) {
                print(findings(&reports))?;
            }
            summarize(&reports);
        }
    }
    match reports.iter().map(StoreReport::places).sum() {
        0 => Ok(()),
        places => Err(Failure::new(Exit::Damaged, format!("{places} places are damaged"))),
    }
}

fn findings(reports: &[StoreReport]) -> comfy_table::Table {
    let rows = reports.iter().flat_map(|report| {
        report.damage.iter().map(|damage| {
            let messages: Vec<String> = damage
                .messages
                .iter()
                .map(|lost| format!("partition {}: {} to {}", lost.partition, lost.first_offset, lost.next_offset - 1))
                .collect();
            [
                report.dir.clone(),
                damage.segment.to_string(),
                format!("{} to {}", damage.start_position, damage.end_position),
                damage.kind.to_owned(),
                if messages.is_empty() { "not known".to_owned() } else { messages.join(", ") },
            ]
        })
    });
    table(["store", "segment", "bytes", "damaged", "messages"], rows)
}

/// For people, beside the table.
fn summarize(reports: &[StoreReport]) {
    let sum = |of: fn(&StoreReport) -> u64| reports.iter().map(of).sum::<u64>();
    let mut out = io::stderr().lock();
    // Standard error may be gone, and then there is nobody to tell.
    drop(writeln!(
        out,
        "{} blocks in {} segments of {} stores were checked, {} bytes",
        sum(|report| report.blocks),
        sum(|report| report.segments),
        reports.len(),
        sum(|report| report.bytes)
    ));
    for report in reports {
        if report.damage_beyond != 0 {
            drop(writeln!(out, "{}: {} more places are damaged", report.dir, report.damage_beyond));
        }
        if let Some(torn) = &report.torn {
            drop(writeln!(
                out,
                "{}: segment {} ends in a torn block at {}: it was being written when the node stopped, and was never \
                 acknowledged",
                report.dir, torn.segment, torn.position
            ));
        }
    }
}

/// The progress, on a terminal.
struct Bar {
    done_bytes: std::cell::Cell<u64>,
    end_bytes: u64,
    total_bytes: u64,
    drawn: std::cell::Cell<Option<Instant>>,
    is_terminal: bool,
}

impl Bar {
    fn new(done_bytes: u64, bytes: u64, total_bytes: u64) -> Bar {
        Bar {
            done_bytes: std::cell::Cell::new(done_bytes),
            end_bytes: done_bytes + bytes,
            total_bytes: total_bytes.max(1),
            drawn: std::cell::Cell::new(None),
            is_terminal: io::stderr().is_terminal(),
        }
    }

    fn add(&self, bytes: u64) {
        // What looks damaged is read more than once.
        let done = (self.done_bytes.get() + bytes).min(self.end_bytes);
        self.done_bytes.set(done);
        if !self.is_terminal || self.drawn.get().is_some_and(|drawn| drawn.elapsed() < DRAWN_EVERY) {
            return;
        }
        self.drawn.set(Some(Instant::now()));
        let cells = (done * BAR_CELLS / self.total_bytes) as usize;
        let bar = "█".repeat(cells) + &"░".repeat(BAR_CELLS as usize - cells);
        let percent = done * 100 / self.total_bytes;
        drop(write!(io::stderr(), "\r{bar} {percent:3} %  {} of {} MiB", done >> 20, self.total_bytes >> 20));
    }
}

fn clear_bar() {
    let mut out = io::stderr();
    if out.is_terminal() {
        drop(write!(out, "\r\x1b[K"));
    }
}
