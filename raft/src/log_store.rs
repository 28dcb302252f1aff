//! The raft log: in memory to be read, on disk to be kept.
//!
//! 1. openraft appends entries; they join the log in memory, readable at once, and their records join a queue.
//! 2. One flusher task takes what is queued, appends it to the disk in one durable write, and only then calls back.
//!    What comes meanwhile is the next write.
//! 3. Votes and truncations wait for their write; commits and purges do not: losing one only repeats work.
//! 4. A purge writes a checkpoint: what the forgotten records said besides entries. When that is durable, the disk may
//!    trim what lies before both the checkpoint and the first entry that is kept.
//!
//! After a failed write nothing more is written, and every caller hears of it: openraft stops, and so does the node.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::rc::Rc;

use drava_runtime::local::{Notify, OneshotSender, oneshot};
use drava_runtime::task::TaskHandle;
use openraft::RaftLogReader;
use openraft::entry::RaftEntry;
use openraft::storage::RaftLogStorage;

use crate::disk::{MetaDisk, Position};
use crate::record::{Record, RecordError};
use crate::types::{Entry, IoFlushed, LogId, LogState, TypeConfig, Vote};

/// A write takes no more records once it has this many bytes. The disk below has blocks of some size.
const WRITE_BYTES_MAX: usize = 256 * 1024;

/// Clones are the same log.
#[derive(Clone)]
pub struct LogStore(Rc<Log>);

/// Records that are no log.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("read the metadata log: {0}")]
    Read(#[from] io::Error),
    #[error("record {number} of the metadata log, at {position:?}: {reason}")]
    Record { number: usize, position: Position, reason: RecordError },
    #[error("record {number} of the metadata log is entry {found}, where {expected} was expected")]
    Gap { number: usize, expected: u64, found: u64 },
    #[error("the metadata log begins with entry {found}, and was purged up to {purged}: entries between are missing")]
    Beginning { purged: u64, found: u64 },
}

struct Log {
    mirror: RefCell<Mirror>,
    writer: Rc<Writer>,
    flusher: RefCell<Option<TaskHandle<()>>>,
}

/// What the records say, all of them applied.
#[derive(Default)]
struct Mirror {
    /// Without gaps.
    entries: VecDeque<Entry>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
}

impl Mirror {
    fn first_index(&self) -> Option<u64> {
        self.entries.front().map(|entry| entry.index())
    }

    /// The index that the next entry must have; `None`: any, nothing is known yet.
    fn next_index(&self) -> Option<u64> {
        self.entries.back().map(|entry| entry.index()).or(self.purged.map(|id| id.index())).map(|last| last + 1)
    }

    fn truncate_after(&mut self, last: Option<LogId>) {
        while self.entries.back().is_some_and(|entry| last.is_none_or(|last| last.index() < entry.index())) {
            self.entries.pop_back();
        }
    }

    fn purge(&mut self, upto: LogId) {
        self.purged = self.purged.max(Some(upto));
        while self.entries.front().is_some_and(|entry| entry.index() <= upto.index()) {
            self.entries.pop_front();
        }
    }

    fn replay(&mut self, number: usize, record: Record) -> Result<(), ReplayError> {
        match record {
            Record::Entry(entry) => {
                if let Some(expected) = self.next_index()
                    && expected != entry.index()
                {
                    return Err(ReplayError::Gap { number, expected, found: entry.index() });
                }
                self.entries.push_back(entry);
            }
            Record::Vote(vote) => self.vote = Some(vote),
            Record::Committed(committed) => self.committed = committed,
            Record::TruncateAfter(last) => self.truncate_after(last),
            Record::Checkpoint { vote, committed, purged } => {
                self.vote = vote;
                self.committed = committed;
                self.purge(purged);
            }
        }
        Ok(())
    }
}

impl LogStore {
    /// Replays what the disk has and starts the flusher.
    pub async fn open(disk: Rc<dyn MetaDisk>) -> Result<LogStore, ReplayError> {
        let mut mirror = Mirror::default();
        let writer = Rc::new(Writer::default());
        for (number, (position, bytes)) in disk.replay().await?.into_iter().enumerate() {
            let record = Record::decode(&bytes).map_err(|reason| ReplayError::Record { number, position, reason })?;
            if let Record::Entry(entry) = &record {
                writer.lies_at(entry.index(), position);
            }
            mirror.replay(number, record)?;
            drava_runtime::yield_if_needed().await;
        }
        let begins_after = mirror.purged.map_or(0, |purged| purged.index() + 1);
        if let Some(found) = mirror.first_index()
            && found != begins_after
        {
            return Err(ReplayError::Beginning { purged: mirror.purged.map_or(0, |id| id.index()), found });
        }
        let flusher = drava_runtime::spawn(flush(writer.clone(), disk));
        let mirror = RefCell::new(mirror);
        Ok(LogStore(Rc::new(Log { mirror, writer, flusher: RefCell::new(Some(flusher)) })))
    }

    /// Waits until all that is queued is written, and ends the flusher.
    pub async fn close(&self) {
        self.0.writer.close();
        let flusher = self.0.flusher.take();
        if let Some(flusher) = flusher {
            flusher.await;
        }
    }

    pub fn purged(&self) -> Option<LogId> {
        self.0.mirror.borrow().purged
    }

    fn push(&self, record: &Record, then: Then) -> io::Result<()> {
        let entry = match record {
            Record::Entry(entry) => Some(entry.index()),
            Record::Vote(_) | Record::Committed(_) | Record::TruncateAfter(_) | Record::Checkpoint { .. } => None,
        };
        self.0.writer.push(Queued { bytes: record.encode(), entry, then })
    }

    async fn push_and_wait(&self, record: &Record) -> io::Result<()> {
        let (sender, receiver) = oneshot();
        self.push(record, Then::Reply(sender))?;
        receiver.await.unwrap_or_else(|| Err(io::Error::other("the metadata log is closed")))
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.writer.close();
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry>, io::Error> {
        let mirror = self.0.mirror.borrow();
        let Some(first) = mirror.first_index() else { return Ok(Vec::new()) };
        let end = first + mirror.entries.len() as u64;
        let from = match range.start_bound() {
            Bound::Included(index) => *index,
            Bound::Excluded(index) => index.saturating_add(1),
            Bound::Unbounded => 0,
        }
        .clamp(first, end);
        let to = match range.end_bound() {
            Bound::Included(index) => index.saturating_add(1),
            Bound::Excluded(index) => *index,
            Bound::Unbounded => u64::MAX,
        }
        .clamp(from, end);
        Ok(mirror.entries.range((from - first) as usize..(to - first) as usize).cloned().collect())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.0.mirror.borrow().vote)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> Result<LogState, io::Error> {
        let mirror = self.0.mirror.borrow();
        let last = mirror.entries.back().map(|entry| entry.log_id()).or(mirror.purged);
        Ok(LogState { last_purged_log_id: mirror.purged, last_log_id: last })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        // Into the mirror first: a checkpoint that is queued behind this record has to say the same.
        self.0.mirror.borrow_mut().vote = Some(*vote);
        self.push_and_wait(&Record::Vote(*vote)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.0.mirror.borrow_mut().committed = committed;
        self.push(&Record::Committed(committed), Then::Nothing)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.0.mirror.borrow().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IoFlushed) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry>,
    {
        let mut entries = entries.into_iter().peekable();
        if entries.peek().is_none() {
            callback.io_completed(Ok(()));
            return Ok(());
        }
        let mut callback = Some(callback);
        while let Some(entry) = entries.next() {
            if let Some(expected) = self.0.mirror.borrow().next_index() {
                assert!(expected == entry.index(), "entry {} is appended where {expected} is next", entry.index());
            }
            let last = entries.peek().is_none();
            let then = callback.take_if(|_| last).map_or(Then::Nothing, Then::Flushed);
            let record = Record::Entry(entry);
            self.push(&record, then)?;
            let Record::Entry(entry) = record else { unreachable!("it was made an entry above") };
            self.0.mirror.borrow_mut().entries.push_back(entry);
        }
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        self.0.mirror.borrow_mut().truncate_after(last);
        self.push_and_wait(&Record::TruncateAfter(last)).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let record = {
            let mut mirror = self.0.mirror.borrow_mut();
            mirror.purge(upto);
            Record::Checkpoint { vote: mirror.vote, committed: mirror.committed, purged: upto }
        };
        self.push(&record, Then::Trim { first_kept: upto.index() + 1 })
    }
}

/// What waits to be written, and where the entries lie that are.
#[derive(Default)]
struct Writer {
    queue: RefCell<VecDeque<Queued>>,
    wake: Notify,
    closed: Cell<bool>,
    failed: RefCell<Option<String>>,
    /// For each write with entries: its first entry's index, and a position at or below that entry. Both grow.
    writes: RefCell<VecDeque<(u64, Position)>>,
}

struct Queued {
    bytes: Vec<u8>,
    /// The index, if it is an entry.
    entry: Option<u64>,
    then: Then,
}

/// What to do once the record is durable.
enum Then {
    Nothing,
    Flushed(IoFlushed),
    Reply(OneshotSender<io::Result<()>>),
    Trim { first_kept: u64 },
}

impl Writer {
    fn push(&self, queued: Queued) -> io::Result<()> {
        if let Some(failure) = &*self.failed.borrow() {
            return Err(io::Error::other(format!("an earlier write of the metadata log failed: {failure}")));
        }
        if self.closed.get() {
            return Err(io::Error::other("the metadata log is closed"));
        }
        self.queue.borrow_mut().push_back(queued);
        self.wake.notify();
        Ok(())
    }

    /// What the next write is to hold.
    fn take(&self) -> Vec<Queued> {
        let mut queue = self.queue.borrow_mut();
        let mut bytes = 0;
        let count = queue.iter().take_while(|queued| {
            let fits = bytes < WRITE_BYTES_MAX;
            bytes += queued.bytes.len();
            fits
        });
        let count = count.count();
        queue.drain(..count).collect()
    }

    fn close(&self) {
        self.closed.set(true);
        self.wake.notify();
    }

    /// An entry was written at this position or after it. Entries from this index on that lay elsewhere were truncated.
    fn lies_at(&self, index: u64, position: Position) {
        let mut writes = self.writes.borrow_mut();
        while writes.back().is_some_and(|(first, _)| index <= *first) {
            writes.pop_back();
        }
        if writes.back().is_none_or(|(_, last)| *last != position) {
            writes.push_back((index, position));
        }
    }

    /// The position that an entry lies at or after; `None` when it has not been written.
    fn position_of(&self, index: u64) -> Option<Position> {
        let mut writes = self.writes.borrow_mut();
        // Writes before the one that holds it are of no use any more: this is asked of ever greater indexes.
        while writes.get(1).is_some_and(|(first, _)| *first <= index) {
            writes.pop_front();
        }
        writes.front().filter(|(first, _)| *first <= index).map(|(_, position)| *position)
    }
}

async fn flush(writer: Rc<Writer>, disk: Rc<dyn MetaDisk>) {
    loop {
        let mut queued = writer.take();
        if queued.is_empty() {
            if writer.closed.get() {
                return;
            }
            writer.wake.notified().await;
            continue;
        }
        let records = queued.iter_mut().map(|queued| std::mem::take(&mut queued.bytes)).collect();
        let failed = writer.failed.borrow().clone();
        let written = match failed {
            // These were queued while the write that failed was under way.
            Some(failure) => Err(io::Error::other(failure)),
            None => disk.append(records).await,
        };
        match written {
            Ok(position) => {
                let first_kept = finish(&writer, queued, position);
                if let Some(first_kept) = first_kept {
                    trim(&writer, &*disk, position, first_kept).await;
                }
            }
            Err(error) => fail(&writer, queued, &error),
        }
    }
}

/// Tells everybody; returns what a purge among them keeps.
fn finish(writer: &Writer, queued: Vec<Queued>, position: Position) -> Option<u64> {
    let mut trim = None;
    for queued in queued {
        if let Some(index) = queued.entry {
            writer.lies_at(index, position);
        }
        match queued.then {
            Then::Nothing => {}
            Then::Flushed(callback) => callback.io_completed(Ok(())),
            Then::Reply(sender) => sender.send(Ok(())),
            Then::Trim { first_kept } => trim = Some(first_kept),
        }
    }
    trim
}

fn fail(writer: &Writer, queued: Vec<Queued>, error: &io::Error) {
    writer.failed.borrow_mut().get_or_insert_with(|| error.to_string());
    let again = || io::Error::new(error.kind(), error.to_string());
    for queued in queued {
        match queued.then {
            Then::Nothing | Then::Trim { .. } => {}
            Then::Flushed(callback) => callback.io_completed(Err(again())),
            Then::Reply(sender) => sender.send(Err(again())),
        }
    }
}

/// A trim that fails keeps more than is needed, and the next one tries again.
async fn trim(writer: &Writer, disk: &dyn MetaDisk, checkpoint: Position, first_kept: u64) {
    let before = writer.position_of(first_kept).map_or(checkpoint, |entry| entry.min(checkpoint));
    if let Err(error) = disk.trim(before).await {
        tracing::warn!(%error, "the metadata log could not be trimmed; it stays longer than it has to be");
    }
}
