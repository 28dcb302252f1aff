//! Pauses between attempts: exponential, with jitter, so that the clients of a node that comes back do not come back as
//! one.

use std::time::Duration;

use rand::RngExt;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub fn new(min: Duration, max: Duration) -> Backoff {
        Backoff { min, max, next: min }
    }

    /// The next attempt begins as if it were the first.
    pub fn reset(&mut self) {
        self.next = self.min;
    }

    /// How long to wait now: between half and all of a span that doubles up to the maximum.
    pub fn pause(&mut self) -> Duration {
        let span = self.next;
        self.next = (span * 2).min(self.max);
        span.mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_maximum_and_start_over() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(10), ms(35));
        for span in [10, 20, 35, 35] {
            let pause = backoff.pause();
            assert!(ms(span) / 2 <= pause && pause <= ms(span), "{pause:?} of {span} ms");
        }
        backoff.reset();
        assert!(backoff.pause() <= ms(10));
    }
}
