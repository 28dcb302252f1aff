//! The Rust client of Drava.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use drava_client::{Client, Place, TopicPolicy};
//!
//! let client = Client::connect("127.0.0.1:7400").await?;
//! client.ensure_topic("orders", TopicPolicy::default()).await?;
//!
//! let producer = client.producer("orders").build().await?;
//! let receipt = producer.send("hello").await?;
//! println!("on disk at {:?}", receipt.offset);
//!
//! let mut reader = client.reader("orders").from(Place::Earliest).until_end().build().await?;
//! while let Some(message) = reader.next().await? {
//!     println!("{}: {:?}", message.offset, message.payload);
//! }
//!
//! let mut consumer = client.subscribe("orders", "billing").build().await?;
//! let message = consumer.next().await?;
//! consumer.ack(&message);
//! consumer.close().await?;
//! # Ok(())
//! # }
//! ```
//!
//! The way of a record: [`Producer::enqueue`] puts it into the open batch of its partition's lane ([`producer_core`]); the
//! lane's task gives sealed batches to the task of the connection to the owning core, which frames them ([`session`]) and
//! gives the answers back to the lane. The way back: a [`Reader`] fetches, a [`Consumer`] is pushed to, and both unpack one
//! batch at a time into [`Message`]s that share the memory in which they were received.
//!
//! Everything runs on the tokio runtime of the caller, and needs its IO and time drivers. `README.md` tells what is
//! promised; `examples/` holds `publish`, `pipelined`, `consume` and `subscribe`.
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
pub use drava_protocol::message::{
    CachePolicy, Durability, PartitionPlace, PartitionState, Place, SubscriptionState, Topic, TopicPolicy,
};
pub use drava_protocol::{ErrorCode, Retry};
