//! Where a figure was measured.

use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_mib: u64,
    pub kernel: String,
    /// Of the checkout that the load generator runs in; empty outside of one.
    pub commit: String,
    /// Seconds since the epoch.
    pub measured_at: u64,
}

impl Machine {
    pub fn here() -> Machine {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
        let memory_kib: u64 = memory.trim().trim_end_matches(" kB").parse().unwrap_or_default();
        let commit = Command::new("git").args(["describe", "--always", "--dirty", "--exclude=*"]).output();
        let commit = commit.ok().filter(|output| output.status.success()).map(|output| output.stdout);
        Machine {
            cpu: cpu.trim_start_matches([' ', '\t', ':']).to_owned(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mib: memory_kib >> 10,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            commit: String::from_utf8_lossy(&commit.unwrap_or_default()).trim().to_owned(),
            measured_at: std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
        }
    }

    pub fn show(&self) -> String {
        let Machine { cpu, cores, memory_mib, kernel, .. } = self;
        format!("{cpu}, {cores} cores, {:.0} GiB, Linux {kernel}", *memory_mib as f64 / 1024.0)
    }
}
