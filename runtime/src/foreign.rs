//! Channels between ordinary threads and tasks of an executor. A glommio task may be woken from any thread.
//!
//! These hold a mutex for the length of a push or a pop, and are for work that is rare or slow by nature (the index
//! thread, the control core, signals), never for the data path.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

#[derive(Debug)]
struct InboxState<T> {
    items: VecDeque<T>,
    waker: Option<Waker>,
    senders: usize,
    receiver_gone: bool,
}

/// The receiving end, polled by one task.
#[derive(Debug)]
pub struct Inbox<T>(Arc<Mutex<InboxState<T>>>);

/// The sending end, for any thread. Unbounded: the caller bounds what it has under way.
#[derive(Debug)]
pub struct InboxSender<T>(Arc<Mutex<InboxState<T>>>);

pub fn inbox<T>() -> (InboxSender<T>, Inbox<T>) {
    let state =
        Arc::new(Mutex::new(InboxState { items: VecDeque::new(), waker: None, senders: 1, receiver_gone: false }));
    (InboxSender(state.clone()), Inbox(state))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under these locks.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl<T> InboxSender<T> {
    /// Gives the item back when the inbox is gone.
    pub fn send(&self, item: T) -> Result<(), T> {
        let waker = {
            let mut state = lock(&self.0);
            if state.receiver_gone {
                return Err(item);
            }
            state.items.push_back(item);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }
}

impl<T> Clone for InboxSender<T> {
    fn clone(&self) -> Self {
        lock(&self.0).senders += 1;
        InboxSender(self.0.clone())
    }
}

impl<T> Drop for InboxSender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut state = lock(&self.0);
            state.senders -= 1;
            if state.senders == 0 { state.waker.take() } else { None }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Inbox<T> {
    /// The next item; `None` once all senders are gone and nothing is left.
    pub async fn recv(&mut self) -> Option<T> {
        std::future::poll_fn(|cx| self.poll_recv(cx)).await
    }

    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = lock(&self.0);
        if let Some(item) = state.items.pop_front() {
            return Poll::Ready(Some(item));
        }
        if state.senders == 0 {
            return Poll::Ready(None);
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    pub fn try_recv(&mut self) -> Option<T> {
        lock(&self.0).items.pop_front()
    }
}

impl<T> Drop for Inbox<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.0);
        state.receiver_gone = true;
        state.items.clear();
    }
}

/// One value, once, from a thread to a task.
pub fn reply<T>() -> (ReplySender<T>, Reply<T>) {
    let (sender, inbox) = inbox();
    (ReplySender(sender), Reply(inbox))
}

#[derive(Debug)]
pub struct ReplySender<T>(InboxSender<T>);

#[derive(Debug)]
pub struct Reply<T>(Inbox<T>);

impl<T> ReplySender<T> {
    /// Whether anybody still waits does not matter to the sender.
    pub fn send(self, value: T) {
        drop(self.0.send(value));
    }
}

impl<T> Future for Reply<T> {
    /// `None` when the sender was dropped without a value.
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        self.0.poll_recv(cx)
    }
}
