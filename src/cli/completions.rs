//! `drava completions`: what the shell needs to complete our commands.

use clap::{Args, Command};
use clap_complete::Shell;

use super::Failure;
use super::output::print;

/// Print the completions for a shell: `source <(drava completions bash)`.
#[derive(Debug, Args)]
pub struct CompletionsCommand {
    shell: Shell,
}

impl CompletionsCommand {
    pub fn run(self, command: &mut Command) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, command, "drava", &mut script);
        print(String::from_utf8_lossy(&script).trim_end())
    }
}
