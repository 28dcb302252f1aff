//! What can go wrong, as numbers that never change their meaning.

use std::fmt;

/// Whether a client should try again, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same request will fail again.
    No,
    /// The same request may succeed here after a pause.
    Here,
    /// Ask again where the partition lives, then try there.
    Elsewhere,
}

macro_rules! codes {
    ($($(#[doc = $doc:literal])* $name:ident = $number:literal, $retry:ident, $closes:literal;)*) => {
        /// A stable error number. Numbers are never reused; unknown ones are read as [`ErrorCode::Internal`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum ErrorCode {
            $($(#[doc = $doc])* $name = $number,)*
        }

        /// Code and meaning, as the README lists them.
        #[cfg(test)]
        pub(crate) const CODES: &[(ErrorCode, &str)] = &[$((ErrorCode::$name, concat!($($doc),*))),*];

        impl ErrorCode {
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$name),*];

            pub fn from_number(number: u16) -> Option<ErrorCode> {
                match number {
                    $($number => Some(ErrorCode::$name),)*
                    _ => None,
                }
            }

            pub fn retry(self) -> Retry {
                match self {
                    $(ErrorCode::$name => Retry::$retry,)*
                }
            }

            /// Whether the node closes the connection after sending this error, because framing or trust is lost.
            pub fn closes_connection(self) -> bool {
                match self {
                    $(ErrorCode::$name => $closes,)*
                }
            }
        }
    };
}

codes! {
    /// The node failed in a way that it does not understand; its log says more.
    Internal = 1, Here, false;
    /// The bytes are no frame of this protocol: wrong magic, or a header that contradicts itself.
    MalformedFrame = 2, No, true;
    /// Header or body do not match their checksum.
    FrameChecksum = 3, No, true;
    /// The frame announces more bytes than the node accepts; `Welcome` says how many it does.
    FrameTooLarge = 4, No, true;
    /// The protocol version is not spoken here.
    UnsupportedVersion = 5, No, true;
    /// The kind of frame is unknown, or is not one that a client may send.
    UnexpectedFrame = 6, No, true;
    /// The body is no valid archive of its kind.
    MalformedBody = 7, No, true;
    /// The first frame was not `Hello`, or it did not come in time.
    HandshakeRequired = 8, No, true;
    /// A frame was begun and not finished in time.
    SlowClient = 9, No, true;
    /// The node has as many connections as it was configured to hold.
    TooManyConnections = 10, Here, true;
    /// A node that is shutting down takes no new work.
    ShuttingDown = 11, Elsewhere, false;
    /// The credentials are missing or wrong.
    Unauthenticated = 12, No, true;
    /// The credentials do not allow this.
    PermissionDenied = 13, No, false;
    /// A field has a value outside its documented range.
    InvalidArgument = 14, No, false;

    /// No such topic.
    UnknownTopic = 20, No, false;
    /// The topic exists already.
    TopicExists = 21, No, false;
    /// The name is no valid topic name.
    InvalidTopicName = 22, No, false;
    /// No such partition on this node.
    UnknownPartition = 23, Elsewhere, false;
    /// The partition lives on another shard or node.
    WrongOwner = 24, Elsewhere, false;
    /// The metadata group has no leader now; topics cannot be changed, data goes on.
    MetadataUnavailable = 25, Here, false;

    /// The batch is no batch: lengths, counts or version contradict each other.
    MalformedBatch = 40, No, false;
    /// The batch does not match its checksum.
    BatchChecksum = 41, No, false;
    /// The batch is larger than the node accepts.
    BatchTooLarge = 42, No, false;
    /// The batch skips ahead of the producer's next sequence: an earlier batch is missing.
    SequenceGap = 43, No, false;
    /// The batch repeats part of what was appended, and goes on beyond it.
    SequenceOverlap = 44, No, false;
    /// A producer with the same id and a higher epoch has taken over.
    ProducerFenced = 45, No, false;
    /// So many requests are waiting that this one was not taken.
    Busy = 46, Here, false;

    /// The offset is below the oldest that is kept, or above the end.
    OffsetOutOfRange = 60, No, false;
    /// The subscription has another consumer, and is exclusive.
    SubscriptionBusy = 61, Here, false;
    /// No such subscription, or the consumer has been closed.
    UnknownSubscription = 62, No, false;

    /// The disk is full below its reserve: publishing waits, consuming goes on.
    StorageFull = 80, Here, false;
    /// A write or sync failed; what was in flight is unknown, and the shard takes no more publishes.
    StorageFailed = 81, No, false;
    /// What was stored does not match its checksum. The text names the range.
    StorageDamaged = 82, No, false;
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?} ({})", *self as u16)
    }
}
