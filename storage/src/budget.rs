//! What background work may take from the disk: bytes per second, with a burst.

use std::cell::Cell;
use std::time::Duration;

use crate::io::Io;

/// Belongs to one executor; tasks that share it share the rate.
#[derive(Debug)]
pub struct Budget {
    bytes_per_s: u64,
    /// The time in which the burst is earned.
    burst: Duration,
    /// When all that was taken so far is paid for.
    paid_at: Cell<Duration>,
}

impl Budget {
    /// `bytes_per_s` 0: the work is off.
    pub fn new(bytes_per_s: u64, burst_bytes: u64) -> Budget {
        Budget { bytes_per_s, burst: time_of(burst_bytes, bytes_per_s), paid_at: Cell::default() }
    }

    pub fn is_off(&self) -> bool {
        self.bytes_per_s == 0
    }

    /// Takes `bytes` and returns when the rate allows them. More than the burst is fine: it takes longer.
    pub async fn take<I: Io>(&self, io: &I, bytes: u64) {
        assert!(!self.is_off(), "{bytes} bytes are taken from a budget that is off");
        let now = io.now();
        // What was not taken in time is kept up to the burst.
        let from = self.paid_at.get().max(now.saturating_sub(self.burst));
        let paid_at = from + time_of(bytes, self.bytes_per_s);
        self.paid_at.set(paid_at);
        if now < paid_at {
            io.sleep(paid_at - now).await;
        }
    }
}

fn time_of(bytes: u64, bytes_per_s: u64) -> Duration {
    if bytes_per_s == 0 {
        return Duration::ZERO;
    }
    let nanos = bytes as u128 * 1_000_000_000 / bytes_per_s as u128;
    Duration::from_nanos(nanos.min(u64::MAX as u128) as u64)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use drava_runtime::{Executor, ExecutorConfig};

    use super::*;
    use crate::GlommioIo;

    #[test]
    fn a_burst_is_free_and_what_is_beyond_it_takes_its_time() {
        Executor::run(ExecutorConfig::new("budget", None), async {
            let io = GlommioIo::new();
            let budget = Budget::new(1 << 20, 64 << 10);
            // A new clock stands at zero: the burst is earned first.
            io.sleep(Duration::from_millis(80)).await;
            let started = Instant::now();
            budget.take(&io, 64 << 10).await;
            assert!(started.elapsed() < Duration::from_millis(50), "{:?}", started.elapsed());
            for _ in 0..4 {
                budget.take(&io, 32 << 10).await;
            }
            assert!(Duration::from_millis(100) < started.elapsed(), "128 KiB at 1 MiB/s: {:?}", started.elapsed());
            assert!(!budget.is_off() && Budget::new(0, 1).is_off());
        })
        .unwrap();
    }
}
