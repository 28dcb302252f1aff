//! One partition: its producers, its subscriptions, and the state rows that make both survive.

use drava_protocol::message::Durability;
use drava_protocol::topic::TopicName;
use drava_protocol::{PartitionId, batch};

use super::producers::{Producers, RowError};
use super::subscriptions::Subscriptions;

/// What is decided about one partition. Lives on the shard that owns the partition.
#[derive(Debug)]
pub struct Partition {
    pub id: PartitionId,
    pub topic: TopicName,
    pub durability: Durability,
    pub producers: Producers,
    pub subscriptions: Subscriptions,
}

/// A state row that cannot be read: the partition's state is damaged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error("partition {partition}: {row}")]
    Producer { partition: PartitionId, row: RowError },
    #[error("partition {partition}: the saved cursor of `{subscription}` has {bytes} bytes instead of 8")]
    Cursor { partition: PartitionId, subscription: String, bytes: usize },
    #[error("partition {partition}: a state row has an unknown key")]
    Key { partition: PartitionId },
}

/// A batch found in the journal after the last saved rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replayed {
    pub base_offset: u64,
    pub record_count: u32,
    pub producer: u64,
    pub producer_epoch: u32,
    pub base_sequence: u64,
}

const PRODUCER_PREFIX: u8 = b'p';
const CURSOR_PREFIX: u8 = b'c';

/// The row key of a producer: `p` and its id, big-endian.
pub fn producer_key(producer: u64) -> [u8; 9] {
    let mut key = [PRODUCER_PREFIX; 9];
    key[1..].copy_from_slice(&producer.to_be_bytes());
    key
}

/// The row key of a cursor: `c` and the name of its subscription.
pub fn cursor_key(subscription: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + subscription.len());
    key.push(CURSOR_PREFIX);
    key.extend_from_slice(subscription.as_bytes());
    key
}

/// The producers of a partition as they follow from its saved rows and the batches after them.
pub fn producers_after<'a>(
    partition: PartitionId,
    rows: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
    replayed: impl IntoIterator<Item = Replayed>,
) -> Result<Producers, StateError> {
    let mut producers = Producers::default();
    for (key, value) in rows {
        if let Some((&PRODUCER_PREFIX, id)) = key.split_first() {
            let id = id.try_into().map_err(|_| StateError::Key { partition })?;
            producers.restore(u64::from_be_bytes(id), value).map_err(|row| StateError::Producer { partition, row })?;
        }
    }
    replayed.into_iter().for_each(|batch| take_replayed(&mut producers, &batch));
    Ok(producers)
}

impl Partition {
    pub fn new(id: PartitionId, topic: TopicName, durability: Durability) -> Partition {
        Partition { id, topic, durability, producers: Producers::default(), subscriptions: Subscriptions::default() }
    }

    /// Takes over what the store recovered: the saved rows, then the batches after them in order.
    pub fn restore<'a>(
        &mut self,
        rows: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
        replayed: impl IntoIterator<Item = Replayed>,
    ) -> Result<(), StateError> {
        let partition = self.id;
        for (key, value) in rows {
            match key.split_first() {
                Some((&PRODUCER_PREFIX, id)) => {
                    let id = id.try_into().map_err(|_| StateError::Key { partition })?;
                    self.producers
                        .restore(u64::from_be_bytes(id), value)
                        .map_err(|row| StateError::Producer { partition, row })?;
                }
                Some((&CURSOR_PREFIX, name)) => {
                    let name = std::str::from_utf8(name).map_err(|_| StateError::Key { partition })?;
                    let cursor = value.try_into().map_err(|_| StateError::Cursor {
                        partition,
                        subscription: name.to_owned(),
                        bytes: value.len(),
                    })?;
                    self.subscriptions.restore(name, u64::from_le_bytes(cursor));
                }
                Some(_) | None => return Err(StateError::Key { partition }),
            }
        }
        replayed.into_iter().for_each(|batch| take_replayed(&mut self.producers, &batch));
        Ok(())
    }
}

fn take_replayed(producers: &mut Producers, batch: &Replayed) {
    producers.replay(batch.producer, batch.producer_epoch, batch.base_sequence, batch.record_count, batch.base_offset);
}

/// The sequence after the last message of a batch.
pub fn end_sequence(header: &batch::Header) -> u64 {
    header.base_sequence + u64::from(header.record_count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::subscriptions::ConsumerKey;

    #[test]
    fn state_rows_restore_what_was_saved() {
        let name = TopicName::parse("orders").unwrap();
        let mut partition = Partition::new(PartitionId(1), name.clone(), Durability::Disk);
        partition.producers.open(9).unwrap();
        let row = partition.producers.encode(9).unwrap();
        let rows = [(producer_key(9).to_vec(), row), (cursor_key("s"), 42u64.to_le_bytes().to_vec())];

        let mut restored = Partition::new(PartitionId(1), name, Durability::Disk);
        let replayed = Replayed { base_offset: 50, record_count: 3, producer: 9, producer_epoch: 1, base_sequence: 0 };
        restored.restore(rows.iter().map(|(k, v)| (&k[..], &v[..])), [replayed]).unwrap();
        assert_eq!(restored.producers.open(9), Ok((2, 3)));
        let consumer = ConsumerKey { connection: 1, consumer: 1 };
        assert_eq!(restored.subscriptions.attach("s", consumer, 0, false).unwrap().cursor, 42);
    }

    #[test]
    fn unreadable_rows_are_errors() {
        let mut partition = Partition::new(PartitionId(1), TopicName::parse("t").unwrap(), Durability::Disk);
        for (key, value) in [(&b"x"[..], &b""[..]), (b"", b""), (b"cs", b"1"), (b"p1", b""), (b"c\xff", b"12345678")] {
            assert!(partition.restore([(key, value)], []).is_err(), "key {key:?}");
        }
    }
}
