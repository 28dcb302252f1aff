//! Tables for people, JSON for machines.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use comfy_table::presets::{NOTHING, UTF8_BORDERS_ONLY};
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;

use super::Failure;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people: a table, with borders on a terminal.
    #[default]
    Table,
    /// For machines.
    Json,
}

/// A table in the manner of all commands: aligned columns, borders only where somebody looks at it.
pub fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> Table {
    let mut table = Table::new();
    if io::stdout().is_terminal() {
        table.load_style(UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    } else {
        table.load_style(NOTHING);
    }
    table.set_header(header);
    for row in rows {
        table.add_row(row);
    }
    table
}

/// Writes text to standard output; a reader that has gone away has seen enough.
pub fn print(text: impl std::fmt::Display) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(Failure::io("standard output", &error)),
        Ok(()) => Ok(()),
    }
}

pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print(serde_json::to_string_pretty(value).expect("what commands print becomes JSON"))
}
