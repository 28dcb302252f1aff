//! A family in memory whose batches are durable only when they are flushed: what a simulation crashes.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::IndexError;
use super::kv::{Kv, KvBatch, KvChange, Row, Visit};

/// Clones are the same family: one serves the index, another stays with whoever crashes it.
#[derive(Clone, Debug, Default)]
pub struct ModelKv(Arc<Mutex<Model>>);

#[derive(Debug, Default)]
struct Model {
    /// As of the last flush.
    durable: BTreeMap<Vec<u8>, Vec<u8>>,
    /// As readers see it.
    rows: BTreeMap<Vec<u8>, Vec<u8>>,
    /// What is in `rows` and not in `durable`.
    unflushed: Vec<KvBatch>,
}

impl ModelKv {
    /// Forgets the batches behind a prefix of those that were not flushed. `kept` is told how many there are and says
    /// how many of them stay.
    pub fn crash(&self, kept: impl FnOnce(usize) -> usize) {
        let mut model = self.model();
        let model = &mut *model;
        let kept = kept(model.unflushed.len()).min(model.unflushed.len());
        for batch in model.unflushed.drain(..).take(kept) {
            apply(&mut model.durable, batch);
        }
        model.rows.clone_from(&model.durable);
    }

    /// Loses everything, as if the directory had been deleted.
    pub fn clear(&self) {
        *self.model() = Model::default();
    }

    /// The number of rows, as readers see them.
    pub fn row_count(&self) -> usize {
        self.model().rows.len()
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn apply(rows: &mut BTreeMap<Vec<u8>, Vec<u8>>, batch: KvBatch) {
    for change in batch.changes {
        match change {
            KvChange::Put { key, value } => drop(rows.insert(key, value)),
            KvChange::Delete { key } => drop(rows.remove(&key)),
            KvChange::DeleteRange { from, to } if from < to => {
                let keys: Vec<_> = rows.range(from..to).map(|(key, _)| key.clone()).collect();
                keys.iter().for_each(|key| drop(rows.remove(key)));
            }
            KvChange::DeleteRange { .. } => {}
        }
    }
}

impl Kv for ModelKv {
    fn reader(&self) -> Box<dyn Kv> {
        Box::new(self.clone())
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        Ok(self.model().rows.get(key).cloned())
    }

    fn scan(&self, from: &[u8], visit: &mut Visit<'_>) -> Result<(), IndexError> {
        for (key, value) in self.model().rows.range::<[u8], _>((Bound::Included(from), Bound::Unbounded)) {
            if let ControlFlow::Break(()) = visit(key, value) {
                break;
            }
        }
        Ok(())
    }

    fn last_at(&self, key: &[u8]) -> Result<Option<Row>, IndexError> {
        let model = self.model();
        let row = model.rows.range::<[u8], _>((Bound::Unbounded, Bound::Included(key))).next_back();
        Ok(row.map(|(key, value)| (key.clone(), value.clone())))
    }

    fn write(&mut self, batch: KvBatch) -> Result<(), IndexError> {
        let mut model = self.model();
        apply(&mut model.rows, batch.clone());
        model.unflushed.push(batch);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), IndexError> {
        let mut model = self.model();
        let model = &mut *model;
        for batch in model.unflushed.drain(..) {
            apply(&mut model.durable, batch);
        }
        Ok(())
    }
}
