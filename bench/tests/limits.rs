//! A quick look at the limits of this machine: every figure is there.

use drava_bench::limits::{self, Limits, LimitsConfig, WRITE_BYTES};
use drava_bench::table;

#[test]
fn a_quick_look_measures_every_limit() {
    // Under the target directory: the system's temporary directory may be no disk.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let limits = limits::run(&LimitsConfig::new(dir.path().to_owned(), true), |_| {}).unwrap();
    let bares = [limits.bare_frames, limits.bare_half, limits.bare_singles];
    let rates = [limits.loopback.mib_per_s, limits.sender.mib_per_s, limits.read_mib_per_s];
    for figure in rates.into_iter().chain(bares.iter().map(|bare| bare.mib_per_s)) {
        assert!(0.0 < figure && figure.is_finite(), "{limits:?}");
    }
    for bare in bares {
        assert!(0 < bare.latency.count && 0.0 < bare.server_cpu_s_per_gib, "{bare:?}");
    }
    for write_bytes in WRITE_BYTES {
        let write = limits.write(write_bytes);
        assert!(0 < write.latency.count && 0.0 < write.depth_4_mib_per_s, "{write:?}");
    }
    assert!(0 < limits.round_trip.count);
    let back: Limits = serde_json::from_str(&serde_json::to_string(&limits).unwrap()).unwrap();
    assert_eq!(back.writes.len(), WRITE_BYTES.len());
    assert!(table::limits(&limits).contains("bare path"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "measured files are removed");
}
