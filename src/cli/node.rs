//! `drava node`: runs a node until it is told to stop.

use std::io::IsTerminal;

use clap::Args;
use tracing_subscriber::EnvFilter;

use super::exit::with_sources;
use super::options::ConfigOptions;
use super::output::print;
use super::{Exit, Failure};
use crate::config::print::print as print_config;
use crate::config::{LogConfig, LogFormat};
use crate::node::boot::{self, BootError, RunningNode};
use crate::node::probe::Finding;

/// Run a node. SIGTERM and SIGINT make it finish what is in flight and end.
#[derive(Debug, Args)]
pub struct NodeCommand {
    /// Print the configuration that the node would run with, as a file, and end.
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    options: ConfigOptions,
}

impl NodeCommand {
    pub fn run(self) -> Result<(), Failure> {
        let loaded = self.options.load()?;
        let config = loaded.config;
        if self.print_config {
            return print(print_config(&config).trim_end());
        }
        start_logging(&config.log);
        for (variable, near) in &loaded.suspects {
            tracing::warn!("the environment variable {variable} is no option; {near} is");
        }
        drava_runtime::memory::keep_freed_blocks();
        let node = boot::start(&config)?;
        print(announcement(&node))?;
        node.run_until_signal()?;
        tracing::info!("stopped");
        Ok(())
    }
}

/// Where the node is, for whoever started it by hand.
fn announcement(node: &RunningNode) -> String {
    let shards: Vec<String> = node.ports.shards.iter().map(u16::to_string).collect();
    format!(
        "drava {}: serving on {} (shards on {}), admin on http://{}, started in {} ms",
        env!("CARGO_PKG_VERSION"),
        node.ports.listen,
        shards.join(", "),
        node.ports.admin,
        node.took.as_millis()
    )
}

fn start_logging(config: &LogConfig) {
    // The metadata group tells each heartbeat at our level; its warnings are enough.
    let level = config.level.name();
    let filter = EnvFilter::new(format!("{level},openraft={}", if level == "error" { "error" } else { "warn" }));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match config.format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
}

impl From<BootError> for Failure {
    fn from(error: BootError) -> Failure {
        match &error {
            BootError::Host(findings) => {
                let failed = findings.iter().filter(|finding| finding.is_failed());
                let lines: Vec<String> = failed.map(Finding::sentence).collect();
                Failure::new(Exit::HostUnfit, format!("{error}:\n{}", lines.join("\n")))
            }
            BootError::DataDir(_) | BootError::Port(_) => Failure::new(Exit::HostUnfit, with_sources(&error)),
            BootError::Reshard(_)
            | BootError::Executor { .. }
            | BootError::Shard(_)
            | BootError::Control(_)
            | BootError::Signals(_)
            | BootError::DrainTimeout => Failure::new(Exit::Failed, with_sources(&error)),
        }
    }
}
