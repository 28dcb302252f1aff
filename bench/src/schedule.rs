//! When to send, in an open loop: each batch has its time, whether or not the node keeps up.
//!
//! Latency counts from that time. A node that stops for a second so shows the second in every batch that was due in it,
//! and not only in the few that were under way (which is called coordinated omission).

use std::time::Duration;

/// The times of one connection, in ns of one clock.
#[derive(Clone, Debug)]
pub struct Schedule {
    start_ns: u64,
    interval: Interval,
    /// Batches taken.
    taken: u64,
}

/// Nanoseconds from batch to batch; a fraction, so that no rate drifts.
#[derive(Clone, Copy, Debug)]
struct Interval(f64);

impl Schedule {
    /// `batches_per_s` from `start_ns` on, the first at once.
    pub fn new(start_ns: u64, batches_per_s: f64) -> Schedule {
        assert!(0.0 < batches_per_s, "{batches_per_s} batches a second");
        Schedule { start_ns, interval: Interval(1e9 / batches_per_s), taken: 0 }
    }

    /// When the next batch is to be sent.
    pub fn next_ns(&self) -> u64 {
        self.start_ns + (self.taken as f64 * self.interval.0) as u64
    }

    /// Takes the next batch if it is due; returns when it was to be sent, however late that is.
    pub fn take(&mut self, now_ns: u64) -> Option<u64> {
        let next = self.next_ns();
        if now_ns < next {
            return None;
        }
        self.taken += 1;
        Some(next)
    }

    /// How long until the next batch is due.
    pub fn wait(&self, now_ns: u64) -> Duration {
        Duration::from_nanos(self.next_ns().saturating_sub(now_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::latency::Latency;

    const MS: u64 = 1_000_000;

    #[test]
    fn batches_are_due_at_their_times_and_not_before() {
        let mut schedule = Schedule::new(100, 1000.0);
        assert_eq!(schedule.take(99), None);
        assert_eq!(schedule.take(100), Some(100));
        assert_eq!(schedule.take(100), None);
        assert_eq!(schedule.wait(100), Duration::from_millis(1));
        assert_eq!(schedule.take(100 + MS), Some(100 + MS));
    }

    #[test]
    fn a_rate_that_does_not_divide_a_second_does_not_drift() {
        let mut schedule = Schedule::new(0, 3.0);
        let taken = std::iter::from_fn(|| schedule.take(100_000_000_000)).count();
        assert_eq!(taken, 301);
    }

    /// A node answers each batch after 1 ms, and stops for 500 ms once. One batch is due every ms, one is in flight.
    #[test]
    fn a_pause_of_the_node_shows_in_all_batches_that_were_due_in_it() {
        let mut schedule = Schedule::new(0, 1000.0);
        let (mut from_intended, mut from_sent) = (Latency::default(), Latency::default());
        let mut now = 0;
        let mut answered = 0;
        while answered < 1000 {
            let Some(intended) = schedule.take(now) else {
                now = schedule.next_ns();
                continue;
            };
            let sent = now;
            now += if answered == 100 { 500 * MS } else { MS / 2 };
            from_intended.record(Duration::from_nanos(now - intended));
            from_sent.record(Duration::from_nanos(now - sent));
            answered += 1;
        }
        let (open, closed) = (from_intended.quantiles(), from_sent.quantiles());
        assert!(closed.p99_us < 1000.0, "measured from sending, the pause hides: {closed:?}");
        assert!(200_000.0 < open.p50_us.max(open.p90_us), "measured from the intended time, it shows: {open:?}");
        assert!((open.max_us - 500_000.0).abs() < 1000.0, "{open:?}");
    }
}
