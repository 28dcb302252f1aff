//! Latencies: recorded in nanoseconds, told in microseconds.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Longer ones are recorded as this long.
const LONGEST: Duration = Duration::from_secs(600);
const SIGNIFICANT_DIGITS: u8 = 3;

/// A histogram of latencies, one count a message.
#[derive(Clone, Debug)]
pub struct Latency(Histogram<u64>);

impl Default for Latency {
    fn default() -> Self {
        let longest = LONGEST.as_nanos() as u64;
        Latency(Histogram::new_with_bounds(1, longest, SIGNIFICANT_DIGITS).expect("the bounds are in range"))
    }
}

impl Latency {
    pub fn record(&mut self, latency: Duration) {
        self.record_many(latency, 1);
    }

    /// Records the messages of one batch: each waited as long as the batch.
    pub fn record_many(&mut self, latency: Duration, messages: u64) {
        self.0.saturating_record_n(latency.as_nanos().min(u64::MAX as u128) as u64, messages);
    }

    pub fn add(&mut self, other: &Latency) {
        self.0.add(&other.0).expect("all histograms have the same bounds");
    }

    pub fn reset(&mut self) {
        self.0.reset();
    }

    pub fn quantiles(&self) -> Quantiles {
        let us = |nanos: u64| nanos as f64 / 1e3;
        let at = |quantile: f64| us(self.0.value_at_quantile(quantile));
        Quantiles {
            count: self.0.len(),
            mean_us: self.0.mean() / 1e3,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p99_9_us: at(0.999),
            p99_99_us: at(0.9999),
            max_us: us(self.0.max()),
        }
    }

    /// Points of the distribution for a chart, denser towards the tail: (quantile, µs).
    pub fn curve(&self) -> Vec<(f64, f64)> {
        let values = self.0.iter_quantiles(4);
        values.map(|value| (value.quantile_iterated_to(), value.value_iterated_to() as f64 / 1e3)).collect()
    }
}

/// What a histogram says, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    pub count: u64,
    pub mean_us: f64,
    pub p50_us: f64,
    pub p90_us: f64,
    pub p99_us: f64,
    pub p99_9_us: f64,
    pub p99_99_us: f64,
    pub max_us: f64,
}

/// A latency as people read it.
pub fn show_us(us: f64) -> String {
    if us < 1e3 {
        format!("{us:.0} µs")
    } else if us < 1e6 {
        format!("{:.2} ms", us / 1e3)
    } else {
        format!("{:.2} s", us / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_counts_each_of_its_messages() {
        let mut latency = Latency::default();
        latency.record_many(Duration::from_micros(100), 99);
        latency.record(Duration::from_millis(10));
        let quantiles = latency.quantiles();
        assert_eq!(quantiles.count, 100);
        assert!((quantiles.p50_us - 100.0).abs() < 1.0, "{quantiles:?}");
        assert!((quantiles.p99_us - 100.0).abs() < 1.0, "{quantiles:?}");
        assert!((quantiles.max_us - 10_000.0).abs() < 10.0, "{quantiles:?}");
    }

    #[test]
    fn longer_than_the_longest_is_kept_as_the_longest() {
        let mut latency = Latency::default();
        latency.record(Duration::from_secs(10_000));
        assert!(LONGEST.as_micros() as f64 <= latency.quantiles().max_us * 1.01);
    }

    #[test]
    fn the_curve_rises() {
        let mut latency = Latency::default();
        (1..1000).for_each(|us| latency.record(Duration::from_micros(us)));
        let curve = latency.curve();
        assert!(curve.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1), "{curve:?}");
        assert_eq!(curve.last().unwrap().0, 1.0);
    }
}
