//! Durable subscriptions of one partition: named cursors, each with at most one consumer.
//!
//! A cursor is the offset below which everything is done. It moves forward by acks, anywhere by a seek, and by nothing
//! else. Moves are collected as dirty; the shard saves them after a short while, at a shutdown, and at once where a
//! client asked for an answer.

use std::collections::BTreeMap;

use drava_protocol::message::{SUBSCRIPTION_NAME_BYTES_MAX as NAME_BYTES_MAX, SUBSCRIPTIONS_MAX};

/// Who consumes: a connection of this shard, and the number that the client chose on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConsumerKey {
    pub connection: u64,
    pub consumer: u32,
}

#[derive(Clone, Debug)]
struct Subscription {
    cursor: u64,
    dirty: bool,
    consumer: Option<ConsumerKey>,
}

#[derive(Clone, Debug, Default)]
pub struct Subscriptions {
    by_name: BTreeMap<String, Subscription>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubscribeError {
    #[error("a subscription name has 1 to {NAME_BYTES_MAX} bytes; this one has {0}")]
    Name(usize),
    #[error("subscription {0} has a consumer")]
    Busy(String),
    #[error("the partition has {SUBSCRIPTIONS_MAX} subscriptions, and that is the limit")]
    TooMany,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AckError {
    #[error("no such subscription, or another consumer has taken it over")]
    Unknown,
    #[error("an ack up to {offset} is beyond the end at {end}")]
    BeyondEnd { offset: u64, end: u64 },
}

/// A subscription that a consumer now holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    pub cursor: u64,
    /// It did not exist before.
    pub created: bool,
    /// The consumer that had to let go.
    pub replaced: Option<ConsumerKey>,
}

impl Subscriptions {
    /// Attaches a consumer; a new subscription starts at `start`.
    pub fn attach(
        &mut self,
        name: &str,
        consumer: ConsumerKey,
        start: u64,
        take_over: bool,
    ) -> Result<Attached, SubscribeError> {
        if name.is_empty() || NAME_BYTES_MAX < name.len() {
            return Err(SubscribeError::Name(name.len()));
        }
        if let Some(subscription) = self.by_name.get_mut(name) {
            if subscription.consumer.is_some() && !take_over {
                return Err(SubscribeError::Busy(name.to_owned()));
            }
            let replaced = subscription.consumer.replace(consumer);
            return Ok(Attached { cursor: subscription.cursor, created: false, replaced });
        }
        if self.by_name.len() == SUBSCRIPTIONS_MAX as usize {
            return Err(SubscribeError::TooMany);
        }
        self.by_name.insert(name.to_owned(), Subscription { cursor: start, dirty: true, consumer: Some(consumer) });
        Ok(Attached { cursor: start, created: true, replaced: None })
    }

    /// The consumer is gone; the subscription stays.
    pub fn detach(&mut self, name: &str, consumer: ConsumerKey) {
        if let Some(subscription) = self.by_name.get_mut(name)
            && subscription.consumer == Some(consumer)
        {
            subscription.consumer = None;
        }
    }

    /// Whether `consumer` still holds the subscription.
    pub fn holds(&self, name: &str, consumer: ConsumerKey) -> bool {
        self.by_name.get(name).is_some_and(|subscription| subscription.consumer == Some(consumer))
    }

    /// Everything below `offset` is done. An ack below the cursor changes nothing.
    pub fn ack(&mut self, name: &str, consumer: ConsumerKey, offset: u64, end: u64) -> Result<(), AckError> {
        let subscription = self.held(name, consumer)?;
        if end < offset {
            return Err(AckError::BeyondEnd { offset, end });
        }
        if subscription.cursor < offset {
            subscription.cursor = offset;
            subscription.dirty = true;
        }
        Ok(())
    }

    /// Moves the cursor anywhere.
    pub fn seek(&mut self, name: &str, consumer: ConsumerKey, offset: u64) -> Result<(), AckError> {
        let subscription = self.held(name, consumer)?;
        subscription.cursor = offset;
        subscription.dirty = true;
        Ok(())
    }

    /// Ends the subscription, whoever consumes. Returns whether it existed.
    pub fn delete(&mut self, name: &str) -> bool {
        self.by_name.remove(name).is_some()
    }

    /// Takes over a saved cursor.
    pub fn restore(&mut self, name: &str, cursor: u64) {
        self.by_name.insert(name.to_owned(), Subscription { cursor, dirty: false, consumer: None });
    }

    /// Calls `save` for each cursor that moved since it was last saved.
    pub fn collect(&mut self, mut save: impl FnMut(&str, u64)) {
        for (name, subscription) in &mut self.by_name {
            if std::mem::take(&mut subscription.dirty) {
                save(name, subscription.cursor);
            }
        }
    }

    /// A collected cursor could not be saved; it is to be collected again.
    pub fn not_saved(&mut self, name: &str) {
        if let Some(subscription) = self.by_name.get_mut(name) {
            subscription.dirty = true;
        }
    }

    /// Takes the dirty mark of one cursor; its value is to be saved.
    pub fn collect_one(&mut self, name: &str) -> Option<u64> {
        let subscription = self.by_name.get_mut(name)?;
        subscription.dirty = false;
        Some(subscription.cursor)
    }

    /// The lowest cursor: nothing from it on may be deleted.
    pub fn floor(&self) -> Option<u64> {
        self.by_name.values().map(|subscription| subscription.cursor).min()
    }

    /// Name, cursor, and whether a consumer is attached.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64, bool)> {
        self.by_name.iter().map(|(name, s)| (name.as_str(), s.cursor, s.consumer.is_some()))
    }

    fn held(&mut self, name: &str, consumer: ConsumerKey) -> Result<&mut Subscription, AckError> {
        self.by_name.get_mut(name).filter(|s| s.consumer == Some(consumer)).ok_or(AckError::Unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ConsumerKey = ConsumerKey { connection: 1, consumer: 1 };
    const B: ConsumerKey = ConsumerKey { connection: 2, consumer: 1 };

    #[test]
    fn a_subscription_is_exclusive_until_its_consumer_is_gone() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.attach("s", A, 5, false).unwrap();
        assert_eq!(subscriptions.attach("s", B, 0, false), Err(SubscribeError::Busy("s".to_owned())));
        subscriptions.detach("s", B);
        assert!(subscriptions.holds("s", A), "a stranger detaches nobody");
        subscriptions.detach("s", A);
        let attached = subscriptions.attach("s", B, 0, false).unwrap();
        assert_eq!(attached, Attached { cursor: 5, created: false, replaced: None });
    }

    #[test]
    fn whoever_takes_over_is_the_only_one_who_acks() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.attach("s", A, 0, false).unwrap();
        assert_eq!(subscriptions.attach("s", B, 0, true).unwrap().replaced, Some(A));
        assert_eq!(subscriptions.ack("s", A, 3, 10), Err(AckError::Unknown));
        subscriptions.ack("s", B, 3, 10).unwrap();
        assert_eq!(subscriptions.floor(), Some(3));
    }

    #[test]
    fn a_cursor_moves_back_only_by_a_seek() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.attach("s", A, 0, false).unwrap();
        subscriptions.ack("s", A, 7, 10).unwrap();
        subscriptions.ack("s", A, 3, 10).unwrap();
        assert_eq!(subscriptions.floor(), Some(7));
        assert_eq!(subscriptions.ack("s", A, 11, 10), Err(AckError::BeyondEnd { offset: 11, end: 10 }));
        subscriptions.seek("s", A, 2).unwrap();
        assert_eq!(subscriptions.floor(), Some(2));
    }

    #[test]
    fn each_move_is_collected_once() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.attach("s", A, 0, false).unwrap();
        subscriptions.attach("t", B, 4, false).unwrap();
        let mut saved = Vec::new();
        subscriptions.collect(|name, cursor| saved.push((name.to_owned(), cursor)));
        assert_eq!(saved, [("s".to_owned(), 0), ("t".to_owned(), 4)]);
        subscriptions.ack("s", A, 1, 10).unwrap();
        assert_eq!(subscriptions.collect_one("s"), Some(1));
        subscriptions.collect(|_, _| panic!("nothing moved since"));
    }
}
