//! Marks: a block without extents behind the last one of a burst.
//!
//! Each block says up to which all were durable when it was written. So the last block is vouched for by none, and if
//! the disk damages it at rest, it reads like a torn tail: never acknowledged. Once the journal has been quiet for a
//! while a mark follows, which vouches for it. A mark holds nothing itself, and none follows a mark.
//!
//! 1. [`Inner::settle`](crate::store::Inner) tells that a block became durable.
//! 2. [`Inner::run_marker`] waits until nothing was written for [`StoreConfig::mark_after`](crate::StoreConfig).
//! 3. The flusher writes the mark if there is still nothing else to write, and nothing beside it: two marks of one
//!    sequence look the same, so no block may ever have been placed behind one that was lost.

use std::rc::Rc;

use crate::block::BlockWriter;
use crate::flush::Flushing;
use crate::io::{ALIGNMENT, Io};
use crate::pool::Block;
use crate::stage::Group;
use crate::store::Inner;

impl<I: Io, T: 'static> Inner<I, T> {
    pub(crate) async fn run_marker(self: Rc<Self>) {
        let Some(mark_after) = self.config.mark_after else { return };
        while !self.stopped.get() {
            self.unvouched.notified().await;
            while !self.stopped.get() && self.journal.wants_mark() {
                let quiet = self.journal.quiet_for();
                if mark_after <= quiet {
                    self.mark_wanted.set(true);
                    self.woken.notify();
                    break;
                }
                self.io.sleep(mark_after - quiet).await;
            }
        }
    }

    /// Writes a mark if one is wanted and nothing else is to be written.
    pub(crate) fn start_mark(&self) -> bool {
        self.mark_wanted.take() && self.staging.borrow().is_empty() && self.journal.wants_mark() && self.place_mark()
    }

    /// Begins a journal that has nothing to say, and waits until that is durable: whoever reads it without an index must
    /// not take the first block of a burst that he finds for the first of all. `false`: it was not written.
    pub(crate) async fn begin_with_mark(&self) -> bool {
        let rolls = self.journal.rolls();
        if !self.place_mark() {
            return false;
        }
        loop {
            let version = self.progress.version();
            if self.journal.in_flight() == 0 {
                return !self.journal.is_failed() && self.journal.rolls() == rolls;
            }
            self.progress.changed(version).await;
        }
    }

    fn place_mark(&self) -> bool {
        // On a full disk the room is left to those who need it.
        if !self.journal.has_room((ALIGNMENT + self.config.block_bytes_max) as u64) {
            return false;
        }
        let Some(placement) = self.journal.place(ALIGNMENT as u64) else { return false };
        let mut buffer = self.pool.take_exact(ALIGNMENT);
        let bytes = Rc::get_mut(&mut buffer).expect("the pool gives what nobody else holds").as_mut();
        let crc = BlockWriter::new(bytes, placement.id.sequence).finish(&placement.id);
        let block = Block::new(buffer.clone(), self.pool.clone());
        self.journal.write(placement, buffer, crc, Flushing { group: Group::new(), block });
        self.journal.mark_written(placement.id.sequence);
        true
    }
}
