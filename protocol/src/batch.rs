//! Batches: one layout from the producer's memory to the disk and to the consumer.
//!
//! A batch is a header of [`HEADER_BYTES`] and its records, compressed or not. The first 16 bytes belong to the broker:
//! they are outside the checksum and have a check of their own. Everything from [`CHECKED_FROM`] on is the producer's and
//! is never changed.
//! Source: `protocol/README.md`, "Batch".

use crate::error::ErrorCode;

pub const HEADER_BYTES: usize = 64;
/// The broker's fields: base offset, append time and their check.
pub const BROKER_BYTES: usize = 16;
/// Where the check begins: what comes before it is checked.
const BROKER_CHECK_AT: usize = 14;
/// An append time has 48 bits, which end in the year 10889.
pub const APPEND_TIME_MS_MAX: u64 = (1 << 48) - 1;
/// The checksum covers the batch from here to its end.
pub const CHECKED_FROM: usize = 24;
pub const VERSION: u8 = 1;
pub const RECORD_HEADER_BYTES: usize = 16;
/// No batch is larger, packed or unpacked, whatever a builder is asked for.
pub const BATCH_BYTES_MAX: usize = 1 << 30;
/// Records of one batch.
pub const RECORDS_MAX: u32 = 1 << 20;

const LZ4_RATIO_MAX: u64 = 255;
const FLAG_KEY: u16 = 1;
const FLAG_DELIVER_AT: u16 = 2;
const FLAGS_KNOWN: u16 = FLAG_KEY | FLAG_DELIVER_AT;

/// How the records of a batch are packed. The broker passes it through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Compression {
    #[default]
    None = 0,
    /// One LZ4 block.
    Lz4 = 1,
    /// One Zstandard frame.
    Zstd = 2,
}

impl Compression {
    fn from_number(number: u8) -> Option<Compression> {
        match number {
            0 => Some(Compression::None),
            1 => Some(Compression::Lz4),
            2 => Some(Compression::Zstd),
            _ => None,
        }
    }
}

/// The header of a batch, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Broker-owned: offset of the first message.
    pub base_offset: u64,
    /// Broker-owned: when the batch was appended, in ms since the epoch.
    pub append_time_ms: u64,
    /// The whole batch, header included.
    pub batch_bytes: u32,
    pub crc: u32,
    pub compression: Compression,
    pub record_count: u32,
    /// The record area after decompression, in bytes.
    pub records_bytes: u32,
    /// 0: no idempotence.
    pub producer: u64,
    pub producer_epoch: u32,
    /// Sequence of the first message; counts messages, not batches.
    pub base_sequence: u64,
    /// The highest event time of the records, in ms since the epoch.
    pub max_timestamp_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    #[error("{have} bytes are too few for a batch header of {HEADER_BYTES}")]
    TooShort { have: usize },
    #[error("the batch says {said} bytes, its frame holds {have}")]
    Length { said: u32, have: usize },
    #[error("batch version {0} is not known; this side knows {VERSION}")]
    Version(u8),
    #[error("compression {0} is not known")]
    Compression(u8),
    #[error("reserved batch header bytes are not zero")]
    Reserved,
    #[error("{0} records in a batch; 1 to {RECORDS_MAX} are allowed, and no more than its bytes have room for")]
    RecordCount(u32),
    #[error("a batch without compression says {said} bytes of records and holds {have}")]
    RecordsBytes { said: u32, have: u32 },
    #[error("sequence {base} and {count} records pass the end of all sequences")]
    Sequence { base: u64, count: u32 },
    #[error("the batch has checksum {computed:08x}; its header says {stored:08x}")]
    Checksum { stored: u32, computed: u32 },
    #[error("the batch's offset and append time are not what the broker wrote")]
    BrokerFields,
    #[error("the records do not decompress to the {said} bytes that the header says")]
    Decompress { said: u32 },
    #[error("the records unpack to {said} bytes; at most {limit} are accepted")]
    TooLarge { said: u32, limit: u32 },
    #[error("record {index} of the batch is malformed")]
    Record { index: u32 },
    #[error("the batch has no room for {0} bytes")]
    Full(usize),
}

impl BatchError {
    pub fn code(&self) -> ErrorCode {
        match self {
            BatchError::Checksum { .. } | BatchError::BrokerFields => ErrorCode::BatchChecksum,
            BatchError::TooLarge { .. } | BatchError::Full(_) => ErrorCode::BatchTooLarge,
            BatchError::TooShort { .. }
            | BatchError::Length { .. }
            | BatchError::Version(_)
            | BatchError::Compression(_)
            | BatchError::Reserved
            | BatchError::RecordCount(_)
            | BatchError::RecordsBytes { .. }
            | BatchError::Sequence { .. }
            | BatchError::Decompress { .. }
            | BatchError::Record { .. } => ErrorCode::MalformedBatch,
        }
    }
}

/// Reads and checks the header of the batch at the start of `bytes`, which may go on after it. Does not check the CRC.
pub fn header(bytes: &[u8]) -> Result<Header, BatchError> {
    let Some(h) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Err(BatchError::TooShort { have: bytes.len() });
    };
    let batch_bytes = u32_at(h, 16);
    if (batch_bytes as usize) < HEADER_BYTES || batch_bytes as usize > bytes.len() {
        return Err(BatchError::Length { said: batch_bytes, have: bytes.len() });
    }
    if h[24] != VERSION {
        return Err(BatchError::Version(h[24]));
    }
    let compression = Compression::from_number(h[25]).ok_or(BatchError::Compression(h[25]))?;
    if h[26..28] != [0, 0] {
        return Err(BatchError::Reserved);
    }
    let record_count = u32_at(h, 28);
    if record_count == 0 || record_count > RECORDS_MAX {
        return Err(BatchError::RecordCount(record_count));
    }
    let records_bytes = u32_at(h, 44);
    let area = batch_bytes - HEADER_BYTES as u32;
    if compression == Compression::None && records_bytes != area {
        return Err(BatchError::RecordsBytes { said: records_bytes, have: area });
    }
    // The broker does not look at the records, so a batch of a few bytes must not be able to use up a million offsets.
    if u64::from(records_bytes) < u64::from(record_count) * RECORD_HEADER_BYTES as u64 {
        return Err(BatchError::RecordCount(record_count));
    }
    let base_sequence = u64_at(h, 48);
    if base_sequence.checked_add(u64::from(record_count)).is_none() {
        return Err(BatchError::Sequence { base: base_sequence, count: record_count });
    }
    Ok(Header {
        base_offset: u64_at(h, 0),
        append_time_ms: append_time_ms(h),
        batch_bytes,
        crc: u32_at(h, 20),
        compression,
        record_count,
        producer: u64_at(h, 32),
        producer_epoch: u32_at(h, 40),
        records_bytes,
        base_sequence,
        max_timestamp_ms: u64_at(h, 56),
    })
}

/// Reads and checks one batch that fills `bytes` to the end, its CRC included. This is what the broker does with each
/// batch before it takes it.
pub fn check(bytes: &[u8]) -> Result<Header, BatchError> {
    let header = header(bytes)?;
    if header.batch_bytes as usize != bytes.len() {
        return Err(BatchError::Length { said: header.batch_bytes, have: bytes.len() });
    }
    check_crc(&header, bytes)?;
    Ok(header)
}

/// As [`check`], for a batch that a broker has appended: its broker's fields are checked, too.
pub fn check_appended(bytes: &[u8]) -> Result<Header, BatchError> {
    let header = check(bytes)?;
    check_broker_fields(bytes)?;
    Ok(header)
}

/// Compares the CRC of `bytes`, the batch of `header`. Panics if they are shorter than that header says.
pub fn check_crc(header: &Header, bytes: &[u8]) -> Result<(), BatchError> {
    let computed = crc32c::crc32c(&bytes[CHECKED_FROM..header.batch_bytes as usize]);
    if computed != header.crc {
        return Err(BatchError::Checksum { stored: header.crc, computed });
    }
    Ok(())
}

/// The 16 bytes that the broker writes over the start of a batch. A later time than [`APPEND_TIME_MS_MAX`] becomes that.
pub fn broker_fields(base_offset: u64, append_time_ms: u64) -> [u8; BROKER_BYTES] {
    let mut fields = [0; BROKER_BYTES];
    fields[..8].copy_from_slice(&base_offset.to_le_bytes());
    fields[8..].copy_from_slice(&append_time_ms.min(APPEND_TIME_MS_MAX).to_le_bytes());
    let check = broker_check(&fields);
    fields[BROKER_CHECK_AT..].copy_from_slice(&check);
    fields
}

/// Checks the fields that the broker wrote over the start of `bytes`. A producer's own batch has none.
pub fn check_broker_fields(bytes: &[u8]) -> Result<(), BatchError> {
    let Some(fields) = bytes.first_chunk::<BROKER_BYTES>() else {
        return Err(BatchError::TooShort { have: bytes.len() });
    };
    if fields[BROKER_CHECK_AT..] == broker_check(fields) { Ok(()) } else { Err(BatchError::BrokerFields) }
}

/// The CRC32C of offset and append time, folded to 16 bits.
fn broker_check(fields: &[u8; BROKER_BYTES]) -> [u8; 2] {
    let crc = crc32c::crc32c(&fields[..BROKER_CHECK_AT]);
    ((crc >> 16) as u16 ^ crc as u16).to_le_bytes()
}

/// Append time in the batch at the start of `bytes`. Panics if they are fewer than [`BROKER_BYTES`].
pub fn append_time_ms(bytes: &[u8]) -> u64 {
    let mut time_ms = [0; 8];
    time_ms[..6].copy_from_slice(&bytes[8..BROKER_CHECK_AT]);
    u64::from_le_bytes(time_ms)
}

/// A message where it lies in its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    pub offset: u64,
    pub event_time_ms: u64,
    /// Not to be delivered before this time, in ms since the epoch.
    pub deliver_at_ms: Option<u64>,
    pub key: Option<&'a [u8]>,
    pub headers: RecordHeaders<'a>,
    pub payload: &'a [u8],
}

/// What a producer puts into a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct NewRecord<'a> {
    pub event_time_ms: u64,
    pub deliver_at_ms: Option<u64>,
    pub key: Option<&'a [u8]>,
    pub headers: &'a [(&'a str, &'a [u8])],
    pub payload: &'a [u8],
}

/// The headers of a record, checked when the record was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeaders<'a> {
    count: u16,
    bytes: &'a [u8],
}

impl<'a> RecordHeaders<'a> {
    pub fn len(&self) -> usize {
        self.count as usize
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Names and values in the order in which the producer gave them.
    pub fn iter(&self) -> impl Iterator<Item = NameAndValue<'a>> + use<'a> {
        let mut rest = self.bytes;
        (0..self.count).map_while(move |_| {
            let (pair, after) = record_header(rest)?;
            rest = after;
            Some(pair)
        })
    }
}

/// Of a record's header.
pub type NameAndValue<'a> = (&'a str, &'a [u8]);

/// The header at the start of `bytes`, and what follows it.
fn record_header(bytes: &[u8]) -> Option<(NameAndValue<'_>, &[u8])> {
    let (lengths, rest) = bytes.split_first_chunk::<6>()?;
    let name_bytes = u16::from_le_bytes([lengths[0], lengths[1]]) as usize;
    let value_bytes = u32::from_le_bytes([lengths[2], lengths[3], lengths[4], lengths[5]]) as usize;
    let (name, rest) = rest.split_at_checked(name_bytes)?;
    let (value, rest) = rest.split_at_checked(value_bytes)?;
    Some(((std::str::from_utf8(name).ok()?, value), rest))
}

/// Collects records and makes a batch of them.
#[derive(Debug)]
pub struct Builder {
    /// Header, then records.
    bytes: Vec<u8>,
    records: u32,
    bytes_max: usize,
    max_timestamp_ms: u64,
    packer: Packer,
}

/// Packs record areas; keeps its buffers, because a Zstandard context alone takes more than a megabyte.
#[derive(Default)]
struct Packer {
    zstd: Option<zstd::bulk::Compressor<'static>>,
    packed: Vec<u8>,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

impl Packer {
    /// The packed records, or nothing where packing does not pay: it would cost the consumer for nothing.
    fn pack(&mut self, compression: Compression, records: &[u8]) -> Option<&[u8]> {
        let packed_bytes = match compression {
            Compression::None => return None,
            Compression::Lz4 => {
                self.packed.resize(lz4_flex::block::get_maximum_output_size(records.len()), 0);
                lz4_flex::block::compress_into(records, &mut self.packed).expect("the buffer holds the worst case")
            }
            Compression::Zstd => {
                self.packed.resize(zstd::zstd_safe::compress_bound(records.len()), 0);
                let zstd = self.zstd.get_or_insert_with(|| {
                    zstd::bulk::Compressor::new(0).expect("the default level of Zstandard is a valid one")
                });
                zstd.compress_to_buffer(records, self.packed.as_mut_slice()).expect("the buffer holds the worst case")
            }
        };
        if packed_bytes < records.len() { Some(&self.packed[..packed_bytes]) } else { None }
    }
}

/// What the producer writes into the header of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seal {
    pub producer: u64,
    pub producer_epoch: u32,
    pub base_sequence: u64,
    pub compression: Compression,
}

impl Builder {
    /// A builder of batches of at most `bytes_max` bytes, header included, and never more than [`BATCH_BYTES_MAX`].
    pub fn new(bytes_max: usize) -> Builder {
        Builder {
            bytes: vec![0; HEADER_BYTES],
            records: 0,
            // Every length in a batch is a u32.
            bytes_max: bytes_max.min(BATCH_BYTES_MAX),
            max_timestamp_ms: 0,
            packer: Packer::default(),
        }
    }

    pub fn record_count(&self) -> u32 {
        self.records
    }

    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// The size that the batch has now, uncompressed, header included.
    pub fn batch_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The bytes that `record` takes in a batch.
    pub fn record_bytes(record: &NewRecord<'_>) -> usize {
        let headers: usize = record.headers.iter().map(|(name, value)| 6 + name.len() + value.len()).sum();
        RECORD_HEADER_BYTES
            + record.deliver_at_ms.map_or(0, |_| 8)
            + record.key.map_or(0, |key| 4 + key.len())
            + headers
            + record.payload.len()
    }

    /// Adds a record. `Full` when the batch would pass its size or count: seal it and start the next. A record that is
    /// `Full` in an empty batch is too large for any. `Record` when it has over 65535 headers or a longer header name.
    pub fn push(&mut self, record: &NewRecord<'_>) -> Result<(), BatchError> {
        let size = Self::record_bytes(record);
        if self.bytes.len() + size > self.bytes_max || self.records == RECORDS_MAX {
            return Err(BatchError::Full(size));
        }
        if record.headers.len() > u16::MAX as usize
            || record.headers.iter().any(|(name, _)| name.len() > u16::MAX as usize)
        {
            return Err(BatchError::Record { index: self.records });
        }
        let mut flags = 0;
        if record.key.is_some() {
            flags |= FLAG_KEY;
        }
        if record.deliver_at_ms.is_some() {
            flags |= FLAG_DELIVER_AT;
        }
        let out = &mut self.bytes;
        out.extend_from_slice(&(size as u32).to_le_bytes());
        out.extend_from_slice(&flags.to_le_bytes());
        out.extend_from_slice(&(record.headers.len() as u16).to_le_bytes());
        out.extend_from_slice(&record.event_time_ms.to_le_bytes());
        if let Some(at) = record.deliver_at_ms {
            out.extend_from_slice(&at.to_le_bytes());
        }
        if let Some(key) = record.key {
            out.extend_from_slice(&(key.len() as u32).to_le_bytes());
            out.extend_from_slice(key);
        }
        for (name, value) in record.headers {
            out.extend_from_slice(&(name.len() as u16).to_le_bytes());
            out.extend_from_slice(&(value.len() as u32).to_le_bytes());
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(value);
        }
        out.extend_from_slice(record.payload);
        self.records += 1;
        self.max_timestamp_ms = self.max_timestamp_ms.max(record.event_time_ms);
        Ok(())
    }

    /// Appends the finished batch to `out` and empties the builder. Panics if it is empty.
    pub fn seal(&mut self, seal: &Seal, out: &mut Vec<u8>) {
        assert!(0 < self.records, "a batch holds at least one record");
        let start = out.len();
        let records = &self.bytes[HEADER_BYTES..];
        let records_bytes = records.len() as u32;
        out.extend_from_slice(&[0; HEADER_BYTES]);
        let compression = match self.packer.pack(seal.compression, records) {
            Some(packed) => {
                out.extend_from_slice(packed);
                seal.compression
            }
            None => {
                out.extend_from_slice(records);
                Compression::None
            }
        };
        let batch_bytes = (out.len() - start) as u32;
        let h = &mut out[start..];
        h[16..20].copy_from_slice(&batch_bytes.to_le_bytes());
        h[24] = VERSION;
        h[25] = compression as u8;
        h[28..32].copy_from_slice(&self.records.to_le_bytes());
        h[32..40].copy_from_slice(&seal.producer.to_le_bytes());
        h[40..44].copy_from_slice(&seal.producer_epoch.to_le_bytes());
        h[44..48].copy_from_slice(&records_bytes.to_le_bytes());
        h[48..56].copy_from_slice(&seal.base_sequence.to_le_bytes());
        h[56..64].copy_from_slice(&self.max_timestamp_ms.to_le_bytes());
        let crc = crc32c::crc32c(&h[CHECKED_FROM..]);
        h[20..24].copy_from_slice(&crc.to_le_bytes());
        self.bytes.truncate(HEADER_BYTES);
        self.records = 0;
        self.max_timestamp_ms = 0;
    }
}

/// The unpacked records of a batch.
#[derive(Debug)]
pub struct Records<'a> {
    header: Header,
    area: std::borrow::Cow<'a, [u8]>,
}

impl<'a> Records<'a> {
    /// Unpacks the batch at the start of `bytes`. Allocates at most `unpacked_bytes_max`, and nothing without
    /// compression.
    pub fn open(bytes: &'a [u8], unpacked_bytes_max: u32) -> Result<Records<'a>, BatchError> {
        let header = header(bytes)?;
        let area = &bytes[HEADER_BYTES..header.batch_bytes as usize];
        let said = header.records_bytes;
        if said > unpacked_bytes_max {
            return Err(BatchError::TooLarge { said, limit: unpacked_bytes_max });
        }
        let unpacked = match header.compression {
            Compression::None => return Ok(Records { header, area: area.into() }),
            // LZ4 packs at most 255 bytes into one. A batch that claims more has nothing to allocate for.
            Compression::Lz4 if (area.len() as u64 * LZ4_RATIO_MAX) < u64::from(said) => None,
            Compression::Lz4 => lz4_flex::block::decompress(area, said as usize).ok(),
            Compression::Zstd => zstd::bulk::decompress(area, said as usize).ok(),
        };
        let area = unpacked.filter(|area| area.len() == said as usize).ok_or(BatchError::Decompress { said })?.into();
        Ok(Records { header, area })
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The records in order. Ends after the first error.
    pub fn iter(&self) -> RecordIter<'_> {
        RecordIter { rest: &self.area, index: 0, header: &self.header, failed: false }
    }
}

#[derive(Debug)]
pub struct RecordIter<'a> {
    rest: &'a [u8],
    index: u32,
    header: &'a Header,
    failed: bool,
}

impl<'a> Iterator for RecordIter<'a> {
    type Item = Result<Record<'a>, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        if self.index == self.header.record_count {
            if self.rest.is_empty() {
                return None;
            }
            self.failed = true;
            return Some(Err(BatchError::Record { index: self.index }));
        }
        let record = record(self.rest, self.header.base_offset.wrapping_add(self.index as u64));
        let item = record.ok_or(BatchError::Record { index: self.index }).map(|(record, rest)| {
            self.rest = rest;
            record
        });
        self.index += 1;
        self.failed = item.is_err();
        Some(item)
    }
}

fn record(bytes: &[u8], offset: u64) -> Option<(Record<'_>, &[u8])> {
    let head = bytes.first_chunk::<RECORD_HEADER_BYTES>()?;
    let size = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let flags = u16::from_le_bytes([head[4], head[5]]);
    let header_count = u16::from_le_bytes([head[6], head[7]]);
    let event_time_ms =
        u64::from_le_bytes([head[8], head[9], head[10], head[11], head[12], head[13], head[14], head[15]]);
    if flags & !FLAGS_KNOWN != 0 || size < RECORD_HEADER_BYTES {
        return None;
    }
    let (whole, after) = bytes.split_at_checked(size)?;
    let mut rest = &whole[RECORD_HEADER_BYTES..];
    let mut deliver_at_ms = None;
    if flags & FLAG_DELIVER_AT != 0 {
        let (at, tail) = rest.split_first_chunk::<8>()?;
        deliver_at_ms = Some(u64::from_le_bytes(*at));
        rest = tail;
    }
    let mut key = None;
    if flags & FLAG_KEY != 0 {
        let (length, tail) = rest.split_first_chunk::<4>()?;
        let (found, tail) = tail.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        key = Some(found);
        rest = tail;
    }
    let headers_start = rest;
    for _ in 0..header_count {
        (_, rest) = record_header(rest)?;
    }
    let headers = RecordHeaders { count: header_count, bytes: &headers_start[..headers_start.len() - rest.len()] };
    Some((Record { offset, event_time_ms, deliver_at_ms, key, headers, payload: rest }, after))
}

fn u32_at(bytes: &[u8; HEADER_BYTES], position: usize) -> u32 {
    u32::from_le_bytes([bytes[position], bytes[position + 1], bytes[position + 2], bytes[position + 3]])
}

fn u64_at(bytes: &[u8; HEADER_BYTES], position: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[position..position + 8]);
    u64::from_le_bytes(value)
}
