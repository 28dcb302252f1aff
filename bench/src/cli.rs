//! The command line.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::limits::{self, LimitsConfig};
use crate::load::engine::describe;
use crate::load::{self, Kind, LoadOptions, Outcome};
use crate::progress::Progress;
use crate::suite::{self, SuiteOptions};
use crate::{compare, report, table};

/// The run itself went well, and what it found did not: lost or changed messages, or a target that was missed.
const EXIT_FINDINGS: u8 = 2;

#[derive(Debug, Parser)]
#[command(name = "drava-bench", version, about = "Load generator, limits and reports for Drava", max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure what this machine can do in the shapes of the workloads
    Limits {
        /// Directory on the disk to measure [default: ~/.cache/drava/bench]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// A short look: small files, quarter seconds
        #[arg(long)]
        quick: bool,
        /// Write the figures here
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Publish
    Produce(LoadCommand),
    /// Read what lies in the topics, from their start
    Consume(LoadCommand),
    /// Publish and follow at the end of the topics: latency from publishing to delivery
    Tail(LoadCommand),
    /// Publish and consume at once
    Mixed(LoadCommand),
    /// Print two results beside each other
    Compare {
        /// Results that --json wrote, of one run each or of the suite
        #[arg(value_name = "A.json")]
        before: PathBuf,
        #[arg(value_name = "B.json")]
        after: PathBuf,
    },
    /// Measure the limits, then the standard workloads on fresh nodes, each beside its limit
    Suite(SuiteOptions),
    /// Print the rows of a suite as a Markdown table
    Markdown {
        /// What `suite --json` wrote
        #[arg(value_name = "FILE.json")]
        rows: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
struct LoadCommand {
    #[command(flatten)]
    options: LoadOptions,
    /// Write the result here
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    json: Option<PathBuf>,
    /// Write an HTML report with charts into this directory
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    report: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is no result of drava-bench")]
    Form {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Limits { dir, quick, json } => measure_limits(dir, quick, json.as_deref()),
        Command::Produce(command) => run(Kind::Produce, &command),
        Command::Consume(command) => run(Kind::Consume, &command),
        Command::Tail(command) => run(Kind::Tail, &command),
        Command::Mixed(command) => run(Kind::Mixed, &command),
        Command::Compare { before, after } => compare_files(&before, &after),
        Command::Suite(options) => run_suite(&options),
        Command::Markdown { rows } => print_markdown(&rows),
    };
    result.unwrap_or_else(|error| {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text.push_str(&format!(": {error}"));
            cause = error.source();
        }
        eprintln!("drava-bench: {text}");
        ExitCode::FAILURE
    })
}

type CommandResult = Result<ExitCode, Box<dyn Error>>;

fn measure_limits(dir: Option<PathBuf>, quick: bool, json: Option<&Path>) -> CommandResult {
    let dir = dir.unwrap_or_else(suite::default_dir);
    let progress = Progress::new("limits");
    let limits = limits::run(&LimitsConfig::new(dir, quick), |step| progress.say(step))?;
    drop(progress);
    println!("{}", table::limits(&limits));
    if let Some(path) = json {
        write_json(path, &limits)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn run(kind: Kind, command: &LoadCommand) -> CommandResult {
    let progress = Progress::new(table::kind_name(kind));
    let outcome = load::run(kind, &command.options, &progress);
    drop(progress);
    let outcome = outcome.map_err(|error| describe(&error))?;
    println!("{}", table::outcome(&outcome));
    if let Some(path) = &command.json {
        write_json(path, &outcome)?;
    }
    if let Some(dir) = &command.report {
        let path = report::write(dir, &outcome)?;
        println!("report: {}", path.display());
    }
    Ok(if outcome.faults() == 0 { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FINDINGS) })
}

fn compare_files(before: &Path, after: &Path) -> CommandResult {
    // A list is a result of the suite, an object that of one run.
    if let (Ok(before), Ok(after)) = (read_json::<Outcome>(before), read_json::<Outcome>(after)) {
        println!("{}", compare::outcomes(&before, &after));
        return Ok(ExitCode::SUCCESS);
    }
    let (before, after): (Vec<suite::Row>, Vec<suite::Row>) = (read_json(before)?, read_json(after)?);
    println!("{}", compare::rows(&before, &after));
    Ok(ExitCode::SUCCESS)
}

fn run_suite(options: &SuiteOptions) -> CommandResult {
    let rows = suite::run(options)?;
    println!("{}", table::rows(&rows));
    if let Some(path) = &options.json {
        write_json(path, &rows)?;
    }
    let all_met = rows.iter().all(|row| row.met != Some(false));
    Ok(if all_met { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FINDINGS) })
}

fn print_markdown(rows: &Path) -> CommandResult {
    let rows: Vec<suite::Row> = read_json(rows)?;
    print!("{}", table::markdown(&rows));
    Ok(ExitCode::SUCCESS)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), FileError> {
    let mut text = serde_json::to_string_pretty(value).expect("figures are finite and keys are strings");
    text.push('\n');
    fs::write(path, text).map_err(|source| FileError::Write { path: path.to_owned(), source })
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, FileError> {
    let text = fs::read_to_string(path).map_err(|source| FileError::Read { path: path.to_owned(), source })?;
    serde_json::from_str(&text).map_err(|source| FileError::Form { path: path.to_owned(), source })
}
