//! The lost park of glommio, and that the ticker ends it.
//!
//! What may hang runs in a process of its own: this test binary again, with the case in its environment. A watch there
//! looks whether the work goes on, and exits with [`STALLED`] when it does not.

use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use drava_runtime::executor::{TICK, mark_active, ticker_stats};
use drava_runtime::net::{TcpListener, TcpStream};
use drava_runtime::{Executor, ExecutorConfig, yield_now};
use futures_lite::{AsyncReadExt, AsyncWriteExt};

const CASE: &str = "DRAVA_STALL_CASE";
/// How long a case runs when it does not stall.
const RUN: Duration = Duration::from_secs(2);
/// No progress for this long is a stall: far beyond what a busy machine does to a thread, and a lost park has no end.
const STALL: Duration = Duration::from_secs(3);
const STALLED: i32 = 3;
/// A process that is not done by then is ended; no case runs as long.
const DEADLINE: Duration = Duration::from_secs(60);

/// What an executor does all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// A task that always has something to do, and yields.
    Yield,
    /// Two tasks that wait for each other at the ends of a connection.
    Talk,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    preempt_timer: Duration,
    ticker: bool,
    work: Work,
}

impl Case {
    fn to_text(self) -> String {
        let Case { preempt_timer, ticker, work } = self;
        format!("{} {ticker} {}", preempt_timer.as_micros(), work == Work::Talk)
    }

    fn from_text(text: &str) -> Option<Case> {
        let mut words = text.split(' ');
        let preempt_timer = Duration::from_micros(words.next()?.parse().ok()?);
        let ticker = words.next()?.parse().ok()?;
        let work = if words.next()?.parse().ok()? { Work::Talk } else { Work::Yield };
        Some(Case { preempt_timer, ticker, work })
    }

    /// Runs the case in a process of its own.
    fn run(self) -> ExitStatus {
        let mut process = Process(
            Command::new(std::env::current_exe().expect("this test binary"))
                .args(["--ignored", "--exact", "case_in_a_process_of_its_own", "--nocapture"])
                .env(CASE, self.to_text())
                .stdout(Stdio::null())
                .spawn()
                .expect("a process"),
        );
        let started = Instant::now();
        loop {
            match process.0.try_wait().expect("our child") {
                Some(status) => return status,
                None if DEADLINE < started.elapsed() => panic!("{self:?} neither ran nor stalled"),
                None => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn stalls(self) -> bool {
        let status = self.run();
        assert!(status.success() || status.code() == Some(STALLED), "{self:?} ended with {status}");
        !status.success()
    }
}

/// Ended with the test, whatever comes of it.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What the executor tells the watch.
#[derive(Debug, Default)]
struct Seen {
    turns: AtomicU64,
    ticks: AtomicU64,
}

impl Seen {
    fn turn(&self) {
        mark_active();
        self.turns.fetch_add(1, Relaxed);
        self.ticks.store(ticker_stats().ticks, Relaxed);
    }
}

async fn keep_yielding(seen: Arc<Seen>) {
    loop {
        seen.turn();
        yield_now().await;
    }
}

async fn keep_talking(seen: Arc<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    drava_runtime::spawn(async move {
        let mut stream = listener.accept().await.expect("a connection");
        let mut byte = [0];
        while stream.read_exact(&mut byte).await.is_ok() {
            stream.write_all(&byte).await.expect("the other end reads");
        }
    });
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    let mut byte = [0];
    loop {
        stream.write_all(&byte).await.expect("written");
        stream.read_exact(&mut byte).await.expect("read");
        seen.turn();
    }
}

#[test]
#[ignore = "run by the other tests, in processes of its own"]
fn case_in_a_process_of_its_own() {
    let Some(case) = std::env::var(CASE).ok().and_then(|text| Case::from_text(&text)) else { return };
    let seen = Arc::new(Seen::default());
    let shown = seen.clone();
    let config = ExecutorConfig {
        preempt_timer: case.preempt_timer,
        ticker: case.ticker,
        ..ExecutorConfig::new("stalls", None)
    };
    let executor = Executor::start(config, move || async move {
        match case.work {
            Work::Yield => keep_yielding(shown).await,
            Work::Talk => keep_talking(shown).await,
        }
    });
    let _executor = executor.expect("an executor");

    let started = Instant::now();
    let (mut turns, mut turned_at) = (0, started);
    loop {
        thread::sleep(Duration::from_millis(5));
        let now = seen.turns.load(Relaxed);
        if now == turns && STALL <= turned_at.elapsed() {
            std::process::exit(STALLED);
        }
        if now != turns {
            (turns, turned_at) = (now, Instant::now());
            if RUN <= started.elapsed() {
                break;
            }
        }
    }
    if case.ticker {
        // Loosely: a busy machine gives the executor no time for most of its ticks.
        let ticks_min = RUN.as_millis() / TICK.as_millis() / 20;
        assert!(ticks_min <= u128::from(seen.ticks.load(Relaxed)), "{seen:?}");
    }
    // The executor's thread has no end.
    std::process::exit(0);
}

/// Short enough that the park is lost within seconds, and long enough that it is not lost at every turn: then no timer helps.
const PROVOKING: Duration = Duration::from_micros(100);

#[test]
fn without_a_ticker_a_lost_park_stalls_the_executor() {
    let case = Case { preempt_timer: PROVOKING, ticker: false, work: Work::Yield };
    // Should this fail with a newer glommio, then the park is not lost any more, and the ticker may go.
    assert!((0..10).any(|_| case.stalls()));
}

#[test]
fn the_ticker_ends_lost_parks() {
    for work in [Work::Yield, Work::Talk] {
        let case = Case { preempt_timer: PROVOKING, ticker: true, work };
        assert!((0..3).all(|_| !case.stalls()), "{case:?}");
    }
}

#[test]
fn executors_as_the_node_configures_them_do_not_stall() {
    let config = ExecutorConfig::new("", None);
    assert!(config.ticker);
    for work in [Work::Yield, Work::Talk] {
        let case = Case { preempt_timer: config.preempt_timer, ticker: config.ticker, work };
        assert!(!case.stalls(), "{case:?}");
    }
}
