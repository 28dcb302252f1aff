//! A disk that forgets what it may forget.
//!
//! - A write to a file that was opened durable is there when it returns. One that is under way at a crash leaves any of
//!   its sectors behind, in any combination.
//! - A write to a file that was not opened durable, and one that was under way when only the process died, is seen by
//!   readers and may be lost, sector by sector, until the file is synced.
//! - A name that was made or removed is certain after the directory was synced.
//! - A read may end before what was asked for does.
//! - A sync that fails has dropped what it was to make durable, and the next one knows nothing of it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::random::Random;

/// What is read and written together on the media.
const SECTORS: [usize; 2] = [512, 4096];

#[derive(Debug)]
pub struct Disk {
    names: RefCell<BTreeMap<PathBuf, Rc<FileState>>>,
    /// As of the last sync of their directory.
    durable_names: RefCell<BTreeMap<PathBuf, Rc<FileState>>>,
    pub capacity_bytes: Cell<u64>,
    pub faults: Faults,
    sector_bytes: usize,
}

/// How often what fails, per thousand.
#[derive(Debug, Default)]
pub struct Faults {
    pub write: Cell<u64>,
    pub read: Cell<u64>,
    /// Reads that have less than was asked for, and at least something.
    pub short_read: Cell<u64>,
    pub sync: Cell<u64>,
    pub create: Cell<u64>,
    pub index: Cell<u64>,
    /// Operations that take a thousand times as long.
    pub slow: Cell<u64>,
}

impl Faults {
    pub fn clear(&self) {
        for fault in [&self.write, &self.read, &self.short_read, &self.sync, &self.create, &self.index, &self.slow] {
            fault.set(0);
        }
    }
}

#[derive(Debug, Default)]
pub struct FileState {
    /// What is on the media.
    bytes: RefCell<Vec<u8>>,
    writes: RefCell<Vec<Write>>,
    writes_begun: Cell<u64>,
}

/// A write that the media may not have.
#[derive(Debug)]
struct Write {
    number: u64,
    position: usize,
    data: Vec<u8>,
    /// It returned, or its process is gone: readers see it.
    visible: bool,
}

impl FileState {
    pub fn len(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn resize(&self, bytes: u64) {
        self.bytes.borrow_mut().resize(bytes as usize, 0);
    }

    /// What is durable.
    pub fn media(&self) -> Vec<u8> {
        self.bytes.borrow().clone()
    }

    /// Up to `bytes` from `position`, as readers see them.
    pub fn read(&self, position: u64, bytes: usize) -> Vec<u8> {
        let media = self.bytes.borrow();
        let start = (position as usize).min(media.len());
        let end = (start + bytes).min(media.len());
        let mut out = media[start..end].to_vec();
        for write in self.writes.borrow().iter().filter(|write| write.visible) {
            let from = write.position.max(start);
            let to = (write.position + write.data.len()).min(end);
            if from < to {
                out[from - start..to - start].copy_from_slice(&write.data[from - write.position..to - write.position]);
            }
        }
        out
    }

    /// A write that is under way, by number.
    pub fn begin(&self, position: u64, data: &[u8]) -> u64 {
        let number = self.writes_begun.get();
        self.writes_begun.set(number + 1);
        let data = data.to_vec();
        self.writes.borrow_mut().push(Write { number, position: position as usize, data, visible: false });
        number
    }

    /// The write returned in good order.
    pub fn end(&self, number: u64, durable: bool) {
        let mut writes = self.writes.borrow_mut();
        let Some(index) = writes.iter().position(|write| write.number == number) else { return };
        if durable {
            let write = writes.remove(index);
            self.put(write.position, &write.data);
            cover(&mut writes, write.position, &write.data);
        } else {
            writes[index].visible = true;
        }
    }

    /// The write returned with an error: some of its sectors may be there.
    pub fn end_failed(&self, number: u64, random: &Random, sector_bytes: usize) {
        let mut writes = self.writes.borrow_mut();
        let Some(index) = writes.iter().position(|write| write.number == number) else { return };
        let write = writes.remove(index);
        self.put_some(&write, random, sector_bytes, &mut writes);
    }

    pub fn sync(&self) {
        let mut writes = self.writes.borrow_mut();
        writes.retain(|write| {
            if write.visible {
                self.put(write.position, &write.data);
            }
            !write.visible
        });
    }

    pub fn sync_failed(&self) {
        self.writes.borrow_mut().retain(|write| !write.visible);
    }

    fn put(&self, position: usize, data: &[u8]) {
        let mut media = self.bytes.borrow_mut();
        let end = position + data.len();
        if media.len() < end {
            media.resize(end, 0);
        }
        media[position..end].copy_from_slice(data);
    }

    /// All sectors, none, or some of them.
    fn put_some(&self, write: &Write, random: &Random, sector_bytes: usize, older: &mut [Write]) {
        let kind = random.below(4);
        for (index, sector) in write.data.chunks(sector_bytes).enumerate() {
            let kept = match kind {
                0 => false,
                1 => true,
                _ => random.one_in(2),
            };
            if kept {
                self.put(write.position + index * sector_bytes, sector);
                cover(older, write.position + index * sector_bytes, sector);
            }
        }
    }

    /// The power fails.
    fn lose_power(&self, random: &Random, sector_bytes: usize) {
        for write in self.writes.take() {
            self.put_some(&write, random, sector_bytes, &mut []);
        }
    }

    /// The process dies: what it had under way gets there, or does not, and is not certain in either case.
    fn lose_process(&self, random: &Random, sector_bytes: usize) {
        let mut left = Vec::new();
        for mut write in self.writes.take() {
            if write.visible || random.one_in(3) {
                write.visible = true;
                left.push(write);
            } else if random.one_in(2) {
                let mut cut = write.data.len() / sector_bytes;
                cut = random.below(cut as u64 + 1) as usize * sector_bytes;
                write.data.truncate(cut);
                write.visible = true;
                left.push(write);
            }
        }
        self.writes.replace(left);
    }

    /// Changes what is on the media behind everybody's back.
    pub fn damage(&self, change: impl FnOnce(&mut [u8])) {
        change(&mut self.bytes.borrow_mut());
    }
}

/// What is on the media now is newer than what older writes have there.
fn cover(writes: &mut [Write], position: usize, data: &[u8]) {
    for write in writes.iter_mut().filter(|write| write.visible) {
        let from = write.position.max(position);
        let to = (write.position + write.data.len()).min(position + data.len());
        if from < to {
            write.data[from - write.position..to - write.position]
                .copy_from_slice(&data[from - position..to - position]);
        }
    }
}

impl Disk {
    pub fn new(random: &Random) -> Disk {
        Disk {
            names: RefCell::default(),
            durable_names: RefCell::default(),
            capacity_bytes: Cell::new(u64::MAX),
            faults: Faults::default(),
            sector_bytes: *random.pick(&SECTORS),
        }
    }

    pub fn sector_bytes(&self) -> usize {
        self.sector_bytes
    }

    pub fn used_bytes(&self) -> u64 {
        self.names.borrow().values().map(|file| file.len()).sum()
    }

    pub fn free_bytes(&self) -> u64 {
        self.capacity_bytes.get().saturating_sub(self.used_bytes())
    }

    pub fn file(&self, path: &Path) -> Option<Rc<FileState>> {
        self.names.borrow().get(path).cloned()
    }

    pub fn files(&self) -> Vec<(PathBuf, Rc<FileState>)> {
        self.names.borrow().iter().map(|(path, file)| (path.clone(), file.clone())).collect()
    }

    /// `None`: it exists.
    pub fn create(&self, path: &Path) -> Option<Rc<FileState>> {
        let mut names = self.names.borrow_mut();
        if names.contains_key(path) {
            return None;
        }
        let file = Rc::new(FileState::default());
        names.insert(path.to_owned(), file.clone());
        Some(file)
    }

    pub fn remove(&self, path: &Path) -> bool {
        self.names.borrow_mut().remove(path).is_some()
    }

    /// Somebody deletes it while the node is stopped.
    pub fn delete(&self, path: &Path) {
        self.names.borrow_mut().remove(path);
        self.durable_names.borrow_mut().remove(path);
    }

    pub fn sync_dir(&self, dir: &Path) {
        let names = self.names.borrow();
        let mut durable = self.durable_names.borrow_mut();
        durable.retain(|path, _| path.parent() != Some(dir));
        let inside = names.iter().filter(|(path, _)| path.parent() == Some(dir));
        durable.extend(inside.map(|(path, file)| (path.clone(), file.clone())));
    }

    pub fn lose_process(&self, random: &Random) {
        for file in self.names.borrow().values() {
            file.lose_process(random, self.sector_bytes);
        }
    }

    pub fn lose_power(&self, random: &Random) {
        let mut names = self.names.borrow_mut();
        let durable = self.durable_names.borrow();
        // A name that was not synced may be as it was, or as it is.
        for (path, file) in durable.iter() {
            if !names.contains_key(path) && random.one_in(2) {
                names.insert(path.clone(), file.clone());
            }
        }
        names.retain(|path, _| durable.contains_key(path) || random.one_in(3));
        drop(durable);
        for file in names.values() {
            file.lose_power(random, self.sector_bytes);
        }
        self.durable_names.replace(names.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk_with(random: &Random, data: &[u8]) -> (Disk, Rc<FileState>) {
        let disk = Disk::new(random);
        let file = disk.create(Path::new("d/f")).expect("it is new");
        file.resize(16384);
        disk.sync_dir(Path::new("d"));
        let number = file.begin(0, data);
        file.end(number, true);
        (disk, file)
    }

    #[test]
    fn what_returned_from_a_durable_write_survives_and_what_is_under_way_is_torn() {
        let mut torn = 0;
        for seed in 0..50 {
            let random = Random::new(seed);
            let (disk, file) = disk_with(&random, &[1; 8192]);
            file.begin(8192, &[2; 8192]);
            disk.lose_power(&random);
            assert!(file.read(0, 8192).iter().all(|byte| *byte == 1));
            let sectors: Vec<u8> = file.read(8192, 8192).chunks(disk.sector_bytes()).map(|sector| sector[0]).collect();
            torn += usize::from(sectors.contains(&0) && sectors.contains(&2));
        }
        assert!((1..50).contains(&torn), "{torn} of 50 were torn");
    }

    #[test]
    fn a_process_that_dies_leaves_what_only_a_sync_makes_durable() {
        let lost = |synced: bool| {
            (0..50).filter(move |seed| {
                let random = Random::new(*seed);
                let (disk, file) = disk_with(&random, &[1; 4096]);
                file.begin(0, &[2; 4096]);
                disk.lose_process(&random);
                let seen = file.read(0, 4096);
                if synced {
                    file.sync();
                }
                disk.lose_power(&random);
                seen != file.read(0, 4096)
            })
        };
        assert_eq!(lost(true).count(), 0);
        assert!(0 < lost(false).count());
    }

    #[test]
    fn a_name_is_certain_once_its_directory_was_synced() {
        let there = |synced: bool| {
            (0..50).filter(move |seed| {
                let random = Random::new(*seed);
                let (disk, _) = disk_with(&random, &[1; 4096]);
                disk.create(Path::new("d/g"));
                if synced {
                    disk.sync_dir(Path::new("d"));
                }
                disk.lose_power(&random);
                assert!(disk.file(Path::new("d/f")).is_some());
                disk.file(Path::new("d/g")).is_some()
            })
        };
        assert_eq!(there(true).count(), 50);
        assert!((1..50).contains(&there(false).count()));
    }
}
