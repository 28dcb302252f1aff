//! The data directory: who may use it, and whose it is.
//!
//! ```text
//! lock          held with flock by the node that runs on the directory; holds its pid
//! format.json   format version, node, incarnation, layout
//! ports.json    the ports of the node that runs, or ran last
//! meta/         log, vote and snapshots of the metadata group
//! shard-000/    segments of the journal of store 0
//! index/        RocksDB, one column family a store
//! ```
//!
//! Opening it is: make it, lock it, compare or make `format.json`. Nothing else is touched before that holds.
//!
//! The **layout** says which store belongs to which shard. A store has a number that is never used again; a node that
//! starts with another number of shards gets new stores, and the old ones are read until they are empty ("draining").
//! `format.json` is the one place that decides: it is replaced as a whole, and a directory or a family of the index that
//! it does not name is left over from a start that was cut short. Such a directory holds a file `undecided`; without one it
//! is not removed, for whoever puts back an old `format.json` must not lose messages by it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use drava_storage::StoreId;
use serde::{Deserialize, Serialize};

use crate::config::NodeConfig;

use super::ports::Ports;

/// The format that this node writes. It reads 1, too, which named a number of shards instead of a layout.
pub const FORMAT: u32 = 2;

const STORE_PREFIX: &str = "shard-";
const LOCK_FILE: &str = "lock";
const FORMAT_FILE: &str = "format.json";
/// In the directory of a store for which `format.json` has not decided yet.
const UNDECIDED_FILE: &str = "undecided";
const PORTS_FILE: &str = "ports.json";
/// Bytes of the files that are read whole; larger ones are not ours.
const SMALL_FILE_BYTES_MAX: u64 = 64 * 1024;

/// What `format.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Format {
    pub format: u32,
    pub node: u64,
    /// 128 random bits in hex, minted with the directory: a node that lost its disk is another one.
    pub incarnation: String,
    #[serde(flatten)]
    pub layout: Layout,
}

/// The stores of the directory, by number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// By shard.
    pub stores: Vec<u16>,
    /// Written by no shard any more, and read while they hold messages.
    pub draining: Vec<u16>,
    /// Stores from here on were never used.
    pub next_store: u16,
}

/// What format 1 said.
#[derive(Deserialize)]
struct FormatOne {
    node: u64,
    incarnation: String,
    shards: u16,
}

/// A locked data directory. The lock ends with this value, or with the process.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    format: Format,
    made: bool,
    _lock: File,
}

#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("the data directory {} is in use by the node with pid {}; stop it, or give this one a data_dir of its own", dir.display(), pid.map_or("(unknown)".to_owned(), |pid| pid.to_string()))]
    InUse { dir: PathBuf, pid: Option<u32> },
    #[error("{} holds files and no {FORMAT_FILE}: it is no data directory; give data_dir an empty or a new one", dir.display())]
    Foreign { dir: PathBuf },
    #[error("the data directory {} has format {found}; this node reads 1 to {FORMAT}; use the release that made it", dir.display())]
    OtherFormat { dir: PathBuf, found: u64 },
    #[error("the data directory {} belongs to node {found}; this is node {configured}; set node_id or data_dir", dir.display())]
    OtherNode { dir: PathBuf, found: u64, configured: u64 },
    #[error("the data directory {} has used up the numbers for stores; it cannot be given another number of shards again", dir.display())]
    NoStoreLeft { dir: PathBuf },
    #[error("{} should be empty: a new store is to begin in it, and format.json does not know it; move it away", dir.display())]
    Occupied { dir: PathBuf },
    #[error("{} cannot be understood: {reason}", file.display())]
    Damaged { file: PathBuf, reason: String },
    #[error("{action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

impl DataDir {
    /// Makes the directory where there is none, locks it, and checks that it is this node's.
    pub fn open(config: &NodeConfig) -> Result<DataDir, DataDirError> {
        let path = config.data_dir.clone();
        fs::create_dir_all(&path).map_err(at("make the directory", &path))?;
        let lock = lock(&path)?;
        let (format, made) = match read_format(&path)? {
            Some(format) => (format, false),
            None => (make_format(&path, config)?, true),
        };
        if format.node != config.node_id {
            return Err(DataDirError::OtherNode { dir: path, found: format.node, configured: config.node_id });
        }
        let dir = DataDir { path, format, made, _lock: lock };
        if dir.format.format != FORMAT {
            dir.replace_format(&Format { format: FORMAT, ..dir.format.clone() })?;
            tracing::info!(from = dir.format.format, to = FORMAT, "the format of the data directory is upgraded");
        }
        let dir = DataDir { format: Format { format: FORMAT, ..dir.format }, ..dir };
        dir.remove_unused()?;
        for folder in [dir.meta(), dir.index()].into_iter().chain(dir.stores().map(|store| dir.store(store))) {
            fs::create_dir_all(&folder).map_err(at("make the directory", &folder))?;
        }
        sync_folder(&dir.path)?;
        Ok(dir)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn format(&self) -> &Format {
        &self.format
    }

    /// Whether this start made it.
    pub fn is_new(&self) -> bool {
        self.made
    }

    /// Log, vote and snapshots of the metadata group.
    pub fn meta(&self) -> PathBuf {
        self.path.join("meta")
    }

    /// The one RocksDB of the node.
    pub fn index(&self) -> PathBuf {
        self.path.join("index")
    }

    /// The segments of a store.
    pub fn store(&self, store: StoreId) -> PathBuf {
        self.path.join(format!("{STORE_PREFIX}{:03}", store.0))
    }

    /// The stores that shards write to, by shard.
    pub fn stores(&self) -> impl Iterator<Item = StoreId> {
        self.format.layout.stores.iter().copied().map(StoreId)
    }

    /// The stores that are only read.
    pub fn draining(&self) -> impl Iterator<Item = StoreId> {
        self.format.layout.draining.iter().copied().map(StoreId)
    }

    /// The layout for `shards` shards: new stores for all, and those of today drain.
    pub fn layout_for(&self, shards: u16) -> Result<Layout, DataDirError> {
        let old = &self.format.layout;
        // The last number is never a store's: it is that of the metadata group's log.
        let next_store = old.next_store.checked_add(shards);
        let next_store = next_store.ok_or_else(|| DataDirError::NoStoreLeft { dir: self.path.clone() })?;
        let draining = old.draining.iter().chain(&old.stores).copied().collect();
        Ok(Layout { stores: (old.next_store..next_store).collect(), draining, next_store })
    }

    /// Removes directories of stores that a start cut short made and never decided for.
    fn remove_unused(&self) -> Result<(), DataDirError> {
        for entry in fs::read_dir(&self.path).map_err(at("list", &self.path))? {
            let folder = entry.map_err(at("list", &self.path))?.path();
            let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let store = name.strip_prefix(STORE_PREFIX).and_then(|number| number.parse::<u16>().ok());
            let Some(store) = store else { continue };
            let removed = if store < self.format.layout.next_store {
                decide(&folder)
            } else if folder.join(UNDECIDED_FILE).exists() {
                remove_undecided(&folder)
            } else {
                fs::remove_dir(&folder)
            };
            if let Err(error) = removed {
                tracing::warn!(folder = %folder.display(), %error, "what is left of another number of shards stays");
            }
        }
        Ok(())
    }

    /// Makes the directories of a layout that is about to be taken. Errors: `Occupied`.
    pub fn prepare(&self, layout: &Layout) -> Result<(), DataDirError> {
        for &store in &layout.stores {
            let folder = self.store(StoreId(store));
            fs::create_dir_all(&folder).map_err(at("make the directory", &folder))?;
            if fs::read_dir(&folder).map_err(at("list", &folder))?.next().is_some() {
                return Err(DataDirError::Occupied { dir: folder });
            }
            let mark = folder.join(UNDECIDED_FILE);
            File::create(&mark).map_err(at("make", &mark))?;
            // Before anything else is in it: else that would be taken for a store's.
            sync_folder(&folder)?;
        }
        sync_folder(&self.path)
    }

    /// From here on the directory has this layout, whatever ends the process.
    pub fn set_layout(&mut self, layout: Layout) -> Result<(), DataDirError> {
        let format = Format { layout, ..self.format.clone() };
        self.replace_format(&format)?;
        self.format = format;
        for store in self.stores() {
            // What is left of these is removed by the next start.
            let folder = self.store(store);
            if let Err(error) = decide(&folder) {
                tracing::warn!(folder = %folder.display(), %error, "the mark of a store that was undecided stays for now");
            }
        }
        Ok(())
    }

    fn replace_format(&self, format: &Format) -> Result<(), DataDirError> {
        replace_file(&self.path, FORMAT_FILE, &json(format))
    }

    /// Tells tools and tests where the node listens.
    pub fn write_ports(&self, ports: &Ports) -> Result<(), DataDirError> {
        replace_file(&self.path, PORTS_FILE, &json(ports))
    }
}

/// The store in this directory is the node's.
fn decide(folder: &Path) -> io::Result<()> {
    match fs::remove_file(folder.join(UNDECIDED_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The mark goes last: until then the next start can go on with it.
fn remove_undecided(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name != UNDECIDED_FILE) {
            fs::remove_file(path)?;
        }
    }
    File::open(folder)?.sync_all()?;
    decide(folder)?;
    fs::remove_dir(folder)
}

/// The pid of the node that holds the lock; `None`: nobody does. `Some(None)`: somebody does, and left no pid.
pub fn holder(dir: &Path) -> Option<Option<u32>> {
    let mut file = File::open(dir.join(LOCK_FILE)).ok()?;
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => Some(read_pid(&mut file)),
        Ok(()) | Err(TryLockError::Error(_)) => None,
    }
}

/// Whether a node made it.
pub fn is_made(dir: &Path) -> bool {
    dir.join(FORMAT_FILE).exists()
}

/// Keeps nodes from starting on the directory for as long as the file lives. `None`: no node was ever on it.
pub fn hold(dir: &Path) -> Result<Option<File>, DataDirError> {
    let path = dir.join(LOCK_FILE);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(DataDirError::Io { action: "open the lock", path, source }),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(DataDirError::InUse { dir: dir.to_owned(), pid: read_pid(&mut file) }),
        Err(TryLockError::Error(source)) => Err(DataDirError::Io { action: "lock", path, source }),
    }
}

/// What `ports.json` says, if there is one.
pub fn read_ports(dir: &Path) -> Result<Option<Ports>, DataDirError> {
    let file = dir.join(PORTS_FILE);
    let Some(text) = read_small(&file)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|error| DataDirError::Damaged { file, reason: error.to_string() })
}

fn lock(dir: &Path) -> Result<File, DataDirError> {
    let path = dir.join(LOCK_FILE);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(at("open the lock", &path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(DataDirError::InUse { dir: dir.to_owned(), pid: read_pid(&mut file) });
        }
        Err(TryLockError::Error(source)) => {
            return Err(DataDirError::Io { action: "lock", path, source });
        }
    }
    // The pid is for people who are refused; the lock itself is the kernel's.
    let written = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()));
    written.map_err(at("write", &path))?;
    Ok(file)
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn read_format(dir: &Path) -> Result<Option<Format>, DataDirError> {
    let file = dir.join(FORMAT_FILE);
    let Some(text) = read_small(&file)? else {
        return if is_foreign(dir)? { Err(DataDirError::Foreign { dir: dir.to_owned() }) } else { Ok(None) };
    };
    let damaged = |error: serde_json::Error| DataDirError::Damaged { file: file.clone(), reason: error.to_string() };
    // The version first: what another one says beside it is not ours to judge.
    let value: serde_json::Value = serde_json::from_str(&text).map_err(damaged)?;
    let format: Format = match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(1) => {
            let one: FormatOne = serde_json::from_value(value).map_err(damaged)?;
            Format { format: 1, node: one.node, incarnation: one.incarnation, layout: Layout::new(one.shards) }
        }
        Some(found) if found == u64::from(FORMAT) => serde_json::from_value(value).map_err(damaged)?,
        Some(found) => return Err(DataDirError::OtherFormat { dir: dir.to_owned(), found }),
        None => return Err(DataDirError::Damaged { file, reason: "it names no format".to_owned() }),
    };
    match format.layout.contradiction() {
        None => Ok(Some(format)),
        Some(reason) => Err(DataDirError::Damaged { file, reason: reason.to_owned() }),
    }
}

impl Layout {
    /// Of a directory that never had another number of shards.
    fn new(shards: u16) -> Layout {
        Layout { stores: (0..shards).collect(), draining: Vec::new(), next_store: shards }
    }

    fn contradiction(&self) -> Option<&'static str> {
        let mut all: Vec<u16> = self.stores.iter().chain(&self.draining).copied().collect();
        all.sort_unstable();
        if self.stores.is_empty() {
            return Some("it names no store");
        }
        if all.iter().any(|&store| self.next_store <= store) {
            return Some("a store has a number that was not given out yet");
        }
        all.windows(2).any(|pair| pair[0] == pair[1]).then_some("a store is in it twice")
    }
}

/// Whether there is anything that neither a start cut short nor the file system itself leaves behind.
fn is_foreign(dir: &Path) -> Result<bool, DataDirError> {
    let known = [LOCK_FILE.to_owned(), temporary(FORMAT_FILE), "lost+found".to_owned(), ".gitignore".to_owned()];
    for entry in fs::read_dir(dir).map_err(at("list", dir))? {
        let name = entry.map_err(at("list", dir))?.file_name();
        if !known.iter().any(|known| name == known.as_str()) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn make_format(dir: &Path, config: &NodeConfig) -> Result<Format, DataDirError> {
    let mut random = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(at("read", Path::new("/dev/urandom")))?;
    let incarnation = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let format = Format { format: FORMAT, node: config.node_id, incarnation, layout: Layout::new(config.shards) };
    replace_file(dir, FORMAT_FILE, &json(&format))?;
    Ok(format)
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("these structs become JSON") + "\n"
}

fn read_small(file: &Path) -> Result<Option<String>, DataDirError> {
    let opened = match File::open(file) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(DataDirError::Io { action: "open", path: file.to_owned(), source }),
    };
    let mut text = String::new();
    match opened.take(SMALL_FILE_BYTES_MAX).read_to_string(&mut text) {
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(DataDirError::Damaged { file: file.to_owned(), reason: "it is no text".to_owned() })
        }
        Err(source) => Err(DataDirError::Io { action: "read", path: file.to_owned(), source }),
    }
}

fn temporary(name: &str) -> String {
    format!("{name}.tmp")
}

/// Puts a whole file in place or none: a crash leaves the old one.
fn replace_file(dir: &Path, name: &str, text: &str) -> Result<(), DataDirError> {
    let temporary = dir.join(temporary(name));
    let path = dir.join(name);
    File::create(&temporary)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .map_err(at("write", &temporary))?;
    fs::rename(&temporary, &path).map_err(at("put in place", &path))?;
    sync_folder(dir)
}

fn sync_folder(dir: &Path) -> Result<(), DataDirError> {
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(at("sync the directory", dir))
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DataDirError {
    let path = path.to_owned();
    move |source| DataDirError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &Path) -> NodeConfig {
        NodeConfig { data_dir: dir.join("data"), shards: 2, ..NodeConfig::default() }
    }

    #[test]
    fn a_new_directory_is_made_and_opened_again_as_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let first = DataDir::open(&config).unwrap();
        assert!(first.is_new());
        assert_eq!(first.format().incarnation.len(), 32);
        assert!(first.store(StoreId(1)).ends_with("shard-001") && first.store(StoreId(1)).is_dir());
        let format = first.format().clone();
        drop(first);
        let second = DataDir::open(&config).unwrap();
        assert!(!second.is_new());
        assert_eq!(*second.format(), format);
    }

    #[test]
    fn a_second_node_on_the_directory_is_refused_with_the_pid_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        assert_eq!(holder(&config.data_dir), None);
        let first = DataDir::open(&config).unwrap();
        let error = DataDir::open(&config).unwrap_err();
        assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
        assert_eq!(holder(&config.data_dir), Some(Some(std::process::id())));
        drop(first);
        assert_eq!(holder(&config.data_dir), None);
        DataDir::open(&config).unwrap();
    }

    #[test]
    fn directories_of_another_format_or_node_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        drop(DataDir::open(&config).unwrap());
        let other = NodeConfig { node_id: 2, ..config.clone() };
        assert!(matches!(DataDir::open(&other), Err(DataDirError::OtherNode { found: 1, configured: 2, .. })));
        let file = config.data_dir.join(FORMAT_FILE);
        fs::write(&file, r#"{"format":7,"cells":[]}"#).unwrap();
        assert!(matches!(DataDir::open(&config), Err(DataDirError::OtherFormat { found: 7, .. })));
        for damaged in ["", "{", "{}", r#"{"format":1}"#, r#"{"format":2}"#, "\u{0}"] {
            fs::write(&file, damaged).unwrap();
            assert!(matches!(DataDir::open(&config), Err(DataDirError::Damaged { .. })), "{damaged}");
        }
        fs::write(&file, [0xff, 0xfe]).unwrap();
        assert!(matches!(DataDir::open(&config), Err(DataDirError::Damaged { .. })));
    }

    #[test]
    fn a_directory_of_format_1_is_upgraded_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        fs::create_dir_all(&config.data_dir).unwrap();
        let file = config.data_dir.join(FORMAT_FILE);
        fs::write(&file, r#"{"format":1,"node":1,"incarnation":"00ff","shards":3}"#).unwrap();
        for _ in 0..2 {
            // Opened with another number than it was written with: that is for the layout to follow later.
            let dir = DataDir::open(&config).unwrap();
            let expected = Layout { stores: vec![0, 1, 2], draining: Vec::new(), next_store: 3 };
            assert_eq!(dir.format().layout, expected);
            assert_eq!((dir.format().format, &dir.format().incarnation[..]), (2, "00ff"));
            assert!(!dir.is_new());
        }
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(
            text,
            "{\"format\":2,\"node\":1,\"incarnation\":\"00ff\",\"stores\":[0,1,2],\"draining\":[],\"next_store\":3}\n"
        );
    }

    #[test]
    fn a_layout_gives_every_store_a_number_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let mut dir = DataDir::open(&config(folder.path())).unwrap();
        for (shards, stores, draining) in [(3, 2..5, 0..2), (1, 5..6, 0..5)] {
            let layout = dir.layout_for(shards).unwrap();
            assert_eq!(layout.stores, stores.collect::<Vec<u16>>());
            assert_eq!(layout.draining, draining.collect::<Vec<u16>>());
            assert_eq!(layout.contradiction(), None);
            dir.prepare(&layout).unwrap();
            dir.set_layout(layout).unwrap();
        }
        drop(dir);
        let config = config(folder.path());
        fs::create_dir(config.data_dir.join("shard-017")).unwrap();
        fs::create_dir(config.data_dir.join("shard-018")).unwrap();
        fs::write(config.data_dir.join("shard-018/segment"), "messages").unwrap();
        let dir = DataDir::open(&config).unwrap();
        assert_eq!(dir.stores().collect::<Vec<_>>(), [StoreId(5)]);
        assert!(!dir.store(StoreId(17)).exists(), "made by a start that was cut short");
        assert!(dir.store(StoreId(18)).exists(), "perhaps format.json is older than it");
        let layout = dir.layout_for(2).unwrap();
        dir.prepare(&layout).unwrap();
        fs::write(dir.store(StoreId(6)).join("segment"), "a checkpoint").unwrap();
        assert!(matches!(dir.prepare(&layout), Err(DataDirError::Occupied { .. })));
        drop(dir);
        let mut dir = DataDir::open(&config).unwrap();
        assert!(!dir.store(StoreId(6)).exists() && !dir.store(StoreId(7)).exists(), "prepared and not decided for");
        dir.prepare(&layout).unwrap();
        dir.set_layout(layout).unwrap();
        fs::write(dir.store(StoreId(6)).join("segment"), "messages").unwrap();
        drop(dir);
        let mut dir = DataDir::open(&config).unwrap();
        assert_eq!(fs::read_dir(dir.store(StoreId(6))).unwrap().count(), 1, "messages, and no mark");
        let last = Layout { stores: vec![5], draining: Vec::new(), next_store: u16::MAX - 1 };
        dir.set_layout(last).unwrap();
        assert!(matches!(dir.layout_for(2), Err(DataDirError::NoStoreLeft { .. })));
        assert_eq!(dir.layout_for(1).unwrap().stores, [u16::MAX - 1]);
        drop(dir);
        for damaged in [
            r#""stores":[],"draining":[],"next_store":1"#,
            r#""stores":[1,1],"draining":[],"next_store":2"#,
            r#""stores":[1],"draining":[1],"next_store":2"#,
            r#""stores":[2],"draining":[],"next_store":2"#,
        ] {
            let text = format!(r#"{{"format":2,"node":1,"incarnation":"00",{damaged}}}"#);
            fs::write(config.data_dir.join(FORMAT_FILE), text).unwrap();
            assert!(matches!(DataDir::open(&config), Err(DataDirError::Damaged { .. })), "{damaged}");
        }
    }

    #[test]
    fn a_folder_of_somebody_else_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        fs::create_dir_all(&config.data_dir).unwrap();
        fs::write(config.data_dir.join("letters.txt"), "dear").unwrap();
        assert!(matches!(DataDir::open(&config), Err(DataDirError::Foreign { .. })));
        assert_eq!(fs::read_to_string(config.data_dir.join("letters.txt")).unwrap(), "dear");
    }

    #[test]
    fn a_start_that_was_cut_short_is_taken_up() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        fs::create_dir_all(&config.data_dir).unwrap();
        fs::write(config.data_dir.join(LOCK_FILE), "1\n").unwrap();
        fs::write(config.data_dir.join("format.json.tmp"), "{\"for").unwrap();
        assert!(DataDir::open(&config).unwrap().is_new());
    }

    #[test]
    fn ports_are_written_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let dir = DataDir::open(&config).unwrap();
        assert_eq!(read_ports(dir.path()).unwrap(), None);
        let ports = Ports {
            listen: "127.0.0.1:4000".parse().unwrap(),
            shards: vec![4001, 4002],
            admin: "127.0.0.1:4003".parse().unwrap(),
        };
        dir.write_ports(&ports).unwrap();
        assert_eq!(read_ports(dir.path()).unwrap(), Some(ports));
    }
}
