//! What the system says about this process.

use std::io;

use rustix::process::Resource;
use rustix::time::ClockId;

/// One look at the process. What could not be read is `None`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessFigures {
    pub resident_bytes: Option<u64>,
    pub virtual_bytes: Option<u64>,
    pub open_fds: Option<u64>,
    /// `None` when there is no limit.
    pub max_fds: Option<u64>,
    pub threads: Option<u64>,
    /// User and system time of all threads.
    pub cpu_seconds: f64,
}

impl ProcessFigures {
    /// Looks on a thread of its own: counting thousands of file descriptors takes the kernel milliseconds.
    pub async fn look() -> ProcessFigures {
        let (sender, reply) = drava_runtime::foreign::reply();
        let thread = std::thread::Builder::new().name("process-figures".to_owned());
        if let Err(error) = thread.spawn(move || sender.send(ProcessFigures::read())) {
            tracing::warn!(%error, "no thread to look at the process with");
        }
        reply.await.unwrap_or_default()
    }

    fn read() -> ProcessFigures {
        let memory = memory_pages().ok();
        let page_bytes = rustix::param::page_size() as u64;
        let cpu = rustix::time::clock_gettime(ClockId::ProcessCPUTime);
        ProcessFigures {
            resident_bytes: memory.map(|(_, resident)| resident * page_bytes),
            virtual_bytes: memory.map(|(size, _)| size * page_bytes),
            // The directory that is being read is open, too.
            open_fds: entries("/proc/self/fd").ok().map(|count| count.saturating_sub(1)),
            max_fds: rustix::process::getrlimit(Resource::Nofile).current,
            threads: entries("/proc/self/task").ok(),
            cpu_seconds: cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9,
        }
    }
}

/// Size and resident set, in pages. Source: proc_pid_statm(5).
fn memory_pages() -> io::Result<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let mut fields = text.split_ascii_whitespace().map(str::parse::<u64>);
    match (fields.next(), fields.next()) {
        (Some(Ok(size)), Some(Ok(resident))) => Ok((size, resident)),
        _ => Err(io::Error::other("statm has no two numbers")),
    }
}

fn entries(directory: &str) -> io::Result<u64> {
    Ok(std::fs::read_dir(directory)?.count() as u64)
}
