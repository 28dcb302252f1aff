//! The figures of the node for Prometheus, in the OpenMetrics text format.
//!
//! 1. Each scrape asks all shards for their figures and the system for those of the process.
//! 2. [`SHARD_FIGURES`] gives each figure of a shard its name, unit and help; a test holds the table against
//!    [`ShardStats`].
//! 3. `prometheus-client` writes them down.

use std::fmt;

use axum::extract::State;
use axum::http::{HeaderName, header};
use drava_runtime::executor::TickerStats;
use drava_storage::MemoryFigures;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::process::ProcessFigures;
use super::routes::{Shared, local};
use crate::shard::stats::ShardStats;

pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Copy, Debug)]
enum Value {
    Count(u64),
    Seconds(f64),
}

/// A figure that every shard has. The name is without the unit and without the `_total` of counters.
struct ShardFigure {
    name: &'static str,
    unit: Measure,
    kind: Kind,
    help: &'static str,
    value: fn(&ShardStats) -> Value,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Counter,
    Gauge,
}

/// What is counted.
#[derive(Clone, Copy, Debug)]
enum Measure {
    Things,
    Bytes,
    Seconds,
}

impl Kind {
    fn metric_type(self) -> MetricType {
        match self {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
        }
    }
}

impl Measure {
    fn unit(self) -> Option<Unit> {
        match self {
            Measure::Things => None,
            Measure::Bytes => Some(Unit::Bytes),
            Measure::Seconds => Some(Unit::Seconds),
        }
    }
}

const fn counter(name: &'static str, help: &'static str, value: fn(&ShardStats) -> Value) -> ShardFigure {
    ShardFigure { name, unit: Measure::Things, kind: Kind::Counter, help, value }
}

const fn gauge(name: &'static str, help: &'static str, value: fn(&ShardStats) -> Value) -> ShardFigure {
    ShardFigure { name, unit: Measure::Things, kind: Kind::Gauge, help, value }
}

const fn bytes(figure: ShardFigure) -> ShardFigure {
    ShardFigure { unit: Measure::Bytes, ..figure }
}

const fn seconds(figure: ShardFigure) -> ShardFigure {
    ShardFigure { unit: Measure::Seconds, ..figure }
}

use Value::{Count, Seconds};

#[rustfmt::skip]
const SHARD_FIGURES: &[ShardFigure] = &[
    gauge("drava_connections", "Connections that are open.", |s| Count(s.connections)),
    counter("drava_connections_accepted", "Connections accepted.", |s| Count(s.connections_accepted)),
    counter("drava_connections_refused", "Connections refused because there were too many.", |s| Count(s.connections_refused)),
    counter("drava_frames_received", "Frames received.", |s| Count(s.frames_received)),
    counter("drava_frames_malformed", "Frames that were no valid frames.", |s| Count(s.frames_malformed)),
    bytes(counter("drava_received", "Bytes received from clients.", |s| Count(s.bytes_received))),
    bytes(counter("drava_sent", "Bytes sent to clients.", |s| Count(s.bytes_sent))),
    counter("drava_published_batches", "Batches appended.", |s| Count(s.batches_published)),
    counter("drava_published_messages", "Messages appended.", |s| Count(s.messages_published)),
    bytes(counter("drava_published", "Bytes of the batches appended.", |s| Count(s.publish_bytes))),
    counter("drava_publish_duplicates", "Batches that had been appended before.", |s| Count(s.duplicates)),
    counter("drava_publish_errors", "Publishes answered with an error.", |s| Count(s.publish_errors)),
    counter("drava_delivered_batches", "Batches delivered to consumers.", |s| Count(s.batches_delivered)),
    bytes(counter("drava_delivered", "Bytes of the batches delivered to consumers.", |s| Count(s.delivered_bytes))),
    counter("drava_requests_forwarded", "Requests that came to the wrong shard and were passed on.", |s| Count(s.requests_forwarded)),
    gauge("drava_partitions", "Partitions that live on the shard.", |s| Count(s.partitions)),
    gauge("drava_consumers", "Consumers that are attached.", |s| Count(s.consumers)),
    counter("drava_ticker_ticks", "Times the executor's ticker woke.", |s| Count(s.ticker_ticks)),
    counter("drava_ticker_late_ticks", "Times it woke more than a period late: the executor was busy, starved or parked wrongly.", |s| Count(s.ticker_late)),
    seconds(gauge("drava_ticker_latest", "The longest that it ever was late.", |s| Seconds(s.ticker_latest.as_secs_f64()))),
    gauge("drava_shard_read_only", "1 when a write or sync failed and the shard takes no more publishes.", |s| Count(s.read_only.into())),
    counter("drava_store_flushes", "Durable writes of the journal.", |s| Count(s.store.flushes)),
    bytes(counter("drava_store_flushed", "Bytes of those writes.", |s| Count(s.store.flushed_bytes))),
    seconds(counter("drava_store_flush", "Time that those writes took.", |s| Seconds(s.store.flush_micros_total as f64 / 1e6))),
    bytes(gauge("drava_store_staged", "Bytes staged and not yet durable.", |s| Count(s.store.staged_bytes))),
    bytes(gauge("drava_store_cache", "Bytes in the ledger cache.", |s| Count(s.store.cache_bytes))),
    counter("drava_store_cache_hits", "Reads answered from the ledger cache.", |s| Count(s.store.cache_hits)),
    counter("drava_store_cache_misses", "Reads that had to go to the disk.", |s| Count(s.store.cache_misses)),
    bytes(counter("drava_store_disk_read", "Bytes read from the disk.", |s| Count(s.store.disk_read_bytes))),
    gauge("drava_store_segments", "Segment files that hold data.", |s| Count(s.store.segments)),
    gauge("drava_store_spare_segments", "Segment files that are prepared and empty.", |s| Count(s.store.segments_spare)),
    counter("drava_store_segments_recycled", "Segment files used again.", |s| Count(s.store.segments_recycled)),
    bytes(gauge("drava_store_live", "Bytes of live entries.", |s| Count(s.store.live_bytes))),
    bytes(gauge("drava_store_foreign_live", "Bytes of live entries in stores of another number of shards.", |s| Count(s.store.foreign_live_bytes))),
    counter("drava_store_ledgers_deleted", "Ledgers deleted by retention or with their topic.", |s| Count(s.store.ledgers_deleted)),
    counter("drava_store_index_batches", "Write batches applied to the index.", |s| Count(s.store.index_batches)),
    gauge("drava_store_damaged_ranges", "Places and runs of messages that cannot be read any more; /v1/damage lists them.", |s| Count(s.store.damaged_ranges)),
    gauge("drava_store_damaged_messages", "Messages that cannot be read any more.", |s| Count(s.store.damaged_messages)),
    bytes(counter("drava_store_scrubbed", "Bytes read by the scrubber to check what was stored.", |s| Count(s.store.scrubbed_bytes))),
    counter("drava_store_scrub_passes", "Times that the scrubber has checked everything.", |s| Count(s.store.scrub_passes)),
    bytes(counter("drava_store_compacted", "Bytes written to bring live entries together.", |s| Count(s.store.compacted_bytes))),
    counter("drava_store_compactions", "Passes of compaction.", |s| Count(s.store.compactions)),
    bytes(counter("drava_store_compaction_dropped", "Bytes brought together and deleted meanwhile.", |s| Count(s.store.compaction_dropped_bytes))),
    gauge("drava_store_fragmented_segments", "Segments that wait to be brought together, or to be looked at.", |s| Count(s.store.fragmented_segments)),
    counter("drava_store_journal_rolls", "Writes that failed, after which the journal went on in a fresh segment.", |s| Count(s.store.journal_rolls)),
    bytes(gauge("drava_store_memory_limit", "What the store may hold in memory: all parts of drava_store_memory_bytes.", |s| Count(s.store.memory.limit))),
    bytes(gauge("drava_receive_memory", "Memory for receiving that connections and staged entries have.", |s| Count(s.receive_bytes))),
];

/// Value of the label `part`, and its bytes.
type MemoryPart = (&'static str, fn(&MemoryFigures) -> u64);

/// The parts of the store's memory.
const MEMORY_PARTS: [MemoryPart; 9] = [
    ("staged", |memory| memory.staged),
    ("writing", |memory| memory.writing),
    ("cache", |memory| memory.cache),
    ("pinned", |memory| memory.pinned),
    ("fetched", |memory| memory.fetched),
    ("buffers", |memory| memory.buffers),
    ("bookkeeping", |memory| memory.bookkeeping),
    ("index", |memory| memory.index),
    ("compaction", |memory| memory.compaction),
];

/// All that one scrape writes down.
#[derive(Debug)]
struct Scrape {
    shards: Vec<ShardStats>,
    process: ProcessFigures,
    uptime_seconds: f64,
    metadata_version: u64,
    topics: u64,
    ready: bool,
    http_connections: u64,
    http_connections_refused: u64,
    http_requests: u64,
    http_panics: u64,
    /// Of the executor that the control core and the HTTP admin share.
    ticker: TickerStats,
}

/// Metrics for Prometheus
#[utoipa::path(get, path = "/metrics", tag = "node", responses(
    (status = 200, description = "Figures of each shard and of the process, as OpenMetrics text.",
        body = String, content_type = "application/openmetrics-text"),
))]
pub async fn metrics(State(shared): State<Shared>) -> ([(HeaderName, &'static str); 1], String) {
    local(async move {
        let (shards, process) = futures_lite::future::zip(shared.admin.shard_stats(), ProcessFigures::look()).await;
        let image = shared.admin.image();
        let readiness = shared.admin.readiness();
        let scrape = Scrape {
            shards,
            process,
            uptime_seconds: shared.started_at.elapsed().as_secs_f64(),
            metadata_version: image.version,
            topics: image.topics.len() as u64,
            ready: super::health::Ready::from(readiness).ready(),
            http_connections: shared.counters.connections.get(),
            http_connections_refused: shared.counters.connections_refused.get(),
            http_requests: shared.counters.requests.get(),
            http_panics: shared.counters.panics.get(),
            ticker: drava_runtime::executor::ticker_stats(),
        };
        ([(header::CONTENT_TYPE, CONTENT_TYPE)], scrape.text())
    })
    .await
}

impl Scrape {
    /// The figures that the node has once: name, unit, kind, help, value.
    #[rustfmt::skip]
    fn node_figures(&self) -> [(&'static str, Measure, Kind, &'static str, Option<Value>); 18] {
        use Kind::{Counter, Gauge};
        use Measure::{Bytes, Things};
        let process = &self.process;
        [
            ("drava_shards", Things, Gauge, "Shards that gave their figures.", Some(Count(self.shards.len() as u64))),
            ("drava_topics", Things, Gauge, "Topics in the metadata.", Some(Count(self.topics))),
            ("drava_metadata_version", Things, Gauge, "Version of the metadata image.", Some(Count(self.metadata_version))),
            ("drava_ready", Things, Gauge, "1 when the node should be sent work.", Some(Count(self.ready.into()))),
            ("drava_http_connections", Things, Gauge, "Connections of the HTTP admin that are open.", Some(Count(self.http_connections))),
            ("drava_http_connections_refused", Things, Counter, "Connections that the HTTP admin refused because there were too many.", Some(Count(self.http_connections_refused))),
            ("drava_http_requests", Things, Counter, "Requests to the HTTP admin.", Some(Count(self.http_requests))),
            ("drava_http_panics", Things, Counter, "Requests whose handler panicked: bugs.", Some(Count(self.http_panics))),
            ("drava_control_ticker_ticks", Things, Counter, "Times the ticker of the control core's executor woke.", Some(Count(self.ticker.ticks))),
            ("drava_control_ticker_late_ticks", Things, Counter, "Times it woke more than a period late: the executor was busy, starved or parked wrongly.", Some(Count(self.ticker.late))),
            ("drava_control_ticker_latest", Measure::Seconds, Gauge, "The longest that it ever was late.", Some(Seconds(self.ticker.latest.as_secs_f64()))),
            ("drava_uptime", Measure::Seconds, Gauge, "Time since the node began to serve HTTP.", Some(Seconds(self.uptime_seconds))),
            ("process_cpu", Measure::Seconds, Counter, "User and system time of all threads.", Some(Seconds(process.cpu_seconds))),
            ("process_resident_memory", Bytes, Gauge, "Resident memory.", process.resident_bytes.map(Count)),
            ("process_virtual_memory", Bytes, Gauge, "Virtual memory.", process.virtual_bytes.map(Count)),
            ("process_open_fds", Things, Gauge, "Open file descriptors.", process.open_fds.map(Count)),
            ("process_max_fds", Things, Gauge, "Limit of open file descriptors.", process.max_fds.map(Count)),
            ("process_threads", Things, Gauge, "Threads.", process.threads.map(Count)),
        ]
    }

    fn text(self) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut out = String::new();
        text::encode(&mut out, &registry).expect("writing to a string does not fail");
        out
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for figure in SHARD_FIGURES {
            let unit = figure.unit.unit();
            let mut metric =
                encoder.encode_descriptor(figure.name, figure.help, unit.as_ref(), figure.kind.metric_type())?;
            for stats in &self.shards {
                let labels = [("shard", stats.shard)];
                write(metric.encode_family(&labels)?, figure.kind, (figure.value)(stats))?;
            }
        }
        let help = "Memory of the store by part: what readers hold is pinned (left the cache) and fetched (from disk).";
        let mut memory =
            encoder.encode_descriptor("drava_store_memory", help, Some(&Unit::Bytes), MetricType::Gauge)?;
        for stats in &self.shards {
            let shard = stats.shard.to_string();
            for (part, value) in MEMORY_PARTS {
                let labels = [("shard", shard.as_str()), ("part", part)];
                write(memory.encode_family(&labels)?, Kind::Gauge, Count(value(&stats.store.memory)))?;
            }
        }
        for (name, unit, kind, help, value) in self.node_figures() {
            if let Some(value) = value {
                let unit = unit.unit();
                write(encoder.encode_descriptor(name, help, unit.as_ref(), kind.metric_type())?, kind, value)?;
            }
        }
        let labels = [("version", env!("CARGO_PKG_VERSION")), ("arch", std::env::consts::ARCH)];
        encoder.encode_descriptor("drava_build", "What runs here.", None, MetricType::Info)?.encode_info(&labels)
    }
}

fn write(metric: MetricEncoder<'_>, kind: Kind, value: Value) -> fmt::Result {
    match (kind, value) {
        (Kind::Counter, Count(count)) => ConstCounter::new(count).encode(metric),
        (Kind::Counter, Seconds(seconds)) => ConstCounter::new(seconds).encode(metric),
        (Kind::Gauge, Count(count)) => ConstGauge::new(count).encode(metric),
        (Kind::Gauge, Seconds(seconds)) => ConstGauge::new(seconds).encode(metric),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use drava_storage::StoreFigures;

    use super::*;

    /// Every figure has another value here; a new field of either struct does not compile until it has one, too.
    fn distinct() -> ShardStats {
        ShardStats {
            shard: 9,
            connections: 1001,
            connections_accepted: 1002,
            connections_refused: 1003,
            frames_received: 1004,
            frames_malformed: 1005,
            bytes_received: 1006,
            bytes_sent: 1007,
            batches_published: 1008,
            messages_published: 1009,
            publish_bytes: 1010,
            duplicates: 1011,
            publish_errors: 1012,
            batches_delivered: 1013,
            delivered_bytes: 1014,
            requests_forwarded: 1015,
            partitions: 1016,
            consumers: 1017,
            ticker_ticks: 1018,
            ticker_late: 1019,
            ticker_latest: Duration::from_secs(1020),
            store: StoreFigures {
                flushes: 1021,
                flushed_bytes: 1022,
                flush_micros_total: 1_023_000_000,
                staged_bytes: 1024,
                cache_bytes: 1025,
                cache_hits: 1026,
                cache_misses: 1027,
                disk_read_bytes: 1028,
                segments: 1029,
                segments_spare: 1030,
                segments_recycled: 1031,
                live_bytes: 1032,
                ledgers_deleted: 1033,
                index_batches: 1034,
                // Exported as the shard's.
                read_only: true,
                // Its parts are exported with a label each.
                memory: MemoryFigures {
                    staged: 2001,
                    writing: 2002,
                    cache: 2003,
                    pinned: 2004,
                    fetched: 2005,
                    buffers: 2006,
                    bookkeeping: 2007,
                    index: 2008,
                    compaction: 2009,
                    limit: 1035,
                },
                damaged_ranges: 1037,
                damaged_messages: 1038,
                scrubbed_bytes: 1039,
                scrub_passes: 1040,
                compacted_bytes: 1041,
                compactions: 1042,
                compaction_dropped_bytes: 1043,
                fragmented_segments: 1044,
                journal_rolls: 1045,
                foreign_live_bytes: 1046,
            },
            read_only: true,
            receive_bytes: 1036,
        }
    }

    #[test]
    fn every_figure_of_a_shard_is_exported_once() {
        let stats = distinct();
        let mut values: Vec<u64> = SHARD_FIGURES
            .iter()
            .map(|figure| match (figure.value)(&stats) {
                Count(count) => count,
                Seconds(seconds) => seconds as u64,
            })
            .collect();
        values.sort_unstable();
        let expected: Vec<u64> = [1].into_iter().chain(1001..=1046).collect();
        assert_eq!(values, expected);
    }

    #[test]
    fn names_follow_the_conventions_and_are_unique() {
        let node = Scrape {
            shards: Vec::new(),
            process: ProcessFigures::default(),
            uptime_seconds: 0.0,
            metadata_version: 0,
            topics: 0,
            ready: true,
            http_connections: 0,
            http_connections_refused: 0,
            http_requests: 0,
            http_panics: 0,
            ticker: TickerStats::default(),
        };
        let mut names: Vec<&str> = SHARD_FIGURES.iter().map(|figure| figure.name).collect();
        names.extend(node.node_figures().iter().map(|(name, ..)| *name));
        for name in &names {
            assert!(name.starts_with("drava_") || name.starts_with("process_"), "{name}");
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
            // Units and the suffix of counters are added when it is written.
            assert!(!["_total", "_bytes", "_seconds"].iter().any(|suffix| name.ends_with(suffix)), "{name}");
        }
        // A gauge and a counter may share a name only when their units tell them apart.
        let mut written: Vec<String> = SHARD_FIGURES
            .iter()
            .map(|figure| format!("{}{:?}", figure.name, figure.unit))
            .chain(node.node_figures().iter().map(|(name, unit, ..)| format!("{name}{unit:?}")))
            .collect();
        let count = written.len();
        written.sort_unstable();
        written.dedup();
        assert_eq!(written.len(), count);
    }

    #[test]
    fn what_is_known_is_written_and_what_is_not_is_left_out() {
        let scrape = Scrape {
            shards: vec![distinct()],
            process: ProcessFigures::default(),
            uptime_seconds: 1.5,
            metadata_version: 3,
            topics: 2,
            ready: false,
            http_connections: 1,
            http_connections_refused: 0,
            http_requests: 4,
            http_panics: 0,
            ticker: TickerStats { ticks: 5, late: 6, latest: Duration::from_secs(7) },
        };
        let scrape_memory = distinct().store.memory;
        let text = scrape.text();
        assert!(text.contains("drava_ticker_latest_seconds{shard=\"9\"} 1020.0\n"), "{text}");
        assert!(text.contains("drava_store_flush_seconds_total{shard=\"9\"} 1023.0\n"), "{text}");
        assert!(text.contains("drava_sent_bytes_total{shard=\"9\"} 1007\n"), "{text}");
        assert!(text.contains("drava_store_memory_bytes{shard=\"9\",part=\"pinned\"} 2004\n"), "{text}");
        let parts: u64 = MEMORY_PARTS.iter().map(|(_, value)| value(&scrape_memory)).sum();
        assert_eq!(parts, scrape_memory.total(), "every part is exported");
        assert!(text.contains("drava_control_ticker_ticks_total 5\n"), "{text}");
        assert!(text.contains("drava_control_ticker_late_ticks_total 6\n"), "{text}");
        assert!(text.contains("drava_control_ticker_latest_seconds 7.0\n"), "{text}");
        assert!(!text.contains("shard=\"0\""), "{text}");
        assert!(!text.contains("process_open_fds"), "what could not be read is left out: {text}");
    }
}
