//! Limits measured again right beside a row: some minutes after the first time the machine is not the same.

use crate::limits::bare::{self, Shape};
use crate::limits::{Bare, LimitsConfig, LimitsError, Transfer, disk, loopback};
use crate::suite::{RowError, Suite};

/// What a row is judged by, with the CPU that it takes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Limit {
    pub(super) value: f64,
    pub(super) cpu_s_per_gib: f64,
}

impl Limit {
    fn mean(self, other: Limit) -> Limit {
        let mean = |a: f64, b: f64| (a + b) / 2.0;
        Limit { value: mean(self.value, other.value), cpu_s_per_gib: mean(self.cpu_s_per_gib, other.cpu_s_per_gib) }
    }
}

impl Suite {
    /// Runs `row` between two measurements of its limit, and gives their mean with what came of it.
    pub(super) fn beside<T>(
        &mut self,
        limit: fn(&mut Suite) -> Result<Limit, LimitsError>,
        row: impl FnOnce(&mut Suite) -> Result<T, RowError>,
    ) -> Result<(T, Limit), RowError> {
        let before = limit(self)?;
        let outcome = row(self)?;
        Ok((outcome, before.mean(limit(self)?)))
    }

    /// The bare path in frames of 64 KiB; MiB/s.
    pub(super) fn bare_frames(&mut self) -> Result<Limit, LimitsError> {
        let bare = self.bare(&bare::FRAMES, self.limits.bare_frames.writes_in_flight)?;
        Ok(Limit { value: bare.mib_per_s, cpu_s_per_gib: bare.server_cpu_s_per_gib })
    }

    /// The bare path in single messages of 1 KiB; messages/s.
    pub(super) fn bare_singles(&mut self) -> Result<Limit, LimitsError> {
        let bare = self.bare(&bare::SINGLES, self.limits.bare_singles.writes_in_flight)?;
        Ok(Limit { value: bare.frames_per_s, cpu_s_per_gib: bare.server_cpu_s_per_gib })
    }

    /// A sender from memory; MiB/s.
    pub(super) fn sender(&mut self) -> Result<Limit, LimitsError> {
        let Transfer { mib_per_s, sender_cpu_s_per_gib, .. } = loopback::sender(self.config().stretch)?;
        Ok(Limit { value: mib_per_s, cpu_s_per_gib: sender_cpu_s_per_gib })
    }

    /// One durable write of 4 KiB and a round trip, p50 in µs.
    pub(super) fn one_in_flight(&mut self) -> Result<Limit, LimitsError> {
        let LimitsConfig { stretch, segment_bytes, .. } = self.config();
        let segment = self.segment()?;
        let write = disk::durable_writes(&segment, segment_bytes, 4 << 10, stretch)?;
        let round_trip = loopback::round_trip(stretch)?;
        Ok(Limit { value: write.latency.p50_us + round_trip.p50_us, cpu_s_per_gib: 0.0 })
    }

    fn bare(&mut self, shape: &Shape, writes_in_flight: usize) -> Result<Bare, LimitsError> {
        let LimitsConfig { stretch, segment_bytes, .. } = self.config();
        let segment = self.segment()?;
        bare::run(&segment, segment_bytes, shape, writes_in_flight, stretch)
    }

    fn config(&self) -> LimitsConfig {
        LimitsConfig::new(self.scratch.path().to_owned(), self.quick)
    }

    /// The file that the limits write over.
    fn segment(&self) -> Result<std::path::PathBuf, LimitsError> {
        let path = self.scratch.path().join("segment");
        if !path.exists() {
            disk::prepare(&path, self.config().segment_bytes)?;
        }
        Ok(path)
    }
}
