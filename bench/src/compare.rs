//! Two results beside each other.

use crate::latency::Quantiles;
use crate::load::Outcome;
use crate::load::outcome::Direction;
use crate::suite::Row;
use crate::suite::row::show;
use crate::table;

/// Smaller differences than this are not worth a word on a machine that others use, too.
const SAME_WITHIN: f64 = 0.03;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Better {
    More,
    Less,
}

type Pick = fn(&Quantiles) -> f64;

/// Two runs, figure by figure.
pub fn outcomes(before: &Outcome, after: &Outcome) -> String {
    let mut lines = Vec::new();
    let directions =
        [("published", &before.published, &after.published), ("delivered", &before.delivered, &after.delivered)];
    for (name, before, after) in directions {
        let (Some(before), Some(after)) = (before, after) else { continue };
        lines.push(Line::new(format!("{name} rate"), "MiB/s", before.mib_per_s, after.mib_per_s, Better::More));
        let per_s = |direction: &Direction| direction.messages_per_s;
        lines.push(Line::new(format!("{name} messages"), "msg/s", per_s(before), per_s(after), Better::More));
        if before.latency.count == 0 || after.latency.count == 0 {
            continue;
        }
        let quantiles: [(&str, Pick); 6] = [
            ("p50", |latency| latency.p50_us),
            ("p90", |latency| latency.p90_us),
            ("p99", |latency| latency.p99_us),
            ("p99.9", |latency| latency.p99_9_us),
            ("p99.99", |latency| latency.p99_99_us),
            ("max", |latency| latency.max_us),
        ];
        for (quantile, pick) in quantiles {
            let name = format!("{name} latency {quantile}");
            lines.push(Line::new(name, "µs", pick(&before.latency), pick(&after.latency), Better::Less));
        }
    }
    if let (Some(before), Some(after)) = (&before.node, &after.node) {
        let cpu =
            Line::new("node CPU".to_owned(), "CPU s/GiB", before.cpu_s_per_gib, after.cpu_s_per_gib, Better::Less);
        let mib = |bytes: u64| bytes as f64 / 1048576.0;
        let memory = (mib(before.peak_rss_bytes), mib(after.peak_rss_bytes));
        lines.extend([cpu, Line::new("node peak memory".to_owned(), "MiB", memory.0, memory.1, Better::Less)]);
    }
    lines.push(Line::new("faults".to_owned(), "", before.faults() as f64, after.faults() as f64, Better::Less));
    let mut text = show_lines(&lines);
    if before.machine.show() != after.machine.show() {
        text.push_str("\nThe two were measured on different machines.");
    }
    text
}

/// Two runs of the suite, row by row.
pub fn rows(before: &[Row], after: &[Row]) -> String {
    let mut lines = Vec::new();
    for row in after {
        let Some(old) = before.iter().find(|old| old.id == row.id) else { continue };
        let (Some(old_value), Some(value)) = (old.value, row.value) else { continue };
        let better = if row.target.starts_with('≤') { Better::Less } else { Better::More };
        lines.push(Line::new(row.id.clone(), &row.unit, old_value, value, better));
        if let (Some(old_ratio), Some(ratio)) = (old.ratio, row.ratio) {
            lines.push(Line::new("  to its limit".to_owned(), "ratio", old_ratio, ratio, better));
        }
    }
    show_lines(&lines)
}

struct Line {
    name: String,
    unit: String,
    before: f64,
    after: f64,
    better: Better,
}

impl Line {
    fn new(name: String, unit: &str, before: f64, after: f64, better: Better) -> Line {
        Line { name, unit: unit.to_owned(), before, after, better }
    }

    fn change(&self) -> String {
        if self.before == 0.0 {
            return if self.after == 0.0 { "same" } else { "new" }.to_owned();
        }
        format!("{:+.1} %", 100.0 * (self.after / self.before - 1.0))
    }

    fn verdict(&self) -> &'static str {
        let (low, high) = (self.before * (1.0 - SAME_WITHIN), self.before * (1.0 + SAME_WITHIN));
        if (low..=high).contains(&self.after) {
            return "";
        }
        if (self.before < self.after) == (self.better == Better::More) { "better" } else { "worse" }
    }
}

fn show_lines(lines: &[Line]) -> String {
    let mut table = table::new(&["", "A", "B", "change", ""]);
    for line in lines {
        let show = |value: f64| if line.unit == "ratio" { format!("{value:.2}") } else { show(value, &line.unit) };
        let values = (show(line.before), show(line.after));
        table.add_row([&line.name, &values.0, &values.1, &line.change(), line.verdict()]);
    }
    table::align_right_from(&mut table, 1);
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_latency_is_better_and_less_throughput_is_worse() {
        let verdict = |better, after| Line::new(String::new(), "", 100.0, after, better).verdict();
        assert_eq!(verdict(Better::Less, 50.0), "better");
        assert_eq!(verdict(Better::More, 50.0), "worse");
        assert_eq!(verdict(Better::More, 150.0), "better");
        assert_eq!(verdict(Better::More, 101.0), "");
        assert_eq!(Line::new(String::new(), "", 0.0, 5.0, Better::Less).verdict(), "worse");
        assert_eq!(Line::new(String::new(), "", 200.0, 100.0, Better::Less).change(), "-50.0 %");
    }
}
