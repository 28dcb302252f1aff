//! The log of the metadata group.

mod common;

use common::run;
use drava_storage::verify::verify;
use drava_storage::{GlommioIo, RecordLog, RecordLogConfig, RecordPosition};

const CONFIG: RecordLogConfig = RecordLogConfig { segment_bytes: 256 << 10, disk_reserve_bytes: 0 };

async fn open(dir: &std::path::Path) -> (RecordLog<GlommioIo>, Vec<(RecordPosition, Vec<u8>)>) {
    RecordLog::open(GlommioIo::new(), dir, CONFIG).await.expect("a log")
}

#[test]
fn appended_records_are_there_after_a_stop() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (log, records) = open(dir.path()).await;
        assert!(records.is_empty());
        assert_eq!(log.append(vec![b"one".to_vec(), Vec::new()]).await.unwrap(), RecordPosition(1));
        assert_eq!(log.append(vec![vec![3; 100_000]]).await.unwrap(), RecordPosition(3));
        assert!(log.append(vec![vec![0; 300_000]]).await.is_err(), "more than a segment");
        log.close().await;
        assert!(log.append(vec![b"late".to_vec()]).await.is_err());
    });
    run(async {
        let (log, records) = open(dir.path()).await;
        let expected = [b"one".to_vec(), Vec::new(), vec![3; 100_000]];
        assert!(records.iter().map(|(position, record)| (position.0, record)).eq((1..).zip(&expected)));
        assert_eq!(log.next_position(), RecordPosition(4));
        log.close().await;
    });
}

#[test]
fn concurrent_appends_share_a_write_and_keep_their_order() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (log, _) = open(dir.path()).await;
        let tasks: Vec<_> = (0..100u64)
            .map(|index| {
                let log = log.clone();
                drava_runtime::spawn(async move { log.append(vec![index.to_le_bytes().to_vec()]).await.unwrap().0 })
            })
            .collect();
        for (index, task) in tasks.into_iter().enumerate() {
            assert_eq!(task.await, Some(index as u64 + 1));
        }
        log.close().await;
    });
    run(async {
        let (log, records) = open(dir.path()).await;
        assert!(records.iter().map(|(_, record)| record.clone()).eq((0..100u64).map(|i| i.to_le_bytes().to_vec())));
        log.close().await;
    });
    let blocks = common_blocks(dir.path());
    assert!(blocks < 20, "{blocks} blocks for 100 appends");
}

fn common_blocks(dir: &std::path::Path) -> usize {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files
        .flat_map(|path| drava_storage::dump::segment(&path).unwrap())
        .filter(|item| matches!(item.as_ref().unwrap().kind, drava_storage::dump::ItemKind::Block(_)))
        .count()
}

#[test]
fn a_trimmed_log_reuses_its_segments_and_never_shows_what_was_trimmed() {
    let dir = tempfile::tempdir().unwrap();
    let mut next = 1;
    let mut start = 1;
    for _ in 0..4 {
        run(async {
            let (log, records) = open(dir.path()).await;
            assert_eq!(records.first().map_or(next, |(position, _)| position.0), start);
            assert!(records.iter().map(|(position, _)| position.0).eq(start..next));
            assert!(records.iter().all(|(position, record)| record[..8] == position.0.to_le_bytes()));
            for _ in 0..60 {
                let mut record = vec![0; 20_000];
                record[..8].copy_from_slice(&next.to_le_bytes());
                assert_eq!(log.append(vec![record]).await.unwrap(), RecordPosition(next));
                next += 1;
                if next % 7 == 0 {
                    start = next - 3;
                    log.trim(RecordPosition(start));
                }
            }
            // The append behind it carries the trim.
            let mut record = vec![0; 8];
            record.copy_from_slice(&next.to_le_bytes());
            log.append(vec![record]).await.unwrap();
            next += 1;
            log.close().await;
        });
        assert!(!verify(dir.path(), None, |_| {}).unwrap().is_damaged());
    }
    let files = std::fs::read_dir(dir.path()).unwrap().count();
    assert!(files <= 5, "{files} segments for what fits into one");
}

#[test]
fn a_log_whose_blocks_lie_in_the_wrong_place_is_refused() {
    for (from, to) in [(4, 1), (2, 1), (1, 3), (4, 0)] {
        let dir = tempfile::tempdir().unwrap();
        run(async {
            let (log, _) = open(dir.path()).await;
            for _ in 0..5 {
                log.append(vec![b"record".to_vec()]).await.unwrap();
            }
            log.close().await;
        });
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.copy_within(4096 * (1 + from)..4096 * (2 + from), 4096 * (1 + to));
        std::fs::write(&path, &bytes).unwrap();
        run(async {
            let opened = RecordLog::open(GlommioIo::new(), dir.path(), CONFIG).await;
            assert!(opened.is_err(), "block {from} also at {to}");
        });
    }
}

#[test]
fn a_log_that_is_too_long_keeps_its_records_and_one_that_was_cut_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (log, _) = open(dir.path()).await;
        log.append(vec![b"record".to_vec()]).await.unwrap();
        log.close().await;
    });
    let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::metadata(&path).unwrap().len();
    let resize = |bytes| std::fs::File::options().write(true).open(&path).unwrap().set_len(bytes).unwrap();
    resize(bytes + 1000);
    run(async {
        let (log, records) = open(dir.path()).await;
        assert_eq!(records.len(), 1);
        log.close().await;
    });
    // What was cut off may have been promised to somebody.
    resize(bytes - 1000);
    run(async {
        let opened = RecordLog::open(GlommioIo::new(), dir.path(), CONFIG).await;
        assert!(opened.is_err_and(|error| error.to_string().contains("damaged")), "a log that was cut");
    });
}

#[test]
fn a_damaged_log_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let (log, _) = open(dir.path()).await;
        for _ in 0..5 {
            log.append(vec![b"record".to_vec()]).await.unwrap();
        }
        log.close().await;
    });
    let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    common::flip(&path, 4096 * 2 + 200);
    run(async {
        let opened = RecordLog::open(GlommioIo::new(), dir.path(), CONFIG).await;
        assert!(opened.is_err_and(|error| error.to_string().contains("damaged")));
    });
}
