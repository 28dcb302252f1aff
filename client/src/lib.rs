//! The Rust client of Drava.
#![forbid(unsafe_code)]

mod backoff;
mod client;
mod connection;
mod consumer;
mod error;
mod producer;
pub mod producer_core;
mod reader;
mod record;
pub mod session;

#[cfg(feature = "glommio")]
pub mod glommio_driver;

pub use client::{Client, ClientBuilder};
pub use consumer::{Consumer, ConsumerBuilder};
pub use error::{CallError, ConnectError, OpenProducerError, ReadError, SendError, SubscribeError, TopicError};
pub use producer::{Pending, Producer, ProducerBuilder, Receipt, partition_of_key};
pub use reader::{Reader, ReaderBuilder};
pub use record::{Header, Message, Record};

pub use drava_protocol::batch::Compression;
pub use drava_protocol::message::{Durability, Place, TopicPolicy};
pub use drava_protocol::{ErrorCode, Retry};
