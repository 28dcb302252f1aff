//! The metadata state machine: commands in, the next image out. Pure: no clock, no randomness, no IO, so that every
//! member of the group comes to the same state.
//!
//! A command is checked in full before anything changes. Ids are minted from counters that only grow and are part of
//! the state, so a deleted topic's or partition's id never comes back, restart or not.

use std::collections::BTreeMap;
use std::sync::Arc;

use drava_protocol::message::TopicPolicy;
use drava_protocol::topic::TopicName;
use drava_protocol::{NodeId, PartitionId, ShardId, Term, TopicId};

use crate::command::{
    Applied, Command, Effect, HOST_BYTES_MAX, PARTITIONS_MAX, PARTITIONS_PER_TOPIC_MAX, Registration, Rejected,
    SHARDS_PER_NODE_MAX, TOPICS_MAX,
};
use crate::image::{Image, Incarnation, Liveness, Node, Owner, Partition, Topic};
use crate::stored::{StoredNode, StoredPartition, StoredState, StoredTopic, VERSION};

/// All metadata. Compared and serialised as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Changed in place while nobody else holds it, copied when somebody does.
    image: Arc<Image>,
    next_topic: u64,
    /// Partitions placed so far, deleted ones included: the next one goes to the next shard after the last.
    placed: u64,
}

/// The shard of a partition on a node that was started with `shards` of them after it had another number.
///
/// It follows from the id alone, so that the node's storage, which moves before the metadata is there, comes to the same.
/// In a group of one node it is also where a partition is placed when it is made, whatever happened before: a start that
/// was cut short between the two moves can be followed by one with any number of shards.
pub fn shard_of(partition: PartitionId, shards: u16) -> ShardId {
    ShardId((partition.0.saturating_sub(1) % u64::from(shards)) as u16)
}

/// Bytes that are no state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error("the metadata state is empty")]
    Empty,
    #[error("the metadata state has format version {0}; this release reads {VERSION}")]
    Version(u8),
    #[error("the metadata state cannot be read: {0}")]
    Malformed(String),
    #[error("the metadata state contradicts itself: {0}")]
    Contradiction(String),
}

impl Default for State {
    fn default() -> Self {
        // 0 is no id, so that a forgotten one is seen.
        Self { image: Arc::new(Image { next_partition: 1, ..Image::default() }), next_topic: 1, placed: 0 }
    }
}

impl State {
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Applies one command that the group has agreed on. A rejected one leaves everything as it was.
    pub fn apply(&mut self, command: &Command) -> Result<Applied, Rejected> {
        let effect = match command {
            Command::CreateTopic { name, policy, created_ms } => self.create_topic(name, policy, *created_ms)?,
            Command::DeleteTopic { name, expected } => self.delete_topic(name, expected.map(TopicId))?,
            Command::RegisterNode(registration) => self.register_node(registration)?,
            Command::MarkNode { node, incarnation, liveness } => {
                self.mark_node(NodeId(*node), Incarnation(*incarnation), *liveness)?
            }
        };
        if effect != Effect::Nothing {
            Arc::make_mut(&mut self.image).version += 1;
        }
        Ok(Applied { version: self.image.version, effect })
    }

    fn create_topic(&mut self, name: &TopicName, policy: &TopicPolicy, created_ms: u64) -> Result<Effect, Rejected> {
        if self.image.topics.contains_key(name) {
            return Err(Rejected::TopicExists(name.clone()));
        }
        let slots = self.slots();
        self.check_policy(policy)?;
        if self.image.topics.len() >= TOPICS_MAX {
            return Err(Rejected::TooManyTopics);
        }
        let existing = self.image.partitions.len();
        if existing + policy.partitions as usize > PARTITIONS_MAX {
            return Err(Rejected::TooManyPartitions { existing, asked: policy.partitions });
        }
        assert!(!slots.is_empty(), "{} replicas were accepted with no live shard", policy.replicas);

        let image = Arc::make_mut(&mut self.image);
        let mut partitions = Vec::with_capacity(policy.partitions as usize);
        for index in 0..policy.partitions {
            let id = PartitionId(image.next_partition);
            let owner = slots[(self.placed % slots.len() as u64) as usize];
            image.next_partition += 1;
            self.placed += 1;
            partitions.push(id);
            image.partitions.insert(id, Partition { id, topic: name.clone(), index, owner, term: Term(1) });
        }
        let topic = Arc::new(Topic {
            id: TopicId(self.next_topic),
            name: name.clone(),
            policy: policy.clone(),
            partitions,
            created_ms,
        });
        self.next_topic += 1;
        image.topics.insert(name.clone(), topic.clone());
        Ok(Effect::TopicCreated(topic))
    }

    fn check_policy(&self, policy: &TopicPolicy) -> Result<(), Rejected> {
        if !(1..=PARTITIONS_PER_TOPIC_MAX).contains(&policy.partitions) {
            return Err(Rejected::PartitionCount(policy.partitions));
        }
        let nodes = self.image.nodes.values().filter(|node| node.liveness == Liveness::Live).count();
        if policy.replicas == 0 || nodes < usize::from(policy.replicas) {
            return Err(Rejected::Replicas { replicas: policy.replicas, nodes });
        }
        if policy.ack_quorum == 0 || policy.replicas < policy.ack_quorum {
            return Err(Rejected::AckQuorum { ack_quorum: policy.ack_quorum, replicas: policy.replicas });
        }
        if !policy.cache.is_valid() {
            return Err(Rejected::CachePolicy(policy.cache.number()));
        }
        Ok(())
    }

    /// Where partitions may be placed, in the order of placement. Neighbours are on different nodes as far as there are
    /// different nodes: all first shards, then all second ones.
    fn slots(&self) -> Vec<Owner> {
        let live = || self.image.nodes.values().filter(|node| node.liveness == Liveness::Live);
        let shards = live().map(|node| node.shard_count()).max().unwrap_or(0);
        (0..shards)
            .flat_map(|shard| {
                live()
                    .filter(move |node| shard < node.shard_count())
                    .map(move |node| Owner { node: node.id, shard: ShardId(shard as u16) })
            })
            .collect()
    }

    fn delete_topic(&mut self, name: &TopicName, expected: Option<TopicId>) -> Result<Effect, Rejected> {
        let topic = self.image.topics.get(name).ok_or_else(|| Rejected::UnknownTopic(name.clone()))?.clone();
        if let Some(expected) = expected
            && expected != topic.id
        {
            return Err(Rejected::TopicChanged { name: name.clone(), expected, found: topic.id });
        }
        let image = Arc::make_mut(&mut self.image);
        image.topics.remove(name);
        for partition in &topic.partitions {
            let removed = image.partitions.remove(partition);
            assert!(removed.is_some(), "topic {name} names partition {partition}, which is not in the image");
        }
        Ok(Effect::TopicDeleted(topic))
    }

    fn register_node(&mut self, registration: &Registration) -> Result<Effect, Rejected> {
        let node = NodeId(registration.node);
        let shards = registration.shard_ports.len();
        if !(1..=SHARDS_PER_NODE_MAX).contains(&shards) {
            return Err(Rejected::ShardCount { node, shards });
        }
        if registration.host.len() > HOST_BYTES_MAX {
            return Err(Rejected::HostTooLong { node, bytes: registration.host.len() });
        }
        if let Some(known) = self.image.nodes.get(&node)
            && known.incarnation.0 != registration.incarnation
            && self.image.partitions.values().any(|partition| partition.owner.node == node)
        {
            let (known, offered) = (known.incarnation.0, registration.incarnation);
            return Err(Rejected::OtherIncarnation { node, known, offered });
        }
        if self.image.nodes.get(&node).is_some_and(|known| known.shard_count() != shards) {
            self.place_again(node, shards as u16);
        }
        Ok(self.put_node(registration.clone().into_node()))
    }

    /// Gives the partitions of a node that comes back with another number of shards to the shards it has now.
    fn place_again(&mut self, node: NodeId, shards: u16) {
        let moved: Vec<Partition> = (self.image.partitions.values())
            .filter(|partition| partition.owner.node == node)
            .filter(|partition| partition.owner.shard != shard_of(partition.id, shards))
            .cloned()
            .collect();
        let image = Arc::make_mut(&mut self.image);
        for partition in moved {
            let owner = Owner { node, shard: shard_of(partition.id, shards) };
            let term = Term(partition.term.0 + 1);
            image.partitions.insert(partition.id, Partition { owner, term, ..partition });
        }
    }

    fn mark_node(&mut self, id: NodeId, incarnation: Incarnation, liveness: Liveness) -> Result<Effect, Rejected> {
        let known = self.image.nodes.get(&id).ok_or(Rejected::UnknownNode(id))?;
        if known.incarnation != incarnation {
            let (known, offered) = (known.incarnation.0, incarnation.0);
            return Err(Rejected::OtherIncarnation { node: id, known, offered });
        }
        let node = Node { liveness, ..(**known).clone() };
        Ok(self.put_node(node))
    }

    fn put_node(&mut self, node: Node) -> Effect {
        if self.image.nodes.get(&node.id).is_some_and(|known| **known == node) {
            return Effect::Nothing;
        }
        let node = Arc::new(node);
        Arc::make_mut(&mut self.image).nodes.insert(node.id, node.clone());
        Effect::NodeChanged(node)
    }

    /// The whole state; equal states give equal bytes.
    pub fn encode(&self) -> Vec<u8> {
        let nodes = self.image.nodes.values().map(|node| StoredNode {
            id: node.id.0,
            incarnation: node.incarnation.0,
            host: node.host.clone(),
            shared_port: node.shared_port,
            shard_ports: node.shard_ports.clone(),
            liveness: node.liveness,
        });
        let stored_partition = |id: &PartitionId| {
            let partition = &self.image.partitions[id];
            StoredPartition {
                id: id.0,
                node: partition.owner.node.0,
                shard: partition.owner.shard.0,
                term: partition.term.0,
            }
        };
        let topics = self.image.topics.values().map(|topic| StoredTopic {
            id: topic.id.0,
            name: topic.name.as_str().to_owned(),
            policy: topic.policy.clone(),
            created_ms: topic.created_ms,
            partitions: topic.partitions.iter().map(stored_partition).collect(),
        });
        let stored = StoredState {
            version: self.image.version,
            next_topic: self.next_topic,
            next_partition: self.image.next_partition,
            placed: self.placed,
            nodes: nodes.collect(),
            topics: topics.collect(),
        };
        postcard::to_extend(&stored, vec![VERSION]).expect("the stored forms have no value that postcard cannot write")
    }

    /// Reads what [`State::encode`] wrote. Damaged bytes are an error, even if they parse.
    pub fn decode(bytes: &[u8]) -> Result<State, StateError> {
        let (&version, body) = bytes.split_first().ok_or(StateError::Empty)?;
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        let (stored, rest): (StoredState, &[u8]) =
            postcard::take_from_bytes(body).map_err(|error| StateError::Malformed(error.to_string()))?;
        if !rest.is_empty() {
            return Err(StateError::Malformed(format!("{} bytes after its end", rest.len())));
        }
        from_stored(stored)
    }
}

fn from_stored(stored: StoredState) -> Result<State, StateError> {
    let contradiction = |text: String| StateError::Contradiction(text);
    let mut image = Image { version: stored.version, next_partition: stored.next_partition, ..Image::default() };
    for node in stored.nodes {
        let id = NodeId(node.id);
        let node = Node {
            id,
            incarnation: Incarnation(node.incarnation),
            host: node.host,
            shared_port: node.shared_port,
            shard_ports: node.shard_ports,
            liveness: node.liveness,
        };
        if image.nodes.insert(id, Arc::new(node)).is_some() {
            return Err(contradiction(format!("node {id} is in it twice")));
        }
    }
    let mut topic_ids = BTreeMap::new();
    for topic in stored.topics {
        let name = TopicName::parse(&topic.name).map_err(|error| contradiction(error.to_string()))?;
        if stored.next_topic <= topic.id || topic_ids.insert(topic.id, ()).is_some() {
            return Err(contradiction(format!("topic {name} has number {}, which is not its own", topic.id)));
        }
        if topic.policy.partitions as usize != topic.partitions.len() {
            let (said, has) = (topic.policy.partitions, topic.partitions.len());
            return Err(contradiction(format!("topic {name} has {has} partitions and not {said}")));
        }
        let partitions = topic.partitions.iter().map(|partition| PartitionId(partition.id)).collect();
        for (index, partition) in topic.partitions.iter().enumerate() {
            let id = PartitionId(partition.id);
            let owner = Owner { node: NodeId(partition.node), shard: ShardId(partition.shard) };
            let entry = Partition { id, topic: name.clone(), index: index as u32, owner, term: Term(partition.term) };
            if stored.next_partition <= id.0 || image.partitions.insert(id, entry).is_some() {
                return Err(contradiction(format!("topic {name} has partition {id}, which is not its own")));
            }
        }
        let topic = Topic {
            id: TopicId(topic.id),
            name: name.clone(),
            policy: topic.policy,
            partitions,
            created_ms: topic.created_ms,
        };
        if image.topics.insert(name.clone(), Arc::new(topic)).is_some() {
            return Err(contradiction(format!("topic {name} is in it twice")));
        }
    }
    Ok(State { image: Arc::new(image), next_topic: stored.next_topic, placed: stored.placed })
}

#[cfg(test)]
mod tests {
    use drava_protocol::message::{CachePolicy, Durability};

    use super::*;

    fn name(text: &str) -> TopicName {
        TopicName::parse(text).unwrap()
    }

    fn register(node: u64, shards: u16) -> Command {
        Command::RegisterNode(Registration {
            node,
            incarnation: 7 + u128::from(node),
            host: String::new(),
            shared_port: 7400,
            shard_ports: (0..shards).map(|shard| 7401 + shard).collect(),
        })
    }

    fn create(topic: &str, partitions: u32) -> Command {
        let policy = TopicPolicy { partitions, ..TopicPolicy::default() };
        Command::CreateTopic { name: name(topic), policy, created_ms: 1000 }
    }

    fn delete(topic: &str) -> Command {
        Command::DeleteTopic { name: name(topic), expected: None }
    }

    fn state(shards: u16) -> State {
        let mut state = State::default();
        state.apply(&register(1, shards)).unwrap();
        state
    }

    fn created(state: &mut State, command: &Command) -> Arc<Topic> {
        match state.apply(command).unwrap().effect {
            Effect::TopicCreated(topic) => topic,
            other => panic!("not created: {other:?}"),
        }
    }

    #[test]
    fn partitions_go_round_the_shards_and_continue_where_the_last_topic_ended() {
        let mut state = state(3);
        created(&mut state, &create("a", 2));
        created(&mut state, &create("b", 5));
        let shards: Vec<u16> = state.image().partitions.values().map(|partition| partition.owner.shard.0).collect();
        assert_eq!(shards, [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn partitions_follow_the_number_of_shards_of_their_node() {
        let mut state = state(3);
        created(&mut state, &create("a", 4));
        created(&mut state, &create("gone", 1));
        state.apply(&delete("gone")).unwrap();
        let older = state.image().clone();
        for shards in [2, 5, 1, 8, 3] {
            let effect = state.apply(&register(1, shards)).unwrap().effect;
            assert!(matches!(effect, Effect::NodeChanged(_)));
            created(&mut state, &create(&format!("with-{shards}"), 3));
            for partition in state.image().partitions.values() {
                assert_eq!(partition.owner.shard, shard_of(partition.id, shards), "{} of {shards}", partition.id);
                assert!(state.image().place(partition.id).is_some());
            }
        }
        // Back where it was, under a higher term: an owner of before is told from that of now.
        let (before, now) = (&older.partitions[&PartitionId(3)], &state.image().partitions[&PartitionId(3)]);
        assert_eq!(before.owner, now.owner);
        assert!(before.term < now.term);
    }

    #[test]
    fn neighbours_are_on_different_nodes() {
        let mut state = state(2);
        state.apply(&register(2, 1)).unwrap();
        created(&mut state, &create("a", 4));
        let owners: Vec<(u64, u16)> =
            state.image().partitions.values().map(|p| (p.owner.node.0, p.owner.shard.0)).collect();
        assert_eq!(owners, [(1, 0), (2, 0), (1, 1), (1, 0)]);
    }

    #[test]
    fn a_node_that_is_down_gets_no_new_partitions() {
        let mut state = state(1);
        state.apply(&register(2, 1)).unwrap();
        state.apply(&Command::MarkNode { node: 1, incarnation: 8, liveness: Liveness::Down }).unwrap();
        created(&mut state, &create("a", 3));
        assert!(state.image().partitions.values().all(|partition| partition.owner.node == NodeId(2)));
    }

    #[test]
    fn ids_are_never_used_again() {
        let mut state = state(2);
        let first = created(&mut state, &create("a", 2));
        state.apply(&delete("a")).unwrap();
        assert!(state.image().partitions.is_empty());
        let mut state = State::decode(&state.encode()).unwrap();
        let second = created(&mut state, &create("a", 2));
        assert!(first.id < second.id);
        assert!(first.partitions.iter().max() < second.partitions.iter().min());
    }

    #[test]
    fn a_rejected_command_changes_nothing() {
        let mut state = state(2);
        created(&mut state, &create("a", 2));
        let before = state.clone();
        let policy = |partitions, replicas, ack_quorum| Command::CreateTopic {
            name: name("b"),
            policy: TopicPolicy { partitions, replicas, ack_quorum, ..TopicPolicy::default() },
            created_ms: 0,
        };
        let cached = |number| Command::CreateTopic {
            name: name("b"),
            policy: TopicPolicy { cache: CachePolicy::from_number(number), ..TopicPolicy::default() },
            created_ms: 0,
        };
        let expected = [
            (create("a", 1), Rejected::TopicExists(name("a"))),
            (policy(0, 1, 1), Rejected::PartitionCount(0)),
            (policy(1025, 1, 1), Rejected::PartitionCount(1025)),
            (policy(1, 0, 1), Rejected::Replicas { replicas: 0, nodes: 1 }),
            (policy(1, 2, 1), Rejected::Replicas { replicas: 2, nodes: 1 }),
            (policy(1, 1, 0), Rejected::AckQuorum { ack_quorum: 0, replicas: 1 }),
            (policy(1, 1, 2), Rejected::AckQuorum { ack_quorum: 2, replicas: 1 }),
            (cached(u64::MAX), Rejected::CachePolicy(u64::MAX)),
            (delete("b"), Rejected::UnknownTopic(name("b"))),
            (
                Command::DeleteTopic { name: name("a"), expected: Some(9) },
                Rejected::TopicChanged { name: name("a"), expected: TopicId(9), found: TopicId(1) },
            ),
            (register(3, 0), Rejected::ShardCount { node: NodeId(3), shards: 0 }),
            (Command::MarkNode { node: 5, incarnation: 0, liveness: Liveness::Down }, Rejected::UnknownNode(NodeId(5))),
        ];
        for (command, rejected) in expected {
            assert_eq!(state.apply(&command), Err(rejected));
            assert_eq!(state, before);
        }
    }

    #[test]
    fn a_node_without_its_data_is_not_taken_for_the_old_one() {
        let mut state = state(1);
        let Command::RegisterNode(other) = register(1, 1) else { unreachable!() };
        let other = Command::RegisterNode(Registration { incarnation: 99, ..other });
        state.apply(&other).expect("it owns nothing yet");
        created(&mut state, &create("a", 1));
        assert_eq!(
            state.apply(&register(1, 1)),
            Err(Rejected::OtherIncarnation { node: NodeId(1), known: 99, offered: 8 })
        );
    }

    #[test]
    fn a_topic_cannot_be_placed_without_a_node() {
        let error = State::default().apply(&create("a", 1)).unwrap_err();
        assert_eq!(error, Rejected::Replicas { replicas: 1, nodes: 0 });
        assert_eq!(error.code(), drava_protocol::ErrorCode::InvalidArgument);
    }

    #[test]
    fn the_version_counts_changes_and_old_images_stay() {
        let mut state = state(1);
        let old = state.image().clone();
        assert_eq!(state.apply(&register(1, 1)).unwrap(), Applied { version: 1, effect: Effect::Nothing });
        created(&mut state, &create("a", 1));
        assert_eq!(state.image().version, 2);
        assert_eq!(old.version, 1);
        assert!(old.topics.is_empty());
    }

    #[test]
    fn an_image_knows_what_changed_since_an_older_one() {
        let mut state = state(2);
        let gone = created(&mut state, &create("gone", 2));
        created(&mut state, &create("stays", 2));
        let older = state.image().clone();
        state.apply(&delete("gone")).unwrap();
        let new = created(&mut state, &create("new", 1));
        let expected: Vec<PartitionId> = gone.partitions.iter().chain(&new.partitions).copied().collect();
        assert_eq!(state.image().partitions_changed_since(&older), expected);
        assert_eq!(state.image().partitions_changed_since(&Image::default()).len(), 3);
    }

    #[test]
    fn the_same_commands_give_the_same_bytes() {
        let run = || {
            let mut state = state(3);
            for command in [create("b", 4), create("a", 2), delete("b"), create("c", 1)] {
                state.apply(&command).unwrap();
            }
            state
        };
        assert_eq!(run().encode(), run().encode());
        assert_eq!(State::decode(&run().encode()).unwrap(), run());
    }

    #[test]
    fn a_topic_comes_back_with_all_of_its_policy() {
        let mut state = state(2);
        let policy = TopicPolicy {
            partitions: 2,
            durability: Durability::Memory,
            retention_ms: 60_000,
            retention_bytes: 1 << 30,
            trim_consumed: true,
            cache: CachePolicy::percent(10).unwrap(),
            replicas: 1,
            ack_quorum: 1,
        };
        let command = Command::CreateTopic { name: name("a"), policy: policy.clone(), created_ms: 7 };
        created(&mut state, &command);
        let read = State::decode(&state.encode()).unwrap();
        assert_eq!(read.image().topics[&name("a")].policy, policy);
        assert_eq!(read, state);
    }

    #[test]
    fn damaged_states_are_errors() {
        let mut state = state(2);
        created(&mut state, &create("a", 2));
        let bytes = state.encode();
        assert_eq!(State::decode(&[]), Err(StateError::Empty));
        assert_eq!(State::decode(&[9]), Err(StateError::Version(9)));
        for end in 1..bytes.len() {
            assert!(State::decode(&bytes[..end]).is_err(), "cut at {end}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(matches!(State::decode(&longer), Err(StateError::Malformed(_))));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                // Whatever it reads as, it is no panic; the checksum of the snapshot is what finds the rest.
                drop(State::decode(&flipped));
            }
        }
    }

    #[test]
    fn places_name_the_port_of_the_owning_core() {
        let mut state = state(2);
        let topic = created(&mut state, &create("a", 2));
        let place = state.image().place(topic.partitions[1]).unwrap();
        assert_eq!((place.index, place.node, place.shard, place.port), (1, 1, 1, 7402));
        assert_eq!(state.image().place(PartitionId(99)), None);
        let owner = Owner { node: NodeId(1), shard: ShardId(1) };
        assert_eq!(state.image().owned_by(owner).map(|p| p.id).collect::<Vec<_>>(), [topic.partitions[1]]);
    }
}
