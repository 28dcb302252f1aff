//! What the user types, one file a command.
//!
//! Every command ends in an [`Exit`]: its number is the process's exit code and means the same in all of them. What was
//! asked for goes to standard output; summaries, progress and errors to standard error.

mod completions;
mod connect;
mod consume;
mod doctor;
mod exit;
mod json;
mod log;
mod node;
mod options;
mod output;
mod produce;
mod quantity;
mod scrub;
mod topic;

use std::io::Write;

use clap::{CommandFactory, Parser, Subcommand};

pub use exit::{Exit, Failure};

/// A message broker that acknowledges what is on disk.
#[derive(Debug, Parser)]
#[command(name = "drava", version, max_term_width = 120, after_help = exit::table())]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Node(node::NodeCommand),
    Topic(topic::TopicCommand),
    Produce(produce::ProduceCommand),
    Consume(consume::ConsumeCommand),
    Doctor(doctor::DoctorCommand),
    Log(log::LogCommand),
    Scrub(scrub::ScrubCommand),
    Completions(completions::CompletionsCommand),
}

/// Runs the command line of this process, and ends it.
pub fn main() -> ! {
    // clap ends the process itself for --help (0) and for what it does not understand (2).
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Node(command) => command.run(),
        Command::Topic(command) => command.run(),
        Command::Produce(command) => command.run(),
        Command::Consume(command) => command.run(),
        Command::Doctor(command) => command.run(),
        Command::Log(command) => command.run(),
        Command::Scrub(command) => command.run(),
        Command::Completions(command) => command.run(&mut Cli::command()),
    };
    let exit = match outcome {
        Ok(()) => Exit::Ok,
        Err(failure) => {
            // Standard error may be gone, and then there is nobody to tell.
            drop(writeln!(std::io::stderr(), "drava: {}", failure.text));
            failure.exit
        }
    };
    // What cannot be printed any more, nobody waits for.
    drop(std::io::stdout().flush());
    drava_runtime::leave(i32::from(exit.number()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn commands_are_understood() {
        for line in [
            "drava node",
            "drava node --config drava.toml --print-config",
            "drava node --listen 127.0.0.1:0 --shards 2 --storage-segment-bytes 8MiB --cores 0,1",
            "drava topic create orders --partitions 4 --durability memory --retention 7d --retention-bytes 10GiB",
            "drava topic create orders --trim-consumed --retention 7d --cache none",
            "drava topic list --output json",
            "drava topic describe /acme/shop/orders --server 127.0.0.1:7400",
            "drava topic delete orders",
            "drava produce orders --file lines.txt --create --compression zstd --key-separator :",
            "drava produce orders --batch-bytes 1MiB --linger-ms 5 --delimiter \\0",
            "drava consume orders --from earliest --count 5",
            "drava consume orders --from offset:10 --partition 0 --follow --format json",
            "drava consume orders --from time:1700000000000 --subscription billing",
            "drava doctor --data-dir /var/lib/drava --output json",
            "drava log dump data/shard-000/segment-0",
            "drava log verify data/shard-000 data/meta/log --output json --while-in-use",
            "drava scrub --data-dir data --output json",
            "drava completions bash",
        ] {
            if let Err(error) = parse(line) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn what_is_not_understood_is_a_usage_error() {
        for line in [
            "drava",
            "drava nod",
            "drava node --no-such-option 1",
            "drava produce",
            "drava consume orders --from yesterday",
            "drava consume orders --from offset:-1",
            "drava consume orders --format xml",
            "drava produce orders --batch-bytes 1MB",
            "drava produce orders --compression gzip",
            "drava topic create orders --partitions 0",
            "drava topic create orders --retention 7y",
            "drava topic create orders --trim-consumed maybe",
            "drava completions cmd.exe",
            "drava log verify",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), i32::from(Exit::Usage.number()), "{line}");
        }
    }
}
