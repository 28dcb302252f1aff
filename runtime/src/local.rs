//! Channels between tasks of one executor: `Rc` and `Cell`, no lock and no atomic.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Wakes one task: the last that waited. A notification that comes before the wait is kept.
#[derive(Debug, Default)]
pub struct Notify {
    set: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Notify {
    pub fn notify(&self) {
        self.set.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Waits for a notification and takes it.
    pub async fn notified(&self) {
        std::future::poll_fn(|cx| self.poll_notified(cx)).await
    }

    pub fn poll_notified(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.set.replace(false) {
            return Poll::Ready(());
        }
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// Wakes every task that waits, each time.
#[derive(Debug, Default)]
pub struct Broadcast {
    version: Cell<u64>,
    wakers: RefCell<Vec<Waker>>,
}

impl Broadcast {
    pub fn version(&self) -> u64 {
        self.version.get()
    }

    pub fn notify_all(&self) {
        self.version.set(self.version.get() + 1);
        for waker in self.wakers.take() {
            waker.wake();
        }
    }

    /// Ready once the version is no longer `seen`.
    pub fn poll_changed(&self, seen: u64, cx: &mut Context<'_>) -> Poll<u64> {
        let version = self.version.get();
        if version != seen {
            return Poll::Ready(version);
        }
        let mut wakers = self.wakers.borrow_mut();
        if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            wakers.push(cx.waker().clone());
        }
        Poll::Pending
    }

    pub async fn changed(&self, seen: u64) -> u64 {
        std::future::poll_fn(|cx| self.poll_changed(seen, cx)).await
    }
}

/// A bounded queue between tasks of one executor, with one receiver. Full: `send` waits.
#[derive(Debug)]
pub struct Queue<T>(Rc<QueueState<T>>);

#[derive(Debug)]
struct QueueState<T> {
    items: RefCell<VecDeque<T>>,
    capacity: usize,
    closed: Cell<bool>,
    receiver: RefCell<Option<Waker>>,
    senders: RefCell<Vec<Waker>>,
}

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Self {
        Queue(self.0.clone())
    }
}

impl<T> Queue<T> {
    pub fn new(capacity: usize) -> Self {
        assert!(0 < capacity, "a queue holds at least one item");
        Queue(Rc::new(QueueState {
            items: RefCell::default(),
            capacity,
            closed: Cell::new(false),
            receiver: RefCell::default(),
            senders: RefCell::default(),
        }))
    }

    /// Gives the item back when the queue is full or closed.
    pub fn try_send(&self, item: T) -> Result<(), T> {
        let mut items = self.0.items.borrow_mut();
        if self.0.closed.get() || items.len() >= self.0.capacity {
            return Err(item);
        }
        items.push_back(item);
        drop(items);
        if let Some(waker) = self.0.receiver.take() {
            waker.wake();
        }
        Ok(())
    }

    /// Waits for room. Gives the item back when the queue is closed.
    pub async fn send(&self, item: T) -> Result<(), T> {
        let mut slot = Some(item);
        std::future::poll_fn(|cx| {
            let item = slot.take().expect("polled after it was ready");
            match self.try_send(item) {
                Ok(()) => Poll::Ready(Ok(())),
                Err(item) if self.0.closed.get() => Poll::Ready(Err(item)),
                Err(item) => {
                    slot = Some(item);
                    self.0.senders.borrow_mut().push(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    pub fn try_recv(&self) -> Option<T> {
        let item = self.0.items.borrow_mut().pop_front()?;
        for waker in self.0.senders.take() {
            waker.wake();
        }
        Some(item)
    }

    /// The next item; `None` once the queue is closed and empty.
    pub async fn recv(&self) -> Option<T> {
        std::future::poll_fn(|cx| self.poll_recv(cx)).await
    }

    pub fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<Option<T>> {
        if let Some(item) = self.try_recv() {
            return Poll::Ready(Some(item));
        }
        if self.0.closed.get() {
            return Poll::Ready(None);
        }
        *self.0.receiver.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }

    /// No more items are taken; those that are in the queue can still be received.
    pub fn close(&self) {
        self.0.closed.set(true);
        if let Some(waker) = self.0.receiver.take() {
            waker.wake();
        }
        for waker in self.0.senders.take() {
            waker.wake();
        }
    }

    pub fn len(&self) -> usize {
        self.0.items.borrow().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One value, once, from one task to another.
pub fn oneshot<T>() -> (OneshotSender<T>, OneshotReceiver<T>) {
    let state = Rc::new(RefCell::new(Oneshot { value: None, closed: false, waker: None }));
    (OneshotSender(state.clone()), OneshotReceiver(state))
}

#[derive(Debug)]
struct Oneshot<T> {
    value: Option<T>,
    closed: bool,
    waker: Option<Waker>,
}

#[derive(Debug)]
pub struct OneshotSender<T>(Rc<RefCell<Oneshot<T>>>);

#[derive(Debug)]
pub struct OneshotReceiver<T>(Rc<RefCell<Oneshot<T>>>);

impl<T> OneshotSender<T> {
    pub fn send(self, value: T) {
        // Dropping the sender wakes the receiver.
        self.0.borrow_mut().value = Some(value);
    }
}

impl<T> Drop for OneshotSender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut state = self.0.borrow_mut();
            state.closed = true;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for OneshotReceiver<T> {
    /// `None` when the sender was dropped without a value.
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = self.0.borrow_mut();
        if let Some(value) = state.value.take() {
            return Poll::Ready(Some(value));
        }
        if state.closed {
            return Poll::Ready(None);
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}
