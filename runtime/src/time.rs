//! Timers of the executor: glommio's, without two traps of theirs.
//!
//! - A glommio timer that is over when it is first polled is ready at once. A task that awaits such timers again and
//!   again, like a clock that has fallen behind, never lets go of the executor: nothing is submitted to the kernel, no
//!   completion is taken, and whatever else the executor has to do starves. A [`Timer`] is not ready when it is first
//!   polled, however short: its task is woken by the reactor, which looks at sockets and files in the same turn.
//! - A glommio timer registers itself at every poll, and what it registered earlier stays until its time has come. The
//!   reactor walks over all registered timers in every turn. A [`Timer`] is registered once.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// Shorter ones are as long as this.
const SHORTEST: Duration = Duration::from_micros(1);

/// Is ready after a duration that begins when the timer is made. Never ready at the first poll.
#[derive(Debug)]
pub struct Timer {
    inner: glommio::timer::Timer,
    due: Instant,
    is_registered: bool,
}

impl Timer {
    pub fn new(duration: Duration) -> Timer {
        let due = Instant::now() + duration;
        Timer { inner: glommio::timer::Timer::new(duration.max(SHORTEST)), due, is_registered: false }
    }
}

impl Future for Timer {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_registered {
            let left = self.due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Poll::Ready(());
            }
            // Takes back what is registered. glommio may also have used it up, up to a millisecond too early.
            self.inner.reset(left);
        }
        let mut at_least = SHORTEST;
        while Pin::new(&mut self.inner).poll(cx).is_ready() {
            // Its time came before it was registered. Twice as long at each try, so that this ends on any machine.
            at_least *= 2;
            self.inner.reset(at_least);
        }
        self.is_registered = true;
        Poll::Pending
    }
}

/// Returns after `duration`, and not before the executor has looked at its sockets and files.
pub async fn sleep(duration: Duration) {
    Timer::new(duration).await;
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::{Read, Write};
    use std::rc::Rc;

    use futures_lite::future::{or, poll_once};
    use futures_lite::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::file::DmaFile;
    use crate::net::TcpListener;
    use crate::{Executor, ExecutorConfig};

    /// How long a starving task is given before the test gives up.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// Runs `work` beside a task that loops on `pause` until the work is done; says whether it was done in time.
    fn is_served_beside<P: Future<Output = ()> + 'static>(
        pause: impl Fn() -> P + 'static,
        work: impl Future<Output = ()> + 'static,
    ) -> bool {
        Executor::run(ExecutorConfig::new("starves", None), async move {
            let done = Rc::new(Cell::new(false));
            let flag = done.clone();
            let worker = crate::spawn(async move {
                work.await;
                flag.set(true);
            });
            let started = Instant::now();
            while !done.get() && started.elapsed() < PATIENCE {
                pause().await;
            }
            let in_time = done.get();
            worker.await;
            in_time
        })
        .expect("an executor")
    }

    /// One byte there and back through a thread, a few times.
    async fn talk() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let peer = std::thread::spawn(move || {
            let mut stream = std::net::TcpStream::connect(address).expect("a connection");
            let mut byte = [0];
            while stream.read_exact(&mut byte).is_ok() {
                stream.write_all(&byte).expect("the other side reads");
            }
        });
        let mut stream = listener.accept().await.expect("a connection");
        for byte in 0..10 {
            stream.write_all(&[byte]).await.expect("written");
            let mut back = [0xff];
            stream.read_exact(&mut back).await.expect("read");
            assert_eq!(back, [byte]);
        }
        drop(stream);
        peer.join().expect("the peer ends well");
    }

    /// A block of a file, a few times.
    async fn read() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), [7; 8192]).expect("written");
        let file = DmaFile::open(file.path()).await.expect("opened");
        for _ in 0..10 {
            let block = file.read_at_aligned(4096, 4096).await.expect("read");
            assert_eq!(&block[..], [7; 4096]);
        }
        file.close().await.expect("closed");
    }

    #[test]
    fn a_socket_is_served_beside_a_task_that_sleeps_for_no_time() {
        assert!(is_served_beside(|| sleep(Duration::ZERO), talk()));
    }

    #[test]
    fn a_file_is_served_beside_a_task_that_sleeps_for_no_time() {
        assert!(is_served_beside(|| sleep(Duration::ZERO), read()));
    }

    #[test]
    fn a_socket_is_served_beside_a_task_whose_clock_is_behind() {
        // A turn that waits for news, or for the next time that something is due.
        let turn = || or(std::future::pending(), sleep(Instant::now().saturating_duration_since(Instant::now())));
        assert!(is_served_beside(turn, talk()));
    }

    #[test]
    fn a_timer_is_never_ready_at_its_first_poll() {
        Executor::run(ExecutorConfig::new("first", None), async {
            for _ in 0..10_000 {
                assert!(poll_once(&mut Timer::new(Duration::ZERO)).await.is_none());
            }
            let mut over = Timer::new(Duration::from_micros(10));
            std::thread::sleep(Duration::from_millis(1));
            assert!(poll_once(&mut over).await.is_none(), "over before it was polled");
            over.await;
        })
        .expect("an executor");
    }

    #[test]
    fn a_timer_that_is_polled_early_keeps_its_time() {
        Executor::run(ExecutorConfig::new("early", None), async {
            const TIME: Duration = Duration::from_millis(20);
            let started = Instant::now();
            let mut timer = Timer::new(TIME);
            while started.elapsed() < TIME / 2 {
                assert!(poll_once(&mut timer).await.is_none());
                sleep(Duration::from_micros(50)).await;
            }
            timer.await;
            assert!(TIME <= started.elapsed());
        })
        .expect("an executor");
    }
}
