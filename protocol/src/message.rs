//! The bodies of frames, one struct a kind. Bodies are rkyv archives (little-endian, unaligned, 32-bit relative
//! pointers, root at the end) and are read where they lie with [`access`]. Source: `protocol/README.md`, "Messages".
//!
//! A new message is a line in `kinds!`, a struct in `bodies!` and the tables in the README; a test compares them.

use rkyv::api::high::{HighDeserializer, HighValidator, to_bytes_in};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::{Failure, Panic};
use rkyv::{Archive, Deserialize, Portable, Serialize};

/// Names in one `Topics`.
pub const TOPICS_MAX: u32 = 1000;
/// Partitions of one topic.
pub const PARTITIONS_MAX: u32 = 1024;
/// Subscriptions of one partition.
pub const SUBSCRIPTIONS_MAX: u32 = 1000;
pub const SUBSCRIPTION_NAME_BYTES_MAX: usize = 128;
/// A host name in a [`PartitionPlace`], as DNS allows.
pub const HOST_BYTES_MAX: usize = 255;

macro_rules! kinds {
    ($($(#[doc = $doc:literal])* $name:ident = $number:literal;)*) => {
        /// What a frame is. Numbers are never reused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Kind {
            $($(#[doc = $doc])* $name = $number,)*
        }

        /// Number, name and meaning of each kind, as the README lists them.
        #[cfg(test)]
        pub(crate) const KINDS: &[(u8, &str, &str)] = &[$(($number, stringify!($name), concat!($($doc),*))),*];

        impl Kind {
            pub const ALL: &'static [Kind] = &[$(Kind::$name),*];

            pub fn from_number(number: u8) -> Option<Kind> {
                match number {
                    $($number => Some(Kind::$name),)*
                    _ => None,
                }
            }
        }

        $(
            impl Message for $name {
                const KIND: Kind = Kind::$name;

                fn archive_to(&self, out: &mut Vec<u8>) {
                    to_bytes_in::<_, Panic>(self, out).expect("archiving into memory does not fail");
                }
            }
        )*
    };
}

kinds! {
    /// The first frame of a client.
    Hello = 1;
    /// The answer to `Hello`.
    Welcome = 2;
    /// The answer to any request that failed.
    Error = 3;
    /// Asks for a sign of life; either side may.
    Ping = 4;
    /// The answer to `Ping`.
    Pong = 5;
    /// The answer to a request that has nothing else to tell.
    Done = 6;

    /// Answered with `Topic`.
    CreateTopic = 10;
    /// Deletes a topic with all that is in it. Answered with `Done`.
    DeleteTopic = 11;
    /// Answered with `Topics`.
    ListTopics = 12;
    /// The answer to `ListTopics`.
    Topics = 13;
    /// Asks where the partitions of a topic live, and for its policy. Answered with `Topic`.
    Lookup = 14;
    /// The answer to `CreateTopic` and `Lookup`.
    Topic = 15;
    /// Answered with `PartitionState`.
    DescribePartition = 16;
    /// The answer to `DescribePartition`.
    PartitionState = 17;

    /// Begins a new epoch of an idempotent producer. Answered with `ProducerOpened`.
    OpenProducer = 30;
    /// The answer to `OpenProducer`.
    ProducerOpened = 31;
    /// Payload: one batch. Answered with `Published`.
    Publish = 32;
    /// The answer to `Publish`, once the batch is as safe as the topic promises.
    Published = 33;

    /// Asks for batches from an offset on; waits for the first if there is none. Answered with `Fetched`.
    Fetch = 40;
    /// The answer to `Fetch`. Payload: batches, each padded to 16 bytes.
    Fetched = 41;
    /// Asks for the offset of a place. Answered with `Located`.
    Locate = 42;
    /// The answer to `Locate` and `Seek`.
    Located = 43;
    /// Names messages that are damaged on disk: the answer to `Fetch` there, and pushed to a consumer who is past them.
    Damaged = 44;

    /// Attaches a consumer to a durable subscription. Answered with `Subscribed`.
    Subscribe = 50;
    /// The answer to `Subscribe`.
    Subscribed = 51;
    /// Grants credit to the node; has no answer.
    Flow = 52;
    /// Pushed by the node. Payload: batches, each padded to 16 bytes.
    Deliver = 53;
    /// Moves the cursor of a subscription. Answered with `Done` if its correlation id is not 0.
    Ack = 54;
    /// Moves the cursor to a place, backwards too. Answered with `Located`; deliveries go on from there.
    Seek = 55;
    /// Ends a consumer; the subscription and its cursor stay. Answered with `Done`.
    CloseConsumer = 56;
    /// Ends a subscription with its cursor. Answered with `Done`.
    DeleteSubscription = 57;
}

/// A body that knows its kind.
pub trait Message {
    const KIND: Kind;

    /// Appends the archive to `out`.
    fn archive_to(&self, out: &mut Vec<u8>);
}

/// A message whose archive can be checked and copied out: all of them.
pub trait Body:
    Message
    + Sized
    + Archive<
        Archived: Portable
                      + for<'a> CheckBytes<HighValidator<'a, Failure>>
                      + Deserialize<Self, HighDeserializer<Failure>>,
    >
{
}

impl<M> Body for M where
    M: Message
        + Archive<
            Archived: Portable
                          + for<'a> CheckBytes<HighValidator<'a, Failure>>
                          + Deserialize<M, HighDeserializer<Failure>>,
        >
{
}

// The archive library's own reasons name addresses in memory, which a client has no business to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the body is no valid archive of {kind:?}")]
pub struct BodyError {
    pub kind: Kind,
}

/// Checks `body` and returns the archive where it lies. Every offset, length, enum and string is checked; no two
/// pointers may lead to the same bytes, so that copying out takes no more than a few times the size of the body.
pub fn access<M: Body>(body: &[u8]) -> Result<&M::Archived, BodyError> {
    rkyv::access::<M::Archived, Failure>(body).map_err(|Failure| BodyError { kind: M::KIND })
}

/// Checks `body` and copies it out.
pub fn decode<M: Body>(body: &[u8]) -> Result<M, BodyError> {
    rkyv::from_bytes::<M, Failure>(body).map_err(|Failure| BodyError { kind: M::KIND })
}

/// When a publish is acknowledged.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[rkyv(derive(Debug, Clone, Copy, PartialEq, Eq))]
pub enum Durability {
    /// After the durable write of the entry and of all before it.
    #[default]
    Disk,
    /// When the entry is staged in memory; it reaches the disk with the next flush, and a crash before that loses it.
    Memory,
}

/// What one partition may hold in the ledger cache of its shard: all there is, nothing, so many bytes, or a share.
///
/// One number wherever it is kept: 0 for all there is, bytes below 2^63, and from there on percent of the shard's cache.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[rkyv(derive(Debug, Clone, Copy, PartialEq, Eq))]
pub struct CachePolicy(u64);

impl CachePolicy {
    /// As much as the shard has: the oldest entries of all its partitions go first.
    pub const SHARED: CachePolicy = CachePolicy(0);
    /// Nothing: readers are served from the disk, and nobody else's entries make room for these.
    pub const NONE: CachePolicy = CachePolicy(PERCENT);

    /// `None`: 0, which would say something else, or more than a policy can say.
    pub fn bytes(bytes: u64) -> Option<CachePolicy> {
        (0 < bytes && bytes < PERCENT).then_some(CachePolicy(bytes))
    }

    /// 1 to 100 percent of the cache of the shard.
    pub fn percent(percent: u8) -> Option<CachePolicy> {
        (1..=100).contains(&percent).then_some(CachePolicy(PERCENT + u64::from(percent)))
    }

    /// From its number; says nothing about whether the number means something.
    pub fn from_number(number: u64) -> CachePolicy {
        CachePolicy(number)
    }

    pub fn number(self) -> u64 {
        self.0
    }

    /// Whether the number means something: a client may have sent any.
    pub fn is_valid(self) -> bool {
        self.0 <= PERCENT + 100
    }

    /// The bytes that a policy of bytes says.
    pub fn as_bytes(self) -> Option<u64> {
        (0 < self.0 && self.0 < PERCENT).then_some(self.0)
    }

    /// The percent that a share says; 0 for nothing.
    pub fn as_percent(self) -> Option<u8> {
        let percent = self.0.checked_sub(PERCENT)?;
        Some(percent.min(100) as u8)
    }

    /// What it comes to in a cache of `cache_bytes`. `None`: no limit but that of the cache.
    pub fn limit_bytes(self, cache_bytes: u64) -> Option<u64> {
        let share = |percent: u8| (u128::from(cache_bytes) * u128::from(percent) / 100) as u64;
        self.as_percent().map(share).or(self.as_bytes())
    }
}

/// Numbers of [`CachePolicy`] from here on are percent.
const PERCENT: u64 = 1 << 63;

impl Default for TopicPolicy {
    fn default() -> Self {
        Self {
            partitions: 1,
            durability: Durability::Disk,
            retention_ms: 0,
            retention_bytes: 0,
            trim_consumed: false,
            cache: CachePolicy::SHARED,
            replicas: 1,
            ack_quorum: 1,
        }
    }
}

/// A place in a partition, as a reader names it.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[rkyv(derive(Debug))]
pub enum Place {
    /// The oldest message that is kept.
    Earliest,
    /// The next message to be published.
    Latest,
    Offset(u64),
    /// The first message appended at or after this time, in ms since the epoch.
    Time(u64),
}

/// One field of an archive, as the README draws it.
#[cfg(test)]
pub(crate) struct Field {
    pub name: &'static str,
    pub kind: &'static str,
    pub offset: usize,
    pub doc: &'static str,
}

/// One archived struct, as the README draws it.
#[cfg(test)]
pub(crate) struct Layout {
    pub name: &'static str,
    pub bytes: usize,
    pub fields: &'static [Field],
}

macro_rules! bodies {
    ($($(#[$doc:meta])* $name:ident { $($(#[doc = $field_doc:literal])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
            #[rkyv(derive(Debug))]
            pub struct $name { $($(#[doc = $field_doc])* pub $field: $type,)* }
        )*

        #[cfg(test)]
        pub(crate) const LAYOUTS: &[Layout] = &[$(Layout {
            name: stringify!($name),
            bytes: size_of::<<$name as Archive>::Archived>(),
            fields: &[$(Field {
                name: stringify!($field),
                kind: stringify!($type),
                offset: std::mem::offset_of!(<$name as Archive>::Archived, $field),
                doc: concat!($($field_doc),*),
            }),*],
        }),*];
    };
}

bodies! {
    Hello {
        version_min: u8,
        version_max: u8,
        /// Name and version of the client, for the operator's eyes. At most 256 bytes.
        client: String,
        token: Option<String>,
    }
    Welcome {
        /// The highest version that both speak.
        version: u8,
        node: u64,
        shard: u16,
        shard_count: u16,
        /// The largest payload accepted in one frame, in bytes.
        payload_bytes_max: u32,
        /// Requests that one connection may have waiting; more are not read until answers went out.
        in_flight_max: u32,
        /// Bits of optional abilities; none are defined yet.
        features: u64,
    }
    Error {
        /// The number of an `ErrorCode`; unknown ones mean `Internal`.
        code: u16,
        /// Pause before trying again, in ms; 0 where trying again is no use or needs no pause.
        retry_after_ms: u32,
        /// Short, for people; holds neither paths nor addresses.
        text: String,
    }
    Ping {}
    Pong {}
    Done {}
    CreateTopic {
        name: String,
        policy: TopicPolicy,
        /// Answer with the topic as it is when it exists already.
        exists_ok: bool,
    }
    DeleteTopic { name: String, }
    ListTopics {
        /// Only names that start so; empty: all.
        prefix: String,
        /// Only names after this one; empty: from the start.
        after: String,
        /// At most this many, 1..=1000.
        limit: u32,
    }
    Topics {
        names: Vec<String>,
        /// There are more after the last.
        more: bool,
    }
    Lookup { name: String, }
    Topic {
        topic: u64,
        /// In its full form.
        name: String,
        policy: TopicPolicy,
        partitions: Vec<PartitionPlace>,
    }
    DescribePartition { partition: u64, }
    PartitionState {
        partition: u64,
        start_offset: u64,
        end_offset: u64,
        ledgers: u32,
        /// Bytes of all kept entries.
        stored_bytes: u64,
        subscriptions: Vec<SubscriptionState>,
    }
    OpenProducer {
        partition: u64,
        /// Not 0.
        producer: u64,
    }
    ProducerOpened {
        /// To be put into every batch; batches of lower epochs are refused from now on.
        epoch: u32,
        /// The base sequence that the next batch must have.
        next_sequence: u64,
    }
    Publish { partition: u64, }
    Published {
        /// Offset of the batch's first message; `u64::MAX` for a duplicate so old that its offset is not remembered.
        base_offset: u64,
        /// The batch had been appended before.
        duplicate: bool,
    }
    Fetch {
        partition: u64,
        offset: u64,
        /// Answer with at most this many bytes, but with at least one batch.
        bytes_max: u32,
        /// Wait this long for the first message when there is none.
        wait_ms: u32,
    }
    Fetched {
        /// The offset to fetch from next.
        next_offset: u64,
        start_offset: u64,
        /// One past the last message that readers may see.
        end_offset: u64,
    }
    Damaged {
        partition: u64,
        /// The consumer that it is pushed to; 0 in an answer.
        consumer: u32,
        /// The first message that cannot be read.
        first_offset: u64,
        /// The first that may be read again: fetch from here.
        next_offset: u64,
    }
    Locate { partition: u64, place: Place, }
    Located { offset: u64, start_offset: u64, end_offset: u64, }
    Subscribe {
        partition: u64,
        /// Chosen by the client, unique on its connection.
        consumer: u32,
        /// Name of the durable subscription: 1..=128 bytes. Its mode is exclusive.
        subscription: String,
        /// Where a subscription that does not exist yet starts.
        start: Place,
        /// Instead of refusing, take over from the consumer that is there.
        take_over: bool,
    }
    Subscribed {
        /// Deliveries start here.
        offset: u64,
        start_offset: u64,
        end_offset: u64,
    }
    Flow {
        consumer: u32,
        /// Added to the bytes that the node may deliver before it hears again. A batch is sent when any credit is left.
        bytes: u32,
    }
    Deliver {
        consumer: u32,
        next_offset: u64,
        end_offset: u64,
    }
    Ack {
        consumer: u32,
        /// All messages below this offset are done.
        offset: u64,
    }
    Seek { consumer: u32, place: Place, }
    CloseConsumer { consumer: u32, }
    DeleteSubscription { partition: u64, subscription: String, }

    /// What a topic promises and what it may use.
    TopicPolicy {
        /// 1..=1024.
        partitions: u32,
        durability: Durability,
        /// Closed ledgers whose newest message is older are deleted. 0: kept for ever.
        retention_ms: u64,
        /// Oldest closed ledgers of a partition are deleted while it holds more. 0: no limit.
        retention_bytes: u64,
        /// Closed ledgers that every subscription has passed are deleted; while there is no subscription, none are.
        trim_consumed: bool,
        /// What one partition may hold in the ledger cache of its shard.
        cache: CachePolicy,
        /// Nodes that hold each entry.
        replicas: u8,
        /// Nodes that must hold an entry before it is acknowledged.
        ack_quorum: u8,
    }
    /// Where one partition lives.
    PartitionPlace {
        partition: u64,
        /// 0-based place in its topic.
        index: u32,
        node: u64,
        shard: u16,
        /// Host or IP of the owner; empty: the host that the client is connected to.
        host: String,
        /// Port of the owning core.
        port: u16,
    }
    /// A durable cursor as `DescribePartition` tells it.
    SubscriptionState {
        name: String,
        offset: u64,
        connected: bool,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_policy_comes_to_bytes() {
        let cache_bytes = 128 << 20;
        assert_eq!(CachePolicy::SHARED.limit_bytes(cache_bytes), None);
        assert_eq!(CachePolicy::NONE.limit_bytes(cache_bytes), Some(0));
        assert_eq!(CachePolicy::bytes(4096).unwrap().limit_bytes(cache_bytes), Some(4096));
        assert_eq!(CachePolicy::percent(25).unwrap().limit_bytes(cache_bytes), Some(32 << 20));
        assert_eq!(CachePolicy::percent(100).unwrap().limit_bytes(u64::MAX), Some(u64::MAX));
        assert_eq!(CachePolicy::bytes(0), None);
        assert_eq!(CachePolicy::bytes(1 << 63), None);
        assert_eq!((CachePolicy::percent(0), CachePolicy::percent(101)), (None, None));
    }

    #[test]
    fn the_numbers_of_cache_policies_are_part_of_the_format() {
        let policies = [CachePolicy::SHARED, CachePolicy::bytes(6).unwrap(), CachePolicy::NONE];
        assert_eq!(policies.map(CachePolicy::number), [0, 6, 1 << 63]);
        assert_eq!(CachePolicy::percent(100).unwrap().number(), (1 << 63) + 100);
        assert!(CachePolicy::from_number((1 << 63) + 100).is_valid());
        assert!(!CachePolicy::from_number((1 << 63) + 101).is_valid());
        assert!(!CachePolicy::from_number(u64::MAX).is_valid());
    }
}
