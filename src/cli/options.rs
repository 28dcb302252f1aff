//! One flag for each option of the configuration, made from its declaration.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use super::{Exit, Failure};
use crate::config::load::{Loaded, Sources, load};
use crate::config::{NodeConfig, OptionSpec};

/// Where the configuration of a node comes from.
#[derive(Clone, Debug, Default)]
pub struct ConfigOptions {
    file: Option<PathBuf>,
    /// By path: `storage.segment_bytes`.
    flags: Vec<(String, String)>,
}

impl ConfigOptions {
    /// Reads file, environment and flags.
    pub fn load(self) -> Result<Loaded, Failure> {
        let env = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        load(&Sources { file: self.file, env, flags: self.flags })
            .map_err(|errors| Failure::new(Exit::Usage, errors.to_string()))
    }
}

fn argument(spec: &OptionSpec) -> Arg {
    let heading = if spec.section.is_empty() { "Node" } else { spec.section };
    Arg::new(spec.path())
        .long(spec.flag())
        .value_name("VALUE")
        .help(format!("{} [{}; env: {}]", spec.doc, spec.limits(), spec.env()))
        .help_heading(heading)
}

impl Args for ConfigOptions {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new("config")
            .long("config")
            .env("DRAVA_CONFIG")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("Configuration file (TOML). `drava node --print-config` prints one with all options");
        NodeConfig::all_specs().iter().fold(command.arg(file), |command, spec| command.arg(argument(spec)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ConfigOptions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut options = ConfigOptions::default();
        options.update_from_arg_matches(matches)?;
        Ok(options)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.file = matches.get_one::<PathBuf>("config").cloned();
        self.flags = NodeConfig::all_specs()
            .iter()
            .filter_map(|spec| Some((spec.path(), matches.get_one::<String>(&spec.path())?.clone())))
            .collect();
        Ok(())
    }
}
