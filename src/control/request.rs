//! What shards and the boot ask of the control core. Never on the data path.

use std::sync::Arc;

use drava_protocol::ErrorCode;
use drava_protocol::message::TopicPolicy;
use drava_protocol::topic::TopicName;
use drava_raft::Topic;
use drava_runtime::foreign::ReplySender;

/// Sent through [`drava_runtime::foreign::InboxSender`] to the control core's executor.
#[derive(Debug)]
pub enum ControlRequest {
    /// Answered once every shard of this node serves by the image that has the topic.
    CreateTopic {
        name: TopicName,
        policy: TopicPolicy,
        exists_ok: bool,
        reply: ReplySender<Result<Arc<Topic>, Refused>>,
    },
    /// Answered once every shard has let go of the topic.
    DeleteTopic { name: TopicName, reply: ReplySender<Result<(), Refused>> },
    /// Of the boot: stop. Answered when the shards have finished, the admin has stopped, and the metadata is closed.
    Drain { done: ReplySender<()> },
}

/// Why the control core did not do it, as the client is told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refused {
    pub code: ErrorCode,
    pub text: String,
}
