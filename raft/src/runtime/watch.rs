//! A value that receivers watch: they see the newest, and may miss those between.
//!
//! A `Ref` held across a send is a panic here, where other runtimes would deadlock. openraft holds none.

use std::cell::{Cell, Ref, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use openraft_rt::watch::{RecvError, SendError};
use openraft_rt::{Watch, WatchReceiver, WatchSender};

pub struct LocalWatch;

struct State<T> {
    value: RefCell<T>,
    version: Cell<u64>,
    senders: Cell<usize>,
    receivers: Cell<usize>,
    waiting: RefCell<Vec<(u64, Waker)>>,
    next_waiter: Cell<u64>,
}

impl<T> State<T> {
    fn changed(&self) {
        self.version.set(self.version.get() + 1);
        self.wake_all();
    }

    fn wake_all(&self) {
        for (_, waker) in self.waiting.take() {
            waker.wake();
        }
    }
}

pub struct Sender<T>(Rc<State<T>>);

pub struct Receiver<T> {
    state: Rc<State<T>>,
    seen: u64,
}

impl Watch for LocalWatch {
    type Sender<T> = Sender<T>;
    type Receiver<T> = Receiver<T>;
    type Ref<'a, T: 'a> = Ref<'a, T>;

    fn channel<T>(value: T) -> (Sender<T>, Receiver<T>) {
        let state = Rc::new(State {
            value: RefCell::new(value),
            version: Cell::new(0),
            senders: Cell::new(1),
            receivers: Cell::new(1),
            waiting: RefCell::default(),
            next_waiter: Cell::new(0),
        });
        (Sender(state.clone()), Receiver { state, seen: 0 })
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.set(self.0.senders.get() + 1);
        Sender(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.senders.set(self.0.senders.get() - 1);
        if self.0.senders.get() == 0 {
            self.0.wake_all();
        }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        self.state.receivers.set(self.state.receivers.get() + 1);
        Receiver { state: self.state.clone(), seen: self.seen }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.state.receivers.set(self.state.receivers.get() - 1);
    }
}

impl<T> WatchSender<LocalWatch, T> for Sender<T> {
    fn send(&self, value: T) -> Result<(), SendError<T>> {
        if self.0.receivers.get() == 0 {
            return Err(SendError(value));
        }
        let old = self.0.value.replace(value);
        self.0.changed();
        drop(old);
        Ok(())
    }

    fn send_if_modified<F: FnOnce(&mut T) -> bool>(&self, modify: F) -> bool {
        let modified = modify(&mut self.0.value.borrow_mut());
        if modified {
            self.0.changed();
        }
        modified
    }

    fn borrow_watched(&self) -> Ref<'_, T> {
        self.0.value.borrow()
    }

    fn subscribe(&self) -> Receiver<T> {
        self.0.receivers.set(self.0.receivers.get() + 1);
        Receiver { state: self.0.clone(), seen: self.0.version.get() }
    }
}

impl<T> WatchReceiver<LocalWatch, T> for Receiver<T> {
    async fn changed(&mut self) -> Result<(), RecvError> {
        Changing { receiver: self, waiter: None }.await
    }

    fn borrow_watched(&self) -> Ref<'_, T> {
        self.state.value.borrow()
    }

    fn borrow_and_update(&mut self) -> Ref<'_, T> {
        self.seen = self.state.version.get();
        self.state.value.borrow()
    }
}

struct Changing<'a, T> {
    receiver: &'a mut Receiver<T>,
    waiter: Option<u64>,
}

impl<T> Future for Changing<'_, T> {
    type Output = Result<(), RecvError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let state = self.receiver.state.clone();
        if state.version.get() != self.receiver.seen {
            self.receiver.seen = state.version.get();
            return Poll::Ready(Ok(()));
        }
        if state.senders.get() == 0 {
            return Poll::Ready(Err(RecvError(())));
        }
        let waiter = *self.waiter.get_or_insert_with(|| {
            let waiter = state.next_waiter.get();
            state.next_waiter.set(waiter + 1);
            waiter
        });
        let mut waiting = state.waiting.borrow_mut();
        match waiting.iter_mut().find(|(id, _)| *id == waiter) {
            Some((_, waker)) => waker.clone_from(cx.waker()),
            None => waiting.push((waiter, cx.waker().clone())),
        }
        Poll::Pending
    }
}

impl<T> Drop for Changing<'_, T> {
    fn drop(&mut self) {
        if let Some(waiter) = self.waiter {
            self.receiver.state.waiting.borrow_mut().retain(|(id, _)| *id != waiter);
        }
    }
}
