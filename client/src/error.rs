//! What can go wrong, one enum an operation. Each tells the node's code where the node refused, and whether to try again.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use drava_protocol::batch::BatchError;
use drava_protocol::topic::TopicNameError;
use drava_protocol::{ErrorCode, Retry};

use crate::session::{Refusal, SessionError};

/// No connection to a node.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("`{0}` is no address; host:port is")]
    Address(String),
    #[error("the {what} has {bytes} bytes; at most {bytes_max} are allowed")]
    TooLong { what: &'static str, bytes: usize, bytes_max: usize },
    #[error("connect to {host}:{port}")]
    Connect {
        host: String,
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error("the connection failed before the node said Welcome")]
    Handshake(#[source] io::Error),
    #[error("no Welcome within {after:?}")]
    TimedOut { after: Duration },
    #[error("the node broke the protocol")]
    Session(#[from] SessionError),
    #[error("the node refused the connection: {0}")]
    Refused(#[source] Refusal),
}

/// A request that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the connection was lost before the answer came; whether the node did it is unknown")]
    Disconnected,
    #[error("no answer within {after:?}; whether the node did it is unknown")]
    TimedOut { after: Duration },
    #[error("the node refused: {0}")]
    Refused(#[source] Refusal),
}

/// A topic was not created, deleted, listed or described.
#[derive(Debug, thiserror::Error)]
pub enum TopicError {
    #[error("there is no topic {0}")]
    UnknownTopic(String),
    #[error("topic {0} exists already")]
    TopicExists(String),
    #[error(transparent)]
    Name(#[from] TopicNameError),
    #[error("topic {topic} has {partitions} partitions; there is no partition {index}")]
    UnknownPartition { topic: String, index: u32, partitions: u32 },
    #[error(transparent)]
    Call(CallError),
}

/// A producer was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenProducerError {
    #[error(transparent)]
    Topic(#[from] TopicError),
    #[error("`{option}` is {value}; it must be at least {min}")]
    Option { option: &'static str, value: usize, min: usize },
    #[error("a record with the node's largest batch of {batch_bytes_max} bytes has no room")]
    NodeBatches { batch_bytes_max: u32 },
    #[error(transparent)]
    Call(#[from] CallError),
}

/// A record was not acknowledged.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SendError {
    #[error("a batch of this record alone has {batch_bytes} bytes; at most {batch_bytes_max} are allowed")]
    TooLarge { batch_bytes: usize, batch_bytes_max: usize },
    #[error("the record has more than 65535 headers, or a header name of more than 65535 bytes")]
    Headers,
    /// Another producer with this id has taken over.
    #[error("the producer was fenced by a newer one of the same id: {0}")]
    Fenced(#[source] Refusal),
    /// The node has forgotten this producer, for example because thousands of others came since. Open another.
    #[error("the node does not know the sequence of this producer any longer: {0}")]
    SequenceGap(#[source] Refusal),
    /// The topic was deleted; what was not acknowledged is gone.
    #[error("there is no topic {0}")]
    UnknownTopic(String),
    #[error("the owner of the partition cannot be found: {0}")]
    Owner(#[source] Arc<TopicError>),
    #[error("nothing was acknowledged for {after:?}; whether the record was stored is unknown")]
    TimedOut { after: Duration },
    #[error("the node refused: {0}")]
    Refused(#[source] Refusal),
    #[error("the producer is closed")]
    Closed,
}

/// Messages could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Topic(#[from] TopicError),
    /// Below the oldest message that is kept, or above the end. Start again from a place that exists.
    #[error("offset {offset} of partition {partition} is out of range: {refusal}")]
    OutOfRange { partition: u32, offset: u64, refusal: Refusal },
    #[error("partition {partition} sent a batch that is damaged at or after offset {offset}")]
    Batch {
        partition: u32,
        offset: u64,
        #[source]
        source: BatchError,
    },
    /// These messages were stored and the node's disk has lost them. Reading goes on behind them.
    #[error("the messages {} to {} of partition {partition} of {topic} are damaged on disk", offsets.start, offsets.end - 1)]
    Damaged { topic: String, partition: u32, offsets: Range<u64> },
    #[error("partition {partition} answered a fetch from {offset} with {next_offset} as the next")]
    NoProgress { partition: u32, offset: u64, next_offset: u64 },
    #[error(transparent)]
    Call(#[from] CallError),
}

/// A subscription could not be opened, read or acknowledged.
#[derive(Debug, thiserror::Error)]
pub enum SubscribeError {
    #[error(transparent)]
    Topic(#[from] TopicError),
    #[error("a subscription name has 1 to 128 bytes; this one has {0}")]
    Name(usize),
    /// The subscription is exclusive, and another consumer has it.
    #[error("the subscription has another consumer: {0}")]
    Busy(#[source] Refusal),
    /// Another consumer took the subscription over, or it was deleted.
    #[error("the subscription is no longer held by this consumer: {0}")]
    Lost(#[source] Refusal),
    #[error("partition {partition} delivered a batch that is damaged at or after offset {offset}")]
    Batch {
        partition: u32,
        offset: u64,
        #[source]
        source: BatchError,
    },
    /// These messages were stored and the node's disk has lost them. Deliveries go on behind them.
    #[error("the messages {} to {} of partition {partition} of {topic} are damaged on disk", offsets.start, offsets.end - 1)]
    Damaged { topic: String, partition: u32, offsets: Range<u64> },
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the consumer is closed")]
    Closed,
}

/// What the node's code says, and whether trying again may help.
macro_rules! advice {
    ($($error:ident: $self:ident => $refusal:expr, $otherwise:expr;)*) => {
        $(impl $error {
            fn refusal(&$self) -> Option<&Refusal> {
                $refusal
            }

            /// The node's code, where the node refused.
            pub fn code(&self) -> Option<ErrorCode> {
                self.refusal().map(|refusal| refusal.code)
            }

            /// Whether trying again may help, and where.
            pub fn retry(&$self) -> Retry {
                match $self.refusal() {
                    Some(refusal) => refusal.retry(),
                    None => $otherwise,
                }
            }
        })*
    };
}

advice! {
    ConnectError: self => match self {
        ConnectError::Refused(refusal) => Some(refusal),
        ConnectError::Address(_)
        | ConnectError::TooLong { .. }
        | ConnectError::Connect { .. }
        | ConnectError::Handshake(_)
        | ConnectError::TimedOut { .. }
        | ConnectError::Session(_) => None,
    }, match self {
        ConnectError::Connect { .. } | ConnectError::Handshake(_) | ConnectError::TimedOut { .. } => Retry::Here,
        ConnectError::Address(_)
        | ConnectError::TooLong { .. }
        | ConnectError::Session(_)
        | ConnectError::Refused(_) => Retry::No,
    };
    CallError: self => match self {
        CallError::Refused(refusal) => Some(refusal),
        CallError::Connect(error) => error.refusal(),
        CallError::Disconnected | CallError::TimedOut { .. } => None,
    }, match self {
        CallError::Connect(error) => error.retry(),
        CallError::Disconnected | CallError::TimedOut { .. } | CallError::Refused(_) => Retry::Here,
    };
    TopicError: self => match self {
        TopicError::Call(error) => error.refusal(),
        TopicError::UnknownTopic(_)
        | TopicError::TopicExists(_)
        | TopicError::Name(_)
        | TopicError::UnknownPartition { .. } => None,
    }, match self {
        TopicError::Call(error) => error.retry(),
        TopicError::UnknownTopic(_)
        | TopicError::TopicExists(_)
        | TopicError::Name(_)
        | TopicError::UnknownPartition { .. } => Retry::No,
    };
    OpenProducerError: self => match self {
        OpenProducerError::Topic(error) => error.refusal(),
        OpenProducerError::Call(error) => error.refusal(),
        OpenProducerError::Option { .. } | OpenProducerError::NodeBatches { .. } => None,
    }, match self {
        OpenProducerError::Topic(error) => error.retry(),
        OpenProducerError::Call(error) => error.retry(),
        OpenProducerError::Option { .. } | OpenProducerError::NodeBatches { .. } => Retry::No,
    };
    SendError: self => match self {
        SendError::Fenced(refusal) | SendError::SequenceGap(refusal) | SendError::Refused(refusal) => Some(refusal),
        SendError::TooLarge { .. }
        | SendError::Headers
        | SendError::UnknownTopic(_)
        | SendError::Owner(_)
        | SendError::TimedOut { .. }
        | SendError::Closed => None,
    }, Retry::No;
    ReadError: self => match self {
        ReadError::OutOfRange { refusal, .. } => Some(refusal),
        ReadError::Topic(error) => error.refusal(),
        ReadError::Call(error) => error.refusal(),
        ReadError::Batch { .. } | ReadError::Damaged { .. } | ReadError::NoProgress { .. } => None,
    }, match self {
        ReadError::Topic(error) => error.retry(),
        ReadError::Call(error) => error.retry(),
        ReadError::OutOfRange { .. }
        | ReadError::Batch { .. }
        | ReadError::Damaged { .. }
        | ReadError::NoProgress { .. } => Retry::No,
    };
    SubscribeError: self => match self {
        SubscribeError::Busy(refusal) | SubscribeError::Lost(refusal) => Some(refusal),
        SubscribeError::Topic(error) => error.refusal(),
        SubscribeError::Call(error) => error.refusal(),
        SubscribeError::Name(_)
        | SubscribeError::Batch { .. }
        | SubscribeError::Damaged { .. }
        | SubscribeError::Closed => None,
    }, match self {
        SubscribeError::Topic(error) => error.retry(),
        SubscribeError::Call(error) => error.retry(),
        SubscribeError::Name(_)
        | SubscribeError::Busy(_)
        | SubscribeError::Lost(_)
        | SubscribeError::Batch { .. }
        | SubscribeError::Damaged { .. }
        | SubscribeError::Closed => Retry::No,
    };
}
