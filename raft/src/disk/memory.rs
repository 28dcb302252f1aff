//! A disk in memory, for tests: clones are the same disk, and it can be copied at any moment, as a crash would leave it.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, ready};

use super::{MetaDisk, Position, Records};

#[derive(Clone, Debug, Default)]
pub struct MemoryDisk(Rc<RefCell<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    content: Content,
    /// What a crash after each of the changes would leave; `None`: not recorded.
    crashes: Option<Vec<Content>>,
    /// Changes that still succeed; `None`: all do.
    changes_left: Option<usize>,
}

/// All that is durable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    pub records: Vec<(u64, Vec<u8>)>,
    pub next: u64,
    pub snapshot: Option<Vec<u8>>,
}

impl MemoryDisk {
    pub fn with(content: Content) -> MemoryDisk {
        MemoryDisk(Rc::new(RefCell::new(Inner { content, ..Inner::default() })))
    }

    pub fn content(&self) -> Content {
        self.0.borrow().content.clone()
    }

    /// From now on a copy is kept after each change.
    pub fn record_crashes(&self) {
        self.0.borrow_mut().crashes = Some(Vec::new());
    }

    pub fn crashes(&self) -> Vec<Content> {
        self.0.borrow().crashes.clone().unwrap_or_default()
    }

    /// All changes after the next `changes` fail.
    pub fn fail_after(&self, changes: usize) {
        self.0.borrow_mut().changes_left = Some(changes);
    }

    fn change<T>(&self, change: impl FnOnce(&mut Content) -> T) -> io::Result<T> {
        let mut inner = self.0.borrow_mut();
        if let Some(left) = &mut inner.changes_left {
            *left = left.checked_sub(1).ok_or_else(|| io::Error::other("the disk was told to fail"))?;
        }
        let value = change(&mut inner.content);
        let copy = inner.crashes.is_some().then(|| inner.content.clone());
        if let (Some(crashes), Some(copy)) = (&mut inner.crashes, copy) {
            crashes.push(copy);
        }
        Ok(value)
    }

    /// Completes after other tasks have run, as a disk would.
    fn later<'a, T: 'a>(&'a self, change: impl FnOnce(&mut Content) -> T + 'a) -> LocalBoxFuture<'a, io::Result<T>> {
        async move {
            drava_runtime::yield_now().await;
            self.change(change)
        }
        .boxed_local()
    }
}

impl MetaDisk for MemoryDisk {
    fn replay(&self) -> LocalBoxFuture<'_, io::Result<Records>> {
        let records = self.content().records;
        ready(Ok(records.into_iter().map(|(number, record)| (Position(0, number), record)).collect())).boxed_local()
    }

    fn append(&self, records: Vec<Vec<u8>>) -> LocalBoxFuture<'_, io::Result<Position>> {
        async move {
            drava_runtime::yield_now().await;
            let first = self.0.borrow().content.next;
            // One change for each: a crash may leave the first few of them.
            for record in records {
                self.change(|content| {
                    content.records.push((content.next, record));
                    content.next += 1;
                })?;
            }
            Ok(Position(0, first))
        }
        .boxed_local()
    }

    fn trim(&self, before: Position) -> LocalBoxFuture<'_, io::Result<()>> {
        self.later(move |content| content.records.retain(|(number, _)| before.1 <= *number))
    }

    fn save_snapshot(&self, file: Vec<u8>) -> LocalBoxFuture<'_, io::Result<()>> {
        self.later(move |content| content.snapshot = Some(file))
    }

    fn load_snapshot(&self) -> LocalBoxFuture<'_, io::Result<Option<Vec<u8>>>> {
        ready(Ok(self.content().snapshot)).boxed_local()
    }

    fn close(&self) -> LocalBoxFuture<'_, io::Result<()>> {
        ready(Ok(())).boxed_local()
    }
}
