//! `drava doctor`: looks at the host as a node would before it starts.

use clap::Args;

use super::options::ConfigOptions;
use super::output::{Output, print, print_json, table};
use super::{Exit, Failure};
use crate::node::probe::{self, Finding, Outcome};

/// Look whether this host can run a node, and say what to do where it cannot.
#[derive(Debug, Args)]
pub struct DoctorCommand {
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    options: ConfigOptions,
}

impl DoctorCommand {
    pub fn run(self) -> Result<(), Failure> {
        let loaded = self.options.load()?;
        let findings = probe::probe(&loaded.config);
        match self.output {
            Output::Table => print(findings_table(&findings))?,
            Output::Json => print_json(&findings)?,
        }
        match findings.iter().filter(|finding| finding.is_failed()).count() {
            0 => Ok(()),
            failed => Err(Failure::new(Exit::HostUnfit, format!("{failed} of {} checks failed", findings.len()))),
        }
    }
}

fn findings_table(findings: &[Finding]) -> comfy_table::Table {
    let rows = findings.iter().map(|finding| {
        let outcome = match finding.outcome {
            Outcome::Ok => "ok",
            Outcome::Warning => "warning",
            Outcome::Failed => "FAILED",
        };
        [finding.check.to_owned(), outcome.to_owned(), finding.found.clone(), finding.remedy.clone()]
    });
    table(["check", "outcome", "found", "what to do"], rows)
}
