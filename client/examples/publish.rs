//! Publishes one record and prints where it lies once it is on disk.
//!
//! ```sh
//! cargo run --release -p drava-client --example publish -- 127.0.0.1:7400 orders 'hello'
//! ```

use std::error::Error;

use drava_client::{Client, Record, TopicPolicy};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:7400".to_owned());
    let topic = arguments.next().unwrap_or_else(|| "orders".to_owned());
    let payload = arguments.next().unwrap_or_else(|| "hello".to_owned());

    let client = Client::connect(address).await?;
    client.ensure_topic(&topic, TopicPolicy::default()).await?;
    let producer = client.producer(&topic).build().await?;

    let record = Record::new(payload).key("customer-7").header("content-type", "text/plain");
    let receipt = producer.send(record).await?;
    println!("partition {}, offset {:?}", receipt.partition, receipt.offset);
    Ok(())
}
