//! Keys of messages, drawn as an application would.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::options::Keys;
use crate::payload::KEY_BYTES;

/// The usual exponent of web and order traffic.
const ZIPF_EXPONENT: f64 = 0.99;

/// Draws keys. The same seed draws the same keys.
#[derive(Debug)]
pub struct KeySource {
    random: SmallRng,
    draw: Draw,
}

#[derive(Debug)]
enum Draw {
    Uniform(u32),
    /// For each key the share of all draws that go to it and those before it, rising to 1.
    Cumulative(Vec<f64>),
}

impl KeySource {
    /// `None` for messages without keys.
    pub fn new(keys: Keys, count: u32, seed: u64) -> Option<KeySource> {
        let draw = match keys {
            Keys::None => return None,
            Keys::Uniform => Draw::Uniform(count),
            Keys::Zipf => Draw::Cumulative(zipf(count)),
        };
        Some(KeySource { random: SmallRng::seed_from_u64(seed), draw })
    }

    pub fn draw(&mut self) -> [u8; KEY_BYTES] {
        let index = match &self.draw {
            Draw::Uniform(count) => self.random.random_range(0..*count),
            Draw::Cumulative(shares) => {
                let point: f64 = self.random.random();
                shares.partition_point(|share| *share < point).min(shares.len() - 1) as u32
            }
        };
        let mut key = *b"k0000000";
        let mut rest = index;
        for digit in key[1..].iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        key
    }
}

fn zipf(count: u32) -> Vec<f64> {
    let mut sum = 0.0;
    let mut shares: Vec<f64> = (1..=count)
        .map(|rank| {
            sum += 1.0 / f64::from(rank).powf(ZIPF_EXPONENT);
            sum
        })
        .collect();
    shares.iter_mut().for_each(|share| *share /= sum);
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn counts(keys: Keys) -> BTreeMap<[u8; KEY_BYTES], u32> {
        let mut source = KeySource::new(keys, 100, 1).unwrap();
        let mut counts = BTreeMap::new();
        (0..100_000).for_each(|_| *counts.entry(source.draw()).or_default() += 1);
        counts
    }

    #[test]
    fn uniform_keys_come_equally_often() {
        let counts = counts(Keys::Uniform);
        assert_eq!(counts.len(), 100);
        assert!(counts.values().all(|count| (800..1200).contains(count)), "{counts:?}");
    }

    #[test]
    fn zipf_keys_come_by_rank() {
        let counts = counts(Keys::Zipf);
        assert!(15_000 < counts[b"k0000000"] && counts[b"k0000099"] < 500, "{counts:?}");
    }

    #[test]
    fn no_keys_are_none() {
        assert!(KeySource::new(Keys::None, 100, 1).is_none());
    }
}
