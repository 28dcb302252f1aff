//! Counters of one shard: cells, because a shard is one thread.

use std::cell::Cell;

#[derive(Debug, Default)]
pub struct Counter(Cell<u64>);

impl Counter {
    pub fn add(&self, count: u64) {
        self.0.set(self.0.get() + count);
    }

    pub fn get(&self) -> u64 {
        self.0.get()
    }
}

#[derive(Debug, Default)]
pub struct Counters {
    pub connections_accepted: Counter,
    pub connections_refused: Counter,
    pub frames_received: Counter,
    pub frames_malformed: Counter,
    pub bytes_received: Counter,
    pub bytes_sent: Counter,
    pub batches_published: Counter,
    pub messages_published: Counter,
    pub publish_bytes: Counter,
    pub duplicates: Counter,
    pub publish_errors: Counter,
    pub batches_delivered: Counter,
    pub delivered_bytes: Counter,
    pub requests_forwarded: Counter,
}
