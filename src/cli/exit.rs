//! How commands end.

use std::error::Error;
use std::fmt;

use drava_client::{
    CallError, ConnectError, ErrorCode, OpenProducerError, ReadError, SendError, SubscribeError, TopicError,
};

macro_rules! exits {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal,)*) => {
        /// The exit codes of all commands. Numbers keep their meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Exit { $($(#[doc = $doc])+ $name,)* }

        impl Exit {
            pub const ALL: &'static [Exit] = &[$(Exit::$name),*];

            pub fn number(self) -> u8 {
                match self { $(Exit::$name => $number,)* }
            }

            /// What it means, in one sentence.
            pub fn meaning(self) -> &'static str {
                match self { $(Exit::$name => concat!($($doc),+).trim_ascii(),)* }
            }
        }
    };
}

exits! {
    /// Everything was done.
    Ok = 0,
    /// Something went wrong that has no code of its own; the text says what.
    Failed = 1,
    /// The command line or the configuration was not understood.
    Usage = 2,
    /// No node answered.
    CannotConnect = 3,
    /// There is no such topic, partition, subscription or offset.
    NotFound = 4,
    /// It exists already, or another consumer has it.
    Conflict = 5,
    /// The node did not allow it.
    Denied = 6,
    /// The host or the data directory is not fit for a node.
    HostUnfit = 7,
    /// The disk is full or failed, or nothing could be read from it.
    Storage = 8,
    /// Something that was stored is damaged; what can be read was read.
    Damaged = 9,
    /// The offset to start from lies beyond the end, and nothing waits for it.
    BeyondEnd = 10,
    /// A bug stopped the node.
    Panic = 70,
}

/// The exit codes as text, for the end of `--help`.
pub(super) fn table() -> String {
    let rows: Vec<String> =
        Exit::ALL.iter().map(|exit| format!("  {:>2}  {}", exit.number(), exit.meaning())).collect();
    format!("Exit codes:\n{}", rows.join("\n"))
}

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub text: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Failure {
    pub fn new(exit: Exit, text: impl Into<String>) -> Failure {
        Failure { exit, text: text.into() }
    }

    /// Standard output or a file of the user's.
    pub fn io(what: &str, error: &std::io::Error) -> Failure {
        Failure::new(Exit::Failed, format!("{what}: {error}"))
    }

    fn of(exit: Exit, error: &dyn Error) -> Failure {
        let mut text = with_sources(error);
        if exit == Exit::CannotConnect {
            text.push_str(
                "\nIs a node running there? `drava node` starts one; --server or DRAVA_SERVER names another.",
            );
        }
        Failure { exit, text }
    }
}

/// The error and what caused it, in one line.
pub fn with_sources(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors quote their source already.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// What a refusal by the node means for the exit code.
fn of_code(code: ErrorCode) -> Exit {
    match code {
        ErrorCode::UnknownTopic
        | ErrorCode::UnknownPartition
        | ErrorCode::OffsetOutOfRange
        | ErrorCode::UnknownSubscription => Exit::NotFound,
        ErrorCode::TopicExists | ErrorCode::SubscriptionBusy | ErrorCode::ProducerFenced => Exit::Conflict,
        ErrorCode::Unauthenticated | ErrorCode::PermissionDenied => Exit::Denied,
        ErrorCode::InvalidArgument | ErrorCode::InvalidTopicName => Exit::Usage,
        ErrorCode::StorageFull | ErrorCode::StorageFailed | ErrorCode::StorageDamaged => Exit::Storage,
        ErrorCode::TooManyConnections | ErrorCode::ShuttingDown => Exit::CannotConnect,
        ErrorCode::Internal
        | ErrorCode::MalformedFrame
        | ErrorCode::FrameChecksum
        | ErrorCode::FrameTooLarge
        | ErrorCode::UnsupportedVersion
        | ErrorCode::UnexpectedFrame
        | ErrorCode::MalformedBody
        | ErrorCode::HandshakeRequired
        | ErrorCode::SlowClient
        | ErrorCode::WrongOwner
        | ErrorCode::MetadataUnavailable
        | ErrorCode::MalformedBatch
        | ErrorCode::BatchChecksum
        | ErrorCode::BatchTooLarge
        | ErrorCode::SequenceGap
        | ErrorCode::SequenceOverlap
        | ErrorCode::Busy => Exit::Failed,
    }
}

fn exit_of_connect(error: &ConnectError) -> Exit {
    match error {
        ConnectError::Address(_) | ConnectError::TooLong { .. } => Exit::Usage,
        ConnectError::Refused(refusal) => of_code(refusal.code),
        ConnectError::Connect { .. }
        | ConnectError::Handshake(_)
        | ConnectError::TimedOut { .. }
        | ConnectError::Session(_) => Exit::CannotConnect,
    }
}

fn exit_of_call(error: &CallError) -> Exit {
    match error {
        CallError::Connect(error) => exit_of_connect(error),
        CallError::Disconnected | CallError::TimedOut { .. } => Exit::CannotConnect,
        CallError::Refused(refusal) => of_code(refusal.code),
    }
}

fn exit_of_topic(error: &TopicError) -> Exit {
    match error {
        TopicError::UnknownTopic(_) | TopicError::UnknownPartition { .. } => Exit::NotFound,
        TopicError::TopicExists(_) => Exit::Conflict,
        TopicError::Name(_) => Exit::Usage,
        TopicError::Call(error) => exit_of_call(error),
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Failure {
        Failure::of(exit_of_connect(&error), &error)
    }
}

impl From<TopicError> for Failure {
    fn from(error: TopicError) -> Failure {
        Failure::of(exit_of_topic(&error), &error)
    }
}

impl From<OpenProducerError> for Failure {
    fn from(error: OpenProducerError) -> Failure {
        let exit = match &error {
            OpenProducerError::Topic(error) => exit_of_topic(error),
            OpenProducerError::Option { .. } => Exit::Usage,
            OpenProducerError::NodeBatches { .. } => Exit::Failed,
            OpenProducerError::Call(error) => exit_of_call(error),
        };
        Failure::of(exit, &error)
    }
}

impl From<SendError> for Failure {
    fn from(error: SendError) -> Failure {
        let exit = match &error {
            SendError::Fenced(_) => Exit::Conflict,
            SendError::UnknownTopic(_) => Exit::NotFound,
            SendError::Refused(refusal) => of_code(refusal.code),
            SendError::Owner(error) => exit_of_topic(error),
            SendError::TimedOut { .. } => Exit::CannotConnect,
            SendError::TooLarge { .. } | SendError::Headers | SendError::SequenceGap(_) | SendError::Closed => {
                Exit::Failed
            }
        };
        Failure::of(exit, &error)
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Failure {
        let exit = match &error {
            ReadError::Topic(error) => exit_of_topic(error),
            ReadError::OutOfRange { .. } => Exit::NotFound,
            ReadError::Batch { .. } => Exit::Storage,
            ReadError::Damaged { .. } => Exit::Damaged,
            ReadError::NoProgress { .. } => Exit::Failed,
            ReadError::Call(error) => exit_of_call(error),
        };
        Failure::of(exit, &error)
    }
}

impl From<SubscribeError> for Failure {
    fn from(error: SubscribeError) -> Failure {
        let exit = match &error {
            SubscribeError::Topic(error) => exit_of_topic(error),
            SubscribeError::Name(_) => Exit::Usage,
            SubscribeError::Busy(_) | SubscribeError::Lost(_) => Exit::Conflict,
            SubscribeError::Batch { .. } => Exit::Storage,
            SubscribeError::Damaged { .. } => Exit::Damaged,
            SubscribeError::Call(error) => exit_of_call(error),
            SubscribeError::Closed => Exit::Failed,
        };
        Failure::of(exit, &error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_distinct_and_the_panic_code_is_the_runtimes() {
        let mut numbers: Vec<u8> = Exit::ALL.iter().map(|exit| exit.number()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), Exit::ALL.len());
        assert_eq!(i32::from(Exit::Panic.number()), drava_runtime::task::EXIT_PANIC);
    }

    #[test]
    fn errors_of_the_client_have_the_codes_that_the_table_promises() {
        assert_eq!(Failure::from(TopicError::UnknownTopic("x".to_owned())).exit, Exit::NotFound);
        assert_eq!(Failure::from(TopicError::TopicExists("x".to_owned())).exit, Exit::Conflict);
        let source = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let refused = Failure::from(ConnectError::Connect { host: "localhost".to_owned(), port: 1, source });
        assert_eq!(refused.exit, Exit::CannotConnect);
        assert!(refused.text.contains("localhost:1: connection refused"), "{}", refused.text);
    }
}
