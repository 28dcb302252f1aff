//! openraft's types, as this crate uses them.

use std::fmt;
use std::rc::Rc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::command::{Applied, Command, Rejected};
use crate::runtime::LocalRuntime;

openraft::declare_raft_types!(
    pub TypeConfig:
        D = Command,
        R = Response,
        // At most one leader a term, as in the paper.
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>,
        AsyncRuntime = LocalRuntime,
);

pub type Entry = <TypeConfig as openraft::RaftTypeConfig>::Entry;
pub type EntryPayload = <TypeConfig as openraft::RaftTypeConfig>::Payload;
pub type Vote = <TypeConfig as openraft::RaftTypeConfig>::Vote;
pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub type LogState = openraft::storage::LogState<TypeConfig>;
pub type IoFlushed = openraft::storage::IOFlushed<TypeConfig>;
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub type EntryResponder = openraft::storage::EntryResponder<TypeConfig>;
/// An encoded [`crate::State`].
pub type SnapshotData = Rc<Vec<u8>>;
pub type Snapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotData>;

/// What applying an entry gave. It goes from the state machine to the proposer on the same executor and has no form in
/// bytes: openraft asks for one and never uses it.
#[derive(Clone, Debug)]
pub struct Response(pub Option<Result<Applied, Rejected>>);

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl Serialize for Response {
    fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom("a response stays on its executor"))
    }
}

impl<'de> Deserialize<'de> for Response {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(serde::de::Error::custom("a response stays on its executor"))
    }
}
