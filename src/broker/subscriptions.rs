//! Durable subscriptions of one partition: named cursors, each with at most one consumer.
//!
//! A cursor is the offset below which everything is done. It moves forward by acks, anywhere by a seek, and by nothing
//! else. The shard saves what moved after a short while, at a shutdown, and at once where a client asked for an answer.

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
    /// What was last handed to the journal. `None`: nothing yet.
    saved: Option<u64>,
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
        self.by_name.insert(name.to_owned(), Subscription { cursor: start, saved: None, consumer: Some(consumer) });
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
        subscription.cursor = subscription.cursor.max(offset);
        Ok(())
    }

    /// Moves the cursor anywhere.
    pub fn seek(&mut self, name: &str, consumer: ConsumerKey, offset: u64) -> Result<(), AckError> {
        self.held(name, consumer)?.cursor = offset;
        Ok(())
    }

    /// Ends the subscription, whoever consumes. Returns whether it existed.
    pub fn delete(&mut self, name: &str) -> bool {
        self.by_name.remove(name).is_some()
    }

    /// Takes over a saved cursor.
    pub fn restore(&mut self, name: &str, cursor: u64) {
        self.by_name.insert(name.to_owned(), Subscription { cursor, saved: Some(cursor), consumer: None });
    }

    /// Calls `save` for each cursor that moved since it was last saved. Returns whether all are saved now; the others
    /// come again with the next call.
    pub fn save<E>(&mut self, mut save: impl FnMut(&str, u64) -> Result<(), E>) -> bool {
        let mut all = true;
        for (name, subscription) in &mut self.by_name {
            if subscription.saved != Some(subscription.cursor) {
                match save(name, subscription.cursor) {
                    Ok(()) => subscription.saved = Some(subscription.cursor),
                    Err(_) => all = false,
                }
            }
        }
        all
    }

    /// Calls `save` for one cursor, whether it moved or not.
    pub fn save_one<E>(&mut self, name: &str, save: impl FnOnce(u64) -> Result<(), E>) -> Result<(), E> {
        let subscription = self.by_name.get_mut(name).expect("the name of a subscription");
        save(subscription.cursor)?;
        subscription.saved = Some(subscription.cursor);
        Ok(())
    }

    /// The lowest cursor, as it is and as it was last saved: nothing from there on may be deleted. A deletion enters the
    /// journal behind the cursors that allowed it, so that after a crash no cursor points below what is kept.
    pub fn floor(&self) -> Option<u64> {
        let lowest = |subscription: &Subscription| {
            subscription.saved.map_or(subscription.cursor, |saved| saved.min(subscription.cursor))
        };
        self.by_name.values().map(lowest).min()
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
        assert!(subscriptions.iter().eq([("s", 3, true)]));
    }

    #[test]
    fn a_cursor_moves_back_only_by_a_seek() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.attach("s", A, 0, false).unwrap();
        subscriptions.ack("s", A, 7, 10).unwrap();
        subscriptions.ack("s", A, 3, 10).unwrap();
        assert!(subscriptions.iter().eq([("s", 7, true)]));
        assert_eq!(subscriptions.ack("s", A, 11, 10), Err(AckError::BeyondEnd { offset: 11, end: 10 }));
        subscriptions.seek("s", A, 2).unwrap();
        assert!(subscriptions.iter().eq([("s", 2, true)]));
    }

    #[test]
    fn each_move_is_saved_once() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.attach("s", A, 0, false).unwrap();
        subscriptions.attach("t", B, 4, false).unwrap();
        let mut taken = Vec::new();
        let all = subscriptions.save(|name, cursor| {
            taken.push((name.to_owned(), cursor));
            if name == "s" { Err(()) } else { Ok(()) }
        });
        assert_eq!((all, taken), (false, vec![("s".to_owned(), 0), ("t".to_owned(), 4)]));
        assert!(subscriptions.save(|name, cursor| if (name, cursor) == ("s", 0) { Ok(()) } else { Err(()) }));
        subscriptions.ack("s", A, 1, 10).unwrap();
        assert_eq!(subscriptions.save_one("s", |cursor| if cursor == 1 { Ok(()) } else { Err(cursor) }), Ok(()));
        assert!(subscriptions.save(|_, _| -> Result<(), ()> { panic!("nothing moved since") }));
    }

    #[test]
    fn the_floor_moves_up_when_a_cursor_is_saved_and_down_at_once() {
        let mut subscriptions = Subscriptions::default();
        assert_eq!(subscriptions.floor(), None);
        subscriptions.attach("s", A, 3, false).unwrap();
        subscriptions.attach("t", B, 5, false).unwrap();
        assert_eq!(subscriptions.floor(), Some(3), "a new subscription holds from its start on");
        assert!(subscriptions.save(|_, _| Ok::<_, ()>(())));
        subscriptions.ack("s", A, 9, 10).unwrap();
        assert_eq!(subscriptions.floor(), Some(3));
        subscriptions.save_one("s", |_| Err(())).unwrap_err();
        assert_eq!(subscriptions.floor(), Some(3));
        subscriptions.save_one("s", |_| Ok::<_, ()>(())).unwrap();
        assert_eq!(subscriptions.floor(), Some(5));
        subscriptions.seek("t", B, 1).unwrap();
        assert_eq!(subscriptions.floor(), Some(1));
        assert!(subscriptions.delete("t"));
        assert_eq!(subscriptions.floor(), Some(9));
    }
}
