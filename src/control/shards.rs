//! The shards of this node as the control core sees them: which image each serves by, and what each is asked.
//!
//! Every shard has one image under way at most: while it works, newer ones replace each other, and it gets the newest
//! next. Nothing here waits for a shard without a limit, but a shard that is late is not given up: when it answers, it
//! serves again.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use drava_protocol::message::PartitionState;
use drava_protocol::{PartitionId, ShardId};
use drava_raft::MetadataGroup;
use drava_runtime::executor::mark_active;
use drava_runtime::foreign::{InboxSender, ReplySender, reply};
use drava_runtime::local::Broadcast;
use drava_storage::Damage;
use futures_lite::future;

use crate::shard::command::ShardCommand;
use crate::shard::stats::ShardStats;

/// How long a shard may take to answer a question about itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) struct Shards {
    links: Vec<Link>,
    /// Told at each answer to an image.
    answered: Broadcast,
}

struct Link {
    commands: InboxSender<ShardCommand>,
    /// The version of the image that the shard serves by. 0: none yet; the first that is sent has this node in it.
    serves: Cell<u64>,
    gone: Cell<bool>,
}

/// A shard that did not serve by an image in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardLate {
    #[error("shard {shard} did not take the metadata within {waited:?}")]
    Slow { shard: ShardId, waited: Duration },
    #[error("shard {0} has stopped")]
    Gone(ShardId),
}

impl Shards {
    pub fn new(commands: Vec<InboxSender<ShardCommand>>) -> Rc<Shards> {
        let links = commands
            .into_iter()
            .map(|commands| Link { commands, serves: Cell::new(0), gone: Cell::new(false) })
            .collect();
        Rc::new(Shards { links, answered: Broadcast::default() })
    }

    pub fn count(&self) -> usize {
        self.links.len()
    }

    /// Shards that serve by an image of this version or a newer one.
    pub fn serving(&self, version: u64) -> usize {
        self.links.iter().filter(|link| !link.gone.get() && version <= link.serves.get()).count()
    }

    /// Sends images to each shard, from now on until the shard is gone.
    pub fn follow(self: &Rc<Self>, group: &MetadataGroup) {
        for shard in 0..self.links.len() {
            drava_runtime::spawn(self.clone().feed(shard, group.clone()));
        }
    }

    async fn feed(self: Rc<Self>, shard: usize, group: MetadataGroup) {
        let link = &self.links[shard];
        loop {
            let image = group.image_after(link.serves.get()).await;
            let version = image.version;
            mark_active();
            let (done, answer) = reply();
            let sent = link.commands.send(ShardCommand::Image { image, done }).is_ok();
            if !sent || answer.await.is_none() {
                link.gone.set(true);
                self.answered.notify_all();
                return;
            }
            link.serves.set(version);
            self.answered.notify_all();
        }
    }

    /// Returns once all shards serve by an image of this version or a newer one.
    pub async fn serve(&self, version: u64, timeout: Duration) -> Result<(), ShardLate> {
        let all = async {
            loop {
                let seen = self.answered.version();
                match self.links.iter().position(|link| link.gone.get() || link.serves.get() < version) {
                    None => return Ok(()),
                    Some(shard) if self.links[shard].gone.get() => return Err(ShardLate::Gone(ShardId(shard as u16))),
                    Some(_) => drop(self.answered.changed(seen).await),
                }
            }
        };
        let late = || {
            let shard = self.links.iter().position(|link| link.serves.get() < version).unwrap_or(0);
            ShardLate::Slow { shard: ShardId(shard as u16), waited: timeout }
        };
        within(timeout, all).await.unwrap_or_else(|| Err(late()))
    }

    /// The figures of the shards that answer in time, by shard.
    pub async fn stats(&self) -> Vec<ShardStats> {
        let answers = self.ask_all(|reply| ShardCommand::Stats { reply }).await;
        answers.into_iter().map(|(_, stats)| stats).collect()
    }

    /// What is damaged, of the shards that answer in time.
    pub async fn damage(&self) -> Vec<(u16, Vec<Damage>)> {
        self.ask_all(|reply| ShardCommand::Damage { reply }).await
    }

    /// The answers that come in time, each with its shard.
    async fn ask_all<T>(&self, command: impl Fn(ReplySender<T>) -> ShardCommand) -> Vec<(u16, T)> {
        let asked: Vec<_> = self.links.iter().map(|link| ask(link, &command)).collect();
        let mut all = Vec::with_capacity(asked.len());
        let deadline = std::time::Instant::now() + ANSWER_TIMEOUT;
        for (shard, answer) in (0..).zip(asked) {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            all.extend(within(left, answer).await.flatten().map(|answer| (shard, answer)));
        }
        all
    }

    pub async fn describe(&self, shard: ShardId, partition: PartitionId) -> Option<PartitionState> {
        let link = self.links.get(usize::from(shard.0))?;
        let answer = ask(link, |reply| ShardCommand::DescribePartition { partition, reply });
        within(ANSWER_TIMEOUT, answer).await??
    }

    /// Tells all shards to finish; returns those that were still at it after `timeout`.
    pub async fn drain(&self, timeout: Duration) -> Vec<ShardId> {
        let asked: Vec<_> = self.links.iter().map(|link| ask(link, |done| ShardCommand::Drain { done })).collect();
        let deadline = std::time::Instant::now() + timeout;
        let mut late = Vec::new();
        for (shard, answer) in asked.into_iter().enumerate() {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if within(left, answer).await.is_none() {
                late.push(ShardId(shard as u16));
            }
        }
        late
    }
}

/// Asks at once; the future is the answer, `None` when the shard is gone.
fn ask<T>(link: &Link, command: impl FnOnce(ReplySender<T>) -> ShardCommand) -> impl Future<Output = Option<T>> {
    mark_active();
    let (sender, answer) = reply();
    // When the shard is gone the command comes back and is dropped, and with it the sender: the answer is `None`.
    drop(link.commands.send(command(sender)));
    answer
}

/// `None`: not within this time. What is ready at once is taken even with no time left.
pub(super) async fn within<T>(timeout: Duration, work: impl Future<Output = T>) -> Option<T> {
    let work = async { Some(work.await) };
    let time = async {
        drava_runtime::time::sleep(timeout).await;
        None
    };
    future::or(work, time).await
}
