//! A bounded queue with many senders and one receiver. Full: senders wait, and are let in in their order.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use openraft_rt::{Mpsc, MpscReceiver, MpscSender, MpscWeakSender, SendError, TryRecvError};

use super::oneshot::wake;

pub struct LocalMpsc;

struct State<T> {
    items: VecDeque<T>,
    capacity: usize,
    senders: usize,
    receiver_gone: bool,
    receiver: Option<Waker>,
    waiting: VecDeque<(u64, Waker)>,
    next_waiter: u64,
}

pub struct Sender<T>(Rc<RefCell<State<T>>>);
pub struct WeakSender<T>(Rc<RefCell<State<T>>>);
pub struct Receiver<T>(Rc<RefCell<State<T>>>);

impl Mpsc for LocalMpsc {
    type Sender<T> = Sender<T>;
    type Receiver<T> = Receiver<T>;
    type WeakSender<T> = WeakSender<T>;

    fn channel<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
        let state = Rc::new(RefCell::new(State {
            // openraft asks for 65 536 slots and uses few.
            items: VecDeque::with_capacity(capacity.min(64)),
            capacity: capacity.max(1),
            senders: 1,
            receiver_gone: false,
            receiver: None,
            waiting: VecDeque::new(),
            next_waiter: 0,
        }));
        (Sender(state.clone()), Receiver(state))
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.borrow_mut().senders += 1;
        Sender(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut state = self.0.borrow_mut();
            state.senders -= 1;
            if state.senders == 0 { state.receiver.take() } else { None }
        };
        wake(waker);
    }
}

impl<T> Clone for WeakSender<T> {
    fn clone(&self) -> Self {
        WeakSender(self.0.clone())
    }
}

impl<T> MpscWeakSender<LocalMpsc, T> for WeakSender<T> {
    fn upgrade(&self) -> Option<Sender<T>> {
        let mut state = self.0.borrow_mut();
        if state.senders == 0 || state.receiver_gone {
            return None;
        }
        state.senders += 1;
        Some(Sender(self.0.clone()))
    }
}

impl<T> MpscSender<LocalMpsc, T> for Sender<T> {
    fn send(&self, item: T) -> impl Future<Output = Result<(), SendError<T>>> {
        Sending { state: &self.0, item: Some(item), waiter: None }
    }

    fn downgrade(&self) -> WeakSender<T> {
        WeakSender(self.0.clone())
    }
}

struct Sending<'a, T> {
    state: &'a RefCell<State<T>>,
    item: Option<T>,
    waiter: Option<u64>,
}

impl<T> Unpin for Sending<'_, T> {}

impl<T> Future for Sending<'_, T> {
    type Output = Result<(), SendError<T>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.state.borrow_mut();
        if state.receiver_gone {
            return Poll::Ready(Err(SendError(self.item.take().expect("polled after it was ready"))));
        }
        if state.items.len() < state.capacity {
            state.items.push_back(self.item.take().expect("polled after it was ready"));
            if let Some(waiter) = self.waiter.take() {
                state.waiting.retain(|(id, _)| *id != waiter);
            }
            let receiver = state.receiver.take();
            drop(state);
            wake(receiver);
            return Poll::Ready(Ok(()));
        }
        let waiter = self.waiter.unwrap_or_else(|| {
            state.next_waiter += 1;
            state.next_waiter
        });
        match state.waiting.iter_mut().find(|(id, _)| *id == waiter) {
            Some((_, waker)) => waker.clone_from(cx.waker()),
            None => state.waiting.push_back((waiter, cx.waker().clone())),
        }
        drop(state);
        self.waiter = Some(waiter);
        Poll::Pending
    }
}

impl<T> Drop for Sending<'_, T> {
    /// A send that is given up leaves the queue; if it had been woken for a free place, the next one gets the place.
    fn drop(&mut self) {
        let Some(waiter) = self.waiter else { return };
        let next = {
            let mut state = self.state.borrow_mut();
            let before = state.waiting.len();
            state.waiting.retain(|(id, _)| *id != waiter);
            let was_woken = state.waiting.len() == before;
            if was_woken && state.items.len() < state.capacity { state.waiting.pop_front() } else { None }
        };
        wake(next.map(|(_, waker)| waker));
    }
}

impl<T> MpscReceiver<T> for Receiver<T> {
    fn recv(&mut self) -> impl Future<Output = Option<T>> {
        poll_fn(move |cx| match self.try_recv() {
            Ok(item) => Poll::Ready(Some(item)),
            Err(TryRecvError::Disconnected) => Poll::Ready(None),
            Err(TryRecvError::Empty) => {
                self.0.borrow_mut().receiver = Some(cx.waker().clone());
                Poll::Pending
            }
        })
    }

    fn try_recv(&mut self) -> Result<T, TryRecvError> {
        let mut state = self.0.borrow_mut();
        match state.items.pop_front() {
            Some(item) => {
                let next = state.waiting.pop_front();
                drop(state);
                wake(next.map(|(_, waker)| waker));
                Ok(item)
            }
            None if state.senders == 0 => Err(TryRecvError::Disconnected),
            None => Err(TryRecvError::Empty),
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let (items, waiting) = {
            let mut state = self.0.borrow_mut();
            state.receiver_gone = true;
            state.receiver = None;
            (std::mem::take(&mut state.items), std::mem::take(&mut state.waiting))
        };
        // Outside the borrow: an item may hold a sender of this very queue.
        drop(items);
        for (_, waker) in waiting {
            waker.wake();
        }
    }
}
