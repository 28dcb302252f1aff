//! Executors, and the ticker that keeps them from stalling.
//!
//! glommio arms a preempt timer, asks whether it has run out, and then runs tasks. When it ran out in between, no task
//! runs, and the executor parks as if it had none: with nothing else to wake it, it would sleep on. Three guards:
//!
//! - A preempt timer of 10 ms. The thread has to be off its core for as long at just that point; with 0.1 ms the park is
//!   lost every few seconds.
//! - A ticker, a task that wakes the executor every [`TICK`] while there is work and every [`TICK_IDLE`] while there is
//!   none.
//! - Spare timers. When the park is lost again before the ticker has run, nothing has set its next timer; so it sets a few
//!   more each time.

use std::array;
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::time::{Duration, Instant};

use glommio::{LocalExecutorBuilder, Placement};

use crate::task::Guarded;
use crate::time::Timer;

/// The ticker's period while the executor has worked within the last second.
pub const TICK: Duration = Duration::from_millis(5);
/// The ticker's period on an idle executor: bounds a stall and costs next to nothing.
pub const TICK_IDLE: Duration = Duration::from_millis(50);
/// As often in a row the park may be lost. Each is due after twice the time of the one before it, so that they are not
/// all over at once when the thread was kept off its core.
const SPARES: usize = 7;
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
    /// Starts a thread with an executor that runs the future made by `start`, beside a ticker. A panic in it ends the
    /// process, as in every task.
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
                Guarded(async move { start().await }).await
            })
            .map(ExecutorHandle)
            .map_err(crate::io_error)
    }

    /// Runs `future` on an executor on the calling thread, beside a ticker. A panic in it is the caller's.
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
    /// How much too late the latest of them came.
    pub latest: Duration,
}

impl TickerStats {
    fn after_tick(mut self, late_by: Duration) -> TickerStats {
        self.ticks += 1;
        if LATE_AFTER < late_by {
            self.late += 1;
            self.latest = self.latest.max(late_by);
        }
        self
    }
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
    // A thread may run one executor after another; each starts its own count.
    STATS.set(TickerStats::default());
    let mut active_at = Instant::now();
    loop {
        let before = Instant::now();
        if ACTIVE.replace(false) {
            active_at = before;
        }
        let period = if before.duration_since(active_at) < IDLE_AFTER { TICK } else { TICK_IDLE };
        wake_after(period).await;
        STATS.set(STATS.get().after_tick(before.elapsed().saturating_sub(period)));
    }
}

/// Waits for `period`, with spare timers behind the one that counts.
async fn wake_after(period: Duration) {
    let mut timers: [Timer; 1 + SPARES] = array::from_fn(|index| Timer::new(period * (1 << index)));
    poll_fn(|cx| {
        let [first, spares @ ..] = &mut timers;
        for spare in spares {
            // Only so that it is registered.
            let _ = Pin::new(spare).poll(cx);
        }
        Pin::new(first).poll(cx)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_counted_and_late_ones_remembered() {
        let stats = [Duration::ZERO, LATE_AFTER, LATE_AFTER * 4, LATE_AFTER * 2]
            .into_iter()
            .fold(TickerStats::default(), TickerStats::after_tick);
        assert_eq!((stats.ticks, stats.late, stats.latest), (4, 2, LATE_AFTER * 4));
    }

    #[test]
    fn the_ticker_of_a_started_executor_ticks() {
        let executor = Executor::start(ExecutorConfig::new("ticks", None), || async {
            mark_active();
            while ticker_stats().ticks < 3 {
                crate::time::sleep(TICK).await;
            }
            ticker_stats()
        });
        let stats = executor.expect("an executor").join().expect("it ends");
        assert!(3 <= stats.ticks);
        assert!(stats.late <= stats.ticks);
    }

    #[test]
    fn a_busy_stretch_without_yielding_makes_the_next_tick_late() {
        let stats = Executor::run(ExecutorConfig::new("busy", None), async {
            while ticker_stats().ticks < 1 {
                crate::time::sleep(TICK).await;
            }
            let late_before = ticker_stats().late;
            // Longer than the period in force and the allowance together.
            std::thread::sleep(TICK_IDLE + LATE_AFTER * 4);
            while ticker_stats().late == late_before {
                crate::time::sleep(TICK).await;
            }
            ticker_stats()
        })
        .expect("an executor");
        assert!(LATE_AFTER < stats.latest);
    }

    #[test]
    fn an_executor_on_the_same_thread_starts_its_own_count() {
        const EARLIER: u64 = 1_000_000;
        STATS.set(TickerStats { ticks: EARLIER, ..TickerStats::default() });
        let ticks = Executor::run(ExecutorConfig::new("counts", None), async {
            while matches!(ticker_stats().ticks, 0 | EARLIER) {
                crate::time::sleep(TICK).await;
            }
            ticker_stats().ticks
        });
        assert!(ticks.expect("an executor") < EARLIER);
    }

    #[test]
    fn without_a_ticker_nothing_ticks() {
        let config = ExecutorConfig { ticker: false, ..ExecutorConfig::new("quiet", None) };
        let executor = Executor::start(config, || async {
            crate::time::sleep(TICK * 3).await;
            ticker_stats().ticks
        });
        assert_eq!(executor.expect("an executor").join().expect("it ends"), 0);
    }

    #[test]
    fn an_unknown_core_is_an_error() {
        let started = Executor::start(ExecutorConfig::new("nowhere", Some(usize::MAX)), || async {});
        assert!(started.is_err());
    }
}
