//! `drava-bench`: load on a node, limits of the machine, reports.

use std::process::ExitCode;

fn main() -> ExitCode {
    drava_bench::cli::main()
}
