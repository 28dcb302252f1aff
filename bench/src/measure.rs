//! One measured stretch of time: warm up, measure, stop.
//!
//! Work runs on executors of its own; the calling thread sleeps, moves the phase on, and reads the counters and the
//! CPU clocks at both ends of the stretch. What happens outside it counts for nothing.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::cpu::ThreadId;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Warming,
    Measuring,
    /// Begin nothing new, finish what is under way.
    Stopping,
}

/// What the workers and the measuring thread share. Counters only grow.
#[derive(Debug, Default)]
pub struct Meter {
    phase: AtomicU8,
    pub messages: AtomicU64,
    pub bytes: AtomicU64,
}

impl Meter {
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Warming,
            1 => Phase::Measuring,
            _ => Phase::Stopping,
        }
    }

    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub fn count(&self, messages: u64, bytes: u64) {
        self.messages.fetch_add(messages, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn counts(&self) -> (u64, u64) {
        (self.messages.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Stretch {
    pub warm_up: Duration,
    pub measured: Duration,
}

/// What happened between the two ends of the measured stretch.
#[derive(Clone, Debug)]
pub struct Measured {
    pub elapsed: Duration,
    pub messages: u64,
    pub bytes: u64,
    /// Of each thread asked for, in the order of asking.
    pub cpu: Vec<Duration>,
}

impl Measured {
    pub fn mib_per_s(&self) -> f64 {
        self.bytes as f64 / MIB / self.elapsed.as_secs_f64()
    }

    pub fn messages_per_s(&self) -> f64 {
        self.messages as f64 / self.elapsed.as_secs_f64()
    }

    pub fn cpu_s_per_gib(&self, thread: usize) -> f64 {
        self.cpu[thread].as_secs_f64() / (self.bytes as f64 / GIB)
    }

    pub fn cpu_s_per_million(&self, thread: usize) -> f64 {
        self.cpu[thread].as_secs_f64() / (self.messages as f64 / 1e6)
    }
}

pub const MIB: f64 = (1u64 << 20) as f64;
pub const GIB: f64 = (1u64 << 30) as f64;

/// Walks `meter` through its phases and measures. Blocks the calling thread.
pub fn measure(meter: &Arc<Meter>, stretch: Stretch, threads: &[ThreadId]) -> io::Result<Measured> {
    let cpu = || threads.iter().map(|thread| thread.cpu()).collect::<io::Result<Vec<_>>>();
    std::thread::sleep(stretch.warm_up);
    meter.enter(Phase::Measuring);
    let (started, cpu_before, (messages_before, bytes_before)) = (Instant::now(), cpu()?, meter.counts());
    std::thread::sleep(stretch.measured);
    let (elapsed, (messages, bytes), cpu_after) = (started.elapsed(), meter.counts(), cpu()?);
    meter.enter(Phase::Stopping);
    Ok(Measured {
        elapsed,
        messages: messages - messages_before,
        bytes: bytes - bytes_before,
        cpu: cpu_after.iter().zip(&cpu_before).map(|(after, before)| after.saturating_sub(*before)).collect(),
    })
}
