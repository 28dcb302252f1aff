//! Batches under arbitrary and mutated bytes, and the way from records to a batch and back.

use drava_protocol::batch::{
    self, APPEND_TIME_MS_MAX, BATCH_BYTES_MAX, BROKER_BYTES, BatchError, Builder, CHECKED_FROM, Compression,
    HEADER_BYTES, NewRecord, RECORD_HEADER_BYTES, RECORDS_MAX, Records, Seal, broker_fields,
};
use drava_protocol::error::ErrorCode;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

const LIMIT: u32 = 1 << 20;

#[derive(Clone, Debug)]
struct Given {
    event_time_ms: u64,
    deliver_at_ms: Option<u64>,
    key: Option<Vec<u8>>,
    headers: Vec<(String, Vec<u8>)>,
    payload: Vec<u8>,
}

fn given() -> impl Strategy<Value = Given> {
    (
        any::<u64>(),
        option::of(any::<u64>()),
        option::of(vec(any::<u8>(), 0..20)),
        vec(("[a-zé]{0,10}", vec(any::<u8>(), 0..20)), 0..4),
        // Repeated bytes, so that packing pays at times.
        prop_oneof![vec(any::<u8>(), 0..100), (any::<u8>(), 0..400usize).prop_map(|(byte, count)| vec![byte; count])],
    )
        .prop_map(|(event_time_ms, deliver_at_ms, key, headers, payload)| Given {
            event_time_ms,
            deliver_at_ms,
            key,
            headers,
            payload,
        })
}

fn seal() -> impl Strategy<Value = Seal> {
    let compression = select(&[Compression::None, Compression::Lz4, Compression::Zstd][..]);
    (any::<(u64, u32)>(), 0..u64::MAX - u64::from(RECORDS_MAX), compression).prop_map(
        |((producer, producer_epoch), base_sequence, compression)| Seal {
            producer,
            producer_epoch,
            base_sequence,
            compression,
        },
    )
}

fn build(builder: &mut Builder, records: &[Given], seal: &Seal) -> Vec<u8> {
    for record in records {
        let headers: Vec<_> = record.headers.iter().map(|(name, value)| (name.as_str(), value.as_slice())).collect();
        let new = NewRecord {
            event_time_ms: record.event_time_ms,
            deliver_at_ms: record.deliver_at_ms,
            key: record.key.as_deref(),
            headers: &headers,
            payload: &record.payload,
        };
        let before = builder.batch_bytes();
        builder.push(&new).expect("it fits");
        assert_eq!(builder.batch_bytes(), before + Builder::record_bytes(&new));
    }
    let mut out = Vec::new();
    builder.seal(seal, &mut out);
    out
}

/// Reads all that a batch holds, as a consumer would, whatever its bytes.
fn read(bytes: &[u8]) -> Result<usize, BatchError> {
    let records = Records::open(bytes, LIMIT)?;
    let mut read = 0;
    for record in records.iter() {
        let record = record?;
        assert_eq!(record.headers.iter().count(), record.headers.len());
        read += 1;
    }
    Ok(read)
}

#[test]
fn a_flipped_bit_in_the_brokers_fields_is_found() {
    for (offset, time_ms) in [(0, 0), (1000, 1_700_000_000_123), (u64::MAX, u64::MAX)] {
        let good = broker_fields(offset, time_ms);
        assert_eq!(batch::check_broker_fields(&good), Ok(()));
        for bit in 0..8 * BROKER_BYTES {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(batch::check_broker_fields(&bad), Err(BatchError::BrokerFields), "bit {bit}");
        }
    }
    assert_eq!(batch::check_broker_fields(&[0; BROKER_BYTES]), Err(BatchError::BrokerFields), "a producer's own batch");
}

/// Makes the checksum right again, as an attacker would.
fn sign(bytes: &mut [u8]) {
    let crc = crc32c::crc32c(&bytes[CHECKED_FROM..]);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
}

proptest! {
    #[test]
    fn records_come_back_as_they_were_given(
        first in vec(given(), 1..10), second in vec(given(), 1..10), seal in seal(), base_offset: u64, append_time_ms in 0..=APPEND_TIME_MS_MAX,
    ) {
        // The builder is used twice: nothing of the first batch may be left in the second.
        let mut builder = Builder::new(1 << 20);
        build(&mut builder, &first, &seal);
        prop_assert!(builder.is_empty());
        let mut bytes = build(&mut builder, &second, &seal);
        bytes[..BROKER_BYTES].copy_from_slice(&broker_fields(base_offset, append_time_ms));

        let header = batch::check(&bytes).expect("a good batch");
        prop_assert_eq!((header.base_offset, header.append_time_ms), (base_offset, append_time_ms));
        prop_assert_eq!(batch::check_appended(&bytes), Ok(header));
        prop_assert_eq!((header.producer, header.producer_epoch), (seal.producer, seal.producer_epoch));
        prop_assert_eq!(header.base_sequence, seal.base_sequence);
        prop_assert_eq!(header.record_count as usize, second.len());
        prop_assert_eq!(Some(header.max_timestamp_ms), second.iter().map(|record| record.event_time_ms).max());
        prop_assert!(header.compression == seal.compression || header.compression == Compression::None);

        let records = Records::open(&bytes, LIMIT).expect("a good batch");
        let read: Vec<_> = records.iter().collect::<Result<_, _>>().expect("good records");
        prop_assert_eq!(read.len(), second.len());
        for (index, (record, given)) in read.iter().zip(&second).enumerate() {
            prop_assert_eq!(record.offset, base_offset.wrapping_add(index as u64));
            prop_assert_eq!(record.event_time_ms, given.event_time_ms);
            prop_assert_eq!(record.deliver_at_ms, given.deliver_at_ms);
            prop_assert_eq!(record.key, given.key.as_deref());
            prop_assert_eq!(record.payload, &given.payload[..]);
            prop_assert_eq!(record.headers.len(), given.headers.len());
            prop_assert!(record.headers.iter().eq(given.headers.iter().map(|(n, v)| (n.as_str(), v.as_slice()))));
        }
    }

    #[test]
    fn any_changed_bit_that_the_producer_owns_is_noticed(records in vec(given(), 1..5), seal in seal(), at: Index, bit in 0..8u8) {
        let mut bytes = build(&mut Builder::new(1 << 20), &records, &seal);
        // The length and the CRC itself lie just before what the CRC covers.
        let from = BROKER_BYTES;
        let at = from + at.index(bytes.len() - from);
        bytes[at] ^= 1 << bit;
        prop_assert!(batch::check(&bytes).is_err());
    }

    #[test]
    fn the_broker_may_write_its_fields(records in vec(given(), 1..5), seal in seal(), fields: [u8; BROKER_BYTES]) {
        let mut bytes = build(&mut Builder::new(1 << 20), &records, &seal);
        bytes[..BROKER_BYTES].copy_from_slice(&fields);
        prop_assert!(batch::check(&bytes).is_ok());
    }

    #[test]
    fn mutated_batches_are_refused_or_read_safely(
        records in vec(given(), 1..5), seal in seal(), changes in vec((any::<Index>(), any::<u8>()), 1..8), signed: bool,
    ) {
        let mut bytes = build(&mut Builder::new(1 << 20), &records, &seal);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if signed {
            sign(&mut bytes);
        }
        let _ = batch::check(&bytes);
        if let Ok(count) = read(&bytes) {
            prop_assert_eq!(count as u32, batch::header(&bytes).expect("it was read").record_count);
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused_or_read_safely(bytes in vec(any::<u8>(), 0..400)) {
        let _ = batch::check(&bytes);
        let _ = read(&bytes);
    }

    #[test]
    fn a_truncated_batch_is_refused(records in vec(given(), 1..3), seal in seal()) {
        let bytes = build(&mut Builder::new(1 << 20), &records, &seal);
        for have in 0..bytes.len() {
            prop_assert!(batch::check(&bytes[..have]).is_err());
            prop_assert!(Records::open(&bytes[..have], LIMIT).is_err());
        }
    }

    #[test]
    fn a_batch_never_passes_its_limit(records in vec(given(), 1..20), bytes_max in 0..2000usize) {
        let mut builder = Builder::new(bytes_max);
        for record in &records {
            let new = NewRecord { key: record.key.as_deref(), payload: &record.payload, ..NewRecord::default() };
            let room = bytes_max.checked_sub(builder.batch_bytes());
            match builder.push(&new) {
                Ok(()) => prop_assert!(builder.batch_bytes() <= bytes_max),
                Err(BatchError::Full(size)) => prop_assert!(room.is_none_or(|room| room < size)),
                Err(other) => return Err(TestCaseError::fail(other.to_string())),
            }
        }
    }
}

fn small(compression: Compression) -> Vec<u8> {
    let mut builder = Builder::new(4096);
    builder.push(&NewRecord { payload: &[b'a'; 1000], ..NewRecord::default() }).expect("it fits");
    let mut out = Vec::new();
    builder.seal(&Seal { compression, ..Seal::default() }, &mut out);
    assert_eq!(batch::check(&out).expect("good").compression, compression);
    out
}

#[test]
fn a_batch_that_unpacks_beyond_the_limit_is_refused_before_it_is_unpacked() {
    for compression in [Compression::Lz4, Compression::Zstd] {
        let mut bytes = small(compression);
        bytes[44..48].copy_from_slice(&u32::MAX.to_le_bytes());
        sign(&mut bytes);
        assert_eq!(Records::open(&bytes, LIMIT).unwrap_err(), BatchError::TooLarge { said: u32::MAX, limit: LIMIT });
    }
}

#[test]
fn a_batch_that_unpacks_to_another_size_than_it_says_is_refused() {
    for compression in [Compression::Lz4, Compression::Zstd] {
        for said in [16u32, 1015, 1017, LIMIT] {
            let mut bytes = small(compression);
            bytes[44..48].copy_from_slice(&said.to_le_bytes());
            sign(&mut bytes);
            assert_eq!(Records::open(&bytes, LIMIT).unwrap_err(), BatchError::Decompress { said });
        }
    }
}

#[test]
fn a_batch_has_room_for_the_records_that_it_counts() {
    let mut bytes = small(Compression::None);
    for (count, good) in [(0, false), (1, true), (63, true), (64, false), (RECORDS_MAX, false), (u32::MAX, false)] {
        bytes[28..32].copy_from_slice(&u32::to_le_bytes(count));
        sign(&mut bytes);
        let checked = batch::check(&bytes);
        assert_eq!(checked.is_ok(), good, "{count} records in 1016 bytes: {checked:?}");
    }
}

#[test]
fn sequences_do_not_pass_their_end() {
    let mut bytes = small(Compression::None);
    for (base, good) in [(u64::MAX - 1, true), (u64::MAX, false)] {
        bytes[48..56].copy_from_slice(&base.to_le_bytes());
        sign(&mut bytes);
        assert_eq!(batch::check(&bytes).is_ok(), good);
    }
}

#[test]
fn a_batch_counts_its_records_up_to_the_limit() {
    let mut builder = Builder::new(usize::MAX);
    for _ in 0..RECORDS_MAX {
        builder.push(&NewRecord::default()).expect("there is room");
    }
    assert_eq!(builder.push(&NewRecord::default()), Err(BatchError::Full(RECORD_HEADER_BYTES)));
    let mut out = Vec::new();
    builder.seal(&Seal { compression: Compression::Lz4, ..Seal::default() }, &mut out);
    assert_eq!(read(&out), Err(BatchError::TooLarge { said: RECORDS_MAX * 16, limit: LIMIT }));
    let records = Records::open(&out, RECORDS_MAX * 16).expect("good");
    assert_eq!(records.iter().filter(Result::is_ok).count(), RECORDS_MAX as usize);
}

#[test]
fn records_that_no_batch_can_hold_are_refused() {
    let headers = vec![("name", &b""[..]); usize::from(u16::MAX) + 1];
    let many = NewRecord { headers: &headers, ..NewRecord::default() };
    let name = "n".repeat(usize::from(u16::MAX) + 1);
    let long_name = [(name.as_str(), &b""[..])];
    let long = NewRecord { headers: &long_name, ..NewRecord::default() };
    let mut builder = Builder::new(BATCH_BYTES_MAX);
    for record in [many, long] {
        assert_eq!(builder.push(&record), Err(BatchError::Record { index: 0 }));
    }
    assert!(builder.is_empty());
    assert_eq!(builder.batch_bytes(), HEADER_BYTES, "a refused record leaves nothing behind");
    assert_eq!(BatchError::Full(1).code(), ErrorCode::BatchTooLarge);
}
