//! What the control core and the boot ask of a shard. Rare by nature; the data path never passes here.

use std::sync::Arc;

use drava_protocol::PartitionId;
use drava_protocol::message::PartitionState;
use drava_raft::Image;
use drava_runtime::foreign::ReplySender;
use drava_storage::Damage;

use super::stats::ShardStats;

/// Sent through [`drava_runtime::foreign::InboxSender`] to the shard's executor.
#[derive(Debug)]
pub enum ShardCommand {
    /// A newer metadata image. Answered when the shard serves by it: partitions opened, deleted ones gone.
    Image { image: Arc<Image>, done: ReplySender<()> },
    /// The figures of this moment.
    Stats { reply: ReplySender<ShardStats> },
    /// The state of one partition; `None` when it does not live on this shard.
    DescribePartition { partition: PartitionId, reply: ReplySender<Option<PartitionState>> },
    /// What of the shard's store cannot be read any more.
    Damage { reply: ReplySender<Vec<Damage>> },
    /// Stop accepting, finish what is in flight, save cursors, seal the journal. Answered when all is on disk.
    Drain { done: ReplySender<()> },
}
