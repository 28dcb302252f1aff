//! The index on disk: one RocksDB database for the node, one column family per shard, without a write-ahead log.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use drava_protocol::ShardId;
use rocksdb::{ColumnFamily, ColumnFamilyDescriptor, DB, DBRawIterator, Options, WriteBatch, WriteOptions};

use super::kv::{Kv, KvBatch, KvChange, Row, Visit};
use super::{Index, IndexError};
use crate::foreign::StoreId;

const WRITE_BUFFER_BYTES: usize = 4 << 20;
const BLOCK_CACHE_BYTES: usize = 8 << 20;
const OPEN_FILES_MAX: i32 = 128;

/// The RocksDB database of the node: one column family per shard. Blocking: open it before the executors start.
pub struct IndexDb {
    db: DB,
}

impl std::fmt::Debug for IndexDb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IndexDb({})", self.db.path().display())
    }
}

impl IndexDb {
    /// Opens or makes the database and the families of the first `shards` stores, and leaves others alone.
    pub fn open(path: &Path, shards: u16) -> Result<Arc<IndexDb>, IndexError> {
        let stores: Vec<StoreId> = (0..shards).map(StoreId).collect();
        Ok(Arc::new(IndexDb { db: open_or_set_aside(path, &stores)? }))
    }

    /// Opens or makes the database and the families of these stores. All others are dropped: they are left over.
    pub fn open_stores(path: &Path, stores: &[StoreId]) -> Result<Arc<IndexDb>, IndexError> {
        let mut db = open_or_set_aside(path, stores)?;
        let known: Vec<String> = stores.iter().map(|store| family_name(*store)).collect();
        for name in DB::list_cf(&Options::default(), path)? {
            if name != rocksdb::DEFAULT_COLUMN_FAMILY_NAME && !known.contains(&name) {
                db.drop_cf(&name)?;
            }
        }
        Ok(Arc::new(IndexDb { db }))
    }

    /// The family of one shard that never had another number; for [`crate::Store::open`], on whichever thread.
    pub fn shard(self: &Arc<Self>, shard: ShardId) -> Index {
        self.store(StoreId(shard.0))
    }

    /// The family of one store.
    pub fn store(self: &Arc<Self>, store: StoreId) -> Index {
        let family = family_name(store);
        Index::new(&family, Box::new(RocksKv { db: self.clone(), family: family.clone() }))
    }
}

/// An unusable database is set aside and made anew; the stores then rebuild their families from their journals.
fn open_or_set_aside(path: &Path, stores: &[StoreId]) -> Result<DB, IndexError> {
    match open_db(path, stores) {
        Ok(db) => Ok(db),
        Err(error) if is_unusable(&error) => {
            let aside = path.with_extension("unusable");
            tracing::error!(path = %path.display(), error = %error, aside = %aside.display(), "the index is unusable; it is made anew");
            let set_aside = |source| IndexError::SetAside { path: path.to_owned(), source };
            if aside.exists() {
                std::fs::remove_dir_all(&aside).map_err(set_aside)?;
            }
            std::fs::rename(path, &aside).map_err(set_aside)?;
            open_db(path, stores).map_err(|source| IndexError::Open { path: path.to_owned(), source })
        }
        Err(source) => Err(IndexError::Open { path: path.to_owned(), source }),
    }
}

fn family_name(store: StoreId) -> String {
    format!("shard-{:03}", store.0)
}

fn is_unusable(error: &rocksdb::Error) -> bool {
    match error.kind() {
        rocksdb::ErrorKind::Corruption => true,
        // A file that the manifest names is gone.
        rocksdb::ErrorKind::IOError => error.as_ref().contains("No such file"),
        _ => false,
    }
}

fn open_db(path: &Path, stores: &[StoreId]) -> Result<DB, rocksdb::Error> {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_max_file_opening_threads(1);
    options.set_max_background_jobs(2);
    // What brings tables together can wait, and takes seconds of a core at a time. It shares no lock with an executor.
    let mut env = rocksdb::Env::new()?;
    env.lower_thread_pool_cpu_priority();
    options.set_env(&env);
    // A table is not given to the disk all at once.
    options.set_bytes_per_sync(1 << 20);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_log_level(rocksdb::LogLevel::Error);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options.set_paranoid_checks(true);
    let cache = rocksdb::Cache::new_lru_cache(BLOCK_CACHE_BYTES);
    let family_options = || {
        let mut options = Options::default();
        options.set_write_buffer_size(WRITE_BUFFER_BYTES);
        options.set_max_write_buffer_number(2);
        options.set_compression_type(rocksdb::DBCompressionType::Lz4);
        options.set_target_file_size_base(16 << 20);
        // Rows all over the family change at once when extents are moved: less is written again for them.
        options.set_max_bytes_for_level_base(64 << 20);
        let mut table = rocksdb::BlockBasedOptions::default();
        table.set_block_cache(&cache);
        table.set_cache_index_and_filter_blocks(true);
        options.set_block_based_table_factory(&table);
        options
    };
    let mut names = DB::list_cf(&options, path).unwrap_or_default();
    names.extend(stores.iter().map(|store| family_name(*store)));
    names.push(rocksdb::DEFAULT_COLUMN_FAMILY_NAME.to_owned());
    names.sort_unstable();
    names.dedup();
    let families = names.into_iter().map(|name| ColumnFamilyDescriptor::new(name, family_options()));
    DB::open_cf_descriptors(&options, path, families)
}

/// The family of one shard.
#[derive(Clone, Debug)]
struct RocksKv {
    db: Arc<IndexDb>,
    family: String,
}

impl RocksKv {
    fn handle(&self) -> Result<&ColumnFamily, IndexError> {
        self.db.db.cf_handle(&self.family).ok_or(IndexError::Row("the family of this shard does not exist"))
    }

    fn iterator(&self) -> Result<DBRawIterator<'_>, IndexError> {
        Ok(self.db.db.raw_iterator_cf(self.handle()?))
    }
}

impl Kv for RocksKv {
    fn reader(&self) -> Box<dyn Kv> {
        Box::new(self.clone())
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        Ok(self.db.db.get_cf(self.handle()?, key)?)
    }

    fn scan(&self, from: &[u8], visit: &mut Visit<'_>) -> Result<(), IndexError> {
        let mut iterator = self.iterator()?;
        iterator.seek(from);
        while let Some((key, value)) = iterator.item() {
            if let ControlFlow::Break(()) = visit(key, value) {
                break;
            }
            iterator.next();
        }
        Ok(iterator.status()?)
    }

    fn last_at(&self, key: &[u8]) -> Result<Option<Row>, IndexError> {
        let mut iterator = self.iterator()?;
        iterator.seek_for_prev(key);
        let row = iterator.item().map(|(key, value)| (key.to_vec(), value.to_vec()));
        iterator.status()?;
        Ok(row)
    }

    fn write(&mut self, batch: KvBatch) -> Result<(), IndexError> {
        let handle = self.handle()?;
        let mut writes = WriteBatch::default();
        for change in &batch.changes {
            match change {
                KvChange::Put { key, value } => writes.put_cf(handle, key, value),
                KvChange::Delete { key } => writes.delete_cf(handle, key),
                KvChange::DeleteRange { from, to } => writes.delete_range_cf(handle, from, to),
            }
        }
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        Ok(self.db.db.write_opt(writes, &options)?)
    }

    fn flush(&mut self) -> Result<(), IndexError> {
        Ok(self.db.db.flush_cf(self.handle()?)?)
    }
}
