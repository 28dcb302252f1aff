//! The snapshot file: the whole state and how far in the log it reaches.
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | magic `DRVAMETA` |
//! | 8..12 | format version, 1 |
//! | 12..16 | CRC32C of all that follows |
//! | 16..20 | length of the meta part |
//! | 20..24 | length of the state part |
//! | 24.. | meta (last log id and membership, in postcard's form), then the state ([`State::encode`]) |
//!
//! All numbers are little-endian.

use std::rc::Rc;

use crate::state::{State, StateError};
use crate::types::{SnapshotData, SnapshotMeta};

const MAGIC: [u8; 8] = *b"DRVAMETA";
const VERSION: u32 = 1;
const CHECKED_FROM: usize = 16;
const HEADER_BYTES: usize = 24;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    #[error("the metadata snapshot has {0} bytes, which is too short")]
    TooShort(usize),
    #[error("the file is no metadata snapshot")]
    Magic,
    #[error("the metadata snapshot has format version {0}; this release reads {VERSION}")]
    Version(u32),
    #[error("the metadata snapshot is damaged: checksum {found:08x}, expected {expected:08x}")]
    Checksum { expected: u32, found: u32 },
    #[error("the metadata snapshot announces {announced} bytes and has {found}")]
    Length { announced: u64, found: usize },
    #[error("the head of the metadata snapshot cannot be read: {0}")]
    Meta(String),
    #[error(transparent)]
    State(#[from] StateError),
}

pub(crate) fn encode(meta: &SnapshotMeta, state: &[u8]) -> Vec<u8> {
    let meta = postcard::to_stdvec(meta).expect("a snapshot's meta has no value that postcard cannot write");
    let mut file = Vec::with_capacity(HEADER_BYTES + meta.len() + state.len());
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&VERSION.to_le_bytes());
    file.extend_from_slice(&[0; 4]);
    for part in [&meta[..], state] {
        let bytes = u32::try_from(part.len()).expect("the limits on topics keep the state far below 4 GiB");
        file.extend_from_slice(&bytes.to_le_bytes());
    }
    file.extend_from_slice(&meta);
    file.extend_from_slice(state);
    let crc = crc32c::crc32c(&file[CHECKED_FROM..]);
    file[12..16].copy_from_slice(&crc.to_le_bytes());
    file
}

/// What a snapshot file holds, whole by its checksum. The state is still in its bytes.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub meta: SnapshotMeta,
    pub data: SnapshotData,
}

/// Reads all of a snapshot file, the state too; returns how far it reaches.
pub(crate) fn check(file: &[u8]) -> Result<SnapshotMeta, SnapshotError> {
    let decoded = decode(file)?;
    State::decode(&decoded.data)?;
    Ok(decoded.meta)
}

pub(crate) fn decode(file: &[u8]) -> Result<Decoded, SnapshotError> {
    if file.len() < HEADER_BYTES {
        return Err(SnapshotError::TooShort(file.len()));
    }
    let number = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().expect("four bytes"));
    if file[..8] != MAGIC {
        return Err(SnapshotError::Magic);
    }
    if number(8) != VERSION {
        return Err(SnapshotError::Version(number(8)));
    }
    let (expected, found) = (number(12), crc32c::crc32c(&file[CHECKED_FROM..]));
    if expected != found {
        return Err(SnapshotError::Checksum { expected, found });
    }
    let announced = HEADER_BYTES as u64 + u64::from(number(16)) + u64::from(number(20));
    if announced != file.len() as u64 {
        return Err(SnapshotError::Length { announced, found: file.len() });
    }
    let (meta, state) = file[HEADER_BYTES..].split_at(number(16) as usize);
    let meta = postcard::from_bytes(meta).map_err(|error| SnapshotError::Meta(error.to_string()))?;
    Ok(Decoded { meta, data: Rc::new(state.to_vec()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_found() {
        let state = State::default();
        let file = encode(&SnapshotMeta::default(), &state.encode());
        assert_eq!(check(&file), Ok(SnapshotMeta::default()));
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut flipped = file.clone();
                flipped[at] ^= 1 << bit;
                assert!(check(&flipped).is_err(), "bit {bit} of byte {at}");
            }
        }
        for end in 0..file.len() {
            assert!(check(&file[..end]).is_err(), "cut at {end}");
        }
        assert!(check(&[&file[..], &[0]].concat()).is_err());
    }
}
