//! A batch as the broker checks it and as a consumer unpacks it.
//!
//! Each input is read as it is and once more with its length and checksum made right, because a fuzzer does not guess a
//! CRC; so the records and the unpacking get their share.
#![no_main]

use drava_protocol::batch::{self, CHECKED_FROM, HEADER_BYTES, Records};
use libfuzzer_sys::fuzz_target;

const UNPACKED_BYTES_MAX: u32 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    read(data);
    if HEADER_BYTES <= data.len() {
        let mut signed = data.to_vec();
        signed[16..20].copy_from_slice(&(data.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c(&signed[CHECKED_FROM..]);
        signed[20..24].copy_from_slice(&crc.to_le_bytes());
        read(&signed);
    }
});

fn read(bytes: &[u8]) {
    let checked = batch::check(bytes);
    let Ok(records) = Records::open(bytes, UNPACKED_BYTES_MAX) else { return };
    if let Ok(header) = checked {
        assert_eq!(&header, records.header());
    }
    let mut count = 0;
    let mut record_bytes = 0;
    for record in records.iter() {
        let Ok(record) = record else { return };
        assert_eq!(record.headers.iter().count(), record.headers.len());
        record_bytes += record.payload.len() + record.key.map_or(0, <[u8]>::len);
        count += 1;
    }
    assert_eq!(count, records.header().record_count);
    assert!(record_bytes <= records.header().records_bytes as usize);
}
