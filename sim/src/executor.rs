//! One thread, its tasks in a random but repeatable order, and a clock that moves only when everybody waits.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use crate::random::Random;

/// Clones are the same executor.
#[derive(Clone)]
pub struct Executor(Rc<State>);

struct State {
    tasks: RefCell<Vec<Option<Task>>>,
    free: RefCell<Vec<usize>>,
    ready: Arc<Ready>,
    timers: RefCell<BTreeMap<(Duration, u64), Waker>>,
    timers_made: Cell<u64>,
    now: Cell<Duration>,
    polls: Cell<u64>,
}

struct Task {
    /// `None` while it is polled.
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
    waker: Waker,
    entry: Arc<Entry>,
}

/// Tasks to poll. A waker may go to another thread as far as its type says, so this is locked; here none ever does.
#[derive(Default)]
struct Ready(Mutex<Vec<usize>>);

struct Entry {
    ready: Arc<Ready>,
    index: usize,
    queued: AtomicBool,
}

impl Ready {
    fn lock(&self) -> MutexGuard<'_, Vec<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Entry {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            self.ready.lock().push(self.index);
        }
    }
}

/// How [`Executor::run`] ended.
#[derive(Debug)]
pub enum Ended<T> {
    Done(T),
    /// The polls that were allowed are over.
    Cut,
    /// Everybody waits for somebody else.
    Stuck,
}

impl Executor {
    pub fn new() -> Executor {
        Executor(Rc::new(State {
            tasks: RefCell::default(),
            free: RefCell::default(),
            ready: Arc::default(),
            timers: RefCell::default(),
            timers_made: Cell::new(0),
            now: Cell::new(Duration::ZERO),
            polls: Cell::new(0),
        }))
    }

    pub fn now(&self) -> Duration {
        self.0.now.get()
    }

    /// Tasks polled so far.
    pub fn polls(&self) -> u64 {
        self.0.polls.get()
    }

    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let mut tasks = self.0.tasks.borrow_mut();
        let index = self.0.free.borrow_mut().pop().unwrap_or_else(|| {
            tasks.push(None);
            tasks.len() - 1
        });
        let entry = Arc::new(Entry { ready: self.0.ready.clone(), index, queued: AtomicBool::new(false) });
        let waker = Waker::from(entry.clone());
        tasks[index] = Some(Task { future: Some(Box::pin(future)), waker, entry: entry.clone() });
        drop(tasks);
        entry.wake();
    }

    /// Runs `main` and all that is spawned until `main` ends, at most `polls_max` polls.
    pub fn run<T: 'static>(
        &self,
        random: &Random,
        polls_max: u64,
        main: impl Future<Output = T> + 'static,
    ) -> Ended<T> {
        let result = Rc::new(RefCell::new(None));
        let slot = result.clone();
        self.spawn(async move {
            let value = main.await;
            *slot.borrow_mut() = Some(value);
        });
        for _ in 0..polls_max {
            if let Some(value) = result.borrow_mut().take() {
                return Ended::Done(value);
            }
            let Some(index) = self.next(random) else { return Ended::Stuck };
            self.poll(index);
        }
        Ended::Cut
    }

    /// Ends all tasks where they are, as a crash does.
    pub fn kill_all(&self) {
        loop {
            // What is dropped may wake, spawn and cancel: nothing is borrowed meanwhile.
            let tasks = std::mem::take(&mut *self.0.tasks.borrow_mut());
            if tasks.is_empty() {
                break;
            }
            drop(tasks);
        }
        self.0.free.borrow_mut().clear();
        self.0.ready.lock().clear();
        let timers = std::mem::take(&mut *self.0.timers.borrow_mut());
        drop(timers);
    }

    pub fn sleep(&self, time: Duration) -> Sleep {
        let number = self.0.timers_made.get();
        self.0.timers_made.set(number + 1);
        Sleep { executor: self.clone(), key: (self.now() + time, number) }
    }

    /// A task that can go on. When there is none the clock moves to the next timer.
    fn next(&self, random: &Random) -> Option<usize> {
        loop {
            {
                let mut ready = self.0.ready.lock();
                if !ready.is_empty() {
                    let pick = if ready.len() == 1 { 0 } else { random.below(ready.len() as u64) as usize };
                    return Some(ready.swap_remove(pick));
                }
            }
            let ((time, _), waker) = self.0.timers.borrow_mut().pop_first()?;
            self.0.now.set(self.now().max(time));
            waker.wake();
        }
    }

    fn poll(&self, index: usize) {
        self.0.polls.set(self.polls() + 1);
        let taken = {
            let mut tasks = self.0.tasks.borrow_mut();
            let Some(task) = tasks.get_mut(index).and_then(Option::as_mut) else { return };
            task.entry.queued.store(false, Ordering::Relaxed);
            task.future.take().map(|future| (future, task.waker.clone()))
        };
        let Some((mut future, waker)) = taken else { return };
        let poll = future.as_mut().poll(&mut Context::from_waker(&waker));
        let mut tasks = self.0.tasks.borrow_mut();
        if poll.is_pending() {
            tasks[index].as_mut().expect("it was polled just now").future = Some(future);
            return;
        }
        let task = tasks[index].take();
        drop(tasks);
        self.0.free.borrow_mut().push(index);
        drop((future, task));
    }
}

impl Default for Executor {
    fn default() -> Self {
        Executor::new()
    }
}

/// Ends at its time.
pub struct Sleep {
    executor: Executor,
    key: (Duration, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.key.0 <= self.executor.now() {
            return Poll::Ready(());
        }
        self.executor.0.timers.borrow_mut().insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let removed = self.executor.0.timers.borrow_mut().remove(&self.key);
        drop(removed);
    }
}
