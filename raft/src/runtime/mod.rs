//! openraft on a Drava executor: what its `AsyncRuntime` asks for, from `drava_runtime`. Nothing here is `Send`.
//!
//! openraft's own suite for runtimes is the test of this module, and the gate of every upgrade.

mod mpsc;
mod mutex;
mod oneshot;
mod watch;

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use drava_runtime::task::TaskHandle;
use drava_runtime::time::Timer;
use drava_runtime::{Executor, ExecutorConfig};
use openraft_rt::AsyncRuntime;

pub use mpsc::LocalMpsc;
pub use mutex::LocalMutex;
pub use oneshot::LocalOneshot;
pub use watch::LocalWatch;

/// The executor that the caller runs on.
#[derive(Debug)]
pub struct LocalRuntime;

/// Why a task of openraft gave no value.
pub enum JoinError {
    /// The executor ended first.
    Cancelled,
    Panicked(Box<dyn Any + Send>),
}

impl fmt::Display for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JoinError::Cancelled => f.write_str("the executor ended before the task"),
            JoinError::Panicked(panic) => {
                let message = panic
                    .downcast_ref::<&'static str>()
                    .copied()
                    .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
                    .unwrap_or("without a message");
                write!(f, "the task panicked: {message}")
            }
        }
    }
}

impl fmt::Debug for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Waits for a task; dropping it lets the task run on, as openraft expects.
pub struct JoinHandle<T>(TaskHandle<std::thread::Result<T>>);

impl<T> Unpin for JoinHandle<T> {}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, JoinError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match ready!(Pin::new(&mut self.0).poll(cx)) {
            Some(Ok(value)) => Ok(value),
            Some(Err(panic)) => Err(JoinError::Panicked(panic)),
            None => Err(JoinError::Cancelled),
        })
    }
}

#[derive(Debug)]
pub struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the time is up")
    }
}

pin_project_lite::pin_project! {
    pub struct Timeout<F> {
        #[pin]
        future: F,
        deadline: Instant,
        // Armed only when the future is pending at its first poll, which most are not.
        timer: Option<Timer>,
    }
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(value) = this.future.poll(cx) {
            return Poll::Ready(Ok(value));
        }
        let deadline = *this.deadline;
        let timer = this.timer.get_or_insert_with(|| Timer::new(until(deadline)));
        Pin::new(timer).poll(cx).map(|_| Err(Elapsed))
    }
}

fn until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

impl AsyncRuntime for LocalRuntime {
    type JoinError = JoinError;
    type JoinHandle<T: 'static> = JoinHandle<T>;
    type Sleep = Timer;
    type Instant = Instant;
    type TimeoutError = Elapsed;
    type Timeout<R, T: Future<Output = R>> = Timeout<T>;
    type ThreadLocalRng = rand::rngs::ThreadRng;
    type Mpsc = LocalMpsc;
    type Watch = LocalWatch;
    type Oneshot = LocalOneshot;
    type Mutex<T: 'static> = LocalMutex<T>;

    /// A panic is caught and given to openraft, which makes a `Fatal` of it; the owner of the group then stops the node.
    fn spawn<T>(future: T) -> JoinHandle<T::Output>
    where
        T: Future + 'static,
        T::Output: 'static,
    {
        JoinHandle(drava_runtime::spawn_caught(future))
    }

    fn sleep(duration: Duration) -> Timer {
        Timer::new(duration)
    }

    fn sleep_until(deadline: Instant) -> Timer {
        Timer::new(until(deadline))
    }

    fn timeout<R, F: Future<Output = R>>(duration: Duration, future: F) -> Timeout<F> {
        Timeout { future, deadline: Instant::now() + duration, timer: None }
    }

    fn timeout_at<R, F: Future<Output = R>>(deadline: Instant, future: F) -> Timeout<F> {
        Timeout { future, deadline, timer: None }
    }

    fn is_panic(error: &JoinError) -> bool {
        matches!(error, JoinError::Panicked(_))
    }

    fn thread_rng() -> rand::rngs::ThreadRng {
        rand::rng()
    }

    fn new(_threads: usize) -> LocalRuntime {
        LocalRuntime
    }

    /// Runs on an executor made for this one call. Only openraft's tests come here.
    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        Executor::run(ExecutorConfig::new("raft-block-on", None), future).expect("the system gives an executor")
    }

    /// One thread a call. openraft itself never calls it.
    fn spawn_blocking<F, T>(work: F) -> impl Future<Output = Result<T, std::io::Error>> + Send
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let (sender, reply) = drava_runtime::foreign::reply();
        std::thread::spawn(move || sender.send(std::panic::catch_unwind(AssertUnwindSafe(work))));
        async move {
            match reply.await {
                Some(Ok(value)) => Ok(value),
                Some(Err(_)) | None => Err(std::io::Error::other("the blocking task panicked")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openraft_accepts_the_runtime() {
        openraft_rt::testing::Suite::<LocalRuntime>::test_all();
    }
}
