//! The control core with the metadata group of a real node and shards that are made up, all on one executor.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use drava_protocol::message::{PartitionState, TopicPolicy};
use drava_protocol::topic::TopicName;
use drava_protocol::{ErrorCode, NodeId, PartitionId, ShardId};
use drava_raft::{Image, MemoryDisk, Owner, Registration};
use drava_runtime::foreign::{Inbox, InboxSender, inbox, reply};
use drava_runtime::task::{Stop, TaskHandle};
use drava_runtime::{Executor, ExecutorConfig};

use super::{ControlConfig, ControlCore, ControlEnds, ControlError, ControlRequest, ControlStarted, Refused, run};
use crate::shard::command::ShardCommand;
use crate::shard::stats::ShardStats;

fn on_executor(test: impl Future<Output = ()>) {
    Executor::run(ExecutorConfig::new("test", None), test).expect("an executor");
}

fn name(topic: &str) -> TopicName {
    TopicName::parse(topic).unwrap()
}

fn policy(partitions: u32) -> TopicPolicy {
    TopicPolicy { partitions, ..TopicPolicy::default() }
}

fn config(shards: u16) -> ControlConfig {
    let registration = Registration {
        node: 1,
        incarnation: 77,
        host: String::new(),
        shared_port: 7400,
        shard_ports: (0..shards).map(|shard| 7401 + shard).collect(),
    };
    ControlConfig {
        start_timeout: Duration::from_millis(300),
        shard_timeout: Duration::from_millis(300),
        drain_timeout: Duration::from_millis(300),
        ..ControlConfig::new(registration)
    }
}

/// A shard that does as it is told, or nothing at all while it is stuck.
struct FakeShard {
    id: u16,
    image: RefCell<Arc<Image>>,
    stuck: Cell<bool>,
    drained: Cell<bool>,
    /// What its store holds.
    highest_partition: Cell<Option<PartitionId>>,
}

impl FakeShard {
    fn start(id: u16) -> (Rc<FakeShard>, InboxSender<ShardCommand>) {
        let (sender, commands) = inbox();
        let shard = Rc::new(FakeShard {
            id,
            image: RefCell::default(),
            stuck: Cell::new(false),
            drained: Cell::new(false),
            highest_partition: Cell::new(None),
        });
        drava_runtime::spawn(shard.clone().obey(commands));
        (shard, sender)
    }

    async fn obey(self: Rc<Self>, mut commands: Inbox<ShardCommand>) {
        while let Some(command) = commands.recv().await {
            while self.stuck.get() {
                drava_runtime::time::sleep(Duration::from_millis(5)).await;
            }
            match command {
                ShardCommand::Image { image, done } => {
                    assert!(self.image.borrow().version < image.version, "an image came twice, or out of order");
                    *self.image.borrow_mut() = image;
                    done.send(());
                }
                ShardCommand::Stats { reply } => reply.send(ShardStats { shard: self.id, ..ShardStats::default() }),
                ShardCommand::Damage { reply } => reply.send(Vec::new()),
                ShardCommand::DescribePartition { partition, reply } => {
                    let owner = self.image.borrow().partitions.get(&partition).map(|partition| partition.owner);
                    let mine = owner == Some(Owner { node: NodeId(1), shard: ShardId(self.id) });
                    reply.send(mine.then(|| PartitionState {
                        partition: partition.0,
                        start_offset: 0,
                        end_offset: 0,
                        ledgers: 0,
                        stored_bytes: 0,
                        subscriptions: Vec::new(),
                    }));
                }
                ShardCommand::Drain { done } => {
                    self.drained.set(true);
                    done.send(());
                    return;
                }
            }
        }
    }
}

/// A control core that runs.
struct Node {
    shards: Vec<Rc<FakeShard>>,
    requests: InboxSender<ControlRequest>,
    core: Rc<ControlCore>,
    started: ControlStarted,
    running: TaskHandle<Result<(), ControlError>>,
}

impl Node {
    async fn start(disk: &MemoryDisk, shards: u16) -> Result<Node, (String, ControlError)> {
        Node::start_with(disk, shards, |_| ()).await
    }

    async fn start_with(
        disk: &MemoryDisk,
        shards: u16,
        prepare: impl Fn(&FakeShard),
    ) -> Result<Node, (String, ControlError)> {
        let (shards, senders): (Vec<_>, Vec<_>) = (0..shards).map(FakeShard::start).unzip();
        shards.iter().for_each(|shard| prepare(shard));
        let (requests, inbox) = inbox();
        let (ready, started) = reply();
        let door = Rc::new(RefCell::new(None));
        let ends = ControlEnds { requests: inbox, shards: senders, ready };
        let serve = {
            let door = door.clone();
            move |core: Rc<ControlCore>, stop: Stop| async move {
                *door.borrow_mut() = Some(core);
                stop.stopped().await;
                // The core goes with the admin.
                *door.borrow_mut() = None;
            }
        };
        let highest_partition = shards.iter().filter_map(|shard| shard.highest_partition.get()).max();
        let config = ControlConfig { highest_partition, ..config(shards.len() as u16) };
        let running = drava_runtime::spawn(run(config, Rc::new(disk.clone()), ends, serve));
        match started.await.expect("the core says whether it started") {
            Ok(started) => {
                while door.borrow().is_none() {
                    drava_runtime::yield_now().await;
                }
                let core = door.borrow().clone().expect("it was there just now");
                Ok(Node { shards, requests, core, started, running })
            }
            Err(text) => Err((text, running.await.unwrap().unwrap_err())),
        }
    }

    async fn drain(self) {
        let (done, drained) = reply();
        self.requests.send(ControlRequest::Drain { done }).expect("the core is there");
        assert_eq!(drained.await, Some(()));
        self.running.await.unwrap().expect("it ended as it was told");
    }
}

#[test]
fn every_shard_serves_a_topic_before_its_creator_hears_of_it() {
    on_executor(async {
        let node = Node::start(&MemoryDisk::default(), 3).await.unwrap();
        let has = |topic: &str| node.shards.iter().all(|shard| shard.image.borrow().topics.contains_key(&name(topic)));
        for round in 0..20 {
            let topic = format!("t-{round}");
            let created = node.core.create_topic(name(&topic), policy(4), false).await.unwrap();
            assert!(has(&topic));
            assert_eq!(created.partitions.len(), 4);
        }
        let (reply_sender, answer) = reply();
        let request = ControlRequest::DeleteTopic { name: name("t-3"), reply: reply_sender };
        node.requests.send(request).unwrap();
        assert_eq!(answer.await, Some(Ok(())));
        assert!(node.shards.iter().all(|shard| !shard.image.borrow().topics.contains_key(&name("t-3"))));
        node.drain().await;
    });
}

#[test]
fn topics_created_at_the_same_time_are_all_served() {
    on_executor(async {
        let node = Node::start(&MemoryDisk::default(), 2).await.unwrap();
        let answers: Vec<_> = (0..50)
            .map(|round| {
                let (reply, answer) = reply();
                let name = name(&format!("t-{}", round % 40));
                node.requests
                    .send(ControlRequest::CreateTopic { name, policy: policy(1), exists_ok: true, reply })
                    .unwrap();
                answer
            })
            .collect();
        for answer in answers {
            let topic = answer.await.unwrap().unwrap();
            assert!(node.shards.iter().all(|shard| shard.image.borrow().topics.contains_key(&topic.name)));
        }
        assert_eq!(node.core.image().topics.len(), 40);
        node.drain().await;
    });
}

#[test]
fn refusals_carry_their_codes() {
    on_executor(async {
        let node = Node::start(&MemoryDisk::default(), 1).await.unwrap();
        let core = &node.core;
        let first = core.create_topic(name("a"), policy(1), false).await.unwrap();
        let code = |refused: Result<Arc<_>, Refused>| refused.unwrap_err().code;
        assert_eq!(code(core.create_topic(name("a"), policy(1), false).await), ErrorCode::TopicExists);
        assert_eq!(core.create_topic(name("a"), policy(9), true).await, Ok(first));
        assert_eq!(code(core.create_topic(name("b"), policy(0), true).await), ErrorCode::InvalidArgument);
        let replicated = TopicPolicy { replicas: 3, ..policy(1) };
        let refused = core.create_topic(name("b"), replicated, false).await.unwrap_err();
        assert_eq!(refused.text, "3 replicas were asked for, and 1 nodes are live");
        assert_eq!(core.delete_topic(name("b")).await.unwrap_err().code, ErrorCode::UnknownTopic);
        node.drain().await;
    });
}

#[test]
fn places_states_and_figures_come_from_the_owning_shards() {
    on_executor(async {
        let node = Node::start(&MemoryDisk::default(), 2).await.unwrap();
        let topic = node.core.create_topic(name("a"), policy(2), false).await.unwrap();
        for (index, partition) in topic.partitions.iter().enumerate() {
            let place = node.core.place(*partition).unwrap();
            assert_eq!((usize::from(place.shard), usize::from(place.port)), (index, 7401 + index));
            assert_eq!(node.core.describe_partition(*partition).await.unwrap().partition, partition.0);
        }
        assert_eq!(node.core.place(PartitionId(99)), None);
        assert_eq!(node.core.describe_partition(PartitionId(99)).await, None);
        let shards: Vec<u16> = node.core.shard_stats().await.iter().map(|stats| stats.shard).collect();
        assert_eq!(shards, [0, 1]);
        node.drain().await;
    });
}

#[test]
fn a_stuck_shard_is_reported_and_serves_again_when_it_wakes() {
    on_executor(async {
        let node = Node::start(&MemoryDisk::default(), 2).await.unwrap();
        node.shards[1].stuck.set(true);
        let refused = node.core.create_topic(name("a"), policy(1), false).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Internal);
        assert!(refused.text.contains("shard 1 did not take the metadata"), "{}", refused.text);
        assert_eq!(node.core.readiness().shards_serving, 1);
        assert_eq!(node.core.shard_stats().await.len(), 1);

        node.shards[1].stuck.set(false);
        node.core.create_topic(name("a"), policy(1), true).await.expect("it exists, and is served now");
        let readiness = node.core.readiness();
        assert_eq!((readiness.shards_serving, readiness.shards), (2, 2));
        assert!(readiness.leader && !readiness.draining);
        node.drain().await;
    });
}

#[test]
fn a_shard_that_never_serves_stops_the_start() {
    on_executor(async {
        let started = Node::start_with(&MemoryDisk::default(), 2, |shard| shard.stuck.set(shard.id == 1)).await;
        let (text, error) = started.err().expect("it does not start");
        assert!(matches!(error, ControlError::Shard(_)), "{error}");
        assert!(text.contains("shard 1 did not take the metadata"), "{text}");
    });
}

#[test]
fn metadata_survives_a_restart_and_follows_the_number_of_shards() {
    on_executor(async {
        let disk = MemoryDisk::default();
        let node = Node::start(&disk, 3).await.unwrap();
        assert_eq!(node.started, ControlStarted { topics: 0, partitions: 0, version: 1 });
        let first = node.core.create_topic(name("a"), policy(3), false).await.unwrap();
        node.drain().await;

        let node = Node::start(&disk, 2).await.unwrap();
        let shard_of = |index: usize| node.core.image().partitions[&first.partitions[index]].owner.shard.0;
        assert_eq!([shard_of(0), shard_of(1), shard_of(2)], [0, 1, 0]);
        node.drain().await;

        let node = Node::start(&disk, 4).await.unwrap();
        assert_eq!((node.started.topics, node.started.partitions), (1, 3));
        // The first image that a shard sees is complete: it deletes what it has and the image has not.
        assert!(node.shards.iter().all(|shard| shard.image.borrow().topics.get(&name("a")) == Some(&first)));
        node.drain().await;
    });
}

#[test]
fn metadata_that_lost_its_end_starts_no_shard() {
    on_executor(async {
        let disk = MemoryDisk::default();
        let node = Node::start(&disk, 2).await.unwrap();
        let topic = node.core.create_topic(name("a"), policy(3), false).await.unwrap();
        node.core.delete_topic(name("a")).await.unwrap();
        node.drain().await;
        let highest = *topic.partitions.last().unwrap();
        let holding = |shard: &FakeShard| shard.highest_partition.set((shard.id == 1).then_some(highest));
        // Deleted partitions were made once: what is left of them may go.
        Node::start_with(&disk, 2, holding).await.unwrap().drain().await;
        // Another disk has never heard of it. A shard that saw this image would delete what it has.
        let other = MemoryDisk::default();
        let started = Node::start_with(&other, 2, |shard| {
            holding(shard);
            shard.stuck.set(true);
        });
        let (text, error) = started.await.err().expect("it does not start");
        assert!(
            matches!(error, ControlError::Incomplete { stored, next_partition: 1 } if stored == highest),
            "{error}"
        );
        assert!(text.contains("the metadata is incomplete"), "{text}");
    });
}

#[test]
fn a_drain_finishes_the_shards_and_refuses_changes() {
    on_executor(async {
        let disk = MemoryDisk::default();
        let node = Node::start(&disk, 2).await.unwrap();
        let (core, shards) = (node.core.clone(), node.shards.clone());
        node.drain().await;
        assert!(shards.iter().all(|shard| shard.drained.get()));
        assert!(core.readiness().draining);
        let refused = core.create_topic(name("a"), policy(1), false).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::ShuttingDown);
        Node::start(&disk, 2).await.unwrap().drain().await;
    });
}

#[test]
fn a_failed_disk_ends_the_control_core() {
    on_executor(async {
        let disk = MemoryDisk::default();
        let node = Node::start(&disk, 1).await.unwrap();
        disk.fail_after(0);
        let refused = node.core.create_topic(name("a"), policy(1), false).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Internal);
        let error = node.running.await.unwrap().unwrap_err();
        assert!(matches!(error, ControlError::Failed(_)), "{error}");
        assert!(error.to_string().contains("told to fail"), "{error}");
    });
}
