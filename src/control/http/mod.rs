//! The HTTP admin of a node: hyper and axum's router on the control core's executor, without tokio.
//!
//! The way of a request:
//!
//! 1. [`server`] accepts the connection, or refuses it above the limit; [`io`] makes its stream and the executor's timer
//!    hyper's own. A client that dawdles over a head or a body is cut.
//! 2. [`routes`] finds the handler; a handler's panic is answered 500 and stays in its request.
//! 3. [`topics`], [`health`], [`metrics`] and [`page`] are the handlers. They ask the node through [`admin::Admin`] and
//!    nothing else; [`body`] reads what the client sent and refuses what it does not know.
//! 4. [`problem`] is every answer that is an error: RFC 9457, with the error numbers of the wire protocol.
//!
//! [`openapi`] describes all of it to clients, and a test holds the description against the router.
//!
//! The admin asks for no credentials. A web page of another origin cannot change topics through somebody's browser: a body
//! counts only as `application/json`, which makes browsers ask first, and no answer allows another origin.

pub mod admin;
mod body;
pub mod damage;
mod health;
mod io;
pub mod metrics;
pub mod openapi;
mod page;
pub mod problem;
mod process;
mod routes;
pub mod server;
pub mod topics;

#[cfg(test)]
mod tests;

pub use admin::Admin;
pub use server::{HttpConfig, HttpServer};
