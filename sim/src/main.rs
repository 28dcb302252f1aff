//! `drava-sim`: runs seeds, and one seed again.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use drava_sim::{Outcome, STEPS};
use indicatif::{ProgressBar, ProgressStyle};

/// Simulates the storage of a node on a disk that fails, and checks that it keeps what it promised.
#[derive(Parser)]
#[command(name = "drava-sim", version)]
struct Args {
    /// The first seed. Without it: one that differs each time, which is printed.
    #[arg(long)]
    seed: Option<u64>,
    /// How many seeds to run, one after the other.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// What is done in one run, between its crashes.
    #[arg(long, default_value_t = STEPS)]
    steps: u64,
    /// Threads, each with a seed of its own. Without it: as many as there are cores.
    #[arg(long)]
    jobs: Option<usize>,
    /// Prints every event, and what the storage logs.
    #[arg(long)]
    trace: bool,
    /// Ends with the first seed that fails.
    #[arg(long)]
    first: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.trace {
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_writer(std::io::stderr)
            .without_time()
            .init();
    } else {
        // What failed is printed with its seed.
        std::panic::set_hook(Box::new(|_| {}));
    }
    let seed = args.seed.unwrap_or_else(|| std::process::id() as u64 ^ now_nanos());
    let jobs = args.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1);
    let bar = ProgressBar::new(args.seeds);
    if args.seeds == 1 || args.trace {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {per_sec}, {eta} left");
    bar.set_style(style.expect("a good template"));

    let started = Instant::now();
    let next = AtomicU64::new(0);
    let outcomes: Mutex<Vec<Outcome>> = Mutex::default();
    let work = || {
        loop {
            let nth = next.fetch_add(1, Ordering::Relaxed);
            if args.seeds <= nth {
                break;
            }
            let outcome = drava_sim::run(seed.wrapping_add(nth), args.steps, args.trace);
            if let Some(failure) = &outcome.failure {
                let replay = format!("drava-sim --seed {} --steps {} --trace", outcome.seed, args.steps);
                bar.suspend(|| println!("seed {} fails: {failure}\n  {replay}", outcome.seed));
                if args.first {
                    next.store(args.seeds, Ordering::Relaxed);
                }
            }
            bar.inc(1);
            outcomes.lock().expect("nobody panics with it").push(outcome);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(work);
        }
    });
    bar.finish_and_clear();

    let outcomes = outcomes.into_inner().expect("nobody panics with it");
    let sum = |field: fn(&Outcome) -> u64| outcomes.iter().map(field).sum::<u64>();
    let failed = outcomes.iter().filter(|outcome| outcome.failure.is_some()).count();
    let took = started.elapsed();
    println!(
        "{} seeds from {seed}, {} steps each: {failed} failed; {} crashes, {} acknowledgements, {} messages compared; {:.1} s, {:.0} seeds/s",
        outcomes.len(),
        args.steps,
        sum(|outcome| outcome.crashes),
        sum(|outcome| outcome.acked),
        sum(|outcome| outcome.checked),
        took.as_secs_f64(),
        outcomes.len() as f64 / took.as_secs_f64(),
    );
    if let [outcome] = &outcomes[..] {
        println!("trace {:016x}", outcome.hash);
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn now_nanos() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}
