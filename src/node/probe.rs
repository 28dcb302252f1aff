//! Looks at the host before the node trusts it: the same findings for `drava doctor` and for the boot.
//!
//! [`Facts::gather`] asks the host; [`judge`] compares with what the configuration needs and knows nothing else, so that
//! every finding can be provoked in a test.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use drava_runtime::{Executor, ExecutorConfig};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;

use crate::config::option::bytes_text;
use crate::config::{Cores, NodeConfig, cores_allowed};

use super::{data_dir, ports};

/// io_uring with all that the executor uses, and O_DIRECT through it.
const KERNEL_MIN: (u32, u32) = (5, 8);
const MEMLOCK_BYTES_MIN: u64 = 512 << 10;
/// Registered by each executor for direct IO.
const MEMLOCK_BYTES_PER_EXECUTOR: u64 = 1 << 20;
/// Files beside connections: segments, index, rings, timers.
const FILES_BASE: u64 = 512;
const BLOCK_BYTES: usize = 4096;
const WRITES: usize = 16;
/// A disk that takes this long for one small durable write is worth a word.
const SLOW_WRITE: Duration = Duration::from_millis(20);

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    pub outcome: Outcome,
    pub found: String,
    /// What to do about it; empty when there is nothing to do.
    pub remedy: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Ok,
    /// The node runs, and not as well as it could.
    Warning,
    /// The node cannot run.
    Failed,
}

impl Finding {
    pub fn is_failed(&self) -> bool {
        self.outcome == Outcome::Failed
    }

    /// What was found and what to do, in one line.
    pub fn sentence(&self) -> String {
        let Finding { check, found, remedy, .. } = self;
        if remedy.is_empty() { format!("{check}: {found}") } else { format!("{check}: {found}. To do: {remedy}") }
    }
}

/// Looks at the host for a node of this configuration. Raises the soft limits of this process to the hard ones, and
/// writes and removes a small file in the data directory, or where it will be made.
pub fn probe(config: &NodeConfig) -> Vec<Finding> {
    judge(config, &Facts::gather(config))
}

/// What the host is like.
#[derive(Clone, Debug)]
pub struct Facts {
    pub kernel: String,
    /// The sysctl `kernel.io_uring_disabled`; `None`: this kernel has none.
    pub io_uring_disabled: Option<u8>,
    /// Whether an executor could be started, or why not.
    pub executor: Result<(), String>,
    pub cores: Vec<usize>,
    /// Soft limit in bytes, after raising it; `None`: unlimited.
    pub memlock_bytes: Option<u64>,
    /// Soft limit, after raising it; `None`: unlimited.
    pub files_max: Option<u64>,
    /// Median time of a durable write of 4 KiB in the data directory, or why it failed.
    pub durable_write: Result<Duration, String>,
    /// On the file system of the data directory.
    pub free_bytes: Result<u64, String>,
    /// The data directory is a node's already.
    pub has_data: bool,
    /// The node that runs on the data directory; the inner `None`: it left no pid.
    pub holder: Option<Option<u32>>,
    pub ports_taken: Vec<(SocketAddr, String)>,
}

impl Facts {
    pub fn gather(config: &NodeConfig) -> Facts {
        // Limits first: the executor lives by them.
        let memlock_bytes = raise(Resource::Memlock);
        let files_max = raise(Resource::Nofile);
        let holder = data_dir::holder(&config.data_dir);
        let dir = existing(&config.data_dir);
        Facts {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            io_uring_disabled: std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
                .ok()
                .and_then(|text| text.trim().parse().ok()),
            executor: start_executor().map_err(|error| error.to_string()),
            cores: cores_allowed(),
            memlock_bytes,
            files_max,
            durable_write: durable_write(dir).map_err(|error| error.to_string()),
            free_bytes: free_bytes(dir).map_err(|error| error.to_string()),
            has_data: data_dir::is_made(&config.data_dir),
            ports_taken: if holder.is_some() { Vec::new() } else { ports_taken(config) },
            holder,
        }
    }
}

/// Holds the facts against the configuration. One finding for each check, in the order of the boot.
pub fn judge(config: &NodeConfig, facts: &Facts) -> Vec<Finding> {
    vec![
        kernel(facts),
        io_uring(facts),
        memlock(config, facts),
        files(config, facts),
        cores(config, facts),
        durable_writes(config, facts),
        free_space(config, facts),
        free_ports(config, facts),
    ]
}

fn ok(check: &'static str, found: String) -> Finding {
    Finding { check, outcome: Outcome::Ok, found, remedy: String::new() }
}

fn warning(check: &'static str, found: String, remedy: String) -> Finding {
    Finding { check, outcome: Outcome::Warning, found, remedy }
}

fn failed(check: &'static str, found: String, remedy: String) -> Finding {
    Finding { check, outcome: Outcome::Failed, found, remedy }
}

fn kernel(facts: &Facts) -> Finding {
    const CHECK: &str = "kernel";
    let found = format!("Linux {}", facts.kernel);
    let (major, minor) = KERNEL_MIN;
    match version(&facts.kernel) {
        Some(version) if KERNEL_MIN <= version => ok(CHECK, found),
        Some(_) => {
            failed(CHECK, found, format!("run Linux {major}.{minor} or newer: its io_uring does what Drava needs"))
        }
        None => warning(CHECK, found, format!("the version cannot be read; Linux {major}.{minor} or newer is needed")),
    }
}

/// Major and minor of `6.1.0-13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn io_uring(facts: &Facts) -> Finding {
    const CHECK: &str = "io_uring";
    match (&facts.executor, facts.io_uring_disabled) {
        (Ok(()), _) => ok(CHECK, "an executor starts".to_owned()),
        (Err(error), Some(disabled @ 1..)) => failed(
            CHECK,
            format!("kernel.io_uring_disabled is {disabled}: {error}"),
            "allow it: sysctl -w kernel.io_uring_disabled=0".to_owned(),
        ),
        (Err(error), _) => failed(
            CHECK,
            error.clone(),
            "allow the io_uring system calls; in a container, run with a seccomp profile that has them \
             (docker run --security-opt seccomp=unconfined)"
                .to_owned(),
        ),
    }
}

fn memlock(config: &NodeConfig, facts: &Facts) -> Finding {
    const CHECK: &str = "locked memory";
    let Some(limit) = facts.memlock_bytes else { return ok(CHECK, "unlimited".to_owned()) };
    let wanted = (u64::from(config.shards) + 1) * MEMLOCK_BYTES_PER_EXECUTOR;
    let found = format!("{} may be locked", bytes_text(limit));
    let remedy = |bytes: u64| {
        format!(
            "raise the limit to {}: ulimit -l {}, LimitMEMLOCK= of the systemd unit, or docker run --ulimit memlock={bytes}",
            bytes_text(bytes),
            bytes >> 10
        )
    };
    if limit < MEMLOCK_BYTES_MIN {
        failed(CHECK, found, remedy(wanted))
    } else if limit < wanted {
        warning(CHECK, found, remedy(wanted))
    } else {
        ok(CHECK, found)
    }
}

fn files(config: &NodeConfig, facts: &Facts) -> Finding {
    const CHECK: &str = "open files";
    let Some(limit) = facts.files_max else { return ok(CHECK, "unlimited".to_owned()) };
    let wanted = u64::from(config.shards) * u64::from(config.network.connections_max) + FILES_BASE;
    let found = format!("{limit} may be open");
    if limit <= FILES_BASE {
        failed(
            CHECK,
            found,
            format!("raise the limit to {wanted}: ulimit -n {wanted}, or LimitNOFILE= of the systemd unit"),
        )
    } else if limit < wanted {
        let remedy = format!(
            "{} shards with {} connections each want {wanted}: ulimit -n {wanted}, LimitNOFILE= of the systemd unit, or \
             a lower network.connections_max",
            config.shards, config.network.connections_max
        );
        warning(CHECK, found, remedy)
    } else {
        ok(CHECK, found)
    }
}

fn cores(config: &NodeConfig, facts: &Facts) -> Finding {
    const CHECK: &str = "cores";
    let found = format!("{} usable, {} shards", facts.cores.len(), config.shards);
    if let Cores::Pins(pins) = &config.cores
        && let Some(missing) = pins.iter().find(|pin| !facts.cores.contains(pin))
    {
        let remedy = format!("the process may not use core {missing}; choose cores from {:?}", facts.cores);
        return failed(CHECK, found, remedy);
    }
    if facts.cores.len() < usize::from(config.shards) {
        return warning(CHECK, found, "more shards than cores take turns: fine for tests, slower for work".to_owned());
    }
    ok(CHECK, found)
}

fn durable_writes(config: &NodeConfig, facts: &Facts) -> Finding {
    const CHECK: &str = "durable writes";
    let dir = config.data_dir.display();
    match &facts.durable_write {
        Ok(took) if *took < SLOW_WRITE => ok(CHECK, format!("4 KiB in {} µs with O_DIRECT in {dir}", took.as_micros())),
        Ok(took) => warning(
            CHECK,
            format!("4 KiB take {} ms with O_DIRECT in {dir}", took.as_millis()),
            "every acknowledgement waits for such a write; put data_dir on a faster disk".to_owned(),
        ),
        Err(error) => failed(
            CHECK,
            format!("{error} in {dir}"),
            "give data_dir a directory that this user may write, on a file system with O_DIRECT (ext4, XFS)".to_owned(),
        ),
    }
}

fn free_space(config: &NodeConfig, facts: &Facts) -> Finding {
    const CHECK: &str = "free space";
    let storage = &config.storage;
    // Each shard starts with its spare segments and one to write to.
    let first = u64::from(config.shards) * (u64::from(storage.segments_spare) + 1) * storage.segment_bytes;
    match &facts.free_bytes {
        Err(error) => warning(CHECK, error.clone(), "the space of data_dir cannot be read".to_owned()),
        // What fills the disk must stay readable and deletable.
        Ok(free) if *free < storage.disk_reserve_bytes && facts.has_data => warning(
            CHECK,
            format!("{} free, and {} are reserved", bytes_text(*free), bytes_text(storage.disk_reserve_bytes)),
            "publishing is refused until there is room; free some space, or delete topics".to_owned(),
        ),
        Ok(free) if *free < storage.disk_reserve_bytes => failed(
            CHECK,
            format!("{} free, and {} are reserved", bytes_text(*free), bytes_text(storage.disk_reserve_bytes)),
            "free some space, or lower storage.disk_reserve_bytes".to_owned(),
        ),
        Ok(free) if *free - storage.disk_reserve_bytes < first => warning(
            CHECK,
            format!("{} free", bytes_text(*free)),
            format!("the first segments take {} above the reserve; free some space", bytes_text(first)),
        ),
        Ok(free) => ok(CHECK, format!("{} free", bytes_text(*free))),
    }
}

fn free_ports(config: &NodeConfig, facts: &Facts) -> Finding {
    const CHECK: &str = "ports";
    if let Some(pid) = facts.holder {
        let pid = pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
        return ok(CHECK, format!("not tried: a node runs on {} (pid {pid})", config.data_dir.display()));
    }
    if facts.ports_taken.is_empty() {
        return ok(CHECK, format!("{} and {} can be listened on", config.listen, config.admin_listen));
    }
    let taken: Vec<String> = facts.ports_taken.iter().map(|(address, error)| format!("{address}: {error}")).collect();
    failed(CHECK, taken.join("; "), "stop what listens there, or change listen or admin_listen".to_owned())
}

/// Raises the soft limit to the hard one and returns it; `None`: unlimited.
fn raise(resource: Resource) -> Option<u64> {
    let limit = getrlimit(resource);
    if limit.current != limit.maximum
        && setrlimit(resource, Rlimit { current: limit.maximum, maximum: limit.maximum }).is_ok()
    {
        return limit.maximum;
    }
    limit.current
}

/// The nearest directory at or above `dir` that exists: a doctor makes none.
fn existing(dir: &Path) -> &Path {
    let named = |dir: &&Path| !dir.as_os_str().is_empty();
    dir.ancestors().take_while(named).find(|dir| dir.is_dir()).unwrap_or(Path::new("."))
}

fn start_executor() -> io::Result<()> {
    Executor::start(ExecutorConfig::new("probe", None), || async {})?.join()
}

/// The median time of a durable write of one block into a block that was written before.
fn durable_write(dir: &Path) -> io::Result<Duration> {
    let file = TemporaryFile(dir.join(format!("probe-{}.tmp", std::process::id())));
    let mut memory = vec![0u8; 2 * BLOCK_BYTES];
    let start = memory.as_ptr().align_offset(BLOCK_BYTES);
    let block = &mut memory[start..start + BLOCK_BYTES];
    let mut zeros = std::fs::File::create(&file.0)?;
    zeros.write_all(block)?;
    zeros.sync_all()?;
    drop(zeros);
    let flags = rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::DSYNC;
    let opened = OpenOptions::new().read(true).write(true).custom_flags(flags.bits() as i32).open(&file.0)?;
    let mut times = Vec::with_capacity(WRITES);
    for round in 0..WRITES {
        block.fill(round as u8 + 1);
        let began = Instant::now();
        opened.write_all_at(block, 0)?;
        times.push(began.elapsed());
    }
    block.fill(0);
    opened.read_exact_at(block, 0)?;
    if block.iter().any(|byte| *byte != WRITES as u8) {
        return Err(io::Error::other("what was written is not what is read back"));
    }
    times.sort_unstable();
    Ok(times[WRITES / 2])
}

struct TemporaryFile(PathBuf);

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

fn free_bytes(dir: &Path) -> io::Result<u64> {
    let statistics = rustix::fs::statvfs(dir)?;
    Ok(statistics.f_bavail.saturating_mul(statistics.f_frsize))
}

fn ports_taken(config: &NodeConfig) -> Vec<(SocketAddr, String)> {
    let mut addresses = vec![config.listen, config.admin_listen];
    addresses.extend((0..config.shards).map(|shard| SocketAddr::new(config.listen.ip(), config.shard_port(shard))));
    addresses
        .into_iter()
        .filter(|address| address.port() != 0)
        .filter_map(|address| ports::why_taken(address).map(|why| (address, why)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn good() -> Facts {
        Facts {
            kernel: "6.12.0-1-amd64".to_owned(),
            io_uring_disabled: Some(0),
            executor: Ok(()),
            cores: vec![0, 1],
            memlock_bytes: Some(8 << 20),
            files_max: Some(1 << 20),
            durable_write: Ok(Duration::from_micros(100)),
            free_bytes: Ok(100 << 30),
            has_data: false,
            holder: None,
            ports_taken: Vec::new(),
        }
    }

    fn config() -> NodeConfig {
        NodeConfig { shards: 2, ..NodeConfig::default() }
    }

    fn finding(facts: &Facts, check: &str) -> Finding {
        judge(&config(), facts).into_iter().find(|finding| finding.check == check).unwrap()
    }

    #[test]
    fn a_good_host_has_nothing_to_remedy() {
        for finding in judge(&config(), &good()) {
            assert_eq!((finding.outcome, finding.remedy.as_str()), (Outcome::Ok, ""), "{}", finding.check);
        }
    }

    #[test]
    fn what_a_node_cannot_live_with_fails_and_names_the_remedy() {
        let cases: [(&str, Facts, &str); 8] = [
            ("kernel", Facts { kernel: "5.4.0-generic".to_owned(), ..good() }, "5.8"),
            (
                "io_uring",
                Facts { executor: Err("not permitted".to_owned()), io_uring_disabled: Some(2), ..good() },
                "sysctl -w kernel.io_uring_disabled=0",
            ),
            ("io_uring", Facts { executor: Err("not permitted".to_owned()), ..good() }, "seccomp"),
            ("locked memory", Facts { memlock_bytes: Some(64 << 10), ..good() }, "ulimit -l 3072"),
            ("open files", Facts { files_max: Some(256), ..good() }, "ulimit -n"),
            ("durable writes", Facts { durable_write: Err("invalid argument".to_owned()), ..good() }, "O_DIRECT"),
            ("free space", Facts { free_bytes: Ok(1 << 20), ..good() }, "disk_reserve_bytes"),
            (
                "ports",
                Facts { ports_taken: vec![("127.0.0.1:7400".parse().unwrap(), "in use".to_owned())], ..good() },
                "stop what listens",
            ),
        ];
        for (check, facts, remedy) in cases {
            let finding = finding(&facts, check);
            assert_eq!(finding.outcome, Outcome::Failed, "{check}");
            assert!(finding.remedy.contains(remedy), "{check}: {}", finding.remedy);
        }
    }

    #[test]
    fn what_a_node_can_live_with_is_a_warning() {
        let cases = [
            ("kernel", Facts { kernel: "custom".to_owned(), ..good() }),
            ("locked memory", Facts { memlock_bytes: Some(1 << 20), ..good() }),
            ("open files", Facts { files_max: Some(1024), ..good() }),
            ("cores", Facts { cores: vec![0], ..good() }),
            ("durable writes", Facts { durable_write: Ok(Duration::from_millis(30)), ..good() }),
            ("free space", Facts { free_bytes: Ok((1 << 30) + 1), ..good() }),
            ("free space", Facts { free_bytes: Ok(1 << 20), has_data: true, ..good() }),
        ];
        for (check, facts) in cases {
            assert_eq!(finding(&facts, check).outcome, Outcome::Warning, "{check}");
        }
    }

    #[test]
    fn a_pin_on_a_core_that_may_not_be_used_fails() {
        let config = NodeConfig { cores: Cores::Pins(vec![0, 7]), ..config() };
        let finding = judge(&config, &good()).into_iter().find(|finding| finding.check == "cores").unwrap();
        assert_eq!(finding.outcome, Outcome::Failed);
        assert!(finding.remedy.contains("core 7"));
    }

    #[test]
    fn ports_of_a_node_that_runs_here_are_not_held_against_it() {
        let facts = Facts { holder: Some(Some(42)), ..good() };
        let finding = finding(&facts, "ports");
        assert_eq!(finding.outcome, Outcome::Ok);
        assert!(finding.found.contains("pid 42"));
    }

    #[test]
    fn this_host_writes_durably_and_leaves_nothing_behind() {
        // Beside the build, not in /tmp, which may be a tmpfs.
        let folder = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = NodeConfig {
            data_dir: folder.path().join("data"),
            listen: listener.local_addr().unwrap(),
            admin_listen: "127.0.0.1:0".parse().unwrap(),
            ..config()
        };
        let facts = Facts::gather(&config);
        assert!(facts.durable_write.is_ok(), "{:?}", facts.durable_write);
        assert_eq!(facts.executor, Ok(()));
        assert!(facts.ports_taken.iter().any(|(address, _)| *address == config.listen));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
