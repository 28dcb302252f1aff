//! Channels between tasks of one executor: `Rc` and `Cell`, no lock and no atomic.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
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

/// The futures that wait for one thing, in the order in which they began to.
///
/// Each wait has its own entry and takes it along when it is dropped: a wait that timed out leaves nothing behind,
/// however long nobody wakes the others.
#[derive(Debug, Default)]
pub(crate) struct Waiters {
    next: Cell<u64>,
    wakers: RefCell<BTreeMap<u64, Waker>>,
}

impl Waiters {
    /// A wait that is entered at its first [`Wait::enter`].
    pub(crate) fn wait(&self) -> Wait<'_> {
        Wait { waiters: self, place: None }
    }

    pub(crate) fn wake_first(&self) {
        let first = self.wakers.borrow_mut().pop_first();
        if let Some((_, waker)) = first {
            waker.wake();
        }
    }

    pub(crate) fn wake_all(&self) {
        for waker in self.wakers.take().into_values() {
            waker.wake();
        }
    }
}

/// One wait. It may be woken for nothing.
#[derive(Debug)]
pub struct Wait<'a> {
    waiters: &'a Waiters,
    place: Option<u64>,
}

impl Wait<'_> {
    /// Asks to be woken; a wait that enters again keeps its place.
    pub fn enter(&mut self, cx: &mut Context<'_>) {
        let next = &self.waiters.next;
        let place = *self.place.get_or_insert_with(|| next.replace(next.get() + 1));
        let replaced = self.waiters.wakers.borrow_mut().insert(place, cx.waker().clone());
        drop(replaced);
    }

    /// The wait is over and got what it waited for.
    pub fn leave(&mut self) {
        if let Some(place) = self.place.take() {
            drop(self.remove(place));
        }
    }

    fn remove(&self, place: u64) -> Option<Waker> {
        self.waiters.wakers.borrow_mut().remove(&place)
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        // Woken and dropped before it could look: the wake-up belongs to the next in line, or it would be lost.
        if let Some(place) = self.place
            && self.remove(place).is_none()
        {
            self.waiters.wake_first();
        }
    }
}

/// Wakes every task that waits, each time.
#[derive(Debug, Default)]
pub struct Broadcast {
    version: Cell<u64>,
    waiters: Waiters,
}

impl Broadcast {
    pub fn version(&self) -> u64 {
        self.version.get()
    }

    pub fn notify_all(&self) {
        self.version.set(self.version.get() + 1);
        self.waiters.wake_all();
    }

    /// A wait for the next [`Broadcast::notify_all`], for a task that waits for several things at once: look, then enter.
    pub fn wait(&self) -> Wait<'_> {
        self.waiters.wait()
    }

    /// Returns the version once it is no longer `seen`.
    pub async fn changed(&self, seen: u64) -> u64 {
        let mut wait = self.waiters.wait();
        std::future::poll_fn(|cx| {
            let version = self.version.get();
            if version != seen {
                wait.leave();
                return Poll::Ready(version);
            }
            wait.enter(cx);
            Poll::Pending
        })
        .await
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
    senders: Waiters,
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
            senders: Waiters::default(),
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

    /// Waits for room, first come, first served. Gives the item back when the queue is closed.
    pub async fn send(&self, item: T) -> Result<(), T> {
        let mut slot = Some(item);
        let mut wait = self.0.senders.wait();
        std::future::poll_fn(|cx| {
            let item = slot.take().expect("polled after it was ready");
            match self.try_send(item) {
                Ok(()) => {
                    wait.leave();
                    Poll::Ready(Ok(()))
                }
                Err(item) if self.0.closed.get() => {
                    wait.leave();
                    Poll::Ready(Err(item))
                }
                Err(item) => {
                    slot = Some(item);
                    wait.enter(cx);
                    Poll::Pending
                }
            }
        })
        .await
    }

    pub fn try_recv(&self) -> Option<T> {
        let item = self.0.items.borrow_mut().pop_front()?;
        // One item out, one sender in: waking them all would make each of them look once per item.
        self.0.senders.wake_first();
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
        self.0.senders.wake_all();
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

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    /// Counts how often it was woken.
    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Woken {
        fn new() -> (Arc<Woken>, Waker) {
            let woken = Arc::new(Woken::default());
            (woken.clone(), Waker::from(woken))
        }

        fn count(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    fn poll<F: Future + ?Sized>(future: Pin<&mut F>, waker: &Waker) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(waker))
    }

    #[test]
    fn notify_keeps_a_notification_that_comes_before_the_wait() {
        let notify = Notify::default();
        let (woken, waker) = Woken::new();
        notify.notify();
        notify.notify();
        assert!(poll(pin!(notify.notified()), &waker).is_ready());
        let mut wait = pin!(notify.notified());
        assert!(poll(wait.as_mut(), &waker).is_pending(), "two notifications before the wait count as one");
        notify.notify();
        assert_eq!(woken.count(), 1);
        assert!(poll(wait, &waker).is_ready());
    }

    #[test]
    fn notify_outlives_a_wait_that_was_woken_and_dropped() {
        let notify = Notify::default();
        let (_, first) = Woken::new();
        {
            let mut dropped = pin!(notify.notified());
            assert!(poll(dropped.as_mut(), &first).is_pending());
            notify.notify();
        }
        let (_, second) = Woken::new();
        assert!(poll(pin!(notify.notified()), &second).is_ready());
    }

    #[test]
    fn broadcast_wakes_every_waiter_once() {
        let broadcast = Broadcast::default();
        let (first_woken, first_waker) = Woken::new();
        let (second_woken, second_waker) = Woken::new();
        let mut first = pin!(broadcast.changed(0));
        let mut second = pin!(broadcast.changed(0));
        for _ in 0..3 {
            assert!(poll(first.as_mut(), &first_waker).is_pending());
            assert!(poll(second.as_mut(), &second_waker).is_pending());
        }
        broadcast.notify_all();
        assert_eq!((first_woken.count(), second_woken.count()), (1, 1));
        assert_eq!(poll(first, &first_waker), Poll::Ready(1));
        assert_eq!(poll(second, &second_waker), Poll::Ready(1));
        assert_eq!(
            poll(pin!(broadcast.changed(0)), &first_waker),
            Poll::Ready(1),
            "an old version is answered at once"
        );
    }

    #[test]
    fn broadcast_forgets_waits_that_were_given_up() {
        let broadcast = Broadcast::default();
        let (woken, waker) = Woken::new();
        for _ in 0..1000 {
            assert!(poll(pin!(broadcast.changed(0)), &waker).is_pending());
        }
        assert_eq!(broadcast.waiters.wakers.borrow().len(), 0);
        broadcast.notify_all();
        assert_eq!(woken.count(), 0);
    }

    #[test]
    fn queue_is_first_in_first_out_and_bounded() {
        let queue = Queue::new(2);
        assert_eq!(queue.try_send(1), Ok(()));
        assert_eq!(queue.try_send(2), Ok(()));
        assert_eq!(queue.try_send(3), Err(3));
        assert_eq!(queue.len(), 2);
        assert_eq!((queue.try_recv(), queue.try_recv(), queue.try_recv()), (Some(1), Some(2), None));
        assert!(queue.is_empty());
    }

    #[test]
    fn queue_lets_waiting_senders_in_one_by_one_in_order() {
        let queue = Queue::new(1);
        queue.try_send(0).unwrap();
        let woken: Vec<_> = (0..3).map(|_| Woken::new()).collect();
        let mut sends: Vec<_> = (1..=3).map(|item| Box::pin(queue.send(item))).collect();
        for (send, (_, waker)) in sends.iter_mut().zip(&woken) {
            assert!(poll(send.as_mut(), waker).is_pending());
        }
        for turn in 0..3 {
            assert_eq!(queue.try_recv(), Some(turn));
            let counts: Vec<_> = woken.iter().map(|(woken, _)| woken.count()).collect();
            assert_eq!(counts.iter().sum::<usize>(), turn + 1, "one item out wakes one sender: {counts:?}");
            assert_eq!(poll(sends[turn].as_mut(), &woken[turn].1), Poll::Ready(Ok(())));
        }
        assert_eq!(queue.try_recv(), Some(3));
    }

    #[test]
    fn queue_sender_that_was_overtaken_keeps_its_place() {
        let queue = Queue::new(1);
        queue.try_send(0).unwrap();
        let (first_woken, first_waker) = Woken::new();
        let (second_woken, second_waker) = Woken::new();
        let mut first = pin!(queue.send(1));
        let mut second = pin!(queue.send(2));
        assert!(poll(first.as_mut(), &first_waker).is_pending());
        assert!(poll(second.as_mut(), &second_waker).is_pending());
        assert_eq!(queue.try_recv(), Some(0));
        queue.try_send(9).unwrap();
        assert!(poll(first.as_mut(), &first_waker).is_pending(), "another was faster");
        assert_eq!(queue.try_recv(), Some(9));
        assert_eq!((first_woken.count(), second_woken.count()), (2, 0));
        assert_eq!(poll(first, &first_waker), Poll::Ready(Ok(())));
    }

    #[test]
    fn queue_hands_the_wake_up_of_a_dropped_sender_on() {
        let queue = Queue::new(1);
        queue.try_send(0).unwrap();
        let (_, first_waker) = Woken::new();
        let (second_woken, second_waker) = Woken::new();
        let mut second = Box::pin(queue.send(2));
        {
            let mut first = pin!(queue.send(1));
            assert!(poll(first.as_mut(), &first_waker).is_pending());
            assert!(poll(second.as_mut(), &second_waker).is_pending());
            assert_eq!(queue.try_recv(), Some(0));
            assert_eq!(second_woken.count(), 0);
        }
        assert_eq!(second_woken.count(), 1);
        assert_eq!(poll(second.as_mut(), &second_waker), Poll::Ready(Ok(())));
    }

    #[test]
    fn queue_polled_again_and_again_holds_one_waker_a_sender() {
        let queue = Queue::new(1);
        queue.try_send(0).unwrap();
        let (_, waker) = Woken::new();
        let mut send = pin!(queue.send(1));
        for _ in 0..1000 {
            assert!(poll(send.as_mut(), &waker).is_pending());
        }
        assert_eq!(queue.0.senders.wakers.borrow().len(), 1);
    }

    #[test]
    fn closing_a_queue_wakes_all_and_keeps_what_is_in_it() {
        let queue = Queue::new(1);
        let (receiver_woken, receiver_waker) = Woken::new();
        let mut recv = Box::pin(queue.recv());
        assert!(poll(recv.as_mut(), &receiver_waker).is_pending());
        queue.try_send(0).unwrap();
        assert_eq!(receiver_woken.count(), 1);
        drop(recv);

        let senders: Vec<_> = (0..2).map(|_| Woken::new()).collect();
        let mut sends: Vec<_> = (1..=2).map(|item| Box::pin(queue.send(item))).collect();
        for (send, (_, waker)) in sends.iter_mut().zip(&senders) {
            assert!(poll(send.as_mut(), waker).is_pending());
        }
        queue.close();
        for (index, (send, (woken, waker))) in sends.iter_mut().zip(&senders).enumerate() {
            assert_eq!(woken.count(), 1);
            assert_eq!(poll(send.as_mut(), waker), Poll::Ready(Err(index + 1)));
        }
        assert_eq!(poll(pin!(queue.recv()), &receiver_waker), Poll::Ready(Some(0)));
        assert_eq!(poll(pin!(queue.recv()), &receiver_waker), Poll::Ready(None));
        assert_eq!(queue.try_send(5), Err(5));
    }

    #[test]
    fn oneshot_gives_its_value_once() {
        let (sender, mut receiver) = oneshot();
        let (woken, waker) = Woken::new();
        assert!(poll(Pin::new(&mut receiver), &waker).is_pending());
        sender.send(7);
        assert_eq!(woken.count(), 1);
        assert_eq!(poll(Pin::new(&mut receiver), &waker), Poll::Ready(Some(7)));
        assert_eq!(poll(Pin::new(&mut receiver), &waker), Poll::Ready(None));
    }

    #[test]
    fn oneshot_tells_that_its_sender_is_gone() {
        let (sender, mut receiver) = oneshot::<u8>();
        let (woken, waker) = Woken::new();
        assert!(poll(Pin::new(&mut receiver), &waker).is_pending());
        drop(sender);
        assert_eq!(woken.count(), 1);
        assert_eq!(poll(Pin::new(&mut receiver), &waker), Poll::Ready(None));
    }
}
