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
    // Nothing that can panic runs under these locks, and nothing of the caller's is dropped under them: an item or a
    // task may hold a sender of this very inbox, whose drop takes the lock.
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
        let replaced = {
            let mut state = lock(&self.0);
            if let Some(item) = state.items.pop_front() {
                return Poll::Ready(Some(item));
            }
            if state.senders == 0 {
                return Poll::Ready(None);
            }
            if state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                return Poll::Pending;
            }
            state.waker.replace(cx.waker().clone())
        };
        drop(replaced);
        Poll::Pending
    }

    pub fn try_recv(&mut self) -> Option<T> {
        lock(&self.0).items.pop_front()
    }
}

impl<T> Drop for Inbox<T> {
    fn drop(&mut self) {
        let left = {
            let mut state = lock(&self.0);
            state.receiver_gone = true;
            (std::mem::take(&mut state.items), state.waker.take())
        };
        drop(left);
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

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::thread;

    use super::*;
    use crate::{Executor, ExecutorConfig};

    fn on_executor<T>(future: impl Future<Output = T>) -> T {
        Executor::run(ExecutorConfig::new("foreign-test", None), future).expect("an executor")
    }

    #[test]
    fn inbox_gets_everything_that_threads_send() {
        let (sender, mut inbox) = inbox();
        let threads: Vec<_> = (0..4u64)
            .map(|thread| {
                let sender = sender.clone();
                thread::spawn(move || {
                    for item in 0..1000u64 {
                        sender.send((thread, item)).expect("the inbox is there");
                    }
                })
            })
            .collect();
        drop(sender);
        let received = on_executor(async move {
            let mut received = Vec::new();
            while let Some(item) = inbox.recv().await {
                received.push(item);
            }
            received
        });
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(received.len(), 4000);
        for thread in 0..4 {
            let items = received.iter().filter(|(from, _)| *from == thread).map(|(_, item)| *item);
            assert!(items.eq(0..1000), "the items of one thread stay in order");
        }
    }

    #[test]
    fn sending_to_a_dropped_inbox_gives_the_item_back() {
        let (sender, inbox) = inbox();
        assert_eq!(sender.send(1), Ok(()));
        drop(inbox);
        assert_eq!(sender.send(2), Err(2));
    }

    #[test]
    fn dropping_an_inbox_whose_items_hold_its_sender_does_not_deadlock() {
        struct Item {
            _sender: InboxSender<Item>,
        }
        let (sender, inbox) = inbox();
        assert!(sender.send(Item { _sender: sender.clone() }).is_ok());
        drop(inbox);
        assert!(sender.send(Item { _sender: sender.clone() }).is_err());
    }

    #[test]
    fn a_dropped_inbox_lets_its_waker_go() {
        struct Wakes;
        impl std::task::Wake for Wakes {
            fn wake(self: Arc<Self>) {}
        }
        let task = Arc::new(Wakes);
        let waker = Waker::from(task.clone());
        let (sender, mut inbox) = inbox::<u8>();
        assert!(inbox.poll_recv(&mut Context::from_waker(&waker)).is_pending());
        drop((inbox, waker));
        assert_eq!(Arc::strong_count(&task), 1, "senders that live on keep no task alive");
        drop(sender);
    }

    #[test]
    fn reply_crosses_from_a_thread_to_a_task() {
        let (sender, reply) = reply();
        let thread = thread::spawn(move || sender.send(42));
        assert_eq!(on_executor(reply), Some(42));
        thread.join().unwrap();
    }

    #[test]
    fn a_reply_whose_sender_was_dropped_ends_the_wait() {
        let (sender, reply) = reply::<u8>();
        let thread = thread::spawn(move || drop(sender));
        assert_eq!(on_executor(reply), None);
        thread.join().unwrap();
    }

    #[test]
    fn a_reply_that_nobody_waits_for_is_dropped() {
        let (sender, reply) = reply();
        let value = Arc::new(());
        drop(reply);
        sender.send(value.clone());
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn try_recv_does_not_wait() {
        let (sender, mut inbox) = inbox();
        assert_eq!(inbox.try_recv(), None);
        sender.send(1).unwrap();
        assert_eq!(inbox.try_recv(), Some(1));
        let mut waiting = pin!(inbox.recv());
        assert!(waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
}
