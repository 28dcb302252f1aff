//! The figures that a shard keeps of itself. Counters only grow while the node runs; gauges say so.

use std::time::Duration;

use drava_storage::StoreFigures;

/// A copy of all figures of one shard at one moment. The HTTP admin turns them into Prometheus metrics.
#[derive(Clone, Debug, Default)]
pub struct ShardStats {
    pub shard: u16,
    /// Gauge.
    pub connections: u64,
    pub connections_accepted: u64,
    pub connections_refused: u64,
    pub frames_received: u64,
    pub frames_malformed: u64,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub batches_published: u64,
    pub messages_published: u64,
    pub publish_bytes: u64,
    pub duplicates: u64,
    pub publish_errors: u64,
    pub batches_delivered: u64,
    pub delivered_bytes: u64,
    pub requests_forwarded: u64,
    /// Gauge.
    pub partitions: u64,
    /// Gauge.
    pub consumers: u64,
    pub ticker_ticks: u64,
    pub ticker_late: u64,
    pub ticker_latest: Duration,
    pub store: StoreFigures,
    /// The shard takes no more publishes: a write or sync failed, as the shard or its store found. Gauge.
    pub read_only: bool,
    /// Memory for receiving that connections and staged entries have. Gauge.
    pub receive_bytes: u64,
}
