//! Identifiers that travel on the wire or between the parts. Each is a newtype, so that the compiler catches a swap.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    };
}

id! {
    /// A node of the cluster, chosen by its operator.
    NodeId(u64)
}
id! {
    /// A data core of one node: 0-based, dense.
    ShardId(u16)
}
id! {
    /// A topic, minted by the metadata group and never used again.
    TopicId(u64)
}
id! {
    /// A partition, unique in the cluster, minted by the metadata group and never used again.
    PartitionId(u64)
}
id! {
    /// The place of an entry in its ledger: starts at 0, never skips, unique only within one ledger.
    EntryId(u64)
}
id! {
    /// The place of a message in its partition: starts at 0, dense, never used again, across all ledgers.
    MessageOffset(u64)
}
id! {
    /// An idempotent producer. 0 means none: such batches are appended as often as they are sent.
    ProducerId(u64)
}
id! {
    /// Counted up by the metadata group at each change of a partition's owner.
    Term(u64)
}

/// An append-only run of entries of one partition: which partition, and the how-manieth of its ledgers.
///
/// Sequence 0 is the partition's state ledger (cursors and producers); data ledgers count from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LedgerId {
    pub partition: PartitionId,
    pub sequence: u32,
}

impl fmt::Display for LedgerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.partition, self.sequence)
    }
}
