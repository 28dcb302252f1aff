//! Records of the raft log as they lie on disk: a version byte, then the record in postcard's form.
//!
//! The disk below keeps each record whole and checks it; here is only what it means. The forms of entries and votes are
//! openraft's own. They are part of the format too, which the golden test watches over each upgrade.

use serde::{Deserialize, Serialize};

use crate::types::{Entry, LogId, Vote};

pub const VERSION: u8 = 2;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub enum Record {
    Entry(Entry),
    Vote(Vote),
    Committed(Option<LogId>),
    /// Entries after this one are no longer in the log; `None`: no entry is.
    TruncateAfter(Option<LogId>),
    /// Entries up to `purged` are no longer in the log, and the rest is what earlier records said: with it, they are
    /// no longer needed.
    Checkpoint {
        vote: Option<Vote>,
        committed: Option<LogId>,
        purged: LogId,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("the record is empty")]
    Empty,
    #[error("the record has format version {0}; this release reads {VERSION}")]
    Version(u8),
    #[error("the record cannot be read: {0}")]
    Malformed(String),
}

impl Record {
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![VERSION]).expect("records have no value that postcard cannot write")
    }

    pub fn decode(bytes: &[u8]) -> Result<Record, RecordError> {
        let (&version, body) = bytes.split_first().ok_or(RecordError::Empty)?;
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        match postcard::take_from_bytes(body) {
            Ok((record, [])) => Ok(record),
            Ok((_, rest)) => Err(RecordError::Malformed(format!("{} bytes after its end", rest.len()))),
            Err(error) => Err(RecordError::Malformed(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use drava_protocol::message::{CachePolicy, Durability, TopicPolicy};
    use drava_protocol::topic::TopicName;
    use openraft::impls::leader_id_std::LeaderId;
    use openraft::vote::RaftLeaderId;
    use openraft::{BasicNode, EntryPayload, Membership};

    use super::*;
    use crate::command::{Command, Registration};
    use crate::image::Liveness;

    fn log_id(term: u64, index: u64) -> LogId {
        LogId::new(LeaderId::new(term, 1).to_committed(), index)
    }

    fn entry(index: u64, command: Command) -> Record {
        Record::Entry(Entry { log_id: log_id(2, index), payload: EntryPayload::Normal(command) })
    }

    fn records() -> Vec<Record> {
        let name = TopicName::parse("orders").unwrap();
        let policy = TopicPolicy {
            partitions: 3,
            durability: Durability::Memory,
            retention_ms: 4,
            retention_bytes: 5,
            trim_consumed: true,
            cache: CachePolicy::bytes(6).unwrap(),
            replicas: 7,
            ack_quorum: 8,
        };
        let members = Membership::new(vec![BTreeSet::from([1])], BTreeMap::from([(1, BasicNode::default())])).unwrap();
        let register =
            Registration { node: 1, incarnation: 2, host: "h".into(), shared_port: 3, shard_ports: vec![4, 5] };
        vec![
            Record::Vote(Vote::new_committed(2, 1)),
            Record::Entry(Entry { log_id: log_id(2, 0), payload: EntryPayload::Membership(members) }),
            Record::Entry(Entry { log_id: log_id(2, 1), payload: EntryPayload::Blank }),
            entry(2, Command::CreateTopic { name: name.clone(), policy, created_ms: 9 }),
            entry(3, Command::DeleteTopic { name, expected: Some(1) }),
            entry(4, Command::RegisterNode(register)),
            entry(5, Command::MarkNode { node: 1, incarnation: 2, liveness: Liveness::Down }),
            Record::Committed(Some(log_id(2, 5))),
            Record::TruncateAfter(Some(log_id(2, 5))),
            Record::Checkpoint { vote: Some(Vote::new(3, 1)), committed: None, purged: log_id(2, 5) },
        ]
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_format_on_disk_has_not_changed() {
        let golden = include_str!("../golden/records-2.hex");
        let found: Vec<String> = records().iter().map(|record| hex(&record.encode())).collect();
        assert_eq!(found, golden.lines().collect::<Vec<_>>(), "a change here needs a new format version");
    }

    #[test]
    fn records_come_back_as_they_were() {
        for record in records() {
            assert_eq!(Record::decode(&record.encode()).unwrap(), record);
        }
    }

    #[test]
    fn damaged_records_are_errors() {
        assert_eq!(Record::decode(&[]), Err(RecordError::Empty));
        for version in [1, 7] {
            assert_eq!(Record::decode(&[version, 0]), Err(RecordError::Version(version)));
        }
        for record in records() {
            let bytes = record.encode();
            for end in 1..bytes.len() {
                assert!(Record::decode(&bytes[..end]).is_err(), "{record:?} cut at {end}");
            }
            assert!(Record::decode(&[&bytes[..], &[0]].concat()).is_err());
            for at in 0..bytes.len() {
                for bit in 0..8 {
                    let mut flipped = bytes.clone();
                    flipped[at] ^= 1 << bit;
                    drop(Record::decode(&flipped));
                }
            }
        }
    }
}
