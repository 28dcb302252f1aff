//! kill -9 under load, again and again: nothing acknowledged is lost, nothing is stored twice, no offset is used again.

use std::path::Path;
use std::time::{Duration, Instant};

use super::node::{Node, NodeError};
use crate::witness::{self, Findings, Witness, WitnessError};

const TOPIC: &str = "kill";
const SHARDS: u16 = 2;
/// Messages that must be acknowledged in a round before its kill.
pub const ACKS_MIN: u64 = 200;
const ACKS_PATIENCE: Duration = Duration::from_secs(60);
/// Small segments and index flushes: every round crosses segments, and replays start in different places.
const OPTIONS: [&str; 10] = [
    "--cores",
    "none",
    "--storage-segment-bytes",
    "8MiB",
    "--storage-disk-reserve-bytes",
    "0",
    "--storage-index-flush-bytes",
    "16MiB",
    "--log-level",
    "warn",
];

#[derive(Debug, thiserror::Error)]
pub enum KillError {
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error("round {round}")]
    Witness {
        round: u64,
        #[source]
        source: WitnessError,
    },
    #[error("round {round}: only {messages} messages were acknowledged within {ACKS_PATIENCE:?}")]
    Slow { round: u64, messages: u64 },
}

/// What was left after the last round.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub rounds: u64,
    pub findings: Findings,
    /// Batches that were answered as duplicates after a kill: stored before it and not answered.
    pub duplicates: u64,
    /// The longest start after a kill.
    pub slowest_start: Duration,
}

impl Outcome {
    pub fn show(&self) -> String {
        let Findings { acked, lost, doubled, reused_offsets, out_of_order, changed, gaps, .. } = &self.findings;
        format!(
            "{} rounds of kill -9, {acked} acknowledged messages checked: {lost} lost, {doubled} doubled, {reused_offsets} \
             offsets reused, {out_of_order} out of order, {changed} changed, {gaps} gaps; {} batches answered as duplicates; \
             slowest start {} ms",
            self.rounds,
            self.duplicates,
            self.slowest_start.as_millis()
        )
    }
}

/// Runs the node `bin` on `data_dir`, and kills it under load `rounds` times. Then reads all that it has.
pub fn run(bin: &Path, data_dir: &Path, log: &Path, rounds: u64) -> Result<Outcome, KillError> {
    let mut witness = Witness::new(TOPIC);
    let mut slowest_start = Duration::ZERO;
    for round in 0..rounds {
        let mut node = Node::start(bin, data_dir, SHARDS, &OPTIONS, log)?;
        slowest_start = slowest_start.max(node.ready_after);
        let before = witness.acks().messages();
        let killed = witness.publish_while(node.ports.listen, |acks| {
            let began = Instant::now();
            // Load first, then the kill, at a moment that differs from round to round.
            while acks.messages() < before + ACKS_MIN {
                if ACKS_PATIENCE < began.elapsed() {
                    return Err(KillError::Slow { round, messages: acks.messages() - before });
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(20 + round * 29 % 170));
            Ok(node.kill()?)
        });
        killed.map_err(|source| KillError::Witness { round, source })??;
    }
    let node = Node::start(bin, data_dir, SHARDS, &OPTIONS, log)?;
    let findings = witness::check(node.ports.listen, TOPIC, &witness.acks().told());
    let findings = findings.map_err(|source| KillError::Witness { round: rounds, source })?;
    Ok(Outcome { rounds, findings, duplicates: witness.acks().duplicates(), slowest_start })
}
