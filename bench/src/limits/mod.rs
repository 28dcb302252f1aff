//! What the hardware and the runtime can do, in the shapes of the workloads. A node is judged against these figures, so
//! they are made as fast as we know how: the same executors, the same settings, none of a broker's work.
//!
//! - [`loopback`]: TCP through the executor, one way and there and back, and a sender from memory.
//! - [`disk`]: durable writes to blocks that were written before, and reads past the page cache.
//! - [`bare`]: receive, check, commit in groups, acknowledge: the way of a publish with no broker around it.
//!
//! The server's executor runs on the node's first core, the client's on the last; where there is only one core they
//! share it.

pub mod bare;
pub mod disk;
pub mod loopback;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drava_runtime::{ExecutorConfig, ExecutorHandle};
use serde::{Deserialize, Serialize};

use crate::latency::Quantiles;
use crate::measure::Stretch;

/// The sizes at which durable writes are measured.
pub const WRITE_BYTES: [usize; 3] = [4 << 10, 64 << 10, 1 << 20];

#[derive(Clone, Debug)]
pub struct LimitsConfig {
    /// A directory on the disk to measure; files made in it are removed again.
    pub dir: PathBuf,
    pub stretch: Stretch,
    /// Bytes of the files that are written over.
    pub segment_bytes: u64,
    /// Bytes of the file that is read.
    pub read_bytes: u64,
}

impl LimitsConfig {
    pub fn new(dir: PathBuf, quick: bool) -> LimitsConfig {
        if quick {
            let stretch = Stretch { warm_up: Duration::from_millis(50), measured: Duration::from_millis(250) };
            LimitsConfig { dir, stretch, segment_bytes: 64 << 20, read_bytes: 64 << 20 }
        } else {
            let stretch = Stretch { warm_up: Duration::from_millis(500), measured: Duration::from_secs(3) };
            LimitsConfig { dir, stretch, segment_bytes: 256 << 20, read_bytes: 1 << 30 }
        }
    }
}

/// All limits of one run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    pub loopback: Transfer,
    /// One message of 1 KiB there, 64 bytes back, one in flight.
    pub round_trip: Quantiles,
    pub writes: Vec<DurableWrite>,
    /// O_DIRECT, sequential, 1 MiB each, four in flight.
    pub read_mib_per_s: f64,
    /// 4 connections, 64 KiB frames.
    pub bare_frames: Bare,
    /// The same at half of that rate, by the clock.
    pub bare_half: Bare,
    /// 32 connections, 1 KiB frames, 128 in flight on each.
    pub bare_singles: Bare,
    /// A server that sends from memory to a client that only receives.
    pub sender: Transfer,
}

/// Bytes that went one way.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Transfer {
    pub write_bytes: usize,
    pub connections: usize,
    pub mib_per_s: f64,
    pub sender_cpu_s_per_gib: f64,
    pub receiver_cpu_s_per_gib: f64,
}

/// O_DIRECT | O_DSYNC writes to blocks that were written before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DurableWrite {
    pub write_bytes: usize,
    /// One in flight.
    pub latency: Quantiles,
    /// Four in flight.
    pub depth_4_mib_per_s: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bare {
    pub payload_bytes: usize,
    pub connections: usize,
    /// On each connection.
    pub in_flight: usize,
    /// Frames were sent by the clock; `latency` counts from when each was due.
    pub paced: bool,
    /// Writes that may be under way at once: the best of those tried.
    pub writes_in_flight: usize,
    pub mib_per_s: f64,
    pub frames_per_s: f64,
    pub latency: Quantiles,
    pub server_cpu_s_per_gib: f64,
    pub server_cpu_s_per_million: f64,
    pub client_cpu_s_per_gib: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum LimitsError {
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the bare server got a frame that does not match its checksum")]
    Checksum,
}

impl LimitsError {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> LimitsError {
        move |source| LimitsError::Io { what, source }
    }
}

/// Measures everything; `step` hears what comes next.
pub fn run(config: &LimitsConfig, mut step: impl FnMut(&str)) -> Result<Limits, LimitsError> {
    let scratch = Scratch::new(&config.dir).map_err(LimitsError::io("make a directory for the measured files"))?;
    let segment = scratch.path().join("segment");
    step("write the segment once, so that its blocks are there");
    disk::prepare(&segment, config.segment_bytes)?;

    step("loopback: one way");
    let loopback = loopback::one_way(config.stretch)?;
    step("loopback: there and back");
    let round_trip = loopback::round_trip(config.stretch)?;
    step("a sender from memory");
    let sender = loopback::sender(config.stretch)?;
    let mut writes = Vec::new();
    for write_bytes in WRITE_BYTES {
        step(&format!("durable writes of {} KiB", write_bytes >> 10));
        writes.push(disk::durable_writes(&segment, config.segment_bytes, write_bytes, config.stretch)?);
    }
    step("the bare path in frames of 64 KiB");
    let bare_frames = bare::best(&segment, config.segment_bytes, &bare::FRAMES, config.stretch)?;
    step("the bare path at half of its rate");
    let bare_half = bare::half(&segment, config.segment_bytes, &bare_frames, config.stretch)?;
    step("the bare path in single messages of 1 KiB");
    let bare_singles = bare::best(&segment, config.segment_bytes, &bare::SINGLES, config.stretch)?;
    step("sequential reads");
    let read_file = scratch.path().join("read");
    disk::prepare(&read_file, config.read_bytes)?;
    let read_mib_per_s = disk::sequential_read(&read_file, config.read_bytes, config.stretch)?;
    Ok(Limits { loopback, round_trip, writes, read_mib_per_s, bare_frames, bare_half, bare_singles, sender })
}

impl Limits {
    /// The durable write of `write_bytes`. Panics for a size that is not in [`WRITE_BYTES`].
    pub fn write(&self, write_bytes: usize) -> &DurableWrite {
        self.writes.iter().find(|write| write.write_bytes == write_bytes).expect("a measured size")
    }
}

/// The core of the server's executor and that of the client's.
pub fn cores() -> (usize, usize) {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (0, cores - 1)
}

/// Registered with the kernel: writes from these buffers are neither pinned anew nor allocated from the heap.
const IO_MEMORY_BYTES: usize = 4 << 20;

pub(crate) fn executor(name: &str, core: usize) -> ExecutorConfig {
    ExecutorConfig { io_memory: IO_MEMORY_BYTES, ..ExecutorConfig::new(name, Some(core)) }
}

pub(crate) fn join<T: Send + 'static>(handle: ExecutorHandle<Result<T, LimitsError>>) -> Result<T, LimitsError> {
    handle.join().map_err(LimitsError::io("run the executor"))?
}

/// A directory of our own that goes when it is dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(parent: &Path) -> io::Result<Scratch> {
        let path = parent.join(format!("drava-bench-{}-{:08x}", std::process::id(), rand::random::<u32>()));
        std::fs::create_dir_all(&path)?;
        Ok(Scratch(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("drava-bench: {} could not be removed: {error}", self.0.display());
        }
    }
}
