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
use std::task::{Context, Poll};

use crate::local::Waiters;

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
    leave(EXIT_PANIC)
}

/// Ends the process as it stands, whatever its threads do.
///
/// `std::process::exit`, and a return from `main`, run the destructors of C++ statics under the feet of the other threads:
/// RocksDB aborts then, which would change the exit code or hang the process. Whoever calls this has what it promised on
/// disk, and has flushed what it printed.
pub fn leave(code: i32) -> ! {
    // SAFETY: `_exit` takes no pointer, touches no memory of ours and does not return.
    unsafe { libc::_exit(code) }
}

pub(crate) struct Guarded<F>(pub(crate) F);

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
    waiters: Waiters,
}

impl Stop {
    pub fn stop(&self) {
        self.0.stopped.set(true);
        self.0.waiters.wake_all();
    }

    pub fn is_stopped(&self) -> bool {
        self.0.stopped.get()
    }

    /// Returns once [`Stop::stop`] has been called.
    pub async fn stopped(&self) {
        let mut wait = self.0.waiters.wait();
        std::future::poll_fn(|cx| {
            if self.is_stopped() {
                wait.leave();
                return Poll::Ready(());
            }
            wait.enter(cx);
            Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Output};

    use super::*;
    use crate::{Executor, ExecutorConfig};

    fn on_executor<T>(future: impl Future<Output = T>) -> T {
        Executor::run(ExecutorConfig::new("task-test", None), future).expect("an executor")
    }

    /// Runs one of the ignored tests below in a process of its own.
    fn in_child(test: &str) -> Output {
        Command::new(std::env::current_exe().expect("the test binary"))
            .args(["--ignored", "--exact", "--nocapture", test])
            .output()
            .expect("the child ran")
    }

    #[test]
    fn a_panic_in_a_task_ends_the_process() {
        let child = in_child("task::tests::child_with_a_panicking_task");
        assert_eq!(child.status.code(), Some(EXIT_PANIC), "{child:?}");
        assert!(String::from_utf8_lossy(&child.stderr).contains("the claim of the task"), "{child:?}");
    }

    #[test]
    #[ignore = "run in a child process: its panic ends it"]
    fn child_with_a_panicking_task() {
        on_executor(async {
            spawn(async { panic!("the claim of the task") });
            std::future::pending::<()>().await;
        });
    }

    #[test]
    fn a_panic_in_the_root_of_a_started_executor_ends_the_process() {
        let child = in_child("task::tests::child_with_a_panicking_root");
        assert_eq!(child.status.code(), Some(EXIT_PANIC), "{child:?}");
        assert!(String::from_utf8_lossy(&child.stderr).contains("the claim of the root"), "{child:?}");
    }

    #[test]
    #[ignore = "run in a child process: its panic ends it"]
    fn child_with_a_panicking_root() {
        let _executor =
            Executor::start(ExecutorConfig::new("panics", None), || async { panic!("the claim of the root") })
                .expect("an executor");
        loop {
            std::thread::park();
        }
    }

    #[test]
    fn a_task_runs_to_its_end_without_its_handle() {
        let (sender, receiver) = crate::local::oneshot();
        let value = on_executor(async move {
            drop(spawn(async move {
                yield_now().await;
                sender.send(5);
            }));
            receiver.await
        });
        assert_eq!(value, Some(5));
    }

    #[test]
    fn a_task_handle_gives_the_result() {
        assert_eq!(on_executor(async { spawn(async { 5 }).await }), Some(5));
    }

    #[test]
    fn yield_now_lets_the_others_run() {
        let order = Rc::new(std::cell::RefCell::new(Vec::new()));
        on_executor({
            let order = order.clone();
            async move {
                let other = spawn({
                    let order = order.clone();
                    async move { order.borrow_mut().push("other") }
                });
                while order.borrow().is_empty() {
                    yield_now().await;
                }
                order.borrow_mut().push("this");
                other.await;
            }
        });
        assert_eq!(*order.borrow(), ["other", "this"]);
    }

    #[test]
    fn stop_reaches_every_waiting_task_and_those_that_come_later() {
        on_executor(async {
            let stop = Stop::default();
            let waiting: Vec<_> = (0..3)
                .map(|_| {
                    let stop = stop.clone();
                    spawn(async move { stop.stopped().await })
                })
                .collect();
            yield_now().await;
            assert!(!stop.is_stopped());
            stop.stop();
            for task in waiting {
                task.await;
            }
            stop.stopped().await;
            assert!(stop.is_stopped());
        });
    }
}
