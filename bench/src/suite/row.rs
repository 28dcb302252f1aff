//! One line of the suite's result.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::latency::show_us;
use crate::machine::Machine;

/// A figure beside its limit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub id: String,
    pub what: String,
    pub value: Option<f64>,
    pub unit: String,
    /// What the machine can do in the same shape, in the same unit.
    pub limit: Option<f64>,
    /// `value` as a part of `limit`.
    pub ratio: Option<f64>,
    pub target: String,
    /// `None`: there is no target, or the row could not be measured.
    pub met: Option<bool>,
    pub note: String,
    /// How the load was made.
    pub settings: Value,
    pub machine: Machine,
    pub commit: String,
}

/// What a figure has to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// At least this part of the limit.
    PartOfLimit(f64),
    /// At most this many times the limit.
    TimesLimit(f64),
    /// At most this much, in the row's unit.
    AtMost(f64),
    /// At least this much, in the row's unit.
    AtLeast(f64),
    /// Only told.
    None,
}

impl Target {
    pub fn is_met(self, value: f64, limit: Option<f64>) -> Option<bool> {
        match self {
            Target::PartOfLimit(part) => limit.map(|limit| part * limit <= value),
            Target::TimesLimit(times) => limit.map(|limit| value <= times * limit),
            Target::AtMost(most) => Some(value <= most),
            Target::AtLeast(least) => Some(least <= value),
            Target::None => None,
        }
    }

    pub fn show(self, unit: &str) -> String {
        match self {
            Target::PartOfLimit(part) => format!("≥ {part} of the limit"),
            Target::TimesLimit(times) => format!("≤ {times} × the limit"),
            Target::AtMost(most) => format!("≤ {}", show(most, unit)),
            Target::AtLeast(least) => format!("≥ {}", show(least, unit)),
            Target::None => "–".to_owned(),
        }
    }
}

impl Row {
    pub fn show_value(&self) -> String {
        self.value.map_or("–".to_owned(), |value| show(value, &self.unit))
    }

    pub fn show_limit(&self) -> String {
        self.limit.map_or("–".to_owned(), |limit| show(limit, &self.unit))
    }
}

/// A figure with its unit as people read it.
pub fn show(value: f64, unit: &str) -> String {
    match unit {
        "µs" => show_us(value),
        "s" if value < 1.0 => format!("{:.0} ms", value * 1e3),
        "msg/s" if 1e6 <= value => format!("{:.2} M msg/s", value / 1e6),
        "msg/s" => format!("{:.0} k msg/s", value / 1e3),
        "CPU s/GiB" | "s" | "×" => format!("{value:.2} {unit}"),
        _ => format!("{value:.0} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_look_at_the_right_side_of_their_limit() {
        assert_eq!(Target::PartOfLimit(0.8).is_met(80.0, Some(100.0)), Some(true));
        assert_eq!(Target::PartOfLimit(0.8).is_met(79.0, Some(100.0)), Some(false));
        assert_eq!(Target::TimesLimit(1.4).is_met(1.4, Some(1.0)), Some(true));
        assert_eq!(Target::TimesLimit(1.4).is_met(1.5, Some(1.0)), Some(false));
        assert_eq!(Target::AtMost(64.0).is_met(64.5, None), Some(false));
        assert_eq!(Target::AtLeast(5.0).is_met(4.9, None), Some(false));
        assert_eq!(Target::None.is_met(1.0, Some(1.0)), None);
        assert_eq!(Target::PartOfLimit(0.8).is_met(80.0, None), None);
    }

    #[test]
    fn figures_are_shown_in_their_unit() {
        assert_eq!(show(1_234_567.0, "msg/s"), "1.23 M msg/s");
        assert_eq!(show(0.25, "s"), "250 ms");
        assert_eq!(show(0.384, "CPU s/GiB"), "0.38 CPU s/GiB");
        assert_eq!(show(1.062, "×"), "1.06 ×");
        assert_eq!(show(1234.5, "µs"), "1.23 ms");
        assert_eq!(show(2048.4, "MiB/s"), "2048 MiB/s");
    }
}
