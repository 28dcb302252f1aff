//! Rows about storage: recovery, what is written more than once, compaction and scrubbing beside the load.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Judged, RowError, Running, Suite, Target, cpu_s_per_gib, p50, p99, published_us, rate, settings};
use crate::cpu::process_written_bytes;
use crate::load::{Kind, LoadOptions, Outcome};
use crate::measure::{GIB, MIB};

const HTTP_TIMEOUT: Duration = Duration::from_secs(5);
/// What `recover` and `write-amp` must leave free of the disk.
const SPARE_BYTES: u64 = 8 << 30;
const RECOVER_BYTES: u64 = 20 << 30;
/// Quiet topics whose messages lie between one another.
const QUIET_TOPICS: u32 = 1000;
/// How long compaction may take before its row is given up.
const COMPACTION_PATIENCE: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(200);

const COMPACTED: &str = "drava_store_compacted_bytes_total";
const SCRUBBED: &str = "drava_store_scrubbed_bytes_total";
const FRAGMENTED: &str = "drava_store_fragmented_segments";

/// Options of a node that does nothing in the background.
const QUIET: [&str; 4] = ["--storage-compaction-bytes-per-s", "0", "--storage-scrub-bytes-per-s", "0"];
/// Options of a node that scrubs and compacts all the time, each at the rate of its default.
const BUSY: [&str; 2] = ["--storage-scrub-interval-s", "1"];
/// Compaction looks for work ten seconds after a start. The tail is measured from then on.
const COMPACTING_AFTER_S: f64 = 11.0;
/// A tail is measured so often, in turns with the one it is compared with: a hiccup of the disk decides about each alone.
const TURNS: usize = 5;

impl Suite {
    /// Restart after kill -9, with as much of a journal as the disk has room for.
    pub(super) fn recover(&mut self) -> Result<(), RowError> {
        let wanted = if self.quick { 256 << 20 } else { RECOVER_BYTES };
        let free = free_bytes(self.scratch.path())?;
        let bytes = wanted.min(free.saturating_sub(SPARE_BYTES));
        let mut running = self.start(1)?;
        let messages = Some(bytes / u64::from(super::MESSAGE_BYTES));
        let fill = LoadOptions { messages, retention_bytes: 0, ..self.load(&running) };
        self.drive(Kind::Produce, &fill)?;
        let log = self.log_path();
        running.restart_after_kill(&self.node_bin, 1, &log)?;
        let scale = if bytes == wanted { String::new() } else { format!(" instead of {:.0}", wanted as f64 / GIB) };
        self.judge(Judged {
            id: "recover",
            what: "start to ready after kill -9 at the end of a load, nothing deleted",
            value: running.node.ready_after.as_secs_f64(),
            unit: "s",
            limit: None,
            target: Target::AtMost(2.0),
            note: format!("{:.1} GiB of journal{scale}", bytes as f64 / GIB),
            settings: json!({"bytes": bytes, "shards": 1}),
        });
        Ok(())
    }

    /// What the node writes to the disk for what is published, as the kernel counts it: journal, index, compaction.
    pub(super) fn write_amplification(&mut self) -> Result<(), RowError> {
        let total = if self.quick { 512u64 << 20 } else { 12 << 30 };
        for (id, topics, target) in [("write-amp", 1, 1.1), ("write-amp-1000", QUIET_TOPICS, 2.1)] {
            let running = self.start(1)?;
            // Some of the load is written before it is measured, so that the files are there.
            let pid = running.node.pid();
            let retention_bytes = super::RETENTION_BYTES * 2 / u64::from(topics);
            let all = LoadOptions { topics, retention_bytes, ..self.load(&running) };
            let fill =
                |bytes: u64| LoadOptions { messages: Some(bytes / u64::from(super::MESSAGE_BYTES)), ..all.clone() };
            self.drive(Kind::Produce, &fill(total / 4))?;
            let before = process_written_bytes(pid).map_err(RowError::Process)?;
            let outcome = self.drive(Kind::Produce, &fill(total))?;
            let written = process_written_bytes(pid).map_err(RowError::Process)? - before;
            let compacted = running.metric(COMPACTED)?;
            self.judge(Judged {
                id,
                what: "bytes written to the disk for each byte published, with retention",
                value: written as f64 / total as f64,
                unit: "×",
                limit: None,
                target: Target::AtMost(target),
                note: format!(
                    "{topics} topics, {:.1} GiB published, {:.0} MiB compacted meanwhile; retention {:.0} MiB in all",
                    total as f64 / GIB,
                    compacted / MIB,
                    retention_bytes as f64 * f64::from(topics) / MIB
                ),
                settings: settings(&outcome),
            });
        }
        Ok(())
    }

    /// Catching up with one of many quiet topics, before its messages were brought together and after.
    pub(super) fn defragmentation(&mut self) -> Result<(), RowError> {
        let topics = if self.quick { 100 } else { QUIET_TOPICS };
        let bytes = if self.quick { 64u64 << 20 } else { 2 << 30 };
        let mut running = self.start_with(1, &QUIET)?;
        let messages = Some(bytes / u64::from(super::MESSAGE_BYTES));
        let fill =
            LoadOptions { topics, batch: 1, in_flight: 256, messages, retention_bytes: 0, ..self.load(&running) };
        self.drive(Kind::Produce, &fill)?;
        let log = self.log_path();
        let mut rates = Vec::new();
        let mut compacted = 0.0;
        for options in [&QUIET[..], &[]] {
            // Killed, so that nothing is in memory.
            running.restart_after_kill_with(&self.node_bin, 1, &log, options)?;
            if options.is_empty() {
                compacted = running.wait_for_compaction()?;
                running.restart_after_kill_with(&self.node_bin, 1, &log, &QUIET)?;
            }
            let read = LoadOptions {
                addr: running.node.ports.listen,
                node_pid: Some(running.node.pid()),
                topics: 1,
                consumers: Some(1),
                messages: None,
                // A topic is read in milliseconds: again and again, from the disk each time, so that no hiccup decides.
                repeat: true,
                ..fill.clone()
            };
            let outcome = self.drive(Kind::Consume, &read)?;
            rates.push((rate(&outcome), outcome));
        }
        let (after, outcome) = rates.pop().expect("two were measured");
        let (before, _) = rates.pop().expect("two were measured");
        self.judge(Judged {
            id: "defrag",
            what: "catch-up read of one of many quiet topics from disk, after the fragmentation pass against before",
            value: after / before,
            unit: "×",
            limit: None,
            target: Target::AtLeast(5.0),
            note: format!(
                "{topics} topics, {:.2} GiB in single messages; {before:.1} MiB/s before, {after:.1} after; {:.0} MiB compacted",
                bytes as f64 / GIB,
                compacted / MIB
            ),
            settings: settings(&outcome),
        });
        Ok(())
    }

    /// The tail of publishing latencies while compaction and scrubbing run, against a node without either.
    pub(super) fn background(&mut self) -> Result<(), RowError> {
        let topics = if self.quick { 100 } else { QUIET_TOPICS };
        let bytes = if self.quick { 64u64 << 20 } else { 3 << 30 };
        let rate_msgs = self.publish_batch()?.0.published.map_or(0.0, |published| published.messages_per_s) / 8.0;
        let (mut idle, mut busy, mut worked) = (Vec::new(), Vec::new(), 0.0);
        let mut running = self.start_with(1, &QUIET)?;
        let messages = Some(bytes / u64::from(super::MESSAGE_BYTES));
        let fill = LoadOptions {
            topic: "quiet".to_owned(),
            topics,
            batch: 1,
            in_flight: 256,
            messages,
            retention_bytes: 0,
            ..self.load(&running)
        };
        self.drive(Kind::Produce, &fill)?;
        for turn in 0..2 * self.turns() {
            let is_busy = turn % 2 == 1;
            let log = self.log_path();
            let options = if is_busy { &BUSY[..] } else { &QUIET[..] };
            running.restart_after_kill_with(&self.node_bin, 1, &log, options)?;
            let warm_up = if self.quick { self.load(&running).warm_up } else { COMPACTING_AFTER_S };
            let load = LoadOptions { rate: Some(rate_msgs), in_flight: 1024, warm_up, ..self.load(&running) };
            let outcome = self.drive(Kind::Produce, &load)?;
            if is_busy {
                worked += (running.metric(COMPACTED)? + running.metric(SCRUBBED)?) / self.turns() as f64;
            }
            if is_busy { &mut busy } else { &mut idle }.push(outcome);
        }
        let (idle_us, busy_us) = (p99s(&idle), p99s(&busy));
        let (idle, busy) = (median(idle), median(busy));
        self.judge(Judged {
            id: "background",
            what: "durable publish by the clock, p99, while compaction and scrubbing run; limit: without them",
            value: p99_us(&busy),
            unit: "µs",
            limit: Some(p99_us(&idle)),
            target: Target::TimesLimit(1.5),
            note: format!(
                "{rate_msgs:.0} msg/s; medians of {busy_us} against {idle_us}; p50 {} against {}; {:.0} MiB compacted and scrubbed a run; CPU {:.2} against {:.2} s/GiB",
                p50(&busy),
                p50(&idle),
                worked / MIB,
                cpu_s_per_gib(&busy),
                cpu_s_per_gib(&idle)
            ),
            settings: settings(&busy),
        });
        Ok(())
    }

    fn turns(&self) -> usize {
        if self.quick { 1 } else { TURNS }
    }

    /// The tail of publishing latencies once retention deletes, against before it does.
    pub(super) fn retention(&mut self) -> Result<(), RowError> {
        let rate_msgs = self.publish_batch()?.0.published.map_or(0.0, |published| published.messages_per_s) / 8.0;
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for turn in 0..2 * self.turns() {
            let retention_bytes = if turn % 2 == 0 { 0 } else { super::RETENTION_BYTES };
            let running = self.start(1)?;
            let load = LoadOptions { rate: Some(rate_msgs), in_flight: 1024, retention_bytes, ..self.load(&running) };
            if turn % 2 == 0 { &mut before } else { &mut after }.push(self.drive(Kind::Produce, &load)?);
        }
        let (before_us, after_us) = (p99s(&before), p99s(&after));
        let (before, after) = (median(before), median(after));
        self.judge(Judged {
            id: "retention",
            what: "durable publish by the clock, p99, while retention deletes; limit: with nothing to delete",
            value: p99_us(&after),
            unit: "µs",
            limit: Some(p99_us(&before)),
            target: Target::TimesLimit(1.5),
            note: format!(
                "{rate_msgs:.0} msg/s; medians of {after_us} against {before_us}; p50 {} against {}",
                p50(&after),
                p50(&before),
            ),
            settings: settings(&after),
        });
        Ok(())
    }
}

fn p99_us(outcome: &Outcome) -> f64 {
    published_us(outcome, |latency| latency.p99_us)
}

fn p99s(outcomes: &[Outcome]) -> String {
    outcomes.iter().map(p99).collect::<Vec<_>>().join(", ")
}

/// The run whose p99 is in the middle.
fn median(mut outcomes: Vec<Outcome>) -> Outcome {
    outcomes.sort_by(|a, b| p99_us(a).total_cmp(&p99_us(b)));
    outcomes.swap_remove(outcomes.len() / 2)
}

impl Running {
    /// The sum of a metric over the shards; 0 when the node has no such metric.
    fn metric(&self, name: &str) -> Result<f64, RowError> {
        let text = self.metrics().map_err(RowError::Metrics)?;
        let of_shard = |line: &str| {
            let (found, value) = line.rsplit_once(' ')?;
            let is_it = found.strip_prefix(name)?.chars().next().is_none_or(|next| next == '{');
            is_it.then(|| value.parse::<f64>().ok())?
        };
        Ok(text.lines().filter_map(of_shard).sum())
    }

    fn metrics(&self) -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&self.node.ports.admin, HTTP_TIMEOUT)?;
        stream.set_read_timeout(Some(HTTP_TIMEOUT))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Waits until no segment is fragmented any more; returns the bytes that were copied.
    fn wait_for_compaction(&self) -> Result<f64, RowError> {
        let began = Instant::now();
        loop {
            let compacted = self.metric(COMPACTED)?;
            if 0.0 < compacted && self.metric(FRAGMENTED)? == 0.0 {
                return Ok(compacted);
            }
            if COMPACTION_PATIENCE < began.elapsed() {
                return Err(RowError::Compaction { compacted_mib: compacted / MIB });
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

fn free_bytes(dir: &std::path::Path) -> Result<u64, RowError> {
    let stat = rustix::fs::statvfs(dir).map_err(|error| RowError::Data(error.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
