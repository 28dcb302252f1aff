//! Runs a load from the first connection to the last answer.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use drava_client::glommio_driver::DriverError;
use drava_runtime::{Executor, ExecutorConfig, ExecutorHandle};

use super::consumer::Consumer;
use super::options::{Kind, LoadOptions};
use super::outcome::{Direction, NodeUse, Outcome, Sample};
use super::plan::{self, Route, Sharing};
use super::producer::{Producer, chain};
use super::shared::{Flow, Phase, Shared};
use crate::cpu::{ThreadId, process_cpu, process_memory};
use crate::latency::Latency;
use crate::machine::Machine;
use crate::measure::{GIB, MIB};
use crate::payload::clock_ns;
use crate::progress::Progress;
use crate::verify::{Findings, Verifier};

const SAMPLE_EVERY: Duration = Duration::from_millis(250);
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Beyond this after the end, a run is given up.
const END_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("set up the topics on {address}")]
    SetUp {
        address: std::net::SocketAddr,
        #[source]
        source: DriverError,
    },
    #[error("start an executor")]
    Executor(#[source] io::Error),
    #[error("read what process {pid} uses")]
    Node {
        pid: u32,
        #[source]
        source: io::Error,
    },
    #[error("{0}")]
    Failed(String),
    #[error("the run did not end within {END_PATIENCE:?} of its stop")]
    Stuck,
}

/// Makes the topics if need be, runs the load, and says what came of it. Blocks the calling thread.
pub fn run(kind: Kind, options: &LoadOptions, progress: &Progress) -> Result<Outcome, RunError> {
    progress.say("setting up topics");
    let create = kind != Kind::Consume;
    let set_up = ExecutorConfig::new("bench-set-up", None);
    let homes = Executor::run(set_up, plan::homes(options, create)).map_err(RunError::Executor)?;
    let homes = homes.map_err(|source| RunError::SetUp { address: options.addr, source })?;

    let publishes = kind != Kind::Consume;
    let consumes = kind != Kind::Produce;
    let producers =
        if publishes { plan::routes(&homes, options.connections as usize, Sharing::Allowed) } else { vec![] };
    let consumers =
        if consumes { plan::routes(&homes, options.consumers() as usize, Sharing::Excluded) } else { vec![] };
    let shared = Arc::new(Shared::new(producers.len(), consumers.len(), options.messages));
    let workers = Workers::start(kind, options, &shared, producers, consumers)?;

    let measured = Measuring { kind, options, shared: &shared, progress, threads: &workers.threads }.watch();
    workers.join()?;
    if let Some(failure) = shared.failure() {
        return Err(RunError::Failed(failure));
    }
    let measured = measured?;
    let verification = (consumes && !options.no_verify).then(|| verification(kind, options, &shared));
    Ok(measured.outcome(kind, options, &shared, verification))
}

fn verification(kind: Kind, options: &LoadOptions, shared: &Shared) -> Findings {
    let mut verifiers = shared.take_verifiers().into_iter();
    let Some(first) = verifiers.next() else { return Findings::default() };
    let whole = verifiers.fold(first, |mut whole: Verifier, other| {
        whole.merge(other);
        whole
    });
    // What retention took away before it was read is not lost.
    let all_must_come = matches!(kind, Kind::Tail | Kind::Mixed) && options.retention_bytes == 0;
    let acknowledged = if all_must_come { shared.acknowledged() } else { Vec::new() };
    whole.finish(acknowledged)
}

/// The executors of a run.
struct Workers {
    handles: Vec<ExecutorHandle<()>>,
    threads: Vec<ThreadId>,
}

impl Workers {
    fn start(
        kind: Kind,
        options: &LoadOptions,
        shared: &Arc<Shared>,
        producers: Vec<Route>,
        consumers: Vec<Route>,
    ) -> Result<Workers, RunError> {
        let run: u32 = rand::random();
        let cores = options.cores();
        let rate = options.rate.map(|rate| rate / producers.len().max(1) as f64);
        let mut streams = 0;
        let count = producers.len();
        let numbered = producers.into_iter().enumerate().map(|(index, route)| {
            let first_stream = streams;
            streams += route.partitions.len() as u32;
            (route, first_stream, index as f64 / count as f64)
        });
        let numbered: Vec<_> = numbered.collect();
        let mut handles = Vec::new();
        let (started, threads) = mpsc::channel();
        for (place, &core) in cores.iter().enumerate() {
            let producers: Vec<_> = numbered.iter().skip(place).step_by(cores.len()).cloned().collect();
            // Starts at the other end, so that few connections of both kinds lie on different cores.
            let from = cores.len() - 1 - place;
            let consumers: Vec<_> = consumers.iter().skip(from).step_by(cores.len()).cloned().collect();
            let (options, shared, started) = (options.clone(), shared.clone(), started.clone());
            let config = ExecutorConfig::new(format!("bench-{core}"), Some(core));
            let handle = Executor::start(config, move || async move {
                // The starter counts on it.
                started.send(ThreadId::current()).expect("the engine waits");
                let options = Rc::new(options);
                let mut tasks = Vec::new();
                for (route, first_stream, place) in producers {
                    let (options, shared) = (options.clone(), shared.clone());
                    let producer = Producer { options, shared, route, run, first_stream, rate, place };
                    tasks.push(drava_runtime::spawn(producer.run()));
                }
                for route in consumers {
                    let (options, shared) = (options.clone(), shared.clone());
                    tasks.push(drava_runtime::spawn(Consumer { options, shared, route, kind, run }.run()));
                }
                for task in tasks {
                    task.await.expect("the executor runs on");
                }
            });
            handles.push(handle.map_err(RunError::Executor)?);
        }
        let threads = threads.iter().take(cores.len()).collect();
        Ok(Workers { handles, threads })
    }

    fn join(self) -> Result<(), RunError> {
        self.handles.into_iter().try_for_each(|handle| handle.join().map_err(RunError::Executor))
    }
}

/// The engine's thread while the load runs.
struct Measuring<'a> {
    kind: Kind,
    options: &'a LoadOptions,
    shared: &'a Shared,
    progress: &'a Progress,
    threads: &'a [ThreadId],
}

struct Measured {
    elapsed: Duration,
    published: Totals,
    delivered: Totals,
    client_cpu: Duration,
    node: Option<(Duration, u64)>,
    samples: Vec<Sample>,
}

#[derive(Clone, Debug, Default)]
struct Totals {
    messages: u64,
    bytes: u64,
    latency: Latency,
}

impl Measuring<'_> {
    fn watch(&self) -> Result<Measured, RunError> {
        let shared = self.shared;
        let all = shared.workers_left.load(Ordering::Acquire);
        self.progress.say("connecting");
        while shared.ready.load(Ordering::Acquire) < all && !shared.has_failed() {
            std::thread::sleep(LOOK_EVERY);
        }
        shared.enter(Phase::Running);
        let warm_up = self.options.warm_up(self.kind);
        if !warm_up.is_zero() {
            self.progress.say("warming up");
            self.sleep_while_running(warm_up);
        }

        let (published_before, delivered_before) = (shared.published.counts(), shared.delivered.counts());
        drop((shared.published.take_latency(), shared.delivered.take_latency()));
        shared.measure_from(if warm_up.is_zero() { 0 } else { clock_ns() });
        let client_before = self.client_cpu();
        let node_before = self.node_cpu()?;
        let time = self.options.measured(self.kind);
        let started = Instant::now();
        let mut totals = (Totals::default(), Totals::default());
        let mut samples = Vec::new();
        let mut last = Interval { at: started, published: published_before, delivered: delivered_before };
        loop {
            let left = time.map_or(SAMPLE_EVERY, |time| time.saturating_sub(started.elapsed()).min(SAMPLE_EVERY));
            let running = self.sleep_while_running(left);
            if !running || time.is_some_and(|time| time <= started.elapsed()) {
                break;
            }
            samples.push(self.sample(started, &mut last, &mut totals));
        }
        let elapsed = started.elapsed();
        let (published_after, delivered_after) = (shared.published.counts(), shared.delivered.counts());
        let client_cpu = self.client_cpu().saturating_sub(client_before);
        let node = match (node_before, self.node_cpu()?) {
            (Some((before, _)), Some((after, peak))) => Some((after.saturating_sub(before), peak)),
            (Some(_), None) | (None, _) => None,
        };
        shared.measure_until(clock_ns());
        shared.enter(Phase::Stopping);
        self.progress.say("waiting for the last answers");
        self.wait_for_the_end()?;
        // Answers to what was sent in time, and came after it.
        samples.push(self.sample(started, &mut last, &mut totals));
        let (mut published, mut delivered) = totals;
        (published.messages, published.bytes) = difference(published_after, published_before);
        (delivered.messages, delivered.bytes) = difference(delivered_after, delivered_before);
        // The last interval has no full length.
        samples.pop();
        Ok(Measured { elapsed, published, delivered, client_cpu, node, samples })
    }

    /// False when all connections ended before the time was over.
    fn sleep_while_running(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        while Instant::now() < until {
            if self.shared.workers_left.load(Ordering::Acquire) == 0 || self.shared.has_failed() {
                return false;
            }
            std::thread::sleep(LOOK_EVERY.min(until.saturating_duration_since(Instant::now())));
        }
        true
    }

    fn wait_for_the_end(&self) -> Result<(), RunError> {
        let stopped = Instant::now();
        while 0 < self.shared.workers_left.load(Ordering::Acquire) {
            if END_PATIENCE < stopped.elapsed() {
                self.shared.fail(RunError::Stuck.to_string());
                return Err(RunError::Stuck);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    fn sample(&self, started: Instant, last: &mut Interval, totals: &mut (Totals, Totals)) -> Sample {
        let now = Instant::now();
        let seconds = now.duration_since(last.at).as_secs_f64();
        let take = |flow: &Flow, totals: &mut Totals, before: &mut (u64, u64)| {
            let latency = flow.take_latency();
            totals.latency.add(&latency);
            let after = flow.counts();
            let (_, bytes) = difference(after, *before);
            *before = after;
            (bytes as f64 / MIB / seconds, latency.quantiles())
        };
        let (published_mib_per_s, publish) = take(&self.shared.published, &mut totals.0, &mut last.published);
        let (delivered_mib_per_s, delivery) = take(&self.shared.delivered, &mut totals.1, &mut last.delivered);
        last.at = now;
        let sample = Sample {
            at_s: now.duration_since(started).as_secs_f64(),
            published_mib_per_s,
            delivered_mib_per_s,
            publish_p50_us: publish.p50_us,
            publish_p99_us: publish.p99_us,
            delivery_p50_us: delivery.p50_us,
            delivery_p99_us: delivery.p99_us,
        };
        self.progress.sample(self.kind, self.options, &sample);
        sample
    }

    fn client_cpu(&self) -> Duration {
        // A thread that has ended has no clock any more; it ended with the run.
        self.threads.iter().map(|thread| thread.cpu().unwrap_or_default()).sum()
    }

    fn node_cpu(&self) -> Result<Option<(Duration, u64)>, RunError> {
        let Some(pid) = self.options.node_pid else { return Ok(None) };
        let fail = |source| RunError::Node { pid, source };
        Ok(Some((process_cpu(pid).map_err(fail)?, process_memory(pid).map_err(fail)?.peak_bytes)))
    }
}

struct Interval {
    at: Instant,
    published: (u64, u64),
    delivered: (u64, u64),
}

fn difference(after: (u64, u64), before: (u64, u64)) -> (u64, u64) {
    (after.0 - before.0, after.1 - before.1)
}

impl Measured {
    fn outcome(self, kind: Kind, options: &LoadOptions, shared: &Shared, verification: Option<Findings>) -> Outcome {
        let elapsed_s = self.elapsed.as_secs_f64();
        let direction = |totals: &Totals, flow: &Flow| {
            (0 < flow.counts().0).then(|| Direction {
                messages: totals.messages,
                bytes: totals.bytes,
                messages_per_s: totals.messages as f64 / elapsed_s,
                mib_per_s: totals.bytes as f64 / MIB / elapsed_s,
                latency: totals.latency.quantiles(),
                curve: totals.latency.curve(),
            })
        };
        let published = direction(&self.published, &shared.published);
        let delivered = direction(&self.delivered, &shared.delivered);
        let moved = published.as_ref().or(delivered.as_ref());
        let node = self.node.zip(moved).map(|((cpu, peak_rss_bytes), moved)| NodeUse {
            cpu_s: cpu.as_secs_f64(),
            cpu_s_per_gib: cpu.as_secs_f64() / (moved.bytes.max(1) as f64 / GIB),
            cpu_s_per_million: cpu.as_secs_f64() / (moved.messages.max(1) as f64 / 1e6),
            peak_rss_bytes,
        });
        Outcome {
            kind,
            options: options.clone(),
            machine: Machine::here(),
            elapsed_s,
            published,
            delivered,
            node,
            client_cpu_s: self.client_cpu.as_secs_f64(),
            verification,
            samples: self.samples,
        }
    }
}

/// An error of a run with its causes, in one line.
pub fn describe(error: &RunError) -> String {
    chain(error)
}
