//! What a message carries so that its receiver can tell whether it is the right one, and batches that are stamped anew
//! rather than built anew.
//!
//! A payload is filler and, at its end, a stamp of [`STAMP_BYTES`]: stream (u64), sequence in the stream (u64), time of
//! sending in ns of the machine's monotonic clock (u64), CRC32C of all payload bytes before it (u32), [`MAGIC`].
//! With the stamp at the end, the CRC of the filler is computed once and only carried on over the stamp.

use drava_protocol::batch::{self, Builder, Compression, NewRecord, Seal};

pub const STAMP_BYTES: usize = 32;
pub const MAGIC: [u8; 4] = *b"DBn1";
/// Keys have one length, so that they can be written over.
pub const KEY_BYTES: usize = 8;
const KEY_LENGTH_BYTES: usize = 4;
const CRC_AT: usize = STAMP_BYTES - 8;

/// Who sent a message, the how-manieth it is, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub stream: u64,
    pub sequence: u64,
    pub sent_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PayloadError {
    #[error("the payload has no stamp of this load generator")]
    Foreign,
    #[error("the payload has checksum {computed:08x}; its stamp says {stored:08x}")]
    Checksum { stored: u32, computed: u32 },
}

/// Nanoseconds of the clock that all processes of the machine share and that never goes back.
pub fn clock_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Reads the stamp of a payload and checks the whole payload against it.
pub fn check(payload: &[u8]) -> Result<Stamp, PayloadError> {
    let Some((filler, stamp)) = payload.split_last_chunk::<STAMP_BYTES>() else {
        return Err(PayloadError::Foreign);
    };
    if stamp[CRC_AT + 4..] != MAGIC {
        return Err(PayloadError::Foreign);
    }
    let stored = u32::from_le_bytes([stamp[CRC_AT], stamp[CRC_AT + 1], stamp[CRC_AT + 2], stamp[CRC_AT + 3]]);
    let computed = crc32c::crc32c(&payload[..filler.len() + CRC_AT]);
    if stored != computed {
        return Err(PayloadError::Checksum { stored, computed });
    }
    Ok(Stamp { stream: u64_at(stamp, 0), sequence: u64_at(stamp, 8), sent_ns: u64_at(stamp, 16) })
}

/// Writes `stamp` at the end of a payload whose filler has `filler_crc`.
fn write_stamp(payload: &mut [u8], filler_crc: u32, stamp: &Stamp) {
    let start = payload.len() - STAMP_BYTES;
    let out = &mut payload[start..];
    out[0..8].copy_from_slice(&stamp.stream.to_le_bytes());
    out[8..16].copy_from_slice(&stamp.sequence.to_le_bytes());
    out[16..24].copy_from_slice(&stamp.sent_ns.to_le_bytes());
    let crc = crc32c::crc32c_append(filler_crc, &out[..CRC_AT]);
    out[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    out[CRC_AT + 4..].copy_from_slice(&MAGIC);
}

/// Text that packs about as well as records of an application do.
fn filler(bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes + 64);
    let mut number: u64 = 0x9E37_79B9_7F4A_7C15;
    while out.len() < bytes {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(format!("{{\"order\":{},\"item\":\"{:08x}\"}} ", number >> 44, number as u32).as_bytes());
    }
    out.truncate(bytes);
    out
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// At least [`STAMP_BYTES`].
    pub message_bytes: usize,
    /// Messages of a batch.
    pub batch: u32,
    pub keyed: bool,
    pub compression: Compression,
}

/// The batches of one stream.
#[derive(Debug)]
pub struct Batches {
    shape: Shape,
    seal: Seal,
    /// Without compression: a sealed batch, whose changing parts are written over.
    template: Vec<u8>,
    record_bytes: usize,
    filler: Vec<u8>,
    filler_crc: u32,
}

/// What differs from batch to batch.
#[derive(Clone, Copy, Debug)]
pub struct Next {
    pub stream: u64,
    /// Of the first message.
    pub sequence: u64,
    pub sent_ns: u64,
    /// In ms since the epoch.
    pub event_time_ms: u64,
}

impl Batches {
    /// Batches of `shape` by a producer (0: none) in its epoch.
    pub fn new(shape: Shape, producer: u64, producer_epoch: u32) -> Batches {
        assert!(STAMP_BYTES <= shape.message_bytes, "a message has at least {STAMP_BYTES} bytes");
        assert!(0 < shape.batch && shape.batch <= batch::RECORDS_MAX, "{} messages in a batch", shape.batch);
        let filler = filler(shape.message_bytes - STAMP_BYTES);
        let filler_crc = crc32c::crc32c(&filler);
        let seal = Seal { producer, producer_epoch, base_sequence: 0, compression: shape.compression };
        let mut payload = filler.clone();
        payload.resize(shape.message_bytes, 0);
        let key = [b'k'; KEY_BYTES];
        let record = NewRecord { payload: &payload, key: shape.keyed.then_some(&key[..]), ..NewRecord::default() };
        let mut template = Vec::new();
        let mut builder = Builder::new(usize::MAX);
        for _ in 0..shape.batch {
            builder.push(&record).expect("there is room");
        }
        builder.seal(&Seal { compression: Compression::None, ..seal }, &mut template);
        Batches { shape, seal, template, record_bytes: Builder::record_bytes(&record), filler, filler_crc }
    }

    /// The size of each batch, in bytes. None: it depends on how well the batch packs.
    pub fn batch_bytes(&self) -> Option<usize> {
        (self.shape.compression == Compression::None).then_some(self.template.len())
    }

    /// Appends the next batch to `out`. `key` is asked for each message in turn, when messages have keys.
    pub fn append(&self, next: &Next, mut key: impl FnMut() -> [u8; KEY_BYTES], out: &mut Vec<u8>) {
        if self.shape.compression != Compression::None {
            return self.append_packed(next, key, out);
        }
        let start = out.len();
        out.extend_from_slice(&self.template);
        let bytes = &mut out[start..];
        bytes[40..44].copy_from_slice(&self.seal.producer_epoch.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.base_sequence(next).to_le_bytes());
        bytes[56..64].copy_from_slice(&next.event_time_ms.to_le_bytes());
        for (i, record) in bytes[batch::HEADER_BYTES..].chunks_exact_mut(self.record_bytes).enumerate() {
            record[8..16].copy_from_slice(&next.event_time_ms.to_le_bytes());
            if self.shape.keyed {
                let at = batch::RECORD_HEADER_BYTES + KEY_LENGTH_BYTES;
                record[at..at + KEY_BYTES].copy_from_slice(&key());
            }
            write_stamp(record, self.filler_crc, &next.stamp(i));
        }
        let crc = crc32c::crc32c(&bytes[batch::CHECKED_FROM..]);
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    }

    fn append_packed(&self, next: &Next, mut key: impl FnMut() -> [u8; KEY_BYTES], out: &mut Vec<u8>) {
        let mut builder = Builder::new(usize::MAX);
        let mut payload = self.filler.clone();
        payload.resize(self.shape.message_bytes, 0);
        for i in 0..self.shape.batch as usize {
            write_stamp(&mut payload, self.filler_crc, &next.stamp(i));
            let key = self.shape.keyed.then(&mut key);
            let record = NewRecord {
                event_time_ms: next.event_time_ms,
                key: key.as_ref().map(|key| &key[..]),
                payload: &payload,
                ..NewRecord::default()
            };
            builder.push(&record).expect("there is room");
        }
        builder.seal(&Seal { base_sequence: self.base_sequence(next), ..self.seal }, out);
    }

    /// Without a producer there are no sequences.
    fn base_sequence(&self, next: &Next) -> u64 {
        if self.seal.producer == 0 { 0 } else { next.sequence }
    }
}

impl Next {
    fn stamp(&self, index: usize) -> Stamp {
        Stamp { stream: self.stream, sequence: self.sequence + index as u64, sent_ns: self.sent_ns }
    }
}

fn u64_at(bytes: &[u8; STAMP_BYTES], position: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[position..position + 8]);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use drava_protocol::batch::Records;

    const NEXT: Next = Next { stream: 7, sequence: 40, sent_ns: 1234, event_time_ms: 99 };

    fn shape(keyed: bool, compression: Compression) -> Shape {
        Shape { message_bytes: 100, batch: 5, keyed, compression }
    }

    #[test]
    fn a_stamped_batch_is_a_batch_as_the_builder_makes_it() {
        for keyed in [false, true] {
            for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
                let batches = Batches::new(shape(keyed, compression), 3, 2);
                let mut bytes = vec![1, 2, 3];
                let mut number = 0u64;
                let mut key = || {
                    number += 1;
                    number.to_le_bytes()
                };
                batches.append(&NEXT, &mut key, &mut bytes);
                let bytes = &bytes[3..];
                let header = batch::check(bytes).unwrap();
                assert_eq!(
                    (header.producer, header.producer_epoch, header.base_sequence, header.record_count),
                    (3, 2, 40, 5)
                );
                assert_eq!(header.max_timestamp_ms, 99);
                assert_eq!(header.compression, compression);
                let records = Records::open(bytes, 1 << 20).unwrap();
                for (i, record) in records.iter().enumerate() {
                    let record = record.unwrap();
                    let i = i as u64;
                    assert_eq!(record.key, keyed.then_some(&(i + 1).to_le_bytes()[..]));
                    assert_eq!((record.event_time_ms, record.payload.len()), (99, 100));
                    assert_eq!(check(record.payload), Ok(Stamp { stream: 7, sequence: 40 + i, sent_ns: 1234 }));
                }
                if let Some(batch_bytes) = batches.batch_bytes() {
                    assert_eq!(batch_bytes, bytes.len());
                }
            }
        }
    }

    #[test]
    fn a_batch_without_producer_has_no_sequence() {
        let batches = Batches::new(shape(false, Compression::None), 0, 0);
        let mut bytes = Vec::new();
        batches.append(&NEXT, || [0; KEY_BYTES], &mut bytes);
        assert_eq!(batch::check(&bytes).unwrap().base_sequence, 0);
    }

    #[test]
    fn every_changed_bit_of_a_payload_is_seen() {
        let batches = Batches::new(Shape { batch: 1, ..shape(false, Compression::None) }, 0, 0);
        let mut bytes = Vec::new();
        batches.append(&NEXT, || [0; KEY_BYTES], &mut bytes);
        let payload = bytes[bytes.len() - 100..].to_vec();
        check(&payload).unwrap();
        for bit in 0..payload.len() * 8 {
            let mut damaged = payload.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            check(&damaged).unwrap_err();
        }
        assert_eq!(check(b"hello"), Err(PayloadError::Foreign));
    }
}
