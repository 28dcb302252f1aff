//! Boot: from a configuration to a node that serves, and to one that stopped in order.
//!
//! 1. Probe the host: what is missing is said in plain words, before anything is touched.
//! 2. Lock the data directory, settle the ports, bring the stores to the number of shards, open the index.
//! 3. Start one executor for each shard; each opens its store and replays its journal.
//! 4. Start the control core: it gives the shards their first metadata image, and they listen.
//! 5. Wait for SIGTERM or SIGINT, then drain: finish what is in flight, seal, exit 0.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use drava_protocol::{NodeId, ShardId};
use drava_raft::Registration;
use drava_runtime::foreign::{self, Inbox, InboxSender};
use drava_runtime::{Executor, ExecutorConfig, ExecutorHandle};
use drava_storage::{StoreConfig, StoreId};
use signal_hook::iterator::Signals;

use super::data_dir::DataDir;
use super::ports::{Held, Ports};
use super::probe::{self, Finding};
use super::reshard;
use crate::config::NodeConfig;
use crate::control::http::{HttpConfig, HttpServer};
use crate::control::meta_disk::NodeMetaDisk;
use crate::control::{self, ControlConfig, ControlEnds, ControlRequest, ControlStarted};
use crate::shard::command::ShardCommand;
use crate::shard::{self, Limits, ShardConfig, Started};

/// Beyond the configured time for a drain, before the process ends all the same.
const DRAIN_GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The findings say what and how to mend it.
    #[error("this host lacks what a node needs")]
    Host(Vec<Finding>),
    #[error(transparent)]
    DataDir(#[from] super::data_dir::DataDirError),
    #[error(transparent)]
    Port(#[from] super::ports::PortError),
    #[error(transparent)]
    Reshard(#[from] super::reshard::ReshardError),
    #[error("the executor of {what} did not start: {source}")]
    Executor { what: String, source: std::io::Error },
    #[error("{0}")]
    Shard(String),
    #[error("the control core: {0}")]
    Control(String),
    #[error("signals: {0}")]
    Signals(std::io::Error),
    #[error("the node did not finish within its drain timeout; what it had not acknowledged may be lost")]
    DrainTimeout,
}

/// A node that serves.
pub struct RunningNode {
    pub ports: Ports,
    pub recovered: Vec<Started>,
    pub control_started: ControlStarted,
    pub took: Duration,
    control: InboxSender<ControlRequest>,
    drain_timeout: Duration,
    signals: Signals,
    executors: Vec<ExecutorHandle<()>>,
    control_executor: ExecutorHandle<Result<(), String>>,
    /// Locks the directory while the node runs.
    _data_dir: DataDir,
}

/// Starts a node; returns when it serves.
pub fn start(config: &NodeConfig) -> Result<RunningNode, BootError> {
    let began = Instant::now();
    let findings = probe::probe(config);
    if findings.iter().any(Finding::is_failed) {
        return Err(BootError::Host(findings));
    }
    let mut data_dir = DataDir::open(config)?;
    let (ports, held) = Ports::settle(config)?;
    if let Some(resharded) = reshard::follow(config, &mut data_dir)? {
        tracing::info!("{resharded}");
    }
    let stores: Vec<StoreId> = data_dir.stores().collect();
    let indexes = reshard::indexes(&data_dir, &stores)?;
    let foreign = reshard::drain(&mut data_dir, &indexes)?;

    let (control, control_inbox) = foreign::inbox();
    let (started_sender, started) = mpsc::channel();
    let shard_ports: Arc<[u16]> = ports.shards.clone().into();
    let mut shard_senders = Vec::new();
    let mut executors = Vec::new();
    let meshes = shard::full_mesh(config.shards).into_iter();
    for (number, (mesh, (store, index))) in meshes.zip(stores.into_iter().zip(indexes)).enumerate() {
        let id = ShardId(number as u16);
        let (commands, inbox) = foreign::inbox();
        shard_senders.push(commands);
        let shard_config = ShardConfig {
            id,
            node: NodeId(config.node_id),
            listen: ports.listen.ip(),
            shared_port: ports.listen.port(),
            ports: shard_ports.clone(),
            advertised_host: config.advertised_host.clone(),
            limits: limits(config),
            store: StoreConfig { foreign: foreign.clone(), ..store_config(config, &data_dir, store) },
            mesh,
            commands: inbox,
            control: control.clone(),
            started: started_sender.clone(),
        };
        let executor = ExecutorConfig::new(format!("shard-{number}"), config.shard_core(id.0));
        let handle = Executor::start(executor, move || shard::run(shard_config, index))
            .map_err(|source| BootError::Executor { what: format!("shard {id}"), source })?;
        executors.push(handle);
    }
    drop(started_sender);
    // Those of the shards are the last ones: with them the thread that drains ends.
    drop(foreign);
    let mut recovered = Vec::new();
    for _ in 0..config.shards {
        // A shard that ends without a word has panicked, and then the process is gone.
        let found = started.recv().map_err(|_| BootError::Shard("a shard ended while it started".to_owned()))?;
        recovered.push(found.map_err(BootError::Shard)?);
    }
    recovered.sort_by_key(|found| found.shard);

    // Before anybody is served: from then on a node that is told to stop drains first.
    let signals =
        Signals::new([signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT]).map_err(BootError::Signals)?;
    let (control_executor, control_started) =
        start_control(config, &data_dir, &ports, held, &recovered, control_inbox, shard_senders)?;
    data_dir.write_ports(&ports)?;
    Ok(RunningNode {
        ports,
        recovered,
        control_started,
        took: began.elapsed(),
        control,
        drain_timeout: config.drain_timeout(),
        signals,
        executors,
        control_executor,
        _data_dir: data_dir,
    })
}

fn start_control(
    config: &NodeConfig,
    data_dir: &DataDir,
    ports: &Ports,
    held: Held,
    recovered: &[Started],
    requests: Inbox<ControlRequest>,
    shards: Vec<InboxSender<ShardCommand>>,
) -> Result<(ExecutorHandle<Result<(), String>>, ControlStarted), BootError> {
    let (ready, started) = mpsc::channel();
    let incarnation = &data_dir.format().incarnation;
    let incarnation = u128::from_str_radix(incarnation, 16).map_err(|_| {
        BootError::Control(format!("format.json has the incarnation `{incarnation}`, which is no hex number"))
    })?;
    let registration = Registration {
        node: config.node_id,
        incarnation,
        host: config.advertised_host.clone(),
        shared_port: ports.listen.port(),
        shard_ports: ports.shards.clone(),
    };
    let mut control_config = ControlConfig::new(registration);
    control_config.drain_timeout = config.drain_timeout();
    control_config.highest_partition = recovered.iter().filter_map(|found| found.highest_partition).max();
    let meta = data_dir.meta();
    let admin: SocketAddr = ports.admin;
    let executor = ExecutorConfig::new("control", config.control_core());
    let handle = Executor::start(executor, move || async move {
        let outcome = run_control(control_config, meta, admin, requests, shards, ready.clone()).await;
        if let Err(reason) = &outcome {
            // Whoever still waits for the start hears it; a running node stops, because it must not go on half.
            if ready.send(Err(reason.clone())).is_err() {
                tracing::error!(reason, "the control core failed; the node stops");
                drava_runtime::leave(1);
            }
        }
        outcome
    })
    .map_err(|source| BootError::Executor { what: "the control core".to_owned(), source })?;
    let found = started.recv().map_err(|_| BootError::Control("it ended while it started".to_owned()))?;
    let found = found.map_err(BootError::Control)?;
    // Every port is listened on by now.
    drop(held);
    Ok((handle, found))
}

async fn run_control(
    config: ControlConfig,
    meta: PathBuf,
    admin: SocketAddr,
    requests: Inbox<ControlRequest>,
    shards: Vec<InboxSender<ShardCommand>>,
    started: mpsc::Sender<Result<ControlStarted, String>>,
) -> Result<(), String> {
    let disk = NodeMetaDisk::open(&meta).await.map_err(|error| format!("{}: {error}", meta.display()))?;
    let http = HttpServer::bind(HttpConfig::new(admin)).map_err(|error| error.to_string())?;
    let (ready, is_ready) = foreign::reply();
    drava_runtime::spawn(async move {
        if let Some(found) = is_ready.await {
            drop(started.send(found));
        }
    });
    let ends = ControlEnds { requests, shards, ready };
    control::run(config, Rc::new(disk), ends, move |core, stop| http.serve(core, stop))
        .await
        .map_err(|error| error.to_string())
}

impl RunningNode {
    /// Runs until SIGTERM or SIGINT, then drains.
    pub fn run_until_signal(mut self) -> Result<(), BootError> {
        let signal = self.signals.forever().next();
        tracing::info!(signal, "draining");
        self.drain()
    }

    /// Stops accepting, finishes what is in flight, seals the journals, stops the executors.
    pub fn drain(self) -> Result<(), BootError> {
        let (done_sender, done) = mpsc::channel();
        let (reply, is_done) = foreign::reply();
        if self.control.send(ControlRequest::Drain { done: reply }).is_err() {
            return Err(BootError::Control("it is gone".to_owned()));
        }
        // The reply is a future; a small executor of its own waits for it, so that this thread can give up in time.
        let waiter = std::thread::spawn(move || {
            futures_lite::future::block_on(is_done);
            // Nobody waits any more when the time was up.
            let _ = done_sender.send(());
        });
        if done.recv_timeout(self.drain_timeout + DRAIN_GRACE).is_err() {
            return Err(BootError::DrainTimeout);
        }
        drop(waiter.join());
        for executor in self.executors {
            drop(executor.join());
        }
        drop(self.control_executor.join());
        Ok(())
    }
}

fn limits(config: &NodeConfig) -> Limits {
    let network = &config.network;
    Limits {
        connections_max: network.connections_max as usize,
        payload_bytes_max: network.payload_bytes_max,
        in_flight_max: network.in_flight_max,
        hello_timeout: network.hello_timeout(),
        frame_timeout: network.frame_timeout(),
        write_timeout: network.write_timeout(),
        receive_bytes_max: network.receive_bytes_max as usize,
        staged_bytes_max: config.storage.staged_bytes_max,
        cursor_save_interval: config.storage.cursor_save_interval(),
        // The rest of the time is for the seal and for the control core.
        drain_timeout: config.drain_timeout() / 2,
    }
}

pub(super) fn store_config(config: &NodeConfig, data_dir: &DataDir, store: StoreId) -> StoreConfig {
    let storage = &config.storage;
    StoreConfig {
        dir: data_dir.store(store),
        shard: ShardId(store.0),
        segment_bytes: storage.segment_bytes,
        segments_spare: storage.segments_spare as usize,
        cache_bytes: storage.cache_bytes,
        read_ahead_bytes: storage.read_ahead_bytes,
        ledger_bytes_max: storage.ledger_bytes_max,
        ledger_age_max: storage.ledger_age_max(),
        index_flush_bytes: storage.index_flush_bytes,
        disk_reserve_bytes: storage.disk_reserve_bytes,
        verify_reads: storage.verify_reads,
        memory_bytes: storage.memory_bytes(),
        scrub_bytes_per_s: storage.scrub_bytes_per_s,
        scrub_interval: storage.scrub_interval(),
        compaction_bytes_per_s: storage.compaction_bytes_per_s,
        compaction_garbage_percent: storage.compaction_garbage_percent,
        compaction_fragment_bytes: storage.compaction_fragment_bytes,
        ..StoreConfig::default()
    }
}
