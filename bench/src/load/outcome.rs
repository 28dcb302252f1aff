//! What a run leaves behind, as JSON and for the reports.

use serde::{Deserialize, Serialize};

use super::options::{Kind, LoadOptions};
use crate::latency::Quantiles;
use crate::machine::Machine;
use crate::verify::Findings;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub kind: Kind,
    pub options: LoadOptions,
    pub machine: Machine,
    /// Of the measured stretch.
    pub elapsed_s: f64,
    pub published: Option<Direction>,
    pub delivered: Option<Direction>,
    pub node: Option<NodeUse>,
    /// CPU seconds of the load generator's cores in the measured stretch.
    pub client_cpu_s: f64,
    /// `None` when nothing was looked at.
    pub verification: Option<Findings>,
    pub samples: Vec<Sample>,
}

/// Messages that went one way in the measured stretch. Bytes are those of the payloads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Direction {
    pub messages: u64,
    pub bytes: u64,
    pub messages_per_s: f64,
    pub mib_per_s: f64,
    /// Of each message. Published: from the intended time of sending to the acknowledgement. Delivered: from the
    /// intended time of sending to delivery.
    pub latency: Quantiles,
    /// Points of the latencies' distribution: (quantile, µs).
    pub curve: Vec<(f64, f64)>,
}

/// What the node's process used.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeUse {
    pub cpu_s: f64,
    /// Per GiB published, or delivered where nothing was published.
    pub cpu_s_per_gib: f64,
    pub cpu_s_per_million: f64,
    pub peak_rss_bytes: u64,
}

/// One interval of the measured stretch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// End of the interval, from the start of the stretch.
    pub at_s: f64,
    pub published_mib_per_s: f64,
    pub delivered_mib_per_s: f64,
    pub publish_p50_us: f64,
    pub publish_p99_us: f64,
    pub delivery_p50_us: f64,
    pub delivery_p99_us: f64,
}

impl Outcome {
    /// The direction that the run is about.
    pub fn main_direction(&self) -> Option<&Direction> {
        match self.kind {
            Kind::Produce | Kind::Mixed => self.published.as_ref(),
            Kind::Consume | Kind::Tail => self.delivered.as_ref(),
        }
    }

    pub fn faults(&self) -> u64 {
        self.verification.as_ref().map_or(0, Findings::faults)
    }
}
