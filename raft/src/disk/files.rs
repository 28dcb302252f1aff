//! A disk of plain files. Its calls block the executor for the length of a sync, which only a core that serves no data
//! can afford.
//!
//! `log-<number>` are segments of records, each `[length u32][CRC32C u32][bytes]`; appends go to the last, and a trim
//! removes whole ones. Every open begins a new segment. `snapshot` is the snapshot, `snapshot.new` one being written.

use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, ready};

use super::{MetaDisk, Position, Records};

const RECORD_HEADER_BYTES: usize = 8;

#[derive(Debug)]
pub struct FileDisk {
    dir: PathBuf,
    segment_bytes: u64,
    state: RefCell<Segments>,
}

#[derive(Debug)]
struct Segments {
    /// Numbers of the segments, oldest first; the last is being written.
    numbers: Vec<u64>,
    file: File,
    written: u64,
    replay: Records,
}

impl FileDisk {
    /// Opens a directory, which is made if it is not there. A torn record at the very end is cut off; anything else
    /// that does not fit is an error.
    pub fn open(dir: &Path, segment_bytes: u64) -> io::Result<FileDisk> {
        fs::create_dir_all(dir)?;
        let mut numbers = Vec::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            if let Some(number) = name.to_str().and_then(|name| name.strip_prefix("log-")) {
                let number = u64::from_str_radix(number, 16)
                    .map_err(|_| invalid(format!("{} is no segment of the metadata log", name.display())))?;
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        let mut replay = Vec::new();
        for (place, number) in numbers.iter().enumerate() {
            read_segment(&segment_path(dir, *number), *number, place + 1 == numbers.len(), &mut replay)?;
        }
        let next = numbers.last().map_or(0, |last| last + 1);
        let file = new_segment(dir, next)?;
        numbers.push(next);
        let state = RefCell::new(Segments { numbers, file, written: 0, replay });
        Ok(FileDisk { dir: dir.to_owned(), segment_bytes, state })
    }

    fn append_now(&self, records: &[Vec<u8>]) -> io::Result<Position> {
        let mut state = self.state.borrow_mut();
        let current = *state.numbers.last().expect("there is always one segment");
        if self.segment_bytes <= state.written {
            state.file = new_segment(&self.dir, current + 1)?;
            state.numbers.push(current + 1);
            state.written = 0;
        }
        let number = *state.numbers.last().expect("there is always one segment");
        let position = Position(number, state.written);
        let mut bytes = Vec::new();
        for record in records {
            let length = u32::try_from(record.len()).map_err(|_| invalid("a record of 4 GiB".to_owned()))?;
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(&crc32c::crc32c(record).to_le_bytes());
            bytes.extend_from_slice(record);
        }
        state.file.write_all(&bytes)?;
        state.file.sync_data()?;
        state.written += bytes.len() as u64;
        Ok(position)
    }

    fn trim_now(&self, before: Position) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        while state.numbers[0] < before.0 && 1 < state.numbers.len() {
            fs::remove_file(segment_path(&self.dir, state.numbers[0]))?;
            state.numbers.remove(0);
        }
        Ok(())
    }

    fn save_snapshot_now(&self, bytes: &[u8]) -> io::Result<()> {
        let new = self.dir.join("snapshot.new");
        let mut file = File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, self.dir.join("snapshot"))?;
        File::open(&self.dir)?.sync_all()
    }

    fn load_snapshot_now(&self) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.dir.join("snapshot")) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl MetaDisk for FileDisk {
    fn replay(&self) -> LocalBoxFuture<'_, io::Result<Records>> {
        ready(Ok(std::mem::take(&mut self.state.borrow_mut().replay))).boxed_local()
    }

    fn append(&self, records: Vec<Vec<u8>>) -> LocalBoxFuture<'_, io::Result<Position>> {
        async move { self.append_now(&records) }.boxed_local()
    }

    fn trim(&self, before: Position) -> LocalBoxFuture<'_, io::Result<()>> {
        async move { self.trim_now(before) }.boxed_local()
    }

    fn save_snapshot(&self, file: Vec<u8>) -> LocalBoxFuture<'_, io::Result<()>> {
        async move { self.save_snapshot_now(&file) }.boxed_local()
    }

    fn load_snapshot(&self) -> LocalBoxFuture<'_, io::Result<Option<Vec<u8>>>> {
        async move { self.load_snapshot_now() }.boxed_local()
    }

    fn close(&self) -> LocalBoxFuture<'_, io::Result<()>> {
        ready(Ok(())).boxed_local()
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("log-{number:016x}"))
}

fn new_segment(dir: &Path, number: u64) -> io::Result<File> {
    let file = OpenOptions::new().create_new(true).append(true).open(segment_path(dir, number))?;
    File::open(dir)?.sync_all()?;
    Ok(file)
}

fn read_segment(path: &Path, number: u64, last: bool, records: &mut Records) -> io::Result<()> {
    let bytes = fs::read(path)?;
    let mut at = 0;
    while at < bytes.len() {
        let Some((length, record)) = read_record(&bytes[at..]) else {
            // A torn write is the last that there is: with whole records behind it, it was damaged later.
            if !last || (at + 1..bytes.len()).any(|later| read_record(&bytes[later..]).is_some()) {
                return Err(invalid(format!("{} is damaged at byte {at}", path.display())));
            }
            // An append that never returned. It goes, so that the segment is whole when it is no longer the last.
            let file = OpenOptions::new().write(true).open(path)?;
            file.set_len(at as u64)?;
            return file.sync_all();
        };
        records.push((Position(number, at as u64), record.to_vec()));
        at += length;
    }
    Ok(())
}

fn read_record(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let end = RECORD_HEADER_BYTES.checked_add(number(0)? as usize)?;
    // No record is empty, or zeros would be records.
    let record = bytes.get(RECORD_HEADER_BYTES..end).filter(|record| !record.is_empty())?;
    (number(4)? == crc32c::crc32c(record)).then_some((end, record))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(disk: &FileDisk) -> Vec<Vec<u8>> {
        disk.state.borrow().replay.iter().map(|(_, record)| record.clone()).collect()
    }

    /// Three records in one segment, whose path is returned.
    fn three(dir: &Path) -> PathBuf {
        let disk = FileDisk::open(dir, 1000).unwrap();
        disk.append_now(&[b"one".to_vec(), b"two".to_vec()]).unwrap();
        disk.append_now(&[b"three".to_vec()]).unwrap();
        segment_path(dir, 0)
    }

    #[test]
    fn a_torn_end_is_cut_off_wherever_it_is_torn() {
        for cut in 22..35 {
            let dir = tempfile::tempdir().unwrap();
            let path = three(dir.path());
            OpenOptions::new().write(true).open(path).unwrap().set_len(cut).unwrap();
            let disk = FileDisk::open(dir.path(), 1000).unwrap();
            assert_eq!(records(&disk), [b"one", b"two"], "cut at {cut}");
            disk.append_now(&[b"four".to_vec()]).unwrap();
            let found = records(&FileDisk::open(dir.path(), 1000).unwrap());
            assert_eq!(found, [&b"one"[..], b"two", b"four"]);
        }
    }

    #[test]
    fn damage_before_whole_records_is_an_error() {
        for at in 0..22 {
            let dir = tempfile::tempdir().unwrap();
            let path = three(dir.path());
            let mut bytes = fs::read(&path).unwrap();
            bytes[at] ^= 1;
            fs::write(&path, bytes).unwrap();
            let error = FileDisk::open(dir.path(), 1000).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "byte {at}");
        }
    }

    #[test]
    fn a_trim_removes_whole_segments_below() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::open(dir.path(), 10).unwrap();
        let positions: Vec<Position> =
            (0..5u8).map(|number| disk.append_now(&[vec![number + 1; 10]]).unwrap()).collect();
        assert!(positions.is_sorted_by(|a, b| a < b));
        disk.trim_now(positions[3]).unwrap();
        let found = records(&FileDisk::open(dir.path(), 10).unwrap());
        assert_eq!(found, [vec![4; 10], vec![5; 10]]);
    }
}
