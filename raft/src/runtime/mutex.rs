//! A mutex whose waiters are let in in their order. The lock is the borrow of a `RefCell`.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::VecDeque;
use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::oneshot::wake;

pub struct LocalMutex<T> {
    value: RefCell<T>,
    waiting: RefCell<VecDeque<(u64, Waker)>>,
    next_waiter: Cell<u64>,
}

pub struct Guard<'a, T> {
    mutex: &'a LocalMutex<T>,
    /// Always there until the drop, which lets go of the value before it wakes the next one.
    value: Option<RefMut<'a, T>>,
}

impl<T: 'static> openraft_rt::Mutex<T> for LocalMutex<T> {
    type Guard<'a> = Guard<'a, T>;

    fn new(value: T) -> Self {
        LocalMutex { value: RefCell::new(value), waiting: RefCell::default(), next_waiter: Cell::new(0) }
    }

    fn lock(&self) -> impl Future<Output = Guard<'_, T>> {
        Locking { mutex: self, waiter: None }
    }
}

impl<T> LocalMutex<T> {
    fn wake_next(&self) {
        let next = self.waiting.borrow_mut().pop_front();
        wake(next.map(|(_, waker)| waker));
    }
}

struct Locking<'a, T> {
    mutex: &'a LocalMutex<T>,
    waiter: Option<u64>,
}

impl<'a, T> Future for Locking<'a, T> {
    type Output = Guard<'a, T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Guard<'a, T>> {
        let mutex = self.mutex;
        if let Ok(value) = mutex.value.try_borrow_mut() {
            if let Some(waiter) = self.waiter.take() {
                mutex.waiting.borrow_mut().retain(|(id, _)| *id != waiter);
            }
            return Poll::Ready(Guard { mutex, value: Some(value) });
        }
        let waiter = self.waiter.unwrap_or_else(|| {
            let waiter = mutex.next_waiter.get();
            mutex.next_waiter.set(waiter + 1);
            waiter
        });
        self.waiter = Some(waiter);
        let mut waiting = mutex.waiting.borrow_mut();
        match waiting.iter_mut().find(|(id, _)| *id == waiter) {
            Some((_, waker)) => waker.clone_from(cx.waker()),
            None => waiting.push_back((waiter, cx.waker().clone())),
        }
        Poll::Pending
    }
}

impl<T> Drop for Locking<'_, T> {
    /// A wait that is given up after it was woken passes the wake on.
    fn drop(&mut self) {
        let Some(waiter) = self.waiter else { return };
        let was_woken = {
            let mut waiting = self.mutex.waiting.borrow_mut();
            let before = waiting.len();
            waiting.retain(|(id, _)| *id != waiter);
            waiting.len() == before
        };
        if was_woken && self.mutex.value.try_borrow_mut().is_ok() {
            self.mutex.wake_next();
        }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("a guard holds its value until it is dropped")
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("a guard holds its value until it is dropped")
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.value = None;
        self.mutex.wake_next();
    }
}
