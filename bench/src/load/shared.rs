//! What the connections of a run and its engine share. Touched once a wake-up of a connection, not once a message.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::latency::Latency;
use crate::verify::Verifier;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Not all connections are ready.
    Preparing,
    Running,
    /// Send nothing new; finish what is under way.
    Stopping,
}

/// Messages of one direction. Counters only grow.
#[derive(Debug)]
pub struct Flow {
    pub messages: AtomicU64,
    pub bytes: AtomicU64,
    /// Of messages since the last [`Flow::take_latency`].
    latency: Mutex<Latency>,
}

#[derive(Debug)]
pub struct Shared {
    phase: AtomicU8,
    /// Messages that were to be sent in [from, until) count for latency.
    from_ns: AtomicU64,
    until_ns: AtomicU64,
    pub published: Flow,
    pub delivered: Flow,
    /// Messages that may still be taken for sending.
    budget: AtomicU64,
    /// Connections that are ready.
    pub ready: AtomicUsize,
    pub producers_left: AtomicUsize,
    pub workers_left: AtomicUsize,
    /// Streams that have ended: how many messages of each were acknowledged.
    acknowledged: Mutex<Vec<(u64, u64)>>,
    verifiers: Mutex<Vec<Verifier>>,
    failure: Mutex<Option<String>>,
    failed: AtomicBool,
}

impl Flow {
    fn new() -> Flow {
        Flow { messages: AtomicU64::new(0), bytes: AtomicU64::new(0), latency: Mutex::default() }
    }

    pub fn count(&self, messages: u64, bytes: u64) {
        self.messages.fetch_add(messages, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn counts(&self) -> (u64, u64) {
        (self.messages.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }

    /// Takes what was recorded since the last time.
    pub fn take_latency(&self) -> Latency {
        let fresh = Latency::default();
        std::mem::replace(&mut lock(&self.latency), fresh)
    }
}

/// A latency that a connection has seen and not yet handed in.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub intended_ns: u64,
    pub ended_ns: u64,
    pub messages: u32,
}

impl Shared {
    pub fn new(producers: usize, consumers: usize, budget: Option<u64>) -> Shared {
        Shared {
            phase: AtomicU8::new(Phase::Preparing as u8),
            from_ns: AtomicU64::new(u64::MAX),
            until_ns: AtomicU64::new(u64::MAX),
            published: Flow::new(),
            delivered: Flow::new(),
            budget: AtomicU64::new(budget.unwrap_or(u64::MAX)),
            ready: AtomicUsize::new(0),
            producers_left: AtomicUsize::new(producers),
            workers_left: AtomicUsize::new(producers + consumers),
            acknowledged: Mutex::default(),
            verifiers: Mutex::default(),
            failure: Mutex::default(),
            failed: AtomicBool::new(false),
        }
    }

    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Preparing,
            1 => Phase::Running,
            _ => Phase::Stopping,
        }
    }

    pub fn enter(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
    }

    pub fn measure_from(&self, ns: u64) {
        self.from_ns.store(ns, Ordering::Relaxed);
    }

    pub fn measure_until(&self, ns: u64) {
        self.until_ns.store(ns, Ordering::Relaxed);
    }

    /// Hands in what a connection has seen of one direction; empties `seen`.
    pub fn record(&self, flow: &Flow, seen: &mut Vec<Seen>) {
        let (from, until) = (self.from_ns.load(Ordering::Relaxed), self.until_ns.load(Ordering::Relaxed));
        if seen.is_empty() {
            return;
        }
        let mut latency = lock(&flow.latency);
        for seen in seen.drain(..).filter(|seen| (from..until).contains(&seen.intended_ns)) {
            let nanos = seen.ended_ns.saturating_sub(seen.intended_ns);
            latency.record_many(Duration::from_nanos(nanos), u64::from(seen.messages));
        }
    }

    /// Takes `messages` out of the budget; false when it is used up.
    pub fn take_budget(&self, messages: u64) -> bool {
        let take = |left: u64| if left == u64::MAX { Some(left) } else { left.checked_sub(messages) };
        self.budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    pub fn stream_ended(&self, stream: u64, acknowledged: u64) {
        lock(&self.acknowledged).push((stream, acknowledged));
    }

    pub fn acknowledged(&self) -> Vec<(u64, u64)> {
        lock(&self.acknowledged).clone()
    }

    /// A consumer has ended: what it has looked at.
    pub fn looked(&self, verifier: Verifier) {
        lock(&self.verifiers).push(verifier);
    }

    pub fn take_verifiers(&self) -> Vec<Verifier> {
        std::mem::take(&mut lock(&self.verifiers))
    }

    /// The run is over; the first failure is the one that is told.
    pub fn fail(&self, failure: String) {
        lock(&self.failure).get_or_insert(failure);
        self.failed.store(true, Ordering::Release);
        self.enter(Phase::Stopping);
    }

    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }

    /// Waits on an executor until all connections are ready. False when the run failed meanwhile.
    pub async fn started(&self) -> bool {
        self.ready.fetch_add(1, Ordering::AcqRel);
        while self.phase() == Phase::Preparing {
            drava_runtime::time::sleep(Duration::from_millis(1)).await;
        }
        !self.has_failed()
    }
}

// A panic elsewhere ends the process before anybody could see half-written figures.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
