//! Tasks whose panic is seen.
//!
//! A panic in a glommio task unwinds through the executor and takes the thread with it, while the rest of the process
//! goes on. A failed assertion is a bug of ours, and a wounded shard must leave no neighbours answering, so here a panic
//! ends the process.

use std::any::Any;
use std::cell::Cell;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use futures_lite::FutureExt as _;

/// Exit code after a panic: EX_SOFTWARE of sysexits.h.
pub const EXIT_PANIC: i32 = 70;

/// Spawns a task on this executor. It runs to its end whether or not the handle is kept; a panic in it ends the process
/// with [`EXIT_PANIC`], after the panic message.
pub fn spawn<F>(future: F) -> TaskHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    TaskHandle(glommio::spawn_local(Guarded(future)).detach())
}

/// Spawns a task whose panic is handed to whoever awaits it, instead of ending the process. Only for libraries that
/// make something of a panic of their own; dropping the handle drops the panic with it.
pub fn spawn_caught<F>(future: F) -> TaskHandle<std::thread::Result<F::Output>>
where
    F: Future + 'static,
    F::Output: 'static,
{
    TaskHandle(glommio::spawn_local(AssertUnwindSafe(future).catch_unwind()).detach())
}

/// Ends the process after a panic that must not be survived.
pub fn stop_after_panic(panic: &(dyn Any + Send)) -> ! {
    let message = panic
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message");
    tracing::error!(message, "a task panicked; the node stops");
    std::process::exit(EXIT_PANIC)
}

struct Guarded<F>(F);

impl<F: Future> Future for Guarded<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        // SAFETY: the only field is projected structurally and never moved out.
        let inner = unsafe { self.map_unchecked_mut(|guarded| &mut guarded.0) };
        match std::panic::catch_unwind(AssertUnwindSafe(|| inner.poll(cx))) {
            Ok(poll) => poll,
            Err(panic) => stop_after_panic(&*panic),
        }
    }
}

/// Waits for a task; dropping it lets the task run on.
#[derive(Debug)]
pub struct TaskHandle<T>(glommio::task::JoinHandle<T>);

impl<T> Future for TaskHandle<T> {
    /// `None` when the executor ended before the task did.
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}

/// Lets other tasks run if this one has had its share.
pub async fn yield_if_needed() {
    glommio::yield_if_needed().await;
}

/// Lets every other runnable task run once.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

/// Tells tasks of one executor to stop; clones share the state.
#[derive(Clone, Debug, Default)]
pub struct Stop(Rc<StopState>);

#[derive(Debug, Default)]
struct StopState {
    stopped: Cell<bool>,
    wakers: std::cell::RefCell<Vec<Waker>>,
}

impl Stop {
    pub fn stop(&self) {
        self.0.stopped.set(true);
        for waker in self.0.wakers.take() {
            waker.wake();
        }
    }

    pub fn is_stopped(&self) -> bool {
        self.0.stopped.get()
    }

    /// Registers `cx` to be woken by [`Stop::stop`]; `true` when that has been called.
    pub fn poll_stopped(&self, cx: &mut Context<'_>) -> bool {
        if self.is_stopped() {
            return true;
        }
        let mut wakers = self.0.wakers.borrow_mut();
        if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            wakers.push(cx.waker().clone());
        }
        false
    }

    pub async fn stopped(&self) {
        std::future::poll_fn(|cx| if self.poll_stopped(cx) { Poll::Ready(()) } else { Poll::Pending }).await
    }
}
