//! The configuration of a node: each option is declared here, once.
//!
//! 1. [`option`] has the words of a declaration: type, unit, range.
//! 2. This module declares the options and what must hold between them.
//! 3. [`load`] reads them: a flag beats the environment, the environment the file, the file the default.
//! 4. [`mod@print`] writes the effective file and the reference.
//!
//! Nobody below `main` reads the environment: values are handed down.

pub mod load;
pub mod option;
pub mod print;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use load::{ConfigError, ConfigErrors, Loaded, Origin, Sources};
pub use option::{Cores, LogFormat, LogLevel, OptionSpec, Section};
use option::{Raw, section};

/// More shards than this in one node are refused.
pub const SHARDS_MAX: u16 = 64;

/// With less a store has no room for its blocks in flight.
const MEMORY_BYTES_MIN: u64 = 64 << 20;
/// For blocks in flight, free buffers and bookkeeping, where nobody said how much memory there is.
const MEMORY_BYTES_BESIDE: u64 = 64 << 20;

section! {
    /// The options of one node.
    NodeConfig, "" {
        /// Which node of its cluster this is. Chosen once: a data directory belongs to the node that made it.
        node_id: u64 = 1, None, Range::Numbers(1..=i64::MAX as u64);
        /// Where messages and metadata are kept. Made when it does not exist. Its file system must take O_DIRECT writes.
        data_dir: PathBuf = PathBuf::from("./data"), None, Range::Any;
        /// Address and port for clients, shared by all shards. Port 0: this port and those of the shards are chosen by
        /// the system and written to `ports.json` in the data directory.
        listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 7400)), None, Range::Any;
        /// Shard i listens on this port + i too, so that a client reaches the core that owns its partition. 0: the port
        /// after that of `listen`.
        shard_port_base: u16 = 0, None, Range::Numbers(0..=65535);
        /// Host or IP that clients are sent to. Empty: the host that they are connected to.
        advertised_host: String = String::new(), None, Range::Any;
        /// Address and port of the HTTP admin: health, metrics, topics.
        admin_listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 7480)), None, Range::Any;
        /// Data cores. Each has its own executor, journal, index and cache. Fixed once the data directory is made.
        shards: u16 = cores_allowed().len().clamp(1, SHARDS_MAX as usize) as u16, None, Range::Numbers(1..=64),
            "one for each core that the process may use, at most 64";
        /// Cores that the shards are pinned to: "auto", "none", or a list, the first for shard 0. One more than there
        /// are shards is for the control core, which else shares the first.
        cores: Cores = Cores::Auto, None, Range::Any;
        /// How long a node that was told to stop finishes what is in flight before it stops all the same.
        drain_timeout_ms: u64 = 10_000, Milliseconds, Range::Numbers(0..=600_000);
    }
    with {
        network: NetworkConfig,
        storage: StorageConfig,
        log: LogConfig,
    }
}

section! {
    /// What clients may ask of a shard.
    NetworkConfig, "network" {
        /// Connections of one shard. More are refused with an error that says so.
        connections_max: u32 = 8_192, None, Range::Numbers(1..=1_000_000);
        /// The largest payload of one frame, which is the largest batch. Clients are told when they connect.
        payload_bytes_max: u32 = 4 << 20, Bytes, Range::Numbers(64 << 10..=64 << 20);
        /// Requests that one connection may have waiting. More are not read until answers went out.
        in_flight_max: u32 = 1_024, None, Range::Numbers(1..=65_536);
        /// Memory of each shard for receiving, all its connections together.
        receive_bytes_max: u64 = 64 << 20, Bytes, Range::Numbers(8 << 20..=64 << 30);
        /// A client that has not said Hello for this long is disconnected.
        hello_timeout_ms: u64 = 10_000, Milliseconds, Range::Numbers(100..=600_000);
        /// A client that has begun a frame and not finished it for this long is disconnected.
        frame_timeout_ms: u64 = 30_000, Milliseconds, Range::Numbers(100..=3_600_000);
        /// A client that takes nothing of what is sent to it for this long is disconnected.
        write_timeout_ms: u64 = 30_000, Milliseconds, Range::Numbers(100..=3_600_000);
    }
}

section! {
    /// The journal, the index and the cache of a shard.
    StorageConfig, "storage" {
        /// Size of one segment file of the journal. A whole number of MiB.
        segment_bytes: u64 = 64 << 20, Bytes, Range::Numbers(4 << 20..=4 << 30);
        /// Segments of each shard that are kept written with zeros and ready: those sync several times faster than
        /// files that grow.
        segments_spare: u32 = 2, None, Range::Numbers(1..=64);
        /// What a shard may have received and not yet written; beyond it clients are made to wait.
        staged_bytes_max: u64 = 32 << 20, Bytes, Range::Numbers(1 << 20..=16 << 30);
        /// Memory of each shard for the newest entries, from which readers that keep up are served.
        cache_bytes: u64 = 128 << 20, Bytes, Range::Numbers(1 << 20..=1 << 40);
        /// A partition begins its next ledger when this one is as large. Retention deletes whole ledgers.
        ledger_bytes_max: u64 = 256 << 20, Bytes, Range::Numbers(64 << 10..=1 << 40);
        /// A partition begins its next ledger when this one is as old.
        ledger_age_max_s: u64 = 3_600, Seconds, Range::Numbers(1..=365 * 86_400);
        /// What a reader behind the cache has read ahead for it.
        read_ahead_bytes: u64 = 4 << 20, Bytes, Range::Numbers(64 << 10..=64 << 20);
        /// The index is made durable each time the journal grew by this much. More makes the replay after a crash
        /// longer, less costs writes.
        index_flush_bytes: u64 = 128 << 20, Bytes, Range::Numbers(1 << 20..=64 << 30);
        /// Cursors that moved are saved this often at the latest.
        cursor_save_interval_ms: u64 = 200, Milliseconds, Range::Numbers(1..=60_000);
        /// With less than this free on the file system, publishing is refused until there is room; reading goes on.
        disk_reserve_bytes: u64 = 1 << 30, Bytes, Range::Numbers(0..=1 << 40);
        /// Compare the checksum of every batch that is read back from disk. Off saves CPU and passes damage on to
        /// readers, who compare it themselves.
        verify_reads: bool = true, None, Range::Any;
        /// All memory of each shard's store: cache, blocks being written, what readers hold or is read ahead of them,
        /// what is remembered of partitions and entries, what is being compacted. The cache gives way to the rest, and
        /// readers, who have half, wait when they hold more. 0: twice the sum of `cache_bytes`, two times
        /// `staged_bytes_max`, and 64 MiB.
        memory_bytes: u64 = 0, Bytes, Range::Numbers(0..=1 << 40);
        /// What a shard reads in a second to check what it stored long ago, while its disk is not late. 0: nothing is
        /// checked before somebody reads it.
        scrub_bytes_per_s: u64 = 8 << 20, Bytes, Range::Numbers(0..=16 << 30);
        /// The next check of everything begins so long after the last one began, or at its end if that takes longer.
        scrub_interval_s: u64 = 7 * 86_400, Seconds, Range::Numbers(1..=365 * 86_400);
        /// What a shard reads in a second to bring together what is live in old segments, while its disk is not late; it
        /// writes up to as much. 0: room that lies between live messages does not come back.
        compaction_bytes_per_s: u64 = 64 << 20, Bytes, Range::Numbers(0..=16 << 30);
        /// A segment is compacted when at least so much of it is dead, and there is enough of it to win a segment.
        compaction_garbage_percent: u32 = 50, None, Range::Numbers(1..=100);
        /// A segment is compacted when a reader who catches up gets less than this with each read of it on average.
        compaction_fragment_bytes: u64 = 64 << 10, Bytes, Range::Numbers(0..=1 << 20);
    }
}

section! {
    /// What the node writes to standard error.
    LogConfig, "log" {
        /// The least important events that are written.
        level: LogLevel = LogLevel::Info, None, Range::Names(LogLevel::NAMES);
        /// One line of text for each event, or one JSON object.
        format: LogFormat = LogFormat::Text, None, Range::Names(LogFormat::NAMES);
    }
}

impl NodeConfig {
    /// All declarations, in the order of the file.
    pub fn all_specs() -> Vec<OptionSpec> {
        [NodeConfig::specs(), NetworkConfig::specs(), StorageConfig::specs(), LogConfig::specs()].concat()
    }

    /// Sets one option. `None`: there is no such option.
    fn set_path(&mut self, section: &str, key: &str, raw: Raw<'_>) -> Option<Result<(), String>> {
        match section {
            "" => self.set(key, raw),
            "network" => self.network.set(key, raw),
            "storage" => self.storage.set(key, raw),
            "log" => self.log.set(key, raw),
            _ => None,
        }
    }

    fn get_path(&self, section: &str, key: &str) -> Option<toml::Value> {
        match section {
            "" => self.get(key),
            "network" => self.network.get(key),
            "storage" => self.storage.get(key),
            "log" => self.log.get(key),
            _ => None,
        }
    }

    /// What must hold between options, as sentences about what does not.
    fn broken_rules(&self) -> Vec<String> {
        let mut broken = Vec::new();
        if !self.storage.segment_bytes.is_multiple_of(1 << 20) {
            broken.push("storage.segment_bytes is not a whole number of MiB".to_owned());
        }
        // A flush holds at least one batch, with headers and padding, and lies in one segment.
        if self.storage.segment_bytes / 2 < u64::from(self.network.payload_bytes_max) {
            broken.push("network.payload_bytes_max is more than half of storage.segment_bytes".to_owned());
        }
        let memory_bytes = self.storage.memory_bytes();
        if memory_bytes < MEMORY_BYTES_MIN {
            broken.push("storage.memory_bytes is less than 64 MiB".to_owned());
        }
        if memory_bytes / 4 < self.storage.staged_bytes_max {
            broken.push("storage.staged_bytes_max is more than a quarter of storage.memory_bytes".to_owned());
        }
        if self.network.receive_bytes_max < u64::from(self.network.payload_bytes_max) {
            broken.push("network.payload_bytes_max is more than network.receive_bytes_max".to_owned());
        }
        if self.listen.port() != 0 {
            let base = u32::from(self.shard_port_base());
            let last = base + u32::from(self.shards) - 1;
            if last > u32::from(u16::MAX) {
                broken.push(format!("the ports of the {} shards begin at {base} and pass 65535", self.shards));
            }
            let shard_ports = base..=last;
            if shard_ports.contains(&u32::from(self.listen.port())) {
                broken.push(format!("the port {} of listen is among those of the shards", self.listen.port()));
            }
            let admin = u32::from(self.admin_listen.port());
            if admin != 0 && (shard_ports.contains(&admin) || self.admin_listen.port() == self.listen.port()) {
                broken.push(format!("the port {admin} of admin_listen is taken by listen or by a shard"));
            }
        }
        broken
    }

    /// The port of shard 0; 0 when the system chooses.
    pub fn shard_port_base(&self) -> u16 {
        match (self.listen.port(), self.shard_port_base) {
            (0, _) => 0,
            (listen, 0) => listen.saturating_add(1),
            (_, base) => base,
        }
    }

    /// The port of a shard; 0 when the system chooses.
    pub fn shard_port(&self, shard: u16) -> u16 {
        match self.shard_port_base() {
            0 => 0,
            base => base + shard,
        }
    }

    /// The core that a shard is pinned to; `None`: none.
    pub fn shard_core(&self, shard: u16) -> Option<usize> {
        match &self.cores {
            Cores::Auto => {
                let cores = cores_allowed();
                cores.get(usize::from(shard) % cores.len().max(1)).copied()
            }
            Cores::None => None,
            Cores::Pins(pins) => pins.get(usize::from(shard) % pins.len().max(1)).copied(),
        }
    }

    /// The core that the control core is pinned to; `None`: none.
    pub fn control_core(&self) -> Option<usize> {
        match &self.cores {
            Cores::Pins(pins) if pins.len() == usize::from(self.shards) + 1 => pins.last().copied(),
            Cores::Auto | Cores::None | Cores::Pins(_) => self.shard_core(0),
        }
    }

    pub fn drain_timeout(&self) -> Duration {
        Duration::from_millis(self.drain_timeout_ms)
    }
}

impl NetworkConfig {
    pub fn hello_timeout(&self) -> Duration {
        Duration::from_millis(self.hello_timeout_ms)
    }

    pub fn frame_timeout(&self) -> Duration {
        Duration::from_millis(self.frame_timeout_ms)
    }

    pub fn write_timeout(&self) -> Duration {
        Duration::from_millis(self.write_timeout_ms)
    }
}

impl StorageConfig {
    /// What all of a shard's store may hold in memory.
    pub fn memory_bytes(&self) -> u64 {
        match self.memory_bytes {
            0 => 2 * (self.cache_bytes + 2 * self.staged_bytes_max + MEMORY_BYTES_BESIDE),
            bytes => bytes,
        }
    }

    pub fn ledger_age_max(&self) -> Duration {
        Duration::from_secs(self.ledger_age_max_s)
    }

    pub fn scrub_interval(&self) -> Duration {
        Duration::from_secs(self.scrub_interval_s)
    }

    pub fn cursor_save_interval(&self) -> Duration {
        Duration::from_millis(self.cursor_save_interval_ms)
    }
}

/// The cores that this process may run on, ascending.
pub fn cores_allowed() -> Vec<usize> {
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect(),
        Err(_) => (0..std::thread::available_parallelism().map_or(1, usize::from)).collect(),
    }
}
