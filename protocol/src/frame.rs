//! Frames: how a byte stream is cut into messages.
//!
//! A frame is a header of [`HEADER_BYTES`], then the archived body, then the raw payload; body and payload are each
//! padded with zeros to a multiple of [`ALIGNMENT`]. The header and the body are covered by one CRC32C; a payload
//! carries its own (see [`crate::batch`]). Source: `protocol/README.md`, "Frame".

use crate::error::ErrorCode;
use crate::message::{Kind, Message};

pub const MAGIC: [u8; 4] = *b"DRVA";
pub const VERSION: u8 = 1;
pub const HEADER_BYTES: usize = 32;
pub const ALIGNMENT: usize = 16;
const _: () = assert!(u64::BITS <= usize::BITS, "lengths of frames are computed in usize from fields of 32 bits");

/// Larger bodies are refused before they are read. The largest that there are, lists of topics, places and subscriptions
/// at their limits, fit.
pub const BODY_BYTES_MAX: u32 = 512 * 1024;
/// What a node accepts as payload unless its configuration says otherwise.
pub const PAYLOAD_BYTES_MAX_DEFAULT: u32 = 4 * 1024 * 1024;

/// The decoded header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub flags: u16,
    /// Chosen by whoever sends a request, repeated in the answer; 0 on frames that nobody asked for.
    pub correlation: u64,
    /// Without padding.
    pub body_bytes: u32,
    /// Without padding.
    pub payload_bytes: u32,
    /// On an answer that another core of the node gave: the port of that core, where to ask next time. Else 0.
    pub owner_port: u16,
}

impl Header {
    /// The whole frame with header and padding, in bytes.
    pub fn frame_bytes(&self) -> usize {
        HEADER_BYTES + padded(self.body_bytes as usize) + padded(self.payload_bytes as usize)
    }
}

/// A frame where it lies in its buffer.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    pub header: Header,
    pub body: &'a [u8],
    pub payload: &'a [u8],
}

impl Frame<'_> {
    /// Where the payload starts, from the start of the frame.
    pub fn payload_position(&self) -> usize {
        HEADER_BYTES + padded(self.header.body_bytes as usize)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("the bytes start with {0:02x?}, not with a frame of this protocol")]
    Magic([u8; 4]),
    #[error("frame version {0} is not spoken here; this side speaks {VERSION}")]
    Version(u8),
    #[error("frame kind {0} is unknown")]
    Kind(u8),
    #[error("the body announces {announced} bytes; at most {limit} are accepted")]
    BodyTooLarge { announced: u32, limit: u32 },
    #[error("the payload announces {announced} bytes; at most {limit} are accepted")]
    PayloadTooLarge { announced: u32, limit: u32 },
    #[error("reserved header bytes are not zero")]
    Reserved,
    #[error("header and body have checksum {computed:08x}; the header says {stored:08x}")]
    Checksum { stored: u32, computed: u32 },
}

impl FrameError {
    pub fn code(&self) -> ErrorCode {
        match self {
            FrameError::Magic(_) | FrameError::Reserved => ErrorCode::MalformedFrame,
            FrameError::Version(_) => ErrorCode::UnsupportedVersion,
            FrameError::Kind(_) => ErrorCode::UnexpectedFrame,
            FrameError::BodyTooLarge { .. } | FrameError::PayloadTooLarge { .. } => ErrorCode::FrameTooLarge,
            FrameError::Checksum { .. } => ErrorCode::FrameChecksum,
        }
    }
}

/// What the start of a buffer holds.
#[derive(Clone, Copy, Debug)]
pub enum Decoded<'a> {
    /// The frame and the bytes it takes, padding included.
    Frame(Frame<'a>, usize),
    /// More is needed: at least this many bytes in all. Never more than the limits allow.
    NeedBytes(usize),
}

/// Reads the frame at the start of `input`.
///
/// The limits are checked as soon as the header is there, so that nothing is buffered for a frame that will be
/// refused. Errors: all of [`FrameError`]; framing is lost after each, so close the connection.
/// Source: `protocol/README.md`, "Frame".
pub fn decode(input: &[u8], payload_bytes_max: u32) -> Result<Decoded<'_>, FrameError> {
    let Some(head) = input.first_chunk::<HEADER_BYTES>() else {
        // A wrong magic is told at once: whoever speaks another protocol may never send 32 bytes.
        let seen = input.len().min(MAGIC.len());
        if input[..seen] != MAGIC[..seen] {
            let mut magic = [0; 4];
            magic[..seen].copy_from_slice(&input[..seen]);
            return Err(FrameError::Magic(magic));
        }
        return Ok(Decoded::NeedBytes(HEADER_BYTES));
    };
    let header = decode_header(head, payload_bytes_max)?;
    let frame_bytes = header.frame_bytes();
    if input.len() < frame_bytes {
        return Ok(Decoded::NeedBytes(frame_bytes));
    }
    let body = &input[HEADER_BYTES..HEADER_BYTES + header.body_bytes as usize];
    let stored = u32_at(head, 28);
    let computed = checksum(head, body);
    if stored != computed {
        return Err(FrameError::Checksum { stored, computed });
    }
    let payload_position = HEADER_BYTES + padded(header.body_bytes as usize);
    let payload = &input[payload_position..payload_position + header.payload_bytes as usize];
    Ok(Decoded::Frame(Frame { header, body, payload }, frame_bytes))
}

fn decode_header(head: &[u8; HEADER_BYTES], payload_bytes_max: u32) -> Result<Header, FrameError> {
    let magic = [head[0], head[1], head[2], head[3]];
    if magic != MAGIC {
        return Err(FrameError::Magic(magic));
    }
    if head[4] != VERSION {
        return Err(FrameError::Version(head[4]));
    }
    let kind = Kind::from_number(head[5]).ok_or(FrameError::Kind(head[5]))?;
    let body_bytes = u32_at(head, 16);
    if body_bytes > BODY_BYTES_MAX {
        return Err(FrameError::BodyTooLarge { announced: body_bytes, limit: BODY_BYTES_MAX });
    }
    let payload_bytes = u32_at(head, 20);
    if payload_bytes > payload_bytes_max {
        return Err(FrameError::PayloadTooLarge { announced: payload_bytes, limit: payload_bytes_max });
    }
    if head[26..28] != [0, 0] {
        return Err(FrameError::Reserved);
    }
    Ok(Header {
        kind,
        flags: u16::from_le_bytes([head[6], head[7]]),
        correlation: u64::from_le_bytes([head[8], head[9], head[10], head[11], head[12], head[13], head[14], head[15]]),
        body_bytes,
        payload_bytes,
        owner_port: u16::from_le_bytes([head[24], head[25]]),
    })
}

/// Rewrites the owner's port of an encoded frame, as the core does that forwarded it.
///
/// `frame` starts with a header and body of our own making; panics if it is shorter.
pub fn set_owner_port(frame: &mut [u8], owner_port: u16) {
    let (head, rest) = frame.split_first_chunk_mut::<HEADER_BYTES>().expect("a whole header");
    head[24..26].copy_from_slice(&owner_port.to_le_bytes());
    let body_bytes = u32_at(head, 16) as usize;
    let crc = checksum(head, &rest[..body_bytes]);
    head[28..32].copy_from_slice(&crc.to_le_bytes());
}

/// Appends header and padded body of `message` to `out`.
///
/// The caller appends `payload_bytes` of payload and [`padding`] after it. Panics if the body is larger than
/// [`BODY_BYTES_MAX`]: check the lengths of what comes from outside, or use [`try_encode`].
pub fn encode<M: Message>(message: &M, flags: u16, correlation: u64, payload_bytes: u32, out: &mut Vec<u8>) {
    if let Err(error) = try_encode(message, flags, correlation, payload_bytes, out) {
        panic!("{:?}: {error}", M::KIND);
    }
}

/// As [`encode`], for messages that hold text of any length.
///
/// Errors: `BodyTooLarge`, with `out` as it was.
pub fn try_encode<M: Message>(
    message: &M,
    flags: u16,
    correlation: u64,
    payload_bytes: u32,
    out: &mut Vec<u8>,
) -> Result<(), FrameError> {
    let start = out.len();
    out.extend_from_slice(&[0u8; HEADER_BYTES]);
    message.archive_to(out);
    let body_start = start + HEADER_BYTES;
    let body_bytes = out.len() - body_start;
    if (BODY_BYTES_MAX as usize) < body_bytes {
        out.truncate(start);
        let announced = u32::try_from(body_bytes).unwrap_or(u32::MAX);
        return Err(FrameError::BodyTooLarge { announced, limit: BODY_BYTES_MAX });
    }
    let mut head = [0u8; HEADER_BYTES];
    head[0..4].copy_from_slice(&MAGIC);
    head[4] = VERSION;
    head[5] = M::KIND as u8;
    head[6..8].copy_from_slice(&flags.to_le_bytes());
    head[8..16].copy_from_slice(&correlation.to_le_bytes());
    head[16..20].copy_from_slice(&(body_bytes as u32).to_le_bytes());
    head[20..24].copy_from_slice(&payload_bytes.to_le_bytes());
    let crc = checksum(&head, &out[body_start..]);
    head[28..32].copy_from_slice(&crc.to_le_bytes());
    out[start..body_start].copy_from_slice(&head);
    out.extend_from_slice(padding(body_bytes));
    Ok(())
}

/// The zeros that follow `bytes` bytes of body or payload.
pub fn padding(bytes: usize) -> &'static [u8] {
    &[0u8; ALIGNMENT][..padded(bytes) - bytes]
}

/// `bytes` rounded up to [`ALIGNMENT`].
pub const fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// CRC32C of the first 28 header bytes and the body.
fn checksum(head: &[u8; HEADER_BYTES], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&head[..28]), body)
}

fn u32_at(bytes: &[u8], position: usize) -> u32 {
    u32::from_le_bytes([bytes[position], bytes[position + 1], bytes[position + 2], bytes[position + 3]])
}
