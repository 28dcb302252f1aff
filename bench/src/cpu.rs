//! CPU time and memory, as the kernel counts them: of our own threads, and of a node by its process id.

use std::fs;
use std::io;
use std::time::Duration;

/// A thread of this process whose CPU time is asked for from another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadId(i32);

impl ThreadId {
    pub fn current() -> ThreadId {
        ThreadId(rustix::thread::gettid().as_raw_nonzero().get())
    }

    /// What the thread has used so far, with the io_uring workers that the kernel started for it.
    pub fn cpu(self) -> io::Result<Duration> {
        let mut total = run_time(&format!("/proc/self/task/{}/schedstat", self.0))?;
        let worker = format!("iou-wrk-{}", self.0);
        for task in fs::read_dir("/proc/self/task")? {
            let path = task?.path();
            // A worker may end between the listing and the look.
            let Ok(name) = fs::read_to_string(path.join("comm")) else { continue };
            if name.trim_end() == worker {
                total += run_time(&path.join("schedstat").to_string_lossy()).unwrap_or_default();
            }
        }
        Ok(total)
    }
}

fn run_time(path: &str) -> io::Result<Duration> {
    let text = fs::read_to_string(path)?;
    let nanos = text.split_ascii_whitespace().next().and_then(|word| word.parse().ok());
    nanos.map(Duration::from_nanos).ok_or_else(|| malformed(path))
}

/// What a process has used so far, all its threads together. The kernel rounds to a hundredth of a second.
pub fn process_cpu(pid: u32) -> io::Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path)?;
    let ticks = stat_ticks(&text).ok_or_else(|| malformed(&path))?;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// utime + stime: fields 14 and 15. The name in field 2 may hold spaces and parentheses, so count from its end.
fn stat_ticks(text: &str) -> Option<u64> {
    let (_, after_name) = text.rsplit_once(") ")?;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Bytes that a process had written to the disk so far, direct writes and those of the page cache on its behalf.
pub fn process_written_bytes(pid: u32) -> io::Result<u64> {
    let path = format!("/proc/{pid}/io");
    let text = fs::read_to_string(&path)?;
    let value = text.lines().find_map(|line| line.strip_prefix("write_bytes: ")?.trim().parse().ok());
    value.ok_or_else(|| malformed(&path))
}

/// Resident memory of a process, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub resident_bytes: u64,
    /// The most it ever was.
    pub peak_bytes: u64,
}

pub fn process_memory(pid: u32) -> io::Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path)?;
    memory(&text).ok_or_else(|| malformed(&path))
}

fn memory(status: &str) -> Option<Memory> {
    let kib = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    Some(Memory { resident_bytes: kib("VmRSS:")? * 1024, peak_bytes: kib("VmHWM:")? * 1024 })
}

fn malformed(path: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{path} has another form than expected"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_hold_spaces_and_parentheses() {
        let text = "7 (a ) b) S 1 7 7 0 -1 4194304 100 0 0 0 12 30 0 0 20 0 1 0 100 1 1";
        assert_eq!(stat_ticks(text), Some(42));
    }

    #[test]
    fn memory_is_read_from_status() {
        let text = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(memory(text), Some(Memory { resident_bytes: 1 << 20, peak_bytes: 2 << 20 }));
        assert_eq!(memory("Name:\tkthread\n"), None);
    }

    #[test]
    fn our_own_figures_are_there() {
        // The kernel brings a running thread's figure up to date at its ticks.
        while ThreadId::current().cpu().unwrap().is_zero() {}
        let memory = process_memory(std::process::id()).unwrap();
        assert!(0 < memory.resident_bytes && memory.resident_bytes <= memory.peak_bytes);
        process_cpu(std::process::id()).unwrap();
    }
}
