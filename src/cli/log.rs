//! `drava log`: looks into the files of a data directory, without a node.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use drava_storage::dump;

use super::Failure;
use super::scrub::VerifyCommand;

/// Look into the journal.
#[derive(Debug, Args)]
pub struct LogCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print what a segment of the journal holds, item by item. Changes nothing; the node may run.
    Dump {
        /// A segment, such as data/shard-000/00000000.segment.
        file: PathBuf,
    },
    Verify(VerifyCommand),
}

impl LogCommand {
    pub fn run(self) -> Result<(), Failure> {
        match self.action {
            Action::Verify(command) => command.run(),
            Action::Dump { file } => {
                let failed = |error: io::Error| Failure::io(&file.display().to_string(), &error);
                let mut out = BufWriter::new(io::stdout().lock());
                for item in dump::segment(&file).map_err(failed)? {
                    match writeln!(out, "{}", item.map_err(failed)?) {
                        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                        written => written.map_err(|error| Failure::io("standard output", &error))?,
                    }
                }
                match out.flush() {
                    Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                        Err(Failure::io("standard output", &error))
                    }
                    Ok(()) | Err(_) => Ok(()),
                }
            }
        }
    }
}
