//! Prints every message of a topic that is kept, then ends.
//!
//! ```sh
//! cargo run --release -p drava-client --example consume -- 127.0.0.1:7400 orders
//! ```

use std::error::Error;

use drava_client::{Client, Place};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:7400".to_owned());
    let topic = arguments.next().unwrap_or_else(|| "orders".to_owned());

    let client = Client::connect(address).await?;
    // Without `until_end` it would wait for new messages for ever.
    let mut reader = client.reader(topic).from(Place::Earliest).until_end().build().await?;
    while let Some(message) = reader.next().await? {
        let text = String::from_utf8_lossy(&message.payload);
        println!("{}/{} {text}", message.partition, message.offset);
    }
    Ok(())
}
