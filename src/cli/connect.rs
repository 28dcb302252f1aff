//! The connection to a node that client commands share.

use std::future::Future;

use clap::Args;
use drava_client::Client;

use super::{Exit, Failure};

#[derive(Clone, Debug, Args)]
pub struct ServerOptions {
    /// The node to talk to: host:port.
    #[arg(long, env = "DRAVA_SERVER", default_value = "127.0.0.1:7400", value_name = "HOST:PORT")]
    pub server: String,
}

impl ServerOptions {
    pub async fn connect(&self) -> Result<Client, Failure> {
        let name = concat!("drava-cli/", env!("CARGO_PKG_VERSION"));
        Ok(Client::builder(&self.server).client_name(name).connect().await?)
    }
}

/// Runs a client command to its end on a runtime of this thread.
pub fn block_on(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failed, format!("the runtime does not start: {error}")))?;
    runtime.block_on(command)
}
