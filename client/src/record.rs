//! Records as an application gives them and messages as it gets them.

use std::collections::VecDeque;

use bytes::Bytes;
use drava_protocol::batch::{self, BatchError, Compression, NewRecord};
use drava_protocol::frame::padded;

/// What an application publishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    pub key: Option<Bytes>,
    pub headers: Vec<Header>,
    pub payload: Bytes,
    /// When it happened, in ms since the epoch; none: the moment at which the producer takes it.
    pub event_time_ms: Option<u64>,
    /// Not to be delivered before, in ms since the epoch.
    pub deliver_at_ms: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub name: String,
    pub value: Bytes,
}

impl Record {
    pub fn new(payload: impl Into<Bytes>) -> Record {
        Record { payload: payload.into(), ..Record::default() }
    }

    /// Records of one key go to one partition, in order.
    pub fn key(mut self, key: impl Into<Bytes>) -> Record {
        self.key = Some(key.into());
        self
    }

    pub fn header(mut self, name: impl Into<String>, value: impl Into<Bytes>) -> Record {
        self.headers.push(Header { name: name.into(), value: value.into() });
        self
    }

    pub fn event_time_ms(mut self, event_time_ms: u64) -> Record {
        self.event_time_ms = Some(event_time_ms);
        self
    }

    pub fn deliver_at_ms(mut self, deliver_at_ms: u64) -> Record {
        self.deliver_at_ms = Some(deliver_at_ms);
        self
    }

    /// Lends the record to `take` in the form in which batches take it.
    pub(crate) fn lend<R>(&self, now_ms: u64, take: impl FnOnce(&NewRecord<'_>) -> R) -> R {
        let record = NewRecord {
            event_time_ms: self.event_time_ms.unwrap_or(now_ms),
            deliver_at_ms: self.deliver_at_ms,
            key: self.key.as_deref(),
            headers: &[],
            payload: &self.payload,
        };
        if self.headers.is_empty() {
            return take(&record);
        }
        let headers: Vec<(&str, &[u8])> =
            self.headers.iter().map(|header| (header.name.as_str(), &header.value[..])).collect();
        take(&NewRecord { headers: &headers, ..record })
    }
}

/// What an application reads. Key and payload are slices of what was received, shared and not copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// 0-based place of the partition in its topic.
    pub partition: u32,
    pub offset: u64,
    pub event_time_ms: u64,
    /// When the node appended it, in ms since the epoch.
    pub append_time_ms: u64,
    pub deliver_at_ms: Option<u64>,
    pub key: Option<Bytes>,
    pub headers: Vec<Header>,
    pub payload: Bytes,
}

/// Unpacks the batches of one delivery or fetch.
#[derive(Debug)]
pub(crate) struct Unpacker {
    partition: u32,
    /// Messages below are skipped: the first batch may begin before what was asked for.
    position: u64,
    /// Batches, each padded to 16 bytes.
    rest: Bytes,
    unpacked_bytes_max: u32,
    messages: VecDeque<Message>,
}

impl Unpacker {
    pub fn new(partition: u32, position: u64, payload: Bytes, unpacked_bytes_max: u32) -> Unpacker {
        Unpacker { partition, position, rest: payload, unpacked_bytes_max, messages: VecDeque::new() }
    }

    /// The next message, or none at the end. Holds one unpacked batch at a time.
    pub fn next(&mut self) -> Result<Option<Message>, BatchError> {
        loop {
            if let Some(message) = self.messages.pop_front() {
                return Ok(Some(message));
            }
            if self.rest.is_empty() {
                return Ok(None);
            }
            self.unpack_batch()?;
        }
    }

    fn unpack_batch(&mut self) -> Result<(), BatchError> {
        let header = batch::header(&self.rest)?;
        let batch_bytes = header.batch_bytes as usize;
        let batch = self.rest.slice(..batch_bytes);
        let step = padded(batch_bytes).min(self.rest.len());
        self.rest = self.rest.slice(step..);
        if header.base_offset.saturating_add(u64::from(header.record_count)) <= self.position {
            return Ok(());
        }
        batch::check_crc(&header, &batch)?;
        batch::check_broker_fields(&batch)?;
        let records = batch::Records::open(&batch, self.unpacked_bytes_max)?;
        let shared = header.compression == Compression::None;
        for record in records.iter() {
            let record = record?;
            if record.offset < self.position {
                continue;
            }
            // What was packed lies in memory of its own that lives only as long as `records`.
            let own = |bytes: &[u8]| if shared { batch.slice_ref(bytes) } else { Bytes::copy_from_slice(bytes) };
            self.messages.push_back(Message {
                partition: self.partition,
                offset: record.offset,
                event_time_ms: record.event_time_ms,
                append_time_ms: header.append_time_ms,
                deliver_at_ms: record.deliver_at_ms,
                key: record.key.map(own),
                headers: record
                    .headers
                    .iter()
                    .map(|(name, value)| Header { name: name.to_owned(), value: own(value) })
                    .collect(),
                payload: own(record.payload),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use drava_protocol::batch::{Builder, Seal};
    use drava_protocol::frame::padding;

    fn payload(batches: &[(u64, Compression, &[Record])]) -> Bytes {
        let mut out = Vec::new();
        for (base_offset, compression, records) in batches {
            let mut builder = Builder::new(1 << 20);
            for record in *records {
                record.lend(5, |record| builder.push(record)).unwrap();
            }
            let start = out.len();
            builder.seal(&Seal { compression: *compression, ..Seal::default() }, &mut out);
            out[start..start + 16].copy_from_slice(&batch::broker_fields(*base_offset, 77));
            let bytes = out.len() - start;
            out.extend_from_slice(padding(bytes));
        }
        out.into()
    }

    fn all(mut unpacker: Unpacker) -> Result<Vec<Message>, BatchError> {
        std::iter::from_fn(|| unpacker.next().transpose()).collect()
    }

    #[test]
    fn messages_come_out_as_records_went_in() {
        let full = Record::new("payload").key("key").header("a", "1").header("b", "").event_time_ms(3).deliver_at_ms(9);
        let plain = Record::new(vec![7; 500]);
        let records = [full.clone(), plain.clone()];
        for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
            let messages = all(Unpacker::new(4, 0, payload(&[(20, compression, &records)]), 1 << 20)).unwrap();
            assert_eq!(messages.len(), 2);
            let first = &messages[0];
            assert_eq!((first.partition, first.offset, first.append_time_ms, first.event_time_ms), (4, 20, 77, 3));
            assert_eq!((&first.key, &first.headers, first.deliver_at_ms), (&full.key, &full.headers, Some(9)));
            assert_eq!(first.payload, full.payload);
            assert_eq!((messages[1].offset, messages[1].event_time_ms, &messages[1].key), (21, 5, &None));
            assert_eq!(messages[1].payload, plain.payload);
        }
    }

    #[test]
    fn messages_below_the_position_are_skipped() {
        let records = [Record::new("a"), Record::new("b"), Record::new("c")];
        let bytes = payload(&[(0, Compression::None, &records), (3, Compression::Lz4, &records)]);
        for position in 0..7 {
            let offsets: Vec<u64> =
                all(Unpacker::new(0, position, bytes.clone(), 1 << 20)).unwrap().iter().map(|m| m.offset).collect();
            assert_eq!(offsets, (position..6).collect::<Vec<_>>());
        }
    }

    #[test]
    fn damage_is_an_error_and_unpacking_is_bounded() {
        let records = [Record::new(vec![0; 100_000])];
        let bytes = payload(&[(0, Compression::Zstd, &records)]);
        assert!(matches!(all(Unpacker::new(0, 0, bytes.clone(), 50_000)), Err(BatchError::TooLarge { .. })));
        let mut damaged = bytes.to_vec();
        damaged[70] ^= 1;
        assert!(matches!(all(Unpacker::new(0, 0, damaged.into(), 1 << 20)), Err(BatchError::Checksum { .. })));
        assert!(matches!(all(Unpacker::new(0, 0, bytes.slice(..60), 1 << 20)), Err(BatchError::TooShort { .. })));
    }
}
