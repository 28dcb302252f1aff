//! Executors, and the ticker that keeps them from stalling.
//!
//! glommio can park an executor that still has a runnable task queue: with nothing else to wake it, it would sleep on.
//! Two guards bound that: a preempt timer of 10 ms (shorter ones make the lost park frequent), and a ticker, a task
//! that wakes the executor every [`TICK`] while there is work and every [`TICK_IDLE`] while there is none.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::time::{Duration, Instant};

use glommio::{LocalExecutorBuilder, Placement};

/// The ticker's period while the executor has worked within [`IDLE_AFTER`].
pub const TICK: Duration = Duration::from_millis(5);
/// The ticker's period on an idle executor: bounds a stall and costs next to nothing.
pub const TICK_IDLE: Duration = Duration::from_millis(50);
const IDLE_AFTER: Duration = Duration::from_secs(1);
/// A tick that comes this much after its time is counted as late.
const LATE_AFTER: Duration = TICK;

#[derive(Clone, Debug)]
pub struct ExecutorConfig {
    /// Name of the thread, at most 15 bytes are shown by the system.
    pub name: String,
    /// The core to pin to; `None`: wherever the system likes, for tests and tools.
    pub core: Option<usize>,
    /// Spin this long before parking. Zero unless latency is worth a core.
    pub spin: Duration,
    /// How often running tasks are asked to yield. 10 ms in production; tests that provoke the stall shorten it.
    pub preempt_timer: Duration,
    /// Whether the ticker runs. Only the test that provokes the stall turns it off.
    pub ticker: bool,
    /// Bytes registered with the kernel for direct IO. Counted against memlock.
    pub io_memory: usize,
    pub ring_depth: usize,
}

impl ExecutorConfig {
    pub fn new(name: impl Into<String>, core: Option<usize>) -> Self {
        Self {
            name: name.into(),
            core,
            spin: Duration::ZERO,
            preempt_timer: Duration::from_millis(10),
            ticker: true,
            io_memory: 1 << 20,
            ring_depth: 256,
        }
    }
}

/// A started executor; `join` waits for its future to end.
#[derive(Debug)]
pub struct ExecutorHandle<T: Send + 'static>(glommio::ExecutorJoinHandle<T>);

impl<T: Send + 'static> ExecutorHandle<T> {
    pub fn join(self) -> io::Result<T> {
        self.0.join().map_err(crate::io_error)
    }
}

#[derive(Debug)]
pub struct Executor;

impl Executor {
    /// Starts a thread with an executor that runs the future made by `start`, beside a ticker.
    ///
    /// Errors: what the kernel refuses (io_uring, memlock, an unknown core).
    pub fn start<G, F, T>(config: ExecutorConfig, start: G) -> io::Result<ExecutorHandle<T>>
    where
        G: FnOnce() -> F + Send + 'static,
        F: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let ticker = config.ticker;
        builder(&config)
            .spawn(move || async move {
                if ticker {
                    crate::spawn(tick());
                }
                start().await
            })
            .map(ExecutorHandle)
            .map_err(crate::io_error)
    }

    /// Runs `future` on an executor on the calling thread, beside a ticker.
    pub fn run<T>(config: ExecutorConfig, future: impl Future<Output = T>) -> io::Result<T> {
        let executor = builder(&config).make().map_err(crate::io_error)?;
        let ticker = config.ticker;
        Ok(executor.run(async move {
            if ticker {
                crate::spawn(tick());
            }
            future.await
        }))
    }
}

fn builder(config: &ExecutorConfig) -> LocalExecutorBuilder {
    let placement = config.core.map_or(Placement::Unbound, Placement::Fixed);
    LocalExecutorBuilder::new(placement)
        .name(&config.name)
        .spin_before_park(config.spin)
        .preempt_timer(config.preempt_timer)
        .io_memory(config.io_memory)
        .ring_depth(config.ring_depth)
}

/// What the ticker of this executor has seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct TickerStats {
    pub ticks: u64,
    /// Ticks that came more than a period too late: the executor was busy without yielding, starved, or parked wrongly.
    pub late: u64,
    pub latest: Duration,
}

thread_local! {
    static ACTIVE: Cell<bool> = const { Cell::new(false) };
    static STATS: Cell<TickerStats> = const { Cell::new(TickerStats { ticks: 0, late: 0, latest: Duration::ZERO }) };
}

/// Tells the ticker that this executor has work, so that it ticks fast for the next second.
pub fn mark_active() {
    ACTIVE.set(true);
}

/// The figures of the calling thread's executor.
pub fn ticker_stats() -> TickerStats {
    STATS.get()
}

async fn tick() {
    let mut active_at = Instant::now();
    loop {
        let before = Instant::now();
        if ACTIVE.replace(false) {
            active_at = before;
        }
        let period = if before.duration_since(active_at) < IDLE_AFTER { TICK } else { TICK_IDLE };
        crate::time::sleep(period).await;
        let late = before.elapsed().saturating_sub(period);
        let mut stats = STATS.get();
        stats.ticks += 1;
        if late > LATE_AFTER {
            stats.late += 1;
            stats.latest = stats.latest.max(late);
        }
        STATS.set(stats);
    }
}
