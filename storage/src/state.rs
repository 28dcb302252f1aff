//! Rows of state that belong to a partition: cursors, producers. Opaque to the store.
//!
//! Rows that must survive by themselves go through the journal as changes in the partition's state ledger; so do the
//! store's own decisions, to trim or drop a partition. Rows that follow from entries go to the index alone.

use drava_protocol::PartitionId;

use crate::index::{ExtentRow, PartitionRow, Trim};

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

const HEADER_BYTES: usize = 8;
const OP_PUT: u8 = 1;
const OP_DELETE: u8 = 2;
const OP_TRIM: u8 = 3;
const OP_DROP: u8 = 4;
const OP_SAVED_ROW: u8 = 5;
const OP_SAVED_PARTITION: u8 = 6;
const OP_SAVED_END: u8 = 7;
const OP_SAVED_EXTENT: u8 = 8;

/// Longest key of a row.
pub const KEY_BYTES_MAX: usize = u16::MAX as usize;
/// Longest value of a row.
pub const VALUE_BYTES_MAX: usize = 256 << 10;

/// One record of a state ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RowChange {
    Put {
        key: Vec<u8>,
        value: Vec<u8>,
    },
    Delete {
        key: Vec<u8>,
    },
    /// Ledgers before one are deleted.
    Trim(Trim),
    /// The partition is deleted.
    Drop,
    /// No change: repeats what the index has, for the day that it is lost.
    Checkpoint(Checkpoint),
}

/// A row of a checkpoint, as the index had it when it covered the block `covered`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Checkpoint {
    Row {
        covered: u64,
        key: Vec<u8>,
        value: Vec<u8>,
    },
    Partition {
        covered: u64,
        row: PartitionRow,
    },
    /// An extent in another store: no block of this one says where it lies.
    Extent {
        covered: u64,
        row: ExtentRow,
    },
    /// All rows are there. The first was read at `covered`, which lies in a segment of this generation.
    End {
        covered: u64,
        generation: u64,
    },
}

impl RowChange {
    fn lengths(&self) -> (usize, usize) {
        match self {
            RowChange::Put { key, value } => (key.len(), value.len()),
            RowChange::Delete { key } => (key.len(), 0),
            RowChange::Trim(_) => (0, 12),
            RowChange::Drop => (0, 0),
            RowChange::Checkpoint(Checkpoint::Row { key, value, .. }) => (key.len(), 8 + value.len()),
            RowChange::Checkpoint(Checkpoint::Partition { .. }) => (0, 28),
            RowChange::Checkpoint(Checkpoint::Extent { row, .. }) => (0, 16 + row.encoded_bytes()),
            RowChange::Checkpoint(Checkpoint::End { .. }) => (0, 16),
        }
    }

    pub(crate) fn encoded_bytes(&self) -> usize {
        let (key_bytes, value_bytes) = self.lengths();
        (HEADER_BYTES + key_bytes + value_bytes).next_multiple_of(16)
    }

    /// Appends the record, padded to 16 bytes, to an empty `out`.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let (key_bytes, value_bytes) = self.lengths();
        let op = match self {
            RowChange::Put { .. } => OP_PUT,
            RowChange::Delete { .. } => OP_DELETE,
            RowChange::Trim(_) => OP_TRIM,
            RowChange::Drop => OP_DROP,
            RowChange::Checkpoint(Checkpoint::Row { .. }) => OP_SAVED_ROW,
            RowChange::Checkpoint(Checkpoint::Partition { .. }) => OP_SAVED_PARTITION,
            RowChange::Checkpoint(Checkpoint::Extent { .. }) => OP_SAVED_EXTENT,
            RowChange::Checkpoint(Checkpoint::End { .. }) => OP_SAVED_END,
        };
        out.extend_from_slice(&[op, 0]);
        out.extend_from_slice(&(key_bytes as u16).to_le_bytes());
        out.extend_from_slice(&(value_bytes as u32).to_le_bytes());
        match self {
            RowChange::Put { key, value } => {
                out.extend_from_slice(key);
                out.extend_from_slice(value);
            }
            RowChange::Delete { key } => out.extend_from_slice(key),
            RowChange::Trim(trim) => {
                out.extend_from_slice(&trim.first_ledger.to_le_bytes());
                out.extend_from_slice(&trim.start_offset.to_le_bytes());
            }
            RowChange::Drop => {}
            RowChange::Checkpoint(Checkpoint::Row { covered, key, value }) => {
                out.extend_from_slice(key);
                out.extend_from_slice(&covered.to_le_bytes());
                out.extend_from_slice(value);
            }
            RowChange::Checkpoint(Checkpoint::Partition { covered, row }) => {
                out.extend_from_slice(&covered.to_le_bytes());
                out.extend_from_slice(&row.start_offset.to_le_bytes());
                out.extend_from_slice(&row.end_offset.to_le_bytes());
                out.extend_from_slice(&row.last_ledger.to_le_bytes());
            }
            RowChange::Checkpoint(Checkpoint::Extent { covered, row }) => {
                out.extend_from_slice(&covered.to_le_bytes());
                out.extend_from_slice(&row.first_offset.to_le_bytes());
                out.extend_from_slice(&row.encode());
            }
            RowChange::Checkpoint(Checkpoint::End { covered, generation }) => {
                out.extend_from_slice(&covered.to_le_bytes());
                out.extend_from_slice(&generation.to_le_bytes());
            }
        }
        out.resize(self.encoded_bytes(), 0);
    }

    /// Reads the record at the start of `bytes` and how many bytes it takes. `None`: it is malformed.
    pub(crate) fn decode(partition: PartitionId, bytes: &[u8]) -> Option<(RowChange, usize)> {
        let (head, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let key_bytes = u16::from_le_bytes([head[2], head[3]]) as usize;
        let value_bytes = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let (key, rest) = rest.split_at_checked(key_bytes)?;
        let (value, _) = rest.split_at_checked(value_bytes)?;
        let change = match head[0] {
            OP_PUT => RowChange::Put { key: key.to_vec(), value: value.to_vec() },
            OP_DELETE => RowChange::Delete { key: key.to_vec() },
            OP_TRIM => {
                let (first_ledger, start_offset) = value.split_first_chunk::<4>()?;
                RowChange::Trim(Trim {
                    partition,
                    first_ledger: u32::from_le_bytes(*first_ledger),
                    start_offset: u64::from_le_bytes(*start_offset.first_chunk::<8>()?),
                })
            }
            OP_DROP => RowChange::Drop,
            OP_SAVED_ROW | OP_SAVED_PARTITION | OP_SAVED_EXTENT | OP_SAVED_END => {
                RowChange::Checkpoint(Checkpoint::decode(head[0], key, value)?)
            }
            _ => return None,
        };
        let bytes_taken = change.encoded_bytes();
        (head[1] == 0 && bytes_taken <= bytes.len()).then_some((change, bytes_taken))
    }

    /// All records of a state extent's body; ends early where one is malformed.
    pub(crate) fn decode_all(partition: PartitionId, body: &[u8], mut visit: impl FnMut(RowChange)) {
        let mut rest = body;
        while let Some((change, bytes)) = RowChange::decode(partition, rest) {
            visit(change);
            rest = &rest[bytes..];
        }
    }
}

impl Checkpoint {
    fn decode(op: u8, key: &[u8], value: &[u8]) -> Option<Checkpoint> {
        let (covered, value) = value.split_first_chunk::<8>()?;
        let covered = u64::from_le_bytes(*covered);
        if op == OP_SAVED_ROW {
            return Some(Checkpoint::Row { covered, key: key.to_vec(), value: value.to_vec() });
        }
        let (first, value) = value.split_first_chunk::<8>()?;
        let first = u64::from_le_bytes(*first);
        if op == OP_SAVED_END {
            return Some(Checkpoint::End { covered, generation: first });
        }
        if op == OP_SAVED_EXTENT {
            // Only what lies in another store is repeated.
            let row = ExtentRow::decode(first, value).ok().filter(|row| row.store.is_some())?;
            return Some(Checkpoint::Extent { covered, row });
        }
        let (end_offset, value) = value.split_first_chunk::<8>()?;
        let last_ledger = u32::from_le_bytes(*value.first_chunk::<4>()?);
        let row = PartitionRow { start_offset: first, end_offset: u64::from_le_bytes(*end_offset), last_ledger };
        Some(Checkpoint::Partition { covered, row })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::foreign::StoreId;

    #[test]
    fn rows_come_back_as_they_were() {
        let partition = PartitionId(7);
        let changes = [
            RowChange::Put { key: b"cursor/a".to_vec(), value: vec![1; 100] },
            RowChange::Delete { key: b"cursor/b".to_vec() },
            RowChange::Trim(Trim { partition, first_ledger: 3, start_offset: 1000 }),
            RowChange::Put { key: Vec::new(), value: Vec::new() },
            RowChange::Checkpoint(Checkpoint::Row { covered: 9, key: b"cursor/a".to_vec(), value: vec![2; 33] }),
            RowChange::Checkpoint(Checkpoint::Partition {
                covered: 10,
                row: PartitionRow { start_offset: 1, end_offset: 2, last_ledger: 3 },
            }),
            RowChange::Checkpoint(Checkpoint::Extent {
                covered: 11,
                row: ExtentRow { first_offset: 5, next_offset: 8, store: Some(StoreId(3)), ..ExtentRow::default() },
            }),
            RowChange::Checkpoint(Checkpoint::End { covered: 9, generation: 4 }),
            RowChange::Drop,
        ];
        let mut body = Vec::new();
        for change in &changes {
            let mut row = Vec::new();
            change.encode(&mut row);
            assert_eq!(row.len(), change.encoded_bytes());
            body.extend_from_slice(&row);
        }
        let mut seen = Vec::new();
        RowChange::decode_all(partition, &body, |change| seen.push(change));
        assert_eq!(seen, changes);
    }
}
