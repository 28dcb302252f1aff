//! A stream of bytes as it comes from a socket: cut into frames until the first error or the end.
//!
//! The first two bytes choose the payload limit. A frame with a wrong checksum is signed and tried again, because a
//! fuzzer does not guess a CRC.
#![no_main]

use drava_protocol::frame::{self, BODY_BYTES_MAX, Decoded, FrameError, HEADER_BYTES, padded};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((limit, stream)) = data.split_first_chunk::<2>() else { return };
    let limit = u32::from(u16::from_le_bytes(*limit));
    let mut stream = stream.to_vec();
    let mut at = 0;
    loop {
        match frame::decode(&stream[at..], limit) {
            Ok(Decoded::Frame(frame, taken)) => {
                assert_eq!(taken, frame.header.frame_bytes());
                assert_eq!(frame.body.len(), frame.header.body_bytes as usize);
                assert_eq!(frame.payload.len(), frame.header.payload_bytes as usize);
                assert!(frame.header.payload_bytes <= limit);
                at += taken;
            }
            Ok(Decoded::NeedBytes(asked)) => {
                assert!(stream.len() - at < asked);
                assert!(asked <= HEADER_BYTES + padded(BODY_BYTES_MAX as usize) + padded(limit as usize));
                return;
            }
            Err(FrameError::Checksum { computed, .. }) => {
                stream[at + 28..at + 32].copy_from_slice(&computed.to_le_bytes());
            }
            Err(error) => {
                assert!(error.code().closes_connection());
                return;
            }
        }
    }
});
