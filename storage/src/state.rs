//! Rows of state that belong to a partition: cursors, producers. Opaque to the store.

use drava_protocol::PartitionId;

/// State derived from durable entries, to be written together with the index of those entries.
///
/// After a crash the rows are as they were at the covered position, and `RecoveredPartition::replayed` has the batches
/// that came after it.
#[derive(Debug, Default)]
pub struct StateBatch {
    pub(crate) rows: Vec<(PartitionId, Vec<u8>, Option<Vec<u8>>)>,
}

impl StateBatch {
    pub fn put(&mut self, partition: PartitionId, key: &[u8], value: &[u8]) {
        self.rows.push((partition, key.to_vec(), Some(value.to_vec())));
    }

    pub fn delete(&mut self, partition: PartitionId, key: &[u8]) {
        self.rows.push((partition, key.to_vec(), None));
    }
}
