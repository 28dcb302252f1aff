//! A store that is checked without its node.

mod common;

use std::path::Path;

use common::{flip, items, open, run, small};
use drava_protocol::PartitionId;
use drava_storage::dump::ItemKind;
use drava_storage::segment::SegmentId;
use drava_storage::verify::{FindingKind, Verified, verify};
use drava_storage::{GlommioIo, PartitionLimits, RecordLog, RecordLogConfig, StoreConfig};

fn check(dir: &Path) -> Verified {
    let before: Vec<_> = contents(dir);
    let verified = verify(&dir.join("shard"), None, |_| {}).expect("it can be read");
    assert_eq!(contents(dir), before, "nothing is changed");
    verified
}

fn contents(dir: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    common::segment_files(dir).into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

/// Blocks of one batch with two messages, over some segments; the node does not stop in good order.
fn write(dir: &Path, count: u64, bytes: usize) {
    let config = StoreConfig { scrub_bytes_per_s: 0, ..small(dir) };
    run(async {
        let f = open(dir, config).await;
        let slot = f.store.open_partition(PartitionId(7), PartitionLimits::default());
        for seed in 0..count {
            f.append(slot, seed, 2, bytes);
            f.flushed(seed as usize + 1).await;
        }
        f.store.close().await;
    });
}

fn blocks(dir: &Path) -> Vec<(std::path::PathBuf, u64)> {
    items(dir, |kind| matches!(kind, ItemKind::Block(_)))
}

#[test]
fn a_good_store_is_good_and_a_torn_tail_is_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 90, 10_000);
    let verified = check(dir.path());
    assert!(!verified.is_damaged() && verified.torn.is_none(), "{verified:?}");
    assert_eq!(verified.blocks, 90);
    assert!(2 <= verified.segments, "{verified:?}");
    let (path, position) = blocks(dir.path()).last().unwrap().clone();
    flip(&path, position + 70);
    let verified = check(dir.path());
    assert!(!verified.is_damaged(), "{verified:?}");
    assert_eq!(verified.torn.map(|torn| torn.position), Some(position));
}

#[test]
fn damage_is_found_with_the_messages_that_it_costs() {
    // In the block's header: its extent still says what it held. In the payload: the block is good but for a batch.
    for (at, kind) in [(16, FindingKind::Blocks), (64 + 64 + 200, FindingKind::Batches)] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 90, 10_000);
        let (path, position) = blocks(dir.path())[20].clone();
        flip(&path, position + at);
        let verified = check(dir.path());
        assert_eq!(verified.findings.len(), 1, "{verified:?}");
        let finding = &verified.findings[0];
        assert_eq!(finding.kind, kind);
        assert!(finding.positions.contains(&(position + 64)), "{finding:?}");
        assert_eq!(finding.messages.len(), 1, "{finding:?}");
        assert_eq!((finding.messages[0].partition, finding.messages[0].offsets.clone()), (PartitionId(7), 40..42));
        let alone = [drava_storage::segment::parse_name(&path).unwrap()];
        let verified = verify(&dir.path().join("shard"), Some(&alone), |_| {}).unwrap();
        assert_eq!((verified.segments, verified.findings.len()), (1, 1), "{verified:?}");
    }
}

#[test]
fn a_segment_whose_header_is_damaged_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 90, 10_000);
    let (path, _) = blocks(dir.path())[0].clone();
    flip(&path, 9);
    let verified = check(dir.path());
    let id = drava_storage::segment::parse_name(&path).unwrap();
    assert!(
        verified.findings.iter().any(|f| f.kind == FindingKind::Header && SegmentId(f.segment) == id),
        "{verified:?}"
    );
}

#[test]
fn record_logs_are_checked_alike() {
    let dir = tempfile::tempdir().unwrap();
    let log_dir = dir.path().join("shard");
    run(async {
        let io = GlommioIo::new();
        drava_storage::Io::create_dir(&io, &log_dir).await.unwrap();
        let (log, _) = RecordLog::open(io, &log_dir, RecordLogConfig::default()).await.unwrap();
        for record in 0..20u8 {
            log.append(vec![vec![record; 100]]).await.unwrap();
        }
        log.close().await;
    });
    assert!(!check(dir.path()).is_damaged());
    let (path, position) = blocks(dir.path())[5].clone();
    flip(&path, position + 300);
    let verified = check(dir.path());
    assert_eq!(verified.findings.len(), 1, "{verified:?}");
    assert_eq!(verified.findings[0].positions.start, position);
}
