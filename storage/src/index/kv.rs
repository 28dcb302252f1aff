//! What the index asks of a key-value store: one shard's family of it.
//!
//! [`super::rocks`] is the one that nodes run on; [`super::model`] is the same in memory, for simulations that crash it.
//! Both pass the tests below.

use std::ops::ControlFlow;

use super::IndexError;

/// A key and its value.
pub type Row = (Vec<u8>, Vec<u8>);

/// Called with rows in key order until it says stop.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

/// One family. Blocking; used by one thread at a time.
pub trait Kv: Send + 'static {
    /// The same family, for another thread that only reads: it sees every batch that was written before it began to look.
    fn reader(&self) -> Box<dyn Kv>;

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError>;

    /// Visits rows from `from` on.
    fn scan(&self, from: &[u8], visit: &mut Visit<'_>) -> Result<(), IndexError>;

    /// The last row at or before `key`.
    fn last_at(&self, key: &[u8]) -> Result<Option<Row>, IndexError>;

    /// Applies all or nothing. Not durable before [`Kv::flush`]: after a crash a prefix of the batches is there, at
    /// least up to the last flush.
    fn write(&mut self, batch: KvBatch) -> Result<(), IndexError>;

    /// Makes all batches durable.
    fn flush(&mut self) -> Result<(), IndexError>;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvChange {
    Put {
        key: Vec<u8>,
        value: Vec<u8>,
    },
    Delete {
        key: Vec<u8>,
    },
    /// From the first key to before the second.
    DeleteRange {
        from: Vec<u8>,
        to: Vec<u8>,
    },
}

/// Changes that are applied together, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvBatch {
    pub changes: Vec<KvChange>,
}

impl KvBatch {
    pub fn put(&mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.changes.push(KvChange::Put { key: key.into(), value: value.into() });
    }

    pub fn delete(&mut self, key: impl Into<Vec<u8>>) {
        self.changes.push(KvChange::Delete { key: key.into() });
    }

    pub fn delete_range(&mut self, from: impl Into<Vec<u8>>, to: impl Into<Vec<u8>>) {
        self.changes.push(KvChange::DeleteRange { from: from.into(), to: to.into() });
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use drava_protocol::ShardId;

    use super::*;
    use crate::index::IndexDb;
    use crate::index::model::ModelKv;

    fn rows(kv: &dyn Kv, from: &[u8]) -> Vec<(String, String)> {
        let mut rows = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        kv.scan(from, &mut |key, value| {
            rows.push((text(key), text(value)));
            ControlFlow::Continue(())
        })
        .expect("a scan");
        rows
    }

    fn row(key: &str, value: &str) -> (String, String) {
        (key.into(), value.into())
    }

    fn keeps_the_contract(kv: &mut dyn Kv) {
        assert_eq!(kv.get(b"a").unwrap(), None);
        assert_eq!(kv.last_at(b"z").unwrap(), None);
        assert_eq!(rows(kv, b""), []);

        let mut batch = KvBatch::default();
        for key in ["b", "d", "f", "a"] {
            batch.put(key, format!("1{key}"));
        }
        kv.write(batch).unwrap();
        assert_eq!(kv.get(b"d").unwrap().as_deref(), Some(&b"1d"[..]));
        assert_eq!(rows(kv, b"b"), [row("b", "1b"), row("d", "1d"), row("f", "1f")], "from its first key on, in order");
        assert_eq!(rows(kv, b"c")[0], row("d", "1d"), "from between two keys");

        let mut seen = 0;
        kv.scan(b"a", &mut |_, _| {
            seen += 1;
            if seen == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        assert_eq!(seen, 2, "a scan ends when it is told to");

        let last = |kv: &dyn Kv, key: &[u8]| kv.last_at(key).unwrap().map(|(key, _)| key);
        assert_eq!(last(kv, b"d").as_deref(), Some(&b"d"[..]), "the key itself");
        assert_eq!(last(kv, b"e").as_deref(), Some(&b"d"[..]), "the one before");
        assert_eq!(last(kv, b"zz").as_deref(), Some(&b"f"[..]), "the last of all");
        assert_eq!(last(kv, b"A"), None, "nothing is before the first");

        // What comes later in a batch counts.
        let mut batch = KvBatch::default();
        batch.put("c", "2c");
        batch.delete_range("b", "f");
        batch.put("d", "2d");
        batch.delete("a");
        batch.delete("not there");
        kv.write(batch).unwrap();
        kv.flush().unwrap();
        assert_eq!(rows(kv, b""), [row("d", "2d"), row("f", "1f")], "a range ends before its end");

        let mut batch = KvBatch::default();
        batch.delete_range("a", "z");
        kv.write(batch).unwrap();
        assert_eq!(rows(kv, b""), []);
        assert_eq!(kv.get(b"d").unwrap(), None);
        kv.flush().unwrap();
        kv.flush().unwrap();
    }

    fn on_rocks<T>(path: &Path, test: impl FnOnce(&mut dyn Kv) -> T) -> T {
        let index = IndexDb::open(path, 2).unwrap().shard(ShardId(1));
        let mut kv = index.kv;
        test(&mut *kv)
    }

    #[test]
    fn rocks_and_the_model_keep_the_contract() {
        let dir = tempfile::tempdir().unwrap();
        on_rocks(dir.path(), keeps_the_contract);
        keeps_the_contract(&mut ModelKv::default());
    }

    #[test]
    fn what_is_flushed_outlives_the_process_and_what_is_not_is_a_prefix() {
        let write = |kv: &mut dyn Kv| {
            for (index, key) in ["a", "b", "c", "d"].iter().enumerate() {
                let mut batch = KvBatch::default();
                batch.put(*key, "1");
                batch.put(format!("{key}2"), "1");
                kv.write(batch).unwrap();
                if index == 1 {
                    kv.flush().unwrap();
                }
            }
        };
        let check = |kv: &dyn Kv| {
            let rows = rows(kv, b"");
            assert!([4, 6, 8].contains(&rows.len()), "whole batches: {rows:?}");
            let all = ["a", "a2", "b", "b2", "c", "c2", "d", "d2"];
            assert!(rows.iter().zip(all).all(|((found, _), expected)| found == expected), "a prefix: {rows:?}");
            rows.len()
        };
        let dir = tempfile::tempdir().unwrap();
        on_rocks(dir.path(), write);
        on_rocks(dir.path(), |kv| check(kv));
        let mut seen = std::collections::BTreeSet::new();
        for kept in 0..3 {
            let mut model = ModelKv::default();
            write(&mut model);
            model.crash(|pending| {
                assert_eq!(pending, 2);
                kept
            });
            seen.insert(check(&model));
        }
        assert_eq!(seen.len(), 3);
    }
}
